"""Errors and headers on every path and method: shapes, the order of checks, HEAD and OPTIONS, limits.

What the dispatcher decides is tested on one call in all its forms, and on every call in one form.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from support import (
    ACQUIRE,
    ADMIN_TOKEN,
    API,
    CLIENT_TOKEN,
    JSON,
    OF_POOLS,
    REQUEST_ID,
    ROUTES,
    VIEWER_TOKEN,
    Answer,
    Client,
    ServerProcess,
    encode_request,
)

LIMIT = 256 * 1024
ALL_ROUTES = {**ROUTES, **OF_POOLS}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


def fill(template: str, key: str) -> str:
    """The path with this key in it."""
    return template.replace("{key}", key).replace("{pool}", "default")


# ----------------------------------------------------------------------------------------- paths and methods


@pytest.mark.parametrize("template", ALL_ROUTES)
def test_options_answers_204_with_the_methods(client: Client, template: str) -> None:
    """On every path, for a key that is there or not."""
    for key in (client.make()["key"], "nope", "id:1"):
        answer = client.options(fill(template, key))
        assert answer.status == 204, str(answer)
        allowed = answer.allowed()
        assert ALL_ROUTES[template] <= allowed <= ALL_ROUTES[template] | {"OPTIONS"}, f"Allow {allowed}"


@pytest.mark.parametrize("template", ALL_ROUTES)
def test_other_methods_are_405_with_the_methods(client: Client, template: str) -> None:
    """On every path; Allow is what OPTIONS says; nothing changes."""
    key = client.make()["key"]
    path = fill(template, key)
    allowed = client.options(path).allowed()
    for method in sorted(set(METHODS) - ALL_ROUTES[template]):
        with client.expect_moved():
            answer = client.request(method, path)
            assert answer.status == 405, str(answer)
            assert answer.allowed() == allowed, f"Allow {answer.allowed()} of {method}, {allowed} of OPTIONS"
            if method != "HEAD":
                answer.expect_problem(405, "method-not-allowed")


def test_acquire_takes_only_post(client: Client) -> None:
    """It isn't a key that could be read or deleted."""
    for method in ("GET", "DELETE", "PUT", "PATCH"):
        answer = client.request(method, ACQUIRE)
        answer.expect_problem(405, "method-not-allowed")
        assert answer.allowed() - {"OPTIONS"} == {"POST"}


UNKNOWN_PATHS = [
    "/api/", "/api/v1", "/api/v1/", "/api/v2/keys", "/api/v1/key", "/api/v1/stats/", "/api/v1/batch/",
    "/api/v1/stats/more", "/api/v1/keys/a/b", "/api/v1/keys/a/unblock/", "/api/v1/keys/a/unblock/b",
    "/api/v1/keys/a/acquire", "/api/v1/Keys", "/api/v1/%ff", "/API/v1/keys", "/nope", "/healthz/x",
]  # fmt: skip


def test_an_unknown_path_is_a_problem(client: Client) -> None:
    """404 not-found for every method, outside /api/ too if the client isn't a browser."""
    for path in UNKNOWN_PATHS:
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            client.request(method, path).expect_problem(404, "not-found")
        assert client.head(path).status == 404


