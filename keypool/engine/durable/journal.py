"""The journal of a data file: collects changes, has them committed in batches, and handles failures of the disk.

    touch(key) -> open changes -> sent to the writer process -> committed: the calls are answered
                      ^                      |
                      +---- not committed ---+   calls get StorageUnavailable; the batch is repeated

This is group commit. One batch is in flight at a time, and changes made meanwhile go into the next one. So all calls of
a turn of the loop, and those that come during the previous commit, share one fsync. A batch refers to keys, and is
encoded when it is sent: a key that changed twice is one row. A large batch is encoded in parts, one in each turn of the
loop, and still committed completely or not at all. A change made meanwhile may be in it, and is certainly in the next
one, which its call waits for.

All pools of the file share its batches, its writer and its outages. Each has a PoolJournal (pool_journal.py), which
collects the changed keys of the pool.

While batches fail, the pool in memory is ahead of the disk, calls that would change it are refused, and the batch is
repeated until it is committed. No answered change is lost, since it was on disk before it was answered. No key expires
meanwhile, since keepalives fail. When batches are committed again, the keys get a grace, which is on disk before
anything else is answered. `states.Storage` and `states.Activity` have the steps.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from keypool.core.errors import StartError, StorageUnavailable
from keypool.core.keys import Key
from keypool.engine.durable.datafile import GRACE
from keypool.engine.durable.pool_journal import PoolJournal
from keypool.engine.durable.rows import Batch, Past, Row, StoredPool, encode, prefix_of
from keypool.engine.durable.states import Activity, Life, Storage
from keypool.engine.durable.wire import Figures, HistoryReply, HistoryRequest, Kind, Verdict
from keypool.engine.durable.writer_link import WriterLink
from keypool.engine.journal import Commit, JournaledEngine
from keypool.engine.sealing import Sealer
from keypool.ops.histogram import ROWS, SECONDS, Histogram

_PART_ROWS = 5000  # rows encoded in one turn of the loop: about 4 ms
_SEALED_PART_ROWS = 800  # likewise, if they are sealed
_FIRST_BACK_OFF = 0.05  # seconds; doubled up to _LONGEST_BACK_OFF
_LONGEST_BACK_OFF = 1.0
_WATCH = 0.25  # seconds between two checks of the commit in flight
_SLOW = 0.5  # seconds that a commit may take before expiry is suspended: it may become an outage
_OUTAGE = 5.0  # seconds after which a commit is an outage
_UNSEEN = 2.0  # seconds without a commit after which the writer checks that the file is still there
_log = logging.getLogger("keypool.journal")


_IDLE = Activity.IDLE
_LIVING = (Life.OPENING, Life.OPEN)
_BUSY = frozenset({Activity.IN_FLIGHT, Activity.LOOKING, Activity.GRANTING, Activity.RESTARTING})


class _Changes:
    """What is committed together beside keys: numbers and definitions of pools. `commit` is what calls wait for."""

    __slots__ = ("commit", "numbers", "pools")

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.pools: dict[int, StoredPool] = {}
        self.commit: Commit | None = None


_Unsent = list[tuple[PoolJournal, Iterator[Key], int]]
"""What isn't sent yet of a batch that is sent in parts: for each pool the keys that are left, and how many."""


