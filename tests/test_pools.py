"""Many pools in one server, on the embedded engine: made, changed, emptied and gone.

The rules here are those of contract 5. What a restart does to them is told in test_durable_pools.py, what HTTP makes of
them in test_api_pools.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest
from engine_support import Call, HeldTimers, Moment, make_engine, now, on_loop, turns, turns_until

from keypool.core.answers import Lease, NewKey
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
from keypool.core.events import By, Change, Origin
from keypool.core.keys import Key
from keypool.core.outcomes import Outcome, Report
from keypool.engine.embedded import EmbeddedEngine
from keypool.engine.journal import Commit, NullJournal
from keypool.engine.pools import Definition, EmbeddedPools

ADMIN = Origin(By.OPERATOR, "ops")


class Server:
    """Pools whose clock and timers the test controls."""

    def __init__(self, **rules: Any) -> None:
        self.clock = Moment()
        self.timers = HeldTimers()
        self.pools = EmbeddedPools(make_engine(self.clock, self.timers, **rules), max_pools=3)

    def __getitem__(self, name: str) -> EmbeddedEngine:
        return self.pools.get(name)

    async def put(self, name: str, keys: int = 0, **settings: Any) -> EmbeddedEngine:
        """A new pool with so many keys."""
        assert await now(self.pools.put(name, settings, ADMIN))
        engine = self.pools.get(name)
        if keys:
            await engine.generate(keys)
        return engine

    def delete(self, name: str, *, drain: bool = False, now: bool = False) -> Awaitable[bool]:
        return self.pools.delete(name, drain=drain, now=now, origin=ADMIN)

    async def gone(self, name: str) -> None:
        """Wait until the pool is gone."""
        await turns_until(lambda: name not in self.pools.names(), f"{name} is gone")


# -------------------------------------------------------------------------------------------------- making one


@on_loop
async def test_a_pool_is_made_with_the_defaults_of_the_table_whatever_the_flags_say() -> None:
    """Times of `default` are flags; a new pool has the table's, but the server's `max_keys` and `key_length`."""
    server = Server(block_seconds=7, keepalive_seconds=11, max_keys=50, key_length=30, max_block_seconds=9)
    assert await now(server.pools.put("openai", {}, ADMIN)) is True
    settings = server.pools.row("openai").settings
    assert settings["block_seconds"] == settings["max_block_seconds"] == 60
    assert settings["keepalive_seconds"] == 300
    assert settings["max_keys"] == 50
    assert settings["key_length"] == 30
    assert server.pools.row("default").settings["max_block_seconds"] == 9


@on_loop
async def test_put_again_replaces_all_settings_and_patch_only_some() -> None:
    """PUT gives the settings that it leaves out their defaults; PATCH leaves them as they are."""
    server = Server()
    await server.put("openai", block_seconds=5, rest_seconds=2)
    await server.pools.change("openai", {"block_seconds": 6}, ADMIN)
    settings = server.pools.row("openai").settings
    assert (settings["block_seconds"], settings["rest_seconds"]) == (6, 2)
    assert await now(server.pools.put("openai", {"rest_seconds": 3}, ADMIN)) is False
    settings = server.pools.row("openai").settings
    assert (settings["block_seconds"], settings["rest_seconds"]) == (60, 3)


@on_loop
async def test_pools_are_apart() -> None:
    """Ids, leases, waiters, counts and handles belong to one pool."""
    server = Server()
    openai = await server.put("openai", keys=2)
    await server["default"].generate(1)
    lease = await now(openai.acquire("a", 0))
    assert (lease.id, lease.lease) in {(1, 1), (2, 1)}
    other = await now(server["default"].acquire("a", 0))
    assert (other.id, other.lease) == (1, 1)
    assert openai.handles.read(lease.handle) == (lease.id, 1)
    assert server["default"].handles.read(lease.handle) is None
    assert openai.handles.read(other.handle) is None
    with pytest.raises(NoKeyAvailable):
        await server["default"].acquire("a", 0)
    assert (await openai.stats()).refused == 0
    row = server.pools.row("openai")
    assert (row.total, row.available, row.blocked, row.waiting, row.draining) == (2, 1, 1, 0, False)


@on_loop
async def test_names_are_in_order_and_default_does_not_count() -> None:
    """`--max-pools` is of the others."""
    server = Server()
    for name in ("b", "z", "a"):
        await server.put(name)
    assert server.pools.names() == ["a", "b", "default", "z"]
    with pytest.raises(TooManyPools):
        await server.pools.put("c", {}, ADMIN)
    assert await now(server.pools.put("a", {"rest_seconds": 1}, ADMIN)) is False
    with pytest.raises(UnknownPool):
        server.pools.get("c")


@on_loop
async def test_settings_that_contradict_each_other_change_nothing() -> None:
    """`max_block_seconds` is never less than `block_seconds`, however the two come together."""
    server = Server()
    await server.put("openai", block_seconds=30, max_block_seconds=40)
    for wrong in ({"block_seconds": 41}, {"max_block_seconds": 29}):
        with pytest.raises(BadRequest, match="max_block_seconds takes no less than block_seconds"):
            await server.pools.change("openai", wrong, ADMIN)
    with pytest.raises(BadRequest):
        await server.pools.put("new", {"max_block_seconds": 29}, ADMIN)
    assert server.pools.names() == ["default", "openai"]
    assert server.pools.row("openai").settings["block_seconds"] == 30


@on_loop
async def test_default_is_fixed() -> None:
    """Its settings are flags, and it is always there."""
    server = Server()
    with pytest.raises(PoolFixed, match="rest_seconds"):
        await server.pools.change("default", {"rest_seconds": 1}, ADMIN)
    with pytest.raises(PoolFixed, match="rest_seconds"):
        await server.pools.put("default", {"rest_seconds": 1}, ADMIN)
    with pytest.raises(PoolFixed, match="always there"):
        await server.delete("default", drain=True, now=True)
    assert await now(server.pools.put("default", {}, ADMIN)) is False


@on_loop
async def test_a_change_of_a_time_holds_for_deadlines_that_are_set_from_then_on() -> None:
    """A change walks no key: what is held ends when it would have ended."""
    server = Server()
    openai = await server.put("openai", keys=3, block_seconds=10, key_length=16)
    before = await now(openai.acquire("a", 0))
    await server.pools.change(
        "openai", {"block_seconds": 20, "keepalive_seconds": 1000, "max_keys": 4, "key_length": 40}, ADMIN
    )
    after = await now(openai.acquire("a", 0))
    assert (before.release_in, after.release_in) == (10, 20)
    assert (await now(openai.keepalive(after.id))).expires_in == 1000
    (made,) = await openai.generate(1)
    assert len(made.key) == 40
    with pytest.raises(PoolFull):
        await openai.generate(1)
    server.clock.on(11)
    assert (await now(openai.get(before.id))).state == "available"
    assert (await now(openai.get(after.id))).state == "blocked"


@on_loop
async def test_whoever_watches_the_pools_is_called_at_each_change() -> None:
    """When a pool comes, changes, drains and goes."""
    server = Server()
    seen: list[list[str]] = []
    server.pools.on_change(lambda: seen.append(server.pools.names()))
    await server.put("a", keys=1)
    await server.pools.change("a", {"rest_seconds": 1}, ADMIN)
    assert await server.delete("a", drain=True) is False
    await server.gone("a")
    assert seen == [["a", "default"]] * 3 + [["default"]]


# ------------------------------------------------------------------------------------------------ deleting one


@on_loop
async def test_an_empty_pool_goes_at_once_and_its_name_is_free() -> None:
    """A pool of the same name is another one, with another number: handles of the old one aren't its."""
    server = Server()
    first = await server.put("openai")
    assert await now(server.delete("openai")) is True
    with pytest.raises(UnknownPool):
        server.pools.get("openai")
    second = await server.put("openai")
    assert second is not first
    assert second.handles.read(first.handles.make(1, 1)) is None
    with pytest.raises(UnknownPool):
        await server.delete("other")


