"""A pool in memory, for the tests of programs that use the client: no server, no network, and time on demand.

    >>> server = FakeServer(["key-1"])
    >>> with KeyPool(transport=server) as pool, pool.lease() as key:
    ...     assert server.blocked == [key.secret]
    ...     key.rate_limited(retry_after=30)
    >>> assert server.cooling == ["key-1"]
    >>> server.advance(30)
    >>> assert server.cooling == []

It answers calls as the server does: leases with their numbers and handles, reports and cooldowns, quarantine,
extensions, repeated acquires, expiries, errors. It checks no token, and has neither a queue nor the feed: an acquire
that waits polls.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote

import httpx2

from keypool.client.fake_pool import FakePool, Refused, batch
from keypool.client.settings import BASE

_POLL_SECONDS = 0.005


class FakeServer(httpx2.BaseTransport, httpx2.AsyncBaseTransport):
    """A pool of keys, and the transport by which a KeyPool or an AsyncKeyPool reaches it.

    The numbers are the server's settings of the same names. `requests` are the methods and paths of
    all calls so far, without `/api/v1`.
    """

    def __init__(
        self,
        keys: Iterable[str] = (),
        *,
        block_seconds: float = 60.0,
        max_block_seconds: float | None = None,
        keepalive_seconds: float = 300.0,
        cooldown_seconds: float = 60.0,
        max_cooldown_seconds: float = 3600.0,
        error_threshold: int = 3,
        forget_seconds: float = 3600.0,
        max_quarantined_percent: float = 50.0,
    ) -> None:
        self.requests: list[tuple[str, str]] = []
        self._failures: list[Exception] = []
        self._pool = FakePool(
            block_seconds=block_seconds,
            max_block_seconds=max_block_seconds,
            keepalive_seconds=keepalive_seconds,
            cooldown_seconds=cooldown_seconds,
            max_cooldown_seconds=max_cooldown_seconds,
            error_threshold=error_threshold,
            forget_seconds=forget_seconds,
            max_quarantined_percent=max_quarantined_percent,
        )
        for text in keys:
            self._pool.generate(text)

    # -- for tests

    @property
    def keys(self) -> list[str]:
        """All keys."""
        return self._texts(None)

    @property
    def blocked(self) -> list[str]:
        """The keys that are held."""
        return self._texts("blocked")

    @property
    def cooling(self) -> list[str]:
        """The keys that cool."""
        return self._texts("cooling")

    @property
    def quarantined(self) -> list[str]:
        """The keys that are not served until they are restored."""
        return self._texts("quarantined")

    @property
    def reports(self) -> list[tuple[str, str]]:
        """All reports so far, each a key and an outcome: `("key-1", "ok")`."""
        return list(self._pool.reports)

    def advance(self, seconds: float) -> None:
        """Advance the clock of the keys: blocks and cooldowns end, keys expire. The client's clock is not affected."""
        self._pool.skipped += seconds

    def fail(self, failure: int | Exception, code: str = "internal", times: int = 1) -> None:
        """Make the next requests fail: by a status and code of the API, or by an exception of httpx2."""
        error = Refused(failure, code) if isinstance(failure, int) else failure
        self._failures += [error] * times

    def _texts(self, state: str | None) -> list[str]:
        return [key.text for key in self._pool.live(state)]

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
        wait: float = _body(request).get("wait", 0) if path == "/keys/acquire" else 0
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
        pool = self._pool
        words = request.url.raw_path.decode().partition("?")[0].removeprefix(BASE).strip("/").split("/")
        match [request.method, *map(unquote, words)]:
            case ["POST", "keys"]:
                return 201, pool.generate()
            case ["POST", "keys", "acquire"]:
                body.pop("wait", None)
                return 200, pool.acquire(1, **body, attempt=_attempt(request))[0]
            case [
                "POST",
                "keys",
                name,
                "unblock" | "extend" | "quarantine" | "restore" | "keepalive" as call,
            ]:
                return 200, getattr(pool, call)(name, **body)
            case ["POST", "keys", name, "reveal"]:
                key, _ = pool.find(name)
                return 200, {"id": key.id, "key": key.text}
            case ["DELETE", "keys", name]:
                pool.delete(name)
                return 204, None
            case ["GET", "keys", name]:
                return 200, pool.row(pool.find(name)[0])
            case ["GET", "keys"]:
                rows = map(pool.row, pool.live(request.url.params.get("state")))
                return 200, {"keys": list(rows), "next": None}
            case ["GET", "stats"]:
                return 200, pool.stats()
            case ["POST", "batch"]:
                return self._batch(request, **body)
        raise Refused(404, "not-found")

    def _batch(self, request: httpx2.Request, op: str, **body: Any) -> tuple[int, Any]:
        if op == "generate":
            return 201, {"keys": [self._pool.generate() for _ in range(body["count"])]}
        if op == "acquire":
            return 200, {"keys": self._pool.acquire(**body, attempt=_attempt(request))}
        return 200, batch(getattr(self._pool, op), body.pop("keys"), **body)


def _body(request: httpx2.Request) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(request.content) if request.content else {}
    return content


def _attempt(request: httpx2.Request) -> tuple[object, ...] | None:
    """The identity of an acquire, the same for each repeat: its Idempotency-Key and its body."""
    given = request.headers.get("idempotency-key")
    return None if given is None else (given, request.url.path, request.content)
