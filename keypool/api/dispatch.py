"""From a request to an operation, and from its answer to a reply: HTTP without sockets.

The checks are made in a fixed order: host and site, path, method, token and role, size, content type, body. `check`
makes those that need only the head of the request, `start` those of its body.
"""

from __future__ import annotations

import itertools
import logging
import re
import secrets
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote

import msgspec

from keypool.api.auth import NOBODY, Access, Caller, Role
from keypool.api.calls import ATTEMPT_HEADER, BASE, ID, POOLS, Call, location, require_may_name_ids
from keypool.api.decoding import Reader
from keypool.api.operations import Operation, audit_refused, ends_with_caller
from keypool.api.problems import CONTENT_TYPE, problem_body, problem_headers, status_of
from keypool.api.wrong_tokens import WrongTokens
from keypool.config.limits import MAX_BODY, MAX_HEADERS, MAX_IMPORT, MAX_TARGET
from keypool.core.errors import (
    Draining,
    Forbidden,
    HeadersTooLarge,
    KeypoolError,
    MethodNotAllowed,
    NotFound,
    UnknownPool,
    UnsupportedMediaType,
    UriTooLong,
)
from keypool.core.rules import DEFAULT_POOL
from keypool.engine import Pools
from keypool.ops.histogram import NO_OPERATION, CallMetrics, ReportMetrics
from keypool.ops.logs import access_line, access_log

_CALLERS_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_log = logging.getLogger("keypool.api")
_T = TypeVar("_T")
_encode = msgspec.json.Encoder().encode
_ADMIN = Role.ADMIN


class Request(Protocol):
    """The head of a request: Tornado's HTTPServerRequest, or `fast_call.Head`."""

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
    """A whole answer. A reply to HEAD has the body of that to GET, for its length; the server removes it."""

    status: int
    request_id: str
    content_type: str = ""  # none: there is no body
    body: bytes = b""
    own_headers: Sequence[tuple[str, str]] = ()
    outcome: str = "ok"  # or the code of the error
    last: bool = False  # the connection ends with this reply

    def headers(self) -> list[tuple[str, str]]:
        """All headers, in order, but those that the HTTP server adds: Date, Content-Length, Connection."""
        kind = [("Content-Type", self.content_type)] if self.content_type else []
        return [*kind, NO_STORE, *self.own_headers, ("X-Request-Id", self.request_id)]


NO_STORE = ("Cache-Control", "no-store")


@dataclass(frozen=True, slots=True)
class CachedChecks:
    """The result of the checks that depend only on the headers, the same for each request with these headers."""

    caller: Caller
    request_id: str | None


@dataclass(slots=True)
class Route:
    """An operation of a path, the reader of its bodies and queries, and what it is about.

    `subject` is what the operation's `run` gets: the engine of `default`, or Pools; None stands for the engine of the
    pool that the path names.
    """

    operation: Operation
    reader: Reader
    subject: Any
    limited: bool  # whether the caller must be allowed to use the pool


class Pending(msgspec.Struct, gc=False):
    """A request whose head has been checked. It may be started unless `error` is set."""

    request_id: str
    cached: CachedChecks | None = None
    # None for OPTIONS, and if the path has no such operation. Set first, so that errors are counted by operation.
    route: Route | None = None
    call: Call | None = None
    subject: Any = None  # what the operation's `run` gets
    error: KeypoolError | None = None
    legacy: bool = False
    head: bool = False
    allow: str = ""

    @property
    def max_body(self) -> int:
        """Bytes of the body that are read: more than usual if it may be an import by an admin."""
        route, call = self.route, self.call
        if route is None or call is None or not route.operation.takes_import:
            return MAX_BODY
        return MAX_IMPORT if call.caller.role is _ADMIN else MAX_BODY

    @property
    def operation_name(self) -> str:
        """The operation's name for metrics and logs."""
        return NO_OPERATION if self.route is None else self.route.operation.name


class _Path:
    """A path and its operations by method."""

    __slots__ = ("legacy", "methods")

    def __init__(self, legacy: bool) -> None:
        self.legacy = legacy
        self.methods: dict[str, Route] = {}


_NOWHERE = _Path(False)
_KEYS = BASE + "/keys/"
_IN_POOL = BASE + POOLS
_POOL = POOLS + "{pool}"
_REMEMBERED_PATH = 128  # characters of what is cached of a path in a pool
_REMEMBERED_PATHS = 2000


