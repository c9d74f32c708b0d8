"""What each call of an engine costs, timed alone.

The calls run in slices between turns of the loop, so that timers and callbacks have their turn too. Keys are
drawn at random from a large sample, so that at a million keys none is still in the processor's cache; their
texts are copied, since a request's text is a new object too.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from bench.mix import BATCH, Mix
from bench.process import preemptions
from bench.report import mean, percentile
from keypool.api.operations import MAX_BATCH
from keypool.core.answers import Lease
from keypool.core.cursor import ListQuery
from keypool.engine import Engine

T = TypeVar("T")
R = TypeVar("R")

_SLICE = 50
_AT_ONCE = 5000
_BLOCKED = 10  # one in so many keys, while pages are read
_PAGES = {
    "page by id": ListQuery(),
    "page by release": ListQuery(order="release"),
    "page by expiry": ListQuery(order="expiry"),
    "page by prefix": ListQuery(prefix="a", limit=10),  # a thousand keys have sixteen that match
    "page of blocked": ListQuery(state="blocked"),
}


@dataclass
class Cost:
    """Seconds that a call took: the mean of each round, and the others over all rounds.

    The mean is of the slices in which this process kept its core, if there were any: what others do on a
    busy machine is not what a call costs.
    """

    means: list[float] = field(default_factory=list)
    p999: float = 0.0
    worst: float = 0.0
    undisturbed: float = 0.0
    """The worst in those slices."""

    @property
    def mean(self) -> float:
        """That of the best round: what others do on the machine only ever adds."""
        return min(self.means)


class Costs:
    """Times the calls of one engine, whose keys `mix` knows."""

    def __init__(self, engine: Engine, mix: Mix, calls: int) -> None:
        self.of: dict[str, Cost] = {}
        self._engine = engine
        self._mix = mix
        self._calls = calls
        self._at_once = max(1, min(mix.keys // 2, _AT_ONCE, calls))
        self._random = random.Random(2)
        self._spans: dict[str, list[float]] = {}
        self._quiet: dict[str, list[float]] = {}

    async def round(self) -> None:
        """Every call; the pool has its size again afterwards."""
        self._spans, self._quiet = {}, {}
        for _ in range(-(-self._calls // self._at_once)):
            await self._single_calls()
        for _ in range(max(3, self._calls // 1000)):
            await self._batches()
        await self._pages()
        for name, spans in self._spans.items():
            quiet = self._quiet[name]
            cost = self.of.setdefault(name, Cost())
            cost.means.append(mean(quiet or spans))
            cost.undisturbed = max(cost.undisturbed, *quiet, 0.0)
            cost.p999 = max(cost.p999, percentile(sorted(spans), 99.9))
            cost.worst = max(cost.worst, *spans)

    async def _single_calls(self) -> None:
        engine = self._engine
        await self._time("keepalive", self._texts(), engine.keepalive)
        await self._time("get", self._texts(), engine.get)
        leases = await self._time("acquire", range(self._at_once), lambda _: engine.acquire(None, 0))
        await self._time("unblock", leases, self._unblock)
        doomed = self._texts()
        made = await self._time("generate", doomed, lambda _: engine.generate(1))
        await self._time("delete", doomed, engine.delete)
        self._mix.forget(doomed)
        for keys in made:
            self._mix.learn(keys)
        await self._time("stats", range(self._at_once), lambda _: engine.stats())

    async def _batches(self) -> None:
        """Batches of the largest size, or as large as the pool allows; each is one call, in one turn."""
        engine, count = self._engine, min(MAX_BATCH // 2, self._mix.keys // 2)
        (made,) = await self._time(f"generate x {count}", [count], engine.generate)
        texts = [key.key for key in made]
        await self._time(f"keepalive x {count}", [texts], engine.keepalive_many)
        (leases,) = await self._time(
            f"acquire x {count}", [count], lambda count: engine.acquire_many(None, count)
        )
        held = [(lease.key, lease.lease) for lease in leases]
        await self._time(f"unblock x {count}", [held], engine.unblock_many)
        await self._time(f"delete x {count}", [texts], engine.delete_many)

    async def _unblock(self, lease: Lease) -> object:
        return await self._engine.unblock(lease.key, lease.lease)

    def _texts(self) -> list[str]:
        """Texts of that many random keys, all different."""
        known = self._mix.known
        chosen = self._random.sample(known, min(self._at_once, len(known)))
        return [text.encode().decode() for text in chosen]

    async def _pages(self) -> None:
        """Pages one after the other from the start of each list, while a number of keys is blocked."""
        leases: list[Lease] = []
        while len(leases) < self._mix.keys // _BLOCKED:
            leases += await self._engine.acquire_many(None, BATCH)
            await asyncio.sleep(0)
        for name, query in _PAGES.items():
            after: str | None = None
            for _ in range(max(20, self._calls // 100)):
                asked = ListQuery(query.state, query.prefix, query.order, query.limit, after)
                (page,) = await self._time(name, [asked], self._engine.page)
                after = page.next
        for start in range(0, len(leases), BATCH):
            await self._engine.unblock_many(
                [(held.key, held.lease) for held in leases[start : start + BATCH]]
            )
            await asyncio.sleep(0)

    async def _time(self, name: str, items: Sequence[T], call: Callable[[T], Awaitable[R]]) -> list[R]:
        """Call with each item, and keep the spans under a name. The answers, in order."""
        answers: list[R] = []
        spans = self._spans.setdefault(name, [])
        quiet = self._quiet.setdefault(name, [])
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
