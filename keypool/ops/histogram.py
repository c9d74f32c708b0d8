"""Histograms for hot paths: no labels, locks or library. An observation costs a fifth of a microsecond.

`metrics.py` turns them into Prometheus metrics at a scrape.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from keypool.core.outcomes import Outcome

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


class Histogram:
    """Observations by size. `bounds` are inclusive upper bounds, ascending; the last bucket has no bound."""

    __slots__ = ("bounds", "counts", "largest", "last", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        self.largest = 0.0
        self.last = 0.0

    def add(self, value: float) -> None:
        """Add an observation. O(log buckets)."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value
        self.last = value
        if value > self.largest:  # noqa: PLR1730 - max() costs half of all this
            self.largest = value

    def include(self, other: Histogram) -> None:
        """Add the observations of another one with the same bounds. O(buckets)."""
        self.counts = [own + others for own, others in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum
        self.largest = max(self.largest, other.largest)

    @property
    def count(self) -> int:
        """Observations. O(buckets)."""
        return sum(self.counts)

    def cumulative(self) -> list[tuple[str, float]]:
        """Prometheus's buckets: each upper bound with the number of observations up to it."""
        ends = [*map(str, self.bounds), "+Inf"]
        buckets, so_far = [], 0
        for end, count in zip(ends, self.counts, strict=True):
            so_far += count
            buckets.append((end, float(so_far)))
        return buckets


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """The value that `share` of the observations don't exceed, None without any: as Prometheus's histogram_quantile.

    Within a bucket observations count as spread evenly; in the last one as the largest bound. O(buckets).
    """
    wanted = share * sum(counts)
    if not wanted:
        return None
    lower, so_far = 0.0, 0
    for upper, count in zip(bounds, counts, strict=False):
        if so_far + count >= wanted:
            return lower + (upper - lower) * (wanted - so_far) / count
        lower, so_far = upper, so_far + count
    return lower


NO_OPERATION = "none"
"""The operation of a request that named no call, such as an unknown path."""

_FROM_THE_START = ("ok", "unauthorized", "forbidden", "storage-unavailable", "internal")


class CallMetrics:
    """Calls by operation and outcome (`ok` or the code of an error), and how long they took (`Dispatcher.answered`).

    Bounded by operations times codes. `operations` maps each operation to the codes of its own errors. These and
    `_FROM_THE_START` have a count of zero from the start: Prometheus computes no increase for the first sample of a
    series, so an alert would miss a burst that creates the series.
    """

    def __init__(self, operations: Mapping[str, Iterable[str]]) -> None:
        codes = {**operations, NO_OPERATION: ()}
        self.outcomes: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.seconds = {operation: Histogram(SECONDS) for operation in codes}
        for operation, own in codes.items():
            for outcome in (*_FROM_THE_START, *own):
                self.outcomes[operation, outcome] = 0


class ReportMetrics:
    """The reports of holders by outcome, and how many of them the guard kept from a quarantine. At zero from the start.

    A report counts if it was the lease's first. In a batch a repeated one counts as well, and guarded ones aren't
    distinguished, as its answer says neither.
    """

    def __init__(self) -> None:
        self.outcomes = dict.fromkeys(map(str, Outcome), 0)
        self.guarded = 0

    def add(self, outcome: Outcome, guarded: bool = False) -> None:
        """Count one report. O(1)."""
        self.outcomes[outcome] += 1
        self.guarded += guarded
