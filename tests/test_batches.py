"""What is committed is in the file, however far it is flushed, and wherever a power failure interrupts.

A plain dict says what the file must say after each batch. The batches come from a seed, over real files; the limits
of a flush are small here, so that a few hundred rows are several memtables. That the server's answers survive its
being killed during a flush is in test_crash.py.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
import time
from itertools import pairwise
from pathlib import Path

import pytest
from durable_support import old_file
from engine_support import open_held

from keypool.core.errors import StartError
from keypool.engine.durable import compaction, datafile, file_lock
from keypool.engine.durable.compaction import BatchLog
from keypool.engine.durable.rows import Batch, Row, StoredPool, encode
from keypool.engine.durable.wire import Verdict
from keypool.engine.durable.writer import Writer


class Model:
    """The expected content of the file, and the source of the batches."""

    def __init__(self, seed: int) -> None:
        self.rows: dict[int, Row] = {}
        self.numbers: dict[str, int] = {}
        self._random = random.Random(seed)

    def batch(self) -> Batch:
        """Some keys made, some changed, some purged; one in a while is large."""
        draw = self._random
        size = draw.choice((0, 1, 1, 3, 3, 8, 60))
        made = range(self._last + 1, self._last + 1 + draw.randrange(size + 1))
        changed = draw.sample(sorted(self.rows), min(size, len(self.rows)))
        purged = changed[: draw.randrange(len(changed) + 1)] if draw.random() < 0.4 else []
        rows = [self._row(id) for id in {*made, *changed} - {*purged}]
        draw.shuffle(rows)
        batch = Batch(rows, purged, {"last_id": max(self._last, *made, 0), "moment": draw.randrange(10**12)})
        self.rows = {id: row for id, row in self.rows.items() if id not in purged} | {r[0]: r for r in rows}
        self.numbers |= batch.pool
        return batch

    @property
    def _last(self) -> int:
        return self.numbers.get("last_id", 0)

    def _row(self, id: int) -> Row:
        lease = self._random.randrange(1000)
        held = lease % 3 == 0
        owner, flags, more = ("me", 0, b"x" * 9) if held else (None, lease % 5, None)
        return id, f"{id:020d}", 1, 10**12 + lease, 7 if held else None, lease, owner, lease, flags, more

    def expect(self, path: Path) -> None:
        """Assert that the file has the expected content."""
        assert [row for some in datafile.read_rows(path, 7) for row in some] == sorted(self.rows.values())
        assert datafile.count(path) == len(self.rows)
        assert datafile.inspect(path).numbers == self.numbers


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a file may be made, which is soon flushed."""
    monkeypatch.setattr(compaction, "FLUSH_THRESHOLD_ROWS", 100)
    monkeypatch.setattr(compaction, "MIN_FLUSH_ROWS", 10)
    return tmp_path / "keypool.db"


def opened(path: Path) -> contextlib.closing[sqlite3.Connection]:
    """A connection that writes, closed without flushing anything, as a writer that dies leaves it."""
    return contextlib.closing(datafile.connect(path))


def work(writer: Writer, model: Model, count: int) -> None:
    """Commit so many batches, and flush after each, as the writer process does."""
    for _ in range(count):
        assert writer.commit([encode(model.batch())]) == Verdict()
        writer.flush()


def end(writer: Writer, model: Model, path: Path) -> None:
    """End the writer cleanly; the content of the file is the same before and after."""
    model.expect(path)
    writer.close()
    model.expect(path)


SEEDS = pytest.mark.parametrize(
    "seed", [1, *(pytest.param(seed, marks=pytest.mark.thorough) for seed in (2, 3))]
)


def tables(database: sqlite3.Connection) -> tuple[int, int]:
    """How many keys stand in the table of keys, and how many batches aren't flushed."""
    (keys,) = database.execute("SELECT count(*) FROM keys").fetchone()
    (left,) = database.execute("SELECT count(*) FROM batches").fetchone()
    return keys, left


