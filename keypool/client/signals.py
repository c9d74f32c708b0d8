"""SIGTERM as an exception, on request. The library sets no signal handler by itself."""

from __future__ import annotations

import contextlib
import signal
from types import FrameType


def exit_on_sigterm() -> None:
    """From now on SIGTERM raises SystemExit(143) in the main thread, so that `with` blocks give their keys back.

    Without it SIGTERM ends the program at once, and its keys stay blocked until their deadline. Call it once,
    at the start of the program; in an asyncio program too, where the loop then ends and cancels its tasks.
    Raises ValueError outside the main thread.
    """
    signal.signal(signal.SIGTERM, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def block_all() -> None:
    """In a background thread: leave all signals to the main thread, whose calls they should interrupt."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
