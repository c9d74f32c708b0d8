"""How long a running event loop was kept from its work, and by how much of that garbage collection was to blame.

A timer asks to be called a millisecond later, for ever, and notes how much later than that it was called. Whatever
takes long in one turn of the loop shows up there: a callback, a garbage collection, the loop itself. On a busy
machine most of it may be the wait for a core, which the kernel counts, so `own` is the same without that wait.
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
    """The worst since the last report, in seconds beyond the interval."""

    wall: float = 0.0
    own: float = 0.0
    """Without the wait for a core; not necessarily at the same moment."""


class StallProbe:
    """Measures the running loop between `start` and `stop`. Costs it about 5 µs a millisecond.

    A stall shorter than `INTERVAL` isn't seen.
    """

    def __init__(self) -> None:
        self.worst = Stall()
        self.late = 0
        """How many stalls were longer than 10 ms, without the wait for a core."""
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._at = self._waited = 0.0
        try:
            self._file = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY)
        except OSError:
            self._file = -1

    def start(self) -> StallProbe:
        """Begin, or go on."""
        self._at, self._waited = time.perf_counter(), self._waited_for_core()
        self._timer = self._loop.call_later(INTERVAL, self._called)
        return self

    def stop(self) -> Stall:
        """End, and return what was measured since the last stop."""
        if self._timer is not None:
            self._timer.cancel()
        taken, self.worst = self.worst, Stall()
        return taken

    def _called(self) -> None:
        now, waited = time.perf_counter(), self._waited_for_core()
        excess = now - self._at - INTERVAL
        own = excess - (waited - self._waited)
        self.late += own > 0.010
        self.worst.wall = max(self.worst.wall, excess)
        self.worst.own = max(self.worst.own, own)
        self._at, self._waited = now, waited
        self._timer = self._loop.call_later(INTERVAL, self._called)

    def _waited_for_core(self) -> float:
        return 0.0 if self._file < 0 else int(os.pread(self._file, 100, 0).split()[1]) / 1e9


class Collections:
    """The longest garbage collection since it was made, in seconds."""

    def __init__(self) -> None:
        self.worst = 0.0
        self._at = 0.0
        gc.callbacks.append(self._called)

    def _called(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._at = time.perf_counter()
        else:
            self.worst = max(self.worst, time.perf_counter() - self._at)
