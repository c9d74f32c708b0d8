"""Signing in and out. The only forms of the dashboard; both are plain HTML and need no script.

A form of another site can't sign anybody in or out: the Origin that browsers send with a form must be this
server's (Access.check_site, Tornado's cross_origin_protection), and signing out wants the session's proof.
"""

from __future__ import annotations

import time
from urllib.parse import urlsplit

from keypool.errors import CrossSite, Forbidden, TooManySignIns, Unauthorized
from keypool.handlers.dashboard import DashboardHandler
from keypool.handlers.problems import problem_headers
from keypool.operations import Call, audit
from keypool.session import COOKIE, LIFE, Session


class SignIn(DashboardHandler):
    """/login: a token once, a cookie from then on."""

    allowed = ("GET", "HEAD", "POST", "OPTIONS")
    public = True

    def get(self, *args: str) -> None:
        """The form; on to the page that was wanted if there is nothing to sign in for."""
        wanted = own_path(self.get_query_argument("next", "/"))
        if self.session is not None:
            self.redirect(wanted, status=303)
            return
        self._form(wanted, None)

    def post(self, *args: str) -> None:
        """Try a token."""
        wanted = own_path(self.get_body_argument("next", "/"))
        if self.access.open:
            self.redirect(wanted, status=303)
            return
        address, now = self.request.remote_ip or "?", time.monotonic()
        throttle = self.dashboard.throttle
        try:
            throttle.check(address, now)
            session, cookie = self.dashboard.sessions.sign_in(self.get_body_argument("token", ""))
        except TooManySignIns as error:
            self._refused(wanted, error, 429)
            return
        except Unauthorized:
            throttle.wrong(address, now)
            self._refused(wanted, Unauthorized("this token is not known to the server"), 401)
            return
        except Forbidden as error:
            self._refused(wanted, error, 403)
            return
        audit(Call(session.caller, address, self.request_id), "sign-in", [])
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
        """Ask: a link must not sign anybody out."""
        self.show("logout.html", page="logout", title="Sign out")

    def post(self, *args: str) -> None:
        """Sign out."""
        session: Session | None = self.session
        if session is not None and session.id is not None:
            if not self.dashboard.sessions.proven(session, self.get_body_argument("xsrf", "")):
                raise CrossSite("this form is not of this session's pages: load the page again")
            self.dashboard.sessions.end(session)
        self.clear_cookie(COOKIE, path="/")
        self.redirect("/login", status=303)


def own_path(wanted: str) -> str:
    """A path of this server, to go on to; `/` for anything that leads elsewhere."""
    parts = urlsplit(wanted)
    if parts.scheme or parts.netloc or not wanted.startswith("/") or wanted.startswith(("//", "/\\")):
        return "/"
    if not wanted.isprintable() or parts.path in ("/login", "/logout"):
        return "/"
    return wanted
