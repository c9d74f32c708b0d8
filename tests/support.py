"""A real keypool server as a child process, and clients that hold every answer of it to the contract.

Nothing here imports the product: `ServerProcess` runs `server.py` as its user would and reads what it logs,
`Client` and `Wire` speak HTTP to it, and both check on every answer what the contract promises of all answers
(headers, the shape of errors), so that no test has to. What a test promises beside that stands in the test.

Time: no test sleeps for luck. `eventually` polls until a deadline, and `expect_left` compares a length of
time in an answer with the moments around the calls, so a slow machine makes a check looser, never wrong.
"""

from __future__ import annotations

import contextlib
import http.client
import json as jsonlib
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar, cast

import fork_server
from fork_server import ForkedServer

T = TypeVar("T")

ROOT: Final = Path(__file__).resolve().parent.parent
API: Final = "/api/v1"
ACQUIRE: Final = API + "/keys/acquire"

CLIENT_TOKEN: Final = "client-token-4c1e07a9"
OTHER_CLIENT_TOKEN: Final = "client-token-b2-99f0e3"
VIEWER_TOKEN: Final = "viewer-token-77a1c5d2"
ADMIN_TOKEN: Final = "admin-token-0f5be8d36"
TOKENS: Final = {"client": CLIENT_TOKEN, "viewer": VIEWER_TOKEN, "admin": ADMIN_TOKEN}

JSON: Final = {"Content-Type": "application/json"}

HANDLE: Final = re.compile(r"h:[1-9]\d*\.[1-9]\d*\.[A-Za-z0-9_-]{11}")
KEY_TEXT: Final = re.compile(r"[A-Za-z0-9]{20}")
REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
MOMENT: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}(Z|\+00:00)")
EARLY: Final = 0.005  # "never early by more than 5" ms
LATE: Final = 0.05  # "on time to 50 ms"; a deadline that has passed is the truth for every call
SHORT_BLOCK: Final = (
    0.4  # of the fixture short_server: long enough to look at a key, short enough to wait for
)
SHORT_LIFE: Final = 1.5

ROUTES: Final[Mapping[str, frozenset[str]]] = {
    # Every path of the contract that this suite covers, with the methods it takes; {key} stands for a key.
    "/api/v1/keys": frozenset({"GET", "HEAD", "POST"}),
    "/api/v1/keys/acquire": frozenset({"POST"}),
    "/api/v1/keys/find": frozenset({"POST"}),
    "/api/v1/keys/{key}": frozenset({"GET", "HEAD", "DELETE", "PATCH"}),
    "/api/v1/keys/{key}/history": frozenset({"GET", "HEAD"}),
    "/api/v1/keys/{key}/replace": frozenset({"POST"}),
    "/api/v1/keys/{key}/unblock": frozenset({"POST"}),
    "/api/v1/keys/{key}/extend": frozenset({"POST"}),
    "/api/v1/keys/{key}/quarantine": frozenset({"POST"}),
    "/api/v1/keys/{key}/restore": frozenset({"POST"}),
    "/api/v1/keys/{key}/keepalive": frozenset({"POST"}),
    "/api/v1/keys/{key}/reveal": frozenset({"POST"}),
    "/api/v1/batch": frozenset({"POST"}),
    "/api/v1/owners": frozenset({"GET", "HEAD"}),
    "/api/v1/owners/release": frozenset({"POST"}),
    "/api/v1/waiters": frozenset({"GET", "HEAD"}),
    "/api/v1/events": frozenset({"GET", "HEAD"}),
    "/api/v1/stats": frozenset({"GET", "HEAD"}),
    "/api/v1/pools": frozenset({"GET", "HEAD"}),
    "/api/v1/pools/{pool}": frozenset({"GET", "HEAD", "PUT", "PATCH", "DELETE"}),
    "/api/v1/rekey": frozenset({"GET", "HEAD", "POST"}),
    "/api/v1/random_api_key": frozenset({"GET", "HEAD", "POST", "PUT", "DELETE"}),
    "/api/v1/random_api_key/": frozenset({"GET", "HEAD", "POST", "PUT", "DELETE"}),
    "/api/v1/start_scheduler": frozenset({"GET", "HEAD"}),
    "/api/v1/start_scheduler/": frozenset({"GET", "HEAD"}),
    "/api/v1/openapi.json": frozenset({"GET", "HEAD"}),
    "/metrics": frozenset({"GET", "HEAD"}),
    "/healthz": frozenset({"GET", "HEAD"}),
    "/readyz": frozenset({"GET", "HEAD"}),
}
OF_POOLS: Final[Mapping[str, frozenset[str]]] = {
    path.replace(API, API + "/pools/{pool}"): methods
    for path, methods in ROUTES.items()
    if re.match(rf"{API}/(keys|batch|stats|owners|waiters|events)", path)
}
"""The paths of ROUTES that every pool has under its own."""
LEGACY: Final = re.compile(r"/api/v1/(random_api_key|start_scheduler)/?(\?|$)")

