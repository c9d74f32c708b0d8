"""What a data file keeps of leases: cooldowns, quarantines, reports, extensions, attempts, the secret of the handles.

Engines over real files, with clocks that the test moves; and processes that are killed, with kill -9, at the moment
that the test names.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest
from durable_support import (
    durable,
    fill,
    hold_clocks,
    keys_of_all_kinds,
    old_file,
    opened,
    opened_pools,
    refusal,
    refused_start,
    row,
    rows_in,
)
from engine_support import Moment, on_loop, open_held
from support import ROOT, clean_environment

from keypool.core.answers import KeyPatch, Lease, NewKey
from keypool.core.cursor import ListQuery
from keypool.core.errors import LeaseOver, StaleLease, UnknownKey
from keypool.core.events import By, Origin
from keypool.core.handles import SECRET_BYTES, Handles
from keypool.core.keys import Key, State
from keypool.core.outcomes import NO_HISTORY, Outcome, Report
from keypool.core.pace import Pace
from keypool.engine.durable import copying, datafile
from keypool.engine.durable.rows import (
    COOLING,
    QUARANTINE_PENDING,
    QUARANTINED,
    REPORTED,
    Batch,
    encode,
    key_of,
    row_of,
)
from keypool.engine.durable.writer import Writer
from keypool.engine.embedded import EmbeddedEngine

OPERATOR = Origin(By.OPERATOR, "ops")
LIMITED = Report(Outcome.RATE_LIMITED, 30.0, "slow down")
INVALID = Report(Outcome.INVALID, reason="revoked")


class Attempt:
    """An acquire that is repeated."""

    def __init__(self, digest: bytes = b"an attempt is 16") -> None:
        self.digest = digest
        self.replayed = False


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Moment:
    """The clock of all engines that are opened in the test."""
    return hold_clocks(monkeypatch)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a data file may be made."""
    return tmp_path / "keypool.db"


# ---------------------------------------------------------------------------------------------------------- rows


def test_a_key_of_any_kind_survives_the_file(path: Path) -> None:
    """As a row of a table, and of a batch that isn't flushed yet."""
    keys = keys_of_all_kinds()
    half = len(keys) // 2
    fill(path, list(map(row_of, keys[:half])))
    with contextlib.closing(Writer(path, open_held(path))) as writer:
        assert writer.commit([encode(Batch(list(map(row_of, keys[half:]))))]).error is None
        found = [key for _, some in datafile.read_keys(path, 7) for key in some]
    assert [durable(key) for key in found] == [durable(key) for key in keys]
    assert all(key.history is NO_HISTORY for key in found if key.history == NO_HISTORY), (
        "each one costs memory"
    )


def test_the_usual_key_is_a_small_row() -> None:
    """One that was never reported on has nothing in the columns for that, and a batch has three bytes for them."""
    key = Key(1, "0" * 20, 1_700_000_000.0, 1_700_000_300.0)
    assert row_of(key)[7:] == (None, 0, None)
    assert len(encode(row_of(key))) - len(encode(row_of(key)[:7])) == 3


def test_no_cooldown_is_shortened_by_rounding() -> None:
    """Nor lengthened by more than the millisecond in which it ends, however often it is read and written."""
    draw = random.Random(6)
    for _ in range(20_000):
        until = draw.uniform(1.7e9, 1.9e9)
        key = Key(1, "0" * 20, 1.7e9, 1.9e9, state=State.COOLING, release_deadline=until)
        once = key_of(row_of(key)).release_deadline
        assert once is not None
        assert (
            until - 2**-21 <= once <= until + 0.001001
        )  # 2**-21 s is the resolution of a float of this size
        assert row_of(key_of(row_of(key))) == row_of(key)


# ------------------------------------------------------------------------------------------- files of older versions

