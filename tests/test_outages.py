"""Outages of storage: what counts as one, and what keys get when it is over.

The engine, its journal and the data file are the program's own; the writer is the test's (`HeldWriter`), so that a
commit takes as long as the test says. Disks that are full, and processes that are stopped or killed, are in
test_disk_faults.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from engine_support import Call, make_pool, on_loop, open_held, turns, turns_until
from held_writer import FULL, Held, HeldWriter, hold_writers, logged, run

from keypool.core.cursor import ListQuery
from keypool.core.errors import NoKeyAvailable, StartError, StorageUnavailable, UnknownKey
from keypool.core.pool import Pool
from keypool.engine import embedded
from keypool.engine.durable import datafile, journal
from keypool.engine.durable.file_lock import log_of
from keypool.engine.durable.opening import open_durable
from keypool.engine.durable.rows import Batch, encode
from keypool.engine.durable.states import Storage
from keypool.engine.durable.wire import Verdict
from keypool.engine.durable.writer import Writer


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[HeldWriter]:
    """Those that a journal starts in this test."""
    return hold_writers(monkeypatch)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits are slow after 20 ms and an outage after 0.2 s."""
    for name, seconds in (("_WATCH", 0.01), ("_SLOW", 0.02), ("_OUTAGE", 0.2)):
        monkeypatch.setattr(journal, name, seconds)


def pass_time(held: Held, seconds: float) -> None:
    """Put the clock forward, and let every timer of a deadline fire."""
    held.clock.on(seconds)
    held.timers.fire()


async def until(held: Held, state: Storage) -> None:
    """Wait for the watch to come to this."""
    for _ in range(20_000):
        if held.journal._storage is state:
            return
        await asyncio.sleep(0.001)
    raise AssertionError(f"storage never was {state}, but {held.journal._storage}")


async def fail(held: Held, text: str) -> None:
    """A keepalive that the disk refuses: storage is down from this moment on."""
    call = Call(held.engine.keepalive(text))
    await turns()
    held.writer.answer(FULL)
    await turns()
    with pytest.raises(StorageUnavailable):
        _ = call.answer


async def recover(held: Held) -> list[Batch]:
    """The disk takes what is tried again; the batches that it took until all was well."""
    await held.writer.batch()
    before = len(held.writer.batches) - 1
    while held.journal.failing is not None:
        await turns_until(lambda: not held.writer.unanswered.empty(), "the next batch")
        held.writer.answer()
        await turns()
    held.timers.turns()
    return held.writer.batches[before:]


def expiries(pool: Pool) -> dict[int, float]:
    """The deadline of every key, by id."""
    return {key.id: key.expires_deadline for key in pool._by_id.walk(None)}


# ------------------------------------------------------------------------------------------------- the grace


def test_an_outage_counts_as_a_stop(writers: list[HeldWriter]) -> None:
    """Keys that were alive when it began live for half a keepalive from its end; of others nothing is revived."""

    async def test() -> None:
        held = await Held(writers).open()
        dead, one, two = await held.made(3)
        held.clock.on(100)
        Call(held.engine.keepalive_many([one, two]))
        await held.commit()
        held.clock.on(200.5)  # the first is dead by now, and its timer late
        await fail(held, two)
        pass_time(held, 1000)
        await turns()
        stats = Call(held.engine.stats()).answer
        assert (stats.total, stats.expired) == (2, 1), "a key expired in the outage, or a dead one was kept"
        for text in (one, two):
            with pytest.raises(StorageUnavailable):
                _ = Call(held.engine.get(text)).answer
        assert Call(held.engine.page(ListQuery())).answer.keys == [], "listed though its deadline has passed"
        await recover(held)
        assert expiries(held.engine.pool) == dict.fromkeys((2, 3), held.clock() + 150)
        assert Call(held.engine.get(one)).answer.expires_in == 150
        with pytest.raises(UnknownKey):
            _ = Call(held.engine.get(dead)).answer
        held.engine.pool.check()
        pass_time(held, 150.1)
        await held.commit()
        assert Call(held.engine.stats()).answer.expired == 3, "the grace has no end"

    run(test)


@pytest.mark.parametrize(("restart_grace", "grace"), [(0.0, 150.0), (200.0, 200.0), (20.0, 150.0)])
def test_a_grace_is_the_larger_of_two_and_makes_no_key_die_sooner(
    writers: list[HeldWriter], restart_grace: float, grace: float
) -> None:
    """Half the keepalive, or --restart-grace."""

    async def test() -> None:
        held = await Held(writers, restart_grace=restart_grace).open()
        one, two = await held.made(2)
        held.clock.on(250)
        Call(held.engine.keepalive(one))
        await held.commit()
        longer = expiries(held.engine.pool)[1]
        held.clock.on(10)
        await fail(held, one)
        held.clock.on(20)
        await recover(held)
        now = held.clock()
        assert expiries(held.engine.pool) == {1: max(longer + 10, now + grace), 2: now + grace}
        assert two

    run(test)


