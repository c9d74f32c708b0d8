"""Where things stand on wide and narrow screens, and how large they are under a finger."""

from __future__ import annotations

from typing import Any

import pytest
from support import Client, ServerProcess

from browser.conftest import Tabs
from browser.test_screens import fill

pytestmark = pytest.mark.thorough

PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 800}, "has_touch": True, "is_mobile": True}
PRESSED = "button, .button, select, input, .tabs a, nav a, .key-link"
SMALL = f"""() => [...document.querySelectorAll("{PRESSED}")].filter(each => {{
    const target = each.matches("[type=checkbox], [type=radio]") ? each.closest("label") : each;
    const {{ width, height }} = target.getBoundingClientRect();
    const small = height < 43.5 || (each.matches("button, [type=checkbox]") && width < 43.5);
    return each.checkVisibility({{ visibilityProperty: true }}) && small;
}}).map(each => each.outerHTML.slice(0, 120))"""


@pytest.mark.once
@pytest.mark.parametrize(
    "width", [1024, *(pytest.param(each, marks=pytest.mark.thorough) for each in (844, 720))]
)
def test_tabs_hints_and_buttons_stay_on_their_line(
    server: ServerProcess, client: Client, tabs: Tabs, width: int
) -> None:
    """The tabs on one line, Generate beside the search, and each hint in one piece."""
    fill(client)
    page = tabs.live(server, "/keys", viewport={"width": width, "height": 700})
    tops = page.locator(".tabs a").evaluate_all(
        "links => links.map(each => each.getBoundingClientRect().top)"
    )
    assert len(set(tops)) == 1
    boxes = [page.locator(each).first.bounding_box() for each in (".search", ".toolbar [data-generate]")]
    assert boxes[0]["y"] < boxes[1]["y"] + boxes[1]["height"] / 2 < boxes[0]["y"] + boxes[0]["height"]
    lines = page.locator(".key-link code").evaluate_all(
        "hints => hints.map(each => each.getClientRects().length)"
    )
    assert set(lines) == {1}


@pytest.mark.once
def test_the_head_of_the_table_stays_in_sight(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """Below the header of the page, and above the rows."""
    client.make_many(50)
    page = tabs.live(server, "/keys", viewport={"width": 1280, "height": 700})
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight / 2)")
    page.wait_for_function("() => scrollY > 500")
    head = page.get_by_role("columnheader", name="State", exact=True)
    box = head.bounding_box()
    assert box["y"] >= page.locator(".top").bounding_box()["height"] - 1
    assert box["y"] < 100
    assert page.evaluate(
        "([x, y]) => document.elementFromPoint(x, y).closest('th') !== null",
        [box["x"] + box["width"] / 2, box["y"] + box["height"] / 2],
    )


@pytest.mark.once
@pytest.mark.parametrize(
    "width", [1280, 390, *(pytest.param(each, marks=pytest.mark.thorough) for each in (1024, 820))]
)
def test_messages_do_not_cover_the_bar_of_selected_keys(
    server: ServerProcess, client: Client, tabs: Tabs, width: int
) -> None:
    """Nor does one message fill more than its lines need."""
    client.make_many(3)
    page = tabs.live(server, "/keys", viewport={"width": width, "height": 800})
    page.get_by_label("Select all rows shown").check()
    page.locator("[data-bulk=unblock]").click()
    toast = page.locator(".toast")
    toast.wait_for()
    one, other = toast.bounding_box(), page.locator("#bulk").bounding_box()
    assert one["height"] < 100
    apart = (
        one["y"] + one["height"] <= other["y"]
        or other["y"] + other["height"] <= one["y"]
        or one["x"] >= other["x"] + other["width"]
    )
    assert apart, f"{one} {other}"


@pytest.mark.once
def test_a_phone_shows_keys_compactly_and_selects_all(
    server: ServerProcess, client: Client, tabs: Tabs
) -> None:
    """At most 125 pixels a key, 80 if there is nothing to say of it; the table of settings fits, too."""
    fill(client, 12)
    page = tabs.live(server, "/keys", **PHONE)
    heights = page.locator(".key-row").evaluate_all(
        "rows => rows.map(each => [each.dataset.state, each.getBoundingClientRect().height])"
    )
    assert all(height <= 125 for _, height in heights), heights
    assert min(height for state, height in heights if state == "available") <= 80
    page.get_by_label("Select all rows shown").check()
    assert page.locator("#bulk-count").inner_text() == "12"
    page.goto("/system")
    widths = page.locator(".settings tbody td:last-child").evaluate_all(
        "cells => cells.map(each => each.getBoundingClientRect()).map(({ left, right }) => [left, right])"
    )
    assert all(left >= 0 and right <= 390 for left, right in widths)


@pytest.mark.once
def test_targets_are_large_enough_for_a_finger(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """44 pixels, wherever something can be pressed."""
    fill(client, 12)
    page = tabs.live(server, **PHONE)
    for screen in ("/", "/keys", "/keys?tab=blocked", "/events", "/pools", "/calls"):
        page.goto(screen)
        assert page.evaluate(SMALL) == [], screen
    page.goto("/keys")
    page.locator(".key-link").first.tap()
    page.wait_for_selector("#panel[open] .key-panel")
    assert page.evaluate(SMALL) == []
