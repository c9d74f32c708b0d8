"""Lists: their query, and the opaque cursor of the next page (keyset pagination).

A cursor is a position in one order of a list. It consists of numbers, or is a name, and holds no key text. Its shape is
checked, but it isn't signed: an invented cursor leads to another place of the same list and reveals nothing.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec

from keypool.core.errors import BadRequest
from keypool.core.index import Position
from keypool.core.keys import MAX_NAME, MAX_OWNER, State
from keypool.core.keyset import PageQuery

_LETTER = {
    "prefix": "p", "name": "n", "id": "i", "release": "r", "ready": "c", "expiry": "e", "owner": "o", "owners": "h",
    "waiters": "w", "events": "v", "history": "l",
}  # fmt: skip
_STATE_OF_ORDER = {"release": State.BLOCKED, "ready": State.COOLING}
_LONGEST = 400  # a name of 63 characters of four bytes, and what is around it
_LONGEST_OF_OWNERS = 1600  # likewise, of an owner and a client
_WRONG_CURSOR = (
    "after must be the next of the previous page, of a list with the same prefix, name, owner and order"
)


class ListQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The query of a list, one field for each parameter."""

    state: Annotated[
        Literal["available", "blocked", "cooling", "quarantined"] | None,
        msgspec.Meta(description="only keys in this state"),
    ] = None
    prefix: Annotated[
        Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9]{1,4}$(?!\n)")] | None,
        msgspec.Meta(
            description="only generated keys whose text starts with this: 1 to 4 characters of A-Z a-z 0-9; not with "
            "order or name"
        ),
    ] = None
    order: Annotated[
        Literal["id", "release", "ready", "expiry"] | None,
        msgspec.Meta(
            description="id (default), release (blocked keys, soonest first), ready (cooling keys, soonest first) "
            "or expiry (soonest first)"
        ),
    ] = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=500, description="keys on a page, at most")] = 50
    after: Annotated[
        Annotated[str, msgspec.Meta(min_length=1, max_length=_LONGEST)] | None,
        msgspec.Meta(description="the next of the previous page"),
    ] = None
    name: Annotated[
        Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)] | None,
        msgspec.Meta(
            description="only keys whose name starts with this, in order of name; not with order or prefix"
        ),
    ] = None
    owner: Annotated[
        Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_OWNER)] | None,
        msgspec.Meta(
            description="only keys that this owner holds, in order of lease; not with order, prefix, name, or a state "
            "but blocked"
        ),
    ] = None


_Limit = Annotated[int, msgspec.Meta(ge=1, le=500, description="rows on a page, at most")]
_NEXT = msgspec.Meta(description="the next of the previous page")


class HolderQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The query of the list of those who hold keys."""

    after: Annotated[
        Annotated[str, msgspec.Meta(min_length=1, max_length=_LONGEST_OF_OWNERS)] | None, _NEXT
    ] = None
    limit: _Limit = 50


class PagedQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The parameters that the queries of the other lists share."""

    after: Annotated[Annotated[str, msgspec.Meta(min_length=1, max_length=_LONGEST)] | None, _NEXT] = None
    limit: _Limit = 50


class WaiterQuery(PagedQuery, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The query of the list of waiting acquires."""


class EventQuery(PagedQuery, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The query of the list of rare events."""

    kind: Annotated[
        Literal[
            "generated", "imported", "deleted", "expired", "revealed", "quarantined", "restored", "unblocked"
        ]
        | None,
        msgspec.Meta(
            description="only events of this kind: generated, imported, deleted, expired, revealed, quarantined, "
            "restored or unblocked (by an operator)"
        ),
    ] = None


class HistoryQuery(PagedQuery, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The query of the history of a key."""


def page_query(query: ListQuery) -> PageQuery:
    """The pool's query. Raises BadRequest for parameters that exclude each other, and for a wrong cursor."""
    if query.prefix is not None and query.order is not None:
        raise BadRequest("prefix can't be combined with order: a list by prefix is in order of the text")
    if query.name is not None and (query.prefix or query.order):
        raise BadRequest(
            "name can't be combined with prefix or order: a list by name is in order of the name"
        )
    if query.owner is not None and (
        query.prefix or query.name or query.order or query.state not in (None, "blocked")
    ):
        raise BadRequest(
            "owner can't be combined with prefix, name, order, or a state but blocked: a list by owner is of the keys "
            "that it holds, in order of lease"
        )
    state = State(query.state) if query.state else None
    order = query.order or "id"
    only = _STATE_OF_ORDER.get(order)
    if only is not None and state not in (None, only):
        raise BadRequest(f"order={order} lists {only} keys only: leave state out, or set state={only}")
    state = State.BLOCKED if query.owner is not None else only or state
    asked = PageQuery(state, query.prefix, order, query.limit, name=query.name, owner=query.owner)
    if query.after is not None:
        asked.after = decode(query.after, order_of(asked))
    return asked


def order_of(query: PageQuery) -> str:
    """The order of the list of this query, as cursors have it."""
    if query.owner is not None:
        return "owner"
    return "prefix" if query.prefix else "name" if query.name else query.order


def next_of(order: str, position: Position | None) -> str | None:
    """The `next` of a page in this order, after which the list goes on at a position; None if it doesn't."""
    return None if position is None else encode(order, position)


def position_after(after: str | None, order: str) -> Position | None:
    """The position of the `after` of a query, None for the first page. Raises BadRequest for a wrong cursor."""
    return None if after is None else decode(after, order)


def number_after(after: str | None, order: str) -> int | None:
    """The same in an order whose positions begin with a whole number, which is what counts."""
    return None if after is None else int(decode(after, order)[0])


def encode(order: str, position: Position) -> str:
    """The cursor of a position in the list of this order."""
    payload = msgspec.json.encode([_LETTER[order], *position])
    return base64.urlsafe_b64encode(payload).rstrip(b"=").decode("ascii")


def decode(text: str, order: str) -> Position:
    """The position of a cursor. Raises BadRequest unless it is a cursor of this order."""
    try:
        payload = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        letter, *position = msgspec.json.decode(payload, type=list[int | float | str])
    except (ValueError, binascii.Error, msgspec.MsgspecError):
        raise BadRequest(_WRONG_CURSOR) from None
    shape = _SHAPE[order]
    fits = all(is_part(part) for part, is_part in zip(position, shape, strict=False))
    if letter != _LETTER[order] or len(position) != len(shape) or not fits:
        raise BadRequest(_WRONG_CURSOR)
    return tuple(position)


def _is_name(part: float | str) -> bool:
    return isinstance(part, str) and 0 < len(part) <= MAX_NAME


def _is_owner(part: float | str) -> bool:
    return isinstance(part, str) and len(part) <= MAX_OWNER


def _is_number(part: float | str) -> bool:
    return not isinstance(part, str) and 0 <= part < 2**63


_SHAPE: dict[str, tuple[Callable[[float | str], bool], ...]] = {
    "prefix": (_is_number, _is_number),
    "name": (_is_name,),
    "id": (_is_number,),
    "release": (_is_number,) * 3,
    "ready": (_is_number,) * 3,
    "expiry": (_is_number,) * 3,
    "owner": (_is_number,),
    "owners": (_is_number, _is_owner, _is_number, _is_owner),
    "waiters": (_is_number,),
    "events": (_is_number,) * 3,
    "history": (_is_number,),
}
"""What the positions in each order consist of."""
