"""The two kinds of server process: where stop requests come from, and where the state is reported.

- Standalone, the only process: signals stop it, and it reports to the log and the service manager.
- Worker, one of `--processes`: the supervisor (supervisor.py) stops it over a socket and gets its reports.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NoReturn, Protocol

from keypool.server.sd_notify import Notifier

BEAT_SECONDS = 1.0
DRAIN, RELOAD, READY, BEAT = b"d", b"h", b"r", b"."

IGNORED_SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)
"""Signals that would by default end a process without a drain. SIGHUP is ignored until it has its handler."""

_log = logging.getLogger("keypool")
_ready_log = logging.getLogger("keypool.ready")


def exit_now(status: int) -> NoReturn:
    """End the process at once, after its log is flushed."""
    logging.shutdown()
    os._exit(status)


class State(Enum):
    """The states of a server process, in order."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


class Lifecycle(Protocol):
    """What serving.py needs of either kind of process."""

    reserve: float
    """Seconds of --drain-seconds left over, so that the supervisor sees the exit before it kills the process."""

    def stop_asked(self) -> asyncio.Event:
        """An event that is set once the server should stop. Call it once, before the others, on the running loop."""
        ...

    def on_reload(self, reload: Callable[[], None]) -> None:
        """Register the callback for reloads of the token files. Call it after `stop_asked`."""
        ...

    def report(self, state: State, url: str = "") -> None:
        """The server has reached a state; READY comes with its URL."""
        ...


class Standalone:
    """The first SIGTERM or SIGINT asks for a drain; the second ends the process at once."""

    reserve = 0.0

    def __init__(self) -> None:
        self._notifier = Notifier(os.environ)

    def stop_asked(self) -> asyncio.Event:
        """See Lifecycle."""
        self._asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        return self._asked

    def on_reload(self, reload: Callable[[], None]) -> None:
        """See Lifecycle: by SIGHUP."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)

    def report(self, state: State, url: str = "") -> None:
        """See Lifecycle."""
        if state is State.LOADING:
            self._notifier.status("loading")
        elif state is State.READY:
            _ready_log.info("ready on %s", url)
            self._notifier.ready(f"serving on {url}")
        else:
            _log.info(state.value)
            if state is State.DRAINING:
                self._notifier.stopping("draining")

    def _stop(self, number: signal.Signals) -> None:
        if self._asked.is_set():
            _log.warning("second signal (%s): stopping now", number.name)
            exit_now(1)
        _log.info("%s: stopping", number.name)
        self._asked.set()


@dataclass
class Worker:
    """The process number `index` (from 0) of several that share `port`.

    `link` is a socket to the supervisor, which sends RELOAD and DRAIN; end of file means that the supervisor is gone.
    The worker sends READY once, and BEAT every second.
    """

    index: int
    port: int
    link: socket.socket
    reserve: float = 0.5

    def stop_asked(self) -> asyncio.Event:
        """See Lifecycle."""
        self._asked = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.link.setblocking(False)
        self._loop.add_reader(self.link.fileno(), self._receive)
        self._beat()
        return self._asked

    def on_reload(self, reload: Callable[[], None]) -> None:
        """See Lifecycle: the supervisor forwards SIGHUP."""
        self._reload = reload

    def report(self, state: State, url: str = "") -> None:
        """See Lifecycle."""
        if state is State.READY:
            self._send(READY)
        else:
            _log.debug(state.value)

    def _receive(self) -> None:
        try:
            order = self.link.recv(16)
        except BlockingIOError:
            return
        except OSError:
            order = b""
        if not order:
            exit_now(1)  # the supervisor was killed: the service manager restarts the whole group
        if RELOAD in order:
            self._reload()
        if DRAIN in order:
            self._asked.set()

    def _beat(self) -> None:
        self._send(BEAT)
        self._loop.call_later(BEAT_SECONDS, self._beat)

    def _send(self, message: bytes) -> None:
        try:
            self.link.send(message)
        except BlockingIOError:
            return  # the supervisor isn't reading
        except OSError:
            exit_now(1)
