"""Peers that are slow, idle, or too many are dealt with; others are not disturbed."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest
from tornado import web

from http1.harness import chunked, request, serve, until
from keypool.config.limits import Limits
from keypool.http.http1 import ANSWERED, RawDelegate, Refusal, Request
from keypool.http.http1.connection import Connection

QUICK = Limits(
    idle_seconds=0.3,
    head_seconds=0.3,
    body_seconds=0.3,
    write_seconds=0.3,
    linger_seconds=0.3,
    sweep_seconds=0.01,
)


class Clock:
    """The loop of a server, with a clock that stands until the test puts it forward."""

    def __init__(self, server: Any) -> None:
        self._server, self._loop = server, server._loop
        self.now: float = server._loop.time()
        server._loop = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def time(self) -> float:
        return self.now

    async def on(self, seconds: float) -> None:
        """Put it forward, and have the server look at the connections that it has."""
        self.now += seconds
        await until(lambda: self._server.clock > self.now or not self._server.open_connections)


class Hello(web.RequestHandler):
    async def get(self) -> None:
        if self.get_argument("wait", ""):
            await self.application.go_on.wait()  # type: ignore[attr-defined]
        self.write("hello")

    def post(self) -> None:
        self.write(hashlib.sha256(self.request.body).hexdigest())


class Application(web.Application):
    def __init__(self) -> None:
        super().__init__([("/", Hello)], log_function=lambda handler: None)
        self.go_on = asyncio.Event()

    def start_raw_request(self, request: Request) -> RawDelegate | None:
        if request.target == b"/big":
            body = b"x" * 8_000_000
            request.respond(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            return ANSWERED
        return None


async def test_an_idle_connection_is_closed() -> None:
    """Not before its time, and soon after; with nothing sent."""
    async with serve("http1", Application(), limits=QUICK) as served:
        clock = Clock(served.server)
        for used in (False, True):
            client = await served.connect()
            if used:
                await client.get("/")
            await until(lambda: served.server.open_connections == 1)
            await clock.on(0.29)
            assert served.server.open_connections == 1
            await clock.on(0.03)
            assert await client.closed()


async def test_a_used_connection_is_not_idle() -> None:
    """Each request starts the time anew; an answer in the making has no limit."""
    application = Application()
    async with serve("http1", application, limits=QUICK) as served:
        clock = Clock(served.server)
        client = await served.connect()
        answer = asyncio.ensure_future(client.get("/?wait=1"))
        await until(lambda: served.server.requests_in_flight)
        await clock.on(100)
        application.go_on.set()
        assert (await answer).status == 200
        for _ in range(4):
            await clock.on(0.2)
            assert (await client.get("/")).status == 200


@pytest.mark.parametrize("junk", [b"\r\n", b"\n", b""])
async def test_junk_does_not_keep_a_connection(junk: bytes) -> None:
    """Line ends between requests are no requests."""
    async with serve("http1", Application(), limits=QUICK) as served:
        client = await served.connect()
        end = asyncio.ensure_future(client.closed())
        while not end.done():
            client.writer.write(junk)
            await asyncio.sleep(0.02)


async def test_a_dripping_head_is_answered_408() -> None:
    """However steadily it drips, by the application's own answer."""
    refusals: list[Refusal] = []
    async with serve("http1", Application(), limits=QUICK, on_refused=refusals.append) as served:
        clock = Clock(served.server)
        client = await served.connect()
        answer = asyncio.ensure_future(client.response())
        start = clock.now
        await client.dribble(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n")
        while not answer.done():
            client.writer.write(b"A: b\r\n")
            await clock.on(0.02)
        assert (await answer).status == 408
        assert clock.now - start > 0.29
        assert (refusals[0].status, refusals[0].target) == (408, b"/slow")
        assert refusals[0].headers[0] == (b"host", b"localhost")
        assert await client.closed()


async def test_heads_that_end_in_time_are_served() -> None:
    """The limit is per request: pipelined heads cut anywhere don't add up."""
    async with serve("http1", Application(), limits=QUICK) as served:
        clock = Clock(served.server)
        client = await served.connect()
        data = request("/") * 40
        step = 37
        for start in range(0, len(data), step):
            client.writer.write(data[start : start + step])
            await clock.on(0.02)
        for _ in range(40):
            assert (await client.response()).status == 200


async def test_a_slow_body_is_answered_408() -> None:
    """A body that drips is given up, whatever it is for."""
    limits = Limits(body_seconds=0.3, sweep_seconds=0.075)
    async with serve("http1", Application(), limits=limits) as served:
        client = await served.connect()
        answer = asyncio.ensure_future(client.response())
        await client.send(request("/", "Transfer-Encoding: chunked", method="POST"))
        while not answer.done():
            client.writer.write(b"1\r\nx\r\n")
            await asyncio.sleep(0.02)
        assert (await answer).status == 408
        assert await client.closed()


async def test_a_peer_that_does_not_read_is_cut() -> None:
    """No progress of the answer for the time set ends the connection."""
    async with serve("http1", Application(), limits=QUICK) as served:
        clock = Clock(served.server)
        client = await served.connect(limit=1024)
        await client.send(request("/big") * 2)
        await until(lambda: any(connection.unsent() for connection in served.server._connections))
        start = clock.now
        while served.server.open_connections:
            await clock.on(0.05)
        assert clock.now - start > 0.2


async def test_a_peer_that_reads_slowly_is_served() -> None:
    """Slow progress is progress, for longer than the time set, which is several times what a single write needs."""
    limits = Limits(write_seconds=1.5, sweep_seconds=0.01)
    async with serve("http1", Application(), limits=limits) as served:
        clock = Clock(served.server)
        client = await served.connect(limit=256 * 1024)
        await client.send(request("/big", "Connection: close"))
        await client.head()
        size = 0
        start = clock.now
        while size < 8_000_000:
            piece = await client.reader.read(400_000)
            assert piece, f"cut after {size} bytes and {clock.now - start:.1f} s"
            size += len(piece)
            await clock.on(len(piece) / 4_000_000)
        assert clock.now - start > limits.write_seconds


async def test_lingering_is_bounded_in_time() -> None:
    """After a refusal a peer that keeps its end open is cut."""
    limits = Limits(linger_seconds=0.3, sweep_seconds=0.075)
    async with serve("http1", Application(), limits=limits) as served:
        client = await served.connect()
        await client.send(b"GET BROKEN\0")
        assert (await client.response()).status == 400
        assert await client.reader.read() == b""  # the sending side is shut at once
        await until(lambda: served.server.open_connections == 0)


async def test_lingering_is_bounded_in_bytes() -> None:
    """After a refusal a peer that sends without end is cut."""
    limits = Limits(linger_bytes=100_000)
    async with serve("http1", Application(), limits=limits) as served:
        client = await served.connect()
        await client.send(b"GET BROKEN\0")
        assert (await client.response()).status == 400
        with pytest.raises(ConnectionError):  # noqa: PT012
            while True:
                await client.send(b"x" * 65536)


@pytest.mark.parametrize("size", [300_000, 5_000_000, 15_000_000])
async def test_a_client_that_sends_everything_first_reads_its_413(size: int) -> None:
    """It sends the whole body, and only then looks for the answer."""
    async with serve("http1", Application()) as served:
        for message in (
            request("/", method="POST", body=b"x" * size),
            chunked("/", *[b"x" * 50_000] * (size // 50_000)),
        ):
            client = await served.connect()
            await client.send(message)
            answer = await client.response()
            assert (answer.status, answer["connection"]) == (413, "close")
            assert await client.closed()


async def test_connections_are_bounded() -> None:
    """One too many is closed at once; when another ends there is room again."""
    limits = Limits(connections=3)
    async with serve("http1", Application(), limits=limits) as served:
        clients = [await served.connect() for _ in range(3)]
        for client in clients:
            assert (await client.get("/")).status == 200
        assert await (await served.connect()).closed()
        assert served.server.open_connections == 3
        await clients[0].close()
        await until(lambda: served.server.open_connections == 2)
        assert (await (await served.connect()).get("/")).status == 200


@pytest.mark.logs_errors
async def test_a_connection_that_fails_in_the_sweep_does_not_end_the_sweep() -> None:
    """It is cut and logged, once; the others are closed when their time has passed."""

    class Failing(Connection):
        __slots__ = ()

        def expire(self) -> None:
            raise ZeroDivisionError

    async with serve("http1", Application(), limits=QUICK) as served:
        clock = Clock(served.server)
        failing, first = await served.connect(), await served.connect()
        await until(lambda: served.server.open_connections == 2)
        for connection in served.server._connections:
            if connection.peer.address == failing.writer.get_extra_info("sockname"):
                connection.__class__ = Failing
        await clock.on(0.32)
        assert await failing.closed()
        assert await first.closed()
        last = await served.connect()
        await until(lambda: served.server.open_connections == 1)
        await clock.on(0.32)
        assert await last.closed()
