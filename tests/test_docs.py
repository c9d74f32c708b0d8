"""The documentation is true: its transcripts and programs are run, and its tables are generated from the code."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Start
from support import Answer, Client, ServerProcess, clean_environment

from keypool.api.first_version import LEGACY
from keypool.api.operations import OPERATIONS, Operation
from keypool.api.reference import DOCS, TABLES, with_tables
from keypool.config.settings import OPTIONS, Option
from keypool.core import errors

ROOT = DOCS.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS.glob("*.md")])
KEY = re.compile(r"\b[A-Za-z0-9]{20}\b")
HANDLE = re.compile(r"\bh:[0-9]+\.[0-9]+\.[\w-]{11}")
TIMES = "release_in|expires_in|retry_after|available_in|block_left"


def curl(client: Client, command: str) -> Answer:
    """Make the request of a curl command line from the documentation, to this server."""
    words = shlex.split(command)[1:]
    method, body, path = "GET", None, ""
    headers: dict[str, str] = {}
    while words:
        word = words.pop(0)
        if word == "-X":
            method = words.pop(0)
        elif word == "-H":
            name, _, value = words.pop(0).partition(": ")
            headers[name] = value
        elif word == "--json":
            method, body = "POST", words.pop(0).encode()
            headers["Content-Type"] = "application/json"
        else:
            path = "/" + word.split("/", 3)[3]
    return client.request(method, path, body=body, headers=headers)


def transcript(page: Path) -> list[tuple[str, str]]:
    """The curl commands of a page, each with the answer shown below it."""
    return re.findall(r"^\$ (curl .*)\n(\{.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)


def shape(text: str) -> object:
    """An answer without what differs from run to run."""
    text = HANDLE.sub("HANDLE", KEY.sub("KEY", text))
    text = re.sub(rf'("(?:{TIMES}|id|lease|served)":)[0-9.]+', r"\g<1>0", text)
    text = re.sub(r'("(?:hint|created_at)":)"[^"]*"', r'\g<1>""', text)
    text = re.sub(r'("request_id":)"[^"]*"', r'\g<1>""', text)
    text = re.sub(r'("ids":)\[[0-9,]*\]', r"\g<1>[]", text)
    return json.loads(re.sub(r"due in [0-9.]+ s", "due in 0 s", text))


def test_the_readme_transcript_runs_as_it_is_shown(server: ServerProcess) -> None:
    """Each command of README gives the answer shown below it, except for numbers and keys."""
    commands = transcript(ROOT / "README.md")
    assert len(commands) == 5, "README shows five calls"
    shown_key = KEY.search(commands[0][1])
    assert shown_key is not None
    client, real_key = server.client(), ""
    for command, shown in commands:
        answer = curl(client, command.replace(shown_key.group(), real_key or "none"))
        text = answer.body.decode()
        assert shape(text) == shape(shown), f"{command}: README shows {shown}, the server answered {text}"
        found = KEY.search(text)
        real_key = real_key or (found.group() if found else "")


def test_the_transcripts_of_the_api_page_run_as_they_are_shown(lend: Start) -> None:
    """Each command, in order, gives the answer shown below it; lengths of time are about as long as shown."""
    client = lend("--max-block-seconds=3600").client()
    made: dict[str, str] = {}  # what really stands for what is shown
    for shown_command, shown in transcript(DOCS / "api.md"):
        command, wanted = shown_command, json.loads(shown)
        if command.endswith("/acquire") and wanted["handle"] not in made:
            client.make()
        for before, now in made.items():
            command = command.replace(before, now)
        answer = curl(client, command)
        text = answer.body.decode()
        assert shape(text) == shape(shown), f"{command}: the page shows {shown}, the server answered {text}"
        if "handle" in wanted:
            assert made.setdefault(wanted["handle"], answer.json["handle"]) == answer.json["handle"]
        for name in TIMES.split("|"):
            if wanted.get(name) is not None:
                assert abs(answer.json[name] - wanted[name]) < 60, f"{name} of {command}: {text}"


def test_the_readme_program_runs_as_it_is_shown(server: ServerProcess) -> None:
    """README's Python block leases a key, prints it and gives it back."""
    [program] = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    made = json.loads(server.client().request("POST", "/api/v1/keys").body)
    env = clean_environment({"KEYPOOL_URL": f"http://127.0.0.1:{server.port}"})
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=env, cwd=ROOT)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"X-Api-Key: {made['key']}\n", "")
    row = json.loads(server.client().request("GET", f"/api/v1/keys/{made['key']}").body)
    assert row["state"] == "available"
    assert row["lease"] > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_code(page: Path) -> None:
    """`python -m keypool.api.reference` would change nothing."""
    text = page.read_text(encoding="utf-8")
    assert with_tables(text) == text, f"run: python -m keypool.api.reference, and commit {page.name}"


def test_every_table_stands_in_a_page() -> None:
    """No generated table is left out of the pages."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in TABLES if f"<!-- {name} -->" not in text] == []


@pytest.mark.parametrize("operation", OPERATIONS + LEGACY, ids=lambda each: each.name)
def test_every_call_stands_in_the_api_page(operation: Operation) -> None:
    """docs/api.md has the method and path of each call."""
    assert f"`{operation.method} {operation.path}`" in (DOCS / "api.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("option", OPTIONS, ids=lambda each: each.name)
def test_every_setting_stands_in_the_operations_page(option: Option) -> None:
    """docs/operations.md has the flag and the variable of each setting."""
    text = (DOCS / "operations.md").read_text(encoding="utf-8")
    assert f"`{option.flag}`" in text
    assert f"`{option.variable}`" in text


def test_every_error_code_stands_in_the_api_page() -> None:
    """docs/api.md has every code of the error classes."""
    codes = {error.code for error in vars(errors).values() if hasattr(error, "code")}
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    assert [code for code in sorted(codes) if f"`{code}`" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    """Relative links, and paths in backticks that start with a folder of ours, name files that exist."""
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(((?!https?:)[^)#]+)", text)
    paths = re.findall(r"`((?:keypool|tests|docs|bench)/[\w./]*)`", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert missing == []
