"""Every call of the API as data: what is sent, how the answer is read, and whether it may be repeated.

The blocking and the asynchronous client share it. The table is that of `repeatable`: whether a call may be sent
again after an attempt whose outcome is not known.

| call | after a lost answer | because |
| --- | --- | --- |
| get, list, stats, reveal | repeated | they change no key |
| keepalive | repeated | the last one counts |
| unblock with a lease number | repeated | the number protects whoever holds the key by then |
| delete | repeated | a deleted key never comes back |
| acquire that waits | repeated | a waiter must survive a restart; the first key, if any, is released by its deadline |
| acquire that does not wait, generate | not repeated | a second key would be taken or made, and the first be lost |
| unblock without a number | not repeated | it could free a key that someone else holds by then |

Any call that is known not to have happened is repeated (attempts.py).
"""

# ruff: noqa: D103 - calls are documented by the methods of KeyPool with the same names

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote, urlencode

from keypool.client.answers import (
    Done,
    GeneratedKey,
    KeptAlive,
    KeyLike,
    LeasedKey,
    Page,
    Revealed,
    Row,
    State,
    Stats,
    Unblocked,
    read,
    read_list,
    read_page,
)
from keypool.client.errors import KeyPoolError, NoKeyAvailable

T = TypeVar("T")
Item = TypeVar("Item")

MOST_ITEMS = 1000
"""Items that the server takes in one batch."""

UnblockItem = KeyLike | tuple[KeyLike, int]
"""A key of a batch unblock, with or without its lease number."""

