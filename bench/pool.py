"""What each call costs at a thousand keys and at a million, without HTTP, and how long it stops the loop.

The engine with its real timers on uvloop, each size in a process of its own. After the single calls
(costs.py), mixed ones run until more timers have been armed than twice the keys: what the runtime does behind
the calls, growing its tables or collecting garbage, comes once in so many. The naive design (naive.py) runs
beside it, to show what is avoided.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench.costs import Cost, Costs
from bench.mix import Mix
from bench.naive import NaiveMeasured, measure_naive
from bench.process import in_child, on_loop, rss
from bench.report import Table, Targets, machine, size, span
from bench.stall import Collections, Stall, StallProbe
from keypool.core.rules import PoolRules
from keypool.engine.embedded import EmbeddedEngine
from keypool.server import runtime

QUICK = ["--sizes=1000,100000", "--rounds=1"]
RATIO, STALL, BYTES = 1.5, 0.025, 1600

_SLICE = 50  # calls in one turn: a third of a millisecond
_MIXED_SECONDS = 60.0  # at most
_FEW = 100_000  # keys below which memory a key is not worth telling


@dataclass
class Measured:
    """What was found at one size."""

    keys: int
    costs: dict[str, Cost]
    bytes_per_key: float
    growing: Stall
    mixed: Stall
    late: int  # stalls of 10 ms and more, of mixed calls
    collection: float  # seconds, the longest of garbage meanwhile
    calls: int
    seconds: float


def main(arguments: Sequence[str]) -> int:
    """Measure, print, judge."""
    options = _options(arguments)
    print(machine())
    found = []
    for keys in options.sizes:
        found.append(in_child(600, measure, keys, options.calls, options.rounds))
        print(f"\n{size(keys)} keys\n\n{_costs_table(found[-1], found[0])}", flush=True)
    naive = None if options.no_naive else in_child(90, measure_naive, max(options.sizes), 50)
    print(f"\n{_stalls_table(found, naive)}\n")
    return _judge(found)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench pool", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=_sizes, default=[1000, 100_000, 1_000_000], metavar="N,N")
    parser.add_argument("--calls", type=int, default=20_000, help="of each kind, a round")
    parser.add_argument("--rounds", type=int, default=3, help="the best of their means counts")
    parser.add_argument(
        "--no-naive", action="store_true", help="leave out the naive design, a minute at most"
    )
    return parser.parse_args(arguments)


def _sizes(text: str) -> list[int]:
    return sorted(int(part) for part in text.split(","))


def measure(keys: int, calls: int, rounds: int) -> Measured:
    """One size, in a process that nothing else has run in."""
    runtime.spare_the_old_generation()
    return on_loop(_measure(keys, calls, rounds))


async def _measure(keys: int, calls: int, rounds: int) -> Measured:
    # Keys live for an hour, so that the size stays what it is; blocks end as ever.
    engine = EmbeddedEngine(PoolRules(keepalive_seconds=3600, max_keys=2 * keys + calls))
    mix, probe, collections = Mix(engine, keys), StallProbe(), Collections()
    memory = rss()
    probe.start()
    await mix.fill()
    growing = probe.take()
    probe.stop()
    grown = rss() - memory
    costs = Costs(engine, mix, calls)
    for _ in range(rounds):
        await costs.round()
    collections.reset()
    seconds = await _run_mixed(mix, probe, max(100_000, 4 * keys))
    late = probe.late
    return Measured(
        keys, costs.of, grown / keys, growing, probe.take(), late, max(collections.worst), mix.calls, seconds
    )


async def _run_mixed(mix: Mix, probe: StallProbe, calls: int) -> float:
    started = time.monotonic()
    probe.start()
    while mix.calls < calls and time.monotonic() - started < _MIXED_SECONDS:
        await mix.run(_SLICE)
        await asyncio.sleep(0)
    probe.stop()
    return time.monotonic() - started


def _costs_table(found: Measured, smallest: Measured) -> Table:
    table = Table("call", "mean", "p99.9", "worst", "undisturbed", f"mean / at {size(smallest.keys)}")
    for name, cost in found.costs.items():
        ratio = cost.mean / smallest.costs[name].mean
        spans = (cost.mean, cost.p999, cost.worst, cost.undisturbed)
        table.row(name, *map(span, spans), f"{ratio:.2f}")
    return table


def _stalls_table(found: Sequence[Measured], naive: NaiveMeasured | None) -> Table:
    table = Table(
        "worst stall", "growing", "own", "mixed calls", "own", "longest collection", "over 10 ms", "calls/s"
    )
    for each in found:
        spans = map(span, (*_both(each.growing), *_both(each.mixed), each.collection))
        table.row(f"keypool, {size(each.keys)}", *spans, str(each.late), f"{each.calls / each.seconds:,.0f}")
    if naive is not None:
        spans = map(span, (*_both(naive.growing), *_both(naive.keeping), naive.full_collection))
        rate = naive.kept_alive / naive.seconds
        table.row(f"naive on asyncio, {size(naive.keys)}", *spans, "", f"{rate:,.0f}")
    return table


def _both(stall: Stall) -> tuple[float, float]:
    return stall.wall, stall.own


def _judge(found: Sequence[Measured]) -> int:
    targets = Targets()
    largest, smallest = found[-1], found[0]
    for name, cost in largest.costs.items():
        ratio = cost.mean / smallest.costs[name].mean
        sizes = f"at {size(largest.keys)} / at {size(smallest.keys)}"
        targets.check(f"{name}, mean {sizes}", ratio <= RATIO, f"{ratio:.2f}", f"at most {RATIO}")
    for each in found:
        targets.at_most(f"worst stall growing to {size(each.keys)}", each.growing.own, STALL)
        targets.at_most(f"worst stall of mixed calls at {size(each.keys)}", each.mixed.own, STALL)
        if each.keys >= _FEW:
            memory = each.bytes_per_key
            targets.check(
                f"memory a key at {size(each.keys)}",
                memory <= BYTES,
                f"{memory:.0f} bytes",
                f"at most {BYTES}",
            )
    return targets.status
