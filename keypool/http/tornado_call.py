"""Calls of the API on Tornado's server, as `HTTPMessageDelegate`s.

A request that is refused for its head is answered when its body has been read and discarded, so that the connection
can be used again; one whose body is larger than `DISCARDED` (and than an import may be), or that sends `Expect`, is
answered at once.
"""

from __future__ import annotations

import time
from http.client import responses as REASONS  # noqa: N812 - a table
from typing import Any, cast

from tornado import httputil
from tornado.http1connection import HTTP1Connection
from tornado.iostream import StreamClosedError
from tornado.routing import Router

from keypool.api.decoding import too_large
from keypool.api.dispatch import Dispatcher, Reply
from keypool.config.limits import DISCARDED, MAX_BODY
from keypool.http.api_call import ApiCall, InFlight
from keypool.http.http1.responses import http_date


class ApiRouter(Router):
    """Makes the delegate of each request."""

    def __init__(self, dispatcher: Dispatcher, in_flight: InFlight) -> None:
        self._dispatcher = dispatcher
        self._in_flight = in_flight

    def find_handler(self, request: httputil.HTTPServerRequest, **kwargs: Any) -> TornadoCall:
        """The delegate of a request."""
        return TornadoCall(self._dispatcher, self._in_flight, request)


class TornadoCall(ApiCall, httputil.HTTPMessageDelegate):
    """One request of the API on Tornado's server."""

    def __init__(
        self, dispatcher: Dispatcher, in_flight: InFlight, request: httputil.HTTPServerRequest
    ) -> None:
        assert request.connection is not None
        self.dispatcher, self.in_flight, self.turns = dispatcher, in_flight, None
        self._waiting, self._ended = None, False
        self.request = request
        # Tornado annotates the base class, but passes this one, which has a close callback.
        self._connection: HTTP1Connection | None = cast("HTTP1Connection", request.connection)
        self._body: list[bytes] = []
        self._size = 0
        self._discarded = DISCARDED  # bytes of the body that are read though the request is refused
        self._whole = False

    def headers_received(
        self,
        start_line: httputil.RequestStartLine | httputil.ResponseStartLine,
        headers: httputil.HTTPHeaders,
    ) -> None:
        """Check the head; refuse at once if the body won't be read."""
        self.started = time.monotonic()
        self.in_flight.count += 1
        pending = self.pending = self.dispatcher.check(self.request)
        length = _declared_length(headers)
        if pending.max_body > MAX_BODY and self._connection is not None:
            self._discarded += pending.max_body
            self._connection.set_max_body_size(self._discarded)  # so that a larger body gets an answer
        if length > pending.max_body and pending.error is None:
            pending.error = too_large(pending.max_body)
        if pending.error is not None and (length > self._discarded or "Expect" in headers):
            self.refuse(at_once=True)

    def data_received(self, chunk: bytes) -> None:
        """Keep a part of the body, or throw it away if the request is refused."""
        self._size += len(chunk)
        if self.pending.error is None:
            if self._size > self.pending.max_body:
                self.pending.error = too_large(self.pending.max_body)
                self._body.clear()
            else:
                self._body.append(chunk)
        elif self._size > self._discarded and self._connection is not None:
            self.refuse(at_once=True)

    def held(self) -> int:
        """Bytes that are held of the body."""
        return 0 if self._whole or self.pending.error is not None else self._size

    def finish(self) -> None:
        """The request is whole: run its call."""
        self._whole = True
        if self._connection is None:
            return
        if self._connection.stream.closed():  # disconnected right after the last byte of the request
            self.on_connection_close()
            return
        self.run(b"".join(self._body))
        if self._waiting is not None and self._connection is not None:
            self._connection.set_close_callback(self.on_connection_close)

    def on_connection_close(self) -> None:
        """The caller is gone."""
        self._connection = None
        self.hung_up()

    def send(self, reply: Reply) -> bool:
        """See `ApiCall.send`. Tornado closes a connection whose body hasn't come without announcing it; this does."""
        connection, self._connection = self._connection, None
        if connection is not None:
            _write(connection, self.pending.head, reply, closes=reply.last or not self._whole)
        return connection is not None


def _write(connection: HTTP1Connection, head: bool, reply: Reply, *, closes: bool) -> None:
    headers = httputil.HTTPHeaders({"Date": http_date()})
    for name, value in reply.headers():
        headers.add(name, value)
    if reply.status != 204:
        headers.add("Content-Length", str(len(reply.body)))
    if closes:
        headers.add("Connection", "close")
    start_line = httputil.ResponseStartLine("", reply.status, REASONS.get(reply.status, "Unknown"))
    try:
        future = connection.write_headers(start_line, headers, b"" if head else reply.body)
        future.add_done_callback(_retrieve)
        connection.finish()
    except StreamClosedError:
        return  # the caller may disconnect at any time: not an error


def _retrieve(future: Any) -> None:
    future.exception()


def _declared_length(headers: httputil.HTTPHeaders) -> int:
    given = headers.get("Content-Length", "0")
    return int(given) if given.isascii() and given.isdigit() and len(given) < 19 else 0