# Logged as JSON, the line has its closing quote behind the address.
_READY = re.compile(r'ready on http://(?P<address>\[[^\]]+\]|[^\s:/]+):(?P<port>\d+)/(?:"}?)?\s*$')
_TROUBLE = re.compile(
    r"Traceback \(most recent call last\)"
    r"|\b(?:ERROR|CRITICAL|FATAL)\b"
    r"|^(?:\S+\s+){0,3}(?:error|critical)\b"  # a level in small letters near the start of the line
    r"|^\[[EC] \d{6} "  # Tornado's own format
    r"|\"(?:level|levelname|severity)\": ?\"(?:error|critical|fatal)\""
    r"|ResourceWarning|RuntimeWarning|DeprecationWarning"
    r"|was never awaited|was never retrieved|Exception in callback|Exception ignored in"
)
_LEAK_LENGTH = 12  # so much of a key in a log is a leak; its hint shows four and four
_NOTHING: Final[Any] = object()


# ----------------------------------------------------------------------------------------------- expectations


def eventually(condition: Callable[[], T], what: str, within: float = 20.0) -> T:
    """The first truthy result of `condition`, asked again and again;
    fails, saying `what`, when `within` seconds passed.
    """
    deadline = time.monotonic() + within
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"in {within} s never came true: {what} (last: {result!r})")
        time.sleep(0.01)


def pass_until(moment: float) -> None:
    """Returns once `time.monotonic` has come to this moment."""
    eventually(lambda: time.monotonic() >= moment, "time to pass", max(0.0, moment - time.monotonic()) + 20)


def expect_object(value: object, /, **members: object) -> dict[str, Any]:
    """`value`, if it is a JSON object of exactly these members, each as described; else fails, naming it.

    A member is described by a type (`float` takes whole numbers too, none takes a bool), a pattern for
    the whole of a text, a tuple of alternatives, or the value itself.
    """
    assert isinstance(value, dict), f"not a JSON object: {value!r}"
    missing, extra = members.keys() - value.keys(), value.keys() - members.keys()
    assert not missing, f"missing {sorted(missing)}, unexpected {sorted(extra)} in {value!r}"
    assert not extra, f"missing {sorted(missing)}, unexpected {sorted(extra)} in {value!r}"
    for name, wanted in members.items():
        assert _fits(value[name], wanted), f"{name} is {value[name]!r}, wanted {wanted!r}, in {value!r}"
    return value


def _fits(value: object, wanted: object) -> bool:
    if isinstance(wanted, tuple):
        return any(_fits(value, one) for one in wanted)
    if isinstance(wanted, re.Pattern):
        return isinstance(value, str) and wanted.fullmatch(value) is not None
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if isinstance(wanted, type):
        return isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
    return type(value) is type(wanted) and value == wanted


