"""The history of keys over Valkey: the same records as in memory, in every partition, trimmed and deleted.

What is recorded is tested in test_key_history.py; here the same calls are made over partitions, and what Valkey holds
is looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest
from durable_support import opened_pools
from valkey_support import Place, age, engine_on, eventually, new_place, on_loop, pools_on, with_constants

from keypool.core.answers import HistoryRow
from keypool.core.cursor import HistoryQuery
from keypool.core.errors import PoolFixed, StaleLease, UnknownKey
from keypool.core.events import By, Origin
from keypool.core.history import How
from keypool.core.outcomes import Outcome, Report
from keypool.engine import Client, Engine
from keypool.engine.migrate.moving import FileSource, FileTarget, Source, Target, move
from keypool.engine.migrate.moving_valkey import ValkeyPlace
from keypool.engine.pools import EmbeddedPools
from keypool.engine.valkey import link as valkey_link
from keypool.engine.valkey.pools import ValkeyPools
from keypool.engine.valkey.scripts import keys_of

ADMIN = Origin(By.OPERATOR, "ops")
FULL_HISTORY = {"history_leases": 1000}
LIMITED = Report(Outcome.RATE_LIMITED, 0.0, "429 from the service")


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Place:
    """See Place."""
    monkeypatch.setattr(valkey_link, "SILENCE", 30.0)
    return new_place()


async def history(engine: Engine, id: int) -> list[HistoryRow]:
    """The first page of a key's history."""
    return (await engine.history(id, HistoryQuery())).history


def kept(place: Place, partitions: int = 1, pool: str = "") -> tuple[int, int]:
    """How many leases stand in the orders of their ends, and with their keys."""
    ends = leases = 0
    with place.valkey.commands() as commands:
        for partition in range(partitions):
            tag = keys_of(place.pool + pool, partition, partitions)[0].removesuffix("meta")
            ends += commands.ask("LLEN", f"{tag}ended")
            pattern = tag.replace("[", "\\[") + "past:*"
            leases += sum(commands.ask("ZCARD", key.decode()) for key in commands.ask("KEYS", pattern))
    return ends, leases


@on_loop
@pytest.mark.parametrize("partitions", [1, 4])
async def test_every_end_of_a_lease_is_recorded_as_in_memory(place: Place, partitions: int) -> None:
    """By its holder, by an operator, with a quarantine, with its key; and a purged key has a history by its id."""
    async with pools_on(place.url, partitions, max_block_seconds=600.0) as pools:
        await pools.change("default", FULL_HISTORY, ADMIN)
        engine = pools.default
        await engine.generate(4)
        leases = [await engine.acquire("worker-7", 0, client=Client("crawler")) for _ in range(4)]
        assert await history(engine, leases[0].id) == []
        await engine.extend(leases[0].id, leases[0].lease, 300)
        await engine.extend(leases[0].id, leases[0].lease, 400)
        await engine.unblock(leases[0].key, leases[0].lease, None, LIMITED)
        await engine.unblock(leases[1].id, None, None, None, ADMIN)
        await engine.quarantine(leases[2].id, "banned", True, ADMIN)
        await engine.delete(leases[3].id, ADMIN)
        rows = [row for lease in leases for row in await history(engine, lease.id)]
        assert [(row.lease, row.how) for row in rows] == [
            (lease.lease, how)
            for lease, how in zip(leases, (How.UNBLOCKED, How.REVOKED, How.REVOKED, How.DELETED), strict=True)
        ]
        assert (rows[0].outcome, rows[0].reason, rows[0].extended) == (LIMITED.outcome, LIMITED.reason, 2)
        assert {(row.owner, row.client) for row in rows} == {("worker-7", "crawler")}
        assert [row.outcome for row in rows[1:]] == [None] * 3
        assert all(row.acquired_at <= row.ended_at and row.held >= 0 for row in rows)
        assert kept(place, partitions) == (4, 4)
        with pytest.raises(UnknownKey):
            await engine.history(leases[3].key, HistoryQuery())
        for unknown in (10**9, 10**17):
            with pytest.raises(UnknownKey):
                await history(engine, unknown)
        await eventually(lambda: engine.history_kept == 4, "it is counted")


