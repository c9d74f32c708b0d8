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
batch is tried again until it gets through. Nothing that was answered is lost by that: it was on disk before.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from keypool.engine import NOTE, datafile
from keypool.engine.commit import Commit
from keypool.engine.datafile import Batch, encode
from keypool.engine.link import WriterLink
from keypool.engine.writer import Kind, Verdict
from keypool.errors import StartError, StorageUnavailable
from keypool.keys import DEAD, Key
from keypool.tally import ROWS, SECONDS, Tally

_PART = 5000  # rows written down in one turn of the loop: some 4 ms
_RETRY_FIRST = 0.05  # seconds; doubled up to the longest
_RETRY_LONGEST = 1.0
_log = logging.getLogger("keypool.journal")


class Journal:
    """The journal of one pool in one data file. Lives on the loop's thread.

    `numbers` is asked at each batch for the pool's numbers (last id and lease, counters), which go with it.
    `back` is called when batches get through again after they failed.
    """

    def __init__(
        self, path: Path, lock: int, numbers: Callable[[], dict[str, int]], back: Callable[[], None]
    ) -> None:
        self._back = back
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
        self._writing_down: asyncio.Handle | None = None
        self._started = False
        self._closing = False
        self._retry = _RETRY_FIRST
        self._retrying: asyncio.TimerHandle | None = None
        self._sent_at = 0.0
        self.failing: str | None = None
        """Why the last batch could not be written; None while all is well."""
        self.commit_seconds = Tally(SECONDS)
        self.commit_rows = Tally(ROWS)

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
        self._writer = await WriterLink.start(self._path, self._lock, self._answered, self._lost)
        await self._ask(Kind.PROBE)

    async def start(self, grace_until: float | None) -> None:
        """Grant the grace in the file: what was read of it may be served from now on. Raises StartError."""
        if grace_until is not None:
            await self._ask(Kind.GRACE, encode(round(grace_until * 1000)))
        self._started = True

    async def _ask(self, kind: Kind, content: bytes = b"") -> None:
        assert self._writer is not None
        self._current = Commit(self._loop)
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
            or not self._anything_to_send()
        ):
            return
        self._sent, self._dirty = self._dirty, {}
        self._sent_notes, self._notes = self._notes, {}
        self._current, self._next = self._next or Commit(self._loop), None
        self._sent_at = time.monotonic()
        self._write_down(iter(self._sent.values()), len(self._sent))

    def _write_down(self, keys: Iterator[Key], left: int) -> None:
        """Send the next part of the batch on its way. O(_PART)."""
        assert self._writer is not None
        rows, purged = [], []
        for key in islice(keys, _PART):
            if key.expires_deadline == DEAD:
                purged.append(key.id)
            else:
                rows.append(datafile.row_of(key))
        left -= _PART
        if left > 0:
            self._writer.send(Kind.PART, encode(Batch(rows, purged)))
            self._writing_down = self._loop.call_soon(self._write_down, keys, left)
            return
        # The numbers last: they are beyond none of the ids and leases in any part.
        self._writing_down = None
        numbers = self._numbers()
        if self._sent_notes:
            numbers |= self._sent_notes
        self._writer.send(Kind.BATCH, encode(Batch(rows, purged, numbers)))

    def _anything_to_send(self) -> bool:
        # While batches fail even an empty one goes, to see whether they still do.
        return bool(self._dirty or self._notes) or self._closing or self.failing is not None

    def _answered(self, verdict: Verdict) -> None:
        if verdict.error is not None:
            self._failed(verdict.error)
            return
        commit, self._current = self._current, None
        sent, self._sent = self._sent, {}
        self._sent_notes = {}
        if self._purged:
            for id, key in sent.items():
                if key.expires_deadline == DEAD and id not in self._dirty:
                    self._purged.pop(key.text, None)
        self.commit_seconds.add(time.monotonic() - self._sent_at)
        self.commit_rows.add(len(sent))
        if self.failing is not None:
            _log.warning("the data file can be written again")
            self.failing, self._retry = None, _RETRY_FIRST
            self._next = None  # it was failed; what is dirty now waits for a new one
            self._loop.call_soon(self._back)
        if self._dirty or self._notes:
            self._send()  # first: the disk works while they are answered
        if commit is not None and not commit.done():
            commit.set_result(None)

    def _failed(self, reason: str) -> None:
        """The batch on its way is not known to be kept: it is dirty again, and tried again later."""
        if self.failing is None and self._started:
            _log.error("the data file can't be written: %s; calls that change something get 503", reason)
        self.failing = reason
        if self._writing_down is not None:
            self._writing_down.cancel()
            self._writing_down = None
        self._dirty = {**self._sent, **self._dirty}
        self._sent = {}
        self._notes = {**self._sent_notes, **self._notes}
        self._sent_notes = {}
        current, self._current = self._current, None
        if not self._closing and self._retrying is None:
            self._retrying = self._loop.call_later(self._retry, self._try_again)
            self._retry = min(2 * self._retry, _RETRY_LONGEST)
        for commit in (current, self._next):
            if commit is not None:
                _fail(commit, self._unavailable())

    def _try_again(self) -> None:
        self._retrying = None
        if self._writer is None or self._closing:
            return
        if self._writer.dead:
            task = self._loop.create_task(self._restart())
            task.add_done_callback(_heard)
            return
        self._next = None
        self._send()

    async def _restart(self) -> None:
        assert self._writer is not None
        try:
            await self._writer.reap()
            self._writer = await WriterLink.start(self._path, self._lock, self._answered, self._lost)
        except OSError as error:
            self._failed(f"no writer process: {error}")
            return
        self._next = None
        self._send()

    def _lost(self) -> None:
        if not self._closing:
            self._failed("the writer process died and is started again")

    async def abandon(self) -> None:
        """Let the writer go, and the file as it is: it is refused."""
        self._closing = True
        if self._writer is not None:
            await self._writer.reap()
        os.close(self._lock)

    async def close(self) -> None:
        """Write what isn't written yet, have the file closed cleanly, and let the writer go."""
        if self._writer is None:
            return
        while (commit := self.commit_under_way()) is not None:
            await asyncio.wait([commit])
        self._closing = True
        if not self._writer.dead:
            self._send()
            if (commit := self.commit_under_way()) is not None:
                await asyncio.wait([commit])
            await self._writer.end()
        await self._writer.reap()
        os.close(self._lock)


def _fail(commit: Commit, error: StorageUnavailable) -> None:
    if not commit.done():
        commit.set_exception(error)
        commit.exception()  # heard, in case nobody waits


def _heard(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        _log.error("the writer could not be started again", exc_info=task.exception())
