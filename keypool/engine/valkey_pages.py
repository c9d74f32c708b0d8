"""Lists over partitions: each answers with a page of its own, and these are merged.

A partition says how far it has looked, so a row counts only up to the place that every partition has come to;
from there the next page goes on. No row is missed, and a page costs O(partitions * (log n + rows)).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from operator import itemgetter
from typing import Any

from keypool.answers import Row
from keypool.engine.valkey_link import Reply
from keypool.index import Position, rank_of, shown_of
from keypool.keys import State, hint, moment
from keypool.pool import EXAMINED, PageQuery

_LEAST_EXAMINED = 50  # keys a partition, whatever the share of EXAMINED comes to
_TEXT, _ID, _PLACE = 0, 1, 7  # of a row in page.lua's answer


class Pages:
    """See the module. `ask_all` calls a script of all partitions, `texts_of` finds the texts of ids."""

    def __init__(
        self,
        ask_all: Callable[..., Awaitable[list[Reply]]],
        texts_of: Callable[[Sequence[int]], Awaitable[list[str | None]]],
        partitions: int,
    ) -> None:
        self._ask_all = ask_all
        self._texts_of = texts_of
        self._share = max(_LEAST_EXAMINED, EXAMINED // partitions)

    async def page(self, query: PageQuery) -> tuple[list[Any], Position | None]:
        """Rows as page.lua has them, and the position that the next page goes on from."""
        order = "text" if query.prefix is not None else query.order
        number, after, prefix = await self._start_of(query)
        most = max(query.limit, self._share)
        state = "" if query.state is None else str(query.state)
        replies = await self._ask_all("page", order, state, query.limit, most, number, after, prefix)
        return _merged(replies, query, _KEYS[order])

    async def _start_of(self, query: PageQuery) -> tuple[int | str, int | str, str]:
        """The words of page.lua that say where to begin."""
        after = query.after
        if query.prefix is not None:
            least, last = query.prefix, ""
            if after is not None:
                least = max(query.prefix, shown_of(int(after[0])))
                # If it is gone, those that share its first four characters are walked again: see TextIndex.
                passed = (await self._texts_of([int(after[1])]))[0]
                last = passed if passed is not None and passed.startswith(least) else ""
            return least, last, query.prefix
        if after is None:
            return "(0" if query.order == "release" else "-inf", -1, ""
        if query.order == "id":
            return int(after[0]), int(after[0]), ""
        return int(after[0]), int(after[1]), ""


_KEYS: dict[str, Callable[[Any], Any]] = {
    "id": itemgetter(_ID),
    "expiry": itemgetter(_PLACE, _ID),
    "release": itemgetter(_PLACE, _ID),
    "text": itemgetter(_TEXT),
}


def _merged(
    replies: Sequence[Reply], query: PageQuery, key: Callable[[Any], Any]
) -> tuple[list[Any], Position | None]:
    rows: list[Any] = []
    ends: list[Any] = []
    for _, more, *some in replies:
        if more and some and some[-1] is not None:
            ends.append(some.pop())
        rows += [row for row in some if row is not None]
    rows.sort(key=key)
    horizon = min(ends, key=key) if ends else None
    if horizon is not None:
        rows = [row for row in rows if key(row) <= key(horizon)]
    if len(rows) > query.limit:
        rows = rows[: query.limit]
        return rows, _position(query, rows[-1])
    return rows, None if horizon is None else _position(query, horizon)


def _position(query: PageQuery, row: Any) -> Position:
    if query.prefix is not None:
        return (rank_of(row[_TEXT].decode()), row[_ID])
    if query.order == "id":
        return (row[_ID],)
    return (row[_PLACE], row[_ID], 0)


def row_of(text: str | bytes, found: Sequence[Any], late: float) -> Row:
    """A row as it is told, from what get.lua and page.lua say; `late` is subtracted from lengths of time."""
    id, created, lease, owner, expires, release = found[:6]
    text = text.decode() if isinstance(text, bytes) else text
    return Row(
        id,
        hint(text),
        State.BLOCKED if release else State.AVAILABLE,
        owner.decode() or None,
        lease or None,
        moment(created / 1e6),
        round(max(0.0, expires / 1e6 - late), 3),
        round(max(0.0, release / 1e6 - late), 3) if release else None,
    )
