"""Who holds keys, who waits for one, and which tokens there are."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
from conftest import Start
from support import ADMIN_TOKEN, API, VIEWER_TOKEN, Client, ServerProcess, eventually

from browser.conftest import Page, Tabs, state

pytestmark = pytest.mark.thorough


def owner(page: Page, name: str) -> Any:
    """The row of an owner."""
    return page.locator(f".owner-row[data-owner='{name}']")


def is_waiting(client: Client, wanted: int) -> bool:
    """Whether so many acquires wait."""
    return bool(client.stats()["waiting"] == wanted)


def waiting(server: ServerProcess, client: Client, *owners: str) -> list[threading.Thread]:
    """Acquires that wait, one after the other. Returns their threads, which end when they are served."""
    threads = []
    before = client.stats()["waiting"]
    for number, name in enumerate(owners, 1):
        body = {"owner": name, "wait": 60}
        thread = threading.Thread(
            target=server.client().post, args=(f"{API}/keys/acquire",), kwargs={"json": body}
        )
        thread.start()
        threads.append(thread)
        wanted = before + number
        eventually(partial(is_waiting, client, wanted), "it waits")
    return threads


def test_owners_are_listed_with_what_they_hold(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """How many keys and since when, live; a link leads to an owner's keys."""
    client.make_many(6)
    client.batch(op="acquire", count=2, owner="worker-7")
    page = tabs.live(server, "/owners")
    assert owner(page, "worker-7").locator("[data-f=held]").inner_text() == "2"
    client.acquire(owner="worker-7")
    client.acquire(owner="<b>odd & co</b>")
    page.wait_for_function(
        "() => document.querySelector('[data-owner=worker-7] [data-f=held]').textContent === '3'"
    )
    page.locator(".owner-row", has_text="<b>odd & co</b>").wait_for()
    page.wait_for_function(
        "() => /0:(?!00)/.test(document.querySelector('[data-owner=worker-7] .elapsed').textContent)"
    )
    assert owner(page, "worker-7").locator(".elapsed").get_attribute("title").endswith(" UTC")
    page.get_by_role("link", name="<b>odd & co</b>").click()
    page.wait_for_url("**/keys?owner=*")
    assert page.locator(".key-row .owner").all_inner_texts() == ["<b>odd & co</b>"]
    page.goto("/keys?owner=nobody")
    page.get_by_role("heading", name="nobody holds no key").wait_for()


@pytest.mark.parametrize("width", [1280, 390])
def test_an_admin_releases_all_keys_of_an_owner(
    server: ServerProcess, client: Client, tabs: Tabs, width: int
) -> None:
    """On a phone, too. After a confirmation that says how many; nobody else's, and the row goes."""
    client.make_many(6)
    client.batch(op="acquire", count=3, owner="stuck")
    client.acquire(owner="well")
    page = tabs.live(server, "/owners", viewport={"width": width, "height": 800})
    owner(page, "stuck").locator("[data-release]").click()
    dialog = page.locator("#confirm[open]")
    dialog.wait_for()
    assert "stuck holds 3 keys" in dialog.inner_text()
    dialog.get_by_role("button", name="Cancel").click()
    assert client.stats()["blocked"] == 4
    owner(page, "stuck").locator("[data-release]").click()
    page.locator("#confirm-go").click()
    page.get_by_text("3 keys of stuck were released.").wait_for()
    owner(page, "stuck").wait_for(state="detached")
    assert client.stats()["blocked"] == 1
    assert owner(page, "well").is_visible()


