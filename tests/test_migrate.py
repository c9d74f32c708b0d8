"""`keypool migrate`: a pool moves from a data file to Valkey and back, as a whole or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import pty
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGKILL
from typing import Any

import pytest
from durable_support import durable, fill, keys_of_all_kinds, old_file
from support import API, ROOT, ServerProcess, clean_environment, eventually, run_server
from valkey_support import engine_on
from valkeys import Valkey, new_pool, shared_cluster, shared_valkey

from keypool.cli.main import main
from keypool.core.counters import COUNTERS
from keypool.core.errors import StartError
from keypool.core.events import DEADLINE, HOLDER, By, Change, Origin
from keypool.core.handles import SECRET_BYTES
from keypool.core.keys import NEVER, Details, Group, Key, State
from keypool.core.pace import Pace
from keypool.core.rare_events import NO_HINT, RareEvents
from keypool.core.rules import PoolRules
from keypool.engine.durable import datafile, file_lock
from keypool.engine.durable.checks import new_checks
from keypool.engine.durable.rows import event_of, event_row_of, row_of
from keypool.engine.migrate.moving import FileSource, FileTarget, Moved, Source, Target, move
from keypool.engine.migrate.moving_valkey import ValkeyPlace
from keypool.engine.sealing import Sealer
from keypool.engine.valkey.opening import open_valkey
from keypool.engine.valkey.scripts import keys_of
from keypool.engine.valkey.url import parse


@pytest.fixture(params=["valkey", pytest.param("cluster", marks=pytest.mark.thorough)])
def url(request: pytest.FixtureRequest) -> str:
    """The URL of a place without a pool, on a single Valkey or a cluster."""
    return new_pool(shared_valkey() if request.param == "valkey" else shared_cluster())


@pytest.fixture
def empty() -> str:
    """The URL of a place where no pool is."""
    return new_pool(shared_valkey())


def command(*words: str) -> list[str]:
    """What runs keypool migrate as a process."""
    return [sys.executable, "-m", "keypool", "migrate", *words]


def migrate(source: str | Path, target: str | Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run it in this process."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = main(["migrate", "--from", str(source), "--to", str(target), *flags])
    return subprocess.CompletedProcess([], status, output.getvalue(), errors.getvalue())


def refused(ran: subprocess.CompletedProcess[str], status: int, *words: str) -> str:
    """Fails unless it was refused in one line that has these words."""
    assert ran.returncode == status, ran.stderr
    assert ran.stdout == ""
    [line] = ran.stderr.splitlines()
    assert line.startswith("keypool: ")
    for word in words:
        assert word in line, line
    return line


def rows_of(server: ServerProcess) -> dict[int, dict[str, Any]]:
    """All rows, by id, with the text of each, and moments in place of lengths of time."""
    client = server.client()
    found = {}
    after = ""
    while True:
        asked = time.time()
        page = client.get(f"{API}/keys?limit=500{after}").expect(200)
        told = time.time()
        for row in page["keys"]:
            key = client.post(f"{API}/keys/id:{row['id']}/reveal").expect(200)["key"]
            # From when to when each deadline may be: what is told may be short by as long as the answer took.
            ends = {
                name: (asked + left, told + left + told - asked)
                for name in ("expires_in", "release_in")
                if (left := row.pop(name)) is not None
            }
            found[row["id"]] = row | {"key": key, "ends": ends}
        if page["next"] is None:
            return found
        after = f"&after={page['next']}"


def counters_of(server: ServerProcess) -> dict[str, int]:
    """What stats has counted since the pool began."""
    stats = server.client().stats()
    return {name: stats[name] for name in COUNTERS}


def expect_same(rows: dict[int, dict[str, Any]], before: dict[int, dict[str, Any]]) -> None:
    """Fails unless these are the same keys, in the same states, with the same deadlines."""
    assert rows.keys() == before.keys()
    for id, row in rows.items():
        ends, then = row["ends"], before[id]["ends"]
        assert {**row, "ends": None} == {**before[id], "ends": None}
        assert ends.keys() == then.keys()
        for name, (first, last) in ends.items():
            assert first - 0.05 <= then[name][1], f"{name} of id:{id} has moved: {ends} from {then}"
            assert last + 0.05 >= then[name][0], f"{name} of id:{id} has moved: {ends} from {then}"


def a_file(path: Path, keys: int) -> Path:
    """A data file with so many keys, by a server; the number is made in the file itself, as it may be large."""
    with ServerProcess([f"--data={path}", "--port=0", "--keepalive-seconds=3000"], cwd=path.parent) as server:
        server.client().make_many(min(keys, 1000))
    if keys > 1000:
        with sqlite3.connect(path) as database:
            database.execute(
                "WITH RECURSIVE n(i) AS (SELECT 1001 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
                " INSERT INTO keys SELECT i, printf('%020d', i), created_at, expires_at, NULL, 0, NULL, NULL, 0, NULL"
                " FROM n, (SELECT created_at, expires_at FROM keys WHERE id = 1)",
                [keys],
            )
            database.execute("UPDATE pool SET value = ? WHERE name IN ('last_id', 'generated')", [keys])
        database.close()
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data file with three keys."""
    return a_file(tmp_path / "keypool.db", 3)


