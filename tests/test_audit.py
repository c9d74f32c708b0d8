"""Who did what: the audit log, wrong tokens, trusted proxies and sign-outs.

The servers are in this process, the fast one and Tornado's.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import msgspec
import pytest
from engine_support import quiet
from tornado.ioloop import IOLoop
from tornado.netutil import bind_sockets
from tornado.web import Application
from valkey_support import engine_on
from valkeys import Valkey, with_pool

from keypool.api import wrong_tokens
from keypool.api.auth import Access
from keypool.api.dispatch import Dispatcher
from keypool.config.limits import Limits
from keypool.config.proxies import TrustedProxies
from keypool.core.errors import StorageUnavailable
from keypool.engine.durable.opening import open_durable
from keypool.engine.embedded import EmbeddedEngine
from keypool.engine.pools import EmbeddedPools
from keypool.http.http1.connection_limiter import ConnectionLimiter
from keypool.server.app import make_app
from keypool.server.serving import SERVERS
from keypool.web import session
from keypool.web.session import LIFE, MOST_ENDED, Sessions

ADMIN, VIEWER, CLIENT, WRONG = "admin-token-0001", "viewer-token-001", "client-token-001", "wrong-token-0001"
TOKENS = Access(client=[CLIENT], viewer=[VIEWER], admin=[ADMIN])
FAST = pytest.mark.parametrize("http", ["fast"])
TRUSTED = "198.51.100.0/24, 127.0.0.1"


class HeldEngine(EmbeddedEngine):
    """Changes the pool at once, and answers when `kept` is done, as if the commit took so long."""

    kept: asyncio.Future[None] | None = None
    closed = 0

    async def _kept(self) -> None:
        if self.kept is not None:
            await asyncio.shield(self.kept)

    async def generate(self, *args: Any) -> Any:
        made = await super().generate(*args)
        await self._kept()
        return made

    async def delete(self, *args: Any) -> Any:
        gone = await super().delete(*args)
        await self._kept()
        return gone

    async def delete_many(self, *args: Any) -> Any:
        gone = await super().delete_many(*args)
        await self._kept()
        return gone

    async def quarantine(self, *args: Any) -> Any:
        row = await super().quarantine(*args)
        await self._kept()
        return row

    async def quarantine_many(self, *args: Any) -> Any:
        words = await super().quarantine_many(*args)
        await self._kept()
        return words

    async def restore(self, *args: Any) -> Any:
        row = await super().restore(*args)
        await self._kept()
        return row

    async def restore_many(self, *args: Any) -> Any:
        words = await super().restore_many(*args)
        await self._kept()
        return words

    async def unblock(self, *args: Any, **more: Any) -> Any:
        answer = await super().unblock(*args, **more)
        await self._kept()
        return answer

    async def acquire(self, *args: Any, **more: Any) -> Any:
        lease = await super().acquire(*args, **more)
        try:
            await self._kept()
        except GeneratorExit:
            self.closed += 1
            raise
        return lease


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body."""
        return msgspec.json.decode(self.body)


@dataclass
class Served:
    """A server in this process."""

    port: int
    app: Application
    engine: HeldEngine
    server: Any
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def in_flight(self) -> int:
        """Requests being answered."""
        count: int = self.app.settings["in_flight"].count
        return count

    @property
    def wrong(self) -> wrong_tokens.WrongTokens:
        """What counts wrong tokens."""
        dispatcher: Dispatcher = self.app.settings["dispatcher"]
        return dispatcher.wrong_tokens

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection."""
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(
        self, method: str, path: str, body: Any = None, token: str | None = ADMIN, **headers: str
    ) -> Answer:
        """One request on a connection of its own."""
        reader, writer = await self.connect()
        try:
            writer.write(request(method, path, body, token, **headers))
            return await read(reader)
        finally:
            writer.close()

    async def hang_up(self, method: str, path: str, body: Any = None) -> None:
        """One request whose caller leaves as soon as it is under way."""
        before = self.in_flight
        _, writer = await self.connect()
        writer.write(request(method, path, body, ADMIN))
        await until(lambda: self.in_flight > before)
        writer.close()
        await writer.wait_closed()


def request(method: str, path: str, body: Any = None, token: str | None = None, **headers: str) -> bytes:
    """As bytes: a dict as JSON, bytes as a form. Underscores in a header's name stand for dashes."""
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    data = body if isinstance(body, bytes) else b"" if body is None else msgspec.json.encode(body)
    if data:
        lines.append(f"Content-Length: {len(data)}")
    if isinstance(body, bytes) and path == "/login":
        lines.append("Content-Type: application/x-www-form-urlencoded")
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode() + data


