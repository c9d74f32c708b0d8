"""Tornado's own HTTP server, with limits for unauthenticated clients: the reference that needs no httptools.

Tornado bounds sizes, but waits an hour for a head. This subclass counts connections by address, checks each once a
second and ends those that take too long, with 408 if a request had begun. To follow the progress of each message, it
wraps the message's delegate in a `_Message`.

Tornado serves one request of each connection in each iteration of the loop. That is fair among connections, but the
iteration has no bound. Here connections share the time as on the fast server (http1/turns.py): a request whose turn
hasn't come is held back by the future that a delegate may return.

What is wrong with a call of the API is checked in api/dispatch.py, not here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from enum import Enum
from functools import partial
from itertools import islice
from typing import Any, cast

from tornado import httputil
from tornado.http1connection import HTTP1Connection, HTTP1ServerConnection
from tornado.httpserver import HTTPServer
from tornado.iostream import IOStream, StreamClosedError
from tornado.netutil import add_accept_handler
from tornado.web import Application

from keypool.api.dispatch import Dispatcher
from keypool.config.limits import DISCARDED, MAX_BODY, MAX_HEAD, MAX_HEADERS, MAX_NAME, Limits
from keypool.config.proxies import TrustedProxies
from keypool.core.errors import HeadersTooLarge, RequestTimeout
from keypool.http.fast_call import wire
from keypool.http.http1.connection_limiter import ConnectionLimiter, largest_first_over_budget
from keypool.http.http1.responses import with_connection
from keypool.http.http1.server import queued_connections
from keypool.http.http1.turns import QUANTUM, TASK, Turns
from keypool.http.tornado_call import TornadoCall

_API = "/api/"
_LONG_NAME = re.compile(rb"\n[^:\n]{%d}" % (MAX_NAME + 1))  # in a line after the request line
_SLICE = 200  # connections checked in one iteration of the loop


class _Phase(Enum):
    HEAD = 1  # nothing, or a part of a head, has come
    BODY = 2
    ANSWER = 3  # the request is complete: its answer is being made or sent


class _Listener:
    """A listening socket on which `accept` raises only BlockingIOError: Tornado logs anything else and retries at once.

    Out of file descriptors, it closes a spare one to accept and close the connection (as libuv does).
    """

    def __init__(self, sock: socket.socket, limiter: ConnectionLimiter) -> None:
        self._socket = sock
        self._limiter = limiter
        self._spare: int | None = os.open(os.devnull, os.O_RDONLY)

    def fileno(self) -> int:
        """See `socket.fileno`; the event loop needs it."""
        return self._socket.fileno()

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection. Raises BlockingIOError if there is none, or no file descriptor for it."""
        try:
            return self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            raise
        except OSError as error:
            self._limiter.out_of_files(error)
            self._reject_one()
            raise BlockingIOError from None

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        if self._spare is not None:
            os.close(self._spare)

    def _reject_one(self) -> None:
        if self._spare is not None:
            os.close(self._spare)
        self._spare = None
        with contextlib.suppress(OSError):
            self._socket.accept()[0].close()
        with contextlib.suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY)


class _Stream(IOStream):
    """A stream that checks the size of a head before Tornado parses it."""

    def __init__(self, sock: socket.socket, server: TornadoServer, address: str) -> None:
        super().__init__(sock, max_buffer_size=server.max_buffer_size, read_chunk_size=server.read_chunk_size)
        self._server = server
        self._address = address

    def close_fd(self) -> None:
        """Close the socket; called by IOStream, once. Until then the connection is counted, also as a websocket."""
        super().close_fd()
        self._server.limiter.leave(self._address)

    async def read_until_regex(self, regex: bytes, max_bytes: int | None = None) -> bytes:
        """Read a head; one that is too large, or has too long a name, is answered here and ends the connection."""
        head = await super().read_until_regex(regex, max_bytes)
        if len(head) <= MAX_NAME:
            return head
        if len(head) > MAX_HEAD:
            detail = f"the headers are {len(head)} bytes long; {MAX_HEADERS} are read"
        elif _LONG_NAME.search(head.lstrip(b"\r\n")):
            detail = f"a header's name is longer than {MAX_NAME} bytes"
        else:
            return head
        await self.write(self._server.refused_head(detail))
        self.close()
        raise StreamClosedError


