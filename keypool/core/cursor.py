"""Lists: their query, and the opaque cursor of the next page (keyset pagination).

A cursor is a position in one order of a list. It consists of numbers, or is a name, and holds no key text. Its shape is
checked, but it isn't signed: an invented cursor leads to another place of the same list and reveals nothing.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Literal

import msgspec

from keypool.core.errors import BadRequest
from keypool.core.index import Position
from keypool.core.keys import MAX_NAME, State
from keypool.core.keyset import PageQuery

_LETTER = {"prefix": "p", "name": "n", "id": "i", "release": "r", "ready": "c", "expiry": "e", "history": "h"}
_LENGTH = {"prefix": 2, "name": 1, "id": 1, "release": 3, "ready": 3, "expiry": 3, "history": 1}
_STATE_OF_ORDER = {"release": State.BLOCKED, "ready": State.COOLING}
_LONGEST = 400  # a name of 63 characters of four bytes, and what is around it
_WRONG_CURSOR = "after must be the next of the previous page, of a list with the same prefix, name and order"


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


class HistoryQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The query of the history of a key, one field for each parameter."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=500, description="leases on a page, at most")] = 50
    after: Annotated[
        Annotated[str, msgspec.Meta(min_length=1, max_length=_LONGEST)] | None,
        msgspec.Meta(description="the next of the previous page"),
    ] = None


def page_query(query: ListQuery) -> PageQuery:
    """The pool's query. Raises BadRequest for parameters that exclude each other, and for a wrong cursor."""
    if query.prefix is not None and query.order is not None:
        raise BadRequest("prefix can't be combined with order: a list by prefix is in order of the text")
    if query.name is not None and (query.prefix or query.order):
        raise BadRequest(
            "name can't be combined with prefix or order: a list by name is in order of the name"
        )
    state = State(query.state) if query.state else None
    order = query.order or "id"
    only = _STATE_OF_ORDER.get(order)
    if only is not None and state not in (None, only):
        raise BadRequest(f"order={order} lists {only} keys only: leave state out, or set state={only}")
    state = only or state
    asked = PageQuery(state, query.prefix, order, query.limit, name=query.name)
    if query.after is not None:
        asked.after = decode(query.after, _order_of(asked))
    return asked


def _order_of(query: PageQuery) -> str:
    return "prefix" if query.prefix else "name" if query.name else query.order


def encode(query: PageQuery, position: Position) -> str:
    """The cursor of a position in the list of this query."""
    return _encoded(_order_of(query), position)


def encode_lease(lease: int) -> str:
    """The cursor of the page of a history that begins behind this lease."""
    return _encoded("history", (lease,))


def lease_before(query: HistoryQuery) -> int | None:
    """The lease behind which a page of a history begins, None for the first. Raises BadRequest for a wrong cursor."""
    return None if query.after is None else int(decode(query.after, "history")[0])


def _encoded(order: str, position: Position) -> str:
    payload = msgspec.json.encode([_LETTER[order], *position])
    return base64.urlsafe_b64encode(payload).rstrip(b"=").decode("ascii")


def decode(text: str, order: str) -> Position:
    """The position of a cursor. Raises BadRequest unless it is a cursor of this order."""
    try:
        payload = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        letter, *position = msgspec.json.decode(payload, type=list[int | float | str])
    except (ValueError, binascii.Error, msgspec.MsgspecError):
        raise BadRequest(_WRONG_CURSOR) from None
    fits = _is_name if order == "name" else _is_number
    if letter != _LETTER.get(order) or len(position) != _LENGTH[order] or not all(map(fits, position)):
        raise BadRequest(_WRONG_CURSOR)
    return tuple(position)


def _is_name(part: float | str) -> bool:
    return isinstance(part, str) and 0 < len(part) <= MAX_NAME


def _is_number(part: float | str) -> bool:
    return not isinstance(part, str) and 0 <= part < 2**63
