"""Calls of the API on the fast server, read and written as bytes, without any of Tornado's objects.

A request that is refused for its head is answered at once; the server then reads and discards its body.
"""

from __future__ import annotations

import re
from functools import lru_cache
from http import HTTPStatus
from time import monotonic, time

import msgspec

from keypool.api.calls import BASE
from keypool.api.decoding import too_large
from keypool.api.dispatch import CachedChecks, Dispatcher, Reply
from keypool.config.limits import REMEMBERED_NAME
from keypool.http.api_call import ApiCall, InFlight
from keypool.http.http1 import ANSWERED, RawDelegate, Request
from keypool.http.http1.responses import Headers, date_at

_API = b"/api"
_KEYS = f"{BASE}/keys".encode()
_FEED = re.compile(rf"{re.escape(BASE)}(?:/pools/[^/?]+)?/feed(?:\?|$)".encode())
_ENDS = (b"", b"/", b"?")


class Head(msgspec.Struct, gc=False):
    """A request's head as the dispatcher reads it."""

    method: str
    path: str
    query: str
    uri: str
    remote_ip: str | None
    lines: Headers

    @property
    def headers(self) -> dict[str, str]:
        """By name, with names spelt and repeated headers joined as by Tornado. Built on each access: O(headers)."""
        made: dict[str, str] = {}
        for raw, value in self.lines:
            name, text = _name(raw), value.decode("latin-1")
            made[name] = f"{made[name]},{text}" if name in made else text
        return made


def head_of(method: bytes, target: bytes, lines: Headers, remote_ip: str | None) -> Head:
    """A head from the bytes of its parts."""
    uri = target.decode("latin-1")
    path, _, query = uri.partition("?")
    return Head(method.decode("latin-1"), path, query, uri, remote_ip, lines)


class FastApi:
    """Takes the requests of the API, and leaves all others to Tornado.

    Clients send the same headers with each request, so the result of the checks that need only the headers is cached
    with the header section (http1/section.py). An Idempotency-Key is not part of the section.
    """

    def __init__(self, dispatcher: Dispatcher, in_flight: InFlight) -> None:
        self.dispatcher = dispatcher
        self.in_flight = in_flight

    def start(self, request: Request) -> RawDelegate | None:
        """See `http1.RawApplication`."""
        target = request.target
        if not target.startswith(_KEYS):  # as most do
            if not target.startswith(_API) or target[4:5] not in _ENDS:
                return None
            # `find`, because `in` takes bytes for a number first, and drops the exception: half as long again.
            if target.find(b"/feed") > 0 and _FEED.match(target):
                return None
        call = FastCall(self, request)
        if call.pending.error is None:
            if request.body is not None and not request.received:
                request.set_max_body_size(call.pending.max_body)
            return call
        call.refuse()
        return ANSWERED if request.answered else call


class FastCall(ApiCall, RawDelegate):
    """One request of the API on the fast server."""

    __slots__ = ("_request",)

    def __init__(self, api: FastApi, request: Request) -> None:
        connection, section = request.connection, request.section
        assert connection is not None  # requests are started only while the peer is connected
        self._request = request
        self._waiting, self._ended = None, False
        self.dispatcher, self.in_flight = api.dispatcher, api.in_flight
        self.turns = connection.server.turns
        peer = connection.peer
        if peer.proxies is not None:
            peer = peer.caller(section.lines)
        head = self.request = head_of(request.method, request.target, section.lines, peer.remote_ip)
        self.started = monotonic()
        self.in_flight.count += 1
        if section.cache_owner is not api:
            section.cache_owner, section.app_cache = api, api.dispatcher.cacheable_checks(head.headers)
        cached: CachedChecks | None = section.app_cache  # type: ignore[assignment]
        varying = request.varying
        self.pending = api.dispatcher.check(
            head, cached, None if varying is None else varying.decode("ascii")
        )

    def too_large(self) -> None:
        """Refuse the request: its body is over the limit."""
        if self.pending.error is None:
            self.pending.error = too_large(self.pending.max_body)
        self.refuse()

    def send(self, reply: Reply) -> bool:
        """See `ApiCall.send`."""
        request = self._request
        connection = request.connection
        if connection is None:
            return False
        connection.answer(request, wire(reply), reply.last)
        return True


def wire(reply: Reply) -> bytes:
    """A whole reply as bytes, without a `Connection` header, which the server adds where it is due."""
    own = "".join([f"{name}: {value}\r\n" for name, value in reply.own_headers]) if reply.own_headers else ""
    length = "" if reply.status == 204 else f"Content-Length: {len(reply.body)}\r\n"
    start = _start(reply.status, reply.content_type, int(time()))
    return f"{start}{own}X-Request-Id: {reply.request_id}\r\n{length}\r\n".encode("latin-1") + reply.body


@lru_cache(maxsize=64)
def _start(status: int, content_type: str, second: int) -> str:
    """The lines that all replies of a kind have in a second since the epoch."""
    kind = f"Content-Type: {content_type}\r\n" if content_type else ""
    return (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nDate: {date_at(second)}\r\n{kind}"
        "Cache-Control: no-store\r\n"
    )


def _name(raw: bytes) -> str:
    # A stranger's long names must not fill the cache.
    return _known_name(raw) if len(raw) <= REMEMBERED_NAME else _capitalised(raw)


def _capitalised(raw: bytes) -> str:
    """A header's name as Tornado spells it: Content-Type."""
    return "-".join(part.capitalize() for part in raw.decode("latin-1").split("-"))


_known_name = lru_cache(maxsize=1024)(_capitalised)