async def read(reader: asyncio.StreamReader) -> Answer:
    """The next answer of a connection."""
    async with asyncio.timeout(30):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        body = await reader.readexactly(int(headers.get("Content-Length", 0)))
    return Answer(int(head[0].split()[1]), headers, body)


async def until(condition: Callable[[], object]) -> None:
    """Wait for it."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - what is waited for is the server's, and has no event
            await asyncio.sleep(0.002)


class Lines(logging.Handler):
    """Keeps the facts of each line of the audit log."""

    def __init__(self, lines: list[dict[str, Any]]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.__dict__["audit"] | {"message": record.getMessage()})


@asynccontextmanager
async def serving(http: str, access: Access = TOKENS, trusted: str | None = None) -> AsyncIterator[Served]:
    """The application on one of the two HTTP servers; no request is left in flight, and nothing held back."""
    engine = HeldEngine()
    app = make_app(EmbeddedPools(engine), access)
    server = SERVERS[http](app, None, None if trusted is None else TrustedProxies(trusted))
    sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    served = Served(sockets[0].getsockname()[1], app, engine, server)
    handler = Lines(served.lines)
    audit = logging.getLogger("keypool.audit")
    audit.addHandler(handler)
    level = audit.level
    audit.setLevel(logging.INFO)
    try:
        yield served
        await until(lambda: not served.in_flight)
        assert served.wrong.held == 0
    finally:
        audit.removeHandler(handler)
        audit.setLevel(level)
        server.stop()
        app.settings["dashboard"].drain()
        served.wrong.close()
        await server.close_all_connections()
        await engine.close()


@pytest.fixture(params=list(SERVERS))
def http(request: pytest.FixtureRequest) -> str:
    """Each HTTP server in turn."""
    name: str = request.param
    return name


@pytest.fixture
def served(io_loop: IOLoop, http: str) -> Iterator[Served]:
    """The application on the loop of the test."""
    context = serving(http)
    yield io_loop.run_sync(context.__aenter__)
    io_loop.run_sync(lambda: context.__aexit__(None, None, None))


@pytest.fixture(autouse=True)
def _quick(io_loop: IOLoop, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A burst that is soon spent, and not regained while a test runs. Each test fails if an error was logged."""
    monkeypatch.setattr(wrong_tokens, "BURST", 3)
    monkeypatch.setattr(wrong_tokens, "REGAINED_SECONDS", 3600.0)
    with quiet():
        yield


# -------------------------------------------------------------------------------------------------- hanging up


async def test_what_changes_something_runs_to_its_end_when_its_caller_hangs_up(served: Served) -> None:
    """The change is made and audited, and is in flight until then, so that a stop waits for it."""
    keys = [made.key for made in await served.engine.generate(4)]
    while (await served.engine.stats()).available:
        await served.engine.acquire(None, 0)
    served.engine.kept = asyncio.get_running_loop().create_future()
    await served.hang_up("DELETE", f"/api/v1/keys/{keys[0]}")
    await served.hang_up("DELETE", f"/api/v1/random_api_key/?api_key={keys[1]}")
    await served.hang_up("POST", "/api/v1/batch", {"op": "delete", "keys": [keys[2], "nobody"]})
    await served.hang_up("POST", f"/api/v1/keys/{keys[3]}/unblock")
    await served.hang_up("POST", "/api/v1/keys")
    await served.hang_up("POST", "/api/v1/batch", {"op": "generate", "count": 3})
    await until(lambda: not served.server.limiter.count)  # the server knows that they are gone
    assert served.in_flight == 6
    assert not served.lines
    served.engine.kept.set_result(None)
    await until(lambda: not served.in_flight)
    # On a busy machine a batch pauses, and others overtake it.
    assert Counter(line["act"] for line in served.lines) == {"delete": 3, "unblock": 1, "generate": 2}
    assert all(line["outcome"] == "ok" for line in served.lines)
    stats = await served.engine.stats()
    assert (stats.deleted, stats.unblocked, stats.generated) == (3, 1, 8)


