"""The API as bytes: its calls past every object of Tornado's, for the server of http1.

The same `ApiCall` as on Tornado's server (api.py); what differs is how a head is read and a reply written. A
request that is refused by its head is answered at once: the server reads its body and throws it away.
"""

from __future__ import annotations

from functools import lru_cache
from http import HTTPStatus

from keypool.api.dispatch import Dispatcher, Reply, too_large
from keypool.api.operations import BASE
from keypool.config.limits import REMEMBERED_NAME
from keypool.http.api_call import ApiCall
from keypool.http.http1 import ANSWERED, RawDelegate, Request
from keypool.http.http1.responses import Headers, http_date
from keypool.http.inflight import InFlight

_API = b"/api"
_FEED = f"{BASE}/feed".encode()
_ENDS = (b"", b"/", b"?")


class RawHead:
    """A request's head as the dispatcher reads it."""

    __slots__ = ("_raw", "method", "path", "query", "remote_ip", "uri")

    def __init__(self, method: bytes, target: bytes, headers: Headers, remote_ip: str | None) -> None:
        self._raw = headers
        self.method = method.decode("latin-1")
        self.uri = target.decode("latin-1")
        self.path, _, self.query = self.uri.partition("?")
        self.remote_ip = remote_ip

    @property
    def headers(self) -> dict[str, str]:
        """By name, as Tornado writes names and joins what is repeated. O(headers): made each time."""
        made: dict[str, str] = {}
        for raw, value in self._raw:
            name, text = _name(raw), value.decode("latin-1")
            made[name] = f"{made[name]},{text}" if name in made else text
        return made


class RawApi:
    """Takes the requests of the API, and leaves all others to Tornado.

    Clients send the same headers with each request. So what the dispatcher knows of them is noted where the
    server remembers them.
    """

    def __init__(self, dispatcher: Dispatcher, in_flight: InFlight) -> None:
        self.dispatcher = dispatcher
        self.in_flight = in_flight

    def start(self, request: Request) -> RawDelegate | None:
        """See `http1.RawApplication`."""
        target = request.target
        if not target.startswith(_API) or target.startswith(_FEED) or target[4:5] not in _ENDS:
            return None
        call = RawCall(self, request)
        if call.error is None:
            return call
        call.refuse()
        return ANSWERED if request.answered else call


class RawCall(RawHead, ApiCall, RawDelegate):
    """One request of the API on the fast server."""

    def __init__(self, api: RawApi, request: Request) -> None:
        peer, section = request.peer, request.section
        address = None if peer is None else peer.remote_ip
        RawHead.__init__(self, request.method, request.target, section.lines, address)
        ApiCall.__init__(self, api.dispatcher, api.in_flight)
        self._request = request
        self.turns = request.turns
        if section.noted_by is not api:
            section.noted_by, section.note = api, api.dispatcher.learn(self.headers)
        self.begin(self, section.note)  # type: ignore[arg-type]

    def body(self, body: bytes) -> None:
        """The request is whole: run its call."""
        self.run(self, body)

    def too_large(self) -> None:
        """Its body is more than is read."""
        if self.error is None:
            self.error = too_large()
        self.refuse()

    def closed(self) -> None:
        """The caller is gone."""
        self.hung_up()

    def send(self, reply: Reply) -> bool:
        """Write the reply."""
        return self._request.respond(wire(reply), close=reply.closes)


def wire(reply: Reply) -> bytes:
    """A whole reply as bytes, without what the server says about the connection."""
    own = "".join([f"{name}: {value}\r\n" for name, value in reply.own_headers]) if reply.own_headers else ""
    length = "" if reply.status == 204 else f"Content-Length: {len(reply.body)}\r\n"
    head = (
        f"{_start(reply.status, reply.content_type)}{own}Cache-Control: no-store\r\n"
        f"X-Request-Id: {reply.request_id}\r\nDate: {http_date()}\r\n{length}\r\n"
    )
    return head.encode("latin-1") + reply.body


@lru_cache(maxsize=64)
def _start(status: int, content_type: str) -> str:
    kind = f"Content-Type: {content_type}\r\n" if content_type else ""
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{kind}"


def _name(raw: bytes) -> str:
    """A name as Tornado writes it: Content-Type."""
    return _known_name(raw) if len(raw) <= REMEMBERED_NAME else _written(raw)


def _written(raw: bytes) -> str:
    return "-".join(part.capitalize() for part in raw.decode("latin-1").split("-"))


_known_name = lru_cache(maxsize=1024)(_written)
