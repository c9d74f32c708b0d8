"""The rare events of a pool: what operators look for later, and what must not be lost among thousands of leases.

A crowd of one kind, in one call or one second, is one event with a count: a batch that generates a thousand keys, or a
hundred thousand keys that expire together. The engine adds each change of RARE, and stores what `add` returns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import islice

import msgspec

from keypool.core.events import By, Change, Origin
from keypool.core.keys import Key

RARE = frozenset({
    Change.GENERATED, Change.IMPORTED, Change.DELETED, Change.EXPIRED, Change.REVEALED, Change.QUARANTINED,
    Change.RESTORED, Change.UNBLOCKED,
})  # fmt: skip
"""The kinds of rare events. An unblock is one if an operator ended the lease."""
MOST_EVENTS = 1000
"""How many are kept of a pool."""
CROWD_SECONDS = 1.0
"""For how long others of the same kind and origin join an event."""
NO_HINT = "…"
"""The hint of a key of which nothing may be shown, or is known any more."""


class RareEvent(msgspec.Struct, gc=False):
    """One event, or a crowd of `count`: then key, moment and the rest are those of its first."""

    number: int
    """Counts from 1 in each pool."""
    event: Change
    id: int
    hint: str
    owner: str | None
    lease: int | None
    at: float
    by: By
    actor: str | None
    count: int = 1


class RareEvents:
    """The latest `MOST_EVENTS` of a pool. Each operation is O(1), but for pages."""

    def __init__(self) -> None:
        self._events: deque[RareEvent] = deque(maxlen=MOST_EVENTS)
        self._last_number = 0
        self._newest: dict[tuple[Change, By, str | None], tuple[RareEvent, Origin]] = {}

    def load(self, events: Iterable[RareEvent]) -> None:
        """Add events that were stored, in order of their numbers."""
        self._events.extend(events)
        if self._events:
            self._last_number = self._events[-1].number

    def add(self, change: Change, key: Key, owner: str | None, at: float, origin: Origin) -> RareEvent:
        """The event that this change is, or joins."""
        of_its_kind = self._newest.get((change, origin.by, origin.actor))
        if of_its_kind is not None:
            event, first = of_its_kind
            # An operator's call has an Origin of its own, however long it takes.
            together = at - event.at < CROWD_SECONDS or (first is origin and origin.by is By.OPERATOR)
            if together and event.number > self._last_number - MOST_EVENTS:
                event.count += 1
                return event
        self._last_number += 1
        event = RareEvent(
            self._last_number, change, key.id, key.hint, owner, key.lease or None, at, origin.by, origin.actor
        )
        self._events.append(event)
        self._newest[change, origin.by, origin.actor] = event, origin
        return event

    def page(self, kind: Change | None, before: int | None, limit: int) -> tuple[list[RareEvent], int | None]:
        """The newest events first, those with a number less than `before`; and the next `before`. O(MOST_EVENTS)."""
        found = list(
            islice(
                (
                    event
                    for event in reversed(self._events)
                    if (before is None or event.number < before) and (kind is None or event.event is kind)
                ),
                limit + 1,
            )
        )
        return found[:limit], found[limit - 1].number if len(found) > limit else None

    def all(self) -> list[RareEvent]:
        """All that are kept, oldest first. O(MOST_EVENTS)."""
        return list(self._events)
