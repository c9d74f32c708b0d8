"""Many pools over one Valkey, shared by servers: found by all of them, changed, emptied and gone.

What a pool is to its callers is told in test_pools.py; here it is what two servers make of one another's changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import ServerProcess
from support import eventually as come_true
from valkey_support import Place, age, become, eventually, new_place, on_loop, pools_on
from valkeys import Valkey, new_pool, shared_cluster
from viewing import charts_shown

from keypool.core.answers import KeyPatch, Unblock
from keypool.core.errors import (
    BadRequest,
    NoKeyAvailable,
    PoolDraining,
    PoolFixed,
    PoolFull,
    PoolNotEmpty,
    StorageUnavailable,
    TooManyPools,
    UnknownKey,
    UnknownPool,
)
from keypool.core.events import By, Change, Event, Origin
from keypool.core.keys import State
from keypool.core.outcomes import Outcome, Report
from keypool.core.pace import Pace
from keypool.engine.valkey import link as valkey_link
from keypool.engine.valkey import presence
from keypool.engine.valkey.engine import ValkeyEngine
from keypool.engine.valkey.pools import ValkeyPools

ADMIN = Origin(By.OPERATOR, "ops")
FOUND = 2.0
"""Seconds within which a server must find what another one changed."""


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Place:
    """A Valkey in which there is no pool yet. On a busy machine its answers, and connections to it, may take long."""
    monkeypatch.setattr(valkey_link, "SILENCE", 30.0)
    monkeypatch.setattr(valkey_link, "_CONNECT_SECONDS", 30.0)
    return new_place()


@contextlib.asynccontextmanager
async def two_servers(url: str, **rules: Any) -> AsyncIterator[tuple[ValkeyPools, ValkeyPools]]:
    """Two servers over the same place."""
    async with pools_on(url, 2, **rules) as one, pools_on(url, 2, **rules) as two:
        yield one, two


async def follow(pools: ValkeyPools, condition: Callable[[], object], what: str) -> None:
    """Return once the server has followed a change that another one has made, which it must within FOUND.

    That is: its next heartbeat tells it, or the one after, if that one was under way when the change was made.
    """
    versions: list[int] = []
    at_version = pools._presence.on_version

    def heard(version: int) -> None:
        versions.append(version)
        at_version(version)

    pools._presence.on_version = heard
    await eventually(condition, what)
    pools._presence.on_version = at_version
    assert sum(version < versions[-1] for version in versions) <= 1, f"heartbeats told {versions}: {what}"
    assert 2 * presence._HEARTBEAT_SECONDS <= FOUND


async def found(pools: ValkeyPools, name: str) -> ValkeyEngine:
    """The pool, once this server has found it."""
    await follow(pools, lambda: name in pools.names(), f"{name} is found")
    return pools.get(name)


async def gone(pools: ValkeyPools, name: str) -> None:
    """Return once the pool is gone at this server."""
    await eventually(lambda: name not in pools.names(), f"{name} is gone", 30)


async def drain(pools: ValkeyPools, name: str, *, now: bool = False) -> bool:
    return await pools.delete(name, drain=True, now=now, origin=ADMIN)


# ------------------------------------------------------------------------------------------------ made and found


@on_loop
async def test_a_pool_made_on_one_server_is_served_by_another(place: Place) -> None:
    """It is found within two seconds, without anybody asking for it, and its keys are the same there."""
    async with two_servers(place.url) as (one, two):
        assert await one.put("openai", {"block_seconds": 20.0}, ADMIN)
        [key] = await one.get("openai").generate(1)
        lease = await (await found(two, "openai")).acquire("ann", 0)
        assert lease.key == key.key
        assert lease.release_in == pytest.approx(20, abs=15)
        assert two.get("openai").rules.block_seconds == 20
        await one.get("openai").unblock(lease.key, lease.lease)
        assert not await two.put("openai", {"block_seconds": 20.0}, ADMIN), "it is there already"
        assert one.names() == two.names() == ["default", "openai"]


@on_loop
async def test_whoever_asks_for_a_pool_that_was_just_made_need_not_wait_for_a_heartbeat(place: Place) -> None:
    """The first call is refused, and has this server look; with a stranger's random names, four times a second."""
    async with two_servers(place.url) as (one, two):
        two._presence.on_version = lambda version: None  # no heartbeat tells it
        await one.put("openai", {}, ADMIN)
        with pytest.raises(UnknownPool):
            two.get("openai")
        await eventually(lambda: "openai" in two.names(), "it has looked")
        time, read = asyncio.get_running_loop().time, two._registry.read
        reads: list[float] = []

        async def counted() -> Any:
            reads.append(time())
            return await read()

        two._registry.read = counted  # type: ignore[method-assign]
        began = time()
        while len(reads) < 3:
            with pytest.raises(UnknownPool):
                two.get("nonsense")
            await asyncio.sleep(0)
        assert reads[-1] - began >= 2 * 0.25


