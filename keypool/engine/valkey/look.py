"""What one look at all partitions tells: counts, deadlines, and the latest events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from keypool.core.events import Change, Event
from keypool.core.keys import moment
from keypool.engine.valkey.link import Reply

COUNTERS = (
    "generated",
    "acquired",
    "unblocked",
    "released",
    "deleted",
    "expired",
    "kept_alive",
    "refused",
)
"""In the order in which look.lua and Stats have them."""

EVENTS_AT = 20
"""Where the events begin in look.lua's answer."""

_decode = msgspec.msgpack.Decoder(tuple[str, int, str, str, str | bool, int, int]).decode


@dataclass(slots=True)
class Look:
    """The sum over all partitions. Lengths of time are seconds, None if there is no such key."""

    total: int = 0
    available: int = 0
    waiting_elsewhere: int = 0
    expiring: int = 0
    counters: list[int] = field(default_factory=lambda: [0] * len(COUNTERS))
    told: int = 0
    next_release: float | None = None
    crowded: bool = False
    """Whether keys are overdue that the look has not dealt with."""

    def add(self, partition: int, reply: Reply) -> None:
        """Add a partition's answer to look.lua."""
        self.available += reply[0]
        self.total += reply[1]
        if partition == 0:  # all partitions know who waits
            self.waiting_elsewhere = reply[2]
        self.expiring += reply[3]
        for number in range(len(COUNTERS)):
            self.counters[number] += reply[8 + number]
        self.told += reply[18]
        if reply[5] >= 0:
            left = reply[5] / 1e6
            self.next_release = left if self.next_release is None else min(self.next_release, left)
        self.crowded = self.crowded or reply[4] == 0 or reply[5] == 0


def until_due(reply: Reply) -> float | None:
    """Seconds until the partition's next deadline."""
    left = [microseconds for microseconds in (reply[4], reply[5]) if microseconds >= 0]
    return min(left) / 1e6 if left else None


Told = tuple[int, bytes]
"""An event as Valkey keeps it, and its moment in microseconds. Read only for the few that somebody looks at."""


def events_in(reply: Reply) -> list[Told]:
    """The events that a partition's answer holds, oldest first."""
    # Each ends with its moment, a number of eight bytes.
    return [(int.from_bytes(packed[-8:]), packed) for packed in reply[EVENTS_AT:]]


def latest(events: Sequence[Told], count: int, key_id: int | None) -> list[Event]:
    """The last `count` of these, oldest first; with `key_id`, of that key only."""
    found: list[Event] = []
    for _, packed in reversed(events):
        if len(found) >= count:
            break
        change, id, start, end, owner, lease, at = _decode(packed)
        if key_id is None or id == key_id:
            named = owner if isinstance(owner, str) else None
            found.append(Event(Change(change), id, f"{start}…{end}", named, lease or None, moment(at / 1e6)))
    return found[::-1]
