"""What the overview answers: is anything wrong, what happened lately, and what the charts show."""

from __future__ import annotations

import re
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import Start
from support import API, Client, ServerProcess, eventually
from valkeys import give_back, hold_ports

from browser.conftest import Page, Tabs, figure, state

pytestmark = pytest.mark.once
OPENAI = f"{API}/pools/openai"


def about_to_expire(client: Client, count: int) -> None:
    """Make a pool all of whose keys expire within a minute, although new ones live for five."""
    client.put(OPENAI, json={"keepalive_seconds": 50})
    client.post(f"{OPENAI}/batch", json={"op": "generate", "count": count}).expect(201)
    client.patch(OPENAI, json={"keepalive_seconds": 300}).expect(200)


def keep_alive(client: Client) -> None:
    """A keepalive for each key of that pool."""
    keys = [f"id:{row['id']}" for row in client.get(f"{OPENAI}/keys").json["keys"]]
    client.post(f"{OPENAI}/batch", json={"op": "keepalive", "keys": keys}).expect(200)


def all_is_well(page: Page) -> None:
    """Wait until there is no verdict, but for those on the machine that the test runs on."""
    page.wait_for_selector('.verdict:not([data-code="stalls"], [data-code="slow-disk"])', state="detached")
    page.locator("#exhausted").wait_for(state="hidden")


def icon(page: Page) -> str:
    """The name of the tab's icon."""
    return str(page.locator('link[rel="icon"]').get_attribute("href")).rpartition("/")[2]


@pytest.mark.thorough
def test_a_mass_expiry_is_announced_with_cause_and_remedy(
    server: ServerProcess, client: Client, tabs: Tabs
) -> None:
    """In a verdict, by the tile, in the title and by the icon; it leads to the keys, and is over when they are kept."""
    about_to_expire(client, 10)
    page = tabs.live(server, "/pools/openai")
    verdict = page.locator('.verdict[data-code="expiring"]')
    verdict.get_by_text("10 of 10 keys expire within 60 s").wait_for()
    assert "each keepalive saves its key" in verdict.inner_text()
    page.locator("#tile-expiring.warn").wait_for()
    page.wait_for_function("() => document.title === '(!) keys expiring · Overview · openai · keypool'")
    assert icon(page) == "icon-alarm.svg"
    verdict.get_by_role("link", name="See which keys expire first").click()
    page.wait_for_url("**/pools/openai/keys?tab=expiring")
    assert page.title().startswith("(!) keys expiring · Keys")
    page.go_back()
    verdict.wait_for()
    keep_alive(client)
    all_is_well(page)
    assert page.locator(".tile.warn").count() == 0
    page.wait_for_function("() => document.title === 'Overview · openai · keypool'")
    assert icon(page) == "icon.svg"


