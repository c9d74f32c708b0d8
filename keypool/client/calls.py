"""Every call of the API as data: what is sent, how the answer is read, and whether it may be repeated.

The blocking and the asynchronous client share it. The table is that of `repeatable`: whether a call may be sent
again after an attempt whose outcome is not known.

| call | after a lost answer | because |
| --- | --- | --- |
| get, list, stats, reveal, owners, waiters, events | repeated | they change no key |
| keepalive | repeated | the last one counts |
| unblock with a lease number or handle, extend | repeated | the number protects whoever holds the key by then |
| delete, also of a pool | repeated | a deleted key never comes back |
| quarantine, restore, update; pools and their settings; rekey | repeated | the last one counts |
| import | repeated | a secret that the pool has is found, and not imported again |
| replace, by id or handle | repeated | the key has that text then, as after the first |
| replace, by the old text | not repeated | the first attempt may have made it unknown |
| acquire | repeated | by its Idempotency-Key the server knows it again, and answers with the same lease |
| generate | not repeated | a second key would be made, and the first be lost |
| unblock without a number | not repeated | it could free a key that someone else holds by then |
| release of an owner | not repeated | it could end leases that began since |

Any call that is known not to have happened is repeated (attempts.py).

How a key is named in a URL, where proxies log it: a lease by its handle, and to the calls that are for admins any
object by its id, so no secret of theirs is there. The text is there only if the program gives nothing else (a str), or
if an older server's lease has no handle. Batches name keys in the body, by their texts, which their answers repeat.
"""

# ruff: noqa: D103 - calls are documented by the methods of KeyPool with the same names

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote, urlencode

from keypool.client.answers import (
    Done,
    Extended,
    GeneratedKey,
    Holder,
    ImportedKey,
    Imports,
    KeptAlive,
    KeyLike,
    LeasedKey,
    Outcome,
    Page,
    Part,
    PastLease,
    PoolInfo,
    RareEvent,
    Rekeying,
    Revealed,
    Row,
    State,
    Stats,
    Unblocked,
    Waiting,
    read,
    read_imports,
    read_list,
    read_page,
    read_part,
    read_released,
)
from keypool.client.errors import KeyPoolError, NoKeyAvailable, ShareSpent, UnexpectedAnswer
from keypool.client.imports import (
    MOST_ITEMS,
    Exists,
    NewKey,
    batches,
    body_of,
    member_of,
    new_key,
    with_refused,
)
from keypool.client.reports import checked_retry_after, checked_uses
from keypool.client.settings import pool_name

T = TypeVar("T")
Item = TypeVar("Item")

_HANDLE = re.compile(r"h:[0-9]+\.[0-9]+\.[A-Za-z0-9_-]{11}", re.ASCII)

MOST_ROWS = 500
"""Rows of a list in one call."""

OutcomeName = Outcome | Literal["ok", "rate_limited", "error", "invalid"]


@dataclass(frozen=True, slots=True)
class Unblock:
    """A key of a batch unblock, with what its holder reports. A report needs a lease number, here or in `key`."""

    key: KeyLike = field(repr=False)
    lease: int | None = None
    outcome: OutcomeName | None = None
    retry_after: float | None = None
    reason: str | None = None
    uses: int | None = None


LeaseItem = KeyLike | tuple[KeyLike, int]
"""A key of a batch, with or without its lease number."""

UnblockItem = LeaseItem | Unblock
"""A key of a batch unblock."""

