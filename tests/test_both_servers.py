"""The fast server and Tornado's give the same answers, to the byte, except for the date and the id of a request.

Each has an application of its own over an engine with a stopped clock and without randomness, so that the same
requests find the same pool. They are sent one after the other, on one connection as long as that stays open.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from dataclasses import dataclass

import pytest
from tornado.netutil import bind_sockets

from keypool.api.auth import Access
from keypool.config.limits import DISCARDED, MAX_BODY, MAX_HEADERS, MAX_TARGET
from keypool.core.handles import Handles
from keypool.engine.embedded import EmbeddedEngine
from keypool.engine.pools import EmbeddedPools
from keypool.server.app import make_app
from keypool.server.serving import SERVERS

ADMIN, VIEWER, CLIENT = "a" * 16, "v" * 16, "c" * 16
KEY = "Key{:017d}"
HANDLES = Handles(b"the same on both")
JSON = "Content-Type: application/json"
ATTEMPT = "Idempotency-Key: A1"


def ask(
    target: str,
    *lines: str,
    method: str = "POST",
    body: bytes = b"",
    host: str = "localhost",
    version: str = "1.1",
) -> bytes:
    """A request. A body gets its length, unless a line says how it comes."""
    head = [f"{method} {target} HTTP/{version}", *([f"Host: {host}"] if host else []), *lines]
    if body and not any(line.lower().startswith("transfer-encoding") for line in lines):
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def get(target: str, *lines: str, method: str = "GET") -> bytes:
    return ask(target, *lines, method=method)


def post(target: str, body: bytes, *lines: str) -> bytes:
    return ask(target, *lines, body=body)


def key(number: int) -> str:
    return f"/api/v1/keys/{KEY.format(number)}"


def handle(number: int, lease: int) -> str:
    return f"/api/v1/keys/{HANDLES.make(number, lease)}"


def by(token: str) -> str:
    return f"Authorization: Bearer {token}"


def chunked(body: bytes) -> bytes:
    return (
        b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:7], body[7:]) if part) + b"0\r\n\r\n"
    )


LIFE = {
    "nothing to acquire": ask("/api/v1/keys/acquire"),
    "generate": ask("/api/v1/keys"),
    "generate many": post("/api/v1/batch", b'{"op":"generate","count":20}', JSON),
    "acquire": ask("/api/v1/keys/acquire"),
    "acquire with an owner": post("/api/v1/keys/acquire", b'{"owner":"worker-7","wait":0.01}'),
    "get": get(key(1)),
    "get by id": get("/api/v1/keys/id:1"),
    "get, the id encoded": get("/api/v1/keys/id%3A1"),
    "get, the key encoded": get("/api/v1/keys/%4b" + KEY.format(1)[1:]),
    "head": get(key(1), method="HEAD"),
    "stale lease": post(key(1) + "/unblock", b'{"lease":99}', JSON),
    "unblock": post(key(1) + "/unblock", b'{"lease":1}', JSON),
    "unblock again": post(key(1) + "/unblock", b'{"lease":1.0}', JSON),
    "unblock, chunked": ask(key(2) + "/unblock", "Transfer-Encoding: chunked", body=chunked(b'{"lease": 2}')),
    "keepalive": ask(key(2) + "/keepalive"),
    "keepalive, an empty object": post(key(2) + "/keepalive", b"{}"),
    "reveal": ask("/api/v1/keys/id:2/reveal"),
    "list": get("/api/v1/keys?limit=3&state=available"),
    "list by expiry": get("/api/v1/keys?order=expiry&limit=2"),
    "stats": get("/api/v1/stats"),
    "delete": get(key(1), method="DELETE"),
    "delete again": get(key(1), method="DELETE"),
    "batch acquire": post("/api/v1/batch", b'{"op":"acquire","count":3}'),
    "batch keepalive": post("/api/v1/batch", b'{"op":"keepalive","keys":["nobody","id:3"]}'),
    "batch unblock": post("/api/v1/batch", b'{"op":"unblock","keys":[{"key":"id:3","lease":9},"id:4"]}'),
    "batch delete": post("/api/v1/batch", b'{"op":"delete","keys":["id:5","id:5"]}'),
    "legacy generate": ask("/api/v1/random_api_key/"),
    "legacy acquire": get("/api/v1/random_api_key"),
    "legacy head": get("/api/v1/random_api_key", method="HEAD"),
    "legacy unblock": ask("/api/v1/random_api_key/?api_key=nobody", method="PUT"),
    "legacy delete": ask(f"/api/v1/random_api_key/?api_key={KEY.format(6)}", method="DELETE"),
    "legacy scheduler": get("/api/v1/start_scheduler/"),
    "openapi": get("/api/v1/openapi.json"),
}
LEASES = {
    "generate many": post("/api/v1/batch", b'{"op":"generate","count":4}', JSON),
    "acquire once": post("/api/v1/keys/acquire", b'{"owner":"a","block_seconds":20}', ATTEMPT),
    "acquire again": post("/api/v1/keys/acquire", b'{"block_seconds":20.0, "owner":"a"}', ATTEMPT),
    "acquire again, the header in other letters": post(
        "/api/v1/keys/acquire", b'{"block_seconds":20,"owner":"a"}', ATTEMPT.lower().replace("a1", "A1")
    ),
    "acquire another": post("/api/v1/keys/acquire", b'{"owner":"a"}', ATTEMPT),
    "acquire without the header": post("/api/v1/keys/acquire", b'{"owner":"a"}'),
    "acquire many": post("/api/v1/batch", b'{"op":"acquire","count":9}', ATTEMPT),
    "acquire many again": post("/api/v1/batch", b'{"op":"acquire","count":9}', ATTEMPT),
    "acquire none": post("/api/v1/keys/acquire", b'{"owner":"b"}', ATTEMPT),
    "get by handle": get(handle(1, 1)),
    "get by an encoded handle": get(handle(1, 1).replace(":", "%3A")),
    "a handle that doesn't fit": get(handle(1, 1)[:-1] + "-"),
    "extend": post(handle(1, 1) + "/extend", b'{"seconds":50}'),
    "extend no further": ask(handle(1, 1) + "/extend"),
    "report a limit": post(handle(1, 1) + "/unblock", b'{"outcome":"rate_limited","retry_after":30.5}'),
    "report again": post(handle(1, 1) + "/unblock", b'{"outcome":"ok"}'),
    "extend what is over": ask(handle(1, 1) + "/extend"),
    "report an error": post(handle(2, 2) + "/unblock", b'{"outcome":"error","reason":"500"}'),
    "list what cools": get("/api/v1/keys?order=ready"),
    "quarantine": post("/api/v1/keys/id:3/quarantine", b'{"reason":"billing"}'),
    "quarantine at once": post("/api/v1/keys/id:3/quarantine", b'{"now":true}'),
    "list what is quarantined": get("/api/v1/keys?state=quarantined"),
    "restore": ask("/api/v1/keys/id:3/restore"),
    "history": get("/api/v1/keys/id:3/history?limit=2"),
    "history of nobody": get("/api/v1/keys/id:99/history"),
    "batch extend": post("/api/v1/batch", b'{"op":"extend","keys":[{"key":"id:4","lease":4},"h:1.1.x"]}'),
    "batch quarantine": post("/api/v1/batch", b'{"op":"quarantine","keys":["id:4","id:9"],"now":true}'),
    "batch restore": post("/api/v1/batch", b'{"op":"restore","keys":["id:4","id:9"]}'),
    "stats": get("/api/v1/stats"),
}
WRONG_ATTEMPTS = {
    "empty": "",
    "a space": "a b",
    "too long": "x" * 65,
    "not ASCII": "\xe4",
    "a tab": "a\tb",
}
WRONG = {
    "not JSON": post("/api/v1/keys/acquire", b"{", JSON),
    "an unknown field": post("/api/v1/keys/acquire", b'{"wiat":1}', JSON),
    "out of range": post("/api/v1/keys/acquire", b'{"wait":61}', JSON),
    "no body": ask("/api/v1/batch"),
    "a body that is not due": post("/api/v1/keys", b'{"a":1}'),
    "an unknown parameter": get("/api/v1/keys?ordre=id"),
    "a parameter twice": get("/api/v1/keys?order=id&order=id"),
    "an unknown key": get("/api/v1/keys/nobody"),
    "a key that is no UTF-8": get("/api/v1/keys/%ff%fe"),
    "no path": get("/api/v1/nothing"),
    "the root of the API": get("/api"),
    "the root with a slash": get("/api/"),
    "nearly the API": get("/apis/v1/keys"),
    "nearly the feed": get("/api/v1/feeds"),
    "an empty key": get("/api/v1/keys//keepalive"),
    "no method": get("/api/v1/keys", method="PATCH"),
    "options": get("/api/v1/keys", method="OPTIONS"),
    "another Content-Type": post("/api/v1/keys/acquire", b"{}", "Content-Type: text/plain"),
    "another charset": post("/api/v1/keys/acquire", b"{}", JSON + "; charset=latin-1"),
    "gzip": post("/api/v1/keys/acquire", b"{}", "Content-Encoding: gzip"),
    "a foreign host": ask("/api/v1/keys", host="evil.example"),
    "a foreign page": ask("/api/v1/keys", "Origin: http://evil.example"),
    "cross-site": ask("/api/v1/keys", "Sec-Fetch-Site: cross-site"),
    "a long target": get("/api/v1/keys?" + "a" * MAX_TARGET),
    "much in headers": get("/api/v1/keys", *["X: " + "y" * 8000] * (MAX_HEADERS // 8000 + 1)),
    "a large body": post("/api/v1/keys/acquire", b" " * (MAX_BODY + 1)),
    "a large body, chunked": ask(
        "/api/v1/keys/acquire", "Transfer-Encoding: chunked", body=chunked(b" " * (MAX_BODY + 1))
    ),
    "a large body of a refused call": post("/api/v1/nothing", b" " * (MAX_BODY + 1)),
    "its own id": get("/api/v1/keys/nobody", "X-Request-Id: mine-1"),
    "an id not fit to be shown": get("/api/v1/keys/nobody", "X-Request-Id: \xe4"),
    "repeated headers": get("/api/v1/keys/nobody", "X: 1", "x: 2", "Accept: */*"),
    "a plain feed": get("/api/v1/feed"),
    "health": get("/healthz"),
    "ready": get("/readyz"),
    "a page that there isn't": get("/nothing"),
    "an error page": get("/nothing", "Accept: text/html"),
    "HTTP/1.0, kept alive": ask("/api/v1/keys/nobody/keepalive", "Connection: keep-alive", version="1.0"),
}
ENDS = {
    "close": ask("/api/v1/keys/nobody/keepalive", "Connection: close"),
    "close, a page": get("/healthz", "Connection: close"),
    "HTTP/1.0": ask("/api/v1/keys/nobody/keepalive", host="", version="1.0"),
    "HTTP/1.0, a page": ask("/healthz", method="GET", version="1.0"),
    "asks before it sends too much": ask(
        "/api/v1/keys/acquire", "Expect: 100-continue", f"Content-Length: {MAX_BODY + 1}"
    ),
    "far too much": ask("/api/v1/keys/acquire", f"Content-Length: {DISCARDED + 1}"),
}
GUARDED = {
    "no token": ask("/api/v1/keys"),
    "an unknown token": ask("/api/v1/keys", by("x" * 16)),
    "no bearer": ask("/api/v1/keys", "Authorization: Basic abc"),
    "the wrong role": ask("/api/v1/keys", by(CLIENT)),
    "the right role": ask("/api/v1/keys", by(ADMIN), host="any.example"),
    "once more, by the same": ask("/api/v1/keys", by(ADMIN), host="any.example"),
    "an id from a client": get("/api/v1/keys/id:1", by(CLIENT)),
    "a viewer": get("/api/v1/stats", by(VIEWER)),
    "a batch of another role": post("/api/v1/batch", b'{"op":"generate","count":1}', by(CLIENT)),
    "a script without a session": ask("/api/v1/keys", "X-Keypool-Xsrf: 1"),
    "a page": get("/", "Accept: text/html"),
}


@dataclass
class Side:
    """One server, and the connection to it."""

    port: int
    engine: EmbeddedEngine
    wire: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def answer(self, asked: bytes, *, ends: bool = False) -> bytes:
        """All bytes of the answer."""
        if self.wire is None:
            self.wire = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.wire
        writer.write(asked)
        if ends:
            answer = await reader.read()
            await self.hang_up()
            return answer
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"Content-Length: ([0-9]+)", head)
        if length is None or asked.startswith(b"HEAD"):
            return head
        return head + await reader.readexactly(int(length[1]))

    async def hang_up(self) -> None:
        wire, self.wire = self.wire, None
        if wire is not None:
            wire[1].close()
            with contextlib.suppress(ConnectionError):
                await wire[1].wait_closed()


class _Made:
    """Key texts, one after the other."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> str:
        self.count += 1
        return KEY.format(self.count)