def test_a_browser_gets_a_problem_under_api_too(client: Client) -> None:
    """Only paths outside /api/ answer with a page."""
    for path in ("/api/v1/nope", "/api/v1/keys/nope"):
        answer = client.get(path, headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
        assert answer.status == 404, str(answer)
        assert answer.headers.get_content_type() == "application/problem+json", str(answer)


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_is_200_for_anyone(client: Client, guarded_server: ServerProcess, path: str) -> None:
    """GET and HEAD, with and without tokens in force."""
    for one in (client, guarded_server.client()):
        assert one.get(path).status == 200
        assert one.head(path).status == 200


# ----------------------------------------------------------------------------------------------- request ids


@pytest.mark.parametrize("given", ["a", "A.b_c-9", "x" * 64, "...", "-"])
def test_the_callers_request_id_is_kept(client: Client, given: str) -> None:
    """In the header of every answer, and in the body of a problem."""
    headers = {"X-Request-Id": given}
    for path in ("/stats", "/nope", "/keys?limit=0"):
        answer = client.get(API + path, headers=headers)
        assert answer.headers["X-Request-Id"] == given
        assert answer.status < 400 or answer.json["request_id"] == given
    for method in ("OPTIONS", "HEAD"):
        assert client.request(method, API + "/stats", headers=headers).headers["X-Request-Id"] == given


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a/b", "é", "a\tb", "a,b", "<script>", "a\x7fb"])
def test_a_request_id_of_another_form_is_replaced(server: ServerProcess, given: str) -> None:
    """By a new one, so that it can't smuggle text into a log or a header."""
    wire = server.wire()
    wire.ask("GET", API + "/stats", headers={"X-Request-Id": given})
    try:
        answer = wire.answer()
    except AssertionError:
        assert given == "a\x7fb"  # not allowed in a header's value: the connection may be closed
        return
    assert answer.headers["X-Request-Id"] != given or answer.status == 400
    assert REQUEST_ID.fullmatch(answer.headers["X-Request-Id"])


def test_new_request_ids_differ(client: Client) -> None:
    """No two answers have the same."""
    ids = [client.get(API + "/stats").headers["X-Request-Id"] for _ in range(50)]
    assert len(set(ids)) == 50


# ----------------------------------------------------------------------------------------------------- bodies

# A method and a path of each call that is in the contract's own table; {key} stands for a key.
WITHOUT_BODY = [
    ("POST", "/api/v1/keys/{key}/keepalive"),
    ("POST", "/api/v1/keys/{key}/reveal"),
    ("DELETE", "/api/v1/keys/{key}"),
    ("GET", "/api/v1/keys/{key}"),
    ("GET", "/api/v1/keys"),
    ("GET", "/api/v1/stats"),
]
WITH_BODY = [
    ("POST", "/api/v1/keys"),
    ("POST", "/api/v1/keys/find"),
    ("PATCH", "/api/v1/keys/{key}"),
    ("POST", "/api/v1/keys/{key}/replace"),
    ("PUT", "/api/v1/pools/{pool}"),
    ("PATCH", "/api/v1/pools/{pool}"),
    ("POST", "/api/v1/keys/acquire"),
    ("POST", "/api/v1/keys/{key}/unblock"),
    ("POST", "/api/v1/batch"),
]
call = pytest.mark.parametrize(("method", "template"), WITHOUT_BODY + WITH_BODY)

NOT_OBJECTS: list[object] = [[], [{}], "", "x", 0, 1, 1.5, True, False]
MALFORMED = [
    b"{", b"}", b"[", b'{"', b'{"a', b'{"a":', b'{"a":1', b'{"a":1,', b'{"a":1,}', b"{a:1}", b"{'a':1}",
    b'{"a":01}', b'{"a":+1}', b'{"a":.5}', b'{"a":NaN}', b'{"a":Infinity}', b'{"wait":NaN}',
    b'{"wait":-Infinity}', b'{"a":1} x', b"{}{}", b"{},", b"nul", b"undefined", b"a=b", b"<x/>", b"\x00", b"{}\x00",
    b'{"owner":"\xff"}', b'{"owner":"\xc3"}', b'{"owner":"\xed\xa0\x80"}', b'{"owner":"a\nb"}', b'{"owner":"\\x41"}',
    b'{"owner":"\\u12"}', '{"lease":1}'.encode("utf-16"), b"/* */{}", b'{"lease":1e}', b'{"lease":--1}',
    # The decoder meets a number of the wrong kind before what isn't JSON.
    b'{"lease":1.0,}', b'{"lease":1.0', b'{"lease":1.5} x', b'{"lease":1.0,"\xff":1}', b"1.5,", b"1.5x",
    b'{"op":"generate","count":1.5,', b'{"op":"generate","count":1.0,"x":' + b"[" * 2000 + b"]" * 2000 + b"}",
]  # fmt: skip
OTHER_TYPES = [
    "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/html",
    "application/xml", "image/png", "application/octet-stream", "json", "application/jsonx",
    "text/json/application", ";", "*/*",
]  # fmt: skip


@call
def test_every_call_refuses_a_wrong_body_and_query(client: Client, method: str, template: str) -> None:
    """400, 413 and 415, and nothing changes."""
    client.make()
    path = fill(template, client.acquire()["key"])
    client.make()
    wrong: list[object] = [*NOT_OBJECTS, {"x": None}, {"x": 1}]
    right: dict[str, Any] = {"json": {"op": "generate", "count": 1}} if "batch" in path else {}
    with client.expect_moved():
        for value in wrong:
            client.request(method, path, json=value).expect_problem(400, "bad-request")
        for body in (b"{", b"[" * 20_000, b'{"a":' * 2000 + b"1" + b"}" * 2000, b'{"wait":NaN}'):
            client.request(method, path, body=body, headers=JSON).expect_problem(400, "bad-request")
            client.request(method, path, body=body).expect_problem(400, "bad-request")
        answer = client.request(method, path, body=b"{}", headers={"Content-Type": "text/plain"})
        answer.expect_problem(415, "unsupported-media-type")
        for query in (
            ("x=1", "access_token=x", "x", "%FF=1") if path != API + "/keys" or method == "POST" else ()
        ):
            client.request(method, f"{path}?{query}", **right).expect_problem(400, "bad-request")
        wire = client.server.wire()
        wire.ask(method, path, body=b" " * (LIMIT + 1), headers=JSON)
        wire.answer().expect_problem(413, "payload-too-large")


@pytest.mark.once
@pytest.mark.parametrize(("method", "template"), [WITHOUT_BODY[1], *WITH_BODY])
def test_malformed_json_of_every_form_is_refused(client: Client, method: str, template: str) -> None:
    """400 bad-request, however it is broken and however deep within the size limit, and nothing changes."""
    path = fill(template, client.make()["key"])
    nested = [("[", "]"), ('{"a":', "}"), ('{"owner":[', "]}"), ('{"keys":[[', "]]}")]
    deep = [
        text.encode()
        for (open_, close), depth in itertools.product(nested, (100, 2000, 20_000))
        for text in (open_ * depth + "1" + close * depth, open_ * depth)
    ]
    with client.expect_moved():
        for body in MALFORMED + deep:
            client.request(method, path, body=body, headers=JSON).expect_problem(400, "bad-request")


@pytest.mark.once
@pytest.mark.parametrize("template", ["/api/v1/keys/acquire", "/api/v1/keys/{key}/unblock"])
def test_an_unknown_field_is_named(client: Client, template: str) -> None:
    """400 whose detail names the field, also when its value is null and the other fields are right."""
    path = fill(template, client.make()["key"])
    good: dict[str, object] = {"owner": "me"} if "acquire" in template else {"lease": None}
    with client.expect_moved():
        for name in ("x", "Wait", "Lease", "owner ", "", "key", "ключ", "count", "__proto__", "a" * 3000):
            for body in ({name: 1}, {name: None}, good | {name: 1}):
                problem = client.post(path, json=body).expect_problem(400, "bad-request")
                assert name[:20] in problem["detail"], problem


WRONG_VALUES: dict[str, list[object]] = {
    "owner": [5, True, [], {}, 1.5, "", "x" * 201, "🦊" * 201,
              "a\nb", "\x00", "a\x1f", "\x7f", "\x85", "\t", "\r", "\n", "me\n"],
    "wait": ["1", True, [], {}, -1, 61],
    "lease": ["1", True, [], {}, 1.5, "x"],
}  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("field", WRONG_VALUES)
def test_a_field_of_a_wrong_value_is_named(client: Client, field: str) -> None:
    """400 whose detail names the field, and nothing changes."""
    client.make()
    key = client.acquire()["key"]
    client.make()
    path = f"{API}/keys/{key}/unblock" if field == "lease" else ACQUIRE
    with client.expect_moved():
        for value in WRONG_VALUES[field]:
            problem = client.post(path, json={field: value}).expect_problem(400, "bad-request")
            assert field in problem["detail"], problem


def test_a_lease_that_no_acquire_gave_frees_nothing(client: Client) -> None:
    """Stale, or out of range: refused without an error of the server's, whatever its size."""
    client.make()
    key = client.acquire()["key"]
    with client.expect_moved():
        for lease in (0, -1, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63)):
            answer = client.post(f"{API}/keys/{key}/unblock", json={"lease": lease})
            known = ((409, "stale-lease"), (400, "bad-request"))
            assert (answer.status, answer.json["code"]) in known, str(answer)
            answer = client.batch(op="unblock", keys=[{"key": key, "lease": lease}])
            assert answer.status == 400 or answer.expect(200)["stale"] == [key], str(answer)