class _Share:
    """A connection's share of the loop's time, a `turns.Served` that all its requests use one after the other."""

    __slots__ = ("_cost", "_released", "_turns", "debt")

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._released: asyncio.Future[None] | None = None
        self._cost = 0.0
        self.debt = 0.0

    @property
    def waits(self) -> bool:
        """Whether the connection's next request has to wait for its turn."""
        return self._turns.over or self.debt > 0

    def turn(self, cost: float) -> asyncio.Future[None]:
        """A future for the connection's turn. `cost`, about the seconds that the request takes, is charged then."""
        self._cost = cost
        self._released = asyncio.get_running_loop().create_future()
        self._turns.queue(self, backlog=self.debt > 0)
        return self._released

    def run(self) -> None:
        """Release the request. Its work is done in a task, right after this, so its cost is estimated."""
        released, self._released = self._released, None
        if released is not None and not released.done():
            self._turns.charge(self._cost)
            released.set_result(None)


class _Message(httputil.HTTPMessageDelegate):
    """One message of a connection: passes it on to the delegate that answers it, and checks its time limits."""

    __slots__ = (
        "_answerer",
        "_begun",
        "_address",
        "_context",
        "_inner",
        "_phase",
        "_request",
        "_server",
        "_since",
        "_stream",
        "is_first",
        "share",
    )

    def __init__(
        self,
        server: TornadoServer,
        connection: HTTP1Connection,
        answerer: Callable[[], httputil.HTTPMessageDelegate],
        before: _Message | None,
    ) -> None:
        self.share: _Share = _Share(server.turns) if before is None else before.share
        self.is_first = before is None
        self._server = server
        self._context: Any = connection.context  # of a class that is private to Tornado
        self._address = _address(getattr(connection.context, "address", None))
        self._stream = connection.stream
        # Called when the head has come: the application may have been replaced since the message before ended.
        self._answerer = answerer
        self._inner: httputil.HTTPMessageDelegate | None = None
        self._request: tuple[Any, httputil.HTTPHeaders] | None = None
        self._phase = _Phase.HEAD
        self._body = 0  # bytes of the body that have come
        self._begun = False  # whether some of the head was seen, on a connection that was idle
        self._since: float | None = server.now  # start of the time limit that applies; None if no limit does

    # -- called by Tornado

    def headers_received(
        self,
        start_line: httputil.RequestStartLine | httputil.ResponseStartLine,
        headers: httputil.HTTPHeaders,
    ) -> Awaitable[None] | None:
        """See `HTTPMessageDelegate`."""
        assert isinstance(start_line, httputil.RequestStartLine)
        self._phase, self._since = _Phase.BODY, self._server.now
        self._request = start_line, headers
        is_page = not start_line.path.startswith(_API)  # a page is made in a task, after this turn
        if self.share.waits:
            return self._begin_later(TASK if is_page else QUANTUM)
        if is_page:
            self._server.turns.charge(TASK)
        return self._begin()

    async def _begin_later(self, cost: float) -> None:
        await self.share.turn(cost)
        if not self._stream.closed() and (awaited := self._begin()) is not None:
            await awaited

    def _begin(self) -> Awaitable[None] | None:
        assert self._request is not None
        self._server.began += 1
        self._apply_proxy(self._request[1])
        self._inner = inner = self._answerer()
        if isinstance(inner, TornadoCall):
            inner.turns = self._server.turns
        return self._inner.headers_received(*self._request)

    def _apply_proxy(self, headers: httputil.HTTPHeaders) -> None:
        """Take the caller's address from a trusted proxy's headers.

        Tornado's `xheaders` would trust every peer, and more headers.
        """
        trusted, context = self._server.trusted, self._context
        if trusted is None or self._address not in trusted:
            return
        # "http" is the connection's own protocol: this server speaks no TLS.
        context.remote_ip, context.protocol = trusted.caller(
            self._address, "http", headers.get("X-Forwarded-For", ""), headers.get("X-Forwarded-Proto", "")
        )

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        """See `HTTPMessageDelegate`."""
        self._body += len(chunk)
        return None if self._inner is None else self._inner.data_received(chunk)

    def finish(self) -> None:
        """See `HTTPMessageDelegate`."""
        self._phase, self._since, self._request = _Phase.ANSWER, None, None
        self._body = 0
        if self._inner is not None:
            started = self._server.turns.clock()
            self._inner.finish()
            self._server.turns.spend(self.share, started)

    def on_connection_close(self) -> None:
        """See `HTTPMessageDelegate`."""
        inner, self._inner = self._inner, None
        if inner is not None:
            inner.on_connection_close()

    # -- called by the server

    def check(self, now: float, limits: Limits) -> None:
        """End the connection if this message takes too long."""
        if self._stream.closed():
            return
        if self._phase is _Phase.ANSWER:
            self._check_writing(now, limits.write_seconds)
            self._probe_eof()
        elif self._phase is _Phase.BODY:
            if self._over(now, limits.body_seconds):
                self._time_out(f"the body did not come within {limits.body_seconds:g} s")
        elif self._buffered():
            if not (self.is_first or self._begun):
                self._begun, self._since = True, now
            if self._over(now, limits.head_seconds):
                self._time_out(f"the headers did not come within {limits.head_seconds:g} s")
        elif self._over(now, limits.head_seconds if self.is_first else limits.idle_seconds):
            self._stream.close()

    def _over(self, now: float, seconds: float) -> bool:
        return self._since is not None and now - self._since > seconds

    def held(self) -> int:
        """Bytes held of a message that isn't complete, about."""
        if isinstance(self._inner, TornadoCall):
            return self._buffered() + self._inner.held()
        return self._buffered() + (0 if self._phase is _Phase.ANSWER else min(self._body, MAX_BODY))

    def writing(self) -> bool:
        """Whether a part of an answer isn't sent yet."""
        return not self._stream.closed() and self._stream.writing()

    def cut(self) -> None:
        """Close its connection."""
        self._stream.close()

    def _buffered(self) -> int:
        # Tornado has no public attribute for it; a test checks that this one is right.
        return self._stream._read_buffer_size  # noqa: SLF001

    def _probe_eof(self) -> None:
        # Tornado doesn't notice a disconnect while bytes before it are unread. Let it read some more, 64 KiB at most
        # each time, until it gets to the end.
        if self._buffered():
            self._stream._add_io_state(self._stream.io_loop.READ)  # noqa: SLF001 - no public way either

    def _check_writing(self, now: float, seconds: float) -> None:
        if not self._stream.writing():
            self._since = None
        elif self._since is None:
            self._since = now
        elif self._over(now, seconds):
            self._stream.close()

    def _time_out(self, detail: str) -> None:
        """Answer 408, unless an answer is being sent, and close."""
        self.on_connection_close()
        if self._stream.writing():
            self._stream.close()
            return
        written = self._stream.write(self._server.timed_out(self._request, detail))
        written.add_done_callback(self._written)

    def _written(self, done: asyncio.Future[None]) -> None:
        done.exception()  # mark it as retrieved: the caller may have disconnected
        self._stream.close()


