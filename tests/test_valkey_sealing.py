"""Secrets over Valkey: what it holds and logs has none of them in clear, whatever happens to a key.

Keys that were in clear are found, and sealed as they are served or by a rekey, which goes on where it was interrupted.
A secrets key that doesn't fit stops a server before it has changed anything.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from valkey_support import SECRETS, Place, check, engine_on, eventually, new_place, on_loop, pools_on
from valkeys import Valkey, new_pool

from keypool.core.answers import KeyPatch, NewKey, Rekeying
from keypool.core.cursor import ListQuery
from keypool.core.errors import SecretsKeyRequired, StartError, UnknownKey
from keypool.core.events import HOLDER, By, Origin
from keypool.engine.sealing import Sealer
from keypool.engine.valkey import rekeying
from keypool.engine.valkey.engine import ValkeyEngine
from keypool.engine.valkey.pools import ValkeyPools
from keypool.engine.valkey.scripts import keys_of

OPERATOR = Origin(By.OPERATOR, "ops")
OTHER = bytes(range(100, 132))
FOREVER: dict[str, Any] = {"keepalive_seconds": None}


@pytest.fixture
def place() -> Place:
    """See Place."""
    return new_place()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Place]:
    """A place in a Valkey that nobody else uses, which logs every command and writes its file to `tmp_path`."""
    with Valkey(
        "--slowlog-log-slower-than", "0", "--slowlog-max-len", "100000", "--dir", str(tmp_path)
    ) as valkey:
        url = new_pool(valkey)
        yield Place(valkey, url.partition("pool=")[2], url)


def everything(valkey: Valkey, folder: Path) -> bytes:
    """All that a Valkey holds: each key as DUMP has it, its slow log, and the file that it saves."""
    with valkey.commands() as commands:
        parts = [repr(commands.ask("SLOWLOG", "GET", -1)).encode()]
        parts += [part for entry in commands.ask("SLOWLOG", "GET", -1) for part in entry[3]]
        cursor = b"0"
        while True:
            cursor, keys = commands.ask("SCAN", cursor.decode(), "COUNT", 1000)
            parts += keys
            parts += [commands.ask_bytes("DUMP", key) for key in keys]
            if cursor == b"0":
                break
        commands.ask("CONFIG", "SET", "rdbcompression", "no")
        commands.ask("SAVE")
    return b"\0".join([*parts, (folder / "dump.rdb").read_bytes()])


async def in_clear(place: Place, partitions: int, count: int = 30) -> list[str]:
    """Texts of keys that a server without a secrets key made. One is held, one has a name and data."""
    async with engine_on(place.url, partitions, **FOREVER) as engine:
        texts = [key.key for key in await engine.generate(count)]
        await engine.acquire("ann", 0)
        await engine.update(texts[0], KeyPatch("first", {"a": "b"}, b'{"user":"clear-data"}'), OPERATOR)
    return texts


def clear_members(place: Place, partitions: int) -> int:
    """How many keys Valkey has in clear."""
    return sum(
        not text.startswith(b"\xfe")
        for partition in range(partitions)
        for text in place.valkey.ask("HKEYS", keys_of(place.pool, partition, partitions)[1])
    )


async def rekeyed(pools: ValkeyPools) -> Rekeying:
    """The end of a rekey that begins now."""
    await pools.rekey()
    await eventually(lambda: pools.rekeying().state == "idle", "the rekey is done")
    return pools.rekeying()


# ---------------------------------------------------------------------------------------------- nothing in clear


@on_loop
@pytest.mark.parametrize("partitions", [1, 5])
async def test_valkey_holds_and_logs_no_secret(alone: Place, tmp_path: Path, partitions: int) -> None:
    """Not a generated text, not an imported one, no data, none that was replaced: not in a key, in the file that Valkey
    writes, or in its log of slow commands.
    """
    async with engine_on(alone.url, partitions, secrets=SECRETS, max_block_seconds=600, **FOREVER) as engine:
        secrets = [key.key for key in await engine.generate(20)]
        items = [
            NewKey(f"sk-live-imported-{n:04}", f"n{n}", None, b'{"user":"hidden-%d"}' % n) for n in range(20)
        ]
        ids = [result.id or 0 for result in await engine.import_many(items, False, False, OPERATOR)]
        secrets += [item.secret for item in items]
        leases = [await engine.acquire("ann", 0) for _ in range(10)]
        for number, lease in enumerate(leases):
            await engine.replace(lease.key, f"sk-live-replaced-{number:04}", OPERATOR)
            secrets.append(f"sk-live-replaced-{number:04}")
            await engine.keepalive(lease.key)
            await engine.extend(lease.key, lease.lease, 90) if number % 2 else await engine.get(lease.key)
        for lease in leases[:5]:
            await engine.unblock(lease.key, lease.lease)
        await engine.update(ids[0], KeyPatch(data=b'{"user":"hidden-anew"}'), OPERATOR)
        await engine.quarantine(ids[1], "why", True, OPERATOR)
        await engine.find("n2")
        await engine.reveal(ids[3], OPERATOR)
        await engine.page(ListQuery(order="release"))
        await engine.page(ListQuery(name="n"))
        await engine.delete(ids[4], OPERATOR)
        with pytest.raises(UnknownKey):
            await engine.get("sk-live-nobody-has-it")
        held = everything(alone.valkey, tmp_path)
        for secret in [*secrets, "sk-live-nobody-has-it", "hidden-"]:
            assert secret.encode() not in held, f"Valkey holds or logs {secret}"
        assert SECRETS[0] not in held


@on_loop
async def test_a_secret_that_stands_in_two_pools_looks_different_in_each(place: Place) -> None:
    """Nobody who reads Valkey sees that they share one."""
    async with pools_on(place.url, 1, secrets=SECRETS, **FOREVER) as pools:
        await pools.put("other", {"keepalive_seconds": None}, OPERATOR)
        for name in ("default", "other"):
            await pools.get(name).import_key(NewKey("the same secret"), False, OPERATOR)
        members: list[bytes] = []
        for namespace in (pools.default, pools.get("other")):
            records = keys_of(namespace._pool_key.strip("{}").removesuffix("}:pool"), 0, 1)[1]
            members += place.valkey.ask("HKEYS", records)
        assert len(set(members)) == 2


@on_loop
async def test_lists_hints_and_events_need_no_secrets_key(place: Place) -> None:
    """What may be shown is stored beside the sealed text."""
    async with engine_on(place.url, 3, secrets=SECRETS, **FOREVER) as engine:
        made = await engine.generate(9)
        await engine.import_key(NewKey("sk-live-imported"), False, OPERATOR)
        engine._partitions.vault.open = None  # type: ignore[union-attr, method-assign]
        for key in made:
            page = await engine.page(ListQuery(prefix=key.key[:3]))
            assert [row.id for row in page.keys] == [key.id]
            assert page.keys[0].hint == f"{key.key[:4]}…{key.key[-4:]}"
        assert not (await engine.page(ListQuery(prefix="sk"))).keys
        deleted = await engine.delete(made[0].id, OPERATOR)
        assert deleted.hint == f"{made[0].key[:4]}…{made[0].key[-4:]}"
        await engine.stats()
        assert engine.recent(1)[0].hint == deleted.hint
        await engine.quarantine(made[1].id, None, True, OPERATOR)
        assert await engine.keepalive_many([key.key for key in made[1:]]) == ["done"] * 8


# -------------------------------------------------------------------------------------------- wrong secrets keys


@on_loop
async def test_a_secrets_key_that_does_not_fit_stops_the_start_before_anything_is_changed(
    place: Place,
) -> None:
    """Missing, or another one: one line, and Valkey is as it was."""
    async with engine_on(place.url, 1, secrets=SECRETS, **FOREVER) as engine:
        await engine.generate(2)
    facts = f"{{{place.pool}}}:pool"
    before = place.valkey.ask("HGETALL", facts)
    for wrong, says in (((), "KEYPOOL_SECRETS_KEY"), ((OTHER,), "doesn't fit")):
        with pytest.raises(StartError, match=says) as error:
            async with engine_on(place.url, 1, secrets=wrong, **FOREVER):
                pass
        assert "\n" not in str(error.value)
        assert place.valkey.ask("HGETALL", facts) == before
    async with engine_on(place.url, 1, secrets=(OTHER, *SECRETS), **FOREVER) as engine:
        assert (await engine.acquire(None, 0)).key


@on_loop
async def test_servers_with_and_without_a_secrets_key_do_not_share_a_pool(place: Place) -> None:
    """One that has none would store keys in clear."""
    async with engine_on(place.url, 1, **FOREVER):
        with pytest.raises(StartError, match="secrets_key=unset"):
            async with engine_on(place.url, 1, secrets=SECRETS, **FOREVER):
                pass
        assert place.valkey.ask("HEXISTS", f"{{{place.pool}}}:pool", "digests") == 0


@on_loop
async def test_without_a_secrets_key_nothing_is_imported(place: Place) -> None:
    """Nor replaced, nor rekeyed; names and data of generated keys are stored as they are."""
    async with pools_on(place.url, 2, **FOREVER) as pools:
        engine = pools.default
        (key,) = await engine.generate(1)
        for call in (
            engine.import_key(NewKey("secret"), False, OPERATOR),
            engine.import_many([NewKey("secret")], False, False, OPERATOR),
            engine.replace(key.key, "secret", OPERATOR),
            pools.rekey(),
        ):
            with pytest.raises(SecretsKeyRequired):
                await call
        assert not pools.rekeying().encrypted
        row = await engine.update(key.key, KeyPatch("name", {"a": "b"}, b'{"p":1}'), OPERATOR)
        assert (row.name, row.labels) == ("name", {"a": "b"})
        lease = await engine.acquire(None, 0)
        assert (lease.name, bytes(lease.data or b"")) == ("name", b'{"p":1}')
    check(place.valkey, place.pool, 2)


# ------------------------------------------------------------------------------------- keys that were in clear


@on_loop
@pytest.mark.parametrize("partitions", [1, 5])
async def test_keys_that_were_in_clear_are_found_and_sealed_as_they_are_served(
    place: Place, partitions: int
) -> None:
    """By text, id and name, held or not; the secret of the first server with a key stays out of the next."""
    texts = await in_clear(place, partitions)
    async with engine_on(place.url, partitions, secrets=SECRETS, **FOREVER) as engine:
        assert clear_members(place, partitions) == len(texts)
        for text in texts:
            assert (await engine.get(text)).hint == f"{text[:4]}…{text[-4:]}"
        assert await engine.keepalive_many(texts) == ["done"] * len(texts)
        found = await engine.import_key(NewKey(texts[3]), False, OPERATOR)
        assert found.existed
        leases = [await engine.acquire("bob", 0) for _ in range(len(texts) - 1)]
        assert {lease.key for lease in leases} < set(texts)
        await eventually(lambda: clear_members(place, partitions) == 1, "what was served is sealed")
        for lease in leases:
            assert (await engine.unblock(lease.key, lease.lease)).changed
        row = await engine.update(texts[0], KeyPatch(labels={"c": "d"}), OPERATOR)
        assert (row.name, row.labels) == ("first", {"c": "d"})
        assert bytes((await engine.reveal(texts[0], OPERATOR)).data or b"") == b'{"user":"clear-data"}'
    check(place.valkey, place.pool, partitions)


@on_loop
@pytest.mark.parametrize("partitions", [1, 5])
async def test_a_rekey_seals_all_that_was_in_clear(alone: Place, tmp_path: Path, partitions: int) -> None:
    """In all pools, while they serve; afterwards no call passes a text in clear any more."""
    texts = await in_clear(alone, partitions, 250)
    async with pools_on(alone.url, partitions, **FOREVER) as pools:
        await pools.put("other", {"keepalive_seconds": None}, OPERATOR)
        texts += [key.key for key in await pools.get("other").generate(20)]
    async with pools_on(alone.url, partitions, secrets=SECRETS, **FOREVER) as pools:
        engine = pools.default
        busy = asyncio.ensure_future(_keep_busy(engine))
        done = await rekeyed(pools)
        busy.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await busy
        assert (done.done, done.total, done.encrypted) == (270, 270, True)
        alone.valkey.ask("SLOWLOG", "RESET")
        for text in texts[:40]:
            await engine.keepalive(text)
        await pools.get("other").keepalive(texts[-1])
        held = everything(alone.valkey, tmp_path)
        assert not [text for text in [*texts, "clear-data"] if text.encode() in held]
        for text in texts[:250]:
            assert (await engine.reveal(text, HOLDER)).key == text
    check(alone.valkey, alone.pool, partitions)


async def _keep_busy(engine: ValkeyEngine) -> None:
    while True:
        lease = await engine.acquire("ann", 5)
        await engine.keepalive(lease.key)
        await engine.unblock(lease.key, lease.lease)


@on_loop
async def test_a_rekey_seals_seats_that_were_in_clear(alone: Place) -> None:
    """Each for its own place; also where some were served, or changed, before it came to the others."""
    async with engine_on(alone.url, 1, **FOREVER) as engine:
        texts = [key.key for key in await engine.generate(3)]
        for text in texts:
            await engine.update(text, KeyPatch(seats=4), OPERATOR)
    async with pools_on(alone.url, 1, secrets=SECRETS, **FOREVER) as pools:
        engine = pools.default
        leases = [await engine.acquire("ann", 0) for _ in range(3)]
        ids = [row.id for row in (await engine.page(ListQuery())).keys]
        for lease in leases[:2]:
            await engine.update(lease.id, KeyPatch(labels={"a": "b"}), OPERATOR)
            assert (await engine.unblock(lease.key, lease.lease)).id == lease.id
        await engine.delete(ids[0], OPERATOR)
        await rekeyed(pools)
        assert clear_members(alone, 1) == 0
        assert {(await engine.get(text)).seats for text in texts[1:]} == {4}
        assert {
            (await engine.reveal(row.id, OPERATOR)).key for row in (await engine.page(ListQuery())).keys
        } == {*texts[1:]}
    check(alone.valkey, alone.pool, 1)


@on_loop
async def test_a_rekey_that_was_interrupted_goes_on_where_it_was(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the next server with this secrets key, unasked; then the old one isn't needed any more."""
    monkeypatch.setattr(rekeying, "_SLICE", 10)
    async with engine_on(place.url, 1, secrets=SECRETS, **FOREVER) as engine:
        texts = [key.key for key in await engine.generate(100)]
    slices = 0
    with monkeypatch.context() as patch:

        async def stop_after_four(pool: ValkeyEngine, on_slice: Any) -> None:
            async def count(examined: int) -> None:
                nonlocal slices
                slices += 1
                await on_slice(examined)
                if slices == 4:
                    await asyncio.Event().wait()  # until the server is gone

            await rekeying.rekey(pool._partitions, count)

        patch.setattr(ValkeyEngine, "rekey", stop_after_four)
        async with pools_on(place.url, 1, secrets=(OTHER, *SECRETS), **FOREVER) as pools:
            assert (await pools.rekey()).state == "running"
            await eventually(lambda: slices == 4, "four slices were done")
    with pytest.raises(StartError):  # half of the keys are under the old secrets key, and so are the digests
        async with engine_on(place.url, 1, secrets=(OTHER,), **FOREVER):
            pass
    examined: list[int] = []
    rekey = rekeying.rekey

    async def watched(partitions: Any, on_slice: Any) -> None:
        async def count(some: int) -> None:
            examined.append(some)
            await on_slice(some)

        await rekey(partitions, count)

    monkeypatch.setattr("keypool.engine.valkey.engine.rekey", watched)
    async with pools_on(place.url, 1, secrets=(OTHER, *SECRETS), **FOREVER) as pools:
        facts = f"{{{place.pool}}}:pool"
        await eventually(lambda: not place.valkey.ask("HEXISTS", facts, "rekey"), "the rekey is done")
        assert sum(examined) == 60
    async with engine_on(place.url, 1, secrets=(OTHER,), **FOREVER) as engine:
        for text in texts:
            assert (await engine.reveal(text, HOLDER)).key == text
    with pytest.raises(StartError):
        async with engine_on(place.url, 1, secrets=SECRETS, **FOREVER):
            pass


