"""What a program does first: Ctrl-C and SIGTERM end it without a traceback, closed standard streams are opened.

This module imports nothing else of keypool, so that this is done within milliseconds.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def end_quietly() -> None:
    """Let SIGINT and SIGTERM end the process with status 0 until the server sets its own handlers.

    Nothing has begun by then, so there is nothing to end in order.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)


def open_standard_streams() -> None:
    """Open /dev/null as 0, 1 and 2 where these are closed.

    Otherwise the next file that is opened would get that number, and log lines would go into a socket or the data file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # This opens the lowest free number, so this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 - never closed


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(0)