async def test_an_acquire_ends_with_its_caller(served: Served) -> None:
    """Whether it waits for a key or for its commit, it ends and no longer counts as in flight."""
    await served.hang_up("POST", "/api/v1/keys/acquire", {"wait": 60})
    await until(lambda: not served.in_flight)
    assert (await served.engine.stats()).waiting == 0
    await served.engine.generate(2)
    served.engine.kept = asyncio.get_running_loop().create_future()
    await served.hang_up("POST", "/api/v1/keys/acquire")
    await until(lambda: not served.in_flight)
    await served.hang_up("GET", "/api/v1/random_api_key/")
    await until(lambda: not served.in_flight)
    assert served.engine.closed == 2


# ----------------------------------------------------------------------------------------------- what is written


@FAST
async def test_a_failed_commit_stands_in_the_line(served: Served) -> None:
    """After a 503 the change may have been kept, so it is audited, with that outcome."""
    keys = [made.key for made in await served.engine.generate(3)]
    lease = await served.engine.acquire(None, 0)
    kept = served.engine.kept = asyncio.get_running_loop().create_future()
    kept.set_exception(StorageUnavailable("the disk is full"))
    gone = next(key for key in keys if key != lease.key)
    assert (await served.ask("DELETE", f"/api/v1/keys/{gone}")).status == 503
    assert (await served.ask("POST", f"/api/v1/keys/{lease.key}/unblock")).status == 503
    assert (await served.ask("POST", "/api/v1/keys")).status == 503
    assert (await served.ask("POST", "/api/v1/batch", {"op": "generate", "count": 2})).status == 503
    assert [line["act"] for line in served.lines] == ["delete", "unblock", "generate", "generate"]
    assert {line["outcome"] for line in served.lines} == {"storage-unavailable"}
    assert served.lines[0]["keys"] == [f"{gone[:4]}…{gone[-4:]}"]
    assert served.lines[1]["lease"] == lease.lease
    assert served.lines[3]["count"] == 2


async def test_a_reveal_is_written_whatever_comes_of_it(served: Served) -> None:
    """Also if refused; of the requested text only an id, or the hint of a possible key, is shown."""
    [made] = await served.engine.generate(1)
    for key, token in (
        ("id:1", ADMIN),
        ("id:9", ADMIN),
        (made.key, CLIENT),
        ("id:1", VIEWER),
        ("a%0Ab", VIEWER),
    ):
        await served.ask("POST", f"/api/v1/keys/{key}/reveal", token=token, X_Request_Id="mine")
    hint = f"{made.key[:4]}…{made.key[-4:]}"
    seen = [(line["outcome"], line["role"], line["keys"]) for line in served.lines]
    assert seen == [
        ("ok", "admin", [f"id:1 {hint}"]),
        ("unknown-key", "admin", ["id:9"]),
        ("forbidden", "client", [hint]),
        ("forbidden", "viewer", ["id:1"]),
        ("forbidden", "viewer", ["no key"]),
    ]
    assert {line["request_id"] for line in served.lines} == {"mine"}
    assert {line["address"] for line in served.lines} == {"127.0.0.1"}


async def test_an_unblock_without_the_lease_is_written_if_it_ended_one(served: Served) -> None:
    """Single, in a batch, by the first version's path: with the key and the lease that ended, not the next one."""
    [made] = await served.engine.generate(1)
    path = f"/api/v1/keys/{made.key}/unblock"
    for method, target, body in (
        ("POST", path, None),
        ("POST", path, {"lease": None}),
        ("PUT", f"/api/v1/random_api_key/?api_key={made.key}", None),
        ("POST", "/api/v1/batch", {"op": "unblock", "keys": [made.key, "nobody"]}),
    ):
        served.lines.clear()
        lease = await served.engine.acquire(None, 0)
        waiting = asyncio.ensure_future(served.engine.acquire(None, 60))
        await asyncio.sleep(0)
        assert (await served.ask(method, target, body, CLIENT)).status == 200
        await served.engine.unblock(made.key, (await waiting).lease)
        [line] = served.lines
        assert (line["act"], line["role"]) == ("unblock", "client")
        keys = line["keys"] if target != "/api/v1/batch" else [line["first"]]
        assert keys == [f"id:1 {made.key[:4]}…{made.key[-4:]}"]
        assert line.get("lease", lease.lease) == lease.lease
    served.lines.clear()
    lease = await served.engine.acquire(None, 0)
    await served.ask("POST", path, {"lease": lease.lease}, CLIENT)
    await served.ask("POST", path, None, CLIENT)  # it is free: nobody loses anything
    assert not served.lines


