"""Ten thousand malformed requests, each wrong by construction: all are refused and have no effect.

A `Shot` is the wire text of one request that must be refused. The makers below start from what is right and
spoil it in a way that no reading of the contract allows; whatever is still HTTP must be answered by a problem
(`Wire.answer` looks at its shape) on a connection that stays in step, and what is no HTTP gets a bare 400 or
a closed connection. The seeds are fixed, so a failure comes again; it shows the shot.
"""

from __future__ import annotations

import base64
import copy
import http.client
import io
import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import pytest
from conftest import Start
from support import (
    API,
    LEGACY,
    ROUTES,
    Answer,
    Client,
    ServerProcess,
    Wire,
    encode_request,
    expect_problem_shape,
)

CHUNKS = 8
SHOTS = 500
JSON = {"Content-Type": "application/json"}
KNOWN_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
WIDE = "aZ09 \t\n\r\0\x1f\x7f\x85\xa0éßжש中🦊\ufeff\u202e\u2028\\\"'<>&%/?#;=+,:{}[]()|~`^*!@$"


@dataclass
class Shot:
    """One malformed request; `http` says whether it is still a well-formed HTTP request."""

    kind: str
    method: str
    path: str
    data: bytes
    http: bool = True


@dataclass
class Range:
    """What shots are aimed at: the server's Host, a free key, and a blocked one with its lease."""

    host: str
    free: str
    held: str
    held_id: int
    lease: int


def junk(rng: random.Random, longest: int = 40) -> str:
    """Some text of any characters."""
    return "".join(rng.choice(WIDE) for _ in range(rng.randint(1, longest)))


def word(rng: random.Random, longest: int = 20) -> str:
    """Some text of letters, at least five, which is the name of nothing."""
    return "zq" + "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(3, longest)))


# ----------------------------------------------------------------------------------------------------- bodies

WRONG_VALUES: dict[str, list[Any]] = {
    "owner": [5, True, [], {}, "", "a" * 201, "a\0", "\n", 1.5, ["me"], {"a": 1}],
    "wait": [-1, 61, "1", True, [], {}, -1e-9, 1e300, "", [0]],
    "lease": ["1", 1.5, True, [], {}, "", [1]],
    "op": ["Generate", "", 5, None, [], {}, "reveal", "generate ", True],
    "count": [0, -1, 1001, 1.5, "3", True, None, [], {}, 10**30, -(10**30)],
    "keys": [[], "x", 5, None, {}, True, [5], [None], [[]], [{}], [True], ["k"] * 1001, ["k", 1.5],
             [{"key": 5}], [{"key": "k", "lease": "x"}], [{"key": "k", "more": 1}], [{"lease": 1}]],
}  # fmt: skip


def specimen(rng: random.Random, aim: Range) -> tuple[str, dict[str, Any]]:
    """A path and a body that would be right there."""
    specimens: list[tuple[str, dict[str, Any]]] = [
        (API + "/keys/acquire", {"owner": "me", "wait": 0}),
        (f"{API}/keys/{aim.held}/unblock", {"lease": aim.lease}),
        (f"{API}/keys/id:{aim.held_id}/unblock", {"lease": aim.lease}),
        (API + "/batch", {"op": "generate", "count": 3}),
        (API + "/batch", {"op": "acquire", "count": 3, "owner": "me"}),
        (API + "/batch", {"op": "keepalive", "keys": [aim.free, aim.held]}),
        (API + "/batch", {"op": "unblock", "keys": [aim.held, {"key": aim.held, "lease": aim.lease}]}),
        (API + "/batch", {"op": "delete", "keys": [aim.free]}),
    ]
    return rng.choice(specimens)


def truncated(rng: random.Random, body: dict[str, Any]) -> bytes:
    """The JSON cut anywhere before its last byte."""
    text = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode()
    return text[: rng.randint(1, len(text) - 1)]


def with_unknown_field(rng: random.Random, body: dict[str, Any]) -> bytes:
    """One field more, at any place."""
    name = rng.choice(
        [word(rng), junk(rng) + "é", "", "Op", "COUNT", "owner ", "key\0", "x" * 5000, "__class__"]
    )
    items = [*body.items(), (name, rng.choice([None, 1, "x", [], {}, [[[]]]]))]
    rng.shuffle(items)
    return json.dumps(dict(items)).encode()


