"""Who holds keys and waits for them, and rare events, as every engine answers. Nothing in it depends on time."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
from engine_support import Opener, embedded, on_loop
from valkey_support import check, engine_on, eventually, new_place, sealed_on_valkey

from keypool.core.answers import HolderRow, RareEventRow, Row, WaiterRow
from keypool.core.cursor import EventQuery, HolderQuery, ListQuery, WaiterQuery
from keypool.core.errors import BadRequest
from keypool.core.events import By, Origin
from keypool.core.outcomes import Outcome, Report
from keypool.engine import Client, Engine
from keypool.engine.valkey import waiters
from keypool.engine.valkey.opening import OLDER

OPERATOR = Origin(By.OPERATOR, "ops")


@contextlib.asynccontextmanager
async def on_valkey(partitions: int) -> AsyncIterator[Engine]:
    """An engine over a place of its own, in clear, which is checked at the end."""
    place = new_place()
    async with engine_on(place.url, partitions) as engine:
        yield engine
    check(place.valkey, place.pool, partitions)


OPENERS: dict[str, Opener] = {
    "embedded": embedded,
    "valkey": functools.partial(on_valkey, 1),
    "partitions": functools.partial(sealed_on_valkey, 4),
}


@pytest.fixture(params=list(OPENERS.values()), ids=list(OPENERS))
def opened(request: pytest.FixtureRequest) -> Opener:
    """Opens an engine of each kind."""
    opener: Opener = request.param
    return opener


async def owners(engine: Engine, limit: int = 50) -> list[HolderRow]:
    """All who hold keys, a page at a time."""
    found: list[HolderRow] = []
    after = None
    while True:
        page = await engine.owners(HolderQuery(after=after, limit=limit))
        assert len(page.owners) <= limit
        found += page.owners
        if page.next is None:
            return found
        after = page.next


async def keys_of(engine: Engine, owner: str, limit: int) -> list[Row]:
    """All keys of an owner, a page at a time."""
    found: list[Row] = []
    after = None
    while True:
        page = await engine.page(ListQuery(owner=owner, after=after, limit=limit))
        found += page.keys
        if page.next is None:
            return found
        after = page.next


async def rare(engine: Engine, kind: str | None = None, limit: int = 50) -> list[RareEventRow]:
    """All rare events, newest first, a page at a time."""
    found: list[RareEventRow] = []
    after = None
    while True:
        page = await engine.rare_events(EventQuery(after=after, limit=limit, kind=kind))  # type: ignore[arg-type]
        found += page.events
        if page.next is None:
            return found
        after = page.next


@on_loop
async def test_owners_come_in_order_of_name_however_long_the_pages_are(opened: Opener) -> None:
    """One entry for each owner and token; those without a name first; gone when the last lease ends."""
    async with opened() as engine:
        await engine.generate(40)
        names = [
            ("b", None),
            ("\U0001f600", None),
            ("b", "ci"),
            (None, "ci"),
            ("a" * 200, None),
            (None, None),
            ("é", "x"),
        ]
        leases = {}
        for owner, client in [*names, *names, ("b", None)]:
            lease = await engine.acquire(owner, 0, client=None if client is None else Client(client))
            leases[owner, client] = lease
        expected = [
            (None, None, 2), (None, "ci", 2), ("a" * 200, None, 2), ("b", None, 3), ("b", "ci", 2), ("é", "x", 2),
            ("\U0001f600", None, 2),
        ]  # fmt: skip
        whole = await owners(engine)
        assert [(row.owner, row.client, row.held) for row in whole] == expected
        assert await owners(engine, 1) == await owners(engine, 3) == whole
        assert {row.released for row in whole} == {0}
        for row in await keys_of(engine, "é", 5):
            await engine.unblock(row.id, row.lease)
        assert [(row.owner, row.client, row.held) for row in await owners(engine, 2)] == [
            each for each in expected if each[0] != "é"
        ]
        with pytest.raises(BadRequest, match="after must be"):
            await engine.owners(HolderQuery(after="e30"))


@on_loop
async def test_the_keys_of_an_owner_come_in_order_of_lease(opened: Opener) -> None:
    """Under whatever token; the walk goes on though the key where it stood was released."""
    async with opened() as engine:
        await engine.generate(30)
        for number in range(20):
            await engine.acquire(
                "ann" if number % 4 else "an", 0, client=Client("ci") if number % 3 else None
            )
        rows = await keys_of(engine, "ann", 50)
        leases = [row.lease or 0 for row in rows]
        assert (len(leases), leases) == (15, sorted(leases))
        assert {(row.owner, row.state) for row in rows} == {("ann", "blocked")}
        assert [row.lease for row in await keys_of(engine, "ann", 4)] == leases
        page = await engine.page(ListQuery(owner="ann", limit=4))
        await engine.unblock(page.keys[-1].id, None)
        rest = await engine.page(ListQuery(owner="ann", after=page.next))
        assert [row.lease for row in (*page.keys, *rest.keys)] == leases
        assert await keys_of(engine, "nobody", 4) == []


@on_loop
async def test_an_operator_ends_all_leases_of_an_owner(opened: Opener) -> None:
    """Or those under one token; of others nothing changes; it is one rare event."""
    async with opened() as engine:
        await engine.generate(20)
        for number in range(16):
            await engine.acquire(
                "ann" if number % 2 else "bob", 0, client=Client("ci") if number % 3 else None
            )
        assert await engine.release_owner("ann", "ci", OPERATOR) == 5
        assert await engine.release_owner("ann", None, OPERATOR) == 3
        assert await engine.release_owner("ann", None, OPERATOR) == 0
        assert [(row.owner, row.client, row.held) for row in await owners(engine)] == [
            ("bob", None, 3),
            ("bob", "ci", 5),
        ]
        [event] = await rare(engine, "unblocked")
        assert (event.owner, event.by, event.actor, event.count) == ("ann", "operator", "ops", 8)
        assert (await engine.stats()).unblocked == 8


@on_loop
async def test_leases_that_ran_out_are_counted_by_owner(opened: Opener) -> None:
    """As long as the owner holds something."""
    async with (
        opened(block_seconds=0.2, max_block_seconds=60.0) if opened is embedded else _short(opened) as engine
    ):
        await engine.generate(4)
        for _ in range(2):
            await engine.acquire("ann", 0)
        await engine.acquire("ann", 0, None, 50.0)

        async def both_ran_out() -> bool:
            return [(row.held, row.released) for row in await owners(engine)] == [(1, 2)]

        await eventually(both_ran_out, "two leases ran out", 30)


async def _waiting(engine: Engine, count: int) -> list[WaiterRow] | None:
    waiting = (await engine.waiters(WaiterQuery())).waiters
    return waiting if len(waiting) == count else None


def _short(opener: Opener) -> contextlib.AbstractAsyncContextManager[Engine]:
    place = new_place()
    partitions = 4 if opener is OPENERS["partitions"] else 1
    return engine_on(place.url, partitions, block_seconds=0.2, max_block_seconds=60.0)


@on_loop
async def test_waiters_come_in_order(opened: Opener) -> None:
    """First come, first served, with whoever waits under a token."""
    async with opened() as engine:
        tasks = []
        for owner, client in (("b", None), ("a", Client("ci")), (None, None)):
            tasks.append(asyncio.ensure_future(engine.acquire(owner, 30, client=client)))
            await asyncio.sleep(0)
        waiting = await eventually(lambda: _waiting(engine, 3), "three wait", 30)
        assert [(row.owner, row.client) for row in waiting] == [("b", None), ("a", "ci"), (None, None)]
        moments = [row.waiting_since for row in waiting]
        assert moments == sorted(moments)
        first = await engine.waiters(WaiterQuery(limit=2))
        rest = await engine.waiters(WaiterQuery(limit=2, after=first.next))
        assert (first.waiters + rest.waiters, rest.next) == (waiting, None)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@on_loop
async def test_the_moment_since_which_a_waiter_waits_moves_only_with_the_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not by what two readings of clocks differ by; over Valkey, where that is computed for each page."""
    read, real = itertools.count(), time.time
    wrong = 0.0
    monkeypatch.setattr(
        waiters, "time", SimpleNamespace(time=lambda: real() + wrong + next(read) % 3 * 0.001)
    )
    async with sealed_on_valkey(1) as engine:
        task = asyncio.ensure_future(engine.acquire("a", 30))
        found = await eventually(lambda: _waiting(engine, 1), "it waits", 30)
        for _ in range(9):
            assert (await engine.waiters(WaiterQuery())).waiters == found
        wrong = 3600.0  # the clock is set
        moved = (await engine.waiters(WaiterQuery())).waiters
        assert moved != found
        assert (await engine.waiters(WaiterQuery())).waiters == moved
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@on_loop
async def test_rare_events_are_kept_and_a_crowd_is_one(opened: Opener) -> None:
    """Whatever the pages; frequent ones aren't among them."""
    async with opened() as engine:
        made = await engine.generate(50, OPERATOR)
        lease = await engine.acquire("ann", 0)
        await engine.unblock(lease.id, lease.lease, None, Report(Outcome.INVALID))
        await engine.restore(lease.id, OPERATOR)
        await engine.reveal(lease.id, OPERATOR)
        lease = await engine.acquire("bob", 0)
        await engine.unblock(lease.id, lease.lease)
        lease = await engine.acquire("bob", 0)
        await engine.quarantine(lease.id, None, True, OPERATOR)
        await engine.delete_many([key.id for key in made[:10]], OPERATOR)
        await engine.delete(made[10].id, Origin(By.OPERATOR, "eve"))
        events = await rare(engine)
        assert sorted((event.event, event.by, event.actor, event.count) for event in events) == [
            ("deleted", "operator", "eve", 1),
            ("deleted", "operator", "ops", 10),
            ("generated", "operator", "ops", 50),
            ("quarantined", "holder", None, 1),
            ("quarantined", "operator", "ops", 1),
            ("restored", "operator", "ops", 1),
            ("revealed", "operator", "ops", 1),
            ("unblocked", "operator", "ops", 1),
        ]
        [generated] = [event for event in events if event.event == "generated"]
        first = next(key for key in made if key.id == generated.id)
        assert generated.hint == f"{first.key[:4]}…{first.key[-4:]}"
        assert [event.at for event in events] == sorted((event.at for event in events), reverse=True)
        paged = await rare(engine, limit=1)
        assert sum(event.count for event in paged) == sum(event.count for event in events)
        assert {event.event for event in await rare(engine, "quarantined", 1)} == {"quarantined"}
        with pytest.raises(BadRequest, match="after must be"):
            await engine.rare_events(EventQuery(after="x"))


