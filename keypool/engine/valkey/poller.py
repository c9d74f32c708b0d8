"""Polling all partitions: for the counts, for events, and to sweep what is overdue.

A poll sweeps: its script (lua/poll.lua) processes what is overdue, then reports the next deadline, for which a timer is
set. Deadlines that other servers set are met, too: a partition is polled again before any deadline that was set after
the last poll can have passed.

Of several servers, one sweeps a partition: the one that polled it first. A second one stands in for it: it polls a
little after each deadline, so that releases are on time even if the first one dies, and takes its place if that has not
polled for 2.5 s. All others poll twice a second, for counts and events.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Coroutine, Sequence
from math import inf
from typing import Any, NamedTuple

import msgspec

from keypool.core.counters import COUNTERS
from keypool.core.errors import StorageUnavailable
from keypool.core.events import SILENT, By, Change, Event
from keypool.core.keys import moment
from keypool.engine.valkey.calls import all_of
from keypool.engine.valkey.partitions import Partitions
from keypool.ops.histogram import SECONDS, Histogram

RECENT_EVENTS = 1000
EXPIRING = 60.0
"""Seconds ahead in which a snapshot counts expiries."""
POLL_SECONDS = 0.5
"""Seconds after which a partition is polled again, even if nothing is due."""
QUIET_SECONDS = 2.0
"""The same for a pool beside `default` in which nothing happens: a hundred of them should cost little."""

_EVENT_COUNTERS = tuple(
    "quarantines" if change is Change.QUARANTINED else change.value
    for change in Change
    if change not in SILENT
)
_ODD = "odd"
_POLLED_COUNTERS = (*_EVENT_COUNTERS, *(name for name in COUNTERS if name not in _EVENT_COUNTERS), _ODD)
_STANDS_IN = 1  # the turn of poll.lua's reply between 0, sweeps, and 2, neither
_TURN_SECONDS = 2.5  # without a poll after which another server takes a sweeper's place
_STAND_IN_AFTER = 0.03  # seconds after a deadline at which the stand-in polls
_MIN_INTERVAL = 0.01  # seconds between two sweeps of one partition
_AFTER_DEADLINE = 0.002  # seconds after a deadline at which it is swept
_MAX_SWEPT = 64  # keys of each kind and partition that one sweep processes
_log = logging.getLogger("keypool.valkey")

_decode_event = msgspec.msgpack.Decoder(list[Any]).decode


class PartitionStatus(NamedTuple):
    """A partition's reply to lua/poll.lua. Durations are in microseconds, -1 if there is no such key."""

    available: int
    total: int
    cooling: int
    quarantined: int
    waiting_elsewhere: int
    expiring: int
    next_expiry: int
    next_release: int
    """To the next end of a block or a cooldown."""
    expiry_lateness: int
    release_lateness: int
    last_id: int
    event_seq: int
    """How many events there have been. Can decrease: a failover may lose the latest changes."""
    further: int
    """Seats beyond the first one of each secret."""
    further_quarantined: int
    turn: int
    counters: list[int]
    events: list[bytes]
    past: int
    """Leases that have ended and are kept."""

    @property
    def overdue(self) -> bool:
        """Whether more keys are overdue than the poll processed."""
        return 0 in (self.next_expiry, self.next_release)

    @property
    def next_deadline(self) -> float | None:
        """Seconds until the next deadline; None without one."""
        ahead = [deadline for deadline in (self.next_expiry, self.next_release) if deadline >= 0]
        return min(ahead) / 1e6 if ahead else None