@on_loop
async def test_a_pool_with_keys_is_not_deleted_by_accident() -> None:
    """Without drain it is refused; keys that have expired are no keys."""
    server = Server()
    openai = await server.put("openai", keys=300, keepalive_seconds=10)
    with pytest.raises(PoolNotEmpty, match=r"keys \(300\)"):
        await server.delete("openai")
    await now(openai.acquire("a", 0))
    server.clock.on(11)
    assert await server.delete("openai") is True


@on_loop
async def test_a_waiter_of_an_empty_pool_is_answered_when_it_is_deleted() -> None:
    """It would wait for nothing."""
    server = Server()
    openai = await server.put("openai")
    waiter = Call(openai.acquire("a", 30))
    assert await now(server.delete("openai")) is True
    await turns()
    with pytest.raises(PoolDraining):
        _ = waiter.answer


@on_loop
async def test_a_drained_pool_serves_no_more_and_goes_when_its_last_lease_has_ended() -> None:
    """Free, cooling and quarantined keys go at once, held ones when they are given back."""
    server = Server()
    openai = await server.put("openai", keys=6)
    held = [await now(openai.acquire("a", 0)) for _ in range(4)]
    await now(openai.unblock(held[2].id, held[2].lease, report=Report(Outcome.RATE_LIMITED)))
    await now(openai.quarantine(held[3].id, None, now=True, origin=ADMIN))
    assert await server.delete("openai", drain=True) is False
    await turns()
    row = server.pools.row("openai")
    assert (row.total, row.blocked, row.draining) == (2, 2, True)
    assert [event.actor for event in openai.recent(20) if event.event is Change.DELETED] == ["ops"] * 4
    for refused in (
        openai.generate(1),
        openai.acquire("b", 0),
        openai.acquire("b", 5),
        openai.acquire_many("b", 2),
    ):
        with pytest.raises(PoolDraining):
            await refused
    with pytest.raises(PoolDraining):
        await server.pools.put("openai", {}, ADMIN)
    assert (await now(openai.keepalive(held[0].key))).id == held[0].id
    assert (await now(openai.unblock(held[0].id, held[0].lease))).changed is True
    await turns()
    with pytest.raises(UnknownKey):
        await openai.get(held[0].id)
    server.clock.on(61)
    server.timers.fire()
    await server.gone("openai")
    assert not openai.recent(20)
    counters = openai.pool.counters
    assert (counters.deleted, counters.expired, counters.released) == (6, 0, 1)
    await server.put("openai")


