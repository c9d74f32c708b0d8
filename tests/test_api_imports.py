"""Keys from elsewhere: imported one by one or by the thousand, named, replaced and found."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from conftest import Start, Variant
from support import (
    ADMIN_TOKEN,
    API,
    CLIENT_TOKEN,
    JSON,
    VIEWER_TOKEN,
    Client,
    ServerProcess,
    encode_request,
    eventually,
    expect_left,
    expect_object,
    expect_row,
)

LIMIT, IMPORT_LIMIT = 256 * 1024, 4 * 1024 * 1024
SECRET = "sk-live-3f0c2e91-77d1"


@pytest.fixture
def server(importing_server: ServerProcess) -> ServerProcess:
    """The server of these tests."""
    return importing_server


@pytest.fixture
def pool(client: Client) -> str:
    """The beginning of the paths of a pool that purges no keys."""
    return client.make_pool("openai", keepalive_seconds=None)


def imported(client: Client, pool: str, secret: str = SECRET, **details: object) -> dict[str, Any]:
    """A key that was just imported."""
    made: dict[str, Any] = client.post(pool + "/keys", json={"secret": secret, **details}).expect(201)
    return made


def import_many(client: Client, pool: str, keys: list[Any], **how: object) -> dict[str, Any]:
    """The answer to a batch of imports."""
    answer = client.post(pool + "/batch", json={"op": "import", "keys": keys, **how})
    result = expect_object(
        answer.expect(200),
        op="import",
        created=int,
        updated=int,
        existed=int,
        duplicate=int,
        failed=int,
        results=list,
    )
    statuses = [each["status"] for each in result["results"]]
    assert len(statuses) == len(keys)
    for status in ("created", "updated", "existed", "duplicate", "failed"):
        assert result[status] == statuses.count(status), result
    return result


def total(client: Client, pool: str) -> int:
    """How many keys the pool has."""
    count: int = client.get(pool).expect(200)["total"]
    return count


# ------------------------------------------------------------------------------------------------------- one key


def test_an_imported_key_is_served_with_its_name_and_data(client: Client, pool: str) -> None:
    """Rows show name and labels, and neither the secret nor the data."""
    details = {
        "name": "acct-17",
        "labels": {"region": "eu"},
        "data": {"user": "x", "n": [1, None, 12345678901234567890123]},
    }
    answer = client.post(pool + "/keys", json={"secret": SECRET, **details})
    made = expect_object(
        answer.expect(201),
        id=int,
        state="available",
        hint="sk-l…77d1",
        name="acct-17",
        expires_in=None,
        existed=False,
        ids=list,
    )
    assert made["ids"] == [made["id"]]
    assert answer.headers["Location"] == f"{pool}/keys/id:{made['id']}"
    row = expect_row(
        client.get(answer.headers["Location"]).expect(200),
        name="acct-17",
        labels={"region": "eu"},
        hint=made["hint"],
    )
    assert client.get(pool + "/keys").expect(200)["keys"] == [row]
    lease = client.post(pool + "/keys/acquire").expect(200)
    assert (lease["key"], lease["name"], lease["data"]) == (SECRET, "acct-17", details["data"])
    revealed = client.post(answer.headers["Location"] + "/reveal").expect(200)
    assert revealed == {"id": made["id"], "key": SECRET, "name": "acct-17", "data": details["data"]}
    assert client.get(f"{pool}/keys/{SECRET}").expect(200)["state"] == "blocked"
    assert client.get(pool + "/stats").expect(200)["imported"] == 1


def test_a_key_may_have_a_pace_of_its_own(client: Client, pool: str) -> None:
    """Imported with it or changed; an empty one removes it, and rows show it."""
    pace = {"count": 5, "seconds": 60.0, "burst": 1}
    made = imported(client, pool, pace={"count": 5, "seconds": 60})
    path = f"{pool}/keys/id:{made['id']}"
    expect_row(client.get(path).expect(200), pace=pace)
    lease = client.post(pool + "/keys/acquire").expect(200)
    batch = {"op": "unblock", "keys": [{"key": lease["handle"], "outcome": "ok", "uses": 5}]}
    assert client.post(pool + "/batch", json=batch).expect(200)["done"] == 1
    row = expect_row(client.get(path).expect(200), state="cooling")
    assert 50 <= row["available_in"] <= 60
    changed = client.patch(path, json={"pace": {"count": 1, "seconds": 0.5, "burst": 3}, "name": "a"}).expect(
        200
    )
    assert changed["pace"] == {"count": 1, "seconds": 0.5, "burst": 3}
    assert client.patch(path, json={"labels": {}, "pace": None}).expect(200)["pace"] == changed["pace"]
    client.patch(path, json={"pace": {"burst": 3}}).expect_problem(400, "bad-request")
    assert client.patch(path, json={"pace": {}}).expect(200)["pace"] is None
    item = {"secret": SECRET, "pace": {"count": 7, "seconds": 1}}
    import_many(client, pool, [item])
    assert client.get(path).expect(200)["pace"] is None
    import_many(client, pool, [item], exists="update")
    assert client.get(path).expect(200)["pace"] == {"count": 7, "seconds": 1, "burst": 1}


@pytest.mark.parametrize("uses", [0, -1, 10**9 + 1, 1.5, "2"])
def test_wrong_uses_are_refused_and_nothing_is_freed(client: Client, uses: object) -> None:
    client.make()
    lease = client.post(API + "/keys/acquire").expect(200)
    path = f"{API}/keys/{lease['handle']}"
    wrong = client.post(path + "/unblock", json={"uses": uses}).expect_problem(400, "bad-request")
    assert "1 to 10^9" in wrong["detail"]
    assert client.get(path).expect(200)["state"] == "blocked"


def test_the_same_secret_is_the_same_key(client: Client, pool: str) -> None:
    """A repeat is 200 and changes nothing; another pool has a key of its own."""
    made = imported(client, pool, name="one")
    client.post(pool + "/keys/acquire").expect(200)
    again = client.post(pool + "/keys", json={"secret": SECRET, "name": "two"})
    assert again.expect(200) == {
        "id": made["id"], "state": "blocked", "hint": "sk-l…77d1", "name": "one", "expires_in": None, "existed": True,
        "ids": [made["id"]],
    }  # fmt: skip
    assert again.headers["Location"] == f"{pool}/keys/id:{made['id']}"
    other = client.make_pool("other", keepalive_seconds=None)
    imported(client, other)
    assert client.post(other + "/keys/acquire").expect(200)["key"] == SECRET


def test_without_a_secret_a_key_is_generated(client: Client) -> None:
    """As before; what goes with a secret only is refused rather than ignored."""
    nothing: list[dict[str, Any]] = [{}, {"secret": None}]
    for body in nothing:
        assert re.fullmatch(r"[A-Za-z0-9]{20}", client.post(API + "/keys", json=body).expect(201)["key"])
    assert re.fullmatch(r"[A-Za-z0-9]{20}", client.post(API + "/keys").expect(201)["key"])
    wrong: list[dict[str, Any]] = [
        {"name": "x"}, {"labels": {}}, {"data": {"a": 1}}, {"expire": True}, {"key": "sk-1"}
    ]  # fmt: skip
    for body in wrong:
        with client.expect_moved():
            client.post(API + "/keys", json=body).expect_problem(400, "bad-request")


@pytest.mark.parametrize(
    ("secret", "hint"),
    [
        ("x", "…"),
        ("1234567", "…"),
        ("12345678", "12…78"),
        ("a" * 15, "aa…aa"),
        ("abcdefghijklmnop", "abcd…mnop"),
    ],
)
def test_a_hint_shows_no_more_than_is_safe(client: Client, pool: str, secret: str, hint: str) -> None:
    """Eight characters from 16 on, four from 8 on."""
    assert imported(client, pool, secret)["hint"] == hint


def test_any_text_may_be_a_secret(client: Client, pool: str) -> None:
    """Up to 4096 bytes; in a path it is percent-encoded, or named by id or handle."""
    texts = ["x" * 4096, "é" * 2048, "a/b?c#d", " ", "\n", "\0", "日本", "👩🚀", '"', "%41"]
    for secret in texts:
        number = imported(client, pool, secret)["id"]
        assert client.post(f"{pool}/keys/id:{number}/reveal").expect(200)["key"] == secret
        assert client.post(pool + "/keys/find", json={"key": secret}).expect(200)["id"] == number
    for path in ("a%2Fb%3Fc%23d", "%20", "%0A", "%E6%97%A5%E6%9C%AC", "%2541"):
        client.get(f"{pool}/keys/{path}").expect(200)


WRONG_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"secret": ""}, "secret takes"),
    ({"secret": "x" * 4097}, "4097 bytes"),
    ({"secret": "é" * 2049}, "4098 bytes"),
    ({"name": ""}, "name takes"),
    ({"name": "x" * 64}, "64 characters"),
    ({"name": "a\nb"}, "control character"),
    ({"name": "id:1"}, "name takes"),
    ({"name": "h:1"}, "name takes"),
    ({"labels": {f"l{number}": "" for number in range(17)}}, "17 labels"),
    ({"labels": {"": "x"}}, "labels takes"),
    ({"labels": {"x" * 64: ""}}, "64 characters"),
    ({"labels": {"a": "x" * 64}}, "64 characters"),
    ({"labels": {"a": "\x7f"}}, "control character"),
    ({"data": {"a": "x" * 4096}}, "data takes"),
    ({"pace": {"count": 1}}, "`count` and `seconds` go together"),
    ({"pace": {"count": 1_000_001, "seconds": 1}}, "pace.count takes a whole number from 1 to 1000000"),
    ({"data": {"a": "é" * 2048}}, "4104 bytes"),
]
WRONG_SHAPES: list[tuple[bytes, str]] = [
    (b'{"secret":1}', "secret"),
    (b'{"secret":"s","name":[]}', "name"),
    (b'{"secret":"s","labels":["a"]}', "labels"),
    (b'{"secret":"s","labels":{"a":1}}', "labels"),
    (b'{"secret":"s","labels":{"a":null}}', "labels"),
    (b'{"secret":"s","data":"x"}', "data"),
    (b'{"secret":"s","data":[{}]}', "data"),
    (b'{"secret":"s","data":1}', "data"),
    (b'{"secret":"s","pace":[]}', "pace"),
    (b'{"secret":"s","pace":{"count":1,"seconds":1,"per":2}}', "per"),
    (b'{"secret":"s","pace":{"count":1,"seconds":1,"count":2}}', "'count' was given twice"),
    (b'{"secret":"s","key":"s"}', "key"),
    (b'{"secret":"s","seats":"2"}', "seats"),
    (b'{"secret":"s","secret":"t"}', "secret"),
    (b'{"secret":"s","labels":{"a":"1","a":"2"}}', "'a' was given twice"),
    (b'{"secret":"s","data":{"u":{"a":1,"a":2}}}', "'a' was given twice"),
    (b'{"secret":"\xff\xfe"}', "not JSON"),
    (b'{"secret":"\xed\xa0\x80"}', "not JSON"),
    (b'{"secret":"\\ud800"}', "not JSON"),
    (b'{"secret":"s","data":{"a":"\xff"}}', "not JSON"),
    (b'{"secret":"s"', "not JSON"),
    (b'{"secret":"s","data":' + b'{"a":' * 2000 + b"1" + b"}" * 2000 + b"}", ""),
]


@pytest.mark.parametrize(("wrong", "why"), WRONG_VALUES)
def test_a_value_out_of_range_is_refused_alone(
    client: Client, pool: str, wrong: dict[str, Any], why: str
) -> None:
    """400 for the single call; of a batch that one item fails, and the others are imported."""
    item = {"secret": SECRET, **wrong}
    assert why in client.post(pool + "/keys", json=item).expect_problem(400, "bad-request")["detail"]
    assert total(client, pool) == 0
    results = import_many(client, pool, [{"secret": "a"}, item, {"secret": "b"}])["results"]
    assert [each["status"] for each in results] == ["created", "failed", "created"]
    assert results[1]["code"] == "bad-request"
    assert why in results[1]["detail"]
    assert total(client, pool) == 2


@pytest.mark.parametrize(("item", "why"), WRONG_SHAPES)
def test_a_wrong_shape_is_refused_with_the_whole_body(
    client: Client, pool: str, item: bytes, why: str
) -> None:
    """400 that names the item and the member; nothing is imported."""
    for path, body in (
        ("/keys", item),
        ("/batch", b'{"op":"import","keys":[{"secret":"a"},' + item + b',{"secret":"b"}]}'),
        ("/batch", b'{"keys":[{"secret":"a"},' + item + b',{"secret":"b"}],"op":"import"}'),
    ):
        detail = client.post(pool + path, body=body, headers=JSON).expect_problem(400, "bad-request")[
            "detail"
        ]
        assert why in detail, detail
        if path == "/batch" and "not JSON" not in detail:
            assert "keys[1]" in detail, detail
    assert total(client, pool) == 0


OUTER: list[tuple[bytes, str]] = [
    (b'{"op":"import"}', "keys"),
    (b'{"op":"import","keys":[]}', "length >= 1"),
    (b'{"op":"import","keys":{}}', "array"),
    (b'{"op":"import","keys":"x"}', "array"),
    (b'{"op":"import","keys":null}', "array"),
    (b'{"op":"import","keys":["a"]}', "keys[0]"),
    (b'{"op":"import","keys":[' + b'{"secret":"a"},' * 1000 + b'{"secret":"a"}]}', "length <= 1000"),
    (b'{"op":"import","keys":[{"secret":"a"}],"exists":"fail"}', "exists takes"),
    (b'{"op":"import","keys":[{"secret":"a"}],"expire":1}', "expire takes"),
    (b'{"op":"import","keys":[{"secret":"a"}],"owner":"x"}', "owner"),
    (b'{"op":"import","keys":[{"secret":"a"}],"keys":[{"secret":"b"}]}', "twice"),
    (b'{"op":"import","keys":[{"secret":"a"}],"keys":[{"secret":"a"}]}', "twice"),
    (b'{"op":"import","keys":[{"secret":"a"}],"op":"import"}', "twice"),
    (b'{"op":"generate","keys":[{"secret":"a"}],"op":"import"}', "keys"),
    (b'{"op":"import","expire":false,"keys":[{"secret":"a"}],"expire":true}', "twice"),
    (b'{"op":"import","keys":[{"secret":"a"}]', "not JSON"),
    (b'{"op":"import","keys":[{"secret":"a"},]}', "not JSON"),
]


@pytest.mark.parametrize(("body", "why"), OUTER)
def test_what_stands_around_the_keys_of_an_import_is_checked(
    client: Client, pool: str, body: bytes, why: str
) -> None:
    """As the members of any body."""
    detail = client.post(pool + "/batch", body=body, headers=JSON).expect_problem(400, "bad-request")[
        "detail"
    ]
    assert why in detail, detail
    assert total(client, pool) == 0


# --------------------------------------------------------------------------------------------------------- many


def test_each_item_of_a_batch_has_its_result(client: Client, pool: str) -> None:
    """In the order of the items, which counts; null is as if absent."""
    old = imported(client, pool, "old", name="taken", labels={"a": "b"})["id"]
    keys: list[dict[str, Any]] = [
        {"secret": "new", "name": "first", "labels": None, "data": None},
        {"secret": "old", "name": "other"},
        {"secret": "new", "name": "again"},
        {"secret": "third", "name": "taken"},
        {"secret": "fourth", "name": "first"},
        {"secret": "fifth", "data": {}, "labels": {}},
    ]
    results = import_many(client, pool, keys)["results"]
    assert [each["status"] for each in results] == [
        "created",
        "existed",
        "duplicate",
        "failed",
        "failed",
        "created",
    ]
    new, last = results[0]["id"], results[5]["id"]
    assert [each.get("id") for each in results] == [new, old, new, None, None, last]
    assert len({old, new, last}) == 3
    assert [each.get("code") for each in results] == [None, None, None, "name-taken", "name-taken", None]
    assert f"id:{old}" in results[3]["detail"]
    assert total(client, pool) == 3
    assert client.get(pool + "/keys/old").expect(200)["name"] == "taken"
    again = import_many(client, pool, keys)
    assert (again["created"], again["existed"], again["duplicate"], again["failed"]) == (0, 3, 1, 2)


def test_a_batch_may_update_keys_that_the_pool_has(client: Client, pool: str) -> None:
    """Name, labels and data of the item; a lease goes on."""
    imported(client, pool, "old", name="a", labels={"x": "1"}, data={"u": 1})
    lease = client.post(pool + "/keys/acquire").expect(200)
    keys = [{"secret": "old", "name": "b", "labels": {"y": "2"}}, {"secret": "new", "name": "a"}]
    results = import_many(client, pool, keys, exists="update")["results"]
    assert [each["status"] for each in results] == ["updated", "created"]
    assert results[0]["id"] == lease["id"] != results[1]["id"]
    row = expect_row(client.get(pool + "/keys/old").expect(200), name="b", labels={"y": "2"}, state="blocked")
    assert row["lease"] == lease["lease"]
    assert client.post(pool + "/keys/old/reveal").expect(200)["data"] == {"u": 1}
    assert import_many(client, pool, keys, exists="skip")["existed"] == 2


def test_a_pool_without_room_takes_none_of_a_batch(client: Client) -> None:
    """All or none at `max_keys`; keys that the pool has, or that stand in the body twice, need no room."""
    pool = client.make_pool("small", keepalive_seconds=None, max_keys=3)
    imported(client, pool, "old")
    new = [{"secret": secret} for secret in ("a", "b", "c")]
    full = client.post(
        pool + "/batch",
        json={"op": "import", "keys": [{"secret": "old", "name": "x"}, *new], "exists": "update"},
    )
    full.expect_problem(409, "pool-full")
    assert total(client, pool) == 1
    assert client.get(pool + "/keys/old").expect(200)["name"] is None
    result = import_many(client, pool, [{"secret": "old"}, new[0], new[0], new[1]])
    assert (result["created"], result["existed"], result["duplicate"]) == (2, 1, 1)
    client.post(pool + "/keys", json=new[2]).expect_problem(409, "pool-full")
    client.post(pool + "/keys", json=new[1]).expect(200)


def test_a_pool_that_purges_takes_keys_only_if_they_may_expire(client: Client) -> None:
    """409 says what to do; with `expire` they expire as others do."""
    pool = client.make_pool("purging", keepalive_seconds=50)
    one, many = {"secret": "a"}, {"op": "import", "keys": [{"secret": "a"}]}
    for path, body in (("/keys", one), ("/batch", many), ("/keys", one | {"expire": False})):
        detail = client.post(pool + path, json=body).expect_problem(409, "keys-would-expire")["detail"]
        assert "keepalive_seconds" in detail
        assert '"expire":true' in detail
    client.post(API + "/keys", json=one).expect_problem(409, "keys-would-expire")
    assert total(client, pool) == 0
    answer = client.post(pool + "/keys", json=one | {"expire": True})
    expect_left(answer.expect(201)["expires_in"], 50, answer, answer)
    assert import_many(client, pool, [{"secret": "b"}], expire=True)["created"] == 1
    client.patch(pool, json={"keepalive_seconds": None}).expect(200)
    assert client.post(pool + "/keys/a/keepalive").expect(200)["expires_in"] is None


# --------------------------------------------------------------------------------------------------------- sizes


def body_of(size: int) -> bytes:
    """An import of a thousand keys, padded to so many bytes."""
    keys = [{"secret": f"{number:04}-" + "x" * 4000, "name": f"n{number}"} for number in range(1000)]
    body = json.dumps({"op": "import", "keys": keys}).encode()
    assert len(body) <= size
    return body.ljust(size)


def chunked(body: bytes) -> bytes:
    """The body in chunks of 64 KiB."""
    pieces = [body[at : at + 65536] for at in range(0, len(body), 65536)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def test_an_import_may_have_four_megabytes(server: ServerProcess, client: Client, pool: str) -> None:
    """And not a byte more; with a length or in chunks, and the connection or another one goes on."""
    answer = client.post(pool + "/batch", body=body_of(IMPORT_LIMIT), headers=JSON).expect(200)
    assert (answer["created"], answer["failed"]) == (1000, 0)
    client.post(pool + "/batch", body=body_of(IMPORT_LIMIT + 1), headers=JSON).expect_problem(
        413, "payload-too-large"
    )
    head = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    for size, status in ((IMPORT_LIMIT, 200), (IMPORT_LIMIT + 1, 413), (IMPORT_LIMIT + 500_000, 413)):
        wire = server.wire()
        wire.expect_answer_to("POST", pool + "/batch")
        wire.send(encode_request("POST", pool + "/batch", server.host, headers=head) + chunked(body_of(size)))
        assert wire.answer().status == status
    assert total(client, pool) == 1000


@pytest.mark.parametrize(
    "body",
    [
        {"op": "keepalive", "keys": ["x" * 300] * 1000},
        {"keys": ["import"] + ["x" * 300] * 1000, "op": "unblock"},
        {"op": "generate", "count": 1, "import": "x" * LIMIT},
        {"op": "acquire", "count": 1, "owner": '"import"' + "x" * LIMIT},
        ["import", "x" * LIMIT],
    ],
)
def test_all_else_has_the_limit_that_it_had(client: Client, pool: str, body: object) -> None:
    """Batches of another op, though an admin sends them."""
    client.post(pool + "/batch", json=body).expect_problem(413, "payload-too-large")
    single = {"secret": "a", "data": {"x": "x" * LIMIT}}
    client.post(pool + "/keys", json=single).expect_problem(413, "payload-too-large")
    client.put(pool, body=b" " * (LIMIT + 1)).expect_problem(413, "payload-too-large")
    assert total(client, pool) == 0


def test_only_an_admin_makes_the_server_read_so_much(guarded_server: ServerProcess) -> None:
    """For all others the answer comes before the body: 401, 403 or 413, however it is announced."""
    path = guarded_server.client(ADMIN_TOKEN).make_pool("openai", keepalive_seconds=None) + "/batch"
    for token, code in (
        (None, "unauthorized"),
        (VIEWER_TOKEN, "forbidden"),
        (CLIENT_TOKEN, "payload-too-large"),
    ):
        wire = guarded_server.wire()
        wire.expect_answer_to("POST", path)
        announced = {
            "Content-Type": "application/json",
            "Content-Length": str(IMPORT_LIMIT),
            "Expect": "100-continue",
        }
        wire.send(encode_request("POST", path, guarded_server.host, token=token, headers=announced))
        assert wire.answer().json["code"] == code
        client = guarded_server.client(token)
        client.post(path, body=body_of(IMPORT_LIMIT), headers=JSON)
        assert client.post(path, body=b'{"op":"import","keys":[{"secret":"a"}]}', headers=JSON).status in (
            401,
            403,
        )


def test_others_are_served_while_a_large_import_is_read(
    server: ServerProcess, client: Client, pool: str
) -> None:
    """Its decoding and its keys are done in slices: calls that come meanwhile are answered before it."""
    made = client.make()
    wire = server.wire()
    wire.ask("POST", pool + "/batch", body=body_of(IMPORT_LIMIT), headers=JSON)
    for _ in range(20):
        client.post(f"{API}/keys/{made['key']}/keepalive").expect(200)
    assert wire.answer().expect(200)["created"] == 1000


# ------------------------------------------------------------------------------------------ names, labels and data


def test_patch_changes_what_it_gives(client: Client, pool: str) -> None:
    """What is absent or null stays, what is empty is removed; a generated key takes them, too."""
    made = client.post(pool + "/keys").expect(201)
    path = f"{pool}/keys/{made['key']}"
    row = expect_row(
        client.patch(path, json={"name": "a", "labels": {"x": "1"}, "data": {"u": 1}}).expect(200)
    )
    assert (row["id"], row["name"], row["labels"]) == (made["id"], "a", {"x": "1"})
    row = client.patch(path, json={"name": None, "labels": {"y": "2"}}).expect(200)
    assert (row["name"], row["labels"]) == ("a", {"y": "2"})
    assert client.post(path + "/reveal").expect(200)["data"] == {"u": 1}
    row = client.patch(f"{pool}/keys/id:{made['id']}", json={"name": "", "labels": {}, "data": {}}).expect(
        200
    )
    assert (row["name"], row["labels"]) == (None, {})
    assert client.post(path + "/reveal").expect(200) == {"id": made["id"], "key": made["key"]}
    client.patch(path, json={}).expect(200)
    client.patch(path).expect_problem(400, "bad-request")
    client.patch(f"{pool}/keys/nope", json={"name": "b"}).expect_problem(404, "unknown-key")


def test_a_name_is_unique_in_its_pool(client: Client, pool: str) -> None:
    """409 for another key, not for the same one; a name that was given up is free."""
    imported(client, pool, "a", name="one")
    imported(client, pool, "b", name="two")
    with pytest.raises(AssertionError, match="name-taken"):
        imported(client, pool, "c", name="one")
    client.patch(pool + "/keys/b", json={"name": "one", "labels": {"x": "1"}}).expect_problem(
        409, "name-taken"
    )
    assert expect_row(client.get(pool + "/keys/b").expect(200), name="two")["labels"] == {}
    client.patch(pool + "/keys/a", json={"name": "one"}).expect(200)
    client.patch(pool + "/keys/a", json={"name": ""}).expect(200)
    client.patch(pool + "/keys/b", json={"name": "one"}).expect(200)
    imported(client, client.make_pool("other", keepalive_seconds=None), "a", name="one")


def test_wrong_details_are_refused_by_patch_as_by_import(client: Client, pool: str) -> None:
    """With the same words."""
    imported(client, pool, name="one")
    for wrong, why in WRONG_VALUES:
        if "secret" not in wrong and wrong != {"name": ""}:
            answer = client.patch(f"{pool}/keys/{SECRET}", json=wrong)
            assert why in answer.expect_problem(400, "bad-request")["detail"]
    assert client.get(f"{pool}/keys/{SECRET}").expect(200)["name"] == "one"


def test_keys_are_listed_by_the_beginning_of_their_names(client: Client, pool: str) -> None:
    """In order of name, a page at a time."""
    named = ["acct-2", "acct-10", "acct-1", "zeta", "é"]
    import_many(client, pool, [{"secret": name, "name": name} for name in named] + [{"secret": "none"}])
    page = client.get(pool + "/keys?name=acct-&limit=2").expect(200)
    assert [row["name"] for row in page["keys"]] == ["acct-1", "acct-10"]
    page = client.get(f"{pool}/keys?name=acct-&limit=2&after={page['next']}").expect(200)
    assert [row["name"] for row in page["keys"]] == ["acct-2"]
    client.get(pool + "/keys?name=a&order=id").expect_problem(400, "bad-request")
    client.get(pool + "/keys?name=").expect_problem(400, "bad-request")


# ------------------------------------------------------------------------------------------------ replace and find


def test_replace_gives_a_key_another_text(client: Client, pool: str) -> None:
    """Same id and name, failures forgotten, a quarantine over; the old text is nobody's any more."""
    imported(client, pool, "old-secret-of-it", name="one", data={"u": 1})
    lease = client.post(pool + "/keys/acquire").expect(200)
    client.post(f"{pool}/keys/{lease['handle']}/unblock", json={"outcome": "invalid"}).expect(200)
    row = expect_row(
        client.post(f"{pool}/keys/id:{lease['id']}/replace", json={"secret": "new-secret-of-it"}).expect(200),
        id=lease["id"],
    )
    assert (row["state"], row["failures"], row["name"], row["hint"]) == ("available", 0, "one", "new-…f-it")
    client.get(pool + "/keys/old-secret-of-it").expect_problem(404, "unknown-key")
    lease = client.post(pool + "/keys/acquire").expect(200)
    assert (lease["key"], lease["data"]) == ("new-secret-of-it", {"u": 1})


