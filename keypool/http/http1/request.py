"""One request, from its headers to its answer, and the cheap way to answer it.

`Request` is what the parser makes and what the connection queues. An application
that wants no more than bytes may take it as it is, past every Tornado object::

    class Fast(tornado.web.Application):
        def start_raw_request(self, request: Request) -> RawDelegate | None:
            if request.target != b"/ping":
                return None              # the Tornado way
            request.respond(PONG)        # or keep it, and respond later
            return ANSWERED

The method is asked first, once for each request, when the headers are in and all
earlier requests of the connection are answered. It returns None to leave the
request to `start_request`, or a `RawDelegate`, which gets the whole body in one
piece, and is told if the peer leaves before the answer.

No future, task or `HTTPHeaders` is made for a raw request, and it is freed by
reference count alone: the connection lets go of the request and the delegate as
soon as the answer is out.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from keypool.config.limits import Limits
from keypool.http.http1.responses import Headers
from keypool.http.http1.section import HeaderSection

if TYPE_CHECKING:
    from keypool.http.http1.exchange import Exchange
    from keypool.http.http1.peer import Peer
    from keypool.http.http1.reader import RequestReader
    from keypool.http.http1.turns import Turns


class RawDelegate:
    """Receives what follows the headers of a raw request.

    After `Request.respond`, no method is called.
    """

    __slots__ = ()

    def body(self, body: bytes) -> None:
        """Take the whole body, `b""` if there is none. Called once, in order."""

    def too_large(self) -> None:
        """Learn that the body is larger than its limit; respond, or the server does and ends the connection."""

    def closed(self) -> None:
        """Learn that the peer is gone, or was refused: no answer can reach it.

        A peer that shuts down its sending side before the answer counts as gone.
        """


@runtime_checkable
class RawApplication(Protocol):
    """An `HTTPServerConnectionDelegate` that answers some requests by itself."""

    def start_raw_request(self, request: Request) -> RawDelegate | None:
        """Take the request, or return None to have it go the Tornado way.

        An exception is logged and answered with 500.
        """


ANSWERED = RawDelegate()
"""For `start_raw_request` to return after it has responded."""


class Body:
    """The body of a request while it comes in: what is due, and what is not yet taken."""

    __slots__ = ("deadline", "expects", "held", "length", "limit", "seconds", "size")

    def __init__(self, length: int | None, expects: bool, limits: Limits) -> None:
        self.length = length  # None: chunked
        self.expects = expects  # a 100-continue that was not sent yet
        self.limit = limits.body_bytes
        self.seconds = limits.body_seconds
        self.size = 0  # received so far, taken or not
        self.held: bytes | bytearray = b""
        self.deadline = inf  # set when the body is asked for

    def add(self, chunk: bytes) -> None:
        """Hold a piece. Amortised O(len(chunk)); a body in one piece isn't copied."""
        if not self.held:
            self.held = chunk
        elif type(self.held) is bytearray:
            self.held += chunk
        else:
            self.held = bytearray(self.held)
            self.held += chunk

    def take(self) -> bytes:
        """Return what is held, and hold it no more."""
        held, self.held = self.held, b""
        return held if type(held) is bytes else bytes(held)


class Request:
    """A request whose headers are complete.

    `method` and `target` are as sent (the target in origin form, `*`, or the
    authority for CONNECT). What an application knows of the header lines, which clients
    send again and again, it may leave in `section`.
    """

    __slots__ = (
        "_connection",
        "answered",
        "body",
        "delegate",
        "exchange",
        "http10",
        "keep_alive",
        "method",
        "received",
        "section",
        "target",
        "upgrade",
    )

    def __init__(
        self,
        connection: RequestReader,
        method: bytes,
        target: bytes,
        section: HeaderSection,
        keep_alive: bool,
    ) -> None:
        self._connection: RequestReader | None = connection
        self.method = method
        self.target = target
        self.section = section
        self.keep_alive = keep_alive
        self.http10 = False
        self.upgrade = False
        self.received = False
        self.answered = False
        self.body: Body | None = None
        self.delegate: RawDelegate | None = None
        self.exchange: Exchange | None = None

    # What applications use.

    def respond(self, response: bytes, *, close: bool = False) -> bool:
        """Send the whole answer: status line, headers, `Content-Length`, body. False if the peer is gone.

        The response must carry no `Connection` header: the server puts one in where it
        is due, and cuts off the body if the method is HEAD. If `close`, the connection
        ends with this answer. Once the peer is gone nothing is sent. O(size).

        The next pipelined request is never started from inside this call, unless it
        is made inside a call of the server.

        :raises RuntimeError: if the request was answered already.
        """
        if self.answered:
            raise RuntimeError("this request has been answered")
        connection = self._connection
        if connection is None:
            return False
        self.answered = True
        connection.answer(self, response, close)
        return True

    @property
    def headers(self) -> Headers:
        """In order, names in lower case, values without the white space around them."""
        return self.section.lines

    @property
    def closed(self) -> bool:
        """Whether no answer can reach the peer any more, or one has been given."""
        return self._connection is None or self.answered

    @property
    def peer(self) -> Peer | None:
        """The other end, by the headers of a trusted proxy if there is one; None when closed."""
        return None if self._connection is None else self._connection.peer_of(self)

    @property
    def turns(self) -> Turns | None:
        """Where work that takes long may wait for its next slice of time; None when closed."""
        return None if self._connection is None else self._connection.server.turns

    @property
    def content_length(self) -> int | None:
        """What the request announces: 0 without a body, None if it is chunked."""
        return 0 if self.body is None else self.body.length

    def header(self, name: bytes) -> bytes | None:
        """Return the first value of a header, `name` in lower case. O(headers)."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    def set_max_body_size(self, size: int) -> None:
        """Let this request's body be of up to `size` bytes. Before the body comes."""
        if self.body is not None:
            self.body.limit = size

    # What the connection uses.

    def waits(self) -> bool:
        """Whether the body is held back because its taker is not there or not ready."""
        if self.exchange is not None:
            return self.exchange.waits()
        return self.delegate is None

    def limited(self) -> bool:
        """Whether the body limit is final: the application has had its chance to set it."""
        return self.answered or self.delegate is not None or not self.waits()

    def held_bytes(self) -> int:
        """Return how much of the body is held."""
        return 0 if self.body is None else len(self.body.held)

    def release(self) -> None:
        """Let go of everything that could hold this request in a cycle."""
        self._connection = None
        self.delegate = None
        self.exchange = None
