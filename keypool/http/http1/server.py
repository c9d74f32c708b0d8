"""The server: listening sockets, the set of connections, the sweep, and the end.

`Server` takes the place of `tornado.httpserver.HTTPServer`::

    server = Server(make_app(), limits=Limits(body_bytes=1 << 20))
    server.add_sockets(bind_sockets(8888, "127.0.0.1"))
    ...
    server.stop()                                # accept no more
    await server.close_all_connections(timeout=10)

If the application has `start_raw_request` (see `http1.request`), that is called for each request first.

Deadlines are attributes of connections. One timer checks all of them every `Limits.sweep_seconds`: O(connections) a
sweep, 0.2 µs each, and nothing per request. In return they are coarse: a connection is never ended early, and up to
two sweeps late.

Not supported: forking, TLS and HTTP/2 (which a proxy can provide), gzipped request bodies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from socket import socket
from typing import Any

from tornado import httputil
from tornado.log import app_log

from keypool.config.limits import Limits
from keypool.config.proxies import TrustedProxies
from keypool.http.http1.connection import Connection
from keypool.http.http1.connection_limiter import ConnectionLimiter, largest_first_over_budget
from keypool.http.http1.request import RawApplication
from keypool.http.http1.responses import OnRefused
from keypool.http.http1.section import Sections
from keypool.http.http1.turns import BUDGET, Turns
from keypool.http.http1.writer import Writer

_QUEUED = 4096  # connections taken from the system's accept queue before it is closed

Application = httputil.HTTPServerConnectionDelegate


def queued_connections(sockets: Iterable[socket]) -> Iterator[tuple[socket, Any]]:
    """Accept what is in the accept queues of listening sockets: connections, each with its peer's address."""
    for listening in sockets:
        for _ in range(_QUEUED):
            try:
                accepted = listening.accept()
            except OSError:
                break
            yield accepted