def test_the_grace_is_on_disk_before_anything_is_answered(writers: list[HeldWriter], tmp_path: Path) -> None:
    """A crash right after the outage loses no key: what the writer was sent, written to a file, says so."""

    async def test() -> None:
        held = await Held(writers).open()
        one, two = await held.made(2)
        written = list(held.writer.batches)
        held.clock.on(290)
        await fail(held, two)
        held.clock.on(100)
        await held.writer.batch()
        held.writer.answer()
        await turns()
        with pytest.raises(StorageUnavailable):
            held.engine.ready()  # the grace isn't on disk
        taken = await recover(held)
        held.engine.ready()
        path = tmp_path / "keypool.db"
        writer = Writer(path, open_held(path))
        for batch in (*written, *taken):
            assert writer.commit([encode(batch)]) == Verdict()
        for folded in (False, True):
            if folded:
                writer.close()
            rows = [row for some in datafile.read_rows(path, 9) for row in some]
            assert [row[3] for row in rows] == [round((held.clock() + 150) * 1000)] * 2
        assert datafile.GRACE not in datafile.inspect(path).numbers
        assert one

    run(test)


def test_an_outage_within_the_recovery_is_one_outage(writers: list[HeldWriter]) -> None:
    """The grace counts from the end of the last failure."""

    async def test() -> None:
        held = await Held(writers).open()
        [text] = await held.made()
        held.clock.on(290)
        await fail(held, text)
        held.clock.on(20)
        await held.writer.batch()
        held.writer.answer()
        await turns_until(lambda: not held.writer.unanswered.empty(), "the grace")
        held.writer.answer(FULL)
        pass_time(held, 500)
        assert Call(held.engine.stats()).answer.total == 1
        await recover(held)
        assert expiries(held.engine.pool) == {1: held.clock() + 150}

    run(test)


