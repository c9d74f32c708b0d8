"""What is served beside the API: health for anyone, and a clear error for every other path."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import msgspec
from tornado.iostream import StreamClosedError
from tornado.web import HTTPError, RequestHandler

from keypool.api.auth import Access, Role
from keypool.api.dispatch import Dispatcher, check_size_of_headers, check_target, too_large, unexpected
from keypool.api.problems import CONTENT_TYPE, problem_body, problem_headers, status_of
from keypool.config.limits import MAX_BODY
from keypool.core.errors import (
    BadRequest,
    CrossSite,
    Forbidden,
    KeypoolError,
    MethodNotAllowed,
    NotFound,
    WrongToken,
)
from keypool.engine import Engine
from keypool.http.api_call import InFlight
from keypool.http.http1.responses import http_date
from keypool.ops.access import access_line
from keypool.web.dashboard import HTML, PAGE_HEADERS, Dashboard


class _AnyMethod(tuple[str, ...]):
    """All methods reach `prepare`, which refuses those that the path doesn't have."""

    def __contains__(self, method: object) -> bool:
        return True


class PageHandler(RequestHandler):
    """The root of what isn't the API: the same checks of host and site, the same problems."""

    SUPPORTED_METHODS = _AnyMethod()
    allowed: tuple[str, ...] = ("GET", "HEAD", "OPTIONS")
    name = "none"
    roles: frozenset[Role] = frozenset()  # none: for anyone

    def initialize(self, engine: Engine, access: Access, dispatcher: Dispatcher, in_flight: InFlight) -> None:
        """Count the request, and name it."""
        self.engine = engine
        self.dispatcher = dispatcher
        self.access = access
        self.request_id = dispatcher.request_id(self.request.headers.get("X-Request-Id"))
        self._in_flight = in_flight
        self._counted = True
        self._outcome = "ok"
        in_flight.enter()

    def set_default_headers(self) -> None:
        """No Server header, and a Date made once a second."""
        self.clear_header("Server")
        self.set_header("Date", http_date())

    def prepare(self) -> Awaitable[None] | None:
        """Refuse what the checks refuse, before any method."""
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
        """Wait before an answer to a wrong token; if too many wait already, end the connection with it instead."""
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
        """Raise what refuses this request, in the order of the contract."""
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

    def require_role(self) -> None:
        """Raise Unauthorized or Forbidden unless the caller has one of the page's roles."""
        caller = self.access.identify(self.request.headers.get("Authorization"))
        if caller.role not in self.roles:
            wanted = " or ".join(sorted(self.roles))
            raise Forbidden(f"{self.name} needs the role {wanted}; this token is a {caller.role.value}'s")

    def refuse(self, error: KeypoolError) -> None:
        """Answer with the problem that this error is."""
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
    def wants_page(self) -> bool:
        """Whether a browser asks."""
        return "text/html" in self.request.headers.get("Accept", "")

    def error_page(self, error: KeypoolError) -> bytes | None:
        """The page that a browser gets for an error; None for everybody else, and under /api/."""
        dashboard: Dashboard | None = self.application.settings.get("dashboard")  # none while loading
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
        self.finish(body)

    def options(self, *args: str) -> None:
        """The methods of the path."""
        self.set_status(204)
        self.set_header("Allow", ", ".join(self.allowed))
        self.set_header("Cache-Control", "no-store")
        self.set_header("X-Request-Id", self.request_id)
        self.finish()

    def head(self, *args: str) -> Any:
        """As GET; Tornado leaves the body out."""
        return self.get(*args)

    def compute_etag(self) -> None:
        """None: these answers are not for caches."""
        return

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """What Tornado refuses, or else what nobody expected: 500, and no trace to the caller."""
        if status_code >= 500:
            self.refuse(unexpected())
            return
        # Tornado reads a form before it asks `prepare`, whose checks come first all the same.
        try:
            self.check()
            if status_code == 403:
                raise CrossSite("another site sent this form, or one that is out of date: load the page anew")
            raise BadRequest("the query, or the form that was sent, is not percent-encoded UTF-8")
        except WrongToken as error:
            self._count_token(error)
            self.set_header("Connection", "close")  # there is no waiting here
            self.refuse(error)
        except KeypoolError as error:
            self.refuse(error)

    def log_exception(self, *args: Any) -> None:
        """Log it under the request id, unless it is the caller's, or the connection is gone."""
        if isinstance(args[1], StreamClosedError):
            return
        if isinstance(args[1], HTTPError) and args[1].status_code < 500:
            return
        # Tornado's own line shows the request, and so its target.
        self.application.settings["log"].error("page failed, request %s", self.request_id, exc_info=args)

    def on_finish(self) -> None:
        """Answered."""
        access_line(self.request_id, self.name, self.get_status(), self._outcome, self.request.request_time())
        self._leave()

    def on_connection_close(self) -> None:
        """The caller is gone."""
        self._leave()

    def _leave(self) -> None:
        if self._counted:
            self._counted = False
            self._in_flight.leave()


class Health(PageHandler):
    """/healthz: 200 while the loop turns."""

    name = "health"

    def get(self, *args: str) -> None:
        """See the class."""
        self.answer({"status": "ok"})


class Ready(PageHandler):
    """/readyz: 200 when calls are served, with what isn't if that is a part; else 503 with the reason."""

    name = "ready"

    def get(self, *args: str) -> None:
        """See the class."""
        try:
            self.engine.ready()
        except KeypoolError as error:
            self.refuse(error)
        else:
            degraded = self.engine.degraded
            self.answer({"status": "ready"} | ({"detail": degraded} if degraded else {}))


class Nothing(PageHandler):
    """Every other path."""

    def check(self) -> None:
        """No path, no method: not found."""
        self.access.check_site(self.request.headers, self.request.method not in ("GET", "HEAD", "OPTIONS"))
        raise NotFound
