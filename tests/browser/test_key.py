"""One key, in the drawer over a list and on a page of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest
from support import ADMIN_TOKEN, VIEWER_TOKEN, ServerProcess, clean_environment

from browser.conftest import Page, Tabs, state


def copied(page: Page, line: str) -> Any:
    """Copy a line by its button, and run it in a shell as it is. Returns the answer of the server."""
    page.get_by_role("button", name=f"Copy: {line}", exact=True).click()
    text = page.evaluate("navigator.clipboard.readText()")
    done = subprocess.run(
        ["sh", "-uc", text],
        env=clean_environment({"KEYPOOL_ADMIN_TOKEN": ADMIN_TOKEN, "KEYPOOL_VIEWER_TOKEN": VIEWER_TOKEN}),
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.once
@pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl here")
def test_lines_do_what_they_say_as_copied(tokened: ServerProcess, tabs: Tabs, sign_in: Any) -> None:
    """Bodies are taken as JSON; to unblock frees that lease only; a viewer's line has the viewer's token."""
    page = tabs.open(tokened)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    sign_in(page, ADMIN_TOKEN)
    state(page, "live")
    made = copied(page, "generate ten keys")["keys"]
    assert len(made) == 10
    page.goto("/calls")
    assert copied(page, "pool-put")["name"] == "openai"
    admin = tokened.client(ADMIN_TOKEN)
    admin.batch(op="acquire", count=10).expect(200)
    page.goto(f"/keys/{made[0]['id']}")
    assert copied(page, "unblock")["changed"] is True
    admin.acquire(owner="the next one")
    assert copied(page, "unblock")["code"] == "stale-lease"
    page.get_by_role("button", name="Sign out").click()
    sign_in(page, VIEWER_TOKEN)
    page.goto(f"/keys/{made[0]['id']}")
    assert copied(page, "get")["owner"] == "the next one"
    assert page.get_by_role("button", name="Copy:").count() == 1


def test_a_viewer_of_an_empty_pool_has_nothing_to_copy(
    tokened: ServerProcess, tabs: Tabs, sign_in: Any
) -> None:
    """A line with an admin's token would be of no use."""
    page = tabs.open(tokened)
    sign_in(page, VIEWER_TOKEN)
    for path in ("/", "/keys"):
        page.goto(path)
        assert page.get_by_role("heading", name="The pool is empty").is_visible()
        assert "KEYPOOL_ADMIN_TOKEN" not in page.content()
