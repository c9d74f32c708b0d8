"""The feed's websocket accepts what RFC 6455 allows, and closes with the right code otherwise."""

from __future__ import annotations

import asyncio
import os
import struct

HANDSHAKE = (
    b"GET /api/v1/feed HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
TEXT, BINARY, CLOSE, PING, FINAL = 0x1, 0x2, 0x8, 0x9, 0x80


def frame(first: int, payload: bytes = b"", *, masked: bool = True) -> bytes:
    """A frame of up to 125 bytes, as a client sends it."""
    if not masked:
        return struct.pack("!BB", first, len(payload)) + payload
    mask = os.urandom(4)
    body = bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))
    return struct.pack("!BB", first, 0x80 | len(payload)) + mask + body


def closing(code: int, reason: bytes = b"") -> bytes:
    return frame(FINAL | CLOSE, struct.pack("!H", code) + reason)


# Bytes that a viewer sends, and the close code that it gets.
ENDS: dict[str, tuple[bytes, int]] = {
    "an unmasked frame": (frame(FINAL | TEXT, b"hello", masked=False), 1002),
    "an unmasked close": (frame(FINAL | CLOSE, b"\x03\xe8", masked=False), 1002),
    "a reserved bit": (frame(FINAL | 0x40 | TEXT, b"hello"), 1002),
    "a reserved opcode": (frame(FINAL | 0x3, b"hello"), 1002),
    "a reserved control opcode": (frame(FINAL | 0xB), 1002),
    "a fragmented ping": (frame(PING), 1002),
    "a long ping": (struct.pack("!BBH", FINAL | PING, 0x80 | 126, 126) + bytes(130), 1002),
    "a continuation of nothing": (frame(FINAL, b"hello"), 1002),
    "a message inside another": (frame(TEXT, b"a") + frame(FINAL | TEXT, b"b"), 1002),
    "text that isn't UTF-8": (frame(FINAL | TEXT, b"\xff"), 1007),
    "text that isn't UTF-8, in fragments": (frame(TEXT, b"\xc3") + frame(FINAL, b"\x28"), 1007),
    "a close of one byte": (frame(FINAL | CLOSE, b"\x03"), 1002),
    "a close code below 1000": (closing(999), 1002),
    "a close code that is reserved": (closing(1005), 1002),
    "a close code that isn't defined": (closing(2000), 1002),
    "a close code above 4999": (closing(5000), 1002),
    "a close reason that isn't UTF-8": (closing(1000, b"\xff"), 1007),
    "a close": (closing(1000, "bye…".encode()), 1000),
    "a close with a code of its own": (closing(4000), 4000),
    "a close without a code": (frame(FINAL | CLOSE), 1005),
    "messages and a ping before a close": (
        frame(FINAL | TEXT, b"a") + frame(TEXT, b"\xc3") + frame(FINAL | PING, b"p")
        + frame(FINAL, b"\xa4") + frame(FINAL | BINARY, b"\xff") + closing(1001),
        1001,
    ),
}  # fmt: skip


async def converse(port: int, sent: bytes) -> tuple[bytes, int | None]:
    """The status line that a handshake is answered with, and the code of the close frame that comes in the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101 "):
            return head.partition(b"\r\n")[0], None
        while True:
            first, size = await reader.readexactly(2)
            if size == 126:
                (size,) = struct.unpack("!H", await reader.readexactly(2))
            payload = await reader.readexactly(size)
            if first == FINAL | CLOSE:
                assert await reader.read() == b"", "something comes after the close frame"
                return head.partition(b"\r\n")[0], int.from_bytes(payload[:2]) if payload else 1005
    finally:
        writer.close()


async def test_a_viewer_is_closed_with_the_right_code(http_server: object, http_port: int) -> None:
    """Malformed frames end in 1002, text that can't be decoded in 1007, and a close is echoed if its code is one."""
    for case, (sent, code) in ENDS.items():
        answered = await converse(http_port, HANDSHAKE + sent)
        assert answered == (b"HTTP/1.1 101 Switching Protocols", code), case


async def test_http10_is_not_upgraded(http_server: object, http_port: int) -> None:
    """RFC 9110, 7.8: there Upgrade means nothing. The answer is that of a plain GET."""
    old = HANDSHAKE.replace(b"HTTP/1.1", b"HTTP/1.0")
    assert await converse(http_port, old) == (b"HTTP/1.1 426 Upgrade Required", None)
