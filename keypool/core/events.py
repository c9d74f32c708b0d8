"""The names of the pool's changes, and what of them is shown.

The pool reports each change to its one listener, the engine, as soon as it has happened. The engine journals it and
keeps it for whoever watches, as an Event, which holds no key text.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from itertools import islice

import msgspec

from keypool.core.keys import Key, moment


class Change(StrEnum):
    """What can happen to a key. REVEALED changes nothing."""

    GENERATED = "generated"
    ACQUIRED = "acquired"
    UNBLOCKED = "unblocked"
    RELEASED = "released"
    DELETED = "deleted"
    EXPIRED = "expired"
    KEPT_ALIVE = "kept_alive"
    REVEALED = "revealed"


Happened = tuple[Change, Key, str | None, int, float]
"""A change as the engine keeps it: what, the key, its owner then, its latest lease, the moment."""


class Event(msgspec.Struct, frozen=True, gc=False):
    """One change as the feed shows it: `at` is an RFC 3339 moment."""

    event: Change
    id: int
    hint: str
    owner: str | None
    lease: int | None
    at: str


def tell(happened: Happened) -> Event:
    """A change as it is shown. Made only for those that somebody looks at: a microsecond each."""
    change, key, owner, lease, at = happened
    return Event(change, key.id, key.hint, owner, lease or None, moment(at))


def latest(events: Sequence[Happened], count: int, key_id: int | None = None) -> list[Event]:
    """The last `count` of these, oldest first; with `key_id`, of that key only. O(count), O(events) for one key."""
    backwards = (happened for happened in reversed(events) if key_id is None or happened[1].id == key_id)
    return [tell(happened) for happened in islice(backwards, count)][::-1]
