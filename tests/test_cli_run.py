"""`keypool run`: the command gets its key and its signals, and the key comes back however the command ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

import pytest
from cli_support import run_command
from client_support import Proxy, clean, keypool, started, unused_port, url_of
from conftest import Start
from support import ServerProcess, eventually
from test_cli import in_terminal

from keypool.cli.status import Status
from keypool.client import KeyPool


@pytest.fixture
def pool(server: ServerProcess) -> Iterator[KeyPool]:
    with KeyPool(url_of(server)) as made:
        yield made
    clean(server)


def test_the_command_has_the_key_and_its_status_is_passed_on(server: ServerProcess, pool: KeyPool) -> None:
    made = pool.generate()
    ran = keypool(
        server, "run", "--", "sh", "-c", 'echo "$KEYPOOL_KEY $KEYPOOL_LEASE"; cat; exit 7', stdin="input"
    )
    assert ran.returncode == 7
    row = pool.get(made)
    assert ran.stdout == f"{made.secret} {row.lease}\ninput"
    assert ran.stderr == ""
    assert row.state == "available"
    by_name = keypool(server, "run", "--env", "API_KEY", "--", "sh", "-c", "echo $API_KEY")
    assert by_name.stdout == f"{made.secret}\n"
    assert run_command(server, "run", "--", "sh", "-c", "kill -9 $$").status == 128 + 9
    assert run_command(server, "run", "sh", "-c", "exit $#", "sh", "--token", "--json").status == 2
    assert pool.stats().blocked == 0


def test_the_holder_is_named(server: ServerProcess, pool: KeyPool) -> None:
    made = pool.generate()
    with started(server, ["-m", "keypool", "run", "--", "sleep", "60"]):
        eventually(lambda: pool.get(made).state == "blocked", "a key at work")
        assert str(pool.get(made).owner).startswith("sleep@")
    pool.unblock(made)
    with started(server, ["-m", "keypool", "run", "--owner", "night", "--", "sleep", "60"]):
        eventually(lambda: pool.get(made).owner == "night", "its owner")


def test_each_failure_has_its_own_status(server: ServerProcess, pool: KeyPool) -> None:
    def status(*words: str) -> int:
        return run_command(server, *words).status

    assert status("run", "--", "true") == Status.RUN_NO_KEY
    pool.generate()
    assert status("run", "--", "no-such-command") == Status.RUN_NOT_FOUND
    assert status("run", "--", "/dev/null") == Status.RUN_NOT_EXECUTABLE
    away = f"http://127.0.0.1:{unused_port()}"
    assert status("--url", away, "--retry", "0", "run", "--", "true") == Status.RUN_UNREACHABLE
    with Proxy(server) as proxy:
        proxy.faults[:] = ["lose"]
        assert status("--url", proxy.url, "run", "--", "true") == Status.RUN_UNCERTAIN
    assert pool.stats().blocked == 1, "the key of the answer that was lost"


def test_a_refused_token_has_its_own_status(guarded_server: ServerProcess) -> None:
    refused = run_command(guarded_server, "run", "--", "true", KEYPOOL_TOKEN="wrong-wrong-wrong")
    assert refused.status == Status.RUN_DENIED
    assert "true was not run" in refused.err


@pytest.mark.parametrize(
    "line",
    [
        "run",
        "run --",
        "run --env A=B -- env",
        "run --env= -- env",
        "run --nonsense -- true",
        "run --token secret -- true",
        "run --token-file /none -- true",
    ],
)
def test_wrong_usage_leases_nothing(server: ServerProcess, pool: KeyPool, line: str) -> None:
    pool.generate()
    before = pool.stats().acquired
    refused = run_command(server, *line.split())
    assert refused.status == Status.RUN_FAILED
    assert "secret" not in refused.err
    assert len(refused.err.splitlines()) == 1
    assert pool.stats().acquired == before


def test_it_waits_for_a_key(server: ServerProcess, pool: KeyPool) -> None:
    with started(server, ["-m", "keypool", "run", "--wait", "60", "--", "echo", "done"]) as process:
        eventually(lambda: pool.stats().waiting == 1, "a waiter")
        pool.generate()
        assert process.stdout is not None
        assert process.stdout.read() == "done\n"
        assert process.wait(30) == 0
    assert pool.stats().blocked == 0


TRAPS = "trap 'echo got {0}; exit 3' {0}; echo ready; while :; do sleep 0.05; done"


@pytest.mark.parametrize(
    "name",
    [
        "TERM",
        "INT",
        *(pytest.param(name, marks=pytest.mark.thorough) for name in ("HUP", "QUIT", "USR1", "USR2")),
    ],
)
def test_signals_are_passed_on_once(server: ServerProcess, pool: KeyPool, name: str) -> None:
    pool.generate()
    with started(server, ["-m", "keypool", "run", "--", "bash", "-c", TRAPS.format(name)]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.Signals[f"SIG{name}"])
        assert process.stdout.read() == f"got {name}\n"
        assert process.wait(30) == 3
    assert pool.stats().blocked == 0


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.thorough)]
)
def test_a_command_that_a_signal_ends(server: ServerProcess, pool: KeyPool, number: signal.Signals) -> None:
    """Its whole process group gets the signal."""
    pool.generate()
    script = "sleep 60 & echo $!; wait"
    with started(server, ["-m", "keypool", "run", "--", "sh", "-c", script]) as process:
        assert process.stdout is not None
        grandchild = int(process.stdout.readline())
        process.send_signal(number)
        status = process.wait(30)
        if number != signal.SIGINT:  # sh ignores that for what it runs in the background, when it gets to it
            assert status == 128 + number
            eventually(lambda: not _lives(grandchild), "the end of what the command started")
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(grandchild, signal.SIGKILL)
    assert pool.stats().blocked == 0


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{process}/stat") as file:  # noqa: PTH123 - a zombie that nobody has waited for is dead
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ended_while_it_waits_for_a_key(server: ServerProcess, pool: KeyPool, number: signal.Signals) -> None:
    with started(server, ["-m", "keypool", "run", "--wait", "60", "--", "echo", "never"]) as process:
        eventually(lambda: pool.stats().waiting == 1, "a waiter")
        process.send_signal(number)
        assert process.wait(30) == 128 + number
        assert process.stdout is not None
        assert process.stdout.read() == ""
    eventually(lambda: pool.stats().waiting == 0, "nobody waiting")


def test_ctrl_c_reaches_the_command_once(server: ServerProcess, pool: KeyPool) -> None:
    """The terminal sends it to both, so keypool doesn't forward it; keypool exits after the command."""
    pool.generate()
    script = "n=0; trap 'n=$((n+1))' INT; echo ready; while [ $n = 0 ]; do sleep 0.05; done; sleep 0.3; echo got $n"
    status, shown = in_terminal(server, "run", "--", "bash", "-c", script, keys=b"\x03", until="ready")
    assert status == 0
    assert "got 1" in shown
    assert pool.stats().blocked == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can do it")