StateName = State | Literal["available", "blocked"]
Order = Literal["id", "release", "expiry"]
Progress = Callable[[int], object]
"""Called with the number of items done, after each call of a batch in several."""


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One call. `path` is below /api/v1. `wait` is how long an acquire may wait, in seconds; None is for ever."""

    name: str
    method: str
    path: str
    read: Callable[[object], T]
    body: Mapping[str, Any] | None = None
    repeatable: bool = False
    wait: float | None = 0.0
    result_if_gone: Callable[[], T] | None = None  # makes the result if a retry gets unknown-key


def generate() -> Call[GeneratedKey]:
    return Call("generate", "POST", "/keys", lambda value: read(GeneratedKey, value))


def acquire(owner: str, wait: float | None) -> Call[LeasedKey]:
    """Raises ValueError for a wait that is not a number of seconds from 0, or None."""
    if wait is not None and not 0 <= wait < math.inf:
        raise ValueError(f"wait is a number of seconds, or None to wait for ever, not {wait!r}")
    body = {"owner": owner}
    return Call(
        "acquire", "POST", "/keys/acquire", lambda value: read(LeasedKey, value), body, wait != 0, wait
    )


def unblock(key: KeyLike, lease: int | None) -> Call[Unblocked]:
    """Without `lease`, uses the lease number of `key`, if it has one."""
    number = _number(key) if lease is None else lease
    body = {} if number is None else {"lease": number}
    path = f"{_path(key)}/unblock"
    return Call("unblock", "POST", path, lambda value: read(Unblocked, value), body, number is not None)


def keepalive(key: KeyLike) -> Call[KeptAlive]:
    path = f"{_path(key)}/keepalive"
    return Call("keepalive", "POST", path, lambda value: read(KeptAlive, value), repeatable=True)


def delete(key: KeyLike) -> Call[None]:
    return Call(
        "delete", "DELETE", _path(key), lambda value: None, repeatable=True, result_if_gone=lambda: None
    )


def get(key: KeyLike) -> Call[Row]:
    return Call("get", "GET", _path(key), lambda value: read(Row, value), repeatable=True)


def reveal(key: KeyLike) -> Call[Revealed]:
    path = f"{_path(key)}/reveal"
    return Call("reveal", "POST", path, lambda value: read(Revealed, value), repeatable=True)


def page(
    state: StateName | None, prefix: str | None, order: Order | None, limit: int | None, after: str | None
) -> Call[Page]:
    query = {"state": state, "prefix": prefix, "order": order, "limit": limit, "after": after}
    given = urlencode({name: value for name, value in query.items() if value is not None})
    return Call("list", "GET", f"/keys?{given}" if given else "/keys", read_page, repeatable=True)


def stats() -> Call[Stats]:
    return Call("stats", "GET", "/stats", lambda value: read(Stats, value), repeatable=True)


# -- batches of any size: generators of calls, which are sent each call's result and return the total

Batch = Generator[Call[Any], Any, T]


def generate_many(count: int, progress: Progress | None) -> Batch[list[GeneratedKey]]:
    made: list[GeneratedKey] = []
    for size in _sizes(count):
        body = {"op": "generate", "count": size}
        with_keys = Call("generate", "POST", "/batch", lambda value: read_list(GeneratedKey, value), body)
        made += yield from _part(with_keys, made)
        _report(progress, len(made))
    return made


def acquire_many(count: int, owner: str, progress: Progress | None) -> Batch[list[LeasedKey]]:
    """Fewer keys if fewer are available. Raises NoKeyAvailable if none is."""
    held: list[LeasedKey] = []
    for size in _sizes(count):
        body = {"op": "acquire", "count": size, "owner": owner}
        try:
            part = yield from _part(
                Call("acquire", "POST", "/batch", lambda value: read_list(LeasedKey, value), body), held
            )
        except NoKeyAvailable:
            if held:
                break
            raise
        held += part
        _report(progress, len(held))
        if len(part) < size:
            break
    return held


def keepalive_many(keys: Iterable[KeyLike], progress: Progress | None = None) -> Batch[Done]:
    return _many("keepalive", [(text(key), True) for key in keys], progress)


def unblock_many(items: Iterable[UnblockItem], progress: Progress | None = None) -> Batch[Done]:
    """Each call is repeatable only if all of its keys have a lease number."""
    pairs = [item if isinstance(item, tuple) else (item, _number(item)) for item in items]
    sent: list[tuple[Any, bool]] = [
        (text(key) if lease is None else {"key": text(key), "lease": lease}, lease is not None)
        for key, lease in pairs
    ]
    return _many("unblock", sent, progress)


def delete_many(keys: Iterable[KeyLike], progress: Progress | None = None) -> Batch[Done]:
    return _many("delete", [(text(key), True) for key in keys], progress)


def keepalive_part(keys: Sequence[str]) -> Call[Done]:
    """One batch of at most MOST_ITEMS keys."""
    body = {"op": "keepalive", "keys": keys}
    return Call("keepalive", "POST", "/batch", lambda value: read(Done, value), body, repeatable=True)


def _many(op: str, items: list[tuple[Any, bool]], progress: Progress | None) -> Batch[Done]:
    """`items`: for each key, its JSON and whether its call may be repeated."""
    done, repeated = 0, False
    unknown: list[str] = []
    stale: list[str] = []
    for part in parts(items):
        body = {"op": op, "keys": [sent for sent, _ in part]}
        repeatable = all(safe for _, safe in part)
        so_far = Done(done, unknown, stale, repeated)
        answer = yield from _part(
            Call(op, "POST", "/batch", lambda value: read(Done, value), body, repeatable), so_far
        )
        done, repeated = done + answer.done, repeated or answer.repeated
        unknown += answer.unknown
        stale += answer.stale
        _report(progress, done + len(unknown) + len(stale))
    return Done(done, unknown, stale, repeated)


def _part(call: Call[T], so_far: object) -> Generator[Call[T], T, T]:
    """One call of a batch; if it fails, the error's `partial` is `so_far`."""
    try:
        return (yield call)
    except KeyPoolError as error:
        error.partial = so_far
        raise


def _report(progress: Progress | None, count: int) -> None:
    if progress is not None:
        progress(count)


def parts(items: Sequence[Item]) -> list[Sequence[Item]]:
    """Split items into batches that the server accepts."""
    return [items[at : at + MOST_ITEMS] for at in range(0, len(items), MOST_ITEMS)]


def _sizes(count: int) -> list[int]:
    if count < 1:
        raise ValueError(f"count is at least 1, not {count}")
    whole, rest = divmod(count, MOST_ITEMS)
    return [MOST_ITEMS] * whole + ([rest] if rest else [])


# -- naming keys


def text(key: KeyLike) -> str:
    """The name of a key in requests. Raises ValueError for an empty text."""
    if isinstance(key, int):
        return f"id:{key}"
    name = key if isinstance(key, str) else key.secret
    if not name:
        raise ValueError("a key's text is not empty")
    return name


def _path(key: KeyLike) -> str:
    # Dots too: a text like ".." must not be taken for a step in the path.
    return "/keys/" + quote(text(key), safe="").replace(".", "%2E")


def _number(key: object) -> int | None:
    number = getattr(key, "lease", None)
    return number if isinstance(number, int) else None
