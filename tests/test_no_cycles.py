"""All objects of the server are freed by reference count. A full garbage collection, which would visit every key,
finds nothing, and so the server can do without it (keypool/server/runtime.py).

The real application runs on a loopback socket in this process, with the collector off, and is driven through each
kind of request some dozen times. Then the collector says what was left, by type: a cycle a request shows after ten as
well as after thousands. The client here is as plain as can be, so that what is found is the server's.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import socket
import sys
import types
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

import pytest
from engine_support import quiet, turns_until
from tornado.netutil import bind_sockets

from keypool.api import wrong_tokens
from keypool.api.auth import Access
from keypool.engine.durable.opening import open_durable
from keypool.engine.embedded import EmbeddedEngine
from keypool.engine.pools import EmbeddedPools
from keypool.server.app import make_app
from keypool.server.serving import SERVERS, HttpServer

API: Final = "/api/v1"
make_server = SERVERS["fast"]
TIMES: Final = 40
WARM_UP: Final = 10
TOKENS: Final = {"client": "client-token-4c1e07a9", "viewer": "viewer-token-77a1c5d2"}


# --------------------------------------------------------------------------------------------------- the client


class Wire:
    """A connection of a client that does no more than it must."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._read = b""

    @classmethod
    async def connect(cls, port: int) -> Self:
        """A new connection."""
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        return cls(sock)

    async def send(self, raw: bytes) -> None:
        """Bytes as they are."""
        await asyncio.get_running_loop().sock_sendall(self._sock, raw)

    async def answer(self, head: bool = False) -> tuple[int, bytes]:
        """The next answer, status and body; status 0 if the server closes instead."""
        while b"\r\n\r\n" not in self._read:
            if not await self._more():
                return 0, b""
        top, _, self._read = self._read.partition(b"\r\n\r\n")
        length = 0
        for line in top.lower().split(b"\r\n"):
            if line.startswith(b"content-length:") and not head:
                length = int(line[15:])
        while len(self._read) < length:
            if not await self._more():
                return 0, b""
        body, self._read = self._read[:length], self._read[length:]
        return int(top[9:12]), body

    async def _more(self) -> bool:
        data = await asyncio.get_running_loop().sock_recv(self._sock, 65536)
        self._read += data
        return bool(data)

    async def ask(self, method: str, path: str, body: Any = None, *headers: str) -> tuple[int, Any]:
        """A request and its answer, with the JSON of its body."""
        await self.send(request(method, path, body, *headers))
        status, raw = await self.answer(method == "HEAD")
        return status, json.loads(raw) if raw else None

    def close(self) -> None:
        """Hang up."""
        self._sock.close()


def request(method: str, path: str, body: Any = None, *headers: str) -> bytes:
    """A request as bytes."""
    content = b"" if body is None else json.dumps(body).encode()
    own = [] if any(header.startswith("Host:") for header in headers) else ["Host: localhost"]
    if content or method not in ("GET", "HEAD"):
        own.append(f"Content-Length: {len(content)}")
    lines = [f"{method} {path} HTTP/1.1", *own, *headers, "", ""]
    return "\r\n".join(lines).encode() + content


@dataclass
class Session:
    """A server, and clients of it."""

    engine: EmbeddedEngine
    port: int
    guarded_port: int
    wire: Wire
    other: Wire
    guarded: Wire
    in_flight: list[Any] = field(default_factory=list)

    async def expect(self, status: int, method: str, path: str, body: Any = None, *headers: str) -> Any:
        """The JSON of an answer that has this status."""
        got, answer = await self.wire.ask(method, path, body, *headers)
        assert got == status, f"{method} {path}: {got} {answer}"
        return answer

    async def make(self) -> Any:
        """A key."""
        return await self.expect(201, "POST", API + "/keys")

    async def acquire(self) -> Any:
        """A lease."""
        return await self.expect(200, "POST", API + "/keys/acquire", {"owner": "ann"})

    async def wait_in_queue(self, count: int = 1) -> None:
        """Until so many wait for a key."""
        await turns_until(lambda: len(self.engine._waiters.queue) == count, f"{count} wait for a key")

    async def fresh(self) -> Wire:
        """A connection of its own."""
        return await Wire.connect(self.port)


# -------------------------------------------------------------------------------------------- kinds of requests

Act = Callable[[Session], Awaitable[None]]


async def generate_and_delete(session: Session) -> None:
    made = await session.make()
    await session.expect(204, "DELETE", f"{API}/keys/id:{made['id']}")


