"""The lines for a shell that the dashboard offers to copy, run as they stand by a shell and curl."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from support import (
    ADMIN_TOKEN,
    API,
    CLIENT_TOKEN,
    VIEWER_TOKEN,
    Client,
    ServerProcess,
    clean_environment,
)

from keypool.api.operations import OPERATIONS

pytestmark = pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl here")

TOKENS = {
    "KEYPOOL_CLIENT_TOKEN": CLIENT_TOKEN,
    "KEYPOOL_VIEWER_TOKEN": VIEWER_TOKEN,
    "KEYPOOL_ADMIN_TOKEN": ADMIN_TOKEN,
}


@pytest.fixture(params=[{}, TOKENS], ids=["open", "with tokens"])
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServerProcess]:
    """A server whose pool has never had a key."""
    admin = ADMIN_TOKEN if request.param else None
    flags = ["--port=0", "--data=:memory:", "--max-block-seconds=3600"]
    with ServerProcess(flags, cwd=tmp_path, env=request.param, admin_token=admin) as server:
        yield server


def shown(server: ServerProcess, path: str, token: str = ADMIN_TOKEN) -> dict[str, str]:
    """The lines of a page by name, as a user who signs in with this token sees them."""
    client = server.client()
    page = client.page(path, client.sign_in(token) if server.admin_token else "").body.decode()
    return {
        name: unescape(line)
        for name, line in re.findall(r'aria-label="Command: ([^"]+)">([^<]+)</code>', page)
    }


def run(line: str, key: str = "") -> tuple[int, Any]:
    """Status and body of the answer to a line that is pasted into a shell with the variables it names."""
    done = subprocess.run(
        ["sh", "-uc", f"{line} -w '\\n%{{http_code}}'"],
        env=clean_environment({**TOKENS, "KEY": key}), capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    body, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(body) if body else None


def client_of(server: ServerProcess) -> Client:
    """A client that may do everything."""
    return server.client(server.admin_token)


def test_each_call_of_the_api_page_does_what_it_shows(fresh: ServerProcess) -> None:
    """Each answers the success of its call, with the variables that it names and no more."""
    lines, admin = shown(fresh, "/calls"), client_of(fresh)
    assert set(lines) == {operation.name for operation in OPERATIONS}
    key = admin.make()["key"]
    for _ in range(16):  # so that the next lease is the one that the line to unblock shows
        admin.post(f"{API}/keys/{admin.acquire()['key']}/unblock").expect(200)
    status, leased = run(lines.pop("acquire"))
    assert (status, leased["lease"], leased["key"]) == (200, 17, key)
    status, extended = run(lines.pop("extend"), key)
    assert (status, extended["lease"]) == (200, 17)
    status, unblocked = run(lines.pop("unblock"), key)
    assert (status, unblocked["changed"]) == (200, True)
    assert run(lines.pop("rekey"))[0] == 409  # without a secrets key
    assert run(lines["pool-put"])[0] == 201
    admin.patch(f"{API}/keys/{key}", json={"name": "acct-17"}).expect(200)
    for operation in OPERATIONS:
        if operation.name in lines:
            status, _ = run(lines[operation.name], admin.make()["key"])
            assert status in {operation.status, operation.other_status}, operation.name


@pytest.mark.parametrize("path", ["/", "/keys"])
def test_the_line_of_an_empty_pool_fills_it(fresh: ServerProcess, path: str) -> None:
    """A new operator's first command."""
    status, made = run(shown(fresh, path)["generate ten keys"])
    assert (status, len(made["keys"])) == (201, 10)


def test_the_lines_of_a_key_are_about_it_and_its_lease(fresh: ServerProcess) -> None:
    """The one to unblock takes the key from its holder of that moment, and from nobody who comes later."""
    admin = client_of(fresh)
    made, leased = admin.make(), admin.acquire()
    lines = shown(fresh, f"/keys/{made['id']}")
    assert run(lines["unblock"]) == (200, {"id": made["id"], "state": "available", "changed": True})
    assert admin.acquire()["lease"] != leased["lease"]
    assert run(lines["unblock"])[1]["code"] == "stale-lease"
    assert run(lines["reveal"])[1]["key"] == made["key"]
    assert run(lines["keepalive"])[0] == 200
    seen = shown(fresh, f"/keys/{made['id']}", VIEWER_TOKEN)
    if fresh.admin_token:
        assert list(seen) == ["get"]
        assert "KEYPOOL_VIEWER_TOKEN" in seen["get"]
    assert run(seen["get"])[1]["id"] == made["id"]
    assert run(lines["delete"])[0] == 204
