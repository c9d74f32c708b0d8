"""A stream of mixed calls to an engine, in the shares of a service at work, and keys to make them with.

The calls are drawn from a seeded generator. Keys are known to the mix only in a sample, so that its own memory
doesn't grow with the pool.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Container, Iterable

from keypool.core.answers import GeneratedKey, Lease
from keypool.core.cursor import ListQuery
from keypool.core.errors import NoKeyAvailable, StaleLease, UnknownKey
from keypool.engine import Engine

SAMPLE = 50_000
BATCH = 100
_HELD = 1000
_LOST = 0.02  # of the leases are never given back
_SHARES = {
    "keepalive": 40,
    "acquire": 24,
    "unblock": 24,
    "get": 5,
    "generate": 3,
    "delete": 3,
    "page": 0.5,
    "stats": 0.5,
}
_PAGES = (
    ListQuery(),
    ListQuery(order="expiry"),
    ListQuery(order="release"),
    ListQuery(prefix="a"),
    ListQuery(state="blocked"),
)


class Mix:
    """Calls in the shares above, one by one. `keys` is how many the pool is kept at.

    `sample` is how many keys it knows, and `without` names calls that it doesn't make.
    """

    def __init__(
        self,
        engine: Engine,
        keys: int,
        *,
        sample: int = SAMPLE,
        without: Container[str] = (),
        seed: int = 1,
    ) -> None:
        self.engine = engine
        self.keys = keys
        self.known: list[str] = []
        self.calls = 0
        self.gone = 0
        """Calls whose key was gone, by delete or deadline."""
        self._sample = sample
        self._random = random.Random(seed)
        self._held: deque[Lease] = deque()
        self._limit = min(_HELD, max(1, keys // 2))
        self._steps = [
            getattr(self, f"_{name}")
            for name, share in _SHARES.items()
            for _ in range(int(share * 2))
            if name not in without
        ]

    def learn(self, made: list[GeneratedKey]) -> None:
        """Take keys into the sample: every one while there is room, then in place of a random one."""
        for key in made:
            if len(self.known) < self._sample:
                self.known.append(key.key)
            elif self._random.random() < self._sample / self.keys:
                self.known[self._any()] = key.key

    async def fill(self) -> None:
        """Make the keys that are missing, a slice in each turn of the loop."""
        while (missing := self.keys - (await self.engine.stats()).total) > 0:
            self.learn(await self.engine.generate(min(BATCH, missing)))
            await asyncio.sleep(0)

    def forget(self, texts: Iterable[str]) -> None:
        """Drop keys from the sample."""
        gone = set(texts)
        self.known = [text for text in self.known if text not in gone]

    async def run(self, calls: int) -> None:
        """That many calls in one turn of the loop, unless one waits."""
        steps, draw, count = self._steps, self._random.random, len(self._steps)
        for _ in range(calls):
            try:
                await steps[int(draw() * count)]()
            except (UnknownKey, StaleLease):
                self.gone += 1
        self.calls += calls

    def _any(self) -> int:
        return int(self._random.random() * len(self.known))

    async def _keepalive(self) -> None:
        if self.known:
            place = self._any()
            try:
                await self.engine.keepalive(self.known[place])
            except UnknownKey:
                self._forget(place)
                raise

    async def _get(self) -> None:
        if self.known:
            await self.engine.get(self.known[self._any()])

    async def _acquire(self) -> None:
        if len(self._held) >= self._limit:
            await self._unblock()
            return
        try:
            self._held.append(await self.engine.acquire("bench", 0))
        except NoKeyAvailable:
            self.gone += 1

    async def _unblock(self) -> None:
        if self._held:
            lease = self._held.popleft()
            if self._random.random() < _LOST:
                return
            await self.engine.unblock(lease.key, lease.lease)

    async def _generate(self) -> None:
        if (await self.engine.stats()).total <= self.keys:
            self.learn(await self.engine.generate(1))

    async def _delete(self) -> None:
        if (await self.engine.stats()).total >= self.keys and self.known:
            place = self._any()
            text = self.known[place]
            self._forget(place)
            await self.engine.delete(text)

    async def _page(self) -> None:
        await self.engine.page(_PAGES[int(self._random.random() * len(_PAGES))])

    async def _stats(self) -> None:
        await self.engine.stats()

    def _forget(self, place: int) -> None:
        self.known[place] = self.known[-1]
        self.known.pop()
