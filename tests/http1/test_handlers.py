"""RequestHandlers and delegates behave the same on this server and on Tornado's."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable
from typing import Any

import pytest
from tornado import httputil, web
from tornado.iostream import StreamClosedError

from http1.harness import chunked, request, serve, until
from keypool.config.proxies import TrustedProxies
from keypool.http.http1.reader import RequestReader
from keypool.http.http1.turns import QUANTUM


class Echo(web.RequestHandler):
    """Answers with what it received of the request."""

    async def prepare(self) -> None:
        self.set_header("Content-Type", "application/json")

    def _tell(self) -> None:
        self.write(
            {
                "method": self.request.method,
                "uri": self.request.uri,
                "version": self.request.version,
                "host": self.request.host,
                "body": self.request.body.decode("latin-1"),
                "arguments": {k: self.get_arguments(k) for k in self.request.arguments},
                "headers": sorted(self.request.headers.get_all()),
                "ip": self.request.remote_ip,
                "protocol": self.request.protocol,
            }
        )

    def get(self) -> None:
        self._tell()

    def post(self) -> None:
        self._tell()

    def head(self) -> None:
        self._tell()


class Digest(web.RequestHandler):
    def post(self) -> None:
        self.write(hashlib.sha256(self.request.body).hexdigest())


class Status(web.RequestHandler):
    def get(self, status: str) -> None:
        self.set_status(int(status))

    put = get


class Stream(web.RequestHandler):
    """Writes numbered lines, awaiting each flush."""

    async def get(self, count: str) -> None:
        for number in range(int(count)):
            self.write(b"%08d\n" % number)
            await self.flush()


class Measured(web.RequestHandler):
    """Streams with a Content-Length; ``lie`` bytes more or fewer than it says."""

    async def get(self, lie: str) -> None:
        self.set_header("Content-Length", "10")
        self.write(b"x" * 5)
        await self.flush()
        self.write(b"y" * (5 + int(lie)))
        await self.flush()


@web.stream_request_body
class Upload(web.RequestHandler):
    """Digests a body as it comes; slow if asked to be."""

    def initialize(self, log: list[str]) -> None:
        self.log = log
        self.digest = hashlib.sha256()
        self.size = 0

    async def prepare(self) -> None:
        self.log.append("prepare")
        assert self.request.connection is not None
        if limit := self.get_argument("limit", ""):
            await asyncio.sleep(0)
            self.request.connection.set_max_body_size(int(limit))  # type: ignore[attr-defined]
        if self.get_argument("refuse", ""):
            raise web.HTTPError(401)

    async def data_received(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self.digest.update(chunk)
        await asyncio.sleep(0)

    def post(self) -> None:
        self.log.append("post")
        self.write(f"{self.size} {self.digest.hexdigest()}")

    put = post

    def on_connection_close(self) -> None:
        self.log.append("closed")
        super().on_connection_close()


class Hang(web.RequestHandler):
    """Answers when an event is set; records when the client disconnects."""

    def initialize(self, log: list[str], release: asyncio.Event) -> None:
        self.log = log
        self.release = release

    async def get(self) -> None:
        self.log.append("started")
        await self.release.wait()
        self.write("done")

    def on_connection_close(self) -> None:
        self.log.append("closed")


class Crash(web.RequestHandler):
    def get(self) -> None:
        raise RuntimeError("on purpose")


class State:
    """An application with all of the above, and what its handlers noted."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.release = asyncio.Event()
        self.application = web.Application(
            [
                ("/echo", Echo),
                ("/digest", Digest),
                ("/status/([0-9]+)", Status),
                ("/stream/([0-9]+)", Stream),
                ("/measured/(-?[0-9]+)", Measured),
                ("/upload", Upload, {"log": self.log}),
                ("/hang", Hang, {"log": self.log, "release": self.release}),
                ("/crash", Crash),
            ],
            log_function=lambda handler: None,
        )


