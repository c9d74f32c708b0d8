"""Signals, as far as a key has to be given back before they end the program.

Two things are done, both for the main thread only, as only there handlers can be set and run:

- `Unwinding`: while a lease is open, SIGTERM and SIGHUP end the program by SystemExit (status 128 + number),
  so that the `with` is left in order, instead of at once. Only where nobody else has said what they do.
- `Deferred`: while an answer that must be heard is on its way, these signals and Ctrl-C are noted, and
  delivered when it is in hand. A handler that raised in that moment would lose a key that was just leased.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from keypool.client.wire import Leaving

QUIET_ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_ENDS = [signal.SIGINT, *QUIET_ENDS]

Handler = Callable[[int, FrameType | None], Any]


def in_main_thread() -> bool:
    """Whether handlers can be set here."""
    return threading.current_thread() is threading.main_thread()


def unwind(number: int, frame: FrameType | None) -> None:
    """End the program in order, with the status that a shell shows for this signal."""
    raise SystemExit(128 + number)


class Unwinding:
    """See the module. May be nested; the outermost takes its handlers away again."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._numbers: list[signal.Signals] = []

    def begin(self) -> None:
        """Set the handlers that are nobody's."""
        if self._wanted and in_main_thread():
            self._numbers = [number for number in QUIET_ENDS if signal.getsignal(number) is signal.SIG_DFL]
            for number in self._numbers:
                signal.signal(number, unwind)

    def end(self) -> None:
        """Take back those that are still ours."""
        if not in_main_thread():
            return
        for number in self._numbers:
            if signal.getsignal(number) is unwind:
                signal.signal(number, signal.SIG_DFL)
        self._numbers.clear()


class Deferred:
    """See the module. While `leaving.critical`, a signal is noted and makes the call leave."""

    def __init__(self, leaving: Leaving) -> None:
        self._leaving = leaving
        self._noted: list[int] = []
        self._before: dict[int, Handler] = {}

    def __enter__(self) -> None:
        if not in_main_thread():
            return
        for number in _ENDS:
            handler = signal.getsignal(number)
            if callable(handler):
                self._before[number] = handler
                signal.signal(number, self._got)

    def __exit__(self, *_: object) -> None:
        self._leaving.critical = False
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._got:
                signal.signal(number, handler)
        for number in self._noted:
            signal.raise_signal(number)

    def _got(self, number: int, frame: FrameType | None) -> None:
        if self._leaving.critical:
            self._noted.append(number)
            self._leaving.leave()
        else:
            self._before[number](number, frame)


def block_all() -> None:
    """In a background thread: leave all signals to the main one, whose calls they are meant to interrupt."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
