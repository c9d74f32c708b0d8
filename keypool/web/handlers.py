"""The dashboard's pages. They only read: their scripts make changes through the API.

Pages are complete without scripts, except for the charts. A browser that isn't signed in is redirected to
/login and back; other clients get 401.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

from msgspec import ValidationError, convert

from keypool.api.auth import Role
from keypool.api.calls import ID, path_of_pool
from keypool.api.curl import call_lines, generate_line, key_lines
from keypool.core.answers import HistoryPage, RareEventRow, Row
from keypool.core.cursor import EventQuery, HistoryQuery, ListQuery
from keypool.core.errors import (
    BadRequest,
    KeypoolError,
    NotFound,
    Unauthorized,
    UnknownKey,
    UnknownPool,
    WrongToken,
)
from keypool.core.events import SILENT, Change, Event
from keypool.core.keys import State, moment
from keypool.core.rare_events import MOST_EVENTS, RARE
from keypool.web.dashboard import HTML, PAGE_HEADERS, Dashboard, at_rest, settings_in_force, whom
from keypool.web.pages import PageHandler
from keypool.web.paging import links, url_of
from keypool.web.pool_view import PoolView
from keypool.web.session import Session

TABS = {
    "all": "All",
    "available": "Available",
    "blocked": "Blocked",
    "cooling": "Cooling",
    "quarantined": "Quarantined",
    "expiring": "Expiring soon",
}
ORDERS = {
    "blocked": ("release", "id", "expiry"),
    "cooling": ("ready", "id", "expiry"),
    "expiring": ("expiry",),
}
"""The orders in which the keys of a tab may be listed, the usual one first; of the other tabs, these:"""
OTHER_ORDERS = ("id", "expiry")
NAME, OWNER = "name:", "owner:"
"""How a search begins that is for names, or for owners, only."""

# Events of the overview, and rows of each of its lists; static/js/pages/overview.js has the same.
SHOWN = 10
SHOWN_DUE = 5
SHOWN_EVENTS = 200
RECENT_EVENTS = 1000  # as many as engines have in memory
SHOWN_LEASES = 10  # of a key
THEMES = ("light", "dark")
WRONG_AFTER = "after is not the next of a page of this list"
Query = TypeVar("Query")


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
            "health": self.dashboard.health(self.view, self.base),
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
        figures = self.dashboard.figures(self.view, self.base, stats)
        self.show(
            "overview.html",
            page="overview",
            title="Overview",
            stats=stats,
            figures=figures,
            health=figures["health"],
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
    """/keys: the table of keys, 50 a page; a POST leads to what somebody looks for."""

    allowed = ("GET", "HEAD", "POST", "OPTIONS")
    of_pool = True

    async def get(self, *args: str) -> None:
        search = self.get_query_argument("q", "")
        if search.startswith(ID) and is_number(search[len(ID) :]):
            self.redirect(f"{self.base}/keys/{int(search[len(ID) :])}", status=303)
            return
        await self._list(self.get_query_argument("tab", "all"), search)

    async def post(self, *args: str) -> None:
        """Find a key by what an operator has of it, which may be the whole key: so it stands in no URL, and no answer.

        Scripts get the URL as JSON, null if nothing fits.
        """
        tab = self.get_body_argument("tab", "all")
        url = await self._place_of(tab, self.get_body_argument("q", ""))
        if not self.wants_page:
            self.answer({"url": url})
        elif url is not None:
            self.redirect(url, status=303)
        else:
            self.set_status(404)
            await self._list(tab, missed=True)

    async def _list(self, tab: str, search: str = "", *, missed: bool = False) -> None:
        owner, after = self.get_query_argument("owner", ""), self.get_query_argument("after", "") or None
        if tab not in TABS:
            raise BadRequest(f"tab takes {', '.join(TABS)}")
        orders = () if search or owner else ORDERS.get(tab, OTHER_ORDERS)
        sort = self.get_query_argument("sort", "") or (orders[0] if orders else "")
        if orders and sort not in orders:
            raise BadRequest(f"sort takes {', '.join(orders)} here")
        rows: list[Row] = []
        asked: dict[str, str] = {}
        following = wrong = None
        try:
            asked = list_query(tab, search, owner, sort)
            found = await self.engine.page(checked({**asked, "after": after, "limit": 50}))
            rows, following = found.keys, found.next
        except BadRequest as error:
            if not self.wants_page:
                raise
            wrong = error.detail
            self.set_status(400)
        if tab == "expiring":
            soon = self.view.window
            shown = [row for row in rows if row.expires_in is not None and row.expires_in <= soon]
            rows, following = shown, following if len(shown) == len(rows) else None
        path, of_tab = f"{self.base}/keys", {} if tab == "all" else {"tab": tab}
        chosen = "" if not orders or sort == orders[0] else sort
        query = of_tab | {"q": search, "owner": owner, "sort": chosen}
        self.show(
            "keys.html",
            page="keys",
            title="Keys",
            tab=tab,
            tabs=TABS,
            search="" if wrong else search,  # what is wrong may be a whole key
            owner=owner,
            sort=sort,
            sorts={each: url_of(path, of_tab | {"sort": each}) for each in orders},
            tab_url=url_of(path, of_tab),
            after=after,
            rows=rows,
            wrong=wrong,
            missed=missed,
            asked=urlencode(asked),
            expiring=self.view.expiring,
            within=self.view.window,
            nothing="wrong" if wrong else nothing_for(tab, search, owner, after),
            links=links(path, query, after, self.get_query_argument("back", ""), following),
            stats=await self.engine.stats(),
        )

    async def _place_of(self, tab: str, text: str) -> str | None:
        """The URL of a key, or of the list of keys, that this text stands for; None if nothing fits."""
        path, of_tab = f"{self.base}/keys", {} if tab == "all" else {"tab": tab}
        if text.startswith(OWNER):
            return url_of(path, {"owner": text.removeprefix(OWNER)})
        if not text or text.startswith(NAME):
            return url_of(path, of_tab | {"q": text})
        number = text.removeprefix(ID)
        if text.startswith(ID) and is_number(number):
            return f"{path}/{int(number)}"
        with suppress(UnknownKey):
            return f"{path}/{(await self.engine.find(text)).id}"
        if is_number(number):
            with suppress(UnknownKey):
                return f"{path}/{(await self.engine.get(int(number))).id}"
        for by, query in (("owner", {"owner": text}), ("prefix", {"q": text}), ("name", {"q": NAME + text})):
            with suppress(BadRequest):
                found = await self.engine.page(checked({by: text, "limit": 1}))
                if found.keys or found.next:
                    return url_of(path, query if by == "owner" else of_tab | query)
        return None


def is_number(text: str) -> bool:
    """Whether this may be an id."""
    return text.isascii() and text.isdigit() and len(text) < 19


def nothing_for(tab: str, search: str, owner: str, after: str | None) -> str:
    """Which of the page's texts says that a list has no keys."""
    if after is not None:
        return "page"
    return "search" if search else "owner" if owner else "page" if tab == "all" else tab