async def test_a_request_arrives_as_it_was_sent(kind: str) -> None:
    """Method, target, headers (repeated ones too), peer and version reach the handler."""
    async with serve(kind, State().application) as served:
        client = await served.connect()
        answer = await client.get("/echo?a=1&a=%C3%A9&b=", "X-One: 1", "x-one:  2 ", "X-Empty:")
        echoed = answer.body.decode()
        assert answer.status == 200
        assert '"uri": "/echo?a=1&a=%C3%A9&b="' in echoed
        assert '"arguments": {"a": ["1", "\\u00e9"], "b": [""]}' in echoed
        assert '["X-One", "1"], ["X-One", "2"]' in echoed
        assert '["X-Empty", ""]' in echoed
        assert '"ip": "127.0.0.1"' in echoed
        assert '"version": "HTTP/1.1"' in echoed


async def test_answers_carry_date_and_length(kind: str) -> None:
    """A plain answer has Date, Content-Length and no chunks; the connection stays open."""
    async with serve(kind, State().application) as served:
        client = await served.connect()
        for _ in range(3):
            answer = await client.get("/echo")
            assert answer["date"].endswith("GMT")
            assert int(answer["content-length"]) == len(answer.body)
            assert "transfer-encoding" not in answer.headers
            assert "connection" not in answer.headers