@on_loop
async def test_a_grace_for_many_keys_does_not_stall_the_loop() -> None:
    """It is granted in slices, soonest first, and what each slice costs doesn't grow with the pool."""
    now = 1000.0
    pool = make_pool()
    for number in range(30_000):
        pool.generate(now + number / 1000)
    pool.suspend_expiry(now + 100)
    slices = []
    more = True
    while more:
        began = time.thread_time()
        more = pool.grant_grace(now + 2000, embedded._GRACES_PER_TURN)
        slices.append(time.thread_time() - began)
    assert len(slices) == 30_000 // embedded._GRACES_PER_TURN + 1
    assert sorted(slices)[len(slices) // 2] < 0.02, "a slice is more than a turn of the loop"
    assert set(expiries(pool).values()) == {now + 2000}
    pool.resume_expiry()
    pool.check()


# ---------------------------------------------------------------------------------------- commits that take long


@pytest.mark.usefixtures("short")
def test_a_commit_that_takes_too_long_is_an_outage(
    writers: list[HeldWriter], caplog: pytest.LogCaptureFixture
) -> None:
    """Who waits gets 503, who comes gets 503 at once; when it gets through all is well again, with the grace."""

    async def test() -> None:
        held = await Held(writers).open()
        one, two = await held.made(2)
        held.clock.on(200)
        calls: list[Call[Any]] = [Call(held.engine.keepalive(one))]
        await turns()
        calls.append(Call(held.engine.acquire(None, 0)))
        read = Call(held.engine.get(one))
        await until(held, Storage.DOWN)
        for call in (*calls, read):
            with pytest.raises(StorageUnavailable, match="a commit has taken over"):
                _ = call.answer
        with pytest.raises(StorageUnavailable):
            held.engine.ready()
        with pytest.raises(StorageUnavailable):
            _ = Call(held.engine.keepalive(one)).answer
        measures: dict[str, Any] = {**held.journal.measures()}
        assert measures["keypool_commit_age_seconds"] >= 0.2
        assert measures["keypool_storage_failing_seconds"] > 0
        assert len(logged(caplog, logging.ERROR)) == 1
        pass_time(held, 500)
        batches = await recover(held)
        assert len(held.writer.batches) > 1
        assert [row[0] for row in batches[0].rows] == [1], "the batch was sent twice"
        held.engine.ready()
        measures = {**held.journal.measures()}
        assert measures["keypool_commit_age_seconds"] == measures["keypool_storage_failing_seconds"] == 0
        assert expiries(held.engine.pool) == dict.fromkeys((1, 2), held.clock() + 150)
        assert two

    run(test)


def test_expiries_wait_for_a_slow_commit(
    writers: list[HeldWriter], short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may become an outage. If it doesn't, deadlines count as ever: nothing is revived."""

    async def test() -> None:
        monkeypatch.setattr(journal, "_OUTAGE", 60.0)
        held = await Held(writers).open()
        one, two = await held.made(2)
        held.clock.on(290)
        slow = Call(held.engine.keepalive(two))
        await turns()
        await until(held, Storage.SLOW)
        pass_time(held, 20)
        assert Call(held.engine.stats()).answer.total == 2
        held.engine.ready()
        with pytest.raises(StorageUnavailable, match="whether this key has expired"):
            _ = Call(held.engine.keepalive(one)).answer
        leased = Call(held.engine.acquire(None, 0))
        with pytest.raises(
            StorageUnavailable
        ):  # the only key that is left has expired, or will have been saved
            _ = Call(held.engine.acquire(None, 0)).answer
        waiting = Call(held.engine.acquire(None, 5))
        held.writer.answer()
        await turns()
        held.timers.turns()
        await held.commit()
        assert slow.over
        assert leased.answer.key == two
        assert Call(held.engine.stats()).answer.expired == 1
        with pytest.raises(UnknownKey):
            _ = Call(held.engine.get(one)).answer
        held.timers.fire()
        await held.commit()
        with pytest.raises((NoKeyAvailable, StorageUnavailable)):
            _ = waiting.answer

    run(test)


@pytest.mark.usefixtures("short")
def test_a_stop_whose_last_commit_hangs_says_so_and_kills_the_writer(writers: list[HeldWriter]) -> None:
    """Cancelled at the end of the drain, `close` raises instead of waiting on."""

    async def test() -> None:
        held = await Held(writers).open()
        Call(held.engine.generate(1))
        await turns()
        closing = asyncio.ensure_future(held.engine.close())
        await turns()
        assert not closing.done()
        closing.cancel()
        with pytest.raises(StorageUnavailable, match="the last commit was not made"):
            await closing
        assert held.writer.killed

    run(test)


def test_a_large_batch_waits_for_the_writer(
    writers: list[HeldWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than a part of it is in memory twice: the next one is written down when the one before has left."""

    async def test() -> None:
        monkeypatch.setattr(journal, "_PART_ROWS", 2)
        held = await Held(writers).open()
        held.writer.full = True
        Call(held.engine.generate(5))
        await turns()
        assert len(held.writer.batches) == 1
        for sent in (2, 3):
            held.writer.drained()
            await turns()
            assert len(held.writer.batches) == sent
        held.writer.answer_all()
        await turns()
        assert Call(held.engine.get(5)).over

    run(test)


@on_loop
async def test_an_idle_writer_reports_that_the_file_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a call that changes anything."""
    monkeypatch.setattr(journal, "_UNSEEN", 0.05)
    monkeypatch.setattr(journal, "_WATCH", 0.02)
    path = tmp_path / "keypool.db"
    engine = (await open_durable(path)).default
    counted = engine.journal.histograms()["commit_seconds"].count
    await engine.generate(1)
    logging.getLogger("keypool.journal").setLevel(logging.CRITICAL)
    try:
        path.rename(tmp_path / "elsewhere")
        for _ in range(3000):
            if not engine.storage_up():
                break
            await asyncio.sleep(0.01)
        assert "deleted, moved or replaced" in str(engine.journal.failing)
        (tmp_path / "elsewhere").rename(path)
        for _ in range(3000):
            if engine.storage_up():
                break
            await asyncio.sleep(0.01)
        assert (await engine.generate(1))[0].id == 2
    finally:
        logging.getLogger("keypool.journal").setLevel(logging.NOTSET)
    assert engine.journal.histograms()["commit_seconds"].sum < 60, (
        "the probe was measured from the start of the machine"
    )
    assert engine.journal.histograms()["commit_seconds"].count > counted
    await engine.close()
    assert len([row for some in datafile.read_rows(path, 9) for row in some]) == 2


# -------------------------------------------------------------------------------------- names that go elsewhere


def test_a_log_that_was_deleted_is_noticed_and_nothing_is_lost(tmp_path: Path) -> None:
    """What it held goes into the file; the next batch has a new log."""
    path = tmp_path / "keypool.db"
    writer = Writer(path, open_held(path), check_seconds=0)
    assert writer.commit([encode(Batch([], [], {"last_id": 3}))]) == Verdict()
    log_of(path).unlink()
    assert "its log was deleted" in str(writer.commit([encode(Batch([], [], {"last_id": 4}))]).error)
    assert datafile.inspect(path).numbers == {"last_id": 3}
    assert writer.commit([encode(Batch([], [], {"last_id": 5}))]) == Verdict()
    assert log_of(path).exists()
    writer.close()
    assert datafile.inspect(path).numbers == {"last_id": 5}


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_no_commit_goes_to_a_file_without_its_name(tmp_path: Path, how: str) -> None:
    """Nor is another file made or touched in its place."""
    path = tmp_path / "keypool.db"
    writer = Writer(path, open_held(path), check_seconds=0)
    assert writer.commit([encode(Batch([], [], {"last_id": 3}))]) == Verdict()
    away, other = tmp_path / "away", tmp_path / "other"
    path.rename(away)
    if how == "replaced":
        with contextlib.closing(datafile.connect(other)) as database:
            database.execute(datafile.SET_POOL, ("last_id", 99))
        other.rename(path)
    for _ in range(2):
        assert "deleted, moved or replaced" in str(writer.commit([encode(Batch())]).error)
        assert path.exists() == (how == "replaced")
    assert datafile.inspect(away).numbers == {"last_id": 3}, "what was told is not in the file itself"
    if how == "replaced":
        assert datafile.inspect(path).numbers == {"last_id": 99}, (
            "the log of one file was taken for the other's"
        )


# ---------------------------------------------------------------------------------------------- incomplete copies


def copy(path: Path, to: Path, *endings: str) -> Path:
    """The bytes of a file and of what stands beside it, as `cp` copies them."""
    for ending in ("", *endings):
        Path(f"{to}{ending}").write_bytes(Path(f"{path}{ending}").read_bytes())
    return to


def test_a_live_file_copied_without_its_log_is_refused(tmp_path: Path) -> None:
    """At any moment, whatever checkpoints there were; with its log it is whole, and so is a copy made by SQLite."""
    path = tmp_path / "keypool.db"
    writer = Writer(path, open_held(path))
    for number in range(1, 401):
        row = (number, f"{number:020d}", 1, 2, None, 0, None, None, 0, None)
        assert writer.commit([encode(Batch([row], [], {"last_id": number, "pad": 7}))]) == Verdict()
        writer.flush()
        if number % 40 == 1:
            assert writer._database is not None
            if number % 80 == 1:
                writer._database.execute("PRAGMA wal_checkpoint(PASSIVE)")
                writer.flush()
            bare = copy(path, tmp_path / f"bare{number}")
            before = bare.read_bytes()
            with pytest.raises(StartError, match="incomplete"):
                datafile.inspect(bare)
            assert bare.read_bytes() == before
            assert sorted(tmp_path.glob("bare*-*")) == []
            assert (
                datafile.inspect(copy(path, tmp_path / f"whole{number}", "-wal")).numbers["last_id"] == number
            )
            for how in ("VACUUM", "backup"):
                made = tmp_path / f"{how}{number}"
                with contextlib.closing(sqlite3.connect(path)) as source:
                    if how == "VACUUM":
                        source.execute("VACUUM INTO ?", (str(made),))
                    else:
                        with contextlib.closing(sqlite3.connect(made)) as target:
                            source.backup(target)
                assert datafile.inspect(made).numbers["last_id"] == number
    crashed = copy(path, tmp_path / "crashed", "-wal")
    with contextlib.closing(sqlite3.connect(crashed)) as shell:  # an operator looks, which brings the log in
        assert shell.execute("SELECT count(*) FROM batches").fetchone()[0] > 0
    assert not log_of(crashed).exists()
    assert datafile.inspect(crashed).numbers["last_id"] == 400
    writer.close()
    assert datafile.inspect(path).numbers["last_id"] == 400
    assert datafile.inspect(copy(path, tmp_path / "closed")).numbers["last_id"] == 400


# ------------------------------------------------------------------------------------------------------ the start


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), None], ids=["not started", "died"])
def test_a_writer_that_does_not_start_is_one_line(
    writers: list[HeldWriter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError | None
) -> None:
    """A StartError that says which file and why, as `server.py` prints it."""

    async def test() -> None:
        async def start(*args: Any) -> HeldWriter:
            if error is not None:
                raise error
            writer = HeldWriter(*args[2:])
            asyncio.get_running_loop().call_soon(writer.die)
            return writer

        monkeypatch.setattr("keypool.engine.durable.journal.WriterLink.start", start)
        path = tmp_path / "keypool.db"
        with pytest.raises(StartError, match=f"{path}.*(Too many open files|writer process died)"):
            await open_durable(path)

    run(test)
