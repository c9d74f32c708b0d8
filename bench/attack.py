"""How attackers affect other clients: connections that idle, drip or don't read, and floods that aim at one resource.

First a thousand connections against the real server, in equal parts of each kind of `KINDS`; one that is cut comes
back at once. Quiet and attacked rounds take turns; acquire's p99 and the server's memory are judged between them. Then
attacks on the loop's time, on memory that stays, on file descriptors and on the log, against both HTTP servers. Less
than a minute in all.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import select
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from bench.load import Address, Connections, GoOn, Script, request
from bench.process import Child, ChildFailed, on_loop
from bench.report import Table, Targets, machine, median, megabytes, percentile, span
from bench.scripts import ACQUIRE, fill, unblock
from bench.servers import Server

QUICK = ["--rounds=1", "--seconds=1"]
_KEYS, _CALLERS = 2000, 4
_HEAD_START = 10.0  # seconds until all attackers are connected, at most
_WORSE, _MEMORY = (
    2.0,
    100e6,
)  # acquire's p99 beside the connections as a multiple, and the bytes they may cost
_FLOOD_WORSE, _STALL = 3.0, 0.025  # acquire's p99 beside a flood as a multiple, and seconds at once
_KEPT = 10e6  # bytes that may stay after requests with long names
_REQUESTS = 1100
_FILES, _LOG = 200, 1000.0  # file descriptors of the server that is crowded, and its bytes of log a second

HANDSHAKE = (
    b"GET /api/v1/feed HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
FLOOD = request("/api/v1/batch", b'{"op":"keepalive","keys":[' + b",".join([b'"a"'] * 1000) + b"]}")
"""A thousand one-letter keys: as much work as a request of four kilobytes can ask for."""


@dataclass
class Found:
    """Figures of each round: p50 and p99 of acquire in seconds, the server's memory in bytes."""

    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    worst: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    errors: int = 0

    def measure(self, server: Server, seconds: float, callers: int = _CALLERS) -> None:
        """Add a round."""
        taken, errors = on_loop(_calls(server.address, seconds, callers))
        self.p50.append(percentile(taken, 50))
        self.p99.append(percentile(taken, 99))
        self.worst.append(taken[-1])
        self.memory.append(server.rss())
        self.errors += errors


async def _calls(server: Address, seconds: float, callers: int) -> tuple[list[float], int]:
    """Acquire and unblock over so many connections: the time of each acquire in seconds, ascending, and errors."""
    connections = await Connections.open(server, callers)
    taken: list[float] = []

    def script(going: GoOn) -> Script:
        while going():
            asked_at = time.perf_counter()
            _, body = yield ACQUIRE
            taken.append(time.perf_counter() - asked_at)
            yield unblock(msgspec.json.decode(body))

    measured = await connections.run(script, seconds)
    connections.close()
    return sorted(taken), measured.errors


def main(arguments: Sequence[str]) -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser("bench attack", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=2, help="of each kind; the median counts")
    parser.add_argument("--seconds", type=float, default=1.5, help="of load, a round")
    parser.add_argument("--data", default=":memory:", help="with a file, acquire's own time is the disk's")
    options = parser.parse_args(arguments)
    print(machine() + "\n", flush=True)
    targets = Targets()
    _beside_connections(options, targets)
    for http in ("fast", "tornado"):
        flags = "--data=:memory:", "--keepalive-seconds=86400", f"--http={http}"
        _beside_a_flood(f"--http={http}", flags, options.seconds, targets)
        for kind, requests in (("header names", long_names), ("hosts", long_hosts)):
            _long_words(f"--http={http}, long {kind}", flags, requests, targets)
        _crowd(f"--http={http}, {_FILES} files and as many viewers as come", flags, options.seconds, targets)
    return targets.status


# -- a thousand connections


def _beside_connections(options: argparse.Namespace, targets: Targets) -> None:
    quiet, attacked = Found(), Found()
    with Server(f"--data={options.data}") as server:
        fill(server.address, _KEYS)
        for _ in range(options.rounds):
            quiet.measure(server, options.seconds)
            attackers = Child(attack, server.address, options.connections, options.seconds + _HEAD_START)
            _wait_for(server, options.connections)
            attacked.measure(server, options.seconds)
            attackers.wait(options.seconds + 60)
    table = Table("round", "p50", "p99", "memory", "errors")
    for name, found in (("quiet", quiet), ("attacked", attacked)):
        spans = span(median(found.p50)), span(median(found.p99))
        table.row(name, *spans, megabytes(max(found.memory)), str(found.errors))
    print(f"acquire over {_CALLERS} connections\n\n{table}\n")
    what = f"acquire's p99 beside {options.connections:,} attackers"
    targets.at_most(what, median(attacked.p99), _WORSE * median(quiet.p99))
    cost = max(attacked.memory) - quiet.memory[0]
    targets.check("memory that they cost", cost <= _MEMORY, megabytes(cost), f"at most {megabytes(_MEMORY)}")
    targets.none("errors", quiet.errors + attacked.errors)


def _wait_for(server: Server, connections: int) -> None:
    """Until nearly all attackers are connected."""
    give_up = time.monotonic() + _HEAD_START
    while (inside := server.metrics()["keypool_connections"]) < 0.95 * connections:
        if time.monotonic() > give_up:
            raise ChildFailed(f"only {inside:,.0f} of {connections:,} attackers are connected")
        time.sleep(0.5)
    time.sleep(1)


def attack(server: Address, connections: int, seconds: float) -> None:
    """Attack for so long, in a process of its own."""

    async def main() -> None:
        kinds = itertools.cycle(KINDS.values())
        attackers = [asyncio.ensure_future(_again(server, next(kinds))) for _ in range(connections)]
        await asyncio.sleep(seconds)
        for attacker in attackers:
            attacker.cancel()
        await asyncio.gather(*attackers, return_exceptions=True)

    on_loop(main())


