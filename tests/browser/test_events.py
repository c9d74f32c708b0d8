"""The events: rare ones that aren't lost, who brought them about, search, and the zone of times."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from support import API, Client, ServerProcess, eventually

from browser.conftest import Page, Tabs, figure, state
from keypool.core.rare_events import CROWD_SECONDS

pytestmark = pytest.mark.thorough


def cells(page: Page, kind: str, key_id: int) -> list[str]:
    """The cells of a key's first row of a kind; waits for it."""
    row = page.locator(f"#stream .event[data-kind={kind}][data-id='{key_id}']").first
    row.wait_for()
    found: list[str] = row.locator("td").all_inner_texts()
    return found


def is_over(client: Client, kind: str) -> bool:
    """Whether the latest crowd of a kind is so old that no other event joins it."""
    latest = client.get(f"{API}/events?kind={kind}&limit=1").expect(200)["events"]
    ages = [datetime.now(UTC) - datetime.fromisoformat(each["at"]) for each in latest]
    return all(age.total_seconds() > CROWD_SECONDS for age in ages)


def flood(client: Client, rounds: int = 15) -> None:
    """More events than a server keeps in memory: of 40 keys that are acquired and given back."""
    for _ in range(rounds):
        keys = [each["key"] for each in client.batch(op="acquire", count=40, owner="busy").json["keys"]]
        client.batch(op="unblock", keys=keys)


def test_rare_events_are_not_lost_among_others(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """Deletions are listed live and after a reload, whatever else happens; a crowd is one row that grows."""
    gone = [client.make() for _ in range(2)]
    client.make_many(40)
    page = tabs.live(server, "/events?kind=deleted")
    eventually(lambda: is_over(client, "deleted"), "deletions of tests before are another crowd")
    client.delete(f"{API}/keys/{gone[0]['key']}")
    flood(client)
    page.locator(f"#stream .event[data-id='{gone[0]['id']}']").wait_for()
    client.batch(op="delete", keys=[gone[1]["key"], *(f"id:{gone[1]['id'] + n}" for n in range(1, 4))])
    either = ", ".join(f"[data-id='{key['id']}']" for key in gone)  # it may join the one before
    page.locator(f"#stream .event:is({either}) [data-f=crowd]:not(:empty)").first.wait_for()
    flood(client)
    page.reload()
    shown = page.locator("#stream .event").evaluate_all("rows => rows.map(row => row.dataset.kind)")
    assert shown
    assert set(shown) == {"deleted"}
    page.goto("/events?kind=rare")
    kinds = page.locator("#stream .event").evaluate_all("rows => rows.map(row => row.dataset.kind)")
    assert {"generated", "deleted"} <= set(kinds)
    assert "acquired" not in kinds


def test_an_event_has_its_actor_and_its_holder_in_columns(
    server: ServerProcess, client: Client, tabs: Tabs
) -> None:
    """Who deleted a key isn't who held it; the holder's name leads to what it holds."""
    client.make_many(2)
    lease = client.acquire(owner="late-worker")
    page = tabs.live(server, "/events")
    heads = [text.lower() for text in page.locator("th").all_inner_texts()]
    assert heads == ["time (utc)", "event", "key", "by", "holder", "lease"]
    client.delete(f"{API}/keys/{lease['key']}")
    for _ in range(2):  # as the script draws it, and as the server does
        assert cells(page, "deleted", lease["id"])[3:5] == ["operator", "late-worker"]
        assert cells(page, "acquired", lease["id"])[3:5] == ["holder", "late-worker"]
        page.reload()
    page.get_by_role("link", name="late-worker").first.click()
    page.wait_for_url("**/keys?owner=late-worker")


def test_a_search_of_events_looks_at_all_of_them(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """Not only at the rows that are loaded; it stands in the address, with the kind, and survives a reload."""
    client.make_many(40)
    client.acquire(owner="a needle & co")
    flood(client, 5)  # 400 events
    page = tabs.live(server, "/events?kind=acquired")
    found = page.locator("#stream .event:visible")
    page.locator("#search").fill("A NEEDLE")
    page.wait_for_url("**/events?kind=acquired&q=A+NEEDLE")
    assert found.count() == 1
    page.reload()
    assert page.locator("#search").input_value() == "A NEEDLE"
    assert found.count() == 1
    state(page, "live")
    page.locator("#search").fill("")
    page.wait_for_url("**/events?kind=acquired")
    eventually(lambda: found.count() > 1, "all are back")


def test_a_key_that_is_searched_among_events_gets_into_no_address(
    server: ServerProcess, client: Client, tabs: Tabs
) -> None:
    """No event has a key's text, with scripts or without."""
    key = client.make()["key"]
    for script in (True, False):
        page = tabs.open(server, "/events", script=script)
        addresses: list[str] = []
        page.on("request", lambda request, seen=addresses: seen.append(request.url))
        page.locator("#search").fill(key)
        page.locator("#search").press("Enter")
        page.get_by_role("heading", name="No matching events").wait_for()
        page.wait_for_load_state("networkidle") if not script else page.wait_for_timeout(600)
        assert not [url for url in (*addresses, page.url) if key in url]
        assert key not in page.content()


def test_times_are_of_one_zone(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """UTC, which every screen says; in full in the title."""
    made = [client.make()]
    page = tabs.live(server, "/", timezone_id="Asia/Tokyo")
    figure(page, "available", "1")
    made.append(client.make())
    for key in made:  # an event that the server drew, and one of the script
        moment = page.locator(f"#latest .event[data-id='{key['id']}'] time")
        moment.wait_for()
        at = moment.get_attribute("datetime")
        assert moment.inner_text() == at[11:19]
        assert moment.get_attribute("title") == f"{at[:10]} {at[11:19]} UTC"
    assert "UTC" in page.get_by_role("heading", name="Latest events").inner_text()
    page.locator("#chart-rates .plot").hover()
    said = page.locator("#chart-rates .when").inner_text()
    assert said.endswith(" UTC")
    assert said[:2] in {at[11:13], f"{(int(at[11:13]) + 1) % 24:02}", f"{(int(at[11:13]) - 1) % 24:02}"}
    tabs.allow("ERR_INTERNET|WebSocket")
    page.context.set_offline(True)
    page.locator("#banner", has_text="UTC").wait_for()
