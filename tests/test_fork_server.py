"""Servers that tests fork are as good as those that they start, and as surely gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, ServerProcess, eventually, run_server


@pytest.mark.parametrize("forked", [True, False])
def test_a_server_has_its_folder_environment_session_and_status(tmp_path: Path, forked: bool) -> None:
    env = {"KEYPOOL_MAX_KEYS": "3"}
    with ServerProcess(["--data=keys.db", "--port=0"], cwd=tmp_path, env=env, forked=forked) as server:
        assert os.getpgid(server.pid) == os.getsid(server.pid) == server.pid
        shown = Path(f"/proc/{server.pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        assert shown[1:] == [str(ROOT / "server.py").encode(), b"--data=keys.db", b"--port=0"]
        assert (tmp_path / "keys.db").exists()
        assert server.client().batch(op="generate", count=4).expect_problem(409, "pool-full")
        with server.paused():
            assert server.running
        server.signal(signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
        assert not server.running


def test_what_a_server_that_ends_by_itself_printed_is_complete() -> None:
    status, output = run_server(["--print-config", "--port=8123"], {"KEYPOOL_HTTP": "tornado"})
    assert status == 0
    assert "8123" in output
    assert "tornado" in output


def test_servers_of_a_test_process_that_is_killed_are_gone_with_it(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from support import ServerProcess;"
        f"server = ServerProcess({['--data=keys.db', '--port=0']!r}, cwd=Path({str(tmp_path)!r}));"
        "print(server.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests", check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    eventually(lambda: not _lives(int(killed.stdout)), "the server is gone")


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
