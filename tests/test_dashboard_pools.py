"""The dashboard's pages of pools: each pool has pages, a feed and charts of its own, and a list has them all."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
from app_client import Browser, guarded
from conftest import Start
from support import VIEWER_TOKEN, ServerProcess, eventually
from viewing import Closed, Viewer

OPENAI = {"block_seconds": 30, "keepalive_seconds": None}
SECRET = "sk-live-0123456789abcdef"


async def a_pool(pages: Browser, name: str = "openai") -> int:
    """Make a pool with one imported key. Returns the key's id."""
    (await pages.call("PUT", f"/pools/{name}", OPENAI)).expect(201)
    body = {
        "secret": SECRET,
        "name": "acct-17",
        "labels": {"region": "eu"},
        "data": {"user": "data-of-the-key"},
    }
    return int((await pages.call("POST", f"/pools/{name}/keys", body)).expect(201)["id"])


async def test_a_pools_pages_show_its_keys_and_lead_to_its_own_pages(pages: Browser) -> None:
    """No link of theirs leaves the pool, but for the pages of the whole server."""
    await a_pool(pages)
    await pages.make(3)
    for name in ("", "/keys", "/owners", "/waiters", "/events", "/keys/1"):
        path = f"/pools/openai{name}"
        page = await pages.fetch(path)
        assert page.status == 200, path
        links = set(re.findall(r'href="(/[^"]*)"', page.text)) - {"/pools", "/tokens", "/system", "/calls"}
        outside = {link for link in links if not link.startswith(("/pools/openai", "/static/"))}
        assert outside == set(), path
    listed = (await pages.fetch("/pools/openai/keys")).text
    assert re.findall(r'<tr class="key-row" data-id="(\d+)"', listed) == ["1"]
    assert "acct-17" in listed
    assert 'data-base=""' in (await pages.fetch("/keys")).text


async def test_a_key_that_never_expires_says_so(pages: Browser) -> None:
    """In place of a countdown; and there is no list of keys that expire soon."""
    await a_pool(pages)
    listed = (await pages.fetch("/pools/openai/keys")).text
    assert '<span class="never">never</span>' in listed
    assert "Expiring soon" not in listed
    assert '<span class="never" hidden>never</span>' in (await pages.fetch("/keys")).text


async def test_no_page_shows_a_secret_or_data(pages: Browser) -> None:
    """Name and labels are shown to viewers, the text and the data are not."""
    key = await a_pool(pages)
    (await pages.call("POST", "/pools/openai/keys/acquire")).expect(200)
    for path in ("/pools", "/pools/openai", "/pools/openai/keys", f"/pools/openai/keys/{key}", "/metrics"):
        text = (await pages.fetch(path)).text
        assert SECRET not in text, path
        assert "data-of-the-key" not in text, path
    assert "region: eu" in (await pages.fetch(f"/pools/openai/keys/{key}")).text


async def test_keys_are_found_by_the_beginning_of_their_names(pages: Browser) -> None:
    """With `name:` before it; anything else is a prefix or an id, as before."""
    await a_pool(pages)
    (await pages.call("POST", "/pools/openai/keys", {"secret": "another", "name": "acct-2"})).expect(201)
    text = (await pages.fetch("/pools/openai/keys?q=name:acct-1")).text
    assert re.findall(r'<tr class="key-row" data-id="(\d+)"', text) == ["1"]
    assert "has a name that starts with" in (await pages.fetch("/pools/openai/keys?q=name:nobody")).text


async def test_the_list_has_every_pool_with_its_counts(pages: Browser) -> None:
    """In order of name, with a bar of the four states."""
    await a_pool(pages)
    await pages.make(2)
    text = (await pages.fetch("/pools")).text
    rows = re.findall(r'<tr class="pool-row" data-pool="([^"]+)">(.*?)</tr>', text, re.DOTALL)
    assert [name for name, _ in rows] == ["default", "openai"]
    assert [re.findall(r'data-f="total">(\d+)', row) for _, row in rows] == [["2"], ["1"]]
    assert 'x="0" width="100.0"' in rows[1][1]


async def test_an_unknown_pool_is_a_404(pages: Browser) -> None:
    """As a page for a browser, whatever page of it was asked for."""
    for path in ("/pools/nobody", "/pools/nobody/keys", "/pools/a%2Fb", "/pools/..%2Fkeys/keys"):
        page = await pages.fetch(path)
        assert page.status == 404, path
        assert "<html" in page.text


@guarded
async def test_the_pages_of_a_pool_need_a_session(pages: Browser) -> None:
    """As those of `default` do: whether there is such a pool isn't shown to others."""
    for path in ("/pools", "/pools/openai", "/pools/nobody/keys"):
        assert (await pages.fetch(path)).status == 303, path
    cookie = await pages.sign_in(VIEWER_TOKEN)
    assert (await pages.fetch("/pools", Cookie=cookie)).status == 200
    assert (await pages.fetch("/pools/nobody/keys", Cookie=cookie)).status == 404


@pytest.mark.once
def test_a_token_of_some_pools_sees_no_other(start_server: Start, tmp_path: Path) -> None:
    """Neither their pages, nor their feed, nor their metrics, nor their names."""
    token = "viewer-of-openai-only-0123"
    file = tmp_path / "tokens.toml"
    file.write_text(
        f'[tokens.admin]\nrole = "admin"\ndigest = "{digest("admin-of-all-pools-0123")}"\n'
        f'[tokens.limited]\nrole = "viewer"\ndigest = "{digest(token)}"\npools = ["openai"]\n'
    )
    file.chmod(0o600)
    server = start_server(f"--tokens={file}", admin_token="admin-of-all-pools-0123")
    admin, limited = server.client("admin-of-all-pools-0123"), server.client(token)
    for name in ("openai", "anthropic"):
        admin.put(f"/api/v1/pools/{name}", json={}).expect(201)
    metrics = limited.get("/metrics").body.decode()
    assert 'pool="openai"' in metrics
    assert 'pool="anthropic"' not in metrics
    assert 'pool="default"' not in metrics
    with Viewer(server, token, path="/api/v1/pools/openai/feed") as viewer:
        assert viewer.status == 101
    for path in ("/api/v1/feed", "/api/v1/pools/anthropic/feed"):
        with Viewer(server, token, path=path) as viewer:
            assert viewer.status == 404, path


def digest(token: str) -> str:
    """A token as the file of tokens has it."""
    return hashlib.sha256(token.encode()).hexdigest()


@pytest.mark.once
def test_a_pools_feed_has_its_own_changes_only(server: ServerProcess) -> None:
    """A change in another pool is no frame, and the pool's end is the end of its feed."""
    client = server.client()
    client.put("/api/v1/pools/feeding", json=OPENAI).expect(201)
    with Viewer(server, path="/api/v1/pools/feeding/feed") as viewer, Viewer(server) as other:
        assert viewer.frame()["stats"]["total"] == 0
        other.frame()
        client.make_many(2)
        while other.until("delta")["stats"]["total"] < 2:
            pass
        client.post("/api/v1/pools/feeding/keys", json={"secret": SECRET}).expect(201)
        frame = viewer.until("delta")
        assert frame["stats"]["total"] == 1
        assert [event["event"] for event in frame["events"]] == ["imported"]
        client.delete("/api/v1/pools/feeding?drain=true&now=true").expect(202)
        with pytest.raises(Closed) as closed:
            viewer.until("the end")
        assert closed.value.code == 1001
    eventually(lambda: client.get("/api/v1/pools/feeding").status == 404, "the pool is gone")
