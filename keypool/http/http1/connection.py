"""One connection: it has a reader, a writer and a queue of requests, and serves these one after the other.

Requests are answered in order: the next is started when the answer before it is complete and the peer keeps up with
reading. HTTP would allow working on several at once, but Tornado does the same, it orders the effects as well as the
answers, and it bounds the memory: a connection parses ahead only a little, holds at most one read of bytes unparsed,
and then stops reading. A peer that pipelines many requests gets them served in turns with other peers (see `turns`).

The `current` request is the one that was given to the application: to `start_raw_request`, if there is one, or through
Tornado's interfaces. Reading goes on while an answer is pending, so that a disconnect is noticed. A peer that
half-closes is treated as disconnected, as in Tornado; but what came before it and only waits for this connection's
turn is started first.

States of a connection (those of its reader are in `reader`):

    OPEN       requests are read and answered
    LINGERING  the last answer is written and the sending side shut: what still arrives is dropped, within bounds. A
               plain close would reset the connection, and a peer that is still sending would never see the answer
    CLOSING    the transport is closing: what is written is sent, or dropped after a cut
    GONE       the transport is closed, or was handed over as a stream

    OPEN --(`_linger`: answered, but more may come)--> LINGERING
    OPEN --(`_close`: idle, or answered and nothing more has come)--> CLOSING
    any  --(`cut`: over a limit, or a deadline has passed)--> CLOSING
    LINGERING --(the peer ends)--> CLOSING
    any  --(`connection_lost`; OPEN only: `detach`)--> GONE

There are no timers here: the server's sweep checks `deadline`. It is, by the first of these that applies, the deadline
of writing while the peer doesn't read, of the current request's body, of the head that is coming in, or of idleness.
"""

from __future__ import annotations

import asyncio
from collections import deque
from math import inf
from typing import TYPE_CHECKING, cast

from tornado import httputil
from tornado.iostream import StreamClosedError
from tornado.log import app_log, gen_log

from keypool.http.http1.exchange import Exchange
from keypool.http.http1.reader import HOLDING, READING, RequestReader
from keypool.http.http1.request import Peer, Request
from keypool.http.http1.responses import Refusal, refuse_with, with_connection, without_body
from keypool.http.http1.stream import hand_over
from keypool.http.http1.turns import QUANTUM, TASK
from keypool.http.http1.writer import Writer, closed_future

if TYPE_CHECKING:
    from tornado.iostream import IOStream

    from keypool.http.http1.server import Server

OPEN, LINGERING, CLOSING, GONE = 0, 1, 2, 3

_DEPTH = 16  # requests parsed ahead before reading stops
_HIGH = 64 * 1024  # bytes of bodies held before reading stops


