"""Starting, counting, and ending a server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tornado import web
from tornado.netutil import bind_sockets

from http1.harness import Served, request, serve, until
from http1.test_websocket import Echo
from keypool.config.limits import Limits
from keypool.http.http1 import RawDelegate, Request, Server

CERTIFICATE = Path(__file__).with_name("localhost.pem")


class Slow(web.RequestHandler):
    """Answers once its event is set: headers first, if asked."""

    def initialize(self, go: asyncio.Event) -> None:
        self.go = go

    async def get(self) -> None:
        if self.get_argument("early", None) is not None:
            self.write("early ")
            await self.flush()
        await self.go.wait()
        self.write("done")

    async def post(self) -> None:
        self.write(self.request.body)


class Fast(web.RequestHandler):
    def get(self) -> None:
        self.write("fast")


class Kept(RawDelegate):
    def __init__(self, request: Request) -> None:
        self.request = request
        self.is_closed = False

    def run(self, body: bytes) -> None:
        pass

    def hung_up(self) -> None:
        self.is_closed = True


class Application(web.Application):
    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.kept: list[Kept] = []
        super().__init__(
            [
                ("/slow", Slow, {"go": self.go}),
                ("/fast", Fast),
                ("/ws", Echo, {"log": []}),
            ],
            log_function=lambda handler: None,
        )

    def start_raw_request(self, request: Request) -> RawDelegate | None:
        if request.target == b"/kept":
            self.kept.append(Kept(request))
            return self.kept[-1]
        return None


async def test_idle_connections_close_at_once_and_busy_ones_behind_their_answer() -> None:
    """`close_all_connections` drops nothing that is being answered, and starts nothing new."""
    application = Application()
    limits = Limits(linger_seconds=0.1, sweep_seconds=0.05)
    async with serve("http1", application, limits=limits) as served:
        server = served.server
        idle, begun, body, kept, streaming, busy = [await served.connect() for _ in range(6)]
        await idle.get("/fast")
        await begun.send(b"GET /fast HTTP/1.1\r\nHost: local")
        await body.send(request("/slow", "Content-Length: 6", method="POST") + b"abc")
        await kept.send(request("/kept") + request("/fast"))
        await streaming.send(request("/slow?early"))
        await streaming.head()
        await busy.send(request("/slow") + request("/fast"))
        await until(lambda: server.requests_in_flight == 4 and application.kept)
        assert server.open_connections == 6
        server.stop()
        closing = asyncio.ensure_future(server.close_all_connections())
        assert await idle.closed()
        assert await begun.closed()
        assert server.requests_in_flight == 4
        with pytest.raises(ConnectionError):
            await served.connect()
        await body.send(b"def")
        assert (await body.response()).body == b"abcdef"
        application.go.set()
        answer = await busy.response()
        assert (answer.body, answer["connection"]) == (b"done", "close")
        assert await busy.closed()
        assert await streaming._chunks() == b"early done"
        assert await streaming.closed()
        assert not closing.done()
        application.kept[0].request.respond(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        answer = await kept.response()
        assert (answer.body, answer["connection"]) == (b"ok", "close")
        assert await kept.closed()
        await closing
        assert (server.open_connections, server.requests_in_flight) == (0, 0)


async def test_what_takes_too_long_is_cut() -> None:
    """After its timeout `close_all_connections` returns in any case."""
    application = Application()
    async with serve("http1", application) as served:
        client = await served.connect()
        await client.send(request("/kept"))
        await until(lambda: application.kept)
        served.server.stop()
        await served.server.close_all_connections(timeout=0.1)
        assert served.server.open_connections == 0
        assert application.kept[0].is_closed


async def test_a_server_may_stop_before_it_accepts() -> None:
    """`stop` right behind `add_sockets` closes the sockets."""
    server = Server(Application())
    (sock,) = sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    port = sock.getsockname()[1]
    server.stop()
    server.stop()
    await server.close_all_connections()
    await until(lambda: sock.fileno() == -1)
    with pytest.raises(ConnectionError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_a_stopped_server_serves_its_connections() -> None:
    """`stop` ends accepting, not serving."""
    async with serve("http1", Application()) as served:
        client = await served.connect()
        await client.get("/fast")
        served.server.stop()
        for _ in range(3):
            assert (await client.get("/fast")).body == b"fast"


async def test_several_sockets_share_a_server() -> None:
    """`add_sockets` may be called again."""
    server = Server(Application())
    sockets = bind_sockets(0, "127.0.0.1") + bind_sockets(0, "127.0.0.1")
    for sock in sockets:
        server.add_sockets([sock])
        client = await Served(server, sock.getsockname()).connect()
        assert (await client.get("/fast")).body == b"fast"
        await client.close()
    server.stop()
    await server.close_all_connections()