async def test_a_release_of_an_owner_is_written(served: Served) -> None:
    """Who, whose leases, and how many."""
    await served.engine.generate(3)
    for _ in range(2):
        await served.engine.acquire("worker-7", 0)
    path = "/api/v1/owners/release"
    assert (await served.ask("POST", path, {"owner": "worker-7"})).json == {"released": 2}
    assert (await served.ask("POST", path, {"owner": "worker-8", "client": "ci"})).json == {"released": 0}
    assert (await served.ask("POST", path, {"owner": "worker-7"}, token=CLIENT)).status == 403
    told = [
        {name: line[name] for name in ("act", "outcome", "owner", "client", "released") if name in line}
        for line in served.lines
    ]
    assert told == [
        {"act": "owners-release", "outcome": "ok", "owner": "worker-7", "released": 2},
        {"act": "owners-release", "outcome": "ok", "owner": "worker-8", "client": "ci", "released": 0},
    ]


@FAST
async def test_quarantine_and_restore_are_written(served: Served) -> None:
    """With id and hint; a batch with what is done; by a handle its id alone, and none of them if nothing is done."""
    made = await served.engine.generate(2)
    names = {one.id: f"id:{one.id} {one.key[:4]}…{one.key[-4:]}" for one in made}
    lease = await served.engine.acquire(None, 0)
    await served.ask("POST", f"/api/v1/keys/{lease.handle}/quarantine", {"reason": "billing", "now": True})
    await served.ask("POST", f"/api/v1/keys/id:{lease.id}/restore", X_Request_Id="mine")
    for op in ("quarantine", "restore"):
        keys = ["nobody", lease.handle, "id:2", made[0].key]
        await served.ask("POST", "/api/v1/batch", {"op": op, "keys": keys})
        await served.ask("POST", "/api/v1/batch", {"op": op, "keys": ["nobody"]})
        await served.ask("POST", f"/api/v1/keys/nobody/{op}")
        assert (await served.ask("POST", f"/api/v1/keys/{lease.handle}/{op}", token=CLIENT)).status == 403
    single, restored, *batches = served.lines
    assert [line["act"] for line in served.lines] == ["quarantine", "restore"] * 2
    assert [single["keys"], restored["keys"]] == [[names[lease.id]]] * 2
    assert (restored["request_id"], restored["role"], restored["outcome"]) == ("mine", "admin", "ok")
    hint = names[1].partition(" ")[2]
    assert [(line["count"], line["first"], line["last"]) for line in batches] == [
        (3, f"id:{lease.id}", hint)
    ] * 2
    digest = lease.handle.rpartition(".")[2]
    assert not any(digest in line["message"] or made[0].key in line["message"] for line in served.lines)


@FAST
async def test_a_quarantine_whose_commit_failed_is_written(served: Served) -> None:
    """It may have been kept. A refused reveal by a handle is written with the id alone."""
    await served.engine.generate(1)
    lease = await served.engine.acquire(None, 0)
    kept = served.engine.kept = asyncio.get_running_loop().create_future()
    kept.set_exception(StorageUnavailable("the disk is full"))
    for what in ("quarantine", "restore"):
        assert (await served.ask("POST", f"/api/v1/keys/{lease.handle}/{what}")).status == 503
        assert (await served.ask("POST", "/api/v1/batch", {"op": what, "keys": ["id:1"]})).status == 503
    await served.ask("POST", f"/api/v1/keys/{lease.handle}/reveal", token=VIEWER)
    await served.ask("POST", "/api/v1/keys/h:1.1.x/reveal", token=VIEWER)
    seen = [(line["act"], line["outcome"], line.get("keys") or [line["first"]]) for line in served.lines]
    assert seen == [
        *((what, "storage-unavailable", ["id:1"]) for what in ("quarantine", "restore") for _ in range(2)),
        ("reveal", "forbidden", ["id:1"]),
        ("reveal", "forbidden", ["no key"]),
    ]


