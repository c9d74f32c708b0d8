"""Pools: made, changed, emptied and deleted by calls, and all calls about keys under the path of each."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Start
from support import (
    ADMIN_TOKEN,
    API,
    CLIENT_TOKEN,
    OF_POOLS,
    VIEWER_TOKEN,
    Answer,
    Client,
    ServerProcess,
    eventually,
    expect_left,
    expect_object,
    expect_row,
)

POOLS = API + "/pools"
DEFAULTS = {
    "block_seconds": 60,
    "max_block_seconds": 60,
    "keepalive_seconds": 300,
    "max_keys": 1_000_000,
    "key_length": 20,
    "cooldown_seconds": 60,
    "max_cooldown_seconds": 3600,
    "max_retry_after_seconds": 604_800,
    "error_threshold": 3,
    "forget_seconds": 3600,
    "max_quarantined_percent": 50,
    "rest_seconds": 0,
    "pace": None,
    "history_leases": 100_000,
}
COUNTS = ("total", "available", "blocked", "cooling", "quarantined", "waiting")


def expect_pool(value: object, **known: object) -> dict[str, Any]:
    """The row of a pool, with these members so."""
    members: dict[str, object] = {"name": str, "draining": bool, "settings": dict}
    members |= dict.fromkeys(COUNTS, int)
    row = expect_object(value, **(members | known))
    assert set(row["settings"]) == set(DEFAULTS)
    return row


def names(client: Client) -> list[str]:
    """The pools that there are."""
    return [pool["name"] for pool in client.get(POOLS).expect(200)["pools"]]


def gone(client: Client, name: str) -> None:
    """Wait until a pool that is being emptied is gone."""
    eventually(lambda: name not in names(client), f"the pool {name} is gone")


def settings_of(client: Client, name: str) -> dict[str, Any]:
    """All settings of a pool."""
    settings: dict[str, Any] = client.get(f"{POOLS}/{name}").expect(200)["settings"]
    return settings


# ------------------------------------------------------------------------------------------- making and changing


def test_a_new_pool_has_the_defaults_whatever_the_flags_say(lend: Start) -> None:
    """Its times are those of the contract; how many keys, and how long they are, is the server's."""
    flags = (
        "--block-seconds=5",
        "--keepalive-seconds=70",
        "--error-threshold=9",
        "--max-keys=77",
        "--key-length=32",
    )
    client = lend(*flags).client()
    assert settings_of(client, "default") == DEFAULTS | {
        "history_leases": 0,
        "block_seconds": 5,
        "max_block_seconds": 5,
        "keepalive_seconds": 70,
        "error_threshold": 9,
        "max_keys": 77,
        "key_length": 32,
    }
    row = client.put(POOLS + "/openai").expect(201)
    assert row == expect_pool(row, name="openai", draining=False, **dict.fromkeys(COUNTS, 0))
    assert row["settings"] == DEFAULTS | {"max_keys": 77, "key_length": 32}


def test_put_gives_what_is_left_out_its_default_and_patch_leaves_it(client: Client) -> None:
    """201 for a new pool, 200 for one that was there; both answer with the row."""
    given: dict[str, Any] = {
        "block_seconds": 300,
        "keepalive_seconds": None,
        "error_threshold": None,
        "max_keys": 5,
    }
    path = client.make_pool("openai", **given)
    wanted = DEFAULTS | given | {"max_block_seconds": 300}
    assert settings_of(client, "openai") == wanted
    assert client.patch(path, json={"rest_seconds": 2.5}).expect(200)["settings"] == wanted | {
        "rest_seconds": 2.5
    }
    assert client.patch(path).expect(200)["settings"] == wanted | {"rest_seconds": 2.5}
    changed = client.put(path, json={"keepalive_seconds": 20}).expect(200)
    assert changed["settings"] == DEFAULTS | {"keepalive_seconds": 20}


def test_null_is_a_value_for_some_settings_and_else_as_if_absent(client: Client) -> None:
    """Those of which the contract says so."""
    path = client.make_pool("openai", **dict.fromkeys(DEFAULTS))
    assert settings_of(client, "openai") == DEFAULTS | {"keepalive_seconds": None, "error_threshold": None}
    client.patch(path, json={"keepalive_seconds": 50, "rest_seconds": None}).expect(200)
    assert settings_of(client, "openai") == DEFAULTS | {"keepalive_seconds": 50, "error_threshold": None}


