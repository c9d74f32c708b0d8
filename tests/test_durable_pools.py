"""Several pools in one data file: what a restart, a crash or an outage does to them.

The rules of pools are in test_pools.py, those of one pool's file in test_datafile.py and test_durable_leases.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from durable_support import (
    durable,
    hold_clocks,
    numbers_in,
    old_file,
    opened_pools,
    refusal,
    rows_in,
    table_of,
)
from engine_support import Call, HeldTimers, Moment, make_engine, on_loop, open_held, turns
from held_writer import FULL, HeldWriter, hold_writers, run

from keypool.core.answers import KeyPatch, NewKey
from keypool.core.cursor import ListQuery
from keypool.core.errors import StaleLease, StorageUnavailable, UnknownKey, UnknownPool
from keypool.core.events import By, Origin
from keypool.core.keys import NEVER, Details, Key, State
from keypool.core.pace import Pace
from keypool.engine.durable import copying, datafile
from keypool.engine.durable.journal import FileJournal
from keypool.engine.durable.rows import NEVER_AT, POOL_SHIFT, Batch, StoredPool, encode, key_of, row_of
from keypool.engine.durable.writer import Writer
from keypool.engine.embedded import EmbeddedEngine
from keypool.engine.sealing import Sealer

ADMIN = Origin(By.OPERATOR, "ops")
LASTING = {"keepalive_seconds": None}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a data file may be made."""
    return tmp_path / "keypool.db"


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Moment:
    """The clock of all engines that are opened in the test."""
    return hold_clocks(monkeypatch)


def states(engine: EmbeddedEngine) -> list[dict[str, object]]:
    """Everything durable of every key."""
    return [durable(key) for key in engine.pool.after(0, 10_000)]


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for what takes a commit of the real writer."""
    for _ in range(30_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError(f"never came true: {what}")


async def data_of(engine: EmbeddedEngine, id: int) -> bytes | None:
    """The data of a key, as it is revealed."""
    data = (await engine.reveal(id)).data
    return None if data is None else bytes(data)


def change(path: Path, statement: str, *values: object) -> None:
    """Change a file that nobody has open."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(statement, values)


# ------------------------------------------------------------------------------------------------------- restarts


@on_loop
async def test_all_pools_are_restored(path: Path, wall: Moment) -> None:
    """Keys, leases, settings and numbers of each; the same ids in two pools are two keys."""
    async with opened_pools(path) as pools:
        for name, seconds in (("openai", 7), ("anthropic", 11)):
            await pools.put(name, {"block_seconds": seconds, **LASTING}, ADMIN)
        for count, name in enumerate(pools.names(), 1):
            engine = pools.get(name)
            await engine.generate(count)
            await engine.acquire(f"a holder in {name}", 0)
        await pools.get("openai").import_key(
            NewKey("sk-live-1", "acct-1", {"region": "eu"}, b'{"user":"x"}'), expire=False, origin=ADMIN
        )
        before = {name: states(pools.get(name)) for name in pools.names()}
        rows = {name: pools.row(name) for name in pools.names()}
        numbers = {name: pools.get(name).numbers() for name in pools.names()}
        assert [len(keys) for keys in before.values()] == [1, 2, 4]
    for _ in range(2):
        async with opened_pools(path) as pools:
            assert {name: states(pools.get(name)) for name in pools.names()} == before
            assert {name: pools.row(name) for name in pools.names()} == rows
            assert {name: pools.get(name).numbers() for name in pools.names()} == numbers
            for name in pools.names():
                pools.get(name).pool.check()
            found = await pools.get("openai").find("acct-1")
            assert (found.labels, found.expires_in) == ({"region": "eu"}, None)
            assert await data_of(pools.get("openai"), found.id) == (b'{"user":"x"}')