@on_loop
async def test_pools_are_there_after_all_servers_were_stopped(place: Place) -> None:
    """With their settings, their keys, their numbers, and the leases that are held."""
    async with pools_on(place.url, 2) as pools:
        await pools.put("a", {"rest_seconds": 1.5}, ADMIN)
        await pools.put("b", {"max_keys": 3}, ADMIN)
        await pools.get("b").generate(3)
        lease = await pools.get("b").acquire(None, 0)
    async with pools_on(place.url, 2) as pools:
        assert pools.names() == ["a", "b", "default"]
        assert pools.get("a").rules.rest_seconds == 1.5
        engine = pools.get("b")
        await become(engine, "its keys", total=3, blocked=1)
        with pytest.raises(PoolFull):
            await engine.generate(1)
        handle = engine.handles.read(lease.handle)
        assert handle is not None
        assert pools.default.handles.read(lease.handle) is None, "a handle holds in its pool only"
        assert pools.get("a").handles.read(lease.handle) is None
        assert (await engine.unblock(handle, None)).changed
        await eventually(lambda: pools.row("b").available == 3, "the row is up to date")
        assert pools.row("b").settings["max_keys"] == 3


@on_loop
async def test_there_are_no_more_pools_than_allowed_whichever_servers_make_them(place: Place) -> None:
    """Two servers make pools at the same time."""
    async with two_servers(place.url, max_pools=3) as (one, two):
        made = await asyncio.gather(
            *(pools.put(f"pool-{number}", {}, ADMIN) for number in range(4) for pools in (one, two)),
            return_exceptions=True,
        )
        assert sum(result is True for result in made) == 3
        assert any(isinstance(result, TooManyPools) for result in made)
        await eventually(lambda: one.names() == two.names(), "both have the same")
        assert len(one.names()) == 4


@on_loop
async def test_default_is_fixed_and_contradictions_are_refused(place: Place) -> None:
    """Nothing of that reaches Valkey."""
    async with pools_on(place.url, 1) as pools:
        with pytest.raises(PoolFixed):
            await pools.put("default", {"block_seconds": 5}, ADMIN)
        with pytest.raises(PoolFixed):
            await pools.change("default", {"block_seconds": 5}, ADMIN)
        with pytest.raises(PoolFixed):
            await drain(pools, "default")
        with pytest.raises(BadRequest):
            await pools.put("a", {"block_seconds": 5, "max_block_seconds": 4}, ADMIN)
        with pytest.raises(UnknownPool):
            await pools.change("a", {"block_seconds": 5}, ADMIN)
        assert place.valkey.ask("HGETALL", f"{{{place.pool}}}:pools") == []


# ------------------------------------------------------------------------------------------------------ settings


@on_loop
async def test_settings_changed_on_one_server_hold_on_all_within_two_seconds(place: Place) -> None:
    """For deadlines that are set from then on: a lease that is held goes on as it is."""
    async with two_servers(place.url) as (one, two):
        await one.put("a", {"block_seconds": 3000.0}, ADMIN)
        await one.get("a").generate(4)
        engine = await found(two, "a")
        held = await engine.acquire(None, 0)
        await one.change("a", {"block_seconds": 300.0, "rest_seconds": 900.0}, ADMIN)
        await follow(two, lambda: engine.rules.block_seconds == 300, "the other server knows")
        lease = await engine.acquire(None, 0)
        assert lease.release_in == pytest.approx(300, abs=30)
        ended = await engine.unblock(lease.key, lease.lease)
        assert ended.state is State.COOLING, "it rests"
        assert (await engine.get(held.id)).release_in == pytest.approx(3000, abs=60)
        await two.change("a", {"rest_seconds": 0.0}, ADMIN)
        assert two.row("a").settings["block_seconds"] == 300, "settings that aren't named stay"
        lease = await two.get("a").acquire(None, 0)
        assert (await one.get("a").unblock(lease.key, lease.lease)).state is State.AVAILABLE
        await one.put("a", {"error_threshold": 1, "cooldown_seconds": 500.0}, ADMIN)
        await follow(two, lambda: engine.rules.error_threshold == 1, "the other server knows")
        assert two.row("a").settings["block_seconds"] == 60, "put gives what isn't named its default"
        lease = await engine.acquire(None, 0)
        failed = await engine.unblock(lease.key, lease.lease, report=Report(Outcome.ERROR))
        assert failed.available_in == pytest.approx(500, abs=30)


