"""Requests that are sent without waiting are answered in order, within bounds."""

from __future__ import annotations

import asyncio
import random

import pytest
from tornado import web

from http1.harness import chunked, request, serve, turns, until
from keypool.http.http1 import ANSWERED, RawDelegate, Request


class Handler(web.RequestHandler):
    """Answers with its path: at once, after some turns of the loop, or piece by piece."""

    async def get(self, kind: str, number: str) -> None:
        if kind == "slow":
            await turns(int(number) % 7 + 1)
        if kind == "streamed":
            for digit in number:
                self.write(digit)
                await self.flush()
        else:
            self.write(number)

    post = get


class Waiting(RawDelegate):
    """A raw request that is answered from elsewhere."""

    def run(self, body: bytes) -> None:
        pass

    def hung_up(self) -> None:
        pass


class Application(web.Application):
    """Counts what is being worked on at the same time on one connection."""

    def __init__(self) -> None:
        super().__init__([("/(fast|slow|streamed)/([0-9]+)", Handler)], log_function=lambda handler: None)
        self.started = 0

    def start_raw_request(self, request: Request) -> RawDelegate | None:
        _, kind, number = request.target.split(b"/")
        self.started += 1
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(number), number)
        if kind == b"raw":
            request.respond(answer)
            return ANSWERED
        if kind == b"late":
            asyncio.get_running_loop().call_later(0.001, request.respond, answer)
            return Waiting()
        return None


KINDS = ["fast", "slow", "streamed"]


@pytest.mark.parametrize("seed", range(5))
async def test_a_hundred_mixed_requests_are_answered_in_order(kind: str, seed: int) -> None:
    """Slow and fast handlers, with and without bodies, sent at once."""
    rng = random.Random(seed)
    kinds = KINDS + (["raw", "late"] if kind == "http1" else [])
    async with serve(kind, Application()) as served:
        client = await served.connect()
        data = b""
        for number in range(100):
            path = f"/{rng.choice(kinds)}/{number}"
            form = rng.randrange(3)
            if form == 0:
                data += request(path)
            elif form == 1:
                data += request(path, method="POST", body=b"x" * rng.randrange(2000))
            else:
                data += chunked(path, b"x" * rng.randrange(1, 2000), b"y")
        sending = asyncio.ensure_future(client.send(data))
        for number in range(100):
            assert (await client.response()).body == str(number).encode()
        await sending


async def test_pipelined_requests_wait_unparsed() -> None:
    """Behind a pending request only a bounded part of what is sent is taken in."""
    application = Application()
    hung: list[Request] = []
    start = application.start_raw_request

    def hang_first(request: Request) -> RawDelegate | None:
        if hung:
            return start(request)
        hung.append(request)
        return Waiting()

    application.start_raw_request = hang_first  # type: ignore[method-assign]
    async with serve("http1", application) as served:
        client = await served.connect()
        count = 100_000
        sending = asyncio.ensure_future(client.send(request("/raw/1") * count))
        await until(lambda: hung)
        connection = next(iter(served.server._connections))
        await asyncio.sleep(0.2)
        await until(lambda: connection._read_paused and not connection._scheduled)
        assert not sending.done()
        assert len(connection._held) <= 512 * 1024
        assert len(connection._queue) < 400
        assert application.started == 0
        hung[0].respond(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1")
        for _ in range(count):
            assert (await client.response()).body == b"1"
        await sending


async def test_one_busy_client_leaves_turns_to_others() -> None:
    """A flood of pipelined requests does not keep another client waiting for its end."""
    application = Application()
    async with serve("http1", application) as served:
        flood, other = await served.connect(), await served.connect()
        sending = asyncio.ensure_future(flood.send(request("/raw/1") * 50_000))
        await until(lambda: application.started)
        before = application.started
        assert (await other.get("/raw/2")).body == b"2"
        assert application.started - before < 10_000
        for _ in range(50_000):
            await flood.response()
        await sending


async def test_large_bodies_behind_a_pending_request_wait() -> None:
    """Bodies of queued requests are held within a bound, then read on."""
    application = Application()
    async with serve("http1", application) as served:
        client = await served.connect()
        body = b"x" * 200_000
        data = request("/slow/6") + request("/fast/2", method="POST", body=body)
        data += chunked("/slow/5", *[b"y" * 20_000] * 10)
        sending = asyncio.ensure_future(client.send(data))
        for expected in (b"6", b"2", b"5"):
            assert (await client.response()).body == expected
        await sending


async def test_a_refusal_waits_for_its_turn() -> None:
    """Earlier answers come first, complete, then the refusal, then the end."""
    async with serve("http1", Application()) as served:
        client = await served.connect()
        await client.send(request("/slow/6") + request("/late/2") + b"GET BROKEN\0\r\n\r\n")
        assert (await client.response()).body == b"6"
        assert (await client.response()).body == b"2"
        assert (await client.response()).status == 400
        assert await client.closed()


async def test_what_is_queued_behind_a_closing_answer_is_not_served() -> None:
    """An answer that ends the connection is the last, though more was parsed already."""
    started: list[Request] = []

    class Closing(web.Application):
        def start_raw_request(self, request: Request) -> RawDelegate:
            started.append(request)
            return Waiting()

    async with serve("http1", Closing()) as served:
        client = await served.connect()
        await client.send(request("/1") + request("/2") + request("/3"))
        await until(lambda: started)
        await turns(5)
        started[0].respond(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", close=True)
        assert (await client.response())["connection"] == "close"
        assert await client.closed()
        assert len(started) == 1


async def test_expect_is_answered_in_turn() -> None:
    """100 Continue for a queued request comes behind the answer before it."""
    async with serve("http1", Application()) as served:
        client = await served.connect()
        expecting = request("/fast/2", "Expect: 100-continue", "Content-Length: 3", method="POST")
        await client.send(request("/late/1") + expecting)
        assert (await client.head())[0] == 200
        assert await client.reader.readexactly(1) == b"1"
        assert (await client.head())[0] == 100
        await client.send(b"abc")
        assert (await client.response()).body == b"2"