def test_a_holder_may_go_on_with_the_old_text(client: Client, pool: str) -> None:
    """Until its lease ends."""
    imported(client, pool, "old")
    lease = client.post(pool + "/keys/acquire").expect(200)
    client.post(pool + "/keys/old/replace", json={"secret": "new"}).expect(200)
    client.post(pool + "/keys/old/keepalive").expect(200)
    unblocked = client.post(pool + "/keys/old/unblock", json={"lease": lease["lease"]}).expect(200)
    assert unblocked["changed"] is True
    client.post(pool + "/keys/old/keepalive").expect_problem(404, "unknown-key")
    assert client.post(pool + "/keys/acquire").expect(200)["key"] == "new"


def test_a_wrong_replacement_changes_nothing(client: Client, pool: str) -> None:
    """One that another key has, too long, none, or for no key."""
    ids = [imported(client, pool, secret)["id"] for secret in "ab"]
    client.post(pool + "/keys/a/replace", json={"secret": "b"}).expect_problem(409, "secret-exists")
    for body in ({"secret": ""}, {"secret": "x" * 4097}, {}, {"secret": None}, {"secret": "c", "name": "x"}):
        client.post(pool + "/keys/a/replace", json=body).expect_problem(400, "bad-request")
    client.post(pool + "/keys/a/replace").expect_problem(400, "bad-request")
    client.post(pool + "/keys/c/replace", json={"secret": "d"}).expect_problem(404, "unknown-key")
    assert [client.get(f"{pool}/keys/{key}").expect(200)["id"] for key in "ab"] == ids


