"""Several server processes on one address: a parent that starts them, watches them, and ends with them.

    parent          holds the port; serves nothing, knows no keys
      ├── process 1 the whole server, listening on the same address (SO_REUSEPORT): the system spreads connections
      └── process N

The first is started alone, so that what can't start says so once; then the others. One that dies is started anew,
after a pause that doubles while it keeps dying. Whatever ends the parent ends the processes: they are asked to
drain over their sockets, and go at once when those close or, on Linux, when the system tells that the parent died.
Signals that a terminal or a service manager sends to everybody are the parent's to handle: the processes ignore them.
SIGHUP is passed on to all. One whose beats stop, since its loop hangs or it was frozen, is killed: the system would go
on giving it its share of the connections.

Tornado's fork_processes forks and restarts too; it has no beats, passes on no signal, and doesn't drain.

It is made of forks, from a process that has no loop, and no thread but the log's, which holds nothing that a child
needs (log_writer.py). So settings are read once; tokens again at SIGHUP, which is passed on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from keypool.core.errors import StartError
from keypool.ops import logs
from keypool.pdeathsig import end_with_parent
from keypool.server.sd_notify import Notifier
from keypool.server.supervision import DRAIN, READY, RELOAD, Member

_PAUSE_FIRST = 0.1  # seconds between a death and the next start; doubled up to the longest
_PAUSE_LONGEST = 10.0
_SOUND_AFTER = 30.0  # seconds of serving after which a death is the first again
_HANGS_AFTER = 5.0  # seconds without a beat: several of them, so that a busy machine kills none
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_log = logging.getLogger("keypool")
_ready_log = logging.getLogger("keypool.ready")


@dataclass
class _Process:
    """One of them; `pid` is None while it isn't there."""

    index: int
    link: socket.socket | None = None
    pid: int | None = None
    ready: bool = False
    heard_at: float = 0.0
    started_at: float = 0.0
    start_at: float = 0.0
    pause: float = _PAUSE_FIRST

    def tell(self, what: bytes) -> None:
        if self.link is not None:
            with contextlib.suppress(OSError):  # it is dying
                self.link.send(what)

    def close(self) -> None:
        if self.link is not None:
            self.link.close()
        self.link = self.pid = None
        self.ready = False


