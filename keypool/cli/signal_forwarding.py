"""Signals: which `run` passes on to its command, and how a call's answer is awaited before one ends keypool.

`run` blocks the signals and fetches them one by one with sigtimedwait, which also returns who sent each: the
terminal sends Ctrl-C to its whole foreground process group, so the command has it already. Without
sigtimedwait (macOS) handlers collect the signals, and SIGINT and SIGQUIT aren't passed on in the foreground.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Protocol

_PASSED_ON = [
    getattr(signal, name)
    for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]
_BY_TERMINAL = (signal.SIGINT, getattr(signal, "SIGQUIT", None))
_POLL_SECONDS = 0.5  # between looks at the command, should a SIGCHLD be missed
ENDING = [signal.SIGINT, *(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))]

Handler = Callable[[int, FrameType | None], Any]


def exit_in_order(number: int, frame: FrameType | None) -> None:
    """A handler: unwind the program, with the exit status that a shell reports for this signal."""
    raise SystemExit(128 + number)


@contextlib.contextmanager
def answer_first() -> Iterator[list[int]]:
    """Delay Ctrl-C, SIGTERM and SIGHUP: the first is appended to the list, a second one acts at once.

    For calls whose answer must not be lost. Whoever uses this looks at the list after each call.
    """
    noted: list[int] = []
    before: dict[int, Handler] = {}

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        if len(noted) > 1:
            before[number](number, frame)
        else:
            # Not through sys.stderr, which the signal may have interrupted.
            os.write(2, b"keypool: waiting for the server's answer; once more to leave at once\n")

    for number in ENDING:
        handler = signal.getsignal(number)
        if callable(handler):  # not the default, nor ignored
            before[number] = handler
            signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def in_foreground() -> bool:
    """Whether this process belongs to its terminal's foreground group, to which Ctrl-C is sent."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


class Signals(Protocol):
    """Signals that are to be passed on."""

    def wait(self, seconds: float | None) -> int | None:
        """The next signal, or None after so many seconds or when the command may have ended."""

    def restore(self) -> None:
        """Undo what was done to this process's signals; for the child, too, before it becomes the command."""


@contextlib.contextmanager
def caught_signals(*, foreground: bool) -> Iterator[Signals]:
    """Within this context signals don't act on this process and are returned by `wait`."""
    signals = _Blocked(foreground) if hasattr(signal, "sigtimedwait") else _Handled(foreground)
    try:
        yield signals
    finally:
        signals.restore()


class _Blocked:
    def __init__(self, foreground: bool) -> None:
        self._foreground = foreground
        not_ignored = {number for number in _PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN}
        self._blocked = not_ignored | {signal.SIGCHLD}
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, self._blocked)

    def wait(self, seconds: float | None) -> int | None:
        timeout = _POLL_SECONDS if seconds is None else max(0.0, min(seconds, _POLL_SECONDS))
        info = signal.sigtimedwait(self._blocked, timeout)
        if info is None or info.si_signo == signal.SIGCHLD:
            return None
        by_terminal = info.si_code > 0  # sent by the kernel, not by a process
        return None if by_terminal and self._foreground else info.si_signo

    def restore(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)


class _Handled:
    def __init__(self, foreground: bool) -> None:
        self._pending: list[int] = []
        self._before: dict[int, Any] = {}
        for number in _PASSED_ON:
            skipped = foreground and number in _BY_TERMINAL
            if signal.getsignal(number) is not signal.SIG_IGN:
                handler = (lambda *_: None) if skipped else (lambda got, _: self._pending.append(got))
                self._before[number] = signal.signal(number, handler)

    def wait(self, seconds: float | None) -> int | None:
        if not self._pending:
            time.sleep(0.05)
        return self._pending.pop(0) if self._pending else None

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
