"""From a request to an operation, and from its answer to a reply: HTTP's part of the API, and no socket.

The checks are made in the order of the contract: host and site, path, method, token and role, size, content
type, body. The first part needs only the head of the request (`begin`), the rest its body (`run`).
"""

from __future__ import annotations

import itertools
import logging
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import unquote

import msgspec

from keypool.auth import NOBODY, Access, Role
from keypool.engine import Engine
from keypool.errors import (
    Forbidden,
    HeadersTooLarge,
    KeypoolError,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    UnsupportedMediaType,
    UriTooLong,
)
from keypool.handlers.access import access_line
from keypool.handlers.calls import NO_OPERATION, CallTallies
from keypool.handlers.problems import CONTENT_TYPE, problem_body, problem_headers, status_of
from keypool.handlers.wording import Reader
from keypool.limits import MAX_BODY, MAX_HEADERS, MAX_TARGET
from keypool.operations import Call, Operation, require_may_name

BASE = "/api/v1"

_CALLERS_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_log = logging.getLogger("keypool.api")
_encode = msgspec.json.Encoder().encode


class Request(Protocol):
    """What is read of a request's head: Tornado's HTTPServerRequest has it, and so may others."""

    @property
    def method(self) -> str | None: ...  # noqa: D102
    @property
    def path(self) -> str: ...  # noqa: D102
    @property
    def query(self) -> str: ...  # noqa: D102
    @property
    def uri(self) -> str | None: ...  # noqa: D102
    @property
    def headers(self) -> Mapping[str, str]: ...  # noqa: D102
    @property
    def remote_ip(self) -> str | None: ...  # noqa: D102


