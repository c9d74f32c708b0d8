"""Moving a pool from one place to another: the two ends, and the order of the steps.

    source: locked, so that no server serves it           target: empty, and no server serves it
        keys, some thousands at a time  ------------------->  written, and marked as incomplete
        numbers: last id and lease, counters  ------------->  written; keys are counted; the mark is removed
        the secret of the handles

A key is moved as a core.keys.Key with its durable fields, in whose terms each end reads and writes its own form.
Its moments are seconds of the wall clock, by which both engines go after a restart. Everything is moved, what holders
reported and the attempts of held leases too, and handles given before stay valid. The source isn't changed, so an
interrupted move can simply be run again.

A move is one coroutine, which Ctrl-C cancels where it waits. File operations block, as nothing else runs meanwhile.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from keypool.core.errors import StartError
from keypool.core.handles import SECRET_BYTES
from keypool.core.keys import Key, State
from keypool.engine.durable import datafile, file_lock
from keypool.engine.durable.rows import row_of

KEYS_AT_ONCE = 2000
"""Keys in a batch; one batch is in memory at a time."""


class Source(Protocol):
    """Where a pool comes from. While it is open, no server can serve it. All methods raise StartError."""

    total: int
    numbers: dict[str, int]
    """`last_id`, `last_lease`, `moment` (ms) and the counters of stats, by name."""
    secret: bytes
    """Of the pool's handles; a new one if the pool is from a version before handles."""

    def keys(self) -> AsyncIterator[list[Key]]:
        """All keys, in batches, in the states that they had when they last changed.

        `acquired_at` is 0 unless the key is blocked, and if it was blocked by a version that didn't keep the moment.
        """
        ...

    async def close(self) -> None:
        """Release it, so that servers can serve it again."""
        ...


class Target(Protocol):
    """Where a pool goes. Empty when opened; not served before `finish`. All methods raise StartError."""

    unfinished: str
    """What to tell a user about an interrupted move to this target."""

    async def write(self, keys: list[Key]) -> None:
        """Add keys."""
        ...

    async def count(self) -> int:
        """How many keys it has by now."""
        ...

    async def finish(self, numbers: dict[str, int], secret: bytes) -> None:
        """Write the numbers and the secret of the handles, and let servers serve it."""
        ...

    async def close(self) -> None:
        """Release it. Unless it was finished, no server will serve what was written."""
        ...


@dataclass
class Moved:
    """The result of a move: how many keys of which states, and the source's `numbers`."""

    numbers: dict[str, int]
    keys: int = 0
    states: Counter[State] = field(default_factory=Counter)


async def move(source: Source, target: Target, progress: Callable[[int], None]) -> Moved:
    """Move all keys, and compare the counts. Calls `progress` with the keys moved so far. O(n) time, O(batch) memory.

    Raises StartError.
    """
    moved = Moved(source.numbers)
    async for keys in source.keys():
        await target.write(keys)
        moved.keys += len(keys)
        moved.states.update(key.state for key in keys)
        progress(moved.keys)
    found = await target.count()
    if not moved.keys == found == source.total:
        raise StartError(
            f"the source has {source.total} keys, of which {moved.keys} were read, and the target has {found}"
        )
    await target.finish(source.numbers, source.secret)
    return moved


class FileSource:
    """A data file. Waits up to 5 s for a server to release it."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise StartError(f"there is no data file {path}")
        self._path = path
        self._lock = file_lock.hold(path)
        try:
            facts = datafile.inspect(path)
            self.numbers = facts.numbers_of(0)
            self.secret = datafile.secret_of(path) or os.urandom(SECRET_BYTES)
            self.total = datafile.count(path)
        except BaseException:
            file_lock.release(self._lock)
            raise

    async def keys(self) -> AsyncIterator[list[Key]]:
        """See Source."""
        try:
            for _, keys in datafile.read_keys(self._path, KEYS_AT_ONCE):
                yield keys
        except ValueError as error:
            raise StartError(f"the data file {self._path} is damaged: {error}") from None

    async def close(self) -> None:
        """See Source."""
        file_lock.release(self._lock)


class FileTarget:
    """A new data file, written under a temporary name and renamed when it is complete."""

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

    async def write(self, keys: list[Key]) -> None:
        """See Target."""
        self._database.write(list(map(row_of, keys)))

    async def count(self) -> int:
        """See Target."""
        return datafile.count(self._temporary)

    async def finish(self, numbers: dict[str, int], secret: bytes) -> None:
        """See Target."""
        self._database.finish(numbers, secret)
        self._refuse_existing()
        file_lock.rename(self._temporary, self._path)

    async def close(self) -> None:
        """See Target."""
        self._database.close()
        file_lock.remove(self._temporary)
        file_lock.release(self._lock)