@on_loop
async def test_the_rows_of_default_are_as_they_were(path: Path) -> None:
    """Id 7 is row 7; those of the pool number 2 come after all of number 1."""
    async with opened_pools(path) as pools:
        await pools.default.generate(2)
        for name in ("one", "two"):
            await pools.put(name, {}, ADMIN)
            await pools.get(name).generate(2)
    ids = [row[0] for row in rows_in(path)]
    assert ids == [1, 2, (1 << 40) + 1, (1 << 40) + 2, (2 << 40) + 1, (2 << 40) + 2]
    assert ids == [row[0] for row in table_of(path)]
    numbers = numbers_in(path)
    assert (numbers["last_id"], numbers["1/last_id"], numbers["2/last_id"]) == (2, 2, 2)
    assert [name for name in numbers if name.endswith("moment")] == ["moment"]


@on_loop
async def test_the_number_of_a_pool_that_is_gone_is_never_used_again(path: Path) -> None:
    """Nor are its numbers kept: a pool of the same name begins anew, with handles of its own."""
    async with opened_pools(path) as pools:
        await pools.put("openai", LASTING, ADMIN)
        await pools.get("openai").generate(3)
        old = (await pools.get("openai").acquire("me", 0)).handle
        await pools.delete("openai", drain=True, now=True, origin=ADMIN)
        await until(lambda: "openai" not in pools.names(), "the pool is gone")
    facts = datafile.inspect(path)
    assert (facts.pools, rows_in(path)) == ({}, [])
    assert not [name for name in facts.numbers if name.startswith("1/")]
    async with opened_pools(path) as pools:
        with pytest.raises(UnknownPool):
            pools.get("openai")
        await pools.put("openai", LASTING, ADMIN)
        engine = pools.get("openai")
        assert (await engine.generate(1))[0].id == 1
        assert (await engine.acquire("me", 0)).lease == 1
        assert engine.handles.read(old) is None
    assert [row[0] >> POOL_SHIFT for row in rows_in(path)] == [2]


@on_loop
async def test_a_number_stays_used_whatever_is_changed_after_its_pool_is_gone(path: Path) -> None:
    """Also if the pool was the last one, and another one is changed in a later run."""
    async with opened_pools(path) as pools:
        for name in ("one", "two"):
            await pools.put(name, {}, ADMIN)
        await pools.delete("two", drain=False, now=False, origin=ADMIN)
    async with opened_pools(path) as pools:
        await pools.change("one", {"block_seconds": 5}, ADMIN)
    async with opened_pools(path) as pools:
        await pools.put("three", {}, ADMIN)
    assert list(datafile.inspect(path).pools) == [1, 3]


@on_loop
async def test_a_pool_goes_on_being_emptied_after_a_restart(path: Path, wall: Moment) -> None:
    """It serves no key, holders keep theirs, and it is gone when their leases have ended."""
    async with opened_pools(path) as pools:
        await pools.put("openai", {"block_seconds": 100, **LASTING}, ADMIN)
        engine = pools.get("openai")
        await engine.generate(3)
        lease = await engine.acquire("me", 0)
        assert await pools.delete("openai", drain=True, now=False, origin=ADMIN) is False
    async with opened_pools(path) as pools:
        engine = pools.get("openai")
        assert pools.row("openai").draining
        await until(lambda: engine.pool.total == 1, "what nobody holds is gone")
        assert (await engine.get(lease.id)).state is State.BLOCKED
        await engine.unblock(lease.id, lease.lease)
        await until(lambda: "openai" not in pools.names(), "the pool is gone")
    assert rows_in(path) == []


@on_loop
async def test_changed_settings_are_kept_as_they_were_given(path: Path) -> None:
    """Those that were never given follow the defaults of a later version."""
    async with opened_pools(path) as pools:
        await pools.put("openai", {"block_seconds": 5, "error_threshold": None}, ADMIN)
        await pools.change("openai", {"rest_seconds": 0.25}, ADMIN)
    [stored] = datafile.inspect(path).pools.values()
    given: dict[str, int | float | Pace | None] = {
        "block_seconds": 5,
        "error_threshold": None,
        "rest_seconds": 0.25,
    }
    assert stored == StoredPool(1, "openai", given)
    async with opened_pools(path) as pools:
        settings = pools.row("openai").settings
        assert {name: settings[name] for name in given} == given