def test_a_lone_surrogate_is_refused_or_kept(client: Client) -> None:
    """JSON can express text that isn't valid Unicode; the pool can still be read afterwards."""
    client.make()
    for path, body in (
        (ACQUIRE, b'{"owner":"\\ud800"}'),
        (API + "/batch", b'{"op":"keepalive","keys":["\\ud800"]}'),
        (API + "/batch", b'{"\\udfff":1}'),
    ):
        assert client.post(path, body=body, headers=JSON).status in (200, 400)
    client.get(API + "/keys").expect(200)


# ---------------------------------------------------------------------------------------------- content types


@pytest.mark.once
def test_a_body_of_another_type_is_refused(client: Client) -> None:
    """415, and nothing changes."""
    client.make()
    with client.expect_moved():
        for kind in OTHER_TYPES:
            answer = client.post(ACQUIRE, body=b"{}", headers={"Content-Type": kind})
            answer.expect_problem(415, "unsupported-media-type")


def test_json_by_any_spelling_is_taken(client: Client) -> None:
    """Parameters and letter case of the media type don't matter."""
    kinds = ["application/json", "application/json; charset=utf-8", 'application/json;charset="UTF-8"']
    for kind in (*kinds, "Application/JSON"):
        client.make()
        client.post(ACQUIRE, body=b'{"owner":"me"}', headers={"Content-Type": kind}).expect(200)


