"""One `IOLoop.call_later` per key and deadline: armed and cancelled here and nowhere else.

A timer only wakes the server up; the deadline is the truth. So a timer carries what it was armed for (the
lease number, the deadline) and the pool compares that, rather than a clock: uvloop may fire up to 1.3 ms
early. And a fired timer only queues its key. The queue is drained in slices, so that a hundred thousand
deadlines in the same second don't keep the loop from its other work.

On uvloop a cancel removes the timer. On the stock asyncio loop a cancelled timer stays in a heap that is
rebuilt once half of it is cancelled: at a million keys that is a stall of half a second, which is why keypool
runs on uvloop where there is one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from tornado.ioloop import IOLoop

from keypool.keys import Key

SLICE = 100
"""Deadlines dealt with in one turn of the loop: under a millisecond's work."""

CROWD = 64
"""Timers armed for the same millisecond before the next ones go to the millisecond after."""


class _Spread:
    """Spreads timers that are armed one after the other for the same millisecond.

    A batch of a thousand keys has one deadline, and a restored pool may have a million alike: the loop would
    fire them all in one turn. Spread, they come 16 ms later per thousand, which no call can tell, since calls
    go by the deadline.
    """

    __slots__ = ("_armed", "_millisecond")

    def __init__(self) -> None:
        self._millisecond = 0
        self._armed = 0

    def later(self, deadline: float) -> float:
        """Seconds to add to a timer for this deadline."""
        millisecond = int(deadline * 1000)
        if millisecond != self._millisecond:
            self._millisecond, self._armed = millisecond, 0
        self._armed += 1
        return self._armed // CROWD * 0.001


class Timers:
    """The timers of one pool. `release(key, lease)` and `expire(key, deadline)` are called when they are due.

    Arming and cancelling are O(1) on uvloop, O(log n) on the stock loop.
    """

    def __init__(
        self,
        loop: IOLoop,
        now: Callable[[], float],
        release: Callable[[Key, int], None],
        expire: Callable[[Key, float], None],
    ) -> None:
        self._loop = loop
        self._now = now
        self._release = release
        self._expire = expire
        self._due: deque[Callable[[], None]] = deque()
        self._draining = False
        self._closed = False
        self._releases = _Spread()
        self._expiries = _Spread()
        self.armed = 0
        """Timers that are set and have neither fired nor been cancelled."""

    def arm_release(self, key: Key) -> None:
        """Set the timer of a key's block."""
        assert key.release_deadline is not None
        key.release_timer = self._arm(key.release_deadline, self._releases, self._release_due, key, key.lease)

    def arm_expiry(self, key: Key) -> None:
        """Set the timer of a key's `expires_deadline`; the one set before must have been cancelled."""
        key.expiry_timer = self._arm(
            key.expires_deadline, self._expiries, self._expiry_due, key, key.expires_deadline
        )

    def cancel_release(self, key: Key) -> None:
        """Undo `arm_release`; nothing if the timer has fired."""
        timer, key.release_timer = key.release_timer, None
        self._cancel(timer)

    def cancel_expiry(self, key: Key) -> None:
        """Undo `arm_expiry`; nothing if the timer has fired."""
        timer, key.expiry_timer = key.expiry_timer, None
        self._cancel(timer)

    def after(self, seconds: float, callback: Callable[..., None], *args: object) -> object:
        """A timer that has nothing to do with a key. Returns the handle that `cancel` takes."""
        return self._loop.call_later(seconds, callback, *args)

    def cancel(self, timer: object) -> None:
        """Undo `after`; None is a timer that has fired."""
        if timer is not None:
            self._loop.remove_timeout(timer)

    def close(self) -> None:
        """Forget what is queued. Timers that are still armed find nothing to do when they fire."""
        self._closed = True
        self._due.clear()

    def _arm(self, deadline: float, spread: _Spread, callback: Callable[..., None], *args: object) -> object:
        self.armed += 1
        return self._loop.call_later(deadline - self._now() + spread.later(deadline), callback, *args)

    def _cancel(self, timer: object) -> None:
        if timer is not None:
            self.armed -= 1
            self._loop.remove_timeout(timer)

    def _release_due(self, key: Key, lease: int) -> None:
        key.release_timer = None
        self._queue(lambda: self._release(key, lease))

    def _expiry_due(self, key: Key, deadline: float) -> None:
        key.expiry_timer = None
        self._queue(lambda: self._expire(key, deadline))

    def _queue(self, step: Callable[[], None]) -> None:
        self.armed -= 1
        if self._closed:
            return
        self._due.append(step)
        if not self._draining:
            self._draining = True
            self._loop.add_callback(self._drain)

    def _drain(self) -> None:
        for _ in range(min(SLICE, len(self._due))):
            self._due.popleft()()
        self._draining = bool(self._due)
        if self._draining:
            self._loop.add_callback(self._drain)
