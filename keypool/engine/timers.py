"""The loop's timers: one `IOLoop.call_later` for each 1/64 s in which some key has a deadline.

A timer only wakes the server up; the deadline is the truth. So keys whose deadlines lie within the same 1/64 s
(a bucket of index.py) share one timer, which fires when that stretch is over; it is set when the bucket gets
its first key, and cancelled when unblock, keepalive or delete takes its last. Arming and cancelling cost a key
nothing.

One timer a key, which is how this began, walks the set behind one's back: uvloop keeps its handles in a set
that is rehashed whole as they come and go (100 ms at a million), and each handle is one more object for the
garbage collector to visit. docs/architecture.md has what was measured.

What is overdue when a timer fires is dealt with in slices, so that a hundred thousand deadlines in the same
second don't keep the loop from its other work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tornado.ioloop import IOLoop

from keypool.core.index import DeadlineBucket

MARGIN = 0.002
"""Seconds after the end of a bucket at which its timer fires: uvloop may be 1.3 ms early."""


class Timers:
    """The timers of one pool. `process` deals with some of what is overdue, and says whether there is more.

    Nothing fires before `start`: a pool that is being restored must not move.
    """

    def __init__(self, loop: IOLoop, now: Callable[[], float], process: Callable[[], bool]) -> None:
        self._loop = loop
        self._now = now
        self._process = process
        self._running = False
        self._processing = False
        self.armed = 0
        """Timers of buckets that are set and have neither fired nor been cancelled."""

    def start(self, buckets: Iterable[DeadlineBucket]) -> None:
        """Set the timers of all buckets that are open. O(buckets), at most 64 a second of deadlines."""
        self._running = True
        for bucket in buckets:
            self._arm(bucket)

    def opened(self, bucket: DeadlineBucket) -> None:
        """A bucket has got its first key: set its timer. O(log timers)."""
        if self._running:
            self._arm(bucket)

    def closed(self, bucket: DeadlineBucket) -> None:
        """A bucket has lost its last key: cancel its timer. O(log timers)."""
        timer, bucket.timer = bucket.timer, None
        if timer is not None:
            self.armed -= 1
            self._loop.remove_timeout(timer)

    def after(self, seconds: float, callback: Callable[..., None], *args: object) -> object:
        """A timer that has nothing to do with a key. Returns the handle that `cancel` takes."""
        return self._loop.call_later(seconds, callback, *args)

    def cancel(self, timer: object) -> None:
        """Undo `after`; None is a timer that has fired."""
        if timer is not None:
            self._loop.remove_timeout(timer)

    def process_soon(self) -> None:
        """Deal with what is overdue although its timers have fired: they found that it was not to be touched."""
        if self._running and not self._processing:
            self._processing = True
            self._loop.add_callback(self._go_on)

    def close(self) -> None:
        """Do nothing any more. Timers that are still set find nothing to do when they fire."""
        self._running = False

    def _arm(self, bucket: DeadlineBucket) -> None:
        self.armed += 1
        bucket.timer = self._loop.call_later(bucket.ends + MARGIN - self._now(), self._due, bucket)

    def _due(self, bucket: DeadlineBucket) -> None:
        bucket.timer = None
        self.armed -= 1
        if not self._running:
            return
        if self._now() < bucket.ends:
            self._arm(bucket)  # earlier than any loop should be, but a deadline is the truth
        elif not self._processing:
            self._processing = True
            self._go_on()

    def _go_on(self) -> None:
        self._processing = False  # first, so that an exception costs this round and no other
        if self._running and self._process():
            self._processing = True
            self._loop.add_callback(self._go_on)
