"""`--processes`: several workers on one address, and the supervisor that starts, watches and stops them."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
from client_support import ports_in_a_row
from crash import children_of, lives
from support import (
    ACQUIRE,
    ADMIN_TOKEN,
    API,
    CLIENT_TOKEN,
    OTHER_CLIENT_TOKEN,
    VIEWER_TOKEN,
    Answer,
    Client,
    ServerProcess,
    Wire,
    eventually,
    run_server,
)
from test_notify import Manager
from test_process import expect_one_line
from valkeys import Valkey

COUNT = 3
Start = Callable[..., ServerProcess]


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    """A Valkey that keeps nothing."""
    with Valkey() as made:
        yield made


@pytest.fixture
def start(valkey: Valkey, tmp_path: Path) -> Iterator[Start]:
    """Starts a group on an empty pool; it must stop cleanly."""
    valkey.ask("FLUSHALL")
    started: list[ServerProcess] = []

    def begin(*flags: str, env: dict[str, str] | None = None) -> ServerProcess:
        engine = f"--engine={valkey.url}/0"
        server = ServerProcess([engine, f"--processes={COUNT}", "--port=0", *flags], cwd=tmp_path, env=env)
        started.append(server)
        return server

    try:
        yield begin
        for server in started:
            server.finish()
    finally:
        for server in started:
            server.close()


@contextlib.contextmanager
def at(server: ServerProcess, port: int) -> Iterator[Client]:
    """A client of one process, by the port that is its own."""
    shared, server.port = server.port, port
    try:
        with Client(server) as client:
            yield client
    finally:
        server.port = shared


# ------------------------------------------------------------------------------------------------------ start


def test_one_process_only_over_the_embedded_engine(tmp_path: Path) -> None:
    """Other values, from any source, give status 2 and one line that explains what to do."""
    file = tmp_path / "keypool.toml"
    file.write_text("processes = 2\n")
    for flags, env in (
        (["--processes=2"], {}),
        ([], {"KEYPOOL_PROCESSES": "2"}),
        ([f"--config={file}"], {}),
        (["--processes=2", "--print-config"], {}),
    ):
        status, output = run_server([*flags, "--data=:memory:", "--port=0"], env)
        assert status == 2, output
        expect_one_line(output, "processes", "embedded", "valkey://")


def test_all_serve_one_pool_on_one_address(start: Start) -> None:
    """The supervisor logs `ready` once, when all are; keys of one are served by all; stats cover the whole pool."""
    first = ports_in_a_row(COUNT)
    server = start(f"--process-port={first}")
    assert server.log.count("ready on http://") == 1
    assert len(children_of(server.pid)) == COUNT
    key = server.client().make()["key"]
    for number in range(COUNT):
        with at(server, first + number) as client:
            assert client.get("/readyz").status == 200
            lease = client.acquire()
            assert lease["key"] == key
            client.post(f"{API}/keys/{key}/unblock", json={"lease": lease["lease"]}).expect(200)
    assert server.client().stats()["acquired"] == COUNT


def test_a_failed_start_is_one_line(tmp_path: Path) -> None:
    """A Valkey that doesn't answer, or a port in use: one line and status 1, however many processes."""
    with socket.socket() as mute, socket.socket() as other:
        mute.bind(("127.0.0.1", 0))  # which keeps others from listening there
        free = mute.getsockname()[1]
        status, output = run_server([f"--engine=valkey://127.0.0.1:{free}/0", "--processes=3", "--port=0"])
        assert status == 1, output
        expect_one_line(output, "127.0.0.1", str(free))
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        engine = f"--engine=valkey://127.0.0.1:{free}/0"
        status, output = run_server([engine, "--processes=3", f"--port={taken}"])
        assert status == 1, output
        expect_one_line(output, "listen", str(taken))


def test_two_groups_do_not_share_a_port(start: Start, valkey: Valkey) -> None:
    """SO_REUSEPORT would allow it, but the second group reports that the port is in use."""
    server = start()
    engine = f"--engine={valkey.url}/0"
    status, output = run_server([engine, "--processes=2", f"--port={server.port}"])
    assert status == 1, output
    expect_one_line(output, "listen", str(server.port))


