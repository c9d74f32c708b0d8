"""The queue of pending acquires: first come, first served.

The invariant is that no key is available while the queue isn't empty: a call that makes a key available serves the
first waiter before it returns, and after any other change that makes one available, waiters are served in the next turn
of the loop.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from keypool.core.answers import Lease
from keypool.core.errors import Draining, TooManyWaiters
from keypool.core.keys import Key
from keypool.core.pool import Pool
from keypool.engine import Timed
from keypool.engine.timers import Timers
from keypool.ops.histogram import SECONDS_OF_WAIT, Histogram


class Waiter:
    """A pending acquire. The result of `served` is the lease, or None when the time to wait is over."""

    __slots__ = ("owner", "served", "since", "timer")

    def __init__(self, owner: str | None, since: float, served: asyncio.Future[Lease | None]) -> None:
        self.owner = owner
        self.since = since
        self.served = served
        self.timer: Any = None  # as the engine has them


class Waiters:
    """See the module. All moments are those of the engine's clock, `now`.

    `lease_of` returns the lease of a key that was acquired, `give_back` ends a lease whose caller has hung up,
    `storage_up` returns whether keys may be served at all.
    """

    def __init__(
        self,
        pool: Pool,
        timers: Timers,
        now: Callable[[], float],
        max_waiters: int,
        *,
        lease_of: Callable[[Key, float], Lease],
        give_back: Callable[[Lease], None],
        storage_up: Callable[[], bool],
    ) -> None:
        self._pool = pool
        self._timers = timers
        self._now = now
        self._max_waiters = max_waiters
        self._lease_of = lease_of
        self._give_back = give_back
        self._storage_up = storage_up
        self._loop = asyncio.get_running_loop()
        self.queue: OrderedDict[Waiter, None] = OrderedDict()
        """The pending acquires, in order. Only this class changes it."""
        self._draining = False
        self._serving_soon = False
        self.wait_seconds = Histogram(SECONDS_OF_WAIT)

    def oldest_wait(self) -> float:
        """Seconds that the first in the queue has waited, 0 if the queue is empty. O(1)."""
        first = next(iter(self.queue), None)
        return 0.0 if first is None else self._now() - first.since

    async def wait(self, owner: str | None, seconds: float, timed: Timed | None) -> Lease | None:
        """The lease of the next available key; None if there was none within `seconds`. O(log n).

        The time in the queue is added to `timed.waited`. Raises Draining, TooManyWaiters.
        """
        if self._draining:
            raise Draining
        if len(self.queue) >= self._max_waiters:
            raise TooManyWaiters(self._max_waiters)
        waiter = Waiter(owner, self._now(), self._loop.create_future())
        waiter.timer = self._timers.after(seconds, self._time_out, waiter)
        self.queue[waiter] = None
        try:
            return await waiter.served
        except (GeneratorExit, asyncio.CancelledError):  # hung up: the driver of this coroutine closed it
            self._forget(waiter)
            raise
        finally:
            waited = self._now() - waiter.since
            self.wait_seconds.add(waited)
            if timed is not None:
                timed.waited += waited

    def serve(self, now: float) -> None:
        """Serve waiters as long as keys are available. O(log n) each."""
        while self.queue and self._pool.available:
            if not self._storage_up():
                return  # `on_recovered` serves them
            key = self._pool.acquire(now, next(iter(self.queue)).owner)
            if key is None:
                if not self._pool.expiry_suspended:  # otherwise `on_recovered` serves them
                    self.serve_soon()  # there is a backlog of expired keys
                return
            self._pop().served.set_result(self._lease_of(key, now))

    def serve_soon(self) -> None:
        """Serve waiters in the next turn of the loop. O(1)."""
        if not self._serving_soon:
            self._serving_soon = True
            self._loop.call_soon(self._serve_now)

    def _serve_now(self) -> None:
        self._serving_soon = False
        self.serve(self._now())

    def drain(self) -> None:
        """Answer all waiters with Draining, and admit no more. O(waiters)."""
        self._draining = True
        while self.queue:
            self._pop().served.set_exception(Draining())

    def _pop(self) -> Waiter:
        waiter, _ = self.queue.popitem(last=False)
        self._timers.cancel(waiter.timer)
        return waiter

    def _forget(self, waiter: Waiter) -> None:
        """Remove a waiter that hung up. If it was served in this turn, its caller never gets the lease: end it."""
        if waiter in self.queue:
            del self.queue[waiter]
            self._timers.cancel(waiter.timer)
            return
        served = waiter.served
        if served.done() and not served.cancelled() and served.exception() is None:
            lease = served.result()
            if lease is not None:
                self._give_back(lease)

    def _time_out(self, waiter: Waiter) -> None:
        waiter.timer = None  # it has fired; keeping it would make a reference cycle
        now = self._now()
        self._pool.process_due(now)  # releases whose timers are late
        self.serve(now)
        if waiter not in self.queue:
            return
        if self._storage_up() and not self._pool.expiry_suspended and self._pool.may_have_more(now):
            self._loop.call_soon(self._time_out, waiter)  # a backlog of due keys may hide an available one
        else:
            del self.queue[waiter]
            waiter.served.set_result(None)
