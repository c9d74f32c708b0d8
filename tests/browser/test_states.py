"""Every state of the pool, the server and the session, and what the page offers in it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import Start
from support import ADMIN_TOKEN, VIEWER_TOKEN, Client, ServerProcess, eventually
from valkeys import give_back, hold_ports
from viewing import Viewer

from browser.conftest import Tabs, figure, quarantine, report, rows, state

pytestmark = pytest.mark.thorough

HIDE = """hidden => {
    Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});
    document.dispatchEvent(new Event('visibilitychange'));
}"""


def test_exhausted(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """The card shows when the next block ends and who holds the keys; it disappears when one is free."""
    client.make_many(3)
    page = tabs.live(server)
    client.batch(op="acquire", count=3, owner="greedy")
    card = page.locator("#exhausted")
    card.wait_for(state="visible")
    page.wait_for_function(
        "() => /ends in 0:\\d\\d\\./.test(document.getElementById('next-due').textContent)"
    )
    assert "3 blocked, 0 cooling and 0 quarantined" in card.inner_text()
    card.get_by_role("link", name="See who holds keys").click()
    page.wait_for_url("**/keys?tab=blocked")
    page.locator(".key-row").first.wait_for()
    assert page.locator(".key-row").count() == 3
    page.goto("/keys?tab=available")
    page.get_by_role("heading", name="No key is available").wait_for()
    page.goto("/")
    client.batch(op="unblock", keys=[f"id:{row['id']}" for row in client.get("/api/v1/keys").json["keys"]])
    card.wait_for(state="hidden")


def test_a_pool_that_is_mostly_out(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """The tiles turn, in words too, when over half of the keys is cooling or quarantined, and turn back."""
    client.make_many(4)
    page = tabs.live(server)
    cooling = report(client, "rate_limited", retry_after=538)
    report(client, "invalid")
    figure(page, "cooling", "1")
    figure(page, "quarantined", "1")
    tile = page.locator("#tile-quarantined")
    assert tile.locator(".note").inner_text() == "until restored"
    quarantine(client, next(row["id"] for row in rows(client) if row["state"] == "available"))
    tile.get_by_text("over half of the pool is out").wait_for()
    warned = page.locator("#tile-cooling.warn, #tile-quarantined.warn")
    eventually(lambda: warned.count() == 2, "both tiles have turned")
    quarantine(client, next(row["id"] for row in rows(client) if row["state"] == "available"))
    card = page.locator("#exhausted")
    card.get_by_text("1 cooling and 3 quarantined").wait_for()
    card.get_by_text("The next block or cooldown ends in 8:").wait_for()
    quarantine(client, cooling)
    card.get_by_text("None of them comes back by itself").wait_for()
    card.get_by_role("link", name="See quarantined keys").click()
    page.wait_for_url("**/keys?tab=quarantined")
    client.batch(op="restore", keys=[f"id:{row['id']}" for row in rows(client)]).expect(200)
    page.get_by_role("heading", name="No key is quarantined").wait_for()
    page.goto("/")
    assert warned.count() == 0


def test_a_filter_without_a_hit(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """The page shows the search, and offers to clear it."""
    client.make()
    page = tabs.live(server, "/keys")
    page.goto("/keys?q=zzzz")
    page.get_by_role("heading", name="No key starts with zzzz").wait_for()
    page.get_by_role("link", name="Clear the search").click()
    page.locator(".key-row").wait_for()
    page.goto("/keys?tab=blocked")
    page.get_by_role("heading", name="No key is blocked").wait_for()


def test_a_page_that_empties_and_fills_while_open(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """The table gives way to the empty state and comes back."""
    page = tabs.live(server, "/keys")
    assert page.get_by_role("heading", name="The pool is empty").is_visible()
    key = client.make()
    page.locator(f".key-row[data-id='{key['id']}']").wait_for()
    client.delete(f"/api/v1/keys/{key['key']}")
    page.get_by_role("heading", name="The pool is empty").wait_for()


def test_the_server_is_killed_and_comes_back(tmp_path: Path, tabs: Tabs) -> None:
    """Data stays, greyed, with its age; the page reconnects by itself."""
    tabs.allow("ERR_CONNECTION|WebSocket|503")  # 503 while the server that comes back is loading
    flags = ["--data=:memory:"]
    [port] = hold_ports(1)
    first = ServerProcess([*flags, f"--port={port}"], cwd=tmp_path)
    try:
        first.client().make_many(7)
        page = tabs.live(first)
        figure(page, "available", "7")
        first.signal(signal.SIGKILL)
        first.wait()
        state(page, "lost")
        assert "The server can't be reached" in page.locator("#banner").inner_text()
        page.wait_for_function(
            "() => /No connection · [1-9]/.test(document.getElementById('pill-text').textContent)"
        )
        assert page.locator("#tile-available .figure").inner_text() == "7"
        assert page.evaluate("getComputedStyle(document.querySelector('main')).filter") == "grayscale(1)"
        page.get_by_role("button", name="Try now").wait_for()
        with ServerProcess([*flags, f"--port={port}"], cwd=tmp_path):
            # "Try now", unless the page has tried by itself just now and the banner is gone.
            page.evaluate("document.querySelector('#banner:not([hidden]) button')?.click()")
            state(page, "live")
            figure(page, "available", "0")
            page.locator("#banner").wait_for(state="hidden")
            page.context.close()
    finally:
        first.close()
        give_back(port)


def test_draining(start_server: Start, tabs: Tabs) -> None:
    """The page shows that the server is stopping."""
    tabs.allow("ERR_CONNECTION|WebSocket")
    server = start_server()
    page = tabs.live(server)
    server.signal(signal.SIGTERM)
    page.get_by_text("The server is stopping").wait_for()
    state(page, "draining")
    server.wait()


def test_storage_is_down(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """The page learns it from /figures within seconds; reads go on."""
    page = tabs.open(server, "about:blank")
    # Not by route.fetch(): a handler that waits for its answer when the page is closed never ends.
    body = client.get("/figures").expect(200)
    body["ready"] = {
        "code": "storage-unavailable",
        "title": "Storage unavailable",
        "detail": "the disk is full",
    }
    page.route("**/figures", lambda route: route.fulfill(json=body))
    page.goto(f"http://{server.host}/")
    banner = page.locator("#banner")
    banner.get_by_text("The disk is full").wait_for()
    assert "Reads go on" in banner.inner_text()
    state(page, "live")


def test_no_room_for_another_viewer(lend: Start, tabs: Tabs) -> None:
    """The page polls every few seconds instead, and shows that it does."""
    tabs.allow("WebSocket|429")
    server = lend("--max-viewers=1")
    with Viewer(server) as viewer:
        viewer.frame()
        page = tabs.open(server)
        state(page, "polling")
        assert "Too many viewers for live updates" in page.locator("#banner").inner_text()
        server.client().make_many(4)
        figure(page, "available", "4")
        eventually(lambda: page.locator("#latest .event").count() >= 4, "its events")


def test_signed_out_while_the_page_is_open(tokened: ServerProcess, tabs: Tabs, sign_in: Any) -> None:
    """After a sign-out in another tab the page shows it, keeps its data, and returns after the sign-in."""
    tabs.allow("401|WebSocket")
    page = tabs.open(tokened, "/keys?tab=blocked")
    sign_in(page, VIEWER_TOKEN)
    state(page, "live")
    other = page.context.new_page()
    other.goto(f"http://{tokened.host}/")
    other.get_by_role("button", name="Sign out").click()
    state(page, "signed-out")
    page.locator("#banner").get_by_role("button", name="Sign in").click()
    sign_in(page, VIEWER_TOKEN)
    state(page, "live")
    assert page.url.endswith("/keys?tab=blocked")


def test_the_sign_in_leads_back_to_the_key_that_was_open(
    tokened: ServerProcess, tabs: Tabs, sign_in: Any
) -> None:
    """Also after a wrong token. The key is the fragment of the address, which browsers don't send."""
    tabs.allow("401")
    key = tokened.client(ADMIN_TOKEN).make()
    page = tabs.open(tokened, f"/keys?tab=available#key-{key['id']}")
    sign_in(page, "wrong-token-000000")
    page.get_by_text("not known to the server").wait_for()
    sign_in(page, VIEWER_TOKEN)
    page.get_by_role("dialog").wait_for()
    assert page.url.endswith(f"/keys?tab=available#key-{key['id']}")


