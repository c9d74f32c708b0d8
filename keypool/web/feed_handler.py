"""The websocket of a pool's feed.

Before the upgrade the request gets the same checks and errors as a page. A page of another site can't open it
with a session's cookie: browsers send an Origin with every websocket handshake, which must be this server's.
"""

from __future__ import annotations

from asyncio import Future
from collections.abc import Awaitable, Callable
from typing import Any

from tornado.iostream import StreamClosedError
from tornado.websocket import (
    WebSocketClosedError,
    WebSocketHandler,
    WebSocketProtocol,
    WebSocketProtocol13,
)

from keypool.core.errors import BadRequest, TooManyViewers, UpgradeRequired
from keypool.web.feed import Feed
from keypool.web.pages import PageHandler
from keypool.web.session import Session

_PROTOCOL_ERROR, _INVALID_PAYLOAD = 1002, 1007
_MASKED, _TEXT, _CLOSE = 0x80, 0x1, 0x8


class StrictProtocol(WebSocketProtocol13):
    """Tornado's websocket, as strict as RFC 6455 about what a viewer sends.

    Tornado accepts unmasked frames, echoes any close code, and drops the connection without a close code at a malformed
    frame. It has no public hooks for that, so this overrides private methods; tests notice if Tornado renames them.
    """

    _at_header = False

    async def _receive_frame(self) -> None:
        self._at_header = True
        await super()._receive_frame()

    async def _read_bytes(self, n: int) -> bytes:
        data = await super()._read_bytes(n)
        if self._at_header:  # the first two bytes of a frame
            self._at_header = False
            if not data[1] & _MASKED:
                self._abort()
                raise StreamClosedError
        return data

    def _handle_message(self, opcode: int, data: bytes) -> Future[None] | None:
        code = _fault(opcode, data)
        if code is None:
            return super()._handle_message(opcode, data)
        self.close(code)
        self._abort()
        return None

    def _abort(self) -> None:
        # Tornado also aborts when the stream is closed or a close code was sent; only a malformed frame needs a code.
        if self.stream is not None:
            self.close(_PROTOCOL_ERROR)
        super()._abort()


def _fault(opcode: int, data: bytes) -> int | None:
    """The close code for an invalid message or control frame, None if it is valid."""
    if opcode == _CLOSE and data:
        code = int.from_bytes(data[:2]) if len(data) > 1 else 0
        if not ((1000 <= code <= 1014 and code not in (1004, 1005, 1006)) or (3000 <= code <= 4999)):
            return _PROTOCOL_ERROR
    if opcode in (_TEXT, _CLOSE):
        try:
            data[2 if opcode == _CLOSE else 0 :].decode()
        except UnicodeDecodeError:
            return _INVALID_PAYLOAD
    return None


class FeedHandler(PageHandler, WebSocketHandler):
    """/api/v1/feed, and that of another pool: a Viewer of the feed."""

    session: Session
    parts: dict[str, bool]
    feed: Feed | None = None  # until its handshake is accepted

    def check(self) -> None:
        super().check()
        if self.request.method == "OPTIONS":
            return
        headers = self.request.headers
        self.session = self.dashboard.sessions.of(headers)
        if self.request.method != "GET" or headers.get("Upgrade", "").lower() != "websocket":
            raise UpgradeRequired
        if headers.get("Sec-WebSocket-Version") != "13" or self.request.version == "HTTP/1.0":
            raise UpgradeRequired
        connection = [word.strip().lower() for word in headers.get("Connection", "").split(",")]
        if "upgrade" not in connection or not headers.get("Sec-WebSocket-Key"):
            raise BadRequest("a websocket handshake has Connection: Upgrade and a Sec-WebSocket-Key")
        self.parts = {name: self._wanted(name) for name in ("history", "events")}
        self.choose_pool(self.session.caller)
        feed = self.feed = self.dashboard.view(self.engine).feed
        feed.require_room()

    def _wanted(self, name: str) -> bool:
        """Whether a part of the frames is wanted: yes, unless the query says no."""
        value = self.get_query_argument(name, "yes")
        if value not in ("yes", "no"):
            raise BadRequest(f"{name} takes yes, no")
        return value == "yes"

    def get_websocket_protocol(self) -> WebSocketProtocol:
        protocol = super().get_websocket_protocol()
        assert isinstance(protocol, WebSocketProtocol13)
        return StrictProtocol(self, False, protocol.params)

    def check_origin(self, origin: str) -> bool:
        return True  # `check` has verified it

    def _check_cross_origin(self, check: Callable[[str], bool]) -> str | None:
        # Private to Tornado: it would refuse clients without an Origin by Sec-Fetch-Site, but these aren't browsers.
        return None

    async def get(self, *args: Any, **kwargs: Any) -> None:
        self.set_header("Cache-Control", "no-store")
        self.set_header("X-Request-Id", self.request_id)
        await WebSocketHandler.get(self, *args, **kwargs)

    async def open(self, *args: str, **kwargs: str) -> None:
        """After the upgrade the connection counts as a viewer and no longer as a request in flight."""
        self._leave()
        self.set_nodelay(True)
        assert self.feed is not None  # `check` has set it
        try:
            await self.feed.join(self, **self.parts)
        except TooManyViewers as error:  # two handshakes for the last seat
            self.close(1013, error.code)

    def on_message(self, message: str | bytes) -> None:
        """Messages from viewers are ignored."""

    def on_close(self) -> None:
        if self.feed is not None:
            self.feed.part(self)

    def on_connection_close(self) -> None:
        self._leave()
        WebSocketHandler.on_connection_close(self)

    # -- what the feed calls

    def send(self, frame: bytes) -> Awaitable[None]:
        try:
            return self.write_message(frame)
        except WebSocketClosedError:
            return self._gone()

    async def _gone(self) -> None:
        raise WebSocketClosedError

    def leave(self, code: int, reason: str) -> None:
        self.close(code, reason)

    def signed_in(self) -> bool:
        return self.dashboard.sessions.alive(self.session)