class PoolSnapshot(NamedTuple):
    """The sum over all partitions."""

    taken_at: float
    total: int
    available: int
    cooling: int
    quarantined: int
    waiting_elsewhere: int
    expiring: int
    counters: dict[str, int]
    next_release: float | None
    """By the loop's clock, like `taken_at`; None if no key is blocked or cooling."""
    overdue: bool

    @property
    def blocked(self) -> int:
        """Keys that are blocked."""
        return self.total - self.available - self.cooling - self.quarantined

    @classmethod
    def of(cls, statuses: Sequence[PartitionStatus], taken_at: float) -> PoolSnapshot:
        """Sum up the statuses of all partitions."""
        releases = [status.next_release for status in statuses if status.next_release >= 0]
        counters = map(sum, zip(*(status.counters for status in statuses), strict=True))
        sums = dict(zip(_POLLED_COUNTERS, counters, strict=True))
        return cls(
            taken_at,
            sum(status.total for status in statuses),
            sum(status.available for status in statuses),
            sum(status.cooling for status in statuses),
            sum(status.quarantined for status in statuses),
            statuses[0].waiting_elsewhere,  # announced to every partition alike
            sum(status.expiring for status in statuses),
            {name: sums[name] for name in COUNTERS},
            taken_at + min(releases) / 1e6 if releases else None,
            any(status.overdue for status in statuses),
        )


