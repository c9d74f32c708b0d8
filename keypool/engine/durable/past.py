"""The history of one pool in the data file: its leases that have ended.

The end of a lease is in the batch that has the change of its key, too. The server process keeps no more of the history
than what isn't committed yet. A page is read by the writer process, between two batches, from its memtables and its
tables (compaction.py). That needs neither a thread in the server nor a second connection, which would not see leases
that aren't flushed yet. The writer goes on reading while its commits fail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from keypool.core.history import PastLease, Window
from keypool.core.outcomes import Report
from keypool.engine.durable.datafile import FIRST_PAST, LAST_PAST
from keypool.engine.durable.rows import POOL_SHIFT, Past, past_lease_of, past_of, place_of_outcome
from keypool.engine.durable.wire import HistoryRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from keypool.engine.durable.journal import FileJournal

_ANY_LEASE = (1 << 63) - 1


class FileHistory:
    """See the module, and the protocol `engine.history.LeaseHistory`.

    `open` are the ends since the last batch was sent, `sent` those in the batch in flight. Only the PoolJournal, whose
    keys these leases are of, replaces them.
    """

    __slots__ = ("open", "sent", "_file", "_number", "_window")

    def __init__(self, file: FileJournal, number: int) -> None:
        self.open: list[Past] = []
        self.sent: list[Past] = []
        self._file = file
        self._number = number
        self._window = Window()

    @property
    def kept(self) -> int:
        """How many leases are kept. O(1)."""
        return self._window.kept

    def add(self, past: PastLease, most: int) -> None:
        """Put a lease that ends into the next batch, which has the change of its key, too. O(1)."""
        past.number = self._window.next(most)
        self.open.append(past_of(past, self._number))

    def amend(self, key_id: int, lease: int, report: Report) -> None:
        """Put a report on a lease that has ended into the next batch. O(1)."""
        outcome = place_of_outcome(report.outcome)
        self.open.append(
            Past(
                self._number << POOL_SHIFT | key_id, lease, 0, 0, 0, 0, 0, None, None, outcome, report.reason
            )
        )

    def limit(self, most: int) -> None:
        """Keep no more. O(1); the writer deletes the rest in slices. In the file with the pool's definition."""
        self._window.limit(most)

    async def page(self, key_id: int, count: int, before: int | None) -> list[PastLease]:
        """A page, of what is committed. O(log n + count) in the writer process. Raises StorageUnavailable."""
        if key_id >> POOL_SHIFT or not self._window.kept:
            return []
        before = _ANY_LEASE if before is None else before
        key, first = self._number << POOL_SHIFT | key_id, self._window.first
        return [
            past_lease_of(past) for past in await self._file.read(HistoryRequest(key, before, count, first))
        ]

    # -- the journal's calls

    def restore(self, numbers: Mapping[str, int]) -> None:
        """Take over the numbers of a pool in the file. O(1)."""
        self._window = Window(numbers.get(FIRST_PAST, 1), numbers.get(LAST_PAST, 0))

    def numbers(self) -> dict[str, int]:
        """The numbers of the pool's history that are kept with each batch; none if it never had one. O(1)."""
        window = self._window
        return {FIRST_PAST: window.first, LAST_PAST: window.last} if window.last else {}

    def not_kept(self) -> None:
        """The batch that was sent may not be on disk: its leases go into the next one. O(leases)."""
        self.open, self.sent = self.sent + self.open, []