class Connection(asyncio.Protocol):
    """One peer and its requests. Only `current`, if it isn't None, may be answered."""

    __slots__ = (
        "_busy",
        "_ended",
        "_held",
        "_in_head",
        "_lingered",
        "_queue",
        "_read_paused",
        "_refusal",
        "_scheduled",
        "_transport",
        "_turns",
        "_until",
        "_writer",
        "current",
        "deadline",
        "debt",
        "limits",
        "loop",
        "peer",
        "reader",
        "server",
        "state",
    )

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self.loop = loop
        self.limits = server.limits
        self.state = OPEN
        self.deadline = inf
        self.reader = RequestReader(
            self, server.limits, server.sections, keeps_alive=not server.no_keep_alive
        )
        self.peer: Peer
        self._transport: asyncio.Transport
        self._writer: Writer
        self.current: Request | None = None
        self._queue: deque[Request] = deque()  # the requests behind it
        self._refusal: Refusal | None = None  # to be answered behind the queue
        self._held: bytes | memoryview = b""  # read, not yet parsed
        self._busy = False  # in `data_received` or `run`, which start the next request themselves
        self._in_head = True  # the deadline is a head's; that of the first head begins with the connection
        self._read_paused = False
        self._scheduled = False  # queued for a later turn
        self._ended = False  # the peer has sent all, some of which waits for that turn
        self._turns = server.turns
        self._until = 0.0  # when this connection's quantum ends, by the clock of the turns
        self._lingered = 0  # bytes that came behind the last request
        self.debt = 0.0  # see `turns.Served`

    # -- called by the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Set the connection up, or close it if there are too many."""
        self._transport = cast(asyncio.Transport, transport)
        self._writer = Writer(self.server, self._transport)
        self.peer = Peer(transport.get_extra_info("peername"), self.server.trusted)
        if not self.server.admit(self):
            self.state = CLOSING
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        """Parse, and answer what can be answered at once."""
        turns, reader = self._turns, self.reader
        if (
            self.state
            or reader.state
            or self._held
            or self._queue
            or turns.over
            or self.debt
            or len(data) > reader.piece
        ):
            self._received_more(data)
            return
        self._busy = True
        started = turns.clock()
        self._until = inf  # a request that comes alone is started at once, without a look at the clock
        consumed = reader.try_cached(data)
        if consumed < len(data):
            self._until = started + QUANTUM
            consumed = reader.feed(data, consumed)
        elif self.current is None and not self._queue:
            self._busy = False
            seconds = turns.clock() - started
            turns.left -= seconds
            if seconds > QUANTUM or turns.left < 0:
                turns.overrun(self, seconds)
            return  # answered, and `_done` has set the deadline
        if self._queue or consumed != len(data) or self._refusal is not None:
            self._held = data[consumed:]
            self._work()
        self._busy = False
        turns.spend(self, started)
        self._settle()

    def _received_more(self, data: bytes) -> None:
        if self.state == LINGERING:
            self._lingered += len(data)
            if self._lingered > self.limits.linger_bytes:
                self.cut()
        elif self.state > LINGERING:
            return
        elif self.reader.state > HOLDING:
            self._lingered += len(data)  # a reason to linger, see `_done`
        else:
            self._held = bytes(self._held) + data if self._held else data
            if self.reader.state == READING and not self._scheduled:
                if self._turns.over or self.debt:
                    self._schedule(backlog=self.debt > 0)
                else:
                    started = self._turns.clock()
                    self.run()
                    self._turns.spend(self, started)
                    return
            self._settle()

    def eof_received(self) -> bool:
        """Treat the end of the peer's sending as a disconnect, behind requests that only wait for this one's turn."""
        if self.state == OPEN and self._scheduled and self.current is None:
            self._ended = True
            return True  # the transport stays open
        if self.state <= LINGERING:
            self._leave()
            self._writer.flush()
            self._await_closing()
            self._transport.close()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Notify the application, and drop all references."""
        if self.state != GONE:
            self.state = GONE
            self._leave()
            self.server.forget(self)
        self._writer.close()
        del self._transport, self.reader  # each is in a cycle with this object

    def pause_writing(self) -> None:
        """The transport's buffer is over its high-water mark."""
        self._writer.paused = True
        self.deadline = self.server.clock + self.limits.write_seconds

    def resume_writing(self) -> None:
        """The peer has read: start what was waiting for that."""
        self._writer.resume()
        if self.state == OPEN:
            self._in_head = False  # the time limit of a head that has begun meanwhile starts now
            self.deadline = self.server.clock + self.limits.idle_seconds
            self._schedule()

    # -- called by the sweep, and by a graceful shutdown

    def expire(self) -> None:
        """End the connection, since `deadline` has passed: with 408 if a request had begun."""
        if self.state != OPEN or self._writer.paused:
            self.cut()
        elif self.current is not None or self.reader.begun:
            self.refuse(self.reader.refusal(408, "request-timeout", "the request took too long to arrive"))
        else:
            self._leave()
            self._close()

    def shut_down(self) -> None:
        """Close now if idle, else after the answer in progress."""
        self.disable_keep_alive()
        current = self.current
        if current is None:
            self._leave()
            self._close()
            return
        current.keep_alive = False
        if current.received and self.reader.state == READING:
            self._stop_reading()

    def disable_keep_alive(self) -> None:
        """Close with the answer to the next request."""
        self.reader.keeps_alive = False

    def unfinished(self) -> int:
        """Bytes held of requests that aren't answered yet, about. O(requests held)."""
        held = len(self._held) + self.reader.unfinished()
        return held + sum(request.held_bytes() for request in self._queue) if self._queue else held

    def unsent(self) -> bool:
        """Whether some of what was written is not sent yet."""
        return self._writer.unsent()

    def probe_eof(self) -> None:
        """Read once more although reading is paused, if an answer is pending: else a disconnect would go unnoticed."""
        current = self.current
        if self._read_paused and current is not None and current.received and not self._writer.paused:
            self._read_paused = False
            self._transport.resume_reading()

    # -- called by the turns

    def run(self) -> None:
        """Work on what is queued and held, for a quantum."""
        self._scheduled = False
        if self.state == OPEN:
            self._busy = True
            self._until = inf
            self._try_cached_held()
            # From here on, so that each run parses at least one piece.
            self._until = self._turns.clock() + QUANTUM
            self._work()
            self._busy = False
            self._settle()
            if self._ended and not self._scheduled:
                self.loop.call_soon(self.eof_received)  # behind the handlers that were started

    def _schedule(self, *, backlog: bool = True) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._turns.queue(self, backlog=backlog)

    def _try_cached_held(self) -> None:
        """Take a request that had to wait from the cache, as `data_received` would have."""
        held = self._held
        idle = self.current is None and not self._queue
        if held and type(held) is bytes and self.reader.state == READING and idle:
            self._held = b""
            end = self.reader.try_cached(held[: self.reader.piece])  # a search through all would take long
            if self._reads():  # else the rest is dropped
                self._held = held[end:]

    def _work(self) -> None:
        """Start what is queued and parse what is held, until the quantum or a bound is reached."""
        self._run_queue()
        while self._held and self._reads() and not self._congested():
            if self._turns.clock() >= self._until:
                self._schedule()
                break
            held = memoryview(self._held)
            consumed = self.reader.feed(held[: self.reader.piece])
            if self._held:  # else `_stop_reading` was called meanwhile, and the rest is dropped
                self._held = held[consumed:] or b""
            self._run_queue()

    def _reads(self) -> bool:
        return self.state == OPEN and self.reader.state == READING

    def _run_queue(self) -> None:
        """Start requests while there is no current one, and answer a refusal after the last."""
        queue = self._queue
        while queue and self.current is None and not self._writer.paused and self.state == OPEN:
            if queue[0].upgrade and not self._writer.sent_all():
                return
            if self._turns.clock() >= self._until:
                self._schedule()
                return
            request = queue.popleft()
            self._start(request)
            if not request.waits():
                self.advance(request)
        if self._refusal is not None and not queue and self.current is None:
            self._answer_refusal(self._refusal)

    def _congested(self) -> bool:
        if len(self._queue) >= _DEPTH:
            return True
        incoming = self.reader.incoming
        if incoming is None or incoming.held_bytes() <= _HIGH:
            return sum(request.held_bytes() for request in self._queue) > _HIGH
        return incoming.waits()

    def _settle(self) -> None:
        """Set the deadline of the state arrived at, and stop or resume reading."""
        if self.state != OPEN:
            return
        current, reader = self.current, self.reader
        if self._writer.paused:
            pass  # the deadline is that of writing
        elif current is not None:
            body = current.body
            self.deadline = inf if body is None or current.received else body.deadline
        elif reader.target and not self._in_head:
            self._in_head = True
            self.deadline = self.server.clock + self.limits.head_seconds
        held = len(self._held)
        if reader.state != READING:
            pause = held > _HIGH
        elif not (held or reader.incoming or self._queue):
            pause = False
        else:
            # Pausing and resuming costs more than holding a few bytes that only wait for the connection's turn.
            pause = held > reader.piece or (held > 0 and not self._scheduled) or self._congested()
        if pause != self._read_paused:
            self._read_paused = pause
            if pause:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    # -- called by the reader

    def request_started(self, request: Request) -> None:
        """Start a request if its turn has come, else queue it. An upgrade waits until all before it are answered."""
        self.server.began += 1
        self._in_head = False
        if (
            self.current is None
            and not self._writer.paused
            and not self._queue
            and not request.upgrade
            and (self._until == inf or self._turns.clock() < self._until)
        ):
            self._start(request)
        else:
            self._queue.append(request)

    def advance(self, request: Request) -> None:
        """Hand over what has come of the body, and its end; finish a request that was answered before its end."""
        if request is not self.current:
            return
        if request.answered:
            if request.received:
                self._done(request)
            return
        try:
            if request.exchange is not None:
                request.exchange.advance()
            elif request.delegate is not None and request.received:
                body = request.body
                request.delegate.run(b"" if body is None else body.take())
        except Exception as error:
            self._failed(request, error)

    def refuse(self, refusal: Refusal) -> None:
        """Answer with a refusal, after the requests before it, and end the connection."""
        broken = self.reader.incoming
        self._stop_reading()
        if broken is not None and broken is self.current:
            self._give_up(broken, refusal)
            return
        if broken is not None and self._queue:
            self._queue.pop()
        self._refusal = refusal
        if not self._busy:
            self._schedule()

    def too_large(self, request: Request) -> bool:
        """Let a raw delegate answer a request whose body is too large. True if it has."""
        if request.delegate is not None and not request.answered:
            try:
                request.delegate.too_large()
            except Exception as error:
                self._failed(request, error)
                return True
        return request.answered

    # -- called by requests and exchanges

    def answer(self, request: Request, response: bytes, close: bool) -> None:
        """Send a whole response to a raw request."""
        request.answered = True
        if close:
            request.keep_alive = False
        if not request.received and request.body is not None:
            self._prepare_early(request)
        if not request.keep_alive or request.http10 or request.method == b"HEAD":
            response = _adapted(request, response)
        writer = self._writer
        writer.put(response)
        if writer.failed:
            self.state = max(self.state, CLOSING)
        if request.received or (request.body is not None and not request.keep_alive):
            self._done(request)

    def send(self, data: bytes) -> asyncio.Future[None]:
        """Write a part of an answer. The future resolves when more may follow. O(1)."""
        if self.state != OPEN:
            return closed_future()
        writer = self._writer
        writer.put(data)
        if writer.failed:
            self.state = CLOSING  # the peer has disconnected: write no more until `connection_lost`
        return writer.written()

    def written(self) -> asyncio.Future[None]:
        """See `Writer.written`."""
        return self._writer.written()

    def finished(self, request: Request) -> None:
        """End the answer of an exchange."""
        request.answered = True
        if not request.received and request.body is not None:
            self._prepare_early(request)
        if request.exchange is not None:
            request.exchange.release()
        if request.received or (request.body is not None and not request.keep_alive):
            self._done(request)

    def resume(self, future: asyncio.Future[object]) -> None:
        """Continue handing over a body when `future`, for which its delegate had it held back, is done."""
        request = self.current
        if request is None or request.answered:
            return
        try:
            future.result()
        except BaseException as error:
            self._failed(request, error)
        else:
            self._ask_for_body(request)
            self.advance(request)
        self._schedule()

    def detach(self) -> IOStream:
        """Hand the socket over as a stream. Raises as `Exchange.detach`."""
        request = self.current
        assert request is not None
        reader = self.reader
        clean = reader.state == HOLDING or not self._held
        if not clean or reader.incoming is not None or reader.target or self._queue:
            raise RuntimeError("what follows this request has been read as HTTP already")
        if not self._writer.sent_all():
            raise RuntimeError("an earlier answer has not been sent yet")
        try:
            stream = hand_over(self._transport, bytes(self._held), self.server.handed_over(self))
        except OSError as error:
            self.server.limiter.out_of_files(error)
            self.cut()
            raise StreamClosedError(error) from None
        self._stop_reading()
        self.state = GONE
        self.current = None
        request.release()
        self.server.forget(self, counted=True)
        return stream

    # -- the current request

    def _start(self, request: Request) -> None:
        """Give a request to the application: to `start_raw_request` first, if there is one."""
        self.current = request
        try:
            take = self.server.start_raw
            delegate = None if take is None else take(request)
            if not request.answered:
                if delegate is None:
                    self._turns.charge(TASK)  # handlers do their work in a task, after this turn
                    exchange = request.exchange = Exchange(self, request)
                    exchange.start(self.server.application.start_request(self, exchange))
                else:
                    request.delegate = delegate
        except Exception as error:
            self._failed(request, error)
        else:
            if request.body is not None:
                self._ask_for_body(request)

    def _ask_for_body(self, request: Request) -> None:
        body = request.body
        if body is None or request.answered or request is not self.current or request.waits():
            return
        if body.size > body.limit or (body.length is not None and body.length > body.limit):
            if not self.too_large(request):
                detail = f"the body is larger than {body.limit} bytes"
                self._reject(request, 413, "payload-too-large", detail)
        elif not request.received and body.deadline == inf:
            body.deadline = self.server.clock + self.limits.body_seconds
            if body.expects:
                body.expects = False
                if body.size == 0:
                    self._writer.put(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _prepare_early(self, request: Request) -> None:
        """Decide whether the connection can go on after a request that was answered before its end."""
        body = request.body
        assert body is not None
        body.held = b""
        if body.deadline == inf:  # the body wasn't asked for, but is read to its end
            body.deadline = self.server.clock + self.limits.body_seconds
        spare = self.limits.discarded_bytes
        if body.expects or (body.length is not None and body.length - body.size > spare):
            request.keep_alive = False  # a new connection is cheaper than reading it all
        body.limit = body.size + spare

    def _done(self, request: Request) -> None:
        """Release a request that is received and answered, then end the connection or go on."""
        self.current = None
        request.connection = request.delegate = request.exchange = None
        if not request.keep_alive:
            expected = request.received and not (self._held or self._queue or self._lingered)
            self._queue.clear()
            self._stop_reading()
            if expected:
                self._close()
            else:
                self._linger()
            return
        if request.upgrade:
            self.reader.go_on()  # it stayed HTTP
            self._writer.reset_limits()
        self._in_head = False
        if not self._writer.paused:
            self.deadline = self.server.clock + self.limits.idle_seconds
        if not self._busy:
            # The next request must not start inside the call that answered this one.
            if self._queue or self._held or self._read_paused or self._refusal is not None:
                self._schedule()
            elif self.reader.target:
                self._settle()

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
        """Answer in place of the application, unless a part of its answer is sent already, and end the connection."""
        exchange = request.exchange
        silent = request.answered or (exchange is not None and exchange.started)
        self._leave()
        if silent:
            self._linger()
        else:
            self._answer_refusal(refusal)

    def _answer_refusal(self, refusal: Refusal) -> None:
        """Answer with a refusal, and end the connection."""
        if self.state != OPEN:
            return
        gen_log.info("Refused a request from %s: %d %s", self.peer, refusal.status, refusal.detail)
        self._refusal = None
        self._writer.put(refuse_with(refusal, self.server.on_refused))
        self._linger()

    # -- the end

    def _stop_reading(self) -> None:
        self.reader.stop()
        self._held = b""

    def _leave(self) -> None:
        """Release all requests, and notify the current one that no answer can reach the peer."""
        current, self.current = self.current, None
        self._stop_reading()
        self._queue.clear()
        self._refusal = None
        if current is None:
            return
        delegate, exchange = current.delegate, current.exchange
        current.release()
        self._writer.fail()
        if exchange is not None:
            exchange.closed()
        elif delegate is not None and not current.answered:
            try:
                delegate.hung_up()
            except Exception:
                app_log.error("Uncaught exception", exc_info=True)

    def _close(self) -> None:
        """End the connection when what is written has been sent. A peer that doesn't read it in time is cut."""
        if self.state == OPEN:
            self._writer.flush()
            self._await_closing()
            self._transport.close()

    def _await_closing(self) -> None:
        self.state = CLOSING
        self.deadline = self.server.clock + self.limits.write_seconds

    def _linger(self) -> None:
        """Shut the sending side, and end the connection when the peer does, within bounds; see LINGERING."""
        if self.state == OPEN:
            self._writer.flush()
            self.state = LINGERING
            self.deadline = self.server.clock + self.limits.linger_seconds
            try:
                self._transport.write_eof()
            except OSError:  # the peer has disconnected already, so that asyncio's shutdown fails
                self.cut()
            else:
                self._transport.resume_reading()

    def cut(self) -> None:
        """End the connection now; what is not sent is lost."""
        if self.state < GONE:
            self._stop_reading()
            self._writer.drop()
            self.state = CLOSING
            self.deadline = inf
            self._transport.abort()


def _adapted(request: Request, response: bytes) -> bytes:
    if request.method == b"HEAD":
        response = without_body(response)
    if request.http10:  # without a Connection header it means close
        return with_connection(response, b"Keep-Alive") if request.keep_alive else response
    return response if request.keep_alive else with_connection(response, b"close")
