"""Malformed requests of hostile or broken peers are refused, and no part of them is served."""

from __future__ import annotations

import asyncio
import time

import pytest
from tornado import web

from http1.harness import request, serve, turns, until
from keypool.config.limits import Limits
from keypool.http.http1 import ANSWERED, RawDelegate, Request
from keypool.http.http1.reader import PIECE, RequestReader
from keypool.http.http1.turns import QUANTUM

HOST = b"Host: localhost\r\n"
POST = b"POST / HTTP/1.1\r\n" + HOST
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\n" + HOST + b"\r\n"

# name: bytes. Each is followed by a smuggled request, which must never be served.
REFUSED: dict[str, bytes] = {
    "no HTTP at all": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/0.9 by name": b"GET / HTTP/0.9\r\n" + HOST + b"\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\n" + HOST + b"\r\n",
    "HTTP/2.0": b"GET / HTTP/2.0\r\n" + HOST + b"\r\n",
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "another protocol": b"GET / http/1.1\r\n" + HOST + b"\r\n",
    "ICE": b"GET / ICE/1.0\r\n" + HOST + b"\r\n",
    "ICE by its method": b"SOURCE / ICE/1.1\r\n" + HOST + b"\r\n",
    "RTSP": b"POST / RTSP/1.1\r\n" + HOST + b"\r\n",
    "RTSP behind empty lines": b"\r\n\r\nOPTIONS / RTSP/1.0\r\n" + HOST + b"\r\n",
    "RTSP by its method": b"PLAY / RTSP/1.1\r\n" + HOST + b"\r\n",
    "CONNECT without a target": b"CONNECT \r\n" + HOST + b"\r\n",
    "CONNECT without a port": b"CONNECT localhost HTTP/1.1\r\n" + HOST + b"\r\n",
    "CONNECT with a path": b"CONNECT / HTTP/1.1\r\n" + HOST + b"\r\n",
    "CONNECT with user information": b"CONNECT a@localhost:80 HTTP/1.1\r\n" + HOST + b"\r\n",
    "a broken version": b"GET / HTTP/1.1x\r\n" + HOST + b"\r\n",
    "no target": b"GET HTTP/1.1\r\n" + HOST + b"\r\n",
    "a target without slash": b"GET foo HTTP/1.1\r\n" + HOST + b"\r\n",
    "a fragment": b"GET /a#b HTTP/1.1\r\n" + HOST + b"\r\n",
    "a tab in the request line": b"GET /\tHTTP/1.1\r\n" + HOST + b"\r\n",
    "NUL in the target": b"GET /a\0b HTTP/1.1\r\n" + HOST + b"\r\n",
    "bytes above ASCII in the target": b"GET /\xe9 HTTP/1.1\r\n" + HOST + b"\r\n",
    "an asterisk with GET": b"GET * HTTP/1.1\r\n" + HOST + b"\r\n",
    "an absolute target elsewhere": b"GET http://other/ HTTP/1.1\r\n" + HOST + b"\r\n",
    "an absolute target of another scheme": b"GET ftp://localhost/ HTTP/1.1\r\n" + HOST + b"\r\n",
    "user information in an absolute target": b"GET http://a@localhost/ HTTP/1.1\r\n" + HOST + b"\r\n",
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n",
    "a space in Host": b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    "two hosts in one Host": b"GET / HTTP/1.1\r\nHost: localhost, other\r\n\r\n",
    "user information in Host": b"GET / HTTP/1.1\r\nHost: a@localhost\r\n\r\n",
    "a lone per cent sign in Host": b"GET / HTTP/1.1\r\nHost: 127.0.0.%\r\n\r\n",
    "a wrong escape in Host": b"GET / HTTP/1.1\r\nHost: %zz\r\n\r\n",
    "a name in brackets in Host": b"GET / HTTP/1.1\r\nHost: [hello]\r\n\r\n",
    "no address in brackets in Host": b"GET / HTTP/1.1\r\nHost: [1:2]\r\n\r\n",
    "a port that is no number in Host": b"GET / HTTP/1.1\r\nHost: localhost:http\r\n\r\n",
    "two Hosts that differ": b"GET / HTTP/1.1\r\n" + HOST + b"host: other\r\n\r\n",
    "two Hosts in HTTP/1.0": b"GET / HTTP/1.0\r\n" + HOST + HOST + b"\r\n",
    "bare LF behind the request line": b"GET / HTTP/1.1\n" + HOST + b"\r\n",
    "bare LF behind a header": b"GET / HTTP/1.1\r\nHost: localhost\n\r\n",
    "bare LF behind the headers": b"GET / HTTP/1.1\r\n" + HOST + b"\n",
    "bare CR behind the request line": b"GET / HTTP/1.1\r" + HOST + b"\r\n",
    "bare CR in a header": b"GET / HTTP/1.1\r\n" + HOST + b"A: b\rc\r\n\r\n",
    "NUL in a value": b"GET / HTTP/1.1\r\n" + HOST + b"A: b\0c\r\n\r\n",
    "a control character in a value": b"GET / HTTP/1.1\r\n" + HOST + b"A: b\x01c\r\n\r\n",
    "DEL in a value": b"GET / HTTP/1.1\r\n" + HOST + b"A: b\x7fc\r\n\r\n",
    "NUL in a name": b"GET / HTTP/1.1\r\n" + HOST + b"A\0: b\r\n\r\n",
    "a space behind a name": b"GET / HTTP/1.1\r\n" + HOST + b"A : b\r\n\r\n",
    "a space in a name": b"GET / HTTP/1.1\r\n" + HOST + b"A b: c\r\n\r\n",
    "a space before the first name": b"GET / HTTP/1.1\r\n " + HOST + b"\r\n",
    "an empty name": b"GET / HTTP/1.1\r\n" + HOST + b": b\r\n\r\n",
    "no colon": b"GET / HTTP/1.1\r\n" + HOST + b"Ab\r\n\r\n",
    "a separator in a name": b"GET / HTTP/1.1\r\n" + HOST + b"A(b): c\r\n\r\n",
    "bytes above ASCII in a name": b"GET / HTTP/1.1\r\n" + HOST + b"\xe9: c\r\n\r\n",
    "a folded header": b"GET / HTTP/1.1\r\n" + HOST + b"A: b\r\n c\r\n\r\n",
    "a folded header by tab": b"GET / HTTP/1.1\r\n" + HOST + b"A: b\r\n\tc\r\n\r\n",
    "length and coding": POST + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "coding and length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
    "two equal lengths": POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "a list of lengths": POST + b"Content-Length: 3, 3\r\n\r\nabc",
    "a signed length": POST + b"Content-Length: +3\r\n\r\nabc",
    "a negative length": POST + b"Content-Length: -3\r\n\r\nabc",
    "a hexadecimal length": POST + b"Content-Length: 0x3\r\n\r\nabc",
    "a length with a point": POST + b"Content-Length: 3.0\r\n\r\nabc",
    "a length with an underscore": POST + b"Content-Length: 1_0\r\n\r\nabc",
    "a length in two parts": POST + b"Content-Length: 3 3\r\n\r\nabc",
    "no length": POST + b"Content-Length:\r\n\r\nabc",
    "a length over 64 bits": POST + b"Content-Length: 99999999999999999999\r\n\r\nabc",
    "coding gzip": POST + b"Transfer-Encoding: gzip\r\n\r\n0\r\n\r\n",
    "coding identity": POST + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "coding gzip, chunked": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "coding chunked, gzip": POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "coding chunked, chunked": POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "two codings": POST + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": POST + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n0\r\n\r\n",
    "coding xchunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "coding chunked with a tab": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "an empty coding": POST + b"Transfer-Encoding:\r\n\r\n0\r\n\r\n",
    "chunked in HTTP/1.0": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk size with sign": CHUNKED + b"+3\r\nabc\r\n0\r\n\r\n",
    "a negative chunk size": CHUNKED + b"-3\r\nabc\r\n0\r\n\r\n",
    "a chunk size with prefix": CHUNKED + b"0x3\r\nabc\r\n0\r\n\r\n",
    "a space before a chunk size": CHUNKED + b" 3\r\nabc\r\n0\r\n\r\n",
    "a space behind a chunk size": CHUNKED + b"3 \r\nabc\r\n0\r\n\r\n",
    "no chunk size": CHUNKED + b"\r\nabc\r\n0\r\n\r\n",
    "a chunk size over 64 bits": CHUNKED + b"fffffffffffffffff\r\nabc\r\n0\r\n\r\n",
    "a chunk longer than its size": CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n",
    "bare LF behind a chunk size": CHUNKED + b"3\nabc\r\n0\r\n\r\n",
    "bare LF behind a chunk": CHUNKED + b"3\r\nabc\n0\r\n\r\n",
    "bare LF in a chunk extension": CHUNKED + b"3;a\nb\r\nabc\r\n0\r\n\r\n",
    "bare CR in a chunk extension": CHUNKED + b"3;a\rb\r\nabc\r\n0\r\n\r\n",
    "NUL in a chunk extension": CHUNKED + b"3;a\0\r\nabc\r\n0\r\n\r\n",
    "a nameless chunk extension": CHUNKED + b"3;;\r\nabc\r\n0\r\n\r\n",
    "bare LF behind a trailer": CHUNKED + b"0\r\nA: b\n\r\n",
    "a space behind a trailer's name": CHUNKED + b"0\r\nA : b\r\n\r\n",
    "a length in a trailer": CHUNKED + b"0\r\nContent-Length: 5\r\n\r\n",
    "a coding in a trailer": CHUNKED + b"0\r\nTransfer-Encoding: gzip\r\n\r\n",
}


