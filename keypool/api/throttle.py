"""How often something may happen, by address: a token bucket for each, and one for all of them together.

A bucket holds `burst` turns and regains one each `seconds` (here in the form of one number, the moment at which
the bucket is full again; ATM calls it the generic cell rate algorithm, GCRA). The memory is bounded: when there
are too many addresses, those that have done nothing for longest are forgotten, which is what the bucket of all is
for. An IPv6 network of 64 bits counts as one address, since that is what one person has.

What this module does not do: sleep, refuse, or know a request; the moment is an argument.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict

ADDRESSES = 10_000
OF_ALL = 40
"""How many times as many turns all addresses together have."""

_ALL = ""
_NOTHING = 1e-6  # seconds, by which a sum of floats may be off


class TokenBuckets:
    """`burst` turns at hand for each address, one more each `seconds`, and `debt` seconds of turns on credit."""

    def __init__(self, burst: int, seconds: float, debt: float = 0.0) -> None:
        self._burst = burst
        self._seconds = seconds
        self._debt = debt
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def take(self, address: str, now: float) -> float:
        """Take a turn; the seconds until there would have been one, 0 if there was. O(1).

        A turn that was not there is taken on credit, up to `debt`: the seconds grow to that at most.
        """
        wait = max(
            self._take(_ALL, self._seconds / OF_ALL, self._burst * OF_ALL, now),
            self._take(network_of(address), self._seconds, self._burst, now),
        )
        while len(self._full_at) > ADDRESSES:
            self._full_at.popitem(last=False)
        return wait if wait > _NOTHING else 0.0

    def _take(self, whose: str, seconds: float, burst: int, now: float) -> float:
        full_at = max(self._full_at.get(whose, now), now)
        self._full_at[whose] = min(full_at + seconds, now + burst * seconds + self._debt)
        self._full_at.move_to_end(whose)
        return full_at - now - (burst - 1) * seconds


def network_of(address: str) -> str:
    """What one person has: an IPv4 address, or the /64 of an IPv6 address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))
