"""The median and the 99th percentile of a histogram, over the last five minutes.

A histogram counts since the server started, so its counts are kept for five minutes, once a second.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from keypool.ops.histogram import Histogram, quantile

LATELY = 300
"""Seconds."""


class Latency:
    """`p50` and `p99` in seconds, None if there was nothing lately. `read` returns histograms with the same bounds,
    which are taken together.
    """

    def __init__(self, read: Callable[[], Iterable[Histogram]]) -> None:
        self._read = read
        self._before: deque[list[int]] = deque(maxlen=LATELY)
        self.p50: float | None = None
        self.p99: float | None = None
        self._count = 0

    def sample(self) -> None:
        """Called once a second. O(histograms)."""
        histograms = list(self._read())
        if not histograms:
            return
        bounds = histograms[0].bounds
        counts = list(map(sum, zip(*(each.counts for each in histograms), strict=True)))
        if not self._before:
            self._before.append(counts)  # what was counted before isn't lately
        lately = [now - before for now, before in zip(counts, self._before[0], strict=True)]
        self.p50, self.p99 = quantile(bounds, lately, 0.5), quantile(bounds, lately, 0.99)
        self._count = sum(lately)
        self._before.append(counts)

    def both(self) -> tuple[float | None, float | None]:
        """`p50` and `p99`."""
        return self.p50, self.p99

    def p99_of(self, least: int) -> float | None:
        """`p99` if there were at least so many observations lately: of a few it is nearly the largest."""
        return self.p99 if self._count >= least else None