@on_loop
async def test_changes_by_several_servers_at_once_are_all_kept(place: Place) -> None:
    """Each changes another setting of the same pool, and none is lost."""
    async with two_servers(place.url) as (one, two):
        await one.put("a", {}, ADMIN)
        await found(two, "a")
        changes: list[dict[str, Any]] = [
            {"max_keys": 7}, {"block_seconds": 5.0}, {"error_threshold": None}, {"rest_seconds": 2.0},
        ]  # fmt: skip
        await asyncio.gather(
            *((one, two)[number % 2].change("a", change, ADMIN) for number, change in enumerate(changes))
        )
        wanted = {key: value for change in changes for key, value in change.items()}
        for pools in (one, two):
            await follow(pools, partial(_has, pools, "a", wanted), "all are known")


# ---------------------------------------------------------------------------------------------------------- pace


@on_loop
async def test_a_pace_holds_on_all_servers_and_after_a_stop_of_all(place: Place) -> None:
    """That of a pool, and of `default`, which is no flag of theirs."""
    pace, own = Pace(2, 120.0), Pace(3, 1.5, 2)
    async with two_servers(place.url, max_pools=1) as (one, two):
        assert await one.put("default", {}, ADMIN) is False
        await one.change("default", {"pace": own}, ADMIN)
        assert await one.put("openai", {"pace": pace}, ADMIN), "default isn't counted"
        openai = await found(two, "openai")
        await follow(two, partial(_has, two, "default", {"pace": own}), "the other server knows")
        await one.get("openai").generate(1)
        lease = await openai.acquire(None, 0)
        answer = await openai.unblock(lease.id, lease.lease, uses=2)
        assert answer.state is State.COOLING
        assert answer.available_in == pytest.approx(120, abs=5)
        row = await one.get("openai").update(lease.id, KeyPatch(pace=own), ADMIN)
        assert row.pace == own
        with pytest.raises(PoolFixed):
            await two.put("default", {"pace": None, "max_keys": 5}, ADMIN)
    async with pools_on(place.url, 2) as pools:
        assert _has(pools, "default", {"pace": own})
        assert _has(pools, "openai", {"pace": pace})
        restored = await pools.get("openai").restore(1, ADMIN)
        assert (restored.state, restored.pace) == (State.COOLING, own), "what it was charged before counts"
        await pools.default.generate(2)
        leases = await pools.default.acquire_many(None, 2)
        await pools.default.unblock_many([Unblock(lease.id, lease.lease, None, 9) for lease in leases])
        await become(pools.default, "both cool", cooling=2, paced=2)
        assert await pools.put("default", {}, ADMIN) is False
        assert _has(pools, "default", {"pace": None})


@on_loop
async def test_a_key_is_ready_by_itself_when_it_has_budget(place: Place) -> None:
    """After an unblock and after a release; nobody calls meanwhile."""
    async with pools_on(place.url, 1, block_seconds=0.2, max_block_seconds=60.0) as pools:
        engine = pools.default
        await pools.change("default", {"pace": Pace(1, 0.4)}, ADMIN)
        await engine.generate(2)
        await engine.acquire(None, 0)
        lease = await engine.acquire(None, 0, block_seconds=60)
        await engine.unblock(lease.id, lease.lease)

        def ready() -> int:
            return sum(event.event is Change.READY for event in engine.recent(100))

        await eventually(lambda: ready() == 2, "both are ready")
        stats = await engine.stats()
        assert (stats.released, stats.unblocked, stats.paced, stats.available) == (1, 1, 2, 2)