class PartitionPoller:
    """See the module. `server` is this server's name in Valkey."""

    def __init__(self, partitions: Partitions, server: str, quiet_seconds: float = POLL_SECONDS) -> None:
        self._partitions = partitions
        self._quiet_seconds = quiet_seconds
        self._server = server
        self.set_interval()
        self._loop = asyncio.get_running_loop()
        count = partitions.count
        self.totals = [partitions.rules.max_keys] * count
        """Each partition's keys, at most; except for those that other servers generated since the last poll."""
        self.totals_version = 0
        """Incremented when `totals` change."""
        self.statuses: list[PartitionStatus | None] = [None] * count
        """Each partition's latest reply."""
        self.quarantined = [0] * count
        """Each partition's quarantined secrets, as far as this server knows."""
        self._further = [0] * count
        self.id_number = partitions.facts.base_id - 1
        """The number (see engine.py) of the highest id that this server knows."""
        self.waiting_elsewhere = 0
        """Acquires that wait at other servers."""
        self.refused = 0
        """Acquires refused here that the pool has not counted yet."""
        self.event_seq = 0
        """How many events there had been at the last poll. Only grows."""
        self.last: PoolSnapshot | None = None
        self.release_lateness = Histogram(SECONDS)
        self.expiry_lateness = Histogram(SECONDS)
        self.polls = 0
        self._events: deque[bytes] = deque(maxlen=RECENT_EVENTS)  # decoded only where they are shown
        self._seen_seq = [-1] * count  # of each partition, the `event_seq` up to which events were reported
        self._callers: list[asyncio.Future[PoolSnapshot]] = []
        self._snapshotting = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._latest_poll = [0] * count  # number of the poll that each partition last replied to
        self._generated = [0] * count  # keys that this server generated, ever
        self._due = [0.0] * count  # when to poll each partition next
        self._expecting = [0.0] * count  # until when deadlines come there that this server set
        self._timer: asyncio.Handle | None = None
        self._timer_at = 0.0  # kept here, as a uvloop handle that is due at once has no `when`
        self._stopped = False

    def set_interval(self) -> None:
        """Poll as often as the rules require. O(1)."""
        rules = self._partitions.rules
        # At most half the shortest time that a deadline usually lies ahead, so that none is missed between two polls;
        # for others there is `expect`.
        usual = (
            rules.block_seconds,
            rules.keepalive_seconds or inf,
            rules.rest_seconds or inf,
        )
        longest = max(0.02, min(usual) / 2)
        self._interval, self._quiet_interval = min(POLL_SECONDS, longest), min(self._quiet_seconds, longest)

    def stop(self) -> None:
        """Stop sweeping. O(1)."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()

    async def join(self) -> None:
        """Wait for the polls that are under way."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def generated(self, partition: int, count: int) -> None:
        """Record that this server generated `count` keys in a partition."""
        self._generated[partition] += count
        self.totals[partition] += count
        self.totals_version += 1

    def expect(self, partition: int, seconds: float) -> None:
        """Poll a partition in time for a deadline that lies ahead by so much, which its sweeper may not know yet.

        O(1), O(partitions) if it is nearer than the next poll.
        """
        now = self._loop.time()
        if seconds < 2 * self._quiet_seconds:
            self._expecting[partition] = max(self._expecting[partition], now + seconds + _STAND_IN_AFTER)
            self._due[partition] = min(self._due[partition], now + seconds + _AFTER_DEADLINE)
            if self._timer is not None and self._timer_at > self._due[partition]:
                self._timer.cancel()
                self._set_timer()

    async def quarantined_and_totals(self) -> tuple[list[int], list[int]]:
        """How many quarantined secrets, and how many secrets in all, each partition has. O(partitions).

        As of the latest poll where it can't be reached.
        """
        unreachable = set(self._partitions.client.unreachable)
        with contextlib.suppress(StorageUnavailable):
            await self.poll([n for n in range(self._partitions.count) if n not in unreachable], EXPIRING)
        secrets = [total - further for total, further in zip(self.totals, self._further, strict=True)]
        return [*self.quarantined], secrets

    def recent(self, count: int, key_id: int | None) -> list[Event]:
        """The latest `count` events, oldest first; with `key_id`, of that key only. O(RECENT_EVENTS)."""
        found: list[Event] = []
        for packed in reversed(self._events):
            if len(found) >= count:
                break
            event = _event_of(_decode_event(packed))
            if key_id is None or event.id == key_id:
                found.append(event)
        return found[::-1]

    # -- polling

    def snapshot(self) -> asyncio.Future[PoolSnapshot]:
        """Poll all partitions. Callers during a poll share the next one. Raises StorageUnavailable."""
        caller: asyncio.Future[PoolSnapshot] = self._loop.create_future()
        self._callers.append(caller)
        if not self._snapshotting:
            self._snapshotting = True
            self._start(self._serve_callers())
        return caller

    async def _serve_callers(self) -> None:
        while self._callers:
            callers, self._callers = self._callers, []
            try:
                snapshot = await self._snapshot()
            except Exception as error:
                for caller in callers:
                    if not caller.done():
                        caller.set_exception(error)
                        caller.exception()  # or asyncio would log it where nobody awaits it
            else:
                for caller in callers:
                    if not caller.done():
                        caller.set_result(snapshot)
        self._snapshotting = False

    async def _snapshot(self) -> PoolSnapshot:
        refused, self.refused = self.refused, 0
        if refused:
            partition = random.randrange(self._partitions.count)  # noqa: S311 - no secret
            self._partitions.call(partition, "refuse", (refused,))
        statuses = await self.poll(range(self._partitions.count), EXPIRING)
        self.last = PoolSnapshot.of(statuses, self._loop.time())
        return self.last

    async def poll(self, partitions: Sequence[int], expiring: float) -> list[PartitionStatus]:
        """Poll some partitions, counting the keys that expire within `expiring` seconds. Raises StorageUnavailable."""
        self.polls += 1
        number = self.polls
        generated = [self._generated[partition] for partition in partitions]
        fixed = (round(expiring * 1e6), _MAX_SWEPT, round(_TURN_SECONDS * 1e6), len(_EVENT_COUNTERS))
        calls = [
            self._partitions.call(
                partition, "poll", (self._server, self._seen_seq[partition], *fixed, *_POLLED_COUNTERS)
            )
            for partition in partitions
        ]
        statuses = [PartitionStatus(*reply) for reply in await all_of(calls)]
        events: list[bytes] = []
        for partition, status, before in zip(partitions, statuses, generated, strict=True):
            if number > self._latest_poll[partition]:  # else a later poll was answered first
                self._latest_poll[partition] = number
                # Keys generated here since the poll was sent may be missing in its total, an upper bound: add them.
                self._update(partition, status, status.total + self._generated[partition] - before)
                events += self._new_events(partition, status)
        events.sort(key=_moment_of)
        self._events.extend(events)
        return statuses

    def _update(self, partition: int, status: PartitionStatus, total: int) -> None:
        if total != self.totals[partition]:
            self.totals[partition] = total
            self.totals_version += 1
        before, self.statuses[partition] = self.statuses[partition], status
        quiet = before is not None and before.event_seq == status.event_seq
        self.quarantined[partition] = status.quarantined - status.further_quarantined
        self._further[partition] = status.further
        if status.counters[-1]:
            self._partitions.has_odd_texts = True
        self.waiting_elsewhere = status.waiting_elsewhere
        self.id_number = max(self.id_number, status.last_id)
        if status.expiry_lateness >= 0:
            self.expiry_lateness.add(status.expiry_lateness / 1e6)
        if status.release_lateness >= 0:
            self.release_lateness.add(status.release_lateness / 1e6)
        interval = self._quiet_interval if quiet else self._interval
        self._due[partition] = self._loop.time() + self._until_next_poll(partition, status, interval)

    def _new_events(self, partition: int, status: PartitionStatus) -> list[bytes]:
        """The events that no other poll has reported, as several may be under way at a time."""
        seen, self._seen_seq[partition] = self._seen_seq[partition], status.event_seq
        if seen >= status.event_seq:
            return []
        self.event_seq += status.event_seq - max(seen, 0)
        return status.events[seen - status.event_seq :]

    # -- sweeping

    def _until_next_poll(self, partition: int, status: PartitionStatus, interval: float) -> float:
        """Seconds until the partition is to be polled again."""
        left = status.next_deadline
        expecting = self._expecting[partition] > self._loop.time()
        if left is None or (status.turn > _STANDS_IN and not expecting):
            return interval
        if status.turn == _STANDS_IN and not expecting:
            return min(interval, left + _STAND_IN_AFTER)
        # At once, if more keys are overdue than one sweep processes.
        return max(min(interval, left + _AFTER_DEADLINE), _MIN_INTERVAL) if left else 0.0

    def sweep(self) -> None:
        """Poll every partition that is due, then set a timer to do so again; from then on until `stop`."""
        now = self._loop.time()
        due = [partition for partition, at in enumerate(self._due) if at <= now]
        if due:
            self._start(self._sweep_some(due))
        else:
            self._set_timer()

    async def _sweep_some(self, partitions: Sequence[int]) -> None:
        for partition in partitions:
            self._due[partition] = 0.0
        try:
            await self.poll(partitions, EXPIRING)
        except Exception as error:
            if isinstance(error, StorageUnavailable):
                _log.debug("could not sweep: %s", error.detail)
            else:
                _log.exception("could not sweep")
            retry_at = self._loop.time() + POLL_SECONDS / 2
            for partition in partitions:
                self._due[partition] = max(self._due[partition], retry_at)
        self._set_timer()

    def _set_timer(self) -> None:
        if not self._stopped:
            self._timer_at = min(self._due)
            self._timer = self._loop.call_at(self._timer_at, self.sweep)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _event_of(parts: list[Any]) -> Event:
    """The event of what common.lua adds. Layout 1 had no origin in it."""
    change, id, start, end, owner, lease, *origin, at = parts
    change = Change(change)
    if origin:
        by, _, actor = origin[0].partition(" ")
    else:
        by, actor = (By.DEADLINE if change in (Change.RELEASED, Change.EXPIRED) else By.HOLDER), ""
    hint = f"{start}…{end}" if end is not False else start  # of a sealed text it is there as a whole
    return Event(change, id, hint, owner or None, lease or None, moment(at / 1e6), By(by), actor or None)


def _moment_of(event: bytes) -> bytes:
    return event[-8:]  # a big-endian number, so it sorts as bytes
