"""Looking at all partitions: for the counts, for events, and to sweep what is overdue.

A look sweeps: its script deals with what is overdue before it answers, and says when the next deadline comes,
for which a timer is set. So a server keeps every deadline on time, also those that others have set, since
it looks at each partition before any deadline set meanwhile can have come.

Of many servers one sweeps a partition, whichever looked first (lua/look.lua). Another one stands in for it: it
looks a little after each deadline, so that a release is on time also when the first one dies, and takes its
place when that has not looked for a while. All others look once a second, for the counts and events.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Coroutine, Sequence
from typing import Any

from keypool.core.errors import StorageUnavailable
from keypool.core.rules import PoolRules
from keypool.engine.valkey.link import Reply
from keypool.engine.valkey.look import Look, Told, events_in, until_due
from keypool.engine.valkey.partitions import Partitions, all_of
from keypool.ops.histogram import SECONDS, Tally

RECENT_EVENTS = 1000
EXPIRING = 60.0
"""Seconds ahead in which a look counts expiries, if nobody asks for others."""
LATEST_LOOK = 1.0
"""Seconds after which a partition is looked at again, whatever is due."""

_TURN_SECONDS = 2.5  # without a look, after which another server takes the place of one that sweeps
_STAND_IN_AFTER = 0.03  # seconds after a deadline at which it is swept if the server that sweeps didn't
_EARLIEST_LOOK = 0.01  # seconds between two sweeps of one partition
_MARGIN = 0.002  # seconds after a deadline at which it is swept
_SWEPT = 64  # keys of each kind and partition that one sweep deals with
_log = logging.getLogger("keypool.valkey")


class Looks:
    """See the module. `shortest` is the shortest time that a deadline can be set ahead."""

    def __init__(self, partitions: Partitions, server: str, rules: PoolRules) -> None:
        self._partitions = partitions
        self._server = server
        shortest = min(rules.block_seconds, rules.keepalive_seconds)
        self._latest = min(LATEST_LOOK, max(0.02, shortest / 2))
        self._loop = asyncio.get_running_loop()
        count = partitions.count
        self.totals = [rules.max_keys] * count
        """How many keys each has at most, but for what other servers made since the last look; `max_keys` until it
        has been asked."""
        self.totals_changed = 0
        """How many times."""
        self.id_number = partitions.facts.base_id - 1
        """Of the latest id that this server knows of."""
        self.elsewhere = 0
        """Acquires that wait at other servers."""
        self.refused = 0
        """Acquires refused here, and not told to the pool yet."""
        self.events: deque[Told] = deque(maxlen=RECENT_EVENTS)
        self.told = 0
        """Events that there had been at the last look."""
        self.last: tuple[float, Look] | None = None
        self.release_lateness = Tally(SECONDS)
        self.expiry_lateness = Tally(SECONDS)
        self._heard = [-1] * count
        self._askers: list[asyncio.Future[Look]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._looking = False
        self._looks = 0
        self._latest_look = [0] * count
        self._made = [0] * count  # keys that this server made
        self._due = [0.0] * count
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False

    def start(self) -> None:
        """Begin to sweep."""
        self._sweep()

    def stop(self) -> None:
        """Sweep no more."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()

    async def ended(self) -> None:
        """Wait until nothing is under way any more."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def made(self, partition: int, count: int) -> None:
        """This server made so many keys there."""
        self._made[partition] += count
        self.totals[partition] += count
        self.totals_changed += 1

    def look(self) -> asyncio.Future[Look]:
        """How all partitions stand, at a moment after this one. Who asks in the meantime shares it."""
        asker: asyncio.Future[Look] = self._loop.create_future()
        self._askers.append(asker)
        if not self._looking:
            self._looking = True
            self._start(self._look_for_askers())
        return asker

    async def _look_for_askers(self) -> None:
        while self._askers:
            askers, self._askers = self._askers, []
            try:
                look = await self._look_everywhere()
            except Exception as error:
                for asker in askers:
                    if not asker.done():
                        asker.set_exception(error)
                        asker.exception()  # whether or not somebody still waits for it
            else:
                for asker in askers:
                    if not asker.done():
                        asker.set_result(look)
        self._looking = False

    async def _look_everywhere(self) -> Look:
        refused, self.refused = self.refused, 0
        if refused:
            partition = random.randrange(self._partitions.count)  # noqa: S311 - no secret
            self._partitions.in_background(partition, "refuse", refused)
        look = Look()
        for partition, reply in enumerate(await self.at(range(self._partitions.count), EXPIRING)):
            look.add(partition, reply)
        self.last = self._loop.time(), look
        return look

    async def at(self, partitions: Sequence[int], expiring: float) -> list[Reply]:
        """What some partitions say, expiries counted so many seconds ahead. Raises StorageUnavailable."""
        ahead = round(expiring * 1e6)
        self._looks += 1
        number = self._looks
        turn = round(_TURN_SECONDS * 1e6)
        made = [self._made[partition] for partition in partitions]
        calls = [
            self._partitions.nodes.call(
                partition, "look", (self._server, self._heard[partition], ahead, _SWEPT, turn)
            )
            for partition in partitions
        ]
        replies = await all_of(calls)
        now = self._loop.time()
        events: list[Told] = []
        for partition, reply, before in zip(partitions, replies, made, strict=True):
            if number < self._latest_look[partition]:
                continue  # a later look was faster, as another node may be
            self._latest_look[partition] = number
            self._partitions.note(partition, reply[0])
            # What was made since it was asked may have been counted or not.
            total = reply[1] + self._made[partition] - before
            if total != self.totals[partition]:
                self.totals[partition] = total
                self.totals_changed += 1
            self.elsewhere = reply[2]
            self.id_number = max(self.id_number, reply[17])
            heard = self._heard[partition]
            if heard < reply[18]:
                events += events_in(reply)[heard - reply[18] :]
                self.told += reply[18] - max(heard, 0)
            # It may be less than it was, if a failover has lost the latest changes.
            self._heard[partition] = reply[18]
            for microseconds, tally in ((reply[6], self.expiry_lateness), (reply[7], self.release_lateness)):
                if microseconds >= 0:
                    tally.add(microseconds / 1e6)
            self._due[partition] = now + self._next_look(reply)
        events.sort(key=lambda told: told[0])
        self.events.extend(events)
        return replies

    def _next_look(self, reply: Reply) -> float:
        """Seconds after which the partition is to be looked at again."""
        left, turn = until_due(reply), reply[19]
        if left is None or turn == 2:
            return self._latest
        if turn == 1:
            return min(self._latest, left + _STAND_IN_AFTER)
        # At once if a crowd is overdue.
        return max(min(self._latest, left + _MARGIN), _EARLIEST_LOOK) if left else 0.0

    def _sweep(self) -> None:
        """Look at every partition that has something due, and come again when the next has."""
        now = self._loop.time()
        due = [partition for partition in range(self._partitions.count) if self._due[partition] <= now]
        if due:
            self._start(self._sweep_some(due))
        else:
            self._come_again()

    async def _sweep_some(self, partitions: Sequence[int]) -> None:
        for partition in partitions:
            self._due[partition] = 0.0
        try:
            await self.at(partitions, EXPIRING)
        except Exception as error:
            if isinstance(error, StorageUnavailable):
                _log.debug("could not sweep: %s", error.detail)
            else:
                _log.exception("could not sweep")
            again = self._loop.time() + LATEST_LOOK / 4
            for partition in partitions:
                self._due[partition] = max(self._due[partition], again)
        self._come_again()

    def _come_again(self) -> None:
        if not self._stopped:
            self._timer = self._loop.call_at(min(self._due), self._sweep)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