class Application(web.Application):
    """Notes every request it is given, and answers it raw, or leaves it to a handler."""

    def __init__(self, raw: bool) -> None:
        class Any(web.RequestHandler):
            def get(self) -> None:
                assert self.request.uri is not None
                seen.append(self.request.uri)

            post = put = get

        super().__init__([("/.*", Any)], log_function=lambda handler: None)
        self.raw = raw
        self.seen = seen = list[str]()

    def start_raw_request(self, request: Request) -> RawDelegate | None:
        return Raw(self.seen, request) if self.raw else None


class Raw(RawDelegate):
    def __init__(self, seen: list[str], request: Request) -> None:
        self.seen = seen
        self.request = request

    def run(self, body: bytes) -> None:
        self.seen.append(self.request.target.decode())
        self.request.respond(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    def hung_up(self) -> None:
        pass


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "handler"])
@pytest.mark.parametrize("name", REFUSED)
async def test_malformed_requests_are_refused(name: str, raw: bool) -> None:
    """400 with Connection: close, an orderly end, and nothing served of the request or behind it."""
    application = Application(raw)
    async with serve("http1", application) as served:
        client = await served.connect()
        await client.send(REFUSED[name] + SMUGGLED)
        answer = await client.response()
        assert (answer.status, answer["connection"]) == (400, "close")
        assert await client.closed()
        assert application.seen == []


