"""Starting, counting, and ending a server; TLS and Unix sockets."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path

import pytest
from tornado import web, websocket
from tornado.httpserver import HTTPServer

from http1.harness import Client, Served, request, serve, until
from http1.test_websocket import Echo, frame, message, opened
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

    def body(self, body: bytes) -> None:
        pass

    def closed(self) -> None:
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
                ("/tls", Tls),
            ],
            log_function=lambda handler: None,
        )

    def start_raw_request(self, request: Request) -> RawDelegate | None:
        if request.target == b"/kept":
            self.kept.append(Kept(request))
            return self.kept[-1]
        return None


class Tls(web.RequestHandler):
    def get(self) -> None:
        assert self.request.connection is not None
        certificate = self.request.get_ssl_certificate(binary_form=True)
        self.write(f"{self.request.protocol} {certificate is not None}")


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
    """After its timeout `close_all_connections` is over, come what may."""
    application = Application()
    async with serve("http1", application) as served:
        client = await served.connect()
        await client.send(request("/kept"))
        await until(lambda: application.kept)
        served.server.stop()
        await served.server.close_all_connections(timeout=0.1)
        assert served.server.open_connections == 0
        assert application.kept[0].is_closed


async def test_a_server_may_end_before_it_began() -> None:
    """`stop` right behind `add_sockets` closes the sockets."""
    server = Server(Application())
    (sock,) = server.listen(0, "127.0.0.1")
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
    """`listen` may be called again."""
    server = Server(Application())
    sockets = [*server.listen(0, "127.0.0.1"), *server.listen(0, "127.0.0.1")]
    for sock in sockets:
        client = await Served(server, sock.getsockname()).connect()
        assert (await client.get("/fast")).body == b"fast"
        await client.close()
    server.stop()
    await server.close_all_connections()


async def test_unix_sockets_are_served(kind: str, tmp_path: Path) -> None:
    """With a remote address of 0.0.0.0, as in Tornado."""

    class Ip(web.RequestHandler):
        def get(self) -> None:
            self.write(f"{self.request.remote_ip}")

    path = str(tmp_path / "http.sock")
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    sock.bind(path)
    sock.listen()
    application = web.Application([("/", Ip), ("/ws", Echo, {"log": []})], log_function=print)
    server = (Server if kind == "http1" else HTTPServer)(application)
    server.add_sockets([sock])
    client = Client(*await asyncio.open_unix_connection(path))
    assert (await client.get("/")).body == b"0.0.0.0"
    await opened(client)
    await client.close()
    server.stop()
    await server.close_all_connections()


def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return a server's and a client's context; the client has a certificate as well."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=CERTIFICATE)
    server.load_cert_chain(CERTIFICATE)
    server.verify_mode = ssl.CERT_OPTIONAL
    client = ssl.create_default_context(cafile=CERTIFICATE)
    client.load_cert_chain(CERTIFICATE)
    return server, client


async def test_tls_is_spoken(kind: str) -> None:
    """The protocol is https, the client's certificate is there, connections are kept."""
    ours, theirs = contexts()
    option = "ssl_context" if kind == "http1" else "ssl_options"
    async with serve(kind, Application(), **{option: ours}) as served:
        client = await served.connect(ssl=theirs, server_hostname="localhost")
        for _ in range(3):
            assert (await client.get("/tls")).body == b"https True"


async def test_a_413_arrives_over_tls() -> None:
    """Lingering works without a half-close."""
    ours, theirs = contexts()
    limits = Limits(linger_seconds=0.5, sweep_seconds=0.1)
    async with serve("http1", Application(), ssl_context=ours, limits=limits) as served:
        client = await served.connect(ssl=theirs, server_hostname="localhost")
        await client.send(request("/slow", method="POST", body=b"x" * 3_000_000))
        assert (await client.response()).status == 413
        await until(lambda: served.server.open_connections == 0)


async def test_websockets_work_over_tls(kind: str) -> None:
    """Through the tunnel: frames behind the upgrade, large ones, and the end."""
    ours, theirs = contexts()
    option = "ssl_context" if kind == "http1" else "ssl_options"
    async with serve(kind, Application(), **{option: ours}) as served:
        client = await served.connect(ssl=theirs, server_hostname="localhost")
        await opened(client)
        payload = bytes(range(256)) * 20_000
        sending = asyncio.ensure_future(client.send(frame(payload, 2) + frame(b"last")))
        assert await message(client) == (2, payload)
        assert await message(client) == (1, b"last")
        await sending
        await client.send(frame(b"\x03\xe8", 8))
        assert (await message(client))[0] == 8
        assert await client.closed()


async def test_a_tls_websocket_that_is_left_is_closed() -> None:
    """The handler learns it, and nothing of the tunnel remains."""
    log: list[str] = []
    ours, theirs = contexts()
    application = web.Application([("/ws", Echo, {"log": log})], log_function=print)
    async with serve("http1", application, ssl_context=ours) as served:
        client = await served.connect(ssl=theirs, server_hostname="localhost")
        await opened(client)
        client.writer.transport.abort()
        await until(lambda: log == ["open", "close"])


async def test_a_slow_tls_websocket_holds_the_sender_up() -> None:
    """The tunnel has bounds: a flood to a client that does not read stops."""
    sent: list[int] = []

    class Flood(websocket.WebSocketHandler):
        async def open(self, *args: str, **kwargs: str) -> None:
            try:
                for number in range(1000):
                    await self.write_message(b"x" * 65536, binary=True)
                    sent.append(number)
            except websocket.WebSocketClosedError:
                pass

    ours, theirs = contexts()
    application = web.Application([("/ws", Flood)], log_function=print)
    async with serve("http1", application, ssl_context=ours) as served:
        client = await served.connect(ssl=theirs, server_hostname="localhost", limit=1024)
        await client.send(
            request(
                "/ws",
                "Connection: Upgrade",
                "Upgrade: websocket",
                "Sec-WebSocket-Version: 13",
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            )
        )
        assert (await client.response()).status == 101
        before = -1
        while len(sent) != before or not sent:
            before = len(sent)
            await asyncio.sleep(0.05)
        assert len(sent) < 900
        for _ in range(1000):
            assert (await message(client))[1] == b"x" * 65536


async def test_plain_bytes_to_a_tls_port_end_quietly() -> None:
    """No handshake, no connection."""
    ours, _ = contexts()
    async with serve("http1", Application(), ssl_context=ours) as served:
        client = await served.connect()
        await client.send(request("/fast"))
        await client.closed()
        assert served.server.open_connections == 0