@on_loop
async def test_no_window_has_more_acquires_than_the_pace_allows(place: Place) -> None:
    """Over random histories of two servers, as time is made to pass."""
    chance, pace = random.Random(7), Pace(3, 60.0, 2)
    async with two_servers(place.url) as servers:
        await servers[0].change("default", {"pace": pace}, ADMIN)
        [key] = await servers[0].default.generate(1)
        acquired: list[tuple[float, float]] = []  # the moments between which each was
        aged = 0.0
        for _ in range(120):
            engine = chance.choice(servers).default
            before = time.time() + aged
            step = chance.choice(["acquire", "acquire", "acquire", "restore", "pass", "pass"])
            if step == "acquire":
                with contextlib.suppress(NoKeyAvailable):
                    lease = await engine.acquire(None, 0)
                    acquired.append((before, time.time() + aged))
                    report = chance.choice([None, Report(Outcome.OK), Report(Outcome.RATE_LIMITED, 1)])
                    await engine.unblock(key.id, lease.lease, report=report, uses=chance.choice([1, 1, 2]))
            elif step == "restore":
                await engine.restore(key.id, ADMIN)
            else:
                seconds = chance.choice([1.0, 5.0, 19.0, 21.0])
                await engine.keepalive(key.id)
                age(place.valkey, place.pool, 2, seconds)
                aged += seconds
        most = pace.count + pace.burst - 1
        assert len(acquired) > 2 * most
        for (first, _), (_, last) in zip(acquired, acquired[most:], strict=False):
            assert last - first >= pace.seconds


def _has(pools: ValkeyPools, name: str, settings: dict[str, Any]) -> bool:
    return all(pools.row(name).settings[key] == value for key, value in settings.items())


@on_loop
async def test_a_full_pool_takes_more_when_max_keys_grows(place: Place) -> None:
    """On the other server, too, and it takes no more when it shrinks."""
    async with two_servers(place.url) as (one, two):
        await one.put("a", {"max_keys": 2}, ADMIN)
        await one.get("a").generate(2)
        engine = await found(two, "a")
        with pytest.raises(PoolFull):
            await engine.generate(1)
        await one.change("a", {"max_keys": 4}, ADMIN)
        await follow(two, lambda: engine.rules.max_keys == 4, "it is known")
        await engine.generate(2)
        await two.change("a", {"max_keys": 1}, ADMIN)
        with pytest.raises(PoolFull):
            await engine.generate(1)
        assert (await engine.stats()).total == 4


# ---------------------------------------------------------------------------------------------------- the end


@on_loop
async def test_an_empty_pool_is_deleted_at_once_and_one_with_keys_is_not(place: Place) -> None:
    """Also for the other server, which has the engine still: it makes no key there any more."""
    async with two_servers(place.url) as (one, two):
        await one.put("a", {}, ADMIN)
        engine = await found(two, "a")
        [key] = await engine.generate(1)
        with pytest.raises(PoolNotEmpty):
            await one.delete("a", drain=False, now=False, origin=ADMIN)
        assert (await engine.acquire(None, 0)).key == key.key, "nothing has changed"
        await engine.delete(key.key)
        assert await one.delete("a", drain=False, now=False, origin=ADMIN)
        with pytest.raises((PoolDraining, StorageUnavailable)):
            await engine.generate(1)
        await follow(two, lambda: "a" not in two.names(), "it is gone")
        with pytest.raises(UnknownPool):
            await one.delete("a", drain=False, now=False, origin=ADMIN)
        assert not place.valkey.ask("KEYS", f"{{{place.pool}/*")


@on_loop
async def test_waiters_of_all_servers_are_answered_when_a_pool_drains(place: Place) -> None:
    """Within two seconds; held keys go when their leases end, and the others at once."""
    async with two_servers(place.url) as (one, two):
        await one.put("a", {"block_seconds": 50.0}, ADMIN)
        mine = one.get("a")
        theirs = await found(two, "a")
        await mine.generate(300)
        held = await mine.acquire_many("ann", 300)
        waiting = [asyncio.ensure_future(engine.acquire(None, 30)) for engine in (mine, theirs)]
        await eventually(lambda: mine.oldest_wait() and theirs.oldest_wait(), "they wait")
        assert not await drain(one, "a")
        await follow(two, lambda: all(task.done() for task in waiting), "both are answered")
        for task in waiting:
            assert isinstance(task.exception(), PoolDraining)
        for engine in (mine, theirs):
            with pytest.raises(PoolDraining):
                await engine.generate(1)
            with pytest.raises(PoolDraining):
                await engine.acquire(None, 0)
        await eventually(lambda: two.row("a").draining, "the other server shows it")
        with pytest.raises(PoolDraining):
            await two.put("a", {}, ADMIN)
        assert (await theirs.get(held[0].id)).state is State.BLOCKED, "a lease goes on"
        await theirs.keepalive(held[0].key)
        assert not await drain(two, "a", now=True)
        await gone(one, "a")
        await gone(two, "a")
        await eventually(lambda: not place.valkey.ask("KEYS", f"{{{place.pool}/*"), "nothing is left of it")


