"""The queue of pending acquires: first come, first served.

The invariant is that no key is available while the queue isn't empty: a call that makes a key available serves the
first waiter before it returns, and after any other change that makes one available, waiters are served in the next turn
of the loop.

A caller who names its attempt can repeat it without losing its place: a repeat takes the place of a call that still
waits, and for `PLACE_SECONDS` that of one that has ended without a key. Who asks again and again waits as fairly as if
it had waited in one call.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sortedcontainers import SortedDict

from keypool.core.answers import Lease
from keypool.core.errors import Draining, PoolDraining, Superseded, TooManyWaiters
from keypool.core.keys import Key
from keypool.core.pool import Pool
from keypool.engine import Timed
from keypool.engine.timers import Timers
from keypool.ops.histogram import SECONDS_OF_WAIT, Histogram

PLACE_SECONDS = 10.0
"""How long a place in the queue is kept for the repeat of an attempt."""


class Request(NamedTuple):
    """What a pending acquire asks for: `attempt` is the digest of its attempt, if its caller named one.

    `client` is the name of the caller's token, if it has one.
    """

    owner: str | None
    block_seconds: float | None = None
    attempt: bytes | None = None
    client: str | None = None


class Waiter:
    """A pending acquire. The result of `served` is the lease, or None when the time to wait is over."""

    __slots__ = ("place", "request", "served", "since", "timer")

    def __init__(self, request: Request, since: float, served: asyncio.Future[Lease | None]) -> None:
        self.request = request
        self.since = since
        self.served = served
        self.place = 0  # those with a lower one are served first
        self.timer: Any = None  # as the engine has them


class Queue:
    """Waiters by place, and places that are kept for attempts. Every operation is O(log n) in the waiters."""

    def __init__(self) -> None:
        self.by_place: SortedDict[int, Waiter] = SortedDict()
        """The waiters. Only this class changes it; as a truth value it costs no call."""
        self._by_attempt: dict[bytes, Waiter] = {}
        self._kept: OrderedDict[bytes, tuple[int, float]] = OrderedDict()  # place, and when it is given up
        self._last_place = 0

    def __len__(self) -> int:
        return len(self.by_place)

    def __contains__(self, waiter: Waiter) -> bool:
        return self.by_place.get(waiter.place) is waiter

    def __iter__(self) -> Iterator[Waiter]:
        """In order of their places. The queue must not change meanwhile."""
        return iter(self.by_place.values())

    def first(self) -> Waiter | None:
        """The waiter to serve next."""
        return self.by_place.peekitem(0)[1] if self.by_place else None

    def waiter_of(self, attempt: bytes | None) -> Waiter | None:
        """The waiter of this attempt."""
        return None if attempt is None else self._by_attempt.get(attempt)

    def add(self, waiter: Waiter) -> None:
        """Add a waiter: at the end, or in the place that is kept for its attempt, where another may still wait."""
        attempt = waiter.request.attempt
        if (before := self.waiter_of(attempt)) is not None:
            self.discard(before)
            waiter.place = before.place
        else:
            place, until = (0, 0.0) if attempt is None else self._kept.pop(attempt, (0, 0.0))
            if until < waiter.since:
                self._last_place += 1
                place = self._last_place
            waiter.place = place
        self.by_place[waiter.place] = waiter
        if attempt is not None:
            self._by_attempt[attempt] = waiter

    def discard(self, waiter: Waiter) -> None:
        """Remove a waiter that is in the queue."""
        del self.by_place[waiter.place]
        if waiter.request.attempt is not None:
            del self._by_attempt[waiter.request.attempt]

    def keep_place(self, waiter: Waiter, now: float, most: int) -> None:
        """Keep the place of a waiter that was discarded, if it named its attempt. O(1), amortized.

        Beyond `most` places, the oldest is given up.
        """
        attempt = waiter.request.attempt
        if attempt is None:
            return
        self._kept[attempt] = (waiter.place, now + PLACE_SECONDS)
        self._kept.move_to_end(attempt)
        while self._kept:
            oldest = next(iter(self._kept))
            if len(self._kept) <= most and self._kept[oldest][1] >= now:
                return
            del self._kept[oldest]


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
        self.queue = Queue()
        """The pending acquires. Only this class changes it."""
        self.waiting = self.queue.by_place
        self._refusal: type[Draining | PoolDraining] | None = None
        self._serving_soon = False
        self.wait_seconds = Histogram(SECONDS_OF_WAIT)

    def oldest_wait(self) -> float:
        """Seconds that the first in the queue has waited, 0 if the queue is empty. O(1)."""
        first = self.queue.first()
        return 0.0 if first is None else self._now() - first.since

    async def wait(self, request: Request, seconds: float, timed: Timed | None) -> Lease | None:
        """The lease of the next available key; None if there was none within `seconds`. O(log n).

        The time in the queue is added to `timed.waited`. Raises Draining, PoolDraining, TooManyWaiters, Superseded.
        """
        if self._refusal is not None:
            raise self._refusal
        superseded = self.queue.waiter_of(request.attempt)
        if superseded is None and len(self.queue) >= self._max_waiters:
            raise TooManyWaiters(self._max_waiters)
        waiter = Waiter(request, self._now(), self._loop.create_future())
        waiter.timer = self._timers.after(seconds, self._time_out, waiter)
        self.queue.add(waiter)
        if superseded is not None:
            self._timers.cancel(superseded.timer)
            superseded.served.set_exception(Superseded())
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
        while self._pool.available and (waiter := self.queue.first()) is not None:
            if not self._storage_up():
                return  # `on_recovered` serves them
            key = self._pool.acquire(now, *waiter.request)
            if key is None:
                if not self._pool.expiry_suspended:  # otherwise `on_recovered` serves them
                    self.serve_soon()  # there is a backlog of expired keys
                return
            self._remove(waiter)
            waiter.served.set_result(self._lease_of(key, now))

    def serve_soon(self) -> None:
        """Serve waiters in the next turn of the loop. O(1)."""
        if not self._serving_soon:
            self._serving_soon = True
            self._loop.call_soon(self._serve_now)

    def _serve_now(self) -> None:
        self._serving_soon = False
        self.serve(self._now())

    def drain(self, refusal: type[Draining | PoolDraining]) -> None:
        """Answer all waiters with this error, and admit no more. O(waiters)."""
        self._refusal = refusal
        while (waiter := self.queue.first()) is not None:
            self._remove(waiter)
            waiter.served.set_exception(refusal())

    def _remove(self, waiter: Waiter) -> None:
        self.queue.discard(waiter)
        self._timers.cancel(waiter.timer)

    def _forget(self, waiter: Waiter) -> None:
        """Remove a waiter that hung up. If it was served in this turn, its caller never gets the lease: end it."""
        if waiter in self.queue:
            self._remove(waiter)
            self.queue.keep_place(waiter, self._now(), self._max_waiters)
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
            self.queue.discard(waiter)
            self.queue.keep_place(waiter, now, self._max_waiters)
            waiter.served.set_result(None)
