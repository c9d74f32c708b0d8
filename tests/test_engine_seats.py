"""An engine's calls about secrets with several seats: what every engine does, on each of `OPENERS`.

The rules are tested in test_pool_seats*.py; here it is whether each engine has them.
"""

from __future__ import annotations

import functools
import itertools
import time
from typing import Any

import pytest
from engine_support import Opener, embedded, on_loop
from valkey_support import SECRETS, age, check, engine_on, new_place, sealed_on_valkey, with_constants

from keypool.core.answers import Extension, KeyPatch, Lease, NewKey, Unblock
from keypool.core.cursor import HistoryQuery, HolderQuery, ListQuery
from keypool.core.errors import (
    KeypoolError,
    ManySeats,
    NoKeyAvailable,
    PoolFull,
    SecretExists,
    StaleLease,
    UnknownKey,
)
from keypool.core.events import By, Change, Origin
from keypool.core.keys import State
from keypool.core.outcomes import Outcome, Report
from keypool.core.pace import Pace
from keypool.engine import Engine
from keypool.engine.valkey.details import Editor
from keypool.engine.valkey.engine import ValkeyEngine
from keypool.engine.valkey.scripts import keys_of

OPERATOR = Origin(By.OPERATOR, "ops")
OPENERS: dict[str, Opener] = {
    "embedded": embedded,
    "valkey": functools.partial(sealed_on_valkey, 1),
    "partitions": functools.partial(sealed_on_valkey, 4),
}
KEEPING: dict[str, Any] = {"keepalive_seconds": None}
SECRET = "sk-live-4711-abcd"
LIMITED = Report(Outcome.RATE_LIMITED, 1000.0)


@pytest.fixture(params=list(OPENERS.values()), ids=list(OPENERS))
def opened(request: pytest.FixtureRequest) -> Opener:
    """Opens an engine of each kind."""
    opener: Opener = request.param
    return opener


async def seats(engine: Engine, count: int, secret: str = SECRET, **more: Any) -> list[int]:
    """The ids of the seats of a new secret."""
    made = await engine.import_key(NewKey(secret, seats=count, **more), False, OPERATOR)
    assert made.ids[0] == made.id
    assert made.ids == sorted(made.ids)
    return made.ids


async def held(engine: Engine, count: int) -> list[Lease]:
    """So many leases, in order of id."""
    leases = [await engine.acquire("ann", 0) for _ in range(count)]
    return sorted(leases, key=lambda lease: lease.id)


async def states(engine: Engine) -> list[State]:
    """The states of all keys, in order of id."""
    return [row.state for row in (await engine.page(ListQuery())).keys]


async def numbers(engine: Engine) -> list[tuple[int, int, int]]:
    """Id, seat and seats of all keys, in order of id."""
    return [(row.id, row.seat, row.seats) for row in (await engine.page(ListQuery())).keys]


async def refused(call: Any) -> type[KeypoolError]:
    """The class of the error of a call."""
    with pytest.raises(KeypoolError) as error:
        await call
    return error.type


@on_loop
async def test_seats_are_keys_with_one_text(opened: Opener) -> None:
    """With ids, leases and handles of their own; text, name and hint find the first of them."""
    async with opened(**KEEPING) as engine:
        ids = await seats(engine, 3, name="acct", data=b'{"user":"x"}')
        assert await numbers(engine) == [(id, number, 3) for number, id in enumerate(ids, 1)]
        again = await engine.import_key(NewKey(SECRET, seats=5), False, OPERATOR)
        assert (again.existed, again.ids) == (True, ids)
        leases = await held(engine, 3)
        assert [lease.id for lease in leases] == ids
        assert {(lease.key, lease.name, bytes(lease.data or b"")) for lease in leases} == {
            (SECRET, "acct", b'{"user":"x"}')
        }
        for known in (SECRET, "acct", "sk-l…abcd", f"id:{ids[0]}"):
            assert (await engine.find(known)).id == ids[0]
        assert [row.id for row in (await engine.page(ListQuery(name="a"))).keys] == [ids[0]]
        assert (await engine.get(ids[2])).seat == 3
        assert (await engine.stats()).total == 3


