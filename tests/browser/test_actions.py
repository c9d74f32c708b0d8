"""Every action of an admin, from the button to the pool."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from conftest import Start
from support import ADMIN_TOKEN, API, Client, ServerProcess, eventually

from browser.conftest import Tabs, figure, quarantine, report, row, rows

if TYPE_CHECKING:
    from playwright.sync_api import Route


def confirm(page: Any, *words: str) -> None:
    """Confirm the dialog, which must contain these words."""
    dialog = page.locator("#confirm[open]")
    dialog.wait_for()
    text = dialog.inner_text()
    for word in words:
        assert word in text, text
    dialog.locator("#confirm-go").click()


def test_generate_from_an_empty_pool(start_server: Start, tabs: Tabs) -> None:
    """The empty pool's own button works."""
    page = tabs.live(start_server())
    page.locator("#empty [data-generate]").click()
    page.get_by_label("How many").fill("25")
    page.get_by_label("How many").press("Enter")
    page.get_by_text("25 keys generated.").wait_for()
    figure(page, "available", "25")
    page.locator("#empty").wait_for(state="hidden")


@pytest.mark.thorough
def test_cancel_generates_nothing(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """Escape generates nothing either."""
    page = tabs.live(server, "/keys")
    cancel = page.locator("#generate").get_by_role("button", name="Cancel")
    for leave in (cancel.click, partial(page.keyboard.press, "Escape")):
        page.locator(".toolbar [data-generate]").click()
        leave()
    page.wait_for_timeout(300)
    assert client.stats()["total"] == 0


def test_unblock_a_row(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """The dialog names the holder, and the call sends the lease that was shown."""
    client.make()
    lease = client.acquire(owner="worker-7")
    page = tabs.live(server, "/keys?tab=blocked")
    row(page, lease["id"]).locator("[data-act=unblock]").click()
    confirm(page, "worker-7", f"lease {lease['lease']}", "Unblock")
    page.get_by_text(f"Key {lease['id']} is available.").wait_for()
    assert client.row(lease["key"])["state"] == "available"


def test_a_late_unblock_does_not_free_the_next_holders_key(
    server: ServerProcess, client: Client, tabs: Tabs
) -> None:
    """The key was served to somebody else while the dialog was open."""
    client.make()
    lease = client.acquire(owner="first")
    page = tabs.live(server, "/keys?tab=blocked")
    row(page, lease["id"]).locator("[data-act=unblock]").click()
    page.locator("#confirm[open]").wait_for()
    client.post(f"{API}/keys/{lease['key']}/unblock").expect(200)
    client.acquire(owner="second")
    tabs.allow("409")
    confirm(page, "first")
    page.get_by_text("Stale lease").wait_for()
    assert client.row(lease["key"])["owner"] == "second"


def test_quarantine_a_key_that_is_held(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """It goes when its lease ends; or now, which the dialog offers for held keys only."""
    client.make_many(2)
    lease = client.acquire(owner="worker-7")
    page = tabs.live(server, "/keys")
    button, dialog = (
        row(page, lease["id"]).locator("[data-act=quarantine]"),
        page.locator("#quarantine[open]"),
    )
    button.click()
    dialog.wait_for()
    assert "worker-7" in dialog.inner_text()
    dialog.get_by_label("Reason").fill("ticket 4711")
    dialog.get_by_role("button", name="Quarantine").click()
    page.get_by_text(f"Key {lease['id']} will be quarantined when its lease ends.").wait_for()
    assert client.row(lease["key"])["state"] == "blocked"
    button.click()
    assert dialog.get_by_label("Reason").input_value() == ""
    dialog.get_by_label("Now").check()
    dialog.get_by_role("button", name="Quarantine").click()
    page.get_by_text(f"Key {lease['id']} is quarantined.").wait_for()
    found = client.row(lease["key"])
    assert (found["state"], found["reason"]) == ("quarantined", "ticket 4711")
    row(page, next(each["id"] for each in rows(client) if each["state"] == "available")).locator(
        "[data-act=quarantine]"
    ).click()
    dialog.wait_for()
    assert not dialog.get_by_label("Now").is_visible()
    dialog.get_by_role("button", name="Cancel").click()
    assert client.stats()["quarantined"] == 1


@pytest.mark.thorough
def test_restore_a_row(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """The dialog says why the key is out; a cooling key can be restored, too."""
    client.make_many(2)
    invalid = report(client, "invalid", reason="401 from example.com")
    limited = report(client, "rate_limited", retry_after=900)
    page = tabs.live(server, "/keys")
    row(page, invalid).locator("[data-act=restore]").click()
    confirm(page, "quarantined", "invalid: 401 from example.com", "Restore")
    page.get_by_text(f"Key {invalid} is available.").wait_for()
    row(page, limited).locator("[data-act=restore]").click()
    confirm(page, "cooling", "rate limited, 1 failure", "Restore")
    page.get_by_text(f"Key {limited} is available.").wait_for()
    assert [(each["state"], each["failures"], each["outcome"]) for each in rows(client)] == [
        ("available", 0, None)
    ] * 2


@pytest.mark.thorough
def test_call_off_a_quarantine_that_is_to_come(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """From the panel of a key that is held; its lease goes on."""
    client.make()
    lease = client.acquire(owner="worker-7")
    quarantine(client, lease["id"])
    page = tabs.live(server, f"/keys/{lease['id']}")
    before = len(server.log_since(0))  # other tests have restored keys of this server
    page.locator("[data-act=restore]").click()
    confirm(page, "called off", "Restore")
    eventually(lambda: "restore by admin" in "\n".join(server.log_since(before)), "its line of the audit log")
    assert client.row(lease["key"])["owner"] == "worker-7"
    client.post(f"{API}/keys/{lease['key']}/unblock").expect(200)
    assert client.row(lease["key"])["state"] == "available"


@pytest.mark.thorough
def test_quarantine_and_restore_several(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """One reason for all; a restore leaves out those that are neither cooling nor quarantined."""
    client.make_many(4)
    client.acquire(owner="worker-7")
    page = tabs.live(server, "/keys")
    page.get_by_label("Select all rows shown").check()
    page.locator("[data-bulk=quarantine]").click()
    dialog = page.locator("#quarantine[open]")
    dialog.wait_for()
    assert "held by worker-7" in dialog.inner_text()
    dialog.get_by_label("Reason").fill("rotated")
    dialog.get_by_label("Reason").press("Enter")
    page.get_by_text("4 quarantined, those that are held when their lease ends.").wait_for()
    assert [each["reason"] for each in rows(client)].count("rotated") == 3
    page.locator("#bulk").wait_for(state="hidden")
    eventually(lambda: page.locator(".state[data-state=quarantined]").count() == 3, "three rows")
    page.get_by_label("Select all rows shown").check()
    page.locator("[data-bulk=restore]").click()
    confirm(page, "Restore 3 keys", "quarantined")
    page.get_by_text("3 restored.").wait_for()
    assert client.stats()["available"] == 3
    page.locator("#bulk").wait_for(state="hidden")
    eventually(lambda: page.locator(".state[data-state=available]").count() == 3, "three rows")
    page.get_by_label("Select all rows shown").check()
    page.locator("[data-bulk=restore]").click()
    page.get_by_text("None of the selected keys is cooling or quarantined.").wait_for()


@pytest.mark.thorough
def test_keep_alive_a_row(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """It needs no confirmation."""
    key = client.make()
    page = tabs.live(server, "/keys")
    row(page, key["id"]).locator("[data-act=keepalive]").click()
    page.get_by_text("now expires in 300 s").wait_for()
    assert client.stats()["kept_alive"] >= 1


def test_delete_a_row(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """After a confirmation the row disappears."""
    kept, gone = client.make(), client.make()
    page = tabs.live(server, "/keys")
    row(page, gone["id"]).locator("[data-act=delete]").click()
    page.locator("#confirm").get_by_role("button", name="Cancel").click()
    assert client.stats()["total"] == 2
    row(page, gone["id"]).locator("[data-act=delete]").click()
    confirm(page, str(gone["id"]), "permanently")
    client.get(f"{API}/keys/{kept['key']}").expect(200)
    eventually(lambda: client.stats()["total"] == 1, "one key")
    page.mouse.move(0, 0)
    row(page, gone["id"]).wait_for(state="detached")


@pytest.mark.thorough
def test_deleting_several_has_to_be_typed(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """Only the selected keys are deleted, by id, and only after the number was typed."""
    made = client.make_many(6)
    lease = client.acquire(owner="worker-7")
    page = tabs.live(server, "/keys")
    chosen = [lease["id"], *[key["id"] for key in made if key["id"] != lease["id"]][:2]]
    for key_id in chosen:
        row(page, key_id).locator(".picked").check()
    assert page.locator("#bulk-count").inner_text() == "3"
    asked: list[Any] = []
    page.on(
        "request", lambda request: asked.append(request.post_data_json) if request.method == "POST" else None
    )
    page.locator("[data-bulk=delete]").click()
    dialog = page.locator("#confirm[open]")
    dialog.wait_for()
    assert "held by worker-7" in dialog.inner_text()
    button = dialog.locator("#confirm-go")
    assert button.is_disabled()
    field = dialog.get_by_role("textbox")
    field.fill("delete 2")
    assert button.is_disabled()
    field.press("Enter")
    assert dialog.is_visible()
    field.fill("delete 3")
    button.click()
    page.get_by_text("3 deleted.").wait_for()
    assert asked == [{"op": "delete", "keys": [f"id:{key_id}" for key_id in chosen]}]
    assert client.stats()["total"] == 3


def test_several_at_once(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """Unblock those that are held, keep all alive; the whole page by one click, Escape lets go."""
    client.make_many(5)
    client.batch(op="acquire", count=2, owner="a")
    page = tabs.live(server, "/keys")
    page.get_by_label("Select all rows shown").check()
    assert page.locator("#bulk-count").inner_text() == "5"
    page.locator("[data-bulk=keepalive]").click()
    page.get_by_text("5 kept alive.").wait_for()
    page.locator("#bulk").wait_for(state="hidden")
    page.get_by_label("Select all rows shown").check()
    page.locator("[data-bulk=unblock]").click()
    confirm(page, "Unblock 2 keys")
    page.get_by_text("2 unblocked.").wait_for()
    page.locator("#bulk").wait_for(state="hidden")
    assert client.stats()["blocked"] == 0
    page.get_by_label("Select all rows shown").check()
    page.keyboard.press("Escape")
    assert not page.locator("#bulk").is_visible()


@pytest.mark.thorough
def test_what_an_unblock_left_alone_is_said(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """Keys that were leased again meanwhile, and nothing about others."""
    client.make()
    lease = client.acquire(owner="first")
    page = tabs.live(server, "/keys?tab=blocked")
    row(page, lease["id"]).locator(".picked").check()
    page.locator("[data-bulk=unblock]").click()
    page.locator("#confirm[open]").wait_for()
    client.post(f"{API}/keys/{lease['key']}/unblock").expect(200)
    client.acquire(owner="second")
    confirm(page, "Unblock one key")
    page.get_by_text("0 unblocked. 1 leased again in the meantime and left alone.").wait_for()


def test_the_panel_of_a_key(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """State, holder, deadlines, events, lines for a shell; and it follows what happens."""
    client.make()
    lease = client.acquire(owner="worker-7")
    page = tabs.live(server, "/keys")
    row(page, lease["id"]).locator(".key-link").click()
    panel = page.locator("#panel[open] .key-panel")
    panel.get_by_text("worker-7").first.wait_for()
    text = panel.inner_text()
    assert "acquired" in text
    assert re.search(r"Times served\s+1\b", text), text
    assert f"/api/v1/keys/id:{lease['id']}/unblock" in text
    client.post(f"{API}/keys/{lease['key']}/unblock").expect(200)
    panel.get_by_text("nobody").wait_for()
    page.keyboard.press("Escape")
    assert not page.locator("#panel").is_visible()


@pytest.mark.thorough
def test_act_from_the_panel(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """After a deletion the panel shows that the key is gone."""
    key = client.make()
    page = tabs.live(server, "/keys")
    row(page, key["id"]).locator(".key-link").click()
    tabs.allow("404")
    page.locator("#panel [data-act=delete]").click()
    confirm(page, "permanently")
    page.get_by_text("No key has this id").wait_for()


def test_reveal_is_audited_and_hidden_again(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """After 30 s, on demand, and when the panel closes; copied without being shown elsewhere."""
    key = client.make()
    page = tabs.open(server, "about:blank")
    page.clock.install()
    page.goto(f"http://{server.host}/keys")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#pill[data-state=live]").wait_for()
    row(page, key["id"]).locator(".key-link").click()
    panel = page.locator("#panel[open] .key-panel")
    panel.locator("[data-reveal]").click()
    page.wait_for_function("key => document.querySelector('.secret').textContent === key", arg=key["key"])
    eventually(
        lambda: re.search(rf"reveal by admin .* id:{key['id']} ", server.log), "its line of the audit log"
    )
    panel.locator("[data-copy-secret]").click()
    assert page.evaluate("navigator.clipboard.readText()") == key["key"]
    page.clock.fast_forward(15_000)
    assert panel.locator(".secret").inner_text() == key["key"]
    page.clock.fast_forward(16_000)
    page.wait_for_function("() => document.querySelector('.secret').textContent === ''")
    panel.locator("[data-reveal]").click()
    page.wait_for_function("key => document.querySelector('.secret').textContent === key", arg=key["key"])
    panel.get_by_role("button", name="Hide now").click()
    assert key["key"] not in page.content()
    panel.locator("[data-reveal]").click()
    page.wait_for_function("key => document.querySelector('.secret').textContent === key", arg=key["key"])
    page.keyboard.press("Escape")
    page.wait_for_function("() => document.querySelector('.secret') === null")
    assert key["key"] not in page.content()


@pytest.mark.thorough
def test_a_key_revealed_while_its_panel_is_updated_is_shown(
    server: ServerProcess, client: Client, tabs: Tabs
) -> None:
    """The answer comes after the panel has changed."""
    key = client.make()
    page = tabs.live(server, "/keys")
    row(page, key["id"]).locator(".key-link").click()
    held: list[Route] = []
    page.route("**/reveal", lambda route: held.append(route))  # noqa: PLW0108 - it needs attributes
    page.locator("#panel [data-reveal]").click()
    client.acquire()
    page.locator("#panel .key-panel[data-state=blocked]").wait_for()
    eventually(lambda: page.wait_for_timeout(10) or held, "the request to reveal")
    held[0].continue_()
    page.wait_for_function("key => document.querySelector('.secret').textContent === key", arg=key["key"])


@pytest.mark.thorough
def test_rows_hold_still_under_the_pointer(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """A row of a deleted key is struck through, and disappears when the pointer leaves."""
    one, other = client.make(), client.make()
    page = tabs.live(server, "/keys")
    row(page, other["id"]).hover()
    client.delete(f"{API}/keys/{one['key']}")
    page.wait_for_selector(f".key-row.gone[data-id='{one['id']}']")
    page.mouse.move(1, 1)
    row(page, one["id"]).wait_for(state="detached")
    assert row(page, other["id"]).is_visible()


@pytest.mark.thorough
def test_the_stream_pauses_and_is_filtered(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """Events during a pause are counted, and shown when the stream goes on."""
    page = tabs.live(server, "/events")
    key = client.make()
    page.wait_for_selector(f"#stream .event[data-id='{key['id']}']")
    page.get_by_role("button", name="Pause").click()
    client.acquire(owner="a-holder-like-no-other")
    page.get_by_role("button", name="1 new").wait_for()
    acquired = page.locator(f"#stream .event[data-kind=acquired][data-id='{key['id']}']")
    assert acquired.count() == 0
    page.get_by_role("button", name="Resume").click()
    acquired.wait_for()
    page.locator("#search").fill("A-HOLDER-LIKE-NO-OTHER")
    assert page.locator("#stream .event:visible").count() == 1
    page.locator("#search").fill("nothing like it")
    assert page.get_by_text("No matching events").is_visible()
    page.get_by_role("link", name="generated").click()
    page.wait_for_url("**/events?kind=generated")
    assert set(page.locator("#stream .event").evaluate_all("rows => rows.map(row => row.dataset.kind)")) == {
        "generated"
    }


def test_a_viewer_can_look_and_not_touch(tokened: ServerProcess, tabs: Tabs, sign_in: Any) -> None:
    """There are no controls for calls that would be refused."""
    key = tokened.client(ADMIN_TOKEN).make()
    page = tabs.open(tokened)
    sign_in(page, "viewer-token-77a1c5d2")
    page.locator("#pill[data-state=live]").wait_for()
    page.goto("/keys")
    row(page, key["id"]).locator(".key-link").click()
    page.locator("#panel[open] .key-panel").wait_for()
    for offered in ("[data-act]", "[data-reveal]", "[data-bulk]"):
        assert page.locator(offered).count() == 0
    assert page.locator(".role").inner_text() == "viewer"


@pytest.mark.thorough
def test_what_is_about_all_seats_of_a_key_says_so(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """A row is one seat; deleting it deletes the others, too, also those that somebody holds."""
    item = {"secret": "sk-live-77d1-3f0c2e91", "seats": 3, "expire": True}
    ids = client.post(f"{API}/keys", json=item).expect(201)["ids"]
    client.make()
    page = tabs.live(server, "/keys")
    assert "seat 2 of 3" in row(page, ids[1]).inner_text()
    assert "seat" not in row(page, ids[2] + 1).inner_text()
    row(page, ids[1]).locator("[data-act=quarantine]").click()
    dialog = page.locator("#quarantine[open]")
    assert "all of them" in dialog.inner_text()
    assert "end the lease at once" in dialog.inner_text()
    dialog.locator("#quarantine-go").click()
    eventually(lambda: client.stats()["quarantined"] == 3, "all seats to be quarantined")
    row(page, ids[1]).locator("[data-act=restore]").click()
    confirm(page, "all of them", "Restore")
    eventually(lambda: client.stats()["available"] == 4, "all seats to be restored")
    row(page, ids[1]).locator(".key-link").click()
    page.locator(".key-panel [data-act=delete]").click()
    tabs.allow("404")  # the panel of a key that is gone
    confirm(page, "all of them", "Delete")
    eventually(lambda: client.stats()["total"] == 1, "all seats to be deleted")
