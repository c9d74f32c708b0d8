"""Base class of all handlers outside the API, with the same checks and errors; health, and unknown paths."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Awaitable
from typing import Any

import msgspec
from tornado.iostream import StreamClosedError
from tornado.web import HTTPError, RequestHandler

from keypool.api.auth import Access, Caller, Role
from keypool.api.calls import POOLS
from keypool.api.decoding import too_large
from keypool.api.dispatch import Dispatcher, check_size_of_headers, check_target, unexpected
from keypool.api.problems import CONTENT_TYPE, problem_body, problem_headers, status_of
from keypool.config.limits import MAX_BODY
from keypool.core.errors import (
    BadRequest,
    CrossSite,
    Forbidden,
    KeypoolError,
    MethodNotAllowed,
    NotFound,
    UnknownPool,
    WrongToken,
)
from keypool.core.rules import DEFAULT_POOL
from keypool.engine import Engine, Pools
from keypool.http.api_call import InFlight
from keypool.http.http1.responses import http_date
from keypool.ops.logs import access_line
from keypool.web.dashboard import HTML, PAGE_HEADERS, Dashboard


class _AnyMethod(tuple[str, ...]):
    """Lets every method reach `prepare`, which refuses those that the path doesn't support."""

    def __contains__(self, method: object) -> bool:
        return True


