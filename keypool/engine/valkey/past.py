"""Leases that have ended, as lua/common.lua keeps them."""

from __future__ import annotations

import msgspec

from keypool.core.history import How, PastLease
from keypool.core.outcomes import Outcome


class _Past(msgspec.Struct, array_like=True):
    """In order of the fields in Lua. False stands for nothing. Fields may be added at the end only."""

    lease: int
    acquired: int
    ended: int
    how: str
    owner: str | bool = False
    client: str | bool = False
    outcome: str | bool = False
    reason: str | bool = False
    extended: int = 0


_decode = msgspec.msgpack.Decoder(_Past).decode
_encode = msgspec.msgpack.Encoder().encode


def past_lease_of(key_id: int, packed: bytes) -> PastLease:
    """A lease of a key. Raises ValueError or msgspec.DecodeError if it is damaged."""
    past = _decode(packed)
    return PastLease(
        key_id,
        past.lease,
        past.owner if isinstance(past.owner, str) else None,
        past.client if isinstance(past.client, str) else None,
        past.acquired / 1e6,
        past.ended / 1e6,
        How(past.how),
        Outcome(past.outcome) if isinstance(past.outcome, str) else None,
        past.reason if isinstance(past.reason, str) else None,
        past.extended,
    )


def packed_of(past: PastLease) -> bytes:
    """The same as it is kept; for keypool migrate, as servers leave that to the scripts."""
    acquired, ended = round(past.acquired_at * 1e6), round(past.ended_at * 1e6)
    owner, client, outcome, reason = (
        word or False for word in (past.owner, past.client, past.outcome, past.reason)
    )
    return _encode(
        _Past(past.lease, acquired, ended, past.how, owner, client, outcome, reason, past.extended)
    )