OLD = [
    (1, "a" * 20, 1_000, 9_000_000, None, 0, None),
    (2, "b" * 20, 1_000, 9_000_000, 70_000, 7, "me"),
    (3, "c" * 20, 1_000, 9_000_000, None, 8, None),
    (4, "d" * 20, 1_000, 9_000_000, 61_500, 9, None),
]


@pytest.mark.parametrize("how", ["version 1", "version 2", "version 2 with batches"])
@on_loop
async def test_a_file_of_an_older_version_is_brought_up(path: Path, wall: Moment, how: str) -> None:
    """Available and blocked keys, in tables and in batches; their leases are extended, reported on and released."""
    wall.at = 30.0
    if "batches" in how:
        changed = (3, "c" * 20, 1_000, 9_000_000, 62_000, 10, "you")
        stale = (2, "b" * 20, 1_000, 9_000_000, None, 6, None)
        batches = [[[stale, changed], [], {"last_lease": 10}], [[OLD[1]], [1], {}]]
        old_file(path, 2, [*OLD[:1], stale, *OLD[2:]], batches)
        expected = [OLD[1], changed, OLD[3]]
    else:
        old_file(path, int(how[-1]), OLD)
        expected = OLD
    assert rows_in(path) == [(*key, None, 0, None) for key in expected], (
        "not read as it is, by keypool verify say"
    )
    assert datafile.secret_of(path) is None
    secrets = set()
    for _ in range(2):
        async with opened(path, max_block_seconds=100) as engine:
            assert datafile.version_of(path) == datafile.VERSION
            secrets.add(datafile.secret_of(path))
            blocked = [key for key in expected if key[4] is not None]
            for id, _text, _, _, release_at, lease, owner in blocked:
                found = await engine.get(id)
                assert release_at is not None
                assert (found.state, found.lease, found.owner) == ("blocked", lease, owner)
                assert found.release_in == release_at / 1000 - wall.at
            assert (await engine.stats()).available == len(expected) - len(blocked)
    assert len(secrets) == 1
    async with opened(path, max_block_seconds=100) as engine:
        extended = await engine.extend(2, 7, 1000)
        assert (extended.release_in, extended.block_left) == (80, 80), "it was acquired at 10, for 60 s"
        assert (await engine.unblock(4, 9, report=LIMITED)).available_in == 30
    assert [each[8] & 0xFF for each in rows_in(path) if each[0] == 4] == [COOLING | REPORTED]


@on_loop
async def test_pending_batches_of_an_older_version_are_flushed(path: Path, wall: Moment) -> None:
    """When the file is closed, the table has what the batches said, in ten columns."""
    wall.at = 30.0
    old_file(path, 2, [], [[[OLD[0], OLD[1]], [], {"last_id": 2}]])
    async with opened(path):
        pass
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT count(*) FROM batches").fetchone() == (0,)
        assert len(database.execute("SELECT * FROM keys WHERE id = 2").fetchone()) == 10
    assert [each[:7] for each in rows_in(path)] == OLD[:2]


def test_an_older_file_that_is_refused_stays_of_its_version(path: Path) -> None:
    """It isn't changed before it is known to be in order."""
    old_file(path, 2, [(*OLD[0][:5], 99, None)])
    before = path.read_bytes()
    assert "contradicts itself" in refusal(path)
    assert path.read_bytes() == before
    assert datafile.version_of(path) == 2


def test_an_older_file_is_verified_and_copied_as_it_is(path: Path, tmp_path: Path) -> None:
    """keypool backup upgrades nothing."""
    old_file(path, 2, OLD[:1], [[[OLD[1]], [], {}]])
    checked = copying.back_up(path, tmp_path / "copy")
    assert (checked.version, checked.keys, checked.states["blocked"]) == (2, 2, 1)
    assert copying.verify(tmp_path / "copy") == checked


# ------------------------------------------------------------------------------------------------------------ seats


