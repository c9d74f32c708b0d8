"""The API behind Tornado's interfaces for messages, past RequestHandler.

Every call of the API is answered by an `ApiCall`, on whichever HTTP server drives the application: here as a
delegate of Tornado's, in raw.py as bytes. One path, so one behaviour. RequestHandler is for pages
(handlers/pages.py); what it does for them (templates, cookies, ETags) costs a JSON call twice what the call
itself does.

A request that is refused by its head is answered when its body has been read and thrown away, so that the
connection can go on; one whose body is larger than `DISCARDED`, or that asks before it sends, is answered at
once.
"""

from __future__ import annotations

import asyncio
import time
from http.client import responses as REASONS  # noqa: N812 - a table
from typing import Any, cast

from tornado import httputil
from tornado.http1connection import HTTP1Connection
from tornado.iostream import StreamClosedError
from tornado.routing import Router

from keypool.api.dispatch import Begun, Dispatcher, Known, Reply, Request, too_large
from keypool.api.wrong_tokens import WrongTokens
from keypool.config.limits import DISCARDED, MAX_BODY
from keypool.core.errors import WrongToken
from keypool.http.http1.responses import http_date
from keypool.http.http1.turns import Turns
from keypool.http.inflight import InFlight
from keypool.http.steps import Steps


class ApiCall(Begun):
    """One request of the API, from its head to its reply. A subclass knows the way that the reply goes."""

    _steps: Steps | _HeldBack | None = None
    _ended = False
    remote_ip: str | None
    turns: Turns | None = None
    """Those of its server; without them a paused call goes on in the loop's next iteration."""

    def __init__(self, dispatcher: Dispatcher, in_flight: InFlight) -> None:
        self._dispatcher = dispatcher
        self._in_flight = in_flight

    def send(self, reply: Reply) -> bool:
        """Write the reply; whether there is still somebody to write to."""
        raise NotImplementedError

    def begin(self, request: Request, known: Known | None = None) -> None:
        """Check the head."""
        self._started = time.monotonic()
        self._in_flight.count += 1
        self._dispatcher.begin(self, request, known)

    def run(self, request: Request, body: bytes) -> bool:
        """Do what the request asks for; whether it waits for something."""
        if self.error is not None:
            self.refuse()
            return self._steps is not None
        try:
            call = self._dispatcher.run(self, request, body)
            if call is None:
                answer = None
            else:
                awaited = call.send(None)
                self._steps = steps = Steps(call, self._done, self.turns)
                steps.wait_for(awaited)
                return True
        except StopIteration as answered:
            answer = answered.value
        except Exception as error:
            self.answer(self._dispatcher.failed(self, error))
            return False
        self.answer(self._dispatcher.reply(self, answer))
        return False

    def refuse(self, *, at_once: bool = False) -> None:
        """Answer with the error that the request has met; a little later, if it is one wrong token of many.

        `at_once` is for a request whose body is not waited for: its connection ends with the answer.
        """
        assert self.error is not None
        if self._steps is not None:
            return  # held back: its body has come meanwhile
        reply = self._dispatcher.refusal(self, self.error)
        if isinstance(self.error, WrongToken):
            wrong = self._dispatcher.wrong_tokens
            seconds = wrong.token(self.error.mark, self.remote_ip or "?", self.request_id)
            if seconds and wrong.room() and not at_once:
                self._steps = _HeldBack(wrong, seconds, self, reply)
                return
            reply.last = seconds > 0
        self.answer(reply)

    def answer(self, reply: Reply) -> None:
        """Send the reply, and count it if it could be sent."""
        if self.send(reply):
            self._dispatcher.answered(self, reply, time.monotonic() - self._started)
        self.end()

    def hung_up(self) -> None:
        """The caller is gone. A call that has begun runs to its end, unanswered, but for an acquire."""
        if self._steps is None or self.error is not None or self._dispatcher.ends_with_caller(self):
            self.end()

    def end(self) -> None:
        """Answered, or the caller is gone: whatever the call waits for, it stops."""
        if self._ended:
            return  # answered before its body had come, and then hung up on: one request, counted once
        self._ended = True
        if self._steps is not None:
            self._steps.close()
            self._steps = None
        in_flight = self._in_flight
        in_flight.count -= 1
        if in_flight.idle is not None and not in_flight.count:
            in_flight.tell_idle()

    def _done(self, answer: Any, error: Exception | None) -> None:
        dispatcher = self._dispatcher
        self.answer(dispatcher.reply(self, answer) if error is None else dispatcher.failed(self, error))


