"""Leases that have ended, as they are kept: who held a key, from when until when, and how that ended."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from keypool.core.outcomes import Outcome


class How(StrEnum):
    """How a lease ended. Files contain their places in this order: others may be added at the end only."""

    UNBLOCKED = "unblocked"
    RELEASED = "released"  # by its deadline
    REVOKED = "revoked"  # by an operator
    EXPIRED = "expired"  # with its key
    DELETED = "deleted"  # with its key


class PastLease(msgspec.Struct, gc=False):
    """A lease that has ended. Moments are seconds on the pool's clock."""

    key_id: int
    lease: int
    owner: str | None
    client: str | None
    acquired_at: float
    ended_at: float
    how: How
    outcome: Outcome | None
    """Of its holder's report, as is `reason`."""
    reason: str | None
    extended: int
    """How often it was extended."""
    number: int = 0
    """Counts the leases of the pool that have ended, from 1."""


class Window:
    """Which of the leases of a pool that have ended are kept: the latest, by their numbers. Its methods are O(1)."""

    __slots__ = ("first", "last")

    def __init__(self, first: int = 1, last: int = 0) -> None:
        self.first = first
        self.last = last

    @property
    def kept(self) -> int:
        """How many these are."""
        return self.last - self.first + 1

    def next(self, most: int) -> int:
        """The number of another lease, with which the oldest of more than `most` go."""
        self.last += 1
        self.limit(most)
        return self.last

    def limit(self, most: int) -> None:
        """Keep no more than the latest `most`."""
        self.first = max(self.first, self.last - most + 1)
