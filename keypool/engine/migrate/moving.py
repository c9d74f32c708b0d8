"""Moving a pool from one place that keeps it to another: what both ends are, and the order of the steps.

    source: held, so that nobody serves it meanwhile     target: empty, and nobody serves it
        rows, some thousands at a time  ------------------->  written under a mark that it isn't whole
        numbers: last id and lease, counters  ------------->  written, counted, compared; the mark is taken away

What moves is whole: ids, texts, owners, leases, and deadlines as moments of the wall clock, which is the clock of
either end across a stop. Nothing of the source is changed, so that a move that was broken off is just begun anew.

A move is one coroutine, so that Ctrl-C cancels it where it waits, with one loop from its first command to its last.
What a file does blocks: nothing else runs meanwhile.
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
"""Keys in a batch: what is in memory at a time."""


class Source(Protocol):
    """Where a pool comes from. Made, it is held: nobody serves it."""

    total: int
    numbers: dict[str, int]
    """`last_id`, `last_lease`, `moment` (ms) and the counters of stats, by name."""

    def rows(self) -> AsyncIterator[list[Row]]:
        """All keys, some at a time. Raises StartError."""
        ...

    async def close(self) -> None:
        """Let go of it."""
        ...


class Target(Protocol):
    """Where a pool goes. Made, it is known to be empty, and to be nobody else's meanwhile."""

    unfinished: str
    """What a user does about it after a move that was broken off."""

    async def write(self, rows: list[Row]) -> None:
        """Some more keys. Raises StartError."""
        ...

    async def count(self) -> int:
        """How many keys it holds by now. Raises StartError."""
        ...

    async def finish(self, numbers: dict[str, int]) -> None:
        """All is there: let it be served. Raises StartError."""
        ...

    async def close(self) -> None:
        """Let go of it; what isn't finished isn't served."""
        ...


@dataclass
class Moved:
    """What has been moved."""

    keys: int
    blocked: int
    numbers: dict[str, int]


async def move(source: Source, target: Target, progress: Callable[[int], None]) -> Moved:
    """Move all, and prove that it is there. O(n), in O(batch) memory. Raises StartError."""
    moved = Moved(0, 0, source.numbers)
    async for rows in source.rows():
        await target.write(rows)
        moved.keys += len(rows)
        moved.blocked += sum(row[4] is not None for row in rows)
        progress(moved.keys)
    there = await target.count()
    if not moved.keys == there == source.total:
        raise StartError(
            f"{source.total} keys were to be moved, {moved.keys} were read and {there} are there"
        )
    await target.finish(source.numbers)
    return moved


class FileSource:
    """A data file that no server has. Raises StartError, after 5 s if one has it."""

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
    """A data file that isn't there yet. It is written beside its place, and gets its name when it is whole."""

    unfinished = "nothing was left behind: run it again"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._beside = path.with_name(f"{path.name}.migrating")
        self._refuse_if_there()
        self._lock = file_lock.hold(self._beside)
        try:
            file_lock.clear(self._beside)  # of a move that was killed
            self._database = datafile.Filling(self._beside)
        except BaseException:
            file_lock.remove(self._beside)
            file_lock.release(self._lock)
            raise

    def _refuse_if_there(self) -> None:
        if self._path.exists():
            raise StartError(
                f"there is a file {self._path} already: move the pool to one that isn't there yet"
            )

    async def write(self, rows: list[Row]) -> None:
        """See Target."""
        self._database.write(rows)

    async def count(self) -> int:
        """See Target."""
        return datafile.count(self._beside)

    async def finish(self, numbers: dict[str, int]) -> None:
        """See Target."""
        self._database.finish(numbers)
        self._refuse_if_there()
        file_lock.rename(self._beside, self._path)

    async def close(self) -> None:
        """See Target."""
        self._database.close()
        file_lock.remove(self._beside)
        file_lock.release(self._lock)