def test_find_takes_what_an_operator_knows(client: Client, pool: str) -> None:
    """The whole text before an id, an id before a name, a name before a hint."""
    texts = ["sk-live-0123456789", "id:1", "one", "sk-l…6789"]
    ids = [imported(client, pool, text)["id"] for text in texts]
    path, fourth = f"{pool}/keys/id:{ids[0]}", f"id:{ids[3]}"
    client.patch(f"{pool}/keys/{fourth}", json={"name": "two"}).expect(200)

    def found(text: str) -> int:
        number: int = expect_row(client.post(pool + "/keys/find", json={"key": text}).expect(200))["id"]
        return number

    assert [found(text) for text in texts] == ids
    assert found(fourth) == found("two") == ids[3]
    client.patch(path, json={"name": "on…e"}).expect(200)
    assert found("on…e") == ids[0]
    client.delete(f"{pool}/keys/{fourth}").expect(204)
    assert found("sk-l…6789") == ids[0]
    for text in ("nope", fourth, "id:x", "", "two"):
        client.post(pool + "/keys/find", json={"key": text}).expect_problem(404, "unknown-key")
    client.post(pool + "/keys/find").expect_problem(400, "bad-request")


def test_in_a_body_a_text_comes_before_an_id_and_in_a_path_it_does_not(client: Client, pool: str) -> None:
    """Whatever secrets look like; a handle is a handle."""
    first = imported(client, pool, "first")["id"]
    like_an_id, like_a_handle = f"id:{first}", f"h:{first}.1.abcdefghijk"
    imported(client, pool, like_an_id)
    imported(client, pool, like_a_handle)
    assert client.get(f"{pool}/keys/{like_an_id}").expect(200)["id"] == first
    client.get(f"{pool}/keys/{like_a_handle}").expect_problem(404, "unknown-key")

    def delete(*keys: str) -> int:
        done: int = client.post(pool + "/batch", json={"op": "delete", "keys": keys}).expect(200)["done"]
        return done

    assert delete(like_an_id, like_a_handle) == 2
    assert [row["id"] for row in client.get(pool + "/keys").expect(200)["keys"]] == [first]
    assert delete(like_an_id) == 1


