"""With the garbage collector off, everything is freed by reference count."""

from __future__ import annotations

import asyncio
import gc
import os
import types
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tornado import web

from http1.harness import Client, Served, chunked, request, serve, turns, until
from http1.test_websocket import Echo, frame, message, opened
from keypool.http.http1 import ANSWERED, RawDelegate, Request

ROUNDS = int(os.environ.get("ROUNDS", "40"))


class Plain(web.RequestHandler):
    def get(self) -> None:
        self.write("plain")

    post = get


class Streamed(web.RequestHandler):
    async def get(self) -> None:
        for _ in range(3):
            self.write("piece")
            await self.flush()


class Waiting(web.RequestHandler):
    async def get(self) -> None:
        await turns(50)


@web.stream_request_body
class Upload(web.RequestHandler):
    begun = 0

    async def data_received(self, chunk: bytes) -> None:
        Upload.begun += 1
        await turns(1)

    def post(self) -> None:
        self.write("taken")


class Kept(RawDelegate):
    """Refers to its request, as most delegates do, so that `release` has to break the cycle."""

    def __init__(self, request: Request) -> None:
        self.request = request

    def run(self, body: bytes) -> None:
        if self.request.target == b"/raw":
            self.request.respond(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    def hung_up(self) -> None:
        pass


class Application(web.Application):
    def __init__(self) -> None:
        super().__init__(
            [
                ("/plain", Plain),
                ("/streamed", Streamed),
                ("/waiting", Waiting),
                ("/upload", Upload),
                ("/ws", Echo, {"log": []}),
            ],
            log_function=lambda handler: None,
        )

    def start_raw_request(self, request: Request) -> RawDelegate | None:
        if request.target.startswith(b"/raw"):
            return Kept(request)
        if request.target == b"/now":
            request.respond(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            return ANSWERED
        return None


async def _requests(served: Served, *messages: bytes, count: int = 10) -> None:
    client = await served.connect()
    for data in messages * count:
        await client.send(data)
        await client.response()
    await client.close()


async def _raw(served: Served) -> None:
    await _requests(served, request("/raw"), request("/raw", body=b"abc"), request("/now"))
    await _requests(served, chunked("/raw", b"abc", b"defg"), request("/now", body=b"abc"))


async def _handler(served: Served) -> None:
    await _requests(served, request("/plain"), request("/plain", method="POST", body=b"abc"))


async def _streamed(served: Served) -> None:
    await _requests(served, request("/streamed"))


async def _upload(served: Served) -> None:
    await _requests(served, chunked("/upload", b"x" * 20_000, b"y"))


async def _pipelined(served: Served) -> None:
    client = await served.connect()
    await client.send((request("/plain") + request("/raw") + request("/waiting")) * 10)
    for _ in range(30):
        await client.response()
    await client.close()


async def _refused(served: Served) -> None:
    for data in (
        b"BROKEN\0\r\n\r\n",
        request("/raw", method="FOO"),
        request("/" + "a" * 9000),
        request("/plain", *["A: b"] * 200),
        request("/plain", "Content-Length: 999999", method="POST"),
        request("/raw", "Content-Length: 999999", method="POST"),
        request("/raw-waiting") + b"BROKEN\0\r\n\r\n",
        chunked("/raw", b"abc")[:-9] + b"BROKEN",
        chunked("/plain", b"abc")[:-9] + b"BROKEN",
    ):
        client = await served.connect()
        await client.dribble(data)
        if not data.startswith(b"GET /raw-waiting"):
            await client.response()
        await client.close()


async def _hang_up(served: Served) -> None:
    for path in ("/raw-waiting", "/waiting", "/ws"):
        for leave in (Client.half_close, Client.reset):
            client = await served.connect()
            await client.dribble(request(path), request(path))
            leave(client)
            await client.closed()
            await client.close()
    for path in ("/raw", "/plain"):
        client = await served.connect()
        await client.dribble(request(path, "Content-Length: 10", method="POST") + b"abc")
        await client.close()


async def _aborted_upload(served: Served) -> None:
    client, before = await served.connect(), Upload.begun
    await client.dribble(request("/upload", "Content-Length: 10", method="POST") + b"abc")
    await until(lambda: Upload.begun > before)
    await client.close()
    await turns(10)


async def _websocket(served: Served) -> None:
    client = await served.connect()
    await opened(client)
    await client.send(frame(b"hello"))
    await message(client)
    await client.send(frame(b"\x03\xe8", 8))
    await message(client)
    await client.close()


async def _nothing(served: Served) -> None:
    await (await served.connect()).close()


KINDS = [
    _nothing,
    _raw,
    _handler,
    _streamed,
    _upload,
    _pipelined,
    _refused,
    _hang_up,
    _websocket,
]


@pytest.mark.parametrize("work", KINDS, ids=lambda work: work.__name__.strip("_"))
async def test_no_cycles_are_left(work: Callable[[Served], Awaitable[None]]) -> None:
    """With collection off, many rounds leave nothing of this package for it to find.

    Whatever a full collection finds is looked at: none of it is ours, and there is no
    more of it than a few objects a round, made by Tornado, asyncio or the client.
    """
    async with serve("http1", Application()) as served:
        await work(served)  # caches, imports
        served._clients.clear()
        await until(lambda: served.server.open_connections == 0)
        await turns(60)
        found = await _collected(served, work)
        ours = {name: n for name, n in found.items() if name.startswith(("keypool.http.http1.", "httptools"))}
        assert ours == {}
        assert found.get("http1.test_garbage.Kept", 0) == 0


async def test_an_aborted_streamed_upload_leaves_tornados_own_cycle(kind: str) -> None:
    """The one cycle left, on either server: handler, its body future, the future's exception.

    `RequestHandler._execute` awaits ``request._body_future``, which keeps the exception it
    raised, whose traceback keeps the frame, which keeps the handler. Of ours it holds
    the opaque server connection, which by then is but a shell.
    """
    async with serve(kind, Application()) as served:
        await _aborted_upload(served)
        served._clients.clear()
        await turns(60)
        found = await _collected(served, _aborted_upload)
        assert found["http1.test_garbage.Upload"] == ROUNDS
        assert found["keypool.http.http1.request.Request"] == 0
        assert found["uvloop.loop.TCPTransport"] == 0


async def _collected(served: Served, work: Callable[[Served], Awaitable[None]]) -> Counter[str]:
    gc.disable()
    gc.freeze()  # what is there already isn't looked at
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(ROUNDS):
            await work(served)
            served._clients.clear()
        await turns(60)
        gc.collect()
        return Counter(_name(item) for item in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.unfreeze()
        gc.enable()


def _name(item: Any) -> str:
    kind = type(item)
    if isinstance(item, types.FrameType):
        return f"frame of {item.f_code.co_qualname}"
    if isinstance(item, types.FunctionType | types.MethodType):
        return f"{item.__module__}.{item.__qualname__}"
    if isinstance(item, asyncio.Future):
        return f"{kind.__name__} {item!r}"[:60]
    return f"{kind.__module__}.{kind.__qualname__}"