# ------------------------------------------------------------------------------------------------------ query


def test_an_empty_query_is_accepted(client: Client) -> None:
    """A question mark with nothing behind it is ignored."""
    client.get(API + "/stats?").expect(200)
    client.post(API + "/keys?").expect(201)


# ----------------------------------------------------------------------------------------------------- limits


def padded(size: int) -> bytes:
    """A right body for acquire of exactly so many bytes."""
    return b'{"owner":"me"}'.ljust(size)


def chunked(method: str, path: str, host: str, chunks: list[bytes], **how: Any) -> bytes:
    """A request whose body goes in chunks."""
    head = encode_request(method, path, host, headers={"Transfer-Encoding": "chunked"} | JSON, **how)
    return head + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


def test_a_body_of_256_kib_is_taken(client: Client) -> None:
    """With Content-Length and in chunks."""
    client.make_many(3)
    client.post(ACQUIRE, body=padded(LIMIT), headers=JSON).expect(200)
    wire = client.server.wire()
    for sizes in ([LIMIT], [1, LIMIT - 1 - 1000, 1000]):
        body = padded(LIMIT)
        chunks = [body[sum(sizes[:at]) : sum(sizes[: at + 1])] for at in range(len(sizes))]
        wire.expect_answer_to("POST", ACQUIRE)
        wire.send(chunked("POST", ACQUIRE, client.server.host, chunks))
        wire.answer().expect(200)


@pytest.mark.parametrize("form", ["content-length", "one chunk", "chunks"])
@pytest.mark.parametrize("size", [LIMIT + 1, 2 * LIMIT])
def test_a_larger_body_is_refused(client: Client, form: str, size: int) -> None:
    """413 payload-too-large, which a client that sends the whole body can read, and nothing changes."""
    client.make()
    wire = client.server.wire()
    with client.expect_moved():
        if form == "content-length":
            wire.ask("POST", ACQUIRE, body=padded(size), headers=JSON)
        else:
            body = padded(size)
            step = size if form == "one chunk" else 10_000
            chunks = [body[at : at + step] for at in range(0, size, step)]
            wire.expect_answer_to("POST", ACQUIRE)
            wire.send(chunked("POST", ACQUIRE, client.server.host, chunks))
        wire.answer().expect_problem(413, "payload-too-large")
    client.acquire()


