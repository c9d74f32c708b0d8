"""A histogram that costs a fifth of a microsecond to add to: counts by bucket, and their sum.

Metrics are made from these when somebody asks for them (metrics.py); what is counted on hot paths is counted
here, without labels, locks or a library.
"""

from __future__ import annotations

from bisect import bisect_left

SECONDS = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
)
SECONDS_OF_WAIT = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0)
ROWS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0, 30000.0)


class Tally:
    """How often which size was seen. `bounds` are inclusive upper ends, ascending; the last bucket has none."""

    __slots__ = ("bounds", "counts", "largest", "last", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        self.largest = 0.0
        self.last = 0.0

    def add(self, value: float) -> None:
        """Count one. O(log buckets)."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value
        self.last = value
        if value > self.largest:  # noqa: PLR1730 - max() costs half of all this
            self.largest = value

    @property
    def count(self) -> int:
        """How many were added. O(buckets)."""
        return sum(self.counts)

    def cumulative(self) -> list[tuple[str, float]]:
        """The buckets as Prometheus has them: upper end, and how many were no larger."""
        ends = [*map(str, self.bounds), "+Inf"]
        buckets, so_far = [], 0
        for end, count in zip(ends, self.counts, strict=True):
            so_far += count
            buckets.append((end, float(so_far)))
        return buckets
