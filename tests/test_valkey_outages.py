"""Stops and outages of a pool in Valkey: what keys are given after them, what servers of one pool must agree on, and
that a pool which isn't there any more is noticed.

Time that passed is made by aging what Valkey holds; with `unseen`, as if no server had looked meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ServerProcess
from support import eventually as eventually_blocking
from valkey_support import age, check, engine_on, eventually, expires_in, on_loop, serves, with_constants
from valkeys import PATIENT, Cluster, Valkey

from keypool.core.cursor import ListQuery
from keypool.core.errors import StartError, StorageUnavailable
from keypool.engine.valkey import calls as valkey_calls
from keypool.engine.valkey import presence as valkey_presence
from keypool.engine.valkey.engine import ValkeyEngine
from keypool.engine.valkey.link import Link
from keypool.engine.valkey.scripts import keys_of

POOL = "keypool"
FACTS, SERVERS = "{keypool}:pool", "{keypool}:servers"


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    """One that a test may break."""
    with Valkey() as one:
        yield one


@contextlib.contextmanager
def logged(words: str, level: int = logging.ERROR) -> Iterator[list[logging.LogRecord]]:
    """Fails unless just one line with these words is logged meanwhile, which is kept from whoever wants none."""
    found: list[logging.LogRecord] = []

    def drop(record: logging.LogRecord) -> bool:
        if record.levelno != level or words not in record.getMessage():
            return True
        found.append(record)
        return False

    logger = logging.getLogger("keypool.valkey")
    logger.addFilter(drop)
    logger.setLevel(level)
    try:
        yield found
    finally:
        logger.removeFilter(drop)
        logger.setLevel(logging.NOTSET)
    assert len(found) == 1, f"logged {len(found)} times: {words}"


async def lost(engine: ValkeyEngine) -> str:
    """Why it will never serve again."""
    reason: str = await eventually(lambda: engine._nodes.gone, "the loss is noticed")
    with pytest.raises(StorageUnavailable, match="pool"):
        engine.ready()
    return reason


def expect_given(left: float, seconds: float, began: float) -> None:
    """Fails unless that is what is left of the seconds that a key was given since `began`, of time.monotonic."""
    least = seconds - (time.monotonic() - began) - 0.1
    assert least <= left <= seconds + 0.1, f"{left} s left of {seconds}, wanted at least {least:.3f}"


def seconds_left(engine: ValkeyEngine) -> Any:
    """The longest and the shortest life of the keys on a page."""

    async def both() -> tuple[float, float]:
        left = [expires_in(row) for row in (await engine.page(ListQuery(limit=500))).keys]
        return min(left), max(left)

    return both()


# ------------------------------------------------------------------------------------------------------- a stop


@on_loop
async def test_a_rolling_restart_gives_no_grace(valkey: Valkey) -> None:
    """As long as one server serves, whichever of the others leave and come, no key lives longer for it."""
    async with engine_on(valkey.url, 4) as staying:
        key = (await staying.generate(1))[0].key
        age(valkey, POOL, 4, 200)
        for _ in range(3):
            async with engine_on(valkey.url, 4) as leaving:
                await leaving.stats()
            metas = [keys_of(POOL, partition, 4)[0] for partition in range(4)]
            assert all(valkey.ask("HGET", meta, "seen") for meta in metas), "it is still known who looked"
            async with engine_on(valkey.url, 4, grace=290.0) as came:
                assert expires_in(await came.get(key)) < 101


@on_loop
async def test_a_quick_restart_of_the_only_server_gives_grace(valkey: Valkey) -> None:
    """However short the stop was."""
    async with engine_on(valkey.url, 4) as engine:
        key = (await engine.generate(1))[0].key
        age(valkey, POOL, 4, 200)
    began = time.monotonic()
    async with engine_on(valkey.url, 4, grace=250.0) as engine:
        expect_given(expires_in(await engine.get(key)), 250, began)


@on_loop
async def test_a_killed_server_does_not_count_as_running(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one waits until the other has been silent for long enough, and gives grace."""
    monkeypatch.setattr(valkey_presence, "AWAY_SECONDS", 1.0)
    async with engine_on(valkey.url, 4) as engine:
        key = (await engine.generate(1))[0].key
        age(valkey, POOL, 4, 200)
        now = valkey.ask("TIME")
        dead = int(now[0]) * 1_000_000 + int(now[1])
    valkey.ask("ZADD", SERVERS, dead, "killed")
    began = time.monotonic()
    async with engine_on(valkey.url, 4, grace=250.0) as engine:
        expect_given(expires_in(await engine.get(key)), 250, began)


