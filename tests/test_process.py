"""The server as a process: its start, its exit statuses, and how it stops."""

from __future__ import annotations

import http.client
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from conftest import Start, Variant
from support import ACQUIRE, API, Client, ServerProcess, Wire, encode_request, eventually, run_server
from valkeys import held_port

READY = re.compile(r"ready on http://127\.0\.0\.1:(\d+)/$")
STOPS = pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])


def expect_one_line(output: str, *words: str) -> None:
    """Fails unless the output is one line that holds these words; dashes may stand as underscores."""
    lines = output.strip().splitlines()
    assert len(lines) == 1, f"not one line: {output!r}"
    plain = lines[0].lower().replace("-", "_")
    for word in words:
        assert word.lower().replace("-", "_") in plain, f"{word} is not named: {output!r}"


# ------------------------------------------------------------------------------------------------------ start


def test_the_line_that_it_is_ready_ends_with_its_address(start_server: Start) -> None:
    """Port 0: exactly one such line, with the port that the system chose; the server answers there at once."""
    server = start_server()
    client = server.client()
    assert client.get("/readyz").status == client.get("/healthz").status == 200
    lines = [line for line in server.log.splitlines() if "ready on http://" in line]
    assert len(lines) == 1, lines
    match = READY.search(lines[0])
    assert match, lines[0]
    assert int(match[1]) == server.port, lines[0]


def test_two_servers_with_port_0_get_different_ports(start_server: Start) -> None:
    """Each has a pool of its own."""
    one, other = start_server(), start_server()
    assert one.port != other.port
    key = one.client().make()["key"]
    other.client().get(f"{API}/keys/{key}").expect_problem(404, "unknown-key")


def test_it_serves_on_the_port_that_it_is_given(start_server: Start) -> None:
    """The port of --port."""
    with held_port() as port:
        server = start_server(f"--port={port}")
        assert server.port == port
        assert server.client().get("/readyz").status == 200


def test_a_pool_in_memory_keeps_nothing(tmp_path: Path) -> None:
    """With --data=:memory: no file appears where it runs."""
    with ServerProcess(["--data=:memory:", "--port=0"], cwd=tmp_path, forked=False) as server:
        server.client().make()
    assert list(tmp_path.iterdir()) == []


def test_unknown_variables_of_its_name_are_left_alone(start_server: Start) -> None:
    """Another program may own KEYPOOL_SOMETHING."""
    server = start_server(env={"KEYPOOL_SOMETHING": "x", "KEYPOOL_": "y", "KEYPOOL_DATABASE_PASSWORD": "z"})
    assert server.client().get("/readyz").status == 200


# --------------------------------------------------------------------------------------------- wrong settings

WRONG: list[tuple[list[str], dict[str, str], str | None, list[str]]] = [
    # Flags, variables, the text of config.toml, and what the line names.
    (["--nope=1"], {}, None, ["nope"]),
    (["nope"], {}, None, ["nope"]),
    (["--port"], {}, None, ["port"]),
    (["--port=65536"], {}, None, ["port"]),
    (["--block-seconds=nan"], {}, None, ["block-seconds"]),
    (["--key-length=15"], {}, None, ["key-length", "16", "64"]),
    (["--log-format=xml"], {}, None, ["log-format", "text", "json"]),
    (["--engine=abacus"], {}, None, ["engine", "embedded"]),
    ([], {"KEYPOOL_PORT": "abc"}, None, ["KEYPOOL_PORT"]),
    ([], {}, "nope = 1\n", ["nope"]),
    ([], {}, 'port = "abc"\n', ["port"]),
    ([], {}, "[port\n", ["config.toml"]),
    (["--config=missing.toml"], {}, None, ["missing.toml"]),
]


@pytest.mark.parametrize(("flags", "env", "toml", "words"), WRONG, ids=lambda value: str(value)[:30])
def test_a_wrong_setting_is_one_line_and_status_2(
    tmp_path: Path, flags: list[str], env: dict[str, str], toml: str | None, words: list[str]
) -> None:
    """All that is printed is one line that names the setting or file. test_settings.py has each wrong value."""
    if toml is not None:
        path = tmp_path / "config.toml"
        path.write_text(toml)
        flags = [f"--config={path}"]
    status, output = run_server(["--data=:memory:", *flags], env)
    assert status == 2, f"exit status {status}: {output}"
    expect_one_line(output, *words)


def test_a_port_in_use_is_one_line_and_status_1(
    server: ServerProcess, variant: Variant, tmp_path: Path
) -> None:
    """No traceback, and the server that has the port is not disturbed."""
    status, output = run_server([*variant.flags(tmp_path), f"--port={server.port}"])
    assert status == 1, f"exit status {status}: {output}"
    expect_one_line(output)
    assert server.client().get("/readyz").status == 200


