"""`keypool run`: the command gets its key and its signals, and the key comes back however the command ends."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cli_support import run_command
from client_support import Proxy, clean, keypool, started, url_of
from conftest import Start
from support import ServerProcess, eventually, pass_until
from test_cli import in_terminal

from keypool.cli import run
from keypool.cli.status import Status
from keypool.client import HeldKey, KeyPool, held, settings


@pytest.fixture
def pool(server: ServerProcess) -> Iterator[KeyPool]:
    with KeyPool(url_of(server)) as made:
        yield made
    clean(server)


@pytest.fixture
def overdue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file: while it is there, every lease is over by the clock of `run_command`, however long it is."""
    file = tmp_path / "overdue"
    monkeypatch.setattr(held, "now", lambda: settings.now() + (10_000 if file.exists() else 0))
    monkeypatch.setattr(held, "_SHORTEST_TRY", 30.0)  # seconds for giving the key back all the same
    return file


def on_note(monkeypatch: pytest.MonkeyPatch, part: str, act: Callable[[], object]) -> None:
    """Do this whenever `run_command` has noted something that contains this."""
    note: Callable[[str], None] = vars(run)["note"]

    def noted(text: str) -> None:
        note(text)
        if part in text:
            act()

    monkeypatch.setattr(run, "note", noted)


def test_the_command_has_the_key_and_its_status_is_passed_on(server: ServerProcess, pool: KeyPool) -> None:
    made = pool.generate()
    ran = keypool(
        server, "run", "--", "sh", "-c",
        'echo "$KEYPOOL_KEY $KEYPOOL_LEASE $KEYPOOL_HANDLE"; cat; exit 7', stdin="input",
    )  # fmt: skip
    assert ran.returncode == 7
    row = pool.get(made)
    words, _, copied = ran.stdout.partition("\n")
    key, lease, handle = words.split(" ")
    assert (key, lease, copied) == (made.secret, str(row.lease), "input")
    assert pool.get(handle).id == made.id
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
    with socket.socket() as taken:  # and nobody listens there
        taken.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert status("--url", away, "--retry", "0", "run", "--", "true") == Status.RUN_UNREACHABLE
    with Proxy(server) as proxy:
        proxy.faults[:] = ["lose"]
        assert status("--url", proxy.url, "--retry", "0", "run", "--", "true") == Status.RUN_UNCERTAIN
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
        "run --on-exit 75 -- true",
        "run --on-exit 75=bad -- true",
        "run --on-exit =ok -- true",
        "run --on-exit 256=ok -- true",
        "run --on-exit -1=ok -- true",
        "run --on-exit EX_NOTHING=ok -- true",
        "run --on-exit 75=ok --on-exit EX_TEMPFAIL=error -- true",
        "run --retry-after 5 -- true",
        "run --retry-after 5 --on-exit 77=invalid -- true",
        "run --retry-after soon --on-exit 75=rate_limited -- true",
        "run --block-seconds 0 -- true",
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
        assert process.wait(60) == 0
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
        assert process.wait(60) == 3
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
        status = process.wait(60)
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
        assert process.wait(60) == 128 + number
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


