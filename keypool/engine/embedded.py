"""The engine whose pool is in this process: pool.py's rules, their timers, and the queue of pending acquires.

The pool reports every change to `_changed`, which hands the key to the journal and records the event. A call answers
only when everything that its answer says is in the journal. Only `page` and `stats` may be ahead of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Mapping, Sequence
from typing import NoReturn

from keypool import __version__
from keypool.core.answers import (
    EndedLease,
    Extended,
    Extension,
    GeneratedKey,
    HistoryPage,
    KeptAlive,
    Lease,
    Page,
    Ref,
    Row,
    Stats,
    Unblock,
    Unblocked,
)
from keypool.core.counters import COUNTERS
from keypool.core.cursor import HistoryQuery, ListQuery, next_of, number_after, order_of, page_query
from keypool.core.errors import Draining, NoKeyAvailable, PoolDraining, PoolError, UnknownKey
from keypool.core.events import HOLDER, Event, Origin, latest
from keypool.core.keys import Key, State
from keypool.core.outcomes import Report
from keypool.core.rules import PoolRules
from keypool.engine import NOTE, Attempt, Client, Timed
from keypool.engine.history import history_page
from keypool.engine.holder_calls import HolderCalls
from keypool.engine.operator_calls import OperatorCalls
from keypool.engine.shapes import age, expires_in, less, less_or_none, rounded, row_of
from keypool.engine.steps import SLICE_SECONDS
from keypool.engine.waiters import Request
from keypool.ops.histogram import Histogram

_AVAILABLE = State.AVAILABLE
_GRACES_PER_TURN = 500  # keys that get their grace in one turn of the loop: about 2 ms


class EmbeddedEngine(OperatorCalls, HolderCalls):
    """See the module, and the Engine protocol for the calls. It may be used on one IOLoop and its thread only.

    The pool is in memory only until a journal is set, for which the pool must have been restored. Without
    `start_timers`, no timer fires before `start`.
    """

    name = "embedded"
    degraded = None  # the pool is served completely or not at all
    clock_steps = 0  # deadlines follow the monotonic clock

    # -- the calls

    async def generate(self, count: int, origin: Origin = HOLDER) -> list[GeneratedKey]:
        """Generate keys, all or none. O(count · log n)."""
        self.journal.require()
        self._require_serving()
        now = self.now()
        made: list[GeneratedKey] = []
        moments: list[float] = []
        try:
            now = await self._make_room(count)
            self._reserved += count  # so that no other call takes this room between two slices
            try:
                until = now + SLICE_SECONDS
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
            answer.expires_in = less_or_none(answer.expires_in, self._delay(at))
        return made

    async def acquire(
        self,
        owner: str | None,
        wait: float,
        timed: Timed | None = None,
        block_seconds: float | None = None,
        attempt: Attempt | None = None,
        *,
        client: Client | None = None,
    ) -> Lease:
        """Acquire a key, now or within `wait` seconds. O(log n)."""
        journal = self.journal
        journal.require()
        if attempt is not None and (held := await self._replay(attempt)):
            return held[0]
        if self.pool_draining:
            await self._refuse(None)
        digest = None if attempt is None else attempt.digest
        now = self.now()
        if self._waiters.waiting:
            key = None
        elif client is None:
            key = self.pool.acquire(now, owner, block_seconds, digest)
        elif self.shares.may_take(client, now):
            key = self.pool.acquire(now, owner, block_seconds, digest, client.name)
        else:
            key = None
        if key is not None:
            lease = self._lease(key, now)
        else:
            lease = await self._take_or_wait(Request(owner, block_seconds, digest, client), wait, timed)
        if (commit := journal.commit_of(lease.id)) is not None:
            started = self.now()
            try:
                await commit
            except (GeneratorExit, asyncio.CancelledError):  # the caller hung up and never got this lease
                self._give_back(lease)
                raise
            age(lease, self._delay(started))
        return lease

    async def acquire_many(
        self,
        owner: str | None,
        count: int,
        block_seconds: float | None = None,
        attempt: Attempt | None = None,
        *,
        client: Client | None = None,
    ) -> list[Lease]:
        """Acquire up to `count` keys. O(count · log n)."""
        self.journal.require()
        if attempt is not None and (held := await self._replay(attempt)):
            return held
        request = Request(owner, block_seconds, None if attempt is None else attempt.digest, client)
        leases: list[Lease] = []
        moments: list[float] = []
        until = self.now() + SLICE_SECONDS
        try:
            while len(leases) < count and (lease := await self._take(request)) is not None:
                leases.append(lease)
                moments.append(now := self.now())
                if now > until:
                    until = await self._pause()
            if not leases:
                await self._refuse(client)
            await self._all_kept()
        except (GeneratorExit, asyncio.CancelledError):  # the caller hung up and never got these leases
            for lease in leases:
                self._give_back(lease)
            raise
        for lease, at in zip(leases, moments, strict=True):
            age(lease, self._delay(at))
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
        *,
        uses: int = 1,
    ) -> Unblocked:
        """Make a key available again, or what the report asks for. O(log n)."""
        self.journal.require()
        now = self.now()
        key = self._find(ref, now) or await self._raise_missing(ref)
        if key.group is not None:
            key = await self._kept_seat(key, ref, lease, now)
        try:
            answer = self._unblock(key, lease, now, ended=ended, report=report, origin=origin, uses=uses)
        finally:
            if (commit := self.journal.commit_of(key.id)) is not None:
                await commit
        if answer.available_in is not None:
            answer.available_in = less(answer.available_in, self._delay(now))
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
                lambda key: self._unblock(
                    key, item.lease, now, ended=ended, report=item.report, origin=by, uses=item.uses
                ),
                of_seat=True,
                lease=item.lease,
            )

        return await self._in_slices(items, unblock)

    async def extend(self, ref: Ref, lease: int, seconds: float | None) -> Extended:
        """Let a lease end later. O(1)."""
        self.journal.require()
        now = self.now()
        key = self._find(ref, now) or await self._raise_missing(ref)
        if key.group is not None:
            key = await self._kept_seat(key, ref, lease, now)
        try:
            self.pool.extend(key, lease, seconds, now)
            assert key.release_deadline is not None  # it is blocked
            left = key.acquired_at + self.pool.rules.longest_block - now
            answer = Extended(key.id, key.lease, rounded(key.release_deadline - now), rounded(left))
        finally:
            if (commit := self.journal.commit_of(key.id)) is not None:
                await commit
        delay = self._delay(now)
        answer.release_in = less(answer.release_in, delay)
        answer.block_left = less(answer.block_left, delay)
        return answer

    async def extend_many(self, items: Sequence[Extension]) -> list[str]:
        """Let leases end later, one by one. O(items)."""

        def extend(item: Extension, now: float) -> str:
            return self._tried(
                item.ref,
                now,
                lambda key: self.pool.extend(key, item.lease, item.seconds, now),
                of_seat=True,
                lease=item.lease,
            )

        return await self._in_slices(items, extend)

    async def keepalive(self, ref: Ref) -> KeptAlive:
        """Postpone the expiry of a key. O(log n)."""
        self.journal.require()
        now = self.now()
        key = self._find(ref, now) or await self._raise_missing(ref)
        if key.group is not None:
            key = await self._kept_seat(key, ref, None, now)
        self.pool.keepalive(key, now)
        answer = KeptAlive(key.id, expires_in(key, now))
        if self._waiters.waiting:
            self._waiters.serve(now)
        if (commit := self.journal.commit_of(key.id)) is not None:
            await commit
            answer.expires_in = less_or_none(answer.expires_in, self._delay(now))
        return answer

    async def keepalive_many(self, refs: Sequence[Ref]) -> list[str]:
        """Postpone the expiry of keys, one by one. O(items · log n)."""

        def keepalive(ref: Ref, now: float) -> str:
            return self._tried(ref, now, lambda key: self.pool.keepalive(key, now), of_seat=True)

        return await self._in_slices(refs, keepalive)

    async def get(self, ref: Ref) -> Row:
        """The row of a key. O(1)."""
        return await self._kept_row(self._find(ref, self.now()) or await self._raise_missing(ref))

    async def page(self, query: ListQuery) -> Page:
        """A page of rows. O(log n + page). May be ahead of the disk by the commit in flight."""
        now = self.now()
        asked = page_query(query)
        found = self.pool.page(asked, now)
        cursor = next_of(order_of(asked), found.next)
        page = Page([row_of(key, now, self.pool) for key in found.keys], cursor)
        self._waiters.serve(now)  # with blocks that were found overdue
        return page

    async def history(self, ref: Ref, query: HistoryQuery) -> HistoryPage:
        """Leases of a key that have ended. O(log n + page)."""
        before = number_after(query.after, "history")
        now = self.now()
        key = self._find(ref, now)
        self._waiters.serve(now)
        if key is not None:
            id = key.id
        elif isinstance(ref, int):
            id = ref
        else:
            await self._raise_missing(ref)
        if (commit := self.journal.commit_of(id)) is not None:
            await commit
        found = await self.journal.history.page(id, query.limit + 1, before)
        if key is None and not found and before is None:
            raise UnknownKey
        return history_page(found, query)

    @property
    def history_kept(self) -> int:
        """How many leases the history has. O(1)."""
        return self.journal.history.kept

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
            uptime=rounded(self.now() - self._started_at),
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

    def secrets(self) -> int:
        """How many different texts the keys have, of which seats share one. O(1)."""
        return self.pool.secrets

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
            rules,
            start_timers=start_timers,
            loop=self.timers.loop,
            clock=self.now,
            pool_name=name,
            shares=self.shares,
        )
        engine.handles = self.handles.of_pool(number)
        return engine

    def set_rules(self, rules: PoolRules) -> None:
        """Apply these rules to whatever comes from now on. O(1)."""
        self.pool.rules = rules
        self.journal.history.limit(rules.history_leases)

    def drain_pool(self) -> None:
        """Serve and take no key any more: PoolDraining, to the waiters as well. O(waiters)."""
        self.pool_draining = True
        self._waiters.drain(PoolDraining)

    @property
    def waiting(self) -> int:
        """How many acquires wait in this pool. O(1)."""
        return len(self._waiters.queue)

    # -- steps of the calls

    async def _kept_seat(self, key: Key, ref: Ref, lease: int | None, now: float) -> Key:
        """The seat that is meant (`_seat`). An error is raised as soon as what it says is on disk."""
        try:
            return self._seat(key, ref, lease, now)
        except PoolError:
            await self._all_kept()
            raise

    def _generate(self, now: float, origin: Origin) -> GeneratedKey:
        key = self.pool.generate(now, origin)
        made = GeneratedKey(key.id, key.text, _AVAILABLE, expires_in(key, now))
        self._waiters.serve(now)
        return made

    async def _take_or_wait(self, request: Request, wait: float, timed: Timed | None) -> Lease:
        """Acquire a key that may become available within `wait` seconds. Raises NoKeyAvailable, ShareSpent."""
        lease = await self._take(request)
        if lease is None and wait > 0:
            lease = await self._waiters.wait(request, wait, timed)
        return lease or await self._refuse(request.client)

    async def _take(self, request: Request) -> Lease | None:
        """Acquire an available key, if the waiters in the queue have left one."""
        while True:
            now = self.now()
            if self._waiters.waiting:  # a block may have run out whose timer is late
                self.pool.process_due(now)
                self._waiters.serve(now)
            if self.pool_draining:
                return None
            client = request.client
            if client is not None and not self.shares.may_take(client, now):
                return None
            key = None if self._waiters.waiting else self._waiters.take(request, now)
            if key is not None:
                return self._lease(key, now)
            if not self.pool.may_have_more(now):
                return None
            if self.pool.expiry_suspended:
                raise self.journal.unknown_outcome()  # the keys that are left will get a grace or be purged
            await self._next_turn()  # a backlog of due keys may hide an available one
            self.journal.require()

    async def _refuse(self, client: Client | None) -> NoReturn:
        """Raise PoolDraining, ShareSpent or NoKeyAvailable, as soon as all changes are on disk."""
        if self.pool_draining:
            await self._all_kept()
            raise PoolDraining
        if client is not None and not self.shares.has_room(client, self.now()):
            await self._all_kept()
            raise self.shares.spent(client, self.now())
        self.pool.counters.refused += 1
        await self._all_kept()
        pool = self.pool
        seconds = pool.next_release(self.now())
        raise NoKeyAvailable(
            None if seconds is None else rounded(seconds),
            blocked=pool.blocked,
            cooling=pool.cooling,
            quarantined=pool.quarantined,
        )

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
        until = round((self.now() + self.pool.rules.outage_grace) * 1000)
        while self.pool.grant_grace(until / 1000, _GRACES_PER_TURN):
            yield
        return until

    def on_recovered(self) -> None:
        """Storage works again: expire keys and serve waiters."""
        self.pool.resume_expiry()
        self.timers.process_soon()
        self._waiters.serve_soon()