@dataclass
class Group:
    """`run` is the parent's whole life. `serve` is a member's, and returns its exit status.

    Raises StartError if the port isn't to be had. Lengths of time are seconds.
    """

    count: int
    address: str
    port: int
    drain_seconds: float
    serve: Callable[[Member], int]
    environ: Mapping[str, str]
    reload: Callable[[], None]  # at SIGHUP, for the processes that are started later
    processes: list[_Process] = field(init=False)
    _status: int | None = field(
        default=None, init=False
    )  # of the exit, once it is known that there will be one

    def run(self) -> int:
        """Start all, watch them until told to stop; the exit status."""
        self.processes = [_Process(index) for index in range(self.count)]
        self._notifier = Notifier(self.environ)
        self._selector = selectors.DefaultSelector()
        self._announced = False
        self._drain_until = 0.0
        self._fed_at = 0.0
        self._watched_at = time.monotonic()
        self._notifier.status("loading")
        with reserved(self.address, self.port) as self.port, _caught() as self._wakeup:
            self._selector.register(self._wakeup, selectors.EVENT_READ)
            try:
                while self._step():
                    pass
            except BaseException:
                self._kill(self.processes)
                raise
        assert self._status is not None
        if not self._status:
            _log.info("stopped")
        return self._status

    # -- the loop

    def _step(self) -> bool:
        """Wait for what happens next and deal with it; whether there is more to come."""
        self._start_due()
        self._feed()
        for key, _ in self._selector.select(self._patience()):
            if key.fileobj is self._wakeup:
                self._signalled()
            else:
                self._hear(key.data)
        self._reap()
        self._announce()
        now = time.monotonic()
        self._kill_hung(now)
        if self._status is not None and now > self._drain_until:
            self._cut()
        return self._status is None or any(each.pid is not None for each in self.processes)

    def _patience(self) -> float:
        """Seconds until something is due at the latest."""
        now = time.monotonic()
        moments = [now + 1.0]
        if self._status is not None:
            moments.append(self._drain_until)
        else:
            moments += [each.start_at for each in self._startable()]
        if self._notifier.interval:
            moments.append(self._fed_at + self._notifier.interval)
        return max(0.0, min(moments) - now) + 0.001

    def _signalled(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in self._wakeup.recv(256):
                if number == signal.SIGHUP:
                    self.reload()
                    for each in self.processes:
                        each.tell(RELOAD)
                elif number != signal.SIGCHLD:
                    self._stop(signal.Signals(number))

    def _stop(self, number: signal.Signals) -> None:
        if self._status is not None:
            _log.warning("second signal (%s): stopping now", number.name)
            self._kill(self.processes)
            logging.shutdown()
            os._exit(1)
        _log.info("%s: stopping", number.name)
        self._notifier.stopping("draining")
        self._end(0)

    def _end(self, status: int) -> None:
        """Have all drain, and then exit with this status."""
        self._status = status
        self._drain_until = time.monotonic() + self.drain_seconds
        for each in self.processes:
            each.tell(DRAIN)

    def _cut(self) -> None:
        late = [each for each in self.processes if each.pid is not None]
        _log.warning("%d processes did not end within --drain-seconds and are killed", len(late))
        self._kill(late)
        self._drain_until += 60

    # -- starting

    def _startable(self) -> list[_Process]:
        """Those that are not there. Only the first until it serves: what is wrong is said once."""
        if self._status is not None:
            return []
        some = self.processes if self._announced or self.processes[0].ready else self.processes[:1]
        return [each for each in some if each.pid is None]

    def _start_due(self) -> None:
        for each in self._startable():
            if each.start_at <= time.monotonic():
                self._start(each)

    def _start(self, process: _Process) -> None:
        ours, theirs = socket.socketpair()
        follow = end_with_parent(os.getpid(), signal.SIGKILL)
        # A signal between the fork and the child's own handling would run the parent's in the child.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        pid = os.fork()
        if pid == 0:
            self._be(Member(process.index, self.port, theirs), ours, follow, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        ours.setblocking(False)
        process.pid, process.link = pid, ours
        process.started_at = process.heard_at = time.monotonic()
        self._selector.register(ours, selectors.EVENT_READ, process)

    def _be(
        self,
        member: Member,
        ours: socket.socket,
        follow: Callable[[], None],
        before: set[int | signal.Signals],
    ) -> NoReturn:
        """The child's life, from the fork to its exit."""
        status = 1
        try:
            follow()
            logs.name_process(member.index + 1)
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            # The parent's ends of the sockets must be the parent's alone, or its death would close none.
            ours.close()
            self._selector.close()
            self._wakeup.close()
            for each in self.processes:
                each.close()
            status = self.serve(member)
        except BaseException:
            _log.exception("process %d failed", member.index + 1)
        finally:
            logging.shutdown()
            sys.stdout.flush()
            os._exit(status)

    def _announce(self) -> None:
        """The first time that all serve, say so."""
        if self._announced or self._status is not None or not all(each.ready for each in self.processes):
            return
        self._announced = True
        host = f"[{self.address}]" if ":" in self.address else self.address
        url = f"http://{host}:{self.port}/"
        _ready_log.info("ready on %s", url)
        self._notifier.ready(f"{self.count} processes serving on {url}", feed=False)

    # -- watching

    def _hear(self, process: _Process) -> None:
        assert process.link is not None
        try:
            said = process.link.recv(256)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        process.heard_at = time.monotonic()
        if not said:  # it is gone, or will be in a moment: `_reap` has the rest
            self._selector.unregister(process.link)
            process.link.close()
            process.link = None
        elif READY in said:
            process.ready = True
            _log.info("process %d of %d serves, pid %d", process.index + 1, self.count, process.pid)

    def _reap(self) -> None:
        for process in self.processes:
            if process.pid is None:
                continue
            pid, status = os.waitpid(process.pid, os.WNOHANG)
            if pid:
                self._died(process, os.waitstatus_to_exitcode(status))

    def _died(self, process: _Process, status: int) -> None:
        pid, was_ready = process.pid, process.ready
        if process.link is not None:
            self._selector.unregister(process.link)
        process.close()
        if self._status is not None:
            return
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        if not self._announced:
            if status <= 0:  # otherwise it has said itself what is wrong
                _log.error("process %d, pid %d, %s before all were ready", process.index + 1, pid, how)
            self._end(max(1, status))
            return
        now = time.monotonic()
        if was_ready and now - process.started_at > _SOUND_AFTER:
            process.pause = _PAUSE_FIRST
        process.start_at = now + process.pause
        _log.warning(
            "process %d of %d, pid %d, %s: started again in %.1f s",
            process.index + 1, self.count, pid, how, process.pause,
        )  # fmt: skip
        process.pause = min(2 * process.pause, _PAUSE_LONGEST)

    def _feed(self) -> None:
        """Tell a service manager with a watchdog that the parent lives."""
        now = time.monotonic()
        if self._announced and self._notifier.interval and now - self._fed_at >= self._notifier.interval:
            self._notifier.alive()
            self._fed_at = now

    def _kill_hung(self, now: float) -> None:
        """Kill a process whose loop doesn't turn any more, also while it drains."""
        slept, self._watched_at = now - self._watched_at > _HANGS_AFTER / 2, now
        for process in self.processes:
            if slept:  # the parent stood still itself, perhaps with all of them
                process.heard_at = now
            if process.pid is not None and now - process.heard_at > _HANGS_AFTER:
                _log.warning("process %d of %d hangs and is killed", process.index + 1, self.count)
                process.heard_at = now
                self._kill([process])

    def _kill(self, processes: list[_Process]) -> None:
        self._signal(processes, signal.SIGKILL)

    def _signal(self, processes: list[_Process], number: signal.Signals) -> None:
        for process in processes:
            if process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)


@contextlib.contextmanager
def reserved(address: str, port: int) -> Iterator[int]:
    """Hold a port for processes that will share it; the port, chosen by the system for 0. Raises StartError.

    A socket that is bound and doesn't listen gets no connection, and keeps other users' programs away.
    """
    try:
        if port:  # that nobody listens there is seen without sharing only: another group would share
            for each in _bound(address, port, share=False):
                each.close()
        sockets = _bound(address, port, share=True)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise StartError(f"can't listen on {address}, port {port}: {reason}") from None
    try:
        yield sockets[0].getsockname()[1]
    finally:
        for each in sockets:
            each.close()


def _bound(address: str, port: int, *, share: bool) -> list[socket.socket]:
    """Sockets bound to all that the address stands for, to the same port. Raises OSError."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, place in dict.fromkeys(found):
            made = socket.socket(family, kind, protocol)
            sockets.append(made)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if share:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind((place[0], port, *place[2:]))
            port = made.getsockname()[1]
    except BaseException:
        for each in sockets:
            each.close()
        raise
    return sockets


@contextlib.contextmanager
def _caught() -> Iterator[socket.socket]:
    """A socket on which the number of each signal comes that is caught meanwhile."""
    reading, writing = socket.socketpair()
    reading.setblocking(False)
    writing.setblocking(False)
    before = {number: signal.signal(number, _noted) for number in _SIGNALS}
    signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    try:
        yield reading
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        reading.close()
        writing.close()


def _noted(number: int, frame: object) -> None:
    """The wake-up socket has the number."""
