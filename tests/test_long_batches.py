"""A batch is served in slices of time: other callers are answered in between, and the batch's answer is the same."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from durable_support import opened
from engine_support import on_loop, turns_until
from http1.harness import Client, request, until
from tornado.netutil import bind_sockets

from keypool.api.auth import Access
from keypool.core.answers import Unblock
from keypool.core.errors import PoolFull
from keypool.core.rules import DEFAULT_RULES, PoolRules
from keypool.engine.embedded import EmbeddedEngine
from keypool.engine.pools import EmbeddedPools
from keypool.server.app import make_app
from keypool.server.serving import SERVERS

COUNT = 60


def slow_clock() -> Callable[[], float]:
    """A clock by which every look takes 50 µs, so that a batch of `COUNT` has many slices."""
    ticks = itertools.count()
    return lambda: next(ticks) * 50e-6


def slow_engine(rules: PoolRules = DEFAULT_RULES) -> EmbeddedEngine:
    return EmbeddedEngine(rules, clock=slow_clock())


async def together(*calls: Coroutine[Any, Any, Any]) -> list[Any]:
    """The answers or errors of the calls. Fails if one ended before all had begun."""
    return await asyncio.gather(*calls, return_exceptions=True)


@on_loop
async def test_other_calls_are_served_between_two_slices() -> None:
    """A single call that comes behind a batch is answered before it, and the batch's answers are in order."""
    engine = slow_engine()
    made = await engine.generate(COUNT)
    over: list[str] = []

    async def noted(name: str, call: Coroutine[Any, Any, Any]) -> Any:
        answer = await call
        over.append(name)
        return answer

    refs = [text for key in made for text in (key.key, "nobody")]
    known, _ = await asyncio.gather(
        noted("batch", engine.keepalive_many(refs)), noted("single", engine.keepalive(1))
    )
    assert known == ["done", "unknown"] * COUNT
    assert over == ["single", "batch"]


@on_loop
async def test_generate_stays_all_or_none() -> None:
    """Two batches that don't fit together: one has all its keys, the other none, though both have many slices."""
    engine = slow_engine(PoolRules(max_keys=COUNT + 10))
    answers = await together(engine.generate(COUNT), engine.generate(COUNT), engine.generate(10))
    assert [type(answer) for answer in answers] == [list, PoolFull, list]
    assert [len(answers[0]), len(answers[2])] == [COUNT, 10]
    await engine.delete(1)
    assert len(await engine.generate(1)) == 1, "the room that was reserved is free again"


@on_loop
async def test_keys_are_acquired_once_by_batches_that_take_turns() -> None:
    """Every key is leased by one of them, and none is left."""
    engine = slow_engine()
    await engine.generate(COUNT)
    answers = await together(engine.acquire_many("a", COUNT), engine.acquire_many("b", COUNT))
    ids = [lease.id for leases in answers for lease in leases]
    assert sorted(ids) == list(range(1, COUNT + 1))
    assert all(answers)


@on_loop
async def test_an_acquire_that_is_cancelled_between_two_slices_keeps_nothing() -> None:
    """Its caller hung up: nobody would know of the leases."""
    engine = slow_engine()
    await engine.generate(COUNT)
    call = asyncio.ensure_future(engine.acquire_many(None, COUNT))
    await asyncio.sleep(0)
    assert 0 < engine.pool.blocked < COUNT
    call.cancel()
    await asyncio.wait([call])
    assert engine.pool.available == COUNT


@on_loop
async def test_unblock_and_delete_take_their_items_in_order() -> None:
    """A key that stands twice is unknown the second time, in whatever slice that is."""
    engine = slow_engine()
    await engine.generate(COUNT)
    leases = await engine.acquire_many(None, COUNT)
    assert await engine.unblock_many([Unblock(lease.id, lease.lease) for lease in leases]) == ["done"] * COUNT
    gone = await engine.delete_many([*range(1, COUNT + 1), *range(1, COUNT + 1)])
    assert [identity != "unknown" for identity in gone] == [True] * COUNT + [False] * COUNT


@pytest.mark.parametrize("http", SERVERS)
@on_loop
async def test_a_caller_makes_progress_beside_pipelined_batches(http: str) -> None:
    """Each of its calls waits for a slice or two of a batch, and not for a whole one."""
    engine, started = slow_engine(), []
    keepalive_many = engine.keepalive_many

    def counted(refs: Any) -> Any:
        started.append(refs)
        return keepalive_many(refs)

    engine.keepalive_many = counted  # type: ignore[method-assign]
    app = make_app(EmbeddedPools(engine), Access())
    server = SERVERS[http](app, None)
    sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    port = sockets[0].getsockname()[1]
    flood, caller = [Client(*await asyncio.open_connection("127.0.0.1", port)) for _ in range(2)]
    body = json.dumps({"op": "keepalive", "keys": ["a"] * 1000}).encode()
    flood.writer.write(request("/api/v1/batch", method="POST", body=body) * 3)
    await until(lambda: started)
    for _ in range(50):
        assert (await caller.get("/api/v1/stats")).status == 200
    assert len(started) < 3, "calls waited for whole batches"
    for _ in range(3):
        assert json.loads((await flood.response()).body)["unknown"] == ["a"] * 1000
    await flood.close()
    await caller.close()
    server.stop()
    await server.close_all_connections()


@pytest.mark.parametrize("http", SERVERS)
@on_loop
async def test_a_batch_whose_caller_hangs_up_runs_to_its_end(http: str) -> None:
    """Also if it happens between two slices; only an acquire is cancelled, and leaves no key leased."""
    engine = slow_engine()
    texts = [key.key for key in await engine.generate(COUNT)]
    app = make_app(EmbeddedPools(engine), Access())
    server = SERVERS[http](app, None)
    sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    port = sockets[0].getsockname()[1]
    in_flight = app.settings["in_flight"]
    cases: list[tuple[Any, Callable[[], int]]] = [
        ({"op": "acquire", "count": COUNT}, lambda: engine.pool.blocked),
        ({"op": "delete", "keys": texts}, lambda: COUNT - engine.pool.total),
    ]
    for body, changed in cases:
        client = Client(*await asyncio.open_connection("127.0.0.1", port))
        client.writer.write(request("/api/v1/batch", method="POST", body=json.dumps(body).encode()))
        await turns_until(changed, "the batch is under way")
        assert changed() < COUNT
        client.reset()
        await until(lambda: not in_flight.count)
        assert engine.pool.blocked == 0
    assert engine.pool.total == 0
    server.stop()
    await server.close_all_connections()


@on_loop
async def test_a_batch_is_one_commit_however_many_slices_it_has(tmp_path: Path) -> None:
    """A single call between two slices needn't wait for the batch: its commit has what has changed so far."""
    async with opened(tmp_path / "keypool.db") as engine:
        await engine.generate(1)
        engine.now = slow_clock()
        commits = engine.journal.histograms()["commit_rows"]
        before = commits.count
        made = await engine.generate(COUNT)
        assert commits.count == before + 1, "a commit for each slice"
        over: list[str] = []

        async def noted(name: str, call: Coroutine[Any, Any, Any]) -> None:
            await call
            over.append(name)

        refs = [key.key for key in made] * 20
        await asyncio.gather(
            noted("batch", engine.keepalive_many(refs)), noted("single", engine.keepalive(1))
        )
        assert over == ["single", "batch"]
