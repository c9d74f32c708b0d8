"""The logs: one access line a call, lines that machines can read, and no key and no token, whatever is sent.

Secrets are put wherever a request has room for them: path, query, header names and values, methods, bodies of every
kind, well-formed or not; all at level debug, in both formats. What the server wrote is then searched for any of them.
"""

from __future__ import annotations

import io
import json
import logging
import random
import re
from typing import Any

import pytest
from conftest import Start
from support import (
    ACQUIRE,
    ADMIN_TOKEN,
    API,
    CLIENT_TOKEN,
    ROUTES,
    TOKENS,
    VIEWER_TOKEN,
    ServerProcess,
    encode_request,
    eventually,
)
from test_fuzz import MAKERS, Range

from keypool.ops import logs
from keypool.ops.logs import JsonFormatter, TextFormatter

SHOTS = 1500
FORMATS = pytest.mark.parametrize("form", ["text", pytest.param("json", marks=pytest.mark.thorough)])
ENV = {f"KEYPOOL_{role.upper()}_TOKEN": token for role, token in TOKENS.items()}
UNKNOWN_TOKEN = "unknown-token-31c0ffee"


def start(start_server: Start, form: str, **env: str) -> ServerProcess:
    """A server at log level debug."""
    server = start_server(
        "--log-level=debug", f"--log-format={form}", env=env, admin_token=ADMIN_TOKEN if env else None
    )
    server.secrets.update([*TOKENS.values(), UNKNOWN_TOKEN])
    return server


def strays(secret: str, host: str) -> list[bytes]:
    """Malformed requests with a secret in them, some of them not even HTTP."""
    s, h = secret.encode(), host.encode()
    head = b"POST /api/v1/keys/acquire HTTP/1.1\r\nHost: " + h + b"\r\n"
    page = b"POST /metrics HTTP/1.1\r\nHost: " + h + b"\r\n"
    return [
        s,
        s + b"\r\n\r\n",
        b"GET /" + s + b"\r\n\r\n",
        b"GET " + s + b" HTTP/1.1\r\n\r\n",
        b"GET /" + s + b" HTTP/9.9\r\nHost: " + h + b"\r\n\r\n",
        s + b" /api/v1/keys HTTP/1.1\r\nHost: " + h + b"\r\n\r\n",
        b"GET / " + s + b"\r\nHost: " + h + b"\r\n\r\n",
        b"GET /api/v1/keys/" + s + b" HTTP/1.1\r\nHost: " + s + b"\r\nHost: " + s + b"\r\n\r\n",
        b"GET /api/v1/keys/" + s + b"%zz%00%ff HTTP/1.1\r\nHost: " + h + b"\r\n\r\n",
        head + s + b"\r\n\r\n",
        head + s + b" : x\r\n\r\n",
        head + b"X: " + s + b"\x00\x01\r\n\r\n",
        head + b" " + s + b"\r\n\r\n",
        head + b"Content-Length: " + s + b"\r\n\r\n",
        head + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n" + s,
        head + b"Transfer-Encoding: " + s + b"\r\n\r\n",
        head + b"Transfer-Encoding: chunked\r\n\r\n" + s + b"\r\n",
        head + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n" + s,
        head + b"Authorization: " + s + b"\r\n\r\n",
        head + b"Authorization: Basic " + s + b"\r\nCookie: session=" + s + b"\r\n\r\n",
        head + b"Origin: http://" + s + b"\r\n\r\n",
        head + b"X-Request-Id: not fit " + s + b"\r\n\r\n",
        head + b"X: " + s * 20_000 + b"\r\n\r\n",
        head + b"Content-Type: application/json; charset=" + s + b"\r\nContent-Length: 2\r\n\r\n{}",
        page + b"Content-Type: multipart/form-data; boundary=" + s + b"\r\nContent-Length: 20\r\n\r\n" + s[:20],
        page + b"Content-Type: multipart/form-data\r\nContent-Length: 16\r\n\r\n" + s[:16],
        page + b"Content-Type: application/x-www-form-urlencoded; charset=x\r\nContent-Length: 16\r\n\r\n%" + s[:15],
        page + b"Content-Encoding: gzip\r\nContent-Length: 16\r\n\r\n" + s[:16],
    ]  # fmt: skip