StateName = State | Literal["available", "blocked", "cooling", "quarantined"]
Order = Literal["id", "release", "ready", "expiry"]
Progress = Callable[[int], object]
"""Called with the number of items done, after each call of a batch in several."""


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One call. `path` is below that of the pool, or with `of_server` below /api/v1.

    `wait` is how long an acquire may wait, in seconds; None is for ever. `content` is a body that is encoded already.
    """

    name: str
    method: str
    path: str = field(repr=False)
    read: Callable[[object], T]
    body: Mapping[str, Any] | None = field(default=None, repr=False)
    repeatable: bool = False
    wait: float | None = 0.0
    idempotency_key: str | None = None
    result_if_gone: Callable[[], T] | None = (
        None  # makes the result if a retry gets unknown-key or unknown-pool
    )
    content: bytes | None = field(default=None, repr=False)
    of_server: bool = False


def generate() -> Call[GeneratedKey]:
    return Call("generate", "POST", "/keys", lambda value: read(GeneratedKey, value))


def acquire(owner: str, wait: float | None, block_seconds: float | None = None) -> Call[LeasedKey]:
    """Raises ValueError for a wait that is not a number of seconds from 0, or None, and a wrong block_seconds."""
    if wait is not None and not 0 <= wait < math.inf:
        raise ValueError(f"wait is a number of seconds, or None to wait for ever, not {wait!r}")
    body = _given(owner=owner, block_seconds=_seconds("block_seconds", block_seconds))
    return Call(
        "acquire", "POST", "/keys/acquire", lambda value: read(LeasedKey, value), body, repeatable=True,
        wait=wait, idempotency_key=_new_idempotency_key(),
    )  # fmt: skip


def unblock(
    key: KeyLike,
    lease: int | None,
    outcome: OutcomeName | None = None,
    retry_after: float | None = None,
    reason: str | None = None,
    *,
    uses: int | None = None,
) -> Call[Unblocked]:
    """Without `lease`, for the lease of `key`, if it is one. Raises ValueError for a wrong retry_after, and uses."""
    named = handle(key) is not None
    number = _number(key) if lease is None and not named else lease
    retry_after = checked_retry_after(retry_after)
    body = _given(
        lease=number, outcome=outcome, retry_after=retry_after, reason=reason, uses=checked_uses(uses)
    )
    path = f"{_path(key)}/unblock"
    repeatable = named or number is not None
    return Call("unblock", "POST", path, lambda value: read(Unblocked, value), body, repeatable)


def extend(key: KeyLike, seconds: float | None, lease: int | None) -> Call[Extended]:
    """Without `lease`, the lease of `key`. Raises ValueError for wrong seconds."""
    number = _number(key) if lease is None and handle(key) is None else lease
    body = _given(lease=number, seconds=_seconds("seconds", seconds))
    path = f"{_path(key)}/extend"
    return Call("extend", "POST", path, lambda value: read(Extended, value), body, repeatable=True)


def quarantine(key: KeyLike, reason: str | None, now: bool) -> Call[Row]:
    path = f"{_path(key, by_id=True)}/quarantine"
    body = _given(reason=reason, now=now or None)
    return Call("quarantine", "POST", path, lambda value: read(Row, value), body, repeatable=True)


def restore(key: KeyLike) -> Call[Row]:
    path = f"{_path(key, by_id=True)}/restore"
    return Call("restore", "POST", path, lambda value: read(Row, value), repeatable=True)


def keepalive(key: KeyLike) -> Call[KeptAlive]:
    path = f"{_path(key)}/keepalive"
    return Call("keepalive", "POST", path, lambda value: read(KeptAlive, value), repeatable=True)


def delete(key: KeyLike) -> Call[None]:
    path = _path(key, by_id=True)
    return Call("delete", "DELETE", path, lambda value: None, repeatable=True, result_if_gone=lambda: None)


def get(key: KeyLike) -> Call[Row]:
    return Call("get", "GET", _path(key), lambda value: read(Row, value), repeatable=True)


def reveal(key: KeyLike) -> Call[Revealed]:
    path = f"{_path(key, by_id=True)}/reveal"
    return Call("reveal", "POST", path, lambda value: read(Revealed, value), repeatable=True)


def import_key(
    secret: str,
    name: str | None,
    labels: Mapping[str, str] | None,
    data: Mapping[str, Any] | None,
    pace: Mapping[str, float] | None,
    *,
    seats: int | None,
    expire: bool,
) -> Call[ImportedKey]:
    """Raises ValueError for a wrong type, or a text that UTF-8 can't hold."""
    item = {"secret": secret, "name": name, "labels": labels, "data": data, "pace": pace, "seats": seats}
    content = new_key(item, expire=expire)
    return Call(
        "import", "POST", "/keys", lambda value: read(ImportedKey, value), content=content, repeatable=True
    )


