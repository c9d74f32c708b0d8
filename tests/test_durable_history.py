"""The history of keys in the data file: restarts, outages, flushes, and what is deleted when.

What is recorded is tested in test_key_history.py. Files here are flushed by a writer in this process, whose limits are
small, so that some hundred leases are several memtables.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import sqlite3
from pathlib import Path
from signal import SIGSTOP

import pytest
from durable_support import hold_clocks, numbers_in, old_file, opened, opened_pools
from engine_support import BLOCK, Call, Moment, on_loop, open_held, turns
from held_writer import FULL, Held, hold_writers, run

from keypool.core.answers import HistoryRow
from keypool.core.cursor import HistoryQuery
from keypool.core.errors import StorageUnavailable, UnknownKey
from keypool.core.events import By, Origin
from keypool.core.history import How
from keypool.core.outcomes import Outcome, Report
from keypool.engine.durable import compaction, copying, datafile
from keypool.engine.durable.compaction import BatchLog
from keypool.engine.durable.rows import POOL_SHIFT, Batch, Past, StoredPool, encode
from keypool.engine.durable.wire import HistoryReply, HistoryRequest, Verdict
from keypool.engine.durable.writer import Writer
from keypool.engine.embedded import EmbeddedEngine

ADMIN = Origin(By.OPERATOR, "ops")
FULL_HISTORY = {"history_leases": 1000}
ANY = (1 << 63) - 1
LATE = Report(Outcome.INVALID, reason="401")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a data file may be made."""
    return tmp_path / "keypool.db"


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Moment:
    """The clock of all engines that are opened in the test."""
    return hold_clocks(monkeypatch)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memtables are small."""
    monkeypatch.setattr(compaction, "FLUSH_THRESHOLD_ROWS", 100)
    monkeypatch.setattr(compaction, "MIN_FLUSH_ROWS", 10)


async def history(engine: EmbeddedEngine, id: int = 1) -> list[HistoryRow]:
    """The first page of a key's history."""
    return (await engine.history(id, HistoryQuery())).history


def tables_of(path: Path) -> tuple[int, int]:
    """How many leases stand in each of the two tables."""
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
        [leases], [ends] = (
            database.execute(f"SELECT count(*) FROM {table}").fetchone()  # noqa: S608 - constants
            for table in ("history", "ends")
        )
    return leases, ends


# ------------------------------------------------------------------------------------------------------- restarts


@on_loop
async def test_the_history_survives_restarts_and_is_the_same_after_them(path: Path, wall: Moment) -> None:
    """Of all pools, with who held a key, how it ended, and how often it was extended before and after a restart."""
    async with opened_pools(path, max_block_seconds=600.0) as pools:
        await pools.change("default", FULL_HISTORY, ADMIN)
        await pools.put("openai", {}, ADMIN)
        for engine in (pools.default, pools.get("openai")):
            await engine.generate(1)
            lease = await engine.acquire("worker-7", 0)
            wall.on(1.25)
            await engine.unblock(1, lease.lease, None, Report(Outcome.ERROR, reason="500"))
            lease = await engine.acquire("worker-8", 0)
        await pools.default.extend(1, lease.lease, 300)
        before = await history(pools.default)
        assert (await history(pools.get("openai"))) == [
            HistoryRow(
                1, "worker-7", None, *_moments(before[0], 1.25), 1.25, How.UNBLOCKED, Outcome.ERROR, "500", 0
            )
        ]
    async with opened_pools(path, max_block_seconds=600.0) as pools:
        assert await history(pools.default) == before
        assert pools.default.history_kept == pools.get("openai").history_kept == 1
        assert pools.row("default").settings["history_leases"] == 1000
        await pools.default.extend(1, 2, 400)
        await pools.default.unblock(1, None, None, None, ADMIN)
        newest, *rest = await history(pools.default)
        assert (newest.how, newest.extended, rest) == (How.REVOKED, 2, before)


