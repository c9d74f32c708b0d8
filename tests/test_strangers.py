"""Limits for unauthenticated clients on either HTTP server: time for a head, a body and an answer, connections, memory.

The server is the real application with limits short enough to wait for. The tests wait for events, not for times;
a limit that must not be reached is far longer than the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import socket
import tracemalloc
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
import uvloop
from tornado.netutil import bind_sockets

from keypool.api.auth import Access
from keypool.config import limits
from keypool.config.limits import Limits
from keypool.engine.embedded import EmbeddedEngine
from keypool.engine.pools import EmbeddedPools
from keypool.http.http1.connection_limiter import ConnectionLimiter
from keypool.server.app import make_app
from keypool.server.serving import SERVERS, HttpServer

SOON, NEVER = 0.1, 3600.0
make_server = SERVERS["fast"]


@pytest.fixture(autouse=True, params=list(SERVERS))
def _on_each_server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "make_server", SERVERS[request.param])


HEAD = b"POST /api/v1/keys HTTP/1.1\r\nHost: localhost\r\n"


def lasting(**changed: float) -> Limits:
    """Time limits that are never reached, except for those that are given."""
    times = dict.fromkeys(("head_seconds", "body_seconds", "idle_seconds", "write_seconds"), NEVER)
    return Limits(**(times | {"sweep_seconds": 0.02, "linger_seconds": SOON} | changed))  # type: ignore[arg-type] # some are whole


@dataclass
class Served:
    """A server of one test."""

    port: int
    server: HttpServer
    engine: EmbeddedEngine
    wires: list[Wire] = field(default_factory=list)

    async def call(self) -> Wire:
        """A new connection, closed at the latest when the test ends."""
        wire = Wire(*await asyncio.open_connection("127.0.0.1", self.port))
        self.wires.append(wire)
        return wire

    async def ask_at_once(self, data: bytes) -> Wire:
        """A new connection that has sent this long before SOON. Another one if this process was held up meanwhile."""
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            wire = await self.call()
            await wire.send(data)
            for _ in range(10):
                await asyncio.sleep(0)  # the server, which is in this loop, reads it
            if loop.time() - began < SOON / 2:
                return wire
            await wire.close()

    async def until_inside(self, count: int) -> None:
        """Wait until so many connections are in."""
        async with asyncio.timeout(30):
            while self.server.limiter.count != count:  # noqa: ASYNC110 - the server has no reason to tell
                await asyncio.sleep(0.01)


@dataclass
class Wire:
    """A client's end."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        """Write."""
        self.writer.write(data)
        await self.writer.drain()

    async def rest(self) -> bytes:
        """All that comes until the server hangs up."""
        try:
            return await asyncio.wait_for(self.reader.read(-1), 30)
        except ConnectionError:
            return b""

    async def answer(self) -> tuple[int, bytes]:
        """Status and body of one answer."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 30)
        length = next(
            int(line.partition(b":")[2])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length")
        )
        return int(head.split()[1]), await self.reader.readexactly(length)

    async def close(self) -> None:
        """Hang up."""
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


@asynccontextmanager
async def serving(limits: Limits, access: Access | None = None) -> AsyncIterator[Served]:
    """The application on the server that the test is run with."""
    engine = EmbeddedEngine()
    app = make_app(EmbeddedPools(engine), access or Access())
    server = make_server(app, limits)
    sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    try:
        served = Served(sockets[0].getsockname()[1], server, engine)
        yield served
        for wire in served.wires:
            await wire.close()
        await served.until_inside(0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(30):  # a batch that was begun runs to its end, whoever has hung up
                while app.settings["in_flight"].count:  # noqa: ASYNC110 - nothing notifies of it
                    await asyncio.sleep(0.01)
        assert app.settings["in_flight"].count == 0, "a request was counted in or out twice"
    finally:
        server.stop()
        await server.close_all_connections()
        await engine.close()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test's coroutine on a loop of its own."""
    asyncio.run(test())


