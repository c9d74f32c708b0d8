"""Secrets with several seats over HTTP: imported, changed, named, reported on, and gone."""

from __future__ import annotations

from typing import Any

import pytest
from support import API, CLIENT_TOKEN, Client, ServerProcess, expect_object, expect_row

SECRET = "sk-live-3f0c2e91-77d1"


@pytest.fixture
def server(importing_server: ServerProcess) -> ServerProcess:
    """The server of these tests."""
    return importing_server


@pytest.fixture
def pool(client: Client) -> str:
    """The beginning of the paths of a pool that purges no keys."""
    return client.make_pool("openai", keepalive_seconds=None, max_keys=10)


def imported(client: Client, pool: str, secret: str = SECRET, **more: Any) -> list[int]:
    """The ids of the seats of a secret that was just imported."""
    made = client.post(pool + "/keys", json={"secret": secret, **more}).expect(201)
    assert made["id"] == made["ids"][0]
    ids: list[int] = made["ids"]
    return ids


def acquired(client: Client, pool: str) -> dict[str, Any]:
    """A lease."""
    lease: dict[str, Any] = client.post(pool + "/keys/acquire").expect(200)
    return lease


def rows(client: Client, pool: str) -> list[dict[str, Any]]:
    """All rows of a pool, in order of id."""
    return [expect_row(row) for row in client.get(pool + "/keys").expect(200)["keys"]]


def test_a_secret_is_lent_to_as_many_as_it_has_seats(client: Client, pool: str) -> None:
    """Each with an id, a lease and a handle of its own; rows say which seat of how many it is."""
    ids = imported(client, pool, seats=3, name="acct")
    again = client.post(pool + "/keys", json={"secret": SECRET, "seats": 5}).expect(200)
    assert (again["existed"], again["ids"]) == (True, ids)
    leases = [acquired(client, pool) for _ in ids]
    assert {lease["key"] for lease in leases} == {SECRET}
    assert [sorted(lease["id"] for lease in leases), len({lease["handle"] for lease in leases})] == [ids, 3]
    client.post(pool + "/keys/acquire").expect_problem(404, "no-key-available")
    assert [(row["id"], row["seat"], row["seats"], row["name"]) for row in rows(client, pool)] == [
        (id, number, 3, "acct") for number, id in enumerate(ids, 1)
    ]
    assert client.get(f"{pool}/keys/{SECRET}").expect(200)["id"] == ids[0]
    assert client.get(pool + "/stats").expect(200)["total"] == 3


def test_a_seat_is_named_by_its_handle_its_id_or_the_text_beside_its_lease(client: Client, pool: str) -> None:
    """By the text alone an unblock, keepalive or extend is refused, and changes nothing."""
    imported(client, pool, seats=3)
    one, two, three = (acquired(client, pool) for _ in range(3))
    for call in ("unblock", "keepalive", "extend"):
        client.post(f"{pool}/keys/{SECRET}/{call}").expect_problem(409, "many-seats")
    client.post(f"{pool}/keys/{SECRET}/unblock", json={"lease": 10**9}).expect_problem(409, "stale-lease")
    done = client.post(f"{pool}/keys/{SECRET}/unblock", json={"lease": two["lease"]}).expect(200)
    assert (done["id"], done["changed"]) == (two["id"], True)
    client.post(f"{pool}/keys/{one['handle']}/keepalive", token=CLIENT_TOKEN).expect(200)
    many = {"op": "unblock", "keys": [SECRET, {"key": SECRET, "lease": three["lease"]}, f"id:{one['id']}"]}
    expect_object(
        client.post(pool + "/batch", json=many).expect(200),
        op="unblock", done=2, unknown=[], stale=[], many_seats=[SECRET],
    )  # fmt: skip
    kept = {"op": "keepalive", "keys": [SECRET, one["handle"]]}
    assert client.post(pool + "/batch", json=kept).expect(200)["many_seats"] == [SECRET]
    none = {"op": "keepalive", "keys": [one["handle"]]}
    assert "many_seats" not in client.post(pool + "/batch", json=none).expect(200)
    assert {row["state"] for row in rows(client, pool)} == {"available"}


def test_a_report_of_one_holder_is_about_all_seats(client: Client, pool: str) -> None:
    """Those that are held finish first. The counts are of seats, `cooled` and the like of secrets."""
    ids = imported(client, pool, seats=3)
    one, two = acquired(client, pool), acquired(client, pool)
    limited = {"lease": one["lease"], "outcome": "rate_limited", "retry_after": 100}
    assert client.post(f"{pool}/keys/{SECRET}/unblock", json=limited).expect(200)["state"] == "cooling"
    assert sorted(row["state"] for row in rows(client, pool)) == ["blocked", "cooling", "cooling"]
    client.post(f"{pool}/keys/{two['handle']}/unblock").expect(200)
    found = rows(client, pool)
    assert [(row["state"], row["failures"], row["outcome"]) for row in found] == [
        ("cooling", 1, "rate_limited")
    ] * 3
    assert max(row["available_in"] for row in found) - min(row["available_in"] for row in found) < 0.01
    client.post(f"{pool}/keys/id:{ids[2]}/quarantine", json={"reason": "leaked"}).expect(200)
    assert [(row["state"], row["reason"]) for row in rows(client, pool)] == [("quarantined", "leaked")] * 3
    client.post(f"{pool}/keys/{SECRET}/restore").expect(200)
    stats = client.get(pool + "/stats").expect(200)
    states = [stats[state] for state in ("available", "blocked", "cooling", "quarantined", "total")]
    assert states == [3, 0, 0, 0, 3]
    assert [stats[name] for name in ("imported", "cooled", "quarantines", "restored")] == [3, 1, 1, 1]


