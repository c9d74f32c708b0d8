"""`GET /keys`: pages, filters and orders, and what a walk promises while keys come and go."""

from __future__ import annotations

import base64
import binascii
import string
import threading
import time
from functools import partial
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from conftest import Start
from support import (
    API,
    Client,
    ServerProcess,
    eventually,
    expect_object,
    expect_row,
    hint,
)


def page(client: Client, **query: object) -> dict[str, Any]:
    """One page, checked row by row."""
    answer = client.get(f"{API}/keys?{urlencode(query)}" if query else API + "/keys")
    shown = expect_object(answer.expect(200), keys=list, next=(str, None))
    for row in shown["keys"]:
        expect_row(row)
    assert len(shown["keys"]) <= int(str(query.get("limit", 50))), "more rows than the limit"
    assert shown["next"] != "", "an empty cursor"
    return shown


def walk(client: Client, **query: object) -> list[dict[str, Any]]:
    """All rows, page by page; a page may hold few or none and still have a next, but the walk must end."""
    rows: list[dict[str, Any]] = []
    shown = page(client, **query)
    for _ in range(5000):
        rows += shown["keys"]
        if shown["next"] is None:
            return rows
        shown = page(client, **query, after=shown["next"])
    raise AssertionError(f"after 5000 pages the walk has not ended ({len(rows)} rows)")


def ids(rows: list[dict[str, Any]]) -> list[int]:
    """The ids of rows, in their order."""
    return [row["id"] for row in rows]


def expect_refused(client: Client, query: str) -> None:
    """Fails unless this query is 400 bad-request."""
    client.get(f"{API}/keys?{query}").expect_problem(400, "bad-request")


# ------------------------------------------------------------------------------------------------------- rows


def test_an_empty_pool_is_one_empty_page(client: Client) -> None:
    """No keys, no next, in every order and filter."""
    for query in ("", "?state=available", "?order=release", "?order=expiry", "?prefix=a", "?limit=1"):
        assert client.get(f"{API}/keys{query}").expect(200) == {"keys": [], "next": None}, query


def test_a_row_of_the_list_is_the_row_of_the_key(client: Client) -> None:
    """The same members with the same values, apart from the time that passed.

    Over Valkey durations are as of the end of the server's own call, so the list may have less by what it took.
    """
    made = client.make_many(4)
    for owner in ("a", None):
        client.acquire(owner=owner)
    freed = client.acquire()["key"]
    client.post(f"{API}/keys/{freed}/unblock").expect(200)
    by_id = {one["id"]: one["key"] for one in made}
    asked_at = time.monotonic()
    rows = page(client)["keys"]
    took = time.monotonic() - asked_at
    assert ids(rows) == sorted(by_id)
    for row in rows:
        alone = client.row(by_id[row["id"]])
        assert row["hint"] == hint(by_id[row["id"]])
        for name in ("id", "hint", "state", "owner", "lease", "created_at"):
            assert row[name] == alone[name], f"{name} differs: {row} and {alone}"
        for name in ("expires_in", "release_in"):
            assert (row[name] is None) is (alone[name] is None), f"{name} differs: {row} and {alone}"
            assert row[name] is None or row[name] >= alone[name] - took, f"{name} grew: {row} and {alone}"


def test_lists_hold_no_key(client: Client) -> None:
    """Rows show hints only, and a cursor holds no more of a key than that, in whatever order it goes on."""
    made = client.make_many(200)
    client.batch(op="acquire", count=100).expect(200)
    pieces = {one["key"][at : at + 6] for one in made for at in range(len(one["key"]) - 5)}
    for query in ("", "&order=id", "&order=release", "&order=expiry", "&state=blocked", "&prefix="):
        first = made[0]["key"][0] if query == "&prefix=" else ""
        answer = client.get(f"{API}/keys?limit=1{query}{first}")
        text = answer.body.decode()
        cursor = answer.expect(200)["next"]
        for spelled in (text, *decodings(cursor or "")):
            found = [piece for piece in pieces if piece in spelled]
            assert not found, f"{found} of a key in {text}"


def decodings(cursor: str) -> list[str]:
    """A cursor decoded by each of the usual encodings."""
    found = []
    padded = cursor + "=" * (-len(cursor) % 4)
    for decode in (base64.urlsafe_b64decode, base64.b64decode, base64.b32decode, bytes.fromhex):
        try:
            found.append(decode(padded if decode is not bytes.fromhex else cursor).decode("latin-1"))
        except (ValueError, binascii.Error):
            continue
    return found


# -------------------------------------------------------------------------------------- limit, next and state


def test_fifty_rows_stand_on_a_page_by_default(client: Client) -> None:
    """Of 60 keys the first 50 by id, then the other 10."""
    made = ids(client.make_many(60))
    first = page(client)
    assert ids(first["keys"]) == made[:50]
    assert first["next"] is not None
    assert ids(page(client, after=first["next"])["keys"]) == made[50:]


