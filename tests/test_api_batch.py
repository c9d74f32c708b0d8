"""`POST /batch`: each op item by item as the single call would, in order,
and refused as a whole when it is wrong.
"""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Start
from support import (
    ACQUIRE,
    ADMIN_TOKEN,
    API,
    CLIENT_TOKEN,
    HANDLE,
    KEY_TEXT,
    Client,
    ServerProcess,
    expect_left,
    expect_object,
    expect_row,
    pass_until,
)

PATH = API + "/batch"


def unblock(client: Client, key: str) -> None:
    """Free a key."""
    client.post(f"{API}/keys/{key}/unblock").expect(200)


# ------------------------------------------------------------------------------------------------ generate


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_batch_generate_answers_keys_as_the_single_call(client: Client, count: int) -> None:
    """201 with so many keys, each as POST /keys answers it, ids growing."""
    with client.expect_moved(generated=count, total=count, available=count):
        answer = client.batch(op="generate", count=count)
        keys = expect_object(answer.expect(201), op="generate", keys=list)["keys"]
    assert len(keys) == count
    for made in keys:
        expect_object(made, id=int, key=KEY_TEXT, state="available", expires_in=float)
        expect_left(made["expires_in"], 300, answer, answer)
    ids = [made["id"] for made in keys]
    assert ids == sorted(set(ids))
    assert len({made["key"] for made in keys}) == count


def test_batch_generate_is_all_or_none_at_max_keys(lend: Start) -> None:
    """409 pool-full and not one key made when not all fit; exactly what fits succeeds."""
    client = lend("--max-keys=10").client()
    client.make_many(4)
    with client.expect_moved():
        client.batch(op="generate", count=7).expect_problem(409, "pool-full")
    client.make_many(6)
    with client.expect_moved():
        client.batch(op="generate", count=1).expect_problem(409, "pool-full")


# ------------------------------------------------------------------------------------------------- acquire


def test_batch_acquire_answers_keys_as_the_single_call(client: Client) -> None:
    """200 with so many different keys, each with a lease of its own that grows, all with the owner."""
    started = client.batch(op="generate", count=10)
    made = {one["id"]: one["key"] for one in started.expect(201)["keys"]}
    with client.expect_moved(acquired=6, available=-6, blocked=6):
        answer = client.batch(op="acquire", count=6, owner="crew")
        keys = expect_object(answer.expect(200), op="acquire", keys=list)["keys"]
    assert len({served["key"] for served in keys}) == len(keys) == 6
    leases = [served["lease"] for served in keys]
    assert leases == sorted(set(leases)), f"leases do not grow: {leases}"
    for served in keys:
        expect_object(
            served,
            id=int,
            key=made[served["id"]],
            lease=int,
            handle=HANDLE,
            release_in=float,
            expires_in=float,
        )
        expect_left(served["release_in"], 60, answer, answer)
        expect_left(served["expires_in"], 300, started, answer)
        expect_row(client.row(served["key"]), state="blocked", owner="crew", lease=served["lease"])


def test_batch_acquire_serves_fewer_when_fewer_are_free(client: Client) -> None:
    """All that are available, without an error and without counting a refusal."""
    client.make_many(3)
    with client.expect_moved(acquired=3, available=-3, blocked=3):
        assert len(client.batch(op="acquire", count=1000).expect(200)["keys"]) == 3


def test_batch_acquire_without_a_free_key_is_404(client: Client) -> None:
    """no-key-available, one refusal, with Retry-After when some key is blocked."""
    with client.expect_moved(refused=1):
        answer = client.batch(op="acquire", count=5)
        assert "retry_after" not in answer.expect_problem(404, "no-key-available")
    client.make()
    started = client.post(ACQUIRE)
    with client.expect_moved(refused=1):
        answer = client.batch(op="acquire", count=5)
        problem = answer.expect_problem(404, "no-key-available")
    expect_left(problem["retry_after"], 60, started, answer)
    assert 1 <= int(answer.headers["Retry-After"]) <= 60


def test_batch_acquire_without_owner_or_with_null_has_no_holder(client: Client) -> None:
    """owner is optional."""
    client.make_many(2)
    for body in ({}, {"owner": None}):
        [served] = client.batch(op="acquire", count=1, **body).expect(200)["keys"]
        assert client.row(served["key"])["owner"] is None


# ----------------------------------------------------------------------------------------------- keepalive


def test_batch_keepalive_answers_done_and_unknown(client: Client) -> None:
    """done counts items, a key given twice twice; unknown holds the texts as sent, in their order,
    as often as sent.
    """
    made = client.make_many(3)
    client.acquire()
    keys = [made[0]["key"], "nope", made[1]["key"], made[0]["key"], "ключ", "nope", made[2]["key"]]
    with client.expect_moved(kept_alive=4):
        answer = client.batch(op="keepalive", keys=keys)
    expect_object(answer.expect(200), op="keepalive", done=4, unknown=["nope", "ключ", "nope"], stale=[])
    for one in made:
        row_answer = client.get(f"{API}/keys/{one['key']}")
        expect_left(row_answer.expect(200)["expires_in"], 300, answer, row_answer)