@pytest.mark.parametrize("secrets", [(), (bytes(range(32)),)], ids=["clear", "sealed"])
@on_loop
async def test_seats_are_after_a_restart_where_they_were(
    path: Path, wall: Moment, secrets: tuple[bytes, ...]
) -> None:
    """Whatever they wait for; none is made available too early by a lease that ends after it, and none comes back."""
    async with opened_pools(path, *secrets, keepalive_seconds=None) as pools:
        engine = pools.default
        made = await engine.import_key(NewKey("sk-live-1", "acct", seats=4), False, OPERATOR)
        leases = sorted([await engine.acquire(None, 0) for _ in range(3)], key=lambda lease: lease.id)
        await engine.unblock(leases[0].id, leases[0].lease, report=Report(Outcome.RATE_LIMITED, 1000.0))
        await engine.update(leases[1].id, KeyPatch(seats=1), OPERATOR)
        rows = (await engine.page(ListQuery())).keys
    wall.on(1)
    async with opened_pools(path, *secrets, keepalive_seconds=None) as pools:
        engine = pools.default
        again = (await engine.page(ListQuery())).keys
        assert [(row.id, row.state, row.seat, row.seats, row.outcome) for row in again] == [
            (row.id, row.state, row.seat, row.seats, row.outcome) for row in rows
        ]
        assert {lease.id for lease in leases[1:]} == {row.id for row in again} < {*made.ids}
        await engine.unblock(leases[1].id, leases[1].lease)
        assert (await engine.unblock(leases[2].id, leases[2].lease)).available_in == pytest.approx(
            999, abs=0.1
        )
        assert (await engine.get("sk-live-1")).seats == 1


@on_loop
async def test_what_seats_were_charged_is_known_after_a_restart(path: Path, wall: Moment) -> None:
    """Whichever of them was, and whether or not the others have changed since."""
    async with opened_pools(path, keepalive_seconds=None) as pools:
        await pools.default.import_key(NewKey("sk-live-1", pace=Pace(4, 100.0, 3), seats=5), False, OPERATOR)
        for _ in range(2):
            await pools.default.acquire(None, 0)
    wall.on(1)
    async with opened_pools(path, keepalive_seconds=None) as pools:
        await pools.default.acquire(None, 0)
        rows = (await pools.default.page(ListQuery())).keys
        assert sorted(row.state for row in rows) == sorted([State.BLOCKED] * 3 + [State.COOLING] * 2)
        ready = [row.available_in for row in rows if row.available_in is not None]
    wall.on(1)
    async with opened_pools(path, keepalive_seconds=None) as pools:
        again = (await pools.default.page(ListQuery())).keys
        assert sorted(row.state for row in again) == sorted(row.state for row in rows)
        left = [row.available_in for row in again if row.available_in is not None]
        assert left == pytest.approx([each - 1 for each in ready], abs=0.5)


# ------------------------------------------------------------------------------------------- a file of no use

