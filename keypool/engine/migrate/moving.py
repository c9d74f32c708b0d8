"""Moving all pools from one place to another: the two ends, and the order of the steps.

    source: locked, so that no server serves it           target: empty, and no server serves it
        definitions of the pools  -------------------------->  written, and marked as incomplete
        keys, some thousands at a time  ------------------->  written
        leases that have ended, likewise  ----------------->  written
        numbers: last id and lease, counters  ------------->  written; keys are counted; the mark is removed
        the secret of the handles

A key is moved as a core.keys.Key with its durable fields, in whose terms each end reads and writes its own form. What
is stored encrypted is decrypted by the one end and encrypted by the other, both with the same secrets keys. Moments are
seconds of the wall clock, by which both engines go after a restart. Everything is moved: what holders reported, names,
labels and data, the attempts of held leases, rare events. Pools keep their numbers, and handles given before stay
valid. Three things are left behind: a held lease doesn't count in its client's share over Valkey, a text that was
replaced while its key was leased stops naming the key where it can't be kept (moving_valkey.py), and the charts of the
dashboard begin anew. The source isn't changed, so an interrupted move can simply be run again.

A move is one coroutine, which Ctrl-C cancels where it waits. File operations block, as nothing else runs meanwhile.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from keypool.core.errors import StartError
from keypool.core.handles import SECRET_BYTES
from keypool.core.history import PastLease, Window
from keypool.core.keys import Key, State
from keypool.core.rare_events import RareEvent
from keypool.engine.durable import datafile, file_lock
from keypool.engine.durable.checks import new_checks, sealer_of
from keypool.engine.durable.datafile import FIRST_PAST, LAST_PAST, Facts
from keypool.engine.durable.rows import StoredPool, event_of, event_row_of, past_of, prefix_of, row_of
from keypool.engine.sealing import Sealer, WrongSecretsKey

KEYS_AT_ONCE = 2000
"""Keys, or leases that have ended, in a batch; one batch is in memory at a time."""

_MOST_LEASES = 100_000_000  # that a history may have


class Source(Protocol):
    """Where pools come from. While it is open, no server can serve it. All methods raise StartError."""

    total: int
    """How many keys all pools have."""
    pools: list[StoredPool]
    """Those beside `default`, and that one if it was given settings."""
    last_pool: int
    """The largest number that a pool ever had."""
    numbers: dict[int, dict[str, int]]
    """Of each pool by its number: `last_id`, `last_lease`, `moment` (ms) and the counters of stats, by name."""
    secret: bytes
    """Of the handles; a new one if the pool is from a version before handles."""

    def keys(self) -> AsyncIterator[tuple[int, list[Key]]]:
        """All keys, in batches with the pool's number, in the states that they had when they last changed.

        `acquired_at` is 0 unless the key is blocked, and if it was blocked by a version that didn't keep the moment.
        """
        ...

    def history(self) -> AsyncIterator[tuple[int, list[PastLease]]]:
        """All leases that have ended and are kept, with the number of their pool; of each pool the oldest first."""
        ...

    async def events(self) -> dict[int, list[RareEvent]]:
        """The rare events of each pool by its number, oldest first."""
        ...

    async def close(self) -> None:
        """Release it, so that servers can serve it again."""
        ...


class Target(Protocol):
    """Where pools go. Empty when opened; not served before `finish`. All methods raise StartError."""

    unfinished: str
    """What to tell a user about an interrupted move to this target."""

    async def define(self, pools: list[StoredPool], last_pool: int) -> None:
        """Add pools, and the settings of `default`. Called before keys are written."""
        ...

    async def write(self, pool: int, keys: list[Key]) -> None:
        """Add keys to the pool with this number."""
        ...

    async def write_history(self, pool: int, leases: list[PastLease]) -> None:
        """Add leases that have ended to the pool with this number, later ones than before."""
        ...

    async def write_events(self, pool: int, events: list[RareEvent]) -> None:
        """Add the rare events of the pool with this number."""
        ...

    async def count(self) -> int:
        """How many keys it has by now."""
        ...

    async def finish(self, numbers: dict[int, dict[str, int]], secret: bytes) -> None:
        """Write the numbers and the secret of the handles, and let servers serve it."""
        ...

    async def close(self) -> None:
        """Release it. Unless it was finished, no server will serve what was written."""
        ...


@dataclass
class Moved:
    """The result of a move: how many keys of which states, of how many pools beside `default`, and its `numbers`."""

    numbers: dict[str, int]
    pools: int = 0
    keys: int = 0
    states: Counter[State] = field(default_factory=Counter)


async def move(source: Source, target: Target, progress: Callable[[int], None]) -> Moved:
    """Move all keys, and compare the counts. Calls `progress` with the keys moved so far. O(n) time, O(batch) memory.

    Raises StartError.
    """
    moved = Moved(source.numbers[0], sum(pool.number > 0 for pool in source.pools))
    await target.define(source.pools, source.last_pool)
    async for pool, keys in source.keys():
        await target.write(pool, keys)
        moved.keys += len(keys)
        moved.states.update(key.state for key in keys)
        progress(moved.keys)
    async for pool, leases in source.history():
        await target.write_history(pool, leases)
    found = await target.count()
    if not moved.keys == found == source.total:
        raise StartError(
            f"the source has {source.total} keys, of which {moved.keys} were read, and the target has {found}"
        )
    for pool, events in (await source.events()).items():
        await target.write_events(pool, events)
    await target.finish(source.numbers, source.secret)
    return moved


class FileSource:
    """A data file. Waits up to 5 s for a server to release it."""

    def __init__(self, path: Path, secrets_keys: Sequence[bytes] = ()) -> None:
        if not path.is_file():
            raise StartError(f"there is no data file {path}")
        self._path = path
        self._lock = file_lock.hold(path)
        try:
            facts = datafile.inspect(path)
            self._sealer = sealer_of(path, facts, secrets_keys)
            self.pools = [*facts.pools.values()]
            self.last_pool = facts.numbers.get(datafile.LAST_POOL, 0)
            self.numbers = {number: _moved(facts, number) for number in {0, *facts.pools}}
            self._firsts = {number: facts.numbers_of(number).get(FIRST_PAST, 1) for number in self.numbers}
            self._events = facts.events
            self.secret = facts.handles or os.urandom(SECRET_BYTES)
            self.total = datafile.count(path)
        except BaseException:
            file_lock.release(self._lock)
            raise

    async def keys(self) -> AsyncIterator[tuple[int, list[Key]]]:
        """See Source."""
        try:
            for number, keys in datafile.read_keys(self._path, KEYS_AT_ONCE, self._sealer):
                if number in self.numbers:
                    yield number, keys
                else:
                    raise StartError(
                        f"the data file {self._path} is damaged: there is no pool number {number}"
                    )
        except (ValueError, WrongSecretsKey) as error:
            raise StartError(f"the data file {self._path} is damaged: {error}") from None

    async def history(self) -> AsyncIterator[tuple[int, list[PastLease]]]:
        """See Source."""
        try:
            for number, first in self._firsts.items():
                for leases in datafile.read_history(self._path, number, first, KEYS_AT_ONCE):
                    yield number, leases
        except ValueError as error:
            raise StartError(f"the data file {self._path} is damaged: {error}") from None

    async def events(self) -> dict[int, list[RareEvent]]:
        """See Source."""
        return {pool: list(map(event_of, self._events.get(pool, ()))) for pool in self.numbers}

    async def close(self) -> None:
        """See Source."""
        file_lock.release(self._lock)


class FileTarget:
    """A new data file, written under a temporary name and renamed when it is complete."""

    unfinished = "nothing was left behind: run it again"

    def __init__(self, path: Path, secrets_keys: Sequence[bytes] = ()) -> None:
        self._path = path
        self._sealer = Sealer(secrets_keys) if secrets_keys else None
        self._temporary = path.with_name(f"{path.name}.migrating")
        self._histories: dict[int, Window] = {}
        self._refuse_existing()
        self._lock = file_lock.hold(self._temporary)
        try:
            file_lock.clear(self._temporary)  # of a move that was killed
            checks = {} if self._sealer is None else new_checks(datafile.Facts(), self._sealer)
            self._database = datafile.Filling(self._temporary, checks)
        except BaseException:
            file_lock.remove(self._temporary)
            file_lock.release(self._lock)
            raise

    def _refuse_existing(self) -> None:
        if self._path.exists():
            raise StartError(f"the file {self._path} exists already: move the pool to a new file")

    async def define(self, pools: list[StoredPool], last_pool: int) -> None:
        """See Target."""
        self._database.define(pools, last_pool)

    async def write(self, pool: int, keys: list[Key]) -> None:
        """See Target."""
        self._database.write([row_of(key, pool, self._sealer) for key in keys])

    async def write_history(self, pool: int, leases: list[PastLease]) -> None:
        """See Target."""
        window = self._histories.setdefault(pool, Window())
        for past in leases:
            past.number = window.next(_MOST_LEASES)
        self._database.write_history([past_of(past, pool) for past in leases])

    async def write_events(self, pool: int, events: list[RareEvent]) -> None:
        """See Target."""
        sealed = self._sealer is not None
        self._database.add_events([event_row_of(event, pool, sealed=sealed) for event in events])

    async def count(self) -> int:
        """See Target."""
        return datafile.count(self._temporary)

    async def finish(self, numbers: dict[int, dict[str, int]], secret: bytes) -> None:
        """See Target."""
        named = {
            prefix_of(pool) + name: number for pool, each in numbers.items() for name, number in each.items()
        }
        for pool, window in self._histories.items():
            named |= {
                prefix_of(pool) + FIRST_PAST: window.first,
                prefix_of(pool) + LAST_PAST: window.last,
            }
        self._database.finish(named, secret)
        self._refuse_existing()
        file_lock.rename(self._temporary, self._path)

    async def close(self) -> None:
        """See Target."""
        self._database.close()
        file_lock.remove(self._temporary)
        file_lock.release(self._lock)


def _moved(facts: Facts, pool: int) -> dict[str, int]:
    """The numbers of a pool that mean the same at another place."""
    of_file = (datafile.LAST_POOL, datafile.REKEYING, datafile.WAS_CLEAR, FIRST_PAST, LAST_PAST)
    return {name: number for name, number in facts.numbers_of(pool).items() if name not in of_file}
