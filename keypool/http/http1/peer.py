"""Who is at the other end: address, protocol, and what a trusted proxy says about them.

Tornado hands `connection.context` to every `HTTPServerRequest`, which takes
`remote_ip` and `protocol` from it. Where Tornado rewrites one object before each
request and restores it afterwards, a forwarded request gets an object of its own
here: a late reader can never see another request's address.

It does not decide which proxy is trusted: that is `keypool.config.proxies`.
"""

from __future__ import annotations

import socket

from keypool.config.proxies import TrustedProxies
from keypool.http.http1.responses import Headers


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

    def forwarded(self, headers: Headers, trusted: TrustedProxies) -> Peer:
        """Return the peer as a proxy's headers name it, if that proxy is trusted. O(headers)."""
        if self.remote_ip not in trusted:
            return self
        peer = Peer(self.address, self.address_family, self.protocol)
        peer.remote_ip, peer.protocol = trusted.caller(
            self.remote_ip,
            self.protocol,
            _value(headers, b"x-forwarded-for"),
            _value(headers, b"x-forwarded-proto"),
        )
        return peer


def _value(headers: Headers, name: bytes) -> str:
    return b",".join(value for key, value in headers if key == name).decode("latin-1")