def list_query(tab: str, search: str, owner: str, sort: str) -> dict[str, str]:
    """The API's query for what a list shows. Raises BadRequest."""
    asked = {"state": tab} if tab in list(State) else {}
    if owner:
        asked["owner"] = owner
    elif search.startswith(NAME):
        asked["name"] = search.removeprefix(NAME)
    elif search:
        asked["prefix"] = search
    else:
        asked["order"] = sort
    checked(asked)
    return asked


def query_of(kind: type[Query], asked: Mapping[str, Any], wrong: str = WRONG_AFTER) -> Query:
    """An engine's query for what a page's URL asks for. Raises BadRequest, which says what is `wrong`."""
    try:
        return convert(asked, kind)
    except ValidationError:
        raise BadRequest(wrong) from None


def checked(asked: Mapping[str, Any]) -> ListQuery:
    """The query of a list of keys. Raises BadRequest."""
    return query_of(
        ListQuery,
        asked,
        "a list by q takes the first 1 to 4 characters of a generated key, id:42, or name: and the beginning of a "
        "name; the search field takes also a whole key, a hint or an owner",
    )


class KeyPanel(DashboardHandler):
    """/keys/ID: one key without its text, and who had it; with `?part` only its panel, for a dialog."""

    of_pool = True

    async def get(self, *args: str) -> None:
        key_id = int(args[1][:18])
        await self.engine.stats()  # the Valkey engine fetches events together with stats
        events = self.engine.recent(20, key_id)[::-1]
        part = self.get_query_argument("part", None) is not None
        after = self.get_query_argument("after", "") or None
        try:
            row = await self.engine.get(key_id)
        except UnknownKey:
            if not (part or self.wants_page):
                raise
            row = None
            self.set_status(404)
        past = await self._past(key_id, after)
        names = ("get", "unblock", "keepalive", "quarantine", "restore", "delete", "reveal")
        template = "key_part.html" if part else "key.html"
        self.show(
            template,
            page="keys",
            module="key",
            title=f"Key {key_id}",
            id=key_id,
            row=row,
            past=past.history,
            longest=max((lease.held for lease in past.history), default=0),
            after=after,
            older=past.next,
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

    async def _past(self, key_id: int, after: str | None) -> HistoryPage:
        """Leases of the key that have ended, the latest first. Raises BadRequest."""
        asked = {"after": after, "limit": SHOWN_LEASES}
        query = query_of(HistoryQuery, asked, "after takes the end of a link to older leases")
        try:
            return await self.engine.history(key_id, query)
        except UnknownKey:
            return HistoryPage([], None)


class Events(DashboardHandler):
    """/events: the latest events, newest first, or the rare ones, which are kept; a POST leads to those with a text."""

    allowed = ("GET", "HEAD", "POST", "OPTIONS")
    of_pool = True

    async def get(self, *args: str) -> None:
        kind, search = self.get_query_argument("kind", ""), self.get_query_argument("q", "")
        after = self.get_query_argument("after", "") or None
        await self._list(kind, search, after, *await self._found(kind, search, after))

    async def post(self, *args: str) -> None:
        """Search for a text, which may be a whole key by mistake: it gets into a URL only if an event has it."""
        kind, search = self.get_body_argument("kind", ""), self.get_body_argument("q", "")
        events, following = await self._found(kind, search, None)
        if events:
            self.redirect(url_of(f"{self.base}/events", {"kind": kind, "q": search}), status=303)
        else:
            await self._list(kind, "", None, events, following)

    async def _found(self, kind: str, search: str, after: str | None) -> tuple[list[AnyEvent], str | None]:
        """The events of a kind that have this text, and the cursor of the next page. O(1,000)."""
        if kind and kind not in EVENT_KINDS:
            raise BadRequest(f"kind takes {', '.join(EVENT_KINDS)}")
        if kind not in KEPT_KINDS:
            await self.engine.stats()  # as in KeyPanel
            latest = self.engine.recent(RECENT_EVENTS if kind or search else SHOWN_EVENTS)
            events = [event for event in reversed(latest) if event.event == (kind or event.event)]
            return matching(events, search), None
        only = None if kind == RARE_KIND else kind
        if not search:
            page = await self.engine.rare_events(rare_query(only, SHOWN_EVENTS, after))
            return list(page.events), page.next
        found: list[AnyEvent] = []
        cursor: str | None = None
        while len(found) < MOST_EVENTS:
            page = await self.engine.rare_events(rare_query(only, 500, cursor))
            found += page.events
            if (cursor := page.next) is None:
                break
        return matching(found, search), None

    async def _list(
        self, kind: str, search: str, after: str | None, events: list[AnyEvent], following: str | None
    ) -> None:
        path, back = f"{self.base}/events", self.get_query_argument("back", "")
        self.show(
            "events.html",
            page="events",
            title="Events",
            kind=kind,
            kinds=EVENT_KINDS,
            kept=kind in KEPT_KINDS,
            search=search,
            after=after,
            events=events,
            links=links(path, {"kind": kind, "q": search}, after, back, following),
        )


AnyEvent = Event | RareEventRow
RARE_KIND = "rare"
"""The rare events of all kinds."""
EVENT_KINDS = (RARE_KIND, *(change.value for change in Change if change not in SILENT))
KEPT_KINDS = frozenset({RARE_KIND, *RARE}) - {Change.UNBLOCKED}
"""The kinds that are listed from the rare events. Of the unblocks only an operator's are among them."""


def rare_query(kind: str | None, limit: int, after: str | None) -> EventQuery:
    """A query for rare events. Raises BadRequest."""
    return query_of(EventQuery, {"kind": kind, "limit": limit, "after": after})


def matching(events: Sequence[AnyEvent], search: str) -> list[AnyEvent]:
    """The first events that have this text in what is shown of them. The same as fits() in js/pages/events.js."""
    text = search.strip().lower()
    found = (event for event in events if not text or text in words_of(event).lower())
    return list(islice(found, SHOWN_EVENTS))


def words_of(event: AnyEvent) -> str:
    """What an event can be searched by."""
    return f"{event.id} {event.hint} {whom(event)} {event.owner or ''}"


class System(DashboardHandler):
    """/system: version, settings, and how the server is doing."""

    async def get(self, *args: str) -> None:
        stats = await self.engine.stats()
        self.show(
            "system.html",
            page="system",
            title="System",
            stats=stats,
            figures=self.dashboard.figures(self.view, self.base, stats),
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
        view = self.view
        try:
            stats = await self.engine.stats()
        except KeypoolError:  # storage is down, which is among the figures
            if view.stats is None:
                raise
            stats = view.stats
        body: dict[str, Any] = self.dashboard.figures(view, self.base, stats)
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
