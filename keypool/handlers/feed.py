"""The feed's websocket: HTTP up to the handshake, frames after it.

It is a page like the others until it has been upgraded: the same checks, the same problems. A page of another
site can't open it with a session's cookie: browsers send an Origin with every websocket, which must be this
server's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from tornado.websocket import WebSocketClosedError, WebSocketHandler

from keypool.dashboard import Dashboard
from keypool.errors import BadRequest, TooManyViewers, UpgradeRequired
from keypool.handlers.pages import PageHandler
from keypool.session import Session


class FeedHandler(PageHandler, WebSocketHandler):
    """/api/v1/feed: a Viewer of the feed."""

    session: Session

    @property
    def dashboard(self) -> Dashboard:
        """What the dashboard's handlers share."""
        dashboard: Dashboard = self.application.settings["dashboard"]
        return dashboard

    def check(self) -> None:
        """Host, site, method, role, then the handshake."""
        super().check()
        if self.request.method == "OPTIONS":
            return
        headers = self.request.headers
        self.session = self.dashboard.sessions.of(headers)
        if self.request.method != "GET" or headers.get("Upgrade", "").lower() != "websocket":
            raise UpgradeRequired
        if headers.get("Sec-WebSocket-Version") != "13":
            raise UpgradeRequired
        connection = [word.strip().lower() for word in headers.get("Connection", "").split(",")]
        if "upgrade" not in connection or not headers.get("Sec-WebSocket-Key"):
            raise BadRequest("a websocket handshake has Connection: Upgrade and a Sec-WebSocket-Key")
        self.dashboard.feed.require_room()

    def check_origin(self, origin: str) -> bool:
        """`check` has done it."""
        return True

    def _check_cross_origin(self, check: Callable[[str], bool]) -> str | None:
        # Private to Tornado. It refuses, in its own words, the Sec-Fetch-Site of who sends no Origin: no browser.
        return None

    async def get(self, *args: Any, **kwargs: Any) -> None:
        """Shake hands."""
        self.set_header("Cache-Control", "no-store")
        self.set_header("X-Request-Id", self.request_id)
        await WebSocketHandler.get(self, *args, **kwargs)

    async def open(self, *args: str, **kwargs: str) -> None:
        """Upgraded: no request in flight any more, but a viewer."""
        self._leave()
        self.set_nodelay(True)
        try:
            await self.dashboard.feed.join(self)
        except TooManyViewers as error:  # two shook hands for the last place
            self.close(1013, error.code)

    def on_message(self, message: str | bytes) -> None:
        """A viewer has nothing to say."""

    def on_close(self) -> None:
        """The viewer is gone."""
        self.dashboard.feed.part(self)

    def on_connection_close(self) -> None:
        """The connection is gone, before or after the upgrade."""
        self._leave()
        WebSocketHandler.on_connection_close(self)

    # -- what the feed calls

    def send(self, frame: bytes) -> Awaitable[None]:
        """Send a frame; done when it has left this process. A closed socket fails the future."""
        try:
            return self.write_message(frame)
        except WebSocketClosedError:
            return self._gone()

    async def _gone(self) -> None:
        raise WebSocketClosedError

    def leave(self, code: int, reason: str) -> None:
        """Close."""
        self.close(code, reason)

    def signed_in(self) -> bool:
        """Whether the session that opened this socket still holds."""
        return self.dashboard.sessions.alive(self.session)