def with_wrong_value(rng: random.Random, body: dict[str, Any]) -> bytes:
    """One field of a wrong type or out of its range."""
    spoilt = copy.deepcopy(body)
    field = rng.choice(list(spoilt))
    spoilt[field] = rng.choice(WRONG_VALUES[field])
    return json.dumps(spoilt).encode()


def with_trailing_garbage(rng: random.Random, body: dict[str, Any]) -> bytes:
    """A right body, and something behind it."""
    tail = rng.choice([b"x", b"{}", b"]", b",", b"\0", b"//", b"null", b"\xff", b"\xef\xbb\xbf"])
    return json.dumps(body).encode() + tail


def of_another_root(rng: random.Random, body: dict[str, Any]) -> bytes:
    """JSON, but not an object."""
    return json.dumps(
        rng.choice([[], [body], "x", 0, -1, 1.5, True, False, json.dumps(body), [[[]]]])
    ).encode()


def nested(rng: random.Random, body: dict[str, Any]) -> bytes:
    """As deep as the size limit allows, or less, closed or not, at the root or in a field."""
    open_, close = rng.choice([("[", "]"), ('{"a":', "}"), ('[{"a":[', "]}]")])
    depth = rng.choice([10, 500, 1100, 5000, 20_000])
    text = open_ * depth + rng.choice(["1", "", '"x"']) + close * rng.choice([depth, 0])
    if rng.random() < 0.5:
        return text.encode()
    return f'{{"{rng.choice(["owner", "keys", "lease", "op", "wait"])}":{text}}}'.encode()


