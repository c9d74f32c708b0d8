"""Signals: those that `run` forwards to its command, and those that are delayed until a call is answered.

`run` blocks the signals and fetches them one by one. sigtimedwait also returns who sent each: the terminal
sends Ctrl-C to its whole foreground process group, so the command has it already. Where there is no
sigtimedwait (macOS), SIGINT and SIGQUIT are taken to come from the terminal if there is one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self

_PASSED_ON = [
    getattr(signal, name)
    for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]
_BY_TERMINAL = (signal.SIGINT, getattr(signal, "SIGQUIT", None))
_POLL_SECONDS = 0.5  # between checks of the command, in case a SIGCHLD is missed
_ENDING = [signal.SIGINT, *(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))]

Handler = Callable[[int, FrameType | None], Any]


def handle_signals() -> None:
    """Let SIGINT raise KeyboardInterrupt, and SIGTERM and SIGHUP raise SystemExit, unless they are ignored."""
    for number in _ENDING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def answer_first(*, enabled: bool = True) -> Iterator[list[int]]:
    """Delay Ctrl-C, SIGTERM and SIGHUP: the first is appended to the list, a second one acts at once.

    For calls whose answer must not be lost. The caller checks the list after each call, and after the block raises
    its signals again with `signal.raise_signal`.
    """
    delayed: list[int] = []
    before: dict[int, Handler] = {}

    def delay(number: int, frame: FrameType | None) -> None:
        delayed.append(number)
        if len(delayed) > 1:
            before[number](number, frame)
        else:
            # Not through sys.stderr, which the signal may have interrupted.
            os.write(2, b"keypool: waiting for the server's answer; once more to leave at once\n")

    for number in _ENDING if enabled else ():
        handler = signal.getsignal(number)
        if callable(handler):  # neither the default nor ignored
            before[number] = handler
            signal.signal(number, delay)
    try:
        yield delayed
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


class CaughtSignals:
    """A context in which signals don't act on this process, and `wait` returns them instead."""

    def __init__(self, *, foreground: bool) -> None:
        self._foreground = foreground
        not_ignored = {number for number in _PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN}
        self._blocked = not_ignored | {signal.SIGCHLD}

    def __enter__(self) -> Self:
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, self._blocked)
        return self

    def restore(self, *_: object) -> None:
        """Unblock the signals; called in the child as well, before the exec."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)

    __exit__ = restore

    def wait(self, seconds: float | None) -> int | None:
        """The next signal to forward, or None after the timeout or when the command may have ended."""
        timeout = _POLL_SECONDS if seconds is None else max(0.0, min(seconds, _POLL_SECONDS))
        if hasattr(signal, "sigtimedwait"):
            info = signal.sigtimedwait(self._blocked, timeout)
            number = info.si_signo if info else None
            by_terminal = info is not None and info.si_code > 0  # sent by the kernel, not by a process
        else:
            if not (pending := signal.sigpending() & self._blocked):
                time.sleep(min(timeout, 0.05))
            number = signal.sigwait(pending) if pending else None
            by_terminal = number in _BY_TERMINAL
        return None if number == signal.SIGCHLD or (by_terminal and self._foreground) else number
