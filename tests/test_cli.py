"""The `keypool` command as its user has it: processes, pipes, a terminal; tables, lines, JSON; exit statuses."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from client_support import Proxy, clean, environment, keypool, started, unused_port, url_of
from conftest import Start
from support import ADMIN_TOKEN, CLIENT_TOKEN, ROOT, ServerProcess, eventually

from keypool.cli.status import Status
from keypool.client import KeyPool


@pytest.fixture
def pool(server: ServerProcess) -> Iterator[KeyPool]:
    with KeyPool(url_of(server)) as made:
        yield made
    clean(server)


def lines(text: str) -> list[list[str]]:
    """Plain output as its columns."""
    return [line.split("\t") for line in text.splitlines()]


# ----------------------------------------------------------------------------------------------- one after another


def test_every_command_in_a_pipe(server: ServerProcess, pool: KeyPool) -> None:
    made = keypool(server, "generate", "2", "-k")
    assert (made.returncode, made.stderr) == (0, "")
    [[key, number, _], _] = lines(made.stdout)
    assert pool.get(key).id == int(number)

    [[masked, lease, *_]] = lines(keypool(server, "acquire", "--owner", "me").stdout)
    assert "…" in masked
    [row] = list(pool.rows(state="blocked"))
    assert (row.owner, str(row.lease), row.hint) == ("me", lease, masked)

    listed = lines(keypool(server, "list").stdout)
    assert [int(columns[0]) for columns in listed] == sorted(row.id for row in pool.rows())
    assert len(lines(keypool(server, "list", "--limit", "1").stdout)) == 1
    assert len(lines(keypool(server, "list", "--state", "blocked").stdout)) == 1

    shown = dict(lines(keypool(server, "show", f"id:{row.id}").stdout))
    assert (shown["state"], shown["owner"]) == ("blocked", "me")
    assert "key" not in shown
    shown = dict(lines(keypool(server, "show", "-k", f"id:{row.id}").stdout))
    assert pool.get(shown["key"]).id == row.id

    stale = keypool(server, "unblock", shown["key"], "--lease", "999999")
    assert stale.returncode == Status.LEASE_OVER
    assert "stale-lease" in stale.stderr
    freed = keypool(server, "unblock", shown["key"], "--lease", lease)
    assert dict(lines(freed.stdout))["changed"] == "True"
    assert keypool(server, "keepalive", key).returncode == 0
    assert dict(lines(keypool(server, "stats").stdout))["total"] == "2"
    gone = keypool(server, "delete", *(f"id:{columns[0]}" for columns in listed))
    assert dict(lines(gone.stdout))["done"] == "2"
    assert pool.stats().total == 0


def test_json(server: ServerProcess, pool: KeyPool) -> None:
    for words in (["--json", "generate", "3"], ["generate", "3", "--json"]):
        made = [json.loads(line) for line in keypool(server, *words).stdout.splitlines()]
        assert [set(row) for row in made] == [{"id", "key", "state", "expires_in"}] * 3
        assert all("…" in row["key"] for row in made)
    served = json.loads(keypool(server, "acquire", "-k", "--json").stdout)
    assert pool.get(served["key"]).lease == served["lease"]
    assert len(keypool(server, "list", "--json").stdout.splitlines()) == 6
    assert json.loads(keypool(server, "show", "--json", served["key"]).stdout)["state"] == "blocked"
    assert json.loads(keypool(server, "stats", "--json").stdout)["total"] == 6
    assert json.loads(keypool(server, "unblock", "--json", served["key"]).stdout)["changed"] is True
    assert json.loads(keypool(server, "keepalive", "--json", served["key"]).stdout)["expires_in"] == 300.0
    assert json.loads(keypool(server, "delete", "--json", served["key"]).stdout)["done"] == 1


def test_keys_by_standard_input(server: ServerProcess, pool: KeyPool) -> None:
    made = keypool(server, "generate", "1200", "-k").stdout
    assert keypool(server, "keepalive", "-", stdin=made).stdout == "done\t1200\nunknown\t0\nstale\t0\n"
    served = keypool(server, "acquire", "1200", "-k").stdout
    assert pool.stats().blocked == 1200
    assert keypool(server, "unblock", "-", stdin=served).returncode == 0
    assert pool.stats().blocked == 0
    masked = keypool(server, "list").stdout
    refused = keypool(
        server, "delete", "-", stdin="\n".join(line.split("\t")[1] for line in masked.splitlines())
    )
    assert refused.returncode == Status.USAGE
    assert "--show-keys" in refused.stderr
    assert keypool(server, "delete", "-", stdin=made + "nobody\n").returncode == Status.UNKNOWN_KEY
    assert pool.stats().total == 0
    assert keypool(server, "delete", "-", stdin="").returncode == Status.USAGE


def test_exit_statuses(server: ServerProcess, pool: KeyPool) -> None:
    assert keypool(server, "acquire").returncode == Status.NO_KEY
    assert keypool(server, "show", "nobody").returncode == Status.UNKNOWN_KEY
    assert keypool(server, "delete", "nobody").returncode == Status.UNKNOWN_KEY
    assert keypool(server, "nonsense").returncode == Status.USAGE
    assert keypool(server, "acquire", "--wait", "soon").returncode == Status.USAGE
    assert keypool(server, "--url", "nonsense", "stats").returncode == Status.USAGE
    away = f"http://127.0.0.1:{unused_port()}"
    gone = keypool(server, "--url", away, "--retry", "0", "stats")
    assert gone.returncode == Status.UNREACHABLE
    assert gone.stderr == f"keypool: can't reach {away}: Connection refused\n"
    with Proxy(server) as proxy:
        proxy.faults[:] = ["lose"]
        lost = keypool(server, "--url", proxy.url, "generate")
    assert lost.returncode == Status.UNCERTAIN
    assert "may have happened" in lost.stderr
    shown = keypool(None, "--help").stdout
    documented = (ROOT / "docs" / "client.md").read_text(encoding="utf-8")
    for status in Status:
        assert f"{status.value:>3}  {status.about}" in shown
        assert f"| {status.value} | {status.about} |" in documented


def test_tokens_come_from_the_environment_or_a_file(guarded_server: ServerProcess, tmp_path: Path) -> None:
    server, file = guarded_server, tmp_path / "token"
    file.write_text(ADMIN_TOKEN + "\n")
    assert keypool(server, "generate").returncode == Status.DENIED
    assert keypool(server, "generate", KEYPOOL_TOKEN=CLIENT_TOKEN).returncode == Status.DENIED
    assert keypool(server, "generate", KEYPOOL_TOKEN=ADMIN_TOKEN).returncode == 0
    assert keypool(server, "generate", KEYPOOL_TOKEN_FILE=str(file)).returncode == 0
    assert (
        keypool(server, "generate", "--token-file", str(file), KEYPOOL_TOKEN="wrong-wrong-wrong").returncode
        == 0
    )
    for words in (["--token", ADMIN_TOKEN, "stats"], ["stats", f"--token={ADMIN_TOKEN}"]):
        refused = keypool(server, *words)
        assert refused.returncode == Status.USAGE
        assert "KEYPOOL_TOKEN" in refused.stderr
        assert ADMIN_TOKEN not in refused.stderr
    file.write_text("two\nlines\n")
    for words in (["--token-file", str(file), "stats"], ["--token-file", str(tmp_path), "stats"]):
        assert keypool(server, *words).returncode == Status.USAGE
    clean(server, ADMIN_TOKEN)


def test_an_owner_cannot_write_on_the_terminal(server: ServerProcess, pool: KeyPool) -> None:
    """An owner's name is whatever a client sent; the server refuses control characters, others may not show."""
    pool.generate()
    pool.acquire(owner="a\u202eb")
    assert "\u202e" not in in_terminal(server, "list")[1]