class TornadoServer(HTTPServer):
    """See the module. `began` counts requests whose head has come; `now` is the monotonic time of the last sweep."""

    def initialize(  # type: ignore[override]
        self, app: Application, limits: Limits | None = None, trusted: TrustedProxies | None = None
    ) -> None:
        """The constructor, under the name that Tornado calls. Needs a running loop."""
        # A head over MAX_HEAD is read to its end, up to this limit, so that its caller gets an answer; see _Stream.
        super().initialize(app, max_header_size=4 * MAX_HEAD, max_body_size=DISCARDED)
        self.limits = limits or Limits()
        self.trusted = trusted
        self.limiter = ConnectionLimiter(self.limits, trusted or ())
        self.turns = Turns(asyncio.get_running_loop(), lambda: None)
        self.now = time.monotonic()
        self.began = 0
        self.serve_app(app)
        self._messages: dict[object, _Message] = {}
        self._sweeper = asyncio.ensure_future(self._sweep())
        self._listeners: list[tuple[_Listener, Callable[[], None]]] = []

    def add_sockets(self, sockets: Iterable[socket.socket]) -> None:
        """Accept on listening sockets. The server owns them from now on."""
        for sock in sockets:
            listener = _Listener(sock, self.limiter)
            self._listeners.append(
                (listener, add_accept_handler(cast(socket.socket, listener), self._handle_connection))
            )

    def stop(self) -> None:
        """Accept no more, and close the listening sockets."""
        super().stop()
        listeners, self._listeners = self._listeners, []
        for listener, remove in listeners:
            remove()
            listener.close()

    def serve_app(self, app: Application) -> None:
        """Hand requests to this application from now on."""
        self.request_callback = app
        self._dispatcher: Dispatcher = app.settings["dispatcher"]

    def handle_stream(self, stream: IOStream, address: tuple[Any, ...]) -> None:
        """Admit a connection, or close it."""
        if self.limiter.enter(_address(address)):
            super().handle_stream(_Stream(stream.socket, self, _address(address)), address)
        else:
            stream.close()

    def start_request(
        self, server_conn: object, request_conn: httputil.HTTPConnection
    ) -> httputil.HTTPMessageDelegate:
        """The delegate of a connection's next message."""
        assert isinstance(server_conn, HTTP1ServerConnection)
        assert isinstance(request_conn, HTTP1Connection)
        answerer = partial(super().start_request, server_conn, request_conn)
        before = self._messages.get(server_conn)
        message = _Message(self, request_conn, answerer, before)
        self._messages[server_conn] = message
        return message

    def on_close(self, server_conn: object) -> None:
        """See `HTTPServerConnectionDelegate`."""
        super().on_close(server_conn)
        self._messages.pop(server_conn, None)

    def timed_out(self, request: tuple[Any, httputil.HTTPHeaders] | None, detail: str) -> bytes:
        """The whole answer to a request that took too long; `request` is its head, None if that hadn't come."""
        head = request and httputil.HTTPServerRequest(start_line=request[0], headers=request[1])
        reply = self._dispatcher.refused(head, RequestTimeout(detail), self.limits.body_seconds)
        return with_connection(wire(reply), b"close")

    def refused_head(self, detail: str) -> bytes:
        """The whole answer to a request whose head is too large to be parsed."""
        return with_connection(wire(self._dispatcher.refused(None, HeadersTooLarge(detail), 0.0)), b"close")

    # -- stopping

    def drain_accept_queue(self, sockets: Iterable[socket.socket]) -> None:
        """Accept the connections in the system's accept queue: closing the sockets would reset them. Before `stop`."""
        for connection, address in queued_connections(sockets):
            self._handle_connection(connection, address)

    def disable_keep_alive(self) -> None:
        """Close each connection with the answer to its next request, which announces that."""
        self.conn_params.no_keep_alive = True

    def writing(self) -> bool:
        """Whether some answer isn't sent yet. O(connections)."""
        return any(message.writing() for message in self._messages.values())

    def cut_all(self) -> None:
        """Close all connections now: nothing more that they send is read."""
        for message in list(self._messages.values()):
            message.cut()

    async def close_all_connections(self) -> None:
        """End the sweep, and close the connections that are left."""
        self._sweeper.cancel()
        await super().close_all_connections()

    # -- the sweep

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self.limits.sweep_seconds)
            self.now = time.monotonic()
            messages = iter(list(self._messages.values()))
            while some := list(islice(messages, _SLICE)):
                for message in some:
                    message.check(self.now, self.limits)
                await asyncio.sleep(0)
            for message in largest_first_over_budget(
                ((each.held(), each) for each in self._messages.values()), self.limits
            ):
                message.cut()


def _address(address: Any) -> str:
    return str(address[0]) if isinstance(address, tuple) and address else ""