@on_loop
async def test_without_grace_deadlines_go_on_during_a_stop(valkey: Valkey) -> None:
    """Half a keepalive is only for outages, in which servers run but can't reach Valkey."""
    async with engine_on(valkey.url, 4) as engine:
        key = (await engine.generate(1))[0].key
    age(valkey, POOL, 4, 400, unseen=True)
    async with engine_on(valkey.url, 4) as engine:
        assert await engine.keepalive_many([key]) == ["unknown"]


@on_loop
async def test_grace_revives_no_key_that_was_dead_before_the_stop(valkey: Valkey) -> None:
    """Even if nobody had purged it yet."""
    async with engine_on(valkey.url, 4) as engine:
        key = (await engine.generate(1))[0].key
    age(valkey, POOL, 4, 400)
    async with engine_on(valkey.url, 4, grace=100.0) as engine:
        assert await engine.keepalive_many([key]) == ["unknown"]


# ----------------------------------------------------------------------------------------------------- an outage


@on_loop
async def test_keys_that_nobody_could_keep_alive_outlive_an_outage(valkey: Valkey) -> None:
    """They get half a keepalive before the first call is served, in slices; those that have more keep it. Blocks
    that ran out are released. The order by expiry has no ties.
    """
    async with engine_on(valkey.url, 1) as engine:
        for _ in range(2):
            await engine.generate(700)
        leases = await engine.acquire_many("w", 3)
        began = time.monotonic()
        age(valkey, POOL, 1, 400, unseen=True)
        fresh = (await engine.generate(1))[0]
        stats = await engine.stats()
        assert (stats.total, stats.expired, stats.blocked) == (1401, 0, 0)
        for left in await seconds_left(engine):
            expect_given(left, 150, began)
        expect_given(expires_in(await engine.get(fresh.key)), 300, began)
        assert await engine.keepalive_many([lease.key for lease in leases]) == ["done"] * 3
        check(valkey, POOL, 1)
        scores = [float(s) for s in valkey.ask("ZRANGE", "{keypool:0}:expiry", 0, -1, "WITHSCORES")[1::2]]
        assert len(set(scores)) == len(scores)


@on_loop
async def test_keys_that_are_not_urgent_get_time_while_calls_are_served(valkey: Valkey) -> None:
    """Those that have some time left needn't hold up the first calls; each gets the same in the end."""
    async with engine_on(valkey.url, 1) as engine:
        await engine.generate(600)
        began = time.monotonic()
        age(valkey, POOL, 1, 200, unseen=True)
        kept = (await engine.page(ListQuery(limit=1))).keys[0].id
        await engine.keepalive(kept)

        async def given() -> bool:
            left: tuple[float, float] = await seconds_left(engine)
            return left[0] > 149.9 - (time.monotonic() - began)

        await eventually(given, "all have been given time")
        expect_given(expires_in(await engine.get(kept)), 300, began)
        assert (await engine.stats()).total == 600
        check(valkey, POOL, 1)


@on_loop
async def test_an_outage_gives_the_grace_of_a_restart_if_that_is_more(valkey: Valkey) -> None:
    """The larger of the two."""
    async with engine_on(valkey.url, 1, grace=200.0) as engine:
        key = (await engine.generate(1))[0].key
        began = time.monotonic()
        age(valkey, POOL, 1, 400, unseen=True)
        expect_given(expires_in(await engine.get(key)), 200, began)


@on_loop
async def test_a_server_that_alone_lost_its_connection_gives_nothing(valkey: Valkey) -> None:
    """Others served meanwhile, so keys that died are dead."""
    async with engine_on(valkey.url, 1) as engine, engine_on(valkey.url, 1) as other:
        key = (await engine.generate(1))[0].key
        for link in list(engine._nodes._links.values()):
            link.close()
        age(valkey, POOL, 1, 400)
        await other.stats()
        assert await engine.keepalive_many([key]) == ["unknown"]


