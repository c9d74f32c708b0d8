"""The queue of pending acquires: first come, first served.

The invariant is that no key is available while somebody waits who may have one: a call that makes a key available
serves the first waiter before it returns, and after any other change that makes one available, waiters are served in
the next turn of the loop.

A client that may hold so many leases and no more (shares.py) has a lane of its own beside the queue. Of its waiters
only the first stands in the queue, and none while its share is spent: so they keep their places, hold up nobody, and to
pass over a thousand of them costs nothing.

A caller who names its attempt can repeat it without losing its place: a repeat takes the place of a call that still
waits, and for `PLACE_SECONDS` that of one that has ended without a key. Who asks again and again waits as fairly as if
it had waited in one call.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from heapq import merge
from itertools import islice
from operator import attrgetter
from typing import Any, NamedTuple

from sortedcontainers import SortedDict

from keypool.core.answers import Lease
from keypool.core.errors import Draining, PoolDraining, Superseded, TooManyWaiters
from keypool.core.keys import Key
from keypool.core.pool import Pool
from keypool.engine import Client, Timed
from keypool.engine.shares import Shares
from keypool.engine.timers import Timers
from keypool.ops.histogram import SECONDS_OF_WAIT, Histogram

PLACE_SECONDS = 10.0
"""How long a place in the queue is kept for the repeat of an attempt."""


class Request(NamedTuple):
    """What a pending acquire asks for: `attempt` is the digest of its attempt, if its caller named one.

    `client` is the caller, if its token has a name.
    """

    owner: str | None
    block_seconds: float | None = None
    attempt: bytes | None = None
    client: Client | None = None
    purse: Any = None
    """Reservations in the client's share, over Valkey (valkey/shares.py)."""

    @property
    def limited(self) -> Client | None:
        """The client, if it may not hold as many leases as it likes."""
        return None if self.client is None or self.client.max_held is None else self.client


class Waiter:
    """A pending acquire. The result of `served` is the lease, or None when the time to wait is over."""

    __slots__ = ("limited", "place", "request", "served", "since", "timer")

    def __init__(self, request: Request, since: float, served: asyncio.Future[Lease | None]) -> None:
        self.request = request
        self.limited = request.limited
        self.since = since
        self.served = served
        self.place = 0  # those with a lower one are served first
        self.timer: Any = None  # as the engine has them


class Queue:
    """Waiters by place, and places that are kept for attempts. Every operation is O(log n) in the waiters.

    `places` numbers the places; `lane_opened` and `lane_closed` are called with each client that has its first waiter
    here, or no more.
    """

    def __init__(
        self,
        places: Iterator[int] | None = None,
        lane_opened: Callable[[Client], None] = lambda client: None,
        lane_closed: Callable[[Client], None] = lambda client: None,
    ) -> None:
        self.by_place: SortedDict[int, Waiter] = SortedDict()
        """The waiters that may be served. Only this class changes it; as a truth value it costs no call."""
        self._places = places or itertools.count(1)
        self._lane_opened, self._lane_closed = lane_opened, lane_closed
        self._lanes: dict[Client, SortedDict[int, Waiter]] = {}  # all waiters of these clients
        self._passed_over: set[Client] = set()
        self._count = 0
        self._by_attempt: dict[bytes, Waiter] = {}
        self._kept: OrderedDict[bytes, tuple[int, float]] = OrderedDict()  # place, and when it is given up

    def __len__(self) -> int:
        return self._count

    def __contains__(self, waiter: Waiter) -> bool:
        waiters = self.by_place if waiter.limited is None else self._lanes.get(waiter.limited, {})
        return waiters.get(waiter.place) is waiter

    def __iter__(self) -> Iterator[Waiter]:
        """Those that may be served, in order of their places. The queue must not change meanwhile."""
        return iter(self.by_place.values())

    def all(self) -> list[Waiter]:
        """All waiters, in any order. O(n)."""
        unlimited = [waiter for waiter in self.by_place.values() if waiter.limited is None]
        return unlimited + [waiter for lane in self._lanes.values() for waiter in lane.values()]

    def page(self, after: int | None, limit: int) -> tuple[list[Waiter], int | None]:
        """Up to `limit` waiters in order, behind a place; and the last one's place if there are more.

        O(limit + log n), for the unlimited waiters and for each lane.
        """
        bounds = {"minimum": after, "inclusive": (False, True)}
        unlimited = (
            waiter
            for place in self.by_place.irange(**bounds)
            if (waiter := self.by_place[place]).limited is None
        )
        lanes = [map(lane.__getitem__, lane.irange(**bounds)) for lane in self._lanes.values()]
        found = list(islice(merge(unlimited, *lanes, key=attrgetter("place")), limit + 1))
        return found[:limit], found[limit - 1].place if len(found) > limit else None

    def first(self) -> Waiter | None:
        """The waiter to serve next."""
        return self.by_place.peekitem(0)[1] if self.by_place else None

    def waiting_since(self) -> float | None:
        """Since when the waiter with the first place has waited; None if nobody waits. O(lanes)."""
        firsts = [lane.peekitem(0)[1] for lane in self._lanes.values()]
        if (first := self.first()) is not None:
            firsts.append(first)
        return min(firsts, key=lambda waiter: waiter.place).since if firsts else None

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
            waiter.place = next(self._places) if until < waiter.since else place
        self._count += 1
        if attempt is not None:
            self._by_attempt[attempt] = waiter
        client = waiter.limited
        if client is None:
            self.by_place[waiter.place] = waiter
            return
        if client not in self._lanes:
            self._lanes[client] = SortedDict()
            self._lane_opened(client)
        self._step_back(client)
        self._lanes[client][waiter.place] = waiter
        self._step_forward(client)

    def discard(self, waiter: Waiter) -> None:
        """Remove a waiter that is in the queue."""
        self._count -= 1
        if waiter.request.attempt is not None:
            del self._by_attempt[waiter.request.attempt]
        client = waiter.limited
        if client is None:
            del self.by_place[waiter.place]
            return
        self._step_back(client)
        del self._lanes[client][waiter.place]
        self._step_forward(client)
        if not self._lanes[client]:
            del self._lanes[client]
            self._passed_over.discard(client)
            self._lane_closed(client)

    def pass_over(self, client: Client) -> None:
        """The waiters of this client are not to be served until `admit`: its share is spent."""
        self._step_back(client)
        self._passed_over.add(client)

    def admit(self, client: Client) -> None:
        """The waiters of this client may be served, each when it is the first of them."""
        if client in self._passed_over:
            self._passed_over.remove(client)
            self._step_forward(client)

    def admit_all(self, name: str | None = None) -> bool:
        """The same for all clients, or those of this name. Returns whether none is passed over any more."""
        for client in [client for client in self._passed_over if name in (None, client.name)]:
            self.admit(client)
        return not self._passed_over

    def has_lane(self, client: Client) -> bool:
        """Whether waiters of this client are here."""
        return client in self._lanes

    def first_place(self, client: Client) -> int:
        """The place of the first waiter of this client, which has one."""
        place: int = self._lanes[client].peekitem(0)[0]
        return place

    def _step_back(self, client: Client) -> None:
        """Take the first of a lane out of the order of those that may be served."""
        lane = self._lanes[client]
        if lane and client not in self._passed_over:
            del self.by_place[lane.peekitem(0)[0]]

    def _step_forward(self, client: Client) -> None:
        """Put the first of a lane where it may be served."""
        lane = self._lanes[client]
        if lane and client not in self._passed_over:
            place, waiter = lane.peekitem(0)
            self.by_place[place] = waiter

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


