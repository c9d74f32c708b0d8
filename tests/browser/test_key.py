"""One key, in the drawer over a list and on a page of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from support import ADMIN_TOKEN, API, VIEWER_TOKEN, Client, ServerProcess, clean_environment

from browser.conftest import Page, Tabs, row, state

pytestmark = pytest.mark.thorough

if TYPE_CHECKING:
    from playwright.sync_api import Route


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


def fact(page: Page, name: str) -> Any:
    """One of the facts about the key that is shown."""
    return page.locator(f".key-panel [data-key={name}] dd")


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


def test_the_page_of_a_key_is_live(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """It shows who acquires the key, and offers nothing any more once the key is gone."""
    tabs.allow("404")
    key = client.make()
    page = tabs.live(server, f"/keys/{key['id']}")
    fact(page, "owner").get_by_text("nobody").wait_for()
    client.acquire(owner="worker-7")
    fact(page, "owner").get_by_text("worker-7").wait_for()
    fact(page, "due").locator(".countdown").wait_for()
    assert f'{{"lease":{client.row(key["key"])["lease"]}}}' in page.locator("[data-key=shell]").inner_text()
    client.delete(f"{API}/keys/{key['key']}").expect(204)
    page.get_by_text("No key has this id").wait_for()
    assert page.locator("[data-act]").count() == 0


def test_focus_and_selection_survive_updates(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """What hasn't changed stays in place; if what had the focus is gone, the title gets it."""
    client.make()
    page = tabs.live(server, "/keys")
    page.locator(".key-link").click()
    panel = page.locator("#panel .key-panel[data-state=available]")
    panel.locator("[data-reveal]").focus()
    panel.locator("h2 code").evaluate("code => getSelection().selectAllChildren(code)")
    selected = page.evaluate("getSelection().toString()")
    lease = client.acquire(owner="worker-7")
    fact(page, "owner").get_by_text("worker-7").wait_for()
    assert page.evaluate("'reveal' in document.activeElement.dataset")
    assert page.evaluate("getSelection().toString()") == selected != ""
    page.locator("#panel [data-act=unblock]").focus()
    client.post(f"{API}/keys/{lease['key']}/unblock").expect(200)
    fact(page, "owner").get_by_text("nobody").wait_for()
    assert page.evaluate("document.activeElement.id") == "panel-title"


def test_the_focus_stays_in_the_page_when_the_drawer_closes(
    server: ServerProcess, client: Client, tabs: Tabs
) -> None:
    """On the row that opened it, which then leaves the table as it isn't aimed at any more."""
    client.make()
    lease = client.acquire()
    page = tabs.live(server, "/keys?tab=blocked")
    page.locator(".key-link").press("Enter")
    page.locator("#panel .key-panel[data-state=blocked]").wait_for()
    client.post(f"{API}/keys/{lease['key']}/unblock").expect(200)
    row(page, lease["id"]).locator(".state", has_text="available").wait_for()
    page.keyboard.press("Escape")
    page.wait_for_function("() => document.activeElement.matches('.key-link')")
    page.evaluate("document.activeElement.blur()")
    row(page, lease["id"]).wait_for(state="detached")


