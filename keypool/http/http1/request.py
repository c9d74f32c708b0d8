"""One request, from its headers to its answer, and the cheap way to answer it.

The reader makes a `Request`, and the connection queues it. An application that works on bytes may take it raw, without
any of Tornado's objects::

    class Fast(tornado.web.Application):
        def start_raw_request(self, request: Request) -> RawDelegate | None:
            if request.target != b"/ping":
                return None              # leave it to Tornado's interfaces
            request.respond(PONG)        # or keep it, and respond later
            return ANSWERED

The method is called first, once for each request, when the headers are in and all earlier requests of the connection
are answered. It returns None to leave the request to `start_request`, or a `RawDelegate`, which gets the whole body in
one piece, or a call of `hung_up` if the peer disconnects before the answer.

No future, task or `HTTPHeaders` is made for a raw request, and it is freed by reference count alone: the connection
drops its references to the request and the delegate as soon as the request is answered.
"""

from __future__ import annotations

from math import inf
from socket import AF_INET, AF_INET6
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from keypool.config.limits import Limits
from keypool.config.proxies import TrustedProxies
from keypool.http.http1.responses import Headers
from keypool.http.http1.section import VARYING, HeaderSection

if TYPE_CHECKING:
    from keypool.http.http1.connection import Connection
    from keypool.http.http1.exchange import Exchange


class Peer:
    """The other end of a connection, or the caller of one request that a trusted proxy has forwarded.

    Tornado takes `remote_ip`, an IP address as text, and `protocol`, http or https, from an object like this one.
    Tornado itself rewrites one object before each request and restores it afterwards. Here a forwarded request gets a
    new object, so that code that reads it late never sees another request's address. Which proxy is trusted is decided
    by `keypool.config.proxies`.
    """

    __slots__ = ("address", "address_family", "protocol", "proxies", "remote_ip")

    def __init__(self, address: object, trusted: TrustedProxies | None = None) -> None:
        self.address = address
        is_ip = isinstance(address, tuple) and len(address) >= 2
        self.address_family = (AF_INET6 if len(address) == 4 else AF_INET) if is_ip else None  # type: ignore[arg-type]
        self.remote_ip = str(address[0]) if is_ip else "0.0.0.0"  # type: ignore[index] # noqa: S104
        self.protocol = "http"  # this server speaks no TLS
        self.proxies = trusted if trusted is not None and self.remote_ip in trusted else None
        """None unless this is a trusted proxy, whose headers name the caller."""

    def __str__(self) -> str:
        return self.remote_ip

    def caller(self, headers: Headers) -> Peer:
        """The peer itself or, if it is a trusted proxy, the caller that the headers name. O(headers)."""
        if self.proxies is None:
            return self
        caller = Peer(self.address)
        caller.remote_ip, caller.protocol = self.proxies.caller(
            self.remote_ip,
            self.protocol,
            _value(headers, b"x-forwarded-for"),
            _value(headers, b"x-forwarded-proto"),
        )
        return caller


def _value(headers: Headers, name: bytes) -> str:
    return b",".join(value for key, value in headers if key == name).decode("latin-1")


class RawDelegate:
    """Receives what follows the headers of a raw request. No method is called after the request was answered."""

    __slots__ = ()

    def run(self, body: bytes) -> None:
        """Take the whole body, `b""` if there is none. Called once, in order."""

    def too_large(self) -> None:
        """The body is over its limit. If this doesn't respond, the server does, and ends the connection."""

    def hung_up(self) -> None:
        """The peer has disconnected or half-closed, or was refused: no answer can reach it."""


@runtime_checkable
class RawApplication(Protocol):
    """An `HTTPServerConnectionDelegate` that answers some requests by itself."""

    def start_raw_request(self, request: Request) -> RawDelegate | None:
        """Take the request, or return None to leave it to Tornado's interfaces.

        An exception is logged and answered with 500.
        """


ANSWERED = RawDelegate()
"""For `start_raw_request` to return after it has responded."""


class Body:
    """The body of a request while it comes in: its framing and limits, and the bytes that aren't handed over yet."""

    __slots__ = ("deadline", "expects", "held", "length", "limit", "size")

    def __init__(self, length: int | None, expects: bool, limits: Limits) -> None:
        self.length = length  # None: chunked
        self.expects = expects  # whether a 100 Continue is due and not sent yet
        self.limit = limits.body_bytes
        self.size = 0  # bytes received so far, handed over or not
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

    `method` and `target` are as sent (the target in origin form, `*`, or the authority for CONNECT). `connection` is
    None once no answer can reach the peer any more, or the answer is complete. In `section` an application may cache
    results that depend on the header lines only, which clients send again and again; `varying` is the value of the
    header that isn't among them, or None.
    """

    __slots__ = (
        "answered",
        "body",
        "connection",
        "delegate",
        "exchange",
        "http10",
        "keep_alive",
        "method",
        "received",
        "section",
        "target",
        "upgrade",
        "varying",
    )

    def __init__(
        self,
        connection: Connection,
        method: bytes,
        target: bytes,
        section: HeaderSection,
        keep_alive: bool,
    ) -> None:
        self.connection: Connection | None = connection
        self.method = method
        self.target = target
        self.section = section
        self.keep_alive = keep_alive
        self.varying: bytes | None = None
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

        The response must not have a `Connection` header: the server adds it where it is due, and removes the body if
        the method is HEAD. If `close`, the connection ends with this answer. O(size).

        The next pipelined request is never started from inside this call, unless the server is calling.

        :raises RuntimeError: if the request was answered already.
        """
        if self.answered:
            raise RuntimeError("this request has been answered")
        connection = self.connection
        if connection is None:
            return False
        connection.answer(self, response, close)
        return True

    @property
    def headers(self) -> Headers:
        """The header lines in order, names in lower case, values without surrounding white space."""
        lines = self.section.lines
        return lines if self.varying is None else (*lines, (VARYING, self.varying))

    @property
    def closed(self) -> bool:
        """Whether the request was answered, or no answer can reach the peer any more."""
        return self.connection is None or self.answered

    @property
    def peer(self) -> Peer | None:
        """The other end, or the caller that a trusted proxy names; None when closed."""
        return None if self.connection is None else self.connection.peer.caller(self.headers)

    @property
    def content_length(self) -> int | None:
        """The length of the body in bytes: 0 without a body, None if it is chunked."""
        return 0 if self.body is None else self.body.length

    def header(self, name: bytes) -> bytes | None:
        """Return the first value of a header, `name` in lower case. O(headers)."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    def set_max_body_size(self, size: int) -> None:
        """Set this request's body limit, in bytes. Call it in `start_raw_request`."""
        if self.body is not None:
            self.body.limit = size

    # What the connection uses.

    def waits(self) -> bool:
        """Whether the body is held back because there is no delegate yet, or it isn't ready for more."""
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
        """Drop all references that could hold this request in a cycle."""
        self.connection = None
        self.delegate = None
        self.exchange = None
