"""Rate limits by address: a token bucket for each address, and one for all of them together.

A bucket holds up to `burst` tokens and regains one every `seconds`. It is stored as one number, the moment at which it
is full again (the generic cell rate algorithm, GCRA). Memory is bounded: beyond `ADDRESSES` the least recently active
ones are dropped; the bucket of all addresses limits what that gives away. An IPv6 /64 network counts as one address,
since one client usually has all of it. The time is an argument.
"""

from __future__ import annotations

from collections import OrderedDict

from keypool.config.proxies import network_of

ADDRESSES = 10_000
OF_ALL = 40
"""All addresses together have this many times the tokens of one."""

_ALL = ""
_ROUNDING = 1e-6  # seconds: the rounding error of sums of floats is less


class TokenBuckets:
    """`burst` tokens for each address, one more every `seconds`, and `debt` seconds' worth of tokens on credit."""

    def __init__(self, burst: int, seconds: float, debt: float = 0.0) -> None:
        self._burst = burst
        self._seconds = seconds
        self._debt = debt
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def take(self, address: str, now: float) -> float:
        """Take a token at the moment `now`, in seconds. Returns 0, or the seconds until there will be one. O(1).

        In the latter case the token is taken on credit, up to `debt`, so repeated calls return more and more seconds.
        """
        wait = max(
            self._take(_ALL, self._seconds / OF_ALL, self._burst * OF_ALL, now),
            self._take(network_of(address), self._seconds, self._burst, now),
        )
        while len(self._full_at) > ADDRESSES:
            self._full_at.popitem(last=False)
        return wait if wait > _ROUNDING else 0.0

    def _take(self, whose: str, seconds: float, burst: int, now: float) -> float:
        full_at = max(self._full_at.get(whose, now), now)
        self._full_at[whose] = min(full_at + seconds, now + burst * seconds + self._debt)
        self._full_at.move_to_end(whose)
        return full_at - now - (burst - 1) * seconds