def test_batch_keepalive_does_not_lengthen_blocks(client: Client) -> None:
    """release_in goes on falling."""
    keys = [one["key"] for one in client.make_many(3)]
    started = client.batch(op="acquire", count=3)
    started.expect(200)
    pass_until(started.answered_at + 0.3)
    client.batch(op="keepalive", keys=keys).expect(200)
    for key in keys:
        row_answer = client.get(f"{API}/keys/{key}")
        expect_left(row_answer.expect(200)["release_in"], 60, started, row_answer)


# ------------------------------------------------------------------------------------------------- unblock


def test_batch_unblock_goes_item_by_item(client: Client) -> None:
    """Done with or without lease, a free key too; stale and unknown hold the key texts, in order,
    as often as sent.
    """
    keys = [one["key"] for one in client.make_many(6)]
    old = {one["key"]: one["lease"] for one in client.batch(op="acquire", count=6).expect(200)["keys"]}
    client.batch(op="unblock", keys=keys).expect(200)
    new = {one["key"]: one["lease"] for one in client.batch(op="acquire", count=6).expect(200)["keys"]}
    unblock(client, keys[5])
    items = [
        keys[0],  # done
        {"key": keys[1]},  # done
        {"key": keys[2], "lease": new[keys[2]]},  # done
        {"key": keys[3], "lease": old[keys[3]]},  # stale, stays blocked
        {"key": keys[4], "lease": None},  # done
        {"key": keys[5], "lease": new[keys[5]]},  # done: it is free already
        {"key": keys[5], "lease": old[keys[5]]},  # stale, though free
        "nope",  # unknown
        {"key": "nix", "lease": 1},  # unknown
        keys[0],  # done again, changing nothing
        {"key": keys[0], "lease": old[keys[0]]},  # stale
        "nope",  # unknown again
    ]
    with client.expect_moved(unblocked=4, blocked=-4, available=4):
        answer = client.batch(op="unblock", keys=items)
    expect_object(
        answer.expect(200),
        op="unblock",
        done=6,
        unknown=["nope", "nix", "nope"],
        stale=[keys[3], keys[5], keys[0]],
    )
    states = [client.row(key)["state"] for key in keys]
    assert states == ["available", "available", "available", "blocked", "available", "available"]


def test_batch_unblock_of_a_stale_lease_then_the_latest(client: Client) -> None:
    """Items are taken in order: a stale one does not spoil a good one for the same key."""
    key = client.make()["key"]
    old = client.acquire()["lease"]
    unblock(client, key)
    new = client.acquire()["lease"]
    items = [{"key": key, "lease": old}, {"key": key, "lease": new}, {"key": key, "lease": old}]
    answer = client.batch(op="unblock", keys=items)
    expect_object(answer.expect(200), op="unblock", done=1, unknown=[], stale=[key, key])
    assert client.row(key)["state"] == "available"


# -------------------------------------------------------------------------------------------------- delete


def test_batch_delete_answers_done_and_unknown(client: Client) -> None:
    """A key given twice is unknown the second time; blocked keys go as well."""
    made = client.make_many(4)
    blocked = client.acquire()["key"]
    keys = [made[0]["key"], made[1]["key"], made[0]["key"], "nope", made[1]["key"]]
    lost = 1 if blocked in keys else 0
    with client.expect_moved(deleted=2, total=-2, blocked=-lost, available=lost - 2):
        answer = client.batch(op="delete", keys=keys)
    expect_object(
        answer.expect(200), op="delete", done=2, unknown=[made[0]["key"], "nope", made[1]["key"]], stale=[]
    )
    assert [row["id"] for row in client.get(API + "/keys").expect(200)["keys"]] == [
        made[2]["id"],
        made[3]["id"],
    ]


# ----------------------------------------------------------------------------------------- all that take keys


@pytest.mark.parametrize("op", ["keepalive", "unblock", "delete"])
def test_ids_stand_for_keys_in_a_batch(client: Client, op: str) -> None:
    """`id:42` as in paths, unknown ones as they were sent."""
    made = client.make_many(2)
    answer = client.batch(op=op, keys=[f"id:{made[0]['id']}", "id:999999999999", made[1]["key"], "id:x"])
    assert answer.status == 200, str(answer)
    assert answer.json["done"] == 2
    assert answer.json["unknown"] == ["id:999999999999", "id:x"]


def test_ids_stand_for_keys_in_items_with_a_lease(client: Client) -> None:
    """Both forms of an item take both names of a key."""
    made = client.make()
    lease = client.acquire()["lease"]
    name = f"id:{made['id']}"
    answer = client.batch(
        op="unblock", keys=[{"key": name, "lease": lease + 1}, {"key": name, "lease": lease}]
    )
    expect_object(answer.expect(200), op="unblock", done=1, unknown=[], stale=[name])


