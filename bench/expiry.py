"""A crowd of keys that expire in the same second, and a crowd of blocks that end in the same second.

Mixed calls go on meanwhile, at a rate that leaves the loop time. Watched are the worst stall, how far from
its deadline each key was released or purged, and whether any call ever saw a key on the wrong side of its
deadline: keys at the front, whose deadline has just passed or is about to, are asked for all the time.

What a call sees is on time by the deadline itself. The purge behind it may lag when a crowd comes at once: a
hundred thousand in a second are about as many as one core can do. A smaller crowd must be on time itself.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from bench.mix import Mix
from bench.process import ChildFailed, in_child, on_loop
from bench.report import Table, Targets, machine, percentile, size, span
from bench.stall import Collections, Stall, StallProbe
from bench.watch import Front, Watch
from keypool.core.errors import NoKeyAvailable
from keypool.core.events import Change
from keypool.core.keys import Key, random_text
from keypool.core.rules import PoolRules
from keypool.engine.embedded import EmbeddedEngine
from keypool.server import runtime

QUICK = ["--crowd=20000"]
STALL, LATE, EARLY = 0.025, 0.050, 0.005

_RESIDENTS = 2000
_WAITERS = 50
_CALLS, _PAUSE = 20, 0.002  # mixed calls at a time, and seconds of rest between: a tenth of a core
_SLICE = 100
_AFTER = 3.0  # seconds to look on after the last deadline


@dataclass
class Measured:
    """One crowd. Lengths of time in seconds."""

    change: Change
    crowd: int
    stall: Stall
    collection: float
    lateness: list[float]  # in order; below 0 is early
    waiting: list[float]  # of waiters who were served, in order
    calls: int
    asked: int
    wrong: list[str]


def main(arguments: Sequence[str]) -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser("bench expiry", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--crowd", type=int, default=100_000, help="keys that share a second")
    parser.add_argument("--small", type=int, default=10_000, help="a crowd that must itself be on time")
    parser.add_argument("--seconds", type=float, default=6.0, help="from a key's beginning to its deadline")
    options = parser.parse_args(arguments)
    print(machine() + "\n", flush=True)
    found = [
        _crowd(change, crowd, options.seconds)
        for crowd in (options.small, options.crowd)
        for change in (Change.RELEASED, Change.EXPIRED)
    ]
    print(f"{_table(found)}\n")
    return _judge(found, options.small)


def _crowd(change: Change, crowd: int, seconds: float) -> Measured:
    """Measure, with more and more time to make the crowd in: a busy machine may need it."""
    for _ in range(4):
        measured = in_child(240, measure, change, crowd, seconds)
        if measured is not None:
            return measured
        seconds *= 2
    raise ChildFailed(f"{crowd} keys could not be made in {seconds / 2:.0f} s: the machine is too busy")


def measure(change: Change, crowd: int, seconds: float) -> Measured | None:
    """One crowd, in a process of its own. None if its first deadline had passed before it was complete."""
    runtime.spare_the_old_generation()
    return on_loop(_measure(change, crowd, seconds))


async def _measure(change: Change, crowd: int, seconds: float) -> Measured | None:
    released = change is Change.RELEASED
    engine = EmbeddedEngine(
        PoolRules(
            block_seconds=seconds if released else 60.0, keepalive_seconds=3600.0 if released else seconds
        )
    )
    watch = Watch(engine, change)
    await _begin(engine, watch, crowd, seconds)
    front = Front(engine, watch)
    mix = Mix(engine, crowd + _RESIDENTS, without=("generate", "delete") if released else ())
    if released:  # all are blocked, so that who waits is served by a release
        mix.known = list(watch.texts.values())
    else:
        await mix.fill()
    if engine.now() >= front.first:
        return None
    waiters = [asyncio.ensure_future(_wait(engine, watch)) for _ in range(_WAITERS if released else 0)]
    probe, collections = StallProbe().start(), Collections()
    while engine.now() < front.last + _AFTER or watch.pending_before(front.last):
        await mix.run(_CALLS)
        await front.ask()
        await asyncio.sleep(_PAUSE)
        if engine.now() > front.last + 30:
            front.wrong.append(f"{watch.pending_before(front.last)} keys were left after 30 s")
            break
    probe.stop()
    waiting = sorted(filter(None, await asyncio.gather(*waiters)))
    return Measured(
        change,
        crowd,
        probe.take(),
        max(collections.worst),
        sorted(watch.lateness),
        waiting,
        mix.calls,
        front.asked,
        front.wrong + watch.wrong,
    )


async def _begin(engine: EmbeddedEngine, watch: Watch, crowd: int, seconds: float) -> None:
    """Restore the crowd, with deadlines that fill one second evenly; to make it could take longer than that."""
    released = watch.change is Change.RELEASED
    start = engine.now() + seconds
    for id in range(1, crowd + 1):
        deadline = start + id / crowd
        key = Key(id, random_text(20), engine.now(), start + 3600 if released else deadline)
        if released:
            key.lease, key.release_deadline = id, deadline
            engine.pool.last_lease = id
        engine.pool.last_id = id
        engine.pool.restore(key)
        watch.expect(key, deadline)
        if id % _SLICE == 0:
            await asyncio.sleep(0)


async def _wait(engine: EmbeddedEngine, watch: Watch) -> float | None:
    """Wait for a key; how long after its release it was served, as a client sees it."""
    try:
        lease = await engine.acquire("waiter", 60.0)
    except NoKeyAvailable:
        return None
    deadline = watch.done.get(lease.id)  # none, if it was a key just made
    return None if deadline is None else engine.now() - deadline


def _table(found: Sequence[Measured]) -> Table:
    table = Table(
        "crowd",
        "worst stall",
        "own",
        "collection",
        "earliest",
        "p50 late",
        "p99",
        "latest",
        "waiters",
        "calls",
    )
    for each in found:
        late = each.lateness
        waiters = span(each.waiting[-1]) if each.waiting else "-"
        lateness = late[0], percentile(late, 50), percentile(late, 99), late[-1]
        spans = (each.stall.wall, each.stall.own, each.collection, *lateness)
        table.row(
            f"{size(each.crowd)} {each.change}", *map(span, spans), waiters, f"{each.calls + each.asked:,}"
        )
    return table


def _judge(found: Sequence[Measured], small: int) -> int:
    targets = Targets()
    for each in found:
        name = f"{size(each.crowd)} {each.change}"
        targets.at_most(f"{name}, worst stall", each.stall.own, STALL)
        targets.at_most(f"{name}, earliest", -each.lateness[0], EARLY)
        if each.crowd <= small:
            targets.at_most(f"{name}, latest", each.lateness[-1], LATE)
        if each.waiting:
            targets.at_most(f"{name}, latest to a waiter", each.waiting[-1], LATE)
        told = f"{len(each.wrong)} of {each.asked:,}"
        targets.check(f"{name}, calls that saw a key on the wrong side", not each.wrong, told, "none")
        for line in each.wrong[:5]:
            print(f"      {line}")
    return targets.status
