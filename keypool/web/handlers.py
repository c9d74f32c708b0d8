"""The dashboard's pages. They only read: their scripts make changes through the API.

Pages are complete without scripts, except for the charts. A browser that isn't signed in is redirected to
/login and back; other clients get 401.
"""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import quote, urlencode

from msgspec import ValidationError, convert

from keypool.api.auth import Role
from keypool.api.calls import path_of_pool
from keypool.api.curl import call_lines, generate_line, key_lines
from keypool.core.cursor import ListQuery
from keypool.core.errors import (
    BadRequest,
    KeypoolError,
    NotFound,
    Unauthorized,
    UnknownKey,
    UnknownPool,
    WrongToken,
)
from keypool.core.events import SILENT, Change
from keypool.core.keys import State, moment
from keypool.web.dashboard import HTML, PAGE_HEADERS, Dashboard, at_rest, mostly_out, settings_in_force
from keypool.web.pages import PageHandler
from keypool.web.pool_view import PoolView
from keypool.web.session import Session

TABS = {
    "all": ("All", {"order": "id"}),
    "available": ("Available", {"state": "available"}),
    "blocked": ("Blocked", {"order": "release"}),
    "cooling": ("Cooling", {"order": "ready"}),
    "quarantined": ("Quarantined", {"state": "quarantined"}),
    "expiring": ("Expiring soon", {"order": "expiry"}),
}
NAME = "name:"
"""How a search for names begins."""

# Events of the overview, and rows of each of its lists; static/js/pages/overview.js has the same.
SHOWN = 10
SHOWN_DUE = 5
SHOWN_EVENTS = 200
THEMES = ("light", "dark")


class DashboardHandler(PageHandler):
    """Base class of the dashboard's pages: checks the session, and adds what every page shows."""

    public = False
    of_pool = False  # whether the first group of its path is that of a pool, if any
    session: Session | None

    def check(self) -> None:
        """Require a session, except for `public` pages."""
        super().check()
        self.session = None
        try:
            self.session = self.dashboard.sessions.of(self.request.headers)
        except WrongToken:
            raise
        except KeypoolError:
            if not self.public and self.request.method != "OPTIONS":
                raise
        if self.session is not None and self.of_pool:
            self.choose_pool(self.session.caller)
        elif self.session is not None and self.session.caller.pools is not None:
            # What the page keeps live is of a pool that this session may see.
            self.engine = next(map(self.pools.get, self.pool_names()), self.engine)

    def refuse(self, error: KeypoolError) -> None:
        """Redirect a browser that isn't signed in to the sign-in, which leads back."""
        if isinstance(error, Unauthorized) and not isinstance(error, WrongToken) and self.wants_page:
            back = "" if self.request.uri == "/" else f"?next={quote(self.request.uri or '/', safe='')}"
            self.redirect(f"/login{back}", status=303)
            return
        if isinstance(error, UnknownPool) and self.wants_page and self.request.path == "/":
            self.redirect("/pools", status=303)  # this session may not see `default`
            return
        super().refuse(error)

    @property
    def site(self) -> str:
        """The URL of this server as the client knows it, for shell lines."""
        return f"{self.request.protocol}://{self.request.host}"

    @property
    def base(self) -> str:
        """The beginning of the paths of this pool's pages: empty for `default`."""
        return path_of_pool(self.engine.pool_name)

    @property
    def view(self) -> PoolView:
        return self.dashboard.view(self.engine)

    def pool_names(self) -> list[str]:
        """The pools that this session may see, in order."""
        caller = None if self.session is None else self.session.caller
        return [name for name in self.pools.names() if caller is None or caller.may_use(name)]

    @property
    def role(self) -> Role | None:
        return self.session.caller.role if self.session is not None else None

    def show(self, template: str, **facts: Any) -> None:
        """Answer with the page of a template; `facts` are its variables."""
        for name, value in PAGE_HEADERS:
            self.set_header(name, value)
        theme = self.get_cookie("keypool_theme", "")
        engine = self.engine
        common = {
            "pool": engine.pool_name,
            "pool_names": self.pool_names() if self.session else [],
            "pool_draining": engine.pool_draining,
            "rules": engine.rules,
            "base": self.base,
            "home": self.base or "/",
            "theme": theme if theme in THEMES else "",
            "session": self.session,
            "admin": self.role is Role.ADMIN,
            "open": self.access.open,
            "xsrf": self.dashboard.sessions.xsrf(self.session) if self.session else "",
            "generate_line": generate_line(self.site, self.access.open, self.base),
            "now": moment(time.time()),
            "not_ready": self.dashboard.readiness(),
        }
        self._answer(self.dashboard.render(template, **(common | facts)), HTML)


class Overview(DashboardHandler):
    """/, and /pools/NAME: the state of a pool."""

    of_pool = True

    async def get(self, *args: str) -> None:
        stats = await self.engine.stats()
        released = (await self.engine.page(ListQuery(order="release", limit=SHOWN_DUE))).keys
        ready = (await self.engine.page(ListQuery(order="ready", limit=SHOWN_DUE))).keys
        due = [
            left for row in (*released, *ready) if (left := row.release_in or row.available_in) is not None
        ]
        self.show(
            "overview.html",
            page="overview",
            title="Overview",
            stats=stats,
            mostly_out=mostly_out(stats),
            figures=self.dashboard.figures(self.view),
            events=self.engine.recent(SHOWN)[::-1],
            released=released,
            ready=ready,
            due=min(due, default=None),
        )


