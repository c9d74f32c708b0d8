"""State reports to systemd: ready, alive, stopping. The protocol of sd_notify, without its library.

A message is one datagram to the socket that `NOTIFY_SOCKET` names; without this variable nothing is sent. The
watchdog's datagram comes from a timer of the loop, so it stops when the loop hangs, and systemd kills the server. A
service manager that isn't listening must not make the server fail: what can't be sent is dropped.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping

from tornado.ioloop import IOLoop


class Notifier:
    """The service manager that started this process, if any."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        self.interval = _watchdog_seconds(environ) / 2
        """Seconds between two watchdog messages; 0 if the watchdog is off."""
        self._socket: socket.socket | None = None
        if self._address.startswith(("/", "@")) and hasattr(socket, "AF_UNIX"):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(f"STATUS={text}")

    def ready(self, text: str, *, feed: bool = True) -> None:
        """The server serves. From now on the loop feeds the watchdog, or with `feed=False` the caller."""
        self._send(f"READY=1\nSTATUS={text}\nMAINPID={os.getpid()}")
        if feed and self._socket is not None and self.interval > 0:
            self._feed()

    def alive(self) -> None:
        """Feed the watchdog."""
        self._send("WATCHDOG=1")

    def stopping(self, text: str) -> None:
        """The server stops. The watchdog is still fed, as a drain can hang, too."""
        self._send(f"STOPPING=1\nSTATUS={text}")

    def _feed(self) -> None:
        self.alive()
        IOLoop.current().call_later(self.interval, self._feed)

    def _send(self, message: str) -> None:
        if self._socket is None:
            return
        # A leading @ stands for the NUL of Linux's abstract socket names.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError):
            self._socket.sendto(message.encode(), address)


def _watchdog_seconds(environ: Mapping[str, str]) -> float:
    """How long systemd waits for a watchdog message; 0 if it doesn't, or if the variables are for another process."""
    microseconds, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not (microseconds.isascii() and microseconds.isdigit()):
        return 0.0
    return int(microseconds) / 1e6 if pid in ("", str(os.getpid())) else 0.0
