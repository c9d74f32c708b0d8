"""The life of one key over HTTP: generate, acquire, unblock, keepalive, delete, read, reveal,
and its two deadlines.
"""

from __future__ import annotations

import math
import re
import string
import time
from datetime import datetime
from itertools import pairwise
from typing import Any
from urllib.parse import quote

import pytest
from conftest import Start
from support import (
    ACQUIRE,
    API,
    EARLY,
    HANDLE,
    KEY_TEXT,
    LATE,
    SHORT_BLOCK,
    SHORT_LIFE,
    Answer,
    Client,
    ServerProcess,
    chance_of,
    eventually,
    expect_left,
    expect_object,
    expect_row,
    hint,
    pass_until,
)

ONE_IN_1E11 = 1e-11


def key_path(key: str, call: str = "") -> str:
    """The path of a call about one key."""
    return f"{API}/keys/{key}{'/' + call if call else ''}"


def take(client: Client, **body: object) -> tuple[Answer, dict[str, Any]]:
    """A key served, with the answer that served it."""
    answer = client.post(ACQUIRE, json=body)
    return answer, answer.expect(200)


# --------------------------------------------------------------------------------------------------- generate


def test_generate_answers_the_new_key(client: Client) -> None:
    """201 with id, key, state and the whole of expires_in, and nothing else."""
    answer = client.post(API + "/keys")
    made = expect_object(answer.expect(201), id=int, key=KEY_TEXT, state="available", expires_in=float)
    expect_left(made["expires_in"], 300, answer, answer)


def test_location_of_a_generated_key_leads_to_its_row(client: Client) -> None:
    """Location is the key's path by its public id, and holds no key text."""
    answer = client.post(API + "/keys")
    made = answer.expect(201)
    assert answer.headers["Location"] == f"/api/v1/keys/id:{made['id']}"
    expect_row(client.get(answer.headers["Location"]).expect(200), id=made["id"], hint=hint(made["key"]))


def test_no_key_or_id_is_generated_twice(client: Client) -> None:
    """Thousands of keys, some of them deleted meanwhile: all texts and all ids differ, ids grow."""
    made = client.make_many(1000)
    client.batch(op="delete", keys=[one["key"] for one in made[::2]]).expect(200)
    made += client.make_many(1000)
    made.append(client.make())
    assert len({one["key"] for one in made}) == 2001
    ids = [one["id"] for one in made]
    assert len(set(ids)) == 2001, "ids were used again or do not grow"
    assert ids == sorted(ids), "ids were used again or do not grow"


@pytest.mark.chance
def test_key_texts_use_the_whole_alphabet_evenly(client: Client) -> None:
    """20 characters of A-Z a-z 0-9, each as likely as another (a false alarm is rarer than one in 10^9)."""
    text = "".join(one["key"] for one in client.make_many(1000))
    alphabet = string.ascii_letters + string.digits
    assert set(text) <= set(alphabet)
    assert len(text) == 20_000
    for character in alphabet:
        count = text.count(character)
        chance = chance_of(count, len(text), 1 / len(alphabet))
        assert chance > ONE_IN_1E11 / 10, f"{character!r} stands {count} times in 20000 characters"


@pytest.mark.parametrize("length", [16, 64])
def test_key_length_sets_the_length_of_new_keys(start_server: Start, length: int) -> None:
    """--key-length from 16 to 64: keys of that length live as any other."""
    client = start_server(f"--key-length={length}").client()
    key = client.make()["key"]
    assert re.fullmatch(rf"[A-Za-z0-9]{{{length}}}", key), key
    assert client.row(key)["hint"] == hint(key)
    assert client.acquire()["key"] == key
    expect_object(client.post(key_path(key, "unblock")).expect(200), id=int, state="available", changed=True)


def test_generate_over_max_keys_is_pool_full(lend: Start) -> None:
    """409 pool-full at --max-keys, blocked keys counted, nothing made; a deleted key makes room for one."""
    client = lend("--max-keys=2").client()
    first, _ = client.make(), client.make()
    client.acquire()
    with client.expect_moved():
        client.post(API + "/keys").expect_problem(409, "pool-full")
    client.delete(key_path(first["key"])).expect(204)
    client.make()
    client.post(API + "/keys").expect_problem(409, "pool-full")


def test_an_expired_key_makes_room_under_max_keys(lend: Start) -> None:
    """A key whose expires passed no longer counts."""
    client = lend("--max-keys=1", "--keepalive-seconds=0.3").client()
    first = client.make()
    made = eventually(lambda: (one := client.post(API + "/keys")).status == 201 and one, "room for a new key")
    assert made
    assert made.json["id"] > first["id"]