@FAST
async def test_events_say_who_brought_a_change_about(served: Served) -> None:
    """A holder, or an operator by the mark of the token; who shows no lease is an operator if an admin."""
    made = (await served.ask("POST", "/api/v1/keys")).json
    key = f"/api/v1/keys/{made['key']}"
    batch = {"op": "unblock", "keys": [made["key"]]}

    async def acquire() -> Any:
        return (await served.ask("POST", "/api/v1/keys/acquire", token=CLIENT)).json

    await acquire()
    await served.ask("POST", f"{key}/unblock", token=CLIENT)
    lease = await acquire()
    await served.ask("POST", f"{key}/unblock", {"lease": lease["lease"]}, ADMIN)
    lease = await acquire()
    await served.ask("POST", f"/api/v1/keys/{lease['handle']}/unblock", {"outcome": "rate_limited"}, ADMIN)
    await served.ask("POST", f"{key}/restore")
    await acquire()
    await served.ask("POST", f"{key}/unblock", None, ADMIN)
    await acquire()
    await served.ask("POST", "/api/v1/batch", batch, ADMIN)
    lease = await acquire()
    await served.ask("POST", "/api/v1/batch", batch | {"keys": [lease["handle"]]}, ADMIN)
    await served.ask("POST", f"{key}/quarantine")
    await served.ask("POST", f"{key}/reveal")
    await served.ask("DELETE", key)
    seen = [(event.event.value, event.by.value, event.actor) for event in served.engine.recent(100)]
    mark = served.lines[-1]["token"]
    holder, operator = ("holder", None), ("operator", mark)
    assert [one for one in seen if one[0] != "acquired"] == [
        ("generated", *operator),
        ("unblocked", *holder),
        ("unblocked", *holder),
        ("unblocked", *holder),
        ("cooled", *holder),
        ("restored", *operator),
        ("unblocked", *operator),
        ("unblocked", *operator),
        ("unblocked", *holder),
        ("quarantined", *operator),
        ("revealed", *operator),
        ("deleted", *operator),
    ]
    assert {one for one in seen if one[0] == "acquired"} == {("acquired", *holder)}


@FAST
async def test_a_batch_is_one_short_line(served: Served) -> None:
    """How many keys, the first and the last."""
    made = (await served.ask("POST", "/api/v1/batch", {"op": "generate", "count": 1000})).json["keys"]
    await served.ask("POST", "/api/v1/batch", {"op": "delete", "keys": [key["key"] for key in made]})
    await served.ask("POST", "/api/v1/batch", {"op": "delete", "keys": ["nobody"]})
    assert [line["act"] for line in served.lines] == ["generate", "delete"]
    for line in served.lines:
        assert line["count"] == 1000
        assert line["first"].startswith(f"id:{made[0]['id']} ")
        assert line["last"].startswith(f"id:{made[-1]['id']} ")
        assert len(msgspec.json.encode(line)) < 600


@pytest.mark.parametrize(
    "body",
    [
        b'{"lease":1,"lease":null}',
        b'{"lease":null,"lease":1}',
        b'{"l\\u0065ase":1,"lease":null}',
        b'{"lease":1.0,"lease":1.0}',
    ],
)
@FAST
async def test_a_member_given_twice_is_refused(served: Served, body: bytes) -> None:
    """The last value would count, so an unblock could ignore the lease number that it also has."""
    [made] = await served.engine.generate(1)
    await served.engine.acquire(None, 0)
    answer = await served.ask("POST", f"/api/v1/keys/{made.key}/unblock", body, CLIENT)
    assert (answer.status, answer.json["code"]) == (400, "bad-request")
    assert "'lease' was given twice" in answer.json["detail"]
    item = b'{"key":"%b",%b' % (made.key.encode(), body[1:])
    batch = b'{"op":"unblock","keys":["nobody",%b]}' % item
    answer = await served.ask("POST", "/api/v1/batch", batch, CLIENT)
    assert "'lease' was given twice" in answer.json["detail"]
    assert (await served.engine.stats()).blocked == 1
    fine = b'{"owner":"a:b\\":","wait":null}'
    assert (await served.ask("POST", "/api/v1/keys/acquire", fine, CLIENT)).status == 404


# ------------------------------------------------------------------------------------------------- wrong tokens


async def wrong_on_each_path(served: Served) -> None:
    """One wrong token on the API, a page, the feed and the metrics."""
    for path in ("/api/v1/stats", "/keys", "/api/v1/feed", "/metrics", "/login"):
        answer = await served.ask("GET", path, token=WRONG, Accept="text/html")
        assert answer.status == 401, path


