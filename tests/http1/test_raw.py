"""The raw path: requests answered in bytes, past Tornado's objects."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from tornado import web

from http1.harness import chunked, request, serve, until
from keypool.http.http1 import ANSWERED, RawDelegate, Refusal, Request, date_line


def ok(body: bytes, *lines: bytes) -> bytes:
    head = [b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), *lines]
    return b"\r\n".join([*head, b"", body])


class Kept(RawDelegate):
    """Keeps a request until the test answers it, and records the calls of its methods."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.calls: list[object] = []

    def run(self, body: bytes) -> None:
        self.calls.append(body)

    def hung_up(self) -> None:
        self.calls.append("closed")


class Plain(web.RequestHandler):
    def get(self) -> None:
        self.write("by Tornado")


class Application(web.Application):
    """Takes ``/now``, ``/keep…`` and what ``special`` names; leaves the rest to Tornado."""

    def __init__(self, **special: Callable[[Request], RawDelegate | None]) -> None:
        super().__init__([("/plain", Plain)], log_function=lambda handler: None)
        self.kept: list[Kept] = []
        self.special = special

    def start_raw_request(self, request: Request) -> RawDelegate | None:
        path = request.target.decode().lstrip("/")
        if path in self.special:
            return self.special[path](request)
        if path == "now":
            request.respond(ok(b"now"))
            return ANSWERED
        if path.startswith("keep"):
            kept = Kept(request)
            self.kept.append(kept)
            return kept
        return None


async def test_a_raw_request_shows_what_was_sent() -> None:
    """Method, target, headers in order with lower-case names, trimmed values, peer."""
    application = Application()
    async with serve("http1", application) as served:
        client = await served.connect()
        await client.send(request("/keep?x=%20", "X-One:  1 \t", "x-ONE:2", method="PUT", body=b"hi"))
        await until(lambda: application.kept and application.kept[0].calls)
        kept = application.kept[0]
        got = kept.request
        assert (got.method, got.target) == (b"PUT", b"/keep?x=%20")
        assert got.headers == (
            (b"host", b"localhost"),
            (b"x-one", b"1"),
            (b"x-one", b"2"),
            (b"content-length", b"2"),
        )
        assert got.header(b"x-one") == b"1"
        assert got.header(b"x-two") is None
        assert got.content_length == 2
        assert kept.calls == [b"hi"]
        assert got.peer is not None
        assert got.peer.remote_ip == "127.0.0.1"
        got.respond(ok(b"later"))
        assert got.closed
        assert (await client.response()).body == b"later"


async def test_raw_and_tornado_requests_share_a_connection() -> None:
    """Requests that aren't taken raw go through Tornado's interfaces, in order."""
    async with serve("http1", Application()) as served:
        client = await served.connect()
        await client.send((request("/now") + request("/plain")) * 3)
        for _ in range(3):
            assert (await client.response()).body == b"now"
            assert (await client.response()).body == b"by Tornado"


@pytest.mark.parametrize("size", [0, 1, 10_000, 262_144])
async def test_a_raw_body_comes_whole(size: int) -> None:
    """However it is framed and split, in one piece, once."""
    application = Application()
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    async with serve("http1", application) as served:
        client = await served.connect()
        for message in (
            request("/keep", body=body),
            chunked("/keep", *[body[i : i + 5000] for i in range(0, size, 5000)]),
        ):
            await client.send(message)
            await until(lambda: application.kept and application.kept[-1].calls)
            kept = application.kept.pop()
            assert kept.calls == [body]
            kept.request.respond(ok(b"thanks"))
            assert (await client.response()).body == b"thanks"


async def test_a_connection_header_is_added_where_it_is_due() -> None:
    """The server puts Connection into raw answers: by the client's wish, or the application's."""

    def end(got: Request) -> RawDelegate:
        got.respond(ok(b"end"), close=True)
        return ANSWERED

    async with serve("http1", Application(end=end)) as served:
        client = await served.connect()
        answer = await client.get("/now", "Connection: close")
        assert answer["connection"] == "close"
        assert await client.closed()
        client = await served.connect()
        answer = await client.get("/end")
        assert (answer["connection"], answer.body) == ("close", b"end")
        assert await client.closed()
        client = await served.connect()
        await client.send(b"GET /now HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" * 2)
        for _ in range(2):
            assert (await client.response())["connection"] == "Keep-Alive"


