"""How long a running loop was kept from its work.

A callback asks to be called again a millisecond later, for ever, and notes how much later than that it was.
Whatever runs too long in one turn of the loop shows there, be it a callback, a collection of garbage or the
loop itself: anything else that was due then waited as long.

On a machine that does other work too, most of it may be the wait for a core, which the kernel counts: what is
left without that wait is the program's own.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from dataclasses import dataclass

INTERVAL = 0.001


@dataclass
class Stall:
    """The worst in a stretch of time, in seconds beyond the interval."""

    wall: float = 0.0
    own: float = 0.0
    """Without the wait for a core: the worst such, not necessarily in the same moment."""


class StallProbe:
    """Measures the loop that is running, from `start` to `stop`. Costs it about five µs a millisecond.

    A turn of the loop that never ends isn't seen, of course; nor is one shorter than `INTERVAL`.
    """

    def __init__(self) -> None:
        self.worst = Stall()
        self.late = 0
        """How many were longer than 10 ms, without the wait for a core."""
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._queue = CoreQueue()
        self._at = self._waited = 0.0

    def start(self) -> StallProbe:
        """Begin, or go on."""
        self._at, self._waited = time.perf_counter(), self._queue.waited()
        self._timer = self._loop.call_later(INTERVAL, self._called)
        return self

    def stop(self) -> None:
        """No more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def take(self) -> Stall:
        """What was measured since the last time."""
        taken, self.worst, self.late = self.worst, Stall(), 0
        return taken

    def _called(self) -> None:
        now, waited = time.perf_counter(), self._queue.waited()
        excess = now - self._at - INTERVAL
        own = excess - (waited - self._waited)
        self.late += own > 0.010
        self.worst.wall = max(self.worst.wall, excess)
        self.worst.own = max(self.worst.own, own)
        self._at, self._waited = now, waited
        self._timer = self._loop.call_later(INTERVAL, self._called)


class CoreQueue:
    """How long this thread has been ready to run and waited for a core. Always 0 where the kernel doesn't tell."""

    def __init__(self) -> None:
        try:
            path = f"/proc/self/task/{threading.get_native_id()}/schedstat"
            self._file = os.open(path, os.O_RDONLY)
        except OSError:
            self._file = -1

    def waited(self) -> float:
        """Seconds."""
        if self._file < 0:
            return 0.0
        return int(os.pread(self._file, 100, 0).split()[1]) / 1e9


class Collections:
    """How long the longest garbage collection took, in seconds, of each generation."""

    def __init__(self) -> None:
        self.worst = [0.0, 0.0, 0.0]
        self._at = 0.0
        gc.callbacks.append(self._called)

    def reset(self) -> None:
        """Forget what was measured."""
        self.worst = [0.0, 0.0, 0.0]

    def _called(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._at = time.perf_counter()
        else:
            generation = info["generation"]
            self.worst[generation] = max(self.worst[generation], time.perf_counter() - self._at)
