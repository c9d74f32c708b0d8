"""The application under Tornado's own tools: its test fixtures (pytest-tornado) and its HTTP client.

What most of the suite asks of a server process over plain sockets, a Tornado application can be asked in process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import pytest
from engine_support import turns_until
from support import JSON
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPResponse
from tornado.web import Application

from keypool.engine.embedded import EmbeddedEngine


async def call(client: AsyncHTTPClient, url: str, method: str = "GET", body: Any = None) -> HTTPResponse:
    """A call with a JSON body, whatever its status. Tornado's client takes a body without a type for a form."""
    content = json.dumps(body or {}) if method == "POST" else None
    return await client.fetch(url, method=method, body=content, headers=JSON, raise_error=False)


async def test_a_key_goes_round(http_client: AsyncHTTPClient, base_url: str) -> None:
    """Made, served, kept alive, given back, deleted."""
    keys = base_url + "/api/v1/keys"
    made = await call(http_client, keys, "POST")
    assert (made.code, made.headers["Cache-Control"]) == (201, "no-store")
    lease = json.loads((await call(http_client, keys + "/acquire", "POST", {"owner": "ann"})).body)
    assert lease["key"] == json.loads(made.body)["key"]
    row = json.loads((await call(http_client, base_url + made.headers["Location"])).body)
    assert (row["state"], row["owner"]) == ("blocked", "ann")
    kept = await call(http_client, f"{keys}/{lease['key']}/keepalive", "POST")
    assert json.loads(kept.body) == {"id": lease["id"], "expires_in": 300.0}
    freed = await call(http_client, f"{keys}/{lease['key']}/unblock", "POST", {"lease": lease["lease"]})
    assert json.loads(freed.body)["changed"] is True
    assert (await call(http_client, f"{keys}/{lease['key']}", "DELETE")).code == 204


async def test_an_error_is_a_problem(http_client: AsyncHTTPClient, base_url: str) -> None:
    """The client raises it by its status."""
    with pytest.raises(HTTPClientError) as error:
        await http_client.fetch(base_url + "/api/v1/keys/nobody")
    response = error.value.response
    assert response is not None
    assert (error.value.code, response.headers["Content-Type"]) == (404, "application/problem+json")
    assert json.loads(response.body)["code"] == "unknown-key"


async def test_the_client_may_wait_for_a_key(http_client: AsyncHTTPClient, base_url: str) -> None:
    """Two calls at once on one loop: the one that waits gets what the other makes."""
    keys = base_url + "/api/v1/keys"
    waiting = asyncio.ensure_future(call(http_client, keys + "/acquire", "POST", {"wait": 30}))
    while json.loads((await call(http_client, base_url + "/api/v1/stats")).body)["waiting"] == 0:
        assert not waiting.done(), f"answered at once: {waiting.result().body!r}"
    made = json.loads((await call(http_client, keys, "POST")).body)
    assert json.loads((await waiting).body)["id"] == made["id"]


async def test_a_client_that_gives_up_is_leased_nothing(
    http_client: AsyncHTTPClient, base_url: str, app: Application
) -> None:
    """Tornado's client closes the connection when its own time is up, and leaves the queue by that."""
    keys = base_url + "/api/v1/keys"
    engine: EmbeddedEngine = app.settings["dispatcher"].pools.default

    async def waits(request_timeout: float) -> bool:
        """Whether it came to wait before its time was up."""
        waited = False
        fetching = asyncio.ensure_future(
            http_client.fetch(
                keys + "/acquire",
                method="POST",
                body='{"wait": 60}',
                headers=JSON,
                request_timeout=request_timeout,
                raise_error=False,
            )
        )
        while not fetching.done():
            waited = waited or bool(engine._waiters.queue)
            await asyncio.sleep(0)
        with contextlib.suppress(HTTPClientError):
            await fetching
        return waited

    assert await waits(0.2) or await waits(3.0) or await waits(20.0)
    assert engine.pool.counters.refused == 0, "answered, instead of left to wait"
    await turns_until(lambda: not engine._waiters.queue, "nobody waits any more")
    await call(http_client, keys, "POST")
    assert (engine.pool.available, engine.pool.blocked) == (1, 0)
    assert app.settings["in_flight"].count == 0


async def test_pages_beside_the_api_are_served(http_client: AsyncHTTPClient, base_url: str) -> None:
    """By RequestHandlers, where the API goes past them."""
    assert (await call(http_client, base_url + "/healthz")).code == 200
    assert (await call(http_client, base_url + "/readyz")).code == 200
    assert (await call(http_client, base_url + "/nothing")).code == 404


async def test_the_framework_names_what_the_api_answers(http_client: AsyncHTTPClient, base_url: str) -> None:
    """HEAD and OPTIONS too."""
    head = await call(http_client, base_url + "/api/v1/stats", "HEAD")
    assert (head.code, head.body) == (200, b"")
    assert int(head.headers["Content-Length"]) > 100
    options = await call(http_client, base_url + "/api/v1/keys", "OPTIONS")
    assert (options.code, options.headers["Allow"]) == (204, "GET, HEAD, OPTIONS, POST")