@pytest.mark.parametrize("size", [0, 1, 4095, 8192, 65536, 200_000])
async def test_bodies_arrive_whole(kind: str, size: int) -> None:
    """By Content-Length and by chunks, whatever their size, and the next request follows."""
    body = bytes(range(256)) * (size // 256 + 1)
    body = body[:size]
    expected = hashlib.sha256(body).hexdigest().encode()
    async with serve(kind, State().application) as served:
        client = await served.connect()
        assert (await client.post("/digest", body)).body == expected
        await client.send(chunked("/digest", *(body[i : i + 999] for i in range(0, size, 999))))
        assert (await client.response()).body == expected
        assert (await client.get("/echo")).status == 200


async def test_form_bodies_are_parsed(kind: str) -> None:
    """A urlencoded body gives arguments."""
    async with serve(kind, State().application) as served:
        client = await served.connect()
        line = "Content-Type: application/x-www-form-urlencoded"
        answer = await client.post("/echo?q=0", b"q=1&r=2", line)
        assert b'"arguments": {"q": ["0", "1"], "r": ["2"]}' in answer.body


async def test_head_has_headers_and_no_body(kind: str) -> None:
    """HEAD announces the length GET would have, and sends none of it."""
    async with serve(kind, State().application) as served:
        client = await served.connect()
        answer = await client.get("/echo", method="HEAD")
        assert int(answer["content-length"]) > 100
        assert (await client.get("/echo")).status == 200


@pytest.mark.parametrize("status", [204, 304])
async def test_bodiless_statuses_end_behind_their_headers(kind: str, status: int) -> None:
    """204 and 304 have neither body nor chunks; the connection goes on."""
    async with serve(kind, State().application) as served:
        client = await served.connect()
        for _ in range(2):
            answer = await client.get(f"/status/{status}")
            assert answer.status == status
            assert "transfer-encoding" not in answer.headers


async def test_streamed_answers_are_chunked(kind: str) -> None:
    """Flushed pieces come in order, by chunks to HTTP/1.1."""
    async with serve(kind, State().application) as served:
        client = await served.connect()
        answer = await client.get("/stream/1000")
        assert answer["transfer-encoding"] == "chunked"
        assert answer.body == b"".join(b"%08d\n" % n for n in range(1000))
        assert (await client.get("/stream/1")).body == b"00000000\n"


async def test_http_1_0_gets_no_chunks_and_a_close(kind: str) -> None:
    """A streamed answer to HTTP/1.0 ends with the connection."""
    async with serve(kind, State().application) as served:
        client = await served.connect()
        await client.send(b"GET /stream/10 HTTP/1.0\r\n\r\n")
        answer = await client.response()
        assert "transfer-encoding" not in answer.headers
        assert answer.body == b"".join(b"%08d\n" % n for n in range(10))


async def test_http_1_0_keeps_alive_on_request(kind: str) -> None:
    """An HTTP/1.0 client that asks for keep-alive gets it, and a header that announces it."""
    async with serve(kind, State().application) as served:
        client = await served.connect()
        for _ in range(3):
            await client.send(b"GET /echo HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n")
            answer = await client.response()
            assert answer["connection"].lower() == "keep-alive"
        await client.send(b"GET /echo HTTP/1.0\r\n\r\n")
        assert (await client.response()).status == 200
        assert await client.closed()


async def test_connection_close_is_honoured_and_announced(kind: str) -> None:
    """The answer to a request with Connection: close says so and is the last."""
    async with serve(kind, State().application) as served:
        client = await served.connect()
        answer = await client.get("/echo", "Connection: close")
        assert answer["connection"] == "close"
        assert await client.closed()


async def test_no_keep_alive_closes_after_one(kind: str) -> None:
    """With no_keep_alive each connection carries one answer."""
    async with serve(kind, State().application, no_keep_alive=True) as served:
        client = await served.connect()
        answer = await client.get("/echo")
        assert answer["connection"] == "close"
        assert await client.closed()


async def test_expect_100_continue_is_answered_before_the_body(kind: str) -> None:
    """The client may wait for 100 before it sends its body."""
    async with serve(kind, State().application) as served:
        client = await served.connect()
        head = request("/digest", "Expect: 100-continue", "Content-Length: 3", method="POST")
        await client.send(head)
        assert (await client.head())[0] == 100
        await client.send(b"abc")
        answer = await client.response()
        assert answer.body == hashlib.sha256(b"abc").hexdigest().encode()


async def test_a_streamed_body_is_taken_piece_by_piece(kind: str) -> None:
    """A slow `data_received` gets all bytes in order, and slows the sender down."""
    state = State()
    body = bytes(range(256)) * 4000
    async with serve(kind, state.application) as served:
        client = await served.connect()
        expected = f"{len(body)} {hashlib.sha256(body).hexdigest()}".encode()
        assert (await client.post("/upload?limit=9999999", body)).body == expected
        await client.send(chunked("/upload?limit=9999999", *[body[:70_000]] * 3))
        answer = await client.response()
        assert answer.body.startswith(b"210000 ")
        assert state.log == ["prepare", "post"] * 2


async def test_prepare_may_refuse_before_the_body(kind: str) -> None:
    """A handler that finishes in `prepare` answers at once; the body is not taken."""
    state = State()
    async with serve(kind, state.application) as served:
        client = await served.connect()
        await client.send(request("/upload?refuse=1", "Content-Length: 10000000", method="POST"))
        assert (await client.response()).status == 401
        assert state.log[0] == "prepare"
        assert "post" not in state.log


async def test_a_disconnect_in_the_body_is_reported(kind: str) -> None:
    """`on_connection_close` runs if the connection ends before the body does."""
    state = State()
    async with serve(kind, state.application) as served:
        client = await served.connect()
        await client.send(request("/upload", "Content-Length: 100", method="POST") + b"abc")
        await until(lambda: "prepare" in state.log)
        await client.close()
        await until(lambda: "closed" in state.log)


@pytest.mark.parametrize("how", ["close", "half_close", "reset"])
async def test_a_disconnect_before_the_answer_is_reported(kind: str, how: str) -> None:
    """By a close, a reset, or the end of its sending side alone."""
    state = State()
    async with serve(kind, state.application) as served:
        client = await served.connect()
        await client.send(request("/hang"))
        await until(lambda: "started" in state.log)
        if how == "close":
            await client.close()
        else:
            getattr(client, how)()
        await until(lambda: "closed" in state.log)
        state.release.set()
        assert state.log == ["started", "closed"]


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_a_request_with_the_end_right_behind_it_is_answered(
    monkeypatch: pytest.MonkeyPatch, busy: bool
) -> None:
    """A handler that needs no waiting answers a client that half-closes at once.

    On a busy server the end arrives before the turn in which the request is started. Tornado's server sees the end
    first, and drops the request.
    """
    look_up = RequestReader.try_cached

    def slow(reader: RequestReader, data: bytes) -> int:
        time.sleep(2 * QUANTUM)
        return look_up(reader, data)

    if busy:
        monkeypatch.setattr(RequestReader, "try_cached", slow)
    async with serve("http1", State().application) as served:
        client = await served.connect()
        client.writer.write(request("/echo"))
        client.half_close()
        assert (await client.response()).status == 200
        assert await client.closed()


@pytest.mark.logs_errors
async def test_a_crash_is_a_500(kind: str) -> None:
    """An exception in a handler is answered, logged, and ends nothing else."""
    async with serve(kind, State().application) as served:
        client = await served.connect()
        assert (await client.get("/crash")).status == 500
        assert (await client.get("/echo")).status == 200


@pytest.mark.logs_errors
@pytest.mark.parametrize("lie", [1, -1])
async def test_a_wrong_content_length_ends_the_connection(kind: str, lie: int) -> None:
    """More or fewer bytes than announced are an error; no later answer is put there."""
    async with serve(kind, State().application) as served:
        client = await served.connect()
        await client.send(request(f"/measured/{lie}") + request("/echo"))
        try:
            sent = (
                await client.ended()
            )  # perhaps nothing: what isn't sent yet when the lie is found is dropped
        except ConnectionError:
            sent = b""
        head, _, rest = sent.partition(b"\r\n\r\n")
        assert b"HTTP/1.1" not in rest
        assert len(rest) < 10
        assert not head or b"Content-Length: 10" in head


class Bare(httputil.HTTPServerConnectionDelegate):
    """Hands every request to one function, and notes closed connections."""

    def __init__(self, respond: Any) -> None:
        self.respond = respond
        self.closed: list[object] = []

    def start_request(
        self, server_conn: object, request_conn: httputil.HTTPConnection
    ) -> httputil.HTTPMessageDelegate:
        return BareMessage(self.respond, request_conn)

    def on_close(self, server_conn: object) -> None:
        self.closed.append(server_conn)


class BareMessage(httputil.HTTPMessageDelegate):
    def __init__(self, respond: Any, connection: httputil.HTTPConnection) -> None:
        self.respond = respond
        self.connection = connection
        self.body = b""

    def headers_received(self, start_line: Any, headers: httputil.HTTPHeaders) -> None:
        self.start_line = start_line

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        self.body += chunk
        return None

    def finish(self) -> None:
        self.respond(self)


async def test_a_bare_delegate_answers(kind: str) -> None:
    """Headers, first chunk, further chunks and finish by the public interface alone."""

    def respond(message: BareMessage) -> None:
        headers = httputil.HTTPHeaders({"Content-Type": "text/plain"})
        start = httputil.ResponseStartLine("HTTP/1.1", 200, "OK")
        message.connection.write_headers(start, headers, b"you said ")
        message.connection.write(message.body)
        message.connection.finish()

    async with serve(kind, Bare(respond)) as served:
        client = await served.connect()
        assert (await client.post("/", b"hello")).body == b"you said hello"
        assert (await client.post("/", b"again")).body == b"you said again"


async def test_a_delegate_is_notified_of_closed_connections() -> None:
    """`on_close` is called once a connection, as its interface says (Tornado's server forgets)."""
    application = Bare(lambda message: message.connection.finish())
    async with serve("http1", application) as served:
        client = await served.connect()
        await client.send(request("/"))
        await client.close()
        await until(lambda: application.closed)
        await (await served.connect()).close()
        await until(lambda: len(application.closed) == 2)


@pytest.mark.parametrize("text", ["a\r\nSet-Cookie: b", "a\nb", "a\rb"])
async def test_line_breaks_in_headers_are_refused(kind: str, text: str) -> None:
    """No header can be injected into an answer."""
    errors: list[Exception] = []

    def respond(message: BareMessage) -> None:
        start = httputil.ResponseStartLine("HTTP/1.1", 200, "OK")
        headers = httputil.HTTPHeaders()
        headers["X"] = text
        try:
            message.connection.write_headers(start, headers)
        except ValueError as error:
            errors.append(error)
        headers = httputil.HTTPHeaders({"Content-Length": "0"})
        message.connection.write_headers(start, headers)
        message.connection.finish()

    async with serve(kind, Bare(respond)) as served:
        client = await served.connect()
        assert (await client.get("/")).status == 200
        assert len(errors) == 1


async def test_writes_wait_for_a_slow_reader(kind: str) -> None:
    """`flush` resolves only while the client keeps up; memory stays bounded."""
    flushed: list[int] = []

    class Flood(web.RequestHandler):
        async def get(self) -> None:
            for number in range(400):
                self.write(b"x" * 65536)
                await self.flush()
                flushed.append(number)

    async with serve(kind, web.Application([("/", Flood)], log_function=print)) as served:
        client = await served.connect(limit=1024)
        await client.send(request("/"))
        await client.head()
        before = -1
        while len(flushed) != before:  # until nothing moves any more
            before = len(flushed)
            await asyncio.sleep(0.05)
        assert 0 < len(flushed) < 300
        assert len(await client._chunks()) == 400 * 65536
        assert len(flushed) == 400


async def test_writes_to_a_gone_client_fail_without_noise(kind: str) -> None:
    """A handler in the midst of streaming gets StreamClosedError, and it is freed."""
    outcome: list[BaseException] = []

    class Endless(web.RequestHandler):
        async def get(self) -> None:
            try:
                while True:
                    self.write(b"x" * 65536)
                    await self.flush()
            except StreamClosedError as error:
                outcome.append(error)

    async with serve(kind, web.Application([("/", Endless)], log_function=print)) as served:
        client = await served.connect(limit=1024)
        await client.send(request("/"))
        await client.head()
        client.reset()
        await until(lambda: outcome)


async def test_a_trusted_proxy_names_the_peer() -> None:
    """Its two headers are applied to each request; those of other peers are ignored."""
    lines = ("X-Forwarded-For: 9.9.9.9, 8.8.8.8, 10.0.0.1", "X-Forwarded-Proto: http, https")
    application = State().application
    async with serve("http1", application, trusted=TrustedProxies("127.0.0.1, 10.0.0.1")) as served:
        client = await served.connect()
        echoed = (await client.get("/echo", *lines, "X-Real-Ip: 7.7.7.7", "X-Scheme: http")).body
        assert b'"ip": "8.8.8.8"' in echoed
        assert b'"protocol": "https"' in echoed
        echoed = (await client.get("/echo", "X-Forwarded-For: nonsense", "X-Forwarded-Proto: ftp")).body
        assert b'"ip": "127.0.0.1"' in echoed
        assert b'"protocol": "http"' in echoed
    for trusted in (None, TrustedProxies("10.0.0.1")):
        async with serve("http1", application, trusted=trusted) as served:
            client = await served.connect()
            assert b'"ip": "127.0.0.1"' in (await client.get("/echo", *lines)).body


@pytest.mark.parametrize("method", ["PROPFIND", "TRACE"])
async def test_methods_without_a_handler_reach_the_application(kind: str, method: str) -> None:
    """The application answers 405, and the connection goes on."""
    async with serve(kind, State().application) as served:
        client = await served.connect()
        assert (await client.get("/echo", method=method)).status == 405
        assert (await client.post("/echo", b"abc", method=method)).status == 405
        assert (await client.get("/echo")).status == 200