def test_no_body_or_an_empty_object_is_right(client: Client) -> None:
    """Where no body is due or all of it is optional, none and `{}`, with or without a type, are right."""
    spaced = {"body": b" {\r\n\t} ", "headers": {"Content-Type": "application/json; charset=utf-8"}}
    bodies: list[dict[str, Any]] = [{}, {"json": {}}, {"body": b"{}"}, spaced]
    for method, path, status in (
        ("POST", API + "/keys", 201),
        ("POST", key_path("{key}", "keepalive"), 200),
        ("POST", key_path("{key}", "reveal"), 200),
        ("GET", key_path("{key}"), 200),
        ("DELETE", key_path("{key}"), 204),
        ("GET", API + "/keys", 200),
        ("GET", API + "/stats", 200),
        ("POST", ACQUIRE, 200),
        ("POST", key_path("{key}", "unblock"), 200),
    ):
        for body in bodies:
            key = client.make()["key"]
            client.request(method, path.replace("{key}", key), **body).expect(status)


# ---------------------------------------------------------------------------------------------------- acquire


def test_acquire_answers_the_key_and_its_lease(client: Client) -> None:
    """200 with id, key, lease, the whole of release_in and what is left of expires_in."""
    made_answer = client.post(API + "/keys")
    made = made_answer.expect(201)
    answer, served = take(client)
    expect_object(
        served, id=made["id"], key=made["key"], lease=int, handle=HANDLE, release_in=float, expires_in=float
    )
    expect_left(served["release_in"], 60, answer, answer)
    expect_left(served["expires_in"], 300, made_answer, answer)


def test_acquire_on_an_empty_pool_is_404_without_retry_after(client: Client) -> None:
    """An empty pool has no release to wait for, so neither Retry-After nor retry_after."""
    answer = client.post(ACQUIRE)
    problem = answer.expect_problem(404, "no-key-available")
    assert "Retry-After" not in answer.headers, str(answer)
    assert "retry_after" not in problem, str(answer)


def test_acquire_with_all_blocked_names_the_earliest_release(client: Client) -> None:
    """Retry-After is retry_after in whole seconds, rounded up, and that is the earliest release of all."""
    client.make_many(3)
    first_answer, _ = take(client)
    pass_until(first_answer.answered_at + 0.2)
    take(client)
    take(client)
    answer = client.post(ACQUIRE)
    problem = answer.expect_problem(404, "no-key-available")
    expect_left(problem["retry_after"], 60, first_answer, answer)
    seconds = int(answer.headers["Retry-After"])
    assert math.ceil(problem["retry_after"] - 0.002) <= seconds <= math.ceil(problem["retry_after"] + 0.002)


def test_retry_after_is_at_least_one_second(lend: Start) -> None:
    """A release in less than a second is one whole second in the header; the number is exact."""
    client = lend("--block-seconds=0.7").client()
    client.make()
    started, _ = take(client)
    answer = client.post(ACQUIRE)
    if answer.status == 404:  # else the machine was so slow that the block was over
        problem = answer.expect_problem(404, "no-key-available")
        assert answer.headers["Retry-After"] == "1", str(answer)
        expect_left(problem["retry_after"], 0.7, started, answer)


def test_a_key_is_served_once_until_it_is_free(client: Client) -> None:
    """As many acquires as keys serve each key once, one more is refused, and a freed key is served again."""
    made = {one["key"] for one in client.make_many(20)}
    served = [client.acquire()["key"] for _ in range(20)]
    assert set(served) == made
    assert len(set(served)) == 20
    client.post(ACQUIRE).expect_problem(404, "no-key-available")
    client.post(key_path(served[7], "unblock")).expect(200)
    assert client.acquire()["key"] == served[7]


def test_leases_grow_with_every_acquire_of_any_form(client: Client) -> None:
    """Each lease is greater than all before it, over all keys and all forms of acquire."""
    client.make_many(8)
    leases = [client.acquire()["lease"], client.acquire()["lease"]]
    leases += [one["lease"] for one in client.batch(op="acquire", count=3).expect(200)["keys"]]
    legacy = client.get(API + "/random_api_key/").expect(200)["api_key"]
    leases.append(client.row(legacy)["lease"])
    served = client.acquire()
    leases.append(served["lease"])
    client.post(key_path(served["key"], "unblock")).expect(200)
    leases.append(client.acquire()["lease"])
    assert all(one < later for one, later in pairwise(leases)), leases


