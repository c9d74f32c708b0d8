"""Websockets: the socket is handed over whole, with whatever came behind the upgrade."""

from __future__ import annotations

import asyncio
import os
import struct
from typing import Any

import pytest
from tornado import web, websocket
from tornado.iostream import StreamClosedError

from http1.harness import Client, request, serve, turns, until
from keypool.config.limits import Limits

UPGRADE = (
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)


class Echo(websocket.WebSocketHandler):
    """Echoes; ``?slow`` waits in prepare, ``?no`` refuses."""

    def initialize(self, log: list[str]) -> None:
        self.log = log

    async def prepare(self) -> None:
        if self.get_argument("slow", None) is not None:
            await turns(10)
        if self.get_argument("no", None) is not None:
            raise web.HTTPError(403)

    def open(self, *args: str, **kwargs: str) -> None:
        self.log.append("open")
        self.write_message("welcome")

    async def on_message(self, message: str | bytes) -> None:
        await self.write_message(message, binary=isinstance(message, bytes))

    def on_close(self) -> None:
        self.log.append("close")


class Plain(web.RequestHandler):
    def get(self) -> None:
        self.write("plain")


class Takeover(web.RequestHandler):
    """Takes the socket without an upgrade, at once or after a while."""

    async def get(self) -> None:
        if self.get_argument("slow", None) is not None:
            await turns(10)
        try:
            stream = self.detach()
        except RuntimeError as error:
            self._finished = False
            self.set_status(409)
            self.finish(str(error))
            return
        await stream.write(b"yours ")
        await stream.write(await stream.read_bytes(3))
        stream.close()

    def _log(self) -> None:
        pass


def application(log: list[str]) -> web.Application:
    return web.Application(
        [("/ws", Echo, {"log": log}), ("/plain", Plain), ("/takeover", Takeover)],
        log_function=lambda handler: None,
        websocket_max_message_size=32 * 1024 * 1024,
    )


def frame(payload: bytes, opcode: int = 1) -> bytes:
    """Return a masked frame, as a client sends it."""
    mask = os.urandom(4)
    size = len(payload)
    if size < 126:
        head = struct.pack("!BB", 0x80 | opcode, 0x80 | size)
    elif size < 65536:
        head = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", 0x80 | opcode, 0x80 | 127, size)
    key = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
    return head + mask + (int.from_bytes(payload, "big") ^ key).to_bytes(size, "big")


async def message(client: Client) -> tuple[int, bytes]:
    """Read one unmasked frame."""
    first, size = await client.reader.readexactly(2)
    if size == 126:
        (size,) = struct.unpack("!H", await client.reader.readexactly(2))
    elif size == 127:
        (size,) = struct.unpack("!Q", await client.reader.readexactly(8))
    return first & 15, await client.reader.readexactly(size)


async def opened(client: Client, path: str = "/ws") -> None:
    await client.send(request(path, *UPGRADE))
    assert (await client.response()).status == 101
    assert await message(client) == (1, b"welcome")


async def test_messages_go_both_ways(kind: str) -> None:
    """Text and binary, small and large, and an orderly end."""
    log: list[str] = []
    async with serve(kind, application(log)) as served:
        client = await served.connect()
        await opened(client)
        for size in (0, 1, 125, 126, 65535, 65536, 3_000_000):
            payload = os.urandom(size)
            sending = asyncio.ensure_future(client.send(frame(payload, 2)))
            assert await message(client) == (2, payload)
            await sending
        await client.send(frame(struct.pack("!H", 1000), 8))
        assert (await message(client))[0] == 8
        assert await client.closed()
        await until(lambda: log == ["open", "close"])


@pytest.mark.parametrize("path", ["/ws", "/ws?slow"])
@pytest.mark.parametrize("size", [10, 5000, 300_000])
async def test_frames_behind_the_upgrade_are_not_lost(kind: str, path: str, size: int) -> None:
    """A client may send its first messages without waiting for 101."""
    async with serve(kind, application([])) as served:
        client = await served.connect()
        payloads = [os.urandom(size) for _ in range(5)]
        data = request(path, *UPGRADE) + b"".join(frame(payload, 2) for payload in payloads)
        sending = asyncio.ensure_future(client.send(data))
        assert (await client.response()).status == 101
        assert await message(client) == (1, b"welcome")
        for payload in payloads:
            assert await message(client) == (2, payload)
        await sending


async def test_an_upgrade_split_anywhere_works(kind: str) -> None:
    """Byte by byte, with a frame behind it."""
    async with serve(kind, application([])) as served:
        client = await served.connect()
        for byte in request("/ws", *UPGRADE) + frame(b"hello"):
            client.writer.write(bytes([byte]))
            await turns(2)
        assert (await client.response()).status == 101
        assert await message(client) == (1, b"welcome")
        assert await message(client) == (1, b"hello")


async def test_an_upgrade_behind_other_requests_waits_for_its_turn(kind: str) -> None:
    """Earlier answers are complete before the 101."""
    async with serve(kind, application([])) as served:
        client = await served.connect()
        await client.send(request("/plain") * 3 + request("/ws", *UPGRADE) + frame(b"hello"))
        for _ in range(3):
            assert (await client.response()).body == b"plain"
        assert (await client.response()).status == 101
        assert await message(client) == (1, b"welcome")
        assert await message(client) == (1, b"hello")


