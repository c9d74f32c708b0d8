"""The server on a disk that is full, fails or hangs, and with a data file that is removed."""

from __future__ import annotations

import contextlib
import os
import resource
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from signal import SIGCONT, SIGSTOP, SIGTERM
from typing import Any

import pytest
from crash import writer_of
from durable_support import (
    Load,
    crash,
    durable_server,
    fill,
    patched,
    refused_start,
    rows_in,
    texts_of,
)
from held_writer import FULL
from support import ACQUIRE, API, Client, eventually

from keypool.engine.durable import charts_file, file_lock

# --------------------------------------------------------------------------------- a disk that is full or fails


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = os.geteuid() == 0 and not subprocess.run(mount, check=False, capture_output=True).returncode
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_up(disk: Path) -> Path:
    """Fill the disk to the last byte. Returns the file that takes the space."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


@contextlib.contextmanager
def no_writing(pid: int) -> Iterator[None]:
    """Make every write of a process to a file fail meanwhile, as on a broken disk."""
    if not hasattr(resource, "prlimit"):
        pytest.skip("needs prlimit")
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))


def wait_for_refusal(client: Client) -> None:
    """Generate keys until that is refused: the write-ahead log has room for some."""

    def refused() -> bool:
        answer = client.post(API + "/keys")
        if answer.status == 201:
            return False
        answer.expect_problem(503, "storage-unavailable")
        return True

    eventually(refused, "a refusal")


def expect_only_reads(client: Client, key: dict[str, Any]) -> None:
    """Check that storage is down: changes are refused, and reads of what is on disk work."""
    client.get("/healthz").expect(200)
    client.get("/readyz").expect_problem(503, "storage-unavailable")
    path = f"{API}/keys/{key['key']}"
    for answer in (
        client.post(API + "/keys"),
        client.post(ACQUIRE),
        client.post(f"{path}/unblock"),
        client.post(f"{path}/unblock", json={"lease": 1, "outcome": "invalid"}),
        client.post(f"{path}/extend", json={"lease": 1}),
        client.post(f"{path}/quarantine"),
        client.post(f"{path}/restore"),
        client.post(f"{path}/keepalive"),
        client.delete(path),
        client.batch(op="keepalive", keys=[key["key"]]),
    ):
        answer.expect_problem(503, "storage-unavailable")
    row = client.row(key["key"])
    assert (row["id"], row["state"], row["outcome"]) == (key["id"], "available", None)
    assert client.stats()["total"] >= 1
    assert client.get(API + "/keys").expect(200)["keys"]
    client.get(f"{API}/keys/{'x' * 20}").expect_problem(404, "unknown-key")


def expect_all_well(client: Client) -> set[int]:
    """Check that storage is back, without a restart. Returns the ids of all keys."""
    eventually(lambda: client.get("/readyz").status == 200, "storage that is back")
    client.make()
    return texts_of(client)


def test_a_full_disk_keeps_no_charts(small_disk: Path, tmp_path: Path) -> None:
    """The log has one line, until there is space again. Those from before stay as they are."""
    path = small_disk / "keypool.db"
    env = patched(tmp_path / "patch", "from keypool.web import kept_charts; kept_charts.KEEP_SECONDS = 0.5")
    charts = charts_file.beside(path)
    with durable_server(path, env=env) as server:
        eventually(charts.exists, "charts")
        before = charts.stat().st_mtime_ns
        filler = fill_up(small_disk)
        eventually(lambda: "the charts aren't kept" in server.log, "a line")
        assert "No space left on device" in server.log
        kept = charts_file.read(charts)
        server.client().get("/healthz").expect(200)
        filler.unlink()
        eventually(lambda: "the charts are kept again" in server.log, "another line")
        assert server.log.count("the charts aren't kept") == 1
        assert charts.stat().st_mtime_ns > before
    assert list(kept) == ["default"]


@pytest.mark.parametrize("cut", ["stopped", "killed"])
def test_a_full_disk_refuses_changes_until_there_is_room(small_disk: Path, cut: str) -> None:
    """Nothing is lost, even if the server is killed while the disk is full."""
    path = small_disk / "keypool.db"
    with durable_server(path) as server:
        server.allow("can't be written")
        client = server.client()
        key = client.make()
        filler = fill_up(small_disk)
        wait_for_refusal(client)
        expect_only_reads(client, key)
        made = {row["id"] for row in client.get(API + "/keys?limit=500").expect(200)["keys"]}
        if cut == "killed":
            told = made - {max(made)}  # the last one was refused: it may be there or not
            crash(server)
            filler.unlink()
        else:
            filler.unlink()
            told = expect_all_well(client)
            eventually(lambda: "can be written again" in server.log, "it is logged")
            assert server.log.count(FULL) == 1
    with durable_server(path) as server:
        assert told <= texts_of(server.client())


def test_an_io_error_refuses_changes_until_it_is_over(tmp_path: Path) -> None:
    """The same holds for I/O errors, once and repeatedly."""
    path = tmp_path / "keypool.db"
    with durable_server(path) as server:
        server.allow("can't be written")
        client = server.client()
        key = client.make()
        for _ in range(2):
            with no_writing(writer_of(server)):
                wait_for_refusal(client)
                expect_only_reads(client, key)
            told = expect_all_well(client)
        crash(server)
    with durable_server(path) as server:
        assert texts_of(server.client()) == told


def test_a_disk_that_fails_under_load_loses_nothing(tmp_path: Path) -> None:
    """While faults come and go, every caller gets an answer, and acknowledged keys are kept."""
    path = tmp_path / "keypool.db"
    with durable_server(path) as server:
        server.allow("can't be written")
        with Load(server) as load:
            for _ in range(3):
                load.wait_for(50)
                with no_writing(writer_of(server)):
                    load.wait_for_refusals(20)
                eventually(lambda: server.client().get("/readyz").status == 200, "storage that is back")
            load.wait_for(50)
        crash(server)
    with durable_server(path) as server:
        assert load.told <= texts_of(server.client())


def test_a_keeper_loses_no_key_to_a_full_disk(small_disk: Path) -> None:
    """The disk is full for more than twice the TTL while a keeper retries; then the server is killed."""
    path = small_disk / "keypool.db"
    with durable_server(path, "--keepalive-seconds=4", "--restart-grace=60") as server:
        server.allow("can't be written")
        client = server.client()
        keys = [key["key"] for key in client.make_many(200)]
        filler = fill_up(small_disk)
        kept: list[int] = []

        def keep() -> int:
            answer = client.batch(op="keepalive", keys=keys)
            if answer.status == 200:
                assert answer.json == {"op": "keepalive", "done": 200, "unknown": [], "stale": []}
            else:
                answer.expect_problem(503, "storage-unavailable")
            kept.append(answer.status)
            time.sleep(0.1)
            return answer.status

        eventually(lambda: keep() == 503, "a disk that is full")
        refused_at = time.monotonic()
        eventually(
            lambda: keep() == 503 and time.monotonic() > refused_at + 8.5, "twice the keepalive", within=40
        )
        assert client.stats()["expired"] == 0
        filler.unlink()
        eventually(lambda: keep() == 200, "storage that is back")
        assert client.stats()["total"] == 200
        assert client.stats()["expired"] == 0
        crash(server)
    assert len(rows_in(path)) == 200


def test_a_disk_that_hangs_is_an_outage_that_ends_by_itself(tmp_path: Path) -> None:
    """It is noticed within 6 s: a log line, 503 for all calls and for /readyz. No key is lost."""
    flags = ("--keepalive-seconds=4", "--restart-grace=60")
    with durable_server(tmp_path / "keypool.db", *flags) as server:
        server.allow("can't be written")
        client = server.client()
        keys = [key["key"] for key in client.make_many(3)]
        writer = writer_of(server)
        for _ in range(5):  # until this machine, if it is busy, has let the server notice it in time
            began = time.monotonic()
            os.kill(writer, SIGSTOP)
            try:
                client.post(f"{API}/keys/{keys[0]}/keepalive").expect_problem(503, "storage-unavailable")
                took = time.monotonic() - began
                client.get("/readyz").expect_problem(503, "storage-unavailable")
                client.batch(op="keepalive", keys=keys).expect_problem(503, "storage-unavailable")
                eventually(lambda: "a commit has taken over 5 s" in server.log, "it is logged")
                assert "keypool_storage_up 0.0" in client.get("/metrics").body.decode()
                time.sleep(1)  # the other keys' lives are over by now
            finally:
                os.kill(writer, SIGCONT)
            eventually(lambda: client.get("/readyz").status == 200, "storage that is back")
            assert client.batch(op="keepalive", keys=keys).expect(200) == {
                "op": "keepalive",
                "done": 3,
                "unknown": [],
                "stale": [],
            }
            assert took > 4.5
            if took < 8:
                return
        raise AssertionError("it was never noticed in time")


@pytest.mark.parametrize("how", ["moved", "replaced"])
def test_a_data_file_that_is_gone_is_an_outage(tmp_path: Path, how: str) -> None:
    """It is noticed within a second, and over when the file is back. A stop before that reports what was not kept."""
    path, away = tmp_path / "keypool.db", tmp_path / "away"
    with durable_server(path) as server:
        server.allow("can't be written|the last commit was not made")
        client = server.client()
        client.make_many(20)
        path.rename(away)
        if how == "replaced":
            fill(tmp_path / "other", [])
            (tmp_path / "other").rename(path)
        made = 20
        began = time.monotonic()
        while (answer := client.post(API + "/keys")).status == 201:
            made += 1
            assert answer.asked_at < began + 1
        answer.expect_problem(503, "storage-unavailable")
        problem = client.get("/readyz").expect_problem(503, "storage-unavailable")
        assert "deleted, moved or replaced" in problem["detail"]
        # The call that was refused has made a key, unless the outage was noticed between two calls.
        there = client.stats()["total"]
        assert there in (made, made + 1)
        if how == "replaced":
            server.signal(SIGTERM)
            assert server.wait() == 1
            assert rows_in(path) == []
        else:
            away.rename(path)
            assert len(expect_all_well(client)) == there + 1
    assert len(rows_in(path if how == "moved" else away)) == (there + 1 if how == "moved" else made)


def test_the_writer_is_given_no_setting_and_no_token(tmp_path: Path) -> None:
    """The environment of the process contains no secret."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("needs /proc")
    secret = {"KEYPOOL_ADMIN_TOKEN": "admin-token-of-this-test"}
    with durable_server(tmp_path / "keypool.db", env=secret) as server:
        environ = Path(f"/proc/{writer_of(server)}/environ").read_bytes()
        assert b"PATH=" in environ
        assert b"KEYPOOL" not in environ