def test_a_uri_too_long_is_refused(client: Client) -> None:
    """414, or 431 where the request line counts as part of the head: a problem either way."""
    for path in (f"{API}/keys?prefix=" + "a" * 100_000, f"{API}/keys/" + "a" * 100_000):
        wire = client.server.wire()
        wire.ask("GET", path)
        answer = wire.answer()
        assert (answer.status, answer.json["code"]) in ((414, "uri-too-long"), (431, "headers-too-large")), (
            str(answer)
        )


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_head_over_the_limits_is_answered_to_head_as_well(client: Client, method: str) -> None:
    """414 or 431, without a body to HEAD, and with a message on the first version's paths."""
    for path, headers in ((f"{API}/stats?{'a' * 9000}", {}), (f"{API}/stats", {"X-A": "a" * 40_000})):
        assert client.request(method, path, headers=headers).status in (414, 431)
    for path, headers in (
        (f"{API}/random_api_key/?{'a' * 9000}", {}), (f"{API}/random_api_key/", {"X-A": "a" * 40_000})
    ):  # fmt: skip
        answer = client.get(path, headers=headers)
        assert answer.status in (414, 431)
        assert answer.json["message"]


def test_requests_for_pages_have_limits_too(client: Client) -> None:
    """413 and 431 on every path, the health's and the feed's among them."""
    for method, path in (("POST", "/login"), ("GET", "/healthz"), ("GET", f"{API}/feed")):
        long = client.request(method, path, headers={"X-A": "a" * 40_000})
        wide = client.request(method, path, body=b"x" * 300_000)
        assert (long.status, wide.status) == (431, 413), path


@pytest.mark.parametrize("form", ["one long", "many"])
def test_headers_too_large_are_refused(client: Client, form: str) -> None:
    """431 headers-too-large, for one long field and for many short ones."""
    wire = client.server.wire()
    headers = {"X-A": "a" * 200_000} if form == "one long" else {f"X-{at}": "a" * 90 for at in range(2000)}
    wire.ask("GET", API + "/stats", headers=headers)
    wire.answer().expect_problem(431, "headers-too-large")
    client.get(API + "/stats").expect(200)


# -------------------------------------------------------------------------------------------- order of checks

WRONG: dict[str, tuple[int, str]] = {
    "site": (403, "cross-site"),
    "path": (404, "not-found"),
    "method": (405, "method-not-allowed"),
    "token": (401, "unauthorized"),
    "role": (403, "forbidden"),
    "target": (414, "uri-too-long"),
    "head": (431, "headers-too-large"),
    "size": (413, "payload-too-large"),
    "type": (415, "unsupported-media-type"),
    "body": (400, "bad-request"),
}


def wrong_request(server: ServerProcess, wrong: set[str]) -> Answer:
    """A generate, by an admin on a guarded server, that is wrong in all these respects."""
    token = None if "token" in wrong else CLIENT_TOKEN if "role" in wrong else ADMIN_TOKEN
    headers = {"Content-Type": "text/plain" if "type" in wrong else "application/json"}
    if "site" in wrong:
        headers["Origin"] = "http://elsewhere.example"
    path = API + ("/nope" if "path" in wrong else "/keys")
    if "target" in wrong:
        path += "?" + "a" * 9000
    if "head" in wrong:
        headers["X-A"] = "a" * 40_000
    body = b"{" if "body" in wrong else b"{}"
    if "size" in wrong:
        body = body.ljust(LIMIT + 1)
    wire = server.wire()
    wire.ask("PUT" if "method" in wrong else "POST", path, body=body, headers=headers, token=token)
    return wire.answer()


def test_checks_come_in_their_order(guarded_server: ServerProcess) -> None:
    """Site, path, method, token, role, size, content type, body: the earliest of the wrongs is reported."""
    admin = guarded_server.client(ADMIN_TOKEN)
    pairs = [{*pair} for pair in itertools.combinations(WRONG, 2) if pair != ("token", "role")]
    chains = [{*list(WRONG)[at:]} for at in range(len(WRONG))]
    with admin.expect_moved():
        for wrong in pairs + chains:
            first = next(name for name in WRONG if name in wrong)
            answer = wrong_request(guarded_server, wrong)
            assert (answer.status, answer.json["code"]) == WRONG[first], f"of {wrong}: {answer}"