@on_loop
async def test_now_ends_leases_too_also_after_a_patient_drain() -> None:
    """The holder's calls find no key any more."""
    server = Server()
    openai = await server.put("openai", keys=3)
    lease = await now(openai.acquire("a", 0))
    assert await server.delete("openai", drain=True) is False
    await turns()
    assert server.pools.row("openai").total == 1
    assert await server.delete("openai", drain=True, now=True) is False
    await server.gone("openai")
    with pytest.raises(UnknownKey):
        await openai.unblock(lease.key, lease.lease)


@on_loop
async def test_a_lease_that_goes_on_to_quarantine_or_rest_is_purged_all_the_same() -> None:
    """Whatever state a lease would end in, the key is held by nobody then."""
    server = Server()
    openai = await server.put("openai", keys=2, rest_seconds=100)
    first, second = [await now(openai.acquire("a", 0)) for _ in range(2)]
    await server.delete("openai", drain=True)
    await turns()
    await now(openai.quarantine(second.id, "bad", now=False, origin=ADMIN))
    await now(openai.unblock(first.id, first.lease))
    await turns()
    assert server.pools.row("openai").total == 1
    await now(openai.unblock(second.id, second.lease))
    await server.gone("openai")


@on_loop
async def test_a_held_key_that_expires_takes_the_drained_pool_with_it() -> None:
    """`expires` is above all, here too."""
    server = Server()
    openai = await server.put("openai", keys=1, keepalive_seconds=20)
    await now(openai.acquire("a", 0))
    await server.delete("openai", drain=True)
    await turns()
    server.clock.on(21)
    server.timers.fire()
    await server.gone("openai")
    assert openai.pool.counters.expired == 1


