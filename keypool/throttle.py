"""How often a wrong token may be tried.

Each address has a few tries at hand and gets one back every few seconds. Only wrong tokens cost one, and once
there is none left, a right token is refused too, lest the refusal tell which it was. The memory is bounded:
when too many addresses try at once, those that have waited longest are forgotten, and all of them together
are held to a rate of their own.

What this module does not do: sleep, or know a request; the moment is an argument.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict

from keypool.errors import TooManySignIns

TRIES = 5
SECONDS_A_TRY = 12.0
TRIES_OF_ALL = 200
ADDRESSES = 10_000


class Throttle:
    """Counts wrong tokens by address."""

    def __init__(self) -> None:
        # For each address the moment at which all its tries are back: what it owes, as a length of time.
        self._clear_at: OrderedDict[str, float] = OrderedDict()

    def check(self, address: str, now: float) -> None:
        """Raise TooManySignIns if this address, or everybody together, has no try left. O(1)."""
        for who, tries in ((_network(address), TRIES), ("", TRIES_OF_ALL)):
            spacing = SECONDS_A_TRY * TRIES / tries
            owed = self._clear_at.get(who, now) - now
            if owed > (tries - 1) * spacing:
                raise TooManySignIns(owed - (tries - 1) * spacing)

    def wrong(self, address: str, now: float) -> None:
        """A wrong token came from this address. O(1)."""
        for who, tries in ((_network(address), TRIES), ("", TRIES_OF_ALL)):
            spacing = SECONDS_A_TRY * TRIES / tries
            self._clear_at[who] = max(self._clear_at.get(who, now), now) + spacing
            self._clear_at.move_to_end(who)
        while len(self._clear_at) > ADDRESSES:
            self._clear_at.popitem(last=False)


def _network(address: str) -> str:
    """What one person has: an IPv4 address, or the /64 of an IPv6 address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if parsed.version == 4:
        return address
    return str(ipaddress.ip_network((parsed, 64), strict=False))
