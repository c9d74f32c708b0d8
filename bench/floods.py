"""Attacks that aim at one resource each: the loop's time, memory that stays, file descriptors, the log.

Each runs against a server of its own, from a process of its own. What it costs everybody else is measured beside it:
acquire's p99 with and without the attack, in turns; memory afterwards minus memory before.
"""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from bench.load import Address, Connections, GoOn, Script, request
from bench.process import Child, last_core, on_loop
from bench.real import RealServer
from bench.report import Targets, megabytes, percentile
from bench.scripts import ACQUIRE, unblock

BATCH = request("/api/v1/batch", b'{"op":"keepalive","keys":[' + b",".join([b'"a"'] * 1000) + b"]}")
"""A thousand one-letter keys: as much work as a request of four kilobytes can ask for."""

DESCRIPTION = b"GET /api/v1/openapi.json HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 4000 + b"\r\n\r\n"
"""A large answer, for which nobody needs a token."""

HANDSHAKE = (
    b"GET /api/v1/feed HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)

_PIPELINED = 64  # requests that a write of the flood holds
_SETTLING = 0.3  # seconds of flood before the calls beside it are timed
_REQUESTS = 1100
_FILES = 200  # for the server whose descriptors are attacked
_WAIT = 5.0
_WORSE, _STALL = 3.0, 0.025  # what a flood may cost: acquire's p99 as a multiple, and seconds at once
_KEPT = 10e6  # bytes of memory that may stay
_LOG = 1000.0  # bytes of log a second


@dataclass
class Beside:
    """What a good client's acquires took, seconds, in order."""

    taken: list[float] = field(default_factory=list)
    errors: int = 0

    @property
    def p99(self) -> float:
        """Seconds that 99 of 100 didn't exceed."""
        return percentile(sorted(self.taken), 99)


# -- the loop's time


def calls(server: Address, seconds: float, callers: int = 1) -> Beside:
    """Acquire and unblock, one after the other."""
    return on_loop(_calls(server, seconds, callers))


async def _calls(server: Address, seconds: float, callers: int) -> Beside:
    connections = await Connections.open(server, callers)
    beside = Beside()

    def script(going: GoOn) -> Script:
        while going():
            asked_at = time.perf_counter()
            _, body = yield ACQUIRE
            beside.taken.append(time.perf_counter() - asked_at)
            yield unblock(msgspec.json.decode(body), with_lease=True)

    measured = await connections.run(script, seconds)
    connections.close()
    beside.errors = measured.errors
    return beside


def beside_a_flood(server: Address, flood: bytes, floods: int, seconds: float) -> Beside:
    """The same while so many connections pipeline a request without end."""
    attacker = Child(last_core(), pipeline, server, flood, floods, seconds + _SETTLING + 1)
    time.sleep(_SETTLING + 0.5)  # a process starts first
    beside = calls(server, seconds)
    attacker.wait(seconds + 30)
    return beside


def pipeline(server: Address, flood: bytes, floods: int, seconds: float) -> int:
    """Send a request again and again without waiting, and read the answers; the bytes of answers read."""
    data = memoryview(flood * _PIPELINED)
    wires = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(floods)]
    sent = dict.fromkeys(wires, 0)
    for wire in wires:
        wire.setblocking(False)
    received, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        readable, writable, _ = select.select(wires, wires, [], 0.5)
        for wire in readable:
            received += len(wire.recv(1 << 20))
        for wire in writable:
            with contextlib.suppress(BlockingIOError):
                sent[wire] = (sent[wire] + wire.send(data[sent[wire] :])) % len(data)
    for wire in wires:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        wire.close()
    return received


# -- memory that stays


def long_names(size: int) -> Iterator[bytes]:
    """Requests with a header name of so many bytes, each another one."""
    for number in itertools.count():
        name = f"x{number:08}".encode().ljust(size, b"y")
        yield b"GET /api/v1/stats HTTP/1.1\r\nHost: localhost\r\n" + name + b": 1\r\n\r\n"