def test_an_action_after_the_session_has_ended(tokened: ServerProcess, tabs: Tabs, sign_in: Any) -> None:
    """It is refused, with a message that explains what to do."""
    tabs.allow("401|WebSocket")
    tokened.client(ADMIN_TOKEN).make()
    page = tabs.open(tokened, "/keys")
    sign_in(page, ADMIN_TOKEN)
    state(page, "live")
    page.context.clear_cookies()
    page.locator("[data-act=keepalive]").first.click()
    state(page, "signed-out")
    assert page.locator(".key-row").count() == 1


def test_the_sign_in_says_what_is_wrong(tokened: ServerProcess, tabs: Tabs, sign_in: Any) -> None:
    """A valid token then signs in."""
    tabs.allow("401")
    page = tabs.open(tokened, "/system")
    sign_in(page, "wrong-token-000000")
    page.get_by_text("not known to the server").wait_for()
    sign_in(page, VIEWER_TOKEN)
    page.wait_for_url("**/system")
    assert VIEWER_TOKEN not in page.content()


def test_a_gap_in_the_numbers_begins_anew(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """After a lost frame the page requests the whole state, and shows the right numbers."""
    page = tabs.open(server, "about:blank")
    hellos: list[str] = []

    def between(ws: Any) -> None:
        real = ws.connect_to_server()

        def pass_on(message: str) -> None:
            frame = json.loads(message)
            if frame["type"] == "hello":
                hellos.append(message)
            if frame["seq"] == 2 and len(hellos) == 1:
                return  # lost
            ws.send(message)

        real.on_message(pass_on)

    page.route_web_socket("**/api/v1/feed", between)
    page.goto(f"http://{server.host}/")
    state(page, "live")
    client.make_many(3)
    page.wait_for_timeout(600)
    client.make_many(2)
    figure(page, "available", "5")
    eventually(lambda: page.wait_for_timeout(50) or len(hellos) >= 2, "a second hello")


@pytest.mark.once
def test_a_page_gets_only_what_it_draws(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """The history for the overview's charts only, no events where none are listed."""
    client.make()
    page = tabs.open(server, "about:blank")
    hellos: list[dict[str, Any]] = []

    def hear(frame: str | bytes) -> None:
        heard = json.loads(frame)
        if heard["type"] == "hello":
            hellos.append(heard)

    page.on("websocket", lambda ws: ws.on("framereceived", hear))
    for path, history, events in (("/", True, True), ("/keys", False, True), ("/system", False, False)):
        hellos.clear()
        page.goto(f"http://{server.host}{path}")
        state(page, "live")
        eventually(lambda: page.wait_for_timeout(20) or hellos, "its hello")
        assert (hellos[-1]["history"] is not None, bool(hellos[-1]["events"])) == (history, events), path


def test_a_dead_line_is_noticed_without_being_closed(server: ServerProcess, tabs: Tabs) -> None:
    """The page reconnects after a silence, without waiting for onclose."""
    page = tabs.open(server, "about:blank")
    dead = False

    def between(ws: Any) -> None:
        real = ws.connect_to_server()
        real.on_message(lambda message: None if dead else ws.send(message))

    page.route_web_socket("**/api/v1/feed", between)
    page.clock.install()
    page.goto(f"http://{server.host}/")
    state(page, "live")
    dead = True
    page.clock.run_for(14_000)
    page.wait_for_function("() => document.getElementById('pill').dataset.state !== 'live'")
    dead = False
    page.clock.run_for(14_000)  # a line that was dead from the start is noticed as well
    state(page, "live")


def test_a_hidden_tab_holds_no_connection(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """It reconnects at once when the tab is shown again."""
    page = tabs.open(server, "about:blank")
    page.clock.install()
    page.goto(f"http://{server.host}/")
    state(page, "live")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.evaluate(HIDE, True)
    page.clock.run_for(6_000)
    state(page, "paused")
    eventually(lambda: client.get("/figures").json["viewers"] == 0, "no viewer")
    asked.clear()
    page.clock.run_for(60_000)
    assert asked == []
    client.make_many(2)
    page.evaluate(HIDE, False)
    state(page, "live")
    figure(page, "available", "2")


def test_the_network_comes_back(server: ServerProcess, tabs: Tabs) -> None:
    """At the browser's `online` event the page reconnects without waiting for its back-off."""
    tabs.allow("ERR_INTERNET|WebSocket")
    page = tabs.live(server)
    page.evaluate("Math.random = () => 1e6")  # what the back-off is drawn from: it would take days
    page.context.set_offline(True)
    state(page, "lost")
    page.context.set_offline(False)
    state(page, "live")