# ------------------------------------------------------------------------------------------------ there and back


def test_a_pool_moves_there_and_back_whole(url: str, tmp_path: Path) -> None:
    """Ids, texts, states, owners, leases, deadlines, counters; and lease numbers and ids go on where they were."""
    path = tmp_path / "keypool.db"
    flags = ["--port=0", "--block-seconds=1000", "--keepalive-seconds=3000"]
    with ServerProcess([f"--data={path}", *flags], cwd=tmp_path) as server:
        client = server.client()
        made = client.make_many(150)
        leases = [client.acquire(owner=f"wörker-{number}") for number in range(20)]
        client.post(f"{API}/keys/{leases[0]['key']}/unblock").expect(200)
        client.post(f"{API}/keys/{leases[1]['key']}/keepalive").expect(200)
        free = next(key for key in made if key["key"] not in {lease["key"] for lease in leases})
        client.delete(f"{API}/keys/{free['key']}").expect(204)
        rows, counters = rows_of(server), counters_of(server)

    with sqlite3.connect(path) as database:  # a sign-out, say
        database.execute("INSERT INTO pool VALUES ('note.session.a.b', 42)")
    database.close()
    there = migrate(path, url)
    assert (there.returncode, there.stderr) == (0, ""), there.stderr
    assert "keys\t149\n" in there.stdout
    with ServerProcess([f"--engine={url}", *flags], cwd=tmp_path) as server:
        client = server.client()
        expect_same(rows_of(server), rows)
        assert counters_of(server) == counters
        holder = leases[2]
        client.post(
            f"{API}/keys/{holder['key']}/unblock", json={"lease": holder["lease"] - 1}
        ).expect_problem(409, "stale-lease")
        assert client.post(f"{API}/keys/{holder['key']}/unblock", json={"lease": holder["lease"]}).expect(
            200
        )["changed"]
        lease = client.acquire(owner="later")
        assert lease["lease"] > max(lease["lease"] for lease in leases)
        assert client.make()["id"] > 150
        assert client.get(f"{API}/keys/id:{leases[3]['id']}").expect(200)["lease"] == leases[3]["lease"]
        rows, counters = rows_of(server), counters_of(server)

    back = tmp_path / "back.db"
    ran = migrate(url, back)
    assert (ran.returncode, ran.stderr) == (0, ""), ran.stderr
    with ServerProcess([f"--data={back}", *flags], cwd=tmp_path) as server:
        expect_same(rows_of(server), rows)
        assert counters_of(server) == counters
        assert server.client().acquire()["lease"] > lease["lease"]
        assert server.client().make()["id"] > max(rows)
    with sqlite3.connect(back) as database:
        assert database.execute("SELECT value FROM pool WHERE name = 'note.session.a.b'").fetchall() == [
            (42,)
        ]
    database.close()


async def moved(source: Source, target: Target) -> Moved:
    """Move everything, and close both."""
    try:
        return await move(source, target, lambda done: None)
    finally:
        await target.close()
        await source.close()


PLACES = [None, "valkey", pytest.param("cluster", marks=pytest.mark.thorough)]


