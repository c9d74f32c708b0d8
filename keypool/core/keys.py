"""A key: its fields, and how its text is made.

The durable fields are what a journal writes and restores; the in-memory ones are places in the pool's
structures and are made anew from the durable ones. A change of the durable fields is a change of the
journal's schema (durable/datafile.py).

Moments and deadlines are seconds on the pool's clock, a float: near the Unix epoch in value, monotonic while
the server runs (engine/clock.py). No key text is ever logged: `hint` is what people see.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from keypool.core.index import DeadlineBucket

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

# A byte of randomness chooses a character by its remainder; the bytes at the top that would favour the first
# characters of the alphabet are dropped, so that each character is equally likely.
_UNBIASED = 256 - 256 % len(ALPHABET)
_CHARACTER_OF = bytes(ord(ALPHABET[byte % len(ALPHABET)]) for byte in range(256))
_DROPPED = bytes(range(_UNBIASED, 256))

DEAD = float("-inf")
"""The `expires_deadline` of a purged key: always in the past, so that an object that is still referred to can't be
taken for a live key."""


class State(StrEnum):
    """Of a live key. A purged key has none."""

    AVAILABLE = "available"
    BLOCKED = "blocked"


class Key(msgspec.Struct, gc=False, eq=False):
    """One key of the pool, changed by pool.py only. About 130 bytes, with its text 200.

    A Struct without `gc`: the garbage collector doesn't track keys, so a collection doesn't visit them all.
    """

    # durable
    id: int
    """From 1, never used again."""
    text: str
    """The secret itself."""
    created_at: float
    """The moment of generate."""
    expires_deadline: float
    """Purged when it passes; moved by keepalive; DEAD once purged."""
    release_deadline: float | None = None
    """Available again when it passes; None unless blocked."""
    lease: int = 0
    """The number of the latest acquire; 0 if it was never served."""
    owner: str | None = None
    """Who holds it; None unless blocked and named."""
    # in memory
    slot: int = -1
    """Index in the pool's list of available keys; -1 unless available."""
    expiry_bucket: DeadlineBucket | None = None
    """Place in the order by expires_deadline."""
    release_bucket: DeadlineBucket | None = None
    """Place in the order by release_deadline; None unless blocked."""

    @property
    def hint(self) -> str:
        """What may be shown of the key: first four characters, an ellipsis, last four."""
        return hint(self.text)

    def __repr__(self) -> str:
        return f"<Key id:{self.id} {self.hint}>"


def hint(text: str) -> str:
    """What may be shown of a key's text, which is 16 characters at least."""
    return f"{text[:4]}…{text[-4:]}"


def random_text(length: int) -> str:
    """A new key text of `length` characters of A-Z a-z 0-9 from the operating system's randomness.

    5.95 bits a character: 119 bits at the default length of 20. About 1 µs.
    """
    text = b""
    while len(text) < length:
        text += os.urandom(2 * length).translate(_CHARACTER_OF, _DROPPED)
    return text[:length].decode("ascii")


def moment(at: float) -> str:
    """A moment as people and programs read it: RFC 3339, UTC, milliseconds. About 0.4 µs in a known second."""
    # Rounded as a journal rounds it, so that a moment reads the same after a restart.
    second, milliseconds = divmod(round(at * 1000), 1000)
    return f"{_second(second)}.{milliseconds:03d}Z"


@lru_cache(maxsize=4096)  # a page's keys were mostly made in few seconds
def _second(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S")
