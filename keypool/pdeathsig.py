"""Have the kernel send a child process a signal when its parent dies (prctl PR_SET_PDEATHSIG; Linux only)."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int, number: int) -> Callable[[], None]:
    """A function that the child calls first, so that it gets signal `number` when process `parent` dies.

    On systems other than Linux it does nothing.
    """
    if sys.platform != "linux":
        return lambda: None
    libc = ctypes.CDLL(None)  # before the fork: loading isn't safe after it

    def follow() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:  # the parent died before the call
            os._exit(128 + number)

    return follow