Attack = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def _again(server: Address, kind: Attack) -> None:
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
            try:
                await kind(reader, writer)
            finally:
                writer.transport.abort()
        await asyncio.sleep(0.1)


async def _idle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)


async def _drip(writer: asyncio.StreamWriter, drops: bytes) -> None:
    while not writer.is_closing():
        writer.write(drops)
        await asyncio.sleep(1)


_HEAD = b"POST /api/v1/keys/acquire HTTP/1.1\r\nHost: localhost\r\n"


async def _drip_head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(_HEAD)
    await _drip(writer, b"X: y\r\n")


async def _drip_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(_HEAD + b"Content-Length: 200000\r\n\r\n" + b" " * 1000)
    await _drip(writer, b" " * 10)


async def _never_read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    # Large answers that are cheap to make: expensive ones would be load, which is another attack.
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    writer.transport.pause_reading()  # type: ignore[attr-defined] # a stream's transport reads
    writer.write(request("/api/v1/openapi.json", method="GET") * 10)
    await asyncio.sleep(3600)


async def _view(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(HANDSHAKE)
    await asyncio.sleep(3600)


KINDS: dict[str, Attack] = {
    "idle": _idle,
    "drip a head": _drip_head,
    "drip a body": _drip_body,
    "never read": _never_read,
    "view and never read": _view,
}
"""What the attackers do. Of a thousand, two hundred are viewers of the feed: as many as are allowed."""


# -- the loop's time


def _beside_a_flood(name: str, flags: Sequence[str], seconds: float, targets: Targets) -> None:
    quiet, attacked = Found(), Found()
    with Server(*flags) as server:
        fill(server.address, _KEYS)
        for _ in range(2):
            quiet.measure(server, seconds, callers=1)
            flood = Child(pipeline, server.address, seconds + 2)
            time.sleep(1)  # until its process has started and the flood is on its way
            attacked.measure(server, seconds, callers=1)
            flood.wait(seconds + 30)
    name = f"{name}, beside a flood of batches: acquire's"
    targets.at_most(f"{name} p99", median(attacked.p99), _FLOOD_WORSE * median(quiet.p99))
    targets.at_most(f"{name} longest wait", max(attacked.worst), max(_STALL, *quiet.worst))


def pipeline(server: Address, seconds: float) -> None:
    """Send a request again and again without waiting, and read the answers."""
    data, sent = memoryview(FLOOD * 64), 0
    with socket.create_connection(("127.0.0.1", server.port)) as wire:
        wire.setblocking(False)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            readable, writable, _ = select.select([wire], [wire], [], 0.5)
            if readable:
                wire.recv(1 << 20)
            if writable:
                with contextlib.suppress(BlockingIOError):
                    sent = (sent + wire.send(data[sent:])) % len(data)
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


# -- memory that stays


def long_names(length: int) -> Iterator[bytes]:
    """Requests whose header name has so many bytes, a different one each time."""
    for number in itertools.count():
        name = f"x{number:08}".encode().ljust(length, b"y")
        yield b"GET /api/v1/stats HTTP/1.1\r\nHost: localhost\r\n" + name + b": 1\r\n\r\n"


def long_hosts(length: int) -> Iterator[bytes]:
    """Requests whose host has so many bytes, a different one each time."""
    for number in itertools.count():
        host = f"x{number:08}".encode().ljust(length, b"y")
        yield b"GET /api/v1/stats HTTP/1.1\r\nHost: " + host + b"\r\n\r\n"


def _long_words(
    name: str, flags: Sequence[str], requests: Callable[[int], Iterator[bytes]], targets: Targets
) -> None:
    with Server(*flags) as server:
        _ask(server.address, requests(100), 50)
        before = server.rss()
        _ask(server.address, requests(60_000), _REQUESTS)
        kept = server.rss() - before
    targets.check(f"{name}: memory kept", kept <= _KEPT, megabytes(kept), f"at most {megabytes(_KEPT)}")


def _ask(server: Address, requests: Iterator[bytes], count: int) -> None:
    """Send so many requests, each on a connection of its own, and read the beginning of each answer."""
    for data in itertools.islice(requests, count):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port), 5) as wire:
            wire.sendall(data)
            wire.recv(65536)


# -- file descriptors and the log


def _crowd(name: str, flags: Sequence[str], seconds: float, targets: Targets) -> None:
    """Open feeds until no more are accepted, go on trying, and leave."""
    with Server(*flags, files=_FILES) as server:
        with contextlib.ExitStack() as wires:
            logged, end = server.log.stat().st_size, time.monotonic() + seconds
            while time.monotonic() < end:
                _try_to_view(server.address, wires)
            log = (server.log.stat().st_size - logged) / seconds
            answered = server.status_of("/healthz") == 200
        give_up = time.monotonic() + 5
        while not (recovered := server.status_of("/healthz") == 200) and time.monotonic() < give_up:
            time.sleep(0.1)
    found = f"answered while crowded: {answered}, afterwards: {recovered}"
    targets.check(f"{name}: callers", answered and recovered, found, "both")
    targets.check(f"{name}: log", log <= _LOG, f"{log:.0f} bytes a second", f"at most {_LOG:.0f}")


def _try_to_view(server: Address, wires: contextlib.ExitStack) -> None:
    wire = socket.socket()
    wire.settimeout(0.5)
    with contextlib.suppress(OSError):
        wire.connect(("127.0.0.1", server.port))
        wire.sendall(HANDSHAKE)
        if wire.recv(12) == b"HTTP/1.1 101":
            wires.enter_context(wire)
            return
    wire.close()
    time.sleep(0.002)
