"""A request answered through Tornado's interfaces.

`Exchange` is the `httputil.HTTPConnection` that a `RequestHandler` has as `request.connection`. One is made for each
request that isn't taken raw. It feeds the `HTTPMessageDelegate` (holding the body back while a future that the delegate
returned is pending) and frames the answer (Content-Length, chunks, 204, 304, HEAD, HTTP/1.0).

Its rules are those of `tornado.http1connection.HTTP1Connection`, which could not be used itself, as it reads from an
`IOStream`. The futures differ: a write resolves as soon as the transport's buffer is below its high-water mark, and if
it is so already, all writes return the same resolved future.

Parser, queue and socket are the business of `Connection`.
"""

from __future__ import annotations

import socket
from asyncio import Future
from typing import TYPE_CHECKING

from tornado import gen, httputil
from tornado.escape import native_str
from tornado.iostream import IOStream
from tornado.log import app_log

from keypool.http.http1.request import Request
from keypool.http.http1.responses import date_line
from keypool.http.http1.writer import closed_future

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from keypool.http.http1.connection import Connection


class Exchange(httputil.HTTPConnection):
    """One request and its answer, as Tornado's `HTTPConnection`. `context` is the `Peer`."""

    def __init__(self, connection: Connection, request: Request) -> None:
        self.context = connection.peer.caller(request.headers)
        self._connection: Connection | None = connection
        self._request: Request | None = request
        self._is_head = request.method == b"HEAD"
        self._delegate: httputil.HTTPMessageDelegate | None = None
        self._waiting: Future[object] | None = None
        self._close_callback: Callable[[], None] | None = None
        self.started = False
        self._chunking = False
        self._remaining: int | None = None
        self._switching: list[bytes] | None = None

    # The request, towards the delegate.

    def start(self, delegate: httputil.HTTPMessageDelegate) -> None:
        """Hand over the headers. Raises whatever the delegate raises."""
        request = self._request
        assert request is not None
        self._delegate = delegate
        version = "HTTP/1.0" if request.http10 else "HTTP/1.1"
        start_line = httputil.RequestStartLine(
            request.method.decode("latin-1"), request.target.decode("latin-1"), version
        )
        self._wait(delegate.headers_received(start_line, _headers(request)))

    def advance(self) -> None:
        """Hand over what has come of the body, and its end. Raises whatever the delegate raises."""
        while self._waiting is None and self._delegate is not None:
            request = self._request
            if request is None or request.answered:
                return
            body = request.body
            if body is not None and body.held:
                self._wait(self._delegate.data_received(body.take()))
            elif request.received:
                delegate, self._delegate = self._delegate, None
                delegate.finish()
                return
            else:
                return

    def waits(self) -> bool:
        """Whether a future of the delegate holds the body back."""
        return self._waiting is not None

    def _wait(self, awaitable: Awaitable[None] | None) -> None:
        if awaitable is None:
            return
        future: Future[object] = gen.convert_yielded(awaitable)
        if future.done():
            future.result()
        else:
            self._waiting = future
            future.add_done_callback(self._resume)

    def _resume(self, future: Future[object]) -> None:
        self._waiting = None
        if self._connection is not None:
            self._connection.resume(future)

    def closed(self) -> None:
        """Notify the delegate, or the handler, that no answer can arrive. Never raises."""
        delegate, callback = self._delegate, self._close_callback
        self.release()
        try:
            if delegate is not None:
                delegate.on_connection_close()
            elif callback is not None:
                callback()
        except Exception:
            app_log.error("Uncaught exception", exc_info=True)

    def release(self) -> None:
        """Drop all references that could hold this exchange in a cycle."""
        if self._waiting is not None:
            self._waiting.remove_done_callback(self._resume)
            self._waiting.add_done_callback(_retrieve)
        self._waiting = self._delegate = self._close_callback = None
        self._connection = self._request = None

    # What handlers use.

    def set_close_callback(self, callback: Callable[[], None] | None) -> None:
        """Have `callback` run if the peer disconnects between its request and the end of the answer."""
        self._close_callback = callback

    def set_max_body_size(self, max_body_size: int) -> None:
        """Set this request's body limit, in bytes. Call it in `headers_received` or `prepare`."""
        if self._request is not None:
            self._request.set_max_body_size(max_body_size)

    def write_headers(
        self,
        start_line: httputil.RequestStartLine | httputil.ResponseStartLine,
        headers: httputil.HTTPHeaders,
        chunk: bytes | None = None,
    ) -> Future[None]:
        """Send the status line, the headers and a first piece of the body.

        `Date`, and where due `Connection` and `Transfer-Encoding`, are added. O(size).

        :raises ValueError: on a line break in a header.
        :raises HTTPOutputError: if `chunk` is longer than `Content-Length` allows.
        """
        assert isinstance(start_line, httputil.ResponseStartLine)
        request, connection = self._request, self._connection
        if request is None or connection is None:
            return closed_future()
        code = start_line.code
        self.started = True
        self._frame(request, code, headers)
        if code >= 200:
            self._announce(request, headers)
        if self._chunking:
            headers["Transfer-Encoding"] = "chunked"
        data = _serialise(start_line, headers)
        if chunk:
            data += self._format(chunk)
        if code == 101:
            # These bytes are for the stream that `detach` makes: what the transport
            # still buffers can't be taken out again, and would arrive too late.
            self._switching = [data]
            return connection.written()
        return connection.send(data)

    def write(self, chunk: bytes) -> Future[None]:
        """Send a piece of the body; the future resolves when more may follow. O(size).

        :raises HTTPOutputError: if it is more than `Content-Length` allows.
        """
        if self._connection is None:
            return closed_future()
        data = self._format(chunk)
        if self._switching is not None:
            self._switching.append(data)
            return self._connection.written()
        return self._connection.send(data)

    def finish(self) -> None:
        """End the answer.

        :raises HTTPOutputError: if it is shorter than its `Content-Length`.
        """
        connection, request = self._connection, self._request
        if connection is None or request is None or self._switching is not None:
            return
        if self._remaining:
            remaining = self._remaining
            connection.cut()
            raise httputil.HTTPOutputError(f"Tried to write {remaining} bytes less than Content-Length")
        if self._chunking:
            connection.send(b"0\r\n\r\n")
        delegate = self._delegate
        connection.finished(request)
        if delegate is not None:
            # Answered before the body had come. Tornado promises its delegates either finish() or
            # on_connection_close(), but doesn't call them from inside their own answer.
            connection.loop.call_soon(_dismiss, delegate)

    def detach(self) -> IOStream:
        """Hand the socket over as a stream, which begins with bytes that were read already.

        :raises RuntimeError: if bytes behind this request were parsed as HTTP already, which can't happen after
            `Connection: Upgrade`, CONNECT or a last request.
        :raises StreamClosedError: if no file descriptor is left; the connection is cut.
        """
        connection = self._connection
        switching = self._switching or []
        if connection is None:
            return _closed_stream()
        stream = connection.detach()
        self.release()
        for data in switching:
            stream.write(data)
        return stream

    def _frame(self, request: Request, code: int, headers: httputil.HTTPHeaders) -> None:
        length = headers.get("Content-Length")
        bodiless = code in (204, 304) or 100 <= code < 200
        self._chunking = length is None and not bodiless and not self._is_head and not request.http10
        if self._is_head or bodiless:
            self._remaining = 0
        elif length is not None:
            self._remaining = _parse_length(length)
        else:
            self._remaining = None
            if request.http10:
                request.keep_alive = False  # only the end of the connection ends the body

    @staticmethod
    def _announce(request: Request, headers: httputil.HTTPHeaders) -> None:
        if headers.get("Connection", "").lower() == "close":
            request.keep_alive = False
        elif request.http10:
            if request.keep_alive:
                headers["Connection"] = "Keep-Alive"
        elif not request.keep_alive:
            headers["Connection"] = "close"

    def _format(self, chunk: bytes) -> bytes:
        if self._remaining is not None:
            self._remaining -= len(chunk)
            if self._remaining < 0:
                assert self._connection is not None
                self._connection.cut()
                raise httputil.HTTPOutputError("Tried to write more data than Content-Length")
        if self._chunking and chunk:
            return b"%x\r\n%b\r\n" % (len(chunk), chunk)
        return chunk


