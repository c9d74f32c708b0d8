"""What a change of the pool is called, and what of it may be told.

The pool reports each change to its one listener, the engine, at the moment it has happened, by its name here.
The engine journals it, arms timers and publishes an Event to whoever watches. An Event holds no key text.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from itertools import islice

import msgspec

from keypool.core.keys import Key, moment


class Change(StrEnum):
    """The seven things that can happen to a key, and the one that only looks."""

    GENERATED = "generated"
    ACQUIRED = "acquired"
    UNBLOCKED = "unblocked"
    RELEASED = "released"
    DELETED = "deleted"
    EXPIRED = "expired"
    KEPT_ALIVE = "kept_alive"
    REVEALED = "revealed"


Happened = tuple[Change, Key, str | None, int, float]
"""A change as the engine keeps it: what, to which key, whose it was, its latest lease, when."""


class Event(msgspec.Struct, frozen=True, gc=False):
    """One change as the feed tells it: `at` is an RFC 3339 moment."""

    event: Change
    id: int
    hint: str
    owner: str | None
    lease: int | None
    at: str


def tell(happened: Happened) -> Event:
    """What may be told of it. Made only for the few that somebody looks at: a microsecond each."""
    change, key, owner, lease, at = happened
    return Event(change, key.id, key.hint, owner, lease or None, moment(at))


def latest(events: Sequence[Happened], count: int, key_id: int | None = None) -> list[Event]:
    """The last `count` of these, oldest first, as they are told; with `key_id`, of that key only."""
    backwards = (happened for happened in reversed(events) if key_id is None or happened[1].id == key_id)
    return [tell(happened) for happened in islice(backwards, count)][::-1]
