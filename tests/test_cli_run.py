"""`keypool run`: the command gets its key and its signals, and the key comes back however the command ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

import pytest
from client_support import clean, keypool, started, unused_port, url_of
from conftest import Start
from support import ServerProcess, eventually
from test_cli import in_terminal

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
    assert (
        keypool(server, "run", "--env", "API_KEY", "--", "sh", "-c", "echo $API_KEY").stdout
        == f"{made.secret}\n"
    )
    assert keypool(server, "run", "--", "sh", "-c", "kill -9 $$").returncode == 128 + 9
    assert pool.stats().blocked == 0


def test_who_holds_it_is_seen(server: ServerProcess, pool: KeyPool) -> None:
    made = pool.generate()
    with started(server, ["-m", "keypool", "run", "--", "sleep", "60"]):
        eventually(lambda: pool.get(made).state == "blocked", "a key at work")
        assert str(pool.get(made).owner).startswith("sleep@")
    pool.unblock(made)
    with started(server, ["-m", "keypool", "run", "--owner", "night", "--", "sleep", "60"]):
        eventually(lambda: pool.get(made).owner == "night", "its owner")


def test_what_can_not_be_run(server: ServerProcess, pool: KeyPool) -> None:
    assert keypool(server, "run", "--", "true").returncode == 125  # no key
    assert keypool(server, "run", "--").returncode == 2
    pool.generate()
    assert keypool(server, "run", "--", "no-such-command").returncode == 127
    assert keypool(server, "run", "--", "/dev/null").returncode == 126
    away = keypool(server, "--url", f"http://127.0.0.1:{unused_port()}", "--retry", "0", "run", "--", "true")
    assert away.returncode == 125
    assert pool.stats().blocked == 0


def test_it_waits_for_a_key(server: ServerProcess, pool: KeyPool) -> None:
    with started(server, ["-m", "keypool", "run", "--wait", "60", "--", "echo", "done"]) as process:
        eventually(lambda: pool.stats().waiting == 1, "a waiter")
        pool.generate()
        assert process.stdout is not None
        assert process.stdout.read() == "done\n"
        assert process.wait(30) == 0
    assert pool.stats().blocked == 0


TRAPS = "trap 'echo got {0}; exit 3' {0}; echo ready; while :; do sleep 0.05; done"


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "QUIT", "USR1", "USR2"])
def test_signals_are_passed_on_once(server: ServerProcess, pool: KeyPool, name: str) -> None:
    pool.generate()
    with started(server, ["-m", "keypool", "run", "--", "bash", "-c", TRAPS.format(name)]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.Signals[f"SIG{name}"])
        assert process.stdout.read() == f"got {name}\n"
        assert process.wait(30) == 3
    assert pool.stats().blocked == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_command_that_a_signal_ends(server: ServerProcess, pool: KeyPool, number: signal.Signals) -> None:
    """It goes to all that the command started, too."""
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
    """The terminal sends it to both; so keypool doesn't pass it on, and outlives the command."""
    pool.generate()
    script = "n=0; trap 'n=$((n+1))' INT; echo ready; while [ $n = 0 ]; do sleep 0.05; done; sleep 0.3; echo got $n"
    status, shown = in_terminal(server, "run", "--", "bash", "-c", script, keys=b"\x03", until="ready")
    assert status == 0
    assert "got 1" in shown
    assert pool.stats().blocked == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can do it")
def test_a_kill_that_can_not_be_caught_ends_the_command(server: ServerProcess, pool: KeyPool) -> None:
    """The key comes free by its deadline; until then, and after, nobody goes on using it."""
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
        ran = keypool(server, "run", "--", "sleep", "1")
        assert ran.returncode == 0
        assert "the lease is over" in ran.stderr
        stopped = keypool(server, "run", "--overrun", "stop", "--", "sleep", "60")
        assert stopped.returncode == 128 + signal.SIGTERM
        assert "it is ended" in stopped.stderr
