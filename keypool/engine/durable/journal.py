"""The journal of a data file: collects changes, has them committed in batches, and handles failures of the disk.

    touch(key) -> open changes -> sent to the writer process -> committed: the calls are answered
                      ^                      |
                      +---- not committed ---+   calls get StorageUnavailable; the batch is repeated

This is group commit. One batch is in flight at a time, and changes made meanwhile go into the next one. So all calls of
a turn of the loop, and those that come during the previous commit, share one fsync. A batch refers to keys, and is
encoded when it is sent: a key that changed twice is one row. A large batch is encoded in parts, one in each turn of the
loop, and still committed completely or not at all. A change made meanwhile may be in it, and is certainly in the next
one, which its call waits for.

While batches fail, the pool in memory is ahead of the disk, calls that would change it are refused, and the batch is
repeated until it is committed. No answered change is lost, since it was on disk before it was answered. No key expires
meanwhile, since keepalives fail. When batches are committed again, the keys get a grace, which is on disk before
anything else is answered. `Storage` and `Activity` have the steps.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import time
from collections.abc import Generator, Iterator, Mapping
from itertools import islice
from pathlib import Path

from keypool.core.errors import StartError, StorageUnavailable
from keypool.core.keys import DEAD, Key
from keypool.engine import NOTE
from keypool.engine.durable import datafile
from keypool.engine.durable.rows import Batch, encode, row_of
from keypool.engine.durable.wire import Figures, Kind, Verdict
from keypool.engine.durable.writer_link import WriterLink
from keypool.engine.journal import Commit, JournaledEngine
from keypool.ops.histogram import ROWS, SECONDS, Histogram

_PART_ROWS = 5000  # rows encoded in one turn of the loop: about 4 ms
_FIRST_BACK_OFF = 0.05  # seconds; doubled up to _LONGEST_BACK_OFF
_LONGEST_BACK_OFF = 1.0
_WATCH = 0.25  # seconds between two checks of the commit in flight
_SLOW = 0.5  # seconds that a commit may take before expiry is suspended: it may become an outage
_OUTAGE = 5.0  # seconds after which a commit is an outage
_IDLE = 2.0  # seconds without a commit after which the writer checks that the file is still there
_log = logging.getLogger("keypool.journal")


class Storage(enum.Enum):
    """The health of storage.

    | from           | to       | when                                                    |
    | -------------- | -------- | ------------------------------------------------------- |
    | UP             | SLOW     | a commit has taken _SLOW seconds                        |
    | SLOW           | UP       | that commit is done                                     |
    | any            | DOWN     | an error, the writer died, or a commit took _OUTAGE s   |
    | DOWN           | GRANTING | a batch is committed                                    |
    | GRANTING       | UP       | the grace is committed, within _OUTAGE seconds          |

    Expiry is suspended in all states but UP. In DOWN and GRANTING (`failing` is not None), calls that change something
    are refused.
    """

    UP = enum.auto()
    SLOW = enum.auto()
    DOWN = enum.auto()
    GRANTING = enum.auto()


class Activity(enum.Enum):
    """What the journal is doing with its writer.

    | from                      | to                | when                                                      |
    | ------------------------- | ----------------- | --------------------------------------------------------- |
    | IDLE                      | SCHEDULED         | a change: it is sent at the end of this turn              |
    | IDLE                      | LOOKING           | no commit for _IDLE seconds                               |
    | SCHEDULED                 | IDLE              | no call waits yet, and a call in slices changes more      |
    | SCHEDULED                 | IN_FLIGHT         | the batch is sent, or its first part                      |
    | IN_FLIGHT, LOOKING        | IN_FLIGHT or IDLE | success, and there are or aren't other changes            |
    | IN_FLIGHT, LOOKING        | GRANTING          | success after an outage: each key gets the grace          |
    | GRANTING                  | IN_FLIGHT         | all keys have it: it is sent with all changes             |
    | any but RESTARTING        | BACKING_OFF       | the writer reports an error, or dies                      |
    | BACKING_OFF               | IN_FLIGHT         | the back-off is over: the batch is repeated               |
    | BACKING_OFF               | RESTARTING        | the back-off is over, and the writer is dead              |
    | RESTARTING                | IN_FLIGHT         | another writer was started: the batch is repeated         |
    | RESTARTING                | BACKING_OFF       | no writer could be started                                |

    A batch whose commit hangs stays IN_FLIGHT: the journal waits for its verdict, but calls don't. `close` waits while
    the activity is IN_FLIGHT, LOOKING, GRANTING or RESTARTING.
    """

    IDLE = enum.auto()
    SCHEDULED = enum.auto()
    IN_FLIGHT = enum.auto()
    LOOKING = enum.auto()
    GRANTING = enum.auto()
    BACKING_OFF = enum.auto()
    RESTARTING = enum.auto()


class Life(enum.Enum):
    """The life of the journal; each step happens once. In ENDED, the end of the writer is expected."""

    OPENING = enum.auto()
    OPEN = enum.auto()
    CLOSING = enum.auto()
    ENDED = enum.auto()


_IDLE_ACTIVITY = Activity.IDLE  # compared at every change: saves an attribute look-up
_LIVING = (Life.OPENING, Life.OPEN)
_BUSY = frozenset({Activity.IN_FLIGHT, Activity.LOOKING, Activity.GRANTING, Activity.RESTARTING})


class _Changes:
    """Changes that are committed together: keys by id, and notes. `commit` is what calls wait for."""

    __slots__ = ("commit", "keys", "notes")

    def __init__(self) -> None:
        self.keys: dict[int, Key] = {}
        self.notes: dict[str, int] = {}
        self.commit: Commit | None = None


class FileJournal:
    """See the module, and the protocol `engine.journal.Journal` for the calls. For use on its loop's thread only.

    `lock` is the descriptor of the file, from `file_lock.hold`. `close` and `abandon` close it.
    """

    def __init__(self, path: Path, lock: int, engine: JournaledEngine) -> None:
        self._engine = engine
        self._path = path
        self._lock = lock
        self._loop = asyncio.get_running_loop()
        self._writer: WriterLink | None = None
        self._life = Life.OPENING
        self._activity = Activity.IDLE
        self._storage = Storage.UP
        self._open = _Changes()  # since the last batch was sent
        self._sent = _Changes()  # in the batch in flight
        self._rest: tuple[Iterator[Key], int] | None = None  # of a batch that is sent in parts, and how many
        self._paused = 0  # calls between two of their slices
        self._purged: dict[str, int] = {}  # ids by text of keys whose purge isn't on disk yet
        self._grant: Generator[None, None, int] | None = None  # gives keys their grace, in slices
        self._grace: int | None = None  # its end: in the next batch, or in the one in flight
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
        self.failing: str | None = None
        self.commit_seconds = Histogram(SECONDS)
        self.commit_rows = Histogram(ROWS)

    # -- the engine's calls, see the protocol

    def require(self) -> None:
        """Raise StorageUnavailable while batches fail."""
        if self.failing is not None:
            raise self._unavailable()

    def unknown_outcome(self) -> StorageUnavailable:
        """The error for a call about a key whose expiry is suspended."""
        if self.failing is not None:
            return self._unavailable()
        return StorageUnavailable("whether this key has expired is unknown until the current commit is done")

    def touch(self, key: Key) -> None:
        """Put a key that was changed or purged into the next batch."""
        self._open.keys[key.id] = key
        if key.expires_deadline == DEAD:
            self._purged[key.text] = key.id
        if self._activity is _IDLE_ACTIVITY:
            self._schedule()

    def pause(self) -> None:
        """A call is between two slices, and awaits a commit when all are done."""
        self._paused += 1

    def resume(self) -> None:
        """Its next slice begins, or it has failed."""
        self._paused -= 1
        if self._open.keys and self._activity is _IDLE_ACTIVITY:
            self._schedule()

    def note(self, notes: Mapping[str, int | None]) -> Commit:
        """Put notes into the next batch."""
        self._open.notes |= {NOTE + name: value or 0 for name, value in notes.items()}
        if self._activity is _IDLE_ACTIVITY:
            self._schedule()
        return self._open_commit()

    def commit_of(self, id: int) -> Commit | None:
        """The commit to await before answering about this key."""
        if id in self._open.keys:
            return self._open.commit or self._open_commit()
        return self._sent.commit if id in self._sent.keys else None

    def commit_of_text(self, text: str) -> Commit | None:
        """The commit of the purge of the key with this text."""
        id = self._purged.get(text)
        return None if id is None else self.commit_of(id)

    def commit_of_all(self) -> Commit | None:
        """The commit to await before answering about the pool as a whole."""
        return self._open_commit() if self._open.keys else self._sent.commit

    def histograms(self) -> dict[str, Histogram]:
        """Seconds and rows of each commit."""
        return {"commit_seconds": self.commit_seconds, "commit_rows": self.commit_rows}

    def measures(self) -> Mapping[str, float | Mapping[str, float]]:
        """The age of a commit, the length of an outage, restarts of the writer, sizes on the disk."""
        figures, now = self._figures, time.monotonic()
        return {
            "keypool_commit_age_seconds": now - self._sent_at
            if self._activity is Activity.IN_FLIGHT
            else 0.0,
            "keypool_storage_failing_seconds": 0.0 if self.failing is None else now - self._failing_since,
            "keypool_writer_restarts_total": self._writer_restarts,
            "keypool_data_file_bytes": {"data": figures.data, "log": figures.log},
            "keypool_disk_free_bytes": figures.free,
        }

    def _open_commit(self) -> Commit:
        commit = self._open.commit
        if commit is None:
            commit = self._open.commit = Commit(self._loop)
            if self.failing is not None:
                commit.finish(self._unavailable())
            elif self._activity is _IDLE_ACTIVITY:
                self._schedule()
        return commit

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

    async def start(self, grace_until: float | None) -> None:
        """Commit the end of the restart grace (seconds since the epoch), if any, and begin. Raises StartError."""
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
        self._activity = Activity.IN_FLIGHT
        commit = self._sent.commit = Commit(self._loop)
        self._sent_at = time.monotonic()
        self._writer.send(kind, content)
        try:
            await commit
        except StorageUnavailable:
            self._life = Life.CLOSING
            raise StartError(f"the data file {self._path} can't be written: {self.failing}") from None

    # -- batches

    def _schedule(self) -> None:
        self._activity = Activity.SCHEDULED
        self._loop.call_soon(self._send)

    def _send(self) -> None:
        """Send the open changes, unless the writer is busy or dead. O(keys), in parts of _PART_ROWS."""
        if self._activity in _BUSY or self._writer is None or self._writer.dead:
            return
        changes = self._open
        # While batches fail, even an empty one is sent, to find out whether they still do.
        if not (changes.keys or changes.notes or self.failing is not None or self._life is Life.CLOSING):
            self._activity = Activity.IDLE
            return
        # A commit for each slice of a call would cost a third of the rate of such calls.
        awaited = changes.commit is not None or changes.notes
        if self._paused and not awaited and self._storage is Storage.UP and self._life is Life.OPEN:
            self._activity = Activity.IDLE
            return
        self._activity = Activity.IN_FLIGHT
        self._sent, self._open = changes, _Changes()
        if changes.commit is None:
            changes.commit = Commit(self._loop)
        self._sent_at = time.monotonic()
        self._send_part(iter(changes.keys.values()), len(changes.keys))

    def _send_part(self, keys: Iterator[Key], left: int) -> None:
        """Send the next part of a batch, and the one after it when the socket isn't full. O(_PART_ROWS)."""
        assert self._writer is not None
        self._part_sent_at = time.monotonic()
        rows, purged = [], []
        for key in islice(keys, _PART_ROWS):
            if key.expires_deadline == DEAD:
                purged.append(key.id)
            else:
                rows.append(row_of(key))
        left -= _PART_ROWS
        if left > 0:
            self._writer.send(Kind.PART, encode(Batch(rows, purged)))
            self._rest = keys, left
            if not self._writer.full:
                self._loop.call_soon(self._send_rest)
            return
        # The numbers are read last, so that no part contains a larger id or lease.
        numbers = self._engine.numbers()
        if self._sent.notes:
            numbers |= self._sent.notes
        if self._grace is not None:
            numbers[datafile.GRACE] = self._grace
        self._writer.send(Kind.BATCH, encode(Batch(rows, purged, numbers)))

    def _send_rest(self) -> None:
        rest, self._rest = self._rest, None
        if rest is not None:
            self._send_part(*rest)

    def _answered(self, verdict: Verdict) -> None:
        if verdict.figures is not None:
            self._figures = verdict.figures
        if verdict.error is not None:
            self._failed(verdict.error)
            return
        sent, self._sent = self._sent, _Changes()
        seconds = time.monotonic() - self._sent_at
        if self._purged:
            for id, key in sent.keys.items():
                if key.expires_deadline == DEAD and id not in self._open.keys:
                    self._purged.pop(key.text, None)
        if self._activity is not Activity.LOOKING:
            self.commit_seconds.add(seconds)
            self.commit_rows.add(len(sent.keys))
        self._activity = Activity.IDLE
        if self._storage is not Storage.UP:
            self._recovering(seconds)
        if self._open.keys or self._open.notes:
            self._send()  # first, so that the next fsync overlaps with sending the answers
        if sent.commit is not None:
            sent.commit.finish()
        self._stepped()

    # -- failures and recovery

    def _failed(self, reason: str) -> None:
        """The request in flight failed, or its outcome is unknown: its changes go into the next batch."""
        self._go_down(reason)
        sent, self._sent, self._rest = self._sent, _Changes(), None
        self._open.keys = {**sent.keys, **self._open.keys}
        self._open.notes = {**sent.notes, **self._open.notes}
        self._activity = Activity.BACKING_OFF
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
        self._grant = self._grace = None
        self._engine.suspend_expiry()

    def _fail_calls(self, sent: Commit | None) -> None:
        for commit in (sent, self._open.commit):
            if commit is not None:
                commit.finish(self._unavailable())

    def _try_again(self) -> None:
        self._back_off_timer = None
        if self._writer is None or self._activity is not Activity.BACKING_OFF or self._life not in _LIVING:
            return
        if self._writer.dead:
            self._activity = Activity.RESTARTING
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
            self._activity = Activity.IDLE
            self._failed(f"no writer process: {error}")
            return
        self._writer_restarts += 1
        self._activity = Activity.IDLE
        self._send_again()
        self._stepped()

    def _send_again(self) -> None:
        self._open.commit = None  # it has failed; calls from now on wait for another
        self._send()

    def _lost(self) -> None:
        if self._life is not Life.ENDED:
            self._failed("the writer process died and is started again")

    def _recovering(self, seconds: float) -> None:
        """A request succeeded after `seconds`, and storage isn't UP: go on towards UP."""
        granted = self._storage is Storage.GRANTING and seconds <= _OUTAGE
        if self._storage is not Storage.SLOW and not granted:
            self._storage, self._activity = Storage.GRANTING, Activity.GRANTING
            self._grace = None
            self._cancel_back_off()
            self._grant = self._engine.grant_grace()
            self._loop.call_soon(self._grant_slice)
            return
        if granted:
            _log.warning("the data file can be written again")
            self._open.commit = None
        self.failing, self._grace, self._back_off = None, None, _FIRST_BACK_OFF
        self._storage = Storage.UP
        self._engine.on_recovered()

    def _grant_slice(self) -> None:
        """Give the next slice of keys their grace; after the last one, send it with all open changes."""
        if self._grant is None:
            return
        try:
            next(self._grant)
        except StopIteration as end:
            self._grant, self._grace = None, end.value
            self._activity = Activity.IDLE
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
        if self._activity is Activity.IDLE:
            if self._storage is Storage.UP and now - self._sent_at > _IDLE:
                self._look(now)
        elif self._activity in (Activity.IN_FLIGHT, Activity.LOOKING):
            commit = self._sent.commit
            if waited > _OUTAGE:
                if commit is not None and not commit.done():  # fail it once
                    self._go_down(f"a commit has taken over {_OUTAGE:.0f} s")
                    self._fail_calls(commit)
            elif waited > _SLOW and self._storage is Storage.UP:
                self._storage = Storage.SLOW
                self._engine.suspend_expiry()

    def _look(self, now: float) -> None:
        """Have the writer check that the file is still there. No call waits for it."""
        if self._writer is None or self._writer.dead or self._life is not Life.OPEN:
            return
        self._activity = Activity.LOOKING
        self._sent.commit = Commit(self._loop)
        self._sent_at = self._part_sent_at = now
        self._writer.send(Kind.LOOK)

    # -- the end

    async def abandon(self) -> None:
        """End the writer and leave a file that was refused as it is."""
        self._life = Life.ENDED
        if self._writer is not None:
            await self._writer.reap()
        os.close(self._lock)

    async def close(self) -> None:
        """Commit all changes, have the file closed cleanly, and end the writer.

        Kills the writer and raises StorageUnavailable if not all changes could be committed, or not before this was
        cancelled.
        """
        if self._writer is None:
            return
        self._life = Life.CLOSING
        written = False
        try:
            self._cancel_back_off()
            await self._until_settled()
            self._send()
            await self._until_settled()
            self._life = Life.ENDED
            written = self.failing is None and not self._open.keys and not self._open.notes
            if written:
                await self._writer.end()
        except asyncio.CancelledError:
            self._life = Life.ENDED
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
        while self._activity in _BUSY:
            self._settled = self._loop.create_future()
            await self._settled
