"""How the server itself is: how long its loop was held up, and what the engine tells of its own work.

A timer that wants to run 20 times a second and notes how late it was: so long did every call have to wait, at
that moment, before its turn came. What this module does not do: keep a history, or judge.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping

from keypool.engine import Engine
from keypool.ops.histogram import SECONDS, Histogram

_PERIOD = 0.05
_SECONDS = 60


class LoopStall:
    """The longest that the loop was held up, by the second, over the last minute. Costs a timer of 50 ms."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.tally = Histogram(SECONDS)
        """Every lateness, for metrics."""
        self._worst: deque[float] = deque([0.0], maxlen=_SECONDS)
        self._second = 0
        self._due = 0.0
        self._handle: asyncio.TimerHandle | None = None
        self._arm()

    @property
    def worst(self) -> float:
        """Seconds, over the last minute."""
        return max(self._worst)

    def close(self) -> None:
        """Stop looking."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _arm(self) -> None:
        self._due = self._loop.time() + _PERIOD
        self._handle = self._loop.call_at(self._due, self._look)

    def _look(self) -> None:
        late = max(0.0, self._loop.time() - self._due)
        self.tally.add(late)
        second = int(self._due)
        if second != self._second:
            self._second = second
            self._worst.append(late)
        elif late > self._worst[-1]:
            self._worst[-1] = late
        self._arm()


def engine_figures(engine: Engine) -> Mapping[str, float]:
    """What an engine offers to tell of its work, by name (`commit_seconds`, …); nothing if it offers none."""
    figures = getattr(engine, "figures", None)
    return figures() if callable(figures) else {}


def engine_measures(engine: Engine) -> Mapping[str, float | Mapping[str, float]]:
    """What an engine offers for metrics beside its histograms, by full name (metrics.py); nothing if it offers none."""
    measures = getattr(engine, "measures", None)
    return measures() if callable(measures) else {}
