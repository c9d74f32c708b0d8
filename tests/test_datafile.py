"""The data file and its writer: format, restore, files that are refused, backups."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from signal import SIGINT, SIGTERM

import pytest
from durable_support import (
    ROWS,
    Load,
    crash,
    durable_server,
    fill,
    make_whole_file,
    numbers_in,
    opened,
    refusal,
    refused_start,
    row,
    rows_in,
    table_of,
    texts_of,
)
from engine_support import Moment, on_loop, open_held
from support import ROOT

from keypool.core.errors import StartError, UnknownKey
from keypool.engine.clock import make_clock
from keypool.engine.durable import datafile, file_lock, opening
from keypool.engine.durable.rows import Batch, encode
from keypool.engine.durable.wire import Kind, Verdict, decode_verdict, frame, read_frame
from keypool.engine.durable.writer import Writer
from keypool.engine.embedded import EmbeddedEngine


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data file of some pages, as a clean stop leaves it."""
    return make_whole_file(tmp_path_factory.mktemp("whole"))


# ------------------------------------------------------------------------------------- the file and its writer


def test_a_new_file_is_made_durable(tmp_path: Path) -> None:
    """WAL, an fsync a commit, our application id and version; opening it again changes nothing."""
    path = tmp_path / "keypool.db"
    for _ in range(2):
        with contextlib.closing(datafile.connect(path)) as database:
            assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert database.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
            assert database.execute("PRAGMA application_id").fetchone() == (datafile.APPLICATION_ID,)
            assert database.execute("PRAGMA user_version").fetchone() == (datafile.VERSION,)
        assert datafile.inspect(path).numbers == {}
    assert len(datafile.MIGRATIONS) == datafile.VERSION


def test_a_file_of_an_older_version_is_brought_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step that it lacks is made, in order, once; what it holds stays."""
    path = tmp_path / "keypool.db"
    fill(path, [row(1)])
    steps = ("ALTER TABLE keys ADD COLUMN one TEXT;", "ALTER TABLE keys ADD COLUMN two TEXT DEFAULT 'x';")
    monkeypatch.setattr(datafile, "MIGRATIONS", datafile.MIGRATIONS + steps)
    monkeypatch.setattr(datafile, "VERSION", datafile.VERSION + 2)
    for _ in range(2):
        datafile.connect(path).close()
        assert table_of(path)[0][10:] == (None, "x")
    assert datafile.inspect(path).numbers["last_id"] == 1


def test_a_step_that_fails_leaves_the_version_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A migration is atomic: the next start tries again."""
    path = tmp_path / "keypool.db"
    fill(path, [row(1)])
    broken = "ALTER TABLE keys ADD COLUMN one TEXT; ALTER TABLE nothing ADD COLUMN two TEXT;"
    with monkeypatch.context() as patch:
        patch.setattr(datafile, "MIGRATIONS", (*datafile.MIGRATIONS, broken))
        with pytest.raises(sqlite3.Error):
            datafile.connect(path)
    assert len(table_of(path)[0]) == 10
    datafile.connect(path).close()
    assert datafile.inspect(path).numbers["last_id"] == 1


def test_a_batch_is_whole_and_may_be_written_twice(tmp_path: Path) -> None:
    """Rows by id with their whole state, purges by id, numbers by name."""
    path = tmp_path / "keypool.db"
    writer = Writer(path, open_held(path))
    first = Batch([row(1), row(2), row(3, block=5, lease=4, owner="me")], [], {"last_id": 3})
    second = Batch([row(1, 600)], [2, 99], {"last_id": 7, "last_lease": 4})
    for batch in (first, first, second, second):
        assert writer.commit([encode(batch)]) == Verdict()
    assert rows_in(path) == [first.rows[2], second.rows[0]][::-1]
    assert numbers_in(path) == {"last_id": 7, "last_lease": 4}
    writer.close()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["keypool.db"], "the log wasn't brought in"


