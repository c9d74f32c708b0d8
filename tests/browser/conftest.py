"""A real Chromium for the tests of this folder: Debian's own, driven by playwright. Others: other_browsers.py.

Where there is none the tests are skipped, and say why; with CI=true a missing one is a failure. Every page of
a test must stay without an error in its console, unless the test allows it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Start
from support import ADMIN_TOKEN, API, VIEWER_TOKEN, Client, ServerProcess

ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
TIMEOUT = 30_000
PATIENCE = 30.0
"""Seconds after which a browser that gives no answer is taken to hang."""
LAUNCHES = 3

Page = Any
"""playwright's, which is imported late: it need not be there."""


def missing(what: str) -> None:
    """Skip because something is missing; with CI=true, fail."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what}, and CI=true says that it has to be there")
    pytest.skip(f"{what}: the dashboard is not tested in a browser here")


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    """One Chromium for the tests of a module: while playwright is there its loop runs, and no other can."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        missing("there is no chromium in PATH")
    with sync_playwright() as playwright:
        chromium = Chromium(lambda: playwright.chromium.launch(executable_path=path, args=ARGUMENTS))
        yield chromium
        chromium.close()


class Chromium:
    """A browser that is killed, and another one started, if it doesn't answer.

    On a busy machine Chromium now and then answers a call for a new profile, or for the end of one, never, and for
    these calls playwright has no time limit.
    """

    def __init__(self, launch: Callable[[], Any]) -> None:
        self._launch = launch
        self._browser = launch()

    def profile(self, **options: Any) -> Any:
        """A new profile (playwright's context)."""
        for _ in range(LAUNCHES):
            found = self._answered(lambda: self._browser.new_context(**options))
            if found is not None:
                return found
            self._browser = self._launch()
        raise AssertionError(f"{LAUNCHES} browsers in turn gave no profile within {PATIENCE} s")

    def end(self, context: Any) -> None:
        """End a profile and its pages."""
        self._answered(context.close)

    def close(self) -> None:
        """End the browser."""
        self._answered(self._browser.close)

    @staticmethod
    def _answered(call: Callable[[], Any]) -> Any:
        """The result of a call; None if the browser is gone, or was killed as it gave no answer."""
        from playwright.sync_api import Error

        timer = threading.Timer(PATIENCE, kill_browsers)
        timer.start()
        try:
            return call()
        except Error as error:
            if "closed" in str(error):
                return None
            raise
        finally:
            timer.cancel()


def kill_browsers() -> None:
    """Kill those that this process has started, by way of playwright's driver."""
    processes: dict[int, tuple[str, int]] = {}  # name and parent, by process id
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, rest = stat.read_text().split(" (", 1)
        except OSError:  # it has ended meanwhile
            continue
        name, _, fields = rest.rpartition(") ")
        processes[int(number)] = (name, int(fields.split()[1]))
    for pid, (name, parent) in processes.items():
        if name.startswith("chrom") and processes.get(parent, ("", 0))[1] == os.getpid():
            os.kill(pid, signal.SIGKILL)


class Tabs:
    """Opens pages, each in a browser profile of its own, and keeps what their consoles say."""

    def __init__(self, browser: Chromium) -> None:
        self._browser = browser
        self._contexts: list[Any] = []
        self.said: list[str] = []
        # What a browser says of a line that a page gave up while it was still being opened: in whichever test the
        # machine is slow enough.
        self._allowed: list[str] = ["closed before the connection is established"]

    def open(self, server: ServerProcess, path: str = "/", *, script: bool = True, **options: Any) -> Page:
        """A new page at this path of the server."""
        context = self._browser.profile(
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
            self._browser.end(context)
        said = [text for text in self.said if not any(re.search(allowed, text) for allowed in self._allowed)]
        assert said == [], f"the console of a page: {said}"

    def _hear(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.said.append(text)


@pytest.fixture
def tabs(browser: Chromium) -> Iterator[Tabs]:
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


def state(page: Page, wanted: str, within: float = 30) -> None:
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
