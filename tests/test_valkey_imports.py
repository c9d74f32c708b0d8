"""Keys from elsewhere over Valkey, where it is more than one process's matter: several partitions, several servers.

What every engine does with them: test_engine_imports.py. What no plain secret may be in: test_valkey_sealing.py.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from engine_support import quiet
from valkey_support import SECRETS, Place, check, engine_on, eventually, new_place, on_loop
from valkeys import new_pool, shared_cluster

from keypool.core.answers import EndedLease, KeyPatch, NewKey, Row
from keypool.core.cursor import ListQuery
from keypool.core.errors import (
    KeypoolError,
    NameTaken,
    NoKeyAvailable,
    PoolFull,
    SecretExists,
    StorageUnavailable,
    UnknownKey,
)
from keypool.core.events import By, Origin
from keypool.core.handles import Handle
from keypool.engine.valkey import details as valkey_details
from keypool.engine.valkey.calls import ScriptCall
from keypool.engine.valkey.engine import ValkeyEngine
from keypool.engine.valkey.scripts import keys_of

OPERATOR = Origin(By.OPERATOR, "ops")
FOREVER: dict[str, Any] = {"keepalive_seconds": None}
SEALED: dict[str, Any] = {"secrets": SECRETS, **FOREVER}


@pytest.fixture
def place() -> Place:
    """See Place."""
    return new_place()


def text_in(engine: ValkeyEngine, partition: int, start: str = "sk-live") -> str:
    """A text that belongs to a partition."""
    return next(text for n in range(10_000) if engine._partitions.of(text := f"{start}-{n:08}") == partition)


def home_of(engine: ValkeyEngine, id: int) -> int:
    """The partition of a key."""
    return (id - 1) % engine._partitions.count


def calls_of(engine: ValkeyEngine, patch: pytest.MonkeyPatch) -> list[str]:
    """The scripts that the engine calls from now on, but for polls."""
    called: list[str] = []
    call = engine._client.call

    def count(partition: int, script: str, *more: Any) -> ScriptCall:
        if script != "poll":
            called.append(script)
        return call(partition, script, *more)

    patch.setattr(engine._client, "call", count)
    patch.setattr(engine._partitions, "call", count)
    return called


async def _tried(call: Any) -> Any:
    try:
        return await call
    except KeypoolError as error:
        return type(error)


# ------------------------------------------------------------------------------------------------- one secret, one key


@on_loop
@pytest.mark.parametrize("partitions", [1, 8])
async def test_servers_that_import_the_same_secrets_at_once_make_one_key_of_each(
    place: Place, partitions: int
) -> None:
    """Each secret is created by one of them; the others get its id. No id is given twice."""
    items = [NewKey(f"sk-live-{number:04}", f"acct-{number}") for number in range(300)]
    async with (
        engine_on(place.url, partitions, **SEALED) as one,
        engine_on(place.url, partitions, **SEALED) as two,
        engine_on(place.url, partitions, **SEALED) as three,
    ):
        results = await asyncio.gather(
            *(engine.import_many(items, False, False, OPERATOR) for engine in (one, two, three)),
            *(engine.generate(50) for engine in (one, two, three)),
        )
        by_server = results[:3]
        for each in zip(*by_server, strict=True):
            assert Counter(result.status for result in each) == {"created": 1, "existed": 2}
            assert len({result.id for result in each}) == 1
        stats = await two.stats()
        assert (stats.total, stats.imported, stats.generated) == (450, 300, 150)
    check(place.valkey, place.pool, partitions)


@on_loop
async def test_a_single_import_is_one_call(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is that of a key that is there. With several partitions, a name costs locks and a look at all of them."""
    async with engine_on(place.url, 8, **SEALED) as engine:
        await engine.stats()  # from when on it knows that there is room
        called = calls_of(engine, monkeypatch)
        await engine.import_key(NewKey("sk-live-1"), False, OPERATOR)
        await engine.import_key(NewKey("sk-live-1"), False, OPERATOR)
        assert called == ["import", "import"]
        called.clear()
        await engine.import_key(NewKey("sk-live-2", "acct"), False, OPERATOR)
        assert Counter(called) == {"lock": 2, "known": 8, "import": 1}