@pytest.mark.chance
def test_acquire_serves_every_available_key_alike(client: Client) -> None:
    """Uniformly random: no key, and none by how lately it was freed, comes oftener or rarer than chance allows.

    Each of the counts is bounded by its exact binomial tail, so that a false alarm is rarer than one in 10^9.
    """
    keys = [one["key"] for one in client.make_many(8)]
    draws = 1600
    served = []
    for _ in range(draws):
        served.append(client.acquire()["key"])
        client.post(key_path(served[-1], "unblock")).expect(200)
    for key in keys:
        count = served.count(key)
        assert chance_of(count, draws, 1 / 8) > ONE_IN_1E11, (
            f"key {keys.index(key)} of 8 came {count} times in {draws}"
        )
    freed = list(keys)  # the last freed at the end
    ranks = []
    for key in served:
        ranks.append(freed.index(key))
        freed.append(freed.pop(ranks[-1]))
    for rank in range(8):
        count = ranks.count(rank)
        assert chance_of(count, draws, 1 / 8) > ONE_IN_1E11, (
            f"of 8, the {rank + 1}th longest free came {count} times in {draws}"
        )


@pytest.mark.chance
def test_the_order_of_making_does_not_matter_to_acquire(client: Client) -> None:
    """Keys made early, late or in between are served alike.

    By Hoeffding's inequality, which holds for draws without replacement too, a mean of 4000 places in 0 to 1
    is off by 0.055 with a chance under 10^-10.
    """
    places = []
    for _ in range(40):
        made = [one["id"] for one in client.make_many(1000)]
        served = client.batch(op="acquire", count=100).expect(200)["keys"]
        places += [made.index(one["id"]) / 999 for one in served]
        client.batch(op="delete", keys=[f"id:{one}" for one in made]).expect(200)
    mean = sum(places) / len(places)
    assert abs(mean - 0.5) < 0.055, f"keys made {'early' if mean < 0.5 else 'late'} are preferred: {mean}"
    spread = sum(abs(place - 0.5) * 2 for place in places) / len(places)
    assert abs(spread - 0.5) < 0.055, f"the middle or the ends are preferred: {spread}"


def test_a_crowd_of_keys_is_served_in_no_order(client: Client) -> None:
    """30 keys of 30 come in an order of chance, neither as made nor backwards (one in 10^32 each)."""
    made = [one["id"] for one in client.make_many(30)]
    served = [one["id"] for one in client.batch(op="acquire", count=30).expect(200)["keys"]]
    assert sorted(served) == made
    assert served not in (made, made[::-1]), "the keys came in the order of their ids"


def test_the_row_has_the_owner_while_the_key_is_blocked(client: Client) -> None:
    """1 to 200 characters, of any script, name the holder; a freed key has none."""
    key = client.make()["key"]
    for owner in ("w", "worker-7", "x" * 200, "Наташа 🦊 naïve", "🦊" * 200, " ", '"\\</script>'):
        client.acquire(owner=owner)
        assert client.row(key)["owner"] == owner
        client.post(key_path(key, "unblock")).expect(200)
        assert client.row(key)["owner"] is None
    client.acquire()
    assert client.row(key)["owner"] is None, "the new lease has the owner of the one before"


def test_null_for_optional_fields_of_acquire_is_as_absent(client: Client) -> None:
    """`{"owner":null,"wait":null}` is `{}`."""
    client.make()
    key = client.acquire(owner=None, wait=None)["key"]
    assert client.row(key)["owner"] is None
    client.post(ACQUIRE, json={"owner": None, "wait": None}).expect_problem(404, "no-key-available")


# ---------------------------------------------------------------------------------------------------- unblock


def test_unblock_frees_a_blocked_key(client: Client) -> None:
    """200 with id, state available and changed true;
    it can be served again, and another unblock changes nothing.
    """
    made = client.make()
    client.acquire()
    with client.expect_moved(available=1, blocked=-1, unblocked=1):
        answer = client.post(key_path(made["key"], "unblock"))
        expect_object(answer.expect(200), id=made["id"], state="available", changed=True)
    with client.expect_moved():
        answer = client.post(key_path(made["key"], "unblock"))
        expect_object(answer.expect(200), id=made["id"], state="available", changed=False)
    assert client.acquire()["key"] == made["key"]


def test_unblocking_a_key_never_served_succeeds_and_changes_nothing(client: Client) -> None:
    """changed is false, and the key stands in the pool once: it is served once."""
    made = client.make()
    for _ in range(3):
        answer = client.post(key_path(made["key"], "unblock"))
        expect_object(answer.expect(200), id=made["id"], state="available", changed=False)
    client.acquire()
    client.post(ACQUIRE).expect_problem(404, "no-key-available")


def test_unblock_does_not_move_the_other_deadline(client: Client) -> None:
    """expires is as it was: only keepalive moves it."""
    made_answer = client.post(API + "/keys")
    key = made_answer.expect(201)["key"]
    client.acquire()
    client.post(key_path(key, "unblock")).expect(200)
    row_answer = client.get(key_path(key))
    expect_left(row_answer.expect(200)["expires_in"], 300, made_answer, row_answer)