@dataclass(slots=True)
class Reply:
    """A whole answer. A reply to HEAD carries the body that GET would have had, for its length."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes = b""
    outcome: str = "ok"  # or the code of the error


@dataclass(slots=True)
class Begun:
    """A request that passed the checks of its head, or the error that it met there."""

    request_id: str
    legacy: bool
    operation: Operation | None = None
    call: Call | None = None
    error: KeypoolError | None = None
    allow: str = ""
    head: bool = False


class Dispatcher:
    """All operations behind their paths."""

    def __init__(self, engine: Engine, access: Access, operations: Iterable[Operation]) -> None:
        self.engine = engine
        self._access = access
        self._readers: dict[str, Reader] = {}
        self._routes: dict[str, dict[str, Operation]] = {}
        for operation in operations:
            paths = [operation.path, operation.path + "/"] if operation.legacy else [operation.path]
            for path in paths:
                self._routes.setdefault(BASE + path, {})[operation.method] = operation
            self._readers[operation.name] = Reader(operation)
        self.calls = CallTallies(self._readers)
        self._ids = itertools.count(1)
        self._id_prefix = secrets.token_hex(5)

    # -- the head

    def begin(self, request: Request) -> Begun:
        """Check the head of a request. Never raises: what is wrong is in the answer's `error`."""
        begun = Begun(self.request_id(request.headers), False)
        try:
            self._check_head(request, begun)
        except KeypoolError as error:
            # Without its traceback, which would hold this frame, which holds `begun`, which holds it.
            begun.error = error.with_traceback(None)
        except Exception:
            _log.exception("request %s failed before its call was known", begun.request_id)
            begun.error = unexpected()
        return begun

    def request_id(self, headers: Mapping[str, str]) -> str:
        """The caller's, if it is fit to be shown, else a new one."""
        given = headers.get("X-Request-Id")
        if given is not None and _CALLERS_ID.fullmatch(given):
            return given
        return f"{self._id_prefix}-{next(self._ids):x}"

    def _check_head(self, request: Request, begun: Begun) -> None:
        method = request.method or ""
        routes, key = self._find(request.path)
        begun.legacy = routes is not None and any(operation.legacy for operation in routes.values())
        begun.head = method == "HEAD"
        operation = None if routes is None else routes.get("GET" if begun.head else method)
        changes = method not in ("GET", "HEAD", "OPTIONS") or (operation is not None and operation.changes)
        self._access.check_site(request.headers, changes)
        if routes is None:
            raise NotFound
        if operation is None:
            allow = ", ".join(_methods(routes))
            if method == "OPTIONS":
                begun.allow = allow
                return
            raise MethodNotAllowed(allow)
        caller = NOBODY
        if operation.roles:
            caller = self._access.caller(request.headers)
            if caller.role not in operation.roles:
                raise Forbidden(_needs(operation, caller.role))
        require_may_name(key, caller)
        check_size_of_head(request)
        begun.operation = operation
        begun.call = Call(caller, request.remote_ip or "?", begun.request_id, key)

    def _find(self, path: str) -> tuple[dict[str, Operation] | None, str]:
        """The methods of a path, and the key in it."""
        routes = self._routes.get(path)
        if routes is not None:
            return routes, ""
        start = BASE + "/keys/"
        if not path.startswith(start):
            return None, ""
        segment, slash, rest = path[len(start) :].partition("/")
        if not segment:
            return None, ""
        return self._routes.get(f"{start}{{key}}{slash}{rest}"), _decoded(segment)

    def answered(self, begun: Begun, reply: Reply, seconds: float) -> None:
        """A request was answered so, after so long: count it, and write its line of the access log."""
        name = NO_OPERATION if begun.operation is None else begun.operation.name
        self.calls.add(name, reply.outcome, seconds)
        access_line(begun.request_id, name, reply.status, reply.outcome, seconds)

    def refused(self, request: Request | None, error: KeypoolError) -> Reply:
        """What the server refuses in the application's place; `request` is None if its head had not come.

        What the head is refused for comes before what is wrong with the body. Counted, and in the log, as all.
        """
        begun = Begun(self.request_id({}), False)
        if request is not None:
            begun = self.begin(request)
            if not request.path.startswith(
                BASE
            ):  # a page's: not for the dispatcher to say that there is none
                begun.error = None
        reply = self.refusal(begun, begun.error or error)
        self.answered(begun, reply, 0.0)
        return reply

    # -- the body

    async def run(self, begun: Begun, request: Request, body: bytes) -> Reply:
        """Do what a begun request asks for. Raises nothing but GeneratorExit, when it is closed."""
        if begun.error is not None:
            return self.refusal(begun, begun.error)
        try:
            if begun.operation is None or begun.call is None:
                return Reply(204, self._headers(begun, [("Allow", begun.allow)]))
            operation, call = begun.operation, begun.call
            if body:
                _check_content_type(request.headers)
            self._readers[operation.name].read(call, request.query, body)
            step = operation.head if begun.head and operation.head is not None else operation.run
            return self._reply(begun, operation, await step(self.engine, call))
        except KeypoolError as error:
            return self.refusal(begun, error)
        except Exception:
            name = begun.operation.name if begun.operation else "?"
            _log.exception("call %s, request %s failed", name, begun.request_id)
            return self.refusal(begun, unexpected())

    def _reply(self, begun: Begun, operation: Operation, answer: Any) -> Reply:
        if answer is None:
            return Reply(operation.status, self._headers(begun, []))
        headers = [("Content-Type", "application/json")]
        if operation.location is not None:
            headers.append(("Location", operation.location(answer)))
        status = 201 if isinstance(answer, operation.created) else operation.status
        return Reply(status, self._headers(begun, headers), _encode(answer))

    def refusal(self, begun: Begun, error: KeypoolError) -> Reply:
        """The problem that an error is told as."""
        message = None
        if begun.legacy:
            message = getattr(error, "message", error.detail)
        headers = [("Content-Type", CONTENT_TYPE), *problem_headers(error)]
        body = problem_body(error, begun.request_id, message)
        return Reply(status_of(type(error)), self._headers(begun, headers), body, error.code)

    def _headers(self, begun: Begun, headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
        headers.append(("Cache-Control", "no-store"))
        headers.append(("X-Request-Id", begun.request_id))
        return headers


def too_large() -> PayloadTooLarge:
    """The error of a body over the limit."""
    return PayloadTooLarge(f"the body is larger than {MAX_BODY} bytes; send a batch in parts")


def unexpected() -> KeypoolError:
    """The error of what nobody foresaw: its story is in the log, not in the answer."""
    return KeypoolError("the server failed on this request; the request id leads to its log")


def _methods(routes: Mapping[str, Operation]) -> list[str]:
    methods = set(routes) | {"OPTIONS"}
    if "GET" in methods:
        methods.add("HEAD")
    return sorted(methods)


def _needs(operation: Operation, role: Role) -> str:
    roles = " or ".join(sorted(operation.roles))
    return f"{operation.name} needs the role {roles}; this token is a {role.value}'s"


def _decoded(segment: str) -> str:
    return unquote(segment, errors="replace") if "%" in segment else segment


def check_size_of_head(request: Request) -> None:
    """Raise UriTooLong or HeadersTooLarge for a head over the limits."""
    target = request.uri or ""
    if len(target) > MAX_TARGET:
        raise UriTooLong(f"the request target is {len(target)} bytes long; {MAX_TARGET} are read")
    size = sum(len(name) + len(value) for name, value in request.headers.items())
    if size > MAX_HEADERS:
        raise HeadersTooLarge(f"the headers are {size} bytes long; {MAX_HEADERS} are read")


def _check_content_type(headers: Mapping[str, str]) -> None:
    encoding = headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMediaType("send the body as it is, without a Content-Encoding")
    given = headers.get("Content-Type")
    if given is None:
        return
    media, _, parameters = given.partition(";")
    if media.strip().lower() != "application/json":
        raise UnsupportedMediaType("send the body as Content-Type: application/json")
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset" and value.strip().strip('"').lower() not in ("utf-8", "utf8"):
            raise UnsupportedMediaType("send JSON in UTF-8")
