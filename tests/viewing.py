"""A viewer of the feed for the tests: a websocket by hand, so that a test can read late, or never.

Frames are checked as they are read for what the contract promises of all of them: `seq` grows by one, `now`
is a moment, and no more members than there should be.
"""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import struct
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self

from support import API, MOMENT, ServerProcess, expect_object

FEED: Final = API + "/feed"
STATS: Final = (
    "total", "available", "blocked", "cooling", "quarantined", "waiting",
    "generated", "acquired", "unblocked", "released", "deleted", "expired", "kept_alive", "refused",
    "cooled", "quarantines", "restored", "imported", "paced", "uptime", "engine", "version",
)  # fmt: skip
EVENTS: Final = (
    "generated", "imported", "acquired", "unblocked", "released", "deleted", "expired",
    "cooled", "ready", "quarantined", "restored", "revealed",
)  # fmt: skip
BY: Final = ("holder", "deadline", "operator")
HINT: Final = re.compile(r".{4}….{4}|.{2}….{2}|…")
CLOSE: Final = 0x8


class Closed(Exception):
    """The server has closed; `code` is why."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"closed: {code} {reason}")
        self.code = code
        self.reason = reason


class Viewer:
    """One open feed. `status` and `head` are what the handshake was answered; `problem` if it was refused."""

    def __init__(
        self,
        server: ServerProcess,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
        buffer: int = 0,
        path: str = FEED,
    ) -> None:
        self.server = server
        self.socket = socket.socket()
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.settimeout(60)
        self.socket.connect((server.address, server.port))
        self._buffer = b""
        self.seq = 0
        sent = {
            "Host": server.host, "Upgrade": "websocket", "Connection": "Upgrade",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
        }  # fmt: skip
        if token:
            sent["Authorization"] = f"Bearer {token}"
        sent.update(headers or {})
        lines = "".join(f"{name}: {value}\r\n" for name, value in sent.items() if value)
        self.socket.sendall(f"GET {path} HTTP/1.1\r\n{lines}\r\n".encode())
        while b"\r\n\r\n" not in self._buffer:
            self._more()
        head, self._buffer = self._buffer.split(b"\r\n\r\n", 1)
        self.head = head.decode("latin-1")
        self.status = int(self.head.split()[1])

    def problem(self) -> dict[str, Any]:
        """What a refused handshake was answered."""
        length = re.search(r"(?i)content-length: (\d+)", self.head)
        assert length, self.head
        while len(self._buffer) < int(length[1]):
            self._more()
        answer: dict[str, Any] = json.loads(self._buffer)
        return answer

    def frame(self, within: float = 20) -> dict[str, Any]:
        """The next frame, checked. Raises Closed."""
        self.socket.settimeout(within)
        opcode, payload = self._read()
        if opcode == CLOSE:
            code = struct.unpack("!H", payload[:2])[0] if payload else 1005
            raise Closed(code, payload[2:].decode())
        if opcode != 0x1:  # a ping: nobody promised an answer
            return self.frame(within)
        frame: dict[str, Any] = json.loads(payload)
        self.seq += 1
        assert frame["seq"] == self.seq, f"frame {self.seq} is numbered {frame['seq']}"
        return check(frame)

    def until(self, wanted: str) -> dict[str, Any]:
        """The next frame of this type, whatever comes before it."""
        while (frame := self.frame())["type"] != wanted:
            pass
        return frame

    def collect(self, seconds: float) -> list[tuple[float, dict[str, Any]]]:
        """All frames of this time, each with its moment of `time.monotonic`."""
        frames, until = [], time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            try:
                frames.append((time.monotonic(), self.frame(left)))
                frames[-1] = (time.monotonic(), frames[-1][1])
            except TimeoutError:
                break
        return frames

    def _read(self) -> tuple[int, bytes]:
        """A frame, taken from the buffer when it is whole: time may run out in the middle of one."""
        self._have(2)
        length, start = self._buffer[1] & 0x7F, 2
        if length >= 126:
            start = 4 if length == 126 else 10
            self._have(start)
            length = int.from_bytes(self._buffer[2:start], "big")
        self._have(start + length)
        opcode, payload = self._buffer[0] & 0x0F, self._buffer[start : start + length]
        self._buffer = self._buffer[start + length :]
        return opcode, payload

    def _have(self, size: int) -> None:
        while len(self._buffer) < size:
            self._more()

    def _more(self) -> None:
        received = self.socket.recv(65536)
        if not received:
            raise Closed(1006, "the connection ended without a close frame")
        self._buffer += received

    def close(self) -> None:
        """Hang up."""
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def charts_shown(server: ServerProcess, path: str = FEED) -> dict[str, Any]:
    """What the charts show to a new viewer: the latest 15 minutes, by the second."""
    with Viewer(server, path=path) as viewer:
        found: dict[str, Any] = viewer.frame()["history"]["seconds"]
    return found


def check(frame: dict[str, Any]) -> dict[str, Any]:
    """The frame, if it has exactly the members of its type."""
    common: dict[str, object] = {"type": ("hello", "delta", "beat"), "seq": int, "now": MOMENT}
    extra: dict[str, dict[str, object]] = {
        "hello": {"stats": dict, "history": (dict, None), "events": list},
        "delta": {"stats": dict, "events": list, "dropped": int},
        "beat": {},
    }
    expect_object(frame, **(common | extra[frame["type"]]))
    if "stats" in frame:
        assert tuple(frame["stats"]) == STATS
        assert len(frame["events"]) <= 50
    for event in frame.get("events", []):
        expect_object(
            event, event=EVENTS, id=int, hint=HINT, owner=(str, None), lease=(int, None), at=MOMENT,
            by=BY, actor=(str, None),
        )  # fmt: skip
    return frame