def _moments(row: HistoryRow, later: float) -> tuple[str, str]:
    """Moments of a lease that began when another one, of the same length, ended."""
    second = float(row.ended_at[-7:-1])
    return row.ended_at, f"{row.ended_at[:-7]}{second + later:06.3f}Z"


@on_loop
async def test_leases_that_ended_while_no_server_ran_are_recorded_at_the_next_start(
    path: Path, wall: Moment
) -> None:
    """As released, at their deadlines, also those of keys that expired meanwhile; and once, however often it starts."""
    async with opened(path) as engine:
        engine.set_rules(engine.rules.of_default(FULL_HISTORY))
    wall.on(1)
    async with opened_pools(path) as pools:
        await pools.change("default", FULL_HISTORY, ADMIN)
        engine = pools.default
        await engine.generate(2)
        await engine.acquire("ann", 0)
        wall.on(30)
        await engine.keepalive(1)
        await engine.acquire("bob", 0)
    wall.on(310)
    for _ in range(2):
        async with opened(path) as engine:
            rows = [row for id in (1, 2) for row in await history(engine, id)]
            assert [(row.how, row.held) for row in rows] == [(How.RELEASED, BLOCK)] * 2
            assert engine.history_kept == 2


@on_loop
async def test_a_late_report_is_added_to_what_is_on_disk(path: Path, wall: Moment) -> None:
    """Across a restart, and whether or not the record was flushed."""
    async with opened_pools(path) as pools:
        await pools.change("default", FULL_HISTORY, ADMIN)
        await pools.default.generate(1)
        await pools.default.acquire("ann", 0)
        wall.on(BLOCK + 1)
        assert [row.outcome for row in await history(pools.default)] == [None]
        await pools.default.unblock(1, 1, None, LATE)
        assert [row.outcome for row in await history(pools.default)] == [Outcome.INVALID]
        await pools.default.restore(1, ADMIN)
        await pools.default.acquire("bob", 0)
        wall.on(BLOCK + 1)
        await pools.default.get(1)
    async with opened(path) as engine:
        await engine.unblock(1, 2, None, LATE)
    async with opened(path) as engine:
        rows = await history(engine)
        assert [(row.how, row.outcome, row.reason) for row in rows] == [
            (How.RELEASED, Outcome.INVALID, "401")
        ] * 2


@on_loop
async def test_what_was_answered_is_in_the_history_after_a_crash(path: Path, wall: Moment) -> None:
    """Once, with all of it: the file and its log as they are at any moment are a file to start with."""
    async with opened_pools(path, max_block_seconds=600.0) as pools:
        await pools.change("default", FULL_HISTORY, ADMIN)
        await pools.default.generate(1)
        wanted: list[HistoryRow] = []
        for number in range(3):
            lease = await pools.default.acquire("ann", 0)
            await pools.default.extend(1, lease.lease, 300)
            wall.on(1)
            await pools.default.unblock(1, lease.lease, None, LATE if number == 2 else None)
            wanted = await history(pools.default)
            crashed = path.with_name(f"{number}.db")
            for name in ("", "-wal"):
                shutil.copy(f"{path}{name}", f"{crashed}{name}")
            async with opened_pools(crashed) as others:
                assert await history(others.default) == wanted
                assert others.default.history_kept == number + 1
        assert [row.extended for row in wanted] == [1, 1, 1]


@on_loop
async def test_a_file_of_version_4_gets_an_empty_history(path: Path) -> None:
    """And what happens from then on is recorded."""
    old_file(path, 4, [(1, "a" * 20, 1_000, 9_000_000_000_000, None, 0, None, None, 0, None)])
    async with opened_pools(path) as pools:
        assert (await history(pools.default), pools.default.history_kept) == ([], 0)
        await pools.change("default", FULL_HISTORY, ADMIN)
        lease = await pools.default.acquire("ann", 0)
        await pools.default.unblock(1, lease.lease)
        assert len(await history(pools.default)) == 1
    assert datafile.version_of(path) == datafile.VERSION