def test_over_valkey_imports_need_a_secrets_key(lend: Start, variant: Variant) -> None:
    """Nothing is written there in clear."""
    if variant.name not in ("valkey", "cluster"):
        pytest.skip("this engine takes keys without")
    client = lend().client()
    pool = client.make_pool("clear", keepalive_seconds=None)
    made = client.post(pool + "/keys").expect(201)
    for path, body in (
        ("/keys", {"secret": "a"}),
        ("/batch", {"op": "import", "keys": [{"secret": "a"}]}),
        (f"/keys/id:{made['id']}/replace", {"secret": "a"}),
    ):
        client.post(pool + path, json=body).expect_problem(409, "secrets-key-required")
    assert total(client, pool) == 1


# --------------------------------------------------------------------------------------------------- who, and audit


def test_who_may_import_and_see_what(guarded_server: ServerProcess) -> None:
    """Only admins; viewers find and see rows, clients get name and data with their lease."""
    admin, viewer, client = (
        guarded_server.client(token) for token in (ADMIN_TOKEN, VIEWER_TOKEN, CLIENT_TOKEN)
    )
    pool = admin.make_pool("openai", keepalive_seconds=None)
    made = imported(admin, pool, name="one", data={"u": "hidden-from-viewers"})
    key = f"id:{made['id']}"
    many = {"op": "import", "keys": [{"secret": "x"}]}
    for method, path, body in (
        ("POST", "/keys", {"secret": "x"}),
        ("POST", "/batch", many),
        ("PATCH", f"/keys/{key}", {"name": "x"}),
        ("POST", f"/keys/{key}/replace", {"secret": "x"}),
        ("POST", f"/keys/{key}/reveal", {}),
    ):
        for who in (viewer, client):
            who.request(method, pool + path, json=body).expect_problem(403, "forbidden")
    client.post(pool + "/keys/find", json={"key": "one"}).expect_problem(403, "forbidden")
    client.post(pool + "/batch", json={"op": "keepalive", "keys": [key]}).expect_problem(403, "forbidden")
    for answer in (
        viewer.post(pool + "/keys/find", json={"key": "one"}),
        viewer.get(pool + "/keys"),
        viewer.get(f"{pool}/keys/{key}"),
        client.get(f"{pool}/keys/{SECRET}"),
    ):
        answer.expect(200)
        assert b"hidden" not in answer.body
        assert SECRET.encode() not in answer.body
    assert client.post(pool + "/keys/acquire").expect(200)["data"] == {"u": "hidden-from-viewers"}