def expect_timeout(answer: bytes) -> None:
    """Fails unless the answer is the problem request-timeout, whole, on a connection that ends with it."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 "), answer
    assert b"Connection: close" in head, answer
    problem = msgspec.json.decode(body)
    assert problem["code"] == "request-timeout", answer
    assert problem["status"] == 408, answer
    assert f"X-Request-Id: {problem['request_id']}".encode() in head, answer


# ------------------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize(
    "sent", [b"G", HEAD, HEAD + b"X-Slow: yes\r"], ids=["a letter", "a line", "nearly all"]
)
def test_a_head_that_does_not_come_is_408(sent: bytes) -> None:
    """Whatever part of it has come."""

    async def test() -> None:
        async with serving(lasting(head_seconds=SOON)) as served:
            wire = await served.ask_at_once(sent)
            expect_timeout(await wire.rest())

    run(test)


def test_a_head_that_drips_is_408_all_the_same() -> None:
    """A byte now and then buys no time."""

    async def test() -> None:
        async with serving(lasting(head_seconds=SOON)) as served:
            wire = await served.call()
            await wire.send(HEAD)

            async def drip() -> None:
                while True:
                    await wire.send(b"X: y\r\n")
                    await asyncio.sleep(0.01)

            dripping = asyncio.ensure_future(drip())
            assert b" 408 " in (await wire.rest() or b" 408 ")  # a byte under way may turn it into a reset
            dripping.cancel()
            await asyncio.gather(dripping, return_exceptions=True)
            await served.until_inside(0)

    run(test)


def test_an_idle_connection_is_closed_without_an_answer() -> None:
    """At once when it is new, after the idle time when it has asked before; the other limit doesn't strike."""

    async def test() -> None:
        async with serving(lasting(head_seconds=SOON)) as served:
            assert await (await served.call()).rest() == b""
        async with serving(lasting(idle_seconds=SOON)) as served:
            fresh, wire = await served.call(), await served.call()
            await wire.send(HEAD + b"\r\n")
            assert (await wire.answer())[0] == 201
            assert await wire.rest() == b""
            await fresh.send(HEAD + b"\r\n")
            assert (await fresh.answer())[0] == 201

    run(test)


def test_the_next_head_of_a_connection_has_its_own_time() -> None:
    """It begins with its first byte, however long the connection was idle."""

    async def test() -> None:
        async with serving(lasting(head_seconds=SOON)) as served:
            wire = await served.ask_at_once(HEAD + b"\r\n")
            assert (await wire.answer())[0] == 201
            await wire.send(HEAD)
            expect_timeout(await wire.rest())

    run(test)


@pytest.mark.parametrize("form", ["length", "chunked"])
def test_a_body_that_does_not_come_is_408(form: str) -> None:
    """The first version's paths have `message` there as everywhere."""

    async def test() -> None:
        async with serving(lasting(body_seconds=SOON)) as served:
            framing = (
                b"Content-Length: 9\r\n\r\n{"
                if form == "length"
                else b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"
            )
            wire = await served.call()
            await wire.send(HEAD + b"X-Request-Id: mine\r\n" + framing)
            answer = await wire.rest()
            expect_timeout(answer)
            assert b'"request_id":"mine"' in answer
            legacy = await served.call()
            await legacy.send(HEAD.replace(b"keys", b"random_api_key/") + framing)
            answer = await legacy.rest()
            expect_timeout(answer)
            assert b'"message"' in answer
            assert served.engine.pool.total == 0

    run(test)


def test_an_error_in_the_head_is_reported_before_a_slow_body() -> None:
    """Without a token the answer is 401, not 408."""

    async def test() -> None:
        async with serving(lasting(body_seconds=SOON), Access(admin=["a" * 16])) as served:
            wire = await served.call()
            await wire.send(HEAD + b"Content-Length: 9\r\n\r\n{")
            assert b" 401 " in (await wire.rest()).partition(b"\r\n")[0]

    run(test)


def test_a_refusal_sent_before_the_body_is_the_only_answer() -> None:
    """A client that asks before it sends the body (Expect) is refused at once, and counted once."""

    async def test() -> None:
        async with serving(lasting(body_seconds=SOON), Access(admin=["a" * 16])) as served:
            wire = await served.call()
            await wire.send(HEAD + b"Content-Length: 9\r\nExpect: 100-continue\r\n\r\n")
            assert (await wire.rest()).count(b"HTTP/1.1") == 1

    run(test)