async def acquire_and_unblock(session: Session) -> None:
    lease = await session.acquire()
    await session.expect(200, "POST", f"{API}/keys/{lease['key']}/unblock", {"lease": lease["lease"]})


async def keepalive(session: Session) -> None:
    await session.expect(200, "POST", f"{API}/keys/id:1/keepalive")


async def look(session: Session) -> None:
    await session.expect(200, "GET", f"{API}/keys/id:1")
    await session.expect(200, "HEAD", f"{API}/keys/id:1")
    await session.expect(200, "POST", f"{API}/keys/id:1/reveal")
    await session.expect(200, "GET", f"{API}/stats")


async def list_pages(session: Session) -> None:
    page = await session.expect(200, "GET", f"{API}/keys?limit=1&order=expiry")
    await session.expect(200, "GET", f"{API}/keys?limit=1&order=expiry&after={page['next']}")
    await session.expect(200, "GET", f"{API}/keys?prefix=A&state=available")


async def batches(session: Session) -> None:
    made = await session.expect(201, "POST", f"{API}/batch", {"op": "generate", "count": 3})
    keys = [key["key"] for key in made["keys"]]
    leases = await session.expect(200, "POST", f"{API}/batch", {"op": "acquire", "count": 2})
    items = [{"key": lease["key"], "lease": lease["lease"]} for lease in leases["keys"]]
    await session.expect(200, "POST", f"{API}/batch", {"op": "unblock", "keys": [*items, "nobody"]})
    await session.expect(200, "POST", f"{API}/batch", {"op": "keepalive", "keys": [*keys, "nobody"]})
    await session.expect(200, "POST", f"{API}/batch", {"op": "delete", "keys": [*keys, "nobody"]})


async def first_version(session: Session) -> None:
    key = (await session.expect(201, "POST", API + "/random_api_key/"))["api_key"]
    await session.expect(200, "HEAD", API + "/random_api_key/")
    taken = (await session.expect(200, "GET", API + "/random_api_key/"))["api_key"]
    await session.expect(200, "PUT", API + "/random_api_key/?api_key=" + taken)
    await session.expect(200, "DELETE", API + "/random_api_key/?api_key=" + key)
    await session.expect(400, "DELETE", API + "/random_api_key/?api_key=" + key)
    await session.expect(200, "GET", API + "/start_scheduler")


async def pages(session: Session) -> None:
    await session.expect(200, "GET", "/healthz")
    await session.expect(200, "HEAD", "/healthz")
    await session.expect(200, "GET", "/readyz")
    await session.expect(204, "OPTIONS", "/readyz")


async def dashboard(session: Session) -> None:
    for path in ("/", "/keys", "/keys/1", "/events", "/system", "/calls", "/login"):
        await _look_at(session, path)


async def figures(session: Session) -> None:
    for path in ("/metrics", "/figures", API + "/openapi.json"):
        await _look_at(session, path)


async def _look_at(session: Session, path: str) -> None:
    await session.wire.send(request("GET", path))
    status, _ = await session.wire.answer()
    assert status in (200, 303), f"GET {path}: {status}"


async def pages_refused(session: Session) -> None:
    await session.expect(404, "GET", "/nothing")
    await session.expect(405, "POST", "/healthz")
    await session.expect(421, "GET", "/healthz", None, "Host: evil.example")


async def options(session: Session) -> None:
    await session.expect(204, "OPTIONS", API + "/keys/acquire")


async def unknown_key(session: Session) -> None:
    await session.expect(404, "GET", API + "/keys/nobody")
    await session.expect(404, "DELETE", API + "/keys/id:999999")
    await session.expect(404, "POST", API + "/keys/id:nonsense/keepalive")


async def stale_lease(session: Session) -> None:
    await session.expect(409, "POST", API + "/keys/id:1/unblock", {"lease": 10**9})


async def bad_bodies(session: Session) -> None:
    await session.expect(400, "POST", API + "/keys/acquire", {"owner": 7})
    await session.expect(400, "POST", API + "/keys", {"surprise": 1})
    await session.expect(400, "POST", API + "/batch")
    await session.expect(415, "POST", API + "/batch", {}, "Content-Type: text/plain")


async def bad_queries(session: Session) -> None:
    await session.expect(400, "GET", API + "/keys?after=nonsense")
    await session.expect(400, "GET", API + "/keys?limit=0")
    await session.expect(400, "GET", API + "/keys?surprise=1")