# ------------------------------------------------------------------------------------------------- on a terminal


def in_terminal(
    server: ServerProcess | None, *words: str, keys: bytes = b"", until: str = ""
) -> tuple[int, str]:
    """Run the command on a terminal of its own: its exit status and all that was shown, both streams."""
    child, terminal = pty.fork()
    if child == 0:
        command = [sys.executable, "-m", "keypool", *words]
        os.execve(sys.executable, command, environment(server, COLUMNS="200"))  # noqa: S606 - no shell is wanted
    shown = b""
    with contextlib.suppress(OSError):  # Linux ends it with EIO
        while part := os.read(terminal, 65536):
            shown += part
            if until and until.encode() in shown:
                os.write(terminal, keys)
                until = ""
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), shown.decode()


def test_tables_on_a_terminal(server: ServerProcess, pool: KeyPool) -> None:
    made = pool.generate()
    status, shown = in_terminal(server, "list")
    heading, row = shown.strip().splitlines()
    assert status == 0
    assert "ID" in heading
    assert "EXPIRES IN" in heading
    assert heading.startswith("\x1b[1m")
    assert made.hint in row
    assert "\t" not in row
    assert made.secret not in shown
    assert json.loads(in_terminal(server, "list", "--json")[1])["id"] == made.id


def test_a_bar_for_long_batches_only(server: ServerProcess, pool: KeyPool) -> None:
    _, shown = in_terminal(server, "generate", "2500", "--json")
    assert "generating [" in shown
    assert "2000/2500" in shown
    assert "generating [" not in in_terminal(server, "generate", "2", "--json")[1]
    assert "generating" not in keypool(server, "generate", "1001").stderr


def test_watching_stats_until_ctrl_c(server: ServerProcess, pool: KeyPool) -> None:
    status, shown = in_terminal(server, "stats", "--watch", "0.05", keys=b"\x03", until="\x1b[J")
    assert status == 130
    assert shown.count("available") >= 1


