"""Who holds keys, who waits, and rare events, over HTTP: shapes, roles, errors, pools. See test_audit for its lines."""

from __future__ import annotations

import threading
from typing import Any
from urllib.parse import urlencode

import pytest
from support import (
    ADMIN_TOKEN,
    API,
    CLIENT_TOKEN,
    VIEWER_TOKEN,
    Client,
    ServerProcess,
    eventually,
    expect_object,
    expect_row,
)


def walk(client: Client, path: str, rows: str, **query: object) -> list[dict[str, Any]]:
    """All rows, page by page."""
    found: list[dict[str, Any]] = []
    after: dict[str, object] = {}
    for _ in range(1000):
        page = expect_object(
            client.get(f"{path}?{urlencode(query | after)}").expect(200), **{rows: list, "next": (str, None)}
        )
        found += page[rows]
        if page["next"] is None:
            return found
        after = {"after": page["next"]}
    raise AssertionError("after 1000 pages the walk has not ended")


def test_owners_are_listed_and_released(client: Client) -> None:
    """In order of name, page by page; release ends their leases, whatever holders do later."""
    client.make_many(6)
    held = [client.acquire(owner=owner) for owner in ("bob", "ann", "bob")]
    client.acquire()
    owners = walk(client, f"{API}/owners", "owners", limit=1)
    for row in owners:
        expect_object(row, owner=(str, None), client=None, held=int, acquired_at=str, released=0)
    assert [(row["owner"], row["held"]) for row in owners] == [(None, 1), ("ann", 1), ("bob", 2)]
    rows = walk(client, f"{API}/keys", "keys", owner="bob", limit=1)
    assert [expect_row(row)["lease"] for row in rows] == [held[0]["lease"], held[2]["lease"]]
    assert client.post(f"{API}/owners/release", json={"owner": "bob"}).expect(200) == {"released": 2}
    assert client.post(f"{API}/owners/release", json={"owner": "bob"}).expect(200) == {"released": 0}
    assert client.post(f"{API}/owners/release", json={"owner": "ann", "client": "ci"}).expect(200) == {
        "released": 0
    }
    unblocked = client.post(f"{API}/keys/{held[0]['handle']}/unblock").expect(200)
    assert unblocked["changed"] is False
    assert [row["owner"] for row in walk(client, f"{API}/owners", "owners")] == [None, "ann"]
    event = walk(client, f"{API}/events", "events", kind="unblocked")[0]
    assert (event["event"], event["by"]) == ("unblocked", "operator")


def test_waiters_are_listed(client: Client) -> None:
    """First come first."""
    key = client.make()
    client.acquire(owner="ann")
    threads = []
    for number, owner in enumerate(("bob", "eve"), 1):
        other = client.server.client()
        threads.append(
            threading.Thread(target=other.acquire, kwargs={"owner": owner, "wait": 30}, daemon=True)
        )
        threads[-1].start()
        client.expect_waiting(number)
    shown = eventually(
        lambda: [w for w in [walk(client, f"{API}/waiters", "waiters", limit=1)] if len(w) == 2], "two wait"
    )[0]
    assert [expect_object(row, owner=str, client=None, waiting_since=str)["owner"] for row in shown] == [
        "bob",
        "eve",
    ]
    for _ in threads:
        assert client.post(f"{API}/keys/id:{key['id']}/unblock").expect(200)["changed"] is True
        eventually(lambda: client.row(f"id:{key['id']}")["state"] == "blocked", "it is served")
    for thread in threads:
        thread.join(30)
    assert walk(client, f"{API}/waiters", "waiters") == []


def test_rare_events_are_listed(client: Client) -> None:
    """Newest first, of one kind if wanted; the feed's shape, and a count."""
    pool = client.make_pool("rare")
    [key, other] = client.post(f"{pool}/batch", json={"op": "generate", "count": 2}).expect(201)["keys"]
    client.post(f"{pool}/keys/id:{key['id']}/reveal").expect(200)
    client.delete(f"{pool}/keys/id:{key['id']}").expect(204)
    client.post(f"{pool}/keys/acquire", json={"owner": "ann"}).expect(200)
    client.post(f"{pool}/owners/release", json={"owner": "ann"}).expect(200)
    events = walk(client, f"{pool}/events", "events", limit=1)
    for event in events:
        expect_object(
            event,
            event=str, id=int, hint=str, owner=(str, None), lease=(int, None), at=str, by="operator", actor=None,
            count=int,
        )  # fmt: skip
    by_kind = {
        event["event"]: (event["id"], event["owner"], event["lease"], event["count"]) for event in events
    }
    assert by_kind == {
        "generated": (by_kind["generated"][0], None, None, 2),
        "revealed": (key["id"], None, None, 1),
        "deleted": (key["id"], None, None, 1),
        "unblocked": (other["id"], "ann", by_kind["unblocked"][2], 1),
    }
    moments = [event["at"] for event in events]
    assert moments == sorted(moments, reverse=True)
    assert [event["event"] for event in walk(client, f"{pool}/events", "events", kind="revealed")] == [
        "revealed"
    ]


def test_each_pool_has_its_own(client: Client) -> None:
    """Under its path."""
    pool = client.make_pool("openai")
    client.post(f"{pool}/batch", json={"op": "generate", "count": 3}).expect(201)
    client.post(f"{pool}/keys/acquire", json={"owner": "ann"}).expect(200)
    assert [row["owner"] for row in walk(client, f"{pool}/owners", "owners")] == ["ann"]
    assert [event["count"] for event in walk(client, f"{pool}/events", "events")] == [3]
    assert walk(client, f"{pool}/waiters", "waiters") == walk(client, f"{API}/owners", "owners") == []
    assert client.post(f"{pool}/owners/release", json={"owner": "ann"}).expect(200) == {"released": 1}


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("/events?kind=acquired", "revealed"),
        ("/events?limit=0", "limit"),
        ("/events?after=x", "after"),
        ("/owners?owner=x", "owner"),
        ("/owners?after=WyJ3IiwxXQ", "after"),
        ("/waiters?limit=501", "limit"),
        ("/waiters?after=WyJoIiwxLCJhIiwwLCIiXQ", "after"),
        ("/keys?owner=x&order=id", "owner"),
        ("/keys?owner=x&state=cooling", "owner"),
        ("/keys?owner=", "owner"),
    ],
)
def test_a_wrong_query_is_refused_by_its_name(client: Client, path: str, names: str) -> None:
    """Of a kind, those that there are are named."""
    assert names in client.get(API + path).expect_problem(400, "bad-request")["detail"]


@pytest.mark.parametrize(
    "body", [None, {}, {"owner": None}, {"owner": ""}, {"owner": "x" * 201}, {"owner": "a\nb"}]
)
def test_a_release_names_an_owner(client: Client, body: object) -> None:
    """Those without a name can't be released together."""
    client.make()
    client.acquire()
    detail = client.post(f"{API}/owners/release", json=body).expect_problem(400, "bad-request")["detail"]
    assert "owner" in detail
    assert client.stats()["blocked"] == 1


def test_viewers_look_and_admins_release(guarded_server: ServerProcess) -> None:
    """Clients do neither."""
    for token, look, release in (
        (CLIENT_TOKEN, 403, 403), (VIEWER_TOKEN, 200, 403), (ADMIN_TOKEN, 200, 200),
    ):  # fmt: skip
        client = guarded_server.client(token)
        for path in ("/owners", "/waiters", "/events"):
            assert client.get(API + path).status == look
        assert client.post(f"{API}/owners/release", json={"owner": "x"}).status == release
