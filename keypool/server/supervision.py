"""Where a server process stands: who tells it to stop, and whom it tells how it is.

Alone   the only one: signals stop it; the log and the service manager hear of it
Member  one of `--processes`: its parent stops it and hears of it, over a socket (processes.py)
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, Protocol

from keypool.server.sd_notify import Notifier

BEAT_SECONDS = 1.0
DRAIN, RELOAD, READY, BEAT = b"d", b"h", b"r", b"."

IGNORED_SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)
"""What would end a process at once, without a drain, by the system's default. SIGHUP until it has its meaning."""

_log = logging.getLogger("keypool")
_ready_log = logging.getLogger("keypool.ready")


def exit_now(status: int) -> NoReturn:
    """End the process on the spot, with what it has logged."""
    logging.shutdown()
    os._exit(status)


class Station(Protocol):
    """What serving.py asks of either."""

    reserve: float
    """Seconds of --drain-seconds that the server leaves for its end to be noticed."""

    def stop_asked(self) -> asyncio.Event:
        """Set once the server should stop. Called once, first, with the loop running."""
        ...

    def on_reload(self, reload: Callable[[], None]) -> None:
        """Call this each time that the tokens' files are to be read again. Called once, after `stop_asked`."""
        ...

    def loading(self) -> None:
        """The engine is being opened."""
        ...

    def ready(self, url: str) -> None:
        """Calls are served there."""
        ...

    def draining(self) -> None:
        """No more connections are taken."""
        ...

    def stopped(self) -> None:
        """All is over but the exit."""
        ...


class Alone:
    """The first SIGTERM or SIGINT asks to stop; the second doesn't ask."""

    reserve = 0.0

    def __init__(self) -> None:
        self._notifier = Notifier(os.environ)

    def stop_asked(self) -> asyncio.Event:
        """See Station."""
        self._asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._got, number)
        return self._asked

    def on_reload(self, reload: Callable[[], None]) -> None:
        """See Station: SIGHUP."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)

    def _got(self, number: signal.Signals) -> None:
        if self._asked.is_set():
            _log.warning("second signal (%s): stopping now", number.name)
            exit_now(1)
        _log.info("%s: stopping", number.name)
        self._asked.set()

    def loading(self) -> None:
        """See Station."""
        self._notifier.status("loading")

    def ready(self, url: str) -> None:
        """See Station."""
        _ready_log.info("ready on %s", url)
        self._notifier.ready(f"serving on {url}")

    def draining(self) -> None:
        """See Station."""
        _log.info("draining")
        self._notifier.stopping("draining")

    def stopped(self) -> None:
        """See Station."""
        _log.info("stopped")


@dataclass
class Member:
    """The process number `index` (from 0) of several on one address.

    `port` is the one that they share. `link` is a socket to the parent: bytes from there are orders, to read the
    tokens' files again or to stop, and its end means that the parent is gone. From here go a byte when calls are
    served, and a beat a second.
    """

    index: int
    port: int
    link: socket.socket
    reserve: float = 0.5

    def stop_asked(self) -> asyncio.Event:
        """See Station."""
        self._asked = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.link.setblocking(False)
        self._loop.add_reader(self.link.fileno(), self._heard)
        self._beat()
        return self._asked

    def on_reload(self, reload: Callable[[], None]) -> None:
        """See Station: the parent passes SIGHUP on."""
        self._reload = reload

    def _heard(self) -> None:
        try:
            order = self.link.recv(16)
        except BlockingIOError:
            return
        except OSError:
            order = b""
        if not order:
            exit_now(1)  # the parent was killed, and so are we: whoever looks after it starts all anew
        if RELOAD in order:
            self._reload()
        if DRAIN in order:
            self._asked.set()

    def _beat(self) -> None:
        self._tell(BEAT)
        self._loop.call_later(BEAT_SECONDS, self._beat)

    def _tell(self, what: bytes) -> None:
        try:
            self.link.send(what)
        except BlockingIOError:
            return  # the parent stands still
        except OSError:
            exit_now(1)

    def loading(self) -> None:
        """See Station."""

    def ready(self, url: str) -> None:
        """See Station."""
        self._tell(READY)

    def draining(self) -> None:
        """See Station."""
        _log.debug("draining")

    def stopped(self) -> None:
        """See Station."""
        _log.debug("stopped")