class Dispatcher:
    """Finds the operation of each request, and makes its reply. See the module."""

    def __init__(self, pools: Pools, access: Access, operations: Sequence[Operation]) -> None:
        self.pools = pools
        self._access = access
        self._paths: dict[str, _Path] = {}
        self._paths_of_key: dict[str, _Path] = {}  # by what stands behind the key
        self._paths_of_pool: dict[str, _Path] = {}  # by what stands behind the name of the pool
        self._paths_of_key_of_pool: dict[str, _Path] = {}
        # Caches of what was found in pools: of paths without a key, and of pools by what stands before a key.
        self._seen: dict[str, tuple[_Path, str, str]] = {}
        self._pools_seen: dict[str, str] = {}
        for operation in operations:
            self._add(operation)
        self.calls = CallMetrics(
            {operation.name: [error.code for error in operation.errors] for operation in operations}
        )
        self.reports = ReportMetrics()
        self.wrong_tokens = WrongTokens()
        self._ids = itertools.count(1)
        self._id_prefix = secrets.token_hex(5)
        self._logs_calls = access_log.isEnabledFor(logging.DEBUG)  # asking takes as long as counting the call

    def _add(self, operation: Operation) -> None:
        subject = self.pools if operation.on_pools else self.pools.default
        route = Route(operation, Reader(operation), subject, operation.about_a_pool)
        for path in (operation.path, operation.path + "/") if operation.legacy else (operation.path,):
            self._add_path(path, route)
        if operation.in_pools:
            self._add_path(_POOL + operation.path, replace(route, subject=None))

    def _add_path(self, path: str, route: Route) -> None:
        before, key, behind_key = path.partition("{key}")
        if before.startswith(_POOL):
            of_key, others, name = self._paths_of_key_of_pool, self._paths_of_pool, before[len(_POOL) :]
        else:
            of_key, others, name = self._paths_of_key, self._paths, BASE + before
        paths, name = (of_key, behind_key) if key else (others, name)
        paths.setdefault(name, _Path(route.operation.legacy)).methods[route.operation.method] = route

    # -- the head

    def check(
        self, request: Request, cached: CachedChecks | None = None, idempotency_key: str | None = None
    ) -> Pending:
        """Check the head of a request. Never raises: an error is in the result's `error`. O(headers).

        `cached` is what `cacheable_checks` returned for the same headers, if anything; then O(1). An Idempotency-Key
        that isn't in `request.headers` is passed as `idempotency_key`.
        """
        given = request.headers.get("X-Request-Id") if cached is None else cached.request_id
        request_id = f"{self._id_prefix}-{next(self._ids):x}" if given is None else self.request_id(given)
        pending = Pending(request_id, cached)
        try:
            self._check_head(request, pending, idempotency_key)
        except KeypoolError as error:
            # Without its traceback, which would hold this frame, which holds `pending`, which holds the error.
            pending.error = error.with_traceback(None)
        except Exception:
            _log.exception("request %s failed before its call was known", request_id)
            pending.error = unexpected()
        return pending

    def cacheable_checks(self, headers: Mapping[str, str]) -> CachedChecks | None:
        """Make the checks that depend only on the headers, for `check` to use with each request that has the same.

        None if one fails, or if its result may change, as when a session ends; or if the headers have an
        Idempotency-Key, which is part of the call.
        """
        if (not self._access.open and "Authorization" not in headers) or ATTEMPT_HEADER in headers:
            return None
        try:
            check_size_of_headers(headers)
            _check_content_type(headers)
            self._access.check_site(headers, True)
            return CachedChecks(self._access.caller(headers), headers.get("X-Request-Id"))
        except KeypoolError:
            return None

    def request_id(self, given: str | None) -> str:
        """The given id, if it is valid (up to 64 of `A-Za-z0-9._-`), else a new one."""
        if given is not None and _CALLERS_ID.fullmatch(given):
            return given
        return f"{self._id_prefix}-{next(self._ids):x}"

    def _check_head(self, request: Request, pending: Pending, idempotency_key: str | None) -> None:
        method, cached = request.method or "", pending.cached
        text, key, pool = request.path, "", DEFAULT_POOL
        path = self._paths.get(text)
        if path is None:
            path, key, pool = self._find(text)
        pending.legacy = path.legacy
        pending.head = method == "HEAD"
        route = pending.route = path.methods.get("GET" if pending.head else method)
        if cached is None:
            changes = method not in ("GET", "HEAD", "OPTIONS")
            changes = changes or (route is not None and route.operation.changes)
            self._access.check_site(request.headers, changes)
        if route is None:
            self._no_operation(path, method, pending)
            return
        caller, operation = NOBODY, route.operation
        if operation.roles:
            caller = self._access.caller(request.headers) if cached is None else cached.caller
            if caller.role not in operation.roles:
                refused = Forbidden(_needs(operation, caller.role))
                address = request.remote_ip or "?"
                audit_refused(operation, Call(caller, address, pending.request_id, key, pool=pool), refused)
                raise refused
        if caller.pools is not None and route.limited and pool not in caller.pools:
            raise UnknownPool
        pending.subject = route.subject or self.pools.get(pool)
        if key.startswith(ID):
            require_may_name_ids(caller)
        if len(request.uri or "") > MAX_TARGET:
            check_target(request)
        if cached is None:
            check_size_of_headers(request.headers)
            wanted = idempotency_key is None and operation.repeatable
            idempotency_key = request.headers.get(ATTEMPT_HEADER) if wanted else idempotency_key
        address = request.remote_ip or "?"
        pending.call = Call(caller, address, pending.request_id, key, idempotency_key, self.reports, pool)

    @staticmethod
    def _no_operation(path: _Path, method: str, pending: Pending) -> None:
        if path is _NOWHERE:
            raise NotFound
        pending.allow = ", ".join(_methods(path.methods))
        if method != "OPTIONS":
            raise MethodNotAllowed(pending.allow)

    def _find(self, text: str) -> tuple[_Path, str, str]:
        """The route of a path that names a key or a pool, and these names; `_NOWHERE` if there is no such path."""
        if text.startswith(_KEYS):
            segment, slash, rest = text[len(_KEYS) :].partition("/")
            if not segment:
                return _NOWHERE, "", DEFAULT_POOL
            return self._paths_of_key.get(slash + rest, _NOWHERE), _unquoted(segment), DEFAULT_POOL
        if (found := self._seen.get(text)) is not None:
            return found
        start = text.find("/", len(_IN_POOL)) + len("/keys/")
        if (pool := self._pools_seen.get(text[:start])) is not None:
            segment, slash, rest = text[start:].partition("/")
            if segment and rest:
                return self._paths_of_key_of_pool.get(slash + rest, _NOWHERE), _unquoted(segment), pool
        return self._find_in_pool(text)

    def _find_in_pool(self, text: str) -> tuple[_Path, str, str]:
        if not text.startswith(_IN_POOL):
            return _NOWHERE, "", DEFAULT_POOL
        segment, slash, rest = text[len(_IN_POOL) :].partition("/")
        if not segment:
            return _NOWHERE, "", DEFAULT_POOL
        pool = _unquoted(segment)
        key, behind = "", ""
        if rest.startswith("keys/"):
            key, another_slash, behind = rest[len("keys/") :].partition("/")
        # A path that ends here may name a call, such as acquire, where others have a key.
        path = None if behind else self._paths_of_pool.get(slash + rest)
        if path is None:
            if not key:
                return _NOWHERE, "", pool
            if behind and len(segment) <= _REMEMBERED_PATH:
                _remember(self._pools_seen, f"{_IN_POOL}{segment}/keys/", pool)
            return self._paths_of_key_of_pool.get(another_slash + behind, _NOWHERE), _unquoted(key), pool
        if len(text) <= _REMEMBERED_PATH:
            _remember(self._seen, text, (path, "", pool))
        return path, "", pool

    def answered(self, pending: Pending, reply: Reply, seconds: float) -> None:
        """Count a request that got `reply` after `seconds`, and write its line of the access log.

        The access log has the whole time. The metric has it without the time spent waiting for a key, as a latency
        objective must not depend on how long callers choose to wait.
        """
        name = NO_OPERATION if pending.route is None else pending.route.operation.name
        waited = 0.0 if pending.call is None else pending.call.waited
        self.calls.outcomes[name, reply.outcome] += 1
        self.calls.seconds[name].add(seconds - waited if waited < seconds else 0.0)
        if self._logs_calls:
            access_line(pending.request_id, name, reply.status, reply.outcome, seconds)

    def refused(self, request: Request | None, error: KeypoolError, seconds: float) -> Reply:
        """The reply to a request that the server itself refuses; `request` is None if its head hadn't come.

        If the head has an error, that is reported instead. The request is counted and logged like any other, with
        `seconds` as its time.
        """
        pending = Pending(self.request_id(None)) if request is None else self.check(request)
        if isinstance(pending.error, NotFound):  # it may be a page's path, which this class doesn't know
            pending.error = None
        reply = self.refusal(pending, pending.error or error)
        self.answered(pending, reply, seconds)
        return reply

    # -- the body

    def start(self, pending: Pending, request: Request, body: bytes) -> Coroutine[Any, Any, Any] | None:
        """Read the body of a request that passed `check`, and return the coroutine of its call; None for OPTIONS.

        Pass what the coroutine returns to `reply`, and what it or this method raises to `failed`.
        """
        route, call = pending.route, pending.call
        if route is None or call is None:
            return None
        if body and pending.cached is None:
            _check_content_type(request.headers)
        operation = route.operation
        if body or request.query or operation.query is not None or operation.body_required:
            route.reader.read(call, request.query, body)
        if pending.head and operation.head is not None:
            return operation.head(pending.subject, call)
        return operation.run(pending.subject, call)

    def ends_with_caller(self, pending: Pending) -> bool:
        """Whether a call that was started ends when its caller disconnects."""
        route, call = pending.route, pending.call
        return route is None or call is None or ends_with_caller(route.operation, call)

    def reply(self, pending: Pending, answer: Any) -> Reply:
        """The reply to a call that returned `answer`."""
        if pending.route is None:
            return Reply(204, pending.request_id, own_headers=[("Allow", pending.allow)])
        operation, call = pending.route.operation, pending.call
        assert call is not None
        status = operation.other_status if call.is_other and operation.other_status else operation.status
        if answer is None:
            return Reply(status, pending.request_id)
        reply = Reply(status, pending.request_id, "application/json", _encode(answer))
        if call.reported is not None and answer.changed:
            self.reports.add(call.reported, answer.guarded)
        if operation.locates:
            reply.own_headers = [("Location", location(call, answer.id))]
        if call.attempt is not None and call.attempt.replayed:
            reply.own_headers = [*reply.own_headers, ("Idempotent-Replayed", "true")]
        return reply

    def failed(self, pending: Pending, error: Exception) -> Reply:
        """The reply to a call that raised. An unexpected error is in the log with its traceback, not in the reply."""
        if isinstance(error, KeypoolError):
            return self.refusal(pending, error)
        _log.error("call %s, request %s failed", pending.operation_name, pending.request_id, exc_info=error)
        return self.refusal(pending, unexpected())

    def refusal(self, pending: Pending, error: KeypoolError) -> Reply:
        """An error as a problem. Draining ends the connection, so that a client that retries reaches another server."""
        message = getattr(error, "message", error.detail) if pending.legacy else None
        body = problem_body(error, pending.request_id, message)
        status, headers = status_of(type(error)), problem_headers(error)
        last = error.code == Draining.code
        return Reply(status, pending.request_id, CONTENT_TYPE, body, headers, error.code, last)


def _remember(cache: dict[str, _T], name: str, found: _T) -> None:
    if len(cache) >= _REMEMBERED_PATHS:
        cache.clear()
    cache[name] = found


def _unquoted(segment: str) -> str:
    return unquote(segment, errors="replace") if "%" in segment else segment


def unexpected() -> KeypoolError:
    """The error that is sent for an unexpected exception, whose traceback is in the log only."""
    return KeypoolError("the server failed on this request; the request id leads to its log")


def _methods(routes: Mapping[str, Route]) -> list[str]:
    methods = set(routes) | {"OPTIONS"}
    if "GET" in methods:
        methods.add("HEAD")
    return sorted(methods)


def _needs(operation: Operation, role: Role) -> str:
    roles = " or ".join(sorted(operation.roles))
    return f"{operation.name} needs the role {roles}; this token is a {role.value}'s"


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