def test_a_command_that_outlives_its_lease(
    server: ServerProcess, pool: KeyPool, overdue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.generate()
    stopped = run_command(server, "run", "--", "sh", "-c", f"touch {overdue}; exec sleep 60")
    assert stopped.status == Status.RUN_LEASE_OVER
    assert len(stopped.err.splitlines()) == 1
    assert "ended after its 60.0 s, and sh still runs: it is stopped" in stopped.err
    overdue.unlink()
    on_note(monkeypatch, "it goes on", (tmp_path / "go").touch)
    script = f"touch {overdue}; while ! test -e {tmp_path}/go; do sleep 0.05; done; exit 3"
    ran = run_command(server, "run", "--overrun", "warn", "--", "sh", "-c", script)
    assert ran.status == 3
    assert "it goes on" in ran.err


@pytest.mark.parametrize(("served_again", "status"), [(False, 3), (True, Status.RUN_LEASE_OVER)])
def test_a_lease_that_was_ended_by_somebody_else(
    server: ServerProcess, pool: KeyPool, tmp_path: Path, served_again: bool, status: int
) -> None:
    """The command ended by itself. What counts is whether another holder may have used the key meanwhile."""
    made = pool.generate()
    script = f"echo started; while ! test -e {tmp_path}/go; do sleep 0.05; done; exit 3"
    with started(server, ["-m", "keypool", "run", "--", "sh", "-c", script]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        pool.unblock(made.id)
        if served_again:
            pool.acquire()
        (tmp_path / "go").touch()
        _, noted = process.communicate(timeout=60)
        assert process.returncode == status
        assert len(noted.splitlines()) == served_again


# --------------------------------------------------------------------------------------------------------- outcomes


@pytest.mark.parametrize(
    ("flags", "status", "found"),
    [
        ("", 0, ("available", "ok")),
        ("", 1, ("available", None)),
        ("--on-exit 75=rate_limited --on-exit 77=invalid", 75, ("cooling", "rate_limited")),
        ("--on-exit 75=rate_limited --on-exit 77=invalid", 77, ("quarantined", "invalid")),
        ("--on-exit 75=rate_limited --on-exit 77=invalid", 1, ("available", None)),
        ("--on-exit EX_TEMPFAIL=error", 75, ("available", "error")),
        ("--on-exit 3=ok", 3, ("available", "ok")),
        ("--on-exit 0=error", 0, ("available", "error")),
    ],
)
def test_an_outcome_by_exit_status(
    server: ServerProcess, pool: KeyPool, flags: str, status: int, found: tuple[str, str | None]
) -> None:
    made = pool.generate()
    ran = run_command(server, "run", *flags.split(), "--", "sh", "-c", f"exit {status}")
    assert (ran.status, ran.err) == (status, "")
    row = pool.get(made)
    assert (row.state, row.outcome) == found


def test_a_signal_that_ends_the_command_has_a_status_too(server: ServerProcess, pool: KeyPool) -> None:
    made = pool.generate()
    ran = run_command(server, "run", "--on-exit", "137=error", "--", "sh", "-c", "kill -9 $$")
    assert ran.status == 137
    assert pool.get(made).outcome == "error"


def test_how_long_a_limited_key_cools(server: ServerProcess, pool: KeyPool) -> None:
    made = pool.generate()
    flags = ("--on-exit", "75=rate_limited", "--retry-after", "1234")
    assert run_command(server, "run", *flags, "--", "sh", "-c", "exit 75").status == 75
    assert 1200 < (pool.get(made).available_in or 0) <= 1234


def test_a_command_that_was_not_run_or_was_stopped_has_no_outcome(
    server: ServerProcess, pool: KeyPool, overdue: Path
) -> None:
    """The statuses are those of `run`, not of the command, so --on-exit doesn't apply."""
    made = pool.generate()
    flags = ("--on-exit", "127=invalid", "--on-exit", "124=invalid", "--on-exit", "143=invalid")
    assert run_command(server, "run", *flags, "--", "no-such-command").status == Status.RUN_NOT_FOUND
    late = ("sh", "-c", f"touch {overdue}; exec sleep 60")
    assert run_command(server, "run", *flags, "--", *late).status == Status.RUN_LEASE_OVER
    assert pool.get(made).outcome is None


def test_the_command_may_report_an_outcome_itself(server: ServerProcess, pool: KeyPool) -> None:
    """By its handle. Its status is passed on; what `run` would report comes too late."""
    made = pool.generate()
    report = (
        f'"{sys.executable}" -m keypool unblock "$KEYPOOL_HANDLE" --outcome rate_limited --retry-after 1234'
    )
    ran = keypool(server, "run", "--on-exit", "9=invalid", "--", "sh", "-c", f"{report}; exit 9")
    assert (ran.returncode, ran.stderr) == (9, "")
    row = pool.get(made)
    assert (row.state, row.outcome) == ("cooling", "rate_limited")


def test_a_quarantine_that_the_pool_does_not_allow_is_noted(server: ServerProcess, pool: KeyPool) -> None:
    made = pool.generate_many(3)
    pool.quarantine(made[0])
    ran = run_command(server, "run", "--on-exit", "77=invalid", "--", "sh", "-c", "exit 77")
    assert ran.status == 77
    assert len(ran.err.splitlines()) == 1
    assert "too many" in ran.err
    assert pool.stats().cooling == 1


# ----------------------------------------------------------------------------------------------------- longer leases


def test_the_first_stretch_is_chosen(start_server: Start) -> None:
    server = start_server("--max-block-seconds=3000")
    with KeyPool(url_of(server)) as pool:
        made = pool.generate()
        with started(
            server, ["-m", "keypool", "run", "--block-seconds", "2000", "--", "sleep", "60"]
        ) as process:
            eventually(lambda: (pool.get(made).release_in or 0) > 1900, "a long lease")
            process.terminate()
            process.wait(60)
        refused = run_command(server, "run", "--block-seconds", "4000", "--", "true")
        assert refused.status == Status.RUN_FAILED
        assert "block_seconds" in refused.err


def test_a_lease_that_lasts_as_long_as_the_command(start_server: Start, tmp_path: Path) -> None:
    server = start_server("--block-seconds=4.5", "--max-block-seconds=600")
    script = f"while ! test -e {tmp_path}/go; do sleep 0.05; done; exit 3"
    with KeyPool(url_of(server)) as pool:
        made = pool.generate()
        with started(server, ["-m", "keypool", "run", "--extend", "--", "sh", "-c", script]) as process:
            left = eventually(lambda: pool.get(made).release_in or 0.0, "a key at work")
            pass_until(time.monotonic() + left)
            assert pool.get(made).state == "blocked"
            (tmp_path / "go").touch()
            _, noted = process.communicate(timeout=60)
        assert (process.returncode, noted) == (3, "")
        assert pool.stats().released == 0
        assert pool.get(made).state == "available"


def test_the_pool_does_not_allow_a_longer_lease(
    start_server: Start, overdue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is noted a third into the lease, and what becomes of the command at its end."""
    server = start_server("--block-seconds=6")
    on_note(monkeypatch, "max_block_seconds", overdue.touch)
    on_note(monkeypatch, "it goes on", (tmp_path / "go").touch)
    with KeyPool(url_of(server)) as pool:
        pool.generate()
        stopped = run_command(server, "run", "--extend", "--", "sleep", "60")
        assert stopped.status == Status.RUN_LEASE_OVER
        limit, end = stopped.err.splitlines()
        assert "max_block_seconds" in limit
        assert "it is stopped" in end
        overdue.unlink()
        script = f"while ! test -e {tmp_path}/go; do sleep 0.05; done; exit 4"
        warned = run_command(server, "run", "--extend", "--overrun=warn", "--", "sh", "-c", script)
        assert warned.status == 4
        limit, end, *_ = warned.err.splitlines()
        assert "max_block_seconds" in limit
        assert "it goes on" in end


def test_a_longer_lease_ends_at_the_limit_of_the_pool(
    start_server: Start, overdue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server("--block-seconds=4.5", "--max-block-seconds=7")
    supervise = run._supervise

    def supervised(words: Sequence[str], environment: dict[str, str], key: HeldKey, *, stop: bool) -> Any:
        def moved(until: float) -> None:
            move(until)
            if key.released_at - key._began_at > 6.9:
                overdue.touch()  # there is nothing more to wait for

        move = key._moved
        monkeypatch.setattr(key, "_moved", moved)
        return supervise(words, environment, key, stop=stop)

    monkeypatch.setattr(run, "_supervise", supervised)
    with KeyPool(url_of(server)) as pool:
        pool.generate()
        stopped = run_command(server, "run", "--extend", "--", "sleep", "60")
        assert stopped.status == Status.RUN_LEASE_OVER
        lasted = re.search(r"ended after its ([\d.]+) s", stopped.err)
        assert lasted is not None
        # It may seem shorter by the time that the extension took, and longer by that of the first answer.
        assert 4.6 < float(lasted[1]) <= 7.3


def test_an_operator_who_takes_the_key_stops_the_command(start_server: Start) -> None:
    server = start_server("--block-seconds=4.5", "--max-block-seconds=600")
    with KeyPool(url_of(server)) as pool:
        made = pool.generate()
        with started(server, ["-m", "keypool", "run", "--extend", "--", "sleep", "60"]) as process:
            eventually(lambda: pool.get(made).state == "blocked", "a key at work")
            pool.quarantine(made, now=True)
            _, noted = process.communicate(timeout=60)
        assert process.returncode == Status.RUN_LEASE_OVER
        assert "was taken back while it was held, and sleep still runs: it is stopped" in noted
