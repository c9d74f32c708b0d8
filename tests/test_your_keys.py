"""The guide "40 keys, 200 workers": its ten commands are run as they stand, in a copy of the repository."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from client_support import unused_port
from support import ROOT, ServerProcess, clean_environment

PAGE = ROOT / "docs" / "your-keys.md"
KEYS = ("sk-live-1f0a9c2e7d5b4c3a", "sk-live-8e7d6c5b4a392817")


def blocks(kind: str) -> list[str]:
    """The blocks of the page of this kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def copy_of_the_repository(there: Path) -> None:
    """What a clone would have, the working tree's changes included."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (there / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, there / name)


def run(script: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run lines in a shell where `python3` is this Python."""
    env = clean_environment(variables)
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    return subprocess.run(
        ["sh", "-c", script], cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300
    )


def test_the_page_has_ten_commands() -> None:
    """Numbered from one to ten."""
    commands = blocks("sh")[0]
    assert re.findall(r"^# (\d+)\.", commands, re.MULTILINE) == [str(number) for number in range(1, 11)]


@pytest.mark.thorough
def test_ten_commands_lead_to_a_running_pool(tmp_path: Path) -> None:
    """From an empty environment to imported keys that a worker has used; no secret is left in clear on the disk."""
    copy_of_the_repository(tmp_path)
    commands, work = blocks("sh")
    (tmp_path / "keys.csv").write_text(blocks("csv")[0])
    (tmp_path / "work.sh").write_text(work)
    (tmp_path / "work.sh").chmod(0o700)
    port = str(unused_port())
    done = run(
        f"set -e\n{commands}\nkill $!\nwait $! || true\n",
        tmp_path,
        KEYPOOL_PORT=port,
        KEYPOOL_URL=f"http://127.0.0.1:{port}",
    )
    log = (tmp_path / "server.log").read_text() if (tmp_path / "server.log").exists() else ""
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{log}"
    assert re.search(r"worker of account 471[12]", done.stdout), done.stdout
    assert re.search(r"acquired\s+1\b", done.stdout), done.stdout
    everywhere = [
        each for each in tmp_path.glob("*") if each.name.startswith(("keys.db", "server.log", "tokens.toml"))
    ]
    assert len(everywhere) >= 3, everywhere
    for file in everywhere:
        content = file.read_bytes()
        for secret in (*KEYS, (tmp_path / "you.token").read_text().strip(), "4711"):
            assert secret.encode() not in content, f"{file.name} holds {secret} in clear"
        assert file.stat().st_mode & 0o077 == 0, f"{file.name} can be read by others"


@pytest.mark.thorough
def test_the_pages_program_reports_what_the_service_answers(tmp_path: Path) -> None:
    """With the service's address replaced by that of one which answers 429."""
    program = blocks("python")[0]
    service = tmp_path / "service.py"
    service.write_text(
        "import http.server, json, sys\n"
        "class Limited(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(429); self.send_header('Retry-After', '77'); self.end_headers()\n"
        "    def log_message(self, *args): pass\n"
        "server = http.server.HTTPServer(('127.0.0.1', 0), Limited)\n"
        "print(server.server_address[1], flush=True)\n"
        "server.serve_forever()\n"
    )
    with ServerProcess(["--data=:memory:", "--port=0"], cwd=tmp_path) as server:
        client = server.client()
        client.put("/api/v1/pools/openai", json={"keepalive_seconds": None}).expect(201)
        client.post(
            "/api/v1/pools/openai/keys", json={"secret": KEYS[0], "data": {"account": "4711"}}
        ).expect(201)
        limited = subprocess.Popen([sys.executable, str(service)], stdout=subprocess.PIPE, text=True)
        try:
            assert limited.stdout is not None
            address = f"http://127.0.0.1:{limited.stdout.readline().strip()}"
            text = program.replace("https://api.example.com", address)
            env = clean_environment({"KEYPOOL_URL": f"http://127.0.0.1:{server.port}"})
            began = time.monotonic()
            ran = subprocess.run(
                [sys.executable, "-c", text],
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
                env=env,
                cwd=ROOT,
            )
        finally:
            limited.kill()
            limited.wait()
            if limited.stdout is not None:
                limited.stdout.close()
        assert (ran.returncode, ran.stderr) == (0, "")
        row = json.loads(client.get("/api/v1/pools/openai/keys/id:1").body)
        assert row["state"] == "cooling"
        assert 77 - (time.monotonic() - began) - 0.1 <= row["available_in"] <= 77
