"""The server: listening sockets, the set of connections, the sweep, and the end.

`Server` takes the place of `tornado.httpserver.HTTPServer`::

    server = Server(make_app(), limits=Limits(body_bytes=1 << 20))
    server.listen(8888, "127.0.0.1")
    ...
    server.stop()                                # accept no more
    await server.close_all_connections(timeout=10)

What it is given may be anything Tornado's server takes. If it also has
`start_raw_request` (see `http1.request`), it is asked for each request first.

Deadlines are attributes of connections, looked at by one timer for all of them, once in
`Limits.sweep_seconds`: O(connections) a sweep, 0.2 us each, and nothing per request. In
return they are coarse: never cut short, and run over by up to two sweeps.

Not here: `bind`/`start` with forking, gzipped request bodies, HTTP/2.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterable
from functools import partial
from socket import AF_INET, AF_INET6, socket

from tornado import httputil
from tornado.log import app_log
from tornado.netutil import bind_sockets

from keypool.config.limits import Limits
from keypool.config.proxies import TrustedProxies
from keypool.http.http1.busy_poll import Awake
from keypool.http.http1.connection import Connection
from keypool.http.http1.connection_limiter import ConnectionLimiter, largest_first_over_budget
from keypool.http.http1.link import Link
from keypool.http.http1.request import RawApplication
from keypool.http.http1.responses import OnRefused
from keypool.http.http1.section import Sections
from keypool.http.http1.turns import BUDGET, Turns

_QUEUED = 4096  # connections taken from the system's queue before it is closed

Application = httputil.HTTPServerConnectionDelegate | Callable[[httputil.HTTPServerRequest], None]


class Server:
    """An HTTP/1.1 server for one Tornado application.

    `protocol` and `no_keep_alive` mean what they mean to
    `tornado.httpserver.HTTPServer`; `trusted` are the proxies whose headers count
    (without them no header does). `on_refused` makes the answer to a request
    that the server itself refuses (see `Refusal`).
    """

    def __init__(
        self,
        application: Application,
        *,
        limits: Limits | None = None,
        ssl_context: ssl.SSLContext | None = None,
        no_keep_alive: bool = False,
        protocol: str | None = None,
        trusted: TrustedProxies | None = None,
        on_refused: OnRefused | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.doorman = ConnectionLimiter(self.limits, trusted or ())
        self.began = 0
        """Requests whose head has come, since the start."""
        self.sections = Sections()
        self.no_keep_alive = no_keep_alive
        self.protocol = protocol
        self.on_refused = on_refused
        self.resolved: asyncio.Future[None]  # the future of every write that need not wait
        self.clock = 0.0  # the loop's time as of the last sweep, one sweep ahead
        self._ssl_context = ssl_context
        self.trusted = trusted
        self._connections: set[Connection] = set()
        self._accepting: set[asyncio.Task[object]] = set()
        self._listeners: list[asyncio.Task[asyncio.Server]] = []
        self._unsent: list[Link] = []
        self._sweeper: asyncio.TimerHandle | None = None
        self._emptied: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop
        self._awake: Awake
        self.turns: Turns
        self.serve_app(application)

    def serve_app(self, application: Application) -> None:
        """Hand requests to this application from now on."""
        self.application = application
        raw = isinstance(application, RawApplication)
        self.start_raw = application.start_raw_request if raw else None  # type: ignore[union-attr]

    # Listening.

    def listen(
        self,
        port: int,
        address: str | None = None,
        *,
        backlog: int = 1024,
        reuse_port: bool = False,
    ) -> list[socket]:
        """Bind and accept; return the sockets, which tell the port if `port` was 0.

        :raises OSError: if the address can't be bound.
        """
        sockets = bind_sockets(port, address, backlog=backlog, reuse_port=reuse_port)
        self.add_sockets(sockets, backlog=backlog)
        return sockets

    def add_sockets(self, sockets: Iterable[socket], *, backlog: int = 1024) -> None:
        """Accept on listening sockets, TCP or Unix, from the next turn of the loop on.

        They are owned by the server now, and closed by `stop`.
        """
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._awake = Awake(loop)
        self.turns = Turns(loop, self._flush)
        self.resolved = loop.create_future()
        self.resolved.set_result(None)
        for sock in sockets:
            self._listeners.append(loop.create_task(self._accept(loop, sock, backlog)))

    async def _accept(self, loop: asyncio.AbstractEventLoop, sock: socket, backlog: int) -> asyncio.Server:
        tls = self._ssl_context
        handshake, shutdown = self.limits.head_seconds, self.limits.linger_seconds
        try:
            if sock.family in (AF_INET, AF_INET6):
                return await loop.create_server(
                    lambda: Connection(self, loop),
                    sock=sock,
                    backlog=backlog,
                    ssl=tls,
                    ssl_handshake_timeout=None if tls is None else handshake,
                    ssl_shutdown_timeout=None if tls is None else shutdown,
                )
            return await loop.create_unix_server(lambda: Connection(self, loop), sock=sock, backlog=backlog)
        except BaseException:
            sock.close()
            raise

    def stop(self) -> None:
        """Accept no more, and close the listening sockets. Connections live on."""
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener.add_done_callback(_close_listener)

    # Connections.

    @property
    def open_connections(self) -> int:
        """How many connections are open, those handed over not counted. O(1)."""
        return len(self._connections)

    @property
    def requests_in_flight(self) -> int:
        """How many requests are being answered. O(connections)."""
        return sum(connection.current is not None for connection in self._connections)

    async def close_all_connections(self, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Close idle connections now and the others behind their answers; wait for all.

        After `timeout` seconds what is left is cut. Call `stop` before. O(connections).
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

    def flush_soon(self, link: Link) -> None:
        """Have what a connection has to say written when all that has come in this turn is read. O(1)."""
        if not self._unsent:
            self._loop.call_soon(self._flush_at_last)
        self._unsent.append(link)

    def _flush_at_last(self) -> None:
        self._flush()
        self.turns.left = BUDGET  # an iteration of the loop is over, and nobody had to wait for the next

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        for link in unsent:
            link.flush()
        if len(unsent) == 1:  # where there are more the loop hardly sleeps
            self._awake.answered()

    # The steps of a stop, for those who take them one by one.

    def take_queue(self, sockets: Iterable[socket]) -> None:
        """Accept what the system has accepted already; to close the sockets would reset it. Before `stop`."""
        for listening in sockets:
            for _ in range(_QUEUED):
                try:
                    sock, _ = listening.accept()
                except OSError:
                    break
                sock.setblocking(False)
                made = self._loop.connect_accepted_socket(
                    partial(Connection, self, self._loop), sock, ssl=self._ssl_context
                )
                task = self._loop.create_task(made)
                self._accepting.add(task)
                task.add_done_callback(self._accepted)

    def _accepted(self, task: asyncio.Task[object]) -> None:
        self._accepting.discard(task)
        if not task.cancelled():
            task.exception()  # heard: a caller that left already is nobody's error

    def keep_none_alive(self) -> None:
        """Have each connection closed with the answer to its next request, which says so. O(connections)."""
        self.no_keep_alive = True
        for connection in self._connections:
            connection.keeps_alive = False

    def writing(self) -> bool:
        """Whether some answer isn't taken in yet. O(connections)."""
        return any(connection.writing() for connection in self._connections)

    def cut_all(self) -> None:
        """Close all connections in this turn of the loop: nothing that they send any more is read."""
        for connection in list(self._connections):
            connection.cut()

    def admit(self, connection: Connection) -> bool:
        """Add a connection, unless it is one too many. O(1)."""
        if not self.doorman.enter(_address(connection)):
            return False
        if self._sweeper is None:
            self._sweep()
        self._connections.add(connection)
        connection.deadline = self.clock + self.limits.head_seconds
        return True

    def handed_over(self, connection: Connection) -> Callable[[], None]:
        """What is to be called when the stream is closed that a connection is handed over as: until then it counts."""
        return partial(self.doorman.leave, _address(connection))

    def forget(self, connection: Connection, *, counted: bool = False) -> None:
        """Remove a connection that is closed or handed over; in that case it stays `counted`. O(1)."""
        if connection not in self._connections:
            return
        self._connections.remove(connection)
        if not counted:
            self.doorman.leave(_address(connection))
        if isinstance(self.application, httputil.HTTPServerConnectionDelegate):
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
        self.clock = now + self.limits.sweep_seconds  # so that no time is cut short
        # Armed first: the time-outs of all must not end with what one connection raises.
        self._sweeper = self._loop.call_later(self.limits.sweep_seconds, self._sweep)
        for connection in list(self._connections):
            try:
                if connection.deadline <= now:
                    connection.expire()
                connection.read_on()
            except Exception:
                app_log.error("Uncaught exception", exc_info=True)
                connection.cut()
        for connection in largest_first_over_budget(
            ((c.unfinished(), c) for c in self._connections), self.limits
        ):
            connection.cut()

    # Requests.

    def start_request(
        self, connection: Connection, exchange: httputil.HTTPConnection
    ) -> httputil.HTTPMessageDelegate:
        """Return who takes a request the Tornado way."""
        application = self.application
        if isinstance(application, httputil.HTTPServerConnectionDelegate):
            return application.start_request(connection, exchange)
        return _CallableDelegate(application, exchange)