def update(
    key: KeyLike,
    name: str | None,
    labels: Mapping[str, str] | None,
    data: Mapping[str, Any] | None,
    pace: Mapping[str, float] | None,
    *,
    seats: int | None,
) -> Call[Row]:
    """Raises ValueError for a wrong type, and if nothing is given."""
    given = {"name": name, "labels": labels, "data": data, "pace": pace, "seats": seats}
    body = {each: member_of(each, value) for each, value in given.items() if value is not None}
    if not body:
        raise ValueError(
            "update changes the name, the labels, the data, the pace or the seats: give one of them"
        )
    path = _path(key, by_id=True)
    return Call("update", "PATCH", path, lambda value: read(Row, value), body, repeatable=True)


def replace(key: KeyLike, secret: str) -> Call[Row]:
    """Raise ValueError unless the secret is text."""
    body = {"secret": member_of("secret", secret)}
    path = f"{_path(key, by_id=True)}/replace"
    repeatable = not isinstance(key, str) or _is_handle(key) or is_id(key)
    return Call("replace", "POST", path, lambda value: read(Row, value), body, repeatable)


def find(text: str) -> Call[Row]:
    body = {"key": member_of("key", text)}
    return Call("find", "POST", "/keys/find", lambda value: read(Row, value), body, repeatable=True)


def page(
    state: StateName | None,
    prefix: str | None,
    order: Order | None,
    limit: int | None,
    after: str | None,
    *,
    name: str | None = None,
    owner: str | None = None,
) -> Call[Page]:
    path = _with_query(
        "/keys",
        state=state, prefix=prefix, name=name, owner=owner, order=order, limit=limit, after=after,
    )  # fmt: skip
    return Call("list", "GET", path, read_page, repeatable=True)


def owners(after: str | None) -> Call[Part[Holder]]:
    return _part_of("owners", Holder, after)


def release_owner(owner: str, client: str | None) -> Call[int]:
    body = _given(owner=owner, client=client)
    return Call("owners-release", "POST", "/owners/release", read_released, body)


def waiters(after: str | None) -> Call[Part[Waiting]]:
    return _part_of("waiters", Waiting, after)


def events(kind: str | None, after: str | None) -> Call[Part[RareEvent]]:
    return _part_of("events", RareEvent, after, kind=kind)


def _part_of(name: str, row: type[T], after: str | None, **query: str | None) -> Call[Part[T]]:
    path = _with_query(f"/{name}", **query, limit=MOST_ROWS, after=after)
    return Call(name, "GET", path, lambda value: read_part(row, value, name), repeatable=True)


def _with_query(path: str, **query: str | int | None) -> str:
    given = urlencode({name: value for name, value in query.items() if value is not None})
    return f"{path}?{given}" if given else path


def history(key: KeyLike, limit: int, after: str | None) -> Call[Part[PastLease]]:
    path = _with_query(f"{_path(key, by_id=True)}/history", limit=limit, after=after)
    return Call("history", "GET", path, lambda value: read_part(PastLease, value, "history"), repeatable=True)


def stats() -> Call[Stats]:
    return Call("stats", "GET", "/stats", lambda value: read(Stats, value), repeatable=True)


# -- pools, and the whole server


def pools() -> Call[list[PoolInfo]]:
    return Call(
        "pools", "GET", "/pools", lambda value: read_list(PoolInfo, value, "pools"), repeatable=True,
        of_server=True,
    )  # fmt: skip


def get_pool(name: str) -> Call[PoolInfo]:
    return _of_pool("pool", "GET", name)


def put_pool(name: str, settings: Mapping[str, Any]) -> Call[PoolInfo]:
    return _of_pool("put pool", "PUT", name, settings)


def change_pool(name: str, settings: Mapping[str, Any]) -> Call[PoolInfo]:
    return _of_pool("change pool", "PATCH", name, settings)


def _of_pool(call: str, method: str, name: str, settings: Mapping[str, Any] | None = None) -> Call[PoolInfo]:
    """Raises ValueError for a name that no pool can have."""
    return Call(
        call, method, f"/pools/{pool_name(name)}", lambda value: read(PoolInfo, value), settings,
        repeatable=True, of_server=True,
    )  # fmt: skip


