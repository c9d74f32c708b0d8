"""The first steps of a program: end without a traceback on Ctrl-C and SIGTERM, open closed standard streams.

This module imports nothing else of keypool, so that these steps are done within milliseconds.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def end_quietly() -> None:
    """Let SIGINT and SIGTERM end the process with status 0 until the server sets its own handlers.

    Nothing has been started by then, so nothing needs an orderly end.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)


def open_standard_streams() -> None:
    """Open /dev/null as those of the descriptors 0, 1 and 2 that are closed.

    Otherwise a socket or the data file would get that number, and log lines would be written into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # open() returns the lowest free number, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 - never closed


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(0)