def test_pools_are_listed_in_order_of_name_with_their_counts(client: Client) -> None:
    """`default` stands among the others."""
    for name in ("zeta", "a-1", "0.x_y", "e"):
        client.make_pool(name)
    client.post(POOLS + "/zeta/keys").expect(201)
    client.post(POOLS + "/zeta/keys").expect(201)
    client.post(POOLS + "/zeta/keys/acquire").expect(200)
    rows = client.get(POOLS).expect(200)["pools"]
    assert [row["name"] for row in rows] == ["0.x_y", "a-1", "default", "e", "zeta"]
    for row in rows:
        total = 2 if row["name"] == "zeta" else 0
        expect_pool(row, total=total, available=total // 2, blocked=total // 2, draining=False)
    assert client.get(POOLS + "/zeta").expect(200) == rows[-1]
    assert client.head(POOLS).status == 200


WRONG_NAMES = [
    "A",
    "-a",
    ".a",
    "_a",
    "a%20b",
    "a" * 64,
    "%2E%2E",
    "..",
    ".",
    "a%2Fb",
    "a%00",
    "a%0A",
    "%C3%A9",
    "%FF",
]


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_a_wrong_name_is_refused_and_no_other_call_finds_it(client: Client, name: str) -> None:
    """400 that says what a name takes, and 404 without one; a slash in it, or `..`, is no way to another path."""
    before = names(client)
    path = f"{POOLS}/{name}"
    detail = client.put(path).expect_problem(400, "bad-request")["detail"]
    assert "1 to 63 characters of a-z 0-9 . _ -" in detail
    for call in (client.get(path), client.patch(path), client.delete(path), client.get(f"{path}/stats")):
        call.expect_problem(404, "unknown-pool")
    assert names(client) == before


@pytest.mark.parametrize(
    "path", ["/a/b", "/a/", "/default/pools", "/default/openapi.json", "/default/random_api_key", "//keys"]
)
def test_what_no_pool_has_is_not_found(client: Client, path: str) -> None:
    """A name with a slash is another path; the document and the first version's paths are not under pools."""
    for method in ("GET", "PUT", "DELETE"):
        client.request(method, POOLS + path).expect_problem(404, "not-found")


@pytest.mark.parametrize("name", ["openai", "op%65nai"])
def test_a_path_means_the_same_whatever_was_asked_for_before(client: Client, name: str) -> None:
    """Paths are taken apart in another way once a key of the pool was named by its path."""
    client.make_pool("openai")
    keys = f"{POOLS}/{name}/keys"
    key = client.post(keys).expect(201)["key"]
    for _ in range(2):
        assert client.post(f"{keys}/acquire").expect(200)["key"] == key
        assert client.post(f"{keys}/{key}/unblock").expect(200)["changed"]
        for path in (
            "//unblock",
            "/acquire/unblock",
            f"/{key}/",
            f"/{key}/unblock/",
            f"/{key}/nothing",
            "/",
            "//",
        ):
            wanted = ("unknown-key",) if path == "/acquire/unblock" else ("not-found",)
            client.post(keys + path).expect_problem(404, *wanted)
    assert client.get(f"{POOLS}/{name}/stats").expect(200)["total"] == 1


def test_a_name_may_be_percent_encoded(client: Client) -> None:
    """As a key may."""
    client.make_pool("openai")
    assert client.get(POOLS + "/op%65nai").expect(200)["name"] == "openai"
    client.post(POOLS + "/op%65nai/keys").expect(201)
    assert client.get(POOLS + "/openai/stats").expect(200)["total"] == 1


WRONG: list[tuple[str, object, str]] = [
    ("block_seconds", 0, "a number of seconds from 0.001 to 86400"),
    ("block_seconds", 86_401, "a number of seconds from 0.001 to 86400"),
    ("block_seconds", "60", "a number of seconds from 0.001 to 86400"),
    ("block_seconds", True, "a number of seconds"),
    ("max_block_seconds", 10**9, "a number of seconds from 0.001 to 31622400"),
    ("keepalive_seconds", -1, "or null: keys never expire"),
    ("max_keys", 0, "a whole number from 1 to 10000000000"),
    ("max_keys", 1.5, "a whole number from 1 to 10000000000"),
    ("key_length", 15, "a whole number from 16 to 64"),
    ("cooldown_seconds", -0.1, "a number of seconds from 0 to 86400"),
    ("max_cooldown_seconds", [], "a number of seconds from 0"),
    ("max_retry_after_seconds", {}, "a number of seconds from 0"),
    ("error_threshold", 0, "or null: errors never cool a key"),
    ("forget_seconds", "", "a number of seconds from 0"),
    ("max_quarantined_percent", 100.5, "a number from 0 to 100"),
    ("rest_seconds", 86_401, "a number of seconds from 0 to 86400"),
    ("pace", 5, "or null: keys are served whenever they are available"),
    ("pace", {}, "`count` and `seconds` go together"),
    ("pace", {"count": 5}, "`count` and `seconds` go together"),
    ("pace", {"count": 0, "seconds": 1}, "pace.count takes a whole number from 1 to 1000000"),
    ("pace", {"count": 1.5, "seconds": 1}, "a whole number from 1 to 1000000"),
    ("pace", {"count": 1, "seconds": 0}, "pace.seconds takes a number of seconds from 0.001 to 31622400"),
    ("pace", {"count": 1, "seconds": "1"}, "a number of seconds from 0.001 to 31622400"),
    ("pace", {"count": 1, "seconds": 1, "burst": 0}, "pace.burst takes a whole number from 1 to 1000000"),
    ("pace", {"count": 1, "seconds": 1, "brust": 2}, "brust"),
]


@pytest.mark.parametrize(("name", "value", "takes"), WRONG)
def test_a_wrong_setting_is_named_with_what_it_takes(
    client: Client, name: str, value: object, takes: str
) -> None:
    """In PUT and PATCH; nothing is made or changed, not even by the settings beside it."""
    path = client.make_pool("openai")
    body = {"forget_seconds" if name == "rest_seconds" else "rest_seconds": 7, name: value}
    for answer in (
        client.put(path, json=body),
        client.patch(path, json=body),
        client.put(POOLS + "/other", json=body),
    ):
        detail = answer.expect_problem(400, "bad-request")["detail"]
        assert name in detail, detail
        assert takes in detail, detail
    assert settings_of(client, "openai") == DEFAULTS
    assert names(client) == ["default", "openai"]


@pytest.mark.parametrize("member", ["blok_seconds", "name", "settings"])
def test_an_unknown_setting_is_named(client: Client, member: str) -> None:
    """With those that there are; a typing error must not be taken for a default."""
    for answer in (
        client.put(POOLS + "/openai", json={member: 1}),
        client.patch(POOLS + "/default", json={member: 1}),
    ):
        detail = answer.expect_problem(400, "bad-request")["detail"]
        assert member in detail
        assert "block_seconds, max_block_seconds, keepalive_seconds" in detail
    assert names(client) == ["default"]


def test_a_setting_given_twice_is_refused(client: Client) -> None:
    """Whichever counts would be wrong for somebody."""
    for body in (b'{"rest_seconds":1,"rest_seconds":2}', b'{"keepalive_seconds":5,"keepalive_seconds":null}'):
        answer = client.put(POOLS + "/openai", body=body)
        assert "twice" in answer.expect_problem(400, "bad-request")["detail"]
    assert names(client) == ["default"]


def test_a_lease_may_not_be_shorter_at_most_than_at_first(client: Client) -> None:
    """`max_block_seconds` is `block_seconds` at least, whichever of the two is changed."""
    client.put(POOLS + "/openai", json={"max_block_seconds": 59}).expect_problem(400, "bad-request")
    assert names(client) == ["default"]
    path = client.make_pool("openai", block_seconds=20, max_block_seconds=30)
    for body in ({"block_seconds": 31}, {"max_block_seconds": 19}):
        answer = client.patch(path, json=body)
        assert "max_block_seconds" in answer.expect_problem(400, "bad-request")["detail"]
    assert settings_of(client, "openai") == DEFAULTS | {"block_seconds": 20, "max_block_seconds": 30}
    client.patch(path, json={"block_seconds": 31, "max_block_seconds": 31}).expect(200)


def test_default_is_fixed(client: Client) -> None:
    """Its settings are the server's flags, and it can't be deleted, whatever it holds."""
    before = client.get(POOLS + "/default").expect(200)
    for answer in (
        client.delete(POOLS + "/default"),
        client.delete(POOLS + "/default?drain=true&now=true"),
        client.patch(POOLS + "/default", json={"block_seconds": 5}),
        client.put(POOLS + "/default", json={"keepalive_seconds": None}),
    ):
        answer.expect_problem(409, "pool-fixed")
    assert client.get(POOLS + "/default").expect(200) == before
    assert (
        client.patch(POOLS + "/default").expect(200) == client.put(POOLS + "/default").expect(200) == before
    )
    client.make()


def test_default_takes_a_pace_which_is_no_flag(client: Client) -> None:
    """PATCH gives it, and a PUT without it takes it away; a flag beside it refuses both."""
    path, pace = POOLS + "/default", {"count": 5, "seconds": 60, "burst": 2}
    given = client.patch(path, json={"pace": pace}).expect(200)
    assert given["settings"] == DEFAULTS | {"pace": pace, "history_leases": 0}
    client.put(path, json={"pace": None, "rest_seconds": 1}).expect_problem(409, "pool-fixed")
    assert client.patch(path).expect(200) == given
    assert client.put(path).expect(200)["settings"] == DEFAULTS | {"history_leases": 0}
    client.put(path, json={"pace": {"count": 1, "seconds": 0.5}}).expect(200)
    assert client.patch(path, json={"pace": None}).expect(200)["settings"] == DEFAULTS | {"history_leases": 0}


def test_a_pool_keeps_its_pace_and_its_keys_keep_to_it(client: Client) -> None:
    """An unblock says how long the key cools, and a 404 when there will be one."""
    path = client.make_pool("openai", pace={"count": 2, "seconds": 60})
    client.post(path + "/keys").expect(201)
    acquired = client.post(path + "/keys/acquire")
    lease = acquired.expect(200)
    unblocked = client.post(f"{path}/keys/{lease['handle']}/unblock", json={"uses": 2})
    answer = unblocked.expect(200)
    assert (answer["state"], answer["changed"]) == ("cooling", True)
    expect_left(answer["available_in"], 60, acquired, unblocked)
    refused = client.post(path + "/keys/acquire")
    expect_left(refused.expect_problem(404, "no-key-available")["retry_after"], 60, acquired, refused)
    expect_row(client.post(f"{path}/keys/id:{lease['id']}/restore").expect(200), state="cooling", pace=None)
    assert client.get(path + "/stats").expect(200)["paced"] == 2


def test_no_more_than_max_pools(lend: Start) -> None:
    """`default` isn't counted, and one that is deleted leaves its place."""
    client = lend("--max-pools=2").client()
    client.make_pool("a")
    client.make_pool("b")
    assert "--max-pools" in client.put(POOLS + "/c").expect_problem(409, "too-many-pools")["detail"]
    client.put(POOLS + "/b", json={"rest_seconds": 1}).expect(200)
    client.delete(POOLS + "/a").expect(204)
    client.make_pool("c")


def test_changed_times_hold_for_deadlines_set_from_then_on(client: Client) -> None:
    """A key that is held keeps the deadline that it has."""
    path = client.make_pool("openai", block_seconds=50, keepalive_seconds=500)
    before = client.post(path + "/keys")
    client.post(path + "/keys").expect(201)
    held = client.post(path + "/keys/acquire")
    client.patch(path, json={"block_seconds": 40, "keepalive_seconds": 90}).expect(200)
    later = client.post(path + "/keys/acquire")
    expect_left(later.expect(200)["release_in"], 40, later, later)
    for lease in (held.expect(200), later.expect(200)):
        row = client.get(f"{path}/keys/id:{lease['id']}")
        whole, started = (50, held) if lease["id"] == held.json["id"] else (40, later)
        expect_left(row.expect(200)["release_in"], whole, started, row)
    row = client.get(f"{path}/keys/id:{before.expect(201)['id']}")
    expect_left(row.expect(200)["expires_in"], 500, before, row)
    kept = client.post(f"{path}/keys/id:{before.json['id']}/keepalive")
    expect_left(kept.expect(200)["expires_in"], 90, kept, kept)


def test_keys_of_a_pool_that_purges_none_never_expire(client: Client) -> None:
    """Keepalive is answered all the same."""
    path = client.make_pool("openai", keepalive_seconds=None)
    made = client.post(path + "/keys").expect(201)
    assert made["expires_in"] is None
    lease = client.post(path + "/keys/acquire").expect(200)
    assert lease["expires_in"] is None
    kept = client.post(f"{path}/keys/{made['key']}/keepalive").expect(200)
    assert kept == {"id": made["id"], "expires_in": None}
    expect_row(client.get(f"{path}/keys/{made['key']}").expect(200), expires_in=None)
    assert client.get(path + "/keys?order=expiry").expect(200) == {"keys": [], "next": None}
    done = client.post(path + "/batch", json={"op": "keepalive", "keys": [made["key"]]}).expect(200)
    assert done["done"] == 1


# ------------------------------------------------------------------------------------------------- keys of a pool


def test_every_call_about_keys_is_about_the_pool_of_its_path(importing_server: ServerProcess) -> None:
    """From generate to delete, and `default` knows of nothing."""
    client = importing_server.client()
    path = client.make_pool("openai", max_block_seconds=600)
    with client.expect_moved():
        made = client.post(path + "/keys")
        key = made.expect(201)
        assert made.headers["Location"] == f"{path}/keys/id:{key['id']}"
        assert client.get(made.headers["Location"]).expect(200)["id"] == key["id"]
        lease = client.post(path + "/keys/acquire", json={"owner": "w"}).expect(200)
        assert lease["key"] == key["key"]
        expect_row(client.get(f"{path}/keys/{key['key']}").expect(200), owner="w", state="blocked")
        client.post(f"{path}/keys/{lease['handle']}/extend", json={"seconds": 100}).expect(200)
        client.post(f"{path}/keys/{key['key']}/keepalive").expect(200)
        unblocked = client.post(f"{path}/keys/{lease['handle']}/unblock").expect(200)
        assert unblocked == {"id": key["id"], "state": "available", "changed": True}
        client.post(f"{path}/keys/id:{key['id']}/quarantine").expect(200)
        client.post(f"{path}/keys/id:{key['id']}/restore").expect(200)
        assert client.post(f"{path}/keys/id:{key['id']}/reveal").expect(200)["key"] == key["key"]
        assert client.post(f"{path}/keys/find", json={"key": key["key"]}).expect(200)["id"] == key["id"]
        client.patch(f"{path}/keys/id:{key['id']}", json={"name": "one"}).expect(200)
        client.post(f"{path}/keys/id:{key['id']}/replace", json={"secret": "another"}).expect(200)
        assert [row["id"] for row in client.get(path + "/keys").expect(200)["keys"]] == [key["id"]]
        made_many = client.post(path + "/batch", json={"op": "generate", "count": 3}).expect(201)
        stats = client.get(path + "/stats").expect(200)
        assert (stats["total"], stats["generated"], stats["acquired"]) == (4, 4, 1)
        done = client.post(
            path + "/batch", json={"op": "delete", "keys": [k["key"] for k in made_many["keys"]]}
        )
        assert done.expect(200)["done"] == 3
        client.delete(f"{path}/keys/id:{key['id']}").expect(204)
        client.post(path + "/keys/acquire").expect_problem(404, "no-key-available")
    assert client.get(API + "/keys").expect(200)["keys"] == []


def test_the_paths_without_a_pool_are_about_default(client: Client) -> None:
    """The first version's, too."""
    client.make_pool("openai")
    made = client.make()
    assert client.get(f"{POOLS}/default/keys/{made['key']}").expect(200)["id"] == made["id"]
    under = client.post(POOLS + "/default/keys")
    assert under.headers["Location"] == f"{API}/keys/id:{under.expect(201)['id']}"
    assert client.row(under.json["key"])["id"] == under.json["id"]
    first = client.post(API + "/random_api_key/").expect(201)["api_key"]
    assert client.get(f"{POOLS}/default/keys/{first}").expect(200)["state"] == "available"
    assert client.get(POOLS + "/openai/stats").expect(200)["total"] == 0


def test_ids_leases_and_handles_are_of_their_pool(client: Client) -> None:
    """The same numbers in each, and a handle of one is no key in another."""
    leases = {}
    for name in ("a", "b"):
        path = client.make_pool(name)
        client.post(path + "/keys").expect(201)
        leases[name] = client.post(path + "/keys/acquire").expect(200)
    a, b = leases["a"], leases["b"]
    assert a["handle"] != b["handle"]
    client.post(f"{POOLS}/b/keys/{a['handle']}/unblock").expect_problem(404, "unknown-key")
    client.post(f"{POOLS}/b/keys/{a['key']}/unblock").expect_problem(404, "unknown-key")
    answer = client.post(POOLS + "/b/batch", json={"op": "unblock", "keys": [a["handle"], b["handle"]]})
    assert answer.expect(200) == {"op": "unblock", "done": 1, "unknown": [a["handle"]], "stale": []}
    assert client.get(f"{POOLS}/a/keys/{a['key']}").expect(200)["state"] == "blocked"


def test_an_attempt_is_of_its_pool(client: Client) -> None:
    """The same Idempotency-Key in two pools is two acquires, and a repeat gets its own lease again."""
    got = []
    headers = {"Idempotency-Key": "again", "Content-Type": "application/json"}
    for path in (client.make_pool("a"), client.make_pool("b"), API, f"{POOLS}/a"):
        client.post(path + "/keys").expect(201)
        got.append(client.post(path + "/keys/acquire", headers=headers))
    assert [answer.headers.get("Idempotent-Replayed") for answer in got] == [None, None, None, "true"]
    assert got[3].expect(200)["handle"] == got[0].expect(200)["handle"]
    through = client.post(POOLS + "/default/keys/acquire", headers=headers)
    assert through.headers.get("Idempotent-Replayed") == "true"
    assert through.expect(200)["lease"] == got[2].expect(200)["lease"]


def each_call() -> Iterator[tuple[str, str]]:
    """Method and path of every call about keys, for a pool that isn't there."""
    for template, methods in OF_POOLS.items():
        for method in sorted(methods):
            yield method, template.replace("{pool}", "nope").replace("{key}", "id:1")


@pytest.mark.parametrize(("method", "path"), list(each_call()))
def test_every_call_on_an_unknown_pool_is_404(guarded_server: ServerProcess, method: str, path: str) -> None:
    """After method, token and role, before the body."""
    admin, client = guarded_server.client(ADMIN_TOKEN), guarded_server.client(CLIENT_TOKEN)
    answer = admin.request(method, path, body=b"{")
    assert answer.status == 404, str(answer)
    if method != "HEAD":
        answer.expect_problem(404, "unknown-pool")
        guarded_server.client().request(method, path).expect_problem(401, "unauthorized")
        if client.request(method, path.replace("nope", "default").replace("id:1", "x")).status == 403:
            client.request(method, path).expect_problem(403, "forbidden")
    assert admin.request("PUT" if method != "PUT" else "GET", path).status == 405


def test_who_may_do_what_with_pools(guarded_server: ServerProcess) -> None:
    """Viewers read, admins change, clients do neither."""
    admin, viewer, client = (
        guarded_server.client(token) for token in (ADMIN_TOKEN, VIEWER_TOKEN, CLIENT_TOKEN)
    )
    path = admin.make_pool("openai")
    for method in ("PUT", "PATCH", "DELETE"):
        for who in (viewer, client):
            who.request(method, path).expect_problem(403, "forbidden")
    for asked in (POOLS, path, API + "/rekey"):
        viewer.get(asked).expect(200)
        client.get(asked).expect_problem(403, "forbidden")
    for who in (viewer, client):
        who.post(API + "/rekey").expect_problem(403, "forbidden")
    client.post(path + "/keys/acquire").expect_problem(404, "no-key-available")
    viewer.get(path + "/stats").expect(200)


# ------------------------------------------------------------------------------------------------ deleting a pool


def test_only_an_empty_pool_is_deleted(client: Client) -> None:
    """204 and its name is free again; with keys 409, which says how many."""
    path = client.make_pool("openai", rest_seconds=3)
    made = client.post(path + "/keys").expect(201)
    assert "(1)" in client.delete(path).expect_problem(409, "pool-not-empty")["detail"]
    client.delete(f"{path}?drain=false").expect_problem(409, "pool-not-empty")
    client.delete(f"{path}/keys/{made['key']}").expect(204)
    client.delete(path).expect(204)
    client.get(path).expect_problem(404, "unknown-pool")
    client.delete(path).expect_problem(404, "unknown-pool")
    assert settings_of_new(client, path) == DEFAULTS
    client.get(f"{path}/keys/{made['key']}").expect_problem(404, "unknown-key")


def settings_of_new(client: Client, path: str) -> dict[str, Any]:
    """The settings of a pool that is made now."""
    settings: dict[str, Any] = client.put(path).expect(201)["settings"]
    return settings


def test_a_draining_pool_serves_and_takes_no_key(client: Client) -> None:
    """202 with the row; what nobody holds goes, held keys go when they are given back, and then the pool is gone."""
    path = client.make_pool("openai")
    client.post(path + "/batch", json={"op": "generate", "count": 50}).expect(201)
    lease = client.post(path + "/keys/acquire").expect(200)
    expect_pool(client.delete(path + "?drain=true").expect(202), name="openai", draining=True)
    eventually(lambda: client.get(path).expect(200)["total"] == 1, "what nobody holds is purged")
    secret = {"secret": "sk-1", "expire": True}
    for answer in (
        client.post(path + "/keys"),
        client.post(path + "/keys", json=secret),
        client.post(path + "/keys/acquire"),
        client.post(path + "/keys/acquire", json={"wait": 20}),
        client.post(path + "/batch", json={"op": "generate", "count": 1}),
        client.post(path + "/batch", json={"op": "acquire", "count": 1}),
        client.post(path + "/batch", json={"op": "import", "keys": [{"secret": "x"}], "expire": True}),
        client.put(path, json={"rest_seconds": 1}),
    ):
        answer.expect_problem(409, "pool-draining")
    client.post(f"{path}/keys/{lease['key']}/keepalive").expect(200)
    assert client.get(f"{path}/keys/{lease['key']}").expect(200)["state"] == "blocked"
    assert client.delete(path + "?drain=true").expect(202)["draining"] is True
    client.post(f"{path}/keys/{lease['handle']}/unblock").expect(200)
    gone(client, "openai")
    client.make_pool("openai")
    assert client.get(path + "/stats").expect(200)["total"] == 0


def test_a_pool_may_be_emptied_at_once(client: Client) -> None:
    """`now` doesn't wait for holders, and goes with drain only."""
    path = client.make_pool("openai")
    client.post(path + "/keys").expect(201)
    lease = client.post(path + "/keys/acquire").expect(200)
    client.delete(path + "?now=true").expect_problem(400, "bad-request")
    client.delete(path + "?drain=yes").expect_problem(400, "bad-request")
    client.delete(path + "?drain").expect_problem(400, "bad-request")
    assert client.get(path).expect(200)["draining"] is False
    assert client.delete(path + "?drain=true&now=true").status in (202, 204)
    gone(client, "openai")
    client.post(f"{path}/keys/{lease['key']}/unblock").expect_problem(404, "unknown-pool")


def test_waiters_of_a_draining_pool_are_answered_at_once(server: ServerProcess, client: Client) -> None:
    """Those of other pools wait on."""
    path = client.make_pool("openai")
    answers: dict[str, Answer] = {}

    def wait(at: str) -> None:
        with server.client() as waiter:
            answers[at] = waiter.post(f"{at}/keys/acquire", json={"wait": 30})

    threads = [threading.Thread(target=wait, args=(at,)) for at in (path, API)]
    for thread in threads:
        thread.start()
    client.post(path + "/keys/acquire").expect_problem(404, "no-key-available")
    eventually(lambda: client.get(path).expect(200)["waiting"] == 1, "a waiter in the pool")
    client.expect_waiting(1)
    client.delete(path + "?drain=true")
    threads[0].join(60)
    answers[path].expect_problem(409, "pool-draining")
    client.expect_waiting(1)
    client.make()
    threads[1].join(60)
    answers[API].expect(200)


# -------------------------------------------------------------------------------------- tokens for some pools


@pytest.fixture
def limited(start_server: Start, tmp_path: Path) -> ServerProcess:
    """A server with pools a and b, and with tokens of each role for a; the client may hold one lease."""
    file = tmp_path / "tokens.toml"
    file.write_text(
        "".join(
            f'[tokens.{role}-of-a]\nrole = "{role}"\npools = ["a", "new"]\n'
            f'digest = "{hashlib.sha256(of_a(role).encode()).hexdigest()}"\n'
            + ("max_held = 1\n" if role == "client" else "")
            for role in ("client", "viewer", "admin")
        )
    )
    env = {"KEYPOOL_ADMIN_TOKEN": ADMIN_TOKEN}
    server = start_server(f"--tokens={file}", env=env, admin_token=ADMIN_TOKEN)
    server.secrets.update([ADMIN_TOKEN, *map(of_a, ("client", "viewer", "admin"))])
    with server.client(ADMIN_TOKEN) as admin:
        for name in ("a", "b"):
            admin.post(admin.make_pool(name) + "/batch", json={"op": "generate", "count": 3}).expect(201)
    return server


def of_a(role: str) -> str:
    """A token for the pool a alone."""
    return f"{role}-token-for-pool-a"


def test_a_token_of_some_pools_finds_no_other(limited: ServerProcess) -> None:
    """404, as if there were none; `default` and the first version's paths too, unless the list names it."""
    admin, viewer, client = (limited.client(of_a(role)) for role in ("admin", "viewer", "client"))
    client.post(POOLS + "/a/keys/acquire").expect(200)
    assert viewer.get(POOLS + "/a/stats").expect(200)["blocked"] == 1
    for path in (POOLS + "/b", POOLS + "/default", API):
        client.post(path + "/keys/acquire").expect_problem(404, "unknown-pool")
        client.post(path + "/batch", json={"op": "acquire", "count": 1}).expect_problem(404, "unknown-pool")
        viewer.get(path + "/keys").expect_problem(404, "unknown-pool")
        viewer.get(path + "/stats").expect_problem(404, "unknown-pool")
        admin.post(path + "/keys").expect_problem(404, "unknown-pool")
        client.post(path + "/keys").expect_problem(403, "forbidden")
    client.get(API + "/random_api_key").expect_problem(404, "unknown-pool")
    assert names(viewer) == ["a"]
    assert names(limited.client(ADMIN_TOKEN)) == ["a", "b", "default"]


def test_an_admin_of_some_pools_makes_and_changes_only_those(limited: ServerProcess) -> None:
    """Nor may it do what is about all pools."""
    admin = limited.client(of_a("admin"))
    for name in ("b", "c", "default"):
        for method in ("GET", "PUT", "PATCH", "DELETE"):
            admin.request(method, f"{POOLS}/{name}").expect_problem(404, "unknown-pool")
    admin.patch(POOLS + "/a", json={"rest_seconds": 1}).expect(200)
    admin.make_pool("new")
    admin.delete(POOLS + "/new").expect(204)
    admin.post(API + "/rekey").expect_problem(403, "forbidden")
    assert names(limited.client(ADMIN_TOKEN)) == ["a", "b", "default"]


def test_who_holds_its_share_gets_no_more(limited: ServerProcess) -> None:
    """429 with a hint when to try again, alone and in a batch; its name stands in the row."""
    client, viewer = limited.client(of_a("client")), limited.client(of_a("viewer"))
    lease = client.post(POOLS + "/a/keys/acquire").expect(200)
    row = expect_row(viewer.get(f"{POOLS}/a/keys/id:{lease['id']}").expect(200), client="client-of-a")
    assert row["state"] == "blocked"
    for path, body in (("keys/acquire", {}), ("batch", {"op": "acquire", "count": 2})):
        answer = client.post(f"{POOLS}/a/{path}", json=body)
        answer.expect_problem(429, "share-spent")
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
    client.post(f"{POOLS}/a/keys/{lease['handle']}/unblock").expect(200)
    many = client.post(POOLS + "/a/batch", json={"op": "acquire", "count": 2}).expect(200)
    assert len(many["keys"]) == 1


# ------------------------------------------------------------------------------------------------------ audit


def test_what_is_done_to_pools_is_in_the_audit_log(server: ServerProcess, client: Client) -> None:
    """With the pool's name and the settings that were given; calls about its keys name the pool too."""
    line = len(server.log_since(0))
    path = client.make_pool("openai", block_seconds=300, keepalive_seconds=None)
    client.patch(path, json={"rest_seconds": 1.5}).expect(200)
    made = client.post(path + "/keys").expect(201)
    client.delete(path + "?drain=true&now=true")
    gone(client, "openai")
    for wanted in (
        "pool-put by admin .*: pool openai, block seconds 300, keepalive seconds null",
        "pool-change by admin .*: pool openai, rest seconds 1.5",
        f"generate by admin .*: id:{made['id']} .*, pool openai",
        "pool-delete by admin .*: pool openai, drain now",
    ):
        eventually_logged(server, line, wanted)


def eventually_logged(server: ServerProcess, line: int, pattern: str) -> None:
    """Wait for a line of the log from this one on."""
    eventually(
        lambda: any(re.search(pattern, each) for each in server.log_since(line)), f"a line with {pattern}"
    )


def test_refused_calls_on_pools_leave_no_line(server: ServerProcess, client: Client) -> None:
    """And names that are none are never written."""
    line = len(server.log_since(0))
    client.delete(POOLS + "/default").expect_problem(409, "pool-fixed")
    client.put(POOLS + "/A%0Apool-put").expect_problem(400, "bad-request")
    client.patch(POOLS + "/nope", json={"rest_seconds": 1}).expect_problem(404, "unknown-pool")
    client.make()
    eventually_logged(server, line, "generate by")
    assert not any("pool-" in each for each in server.log_since(line))
