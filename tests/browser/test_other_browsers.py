"""The dashboard in Firefox and in WebKit: that what it is made of works there as it does in Chromium."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ADMIN_TOKEN, Client, ServerProcess
from valkeys import give_back, hold_ports

from browser.conftest import missing
from browser.other_browsers import Browser, Firefox, Tab, WebKit
from browser.test_screens import SCREENS, fill

pytestmark = pytest.mark.thorough

TEXTS = (
    "body",
    ".top h1",
    "#pill",
    ".side nav a",
    ".key-link",
    ".key-row .state",
    ".toolbar [data-generate]",
)
ORDER = "selector => [...document.querySelectorAll(selector)].map(row => row.dataset.id).join()"
DRAWN = """selector => {
    const { width, height } = document.querySelector(selector).getBBox();
    return [width, height];
}"""
SIDES = """selector => {
    const dialog = document.querySelector(selector);
    const { left, right } = dialog.getBoundingClientRect();
    const wrong = left < 0 || right > document.documentElement.clientWidth || dialog.scrollWidth > dialog.clientWidth;
    return wrong ? [left, right, document.documentElement.clientWidth, dialog.scrollWidth, dialog.clientWidth] : [];
}"""
CONTRASTS = """selectors => {
    const brush = new OffscreenCanvas(1, 1).getContext('2d');
    const paint = colour => {
        brush.fillStyle = colour;
        brush.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...brush.getImageData(0, 0, 1, 1).data].map(each => each / 255).map(
            each => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    return selectors.map(selector => {
        const layers = [];
        for (let each = document.querySelector(selector); each; each = each.parentElement) layers.unshift(each);
        let [ground, text] = [0, 0];
        for (const each of layers) ground = paint(getComputedStyle(each).backgroundColor);
        text = paint(getComputedStyle(layers.at(-1)).color);
        return (Math.max(ground, text) + 0.05) / (Math.min(ground, text) + 0.05);
    });
}"""


@pytest.fixture(scope="module", params=[Firefox, WebKit], ids=lambda kind: kind.name)
def other(request: pytest.FixtureRequest) -> Iterator[Browser]:
    """One of the browsers, for the tests of this module."""
    if lacking := request.param.lacking():
        missing(lacking)
    browser = request.param()
    yield browser
    browser.close()


class Allowed(list[str]):
    """Parts of messages that a console may show in this test."""


@pytest.fixture
def allowed() -> Allowed:
    """What the test expects in the console."""
    return Allowed()


@pytest.fixture
def tab(other: Browser, allowed: Allowed) -> Iterator[Tab]:
    """A new tab; its console must have nothing that the test doesn't expect."""
    tab = other.tab()
    yield tab
    if not other.running:  # it gave no answer and was killed: the test has failed
        return
    said = [text for text in tab.errors() if not any(part in text for part in allowed)]
    tab.close()
    assert said == [], f"the console of a page: {said}"


def live(tab: Tab, server: ServerProcess, path: str = "/") -> None:
    """Go to a page, and wait until it is connected."""
    tab.open(f"http://{server.host}{path}")
    tab.see("#pill[data-state=live]")


def figure(tab: Tab, tile: str, wanted: str) -> None:
    """Wait until a tile of the overview shows this."""
    tab.wait(
        "(tile, wanted) => document.querySelector(`#tile-${tile} .figure`)?.textContent === wanted",
        tile,
        wanted,
    )


def row(key: dict[str, Any]) -> str:
    """The selector of a row of the table."""
    return f".key-row[data-id='{key['id']}']"


def address(tab: Tab, end: str) -> None:
    """Wait until the page's address ends so."""
    tab.wait("end => location.href.endsWith(end)", end)


def test_sign_in_and_out(tokened: ServerProcess, tab: Tab, allowed: Allowed) -> None:
    """With the token of an admin; a wrong one gets a message."""
    allowed.append("401")
    tab.open(f"http://{tokened.host}/keys")
    tab.write("input[name=token]", "wrong-token-000000\n")
    tab.see("#wrong")
    tab.write("input[name=token]", ADMIN_TOKEN)
    tab.click("button", "Sign in")
    tab.see("#pill[data-state=live]")
    address(tab, "/keys")
    tab.see(".who .role", "admin")
    tab.click("button", "Sign out")
    tab.see("input[name=token]")


def test_the_overview_is_live(server: ServerProcess, client: Client, tab: Tab) -> None:
    """Tiles, events and charts follow the pool without a reload."""
    client.make_many(3)
    live(tab, server)
    figure(tab, "available", "3")
    drawn = "() => [...document.querySelectorAll('.plot path')].map(each => each.getAttribute('d') ?? '').join('|')"
    before = tab.evaluate(drawn)
    client.make_many(40)
    client.acquire()
    figure(tab, "available", "42")
    figure(tab, "blocked", "1")
    tab.see("#latest .event[data-kind=acquired]")
    tab.wait(f"before => ({drawn})() !== before", before)
    for chart in ("#chart-composition", "#chart-rates"):
        size = tab.evaluate(DRAWN, f"{chart} .plot svg")
        assert min(size) > 50, f"{chart} is drawn {size} large"
    tab.point("#chart-composition .plot")
    tab.see("#chart-composition .when")


def test_every_page_fits_and_has_no_error(server: ServerProcess, client: Client, tab: Tab) -> None:
    """On a phone and on a wide screen, full of keys; some of their text is long."""
    lease = fill(client)
    screens = (*SCREENS, f"/keys/{lease['id']}")
    for width, screen in itertools.product((390, 1440), screens):
        tab.resize(width, 800)
        tab.open(f"http://{server.host}{screen}")
        tab.see("#pill[data-state=live]")
        assert tab.evaluate("() => innerWidth") == width
        wide = tab.evaluate("() => document.documentElement.scrollWidth")
        assert wide <= width, f"{screen} is {wide} wide on a screen of {width}"


def test_dialogs_fit_a_phone(server: ServerProcess, client: Client, tab: Tab) -> None:
    """Nothing of them is cut off at a side, nor scrolls there, also where scrollbars take room."""
    lease = fill(client)
    tab.resize(390, 800)
    live(tab, server, f"/keys#key-{lease['id']}")
    tab.see("#panel .key-panel[data-state=blocked]")
    assert tab.evaluate(SIDES, "#panel") == []

    def expect_fit(button: str, dialog: str) -> None:
        tab.click(button)
        tab.see(dialog)
        assert tab.evaluate(SIDES, dialog) == []
        tab.press("Escape")
        tab.miss(dialog)

    expect_fit("#panel [data-act=unblock]", "#confirm")
    expect_fit("#panel [data-act=quarantine]", "#quarantine")
    tab.press("Escape")
    tab.miss("#panel")
    expect_fit(".toolbar [data-generate]", "#generate")
    expect_fit(".toolbar [data-import]", "#import")


def test_generate_unblock_and_delete(server: ServerProcess, client: Client, tab: Tab) -> None:
    """By the buttons of the page and its dialogs; Escape and Cancel leave them without doing anything."""
    live(tab, server, "/keys")
    tab.click(".toolbar [data-generate]")
    tab.see("#generate[open]")
    tab.press("Escape")
    tab.miss("#generate")
    tab.click(".toolbar [data-generate]")
    tab.click("#generate [name=count]")
    tab.press("a", control=True)
    tab.press(*"4\n")
    tab.see(".toast", "4 keys generated.")
    assert client.stats()["total"] == 4
    lease = client.acquire(owner="worker-7")
    tab.see(f"{row(lease)}[data-state=blocked]")
    tab.click(f"{row(lease)} [data-act=unblock]")
    tab.see("#confirm[open]", "worker-7")
    tab.click("#confirm-go")
    tab.see(".toast", f"Key {lease['id']} is available.")
    assert client.row(lease["key"])["state"] == "available"
    tab.click(f"{row(lease)} [data-act=delete]")
    tab.click("#confirm [command=close]")
    tab.miss("#confirm")
    assert client.stats()["total"] == 4
    tab.click(f"{row(lease)} [data-act=delete]")
    tab.click("#confirm-go", "Delete")
    tab.see(".toast", f"Key {lease['id']} was deleted.")
    assert client.stats()["total"] == 3
    tab.point_away()
    tab.miss(row(lease))


def test_delete_several(server: ServerProcess, client: Client, tab: Tab) -> None:
    """Two are selected, one by the keyboard; their number has to be typed."""
    made = client.make_many(3)
    live(tab, server, "/keys")
    tab.click(f"{row(made[0])} .picked")
    tab.evaluate("selector => document.querySelector(selector).focus()", f"{row(made[1])} .picked")
    tab.press(" ")
    tab.see("#bulk-count", "2")
    tab.click("[data-bulk=delete]")
    tab.see("#confirm", "Delete 2 keys?")
    assert tab.evaluate("() => document.getElementById('confirm-go').disabled")
    tab.write("#confirm-typed input", "delete 2")
    tab.click("#confirm-go:enabled")
    tab.see(".toast", "2 deleted.")
    assert client.stats()["total"] == 1
    tab.miss("#bulk")


def test_reveal_a_key(server: ServerProcess, client: Client, tab: Tab) -> None:
    """In its drawer, and copied from there; it is gone when the drawer is."""
    key = client.make()
    live(tab, server, f"/keys#key-{key['id']}")
    tab.click("#panel [data-reveal]")
    tab.see("#panel .secret", key["key"])
    tab.click("#panel [data-copy-secret]")
    tab.see("#panel .toast", "Copied: the key")
    tab.press("Escape")
    tab.miss("#panel")
    assert key["key"] not in tab.evaluate("() => document.documentElement.outerHTML")


def test_the_keyboard(server: ServerProcess, client: Client, tab: Tab) -> None:
    """A question mark lists the shortcuts, Escape leaves the list, and a slash goes to the search."""
    client.make()
    live(tab, server, "/keys")
    tab.press("?")
    tab.see("#help[open]")
    tab.press("Escape")
    tab.miss("#help")
    tab.press("/")
    tab.wait("() => document.activeElement.id === 'search'")


def test_the_drawer_of_a_key(server: ServerProcess, client: Client, tab: Tab) -> None:
    """It is in the address; Back closes it, a reload keeps it, and Escape and a click beside it close it."""
    key = client.make()
    live(tab, server, "/keys")
    drawn = "#panel[open] .key-panel[data-state=available]"
    tab.click(f"{row(key)} .key-link")
    tab.see(drawn)
    address(tab, f"/keys#key-{key['id']}")
    tab.back()
    tab.miss("#panel")
    address(tab, "/keys")
    tab.click(f"{row(key)} .key-link")
    tab.see(drawn)
    tab.reload()
    tab.see(drawn)
    client.acquire(owner="worker-7")
    tab.see("#panel", "worker-7")
    tab.press("Escape")
    tab.miss("#panel")
    address(tab, "/keys")
    tab.click(f"{row(key)} .key-link")
    tab.see("#panel[open] .key-panel[data-state=blocked]")
    tab.point_away()
    tab.click("#panel [data-close]")
    tab.miss("#panel")
    address(tab, "/keys")


def test_a_page_that_one_comes_back_to_is_live(server: ServerProcess, client: Client, tab: Tab) -> None:
    """The browser may have kept it as it was, scripts and all."""
    live(tab, server)
    tab.click(".side nav a", "System")
    address(tab, "/system")
    tab.see("#pill[data-state=live]")
    client.make_many(2)
    tab.back()
    figure(tab, "available", "2")
    client.make_many(3)
    figure(tab, "available", "5")
    tab.see("#pill[data-state=live]")


def test_themes(server: ServerProcess, client: Client, tab: Tab) -> None:
    """Chosen by the keyboard, remembered, different from each other, and readable."""
    client.make_many(3)
    client.acquire()
    live(tab, server, "/keys")
    grounds: dict[str, Any] = {}
    for theme, key in (("dark", "d"), ("light", "l")):
        tab.evaluate("() => document.getElementById('theme').focus()")
        tab.press(key)
        tab.wait("theme => document.documentElement.dataset.theme === theme", theme)
        tab.reload()
        tab.see("#pill[data-state=live]")
        contrasts = tab.evaluate(CONTRASTS, TEXTS)
        assert min(contrasts) >= 4.5, f"{theme}: {dict(zip(TEXTS, contrasts, strict=True))}"
        grounds[theme] = tab.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert grounds["dark"] != grounds["light"]


def test_search_by_a_whole_key(server: ServerProcess, client: Client, tab: Tab) -> None:
    """It opens the key's page, and the key is in no address."""
    key = client.make_many(5)[2]
    live(tab, server, "/keys")
    tab.write("#search", f"{key['key']}\n")
    address(tab, f"/keys/{key['id']}")
    tab.see(".key-page .key-panel[data-state=available]")


def test_import_what_was_pasted(importing_server: ServerProcess, tab: Tab) -> None:
    """By way of the clipboard."""
    client = importing_server.client()
    live(tab, importing_server, "/keys")
    tab.click("[data-import]")
    tab.write("#import textarea", "sk-live-0123456789abcdef\nsk-live-fedcba9876543210\n")
    tab.press("a", "x", control=True)
    tab.wait("() => document.querySelector('#import textarea').value === ''")
    tab.press("v", control=True)
    tab.wait("() => document.querySelector('#import textarea').value.includes('fedcba')")
    if tab.evaluate("() => document.querySelector('#import [name=expire]') !== null"):
        tab.click("#import [name=expire]")
    tab.click("#import-go")
    tab.see("#import-summary", "2 created")
    tab.click("#import-cancel", "Close")
    tab.miss("#import")
    assert client.stats()["total"] == 2


def test_rows_hold_still(server: ServerProcess, client: Client, tab: Tab) -> None:
    """While the mouse is over them; afterwards they are brought up to date."""
    client.make_many(8)
    live(tab, server)
    events = "#latest .event"
    tab.see(events)
    tab.point(f"{events}:nth-child(3) time")
    tab.see("#held")
    before = tab.evaluate(ORDER, events)
    client.make_many(4)
    figure(tab, "available", "12")
    assert tab.evaluate(ORDER, events) == before
    tab.point_away()
    tab.miss("#held")
    tab.wait(f"(selector, before) => ({ORDER})(selector) !== before", events, before)


def test_copy_a_line(server: ServerProcess, tab: Tab) -> None:
    """To the clipboard, from a page that is not served by TLS."""
    live(tab, server, "/calls")
    tab.click("[aria-label='Copy: acquire']")
    tab.see(".toast", "Copied: acquire")


def test_the_server_is_gone_and_comes_back(tmp_path: Path, tab: Tab, allowed: Allowed) -> None:
    """The page says so, keeps what it shows, and reconnects by itself."""
    allowed.extend(("WebSocket", "establish a connection", "503"))
    [port] = hold_ports(1)
    flags = ["--data=:memory:", f"--port={port}"]
    first = ServerProcess(flags, cwd=tmp_path)
    try:
        first.client().make_many(7)
        live(tab, first)
        figure(tab, "available", "7")
        first.signal(signal.SIGKILL)
        first.wait()
        tab.see("#banner", "The server can't be reached")
        figure(tab, "available", "7")
        with ServerProcess(flags, cwd=tmp_path):
            tab.see("#pill[data-state=live]")
            figure(tab, "available", "0")
            tab.miss("#banner")
    finally:
        first.close()
        give_back(port)