@on_loop
async def test_waiters_of_a_drained_pool_are_answered_at_once() -> None:
    """Those of other pools wait on."""
    server = Server()
    openai = await server.put("openai", keys=1)
    await now(openai.acquire("a", 0))
    waiters = [Call(openai.acquire("b", 30)) for _ in range(3)]
    elsewhere: Call[Lease] = Call(server["default"].acquire("b", 30))
    await server.delete("openai", drain=True)
    await turns()
    for waiter in waiters:
        with pytest.raises(PoolDraining):
            _ = waiter.answer
    await server["default"].generate(1)
    await turns()
    assert elsewhere.answer.id == 1


@on_loop
async def test_a_batch_that_generates_in_slices_stops_when_its_pool_is_drained() -> None:
    """It answers pool-draining, and what it had made is purged with the rest."""
    server = Server()
    openai = await server.put("openai")
    ticking = iter(range(1, 100_000))
    openai.now = lambda: server.clock() + next(ticking) * 1e-5  # so that a slice has eight keys
    batch = asyncio.ensure_future(openai.generate(1000))
    await turns(3)
    assert 0 < openai.pool.total < 1000
    await server.delete("openai", drain=True)
    with pytest.raises(PoolDraining):
        await batch
    await server.gone("openai")
    assert openai.pool.counters.generated == openai.pool.counters.deleted < 1000


@on_loop
async def test_a_batch_that_imports_in_slices_stops_when_its_pool_is_drained() -> None:
    """All or none: it answers pool-draining, and what it had added is purged."""
    server = Server()
    openai = await server.put("openai", keepalive_seconds=None)
    ticking = iter(range(1, 100_000))
    openai.now = lambda: server.clock() + next(ticking) * 1e-5
    items = [NewKey(f"sk-live-{number}") for number in range(500)]
    batch = asyncio.ensure_future(openai.import_many(items, update=False, expire=False, origin=ADMIN))
    await turns_until(lambda: openai.pool.total, "some are imported")
    await server.delete("openai", drain=True)
    with pytest.raises(PoolDraining):
        await batch
    await server.gone("openai")
    assert openai._reserved == 0
    with pytest.raises(PoolDraining):
        await openai.import_key(NewKey("sk-live-1"), False, ADMIN)


@on_loop
async def test_a_large_pool_is_emptied_in_slices_while_others_are_served() -> None:
    """A slice is a millisecond: the loop turns often between the first key and the last."""
    server = Server()
    await server["default"].generate(1)
    openai = await server.put("openai", keys=20_000)
    openai.now = asyncio.get_running_loop().time  # slices end by a clock that runs
    await server.delete("openai", drain=True)
    turned = await turns_until(lambda: openai.pool.total == 0, "the pool is empty")
    assert turned > 10
    await server.gone("openai")


class SlowJournal(NullJournal):
    """Keeps a change when the test says so, or fails."""

    def __init__(self) -> None:
        super().__init__()
        self.commit: Commit | None = None
        self.touched = 0

    def touch(self, key: Key) -> None:
        self.touched += 1

    def commit_of_all(self) -> Commit | None:  # type: ignore[override]
        self.commit = self.commit or Commit(asyncio.get_running_loop())
        return self.commit

    def finish(self, error: StorageUnavailable | None = None) -> None:
        commit, self.commit = self.commit, None
        assert commit is not None
        commit.finish(error)