class _CallableDelegate(httputil.HTTPMessageDelegate):
    """Gathers a request for an application that is a mere function."""

    def __init__(
        self,
        application: Callable[[httputil.HTTPServerRequest], None],
        connection: httputil.HTTPConnection,
    ) -> None:
        self._application = application
        self._connection = connection
        self._body = bytearray()
        self._request: httputil.HTTPServerRequest

    def headers_received(
        self,
        start_line: httputil.RequestStartLine | httputil.ResponseStartLine,
        headers: httputil.HTTPHeaders,
    ) -> None:
        assert isinstance(start_line, httputil.RequestStartLine)
        self._request = httputil.HTTPServerRequest(
            connection=self._connection, start_line=start_line, headers=headers
        )

    def data_received(self, chunk: bytes) -> None:
        self._body += chunk

    def finish(self) -> None:
        request = self._request
        request.body = bytes(self._body)
        httputil.parse_body_arguments(
            request.headers.get("Content-Type", ""),
            request.body,
            request.body_arguments,
            request.files,
            request.headers,
        )
        for name, values in request.body_arguments.items():
            request.arguments.setdefault(name, []).extend(values)
        self._application(request)


def _address(connection: Connection) -> str:
    peer = connection.context
    return peer.remote_ip if peer.address_family in (AF_INET, AF_INET6) else ""


def _close_listener(listener: asyncio.Task[asyncio.Server]) -> None:
    if not listener.cancelled() and listener.exception() is None:
        listener.result().close()
