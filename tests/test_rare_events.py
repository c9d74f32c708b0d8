"""Who holds keys and waits for them, and rare events, as the embedded engine answers, on a data file too."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from durable_support import old_file, opened, opened_pools
from engine_support import START, Held, held_with, now, on_loop, turns

from keypool.core.answers import Lease, NewKey, RareEventRow
from keypool.core.cursor import EventQuery, HolderQuery, ListQuery, WaiterQuery, page_query
from keypool.core.errors import BadRequest, StartError
from keypool.core.events import By, Change, Origin
from keypool.core.keys import Key, moment
from keypool.core.outcomes import Outcome, Report
from keypool.core.rare_events import MOST_EVENTS, RareEvents
from keypool.core.rules import PoolRules
from keypool.engine import Client
from keypool.engine.durable import datafile
from keypool.engine.durable.compaction import BatchLog
from keypool.engine.durable.rows import Batch, StoredPool, encode, event_row_of
from keypool.engine.embedded import EmbeddedEngine

OPERATOR = Origin(By.OPERATOR, "ops")
SECRET = bytes(range(32))
KEY = Key(1, "x" * 20, START, START)


async def rare(engine: EmbeddedEngine, kind: str | None = None) -> list[RareEventRow]:
    """All rare events, newest first, read in small pages."""
    found: list[RareEventRow] = []
    after = None
    while True:
        page = await engine.rare_events(EventQuery(after=after, limit=3, kind=kind))  # type: ignore[arg-type]
        found += page.events
        if page.next is None:
            return found
        after = page.next


async def until(condition: Callable[[], bool]) -> None:
    """Wait until this holds, for half a minute at most."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - it is a test
            await asyncio.sleep(0.01)


# ----------------------------------------------------------------------------------------------- holders


@on_loop
async def test_owners_are_listed_in_order_of_name_with_their_oldest_lease() -> None:
    """Those without a name come first; a token's name makes another entry; what ran out lately is counted."""
    held, _ = await held_with("bob", keys=6)
    held.clock.on(1)
    for owner, client in (("ann", None), (None, None), ("bob", Client("ci")), ("bob", None)):
        await now(held.engine.acquire(owner, 0, client=client))
    rows = (await now(held.engine.owners(HolderQuery()))).owners
    assert [(row.owner, row.client, row.held) for row in rows] == [
        (None, None, 1), ("ann", None, 1), ("bob", None, 2), ("bob", "ci", 1),
    ]  # fmt: skip
    assert rows[2].acquired_at == moment(START)
    first = await now(held.engine.owners(HolderQuery(limit=3)))
    rest = await now(held.engine.owners(HolderQuery(limit=3, after=first.next)))
    assert (first.owners, rest.owners, rest.next) == (rows[:3], rows[3:], None)
    held.clock.on(59.5)  # the first lease of bob runs out, whose timer is late
    rows = (await now(held.engine.owners(HolderQuery()))).owners
    assert [(row.held, row.released) for row in rows] == [(1, 0), (1, 0), (1, 1), (1, 0)]
    for wrong in ("x", first.next[:-2] if first.next else "", "WyJpIiwxXQ"):
        with pytest.raises(BadRequest, match="after must be"):
            await now(held.engine.owners(HolderQuery(after=wrong)))


@on_loop
async def test_releasing_an_owner_ends_all_its_leases_as_an_operator() -> None:
    """Waiters get the keys; of others nothing changes; a lease that begins meanwhile need not end."""
    held, leases = await held_with("ann", "bob", "ann", "ann")
    engine = held.engine
    await now(engine.generate(1))
    await now(engine.acquire("ann", 0, client=Client("ci")))
    waiter = held.wait("ann")
    assert await now(engine.release_owner("ann", "ci", OPERATOR)) == 1
    await turns()
    assert waiter.answer.id == 5
    assert await now(engine.release_owner("ann", None, OPERATOR)) == 4
    assert await now(engine.release_owner("ann", None, OPERATOR)) == 0
    assert [lease.id for lease in leases if (await engine.get(lease.id)).state == "blocked"] == [leases[1].id]
    [event] = (await now(engine.rare_events(EventQuery(kind="unblocked")))).events[:1]
    assert (event.event, event.by, event.actor, event.count) == ("unblocked", "operator", "ops", 5)
    assert engine.recent(1)[0].actor == "ops"
    await held.check()


