"""One request under way: who takes it, how it is answered, and how it may end.

The application is asked first by `start_raw_request`, if it has that, then the Tornado
way. From there to the end of the answer the request is `current`; what can happen to
it meanwhile (the peer leaves, its body is broken, too large or too slow, the application
fails, the server shuts down) is here.

Reading goes on while an answer is pending, so that a peer who leaves is noticed. A
peer that shuts down its sending side counts as having left, as in Tornado.

`Connection` is also what Tornado calls the server connection; to applications it is
opaque.
"""

from __future__ import annotations

import asyncio
from math import inf
from typing import TYPE_CHECKING, cast

from tornado import httputil
from tornado.iostream import StreamClosedError
from tornado.log import app_log, gen_log

from keypool.http.http1.exchange import Exchange
from keypool.http.http1.intake import Intake
from keypool.http.http1.link import CLOSING, GONE, HOLDING, LINGERING, READING
from keypool.http.http1.peer import Peer
from keypool.http.http1.request import Request
from keypool.http.http1.responses import Refusal, refuse_with, with_connection, without_body
from keypool.http.http1.stream import StreamView, hand_over, is_tls
from keypool.http.http1.turns import TASK

if TYPE_CHECKING:
    from tornado.iostream import IOStream

    from keypool.http.http1.server import Server


