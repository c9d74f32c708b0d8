"""The pool in this process: pool.py's rules, their timers, and the queue of those who wait.

Every change goes through `_changed`, which the pool calls: it hands the key to the journal, if there is one, and
publishes the event. No call tells anything before the journal has kept it.
The waiters' rule is that while somebody waits no key is available: a call that makes one available serves the
first waiter before it returns, and whatever makes one available at all has them served in the next turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import NoReturn

from tornado.ioloop import IOLoop

from keypool import __version__
from keypool.core.answers import (
    EndedLease,
    GeneratedKey,
    Identity,
    KeptAlive,
    Lease,
    Page,
    Ref,
    Revealed,
    Row,
    Stats,
    Unblocked,
)
from keypool.core.cursor import ListQuery, encode, page_query
from keypool.core.errors import (
    Draining,
    NoKeyAvailable,
    StaleLease,
    StorageUnavailable,
    TooManyWaiters,
    UnknownKey,
)
from keypool.core.events import Change, Event, Happened, latest
from keypool.core.keys import Key, State, moment, random_text
from keypool.core.pool import Pool
from keypool.engine import Timed
from keypool.engine.clock import make_clock
from keypool.engine.durable.commit import Commit
from keypool.engine.durable.journal import Journal
from keypool.engine.timers import Timers
from keypool.ops.histogram import SECONDS, SECONDS_OF_WAIT, Tally

RECENT_EVENTS = 1000
_MAKES_AVAILABLE = frozenset({Change.UNBLOCKED, Change.RELEASED, Change.GENERATED})

_GRANTED_AT_ONCE = 500  # keys that get their grace in one turn of the loop: some 2 ms
_TOO_FEW_TO_TELL = 0.005  # seconds: as early as a release may be
_SLICE_SECONDS = 0.00015  # of a batch, before the loop may serve other callers


class Waiter:
    """Somebody who waits for a key. `served` is answered with the key, or with None when time is up."""

    __slots__ = ("owner", "served", "since", "timer")

    def __init__(self, owner: str | None, since: float, served: asyncio.Future[Lease | None]) -> None:
        self.owner = owner
        self.since = since
        self.served = served
        self.timer: object = None


class EmbeddedEngine:
    """See the module, and the Engine protocol for the calls. Lives on one IOLoop, and on its thread only."""

    name = "embedded"
    degraded = None  # it is served whole, or not at all
    clock_steps = 0  # deadlines go by the monotonic clock

    def __init__(
        self,
        *,
        block_seconds: float = 60.0,
        keepalive_seconds: float = 300.0,
        key_length: int = 20,
        max_keys: int = 1_000_000,
        max_waiters: int = 10_000,
        restart_grace: float = 0.0,
        held: bool = False,
        loop: IOLoop | None = None,
        clock: Callable[[], float] | None = None,
        new_text: Callable[[], str] | None = None,
    ) -> None:
        self.now = clock or make_clock()
        self.timers = Timers(loop or IOLoop.current(), self.now, self._settle_due)
        self.pool = Pool(
            block_seconds=block_seconds,
            keepalive_seconds=keepalive_seconds,
            max_keys=max_keys,
            new_text=new_text or (lambda: random_text(key_length)),
            random=random.Random().random,  # noqa: S311 - which free key is served is no secret
            on_change=self._changed,
            on_opened=self.timers.opened,
            on_closed=self.timers.closed,
        )
        self.release_lateness = Tally(SECONDS)
        self.expiry_lateness = Tally(SECONDS)
        self.events: deque[Happened] = deque(maxlen=RECENT_EVENTS)
        self.journal: Journal | None = None
        self.kept_notes: dict[str, int] = {}
        self._loop = asyncio.get_running_loop()
        self._max_waiters = max_waiters
        self._outage_grace = max(restart_grace, keepalive_seconds / 2)
        self._waiters: OrderedDict[Waiter, None] = OrderedDict()
        self._started_at = self.now()
        self.wait_seconds = Tally(SECONDS_OF_WAIT)
        self._draining = False
        self._reserved = 0  # keys that batches under way will still generate
        self._serving_soon = False
        if not held:
            self.start()
        self._revealed = 0

    # -- the calls

    async def generate(self, count: int) -> list[GeneratedKey]:
        """Make keys, all or none. O(count · log n)."""
        self._require_storage()
        now = self.now()
        while self.pool.total + self._reserved + count > self.pool.max_keys and self.pool.overdue(now):
            self.pool.settle(now)
            if self.pool.overdue(now):
                await self._next_turn()  # a crowd of them
                now = self.now()
        made: list[GeneratedKey] = []
        try:
            self.pool.require_room(self._reserved + count, now)
            self._reserved += count  # nobody else may take this room between two slices
            try:
                until = now + _SLICE_SECONDS
                while len(made) < count:
                    made.append(self._generate(now))
                    self._reserved -= 1
                    if (now := self.now()) > until:
                        until = await self._pause()
                        now = self.now()
            finally:
                self._reserved -= count - len(made)
        finally:
            self._serve_waiters(now)
            late = await self._kept_all()
        for answer in made if late else ():
            answer.expires_in = _less(answer.expires_in, late)
        return made

    async def acquire(self, owner: str | None, wait: float, timed: Timed | None = None) -> Lease:
        """Serve a key, now or within `wait` seconds. O(log n)."""
        self._require_storage()
        now = self.now()
        key = None if self._waiters else self.pool.acquire(now, owner)
        lease = await self._take(owner) if key is None else self._lease(key, now)
        if lease is None and wait > 0:
            lease = await self._wait_for_key(owner, wait, timed)
        if lease is None:
            await self._refuse()
        if self.journal is not None:
            await self._kept_leases([lease])
        return lease

    async def acquire_many(self, owner: str | None, count: int) -> list[Lease]:
        """Serve up to `count` keys. O(count · log n)."""
        self._require_storage()
        leases: list[Lease] = []
        until = self.now() + _SLICE_SECONDS
        try:
            while len(leases) < count and (lease := await self._take(owner)) is not None:
                leases.append(lease)
                if self.now() > until:
                    until = await self._pause()
        except (GeneratorExit, asyncio.CancelledError):  # hung up between two slices
            for lease in leases:
                self._take_back(lease)
            raise
        if not leases:
            await self._refuse()
        await self._kept_leases(leases)
        return leases

    async def unblock(self, ref: Ref, lease: int | None, ended: list[EndedLease] | None = None) -> Unblocked:
        """Free a key. O(log n)."""
        self._require_storage()
        key = self._find(ref, self.now()) or await self._gone(ref)
        try:
            changed = self._unblock(key, lease) if ended is None else self._end_lease(key, lease, ended)
        finally:
            if self.journal is not None and (commit := self.journal.commit_of(key.id)) is not None:
                await commit
        return Unblocked(key.id, State.AVAILABLE, changed)

    async def unblock_many(
        self, items: Sequence[tuple[Ref, int | None]], ended: list[EndedLease] | None = None
    ) -> list[str]:
        """Free keys one by one. O(items · log n)."""
        self._require_storage()
        outcomes = []
        until = self.now() + _SLICE_SECONDS
        for ref, lease in items:
            if (now := self.now()) > until:
                until = await self._pause()
                now = self.now()
            key = self._find(ref, now)
            try:
                if key is not None:
                    self._unblock(key, lease) if ended is None else self._end_lease(key, lease, ended)
                outcomes.append("unknown" if key is None else "done")
            except StaleLease:
                outcomes.append("stale")
        await self._kept_all()
        return outcomes

    async def keepalive(self, ref: Ref) -> KeptAlive:
        """Put off a key's expiry. O(log n)."""
        self._require_storage()
        now = self.now()
        key = self._find(ref, now) or await self._gone(ref)
        self.pool.keepalive(key, now)
        answer = KeptAlive(key.id, _seconds(key.expires_deadline - now))
        if self._waiters:
            self._serve_waiters(now)
        if self.journal is not None and (commit := self.journal.commit_of(key.id)) is not None:
            await commit
            answer.expires_in = _less(answer.expires_in, self._late(now))
        return answer

    async def keepalive_many(self, refs: Sequence[Ref]) -> list[bool]:
        """Put off expiries one by one. O(items · log n)."""
        self._require_storage()
        known = []
        until = self.now() + _SLICE_SECONDS
        for ref in refs:
            if (now := self.now()) > until:
                until = await self._pause()
                now = self.now()
            key = self._find(ref, now)
            if key is not None:
                self.pool.keepalive(key, now)
            known.append(key is not None)
        self._serve_waiters(self.now())
        await self._kept_all()
        return known

    async def delete(self, ref: Ref) -> Identity:
        """Purge a key. O(log n)."""
        self._require_storage()
        key = self._find(ref, self.now()) or await self._gone(ref)
        self.pool.delete(key)
        if (commit := self._commit_of(key.id)) is not None:
            await commit
        return Identity(key.id, key.hint)

    async def delete_many(self, refs: Sequence[Ref]) -> list[Identity | None]:
        """Purge keys one by one. O(items · log n)."""
        self._require_storage()
        gone: list[Identity | None] = []
        until = self.now() + _SLICE_SECONDS
        for ref in refs:
            if (now := self.now()) > until:
                until = await self._pause()
                now = self.now()
            key = self._find(ref, now)
            if key is not None:
                self.pool.delete(key)
            gone.append(None if key is None else Identity(key.id, key.hint))
        await self._kept_all()
        return gone

    async def get(self, ref: Ref) -> Row:
        """How a key stands. O(1)."""
        now = self.now()
        row = _row(self._find(ref, now) or await self._gone(ref), now)
        self._serve_waiters(now)
        if (commit := self._commit_of(row.id)) is not None:
            await commit
            _age(row, self._late(now))
        return row

    async def reveal(self, ref: Ref) -> Revealed:
        """A key's text, told as an event. O(1)."""
        now = self.now()
        key = self._find(ref, now) or await self._gone(ref)
        revealed = Revealed(key.id, key.text)
        self.events.append((Change.REVEALED, key, key.owner, key.lease, now))
        self._revealed += 1
        self._serve_waiters(now)
        if (commit := self._commit_of(key.id)) is not None:
            await commit
        return revealed

    async def page(self, query: ListQuery) -> Page:
        """A page of rows. O(log n + page). May lead the disk by the commit under way."""
        now = self.now()
        asked = page_query(query)
        found = self.pool.page(asked, now)
        cursor = None if found.next is None else encode(asked, found.next)
        page = Page([_row(key, now) for key in found.keys], cursor)
        self._serve_waiters(now)  # by what was found overdue
        return page

    async def stats(self) -> Stats:
        """All counts. O(1). May lead the disk by the commit under way."""
        pool, counters = self.pool, self.pool.counters
        return Stats(
            pool.total,
            pool.available,
            pool.blocked,
            len(self._waiters),
            counters.generated,
            counters.acquired,
            counters.unblocked,
            counters.released,
            counters.deleted,
            counters.expired,
            counters.kept_alive,
            counters.refused,
            _seconds(self.now() - self._started_at),
            self.name,
            __version__,
        )

    async def notes(self) -> Mapping[str, int]:
        """What `keep_notes` was given. O(1)."""
        return self.kept_notes

    async def keep_notes(self, notes: Mapping[str, int | None]) -> None:
        """Keep some numbers beside the pool's. O(notes)."""
        for name, value in notes.items():
            if value is None:
                self.kept_notes.pop(name, None)
            else:
                self.kept_notes[name] = value
        if self.journal is not None:
            await self.journal.note(notes)

    async def expiring(self, seconds: float) -> int:
        """Keys that expire within `seconds`. O(seconds)."""
        return self.pool.expiring(self.now() + seconds)

    @property
    def told(self) -> int:
        """How many events there have been: the counters know, so that no change pays for it. O(1)."""
        return self.pool.counters.changes + self._revealed

    def recent(self, count: int, key_id: int | None = None) -> list[Event]:
        """The latest `count` events, oldest first. O(count), O(RECENT_EVENTS) for one key."""
        return latest(self.events, count, key_id)

    def ready(self) -> None:
        """Raise Draining once the server stops, StorageUnavailable while the journal can't write."""
        if self._draining:
            raise Draining
        self._require_storage()

    def storage_up(self) -> bool:
        """Whether the journal can write, or there is none. O(1)."""
        return self.journal is None or self.journal.failing is None

    def tallies(self) -> dict[str, Tally]:
        """What was measured, by the name of its metric. O(1)."""
        found = {
            "acquire_wait_seconds": self.wait_seconds,
            "release_lateness_seconds": self.release_lateness,
            "expiry_lateness_seconds": self.expiry_lateness,
        }
        if self.journal is not None:
            found["commit_seconds"] = self.journal.commit_seconds
            found["commit_rows"] = self.journal.commit_rows
        return found

    def oldest_wait(self) -> float:
        """Seconds that the first in the queue has waited, 0 if nobody waits. O(1)."""
        first = next(iter(self._waiters), None)
        return 0.0 if first is None else self.now() - first.since

    def figures(self) -> dict[str, float]:
        """The journal's last commit and how many there were, for the dashboard. O(1)."""
        if self.journal is None:
            return {}
        seconds, rows = self.journal.commit_seconds, self.journal.commit_rows
        return {"commits": seconds.count, "commit_seconds": round(seconds.last, 6), "commit_rows": rows.last}

    def measures(self) -> Mapping[str, float | Mapping[str, float]]:
        """What metrics show of the journal and its disk, by full name; of one with a label by its values. O(1)."""
        journal = self.journal
        if journal is None:
            return {}
        return {
            "keypool_commit_age_seconds": journal.commit_age(),
            "keypool_storage_failing_seconds": journal.failing_seconds(),
            "keypool_writer_restarts_total": journal.writer_restarts,
            "keypool_data_file_bytes": {"data": journal.figures.data, "log": journal.figures.log},
            "keypool_disk_free_bytes": journal.figures.free,
        }

    def drain(self) -> None:
        """Tell all waiters that the server stops, and take no more. O(waiters)."""
        self._draining = True
        while self._waiters:
            waiter = self._pop_waiter()
            waiter.served.set_exception(Draining())

    async def close(self) -> None:
        """Drop the timers, and keep what isn't kept yet. Raises StorageUnavailable if that can't be done."""
        self.timers.close()
        if self.journal is not None:
            await self.journal.close()

    # -- steps of the calls

    def _generate(self, now: float) -> GeneratedKey:
        key = self.pool.generate(now)
        made = GeneratedKey(key.id, key.text, State.AVAILABLE, _seconds(key.expires_deadline - now))
        self._serve_waiters(now)
        return made

    async def _take(self, owner: str | None) -> Lease | None:
        """Block an available key, if there is one for a newcomer: who waits already comes first."""
        while True:
            now = self.now()
            if self._waiters:  # a block may have run out whose timer is late
                self.pool.settle(now)
                self._serve_waiters(now)
            key = None if self._waiters else self.pool.acquire(now, owner)
            if key is not None:
                return self._lease(key, now)
            if not self.pool.may_have_more(now):
                return None
            if self.pool.held and self.journal is not None:
                raise self.journal.undecided()  # those that are left have expired, or will have been saved
            await self._next_turn()  # a crowd of overdue keys stands in the way
            self._require_storage()

    def _unblock(self, key: Key, lease: int | None) -> bool:
        changed = self.pool.unblock(key, lease)
        if self._waiters:
            self._serve_waiters(self.now())
        return changed

    def _end_lease(self, key: Key, lease: int | None, ended: list[EndedLease]) -> bool:
        """The same, with a note of the lease that ends without its number shown."""
        latest = key.lease  # a waiter may be served in the same step, under the next number
        changed = self._unblock(key, lease)
        if changed and lease is None:
            ended.append(EndedLease(key.id, key.hint, latest))
        return changed

    def _find(self, ref: Ref, now: float) -> Key | None:
        """The live key, or None. If its block is found overdue, it is available now: serve waiters after the call.

        Raises StorageUnavailable if its expiry has passed and is held.
        """
        try:
            return self.pool.find_id(ref, now) if isinstance(ref, int) else self.pool.find(ref, now)
        except UnknownKey:
            if self.journal is not None and self.pool.held_back(ref):
                raise self.journal.undecided() from None
            return None

    async def _gone(self, ref: Ref) -> NoReturn:
        """Say that there is no such key, when that is on disk. Raises UnknownKey."""
        journal = self.journal
        if journal is not None:
            commit = journal.commit_of(ref) if isinstance(ref, int) else journal.commit_of_text(ref)
            if commit is not None:
                await commit
        raise UnknownKey

    # -- durability: nothing is told before it is on disk

    def _require_storage(self) -> None:
        if self.journal is not None:
            self.journal.require()

    def _commit_of(self, id: int) -> Commit | None:
        """What to await before telling of this key, if not all that happened to it is on disk. O(1).

        To await it raises StorageUnavailable.
        """
        return None if self.journal is None else self.journal.commit_of(id)

    def _late(self, since: float) -> float:
        """The seconds by which waiting for the disk makes an answer late, 0 if they are too few to tell.

        Lengths of time are told as of the answer, or a holder would believe in its key for longer than it has it.
        """
        waited = self.now() - since
        return waited if waited > _TOO_FEW_TO_TELL else 0.0

    async def _kept_all(self) -> float:
        """Wait until all that has happened is on disk; how late that makes the answer. Raises StorageUnavailable."""
        if self.journal is None or (commit := self.journal.commit_of_all()) is None:
            return 0.0
        started = self.now()
        await commit
        return self._late(started)

    async def _kept_leases(self, leases: Sequence[Lease]) -> None:
        """The same for keys just served: if the caller hangs up meanwhile, nobody was told, and they go back."""
        if self.journal is None:
            return
        one = len(leases) == 1
        commit = self.journal.commit_of(leases[0].id) if one else self.journal.commit_of_all()
        if commit is None:
            return
        started = self.now()
        try:
            await commit
        except (GeneratorExit, asyncio.CancelledError):
            for lease in leases:
                self._take_back(lease)
            raise
        if late := self._late(started):
            for lease in leases:
                _age(lease, late)

    async def _refuse(self) -> NoReturn:
        """Say that no key is available, when that is on disk. Raises NoKeyAvailable."""
        self.pool.counters.refused += 1
        await self._kept_all()
        raise NoKeyAvailable(self._retry_after())

    def hold_expiries(self) -> None:
        """The journal can't write, or not in time: no key expires that is alive now. O(1)."""
        self.pool.hold(self.now())

    def grant_grace(self) -> Generator[None, None, int]:
        """The journal can write again: keys that were held, and would die sooner, live for the grace from now on.

        A slice at a time, O(log n) a key that it is granted to; the end of the grace in milliseconds. No call
        changes anything meanwhile.
        """
        until = round((self.now() + self._outage_grace) * 1000)
        while self.pool.grant(until / 1000, _GRANTED_AT_ONCE):
            yield
        return until

    def storage_is_back(self) -> None:
        """All is well again: keys expire, and who waited meanwhile is served."""
        self.pool.let_go()
        self.timers.settle_soon()
        self._serve_soon()

    def start(self) -> None:
        """Let deadlines have their timers. O(1/64 s in which some key has a deadline)."""
        self.timers.start(self.pool.deadline_buckets())

    def _lease(self, key: Key, now: float) -> Lease:
        assert key.release_deadline is not None
        release_in = _seconds(key.release_deadline - now)
        return Lease(key.id, key.text, key.lease, release_in, _seconds(key.expires_deadline - now))

    def _retry_after(self) -> float | None:
        seconds = self.pool.next_release(self.now())
        return None if seconds is None else _seconds(seconds)

    async def _pause(self) -> float:
        """Between two slices of a batch, let the loop serve other calls; when the next slice ends.

        A bare yield, on which a task and `http.api_call.CoroutineDriver` both go on later. Raises StorageUnavailable
        if storage failed meanwhile.
        """
        await asyncio.sleep(0)
        self._require_storage()
        return self.now() + _SLICE_SECONDS

    async def _next_turn(self) -> None:
        """Let the loop do its other work once. A future, so that whoever drives this need not be a task."""
        turn = self._loop.create_future()
        self._loop.call_soon(_done, turn)
        await turn

    # -- waiting

    async def _wait_for_key(self, owner: str | None, wait: float, timed: Timed | None) -> Lease | None:
        if self._draining:
            raise Draining
        if len(self._waiters) >= self._max_waiters:
            raise TooManyWaiters(self._max_waiters)
        waiter = Waiter(owner, self.now(), self._loop.create_future())
        waiter.timer = self.timers.after(wait, self._give_up, waiter)
        self._waiters[waiter] = None
        try:
            return await waiter.served
        except (GeneratorExit, asyncio.CancelledError):  # hung up: whoever drove this coroutine has closed it
            self._forget(waiter)
            raise
        finally:
            waited = self.now() - waiter.since
            self.wait_seconds.add(waited)
            if timed is not None:
                timed.waited += waited

    def _forget(self, waiter: Waiter) -> None:
        """A waiter hung up. If it was just being served, nobody will hear of that lease: take it back."""
        if waiter in self._waiters:
            del self._waiters[waiter]
            self.timers.cancel(waiter.timer)
            return
        if waiter.served.done() and not waiter.served.cancelled() and waiter.served.exception() is None:
            lease = waiter.served.result()
            if lease is not None:
                self._take_back(lease)

    def _take_back(self, lease: Lease) -> None:
        # Released and served again meanwhile, it isn't ours any more; with its expiry held, its block runs out.
        with contextlib.suppress(StaleLease, StorageUnavailable):
            key = self._find(lease.id, self.now())
            if key is not None:
                self._unblock(key, lease.lease)

    def _give_up(self, waiter: Waiter) -> None:
        waiter.timer = None  # fired; it holds the waiter, which mustn't hold it
        now = self.now()
        self.pool.settle(now)  # a block may have run out whose timer is late
        self._serve_waiters(now)
        if waiter not in self._waiters:
            return
        if self.storage_up() and not self.pool.held and self.pool.may_have_more(now):
            self._loop.call_soon(self._give_up, waiter)  # a crowd stands before a key that may be free
        else:
            del self._waiters[waiter]
            waiter.served.set_result(None)

    def _pop_waiter(self) -> Waiter:
        waiter, _ = self._waiters.popitem(last=False)
        self.timers.cancel(waiter.timer)
        return waiter

    def _serve_waiters(self, now: float) -> None:
        """Serve who waits, first come first served, as long as there are keys. O(log n) each."""
        while self._waiters and self.pool.available:
            if not self.storage_up():
                return  # `storage_is_back` comes here again
            owner = next(iter(self._waiters)).owner
            key = self.pool.acquire(now, owner)
            if key is None:
                if not self.pool.held:  # else `storage_is_back` does it
                    self._serve_soon()  # a crowd of expired keys
                return
            self._pop_waiter().served.set_result(self._lease(key, now))

    def _serve_soon(self) -> None:
        """Serve who waits in the next turn of the loop, if nobody does it before."""
        if not self._serving_soon:
            self._serving_soon = True
            self._loop.call_soon(self._go_on_serving)

    def _go_on_serving(self) -> None:
        self._serving_soon = False
        self._serve_waiters(self.now())

    # -- what the pool and the timers tell

    def _changed(self, change: Change, key: Key, owner: str | None) -> None:
        """The pool has changed a key. O(1)."""
        if self.journal is not None:
            self.journal.touch(key)
        if change is Change.KEPT_ALIVE:
            return
        self.events.append((change, key, owner, key.lease, self.now()))
        if self._waiters and change in _MAKES_AVAILABLE:
            self._serve_soon()

    def _settle_due(self) -> bool:
        """Deal with some of what is overdue; whether there is more. O(SETTLED_AT_ONCE)."""
        now = self.now()
        release, expiry = self.pool.next_release_deadline(), self.pool.next_expiry()
        if release is not None and release <= now:
            self.release_lateness.add(now - release)
        if expiry is not None and self.pool.overdue(now):
            self.expiry_lateness.add(now - expiry)
        self.pool.settle(now)
        self._serve_waiters(now)
        return self.pool.overdue(now) or self.pool.next_release(now) == 0


def _age(answer: Lease | Row, late: float) -> None:
    answer.expires_in = _less(answer.expires_in, late)
    if answer.release_in is not None:
        answer.release_in = _less(answer.release_in, late)


def _less(length: float, late: float) -> float:
    return max(0.0, _seconds(length - late)) if late else length


def _seconds(length: float) -> float:
    return round(length * 1000) / 1000  # a third of what it costs to have `round` do it


def _row(key: Key, now: float) -> Row:
    release_in = None if key.release_deadline is None else _seconds(key.release_deadline - now)
    state = State.AVAILABLE if release_in is None else State.BLOCKED
    return Row(
        key.id,
        key.hint,
        state,
        key.owner,
        key.lease or None,
        moment(key.created_at),
        _seconds(key.expires_deadline - now),
        release_in,
    )


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