@on_loop
async def test_handles_hold_in_their_pool_only(path: Path) -> None:
    """The same id and lease in another pool have another handle, after a restart too."""
    handles = {}
    async with opened_pools(path) as pools:
        for name in ("one", "two"):
            await pools.put(name, LASTING, ADMIN)
        for name in pools.names():
            await pools.get(name).generate(1)
            handles[name] = (await pools.get(name).acquire("me", 0)).handle
    async with opened_pools(path) as pools:
        for name in pools.names():
            read = pools.get(name).handles.read
            assert [other for other, handle in handles.items() if read(handle) is not None] == [name]
            assert (await pools.get(name).unblock(read(handles[name]) or 0, None)).changed


@on_loop
async def test_keys_that_never_expire_come_through_stops_and_graces(path: Path, wall: Moment) -> None:
    """No time is long enough, and a restart grace doesn't make them mortal."""
    async with opened_pools(path) as pools:
        await pools.put("openai", LASTING, ADMIN)
        await pools.get("openai").generate(2)
        await pools.default.generate(2)
    wall.on(10 * 365 * 86400)
    for grace in (0.0, 20.0, 0.0):
        async with opened_pools(path, restart_grace=grace) as pools:
            assert [key.expires_deadline for key in pools.get("openai").pool.after(0, 9)] == [NEVER, NEVER]
            assert (await pools.get("openai").get(1)).expires_in is None
            assert pools.default.pool.total == 0
    assert [row[3] for row in rows_in(path)] == [NEVER_AT, NEVER_AT]


@on_loop
async def test_deadlines_of_all_pools_go_on_during_a_stop(path: Path, wall: Moment) -> None:
    """Blocks that ran out are released, and keys purged, by the times of their own pool."""
    async with opened_pools(path) as pools:
        await pools.put("short", {"block_seconds": 10, "keepalive_seconds": 50}, ADMIN)
        await pools.put("long", {"block_seconds": 1000, "keepalive_seconds": 2000}, ADMIN)
        for name in ("short", "long"):
            await pools.get(name).generate(2)
            await pools.get(name).acquire("me", 0)
    wall.on(30)
    async with opened_pools(path) as pools:
        assert (pools.row("short").blocked, pools.row("long").blocked) == (0, 1)
        assert (await pools.get("short").stats()).released == 1
    wall.on(21)
    async with opened_pools(path) as pools:
        assert (pools.row("short").total, pools.row("long").total) == (0, 2)
        assert (await pools.get("short").stats()).expired == 2


@on_loop
@pytest.mark.parametrize("step", [-1000.0, 25.0])
async def test_clocks_of_all_pools_go_on_from_the_last_moment(path: Path, wall: Moment, step: float) -> None:
    """That of any pool: a wall clock that was set back during the stop makes no lease longer."""
    async with opened_pools(path) as pools:
        await pools.put("openai", LASTING, ADMIN)
        await pools.default.generate(1)
        wall.on(30)
        engine = pools.get("openai")
        await engine.generate(1)
        await engine.acquire("me", 0)
    wall.at += step
    async with opened_pools(path) as pools:
        assert (await pools.get("openai").get(1)).release_in == pytest.approx(60 - max(step, 0), abs=0.002)
        expires_in = (await pools.default.get(1)).expires_in
        assert expires_in == pytest.approx(270 - max(step, 0), abs=0.002)