def test_a_pipelined_caller_that_reads_nothing_is_cut() -> None:
    """Answers that the peer doesn't read aren't kept."""

    async def test() -> None:
        async with serving(lasting(write_seconds=SOON)) as served:
            await served.engine.generate(500)
            raw = socket.create_connection(("127.0.0.1", served.port))
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.setblocking(False)
            raw.send(b"GET /api/v1/keys?limit=500 HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500)
            async with asyncio.timeout(30):
                while served.server.limiter.count != 1:  # noqa: ASYNC110 - it may be cut soon: each turn looks
                    await asyncio.sleep(0)
            await served.until_inside(0)
            raw.close()

    run(test)


def test_waiting_for_a_key_is_not_limited() -> None:
    """A waiter has sent its whole request: none of these limits applies to it."""

    async def test() -> None:
        short = lasting(head_seconds=SOON, body_seconds=SOON, idle_seconds=SOON, write_seconds=SOON)
        async with serving(short) as served:
            body = b'{"wait":0.5}'
            head = HEAD.replace(b"keys", b"keys/acquire") + b"Content-Length: %d\r\n\r\n" % len(body)
            wire = await served.ask_at_once(head + body)
            status, told = await wire.answer()
            assert status == 404, told

    run(test)


def test_a_caller_makes_progress_beside_floods() -> None:
    """For each of its calls few of theirs are served, though each has many there and all cost much."""
    keys = b",".join([b'"a"'] * 1000)
    batch = b'{"op":"keepalive","keys":[%b]}' % keys
    flood = HEAD.replace(b"keys", b"batch") + b"Content-Length: %d\r\n\r\n%b" % (len(batch), batch)

    async def test() -> None:
        async with serving(lasting()) as served:
            begun, keepalive_many = [], served.engine.keepalive_many

            def counted(refs: Any) -> Any:
                begun.append(refs)
                return keepalive_many(refs)

            served.engine.keepalive_many = counted  # type: ignore[method-assign]
            caller = await served.call()
            for wire in [await served.call() for _ in range(20)]:
                wire.writer.write(flood * 200)
            while len(begun) < 20:  # noqa: ASYNC110 - nothing notifies of it
                await asyncio.sleep(0)
            before = len(begun)
            for _ in range(10):
                await caller.send(HEAD + b"\r\n")
                assert (await caller.answer())[0] == 201
            assert len(begun) - before <= 10 * 20
            for wire in served.wires[1:]:
                wire.writer.transport.abort()

    run(test)


# ----------------------------------------------------------------------------------------------------- memory


def test_unfinished_requests_are_bounded_together() -> None:
    """Beyond it the largest are cut, and the others live."""

    async def test() -> None:
        # Any two of the large ones fit and no three do, in whatever pieces they arrive.
        async with serving(lasting(unfinished_bytes=300_000)) as served:
            small = await served.call()
            await small.send(HEAD)
            large = [await served.call() for _ in range(4)]
            for wire in large[:2]:
                await wire.send(HEAD + b"X: " + b"y" * 120_000)
            for wire in large[2:]:
                await wire.send(HEAD + b"Content-Length: 200000\r\n\r\n" + b" " * 140_000)
            await served.until_inside(3)
            await small.send(b"\r\n")
            assert (await small.answer())[0] == 201

    run(test)


NUMBERS = itertools.count()
LONG: dict[str, Callable[[int, int], bytes]] = {
    "names": lambda number, size: (
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n%b: 1\r\n\r\n" % (b"x%d" % number).ljust(size, b"x")
    ),
    "names of the API": lambda number, size: HEAD + (b"x%d" % number).ljust(size, b"x") + b": 1\r\n\r\n",
    "hosts": lambda number, size: (
        b"POST /api/v1/keys HTTP/1.1\r\nHost: %b\r\n\r\n" % (b"x%d" % number).ljust(size, b"x")
    ),
    "lines": lambda number, size: HEAD + b"a:\r\n" * (size // 10) + b"x: %d\r\n\r\n" % number,
    "parts of a form": lambda number, size: _form((b"x%d" % number).ljust(size, b"x")),
}


def _form(name: bytes) -> bytes:
    body = b'--b\r\nContent-Disposition: form-data; name="a"\r\n%b: 1\r\n\r\n1\r\n--b--\r\n' % name
    head = b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", LONG)
def test_caches_keep_nothing_long_that_a_stranger_sends(kind: str) -> None:
    """Caches of names, hosts and whole heads, the framework's own among them, keep what is short."""

    async def test() -> None:
        async with serving(lasting(), Access(admin=["a" * 16])) as served:

            async def ask(size: int, count: int) -> None:
                for _ in range(count):
                    wire = await served.call()
                    with contextlib.suppress(ConnectionError):
                        await wire.send(LONG[kind](next(NUMBERS), size))
                        wire.writer.write_eof()
                    await wire.rest()
                    await wire.close()
                served.wires.clear()
                await served.until_inside(0)
                gc.collect()

            await ask(20, 20)
            tracemalloc.start()
            try:
                await ask(9_000, 100)
                kept, _ = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert kept < 500_000

    run(test)


def test_a_name_that_is_too_long_is_431() -> None:
    """A problem, as for all that is too large, and the end of the connection; one of 256 bytes is read."""

    async def test() -> None:
        async with serving(lasting()) as served:
            wire = await served.call()
            await wire.send(HEAD + b"x" * 256 + b": 1\r\n\r\n")
            assert (await wire.answer())[0] == 201
            await wire.send(b"\r\n" + HEAD + b"x" * 257 + b": 1\r\n\r\n")
            answer = await wire.rest()
            assert answer.startswith(b"HTTP/1.1 431 ")
            assert b'"code":"headers-too-large"' in answer
            long_target = await served.call()
            await long_target.send(
                b"\r\nGET /api/v1/keys?" + b"x" * 300 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
            )
            assert (await long_target.answer())[0] == 400

    run(test)


# ------------------------------------------------------------------------------------------------ connections


def test_more_connections_than_there_may_be_are_closed_at_once() -> None:
    """And there is room again when one leaves."""

    async def test() -> None:
        async with serving(lasting(connections=2)) as served:
            inside = [await served.call() for _ in range(2)]
            for wire in inside:
                await wire.send(HEAD + b"\r\n")
                assert (await wire.answer())[0] == 201
            assert await (await served.call()).rest() == b""
            assert served.server.limiter.refused == 1
            await inside[0].close()
            await served.until_inside(1)
            late = await served.call()
            await late.send(HEAD + b"\r\n")
            assert (await late.answer())[0] == 201

    run(test)


HANDSHAKE = (
    b"GET /api/v1/feed HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def test_a_viewer_is_counted_until_it_has_disconnected() -> None:
    """A websocket has a descriptor as any connection has, whoever reads from it now."""

    async def test() -> None:
        async with serving(lasting(connections=2)) as served:
            viewers = [await served.call() for _ in range(2)]
            for viewer in viewers:
                await viewer.send(HANDSHAKE)
                assert (await viewer.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
            assert served.server.limiter.count == 2
            assert await (await served.call()).rest() == b""
            await viewers[0].close()
            await served.until_inside(1)
            caller = await served.call()
            await caller.send(HEAD + b"\r\n")
            assert (await caller.answer())[0] == 201

    run(test)


def test_viewers_leave_room_for_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the connections that there may be; one viewer more is 429, whatever --max-viewers says."""
    few = lasting(connections=3)
    monkeypatch.setattr(
        "keypool.web.dashboard.allowed_viewers", lambda wanted, of: limits.allowed_viewers(wanted, few)
    )

    async def test() -> None:
        async with serving(few) as served:
            viewer = await served.call()
            await viewer.send(HANDSHAKE)
            assert (await viewer.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
            late = await served.call()
            await late.send(HANDSHAKE)
            assert (await late.answer())[0] == 429
            await late.send(HEAD + b"\r\n")
            assert (await late.answer())[0] == 201

    run(test)


def test_without_descriptors_the_log_has_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """However many connections come; they are closed, no traceback is written, and the server goes on after it."""
    resource = pytest.importorskip("resource")

    async def test() -> None:
        async with serving(lasting()) as served:
            wires = [socket.socket() for _ in range(20)]
            before = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (wires[-1].fileno() + 1, before[1]))
            try:
                for wire in wires:
                    wire.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        wire.connect(("127.0.0.1", served.port))
                await asyncio.sleep(0.2)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
                for wire in wires:
                    wire.close()
            caller = await served.call()
            await caller.send(HEAD + b"\r\n")
            assert (await caller.answer())[0] == 201
            await caller.close()
            await served.until_inside(0)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # asyncio's own loop is less quiet
        runner.run(test())
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) <= 1
    assert not any(record.exc_info for record in warnings)


def test_an_address_has_its_share_and_loopback_is_not_counted() -> None:
    """An IPv6 network of 64 bits is one address; an IPv4 one in IPv6's clothes is itself."""
    limiter = ConnectionLimiter(Limits(connections_per_address=2))
    assert [limiter.enter("192.0.2.1") for _ in range(3)] == [True, True, False]
    assert not limiter.enter("::ffff:192.0.2.1")
    assert [limiter.enter(f"2001:db8::{host}") for host in "123"] == [True, True, False]
    assert limiter.enter("2001:db8:0:1::1")
    assert all(limiter.enter("127.0.0.1") and limiter.enter("::1") for _ in range(5))
    limiter.leave("192.0.2.1")
    assert limiter.enter("192.0.2.1")
    assert limiter.count == 15
    assert limiter.refused == 3


def test_the_system_may_allow_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some files are kept for what isn't a connection; the soft limit is raised as far as it goes."""
    resource = pytest.importorskip("resource")
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda what, pair: asked.append(pair))
    monkeypatch.setattr(resource, "getrlimit", lambda what: (100, 1000))
    assert limits.allowed_connections(Limits(connections=5000)) == 1000 - 64
    assert asked == [(1000, 1000)]
    monkeypatch.setattr(resource, "getrlimit", lambda what: (100, -1))
    assert limits.allowed_connections(Limits(connections=5000)) == 5000
    monkeypatch.setattr(resource, "getrlimit", lambda what: (-1, -1))
    assert limits.allowed_connections(Limits(connections=5000)) == 5000
