"""Which proxies are trusted, and what their headers say about the caller behind them.

One rule for both HTTP servers. If the peer of the connection is trusted, `X-Forwarded-For` is read from its
right end, where each trusted proxy has appended the address of its own peer, to the first address that is not
trusted: that is the caller. Everything left of it may be forged. `X-Forwarded-Proto` says whether the caller
used TLS. No other header counts, and none from a peer that is not trusted.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache


class TrustedProxies:
    """Addresses and networks, separated by commas. Raises ValueError for any other text, the empty one too."""

    def __init__(self, text: str) -> None:
        self._networks = tuple(ipaddress.ip_network(part.strip()) for part in text.split(","))
        self._trusts = lru_cache(maxsize=1024)(self._look_up)

    def __contains__(self, address: object) -> bool:
        """Whether an address belongs to a trusted proxy. 0.1 µs if it was looked up before."""
        return isinstance(address, str) and len(address) < 64 and self._trusts(address)

    def _look_up(self, address: str) -> bool:
        found = ip_of(address)
        return found is not None and any(found in network for network in self._networks)

    def caller(self, peer: str, protocol: str, hops: str, scheme: str) -> tuple[str, str]:
        """Address and protocol of the caller: `hops` and `scheme` are the values of the two headers. O(hops)."""
        if peer not in self:
            return peer, protocol
        address = peer
        for hop in (part.strip() for part in reversed(hops.split(","))):
            if not _is_address(hop):
                break  # not an address: the previous one counts
            address = hop
            if hop not in self:
                break
        scheme = scheme.rpartition(",")[2].strip().lower()
        return address, scheme if scheme in ("http", "https") else protocol


def ip_of(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address, without its zone, and as IPv4 if it is IPv4-mapped; None for any other text."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    return (found.ipv4_mapped or found) if isinstance(found, ipaddress.IPv6Address) else found


def network_of(address: str) -> str:
    """What is counted as one caller: an IPv4 address, or the /64 network of an IPv6 address. Other text as it is."""
    found = ip_of(address)
    if isinstance(found, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((found, 64), strict=False))
    return address if found is None else str(found)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether a host, without brackets or port, is this machine: `localhost`, 127.0.0.0/8 or ::1. No look-up.

    An IPv4-mapped IPv6 address (`::ffff:127.0.0.1`) is not: versions of Python disagree about it.
    """
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return str(address) == "::1" or (address.version == 4 and address.is_loopback)