@on_loop
async def test_the_text_alone_names_no_seat(opened: Opener) -> None:
    """Beside a lease number it does; handles and ids name their own."""
    async with opened(**KEEPING) as engine:
        ids = await seats(engine, 3)
        one, two, three = await held(engine, 3)
        assert await refused(engine.unblock(SECRET, None)) is ManySeats
        assert await refused(engine.keepalive(SECRET)) is ManySeats
        assert await refused(engine.unblock(SECRET, 10**12)) is StaleLease
        assert await refused(engine.extend(SECRET, 10**12, None)) is StaleLease
        assert (await engine.unblock(SECRET, two.lease)).id == two.id
        assert await engine.unblock_many([
            Unblock(SECRET), Unblock(SECRET, one.lease), Unblock(SECRET, 10**9), Unblock(ids[2]),
        ]) == ["many_seats", "done", "stale", "done"]  # fmt: skip
        assert await engine.keepalive_many([SECRET, ids[1]]) == ["many_seats", "done"]
        assert await engine.extend_many([Extension(SECRET, three.lease)]) == ["over"]
        assert await states(engine) == [State.AVAILABLE] * 3
        await engine.delete(SECRET, OPERATOR)
        await seats(engine, 1)
        assert (await engine.keepalive(SECRET)).expires_in is None


@on_loop
async def test_a_report_is_about_all_seats_and_those_that_are_held_finish_first(opened: Opener) -> None:
    """Counted once, and told of one; no report makes the cooldown shorter."""
    async with opened(**KEEPING, max_quarantined_percent=100.0) as engine:
        ids = await seats(engine, 4)
        one, two, three = await held(engine, 3)
        free = ({*ids} - {one.id, two.id, three.id}).pop()
        assert (await engine.unblock(one.id, one.lease, report=LIMITED)).state is State.COOLING
        assert {row.id: row.state for row in (await engine.page(ListQuery())).keys} == {
            one.id: State.COOLING, free: State.COOLING, two.id: State.BLOCKED, three.id: State.BLOCKED,
        }  # fmt: skip
        shorter = Report(Outcome.RATE_LIMITED, 1.0)
        answer = await engine.unblock(two.id, two.lease, report=shorter)
        assert answer.available_in is not None
        assert answer.available_in > 900
        rows = (await engine.page(ListQuery())).keys
        assert [(row.failures, row.outcome) for row in rows] == [(2, Outcome.RATE_LIMITED)] * 4
        stats = await engine.stats()
        assert (stats.cooling, stats.blocked, stats.cooled) == (3, 1, 1)
        assert [event.event for event in engine.recent(20)].count(Change.COOLED) == 1
        await engine.unblock(three.id, three.lease, report=Report(Outcome.INVALID, reason="banned"))
        rows = (await engine.page(ListQuery())).keys
        assert [(row.state, row.reason) for row in rows] == [(State.QUARANTINED, "banned")] * 4
        restored = await engine.restore(SECRET, OPERATOR)
        assert (restored.id, restored.state) == (ids[0], State.AVAILABLE)
        stats = await engine.stats()
        assert (stats.available, stats.quarantines, stats.restored) == (4, 1, 1)


@on_loop
async def test_an_operators_quarantine_is_of_the_secret(opened: Opener) -> None:
    """At once it ends all leases."""
    async with opened(**KEEPING) as engine:
        await seats(engine, 3)
        one, two = await held(engine, 2)
        await engine.quarantine(one.id, "leaked", False, OPERATOR)
        assert sorted(await states(engine)) == [State.BLOCKED, State.BLOCKED, State.QUARANTINED]
        await engine.unblock(two.id, two.lease)
        assert (await engine.get(two.id)).state is State.QUARANTINED
        row = await engine.quarantine(SECRET, None, True, OPERATOR)
        assert (row.state, row.reason) == (State.QUARANTINED, "leaked")
        assert await states(engine) == [State.QUARANTINED] * 3
        assert (await engine.unblock(one.id, one.lease, report=LIMITED)).changed is False
        assert await engine.restore_many([one.id], OPERATOR) == ["done"]
        assert await states(engine) == [State.AVAILABLE] * 3


@on_loop
async def test_the_guard_counts_secrets(opened: Opener) -> None:
    """Ten seats are one secret of two."""
    async with opened(**KEEPING) as engine:
        await seats(engine, 10)
        (lease,) = await held(engine, 1)
        assert (await engine.unblock(lease.id, lease.lease, report=Report(Outcome.INVALID))).guarded is False
        await seats(engine, 1, "another")
        (other,) = await held(engine, 1)
        assert (await engine.unblock(other.id, other.lease, report=Report(Outcome.INVALID))).guarded is True


