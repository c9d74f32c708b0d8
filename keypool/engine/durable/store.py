"""Keeps the pools of the embedded engine in one data file: their journals, their definitions, their rekey."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from keypool.core.answers import Rekeying
from keypool.core.errors import SecretsKeyRequired, StorageUnavailable
from keypool.engine.durable import charts_file
from keypool.engine.durable.datafile import LAST_POOL
from keypool.engine.durable.journal import FileJournal
from keypool.engine.durable.pool_journal import PoolJournal
from keypool.engine.durable.rekey import Rekey
from keypool.engine.durable.rows import StoredPool
from keypool.engine.embedded import EmbeddedEngine
from keypool.engine.journal import Commit
from keypool.engine.pools import Definition


class FileStore:
    """See the protocol `engine.pools.PoolStore`. `rekeyer` is None if there is no secrets key."""

    keeps_charts = True

    def __init__(self, journal: FileJournal, rekeyer: Rekey | None, charts: Path) -> None:
        self._journal = journal
        self._rekey = rekeyer
        self._charts = charts

    def journal_of(self, number: int, engine: EmbeddedEngine) -> PoolJournal:
        """The journal of a new pool. O(1)."""
        journal = self._journal.join(number, engine)
        if self._rekey is not None:
            self._rekey.add(number, engine)
        return journal

    def define(self, definition: Definition) -> Commit:
        """Put a definition into the next batch. O(settings)."""
        number, name, settings, draining, at_once = definition
        self._journal.put_numbers({LAST_POOL: max(number, self._journal.last_pool)})
        return self._journal.define(StoredPool(number, name, dict(settings), draining, at_once))

    def forget(self, number: int) -> Commit:
        """Put the end of a pool into the next batch. O(1)."""
        if self._rekey is not None:
            self._rekey.remove(number)
        return self._journal.define(StoredPool(number))

    async def rekey(self) -> Rekeying:
        """Begin to seal under the first secrets key what isn't yet. O(1). Raises SecretsKeyRequired."""
        if self._rekey is None:
            raise SecretsKeyRequired
        await self._rekey.begin()
        return self._rekey.progress()

    def rekeying(self) -> Rekeying:
        """How far that is. O(pools)."""
        if self._rekey is None:
            return Rekeying("idle", 0, 0, encrypted=False)
        return self._rekey.progress()

    async def kept_charts(self) -> dict[str, bytes]:
        """Read the file beside the data file. Raises StorageUnavailable."""
        try:
            return await asyncio.to_thread(charts_file.read, self._charts)
        except (OSError, ValueError) as error:
            raise StorageUnavailable(f"{self._charts} can't be read: {error}") from None

    async def keep_charts(self, charts: Mapping[str, bytes]) -> None:
        """Replace the file beside the data file. Raises StorageUnavailable."""
        try:
            await asyncio.to_thread(charts_file.write, self._charts, charts)
        except OSError as error:
            raise StorageUnavailable(f"{self._charts} can't be written: {error.strerror}") from None