def test_a_batch_that_fails_leaves_nothing_and_the_next_one_is_written(tmp_path: Path) -> None:
    """Here because another program holds the file's own lock for too long."""
    path = tmp_path / "keypool.db"
    fill(path, [row(1)])
    writer = Writer(path, open_held(path))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as another:
        another.execute("BEGIN IMMEDIATE")
        verdict = writer.commit([encode(Batch([row(2)], [1]))])
        assert verdict.error == "database is locked"
        another.execute("ROLLBACK")
    assert [each[0] for each in rows_in(path)] == [1]
    assert writer.commit([encode(Batch([row(2)], [1]))]) == Verdict()
    assert [each[0] for each in rows_in(path)] == [2]
    writer.close()


class WriterProcess:
    """A writer process of its own, asked over its socket."""

    def __init__(self, path: Path, *command: str, inherit: Sequence[int] = ()) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(30)
        held = open_held(path)
        self.process = subprocess.Popen(
            [
                *(*command, sys.executable, "-m", "keypool.engine.durable.writer"),
                *(str(number) for number in (theirs.fileno(), held, os.getpid())), str(path),
            ],
            pass_fds=[theirs.fileno(), held, *inherit],
            cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        theirs.close()
        os.close(held)
        self._stream = self._socket.makefile("rwb")

    def send(self, data: bytes) -> None:
        self._stream.write(data)
        self._stream.flush()

    def part(self, batch: Batch) -> None:
        self.send(frame(Kind.PART, encode(batch)))

    def ask(self, batch: Batch) -> Verdict:
        self.send(frame(Kind.BATCH, encode(batch)))
        answer = read_frame(self._stream.read)
        assert answer is not None
        assert answer[0] == Kind.VERDICT
        verdict = decode_verdict(answer[1])
        verdict.figures = None  # come once a second
        return verdict

    def hang_up(self) -> int:
        """Close the socket; the exit status."""
        with contextlib.suppress(OSError):
            self._stream.close()
        self._socket.close()
        return self.process.wait(30)

    def __enter__(self) -> WriterProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.hang_up()


def test_the_writer_commits_a_batch_of_several_parts_whole(tmp_path: Path) -> None:
    """With the last of them, which alone is answered; a part whose rest never comes is not written."""
    path = tmp_path / "keypool.db"
    with WriterProcess(path) as writer:
        writer.part(Batch([row(1), row(2)]))
        writer.part(Batch([row(3)], [2]))
        assert writer.ask(Batch([row(4)], [], {"last_id": 4})) == Verdict()
        assert writer.ask(Batch([row(5)])) == Verdict()
        writer.part(Batch([row(6)]))
        writer.hang_up()
    assert [each[0] for each in rows_in(path)] == [1, 3, 4, 5]


@pytest.mark.parametrize(
    "rest", [b"", b"\0", frame(Kind.BATCH, b"x" * 100)[:5], frame(Kind.BATCH, b"x" * 100)[:6]]
)
def test_the_writer_ends_with_its_socket(tmp_path: Path, rest: bytes) -> None:
    """Wherever it stands: idle, or in the middle of a frame. What was confirmed is there."""
    path = tmp_path / "keypool.db"
    with WriterProcess(path) as writer:
        assert writer.ask(Batch([row(1)])) == Verdict()
        writer.send(rest)
        assert writer.hang_up() == 0
    assert [each[0] for each in rows_in(path)] == [1]


def test_the_last_frame_asks_the_writer_to_close_the_file(tmp_path: Path) -> None:
    """The log is brought into the file, and taken away."""
    path = tmp_path / "keypool.db"
    with WriterProcess(path) as writer:
        assert writer.ask(Batch([row(1)])) == Verdict()
        assert (tmp_path / "keypool.db-wal").exists()
        writer.send(frame(Kind.END))
        assert writer.process.wait(30) == 0
    assert [each.name for each in tmp_path.iterdir()] == ["keypool.db"]


def test_the_writer_leaves_signals_to_the_server(tmp_path: Path) -> None:
    """What a terminal or a service manager sends to everybody doesn't end it."""
    with WriterProcess(tmp_path / "keypool.db") as writer:
        assert writer.ask(Batch([row(1)])) == Verdict()
        for number in (SIGINT, SIGTERM, signal.SIGHUP):
            writer.process.send_signal(number)
        assert writer.ask(Batch([row(2)])) == Verdict()
        assert writer.hang_up() == 0


def test_a_verdict_comes_after_the_fsync(tmp_path: Path) -> None:
    """Seen from outside, by strace: between a batch's last write and its verdict the log is on the disk."""
    trace, path = tmp_path / "trace", tmp_path / "keypool.db"
    strace = shutil.which("strace")
    if strace is None or subprocess.run([strace, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs strace, and the right to trace")
    calls = "trace=pwrite64,write,writev,fsync,fdatasync,sendto,sendmsg"
    with WriterProcess(path, strace, "-D", "-f", "-y", "-e", calls, "-o", str(trace)) as writer:
        for number in range(1, 21):
            assert writer.ask(Batch([row(number)])) == Verdict()
        writer.send(frame(Kind.END))
        writer.process.wait(30)
    verdicts = written = 0
    unsynced = False
    for line in trace.read_text().splitlines():
        if "keypool.db-wal>" in line:
            written += "pwrite64(" in line
            unsynced = "sync(" not in line
        elif re.search(r"\b(write|writev|sendto|sendmsg)\(\d+<(socket|UNIX)", line):
            verdicts += 1
            assert not unsynced, f"verdict {verdicts} came before the fsync"
    assert verdicts == 20
    assert written >= 20


# ---------------------------------------------------------------------------------------------------- restore


def set_clocks(monkeypatch: pytest.MonkeyPatch, wall: Moment, monotonic: Moment) -> None:
    """Have the engines that are opened from now on go by these clocks."""

    def clock(not_before: float) -> Callable[[], float]:
        return make_clock(wall, monotonic, not_before)

    monkeypatch.setattr(opening, "make_clock", clock)


def states(engine: EmbeddedEngine) -> list[tuple[object, ...]]:
    """Everything durable of every key."""
    walk = engine.pool._by_id.walk(None)
    return [
        (key.id, key.text, key.created_at, key.expires_deadline, key.release_deadline, key.lease, key.owner)
        for key in walk
    ]


@on_loop
async def test_all_of_the_pool_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys, leases, owners, deadlines, counters, the last id and the last lease."""
    wall = Moment()
    set_clocks(monkeypatch, wall, wall)
    path = tmp_path / "keypool.db"
    async with opened(path) as engine:
        made = await engine.generate(6)
        leases = [await engine.acquire(owner, 0) for owner in ("me", None, "Zoë 🦊", "x" * 200)]
        wall.on(12.25)
        await engine.unblock(leases[0].key, leases[0].lease)
        await engine.keepalive(made[1].key)
        await engine.delete(made[5].key)
        with pytest.raises(UnknownKey):
            await engine.get(made[5].key)
        before, numbers = states(engine), engine.numbers()
        timers = engine.timers.armed
    async with opened(path) as engine:
        assert states(engine) == before
        assert engine.numbers() == numbers
        assert engine.timers.armed == timers
        engine.pool.check()
        assert (await engine.generate(1))[0].id == 7
        assert (await engine.acquire(None, 0)).lease == 5


@on_loop
async def test_a_moment_is_the_same_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the millisecond that is shown of it."""
    wall = Moment()
    set_clocks(monkeypatch, wall, wall)
    path = tmp_path / "keypool.db"
    async with opened(path) as engine:
        for _ in range(20):
            await engine.generate(1)
            wall.on(0.0123)
        before = [(await engine.get(id)).created_at for id in range(1, 21)]
    async with opened(path) as engine:
        assert [(await engine.get(id)).created_at for id in range(1, 21)] == before


@on_loop
async def test_deadlines_that_passed_during_a_stop_are_processed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted once, written down, and told of: 404 for the dead, available for the released."""
    wall = Moment()
    set_clocks(monkeypatch, wall, wall)
    path = tmp_path / "keypool.db"
    async with opened(path) as engine:
        made = await engine.generate(3)
        wall.on(200)
        for key in made[:2]:
            await engine.keepalive(key.key)
        lease = await engine.acquire("me", 0)
        while lease.key != made[0].key:
            await engine.unblock(lease.key, None)
            lease = await engine.acquire("me", 0)
        acquired = engine.pool.counters.acquired
    wall.on(100.001)
    for _ in range(2):  # the second start finds nothing left to do
        async with opened(path) as engine:
            assert [state[0] for state in states(engine)] == [1, 2]
            assert (await engine.get(made[0].key)).release_in is None
            with pytest.raises(UnknownKey):
                await engine.get(made[2].key)
            stats = await engine.stats()
            assert (stats.total, stats.blocked, stats.expired, stats.released) == (2, 0, 1, 1)
            assert stats.acquired == acquired
            assert stats.acquired == stats.unblocked + stats.released
    assert [each[0] for each in rows_in(path)] == [1, 2]
    assert numbers_in(path)["expired"] == 1


@on_loop
@pytest.mark.parametrize("stopped", [10.0, 280.0, 299.0, 300.5, 5000.0])
async def test_a_restart_grace_lets_keys_live_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: float
) -> None:
    """Those that are dead by then or would be within it live that long from the start, and no others."""
    wall = Moment()
    set_clocks(monkeypatch, wall, wall)
    path = tmp_path / "keypool.db"
    async with opened(path) as engine:
        await engine.generate(2)
        await engine.acquire("me", 0)
    wall.on(stopped)
    grace = 20.0
    async with opened(path, grace) as engine:
        row = await engine.get(1)
        assert row.expires_in == pytest.approx(max(300 - stopped, grace), abs=0.002)
        blocked = (await engine.stats()).blocked
        assert blocked == (1 if stopped < 60 else 0), "a grace lengthened a block"
    wall.on(grace - 1)  # and the grace is on disk: a second start without one changes nothing
    async with opened(path) as engine:
        assert (await engine.get(1)).expires_in == pytest.approx(
            max(300 - stopped, grace) - grace + 1, abs=0.003
        )


@on_loop
async def test_a_grace_is_for_the_living_at_the_kill_only(tmp_path: Path) -> None:
    """A key whose purge was written is gone, grace or not."""
    path = tmp_path / "keypool.db"
    async with opened(path, keepalive_seconds=0.2) as engine:
        [key] = await engine.generate(1)
        await asyncio.sleep(0.3)  # until its timer, which was set before this one, has fired
        with pytest.raises(UnknownKey):
            await engine.get(key.key)
    async with opened(path, 100.0) as engine:
        with pytest.raises(UnknownKey):
            await engine.get(key.key)


@on_loop
async def test_a_clock_set_back_between_two_runs_brings_nothing_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool's clock goes on where it was: nobody lives or is blocked longer than what was left."""
    wall, monotonic = Moment(), Moment(5000)
    set_clocks(monkeypatch, wall, monotonic)
    path = tmp_path / "keypool.db"
    async with opened(path) as engine:
        [key] = await engine.generate(1)
        await engine.acquire("me", 0)
        monotonic.on(20)
        before = engine.now()
    wall.at -= 3600
    monotonic.at = 7
    async with opened(path) as engine:
        assert engine.now() == pytest.approx(before, abs=0.001)
        row = await engine.get(key.key)
        assert (row.expires_in, row.release_in) == pytest.approx((280, 40), abs=0.002)
        monotonic.on(40.01)
        assert (await engine.acquire(None, 0)).lease == 2


@on_loop
async def test_a_wall_clock_that_jumps_moves_no_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the server runs there is the monotonic clock and no other."""
    wall, monotonic = Moment(), Moment(5000)
    set_clocks(monkeypatch, wall, monotonic)
    async with opened(tmp_path / "keypool.db") as engine:
        [key] = await engine.generate(1)
        await engine.acquire("me", 0)
        for jump in (86_400, -7 * 86_400, 3600):
            wall.at += jump
            monotonic.on(1)
            await engine.keepalive(key.key)
        row = await engine.get(key.key)
        assert (row.expires_in, row.release_in) == (300, 57)


@on_loop
async def test_a_file_from_the_future_keeps_its_remaining_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written under a wall clock that was a year ahead: keys keep what they had left."""
    wall, monotonic = Moment(1_800_000_000), Moment(0)
    set_clocks(monkeypatch, wall, monotonic)
    path = tmp_path / "keypool.db"
    async with opened(path) as engine:
        await engine.generate(2)
    wall.at -= 365 * 86_400
    async with opened(path) as engine:
        assert (await engine.stats()).total == 2
        assert (await engine.get(1)).expires_in == pytest.approx(300, abs=0.002)


# ---------------------------------------------------------------------------------------- a file of no use


def spoiled(whole: bytes, how: str) -> bytes:
    """A file after this damage."""
    middle = len(whole) // 2 // 4096 * 4096
    return {
        "garbage": b"no database at all, but long enough to be one\n" * 1000,
        "a few bytes": b"xyz",
        "its end is missing": whole[: middle + 1000],
        "only its head is left": whole[:100],
        "its head is overwritten": bytes(100) + whole[100:],
        "a page of zeros in the middle": whole[:middle] + bytes(4096) + whole[middle + 4096 :],
        "a page of noise in the middle": whole[:middle]
        + random.Random(1).randbytes(4096)
        + whole[middle + 4096 :],
        "a page twice": whole[:middle] + whole[middle - 4096 : middle] + whole[middle + 4096 :],
    }[how]


SPOILED = (
    "garbage", "a few bytes", "its end is missing", "only its head is left", "its head is overwritten",
    "a page of zeros in the middle", "a page of noise in the middle", "a page twice",
)  # fmt: skip


def spoil_by_sql(whole: Path, path: Path, script: str) -> None:
    """A copy of a whole file, changed."""
    shutil.copy(whole, path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.executescript(script)


@pytest.mark.parametrize("how", SPOILED)
def test_a_damaged_file_is_refused_and_left_as_it_was(whole_file: Path, tmp_path: Path, how: str) -> None:
    """In one line, and not a byte is changed."""
    path = tmp_path / "keypool.db"
    path.write_bytes(spoiled(whole_file.read_bytes(), how))
    before = path.read_bytes()
    assert "damaged" in refusal(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("how", ["damaged", "contradicts itself"])
def test_a_server_whose_file_is_refused_exits_1(whole_file: Path, tmp_path: Path, how: str) -> None:
    """With the one line that the other tests here look at in this process."""
    path = tmp_path / "keypool.db"
    if how == "damaged":
        path.write_bytes(spoiled(whole_file.read_bytes(), "a page of noise in the middle"))
    else:
        spoil_by_sql(whole_file, path, STORIES["a lease beyond the last"])
    before = path.read_bytes()
    assert how in refused_start(path)
    assert path.read_bytes() == before


def test_a_file_of_one_byte_is_damaged_too(tmp_path: Path) -> None:
    """SQLite's own oddity: it reports the size 1 as 0."""
    path = tmp_path / "keypool.db"
    path.write_bytes(b"x")
    with pytest.raises(StartError):
        datafile.inspect(path)


FLIPS = 120


def test_a_flipped_bit_is_refused_in_one_line_or_harmless(tmp_path: Path) -> None:
    """Wherever it is: the file is refused and left as it was, or it loads and the pool is sound."""
    whole = tmp_path / "whole.db"
    rows = [(id, f"{id:020d}", 1, 4_000_000_000_000, *row(id)[4:]) for id in range(1, 400)]
    fill(whole, rows, moment=1)
    content = whole.read_bytes()
    draw = random.Random(3)

    async def load(path: Path, *, whole_opening: bool) -> str | None:
        """Why it was refused, if it was."""
        try:
            if whole_opening:
                async with opened(path) as engine:
                    engine.pool.check()
            else:  # all that reads it, without a writer process
                engine = EmbeddedEngine(start_timers=False)
                engine.restore_numbers(datafile.inspect(path).numbers)
                await opening._restore_keys({0: engine}, path)
        except (StartError, ValueError, KeyError) as error:
            return str(error)
        return None

    refused = 0
    for number in range(FLIPS):
        path = tmp_path / f"{number}.db"
        flipped = bytearray(content)
        flipped[draw.choice((draw.randrange(100), draw.randrange(len(content))))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        why = asyncio.run(load(path, whole_opening=number % 12 == 0))
        if why is not None:
            refused += 1
            assert "\n" not in why
            assert path.read_bytes() == flipped, f"the refused file was changed: {why}"
    assert refused


STORIES = {
    "a lease beyond the last": "UPDATE keys SET lease = 99 WHERE id = 5",
    "an id beyond the last": "UPDATE pool SET value = 5 WHERE name = 'last_id'",
    "a text twice": "UPDATE keys SET text = (SELECT text FROM keys WHERE id = 7) WHERE id = 5",
    "an owner of a free key": "UPDATE keys SET owner = 'me' WHERE id = 5",
    "a text that is no text": "UPDATE keys SET text = CAST(x'fffe' AS TEXT) WHERE id = 5",
    "the numbers are missing": "DELETE FROM pool",
    "a column of another name": "ALTER TABLE keys RENAME COLUMN created_at TO c2",
    "a moment that is no number": """
        DROP TABLE keys;
        CREATE TABLE keys (id INTEGER PRIMARY KEY, text, created_at, expires_at, release_at, lease, owner);
        INSERT INTO keys VALUES (1, 'aaaaaaaaaaaaaaaaaaaa', 'soon', 'later', NULL, 0, NULL)
    """,
}


@pytest.mark.parametrize("story", STORIES)
def test_a_file_that_contradicts_itself_is_refused_in_one_line(
    whole_file: Path, tmp_path: Path, story: str
) -> None:
    """Sound for SQLite, and not for the pool: check() after the restore says which key is wrong."""
    path = tmp_path / "keypool.db"
    spoil_by_sql(whole_file, path, STORIES[story])
    before = path.read_bytes()
    for grace in (0.0, 5000.0):
        assert "contradicts itself" in refusal(path, restart_grace=grace)
        assert path.read_bytes() == before


def test_an_invalid_number_of_the_pool_is_refused(whole_file: Path, tmp_path: Path) -> None:
    """One line, and the file is as it was."""
    path = tmp_path / "keypool.db"
    table = "DROP TABLE pool; CREATE TABLE pool (name, value); INSERT INTO pool VALUES ('last_id', 'many')"
    spoil_by_sql(whole_file, path, table)
    before = path.read_bytes()
    assert "is damaged" in refusal(path)
    assert path.read_bytes() == before


def test_the_error_for_a_damaged_file_shows_no_key(whole_file: Path, tmp_path: Path) -> None:
    """SQLite quotes a text that it can't decode, and that may be most of a key."""
    path = tmp_path / "keypool.db"
    script = "UPDATE keys SET text = CAST(CAST('secretsecretsecre' AS BLOB) || x'ff' AS TEXT)"
    spoil_by_sql(whole_file, path, script)
    assert "secret" not in refusal(path)


def test_a_file_of_another_program_is_refused(tmp_path: Path) -> None:
    """Whole, but not ours."""
    path = tmp_path / "keypool.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("CREATE TABLE bookmarks (url TEXT)")
    path.chmod(0o644)
    before = path.read_bytes()
    assert "another program" in refusal(path)
    assert path.read_bytes() == before
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_file_of_a_newer_version_is_refused(whole_file: Path, tmp_path: Path) -> None:
    """Both versions are named."""
    path = tmp_path / "keypool.db"
    spoil_by_sql(whole_file, path, f"PRAGMA user_version = {datafile.VERSION + 1}")
    before = path.read_bytes()
    line = refusal(path)
    assert re.search(rf"newer version {datafile.VERSION + 1}\b.*\b{datafile.VERSION}\b", line), line
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["file:x.db", ":memory:", "file::memory:?cache=shared"])
def test_a_name_with_a_special_meaning_to_sqlite_is_a_file(tmp_path: Path, name: str) -> None:
    """Writer and reader use the one that the lock is on."""
    path = tmp_path / name
    with durable_server(path) as server:
        made = server.client().make()
        crash(server)
    assert [each[1] for each in rows_in(path)] == [made["key"]]


def test_a_folder_is_not_a_data_file(tmp_path: Path) -> None:
    """And a file can't contain folders."""
    assert "Is a directory" in refusal(tmp_path)
    (tmp_path / "file").write_text("")
    refusal(tmp_path / "file" / "keypool.db")


def test_a_pipe_is_not_a_data_file(tmp_path: Path) -> None:
    """Nor a device: reading one may never end."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StartError):
        file_lock.hold(tmp_path / "pipe")


def test_a_file_system_without_locks_is_a_start_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says so, and the file is closed again."""

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    closed, close = list[int](), os.close
    monkeypatch.setattr("fcntl.flock", no_locks)

    def closing(descriptor: int) -> None:
        closed.append(descriptor)
        close(descriptor)

    monkeypatch.setattr("os.close", closing)
    with pytest.raises(StartError, match=r"can't lock the data file .*: No locks available"):
        file_lock.hold(tmp_path / "keypool.db")
    assert len(closed) == 1


def test_a_file_that_others_may_read_is_closed_to_them(whole_file: Path, tmp_path: Path) -> None:
    """As a backup is that was put in its place as docs/operations.md says: it holds the keys in clear text."""
    path = tmp_path / "keypool.db"
    shutil.copy(whole_file, path)
    path.chmod(0o644)
    with durable_server(path) as server:
        server.client().make()
        modes = {stat.S_IMODE(each.stat().st_mode) for each in tmp_path.glob("keypool.db*")}
    assert modes == {0o600}


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Nobody may change a file or folder meanwhile, root included."""
    if os.geteuid() != 0:
        mode = stat.S_IMODE(path.stat().st_mode)
        path.chmod(mode & 0o555)
        yield
        path.chmod(mode)
        return
    if subprocess.run(["chattr", "+i", str(path)], check=False, capture_output=True).returncode:
        pytest.skip("root may write everywhere, and chattr +i doesn't work here")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", str(path)], check=True)


@pytest.mark.parametrize("what", ["file", "folder", "folder without a file"])
def test_what_is_read_only_is_refused(whole_file: Path, tmp_path: Path, what: str) -> None:
    """One line, status 1."""
    path = tmp_path / "folder" / "keypool.db"
    path.parent.mkdir()
    if what != "folder without a file":
        shutil.copy(whole_file, path)
    with read_only(path if what == "file" else path.parent):
        refusal(path)
        assert path.exists() == (what != "folder without a file")
    if path.exists():
        assert path.read_bytes() == whole_file.read_bytes()

    async def total() -> int:
        async with opened(path) as engine:
            return engine.pool.total

    assert asyncio.run(total()) in (0, ROWS)


# -------------------------------------------------------------------------------------------------- backups


def _vacuum(path: Path, copy: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("VACUUM INTO ?", (str(copy),))


def _backup(path: Path, copy: Path) -> None:
    with (
        contextlib.closing(sqlite3.connect(path)) as database,
        contextlib.closing(sqlite3.connect(copy)) as to,
    ):
        database.backup(to, pages=20, sleep=0.001)


def _shell(command: str) -> Callable[[Path, Path], None]:
    """By the command that docs/operations.md gives, or another of the same program."""

    def run_shell(path: Path, copy: Path) -> None:
        if shutil.which("sqlite3") is None:
            pytest.skip("the program sqlite3 is not installed")
        subprocess.run(["sqlite3", str(path), command.format(copy=copy)], check=True, timeout=60)

    return run_shell


def keypool(*words: str, status: int = 0) -> str:
    """Run the command; its one line."""
    done = subprocess.run(
        [sys.executable, "-m", "keypool", *words],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == status, done
    [line] = (done.stderr if status else done.stdout).splitlines()
    return line


def _documented(path: Path, copy: Path) -> None:
    before = os.umask(0)
    try:
        line = keypool("backup", str(copy), f"--data={path}")
    finally:
        os.umask(before)
    assert re.fullmatch(rf"{copy} is whole: version \d+, \d+ keys, 1 blocked, 0 cooling, 0 quarantined", line)
    assert keypool("verify", str(copy)) == line
    assert [each.name for each in copy.parent.iterdir()] == [copy.name], "something was left beside it"
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600


BACKUPS = {
    "keypool backup": _documented,
    "VACUUM INTO": _vacuum,
    "backup, page by page": _backup,
    "sqlite3 VACUUM INTO": _shell("VACUUM INTO '{copy}'"),
    "sqlite3 .backup": _shell(".backup '{copy}'"),
}


@pytest.mark.parametrize("how", BACKUPS)
def test_a_backup_under_load_restores(tmp_path: Path, how: str) -> None:
    """It holds at least what was told before it began, is sound, and nobody was refused meanwhile."""
    path, copy = tmp_path / "keypool.db", tmp_path / "restored" / "keypool.db"
    copy.parent.mkdir()
    with durable_server(path) as server:
        client = server.client()
        client.make_many(1000)
        lease = client.acquire(owner="me")
        with Load(server) as load:
            load.wait_for(50)
            told = set(load.told)
            BACKUPS[how](path, copy)
            load.wait_for(50)
        assert load.refused == 0
    with durable_server(copy) as server:
        client = server.client()
        assert told | set(range(1, 1001)) <= texts_of(client)
        assert client.row(lease["key"])["owner"] == "me"
        stats = client.stats()
        assert stats["generated"] == stats["total"]
        assert client.acquire()["lease"] == lease["lease"] + 1


def test_the_documented_backup_is_the_tested_one() -> None:
    """docs/operations.md names the commands, and Litestream."""
    text = (ROOT / "docs" / "operations.md").read_text()
    assert "\nkeypool backup backup.db " in text
    assert "\nkeypool verify backup.db " in text
    assert "litestream.io" in text


def test_a_backup_that_cannot_be_made_leaves_nothing(whole_file: Path, tmp_path: Path) -> None:
    """One line that says why: it replaces no file, copies no other program's, nor one that lacks its log."""
    copy = tmp_path / "copy"
    copy.write_text("mine")
    assert "replaces no file" in keypool("backup", str(copy), f"--data={whole_file}", status=1)
    assert copy.read_text() == "mine"
    copy.unlink()
    assert "no data file" in keypool("backup", str(copy), f"--data={tmp_path / 'nothing'}", status=1)
    assert "--data=:memory:" in keypool("backup", str(copy), "--data=:memory:", status=2)
    (tmp_path / "other").write_text("hello")
    assert "can't be copied" in keypool("backup", str(copy), f"--data={tmp_path / 'other'}", status=1)
    bare = tmp_path / "bare"
    with durable_server(tmp_path / "keypool.db") as server:
        server.client().make()
        shutil.copyfile(tmp_path / "keypool.db", bare)
    assert "incomplete" in keypool("backup", str(copy), f"--data={bare}", status=1)
    assert "incomplete" in refused_start(bare)
    assert not copy.exists()
    assert not list(tmp_path.glob(".*"))


def test_verify_changes_nothing_and_finds_damage(whole_file: Path, tmp_path: Path) -> None:
    """Nor does it put anything beside the file."""
    path = tmp_path / "keypool.db"
    path.write_bytes(whole_file.read_bytes())
    path.chmod(0o644)
    assert f"{ROWS} keys" in keypool("verify", str(path))
    assert path.read_bytes() == whole_file.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    content = bytearray(whole_file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4096] = bytes(4096)
    path.write_bytes(content)
    assert "damaged" in keypool("verify", str(path), status=1)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