@pytest.mark.parametrize("op", ["keepalive", "unblock", "delete"])
def test_a_thousand_items_are_taken(client: Client, op: str) -> None:
    """The largest batch."""
    keys = [one["key"] for one in client.make_many(1000)]
    assert client.batch(op=op, keys=keys).expect(200)["done"] == 1000


@pytest.mark.parametrize("op", ["keepalive", "unblock", "delete"])
def test_texts_that_are_not_keys_are_unknown_as_they_were_sent(client: Client, op: str) -> None:
    """Long, non-ASCII, with control characters: returned unchanged."""
    texts = ["x" * 5000, "ключ", "🦊", "a\nb", "\u0000", " ", "a/b", "%41", "\\u0041"]
    client.make()
    with client.expect_moved():
        assert client.batch(op=op, keys=texts).expect(200)["unknown"] == texts


# ------------------------------------------------------------------------------------------------- refused

WRONG_KEYS: list[dict[str, Any]] = [
    {}, {"keys": None}, {"keys": []}, {"keys": "K"}, {"keys": {"key": "K"}}, {"keys": ["K", 5]},
    {"keys": ["K", None]}, {"keys": ["K", ["K"]]}, {"keys": ["K", True]}, {"keys": ["K"] * 1001},
    {"keys": ["K"], "count": 1}, {"keys": ["K"], "lease": 1}, {"keys": ["K"], "more": None},
]  # fmt: skip
WRONG_COUNTS: list[dict[str, Any]] = [{}, *({"count": count} for count in (0, 1001, "1")), {"keys": ["K"]}]
WRONG: list[Any] = [
    {}, {"op": None}, {"op": "Generate", "count": 1}, {"op": "reveal", "keys": ["K"]}, {"op": 5, "count": 1},
    {"op": ["generate"], "count": 1}, {"count": 1}, {"keys": ["K"]},
    *({"op": op} | rest for op in ("generate", "acquire") for rest in WRONG_COUNTS),
    *({"op": "generate", "count": count} for count in (None, -1, 10**30, 1.5, True, [1])),
    {"op": "generate", "count": 1, "owner": "me"}, {"op": "generate", "count": 1, "keys": ["K"]},
    {"op": "generate", "count": 1, "more": 1}, {"op": "acquire", "count": 1, "wait": 1},
    *({"op": "acquire", "count": 1, "owner": owner} for owner in ("", "x" * 201, "a\nb", 7)),
    *({"op": op} | rest for op in ("keepalive", "unblock", "delete") for rest in WRONG_KEYS),
    {"op": "keepalive", "keys": ["K", {"key": "K"}]}, {"op": "delete", "keys": ["K", {"key": "K", "lease": 1}]},
    *({"op": "unblock", "keys": ["K", item]} for item in ({}, {"lease": 1}, {"key": None}, {"key": 5})),
    *({"op": "unblock", "keys": ["K", {"key": "K", "lease": lease}]} for lease in ("1", 1.5, True)),
    {"op": "unblock", "keys": ["K", {"key": "K", "owner": "me"}]},
    [], ["keepalive"], "generate", 1, True, [{"op": "generate", "count": 1}],
]  # fmt: skip


def with_key(value: Any, key: str) -> Any:
    """`value` with a real key in the place of every "K"."""
    if isinstance(value, dict):
        return {name: with_key(one, key) for name, one in value.items()}
    if isinstance(value, list):
        return [with_key(one, key) for one in value]
    return key if value == "K" else value


@pytest.mark.once
def test_a_wrong_batch_is_refused_as_a_whole(client: Client) -> None:
    """400 bad-request, and not even the items before the wrong one have an effect."""
    client.make_many(3)
    held = client.acquire()
    with client.expect_moved():
        for body in WRONG:
            answer = client.post(PATH, json=with_key(body, held["key"]))
            assert answer.status == 400, f"of {str(body)[:70]}: {answer}"
            answer.expect_problem(400, "bad-request")
    expect_row(client.row(held["key"]), state="blocked", lease=held["lease"])


def test_a_batch_without_a_body_is_refused(client: Client) -> None:
    """400 that lists the values of op, or demands a body."""
    client.post(PATH).expect_problem(400, "bad-request")


def test_ids_are_not_for_clients_in_a_batch_either(guarded_server: ServerProcess) -> None:
    """403 for the whole of it, and the keys that a client may name are left alone."""
    admin, client = guarded_server.client(ADMIN_TOKEN), guarded_server.client(CLIENT_TOKEN)
    made = admin.make_many(2)
    served = client.batch(op="acquire", count=2).expect(200)["keys"][0]
    for op in ("keepalive", "unblock"):
        with admin.expect_moved():
            client.batch(op=op, keys=[served["key"], f"id:{made[0]['id']}"]).expect_problem(403, "forbidden")
    with admin.expect_moved():
        items = [served["key"], {"key": f"id:{served['id']}", "lease": served["lease"]}]
        client.batch(op="unblock", keys=items).expect_problem(403, "forbidden")
    client.batch(op="keepalive", keys=[served["key"]]).expect(200)
