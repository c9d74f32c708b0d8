"""The server on its data file, as a user runs it: kills, stops, starts, its writer process, its clock."""

from __future__ import annotations

import contextlib
import inspect
import os
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from signal import SIGCONT, SIGINT, SIGSTOP, SIGTERM

import pytest
from crash import children_of, command_of, kill, lives, writer_of
from durable_support import (
    ROWS,
    Load,
    crash,
    durable_server,
    fill,
    make_whole_file,
    numbers_in,
    patched,
    refused_start,
    row,
    rows_in,
    texts_of,
)
from support import ACQUIRE, API, LATE, Client, ServerProcess, eventually
from valkeys import held_port

from keypool.core.errors import StartError
from keypool.engine.durable import file_lock


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data file of several pages after a clean stop."""
    return make_whole_file(tmp_path_factory.mktemp("whole"))


# ------------------------------------------------------------------------------------------- the whole server


def test_a_server_keeps_its_pool_by_default(tmp_path: Path) -> None:
    """It is data/keypool.db below the working directory, created if needed, and readable by its owner only."""
    before = os.umask(0)
    try:
        with ServerProcess(["--port=0"], cwd=tmp_path) as server:
            key = server.client().make()
            files = {each.name: stat.S_IMODE(each.stat().st_mode) for each in (tmp_path / "data").iterdir()}
    finally:
        os.umask(before)
    assert files == dict.fromkeys(["keypool.db", "keypool.db-shm", "keypool.db-wal"], 0o600)
    with ServerProcess(["--port=0"], cwd=tmp_path) as server:
        assert server.client().row(key["key"])["id"] == key["id"]


def test_missing_folders_are_made(tmp_path: Path) -> None:
    """Their parents are created as well."""
    path = tmp_path / "a" / "b b" / "ü?#%" / "keypool.db"
    with ServerProcess([f"--data={path}", "--port=0"], cwd=tmp_path) as server:
        server.client().make()
    assert len(rows_in(path)) == 1


def test_acknowledged_changes_survive_a_kill(tmp_path: Path) -> None:
    """One of each call, one after the other; test_crash.py makes them concurrently."""
    path = tmp_path / "keypool.db"
    with durable_server(path) as server:
        client = server.client()
        one, two, three = client.make_many(3)
        client.delete(f"{API}/keys/{three['key']}").expect(204)
        leases = {lease["id"]: lease["lease"] for lease in (client.acquire(owner="me"), client.acquire())}
        client.post(f"{API}/keys/{one['key']}/unblock", json={"lease": leases[1]}).expect(200)
        told_at = time.monotonic()
        rows = {key["id"]: client.row(key["key"]) for key in (one, two)}
        before = client.stats()
        crash(server)
    with durable_server(path) as server:
        client = server.client()
        for key in (one, two):
            row = client.row(key["key"])
            made, was_made = (
                datetime.fromisoformat(each.pop("created_at")) for each in (row, rows[key["id"]])
            )
            assert abs(made - was_made) <= timedelta(milliseconds=1)
            left = {name: row.pop(name) for name in ("expires_in", "release_in")}
            for name, value in left.items():
                was = rows[key["id"]].pop(name)
                assert (value is None) == (was is None)
                if value is not None:
                    assert was - (time.monotonic() - told_at) - LATE <= value <= was
            assert row == rows[key["id"]]
        client.get(f"{API}/keys/{three['key']}").expect_problem(404, "unknown-key")
        client.get(f"{API}/keys/id:3").expect_problem(404, "unknown-key")
        after = client.stats()
        assert after.pop("uptime") < before.pop("uptime") + 60
        assert after == before
        assert client.acquire()["lease"] == 3
        assert client.make()["id"] == 4


# ------------------------------------------------------------------------------------- two servers, one file


def test_a_file_that_another_server_holds_is_refused(tmp_path: Path) -> None:
    """After 5 s by default, so that a predecessor has the time to end."""
    path = tmp_path / "keypool.db"
    lock = file_lock.hold(path)
    took = 99.0
    for _ in range(5):  # of which one is no slower than it should be, on a machine that is busy at times
        began = time.monotonic()
        with pytest.raises(StartError, match="held by another server"):
            file_lock.hold(path, 0.3)
        took = time.monotonic() - began
        assert took >= 0.3
        if took < 3:
            break
    assert took < 3
    assert file_lock.LOCK_SECONDS == 5
    assert inspect.signature(file_lock.hold).parameters["lock_seconds"].default == file_lock.LOCK_SECONDS
    file_lock.release(lock)
    file_lock.release(file_lock.hold(path, 0))


@pytest.mark.thorough
def test_a_server_whose_file_another_holds_exits_after_5_s(tmp_path: Path) -> None:
    """One line and status 1; the server that holds the file is not affected."""
    path = tmp_path / "keypool.db"
    with durable_server(path) as server:
        began = time.monotonic()
        assert "held by another server" in refused_start(path)
        assert time.monotonic() - began >= 5
        assert server.client().make()["id"] == 1


def test_a_file_is_waited_for_while_its_server_dies(tmp_path: Path) -> None:
    """The next server starts as soon as the one before has ended, with all its keys."""
    path = tmp_path / "keypool.db"
    first = durable_server(path)
    followed: list[ServerProcess] = []
    try:
        key = first.client().make()
        following = threading.Thread(target=lambda: followed.append(durable_server(path)))
        following.start()
        eventually(lambda: len(_servers_of(path)) == 2, "the next server")
        crash(first)
        following.join(90)
        [second] = followed
        assert second.client().row(key["key"])["id"] == key["id"]
        second.finish()
    finally:
        first.close()
        for server in followed:
            server.close()


# ---------------------------------------------------------------------------------- the writer and the server


def test_a_killed_writer_is_replaced(tmp_path: Path) -> None:
    """It may be idle or busy, and killed repeatedly: acknowledged changes are kept, and the log has a line."""
    path = tmp_path / "keypool.db"
    with durable_server(path) as server:
        server.allow("writer process died")
        client = server.client()
        told = set()
        writers = set()
        for _ in range(3):
            told.add(client.make()["id"])
            writers.add(writer_of(server))
            kill(writer_of(server))
            eventually(lambda: writer_of(server) not in writers, "another writer")
            eventually(lambda: client.get("/readyz").status == 200, "a writer that can write")
            told |= {client.make()["id"]}
        assert len(writers) == 3
        eventually(lambda: server.log.count("can be written again") == 3, "the log says so each time")
        crash(server)
    with durable_server(path) as server:
        assert texts_of(server.client()) == told


def test_a_writer_killed_under_load_costs_some_503_and_nothing_else(tmp_path: Path) -> None:
    """No call hangs or gets another error, and no key is lost."""
    path = tmp_path / "keypool.db"
    with durable_server(path) as server:
        server.allow("writer process died")
        with Load(server) as load:
            for _ in range(4):
                load.wait_for(60)
                kill(writer_of(server))
            load.wait_for(60)
        assert load.told <= texts_of(server.client())
        crash(server)
    with durable_server(path) as server:
        assert load.told <= texts_of(server.client())


def test_a_stopped_writer_makes_callers_wait(tmp_path: Path) -> None:
    """Changes are answered when it continues; reads of what is on disk, lists and stats don't wait."""
    with durable_server(tmp_path / "keypool.db") as server:
        client = server.client()
        one, two = client.make_many(2)
        writer = writer_of(server)
        os.kill(writer, SIGSTOP)
        try:
            asked = []
            for path in (f"{API}/keys/{one['key']}/keepalive", f"{API}/keys"):
                wire = server.wire()
                wire.ask("POST", path)
                asked.append(wire)
            eventually(lambda: client.stats()["total"] == 3, "both calls in the pool")
            assert client.row(two["key"])["state"] == "available"
            assert len(texts_of(client)) == 3
            client.get("/readyz").expect(200)
            read = server.wire()
            read.ask("GET", f"{API}/keys/{one['key']}")
        finally:
            os.kill(writer, SIGCONT)
        assert asked[0].answer().status == 200
        assert asked[1].answer().status == 201
        assert read.answer().status == 200


