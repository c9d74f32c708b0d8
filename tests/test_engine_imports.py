"""An engine's calls about keys from elsewhere: import, names and data, replacement, look-up, keys that never expire.

All but the last section is what every engine does, and runs on each of `OPENERS`; nothing in it depends on time.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import pytest
from engine_support import BLOCK, Call, Held, Opener, embedded, now, on_loop, turns, turns_until
from valkey_support import sealed_on_valkey

from keypool.core.answers import Imported, KeyPatch, NewKey, Unblock, Written
from keypool.core.cursor import ListQuery
from keypool.core.errors import (
    KeypoolError,
    KeysWouldExpire,
    NameTaken,
    PoolDraining,
    PoolFull,
    SecretExists,
    StaleLease,
    UnknownKey,
)
from keypool.core.events import HOLDER, By, Origin
from keypool.core.handles import Handle
from keypool.core.keys import State
from keypool.core.outcomes import Outcome, Report
from keypool.engine import Client, Engine
from keypool.engine.journal import Commit, NullJournal

OPERATOR = Origin(By.OPERATOR, "ops")
OPENERS: dict[str, Opener] = {
    "embedded": embedded,
    "valkey": functools.partial(sealed_on_valkey, 1),
    "partitions": functools.partial(sealed_on_valkey, 16),
}
KEEPING: dict[str, Any] = {"keepalive_seconds": None}


@pytest.fixture(params=list(OPENERS.values()), ids=list(OPENERS))
def opened(request: pytest.FixtureRequest) -> Opener:
    """Opens an engine of each kind."""
    opener: Opener = request.param
    return opener


async def imported(engine: Engine, *secrets: str) -> list[int]:
    """The ids of new keys."""
    items = [NewKey(secret) for secret in secrets]
    results = await engine.import_many(items, update=False, expire=True, origin=OPERATOR)
    assert {result.status for result in results} == {"created"}
    return [result.id or 0 for result in results]


async def refused(call: Any) -> type[KeypoolError]:
    """The class of the error of a call."""
    with pytest.raises(KeypoolError) as error:
        await call
    return error.type


# ------------------------------------------------------------------------------------------------------ import


@on_loop
async def test_an_imported_key_is_served_with_its_name_and_data(opened: Opener) -> None:
    """The row shows name and labels, and never the data; reveal shows it."""
    item = NewKey("sk-live-4711-abcd", "acct-17", {"region": "eu"}, b'{"user":"x","n":[1,2]}')
    async with opened(**KEEPING) as engine:
        made = await engine.import_key(item, False, OPERATOR)
        assert (made.state, made.hint, made.name) == (State.AVAILABLE, "sk-l…abcd", "acct-17")
        assert (made.expires_in, made.existed) == (None, False)
        lease = await engine.acquire("ann", 0)
        assert (lease.id, lease.key, lease.name, lease.expires_in) == (made.id, item.secret, "acct-17", None)
        assert lease.data is not None
        assert bytes(lease.data) == item.data
        row = await engine.get(item.secret)
        assert (row.name, row.labels, row.hint, row.expires_in) == (
            "acct-17",
            {"region": "eu"},
            made.hint,
            None,
        )
        revealed = await engine.reveal(made.id, OPERATOR)
        assert (revealed.key, revealed.name, bytes(revealed.data or b"")) == (
            item.secret,
            "acct-17",
            item.data,
        )
        stats = await engine.stats()
        assert (stats.imported, stats.generated, stats.total) == (1, 0, 1)
        assert engine.recent(10)[0].event == "imported"
        assert engine.recent(10)[0].actor == "ops"


@on_loop
async def test_the_same_secret_is_the_same_key(opened: Opener) -> None:
    """A repeat changes nothing, whatever else it says, and whatever state the key is in."""
    async with opened(**KEEPING) as engine:
        made = await engine.import_key(NewKey("secret", "acct"), False, OPERATOR)
        await engine.acquire("ann", 0)
        again = await engine.import_key(NewKey("secret", "another"), False, OPERATOR)
        assert (again.id, again.existed, again.name, again.state) == (made.id, True, "acct", State.BLOCKED)
        (generated,) = await engine.generate(1)
        assert (await engine.import_key(NewKey(generated.key), False, OPERATOR)).id == generated.id
        assert (await engine.stats()).imported == 1


@on_loop
async def test_an_import_that_is_refused_changes_nothing(opened: Opener) -> None:
    """For a pool that purges, a name that is taken, a pool that is full."""
    async with opened(max_keys=2) as engine:
        assert await refused(engine.import_key(NewKey("one"), False, OPERATOR)) is KeysWouldExpire
        made = await engine.import_key(NewKey("one", "acct"), True, OPERATOR)
        assert made.expires_in == pytest.approx(300, abs=5)
        assert await refused(engine.import_key(NewKey("two", "acct"), True, OPERATOR)) is NameTaken
        await engine.import_key(NewKey("two"), True, OPERATOR)
        assert await refused(engine.import_key(NewKey("three"), True, OPERATOR)) is PoolFull
        assert (await engine.import_key(NewKey("two"), True, OPERATOR)).existed
        stats = await engine.stats()
        assert (stats.total, stats.imported) == (2, 2)
        assert await refused(engine.get("three")) is UnknownKey


@on_loop
async def test_a_batch_is_taken_item_by_item_in_order(opened: Opener) -> None:
    """Each with its result; one that failed before it came here keeps its place."""
    async with opened(**KEEPING) as engine:
        await engine.import_key(NewKey("known", "first"), False, OPERATOR)
        failed = Imported("failed", code="bad-request", detail="too long")
        items: list[NewKey | Imported] = [
            NewKey("one", "acct-1"),
            failed,
            NewKey("one", "acct-2"),
            NewKey("two", "acct-1"),
            NewKey("two"),
            NewKey("known", "second"),
        ]
        results = await engine.import_many(items, update=False, expire=False, origin=OPERATOR)
        assert [result.status for result in results] == [
            "created", "failed", "duplicate", "failed", "created", "existed",
        ]  # fmt: skip
        assert results[1] is failed
        assert (results[2].id, results[3].code) == (results[0].id, "name-taken")
        assert f"id:{results[0].id} " in (results[3].detail or "")
        assert (await engine.get("known")).name == "first"
        assert (await engine.stats()).imported == 3


@on_loop
async def test_a_batch_may_update_what_exists(opened: Opener) -> None:
    """Names, labels and data that an item gives; a name that another key has fails the item alone."""
    async with opened(**KEEPING) as engine:
        await engine.import_key(NewKey("one", "acct-1", {"a": "b"}), False, OPERATOR)
        await engine.import_key(NewKey("two", "acct-2"), False, OPERATOR)
        items = [NewKey("one", "acct-9"), NewKey("two", "acct-9"), NewKey("three", "acct-1")]
        results = await engine.import_many(items, update=True, expire=False, origin=OPERATOR)
        assert [result.status for result in results] == ["updated", "failed", "created"]
        row = await engine.get("one")
        assert (row.name, row.labels) == ("acct-9", {"a": "b"})
        assert (await engine.get("two")).name == "acct-2"


@on_loop
async def test_a_batch_takes_all_or_none_if_the_pool_gets_full(opened: Opener) -> None:
    """What exists, and what stands twice, needs no room."""
    async with opened(max_keys=3, **KEEPING) as engine:
        await imported(engine, "known")
        full = engine.import_many([NewKey(name) for name in ("a", "b", "c")], False, False, OPERATOR)
        assert await refused(full) is PoolFull
        assert (await engine.stats()).total == 1
        fitting = [NewKey(name) for name in ("a", "known", "a", "b")]
        results = await engine.import_many(fitting, False, False, OPERATOR)
        assert [result.status for result in results] == ["created", "existed", "duplicate", "created"]
        assert await refused(engine.generate(1)) is PoolFull


@on_loop
async def test_a_waiter_gets_an_imported_key(opened: Opener) -> None:
    """From a single import and from a batch."""
    async with opened(**KEEPING) as engine:
        waiters = [asyncio.create_task(engine.acquire(str(number), 30)) for number in range(3)]
        await turns()
        await engine.import_key(NewKey("one"), False, OPERATOR)
        await imported(engine, "two", "three")
        leases = await asyncio.gather(*waiters)
        assert {lease.key for lease in leases} == {"one", "two", "three"}


# ------------------------------------------------------------------------------------------------------ update


@on_loop
async def test_an_update_changes_what_it_gives_and_removes_what_is_empty(opened: Opener) -> None:
    """A generated key may have a name too."""
    async with opened() as engine:
        (key,) = await engine.generate(1)
        row = await engine.update(key.key, KeyPatch("acct", {"a": "b"}, b'{"user":"x"}'), OPERATOR)
        assert (row.id, row.name, row.labels) == (key.id, "acct", {"a": "b"})
        row = await engine.update(key.id, KeyPatch(labels={}, data=b"{}"), OPERATOR)
        assert (row.name, row.labels) == ("acct", {})
        lease = await engine.acquire(None, 0)
        assert (lease.name, lease.data) == ("acct", None)
        row = await engine.update(Handle(lease.id, lease.lease), KeyPatch(name=""), OPERATOR)
        assert (row.name, row.state) == (None, State.BLOCKED)


@on_loop
async def test_no_two_keys_have_one_name(opened: Opener) -> None:
    """Until the name is given up or its key is gone."""
    async with opened() as engine:
        one, two = [key.id for key in await engine.generate(2)]
        await engine.update(one, KeyPatch("acct"), OPERATOR)
        assert await refused(engine.update(two, KeyPatch("acct"), OPERATOR)) is NameTaken
        await engine.update(one, KeyPatch("other"), OPERATOR)
        await engine.update(two, KeyPatch("acct"), OPERATOR)
        await engine.delete(two, OPERATOR)
        assert (await engine.update(one, KeyPatch("acct"), OPERATOR)).name == "acct"
        assert await refused(engine.update(two, KeyPatch("x"), OPERATOR)) is UnknownKey


# ----------------------------------------------------------------------------------------------------- replace


@on_loop
async def test_a_replaced_key_keeps_its_id_and_name_and_forgets_its_failures(opened: Opener) -> None:
    """A cooldown is over, and a waiter gets the key with the new text."""
    async with opened(**KEEPING) as engine:
        made = await engine.import_key(NewKey("old-secret", "acct"), False, OPERATOR)
        lease = await engine.acquire(None, 0)
        limited = Report(Outcome.RATE_LIMITED, 30.0, "429")
        await engine.unblock("old-secret", lease.lease, None, limited)
        waiter = asyncio.create_task(engine.acquire("ann", 30))
        await turns()
        row = await engine.replace("old-secret", "new-secret", OPERATOR)
        assert (row.id, row.name, row.hint) == (made.id, "acct", "ne…et")
        assert (row.failures, row.outcome, row.available_in) == (0, None, None)
        assert (await waiter).key == "new-secret"
        assert await refused(engine.get("old-secret")) is UnknownKey
        await engine.stats()  # with which an engine over Valkey learns of events
        assert engine.recent(2)[0].event == "restored"


@on_loop
async def test_its_holder_may_go_on_with_the_old_text_lease_or_handle(opened: Opener) -> None:
    """Until the lease ends; then the old text is unknown, and may be imported."""
    async with opened(**KEEPING) as engine:
        (id,) = await imported(engine, "old")
        lease = await engine.acquire("ann", 0)
        row = await engine.replace(id, "new", OPERATOR)
        assert (row.state, row.lease, row.owner) == (State.BLOCKED, lease.lease, "ann")
        for ref in ("old", "new", Handle(id, lease.lease)):
            assert (await engine.keepalive(ref)).id == id
        await engine.unblock("old", lease.lease)
        assert await refused(engine.keepalive("old")) is UnknownKey
        assert await refused(engine.unblock("old", lease.lease)) is UnknownKey
        assert (await engine.unblock("new", lease.lease)).changed is False
        assert await imported(engine, "old") != [id]


@on_loop
@pytest.mark.parametrize("seats", [1, 2])
async def test_a_key_that_gets_its_leased_text_back_is_named_by_no_text_between(
    opened: Opener, seats: int
) -> None:
    """The text between is free again, whether or not a lease began under the first one."""
    async with opened(**KEEPING) as engine:
        made = await engine.import_key(NewKey("first", seats=seats), False, OPERATOR)
        lease = await engine.acquire("ann", 0)
        for text in ("between", "first"):
            await engine.replace(made.id, text, OPERATOR)
        assert await refused(engine.get("between")) is UnknownKey
        assert not (await engine.import_key(NewKey("between"), False, OPERATOR)).existed
        assert (await engine.unblock("first", lease.lease)).changed


@on_loop
async def test_another_keys_text_is_no_replacement(opened: Opener) -> None:
    """Nothing has changed."""
    async with opened(**KEEPING) as engine:
        one, _ = await imported(engine, "one", "two")
        assert await refused(engine.replace(one, "two", OPERATOR)) is SecretExists
        assert await refused(engine.replace("three", "four", OPERATOR)) is UnknownKey
        assert (await engine.get("one")).id == one


# -------------------------------------------------------------------------------------------------------- find


@on_loop
async def test_a_key_is_found_by_text_id_name_or_hint_in_this_order(opened: Opener) -> None:
    """A text that looks like an id or a hint is a text first."""
    async with opened(**KEEPING) as engine:
        ids = await imported(engine, "sk-live-one-abcd", "sk-live-two-abcd", "id:1", "sk-l…abcd")
        await engine.update(ids[1], KeyPatch(name="acct"), OPERATOR)
        await engine.update(ids[2], KeyPatch(name="sk-live-one-abcd"), OPERATOR)
        for text, id in {
            "sk-live-two-abcd": ids[1],
            "sk-live-one-abcd": ids[0],
            "id:1": ids[2],
            f"id:{ids[1]}": ids[1],
            "acct": ids[1],
            "sk-l…abcd": ids[3],
        }.items():
            assert (await engine.find(text)).id == id, text
        await engine.delete(ids[3], OPERATOR)
        assert (await engine.find("sk-l…abcd")).id == ids[0]
        (key,) = await engine.generate(1)
        assert (await engine.find(f"{key.key[:4]}…{key.key[-4:]}")).id == key.id
        for text in ("sk-live", "id:99", "id:x", "acc", "zz…zz", "", "…x"):
            assert await refused(engine.find(text)) is UnknownKey


@on_loop
async def test_in_a_body_an_exact_text_comes_first(opened: Opener) -> None:
    """Then what else it may be: an id, or the handle of a lease."""
    async with opened(**KEEPING) as engine:
        one, two = await imported(engine, "id:2", "other")
        assert (await engine.get(Written("id:2", two))).id == one
        assert (await engine.get(Written(f"id:{one}", one))).id == one
        lease = await engine.acquire(None, 0)
        handle = Handle(lease.id, lease.lease)
        assert (await engine.get(Written(lease.handle, handle))).id == lease.id
        assert await engine.unblock_many([Unblock(Written(lease.handle, handle))]) == ["done"]
        while (await engine.acquire(None, 0)).id != lease.id:
            pass
        assert await refused(engine.get(Written(lease.handle, handle))) is StaleLease
        assert await refused(engine.get(Written("id:9", 9999))) is UnknownKey
        assert await engine.keepalive_many([Written(lease.handle, handle), Written("id:9", 9999)]) == [
            "stale",
            "unknown",
        ]


@on_loop
async def test_a_list_by_name_is_in_order_of_name(opened: Opener) -> None:
    """Page by page, of a state if wanted; others are not in it, and lists by prefix have generated keys only."""
    async with opened(**KEEPING) as engine:
        names = ["acct-b", "acct-a", "acct-é", "acct-10", "acct-9", "other", "acct-A"]
        for number, name in enumerate(names):
            await engine.import_key(NewKey(f"sk-live-{number}", name), False, OPERATOR)
        await imported(engine, "without a name")
        listed: list[str | None] = []
        query = ListQuery(name="acct", limit=2)
        while True:
            page = await engine.page(query)
            listed += [row.name for row in page.keys]
            if page.next is None:
                break
            query = ListQuery(name="acct", limit=2, after=page.next)
        assert listed == sorted(name for name in names if name.startswith("acct"))
        assert (await engine.page(ListQuery(name="acct", state="blocked"))).keys == []
        assert (await engine.page(ListQuery(prefix="sk"))).keys == []


# ------------------------------------------------------------------------------------------------ never expiring


@on_loop
async def test_keys_of_a_pool_that_keeps_them_have_no_end(opened: Opener) -> None:
    """`expires_in` is null wherever it stands; a keepalive is answered all the same."""
    async with opened(**KEEPING) as engine:
        (key,) = await engine.generate(1)
        assert key.expires_in is None
        assert (await engine.acquire(None, 0)).expires_in is None
        assert (await engine.keepalive(key.key)).expires_in is None
        assert await engine.keepalive_many([key.key]) == ["done"]
        assert (await engine.get(key.id)).expires_in is None
        assert (await engine.page(ListQuery())).keys[0].expires_in is None
        assert (await engine.page(ListQuery(order="expiry"))).keys == []
        assert await engine.expiring(1e6) == 0


# ------------------------------------------------------------------------------------------------------- clients


@on_loop
async def test_a_row_names_the_client_that_holds_the_key(opened: Opener) -> None:
    """As long as it does; callers without a token of their own have no name."""
    async with opened() as engine:
        await engine.generate(3)
        lease = await engine.acquire("ann", 0, client=Client("worker"))
        (other,) = await engine.acquire_many("bob", 1, client=Client("crawler"))
        nobodys = await engine.acquire(None, 0)
        rows = [await engine.get(each.id) for each in (lease, other, nobodys)]
        assert [row.client for row in rows] == ["worker", "crawler", None]
        await engine.unblock(lease.key, lease.lease)
        assert (await engine.get(lease.id)).client is None


# ------------------------------------------------------------------------------------- the embedded engine alone


class SlowDisk(NullJournal):
    """Keeps changes when the test says so."""

    def __init__(self) -> None:
        self.commit = Commit(asyncio.get_running_loop())

    def commit_of_all(self) -> Any:
        """Not on disk yet."""
        return None if self.commit.done() else self.commit

    def commit_of(self, id: int) -> Any:
        """Not on disk yet."""
        return self.commit_of_all()


@on_loop
async def test_no_answer_about_a_key_comes_before_the_disk() -> None:
    """Neither that it exists, nor that a name is taken or a text unknown since it was replaced."""
    held = Held(**KEEPING)
    engine = held.engine
    made = await now(engine.import_key(NewKey("old", "acct"), False, OPERATOR))
    await now(engine.import_key(NewKey("other"), False, OPERATOR))
    engine.journal = disk = SlowDisk()
    calls: list[Call[Any]] = [
        Call(engine.replace(made.id, "new", OPERATOR)),
        Call(engine.get("old")),
        Call(engine.import_key(NewKey("new"), False, OPERATOR)),
        Call(engine.import_key(NewKey("third", "acct"), False, OPERATOR)),
        Call(engine.import_many([NewKey("fourth")], False, False, OPERATOR)),
        Call(engine.update("other", KeyPatch("acct"), OPERATOR)),
        Call(engine.replace("other", "new", OPERATOR)),
        Call(engine.find("acct")),
        Call(engine.find("nobody")),
        Call(engine.get(Written("nobody", 99))),
    ]
    assert not any(call.over for call in calls)
    disk.commit.finish()
    assert all(call.over for call in calls)
    assert calls[2].answer.existed
    for number, error in {1: UnknownKey, 3: NameTaken, 5: NameTaken, 6: SecretExists, 8: UnknownKey}.items():
        with pytest.raises(error):
            assert calls[number].answer
    await held.check()


@on_loop
async def test_an_old_text_is_unknown_for_good_only_when_the_end_of_its_lease_is_on_disk() -> None:
    """Else a crash could bring back what was said to be unknown."""
    held = Held(**KEEPING)
    engine = held.engine
    await now(engine.import_key(NewKey("old"), False, OPERATOR))
    await now(engine.acquire("ann", 0))
    await now(engine.replace("old", "new", OPERATOR))
    engine.journal = disk = SlowDisk()
    held.clock.on(BLOCK)
    call = Call(engine.get("old"))
    assert not call.over
    disk.commit.finish()
    with pytest.raises(UnknownKey):
        _ = call.answer


@on_loop
async def test_others_are_served_while_a_batch_runs_and_get_none_of_its_room() -> None:
    """It takes its room before it begins."""
    async with embedded(max_keys=1001, **KEEPING) as engine:
        (key,) = await engine.generate(1)
        items = [NewKey(f"sk-live-{number}") for number in range(1000)]
        batch = asyncio.create_task(engine.import_many(items, False, False, OPERATOR))
        seq = engine.event_seq
        await turns_until(lambda: engine.event_seq > seq, "the batch has begun")
        assert await refused(engine.generate(1)) is PoolFull
        assert await refused(engine.import_key(NewKey("another"), False, OPERATOR)) is PoolFull
        assert (await engine.keepalive(key.key)).id == key.id
        assert not batch.done()
        assert {result.status for result in await batch} == {"created"}
        assert (await engine.stats()).total == 1001


@on_loop
async def test_a_batch_whose_items_fail_gives_its_room_back() -> None:
    """All of what it took."""
    async with embedded(max_keys=3, **KEEPING) as engine:
        await engine.import_key(NewKey("one", "acct"), False, OPERATOR)
        items = [NewKey("two", "acct"), NewKey("three", "acct")]
        results = await engine.import_many(items, False, False, OPERATOR)
        assert [result.code for result in results] == ["name-taken"] * 2
        assert len(await engine.generate(2)) == 2


@on_loop
async def test_a_pool_that_is_being_emptied_takes_no_key() -> None:
    """But changes those it has."""
    held = Held(**KEEPING)
    made = await now(held.engine.import_key(NewKey("one"), False, OPERATOR))
    held.engine.drain_pool()
    for call in (
        held.engine.import_key(NewKey("two"), False, OPERATOR),
        held.engine.import_many([NewKey("two")], False, False, OPERATOR),
    ):
        assert await refused(call) is PoolDraining
    assert (await now(held.engine.update(made.id, KeyPatch("acct"), HOLDER))).name == "acct"
    assert (await now(held.engine.replace("one", "two", HOLDER))).id == made.id


@on_loop
async def test_changed_rules_hold_from_then_on() -> None:
    """Blocks, lives and the length of new keys; `rules` shows them."""
    held = Held()
    await now(held.engine.generate(2))
    held.engine.set_rules(held.engine.rules.of_pool({"block_seconds": 5.0, "keepalive_seconds": None}))
    lease = await now(held.engine.acquire(None, 0))
    assert (lease.release_in, lease.expires_in) == (5.0, 300.0)
    assert (await now(held.engine.keepalive(lease.key))).expires_in is None
    assert held.engine.rules.block_seconds == 5.0
    await held.check()
