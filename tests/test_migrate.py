"""`keypool migrate`: a pool moves from a data file to Valkey and back, whole, or not at all."""

from __future__ import annotations

import itertools
import os
import pty
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGKILL
from typing import Any

import pytest
from support import API, ROOT, ServerProcess, clean_environment, eventually
from valkeys import Cluster, Valkey, with_pool

from keypool.engine.valkey.scripts import keys_of

_pools = itertools.count()
COUNTERS = ("generated", "acquired", "unblocked", "released", "deleted", "expired", "kept_alive", "refused")


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    """A Valkey that keeps nothing."""
    with Valkey() as made:
        yield made


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three of them."""
    with Cluster(3) as made:
        yield made


@pytest.fixture(params=["valkey", "cluster"])
def url(request: pytest.FixtureRequest) -> str:
    """Of a place in either where no pool is."""
    return with_pool(request.getfixturevalue(request.param).url, next(_pools))


@pytest.fixture
def empty(valkey: Valkey) -> str:
    """The URL of a place where no pool is."""
    return with_pool(valkey.url, next(_pools))


def command(*words: str) -> list[str]:
    """What runs keypool migrate."""
    return [sys.executable, "-m", "keypool", "migrate", *words]


def migrate(source: str | Path, target: str | Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(
        command("--from", str(source), "--to", str(target), *flags),
        capture_output=True, text=True, env=clean_environment({"PYTHONPATH": str(ROOT)}), timeout=120, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


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
                " INSERT INTO keys SELECT i, printf('%020d', i), created_at, expires_at, NULL, 0, NULL"
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


def test_deadlines_go_on_during_a_move(empty: str, tmp_path: Path) -> None:
    """What dies or is released meanwhile is dead or free at the other end, and counted there."""
    path = tmp_path / "keypool.db"
    flags = ["--port=0", "--block-seconds=0.4", "--keepalive-seconds=1.5"]
    with ServerProcess([f"--data={path}", *flags], cwd=tmp_path) as server:
        client = server.client()
        client.make_many(5)
        client.acquire()
    assert migrate(path, empty).returncode == 0
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


def test_a_file_that_is_served_is_refused(empty: str, data: Path, tmp_path: Path) -> None:
    """After the 5 s in which a server may end."""
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
    refused(migrate(empty, empty), 2, "on the other")
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


def test_a_wrong_password_is_one_line(data: Path) -> None:
    """Which names no password."""
    with Valkey("--requirepass", "right-password") as guarded:
        url = guarded.url.replace("://", "://:wrong-password@")
        assert "wrong-password" not in refused(migrate(data, url), 1, "WRONGPASS")
        right = guarded.url.replace("://", "://:right-password@")
        ran = subprocess.run(
            command("--from", str(data), "--to", "env:KEYPOOL_ENGINE"), capture_output=True, text=True, check=False,
            env=clean_environment({"PYTHONPATH": str(ROOT), "KEYPOOL_ENGINE": right}), timeout=60,
        )  # fmt: skip
        assert (ran.returncode, ran.stderr) == (0, "")
        refused(migrate(data, "env:KEYPOOL_NOTHING"), 2, "KEYPOOL_NOTHING")


# -------------------------------------------------------------------------------------------------- broken off


def broken_off(words: list[str], when: Callable[[], bool], number: int) -> tuple[int, str]:
    """Run it, and end it by a signal at some moment; its status and what it said."""
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=clean_environment({"PYTHONPATH": str(ROOT)}), stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        eventually(when, "it is at work")
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    return process.returncode, said


def test_a_move_to_valkey_that_is_broken_off_is_done_again(valkey: Valkey, tmp_path: Path) -> None:
    """No server takes what is there by then; with --clear it is done anew, and nothing is there twice."""
    path = a_file(tmp_path / "keypool.db", 60_000)
    for number, status in ((SIGINT, 130), (SIGKILL, -9)):
        url = with_pool(valkey.url, next(_pools))
        words = command("--from", str(path), "--to", url)
        left, said = broken_off(words, partial(_has_some, valkey, url.partition("pool=")[2]), number)
        assert left == status, said
        if number == SIGINT:
            assert said.count("\n") == 1, said
            assert "interrupted" in said
            assert "--clear" in said
        refused(migrate(path, url), 1, "--clear")
        refused(migrate(url, tmp_path / "new.db"), 1, "--clear")
        _refuses_to_serve(url, tmp_path)
        ran = migrate(path, url, "--clear")
        assert (ran.returncode, ran.stderr) == (0, "")
        assert "keys\t60000\n" in ran.stdout
        refused(migrate(path, url, "--clear"), 1, "already")


def _has_some(valkey: Valkey, pool: str) -> bool:
    return bool(valkey.ask("HLEN", keys_of(pool, 0, 1)[1]))


def _refuses_to_serve(url: str, folder: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(ROOT / "server.py"), f"--engine={url}", "--port=0"], cwd=folder,
        capture_output=True, text=True, env=clean_environment(), timeout=60, check=False,
    )  # fmt: skip
    assert ran.returncode == 1
    assert "--clear" in ran.stderr
    assert ran.stderr.count("\n") == 1, ran.stderr


def test_a_move_to_a_file_that_is_broken_off_leaves_none(valkey: Valkey, tmp_path: Path) -> None:
    """The file has its name only when it is whole; what a kill left beside it is in nobody's way."""
    url = with_pool(valkey.url, next(_pools))
    assert migrate(a_file(tmp_path / "keypool.db", 60_000), url).returncode == 0
    target, beside = tmp_path / "new.db", tmp_path / "new.db.migrating"
    words = command("--from", url, "--to", str(target))
    log = tmp_path / "new.db.migrating-wal"  # which the rows are written to

    def at_work() -> bool:
        return log.exists() and log.stat().st_size > 100_000

    status, said = broken_off(words, at_work, SIGINT)
    assert status == 130, said
    assert "run it again" in said
    assert not beside.exists()
    status, said = broken_off(words, at_work, SIGKILL)
    assert status == -9, said
    assert not target.exists()
    ran = migrate(url, target)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "keys\t60000\n" in ran.stdout
    assert not beside.exists()
