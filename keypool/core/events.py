"""The pool's changes: their names, and the events that viewers get.

The pool reports each change to its one listener, the engine, as soon as it has happened. The engine hands it to the
journal and keeps the latest ones. Viewers get them as Events, which hold no key text.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from itertools import islice

import msgspec

from keypool.core.keys import Key, moment


class Change(StrEnum):
    """A kind of event. REVEALED is recorded, but changes nothing."""

    GENERATED = "generated"
    ACQUIRED = "acquired"
    UNBLOCKED = "unblocked"
    RELEASED = "released"
    DELETED = "deleted"
    EXPIRED = "expired"
    KEPT_ALIVE = "kept_alive"
    REVEALED = "revealed"


Happened = tuple[Change, Key, str | None, int, float]
"""A change as the engine keeps it: its kind, the key, the owner and latest lease at that moment, the moment."""


class Event(msgspec.Struct, frozen=True, gc=False):
    """A change as the feed shows it: `at` is an RFC 3339 moment; `lease` is None if the key was never served."""

    event: Change
    id: int
    hint: str
    owner: str | None
    lease: int | None
    at: str


def event_of(happened: Happened) -> Event:
    """The event of a change. It costs a microsecond, so it is made only when somebody looks at it."""
    change, key, owner, lease, at = happened
    return Event(change, key.id, key.hint, owner, lease or None, moment(at))


def latest(events: Sequence[Happened], count: int, key_id: int | None = None) -> list[Event]:
    """The last `count` of these, oldest first; with `key_id`, of that key only. O(count), O(events) for one key."""
    backwards = (happened for happened in reversed(events) if key_id is None or happened[1].id == key_id)
    return [event_of(happened) for happened in islice(backwards, count)][::-1]