@on_loop
async def test_deadlines_end_leases_at_their_moments_however_late_they_are_noticed(place: Place) -> None:
    """Released, or expired with the key; a lease that was over before its key expired was released. A late report that
    counts is added.
    """
    async with pools_on(place.url, 1, keepalive_seconds=50.0) as pools:
        await pools.change("default", FULL_HISTORY, ADMIN)
        engine = pools.default
        await engine.generate(3)
        short = await engine.acquire("ann", 0, block_seconds=10.0)
        await engine.acquire("bob", 0, block_seconds=60.0)
        last = await engine.acquire("carol", 0, block_seconds=20.0)
        for _ in range(2):
            age(place.valkey, place.pool, 1, 22)
            await engine.keepalive(last.id)
        assert (await engine.unblock(last.id, last.lease, None, LIMITED)).changed
        age(place.valkey, place.pool, 1, 20)
        found = {row.owner: row for id in (1, 2, 3) for row in await history(engine, id)}
        assert {owner: row.how for owner, row in found.items()} == {
            "ann": How.RELEASED, "bob": How.EXPIRED, "carol": How.RELEASED,
        }  # fmt: skip
        assert found["carol"].held == 20.0
        assert (found["carol"].outcome, found["carol"].reason) == (LIMITED.outcome, LIMITED.reason)
        assert found["ann"].lease == short.lease
        assert found["ann"].held == 10.0


@on_loop
async def test_the_oldest_lease_goes_for_each_new_one(place: Place) -> None:
    """Each partition keeps its share. Pages go back in time."""
    async with pools_on(place.url, 1) as pools:
        await pools.change("default", {"history_leases": 5}, ADMIN)
        engine = pools.default
        await engine.generate(1)
        leases = []
        for _ in range(8):
            leases.append((await engine.acquire(None, 0)).lease)
            await engine.unblock(1, leases[-1])
        assert [row.lease for row in await history(engine, 1)] == leases[:2:-1]
        assert kept(place) == (5, 5)
        page = await engine.history(1, HistoryQuery(limit=3))
        rest = await engine.history(1, HistoryQuery(limit=3, after=page.next))
        assert [row.lease for row in page.history + rest.history] == leases[:2:-1]
        assert rest.next is None
        lease = await engine.acquire(None, 0)
        with pytest.raises(StaleLease):
            await engine.history(engine.handles.read(lease.handle)._replace(lease=1), HistoryQuery())  # type: ignore[union-attr]


@on_loop
async def test_a_pool_without_a_history_writes_nothing(place: Place) -> None:
    """`default`, unless it was given one; another of its settings is a flag."""
    async with pools_on(place.url, 1) as pools:
        engine = pools.default
        await engine.generate(1)
        await engine.acquire(None, 0)
        await engine.unblock(1, None)
        assert (await history(engine, 1), kept(place)) == ([], (0, 0))
        with pytest.raises(PoolFixed, match="rest_seconds"):
            await pools.change("default", {"rest_seconds": 1}, ADMIN)


@on_loop
async def test_the_setting_of_default_reaches_all_servers_and_those_that_start_later(place: Place) -> None:
    """And other pools may be made beside it up to the limit."""
    async with pools_on(place.url, 2, max_pools=1) as one, pools_on(place.url, 2, max_pools=1) as two:
        assert await one.put("default", {"history_leases": 7}, ADMIN) is False
        assert await one.put("openai", {}, ADMIN) is True
        assert one.row("openai").settings["history_leases"] == 100_000
        await eventually(lambda: two.row("default").settings["history_leases"] == 7, "the other server knows")
        async with pools_on(place.url, 2) as three:
            assert three.row("default").settings["history_leases"] == 7
            assert three.names() == ["default", "openai"]
        await two.put("default", {}, ADMIN)
        await eventually(lambda: one.row("default").settings["history_leases"] == 0, "it is taken back")


