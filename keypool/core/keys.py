"""A key: its fields, and how its text is made.

A journal writes and restores the durable fields; the in-memory ones are the key's places in the pool's structures, and
are derived from the durable ones. To change the durable fields is to change the schema of the data file
(durable/datafile.py).

Moments and deadlines are seconds on the pool's clock, a float: near the Unix epoch in value, monotonic while
the server runs (engine/clock.py). No key text is ever logged: `hint` is what people see.
"""

from __future__ import annotations

import os
from array import array
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING

import msgspec

from keypool.core.outcomes import NO_HISTORY, History
from keypool.core.pace import Pace

if TYPE_CHECKING:
    from keypool.core.index import DeadlineBucket
    from keypool.core.owners import Holder

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

# A byte of randomness chooses a character by its remainder; the bytes at the top that would favour the first
# characters of the alphabet are dropped, so that each character is equally likely.
_UNBIASED = 256 - 256 % len(ALPHABET)
_CHARACTER_OF = bytes(ord(ALPHABET[byte % len(ALPHABET)]) for byte in range(256))
_DROPPED = bytes(range(_UNBIASED, 256))

_LONG, _SHORT = 16, 8  # characters of a text from which a hint shows eight of them, and four

DEAD = float("-inf")
"""The `expires_deadline` of a purged key: always in the past, so that a purged key that is still referenced can't be
taken for a live one."""

NEVER = float("inf")
"""The `expires_deadline` of a key that never expires. Such a key stands in no order by expiry."""


class State(StrEnum):
    """The state of a live key. A purged key has no state."""

    AVAILABLE = "available"
    BLOCKED = "blocked"
    COOLING = "cooling"
    QUARANTINED = "quarantined"


MAX_SEATS = 100
"""Holders that a secret may have at a time."""

MAX_NAME = 63
"""Characters of a name."""
MAX_OWNER = 200
"""Characters of the name that a holder gives."""


class Details(msgspec.Struct, frozen=True, gc=False, array_like=True, omit_defaults=True):
    """What an operator wrote about a key. Files and Valkey contain it: fields may be added at the end only."""

    imported: bool = False
    """Whether the text came from elsewhere. A text that was generated is found by its beginning, too."""
    name: str | None = None
    """Unique in its pool."""
    labels: dict[str, str] | None = None
    """Shown to viewers."""
    data: bytes | None = None
    """A JSON object, as secret as the text."""
    former: str | None = None
    """The text with which the lease was given, if it was replaced since: it names the key until the lease ends."""
    pace: Pace | None = None
    """How often the key may be used, in place of the pool's pace."""


NO_DETAILS = Details()
"""The details of a generated key about which nobody wrote anything."""


class Group(msgspec.Struct, gc=False, eq=False):
    """The seats of one secret: keys with the same text, each with a holder of its own. Its rules are in seats.py.

    It refers to them by id, as references both ways would be a cycle that nothing frees.
    """

    # durable, with each of the seats
    wanted: int
    """How many seats there shall be: those above it go when their leases end."""
    cools_until: float = 0.0
    """The end of the secret's cooldown: no seat is available before it. Reports and its pace only move it on."""
    paced_until: float = 0.0
    """In place of that of the seats, whose own is 0: see Key."""
    # in memory
    ids: array[int] = msgspec.field(default_factory=lambda: array("q"))
    """The seats, in order; the number of a seat is its place here."""
    surplus: int = 0
    """How many there are beyond those wanted."""
    quarantined: int = 0
    """How many of them are quarantined: all that are not held, or none."""
    cooled: float = 0.0
    """The `cools_until` whose beginning was reported as an event."""
    ready: float = 0.0
    """The `cools_until` whose end was."""


class Key(msgspec.Struct, gc=False, eq=False):
    """One key of the pool, changed by pool.py only. About 190 bytes; 260 with its text.

    `gc=False`: the garbage collector doesn't track keys, so a collection doesn't visit them all.
    """

    # durable
    id: int
    """Counts from 1, and is never reused."""
    text: str
    """The secret itself."""
    created_at: float
    """The moment of generate."""
    expires_deadline: float
    """The key is purged when this passes. Moved by keepalive; DEAD once purged."""
    release_deadline: float | None = None
    """A blocked key is released, and a cooling one available again, when this passes. None in the other states."""
    lease: int = 0
    """The number of the latest acquire; 0 if the key was never served."""
    owner: str | None = None
    """The name that the holder gave; None unless blocked and named."""
    state: State = State.AVAILABLE
    """As of the last change: a deadline may have passed since (pool.py)."""
    acquired_at: float = 0.0
    """The moment of the latest acquire, from which a lease can be extended so far and no further."""
    attempt: bytes | None = None
    """The digest of the attempt that the lease was given to; None unless blocked and the caller named one."""
    reported: bool = False
    """Whether the latest lease can't report any more: it has, or an operator ended it by a quarantine."""
    quarantine_pending: bool = False
    """Whether the key is quarantined when its lease ends. False unless blocked."""
    history: History = NO_HISTORY
    """What its holders reported."""
    client: str | None = None
    """The name of the token that holds it; None unless blocked by a named token (config/tokens.py)."""
    details: Details = NO_DETAILS
    """Name, labels, data and pace, and whether it was imported."""
    paced_until: float = 0.0
    """The theoretical arrival time of its pace (pace.py); 0 if none was ever charged: full budget."""
    extended: int = 0
    """How often its lease was extended; 0 unless blocked."""
    served: int = 0
    """How often it was acquired. Of what an older version served, the latest counts."""
    # in memory
    replayed: bool = False
    """Whether the latest lease was given to its attempt again, so that the first call can't take it back alone."""
    slot: int = -1
    """Index in the pool's list of available keys; -1 unless available."""
    expiry_bucket: DeadlineBucket | None = None
    """Place in the order by expires_deadline."""
    release_bucket: DeadlineBucket | None = None
    """Place in the order by release_deadline; None unless blocked or cooling."""
    holder: Holder | None = None
    """Who holds the key, with all that they hold; None unless blocked."""
    group: Group | None = None
    """The seats of its secret, this key being one; None if it never had more than one."""

    @property
    def hint(self) -> str:
        """The part of the text that may be shown."""
        return hint(self.text)

    def __repr__(self) -> str:
        return f"<Key id:{self.id} {self.hint}>"


def hint(text: str) -> str:
    """The part of a key's text that may be shown: the first four characters, an ellipsis, the last four.

    Two and two of a text of less than 16 characters, none of one of less than 8.
    """
    if len(text) >= _LONG:
        return f"{text[:4]}…{text[-4:]}"
    return f"{text[:2]}…{text[-2:]}" if len(text) >= _SHORT else "…"


def random_text(length: int) -> str:
    """A new key text of `length` characters of A-Z a-z 0-9 from the operating system's randomness.

    5.95 bits a character: 119 bits at the default length of 20. About 1 µs.
    """
    text = b""
    while len(text) < length:
        text += os.urandom(2 * length).translate(_CHARACTER_OF, _DROPPED)
    return text[:length].decode("ascii")


def moment(at: float) -> str:
    """A moment in RFC 3339, UTC, with milliseconds. About 0.4 µs if its second is cached."""
    # Rounded as a journal rounds, so that a moment reads the same after a restart.
    second, milliseconds = divmod(round(at * 1000), 1000)
    return f"{_second(second)}.{milliseconds:03d}Z"


@lru_cache(maxsize=4096)  # most keys of a page were made within a few seconds
def _second(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S")