async def pool_full(session: Session) -> None:
    rules = session.engine.pool.rules
    session.engine.pool.rules = replace(rules, max_keys=session.engine.pool.total)
    await session.expect(409, "POST", API + "/keys")
    session.engine.pool.rules = rules


async def too_many_waiters(session: Session) -> None:
    session.engine._waiters._max_waiters = 0
    await session.expect(503, "POST", API + "/keys/acquire", {"wait": 5})


async def body_too_large(session: Session) -> None:
    await session.expect(413, "POST", API + "/batch", {"op": "x" * 300_000})


async def pipelined(session: Session) -> None:
    await session.wire.send(request("GET", API + "/stats") * 3)
    for _ in range(3):
        assert (await session.wire.answer())[0] == 200


async def chunked_body(session: Session) -> None:
    head = f"POST {API}/batch HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = '1a\r\n{"op":"keepalive","keys":[\r\n7\r\n"id:1"]\r\n1\r\n}\r\n0\r\n\r\n'
    await session.wire.send((head + chunks).encode())
    status, answer = await session.wire.answer()
    assert status == 200, answer


async def none_available(session: Session) -> None:
    await session.expect(404, "POST", API + "/keys/acquire")


async def wait_until_time_is_up(session: Session) -> None:
    await session.expect(404, "POST", API + "/keys/acquire", {"wait": 0.002})


async def wait_for_no_time(session: Session) -> None:
    await session.expect(404, "POST", API + "/keys/acquire", {"wait": 1e-6})


async def wait_and_be_served(session: Session) -> None:
    await session.other.send(request("POST", API + "/keys/acquire", {"wait": 30}))
    await session.wait_in_queue()
    await session.make()
    status, raw = await session.other.answer()
    assert status == 200, raw
    await session.expect(204, "DELETE", f"{API}/keys/id:{json.loads(raw)['id']}")


async def wait_and_hang_up(session: Session) -> None:
    wire = await session.fresh()
    await wire.send(request("POST", API + "/keys/acquire", {"wait": 30}))
    await session.wait_in_queue()
    wire.close()
    await session.wait_in_queue(0)


async def connect_and_close(session: Session) -> None:
    (await session.fresh()).close()


async def connect_ask_and_close(session: Session) -> None:
    wire = await session.fresh()
    assert (await wire.ask("GET", API + "/stats"))[0] == 200
    wire.close()


async def close_by_the_server(session: Session) -> None:
    wire = await session.fresh()
    assert (await wire.ask("GET", API + "/stats", None, "Connection: close"))[0] == 200
    assert (await wire.answer())[0] == 0
    wire.close()


async def nonsense(session: Session) -> None:
    wire = await session.fresh()
    await wire.send(b"nonsense\r\n\r\n")
    assert (await wire.answer())[0] in (0, 400, 501)
    wire.close()


async def cut_in_the_head(session: Session) -> None:
    wire = await session.fresh()
    await wire.send(b"GET /api/v1/stats HTTP/1.1\r\nHost: loc")
    wire.close()


async def cut_in_the_body(session: Session) -> None:
    wire = await session.fresh()
    await wire.send(request("POST", API + "/batch", {"op": "acquire", "count": 1})[:-5])
    wire.close()


async def early_refusal(session: Session) -> None:
    wire = await session.fresh()
    head = request("POST", API + "/keys/acquire", None, "Expect: 100-continue")
    await wire.send(head.replace(b"Content-Length: 0", b"Content-Length: 900000"))
    assert (await wire.answer())[0] == 413
    wire.close()


async def not_found(session: Session) -> None:
    await session.expect(404, "GET", API + "/nothing")
    await session.expect(404, "POST", API + "/nothing", {"a": 1})


async def method_not_allowed(session: Session) -> None:
    await session.expect(405, "GET", API + "/keys/acquire")


async def wrong_host(session: Session) -> None:
    await session.expect(421, "GET", API + "/stats", None, "Host: evil.example")


async def cross_site(session: Session) -> None:
    await session.expect(403, "POST", API + "/keys", None, "Origin: http://evil.example")


async def uri_too_long(session: Session) -> None:
    await session.expect(414, "GET", API + "/keys?" + "x" * 9000)


async def _guarded(session: Session, status: int, *headers: str) -> None:
    got, answer = await session.guarded.ask("POST", API + "/keys", None, *headers)
    assert got == status, answer


async def unauthorized(session: Session) -> None:
    await _guarded(session, 401)
    await _guarded(session, 401, "Authorization: Bearer nonsense")


