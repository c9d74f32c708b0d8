"""Which connection is served next, when there is more work than one turn of the loop should take.

This is deficit round robin (Shreedhar and Varghese, SIGCOMM 1995) that shares out processor time, with the two lists of
FQ-CoDel (RFC 8290, section 4.2), which let a flow that asks for little pass those that ask for much:

- A connection without a backlog is served as soon as its bytes arrive, for `QUANTUM` seconds at most. If it then has
  work left, it goes to the end of `backlog`, and waits there for its next quantum. What arrives meanwhile is held.
- All connections together get `BUDGET` seconds. When these are used up, the turn is over: what arrives is held, and its
  connection goes to the end of `fresh`. The loop polls for input, and the next turn begins, with `fresh`.
- After that, each turn has one quantum for the backlog: a caller who waits for each answer before the next request
  waits for one quantum of a flood at most, however many connections the flood has, and the flood is never starved.

A call can't be interrupted. If it takes longer than a quantum, its connection gets a debt, which is deducted from the
quanta that follow. A connection in debt is treated as one with a backlog.

    idle --(bytes arrive)--> served --(nothing left)--> idle
      |                        |  ^
      | turn over, or debt     |  | its turn comes
      v                        v  |
    fresh or backlog <----(quantum used)

Time is added up until a turn is over, or until the server resets `left` because an iteration of the loop has passed.
So nothing has to mark the beginning of a turn, and a call costs only two readings of the clock more.

A long call may pause: the coroutine of a batch yields between two slices, and its driver (http/api_call.py) queues as a
connection with a backlog does.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Protocol

QUANTUM = 0.001
"""Seconds that a connection is served at a time."""

BUDGET = 0.005
"""Seconds that all connections together are served before the loop polls for input."""

TASK = 0.005
"""Seconds charged for work done in a task, after the turn: a page takes 2 to 5 ms, so a turn has one at most."""


class Served(Protocol):
    """A connection or a paused call, which share the time. `debt` is in seconds, 0 at first."""

    debt: float

    def run(self) -> None:
        """Work for a quantum; if there is work left, `queue` again."""
        ...


class Turns:
    """The turns of one server's loop. `flush` is called before and after the queues are served."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        flush: Callable[[], None],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.clock = clock
        self.over = False
        """Whether this turn's time is used up, so that what arrives has to be held."""
        self.left = BUDGET
        """Seconds left of this turn's time; below 0 if overrun."""
        self._loop = loop
        self._flush = flush
        self._fresh: deque[Served] = deque()
        self._backlog: deque[Served] = deque()
        self._due = False

    def queue(self, served: Served, *, backlog: bool) -> None:
        """Call `served.run` in a later turn. It must not be queued already. O(1)."""
        (self._backlog if backlog else self._fresh).append(served)
        self._begin_soon()

    def spend(self, served: Served, started: float) -> None:
        """Account for the time since `started`, in which a connection without debt was served. O(1), 0.2 µs."""
        seconds = self.clock() - started
        self.left -= seconds
        if seconds > QUANTUM or self.left < 0:
            self.overrun(served, seconds)

    def overrun(self, served: Served, seconds: float) -> None:
        """Account for more than a quantum, already deducted from `left`, or for a `left` below 0. O(1)."""
        if seconds > QUANTUM:
            served.debt = seconds - QUANTUM
        if self.left < 0:
            self._end()

    def charge(self, seconds: float) -> None:
        """Account for time that was used, or will be before the next turn. O(1)."""
        self.left -= seconds
        if self.left < 0:
            self._end()

    def _end(self) -> None:
        self.over = True
        self._begin_soon()

    def _begin_soon(self) -> None:
        if not self._due:
            self._due = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._flush()  # so that answers given before don't wait for what follows
        self.left, self.over, self._due = BUDGET, False, False
        try:
            while self._fresh and not self.over:
                self._visit(self._fresh.popleft())
            until = self.left - QUANTUM
            for _ in range(len(self._backlog)):
                self._visit(self._backlog.popleft())
                if self.left <= until:
                    break
            self._flush()
        finally:  # if one raises, the others are still served
            if self._fresh or self._backlog:
                self._begin_soon()

    def _visit(self, served: Served) -> None:
        served.debt -= QUANTUM
        if served.debt > 0:
            self._backlog.append(served)
            return
        started = self.clock()
        served.run()
        seconds = self.clock() - started
        served.debt = max(0.0, served.debt + seconds)
        self.charge(seconds)
