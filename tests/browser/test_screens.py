"""Each screen, in both themes, on a phone, and without scripts."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from conftest import Start
from support import Client, ServerProcess, eventually

from browser.conftest import Tabs, figure, quarantine, report, row, rows

pytestmark = pytest.mark.thorough

SCREENS = (
    "/", "/keys", "/keys?tab=blocked", "/keys?tab=cooling", "/keys?tab=quarantined", "/events", "/pools", "/system",
    "/calls", "/owners", "/waiters", "/tokens",
)  # fmt: skip
LONG = "429 from an-api-with-a-long-name.example.com: the daily quota of account 4711 is used up"


def fill(client: Client, keys: int = 120) -> dict[str, Any]:
    """Fill the pool for the screens, with keys in all states; returns the lease of one key."""
    client.make_many(keys)
    report(client, "rate_limited", retry_after=90, reason=LONG)
    report(client, "rate_limited", retry_after=500_000)
    report(client, "invalid", reason=LONG)
    report(client, "error", reason="502")
    client.batch(op="acquire", count=keys // 4, owner="worker-7")
    return client.acquire(owner="crawler-eu-3-with-a-very-long-name-that-must-not-break-the-page")


def axe(page: Any, theme: str = "light") -> list[str]:
    """What axe finds against WCAG 2.2 AA, a line each; in the dark theme, whose pages are the same, by colours only."""
    from axe_playwright_python.sync_playwright import Axe

    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    only = (
        {"type": "tag", "values": tags}
        if theme == "light"
        else {"type": "rule", "values": ["color-contrast", "link-in-text-block"]}
    )
    found = Axe().run(page, options={"runOnly": only, "resultTypes": ["violations"]}).response
    return [
        f"{violation['id']}: {node['target']} {node['failureSummary']}"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]


THEMES = pytest.mark.parametrize("theme", ["light", pytest.param("dark", marks=pytest.mark.thorough)])


@pytest.mark.once
@pytest.mark.thorough
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_screen_is_accessible(server: ServerProcess, client: Client, tabs: Tabs, theme: str) -> None:
    """axe finds nothing."""
    lease = fill(client, 12)
    tabs.allow("404")
    page = tabs.live(server, color_scheme=theme, reduced_motion="reduce")
    for screen in (*SCREENS, f"/keys/{lease['id']}", "/nothing", "/logout"):
        page.goto(screen)
        page.wait_for_timeout(150)
        assert axe(page, theme) == [], screen


@pytest.mark.once
@THEMES
def test_the_panel_and_the_dialogs_are_accessible(
    server: ServerProcess, client: Client, tabs: Tabs, theme: str
) -> None:
    """Over the overview and a list."""
    fill(client, 12)
    page = tabs.live(server, color_scheme=theme, reduced_motion="reduce")
    assert axe(page, theme) == []
    page.goto("/keys")
    page.get_by_label("Select all rows shown").click()
    page.locator("[data-bulk=quarantine]").click()
    page.wait_for_selector("#quarantine[open]")
    assert axe(page, theme) == []
    page.get_by_label("Now: end the lease at once").check()
    page.get_by_role("button", name="Quarantine", exact=True).click()
    page.get_by_text("12 quarantined.").wait_for()
    page.goto("/")
    page.locator(".tile.warn").first.wait_for()
    assert axe(page, theme) == []
    client.batch(op="restore", keys=[f"id:{each['id']}" for each in rows(client)])
    client.acquire()
    page.goto("/keys?tab=blocked")
    page.locator(".key-link").first.click()
    page.wait_for_selector("#panel[open] .key-panel")
    assert axe(page, theme) == []
    page.keyboard.press("Escape")
    page.get_by_label("Select all rows shown").click()
    page.locator("[data-bulk=delete]").click()
    assert axe(page, theme) == []
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    page.wait_for_selector("#help[open]")
    assert axe(page, theme) == []


@THEMES
def test_the_sign_in_is_accessible(tokened: ServerProcess, tabs: Tabs, theme: str) -> None:
    """With the error that a wrong token gets, too."""
    tabs.allow("401")
    page = tabs.open(tokened, "/login", color_scheme=theme)
    assert axe(page, theme) == []
    page.get_by_label("Token").fill("not-a-token-at-all")
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_selector("#wrong")
    assert axe(page, theme) == []


@pytest.mark.once
@pytest.mark.parametrize("width", [320, pytest.param(770, marks=pytest.mark.thorough)])
def test_a_phone_scrolls_one_way_only(server: ServerProcess, client: Client, tabs: Tabs, width: int) -> None:
    """The same for a small tablet, empty or full; controls are large enough."""
    tabs.allow("404")
    phone = width < 700
    page = tabs.live(server, viewport={"width": width, "height": 700}, has_touch=phone, is_mobile=phone)
    lease: dict[str, Any] = {}
    for filled in (False, True):
        if filled:
            lease = fill(client)
        for screen in (*SCREENS, f"/keys/{lease.get('id', 1)}"):
            page.goto(screen)
            page.wait_for_timeout(100)
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, f"{screen} is {wide} wide"
    page.goto("/keys")
    page.locator(".key-link").first.click()
    page.wait_for_selector("#panel[open] .key-panel")
    panel = page.locator("#panel")
    assert panel.evaluate("element => element.scrollWidth <= element.clientWidth")
    box = page.locator(".key-panel [data-act=delete]").bounding_box()
    assert box["width"] >= 24
    assert box["height"] >= 24


@pytest.mark.parametrize("width", [770, 1000, 1280, 1440])
def test_no_column_of_a_table_is_cut_off(
    server: ServerProcess, client: Client, tabs: Tabs, width: int
) -> None:
    """However long owners and reasons are."""
    fill(client)
    page = tabs.live(server, viewport={"width": width, "height": 700})
    for screen in ("/keys", "/keys?tab=blocked", "/keys?tab=cooling", "/keys?tab=quarantined"):
        page.goto(screen)
        page.locator(".key-row").first.wait_for()
        edges = page.evaluate(
            "['#keys', '#keys table'].map(each => document.querySelector(each).getBoundingClientRect().right)"
        )
        assert edges[1] <= edges[0], f"{screen}: the table ends at {edges[1]}, its card at {edges[0]}"


def test_everything_can_be_read_without_scripts(lend: Start, tabs: Tabs) -> None:
    """Numbers, rows, pages, one key; nothing is offered that would need a script."""
    server = lend("--block-seconds=3600")
    lease = fill(server.client())
    page = tabs.open(server, script=False)
    assert page.locator("#tile-blocked .figure").inner_text() == "31"
    assert page.locator("noscript .banner").is_visible()
    assert not page.get_by_role("button", name=re.compile("Generate")).first.is_visible()
    page.get_by_role("link", name="Keys", exact=True).click()
    page.wait_for_url("**/keys")
    assert page.locator(".key-row").count() == 50
    assert not page.locator("[data-act]").first.is_visible()
    page.get_by_role("link", name="Next page").click()
    page.wait_for_url("**/keys?*after=*")
    assert page.locator(".key-row").count() == 50
    page.goto("/keys?tab=blocked")
    assert page.locator(".key-row").count() == 31
    page.goto(f"/keys/{lease['id']}")
    assert page.get_by_text("crawler-eu-3-with").first.is_visible()
    page.goto("/events")
    assert page.locator(".event").count() > 50


def test_the_overview_is_live(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """Tiles, events, what is released next, and the charts follow what others do."""
    page = tabs.live(server)
    figure(page, "available", "0")
    client.make_many(30)
    figure(page, "available", "30")
    lease = client.acquire(owner="worker-7")
    figure(page, "blocked", "1")
    page.wait_for_selector(f"[data-order=release] li[data-id='{lease['id']}']")
    assert "worker-7" in page.locator("[data-order=release] li").first.inner_text()
    page.wait_for_selector("#latest .event[data-kind=acquired]")
    limited = report(client, "rate_limited", retry_after=90)
    figure(page, "cooling", "1")
    page.wait_for_selector(f"[data-order=ready] li[data-id='{limited}']")
    assert "rate limited, 1 failure" in page.locator("[data-order=ready] li").first.inner_text()
    assert "by worker-7" in page.locator("#latest .event[data-kind=cooled]").inner_text()
    page.wait_for_function(
        "() => document.querySelector('#chart-composition [data-value=cooling]').textContent === '1'"
    )
    client.batch(op="acquire", count=100)
    client.post("/api/v1/keys/acquire").expect_problem(404, "no-key-available")
    refused = client.stats()["refused"]  # of other tests, too, on the same server
    figure(page, "refused", f"{refused:,}")
    page.wait_for_function(
        "() => document.querySelector('#chart-rates path[data-tone=acquired]').getAttribute('d').length > 20"
    )
    figure(page, "expiring", "0")


def test_twenty_four_hours_instead(server: ServerProcess, tabs: Tabs) -> None:
    """The switch redraws both charts; pointing at one shows the numbers of that moment."""
    page = tabs.live(server)
    page.get_by_text("24 h", exact=True).click()
    assert page.locator("#chart-rates .times").inner_text().startswith("24 h ago")
    page.locator("#chart-composition .plot").hover()
    assert page.locator("#chart-composition .when").is_visible()
    page.locator("#chart-rates .plot").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#chart-rates .when").is_visible()


def test_countdowns_run_on_server_time(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """They count down correctly even if the browser's clock is wrong."""
    page = tabs.open(server, "about:blank")
    page.clock.set_system_time("2031-05-05T05:05:05Z")
    began = time.monotonic()
    client.make()
    client.acquire()
    acquired = time.monotonic()

    def shown(kind: str, whole: float) -> str:
        """A countdown, if it is that of so many seconds; it may be shown a second late or rounded."""
        before = time.monotonic()
        text: str = page.locator(f".key-row [data-kind={kind}] .time").inner_text()
        minutes, _, seconds = text.partition(":")
        left = int(minutes) * 60 + int(seconds)
        assert whole - (time.monotonic() - began) - 1.5 <= left <= whole - (before - acquired) + 2, text
        return text

    page.goto("/keys?tab=blocked")
    first = shown("release", 60)
    page.wait_for_function(
        "first => document.querySelector('.key-row [data-kind=release] .time').textContent < first", arg=first
    )
    shown("release", 60)
    shown("expires", 300)