HISTORY = encode([None, [1, 2.0, "error", None, None]]).hex()
BLOCKED = "release_at = 4000000000000, lease = 1, acquired_at = 1"
WRONG_COLUMNS = {
    "an unknown flag": "flags = 16",
    "negative flags": "flags = -1",
    "a negative count of acquires": "flags = -256",
    "cooling without an end": f"flags = {COOLING}",
    "quarantined with a moment of release": f"{BLOCKED}, flags = {QUARANTINED}",
    "cooling and quarantined": f"{BLOCKED}, flags = {COOLING | QUARANTINED}",
    "a quarantine to come of a free key": f"flags = {QUARANTINE_PENDING}",
    "a quarantine to come of a cooling key": f"{BLOCKED}, flags = {COOLING | QUARANTINE_PENDING}",
    "an owner of a cooling key": f"{BLOCKED}, flags = {COOLING}, owner = 'me'",
    "an attempt of a free key": f"more = x'{encode([bytes(16)]).hex()}'",
    "an empty more": "more = x''",
    "a more that is no MessagePack": "more = x'c1'",
    "a more with a rest": f"more = x'{HISTORY}00'",
    "a more that is a number": "more = x'07'",
    "an attempt that is a text": f"{BLOCKED}, more = x'{encode(['0' * 16]).hex()}'",
    "an attempt that is too short": f"{BLOCKED}, more = x'{encode([bytes(15)]).hex()}'",
    "an unknown outcome": f"more = x'{encode([None, [1, 2.0, 'fine']]).hex()}'",
    "negative failures": f"more = x'{encode([None, [-1, 2.0, 'ok']]).hex()}'",
    "a failure at no moment": f"more = x'{encode([None, [1, float('nan'), 'ok']]).hex()}'",
    "a failure at the end of time": f"more = x'{encode([None, [1, float('inf'), 'ok']]).hex()}'",
}  # fmt: skip
STORIES = {
    "the table of secrets is empty": "DELETE FROM secrets",
    "there is no table of secrets": "DROP TABLE secrets",
    "a secret of another name": "UPDATE secrets SET name = 'other'",
    "a secret that is cut short": "UPDATE secrets SET value = x'0102'",
} | {name: f"UPDATE keys SET {wrong}" for name, wrong in WRONG_COLUMNS.items()}  # noqa: S608
LOOSE = """
    DROP TABLE keys;
    CREATE TABLE keys (id INTEGER PRIMARY KEY, text, created_at, expires_at, release_at, lease, owner,
                       acquired_at, flags, more);
    INSERT INTO keys VALUES (1, 'aaaaaaaaaaaaaaaaaaaa', 1, 4000000000000, 4000000000000, 1, NULL, {});
"""
STORIES |= {
    f"{column} of another type": LOOSE.format(values)
    for column, values in {
        "acquired_at": "'soon', 0, NULL", "flags": "1, 'many', NULL", "no flags": "1, NULL, NULL",
        "more": "1, 0, 'text'", "a number as more": "1, 0, 5",
    }.items()
}  # fmt: skip


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with one key."""
    path = tmp_path_factory.mktemp("whole") / "keypool.db"
    fill(path, [row(1, 3600)], last_lease=1)
    return path


@pytest.mark.parametrize("story", STORIES)
def test_nonsense_about_leases_is_refused_in_one_line(whole_file: Path, path: Path, story: str) -> None:
    """And the file is left as it was."""
    shutil.copy(whole_file, path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.executescript(STORIES[story])
    before = path.read_bytes()
    assert "contradicts itself" in (line := refusal(path)) or "is damaged" in line
    assert "0" * 20 not in line
    assert path.read_bytes() == before


def test_a_server_does_not_start_on_nonsense_about_leases(whole_file: Path, path: Path) -> None:
    """Exit status 1, as for any file of no use; and keypool verify finds it as well."""
    shutil.copy(whole_file, path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.executescript(STORIES["a more that is no MessagePack"])
    assert "contradicts itself: the attempt, history or details of <Key id:1 " in refused_start(path)
    with pytest.raises(Exception, match="is damaged: the attempt, history or details of"):
        copying.verify(path)


@pytest.mark.parametrize("field", ["acquired_at", "flags", "more"])
def test_a_batch_with_another_type_is_damage(path: Path, field: str) -> None:
    """Nobody takes it for one of the older version."""
    fill(path, [row(1)])
    wrong = {"acquired_at": ("x", 0, None), "flags": (None, None, None), "more": (None, 0, 5)}[field]
    with contextlib.closing(datafile.connect(path)) as database:
        batch = msgspec.msgpack.encode([[[*row(1)[:7], *wrong]], [], {}])
        database.execute(datafile.ADD_BATCH, (1, batch))
    assert "is damaged or can't be read: a batch can't be read" in refusal(path)


# ------------------------------------------------------------------------------------------------------- restarts


async def take(engine: EmbeddedEngine, id: int) -> Lease:
    """Acquire this key, by giving back the others."""
    others = []
    while (lease := await engine.acquire("me", 0)).id != id:
        others.append(lease)
    for other in others:
        await engine.unblock(other.id, other.lease)
    return lease


@on_loop
async def test_all_about_leases_is_restored(path: Path, wall: Moment) -> None:
    """Every durable field of every key, the counters, and the orders that are derived from them."""
    rules = {"max_block_seconds": 600, "rest_seconds": 5, "max_quarantined_percent": 100}
    async with opened(path, **rules) as engine:
        leases = []
        for number in range(1, 8):
            await engine.generate(1)
            leases.append(await engine.acquire("me", 0, attempt=Attempt(bytes([number]) * 16)))
        await engine.generate(1)
    async with opened(path, **rules) as engine:  # the rows of these keys are in the table now, and change
        wall.on(1.2345678)
        for lease, report in zip(
            leases, (LIMITED, Report(Outcome.ERROR), INVALID, Report(Outcome.OK)), strict=False
        ):
            await engine.unblock(lease.key, lease.lease, report=report)
        await engine.quarantine(leases[4].id, "why", False, OPERATOR)
        await engine.extend(leases[5].id, leases[5].lease, 300)
        await engine.quarantine(8, "spare", True, OPERATOR)
        before, numbers = durables(engine), engine.numbers()
        rows = [await engine.get(id) for id in range(1, 9)]
    assert {key["state"] for key in before} == {*State} - {State.AVAILABLE}
    async with opened(path, **rules) as engine:
        assert durables(engine) == before
        assert engine.numbers() == numbers
        assert [await engine.get(id) for id in range(1, 9)] == rows
        engine.pool.check()


def durables(engine: EmbeddedEngine) -> list[dict[str, object]]:
    """All durable fields of all keys; the moments of one in the resolution of the file."""
    walk = engine.pool._by_id.walk(None)
    found = [durable(key) for key in walk]
    for each in found:
        if each["state"] is not State.BLOCKED:
            each["acquired_at"] = 0.0  # nobody needs it any more
    for each in found:
        for name in ("created_at", "expires_deadline", "release_deadline", "acquired_at"):
            if each[name] is not None:
                each[name] = pytest.approx(each[name], abs=0.001)
    return found


@on_loop
@pytest.mark.parametrize(("stopped", "left"), [(10.0, 20.0), (29.999, 0.001), (30.001, None), (250.0, None)])
async def test_a_cooldown_goes_on_during_a_stop(
    path: Path, wall: Moment, stopped: float, left: float | None
) -> None:
    """It ends when it would have ended: the key is available then, and not before."""
    async with opened(path) as engine:
        await engine.generate(1)
        lease = await engine.acquire(None, 0)
        await engine.unblock(lease.key, lease.lease, report=LIMITED)
        events = engine.event_seq
    wall.on(stopped)
    async with opened(path) as engine:
        key = await engine.get(1)
        assert key.available_in == (left if left is None else pytest.approx(left, abs=0.0011))
        assert (key.state, key.failures, key.reason) == (
            "available" if left is None else "cooling",
            1,
            "slow down",
        )
        stats = await engine.stats()
        assert (stats.available, stats.cooling, stats.cooled) == ((1, 0, 1) if left is None else (0, 1, 1))
        assert engine.event_seq >= events, "a cursor of events went back"
        wall.on(30)
        assert (await engine.acquire(None, 0)).lease == 2


@on_loop
async def test_a_key_rests_after_a_lease_that_ended_during_a_stop(path: Path, wall: Moment) -> None:
    """From the end of the block, not from the start of the server."""
    async with opened(path, rest_seconds=100) as engine:
        await engine.generate(1)
        await engine.acquire("me", 0)
    wall.on(90)
    async with opened(path, rest_seconds=100) as engine:
        key = await engine.get(1)
        assert (key.state, key.owner) == ("cooling", None)
        assert key.available_in == pytest.approx(70, abs=0.002)
        assert (await engine.stats()).released == 1
    wall.on(70.1)
    async with opened(path, rest_seconds=100) as engine:
        assert (await engine.get(1)).state == "available"
        stats = await engine.stats()
        assert (stats.released, stats.cooled) == (1, 1)


@on_loop
@pytest.mark.parametrize("stopped", [1.0, 61.0])
async def test_a_quarantine_to_come_comes_across_a_stop(path: Path, wall: Moment, stopped: float) -> None:
    """When the lease ends, though that is during the stop; the key is served to nobody."""
    async with opened(path) as engine:
        await engine.generate(1)
        lease = await engine.acquire("me", 0)
        await engine.quarantine(1, "broken", False, OPERATOR)
    wall.on(stopped)
    async with opened(path) as engine:
        if stopped < 60:
            assert (await engine.get(1)).state == "blocked"
            with pytest.raises(LeaseOver):
                await engine.extend(1, lease.lease, 10)
            await engine.unblock(1, lease.lease)
        key = await engine.get(1)
        assert (key.state, key.reason) == ("quarantined", "broken")
    async with opened(path) as engine:
        stats = await engine.stats()
        assert (stats.quarantined, stats.quarantines, stats.available) == (1, 1, 0)
        assert (await engine.restore(1, OPERATOR)).state == "available"
    async with opened(path) as engine:
        key = await engine.get(1)
        assert (key.state, key.reason, key.outcome) == ("available", None, None)


@on_loop
async def test_cooling_and_quarantined_keys_that_expired_during_a_stop_are_purged(
    path: Path, wall: Moment
) -> None:
    """`expires` is above all; a key that was kept alive stays as it was."""
    async with opened(path, max_quarantined_percent=100) as engine:
        await engine.generate(4)
        for id, report in {1: LIMITED, 2: INVALID, 3: INVALID}.items():
            lease = await take(engine, id)
            await engine.unblock(id, lease.lease, report=msgspec.structs.replace(report, reason="seen"))
        wall.on(200)
        await engine.keepalive(3)
    wall.on(100.001)
    for _ in range(2):
        async with opened(path) as engine:
            for id in (1, 2, 4):
                with pytest.raises(UnknownKey):
                    await engine.get(id)
            key = await engine.get(3)
            assert (key.state, key.reason) == ("quarantined", "seen")
            stats = await engine.stats()
            assert (stats.total, stats.cooling, stats.quarantined, stats.expired) == (1, 0, 1, 3)
            engine.pool.check()
    assert [each[0] for each in rows_in(path)] == [3]


@on_loop
async def test_a_lease_that_was_extended_ends_when_it_was_promised(path: Path, wall: Moment) -> None:
    """And no extension goes beyond the cap, which counts from the acquire before the stop."""
    async with opened(path, max_block_seconds=250) as engine:
        await engine.generate(1)
        lease = await engine.acquire("me", 0, block_seconds=20)
        assert (await engine.extend(1, lease.lease, 100)).release_in == 100
    wall.on(90)
    async with opened(path, max_block_seconds=250) as engine:
        assert (await engine.get(1)).release_in == pytest.approx(10, abs=0.002)
        extended = await engine.extend(1, lease.lease, 1000)
        assert [extended.release_in, extended.block_left] == pytest.approx([160, 160], abs=0.002)


@on_loop
async def test_a_lease_reports_once_across_a_restart(path: Path, wall: Moment) -> None:
    """A report that is repeated after it changes nothing; the first one counts, though the block ran out meanwhile."""
    async with opened(path) as engine:
        await engine.generate(2)
        leases = [await take(engine, id) for id in (1, 2)]
        assert (await engine.unblock(1, leases[0].lease, report=LIMITED)).changed
    wall.on(61)
    async with opened(path) as engine:
        assert not (await engine.unblock(1, leases[0].lease, report=INVALID)).changed
        late = await engine.unblock(2, leases[1].lease, report=INVALID)
        assert (late.changed, late.state) == (True, "quarantined")
    async with opened(path) as engine:
        assert [(await engine.get(id)).state for id in (1, 2)] == ["available", "quarantined"]


@on_loop
async def test_failures_in_a_row_go_on_and_are_forgotten_across_a_restart(path: Path, wall: Moment) -> None:
    """The back-off doubles after a restart, and starts again an hour after the last failure."""
    answers = []
    for pause in (0, 70, 130, 3601):
        wall.on(pause)
        async with opened(path, keepalive_seconds=10_000) as engine:
            if not engine.pool.total:
                await engine.generate(1)
            lease = await engine.acquire(None, 0)
            answers.append(await engine.unblock(1, lease.lease, report=Report(Outcome.RATE_LIMITED)))
    assert [answer.available_in for answer in answers] == [60, 120, 240, 60]


@on_loop
async def test_handles_stay_valid_across_a_restart(path: Path, wall: Moment) -> None:
    """And in a backup; another file's are unknown."""
    async with opened(path) as engine:
        await engine.generate(1)
        lease = await engine.acquire(None, 0)
    copying.back_up(path, path.with_name("copy"))
    for place in (path, path.with_name("copy")):
        async with opened(place) as engine:
            handle = engine.handles.read(lease.handle)
            assert handle == (1, lease.lease)
            assert (await engine.unblock(handle, None)).changed
            await engine.acquire(None, 0)
            with pytest.raises(StaleLease):
                await engine.unblock(handle, None)
    async with opened(path.with_name("other")) as engine:
        assert engine.handles.read(lease.handle) is None
    secret = datafile.secret_of(path)
    assert secret is not None
    assert len(secret) == SECRET_BYTES
    assert Handles(secret).make(1, lease.lease) == lease.handle


