"""The local wait queue, and how it is served.

First come, first served at this server: a new acquire queues behind those that wait. The script that frees a key
publishes that to one of the servers with waiters, chosen at random in proportion to its waiters, so each waiter has the
same chance, wherever it waits (subscriber.py). In case such a message was lost, a server with waiters also looks for
keys every quarter of a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from itertools import islice

from keypool.core.answers import Lease
from keypool.core.errors import Draining, StorageUnavailable, TooManyWaiters
from keypool.engine import Timed
from keypool.engine.valkey.partitions import Partitions
from keypool.engine.valkey.poller import PartitionPoller
from keypool.engine.valkey.sampler import PartitionSampler
from keypool.engine.waiters import Waiter
from keypool.ops.histogram import SECONDS_OF_WAIT, Histogram

LOOK_SECONDS = 0.25
"""Seconds between two looks at all partitions while acquires wait, in case a message was lost."""
SERVED_AT_ONCE = 64
_ANNOUNCE_SECONDS = 1.0  # between two announcements of the same number of waiters
_ANNOUNCEMENT_LASTS = 3.0  # seconds, after which an announcement lapses

_log = logging.getLogger("keypool.valkey")


class Waiters:
    """See the module. `server` is this server's name in Valkey."""

    def __init__(
        self,
        partitions: Partitions,
        sampler: PartitionSampler,
        poller: PartitionPoller,
        server: str,
        max_waiters: int,
    ) -> None:
        self.seconds = Histogram(SECONDS_OF_WAIT)
        self.announced = 0
        """How many waiters this server has announced to the partitions."""
        self._partitions = partitions
        self._sampler = sampler
        self._poller = poller
        self._server = server
        self._max_waiters = max_waiters
        self._loop = asyncio.get_running_loop()
        self._waiters: OrderedDict[Waiter, None] = OrderedDict()
        self._last_chances: dict[Waiter, None] = {}
        """The waiters whose time is up: they leave unless the next look at all partitions finds a key for them."""
        self._serving: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._announced_at = 0.0
        self._draining = False
        partitions.client.on_recovery = self._wake.set
        partitions.client.on_available = self._keys_available

    def __len__(self) -> int:
        return len(self._waiters)

    async def wait(self, owner: str | None, seconds: float, timed: Timed | None = None) -> Lease | None:
        """Queue for up to `seconds`; None if no key came. With 0, for one look at all partitions, whoever is ahead.

        Raises Draining, TooManyWaiters and StorageUnavailable. O(1), besides the look.
        """
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

    def oldest(self) -> float:
        """Seconds that the first in the queue has waited, 0 if nobody waits. O(1)."""
        first = next(iter(self._waiters), None)
        return 0.0 if first is None else self._loop.time() - first.since

    def key_freed(self, partition: int, server: str) -> None:
        """Handle a message that keys were freed in a partition, for the named server or any ("*")."""
        if server not in (self._server, "*"):
            return
        if self._waiters:
            self._partitions.available[partition] = max(1, self._partitions.available[partition])
            self._wake.set()
        elif server == self._server:
            self._partitions.call(partition, "wait", (self._server, 0, 0))  # offer them to another server

    def _keys_available(self) -> None:
        """Serve waiters, as a reply reported available keys; but not if servers compete for them by messages."""
        if self._waiters and not self._poller.waiting_elsewhere:
            self._wake.set()

    def drain(self) -> None:
        """Raise Draining in all waiters, and accept none from now on."""
        self._draining = True
        for waiter in list(self._waiters):
            self._leave(waiter, Draining())

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
        self._last_chances[waiter] = None
        self._wake.set()

    def _remove(self, waiter: Waiter) -> None:
        self._waiters.pop(waiter, None)
        self._last_chances.pop(waiter, None)
        if waiter.timer is not None:
            waiter.timer.cancel()
            waiter.timer = None

    def _leave(self, waiter: Waiter, outcome: Lease | Exception | None) -> None:
        """Take a waiter out of the queue, and give it its outcome."""
        self._remove(waiter)
        if waiter.served.done():
            return
        if isinstance(outcome, Exception):
            waiter.served.set_exception(outcome)
        else:
            waiter.served.set_result(outcome)

    def _abandon(self, waiter: Waiter) -> None:
        """Remove a waiter whose caller hung up. If it has just been served, give its lease back."""
        if waiter in self._waiters:
            self._remove(waiter)
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
                    await self._announce(len(self._waiters))
                    looked_at = self._loop.time()
                served = await self._serve(everywhere)
            except Exception as error:
                if not isinstance(error, StorageUnavailable):
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
        leaving = list(self._last_chances)  # taken before the look, as it doesn't cover those who come later
        done = await self._sampler.take_in_order([waiter.owner for waiter in first], everywhere)
        for waiter, outcome in zip(first, done, strict=False):
            if waiter in self._waiters:
                self._leave(waiter, outcome)
            elif isinstance(outcome, Lease):  # it hung up: the next one gets a lease of its own
                self._sampler.give_back(outcome)
        if everywhere and len(done) < len(first):
            for waiter in leaving:
                if waiter in self._waiters:
                    self._leave(waiter, None)
        return bool(done)