async def test_head_gets_no_body() -> None:
    """The server cuts the body off a raw answer to HEAD."""
    async with serve("http1", Application()) as served:
        client = await served.connect()
        answer = await client.get("/now", method="HEAD")
        assert answer["content-length"] == "3"
        assert (await client.get("/now")).body == b"now"


async def test_two_answers_to_one_request_are_an_error() -> None:
    """The second raises, and reaches nobody."""
    application = Application()
    async with serve("http1", application) as served:
        client = await served.connect()
        await client.send(request("/keep/1") + request("/keep/2"))
        await until(lambda: application.kept)
        first = application.kept[0].request
        first.respond(ok(b"one"))
        with pytest.raises(RuntimeError, match="answered"):
            first.respond(ok(b"again"))
        assert (await client.response()).body == b"one"
        await until(lambda: len(application.kept) == 2)
        application.kept[1].request.respond(ok(b"two"))
        assert (await client.response()).body == b"two"


async def test_the_next_request_does_not_start_inside_an_answer() -> None:
    """`respond` from outside returns before the application is called again."""
    application = Application()
    async with serve("http1", application) as served:
        client = await served.connect()
        await client.send(request("/keep/1") + request("/keep/2"))
        await until(lambda: application.kept)
        application.kept[0].request.respond(ok(b"one"))
        assert len(application.kept) == 1
        await until(lambda: len(application.kept) == 2)


@pytest.mark.parametrize("how", ["close", "half_close", "reset"])
async def test_a_waiting_request_is_notified_of_a_disconnect(how: str) -> None:
    """`hung_up` is called once; answering then does nothing."""
    application = Application()
    async with serve("http1", application) as served:
        client = await served.connect()
        await client.send(request("/keep"))
        await until(lambda: application.kept)
        if how == "close":
            await client.close()
        else:
            getattr(client, how)()
        await until(lambda: application.kept[0].calls == [b"", "closed"])
        got = application.kept[0].request
        assert got.closed
        assert got.peer is None
        got.respond(ok(b"too late"))
        got.respond(ok(b"too late"))


async def test_a_disconnect_in_the_body_is_reported() -> None:
    """`hung_up` is called, and `run` is not."""
    application = Application()
    async with serve("http1", application) as served:
        client = await served.connect()
        await client.send(request("/keep", "Content-Length: 10", method="POST") + b"abc")
        await until(lambda: application.kept)
        await client.close()
        await until(lambda: application.kept[0].calls == ["closed"])


async def test_an_answer_before_the_body_keeps_the_connection_if_the_body_is_small() -> None:
    """The rest of the body is dropped, and the next request served."""
    async with serve("http1", Application()) as served:
        client = await served.connect()
        await client.dribble(request("/now", "Content-Length: 6", method="POST"), b"abc")
        answer = await client.response()
        assert "connection" not in answer.headers
        await client.send(b"def")
        assert (await client.get("/now")).body == b"now"
        await client.send(chunked("/now", b"a" * 10_000, b"b"))
        assert (await client.response()).body == b"now"
        assert (await client.get("/now")).body == b"now"


async def test_an_answer_before_a_large_body_ends_the_connection() -> None:
    """It says so, and arrives though the client is still sending."""
    async with serve("http1", Application()) as served:
        client = await served.connect()
        await client.send(request("/now", "Content-Length: 5000000", method="POST"))
        answer = await client.response()
        assert (answer.body, answer["connection"]) == (b"now", "close")
        await client.send(b"x" * 5_000_000)
        assert await client.closed()


async def test_an_answer_instead_of_100_ends_the_connection() -> None:
    """A client that waits for 100 may send its body or not; nobody can tell."""
    async with serve("http1", Application()) as served:
        client = await served.connect()
        await client.send(request("/now", "Expect: 100-continue", "Content-Length: 3", method="POST"))
        answer = await client.response()
        assert (answer.body, answer["connection"]) == (b"now", "close")
        assert await client.closed()