@on_loop
async def test_an_attempt_gets_its_leases_again_after_a_restart(path: Path, wall: Moment) -> None:
    """Those that are still held, as of now; a new one when none is."""
    async with opened(path) as engine:
        await engine.generate(4)
        single = await engine.acquire("me", 0, attempt=Attempt())
        several = await engine.acquire_many("me", 3, attempt=Attempt(b"b" * 16))
        await engine.unblock(several[1].key, several[1].lease)
    wall.on(20)
    async with opened(path) as engine:
        again = Attempt()
        lease = await engine.acquire("me", 0, attempt=again)
        assert again.replayed
        assert (lease.id, lease.lease, lease.handle) == (single.id, single.lease, single.handle)
        assert lease.release_in == pytest.approx(40, abs=0.002)
        held = await engine.acquire_many("me", 3, attempt=Attempt(b"b" * 16))
        assert {each.lease for each in held} == {several[0].lease, several[2].lease}
    wall.on(41)
    async with opened(path) as engine:
        again = Attempt()
        assert (await engine.acquire("me", 0, attempt=again)).lease == 5
        assert not again.replayed


# ------------------------------------------------------------------------------------------------------- kill -9

PROGRAM = """
import asyncio, os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from keypool.core.events import HOLDER
from keypool.core.outcomes import Outcome, Report
from keypool.core.rules import PoolRules
from keypool.engine.durable.journal import FileJournal
from keypool.engine.durable.opening import open_durable

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def die_when_the_next_commit_is_confirmed():
    FileJournal._answered = die

attempt = SimpleNamespace(digest=b"an attempt is 16", replayed=False)

async def calls(engine):
{calls}

async def main():
    await calls((await open_durable(Path(sys.argv[1]), PoolRules(max_block_seconds=600))).default)
    die()

asyncio.run(main())
"""