class Connection(Intake):
    """One peer and its requests, of which `current` may be answered."""

    __slots__ = ("context",)

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(server, loop)
        self.context: Peer

    # Called by the transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, unless there are too many connections."""
        self.transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        protocol = self.server.protocol or ("https" if is_tls(transport) else "http")
        self.context = Peer(transport.get_extra_info("peername"), sock.family, protocol)
        if not self.server.admit(self):
            self.mode = CLOSING
            self.transport.close()

    def eof_received(self) -> None:
        """Take the end of the peer's sending as its leaving."""
        if self.mode < CLOSING:
            self._leave()
            self.flush()
            self._closing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever waits, and forget everything."""
        if self.mode != GONE:
            self.mode = GONE
            self._leave()
            self.server.forget(self)
        self.undrainable()
        self._corked = []
        del self.transport

    def drained(self) -> None:
        """Start what had to wait for the peer to read."""
        if self.mode < LINGERING:
            self._in_head = False  # whatever has come of a head meanwhile: its time begins now
            self.deadline = self.server.clock + self.limits.idle_seconds
            self._schedule()

    # Called by the sweep and by shutdown.

    def expire(self) -> None:
        """Do what is due when `deadline` has passed."""
        if self.mode >= LINGERING or self.write_paused:
            self.cut()
        elif self.current is not None or self._begun:
            self.refuse(self.refusal(408, "request-timeout", "the request took too long to arrive"))
        else:
            self._leave()
            self.close()

    def shut_down(self) -> None:
        """Close now if idle, else behind the answer under way."""
        self.keeps_alive = False
        current = self.current
        if current is None:
            self._leave()
            self.close()
            return
        current.keep_alive = False
        if current.received and self.mode == READING:
            self.deafen()

    # Called by the parser.

    def refuse(self, refusal: Refusal) -> None:
        """Answer by the server itself, in order, and end the connection."""
        broken = self.incoming
        self.deafen()
        if broken is not None and broken is self.current:
            self._give_up(broken, refusal)
            return
        if broken is not None and self._queue:
            self._queue.pop()
        self._refusal = refusal
        if not self.busy:
            self._schedule()

    # Called by requests and exchanges.

    def too_large(self, request: Request) -> bool:
        """Let a raw delegate answer a request whose body is too large; whether it has."""
        if request.delegate is not None and not request.answered:
            try:
                request.delegate.too_large()
            except Exception as error:
                self._failed(request, error)
                return True
        return request.answered

    def answer(self, request: Request, response: bytes, close: bool) -> None:
        """Send a whole response to a raw request."""
        if close:
            request.keep_alive = False
        if not request.received and request.body is not None:
            self._prepare_early(request)
        if not request.keep_alive or request.http10 or request.method == b"HEAD":
            response = _dress(request, response)
        self.put(response)
        if request.received or (request.body is not None and not request.keep_alive):
            self.done(request)

    def finished(self, request: Request) -> None:
        """End the answer of an exchange."""
        request.answered = True
        if not request.received and request.body is not None:
            self._prepare_early(request)
        if request.exchange is not None:
            request.exchange.release()
        if request.received or (request.body is not None and not request.keep_alive):
            self.done(request)

    def resume(self, future: asyncio.Future[object]) -> None:
        """Go on with a body whose taker is ready again."""
        request = self.current
        if request is None or request.answered:
            return
        try:
            future.result()
        except BaseException as error:
            self._failed(request, error)
        else:
            self._ask_for_body(request)
            self.deliver(request)
        self._schedule()

    def peer_of(self, request: Request) -> Peer:
        """Return the peer as seen by this request."""
        trusted = self.server.trusted
        return self.context if trusted is None else self.context.forwarded(request.headers, trusted)

    def stream_view(self) -> StreamView:
        """Return a view of the socket."""
        return StreamView(self.transport)

    def set_body_timeout(self, seconds: float) -> None:
        """Give the current request's body another time."""
        if self.current is not None and self.current.body is not None:
            body = self.current.body
            body.seconds = seconds
            if body.deadline != inf:
                body.deadline = self.server.clock + seconds
                self._settle()

    def detach(self) -> IOStream:
        """Hand the socket over as a stream and be gone."""
        request = self.current
        assert request is not None
        clean = self.mode == HOLDING or not self._held
        if not clean or self.incoming is not None or self._target or self._queue:
            raise RuntimeError("what follows this request has been read as HTTP already")
        if not self._sent_all():
            raise RuntimeError("an earlier answer has not been sent yet")
        try:
            stream = hand_over(self.transport, bytes(self._held), self.loop, self.server.handed_over(self))
        except OSError as error:
            self.server.doorman.out_of_files(error)
            self.cut()
            raise StreamClosedError(error) from None
        self._held = b""
        self.mode = GONE
        self.parser = None
        self.current = None
        request.release()
        self.server.forget(self, counted=True)
        return stream

    # The request under way.

    def start(self, request: Request) -> None:
        """Ask the application to take a request, the raw way first."""
        self.current = request
        try:
            take = self.server.start_raw
            delegate = None if take is None else take(request)
            if not request.answered:
                if delegate is None:
                    self._start_exchange(request)
                else:
                    request.delegate = delegate
        except Exception as error:
            self._failed(request, error)
        else:
            if request.body is not None:
                self._ask_for_body(request)

    def _start_exchange(self, request: Request) -> None:
        self._turns.charge(TASK)  # handlers do their work in a task, after this turn
        exchange = request.exchange = Exchange(self, request, self.peer_of(request))
        exchange.start(self.server.start_request(self, exchange))

    def _ask_for_body(self, request: Request) -> None:
        body = request.body
        if body is None or request.answered or request is not self.current or request.waits():
            return
        if body.size > body.limit or (body.length is not None and body.length > body.limit):
            if not self.too_large(request):
                detail = f"the body is larger than {body.limit} bytes"
                self._reject(request, 413, "payload-too-large", detail)
        elif not request.received and body.deadline == inf:
            body.deadline = self.server.clock + body.seconds
            if body.expects:
                body.expects = False
                if body.size == 0:
                    self.put(b"HTTP/1.1 100 Continue\r\n\r\n")

    def deliver(self, request: Request) -> None:
        """Hand over what has come of the body, and its end."""
        delegate, exchange = request.delegate, request.exchange
        try:
            if exchange is not None:
                exchange.advance()
            elif delegate is not None and request.received:
                body = request.body
                delegate.body(b"" if body is None else body.take())
        except Exception as error:
            self._failed(request, error)

    def _prepare_early(self, request: Request) -> None:
        """Decide whether the connection outlives a request answered before its end."""
        body = request.body
        assert body is not None
        body.held = b""
        if body.deadline == inf:  # nobody has asked for it, and it is to end all the same
            body.deadline = self.server.clock + body.seconds
        spare = self.limits.discarded_bytes
        if body.expects or (body.length is not None and body.length - body.size > spare):
            request.keep_alive = False  # it is cheaper to end than to read it all
        body.limit = body.size + spare

    def done(self, request: Request) -> None:
        """Let go of a request, and end the connection or go on."""
        self.current = None
        request.release()
        if not request.keep_alive:
            expected = request.received and not (self._held or self._queue or self.lingered)
            self._queue.clear()
            self.deafen()
            if expected:
                self.close()
            else:
                self.linger()
            return
        if request.upgrade:
            self.mode = READING  # it stayed HTTP
            self.transport.set_write_buffer_limits()  # as they were before `_sent_all`
        self._in_head = False
        if not self.write_paused:
            self.deadline = self.server.clock + self.limits.idle_seconds
        if not self.busy:
            # The next request must not start inside the call that answered this one.
            if self._queue or self._held or self._read_paused or self._refusal is not None:
                self._schedule()
            elif self._target:
                self._settle()

    # The end.

    def _failed(self, request: Request, error: BaseException) -> None:
        if isinstance(error, httputil.HTTPInputError):
            self._reject(request, 400, "bad-request", str(error))
        else:
            app_log.error("Uncaught exception", exc_info=error)
            self._reject(request, 500, "internal", "the server failed")

    def _reject(self, request: Request, status: int, code: str, detail: str) -> None:
        if request is self.current:
            refusal = Refusal(status, code, detail, request.method, request.target, request.headers, True)
            self._give_up(request, refusal)

    def _give_up(self, request: Request, refusal: Refusal) -> None:
        """Answer in the application's place, if no part of an answer is out."""
        exchange = request.exchange
        silent = request.answered or (exchange is not None and exchange.started)
        self._leave()
        if silent:
            self.linger()
        else:
            self.answer_refusal(refusal)

    def answer_refusal(self, refusal: Refusal) -> None:
        """Answer by the server itself, and end."""
        if self.mode >= LINGERING:
            return
        gen_log.info("Refused a request from %s: %d %s", self.context, refusal.status, refusal.detail)
        self._refusal = None
        self.put(refuse_with(refusal, self.server.on_refused))
        self.linger()

    def _leave(self) -> None:
        """Let go of all requests, and tell the one under way that no answer can arrive."""
        current, self.current = self.current, None
        self.deafen()
        self._queue.clear()
        self._refusal = None
        if current is None:
            return
        delegate, exchange = current.delegate, current.exchange
        current.release()
        self.undrainable()
        if exchange is not None:
            exchange.closed()
        elif delegate is not None and not current.answered:
            try:
                delegate.closed()
            except Exception:
                app_log.error("Uncaught exception", exc_info=True)


def _dress(request: Request, response: bytes) -> bytes:
    if request.method == b"HEAD":
        response = without_body(response)
    if request.http10:  # closes unless it is told
        return with_connection(response, b"Keep-Alive") if request.keep_alive else response
    return response if request.keep_alive else with_connection(response, b"close")