@pytest.mark.parametrize("state", ["idle", "under load", "stopped"])
def test_a_killed_server_leaves_no_writer(tmp_path: Path, state: str) -> None:
    """The writer ends soon in any state, and the file is unlocked and complete."""
    path = tmp_path / "keypool.db"
    with durable_server(path) as server:
        writer = writer_of(server)
        with Load(server) if state == "under load" else contextlib.nullcontext() as load:
            if load is not None:
                load.wait_for(30)
                load.stop()
            if state == "stopped":
                server.client().make()
                os.kill(writer, SIGSTOP)
            crash(server)
            eventually(lambda: not lives(writer), "a writer that is gone")
    datafile_lock = file_lock.hold(path)
    os.close(datafile_lock)
    assert len(rows_in(path)) >= (state != "idle")


@pytest.mark.parametrize("number", [SIGINT, SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_to_all_processes_is_handled_by_the_server(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C goes to the process group, a service manager signals every process: status 0, and nothing is lost."""
    path = tmp_path / "keypool.db"
    with durable_server(path) as server:
        writer = writer_of(server)
        with Load(server) as load:
            load.wait_for(100)
            load.stop()
            os.kill(writer, number)
            os.killpg(server.pid, number)
            with contextlib.suppress(ProcessLookupError):  # the server may have ended it by now
                os.kill(writer, number)
            assert server.wait() == 0
        eventually(lambda: not lives(writer), "a writer that is gone")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["keypool.db", "keypool.db-charts"], (
        "not closed in peace"
    )
    assert {each[0] for each in rows_in(path)} >= load.told
    with durable_server(path) as server:
        assert load.told <= texts_of(server.client())


def test_a_stop_writes_the_last_commit(tmp_path: Path) -> None:
    """After the drain the journal is closed, with the counters."""
    path = tmp_path / "keypool.db"
    with durable_server(path) as server:
        client = server.client()
        client.make_many(1000)
        client.batch(op="acquire", count=500).expect(200)
        stats = client.stats()
        server.signal(SIGTERM)
        assert server.wait() == 0
    numbers = numbers_in(path)
    assert {name: numbers[name] for name in ("generated", "acquired")} == {"generated": 1000, "acquired": 500}
    assert stats["total"] == len(rows_in(path))


def test_a_stop_while_the_writer_is_stopped_ends_in_time(tmp_path: Path) -> None:
    """Changes that can't be committed aren't answered. The server ends in time, logs it, and kills the writer."""
    with durable_server(tmp_path / "keypool.db", "--drain-seconds=1") as server:
        server.allow("the last commit was not made")
        writer = writer_of(server)
        os.kill(writer, SIGSTOP)
        wire = server.wire()
        wire.ask("POST", API + "/keys")
        eventually(lambda: server.client().stats()["total"] == 1, "the call in the pool")
        server.signal(SIGTERM)
        assert server.wait(30) == 1
        assert wire.rest() == b""
        eventually(lambda: not lives(writer), "a writer that is gone")
        assert "the last commit was not made" in server.log


# -------------------------------------------------------------------------------------------------- loading


LOAD_GATE = """
    import sys, time
    from pathlib import Path
    if any(word.endswith("server.py") for word in sys.orig_argv):
        from keypool.engine.durable import datafile
        gate = Path({gate!r})
        inspect, read_keys = datafile.inspect, datafile.read_keys
        def slow_inspect(path):
            while {while_inspecting} and not gate.exists():
                time.sleep(0.01)
            return inspect(path)
        def slow_read(*where):
            while not {while_inspecting} and not gate.exists():
                time.sleep(0.001)
                yield 0, []
            yield from read_keys(*where)
        datafile.inspect, datafile.read_keys = slow_inspect, slow_read
"""


@pytest.mark.parametrize("while_inspecting", [True, False], ids=["inspecting", "reading"])
def test_while_loading_calls_get_503(whole_file: Path, tmp_path: Path, while_inspecting: bool) -> None:
    """/healthz is 200, /readyz and every call 503, until the keys are loaded."""
    path, gate = tmp_path / "keypool.db", tmp_path / "gate"
    shutil.copy(whole_file, path)
    code = LOAD_GATE.format(gate=str(gate), while_inspecting=while_inspecting)
    with loading_server(path, patched(tmp_path / "patch", code)) as (client, started):
        client.get("/healthz").expect(200)
        client.get("/readyz").expect_problem(503, "loading")
        for answer in (
            client.post(API + "/keys"),
            client.post(ACQUIRE, json={"wait": 60}),
            client.get(f"{API}/keys/{1:020d}"),
            client.get(API + "/keys"),
            client.get(API + "/stats"),
            client.batch(op="keepalive", keys=[f"{1:020d}"]),
            client.get(API + "/random_api_key/"),
            client.get(API + "/start_scheduler/"),
            client.get(API + "/openapi.json"),
            client.get(API + "/feed"),
        ):
            answer.expect_problem(503, "loading")
        gate.touch()
        server = started()
        client.get("/readyz").expect(200)
        assert client.stats()["total"] == ROWS
        server.finish()


@pytest.mark.parametrize("number", [SIGINT, SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_stop_while_it_loads(whole_file: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Status 0 at once; nothing has changed, and there is no writer yet."""
    path = tmp_path / "keypool.db"
    shutil.copy(whole_file, path)
    code = LOAD_GATE.format(gate=str(tmp_path / "never"), while_inspecting=False)
    before = path.read_bytes()
    with loading_server(path, patched(tmp_path / "patch", code)) as (client, started):
        # While it is forked, a process that isn't the server yet may have its command line.
        [pid] = eventually(
            lambda: found if len(found := _servers_of(path)) == 1 else [], "the server, and no other"
        )
        client.get("/healthz").expect(200)
        assert not children_of(pid), "a writer was started before the file was found to be in order"
        os.kill(pid, number)
        with pytest.raises(AssertionError, match="never said that it was ready"):
            started()
    assert path.read_bytes() == before


def _servers_of(path: Path) -> list[int]:
    """The process ids of the servers that this process started on a file."""
    children = children_of(os.getpid())
    forked = [pid for child in children for pid in children_of(child)]  # by fork_server.py
    return [pid for pid in children + forked if f"--data={path}" in command_of(pid)]


class _Address:
    """The address of a server that isn't ready yet, for a Client."""

    def __init__(self, port: int) -> None:
        self.address, self.port = "127.0.0.1", port

    def note(self, answer: object) -> None:
        """Nothing is kept."""


@contextlib.contextmanager
def loading_server(path: Path, env: dict[str, str]) -> Iterator[tuple[Client, Callable[[], ServerProcess]]]:
    """A server that is loading. Yields a client, and a function that waits until it is ready or raises."""
    holding = contextlib.ExitStack()
    port = holding.enter_context(held_port())
    started: list[ServerProcess | BaseException] = []

    def start() -> None:
        try:
            started.append(ServerProcess([f"--data={path}", f"--port={port}"], cwd=path.parent, env=env))
        except BaseException as error:
            started.append(error)

    thread = threading.Thread(target=start)
    thread.start()

    def wait() -> ServerProcess:
        thread.join(90)
        [server] = started
        if isinstance(server, BaseException):
            raise server
        return server

    client = Client(_Address(port))  # type: ignore[arg-type]

    def answers() -> bool:
        try:
            return client.get("/healthz").status == 200
        except OSError:
            return False

    try:
        eventually(answers, "an answer of a server that loads", within=60)
        yield client, wait
    finally:
        client.close()
        for server in started:
            if isinstance(server, ServerProcess):
                server.close()
        holding.close()


# --------------------------------------------------------------------------------------- clocks, of the process

MOVED_CLOCK = """
    import time
    from pathlib import Path
    offset = Path({offset!r})
    true_time = time.time
    time.time = lambda: true_time() + float(offset.read_text() or 0)
"""


def set_offset(path: Path, seconds: float) -> None:
    """Set the offset of the server's wall clock."""
    beside = path.with_suffix(".new")
    beside.write_text(str(seconds))
    beside.rename(path)


def test_a_clock_set_back_an_hour_between_two_runs(tmp_path: Path) -> None:
    """No key comes back or lives longer than promised."""
    offset, path = tmp_path / "offset", tmp_path / "keypool.db"
    env = patched(tmp_path / "patch", MOVED_CLOCK.format(offset=str(offset)))
    set_offset(offset, 0)
    with durable_server(path, "--keepalive-seconds=100", "--block-seconds=50", env=env) as server:
        client = server.client()
        one, two = client.make_many(2)
        client.delete(f"{API}/keys/{two['key']}").expect(204)
        lease = client.acquire(owner="me")
        crash(server)
    set_offset(offset, -3600)
    with durable_server(path, "--keepalive-seconds=100", "--block-seconds=50", env=env) as server:
        client = server.client()
        row = client.row(one["key"])
        assert row["expires_in"] <= one["expires_in"] + LATE
        assert row["release_in"] <= lease["release_in"] + LATE
        assert (row["state"], row["owner"], row["lease"]) == ("blocked", "me", lease["lease"])
        client.get(f"{API}/keys/{two['key']}").expect_problem(404, "unknown-key")
        assert client.make()["id"] == 3
        crash(server)
    set_offset(offset, 3600)  # and forward: all that was to end has ended
    with durable_server(path, env=env) as server:
        assert server.client().stats()["total"] == 0


def test_a_clock_that_jumps_while_the_server_runs(tmp_path: Path) -> None:
    """An hour forward, an hour back: blocks and TTLs are as before, and moments follow the pool's clock."""
    offset = tmp_path / "offset"
    env = patched(tmp_path / "patch", MOVED_CLOCK.format(offset=str(offset)))
    set_offset(offset, 0)
    with durable_server(tmp_path / "keypool.db", "--block-seconds=0.3", env=env) as server:
        client = server.client()
        made = [client.make()]
        for jump in (3600, -3600, 86_400):
            set_offset(offset, jump)
            began = time.monotonic()
            lease = client.acquire()
            assert lease["release_in"] <= 0.3
            assert lease["expires_in"] > 200
            eventually(lambda: client.stats()["blocked"] == 0, "the release")
            assert time.monotonic() - began >= 0.3 - LATE
            made.append(client.make())
        created = [datetime.fromisoformat(client.row(key["key"])["created_at"]) for key in made]
        assert created == sorted(created)
        assert created[-1] - created[0] < timedelta(seconds=3600)


# ---------------------------------------------------------------------------------- many keys, at the start


def test_all_that_expired_during_a_stop_is_purged_on_disk(tmp_path: Path) -> None:
    """A later --restart-grace does not bring back any key that was reported as gone."""
    path = tmp_path / "keypool.db"
    count = 20_000
    fill(path, [row(id, -10) for id in range(1, count + 1)])
    with durable_server(path) as server:
        client = server.client()
        eventually(lambda: client.stats()["total"] == 0, "an empty pool", within=60)
        client.get(f"{API}/keys/id:1").expect_problem(404, "unknown-key")
        assert client.stats()["expired"] == count
        server.signal(SIGTERM)
        server.wait()
    assert len(rows_in(path)) == 0
    with durable_server(path, "--restart-grace=100") as server:
        stats = server.client().stats()
        assert (stats["total"], stats["expired"]) == (0, count)


def test_keys_may_expire_while_the_server_starts(tmp_path: Path) -> None:
    """Keys may expire at any moment of the start."""
    path = tmp_path / "keypool.db"
    count = 60_000
    fill(path, [row(id, 20 * id / count) for id in range(1, count + 1)])
    with durable_server(path) as server:
        stats = server.client().stats()
        assert stats["generated"] - stats["expired"] == stats["total"] < count
        crash(server)


def test_a_large_pool_is_ready_with_all_of_it(tmp_path: Path) -> None:
    """There are more keys than fit into a slice, some blocked. It starts twice, once after a kill."""
    path = tmp_path / "keypool.db"
    count = 30_000
    rows = [
        row(id, 3600, block=1800, lease=id, owner="me") if id % 10 == 0 else row(id, 3600)
        for id in range(1, count + 1)
    ]
    fill(path, rows)
    for _ in range(2):
        with durable_server(path) as server:
            client = server.client()
            stats = client.stats()
            assert (stats["total"], stats["blocked"]) == (count, count // 10)
            assert client.row(f"{10:020d}")["owner"] == "me"
            crash(server)
