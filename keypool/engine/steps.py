"""The steps of the embedded engine's calls: finding a key, running a batch in slices, waiting for the disk.

See embedded.py, whose calls these steps make up.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections import deque
from collections.abc import Callable, Iterable
from typing import NoReturn, TypeVar

from tornado.ioloop import IOLoop

from keypool.core.answers import EndedLease, Lease, Ref, Row, Unblocked, Written
from keypool.core.errors import (
    BlockLimit,
    LeaseOver,
    ManySeats,
    PoolDraining,
    PoolError,
    StaleLease,
    StorageUnavailable,
    UnknownKey,
)
from keypool.core.events import HOLDER, SILENT, By, Change, Happened, Origin
from keypool.core.handles import SECRET_BYTES, Handle, Handles
from keypool.core.history import How, PastLease
from keypool.core.keys import NEVER, NO_DETAILS, Key, random_text
from keypool.core.outcomes import Report
from keypool.core.pool import Pool
from keypool.core.rare_events import RARE, RareEvents
from keypool.core.rules import DEFAULT_POOL, DEFAULT_RULES, PoolRules
from keypool.engine.clock import make_clock
from keypool.engine.journal import Commit, Journal, NullJournal
from keypool.engine.shapes import age, data_of, rounded, row_of
from keypool.engine.shares import Shares
from keypool.engine.timers import Timers
from keypool.engine.waiters import Waiters
from keypool.ops.histogram import SECONDS, Histogram

RECENT_EVENTS = 1000
SLICE_SECONDS = 0.00008
"""How long a batch runs before the loop serves other callers."""
WORDS = {
    UnknownKey: "unknown",
    StaleLease: "stale",
    LeaseOver: "over",
    BlockLimit: "limit",
    ManySeats: "many_seats",
}
"""The words of refusals in the results of batches."""

_NEGLIGIBLE_DELAY = 0.005  # seconds by which a release may be early
# Globals, because in Python 3.11 each look-up of an enum's member by name costs a tenth of a microsecond.
_ACQUIRED, _READY, _UNBLOCKED = Change.ACQUIRED, Change.READY, Change.UNBLOCKED
_OPERATOR = By.OPERATOR
_MAKES_AVAILABLE = frozenset(
    {
        Change.UNBLOCKED,
        Change.RELEASED,
        Change.GENERATED,
        Change.IMPORTED,
        Change.READY,
        Change.RESTORED,
        Change.FOLLOWED,
    }
)

Item = TypeVar("Item")
Result = TypeVar("Result")


class Steps:
    """What the calls of EmbeddedEngine have in common."""

    def __init__(
        self,
        rules: PoolRules = DEFAULT_RULES,
        *,
        start_timers: bool = True,
        loop: IOLoop | None = None,
        clock: Callable[[], float] | None = None,
        new_text: Callable[[], str] | None = None,
        pool_name: str = DEFAULT_POOL,
        shares: Shares | None = None,
    ) -> None:
        self.shares = shares or Shares()
        self.pool_name = pool_name
        self.pool_draining = False
        self.now = clock or make_clock()
        self.timers = Timers(loop or IOLoop.current(), self.now, self._process_due)
        self.handles = Handles(secrets.token_bytes(SECRET_BYTES))
        self.pool = Pool(
            rules,
            new_text=new_text or (lambda: random_text(self.pool.rules.key_length)),
            random=random.Random().random,  # noqa: S311 - which available key is served isn't secret
            clients=self.shares,
            recorder=self,
            on_change=self._changed,
            on_opened=self.timers.opened,
            on_closed=self.timers.closed,
        )
        self.journal: Journal = NullJournal()
        self.release_lateness = Histogram(SECONDS)
        self.expiry_lateness = Histogram(SECONDS)
        self.events: deque[Happened] = deque(maxlen=RECENT_EVENTS)
        self.rare = RareEvents()
        self._notes: dict[str, int] = {}
        self._loop = asyncio.get_running_loop()
        self._waiters = Waiters(
            self.pool,
            self.timers,
            self.now,
            rules.max_waiters,
            self.shares,
            lease_of=self._lease,
            give_back=self._give_back,
            storage_up=self.storage_up,
        )
        self._started_at = self.now()
        self._draining = False
        self._reserved = 0  # keys that batches in progress will still add
        self._uncounted = 0  # events that no counter has
        if start_timers:
            self.start()

    @property
    def rules(self) -> PoolRules:
        """The settings of the pool."""
        return self.pool.rules

    def start(self) -> None:
        """Set the timers of all deadlines. O(their buckets)."""
        self.timers.start(self.pool.deadline_buckets())

    def storage_up(self) -> bool:
        """Whether the journal can keep changes. O(1)."""
        return self.journal.failing is None

    # -- finding keys

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
            if isinstance(ref, Handle):
                key = self.pool.find_id(ref.id, now)
                return key if key.lease == ref.lease else None
        except UnknownKey:
            assert not isinstance(ref, Written)  # for that one, nothing was called here
            if self.pool.is_suspended(ref.id if isinstance(ref, Handle) else ref):
                raise self.journal.unknown_outcome() from None
            return None
        return self._find(ref.text, now) or self._find(ref.other, now)

    def _seat(self, key: Key, ref: Ref, lease: int | None, now: float) -> Key:
        """The seat that is meant by whoever names its secret by the text. O(seats). Raises ManySeats, StaleLease.

        Call it for keys with a group only, which saves most calls a call.
        """
        text = ref.text if isinstance(ref, Written) else ref
        is_text = isinstance(text, str) and text in (key.text, key.details.former)
        return self.pool.seat_of(key, lease, now) if is_text else key

    def _missing(self, ref: Ref, now: float) -> UnknownKey | StaleLease:
        """The error about a key that `_find` didn't find."""
        if isinstance(ref, Written):
            ref = ref.other
        if isinstance(ref, Handle):
            with contextlib.suppress(UnknownKey):
                return StaleLease(ref.lease, self.pool.find_id(ref.id, now).lease)
        return UnknownKey()

    async def _raise_missing(self, ref: Ref) -> NoReturn:
        """Raise UnknownKey or StaleLease, as soon as the change that made it one is on disk."""
        error = self._missing(ref, self.now())
        try:
            if (commit := self._commit_about(ref)) is not None:
                await commit
            raise error
        finally:
            del error  # or its traceback would refer to this frame, and this frame to it

    def _commit_about(self, ref: Ref) -> Commit | None:
        """The commit to await before answering that a key wasn't found."""
        journal = self.journal
        if isinstance(ref, str):
            # Of several keys that had the text one after the other, the last change may be of any.
            return journal.commit_of_text(ref) if self.pool.past_id(ref) is None else journal.commit_of_all()
        if isinstance(ref, Written):
            return journal.commit_of_all()
        return journal.commit_of(ref.id if isinstance(ref, Handle) else ref)

    def _tried(
        self,
        ref: Ref,
        now: float,
        change: Callable[[Key], object],
        *,
        of_seat: bool = False,
        lease: int | None = None,
    ) -> str:
        """Change the key of an item of a batch; `of_seat`: the one seat of it that has this lease.

        Returns the result's word.
        """
        key = self._find(ref, now)
        try:
            if key is None:
                raise self._missing(ref, now)
            if of_seat and key.group is not None:
                key = self._seat(key, ref, lease, now)
            change(key)
        except PoolError as error:
            return WORDS[type(error)]
        return "done"

    # -- batches

    async def _in_slices(
        self, items: Iterable[Item], change: Callable[[Item, float], Result]
    ) -> list[Result]:
        """What `change(item, now)` returns for each item, as soon as all is on disk. Others are served in between."""
        self.journal.require()
        results = []
        until = self.now() + SLICE_SECONDS
        for item in items:
            if (now := self.now()) > until:
                until = await self._pause()
                now = self.now()
            results.append(change(item, now))
        self._waiters.serve(self.now())
        await self._all_kept()
        return results

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
        return self.now() + SLICE_SECONDS

    async def _next_turn(self) -> None:
        """Resume in the next turn of the loop. With a future, since the caller need not be a task."""
        turn = self._loop.create_future()
        self._loop.call_soon(_done, turn)
        await turn

    async def _make_room(self, count: int) -> float:
        """Purge expired keys if `count` more don't fit without. Returns the moment of now. Raises PoolFull."""
        pool = self.pool
        if pool.total + self._reserved + count > pool.rules.max_keys:
            await self.purge_expired()
            self._require_serving()
        now = self.now()
        pool.require_room(self._reserved + count, now)
        return now

    async def purge_expired(self) -> None:
        """Purge the keys that have expired, so that counts are exact. O(their number), in slices."""
        while self.pool.overdue(now := self.now()):
            self.pool.process_due(now)
            if self.pool.overdue(now):
                await self._next_turn()

    def _require_serving(self) -> None:
        """Raise PoolDraining if the pool is being emptied for good."""
        if self.pool_draining:
            raise PoolDraining

    # -- durability: answers wait until what they say is on disk

    def _delay(self, since: float) -> float:
        """Seconds that were spent waiting for the disk, 0 if negligible.

        Lengths of time in the answer are shortened by it (shapes.py).
        """
        waited = self.now() - since
        return waited if waited > _NEGLIGIBLE_DELAY else 0.0

    async def _all_kept(self) -> None:
        """Wait until all changes are on disk. Raises StorageUnavailable."""
        if (commit := self.journal.commit_of_all()) is not None:
            await commit

    async def _kept_row(self, key: Key) -> Row:
        """The row of a live key, as soon as it is on disk."""
        now = self.now()
        row = row_of(key, now, self.pool)
        self._waiters.serve(now)
        journal = self.journal
        # How many seats there are is in the rows of all of them.
        commit = journal.commit_of(key.id) if key.group is None else journal.commit_of_all()
        if commit is not None:
            await commit
            age(row, self._delay(now))
        return row

    # -- leases

    def _lease(self, key: Key, now: float) -> Lease:
        assert key.release_deadline is not None
        deadline = key.expires_deadline
        # `rounded`, inlined: two calls of it would triple the cost.
        lease = Lease(
            key.id,
            key.text,
            key.lease,
            self.handles.make(key.id, key.lease),
            round((key.release_deadline - now) * 1000) / 1000,
            None if deadline == NEVER else round((deadline - now) * 1000) / 1000,
        )
        if key.details is not NO_DETAILS:
            lease.name, lease.data = key.details.name, data_of(key)
        return lease

    def _unblock(
        self,
        key: Key,
        lease: int | None,
        now: float,
        *,
        ended: list[EndedLease] | None = None,
        report: Report | None = None,
        origin: Origin = HOLDER,
        uses: int = 1,
    ) -> Unblocked:
        """End a lease and take its report. Adds to `ended` a lease that was ended without its number."""
        changed, guarded = self.pool.unblock(key, lease, now, report, origin, uses=uses)
        if changed and lease is None and ended is not None:
            ended.append(EndedLease(key.id, key.hint, key.lease))
        available_in = None
        if key.release_deadline is not None:  # then it isn't blocked any more, so it cools
            available_in = rounded(key.release_deadline - now)
        answer = Unblocked(key.id, key.state, changed, available_in, guarded)
        if self._waiters.waiting:  # one of them may get the key
            self._waiters.serve(now)
        return answer

    def _give_back(self, lease: Lease) -> None:
        # A StaleLease means that the key was served to somebody else meanwhile. While expiry is suspended, an expired
        # key stays blocked until its deadline. A replayed lease may have reached its caller by another call.
        now = self.now()
        with contextlib.suppress(StaleLease, StorageUnavailable):
            key = self._find(lease.id, now)
            if key is not None and not key.replayed:
                self._unblock(key, lease.lease, now)

    # -- deadlines and changes

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

    def _changed(self, change: Change, key: Key, owner: str | None, origin: Origin) -> None:
        self.journal.touch(key)
        if change in SILENT:
            return
        if change is _ACQUIRED:
            self.events.append((change, key, owner, key.lease, key.acquired_at, origin))
            return
        at = self.now()
        self.events.append((change, key, owner, key.lease, at, origin))
        if change is _READY:
            self._uncounted += 1
        elif change in RARE and (change is not _UNBLOCKED or origin.by is _OPERATOR):
            self._add_rare(change, key, owner, at, origin)
        if self._waiters.waiting and change in _MAKES_AVAILABLE:
            self._waiters.serve_soon()

    # -- what the pool reports for the history

    def lease_ended(self, key: Key, how: How, at: float | None, report: Report | None) -> None:
        """Record a lease that ends. O(1), about 1 µs."""
        past = PastLease(
            key.id,
            key.lease,
            key.owner,
            key.client,
            key.acquired_at,
            self.now() if at is None else at,
            how,
            None if report is None else report.outcome,
            None if report is None else report.reason,
            key.extended,
        )
        self.journal.history.add(past, self.pool.rules.history_leases)

    def late_report(self, key: Key, report: Report) -> None:
        """Add a report to the record of a lease that has ended. O(1)."""
        self.journal.history.amend(key.id, key.lease, report)

    def _add_rare(self, change: Change, key: Key, owner: str | None, at: float, origin: Origin) -> None:
        self.journal.keep_event(self.rare.add(change, key, owner, at, origin))


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