# ------------------------------------------------------------------------------------------------------- stop


@STOPS
def test_an_idle_server_stops_with_status_0(start_server: Start, signum: signal.Signals) -> None:
    """It stops at once although idle connections are open, and serves nothing afterwards."""
    with held_port() as port:
        server = start_server(f"--port={port}", "--drain-seconds=120")
        client = server.client()
        client.make()
        wire = server.wire()  # never asks anything
        server.signal(signum)
        assert server.wait(60) == 0, server.log
        assert wire.rest() == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=30).close()


@STOPS
def test_waiters_are_answered_at_once_at_a_stop(start_server: Start, signum: signal.Signals) -> None:
    """Each gets 503 draining, long before its wait is over, and the server exits with 0."""
    server = start_server()
    client = server.client()
    waiters = []
    for _ in range(20):
        waiter = server.wire()
        waiter.ask("POST", ACQUIRE, json={"wait": 60})
        waiters.append(waiter)
    client.expect_waiting(20)
    server.signal(signum)
    for waiter in waiters:
        waiter.answer().expect_problem(503, "draining")
        assert not waiter.going_on, "a client that tried again at once would get the server that is leaving"
    assert server.wait(30) == 0, server.log


def hold_drain(server: ServerProcess, client: Client) -> list[Wire]:
    """Work in flight that cannot end by itself: half a request, and answers that nobody reads."""
    client.make_many(500)
    half = server.wire()
    half.send(encode_request("POST", API + "/keys", server.host, body=b"{}")[:-1])
    deaf = server.wire()
    deaf.send(encode_request("GET", API + "/keys?limit=500", server.host) * 300)
    client.get(API + "/stats").expect(200)  # which comes after both in the server's loop
    return [half, deaf]


def begin_drain(server: ServerProcess) -> Client:
    """A drain that has begun and is held."""
    client = server.client()
    waiter = server.wire()
    hold_drain(server, client)
    client.batch(op="acquire", count=1000).expect(200)
    waiter.ask("POST", ACQUIRE, json={"wait": 60})
    client.expect_waiting(1)
    server.signal(signal.SIGTERM)
    waiter.answer().expect_problem(503, "draining")
    return client


def test_what_is_left_unanswered_is_cut_when_the_drain_is_over(start_server: Start) -> None:
    """The server exits with status 0 within --drain-seconds, whatever is stuck."""
    took = 99.0
    for _ in range(3):  # of which one is no slower than it should be, on a machine that is busy at times
        server = start_server("--drain-seconds=1")
        client = server.client()
        hold_drain(server, client)
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait(60) == 0, server.log
        took = time.monotonic() - began
        if took < 9:
            break
    assert took < 9, "--drain-seconds=1 did not end the drain"


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_second_signal_stops_the_drain_with_status_1(start_server: Start, second: signal.Signals) -> None:
    """The process exits at once, before --drain-seconds, and without a traceback."""
    server = start_server("--drain-seconds=60")
    begin_drain(server)
    server.signal(second)
    assert server.wait(50) == 1, server.log


def test_a_draining_server_takes_no_new_connections(start_server: Start) -> None:
    """It stops accepting first; /readyz, where it is still answered, is 503."""
    with held_port() as port:
        server = start_server("--drain-seconds=60", f"--port={port}")
        client = begin_drain(server)

        def refused() -> bool:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
            except OSError:
                return True
            return False

        eventually(refused, "new connections refused")
        assert server.running, "the drain is over"
        try:
            answer = client.get("/readyz")
        except (OSError, http.client.HTTPException):
            pass  # idle connections may be closed
        else:
            assert answer.status == 503, str(answer)
        server.hang_up()
        assert server.wait(50) == 0, server.log


def test_a_request_in_flight_is_answered_before_the_stop(start_server: Start) -> None:
    """A request whose last byte comes after the signal is answered or refused as draining, not cut."""
    server = start_server("--drain-seconds=60")
    client = server.client()
    wire = server.wire()
    data = encode_request("POST", API + "/keys", server.host, body=b"{}")
    wire.expect_answer_to("POST", API + "/keys")
    wire.send(data[:-1])
    client.get("/healthz")
    waiter = server.wire()
    waiter.ask("POST", ACQUIRE, json={"wait": 60})
    client.expect_waiting(1)
    server.signal(signal.SIGTERM)
    waiter.answer().expect_problem(503, "draining")
    wire.send(data[-1:])
    answer = wire.answer()
    assert answer.status == 201 or answer.json["code"] == "draining", str(answer)
    assert server.wait(30) == 0, server.log
