"""The API as bytes: its calls past every object of Tornado's, for the server of http1.

The same `ApiCall` as on Tornado's server (api.py); what differs is how a head is read and a reply written. A
request that is refused by its head is answered at once: the server reads its body and throws it away.
"""

from __future__ import annotations

from functools import lru_cache
from http import HTTPStatus

from keypool.handlers.api import ApiCall
from keypool.handlers.dispatch import Dispatcher, Reply, too_large
from keypool.handlers.inflight import InFlight
from keypool.http1 import ANSWERED, RawDelegate, Request, date_line
from keypool.http1.responses import Headers

_API = b"/api"
_FEED = b"/api/v1/feed"


class RawHead:
    """A request's head as the dispatcher reads it. Built in about 2 µs."""

    __slots__ = ("headers", "method", "path", "query", "remote_ip", "uri")

    def __init__(self, method: bytes, target: bytes, headers: Headers, remote_ip: str | None) -> None:
        self.method = method.decode("latin-1")
        self.uri = target.decode("latin-1")
        self.path, _, self.query = self.uri.partition("?")
        self.remote_ip = remote_ip
        self.headers: dict[str, str] = {}
        for raw, value in headers:
            name = _name(raw)
            if name in self.headers:  # as Tornado joins what is repeated
                self.headers[name] += "," + value.decode("latin-1")
            else:
                self.headers[name] = value.decode("latin-1")


class RawApi:
    """Takes the requests of the API, and leaves all others to Tornado."""

    def __init__(self, dispatcher: Dispatcher, in_flight: InFlight) -> None:
        self._dispatcher = dispatcher
        self._in_flight = in_flight

    def start(self, request: Request) -> RawDelegate | None:
        """See `http1.RawApplication`."""
        path, _, _ = request.target.partition(b"?")
        if not path.startswith(_API) or path == _FEED or path[len(_API) : len(_API) + 1] not in (b"", b"/"):
            return None
        return RawCall(self._dispatcher, self._in_flight, request).started()


class RawCall(ApiCall, RawDelegate):
    """One request of the API on the fast server."""

    __slots__ = ("_head", "_request")

    def __init__(self, dispatcher: Dispatcher, in_flight: InFlight, request: Request) -> None:
        super().__init__(dispatcher, in_flight)
        self._request = request
        peer = request.peer
        address = None if peer is None else peer.remote_ip
        self._head = RawHead(request.method, request.target, request.headers, address)

    def started(self) -> RawDelegate:
        """Check the head. Returns who takes the body: nobody if the request is refused."""
        self.begin(self._head)
        if self._begun.error is None:
            return self
        self.refuse()
        return ANSWERED

    def body(self, body: bytes) -> None:
        """The request is whole: run its call."""
        self.run(self._head, body)

    def too_large(self) -> None:
        """Its body is more than is read."""
        self._begun.error = too_large()
        self.refuse()

    def closed(self) -> None:
        """The caller is gone."""
        self.end()

    def send(self, reply: Reply) -> bool:
        """Write the reply."""
        if self._request.closed:
            return False
        self._request.respond(wire(reply))
        return True


def wire(reply: Reply) -> bytes:
    """A whole reply as bytes, without what the server says about the connection."""
    lines = [_status_line(reply.status)]
    lines += [f"{name}: {value}\r\n" for name, value in reply.headers]
    length = b"\r\n" if reply.status == 204 else b"Content-Length: %d\r\n\r\n" % len(reply.body)
    return b"".join(("".join(lines).encode("latin-1"), date_line(), length, reply.body))


@lru_cache(maxsize=64)
def _status_line(status: int) -> str:
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"


@lru_cache(maxsize=1024)
def _name(raw: bytes) -> str:
    """A name as Tornado writes it: Content-Type."""
    return "-".join(part.capitalize() for part in raw.decode("latin-1").split("-"))
