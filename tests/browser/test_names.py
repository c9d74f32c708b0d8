"""What a screen reader is given: the names of rows, buttons, dialogs and values."""

from __future__ import annotations

import re

import pytest
from support import Client, ServerProcess, eventually

from browser.conftest import Tabs, row

pytestmark = pytest.mark.thorough


@pytest.mark.once
def test_rows_buttons_and_dialogs_name_their_key(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """In rows of the server's markup and in rows that came later."""
    first = client.make()
    page = tabs.live(server, "/keys")
    second = client.make()
    row(page, second["id"]).wait_for()
    for key in (first, second):
        mine = row(page, key["id"])
        mine.get_by_role("rowheader", name=re.compile(rf"^{key['id']}\b")).wait_for()
        for name in ("Quarantine key {}…", "Keep alive key {}", "Delete key {}…"):
            mine.get_by_role("button", name=name.format(key["id"]), exact=True).wait_for()
    row(page, first["id"]).locator(".key-link").click()
    page.get_by_role("dialog", name=re.compile(rf"^Key {first['id']}\b")).wait_for()


@pytest.mark.once
def test_arrow_keys_on_a_chart_are_announced(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """As the value of a slider: the moment and the numbers."""
    client.make_many(3)
    page = tabs.live(server)
    page.wait_for_function(
        "() => document.querySelector('#chart-composition [data-value=available]').textContent === '3'"
    )
    chart = page.get_by_role("slider", name=re.compile("Keys by state"))
    chart.focus()

    def says_three() -> object:
        page.wait_for_timeout(50)
        page.keyboard.press("ArrowRight")
        said = chart.get_attribute("aria-valuetext") or ""
        return re.search(r"\d:\d\d.*: available 3, blocked 0", said)

    # The latest point may be of a second that ended before the last key was made.
    eventually(says_three, "the latest point is announced with its numbers")
    page.keyboard.press("ArrowLeft")
    assert chart.get_attribute("aria-valuenow") == "-1"