async def forbidden(session: Session) -> None:
    await _guarded(session, 403, f"Authorization: Bearer {TOKENS['client']}")


@dataclass(frozen=True)
class Kind:
    """A kind of request. `keys` is how many the pool has; `durable` whether it is tried with a data file too."""

    act: Act
    keys: int = 4
    durable: bool = False


KINDS = [
    Kind(generate_and_delete, durable=True),
    Kind(acquire_and_unblock, durable=True),
    Kind(keepalive, durable=True),
    Kind(look, durable=True),
    Kind(list_pages),
    Kind(batches, durable=True),
    Kind(first_version),
    Kind(pages),
    Kind(pages_refused),
    Kind(figures),
    Kind(options),
    Kind(unknown_key, durable=True),
    Kind(stale_lease, durable=True),
    Kind(bad_bodies),
    Kind(bad_queries),
    Kind(pool_full),
    Kind(too_many_waiters, keys=0),
    Kind(body_too_large),
    Kind(pipelined),
    Kind(chunked_body),
    Kind(wait_and_be_served, keys=0, durable=True),
    Kind(wait_and_hang_up, keys=0),
    Kind(connect_and_close),
    Kind(connect_ask_and_close),
    Kind(close_by_the_server),
    Kind(nonsense),
    Kind(cut_in_the_head),
    Kind(cut_in_the_body),
    Kind(early_refusal),
    Kind(none_available, keys=0, durable=True),
    Kind(wait_until_time_is_up, keys=0, durable=True),
    Kind(wait_for_no_time, keys=0),
    Kind(not_found),
    Kind(method_not_allowed),
    Kind(wrong_host),
    Kind(cross_site),
    Kind(uri_too_long),
    Kind(unauthorized),
    Kind(forbidden),
]


# ----------------------------------------------------------------------------------------------- what is left


def name_of(found: object) -> str:
    """What an object is, as far as it helps to find where it was made."""
    if isinstance(found, types.FrameType):
        return f"frame of {found.f_code.co_qualname} ({Path(found.f_code.co_filename).name})"
    if isinstance(found, types.FunctionType):
        return f"function {found.__module__}.{found.__qualname__}"
    if isinstance(found, types.MethodType):
        return f"method {found.__func__.__qualname__}"
    if isinstance(found, types.CoroutineType):
        return f"coroutine {found.__qualname__}"
    return f"{type(found).__module__}.{type(found).__qualname__}"


@dataclass(frozen=True)
class Left:
    """What a collection found: how many objects by what they are, and their bytes."""

    counts: Counter[str]
    size: int

    def story(self, times: int) -> str:
        """For a failure."""
        total = self.counts.total()
        lines = [f"{total} objects, {self.size} bytes, after {times} times: {total / times:.1f} a time"]
        return "\n".join(lines + [f"{count:8} {name}" for name, count in self.counts.most_common(30)])


def collected() -> Left:
    """Collect, and return what was found."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
    finally:
        gc.set_debug(0)
    left = Left(Counter(map(name_of, gc.garbage)), sum(map(sys.getsizeof, gc.garbage)))
    gc.garbage.clear()
    return left


@contextmanager
def no_collector() -> Iterator[None]:
    """Turn automatic collection off: only `collected` collects, and only what comes from now on."""
    gc.disable()
    gc.collect()
    gc.freeze()  # what exists by now is not the test's own
    try:
        yield
    finally:
        gc.enable()


async def left_by(kind: Kind, engine: EmbeddedEngine, times: int) -> Left:
    """What is left of doing this so many times."""
    servers, ports, apps = [], [], []
    for access in (Access(), Access([TOKENS["client"]], [TOKENS["viewer"]], ["admin-token-0f5be8d36"])):
        app = make_app(EmbeddedPools(engine), access)
        server = make_server(app, None)
        sockets = bind_sockets(0, "127.0.0.1")
        server.add_sockets(sockets)
        servers.append(server)
        apps.append(app)
        ports.append(sockets[0].getsockname()[1])
    wires = [await Wire.connect(port) for port in (ports[0], ports[0], ports[1])]
    session = Session(engine, *ports, *wires)
    if kind.keys:
        await engine.generate(kind.keys)
    try:
        for _ in range(WARM_UP):
            await kind.act(session)
        await _settled(servers)
        gc.collect()
        for _ in range(times):
            await kind.act(session)
        await _settled(servers)
        left = collected()
        for app in apps:
            count = app.settings["in_flight"].count
            assert count == 0, f"{count} requests are counted as in flight, though all are over"
    finally:
        for wire in wires:
            wire.close()
        for server in servers:
            server.stop()
            await server.close_all_connections()
        await engine.close()
    return left


async def _settled(servers: list[HttpServer]) -> None:
    """Until all connections but the three are closed on the server's side as well, or these too, having idled."""
    async with asyncio.timeout(60):
        while sum(server.limiter.count for server in servers) > 3:  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.001)


