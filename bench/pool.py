"""What each call costs at a thousand keys and at a million, without HTTP, and how long it stalls the event loop.

The engine with its real timers on uvloop, each size in a process of its own. After the single calls, mixed ones run
until more timers have been set than twice the keys: what the runtime does behind the calls, such as growing a table or
collecting garbage, happens once in so many. Acquire and unblock are measured once more while three keys in ten cool.
With `--old PATH`, the engine of that checkout takes its turn at each size.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bench.process import Child, on_loop, pin_to_first_core, preemptions, rss
from bench.report import Table, Targets, machine, percentile, size, span
from bench.servers import add_old
from bench.stalls import Collections, Stall, StallProbe

if TYPE_CHECKING:
    from keypool.core.answers import GeneratedKey, Lease
    from keypool.engine import Engine

T = TypeVar("T")
R = TypeVar("R")

QUICK = ["--sizes=1000,100000", "--rounds=1"]
RATIO, STALL, BYTES = 1.5, 0.025, 560
BESIDE_COOLING = 1.1  # acquire's mean, of that with none cooling

_SLICE = 50  # calls in one turn of the loop: a third of a millisecond
_AT_ONCE = 5000
_SAMPLE = 50_000  # keys known to the load, so that its own memory doesn't grow with the pool
_BATCH = 500
_MIXED_SECONDS = 60.0  # at most
_COOLING = 0.3  # of the keys
_BESIDE_COOLING = "acquire beside cooling"
_FEW = 100_000  # keys below which memory a key means little
_PAGES: dict[str, dict[str, Any]] = {
    "page by id": {},
    "page by release": {"order": "release"},
    "page by expiry": {"order": "expiry"},
    "page by prefix": {"prefix": "a", "limit": 10},
    "page of blocked": {"state": "blocked"},
}


@dataclass
class Cost:
    """Seconds that a call took: the mean of each round, and the others over all rounds.

    The mean is of those slices in which this process kept its core, if there were any.
    """

    means: list[float] = field(default_factory=list)
    p999: float = 0.0
    worst: float = 0.0

    @property
    def mean(self) -> float:
        """Of the best round: other processes only ever add."""
        return min(self.means)


@dataclass
class Measured:
    """The figures at one size."""

    keys: int
    costs: dict[str, Cost]
    bytes_per_key: float
    growing: Stall
    mixed: Stall
    late: int  # stalls of 10 ms and more, of mixed calls
    collection: float  # seconds, the longest garbage collection
    rate: float  # mixed calls a second


def main(arguments: Sequence[str]) -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser("bench pool", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", default="1000,100000,1000000", metavar="N,N")
    parser.add_argument("--calls", type=int, default=20_000, help="of each kind, a round")
    parser.add_argument("--rounds", type=int, default=3, help="the best of their means counts")
    add_old(parser)
    options = parser.parse_args(arguments)
    print(machine())
    found, before = [], []
    for keys in sorted(map(int, options.sizes.split(","))):
        if options.old:
            before.append(Child(measure, keys, options.calls, options.rounds, options.old).wait(600))
        found.append(Child(measure, keys, options.calls, options.rounds, None).wait(600))
        old = before[-1] if before else None
        print(f"\n{size(keys)} keys\n\n{_costs_table(found[-1], found[0], old)}", flush=True)
    print(f"\n{_stalls_table(found, before)}\n")
    return _judge(found)


def measure(keys: int, calls: int, rounds: int, tree: Path | None) -> Measured:
    """One size, in a process of its own, with the engine of a checkout."""
    pin_to_first_core()
    if tree is not None:
        sys.path.insert(0, str(tree.resolve()))  # before the first import of keypool
    return on_loop(_measure(keys, calls, rounds))


def _engine(max_keys: int) -> Engine:
    # Keys live for an hour, so that the size of the pool stays what it is.
    rules = import_module("keypool.core.rules").PoolRules(keepalive_seconds=3600.0, max_keys=max_keys)
    made: Engine = import_module("keypool.engine.embedded").EmbeddedEngine(rules)
    return made


async def _measure(keys: int, calls: int, rounds: int) -> Measured:
    runtime = import_module("keypool.server.runtime")
    runtime.spare_the_old_generation()
    runtime.collect_the_young(asyncio.get_running_loop())
    load, probe, memory = _Load(_engine(2 * keys + calls), keys, calls), StallProbe(), rss()
    probe.start()
    await load.fill()
    growing = probe.stop()
    grown = rss() - memory
    for _ in range(rounds):
        await load.round()
    collections, started, mixed_calls = Collections(), time.monotonic(), 0
    probe.late = 0
    probe.start()
    while mixed_calls < max(100_000, 4 * keys) and time.monotonic() - started < _MIXED_SECONDS:
        await load.mixed(_SLICE)
        mixed_calls += _SLICE
        await asyncio.sleep(0)
    mixed = probe.stop()
    rate = mixed_calls / (time.monotonic() - started)
    return Measured(keys, load.costs, grown / keys, growing, mixed, probe.late, collections.worst, rate)


class _Load:
    """Calls of an engine that is kept at `keys` keys: one kind at a time and timed, or mixed.

    Keys are drawn from a large sample, so that at a million keys none is still in the processor's cache; their texts
    are copied, since the text of a request is a new object too.
    """

    def __init__(self, engine: Engine, keys: int, calls: int) -> None:
        self.costs: dict[str, Cost] = {}
        self._engine = engine
        self._keys = keys
        self._calls = calls
        self._at_once = max(1, min(keys // 2, _AT_ONCE, calls))
        self._query = import_module("keypool.core.cursor").ListQuery
        self._reports = find_spec("keypool.core.outcomes") is not None  # not in older checkouts
        self._gone = import_module("keypool.core.errors").PoolError
        self._random = random.Random(1)
        self._known: list[str] = []
        self._held: deque[Lease] = deque()
        self._spans: dict[str, list[float]] = {}
        self._quiet: dict[str, list[float]] = {}
        shares = {self._keepalive: 80, self._acquire: 48, self._unblock: 48, self._get: 10, self._generate: 6}
        shares |= {self._delete: 6, self._page: 1, self._stats: 1}
        self._steps = [step for step, share in shares.items() for _ in range(share)]

    async def fill(self) -> None:
        """Make the keys that are missing, a slice in each turn of the loop."""
        while (missing := self._keys - (await self._engine.stats()).total) > 0:
            self._learn(await self._engine.generate(min(100, missing)))
            await asyncio.sleep(0)

    def _learn(self, made: Sequence[GeneratedKey]) -> None:
        for key in made:
            if len(self._known) < _SAMPLE:
                self._known.append(key.key)
            elif self._random.random() < _SAMPLE / self._keys:
                self._known[self._any()] = key.key

    def _any(self) -> int:
        return int(self._random.random() * len(self._known))

    # -- one kind at a time

    async def round(self) -> None:
        """Every call; the pool has its size again afterwards."""
        self._spans, self._quiet = {}, {}
        for _ in range(-(-self._calls // self._at_once)):
            await self._single_calls()
        for _ in range(max(3, self._calls // 1000)):
            await self._batches()
        await self._pages()
        if self._reports:
            await self._beside_cooling()
        for name, spans in self._spans.items():
            quiet = self._quiet[name] or spans
            cost = self.costs.setdefault(name, Cost())
            cost.means.append(sum(quiet) / len(quiet))
            cost.p999 = max(cost.p999, percentile(sorted(spans), 99.9))
            cost.worst = max(cost.worst, *spans)

    async def _single_calls(self) -> None:
        engine, once = self._engine, range(self._at_once)
        await self._time("keepalive", self._texts(), engine.keepalive)
        await self._time("get", self._texts(), engine.get)
        leases = await self._time("acquire", once, lambda _: engine.acquire(None, 0))
        await self._time("unblock", leases, lambda lease: engine.unblock(lease.key, lease.lease))
        doomed = self._texts()
        made = await self._time("generate", doomed, lambda _: engine.generate(1))
        await self._time("delete", doomed, engine.delete)
        gone = set(doomed)
        self._known = [text for text in self._known if text not in gone]
        for keys in made:
            self._learn(keys)
        await self._time("stats", once, lambda _: engine.stats())

    async def _batches(self) -> None:
        engine, count = self._engine, min(_BATCH, self._keys // 2)
        (made,) = await self._time(f"generate x {count}", [count], engine.generate)
        texts = [key.key for key in made]
        await self._time(f"keepalive x {count}", [texts], engine.keepalive_many)
        (leases,) = await self._time(
            f"acquire x {count}", [None], lambda owner: engine.acquire_many(owner, count)
        )
        await self._time(f"unblock x {count}", [self._items(leases)], engine.unblock_many)
        await self._time(f"delete x {count}", [texts], engine.delete_many)

    def _texts(self) -> list[str]:
        chosen = self._random.sample(self._known, min(self._at_once, len(self._known)))
        return [text.encode().decode() for text in chosen]

    async def _pages(self) -> None:
        """Pages one after the other from the start of each list, while a tenth of the keys is blocked."""
        leases: list[Lease] = []
        while len(leases) < self._keys // 10:
            leases += await self._engine.acquire_many(None, 100)
            await asyncio.sleep(0)
        for name, query in _PAGES.items():
            after: str | None = None
            for _ in range(max(20, self._calls // 100)):
                (page,) = await self._time(name, [self._query(**query, after=after)], self._engine.page)
                after = page.next
        for start in range(0, len(leases), 100):
            await self._engine.unblock_many(self._items(leases[start : start + 100]))
            await asyncio.sleep(0)

    async def _beside_cooling(self) -> None:
        """Acquire and unblock while a part of the keys cools; afterwards all are available again."""
        outcomes = import_module("keypool.core.outcomes")
        limited = outcomes.Report(outcomes.Outcome.RATE_LIMITED, 86_400.0)
        cooling: list[Lease] = []
        while len(cooling) < self._keys * _COOLING:
            cooling += await self._engine.acquire_many(None, 50)
            await self._engine.unblock_many(self._items(cooling[-50:], limited))
            await asyncio.sleep(0)
        engine, once = self._engine, range(self._at_once // 2)
        for _ in range(-(-self._calls // self._at_once)):
            leases = await self._time(_BESIDE_COOLING, once, lambda _: engine.acquire(None, 0))
            await self._time(
                "unblock beside cooling", leases, lambda held: engine.unblock(held.key, held.lease)
            )
        operator = import_module("keypool.core.events").HOLDER
        for start in range(0, len(cooling), 50):
            await engine.restore_many([held.id for held in cooling[start : start + 50]], operator)
            await asyncio.sleep(0)

    def _items(self, leases: Sequence[Lease], report: Any = None) -> list[Any]:
        """Items for a batch of unblocks."""
        if not self._reports:
            return [(held.key, held.lease) for held in leases]
        unblock = import_module("keypool.core.answers").Unblock
        return [unblock(held.key, held.lease, report) for held in leases]

    async def _time(self, name: str, items: Sequence[T], call: Callable[[T], Awaitable[R]]) -> list[R]:
        """Call with each item, and keep how long each took under a name. Returns the answers in order."""
        answers: list[R] = []
        spans, quiet = self._spans.setdefault(name, []), self._quiet.setdefault(name, [])
        clock = time.perf_counter
        for start in range(0, len(items), _SLICE):
            before, first = preemptions(), len(spans)
            for item in items[start : start + _SLICE]:
                at = clock()
                answer = await call(item)
                spans.append(clock() - at)
                answers.append(answer)
            if preemptions() == before:
                quiet += spans[first:]
            await asyncio.sleep(0)
        return answers

    # -- mixed

    async def mixed(self, calls: int) -> None:
        """That many calls in one turn of the loop; a key may be gone or blocked."""
        for _ in range(calls):
            with contextlib.suppress(self._gone):
                await self._steps[int(self._random.random() * len(self._steps))]()

    async def _keepalive(self) -> None:
        await self._engine.keepalive(self._known[self._any()])

    async def _get(self) -> None:
        await self._engine.get(self._known[self._any()])

    async def _acquire(self) -> None:
        if len(self._held) >= min(1000, max(1, self._keys // 2)):
            await self._unblock()
        else:
            self._held.append(await self._engine.acquire("bench", 0))

    async def _unblock(self) -> None:
        if self._held:
            lease = self._held.popleft()
            if self._random.random() > 0.02:  # the others are left to their deadline
                await self._engine.unblock(lease.key, lease.lease)

    async def _generate(self) -> None:
        if (await self._engine.stats()).total <= self._keys:
            self._learn(await self._engine.generate(1))

    async def _delete(self) -> None:
        if (await self._engine.stats()).total >= self._keys:
            place = self._any()
            text, self._known[place] = self._known[place], self._known[-1]
            self._known.pop()
            await self._engine.delete(text)

    async def _page(self) -> None:
        await self._engine.page(self._query(**self._random.choice(list(_PAGES.values()))))

    async def _stats(self) -> None:
        await self._engine.stats()


# -- the report


def _costs_table(found: Measured, smallest: Measured, old: Measured | None) -> Table:
    of_old = ["of old"] if old else []
    table = Table("call", "mean", "p99.9", "worst", f"of that at {size(smallest.keys)}", *of_old)
    for name, cost in found.costs.items():
        ratio = f"{cost.mean / smallest.costs[name].mean:.2f}"
        of = old.costs.get(name) if old else None
        ratios = [f"{cost.mean / of.mean:.2f}" if of else ""] if old else []
        table.row(name, span(cost.mean), span(cost.p999), span(cost.worst), ratio, *ratios)
    return table


def _stalls_table(found: Sequence[Measured], before: Sequence[Measured]) -> Table:
    table = Table(
        "worst stall",
        "growing",
        "own",
        "mixed calls",
        "own",
        "collection",
        "over 10 ms",
        "calls/s",
        "bytes a key",
    )
    for name, each in [("keypool", each) for each in found] + [("old", each) for each in before]:
        stalls = (each.growing.wall, each.growing.own, each.mixed.wall, each.mixed.own, each.collection)
        figures = str(each.late), f"{each.rate:,.0f}", f"{each.bytes_per_key:.0f}"
        table.row(f"{name}, {size(each.keys)}", *map(span, stalls), *figures)
    return table


def _judge(found: Sequence[Measured]) -> int:
    targets = Targets()
    largest, smallest = found[-1], found[0]
    for name, cost in largest.costs.items():
        ratio = cost.mean / smallest.costs[name].mean
        what = f"{name}, mean at {size(largest.keys)} of that at {size(smallest.keys)}"
        targets.check(what, ratio <= RATIO, f"{ratio:.2f}", f"at most {RATIO}")
    for each in found:
        ratio = each.costs[_BESIDE_COOLING].mean / each.costs["acquire"].mean
        what = f"{_BESIDE_COOLING} at {size(each.keys)}, of acquire"
        targets.check(what, ratio <= BESIDE_COOLING, f"{ratio:.2f}", f"at most {BESIDE_COOLING}")
        targets.at_most(f"worst stall growing to {size(each.keys)}", each.growing.own, STALL)
        targets.at_most(f"worst stall of mixed calls at {size(each.keys)}", each.mixed.own, STALL)
        if each.keys >= _FEW:
            what, memory = f"bytes a key at {size(each.keys)}", each.bytes_per_key
            targets.check(what, memory <= BYTES, f"{memory:.0f}", f"at most {BYTES}")
    return targets.status
