"""Several server processes on one address: a supervisor starts them, watches them, and ends with them.

    supervisor        holds the port; serves nothing, has no keys
      ├── worker 1    a whole server, listening on the same address (SO_REUSEPORT): the system spreads connections
      └── worker N

A worker goes through these states:

    absent  --fork-->  starting  --READY-->  ready  --DRAIN, or the end of its socket-->  absent
      ^                    |                   |
      +--- after a pause --+-- died, or killed as its beats stopped

The first worker is started alone, so that an error of the start is logged once; then the others. A worker
that dies is restarted after a pause that doubles while it keeps dying. A worker whose beats stop, since its
loop hangs or it was frozen, is killed: the system would go on giving it its share of the connections. If one
dies before all were ready for the first time, the supervisor gives up.

However the supervisor ends, its workers end: it asks them to drain over their sockets, and they exit at once
when these close or, on Linux, when the system signals the supervisor's death. Signals that a terminal or a
service manager sends to the whole group are the supervisor's to handle: workers ignore them. SIGHUP is
forwarded to all.

Tornado's fork_processes forks and restarts too, but has no beats, forwards no signal, and doesn't drain.

Forking is safe here: the supervisor runs no event loop, and its only thread is the log's, which holds no lock
(log_writer.py). Settings are read once, before the fork; tokens again at SIGHUP, and when their file has changed.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NoReturn

from keypool.core.errors import StartError
from keypool.ops import logs
from keypool.pdeathsig import end_with_parent
from keypool.server.lifecycle import DRAIN, READY, RELOAD, Worker, exit_now
from keypool.server.sd_notify import Notifier

_FIRST_PAUSE = 0.1  # seconds between a death and the next start; doubled up to the longest
_LONGEST_PAUSE = 10.0
_STABLE_AFTER = 30.0  # seconds of serving after which the pause starts from the shortest again
_HANGS_AFTER = 5.0  # seconds without a beat: several intervals, so that a busy machine causes no kill
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_log = logging.getLogger("keypool")
_ready_log = logging.getLogger("keypool.ready")


class _Child:
    """A worker as the supervisor sees it. `pid` is None while it is absent, `link` once its socket is closed."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.link: socket.socket | None = None
        self.pid: int | None = None
        self.ready = False
        self.heard_at = 0.0
        self.started_at = 0.0
        self.start_at = 0.0
        self.pause = _FIRST_PAUSE

    def send(self, order: bytes) -> None:
        if self.link is not None:
            with contextlib.suppress(OSError):  # it is dying
                self.link.send(order)

    def close(self) -> None:
        if self.link is not None:
            self.link.close()
        self.link = None

    def kill(self) -> None:
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class Supervisor:
    """Starts and watches `count` workers. `serve` runs in each worker, and returns its exit status.

    `reload` is called at SIGHUP, for the workers that are started later, and `watch` at every step: once a second or
    more often. If it returns True, the workers reload their tokens as at SIGHUP. Lengths of time are seconds.
    """

    def __init__(
        self,
        count: int,
        address: str,
        *,
        drain_seconds: float,
        serve: Callable[[Worker], int],
        reload: Callable[[], object],
        watch: Callable[[], bool],
        environ: Mapping[str, str],
    ) -> None:
        self._address = address
        self._drain_seconds = drain_seconds
        self._serve = serve
        self._reload = reload
        self._watch = watch
        self._children = [_Child(index) for index in range(count)]
        self._notifier = Notifier(environ)
        self._selector = selectors.DefaultSelector()
        self._all_were_ready = False
        self._status: int | None = None  # of the exit, once the end has begun
        self._drain_until = 0.0
        self._fed_at = 0.0
        self._watched_at = time.monotonic()

    def run(self, port: int) -> int:
        """Start all workers and watch them until a signal; the exit status. Raises StartError for the port."""
        self._notifier.status("loading")
        with reserved(self._address, port) as self._port, _signals_as_bytes() as self._wakeup:
            self._selector.register(self._wakeup, selectors.EVENT_READ)
            try:
                while self._status is None or any(child.pid for child in self._children):
                    self._step()
            except BaseException:
                self._kill_all()
                raise
        assert self._status is not None
        if not self._status:
            _log.info("stopped")
        return self._status

    def _step(self) -> None:
        """Wait for the next event or deadline, and deal with it."""
        for child in self._startable():
            if child.start_at <= time.monotonic():
                self._start(child)
        self._feed_watchdog()
        for key, _ in self._selector.select(self._seconds_to_wait()):
            if key.fileobj is self._wakeup:
                self._handle_signals()
            else:
                self._receive(key.data)
        if self._watch():
            self._send_all(RELOAD)
        self._reap()
        self._announce()
        self._kill_hung()
        if self._status is not None and time.monotonic() > self._drain_until:
            late = sum(child.pid is not None for child in self._children)
            _log.warning("%d processes did not end within --drain-seconds and are killed", late)
            self._kill_all()
            self._drain_until += 60

    def _seconds_to_wait(self) -> float:
        now = time.monotonic()
        moments = [now + 1.0, *(child.start_at for child in self._startable())]
        if self._status is not None:
            moments.append(self._drain_until)
        if self._notifier.interval:
            moments.append(self._fed_at + self._notifier.interval)
        return max(0.0, min(moments) - now) + 0.001

    # -- the end

    def _handle_signals(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in self._wakeup.recv(256):
                if number == signal.SIGHUP:
                    self._reload()
                    self._send_all(RELOAD)
                elif number != signal.SIGCHLD:
                    self._stop(signal.Signals(number))

    def _stop(self, number: signal.Signals) -> None:
        if self._status is not None:
            _log.warning("second signal (%s): stopping now", number.name)
            self._kill_all()
            exit_now(1)
        _log.info("%s: stopping", number.name)
        self._notifier.stopping("draining")
        self._drain(0)

    def _drain(self, status: int) -> None:
        """Drain all workers, then exit with this status."""
        self._status = status
        self._drain_until = time.monotonic() + self._drain_seconds
        self._send_all(DRAIN)

    def _send_all(self, order: bytes) -> None:
        for child in self._children:
            child.send(order)

    def _kill_all(self) -> None:
        for child in self._children:
            child.kill()

    # -- starting

    def _startable(self) -> Iterable[_Child]:
        """The absent workers that may be started: only the first until it is ready, so that an error is logged once."""
        if self._status is not None:
            return []
        some = self._children if self._all_were_ready or self._children[0].ready else self._children[:1]
        return [child for child in some if child.pid is None]

    def _start(self, child: _Child) -> None:
        ours, theirs = socket.socketpair()
        follow = end_with_parent(os.getpid(), signal.SIGKILL)
        # A signal between the fork and the child's own handlers would run the supervisor's in the child.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        pid = os.fork()
        if pid == 0:
            self._become_worker(Worker(child.index, self._port, theirs), ours, follow, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        ours.setblocking(False)
        child.pid, child.link = pid, ours
        child.started_at = child.heard_at = time.monotonic()
        self._selector.register(ours, selectors.EVENT_READ, child)

    def _become_worker(
        self,
        worker: Worker,
        ours: socket.socket,
        follow: Callable[[], None],
        before: set[int | signal.Signals],
    ) -> NoReturn:
        """In the child: undo what it inherited from the supervisor, serve, and exit."""
        status = 1
        try:
            follow()
            logs.name_process(worker.index + 1)
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            # Else other workers' sockets would stay open in this child when the supervisor dies.
            ours.close()
            self._selector.close()
            self._wakeup.close()
            for child in self._children:
                child.close()
            status = self._serve(worker)
        except BaseException:
            _log.exception("process %d failed", worker.index + 1)
        finally:
            with contextlib.suppress(OSError):  # nobody reads it any more
                sys.stdout.flush()
            exit_now(status)

    def _announce(self) -> None:
        """Log and notify when all are ready for the first time."""
        if (
            self._all_were_ready
            or self._status is not None
            or not all(child.ready for child in self._children)
        ):
            return
        self._all_were_ready = True
        host = f"[{self._address}]" if ":" in self._address else self._address
        url = f"http://{host}:{self._port}/"
        _ready_log.info("ready on %s", url)
        self._notifier.ready(f"{len(self._children)} processes serving on {url}", feed=False)

    # -- watching

    def _receive(self, child: _Child) -> None:
        assert child.link is not None
        try:
            received = child.link.recv(256)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        child.heard_at = time.monotonic()
        if not received:  # it has exited or is about to; `_reap` collects its status
            self._disconnect(child)
        elif READY in received:
            child.ready = True
            _log.info("process %d of %d serves, pid %d", child.index + 1, len(self._children), child.pid)

    def _disconnect(self, child: _Child) -> None:
        if child.link is not None:
            self._selector.unregister(child.link)
        child.close()

    def _reap(self) -> None:
        for child in self._children:
            if child.pid is not None:
                pid, status = os.waitpid(child.pid, os.WNOHANG)
                if pid:
                    self._died(child, os.waitstatus_to_exitcode(status))

    def _died(self, child: _Child, status: int) -> None:
        pid, was_ready = child.pid, child.ready
        self._disconnect(child)
        child.pid, child.ready = None, False
        if self._status is not None:
            return
        how = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
        if not self._all_were_ready:
            if status <= 0:  # otherwise it has logged what is wrong
                _log.error("process %d, pid %d, %s before all were ready", child.index + 1, pid, how)
            self._drain(max(1, status))
            return
        now = time.monotonic()
        if was_ready and now - child.started_at > _STABLE_AFTER:
            child.pause = _FIRST_PAUSE
        child.start_at = now + child.pause
        _log.warning(
            "process %d of %d, pid %d, %s: restarting in %.1f s",
            child.index + 1, len(self._children), pid, how, child.pause,
        )  # fmt: skip
        child.pause = min(2 * child.pause, _LONGEST_PAUSE)

    def _feed_watchdog(self) -> None:
        now = time.monotonic()
        if self._all_were_ready and self._notifier.interval and now - self._fed_at >= self._notifier.interval:
            self._notifier.alive()
            self._fed_at = now

    def _kill_hung(self) -> None:
        """Kill workers that no longer send beats, also while they drain."""
        now = time.monotonic()
        was_frozen, self._watched_at = now - self._watched_at > _HANGS_AFTER / 2, now
        for child in self._children:
            if was_frozen:  # the supervisor itself was frozen, perhaps with all workers
                child.heard_at = now
            if child.pid is not None and now - child.heard_at > _HANGS_AFTER:
                _log.warning("process %d of %d hangs and is killed", child.index + 1, len(self._children))
                child.heard_at = now  # one kill, and one log line, per interval
                child.kill()


@contextlib.contextmanager
def reserved(address: str, port: int) -> Iterator[int]:
    """Reserve a port for workers that will share it; yields its number, chosen by the system for 0. Raises StartError.

    A bound socket that doesn't listen gets no connections, and prevents programs of other users from binding the port.
    """
    try:
        if port:
            # Only a bind without SO_REUSEPORT fails if another supervisor has the port.
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
    """Sockets for all that the address resolves to, bound to the same port. Raises OSError."""
    with contextlib.ExitStack() as stack:
        sockets: list[socket.socket] = []
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, place in dict.fromkeys(found):
            made = stack.enter_context(socket.socket(family, kind, protocol))
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if share:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind((place[0], port, *place[2:]))
            port = made.getsockname()[1]
            sockets.append(made)
        stack.pop_all()
        return sockets


@contextlib.contextmanager
def _signals_as_bytes() -> Iterator[socket.socket]:
    """A socket that receives the number of each signal within the block, so that the selector wakes for signals."""
    reading, writing = socket.socketpair()
    reading.setblocking(False)
    writing.setblocking(False)
    before = {number: signal.signal(number, lambda number, frame: None) for number in _SIGNALS}
    signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    try:
        yield reading
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        reading.close()
        writing.close()
