"""The data file: its schema and format, and how it is opened, checked and read.

Rule of the format: `PRAGMA user_version` is the version of the schema below. A change of the schema adds a step to
`MIGRATIONS`, which upgrades a file from the previous version; a released step is never changed. A file of a newer
version, or with another application id, is refused and left as it was.

A row (rows.py) that is written has the complete new state of its key, so writing it twice does no harm. The usual key
is a row of 60 bytes.

A commit appends its batch to `batches`; compaction.py flushes it to the other tables later. So the content of the file
is its tables, overridden by its batches in order: `read_rows` reads both. After a clean shutdown `batches` is empty.
The number `grace_until` is the end of the last grace of a pool after an outage of storage: none of its keys expires
before it, whatever its row says. So a grace for a million keys is one number, which `read_rows` applies.

A file that was ever used with a secrets key has a check value for each one under which a row may be sealed. A server
that lacks one of these keys is refused before it changes anything (checks.py).

Of leases that have ended, `history` has those of each key side by side, and `ends` their order in the pool. Which of
them count is said by two numbers of the pool; older ones are deleted in slices (compaction.py). A start doesn't read
them.

A file in use is marked, so that a copy without its write-ahead log (`-wal`) is refused as incomplete. The mark is in
bytes of the header that SQLite reserves for later versions. It is written without SQLite, once the log holds a newer
first page without the mark. Therefore a program that reads the file with its log (a backup, a recovery) doesn't see the
mark, and a checkpoint, which makes the file complete, removes it. Only copies of the file alone have it. Two cases go
unnoticed: a copy made between a checkpoint and the next commit, which is complete and merely old; and a log that was
copied at another moment than its file.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import merge
from itertools import islice
from operator import attrgetter, itemgetter
from pathlib import Path

import msgspec

from keypool.core.errors import StartError
from keypool.core.handles import SECRET_BYTES
from keypool.core.history import PastLease
from keypool.core.keys import Key
from keypool.core.pace import Pace
from keypool.core.rare_events import MOST_EVENTS
from keypool.engine import NOTE
from keypool.engine.durable.file_lock import companions, log_of
from keypool.engine.durable.rows import (
    POOL_SHIFT,
    EventRow,
    Memtable,
    Past,
    Row,
    StoredPool,
    decode_any,
    key_of,
    past_lease_of,
    pool_of,
    prefix_of,
)
from keypool.engine.sealing import Sealer

APPLICATION_ID = 0x6B706F6C  # "kpol"

MIGRATIONS = (
    """
    CREATE TABLE keys (
        id INTEGER PRIMARY KEY,  -- never used again
        text TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        expires_at INTEGER NOT NULL,
        release_at INTEGER,      -- null unless blocked
        lease INTEGER NOT NULL,  -- of the latest acquire, 0 if never served
        owner TEXT               -- null unless blocked and named
    ) STRICT;
    CREATE TABLE pool (          -- last id and lease, counters, the last moment that the pool lived
        name TEXT PRIMARY KEY,
        value INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    """,
    """
    CREATE TABLE batches (       -- what is to be read over the other tables, in order
        number INTEGER PRIMARY KEY,
        batch BLOB NOT NULL      -- a Batch, as MessagePack
    ) STRICT;
    """,
    """
    -- release_at: null unless blocked or cooling
    ALTER TABLE keys ADD COLUMN acquired_at INTEGER;             -- null unless blocked
    ALTER TABLE keys ADD COLUMN flags INTEGER NOT NULL DEFAULT 0;  -- see rows.py
    ALTER TABLE keys ADD COLUMN more BLOB;                       -- a More, as MessagePack; null if there is nothing
    CREATE TABLE secrets (
        name TEXT PRIMARY KEY,
        value BLOB NOT NULL
    ) STRICT, WITHOUT ROWID;
    INSERT INTO secrets VALUES ('handles', new_secret());
    """,
    """
    -- keys.id: since this version the number of the pool << 40 | the id of the key
    CREATE TABLE pools (         -- all pools but `default`, which is listed only if it was given settings
        number INTEGER PRIMARY KEY,  -- never used again
        name TEXT NOT NULL,
        settings TEXT NOT NULL,      -- those that were given, as JSON
        draining INTEGER NOT NULL    -- 1: when leases have ended, 2: at once
    ) STRICT;
    """,
    """
    -- keys.more: since this version it may have the theoretical arrival time of a pace, and `pools.settings` a pace;
    -- and several rows may have the same text, as the seats of one secret
    CREATE TABLE history (       -- leases that have ended: see Past in rows.py
        key INTEGER NOT NULL,    -- as keys.id, though the key may be gone
        lease INTEGER NOT NULL,
        number INTEGER NOT NULL,
        acquired_at INTEGER NOT NULL,
        held INTEGER NOT NULL,
        how INTEGER NOT NULL,
        extended INTEGER NOT NULL,
        owner TEXT,
        client TEXT,
        outcome INTEGER,
        reason TEXT,
        PRIMARY KEY (key, lease)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE ends (          -- the same leases in the order in which they ended, from which the oldest are deleted
        number INTEGER PRIMARY KEY,  -- the number of the pool << 40 | that of the lease's end
        key INTEGER NOT NULL,
        lease INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE events (        -- the latest rare events of each pool (core/rare_events.py)
        pool INTEGER NOT NULL,
        number INTEGER NOT NULL,
        event TEXT NOT NULL,
        id INTEGER NOT NULL,     -- of the key; if there are several, of the first, as what follows
        hint TEXT,               -- null with a secrets key
        owner TEXT,
        lease INTEGER,
        at INTEGER NOT NULL,
        by TEXT NOT NULL,
        actor TEXT,
        count INTEGER NOT NULL,  -- of keys
        PRIMARY KEY (pool, number)
    ) STRICT, WITHOUT ROWID;
    """,
)
VERSION = len(MIGRATIONS)
_LEASES = 3  # the version from which a file has more than seven columns, and a secret
_POOLS = 4  # the version from which a file has several pools, and rows may be sealed
_HISTORY = 5  # the version from which a file has the leases that have ended, and rare events

ADD_BATCH = "INSERT INTO batches VALUES (?, ?)"
TRIM = "DELETE FROM batches WHERE number <= ?"
UPSERT = """
    INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (id) DO UPDATE SET
        text = excluded.text, expires_at = excluded.expires_at, release_at = excluded.release_at,
        lease = excluded.lease, owner = excluded.owner,
        acquired_at = excluded.acquired_at, flags = excluded.flags, more = excluded.more
"""
PURGE = "DELETE FROM keys WHERE id = ?"
SET_POOL = "INSERT INTO pool VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
_ADD_PAST = "INSERT OR REPLACE INTO history VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_ADD_END = "INSERT OR REPLACE INTO ends VALUES (?, ?, ?)"
ADD_REPORT = "UPDATE history SET outcome = ?, reason = ? WHERE key = ? AND lease = ?"
PAST_OF_KEY = "SELECT * FROM history WHERE key = ? AND lease < ? ORDER BY lease DESC LIMIT ?"
OLDEST_ENDS = "SELECT number, key, lease FROM ends WHERE number BETWEEN ? AND ? ORDER BY number LIMIT ?"
FORGET_PAST = "DELETE FROM history WHERE key = ? AND lease = ?"
FORGET_ENDS = "DELETE FROM ends WHERE number BETWEEN ? AND ?"
FIRST_END_FROM = "SELECT min(number) FROM ends WHERE number >= ?"

GRANT_GRACE = "UPDATE keys SET expires_at = :until WHERE expires_at < :until"

DEFINE = """
    INSERT INTO pools VALUES (?, ?, ?, ?)
    ON CONFLICT (number) DO UPDATE SET
        name = excluded.name, settings = excluded.settings, draining = excluded.draining
"""
FORGET_POOL = (
    "DELETE FROM pools WHERE number = ?",
    "DELETE FROM pool WHERE name GLOB ? || '/*'",
    "DELETE FROM events WHERE pool = ?",
)
ADD_EVENT = """
    INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (pool, number) DO UPDATE SET count = excluded.count
"""
TRIM_EVENTS = f"""
    DELETE FROM events WHERE pool = :pool
    AND number <= (SELECT max(number) FROM events WHERE pool = :pool) - {MOST_EVENTS}
"""  # noqa: S608 - a constant
FORGET_HINTS = "UPDATE events SET hint = NULL WHERE hint IS NOT NULL"
OVERWRITE = "PRAGMA secure_delete = ON"
"""Has a connection overwrite what it deletes or replaces."""
ADD_CHECK = "INSERT INTO secrets VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"

_FORGET_NOTES = f"DELETE FROM pool WHERE (name GLOB '{NOTE}*' OR name GLOB '[0-9]*/{NOTE}*') AND value = 0"  # noqa: S608

FIRST_PAST, LAST_PAST = "history_first", "history_last"
"""The names of the numbers of the oldest and the latest lease of a pool in its history. Older ones may still be in the
tables for a while."""
GRACE = "grace_until"
"""The name of the number that is the end of a grace of a pool, in milliseconds."""
REKEYING = "rekeying"
"""The name of the number that is 1 from the beginning of a rekey to its end."""
WAS_CLEAR = "was_clear"
"""The name of the number that is 1 while free space of the file may hold texts that were written in clear."""
LAST_POOL = "last_pool"
"""The name of the number of the pool that was made last."""

CHECK = "key."
"""How the names of check values begin: `key.` and which secrets key. Each is CHECKED, sealed under that key for a place
that no key has. A file has one for each secrets key under which a row may be sealed."""
CHECKED = b"keypool"
CHECK_PLACE = (0, 0)
"""Pool and id for which check values are sealed."""

_MARK = b"kpIU"  # "keypool: in use"
_MARK_AT = 72  # bytes 72 to 91 of the header are "reserved for expansion"; SQLite doesn't change them
_HEADER = 100  # bytes of the header of the file
_LOG_HEADER = 32  # bytes of a log without frames
_CHECKS = f"SELECT name, value FROM secrets WHERE name GLOB '{CHECK}*'"  # noqa: S608 - a constant
_FORGET_CHECKS = f"DELETE FROM secrets WHERE name GLOB '{CHECK}*' AND name != ?"  # noqa: S608 - a constant
_WAS_USED = "SELECT EXISTS (SELECT 1 FROM pool) OR EXISTS (SELECT 1 FROM batches)"
_HAS = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = ?"
_TABLES = "SELECT name FROM sqlite_master WHERE type = 'table'"
_OF_HISTORY = ("history", "ends")
_BATCHES = "SELECT batch FROM batches ORDER BY number"
_ROWS = """
    SELECT id, text, created_at, max(expires_at, ?), release_at, lease, owner, {} FROM keys
    WHERE id BETWEEN ? AND ? ORDER BY id
"""
_FIRST_FROM = "SELECT min(id) FROM keys WHERE id >= ?"
_HISTORY_ROWS = """
    SELECT history.* FROM ends JOIN history ON history.key = ends.key AND history.lease = ends.lease
    WHERE ends.number BETWEEN ? AND ? ORDER BY ends.number
"""
_SET_HANDLES = "UPDATE secrets SET value = ? WHERE name = 'handles'"
_HANDLES = "SELECT value FROM secrets WHERE name = 'handles'"
_READ_EVENTS = "SELECT * FROM events ORDER BY pool, number"
_MAGIC = b"SQLite format 3\0"
_COUNTED_AT_ONCE = 5000
_decode_settings = msgspec.json.Decoder(dict[str, int | float | Pace | None]).decode


@dataclass
class Facts:
    """What a file contains beside its keys; nothing if it is new."""

    numbers: dict[str, int] = field(default_factory=dict)
    """By name; those of another pool than `default` begin with its number and a slash."""
    pools: dict[int, StoredPool] = field(default_factory=dict)
    """By number. `default` is among them only if it was given settings."""
    handles: bytes | None = None
    """The secret of the handles; None if the file is of a version before handles."""
    checks: dict[str, bytes] = field(default_factory=dict)
    """The check values of secrets keys, by the hexadecimal names of the keys."""
    events: dict[int, list[EventRow]] = field(default_factory=dict)
    """The rare events of each pool, oldest first."""

    def numbers_of(self, number: int) -> dict[str, int]:
        """The numbers of a pool, by their names without a prefix. O(all numbers)."""
        prefix = prefix_of(number)
        return {
            name.removeprefix(prefix): value
            for name, value in self.numbers.items()
            if name.startswith(prefix) and (number or not name.partition("/")[0].isdecimal())
        }


def inspect(path: Path) -> Facts:
    """The facts of a file, none for a new one. O(its size without the history). Raises StartError like `examine`.

    Makes the file inaccessible to other users (mode 0600), whoever created it, because it holds the keys.
    """
    facts = examine(path, with_history=False)
    for each in (path, *companions(path)):
        with contextlib.suppress(FileNotFoundError):
            each.chmod(0o600)
    return facts


def examine(path: Path, check: str = "quick_check", *, with_history: bool = True) -> Facts:
    """The same, without changing anything. `check` is a pragma: "quick_check", or "integrity_check" for indexes too.

    A start checks `with_history` False, as a history may be larger than all the rest.
    Raises StartError unless the file is complete, intact, one of keypool's and of a known version.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_HEADER)
    except OSError as error:
        raise StartError(f"can't open the data file {path}: {error.strerror}") from None
    if start and not start.startswith(_MAGIC):  # SQLite itself would accept a file of one byte as empty
        raise StartError(f"the data file {path} is damaged, or not an SQLite file")
    if start[_MARK_AT:].startswith(_MARK) and not _has_log(path):
        raise StartError(
            f"the data file {path} is incomplete: it was copied from a running server, or lost its log: "
            f"put {path.name}-wal beside it, or use a copy made by `keypool backup`"
        )
    try:
        with _reading(path) as database:
            application = database.execute("PRAGMA application_id").fetchone()[0]
            version = _version(database)
            empty = not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if not empty and application != APPLICATION_ID:
                raise StartError(f"the data file {path} is an SQLite file of another program")
            if version > VERSION:
                raise StartError(
                    f"the data file {path} is of the newer version {version}; this server supports {VERSION}"
                )
            verdict = _verdict(database, check, with_history=with_history)
            facts = Facts() if empty else _facts(database)
    except ValueError as error:
        raise StartError(f"the data file {path} is damaged: {error}") from None
    except sqlite3.Error as error:
        raise StartError(f"the data file {path} is damaged or can't be read: {line_of(error)}") from None
    if verdict != "ok":
        raise StartError(f"the data file {path} is damaged: {verdict.splitlines()[-1]}")
    for name in [name for name in facts.numbers if name.rpartition("/")[2] == GRACE]:
        del facts.numbers[name]  # read_rows applies it
    return facts


def _verdict(database: sqlite3.Connection, check: str, *, with_history: bool) -> str:
    """What SQLite finds wrong first; "ok" if nothing. Raises sqlite3.Error."""
    checked = ["1"]
    if not with_history and _version(database) >= _HISTORY:
        checked = [f"'{table}'" for (table,) in database.execute(_TABLES) if table not in _OF_HISTORY]
    verdicts: list[str] = [database.execute(f"PRAGMA {check}({each})").fetchone()[0] for each in checked]
    return next((verdict for verdict in verdicts if verdict != "ok"), "ok")


def _facts(database: sqlite3.Connection) -> Facts:
    """The facts of a file with a schema. Raises ValueError, sqlite3.Error."""
    numbers = dict(database.execute("SELECT name, value FROM pool"))
    if not all(isinstance(number, int) for number in numbers.values()):
        raise ValueError("one of the pool's numbers is not a number")
    memtable = read_batches(database)
    facts = Facts(handles=_secret(database))
    if facts.handles is not None and len(facts.handles) != SECRET_BYTES:
        raise ValueError("the secret of its handles is missing or broken")
    if _version(database) >= _POOLS:
        facts.checks = {name.removeprefix(CHECK): value for name, value in database.execute(_CHECKS)}
        for row in database.execute("SELECT number, name, settings, draining FROM pools ORDER BY number"):
            facts.pools[row[0]] = _definition(row)
    # Merged as a flush would merge them: the numbers of a pool that is gone go with its definition.
    merged = Memtable()
    merged.numbers, merged.pools = numbers, facts.pools
    if _version(database) >= _HISTORY:
        for event in database.execute(_READ_EVENTS):
            merged.add_event(event)
    merged.merge_pools(memtable)
    facts.numbers = merged.numbers
    facts.pools = {number: each for number, each in merged.pools.items() if each.name is not None}
    for pool, events in merged.events.items():
        facts.events[pool] = [events[number] for number in sorted(events)[-MOST_EVENTS:]]
    return facts


def row_of_pool(definition: StoredPool) -> tuple[int, str | None, str, int]:
    """The definition of a pool as a row of its table."""
    settings = msgspec.json.encode(definition.settings).decode()
    return definition.number, definition.name, settings, definition.draining + definition.at_once


def _definition(row: tuple[int, str, str, int]) -> StoredPool:
    number, name, settings, draining = row
    try:
        return StoredPool(number, name, _decode_settings(settings), draining > 0, draining > 1)
    except msgspec.MsgspecError:
        raise ValueError(f"the settings of the pool number {number} can't be read") from None


def _has_log(path: Path) -> bool:
    try:
        return log_of(path).stat().st_size > _LOG_HEADER
    except FileNotFoundError:
        return False


def mark_in_use(database: sqlite3.Connection, held: int) -> None:
    """Mark the file of the descriptor `held`, which this connection writes, unless it is marked.

    Usually costs two system calls; after each checkpoint, a commit. Raises sqlite3.Error, OSError.
    """
    if os.pread(held, len(_MARK), _MARK_AT) == _MARK:
        return
    # The first page goes into the log as SQLite has it, without the mark, and must not be checkpointed from there
    # before the mark is written.
    database.execute("PRAGMA wal_autocheckpoint = 0")
    try:
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        os.pwrite(held, _MARK, _MARK_AT)
    finally:
        database.execute("PRAGMA wal_autocheckpoint = 1000")


def connect(path: Path) -> sqlite3.Connection:
    """A connection that writes; upgrades the file to this version first. Raises sqlite3.Error.

    In a file that is used with a secrets key, it overwrites what it deletes or replaces.
    """
    # Absolute, because names such as `file:x.db` and `:memory:` have a special meaning to SQLite.
    database = sqlite3.connect(path.absolute(), isolation_level=None)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        version = _version(database)
        database.create_function("new_secret", 0, lambda: os.urandom(SECRET_BYTES))
        for number, step in enumerate(MIGRATIONS[version:], version + 1):
            database.executescript(
                f"BEGIN IMMEDIATE; {step} PRAGMA application_id = {APPLICATION_ID};"
                f" PRAGMA user_version = {number}; COMMIT;"
            )
        if database.execute(_CHECKS).fetchone():
            database.execute(OVERWRITE)
        database.execute(_FORGET_NOTES)  # 0 stands for a removed note
    except BaseException:
        database.close()
        raise
    return database


def add_secrets(database: sqlite3.Connection, secrets: Mapping[str, bytes]) -> None:
    """Add check values, before the first row that is sealed under their key. Raises sqlite3.Error."""
    database.execute(OVERWRITE)
    used = database.execute(_WAS_USED).fetchone()[0] and not database.execute(_CHECKS).fetchone()
    database.execute("BEGIN IMMEDIATE")
    if used:
        database.execute(SET_POOL, (WAS_CLEAR, 1))
    database.executemany(ADD_CHECK, secrets.items())
    database.execute("COMMIT")


def forget_clear_text(database: sqlite3.Connection) -> bool:
    """Leave no text in free space or in the log, whose rows are all sealed. Returns False while a reader prevents it.

    O(1), or O(n) if the file was written in clear before: a second or two for a million keys. Raises sqlite3.Error.
    """
    if database.execute("SELECT count(*) FROM pool WHERE name = ?", (WAS_CLEAR,)).fetchone()[0]:
        # Free space within pages may hold texts that were deleted before there was a secrets key.
        database.execute("VACUUM")
        database.execute("DELETE FROM pool WHERE name = ?", (WAS_CLEAR,))
    patience = database.execute("PRAGMA busy_timeout").fetchone()[0]
    database.execute("PRAGMA busy_timeout = 0")
    try:
        busy: int = database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    finally:
        database.execute(f"PRAGMA busy_timeout = {patience}")
    return not busy


def end_rekey(database: sqlite3.Connection, name: str) -> None:
    """No row is sealed under another secrets key than the one with this name. O(1). Raises sqlite3.Error."""
    database.execute("BEGIN IMMEDIATE")
    database.execute(_FORGET_CHECKS, (CHECK + name,))
    database.execute("DELETE FROM pool WHERE name = ?", (REKEYING,))
    database.execute("COMMIT")


def read_keys(
    path: Path, slice_size: int, sealer: Sealer | None = None, behind: array[int] | None = None
) -> Iterator[tuple[int, list[Key]]]:
    """The keys in order of pool and id, as a pool's number with up to `slice_size` of its keys.

    O(1) memory beside the keys. See rows.key_of for `sealer` and `behind`. Raises ValueError, WrongSecretsKey.
    """
    try:
        for some in read_rows(path, slice_size):
            yield pool_of(some[0][0]), [key_of(row, sealer, behind) for row in some]
    except TypeError:
        raise ValueError("a row has something else where a number or bytes must be") from None


def read_rows(path: Path, slice_size: int) -> Iterator[list[Row]]:
    """The keys as rows, likewise, a slice of one pool at a time. O(batches) memory. Raises ValueError."""
    with _reading(path) as database:
        try:
            if not _has(database, "keys"):
                return
            memtable = read_batches(database)
            changed: dict[int, dict[int, Row | None]] = {}
            for id, row in memtable.rows.items():
                changed.setdefault(pool_of(id), {})[id] = row
            added = "acquired_at, flags, more" if _version(database) >= _LEASES else "NULL, 0, NULL"
            for number in _pools_with_rows(database, changed):
                grace = _grace_of(database, memtable, number)
                first, last = number << POOL_SHIFT, ((number + 1) << POOL_SHIFT) - 1
                rows: Iterator[Row] = database.execute(_ROWS.format(added), (grace, first, last))
                if number in changed:
                    rows = _over(rows, changed[number], grace)
                while some := list(islice(rows, slice_size)):
                    yield some
        except (sqlite3.Error, OverflowError):  # not quoted: its message may contain a key
            raise ValueError("a row can't be read") from None


def _pools_with_rows(database: sqlite3.Connection, changed: Iterable[int]) -> list[int]:
    """The numbers of the pools of all rows, defined or not, in order. O(pools · log n).

    `changed` are the pools that have rows in batches.
    """
    found = set(changed)
    last: int | None = database.execute("SELECT min(id) FROM keys").fetchone()[0]
    while last is not None:
        number = pool_of(last)
        found.add(number)
        last = database.execute(_FIRST_FROM, (number + 1 << POOL_SHIFT,)).fetchone()[0]
    return sorted(found)


def _grace_of(database: sqlite3.Connection, memtable: Memtable, number: int) -> int:
    name = prefix_of(number) + GRACE
    if name in memtable.numbers:
        return memtable.numbers[name]
    found = database.execute("SELECT value FROM pool WHERE name = ?", (name,)).fetchone()
    return found[0] if found else 0


def _over(rows: Iterator[Row], changed: dict[int, Row | None], grace: int) -> Iterator[Row]:
    """Rows in order of id, with changed and new ones in their places."""
    ordered = sorted(changed.items(), key=itemgetter(0))
    there = ((*row[:3], max(row[3], grace), *row[4:]) for _, row in ordered if row is not None)
    return merge((row for row in rows if row[0] not in changed), there, key=itemgetter(0))


def read_history(path: Path, pool: int, first: int, slice_size: int) -> Iterator[list[PastLease]]:
    """The leases of a pool that have ended, from the one with the number `first` on, in this order.

    O(batches) memory. Raises ValueError.
    """
    with _reading(path) as database:
        try:
            if _version(database) < _HISTORY:
                return
            memtable = read_batches(database)
            recent = sorted(
                (
                    past
                    for key, some in memtable.past.items()
                    if pool_of(key) == pool
                    for past in some.values()
                ),
                key=attrgetter("number"),
            )
            flushed = (
                Past(*row)
                for row in database.execute(
                    _HISTORY_ROWS, (pool << POOL_SHIFT | first, (pool + 1 << POOL_SHIFT) - 1)
                )
            )
            older = (past for past in flushed if past.lease not in memtable.past.get(past.key, ()))
            leases = merge(older, recent, key=attrgetter("number"))
            while some := list(islice((past for past in leases if past.number >= first), slice_size)):
                for past in some:
                    if (report := memtable.reports.get((past.key, past.lease))) is not None:
                        past.outcome, past.reason = report.outcome, report.reason
                yield [past_lease_of(past) for past in some]
        except (sqlite3.Error, TypeError):
            raise ValueError("a lease can't be read") from None


def read_batches(database: sqlite3.Connection) -> Memtable:
    """The batches of a file, merged. O(batches), which are few. Raises sqlite3.Error."""
    if not _has(database, "batches"):
        return Memtable()
    try:
        return Memtable(map(decode_any, (batch for (batch,) in database.execute(_BATCHES))))
    except msgspec.DecodeError:
        raise sqlite3.DatabaseError("a batch can't be read") from None


def _has(database: sqlite3.Connection, table: str) -> bool:
    return bool(database.execute(_HAS, (table,)).fetchone()[0])


def version_of(path: Path) -> int:
    """The version of a file that `examine` accepted. O(1). Raises sqlite3.Error."""
    with _reading(path) as database:
        return _version(database)


def _version(database: sqlite3.Connection) -> int:
    version: int = database.execute("PRAGMA user_version").fetchone()[0]
    return version


def secret_of(path: Path) -> bytes | None:
    """The secret of the pools' handles; None if the file is of a version before handles. O(1). Raises StartError."""
    try:
        with _reading(path) as database:
            return _secret(database)
    except sqlite3.Error as error:
        raise StartError(f"the data file {path} can't be read: {line_of(error)}") from None


def _secret(database: sqlite3.Connection) -> bytes | None:
    """The same; empty if it is missing or no bytes."""
    if _version(database) < _LEASES:
        return None
    found = database.execute(_HANDLES).fetchone()
    return found[0] if found and isinstance(found[0], bytes) else b""


def count(path: Path) -> int:
    """How many keys the file holds. O(n). Raises StartError."""
    try:
        return sum(map(len, read_rows(path, _COUNTED_AT_ONCE)))
    except (ValueError, sqlite3.Error) as error:
        raise StartError(f"the data file {path} can't be read: {line_of(error)}") from None


def add_past(database: sqlite3.Connection, leases: Sequence[Past]) -> None:
    """Add leases that have ended, within a transaction. O(leases · log n). Raises sqlite3.Error."""
    database.executemany(_ADD_PAST, map(msgspec.structs.astuple, leases))
    ends = [(pool_of(past.key) << POOL_SHIFT | past.number, past.key, past.lease) for past in leases]
    database.executemany(_ADD_END, sorted(ends))


class Filling:
    """Writes pools to a new file that the caller holds, without a writer process. Raises StartError.

    `checks` are the check values of the secrets keys under which rows are sealed, by their names in the file.
    """

    def __init__(self, path: Path, checks: Mapping[str, bytes]) -> None:
        self._path = path
        try:
            self._database = connect(path)
            if checks:
                add_secrets(self._database, checks)
        except sqlite3.Error as error:
            raise self._failed(error) from None

    def write(self, rows: list[Row]) -> None:
        """Add rows, in one transaction."""
        with self._transaction() as database:
            database.executemany(UPSERT, rows)

    def write_history(self, leases: list[Past]) -> None:
        """Add leases that have ended, in one transaction."""
        with self._transaction() as database:
            add_past(database, leases)

    def define(self, pools: Sequence[StoredPool], last_pool: int) -> None:
        """Add pools, and the largest number that any pool ever had."""
        with self._transaction() as database:
            database.executemany(DEFINE, map(row_of_pool, pools))
            database.execute(SET_POOL, (LAST_POOL, last_pool))

    def add_events(self, events: Sequence[EventRow]) -> None:
        """Add rare events, in one transaction."""
        with self._transaction() as database:
            database.executemany(ADD_EVENT, events)

    def finish(self, numbers: dict[str, int], secret: bytes) -> None:
        """Add the numbers of the pools and the secret of the handles, checkpoint the log, and close the file."""
        with self._transaction() as database:
            database.execute(_SET_HANDLES, (secret,))
            database.executemany(SET_POOL, numbers.items())
        try:
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._database.close()
        except sqlite3.Error as error:
            raise self._failed(error) from None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self._database.execute("BEGIN IMMEDIATE")
            yield self._database
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._failed(error) from None

    def close(self) -> None:
        """Close the file. May be called after `finish` or twice."""
        self._database.close()

    def _failed(self, error: sqlite3.Error) -> StartError:
        return StartError(f"the data file {self._path} can't be written: {line_of(error)}")


def line_of(error: Exception) -> str:
    """SQLite's message in one line of at most 200 characters: it may quote the schema, which has many."""
    return " ".join(str(error).split())[:200]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that sees a snapshot and can't write, not even a checkpoint when it is closed."""
    # A file without a log or journal is complete, and with `immutable` SQLite doesn't create them.
    alone = not any(path.with_name(f"{path.name}-{name}").exists() for name in ("wal", "journal"))
    uri = f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' if alone else ''}"
    with contextlib.closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as database:
        database.execute("BEGIN")
        yield database