@SEEDS
def test_the_file_says_the_same_however_far_it_is_flushed(path: Path, seed: int) -> None:
    """After each batch, after each step of a flush, and when the writer died and another goes on."""
    model, draw = Model(seed), random.Random(seed)
    seen = set()
    for _ in range(8):
        with opened(path) as database:
            writing = BatchLog(database)
            for _ in range(draw.randrange(5, 40)):
                writing.commit([encode(model.batch())])
                model.expect(path)
                before = tables(database)
                writing.flush()
                after = tables(database)
                model.expect(path)
                seen.add(
                    "rows" if after[0] != before[0] else "batches" if after[1] < before[1] else "nothing"
                )
    assert seen == {"rows", "batches", "nothing"}, "not all that a flush does was seen"


@SEEDS
def test_a_power_cut_loses_nothing_that_was_committed(path: Path, seed: int) -> None:
    """What a commit wrote is on the disk; of what a flush wrote, any part may be missing at the end of the log."""
    model, draw = Model(seed), random.Random(seed)
    log, cut = path.with_name(f"{path.name}-wal"), path.with_name("cut.db")
    torn = 0
    with opened(path) as database:
        database.execute("PRAGMA wal_autocheckpoint = 0")  # so that the log only grows
        writing = BatchLog(database)
        for _ in range(120):
            writing.commit([encode(model.batch())])
            committed = log.stat().st_size
            writing.flush()
            content = log.read_bytes()
            torn += len(content) > committed
            file_lock.remove(cut)
            shutil.copy(path, cut)
            cut.with_name(f"{cut.name}-wal").write_bytes(content[: draw.randint(committed, len(content))])
            model.expect(cut)
    assert torn > 20, "a flush wrote next to nothing"


def test_batches_do_not_pile_up(path: Path) -> None:
    """A memtable is flushed before the next is as large: what isn't in the tables yet is bounded."""
    with opened(path) as database:
        writing = BatchLog(database)
        rows = [(id, f"{id:020d}", 1, 2, None, 0, None, None, 0, None) for id in range(1, 2001)]
        most = 0
        for round in range(3000):
            writing.commit([encode(Batch([rows[round % 2000]], [], {"last_id": 2000}))])
            writing.flush()
            most = max(most, tables(database)[1])
        a_generation = 100 // (1 + compaction.ROWS_PER_BATCH)
        assert a_generation <= most <= 3 * a_generation


def test_what_is_kept_beside_keys_is_flushed_without_any_key(path: Path) -> None:
    """Definitions of pools and numbers outlive their batches, though no batch of the memtable has a row."""
    with opened(path) as database:
        writing = BatchLog(database)
        definition = StoredPool(3, "openai", {"block_seconds": 20.0})
        writing.commit([encode(Batch([], [], {"note.x": 7}, [definition]))])
        while tables(database)[1] and writing._last < 1000:
            writing.commit([encode(Batch([], [], {"moment": writing._last}))])
            writing.flush()
            if not writing._flushing_until and writing._last % 20:
                continue
            facts = datafile.examine(path)
            assert facts.pools == {3: definition}
            assert facts.numbers["note.x"] == 7
        assert writing._first > 1, "no batch was deleted"