def killed_after(path: Path, calls: str) -> list[str]:
    """The words that a process printed that made these calls on the engine of a file, and was killed by kill -9."""
    program = PROGRAM.format(calls=textwrap.indent(textwrap.dedent(calls), "    "))
    ran = subprocess.run(
        [sys.executable, "-c", program, str(path)], check=False, cwd=ROOT, timeout=60, capture_output=True, text=True,
        env=clean_environment({"PYTHONPATH": str(ROOT)}),
    )  # fmt: skip
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    return ran.stdout.split()


@on_loop
async def test_what_was_answered_about_leases_survives_a_kill(path: Path) -> None:
    """A cooldown, an extension, a quarantine and one to come, a report, a handle."""
    words = killed_after(
        path,
        """
        await engine.generate(5)
        leases = sorted(await engine.acquire_many("me", 4), key=lambda lease: lease.id)
        ids = {lease.id for lease in leases}
        limited, invalid, long, pending = leases
        await engine.unblock(limited.id, limited.lease, report=Report(Outcome.RATE_LIMITED, 500.0))
        await engine.unblock(invalid.id, invalid.lease, report=Report(Outcome.INVALID, reason="revoked"))
        await engine.extend(long.id, long.lease, 500)
        await engine.quarantine(pending.id, "broken", False, HOLDER)
        for lease in leases:
            print(lease.id, lease.lease, lease.handle)
        sys.stdout.flush()
        """,
    )
    ids, handles = list(map(int, words[::3])), words[2::3]
    async with opened(path, max_block_seconds=600) as engine:
        limited, invalid, long, pending = [await engine.get(id) for id in ids]
        assert limited.available_in is not None
        assert 400 < limited.available_in <= 500
        assert (invalid.state, invalid.reason) == ("quarantined", "revoked")
        assert long.release_in is not None
        assert 400 < long.release_in <= 500
        assert pending.state == "blocked"
        await engine.unblock(engine.handles.read(handles[3]) or 0, None)
        assert (await engine.get(ids[3])).state == "quarantined"
        again = await engine.unblock(ids[0], int(words[1]), report=INVALID)
        assert (again.changed, again.state) == (False, "cooling"), "a lease reported twice"
        engine.pool.check()


