"""Hostile bytes sent to the real server are refused, and have no effect.

The cases are in http1/, where the HTTP server is tested alone; here it has the real application behind it.
"""

from __future__ import annotations

import contextlib
import random
import socket

import pytest
from http1.test_hostile import REFUSED
from support import Client, ServerProcess

GENERATE = b"POST /api/v1/keys HTTP/1.1\r\nHost: localhost\r\n\r\n"
HANDSHAKE = (
    b"GET /api/v1/feed HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
PING, PONG = b"\x89\x80\0\0\0\0", b"\x8a\0"
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "BREW")
TARGETS = (
    "/api/v1/keys",
    "/api/v1/keys/acquire",
    "/api/v1/keys/nobody/unblock",
    "/api/v1/batch",
    "/api/v1/feed",
    "/api/v1/random_api_key/?api_key=x",
    "/",
    "/healthz",
    "*",
)


def answers(server: ServerProcess, *pieces: bytes) -> bytes:
    """All that the server sends to these bytes until it disconnects; the caller then shuts its side."""
    with socket.create_connection((server.address, server.port), 30) as wire:
        with contextlib.suppress(OSError):  # it may have hung up by then
            for piece in pieces:
                wire.sendall(piece)
            wire.shutdown(socket.SHUT_WR)
        said = b""
        with contextlib.suppress(ConnectionError):
            while data := wire.recv(65536):
                said += data
    return said


def test_ambiguous_requests_are_refused(server: ServerProcess, client: Client) -> None:
    """Once, and nothing behind it is read as a request."""
    if "--http=tornado" in server.flags:
        pytest.skip("how strict Tornado's own server is, is Tornado's to say")
    for name, data in REFUSED.items():
        with socket.create_connection((server.address, server.port), 30) as wire:
            said = b""
            with contextlib.suppress(ConnectionError):
                wire.sendall(data + GENERATE)
                while received := wire.recv(65536):
                    said += received
        assert said.startswith((b"HTTP/1.1 4", b"HTTP/1.1 100")), f"{name}: {said!r}"
        assert said.count(b"HTTP/1.1 4") == 1, f"{name}: {said!r}"
        assert b"HTTP/1.1 2" not in said, f"{name}: {said!r}"
    assert client.get("/api/v1/stats").json["total"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_noise_is_answered_without_a_500(server: ServerProcess, client: Client, seed: int) -> None:
    """Requests with a few bytes changed, split at random places; the next caller is served."""
    rng = random.Random(seed)
    for _ in range(100):
        data = bytearray()
        for _ in range(rng.randint(1, 4)):
            body = rng.choice([b"", b"{}", b'{"wait":0}', b'{"op":"acquire","count":1}', rng.randbytes(50)])
            head = f"{rng.choice(METHODS)} {rng.choice(TARGETS)} HTTP/1.1\r\nHost: localhost\r\n"
            data += f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        for _ in range(rng.randint(0, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        cuts = sorted(rng.randrange(len(data)) for _ in range(rng.randint(0, 5)))
        pieces = [bytes(data[a:b]) for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        assert b"HTTP/1.1 5" not in answers(server, *pieces).replace(b"HTTP/1.1 501 Not Implemented", b"")
    assert client.get("/healthz").status == 200
    made = [f"id:{row['id']}" for row in client.get("/api/v1/keys?limit=500").json["keys"]]
    if made:  # delete the keys that noise has generated
        client.batch(op="delete", keys=made).expect(200)


def test_frames_in_the_packet_of_the_handshake_are_read(server: ServerProcess) -> None:
    """They come in the same packet, before the server has said that it will speak so."""
    with socket.create_connection((server.address, server.port), 30) as wire:
        wire.sendall(HANDSHAKE + PING)
        said = b""
        while PONG not in said:
            data = wire.recv(65536)
            assert data, said
            said += data
        assert said.startswith(b"HTTP/1.1 101 ")
        assert b'"type":"hello"' in said or b'"type": "hello"' in said