def no_json(rng: random.Random, body: dict[str, Any]) -> bytes:
    """Literals of other languages, other encodings, and plain garbage."""
    text = json.dumps(body)
    return rng.choice(
        [
            text.replace('"', "'").encode(),
            (text[:-1] + ",}").encode(),
            ("/* */" + text).encode(),
            text.encode("utf-16"),
            text.encode("utf-32"),
            ("\x00" + text).encode(),
            text.replace(":", "=").encode(),
            text.replace('"', "").encode(),
            b"{" + bytes(rng.randrange(256) for _ in range(rng.randint(1, 60))) + b"\xff",
            b"\xff\xfe" + rng.randbytes(rng.randint(1, 60)),
            (
                b'{"owner":"'
                + rng.choice([b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf8\x88", b"\xc3"])
                + b'"}'
            ),
            (
                b'{"wait":'
                + rng.choice([b"NaN", b"Infinity", b"-Infinity", b"1e", b"0x1", b"01", b".5", b"+1"])
                + b"}"
            ),
            (b'{"lease":' + rng.choice([b"NaN", b"1e999", b"-", b"1_0", b"0b1", b"true", b"1n"]) + b"}"),
            b"op=generate&count=1",
            b'<?xml version="1.0"?><op>generate</op>',
            b'{"owner":"a\nb"}',
            b'{"owner":"\\q"}',
        ]
    )


def body_shot(rng: random.Random, aim: Range) -> Shot:
    """A call with a body that is wrong."""
    path, body = specimen(rng, aim)
    spoil: Callable[[random.Random, dict[str, Any]], bytes] = rng.choice(
        [
            truncated,
            with_unknown_field,
            with_wrong_value,
            with_trailing_garbage,
            of_another_root,
            nested,
            no_json,
        ]
    )
    data = encode_request(
        "POST", path, aim.host, body=spoil(rng, body), headers=JSON if rng.random() < 0.7 else {}
    )
    return Shot(f"body {spoil.__name__}", "POST", path, data)


def needless_body_shot(rng: random.Random, aim: Range) -> Shot:
    """A body where none is due."""
    method, path = rng.choice(
        [
            ("POST", API + "/keys"),
            ("POST", f"{API}/keys/{aim.held}/keepalive"),
            ("POST", f"{API}/keys/{aim.free}/reveal"),
            ("DELETE", f"{API}/keys/{aim.free}"),
            ("GET", f"{API}/keys/{aim.free}"),
            ("GET", API + "/keys"),
            ("GET", API + "/stats"),
            ("POST", API + "/random_api_key/"),
            ("GET", API + "/random_api_key"),
            ("PUT", f"{API}/random_api_key/?api_key={aim.held}"),
            ("DELETE", f"{API}/random_api_key/?api_key={aim.held}"),
            ("GET", API + "/start_scheduler/"),
        ]
    )
    _, body = specimen(rng, aim)
    spoil = rng.choice(
        [truncated, with_unknown_field, with_trailing_garbage, of_another_root, nested, no_json]
    )
    data = encode_request(method, path, aim.host, body=spoil(rng, body), headers=JSON)
    return Shot(f"needless body {spoil.__name__}", method, path, data)


# ---------------------------------------------------------------------------------------------------- queries


def bad_list_query(rng: random.Random) -> str:
    """A query that `GET /keys` must refuse."""
    wrong = rng.choice(
        [
            ("limit=" + rng.choice(["0", "501", "-1", "x", "1.5", "%zz", "%D9%A1", "9" * 50, "%00", "1%00"])),
            ("state=" + rng.choice(["x", "%zz", "Available", "available%00", "%FF", quote(junk(rng) + "é")])),
            "order=" + rng.choice(["x", "id%20", "ID", "%FF", quote(junk(rng) + "é")]),
            "prefix=" + quote(word(rng) + junk(rng), safe=""),
            "after=" + quote(word(rng) + junk(rng) + "é", safe=""),
            "after=" + base64.urlsafe_b64encode(b"\xff\xfe" + rng.randbytes(40)).decode().rstrip("="),
            "limit=1&limit=2",
            "state=blocked&%73tate=blocked",
            "prefix=a&order=id",
            "order=release&state=available",
            f"{quote(word(rng), safe='')}={quote(junk(rng), safe='')}",
            f"{quote('é' + junk(rng), safe='')}=1",
            "state=available&" + word(rng),
            "%=%&%%=%zz",
            "&".join(f"limit={number}" for number in range(1, 200)),
            "&".join(f"{word(rng)}={number}" for number in range(300)),
        ]
    )
    right = rng.sample(["limit=5", "state=blocked"], rng.randint(0, 1))
    parts = [one for one in right if one.split("=")[0] not in wrong] + [wrong]
    rng.shuffle(parts)
    return "&".join(parts)


def query_shot(rng: random.Random, aim: Range) -> Shot:
    """A query that is wrong, on the list or where none is due."""
    name = f"{quote(word(rng), safe='')}={quote(junk(rng), safe='')}"
    method, path = rng.choice(
        [
            ("GET", f"{API}/keys?{bad_list_query(rng)}"),
            ("GET", f"{API}/keys?{bad_list_query(rng)}"),
            ("GET", f"{API}/keys?{bad_list_query(rng)}"),
            ("POST", f"{API}/keys?{name}"),
            ("POST", f"{API}/keys/acquire?{name}"),
            ("POST", f"{API}/keys/{aim.held}/unblock?{name}"),
            ("POST", f"{API}/keys/{aim.held}/keepalive?{name}"),
            ("POST", f"{API}/keys/{aim.held}/reveal?{name}"),
            ("DELETE", f"{API}/keys/{aim.free}?{name}"),
            ("GET", f"{API}/keys/{aim.free}?{name}"),
            ("GET", f"{API}/stats?{name}"),
            ("GET", f"{API}/random_api_key/?{name}"),
            ("POST", f"{API}/random_api_key?{name}"),
            ("PUT", f"{API}/random_api_key/?api_key={aim.held}&{name}"),
            ("DELETE", f"{API}/random_api_key/?api_key={aim.held}&api_key={aim.held}"),
            ("PUT", f"{API}/random_api_key/?api_key={quote(junk(rng), safe='')}"),
            ("DELETE", f"{API}/random_api_key?{name}"),
        ]
    )
    return Shot("query", method, path, encode_request(method, path, aim.host))


# ------------------------------------------------------------------------------------------ paths and methods


def segment(rng: random.Random) -> str:
    """A path segment that names no key and no call."""
    return rng.choice(
        [
            word(rng),
            quote(word(rng) + junk(rng), safe=""),
            quote(rng.randbytes(rng.randint(1, 30)) + b"\xff", safe=""),
            word(rng) + "%2F" + word(rng),
            "%2e%2e%2f" + word(rng),
            word(rng) + "%00",
            word(rng) + ";a=b,c",
            word(rng) + "%zz",
            word(rng) + "%",
            word(rng) + "%4",
            "id:" + word(rng),
            "id:" + str(rng.randint(10**9, 10**40)),
            "id%3A-" + str(rng.randint(1, 99)),
            "~" * rng.randint(1, 50),
            word(rng) * rng.randint(1, 100),
            "*",
            "a:b@" + word(rng),
        ]
    )


def path_shot(rng: random.Random, aim: Range) -> Shot:
    """A path that leads nowhere, or to no key."""
    end = rng.choice(["", "/unblock", "/keepalive", "/reveal"])
    method, path = rng.choice(
        [
            ("POST" if end else rng.choice(["GET", "DELETE"]), f"{API}/keys/{segment(rng)}{end}"),
            ("POST" if end else rng.choice(["GET", "DELETE"]), f"{API}/keys/{segment(rng)}{end}"),
            (rng.choice(KNOWN_METHODS), f"{API}/keys/{aim.held}/{segment(rng)}"),
            (rng.choice(KNOWN_METHODS), f"{API}/keys/{aim.held}/unblock/{segment(rng)}"),
            (rng.choice(KNOWN_METHODS), f"{API}/{segment(rng)}"),
            (rng.choice(KNOWN_METHODS), f"/api/{segment(rng)}/{segment(rng)}"),
            (rng.choice(KNOWN_METHODS), f"{API}/keys/{aim.held}//unblock"),
            (rng.choice(KNOWN_METHODS), f"/{segment(rng)}/keys/{aim.free}"),
            (rng.choice(KNOWN_METHODS), "/api" + f"/{word(rng)}" * rng.randint(1, 100)),
        ]
    )
    return Shot("path", method, path, encode_request(method, path, aim.host))


def method_shot(rng: random.Random, aim: Range) -> Shot:
    """A method that the path doesn't take."""
    template = rng.choice(list(ROUTES))
    path = template.replace("{pool}", "default").replace(
        "{key}", rng.choice([aim.free, aim.held, f"id:{aim.held_id}"])
    )
    method = rng.choice([one for one in KNOWN_METHODS if one not in ROUTES[template]])
    body = rng.choice([None, b"{}", b"x" * 100])
    return Shot("method", method, path, encode_request(method, path, aim.host, body=body))


def odd_method_shot(rng: random.Random, aim: Range) -> Shot:
    """A method that no path has, and which a parser may refuse as not HTTP."""
    method = rng.choice(
        [
            "BREW",
            "get",
            "Post",
            "TRACE",
            "CONNECT",
            "PROPFIND",
            "PURGE",
            "M-SEARCH",
            "LINK",
            "X" * 300,
            "G\xcbT",
            "G,ET",
            "1",
        ]
    )
    path = rng.choice([API + "/stats", API + "/keys", f"{API}/keys/{aim.free}", "/healthz", "*"])
    return Shot("odd method", method, path, encode_request(method, path, aim.host), http=False)


# ---------------------------------------------------------------------------------------- headers and no HTTP


def header_shot(rng: random.Random, aim: Range) -> Shot:
    """A call that would be right but for a header."""
    path, body = specimen(rng, aim)
    headers = rng.choice(
        [
            {"Host": rng.choice(["keys.example", "127.0.0.1.example", "[::2]", "0.0.0.0", "128.0.0.1:80"])},
            {
                "Origin": rng.choice(
                    ["null", "http://keys.example", "x", "http://", "://", "http://[", "http://a:b:c"]
                )
            },
            {"Sec-Fetch-Site": "cross-site"},
            {
                "Content-Type": rng.choice(
                    ["text/plain", "x", "multipart/form-data", "application/jsonx", "a/b;c", ";;"]
                )
            },
        ]
    )
    data = encode_request("POST", path, aim.host, json=body, headers=headers)
    return Shot("header", "POST", path, data)


BODY = '{"zq":1}'  # which acquire would refuse, if it were ever asked
SIZED = f"Content-Length: {len(BODY)}\r\n"
CHUNKED = "Transfer-Encoding: chunked\r\n"
BAD_LENGTHS = ["-1", "x", "", "+8", "0x8", "8,8", "8 8", "9" * 30]
BAD_CODINGS = ["x", "gzip", "chunked, gzip", "chunked, chunked"]
BAD_CHUNKS = ["x", "-1", "8;", "", "F" * 20]
BAD_FIELDS = [
    "NoColon",
    ": empty",
    "Sp ace: 1",
    "X : 1",
    "\0: 1",
    "é: 1",
    "X\t: 1",
    "X: a\0b",
    "X: \1",
    "X: \x7f",
]
BAD_VERSIONS = ["9.9", "2.0", "1", "x", "1.1.1", "0.9"]


def framing_shot(rng: random.Random, aim: Range) -> Shot:
    """A request whose head or body is not framed as HTTP has it;
    what it asks is to be refused or only to read.
    """
    path = API + "/keys/acquire"
    host = f"Host: {aim.host}\r\n"

    def post(fields: str, body: str = BODY, line: str = f"POST {path} HTTP/1.1") -> str:
        return f"{line}\r\n{host}{fields}\r\n{body}"

    def get(target: str) -> str:
        return f"GET {target} HTTP/1.1\r\n{host}\r\n"

    text = rng.choice(
        [
            post(f"Content-Length: {rng.choice(BAD_LENGTHS)}\r\n"),
            post(f"{SIZED}Content-Length: {len(BODY) + 1}\r\n"),
            post(SIZED + CHUNKED, f"8\r\n{BODY}\r\n0\r\n\r\n"),
            post(f"Transfer-Encoding: {rng.choice(BAD_CODINGS)}\r\n"),
            post(CHUNKED, f"{rng.choice(BAD_CHUNKS)}\r\n{BODY}\r\n0\r\n\r\n"),
            post(CHUNKED, f"8\r\n{BODY}xx\r\n0\r\n\r\n"),
            post(f"{SIZED}{rng.choice(BAD_FIELDS)}\r\n"),
            post(f"{SIZED}X: 1\r\n folded\r\n"),
            post(f"{SIZED}X: 1\n\n"),
            post(f"{SIZED}X: 1\rY: 2\r\n"),
            post(SIZED + "".join(f"X-{at}: 1\r\n" for at in range(3000))),
            post(SIZED, line=f"POST {path} HTTP/{rng.choice(BAD_VERSIONS)}"),
            post("", "", line=f"POST {path}"),
            post(SIZED, line=f"POST  {path}  HTTP/1.1"),
            post(SIZED, line=f"POST {path} {word(rng)} HTTP/1.1"),
            get(f"{path}/\xe9\xff{word(rng)}"),
            get(f"{API}/{word(rng)}\0"),
            get(f"http://{aim.host}{API}/{word(rng)}"),
            get(f"//{word(rng)}{API}/{word(rng)}"),
            get(word(rng)),
            get(f"?{word(rng)}"),
            post(f"Host: keys.example\r\n{SIZED}"),
            f"POST {path} HTTP/1.1\r\n{SIZED}\r\n{BODY}",
            post(f"{SIZED}Expect: {word(rng)}\r\n"),
            post(f"{SIZED}Upgrade: {rng.choice(['websocket', 'h2c', 'x'])}\r\nConnection: Upgrade\r\n"),
            post("Content-Length: 100\r\n"),
        ]
    )
    return Shot("framing", "POST", path, text.encode("latin-1"), http=False)


def bytes_shot(rng: random.Random, aim: Range) -> Shot:
    """Bytes that aren't HTTP."""
    data: bytes = rng.choice(
        [
            rng.randbytes(rng.randint(1, 2000)),
            rng.randbytes(rng.randint(1, 200)) + b"\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(500),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(30),
            b"\r\n" * rng.randint(1, 100),
            b"\0" * rng.randint(1, 1000),
            b"\n",
            b"HTTP/1.1 200 OK\r\n\r\n",
            b"GET",
            b"GET / HTTP/1.1",
            f"GET {API}/keys/{aim.held} HTTP/1.1\r\nHost: {aim.host}\r\n".encode(),
            b"SSH-2.0-OpenSSH_9.7\r\n",
            b"*1\r\n$4\r\nPING\r\n",
            b'{"op":"generate","count":1}\n',
            b"\x05\x01\x00",
            b"A" * rng.randint(1, 70_000),
            encode_request("POST", API + "/keys", aim.host, body=b"{}")[: rng.randint(1, 60)],
        ]
    )
    return Shot("bytes", "GET", "/", data, http=False)


MAKERS: list[Callable[[random.Random, Range], Shot]] = [
    *[body_shot] * 8, *[needless_body_shot] * 3, *[query_shot] * 5, *[path_shot] * 5, *[method_shot] * 2,
    odd_method_shot, *[header_shot] * 3, *[framing_shot] * 2, bytes_shot,
]  # fmt: skip


# ----------------------------------------------------------------------------------------------------- firing


def fire(wire: Wire, shot: Shot) -> None:
    """Send a well-formed shot; fails unless it is refused by a problem."""
    wire.expect_answer_to(shot.method, shot.path)
    wire.send(shot.data)
    answer = wire.answer()
    assert 400 <= answer.status < 500, f"not refused: {answer}"


def fire_alone(server: ServerProcess, shot: Shot) -> None:
    """Send a shot that isn't HTTP; fails unless it gets a 4xx (or 501, 505) that is bare or a problem,
    or no answer.
    """
    received = server.raw(shot.data, half_close=True)
    if not received:
        return
    response = http.client.HTTPResponse(_Sock(received))  # type: ignore[arg-type]
    response.begin()
    body = response.read()
    assert 400 <= response.status < 500 or response.status in (501, 505), f"not refused: {received[:500]!r}"
    if response.headers.get_content_type() == "application/problem+json":
        path = shot.path if not LEGACY.match(shot.path) else "/"
        expect_problem_shape(Answer(shot.method, path, response.status, response.headers, body, 0, 0))
    elif body:
        assert response.status == 400, f"neither bare nor a problem: {received[:500]!r}"
        assert len(body) < 200, f"neither bare nor a problem: {received[:500]!r}"


class _Sock:
    """Received bytes in the place of a socket."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def look(client: Client) -> dict[str, Any]:
    """All of the pool that may not move, from stats and rows."""
    seen: dict[str, Any] = {name: value for name, value in client.stats().items() if name != "uptime"}
    for row in client.get(API + "/keys").expect(200)["keys"]:
        kept = ("hint", "state", "owner", "lease", "created_at")
        seen[f"row {row['id']}"] = {name: row[name] for name in kept}
    return seen


@pytest.mark.parametrize(
    "chunk", [*range(3), *(pytest.param(chunk, marks=pytest.mark.thorough) for chunk in range(3, CHUNKS))]
)
def test_malformed_requests_are_refused_and_change_nothing(lend: Start, chunk: int) -> None:
    """500 shots a chunk over keep-alive connections:
    no 500, no odd answer, no trace in the log, the pool as it was.
    """
    server = lend("--block-seconds=3600", "--keepalive-seconds=7200")
    client = server.client()
    client.make()
    served = client.acquire(owner="holder")
    free = client.make()["key"]
    client.make()
    aim = Range(server.host, free, served["key"], served["id"], served["lease"])
    rng = random.Random(f"keypool {chunk}")
    before = look(client)
    wire = server.wire()
    for number in range(SHOTS):
        shot = rng.choice(MAKERS)(rng, aim)
        try:
            if shot.http:
                if not wire.going_on:
                    wire.close()
                    wire = server.wire()
                fire(wire, shot)
            else:
                fire_alone(server, shot)
        except Exception as error:
            raise AssertionError(f"shot {number} ({shot.kind}): {shot.data[:3000]!r}\n{error}") from error
        if number % 50 == 49:
            assert look(client) == before, f"the pool moved by shot {number - 49} to {number}"
    assert client.get("/healthz").status == 200