def test_an_emptied_pool_says_why_it_is_empty(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """Its keys expired: how many, when, and whom to ask."""
    client.put(OPENAI, json={"keepalive_seconds": 1.5})
    page = tabs.live(server, "/pools/openai")
    client.post(f"{OPENAI}/batch", json={"op": "generate", "count": 20}).expect(201)
    page.locator('.verdict[data-code="expired"]').get_by_text("20 expired in the last 5 min").wait_for()
    card = page.locator("#empty")
    assert "20 of its keys expired because no keepalive came in time" in card.inner_text()
    figure(page, "expired", "20")
    page.locator("#tile-expired.warn").wait_for()
    card.get_by_role("link", name="see when").click()
    page.wait_for_url("**/pools/openai/events?kind=expired")
    crowds = page.locator('#stream [data-f="crowd"]').all_inner_texts()
    assert sum(int(crowd.removeprefix("\u00d7") or 1) for crowd in crowds) == 20


@pytest.mark.thorough
def test_the_tabs_title_says_that_no_key_is_free(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """On every page, and no longer when one is."""
    client.make()
    page = tabs.live(server, "/keys")
    assert page.title() == "Keys · keypool"
    lease = client.acquire()
    page.wait_for_function("() => document.title === '(!) 0 free · Keys · keypool'")
    page.goto("/")
    assert "generate more keys, let callers wait" in page.locator("#exhausted").inner_text()
    assert page.locator("#tile-available.warn").is_visible()
    assert page.title() == "(!) 0 free · Overview · keypool"
    client.post(f"{API}/keys/{lease['key']}/unblock").expect(200)
    all_is_well(page)
    page.wait_for_function("() => document.title === 'Overview · keypool'")
    page.locator("#tile-available:not(.warn)").wait_for()


@pytest.mark.thorough
def test_an_empty_pool_doesnt_contradict_itself(server: ServerProcess, tabs: Tabs) -> None:
    """Nobody is promised a key beside "every acquire gets 404", on any list."""
    page = tabs.live(server)
    assert "Every acquire gets 404" in page.locator("#empty").inner_text()
    for screen in ("/", "/keys", "/keys?tab=blocked", "/keys?tab=available"):
        page.goto(screen)
        page.get_by_role("heading", name="The pool is empty").wait_for()
        assert "at once" not in page.locator("main").inner_text()


@pytest.mark.thorough
def test_tiles_lead_to_what_they_count(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """A click anywhere on one, also on its number."""
    client.make_many(3)
    client.acquire()
    page = tabs.live(server)
    box = page.locator("#tile-blocked .figure").bounding_box()
    page.mouse.click(box["x"] + 5, box["y"] + 5)
    page.wait_for_url("**/keys?tab=blocked")
    assert page.locator(".key-row").count() == 1
    page.goto("/")
    assert page.locator(".tile").count() == page.locator(".tile dt a").count()
    for path in {each.get_attribute("href") for each in page.locator(".tile dt a").all()}:
        assert page.request.get(path).status == 200, path


def test_what_happened_lately(short_server: ServerProcess, tabs: Tabs) -> None:
    """Releases by deadline, expired keys, and how long calls took and acquires waited, there and on System."""
    client = short_server.client()
    before = client.stats()
    page = tabs.live(short_server)
    client.make()
    client.acquire()
    client.post(f"{API}/keys/acquire", json={"wait": 5}).expect(200)
    for name in ("released", "expired"):
        eventually(lambda: client.stats()[name] > before[name], f"a key was {name}")  # noqa: B023 - called at once
        page.wait_for_function(
            "name => document.querySelector(`#tile-${name} .figure`).textContent !== '0'", arg=name
        )
    for name in ("calls", "waits"):
        page.wait_for_function(
            "name => /^[0-9.]+ m?s$/.test(document.querySelector(`#tile-${name} .figure`).textContent)",
            arg=name,
        )
        assert re.search(r"; p99 [\d.]+ m?s", page.locator(f"#tile-{name} .note").inner_text())
    page.goto("/system")
    assert re.search(r"Calls.*\d m?s\s+[\d.]+ m?s", page.locator("tr[data-latency=calls]").inner_text())


# -------------------------------------------------------------------------------------------------- charts


@pytest.mark.thorough
def test_the_legend_shows_the_numbers_of_now(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """Those of the tiles, at every moment."""
    client.make_many(10)
    page = tabs.live(server)
    page.wait_for_function("() => document.querySelector('#chart-composition path.area').getAttribute('d')")
    client.make_many(20)
    shown = page.wait_for_function(
        """() => document.querySelector('#tile-available .figure').textContent === '30'
            && document.querySelector('#chart-composition [data-value=available]').textContent"""
    )
    assert shown.json_value() == "30"


@pytest.mark.thorough
@pytest.mark.parametrize("width", [390, 1440])
def test_times_stand_under_their_grid_lines(server: ServerProcess, tabs: Tabs, width: int) -> None:
    """The lines divide the chart in three."""
    page = tabs.live(server, viewport={"width": width, "height": 800})
    for chart in page.locator(".plot").all():
        plot = chart.locator("svg").bounding_box()
        for place in (1, 2):
            label = chart.locator(".times span").nth(place).bounding_box()
            off = label["x"] + label["width"] / 2 - (plot["x"] + plot["width"] * place / 3)
            assert abs(off) < 2, f"label {place} is {off:.0f} px beside its line"


@pytest.mark.thorough
def test_the_chart_of_rates_says_what_it_counts(server: ServerProcess, tabs: Tabs) -> None:
    """Keys: a batch of 60 is one call."""
    page = tabs.live(server)
    assert page.get_by_role("heading", name="Keys a second").is_visible()
    assert page.get_by_text("Calls a second").count() == 0


@pytest.mark.thorough
def test_entries_of_a_legend_switch_their_series(start_server: Start, tabs: Tabs) -> None:
    """By mouse and by keyboard; the scale is that of what is left. Series of zeros are muted."""
    server = start_server()  # whose charts have nothing of other tests
    client = server.client()
    client.make_many(100)
    lease = client.acquire()
    page = tabs.live(server)
    chart = page.locator("#chart-composition")
    entry = chart.get_by_role("button", name="available")
    area = chart.locator("path[data-tone=available]")
    page.wait_for_function("() => document.querySelector('path[data-tone=available]').getAttribute('d')")
    assert chart.locator(".axis.top").inner_text() == "100"
    entry.click()
    assert entry.get_attribute("aria-pressed") == "false"
    assert area.get_attribute("d") == ""
    assert chart.locator(".axis.top").inner_text() == "4"
    entry.press("Enter")
    assert entry.get_attribute("aria-pressed") == "true"
    assert area.get_attribute("d") != ""
    assert chart.locator("li.zero[data-tone=cooling]").count() == 1
    body = {"lease": lease["lease"], "outcome": "rate_limited", "retry_after": 60}
    client.post(f"{API}/keys/{lease['key']}/unblock", json=body).expect(200)
    chart.locator("li[data-tone=cooling]:not(.zero)").wait_for()


@pytest.mark.thorough
def test_a_day_that_has_just_begun_says_so(start_server: Start, tabs: Tabs) -> None:
    """Instead of an empty chart without a word."""
    page = tabs.live(start_server())
    page.get_by_text("24 h", exact=True).click()
    assert page.locator("#chart-rates .when").inner_text() == "A point a minute, from now on"


@pytest.mark.thorough
def test_what_ends_next_is_there_as_soon_as_the_page_is(
    server: ServerProcess, client: Client, tabs: Tabs
) -> None:
    """However early in its life that is."""
    page = tabs.open(server, "about:blank")
    page.add_init_script("performance.now = () => 1000")
    with page.expect_request("**/api/v1/keys?order=release&limit=5"):
        page.goto(f"http://{server.host}/")


# ------------------------------------------------------------------------------------------- the server stops


@pytest.mark.thorough
def test_a_server_that_has_stopped_isnt_said_to_be_stopping(tmp_path: Path, tabs: Tabs) -> None:
    """When its time to stop is over it can't be reached. The page goes on when it is back."""
    tabs.allow("ERR_CONNECTION|WebSocket|503")
    flags = ["--data=:memory:", "--drain-seconds=1"]
    [port] = hold_ports(1)
    first = ServerProcess([*flags, f"--port={port}"], cwd=tmp_path)
    try:
        page = tabs.live(first)
        first.signal(signal.SIGTERM)
        page.get_by_text("The server is stopping").wait_for()
        first.wait()
        state(page, "lost")
        assert "The server can't be reached" in page.locator("#banner").inner_text()
        assert page.title() == "(!) no connection · Overview · keypool"
        with ServerProcess([*flags, f"--port={port}"], cwd=tmp_path):
            state(page, "live")
            page.wait_for_function("() => !document.title.includes('no connection')")
            page.context.close()
    finally:
        first.close()
        give_back(port)


@pytest.mark.thorough
def test_a_server_that_comes_back_is_noticed_within_seconds(tmp_path: Path, tabs: Tabs) -> None:
    """However long it was away, the page tries every five seconds."""
    tabs.allow("ERR_CONNECTION|WebSocket")
    with ServerProcess(["--data=:memory:", "--port=0"], cwd=tmp_path) as server:
        page = tabs.live(server)
    page.evaluate("Math.random = () => 1")  # the back-off is as long as it gets
    tried: list[float] = []
    page.on("request", lambda request: tried.append(time.monotonic()))
    eventually(lambda: page.wait_for_timeout(200) or len(tried) >= 7, "the page tries again", within=60)
    assert max(after - before for before, after in pairwise(tried)) < 7


def test_a_server_that_loads_is_said_to_load(server: ServerProcess, tabs: Tabs) -> None:
    """It answers, with 503, so it can be reached."""
    tabs.allow("WebSocket|503")
    page = tabs.open(server, "about:blank")
    problem = {"code": "loading", "title": "Server is loading", "detail": "retry in a moment"}
    page.route("**/figures?state", lambda route: route.fulfill(status=503, json=problem))
    page.route_web_socket("**/api/v1/feed", lambda ws: ws.close())
    page.goto(f"http://{server.host}/")
    state(page, "loading")
    assert "The server is loading" in page.locator("#banner").inner_text()
    assert page.title() == "(!) loading · Overview · keypool"
