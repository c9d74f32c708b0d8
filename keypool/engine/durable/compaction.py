"""From the batches of a data file into its tables, later and a little at a time.

A batch is committed by writing it as it is behind those before: a few pages at the end of one table, where a row of
each of its keys would be as many pages in as many places. What costs comes later, for many batches together: of each
key only the last state is written, and in the order of ids, so that neighbours share a page. This is how log-structured
merge trees work (O'Neil et al., The log-structured merge-tree, Acta Informatica 33, 1996), with two levels.

One generation of batches is folded while the next is gathered: first its rows, then its batches are taken away, the
oldest first. So at any moment a row of the table may be older than the last that the batches say of its key, never
newer, and whoever reads the batches over the table has the truth, whatever the power failed in the middle of.
"""

from __future__ import annotations

import sqlite3

from keypool.engine.durable import datafile
from keypool.engine.durable.datafile import Gathered

_NUMBERS = "SELECT coalesce(min(number), 1), coalesce(max(number), 0) FROM batches"
_WORTH = 20_000  # rows gathered before they are folded
_FEWEST, _MOST = 128, 10_000  # rows folded at once: 0.5 ms, and only after a crowd of changes up to 50 ms
_NUMBERS_WEIGH = 4  # rows: a batch holds the pool's numbers, too


class Batches:
    """The batches of one data file, and how far they are folded. Its methods raise sqlite3.Error.

    After that, and after `finish`, it no longer knows how the file stands: make another.
    """

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._committed: list[bytes] = []
        self._gathered = datafile.read_batches(database)
        self._first, self._last = database.execute(_NUMBERS).fetchone()
        self._weight = len(self._gathered.rows)
        self._due = 0  # rows that may be folded by now
        self._folded = Gathered()  # the generation that is folded,
        self._ids: list[int] = []  # what is left of it, backwards,
        self._until = 0  # and the last of its batches; 0 when they are gone

    def commit(self, encoded: list[bytes]) -> None:
        """Write these, all or none, durably. O(their size), wherever their keys are: they aren't even looked at."""
        numbered = list(enumerate(encoded, self._last + 1))
        if len(numbered) == 1:
            self._database.execute(datafile.ADD_BATCH, numbered[0])
        else:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany(datafile.ADD_BATCH, numbered)
            self._database.execute("COMMIT")
        self._last += len(encoded)
        self._committed += encoded

    def fold(self) -> None:
        """Fold twice as many rows as were committed since the last time, if it is time to. O(_MOST) at most."""
        self._gather()
        if not self._until:
            if self._weight < _WORTH:
                self._due = 0
                return
            self._begin()
        if self._due < _FEWEST:
            return
        due = min(self._due, _MOST)
        self._due -= due
        # It may be lost: what is committed here the batches have said, and their going comes after it.
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.execute("BEGIN IMMEDIATE")
        if self._ids:
            self._fold_rows(due)
        else:
            self._trim(due)
        self._database.execute("COMMIT")
        self._database.execute("PRAGMA synchronous = FULL")

    def finish(self) -> None:
        """Fold all that there is, durably. O(_WORTH), or more after a larger batch."""
        if not self._last:
            return
        self._gather()
        left = Gathered()
        left.rows = {id: self._folded.rows[id] for id in self._ids} | self._gathered.rows
        left.numbers = self._folded.numbers | self._gathered.numbers
        self._database.execute("BEGIN IMMEDIATE")
        self._write(left, sorted(left.rows))
        self._database.executemany(datafile.SET_POOL, left.numbers.items())
        self._database.execute(datafile.TRIM, (self._last,))
        self._database.execute("COMMIT")

    def _gather(self) -> None:
        """Look at what was committed since the last time. O(its rows)."""
        for batch in map(datafile.decode, self._committed):
            self._gathered.add(batch)
            weight = len(batch.rows) + len(batch.purged) + _NUMBERS_WEIGH
            self._weight += weight
            self._due += 2 * weight  # so a generation is folded before the next one is as large
        self._committed.clear()

    def _begin(self) -> None:
        """Go on to the generation that has been gathered. O(_WORTH · log _WORTH): some 3 ms."""
        self._folded, self._gathered, self._weight = self._gathered, Gathered(), 0
        self._ids = sorted(self._folded.rows, reverse=True)
        self._until = self._last

    def _fold_rows(self, count: int) -> None:
        ids = self._ids[-count:]
        del self._ids[-count:]
        self._write(self._folded, ids[::-1])
        if not self._ids:
            self._database.executemany(datafile.SET_POOL, self._folded.numbers.items())

    def _write(self, gathered: Gathered, ids: list[int]) -> None:
        rows = [row for id in ids if (row := gathered.rows[id]) is not None]
        self._database.executemany(datafile.UPSERT, rows)
        self._database.executemany(datafile.PURGE, [(id,) for id in ids if gathered.rows[id] is None])

    def _trim(self, count: int) -> None:
        until = min(self._first + count, self._until)
        self._database.execute(datafile.TRIM, (until,))
        self._first = until + 1
        if until == self._until:
            self._until = 0
            self._folded = Gathered()
