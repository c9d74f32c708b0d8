"""From a request to an operation, and from its answer to a reply: HTTP's part of the API, and no socket.

The checks are made in the order of the contract: host and site, path, method, token and role, size, content
type, body. The first part needs only the head of the request (`begin`), the rest its body (`run`).
"""

from __future__ import annotations

import itertools
import logging
import re
import secrets
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import unquote

import msgspec

from keypool.api.auth import NOBODY, Access, Caller, Role
from keypool.api.decoding import Reader
from keypool.api.operations import BASE, Call, Operation, audit_refused, ends_with_caller, require_may_name
from keypool.api.problems import CONTENT_TYPE, problem_body, problem_headers, status_of
from keypool.api.wrong_tokens import WrongTokens
from keypool.config.limits import MAX_BODY, MAX_HEADERS, MAX_TARGET
from keypool.core.errors import (
    Draining,
    Forbidden,
    HeadersTooLarge,
    KeypoolError,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    UnsupportedMediaType,
    UriTooLong,
)
from keypool.engine import Engine
from keypool.ops.histogram import NO_OPERATION, CallMetrics
from keypool.ops.logs import access_line, access_log

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


class Reply(msgspec.Struct, gc=False):
    """A whole answer. A reply to HEAD carries the body that GET would have had, for its length."""

    status: int
    request_id: str
    content_type: str = ""  # none: there is no body
    body: bytes = b""
    own_headers: Sequence[tuple[str, str]] = ()
    outcome: str = "ok"  # or the code of the error
    last: bool = False

    @property
    def closes(self) -> bool:
        """Whether the connection has to end with it: who asks again at once must not ask a server that is leaving."""
        return self.last or self.outcome == Draining.code

    def headers(self) -> list[tuple[str, str]]:
        """All that is not the server's to say (Date, length, connection), in order."""
        kind = [("Content-Type", self.content_type)] if self.content_type else []
        return [*kind, *self.own_headers, NO_STORE, ("X-Request-Id", self.request_id)]


NO_STORE = ("Cache-Control", "no-store")


@dataclass(frozen=True, slots=True)
class Known:
    """What headers say that pass every check of their own, whatever they come with."""

    caller: Caller
    request_id: str | None


class Begun:
    """A request that passed the checks of its head, or the error that it met there."""

    error: KeypoolError | None = None
    # Known before its checks are made; none for OPTIONS, and where there is no call.
    route: Route | None = None
    call: Call | None = None
    known: Known | None = None
    legacy = False
    head = False
    allow = ""
    request_id = ""


@dataclass(slots=True)
class Route:
    """An operation behind a path, and who reads its bodies."""

    operation: Operation
    reader: Reader


class _Path:
    """A path and the operations that it has, by method."""

    __slots__ = ("legacy", "methods")

    def __init__(self, legacy: bool) -> None:
        self.legacy = legacy
        self.methods: dict[str, Route] = {}


_NOWHERE = _Path(False)
_KEYS = BASE + "/keys/"