@on_loop
async def test_a_large_import_is_made_in_chunks(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no script keeps a Valkey busy for long."""
    async with engine_on(place.url, 1, **SEALED) as engine:
        called = calls_of(engine, monkeypatch)
        items = [NewKey(f"sk-live-{number:04}") for number in range(1000)]
        results = await engine.import_many(items, False, False, OPERATOR)
        assert {result.status for result in results} == {"created"}
        assert Counter(called) == {"known": 5, "import": 5}


# ------------------------------------------------------------------------------------------------------ all or none


@on_loop
@pytest.mark.parametrize("partitions", [1, 16])
async def test_a_pool_is_filled_to_its_last_key_and_no_further(place: Place, partitions: int) -> None:
    """Though each partition has a share of less than one key: a text can't choose its partition."""
    async with engine_on(place.url, partitions, max_keys=10, **SEALED) as engine:
        for number in range(6):
            await engine.import_key(NewKey(f"sk-live-{number}"), False, OPERATOR)
        items = [NewKey(f"sk-live-{number}", f"n{number}") for number in range(4, 11)]
        with pytest.raises(PoolFull):
            await engine.import_many(items, False, False, OPERATOR)
        assert (await engine.stats()).total == 6
        results = await engine.import_many(items[:-1], False, False, OPERATOR)
        assert [result.status for result in results] == ["existed"] * 2 + ["created"] * 4
        for call in (engine.generate(1), engine.import_key(NewKey("one more"), False, OPERATOR)):
            with pytest.raises(PoolFull):
                await call
        assert (await engine.stats()).total == 10
        await engine.delete("sk-live-1", OPERATOR)
        await engine.import_key(NewKey("one more"), False, OPERATOR)
    check(place.valkey, place.pool, partitions)


@on_loop
@pytest.mark.parametrize("partitions", [1, 4])
async def test_servers_that_fill_a_pool_at_once_do_not_exceed_its_limit(
    place: Place, partitions: int
) -> None:
    """Each batch is added as a whole or not at all."""
    async with (
        engine_on(place.url, partitions, max_keys=100, **SEALED) as one,
        engine_on(place.url, partitions, max_keys=100, **SEALED) as two,
    ):
        batches = [[NewKey(f"sk-{batch}-{number}") for number in range(30)] for batch in range(6)]
        results = await asyncio.gather(
            *(
                _tried((one, two)[number % 2].import_many(batch, False, False, OPERATOR))
                for number, batch in enumerate(batches)
            )
        )
        made = [result for result in results if result is not PoolFull]
        assert len(made) == 3
        assert all({each.status for each in result} == {"created"} for result in made)
        assert (await one.stats()).total == 90
    check(place.valkey, place.pool, partitions)


# ------------------------------------------------------------------------------------------------------------- names


@on_loop
@pytest.mark.parametrize("partitions", [1, 8])
async def test_a_name_is_unique_in_the_pool_whichever_servers_give_it_at_once(
    place: Place, partitions: int
) -> None:
    """By an import, by a change, to keys of different partitions."""
    async with (
        engine_on(place.url, partitions, **SEALED) as one,
        engine_on(place.url, partitions, **SEALED) as two,
    ):
        made = await one.generate(12)
        results = await asyncio.gather(
            *(_tried(two.import_key(NewKey(f"sk-{n}", "acct"), False, OPERATOR)) for n in range(12)),
            *(_tried(one.update(key.key, KeyPatch("acct"), OPERATOR)) for key in made),
        )
        assert Counter(result is NameTaken for result in results) == {False: 1, True: 23}
        holder = await two.find("acct")
        assert [row.id for row in (await one.page(ListQuery(name="acct"))).keys] == [holder.id]
        await one.update(holder.id, KeyPatch("another"), OPERATOR)
        await two.update(made[0].key, KeyPatch("acct"), OPERATOR)
        await one.delete(made[0].key, OPERATOR)
        await two.update(made[1].key, KeyPatch("acct"), OPERATOR)
    check(place.valkey, place.pool, partitions)


@on_loop
async def test_a_name_that_a_dead_server_had_locked_is_free_again_soon(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock lapses, and until then others wait; nobody gives a name after its lock has lapsed."""
    async with engine_on(place.url, 4, **SEALED) as engine:
        home = engine._partitions.of("acct")
        lock = keys_of(place.pool, home, 4)[0].removesuffix("meta") + "lock:name acct"
        place.valkey.ask("SET", lock, "a dead server", "PX", 300)
        made = await engine.import_key(NewKey("sk-live-1", "acct"), False, OPERATOR)
        assert (await engine.find("acct")).id == made.id
        assert not place.valkey.ask("EXISTS", lock)
        # As if the call had been held up for longer than the lock lasts.
        monkeypatch.setattr(valkey_details, "LOCKED_US", -1)
        with pytest.raises(StorageUnavailable):
            await engine.import_key(NewKey("sk-live-2", "acct-2"), False, OPERATOR)
        with pytest.raises(UnknownKey):
            await engine.find("acct-2")
        monkeypatch.setattr(valkey_details, "_MOST_TRIES", 2)
        place.valkey.ask("SET", lock, "a busy server")
        with pytest.raises(StorageUnavailable, match="another server"):
            await engine.import_key(NewKey("sk-live-3", "acct"), False, OPERATOR)


# ----------------------------------------------------------------------------------------------- texts over partitions


@on_loop
async def test_a_replaced_key_stays_where_its_id_is(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its new text may belong to another partition: an acquire is one call all the same, and so is each by id or
    handle; one by text is found by way of an alias.
    """
    async with engine_on(place.url, 5, **SEALED) as engine:
        await engine.stats()
        first = text_in(engine, 0)
        made = await engine.import_key(NewKey(first, "acct", None, b'{"p":1}'), False, OPERATOR)
        assert home_of(engine, made.id) == 0
        for partition in (1, 2, 0, 3):
            text = text_in(engine, partition, f"sk-next-{partition}")
            row = await engine.replace(made.id, text, OPERATOR)
            assert (row.id, row.name, row.hint) == (made.id, "acct", f"sk-n…{text[-4:]}")
            await engine.stats()
            called = calls_of(engine, monkeypatch)
            lease = await engine.acquire("ann", 0)
            assert (lease.id, lease.key, bytes(lease.data or b"")) == (made.id, text, b'{"p":1}')
            assert called == ["acquire"]
            await engine.keepalive(Handle(lease.id, lease.lease))
            assert called == ["acquire", "keepalive"]
            assert (await engine.get(text)).id == made.id
            assert await engine.keepalive_many([text, "unknown", made.id]) == ["done", "unknown", "done"]
            assert (await engine.import_key(NewKey(text), False, OPERATOR)).existed
            assert (await engine.unblock(text, lease.lease)).changed
            with pytest.raises(UnknownKey):
                await engine.get(first)
            first = text
            monkeypatch.undo()
        await engine.delete(first, OPERATOR)
        assert not (
            await engine.import_key(NewKey(first), False, OPERATOR)
        ).existed  # the alias leads nowhere
        assert (await engine.get(first)).id != made.id
    check(place.valkey, place.pool, 5)


@on_loop
async def test_the_old_text_of_a_lease_is_good_until_it_ends_wherever_it_belongs(place: Place) -> None:
    """Also if the lease outlives two replacements, of which the first was into another partition."""
    async with engine_on(place.url, 5, **SEALED) as engine:
        old, between, new = (text_in(engine, partition, f"sk-{partition}") for partition in (1, 2, 3))
        made = await engine.import_key(NewKey("sk-first"), False, OPERATOR)
        await engine.replace(made.id, old, OPERATOR)
        lease = await engine.acquire("ann", 0)
        assert lease.key == old
        await engine.replace(made.id, between, OPERATOR)
        await engine.replace(made.id, new, OPERATOR)
        assert {(await engine.get(text)).id for text in (old, new, made.id)} == {made.id}
        with pytest.raises(UnknownKey):
            await engine.get(between)
        assert (await engine.unblock(old, lease.lease)).changed
        for gone in (old, between, "sk-first"):
            with pytest.raises(UnknownKey):
                await engine.get(gone)
        for again in (old, between):
            assert not (await engine.import_key(NewKey(again), False, OPERATOR)).existed
    check(place.valkey, place.pool, 5)


@on_loop
async def test_a_text_that_a_key_of_another_partition_gets_names_no_more_who_was_leased_under_it(
    place: Place,
) -> None:
    """The new key has it for all calls from then on, so that no third key may get it."""
    async with engine_on(place.url, 5, **SEALED) as engine:
        text = text_in(engine, 1)
        before = await engine.import_key(NewKey(text), False, OPERATOR)
        await engine.acquire("ann", 0)
        await engine.replace(before.id, text_in(engine, 1, "sk-next"), OPERATOR)
        assert (await engine.get(text)).id == before.id  # by the text that its holder has
        after, third = [
            await engine.import_key(NewKey(text_in(engine, n, "sk-more")), False, OPERATOR) for n in (2, 3)
        ]
        await engine.replace(after.id, text, OPERATOR)
        assert (await engine.get(text)).id == after.id
        with pytest.raises(SecretExists):
            await engine.replace(third.id, text, OPERATOR)
        assert (await engine.import_key(NewKey(text), False, OPERATOR)).existed
    check(place.valkey, place.pool, 5)


@on_loop
@pytest.mark.parametrize("partitions", [1, 5])
async def test_a_text_is_given_to_one_key_whichever_servers_give_it_at_once(
    place: Place, partitions: int
) -> None:
    """By replacements of keys in several partitions, and by an import."""
    async with (
        engine_on(place.url, partitions, **SEALED) as one,
        engine_on(place.url, partitions, **SEALED) as two,
    ):
        made = await one.generate(10)
        for number in range(10):
            text = f"sk-wanted-{number}"
            results = await asyncio.gather(
                *(_tried((one, two)[n % 2].replace(key.id, text, OPERATOR)) for n, key in enumerate(made)),
                _tried(one.import_key(NewKey(text), False, OPERATOR)),
            )
            winners = [row for row in results[:-1] if row is not SecretExists]
            imported = results[-1]
            assert len(winners) == imported.existed
            if winners:
                assert imported.id == winners[0].id
            assert (await two.get(text)).id == imported.id
            assert (await two.reveal(imported.id, OPERATOR)).key == text
    check(place.valkey, place.pool, partitions)


@on_loop
async def test_an_alias_that_a_dead_server_left_leads_nowhere(place: Place) -> None:
    """It died between alias and replacement: the text is still unknown, and free for an import or another key."""
    async with engine_on(place.url, 4, **SEALED) as engine:
        made = await engine.import_key(NewKey(text_in(engine, 0)), False, OPERATOR)
        vault = engine._partitions.vault
        assert vault is not None
        for partition in (1, 2):
            text = text_in(engine, partition, "sk-left")
            await engine._client.call(partition, "alias", (0, vault.member(text)))
            with pytest.raises(UnknownKey):
                await engine.keepalive(text)
        other = await engine.import_key(NewKey(text_in(engine, 1, "sk-left")), False, OPERATOR)
        assert not other.existed
        await engine.replace(made.id, text_in(engine, 2, "sk-left"), OPERATOR)
        assert (await engine.get(text_in(engine, 2, "sk-left"))).id == made.id
    check(place.valkey, place.pool, 4)


# ----------------------------------------------------------------------------------------------- Valkey and its memory


@on_loop
async def test_a_key_whose_record_valkey_evicted_is_purged(place: Place) -> None:
    """As one in clear is: nothing shows it, and its name and text are free again."""
    async with engine_on(place.url, 1, **SEALED) as engine:
        items = [NewKey(f"sk-live-{number:04}", f"n{number}") for number in range(3)]
        await engine.import_many(items, False, False, OPERATOR)
        place.valkey.ask("DEL", keys_of(place.pool, 0, 1)[1])
        assert not (await engine.page(ListQuery(name="n"))).keys
        for item in items:
            with pytest.raises(UnknownKey):
                await engine.find(item.name or "")
        with pytest.raises(NoKeyAvailable):
            await engine.acquire(None, 0)
        await eventually(_is_empty(engine), "all are purged")
        results = await engine.import_many(items, False, False, OPERATOR)
        assert [result.status for result in results] == ["created"] * 3


def _is_empty(engine: ValkeyEngine) -> Any:
    async def empty() -> bool:
        return (await engine.stats()).total == 0

    return empty


# ------------------------------------------------------------------------------------------------------- in a cluster


@pytest.mark.thorough
def test_imported_keys_in_a_cluster() -> None:
    """Partitions on three nodes: import with names, replacement, lists by name, search, delete."""

    async def main() -> None:
        url = new_pool(shared_cluster())
        async with engine_on(url, 6, **SEALED) as one, engine_on(url, 6, **SEALED) as two:
            items = [NewKey(f"sk-live-{number:04}", f"n{number:03}") for number in range(200)]
            results = await one.import_many(items, False, False, OPERATOR)
            assert {result.status for result in results} == {"created"}
            rows: list[Row] = []
            after = None
            while rows == [] or after is not None:
                page = await two.page(ListQuery(name="n", limit=70, after=after))
                rows += page.keys
                after = page.next
            assert [row.name for row in rows] == [item.name for item in items]
            for number, row in enumerate(rows[:20]):
                await two.replace(row.id, f"sk-live-next-{number:04}", OPERATOR)
                assert (await one.find(f"sk-live-next-{number:04}")).id == row.id
                assert (await one.find(f"n{number:03}")).hint == f"sk-l…{number:04}"
            leases = await two.acquire_many("ann", 200)
            assert len(leases) == 200
            assert set(await one.keepalive_many([lease.key for lease in leases])) == {"done"}
            deleted = await one.delete_many([lease.key for lease in leases], OPERATOR)
            assert not [each for each in deleted if isinstance(each, str)]

    with quiet():
        asyncio.run(main())


@on_loop
async def test_a_secret_that_looks_like_a_hint_is_no_hint(place: Place) -> None:
    """What is reported of a lease that ended without its number, for the audit log, shows four and four characters."""
    secret = "sk-live-\N{HORIZONTAL ELLIPSIS}-0123456789abcdef"
    async with engine_on(place.url, 1, **SEALED) as engine:
        await engine.import_key(NewKey(secret), False, OPERATOR)
        await engine.acquire(None, 0)
        ended: list[EndedLease] = []
        await engine.unblock(secret, None, ended)
        assert [lease.hint for lease in ended] == ["sk-l\N{HORIZONTAL ELLIPSIS}cdef"]


@on_loop
async def test_room_that_others_took_meanwhile_is_found_elsewhere(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There seemed to be ample room, so none was reserved; partitions that are full by now refuse their keys."""
    async with engine_on(place.url, 4, **SEALED, max_keys=40) as engine:
        items = [NewKey(text_in(engine, 0, f"sk-{number}")) for number in range(40)]
        monkeypatch.setattr(engine._generator, "has_ample_room", lambda wanted: True)
        results = await engine.import_many(items, False, False, OPERATOR)
        assert [result.status for result in results] == ["created"] * 40
        with pytest.raises(PoolFull):
            await engine.import_key(NewKey("sk-live-too-many"), False, OPERATOR)


@on_loop
async def test_a_batch_that_updates_looks_each_secret_up_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However known and new ones alternate; each item is what a batch of its own would have made of it."""
    async with engine_on(place.url, 1, **SEALED) as engine:
        items = [NewKey(f"sk-live-{number:04}", name=f"n{number}") for number in range(60)]
        await engine.import_many(items[::2], False, False, OPERATOR)
        called = calls_of(engine, monkeypatch)
        results = await engine.import_many(items, True, False, OPERATOR)
        assert [result.status for result in results] == ["updated", "created"] * 30
        assert called.count("known") == 1