def test_unblock_with_the_latest_lease_frees_the_key(client: Client) -> None:
    """changed true, and false when the holder repeats it."""
    made = client.make()
    lease = client.acquire()["lease"]
    path = key_path(made["key"], "unblock")
    expect_object(
        client.post(path, json={"lease": lease}).expect(200), id=made["id"], state="available", changed=True
    )
    expect_object(
        client.post(path, json={"lease": lease}).expect(200), id=made["id"], state="available", changed=False
    )


@pytest.mark.parametrize("situation", ["blocked again", "free again", "never served"])
def test_unblock_with_any_other_lease_is_stale(client: Client, situation: str) -> None:
    """409 stale-lease with a detail, and nothing changes: the key of the new holder stays blocked."""
    other = client.make()
    other_lease = client.acquire()["lease"]
    made = client.make()
    path = key_path(made["key"], "unblock")
    latest = earlier = other_lease
    if situation != "never served":
        earlier = client.acquire()["lease"]
        client.post(path, json={"lease": earlier}).expect(200)
        latest = client.acquire()["lease"]
    if situation == "free again":
        client.post(path, json={"lease": latest}).expect(200)
    client.post(key_path(other["key"], "unblock")).expect(200)
    before = client.row(made["key"])
    with client.expect_moved():
        for lease in (0, earlier, other_lease, latest + 1, 2**53 - 1):
            client.post(path, json={"lease": lease}).expect_problem(409, "stale-lease")
    after = client.row(made["key"])
    for name in ("state", "owner", "lease"):
        assert after[name] == before[name], f"{name} moved from {before[name]} to {after[name]}"


def test_a_holder_that_comes_after_its_release_gets_changed_false_or_409(lend: Start) -> None:
    """Its lease is still the latest: changed false;
    once the key was served again, it is stale and frees nothing.
    """
    client = lend("--block-seconds=0.3").client()
    made = client.make()
    lease = client.acquire()["lease"]
    path = key_path(made["key"], "unblock")
    eventually(lambda: client.row(made["key"])["state"] == "available", "release on time")
    expect_object(
        client.post(path, json={"lease": lease}).expect(200), id=made["id"], state="available", changed=False
    )
    new_answer, new = take(client)
    client.post(path, json={"lease": lease}).expect_problem(409, "stale-lease")
    row_answer = client.get(key_path(made["key"]))
    assert row_answer.expect(200)["lease"] == new["lease"]
    if row_answer.answered_at < new_answer.asked_at + 0.3 - EARLY:
        assert row_answer.json["state"] == "blocked", "a stale holder freed somebody else's key"


def test_null_for_the_lease_is_as_absent(client: Client) -> None:
    """`{"lease":null}` frees the key whatever its lease."""
    made = client.make()
    client.acquire()
    answer = client.post(key_path(made["key"], "unblock"), json={"lease": None})
    expect_object(answer.expect(200), id=made["id"], state="available", changed=True)


# -------------------------------------------------------------------------------------------------- keepalive


@pytest.mark.parametrize("state", ["available", "blocked"])
def test_keepalive_starts_expires_anew(client: Client, state: str) -> None:
    """In either state expires is 300 s from now again."""
    made_answer = client.post(API + "/keys")
    made = made_answer.expect(201)
    if state == "blocked":
        client.acquire()
    eventually(lambda: client.row(made["key"])["expires_in"] < 299.8, "some of the 300 s to pass")
    answer = client.post(key_path(made["key"], "keepalive"))
    kept = expect_object(answer.expect(200), id=made["id"], expires_in=float)
    expect_left(kept["expires_in"], 300, answer, answer)
    row_answer = client.get(key_path(made["key"]))
    row = expect_row(row_answer.expect(200), state=state)
    expect_left(row["expires_in"], 300, answer, row_answer)


def test_keepalive_does_not_lengthen_a_block(client: Client) -> None:
    """release_in goes on falling, whatever is kept alive."""
    made = client.make()
    started, _ = take(client)
    for turn in range(1, 6):
        pass_until(started.answered_at + turn * 0.1)
        client.post(key_path(made["key"], "keepalive")).expect(200)
        row_answer = client.get(key_path(made["key"]))
        row = expect_row(row_answer.expect(200), state="blocked")
        expect_left(row["release_in"], 60, started, row_answer)


def test_acquire_is_not_a_keepalive(client: Client) -> None:
    """Being served leaves expires as it was."""
    made_answer = client.post(API + "/keys")
    made_answer.expect(201)
    pass_until(made_answer.answered_at + 4 * LATE)
    answer, served = take(client)
    expect_left(served["expires_in"], 300, made_answer, answer)


# ----------------------------------------------------------------------------------------------------- delete