@pytest.mark.parametrize("name", REFUSED)
async def test_malformed_requests_behind_good_ones_are_refused_in_turn(name: str) -> None:
    """Behind good requests, these are answered first, byte by byte as well."""
    application = Application(raw=False)
    async with serve("http1", application) as served:
        client = await served.connect()
        await client.send(request("/1") + request("/2", body=b"abc"))
        for byte in REFUSED[name] + SMUGGLED:
            client.writer.write(bytes([byte]))
            await turns(1)
        for expected in (200, 200, 400):
            assert (await client.response()).status == expected
        assert await client.closed()
        assert application.seen == ["/1", "/2"]


# What Tornado's server refuses as well; it is more lenient with the others (a bare LF, equal
# lengths, an absolute target) or stricter (HTTP/1.0 with a coding).
@pytest.mark.parametrize(
    "name",
    [
        "no HTTP at all",
        "two Hosts",
        "no Host",
        "length and coding",
        "two lengths",
        "coding gzip, chunked",
        "a folded header",
        "a space behind a name",
        "NUL in a value",
        "a chunk size with prefix",
        "a chunk longer than its size",
    ],
)
async def test_both_servers_refuse_smuggling(kind: str, name: str) -> None:
    """The well-known ways of smuggling are 400 on either server."""
    application = Application(raw=False)
    async with serve(kind, application) as served:
        client = await served.connect()
        client.writer.write(REFUSED[name] + b"\r\n\r\n" + SMUGGLED)
        assert (await client.head())[0] == 400
        assert application.seen == []


@pytest.mark.parametrize(
    ("line", "target"),
    [
        (b"GET http://localhost/a?b HTTP/1.1", "/a?b"),
        (b"GET HTTP://LOCALHOST/a HTTP/1.1", "/a"),
        (b"GET https://localhost HTTP/1.1", "/"),
        (b"GET http://localhost?b HTTP/1.1", "/?b"),
        (b"GET //localhost/a HTTP/1.1", "//localhost/a"),
        (b"GET  /a  HTTP/1.1", "/a"),
        (b"\r\n\r\nGET /a HTTP/1.1", "/a"),
    ],
)
async def test_unusual_request_lines_are_understood(line: bytes, target: str) -> None:
    """An absolute target that names the Host is the path; empty lines before are ignored."""
    application = Application(raw=True)
    async with serve("http1", application) as served:
        client = await served.connect()
        await client.send(line + b"\r\n" + HOST + b"\r\n")
        assert (await client.response()).status == 200
        assert application.seen == [target]