def drive_calls(server: ServerProcess, key: str, headers: dict[str, str]) -> int:
    """Send every call with every method and a secret in each place; returns the number of requests."""
    asked = 0
    with server.client() as client:
        for template in ROUTES:
            path = template.replace("{key}", key).replace("{pool}", "default")
            for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
                for query, body in (
                    ("", None),
                    (f"?api_key={key}&{key}={key}", None),
                    ("", json.dumps({"op": key, "owner": key, "lease": key, key: key}).encode()),
                    ("", b'{"keys":["' + key.encode()),
                ):
                    if "random_api_key" in path and method == "DELETE" and not query and not body:
                        continue
                    client.request(method, path + query, body=body, headers=headers)
                    asked += 1
    return asked


def wait_for_access_lines(server: ServerProcess, count: int) -> list[str]:
    """The lines of the access log, once there are so many."""

    def lines() -> list[str]:
        return [line for line in server.log.splitlines() if "keypool.access" in line]

    eventually(lambda: len(lines()) >= count, f"{count} access lines")
    return lines()


@FORMATS
def test_no_key_and_no_token_is_ever_written(start_server: Start, form: str) -> None:
    """Every call, by every role and none, and every malformed request; `finish` searches all that was written."""
    server = start(start_server, form, **ENV)
    admin = server.client(ADMIN_TOKEN)
    made = [made["key"] for made in admin.make_many(8)]
    held = admin.acquire(owner=made[0])
    asked = 0
    for token in (*TOKENS.values(), ""):
        for key in (made[0], UNKNOWN_TOKEN):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            asked += drive_calls(server, key, headers | {"X-Note": key, "Cookie": f"a={token}"})
    wrong = server.client(UNKNOWN_TOKEN)  # once a path: the answers to more of them are held back
    for path in ROUTES:
        wrong.get(path.replace("{key}", made[0]))
        asked += 1
    wait_for_access_lines(server, asked)
    for secret in (held["key"], *TOKENS.values(), UNKNOWN_TOKEN):
        for stray in strays(secret, server.host):
            received = server.raw(stray, half_close=True)
            assert b" 500 " not in received.partition(b"\r\n")[0], stray
    rng = random.Random("keypool logs")
    aim = Range(server.host, made[-1], held["key"], held["id"], held["lease"])
    wire = server.wire()
    for _ in range(SHOTS):
        shot = rng.choice(MAKERS)(rng, aim)
        if not shot.http:
            server.raw(shot.data, half_close=True)
            continue
        wire = wire if wire.going_on else server.wire()
        wire.expect_answer_to(shot.method, shot.path)
        wire.send(shot.data)
        wire.answer()
    assert server.client(ADMIN_TOKEN).get("/healthz").status == 200
    server.finish()
    server.check()
    assert not re.search(r"tornado\.|asyncio", server.log), "others log what we don't know"
    if form == "json":
        for line in server.log.splitlines():
            json.loads(line)


@pytest.mark.parametrize("form", ["text", "json"])
def test_each_call_has_one_access_line_with_its_request_id(start_server: Start, form: str) -> None:
    """Also refused and unknown requests, and those outside the API; the id is that of the answer."""
    server = start(start_server, form)
    client = server.client()
    ids: dict[str, tuple[str, int, str]] = {}
    for method, path, name, outcome in (
        ("POST", API + "/keys", "generate", "ok"),
        ("POST", ACQUIRE, "acquire", "ok"),
        ("POST", ACQUIRE, "acquire", "no-key-available"),
        ("GET", API + "/keys/nope", "get", "unknown-key"),
        ("PUT", API + "/keys", "none", "method-not-allowed"),
        ("GET", API + "/nope", "none", "not-found"),
        ("GET", "/nope", "none", "not-found"),
        ("GET", "/healthz", "health", "ok"),
        ("GET", "/readyz", "ready", "ok"),
        ("HEAD", "/healthz", "health", "ok"),
        ("GET", API + "/stats?x=1", "stats", "bad-request"),
    ):
        answer = client.request(method, path, headers={"X-Request-Id": f"call.{len(ids)}"})
        assert answer.headers["X-Request-Id"] == f"call.{len(ids)}"
        ids[f"call.{len(ids)}"] = (name, answer.status, outcome)
    lines = wait_for_access_lines(server, len(ids))
    assert len(lines) == len(ids), lines
    for line, (request_id, (name, status, outcome)) in zip(lines, ids.items(), strict=True):
        if form == "text":
            assert re.search(
                rf" DEBUG keypool\.access: {request_id} {name} {status} {outcome} [\d.]+ ms$", line
            ), line
        else:
            told: dict[str, Any] = json.loads(line)
            wanted = {"request_id": request_id, "operation": name, "status": status, "outcome": outcome}
            assert {member: told[member] for member in wanted} == wanted
            assert told["milliseconds"] >= 0


