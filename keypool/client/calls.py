"""Every call of the API once, as data: what is sent, how the answer is read, and whether it may be repeated.

The synchronous and the asynchronous client share all of this; neither knows a path. What matters most here
is `repeatable`: whether a call may be sent again after one whose fate is unknown.

| call | after a lost answer | because |
| --- | --- | --- |
| get, list, stats, reveal | repeated | they change no key |
| keepalive | repeated | twice is as good as once: 300 s from the later one |
| unblock with a lease number | repeated | the number protects whoever has the key by then |
| delete | repeated | gone is gone: no key comes back, none is made twice |
| unblock without one | never | by then the key may be somebody else's, whom it would rob |
| acquire, generate | never | a second key would be taken or made, and the first left with nobody |

Calls of which it is known that they didn't happen are all repeated alike (retry.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urlencode

from keypool.client.shapes import (
    Done,
    GeneratedKey,
    KeptAlive,
    KeyLike,
    LeasedKey,
    Page,
    Revealed,
    Row,
    Stats,
    Unblocked,
    read,
    read_list,
    read_page,
)

T = TypeVar("T")
Item = TypeVar("Item")

BASE = "/api/v1"
MOST_ITEMS = 1000
"""Items that the server takes in one batch."""

UnblockItem = KeyLike | tuple[KeyLike, int]
"""A key of a batch unblock, with or without its lease number."""


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One call: `path` is below /api/v1, `wait` the seconds that the server may take before it answers."""

    name: str
    method: str
    path: str
    read: Callable[[object], T]
    body: Mapping[str, Any] | None = None
    repeatable: bool = False
    wait: float = 0.0
    gone: Callable[[], T] | None = None  # the result, if a repetition finds the key gone


def generate() -> Call[GeneratedKey]:
    """Make a key."""
    return Call("generate", "POST", "/keys", lambda value: read(GeneratedKey, value))


def acquire(owner: str | None, wait: float) -> Call[LeasedKey]:
    """Be served a key, now or within `wait` seconds."""
    body: dict[str, Any] = {} if owner is None else {"owner": owner}
    if not 0 <= wait <= 60:
        raise ValueError(f"wait is from 0 to 60 seconds, not {wait!r}")
    return Call("acquire", "POST", "/keys/acquire", lambda value: read(LeasedKey, value), body, wait=wait)


def unblock(key: KeyLike, lease: int | None) -> Call[Unblocked]:
    """Give a key back; a LeasedKey, or what else knows its number, brings its lease along."""
    number = _number(key) if lease is None else lease
    body = {} if number is None else {"lease": number}
    path = f"{_path(key)}/unblock"
    return Call("unblock", "POST", path, lambda value: read(Unblocked, value), body, number is not None)


def keepalive(key: KeyLike) -> Call[KeptAlive]:
    """Put off a key's expiry."""
    path = f"{_path(key)}/keepalive"
    return Call("keepalive", "POST", path, lambda value: read(KeptAlive, value), repeatable=True)


def delete(key: KeyLike) -> Call[None]:
    """Purge a key."""
    return Call("delete", "DELETE", _path(key), _nothing, repeatable=True, gone=lambda: None)


def get(key: KeyLike) -> Call[Row]:
    """How a key stands."""
    return Call("get", "GET", _path(key), lambda value: read(Row, value), repeatable=True)


def reveal(key: KeyLike) -> Call[Revealed]:
    """A key's text."""
    path = f"{_path(key)}/reveal"
    return Call("reveal", "POST", path, lambda value: read(Revealed, value), repeatable=True)


def page(
    state: str | None, prefix: str | None, order: str | None, limit: int | None, after: str | None
) -> Call[Page]:
    """One page of a list."""
    query = {"state": state, "prefix": prefix, "order": order, "limit": limit, "after": after}
    given = urlencode({name: value for name, value in query.items() if value is not None})
    return Call("list", "GET", f"/keys?{given}" if given else "/keys", read_page, repeatable=True)


def stats() -> Call[Stats]:
    """All counts."""
    return Call("stats", "GET", "/stats", lambda value: read(Stats, value), repeatable=True)


# -- batches, of at most MOST_ITEMS each


def generate_batch(count: int) -> Call[list[GeneratedKey]]:
    """Make keys, all or none."""
    body = {"op": "generate", "count": count}
    return Call("generate", "POST", "/batch", lambda value: read_list(GeneratedKey, value), body)


def acquire_batch(count: int, owner: str | None) -> Call[list[LeasedKey]]:
    """Be served up to `count` keys."""
    body = {"op": "acquire", "count": count} | ({} if owner is None else {"owner": owner})
    return Call("acquire", "POST", "/batch", lambda value: read_list(LeasedKey, value), body)


def keepalive_batch(keys: Sequence[KeyLike]) -> Call[Done]:
    """Put off expiries."""
    return _batch("keepalive", [text(key) for key in keys], repeatable=True)


def unblock_batch(items: Sequence[UnblockItem]) -> Call[Done]:
    """Give keys back. Repeatable only if each has its lease number."""
    pairs = [item if isinstance(item, tuple) else (item, _number(item)) for item in items]
    sent = [text(key) if lease is None else {"key": text(key), "lease": lease} for key, lease in pairs]
    return _batch("unblock", sent, repeatable=all(lease is not None for _, lease in pairs))


def delete_batch(keys: Sequence[KeyLike]) -> Call[Done]:
    """Purge keys."""
    return _batch("delete", [text(key) for key in keys], repeatable=True)


def _batch(op: str, keys: Sequence[Any], *, repeatable: bool) -> Call[Done]:
    body = {"op": op, "keys": keys}
    return Call(op, "POST", "/batch", lambda value: read(Done, value), body, repeatable)


def parts(items: Iterable[Item]) -> list[list[Item]]:
    """The items in lists that the server takes in one batch each."""
    whole = list(items)
    return [whole[at : at + MOST_ITEMS] for at in range(0, len(whole), MOST_ITEMS)]


def counts(count: int) -> list[int]:
    """A number of keys in numbers that the server takes in one batch each. Raises ValueError below 1."""
    if count < 1:
        raise ValueError(f"count is at least 1, not {count}")
    whole, rest = divmod(count, MOST_ITEMS)
    return [MOST_ITEMS] * whole + ([rest] if rest else [])


# -- naming keys


def text(key: KeyLike) -> str:
    """How a key is named to the server. Raises ValueError for an empty text."""
    if isinstance(key, int):
        return f"id:{key}"
    name = key if isinstance(key, str) else key.key
    if not name:
        raise ValueError("a key's text is not empty")
    return name


def _path(key: KeyLike) -> str:
    return "/keys/" + quote(text(key), safe="")


def _number(key: object) -> int | None:
    number = getattr(key, "lease", None)
    return number if isinstance(number, int) else None


def _nothing(value: object) -> None:
    return None