class Server:
    """An HTTP/1.1 server for one Tornado application.

    `trusted` are the proxies whose headers name the caller; those headers are ignored from other peers. `on_refused`
    makes the answer to a request that the server itself refuses (see `Refusal`).
    """

    def __init__(
        self,
        application: Application,
        *,
        limits: Limits | None = None,
        no_keep_alive: bool = False,
        trusted: TrustedProxies | None = None,
        on_refused: OnRefused | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.limiter = ConnectionLimiter(self.limits, trusted or ())
        self.began = 0
        """Requests whose head has come, since the start."""
        self.sections = Sections()
        self.no_keep_alive = no_keep_alive
        self.on_refused = on_refused
        self.resolved: asyncio.Future[None]  # returned by every write that need not wait
        self.clock = 0.0  # the loop's time of the next sweep, about: deadlines set from it are never early
        self.trusted = trusted
        self._connections: set[Connection] = set()
        self._accepting: set[asyncio.Task[object]] = set()
        self._listeners: list[asyncio.Task[asyncio.Server]] = []
        self._unsent: list[Writer] = []
        self._sweeper: asyncio.TimerHandle | None = None
        self._emptied: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop
        self.turns: Turns
        self.serve_app(application)

    def serve_app(self, application: Application) -> None:
        """Hand requests to this application from now on."""
        self.application = application
        self.start_raw = application.start_raw_request if isinstance(application, RawApplication) else None

    # Listening.

    def add_sockets(self, sockets: Iterable[socket], *, backlog: int = 1024) -> None:
        """Accept on listening sockets from the next turn of the loop on.

        The server owns them from now on; `stop` closes them.
        """
        loop = asyncio.get_running_loop()
        self._loop = loop
        self.turns = Turns(loop, self._flush)
        self.resolved = loop.create_future()
        self.resolved.set_result(None)
        for sock in sockets:
            self._listeners.append(loop.create_task(self._accept(loop, sock, backlog)))

    async def _accept(self, loop: asyncio.AbstractEventLoop, sock: socket, backlog: int) -> asyncio.Server:
        try:
            return await loop.create_server(lambda: Connection(self, loop), sock=sock, backlog=backlog)
        except BaseException:
            sock.close()
            raise

    def stop(self) -> None:
        """Close the listening sockets. Connections stay open."""
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener.add_done_callback(_close_listener)

    # Connections.

    @property
    def open_connections(self) -> int:
        """Open connections, without those handed over as streams. O(1)."""
        return len(self._connections)

    @property
    def requests_in_flight(self) -> int:
        """Requests that are being answered. O(connections)."""
        return sum(connection.current is not None for connection in self._connections)

    async def close_all_connections(self, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Close idle connections now and the others after their answers; wait for all.

        Connections that are left after `timeout` seconds are cut. Call `stop` before. O(connections).
        """
        if self._accepting:
            await asyncio.wait(self._accepting, timeout=timeout)
        for connection in list(self._connections):
            connection.shut_down()
        if not self._connections:
            return
        self._emptied = self._loop.create_future()
        try:
            await asyncio.wait_for(asyncio.shield(self._emptied), timeout)
        except TimeoutError:
            for connection in list(self._connections):
                connection.cut()
            await self._emptied
        finally:
            self._emptied = None

    def flush_soon(self, writer: Writer) -> None:
        """Flush a writer when all that came in this iteration of the loop is read. O(1)."""
        if not self._unsent:
            self._loop.call_soon(self._flush_at_last)
        self._unsent.append(writer)

    def _flush_at_last(self) -> None:
        self._flush()
        self.turns.left = BUDGET  # an iteration of the loop is over within the budget

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        for writer in unsent:
            writer.flush()

    # Steps of a graceful shutdown.

    def drain_accept_queue(self, sockets: Iterable[socket]) -> None:
        """Accept the connections in the system's accept queue, which `stop` would reset. Before `stop`."""
        for sock, _ in queued_connections(sockets):
            sock.setblocking(False)
            made = self._loop.connect_accepted_socket(partial(Connection, self, self._loop), sock)
            task = self._loop.create_task(made)
            self._accepting.add(task)
            task.add_done_callback(self._accepted)

    def _accepted(self, task: asyncio.Task[object]) -> None:
        self._accepting.discard(task)
        if not task.cancelled():
            task.exception()  # mark it as retrieved: a caller may have disconnected already

    def disable_keep_alive(self) -> None:
        """Close each connection with the answer to its next request, which announces that. O(connections)."""
        self.no_keep_alive = True
        for connection in self._connections:
            connection.disable_keep_alive()

    def writing(self) -> bool:
        """Whether some answer isn't sent yet. O(connections)."""
        return any(connection.unsent() for connection in self._connections)

    def cut_all(self) -> None:
        """Close all connections now: nothing more that they send is read."""
        for connection in list(self._connections):
            connection.cut()

    def admit(self, connection: Connection) -> bool:
        """Add a connection. False if a limit is reached. O(1)."""
        if not self.limiter.enter(connection.peer.remote_ip):
            return False
        if self._sweeper is None:
            self._sweep()
        self._connections.add(connection)
        connection.deadline = self.clock + self.limits.head_seconds
        return True

    def handed_over(self, connection: Connection) -> Callable[[], None]:
        """The callback for the end of the stream that a connection became. Until then the connection is counted."""
        return partial(self.limiter.leave, connection.peer.remote_ip)

    def forget(self, connection: Connection, *, counted: bool = False) -> None:
        """Remove a connection that is closed, or handed over and still to be `counted`. O(1)."""
        if connection not in self._connections:
            return
        self._connections.remove(connection)
        if not counted:
            self.limiter.leave(connection.peer.remote_ip)
        try:
            self.application.on_close(connection)
        except Exception:
            app_log.error("Uncaught exception", exc_info=True)
        if not self._connections:
            self._empty()

    def _empty(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        if self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(None)

    def _sweep(self) -> None:
        now = self._loop.time()
        self.clock = now + self.limits.sweep_seconds
        # Armed first, so that an exception can't end the sweeps.
        self._sweeper = self._loop.call_later(self.limits.sweep_seconds, self._sweep)
        for connection in list(self._connections):
            try:
                if connection.deadline <= now:
                    connection.expire()
                connection.probe_eof()
            except Exception:
                app_log.error("Uncaught exception", exc_info=True)
                connection.cut()
        for connection in largest_first_over_budget(
            ((c.unfinished(), c) for c in self._connections), self.limits
        ):
            connection.cut()


def _close_listener(listener: asyncio.Task[asyncio.Server]) -> None:
    if not listener.cancelled() and listener.exception() is None:
        listener.result().close()
