"""From bytes to requests: feeds the parser in pieces, and applies this server's own rules to what it accepts.

`RequestReader` has no transport and no loop: it is given bytes, and calls its `RequestSink`, the connection. llhttp,
through httptools, checks the grammar strictly; no leniency is ever switched on. Refused here, although llhttp accepts
it: a missing or repeated Host, a coding other than chunked, HTTP/0.9 and 2.0, a target that isn't in origin form (an
absolute form is accepted if it names the Host), and more than `Limits` allow.

httptools has four traits that shape this module:

- Only an exception in a callback stops it. So bytes go in by pieces of 8 KiB, and a read of many pipelined requests is
  not parsed further than needed.
- It doesn't report where in a piece a message begins or ends, nor the first line as it came: neither the protocol's
  name nor a method that it doesn't know. So a piece is cut into steps where a message may end, and every message begins
  with a step of its own. The first line is taken from that step, and so is a header section that is in the cache, which
  then needs no parser. No byte is given to both, or to one of them twice.
- It puts split header lines together without a bound. So the bytes of a head are counted as they go in, not only as
  headers come out.
- After a request with `Connection: Upgrade` it stops even if a body follows. Such a body is read by a new parser that
  is given its framing. If the body were read as the next request, a peer could smuggle one in it.

States of a reader:

    READING   parses; the next bytes belong to a request
    HOLDING   an upgrade request is in: what follows may be another protocol, and isn't parsed
    STOPPED   no further request is wanted: bytes are ignored

    READING --(end of an upgrade request)--> HOLDING
    HOLDING --(the request was answered as HTTP: `go_on`)--> READING
    READING --(end of the last request, by its Connection header)--> STOPPED
    any     --(`stop`: refused, closing, gone)--> STOPPED
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Protocol, cast

import httptools
from tornado.log import app_log

from keypool.config.limits import MAX_NAME, Limits
from keypool.http.http1.request import Body, Request
from keypool.http.http1.responses import Refusal, Refused
from keypool.http.http1.rules import FRAMING, body_of, check_head, check_size, is_host, protocol_of
from keypool.http.http1.section import (
    REQUEST_LINE,
    HeaderSection,
    Sections,
    cut_varying,
    split_varying,
)

if TYPE_CHECKING:
    from keypool.http.http1.connection import Connection

PIECE = 8 * 1024

READING, HOLDING, STOPPED = 0, 1, 2

_TOKEN = re.compile(rb"[\r\n]*[!#$%&'*+.^_`|~0-9A-Za-z-]")


class Stop(Exception):
    """Raised inside a parser callback to stop at this byte, with nothing to answer."""


class RequestSink(Protocol):
    """Receives a reader's calls, always in the order of the bytes."""

    def request_started(self, request: Request) -> None:
        """The headers of a request are in."""

    def advance(self, request: Request) -> None:
        """The request is complete: `request.received` is set."""

    def refuse(self, refusal: Refusal) -> None:
        """The request isn't acceptable. The sink must stop the reader."""

    def too_large(self, request: Request) -> bool:
        """The body is over its limit; returns whether the application has answered."""