def test_seats_are_added_and_taken_away(client: Client, pool: str) -> None:
    """Those that are held go when their leases end; a pool without room refuses, and so are numbers out of range."""
    imported(client, pool, seats=4)
    path = f"{pool}/keys/{SECRET}"
    for wrong in (0, 101):
        client.patch(path, json={"seats": wrong}).expect_problem(400, "bad-request")
    client.patch(path, json={"seats": 11, "name": "x"}).expect_problem(409, "pool-full")
    leases = [acquired(client, pool) for _ in range(3)]
    assert client.patch(path, json={"seats": 2}).expect(200)["seats"] == 3
    client.post(f"{pool}/keys/{leases[0]['handle']}/unblock").expect(200)
    client.get(f"{pool}/keys/id:{leases[0]['id']}").expect_problem(404, "unknown-key")
    assert client.patch(path, json={"seats": 5, "name": "y"}).expect(200)["name"] == "y"
    found = rows(client, pool)
    assert [(row["seat"], row["seats"], row["name"]) for row in found] == [(n, 5, "y") for n in range(1, 6)]
    assert [row["state"] for row in found].count("available") == 3


def test_replace_find_reveal_and_delete_are_about_all_seats(client: Client, pool: str) -> None:
    """A holder may use the text of its lease beside the lease number until it ends."""
    ids = imported(client, pool, seats=3, name="acct")
    lease = acquired(client, pool)
    client.post(f"{pool}/keys/id:{ids[1]}/replace", json={"secret": "sk-live-another-one-77"}).expect(200)
    assert client.post(f"{pool}/keys/id:{ids[2]}/reveal").expect(200)["key"] == "sk-live-another-one-77"
    for known in ("sk-live-another-one-77", "acct", "sk-l…e-77"):
        assert client.post(pool + "/keys/find", json={"key": known}).expect(200)["id"] == ids[0]
    client.post(f"{pool}/keys/{SECRET}/unblock", json={"lease": lease["lease"]}).expect(200)
    client.get(f"{pool}/keys/{SECRET}").expect_problem(404, "unknown-key")
    client.delete(f"{pool}/keys/id:{ids[1]}").expect(204)
    assert rows(client, pool) == []


def test_a_batch_imports_seats_all_or_none(client: Client, pool: str) -> None:
    """The results have the ids of all seats; an update changes how many there are."""
    keys = [
        {"secret": "sk-live-one-11111", "seats": 4},
        {"secret": "sk-live-two-22222"},
        {"secret": "x", "seats": 0},
    ]
    answer = client.post(pool + "/batch", json={"op": "import", "keys": keys}).expect(200)
    first, second, wrong = answer["results"]
    assert (len(first["ids"]), first["id"], second["ids"]) == (4, first["ids"][0], [second["id"]])
    assert (wrong["status"], wrong["code"]) == ("failed", "bad-request")
    full = {"op": "import", "keys": [{"secret": "sk-live-three-33333", "seats": 6}]}
    client.post(pool + "/batch", json=full).expect_problem(409, "pool-full")
    more = {"op": "import", "exists": "update", "keys": [{"secret": "sk-live-two-22222", "seats": 3}]}
    (result,) = client.post(pool + "/batch", json=more).expect(200)["results"]
    assert (result["status"], result["id"], len(result["ids"])) == ("updated", second["id"], 3)


def test_a_generated_key_may_get_seats(client: Client) -> None:
    """Generating none: seats go with a secret there."""
    client.post(f"{API}/keys", json={"seats": 2}).expect_problem(400, "bad-request")
    made = client.make()
    assert client.patch(f"{API}/keys/{made['key']}", json={"seats": 2}).expect(200)["seats"] == 2
    leases = [client.acquire(), client.acquire()]
    assert {lease["key"] for lease in leases} == {made["key"]}
    assert client.stats()["generated"] >= 2
    legacy = client.request("PUT", f"{API}/random_api_key/?api_key={made['key']}")
    assert "message" in legacy.expect_problem(409, "many-seats")
    described = client.get(f"{API}/openapi.json").expect(200)["paths"][f"{API}/random_api_key"]["put"]
    assert "many-seats" in described["responses"]["409"]["description"]