@pytest.mark.parametrize("state", ["available", "blocked", "freed"])
def test_a_deleted_key_is_gone(client: Client, state: str) -> None:
    """204 without a body, in every state; afterwards every call answers unknown-key, and no list has the key."""
    made = client.make()
    if state != "available":
        client.acquire()
    if state == "freed":
        client.post(key_path(made["key"], "unblock")).expect(200)
    moved = {"available": 0, "blocked": -1} if state == "blocked" else {"available": -1, "blocked": 0}
    with client.expect_moved(deleted=1, total=-1, **moved):
        answer = client.delete(key_path(made["key"]))
        assert answer.expect(204) is None
    with client.expect_moved():
        for name in (made["key"], f"id:{made['id']}"):
            expect_unknown(client, name)
        assert client.get(API + "/keys").expect(200)["keys"] == []
    client.post(ACQUIRE).expect_problem(404, "no-key-available")


def expect_unknown(client: Client, name: str) -> None:
    """Every call about one key answers 404 unknown-key for `name`."""
    for method, call in (
        ("GET", ""),
        ("DELETE", ""),
        ("POST", "unblock"),
        ("POST", "keepalive"),
        ("POST", "reveal"),
    ):
        client.request(method, key_path(name, call)).expect_problem(404, "unknown-key")
    client.post(key_path(name, "unblock"), json={"lease": 1}).expect_problem(404, "unknown-key")


def test_a_key_that_is_not_there_is_unknown(client: Client) -> None:
    """404 unknown-key for any text, percent-encoded, in the place of the key: long, non-ASCII, slashes."""
    client.make()
    with client.expect_moved():
        for name in (
            "A" * 20, "a", "x" * 1000, "0", "ключ", "\uff21" * 20, "🦊", "a/b", "/", "../stats", "a b", "%41", "a?b",
            "a#b", "\x00", "id:0", "id:999999999999", "key:1", '"',
        ):  # fmt: skip
            expect_unknown(client, quote(name, safe=""))


def test_an_id_that_is_not_a_number_finds_no_key(client: Client) -> None:
    """404 (or, for what isn't an id at all, 400), never another key's row."""
    client.make_many(20)
    for number in ("", "x", "-1", "1.5", "1e0", "0x1", "9" * 40, "%D9%A1", "1_0", "%201"):
        for method, call in (("GET", ""), ("POST", "keepalive")):
            answer = client.request(method, key_path(f"id:{number}", call))
            assert answer.status in (400, 404), str(answer)
            answer.expect_problem(answer.status, "unknown-key" if answer.status == 404 else "bad-request")


def test_a_key_is_not_found_by_less_more_or_other_case(client: Client) -> None:
    """Only the whole key, letter by letter, is the key."""
    key = client.make()["key"]
    for name in (
        key[:-1],
        key + "A",
        key.swapcase(),
        key[:4],
        quote(hint(key), safe=""),
        quote(f" {key}", safe=""),
    ):
        expect_unknown(client, name)
    client.row(key)


# ----------------------------------------------------------------------------------------------- read, reveal


def test_a_row_shows_the_whole_life_of_a_key(client: Client) -> None:
    """Every member, in each state from generated to freed, and the moment of its making."""
    before = time.time()
    made_answer = client.post(API + "/keys")
    after = time.time()
    made = made_answer.expect(201)
    fixed: dict[str, object] = {"id": made["id"], "hint": hint(made["key"])}

    answer = client.get(key_path(made["key"]))
    row = expect_row(answer.expect(200), **fixed, state="available", owner=None, lease=None, release_in=None)
    expect_left(row["expires_in"], 300, made_answer, answer)
    assert before - 0.01 <= seconds_of(row["created_at"]) <= after + 0.01, (
        f"{row['created_at']} is not the moment"
    )

    before = time.time()
    served_answer, served = take(client, owner="me")
    after = time.time()
    answer = client.get(key_path(made["key"]))
    blocked = expect_row(answer.expect(200), **fixed, state="blocked", owner="me", lease=served["lease"])
    expect_left(blocked["release_in"], 60, served_answer, answer)
    expect_left(blocked["expires_in"], 300, made_answer, answer)
    assert blocked["created_at"] == row["created_at"]
    assert before - 0.01 <= seconds_of(blocked["acquired_at"]) <= after + 0.01, blocked["acquired_at"]

    client.post(key_path(made["key"], "unblock")).expect(200)
    row = client.row(made["key"])
    expect_row(row, **fixed, state="available", owner=None, lease=served["lease"], release_in=None, served=1)
    take(client)
    assert client.row(made["key"])["served"] == 2


def seconds_of(moment: str) -> float:
    """A moment of the API as seconds since 1970."""
    return datetime.fromisoformat(moment).timestamp()