@on_loop
async def test_a_backup_has_the_history_too(path: Path) -> None:
    """Of a file that is served."""
    copy = path.with_name("copy.db")
    async with opened_pools(path) as pools:
        await pools.change("default", FULL_HISTORY, ADMIN)
        await pools.default.generate(1)
        await pools.default.acquire("ann", 0)
        await pools.default.unblock(1, None)
        rows = await history(pools.default)
        copying.back_up(path, copy)
    async with opened(copy) as engine:
        assert await history(engine) == rows


# ---------------------------------------------------------------------------------------------------- the journal


def test_the_end_of_a_lease_is_committed_with_the_change_of_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one batch. One that failed is repeated with it, and then no more."""

    async def test() -> None:
        held = await Held(hold_writers(monkeypatch), history_leases=5).open()
        key, lease = (await held.made())[0], 1
        await held.acquired("ann")
        ended = Call(held.engine.unblock(key, lease))
        await turns()
        failed = held.writer.answer(FULL)
        await turns()
        assert [(row[0], row[7]) for row in failed.rows] == [(1, None)]
        assert [(past.key, past.lease, past.number, past.owner) for past in failed.past] == [(1, 1, 1, "ann")]
        assert failed.pool["history_last"] == 1
        with pytest.raises(StorageUnavailable):
            _ = ended.answer
        repeated = await held.writer.batch()
        assert repeated.past == failed.past
        held.writer.answer()
        while held.engine.journal.failing is not None:
            await held.writer.batch()
            held.writer.answer()
            await turns()
        await held.commit()
        made = Call(held.engine.generate(1))
        await turns()
        assert held.writer.answer().past == []
        assert len(made.answer) == 1

    run(test)


def test_a_pool_that_keeps_no_history_has_no_more_in_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither leases nor numbers of them."""

    async def test() -> None:
        held = await Held(hold_writers(monkeypatch)).open()
        key = (await held.made())[0]
        await held.acquired()
        Call(held.engine.unblock(key, 1))
        await turns()
        batch = held.writer.answer()
        assert (batch.past, [name for name in batch.pool if "history" in name]) == ([], [])

    run(test)


async def held_once(engine: EmbeddedEngine) -> None:
    """Make two keys of which the first has been held, and the second is."""
    await engine.generate(2)
    leases = [await engine.acquire("ann", 0) for _ in range(2)]
    await engine.unblock(1, next(lease.lease for lease in leases if lease.id == 1))


async def until_stored(engine: EmbeddedEngine) -> None:
    """Wait until storage works again."""
    for _ in range(3000):
        if engine.journal.failing is None:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("storage works never again")


def test_a_history_is_read_while_batches_fail(path: Path) -> None:
    """As of the last commit. Calls that change something are refused meanwhile."""

    async def test() -> None:
        async with opened_pools(path) as pools:
            await pools.change("default", FULL_HISTORY, ADMIN)
            engine = pools.default
            await held_once(engine)
            engine.journal._file._failed(FULL)  # type: ignore[attr-defined]
            with pytest.raises(StorageUnavailable):
                await engine.unblock(2, None)
            page = Call(engine.history(1, HistoryQuery()))
            assert engine.journal.failing is not None
            await page.waited_for[-1]
            assert len(page.answer.history) == 1
            await until_stored(engine)

    run(test)


