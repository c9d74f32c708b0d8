"""A pool in memory, for the tests of programs that use the client: no server, no network, and time on demand.

    >>> server = FakeServer(["key-1"])
    >>> with KeyPool(transport=server) as pool, pool.lease() as key:
    ...     assert server.blocked == [key.secret]

It answers calls as the server does: leases and their numbers, blocks and expiries, errors. It checks no token, and
has neither a queue nor the feed: an acquire that waits polls.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

import httpx2

from keypool.client.answers import hint
from keypool.client.settings import BASE

_POLL_SECONDS = 0.005


@dataclass
class _Key:
    id: int
    text: str
    created_at: datetime
    expires: float
    release: float | None = None
    lease: int | None = None
    owner: str | None = None


class _Refused(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status = status
        self.code = code


class FakeServer(httpx2.BaseTransport, httpx2.AsyncBaseTransport):
    """A pool of keys, and the transport by which a KeyPool or an AsyncKeyPool reaches it.

    `block_seconds` and `keepalive_seconds` are those of the server. `requests` are the methods and paths of
    all calls so far, without `/api/v1`.
    """

    def __init__(
        self, keys: Iterable[str] = (), *, block_seconds: float = 60.0, keepalive_seconds: float = 300.0
    ) -> None:
        self.block_seconds = block_seconds
        self.keepalive_seconds = keepalive_seconds
        self.requests: list[tuple[str, str]] = []
        self._keys: dict[str, _Key] = {}
        self._failures: list[Exception] = []
        self._ids = self._leases = 0
        self._skipped = 0.0
        self._counts = dict.fromkeys(
            ("generated", "acquired", "unblocked", "released", "deleted", "expired", "kept_alive", "refused"),
            0,
        )
        for text in keys:
            self._generate(text)

    # -- for tests

    @property
    def keys(self) -> list[str]:
        """All keys."""
        return [key.text for key in self._live()]

    @property
    def blocked(self) -> list[str]:
        """The keys that are held."""
        return [key.text for key in self._live() if key.release is not None]

    def advance(self, seconds: float) -> None:
        """Advance the clock of the keys: blocks end, keys expire. The client's own clock is not affected."""
        self._skipped += seconds

    def fail(self, failure: int | Exception, code: str = "internal", times: int = 1) -> None:
        """Make the next requests fail: by a status and code of the API, or by an exception of httpx2."""
        error = _Refused(failure, code) if isinstance(failure, int) else failure
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
        wait: float = _body(request).get("wait", 0) if path == "/keys/acquire" else 0
        return time.monotonic() + wait

    def _answer(self, request: httpx2.Request, *, last: bool) -> httpx2.Response | None:
        """None if no key is available and it isn't the last look."""
        try:
            if self._failures:
                raise self._failures.pop(0)
            status, value = self._call(request, _body(request))
        except _Refused as refused:
            if refused.code == "no-key-available" and not last:
                return None
            self._counts["refused"] += refused.code == "no-key-available"
            problem = {
                "type": f"urn:keypool:problem:{refused.code}",
                "code": refused.code,
                "title": refused.code,
                "status": str(refused.status),
                "detail": f"a fake {refused.code}",
                "request_id": "fake",
            }
            return httpx2.Response(refused.status, json=problem)
        return httpx2.Response(status) if value is None else httpx2.Response(status, json=value)

    # -- the calls

    def _call(  # noqa: C901 - a table
        self, request: httpx2.Request, body: dict[str, Any]
    ) -> tuple[int, Any]:
        words = request.url.raw_path.decode().partition("?")[0].removeprefix(BASE).strip("/").split("/")
        match [request.method, *map(unquote, words)]:
            case ["POST", "keys"]:
                return 201, self._generated(self._generate())
            case ["POST", "keys", "acquire"]:
                return 200, self._acquire(body.get("owner"))
            case ["POST", "keys", text, "unblock"]:
                return 200, self._unblock(text, body.get("lease"))
            case ["POST", "keys", text, "keepalive"]:
                return 200, self._keepalive(text)
            case ["POST", "keys", text, "reveal"]:
                key = self._find(text)
                return 200, {"id": key.id, "key": key.text}
            case ["DELETE", "keys", text]:
                self._delete(text)
                return 204, None
            case ["GET", "keys", text]:
                return 200, self._row(self._find(text))
            case ["GET", "keys"]:
                state = request.url.params.get("state")
                rows = [self._row(key) for key in self._live()]
                return 200, {"keys": [row for row in rows if state in (None, row["state"])], "next": None}
            case ["GET", "stats"]:
                return 200, self._stats()
            case ["POST", "batch"]:
                return self._batch(body)
        raise _Refused(404, "not-found")

    def _batch(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["op"] == "generate":
            return 201, {"keys": [self._generated(self._generate()) for _ in range(body["count"])]}
        if body["op"] == "acquire":
            free = sum(key.release is None for key in self._live())
            return 200, {
                "keys": [self._acquire(body.get("owner")) for _ in range(min(body["count"], free) or 1)]
            }
        single: Callable[..., object] = getattr(self, f"_{body['op']}")
        done: dict[str, Any] = {"done": 0, "unknown": [], "stale": []}
        for item in body["keys"]:
            text, more = (item["key"], [item["lease"]]) if isinstance(item, dict) else (item, [])
            try:
                single(text, *more)
                done["done"] += 1
            except _Refused as refused:
                done["unknown" if refused.code == "unknown-key" else "stale"].append(text)
        return 200, done

    def _generate(self, text: str | None = None) -> _Key:
        self._ids += 1
        text = f"fakekey{self._ids:013}" if text is None else text
        key = _Key(self._ids, text, datetime.now(UTC), self._now() + self.keepalive_seconds)
        self._keys[text] = key
        self._counts["generated"] += 1
        return key

    def _acquire(self, owner: str | None) -> dict[str, Any]:
        free = [key for key in self._live() if key.release is None]
        if not free:
            raise _Refused(404, "no-key-available")
        key = random.choice(free)  # noqa: S311 - a fake
        self._leases += 1
        key.lease, key.owner, key.release = self._leases, owner, self._now() + self.block_seconds
        self._counts["acquired"] += 1
        times = {"release_in": self.block_seconds, "expires_in": key.expires - self._now()}
        return {"id": key.id, "key": key.text, "lease": key.lease, **times}

    def _unblock(self, text: str, lease: int | None = None) -> dict[str, Any]:
        key = self._find(text)
        if lease is not None and lease != key.lease:
            raise _Refused(409, "stale-lease")
        changed = key.release is not None
        key.release = key.owner = None
        self._counts["unblocked"] += changed
        return {"id": key.id, "state": "available", "changed": changed}

    def _keepalive(self, text: str) -> dict[str, Any]:
        key = self._find(text)
        key.expires = self._now() + self.keepalive_seconds
        self._counts["kept_alive"] += 1
        return {"id": key.id, "expires_in": self.keepalive_seconds}

    def _delete(self, text: str) -> None:
        del self._keys[self._find(text).text]
        self._counts["deleted"] += 1

    # -- the keys

    def _now(self) -> float:
        return time.monotonic() + self._skipped

    def _live(self) -> list[_Key]:
        """All keys, after the deadlines that have passed."""
        for key in list(self._keys.values()):
            if key.expires <= self._now():
                del self._keys[key.text]
                self._counts["expired"] += 1
            elif key.release is not None and key.release <= self._now():
                key.release = key.owner = None
                self._counts["released"] += 1
        return list(self._keys.values())

    def _find(self, text: str) -> _Key:
        for key in self._live():
            if text in (key.text, f"id:{key.id}"):
                return key
        raise _Refused(404, "unknown-key")

    def _generated(self, key: _Key) -> dict[str, Any]:
        return {"id": key.id, "key": key.text, "state": "available", "expires_in": self.keepalive_seconds}

    def _row(self, key: _Key) -> dict[str, Any]:
        release = None if key.release is None else key.release - self._now()
        return {
            "id": key.id,
            "hint": hint(key.text),
            "state": "available" if release is None else "blocked",
            "owner": key.owner,
            "lease": key.lease,
            "created_at": key.created_at.isoformat(timespec="milliseconds"),
            "expires_in": key.expires - self._now(),
            "release_in": release,
        }

    def _stats(self) -> dict[str, Any]:
        total, blocked = len(self._live()), len(self.blocked)
        now = {"total": total, "available": total - blocked, "blocked": blocked, "waiting": 0}
        return {**now, **self._counts, "uptime": 0.0, "engine": "fake", "version": "0"}


def _body(request: httpx2.Request) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(request.content) if request.content else {}
    return content
