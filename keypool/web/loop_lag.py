"""How long the event loop is held up: a timer that should run 20 times a second records how late it ran.

Every call at that moment was delayed by the same time.
"""

from __future__ import annotations

import asyncio
from collections import deque

from keypool.ops.histogram import SECONDS, Histogram

_PERIOD = 0.05
_SECONDS = 60


class LoopStall:
    """The longest delay in each second of the last minute, and a histogram of all delays. Times are seconds."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.histogram = Histogram(SECONDS)
        self._worst: deque[float] = deque([0.0], maxlen=_SECONDS)
        self._second = 0
        self._due = 0.0
        self._handle: asyncio.TimerHandle | None = None
        self._arm()

    @property
    def worst(self) -> float:
        """The longest delay of the last minute, in seconds."""
        return max(self._worst)

    def close(self) -> None:
        """Stop the timer."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _arm(self) -> None:
        self._due = self._loop.time() + _PERIOD
        self._handle = self._loop.call_at(self._due, self._measure)

    def _measure(self) -> None:
        late = max(0.0, self._loop.time() - self._due)
        self.histogram.add(late)
        second = int(self._due)
        if second != self._second:
            self._second = second
            self._worst.append(late)
        elif late > self._worst[-1]:
            self._worst[-1] = late
        self._arm()
