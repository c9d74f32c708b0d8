"""Passing signals on to a command: which, to whom, and how they are waited for.

The signals are blocked and fetched one by one (sigtimedwait), which tells who sent each: what the terminal
sends to its foreground group reaches the command anyway. Where there is no sigtimedwait (macOS), handlers
note them, and what the terminal may have sent is left to it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

_PASSED_ON = [
    getattr(signal, name)
    for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]
_BY_TERMINAL = (signal.SIGINT, getattr(signal, "SIGQUIT", None))
_TICK = 0.5  # seconds between looks at the command where nothing tells that it has ended


@dataclass(frozen=True)
class Foreground:
    """Whether this process belongs to a terminal's foreground, whose keys send signals to all of it."""

    is_ours: bool

    @classmethod
    def here(cls) -> Foreground:
        """As it is now."""
        try:
            terminal = os.open("/dev/tty", os.O_RDONLY)
        except OSError:
            return cls(is_ours=False)
        try:
            return cls(os.tcgetpgrp(terminal) == os.getpgrp())
        except OSError:
            return cls(is_ours=False)
        finally:
            os.close(terminal)


class Signals(Protocol):
    """Signals that are to be passed on, as they come."""

    def wait(self, seconds: float | None) -> int | None:
        """The next one, or None when so much time has passed or the command may have ended."""
        ...

    def restore(self) -> None:
        """In the child: be as the parent was before."""
        ...


@contextlib.contextmanager
def signals_for(foreground: Foreground) -> Iterator[Signals]:
    """The signals that come to this process, instead of what they would do to it."""
    fetched = hasattr(signal, "sigtimedwait")
    signals = _Fetched(foreground) if fetched else _Noted(foreground)
    try:
        yield signals
    finally:
        signals.end()


class _Fetched:
    def __init__(self, foreground: Foreground) -> None:
        self._foreground = foreground
        ours = {number for number in _PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN}
        self._set = ours | {signal.SIGCHLD}
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, self._set)

    def wait(self, seconds: float | None) -> int | None:
        info = signal.sigtimedwait(self._set, _TICK if seconds is None else max(0.0, min(seconds, _TICK)))
        if info is None or info.si_signo == signal.SIGCHLD:
            return None
        by_kernel = info.si_code > 0  # sent by the terminal, not by a process
        return None if by_kernel and self._foreground.is_ours else info.si_signo

    def restore(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)

    def end(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)


class _Noted:
    def __init__(self, foreground: Foreground) -> None:
        self._foreground = foreground
        self._noted: list[int] = []
        self._before: dict[int, Any] = {}
        for number in _PASSED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        if not (self._foreground.is_ours and number in _BY_TERMINAL):
            self._noted.append(number)

    def wait(self, seconds: float | None) -> int | None:
        if not self._noted:
            time.sleep(0.05)
        return self._noted.pop(0) if self._noted else None

    def restore(self) -> None:
        return

    def end(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