@on_loop
async def test_a_thousand_leases_of_an_owner_end_in_slices() -> None:
    """Other calls are served meanwhile, and those that the owner begins meanwhile go on."""
    engine = EmbeddedEngine(PoolRules(max_keys=3000))
    await engine.generate(3000)
    await engine.acquire_many("ann", 1000)
    task = asyncio.ensure_future(engine.release_owner("ann", None, OPERATOR))
    turns = 0
    while not task.done():
        await asyncio.sleep(0)
        turns += 1
        await engine.acquire("ann", 0)
    assert task.result() == 1000
    assert turns > 1
    assert engine.pool.blocked == turns
    await engine.close()


@on_loop
async def test_keys_of_an_owner_are_listed_in_order_of_lease() -> None:
    """With no other order, state or name."""
    held, [first, *_] = await held_with("bob", "ann", "bob", keys=4)
    await now(held.engine.unblock(first.id, None))
    again = await now(held.engine.acquire("bob", 0))
    page = await now(held.engine.page(ListQuery(owner="bob", limit=1)))
    rest = await now(held.engine.page(ListQuery(owner="bob", after=page.next, state="blocked")))
    assert [row.lease for row in (*page.keys, *rest.keys)] == [3, again.lease]
    for wrong in (
        {"state": "cooling"}, {"prefix": "0"}, {"name": "a"}, {"order": "id"}, {"order": "release"},
    ):  # fmt: skip
        with pytest.raises(BadRequest, match="owner can't be combined"):
            page_query(ListQuery(owner="bob", **wrong))  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match="after must be"):
        page_query(ListQuery(after=page.next))


@on_loop
async def test_waiters_are_listed_first_come_first() -> None:
    """Also those whose client has spent its share, in their places."""
    held, _ = await held_with("bob")
    engine = held.engine
    limited = Client("ci", 0)
    names: list[tuple[str, Client | None]] = [("a", None), ("b", limited), ("c", None), ("d", limited)]
    for owner, client in names:
        held.clock.on(1)
        asyncio.ensure_future(engine.acquire(owner, 30, client=client)).add_done_callback(lambda _: None)
        await asyncio.sleep(0)
    page = await now(engine.waiters(WaiterQuery(limit=3)))
    assert [(row.owner, row.client) for row in page.waiters] == [("a", None), ("b", "ci"), ("c", None)]
    assert page.waiters[1].waiting_since == moment(START + 2)
    rest = await now(engine.waiters(WaiterQuery(limit=3, after=page.next)))
    assert [row.owner for row in rest.waiters] == ["d"]
    assert rest.next is None
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


# ------------------------------------------------------------------------------------------- rare events


@on_loop
async def test_each_rare_change_is_a_rare_event_and_no_other_is() -> None:
    """With its key, who brought it about, and the lease; newest first; of one kind if wanted."""
    held = Held()
    engine = held.engine
    await now(engine.generate(2, OPERATOR))
    imported = await now(engine.import_key(NewKey("sk-live-0123456789"), True, OPERATOR))
    lease: Lease = await now(engine.acquire("ann", 0))
    await now(engine.keepalive(lease.id))
    await now(engine.unblock(lease.id, lease.lease))
    lease = await now(engine.acquire("ann", 0))
    await now(engine.unblock(lease.id, None, None, None, OPERATOR))
    await now(engine.reveal(imported.id, OPERATOR))
    lease = await now(engine.acquire("ann", 0))
    await now(engine.unblock(lease.id, lease.lease, None, Report(Outcome.INVALID)))
    await now(engine.restore(lease.id, OPERATOR))
    await now(engine.delete(lease.id, OPERATOR))
    held.clock.on(301)
    held.timers.fire()
    events = await rare(engine)
    assert [(event.event, event.by, event.actor, event.count) for event in events] == [
        ("expired", "deadline", None, 2),
        ("deleted", "operator", "ops", 1),
        ("restored", "operator", "ops", 1),
        ("quarantined", "holder", None, 1),
        ("revealed", "operator", "ops", 1),
        ("unblocked", "operator", "ops", 1),
        ("imported", "operator", "ops", 1),
        ("generated", "operator", "ops", 2),
    ]
    assert (events[5].owner, events[5].lease, events[4].hint) == ("ann", 2, "sk-l…6789")
    assert (events[-1].id, events[-1].at) == (1, moment(START))
    assert [event.event for event in await rare(engine, "deleted")] == ["deleted"]
    with pytest.raises(BadRequest, match="after must be"):
        await now(engine.rare_events(EventQuery(after="x")))