class RequestReader:
    """Parses one connection's bytes."""

    __slots__ = (
        "_at_start",
        "_begun",
        "_carry",
        "_count",
        "_framing",
        "_head",
        "_headers",
        "_hosts",
        "_limits",
        "_parser",
        "_section",
        "_sections",
        "_sink",
        "_tail",
        "incoming",
        "keeps_alive",
        "piece",
        "state",
        "target",
    )

    def __init__(self, sink: RequestSink, limits: Limits, sections: Sections, *, keeps_alive: bool) -> None:
        self.state = READING
        self.incoming: Request | None = None  # a request whose headers have come, and its end hasn't
        # With this bound, a head that comes in one piece can't be too large.
        self.piece = min(PIECE, limits.head_bytes)
        self.keeps_alive = keeps_alive
        self._sink = sink
        self._limits = limits
        self._sections = sections
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self._carry = 0  # bytes fed since the last header section or piece of a body came out, at most
        self._count = 0  # requests read
        self.target = b""  # what has come of it, until its head is complete
        self._headers: list[tuple[bytes, bytes]] = []
        self._hosts = 0
        self._framing: dict[bytes, bytes] = {}
        self._section = HeaderSection(())  # of the latest request
        self._begun = False  # a part of a request has come, and its end hasn't
        self._at_start = True  # a request may begin in the step that is being parsed
        self._head = b""  # from the start of the request to the end of its first line, at least
        self._tail = b""  # the last three bytes of what has come of a request

    @property
    def begun(self) -> bool:
        """Whether a part of a request has come, and its end hasn't."""
        return self._begun

    def unfinished(self) -> int:
        """Bytes that are held of the request that is coming in, about. O(1)."""
        return self._carry + (0 if self.incoming is None else self.incoming.held_bytes())

    def go_on(self) -> None:
        """Continue reading after an upgrade request that was answered as HTTP."""
        if self.state == HOLDING:
            self.state = READING

    def stop(self) -> None:
        """Parse no more. Breaks the reference cycle with the parser."""
        self._parser = None
        self.incoming = None
        self.target = self._head = b""
        self._begun = False
        self.state = STOPPED

    # Feeding.

    def try_cached(self, data: bytes, start: int = 0) -> int:
        """Read the request at `start` without the parser, if it is complete and its header section is in the cache.

        Returns where the request ends, or `start` if it has to be parsed. O(its length), at a tenth of the parser's
        cost.
        """
        line = None if self._begun else REQUEST_LINE.match(data, start)
        if line is None:
            return start
        lines = line.end()
        body = data.find(b"\r\n\r\n", lines - 2) + 4  # from -2: there may be no header lines
        section, varying = self._sections.lookup(data[lines:body]), None
        if section is None:
            rest, varying = cut_varying(data, lines, body)
            section = None if varying is None else self._sections.lookup(rest)
        if section is None or not self.keeps_alive:
            return start
        length = section.length
        if length is None or (end := body + length) > len(data):
            return start
        sink = self._sink
        # A cast would take 0.1 µs.
        request = Request(sink, line[1], line[2], section, True)  # type: ignore[arg-type]
        request.varying = varying
        request.received = True
        if length:
            request.body = Body(length, False, self._limits)
            request.body.add(data[body:end])
            request.body.size = length
        self._count += 1
        sink.request_started(request)
        sink.advance(request)
        return end

    def feed(self, piece: bytes | memoryview, at: int = 0) -> int:
        """Read a piece from `at` on, and return where the consumed part ends. O(len(piece)).

        All of it is consumed, except what follows an upgrade request. Neither the parser nor `try_cached` is given a
        byte again.
        """
        if self._due() > len(piece):
            return self._parse(piece)
        data = bytes(piece)
        start, count, tried = -1, self._count, False
        while at < len(data) and self.state == READING:
            if not self._begun:
                start, count = at, self._count
            step = data[at : self._next_cut(data, at)]
            if self.incoming is None:
                self._keep_line(step)
            at += self._parse(step)
            if self._begun:
                self._account(step)
                continue
            if not start and self._count == count + 1 and self._section.length is not None:
                self._sections.store(data[:at], self._section)
            if not tried:
                tried = True  # where one lookup fails, the next ones hardly succeed
                while at < len(data) and self.state == READING and (end := self.try_cached(data, at)) > at:
                    at = end
        return at if self.state <= HOLDING else len(data)

    def _due(self) -> int:
        """Bytes of a body of known length that are still to come."""
        body = None if self.incoming is None else self.incoming.body
        return 0 if body is None or body.length is None else body.length - body.size

    def _next_cut(self, data: bytes, start: int) -> int:
        """Where the parser has to stop: no later than at the end of the current message.

        A head ends with an empty line, and so does a chunked body, after its trailers. An empty line inside chunked
        data only makes one more cut, which does no harm.
        """
        if due := self._due():
            return start + due
        if self._tail and not start:  # else `start` is a cut, and no empty line spans it
            seam = (self._tail + data[:3]).find(b"\r\n\r\n")
            if seam >= 0:
                return seam + 4 - len(self._tail)
        end = data.find(b"\r\n\r\n", start)
        return len(data) if end < 0 else end + 4

    def _keep_line(self, step: bytes) -> None:
        """Keep a head's bytes until its first line is complete, as llhttp doesn't report all of that."""
        self._at_start = not self._begun
        if self._at_start:
            self._head = step
        elif b"\n" not in self._head.lstrip(b"\r\n"):
            self._head += step

    def _parse(self, step: bytes | memoryview) -> int:
        """Feed the parser with bytes of one message at most; return how many it consumed."""
        parser = self._parser
        if parser is None:
            return len(step)
        try:
            parser.feed_data(step)
        except httptools.HttpParserUpgrade as upgrade:
            self._read_upgraded_body()
            return cast(int, upgrade.args[0])
        except httptools.HttpParserInvalidMethodError:
            self._broken(None, self._unknown_method())
        except httptools.HttpParserCallbackError as error:
            self._broken(error, error.__context__)
        except httptools.HttpParserError as error:
            self._broken(error, None)
        return len(step)

    def _account(self, step: bytes) -> None:
        """Keep what may begin an empty line, and bound the bytes of a head."""
        self._tail = (self._tail + step[-3:])[-3:]
        self._carry += len(step)
        # The bound is exact when the head is complete; the lines that check_size doesn't count need the slack.
        if self._carry > self._limits.head_bytes + 2 * PIECE and self.state == READING:
            self._sink.refuse(self.refusal(431, "headers-too-large", "the headers are too large"))

    def refusal(self, status: int, code: str, detail: str) -> Refusal:
        """Describe a refusal of the request that is being read. O(1)."""
        request, parser = self.incoming, self._parser
        if request is not None:
            return Refusal(status, code, detail, request.method, request.target, request.headers, True)
        if not self.target or parser is None:
            return Refusal(status, code, detail)
        return Refusal(status, code, detail, parser.get_method(), self.target, self._headers)

    def _broken(self, error: httptools.HttpParserError | None, cause: BaseException | None) -> None:
        if self.state > HOLDING or isinstance(cause, Stop):
            return  # bytes after the last request get no answer
        if isinstance(cause, Refused):
            self._sink.refuse(self.refusal(cause.status, cause.code, cause.detail))
        elif cause is None:
            self._sink.refuse(self.refusal(400, "bad-request", str(error)))
        elif not isinstance(cause, Exception):
            raise cause
        else:
            app_log.error("Uncaught exception", exc_info=cause)
            self._sink.refuse(self.refusal(500, "internal", "the server failed"))

    def _unknown_method(self) -> Refused:
        # The parser stops at the first wrong byte, and how much has come behind that is by chance. The first byte of
        # the request decides, so that the answer doesn't depend on it.
        if _TOKEN.match(self._head):
            return Refused(501, "not-implemented", "the method is not known")
        return Refused(400, "bad-request", "this is not an HTTP request")

    def _read_upgraded_body(self) -> None:
        request = self.incoming
        if request is None or request.body is None:
            return
        length = request.body.length
        framing = b"Transfer-Encoding: chunked" if length is None else b"Content-Length: %d" % length
        self._parser = httptools.HttpRequestParser(self)
        self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n\r\n" % framing)

    # Callbacks of the parser. While `incoming` is set, headers are trailers or those that `_read_upgraded_body` has
    # made up, and are dropped.

    def on_message_begin(self) -> None:
        """Note that the bytes of a request have begun.

        :raises Refused: if others have ended in the same step, which `_next_cut` rules out.
        """
        if not self._at_start and self.incoming is None:
            raise Refused(400, "bad-request", "the end of the request before is in doubt")
        self._at_start = False
        self._begun = True
        self._tail = b""

    def on_url(self, url: bytes) -> None:
        """Take a piece of the target."""
        if self.incoming is not None:
            return
        if self.state:
            raise Stop
        self.target = self.target + url if self.target else url
        if len(self.target) > self._limits.head_bytes:
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
                raise Refused(400, "bad-request", "the Host header isn't a valid host")
        elif name in FRAMING:
            if name in self._framing:
                raise Refused(400, "bad-request", f"more than one {name.decode()} header")
            self._framing[name] = self._headers[-1][1]

    def on_headers_complete(self) -> None:
        """Make the request, and start it."""
        parser = self._parser
        if self.incoming is not None or parser is None:
            return
        target = self.target
        lines, varying = split_varying(self._headers)
        section = self._section = self._sections.of(lines)
        request = Request(
            cast("Connection", self._sink),
            parser.get_method(),
            target,
            section,
            parser.should_keep_alive(),
        )
        request.varying = varying
        line_end = self._head.find(b"\r\n")
        if (
            self._hosts != 1
            or self._framing
            or self._carry
            or not target.startswith(b"/")
            or b"#" in target
            or len(self._headers) > self._limits.header_count
            or parser.should_upgrade()
            or self._head[line_end - 9 : line_end] != b" HTTP/1.1"
        ):
            self._examine(request, parser)
        if request.keep_alive and not request.http10 and not parser.should_upgrade():
            section.length = _plain_length(request.body)
        request.keep_alive = request.keep_alive and self.keeps_alive
        self.target = self._head = b""
        self._headers = []
        self._hosts = self._carry = 0
        self._count += 1
        self.incoming = request
        self._sink.request_started(request)

    def on_body(self, chunk: bytes) -> None:
        """Take a piece of the body; count it, and drop it if the request was answered."""
        request = self.incoming
        self._carry = 0
        if request is None or request.body is None:
            return
        body = request.body
        body.size += len(chunk)
        if (
            body.size > body.limit
            and request.limited()
            and (request.answered or not self._sink.too_large(request))
        ):
            raise Refused(413, "payload-too-large", f"the body is larger than {body.limit} bytes")
        if not request.answered:
            body.add(chunk)

    def on_message_complete(self) -> None:
        """Take the end of a request."""
        request = self.incoming
        if request is None:
            return
        if request.body is not None and self._parser is not None and self._parser.should_upgrade():
            return  # llhttp stops here; the body is still to come
        if self.state == READING and request.upgrade:
            self.state = HOLDING
        elif self.state == READING and not request.keep_alive:
            self.state = STOPPED
        self.incoming = None
        self._begun = False
        request.received = True
        self._sink.advance(request)

    def _examine(self, request: Request, parser: httptools.HttpRequestParser) -> None:
        """Make the checks that only unusual requests need: those with a body, an odd target, a large head…"""
        framing, self._framing = self._framing, {}
        if self._carry:
            check_size(request, self._limits)
        check_head(request, self._hosts, protocol_of(self._head), self._limits)
        request.body = body_of(request, framing, self._limits)
        # RFC 9110, 7.8: in HTTP/1.0 the header means nothing.
        request.upgrade = request.body is None and not request.http10 and parser.should_upgrade()


def _plain_length(body: Body | None) -> int | None:
    """The length of a body that follows its head unasked, 0 without a body; None if it is chunked or too large."""
    if body is None:
        return 0
    return None if body.expects or body.length is None or body.length > body.limit else body.length