@on_loop
async def test_a_valkey_that_was_stopped_purges_nothing_when_it_continues(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even by calls that arrived while it was stopped, or were sent before that was noticed."""
    with_constants(monkeypatch, AWAY=1_600_000)
    async with engine_on(valkey.url, 1, keepalive_seconds=60) as engine:
        keys = [key.key for key in await engine.generate(100)]
        age(valkey, POOL, 1, 58)  # so that they die while it is stopped; after that they are given 30 s
        with valkey.paused():
            started = time.monotonic()
            with contextlib.suppress(StorageUnavailable):
                await engine.stats()
            await asyncio.sleep(2.2 - (time.monotonic() - started))

        async def kept() -> bool:
            return await engine.keepalive_many(keys) == ["done"] * 100

        await eventually(kept, "all are alive")
        assert (await engine.stats()).expired == 0


@on_loop
async def test_a_step_of_valkeys_clock_is_counted(valkey: Valkey) -> None:
    """And logged, in either direction; a late heartbeat is not a step."""
    async with engine_on(valkey.url, 1) as engine:
        await eventually(lambda: engine._presence._clocks, "a heartbeat")
        for step, shown in ((3600, "-3600"), (-7200, "+7200")):
            before = engine.clock_steps
            at, moment = engine._presence._clocks or (0, 0.0)
            with logged(shown, logging.WARNING):
                engine._presence._clocks = (at + step * 1_000_000, moment)
                await engine._presence.heartbeat()
            assert engine.clock_steps == before + 1


# -------------------------------------------------------------------------------------- emptied, replaced, evicting


@on_loop
async def test_an_emptied_valkey_is_an_outage_until_the_servers_are_started_again(valkey: Valkey) -> None:
    """Nothing is written to it, no second pool begins beside the servers that run, and one begins after them."""
    with logged("emptied"):
        async with engine_on(valkey.url, 4) as engine:
            key = (await engine.generate(1))[0].key
            valkey.ask("FLUSHALL")
            for call in (engine.keepalive(key), engine.generate(1), engine.acquire(None, 0), engine.stats()):
                with pytest.raises(StorageUnavailable, match="emptied"):
                    await call
            assert "emptied" in await lost(engine)
            assert not engine.storage_up()
            with pytest.raises(StartError, match="stop them first"):
                async with engine_on(valkey.url, 4):
                    pass
            with pytest.raises(StorageUnavailable):
                await engine.acquire("w", 1)
            assert valkey.ask("DBSIZE") == 0
    async with engine_on(valkey.url, 1) as engine:
        assert (await engine.stats()).total == 0


@on_loop
async def test_a_part_of_the_pool_that_was_emptied_is_an_outage(valkey: Valkey) -> None:
    """As of a node of a cluster that came back with nothing."""
    with logged("emptied"):
        async with engine_on(valkey.url, 4) as engine:
            await engine.generate(100)
            valkey.ask("UNLINK", *keys_of(POOL, 2, 4))
            await lost(engine)
    async with engine_on(valkey.url, 4) as engine:
        await engine.generate(1)


@on_loop
async def test_another_pool_of_that_name_is_an_outage(valkey: Valkey) -> None:
    """A Valkey that was replaced by one with a pool of its own: nothing is served from it."""
    with logged("another pool"):
        async with engine_on(valkey.url, 4) as engine:
            await engine.generate(1)
            valkey.ask("HINCRBY", FACTS, "born", 1)
            for link in list(engine._nodes._links.values()):
                link.close()
            with pytest.raises(StorageUnavailable, match="another pool"):
                await engine.acquire(None, 0)
            await lost(engine)


@on_loop
async def test_a_valkey_that_evicts_keys_is_refused(valkey: Valkey) -> None:
    """At the start, naming the setting; and when the connection is made anew, as an outage that ends."""
    async with engine_on(valkey.url, 1) as engine:
        await engine.generate(1)
        valkey.ask("CONFIG", "SET", "maxmemory", "100mb", "maxmemory-policy", "allkeys-lru")
        with pytest.raises(StartError, match=r"maxmemory-policy is allkeys-lru.*noeviction"):
            async with engine_on(valkey.url, 1):
                pass
        for link in list(engine._nodes._links.values()):
            link.close()
        with pytest.raises(StorageUnavailable, match="maxmemory-policy"):
            await engine.acquire(None, 0)
        valkey.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
        await serves(engine)
        await engine.acquire(None, 0)


@on_loop
async def test_an_evicting_policy_without_maxmemory_is_a_warning(valkey: Valkey) -> None:
    """Without maxmemory nothing is evicted."""
    valkey.ask("CONFIG", "SET", "maxmemory-policy", "volatile-ttl")
    with logged("volatile-ttl", logging.WARNING):
        async with engine_on(valkey.url, 1) as engine:
            await engine.generate(1)


@on_loop
async def test_full_memory_is_left_by_deleting_however_long_it_lasts(valkey: Valkey) -> None:
    """Polls that can't store their moment must not make the partition count as unattended."""
    async with engine_on(valkey.url, 1) as engine:
        keys = [key.key for key in await engine.generate(50)]
        valkey.ask("CONFIG", "SET", "maxmemory", 1)
        seen = valkey.ask("HGET", "{keypool:0}:meta", "seen")
        await eventually(lambda: valkey.ask("HGET", "{keypool:0}:meta", "seen") != seen, "it is looked at")
        valkey.ask("CONFIG", "SET", "maxmemory", 0)
        age(valkey, POOL, 1, 10, unseen=True)
        valkey.ask("CONFIG", "SET", "maxmemory", 1)
        await engine.delete(keys[0])


# ------------------------------------------------------------------------------------------------ several servers


@on_loop
@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("block_seconds", 30.5, "30.5"),
        ("keepalive_seconds", 200.0, "200"),
        ("key_length", 24, "24"),
        ("max_keys", 5_000_000, "5000000"),
    ],
)
async def test_servers_of_a_pool_have_the_same_settings(
    valkey: Valkey, name: str, value: float, shown: str
) -> None:
    """A server that differs is refused, naming the setting; once no other runs, its settings are the pool's."""
    rules: dict[str, Any] = {
        "block_seconds": 60.0, "keepalive_seconds": 300.0, "key_length": 20, "max_keys": 1_000_000
    }  # fmt: skip
    async with engine_on(valkey.url, 1, **rules):
        async with engine_on(valkey.url, 1, **rules):
            pass
        was = f"{rules[name]:g}" if name != "max_keys" else "1000000"
        with pytest.raises(StartError, match=f"{name}={was}, and this server has {shown}:"):
            async with engine_on(valkey.url, 1, **rules | {name: value}):
                pass
    async with engine_on(valkey.url, 1, **rules | {name: value}):
        assert valkey.ask("HGET", FACTS, name).decode() == shown