class Dispatcher:
    """All operations behind their paths."""

    def __init__(self, engine: Engine, access: Access, operations: Sequence[Operation]) -> None:
        self.engine = engine
        self._access = access
        self._paths: dict[str, _Path] = {}
        self._paths_of_key: dict[str, _Path] = {}  # by what stands behind the key
        for operation in operations:
            self._add(Route(operation, Reader(operation)))
        self.calls = CallMetrics(
            {operation.name: [error.code for error in operation.errors] for operation in operations}
        )
        self.wrong_tokens = WrongTokens()
        self._ids = itertools.count(1)
        self._id_prefix = secrets.token_hex(5)

    def _add(self, route: Route) -> None:
        operation = route.operation
        for path in (operation.path, operation.path + "/") if operation.legacy else (operation.path,):
            of_key, key, rest = path.partition("{key}")
            paths, name = (self._paths_of_key, rest) if key else (self._paths, BASE + of_key)
            paths.setdefault(name, _Path(operation.legacy)).methods[operation.method] = route

    # -- the head

    def begin(self, begun: Begun, request: Request, known: Known | None = None) -> None:
        """Check the head of a request. Never raises: what is wrong is in `begun.error`.

        `known` is what `learn` said of the same headers before, if it was asked.
        """
        begun.known = known
        given = request.headers.get("X-Request-Id") if known is None else known.request_id
        begun.request_id = (
            f"{self._id_prefix}-{next(self._ids):x}" if given is None else self.request_id(given)
        )
        try:
            self._check_head(request, begun)
        except KeypoolError as error:
            # Without its traceback, which would hold this frame, which holds `begun`, which holds it.
            begun.error = error.with_traceback(None)
        except Exception:
            _log.exception("request %s failed before its call was known", begun.request_id)
            begun.error = unexpected()

    def learn(self, headers: Mapping[str, str]) -> Known | None:
        """What may be remembered of headers, so that the next request with the very same is spared the checks.

        None if one of them doesn't pass, or if it may pass differently the next time, as a session ends.
        """
        if not self._access.open and "Authorization" not in headers:
            return None
        try:
            check_size_of_headers(headers)
            _check_content_type(headers)
            self._access.check_site(headers, True)
            return Known(self._access.caller(headers), headers.get("X-Request-Id"))
        except KeypoolError:
            return None

    def request_id(self, given: str | None) -> str:
        """The caller's, if it is fit to be shown, else a new one."""
        if given is not None and _CALLERS_ID.fullmatch(given):
            return given
        return f"{self._id_prefix}-{next(self._ids):x}"

    def _check_head(self, request: Request, begun: Begun) -> None:
        method, known = request.method or "", begun.known
        path, key = self._find(request.path)
        begun.legacy = path.legacy
        begun.head = method == "HEAD"
        route = begun.route = path.methods.get("GET" if begun.head else method)
        if known is None:
            changes = method not in ("GET", "HEAD", "OPTIONS")
            changes = changes or (route is not None and route.operation.changes)
            self._access.check_site(request.headers, changes)
        if route is None:
            self._no_operation(path, method, begun)
            return
        caller, operation = NOBODY, route.operation
        if operation.roles:
            caller = self._access.caller(request.headers) if known is None else known.caller
            if caller.role not in operation.roles:
                refused = Forbidden(_needs(operation, caller.role))
                audit_refused(
                    operation, Call(caller, request.remote_ip or "?", begun.request_id, key), refused
                )
                raise refused
        if key:
            require_may_name(key, caller)
        check_target(request)
        if known is None:
            check_size_of_headers(request.headers)
        begun.call = Call(caller, request.remote_ip or "?", begun.request_id, key)

    @staticmethod
    def _no_operation(path: _Path, method: str, begun: Begun) -> None:
        if path is _NOWHERE:
            raise NotFound
        begun.allow = ", ".join(_methods(path.methods))
        if method != "OPTIONS":
            raise MethodNotAllowed(begun.allow)

    def _find(self, text: str) -> tuple[_Path, str]:
        """What is known of a path, and the key in it."""
        path = self._paths.get(text)
        if path is not None:
            return path, ""
        if not text.startswith(_KEYS):
            return _NOWHERE, ""
        segment, slash, rest = text[len(_KEYS) :].partition("/")
        if not segment:
            return _NOWHERE, ""
        key = _decoded(segment) if "%" in segment else segment
        return self._paths_of_key.get(slash + rest, _NOWHERE), key

    def answered(self, begun: Begun, reply: Reply, seconds: float) -> None:
        """A request was answered so, after so long: count it, and write its line of the access log.

        The access log has the whole time, the metric what the server needed: an objective of latency must not
        depend on how long callers choose to wait for a key.
        """
        name = NO_OPERATION if begun.route is None else begun.route.operation.name
        waited = 0.0 if begun.call is None else begun.call.waited
        self.calls.add(name, reply.outcome, seconds - waited if waited < seconds else 0.0)
        if access_log.isEnabledFor(logging.DEBUG):
            access_line(begun.request_id, name, reply.status, reply.outcome, seconds)

    def refused(self, request: Request | None, error: KeypoolError, seconds: float) -> Reply:
        """What the server refuses in the application's place; `request` is None if its head had not come.

        What the head is refused for comes before what is wrong with the body. Counted, and in the log, as all:
        `seconds` is how long it took.
        """
        begun = Begun()
        if request is None:
            begun.request_id = self.request_id(None)
        else:
            self.begin(begun, request)
            if isinstance(begun.error, NotFound):  # a page's, perhaps: not for the dispatcher to say
                begun.error = None
        reply = self.refusal(begun, begun.error or error)
        self.answered(begun, reply, seconds)
        return reply

    # -- the body

    def run(self, begun: Begun, request: Request, body: bytes) -> Coroutine[Any, Any, Any] | None:
        """Read the body of a begun request and start its call; None if there is nothing to call.

        What the coroutine returns is for `reply`; what it raises, and what this does, for `failed`.
        """
        route, call = begun.route, begun.call
        if route is None or call is None:
            return None
        if body and begun.known is None:
            _check_content_type(request.headers)
        operation = route.operation
        if body or request.query or operation.query is not None or operation.body_required:
            route.reader.read(call, request.query, body)
        if begun.head and operation.head is not None:
            return operation.head(self.engine, call)
        return operation.run(self.engine, call)

    def ends_with_caller(self, begun: Begun) -> bool:
        """Whether a call that was begun ends when its caller hangs up."""
        route, call = begun.route, begun.call
        return route is None or call is None or ends_with_caller(route.operation, call)

    def reply(self, begun: Begun, answer: Any) -> Reply:
        """What a call has answered; None is nothing but that it is done."""
        if begun.route is None:
            return Reply(204, begun.request_id, own_headers=[("Allow", begun.allow)])
        operation = begun.route.operation
        if answer is None:
            return Reply(operation.status, begun.request_id)
        status = 201 if isinstance(answer, operation.created) else operation.status
        reply = Reply(status, begun.request_id, "application/json", _encode(answer))
        if operation.location is not None:
            reply.own_headers = [("Location", operation.location(answer))]
        return reply

    def failed(self, begun: Begun, error: Exception) -> Reply:
        """What became of a call that raised: the problem, which for what nobody foresaw tells nothing."""
        if isinstance(error, KeypoolError):
            return self.refusal(begun, error)
        name = NO_OPERATION if begun.route is None else begun.route.operation.name
        _log.error("call %s, request %s failed", name, begun.request_id, exc_info=error)
        return self.refusal(begun, unexpected())

    def refusal(self, begun: Begun, error: KeypoolError) -> Reply:
        """The problem that an error is told as."""
        message = getattr(error, "message", error.detail) if begun.legacy else None
        body = problem_body(error, begun.request_id, message)
        status, headers = status_of(type(error)), problem_headers(error)
        return Reply(status, begun.request_id, CONTENT_TYPE, body, headers, error.code)


