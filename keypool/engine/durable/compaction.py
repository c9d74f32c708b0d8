"""Commits batches to a data file, and flushes them to its tables later, a few rows at a time.

This is a log-structured merge tree of two levels (O'Neil et al., The log-structured merge-tree, Acta Informatica 33,
1996). A batch is committed by appending it to the table `batches`: this writes a few pages at its end, where updating
the row of each key would write a page for each. The memtable merges the batches. When it has `FLUSH_THRESHOLD_ROWS`,
it is flushed to the other tables while a new one gathers the next batches: only the last state of each key, in order of
ids, so that neighbours share a page.

A flush writes the rows first, and then deletes its batches, the oldest first. So at any moment a row of the table may
be older than the state of its key in the batches, never newer: batches override rows, and reading both gives the
committed state, wherever a power failure interrupts.

Leases that have ended are flushed likewise, in order of key and lease. When they are written, as many of the oldest are
deleted as the pool's numbers say; they could not be read any more since the commit of those numbers. So neither a
shorter history nor a pool that is gone has to be deleted in one go.
"""

from __future__ import annotations

import sqlite3
from heapq import nlargest
from typing import TypeVar

import msgspec

from keypool.engine.durable import datafile
from keypool.engine.durable.datafile import FIRST_PAST
from keypool.engine.durable.rows import POOL_SHIFT, Memtable, Past, decode, pool_of, prefix_of

FLUSH_THRESHOLD_ROWS = 20_000
MIN_FLUSH_ROWS = 128
"""Fewest rows that one step flushes: 0.5 ms."""
MAX_FLUSH_ROWS = 10_000
"""Most rows that one step flushes, after a large batch: 50 ms."""
ROWS_PER_BATCH = 4
"""Rows that a batch counts for in addition to its own, since it contains the pool's numbers, too."""
ROWS_PER_LEASE = 2
"""Rows that a lease that has ended counts for: it is written, and an older one is deleted."""
IDLE_ROWS = 5000
"""Rows that may be deleted in a step when nothing was committed for some seconds: 30 ms."""

_ALL = 1 << POOL_SHIFT  # more than the number of any lease's end
_NUMBERS = "SELECT coalesce(min(number), 1), coalesce(max(number), 0) FROM batches"


_Place = tuple[int, int]
"""A lease: the id of its key's row, and its number."""

Item = TypeVar("Item")