class _HeldBack:
    """A reply that waits for its moment, unless `close` comes first."""

    __slots__ = ("_timer", "_wrong")

    def __init__(self, wrong: WrongTokens, seconds: float, call: ApiCall, reply: Reply) -> None:
        self._wrong = wrong
        self._timer = asyncio.get_running_loop().call_later(seconds, call.answer, reply)
        wrong.held += 1

    def close(self) -> None:
        """It is answered, or nobody waits for it any more."""
        self._wrong.held -= 1
        self._timer.cancel()


class ApiRouter(Router):
    """Makes the delegate of each request."""

    def __init__(self, dispatcher: Dispatcher, in_flight: InFlight) -> None:
        self._dispatcher = dispatcher
        self._in_flight = in_flight

    def find_handler(self, request: httputil.HTTPServerRequest, **kwargs: Any) -> ApiDelegate:
        """The delegate of a request."""
        return ApiDelegate(self._dispatcher, self._in_flight, request)


class ApiDelegate(ApiCall, httputil.HTTPMessageDelegate):
    """One request of the API on Tornado's server."""

    def __init__(
        self, dispatcher: Dispatcher, in_flight: InFlight, request: httputil.HTTPServerRequest
    ) -> None:
        super().__init__(dispatcher, in_flight)
        assert request.connection is not None
        self._request = request
        self.remote_ip = request.remote_ip
        # Tornado names the base class; what it hands over is the class that knows when it closes.
        self._connection: HTTP1Connection | None = cast("HTTP1Connection", request.connection)
        self._body: list[bytes] = []
        self._size = 0
        self._whole = False

    def headers_received(
        self,
        start_line: httputil.RequestStartLine | httputil.ResponseStartLine,
        headers: httputil.HTTPHeaders,
    ) -> None:
        """Check the head; answer at once what can't wait for the body."""
        self.begin(self._request)
        length = _declared_length(headers)
        if length > MAX_BODY and self.error is None:
            self.error = too_large()
        if self.error is not None and (length > DISCARDED or "Expect" in headers):
            self.refuse(at_once=True)

    def data_received(self, chunk: bytes) -> None:
        """Keep a part of the body, or throw it away if the request is refused."""
        self._size += len(chunk)
        if self.error is None:
            if self._size > MAX_BODY:
                self.error = too_large()
                self._body.clear()
            else:
                self._body.append(chunk)
        elif self._size > DISCARDED and self._connection is not None:
            self.refuse(at_once=True)

    def finish(self) -> None:
        """The request is whole: run its call."""
        self._whole = True
        if self._connection is None:
            return
        if (
            self._connection.stream.closed()
        ):  # it hung up behind its last byte: nobody is there to be answered
            self.on_connection_close()
            return
        if self.run(self._request, b"".join(self._body)) and self._connection is not None:
            self._connection.set_close_callback(self.on_connection_close)

    def on_connection_close(self) -> None:
        """The caller is gone."""
        self._connection = None
        self.hung_up()

    def send(self, reply: Reply) -> bool:
        """Write the reply by Tornado's connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            write_reply(connection, self.head, reply, closes=reply.closes or not self._whole)
        return connection is not None


def write_reply(connection: httputil.HTTPConnection, head: bool, reply: Reply, *, closes: bool) -> None:
    """Write a whole reply and finish. A connection that closed meanwhile is nobody's error.

    `closes` says so to the caller. Tornado ends a connection by itself when the body hasn't come, and doesn't say so.
    """
    headers = httputil.HTTPHeaders()
    for name, value in reply.headers():
        headers.add(name, value)
    headers.add("Date", http_date())
    if reply.status != 204:
        headers.add("Content-Length", str(len(reply.body)))
    if closes:
        headers.add("Connection", "close")
    start_line = httputil.ResponseStartLine("", reply.status, REASONS.get(reply.status, "Unknown"))
    try:
        future = connection.write_headers(start_line, headers, b"" if head else reply.body)
        future.add_done_callback(_heard)
        connection.finish()
    except StreamClosedError:
        return


def _heard(future: Any) -> None:
    future.exception()


def _declared_length(headers: httputil.HTTPHeaders) -> int:
    given = headers.get("Content-Length", "0")
    return int(given) if given.isascii() and given.isdigit() and len(given) < 19 else 0
