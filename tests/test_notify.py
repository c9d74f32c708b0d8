"""What systemd is told, by a real datagram socket that stands for it: ready, alive, stopping."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Start
from support import API

from keypool.server.sd_notify import Notifier


class Manager:
    """The end of the service manager: a datagram socket, with or without a file."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.settimeout(30)
        self.environ = {"NOTIFY_SOCKET": address}

    def next(self) -> dict[str, str]:
        """The next message, as its assignments."""
        lines = self._socket.recv(4096).decode().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def wait_for(self, name: str) -> dict[str, str]:
        """The next message that has this assignment."""
        while name not in (message := self.next()):
            pass
        return message

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()


@pytest.fixture(params=["file", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    """A service manager that listens."""
    file = str(tmp_path / "notify")
    made = Manager(file if request.param == "file" else f"@keypool-test-{os.getpid()}-{tmp_path.name}")
    yield made
    made.close()


def test_loading_ready_watchdog_and_stopping_are_notified(manager: Manager, start_server: Start) -> None:
    """In that order; READY comes when it answers, with its process id; no message before holds READY."""
    server = start_server(env={**manager.environ, "WATCHDOG_USEC": "600000"})
    assert manager.next() == {"STATUS": "loading"}
    ready = manager.next()
    assert ready["READY"] == "1"
    assert ready["MAINPID"] == str(server.pid)
    assert server.client().get(API + "/stats").status == 200
    for _ in range(3):  # from the loop, again and again
        assert manager.wait_for("WATCHDOG") == {"WATCHDOG": "1"}
    server.signal(signal.SIGTERM)
    assert manager.wait_for("STOPPING")["STOPPING"] == "1"
    assert server.wait() == 0


def test_without_a_watchdog_no_keepalive_is_sent(manager: Manager, start_server: Start) -> None:
    """Nor where it means another process."""
    server = start_server(env={**manager.environ, "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"})
    server.finish()
    messages = [manager.next()]
    while "STOPPING" not in messages[-1]:
        messages.append(manager.next())
    assert not any("WATCHDOG" in message for message in messages), messages


def test_a_missing_notify_socket_is_ignored(tmp_path: Path, start_server: Start) -> None:
    """A socket that is gone, and variables that make no sense, change nothing."""
    start_server(env={"NOTIFY_SOCKET": str(tmp_path / "gone"), "WATCHDOG_USEC": "soon"}).finish()
    for environ in ({}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1234"}):
        notifier = Notifier(environ)
        notifier.status("x")
        notifier.ready("x")
        notifier.stopping("x")
