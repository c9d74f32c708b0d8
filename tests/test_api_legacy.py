"""The paths of the first version, with and without the trailing slash: its clients work unchanged."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Start
from support import (
    ADMIN_TOKEN,
    API,
    CLIENT_TOKEN,
    KEY_TEXT,
    VIEWER_TOKEN,
    Answer,
    Client,
    ServerProcess,
    expect_object,
    expect_row,
)

UNKNOWN = "Kindly send key to be updated, given key does not exist"

both_spellings = pytest.mark.parametrize("slash", ["/", ""], ids=["slash", "no slash"])


def path(slash: str, query: str = "") -> str:
    """The one path of the first version's calls."""
    return f"{API}/random_api_key{slash}{query}"


def expect_message(answer: Answer, status: int) -> str:
    """The message, if status and shape are those of a success of the first version."""
    message = expect_object(answer.expect(status), message=str)["message"]
    assert isinstance(message, str)
    assert message
    return message


def expect_legacy_problem(answer: Answer, status: int, code: str) -> dict[str, Any]:
    """The problem with `message` beside its other members."""
    problem = answer.expect_problem(status, code)
    assert isinstance(problem.get("message"), str), str(answer)
    assert problem["message"], str(answer)
    return problem


@both_spellings
def test_post_generates_a_key(client: Client, slash: str) -> None:
    """201 with api_key alone, and the key is in the pool."""
    key = expect_object(client.post(path(slash)).expect(201), api_key=KEY_TEXT)["api_key"]
    expect_row(client.row(key), state="available")


@both_spellings
def test_get_serves_a_key(client: Client, slash: str) -> None:
    """200 with api_key alone; the key is blocked without an owner, under a lease like any other."""
    key = client.make()["key"]
    assert client.get(path(slash)).expect(200) == {"api_key": key}
    expect_row(client.row(key), state="blocked", owner=None, lease=int)


@both_spellings
def test_get_without_an_available_key_is_404_with_a_message(client: Client, slash: str) -> None:
    """On an empty pool and when all are blocked."""
    for _ in range(2):
        answer = client.get(path(slash))
        assert answer.status == 404, str(answer)
        assert answer.json["message"], str(answer)
        client.make()
        client.get(path(slash)).expect(200)


@both_spellings
def test_put_unblocks_a_key(client: Client, slash: str) -> None:
    """200 with a message alone, for a blocked key and for one that is free already."""
    client.make()
    key = client.get(path(slash)).expect(200)["api_key"]
    for _ in range(2):
        expect_message(client.put(path(slash, f"?api_key={key}")), 200)
        expect_row(client.row(key), state="available")


@both_spellings
def test_delete_purges_a_key(client: Client, slash: str) -> None:
    """200 with a message alone; the key is unknown then, here and everywhere."""
    key = client.make()["key"]
    expect_message(client.delete(path(slash, f"?api_key={key}")), 200)
    client.get(f"{API}/keys/{key}").expect_problem(404, "unknown-key")
    answer = client.delete(path(slash, f"?api_key={key}"))
    assert answer.status == 400, str(answer)
    assert answer.json["message"] == UNKNOWN, str(answer)


@both_spellings
def test_an_unknown_or_missing_key_is_400_in_the_old_words(client: Client, slash: str) -> None:
    """The message of the first version, word for word, and nothing changes."""
    client.make()
    with client.expect_moved():
        for method in ("PUT", "DELETE"):
            for query in ("?api_key=nope", "", "?api_key=", "?api_key=%D0%BA%FF%00"):
                answer = client.request(method, path(slash, query))
                assert answer.status == 400, str(answer)
                if "%FF" not in query:  # bytes that aren't text may be refused as a malformed query instead
                    assert answer.json["message"] == UNKNOWN, str(answer)


@both_spellings
def test_start_scheduler_has_nothing_to_start(client: Client, slash: str) -> None:
    """200 with a message alone."""
    expect_message(client.get(f"{API}/start_scheduler{slash}"), 200)


def test_old_and_new_calls_work_on_the_same_pool(client: Client) -> None:
    """A key generated here is served there, and the other way round."""
    old = client.post(path("/")).expect(201)["api_key"]
    assert client.acquire()["key"] == old
    client.put(path("/", f"?api_key={old}")).expect(200)
    client.delete(path("/", f"?api_key={old}")).expect(200)
    new = client.make()["key"]
    assert client.get(path("/")).expect(200)["api_key"] == new
    client.post(f"{API}/keys/{new}/unblock").expect(200)
    assert client.get(path("")).expect(200)["api_key"] == new