@on_loop
async def test_more_and_fewer_seats(opened: Opener) -> None:
    """The last ones go first; those that are held, when their leases end; what is added is where the others are."""
    async with opened(**KEEPING, max_keys=8) as engine:
        ids = await seats(engine, 4, name="acct")
        assert await refused(engine.update(SECRET, KeyPatch(name="x", seats=9), OPERATOR)) is PoolFull
        leases = await held(engine, 4)
        assert (await engine.update(ids[3], KeyPatch(seats=2), OPERATOR)).seats == 4
        for lease in leases[:2]:
            await engine.unblock(lease.id, lease.lease)
        assert [id for id, *_ in await numbers(engine)] == ids[2:]
        assert await refused(engine.get(ids[0])) is UnknownKey
        assert ((await engine.find("acct")).id, (await engine.get(SECRET)).id) == (ids[2], ids[2])
        await engine.unblock(leases[2].id, leases[2].lease, report=LIMITED)
        row = await engine.update(SECRET, KeyPatch(name="y", seats=5), OPERATOR)
        assert (row.name, row.seats, row.seat) == ("y", 5, 1)
        assert sorted(await states(engine)) == [State.BLOCKED] + [State.COOLING] * 4
        assert [number for _, number, _ in await numbers(engine)] == [1, 2, 3, 4, 5]
        row = await engine.update(SECRET, KeyPatch(seats=1), OPERATOR)
        assert await numbers(engine) == [(leases[3].id, 1, 1)]
        assert (await engine.stats()).deleted == 7 - 1 + 0
        await engine.restore(SECRET, OPERATOR)
        await engine.unblock(SECRET, None)  # the only one needs no number
        (again,) = await held(engine, 1)
        assert again.id == leases[3].id


@on_loop
async def test_a_key_of_any_origin_may_get_seats(opened: Opener) -> None:
    """A generated one, too."""
    async with opened() as engine:
        (made,) = await engine.generate(1)
        await engine.update(made.id, KeyPatch(seats=3), OPERATOR)
        leases = await held(engine, 3)
        assert {lease.key for lease in leases} == {made.key}
        assert [row.id for row in (await engine.page(ListQuery(prefix=made.key[:4]))).keys] == [made.id]
        assert (await engine.stats()).generated == 3


@on_loop
async def test_no_text_names_the_field_of_a_seat() -> None:
    """In a pool in clear, where it is the text, a zero byte and the id."""
    async with engine_on(new_place().url, 1) as engine:
        (made,) = await engine.generate(1)
        await engine.update(made.id, KeyPatch(seats=2), OPERATOR)
        assert await refused(engine.get(f"{made.key}\0{made.id + 1}")) is UnknownKey


@on_loop
async def test_replace_delete_and_reveal_are_about_all_seats(opened: Opener) -> None:
    """Holders may use the text of their leases beside the lease number until each ends."""
    async with opened(**KEEPING) as engine:
        ids = await seats(engine, 3, name="acct", data=b'{"a":1}')
        await seats(engine, 1, "another-secret")
        leases = [lease for lease in await held(engine, 4) if lease.id in ids]
        one, two, three = leases
        assert await refused(engine.replace(two.id, "another-secret", OPERATOR)) is SecretExists
        await engine.replace(two.id, "a-new-secret-77", OPERATOR)
        for id in ids:
            revealed = await engine.reveal(id, OPERATOR)
            assert (revealed.key, bytes(revealed.data or b"")) == ("a-new-secret-77", b'{"a":1}')
        assert (await engine.unblock(SECRET, one.lease)).id == one.id
        assert (await engine.unblock("a-new-secret-77", two.lease)).id == two.id
        assert await refused(engine.unblock(SECRET, None)) is ManySeats
        assert (await engine.unblock(SECRET, three.lease)).id == three.id
        assert await refused(engine.get(SECRET)) is UnknownKey
        await engine.update(three.id, KeyPatch(data=b'{"a":2}', labels={"b": "c"}), OPERATOR)
        assert {bytes((await engine.reveal(id, OPERATOR)).data or b"") for id in ids} == {b'{"a":2}'}
        assert await refused(engine.import_key(NewKey("third", "acct"), False, OPERATOR))
        await engine.delete(two.id, OPERATOR)
        assert [(row.seat, row.seats) for row in (await engine.page(ListQuery())).keys] == [(1, 1)]
        assert (await seats(engine, 2, name="acct")) != ids


@on_loop
async def test_a_batch_imports_seats(opened: Opener) -> None:
    """All or none at the limit; an update gives a key another number of them."""
    async with opened(**KEEPING, max_keys=8) as engine:
        items = [NewKey("one", seats=3), NewKey("two"), NewKey("one", seats=9)]
        one, two, again = await engine.import_many(items, False, False, OPERATOR)
        assert (one.status, len(one.ids or ())) == ("created", 3)
        assert (two.ids, again.status, again.ids) == ([two.id], "duplicate", one.ids)
        full = [NewKey("three", seats=3), NewKey("four", seats=2)]
        assert await refused(engine.import_many(full, False, False, OPERATOR)) is PoolFull
        more = [NewKey("two", seats=4, labels={"a": "b"}), NewKey("one", seats=1)]
        two, one = await engine.import_many(more, True, False, OPERATOR)
        assert ([two.status, one.status], len(two.ids or ()), len(one.ids or ())) == (["updated"] * 2, 4, 1)
        assert (await engine.stats()).total == 5