@on_loop
async def test_the_text_before_a_replacement_is_good_until_its_lease_ends(path: Path, wall: Moment) -> None:
    """Also across a restart; not longer, though the lease ended during the stop."""
    async with opened_pools(path) as pools:
        await pools.put("openai", LASTING, ADMIN)
        engine = pools.get("openai")
        await engine.import_key(NewKey("the old secret"), expire=False, origin=ADMIN)
        lease = await engine.acquire("me", 0)
        await engine.replace(lease.id, "the new secret", ADMIN)
    async with opened_pools(path) as pools:
        engine = pools.get("openai")
        assert (await engine.get("the old secret")).id == (await engine.get("the new secret")).id == lease.id
        assert (await engine.reveal(lease.id)).key == "the new secret"
    wall.on(61)
    async with opened_pools(path) as pools:
        engine = pools.get("openai")
        with pytest.raises(UnknownKey):
            await engine.get("the old secret")
        with pytest.raises(StaleLease):
            await engine.unblock("the new secret", lease.lease + 1)
        engine.pool.check()


# ---------------------------------------------------------------------------------------------------------- rows


def test_what_operators_wrote_is_in_the_row() -> None:
    """Name, labels, data, the text before a replacement, and the token that holds it."""
    details = Details(True, "acct-1", {"region": "eu"}, b"{}", "the text before")
    key = Key(5, "sk-live-\0é", 1.0, NEVER, details=details, client="ci", state=State.BLOCKED, lease=3)
    key.release_deadline, key.acquired_at, key.served = 99.0, 39.0, 300
    row = row_of(key, 9)
    assert (row[0], row[3]) == ((9 << 40) + 5, NEVER_AT)
    assert durable(key_of(row)) | {"client": key_of(row).client, "details": key_of(row).details} == (
        durable(key) | {"client": "ci", "details": details}
    )


def test_definitions_of_pools_are_merged_in_their_order(path: Path) -> None:
    """In the batches, half flushed, and in the tables; a pool that is gone takes its numbers with it."""
    writer = Writer(path, open_held(path))
    key = row_of(Key(1, "x" * 20, 1.0, NEVER), 1)
    made = Batch(
        [key], [], {"1/last_id": 1, "moment": 5, "last_pool": 1}, [StoredPool(1, "one", {"rest_seconds": 1})]
    )
    changed = Batch([], [], {"1/last_id": 2}, [StoredPool(1, "one", {"rest_seconds": 2.5}, draining=True)])
    gone = Batch([], [key[0]], {"1/last_id": 3, "moment": 6}, [StoredPool(1)])
    expected: list[tuple[list[StoredPool], dict[str, int]]] = [
        (made.pools, {"1/last_id": 1, "moment": 5, "last_pool": 1}),
        (changed.pools, {"1/last_id": 2, "moment": 5, "last_pool": 1}),
        ([], {"moment": 6, "last_pool": 1}),
    ]
    for batch, (pools, numbers) in zip((made, changed, gone), expected, strict=True):
        assert writer.commit([encode(batch)]).error is None
        for _ in range(2):
            facts = datafile.inspect(path)
            assert (list(facts.pools.values()), facts.numbers) == (pools, numbers)
            writer.close()  # which flushes
            writer = Writer(path, open_held(path))
            assert writer.probe().error is None
    writer.close()


# ------------------------------------------------------------------------------------------- files of older versions


@on_loop
@pytest.mark.parametrize("version", [1, 2, 3])
async def test_a_file_of_an_older_version_gets_pools(path: Path, version: int) -> None:
    """Its keys are those of `default`, and another pool may be made beside it."""
    keys = [(id, chr(96 + id) * 20, 1_000, 9_000_000_000_000, None, 0, None) for id in (1, 2)]
    old_file(path, version, [(*key, None, 0, None) for key in keys] if version == 3 else keys)
    async with opened_pools(path) as pools:
        assert pools.names() == ["default"]
        assert [key.text for key in pools.default.pool.after(0, 9)] == ["a" * 20, "b" * 20]
        await pools.put("openai", {}, ADMIN)
    async with opened_pools(path) as pools:
        assert (pools.names(), pools.default.pool.total) == (["default", "openai"], 2)
    assert datafile.version_of(path) == datafile.VERSION == 5