async def test_raw_requests_get_100_continue() -> None:
    """The body is asked for when the request's turn has come."""
    application = Application()
    async with serve("http1", application) as served:
        client = await served.connect()
        await client.send(request("/keep", "Expect: 100-continue", "Content-Length: 3", method="POST"))
        assert (await client.head())[0] == 100
        await client.send(b"abc")
        await until(lambda: application.kept[0].calls == [b"abc"])


@pytest.mark.parametrize("size", [262_145, 10_000_000])
async def test_a_raw_body_over_the_limit_is_refused(size: int) -> None:
    """`too_large` is called, and the server answers."""
    application = Application()
    async with serve("http1", application) as served:
        client = await served.connect()
        await client.send(request("/keep", f"Content-Length: {size}", method="POST"))
        assert (await client.response()).status == 413
        assert application.kept[0].calls == ["closed"]
        client = await served.connect()
        await client.send(chunked("/keep", *[b"x" * 65536] * 5))
        assert (await client.response()).status == 413
        assert application.kept[1].calls == ["closed"]


async def test_an_application_may_take_larger_bodies() -> None:
    """`set_max_body_size` in `start_raw_request` holds for that request."""
    kept: list[Kept] = []

    def take(got: Request) -> RawDelegate:
        got.set_max_body_size(1_000_000)
        kept.append(Kept(got))
        return kept[-1]

    async with serve("http1", Application(large=take)) as served:
        client = await served.connect()
        await client.send(chunked("/large", *[b"x" * 100_000] * 10))
        await until(lambda: kept and kept[0].calls)
        assert kept[0].calls == [b"x" * 1_000_000]


@pytest.mark.logs_errors
async def test_a_failing_application_is_answered_for() -> None:
    """An exception from the application is a 500, and ends the connection, not the server."""

    class Failing(RawDelegate):
        def run(self, body: bytes) -> None:
            raise RuntimeError("on purpose")

        def hung_up(self) -> None:
            raise RuntimeError("on purpose")

    def fail(got: Request) -> None:
        raise RuntimeError("on purpose")

    application = Application(early=fail, late=lambda got: Failing())
    async with serve("http1", application) as served:
        for path in ("/early", "/late"):
            client = await served.connect()
            answer = await client.get(path)
            assert (answer.status, answer["connection"]) == (500, "close")
            assert await client.closed()


async def test_the_application_makes_the_answers_to_refusals() -> None:
    """`on_refused` gets what is known of the request; None gives a bare answer."""
    seen: list[Refusal] = []

    def on_refused(refusal: Refusal) -> bytes | None:
        seen.append(refusal)
        return b"HTTP/1.1 418 Teapot\r\nContent-Length: 2\r\n\r\nno" if len(seen) == 1 else None

    async with serve("http1", Application(), on_refused=on_refused) as served:
        client = await served.connect()
        answer = await client.get("/" + "a" * 17_000, "X-Request-Id: 7", method="PUT")
        assert (answer.status, answer.body, answer["connection"]) == (418, b"no", "close")
        assert (await (await served.connect()).get("/" + "a" * 17_000)).status == 414
        client = await served.connect()
        await client.send(b"\x16\x03\x01")
        assert (await client.response()).status == 400
        assert [(r.status, r.code, r.method) for r in seen] == [
            (414, "uri-too-long", b"PUT"),
            (414, "uri-too-long", b"GET"),
            (400, "bad-request", b""),
        ]


async def test_pipelined_raw_requests_are_not_started_past_a_slow_reader() -> None:
    """While the client does not read, no further request is taken: memory is bounded."""
    taken = []

    def take(got: Request) -> RawDelegate:
        taken.append(got.target)
        got.respond(ok(b"x" * 100_000))
        return ANSWERED

    application = Application(big=take)
    async with serve("http1", application) as served:
        client = await served.connect(limit=1024)
        sender = asyncio.ensure_future(client.send(request("/big") * 1000))
        before = -1
        while len(taken) != before or not taken:
            before = len(taken)
            await asyncio.sleep(0.05)
        assert len(taken) < 150
        for _ in range(1000):
            assert len((await client.response()).body) == 100_000
        await sender


def test_the_date_line_is_a_header_line() -> None:
    """`date_line` is ready to be put into a serialised answer."""
    assert date_line().startswith(b"Date: ")
    assert date_line().endswith(b" GMT\r\n")