def test_the_host_is_checked_first(server: ServerProcess) -> None:
    """On an open server: 421 whatever else is wrong."""
    for method, path, body, kind in (
        ("POST", API + "/nope", b"{}", "application/json"),
        ("PUT", ACQUIRE, b"{}", "application/json"),
        ("POST", ACQUIRE, b" " * (LIMIT + 1), "application/json"),
        ("POST", ACQUIRE, b"{}", "text/plain"),
        ("POST", ACQUIRE, b"{", "application/json"),
    ):
        wire = server.wire()
        wire.ask(method, path, body=body, headers={"Host": "keys.example", "Content-Type": kind})
        wire.answer().expect_problem(421, "wrong-host")


def test_ids_are_refused_to_clients_before_the_body_is_checked(guarded_server: ServerProcess) -> None:
    """403 is the role's: it comes before 415 and 400, and whether the id exists or not."""
    client = guarded_server.client(CLIENT_TOKEN)
    known = guarded_server.client(ADMIN_TOKEN).make()["id"]
    for number in (known, 10**12):
        for headers in ({"Content-Type": "text/plain"}, JSON):
            answer = client.post(f"{API}/keys/id:{number}/unblock", body=b"{", headers=headers)
            answer.expect_problem(403, "forbidden")


def test_a_viewers_role_is_checked_before_its_body(guarded_server: ServerProcess) -> None:
    """403 before 413, 415 and 400."""
    for body, kind in ((b"{", "application/json"), (b"{}", "text/plain")):
        viewer = guarded_server.client(VIEWER_TOKEN)
        viewer.post(ACQUIRE, body=body, headers={"Content-Type": kind}).expect_problem(403, "forbidden")


# ------------------------------------------------------------------------------------------------ connections


def test_pipelined_requests_are_answered_in_order(client: Client) -> None:
    """Many at once on a connection, good and bad, also behind one that waits."""
    wire = client.server.wire()
    made = client.make_many(20)
    client.batch(op="acquire", count=20).expect(200)
    wire.ask("POST", ACQUIRE, json={"wait": 0.3})
    for one in made:
        wire.ask("GET", f"{API}/keys/{one['key']}")
        wire.ask("POST", ACQUIRE, json={"wait": -1})
    wire.answer().expect_problem(404, "no-key-available")
    for one in made:
        assert wire.answer().expect(200)["id"] == one["id"]
        wire.answer().expect_problem(400, "bad-request")


def test_a_refused_body_leaves_the_connection_in_step(client: Client) -> None:
    """After every kind of refusal the same connection, unless the answer ends it,
    answers the next call rightly.
    """
    key = client.make()["key"]
    wire = client.server.wire()
    for _ in range(3):
        for method, path, how in (
            ("POST", ACQUIRE, {"body": b"{", "headers": JSON}),
            ("POST", ACQUIRE, {"body": b"GET / HTTP/1.1\r\n\r\n", "headers": {"Content-Type": "text/plain"}}),
            ("POST", API + "/nope", {"body": b"DELETE / HTTP/1.1\r\n\r\n"}),
            ("PUT", API + "/keys", {"body": json.dumps({"x": "y" * 10_000}).encode()}),
            ("GET", f"{API}/keys/nope", {"body": b"{}"}),
        ):
            if not wire.going_on:
                wire = client.server.wire()
            wire.ask(method, path, **how)
            assert wire.answer().status in (400, 404, 405, 415)
            if not wire.going_on:
                wire = client.server.wire()
            wire.ask("GET", f"{API}/keys/{key}")
            wire.answer().expect(200)


def test_a_body_in_small_pieces_is_put_together(client: Client) -> None:
    """However the bytes arrive, a request is a request."""
    client.make()
    wire = client.server.wire()
    data = encode_request("POST", ACQUIRE, client.server.host, json={"owner": "Наташа"})
    wire.expect_answer_to("POST", ACQUIRE)
    for at in range(len(data)):
        wire.send(data[at : at + 1])
    key = wire.answer().expect(200)["key"]
    assert client.row(key)["owner"] == "Наташа"