# ----------------------------------------------------------------------------------------------------------- pipes


def test_a_reader_that_goes_away_ends_it_quietly(server: ServerProcess, pool: KeyPool) -> None:
    pool.generate_many(3000)
    with started(server, ["-m", "keypool", "list"]) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(30) == Status.BROKEN_PIPE
        assert process.stderr.read() == ""


def test_a_key_that_nobody_could_read_is_given_back(server: ServerProcess, pool: KeyPool) -> None:
    pool.generate()
    reader, writer = os.pipe()
    os.close(reader)
    with started(server, ["-m", "keypool", "acquire", "-k"], stdout=writer) as process:
        os.close(writer)
        assert process.wait(30) == Status.BROKEN_PIPE
    assert pool.stats().blocked == 0


def test_a_batch_that_fails_half_way_prints_what_it_made(start_server: Start) -> None:
    server = start_server("--max-keys=1500")
    made = keypool(server, "generate", "2000", "-k")
    assert made.returncode == Status.FAILED
    assert "pool-full" in made.stderr
    assert len(made.stdout.splitlines()) == 1000


# -------------------------------------------------------------------------------------------------------- keepalive


def test_keepalive_watch_keeps_on_and_tells_of_the_dead(start_server: Start) -> None:
    server = start_server("--keepalive-seconds=1.5")
    with KeyPool(url_of(server)) as pool:
        made = pool.generate_many(2)
        left = pool.generate()
        with started(
            server, ["-m", "keypool", "keepalive", "--watch", *(key.secret for key in made)]
        ) as process:
            eventually(lambda: pool.stats().kept_alive >= 2, "a first round")
            eventually(lambda: pool.stats().expired == 1, f"the end of {left.hint}")
            assert pool.stats().total == 2
            pool.delete_many(made)
            assert process.stdout is not None
            assert sorted(process.stdout.read().splitlines()) == sorted(f"dead\t{key.hint}" for key in made)
            assert process.wait(30) == Status.UNKNOWN_KEY


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_keepalive_watch_ends_by_a_signal(
    server: ServerProcess, pool: KeyPool, number: signal.Signals, status: int
) -> None:
    made, before = pool.generate(), pool.stats().kept_alive
    with started(server, ["-m", "keypool", "keepalive", "--watch", made.secret]) as process:
        eventually(lambda: pool.stats().kept_alive > before, "a first round")
        process.send_signal(number)
        assert process.wait(30) == status


# ------------------------------------------------------------------------------------------------------- completion


def test_completion_in_bash(tmp_path: Path) -> None:
    def completed(*words: str) -> list[str]:
        script = f"""
            source {tmp_path}/keypool.bash
            COMP_WORDS=({" ".join(f"'{word}'" for word in words)}); COMP_CWORD={len(words) - 1}
            _keypool; printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        assert ran.stderr == ""
        return ran.stdout.split()

    (tmp_path / "keypool.bash").write_text(keypool(None, "completion", "bash").stdout)
    assert {"serve", "acquire", "run", "events"} <= set(completed("keypool", ""))
    assert completed("keypool", "acq") == ["acquire"]
    assert completed("keypool", "list", "--st") == ["--state"]
    assert completed("keypool", "list", "--state", "b") == ["blocked"]
    assert completed("keypool", "--json", "completion", "f") == ["fish"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_syntactically_right(shell: str, tmp_path: Path) -> None:
    script = keypool(None, "completion", shell)
    assert script.returncode == 0
    assert "acquire" in script.stdout
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed here")
    (tmp_path / "script").write_text(script.stdout)
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


# ------------------------------------------------------------------------------------------------------------ serve


def test_serve_is_the_server(tmp_path: Path) -> None:
    for words in (
        ["serve", "--port=0", "--data=:memory:"],
        ["serve", "--json", "--port=0", "--data=:memory:"],
    ):
        with started(None, ["-m", "keypool", *words]) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if "ready on http://" in line:
                    break
            assert line.startswith("{") == ("--json" in words)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
    wrong = keypool(None, "serve", "--nonsense")
    assert wrong.returncode == 2
    assert len(wrong.stderr.splitlines()) == 1
    name, *rest = keypool(None, "serve", "--help").stdout.splitlines()
    assert name == "usage: keypool serve [--NAME=VALUE ...]"
    assert rest == subprocess.run(
        [sys.executable, str(ROOT / "server.py"), "--help"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[1:]  # fmt: skip


def test_starting_takes_no_longer_than_it_must() -> None:
    """A small command imports neither asyncio nor any package: it is in scripts, in loops."""
    code = "import sys; from keypool.cli.main import main; main(['completion', 'bash'])"
    code += "; print(*sys.modules, file=sys.stderr)"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    assert not {"asyncio", "tornado", "msgspec", "multiprocessing"} & set(ran.stderr.split())