def test_an_id_stands_for_its_key_in_every_call(client: Client) -> None:
    """`id:42`, raw or percent-encoded, is the key, as far as its caller may use ids."""
    for form in ("id:{}", "id%3A{}", "id%3a{}", "%69d:{}", "%69%64%3A{}"):
        made = client.make()
        name = form.format(made["id"])
        expect_row(client.get(key_path(name)).expect(200), id=made["id"], hint=hint(made["key"]))
        assert client.post(key_path(name, "keepalive")).expect(200)["id"] == made["id"]
        assert client.post(key_path(name, "unblock")).expect(200)["id"] == made["id"]
        expect_object(client.post(key_path(name, "reveal")).expect(200), id=made["id"], key=made["key"])
        client.delete(key_path(name)).expect(204)
        expect_unknown(client, name)


def test_a_key_may_be_percent_encoded(client: Client) -> None:
    """`%41` is `A`, as everywhere in a URL."""
    made = client.make()
    name = "".join(f"%{ord(character):02X}" for character in made["key"])
    expect_row(client.get(key_path(name)).expect(200), id=made["id"])


def test_head_is_get_without_the_body(client: Client) -> None:
    """The same status and type, errors among them."""
    key = client.make()["key"]
    for path in (f"/keys/{key}", "/keys", "/stats", "/start_scheduler", "/start_scheduler/"):
        head, get = client.head(API + path), client.get(API + path)
        assert head.status == get.status == 200
        assert head.headers["Content-Type"] == get.headers["Content-Type"]
    assert client.head(key_path("nope")).status == 404


def test_reveal_answers_the_key_of_an_id(client: Client) -> None:
    """200 with id and key, in both states, and it moves nothing."""
    made = client.make()
    client.acquire()
    with client.expect_moved():
        for name in (f"id:{made['id']}", made["key"]):
            answer = client.post(key_path(name, "reveal"))
            expect_object(answer.expect(200), id=made["id"], key=made["key"])
    expect_row(client.row(made["key"]), state="blocked")


AUDITED: list[tuple[str, str, Any]] = [
    ("POST", "/keys", None),
    ("DELETE", "/keys/{key}", None),
    ("POST", "/keys/{key}/reveal", None),
    ("POST", "/batch", {"op": "generate", "count": 1}),
    ("POST", "/batch", {"op": "delete", "keys": ["{key}"]}),
    ("POST", "/random_api_key/", None),
    ("DELETE", "/random_api_key/?api_key={key}", None),
]


@pytest.mark.once
def test_what_admins_do_is_in_the_audit_log(server: ServerProcess, client: Client) -> None:
    """One line holds role, address and request id, the key's id and hint, and never the key."""
    for number, (method, path, body) in enumerate(AUDITED):
        made = client.make()
        line = len(server.log_since(0))
        how: dict[str, Any] = {"json": body} if body else {}
        if body and "keys" in body:
            how = {"json": body | {"keys": [made["key"]]}}
        asked = f"audit-{number}-7"
        target = API + path.replace("{key}", made["key"])
        answer = client.request(method, target, headers={"X-Request-Id": asked}, **how)
        assert answer.status < 300, str(answer)
        if answer.status == 201:
            shown = client.row(f"id:{made['id'] + 1}")
        else:
            shown = {"id": made["id"], "hint": hint(made["key"])}
        wanted = [asked, "admin", "127.0.0.1", str(shown["id"]), *shown["hint"].split("…")]

        def written(line: int = line, wanted: list[str] = wanted) -> bool:
            return any(all(word in one for word in wanted) for one in server.log_since(line))

        eventually(written, f"a line of the log with {wanted}")


# -------------------------------------------------------------------------------------------------- deadlines


def test_a_block_ends_on_time(lend: Start) -> None:
    """Never early by more than 5 ms, and no call that comes after the deadline sees the key blocked."""
    client = lend("--block-seconds=0.3").client()
    made = client.make()
    started, _ = take(client, owner="me")

    def free() -> Answer | None:
        answer = client.get(key_path(made["key"]))
        if answer.expect(200)["state"] == "available":
            return answer
        late = answer.asked_at - (started.answered_at + 0.3)
        assert late < LATE, f"shown as blocked {late:.3f} s after its block ended"
        return None

    answer = eventually(free, "the block to end")
    assert answer is not None
    early = started.asked_at + 0.3 - answer.answered_at
    assert early <= EARLY, f"free {early:.4f} s early"
    expect_row(answer.json, owner=None, release_in=None, lease=started.json["lease"])


def test_a_released_key_is_counted_and_served_again(lend: Start) -> None:
    """released counts it once, unblocked doesn't, and its next lease is greater."""
    client = lend("--block-seconds=0.3").client()
    client.make()
    with client.expect_moved(acquired=1, released=1):
        first = client.acquire()
        eventually(lambda: client.stats()["blocked"] == 0, "release on time")
    second = client.acquire()
    assert second["key"] == first["key"]
    assert second["lease"] > first["lease"]