def test_what_is_imported_is_in_the_audit_log(server: ServerProcess, client: Client, pool: str) -> None:
    """Ids and hints, never a secret or data; what changed nothing leaves no line."""
    line = len(server.log_since(0))
    secrets = [f"Secret{number}OfTheAuditTest" for number in range(4)]
    server.secrets.update(secrets, ["DataOfTheAuditTest"])
    first = imported(client, pool, secrets[0], data={"u": "DataOfTheAuditTest"})["id"]
    client.post(pool + "/keys", json={"secret": secrets[0]}).expect(200)
    many = import_many(client, pool, [{"secret": secret} for secret in secrets[:3]] + [{"secret": ""}])
    second, third = (each["id"] for each in many["results"][1:3])
    import_many(client, pool, [{"secret": secrets[1]}])
    client.patch(f"{pool}/keys/id:{second}", json={"name": "x"}).expect(200)
    client.post(f"{pool}/keys/id:{second}/replace", json={"secret": secrets[3]}).expect(200)
    wanted = [
        f"import by admin .*: id:{first} Secr…Test, pool openai",
        f"import by admin .*: 2 keys, id:{second} Secr…Test to id:{third} Secr…Test, pool openai",
        f"update by admin .*: id:{second} Secr…Test, pool openai",
        f"replace by admin .*: id:{second} Secr…Test, pool openai",
    ]

    def written() -> list[str]:
        # Lines of the test before may come late.
        pattern = "audit: (import|update|replace) .* Secr…Test"
        return [each for each in server.log_since(line) if re.search(pattern, each)]

    eventually(lambda: len(written()) >= len(wanted), "the lines of the audit log")
    for pattern, each in zip(wanted, written(), strict=True):
        assert re.search(pattern, each), each
