"""The server's side of durability: what has changed, when it is on disk, and what to do while it can't be.

    touch(key) -> open batch -> sent to the writer process -> committed: whoever waits is answered
                      ^                     |
                      +----- not committed -+   whoever waits gets StorageUnavailable; the batch is repeated

One batch is on its way at a time; what changes meanwhile makes the next one. So a commit's cost is shared by
all calls of one turn of the loop and by those that come while the commit before runs (group commit). A batch
names keys, and is written down when it is sent: a key that changed twice is one row. A large one is written down
in parts, a turn of the loop each, and still committed whole. What changes meanwhile may be in it or not, and is
in the next one, for which its callers wait.

While batches fail, the pool in memory is ahead of the disk, calls that would change it are refused, and the
batch is tried again until it gets through. Nothing that was answered is lost by that: it was on disk before. No key
expires meanwhile, as no keepalive could save it; when batches get through again, the keys get their grace, and that
is on disk before anything else is answered. `State` has the steps.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Protocol

from keypool.core.errors import StartError, StorageUnavailable
from keypool.core.keys import DEAD, Key
from keypool.engine import NOTE
from keypool.engine.durable import datafile
from keypool.engine.durable.commit import Commit
from keypool.engine.durable.datafile import Batch, encode
from keypool.engine.durable.writer import Figures, Kind, Verdict
from keypool.engine.durable.writer_link import WriterLink
from keypool.ops.histogram import ROWS, SECONDS, Histogram

_PART = 5000  # rows written down in one turn of the loop: some 4 ms
_RETRY_FIRST = 0.05  # seconds; doubled up to the longest
_RETRY_LONGEST = 1.0
_WATCH = 0.25  # seconds between two looks at the commit under way
_SLOW = 0.5  # seconds that a commit may take before expiries are held: it may become an outage
_OUTAGE = 5.0  # seconds after which it is one
_IDLE = 2.0  # seconds without a commit after which the writer is asked whether the file is still there
_log = logging.getLogger("keypool.journal")


class State(enum.Enum):
    """How storage is.

        UP, SLOW --(an error, the writer dies, or _OUTAGE seconds)--> DOWN
        UP --(a commit takes _SLOW seconds)--> SLOW --(it gets through)--> UP
        DOWN --(a batch gets through)--> GRANTING --(the grace gets through, in time)--> UP
        GRANTING --(whatever goes wrong)--> DOWN

    In all but UP expiries are held; in DOWN and GRANTING calls that change something are refused.
    """

    UP = enum.auto()
    SLOW = enum.auto()
    DOWN = enum.auto()
    GRANTING = enum.auto()


class Keys(Protocol):
    """What the journal asks of the engine whose keys it keeps."""

    def hold_expiries(self) -> None:
        """Purge no key that is alive, until `storage_is_back`. May be called again meanwhile. O(1)."""
        ...

    def grant_grace(self) -> Generator[None, None, int]:
        """Let held keys live on, with a pause after each slice; until when at least, in milliseconds."""
        ...

    def storage_is_back(self) -> None:
        """Let deadlines and waiters go on."""
        ...


class Journal:
    """The journal of one pool in one data file. Lives on the loop's thread.

    `numbers` is asked at each batch for the pool's numbers (last id and lease, counters), which go with it.
    """

    def __init__(self, path: Path, lock: int, numbers: Callable[[], dict[str, int]], keys: Keys) -> None:
        self._keys = keys
        self._path = path
        self._lock = lock
        self._numbers = numbers
        self._loop = asyncio.get_running_loop()
        self._writer: WriterLink | None = None
        self._dirty: dict[int, Key] = {}  # changed since the last batch was sent
        self._sent: dict[int, Key] = {}  # in the batch that is on its way
        self._notes: dict[str, int] = {}  # numbers that are not the pool's, new since the last batch was sent
        self._sent_notes: dict[str, int] = {}  # in the batch that is on its way
        self._purged: dict[str, int] = {}  # texts of keys whose purge isn't on disk yet, with their ids
        self._next: Commit | None = None  # of what is dirty
        self._current: Commit | None = None  # of what was sent
        self._scheduled = False
        self._rest: tuple[Iterator[Key], int] | None = None  # of the batch that is being written down
        self._started = False
        self._closing = False
        self._ended = False  # the writer may go
        self._state = State.UP
        self._grant: Generator[None, None, int] | None = None  # the grace that is being granted
        self._grace: int | None = None  # in the batch that is on its way, or goes next
        self._retry = _RETRY_FIRST
        self._retrying: asyncio.TimerHandle | None = None
        self._restarting: asyncio.Task[None] | None = None
        self._watching: asyncio.TimerHandle | None = None
        self._watch_due = 0.0
        self._looking = False  # what is on its way is no batch
        self._turned: asyncio.Future[None] | None = None  # `close` waits for the next verdict
        self._sent_at = time.monotonic()
        self._waited_since = self._sent_at  # since the last part of a batch left
        self._failing_since = 0.0
        self.failing: str | None = None
        """Why the last batch could not be written; None while all is well."""
        self.figures = Figures(0, 0, 0)
        """What the writer measured last."""
        self.writer_restarts = 0
        self.commit_seconds = Histogram(SECONDS)
        self.commit_rows = Histogram(ROWS)

    # -- what the engine tells and asks

    def touch(self, key: Key) -> None:
        """This key has changed, or is gone: it goes with the next batch. O(1)."""
        self._dirty[key.id] = key
        if key.expires_deadline == DEAD:
            self._purged[key.text] = key.id
        if not self._scheduled and self._current is None and self.failing is None:
            self._scheduled = True
            self._loop.call_soon(self._send)

    def note(self, notes: Mapping[str, int | None]) -> Commit:
        """Numbers that are not the pool's go with the next batch: what to await until they are on disk. O(notes)."""
        self._notes |= {NOTE + name: value or 0 for name, value in notes.items()}
        if not self._scheduled and self._current is None and self.failing is None:
            self._scheduled = True
            self._loop.call_soon(self._send)
        return self._commit_of_dirty()

    def commit_of(self, id: int) -> Commit | None:
        """What to await before telling of this key; None if all that happened to it is on disk. O(1)."""
        if id in self._dirty:
            return self._commit_of_dirty()
        if id in self._sent:
            return self._current or self._commit_of_dirty()
        return None

    def commit_of_text(self, text: str) -> Commit | None:
        """The same for a text that nobody has (any more). O(1)."""
        id = self._purged.get(text)
        return None if id is None else self.commit_of(id)

    def commit_of_all(self) -> Commit | None:
        """What to await before telling of the pool as a whole. O(1)."""
        if self._dirty:
            return self._commit_of_dirty()
        return self._current

    def commit_under_way(self) -> Commit | None:
        """Of the batch that the writer has, if it has one."""
        return self._current

    def require(self) -> None:
        """Raise StorageUnavailable while batches fail: nothing may change then."""
        if self.failing is not None:
            raise self._unavailable()

    def undecided(self) -> StorageUnavailable:
        """The error for a call about a key whose expiry is held. O(1)."""
        if self.failing is not None:
            return self._unavailable()
        return StorageUnavailable("whether this key has expired is known when the commit under way is done")

    def commit_age(self) -> float:
        """Seconds since the batch that is on its way was sent, 0 if there is none. O(1)."""
        return 0.0 if self._current is None or self._looking else time.monotonic() - self._sent_at

    def failing_seconds(self) -> float:
        """Seconds since storage failed, 0 while all is well. O(1)."""
        return 0.0 if self.failing is None else time.monotonic() - self._failing_since

    def _commit_of_dirty(self) -> Commit:
        if self._next is None:
            self._next = Commit(self._loop)
            if self.failing is not None:
                _fail(self._next, self._unavailable())
        return self._next

    def _unavailable(self) -> StorageUnavailable:
        return StorageUnavailable(
            f"the data file can't be written ({self.failing}); calls that change nothing go on"
        )

    # -- batches

    async def open(self) -> None:
        """Start the writer and have it open the file, and say that it can write. Raises StartError."""
        try:
            self._writer = await self._new_writer()
        except OSError as error:
            reason = error.strerror or error
            raise StartError(
                f"the data file {self._path} can't be written: no writer process: {reason}"
            ) from None
        await self._ask(Kind.PROBE)

    async def _new_writer(self) -> WriterLink:
        writer = await WriterLink.start(self._path, self._lock, self._answered, self._lost)
        writer.drained = self._write_on
        return writer

    async def start(self, grace_until: float | None) -> None:
        """Grant the grace in the file: what was read of it may be served from now on. Raises StartError."""
        if grace_until is not None:
            await self._ask(Kind.GRACE, encode(round(grace_until * 1000)))
        self._started = True
        self._watch()

    async def _ask(self, kind: Kind, content: bytes = b"") -> None:
        assert self._writer is not None
        self._current = Commit(self._loop)
        self._sent_at = time.monotonic()
        self._writer.send(kind, content)
        try:
            await self._current
        except StorageUnavailable:
            self._closing = True
            raise StartError(f"the data file {self._path} can't be written: {self.failing}") from None

    def _send(self) -> None:
        self._scheduled = False
        if (
            self._writer is None
            or self._writer.dead
            or self._current is not None
            or self._grant is not None
            or not self._anything_to_send()
        ):
            return
        self._sent, self._dirty = self._dirty, {}
        self._sent_notes, self._notes = self._notes, {}
        self._current, self._next = self._next or Commit(self._loop), None
        self._sent_at = time.monotonic()
        self._write_down(iter(self._sent.values()), len(self._sent))

    def _write_down(self, keys: Iterator[Key], left: int) -> None:
        """Send the next part of the batch on its way, the next one when the writer has taken it. O(_PART)."""
        assert self._writer is not None
        self._waited_since = time.monotonic()
        rows, purged = [], []
        for key in islice(keys, _PART):
            if key.expires_deadline == DEAD:
                purged.append(key.id)
            else:
                rows.append(datafile.row_of(key))
        left -= _PART
        if left > 0:
            self._writer.send(Kind.PART, encode(Batch(rows, purged)))
            self._rest = keys, left
            if not self._writer.full:
                self._loop.call_soon(self._write_on)
            return
        # The numbers last: they are beyond none of the ids and leases in any part.
        numbers = self._numbers()
        if self._sent_notes:
            numbers |= self._sent_notes
        if self._grace is not None:
            numbers[datafile.GRACE] = self._grace
        self._writer.send(Kind.BATCH, encode(Batch(rows, purged, numbers)))

    def _write_on(self) -> None:
        rest, self._rest = self._rest, None
        if rest is not None:
            self._write_down(*rest)

    def _anything_to_send(self) -> bool:
        # While batches fail even an empty one goes, to see whether they still do.
        return bool(self._dirty or self._notes) or self._closing or self.failing is not None

    def _answered(self, verdict: Verdict) -> None:
        if verdict.figures is not None:
            self.figures = verdict.figures
        if verdict.error is not None:
            self._failed(verdict.error)
            return
        commit, self._current = self._current, None
        sent, self._sent = self._sent, {}
        self._sent_notes = {}
        seconds = time.monotonic() - self._sent_at
        if self._purged:
            for id, key in sent.items():
                if key.expires_deadline == DEAD and id not in self._dirty:
                    self._purged.pop(key.text, None)
        if self._looking:
            self._looking = False
        else:
            self.commit_seconds.add(seconds)
            self.commit_rows.add(len(sent))
        if self._state is not State.UP:
            self._got_through(seconds)
        if self._dirty or self._notes:
            self._send()  # first: the disk works while they are answered
        if commit is not None and not commit.done():
            commit.set_result(None)
        self._turn()

    def _got_through(self, seconds: float) -> None:
        """A batch is on disk after a time of trouble."""
        if self.failing is None or (self._grace is not None and seconds <= _OUTAGE):
            if self.failing is not None:
                _log.warning("the data file can be written again")
                self._next = None  # it was failed; what is dirty now waits for a new one
            self.failing, self._grace, self._retry = None, None, _RETRY_FIRST
            self._state = State.UP
            self._keys.storage_is_back()
            return
        self._state, self._grace = State.GRANTING, None
        self._stop_retrying()
        self._grant = self._keys.grant_grace()
        self._loop.call_soon(self._grant_on)

    def _grant_on(self) -> None:
        """Grant the next slice of the grace; after the last one the grace goes to disk, with what is dirty."""
        if self._grant is None:
            return
        try:
            next(self._grant)
        except StopIteration as end:
            self._grant, self._grace = None, end.value
            self._next = None
            self._send()
            self._turn()
        else:
            self._loop.call_soon(self._grant_on)

    def _failed(self, reason: str) -> None:
        """The batch on its way is not known to be kept: it is dirty again, and tried again later."""
        self._go_down(reason)
        self._rest = None
        self._looking = False
        self._dirty = {**self._sent, **self._dirty}
        self._sent = {}
        self._notes = {**self._sent_notes, **self._notes}
        self._sent_notes = {}
        current, self._current = self._current, None
        if not self._closing and self._retrying is None:
            self._retrying = self._loop.call_later(self._retry, self._try_again)
            self._retry = min(2 * self._retry, _RETRY_LONGEST)
        self._fail_callers(current)
        self._turn()

    def _go_down(self, reason: str) -> None:
        if self.failing is None:
            self._failing_since = time.monotonic()
            if self._started:
                _log.error("the data file can't be written: %s; calls that change something get 503", reason)
        self.failing = reason
        self._state = State.DOWN
        self._grant = self._grace = None
        self._keys.hold_expiries()

    def _fail_callers(self, current: Commit | None) -> None:
        for commit in (current, self._next):
            if commit is not None:
                _fail(commit, self._unavailable())

    # -- a watch over what takes too long

    def _watch(self) -> None:
        now = time.monotonic()
        if now - self._watch_due < _SLOW or not self._watch_due:
            self._judge(now)
        # else the loop itself stood still: the verdict may have come, and be read in this turn.
        self._watch_due = now + _WATCH
        self._watching = self._loop.call_later(_WATCH, self._watch)

    def _judge(self, now: float) -> None:
        waited = now - self._waited_since
        if self._current is None:
            if self._state is State.UP and now - self._sent_at > _IDLE:
                self._look(now)
        elif waited > _OUTAGE:
            if not self._current.done():  # it is failed once
                self._hangs()
        elif waited > _SLOW and self._state is State.UP:
            self._state = State.SLOW
            self._keys.hold_expiries()

    def _hangs(self) -> None:
        """The writer is at it, and may stay so. Its verdict is waited for, but by no caller."""
        self._go_down(f"a commit has taken over {_OUTAGE:.0f} s")
        self._fail_callers(self._current)

    def _look(self, now: float) -> None:
        """Ask the writer whether the file is still there. Nobody waits for it."""
        if self._writer is None or self._writer.dead or self._closing:
            return
        self._looking = True
        self._current = Commit(self._loop)
        self._sent_at = self._waited_since = now
        self._writer.send(Kind.LOOK)

    def _turn(self) -> None:
        if self._turned is not None and not self._turned.done():
            self._turned.set_result(None)

    # -- again

    def _stop_retrying(self) -> None:
        if self._retrying is not None:
            self._retrying.cancel()
            self._retrying = None

    def _try_again(self) -> None:
        self._retrying = None
        if self._writer is None or self._closing:
            return
        if self._writer.dead:
            self._restarting = self._loop.create_task(self._restart())
            self._restarting.add_done_callback(_heard)
            return
        self._next = None
        self._send()

    async def _restart(self) -> None:
        assert self._writer is not None
        try:
            await self._writer.reap()
            self._writer = await self._new_writer()
        except OSError as error:
            self._failed(f"no writer process: {error}")
            return
        self.writer_restarts += 1
        self._next = None
        self._send()

    def _lost(self) -> None:
        if not self._ended:
            self._failed("the writer process died and is started again")

    async def abandon(self) -> None:
        """Let the writer go, and the file as it is: it is refused."""
        self._closing = self._ended = True
        if self._writer is not None:
            await self._writer.reap()
        os.close(self._lock)

    async def close(self) -> None:
        """Write what isn't written yet, have the file closed cleanly, and let the writer go.

        Raises StorageUnavailable if not all could be written, or not before this was cancelled. The writer is
        killed then.
        """
        if self._writer is None:
            return
        self._closing = True
        written = False
        try:
            if self._restarting is not None:
                await asyncio.wait([self._restarting])
            self._stop_retrying()
            await self._settled()
            self._send()
            await self._settled()
            self._ended = True
            written = self.failing is None and not self._dirty
            if written:
                await self._writer.end()
        except asyncio.CancelledError:
            self._ended = True
            self._writer.kill()
        else:
            await self._writer.reap()
        if self._watching is not None:
            self._watching.cancel()
        os.close(self._lock)
        if not written:
            raise StorageUnavailable(
                f"the last commit was not made ({self.failing or 'it is still under way'})"
            )

    async def _settled(self) -> None:
        """Wait until nothing is on its way, nor a grace being granted."""
        while self._current is not None or self._grant is not None:
            self._turned = self._loop.create_future()
            await self._turned


def _fail(commit: Commit, error: StorageUnavailable) -> None:
    if not commit.done():
        commit.set_exception(error)
        commit.exception()  # heard, in case nobody waits


def _heard(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        _log.error("the writer could not be started again", exc_info=task.exception())