@pytest.mark.parametrize("limit", [1, 7, 500])
def test_a_walk_shows_every_key_once_in_order_of_id(client: Client, limit: int) -> None:
    """Whatever the limit."""
    made = ids(client.make_many(510 if limit == 500 else 40))
    assert ids(walk(client, limit=limit)) == made
    assert ids(walk(client, limit=limit, order="id")) == made


def test_limits_may_change_from_page_to_page(client: Client) -> None:
    """A cursor holds the place where the next page begins, not its length."""
    made = ids(client.make_many(20))
    first = page(client, limit=3)
    second = page(client, limit=500, after=first["next"])
    assert ids(first["keys"] + second["keys"]) == made


def test_state_shows_the_available_or_the_blocked_only(client: Client) -> None:
    """Together they are all."""
    made = ids(client.make_many(30))
    blocked = sorted(one["id"] for one in client.batch(op="acquire", count=11).expect(200)["keys"])
    available = sorted(set(made) - set(blocked))
    assert ids(walk(client, state="blocked", limit=4)) == blocked
    assert ids(walk(client, state="available", limit=4)) == available
    assert all(row["state"] == "blocked" for row in walk(client, state="blocked"))


def test_a_rare_state_is_found_in_a_crowd(client: Client) -> None:
    """3 blocked keys among 3000: a walk finds them all and ends, however few a page holds."""
    for _ in range(3):
        client.make_many(1000)
    blocked = sorted(one["id"] for one in client.batch(op="acquire", count=3).expect(200)["keys"])
    assert ids(walk(client, state="blocked", limit=2)) == blocked
    client.batch(op="acquire", count=1000).expect(200)
    assert len(walk(client, state="available", limit=500)) == 1997


# ----------------------------------------------------------------------------------------------------- prefix


def test_prefix_shows_the_keys_that_begin_so_in_order_of_text(client: Client) -> None:
    """For 1 to 4 characters, in the order of characters (0-9, A-Z, a-z), small and capital apart."""
    keys = {one["id"]: one["key"] for one in client.make_many(1000)}
    some = sorted(keys.values())
    prefixes = [
        *string.ascii_letters[::7],
        *string.digits[::3],
        some[0][:2],
        some[500][:2],
        some[700][:3],
        some[-1][:4],
    ]
    for prefix in prefixes:
        wanted = sorted(key for key in keys.values() if key.startswith(prefix))
        shown = [keys[row["id"]] for row in walk(client, prefix=prefix, limit=3)]
        assert shown == wanted, f"prefix {prefix}: {len(shown)} rows, wanted {len(wanted)}"


def test_prefix_goes_with_state(client: Client) -> None:
    """Both filters hold."""
    keys = {one["id"]: one["key"] for one in client.make_many(600)}
    blocked = {one["id"] for one in client.batch(op="acquire", count=300).expect(200)["keys"]}
    for prefix in "aZ5":
        for state in ("available", "blocked"):
            wanted = sorted(
                key
                for number, key in keys.items()
                if key.startswith(prefix) and (number in blocked) == (state == "blocked")
            )
            assert [keys[row["id"]] for row in walk(client, prefix=prefix, state=state, limit=2)] == wanted


def test_a_prefix_is_text_whatever_it_looks_like(client: Client) -> None:
    """Words and numbers of other languages are letters and digits here."""
    client.make_many(100)
    for prefix in ("null", "true", "0", "1e3", "NaN", "id"):
        answer = client.get(f"{API}/keys?limit=500&prefix={prefix}")
        assert all(row["hint"].startswith(prefix) for row in answer.expect(200)["keys"]), str(answer)


# ----------------------------------------------------------------------------------------------------- orders


def test_order_release_shows_the_blocked_soonest_first(client: Client) -> None:
    """By the end of the block, whatever the ids, and no available key, with and without state=blocked."""
    client.make_many(30)
    served = [client.acquire()["id"] for _ in range(12)]
    again = served.pop(4)
    client.post(f"{API}/keys/id:{again}/unblock").expect(200)
    for query in ({}, {"state": "blocked"}):
        rows = walk(client, order="release", limit=5, **query)
        assert ids(rows) == served
        assert [row["state"] for row in rows] == ["blocked"] * 11


def test_order_expiry_shows_the_soonest_first(client: Client) -> None:
    """By expires: as made, and a key kept alive goes to the end."""
    made = [client.make()["id"] for _ in range(12)]
    for at in (3, 0, 7):
        client.post(f"{API}/keys/id:{made[at]}/keepalive").expect(200)
    wanted = [one for at, one in enumerate(made) if at not in (0, 3, 7)] + [made[3], made[0], made[7]]
    assert ids(walk(client, order="expiry", limit=5)) == wanted
    assert ids(walk(client, order="expiry", limit=500)) == wanted


