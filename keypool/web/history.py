"""The data of the charts: the last 15 minutes by the second, the last 24 hours by the minute.

A sample holds gauges (at its end) and counts (of what happened during it). Samples are taken on whole seconds.
If the loop was too busy to take one, it is filled in later with its share of the counts, so that the time axis
is always right. Memory is bounded: 2,340 samples of 18 small numbers, about 1 MB.

The history of an earlier run of the server goes on with the first sample (`restore`), after zeros for the time in
between. By how much the counters grew in that time counts nowhere, as nobody knows in which second it was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import islice, repeat
from operator import itemgetter

import msgspec

from keypool.core.answers import Stats
from keypool.core.counters import COUNTERS, counter_values
from keypool.core.keys import moment

GAUGES = ("available", "blocked", "cooling", "quarantined", "waiting")
COUNTS = tuple(COUNTERS)
NAMES = GAUGES + COUNTS
SECONDS, MINUTES = 15 * 60, 24 * 60

Sample = tuple[int, ...]
"""The gauges, then the counts."""
Kept = tuple[int, list[Sample]]
"""The end of a series, and its samples."""
_NOTHING: Sample = (0,) * len(NAMES)


class Series:
    """The latest `size` samples, `step` seconds apart. `end` is the moment of the last one."""

    def __init__(self, step: int, size: int) -> None:
        self.step = step
        self.size = size
        self.end = 0
        self.samples: deque[Sample] = deque(maxlen=size)

    def add(self, end: int, sample: Sample) -> None:
        """Add the sample that ends at this moment."""
        self.end = end
        self.samples.append(sample)

    def fill(self, until: int) -> None:
        """Add zeros up to this moment, if it is later; an empty series stays empty. O(size)."""
        missing = max(0, (until - self.end) // self.step)
        if self.samples:
            self.samples.extend(repeat(_NOTHING, min(missing, self.size)))
        self.end += missing * self.step

    def drop_after(self, moment: int) -> None:
        """Drop the samples that end later. O(size)."""
        while self.samples and self.end > moment:
            self.samples.pop()
            self.end -= self.step
        self.end = min(self.end, moment // self.step * self.step)

    def columns(self) -> dict[str, list[int]]:
        """Each name with its numbers, oldest first. O(samples)."""
        if not self.samples:
            return {name: [] for name in NAMES}
        return {
            name: list(column) for name, column in zip(NAMES, zip(*self.samples, strict=True), strict=True)
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
            self._skip_to(second)
            return
        if passed > SECONDS:  # a long sleep of the machine
            passed = SECONDS
            self._skip_to(second - passed)
        happened = [max(0, new - old) for new, old in zip(counters, before, strict=True)]
        for left in range(passed, 0, -1):
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

    def restore(self, seconds: Kept, minutes: Kept) -> None:
        """Begin with the samples of an earlier run, before the first `add`. O(samples), some microseconds."""
        for series, (end, samples) in ((self.seconds, seconds), (self.minutes, minutes)):
            series.end = end
            series.samples.extend(samples)

    def kept(self) -> tuple[Kept, Kept]:
        """What `restore` takes. O(samples), some microseconds."""
        seconds, minutes = self.seconds, self.minutes
        return (seconds.end, list(seconds.samples)), (minutes.end, list(minutes.samples))

    def _skip_to(self, second: int) -> None:
        """Nobody counted until this second: end the minute that was being counted, and add zeros. O(SECONDS)."""
        seconds, minutes = self.seconds, self.minutes
        for series in (seconds, minutes):
            series.drop_after(second)  # the clock may have been set back between two runs of the server
        begun = seconds.end // 60 * 60
        if seconds.samples and minutes.end <= begun <= second - 60:
            minutes.add(begun + 60, _NOTHING[: len(GAUGES)] + self._counted(seconds.end - begun))
        minutes.fill(second // 60 * 60)
        seconds.fill(second)
        self._minute = list(self._counted(second % 60))

    def _counted(self, seconds: int) -> Sample:
        """The counts of the last `seconds`."""
        latest = islice(reversed(self.seconds.samples), seconds)
        return tuple(map(sum, zip(_NOTHING, *latest, strict=True)))[len(GAUGES) :]

    def within(self, seconds: int, name: str) -> int:
        """The sum of a count over the last `seconds`, 15 minutes at most. O(seconds)."""
        column = NAMES.index(name)
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
