"""The history of a pool's keys: their leases that have ended, each with its holder, and how it ended.

A pool keeps the latest `history_leases` of them, and the oldest go one for one. When the setting gets smaller, those
that are too many can't be found from that moment on, and go in slices.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import deque
from operator import attrgetter
from typing import Protocol

from keypool.core.answers import HistoryPage, HistoryRow
from keypool.core.cursor import HistoryQuery, next_of
from keypool.core.history import PastLease, Window
from keypool.core.keys import moment
from keypool.core.outcomes import Report

_TRIMMED_AT_ONCE = 1000  # leases that are forgotten in one turn of the loop: about 0.3 ms
_by_lease = attrgetter("lease")


class LeaseHistory(Protocol):
    """The leases of one pool that have ended. It belongs to the journal of the pool."""

    @property
    def kept(self) -> int:
        """How many there are. O(1)."""
        ...

    def add(self, past: PastLease, most: int) -> None:
        """Record a lease that has just ended, and forget the oldest one if there are `most` already. O(1)."""
        ...

    def amend(self, key_id: int, lease: int, report: Report) -> None:
        """Add a report to the latest lease of a key, if it is still kept. O(1)."""
        ...

    def limit(self, most: int) -> None:
        """Keep no more than the latest `most` from now on. O(1), and in slices later."""
        ...

    async def page(self, key_id: int, count: int, before: int | None) -> list[PastLease]:
        """Up to `count` leases of a key, with lower numbers than `before`, the latest first. O(log n + count).

        Raises StorageUnavailable.
        """
        ...


class _Leases:
    """The leases of one key, the oldest first. Forgotten ones stay in the list until they are half of it."""

    __slots__ = ("leases", "start")

    def __init__(self) -> None:
        self.leases: list[PastLease] = []
        self.start = 0

    def forget_first(self) -> bool:
        """Returns whether none is left. Amortized O(1)."""
        self.start += 1
        if self.start * 2 > len(self.leases):
            del self.leases[: self.start]
            self.start = 0
        return not self.leases


class MemoryHistory:
    """A LeaseHistory that is in memory only."""

    def __init__(self) -> None:
        self._window = Window()
        self._order: deque[PastLease] = deque()
        self._by_key: dict[int, _Leases] = {}
        self._trimming = False

    @property
    def kept(self) -> int:
        """How many leases are kept. O(1)."""
        return self._window.kept

    def add(self, past: PastLease, most: int) -> None:
        """Record a lease. O(1)."""
        past.number = self._window.next(most)
        self._order.append(past)
        found = self._by_key.get(past.key_id)
        if found is None:
            found = self._by_key[past.key_id] = _Leases()
        found.leases.append(past)
        if self._has_more():
            self._trim(2)

    def amend(self, key_id: int, lease: int, report: Report) -> None:
        """Add a report. O(1)."""
        found = self._by_key.get(key_id)
        if found is not None and found.leases[-1].lease == lease:
            found.leases[-1].outcome, found.leases[-1].reason = report.outcome, report.reason

    def limit(self, most: int) -> None:
        """Keep no more. O(1), and in slices later."""
        self._window.limit(most)
        if not self._trimming and self._has_more():
            self._trimming = True
            asyncio.get_running_loop().call_soon(self._trim_slice)

    async def page(self, key_id: int, count: int, before: int | None) -> list[PastLease]:
        """A page. O(log n + count). It never waits."""
        found = self._by_key.get(key_id)
        if found is None:
            return []
        leases, start = found.leases, found.start
        end = len(leases) if before is None else bisect_left(leases, before, lo=start, key=_by_lease)
        page = leases[max(start, end - count) : end]
        return [past for past in reversed(page) if past.number >= self._window.first]

    def _has_more(self) -> bool:
        return bool(self._order) and self._order[0].number < self._window.first

    def _trim(self, count: int) -> None:
        """Forget up to `count` leases that are too many. O(count)."""
        while count and self._has_more():
            gone = self._order.popleft()
            if self._by_key[gone.key_id].forget_first():
                del self._by_key[gone.key_id]
            count -= 1

    def _trim_slice(self) -> None:
        self._trim(_TRIMMED_AT_ONCE)
        self._trimming = self._has_more()
        if self._trimming:
            asyncio.get_running_loop().call_soon(self._trim_slice)


def history_page(leases: list[PastLease], query: HistoryQuery) -> HistoryPage:
    """The answer of a page, of one lease more than `query.limit` if there are more. O(page)."""
    shown = leases[: query.limit]
    last = (shown[-1].lease,) if len(leases) > query.limit else None
    return HistoryPage([_row_of(past) for past in shown], next_of("history", last))


def _row_of(past: PastLease) -> HistoryRow:
    # The difference of the moments that are shown, so that it is the same after a restart.
    held = (round(past.ended_at * 1000) - round(past.acquired_at * 1000)) / 1000
    return HistoryRow(
        past.lease,
        past.owner,
        past.client,
        moment(past.acquired_at),
        moment(past.ended_at),
        max(0.0, held),
        past.how,
        past.outcome,
        past.reason,
        past.extended,
    )
