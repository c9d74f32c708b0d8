"""Keys to be imported, as JSON: checked before anything is sent, and divided into bodies that the server accepts.

Messages name an item by its number and never show what is in it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from keypool.client.answers import Imported, Imports

NewKey = str | tuple[Any, ...] | Mapping[str, Any]
"""A key to be imported: its secret alone; a tuple of secret, name, labels, data, pace, seats, or of the first few of
these; or a mapping with these names."""

Exists = Literal["skip", "update"]
"""What becomes of a key that the pool has already."""

MOST_ITEMS = 1000
"""What the server takes in one batch of any kind."""
MOST_BYTES = 4 * 1024 * 1024
"""What the server takes in one batch of imports."""

_MEMBERS = ("secret", "name", "labels", "data", "pace", "seats")
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode
_AROUND = 1024  # bytes of a body beside its items
_TOO_LARGE = Imported("failed", None, "payload-too-large", "this item alone is larger than a request may be")


def new_key(item: NewKey, *, expire: bool = False) -> bytes:
    """An item as JSON. Raises ValueError."""
    members = {name: member_of(name, value) for name, value in _named(item) if value is not None}
    if "secret" not in members:
        raise ValueError("a key to be imported has a secret")
    return _json(members | ({"expire": True} if expire else {}))


def _named(item: NewKey) -> Iterable[tuple[str, Any]]:
    if isinstance(item, str):
        return [("secret", item)]
    if isinstance(item, Mapping):
        return item.items()
    if type(item) is tuple and 1 <= len(item) <= len(_MEMBERS):
        return zip(_MEMBERS, item, strict=False)
    raise ValueError(
        "a key to be imported is its secret, a tuple of secret, name, labels, data, pace and seats, or a dict"
    )


def member_of(name: str, value: Any) -> Any:
    """The value, if it has the type of the member of this name. Raises ValueError."""
    if name in ("secret", "name", "key"):
        fits, kind = isinstance(value, str), "a string"
    elif name == "labels":
        fits = isinstance(value, Mapping) and all(
            isinstance(each, str) for pair in value.items() for each in pair
        )
        kind = "a dict of strings"
    elif name == "seats":
        fits, kind = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    elif name in ("data", "pace"):
        fits, kind = isinstance(value, Mapping), "a dict"
    else:
        # Only a typo is shown: a mapping of secrets to something has secrets for names.
        shown = f"no {name!r}" if difflib.get_close_matches(str(name), _MEMBERS, n=1) else "nothing else"
        raise ValueError(f"a key has {', '.join(_MEMBERS)}, and {shown}")
    if not fits:
        raise ValueError(f"{name} is {kind}, not {type(value).__name__}")
    return dict(value) if isinstance(value, Mapping) else value


def _json(members: Mapping[str, Any]) -> bytes:
    try:
        return _encode(members).encode()
    except UnicodeEncodeError:
        problem = "it has a character that UTF-8 doesn't have (a lone surrogate)"
    except (TypeError, ValueError, RecursionError):
        problem = "its data can't be written as JSON"
    raise ValueError(problem)  # without the error above, whose message may show a part of it


def batches(items: Iterable[NewKey]) -> Iterator[list[bytes | None]]:
    """The items as JSON, divided into batches that the server accepts; None for an item that is too large for any.

    Raises ValueError, with the number of the item, counted from 0.
    """
    part: list[bytes | None] = []
    size = _AROUND
    for number, item in enumerate(items):
        try:
            encoded: bytes | None = new_key(item)
        except ValueError as error:
            raise ValueError(f"item {number}: {error}") from None
        length = len(encoded or b"") + 1
        if length + _AROUND > MOST_BYTES:
            encoded, length = None, 0
        if len(part) == MOST_ITEMS or size + length > MOST_BYTES:
            yield part
            part, size = [], _AROUND
        part.append(encoded)
        size += length
    if part:
        yield part


def body_of(items: Sequence[bytes], exists: Exists, expire: bool) -> bytes:
    """The body of a batch."""
    more = b',"expire":true' if expire else b""
    return b'{"op":"import","exists":"%s"%s,"keys":[%s]}' % (exists.encode(), more, b",".join(items))


def with_refused(part: Sequence[bytes | None], answer: Imports) -> Imports:
    """The answer of a batch, with a failure for each item that was too large to be sent."""
    if None not in part:
        return answer
    sent = iter(answer.results)
    results = [_TOO_LARGE if item is None else next(sent) for item in part]
    return dataclasses.replace(answer, failed=answer.failed + part.count(None), results=results)
