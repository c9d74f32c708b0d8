"""A connection of the fast server without a socket: feeds it bytes in given pieces, and records the requests.

It reads thousands of streams a second. The application takes every request raw, records it when its body is
complete, and answers at once.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tornado import web

from keypool.config.limits import Limits
from keypool.http.http1 import RawDelegate, Refusal, Request, Server
from keypool.http.http1.connection import LINGERING, OPEN, Connection
from keypool.http.http1.reader import READING

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
END = b"\r\n\r\n"
_TURNS = 10_000  # of the loop, for one piece: far more than any needs


class Taken(NamedTuple):
    """A request as the application was given it."""

    method: bytes
    target: bytes
    body: bytes


@dataclass
class Outcome:
    """The result of a stream: requests, in order; the statuses of the server's own answers; whether it ended."""

    taken: list[Taken] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    ended: bool = False
    sent: bytes = b""


class _Delegate(RawDelegate):
    def __init__(self, request: Request, outcome: Outcome) -> None:
        self.request = request
        self.outcome = outcome

    def run(self, body: bytes) -> None:
        self.outcome.taken.append(Taken(self.request.method, self.request.target, body))
        self.request.respond(ANSWER)


class _Application(web.Application):
    outcome: Outcome

    def start_raw_request(self, request: Request) -> RawDelegate:
        return _Delegate(request, self.outcome)


class _Socket(NamedTuple):
    family: int = socket.AF_INET


class _Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__({"socket": _Socket(), "peername": ("127.0.0.1", 1)})
        self.sent = bytearray()
        self.paused = False
        self.closed = False

    def write(self, data: Any) -> None:
        self.sent += data

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def write_eof(self) -> None:
        pass

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


class Reader:
    """Reads streams, each on a connection of its own, all on one server. Needs a running loop."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._application = _Application()
        self.server = Server(self._application, limits=limits, on_refused=self._on_refused)
        self.server.add_sockets([])
        self._outcome: Outcome

    def _on_refused(self, refusal: Refusal) -> None:
        self._outcome.refused.append(refusal.status)

    async def read(self, pieces: Sequence[bytes]) -> Outcome:
        """Receive these pieces, one after the other, as far as the server wants them."""
        outcome = self._outcome = self._application.outcome = Outcome()
        connection = Connection(self.server, asyncio.get_running_loop())
        transport = _Transport()
        connection.connection_made(transport)
        for piece in pieces:
            if transport.closed:
                break
            connection.data_received(piece)
            await _settled(connection, transport)
        await asyncio.sleep(0)  # for the answers to be written
        outcome.ended = transport.closed or connection.state >= LINGERING
        outcome.sent = bytes(transport.sent)
        connection.connection_lost(None)
        return outcome


async def _settled(connection: Connection, transport: _Transport) -> None:
    """Run the loop until the connection has no work left for later turns."""
    for _ in range(_TURNS):
        held = connection._held and connection.state == OPEN and connection.reader.state == READING
        if not (transport.paused or connection._scheduled or held):
            return
        await asyncio.sleep(0)
    raise AssertionError("the connection doesn't go on")


def behind_each_head(stream: bytes) -> list[bytes]:
    """The stream, cut behind every empty line: where a proxy's packets often end."""
    parts = stream.split(END)
    return [piece for piece in [*(part + END for part in parts[:-1]), parts[-1]] if piece]


def cut(stream: bytes, rng: random.Random, most: int = 6) -> list[bytes]:
    """The stream, cut at up to `most` random places."""
    places = sorted(rng.randrange(len(stream) + 1) for _ in range(rng.randint(1, most)))
    pieces = [stream[a:b] for a, b in zip([0, *places], [*places, len(stream)], strict=True)]
    return [piece for piece in pieces if piece]


def mutated(stream: bytes, rng: random.Random, others: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    """The stream with one to four changes: bytes, lines, words of HTTP, or parts of other streams."""
    data = stream
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        size = rng.choice((1, 1, 2, 5, 20, 100))
        match rng.randrange(8):
            case 0:
                data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
            case 1:
                data = data[:at] + data[at + size :]
            case 2:
                data = data[:at] + data[at : at + size] + data[at:]
            case 3 | 4:
                data = data[:at] + rng.choice(words) + data[at:]
            case 5:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                data = data[:at] + other[start : start + 8 * size] + data[at:]
            case 6:
                data = data + rng.choice(others)
            case 7:
                lines = data.split(b"\r\n")
                line = lines.pop(rng.randrange(len(lines)))
                lines.insert(rng.randrange(len(lines) + 1), line)
                if rng.random() < 0.5:
                    lines.insert(rng.randrange(len(lines) + 1), line)
                data = b"\r\n".join(lines)
    return data


WORDS = (
    b"\r\n",
    b"\r\n\r\n",
    b"\n",
    b"\r",
    b" ",
    b"\t",
    b":",
    b"\0",
    b"0\r\n\r\n",
    b"5\r\nhello\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"A / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: 0\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: identity\r\n",
    b"Connection: close\r\n",
    b"Connection: keep-alive\r\n",
    b"Connection: upgrade\r\nUpgrade: x\r\n",
    b"Expect: 100-continue\r\n",
    b"Host: a\r\n",
    b"HTTP/1.0",
    b"HTTP/1.1",
    b"RTSP/1.0",
    b"ICE/1.0",
    b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    b"http://a/",
    b"%",
    b"[::1]",
)
"""What changes the meaning of a stream."""
