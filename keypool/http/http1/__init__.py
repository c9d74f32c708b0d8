"""A fast and safe HTTP/1.1 server for Tornado applications.

It parses with httptools (llhttp, strict) on asyncio or uvloop transports, and drives any
`HTTPServerConnectionDelegate`, such as `tornado.web.Application`, through Tornado's public interfaces: handlers and
websockets work unchanged. It also has a cheap path for applications that answer in bytes; see `http1.request`.

In reading order: `keypool.config.limits` (what a peer may cost), `responses`, `request` (the raw path), `exchange`
(Tornado's path), `rules`, `section` and `reader` (from bytes to requests), `writer`, `turns` (which connection is
next), `connection` (which has a reader, a writer and a queue), `stream` (handing the socket over), `server`.

It does not check the Host against a list, compress or log accesses, which is left to the application, and has neither
TLS nor HTTP/2, which a proxy can provide.
"""

from keypool.config.limits import Limits
from keypool.http.http1.request import ANSWERED, Peer, RawApplication, RawDelegate, Request
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