def test_a_page_fails_with_its_writer_and_the_next_one_is_read_by_another(path: Path) -> None:
    """A call that asked a writer that dies gets an answer all the same: 503."""

    async def test() -> None:
        async with opened_pools(path) as pools:
            await pools.change("default", FULL_HISTORY, ADMIN)
            engine = pools.default
            await held_once(engine)
            writer = engine.journal._file._writer  # type: ignore[attr-defined]
            writer.process.send_signal(SIGSTOP)  # so that it can't answer before it dies
            page = asyncio.ensure_future(engine.history(1, HistoryQuery()))
            await turns()
            assert not page.done()
            writer.kill()
            with pytest.raises(StorageUnavailable, match="the writer process ended"):
                await page
            with pytest.raises(StorageUnavailable, match="is started again"):
                await history(engine)
            await until_stored(engine)
            assert len(await history(engine)) == 1

    run(test)


# ------------------------------------------------------------------------------------------------------- the file


class Model:
    """What the file must say: batches from a seed, and a plain list of all ends of each pool."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self.ends: dict[int, list[Past]] = {0: [], 3: []}
        self.firsts = {0: 1, 3: 1}
        self._leases = 0

    def batch(self) -> Batch:
        """Some leases ended, some had a late report, some must go."""
        draw, past = self._draw, []
        for _ in range(draw.choice((1, 1, 3, 40))):
            self._leases += 1
            pool = draw.choice((0, 3))
            ends = self.ends[pool]
            key = pool << POOL_SHIFT | draw.randrange(1, 6)
            lease = Past(key, self._leases, len(ends) + 1, 5, 6, draw.randrange(5), 0, "me", None, None, None)
            ends.append(lease)
            past.append(Past(*lease.__reduce__()[1]))
            if draw.random() < 0.3:
                late = draw.choice(ends)
                late.outcome, late.reason = draw.randrange(4), f"reason {self._leases}"
                past.append(Past(late.key, late.lease, 0, 0, 0, 0, 0, None, None, late.outcome, late.reason))
            if len(ends) >= self.firsts[pool] + 100:
                self.firsts[pool] = len(ends) - 99
        if draw.random() < 0.02:
            self.firsts[0] = max(1, len(self.ends[0]) - draw.randrange(20))
        numbers = {"history_first": self.firsts[0], "3/history_first": self.firsts[3]}
        return Batch([], [], numbers, [], past)

    def expect(self, log: BatchLog) -> None:
        """Assert that each key has the history that it must have."""
        pool = self._draw.choice((0, 3))
        first, key = self.firsts[pool], pool << POOL_SHIFT | self._draw.randrange(1, 6)
        wanted = [past for past in self.ends[pool][first - 1 :] if past.key == key][::-1]
        assert log.history(key, ANY, 1000, first) == wanted
        if wanted:
            before, count = self._draw.choice(wanted).lease, self._draw.randrange(1, 5)
            older = [past for past in wanted if past.lease < before]
            assert log.history(key, before, count, first) == older[:count]


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("seed", [1, 2])
def test_a_history_is_the_same_however_far_it_is_flushed(path: Path, seed: int) -> None:
    """After each step, and when the writer died and another goes on; and the tables hold little that doesn't count."""
    model = Model(seed)
    flushed = 0
    for _ in range(4):
        with contextlib.closing(datafile.connect(path)) as database:
            log = BatchLog(database)
            for _ in range(40):
                log.commit([encode(model.batch())])
                model.expect(log)
                log.flush()
                model.expect(log)
                flushed = max(flushed, tables_of(path)[0])
    assert 200 <= flushed <= 600
    with contextlib.closing(datafile.connect(path)) as database:
        log = BatchLog(database)
        log.flush_all()
        log = BatchLog(database)
        model.expect(log)
    kept = sum(len(model.ends[pool]) + 1 - model.firsts[pool] for pool in (0, 3))
    assert tables_of(path)[0] == tables_of(path)[1] >= kept


def ended(count: int, pool: int = 0) -> list[Past]:
    """So many leases of ten keys of a pool."""
    return [
        Past(pool << POOL_SHIFT | number % 10 + 1, number, number, 5, 6, 0, 0)
        for number in range(1, count + 1)
    ]


