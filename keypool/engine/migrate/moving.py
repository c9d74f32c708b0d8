"""Moving a pool from one place to another: the two ends, and the order of the steps.

    source: held, so that no server serves it meanwhile   target: empty, and no server serves it
        rows, some thousands at a time  ------------------->  written under a mark that they are not complete
        numbers: last id and lease, counters  ------------->  written; keys are counted; the mark is removed

What is moved is complete: ids, texts, owners, leases, and deadlines as moments of the wall clock, which both ends keep
to across a stop. The source isn't changed, so an interrupted move is simply run again.

A move is one coroutine, so that Ctrl-C cancels it where it waits. File operations block; nothing else runs meanwhile.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from keypool.core.errors import StartError
from keypool.engine.durable import datafile, file_lock
from keypool.engine.durable.datafile import Row

ROWS_AT_ONCE = 2000
"""Keys in a batch, which is what is in memory at a time."""


class Source(Protocol):
    """Where a pool comes from. While it is open, no server can serve it. All raise StartError."""

    total: int
    numbers: dict[str, int]
    """`last_id`, `last_lease`, `moment` (ms) and the counters of stats, by name."""

    def rows(self) -> AsyncIterator[list[Row]]:
        """All keys, in batches."""
        ...

    async def close(self) -> None:
        """Let servers have it again."""
        ...


class Target(Protocol):
    """Where a pool goes. It was empty when it was opened, and nobody else can use it. All raise StartError."""

    unfinished: str
    """What a user does about a move to it that was interrupted."""

    async def write(self, rows: list[Row]) -> None:
        """Add keys."""
        ...

    async def count(self) -> int:
        """How many keys it has."""
        ...

    async def finish(self, numbers: dict[str, int]) -> None:
        """All keys are there: let servers have it."""
        ...

    async def close(self) -> None:
        """Release it; unless it was finished, no server will serve what is there."""
        ...


@dataclass
class Moved:
    """What was moved."""

    keys: int
    blocked: int
    numbers: dict[str, int]


async def move(source: Source, target: Target, progress: Callable[[int], None]) -> Moved:
    """Move all keys, and check that they are there. O(n), in O(batch) memory. Raises StartError."""
    moved = Moved(0, 0, source.numbers)
    async for rows in source.rows():
        await target.write(rows)
        moved.keys += len(rows)
        moved.blocked += sum(row[4] is not None for row in rows)
        progress(moved.keys)
    found = await target.count()
    if not moved.keys == found == source.total:
        raise StartError(
            f"the source has {source.total} keys, of which {moved.keys} were read, and the target has {found}"
        )
    await target.finish(source.numbers)
    return moved


class FileSource:
    """A data file that no server holds; waits 5 s for one to end."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise StartError(f"there is no data file {path}")
        self._path = path
        self._lock = file_lock.hold(path)
        try:
            self.numbers = datafile.inspect(path)
            self.total = datafile.count(path)
        except BaseException:
            file_lock.release(self._lock)
            raise

    async def rows(self) -> AsyncIterator[list[Row]]:
        """See Source."""
        try:
            for rows in datafile.read_rows(self._path, ROWS_AT_ONCE):
                yield rows
        except ValueError as error:
            raise StartError(f"the data file {self._path} is damaged: {error}") from None

    async def close(self) -> None:
        """See Source."""
        file_lock.release(self._lock)


class FileTarget:
    """A new data file. It is written under another name, and renamed when it is complete."""

    unfinished = "nothing was left behind: run it again"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f"{path.name}.migrating")
        self._refuse_existing()
        self._lock = file_lock.hold(self._temporary)
        try:
            file_lock.clear(self._temporary)  # of a move that was killed
            self._database = datafile.Filling(self._temporary)
        except BaseException:
            file_lock.remove(self._temporary)
            file_lock.release(self._lock)
            raise

    def _refuse_existing(self) -> None:
        if self._path.exists():
            raise StartError(f"the file {self._path} exists already: move the pool to a new file")

    async def write(self, rows: list[Row]) -> None:
        """See Target."""
        self._database.write(rows)

    async def count(self) -> int:
        """See Target."""
        return datafile.count(self._temporary)

    async def finish(self, numbers: dict[str, int]) -> None:
        """See Target."""
        self._database.finish(numbers)
        self._refuse_existing()
        file_lock.rename(self._temporary, self._path)

    async def close(self) -> None:
        """See Target."""
        self._database.close()
        file_lock.remove(self._temporary)
        file_lock.release(self._lock)