@pytest.fixture
def few_lines(_quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow four lines about wrong tokens and a large burst. Request this fixture before `served`."""
    monkeypatch.setattr(wrong_tokens, "LINES", 4)
    monkeypatch.setattr(wrong_tokens, "LINE_SECONDS", 3600.0)
    monkeypatch.setattr(wrong_tokens, "BURST", 100)


async def test_wrong_tokens_are_counted_and_a_few_of_them_written(few_lines: None, served: Served) -> None:
    """The metrics count each, from zero on; beyond the limit the log has their number."""
    metrics = (await served.ask("GET", "/metrics")).body.decode()
    assert 'keypool_auth_failures_total{kind="token"} 0.0' in metrics
    assert 'keypool_auth_failures_total{kind="sign_in"} 0.0' in metrics
    await wrong_on_each_path(served)
    await served.ask("GET", "/api/v1/stats", token=None)  # none is not a wrong one
    await served.ask("POST", "/login", form(WRONG), token=None)
    await served.ask("POST", "/login", form(CLIENT), token=None)
    metrics = (await served.ask("GET", "/metrics")).body.decode()
    assert 'keypool_auth_failures_total{kind="token"} 5.0' in metrics
    assert 'keypool_auth_failures_total{kind="sign_in"} 2.0' in metrics
    assert [line["act"] for line in served.lines] == ["wrong-token"] * 4
    assert all(len(line["token"]) == 8 and line["token"] not in WRONG for line in served.lines)
    served.wrong.close()
    assert served.lines[-1]["suppressed"] == 3
    assert served.lines[-1]["address"] == "127.0.0.1"


async def test_wrong_tokens_are_answered_late_and_right_ones_at_once(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the burst is spent; on one connection they come one after the other, so guessing is slow."""
    assert wrong_tokens.LONGEST == 1
    monkeypatch.setattr(wrong_tokens, "LONGEST", 0.5)
    loop = asyncio.get_running_loop()
    started = loop.time()
    await asyncio.gather(*(wrong_on_each_path(served) for _ in range(2)))
    # Of the ten only three were in the burst, so that one connection had to wait for four at least.
    assert loop.time() - started >= 4 * 0.5 - 0.05
    # From here on so late that none is answered while others are asked.
    monkeypatch.setattr(wrong_tokens, "LONGEST", 1000.0)
    leaving = []
    for _ in range(2):
        leaving.append((await served.connect())[1])
        leaving[-1].write(request("GET", "/api/v1/stats", None, WRONG))
    await until(lambda: served.wrong.held == 2)
    assert (await served.ask("GET", "/api/v1/stats")).status == 200
    assert (await served.ask("GET", "/metrics", token=VIEWER)).status == 200
    assert served.wrong.held == 2
    for writer in leaving:
        writer.close()
    await until(lambda: served.wrong.held == 0)
    monkeypatch.setattr(wrong_tokens, "LONGEST", 0.5)
    # A caller that leaves meanwhile takes its place along.
    for asked in (
        request("POST", "/api/v1/batch", {"op": "keepalive", "keys": ["x"]}, WRONG),
        request("GET", "/metrics", None, WRONG),
        request("POST", "/login", form("another-wrong-token"), WRONG),
    ):
        _, writer = await served.connect()
        writer.write(asked)
        await until(lambda: served.wrong.held == 1)
        writer.close()
        await until(lambda: served.wrong.held == 0 and not served.in_flight)
    # Tornado reads a form before anything is checked: a broken one is no way round.
    monkeypatch.setattr(wrong_tokens, "LONGEST", 0.0)
    before = served.wrong.counts["token"]
    answer = await served.ask("POST", "/logout", b"x" * 16, WRONG, Content_Type="multipart/form-data")
    assert (answer.status, answer.headers["Connection"]) == (401, "close")
    assert served.wrong.counts["token"] == before + 1


async def test_so_many_answers_are_held_back_and_no_more(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more is answered at once, and its connection is closed."""
    monkeypatch.setattr(wrong_tokens, "MOST_HELD", 0)
    for path in ("/api/v1/stats", "/metrics"):
        answers = [await served.ask("GET", path, token=WRONG) for _ in range(4)]
        assert {answer.status for answer in answers} == {401}
        assert answers[-1].headers["Connection"] == "close"


def form(token: str) -> bytes:
    """The sign-in."""
    return urlencode({"token": token, "next": "/"}).encode()


@FAST
async def test_a_right_token_gets_in_whatever_was_tried_before(served: Served) -> None:
    """Wrong ones beyond five get 429 with the time, in the page too, and stand in the audit log like the sign-in."""
    answers = [await served.ask("POST", "/login", form(WRONG), token=None) for _ in range(6)]
    assert [answer.status for answer in answers] == [401] * 5 + [429]
    assert answers[-1].json["code"] == "too-many-sign-ins"
    page = await served.ask("POST", "/login", form(WRONG), token=None, Accept="text/html")
    assert page.status == 429
    assert f"in {page.headers['Retry-After']} s" in page.body.decode()
    assert 1 <= int(page.headers["Retry-After"]) <= 12
    assert (await served.ask("POST", "/login", form(ADMIN), token=None)).status == 303
    acts = [line["act"] for line in served.lines]
    assert acts == ["failed-sign-in"] * 7 + ["sign-in"]
    assert served.lines[-1]["role"] == "admin"


# ------------------------------------------------------------------------------------------------------ proxies


@pytest.mark.parametrize(
    ("peer", "hops", "scheme", "caller"),
    [
        ("127.0.0.1", "203.0.113.9", "https", ("203.0.113.9", "https")),
        ("127.0.0.1", "6.6.6.6, 203.0.113.9, 198.51.100.7", "http, https", ("203.0.113.9", "https")),
        ("127.0.0.1", "198.51.100.8, 198.51.100.7", "", ("198.51.100.8", "http")),
        ("127.0.0.1", "6.6.6.6, unknown, 198.51.100.7", "ftp", ("198.51.100.7", "http")),
        ("127.0.0.1", "", "HTTPS", ("127.0.0.1", "https")),
        ("::ffff:127.0.0.1", "2001:db8::1", "", ("2001:db8::1", "http")),
        ("203.0.113.1", "203.0.113.9", "https", ("203.0.113.1", "http")),
        ("nonsense", "203.0.113.9", "https", ("nonsense", "http")),
    ],
)
def test_the_caller_is_the_last_address_that_is_not_trusted(
    peer: str, hops: str, scheme: str, caller: tuple[str, str]
) -> None:
    """Only if every proxy after it is trusted; headers of other peers are ignored."""
    assert TrustedProxies(TRUSTED).caller(peer, "http", hops, scheme) == caller


async def test_a_trusted_proxy_sets_address_and_scheme(http: str) -> None:
    """In the audit log, for the cookie's Secure, and for the throttle: one caller's wrong tokens cost no other."""
    async with serving(http, trusted=TRUSTED) as served:
        proxied = {"X_Forwarded_For": "6.6.6.6, 203.0.113.9", "X_Forwarded_Proto": "https"}
        await served.ask("POST", "/api/v1/keys", **proxied)
        signed = await served.ask("POST", "/login", form(ADMIN), token=None, **proxied)
        assert "; Secure" in signed.headers["Set-Cookie"]
        await served.ask("POST", "/api/v1/keys", X_Real_Ip="203.0.113.9", X_Scheme="https")
        assert [line["address"] for line in served.lines] == ["203.0.113.9", "203.0.113.9", "127.0.0.1"]
        for _ in range(6):
            await served.ask("POST", "/login", form(WRONG), token=None, **proxied)
        other = await served.ask("POST", "/login", form(WRONG), token=None, X_Forwarded_For="203.0.113.10")
        assert other.status == 401
    async with serving(http) as served:
        await served.ask("POST", "/api/v1/keys", **proxied)
        signed = await served.ask("POST", "/login", form(ADMIN), token=None, **proxied)
        assert "; Secure" not in signed.headers["Set-Cookie"]
        assert [line["address"] for line in served.lines] == ["127.0.0.1"] * 2


async def test_each_request_of_a_connection_has_its_own_caller() -> None:
    """A proxy sends requests of many callers over one connection."""
    for http in SERVERS:
        async with serving(http, trusted=TRUSTED) as served:
            reader, writer = await served.connect()
            for address in ("203.0.113.1", "203.0.113.2", None):
                headers = {"X_Forwarded_For": address} if address else {}
                writer.write(request("POST", "/api/v1/keys", None, ADMIN, **headers))
                await read(reader)
            writer.close()
            seen = [line["address"] for line in served.lines]
            assert seen == ["203.0.113.1", "203.0.113.2", "127.0.0.1"], http


def test_a_trusted_proxy_may_have_more_connections_than_an_address() -> None:
    """Its connections belong to many callers."""
    limiter = ConnectionLimiter(Limits(connections_per_address=2), TrustedProxies(TRUSTED))
    assert all(limiter.enter("198.51.100.7") for _ in range(5))
    assert [limiter.enter("203.0.113.1") for _ in range(3)] == [True, True, False]


# ----------------------------------------------------------------------------------------------------- sign-outs


class Wall:
    """A clock that only the test advances."""

    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


async def test_a_sign_out_is_in_the_audit_log_and_ends_the_session(served: Served) -> None:
    """The line has the session's token; the cookie is refused at once."""
    signed = await served.ask("POST", "/login", form(VIEWER), token=None)
    cookie = signed.headers["Set-Cookie"].partition(";")[0]
    page = (await served.ask("GET", "/", token=None, Cookie=cookie)).body.decode()
    proof = page.partition('<meta name="xsrf" content="')[2].partition('"')[0]
    sent = {"Cookie": cookie, "Content_Type": "application/x-www-form-urlencoded"}
    out = await served.ask("POST", "/logout", f"xsrf={proof}".encode(), token=None, **sent)
    assert out.status == 303
    assert (await served.ask("GET", "/figures", token=None, Cookie=cookie)).status == 401
    assert [line["act"] for line in served.lines] == ["sign-in", "sign-out"]
    assert {line["role"] for line in served.lines} == {"viewer"}
    assert len({line["token"] for line in served.lines}) == 1


def headers(cookie: str) -> dict[str, str]:
    """As a browser sends it."""
    return {"Cookie": f"{session.COOKIE}={cookie}"}


async def test_a_sign_out_is_written_and_holds_after_a_restart(tmp_path: Path) -> None:
    """The notes are loaded from the data file; other sessions of the token go on."""
    engine = (await open_durable(tmp_path / "keypool.db")).default
    sessions = Sessions(TOKENS)
    (mine, cookie), (_, other) = sessions.sign_in(ADMIN), sessions.sign_in(ADMIN)
    sessions.end(mine)
    await sessions.share(engine)
    await engine.close()
    engine = (await open_durable(tmp_path / "keypool.db")).default
    again = Sessions(TOKENS)
    assert again._read(headers(cookie)["Cookie"]) is not None  # the signature is good
    await again.share(engine)
    assert again._read(headers(cookie)["Cookie"]) is None
    assert again._read(headers(other)["Cookie"]) is not None
    await engine.close()


async def test_a_sign_out_reaches_all_servers_of_a_pool_in_valkey() -> None:
    """It also reaches a server that starts later."""
    with Valkey() as valkey:
        url = with_pool(valkey.url, 1)
        async with engine_on(url) as engine, engine_on(url) as other:
            here, there = Sessions(TOKENS), Sessions(TOKENS)
            mine, cookie = here.sign_in(VIEWER)
            await there.share(other)
            assert there._read(headers(cookie)["Cookie"]) is not None
            here.end(mine)
            await here.share(engine)
            await there.share(other)
            assert there._read(headers(cookie)["Cookie"]) is None
        async with engine_on(url) as engine:
            later = Sessions(TOKENS)
            await later.share(engine)
            assert later._read(headers(cookie)["Cookie"]) is None


async def test_what_is_kept_of_sign_outs_is_bounded() -> None:
    """Beyond the limit the oldest sessions of that token end, no others; notes are deleted after 12 hours."""
    engine, wall = EmbeddedEngine(), Wall()
    sessions = Sessions(TOKENS, wall)
    first, _ = sessions.sign_in(ADMIN)
    viewer, _ = sessions.sign_in(VIEWER)
    wall.now += 1
    ended = [sessions.sign_in(ADMIN)[0] for _ in range(MOST_ENDED + 1)]
    wall.now += 1
    last, _ = sessions.sign_in(ADMIN)
    for each in ended[:-1]:
        sessions.end(each)
    await sessions.share(engine)
    assert len(await engine.notes()) == MOST_ENDED
    assert sessions.alive(first)
    sessions.end(ended[-1])
    await sessions.share(engine)
    assert len(await engine.notes()) == MOST_ENDED + 1
    assert not any(sessions.alive(each) for each in [first, *ended])
    assert sessions.alive(last)
    assert sessions.alive(viewer)
    wall.now += LIFE + 1
    late, _ = sessions.sign_in(ADMIN)
    sessions.end(late)
    await sessions.share(engine)
    assert list(await engine.notes()) == [late.note]
    await engine.close()


async def test_a_sign_out_that_could_not_be_kept_holds_here_and_is_kept_later() -> None:
    """Storage may be down at that moment."""

    class Away(EmbeddedEngine):
        away = True

        async def keep_notes(self, notes: Any) -> None:
            if self.away:
                raise StorageUnavailable("away")
            await super().keep_notes(notes)

    engine, sessions = Away(), Sessions(TOKENS)
    mine, _ = sessions.sign_in(ADMIN)
    sessions.end(mine)
    with pytest.raises(StorageUnavailable):
        await sessions.share(engine)
    assert not sessions.alive(mine)
    engine.away = False
    await sessions.share(engine)
    assert list(await engine.notes()) == [mine.note]
    await engine.close()
