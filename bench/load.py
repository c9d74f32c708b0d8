"""Load over HTTP: keep-alive connections on raw asyncio protocols, each of which follows a script.

A script is a generator that yields a request and is sent the response; a connection has one request in flight. A
script asks whether to go on, so that it can end what it has begun; a round is over when all scripts have ended. Only
status and length of a response are decoded, so that the load costs a fraction of what serving it does.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable, Container, Generator
from dataclasses import dataclass, field
from typing import cast

from bench.process import cpu_of

Response = tuple[int, bytes]
"""Status and body."""

Script = Generator[bytes, Response, None]
GoOn = Callable[[], bool]

_LATEST = 30.0  # seconds that a round may go on after its time


@dataclass(frozen=True)
class Address:
    """A server on this machine: its port and its process id."""

    port: int
    pid: int


@dataclass
class Round:
    """The result of one round of load. Times are seconds."""

    requests: int = 0
    seconds: float = 0.0
    latencies: array[float] = field(default_factory=lambda: array("f"))
    errors: int = 0
    """Answers of 400 and above that weren't allowed, and lost connections."""
    cpu: float = 0.0
    """Processor time of the server's main thread; 0 if unknown."""

    def add(self, other: Round) -> None:
        """Add another round that ran after this one."""
        self.requests += other.requests
        self.seconds += other.seconds
        self.latencies.extend(other.latencies)
        self.errors += other.errors
        self.cpu += other.cpu


class Connections:
    """A number of connections to one server."""

    def __init__(self, server: Address, protocols: list[_Connection]) -> None:
        self._server = server
        self._protocols = protocols

    @classmethod
    async def open(cls, server: Address, count: int) -> Connections:
        """Connect."""
        loop = asyncio.get_running_loop()
        protocols = []
        for _ in range(count):
            _, protocol = await loop.create_connection(_Connection, "127.0.0.1", server.port)
            protocols.append(protocol)
        return cls(server, protocols)

    def close(self) -> None:
        """Disconnect."""
        for protocol in self._protocols:
            protocol.close()

    async def run(
        self,
        script: Callable[[GoOn], Script],
        seconds: float,
        allowed: Container[int] = (),
        count: int | None = None,
    ) -> Round:
        """Let every connection, or the first `count`, follow a script of its own.

        `allowed` are statuses of 400 and above that are no errors.
        """
        measured = Round()
        started, cpu = time.perf_counter(), cpu_of(self._server.pid)

        def going() -> bool:
            return time.perf_counter() - started < seconds

        ended = [each.follow(script(going), allowed, measured) for each in self._protocols[:count]]
        await asyncio.wait_for(asyncio.gather(*ended), seconds + _LATEST)
        measured.seconds = time.perf_counter() - started
        measured.cpu = cpu_of(self._server.pid) - cpu
        measured.requests = len(measured.latencies)
        return measured


class _Connection(asyncio.Protocol):
    """The client's end: sends the script's next request as soon as the response before is complete."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._script: Script | None = None
        self._ended: asyncio.Future[None] | None = None
        self._sent_at = 0.0
        self._allowed: Container[int] = ()
        self._round = Round()

    def follow(self, script: Script, allowed: Container[int], measured: Round) -> asyncio.Future[None]:
        """Begin a script. The future is done when it has ended."""
        self._script, self._allowed, self._round = script, allowed, measured
        self._ended = asyncio.get_running_loop().create_future()
        self._send(None)
        return self._ended

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's isn't a subclass

    def connection_lost(self, exception: Exception | None) -> None:
        self._transport = None
        if self._ended is not None and not self._ended.done():
            self._round.errors += 1
            self._ended.set_result(None)

    def data_received(self, data: bytes) -> None:
        received = self._received + data if self._received else data
        head = received.find(b"\r\n\r\n")
        end = head + 4 + _length(received, head) if head >= 0 else -1
        if head < 0 or len(received) < end:
            self._received = received
            return
        self._received = b""
        self._round.latencies.append(time.perf_counter() - self._sent_at)
        status = int(received[9:12])
        if status >= 400 and status not in self._allowed:
            self._round.errors += 1
        self._send((status, received[head + 4 :]))

    def _send(self, response: Response | None) -> None:
        assert self._script is not None
        assert self._ended is not None
        try:
            request = next(self._script) if response is None else self._script.send(response)
        except StopIteration:
            self._ended.set_result(None)
            return
        except Exception as error:
            self._ended.set_exception(error)
            return
        if self._transport is None:
            self._ended.set_exception(ConnectionError("the server closed a connection before a request"))
            return
        self._sent_at = time.perf_counter()
        self._transport.write(request)


def _length(received: bytes, head: int) -> int:
    at = received.find(b"Content-Length: ", 0, head)
    if at < 0:  # uvicorn writes it in lower case
        at = received.find(b"content-length: ", 0, head)
    if at < 0:
        return 0
    return int(received[at + 16 : received.find(b"\r\n", at)])


def request(target: str, body: bytes = b"", method: str = "POST") -> bytes:
    """The bytes of a request with the headers that most clients send."""
    kind = "Content-Type: application/json\r\n" if body else ""
    length = f"Content-Length: {len(body)}\r\n"
    return f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n{kind}{length}\r\n".encode() + body