class Lane:
    """The waiters of a client in a pool, as `Shares` knows them."""

    def __init__(self, client: Client, waiters: Waiters) -> None:
        self.client = client
        self._waiters = waiters
        self.serve = waiters.serve

    def first_place(self) -> int:
        """The place of the first of them."""
        return self._waiters.queue.first_place(self.client)

    def admit(self) -> None:
        """Their share may have room."""
        self._waiters.queue.admit(self.client)
        self._waiters.serve_soon()


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
        shares: Shares,
        *,
        lease_of: Callable[[Key, float], Lease],
        give_back: Callable[[Lease], None],
        storage_up: Callable[[], bool],
    ) -> None:
        self._pool = pool
        self._timers = timers
        self._now = now
        self._max_waiters = max_waiters
        self._shares = shares
        self._lanes: dict[Client, Lane] = {}
        self._lease_of = lease_of
        self._give_back = give_back
        self._storage_up = storage_up
        self._loop = asyncio.get_running_loop()
        self.queue = Queue(shares.places, self._lane_opened, self._lane_closed)
        """The pending acquires. Only this class changes it."""
        self.waiting = self.queue.by_place
        """Those of them that may be served."""
        self._refusal: type[Draining | PoolDraining] | None = None
        self._serving_soon = False
        self._yielding = False  # to waiters in other pools
        self.wait_seconds = Histogram(SECONDS_OF_WAIT)

    def oldest_wait(self) -> float:
        """Seconds that the first in the queue has waited, 0 if the queue is empty. O(clients that wait)."""
        since = self.queue.waiting_since()
        return 0.0 if since is None else self._now() - since

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
        if waiter.limited is not None:
            self.serve(waiter.since)  # it waits, maybe, although keys are available: then it is passed over
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
            if not self._storage_up() or self._yielding:
                return  # `on_recovered` serves them, or the call of `serve` that yields
            if waiter.limited is not None and not self._has_turn(waiter, waiter.limited, now):
                self.queue.pass_over(waiter.limited)
                continue
            key = self.take(waiter.request, now)
            if key is None:
                if not self._pool.expiry_suspended:  # otherwise `on_recovered` serves them
                    self.serve_soon()  # there is a backlog of expired keys
                return
            self._remove(waiter)
            waiter.served.set_result(self._lease_of(key, now))

    def take(self, request: Request, now: float) -> Key | None:
        """A key for this request, whoever waits; None if there is none. O(1)."""
        client = None if request.client is None else request.client.name
        return self._pool.acquire(now, request.owner, request.block_seconds, request.attempt, client)

    def _has_turn(self, waiter: Waiter, client: Client, now: float) -> bool:
        """Whether the client's share has room for this waiter, after those that came earlier in other pools."""
        if not self._shares.has_room(client, now):
            return False
        self._yielding = True
        try:
            self._shares.serve_earlier(client, waiter.place, now)
        finally:
            self._yielding = False
        return self._shares.has_room(client, now)

    def _lane_opened(self, client: Client) -> None:
        lane = self._lanes[client] = Lane(client, self)
        self._shares.lane_opened(lane)

    def _lane_closed(self, client: Client) -> None:
        self._shares.lane_closed(self._lanes.pop(client))

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
        for waiter in self.queue.all():
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
        settled = self._storage_up() and not self._pool.expiry_suspended
        lacks_key = waiter.limited is None or self._shares.has_room(waiter.limited, now)
        if settled and lacks_key and self._pool.may_have_more(now):
            self._loop.call_soon(self._time_out, waiter)  # a backlog of due keys may hide an available one
        else:
            self.queue.discard(waiter)
            self.queue.keep_place(waiter, now, self._max_waiters)
            waiter.served.set_result(None)