@on_loop
async def test_a_batch_near_the_limit_adds_secrets_and_seats(opened: Opener) -> None:
    """In one call, whichever partitions they are in."""
    async with opened(**KEEPING, max_keys=9) as engine:
        await seats(engine, 2)
        items = [NewKey("two", seats=2), NewKey(SECRET, seats=5), NewKey("three", seats=2)]
        results = await engine.import_many(items, True, False, OPERATOR)
        assert [(result.status, len(result.ids or ())) for result in results] == [
            ("created", 2), ("updated", 5), ("created", 2),
        ]  # fmt: skip
        assert await refused(engine.import_key(NewKey("four"), False, OPERATOR)) is PoolFull


@on_loop
async def test_many_seats_of_one_secret_leave_no_room_beyond_the_limit(opened: Opener) -> None:
    """All of them are in one partition: then the others can't have their shares."""
    async with opened(**KEEPING, max_keys=24) as engine:
        await seats(engine, 20)
        for number in range(4):
            await seats(engine, 1, f"another-{number}")
        for number in range(4, 12):
            assert await refused(engine.import_key(NewKey(f"another-{number}"), False, OPERATOR)) is PoolFull
        assert (await engine.import_key(NewKey("another-0"), False, OPERATOR)).existed
        assert (await engine.stats()).total == 24


@on_loop
async def test_another_server_may_change_the_number_of_seats_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is room for those that it took away."""
    async with sealed_on_valkey(1, **KEEPING) as engine:
        await seats(engine, 5)
        update = Editor._update

        async def interrupted(editor: Editor, *args: Any) -> Any:
            changed = await update(editor, *args)
            monkeypatch.undo()
            await engine.update(SECRET, KeyPatch(seats=1), OPERATOR)
            return changed

        monkeypatch.setattr(Editor, "_update", interrupted)
        assert (await engine.update(SECRET, KeyPatch(seats=3), OPERATOR)).seats == 3


@on_loop
async def test_seats_that_a_server_added_have_their_chance_at_once() -> None:
    """It draws from as many keys as it knows of."""
    async with sealed_on_valkey(4, **KEEPING) as engine:
        await seats(engine, 1)
        await engine.update(SECRET, KeyPatch(seats=9), OPERATOR)
        assert sum(engine._poller.totals) == 9


@on_loop
async def test_a_walk_meets_each_key_once_while_seats_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if its page is what notices that leases are over, and the first seat's place goes to the next one."""
    with_constants(monkeypatch, MAX_DUE=1)
    place = new_place()
    async with engine_on(place.url, 1, secrets=SECRETS, **KEEPING) as engine:
        engine._poller._stopped = True  # no sweep but those of the calls
        (one,) = await seats(engine, 1, "one")
        await held(engine, 1)
        await seats(engine, 1)
        await held(engine, 1)
        (other,) = await seats(engine, 1, "other")
        await engine.update(SECRET, KeyPatch(seats=2), OPERATOR)
        await held(engine, 2)
        row = await engine.update(SECRET, KeyPatch(seats=1), OPERATOR)
        age(place.valkey, place.pool, 1, 100.0)
        first = await engine.page(ListQuery(limit=2))
        rest = await engine.page(ListQuery(limit=2, after=first.next))
        listed = [row.id for row in (*first.keys, *rest.keys)]
        assert listed == [one, other, (await engine.get(SECRET)).id]
        assert row.id not in listed
    check(place.valkey, place.pool, 1)


@on_loop
async def test_a_seat_that_takes_the_place_of_the_first_one_is_swept_with_it() -> None:
    """Of seats too many whose leases are over, the last one stays; the call that notices it ends all their leases."""
    place = new_place()
    async with engine_on(place.url, 1, secrets=SECRETS, max_block_seconds=90.0, **KEEPING) as engine:
        engine._poller._stopped = True  # no sweep but those of the calls
        await seats(engine, 4)
        last = (await held(engine, 4))[1]  # which gets the place of the first one
        await engine.extend(last.id, last.lease, 60.0)
        await engine.update(SECRET, KeyPatch(seats=1), OPERATOR)
        age(place.valkey, place.pool, 1, 100.0)
        (row,) = (await engine.page(ListQuery())).keys
        assert (row.id, row.state) == (last.id, State.AVAILABLE)
        states = keys_of(place.pool, 0, 1)[2]
        assert place.valkey.ask("ZCOUNT", states, "(0", "+inf") == 0, "a lease that is over was not ended"
    check(place.valkey, place.pool, 1)