def test_a_cooling_key_counts_down_until_it_is_available(
    server: ServerProcess, client: Client, tabs: Tabs
) -> None:
    """In the list and in its panel, which say why it cools; the row follows by itself when the cooldown is over."""
    client.make_many(2)
    page = tabs.live(server, "/keys")  # before the key cools, as a busy machine may take seconds for that
    key_id = report(client, "rate_limited", retry_after=8, reason="429 from example.com")
    cooling = row(page, key_id)
    countdown = cooling.locator("[data-kind=ready] .time")
    eventually(lambda: re.fullmatch(r"0:0[1-8]", countdown.inner_text()), "its row counts down")
    assert "rate limited, 1 failure" in cooling.inner_text()
    cooling.locator(".key-link").click()
    panel = page.locator("#panel[open] .key-panel")
    panel.locator("[data-kind=ready]").wait_for()
    for text in ("Available in", "rate limited", "429 from example.com"):
        assert text in panel.inner_text()
    panel.locator(".state[data-state=available]").wait_for()
    page.keyboard.press("Escape")
    cooling.locator(".state[data-state=available]").wait_for()
    assert not cooling.locator(".countdown").first.is_visible()


def test_a_row_follows_its_key_through_all_states(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """Each state by its name, with the countdown that goes with it."""
    client.make()
    page = tabs.live(server, "/keys")
    shown = row(page, rows(client)[0]["id"])
    due = shown.locator(".due .countdown")
    lease = client.acquire(owner="worker-7")
    shown.locator(".state", has_text="blocked").wait_for()
    assert due.get_attribute("data-kind") == "release"
    body = {"lease": lease["lease"], "outcome": "rate_limited", "retry_after": 538}
    client.post(f"/api/v1/keys/{lease['key']}/unblock", json=body).expect(200)
    shown.locator(".state", has_text="cooling").wait_for()
    page.wait_for_function("() => /^8:\\d\\d$/.test(document.querySelector('.due .time').textContent)")
    assert due.get_attribute("data-kind") == "ready"
    assert "worker-7" not in shown.inner_text()
    quarantine(client, lease["id"], reason="leaked")
    shown.locator(".state", has_text="quarantined").wait_for()
    shown.get_by_text("leaked").wait_for()
    assert not due.is_visible()
    client.post(f"/api/v1/keys/id:{lease['id']}/restore").expect(200)
    shown.locator(".state", has_text="available").wait_for()
    shown.get_by_text("leaked").wait_for(state="detached")


def test_the_theme_is_remembered(server: ServerProcess, tabs: Tabs) -> None:
    """System, light and dark; and it is there at the next visit before any script runs."""
    page = tabs.live(server, color_scheme="light")

    def background() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light = background()
    page.get_by_label("Theme").select_option("dark")
    assert background() != light
    page.reload()
    assert page.locator("html").get_attribute("data-theme") == "dark"
    page.get_by_label("Theme").select_option("")
    assert background() == light


def test_no_key_stands_in_a_page_a_title_or_an_address(
    server: ServerProcess, client: Client, tabs: Tabs
) -> None:
    """Hints only, in what the server sends and in what the scripts make of it."""
    keys = client.make_many(20)
    page = tabs.live(server)
    for screen in ("/", "/keys", "/events", f"/keys/{keys[0]['id']}"):
        page.goto(screen)
        page.wait_for_timeout(400)
        shown = page.content() + page.title() + page.url
        assert not any(key["key"] in shown for key in keys)


def test_system_and_calls(server: ServerProcess, tabs: Tabs) -> None:
    """Settings with their origins, live figures, and lines that can be copied."""
    page = tabs.live(server, "/system")
    page.wait_for_function("() => document.getElementById('viewers').textContent === '1'")
    assert page.get_by_role("row", name=re.compile("--port")).get_by_text("flag").is_visible()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto("/calls")
    page.get_by_role("button", name="Copy: acquire").click()
    page.get_by_text("Copied: acquire").wait_for()
    assert "/api/v1/keys/acquire" in page.evaluate("navigator.clipboard.readText()")