class PoolList(DashboardHandler):
    """/pools: all pools, with their counts and settings."""

    def get(self, *args: str) -> None:
        rows = [self.pools.row(name) for name in self.pool_names()]
        self.show(
            "pools.html", page="pools", title="Pools", rows=rows, max_pools=self.dashboard.settings.max_pools
        )


class Keys(DashboardHandler):
    """/keys: the table of keys, 50 a page."""

    of_pool = True

    async def get(self, *args: str) -> None:
        tab = self.get_query_argument("tab", "all")
        search = self.get_query_argument("q", "")
        after = self.get_query_argument("after", "") or None
        if tab not in TABS:
            raise BadRequest(f"tab takes {', '.join(TABS)}")
        if search.startswith("id:") and search[3:].isascii() and search[3:].isdigit():
            self.redirect(f"{self.base}/keys/{int(search[3:][:18])}", status=303)
            return
        wrong = None
        rows, following = [], None
        try:
            found = await self.engine.page(list_query(tab, search, after))
            rows, following = found.keys, found.next
        except BadRequest as error:
            if not self.wants_page:
                raise
            wrong = error.detail
            self.set_status(400)
        query = {name: value for name, value in (("tab", tab), ("q", search)) if value and value != "all"}
        self.show(
            "keys.html",
            page="keys",
            title="Keys",
            tab=tab,
            tabs={name: label for name, (label, _) in TABS.items()},
            search=search,
            after=after,
            rows=rows,
            wrong=wrong,
            next_url=None
            if following is None
            else f"{self.base}/keys?" + urlencode(query | {"after": following}),
            next=following,
            stats=await self.engine.stats(),
        )


def list_query(tab: str, search: str, after: str | None) -> ListQuery:
    """The API's query for a tab and a search by prefix. Raises BadRequest."""
    asked = dict(TABS[tab][1])
    if search:
        by = "name" if search.startswith(NAME) else "prefix"
        asked = {by: search.removeprefix(NAME)} | ({"state": tab} if tab in list(State) else {})
    try:
        return convert({**asked, "after": after, "limit": 50}, ListQuery)
    except ValidationError:
        raise BadRequest(
            "search takes the first 1 to 4 characters of a generated key, id:42, or name: and the beginning of a name"
        ) from None


class KeyPanel(DashboardHandler):
    """/keys/ID: one key without its text; with `?part` only its panel, for a dialog."""

    of_pool = True

    async def get(self, *args: str) -> None:
        key_id = int(args[1][:18])
        await self.engine.stats()  # the Valkey engine fetches events together with stats
        events = self.engine.recent(20, key_id)[::-1]
        part = self.get_query_argument("part", None) is not None
        try:
            row = await self.engine.get(key_id)
        except UnknownKey:
            if not (part or self.wants_page):
                raise
            row = None
            self.set_status(404)
        names = ("get", "unblock", "keepalive", "quarantine", "restore", "delete", "reveal")
        template = "key_part.html" if part else "key.html"
        self.show(
            template,
            page="keys",
            module="key",
            title=f"Key {key_id}",
            id=key_id,
            row=row,
            events=events,
            lines=key_lines(
                self.site,
                None if self.access.open else self.role,
                key_id,
                row.lease if row else None,
                names,
                pool=self.base,
            ),
        )


class Events(DashboardHandler):
    """/events: the latest events, newest first."""

    of_pool = True

    async def get(self, *args: str) -> None:
        kind = self.get_query_argument("kind", "")
        kinds = [change.value for change in Change if change not in SILENT]
        if kind and kind not in kinds:
            raise BadRequest(f"kind takes {', '.join(kinds)}")
        await self.engine.stats()  # as in KeyPanel
        latest = self.engine.recent(1000 if kind else SHOWN_EVENTS)
        events = [event for event in latest if not kind or event.event == kind]
        self.show(
            "events.html",
            page="events",
            title="Events",
            kind=kind,
            kinds=kinds,
            events=events[::-1][:SHOWN_EVENTS],
        )


class System(DashboardHandler):
    """/system: version, settings, and how the server is doing."""

    async def get(self, *args: str) -> None:
        self.show(
            "system.html",
            page="system",
            title="System",
            stats=await self.engine.stats(),
            figures=self.dashboard.figures(self.view),
            engine_figures=self.engine.figures(),
            rows=settings_in_force(self.dashboard.settings, self.access),
            at_rest=at_rest(self.dashboard.settings),
        )


class Calls(DashboardHandler):
    """/calls: the API, from the table of operations."""

    def get(self, *args: str) -> None:
        self.show("calls.html", page="calls", title="API", calls=call_lines(self.site, self.access.open))


class Figures(DashboardHandler):
    """/figures: numbers that the feed doesn't send, as JSON; with `?state` also the feed's state, for polling."""

    of_pool = True

    async def get(self, *args: str) -> None:
        body: dict[str, Any] = self.dashboard.figures(self.view)
        if self.get_query_argument("state", None) is not None:
            body["state"] = await self.view.feed.snapshot()
        self.answer(body)


class Static(PageHandler):
    """/static/VERSION/NAME, for anyone: a file of the dashboard. A changed file has a new name, so caches keep it."""

    def get(self, *args: str) -> None:
        version, name = args
        dashboard: Dashboard = self.application.settings["dashboard"]
        asset = dashboard.assets.get(version, name)
        if asset is None:
            raise NotFound
        self.set_header("Content-Type", asset.content_type)
        self.set_header("Cache-Control", "public, max-age=31536000, immutable")
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Vary", "Accept-Encoding")
        if self.takes_gzip:
            self.set_header("Content-Encoding", "gzip")
            self.finish(asset.compressed)
        else:
            self.finish(asset.body)