class BatchLog:
    """The batches of one data file, and how far they are flushed. Its methods raise sqlite3.Error.

    After an error, and after `flush_all`, its state no longer matches the file: create another.

    | step of a flush     | `_flushing` | `_ids`   | `_ended` | `_flushing_until` |
    | ------------------- | ----------- | -------- | -------- | ----------------- |
    | no flush            | empty       | empty    | empty    | 0                 |
    | rows are written    | all rows    | the rest | all      | last batch        |
    | leases are written  | all rows    | empty    | the rest | last batch        |
    | batches are deleted | all rows    | empty    | empty    | last batch        |
    """

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._committed: list[bytes] = []  # batches that aren't in the memtable yet
        self._memtable = datafile.read_batches(database)
        # Of the memtable, in rows.
        self._weight = len(self._memtable.rows) + ROWS_PER_LEASE * sum(map(len, self._memtable.past.values()))
        self._first, self._last = database.execute(_NUMBERS).fetchone()
        self._budget = 0  # rows that may be flushed now
        self._flushing = Memtable()
        self._ids: list[int] = []  # of rows in `_flushing` that aren't written yet, descending
        self._ended: list[_Place] = []  # of leases in `_flushing` that aren't written yet, descending
        self._flushing_until = 0
        self._untrimmed = dict.fromkeys(
            _pools_with_history(database)
        )  # pools whose oldest leases may have to go

    def commit(self, encoded: list[bytes]) -> None:
        """Append encoded batches, all or none, durably. O(their size): they aren't even decoded."""
        numbered = list(enumerate(encoded, self._last + 1))
        if len(numbered) == 1:
            self._database.execute(datafile.ADD_BATCH, numbered[0])
        else:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany(datafile.ADD_BATCH, numbered)
            self._database.execute("COMMIT")
        self._last += len(encoded)
        self._committed += encoded

    def flush(self, *, idle: bool = False) -> None:
        """Do a step of a flush, if one is due: twice as many rows as were committed since. O(MAX_FLUSH_ROWS).

        If it is `idle`, do a step of trimming even if nothing was committed.
        """
        self._gather()
        if not self._flushing_until:
            # Finish trimming after the previous flush first, unless that takes too long.
            if self._weight >= FLUSH_THRESHOLD_ROWS * (2 if self._untrimmed else 1):
                self._begin()
            elif not self._untrimmed:
                self._budget = 0
                return
        if idle and self._untrimmed:
            self._budget = max(self._budget, IDLE_ROWS)
        if self._budget < MIN_FLUSH_ROWS:
            return
        count = min(self._budget, MAX_FLUSH_ROWS)
        self._budget -= count
        # It does no harm if this transaction is lost: its rows are in the batches, which are deleted after it.
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.execute("BEGIN IMMEDIATE")
        if self._ids or self._ended:
            self._flush_rows(count)
        elif self._flushing_until:
            self._delete_batches(count)
        else:
            self._trim(count)
        self._database.execute("COMMIT")
        self._database.execute("PRAGMA synchronous = FULL")

    def flush_all(self) -> None:
        """Flush everything, durably. O(FLUSH_THRESHOLD_ROWS), or more after a larger batch."""
        if not self._last:
            return
        self._gather()
        left = Memtable()
        left.rows = {id: self._flushing.rows[id] for id in self._ids} | self._memtable.rows
        left.numbers = self._flushing.numbers
        left.pools = self._flushing.pools
        left.events = self._flushing.events
        left.merge_pools(self._memtable)
        self._database.execute("BEGIN IMMEDIATE")
        self._write(left, sorted(left.rows))
        self._write_past(self._flushing, self._ended[::-1])
        self._write_past(self._memtable, sorted(_places_of(self._memtable)))
        self._write_pools(left)
        if self._untrimmed:
            self._trim(IDLE_ROWS)
        self._database.execute(datafile.TRIM, (self._last,))
        self._database.execute("COMMIT")

    def _gather(self) -> None:
        """Merge the newly committed batches into the memtable. O(their rows)."""
        for batch in map(decode, self._committed):
            self._memtable.add(batch)
            weight = len(batch.rows) + len(batch.purged) + len(batch.events) + ROWS_PER_BATCH
            weight += ROWS_PER_LEASE * len(batch.past)
            self._weight += weight
            self._budget += 2 * weight  # so that a flush ends before the next memtable is full
        self._committed.clear()

    def _begin(self) -> None:
        """Begin to flush the memtable. O(n log n) in its rows: about 3 ms."""
        self._flushing, self._memtable, self._weight = self._memtable, Memtable(), 0
        self._ids = sorted(self._flushing.rows, reverse=True)
        self._ended = sorted(_places_of(self._flushing), reverse=True)
        self._flushing_until = self._last

    def _flush_rows(self, count: int) -> None:
        ids = _taken(self._ids, count)
        self._write(self._flushing, ids)
        self._write_past(self._flushing, _taken(self._ended, count - len(ids)))
        if not self._ids and not self._ended:
            self._write_pools(self._flushing)

    def _write(self, memtable: Memtable, ids: list[int]) -> None:
        rows = [row for id in ids if (row := memtable.rows[id]) is not None]
        self._database.executemany(datafile.UPSERT, rows)
        self._database.executemany(datafile.PURGE, [(id,) for id in ids if memtable.rows[id] is None])

    def _write_past(self, memtable: Memtable, places: list[_Place]) -> None:
        """Write these leases, unless they are to be deleted anyway, and the reports on older ones."""
        firsts = {pool: self._first_of(pool) for pool in {pool_of(key) for key, _ in places}}
        self._untrimmed |= dict.fromkeys(firsts)
        leases = [
            past
            for key, lease in places
            if (past := memtable.past.get(key, {}).get(lease)) and past.number >= firsts[pool_of(key)]
        ]
        datafile.add_past(self._database, leases)
        reports = [report for place in places if (report := memtable.reports.get(place)) is not None]
        self._database.executemany(
            datafile.ADD_REPORT, [(each.outcome, each.reason, each.key, each.lease) for each in reports]
        )

    def _first_of(self, pool: int) -> int:
        """The number of the oldest lease of a pool that counts. O(log n)."""
        name = prefix_of(pool) + FIRST_PAST
        for memtable in (self._memtable, self._flushing):
            definition = memtable.pools.get(pool)
            if definition is not None and definition.name is None:
                return _ALL
            if name in memtable.numbers:
                return memtable.numbers[name]
        found = self._database.execute("SELECT value FROM pool WHERE name = ?", (name,)).fetchone()
        return found[0] if found else _ALL

    def _trim(self, count: int) -> None:
        """Delete leases that don't count any more. O(count · log n)."""
        pool = next(iter(self._untrimmed))
        first = pool << POOL_SHIFT
        oldest = self._database.execute(
            datafile.OLDEST_ENDS, (first, first + self._first_of(pool) - 1, count)
        ).fetchall()
        if oldest:
            places = sorted((key, lease) for _, key, lease in oldest)
            self._database.executemany(datafile.FORGET_PAST, places)
            self._database.execute(datafile.FORGET_ENDS, (first, oldest[-1][0]))
        if len(oldest) < count:
            del self._untrimmed[pool]

    # -- reading

    def history(self, key: int, before: int, count: int, first: int) -> list[Past]:
        """Up to `count` leases of the key with this row id that are older than `before`, the latest first.

        Those whose ends have a lower number than `first` don't count. O(log n + count), and O(m) in the leases of the
        key that aren't flushed yet.
        """
        self._gather()
        rows = self._database.execute(datafile.PAST_OF_KEY, (key, before, count))
        found = {row[1]: Past(*row) for row in rows}
        for memtable in (self._flushing, self._memtable):
            unflushed = memtable.past.get(key, {})
            found |= {
                lease: unflushed[lease]
                for lease in nlargest(count, (lease for lease in unflushed if lease < before))
            }
            for lease, past in found.items():
                report = memtable.reports.get((key, lease))
                if report is not None:
                    found[lease] = msgspec.structs.replace(past, outcome=report.outcome, reason=report.reason)
        latest = (found[lease] for lease in sorted(found, reverse=True)[:count])
        return [past for past in latest if past.number >= first]

    def _write_pools(self, memtable: Memtable) -> None:
        self._untrimmed |= dict.fromkeys(memtable.pools)
        for number, definition in memtable.pools.items():
            if definition.name is None:
                for statement in datafile.FORGET_POOL:
                    self._database.execute(statement, (number,))
            else:
                self._database.execute(datafile.DEFINE, datafile.row_of_pool(definition))
        self._database.executemany(datafile.SET_POOL, memtable.numbers.items())
        for pool, events in memtable.events.items():
            self._database.executemany(datafile.ADD_EVENT, events.values())
            self._database.execute(datafile.TRIM_EVENTS, {"pool": pool})

    def _delete_batches(self, count: int) -> None:
        if not self._flushing.rows:  # then no step before has written these
            self._write_pools(self._flushing)
        until = min(self._first + count, self._flushing_until)
        self._database.execute(datafile.TRIM, (until,))
        self._first = until + 1
        if until == self._flushing_until:
            self._flushing_until = 0
            self._flushing = Memtable()


def _places_of(memtable: Memtable) -> set[_Place]:
    """The leases that a memtable has something about."""
    return {
        (key, lease) for key, leases in memtable.past.items() for lease in leases
    } | memtable.reports.keys()


def _taken(items: list[Item], count: int) -> list[Item]:
    """Remove up to `count` items from the end of a list, and return them in reverse order."""
    if not count:
        return []
    taken = items[-count:]
    del items[-count:]
    return taken[::-1]


def _pools_with_history(database: sqlite3.Connection) -> list[int]:
    """The numbers of the pools of all leases that have ended, defined or not. O(pools · log n)."""
    found: list[int] = []
    last: int | None = database.execute(datafile.FIRST_END_FROM, (0,)).fetchone()[0]
    while last is not None:
        found.append(pool_of(last))
        last = database.execute(datafile.FIRST_END_FROM, (found[-1] + 1 << POOL_SHIFT,)).fetchone()[0]
    return found
