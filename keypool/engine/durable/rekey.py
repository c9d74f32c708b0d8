"""Seals the rows of a data file under the first secrets key, in slices, while the server serves.

    begin -> "rekeying" is in the file -> rows are written again, some at a time -> the writer forgets the rest
                  ^                                                                          |
                  +---- a restart: the rows that are behind are found again as they are read |
                                                                                             v
                            no check value of another key, no clear text in free space, "rekeying" is gone

A row is behind if it is in clear or under another key. Any change of its key seals it under the first one, so what is
left to do is known when the file is opened, and only gets less.
"""

from __future__ import annotations

import asyncio
import logging
from array import array

from keypool.core.answers import Rekeying
from keypool.core.errors import StorageUnavailable
from keypool.core.keys import Key
from keypool.engine.durable.datafile import REKEYING
from keypool.engine.durable.journal import FileJournal
from keypool.engine.durable.pool_journal import PoolJournal
from keypool.engine.durable.rows import encode, key_id_of, pool_of
from keypool.engine.durable.wire import Kind
from keypool.engine.embedded import EmbeddedEngine

_KEYS_AT_ONCE = 200  # are one part of a commit: about 1 ms
_RETRY_SECONDS = 1.0  # after a failure of storage, or while a reader has the file open
_log = logging.getLogger("keypool.journal")


class Rekey:
    """The rekey of a file under the secrets key `name`. `behind` are the ids of the rows that are not sealed under it.

    For use on its loop's thread only.
    """

    def __init__(self, journal: FileJournal, name: str, behind: array[int]) -> None:
        self._journal = journal
        self._name = name
        self._behind = behind
        self._engines: dict[int, EmbeddedEngine] = {}
        self._task: asyncio.Task[None] | None = None
        journal.before_close = self.stop

    def add(self, number: int, engine: EmbeddedEngine) -> None:
        """There is another pool. O(1)."""
        self._engines[number] = engine

    def remove(self, number: int) -> None:
        """A pool is gone. O(1)."""
        self._engines.pop(number, None)

    async def begin(self) -> None:
        """Begin, or go on: the file remembers it. O(1). Raises StorageUnavailable."""
        self._journal.require()
        await self._journal.put_numbers({REKEYING: 1})
        self.go_on()

    def go_on(self) -> None:
        """Go on with a rekey that was begun, if it isn't running. O(1)."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    def progress(self) -> Rekeying:
        """How many keys are sealed under the first secrets key, or are gone. O(pools)."""
        total = sum(engine.pool.total for engine in self._engines.values())
        done = max(0, total - len(self._behind))
        running = self._task is not None and not self._task.done()
        failed = self._task is not None and self._task.done() and bool(self._behind)
        return Rekeying("running" if running else "failed" if failed else "idle", done, total, encrypted=True)

    def stop(self) -> None:
        """Stop, as the file is being closed. A restart goes on."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        try:
            while not await self._tried():  # noqa: ASYNC110 - it is a retry
                await asyncio.sleep(_RETRY_SECONDS)
        except Exception:
            _log.exception("the rekey failed; a restart goes on with it")
        else:
            _log.info("all keys are encrypted under the secrets key %s, and no other is needed", self._name)

    async def _tried(self) -> bool:
        """Do what is left. Returns False if storage failed, or the writer has to wait for a reader of the file."""
        try:
            while self._behind:
                self._journal.require()
                await self._rewrite()
            if (commit := self._journal.commit_of_all()) is not None:
                await commit
            await self._journal.ask(Kind.REKEYED, encode(self._name))
        except StorageUnavailable:
            return False
        return True

    async def _rewrite(self) -> None:
        """Have some rows written again. What the journal was given is written, even if this commit fails."""
        last: tuple[PoolJournal, Key] | None = None
        for _ in range(min(_KEYS_AT_ONCE, len(self._behind))):
            id = self._behind.pop()
            engine = self._engines.get(pool_of(id))
            key = None if engine is None else engine.pool.peek(key_id_of(id))
            if engine is not None and key is not None:
                journal = engine.journal
                assert isinstance(journal, PoolJournal)
                journal.touch(key)
                last = journal, key
        if last is not None and (commit := last[0].commit_of(last[1].id)) is not None:
            await commit
