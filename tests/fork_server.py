"""Starts `server.py` by forking a process that has imported the product already: 0.3 s of CPU less a server.

A forked server has the arguments, environment, folder, streams, session and signals that `subprocess.Popen` would
give it, is shown by ps with its command line, and runs `server.py` as `__main__`. What it can't have are settings
that the interpreter itself reads as it starts (`PYTHON...` variables): a test of those starts the real program.

One zygote a test process. It is the parent of its servers: it waits for one when asked to, and when the test process
is gone, however it went, it kills the session of each that was not released.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

_ROOT: Final = Path(__file__).resolve().parent.parent
_LARGEST: Final = 1 << 17  # bytes of one request, which is one packet
_ROOM: Final = "-" * 4000  # for the command lines of the servers, which are written over that of the zygote

AVAILABLE: Final = hasattr(os, "pidfd_open")
"""Whether this system has what it takes: packets over Unix sockets, and processes as file descriptors."""


class Zygote:
    """The tests' end of the socket to the process that forks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), _ROOM],
                stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True,
                env={"LANG": "C.UTF-8", "PATH": os.environ.get("PATH", os.defpath)}, cwd=_ROOT,
            )  # fmt: skip
        atexit.register(self._end)

    def _end(self) -> None:
        self._channel.close()
        self._process.wait(60)

    def ask(self, output: int | None = None, **request: Any) -> int:
        """The answer to a request, which may hand over a file descriptor."""
        with self._lock:
            socket.send_fds(self._channel, [json.dumps(request).encode()], [] if output is None else [output])
            answer = self._channel.recv(_LARGEST)
        assert answer, f"the fork server is gone, with status {self._process.wait()}"
        return int(answer)


@cache
def zygote() -> Zygote:
    """The one of this process, started when it is first needed."""
    return Zygote()


class ForkedServer:
    """A server process, as far as tests use `subprocess.Popen`; `output` takes what it prints."""

    def __init__(self, flags: Sequence[str], env: Mapping[str, str], cwd: Path | str, output: int) -> None:
        self.returncode: int | None = None
        self._lock = threading.Lock()
        self.pid = zygote().ask(output, start=list(flags), env=dict(env), cwd=str(cwd))
        # Nobody waits for it before `_reap`, so that the number is still its own.
        self._ended = os.pidfd_open(self.pid)

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._reap(0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status; raises TimeoutExpired."""
        status = self._reap(timeout)
        if status is None:
            raise subprocess.TimeoutExpired("server.py", timeout or 0)
        return status

    def _reap(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            poller = select.poll()
            poller.register(self._ended, select.POLLIN)
            if poller.poll(None if timeout is None else timeout * 1000):
                with self._lock:
                    if self.returncode is None:
                        self.returncode = zygote().ask(reap=self.pid)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def release(self) -> None:
        """Let go of a process that has ended."""
        zygote().ask(release=self.pid)
        os.close(self._ended)


# ------------------------------------------------------------------------------------- in the zygote's process


def _serve(channel: socket.socket) -> None:
    """Answer requests; returns in each forked process, set up to run the server."""
    sessions: set[int] = set()
    while True:
        message, fds, *_ = socket.recv_fds(channel, _LARGEST, 1)
        if not message:
            for session in sessions:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(session, signal.SIGKILL)
            os._exit(0)
        request = json.loads(message)
        if "start" in request:
            # Its end tells that the process is set up: only then can its session be killed.
            set_up, in_child = os.pipe()
            answer = os.fork()
            if not answer:
                channel.detach()
                _become(request, fds[0])
                return
            for fd in (in_child, *fds):
                os.close(fd)
            os.read(set_up, 1)
            os.close(set_up)
            sessions.add(answer)
        elif "reap" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["reap"], 0)[1])
        else:
            answer = 0
            sessions.discard(request["release"])
        channel.send(str(answer).encode())


def _become(request: dict[str, Any], output: int) -> None:
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    sys.argv = [str(_ROOT / "server.py"), *request["start"]]
    _show([sys.executable, *sys.argv])
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.closerange(3, 1 << 16)


def _show(words: list[str]) -> None:
    """Have ps and /proc show these as the command line of this process."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, of proc(5)
    line = "".join(f"{word}\0" for word in words).encode("utf-8", "surrogateescape")
    if len(line) < end - start:
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, line, len(line))


def main() -> None:
    """Import what a server does, and fork on request."""
    tests = sys.path[0]
    sys.path[0] = str(_ROOT)
    importlib.import_module("keypool.server.launch")
    engine = importlib.import_module("keypool.engine")
    for module in pkgutil.walk_packages(engine.__path__, "keypool.engine."):
        importlib.import_module(module.name)
    for name in ("tornado.platform.asyncio", "uvloop"):
        importlib.import_module(name)
    sys.path.append(tests)
    importlib.import_module("compiled_templates").share()
    sys.path.pop()
    gc.collect()
    gc.freeze()
    _serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
