"""Telling systemd how the server is: ready, alive, stopping. The protocol of sd_notify, without its library.

It is one datagram a message to the socket that `NOTIFY_SOCKET` names; where there is none, nothing is sent. The
watchdog's datagram comes from a timer of the loop, so it stops when the loop does, and systemd ends a server that
hangs. A service manager that doesn't listen is no reason to fail: what can't be sent is dropped.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping

from tornado.ioloop import IOLoop


class Notifier:
    """The service manager, if one started this process."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        self.interval = _watchdog_seconds(environ) / 2
        """Seconds between two signs of life; 0 if nobody waits for them."""
        self._socket: socket.socket | None = None
        if self._address.startswith(("/", "@")) and hasattr(socket, "AF_UNIX"):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(f"STATUS={text}")

    def ready(self, text: str, *, feed: bool = True) -> None:
        """The server serves; from now on the watchdog is fed, twice in the time that it waits.

        `feed=False` leaves that to the caller, who has no loop.
        """
        self._send(f"READY=1\nSTATUS={text}\nMAINPID={os.getpid()}")
        if feed and self._socket is not None and self.interval > 0:
            self._feed()

    def alive(self) -> None:
        """A sign of life."""
        self._send("WATCHDOG=1")

    def stopping(self, text: str) -> None:
        """The server stops. The watchdog is fed on: a drain hangs, if it does, like anything else."""
        self._send(f"STOPPING=1\nSTATUS={text}")

    def _feed(self) -> None:
        self.alive()
        IOLoop.current().call_later(self.interval, self._feed)

    def _send(self, message: str) -> None:
        if self._socket is None:
            return
        # A leading @ stands for the NUL of Linux's abstract namespace.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError):
            self._socket.sendto(message.encode(), address)


def _watchdog_seconds(environ: Mapping[str, str]) -> float:
    """How long systemd waits for a sign of life; 0 if it doesn't, or means another process."""
    microseconds, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not (microseconds.isascii() and microseconds.isdigit()):
        return 0.0
    return int(microseconds) / 1e6 if pid in ("", str(os.getpid())) else 0.0
