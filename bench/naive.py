"""The design that suggests itself: a dict, a list and a `call_later` per key, on asyncio's own loop.

Each of its calls looks O(1). It is here for what hides behind them: asyncio keeps cancelled timers in its heap
and rebuilds that when half of them are, and the garbage collector visits every object from time to time. Both
walk the whole set.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from secrets import token_urlsafe

from bench.stall import Collections, Stall, StallProbe

_SLICE = 100


@dataclass
class NaiveMeasured:
    """The worst stalls while the pool grew and while keys were kept alive. Times are seconds."""

    keys: int
    growing: Stall
    keeping: Stall
    full_collection: float
    """The longest collection of everything."""
    kept_alive: int
    seconds: float


@dataclass
class _Key:
    text: str
    blocked: bool = False
    timer: asyncio.TimerHandle | None = None


class NaivePool:
    """Generate, and keepalive, as most would write them."""

    def __init__(self) -> None:
        self.keys: dict[str, _Key] = {}
        self.available: list[str] = []
        self._loop = asyncio.get_running_loop()

    def generate(self) -> None:
        """A key and its timer."""
        key = _Key(token_urlsafe(15))
        key.timer = self._loop.call_later(300, self._expire, key)
        self.keys[key.text] = key
        self.available.append(key.text)

    def keepalive(self, text: str) -> None:
        """Cancel the timer and set another."""
        key = self.keys[text]
        if key.timer is not None:
            key.timer.cancel()
        key.timer = self._loop.call_later(300, self._expire, key)

    def _expire(self, key: _Key) -> None:
        self.keys.pop(key.text, None)


def measure_naive(keys: int, seconds: float) -> NaiveMeasured:
    """Make as many keys as can be in half the time, then keep random ones alive in the other half."""
    return asyncio.run(_measure(keys, seconds))


async def _measure(keys: int, seconds: float) -> NaiveMeasured:
    pool, probe, collections = NaivePool(), StallProbe().start(), Collections()
    started = time.monotonic()
    while len(pool.keys) < keys and time.monotonic() - started < seconds / 2:
        for _ in range(_SLICE):
            pool.generate()
        await asyncio.sleep(0)
    growing = probe.take()
    kept = await _keep_alive(pool, started + seconds)
    probe.stop()
    return NaiveMeasured(
        len(pool.keys), growing, probe.take(), collections.worst[2], kept, time.monotonic() - started
    )


async def _keep_alive(pool: NaivePool, until: float) -> int:
    """Keep random keys alive until each was one and a quarter times, which rebuilds the heap once."""
    draw, texts, kept = random.Random(1).random, pool.available, 0
    while kept < len(texts) * 1.25 and time.monotonic() < until:
        for _ in range(_SLICE):
            pool.keepalive(texts[int(draw() * len(texts))])
        kept += _SLICE
        await asyncio.sleep(0)
    return kept
