"""What a thousand connections that idle, drip or don't read do to everybody else's acquire.

The real server, a load of acquire and unblock, and from another process the attackers, in equal parts of each kind of
`KINDS`: whoever is cut comes again at once. Quiet and attacked rounds take turns, so that what else the machine does
falls on both; acquire's p99 is judged between them, and the server's memory. Then the attacks of floods.py, on both
HTTP servers. Less than a minute in all.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import re
import socket
import time
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from bench import floods
from bench.load import Address, Connections, GoOn, Script, request
from bench.process import Child, ChildFailed, last_core, on_loop
from bench.real import RealServer
from bench.report import Table, Targets, machine, median, megabytes, percentile, span
from bench.scripts import ACQUIRE, unblock

QUICK = ["--rounds=1", "--seconds=1"]
_KEYS = 2000
_CALLERS = 4
_WORSE = 2.0
_HEAD_START = 10.0  # seconds for the attackers to be all there, at most
_MEMORY = 100e6  # bytes that the attack may cost: 1,000 connections of which each has what one may have
_HEAD = b"POST /api/v1/keys/acquire HTTP/1.1\r\nHost: localhost\r\n"

Attack = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Found:
    """Each round's p50 and p99 of acquire, seconds, and the server's memory at its end, bytes."""

    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    errors: int = 0


def main(arguments: Sequence[str]) -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser("bench attack", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=2, help="of each kind; the median counts")
    parser.add_argument("--seconds", type=float, default=1.5, help="of load, a round")
    parser.add_argument("--data", default=":memory:", help="with a file, acquire's own time is the disk's")
    options = parser.parse_args(arguments)
    print(machine() + "\n", flush=True)
    quiet, attacked = Found(), Found()
    with RealServer(f"--data={options.data}") as server:
        on_loop(_fill(server.address))
        for _ in range(options.rounds):
            _round(server, quiet, options.seconds, 0)
            _round(server, attacked, options.seconds, options.connections)
        _show(quiet, attacked)
        targets = _judge(quiet, attacked, options.connections)
    for http in ("fast", "tornado"):
        floods.judge(http, targets, options.seconds)
    return targets.status


def _round(server: RealServer, found: Found, seconds: float, connections: int) -> None:
    # The attackers are there before the round begins, and go when it is over.
    attackers = (
        Child(last_core(), attack, server.address, connections, seconds + _HEAD_START)
        if connections
        else None
    )
    if attackers is not None:
        _wait_for(server, connections)
    p50, p99, errors = on_loop(_measure(server.address, seconds))
    found.p50.append(p50)
    found.p99.append(p99)
    found.memory.append(server.rss())
    found.errors += errors
    if attackers is not None:
        attackers.wait(seconds + 60)


def _wait_for(server: RealServer, connections: int) -> None:
    """Until nearly all attackers are in, and what they asked for is answered."""
    give_up = time.monotonic() + _HEAD_START
    while _inside(server) < 0.95 * connections:
        if time.monotonic() > give_up:
            raise ChildFailed(f"only {_inside(server):,} of {connections:,} attackers came in")
        time.sleep(0.5)
    time.sleep(1)


def _inside(server: RealServer) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.address.port}/metrics") as page:
        counts = re.findall(r"^keypool_connections (\S+)", page.read().decode(), re.MULTILINE)
    return int(float(counts[0]))


async def _fill(server: Address) -> None:
    connections = await Connections.open(server, 1)
    batch = request("/api/v1/batch", b'{"op":"generate","count":1000}')

    def script(going: GoOn) -> Script:
        for _ in range(_KEYS // 1000):
            yield batch

    await connections.run(script, 60)
    connections.close()


async def _measure(server: Address, seconds: float) -> tuple[float, float, int]:
    """p50 and p99 of acquire."""
    connections = await Connections.open(server, _CALLERS)
    taken: list[float] = []

    def script(going: GoOn) -> Script:
        while going():
            asked_at = time.perf_counter()
            _, body = yield ACQUIRE
            taken.append(time.perf_counter() - asked_at)
            yield unblock(msgspec.json.decode(body), with_lease=True)

    measured = await connections.run(script, seconds)
    connections.close()
    taken.sort()
    return percentile(taken, 50), percentile(taken, 99), measured.errors


# -- the attackers


def attack(server: Address, connections: int, seconds: float) -> None:
    """Attack for so long, in a process of its own."""
    on_loop(_attack(server, connections, seconds))


async def _attack(server: Address, connections: int, seconds: float) -> None:
    kinds = itertools.cycle(KINDS.values())
    attackers = [asyncio.ensure_future(_again(server, next(kinds))) for _ in range(connections)]
    await asyncio.sleep(seconds)
    for attacker in attackers:
        attacker.cancel()
    await asyncio.gather(*attackers, return_exceptions=True)


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


async def _drip_head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(_HEAD)
    await _drip(writer, b"X: y\r\n")


async def _drip_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(_HEAD + b"Content-Length: 200000\r\n\r\n" + b" " * 1000)
    await _drip(writer, b" " * 10)


async def _never_read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    # Large answers that cost little to make: what costs much would be load, and not an attack of this kind.
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    writer.transport.pause_reading()  # type: ignore[attr-defined] # a stream's transport reads
    writer.write(request("/api/v1/openapi.json", method="GET") * 10)
    await asyncio.sleep(3600)


async def _view(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(_UPGRADE)
    await asyncio.sleep(3600)


_UPGRADE = (
    b"GET /api/v1/feed HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)

KINDS: dict[str, Attack] = {
    "idle": _idle,
    "drip a head": _drip_head,
    "drip a body": _drip_body,
    "never read": _never_read,
    "view and never read": _view,
}
"""What attackers do. Of a thousand, two hundred are viewers of the feed: as many as may be."""


def _show(quiet: Found, attacked: Found) -> None:
    table = Table("round", "p50", "p99", "memory", "errors")
    for name, found in (("quiet", quiet), ("attacked", attacked)):
        figures: list[Any] = [span(median(found.p50)), span(median(found.p99)), megabytes(max(found.memory))]
        table.row(name, *figures, str(found.errors))
    print(f"acquire over {_CALLERS} connections\n\n{table}\n")


def _judge(quiet: Found, attacked: Found, connections: int) -> Targets:
    targets = Targets()
    name = f"acquire's p99 beside {connections:,} attackers"
    targets.at_most(name, median(attacked.p99), _WORSE * median(quiet.p99))
    cost = max(attacked.memory) - quiet.memory[0]
    targets.check("memory that they cost", cost <= _MEMORY, megabytes(cost), f"at most {megabytes(_MEMORY)}")
    errors = quiet.errors + attacked.errors
    targets.check("errors", errors == 0, str(errors), "none")
    return targets
