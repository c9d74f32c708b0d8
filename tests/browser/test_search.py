"""Finding keys: the search, the orders and the pages of the list."""

from __future__ import annotations

import pytest
from conftest import Start
from support import API, Client, ServerProcess

from browser.conftest import Page, Tabs, row, rows

pytestmark = pytest.mark.thorough


def search(page: Page, text: str) -> None:
    """Type a text into the search, and send it."""
    page.locator("#search").fill(text)
    page.locator("#search").press("Enter")


def ids(page: Page) -> list[int]:
    """The ids of the rows, in their order."""
    found: list[int] = page.locator(".key-row").evaluate_all(
        "rows => rows.map(row => Number(row.dataset.id))"
    )
    return found


@pytest.mark.parametrize("script", [True, False])
def test_the_search_takes_what_an_operator_has(
    server: ServerProcess, client: Client, tabs: Tabs, *, script: bool
) -> None:
    """A whole key, a hint, an id, a name, an owner, and the beginning of a key or name: with scripts and without."""
    key, other = client.make_many(2)
    secret = "sk-live-0123456789abcdef"
    body = {"secret": secret, "name": "acct 17", "expire": True}
    named = client.post(f"{API}/keys", json=body).expect(201)
    holder = client.acquire(owner="worker/7 & co")
    page = tabs.open(server, "/keys", script=script)
    addresses: list[str] = []
    page.on("request", lambda request: addresses.append(request.url))
    by_key = {
        key["key"]: key["id"],
        f"  {key['key']}\t": key["id"],
        secret: named["id"],
        str(other["id"]): other["id"],
        f"id:{other['id']}": other["id"],
        named["hint"]: named["id"],
        "acct 17": named["id"],
    }
    for text, key_id in by_key.items():
        page.goto("/keys")
        search(page, text)
        page.wait_for_url(f"**/keys/{key_id}")
        shown = page.content() + page.title()
        assert key["key"] not in shown
        assert secret not in shown
    for text, key_id in (("acct", named["id"]), (key["key"][:4], key["id"]), ("worker/7 & co", holder["id"])):
        page.goto("/keys")
        search(page, text)
        page.wait_for_url("**/keys?*=*")
        assert ids(page) == [key_id]
    assert not [url for url in addresses if key["key"] in url or secret in url]


def test_what_is_not_found_stays_in_the_field(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """The page says so, and keeps its rows."""
    key = client.make()
    page = tabs.live(server, "/keys")
    search(page, "waytoolong")
    page.get_by_text("Nothing found").wait_for()
    assert page.locator("#search").input_value() == "waytoolong"
    assert page.url.endswith("/keys")
    assert ids(page) == [key["id"]]
    page.locator("#search").fill("waytoolon")
    page.get_by_text("Nothing found").wait_for(state="hidden")


def test_a_wrong_search_in_an_address_fills_in_nothing(
    server: ServerProcess, client: Client, tabs: Tabs
) -> None:
    """It says what would be right, once, and no key is listed as if it fitted, however much happens."""
    client.make()
    tabs.allow("400")
    page = tabs.live(server, "/keys?q=waytoolong")
    page.get_by_text("Invalid search").wait_for()
    client.make()
    page.wait_for_function("() => document.querySelector('[data-count=all]').textContent === '2'")
    page.wait_for_timeout(2500)  # the table is loaded again after two seconds at the latest
    assert page.locator(".key-row").count() == 0
    assert page.get_by_role("heading", name="No key").count() == 0


@pytest.mark.thorough
def test_expiring_soon_lists_only_keys_that_do(lend: Start, tabs: Tabs) -> None:
    """Those that the tab counts, in the last quarter of so short a life, and none that has longer to live."""
    server = lend("--keepalive-seconds=32")
    client = server.client()
    made = client.make_many(3)
    page = tabs.live(server, "/keys?tab=expiring")
    page.get_by_role("heading", name="No key expires within 8 s").wait_for()
    page.locator(".key-row").first.wait_for()
    assert sorted(ids(page)) == sorted(key["id"] for key in made)
    page.wait_for_function("() => document.querySelector('[data-count=expiring]').textContent === '3'")
    client.post(f"{API}/keys/{made[0]['key']}/keepalive").expect(200)
    row(page, made[0]["id"]).wait_for(state="detached")


def test_a_column_head_sorts(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """By the orders that the list has, which the head says; the live rows keep to it."""
    made = client.make_many(3)
    client.post(f"{API}/keys/{made[0]['key']}/keepalive").expect(200)
    page = tabs.live(server, "/keys")
    assert ids(page) == sorted(key["id"] for key in made)
    assert page.locator("th[aria-sort]").inner_text() == "Key"
    page.get_by_role("link", name="Expires in").click()
    page.wait_for_url("**/keys?sort=expiry")
    assert page.locator("th[aria-sort=ascending]").inner_text() == "Expires in"
    assert ids(page)[-1] == made[0]["id"]
    client.post(f"{API}/keys/{made[1]['key']}/keepalive").expect(200)
    client.make()
    page.wait_for_function("() => document.querySelectorAll('.key-row').length === 4")
    assert ids(page)[-2] == made[1]["id"]
    client.batch(op="acquire", count=2)
    page.goto("/keys?tab=blocked")
    assert page.locator("th[aria-sort]").inner_text() == "State ends in"
    page.get_by_role("link", name="Key", exact=True).click()
    page.wait_for_url("**/keys?tab=blocked&sort=id")
    assert ids(page) == sorted(each["id"] for each in rows(client) if each["state"] == "blocked")


def test_the_pages_of_a_list_have_a_way_back(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """Also after the link to the next page was written anew, and with the order and the tab kept."""
    client.make_many(120)
    page = tabs.live(server, "/keys?tab=available&sort=expiry")
    seen = [ids(page)]
    client.make()  # the page is loaded again
    for _ in range(2):
        page.get_by_role("link", name="Next page").click()
        page.wait_for_url("**after=*")
        seen.append(ids(page))
        page.wait_for_selector("#pill[data-state=live]")
    assert len({key_id for each in seen for key_id in each}) == 121
    for before in (seen[1], seen[0]):
        page.get_by_role("link", name="Previous page").click()
        page.wait_for_load_state()
        assert ids(page) == before
    assert page.url.endswith("/keys?tab=available&sort=expiry")
