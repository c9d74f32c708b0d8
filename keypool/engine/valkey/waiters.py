"""The local wait queue, and how it is served.

First come, first served at this server: a new acquire queues behind those that wait. The script that frees a key
publishes that to one of the servers with waiters, chosen at random in proportion to its waiters, so each waiter has the
same chance, wherever it waits (subscriber.py). In case such a message was lost, a server with waiters also looks for
keys every quarter of a second.

The queue with its places is that of engine/waiters.py. So a repeat of an attempt finds its place at this server only;
at another one it queues anew. Whichever of them is served first, the other one gets the same lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from itertools import islice

from keypool.core.answers import Lease, WaiterRow
from keypool.core.errors import Draining, PoolDraining, StorageUnavailable, Superseded, TooManyWaiters
from keypool.engine import Client, Timed
from keypool.engine.holder_calls import waiter_row_of
from keypool.engine.valkey.attempts import BUSY, KNOWN, Attempts
from keypool.engine.valkey.calls import ScriptCall, all_of
from keypool.engine.valkey.partitions import Partitions
from keypool.engine.valkey.poller import PartitionPoller
from keypool.engine.valkey.sampler import PartitionSampler
from keypool.engine.valkey.shares import Purse, Shares
from keypool.engine.waiters import Queue, Request, Waiter
from keypool.ops.histogram import SECONDS_OF_WAIT, Histogram

LOOK_SECONDS = 0.25
"""Seconds between two looks at all partitions while acquires wait, in case a message was lost."""
SERVED_AT_ONCE = 64
_ANNOUNCE_SECONDS = 1.0  # between two announcements of the same number of waiters
_ANNOUNCEMENT_LASTS = 3.0  # seconds, after which an announcement lapses

_CLOCK_WAS_SET = 0.1  # seconds by which the wall clock has moved against the loop's
_log = logging.getLogger("keypool.valkey")


class Waiters:
    """See the module. `server` is this server's name in Valkey."""

    def __init__(
        self,
        partitions: Partitions,
        sampler: PartitionSampler,
        poller: PartitionPoller,
        server: str,
        shares: Shares,
    ) -> None:
        self.seconds = Histogram(SECONDS_OF_WAIT)
        self.announced = 0
        """How many waiters this server has announced to the partitions."""
        self._partitions = partitions
        self._sampler = sampler
        self._poller = poller
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._shares = shares
        self._waiters = Queue()
        self.waiting = self._waiters.by_place
        """The waiters that may be served: all but those of clients whose share is spent."""
        self._passed_over = False  # whether waiters were, since this was last looked at
        self._last_chances: dict[Waiter, bool] = {}
        """The waiters whose time is up: they leave unless the next look at all partitions finds a key for them. The
        value is whether they had any time, so that their places are kept."""
        self._serving: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._announced_at = 0.0
        self._epoch = 0.0  # when the loop's clock was 0
        self._draining: type[Draining | PoolDraining] | None = None
        partitions.client.on_recovery = self._wake.set
        partitions.client.on_loss = self._fail
        partitions.client.on_available = self._keys_available

    def __len__(self) -> int:
        return len(self._waiters)

    def has_lane(self, client: Client) -> bool:
        """Whether acquires of this client, which has a share, wait here."""
        return self._waiters.has_lane(client)

    async def wait(self, request: Request, seconds: float, timed: Timed | None = None) -> Lease | None:
        """Queue for up to `seconds`; None if no key came. With 0, for one look at all partitions, whoever is ahead.

        Raises Draining, TooManyWaiters, Superseded and StorageUnavailable. O(log n), besides the look.
        """
        if self._draining is not None:
            raise self._draining()
        superseded = self._waiters.waiter_of(request.attempt)
        most = self._partitions.rules.max_waiters
        full = len(self._waiters) - len(self._last_chances) >= most
        if seconds > 0 and superseded is None and full:
            raise TooManyWaiters(most)
        waiter = Waiter(request, self._loop.time(), self._loop.create_future())
        if seconds > 0:
            waiter.timer = self._loop.call_later(seconds, self._time_is_up, waiter)
        else:
            self._last_chances[waiter] = False
        self._waiters.add(waiter)
        if superseded is not None:
            self._stop_timer(superseded)
            superseded.served.set_exception(Superseded())
        self._start()
        self._wake.set()
        try:
            return await waiter.served
        except (GeneratorExit, asyncio.CancelledError):
            self._abandon(waiter)
            raise
        finally:
            waited = self._loop.time() - waiter.since
            self.seconds.add(waited)
            if timed is not None:
                timed.waited += waited

    def page(self, after: int | None, limit: int) -> tuple[list[WaiterRow], int | None]:
        """Some of the queue in order, behind a place; and the last one's place if there are more. See Queue.page."""
        found, last = self._waiters.page(after, limit)
        epoch = time.time() - self._loop.time()
        # Not each time, as a waiter's moment would differ by a millisecond from page to page.
        if abs(epoch - self._epoch) > _CLOCK_WAS_SET:
            self._epoch = epoch
        return [waiter_row_of(waiter, self._epoch + waiter.since) for waiter in found], last

    def oldest(self) -> float:
        """Seconds that the first in the queue has waited, 0 if nobody waits. O(1)."""
        since = self._waiters.waiting_since()
        return 0.0 if since is None else self._loop.time() - since

    def key_freed(self, partition: int, server: str) -> None:
        """Handle a message that keys were freed in a partition, for the named server or any ("*")."""
        if server not in (self._server, "*"):
            return
        if self.waiting:
            self._partitions.available[partition] = max(1, self._partitions.available[partition])
            self._wake.set()
        elif server == self._server:
            self._partitions.call(partition, "wait", (self._server, 0, 0))  # offer them to another server

    def _keys_available(self) -> None:
        """Serve waiters, as a reply reported available keys; but not if servers compete for them by messages."""
        if self.waiting and not self._poller.waiting_elsewhere:
            self._wake.set()

    def drain(self, reason: type[Draining | PoolDraining] = Draining) -> None:
        """Raise this in all waiters, and accept none from now on."""
        self._draining = reason
        self._shares.listeners.pop(self._has_room, None)
        for waiter in self._waiters.all():
            self._leave(waiter, reason())

    def _fail(self, error: StorageUnavailable) -> None:
        """Raise this in all waiters: the pool is gone, so no key can come."""
        for waiter in self._waiters.all():
            self._leave(waiter, StorageUnavailable(error.detail))

    async def close(self) -> None:
        """Stop serving, and withdraw the announcement."""
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait([self._serving])
        if self.announced and not self._partitions.client.degraded:
            with contextlib.suppress(StorageUnavailable):
                await self._announce(0)

    # -- the queue

    def _time_is_up(self, waiter: Waiter) -> None:
        waiter.timer = None
        self._last_chances[waiter] = True
        self._wake.set()

    def _remove(self, waiter: Waiter, keep_place: bool) -> None:
        self._waiters.discard(waiter)
        self._stop_timer(waiter)
        if keep_place:
            self._waiters.keep_place(waiter, self._loop.time(), self._partitions.rules.max_waiters)

    def _stop_timer(self, waiter: Waiter) -> None:
        self._last_chances.pop(waiter, None)
        if waiter.timer is not None:
            waiter.timer.cancel()
            waiter.timer = None

    def _leave(self, waiter: Waiter, outcome: Lease | Exception | None, keep_place: bool = False) -> None:
        """Take a waiter out of the queue, and give it its outcome."""
        self._remove(waiter, keep_place)
        if waiter.served.done():
            return
        if isinstance(outcome, Exception):
            waiter.served.set_exception(outcome)
        else:
            waiter.served.set_result(outcome)

    def _abandon(self, waiter: Waiter) -> None:
        """Remove a waiter whose caller hung up. If it has just been served, give its lease back."""
        if waiter in self._waiters:
            self._remove(waiter, self._last_chances.get(waiter, True))
        elif waiter.served.done() and not waiter.served.cancelled() and waiter.served.exception() is None:
            lease = waiter.served.result()
            if lease is not None:
                self._sampler.give_back(lease)

    # -- serving

    def _start(self) -> None:
        if self._serving is None:
            self._serving = self._loop.create_task(self._run())
            self._serving.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._serving = None
        if self._waiters and not task.cancelled():
            self._start()  # a waiter came while the task was ending

    async def _run(self) -> None:
        """Serve until the queue is empty."""
        looked_at = 0.0
        while self._waiters:
            self._wake.clear()
            everywhere = bool(self._last_chances) or self._loop.time() - looked_at >= LOOK_SECONDS
            try:
                if everywhere:  # announce first, so that any key freed after the look is published
                    self._waiters.admit_all()
                    await self._announce(len(self.waiting))
                    looked_at = self._loop.time()
                served = await self._serve(everywhere)
            except Exception as error:
                if isinstance(error, PoolDraining):  # a partition knows it already
                    for waiter in self._waiters.all():
                        self._leave(waiter, error)
                elif not isinstance(error, StorageUnavailable):
                    _log.exception("serving waiters failed")
                served = False
                self.announced = 0
                for waiter in list(self._last_chances):
                    self._leave(waiter, error)
            if not served and self._waiters:
                waker = self._loop.call_later(LOOK_SECONDS, self._wake.set)
                await self._wake.wait()
                waker.cancel()
        with contextlib.suppress(StorageUnavailable):  # the announcement then lapses by itself
            await self._announce(0)

    async def _announce(self, count: int) -> None:
        """Announce the number of waiters here to all partitions, if it changed or a second has passed."""
        now = self._loop.time()
        if not count or self.announced != count or now - self._announced_at >= _ANNOUNCE_SECONDS:
            self.announced, self._announced_at = count, now
            await self._partitions.all("wait", self._server, count, round(_ANNOUNCEMENT_LASTS * 1e6))

    async def _serve(self, everywhere: bool) -> bool:
        """Serve the first waiters of the queue. Returns whether any of them has an outcome."""
        first = list(islice(self._waiters, SERVED_AT_ONCE))
        # Taken before the look, as it doesn't cover those who come later.
        leaving = list(self._last_chances.items())
        attempts = self._sampler.attempts
        if attempts is not None and any(waiter.request.attempt is not None for waiter in first):
            done = await self._serve_attempts(first, everywhere, attempts)
        else:
            done = await self._serve_some(first, everywhere)
        if everywhere and done < len(first):
            for waiter, waited in leaving:
                if waiter in self._waiters:
                    self._leave(waiter, None, keep_place=waited)
        passed_over, self._passed_over = self._passed_over, False
        return done > 0 or passed_over

    async def _serve_some(self, waiters: list[Waiter], everywhere: bool) -> int:
        """Serve waiters in order. Returns how many have an outcome."""
        purses: dict[Waiter, Purse] = {}
        if any(waiter.limited is not None for waiter in waiters):
            purses = await self._reserve(waiters, everywhere)
            waiters = [waiter for waiter in waiters if waiter.limited is None or waiter in purses]
        requests = [waiter.request._replace(purse=purses.get(waiter)) for waiter in waiters]
        try:
            done = await self._sampler.take_in_order(requests, everywhere)
        finally:
            for purse in purses.values():
                self._shares.give_back(purse)
        for waiter, outcome in zip(waiters, done, strict=False):
            if waiter not in self._waiters:  # it hung up, or its attempt was repeated
                heir = self._waiters.waiter_of(waiter.request.attempt)
                if heir is not None:
                    self._leave(heir, outcome)
                elif isinstance(outcome, Lease):  # the next one gets a lease of its own
                    self._sampler.give_back(outcome)
            else:
                self._leave(waiter, outcome)
        return len(done)

    async def _reserve(self, waiters: Sequence[Waiter], everywhere: bool) -> dict[Waiter, Purse]:
        """Reserve leases for those whose client has a share, if there are keys. Pass over clients without room."""
        if not any(self._partitions.available) and not (everywhere and await self._sampler.poll()):
            return {}
        limited = [(waiter, waiter.limited) for waiter in waiters if waiter.limited is not None]
        found = await asyncio.gather(
            *(
                self._shares.reserve(client, 1, self._sampler.block_of(waiter.request))
                for waiter, client in limited
            ),
            return_exceptions=True,
        )
        purses = {}
        for (waiter, client), result in zip(limited, found, strict=True):
            if not isinstance(result, BaseException) and result[0].reservations:
                purses[waiter] = result[0]
            elif waiter in self._waiters:
                self._waiters.pass_over(client)
                self._passed_over = True
                self._shares.listeners[self._has_room] = None
        return purses

    def _has_room(self, client: str) -> None:
        """A lease of this client has ended, wherever that was."""
        if self._waiters.admit_all(client):
            self._shares.listeners.pop(self._has_room, None)
        self._wake.set()

    async def _serve_attempts(self, waiters: list[Waiter], everywhere: bool, attempts: Attempts) -> int:
        """The same where other servers may serve the same attempts in other partitions (attempts.py).

        A waiter whose attempt is being served elsewhere is left out this time.
        """
        claims: dict[Waiter, tuple[bytes, str, ScriptCall]] = {}
        for waiter in waiters:
            if (attempt := waiter.request.attempt) is not None:
                claim, block = attempts.new_claim(), self._sampler.block_of(waiter.request)
                claims[waiter] = attempt, claim, attempts.claim(attempt, claim, block)
        held_for = {waiter: self._sampler.block_of(waiter.request) for waiter in claims}
        done, some = 0, []
        try:
            await all_of([call for _, _, call in claims.values()])
            for waiter in waiters:
                state = claims[waiter][2].result()[0] if waiter in claims else None
                if state == KNOWN and (held := await self._sampler.held(claims[waiter][0])):
                    held_for[waiter] = held[0].release_in
                    done += 1
                    if waiter in self._waiters:
                        self._leave(waiter, held[0])
                elif state != BUSY:
                    some.append(waiter)
            return done + (await self._serve_some(some, everywhere) if some else 0)
        finally:
            for waiter, (attempt, claim, _) in claims.items():
                attempts.end(attempt, claim, held_for[waiter])