@pytest.mark.parametrize("blocked", [False, True], ids=["available", "blocked"])
def test_a_key_without_keepalive_is_purged(lend: Start, blocked: bool) -> None:
    """In either state, not early, and unknown to every call that comes after the deadline;
    a block ends with it.
    """
    client = lend("--keepalive-seconds=0.5").client()
    before = client.stats()
    started = client.post(API + "/keys")
    made = started.expect(201)
    if blocked:
        client.post(ACQUIRE)

    def gone() -> Answer | None:
        answer = client.get(key_path(made["key"]))
        if answer.status == 404:
            return answer
        late = answer.asked_at - (started.answered_at + 0.5)
        assert late < LATE, f"shown {late:.3f} s after it expired"
        return None

    answer = eventually(gone, "the key to expire")
    assert answer is not None
    early = started.asked_at + 0.5 - answer.answered_at
    assert early <= EARLY, f"purged {early:.4f} s early"
    expect_unknown(client, made["key"])
    expect_unknown(client, f"id:{made['id']}")
    client.post(ACQUIRE).expect_problem(404, "no-key-available")
    assert client.get(API + "/keys").expect(200)["keys"] == []
    after = eventually(
        lambda: (now := client.stats())["expired"] == before["expired"] + 1 and now,
        "the expired key in stats",
    )
    assert after
    assert after["total"] == after["blocked"] == after["available"] == 0
    assert after["released"] == before["released"], "a purge was counted as a release"


def test_keepalive_keeps_a_key_beyond_its_first_life(short_server: ServerProcess) -> None:
    """Kept alive in time, by calls or batches, a key lives three times as long; left alone, it is purged then."""
    client = short_server.client()

    def lived() -> str:
        """`yes`, or `too slow` if more than a key's life passed between two calls on this machine."""
        started = last = client.batch(op="generate", count=2)
        single, batched = (one["key"] for one in started.expect(201)["keys"])
        while time.monotonic() < started.answered_at + 3 * SHORT_LIFE:
            pass_until(last.asked_at + SHORT_LIFE / 4)
            kept = client.post(key_path(single, "keepalive"))
            answer = client.batch(op="keepalive", keys=[batched])
            if kept.status == 404 or answer.expect(200)["done"] == 0:
                assert answer.answered_at > last.asked_at + SHORT_LIFE - EARLY, (
                    f"purged although kept alive: {answer}"
                )
                return "too slow"
            last = kept
        for key in (single, batched):
            eventually(lambda key=key: client.get(key_path(key)).status == 404, "its end without keepalive")  # type: ignore[misc]
        assert time.monotonic() >= last.asked_at + SHORT_LIFE - EARLY, "purged early"
        return "yes"

    assert any(lived() == "yes" for _ in range(20)), "this machine is too slow to tell"


def test_nothing_revives_an_expired_key(lend: Start) -> None:
    """Unblock, keepalive, also in batches, find it unknown and it stays so."""
    client = lend("--keepalive-seconds=0.3").client()
    key = client.make()["key"]
    eventually(lambda: client.get(key_path(key)).status == 404, "the key to expire")
    client.post(key_path(key, "keepalive")).expect_problem(404, "unknown-key")
    client.post(key_path(key, "unblock")).expect_problem(404, "unknown-key")
    assert client.batch(op="keepalive", keys=[key]).expect(200)["unknown"] == [key]
    assert client.batch(op="unblock", keys=[key]).expect(200)["unknown"] == [key]
    client.get(key_path(key)).expect_problem(404, "unknown-key")
    client.post(ACQUIRE).expect_problem(404, "no-key-available")


def test_a_block_ends_by_itself_however_often_it_is_kept_alive(short_server: ServerProcess) -> None:
    """Keepalive all through the block: it ends when it would have ended without."""
    client = short_server.client()

    def seen() -> bool:
        """Whether the block was seen to end; not when this machine let the key's life pass meanwhile."""
        made = client.make()
        started = client.post(ACQUIRE)
        if started.status == 404:
            return False
        while (kept := client.post(key_path(made["key"], "keepalive"))).status == 200:
            answer = client.get(key_path(made["key"]))
            if answer.status != 200:
                return False
            if answer.json["state"] == "available":
                assert answer.answered_at >= started.asked_at + SHORT_BLOCK - EARLY, "released early"
                return True
            late = answer.asked_at - (started.answered_at + SHORT_BLOCK)
            assert late < LATE, f"still blocked {late:.3f} s after its block should have ended"
            pass_until(kept.asked_at + 0.05)
        return False

    assert any(seen() for _ in range(20)), "this machine is too slow to tell"


