"""A child process that doesn't outlive its parent, by Linux's PR_SET_PDEATHSIG."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int, number: int) -> Callable[[], None]:
    """A function that a forked child calls first, to get signal `number` when its parent dies. Linux only."""
    if sys.platform != "linux":
        return lambda: None
    libc = ctypes.CDLL(None)  # before the fork: loading isn't safe after it

    def follow() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:  # it died before the prctl
            os._exit(128 + number)

    return follow