async def compare(
    requests: dict[str, bytes], access: Access, *, end: bool = False, drain: bool = False
) -> None:
    """Fails at the first request that the servers answer differently."""
    sides, closing = [], []
    for make in SERVERS.values():
        engine = EmbeddedEngine(clock=lambda: 1_000_000_000.0, new_text=_Made())
        engine.pool._random = lambda: 0.0
        engine.handles = HANDLES
        server = make(make_app(EmbeddedPools(engine), access), None)
        sockets = bind_sockets(0, "127.0.0.1")
        server.add_sockets(sockets)
        sides.append(Side(sockets[0].getsockname()[1], engine))
        closing.append(server)
        if drain:
            engine.drain()
    try:
        for name, asked in requests.items():
            async with asyncio.timeout(20):
                fast, stock = [neutral(await side.answer(asked, ends=end)) for side in sides]
            assert fast.startswith(b"HTTP/1.1 "), f"{name}: {fast!r}"
            assert fast == stock, name
    finally:
        for side, server in zip(sides, closing, strict=True):
            await side.hang_up()
            server.stop()
            await server.close_all_connections()
            await side.engine.close()


def neutral(answer: bytes) -> bytes:
    """An answer without the parts that may differ."""
    head, end, body = answer.partition(b"\r\n\r\n")
    id = re.search(rb"X-Request-Id: ([^\r]+)", head)
    length = re.search(rb"Content-Length: ([0-9]+)", head)
    if id is not None:
        head = head.replace(id[0], b"X-Request-Id: ID")
        if length is not None:  # ids differ in length
            without = int(length[1]) - body.count(id[1]) * len(id[1])
            head = head.replace(length[0], b"Content-Length: %d" % without)
        body = body.replace(id[1], b"ID")
    return (
        re.sub(rb"Date: [^\r]+ GMT", b"Date: NOW", head)
        + end
        + re.sub(rb"nonce-[^'\"]+|[0-9a-f]{64}", b"", body)
    )