@pytest.mark.parametrize("by_way_of", PLACES)
def test_all_about_leases_moves(by_way_of: str | None, tmp_path: Path) -> None:
    """Cooldowns, quarantines and those to come, reports, failures, attempts; counters; and handles stay valid."""
    first, last = tmp_path / "first.db", tmp_path / "last.db"
    keys = keys_of_all_kinds()
    numbers = {name: number for number, name in enumerate(COUNTERS, 1000)}
    fill(first, list(map(row_of, keys)), **numbers)

    async def run() -> list[Moved]:
        if by_way_of is None:
            return [await moved(FileSource(first), FileTarget(last))]
        url = new_pool(shared_valkey() if by_way_of == "valkey" else shared_cluster())
        there = await moved(FileSource(first), await ValkeyPlace.target(url, None, clear=False))
        return [there, await moved(await ValkeyPlace.source(url), FileTarget(last))]

    for each in asyncio.run(run()):
        assert (each.keys, each.states) == (len(keys), Counter(key.state for key in keys))
    found = {key.id: key for _, some in datafile.read_keys(last, 100) for key in some}
    assert [durable(found[key.id]) for key in keys] == [durable(key) for key in keys]
    assert {name: datafile.inspect(last).numbers[name] for name in numbers} == numbers
    assert datafile.secret_of(last) == datafile.secret_of(first)


SECRETS = (b"s" * 32,)


def _of_group(key: Key) -> tuple[int, float, float] | None:
    group = key.group
    return None if group is None else (group.wanted, group.cools_until, group.paced_until)


