"""Millions of calls, in memory that must not grow: keys come and go, waiters are served, give up or hang up.

The pool part calls the engine; the HTTP part loads the real application over connections that are opened and
closed all the time. Deadlines are short, so that keys expire and blocks end by the thousand. The memory of the
process is sampled, and judged from the first quarter of the calls to the last: before that, buffers and free lists
find their size. Garbage in cycles is counted by one full collection at the end, which the server itself never makes.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.churn import churn
from bench.mix import Mix
from bench.process import Child, in_child, last_core, on_loop, rss
from bench.report import Table, Targets, machine, megabytes
from bench.server import Pool, Server
from keypool.core.errors import NoKeyAvailable
from keypool.core.rules import PoolRules
from keypool.engine.embedded import EmbeddedEngine
from keypool.server import runtime

QUICK: list[str] = []
FULL = 10
"""What a full soak is of the quick one."""

_KEYS = 20_000
_BLOCK, _LIFE = 1.0, 4.0  # seconds
_SLICE = 100  # calls in one turn
_WAITS = 20  # slices between rounds of waiters
_SAMPLES = 40
_GROWTH = 0.10  # from the first quarter on: a table that doubles late makes a step, a leak makes a slope
_LEAKED = 1000  # objects in cycles that may be found at the end: those in use


@dataclass
class Soaked:
    """What a soak came to. Memory is bytes."""

    name: str
    calls: int = 0
    memory: list[int] = field(default_factory=list)
    collected: int = 0  # objects that young collections found in cycles
    leaked: int = 0  # objects that a full collection found at the end
    notes: str = ""


def main(arguments: Sequence[str]) -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser("bench soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="ten million pool calls, a million over HTTP")
    parser.add_argument("--pool", type=int, default=1_000_000, help="calls of the pool")
    parser.add_argument("--http", type=int, default=100_000, help="calls over HTTP")
    options = parser.parse_args(arguments)
    times = FULL if options.full else 1
    print(machine() + "\n", flush=True)
    found = [in_child(1800, soak_pool, options.pool * times), soak_http(options.http * times)]
    print(f"{_table(found)}\n")
    targets = Targets()
    for each in found:
        early, late = _quarters(each.memory)[1], _quarters(each.memory)[4]
        limit = early * (1 + _GROWTH)
        grown = f"{megabytes(late - early)} on {megabytes(early)}"
        targets.check(
            f"{each.name} is flat from the first quarter on", late <= limit, grown, f"{_GROWTH:.0%} at most"
        )
        targets.check(
            f"{each.name}, leaked in cycles", each.leaked <= _LEAKED, str(each.leaked), f"at most {_LEAKED}"
        )
    return targets.status


def soak_pool(calls: int) -> Soaked:
    """The engine itself, in a process of its own."""
    runtime.spare_the_old_generation()
    return on_loop(_soak_pool(calls))


async def _soak_pool(calls: int) -> Soaked:
    soaked = Soaked("pool")
    engine = EmbeddedEngine(PoolRules(_BLOCK, _LIFE))
    narrow = EmbeddedEngine(PoolRules(_BLOCK, 86_400))
    await narrow.generate(2)
    mix = Mix(engine, _KEYS, sample=_KEYS // 2)
    await mix.fill()
    # After the fill, so that the keys themselves are in the first sample.
    soaked.memory.append(rss())
    waits = 0
    while mix.calls < calls:
        await mix.run(_SLICE)
        await mix.fill()
        if mix.calls % (_SLICE * _WAITS) == 0:
            waits += await _waits(narrow)
        await asyncio.sleep(0)
        if mix.calls >= len(soaked.memory) * calls / _SAMPLES:
            soaked.memory.append(rss())
    soaked.calls = mix.calls
    soaked.collected = sum(generation["collected"] for generation in gc.get_stats())
    gc.collect(1)  # what is young may still die in time
    soaked.leaked = gc.collect()
    counters = engine.pool.counters
    soaked.notes = (
        f"{counters.generated:,} made, {counters.expired:,} expired, {counters.released:,} released,"
        f" {counters.deleted:,} deleted, {waits:,} waits"
    )
    engine.pool.check()
    return soaked


async def _waits(engine: EmbeddedEngine) -> int:
    """Of four who wait for two keys that are held, two are served, one gives up, one hangs up."""
    held = [await engine.acquire(None, 0), await engine.acquire(None, 0)]
    served = [asyncio.ensure_future(engine.acquire(None, 5)) for _ in held]
    late = asyncio.ensure_future(engine.acquire(None, 0.001))
    hung_up = asyncio.ensure_future(engine.acquire(None, 5))
    await asyncio.sleep(0.002)
    hung_up.cancel()
    for lease in held:
        await engine.unblock(lease.key, lease.lease)
    leases = await asyncio.gather(*served)
    ends = await asyncio.gather(late, hung_up, return_exceptions=True)
    assert isinstance(ends[0], NoKeyAvailable), ends
    assert isinstance(ends[1], asyncio.CancelledError), ends
    for lease in leases:
        await engine.unblock(lease.key, lease.lease)
    return 4


def soak_http(calls: int) -> Soaked:
    """The real application in its own process, loaded from another; the memory is the server's."""
    soaked = Soaked("http")
    with Server(Pool(_KEYS, _BLOCK, _LIFE), Pool(4, _BLOCK, 86_400)) as server:
        parts = _SAMPLES
        soaked.memory.append(server.report().rss)
        connections = 0
        for part in range(parts):
            load = Child(last_core(), churn, server.addresses, calls // parts, part)
            done = load.wait(60 + calls / 500)
            soaked.calls += done.requests
            connections += done.connections
            report = server.report()
            soaked.memory.append(report.rss)
        soaked.collected = report.collected
        soaked.leaked = server.garbage()
        soaked.notes = f"{connections:,} connections, {done.notes}"
    return soaked


def _quarters(memory: Sequence[int]) -> list[int]:
    """At the start, after each quarter, and so at the end."""
    return [memory[quarter * (len(memory) - 1) // 4] for quarter in range(5)]


def _table(found: Sequence[Soaked]) -> Table:
    table = Table("memory", "calls", "start", "1/4", "2/4", "3/4", "end", "collected", "leaked")
    for each in found:
        quarters = map(megabytes, _quarters(each.memory))
        table.row(each.name, f"{each.calls:,}", *quarters, f"{each.collected:,}", f"{each.leaked:,}")
        print(f"{each.name}: {each.notes}")
    print()
    return table