@pytest.mark.parametrize("blocked", [False, True], ids=["available", "blocked"])
def test_a_late_server_goes_by_the_deadlines(lend: Start, blocked: bool) -> None:
    """A call that waited in the socket of a stopped process sees no key beyond its deadline."""
    server = lend("--block-seconds=0.5" if blocked else "--keepalive-seconds=2")
    client = server.client()
    started = client.post(API + "/keys")
    key = started.expect(201)["key"]
    reader, keeper, other = server.wire(), server.wire(), server.wire()
    for wire in (reader, keeper, other):  # so that their connections are known to the server
        wire.ask("GET", "/healthz")
        wire.answer()
    if blocked:
        lease = client.acquire()["lease"]
        with server.paused():
            reader.ask("GET", key_path(key))
            other.ask("POST", key_path(key, "unblock"), json={"lease": lease})
            pass_until(time.monotonic() + 0.6)
        expect_row(reader.answer().expect(200), state="available")
        assert other.answer().expect(200)["changed"] is False
        return
    with server.paused():
        reader.ask("GET", key_path(key))
        keeper.ask("POST", key_path(key, "keepalive"))
        other.ask("POST", ACQUIRE)
        pass_until(started.answered_at + 2.1)
    reader.answer().expect_problem(404, "unknown-key")
    keeper.answer().expect_problem(404, "unknown-key")
    other.answer().expect_problem(404, "no-key-available")


def test_a_release_and_an_unblock_at_the_same_moment_count_once(lend: Start) -> None:
    """Whichever comes first frees the key; the other finds it free, and nothing counts or is served twice."""
    client = lend("--block-seconds=0.03").client()
    client.make()
    before = client.stats()
    changed = 0
    for number in range(60):
        answer, served = take(client, wait=20)
        pass_until(answer.answered_at + 0.03 - 0.004 + number % 8 * 0.001)
        path = key_path(served["key"], "unblock")
        changed += client.post(path, json={"lease": served["lease"]}).expect(200)["changed"]
    eventually(lambda: client.stats()["blocked"] == 0, "the last release")
    moved = {name: value - before[name] for name, value in client.stats().items() if isinstance(value, int)}
    assert moved["acquired"] == 60
    assert moved["unblocked"] == changed
    assert moved["released"] == 60 - changed
    assert moved["available"] == moved["total"] == 0


def test_an_expiry_and_a_keepalive_at_the_same_moment_agree(lend: Start) -> None:
    """Either the key lives on for a whole life, or it is gone for good."""
    client = lend("--keepalive-seconds=0.1").client()
    before = client.stats()
    for number in range(24):
        made_answer = client.post(API + "/keys")
        key = made_answer.expect(201)["key"]
        pass_until(made_answer.answered_at + 0.1 - 0.004 + number % 8 * 0.001)
        kept = client.post(key_path(key, "keepalive"))
        seen = client.get(key_path(key))
        if kept.status == 404:
            kept.expect_problem(404, "unknown-key")
            seen.expect_problem(404, "unknown-key")
        elif seen.answered_at < kept.asked_at + 0.1 - EARLY:
            seen.expect(200)
    eventually(lambda: client.stats()["total"] == 0, "the last expiry")
    after = client.stats()
    assert after["generated"] - before["generated"] == after["expired"] - before["expired"] == 24


def test_a_crowd_that_expires_at_once_is_gone_at_once(lend: Start) -> None:
    """No call that comes after their deadline lists or serves one of 20000 keys,
    however long purging them takes.
    """
    client = lend("--keepalive-seconds=1").client()
    over: dict[int, float] = {}  # by when a key must be gone, by its id
    keys: list[str] = []
    for _ in range(20):
        answer = client.batch(op="generate", count=1000)
        for made in answer.expect(201)["keys"]:
            over[made["id"]] = answer.answered_at + 1 + LATE
        keys.append(made["key"])
    pass_until(min(over.values()) - 0.2)
    last = max(over.values())
    while (asked_at := time.monotonic()) < last + 0.1:
        for order in ("id", "expiry"):
            rows = client.get(f"{API}/keys?limit=500&order={order}").expect(200)["keys"]
            late = [asked_at - over[row["id"]] for row in rows if asked_at > over[row["id"]]]
            assert not late, f"{len(late)} keys were listed up to {max(late):.3f} s too late"
        served = client.post(ACQUIRE)
        if served.status == 200:
            late_by = asked_at - over[served.json["id"]]
            assert late_by < 0, f"a key was served {late_by:.3f} s too late"
    assert client.batch(op="keepalive", keys=keys).expect(200)["unknown"] == keys
    eventually(lambda: client.stats()["total"] == 0, "a crowd of expired keys to be purged")