def test_audit_lines_have_their_facts_as_members(start_server: Start) -> None:
    """Act, role, the token's digest, address, request id, and ids with hints."""
    server = start(start_server, "json", **ENV)
    admin = server.client(ADMIN_TOKEN)
    key = admin.make()
    admin.post(f"{API}/keys/{key['key']}/reveal").expect(200)
    admin.batch(op="generate", count=2).expect(201)
    admin.delete(f"{API}/keys/{key['key']}", headers={"X-Request-Id": "mine"})
    server.client(CLIENT_TOKEN).acquire()
    server.client(VIEWER_TOKEN).stats()
    server.finish()
    told = [json.loads(line) for line in server.log.splitlines() if '"keypool.audit"' in line]
    assert [each["act"] for each in told] == ["generate", "reveal", "generate", "delete"]
    for each in told:
        assert each["role"] == "admin"
        assert each["address"] == "127.0.0.1"
        assert re.fullmatch(r"[0-9a-f]{8}", each["token"])
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", each["request_id"])
        assert each["outcome"] == "ok"
        keys = each["keys"] if "keys" in each else [each["first"], each["last"]]
        assert all(re.fullmatch(r"id:\d+ \w{4}…\w{4}", key) for key in keys), each
    assert told[-1]["request_id"] == "mine"
    assert told[2]["count"] == 2


def test_no_level_silences_the_audit_log_and_the_ready_line(start_server: Start) -> None:
    """All other lines below the level are left out."""
    server = start_server("--log-level=error")
    server.client().make()
    server.finish()
    ready, audit = server.log.splitlines()  # `start_server` itself waits for the first
    assert "ready on http://" in ready
    assert "keypool.audit: generate by admin (token none)" in audit


def test_access_lines_are_for_debug_only(start_server: Start) -> None:
    """At info there are none."""
    server = start_server()
    server.client().stats()
    server.raw(encode_request("GET", "/nope", server.host, headers={"Connection": "close"}))
    server.finish()
    assert "keypool.access" not in server.log


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()], ids=["text", "json"])
def test_a_trace_shows_no_key(formatter: logging.Formatter) -> None:
    """An error that quotes a key, as KeyError does, is logged with a hint in its place, its causes too."""
    key = "Zq5TRxAbCdEfGhIjKlMn"
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger = logging.Logger("test")  # noqa: LOG001 - one that nobody else sees
    logger.addHandler(handler)
    keys: dict[str, int] = {}
    try:
        try:
            keys[key]
        except KeyError as error:
            raise RuntimeError(f"no row of {key}") from error
    except RuntimeError:
        logger.exception("call %s failed", "get")
    written = stream.getvalue()
    assert key not in written
    assert written.count("Zq5T…KlMn") == 2
    assert "KeyError" in written


def test_lines_of_one_of_several_processes_have_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the message, or in a JSON member; a single process has no number."""
    record = logging.LogRecord("keypool", logging.INFO, "", 0, "started %s", ("now",), None)
    assert "process" not in TextFormatter().format(record) + JsonFormatter().format(record)
    monkeypatch.setattr(logs, "_process", None)  # put back afterwards
    logs.name_process(3)
    assert TextFormatter().format(record).endswith(" INFO keypool: process=3 started now")
    assert json.loads(JsonFormatter().format(record))["process"] == 3
    assert json.loads(JsonFormatter().format(record))["message"] == "started now"