WRONG_QUERIES = [
    ("POST", "?count=1"), ("POST", "?api_key=x"), ("GET", "?wait=1"), ("PUT", "?api_key={key}&state=1"),
    ("PUT", "?api_key={key}&api_key={key}"), ("DELETE", "?api_key={key}&api_key={key}"),
    ("DELETE", "?api_key={key}&x"),
]  # fmt: skip


@pytest.mark.once
@both_spellings
def test_a_wrong_query_is_400_with_a_message(client: Client, slash: str) -> None:
    """Unknown and repeated parameters are refused as elsewhere, and nothing changes."""
    key = client.make()["key"]
    with client.expect_moved():
        for method, query in WRONG_QUERIES:
            answer = client.request(method, path(slash, query.format(key=key)))
            assert answer.status == 400, str(answer)
            assert answer.json["message"], str(answer)


def test_other_methods_are_405_with_a_message(client: Client) -> None:
    """With Allow, as everywhere."""
    for url in (path(""), path("/"), API + "/start_scheduler", API + "/start_scheduler/"):
        allowed = {"GET", "POST", "PUT", "DELETE"} if "random" in url else {"GET"}
        for method in {"POST", "PUT", "DELETE", "PATCH"} - allowed:
            answer = client.request(method, url)
            expect_legacy_problem(answer, 405, "method-not-allowed")
            assert allowed <= answer.allowed() <= allowed | {"HEAD", "OPTIONS"}, str(answer.headers)


def test_a_full_pool_is_409_with_a_message(lend: Start) -> None:
    """pool-full, as from generate."""
    client = lend("--max-keys=1").client()
    client.post(path("/")).expect(201)
    expect_legacy_problem(client.post(path("/")), 409, "pool-full")


@both_spellings
def test_errors_before_the_call_have_a_message_too(client: Client, slash: str) -> None:
    """A body where none is due, a wrong type, too large a body, another site and another host."""
    with client.expect_moved():
        answer = client.post(path(slash), json={"count": 1})
        assert answer.status == 400, str(answer)
        assert answer.json["message"], str(answer)
        answer = client.post(path(slash), body=b"{}", headers={"Content-Type": "text/plain"})
        expect_legacy_problem(answer, 415, "unsupported-media-type")
        expect_legacy_problem(client.post(path(slash), headers={"Origin": "null"}), 403, "cross-site")
        for method in ("GET", "POST"):
            answer = client.request(method, path(slash), headers={"Sec-Fetch-Site": "cross-site"})
            expect_legacy_problem(answer, 403, "cross-site")
        expect_legacy_problem(client.get(path(slash), headers={"Host": "keys.example"}), 421, "wrong-host")
        wire = client.server.wire()
        wire.ask(
            "POST", path(slash), body=b" " * (256 * 1024 + 1), headers={"Content-Type": "application/json"}
        )
        expect_legacy_problem(wire.answer(), 413, "payload-too-large")


@both_spellings
def test_roles_are_those_of_the_current_calls(guarded_server: ServerProcess, slash: str) -> None:
    """generate and delete for admins, acquire and unblock for clients, start_scheduler for viewers;
    errors with message.
    """
    server = guarded_server
    admin = server.client(ADMIN_TOKEN)
    tokens = {"client": CLIENT_TOKEN, "viewer": VIEWER_TOKEN, "admin": ADMIN_TOKEN}
    for method, allowed, status in (
        ("POST", {"admin"}, 201),
        ("GET", {"client", "admin"}, 200),
        ("PUT", {"client", "admin"}, 200),
        ("DELETE", {"admin"}, 200),
        ("GET scheduler", {"viewer", "admin"}, 200),
    ):
        for role, token in tokens.items():
            key = admin.make()["key"]
            query = f"?api_key={key}" if method in ("PUT", "DELETE") else ""
            url = path(slash, query) if "scheduler" not in method else f"{API}/start_scheduler{slash}"
            answer = server.client(token).request(method.split()[0], url)
            if role in allowed:
                answer.expect(status)
            else:
                expect_legacy_problem(answer, 403, "forbidden")
        answer = server.client().request(method.split()[0], url)
        expect_legacy_problem(answer, 401, "unauthorized")
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
