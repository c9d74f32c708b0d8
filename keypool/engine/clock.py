"""The pool's clock: near the wall clock in value, monotonic in its steps.

It is set by the wall clock once, at the start, and by the monotonic clock from then on, so that a wall clock
that is put right while the server runs moves no deadline. Across a stop the wall clock counts again, but
never backwards: `not_before` is the last moment that the pool is known to have lived.
"""

from __future__ import annotations

import time
from collections.abc import Callable


def make_clock(
    wall: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.monotonic,
    not_before: float = 0.0,
) -> Callable[[], float]:
    """A function of the moment: seconds since the epoch, as of the start. About 0.1 µs a call."""
    offset = max(wall(), not_before) - monotonic()
    return lambda: offset + monotonic()