ANSWER = b"HTTP/1.1 405 No\r\nContent-Length: 0\r\n\r\n"

# Methods that the parser doesn't know. Each is followed by a request, which must not be served.
UNKNOWN: dict[str, bytes] = {
    "a word": b"BREW / HTTP/1.1\r\n" + HOST + b"\r\n",
    "a known one in lower case": b"get / HTTP/1.1\r\n" + HOST + b"\r\n",
    "a known one and more": b"POSTS / HTTP/1.1\r\n" + HOST + b"\r\n",
    "the beginning of a known one": b"GE / HTTP/1.1\r\n" + HOST + b"\r\n",
    "behind an empty line": b"\r\n\r\nBREW / HTTP/1.1\r\n" + HOST + b"\r\n",
    "with a body": b"BREW / HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\n\r\nabc",
    "with a body that is a request": b"BREW / HTTP/1.1\r\n" + HOST + b"Content-Length: 50\r\n\r\n" + SMUGGLED,
}


@pytest.mark.parametrize("name", UNKNOWN)
async def test_an_unknown_method_is_501_and_ends_the_connection(name: str) -> None:
    """A bare answer, the same however the bytes are cut, first on a connection or behind other requests."""
    data = UNKNOWN[name] + SMUGGLED
    application = Application(raw=True)
    async with serve("http1", application) as served:
        for before in (
            b"",
            request("/1"),
            request("/1", body=b"abc"),
            POST + b"Content-Length: 3\r\n\r\nGET",
        ):
            for step in (1, 2, 3, 7, len(data)):
                client = await served.connect()
                await client.send(before)
                if before:
                    assert (await client.response()).status == 200
                await client.dribble(*(data[i : i + step] for i in range(0, len(data), step)))
                answer = await client.response()
                assert (answer.status, answer.body, answer["connection"]) == (501, b"", "close")
                assert await client.closed()
            client = await served.connect()
            await client.send(before + data)
            received = await client.ended()
            assert received.count(b"HTTP/1.1 ") == (2 if before else 1)
            assert b"HTTP/1.1 501 Not Implemented\r\n" in received
    assert "/smuggled" not in application.seen


async def test_the_bytes_of_a_body_never_become_a_request() -> None:
    """Not even if they begin like a request with an unknown method, and another such request follows."""
    application = Application(raw=True)
    body = b"A / HTTP/1.1\r\n" + HOST + b"\r\n" + SMUGGLED
    sized = POST + b"Content-Length: %d\r\n\r\n" % len(body)
    async with serve("http1", application) as served:
        for head, rest in (
            (sized, body),
            (CHUNKED + b"%x\r\n" % len(body), body + b"\r\n0\r\n\r\n"),
            (sized[: -len(b"\r\n\r\n")], b"\r\n\r\n" + body),
            (b"", sized.replace(b"\r\nHost", b"\r\nX: " + 9000 * b"y" + b"\r\nHost") + body),
        ):
            client = await served.connect()
            await client.dribble(head, rest + b"FOO / HTTP/1.1\r\n" + HOST + b"\r\n")
            assert (await client.response()).status == 200
            assert (await client.response()).status == 501
            assert await client.closed()
        assert application.seen == ["/"] * 4


@pytest.mark.parametrize(
    "line", ["Connection: close, keep-alive", "Connection: keep-alive\r\nConnection: CLOSE", "A: keep-alive"]
)
async def test_http10_ends_with_its_answer_unless_it_is_clear(line: str) -> None:
    """Whatever else the client lists, `close` decides (RFC 9112, 9.3)."""
    application = Application(raw=True)
    async with serve("http1", application) as served:
        client = await served.connect()
        await client.send(request("/1", line).replace(b"HTTP/1.1", b"HTTP/1.0") + SMUGGLED)
        assert (await client.response()).status == 200
        assert await client.closed()
        assert application.seen == ["/1"]


