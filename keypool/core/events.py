"""The pool's changes: their names, and the events that viewers get.

The pool reports each change to its one listener, the engine, as soon as it has happened. The engine hands it to the
journal and keeps the latest ones. Viewers get them as Events, which hold no key text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from itertools import islice
from typing import NamedTuple

import msgspec

from keypool.core.keys import Key, moment


class Change(StrEnum):
    """A change of a key, or REVEALED, which changes nothing. Those in SILENT are no events."""

    GENERATED = "generated"
    IMPORTED = "imported"
    ACQUIRED = "acquired"
    UNBLOCKED = "unblocked"
    RELEASED = "released"
    DELETED = "deleted"
    EXPIRED = "expired"
    COOLED = "cooled"
    READY = "ready"
    QUARANTINED = "quarantined"
    RESTORED = "restored"
    REVEALED = "revealed"
    KEPT_ALIVE = "kept_alive"
    EXTENDED = "extended"
    FOLLOWED = "followed"  # a seat moved with the others of its secret, of which one has the event
    NOTED = "noted"  # a report, an operator's wish or another name was recorded, and the state is as before


SILENT = frozenset({Change.KEPT_ALIVE, Change.EXTENDED, Change.FOLLOWED, Change.NOTED})
"""The changes that are kept, but of which viewers get no event."""


class By(StrEnum):
    """What brought a change about."""

    HOLDER = "holder"
    DEADLINE = "deadline"
    OPERATOR = "operator"


class Origin(NamedTuple):
    """What brought a change about; `actor` is the name of an operator's token."""

    by: By
    actor: str | None = None


HOLDER = Origin(By.HOLDER)
DEADLINE = Origin(By.DEADLINE)

Listener = Callable[[Change, Key, str | None, Origin], None]
"""Called with each change of a key, the owner of its lease then, and what brought the change about."""

Happened = tuple[Change, Key, str | None, int, float, Origin]
"""A change as the engine keeps it: its kind, the key, owner and latest lease at that moment, the moment, its origin."""


class Event(msgspec.Struct, frozen=True, gc=False):
    """A change as the feed shows it: `at` is an RFC 3339 moment; `lease` is None if the key was never served."""

    event: Change
    id: int
    hint: str
    owner: str | None
    lease: int | None
    at: str
    by: By
    actor: str | None


def event_of(happened: Happened) -> Event:
    """The event of a change. It costs a microsecond, so it is made only when somebody looks at it."""
    change, key, owner, lease, at, origin = happened
    return Event(change, key.id, key.hint, owner, lease or None, moment(at), origin.by, origin.actor)


def latest(events: Sequence[Happened], count: int, key_id: int | None = None) -> list[Event]:
    """The last `count` of these, oldest first; with `key_id`, of that key only. O(count), O(events) for one key."""
    backwards = (happened for happened in reversed(events) if key_id is None or happened[1].id == key_id)
    return [event_of(happened) for happened in islice(backwards, count)][::-1]
