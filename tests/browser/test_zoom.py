"""The charts, zoomed into: by mouse, by keyboard, on a phone; and out again."""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from conftest import Start
from durable_support import durable_server
from support import ServerProcess

from browser.conftest import Page, Tabs
from browser.test_screens import axe
from keypool.core.handles import Handles
from keypool.engine.durable import charts_file, datafile
from keypool.web.history import COUNTS, GAUGES, History
from keypool.web.kept_charts import encoded

pytestmark = [pytest.mark.once, pytest.mark.thorough]


def sample(number: int, step: int) -> tuple[int, ...]:
    """Of a pool in which something happens: a wave of keys that are blocked, and acquires in steps."""
    blocked = 40 + abs(number % 120 - 60)
    known = {"available": 180 - blocked, "blocked": blocked, "cooling": 12, "quarantined": 3}
    known |= {
        "acquired": step * (10 + number % 7),
        "unblocked": step * (9 + number % 5),
        "kept_alive": 20 * step,
    }
    return tuple(known.get(name, 0) for name in GAUGES + COUNTS)


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose charts are full: it went on with those of a run before."""
    path = tmp_path_factory.mktemp("busy") / "keypool.db"
    with durable_server(path) as server:
        server.client().make_many(3)
    secret = datafile.secret_of(path)
    assert secret is not None
    now = int(time.time())
    history = History()
    history.restore(
        (now, [sample(number, 1) for number in range(900)]),
        (now // 60 * 60, [sample(number, 60) for number in range(1440)]),
    )
    charts = {"default": zlib.compress(encoded(history, Handles(secret).mark))}
    charts_file.write(charts_file.beside(path), charts)
    with durable_server(path) as server:
        yield server


def drawn(page: Page, chart: str = "#chart-rates") -> Page:
    """Wait until a chart is drawn, and have it in sight."""
    page.wait_for_function(
        "chart => document.querySelector(`${chart} path[d^=M].line, ${chart} path[d^=M].area`)", arg=chart
    )
    found = page.locator(chart)
    found.scroll_into_view_if_needed()
    return found


def drag(page: Page, start: float, end: float, chart: str = "#chart-rates") -> None:
    """From one place of a chart to another, from 0 at the left to 1."""
    box = drawn(page, chart).locator("svg").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * start, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * (start + end) / 2, middle)
    page.mouse.move(box["x"] + box["width"] * end, middle)
    page.mouse.up()


def labels(page: Page, chart: str = "#chart-rates") -> list[str]:
    """What stands under a chart."""
    found: list[str] = page.locator(f"{chart} .times span").all_inner_texts()
    return found


def seconds(label: str) -> int:
    """A time of the day under a chart."""
    hour, minute, second = f"{label.removesuffix(' UTC')}:00".split(":")[:3]
    return int(hour) * 3600 + int(minute) * 60 + int(second)


def points(page: Page) -> int:
    """How many points the chart of rates has."""
    path = page.locator("#chart-rates path[data-tone=acquired]").get_attribute("d")
    return str(path).count("L") + 1


def zoomed(page: Page) -> bool:
    """Whether a part is shown."""
    return bool(page.locator("#show-all").is_visible())


def long(shown: list[str]) -> int:
    """The seconds between the first and the last label, also over midnight."""
    return (seconds(shown[3]) - seconds(shown[0])) % 86_400


def test_a_drag_shows_its_range_on_all_charts(busy: ServerProcess, tabs: Tabs) -> None:
    """With a point for each sample, and the times in UTC below; it holds still while seconds go by."""
    page = tabs.live(busy)
    drawn(page)
    assert labels(page) == ["15 min ago", "10", "5", "now"]
    assert points(page) in (180, 181)  # the first may stand for fewer than five samples
    drag(page, 0.5, 0.6)
    shown = labels(page)
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d", label) for label in shown), shown
    assert 80 <= long(shown) <= 100
    assert points(page) == long(shown) + 1
    assert abs((time.time() - seconds(shown[3])) % 86_400 - 0.4 * 900) < 30
    assert labels(page, "#chart-composition") == shown
    before = page.locator("#chart-rates path[data-tone=acquired]").get_attribute("d")
    page.wait_for_timeout(2500)
    assert labels(page) == shown
    assert page.locator("#chart-rates path[data-tone=acquired]").get_attribute("d") == before
    when = page.locator("#chart-composition .when")
    assert when.inner_text() == f"{shown[3]} UTC", "the legend shows the numbers of its end"
    page.get_by_role("button", name="Show all").click()
    assert labels(page) == ["15 min ago", "10", "5", "now"]
    assert not zoomed(page)
    assert page.evaluate("document.activeElement.value") == "seconds", "the focus is lost with the button"


def test_what_ends_a_zoom(busy: ServerProcess, tabs: Tabs) -> None:
    """Escape, a double click, the other span; a click begins none, and Escape ends a drag too."""
    page = tabs.live(busy)
    drag(page, 0.2, 0.2)
    assert not zoomed(page)
    svg = page.locator("#chart-rates svg")
    for end in (
        lambda: page.keyboard.press("Escape"),
        svg.dblclick,
        lambda: page.get_by_text("24 h", exact=True).click(),
    ):
        drag(page, 0.2, 0.8)
        assert zoomed(page)
        end()
        assert not zoomed(page)
    assert labels(page) == ["24 h ago", "16", "8", "now"]
    box = svg.bounding_box()
    page.mouse.move(box["x"] + 50, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 150, box["y"] + 50)
    page.keyboard.press("Escape")
    page.mouse.up()
    assert not zoomed(page)


def test_a_day_is_zoomed_by_the_minute_and_its_end_by_the_second(busy: ServerProcess, tabs: Tabs) -> None:
    """At the finest resolution that there is."""
    page = tabs.live(busy)
    page.get_by_text("24 h", exact=True).click()
    drag(page, 0.4, 0.5)
    shown = labels(page)
    assert all(re.fullmatch(r"\d\d:\d\d", label) for label in shown), shown
    assert 130 * 60 <= long(shown) <= 160 * 60
    assert points(page) == long(shown) // 60 + 1
    page.keyboard.press("Escape")
    page.locator("#chart-rates .plot").focus()
    for _ in range(9):
        page.keyboard.press("+")
    shown = labels(page)
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d", label) for label in shown), shown
    assert long(shown) <= 600
    assert points(page) in (120, 121)


def test_zoom_by_keyboard(busy: ServerProcess, tabs: Tabs) -> None:
    """`+` and `-` keep the moment that the arrow keys chose in the middle, and tell a screen reader the range."""
    page = tabs.live(busy)
    drawn(page)
    plot = page.locator("#chart-rates .plot")
    plot.focus()
    for _ in range(90):
        page.keyboard.press("ArrowLeft")
    when = page.locator("#chart-rates .when")
    chosen = seconds(when.inner_text())
    for wanted in (450, 225, 112):
        page.keyboard.press("+")
        shown = labels(page)
        assert abs(long(shown) - wanted) <= 6
        assert abs(seconds(when.inner_text()) - chosen) <= 5
        assert abs((seconds(shown[0]) + long(shown) / 2) % 86_400 - chosen) <= 5
    assert points(page) == long(shown) + 1
    before = seconds(when.inner_text())
    page.keyboard.press("ArrowLeft")
    assert before - seconds(when.inner_text()) == 1
    value = plot.evaluate("plot => plot.ariaValueText")
    assert re.match(r"\d\d:\d\d:\d\d UTC: acquired [\d.]+", value), value
    page.keyboard.press("+")
    value = plot.evaluate("plot => plot.ariaValueText")
    assert value.startswith(", ".join(labels(page))), value
    assert plot.evaluate("plot => +plot.ariaValueMin <= +plot.ariaValueNow && +plot.ariaValueNow <= 0")
    for _ in range(6):
        page.keyboard.press("-")
    assert not zoomed(page)
    for _ in range(10):
        page.keyboard.press("+")
    assert long(labels(page)) == 9, "ten samples at least"
    page.keyboard.press("Escape")
    assert not zoomed(page)


def test_a_zoom_of_an_empty_history_does_nothing(start_server: Start, tabs: Tabs) -> None:
    """No error, by mouse and by keyboard, and none in the first seconds."""
    page = tabs.live(start_server())
    for span in ("24 h", "15 min"):
        page.get_by_text(span, exact=True).click()
        box = page.locator("#chart-rates svg").bounding_box()
        page.mouse.move(box["x"] + 20, box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + 200, box["y"] + 20)
        page.mouse.up()
        page.locator("#chart-rates .plot").focus()
        for key in ("+", "ArrowLeft", "+", "-", "-"):
            page.keyboard.press(key)
        page.wait_for_timeout(1200)
    assert page.locator("#chart-rates .times span").count() == 4


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_zoomed_chart_is_accessible(busy: ServerProcess, tabs: Tabs, theme: str) -> None:
    """axe finds nothing."""
    page = tabs.live(busy, color_scheme=theme, reduced_motion="reduce")
    drag(page, 0.3, 0.6)
    assert zoomed(page)
    assert axe(page, theme) == []


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_zooms_and_still_scrolls(busy: ServerProcess, tabs: Tabs, width: int) -> None:
    """A finger that moves sideways selects, one that moves up or down scrolls; nothing is wider than the screen."""
    page = tabs.live(busy, viewport={"width": width, "height": 700}, has_touch=True, is_mobile=True)
    chart = drawn(page)
    assert chart.locator(".plot").evaluate("plot => getComputedStyle(plot).touchAction") == "pan-y pinch-zoom"
    box = chart.locator("svg").bounding_box()
    session: Any = page.context.new_cdp_session(page)

    def swipe(dx: int, dy: int) -> None:
        x, y = box["x"] + box["width"] * 0.7, box["y"] + 70
        session.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
        for step in range(1, 11):
            point = {"x": x + dx * step / 10, "y": y + dy * step / 10}
            session.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [point]})
        session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    before = page.evaluate("scrollY")
    swipe(3, -60)
    page.wait_for_function("before => scrollY !== before", arg=before)
    assert not zoomed(page)
    chart.scroll_into_view_if_needed()
    page.wait_for_timeout(300)
    box = chart.locator("svg").bounding_box()
    swipe(-120, 4)
    page.locator("#show-all").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert long(labels(page)) < 900
    right = [span.bounding_box() for span in chart.locator(".times span").all()]
    for one, other in pairwise(right):
        assert one["x"] + one["width"] <= other["x"], "the times overlap"
