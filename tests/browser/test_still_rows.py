"""Rows hold still while somebody aims at them, by mouse, touch or keyboard, on every list."""

from __future__ import annotations

from typing import Any

import pytest
from support import API, Client, ServerProcess

from browser.conftest import Tabs, figure, row

pytestmark = pytest.mark.thorough

ORDER = "rows => rows.map(row => row.dataset.id + ' ' + row.getBoundingClientRect().top)"


def aim(page: Any, target: Any, by: str) -> None:
    """Aim at a place in a row by mouse, touch or keyboard."""
    if by == "mouse":
        target.locator("time, .time").first.hover()
    elif by == "touch":
        target.locator("time, .time").first.tap()
    else:
        page.keyboard.press("Shift")  # so that the browser shows the focus
        target.locator(".key-link").focus()
    page.locator("#held").wait_for()


def let_go(page: Any, by: str) -> None:
    """Aim at nothing any more."""
    if by == "mouse":
        page.mouse.move(0, 0)
    else:
        page.evaluate("document.activeElement.blur()")
    page.locator("#held").wait_for(state="hidden")


@pytest.mark.once
@pytest.mark.parametrize("by", ["mouse", "touch", "keyboard"])
def test_lists_of_the_overview_hold_still(server: ServerProcess, client: Client, tabs: Tabs, by: str) -> None:
    """Latest events, and what is released next; both are brought up to date afterwards."""
    client.make_many(12)
    first = client.acquire(owner="first")
    client.batch(op="acquire", count=5)
    page = tabs.live(server, has_touch=by == "touch")
    latest, due = page.locator("#latest .event"), page.locator("[data-order=release] li")
    page.wait_for_selector(f"[data-order=release] li[data-id='{first['id']}']")
    aim(page, latest.nth(3), by)
    before = latest.evaluate_all(ORDER)
    client.make_many(4)
    figure(page, "available", "10")
    assert latest.evaluate_all(ORDER) == before
    if by != "touch":
        let_go(page, by)
        page.wait_for_function("() => document.querySelector('#latest .event').dataset.kind === 'generated'")
    aim(page, due.nth(2), by)
    before = due.evaluate_all(ORDER)
    client.post(f"{API}/keys/{first['key']}/unblock").expect(200)
    page.wait_for_selector(f"[data-order=release] li.over[data-id='{first['id']}']")
    assert due.evaluate_all(ORDER) == before
    if by != "touch":
        let_go(page, by)
        page.locator(f"[data-order=release] li[data-id='{first['id']}']").wait_for(state="detached")
        assert page.locator("li.over").count() == 0


@pytest.mark.once
@pytest.mark.parametrize("by", ["mouse", "keyboard", "scrolling"])
def test_new_events_wait_behind_a_button(server: ServerProcess, client: Client, tabs: Tabs, by: str) -> None:
    """It says how many they are; it shows them when it is pressed, and they come by themselves when the aim ends."""
    client.make_many(60)
    page = tabs.live(server, "/events")
    stream = page.locator("#stream .event")
    if by == "scrolling":
        stream.nth(40).scroll_into_view_if_needed()
        page.locator("#held").wait_for()
    else:
        aim(page, stream.nth(3), by)
    before = stream.evaluate_all(ORDER)
    newest = client.make_many(12)[-1]["id"]
    newer = page.get_by_role("button", name="12 new", exact=True)
    newer.wait_for()
    assert stream.evaluate_all(ORDER) == before
    box = newer.bounding_box()
    assert 0 <= box["y"] <= 800 - box["height"]
    if by == "mouse":
        newer.click()
    elif by == "scrolling":
        page.evaluate("scrollTo(0, 0)")
    else:
        let_go(page, by)
    newer.wait_for(state="hidden")
    assert stream.first.get_attribute("data-id") == str(newest)


@pytest.mark.once
def test_the_focus_keeps_its_row(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """A key that is blocked no longer stays in the list of blocked keys while the focus is on it."""
    client.make_many(2)
    lease = client.acquire(owner="first")
    client.acquire(owner="second")
    page = tabs.live(server, "/keys?tab=blocked")
    mine = row(page, lease["id"])
    page.keyboard.press("Shift")
    mine.locator(".key-link").focus()
    client.post(f"{API}/keys/{lease['key']}/unblock").expect(200)
    mine.locator(".state", has_text="available").wait_for()
    page.wait_for_event("response", lambda response: "/keys?" in response.url)
    page.evaluate("() => new Promise(requestAnimationFrame)")
    assert mine.locator(".key-link").evaluate("link => link === document.activeElement")
    page.evaluate("document.activeElement.blur()")
    mine.wait_for(state="detached")


@pytest.mark.once
@pytest.mark.parametrize("width", [1280, pytest.param(390, marks=pytest.mark.thorough)])
def test_pointing_at_the_table_moves_nothing(
    server: ServerProcess, client: Client, tabs: Tabs, width: int
) -> None:
    """The note that rows hold still is in view, and takes its room from nothing else."""
    client.make_many(40)
    page = tabs.live(server, "/keys", viewport={"width": width, "height": 700})
    sizes = "document.documentElement.scrollHeight + ' ' + document.querySelector('#keys').getBoundingClientRect().top"
    before = page.evaluate(sizes)
    page.locator(".key-row .state").nth(3).hover()
    page.locator("#held").wait_for()
    assert page.evaluate(sizes) == before
    box = page.locator("#held").bounding_box()
    assert box["y"] + box["height"] < 700
