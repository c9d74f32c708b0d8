"""The dashboard by keyboard alone."""

from __future__ import annotations

import pytest
from support import Client, ServerProcess

from browser.conftest import Tabs

pytestmark = pytest.mark.thorough


def test_single_keys_go_somewhere(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """Search, next and previous row, open, select, help; Escape leads back from each."""
    client.make_many(3)
    page = tabs.live(server, "/keys")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.type("jk?")
    assert page.locator("#search").input_value() == "jk?"
    page.locator("#search").fill("")
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    page.keyboard.press("j")
    rows = page.locator(".key-row")
    assert rows.nth(1).locator(".key-link").evaluate("link => link === document.activeElement")
    page.keyboard.press("k")
    page.keyboard.press(" ")
    assert rows.nth(0).locator(".picked").is_checked()
    page.keyboard.press("Escape")
    assert not rows.nth(0).locator(".picked").is_checked()
    page.keyboard.press("Enter")
    page.locator("#panel[open] .key-panel").wait_for()
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    page.locator("#help[open]").wait_for()
    page.keyboard.press("Escape")
    page.locator("#help").wait_for(state="hidden")


def test_no_single_key_changes_anything(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """No single key changes a key, even with the focus on a row."""
    client.make_many(2)
    page = tabs.live(server, "/keys")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.method))
    page.keyboard.press("j")
    for key in "abcdefghilmnopqrstuvwxyz0123456789.,-+#":
        page.keyboard.press(key)
    page.keyboard.press("Delete")
    page.keyboard.press("Backspace")
    page.wait_for_timeout(300)
    assert set(asked) <= {"GET"}
    assert client.stats()["total"] == 2


def test_they_can_be_switched_off(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """Speech input needs that; the choice is remembered."""
    client.make()
    page = tabs.live(server, "/keys")
    page.get_by_role("button", name="Keyboard shortcuts").click()
    page.get_by_label("Single-key shortcuts on").uncheck()
    page.keyboard.press("Escape")
    page.reload()
    page.keyboard.press("/")
    page.keyboard.press("?")
    assert page.evaluate("document.activeElement.id") != "search"
    assert not page.locator("#help").is_visible()


def test_a_row_and_a_dialog_by_tab_and_enter(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """Cancel has the focus when a dialog opens; it returns to where it was when the dialog closes."""
    key = client.make()
    page = tabs.live(server, "/keys")
    button = page.locator(f".key-row[data-id='{key['id']}'] [data-act=delete]")
    button.focus()
    page.keyboard.press("Enter")
    page.locator("#confirm[open]").wait_for()
    assert page.evaluate("document.activeElement.textContent") == "Cancel"
    page.keyboard.press("Enter")
    page.locator("#confirm").wait_for(state="hidden")
    assert button.evaluate("button => button === document.activeElement")
    assert client.stats()["total"] == 1


def test_a_quarantine_by_keyboard(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """The field of the reason has the focus; Escape changes nothing; the focus returns to the button."""
    key = client.make()
    page = tabs.live(server, "/keys")
    button = page.locator(f".key-row[data-id='{key['id']}'] [data-act=quarantine]")
    button.focus()
    page.keyboard.press("Enter")
    page.locator("#quarantine[open]").wait_for()
    assert page.evaluate("document.activeElement.name") == "reason"
    page.keyboard.press("Escape")
    assert button.evaluate("button => button === document.activeElement")
    assert client.stats()["quarantined"] == 0
    page.keyboard.press("Enter")
    page.keyboard.type("leaked")
    page.keyboard.press("Enter")
    page.get_by_text(f"Key {key['id']} is quarantined.").wait_for()
    assert client.row(key["key"])["reason"] == "leaked"


def test_the_content_can_be_skipped_to(server: ServerProcess, tabs: Tabs) -> None:
    """The first stop of Tab."""
    page = tabs.live(server)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