def test_a_session_holds_at_every_process(start: Start) -> None:
    """A cookie signed by one process is accepted by the others."""
    first = ports_in_a_row(COUNT)
    tokens = {"CLIENT": CLIENT_TOKEN, "VIEWER": VIEWER_TOKEN, "ADMIN": ADMIN_TOKEN}
    start(f"--process-port={first}", env={f"KEYPOOL_{role}_TOKEN": token for role, token in tokens.items()})
    body = urlencode({"token": VIEWER_TOKEN})
    connection = http.client.HTTPConnection("127.0.0.1", first, timeout=30)
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    connection.request("POST", "/login", body, headers)
    answer = connection.getresponse()
    assert answer.status in (302, 303), answer.read()
    cookie = answer.headers["Set-Cookie"].partition(";")[0]
    connection.close()
    for number in range(COUNT):
        connection = http.client.HTTPConnection("127.0.0.1", first + number, timeout=30)
        connection.request("GET", "/", headers={"Cookie": cookie})
        assert connection.getresponse().status == 200
        connection.close()


# ----------------------------------------------------------------------------------------------------- watching


def get_stats(server: ServerProcess) -> Answer:
    """Asked once more if the first connection was reset: it waited in the queue of the process that was killed."""
    try:
        with Client(server) as client:
            return client.get(API + "/stats")
    except ConnectionError:
        with Client(server) as client:
            return client.get(API + "/stats")


def test_a_process_that_dies_is_started_again_while_the_others_serve(start: Start) -> None:
    """The others answer all calls meanwhile; the log has the process that died."""
    server = start()
    server.client().make()
    victims = sorted(children_of(server.pid))
    for victim in victims[:2]:
        os.kill(victim, signal.SIGKILL)
        eventually(lambda victim=victim: not lives(victim), "a dead process")  # type: ignore[misc]
        for _ in range(10):
            get_stats(server).expect(200)
    eventually(
        lambda: len(children_of(server.pid)) == COUNT and not set(victims[:2]) & set(children_of(server.pid)),
        "new processes in place of the dead",
    )
    eventually(lambda: server.log.count("serves, pid") == COUNT + 2, "both serve")
    for victim in victims[:2]:
        assert f"pid {victim}, was killed by signal 9: restarting" in server.log


def test_a_process_that_hangs_is_killed_and_started_again(start: Start) -> None:
    """Within seconds, or the system would go on giving it its share of the connections; the others are left alone.
    A process that hangs during the drain is killed too, long before --drain-seconds are over.
    """
    server = start("--drain-seconds=120")
    victim = min(children_of(server.pid))
    os.kill(victim, signal.SIGSTOP)
    eventually(lambda: f"pid {victim}, was killed by signal 9: restarting" in server.log, "its end")
    eventually(lambda: server.log.count("serves, pid") == COUNT + 1, "another in its place")
    assert server.log.count("restarting in") == 1, "those that beat are left alone"
    os.kill(max(children_of(server.pid)), signal.SIGSTOP)
    server.signal(signal.SIGTERM)
    assert server.wait(60) == 0, server.log


def test_log_lines_name_their_process(start: Start) -> None:
    """Workers' lines carry their number; the supervisor's lines name the worker that they are about."""
    server = start()
    for number in range(1, COUNT + 1):
        wanted = f" keypool.valkey: process={number} serving the pool"
        eventually(lambda wanted=wanted: wanted in server.log, wanted)  # type: ignore[misc]
    assert "keypool.ready: ready on" in server.log


def test_processes_ignore_the_signals_that_are_for_everybody(start: Start) -> None:
    """A service manager signals the whole group; only the supervisor acts on it."""
    server = start()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        for child in children_of(server.pid):
            os.kill(child, number)
    server.client().get("/readyz").expect(200)
    assert "restarting in" not in server.log