class FileJournal:
    """See the module. For use on its loop's thread only.

    `lock` is the descriptor of the file, from `file_lock.hold`. `close` and `abandon` close it. With a `sealer`, rows
    are sealed before they are sent.
    """

    def __init__(self, path: Path, lock: int, sealer: Sealer | None = None) -> None:
        self._pools: list[PoolJournal] = []
        self._gone: set[int] = set()  # numbers of pools that are gone, whose last changes aren't on disk yet
        self._sealer = sealer
        self._part_rows = _PART_ROWS if sealer is None else _SEALED_PART_ROWS
        self._path = path
        self._lock = lock
        self._loop = asyncio.get_running_loop()
        self._writer: WriterLink | None = None
        self._life = Life.OPENING
        self.activity = Activity.IDLE
        self._storage = Storage.UP
        self.next_batch = _Changes()
        self.sent_batch = _Changes()  # the one in flight
        self._rest: _Unsent | None = None  # of a batch that is sent in parts
        self._paused = 0  # calls between two of their slices
        self._grant: Iterator[None] | None = None  # gives keys their grace, in slices
        self._errand: tuple[Kind, bytes, Commit] | None = None  # a request that is sent between two batches
        self._back_off = _FIRST_BACK_OFF
        self._back_off_timer: asyncio.TimerHandle | None = None
        self._restart_task: asyncio.Task[None] | None = None
        self._watch_timer: asyncio.TimerHandle | None = None
        self._watch_due = 0.0
        self._settled: asyncio.Future[None] | None = None  # `close` waits for the next step
        self._sent_at = time.monotonic()
        self._part_sent_at = self._sent_at
        self._failing_since = 0.0
        self._figures = Figures(0, 0, 0)
        self._writer_restarts = 0
        self.before_close: Callable[[], object] = lambda: None
        self.last_pool = 0  # the largest number of a pool that there ever was
        self.failing: str | None = None
        self.commit_seconds = Histogram(SECONDS)
        self.commit_rows = Histogram(ROWS)

    # -- the pools

    def join(self, number: int, engine: JournaledEngine) -> PoolJournal:
        """The journal of the pool with this number, which has no key that isn't in the file. O(1)."""
        pool = PoolJournal(self, number, engine, self._sealer)
        self._pools.append(pool)
        self.last_pool = max(self.last_pool, number)
        if self._storage is not Storage.UP:
            engine.suspend_expiry()
        return pool

    def define(self, definition: StoredPool) -> Commit:
        """Put the definition of a pool into the next batch. The numbers of one without a name are forgotten. O(1)."""
        self.next_batch.pools[definition.number] = definition
        if definition.name is None:
            self._gone.add(definition.number)
        if self.activity is _IDLE:
            self.schedule()
        return self.open_commit()

    def put_numbers(self, numbers: Mapping[str, int]) -> Commit:
        """Put numbers into the next batch, by their names in the file. O(numbers)."""
        self.next_batch.numbers |= numbers
        if self.activity is _IDLE:
            self.schedule()
        return self.open_commit()

    def commit_of_all(self) -> Commit | None:
        """The commit with which all changes of all pools are on disk; None if they are. O(pools)."""
        if self._has_open():
            return self.open_commit()
        return self.sent_batch.commit

    # -- what concerns all pools alike, see the protocol `engine.journal.Journal`

    def require(self) -> None:
        """Raise StorageUnavailable while batches fail."""
        if self.failing is not None:
            raise self._unavailable()

    def unknown_outcome(self) -> StorageUnavailable:
        """The error for a call about a key whose expiry is suspended."""
        if self.failing is not None:
            return self._unavailable()
        return StorageUnavailable("whether this key has expired is unknown until the current commit is done")

    def pause(self) -> None:
        """A call is between two slices, and awaits a commit when all are done."""
        self._paused += 1

    def resume(self) -> None:
        """Its next slice begins, or it has failed."""
        self._paused -= 1
        if self.activity is _IDLE and self._has_open():
            self.schedule()

    def histograms(self) -> dict[str, Histogram]:
        """Seconds and rows of each commit."""
        return {"commit_seconds": self.commit_seconds, "commit_rows": self.commit_rows}

    def measures(self) -> Mapping[str, float | Mapping[str, float]]:
        """The age of a commit, the length of an outage, restarts of the writer, sizes on the disk."""
        figures, now = self._figures, time.monotonic()
        return {
            "keypool_commit_age_seconds": now - self._sent_at if self.activity is Activity.IN_FLIGHT else 0.0,
            "keypool_storage_failing_seconds": 0.0 if self.failing is None else now - self._failing_since,
            "keypool_writer_restarts_total": self._writer_restarts,
            "keypool_data_file_bytes": {"data": figures.data, "log": figures.log},
            "keypool_disk_free_bytes": figures.free,
        }

    def open_commit(self) -> Commit:
        """The commit of the next batch. O(1)."""
        commit = self.next_batch.commit
        if commit is None:
            commit = self.next_batch.commit = Commit(self._loop)
            if self.failing is not None:
                commit.finish(self._unavailable())
            elif self.activity is _IDLE:
                self.schedule()
        return commit

    def _has_open(self) -> bool:
        """Whether there are changes that aren't sent yet. O(pools)."""
        if self.next_batch.numbers or self.next_batch.pools:
            return True
        return any(pool.has_open for pool in self._pools)

    def _has_unkept(self) -> bool:
        """Whether there are changes, sent or not, that aren't known to be on the disk. O(pools)."""
        sent = self.sent_batch
        if sent.numbers or sent.pools or self._has_open():
            return True
        return any(pool.has_sent for pool in self._pools)

    def _unavailable(self) -> StorageUnavailable:
        return StorageUnavailable(
            f"the data file can't be written ({self.failing}); calls that change nothing are served"
        )

    # -- opening

    async def open(self) -> None:
        """Start the writer, and have it open the file and check that it can be written. Raises StartError."""
        try:
            self._writer = await self._new_writer()
        except OSError as error:
            reason = error.strerror or error
            raise StartError(
                f"the data file {self._path} can't be written: no writer process: {reason}"
            ) from None
        await self._request(Kind.PROBE)

    async def start(self, grace_until: float | None, secrets: Mapping[str, bytes] | None = None) -> None:
        """Commit the end of the restart grace (seconds since the epoch), if any, and begin. Raises StartError.

        Before it, commits these `secrets` of the file.
        """
        if secrets:
            await self._request(Kind.SECRETS, encode(secrets))
        if grace_until is not None:
            await self._request(Kind.GRACE, encode(round(grace_until * 1000)))
        self._life = Life.OPEN
        self._watch()

    async def _new_writer(self) -> WriterLink:
        writer = await WriterLink.start(self._path, self._lock, self._answered, self._lost)
        writer.drained = self._send_rest
        return writer

    async def _request(self, kind: Kind, content: bytes = b"") -> None:
        assert self._writer is not None
        self.activity = Activity.IN_FLIGHT
        commit = self.sent_batch.commit = Commit(self._loop)
        self._sent_at = time.monotonic()
        self._writer.send(kind, content)
        try:
            await commit
        except StorageUnavailable:
            self._life = Life.CLOSING
            raise StartError(f"the data file {self._path} can't be written: {self.failing}") from None

    # -- batches

    def schedule(self) -> None:
        """Send what has changed at the end of this turn of the loop. Call it only while the activity is IDLE. O(1)."""
        self.activity = Activity.SCHEDULED
        self._loop.call_soon(self._send)

    def _send(self) -> None:
        """Send the open changes, unless the writer is busy or dead. O(keys), in parts of _PART_ROWS."""
        if self.activity in _BUSY or self._writer is None or self._writer.dead:
            return
        if self._errand is not None and self._storage is Storage.UP and self._life is Life.OPEN:
            self._send_errand(*self._errand)
            return
        changes = self.next_batch
        changed = [pool for pool in self._pools if pool.has_open]
        has_open = changed or changes.numbers or changes.pools
        # While batches fail, even an empty one is sent, to find out whether they still do.
        if not (has_open or self.failing is not None or self._life is Life.CLOSING):
            self.activity = Activity.IDLE
            return
        # A commit for each slice of a call would cost a third of the rate of such calls.
        awaited = changes.commit is not None or changes.numbers or changes.pools
        if self._paused and not awaited and self._storage is Storage.UP and self._life is Life.OPEN:
            self.activity = Activity.IDLE
            return
        self.activity = Activity.IN_FLIGHT
        self.sent_batch, self.next_batch = changes, _Changes()
        if changes.commit is None:
            changes.commit = Commit(self._loop)
        self._sent_at = time.monotonic()
        unsent: _Unsent = []
        for pool in changed:
            pool.begin_batch()
            unsent.append((pool, iter(pool.sent.values()), len(pool.sent)))
        self._send_part(unsent[::-1])

    def _send_part(self, unsent: _Unsent) -> None:
        """Send the next part of a batch, and the one after it when the socket isn't full. O(_PART_ROWS)."""
        assert self._writer is not None
        self._part_sent_at = time.monotonic()
        rows: list[Row] = []
        purged: list[int] = []
        room = self._part_rows
        while unsent and room:
            pool, keys, left = unsent.pop()
            pool.take(islice(keys, room), rows, purged)
            if left > room:
                unsent.append((pool, keys, left - room))
            room -= min(room, left)
        if unsent:
            self._writer.send(Kind.PART, encode(Batch(rows, purged)))
            self._rest = unsent
            if not self._writer.full:
                self._loop.call_soon(self._send_rest)
            return
        # Leases that have ended come last: ten thousand take 2 ms.
        past = [past for pool in self._pools if pool.sent for past in pool.history.sent]
        lasting = [pool for pool in self._pools if pool.sent_events and pool.number not in self._gone]
        events = [row for pool in lasting for row in pool.event_rows()]
        definitions = [*self.sent_batch.pools.values()]
        self._writer.send(Kind.BATCH, encode(Batch(rows, purged, self._numbers(), definitions, past, events)))

    def _numbers(self) -> dict[str, int]:
        """The numbers of this batch. They are read last, so that no part contains a larger id or lease."""
        numbers: dict[str, int] = {}
        for pool in self._pools:
            # `moment`, which is of all pools, comes with `default`. Another definition may shorten a history.
            defined = self._life is Life.CLOSING or pool.number in self.sent_batch.pools
            if pool.sent or not pool.number or (defined and pool.number not in self._gone):
                numbers |= pool.numbers()
            if pool.grace is not None:
                numbers[prefix_of(pool.number) + GRACE] = pool.grace
        return numbers | self.sent_batch.numbers if self.sent_batch.numbers else numbers

    def _send_rest(self) -> None:
        rest, self._rest = self._rest, None
        if rest is not None:
            self._send_part(rest)

    def _answered(self, verdict: Verdict) -> None:
        if verdict.figures is not None:
            self._figures = verdict.figures
        if verdict.error is not None:
            self._failed(verdict.error)
            return
        sent, self.sent_batch = self.sent_batch, _Changes()
        seconds = time.monotonic() - self._sent_at
        rows = sum([pool.kept() for pool in self._pools if pool.has_sent])
        if self.activity is not Activity.LOOKING:
            self.commit_seconds.add(seconds)
            self.commit_rows.add(rows)
        self.activity = Activity.IDLE
        if self._storage is not Storage.UP:
            self._recovering(seconds)
        postponed = None if verdict.postponed is None else StorageUnavailable(verdict.postponed)
        if self._errand is not None and self._errand[2] is sent.commit:
            self._errand = None
        if self._gone:
            self._forget_gone()
        if self._errand is not None or self._has_open():
            self._send()  # first, so that the next fsync overlaps with sending the answers
        if sent.commit is not None:
            sent.commit.finish(postponed)
        self._stepped()

    def _forget_gone(self) -> None:
        """Forget pools that are gone, as soon as their last changes are on disk."""
        gone = {
            pool for pool in self._pools if pool.number in self._gone and not (pool.has_open or pool.has_sent)
        }
        self._pools = [pool for pool in self._pools if pool not in gone]
        self._gone -= {pool.number for pool in gone}

    # -- failures and recovery

    def _failed(self, reason: str) -> None:
        """The request in flight failed, or its outcome is unknown: its changes go into the next batch."""
        self._go_down(reason)
        sent, self.sent_batch, self._rest = self.sent_batch, _Changes(), None
        for pool in self._pools:
            pool.not_kept()
        self.next_batch.numbers = {**sent.numbers, **self.next_batch.numbers}
        self.next_batch.pools = {**sent.pools, **self.next_batch.pools}
        self.activity = Activity.BACKING_OFF
        if self._life in _LIVING and self._back_off_timer is None:
            self._back_off_timer = self._loop.call_later(self._back_off, self._try_again)
            self._back_off = min(2 * self._back_off, _LONGEST_BACK_OFF)
        self._fail_calls(sent.commit)
        self._stepped()

    def _go_down(self, reason: str) -> None:
        if self.failing is None:
            self._failing_since = time.monotonic()
            if self._life is not Life.OPENING:
                _log.error("the data file can't be written: %s; calls that change something get 503", reason)
        self.failing = reason
        self._storage = Storage.DOWN
        if self._errand is not None:
            self._errand[2].finish(self._unavailable())
        self._grant = self._errand = None
        for pool in self._pools:
            pool.grace = None
            pool.engine.suspend_expiry()

    def _fail_calls(self, sent: Commit | None) -> None:
        for commit in (sent, self.next_batch.commit):
            if commit is not None:
                commit.finish(self._unavailable())

    def _try_again(self) -> None:
        self._back_off_timer = None
        if self._writer is None or self.activity is not Activity.BACKING_OFF or self._life not in _LIVING:
            return
        if self._writer.dead:
            self.activity = Activity.RESTARTING
            self._restart_task = self._loop.create_task(self._restart(self._writer))
        else:
            self._send_again()

    async def _restart(self, dead: WriterLink) -> None:
        """Replace a dead writer. Never raises, because `close` waits for the next step."""
        try:
            await dead.reap()
            self._writer = await self._new_writer()
        except Exception as error:
            if not isinstance(error, OSError):
                _log.exception("the writer could not be started again")
            self.activity = Activity.IDLE
            self._failed(f"no writer process: {error}")
            return
        self._writer_restarts += 1
        self.activity = Activity.IDLE
        self._send_again()
        self._stepped()

    def _send_again(self) -> None:
        self.next_batch.commit = None  # it has failed; calls from now on wait for another
        self._send()

    def _lost(self) -> None:
        if self._life is not Life.ENDED:
            self._failed("the writer process died and is started again")

    def _recovering(self, seconds: float) -> None:
        """A request succeeded after `seconds`, and storage isn't UP: go on towards UP."""
        granted = self._storage is Storage.GRANTING and seconds <= _OUTAGE
        if self._storage is not Storage.SLOW and not granted:
            self._storage, self.activity = Storage.GRANTING, Activity.GRANTING
            self._cancel_back_off()
            self._grant = self._grant_graces()
            self._loop.call_soon(self._grant_slice)
            return
        if granted:
            _log.warning("the data file can be written again")
            self.next_batch.commit = None
        self.failing, self._back_off = None, _FIRST_BACK_OFF
        self._storage = Storage.UP
        for pool in self._pools:
            pool.grace = None
            pool.engine.on_recovered()

    def _grant_graces(self) -> Iterator[None]:
        """Give the keys of all pools their grace, in slices."""
        for pool in self._pools:
            pool.grace = yield from pool.engine.grant_grace()

    def _grant_slice(self) -> None:
        """Give the next slice of keys their grace; after the last one, send it with all open changes."""
        if self._grant is None:
            return
        try:
            next(self._grant)
        except StopIteration:
            self._grant = None
            self.activity = Activity.IDLE
            self._send_again()
            self._stepped()
        else:
            self._loop.call_soon(self._grant_slice)

    def _cancel_back_off(self) -> None:
        if self._back_off_timer is not None:
            self._back_off_timer.cancel()
            self._back_off_timer = None

    # -- the watch over a commit that takes too long

    def _watch(self) -> None:
        now = time.monotonic()
        if now - self._watch_due < _SLOW or not self._watch_due:
            self._judge(now)
        # Otherwise the loop itself was blocked: the verdict may have arrived, and be read in this turn.
        self._watch_due = now + _WATCH
        self._watch_timer = self._loop.call_later(_WATCH, self._watch)

    def _judge(self, now: float) -> None:
        waited = now - self._part_sent_at
        if self.activity is Activity.IDLE:
            if self._storage is Storage.UP and now - self._sent_at > _UNSEEN:
                self._look(now)
        elif self.activity in (Activity.IN_FLIGHT, Activity.LOOKING):
            commit = self.sent_batch.commit
            if waited > _OUTAGE:
                if commit is not None and not commit.done():  # fail it once
                    self._go_down(f"a commit has taken over {_OUTAGE:.0f} s")
                    self._fail_calls(commit)
            elif waited > _SLOW and self._storage is Storage.UP:
                self._storage = Storage.SLOW
                for pool in self._pools:
                    pool.engine.suspend_expiry()

    def _look(self, now: float) -> None:
        """Have the writer check that the file is still there. No call waits for it."""
        if self._writer is None or self._writer.dead or self._life is not Life.OPEN:
            return
        self.activity = Activity.LOOKING
        self.sent_batch.commit = Commit(self._loop)
        self._sent_at = self._part_sent_at = now
        self._writer.send(Kind.LOOK)

    def ask(self, kind: Kind, content: bytes) -> Commit:
        """Send a request to the writer between two batches, which wait for it. One at a time. O(1).

        The commit raises StorageUnavailable also if the writer postpones it.
        """
        commit = Commit(self._loop)
        if self.failing is not None:
            commit.finish(self._unavailable())
        else:
            self._errand = kind, content, commit
            if self.activity is _IDLE:
                self.schedule()
        return commit

    def _send_errand(self, kind: Kind, content: bytes, commit: Commit) -> None:
        assert self._writer is not None
        self.activity = Activity.LOOKING
        self.sent_batch.commit = commit
        self._sent_at = self._part_sent_at = time.monotonic()
        self._writer.send(kind, content)

    # -- reading

    async def read(self, request: HistoryRequest) -> list[Past]:
        """A page of a key's history, as of the last commit. O(log n + page) in the writer process.

        It waits for the commit in flight, but not for storage to work again. Raises StorageUnavailable.
        """
        writer = self._writer
        if writer is None or writer.dead:
            raise StorageUnavailable("the history can't be read: the writer process is started again")
        page = writer.ask(request)
        timer = self._loop.call_later(_OUTAGE, _give_up, page)
        try:
            reply = await page
        except ConnectionError as error:
            raise StorageUnavailable(f"the history can't be read: {error}") from None
        finally:
            timer.cancel()
        if reply.error is not None:
            raise StorageUnavailable(f"the history can't be read ({reply.error})")
        return reply.leases

    # -- the end

    async def abandon(self) -> None:
        """End the writer and leave a file that was refused as it is."""
        self._life = Life.ENDED
        if self._writer is not None:
            await self._writer.reap()
        os.close(self._lock)

    async def close(self) -> None:
        """Commit all changes, have the file closed cleanly, and end the writer.

        Raises StorageUnavailable if not all changes could be committed, or not before this was cancelled. The writer is
        killed if it hasn't ended by then.
        """
        if self._writer is None:
            return
        self.before_close()
        self._errand = None
        self._life = Life.CLOSING
        written = False
        try:
            self._cancel_back_off()
            await self._until_settled()
            self._send()
            await self._until_settled()
            self._life = Life.ENDED
            written = self.failing is None and not self._has_open()
            if written:
                await self._writer.end()
        except asyncio.CancelledError:
            self._life = Life.ENDED
            # Counters that were in flight alone are not worth an alarm.
            written = self.failing is None and not self._has_unkept()
            if self._restart_task is not None:  # it must not use the lock any more
                self._restart_task.cancel()
                await asyncio.wait([self._restart_task])
            self._writer.kill()
        else:
            await self._writer.reap()
        if self._watch_timer is not None:
            self._watch_timer.cancel()
        os.close(self._lock)
        if not written:
            raise StorageUnavailable(
                f"the last commit was not made ({self.failing or 'it is still in flight'})"
            )

    def _stepped(self) -> None:
        if self._settled is not None and not self._settled.done():
            self._settled.set_result(None)

    async def _until_settled(self) -> None:
        """Wait until nothing is in flight, no grace is being granted and no writer is being started."""
        while self.activity in _BUSY:
            self._settled = self._loop.create_future()
            await self._settled


def _give_up(page: asyncio.Future[HistoryReply]) -> None:
    if not page.done():
        page.set_exception(ConnectionError(f"no answer within {_OUTAGE:.0f} s"))