def delete_pool(name: str, drain: bool, now: bool) -> Call[PoolInfo | None]:
    """Raises ValueError for a name that no pool can have, and for `now` without `drain`."""
    if now and not drain:
        raise ValueError("now goes with drain: an empty pool is deleted at once anyway")
    query = urlencode({each: "true" for each, given in (("drain", drain), ("now", now)) if given})
    path = f"/pools/{pool_name(name)}" + (f"?{query}" if query else "")
    return Call(
        "delete pool", "DELETE", path, lambda value: None if value is None else read(PoolInfo, value),
        repeatable=True, result_if_gone=lambda: None, of_server=True,
    )  # fmt: skip


def rekey() -> Call[Rekeying]:
    return _rekey("POST")


def rekeying() -> Call[Rekeying]:
    return _rekey("GET")


def _rekey(method: str) -> Call[Rekeying]:
    return Call(
        "rekey", method, "/rekey", lambda value: read(Rekeying, value), repeatable=True, of_server=True
    )


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


def acquire_many(
    count: int, owner: str, block_seconds: float | None, progress: Progress | None
) -> Batch[list[LeasedKey]]:
    """Fewer keys if fewer are available. Raises NoKeyAvailable if none is."""
    held: list[LeasedKey] = []
    block_seconds = _seconds("block_seconds", block_seconds)
    for size in _sizes(count):
        body = _given(op="acquire", count=size, owner=owner, block_seconds=block_seconds)
        call = Call(
            "acquire", "POST", "/batch", lambda value: read_list(LeasedKey, value), body, repeatable=True,
            idempotency_key=_new_idempotency_key(),
        )  # fmt: skip
        try:
            part = yield from _part(call, held)
        except (NoKeyAvailable, ShareSpent):
            if held:
                break
            raise
        held += part
        _report(progress, len(held))
        if len(part) < size:
            break
    return held


def import_many(
    items: Iterable[NewKey], exists: Exists, expire: bool, progress: Progress | None
) -> Batch[Imports]:
    """Raises ValueError for a wrong item before anything is sent."""
    if exists not in ("skip", "update"):
        raise ValueError(f"exists is skip or update, not {exists!r}")
    return _import_many(list(batches(items)), exists, expire, progress)


def _import_many(
    parts: Sequence[Sequence[bytes | None]], exists: Exists, expire: bool, progress: Progress | None
) -> Batch[Imports]:
    total = Imports()
    for part in parts:
        sent = [item for item in part if item is not None]
        answer = Imports()
        if sent:
            content = body_of(sent, exists, expire)
            call = Call("import", "POST", "/batch", read_imports, content=content, repeatable=True)
            answer = yield from _part(call, total)
            if len(answer.results) != len(sent):
                raise UnexpectedAnswer("not the expected answer: not a result for each item")
        total += with_refused(part, answer)
        _report(progress, len(total.results))
    return total


def keepalive_many(keys: Iterable[KeyLike], progress: Progress | None = None) -> Batch[Done]:
    return _many("keepalive", [(text(key), True) for key in keys], progress)


def unblock_many(items: Iterable[UnblockItem], progress: Progress | None = None) -> Batch[Done]:
    """Each call is repeatable only if all of its keys have a lease number. Raises ValueError as `unblock` does."""
    return _many("unblock", [_unblock_item(item) for item in items], progress)


def _unblock_item(item: UnblockItem) -> tuple[Any, bool]:
    if isinstance(item, Unblock):
        key, lease = item.key, item.lease
        retry_after = checked_retry_after(item.retry_after)
        uses = checked_uses(item.uses)
        report = _given(outcome=item.outcome, retry_after=retry_after, reason=item.reason, uses=uses)
    else:
        key, lease = item if isinstance(item, tuple) else (item, None)
        report = {}
    number = _number(key) if lease is None else lease
    sent = {"key": text(key), **_given(lease=number), **report}
    return (sent if len(sent) > 1 else sent["key"]), number is not None or _is_handle(key)


