"""The engine whose pool is in this process: pool.py's rules, their timers, and the queue of pending acquires.

The pool reports every change to `_changed`, which hands the key to the journal and records the event. A call answers
only when everything that its answer says is in the journal. Only `page` and `stats` may be ahead of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import NoReturn, TypeVar

from tornado.ioloop import IOLoop

from keypool import __version__
from keypool.core.answers import (
    EndedLease,
    Extended,
    Extension,
    GeneratedKey,
    Identity,
    KeptAlive,
    Lease,
    Page,
    Ref,
    Revealed,
    Row,
    Stats,
    Unblock,
    Unblocked,
)
from keypool.core.counters import COUNTERS
from keypool.core.cursor import ListQuery, encode, page_query
from keypool.core.errors import (
    BlockLimit,
    Draining,
    LeaseOver,
    NoKeyAvailable,
    PoolDraining,
    PoolError,
    StaleLease,
    StorageUnavailable,
    UnknownKey,
)
from keypool.core.events import HOLDER, SILENT, Change, Event, Happened, Origin, latest
from keypool.core.handles import SECRET_BYTES, Handle, Handles
from keypool.core.keys import Key, State, moment, random_text
from keypool.core.outcomes import NO_HISTORY, Report
from keypool.core.pool import Pool
from keypool.core.rules import DEFAULT_POOL, DEFAULT_RULES, PoolRules
from keypool.engine import NOTE, Attempt, Timed
from keypool.engine.clock import make_clock
from keypool.engine.journal import Journal, NullJournal
from keypool.engine.timers import Timers
from keypool.engine.waiters import Request, Waiters
from keypool.ops.histogram import SECONDS, Histogram

RECENT_EVENTS = 1000
# Globals, because in Python 3.11 each look-up of an enum's member by name costs a tenth of a microsecond.
_AVAILABLE, _BLOCKED, _COOLING, _QUARANTINED = State
_ACQUIRED, _READY = Change.ACQUIRED, Change.READY
_MAKES_AVAILABLE = frozenset(
    {Change.UNBLOCKED, Change.RELEASED, Change.GENERATED, Change.READY, Change.RESTORED}
)
_WORDS = {UnknownKey: "unknown", StaleLease: "stale", LeaseOver: "over", BlockLimit: "limit"}

Item = TypeVar("Item")
Result = TypeVar("Result")

_GRACES_PER_TURN = 500  # keys that get their grace in one turn of the loop: about 2 ms
_SLICE_SECONDS = 0.00008  # that a batch runs before the loop serves other callers
_NEGLIGIBLE_DELAY = 0.005  # seconds by which a release may be early


class EmbeddedEngine:
    """See the module, and the Engine protocol for the calls. It may be used on one IOLoop and its thread only.

    The pool is in memory only until a journal is set, for which the pool must have been restored. Without
    `start_timers`, no timer fires before `start`.
    """

    name = "embedded"
    degraded = None  # the pool is served completely or not at all
    clock_steps = 0  # deadlines follow the monotonic clock

    def __init__(
        self,
        rules: PoolRules = DEFAULT_RULES,
        *,
        start_timers: bool = True,
        loop: IOLoop | None = None,
        clock: Callable[[], float] | None = None,
        new_text: Callable[[], str] | None = None,
        pool_name: str = DEFAULT_POOL,
    ) -> None:
        self.pool_name = pool_name
        self.pool_draining = False
        self.now = clock or make_clock()
        self.timers = Timers(loop or IOLoop.current(), self.now, self._process_due)
        self.rules = rules
        self.handles = Handles(secrets.token_bytes(SECRET_BYTES))
        self.pool = Pool(
            rules,
            new_text=new_text or (lambda: random_text(self.rules.key_length)),
            random=random.Random().random,  # noqa: S311 - which available key is served isn't secret
            on_change=self._changed,
            on_opened=self.timers.opened,
            on_closed=self.timers.closed,
        )
        self.journal: Journal = NullJournal()
        self.release_lateness = Histogram(SECONDS)
        self.expiry_lateness = Histogram(SECONDS)
        self.events: deque[Happened] = deque(maxlen=RECENT_EVENTS)
        self._notes: dict[str, int] = {}
        self._loop = asyncio.get_running_loop()
        self._waiters = Waiters(
            self.pool,
            self.timers,
            self.now,
            rules.max_waiters,
            lease_of=self._lease,
            give_back=self._give_back,
            storage_up=self.storage_up,
        )
        self._started_at = self.now()
        self._draining = False
        self._reserved = 0  # keys that batches in progress will still generate
        self._uncounted = 0  # events that no counter has
        if start_timers:
            self.start()

    # -- the calls

    async def generate(self, count: int, origin: Origin = HOLDER) -> list[GeneratedKey]:
        """Generate keys, all or none. O(count · log n)."""
        self.journal.require()
        self._require_serving()
        if self.pool.total + self._reserved + count > self.rules.max_keys:
            await self.purge_expired()
            self._require_serving()
        now = self.now()
        made: list[GeneratedKey] = []
        moments: list[float] = []
        try:
            self.pool.require_room(self._reserved + count, now)
            self._reserved += count  # so that no other call takes this room between two slices
            try:
                until = now + _SLICE_SECONDS
                while len(made) < count:
                    made.append(self._generate(now, origin))
                    moments.append(now)
                    self._reserved -= 1
                    if (now := self.now()) > until:
                        until = await self._pause()
                        self._require_serving()  # if not, those that were made are purged with the others
                        now = self.now()
            finally:
                self._reserved -= count - len(made)
        finally:
            self._waiters.serve(now)
            await self._all_kept()
        for answer, at in zip(made, moments, strict=True):
            answer.expires_in = _less(answer.expires_in, self._delay(at))
        return made

    async def acquire(
        self,
        owner: str | None,
        wait: float,
        timed: Timed | None = None,
        block_seconds: float | None = None,
        attempt: Attempt | None = None,
    ) -> Lease:
        """Acquire a key, now or within `wait` seconds. O(log n)."""
        journal = self.journal
        journal.require()
        if attempt is not None and (held := await self._replay(attempt)):
            return held[0]
        if self.pool_draining:
            await self._refuse()
        digest = None if attempt is None else attempt.digest
        now = self.now()
        key = None if self._waiters.waiting else self.pool.acquire(now, owner, block_seconds, digest)
        if key is not None:
            lease = self._lease(key, now)
        else:
            lease = await self._take_or_wait(Request(owner, block_seconds, digest), wait, timed)
        if (commit := journal.commit_of(lease.id)) is not None:
            started = self.now()
            try:
                await commit
            except (GeneratorExit, asyncio.CancelledError):  # the caller hung up and never got this lease
                self._give_back(lease)
                raise
            _age(lease, self._delay(started))
        return lease

    async def acquire_many(
        self,
        owner: str | None,
        count: int,
        block_seconds: float | None = None,
        attempt: Attempt | None = None,
    ) -> list[Lease]:
        """Acquire up to `count` keys. O(count · log n)."""
        self.journal.require()
        if attempt is not None and (held := await self._replay(attempt)):
            return held
        request = Request(owner, block_seconds, None if attempt is None else attempt.digest)
        leases: list[Lease] = []
        moments: list[float] = []
        until = self.now() + _SLICE_SECONDS
        try:
            while len(leases) < count and (lease := await self._take(request)) is not None:
                leases.append(lease)
                moments.append(now := self.now())
                if now > until:
                    until = await self._pause()
            if not leases:
                await self._refuse()
            await self._all_kept()
        except (GeneratorExit, asyncio.CancelledError):  # the caller hung up and never got these leases
            for lease in leases:
                self._give_back(lease)
            raise
        for lease, at in zip(leases, moments, strict=True):
            _age(lease, self._delay(at))
        return leases

    async def _replay(self, attempt: Attempt) -> list[Lease]:
        """The leases of this attempt that are still held."""
        now = self.now()
        keys = self.pool.leases_of(attempt.digest, now)
        if not keys:
            return []
        await self._all_kept()
        now = self.now()
        leases = [self._lease(key, now) for key in keys if key.attempt == attempt.digest]
        attempt.replayed = bool(leases)
        return leases

    async def unblock(
        self,
        ref: Ref,
        lease: int | None,
        ended: list[EndedLease] | None = None,
        report: Report | None = None,
        origin: Origin = HOLDER,
    ) -> Unblocked:
        """Make a key available again, or what the report asks for. O(log n)."""
        self.journal.require()
        now = self.now()
        key = self._find(ref, now) or await self._raise_missing(ref)
        try:
            answer = self._unblock(key, lease, now, ended=ended, report=report, origin=origin)
        finally:
            if (commit := self.journal.commit_of(key.id)) is not None:
                await commit
        if answer.available_in is not None:
            answer.available_in = _less(answer.available_in, self._delay(now))
        return answer

    async def unblock_many(
        self, items: Sequence[Unblock], ended: list[EndedLease] | None = None, origin: Origin = HOLDER
    ) -> list[str]:
        """Make keys available again, one by one. O(items · log n)."""

        def unblock(item: Unblock, now: float) -> str:
            by = origin if item.lease is None else HOLDER
            return self._tried(
                item.ref,
                now,
                lambda key: self._unblock(key, item.lease, now, ended=ended, report=item.report, origin=by),
            )

        return await self._in_slices(items, unblock)

    async def extend(self, ref: Ref, lease: int, seconds: float | None) -> Extended:
        """Let a lease end later. O(1)."""
        self.journal.require()
        now = self.now()
        key = self._find(ref, now) or await self._raise_missing(ref)
        try:
            self.pool.extend(key, lease, seconds, now)
            assert key.release_deadline is not None  # it is blocked
            left = key.acquired_at + self.rules.longest_block - now
            answer = Extended(key.id, key.lease, _seconds(key.release_deadline - now), _seconds(left))
        finally:
            if (commit := self.journal.commit_of(key.id)) is not None:
                await commit
        delay = self._delay(now)
        answer.release_in = _less(answer.release_in, delay)
        answer.block_left = _less(answer.block_left, delay)
        return answer

    async def extend_many(self, items: Sequence[Extension]) -> list[str]:
        """Let leases end later, one by one. O(items)."""

        def extend(item: Extension, now: float) -> str:
            return self._tried(
                item.ref, now, lambda key: self.pool.extend(key, item.lease, item.seconds, now)
            )

        return await self._in_slices(items, extend)

    async def quarantine(self, ref: Ref, reason: str | None, now: bool, origin: Origin) -> Row:
        """Take a key out of service. O(log n)."""
        self.journal.require()
        key = self._find(ref, self.now()) or await self._raise_missing(ref)
        self.pool.quarantine(key, reason, now, self.now(), origin)
        return await self._kept_row(key)

    async def quarantine_many(
        self, refs: Sequence[Ref], reason: str | None, now: bool, origin: Origin
    ) -> list[str]:
        """Take keys out of service, one by one. O(items · log n)."""

        def quarantine(ref: Ref, moment: float) -> str:
            return self._tried(
                ref, moment, lambda key: self.pool.quarantine(key, reason, now, moment, origin)
            )

        return await self._in_slices(refs, quarantine)

    async def restore(self, ref: Ref, origin: Origin) -> Row:
        """Make a cooling or quarantined key available. O(log n)."""
        self.journal.require()
        key = self._find(ref, self.now()) or await self._raise_missing(ref)
        self.pool.restore(key, origin)
        return await self._kept_row(key)

    async def restore_many(self, refs: Sequence[Ref], origin: Origin) -> list[str]:
        """Make cooling and quarantined keys available, one by one. O(items · log n)."""

        def restore(ref: Ref, now: float) -> str:
            return self._tried(ref, now, lambda key: self.pool.restore(key, origin))

        return await self._in_slices(refs, restore)

    async def keepalive(self, ref: Ref) -> KeptAlive:
        """Postpone the expiry of a key. O(log n)."""
        self.journal.require()
        now = self.now()
        key = self._find(ref, now) or await self._raise_missing(ref)
        self.pool.keepalive(key, now)
        answer = KeptAlive(key.id, _seconds(key.expires_deadline - now))
        if self._waiters.waiting:
            self._waiters.serve(now)
        if (commit := self.journal.commit_of(key.id)) is not None:
            await commit
            answer.expires_in = _less(answer.expires_in, self._delay(now))
        return answer

    async def keepalive_many(self, refs: Sequence[Ref]) -> list[str]:
        """Postpone the expiry of keys, one by one. O(items · log n)."""

        def keepalive(ref: Ref, now: float) -> str:
            return self._tried(ref, now, lambda key: self.pool.keepalive(key, now))

        return await self._in_slices(refs, keepalive)

    async def delete(self, ref: Ref, origin: Origin = HOLDER) -> Identity:
        """Purge a key. O(log n)."""
        self.journal.require()
        key = self._find(ref, self.now()) or await self._raise_missing(ref)
        self.pool.delete(key, origin)
        if (commit := self.journal.commit_of(key.id)) is not None:
            await commit
        return Identity(key.id, key.hint)

    async def delete_many(self, refs: Sequence[Ref], origin: Origin = HOLDER) -> list[Identity | str]:
        """Purge keys, one by one. O(items · log n)."""

        def delete(ref: Ref, now: float) -> Identity | str:
            key = self._find(ref, now)
            if key is None:
                return _WORDS[type(self._missing(ref, now))]
            self.pool.delete(key, origin)
            return Identity(key.id, key.hint)

        return await self._in_slices(refs, delete)

    async def get(self, ref: Ref) -> Row:
        """The row of a key. O(1)."""
        return await self._kept_row(self._find(ref, self.now()) or await self._raise_missing(ref))

    async def _kept_row(self, key: Key) -> Row:
        """The row of a live key, as soon as it is on disk."""
        now = self.now()
        row = self._row(key, now)
        self._waiters.serve(now)
        if (commit := self.journal.commit_of(key.id)) is not None:
            await commit
            _age(row, self._delay(now))
        return row

    async def reveal(self, ref: Ref, origin: Origin = HOLDER) -> Revealed:
        """The text of a key; the call is recorded as an event. O(1)."""
        now = self.now()
        key = self._find(ref, now) or await self._raise_missing(ref)
        revealed = Revealed(key.id, key.text)
        self.events.append((Change.REVEALED, key, key.owner, key.lease, now, origin))
        self._uncounted += 1
        self._waiters.serve(now)
        if (commit := self.journal.commit_of(key.id)) is not None:
            await commit
        return revealed

    async def page(self, query: ListQuery) -> Page:
        """A page of rows. O(log n + page). May be ahead of the disk by the commit in flight."""
        now = self.now()
        asked = page_query(query)
        found = self.pool.page(asked, now)
        cursor = None if found.next is None else encode(asked, found.next)
        page = Page([self._row(key, now) for key in found.keys], cursor)
        self._waiters.serve(now)  # with blocks that were found overdue
        return page

    async def stats(self) -> Stats:
        """All counts. O(1). May be ahead of the disk by the commit in flight."""
        pool = self.pool
        return Stats(
            total=pool.total,
            available=pool.available,
            blocked=pool.blocked,
            cooling=pool.cooling,
            quarantined=pool.quarantined,
            waiting=self.waiting,
            **pool.counters.by_name(),
            uptime=_seconds(self.now() - self._started_at),
            engine=self.name,
            version=__version__,
        )

    async def notes(self) -> Mapping[str, int]:
        """The notes of `keep_notes`. O(1)."""
        return self._notes

    async def keep_notes(self, notes: Mapping[str, int | None]) -> None:
        """Store notes with the pool's numbers. O(notes)."""
        for name, value in notes.items():
            if value is None:
                self._notes.pop(name, None)
            else:
                self._notes[name] = value
        if (commit := self.journal.note(notes)) is not None:
            await commit

    async def expiring(self, seconds: float) -> int:
        """Keys that expire within `seconds`. O(seconds)."""
        return self.pool.expiring(self.now() + seconds)

    @property
    def event_seq(self) -> int:
        """How many events there have been. O(1): it is derived from the counters, so that changes needn't count it."""
        return self.pool.counters.changes + self._uncounted

    def recent(self, count: int, key_id: int | None = None) -> list[Event]:
        """The latest `count` events, oldest first. O(count), O(RECENT_EVENTS) for one key."""
        return latest(self.events, count, key_id)

    def ready(self) -> None:
        """Raise Draining once the server stops, StorageUnavailable while the journal can't write."""
        if self._draining:
            raise Draining
        self.journal.require()

    def storage_up(self) -> bool:
        """Whether the journal can keep changes. O(1)."""
        return self.journal.failing is None

    def oldest_wait(self) -> float:
        """Seconds that the first in the queue has waited, 0 if the queue is empty. O(1)."""
        return self._waiters.oldest_wait()

    def histograms(self) -> dict[str, Histogram]:
        """All histograms by metric name. O(1)."""
        return {
            "acquire_wait_seconds": self._waiters.wait_seconds,
            "release_lateness_seconds": self.release_lateness,
            "expiry_lateness_seconds": self.expiry_lateness,
            **self.journal.histograms(),
        }

    def figures(self) -> dict[str, float]:
        """The number of commits, and seconds and rows of the last one, for the dashboard. O(1)."""
        histograms = self.journal.histograms()
        if not histograms:
            return {}
        seconds, rows = histograms["commit_seconds"], histograms["commit_rows"]
        return {"commits": seconds.count, "commit_seconds": round(seconds.last, 6), "commit_rows": rows.last}

    def measures(self) -> Mapping[str, float | Mapping[str, float]]:
        """The journal's other metrics by full name. O(1)."""
        return self.journal.measures()

    def drain(self) -> None:
        """Answer all waiters with Draining, and admit no more. O(waiters)."""
        self._draining = True
        self._waiters.drain(Draining)

    async def close(self) -> None:
        """Stop the timers, and commit all changes. Raises StorageUnavailable if they can't be committed."""
        self.timers.close()
        await self.journal.close()

    # -- what EmbeddedPools calls

    def sibling(
        self, name: str, number: int, rules: PoolRules, *, start_timers: bool = True
    ) -> EmbeddedEngine:
        """An engine for another pool of the same server, empty and without a journal. O(1)."""
        engine = EmbeddedEngine(
            rules, start_timers=start_timers, loop=self.timers.loop, clock=self.now, pool_name=name
        )
        engine.handles = self.handles.of_pool(number)
        return engine

    def set_rules(self, rules: PoolRules) -> None:
        """Apply these rules to whatever comes from now on. O(1)."""
        self.rules = self.pool.rules = rules

    def drain_pool(self) -> None:
        """Serve and take no key any more: PoolDraining, to the waiters as well. O(waiters)."""
        self.pool_draining = True
        self._waiters.drain(PoolDraining)

    async def purge_expired(self) -> None:
        """Purge the keys that have expired, so that counts are exact. O(their number), in slices."""
        while self.pool.overdue(now := self.now()):
            self.pool.process_due(now)
            if self.pool.overdue(now):
                await self._next_turn()

    @property
    def waiting(self) -> int:
        """How many acquires wait in this pool. O(1)."""
        return len(self._waiters.queue)

    def _require_serving(self) -> None:
        if self.pool_draining:
            raise PoolDraining

    # -- steps of the calls

    def _generate(self, now: float, origin: Origin) -> GeneratedKey:
        key = self.pool.generate(now, origin)
        made = GeneratedKey(key.id, key.text, _AVAILABLE, _seconds(key.expires_deadline - now))
        self._waiters.serve(now)
        return made

    async def _take_or_wait(self, request: Request, wait: float, timed: Timed | None) -> Lease:
        """Acquire a key that may become available within `wait` seconds. Raises NoKeyAvailable."""
        lease = await self._take(request)
        if lease is None and wait > 0:
            lease = await self._waiters.wait(request, wait, timed)
        return lease or await self._refuse()

    async def _take(self, request: Request) -> Lease | None:
        """Acquire an available key, if the waiters in the queue have left one."""
        while True:
            now = self.now()
            if self._waiters.waiting:  # a block may have run out whose timer is late
                self.pool.process_due(now)
                self._waiters.serve(now)
            if self.pool_draining:
                return None
            key = None if self._waiters.waiting else self.pool.acquire(now, *request)
            if key is not None:
                return self._lease(key, now)
            if not self.pool.may_have_more(now):
                return None
            if self.pool.expiry_suspended:
                raise self.journal.unknown_outcome()  # the keys that are left will get a grace or be purged
            await self._next_turn()  # a backlog of due keys may hide an available one
            self.journal.require()

    def _unblock(
        self,
        key: Key,
        lease: int | None,
        now: float,
        *,
        ended: list[EndedLease] | None = None,
        report: Report | None = None,
        origin: Origin = HOLDER,
    ) -> Unblocked:
        """End a lease and take its report. Adds to `ended` a lease that was ended without its number."""
        changed, guarded = self.pool.unblock(key, lease, now, report, origin)
        if changed and lease is None and ended is not None:
            ended.append(EndedLease(key.id, key.hint, key.lease))
        available_in = None
        if key.release_deadline is not None:  # then it isn't blocked any more, so it cools
            available_in = _seconds(key.release_deadline - now)
        answer = Unblocked(key.id, key.state, changed, available_in, guarded)
        if self._waiters.waiting:  # one of them may get the key
            self._waiters.serve(now)
        return answer

    def _find(self, ref: Ref, now: float) -> Key | None:
        """The live key, or None. This may release the key, so waiters must be served after it.

        None too for a handle of an older lease: `_missing` tells the two apart. Raises StorageUnavailable if the key
        has expired while expiry is suspended.
        """
        try:
            if isinstance(ref, str):
                return self.pool.find(ref, now)
            if isinstance(ref, int):
                return self.pool.find_id(ref, now)
            key = self.pool.find_id(ref.id, now)
        except UnknownKey:
            if self.pool.is_suspended(ref.id if isinstance(ref, Handle) else ref):
                raise self.journal.unknown_outcome() from None
            return None
        return key if key.lease == ref.lease else None

    def _missing(self, ref: Ref, now: float) -> UnknownKey | StaleLease:
        """The error about a key that `_find` didn't find."""
        if isinstance(ref, Handle):
            with contextlib.suppress(UnknownKey):
                return StaleLease(ref.lease, self.pool.find_id(ref.id, now).lease)
        return UnknownKey()

    async def _raise_missing(self, ref: Ref) -> NoReturn:
        """Raise UnknownKey or StaleLease, as soon as the change that made it one is on disk."""
        journal = self.journal
        error = self._missing(ref, self.now())
        if isinstance(ref, str):
            commit = journal.commit_of_text(ref)
        else:
            commit = journal.commit_of(ref.id if isinstance(ref, Handle) else ref)
        try:
            if commit is not None:
                await commit
            raise error
        finally:
            del error  # or its traceback would refer to this frame, and this frame to it

    def _tried(self, ref: Ref, now: float, change: Callable[[Key], object]) -> str:
        """Change the key of an item of a batch. Returns the result's word."""
        key = self._find(ref, now)
        try:
            if key is None:
                raise self._missing(ref, now)
            change(key)
        except PoolError as error:
            return _WORDS[type(error)]
        return "done"

    async def _in_slices(
        self, items: Iterable[Item], change: Callable[[Item, float], Result]
    ) -> list[Result]:
        """What `change(item, now)` returns for each item, as soon as all is on disk. Others are served in between."""
        self.journal.require()
        results = []
        until = self.now() + _SLICE_SECONDS
        for item in items:
            if (now := self.now()) > until:
                until = await self._pause()
                now = self.now()
            results.append(change(item, now))
        self._waiters.serve(self.now())
        await self._all_kept()
        return results

    async def _refuse(self) -> NoReturn:
        """Raise NoKeyAvailable or PoolDraining, as soon as all changes are on disk."""
        if self.pool_draining:
            await self._all_kept()
            raise PoolDraining
        self.pool.counters.refused += 1
        await self._all_kept()
        pool = self.pool
        seconds = pool.next_release(self.now())
        raise NoKeyAvailable(
            None if seconds is None else _seconds(seconds),
            blocked=pool.blocked,
            cooling=pool.cooling,
            quarantined=pool.quarantined,
        )

    async def _pause(self) -> float:
        """Let the loop serve other calls between two slices of a batch. Returns the moment when the next slice ends.

        This is a bare yield, which both a task and `http.api_call.CoroutineDriver` resume later. Raises
        StorageUnavailable if storage failed meanwhile.
        """
        self.journal.pause()
        try:
            await asyncio.sleep(0)
        finally:
            self.journal.resume()
        self.journal.require()
        return self.now() + _SLICE_SECONDS

    async def _next_turn(self) -> None:
        """Resume in the next turn of the loop. With a future, since the caller need not be a task."""
        turn = self._loop.create_future()
        self._loop.call_soon(_done, turn)
        await turn

    # -- durability: answers wait until what they say is on disk

    def _delay(self, since: float) -> float:
        """Seconds that were spent waiting for the disk, 0 if negligible.

        Lengths of time are relative to when the answer is sent, so that a holder never overestimates its lease.
        """
        waited = self.now() - since
        return waited if waited > _NEGLIGIBLE_DELAY else 0.0

    async def _all_kept(self) -> None:
        """Wait until all changes are on disk. Raises StorageUnavailable."""
        if (commit := self.journal.commit_of_all()) is not None:
            await commit

    def _give_back(self, lease: Lease) -> None:
        # A StaleLease means that the key was served to somebody else meanwhile. While expiry is suspended, an expired
        # key stays blocked until its deadline. A replayed lease may have reached its caller by another call.
        now = self.now()
        with contextlib.suppress(StaleLease, StorageUnavailable):
            key = self._find(lease.id, now)
            if key is not None and not key.replayed:
                self._unblock(key, lease.lease, now)

    # -- what the journal calls

    def numbers(self) -> dict[str, int]:
        """The pool's numbers that are kept with each batch. O(1)."""
        pool = self.pool
        return {
            "last_id": pool.last_id,
            "last_lease": pool.last_lease,
            "moment": round(self.now() * 1000),
            **pool.counters.by_name(),
        }

    def restore_numbers(self, numbers: Mapping[str, int]) -> None:
        """Take over the numbers and notes that a journal kept. O(numbers)."""
        pool = self.pool
        pool.last_id, pool.last_lease = numbers.get("last_id", 0), numbers.get("last_lease", 0)
        for name in COUNTERS:
            setattr(pool.counters, name, numbers.get(name, 0))
        self._notes = {
            name.removeprefix(NOTE): number
            for name, number in numbers.items()
            if name.startswith(NOTE) and number
        }

    def suspend_expiry(self) -> None:
        """Storage is slow or down: no key expires that is alive now. O(1)."""
        self.pool.suspend_expiry(self.now())

    def grant_grace(self) -> Generator[None, None, int]:
        """Let the keys whose expiry was suspended live at least for the grace from now on.

        Yields between slices; O(log n) for each key that would expire sooner. Returns the end of the grace in
        milliseconds. No call changes anything meanwhile.
        """
        rules = self.rules
        grace = max(rules.restart_grace, (rules.keepalive_seconds or 0.0) / 2)
        until = round((self.now() + grace) * 1000)
        while self.pool.grant_grace(until / 1000, _GRACES_PER_TURN):
            yield
        return until

    def on_recovered(self) -> None:
        """Storage works again: expire keys and serve waiters."""
        self.pool.resume_expiry()
        self.timers.process_soon()
        self._waiters.serve_soon()

    # -- deadlines and changes

    def start(self) -> None:
        """Set the timers of all deadlines. O(their buckets)."""
        self.timers.start(self.pool.deadline_buckets())

    def _changed(self, change: Change, key: Key, owner: str | None, origin: Origin) -> None:
        self.journal.touch(key)
        if change in SILENT:
            return
        at = key.acquired_at if change is _ACQUIRED else self.now()
        self.events.append((change, key, owner, key.lease, at, origin))
        if change is _READY:
            self._uncounted += 1
        if self._waiters.waiting and change in _MAKES_AVAILABLE:
            self._waiters.serve_soon()

    # -- answers

    def _lease(self, key: Key, now: float) -> Lease:
        assert key.release_deadline is not None
        # `_seconds`, inlined: two calls of it would triple the cost.
        return Lease(
            key.id,
            key.text,
            key.lease,
            self.handles.make(key.id, key.lease),
            round((key.release_deadline - now) * 1000) / 1000,
            round((key.expires_deadline - now) * 1000) / 1000,
        )

    def _row(self, key: Key, now: float) -> Row:
        state, history = key.state, key.history
        due_in = None if key.release_deadline is None else _seconds(key.release_deadline - now)
        reason = history.reason
        if state is _QUARANTINED and history.operator_reason is not None:
            reason = history.operator_reason
        return Row(
            key.id,
            key.hint,
            state,
            key.owner,
            key.lease or None,
            moment(key.created_at),
            _seconds(key.expires_deadline - now),
            due_in if state is _BLOCKED else None,
            due_in if state is _COOLING else None,
            0 if history is NO_HISTORY else self.pool.failures_of(key, now),
            history.outcome,
            reason,
        )

    def _process_due(self) -> bool:
        """Process some of the deadlines that have passed. Returns whether there are more. O(MAX_DUE_PER_CALL)."""
        now = self.now()
        found = self.pool.process_due(now)
        if found.release_lateness is not None:
            self.release_lateness.add(found.release_lateness)
        if found.expiry_lateness is not None:
            self.expiry_lateness.add(found.expiry_lateness)
        self._waiters.serve(now)
        return found.more


def _age(answer: Lease | Row, delay: float) -> None:
    if delay:
        answer.expires_in = _less(answer.expires_in, delay)
        if answer.release_in is not None:
            answer.release_in = _less(answer.release_in, delay)
        if isinstance(answer, Row) and answer.available_in is not None:
            answer.available_in = _less(answer.available_in, delay)


def _less(length: float, delay: float) -> float:
    return max(0.0, _seconds(length - delay)) if delay else length


def _seconds(length: float) -> float:
    return round(length * 1000) / 1000  # a third of the cost of round(length, 3)


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
