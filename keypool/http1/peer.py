"""Who is at the other end: address, protocol, and what a proxy says about them.

Tornado hands `connection.context` to every `HTTPServerRequest`, which takes
`remote_ip` and `protocol` from it. The rules are those of
`tornado.httpserver`, but where Tornado rewrites one object before each request
and restores it afterwards, a forwarded request gets an object of its own here: a
late reader can never see another request's address.

It does not decide whether a proxy is to be believed: that is `xheaders`.
"""

from __future__ import annotations

import socket
from collections.abc import Collection

from tornado import netutil

from keypool.http1.responses import Headers


class Peer:
    """The other end of a connection, or of one forwarded request.

    `address` is the socket address as the operating system gives it, `remote_ip`
    an IP address as text (`0.0.0.0` for a Unix socket), `protocol` http or https.
    """

    __slots__ = ("address", "address_family", "protocol", "remote_ip")

    def __init__(self, address: object, family: int, protocol: str) -> None:
        self.address = address
        self.address_family = family
        self.remote_ip = "0.0.0.0"  # noqa: S104 - what Tornado says of a Unix socket
        if family in (socket.AF_INET, socket.AF_INET6) and isinstance(address, tuple) and address:
            self.remote_ip = str(address[0])
        self.protocol = protocol

    def __str__(self) -> str:
        if self.address_family in (socket.AF_INET, socket.AF_INET6):
            return self.remote_ip
        if isinstance(self.address, bytes):
            return self.address.decode("latin-1")
        return str(self.address)

    def forwarded(self, headers: Headers, trusted: Collection[str]) -> Peer:
        """Return the peer as a proxy's headers name it. O(headers).

        `X-Real-Ip`, else the last address of `X-Forwarded-For` that is not
        `trusted`; `X-Scheme`, else `X-Forwarded-Proto`. Values that are no
        address or scheme change nothing.
        """
        peer = Peer(self.address, self.address_family, self.protocol)
        address = peer.remote_ip
        hops = _value(headers, b"x-forwarded-for") or address
        for address in (hop.strip() for hop in reversed(hops.split(","))):
            if address not in trusted:
                break
        address = _value(headers, b"x-real-ip") or address
        if netutil.is_valid_ip(address):
            peer.remote_ip = address
        scheme = _value(headers, b"x-scheme") or _value(headers, b"x-forwarded-proto") or ""
        scheme = scheme.rpartition(",")[2].strip()
        if scheme in ("http", "https"):
            peer.protocol = scheme
        return peer


def _value(headers: Headers, name: bytes) -> str:
    return b",".join(value for key, value in headers if key == name).decode("latin-1")