def test_a_kill_that_can_not_be_caught_ends_the_command(server: ServerProcess, pool: KeyPool) -> None:
    """The command stops using the key, which is released at its deadline."""
    pool.generate()
    script = "trap 'kill %1; exit' TERM; sleep 60 & echo $$; wait"
    with started(server, ["-m", "keypool", "run", "--", "bash", "-c", script]) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.kill()
        process.wait()
        eventually(lambda: not _lives(child), "the end of the command")


def test_a_command_that_outlives_its_lease(start_server: Start) -> None:
    server = start_server("--block-seconds=0.5")
    with KeyPool(url_of(server)) as pool:
        pool.generate()
        stopped = run_command(server, "run", "--", "sleep", "60")
        assert stopped.status == Status.RUN_LEASE_OVER
        assert stopped.err.count("the lease is over") == 1
        assert "it is stopped" in stopped.err
        ran = run_command(server, "run", "--overrun", "warn", "--", "sh", "-c", "sleep 1; exit 3")
        assert ran.status == 3
        assert "it goes on" in ran.err


def test_a_lease_that_was_ended_by_somebody_else(server: ServerProcess, pool: KeyPool) -> None:
    """The command ended by itself, but another holder may have used the key meanwhile."""
    made = pool.generate()
    with started(server, ["-m", "keypool", "run", "--", "sh", "-c", "echo started; sleep 1"]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        pool.unblock(made)
        assert process.wait(30) == Status.RUN_LEASE_OVER
