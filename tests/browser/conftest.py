"""A real Chromium for the tests of this folder: Debian's own, driven by playwright.

Where there is none the tests are skipped, and say why; with CI=true a missing one is a failure. Every page of
a test must stay without an error in its console, unless the test allows it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import Start
from support import ADMIN_TOKEN, API, VIEWER_TOKEN, Client, ServerProcess

ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
TIMEOUT = 15_000

Page = Any
"""playwright's, which is imported late: it need not be there."""


def missing(what: str) -> None:
    """Skip because something is missing; with CI=true, fail."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what}, and CI=true says that it has to be there")
    pytest.skip(f"{what}: the dashboard is not tested in a browser here")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One Chromium for the tests of a module: while playwright is there its loop runs, and no other can."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        missing("there is no chromium in PATH")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield chromium
        chromium.close()


class Tabs:
    """Opens pages, each in a browser profile of its own, and keeps what their consoles say."""

    def __init__(self, browser: Any) -> None:
        self._browser = browser
        self._contexts: list[Any] = []
        self.said: list[str] = []
        # What a browser says of a line that a page gave up while it was still being opened: in whichever test the
        # machine is slow enough.
        self._allowed: list[str] = ["closed before the connection is established"]

    def open(self, server: ServerProcess, path: str = "/", *, script: bool = True, **options: Any) -> Page:
        """A new page at this path of the server."""
        context = self._browser.new_context(
            base_url=f"http://{server.host}",
            java_script_enabled=script,
            **({"viewport": {"width": 1280, "height": 800}} | options),
        )
        context.set_default_timeout(TIMEOUT)
        self._contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: self._hear(message.type, message.text))
        page.on("pageerror", lambda error: self._hear("error", str(error)))
        page.goto(path)
        return page

    def live(self, server: ServerProcess, path: str = "/", **options: Any) -> Page:
        """The same, once it is connected."""
        page = self.open(server, path, **options)
        state(page, "live")
        return page

    def allow(self, pattern: str) -> None:
        """Allow console messages that contain this."""
        self._allowed.append(pattern)

    def close(self) -> None:
        """Close all pages, and fail if a console had a message that wasn't allowed."""
        for context in self._contexts:
            for page in context.pages:
                page.unroute_all(behavior="ignoreErrors")  # or a handler in its middle could wait for ever
            context.close()
        said = [text for text in self.said if not any(re.search(allowed, text) for allowed in self._allowed)]
        assert said == [], f"the console of a page: {said}"

    def _hear(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.said.append(text)


@pytest.fixture
def tabs(browser: Any) -> Iterator[Tabs]:
    """Pages of one test."""
    tabs = Tabs(browser)
    yield tabs
    tabs.close()


@pytest.fixture
def sign_in() -> Callable[[Page, str], None]:
    """Types a token into the form of the sign-in."""

    def sign_in(page: Page, token: str) -> None:
        page.get_by_label("Token").fill(token)
        page.get_by_role("button", name="Sign in").click()

    return sign_in


@pytest.fixture
def tokened(lend: Start) -> ServerProcess:
    """A server with one viewer and one admin token."""
    return lend(
        env={"KEYPOOL_VIEWER_TOKEN": VIEWER_TOKEN, "KEYPOOL_ADMIN_TOKEN": ADMIN_TOKEN},
        admin_token=ADMIN_TOKEN,
    )


def report(client: Client, outcome: str, owner: str = "worker-7", **fields: object) -> int:
    """Acquire a key and give it back with an outcome. Returns its id."""
    lease = client.acquire(owner=owner)
    body = {"lease": lease["lease"], "outcome": outcome, **fields}
    client.post(f"{API}/keys/{lease['key']}/unblock", json=body).expect(200)
    return int(lease["id"])


def quarantine(client: Client, key_id: int, **fields: object) -> None:
    """Quarantine a key as an admin."""
    client.post(f"{API}/keys/id:{key_id}/quarantine", json=fields).expect(200)


def state(page: Page, wanted: str, within: float = 15) -> None:
    """Wait until the pill shows this state of the connection."""
    page.wait_for_selector(f'#pill[data-state="{wanted}"]', timeout=within * 1000)


def figure(page: Page, tile: str, wanted: str) -> None:
    """Wait until a tile of the overview shows this."""
    page.wait_for_function(
        "([tile, wanted]) => document.querySelector(`#tile-${tile} .figure`).textContent === wanted",
        arg=[tile, wanted],
    )


def row(page: Page, key_id: int) -> Any:
    """A row of the table."""
    return page.locator(f".key-row[data-id='{key_id}']")


def rows(client: Client) -> list[dict[str, Any]]:
    """The first fifty keys."""
    found: list[dict[str, Any]] = client.get("/api/v1/keys").json["keys"]
    return found