@on_loop
async def test_a_kill_between_commit_and_answer_of_an_acquire_blocks_no_key_for_nobody(path: Path) -> None:
    """The attempt is in the acquire's own commit, so its repeat gets the lease that nobody was told of."""
    killed_after(
        path,
        """
        await engine.generate(3)
        die_when_the_next_commit_is_confirmed()
        await engine.acquire("me", 0, attempt=attempt)
        """,
    )
    async with opened(path) as engine:
        assert (await engine.stats()).blocked == 1
        again = Attempt()
        lease = await engine.acquire("me", 0, attempt=again)
        assert (lease.lease, again.replayed) == (1, True)
        stats = await engine.stats()
        assert (stats.blocked, stats.acquired) == (1, 1)


@on_loop
async def test_a_kill_between_commit_and_answer_of_a_report_counts_it_once(path: Path) -> None:
    """Its repeat changes nothing, and tells how long the key cools."""
    [lease] = killed_after(
        path,
        """
        await engine.generate(1)
        lease = await engine.acquire("me", 0)
        print(lease.lease, flush=True)
        die_when_the_next_commit_is_confirmed()
        await engine.unblock(1, lease.lease, report=Report(Outcome.RATE_LIMITED, 500.0))
        """,
    )
    async with opened(path) as engine:
        answer = await engine.unblock(1, int(lease), report=LIMITED)
        assert (answer.changed, answer.state) == (False, "cooling")
        assert answer.available_in is not None
        assert answer.available_in > 400
        assert (await engine.get(1)).failures == 1


# ------------------------------------------------------------------------------------------------- the writer's side


@on_loop
async def test_a_secret_is_made_once_and_not_from_a_seed(tmp_path: Path) -> None:
    """Two new files have two; a file that is opened again, and one whose writer was replaced, keeps its own."""
    secrets = set()
    for name in ("one", "two", "one"):
        async with opened(tmp_path / name):
            secrets.add(datafile.secret_of(tmp_path / name))
    assert len(secrets) == 2