@on_loop
async def test_a_pool_has_the_partitions_that_it_was_made_with(valkey: Valkey) -> None:
    """One, unless the flag says otherwise; without the flag, as many as there are."""
    async with engine_on(valkey.url, None) as engine:
        assert engine._partitions.count == 1
    url = f"{valkey.url}?pool=other"
    async with engine_on(url, 8):
        pass
    async with engine_on(url, None) as engine:
        assert engine._partitions.count == 8
    with pytest.raises(StartError, match="--partitions=8 or without the flag, not with 1"):
        async with engine_on(url, 1):
            pass


# --------------------------------------------------------------------------------------------- nodes and connections


@on_loop
async def test_one_dead_primary_takes_out_its_own_keys_only() -> None:
    """The server is ready and says which part is missing; every acquire is served by the other nodes."""
    with Cluster(3, 0, "--cluster-require-full-coverage", "no", node_timeout=PATIENT) as cluster:
        async with engine_on(cluster.url, None) as engine:
            assert engine._partitions.count == 16
            texts = [key.key for key in await engine.generate(400)]
            dead = cluster.nodes[1]
            there = [
                text
                for text in texts
                if engine._client.node_of(engine._partitions.of(text)) == ("127.0.0.1", dead.port)
            ]
            dead.kill()
            detail = await eventually(lambda: engine.degraded, "it says what is missing")
            assert f"of 16 partitions can't be reached: 127.0.0.1:{dead.port}" in detail
            engine.ready()
            assert not engine.storage_up()
            for _ in range(len(texts) - len(there)):  # to the last, when nearly every draw is void
                assert (await engine.acquire(None, 0)).key not in there
            with pytest.raises(StorageUnavailable):
                await engine.acquire(None, 0)
            with pytest.raises(StorageUnavailable):
                await engine.keepalive(there[0])
            for node in (cluster.nodes[0], cluster.nodes[2]):
                node.kill()
            await eventually(lambda: len(engine._client.unreachable) == 16, "none is left")
            with pytest.raises(StorageUnavailable):
                engine.ready()