@on_loop
async def test_another_server_goes_on_with_the_rekey_of_one_that_died(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its turn lapses; all servers show the progress."""
    monkeypatch.setattr(rekeying, "_LOOK_SECONDS", 0.05)
    await in_clear(place, 1)
    async with pools_on(place.url, 1, secrets=SECRETS, **FOREVER) as pools:
        # As the one that died left it, whose turn has just begun.
        place.valkey.ask("SET", f"{{{place.pool}}}:rekeyer", "somebody else", "PX", 60_000)
        place.valkey.ask("HSET", f"{{{place.pool}}}:pool", "rekey", f"{Sealer(SECRETS).current.hex()} 10 30")
        await eventually(
            lambda: pools.rekeying() == Rekeying("running", 10, 30, encrypted=True), "it is shown"
        )
        place.valkey.ask("PEXPIRE", f"{{{place.pool}}}:rekeyer", 300)
        await eventually(lambda: pools.rekeying().state == "idle", "it is done")
        assert clear_members(place, 1) == 0


@on_loop
async def test_a_rekey_without_the_old_secrets_key_fails_and_loses_nothing(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """The state says so, and the log which key is missing."""
    third = bytes(32)
    async with pools_on(place.url, 1, secrets=(OTHER,), **FOREVER) as pools:
        (old,) = await pools.default.generate(1)
    async with pools_on(place.url, 1, secrets=(third, OTHER), **FOREVER) as pools:
        (new,) = await pools.default.generate(1)
        pools.default._partitions.vault.sealer._ciphers.pop(Sealer((OTHER,)).current)  # type: ignore[union-attr]
        await pools.rekey()
        await eventually(lambda: pools.rekeying().state == "failed", "it fails")
    assert Sealer((OTHER,)).current.hex() in caplog.text
    caplog.clear()
    async with engine_on(place.url, 1, secrets=(OTHER, third), **FOREVER) as engine:
        assert {(await engine.reveal(key.id, HOLDER)).key for key in (old, new)} == {old.key, new.key}
