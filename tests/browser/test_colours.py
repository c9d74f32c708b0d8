"""Colours: those that the reader's system forces, the two themes, and what is greyed."""

from __future__ import annotations

from typing import Any

import pytest
from support import Client, ServerProcess

from browser.conftest import Tabs, state
from browser.test_screens import axe, fill

pytestmark = pytest.mark.thorough

BACKGROUND = """(elements, part) => elements.map(each => {
    const { backgroundColor, backgroundImage } = getComputedStyle(each, part);
    return `${backgroundColor} ${backgroundImage}`;
})"""
MARK = """elements => elements.map(each => {
    const { borderTopColor, borderTopWidth, borderTopLeftRadius, rotate } = getComputedStyle(each, '::before');
    return [borderTopColor, borderTopWidth, borderTopLeftRadius, rotate].join(' ');
})"""


@pytest.mark.once
def test_forced_colours_leave_what_is_chosen_visible(
    server: ServerProcess, client: Client, tabs: Tabs
) -> None:
    """The current page, tab and time span; and marks, which differ from each other as they do otherwise."""
    client.make_many(3)
    client.acquire()
    page = tabs.live(server, forced_colors="active")

    def differs(chosen: str, other: str) -> bool:
        return bool(
            page.locator(chosen).first.evaluate_all(BACKGROUND, None)
            != page.locator(other).first.evaluate_all(BACKGROUND, None)
        )

    assert differs(".side [aria-current]", ".side nav a:not([aria-current])")
    assert differs("#span :checked + span", "#span :not(:checked) + span")
    swatches = page.locator(".legend li").evaluate_all(BACKGROUND, "::before")
    assert len(set(swatches)) == len(swatches)
    page.wait_for_selector("#latest [data-kind=acquired]")
    kinds = [page.locator(f"#latest [data-kind={kind}] .verb").first for kind in ("acquired", "generated")]
    marks = [kind.evaluate_all(MARK)[0] for kind in kinds]
    assert marks[0] != marks[1]
    canvas = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert not any(mark.startswith((canvas, "rgba(0, 0, 0, 0)")) or " 0px" in mark for mark in marks)
    page.goto("/keys")
    assert differs(".tabs [aria-current]", ".tabs a:not([aria-current])")


@pytest.mark.once
@pytest.mark.parametrize("system", ["light", pytest.param("dark", marks=pytest.mark.thorough)])
def test_a_chosen_theme_wins_over_the_systems(server: ServerProcess, tabs: Tabs, system: str) -> None:
    """All colours are those of the chosen theme, whichever the system has."""
    page = tabs.live(server, color_scheme=system, reduced_motion="reduce")

    def colours() -> Any:
        return page.evaluate(
            "['body', '.card', '.pill', '.side nav a', '[aria-current]'].map(each => "
            "{ const { color, backgroundColor } = getComputedStyle(document.querySelector(each)); "
            "return color + backgroundColor; })"
        )

    page.emulate_media(color_scheme="dark")
    dark = colours()
    page.emulate_media(color_scheme="light")
    light = colours()
    assert all(one != other for one, other in zip(light, dark, strict=True))
    page.emulate_media(color_scheme=system)
    for theme, wanted in (("dark", dark), ("light", light)):
        page.get_by_label("Theme").select_option(theme)
        assert colours() == wanted


@pytest.mark.once
@pytest.mark.parametrize("theme", ["light", pytest.param("dark", marks=pytest.mark.thorough)])
def test_what_is_stale_can_still_be_read(
    server: ServerProcess, client: Client, tabs: Tabs, theme: str
) -> None:
    """Without a connection colours go, and the contrast stays; also on a page without events."""
    tabs.allow("ERR_INTERNET|WebSocket")
    fill(client, 12)
    page = tabs.live(server, "/events?kind=revealed", color_scheme=theme, reduced_motion="reduce")
    assert axe(page, theme) == []
    for screen in ("/", "/keys"):
        page.goto(screen)
        state(page, "live")
        page.context.set_offline(True)
        state(page, "lost")
        assert axe(page, theme) == [], screen
        page.context.set_offline(False)