def test_a_revealed_key_is_followed_as_others_are(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """What is around its text changes, its text stays; it goes with the key."""
    tabs.allow("404")
    key = client.make()
    page = tabs.live(server, f"/keys/{key['id']}")
    page.get_by_role("button", name="Reveal", exact=True).click()
    page.locator(".secret").get_by_text(key["key"]).wait_for()
    client.acquire(owner="worker-7")
    fact(page, "owner").get_by_text("worker-7").wait_for()
    assert page.locator(".secret").inner_text() == key["key"]
    client.delete(f"{API}/keys/{key['key']}").expect(204)
    page.get_by_text("No key has this id").wait_for()
    assert key["key"] not in page.content()


def test_the_drawer_is_in_the_url_and_the_history(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """Back closes it, Forward opens it, a reload keeps it; closed by Escape it leaves no entry behind."""
    key, other = client.make(), client.make()
    page = tabs.live(server, "/keys?tab=available")
    panel, drawn = page.locator("#panel"), page.locator("#panel .key-panel[data-state=available]")
    entries = page.evaluate("history.length")
    row(page, key["id"]).locator(".key-link").click()
    drawn.wait_for()
    assert page.url.endswith(f"/keys?tab=available#key-{key['id']}")
    page.go_back()
    panel.wait_for(state="hidden")
    assert page.url.endswith("/keys?tab=available")
    page.go_forward()
    drawn.wait_for()
    panel.dispatch_event("close")  # a busy browser may tell so late that the drawer was closed
    page.evaluate("() => new Promise(requestAnimationFrame)")
    drawn.wait_for()
    assert page.url.endswith(f"#key-{key['id']}")
    page.reload()
    drawn.wait_for()
    page.keyboard.press("Escape")
    panel.wait_for(state="hidden")
    page.wait_for_function("() => location.hash === ''")
    row(page, other["id"]).locator(".key-link").click()
    drawn.wait_for()
    assert page.evaluate("history.length") == entries + 1
    panel.get_by_role("link", name="Open its page").click()
    page.wait_for_url(f"**/keys/{other['id']}")
    page.go_back()
    drawn.wait_for()
    assert page.url.endswith(f"#key-{other['id']}")


def test_the_drawer_opens_from_a_url(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """Closed, it leaves the page as it would have been without it."""
    key = client.make()
    page = tabs.live(server, f"/keys#key-{key['id']}")
    page.locator("#panel .key-panel[data-state=available]").wait_for()
    page.get_by_role("button", name="Close").click()
    page.locator("#panel").wait_for(state="hidden")
    page.wait_for_function("() => location.hash === ''")
    assert page.locator(".key-row").count() == 1


def test_what_was_done_is_shown_and_announced_in_the_drawer(
    server: ServerProcess, client: Client, tabs: Tabs
) -> None:
    """Nothing outside of an open drawer is: it lies below, and is inert."""
    key = client.make()
    page = tabs.live(server, f"/keys#key-{key['id']}")
    page.locator("#panel [data-act=keepalive]").click()
    said = page.locator(".toast", has_text=f"Key {key['id']} now expires in")
    said.wait_for()
    assert said.evaluate(
        """toast => {
            const { x, y } = toast.getBoundingClientRect();
            return document.elementFromPoint(x + 9, y + 9) === toast && toast.closest('[role=status]') !== null;
        }"""
    )
    page.keyboard.press("Escape")
    page.locator("#panel").wait_for(state="hidden")
    assert said.is_visible()


def test_a_server_that_gives_no_answer(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """The drawer opens at once, and says that it waits, then that it has waited in vain; it can be tried again."""
    key = client.make()
    page = tabs.open(server, "about:blank")
    page.add_init_script(
        "AbortSignal.timeout = (late => ms => late.call(AbortSignal, ms / 5))(AbortSignal.timeout)"
    )
    page.goto(f"http://{server.host}/keys")
    state(page, "live")
    hang = "**/keys/*part*"
    held: list[Route] = []
    page.route(hang, lambda route: held.append(route))  # noqa: PLW0108 - it needs attributes
    row(page, key["id"]).locator(".key-link").click()
    panel = page.locator("#panel[open]")
    panel.get_by_role("heading", name=f"Key {key['id']}").wait_for()
    panel.get_by_text("Waiting for the server…").wait_for()
    panel.get_by_text("No answer: the server has taken longer than 10 s").wait_for()
    held.pop().abort()
    page.unroute(hang)
    panel.get_by_role("button", name="Try again").click()
    panel.locator("[data-act=keepalive]").wait_for()
    page.route("**/keepalive", lambda route: held.append(route))  # noqa: PLW0108
    button = panel.locator("[data-act=keepalive]")
    button.click()
    page.wait_for_function("() => document.querySelector('#panel [data-act=keepalive]').ariaBusy === 'true'")
    page.locator(".toast", has_text="Waiting for the server…").wait_for()
    page.locator(".toast", has_text="whether the call took effect isn't known").wait_for()
    assert button.get_attribute("aria-busy") is None
    assert page.locator(".toast", has_text="Waiting for the server…").count() == 0
    held.pop().abort()


def test_a_server_that_is_gone(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """A click on a key says so."""
    tabs.allow("ERR_FAILED")
    client.make()
    page = tabs.live(server, "/keys")
    page.route("**/keys/*part*", lambda route: route.abort())
    page.locator(".key-link").click()
    page.locator("#panel").get_by_text("No connection: the server can't be reached").wait_for()


def test_a_problem_is_one_sentence(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """Its title and its detail, which is written as a part of one."""
    tabs.allow("404|ERR_FAILED")
    key = client.make()
    page = tabs.live(server, "/keys")
    page.route("**/keys?*", lambda route: route.abort())  # the row stays as it is
    client.delete(f"{API}/keys/{key['key']}").expect(204)
    page.locator(".key-row [data-act=keepalive]").evaluate("button => button.click()")
    page.locator(".toast", has_text="Unknown key: no such key").wait_for()


def test_who_had_a_key(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """Leases with their holder, length and end, newest first, the one that lasts on top; older ones by a link."""
    pool = f"{API}/pools/recorded"
    client.put(pool, json={}).expect(201)
    key = client.post(f"{pool}/keys").expect(201)

    def hold(owner: str, **fields: object) -> None:
        lease = client.post(f"{pool}/keys/acquire", json={"owner": owner}).expect(200)
        client.post(f"{pool}/keys/{key['key']}/unblock", json={"lease": lease["lease"], **fields}).expect(200)

    for number in range(10):
        hold(f"worker-{number}")
    hold("worker-10", outcome="error", reason="502 from example.com")
    page = tabs.live(server, f"/pools/recorded/keys/{key['id']}")
    spans = page.locator(".spans li")
    assert spans.count() == 10
    said = spans.first.inner_text()
    for text in ("worker-10", "unblocked, error", "502 from example.com", "lease 11", " s", "UTC"):
        assert text in said, said
    client.post(f"{pool}/keys/acquire", json={"owner": "worker-11"}).expect(200)
    fact(page, "since").get_by_text("UTC").wait_for()
    assert "worker-11\nhas it now" in spans.first.inner_text()
    assert spans.count() == 11
    page.get_by_role("link", name="Older leases").click()
    page.get_by_role("link", name="Latest leases").wait_for()
    assert [text.split()[0] for text in spans.all_inner_texts()] == ["worker-0"]
    client.post(f"{pool}/keys/{key['key']}/unblock").expect(200)
    fact(page, "owner").get_by_text("nobody").wait_for()
    assert spans.count() == 1, "an older page stays the one that it was"
    client.get(f"/pools/recorded/keys/{key['id']}?after=nonsense").expect_problem(400, "bad-request")
    tabs.allow("404")
    client.delete(f"{pool}/keys/{key['key']}").expect(204)
    page.get_by_text("No key has this id").wait_for()
    page.get_by_role("link", name="Latest leases").click()
    page.locator(".who", has_text="worker-11").wait_for()


def test_a_key_without_a_history(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """The pool says that it keeps none."""
    key = client.make()
    client.acquire()
    page = tabs.open(server, f"/keys/{key['id']}", script=False)
    assert page.get_by_text("This pool keeps no history").is_visible()
    assert "has it now" in page.locator(".spans li").inner_text()
