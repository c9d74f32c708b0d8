"""A pool in memory, for the tests of programs that use the client: no server, no network, and time on demand.

    >>> server = FakeServer(["key-1"])
    >>> with KeyPool(transport=server) as pool, pool.lease() as key:
    ...     assert server.blocked == [key.secret]
    ...     key.rate_limited(retry_after=30)
    >>> assert server.cooling == ["key-1"]
    >>> server.advance(30)
    >>> assert server.cooling == []

It answers calls as the server does: leases with their numbers and handles, reports and cooldowns, quarantine,
extensions, repeated acquires, expiries, pools, imports, errors. It checks no token, and has neither a queue nor the
feed: an acquire that waits polls.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote

import httpx2

from keypool.client.fake_pool import FakePool, Refused, batch
from keypool.client.fake_pools import FakePools
from keypool.client.imports import NewKey, new_key
from keypool.client.settings import BASE

_POLL_SECONDS = 0.005


class FakeServer(httpx2.BaseTransport, httpx2.AsyncBaseTransport):
    """A pool of keys, and the transport by which a KeyPool or an AsyncKeyPool reaches it.

    The numbers are the server's settings of the same names, for the pool `default`. `pools` are further ones: each name
    with its keys, as `import_many` takes them, which never expire: `{"openai": [("sk-1", "acct-1")]}`. `requests` are
    the methods and paths of all calls so far, without `/api/v1`.
    """

    def __init__(
        self,
        keys: Iterable[str] = (),
        *,
        block_seconds: float = 60.0,
        max_block_seconds: float | None = None,
        keepalive_seconds: float | None = 300.0,
        cooldown_seconds: float = 60.0,
        max_cooldown_seconds: float = 3600.0,
        error_threshold: int | None = 3,
        forget_seconds: float = 3600.0,
        max_quarantined_percent: float = 50.0,
        pools: Mapping[str, Iterable[NewKey]] = MappingProxyType({}),
    ) -> None:
        self.requests: list[tuple[str, str]] = []
        self._failures: list[Exception] = []
        settings = {
            "block_seconds": block_seconds,
            "max_block_seconds": max_block_seconds,
            "keepalive_seconds": keepalive_seconds,
            "cooldown_seconds": cooldown_seconds,
            "max_cooldown_seconds": max_cooldown_seconds,
            "error_threshold": error_threshold,
            "forget_seconds": forget_seconds,
            "max_quarantined_percent": max_quarantined_percent,
        }
        self._pool = FakePool(settings=settings)
        self._pools = FakePools(self._pool)
        for name, items in pools.items():
            self._pools.put(name, {"keepalive_seconds": None})
            for item in items:
                self._pools.get(name).import_key(json.loads(new_key(item)))
        for text in keys:
            self._pool.generate(text)

    # -- for tests

    @property
    def keys(self) -> list[str]:
        """All keys of the pool `default`."""
        return self._pool.keys

    @property
    def blocked(self) -> list[str]:
        """Its keys that are held."""
        return self._pool.blocked

    @property
    def cooling(self) -> list[str]:
        """Its keys that cool."""
        return self._pool.cooling

    @property
    def quarantined(self) -> list[str]:
        """Its keys that are not served until they are restored."""
        return self._pool.quarantined

    @property
    def reports(self) -> list[tuple[str, str]]:
        """All reports on its keys so far, each a key and an outcome: `("key-1", "ok")`."""
        return list(self._pool.reports)

    def pool(self, name: str) -> FakePool:
        """Another pool, with the same members: `server.pool("openai").blocked`. Raises KeyError."""
        try:
            return self._pools.get(name)
        except Refused:
            raise KeyError(name) from None

    def advance(self, seconds: float) -> None:
        """Advance the clock of the keys: blocks and cooldowns end, keys expire. The client's clock is not affected."""
        self._pools.advance(seconds)

    def fail(self, failure: int | Exception, code: str = "internal", times: int = 1, **more: Any) -> None:
        """Make the next requests fail: by a status and code of the API, or by an exception of httpx2.

        `more` are further members of the answer: `server.fail(429, "share-spent", retry_after=1.5)`.
        """
        error = Refused(failure, code, **more) if isinstance(failure, int) else failure
        self._failures += [error] * times

    # -- the transport

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """The answer of the pool."""
        request.read()
        until = self._wait(request)
        while (response := self._answer(request, last=time.monotonic() >= until)) is None:
            time.sleep(_POLL_SECONDS)
        return response

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """The same."""
        await request.aread()
        until = self._wait(request)
        while (response := self._answer(request, last=time.monotonic() >= until)) is None:  # noqa: ASYNC110
            await asyncio.sleep(
                _POLL_SECONDS
            )  # an event would have to wake waiters of other loops and threads too
        return response

    def _wait(self, request: httpx2.Request) -> float:
        path = request.url.path.removeprefix(BASE)
        self.requests.append((request.method, path))
        wait: float = _body(request).get("wait", 0) if path.endswith("/keys/acquire") else 0
        return time.monotonic() + wait

    def _answer(self, request: httpx2.Request, *, last: bool) -> httpx2.Response | None:
        """None if no key is available and it isn't the last look."""
        try:
            if self._failures:
                raise self._failures.pop(0)
            status, value = self._call(request, _body(request))
        except Refused as refused:
            if refused.code == "no-key-available":
                if not last:
                    return None
                self._pool.counts["refused"] += 1
            problem = {
                "type": f"urn:keypool:problem:{refused.code}",
                "code": refused.code,
                "title": refused.code,
                "status": refused.status,
                "detail": refused.detail,
                "request_id": "fake",
                **refused.more,
            }
            return httpx2.Response(refused.status, json=problem)
        return httpx2.Response(status) if value is None else httpx2.Response(status, json=value)

    # -- the calls

    def _call(self, request: httpx2.Request, body: dict[str, Any]) -> tuple[int, Any]:
        path = request.url.raw_path.decode().partition("?")[0].removeprefix(BASE)
        words = [unquote(word) for word in path.strip("/").split("/")]
        query = request.url.params
        match [request.method, *words]:
            case ["GET", "pools"]:
                return 200, self._pools.rows()
            case ["GET", "pools", name]:
                return 200, self._pools.row(self._pools.get(name))
            case ["PUT", "pools", name]:
                return self._pools.put(name, body)
            case ["PATCH", "pools", name]:
                return 200, self._pools.change(name, body)
            case ["DELETE", "pools", name]:
                return self._pools.delete(name, query.get("drain") == "true", query.get("now") == "true")
            case ["GET" | "POST", "rekey"]:
                raise Refused(409, "secrets-key-required")
            case [_, "pools", name, *rest]:
                return _call_of_pool(self._pools.get(name), request, rest, body)
        return _call_of_pool(self._pool, request, words, body)