@on_loop
async def test_a_batch_of_version_3_is_read(path: Path) -> None:
    """Of a server that was killed before its update: without definitions, and without what is new in `more`."""
    row = (3, "c" * 20, 1_000, 9_000_000_000_000, None, 0, None, None, 0, None)
    old_file(path, 3, [], [[[row], [], {"last_id": 3}]])
    async with opened_pools(path) as pools:
        assert [key.text for key in pools.default.pool.after(0, 9)] == ["c" * 20]


# ---------------------------------------------------------------------------------------------------------- pace


@on_loop
async def test_a_pace_survives_a_restart(path: Path, wall: Moment) -> None:
    """That of a pool, of `default`, of a key, and what each key has used, exactly."""
    own, pace = Pace(1, 0.3), Pace(7, 60.5, 2)
    async with opened_pools(path) as pools:
        await pools.put("openai", {"pace": pace, **LASTING}, ADMIN)
        await pools.change("default", {"pace": own}, ADMIN)
        openai = pools.get("openai")
        await openai.generate(3)
        await openai.update(1, KeyPatch(pace=own), ADMIN)
        for _ in range(3):
            lease = await openai.acquire(None, 0)
            await openai.unblock(lease.id, lease.lease, uses=5)
        before = states(openai)
        assert openai.pool.counters.paced == 3
    async with opened_pools(path) as pools:
        openai = pools.get("openai")
        assert [row.pace for row in (await openai.page(ListQuery())).keys] == [own, None, None]
        for was, found in zip(before, states(openai), strict=True):
            assert found["paced_until"] == was["paced_until"]
        assert (openai.rules.pace, pools.default.rules.pace) == (pace, own)
        assert (openai.pool.counters.paced, openai.pool.cooling) == (3, 3)
        assert await pools.put("default", {}, ADMIN) is False
    async with opened_pools(path) as pools:
        assert pools.row("default").settings["pace"] is None


@pytest.mark.parametrize("sealed", [False, True])
def test_a_row_has_the_budget_and_the_pace_of_its_key(sealed: bool) -> None:
    sealer = Sealer([b"k" * 32]) if sealed else None
    key = Key(7, "sk-live-seven", 1_000.0, NEVER, details=Details(imported=True, pace=Pace(2, 0.5)))
    key.paced_until = 1_700_000_000.123456
    found = key_of(row_of(key, 3, sealer), sealer)
    assert (found.paced_until, found.details) == (key.paced_until, key.details)


def test_a_row_with_a_budget_that_cannot_be_is_refused() -> None:
    row = row_of(Key(7, "sk-live-seven", 1_000.0, NEVER))
    more = encode((None, None, None, None, None, -1.0))
    with pytest.raises(ValueError, match="a pace that can't be"):
        key_of((*row[:-1], more))


# ---------------------------------------------------------------------------------------------------------- damage