@pytest.mark.usefixtures("soon")
def test_what_is_too_much_goes_in_steps_even_if_nothing_else_happens(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shorter history, and that of a pool that is gone; nothing of it can be read before."""
    monkeypatch.setattr(compaction, "IDLE_ROWS", 50)
    monkeypatch.setattr(compaction, "MAX_FLUSH_ROWS", 50)
    definition = StoredPool(3, "openai")
    numbers = {"history_first": 1, "3/history_first": 1}
    writer = Writer(path, open_held(path))
    writer.commit([encode(Batch([], [], numbers, [definition], ended(400) + ended(300, 3)))])
    writer.close()
    assert tables_of(path) == (700, 700)
    writer = Writer(path, open_held(path))
    assert len(writer.history(HistoryRequest(1, ANY, 500, 391)).leases) == 1
    writer.commit([encode(Batch([], [], {"history_first": 391}, [StoredPool(0, "default"), StoredPool(3)]))])
    seen = [700]
    while seen[-1] > 10:
        assert writer.look() == Verdict()
        writer.flush(idle=True)
        seen.append(tables_of(path)[0])
        assert seen[-2] - seen[-1] <= 50
        assert len(seen) < 100, "it goes too slowly"
    assert tables_of(path) == (10, 10)
    writer.close()
    with contextlib.closing(datafile.connect(path)) as database:
        assert BatchLog(database)._untrimmed == {0: None}


@pytest.mark.usefixtures("soon")
def test_a_pool_that_is_gone_leaves_no_history_whenever_the_writer_dies(path: Path) -> None:
    """Another writer finds leases of a pool that isn't defined, and goes on."""
    writer = Writer(path, open_held(path))
    numbers = {"history_first": 1, "3/history_first": 1}
    writer.commit([encode(Batch([], [], numbers, [StoredPool(3, "openai")], ended(50) + ended(300, 3)))])
    writer.close()
    with contextlib.closing(datafile.connect(path)) as database:
        for statement in datafile.FORGET_POOL:
            database.execute(statement, (3,))
    writer = Writer(path, open_held(path))
    writer.commit([encode(Batch([], [], {"moment": 1}))])
    for _ in range(20):
        writer.flush(idle=True)
    assert tables_of(path) == (50, 50)
    writer.close()


def test_a_history_that_cannot_be_read_is_an_error_and_not_the_end_of_the_writer(path: Path) -> None:
    """The next batch is committed, and the next page is read."""
    writer = Writer(path, open_held(path))
    writer.commit([encode(Batch([], [], {"history_first": 1}, [], ended(20)))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datafile, "PAST_OF_KEY", "SELECT nothing")
        assert "nothing" in (writer.history(HistoryRequest(1, ANY, 5, 1)).error or "")
    assert writer.commit([encode(Batch([], [], {"moment": 1}))]) == Verdict()
    assert [past.lease for past in writer.history(HistoryRequest(1, ANY, 5, 1)).leases] == [20, 10]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datafile, "ADD_BATCH", "INSERT INTO nothing VALUES (?, ?)")
        assert writer.commit([encode(Batch())]).error is not None
        assert writer.history(HistoryRequest(1, ANY, 1, 1)) == HistoryReply(ended(20)[-1:])
    writer.close()


@on_loop
async def test_a_deleted_pool_takes_its_history_with_it(path: Path) -> None:
    """One that is made again under its name has none."""
    async with opened_pools(path) as pools:
        await pools.put("openai", {}, ADMIN)
        engine = pools.get("openai")
        await engine.generate(1)
        await engine.acquire("ann", 0)
        await engine.delete(1, ADMIN)
        assert len(await history(engine)) == 1
        assert await pools.delete("openai", drain=False, now=False, origin=ADMIN)
        await pools.put("openai", {}, ADMIN)
        with pytest.raises(UnknownKey):
            await history(pools.get("openai"))
    assert tables_of(path) == (0, 0)
    assert numbers_in(path)["last_pool"] == 2
