"""A fast and safe HTTP/1.1 server for Tornado applications.

It parses with httptools (llhttp, strict) on asyncio or uvloop transports, and drives any
`tornado.web.Application`, or other `HTTPServerConnectionDelegate`, through Tornado's
public interfaces: handlers, streamed bodies, websockets work unchanged. Beside that it
has a cheap path for applications that answer in bytes; see `http1.request`.

In reading order: `keypool.config.limits` (what a peer may cost), `responses`, `peer`, `request` (the raw
path), `exchange` (Tornado's path), `link` (writing and ending), `rules` and `reader`
(parsing), `intake` (how much at a time), `connection` (one after the other), `stream`
(handing the socket over), `awake` (for quick callers), `server`.

It does not check who may be reached under which Host, compress, log accesses, or speak
HTTP/2: the first two are the application's business, the last a proxy's.
"""

from keypool.config.limits import Limits
from keypool.http.http1.peer import Peer
from keypool.http.http1.request import ANSWERED, RawApplication, RawDelegate, Request
from keypool.http.http1.responses import OnRefused, Refusal, date_line
from keypool.http.http1.server import Server

__all__ = [
    "ANSWERED",
    "Limits",
    "OnRefused",
    "Peer",
    "RawApplication",
    "RawDelegate",
    "Refusal",
    "Request",
    "Server",
    "date_line",
]