def test_owners_hold_still_while_somebody_aims(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """A row that is over is struck through, and none comes, until the pointer leaves."""
    client.make_many(3)
    lease = client.acquire(owner="b")
    client.acquire(owner="c")
    page = tabs.live(server, "/owners")
    owner(page, "c").hover()
    client.acquire(owner="a")
    client.post(f"{API}/keys/{lease['key']}/unblock").expect(200)
    page.wait_for_selector(".owner-row.gone[data-owner=b]")
    names = "rows => rows.map(row => row.dataset.owner)"
    assert page.locator(".owner-row").evaluate_all(names) == ["b", "c"]
    page.mouse.move(1, 1)
    client.make()
    owner(page, "a").wait_for()
    assert page.locator(".owner-row").evaluate_all(names) == ["a", "c"]


def test_waiters_stand_in_their_order(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """Who waits and for how long, live; those that are served leave the list."""
    page = tabs.live(server, "/waiters")
    page.get_by_role("heading", name="Nobody waits for a key").wait_for()
    threads = waiting(server, client, "first", "second")
    page.wait_for_function("() => document.querySelectorAll('.waiter-row').length === 2")
    assert page.locator(".waiter-row [data-f=owner]").all_inner_texts() == ["first", "second"]
    page.wait_for_function(
        "() => /0:(?!00)/.test(document.querySelector('.waiter-row .elapsed').textContent)"
    )
    client.make()
    page.locator(".waiter-row", has_text="first").wait_for(state="detached")
    assert page.locator(".waiter-row [data-f=owner]").all_inner_texts() == ["second"]
    client.make()
    for thread in threads:
        thread.join()


@pytest.mark.once
def test_tokens_are_listed_without_being_shown(
    tmp_path: Any, start_server: Start, tabs: Tabs, sign_in: Any
) -> None:
    """Name, role, pools, leases held of how many; of tokens without a name the mark that the audit log has."""
    from hashlib import sha256

    secret = "alice-0123456789abcdef"
    digest = sha256(secret.encode()).hexdigest()
    file = tmp_path / "tokens.toml"
    file.write_text(
        f'[tokens.alice]\nrole = "client"\ndigest = "{digest}"\npools = ["default"]\nmax_held = 5\n'
    )
    env = {"KEYPOOL_VIEWER_TOKEN": VIEWER_TOKEN, "KEYPOOL_ADMIN_TOKEN": ADMIN_TOKEN}
    server = start_server(f"--tokens={file}", env=env, admin_token=ADMIN_TOKEN)
    server.client(ADMIN_TOKEN).make_many(3)
    server.client(secret).batch(op="acquire", count=2, owner="worker-7").expect(200)
    page = tabs.open(server, "/tokens")
    sign_in(page, VIEWER_TOKEN)
    state(page, "live")
    row = page.get_by_role("row", name="alice")
    assert row.get_by_role("cell").all_inner_texts() == ["client", "default", "2", "5"]
    shown = page.content()
    assert sha256(ADMIN_TOKEN.encode()).hexdigest()[:8] in shown
    assert not any(token in shown for token in (secret, digest, ADMIN_TOKEN, VIEWER_TOKEN))
    page.goto("/owners")
    assert page.locator(".owner-row").is_visible()
    assert page.locator("[data-release]").count() == 0  # a viewer has nothing to press


def test_the_pages_are_in_the_navigation_of_a_phone(server: ServerProcess, tabs: Tabs) -> None:
    """The current one is in view, though not all fit; each is large enough for a finger."""
    page = tabs.live(server, "/", viewport={"width": 320, "height": 700}, has_touch=True, is_mobile=True)
    nav = page.get_by_role("navigation", name="Pages")
    for name in ("Owners", "Waiters", "Tokens"):
        nav.get_by_role("link", name=name).tap()
        page.get_by_role("heading", name=name, level=1).wait_for(state="attached")
        box = nav.get_by_role("link", name=name).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 320
        assert min(box["width"], box["height"]) >= 44


def test_a_list_of_owners_has_a_way_on_and_back(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """By links that work without scripts, too."""
    client.make_many(101)
    for number in range(101):
        client.acquire(owner=f"worker-{number:03}")
    page = tabs.open(server, "/owners", script=False)
    names = "rows => rows.map(row => row.dataset.owner)"
    seen = [page.locator(".owner-row").evaluate_all(names)]
    for _ in range(2):
        page.get_by_role("link", name="Next page").click()
        page.wait_for_url("**after=*")
        seen.append(page.locator(".owner-row").evaluate_all(names))
    assert sum(seen, []) == [f"worker-{number:03}" for number in range(101)]  # noqa: RUF017
    page.get_by_role("link", name="Previous page").click()
    assert page.locator(".owner-row").evaluate_all(names) == seen[1]
    page.get_by_role("link", name="Previous page").click()
    assert page.locator(".owner-row").evaluate_all(names) == seen[0]
    assert page.get_by_role("link", name="Previous page").count() == 0
