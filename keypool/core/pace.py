"""Pace: how often a key may be used, by the generic cell rate algorithm.

GCRA in its virtual scheduling form (ITU-T I.371, ATM Forum Traffic Management 4.0) keeps one number a key: the
theoretical arrival time, `Key.paced_until`, at which the key would be used next if it were used evenly. Each use moves
it by `interval` from now, or from itself if that is later. A key has budget while it is no more than `tolerance` ahead,
so of `burst` uses at once the last is the last that it has budget for. In any `seconds` there are at most
`count + burst - 1` uses.

The number is compared at the end of a lease (pool.py): a key without budget cools until it has. So an available key
has budget, and an acquire only charges. A key is charged by the pace that holds at that moment.
"""

from __future__ import annotations

import msgspec

LONGEST_WAIT = 10 * 366 * 86_400.0
"""Seconds that a key cools at most for its pace, however many uses are charged."""


class Pace(msgspec.Struct, frozen=True, gc=False):
    """`count` uses in `seconds`, of which `burst` may come at once. Files and Valkey contain it: see Details."""

    count: int
    seconds: float
    burst: int = 1

    @property
    def interval(self) -> float:
        """Seconds from one use to the next, if they are even."""
        return self.seconds / self.count

    @property
    def tolerance(self) -> float:
        """Seconds by which the theoretical arrival time may be ahead of a use."""
        return (self.burst - 1) * (self.seconds / self.count)

    def charged(self, paced_until: float, uses: int, now: float) -> float:
        """The theoretical arrival time after more uses in a lease that is charged already.

        A lease that was acquired without a pace is charged from now on.
        """
        return min((paced_until or now) + uses * self.interval, now + self.tolerance + LONGEST_WAIT)

    def __str__(self) -> str:
        return f"{self.count} in {self.seconds:.15g} s, burst {self.burst}"
