"""From bytes to requests: the parser, fed in pieces, and what a request may look like.

`RequestReader` is the half of a connection that reads. llhttp, through httptools, does
the grammar, strictly; no leniency is ever switched on. What it lets through and this
server does not is refused here: no or several Host, a coding other than chunked,
HTTP/0.9 and 2.0, a target that is no origin form (an absolute form is taken if it
names the Host), more than `Limits` allow.

httptools has three traits that shape this module:

- It can't be stopped but by an exception in a callback. So bytes go in by pieces of
  8 KiB, and one read of many pipelined requests is not parsed further than is wanted.
- It puts split header lines together without a bound. So the bytes of a head are
  counted as they go in, not only as headers come out.
- After a request with `Connection: Upgrade` it stops even if a body follows. Such a
  body is read by a new parser that is told its framing; were the rest taken for the
  next request, a body could smuggle one.

What becomes of requests is the business of the subclass, `Connection`.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, cast

import httptools
from tornado.log import app_log

from keypool.http1.link import DEAF, HOLDING, READING, Link
from keypool.http1.peer import Peer
from keypool.http1.request import Body, Request
from keypool.http1.responses import Refusal, Refused
from keypool.http1.rules import FRAMING, SLASH, body_of, check_head, check_size, is_host
from keypool.http1.section import REQUEST_LINE, HeaderSection
from keypool.limits import MAX_NAME

if TYPE_CHECKING:
    from keypool.http1.server import Server

PIECE = 8 * 1024

_METHOD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ")


class Stop(Exception):
    """Raised inside a parser callback to stop at this byte, with nothing to answer."""


class RequestReader(Link):
    """Parses one connection's bytes; calls `request_*` and `refuse` as it goes."""

    __slots__ = (
        "_alias",
        "_begun",
        "_carry",
        "_count",
        "_framing",
        "_headers",
        "_hosts",
        "_in_head",
        "_section",
        "_target",
        "incoming",
        "keeps_alive",
        "parser",
        "piece",
    )

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(server, loop)
        self.parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self.incoming: Request | None = None  # its headers are in, its end is not
        # A head that comes in one piece needs no counting: it can't be too large.
        self.piece = min(PIECE, self.limits.head_bytes)
        self.keeps_alive = not server.no_keep_alive
        self._alias = b""
        self._carry = 0  # bytes that went in since something came out, an upper bound
        self._count = 0
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._hosts = 0
        self._framing: dict[bytes, bytes] = {}
        self._section: HeaderSection  # of the latest request
        self._in_head = True  # a connection's first head has its time from the opening
        self._begun = False  # a request has, and its end hasn't come

    # For the subclass.

    def request_started(self, request: Request) -> None:
        """Take a request whose headers are in."""
        raise NotImplementedError

    def request_received(self, request: Request) -> None:
        """Take the end of a request."""
        raise NotImplementedError

    def refuse(self, refusal: Refusal) -> None:
        """Answer what is no acceptable request; nothing more will be read."""
        raise NotImplementedError

    def too_large(self, request: Request) -> bool:
        """Let the application answer a request whose body is too large; whether it has."""
        raise NotImplementedError

    def answer(self, request: Request, response: bytes, close: bool) -> None:
        """Send a whole response."""
        raise NotImplementedError

    def peer_of(self, request: Request) -> Peer:
        """Return whom a request comes from."""
        raise NotImplementedError

    # Feeding.

    def recognise(self, data: bytes) -> bool:
        """Take a whole request whose header section was read before, past the parser; whether it was one.

        O(len(data)), a tenth of what the parser and its callbacks cost.
        """
        line = None if self._begun else REQUEST_LINE.match(data)
        if line is None:
            return False
        start = line.end()
        end = data.find(b"\r\n\r\n", start - 2) + 4
        section = self.server.sections.recall(data[start:end])
        if section is None or len(data) - end != section.length or not self.keeps_alive:
            return False
        request = Request(self, line[1], line[2], section, True)
        request.received = True
        if section.length:
            request.body = Body(section.length, False, self.limits)
            request.body.add(data[end:])
            request.body.size = section.length
        self._in_head = False
        self._count += 1
        self.request_started(request)
        self.request_received(request)
        return True

    def feed(self, piece: bytes | memoryview) -> int:
        """Parse a piece and return how much of it was consumed. O(len(piece)).

        Less than all of it is consumed only behind a request with an upgrade.
        """
        parser, count, begun = self.parser, self._count, self._begun
        if parser is None:
            return len(piece)
        try:
            parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            self._read_upgraded_body()
            return cast(int, upgrade.args[0])
        except httptools.HttpParserInvalidMethodError as error:
            if count != self._count or not self._alias_method(bytes(piece)):
                self._broken(error, None)
        except httptools.HttpParserCallbackError as error:
            self._broken(error, error.__context__)
        except httptools.HttpParserError as error:
            self._broken(error, None)
        if self._alias and parser is not self.parser:
            method = self._alias
            return self.feed(b"POST" + bytes(piece)[len(method) :]) - len(b"POST") + len(method)
        if self._begun:
            self._account(piece)
        elif not begun and self._count == count + 1 and self._section.length is not None:
            self.server.sections.remember(bytes(piece), self._section)
        return len(piece)

    def _account(self, piece: bytes | memoryview) -> None:
        """Bound the bytes of a head."""
        if self._target or self.incoming is not None:
            self._carry += len(piece)
            # The bound is exact when the head is complete; until then it must not hit a
            # head that came in one piece with something else, hence the slack.
            if self._carry > self.limits.head_bytes + 2 * PIECE and self.mode == READING:
                self.refuse(self.refusal(431, "headers-too-large", "the headers are too large"))

    def refusal(self, status: int, code: str, detail: str) -> Refusal:
        """Describe why what is being read is refused. O(1)."""
        request, parser = self.incoming, self.parser
        if request is not None:
            return Refusal(status, code, detail, request.method, request.target, request.headers, True)
        if not self._target or parser is None:
            return Refusal(status, code, detail)
        method = self._alias or parser.get_method()
        return Refusal(status, code, detail, method, self._target, self._headers)

    def deafen(self) -> None:
        """Parse no more."""
        self.parser = None
        self.incoming = None
        self._target = b""
        self._begun = False
        self.mode = max(self.mode, DEAF)

    def _broken(self, error: httptools.HttpParserError, cause: BaseException | None) -> None:
        if self.mode > HOLDING or isinstance(cause, Stop):
            return  # bytes behind the last request: nobody asked for an answer to them
        if isinstance(cause, Refused):
            self.refuse(self.refusal(cause.status, cause.code, cause.detail))
        elif cause is None:
            self.refuse(self.refusal(400, "bad-request", str(error)))
        elif not isinstance(cause, Exception):
            raise cause
        else:
            app_log.error("Uncaught exception", exc_info=cause)
            self.refuse(self.refusal(500, "internal", "the server failed"))

    def _alias_method(self, piece: bytes) -> bool:
        """Make ready to parse a method that llhttp does not know as POST; report if it is one.

        Only where the method comes in one piece with the space behind it, which is how
        clients send it; and only if it is truly unknown, as else this is no start of a
        request. The application is the one to say 405.
        """
        match = _METHOD.match(piece)
        if match is None or self.mode != READING:
            return False
        probe = httptools.HttpRequestParser(object())
        try:
            probe.feed_data(match[0])
        except httptools.HttpParserInvalidMethodError:
            self._alias = match[1]
            self.parser = httptools.HttpRequestParser(self)
            return True
        return False

    def _read_upgraded_body(self) -> None:
        request = self.incoming
        if request is None or request.body is None:
            return
        length = request.body.length
        framing = b"Transfer-Encoding: chunked" if length is None else b"Content-Length: %d" % length
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n\r\n" % framing)

    # Callbacks of the parser. While a request is coming in, headers are trailers, which
    # are dropped, or those that `_read_upgraded_body` made up.

    def on_message_begin(self) -> None:
        """Note that the bytes of a request have begun."""
        self._begun = True

    def on_url(self, url: bytes) -> None:
        """Take a piece of the target."""
        if self.incoming is not None:
            return
        if self.mode:
            raise Stop
        self._target = self._target + url if self._target else url
        if len(self._target) > self.limits.head_bytes:
            raise Refused(414, "uri-too-long", "the request target is too long")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header line."""
        if self.incoming is not None:
            return
        if len(name) > MAX_NAME:
            raise Refused(431, "headers-too-large", f"a header's name is longer than {MAX_NAME} bytes")
        name = name.lower()
        self._headers.append((name, value.rstrip(b" \t")))
        if name == b"host":
            self._hosts += 1
            if not is_host(value):
                raise Refused(400, "bad-request", "the Host header is no host")
        elif name in FRAMING:
            if name in self._framing:
                raise Refused(400, "bad-request", f"more than one {name.decode()} header")
            self._framing[name] = self._headers[-1][1]

    def on_headers_complete(self) -> None:
        """Make the request, and start it."""
        parser = self.parser
        if self.incoming is not None or parser is None:
            return
        target = self._target
        section = self._section = self.server.sections.of(self._headers)
        keep_alive = parser.should_keep_alive()
        request = Request(self, parser.get_method(), target, section, keep_alive and self.keeps_alive)
        if (
            self._hosts != 1
            or self._framing
            or self._carry
            or self._alias
            or target[0] != SLASH
            or b"#" in target
            or len(section.lines) > self.limits.header_count
            or parser.should_upgrade()
            or parser.get_http_version() != "1.1"
        ):
            self._examine(request, parser)
        if keep_alive and not request.http10 and not parser.should_upgrade():
            section.length = _plain_length(request.body)
        self._target = b""
        self._headers = []
        self._hosts = self._carry = 0
        self._in_head = False
        self._count += 1
        self.incoming = request
        self.request_started(request)

    def on_body(self, chunk: bytes) -> None:
        """Take a piece of the body; count it, and drop it if the answer is out."""
        request = self.incoming
        self._carry = 0
        if request is None or request.body is None:
            return
        body = request.body
        body.size += len(chunk)
        if body.size > body.limit and request.limited() and (request.answered or not self.too_large(request)):
            raise Refused(413, "payload-too-large", f"the body is larger than {body.limit} bytes")
        if not request.answered:
            body.add(chunk)

    def on_message_complete(self) -> None:
        """Take the end of a request."""
        request = self.incoming
        if request is None:
            return
        if request.body is not None and self.parser is not None and self.parser.should_upgrade():
            return  # llhttp stops here; the body is still to come
        if self.mode == READING and request.upgrade:
            self.mode = HOLDING
        elif self.mode == READING and not request.keep_alive:
            self.mode = DEAF
        self.incoming = None
        self._begun = False
        request.received = True
        self.request_received(request)

    def _examine(self, request: Request, parser: httptools.HttpRequestParser) -> None:
        """Do what only some requests need: those with a body, an odd target, a large head…"""
        if self._alias:
            request.method, self._alias = self._alias, b""
        framing, self._framing = self._framing, {}
        if self._carry:
            check_size(request, self.limits)
        check_head(request, self._hosts, parser.get_http_version(), self.limits)
        request.body = body_of(request, framing, self.limits)
        request.upgrade = request.body is None and parser.should_upgrade()


def _plain_length(body: Body | None) -> int | None:
    """The length of a body that comes right behind its head, None of one that may not."""
    if body is None:
        return 0
    return None if body.expects or body.length is None or body.length > body.limit else body.length
