"""The data of the charts: the last 15 minutes by the second, the last 24 hours by the minute.

A sample holds gauges (at its end) and counts (of what happened during it). Samples are taken on whole seconds.
If the loop was too busy to take one, it is filled in later with its share of the counts, so that the time axis
is always right. Memory is bounded: 2,340 samples of 16 small numbers, about 1 MB. A restart begins
with an empty history.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import islice
from operator import itemgetter

import msgspec

from keypool.core.answers import Stats
from keypool.core.counters import COUNTERS, counter_values
from keypool.core.keys import moment

GAUGES = ("available", "blocked", "cooling", "quarantined", "waiting")
COUNTS = tuple(COUNTERS)
SECONDS, MINUTES = 15 * 60, 24 * 60

Sample = tuple[int, ...]
"""The gauges, then the counts."""


class Series:
    """The latest `size` samples, `step` seconds apart. `end` is the moment of the last one."""

    def __init__(self, step: int, size: int) -> None:
        self.step = step
        self.end = 0
        self.samples: deque[Sample] = deque(maxlen=size)

    def add(self, end: int, sample: Sample) -> None:
        """Add the sample that ends at this moment."""
        self.end = end
        self.samples.append(sample)

    def columns(self) -> dict[str, list[int]]:
        """Each name with its numbers, oldest first. O(samples)."""
        names = GAUGES + COUNTS
        if not self.samples:
            return {name: [] for name in names}
        return {
            name: list(column) for name, column in zip(names, zip(*self.samples, strict=True), strict=True)
        }


class History:
    """Both series. `add` costs a few microseconds a second."""

    def __init__(self) -> None:
        self.seconds = Series(1, SECONDS)
        self.minutes = Series(60, MINUTES)
        self._before: Sample | None = None
        self._minute = [0] * len(COUNTS)
        self._encoded: tuple[int, bytes] | None = None

    def add(self, now: float, stats: Stats) -> None:
        """Add the sample of this moment, unless its second already has one."""
        second = int(now)
        gauges = tuple(getattr(stats, name) for name in GAUGES)
        counters = counter_values(stats)
        before, passed = self._before, second - self.seconds.end
        if before is not None and passed <= 0:
            return
        self._before = counters
        if before is None:
            self.seconds.end = second
            return
        happened = [max(0, new - old) for new, old in zip(counters, before, strict=True)]
        # After a long sleep of the machine no more is filled in than the series can hold.
        for left in range(min(passed, SECONDS), 0, -1):
            share = [count // left for count in happened]
            happened = [count - part for count, part in zip(happened, share, strict=True)]
            self._add_second(second - left + 1, gauges, share)

    def _add_second(self, end: int, gauges: Sample, counts: Iterable[int]) -> None:
        counts = tuple(counts)
        self.seconds.add(end, gauges + counts)
        self._minute = [total + count for total, count in zip(self._minute, counts, strict=True)]
        if end % 60 == 0:
            self.minutes.add(end, gauges + tuple(self._minute))
            self._minute = [0] * len(COUNTS)

    def within(self, seconds: int, name: str) -> int:
        """The sum of a count over the last `seconds`, 15 minutes at most. O(seconds)."""
        column = (GAUGES + COUNTS).index(name)
        return sum(map(itemgetter(column), islice(reversed(self.seconds.samples), seconds)))

    def encoded(self) -> msgspec.Raw:
        """Both series as JSON, encoded at most once a second: `{"seconds":{"step","end",…},"minutes":{…}}`.

        `counted` has the counters at the latest second, from which a viewer continues the series.
        """
        if self._encoded is None or self._encoded[0] != self.seconds.end:
            counted = dict(zip(COUNTS, self._before or (0,) * len(COUNTS), strict=True))
            shapes = {
                "seconds": _shape(self.seconds) | {"counted": counted},
                "minutes": _shape(self.minutes),
            }
            self._encoded = (self.seconds.end, msgspec.json.encode(shapes))
        return msgspec.Raw(self._encoded[1])


def _shape(series: Series) -> dict[str, object]:
    return {"step": series.step, "end": moment(series.end), **series.columns()}