@pytest.mark.parametrize(
    "host", ["", "a_b.c:80", "%41", "[::1]:8888", "[::ffff:127.0.0.1]", "[v1.a:b]", "a:"]
)
async def test_unusual_hosts_are_hosts(host: str) -> None:
    """All that RFC 3986 calls a host, with a port or without."""
    async with serve("http1", Application(raw=True)) as served:
        client = await served.connect()
        await client.send(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert (await client.response()).status == 200


@pytest.mark.parametrize("line", ["OPTIONS *", "CONNECT example.org:443"])
async def test_other_forms_of_target_reach_the_application(line: str) -> None:
    """OPTIONS for the server, and CONNECT, are the application's to refuse. Nothing is read behind a CONNECT."""
    seen: list[tuple[bytes, bytes]] = []

    class Asked(Application):
        def start_raw_request(self, request: Request) -> RawDelegate | None:
            seen.append((request.method, request.target))
            request.respond(ANSWER)
            return ANSWERED

    method, target = line.split()
    async with serve("http1", Asked(raw=True)) as served:
        client = await served.connect()
        await client.send(request(target, method=method) + request("/next"))
        received = await (
            client.ended() if method == "CONNECT" else client.reader.readexactly(2 * len(ANSWER))
        )
        assert received.count(b"HTTP/1.1 405 No") == len(seen)
        assert seen[0] == (method.encode(), target.encode())
        assert [target for _, target in seen[1:]] == ([] if method == "CONNECT" else [b"/next"])


async def test_trailers_are_dropped() -> None:
    """They are read, but don't become headers of this request, or of the next."""
    heads = []

    class Asked(Application):
        def start_raw_request(self, request: Request) -> RawDelegate | None:
            heads.append(request.headers)
            return super().start_raw_request(request)

    async with serve("http1", Asked(raw=True)) as served:
        client = await served.connect()
        trailed = CHUNKED + b'3;a=b;c="d"\r\nabc\r\n0\r\nX-One: 1\r\nHost: other\r\nX-Two: 2\r\n\r\n'
        await client.send(trailed + request("/next"))
        for _ in range(2):
            assert (await client.response()).status == 200
        assert heads == [
            ((b"host", b"localhost"), (b"transfer-encoding", b"chunked")),
            ((b"host", b"localhost"),),
        ]


async def test_a_body_behind_an_upgrade_smuggles_nothing() -> None:
    """llhttp takes such a body for another protocol; the server must read it as a body."""
    application = Application(raw=True)
    upgrade = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
    async with serve("http1", application) as served:
        client = await served.connect()
        body = SMUGGLED
        await client.send(
            POST
            + upgrade
            + b"Content-Length: %d\r\n\r\n" % len(body)
            + body
            + b"GET /two HTTP/1.1\r\n"
            + HOST
            + upgrade
            + b"\r\n"
            + POST
            + upgrade
            + b"Transfer-Encoding: chunked\r\n\r\n"
            + b"%x\r\n%b\r\n0\r\nX: y\r\n\r\n" % (len(body), body)
            + request("/four")
        )
        for _ in range(4):
            assert (await client.response()).status == 200
        assert application.seen == ["/", "/two", "/", "/four"]


async def test_what_follows_connection_close_is_not_served() -> None:
    """The last request is answered; what comes behind it is neither served nor refused."""
    application = Application(raw=False)
    async with serve("http1", application) as served:
        client = await served.connect()
        await client.send(request("/1", "Connection: close") + SMUGGLED + b"\0\0\0")
        assert (await client.response()).status == 200
        assert await client.closed()
        assert application.seen == ["/1"]


@pytest.mark.parametrize(
    "data",
    [
        b"G",
        b"GET / HT",
        b"GET / HTTP/1.1\r\nHost: loc",
        POST + b"Content-Length: 10\r\n\r\nabc",
        CHUNKED,
        CHUNKED + b"3\r\na",
        CHUNKED + b"3\r\nabc\r\n0\r\nA: b",
    ],
)
@pytest.mark.parametrize("rude", [True, False], ids=["reset", "end"])
async def test_truncated_requests_end_quietly(data: bytes, rude: bool) -> None:
    """If a peer disconnects in the middle of a request, the connection ends and nothing is served."""
    application = Application(raw=False)
    async with serve("http1", application) as served:
        client = await served.connect()
        await client.dribble(data)
        if rude:
            client.reset()
        else:
            client.half_close()
            assert await client.closed()
        await until(lambda: served.server.open_connections == 0)
        assert application.seen == []


@pytest.mark.parametrize(
    ("name", "data", "status"),
    [
        ("a long target", b"GET /" + b"a" * 17_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
        ("an endless target", b"GET /" + b"a" * 100_000, 414),
        ("endless white space", b"GET " + b" " * 100_000, 431),
        ("a long header", request("/", "A: " + "b" * 20_000), 431),
        ("an endless header", b"GET / HTTP/1.1\r\nA: " + b"b" * 100_000, 431),
        ("an endless name", b"GET / HTTP/1.1\r\n" + b"b" * 100_000, 431),
        ("many headers", request("/", *["A: b"] * 100), 431),
        ("headers large together", request("/", *["A: " + "b" * 1000] * 17), 431),
        ("endless headers", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000, 431),
        ("endless trailers", CHUNKED + b"0\r\n" + b"A: b\r\n" * 20_000, 431),
        ("an endless trailer", CHUNKED + b"0\r\nA: " + b"b" * 100_000, 431),
        ("an endless chunk extension", CHUNKED + b"3;a=" + b"b" * 100_000, 431),
        ("a large body", request("/", "Content-Length: 262145", method="POST"), 413),
        ("a huge body", request("/", f"Content-Length: {2**64 - 1}", method="POST"), 413),
        ("a large chunk", CHUNKED + b"40001\r\n" + b"x" * 262_145, 413),
        ("many chunks", CHUNKED + b"1\r\nx\r\n" * 262_145, 413),
    ],
)
@pytest.mark.parametrize("step", [1000, 10_000, 1_000_000])
async def test_too_much_is_refused(name: str, data: bytes, status: int, step: int) -> None:
    """In whatever pieces it comes; and the answer arrives although the client has sent everything."""
    application = Application(raw=False)
    async with serve("http1", application) as served:
        client = await served.connect()
        answer = asyncio.ensure_future(client.response())
        for start in range(0, len(data), step):
            await client.dribble(data[start : start + step])
        assert (await answer).status == status
        assert await client.closed()
        assert application.seen == []


async def test_a_slow_search_for_a_cached_request_does_not_keep_the_connection_from_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If it takes the whole quantum, a piece is parsed nevertheless: else the connection would spin for ever."""
    searches = []

    def slow(self: RequestReader, data: bytes, start: int = 0) -> int:
        searches.append(len(data))
        until = time.monotonic() + 2 * QUANTUM
        while time.monotonic() < until:
            pass
        return start

    monkeypatch.setattr(RequestReader, "try_cached", slow)
    async with serve("http1", Application(raw=False)) as served:
        client = await served.connect()
        await client.dribble(b"GET /" + b"a" * 100_000)
        assert (await client.response()).status == 414
    assert len(searches) < 20
    assert max(searches) <= PIECE, "all that is held was searched, not one piece"


async def test_what_is_just_within_the_limits_is_served() -> None:
    """Target, header size and count, and body, at the limit."""
    application = Application(raw=True)
    async with serve("http1", application) as served:
        client = await served.connect()
        target = "/" + "a" * 8191
        assert (await client.get(target)).status == 200
        assert (await client.get("/", *["A: b"] * 99)).status == 200
        used = len("/") + len("hostlocalhost") + 4 + len("a") + 4
        assert (await client.get("/", "A: " + "b" * (16384 - used))).status == 200
        assert (await client.get("/", "A: " + "b" * (16385 - used))).status == 431
        client = await served.connect()
        assert (await client.post("/", b"x" * 262_144)).status == 200
        assert len(application.seen) == 4


async def test_a_large_head_behind_other_bytes_is_served() -> None:
    """The size of a head is its own, whatever came before it in the same read."""
    application = Application(raw=True)
    async with serve("http1", application) as served:
        client = await served.connect()
        head = request("/", "A: " + "b" * 16_000)
        filler = request("/", body=b"x" * 8000)
        await client.send((filler + head) * 5)
        for _ in range(10):
            assert (await client.response()).status == 200


async def test_each_limit_can_be_set() -> None:
    """Each bound can be set."""
    limits = Limits(head_bytes=100, header_count=3, body_bytes=5)
    async with serve("http1", Application(raw=True), limits=limits) as served:
        for message, status in [
            (request("/" + 100 * "a"), 414),
            (request("/", "A: " + "b" * 100), 431),
            (request("/", *["A: b"] * 3), 431),
            (request("/", body=b"123456"), 413),
            (request("/", body=b"12345"), 200),
        ]:
            client = await served.connect()
            await client.send(message)
            assert (await client.response()).status == status