@on_loop
async def test_a_call_is_held_for_its_own_second(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier loss of the connection, from which it recovered, doesn't shorten that."""
    assert valkey_calls.HELD_SECONDS == 1
    monkeypatch.setattr(valkey_calls, "HELD_SECONDS", 30)  # for a machine that stands still for a second

    def lose(engine: ValkeyEngine) -> None:
        for link in list[Link](engine._nodes.serving.values()):
            link.close()

    async with engine_on(valkey.url, 1) as engine:
        loop = asyncio.get_running_loop()
        key = (await engine.generate(1))[0].key
        lose(engine)
        await engine.keepalive(key)
        usable_link, mended = engine._nodes._usable_link, asyncio.Event()

        async def slow(address: Any) -> Link:
            await mended.wait()
            return await usable_link(address)

        engine._nodes._usable_link = slow  # type: ignore[method-assign]
        lost = loop.time()
        lose(engine)
        call = asyncio.ensure_future(engine.keepalive(key))
        held = engine._client._held
        await eventually(lambda: any(each.script == "keepalive" for each in held), "the call is held")
        until = [each.held_until for each in held if each.script == "keepalive"]
        assert until[0] >= lost + 30, "the seconds of the earlier loss count"
        assert not call.done()
        mended.set()
        assert (await call).id


@on_loop
async def test_a_valkey_that_loads_its_file_is_waited_for() -> None:
    """A start in the meantime says so in the log, and goes on when it can."""
    with Valkey("--appendonly", "yes") as valkey:
        async with engine_on(valkey.url, 1) as engine:
            key = (await engine.generate(1))[0].key
        valkey.ask("EVAL", "for n = 1, 40000 do redis.call('SET', 'other:' .. n, 'x') end", 0)
        valkey.kill()
        # Microseconds for each: it loads for 12 s, unless it is told to hurry.
        valkey._flags += ("--key-load-delay", "300")
        valkey.start()

        async def hurry() -> None:
            await eventually(lambda: found, "the line is logged")
            valkey.ask("CONFIG", "SET", "key-load-delay", 0)

        with logged("is loading its file: waiting", logging.INFO) as found:
            hurrying = asyncio.ensure_future(hurry())
            async with engine_on(valkey.url, 1) as engine:
                assert (await engine.acquire(None, 0)).key == key
            await hurrying


@on_loop
async def test_waiters_fail_when_the_pool_is_lost(valkey: Valkey) -> None:
    """At once, as no key can come."""
    with logged("emptied"):
        async with engine_on(valkey.url, 1) as engine:
            waiting = asyncio.ensure_future(engine.acquire("w", 60))
            await eventually(lambda: len(engine._waiters) or waiting.done(), "somebody waits")
            valkey.ask("FLUSHALL")
            with pytest.raises(StorageUnavailable):
                await asyncio.wait_for(waiting, 30)
            await lost(engine)


def test_readyz_says_which_part_is_missing(tmp_path: Path) -> None:
    """200 as long as some part is served, so that a balancer doesn't drop every server for one dead node."""
    with (
        Cluster(3, 0, "--cluster-require-full-coverage", "no", node_timeout=PATIENT) as cluster,
        ServerProcess([f"--engine={cluster.url}", "--port=0"], cwd=tmp_path) as server,
    ):
        client = server.client()
        assert client.get("/readyz").expect(200) == {"status": "ready"}
        cluster.nodes[1].kill()
        eventually_blocking(lambda: "detail" in client.get("/readyz").expect(200), "it is said")
        assert f"127.0.0.1:{cluster.nodes[1].port}" in client.get("/readyz").expect(200)["detail"]
        for node in cluster.nodes:
            node.kill()
        eventually_blocking(lambda: client.get("/readyz").status == 503, "none is left")
