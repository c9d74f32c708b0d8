"""Who waits for a key at this server, and how they come by one.

First come first served here: whoever comes while somebody waits, stands behind them. A freed key is told on a
channel by the script that frees it, to one of the servers where somebody waits, by lot: so each who waits has
the same chance, wherever it waits (listening: valkey_wake.py). Every quarter of a second somebody looks all the
same, so no key stays free for longer while somebody waits, also if the word of it was lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice

from keypool.core.answers import Lease
from keypool.core.errors import Draining, StorageUnavailable, TooManyWaiters
from keypool.engine import Timed
from keypool.ops.histogram import SECONDS_OF_WAIT, Histogram

POLL_SECONDS = 0.25
"""How long a free key may go unnoticed while somebody waits, if the word of it was lost."""
SERVED_AT_ONCE = 64
_TELL_SECONDS = 1.0  # after which the pool is told again that somebody waits here

_log = logging.getLogger("keypool.valkey")


class Waiter:
    """Somebody who waits. `served` is answered with the lease, or with None when time is up."""

    __slots__ = ("owner", "served", "since", "timer")

    def __init__(self, owner: str | None, since: float, served: asyncio.Future[Lease | None]) -> None:
        self.owner = owner
        self.since = since
        self.served = served
        self.timer: asyncio.TimerHandle | None = None


Take = Callable[[Sequence[str | None], bool], Awaitable[Sequence[Lease | StorageUnavailable]]]
"""What becomes of the first of these owners, in order, if need be after looking everywhere (Draws.take_in_order)."""


class Waiters:
    """See the module. `take` acquires, `give_back` frees, `tell` tells the pool how many wait here."""

    def __init__(
        self,
        max_waiters: int,
        take: Take,
        give_back: Callable[[Lease], None],
        tell: Callable[[int], Awaitable[None]],
    ) -> None:
        self.seconds = Histogram(SECONDS_OF_WAIT)
        self._max_waiters = max_waiters
        self._take = take
        self._give_back = give_back
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._waiters: OrderedDict[Waiter, None] = OrderedDict()
        self._last_chances: dict[Waiter, None] = {}
        """Those of the waiters who leave if the next look finds no key for them."""
        self._pump: asyncio.Task[None] | None = None
        self._awake = asyncio.Event()
        self._told = 0
        self._told_at = 0.0
        self._draining = False

    def __len__(self) -> int:
        return len(self._waiters)

    async def wait(self, owner: str | None, seconds: float, timed: Timed | None = None) -> Lease | None:
        """Stand in the queue for so long; 0 is for one look, after which this doesn't wait for a turn."""
        if self._draining:
            raise Draining
        if seconds > 0 and len(self._waiters) - len(self._last_chances) >= self._max_waiters:
            raise TooManyWaiters(self._max_waiters)
        waiter = Waiter(owner, self._loop.time(), self._loop.create_future())
        if seconds > 0:
            waiter.timer = self._loop.call_later(seconds, self._time_is_up, waiter)
        else:
            self._last_chances[waiter] = None
        self._waiters[waiter] = None
        self._start()
        self._awake.set()
        try:
            return await waiter.served
        except (GeneratorExit, asyncio.CancelledError):
            self._forget(waiter)
            raise
        finally:
            waited = self._loop.time() - waiter.since
            self.seconds.add(waited)
            if timed is not None:
                timed.waited += waited

    def oldest(self) -> float:
        """Seconds that the first in the queue has waited, 0 if nobody waits. O(1)."""
        first = next(iter(self._waiters), None)
        return 0.0 if first is None else self._loop.time() - first.since

    def wake(self) -> None:
        """A key may be free."""
        self._awake.set()

    def drain(self) -> None:
        """Tell all Draining, and take none any more."""
        self._draining = True
        while self._waiters:
            waiter = self._pop()
            if not waiter.served.done():
                waiter.served.set_exception(Draining())

    async def close(self) -> None:
        """Stop."""
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.wait([self._pump])

    # -- the queue

    def _time_is_up(self, waiter: Waiter) -> None:
        waiter.timer = None
        self._last_chances[waiter] = None
        self._awake.set()

    def _pop(self) -> Waiter:
        waiter, _ = self._waiters.popitem(last=False)
        self._leave(waiter)
        return waiter

    def _leave(self, waiter: Waiter) -> None:
        self._waiters.pop(waiter, None)
        self._last_chances.pop(waiter, None)
        if waiter.timer is not None:
            waiter.timer.cancel()
            waiter.timer = None

    def _forget(self, waiter: Waiter) -> None:
        """It hung up. If it was just being served, nobody will hear of that lease: take it back."""
        if waiter in self._waiters:
            self._leave(waiter)
        elif waiter.served.done() and not waiter.served.cancelled() and waiter.served.exception() is None:
            lease = waiter.served.result()
            if lease is not None:
                self._give_back(lease)

    # -- serving

    def _start(self) -> None:
        if self._pump is None:
            self._pump = self._loop.create_task(self._run())
            self._pump.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._pump = None
        if self._waiters and not task.cancelled():
            self._start()  # somebody came while it was ending

    async def _run(self) -> None:
        """Serve until nobody waits."""
        looked_at = 0.0
        while self._waiters:
            self._awake.clear()
            sure = bool(self._last_chances) or self._loop.time() - looked_at >= POLL_SECONDS
            try:
                await self._tell_waiting(sure)
                looked_at = self._loop.time() if sure else looked_at
                served = await self._serve(sure)
            except Exception as error:
                if not isinstance(error, StorageUnavailable):
                    _log.exception("serving those who wait failed")
                served = False
                self._told = 0
                self._end_last_chances(list(self._last_chances), error)
            if not served and self._waiters:
                await self._sleep()
        self._told = 0
        try:
            await self._tell(0)
        except StorageUnavailable:
            _log.debug("that nobody waits could not be told: it lapses")

    async def _tell_waiting(self, sure: bool) -> None:
        """Before keys are looked for everywhere: so none is freed unheard of in between."""
        now = self._loop.time()
        if sure and (self._told != len(self._waiters) or now - self._told_at >= _TELL_SECONDS):
            self._told, self._told_at = len(self._waiters), now
            await self._tell(self._told)

    async def _serve(self, sure: bool) -> bool:
        """Serve the first in the queue, some at a time; whether anything came of it."""
        first = list(islice(self._waiters, SERVED_AT_ONCE))
        leaving = list(self._last_chances)  # who comes later gets a look of its own
        done = await self._take([waiter.owner for waiter in first], sure)
        for waiter, outcome in zip(first, done, strict=False):
            if (
                waiter not in self._waiters
            ):  # it left meanwhile: the next one gets the key under a lease of its own
                if isinstance(outcome, Lease):
                    self._give_back(outcome)
                continue
            self._leave(waiter)
            if isinstance(outcome, Lease):
                waiter.served.set_result(outcome)
            else:
                waiter.served.set_exception(outcome)
        if sure and len(done) < len(first):
            self._end_last_chances(leaving, None)
        return bool(done)

    def _end_last_chances(self, waiters: Sequence[Waiter], error: Exception | None) -> None:
        for waiter in waiters:
            if waiter in self._waiters:
                self._leave(waiter)
                if error is None:
                    waiter.served.set_result(None)
                else:
                    waiter.served.set_exception(error)

    async def _sleep(self) -> None:
        """Until a key may be free, or for a quarter of a second."""
        waker = self._loop.call_later(POLL_SECONDS, self._awake.set)
        await self._awake.wait()
        waker.cancel()
