"""Lists over partitions of who holds keys, of what an owner holds, and of rare events (see pages.py for other lists).

Each partition replies the first rows of its own from a position on, as many as the page has. The first rows of all are
among them, so one round is enough. A holder with keys in several partitions is one row.

A crowd of one kind is an event in each partition; here, those of one kind and origin within a second become one again.
A crowd on the border of two pages is an event on each.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import msgspec

from keypool.core.answers import HolderRow, Row
from keypool.core.events import By, Change, Origin
from keypool.core.index import Position
from keypool.core.keys import moment
from keypool.core.rare_events import CROWD_SECONDS, MOST_EVENTS, RareEvent
from keypool.engine.valkey.calls import all_of
from keypool.engine.valkey.link import Word
from keypool.engine.valkey.pages import ListedKey, row_of
from keypool.engine.valkey.partitions import Partitions

_RELEASED_AT_ONCE = 200  # leases that one call ends: about 2 ms
_KIND, _ORIGIN, _NUMBER, _AT = 0, 6, 7, 9  # of a rare event (lua/common.lua)
_LAST = 2**53  # no number is larger
_decode = msgspec.msgpack.Decoder(list[Any]).decode


class HolderPages:
    """See the module. All coroutines raise StorageUnavailable."""

    def __init__(self, partitions: Partitions) -> None:
        self._partitions = partitions

    async def owners(self, after: Position | None, limit: int) -> tuple[list[HolderRow], Position | None]:
        """Who holds keys, in order of name, and the position that the next page starts after; None on the last."""
        start = b"" if after is None else _word(str(after[1]), str(after[3]))
        found: dict[bytes, tuple[int, int]] = {}
        more = False
        for has_more, *holders in await self._partitions.all("owners", start, limit):
            more = more or bool(has_more)
            for holder, held, acquired in holders:
                before, oldest = found.get(holder, (0, acquired))
                found[holder] = before + held, min(oldest, acquired)
        names = sorted(found)
        more = more or len(names) > limit
        names = names[:limit]
        if not names:
            return [], None
        replies = await self._partitions.all("released", *names)
        rows = []
        for name, *released in zip(names, *replies, strict=True):
            owner, client, _ = name.decode().split("\0")
            held, acquired = found[name]
            rows.append(HolderRow(owner or None, client or None, held, moment(acquired / 1e6), sum(released)))
        owner, client, _ = names[-1].decode().split("\0")
        position = (int(bool(owner)), owner, int(bool(client)), client)
        return rows, position if more else None

    async def keys(self, owner: str, after: Position | None, limit: int) -> tuple[list[Row], Position | None]:
        """The keys that an owner holds, in order of lease, and the position of the next page."""
        start = 0 if after is None else int(after[0])
        words = (owner.encode(), "", start, limit)
        calls = [
            self._partitions.call(partition, "owned", words) for partition in range(self._partitions.count)
        ]
        rows: list[tuple[ListedKey, float]] = []
        horizon: float = inf  # the lease up to which each partition has replied
        for call, (more, _, *found) in zip(calls, await all_of(calls), strict=True):
            rows += [(ListedKey(*row), call.age()) for row in found]
            if more:
                horizon = min(horizon, rows[-1][0].lease if found else start)
        rows = sorted((row for row in rows if row[0].lease <= horizon), key=lambda row: row[0].lease)
        more = horizon < inf or len(rows) > limit
        rows = rows[:limit]
        forget = self._partitions.rules.forget_seconds
        position = (rows[-1][0].lease,) if more and rows else None
        return [row_of(row, age, forget) for row, age in rows], position

    async def release(self, owner: str, client: str | None, origin: str) -> int:
        """End the leases that an owner holds now. Returns how many that were. O(leases * log n), in slices."""
        of_client = "" if client is None else f"={client}".encode()
        count, released = self._partitions.count, 0
        for partition in range(count):
            last, after = _LAST, 0
            while True:
                words = (owner.encode(), of_client, after, _RELEASED_AT_ONCE)
                more, tick, *found = await self._partitions.call(partition, "owned", words)
                rows = [ListedKey(*row) for row in found]
                last = min(last, tick * count + partition)  # the latest one as of the first look
                held = [(row.id, row.lease) for row in rows if row.lease <= last]
                if held:
                    after = held[-1][1]
                    names: list[Word] = [word for key in held for word in (b"\xff%d.%d" % key, "", "", 1)]
                    replies = await self._partitions.call(partition, "unblock", (origin, "", *names))
                    released += sum(reply[0] == 1 for reply in replies)
                if not more or len(held) < len(rows) or not rows:
                    break
        return released

    async def rare_events(
        self, kind: str | None, after: Position | None, limit: int
    ) -> tuple[list[RareEvent], Position | None]:
        """Rare events, newest first, and the position of the next page."""
        calls = []
        for partition in range(self._partitions.count):
            start: tuple[Word, Word] = ("", "")
            if after is not None:
                at, last, number = map(int, after)
                start = at, number if partition == last else _LAST if partition > last else 0
            calls.append(self._partitions.call(partition, "rare", (*start, limit + 1, kind or "")))
        found: list[tuple[tuple[int, int, int], list[Any]]] = []
        horizon: tuple[int, int, int] | None = None  # the place up to which each partition has replied
        for partition, (more, *events) in enumerate(await all_of(calls)):
            decoded = map(_decode, events)
            found += [((-each[_AT], partition, -each[_NUMBER]), each) for each in decoded]
            if more:
                horizon = found[-1][0] if horizon is None else min(horizon, found[-1][0])
        if horizon is not None:
            found = [each for each in found if each[0] <= horizon]
        found.sort()
        crowds, used = crowds_of([event for _, event in found], limit)
        is_last = used == len(found) and horizon is None
        return crowds, None if is_last or not used else _position(found[used - 1][0])


def crowds_of(events: Sequence[list[Any]], limit: int) -> tuple[list[RareEvent], int]:
    """The first crowds of stored events of all partitions, newest first; and how many of the events are in these."""
    crowds: list[RareEvent] = []
    newest: dict[tuple[str, str], tuple[RareEvent, int]] = {}
    for number, event in enumerate(events):
        kind_and_origin = event[_KIND], event[_ORIGIN]
        of_its_kind = newest.get(kind_and_origin)
        if of_its_kind is not None and of_its_kind[1] - event[_AT] < CROWD_SECONDS * 1e6:
            _join(of_its_kind[0], rare_event_of(event))
        elif len(crowds) < limit:
            crowds.append(rare_event_of(event))
            newest[kind_and_origin] = crowds[-1], event[_AT]
        else:
            return crowds, number
    return crowds, len(events)


def stored_events(partitions: Sequence[Sequence[bytes]]) -> list[RareEvent]:
    """All rare events of a pool, oldest first and numbered anew, of what its partitions store; for keypool migrate."""
    found = [
        (-event[_AT], partition, -event[_NUMBER], event)
        for partition, stored in enumerate(partitions)
        for event in map(_decode, stored)
    ]
    found.sort(key=lambda each: each[:3])
    crowds, _ = crowds_of([event for *_, event in found], MOST_EVENTS)
    for number, event in enumerate(reversed(crowds), 1):
        event.number = number
    return crowds[::-1]


def rare_event_of(event: Sequence[Any]) -> RareEvent:
    """A rare event as lua/common.lua stores it."""
    change, id, start, end, owner, lease, origin, number, count, at = event
    by, _, actor = origin.partition(" ")
    hint = f"{start}…{end}" if end is not False else start  # of a sealed text it is there as a whole
    return RareEvent(
        number, Change(change), id, hint, owner or None, lease or None, at / 1e6, By(by), actor or None, count
    )


def word_of(origin: Origin) -> str:
    """An origin for scripts (lua/common.lua)."""
    return f"{origin.by} {origin.actor or ''}" if origin.by is By.OPERATOR else origin.by.value


def packed(event: RareEvent) -> bytes:
    """The same the other way round, for keypool migrate."""
    origin = word_of(Origin(event.by, event.actor))
    return msgspec.msgpack.encode([
        event.event.value, event.id, event.hint, False, event.owner or False, event.lease or 0, origin, event.number,
        event.count, round(event.at * 1e6),
    ])  # fmt: skip


def _join(crowd: RareEvent, event: RareEvent) -> None:
    """Let a crowd have an earlier event of its kind as its first."""
    count = crowd.count + event.count
    for name in RareEvent.__struct_fields__:
        setattr(crowd, name, getattr(event, name))
    crowd.count = count


def _position(place: tuple[int, int, int]) -> Position:
    return -place[0], place[1], -place[2]


def _word(owner: str, client: str) -> bytes:
    """A holder as lua/common.lua has it."""
    return f"{owner}\0{client}\0".encode()