def test_calls_are_answered_alike() -> None:
    """Every call, single and in a batch, and those of the first version."""
    asyncio.run(compare(LIFE, Access()))


def test_leases_for_real_work_are_answered_alike() -> None:
    """Attempts, handles, reports, extensions, quarantines."""
    asyncio.run(compare(LEASES, Access()))


def test_wrong_attempts_are_refused_alike() -> None:
    """Each is sent twice, as the fast server reads repeated header lines by another way; then the header twice."""
    asked = {
        f"{name}, {number}": ask("/api/v1/keys/acquire", f"Idempotency-Key: {value}")
        for name, value in WRONG_ATTEMPTS.items()
        for number in (1, 2)
    }
    asked["two lines"] = ask("/api/v1/keys/acquire", ATTEMPT, ATTEMPT)
    asked["where none is due"] = ask("/api/v1/keys", "Idempotency-Key: a b")
    asyncio.run(compare(asked, Access()))


def test_errors_are_answered_alike() -> None:
    """Every refusal, and the connection goes on."""
    asyncio.run(compare(WRONG, Access()))


def test_errors_that_end_a_connection_are_answered_alike() -> None:
    """Each on a connection of its own, to the end of it."""
    asyncio.run(compare(ENDS, Access(), end=True))


def test_roles_are_answered_alike() -> None:
    """With tokens, and when the same headers come again."""
    asyncio.run(compare(GUARDED, Access(client=[CLIENT], viewer=[VIEWER], admin=[ADMIN])))


@pytest.mark.parametrize("name", ["generate", "acquire", "stats"])
def test_calls_during_a_stop_are_answered_alike(name: str) -> None:
    """While it drains."""
    asyncio.run(compare({name: LIFE[name]}, Access(), drain=True))