def test_a_crowd_is_one_event_in_one_call_or_one_second() -> None:
    """Of one kind, from one origin; whatever else happens in between."""
    events = RareEvents()
    call, other = Origin(By.OPERATOR, "ops"), Origin(By.OPERATOR, "eve")

    def add(change: Change, at: float, origin: Origin) -> int:
        return events.add(change, KEY, None, START + at, origin).number

    deadline = Origin(By.DEADLINE)
    assert [add(Change.EXPIRED, at, deadline) for at in (0, 0.9, 1.1, 1.5, 2.2)] == [1, 1, 2, 2, 3]
    assert [add(Change.DELETED, at, call) for at in (3, 30, 300)] == [4, 4, 4]
    assert add(Change.DELETED, 300.1, Origin(By.OPERATOR, "ops")) == 5
    assert add(Change.DELETED, 300.2, other) == 6
    assert add(Change.DELETED, 300.3, Origin(By.OPERATOR, "ops")) == 5
    assert [event.count for event in events.all()] == [2, 2, 1, 3, 2, 1]


def test_the_latest_thousand_are_kept_and_what_is_gone_grows_no_more() -> None:
    """The pages go from the newest to the oldest."""
    events = RareEvents()
    call = Origin(By.OPERATOR, "ops")
    events.add(Change.DELETED, KEY, None, START, call)
    for number in range(MOST_EVENTS):
        events.add(Change.EXPIRED, KEY, None, START + 2 * number, Origin(By.DEADLINE))
    assert len(events.all()) == MOST_EVENTS
    event = events.add(Change.DELETED, KEY, None, START, call)
    assert (event.number, event.count) == (MOST_EVENTS + 2, 1)
    page, before = events.page(None, None, 2)
    assert ([each.number for each in page], before) == ([MOST_EVENTS + 2, MOST_EVENTS + 1], MOST_EVENTS + 1)
    assert events.page(Change.DELETED, before, 2) == ([], None)


# ----------------------------------------------------------------------------------------- on a data file


def stored(path: Path) -> list[tuple[Any, ...]]:
    """The rare events of a file: kind and count, oldest first."""
    return [(row[2], row[10]) for rows in datafile.examine(path).events.values() for row in rows]


@on_loop
async def test_rare_events_survive_a_restart_and_are_on_disk_with_their_change(tmp_path: Path) -> None:
    """When a call is answered its event is in the file, as it is after kill -9; after a restart they go on."""
    path = tmp_path / "keypool.db"
    async with opened(path) as engine:
        [key, other] = await engine.generate(2, OPERATOR)
        assert stored(path) == [("generated", 2)]
        await engine.acquire("ann", 0)
        await engine.release_owner("ann", None, OPERATOR)
        await engine.delete(key.id, OPERATOR)
        assert stored(path) == [("generated", 2), ("unblocked", 1), ("deleted", 1)]
        await engine.reveal(other.id, OPERATOR)
        before = await rare(engine)
    async with opened(path) as engine:
        assert await rare(engine) == before
        assert [event.event for event in before] == ["revealed", "deleted", "unblocked", "generated"]
        await engine.delete(other.id, OPERATOR)
        assert [event.event for event in await rare(engine)][:2] == ["deleted", "revealed"]


@on_loop
async def test_owners_are_as_before_after_a_restart(tmp_path: Path) -> None:
    """The index is made from the keys, which are read in order of id."""
    path = tmp_path / "keypool.db"
    async with opened(path) as engine:
        await engine.generate(30)
        for number in range(20):
            await engine.acquire(("ann", "bob", None)[number % 3], 0, client=Client("ci"))
        before = await engine.owners(HolderQuery()), await engine.page(ListQuery(owner="ann"))
    async with opened(path) as engine:
        engine.pool.check()
        owners, page = await engine.owners(HolderQuery()), await engine.page(ListQuery(owner="ann"))
        assert owners == before[0]
        assert [row.lease for row in page.keys] == [row.lease for row in before[1].keys]
        assert await engine.release_owner("ann", "ci", OPERATOR) == 7