def test_sighup_reaches_all_of_them_and_those_that_come_later(start: Start, tmp_path: Path) -> None:
    """A removed token is refused by every process, including one that is started later."""
    first = ports_in_a_row(COUNT)
    file = tmp_path / "client-tokens"
    file.write_text(CLIENT_TOKEN)
    env = {"KEYPOOL_CLIENT_TOKEN_FILE": str(file), "KEYPOOL_ADMIN_TOKEN": ADMIN_TOKEN}
    server = start(f"--process-port={first}", env=env)

    def refused_by_all(token: str) -> bool:
        asked = []
        for number in range(COUNT):
            with at(server, first + number) as client:
                asked.append(client.post(ACQUIRE, token=token).status)
        return asked == [401] * COUNT

    assert refused_by_all(OTHER_CLIENT_TOKEN)
    file.write_text(OTHER_CLIENT_TOKEN)
    server.signal(signal.SIGHUP)
    eventually(lambda: refused_by_all(CLIENT_TOKEN), "the removed token refused")
    os.kill(min(children_of(server.pid)), signal.SIGKILL)
    eventually(lambda: server.log.count("serves, pid") == COUNT + 1, "another in its place")
    assert refused_by_all(CLIENT_TOKEN)
    for number in range(COUNT):
        with at(server, first + number) as client:
            client.post(ACQUIRE, token=OTHER_CLIENT_TOKEN).expect_problem(404, "no-key-available")


# ----------------------------------------------------------------------------------------------------- stopping


def waiters(server: ServerProcess, first: int) -> list[Wire]:
    """One waiting acquire at each process."""
    found = []
    for number in range(COUNT):
        shared, server.port = server.port, first + number
        wire = server.wire()
        server.port = shared
        wire.ask("POST", ACQUIRE, json={"wait": 60})
        found.append(wire)
    with Client(server) as client:
        client.expect_waiting(COUNT)
    return found


@pytest.mark.parametrize("whom", ["parent", "group"])
def test_a_signal_drains_all_of_them(start: Start, whom: str) -> None:
    """Waiters at each get 503 and the exit status is 0; the same for Ctrl-C, which the whole group gets."""
    first = ports_in_a_row(COUNT)
    server = start(f"--process-port={first}")
    wires = waiters(server, first)
    if whom == "parent":
        server.signal(signal.SIGTERM)
    else:
        os.killpg(server.pid, signal.SIGINT)
    for wire in wires:
        wire.answer().expect_problem(503, "draining")
    assert server.wait() == 0, server.log


def test_a_second_signal_stops_all_of_them_now(start: Start) -> None:
    """The exit status is 1, although an incomplete request holds up the drain of one process."""
    server = start("--drain-seconds=60")
    half = server.wire()
    head = f"POST {API}/keys HTTP/1.1\r\nHost: {server.host}\r\nContent-Length: 2\r\n"
    half.send(f"{head}Expect: 100-continue\r\n\r\n".encode())
    assert half._reader.readline().startswith(b"HTTP/1.1 100 ")  # so one of them has the request
    children = children_of(server.pid)
    server.signal(signal.SIGTERM)
    eventually(lambda: "SIGTERM: stopping" in server.log, "the drain")
    server.signal(signal.SIGINT)
    assert server.wait(30) == 1, server.log
    eventually(lambda: not any(map(lives, children)), "no process left")


def test_processes_go_with_a_parent_that_is_killed(start: Start) -> None:
    """All exit within 2 s, even one that is stopped by SIGSTOP; on a busy machine, within 2 s in one of some groups."""
    for _ in range(5):
        server = start()
        children = children_of(server.pid)
        os.kill(children[0], signal.SIGSTOP)  # this one can't read end of file
        server.signal(signal.SIGKILL)
        server.wait()
        killed_at = time.monotonic()
        eventually(lambda: not any(map(lives, children)), "no process left", within=30)  # noqa: B023
        if time.monotonic() - killed_at < 2:
            return
    raise AssertionError("no group was gone within 2 s")


def test_a_service_manager_is_notified_by_the_parent_alone(start: Start, tmp_path: Path) -> None:
    """READY once all serve, watchdog messages, STOPPING."""
    manager = Manager(str(tmp_path / "notify"))
    try:
        server = start(env={**manager.environ, "WATCHDOG_USEC": "400000"})
        assert manager.next() == {"STATUS": "loading"}
        ready = manager.next()
        assert ready["READY"] == "1"
        assert ready["MAINPID"] == str(server.pid)
        for _ in range(2):
            assert manager.wait_for("WATCHDOG") == {"WATCHDOG": "1"}
        server.signal(signal.SIGTERM)
        assert manager.wait_for("STOPPING")["STOPPING"] == "1"
        assert server.wait() == 0
    finally:
        manager.close()