def many_pools(path: Path, sealer: Sealer | None) -> dict[int, list[Key]]:
    """A data file with three pools, one of them draining, and keys with all that an operator may have written."""
    kinds = keys_of_all_kinds()
    details = Details(True, "acct 1", {"region": "eu"}, b'{"user":"x"}', None, Pace(5, 60.0, 2))
    imported = Key(100, "sk-live-1", 1_700_000_000.0, NEVER, details=details)
    held = Key(7, "h:1.2.AAAAAAAAAAA", 1_700_000_000.0, 1_700_000_900.0, lease=9, details=Details(True))
    now = float(round(time.time()))
    held.state, held.release_deadline, held.acquired_at = State.BLOCKED, now + 600, now
    held.client, held.owner, held.served = "ann", "wörker", 2
    seats = [
        Key(
            id,
            "sk-live-2",
            1_700_000_000.0,
            NEVER,
            details=Details(True, "acct 2"),
            group=Group(4, now + 60, now + 75.5),
        )
        for id in (101, 102, 104)
    ]
    seats[0].lease, seats[0].state, seats[0].release_deadline, seats[0].acquired_at = (
        3,
        State.BLOCKED,
        now + 600,
        now,
    )
    seats[0].served = 5
    for seat in seats[1:]:
        seat.state, seat.release_deadline = State.COOLING, now + 60
    keys = {
        0: kinds if sealer is None else [*kinds[:3], imported, *seats],
        3: [held] if sealer else kinds[:2],
        5: [],
    }
    rows = [row_of(key, pool, sealer) for pool, some in keys.items() for key in some]
    with contextlib.closing(datafile.connect(path)) as database:
        if sealer is not None:
            datafile.add_secrets(database, new_checks(datafile.Facts(), sealer))
        database.execute("BEGIN")
        database.executemany(datafile.UPSERT, rows)
        for number, name, settings, draining in (
            (0, "default", '{"pace":{"count":2,"seconds":0.5,"burst":1}}', 0),
            (3, "openai", '{"block_seconds":20.0,"keepalive_seconds":null}', 0), (5, "old", "{}", 1),
        ):  # fmt: skip
            database.execute(datafile.DEFINE, (number, name, settings, draining))
        numbers = {
            "last_id": 500,
            "last_lease": 700,
            "3/last_id": 9,
            "3/last_lease": 9,
            "3/generated": 4,
            "last_pool": 6,
        }
        database.executemany(datafile.SET_POOL, numbers.items())
        database.execute("COMMIT")
    return keys


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("partitions", [1, pytest.param(4, marks=pytest.mark.thorough)])
def test_all_pools_move_to_one_valkey_and_another_and_back(
    tmp_path: Path, *, sealed: bool, partitions: int
) -> None:
    """Their settings, numbers, counters; names, labels, data; encrypted ones stay so. Ids and leases go on."""
    first, last = tmp_path / "first.db", tmp_path / "last.db"
    secrets = SECRETS if sealed else ()
    sealer = Sealer(SECRETS) if sealed else None
    keys = many_pools(first, sealer)
    one, two = new_pool(shared_valkey()), new_pool(shared_valkey())

    async def run() -> None:
        target = await ValkeyPlace.target(one, partitions, clear=False, secrets_keys=secrets)
        there = await moved(FileSource(first, secrets), target)
        assert (there.keys, there.pools) == (sum(map(len, keys.values())), 2)
        target = await ValkeyPlace.target(two, None, clear=False, secrets_keys=secrets)
        await moved(await ValkeyPlace.source(one, secrets), target)
        await moved(await ValkeyPlace.source(two, secrets), FileTarget(last, secrets))
        pools = await open_valkey(parse(two), None, PoolRules(), secrets_keys=secrets)
        try:
            engine = pools.get("openai")
            assert engine.rules.block_seconds == 20
            assert engine.rules.keepalive_seconds is None
            assert pools.default.rules.pace == Pace(2, 0.5)
            if sealed:
                row = await pools.get("default").get("sk-live-2")
                assert (row.id, row.state, row.seat, row.seats) == (101, State.BLOCKED, 1, 3)
                row = await pools.get("default").get(104)
                assert (row.state, row.seat, row.seats) == (State.COOLING, 3, 3)
            [made] = await engine.generate(1)
            assert made.id > 9
            lease = await engine.acquire(None, 0)
            assert lease.lease > 9
            await pools.put("new", {}, Origin(By.OPERATOR))
            assert pools._pools["new"].stored.entry.number == 7
        finally:
            await pools.close()

    asyncio.run(run())
    facts = datafile.inspect(last)
    assert facts.pools == datafile.inspect(first).pools
    assert facts.checks.keys() == (set() if sealer is None else {sealer.current.hex()})
    assert facts.numbers["3/generated"] == 4
    assert facts.numbers["last_pool"] == 6
    assert (facts.numbers["3/last_id"], facts.numbers["last_id"]) == (9, 500)
    found = {
        (pool, key.id): (durable(key), key.details, key.client, _of_group(key))
        for pool, some in datafile.read_keys(last, 100, sealer)
        for key in some
    }
    assert found == {
        (pool, key.id): (durable(key), key.details, key.client, _of_group(key))
        for pool, some in keys.items()
        for key in some
    }
    assert datafile.secret_of(last) == datafile.secret_of(first)
    if sealed:
        for path in (first, last):
            assert b"sk-live-1" not in path.read_bytes()
        with pytest.raises(StartError, match="SECRETS_KEY"):
            FileSource(last)
        with pytest.raises(StartError, match="SECRETS_KEY"):
            asyncio.run(ValkeyPlace.source(two))


def test_keys_from_elsewhere_do_not_move_in_clear_to_valkey(empty: str, tmp_path: Path) -> None:
    """As they can't be imported there either."""
    path = tmp_path / "keypool.db"
    fill(path, [row_of(Key(1, "sk-live-1", 1_700_000_000.0, NEVER, details=Details(True)))])
    refused(migrate(path, empty), 1, "KEYPOOL_SECRETS_KEY", "--clear")


def test_a_move_between_valkeys_is_run_by_the_command(data: Path, empty: str) -> None:
    """From one place to another."""
    assert migrate(data, empty).returncode == 0
    ran = migrate(empty, f"{empty}-2")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "keys\t3\n" in ran.stdout
    refused(migrate(empty, empty), 1, "already")


def test_a_file_of_an_older_version_moves(tmp_path: Path) -> None:
    """As it is: it isn't upgraded, and the target gets a secret of its own."""
    first, last = tmp_path / "first.db", tmp_path / "last.db"
    rows = [(1, "a" * 20, 1_000, 9_000_000, None, 0, None), (2, "b" * 20, 1_000, 9_000_000, 60_000, 7, "me")]
    old_file(first, 2, rows[:1], [[rows[1:], [], {}]])

    async def run() -> Moved:
        source, target = FileSource(first), FileTarget(last)
        try:
            return await move(source, target, lambda done: None)
        finally:
            await target.close()
            await source.close()

    assert asyncio.run(run()).states == {State.AVAILABLE: 1, State.BLOCKED: 1}
    assert (datafile.version_of(first), datafile.version_of(last)) == (2, datafile.VERSION)
    assert [key.lease for _, some in datafile.read_keys(last, 9) for key in some] == [0, 7]
    assert len(datafile.secret_of(last) or b"") == SECRET_BYTES


