"""Actions on all keys that match a list, on all its pages."""

from __future__ import annotations

from typing import Any

import pytest
from support import Client, ServerProcess, eventually

from browser.conftest import Tabs
from browser.test_actions import confirm

pytestmark = pytest.mark.thorough


def select_all(page: Any, button: str) -> None:
    """Select the rows shown, then all that match."""
    page.get_by_label("Select all rows shown").check()
    page.get_by_role("button", name=button, exact=True).click()


@pytest.mark.once
def test_all_that_match_are_acted_on(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """Those in the state of the list, on all pages, and no others; the number has to be typed to delete them."""
    client.make_many(1000)
    client.make_many(130)
    client.batch(op="acquire", count=80, owner="a")
    page = tabs.live(server, "/keys?tab=blocked")
    select_all(page, "Select all 80")
    assert page.locator("#bulk-count").inner_text() == "80"
    page.locator("[data-bulk=unblock]").click()
    confirm(page, "Unblock all 80 keys?")
    page.get_by_text("80 unblocked.").wait_for()
    assert client.stats()["blocked"] == 0
    page.locator("#bulk").wait_for(state="hidden")
    page.goto("/keys")
    page.wait_for_selector("#pill[data-state=live]")
    select_all(page, "Select all 1,130")
    page.locator("[data-bulk=delete]").click()
    page.locator("#confirm").get_by_role("textbox").fill("delete 1130")
    page.locator("#confirm-go").click()
    page.get_by_text("1,130 deleted.").wait_for()
    assert client.stats()["total"] == 0


@pytest.mark.once
def test_an_action_on_all_can_be_stopped(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """Between two slices; what was done stays done, and the message says how many that are."""
    client.make_many(1000)
    client.make_many(100)
    page = tabs.live(server, "/keys")
    select_all(page, "Select all 1,100")
    held: list[Any] = []
    page.route("**/batch", lambda route: held.append(route))  # noqa: PLW0108 - it needs attributes
    page.locator("[data-bulk=keepalive]").click()
    confirm(page, "Keep alive all 1,100 keys?")
    eventually(lambda: page.wait_for_timeout(20) or held, "the first slice")
    page.get_by_role("button", name="Stop").click()
    held[0].continue_()
    page.get_by_text("500 kept alive. Stopped: the others were left alone.").wait_for()
    assert len(held) == 1
    page.locator("#bulk").wait_for(state="hidden")


@pytest.mark.once
def test_one_row_less_is_not_all(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """The selection is that of the rows shown again; where one page shows all, nothing more is offered."""
    client.make_many(60)
    page = tabs.live(server, "/keys")
    select_all(page, "Select all 60")
    page.locator(".picked").first.uncheck()
    assert page.locator("#bulk-count").inner_text() == "49"
    client.acquire()
    page.goto("/keys?tab=blocked")
    page.wait_for_selector("#pill[data-state=live]")
    page.get_by_label("Select all rows shown").check()
    page.locator("#bulk").wait_for()
    assert not page.locator("#matching").is_visible()