@on_loop
async def test_a_drain_goes_on_after_the_servers_were_stopped(place: Place) -> None:
    """Until the last lease has ended; cooling and quarantined keys don't hold it up, and events say who did it."""
    async with pools_on(place.url, 1) as pools:
        kept = {"block_seconds": 600.0, "rest_seconds": 600.0, "keepalive_seconds": None}
        await pools.put("a", kept, ADMIN)
        engine = pools.get("a")
        await engine.generate(5)
        cooling, bad, held = await engine.acquire_many(None, 3)
        await engine.unblock(cooling.key, cooling.lease)
        await engine.unblock(bad.key, bad.lease, report=Report(Outcome.INVALID))
        await drain(pools, "a")
        await eventually(lambda: pools.row("a").total == 1, "only the held key is left")

        def deletions() -> list[Event]:
            return [event for event in engine.recent(100) if event.event is Change.DELETED]

        await eventually(lambda: len(deletions()) >= 4, "their events")
        deleted = deletions()
        assert len(deleted) == 4
        assert {(event.by, event.actor) for event in deleted} == {(By.OPERATOR, "ops")}
        assert held.id not in {event.id for event in deleted}
    async with pools_on(place.url, 1) as pools:
        assert pools.row("a").draining
        age(place.valkey, f"{place.pool}/1", 1, 601)
        await gone(pools, "a")


@on_loop
async def test_a_pool_that_is_made_again_meets_nothing_of_the_one_before(place: Place) -> None:
    """Neither keys nor handles, lease numbers or settings; also at a server that missed that it was gone."""
    async with two_servers(place.url) as (one, two):
        await one.put("a", {"block_seconds": 40.0}, ADMIN)
        [key] = await one.get("a").generate(1)
        old = await found(two, "a")
        lease = await old.acquire(None, 0)
        await drain(one, "a", now=True)
        await gone(one, "a")
        assert await one.put("a", {}, ADMIN), "the name is free"
        await follow(two, lambda: "a" in two.names() and two.get("a") is not old, "the new one is found")
        for pools in (one, two):
            engine = pools.get("a")
            assert engine.rules.block_seconds == 60
            assert (await engine.stats()).total == 0
            assert engine.handles.read(lease.handle) is None
            with pytest.raises(UnknownKey):
                await engine.get(key.key)
            with pytest.raises(NoKeyAvailable):
                await engine.acquire(None, 0)
        [new] = await two.get("a").generate(1)
        assert new.id == 1
        assert (await one.get("a").acquire(None, 0)).key == new.key


# -------------------------------------------------------------------------------------------------- what fails


@pytest.fixture
def own() -> Iterator[Valkey]:
    """A Valkey that the test may break."""
    with Valkey() as valkey:
        yield valkey


@on_loop
async def test_a_pool_whose_partition_was_lost_leaves_the_others_served(own: Valkey) -> None:
    """Somebody deletes one pool's Valkey keys: its calls are refused, and nobody else's."""
    async with pools_on(own.url, 1) as pools:
        for name in ("a", "b"):
            await pools.put(name, {}, ADMIN)
            await pools.get(name).generate(1)
        for name in own.ask("KEYS", "{keypool/1:*"):
            own.ask("DEL", name.decode())
        with pytest.raises(StorageUnavailable, match="emptied"):
            await pools.get("a").acquire(None, 0)
        await pools.get("b").acquire(None, 0)
        assert await pools.default.generate(1)
        pools.default.ready()