_CALLS = ("unblock", "extend", "quarantine", "restore", "keepalive", "replace", "reveal")


def _call_of_pool(
    pool: FakePool, request: httpx2.Request, words: list[str], body: dict[str, Any]
) -> tuple[int, Any]:
    match [request.method, *words]:
        case ["POST", "keys"]:
            return _add(pool, **body)
        case ["POST", "keys", "acquire"]:
            body.pop("wait", None)
            return 200, pool.acquire(1, **body, attempt=_attempt(request))[0]
        case ["POST", "keys", "find"]:
            return 200, pool.look_up(body["key"])
        case ["POST", "keys", name, call] if call in _CALLS:
            return 200, getattr(pool, call)(name, **body)
        case ["PATCH", "keys", name]:
            return 200, pool.update(name, **body)
        case ["DELETE", "keys", name]:
            pool.delete(name)
            return 204, None
        case [_, "keys", *_]:
            return 200, _read(pool, request, words[1:])
        case ["GET", "stats"]:
            return 200, pool.stats()
        case ["POST", "batch"]:
            return _batch(pool, request, **body)
    return 200, _about_holders(pool, request, words, body)


def _about_holders(
    pool: FakePool, request: httpx2.Request, words: list[str], body: dict[str, Any]
) -> dict[str, Any]:
    """Who holds keys and who waits, which is nobody here; rare events."""
    match [request.method, *words]:
        case ["GET", "owners"]:
            return pool.owners()
        case ["POST", "owners", "release"]:
            return pool.release_owner(**body)
        case ["GET", "waiters"]:
            return {"waiters": [], "next": None}
        case ["GET", "events"]:
            return pool.rare_events(request.url.params.get("kind"))
    raise Refused(404, "not-found")


def _add(pool: FakePool, expire: bool = False, **item: Any) -> tuple[int, Any]:
    """Generate a key, or import one."""
    if not item:
        return 201, pool.generate()
    key, new = pool.import_key(item, expire)
    row = pool.row(key)
    shown = {name: row[name] for name in ("id", "state", "hint", "name", "expires_in")}
    return (201 if new else 200), shown | {"existed": not new, "ids": pool.ids(key.text)}


def _read(pool: FakePool, request: httpx2.Request, words: list[str]) -> dict[str, Any]:
    """The row of a key, its history, or a list."""
    if request.method == "GET" and words[1:] == ["history"]:
        query = request.url.params
        return pool.history(words[0], int(query.get("limit", "50")), query.get("after"))
    if request.method != "GET" or len(words) > 1:
        raise Refused(404, "not-found")
    return pool.row(pool.find(words[0])[0]) if words else _page(pool, request.url.params)


def _page(pool: FakePool, query: Mapping[str, str]) -> dict[str, Any]:
    rows = [pool.row(key) for key in pool.live(query.get("state"))]
    if (beginning := query.get("name")) is not None:
        rows = [row for row in rows if (row["name"] or "").startswith(beginning) and row["seat"] == 1]
        rows.sort(key=lambda row: row["name"])
    if (owner := query.get("owner")) is not None:
        rows = [row for row in rows if row["owner"] == owner]
        rows.sort(key=lambda row: row["lease"])
    return {"keys": rows, "next": None}


def _batch(pool: FakePool, request: httpx2.Request, op: str, **body: Any) -> tuple[int, Any]:
    if op == "generate":
        return 201, {"keys": [pool.generate() for _ in range(body["count"])]}
    if op == "acquire":
        return 200, {"keys": pool.acquire(**body, attempt=_attempt(request))}
    if op == "import":
        return 200, pool.import_many(**body)
    return 200, batch(getattr(pool, op), body.pop("keys"), **body)


def _body(request: httpx2.Request) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(request.content) if request.content else {}
    return content


def _attempt(request: httpx2.Request) -> tuple[object, ...] | None:
    """The identity of an acquire, the same for each repeat: its Idempotency-Key and its body."""
    given = request.headers.get("idempotency-key")
    return None if given is None else (given, request.url.path, request.content)