def test_many_changes_are_flushed_in_bounded_steps(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large a batch is: the next one waits for no more than so many rows."""
    monkeypatch.setattr(compaction, "MAX_FLUSH_ROWS", 50)
    with opened(path) as database:
        writing = BatchLog(database)
        rows: list[Row] = [(id, f"{id:020d}", 1, 2, None, 0, None, None, 0, None) for id in range(1, 1001)]
        writing.commit([encode(Batch(rows, [], {"last_id": 1000}))])
        flushed = [0]
        while flushed[-1] < 1000:
            writing.flush()
            flushed.append(tables(database)[0])
        assert {later - before for before, later in pairwise(flushed)} == {50}


def test_a_clean_end_leaves_tables_and_no_batches(path: Path) -> None:
    """So that the tables of a stopped server's file have its keys; one with nothing to flush isn't written."""
    model, writer = Model(4), Writer(path, open_held(path))
    work(writer, model, 60)
    writer.close()
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    model.expect(path)
    with opened(path) as database:
        assert tables(database) == (len(model.rows), 0)
    before = path.read_bytes()
    writer = Writer(path, open_held(path))
    assert writer.probe() == Verdict()
    writer.close()
    assert path.read_bytes() == before


def test_a_grace_is_granted_to_keys_in_tables_and_in_batches(path: Path) -> None:
    """A key may be in a batch only."""
    now = round(time.time() * 1000)
    writer = Writer(path, open_held(path))
    writer.commit(
        [encode(Batch([(1, "a" * 20, now, now + 10, None, 0, None, None, 0, None)], [], {"last_id": 1}))]
    )
    writer.close()
    writer = Writer(path, open_held(path))
    writer.commit(
        [encode(Batch([(2, "b" * 20, now, now + 20, None, 0, None, None, 0, None)], [], {"last_id": 2}))]
    )
    assert writer.grant(now + 5000) == Verdict()
    assert [row[3] for some in datafile.read_rows(path, 9) for row in some] == [now + 5000] * 2
    model = Model(5)
    model.rows = {row[0]: row for some in datafile.read_rows(path, 9) for row in some}
    model.numbers = {"last_id": 2}
    writer.commit([encode(model.batch())])
    model.expect(path)
    writer.close()


def test_a_flush_that_fails_fails_the_next_batch_and_begins_anew(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full shows when rows are flushed: calls get it as with any batch, and nothing is lost."""
    model, writer = Model(6), Writer(path, open_held(path))
    write = BatchLog._write
    for _ in range(30):
        assert writer.commit([encode(model.batch())]) == Verdict()

    def full(self: BatchLog, *rest: object) -> None:
        write(self, *rest)  # type: ignore[arg-type]
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(BatchLog, "_write", full)
        writer.flush()
    model.expect(path)
    unheard = Batch([(10**6, "x" * 20, 1, 2, None, 0, None, None, 0, None)])
    assert writer.commit([encode(unheard)]) == Verdict("database or disk is full")
    model.expect(path)
    work(writer, model, 60)
    end(writer, model, path)


def test_a_file_of_the_first_version_is_read_and_upgraded(path: Path) -> None:
    """It has no batches yet; it gets them with the first batch that is written to it."""
    key = (1, "00000000000000000001", 1, 2, None, 0, None)
    old_file(path, 1, [key])
    model = Model(7)
    model.rows, model.numbers = {1: (*key, None, 0, None)}, datafile.inspect(path).numbers
    model.expect(path)
    writer = Writer(path, open_held(path))
    work(writer, model, 40)
    end(writer, model, path)


@pytest.mark.parametrize("damage", ["x'c1'", "x''", "x'91'", "x'91919101'"])
def test_an_invalid_batch_is_damage(path: Path, damage: str) -> None:
    """In one line, which quotes nothing of it."""
    with opened(path) as database:
        BatchLog(database).commit([encode(Model(8).batch())])
        database.execute(f"UPDATE batches SET batch = {damage}")  # noqa: S608
    with pytest.raises(StartError, match=r"keypool\.db is damaged or can't be read: a batch can't be read$"):
        datafile.inspect(path)
    with pytest.raises(ValueError, match="a row can't be read"):
        list(datafile.read_rows(path, 9))
    with pytest.raises(StartError, match="can't be read: a row can't be read"):
        datafile.count(path)
    with contextlib.closing(Writer(path, open_held(path))) as writer:
        assert writer.commit([encode(Model(8).batch())]) == Verdict("a batch can't be read")
