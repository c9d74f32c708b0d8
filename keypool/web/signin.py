"""Sign-in and sign-out: the dashboard's only forms, in plain HTML without scripts.

A form of another site can't sign anybody in or out: the Origin that browsers send with a form must be this
server's (Access.check_site, Tornado's cross_origin_protection), and a sign-out needs the session's XSRF
value.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from keypool.api.calls import Call, write_audit
from keypool.api.problems import problem_headers
from keypool.api.wrong_tokens import LONGEST
from keypool.core.errors import (
    CrossSite,
    Forbidden,
    StorageUnavailable,
    TooManySignIns,
    Unauthorized,
    WrongToken,
)
from keypool.web.handlers import DashboardHandler
from keypool.web.session import COOKIE, LIFE, Session


class SignIn(DashboardHandler):
    """/login: checks a token and sets the session's cookie."""

    allowed = ("GET", "HEAD", "POST", "OPTIONS")
    public = True

    def get(self, *args: str) -> None:
        """The form, or a redirect if there is a session already."""
        wanted = own_path(self.get_query_argument("next", "/"))
        if self.session is not None:
            self.redirect(wanted, status=303)
            return
        self._form(wanted, None)

    async def post(self, *args: str) -> None:
        """Check a token. A valid one is always accepted; the answer to a wrong one may be delayed."""
        wanted = own_path(self.get_body_argument("next", "/"))
        if self.access.open:
            self.redirect(wanted, status=303)
            return
        token = self.get_body_argument("token", "")
        address, wrong_tokens = self.request.remote_ip or "?", self.dispatcher.wrong_tokens
        try:
            session, cookie = self.dashboard.sessions.sign_in(token)
        except WrongToken as error:
            wait = wrong_tokens.sign_in(error.mark, address, self.request_id)
            await self.hold_back(min(wait, LONGEST))
            if wait:
                self._refused(wanted, TooManySignIns(wait), 429)
            else:
                self._refused(wanted, error, 401)
            return
        except Forbidden as error:
            wrong_tokens.refused_sign_in(self.access.identify(f"Bearer {token}"), address, self.request_id)
            self._refused(wanted, error, 403)
            return
        write_audit(Call(session.caller, address, self.request_id), "sign-in", [])
        self._set_session(cookie)
        self.redirect(wanted, status=303)

    def _refused(self, wanted: str, error: Unauthorized | Forbidden | TooManySignIns, status: int) -> None:
        if not self.wants_page:
            self.refuse(error)
            return
        self.set_status(status)
        for name, value in problem_headers(error):
            self.set_header(name, value)
        self._form(wanted, error.detail)

    def _form(self, wanted: str, wrong: str | None) -> None:
        self.show("login.html", next=wanted, wrong=wrong)

    def _set_session(self, cookie: str) -> None:
        secure = self.request.protocol == "https"
        self.set_cookie(
            COOKIE, cookie, max_age=int(LIFE), path="/", httponly=True, samesite="Strict", secure=secure
        )


class SignOut(DashboardHandler):
    """/logout: ends the session here and in the browser."""

    allowed = ("GET", "HEAD", "POST", "OPTIONS")

    def get(self, *args: str) -> None:
        """A confirmation form, since a link must not sign a user out."""
        self.show("logout.html", page="logout", title="Sign out")

    async def post(self, *args: str) -> None:
        """Sign out: at once at this server, and at others within a second or two."""
        session: Session | None = self.session
        if session is not None and session.id is not None:
            if not self.dashboard.sessions.proven(session, self.get_body_argument("xsrf", "")):
                raise CrossSite("this form is not from this session's pages: reload the page")
            await self._end(session)
        self.clear_cookie(COOKIE, path="/")
        self.redirect("/login", status=303)

    async def _end(self, session: Session) -> None:
        sessions, outcome = self.dashboard.sessions, "ok"
        sessions.end(session)
        try:
            await sessions.share(self.engine)
        except StorageUnavailable as error:
            outcome = error.code  # the dashboard's ticker stores it once storage is back
        write_audit(
            Call(session.caller, self.request.remote_ip or "?", self.request_id), "sign-out", [], outcome
        )


def own_path(wanted: str) -> str:
    """The path to redirect to after the sign-in; `/` for anything that leads to another site."""
    parts = urlsplit(wanted)
    if parts.scheme or parts.netloc or not wanted.startswith("/") or wanted.startswith(("//", "/\\")):
        return "/"
    if not wanted.isprintable() or parts.path in ("/login", "/logout"):
        return "/"
    return wanted