@pytest.mark.parametrize("wrong", ["flags = 99", "more = x'c1'"])
def test_nonsense_about_leases_is_not_moved(empty: str, data: Path, wrong: str) -> None:
    """The source is damaged, as for a server."""
    with contextlib.closing(sqlite3.connect(data, isolation_level=None)) as database:
        database.execute(f"UPDATE keys SET {wrong} WHERE id = 2")  # noqa: S608
    refused(migrate(data, empty), 1, str(data), "is damaged")


def test_deadlines_go_on_during_a_move(empty: str, tmp_path: Path) -> None:
    """Keys that expire or are released meanwhile are purged or available at the target, and counted there."""
    path = tmp_path / "keypool.db"
    with ServerProcess([f"--data={path}", "--port=0"], cwd=tmp_path) as server:
        client = server.client()
        client.make_many(5)
        client.acquire()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        now = round(time.time() * 1000)
        database.execute("UPDATE keys SET expires_at = ?", [now + 1000])
        database.execute("UPDATE keys SET release_at = ? WHERE release_at IS NOT NULL", [now + 400])
    assert migrate(path, empty).returncode == 0
    flags = ["--port=0", "--block-seconds=0.4", "--keepalive-seconds=1.5"]
    with ServerProcess([f"--engine={empty}", *flags], cwd=tmp_path) as server:
        client = server.client()
        eventually(lambda: client.stats()["expired"] == 5, "all are dead, by the moments that they had")
        assert client.stats()["total"] == 0


def test_an_empty_pool_moves_too(empty: str, tmp_path: Path) -> None:
    """There and back."""
    path = a_file(tmp_path / "keypool.db", 1)
    with ServerProcess([f"--data={path}", "--port=0"], cwd=tmp_path) as server:
        client = server.client()
        client.delete(f"{API}/keys/id:1").expect(204)
    assert migrate(path, empty).returncode == 0
    assert migrate(empty, tmp_path / "back.db").returncode == 0
    with ServerProcess([f"--data={tmp_path / 'back.db'}", "--port=0"], cwd=tmp_path) as server:
        assert server.client().make()["id"] == 2


def test_a_bar_on_a_terminal(empty: str, tmp_path: Path) -> None:
    """It grows, and is gone at the end."""
    path = a_file(tmp_path / "keypool.db", 5000)
    ours, theirs = pty.openpty()
    ran = subprocess.run(
        command("--from", str(path), "--to", empty), stdout=subprocess.PIPE, stderr=theirs, check=True,
        env=clean_environment({"PYTHONPATH": str(ROOT)}), timeout=60,
    )  # fmt: skip
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "moving [" in shown
    assert "5000/5000 100%" in shown
    assert shown.endswith("\r\x1b[K")
    assert b"keys\t5000\n" in ran.stdout


# ------------------------------------------------------------------------------------------------------ refusals


def test_a_target_that_is_not_empty_is_refused(empty: str, data: Path, tmp_path: Path) -> None:
    """And left as it was."""
    assert migrate(data, empty).returncode == 0
    refused(migrate(data, empty), 1, "already", "pool=")
    refused(migrate(data, empty, "--clear"), 1, "already")
    refused(migrate(empty, data), 1, "already", str(data))
    assert migrate(empty, tmp_path / "new.db").returncode == 0


def test_a_pool_that_is_served_is_refused(url: str, data: Path, tmp_path: Path) -> None:
    """At either end."""
    with ServerProcess([f"--engine={url}", "--port=0"], cwd=tmp_path):
        refused(migrate(url, tmp_path / "new.db"), 1, "being served")
        refused(migrate(data, url), 1, "being served")
    assert not (tmp_path / "new.db").exists()


