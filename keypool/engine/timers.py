"""The timers of deadlines: a hashed timing wheel over `IOLoop.call_later`.

This is the technique of Varghese and Lauck (Hashed and hierarchical timing wheels, SOSP 1987). Keys whose deadlines lie
in the same 1/64 s (a bucket of index.py) share one timer, which fires when that 1/64 s is over. It is set with the
bucket's first key, and cancelled when unblock, keepalive or delete removes the last: most keys never set or cancel one.
A timer only wakes the server up; the deadline is the truth.

A timer for each key, as in the first design, costs O(n) now and then: uvloop keeps its handles in a set, and rehashing
it takes 100 ms at a million; the garbage collector visits each of them. docs/architecture.md has the measurements.

Due keys are processed in slices, so that a hundred thousand deadlines in the same second don't block the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tornado.ioloop import IOLoop

from keypool.core.index import DeadlineBucket

MARGIN = 0.002
"""Seconds after the end of a bucket at which its timer fires: uvloop may be 1.3 ms early."""


class Timers:
    """The timers of one pool. `process` processes some due keys and returns whether there are more.

    No timer fires before `start`: a pool that is being restored must not change.
    """

    def __init__(self, loop: IOLoop, now: Callable[[], float], process: Callable[[], bool]) -> None:
        self.loop = loop
        self._now = now
        self._process = process
        self._running = False
        self._processing = False
        self.armed = 0
        """Timers that have neither fired nor been cancelled."""

    def start(self, buckets: Iterable[DeadlineBucket]) -> None:
        """Set the timers of all buckets. O(buckets), at most 64 a second of deadlines."""
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
            self.loop.remove_timeout(timer)

    def after(self, seconds: float, callback: Callable[..., None], *args: object) -> object:
        """Set a timer that isn't for deadlines. Returns the handle for `cancel`. O(log timers)."""
        return self.loop.call_later(seconds, callback, *args)

    def cancel(self, timer: object) -> None:
        """Cancel a timer of `after`. None stands for a timer that has fired."""
        if timer is not None:
            self.loop.remove_timeout(timer)

    def process_soon(self) -> None:
        """Process due keys in the next turn: their timers may have fired while expiry was suspended."""
        if self._running and not self._processing:
            self._processing = True
            self.loop.add_callback(self._go_on)

    def close(self) -> None:
        """Stop. Timers that are still set do nothing when they fire."""
        self._running = False

    def _arm(self, bucket: DeadlineBucket) -> None:
        self.armed += 1
        bucket.timer = self.loop.call_later(bucket.ends + MARGIN - self._now(), self._due, bucket)

    def _due(self, bucket: DeadlineBucket) -> None:
        bucket.timer = None
        self.armed -= 1
        if not self._running:
            return
        if self._now() < bucket.ends:
            self._arm(bucket)  # no loop should be this early, but the deadline is the truth
        elif not self._processing:
            self._processing = True
            self._go_on()

    def _go_on(self) -> None:
        self._processing = False  # before `_process`, so that its exception ends this round only
        if self._running and self._process():
            self._processing = True
            self.loop.add_callback(self._go_on)
