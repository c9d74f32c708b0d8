"""SIGTERM and SIGHUP on an event loop: the program ends in order while a lease is open, as in signals.py.

The loop's own handler is used: SystemExit raised there stops the loop between two callbacks, `asyncio.run`
cancels all tasks, and each gives its key back on its way out. A loop that doesn't run in the main thread, or
has no such handlers (Windows), is left alone.
"""

from __future__ import annotations

import asyncio
import signal

from keypool.client.signals import QUIET_ENDS, in_main_thread

_counts: dict[tuple[int, int], int] = {}
"""How many open leases want a signal (its number) handled on a loop (its id)."""


class LoopUnwinding:
    """See the module. As long as one of a loop's is between `begin` and `end`, the handlers are set."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._numbers: list[signal.Signals] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def begin(self) -> None:
        """Set the handlers that are nobody's."""
        if not self._wanted or not in_main_thread():
            return
        self._loop = asyncio.get_running_loop()
        for number in QUIET_ENDS:
            entry = (id(self._loop), number)
            if entry not in _counts:
                if signal.getsignal(number) is not signal.SIG_DFL:
                    continue
                try:
                    self._loop.add_signal_handler(number, _unwind, number)
                except (NotImplementedError, RuntimeError, ValueError):
                    continue
            _counts[entry] = _counts.get(entry, 0) + 1
            self._numbers.append(number)

    def end(self) -> None:
        """The last one takes the handlers away."""
        for number in self._numbers:
            entry = (id(self._loop), number)
            _counts[entry] -= 1
            if not _counts[entry]:
                del _counts[entry]
                if self._loop is not None and not self._loop.is_closed():
                    self._loop.remove_signal_handler(number)
        self._numbers.clear()


def _unwind(number: signal.Signals) -> None:
    raise SystemExit(128 + number)