def long_hosts(size: int) -> Iterator[bytes]:
    """Requests to a host whose name has so many bytes, each another one."""
    for number in itertools.count():
        host = f"x{number:08}".encode().ljust(size, b"y")
        yield b"GET /api/v1/stats HTTP/1.1\r\nHost: " + host + b"\r\n\r\n"


def ask(server: Address, requests: Iterator[bytes], count: int = _REQUESTS) -> None:
    """Send so many requests, each on a connection of its own, and read what comes of them."""
    for data in itertools.islice(requests, count):
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", server.port), _WAIT) as wire,
        ):
            wire.sendall(data)
            wire.recv(65536)


# -- descriptors


@dataclass
class Crowded:
    """How a server fared whose viewers were more than its descriptors."""

    viewers: int
    answered: bool
    """Whether a caller who came then was answered."""
    log: float
    """Bytes of log a second, while more and more came."""
    recovered: bool
    """Whether there was room again when they had gone."""


def crowd(server: RealServer, seconds: float) -> Crowded:
    """Open feeds until no more are accepted, go on trying, and leave."""
    inside: list[socket.socket] = []
    with contextlib.ExitStack() as wires:
        logged, started = server.log.stat().st_size, time.monotonic()
        while time.monotonic() - started < seconds:
            wire = wires.enter_context(socket.socket())
            wire.settimeout(0.5)
            with contextlib.suppress(OSError):
                wire.connect(("127.0.0.1", server.address.port))
                wire.sendall(HANDSHAKE)
                if wire.recv(12) == b"HTTP/1.1 101":
                    inside.append(wire)
                    continue
            wire.close()
            time.sleep(0.002)
        log = (server.log.stat().st_size - logged) / seconds
        answered = _is_answered(server.address)
    deadline = time.monotonic() + _WAIT
    while not (recovered := _is_answered(server.address)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return Crowded(len(inside), answered, log, recovered)


def _is_answered(server: Address) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", server.port), 1) as wire:
            wire.sendall(request("/healthz", method="GET"))
            return wire.recv(12) == b"HTTP/1.1 200"
    except OSError:
        return False


# -- all of them


def judge(http: str, targets: Targets, seconds: float) -> None:
    """Run each attack against one of the HTTP servers; some 20 s."""
    flags = "--data=:memory:", "--keepalive-seconds=86400", f"--http={http}"
    with RealServer(*flags) as server:
        ask(server.address, itertools.repeat(request("/api/v1/keys")), 100)
        quiet, attacked = Beside(), Beside()
        for _ in range(2):
            quiet.taken += calls(server.address, seconds).taken
            attacked.taken += beside_a_flood(server.address, BATCH, 1, seconds).taken
        name = f"--http={http}, beside a flood of batches: acquire's"
        targets.at_most(f"{name} p99", attacked.p99, _WORSE * quiet.p99)
        targets.at_most(f"{name} longest wait", max(attacked.taken), max(_STALL, *quiet.taken))
    for kind, attack in (("header names", long_names), ("hosts", long_hosts)):
        with RealServer(*flags) as server:
            ask(server.address, attack(100), 50)
            before = server.rss()
            ask(server.address, attack(60_000))
            kept = server.rss() - before
            wanted = f"at most {megabytes(_KEPT)}"
            targets.check(f"--http={http}, memory after long {kind}", kept <= _KEPT, megabytes(kept), wanted)
    with RealServer(*flags, files=_FILES) as server:
        found = crowd(server, seconds)
    name = f"--http={http}, {_FILES} files and as many viewers as come"
    targets.check(f"{name}: callers", found.answered and found.recovered, str(found), "answered")
    targets.check(f"{name}: log", found.log <= _LOG, f"{found.log:.0f} bytes a second", f"at most {_LOG:.0f}")
