"""Limits open connections, in all and per address, and picks those to cut when unfinished requests hold too much."""

from __future__ import annotations

import logging
import time
from collections.abc import Container, Iterable
from typing import TypeVar

from keypool.config.limits import Limits, allowed_connections
from keypool.config.proxies import ip_of, network_of

_WARN_EVERY = 60.0  # seconds between two log lines about rejected connections, at least
_log = logging.getLogger("keypool.connections")

Held = TypeVar("Held")


class ConnectionLimiter:
    """Counts open connections per address. A websocket counts until its stream is closed."""

    def __init__(self, limits: Limits, trusted: Container[str] = ()) -> None:
        self._limits = limits
        self.most = allowed_connections(limits)
        """Connections that may be open at a time."""
        self._trusted = trusted  # proxies, which have no limit: many callers share their addresses
        self._open: dict[str, int] = {}
        self._warned_at = -_WARN_EVERY
        self.count = 0
        """Connections that are open."""
        self.refused = 0
        """Connections that were rejected, since the start."""

    def enter(self, address: str) -> bool:
        """Count one more connection from this address. False, and not counted, if a limit is reached. O(1)."""
        place = _place(address)
        count = self._open.get(place, 0)
        crowded = place and count >= self._limits.connections_per_address and address not in self._trusted
        if self.count >= self.most or crowded:
            self.refused += 1
            self._warn(f"a connection from {address} was refused")
            return False
        self._open[place] = count + 1
        self.count += 1
        return True

    def leave(self, address: str) -> None:
        """Uncount a connection that is closed. O(1)."""
        place = _place(address)
        self.count -= 1
        self._open[place] -= 1
        if not self._open[place]:
            del self._open[place]

    def out_of_files(self, error: OSError) -> None:
        """Count a connection closed for lack of a file descriptor. Logged once a minute at most. O(1)."""
        self.refused += 1
        self._warn(f"a connection was closed: {error.strerror}")

    def _warn(self, what: str) -> None:
        now = time.monotonic()
        if now - self._warned_at >= _WARN_EVERY:
            self._warned_at = now
            _log.warning("%s; %d were refused by now, %d are open", what, self.refused, self.count)


def largest_first_over_budget(held: Iterable[tuple[int, Held]], limits: Limits) -> list[Held]:
    """The connections to cut so that the others hold at most `unfinished_bytes` together, largest first.

    `held` has each connection with the bytes it holds of unfinished requests. O(n), and O(n log n) over the budget.
    """
    sizes = [(size, holder) for size, holder in held if size]
    over = sum(size for size, _ in sizes) - limits.unfinished_bytes
    if over <= 0:
        return []
    _log.warning("unfinished requests take %d bytes too much: the largest are cut", over)
    cut = []
    for size, holder in sorted(sizes, key=lambda pair: -pair[0]):
        if over <= 0:
            break
        cut.append(holder)
        over -= size
    return cut


def _place(address: str) -> str:
    """What connections are counted by: the IPv4 address or IPv6 /64 network. Empty for loopback, which has no limit."""
    ip = ip_of(address)
    return "" if ip is None or ip.is_loopback else network_of(address)