def run_on(loop: str, main: Callable[[], Awaitable[Left]]) -> Left:
    """Run on uvloop or on the stock loop, with nothing logged that is an error."""

    async def limited() -> Left:
        return await asyncio.wait_for(main(), 120)

    with quiet(), no_collector():
        if loop == "uvloop":
            return pytest.importorskip("uvloop").run(limited())  # type: ignore[no-any-return]
        return asyncio.run(limited())


def expect_nothing_of(left: Left, times: int) -> None:
    """Fails if what is left grows with the number of requests."""
    assert left.counts.total() < times // 4, left.story(times)


RENDERED = pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="Jinja makes cycles: its Context holds its own bound method resolve_or_missing, and the macros of a page"
    " hold each other: some 50 objects and 6 KB a page, young enough to be collected but for 2 objects a page",
)


def _named(kinds: list[Kind]) -> list[Any]:
    return [pytest.param(kind, id=kind.act.__name__) for kind in kinds]


_OTHER_SERVERS = [pytest.param(name, marks=pytest.mark.thorough) for name in SERVERS if name != "fast"]


@pytest.fixture(autouse=True, params=["fast", *_OTHER_SERVERS])
def _on_each_server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "make_server", SERVERS[request.param])


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers to wrong tokens are held back, but not for long."""
    monkeypatch.setattr(wrong_tokens, "LONGEST", 0.0001)


@pytest.fixture(autouse=True)
def _no_audit() -> Iterator[None]:
    """The audit log is not what is tested here."""
    audit = logging.getLogger("keypool.audit")
    audit.disabled = True
    yield
    audit.disabled = False


@pytest.mark.parametrize(
    "kind", [*_named(KINDS), pytest.param(Kind(dashboard), id="dashboard", marks=RENDERED)]
)
def test_a_request_leaves_nothing_to_the_collector(kind: Kind) -> None:
    """On uvloop, with keys in memory: as many objects after forty requests as after none."""

    async def main() -> Left:
        return await left_by(kind, EmbeddedEngine(), TIMES)

    expect_nothing_of(run_on("uvloop", main), TIMES)


@pytest.mark.parametrize("kind", _named([kind for kind in KINDS if kind.durable]))
def test_a_durable_request_leaves_nothing_to_the_collector(kind: Kind, tmp_path: Path) -> None:
    """The same with a data file: calls wait for commits, and nothing of that stays either."""
    times = TIMES // 2

    async def main() -> Left:
        engine = (await open_durable(tmp_path / "keys.db")).default
        return await left_by(kind, engine, times)

    expect_nothing_of(run_on("uvloop", main), times)


def test_on_the_stock_loop_requests_leave_nothing_either() -> None:
    """Where there is no uvloop."""

    async def act(session: Session) -> None:
        if not session.engine.pool.total:
            await session.make()
        await acquire_and_unblock(session)
        await look(session)
        await unknown_key(session)
        if (
            make_server is not SERVERS["fast"]
        ):  # asyncio's own transports hold themselves, one cycle a connection
            await connect_ask_and_close(session)

    async def main() -> Left:
        return await left_by(Kind(act), EmbeddedEngine(), TIMES)

    expect_nothing_of(run_on("asyncio", main), TIMES)


def test_on_the_stock_loop_a_wait_that_ends_leaves_nothing_either() -> None:
    """The stock loop keeps a timer's arguments until its time has come."""

    async def main() -> Left:
        return await left_by(Kind(wait_until_time_is_up, keys=0), EmbeddedEngine(), TIMES)

    expect_nothing_of(run_on("asyncio", main), TIMES)


def test_a_cycle_would_be_found() -> None:
    """A cycle made on purpose is found, and reported by its type."""

    async def act(session: Session) -> None:
        await session.expect(200, "GET", API + "/stats")
        cycle: list[object] = [session.engine.pool.counters.__class__()]
        cycle.append(cycle)

    async def main() -> Left:
        return await left_by(Kind(act), EmbeddedEngine(), 50)

    left = run_on("uvloop", main)
    assert left.counts["builtins.list"] == 50, left.story(50)