def test_a_file_that_is_served_is_refused(
    empty: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the seconds in which a server may end."""
    monkeypatch.setattr(file_lock.hold, "__defaults__", (0.2,))
    with ServerProcess([f"--data={data}", "--port=0"], cwd=tmp_path):
        refused(migrate(data, empty), 1, "held by another server")


def test_what_cannot_be_moved_is_one_line(empty: str, data: Path, tmp_path: Path) -> None:
    """No such file, no such pool, no Valkey there, a wrong place, two of one kind; no password is shown."""
    refused(migrate(tmp_path / "none.db", empty), 1, "no data file")
    refused(migrate(empty, tmp_path / "new.db"), 1, "no pool")
    line = refused(migrate(data, "valkey://:sesame@127.0.0.1:1/0"), 1, "127.0.0.1:1")
    assert "sesame" not in line
    line = refused(migrate(data, "valkey://:sesame@127.0.0.1:x/0"), 2, "valkey://HOST")
    assert "sesame" not in line
    refused(migrate(data, tmp_path / "other.db"), 2, "on the other")
    refused(migrate(empty, empty), 1, "no pool")
    (tmp_path / "text.db").write_text("no database")
    refused(migrate(tmp_path / "text.db", empty), 1, "damaged")
    assert not list(tmp_path.glob("*.migrating"))


def test_a_package_that_is_missing_is_named(data: Path, tmp_path: Path) -> None:
    """With what installs it."""
    (tmp_path / "hiredis.py").write_text("raise ImportError('there is none', name='hiredis')\n")
    ran = subprocess.run(
        command("--from", str(data), "--to", "valkey://127.0.0.1:1"), capture_output=True, text=True, check=False,
        env=clean_environment({"PYTHONPATH": f"{tmp_path}:{ROOT}"}), timeout=60,
    )  # fmt: skip
    refused(ran, 1, "hiredis", "keypool-service[server]")


def test_a_wrong_password_is_one_line(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which names no password."""
    with Valkey("--requirepass", "right-password") as guarded:
        url = guarded.url.replace("://", "://:wrong-password@")
        assert "wrong-password" not in refused(migrate(data, url), 1, "WRONGPASS")
        right = guarded.url.replace("://", "://:right-password@")
        monkeypatch.setenv("KEYPOOL_ENGINE", right)
        ran = migrate(data, "env:KEYPOOL_ENGINE")
        assert (ran.returncode, ran.stderr) == (0, "")
        refused(migrate(data, "env:KEYPOOL_NOTHING"), 2, "KEYPOOL_NOTHING")


# ------------------------------------------------------------------------------------------------- interrupted


class _Interrupted(Exception):
    """Raised in the middle of a move."""


def interrupt(opening: Callable[[], Any]) -> None:
    """Begin a move and stop after its first batch."""

    def progress(done: int) -> None:
        raise _Interrupted

    async def run() -> None:
        source, target = await opening()
        try:
            await move(source, target, progress)
        finally:
            await target.close()
            await source.close()

    with pytest.raises(_Interrupted):
        asyncio.run(run())


def test_an_interrupted_move_to_valkey_is_run_again_with_clear(empty: str, tmp_path: Path) -> None:
    """No server serves the incomplete pool; with --clear no key is moved twice."""
    path = a_file(tmp_path / "keypool.db", 4500)

    async def opening() -> tuple[Source, Target]:
        return FileSource(path), await ValkeyPlace.target(empty, None, clear=False)

    interrupt(opening)
    refused(migrate(path, empty), 1, "--clear")
    refused(migrate(empty, tmp_path / "new.db"), 1, "--clear")
    status, printed = run_server([f"--engine={empty}", "--port=0"])
    assert status == 1
    assert "--clear" in printed
    assert printed.count("\n") == 1, printed
    ran = migrate(path, empty, "--clear")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "keys\t4500\n" in ran.stdout
    refused(migrate(path, empty, "--clear"), 1, "already")


def test_the_seats_of_an_interrupted_move_are_counted_once(tmp_path: Path) -> None:
    """The next move begins anew, although the source may have fewer seats by then."""
    url, path = new_pool(shared_valkey()), tmp_path / "keypool.db"
    many_pools(path, Sealer(SECRETS))

    async def opening(*, clear: bool = False) -> tuple[Source, Target]:
        target = await ValkeyPlace.target(url, 1, clear=clear, secrets_keys=SECRETS)
        return FileSource(path, SECRETS), target

    interrupt(opening)
    with contextlib.closing(datafile.connect(path)) as database:
        database.execute("DELETE FROM keys WHERE id = 104")
        database.commit()

    async def run() -> None:
        await moved(*await opening(clear=True))
        async with engine_on(url, None, secrets=SECRETS) as engine:
            total = (await engine.stats()).total
            assert (engine.secrets(), (await engine.get("sk-live-2")).seats) == (total - 1, 2)

    asyncio.run(run())


def test_an_interrupted_move_to_a_file_leaves_none(empty: str, tmp_path: Path) -> None:
    """The file has its name only when it is complete; a temporary file left by a kill doesn't matter."""
    assert migrate(a_file(tmp_path / "keypool.db", 4500), empty).returncode == 0
    target, temporary = tmp_path / "new.db", tmp_path / "new.db.migrating"

    async def opening() -> tuple[Source, Target]:
        return await ValkeyPlace.source(empty), FileTarget(target)

    interrupt(opening)
    assert not target.exists()
    assert not temporary.exists()
    temporary.write_text("of a move that was killed")
    ran = migrate(empty, target)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "keys\t4500\n" in ran.stdout
    assert not temporary.exists()


@pytest.mark.thorough
@pytest.mark.parametrize(("number", "status"), [(SIGINT, 130), (SIGKILL, -9)])
def test_a_move_is_ended_by_signals(empty: str, tmp_path: Path, number: int, status: int) -> None:
    """Ctrl-C prints one line with what to do next."""
    path = a_file(tmp_path / "keypool.db", 200_000)
    process = subprocess.Popen(
        command("--from", str(path), "--to", empty), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=clean_environment({"PYTHONPATH": str(ROOT)}), stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        eventually(partial(_has_some, shared_valkey(), empty.partition("pool=")[2]), "keys are moved")
        process.send_signal(number)
        _, printed = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == status, printed
    assert number == SIGKILL or (
        printed.count("\n") == 1 and "interrupted" in printed and "--clear" in printed
    )


def _has_some(valkey: Valkey, pool: str) -> bool:
    return bool(valkey.ask("HLEN", keys_of(pool, 0, 1)[1]))


@pytest.mark.parametrize("encrypted", [False, True])
def test_rare_events_move(encrypted: bool, tmp_path: Path) -> None:
    """In their order, with their counts; without the hints that a data file with a secrets key doesn't have."""
    keys = (bytes(range(32)),) if encrypted else ()
    call = Origin(By.OPERATOR, "ops")
    events = RareEvents()
    key = Key(7, "k" * 20, 1_700_000_000.0, 1_700_000_300.0, lease=3)
    for number, (change, origin) in enumerate((
        (Change.GENERATED, call), (Change.GENERATED, call), (Change.EXPIRED, DEADLINE), (Change.QUARANTINED, HOLDER),
        (Change.REVEALED, Origin(By.OPERATOR)),
    )):  # fmt: skip
        events.add(change, key, "ann" if number else None, 1_700_000_000.125 + number / 2, origin)
    first, back = tmp_path / "first.db", tmp_path / "back.db"
    lock = file_lock.hold(first)
    sealer = Sealer(keys) if keys else None
    filling = datafile.Filling(first, {} if sealer is None else new_checks(datafile.Facts(), sealer))
    filling.add_events([event_row_of(event, 0, sealed=False) for event in events.all()])
    filling.finish({"last_id": 7, "last_lease": 3}, bytes(SECRET_BYTES))
    file_lock.release(lock)
    url = new_pool(shared_valkey())

    async def there_and_back() -> None:
        target = await ValkeyPlace.target(url, 2, clear=False, secrets_keys=keys)
        await moved(FileSource(first, keys), target)
        source = await ValkeyPlace.source(url, keys)
        await moved(source, FileTarget(back, keys))

    asyncio.run(there_and_back())
    found = list(map(event_of, datafile.examine(back).events[0]))
    for event in events.all():
        if encrypted:
            event.hint = NO_HINT
    assert found == events.all()
    assert [event.count for event in found] == [2, 1, 1, 1]
