"""Commits batches to a data file, and flushes them to its tables later, a few rows at a time.

This is a log-structured merge tree of two levels (O'Neil et al., The log-structured merge-tree, Acta Informatica 33,
1996). A batch is committed by appending it to the table `batches`: this writes a few pages at its end, where updating
the row of each key would write a page for each. The memtable merges the batches. When it has `FLUSH_THRESHOLD_ROWS`,
it is flushed to the other tables while a new one gathers the next batches: only the last state of each key, in order of
ids, so that neighbours share a page.

A flush writes the rows first, and then deletes its batches, the oldest first. So at any moment a row of the table may
be older than the state of its key in the batches, never newer: batches override rows, and reading both gives the
committed state, wherever a power failure interrupts.
"""

from __future__ import annotations

import sqlite3

from keypool.engine.durable import datafile
from keypool.engine.durable.rows import Memtable, decode

FLUSH_THRESHOLD_ROWS = 20_000
MIN_FLUSH_ROWS = 128
"""Fewest rows that one step flushes: 0.5 ms."""
MAX_FLUSH_ROWS = 10_000
"""Most rows that one step flushes, after a large batch: 50 ms."""
ROWS_PER_BATCH = 4
"""Rows that a batch counts for in addition to its own, since it contains the pool's numbers, too."""

_NUMBERS = "SELECT coalesce(min(number), 1), coalesce(max(number), 0) FROM batches"


class BatchLog:
    """The batches of one data file, and how far they are flushed. Its methods raise sqlite3.Error.

    After an error, and after `flush_all`, its state no longer matches the file: create another.

    | step of a flush     | `_flushing` | `_ids`   | `_flushing_until` |
    | ------------------- | ----------- | -------- | ----------------- |
    | no flush            | empty       | empty    | 0                 |
    | rows are written    | all rows    | the rest | last batch        |
    | batches are deleted | all rows    | empty    | last batch        |
    """

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._committed: list[bytes] = []  # batches that aren't in the memtable yet
        self._memtable = datafile.read_batches(database)
        self._weight = len(self._memtable.rows)  # of the memtable, in rows
        self._first, self._last = database.execute(_NUMBERS).fetchone()
        self._budget = 0  # rows that may be flushed now
        self._flushing = Memtable()
        self._ids: list[int] = []  # of rows in `_flushing` that aren't written yet, descending
        self._flushing_until = 0

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

    def flush(self) -> None:
        """Do a step of a flush, if one is due: twice as many rows as were committed since. O(MAX_FLUSH_ROWS)."""
        self._gather()
        if not self._flushing_until:
            if self._weight < FLUSH_THRESHOLD_ROWS:
                self._budget = 0
                return
            self._begin()
        if self._budget < MIN_FLUSH_ROWS:
            return
        count = min(self._budget, MAX_FLUSH_ROWS)
        self._budget -= count
        # It does no harm if this transaction is lost: its rows are in the batches, which are deleted after it.
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.execute("BEGIN IMMEDIATE")
        if self._ids:
            self._flush_rows(count)
        else:
            self._delete_batches(count)
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
        self._write_pools(left)
        self._database.execute(datafile.TRIM, (self._last,))
        self._database.execute("COMMIT")

    def _gather(self) -> None:
        """Merge the newly committed batches into the memtable. O(their rows)."""
        for batch in map(decode, self._committed):
            self._memtable.add(batch)
            weight = len(batch.rows) + len(batch.purged) + len(batch.events) + ROWS_PER_BATCH
            self._weight += weight
            self._budget += 2 * weight  # so that a flush ends before the next memtable is full
        self._committed.clear()

    def _begin(self) -> None:
        """Begin to flush the memtable. O(n log n) in its rows: about 3 ms."""
        self._flushing, self._memtable, self._weight = self._memtable, Memtable(), 0
        self._ids = sorted(self._flushing.rows, reverse=True)
        self._flushing_until = self._last

    def _flush_rows(self, count: int) -> None:
        ids = self._ids[-count:]
        del self._ids[-count:]
        self._write(self._flushing, ids[::-1])
        if not self._ids:
            self._write_pools(self._flushing)

    def _write(self, memtable: Memtable, ids: list[int]) -> None:
        rows = [row for id in ids if (row := memtable.rows[id]) is not None]
        self._database.executemany(datafile.UPSERT, rows)
        self._database.executemany(datafile.PURGE, [(id,) for id in ids if memtable.rows[id] is None])

    def _write_pools(self, memtable: Memtable) -> None:
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