def _headers(request: Request) -> httputil.HTTPHeaders:
    headers = httputil.HTTPHeaders()
    for name_bytes, value_bytes in request.headers:
        name, value = name_bytes.decode("latin-1"), value_bytes.decode("latin-1")
        # llhttp has checked both, so the checks of `add` are for repeated names only.
        if name in headers:
            headers.add(name, value)
        else:
            headers[name] = value
    return headers


def _serialise(start_line: httputil.ResponseStartLine, headers: httputil.HTTPHeaders) -> bytes:
    lines = [f"HTTP/1.1 {start_line.code} {start_line.reason}"]
    try:
        lines += [name + ": " + value for name, value in headers.get_all()]
    except TypeError:  # some handlers set headers as bytes
        lines += [f"{native_str(name)}: {native_str(value)}" for name, value in headers.get_all()]
    breaks = len(lines) - 1
    head = "\r\n".join(lines).encode("latin-1")
    if head.count(b"\n") != breaks or head.count(b"\r") != breaks:
        raise ValueError(f"Illegal characters (CR or LF) in header: {lines!r}")
    if "Date" in headers:
        return head + b"\r\n\r\n"
    return b"%b\r\n%b\r\n" % (head, date_line())


def _parse_length(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"not a Content-Length: {text!r}")
    return int(text)


def _closed_stream() -> IOStream:
    stream = IOStream(socket.socket())
    stream.close()
    return stream


def _dismiss(delegate: httputil.HTTPMessageDelegate) -> None:
    try:
        delegate.on_connection_close()
    except Exception:
        app_log.error("Uncaught exception", exc_info=True)


def _retrieve(future: Future[object]) -> None:
    if not future.cancelled():
        future.exception()
