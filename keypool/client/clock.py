"""The clock that leases are measured by.

The usual monotonic clock stands still while a laptop sleeps, and the server's does not: a lease would look
alive that ended long ago. Linux has a clock that counts sleep; elsewhere the monotonic one has to do.
"""

from __future__ import annotations

import time

_BOOT_CLOCK: int | None = getattr(time, "CLOCK_BOOTTIME", None)


def now() -> float:
    """Seconds since some moment in the past; never goes back."""
    if _BOOT_CLOCK is None:
        return time.monotonic()
    return time.clock_gettime(_BOOT_CLOCK)