async def test_an_upgrade_behind_a_large_answer_waits_until_it_is_read() -> None:
    """The handed over socket has nothing of an earlier answer left to send."""

    class Big(web.RequestHandler):
        def get(self) -> None:
            self.write(b"x" * 5_000_000)

    app = application([])
    app.add_handlers(".*", [("/big", Big)])
    async with serve("http1", app) as served:
        client = await served.connect(limit=1024)
        await client.send(request("/big") + request("/ws", *UPGRADE) + frame(b"hello"))
        assert len((await client.response()).body) == 5_000_000
        assert (await client.response()).status == 101
        assert await message(client) == (1, b"welcome")
        assert await message(client) == (1, b"hello")


@pytest.mark.parametrize("path", ["/plain", "/ws?no"])
async def test_a_refused_upgrade_goes_on_as_http(path: str) -> None:
    """A handler that does not upgrade answers, and further requests are served."""
    async with serve("http1", application([])) as served:
        client = await served.connect()
        await client.send((request(path, *UPGRADE) + request("/plain")) * 3)
        for _ in range(3):
            assert (await client.response()).status == (200 if path == "/plain" else 403)
            assert (await client.response()).body == b"plain"


@pytest.mark.parametrize("how", ["close", "reset", "half_close"])
async def test_a_websocket_is_notified_of_a_disconnect(kind: str, how: str) -> None:
    """`on_close` is called, without a close frame too."""
    log: list[str] = []
    async with serve(kind, application(log)) as served:
        client = await served.connect()
        await opened(client)
        if how == "close":
            await client.close()
        else:
            getattr(client, how)()
        await until(lambda: log == ["open", "close"])


async def test_a_client_that_leaves_before_the_101_is_no_error() -> None:
    """The handler gets a closed stream, and is notified once."""
    log: list[str] = []
    go = asyncio.Event()

    class Waiting(Echo):
        async def prepare(self) -> None:
            log.append("prepare")
            await go.wait()

        def open(self, *args: str, **kwargs: str) -> None:
            log.append("open")

    app = web.Application([("/ws", Waiting, {"log": log})], log_function=lambda handler: None)
    async with serve("http1", app) as served:
        client = await served.connect()
        await client.send(request("/ws", *UPGRADE))
        await until(lambda: log)
        client.reset()
        await until(lambda: "close" in log)
        go.set()
        await turns(20)
        assert served.server.open_connections == 0
        assert log.count("close") == 1


async def test_a_websocket_is_counted_and_otherwise_left_to_the_application() -> None:
    """It takes a connection's place until it is closed; but it has no time limit, and a stop doesn't end it."""
    limits = Limits(idle_seconds=0.2, connections=2)
    async with serve("http1", application([]), limits=limits) as served:
        client = await served.connect()
        await opened(client)
        assert served.server.open_connections == 0
        other = await served.connect()
        await opened(other)
        assert served.server.limiter.count == 2
        assert await (await served.connect()).closed()
        await other.close()
        await until(lambda: served.server.limiter.count == 1)
        await asyncio.sleep(0.5)
        served.server.stop()
        await served.server.close_all_connections()
        await client.send(frame(b"still here"))
        assert await message(client) == (1, b"still here")


async def test_messages_wait_for_a_slow_client(kind: str) -> None:
    """An awaited `write_message` resolves only when the socket takes it."""
    sent: list[int] = []

    class Flood(websocket.WebSocketHandler):
        async def open(self, *args: str, **kwargs: str) -> None:
            try:
                for number in range(1000):
                    await self.write_message(b"x" * 65536, binary=True)
                    sent.append(number)
            except (websocket.WebSocketClosedError, StreamClosedError):
                pass

    async with serve(kind, web.Application([("/ws", Flood)], log_function=print)) as served:
        client = await served.connect(limit=1024)
        await client.send(request("/ws", *UPGRADE))
        assert (await client.response()).status == 101
        before = -1
        while len(sent) != before:
            before = len(sent)
            await asyncio.sleep(0.05)
        assert len(sent) < 900


async def test_a_socket_can_be_taken_without_upgrade(kind: str) -> None:
    """`RequestHandler.detach` works while nothing behind the request was parsed."""
    async with serve(kind, application([])) as served:
        client = await served.connect()
        await client.send(request("/plain") + request("/takeover"))
        assert (await client.response()).body == b"plain"
        assert await client.reader.readexactly(6) == b"yours "
        await client.send(b"abc")
        assert await client.ended() == b"abc"


async def test_a_socket_is_not_detached_with_bytes_missing() -> None:
    """If bytes behind the request were parsed already, `detach` raises."""
    async with serve("http1", application([])) as served:
        client = await served.connect()
        await client.send(request("/takeover?slow") + request("/plain"))
        answer = await client.response()
        assert answer.status == 409
        assert b"read as HTTP already" in answer.body
        assert (await client.response()).body == b"plain"


@pytest.mark.logs_errors
async def test_without_descriptors_an_upgrade_ends_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No half-taken connection is left behind."""

    def no_dup(descriptor: int) -> int:
        raise OSError(24, "Too many open files")

    async with serve("http1", application([])) as served:
        client = await served.connect()
        monkeypatch.setattr("keypool.http.http1.stream.os.dup", no_dup)
        await client.send(request("/ws", *UPGRADE))
        assert await client.closed()
        monkeypatch.undo()
        assert served.server.open_connections == 0
        assert (await (await served.connect()).get("/plain")).status == 200


async def test_tornados_own_client_is_served(kind: str) -> None:
    """With compression and pings, through `websocket_connect`."""
    async with serve(kind, application([])) as served:
        url = f"ws://127.0.0.1:{served.address[1]}/ws"
        connection = await websocket.websocket_connect(url, compression_options={}, ping_interval=1)
        assert await connection.read_message() == "welcome"
        for text in ("a", "b" * 100_000):
            await connection.write_message(text)
            assert await connection.read_message() == text
        connection.close()
        end: Any = await connection.read_message()
        assert end is None