def test_folders_are_made_for_their_owner_alone(tmp_path: Path) -> None:
    """This holds for any umask. Existing folders keep their mode."""
    before = os.umask(0)
    try:
        tmp_path.chmod(0o755)
        os.close(file_lock.hold(tmp_path / "a" / "b" / "keypool.db"))
    finally:
        os.umask(before)
    modes = [
        stat.S_IMODE(folder.stat().st_mode) for folder in (tmp_path, tmp_path / "a", tmp_path / "a" / "b")
    ]
    assert modes == [0o755, 0o700, 0o700]


def test_waiters_are_served_when_the_disk_is_back(tmp_path: Path) -> None:
    """A waiter gets a key whose block ended during the outage when it is over, and not before."""
    with durable_server(tmp_path / "keypool.db", "--block-seconds=4") as server:
        server.allow("can't be written")
        client = server.client()
        key = client.make()
        assert client.acquire()["lease"] == 1
        waiter = server.wire(limit=60)
        waiter.ask("POST", ACQUIRE, json={"wait": 60})
        client.expect_waiting(1)
        with no_writing(writer_of(server)):
            client.post(f"{API}/keys/{key['key']}/keepalive").expect_problem(503, "storage-unavailable")
            client.post(ACQUIRE, json={"wait": 60}).expect_problem(503, "storage-unavailable")
            eventually(lambda: client.stats()["available"] == 1, "the end of the block")
            assert client.stats()["waiting"] == 1
        assert waiter.answer().expect(200)["lease"] == 2


def test_a_start_on_a_full_disk_is_one_line(small_disk: Path) -> None:
    """The status is 1, and the log has no other line."""
    fill_up(small_disk)
    assert FULL in refused_start(small_disk / "keypool.db")