@on_loop
async def test_no_pool_is_made_while_valkey_does_not_answer(own: Valkey) -> None:
    """The call is refused; afterwards the pools are served as before, and it succeeds."""
    async with pools_on(own.url, 2) as pools:
        await pools.put("a", {}, ADMIN)
        with own.paused(), pytest.raises(StorageUnavailable):
            await pools.put("b", {}, ADMIN)

        async def made() -> bool:
            await pools.put("c", {}, ADMIN)
            return "c" in pools.names()

        await eventually(made, "it is made")
        await eventually(lambda: pools.get("a").generate(1), "a key is made")


# ------------------------------------------------------------------------------------------------------ cluster


@on_loop
async def test_pools_spread_over_a_cluster() -> None:
    """Each is one partition on one node, and all nodes have some; a batch of one pool is one script."""
    url = new_pool(shared_cluster())
    async with two_servers(url) as (one, two):
        names = [f"p{number}" for number in range(12)]
        await asyncio.gather(*(one.put(name, {}, ADMIN) for name in names))
        nodes = {one.get(name)._client.node_of(0) for name in names}
        assert len(nodes) == 3
        for name in names:
            await one.get(name).generate(2)
            engine = await found(two, name)
            leases = await engine.acquire_many(None, 5)
            assert len(leases) == 2
            assert await drain(two, name) is False
        for name in names:
            with pytest.raises((PoolDraining, UnknownPool)):
                await one.get(name).generate(1)
            await drain(one, name, now=True)
        for pools in (one, two):
            for name in names:
                await gone(pools, name)


# ----------------------------------------------------------------------------------------------------- many pools


def _measured(poll: Callable[..., Any], time: Callable[[], float], gaps: list[float]) -> Callable[..., Any]:
    """The same, which notes the seconds between two calls."""
    last = -math.inf

    def measured(*arguments: Any) -> Any:
        nonlocal last
        gaps.append(time() - last)
        last = time()
        return poll(*arguments)

    return measured


@on_loop
async def test_a_hundred_idle_pools_share_pipelines_and_are_polled_rarely(place: Place) -> None:
    """A hundred quiet pools cost a server no more than 60 polls a second."""
    async with pools_on(place.url, 1) as pools:
        await asyncio.gather(*(pools.put(f"p{number}", {}, ADMIN) for number in range(100)))
        engines = [pools.get(name) for name in pools.names() if name != "default"]
        await eventually(lambda: all(engine._poller.polls >= 2 for engine in engines), "all are quiet")
        # 60 a second of 100: none is polled again before 100/60 s have passed.
        time = asyncio.get_running_loop().time
        gaps: list[float] = []
        for engine in engines:
            engine._poller.poll = _measured(engine._poller.poll, time, gaps)  # type: ignore[method-assign]
        await asyncio.sleep(2)
        assert all(gap >= 100 / 60 for gap in gaps), gaps
        assert len(pools._nodes._links) == 1, "one connection for all"


# ------------------------------------------------------------------------------------------------- the charts


@on_loop
async def test_one_of_the_servers_keeps_the_charts(place: Place) -> None:
    """Once a minute; at its stop each does. They are for a day, which is as far back as they go."""
    async with two_servers(place.url) as (one, two):
        assert await one.kept_charts() == {}
        await one.keep_charts({"default": b"of the first", "openai": b"other"})
        await two.keep_charts({"default": b"of the second"})
        assert await two.kept_charts() == {"default": b"of the first"}
        await two.keep_charts({"default": b"at the stop"}, last=True)
        assert await one.kept_charts() == {"default": b"at the stop"}
        assert 86_000 < place.valkey.ask("TTL", f"{{{place.pool}}}:charts") <= 86_400
        assert 40 < place.valkey.ask("TTL", f"{{{place.pool}}}:charts_turn") <= 50


@on_loop
async def test_charts_without_valkey_are_an_outage(place: Place) -> None:
    """As for any call: the dashboard goes on without."""
    async with pools_on(place.url) as pools:
        place.valkey.ask("LPUSH", f"{{{place.pool}}}:charts", "of another type")
        with pytest.raises(StorageUnavailable):
            await pools.kept_charts()


def test_the_charts_of_a_server_over_valkey_go_on_after_a_restart(place: Place, tmp_path: Path) -> None:
    """Those of `default`."""
    for _ in range(2):
        with ServerProcess([f"--engine={place.url}", "--port=0"], cwd=tmp_path) as server:
            if not server.client().stats()["generated"]:
                server.client().make_many(7)
            come_true(lambda: sum(charts_shown(server)["generated"]) == 7, "a sample with all keys")
