"""Keys as rows of the data file, and batches of rows: what the tables and the batches of a file contain.

Moments are integer milliseconds of the pool's clock (engine/clock.py). The end of a cooldown is rounded up, so that no
restart shortens one; other moments are rounded to the nearest. A row has the complete state of its key. What most keys
don't have is in one column, `more`, so that the row of such a key stays small.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, isfinite
from typing import Annotated

import msgspec

from keypool.core.keys import Key, State
from keypool.core.outcomes import NO_HISTORY, History

Row = tuple[int, str, int, int, int | None, int, str | None, int | None, int, bytes | None]
"""A key in the file, with its columns in the order of the schema (datafile.py)."""

COOLING = 1
"""The key cools until `release_at`."""
QUARANTINED = 2
REPORTED = 4
"""The latest lease can't report any more."""
QUARANTINE_PENDING = 8
"""The key is quarantined when its lease ends."""

_AVAILABLE, _BLOCKED = State.AVAILABLE, State.BLOCKED  # saves attribute look-ups for each row
_FLAGS = COOLING | QUARANTINED | REPORTED | QUARANTINE_PENDING


class More(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What is in the column `more`, as MessagePack. Files contain it: fields may be added at the end only."""

    attempt: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)] | None = None
    history: History | None = None


class Batch(msgspec.Struct, array_like=True):
    """Changes that are committed together. `rows` are complete keys, `purged` ids, `pool` numbers by name.

    Files contain it as `encode` writes it: fields may be added at the end, but not changed.
    """

    rows: list[Row] = []
    purged: list[int] = []
    pool: dict[str, int] = {}


_Row2 = tuple[int, str, int, int, int | None, int, str | None]


class _Batch2(msgspec.Struct, array_like=True):
    """A Batch that was written under version 2 of the data file."""

    rows: list[_Row2] = []
    purged: list[int] = []
    pool: dict[str, int] = {}


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Batch).decode
_decode_version_2 = msgspec.msgpack.Decoder(_Batch2).decode
_decode_more = msgspec.msgpack.Decoder(More).decode


def decode_any(content: bytes) -> Batch:
    """A batch that may be of version 2. Raises msgspec.DecodeError."""
    try:
        return decode(content)
    except msgspec.ValidationError:
        older = _decode_version_2(content)
        return Batch([(*row, None, 0, None) for row in older.rows], older.purged, older.pool)


class Memtable:
    """Batches merged: the last row of each key, None if it was purged, and the last numbers."""

    def __init__(self, batches: Iterable[Batch] = ()) -> None:
        self.rows: dict[int, Row | None] = {}
        self.numbers: dict[str, int] = {}
        for batch in batches:
            self.add(batch)

    def add(self, batch: Batch) -> None:
        """Merge a batch that is later than all before. O(its rows)."""
        for row in batch.rows:
            self.rows[row[0]] = row
        for id in batch.purged:
            self.rows[id] = None
        self.numbers.update(batch.pool)


def row_of(key: Key) -> Row:
    """The row of a live key. About 0.4 µs, 0.6 if it is blocked, 0.2 more with `more`."""
    release = key.release_deadline
    release_at = acquired_at = more = None
    flags = 0
    state = key.state
    if state is _BLOCKED and release is not None:
        release_at = round(release * 1000)
        acquired_at = round(key.acquired_at * 1000)
        if key.quarantine_pending:
            flags = QUARANTINE_PENDING
    elif release is not None:
        release_at = ceil(release * 1000)
        flags = COOLING
    elif state is not _AVAILABLE:
        flags = QUARANTINED
    if key.reported:
        flags |= REPORTED
    if key.history is not NO_HISTORY:
        more = encode(More(key.attempt, key.history))
    elif key.attempt is not None:
        more = encode(More(key.attempt))
    return (
        key.id,
        key.text,
        round(key.created_at * 1000),
        round(key.expires_deadline * 1000),
        release_at,
        key.lease,
        key.owner,
        acquired_at,
        flags,
        more,
    )


def key_of(row: Row) -> Key:
    """The key of a row. Raises ValueError or TypeError for a row that `row_of` can't have made."""
    id, text, created_at, expires_at, release_at, lease, owner, acquired_at, flags, more = row
    key = Key(id, text, created_at / 1000, expires_at / 1000)
    key.lease = lease
    key.owner = owner
    if release_at is not None:
        key.release_deadline = release_at / 1000
        key.state = _BLOCKED
    if acquired_at is not None:
        key.acquired_at = acquired_at / 1000
    if flags != 0:
        _set_flags(key, flags)
    if more is not None:
        _set_more(key, more)
    return key


def _set_flags(key: Key, flags: int) -> None:
    if flags & ~_FLAGS:
        raise ValueError(f"{key!r} has the unknown flags {flags}")
    if flags & COOLING:
        if key.state is not State.BLOCKED:
            raise ValueError(f"{key!r} is cooling, but the end of its cooldown is missing")
        key.state = State.COOLING
    if flags & QUARANTINED:
        if key.state is not State.AVAILABLE:
            raise ValueError(f"{key!r} is quarantined, but has the end of a block or a cooldown")
        key.state = State.QUARANTINED
    key.reported = bool(flags & REPORTED)
    key.quarantine_pending = bool(flags & QUARANTINE_PENDING)


def _set_more(key: Key, content: bytes) -> None:
    try:
        more = _decode_more(content)
    except msgspec.MsgspecError:
        raise ValueError(f"the attempt or the history of {key!r} can't be read") from None
    history = more.history or NO_HISTORY
    if history.failures < 0 or not isfinite(history.failed_at):
        raise ValueError(f"{key!r} has a history that can't be")
    key.attempt = more.attempt
    key.history = history
