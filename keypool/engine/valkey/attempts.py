"""The attempts of acquires, which hold leases: a repeat of an attempt gets those that are still held.

The digest of an attempt is in the record of each key that was acquired for it, written by the script that acquires the
key (lua/acquire.lua), and the partition has these keys in an order of their own. So in a pool with one partition, the
script itself finds the leases of an attempt before it serves a key.

With several partitions, a key is drawn in any of them, so that all have the same chance, and no script sees them all.
To ask each partition before each acquire would cost more than the acquire. Instead, one partition, which the digest
determines, knows the attempts that were made (lua/claim.lua):

    claimed, for 5 s at most   an acquire is under way: others for the same attempt wait for its end
    known                      keys may be held: all partitions are asked for them before another key is served
    not known                  no key is held

An attempt is known before a key is acquired for it, so a crash at any moment leaves none that isn't found, and is
forgotten when no lease of it can be held any more. This costs one round trip before an acquire, and a call after it.
"""

from __future__ import annotations

import asyncio
import itertools

from keypool.core.answers import Lease
from keypool.engine.valkey.calls import ScriptCall
from keypool.engine.valkey.partitions import Partitions

UNKNOWN, KNOWN, BUSY = 0, 1, -1
"""The replies of claim.lua."""
NOBODY = "-"
"""The claim of an attempt that nobody claims."""

_CLAIM_SECONDS = 5.0
_PAUSE = 0.02  # seconds before a claim that somebody else has is tried again
_MARGIN = 1.0  # seconds that an attempt is known beyond its leases


class Attempts:
    """See the module. Only for pools with several partitions. `server` is this server's name in Valkey."""

    def __init__(self, partitions: Partitions, server: str) -> None:
        self._partitions = partitions
        self._server = server
        self._claims = itertools.count(1)

    def new_claim(self) -> str:
        """The name of a claim."""
        return f"{self._server}.{next(self._claims)}"

    def claim(self, attempt: bytes, claim: str, block_seconds: float) -> ScriptCall:
        """Claim an attempt, for an acquire that blocks so long. The reply is one of UNKNOWN, KNOWN and BUSY, in a list.

        `end` must follow, whatever the reply.
        """
        known = block_seconds + _CLAIM_SECONDS
        return self._call(attempt, claim, round(_CLAIM_SECONDS * 1e6), known_for(known))

    async def claim_in_turn(self, attempt: bytes, claim: str, block_seconds: float) -> int:
        """The same, waiting as long as somebody else is at it. Returns UNKNOWN or KNOWN."""
        while True:
            state: int = (await self.claim(attempt, claim, block_seconds))[0]
            if state != BUSY:
                return state
            await asyncio.sleep(_PAUSE)

    def end(self, attempt: bytes, claim: str, held_seconds: float | None) -> None:
        """Give a claim up, if it hasn't lapsed. `held_seconds`: how long a lease can be held, None without one."""
        self._call(attempt, claim, 0, 0 if held_seconds is None else known_for(held_seconds))

    def keep(self, attempt: bytes, held_seconds: float) -> None:
        """Let an attempt be known as long as a lease that was extended."""
        self._call(attempt, NOBODY, 0, known_for(held_seconds))

    async def is_known(self, attempt: bytes) -> bool:
        """Whether the attempt may hold leases."""
        return bool((await self._call(attempt))[0])

    def _call(self, attempt: bytes, *words: str | int) -> ScriptCall:
        return self._partitions.call(home_of(attempt, self._partitions.count), "claim", (attempt, *words))


def home_of(attempt: bytes, partitions: int) -> int:
    """The partition that knows an attempt."""
    return int.from_bytes(attempt[:4], "big") % partitions


def known_for(held_seconds: float) -> int:
    """Microseconds for which an attempt must be known whose lease can be held for so long."""
    return round((held_seconds + _MARGIN) * 1e6)


class RepeatedLease(Lease):
    """A lease that its attempt was given before. It isn't given back if the caller hangs up: another may have it."""