@on_loop
async def test_with_a_secrets_key_no_hint_is_stored(tmp_path: Path) -> None:
    """It is looked up while the key lives; a rekey removes those that were stored in clear."""
    path = tmp_path / "keypool.db"
    async with opened(path) as engine:
        [key, gone] = await engine.generate(2, OPERATOR)
        await engine.delete(gone.id, OPERATOR)
    async with opened_pools(path, SECRET) as pools:
        made = await pools.default.import_key(NewKey("sk-live-0123456789"), True, OPERATOR)
        hints = [event.hint for event in await rare(pools.default)]
        assert hints == [made.hint, *hints[1:]]
        assert "…" not in hints
        await pools.rekey()
        await until(lambda: pools.rekeying().state != "running")
    kept = path.read_bytes()
    for hint in hints:
        assert hint.encode() not in kept
    async with opened_pools(path, SECRET) as pools:
        events = await rare(pools.default)
        assert [event.hint for event in events] == [made.hint, "…", f"{key.key[:4]}…{key.key[-4:]}"]


@on_loop
async def test_a_pool_that_is_gone_takes_its_events_with_it(tmp_path: Path) -> None:
    """Pools keep theirs apart, and the file keeps the latest thousand of each."""
    path = tmp_path / "keypool.db"
    async with opened_pools(path) as pools:
        await pools.put("one", {}, OPERATOR)
        await pools.put("two", {}, OPERATOR)
        for name in ("one", "two"):
            await pools.get(name).generate(1, OPERATOR)
        await pools.delete("one", drain=True, now=True, origin=OPERATOR)
        await until(lambda: "one" not in pools.names())
    assert list(datafile.examine(path).events) == [2]


def test_a_flush_keeps_the_latest_thousand_of_each_pool(tmp_path: Path) -> None:
    """Rows that grew are rewritten; the oldest go."""
    database = datafile.connect(tmp_path / "keypool.db")
    log = BatchLog(database)
    events = RareEvents()
    for number in range(1500):
        event = events.add(Change.EXPIRED, KEY, None, START + number, Origin(By.DEADLINE))
        log.commit([encode(Batch(events=[event_row_of(event, pool, sealed=False) for pool in (0, 3)]))])
        if number == 700:
            log.flush_all()
            log = BatchLog(database)
    event.count = 7
    log.commit([encode(Batch(events=[event_row_of(event, 0, sealed=False)]))])
    log.commit([encode(Batch(pools=[StoredPool(3)]))])
    log.flush_all()
    found = database.execute(
        "SELECT pool, count(*), min(number), max(count) FROM events GROUP BY pool"
    ).fetchall()
    assert found == [(0, MOST_EVENTS, 501, 7)]
    database.close()


@on_loop
async def test_a_rare_event_that_cannot_be_is_refused(tmp_path: Path) -> None:
    """The file is damaged then, and left as it is."""
    path = tmp_path / "keypool.db"
    async with opened(path) as engine:
        await engine.generate(1)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE events SET event = 'stolen'")
        database.commit()
    with pytest.raises(StartError, match="stolen"):
        async with opened(path):
            pass


def test_a_batch_of_the_version_before_has_no_events() -> None:
    """As files of that version contain it."""
    assert (
        msgspec.msgpack.decode(msgspec.msgpack.encode([[], [], {"last_id": 1}, []]), type=Batch).events == []
    )


@on_loop
async def test_a_file_of_the_version_before_gets_rare_events(tmp_path: Path) -> None:
    """Its batches have none, and the first change adds one."""
    path = tmp_path / "keypool.db"
    key = (1, "a" * 20, 1_000, 9_000_000_000_000, None, 0, None, None, 0, None)
    old_file(path, 4, [key], [[[], [], {"last_id": 1}, []]])
    async with opened(path) as engine:
        assert await rare(engine) == []
        await engine.delete(1, OPERATOR)
    assert stored(path) == [("deleted", 1)]