@on_loop
async def test_a_shorter_history_goes_in_slices(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """With each poll some."""
    with_constants(monkeypatch, MAX_FORGOTTEN=20)
    async with pools_on(place.url, 1) as pools:
        await pools.change("default", FULL_HISTORY, ADMIN)
        engine = pools.default
        await engine.generate(50)
        for _ in range(2):
            for lease in await engine.acquire_many("ann", 50):
                await engine.unblock(lease.key, lease.lease)
        assert kept(place) == (100, 100)
        await pools.change("default", {"history_leases": 0}, ADMIN)
        seen = [100]
        for _ in range(10):
            await engine.stats()
            seen.append(kept(place)[1])
        assert seen[-1] == 0
        assert len(set(seen)) >= 4, "it went in one go"
        await eventually(lambda: engine.history_kept == 0, "none is counted")


@on_loop
async def test_a_deleted_pool_takes_its_history_with_it(place: Place) -> None:
    """Whichever server deletes it; a server that starts goes on with what another one has left."""
    async with pools_on(place.url, 1) as pools:
        await pools.put("openai", {}, ADMIN)
        engine = pools.get("openai")
        await engine.generate(20)
        for lease in await engine.acquire_many("ann", 20):
            await engine.delete(lease.id, ADMIN)
        assert kept(place, pool="/1") == (20, 20)
        assert await pools.delete("openai", drain=False, now=False, origin=ADMIN)
        await eventually(lambda: kept(place, pool="/1") == (0, 0), "its history is gone")
        facts = f"{{{place.pool}}}:pool"
        await eventually(lambda: not place.valkey.ask("HEXISTS", facts, "gone.1"), "nothing is left to do")
        tag = keys_of(place.pool + "/9", 0, 1)[0].removesuffix("meta")
        place.valkey.ask("RPUSH", f"{tag}ended", "7 17")
        place.valkey.ask("ZADD", f"{tag}past:7", 17, "a lease")
        place.valkey.ask("HSET", facts, "gone.9", 1)
    async with engine_on(place.url, 1):
        await eventually(lambda: not place.valkey.ask("HEXISTS", facts, "gone.9"), "the rest is gone")
        assert kept(place, pool="/9") == (0, 0)


@on_loop
async def test_a_purged_key_that_was_moved_in_is_looked_for_everywhere(place: Place) -> None:
    """Its partition follows from its text, which nobody knows any more."""
    async with engine_on(place.url, 4) as engine:
        await engine.generate(1)
    place.valkey.ask("HSET", f"{{{place.pool}}}:pool", "base_id", 100)
    async with pools_on(place.url, 4) as pools:
        await pools.change("default", FULL_HISTORY, ADMIN)
        engine = pools.default
        [lease] = await asyncio.gather(engine.acquire("ann", 0))
        await engine.delete(lease.id, ADMIN)
        assert [row.how for row in await history(engine, lease.id)] == [How.DELETED]


# ------------------------------------------------------------------------------------------------------- moves


async def everything(pools: EmbeddedPools | ValkeyPools) -> dict[tuple[str, int], list[HistoryRow]]:
    """The history of each key that ever was."""
    found = {}
    for name in pools.names():
        for id in range(1, 6):
            with contextlib.suppress(UnknownKey):
                found[name, id] = await history(pools.get(name), id)
    return found


async def moved(source: Source, target: Target) -> None:
    """Move all there is."""
    try:
        await move(source, target, lambda keys: None)
    finally:
        await source.close()
        await target.close()


@on_loop
@pytest.mark.parametrize("partitions", [1, 4])
async def test_a_history_moves_there_and_back(place: Place, tmp_path: Path, partitions: int) -> None:
    """Of all pools, also of purged keys, with the setting of `default`, and how often a running lease was extended."""
    rules: dict[str, Any] = {"max_block_seconds": 600.0}
    one, other = tmp_path / "one.db", tmp_path / "other.db"
    async with opened_pools(one, **rules) as pools:
        await pools.change("default", {"history_leases": 9}, ADMIN)
        await pools.put("openai", {"keepalive_seconds": None}, ADMIN)
        for engine in (pools.default, pools.get("openai")):
            await engine.generate(3)
            for _ in range(3):
                for lease in await engine.acquire_many("worker-7", 3, client=Client("crawler")):
                    await engine.unblock(lease.id, lease.lease, None, LIMITED)
            await engine.delete(2, ADMIN)
        for lease in await pools.default.acquire_many("worker-8", 2):
            await pools.default.extend(lease.id, lease.lease, 300)
            await pools.default.extend(lease.id, lease.lease, 400)
        wanted = await everything(pools)
        assert sum(map(len, wanted.values())) == 18
        numbers = pools.default.numbers()
    await moved(FileSource(one), await ValkeyPlace.target(place.url, partitions, clear=False))
    async with pools_on(place.url, partitions, **rules) as there:
        assert there.names() == ["default", "openai"]
        assert there.row("default").settings["history_leases"] == 9
        await there.default.stats()
        assert await everything(there) == wanted
    await moved(await ValkeyPlace.source(place.url), FileTarget(other))
    async with opened_pools(other, **rules) as pools:
        assert await everything(pools) == wanted
        assert [pools.get(name).history_kept for name in pools.names()] == [9, 9]
        assert pools.default.numbers()["last_lease"] == numbers["last_lease"]
        await pools.default.unblock(1, None)
        assert (await history(pools.default, 1))[0].extended == 2
        assert pools.default.history_kept == 9
    assert pools.names() == ["default", "openai"]