DAMAGES = {
    "keys of a pool that isn't defined": "DELETE FROM pools",
    "a name that can't be": "UPDATE pools SET name = 'No!'",
    "the name of default": "UPDATE pools SET name = 'default'",
    "settings that aren't JSON": "UPDATE pools SET settings = '{'",
    "a pace that is a number": "UPDATE pools SET settings = '{\"pace\":5}'",
    "a pace in the place of a number": 'UPDATE pools SET settings = \'{"max_keys":{"count":1,"seconds":1}}\'',
    "settings of another type": 'UPDATE pools SET settings = \'{"rest_seconds":"long"}\'',
    "an unknown setting": "UPDATE pools SET settings = '{\"pase\":1}'",
    "settings that contradict each other": "UPDATE pools SET settings = '{\"max_block_seconds\":1}'",
    "a name twice": "INSERT INTO pools SELECT 7, name, settings, draining FROM pools",
    "a number that can't be": "INSERT INTO pools VALUES (-1, 'minus', '{}', 0)",
    "a last id before the last": "UPDATE pool SET value = 1 WHERE name = '1/last_id'",
    "a key of a pool number that can't be": "UPDATE keys SET id = 9223372036854775807 WHERE id >> 40",
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_file_with_damaged_pools_is_refused_and_left_as_it_was(path: Path, what: str) -> None:
    """In one line, which quotes no key."""

    async def make() -> None:
        async with opened_pools(path) as pools:
            await pools.put("openai", LASTING, ADMIN)
            for id in (1, 2):
                await pools.get("openai").import_key(NewKey(f"the secret {id}"), expire=False, origin=ADMIN)

    asyncio.run(make())
    if what.startswith("a key of a pool number"):
        change(path, "DELETE FROM keys WHERE id & 1023 = 2")
    change(path, DAMAGES[what])
    before = path.read_bytes()
    assert "the secret" not in refusal(path)
    assert path.read_bytes() == before


# ---------------------------------------------------------------------------------------------------------- backups


@on_loop
async def test_a_backup_has_all_pools(path: Path, wall: Moment) -> None:
    """And is as good as the file."""
    copy = path.with_name("copy")
    async with opened_pools(path) as pools:
        await pools.put("openai", LASTING, ADMIN)
        await pools.get("openai").generate(3)
        await pools.default.generate(2)
        assert copying.back_up(path, copy).keys == 5
        before = {name: states(pools.get(name)) for name in pools.names()}
    assert copying.verify(copy).states["available"] == 5
    async with opened_pools(copy) as pools:
        assert {name: states(pools.get(name)) for name in pools.names()} == before


# ---------------------------------------------------------------------------------- one journal, one writer, one outage


class Two:
    """Two pools over a writer that the test controls."""

    def __init__(self, writers: list[HeldWriter]) -> None:
        self.clock = Moment()
        self.timers = HeldTimers()
        self.engines = [
            make_engine(self.clock, self.timers),
            make_engine(self.clock, self.timers, keepalive_seconds=1000),
        ]
        self._writers = writers

    async def open(self) -> Two:
        self.journal = FileJournal(Path("none"), open_held(Path("/dev/null")))
        starting = asyncio.ensure_future(self.journal.open())
        await turns()
        self.writer.answer()
        await starting
        await self.journal.start(None)
        for number, engine in enumerate(self.engines):
            engine.journal = self.journal.join(number, engine)
        return self

    @property
    def writer(self) -> HeldWriter:
        return self._writers[-1]


def test_calls_of_all_pools_share_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one turn of the loop; numbers are of the pools that changed, with `moment` once."""

    async def test() -> None:
        two = await Two(hold_writers(monkeypatch)).open()
        calls = [Call(engine.generate(1)) for engine in two.engines]
        await turns()
        batch = two.writer.answer()
        await turns()
        assert [row[0] for row in batch.rows] == [1, (1 << 40) + 1]
        assert (batch.pool["last_id"], batch.pool["1/last_id"]) == (1, 1)
        assert [name for name in batch.pool if name.endswith("moment")] == ["moment"]
        assert [len(call.answer) for call in calls] == [1, 1]
        alone = Call(two.engines[1].generate(1))
        await turns()
        batch = two.writer.answer()
        await turns()
        assert (batch.pool["1/last_id"], len(alone.answer)) == (2, 1)

    run(test)


def test_an_answer_of_one_pool_does_not_wait_for_another_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key with the same id there has changed, this one has not."""

    async def test() -> None:
        two = await Two(hold_writers(monkeypatch)).open()
        for engine in two.engines:
            made = Call(engine.generate(1))
            await turns()
            two.writer.answer()
            await turns()
            assert made.answer
        waiting = Call(two.engines[1].keepalive(1))
        free = Call(two.engines[0].get(1))
        await turns()
        assert not waiting.over
        assert free.answer.id == 1

    run(test)


def test_a_batch_of_several_pools_is_sent_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as large as a turn of the loop allows, whichever pools its keys are of."""

    async def test() -> None:
        monkeypatch.setattr("keypool.engine.durable.journal._PART_ROWS", 3)
        two = await Two(hold_writers(monkeypatch)).open()
        two.writer.batches.clear()
        calls = [Call(engine.generate(4)) for engine in two.engines]
        await turns()
        two.writer.answer_all()
        await turns()
        assert [len(batch.rows) for batch in two.writer.batches] == [3, 3, 2]
        ids = [row[0] for batch in two.writer.batches for row in batch.rows]
        assert ids == [pool << 40 | id for pool in (0, 1) for id in (1, 2, 3, 4)]
        assert all(call.answer for call in calls)

    run(test)


def test_an_outage_is_one_of_all_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of each are refused, none of its keys expires, and each gets half its own keepalive as grace."""

    async def test() -> None:
        logging.getLogger("keypool.journal").setLevel(logging.CRITICAL)
        two = await Two(hold_writers(monkeypatch)).open()
        made = [Call(engine.generate(1)) for engine in two.engines]
        await turns()
        two.writer.answer()
        await turns()
        assert [len(call.answer) for call in made] == [1, 1]
        failing = Call(two.engines[0].keepalive(1))
        await turns()
        two.writer.answer(FULL)
        await turns()
        with pytest.raises(StorageUnavailable, match="full"):
            _ = failing.answer
        assert not any(engine.storage_up() for engine in two.engines)
        two.clock.on(5000)
        batch = await two.writer.batch()
        two.writer.answer()  # the batch that failed
        batch = await two.writer.batch()
        assert batch.pool["grace_until"] == round((two.clock() + 150) * 1000)
        assert batch.pool["1/grace_until"] == round((two.clock() + 500) * 1000)
        two.writer.answer()
        await turns()
        assert all(engine.storage_up() for engine in two.engines)
        assert [(await engine.get(1)).expires_in for engine in two.engines] == [150, 500]

    try:
        run(test)
    finally:
        logging.getLogger("keypool.journal").setLevel(logging.NOTSET)


def test_the_grace_of_a_pool_holds_for_its_own_rows(path: Path) -> None:
    """In the tables and in the batches; keys that never expire have none."""
    writer = Writer(path, open_held(path))
    rows = [
        row_of(Key(id, "x" * 20, 1.0, ends), pool)
        for pool in (0, 1, 2)
        for id, ends in ((1, 5.0), (2, NEVER))
    ]
    pools = [StoredPool(number, f"pool-{number}") for number in (1, 2)]
    assert (
        writer.commit([encode(Batch(rows, [], {"1/grace_until": 7000, "2/grace_until": 3000}, pools))]).error
        is None
    )
    for _ in range(2):
        assert [row[3] for row in rows_in(path)] == [5000, NEVER_AT, 7000, NEVER_AT, 5000, NEVER_AT]
        assert not [name for name in numbers_in(path) if "grace" in name]
        writer.close()


@on_loop
async def test_a_name_is_free_again_and_an_update_is_kept(path: Path) -> None:
    """What PATCH changed is what a restart shows, and the index of names follows it."""
    async with opened_pools(path) as pools:
        await pools.put("openai", LASTING, ADMIN)
        engine = pools.get("openai")
        await engine.import_key(NewKey("secret one", "first"), expire=False, origin=ADMIN)
        await engine.update(1, KeyPatch(name="second", labels={"a": "b"}, data=b'{"x":1}'), ADMIN)
        await engine.import_key(NewKey("secret two", "first"), expire=False, origin=ADMIN)
    async with opened_pools(path) as pools:
        engine = pools.get("openai")
        assert [(await engine.find(name)).id for name in ("second", "first")] == [1, 2]
        assert await data_of(engine, 1) == (b'{"x":1}')
        engine.pool.check()