@on_loop
async def test_a_pool_that_is_emptied_at_once_keeps_no_seat() -> None:
    """Although the second one takes the place of the first."""
    async with sealed_on_valkey(4, **KEEPING) as engine:
        await seats(engine, 5)
        await held(engine, 5)
        after = [0] * 4
        while (await engine.purge(OPERATOR, True, after, 2))[1]:
            pass
        assert (await engine.stats()).total == 0


@on_loop
async def test_seats_share_the_pace_of_their_secret(opened: Opener) -> None:
    """When its budget is spent, the available ones cool, and the held ones when their leases end."""
    async with opened(**KEEPING) as engine:
        await seats(engine, 4, pace=Pace(2, 1000.0, 2))
        one, two = await held(engine, 2)
        assert sorted(await states(engine)) == sorted([State.BLOCKED] * 2 + [State.COOLING] * 2)
        assert await refused(engine.acquire("bob", 0)) is NoKeyAvailable
        stats = await engine.stats()
        assert (stats.paced, stats.cooled) == (1, 1)
        row = await engine.restore(SECRET, OPERATOR)
        assert (row.seats, await refused(engine.acquire("bob", 0))) == (4, NoKeyAvailable)
        assert (await engine.unblock(one.id, one.lease)).state is State.COOLING
        await engine.update(SECRET, KeyPatch(seats=5), OPERATOR)
        assert sorted(await states(engine)) == sorted([State.BLOCKED] + [State.COOLING] * 4)
        await engine.replace(SECRET, "sk-live-4712-abcd", OPERATOR)
        assert sorted(await states(engine)) == sorted([State.BLOCKED] + [State.AVAILABLE] * 4)
        assert (await engine.unblock(two.id, two.lease, uses=3)).state is State.COOLING
        assert await states(engine) == [State.COOLING] * 5


@on_loop
async def test_what_a_key_was_charged_is_what_its_seats_were(opened: Opener) -> None:
    """When it gets more of them while it is held; and a seat that goes takes nothing along."""
    async with opened(**KEEPING) as engine:
        await seats(engine, 1, pace=Pace(1, 1000.0))
        (lease,) = await held(engine, 1)
        await engine.update(SECRET, KeyPatch(seats=3), OPERATOR)
        assert await states(engine) == [State.BLOCKED, State.COOLING, State.COOLING]
        await engine.update(SECRET, KeyPatch(seats=2), OPERATOR)
        assert (await engine.unblock(lease.id, lease.lease)).state is State.COOLING
        await engine.restore(SECRET, OPERATOR)
        assert await states(engine) == [State.COOLING] * 2


@on_loop
async def test_all_seats_together_are_acquired_as_often_as_the_pace_allows(opened: Opener) -> None:
    """At most count + burst - 1 times in any `seconds`, by whom and in whatever order their leases end."""
    pace = Pace(4, 0.2, 2)
    async with opened(**KEEPING) as engine:
        await seats(engine, 3, pace=pace)
        moments, leases = list[tuple[float, float]](), list[Lease]()
        for _ in range(12):
            before = time.monotonic()
            leases.append(await engine.acquire("ann", 30))
            moments.append((before, time.monotonic()))
            if len(leases) == 2:
                lease = leases.pop(0)
                await engine.unblock(lease.id, lease.lease)
        most = pace.count + pace.burst - 1
        for (before, _), (_, after) in itertools.pairwise(moments[::most]):
            assert after - before >= pace.seconds - 0.01


@on_loop
async def test_the_history_is_that_of_a_seat(opened: Opener) -> None:
    """By its id or handle; by the text or name that of the first one. Owners have the leases of all."""
    async with opened(**KEEPING, history_leases=10) as engine:
        if isinstance(engine, ValkeyEngine):
            await engine.set_rules(engine.rules, 1)
        await seats(engine, 2, name="acct")
        one, two = await held(engine, 2)
        assert [(row.owner, row.held) for row in (await engine.owners(HolderQuery())).owners] == [("ann", 2)]
        assert len((await engine.page(ListQuery(owner="ann"))).keys) == 2
        for lease in (one, two):
            await engine.unblock(lease.id, lease.lease)
        for ref, ended in ((SECRET, one), (one.id, one), (two.id, two)):
            found = (await engine.history(ref, HistoryQuery())).history
            assert [row.lease for row in found] == [ended.lease]