def expect_row(value: object, **known: object) -> dict[str, Any]:
    """`value`, if it is a row as `GET /keys/{key}` and lists give it, with the `known` members so."""
    members: dict[str, object] = {
        "id": int,
        "hint": re.compile(r".{4}….{4}|.{2}….{2}|…", re.DOTALL),
        "state": ("available", "blocked", "cooling", "quarantined"),
        "owner": (str, None),
        "lease": (int, None),
        "created_at": MOMENT,
        "expires_in": (float, None),
        "release_in": (float, None),
        "available_in": (float, None),
        "failures": int,
        "outcome": ("ok", "rate_limited", "error", "invalid", None),
        "reason": (str, None),
        "client": (str, None),
        "name": (str, None),
        "labels": dict,
        "pace": (dict, None),
        "seat": int,
        "seats": int,
        "acquired_at": (MOMENT, None),
        "served": int,
    }
    row = expect_object(value, **(members | known))
    assert row["expires_in"] is None or row["expires_in"] >= 0, f"an expired key was shown: {row}"
    assert (row["available_in"] is not None) is (row["state"] == "cooling"), f"available_in: {row}"
    assert (row["served"] > 0) is (row["lease"] is not None), f"served without a lease, or the reverse: {row}"
    if row["state"] != "blocked":
        assert row["client"] is None, f"client of a key that nobody holds: {row}"
        assert row["acquired_at"] is None, f"acquired_at of a key that nobody holds: {row}"
        assert row["owner"] is None, f"owner or release_in of a key that nobody holds: {row}"
        assert row["release_in"] is None, f"owner or release_in of a key that nobody holds: {row}"
    else:
        assert row["lease"] is not None, f"blocked without a lease: {row}"
        assert row["acquired_at"] is not None, f"blocked without the moment of its acquire: {row}"
        assert row["release_in"] is not None, f"blocked without a lease: {row}"
        assert row["release_in"] >= 0, f"a key whose block ran out was shown as blocked: {row}"
    return row


def expect_left(value: object, whole: float, started: Answer, told: Answer) -> None:
    """Fails unless `value` can be what is left of `whole` seconds that `started` began,
    told by the answer `told`.
    """
    assert isinstance(value, (int, float)), f"not a number: {value!r}"
    assert not isinstance(value, bool), f"not a number: {value!r}"
    least = whole - (told.answered_at - started.asked_at) - LATE
    most = min(whole, whole - (told.asked_at - started.answered_at) + LATE)
    assert least <= value <= most, f"{value} s left of {whole}, wanted {least:.3f} to {most:.3f}"


def hint(key: str) -> str:
    """What stands for `key` where it must be recognised and may not be shown."""
    return f"{key[:4]}…{key[-4:]}"


def chance_of(hits: int, draws: int, chance: float) -> float:
    """How likely a count at least as far out on its side of the mean as `hits` is, for a binomial;
    exact, O(draws).
    """
    mean = draws * chance
    counts = range(hits + 1) if hits <= mean else range(hits, draws + 1)
    logs = (
        math.lgamma(draws + 1) - math.lgamma(n + 1) - math.lgamma(draws - n + 1)
        + n * math.log(chance) + (draws - n) * math.log1p(-chance)
        for n in counts
    )  # fmt: skip
    return math.fsum(math.exp(log) for log in logs)


# ---------------------------------------------------------------------------------------------------- answers


@dataclass(frozen=True)
class Answer:
    """One answer, with what was asked and the moments (of `time.monotonic`) around it."""

    method: str
    path: str
    status: int
    headers: http.client.HTTPMessage
    body: bytes
    asked_at: float
    answered_at: float

    def __str__(self) -> str:
        return f"{self.method} {self.path[:200]} answered {self.status} {self.body[:1000]!r}"

    @property
    def json(self) -> Any:
        """The body as JSON, strictly: no NaN, no infinities, UTF-8."""

        def refuse(name: str) -> None:
            raise AssertionError(f"{name} is no JSON: {self}")

        try:
            return jsonlib.loads(self.body.decode("utf-8"), parse_constant=refuse)
        except ValueError as error:
            raise AssertionError(f"the body is no JSON ({error}): {self}") from None

    def expect(self, status: int) -> Any:
        """The JSON body (None where there is none), if the status is this one."""
        assert self.status == status, f"wanted {status}: {self}"
        return self.json if self.body else None

    def expect_problem(self, status: int, code: str) -> dict[str, Any]:
        """The problem, if status and code are these (that its shape is right is checked on every answer)."""
        assert self.status == status, f"wanted {status} {code}: {self}"
        problem = self.json
        assert problem.get("code") == code, f"wanted {status} {code}: {self}"
        return cast(dict[str, Any], problem)

    def allowed(self) -> set[str]:
        """The methods that the Allow header names."""
        return {method.strip() for method in self.headers.get("Allow", "").split(",") if method.strip()}