def extend_many(
    items: Iterable[LeaseItem], seconds: float | None, progress: Progress | None = None
) -> Batch[Done]:
    """Raises ValueError for wrong seconds."""
    seconds = _seconds("seconds", seconds)
    pairs = [item if isinstance(item, tuple) else (item, _number(item)) for item in items]
    sent = [(_given(key=text(key), lease=lease, seconds=seconds), True) for key, lease in pairs]
    return _many("extend", sent, progress)


def quarantine_many(
    keys: Iterable[KeyLike], reason: str | None, now: bool, progress: Progress | None = None
) -> Batch[Done]:
    items = [(text(key), True) for key in keys]
    return _many("quarantine", items, progress, **_given(reason=reason, now=now or None))


def restore_many(keys: Iterable[KeyLike], progress: Progress | None = None) -> Batch[Done]:
    return _many("restore", [(text(key), True) for key in keys], progress)


def delete_many(keys: Iterable[KeyLike], progress: Progress | None = None) -> Batch[Done]:
    return _many("delete", [(text(key), True) for key in keys], progress)


def keepalive_part(keys: Sequence[str]) -> Call[Done]:
    """One batch of at most MOST_ITEMS keys."""
    body = {"op": "keepalive", "keys": keys}
    return Call("keepalive", "POST", "/batch", lambda value: read(Done, value), body, repeatable=True)


def _many(op: str, items: list[tuple[Any, bool]], progress: Progress | None, **more: Any) -> Batch[Done]:
    """`items`: for each key, its JSON and whether its call may be repeated. `more`: further members of each body."""
    total = Done(0, [])
    for part in parts(items):
        body = {"op": op, "keys": [sent for sent, _ in part], **more}
        repeatable = all(safe for _, safe in part)
        answer = yield from _part(
            Call(op, "POST", "/batch", lambda value: read(Done, value), body, repeatable), total
        )
        total = Done(
            total.done + answer.done,
            total.unknown + answer.unknown,
            total.stale + answer.stale,
            total.over + answer.over,
            total.limit + answer.limit,
            total.repeated or answer.repeated,
            total.many_seats + answer.many_seats,
        )
        others = (total.unknown, total.stale, total.over, total.limit, total.many_seats)
        _report(progress, total.done + sum(map(len, others)))
    return total


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


def handle(key: KeyLike) -> str | None:
    """The handle of the lease that `key` is, or None."""
    if _is_handle(key):
        return str(key)
    found = getattr(key, "handle", None)
    return found if isinstance(found, str) else None


def is_id(text: str) -> bool:
    """Whether this is a public id as it stands in requests: `id:42`."""
    return text.startswith("id:") and text[3:].isdecimal()


def is_reference(text: str) -> bool:
    """Whether this is an id or looks like a handle, which may be shown, and not a key's text."""
    return is_id(text) or _HANDLE.fullmatch(text) is not None


def _is_handle(key: KeyLike) -> bool:
    return isinstance(key, str) and key.startswith("h:")


def _path(key: KeyLike, *, by_id: bool = False) -> str:
    """The path of a key; `by_id` for the calls that are for admins. See the module for why.

    A generated or revealed key has no handle; whoever has it is an admin, so that it is named by its id.
    """
    id = getattr(key, "id", None)
    if isinstance(id, int) and (by_id or _number(key) is None):
        name: str = f"id:{id}"
    else:
        name = handle(key) or text(key)
    # Dots too: a text like ".." must not be taken for a step in the path.
    return "/keys/" + quote(name, safe="").replace(".", "%2E")


def _number(key: object) -> int | None:
    number = getattr(key, "lease", None)
    return number if isinstance(number, int) else None


def _given(**members: Any) -> dict[str, Any]:
    """The members of a body that are not None."""
    return {name: value for name, value in members.items() if value is not None}


def _seconds(name: str, given: float | None) -> float | None:
    if given is not None and not 0 < given < math.inf:
        raise ValueError(f"{name} is a number of seconds above 0, or None for the pool's, not {given!r}")
    return given


def _new_idempotency_key() -> str:
    """One for each acquire, and the same for all requests that it takes: 128 bits at random."""
    return secrets.token_urlsafe(16)
