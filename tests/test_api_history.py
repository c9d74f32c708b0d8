"""The history of a key over HTTP: its answer, who may see it, and what is refused."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from support import ADMIN_TOKEN, API, CLIENT_TOKEN, VIEWER_TOKEN, Client, ServerProcess, expect_object

POOLS = API + "/pools"
RECORDED = {"history_leases": 1000}


@pytest.fixture
def recording(client: Client) -> Client:
    """A client of a server whose pool `default` keeps a history."""
    client.patch(f"{POOLS}/default", json=RECORDED).expect(200)
    return client


def history(client: Client, key: object, query: str = "", path: str = API) -> dict[str, Any]:
    """A page of a key's history."""
    page: dict[str, Any] = client.get(f"{path}/keys/{key}/history{query}").expect(200)
    return page


def held(client: Client, **report: object) -> dict[str, Any]:
    """A key that was made, acquired and given back, as it was leased."""
    client.make()
    lease: dict[str, Any] = client.acquire(owner="worker-7")
    client.post(f"{API}/keys/{lease['handle']}/unblock", json=report).expect(200)
    return lease


def test_the_history_says_who_held_a_key_and_how_that_ended(recording: Client) -> None:
    """With these members and no others; moments are RFC 3339, and `held` is between them."""
    lease = held(recording, outcome="error", reason="500 from the service")
    page = expect_object(history(recording, f"id:{lease['id']}"), history=list, next=None)
    [row] = page["history"]
    expect_object(
        row, lease=lease["lease"], owner="worker-7", client=None, acquired_at=str, ended_at=str, held=float,
        how="unblocked", outcome="error", reason="500 from the service", extended=0,
    )  # fmt: skip
    began, ended = (datetime.fromisoformat(row[name]) for name in ("acquired_at", "ended_at"))
    assert (ended - began).total_seconds() == pytest.approx(row["held"], abs=0.0015)
    assert history(recording, lease["key"]) == history(recording, lease["handle"]) == page


def test_pages_of_a_history_follow_each_other(recording: Client) -> None:
    """The latest lease first, each once; the last page has no next."""
    lease = held(recording)
    for _ in range(4):
        recording.acquire()
        recording.post(f"{API}/keys/id:{lease['id']}/unblock").expect(200)
    seen, after = [], ""
    while True:
        page = history(recording, f"id:{lease['id']}", f"?limit=2{after}")
        seen += [row["lease"] for row in page["history"]]
        if page["next"] is None:
            break
        after = f"&after={page['next']}"
    assert seen == sorted(seen, reverse=True)
    assert len(seen) == 5
    assert [row["how"] for row in history(recording, lease["key"])["history"]] == ["revoked"] * 4 + [
        "unblocked"
    ]


def test_a_purged_key_has_a_history_by_its_id(recording: Client) -> None:
    """Its text is unknown, as any other."""
    lease = held(recording)
    recording.delete(f"{API}/keys/{lease['key']}").expect(204)
    assert [row["how"] for row in history(recording, f"id:{lease['id']}")["history"]] == ["unblocked"]
    for gone in (lease["key"], lease["handle"], "id:999999999", "id:x"):
        recording.get(f"{API}/keys/{gone}/history").expect_problem(404, "unknown-key")


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("?limit=0", "rows on a page"),
        ("?limit=501", "rows on a page"),
        ("?after=nonsense", "next of the previous page"),
        ("?after=", "next of the previous page"),
        ("?before=7", "this call takes after, limit"),
        ("?limit=1&limit=2", "twice"),
    ],
)
def test_a_wrong_query_is_refused(recording: Client, query: str, says: str) -> None:
    """With what would be right."""
    lease = held(recording)
    problem = recording.get(f"{API}/keys/id:{lease['id']}/history{query}").expect_problem(400, "bad-request")
    assert says in problem["detail"]


def test_each_pool_has_a_history_of_its_own(client: Client) -> None:
    """A new pool keeps one, `default` doesn't; a key without any has an empty one."""
    path = client.make_pool("openai")
    made = client.post(f"{path}/keys").expect(201)
    assert history(client, f"id:{made['id']}", path=path) == {"history": [], "next": None}
    client.post(f"{path}/keys/acquire").expect(200)
    client.post(f"{path}/keys/id:{made['id']}/unblock").expect(200)
    assert len(history(client, f"id:{made['id']}", path=path)["history"]) == 1
    lease = held(client)
    assert history(client, f"id:{lease['id']}")["history"] == []


def test_history_leases_is_the_one_setting_of_default_that_a_call_changes(client: Client) -> None:
    """Alone: together with a flag nothing changes. PUT without it takes it back."""
    path = f"{POOLS}/default"
    assert client.get(path).expect(200)["settings"]["history_leases"] == 0
    assert client.patch(path, json={"history_leases": 5}).expect(200)["settings"]["history_leases"] == 5
    for change in (client.patch, client.put):
        problem = change(path, json={"history_leases": 9, "rest_seconds": 1}).expect_problem(
            409, "pool-fixed"
        )
        assert "rest_seconds" in problem["detail"]
        assert "history_leases" not in problem["detail"]
    for wrong in (-1, 100_000_001, 1.5, "5"):
        client.patch(path, json={"history_leases": wrong}).expect_problem(400, "bad-request")
    assert client.get(path).expect(200)["settings"]["history_leases"] == 5
    assert client.put(path).expect(200)["settings"]["history_leases"] == 0


def test_a_history_is_for_viewers(guarded_server: ServerProcess) -> None:
    """And admins; a client may not see who else held a key, nor name one by its id."""
    with guarded_server.client(ADMIN_TOKEN) as admin:
        admin.patch(f"{POOLS}/default", json=RECORDED).expect(200)
        lease = held(admin)
    with guarded_server.client(VIEWER_TOKEN) as viewer:
        assert len(history(viewer, f"id:{lease['id']}")["history"]) == 1
    with guarded_server.client(CLIENT_TOKEN) as client:
        client.get(f"{API}/keys/{lease['handle']}/history").expect_problem(403, "forbidden")