def expect_shape(answer: Answer) -> None:
    """What holds for every answer, whatever was asked: the headers of the API, and errors as problems."""
    path = answer.path
    if path.startswith("/api/"):
        assert answer.headers.get_all("Cache-Control") == ["no-store"], (
            f"Cache-Control: {answer.headers} of {answer}"
        )
        ids = answer.headers.get_all("X-Request-Id") or []
        assert len(ids) == 1, f"X-Request-Id {ids}: {answer}"
        assert REQUEST_ID.fullmatch(ids[0]), f"X-Request-Id {ids}: {answer}"
    if answer.status == 204 or answer.method == "HEAD":
        assert answer.body == b"", f"a body where none belongs: {answer}"
    elif answer.status >= 400:
        expect_problem_shape(answer)
    elif path.startswith("/api/"):
        kind = answer.headers.get_content_type()
        assert kind == "application/json", f"Content-Type {kind}: {answer}"
    assert answer.status != 500, f"an internal error: {answer}"


def expect_problem_shape(answer: Answer) -> None:
    """Fails unless the answer's body is a problem (RFC 9457) of exactly the contract's members.

    The first version's paths may answer the errors that the contract names for them (400, 404) with `message`
    alone; their other errors have it beside the other members.
    """
    problem = answer.json
    legacy = LEGACY.match(answer.path) is not None
    if legacy and answer.status in (400, 404) and "code" not in problem:
        expect_object(problem, message=str)
        return
    kind = answer.headers.get_content_type()
    assert kind == "application/problem+json", f"Content-Type {kind}: {answer}"
    code = problem.get("code")
    members: dict[str, object] = {
        "type": f"urn:keypool:problem:{code}",
        "code": re.compile(r"[a-z]+(-[a-z]+)*"),
        "title": re.compile(r"\S.*"),
        "status": answer.status,
        "detail": re.compile(r"\S.*", re.DOTALL),
        "request_id": answer.headers.get("X-Request-Id") or REQUEST_ID,
    }
    if legacy:
        members["message"] = re.compile(r"\S.*", re.DOTALL)
    if "Retry-After" in answer.headers:
        seconds = answer.headers["Retry-After"]
        assert re.fullmatch(r"[1-9]\d*", seconds), (
            f"Retry-After {seconds!r} is not whole seconds of at least 1: {answer}"
        )
    if code == "no-key-available":
        members |= {"blocked": int, "cooling": int, "quarantined": int}
        members |= {"retry_after": float} if "Retry-After" in answer.headers else {}
    expect_object(problem, **members)


# ---------------------------------------------------------------------------------------------------- clients