@pytest.mark.parametrize("state", ["available", "blocked"])
def test_order_expiry_goes_with_state(client: Client, state: str) -> None:
    """Both states have an expires."""
    made = [client.make()["id"] for _ in range(20)]
    blocked = {one["id"] for one in client.batch(op="acquire", count=8).expect(200)["keys"]}
    wanted = [one for one in made if (one in blocked) == (state == "blocked")]
    assert ids(walk(client, order="expiry", state=state, limit=3)) == wanted


# ------------------------------------------------------------------------------------ keys that come and go


@pytest.mark.parametrize("query", [{}, {"order": "id"}, {"state": "available"}, {"state": "blocked"}])
def test_keys_that_live_through_a_walk_are_shown_exactly_once(client: Client, query: dict[str, str]) -> None:
    """While others, before, at and after the cursor, are made and deleted between any two pages."""
    made = client.make_many(300)
    if query.get("state") == "blocked":
        client.batch(op="acquire", count=300).expect(200)
    doomed = [one["key"] for at, one in enumerate(made) if at % 3 == 0]
    lasting = [one["id"] for at, one in enumerate(made) if at % 3]
    # Deleted from both ends and the middle in turn, so that some always lie before and some after the cursor.
    seen: list[int] = []
    shown = page(client, limit=7, **query)
    for _ in range(1000):
        seen += ids(shown["keys"])
        if shown["next"] is None:
            break
        if doomed:
            keys = {doomed[0], doomed[-1], doomed[len(doomed) // 2]}
            doomed = [key for key in doomed if key not in keys]
            client.batch(op="delete", keys=sorted(keys)).expect(200)
            client.make()
        shown = page(client, limit=7, after=shown["next"], **query)
    else:
        raise AssertionError("the walk does not end")
    counts = [seen.count(one) for one in lasting]
    assert counts == [1] * len(lasting), f"shown {min(counts)} to {max(counts)} times"
    assert len(seen) == len(set(seen)), "some key was shown twice"
    assert seen == sorted(seen), "not in order of id"


def test_a_walk_beside_busy_writers_shows_lasting_keys_exactly_once(
    server: ServerProcess, client: Client
) -> None:
    """The same with another connection that makes, serves and deletes keys all the time."""
    lasting = ids(client.make_many(400))
    stop = threading.Event()
    failures: list[BaseException] = []

    def churn() -> None:
        try:
            with Client(server) as other:
                while not stop.is_set():
                    keys = [one["key"] for one in other.make_many(20)]
                    other.batch(op="acquire", count=30).expect(200)
                    other.batch(op="keepalive", keys=keys).expect(200)
                    other.batch(op="unblock", keys=[f"id:{one}" for one in lasting]).expect(200)
                    other.batch(op="delete", keys=keys).expect(200)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(5):
            seen = ids(walk(client, limit=9))
            assert [seen.count(one) for one in lasting] == [1] * len(lasting)
            assert len(seen) == len(set(seen)), "some key was shown twice"
    finally:
        stop.set()
        thread.join()
    assert not failures, failures


@pytest.mark.parametrize(
    "query", [{}, {"order": "expiry"}, {"order": "release"}, {"state": "blocked"}, {"prefix": ""}]
)
def test_a_cursor_survives_the_deletion_of_its_key(client: Client, query: dict[str, str]) -> None:
    """The last key of a page, and the page's others, deleted: the next page goes on behind them."""
    keys = {one["id"]: one["key"] for one in client.make_many(400)}
    client.batch(op="acquire", count=400).expect(200)
    if "prefix" in query:
        firsts = [key[0] for key in keys.values()]
        query = {"prefix": max(set(firsts), key=firsts.count)}
    wanted = ids(walk(client, limit=500, **query))
    shown = page(client, limit=3, **query)
    seen = ids(shown["keys"])
    client.batch(op="delete", keys=[keys[one] for one in seen]).expect(200)
    while shown["next"] is not None:
        shown = page(client, limit=500, after=shown["next"], **query)
        seen += ids(shown["keys"])
    assert seen == wanted


def test_expired_keys_are_absent_from_every_list(lend: Start) -> None:
    """As soon as their deadline has passed (`expect_row` fails on any row whose time is up)."""
    client = lend("--keepalive-seconds=0.5").client()
    client.make_many(100)
    client.batch(op="acquire", count=50)
    for query in ({}, {"order": "expiry"}, {"order": "release"}, {"state": "blocked"}):
        assert eventually(partial(is_empty, client, query), f"an empty list {query}")


def is_empty(client: Client, query: dict[str, str]) -> bool:
    """Whether the first page of a list is the last and has no row."""
    shown = page(client, **query)
    return shown["keys"] == [] and shown["next"] is None


# ---------------------------------------------------------------------------------------------- what is wrong


WRONG_VALUES = [
    "limit=0", "limit=501", "limit=-1", "limit=x", "limit=1.5", "limit=%D9%A5", "limit=5_0",
    "limit=99999999999999999999", "limit=0x10", "limit=true", "limit=null", "limit=NaN", "order=null",
    "state=free", "state=AVAILABLE", "state=available,blocked", "state=null",
    "order=name", "order=-id", "order=ID", "order=id,expiry",
    "prefix=abcde", "prefix=" + "a" * 1000, "prefix=%F0%9F%A6%8A%D0%BB%D1%8E%D1%87%D0%B8",
]  # fmt: skip


@pytest.mark.once
def test_a_wrong_value_of_a_query_parameter_is_named(client: Client) -> None:
    """400 bad-request whose detail names the parameter."""
    for query in WRONG_VALUES:
        problem = client.get(f"{API}/keys?{query}").expect_problem(400, "bad-request")
        assert query.split("=", maxsplit=1)[0] in problem["detail"], problem


@pytest.mark.once
def test_an_unknown_query_parameter_is_refused(client: Client) -> None:
    """400, alone and beside good ones."""
    for name in ("offset", "Limit", "client", "lease", "state[]", "key", "%73tat", "%D0%BA", "_"):
        for query in (f"{name}=1", f"state=available&{name}=1", f"{name}=", name):
            expect_refused(client, query)


@pytest.mark.once
def test_a_repeated_query_parameter_is_refused(client: Client) -> None:
    """400, also when both have the same value, and when one is percent-encoded."""
    for name, value in (("limit", "5"), ("state", "blocked"), ("order", "id"), ("prefix", "a")):
        encoded = "".join(f"%{ord(character):02x}" for character in name)
        for second in (name, encoded):
            expect_refused(client, f"{name}={value}&{second}={value}")


def test_senseless_combinations_are_refused(client: Client) -> None:
    """prefix has its own order, and no available key is ever released."""
    client.make()
    for query in ("prefix=a&order=id", "prefix=a&order=release", "prefix=a&order=expiry",
                  "order=release&state=available", "prefix=a&order=id&state=blocked"):  # fmt: skip
        expect_refused(client, query)


def test_what_is_not_a_cursor_is_refused(client: Client) -> None:
    """400 in every order; never an error of the server's."""
    client.make_many(5)
    cursors = (
        "x",
        "null",
        "%00",
        "a" * 3000,
        "%D0%BA%D0%BB%D1%8E%D1%87",
        "e30",
        "W10",
        "../..",
        "%25",
        "%20",
    )
    for cursor in cursors:
        for query in ("", "&order=release", "&order=expiry", "&prefix=a", "&state=blocked"):
            answer = client.get(f"{API}/keys?after={cursor}{query}")
            problem = answer.expect_problem(400, "bad-request")
            assert "after" in problem["detail"], problem


def test_a_cursor_of_another_order_is_refused(client: Client) -> None:
    """A cursor holds a place in one order, which another order doesn't have."""
    client.make_many(200)
    client.batch(op="acquire", count=150).expect(200)
    queries = ["order=id", "order=release", "order=expiry"]
    cursors = {query: client.get(f"{API}/keys?limit=1&{query}").expect(200)["next"] for query in queries}
    assert all(isinstance(cursor, str) for cursor in cursors.values()), cursors
    for one in queries:
        for other in queries:
            if one != other:
                expect_refused(client, f"after={quote(cursors[one], safe='')}&{other}")
        expect_refused(client, f"after={quote(cursors[one], safe='')}&prefix=a")


def test_a_tampered_cursor_is_refused_or_harmless(client: Client) -> None:
    """Any letter changed, any part cut: 400 or a page, never an error of the server's."""
    client.make_many(20)
    client.batch(op="acquire", count=10).expect(200)
    for query in ("order=id", "order=release", "order=expiry"):
        cursor = client.get(f"{API}/keys?limit=1&{query}").expect(200)["next"]
        changed = [cursor[:at] + "A" + cursor[at + 1 :] for at in range(len(cursor))]
        for one in changed + [cursor[:at] for at in range(1, len(cursor))] + [cursor + "A", cursor * 2]:
            answer = client.get(f"{API}/keys?{query}&after={quote(one, safe='')}")
            assert answer.status in (200, 400), str(answer)


def test_a_percent_encoded_query_is_decoded(client: Client) -> None:
    """Names and values alike."""
    made = ids(client.make_many(3))
    shown = client.get(f"{API}/keys?%73tate=%61vailable&limit=%32&").expect(200)
    assert ids(shown["keys"]) == made[:2]
