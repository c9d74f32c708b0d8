"""Staying awake for a moment while a caller is quick.

A loop with nothing to do sleeps until the kernel wakes it, which takes tens of microseconds; in a virtual machine the
processor is somebody else's meanwhile, and comes back with cold caches: a call that takes 20 µs of a busy server
was seen to take 80 of one that sleeps before each. So while calls come one after the other, each soon after the
answer before, the loop looks for the next one for a moment before it sleeps. What else it has to do is done in between.

It is the idle polling of Seastar (`--idle-poll-time-us`), under the condition of KVM's halt polling: only after a wait
that was short. And no longer than about what it costs to sleep, so that who is waited for in vain costs twice as much
at worst (Karlin et al., Empirical studies of competitive spinning, SOSP 1991). A quiet server is not kept awake.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

MOMENT = 60e-6  # seconds that the loop stays awake after an answer
QUICK = 150e-6  # seconds from answer to answer in which a call comes that might have been waited for
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Awake:
    """What keeps one loop awake. With a single processor nothing does: the caller needs it."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float] = time.monotonic,
        cores: int = _CORES,
    ) -> None:
        self._loop = loop
        self._clock = clock
        self._quick = QUICK if cores > 1 else 0.0
        self._answered = 0.0
        self._looking = False

    def answered(self) -> None:
        """A caller was answered just now: if that was soon after the answer before, stay awake. O(1)."""
        now = self._clock()
        quick = now - self._answered < self._quick
        self._answered = now
        if quick and not self._looking:
            self._looking = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        # That the loop has this to do is why it asks the kernel for news without waiting for it.
        if self._clock() - self._answered < MOMENT:
            self._loop.call_soon(self._look)
        else:
            self._looking = False
