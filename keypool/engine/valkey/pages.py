"""Lists over partitions: each returns its own rows in order, and these are merged.

Keys are spread evenly, so each partition returns little more than its share of a page. Only rows up to the point that
every partition has reached are used (the horizon), so no row is missed; if they are too few, more are read from the
partitions that are behind. A page costs O(partitions * log n + rows).

Keys with the same deadline are ordered by their texts, as in Valkey. A position identifies such a key by its id, since
a cursor holds no key text; if that key is gone, the keys with the same deadline and the same first four characters are
listed again.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from operator import attrgetter
from typing import Any, NamedTuple

from keypool.core.answers import Row
from keypool.core.index import Position
from keypool.core.keys import State, hint, moment
from keypool.core.keyset import PageQuery
from keypool.core.outcomes import Outcome
from keypool.core.pool import PAGE_SCAN_LIMIT
from keypool.core.texts import rank_of, shown_of
from keypool.engine.valkey.calls import ScriptCall, all_of, expires_in, seconds_left
from keypool.engine.valkey.partitions import Partitions
from keypool.engine.valkey.vault import details_in

_MIN_EXAMINED = 50  # keys that a partition examines in a call, whatever its share of PAGE_SCAN_LIMIT
_MAX_ROUNDS = 4  # of calls, after which a page may be short
_ORDERS: dict[str, Callable[[Any], Any]] = {
    "id": attrgetter("id"),
    "expiry": attrgetter("place", "text"),
    "release": attrgetter("place", "text"),
    "ready": attrgetter("place", "text"),
    "text": attrgetter("place"),
    "name": attrgetter("place"),
}
"""The orders of page.lua, and the sort key of a row in each."""

_Start = tuple[int | str, str | bytes, str]
"""The arguments of page.lua for a position."""


class ListedKey(NamedTuple):
    """A row in a reply: see lua/rows.lua."""

    text: bytes
    id: int
    created: int
    lease: int
    owner: bytes
    expires: int
    state: bytes
    left: int
    failures: int
    failed: int
    outcome: bytes
    reason: bytes
    client: bytes
    hint: bytes
    info: bytes
    seat: int
    seats: int
    acquired: int
    served: int
    place: Any = None
    """What page.lua adds: where the row stands in the order."""


class _Walk:
    """The rows read from one partition so far, and where to go on."""

    def __init__(self, start: _Start) -> None:
        self.start = start
        self.rows: list[tuple[ListedKey, ScriptCall]] = []  # with the call that each is from
        self.end: ListedKey | None = None  # the key examined last; None if there are no more


class Pages:
    """See the module."""

    def __init__(self, partitions: Partitions) -> None:
        self._partitions = partitions
        self._examined = max(_MIN_EXAMINED, PAGE_SCAN_LIMIT // partitions.count)

    async def page(self, query: PageQuery) -> tuple[list[Row], Position | None]:
        """A page, and the position that the next one starts after; None on the last. Raises StorageUnavailable."""
        order = "text" if query.prefix is not None else "name" if query.name is not None else query.order
        key = _ORDERS[order]
        start = await self._start_of(query)
        walks = [_Walk(start) for _ in range(self._partitions.count)]
        behind = list(range(len(walks)))
        for _ in range(_MAX_ROUNDS):
            await self._advance(walks, behind, query, order)
            horizon = min((walk.end for walk in walks if walk.end is not None), key=key, default=None)
            rows = sorted((row for walk in walks for row in walk.rows), key=lambda row: key(row[0]))
            # The page ends at `goal` or before it: rows that are read later can only come before it.
            goal = key(rows[query.limit - 1][0]) if len(rows) >= query.limit else None
            behind = [
                number
                for number, walk in enumerate(walks)
                if walk.end is not None and (goal is None or key(walk.end) < goal)
            ]
            if not behind:
                break
        last = horizon
        if horizon is not None:
            rows = [row for row in rows if key(row[0]) <= key(horizon)]
        if len(rows) > query.limit:
            rows = rows[: query.limit]
            last = rows[-1][0]
        position = None if last is None else _position(query, last)
        forget_seconds = self._partitions.rules.forget_seconds
        return [row_of(row, call.age(), forget_seconds) for row, call in rows], position

    async def _advance(self, walks: list[_Walk], behind: list[int], query: PageQuery, order: str) -> None:
        """Read more rows from the partitions that are behind."""
        share = -(-query.limit // len(walks))
        most = min(query.limit, share + 3 * isqrt(share) + 2)  # three standard deviations more
        state = "" if query.state is None else str(query.state)
        calls = [
            self._partitions.call(
                number, "page", (order, state, most, max(most, self._examined), *walks[number].start)
            )
            for number in behind
        ]
        for number, call, (more, *rows) in zip(behind, calls, await all_of(calls), strict=True):
            walk = walks[number]
            walk.end = ListedKey(*rows.pop()) if more else None
            walk.rows += [(ListedKey(*row), call) for row in rows]
            if walk.end is not None:
                place, text = walk.end.place, walk.end.text
                by_word = order in ("text", "name")
                walk.start = ("", place, _beginning(query)) if by_word else (place, text, "")

    async def _start_of(self, query: PageQuery) -> _Start:
        if query.after is None:
            return _beginning(query), "", _beginning(query)
        if query.name is not None:
            # Behind the key of that name: what follows the zero byte in NAMES is less than this byte.
            return "", str(query.after[0]).encode("utf-8", "surrogatepass") + b"\0\xff", query.name
        if query.prefix is not None:
            rank, id = map(int, query.after)
            least = max(query.prefix, shown_of(rank))
            found = (await self._partitions.places_of_ids([id]))[0]
            passed = b"" if found is None else found[1]
            return least, passed if passed.startswith(least.encode()) else "", query.prefix
        if query.order == "id":
            return int(query.after[0]), "", ""
        place, id, rank = map(int, query.after)
        found = (await self._partitions.places_of_ids([id]))[0]
        return place, shown_of(rank) if found is None else found[0], ""


def _beginning(query: PageQuery) -> str:
    return query.prefix or query.name or ""


def _position(query: PageQuery, row: ListedKey) -> Position:
    if query.name is not None:
        return (row.place.rpartition(b"\0")[0].decode("utf-8", "surrogatepass"),)
    if query.prefix is None and query.order == "id":
        return (row.id,)
    if query.prefix is not None:
        return (rank_of((row.hint or row.text).decode()), row.id)
    # Sealed keys with the same deadline are in order of their digests, all behind those in clear.
    return (row.place, row.id, 0 if row.hint else rank_of(row.text.decode()))


def hint_of(text: bytes, shown: bytes) -> str:
    """What may be shown of a text, or of a sealed one, of which a script replies it."""
    return shown.decode() or hint(text_in(text))


def text_in(field: bytes) -> str:
    """The text of a key in clear: a seat has a zero byte and its id behind it."""
    return field.partition(b"\0")[0].decode()


def row_of(row: ListedKey, age: float, forget_seconds: float) -> Row:
    """A Row from one in a reply; `age` is that of the call."""
    state = State(row.state.decode())
    details = details_in(row.info)
    return Row(
        row.id,
        hint_of(row.text, row.hint),
        state,
        row.owner.decode() or None,
        row.lease or None,
        moment(row.created / 1e6),
        expires_in(row.expires, age),
        seconds_left(row.left, age) if state is State.BLOCKED else None,
        seconds_left(row.left, age) if state is State.COOLING else None,
        row.failures if row.failed < forget_seconds * 1e6 else 0,
        Outcome(row.outcome.decode()) if row.outcome else None,
        row.reason.decode() or None,
        row.client.decode() or None,
        details.name,
        details.labels or {},
        details.pace,
        row.seat,
        row.seats,
        moment(row.acquired / 1e6) if row.acquired else None,
        row.served,
    )
