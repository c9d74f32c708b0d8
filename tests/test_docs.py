"""The documentation tells the truth: its transcripts are run, its tables are those of the code."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from support import Answer, Client, ServerProcess

from keypool.api.first_version import LEGACY
from keypool.api.operations import OPERATIONS, Operation
from keypool.api.reference import DOCS, TABLES, with_tables
from keypool.config.settings import OPTIONS, Option
from keypool.core import errors

ROOT = DOCS.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS.glob("*.md")])
KEY = re.compile(r"\b[A-Za-z0-9]{20}\b")


def curl(client: Client, command: str) -> Answer:
    """What a curl command line of the documentation asks, asked of this server."""
    words = shlex.split(command)[1:]
    method, body, path = "GET", None, ""
    while words:
        word = words.pop(0)
        if word == "-X":
            method = words.pop(0)
        elif word == "--json":
            method, body = "POST", words.pop(0).encode()
        else:
            path = "/" + word.split("/", 3)[3]
    headers = {} if body is None else {"Content-Type": "application/json"}
    return client.request(method, path, body=body, headers=headers)


def transcript(page: Path) -> list[tuple[str, str]]:
    """The curl commands of a page with the answer that it shows for each."""
    return re.findall(r"^\$ (curl .*)\n(\{.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)


def shape(text: str) -> object:
    """An answer with all that differs from run to run left out."""
    text = KEY.sub("KEY", text)
    text = re.sub(r'("(?:release_in|expires_in|retry_after|id|lease)":)[0-9.]+', r"\g<1>0", text)
    text = re.sub(r'("request_id":)"[^"]*"', r'\g<1>""', text)
    return json.loads(re.sub(r"due in [0-9.]+ s", "due in 0 s", text))


def test_the_readme_transcript_runs_as_it_is_shown(server: ServerProcess) -> None:
    """Each command of README gives the answer that stands under it, but for the numbers."""
    commands = transcript(ROOT / "README.md")
    assert len(commands) == 5, "README shows five calls"
    shown_key = KEY.search(commands[0][1])
    assert shown_key is not None
    client, real_key = server.client(), ""
    for command, shown in commands:
        answer = curl(client, command.replace(shown_key.group(), real_key or "none"))
        told = answer.body.decode()
        assert shape(told) == shape(shown), f"{command}: README shows {shown}, the server said {told}"
        found = KEY.search(told)
        real_key = real_key or (found.group() if found else "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_code(page: Path) -> None:
    """`python -m keypool.api.reference` would change nothing."""
    text = page.read_text(encoding="utf-8")
    assert with_tables(text) == text, f"run: python -m keypool.api.reference, and commit {page.name}"


def test_every_table_stands_in_a_page() -> None:
    """A table that no page shows is one that nobody reads."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in TABLES if f"<!-- {name} -->" not in text] == []


@pytest.mark.parametrize("operation", OPERATIONS + LEGACY, ids=lambda each: each.name)
def test_every_call_stands_in_the_api_page(operation: Operation) -> None:
    """Method and path of each."""
    assert f"`{operation.method} {operation.path}`" in (DOCS / "api.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("option", OPTIONS, ids=lambda each: each.name)
def test_every_setting_stands_in_the_operations_page(option: Option) -> None:
    """Flag and variable of each."""
    text = (DOCS / "operations.md").read_text(encoding="utf-8")
    assert f"`{option.flag}`" in text
    assert f"`{option.variable}`" in text


def test_every_error_code_stands_in_the_api_page() -> None:
    """Each code that a program may compare."""
    codes = {error.code for error in vars(errors).values() if hasattr(error, "code")}
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    assert [code for code in sorted(codes) if f"`{code}`" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    """A relative link names a file of the repo; so does every path in backticks that looks like one of ours."""
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(((?!https?:)[^)#]+)", text)
    paths = re.findall(r"`((?:keypool|tests|docs|bench)/[\w./]*)`", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert missing == []