def too_large() -> PayloadTooLarge:
    """The error of a body over the limit."""
    return PayloadTooLarge(f"the body is larger than {MAX_BODY} bytes; send a batch in parts")


def unexpected() -> KeypoolError:
    """The error of what nobody foresaw: its story is in the log, not in the answer."""
    return KeypoolError("the server failed on this request; the request id leads to its log")


def _methods(routes: Mapping[str, Route]) -> list[str]:
    methods = set(routes) | {"OPTIONS"}
    if "GET" in methods:
        methods.add("HEAD")
    return sorted(methods)


def _needs(operation: Operation, role: Role) -> str:
    roles = " or ".join(sorted(operation.roles))
    return f"{operation.name} needs the role {roles}; this token is a {role.value}'s"


def _decoded(segment: str) -> str:
    return unquote(segment, errors="replace")


def check_target(request: Request) -> None:
    """Raise UriTooLong for a target over the limit."""
    target = request.uri or ""
    if len(target) > MAX_TARGET:
        raise UriTooLong(f"the request target is {len(target)} bytes long; {MAX_TARGET} are read")


def check_size_of_headers(headers: Mapping[str, str]) -> None:
    """Raise HeadersTooLarge for headers over the limit."""
    size = sum(map(len, headers)) + sum(map(len, headers.values()))
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