# ----------------------------------------------------------------------------------------------- over Valkey


@on_loop
async def test_a_pool_of_an_older_layout_gets_its_holders() -> None:
    """Those that hold keys as it is brought up are listed soon; it has no rare events yet."""
    place = new_place()
    async with engine_on(place.url, 2) as engine:
        await engine.generate(600)
        await engine.acquire_many("ann", 500)
    with place.valkey.commands() as commands:
        for key in commands.ask("KEYS", f"{{{place.pool}*"):
            if key.endswith((b":holders", b":rare")):
                commands.ask("DEL", key.decode())
            elif key.endswith(b":meta"):
                commands.ask("HDEL", key.decode(), "indexed")
        commands.ask("HSET", f"{{{place.pool}}}:pool", "layout", OLDER[-1])
    async with engine_on(place.url, None) as engine:

        async def complete() -> bool:
            return [row.held for row in await owners(engine)] == [500]

        await eventually(complete, "all holders are there", 30)
        assert await rare(engine) == []
        assert await engine.release_owner("ann", None, OPERATOR) == 500
    check(place.valkey, place.pool, 2)


@on_loop
async def test_servers_share_holders_and_rare_events_but_not_their_queues() -> None:
    """Each lists the waiters of its own queue, which it serves."""
    place = new_place()
    async with engine_on(place.url, 2) as one, engine_on(place.url, 2) as other:
        [key] = await one.generate(1, OPERATOR)
        await one.acquire("ann", 0)
        assert await owners(other) == await owners(one) != []
        assert await rare(other) == await rare(one) != []
        task = asyncio.ensure_future(one.acquire("bob", 30))

        async def waits() -> bool:
            return bool((await one.waiters(WaiterQuery())).waiters)

        await eventually(waits, "it waits", 30)
        assert (await other.waiters(WaiterQuery())).waiters == []
        assert await other.release_owner("ann", None, OPERATOR) == 1
        assert (await task).id == key.id


@on_loop
async def test_the_latest_thousand_rare_events_are_kept_in_each_partition() -> None:
    """The oldest go."""
    place = new_place()
    async with engine_on(place.url, 1) as engine:
        [key] = await engine.generate(1, OPERATOR)
        for number in range(1005):
            await engine.reveal(key.id, Origin(By.OPERATOR, f"ops-{number % 2}"))
        events = await rare(engine, limit=500)
        # Of one second they are few, as they are read; as they are stored each is one.
        assert {event.event for event in events} == {"revealed"}
    with place.valkey.commands() as commands:
        [name] = commands.ask("KEYS", f"{{{place.pool}:*}}:rare")
        assert commands.ask("LLEN", name.decode()) == 1000