def encode_request(
    method: str,
    path: str,
    host: str,
    *,
    json: object = _NOTHING,
    body: bytes | None = None,
    token: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """A whole request as wire text; a header of the caller's replaces the
    one that would stand there by itself.
    """
    lines = {"Host": host}
    if json is not _NOTHING:
        body = jsonlib.dumps(json).encode()
        lines["Content-Type"] = "application/json"
    if body is not None:
        lines["Content-Length"] = str(len(body))
    if token is not None:
        lines["Authorization"] = f"Bearer {token}"
    lines.update(headers or {})
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + (body or b"")


class Client:
    """A client with one keep-alive connection; never asks a second time,
    so a dropped connection is a failure.
    """

    def __init__(self, server: ServerProcess, token: str | None = None) -> None:
        self.server = server
        self._token = token
        self._connection = http.client.HTTPConnection(server.address, server.port, timeout=60)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        json: object = _NOTHING,
        body: bytes | None = None,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request and its answer, checked for what every answer must hold."""
        sent = dict(headers or {})
        if json is not _NOTHING:
            body = jsonlib.dumps(json).encode()
            sent.setdefault("Content-Type", "application/json")
        if token or self._token:
            sent.setdefault("Authorization", f"Bearer {token or self._token}")
        asked_at = time.monotonic()
        try:
            self._connection.request(method, path, body, sent)
            response = self._connection.getresponse()
            received = response.read()
        except BaseException:
            self._connection.close()
            raise
        answer = Answer(method, path, response.status, response.headers, received, asked_at, time.monotonic())
        self.server.note(answer)
        expect_shape(answer)
        return answer

    def get(self, path: str, **how: Any) -> Answer:
        """GET."""
        return self.request("GET", path, **how)

    def post(self, path: str, **how: Any) -> Answer:
        """POST."""
        return self.request("POST", path, **how)

    def patch(self, path: str, **how: Any) -> Answer:
        """PATCH."""
        return self.request("PATCH", path, **how)

    def put(self, path: str, **how: Any) -> Answer:
        """PUT."""
        return self.request("PUT", path, **how)

    def delete(self, path: str, **how: Any) -> Answer:
        """DELETE."""
        return self.request("DELETE", path, **how)

    def head(self, path: str, **how: Any) -> Answer:
        """HEAD."""
        return self.request("HEAD", path, **how)

    def options(self, path: str, **how: Any) -> Answer:
        """OPTIONS."""
        return self.request("OPTIONS", path, **how)

    # What most tests need before they come to their point.

    def make_pool(self, name: str, **settings: object) -> str:
        """A new pool; the beginning of its paths."""
        self.put(f"{API}/pools/{name}", json=settings).expect(201)
        return f"{API}/pools/{name}"

    def make(self) -> dict[str, Any]:
        """A new key, as generate answers it."""
        return cast(dict[str, Any], self.post(API + "/keys").expect(201))

    def make_many(self, count: int) -> list[dict[str, Any]]:
        """New keys, at most 1000 a call."""
        return cast(list[dict[str, Any]], self.batch(op="generate", count=count).expect(201)["keys"])

    def acquire(self, **body: object) -> dict[str, Any]:
        """A key served, as acquire answers it."""
        return cast(dict[str, Any], self.post(ACQUIRE, json=body).expect(200))

    def row(self, key: str) -> dict[str, Any]:
        """The row of a key that is there."""
        return expect_row(self.get(f"{API}/keys/{key}").expect(200))

    def batch(self, **body: object) -> Answer:
        """One batch call."""
        return self.post(API + "/batch", json=body)

    def stats(self) -> dict[str, Any]:
        """The numbers."""
        return cast(dict[str, Any], self.get(API + "/stats").expect(200))

    def expect_waiting(self, count: int) -> None:
        """Wait until exactly so many calls wait for a key."""
        eventually(lambda: self.stats()["waiting"] == count, f"{count} waiters in stats")

    def page(self, path: str, cookie: str = "") -> Answer:
        """A page of the dashboard, as a browser with this cookie asks for it."""
        return self.get(path, headers={"Accept": "text/html", "Cookie": cookie})

    def sign_in(self, token: str) -> str:
        """The cookie of a new session."""
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = self.post("/login", body=f"token={token}".encode(), headers=form | {"Accept": "text/html"})
        assert answer.status == 303, str(answer)
        return answer.headers["Set-Cookie"].partition(";")[0]

    @contextlib.contextmanager
    def expect_moved(self, **deltas: int) -> Iterator[None]:
        """Fails unless what is done inside moves these numbers of stats by so much, and no other."""
        before = self.stats()
        yield
        after = self.stats()
        moved = {
            name: after[name] - before[name]
            for name in before
            if isinstance(before[name], int) and name != "uptime" and after[name] != before[name]
        }
        assert moved == {name: delta for name, delta in deltas.items() if delta}, f"stats moved by {moved}"


class Wire:
    """A plain socket to the server: requests are written and answers read apart, and any bytes may go."""

    def __init__(self, server: ServerProcess, limit: float = 30.0) -> None:
        self.server = server
        self._socket = socket.create_connection((server.address, server.port), timeout=limit)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = _Reader(self._socket)
        self._asked: list[tuple[str, str, float]] = []
        self.going_on = True  # until an answer says that the connection ends with it

    def send(self, data: bytes) -> None:
        """Write bytes; a server that refuses early may have closed by then, which `answer` tells."""
        with contextlib.suppress(ConnectionError):
            self._socket.sendall(data)

    def ask(self, method: str, path: str, **how: Any) -> None:
        """Write one whole request."""
        self.expect_answer_to(method, path)
        self.send(encode_request(method, path, self.server.host, **how))

    def expect_answer_to(self, method: str, path: str) -> None:
        """Say what the bytes that are sent next by hand ask, for `answer` to read their answer by."""
        self._asked.append((method, path, time.monotonic()))

    def answer(self) -> Answer:
        """The answer to the oldest request without one;
        fails when the connection ends or the time limit passes.
        """
        method, path, asked_at = self._asked.pop(0)
        response = http.client.HTTPResponse(cast(socket.socket, self._reader), method=method)
        try:
            response.begin()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise AssertionError(f"{method} {path[:200]} got no answer: {error!r}") from error
        self.going_on = not response.will_close
        answer = Answer(method, path, response.status, response.headers, body, asked_at, time.monotonic())
        self.server.note(answer)
        expect_shape(answer)
        return answer

    def rest(self) -> bytes:
        """All that comes until the server closes; fails when it doesn't within the time limit."""
        received = b""
        try:
            while data := self._reader.read1():
                received += data
        except TimeoutError:
            raise AssertionError(f"the connection was not closed; received {received[:500]!r}") from None
        except ConnectionError:
            pass
        return received

    def end_sending(self) -> None:
        """Half-close: nothing more will be sent, answers can still be read."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Close by a reset instead of an orderly end."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.close()

    def close(self) -> None:
        """Close the socket, whatever is under way."""
        self._reader.end()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Reader:
    """What `HTTPResponse` takes for its socket and file:
    one buffer for all answers, which the end of one leaves open.
    """

    closed = False

    def __init__(self, sock: socket.socket) -> None:
        self._file = sock.makefile("rb")

    def makefile(self, _mode: str) -> _Reader:
        return self

    def readline(self, size: int = -1) -> bytes:
        return self._file.readline(size)

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def read1(self, size: int = 65536) -> bytes:
        return self._file.read1(size)

    def readinto(self, buffer: bytearray) -> int:
        return self._file.readinto(buffer)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def end(self) -> None:
        self._file.close()


# ----------------------------------------------------------------------------------------------------- server


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a server is started with: what a process needs to run at all, and `extra`;
    no setting of the caller's.
    """
    kept = ("PATH", "HOME", "SYSTEMROOT", "TMPDIR", "COVERAGE_PROCESS_START")
    return (
        {name: os.environ[name] for name in kept if name in os.environ}
        | {"LANG": "C.UTF-8"}
        | dict(extra or {})
    )


def run_server(
    flags: Sequence[str], env: Mapping[str, str] | None = None, limit: float = 60.0
) -> tuple[int, str]:
    """Run a server that is expected to end by itself: its exit status and all that it printed."""
    with tempfile.TemporaryDirectory(prefix="keypool-test-") as cwd, tempfile.TemporaryFile() as output:
        process = _start_server(flags, env, Path(cwd), output.fileno())
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            kill_group(process.pid)
            process.wait()
            _release(process)
        output.seek(0)
        printed = output.read().decode("utf-8", "backslashreplace")
        assert status is not None, f"server.py {' '.join(flags)} did not end in {limit} s: {printed!r}"
        return status, printed


def _start_server(
    flags: Sequence[str], env: Mapping[str, str] | None, cwd: Path, output: int, *, forked: bool = True
) -> subprocess.Popen[bytes] | ForkedServer:
    """Start `server.py` with no other environment; forked where that makes no difference."""
    environment = clean_environment(env)
    if forked and fork_server.AVAILABLE and not any(name.startswith("PYTHON") for name in environment):
        return ForkedServer(flags, environment, cwd, output)
    return subprocess.Popen(
        [sys.executable, str(ROOT / "server.py"), *flags],
        stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, cwd=cwd, start_new_session=True,
    )  # fmt: skip


def _release(process: subprocess.Popen[bytes] | ForkedServer) -> None:
    if isinstance(process, ForkedServer):
        process.release()


def kill_group(group: int) -> None:
    """Kill a process group, if it is there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def lifeline(group: int) -> subprocess.Popen[bytes]:
    """A process that kills the group when this one is gone, however it went: then its input ends."""
    return subprocess.Popen(
        ["/bin/sh", "-c", f"cat >/dev/null; kill -KILL -{group}"],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


class ServerProcess:
    """A server of one's own: started, watched, and gone at the end with all that it started.

    It remembers every key that an answer showed, to purge them (`purge`) and to find any of them in the log
    (`check`).
    """

    def __init__(
        self,
        flags: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        admin_token: str | None = None,
        forked: bool = True,
    ) -> None:
        """Start `server.py` with these flags and no other setting; returns once it says that it is ready.

        Without `forked` it is a new interpreter, as its user's would be (fork_server.py has the difference).
        """
        self.flags = list(flags)
        self.cwd = cwd
        self.address = ""
        self.port = 0
        self.admin_token = admin_token
        self.secrets: set[str] = set()
        self._allowed: list[re.Pattern[str]] = []
        self._pieces: set[str] = set()
        self._unpurged: set[str] = set()
        self._pools: set[str] = set()
        self._lines: list[str] = []
        self._checked = 0
        self._changed = threading.Condition()
        self._ended = False
        self._end_expected = False
        self._closed = False
        self._clients: list[Client | Wire] = []
        self._lifeline: subprocess.Popen[bytes] | None = None
        read, write = os.pipe()
        self._output = os.fdopen(read, "rb")
        try:
            self._process = _start_server(flags, env, cwd, write, forked=forked)
        finally:
            os.close(write)
        if not isinstance(self._process, ForkedServer):
            self._lifeline = lifeline(self._process.pid)
        self._reader = threading.Thread(target=self._read_log, name="server log", daemon=True)
        self._reader.start()
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def _read_log(self) -> None:
        for line in self._output:
            with self._changed:
                self._lines.append(line.decode("utf-8", "backslashreplace").rstrip("\r\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _wait_until_ready(self, within: float = 60.0) -> None:
        seen = 0

        def ready() -> bool:
            nonlocal seen
            while seen < len(self._lines):
                match = _READY.search(self._lines[seen])
                seen += 1
                if match:
                    self.address, self.port = match["address"].strip("[]"), int(match["port"])
                    return True
            return self._ended

        with self._changed:
            self._changed.wait_for(ready, within)
        if not self.port:
            raise AssertionError(
                f"server.py {' '.join(self.flags)} never said that it was ready:\n{self.log}"
            )

    # ---- asking it

    @property
    def host(self) -> str:
        """What belongs into a Host header."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process.poll() is None

    @property
    def log(self) -> str:
        """All that it has printed."""
        with self._changed:
            return "\n".join(self._lines)

    def log_since(self, line: int) -> list[str]:
        """The lines of the log from this number on."""
        with self._changed:
            return self._lines[line:]

    def client(self, token: str | None = None) -> Client:
        """A new client, closed at the latest when the test gives the server back."""
        client = Client(self, token)
        self._clients.append(client)
        return client

    def wire(self, limit: float = 30.0) -> Wire:
        """A new plain connection, closed at the latest when the test gives the server back."""
        wire = Wire(self, limit)
        self._clients.append(wire)
        return wire

    def raw(self, data: bytes, *, half_close: bool = False, limit: float = 30.0) -> bytes:
        """Send these bytes, and return all that comes until the server closes the connection."""
        with Wire(self, limit) as wire:
            wire.send(data)
            if half_close:
                wire.end_sending()
            return wire.rest()

    def hang_up(self) -> None:
        """Close every connection that was made by `client` and `wire`."""
        for one in self._clients:
            one.close()
        self._clients.clear()

    def note(self, answer: Answer) -> None:
        """Remember the pools that an answer made, and the keys that it shows."""
        if answer.method == "PUT" and answer.status == 201:
            self._pools.add(answer.path)
        if b'key"' not in answer.body or answer.headers.get_content_type() != "application/json":
            return
        found: list[Any] = [answer.json]
        while found:
            value = found.pop()
            if isinstance(value, list):
                found.extend(value)
            elif isinstance(value, dict):
                found.extend(value.values())
                for name in ("key", "api_key"):
                    if isinstance(value.get(name), str):
                        self._remember(value[name])

    def _remember(self, key: str) -> None:
        self._unpurged.add(key)
        self._pieces.update(key[at : at + _LEAK_LENGTH] for at in range(len(key) - _LEAK_LENGTH + 1))

    def purge(self) -> None:
        """Leave the pool empty and nobody waiting."""
        self.hang_up()
        with Client(self, self.admin_token) as client:
            keys = sorted(self._unpurged)
            for at in range(0, len(keys), 1000):
                client.batch(op="delete", keys=keys[at : at + 1000]).expect(200)
            self._unpurged.clear()
            self._drop_pools(client)
            if client.get(f"{API}/pools/default").expect(200)["settings"]["history_leases"]:
                client.put(f"{API}/pools/default").expect(200)
            if client.stats()["total"]:  # imported keys, whose texts no answer showed
                rows = client.get(API + "/keys?limit=500").expect(200)["keys"]
                client.batch(op="delete", keys=[f"id:{row['id']}" for row in rows]).expect(200)

            def empty() -> bool:
                stats = client.stats()
                return bool(stats["total"] == 0 and stats["waiting"] == 0)

            eventually(empty, "a pool without keys and waiters")

    def _drop_pools(self, client: Client) -> None:
        """Delete all pools that were made, and wait until they are gone."""
        for path in self._pools:
            client.delete(f"{path}?drain=true&now=true")
        for path in self._pools:
            eventually(lambda path=path: client.get(path).status == 404, f"{path} is gone")  # type: ignore[misc]
        self._pools.clear()

    # ---- judging and ending it

    def allow(self, pattern: str) -> None:
        """Take it that the server logs errors like this from now on."""
        self._allowed.append(re.compile(pattern))

    def check(self) -> None:
        """Fails if the log has, since the last check, an error that no test asked for,
        or a piece of a key or a secret.
        """
        with self._changed:
            lines, self._checked = self._lines[self._checked :], len(self._lines)
        for number, line in enumerate(lines):
            shown = "\n".join(lines[max(0, number - 5) : number + 40])
            if _TROUBLE.search(line) and not any(pattern.search(line) for pattern in self._allowed):
                raise AssertionError(f"the server logged an error that no test asked for:\n{shown}")
            for secret in self.secrets:
                assert secret not in line, f"a token stands in the log:\n{line}"
            for run in re.findall(rf"[A-Za-z0-9]{{{_LEAK_LENGTH},}}", line):
                for at in range(len(run) - _LEAK_LENGTH + 1):
                    assert run[at : at + _LEAK_LENGTH] not in self._pieces, (
                        f"a key stands in the log:\n{line}"
                    )

    def signal(self, signum: signal.Signals) -> None:
        """Send the server (alone) a signal."""
        self._process.send_signal(signum)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The server stands still inside, so that its timers are late when it goes on."""
        self.signal(signal.SIGSTOP)
        try:
            self._wait_until_stopped()
            yield
        finally:
            self.signal(signal.SIGCONT)

    def _wait_until_stopped(self) -> None:
        if not isinstance(self._process, ForkedServer):
            os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)
            return
        stat = Path(f"/proc/{self.pid}/stat")
        eventually(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "the server stands still")

    def wait(self, within: float = 60.0) -> int:
        """The exit status, once it has ended, as the test expects, and its log is complete."""
        self._end_expected = True
        try:
            status = self._process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the server still runs after {within} s; its log:\n{self.log}") from None
        self._reader.join(30)
        return status

    def finish(self) -> None:
        """End the server as its user would; fails unless it ends in peace, alone, and with a clean log."""
        try:
            self.hang_up()
            if self.running:
                self.signal(signal.SIGTERM)
                status = self.wait()
                assert status == 0, f"exit status {status} after SIGTERM; the log:\n{self.log}"
            assert self._end_expected, (
                f"the server died with {self._process.returncode}; its log:\n{self.log}"
            )
            eventually(
                lambda: not self._group_lives(), "no process that the server started outlives it", within=30
            )
        finally:
            self.close()
        self.check()

    def _group_lives(self) -> bool:
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def close(self) -> None:
        """End it and all that it started at once, whatever state it is in."""
        self.hang_up()
        if self._lifeline is not None:
            self._lifeline.kill()
            self._lifeline.communicate()
            self._lifeline = None
        if self._closed:
            return
        self._closed = True
        kill_group(self._process.pid)
        self._process.wait()
        _release(self._process)
        self._reader.join(30)
        self._output.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.close()