class PageHandler(RequestHandler):
    """Base class of all pages: counts requests in flight, checks them as the API does, answers errors as problems."""

    SUPPORTED_METHODS = _AnyMethod()
    allowed: tuple[str, ...] = ("GET", "HEAD", "OPTIONS")
    name = "none"
    roles: frozenset[Role] = frozenset()  # empty: no token needed

    def initialize(self, pools: Pools, access: Access, dispatcher: Dispatcher, in_flight: InFlight) -> None:
        self.pools = pools
        self.engine: Engine = pools.default
        self.dispatcher = dispatcher
        self.access = access
        self.request_id = dispatcher.request_id(self.request.headers.get("X-Request-Id"))
        self._in_flight = in_flight
        self._counted = True
        self._outcome = "ok"
        in_flight.count += 1

    @property
    def dashboard(self) -> Dashboard:
        """The dashboard. There is none while the keys are loaded."""
        dashboard: Dashboard = self.application.settings["dashboard"]
        return dashboard

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        self.set_header("Date", http_date())

    def prepare(self) -> Awaitable[None] | None:
        try:
            self.check()
        except WrongToken as error:
            return self._refuse_token(error)
        except KeypoolError as error:
            self.refuse(error)
        return None

    async def _refuse_token(self, error: WrongToken) -> None:
        await self.hold_back(self._count_token(error))
        self.refuse(error)

    def _count_token(self, error: WrongToken) -> float:
        return self.dispatcher.wrong_tokens.token(error.mark, self.request.remote_ip or "?", self.request_id)

    async def hold_back(self, seconds: float) -> None:
        """Delay the answer to a wrong token; if too many are delayed already, close the connection instead."""
        wrong = self.dispatcher.wrong_tokens
        if not seconds:
            return
        if not wrong.room():
            self.set_header("Connection", "close")
            return
        wrong.held += 1
        try:
            await asyncio.sleep(seconds)
        finally:
            wrong.held -= 1

    def check(self) -> None:
        """Raise the error for an invalid request; the checks have the contract's order of precedence."""
        method = self.request.method or ""
        self.access.check_site(self.request.headers, method not in ("GET", "HEAD", "OPTIONS"))
        if method not in self.allowed:
            raise MethodNotAllowed(", ".join(self.allowed))
        if self.roles and method != "OPTIONS":
            self.require_role()
        check_target(self.request)
        check_size_of_headers(self.request.headers)
        if len(self.request.body) > MAX_BODY:
            raise too_large()

    def choose_pool(self, caller: Caller) -> None:
        """Use the pool that the path names. Raises UnknownPool, also if the caller may not use it."""
        prefix = self.path_args[0]
        name = prefix.removeprefix(POOLS) if prefix else DEFAULT_POOL
        if not caller.may_use(name):
            raise UnknownPool
        self.engine = self.pools.get(name)

    def require_role(self) -> None:
        """Raise Unauthorized or Forbidden unless the caller has one of the page's roles."""
        caller = self.caller = self.access.identify(self.request.headers.get("Authorization"))
        if caller.role not in self.roles:
            wanted = " or ".join(sorted(self.roles))
            raise Forbidden(f"{self.name} needs the role {wanted}; this token is a {caller.role.value}'s")

    def refuse(self, error: KeypoolError) -> None:
        """Answer with an error: a page for browsers, a problem for others."""
        self._outcome = error.code
        self.set_status(int(status_of(type(error))))
        for name, value in problem_headers(error):
            self.set_header(name, value)
        page = self.error_page(error)
        if page is None:
            self._answer(problem_body(error, self.request_id), CONTENT_TYPE)
        else:
            self._answer(page, HTML)

    @property
    def takes_gzip(self) -> bool:
        """Whether the client takes an answer that is compressed by gzip."""
        for each in self.request.headers.get("Accept-Encoding", "").split(","):
            coding, _, weight = each.replace(" ", "").lower().partition(";q=")
            if coding == "gzip":
                return weight.strip("0.") != "" or weight == ""
        return False

    @property
    def wants_page(self) -> bool:
        """Whether the client is a browser."""
        return "text/html" in self.request.headers.get("Accept", "")

    def error_page(self, error: KeypoolError) -> bytes | None:
        """The page that a browser gets for an error; None for other clients, and under /api/."""
        dashboard: Dashboard | None = self.application.settings.get("dashboard")  # None while loading
        if dashboard is None or not self.wants_page or self.request.path.startswith("/api/"):
            return None
        for name, value in PAGE_HEADERS:
            self.set_header(name, value)
        return dashboard.error_page(error, self.get_status(), self.request_id)

    def answer(self, body: object) -> None:
        """Answer with JSON."""
        self._answer(msgspec.json.encode(body), "application/json")

    def _answer(self, body: bytes, content_type: str) -> None:
        self.set_header("Content-Type", content_type)
        self.set_header("Cache-Control", "no-store")
        self.set_header("X-Request-Id", self.request_id)
        # Only pages are compressed, and the one secret in them, the XSRF value, differs from page to page.
        if content_type == HTML:
            self.set_header("Vary", "Accept-Encoding")
            if self.takes_gzip:
                self.set_header("Content-Encoding", "gzip")
                body = gzip.compress(body, 3, mtime=0)  # a tenth of the length in about a millisecond
        self.finish(body)

    def options(self, *args: str) -> None:
        self.set_status(204)
        self.set_header("Allow", ", ".join(self.allowed))
        self.set_header("Cache-Control", "no-store")
        self.set_header("X-Request-Id", self.request_id)
        self.finish()

    def head(self, *args: str) -> Any:
        # Tornado leaves the body out.
        return self.get(*args)

    def compute_etag(self) -> None:
        return  # the answers are no-store

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Answer with a KeypoolError that a method raised, an error of Tornado's, or 500 without a trace."""
        raised = kwargs.get("exc_info", (None, None))[1]
        if isinstance(raised, KeypoolError) or status_code >= 500:
            self.refuse(raised if isinstance(raised, KeypoolError) else unexpected())
            return
        # Tornado parses a form before it calls `prepare`, but the errors of `check` take precedence.
        try:
            self.check()
            if status_code == 403:
                raise CrossSite("another site sent this form, or it is out of date: reload the page")
            raise BadRequest("the query, or the form that was sent, is not percent-encoded UTF-8")
        except WrongToken as error:
            self._count_token(error)
            self.set_header("Connection", "close")  # instead of a delay, which is not possible here
            self.refuse(error)
        except KeypoolError as error:
            self.refuse(error)

    def log_exception(self, *args: Any) -> None:
        """Log an internal error with the request id. Tornado's own line has the target, which may hold a key."""
        error = args[1]
        if isinstance(error, StreamClosedError | KeypoolError):
            return
        if isinstance(error, HTTPError) and error.status_code < 500:
            return
        self.application.settings["log"].error("page failed, request %s", self.request_id, exc_info=args)

    def on_finish(self) -> None:
        access_line(self.request_id, self.name, self.get_status(), self._outcome, self.request.request_time())
        self._leave()

    def on_connection_close(self) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._counted:
            self._counted = False
            self._in_flight.count -= 1


class Health(PageHandler):
    """/healthz: 200 while the event loop runs."""

    name = "health"

    def get(self, *args: str) -> None:
        self.answer({"status": "ok"})


class Ready(PageHandler):
    """/readyz: 200 when calls are served, naming a part that can't be reached, if any; else 503 with the reason."""

    name = "ready"

    def get(self, *args: str) -> None:
        self.engine.ready()
        degraded = self.engine.degraded
        self.answer({"status": "ready"} | ({"detail": degraded} if degraded else {}))


class UnknownPath(PageHandler):
    """Every other path: 404 whatever the method."""

    def check(self) -> None:
        self.access.check_site(self.request.headers, self.request.method not in ("GET", "HEAD", "OPTIONS"))
        raise NotFound
