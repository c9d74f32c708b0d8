"""The process around the server: its standard streams, the signals it gets, and the tokens it reads again."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client_support import ports_in_a_row
from support import (
    ACQUIRE,
    ADMIN_TOKEN,
    API,
    CLIENT_TOKEN,
    OTHER_CLIENT_TOKEN,
    ROOT,
    VIEWER_TOKEN,
    ServerProcess,
    clean_environment,
    eventually,
    run_server,
)
from viewing import Closed, Viewer

SERVER = [sys.executable, str(ROOT / "server.py")]
SERVE = [sys.executable, "-m", "keypool", "serve"]
MEMORY = ["--port=0", "--data=:memory:"]
PROGRAMS = pytest.mark.parametrize("program", [SERVER, SERVE], ids=["server.py", "keypool serve"])


@contextlib.contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process with a session of its own, all of which is gone in the end."""
    env = clean_environment({"PYTHONPATH": str(ROOT)})
    process = subprocess.Popen(command, env=env, start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def status(port: int, path: str = "/healthz") -> int:
    """The status of a GET; 0 if there is no answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


# -------------------------------------------------------------------------------------------- standard streams


def test_a_log_that_nobody_reads_stops_neither_calls_nor_the_stop(tmp_path: Path) -> None:
    """With a pipe for standard error that is full after a dozen lines; a signal still ends the server, status 0."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    port = ports_in_a_row(1)
    command = [*SERVER, f"--port={port}", "--data=:memory:", "--log-level=debug"]
    with started(command, stderr=writing, cwd=tmp_path) as process:
        os.close(writing)
        eventually(lambda: status(port) == 200, "a server", 60)
        for _ in range(100):  # each with a line of the access log
            assert status(port) == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    os.close(reading)


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_standard_streams_are_no_trouble(tmp_path: Path, closed: str) -> None:
    """It serves, stops with status 0, and no log line ends up in a file that was given a closed stream's number."""
    port, log = ports_in_a_row(1), tmp_path / "log"
    line = f'exec "$@" {closed}'
    command = ["sh", "-c", line, "sh", *SERVER, f"--port={port}", "--data=keys.db", "--log-level=debug"]
    with log.open("wb") as file, started(command, stdout=file, stderr=file, cwd=tmp_path) as process:
        eventually(lambda: status(port, "/readyz") == 200, "a server", 60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
    text = log.read_text()
    assert "Traceback" not in text
    assert ("ready on" in text) is ("2>" not in closed)
    assert b" INFO keypool" not in (tmp_path / "keys.db").read_bytes()


@PROGRAMS
@pytest.mark.parametrize("flag", ["--help", "--print-config"])
def test_a_reader_that_leaves_early_causes_no_traceback(program: list[str], flag: str) -> None:
    """As `| true` does: nothing on standard error, and the status of a program that SIGPIPE ends."""
    reading, writing = os.pipe()
    os.close(reading)
    with started([*program, flag], stdout=writing, stderr=subprocess.PIPE) as process:
        os.close(writing)
        assert process.communicate(timeout=60)[1] == b""
        assert process.returncode == 141


@PROGRAMS
def test_help_calls_the_program_by_the_name_it_was_started_by(program: list[str]) -> None:
    """In its first line."""
    done = subprocess.run([*program, "--help"], capture_output=True, cwd=ROOT, check=True)
    name = b"keypool serve" if program is SERVE else b"python server.py"
    assert done.stdout.startswith(b"usage: " + name + b" [--NAME=VALUE ...]\n")


@pytest.mark.parametrize("folder", ["/proc/nowhere", "file"], ids=["a folder of the system's", "a file"])
def test_a_data_folder_that_cannot_be_made_is_one_line(tmp_path: Path, folder: str) -> None:
    """Status 1, no traceback."""
    (tmp_path / "file").write_text("")
    ended, output = run_server(["--port=0", f"--data={tmp_path / folder / 'keys.db'}"])
    assert ended == 1, output
    assert len(output.splitlines()) == 1, output


@pytest.mark.parametrize("files", [12, 16, 63])
def test_too_few_open_files_are_one_line(files: int) -> None:
    """With the limit and what raises it, rather than a traceback from wherever files run out."""
    line = f'ulimit -n {files}; exec "$@"'
    done = subprocess.run(
        ["sh", "-c", line, "sh", *SERVER, *MEMORY], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert f"allows {files} open files" in done.stderr


# ------------------------------------------------------------------------------------------------------ signals


@PROGRAMS
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_while_it_imports_ends_it_without_a_traceback(
    tmp_path: Path, program: list[str], number: signal.Signals
) -> None:
    """Whenever it comes from then on: the packages of the server are slow to import, so here one is for ever."""
    (tmp_path / "msgspec.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(600)\n")
    env = clean_environment({"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    process = subprocess.Popen(
        [*program, *MEMORY], env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(number)
        assert process.communicate(timeout=60)[1] == b""
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def test_importing_the_server_leaves_signals_alone() -> None:
    """Whoever imports server.py, as tests do, keeps their own handlers."""
    code = "import signal; was = signal.getsignal(2); import server; assert signal.getsignal(2) is was"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_signals_without_a_meaning_are_ignored(tmp_path: Path) -> None:
    """Those that would end a process at once by default; and SIGHUP where no tokens come from files."""
    with ServerProcess(MEMORY, cwd=tmp_path) as server:
        client = server.client()
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM):
            server.signal(number)
            assert client.get("/readyz").status == 200
        eventually(lambda: "no tokens come from files" in server.log, "a line about SIGHUP")


# --------------------------------------------------------------------------------------------- tokens read again


class TokenFiles:
    """The three files of a server's tokens."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.env = {
            f"KEYPOOL_{role.upper()}_TOKEN_FILE": str(folder / role) for role in ("client", "viewer", "admin")
        }

    def write(self, **tokens: str) -> None:
        """Have these tokens in these files."""
        for role, text in tokens.items():
            (self._folder / role).write_text(text + "\n")


def test_sighup_reads_the_tokens_again(tmp_path: Path) -> None:
    """New ones hold and removed ones don't from then on, on open connections too, whose headers were seen before.

    Sessions and feeds of removed tokens end; those of tokens that stay go on, also after a restart. What can't be
    read, or is wrong, changes nothing.
    """
    files = TokenFiles(tmp_path)
    files.write(client=CLIENT_TOKEN, viewer=f"{VIEWER_TOKEN},viewer-who-stays-1234", admin=ADMIN_TOKEN)
    flags = [f"--port={ports_in_a_row(1)}", "--data=:memory:"]
    with ServerProcess(flags, cwd=tmp_path, env=files.env, admin_token=ADMIN_TOKEN) as server:
        removed, stays, new = map(server.client, (CLIENT_TOKEN, ADMIN_TOKEN, OTHER_CLIENT_TOKEN))
        for _ in range(3):
            removed.post(ACQUIRE).expect_problem(404, "no-key-available")
            stays.get(API + "/stats").expect(200)
            new.post(ACQUIRE).expect_problem(401, "unauthorized")
        sessions = {
            token: server.client().sign_in(token) for token in (VIEWER_TOKEN, "viewer-who-stays-1234")
        }
        feed, kept_feed = (Viewer(server, headers={"Cookie": cookie}) for cookie in sessions.values())
        with feed, kept_feed:
            feed.until("hello")
            kept_feed.until("hello")

            def reload(line: str) -> None:
                before = len(server.log_since(0))
                server.signal(signal.SIGHUP)
                eventually(
                    lambda: any(line in each for each in server.log_since(before)), f"a line with {line!r}"
                )

            server.allow("previous tokens stay valid")
            files.write(client="short")
            reload("previous tokens stay valid: KEYPOOL_CLIENT_TOKEN_FILE")
            (tmp_path / "client").unlink()
            reload("cannot be read")
            removed.post(ACQUIRE).expect_problem(404, "no-key-available")

            files.write(client=OTHER_CLIENT_TOKEN, viewer="viewer-who-stays-1234,viewer-new-here-99")
            reload("4 valid tokens, 2 of them new; 2 were removed")
            removed.post(ACQUIRE).expect_problem(401, "unauthorized")
            new.post(ACQUIRE).expect_problem(404, "no-key-available")
            stays.get(API + "/stats").expect(200)
            assert server.client().page("/", sessions[VIEWER_TOKEN]).status == 303
            assert server.client().page("/", sessions["viewer-who-stays-1234"]).status == 200
            assert server.client().page("/", server.client().sign_in("viewer-new-here-99")).status == 200
            with pytest.raises(Closed) as closed:
                feed.until("the end")
            assert closed.value.code == 4401
            server.client(ADMIN_TOKEN).make()
            kept_feed.until("delta")
    with ServerProcess(flags, cwd=tmp_path, env=files.env, admin_token=ADMIN_TOKEN) as server:
        assert server.client().page("/", sessions["viewer-who-stays-1234"]).status == 200
        assert server.client().page("/", sessions[VIEWER_TOKEN]).status == 303