@on_loop
async def test_a_slice_waits_for_the_commit_of_the_one_before() -> None:
    """Otherwise one commit, for which the calls of all pools wait, would contain the purges of thousands of keys."""
    server = Server()
    openai = await server.put("openai", keys=3000)
    openai.journal = journal = SlowJournal()
    ticking = iter(range(1, 1_000_000))
    openai.now = lambda: server.clock() + next(ticking) * 1e-3  # so that each slice is one look at the clock
    deleting = asyncio.ensure_future(server.delete("openai", drain=True))
    await turns(50)
    first = journal.touched
    assert 0 < first < 300
    journal.finish()
    await turns(50)
    assert first < journal.touched < 600
    while "openai" in server.pools.names():
        if journal.commit is not None:
            journal.finish()
        await turns(3)
    assert await deleting is False
    assert openai.pool.counters.deleted == 3000


@on_loop
async def test_nothing_is_purged_while_storage_fails() -> None:
    """The rest is purged when changes can be kept again."""
    server = Server()
    openai = await server.put("openai", keys=3000)
    openai.journal = journal = SlowJournal()
    ticking = iter(range(1, 1_000_000))
    openai.now = lambda: server.clock() + next(ticking) * 1e-3
    await server.delete("openai", drain=True)
    await turns(50)
    journal.failing = "the disk is full"
    purged = journal.touched
    journal.finish(StorageUnavailable("the disk is full"))
    await turns(50)
    assert journal.touched == purged
    journal.failing = None
    while "openai" in server.pools.names():
        if journal.commit is not None:
            journal.finish()
        await asyncio.sleep(0.001)


@on_loop
async def test_a_pool_of_held_keys_only_costs_one_walk() -> None:
    """Each lease that ends takes its own key along, whatever the number of the others."""
    server = Server()
    openai = await server.put("openai", keys=3000)
    leases = await openai.acquire_many("a", 1000) + await openai.acquire_many("a", 1000)
    leases += await openai.acquire_many("a", 1000)
    await server.delete("openai", drain=True)
    await turns(100)
    assert server.pools.row("openai").total == 3000
    walked = 0

    def after(id: int, count: int) -> list[Key]:
        nonlocal walked
        walked += 1
        return []

    openai.pool.after = after  # type: ignore[method-assign]
    for lease in leases[:2999]:
        await now(openai.unblock(lease.id, lease.lease))
    await turns(100)
    assert server.pools.row("openai").total == 1
    await now(openai.delete(leases[2999].id))
    await server.gone("openai")
    assert walked == 0


@on_loop
async def test_pools_that_were_being_emptied_go_on_after_a_restart() -> None:
    """Their definitions say so."""
    clock, timers = Moment(), HeldTimers()
    default = make_engine(clock, timers)
    engine = default.sibling("old", 7, default.rules)
    await engine.generate(3)
    lease = await now(engine.acquire("a", 0))
    pools = EmbeddedPools(default, others=[(Definition(7, "old", {}, draining=True), engine)])
    await turns()
    assert pools.row("old").total == 1
    with pytest.raises(PoolDraining):
        await engine.generate(1)
    assert engine.handles.read(lease.handle) == (lease.id, lease.lease)
    await now(engine.unblock(lease.id, lease.lease))
    await turns_until(lambda: pools.names() == ["default"], "the pool is gone")
    await pools.put("new", {}, ADMIN)
    assert pools.get("new").handles.make(1, 1) == default.handles.of_pool(8).make(1, 1)
    await pools.close()


@on_loop
async def test_the_stop_of_the_server_answers_the_waiters_of_every_pool() -> None:
    """And no timer of any pool fires afterwards."""
    server = Server()
    waiters = [Call((await server.put(name)).acquire("a", 30)) for name in ("a", "b")]
    server.pools.drain()
    await turns()
    for waiter in waiters:
        assert waiter.over
    await server.pools.close()
