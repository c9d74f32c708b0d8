"""The answers of the calls, as frozen dataclasses with the members of the contract.

Durations are in seconds, counted from the moment of the answer. `repr` and `str` never contain a key's text: only
`secret` does; logs should show `hint`. Members that this version does not know are ignored, so that an older client
works with a newer server.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import cache
from typing import Any, Protocol, Self, TypeVar, get_type_hints, runtime_checkable

from keypool.client.errors import UnexpectedAnswer

T = TypeVar("T")


class _Open(StrEnum):
    """Members equal their strings; a string that this version does not know becomes a member of its own."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, str):
            return None
        unknown = str.__new__(cls, value)
        unknown._name_ = value.upper()
        unknown._value_ = value
        return unknown


class State(_Open):
    """The state of a key. Equal to its string; also takes a state that this version does not know."""

    AVAILABLE = "available"
    BLOCKED = "blocked"
    COOLING = "cooling"
    QUARANTINED = "quarantined"


class Outcome(_Open):
    """How the work with a key went, as its holder reports it. Equal to its string."""

    OK = "ok"
    RATE_LIMITED = "rate_limited"
    ERROR = "error"
    INVALID = "invalid"


@runtime_checkable
class HasSecret(Protocol):
    """Any object with a key's text: a generated, leased, held or revealed key."""

    @property
    def secret(self) -> str:
        """The text."""
        ...


KeyLike = str | int | HasSecret
"""A key as an argument: its text, its public id (admins and viewers), or an object with its text."""


def hint(secret: str) -> str:
    """The first and last four characters of a key, to show in place of its text; only `…` below 12 characters."""
    return f"{secret[:4]}…{secret[-4:]}" if len(secret) >= 12 else "…"


class _WithSecret:
    secret: str

    @property
    def hint(self) -> str:
        """First four characters, `…`, last four."""
        return hint(self.secret)


_KEY = {"json": "key"}  # the member's name in JSON


@dataclass(frozen=True, slots=True)
class GeneratedKey(_WithSecret):
    """A new key. Unless it is kept alive, it expires in `expires_in` seconds."""

    id: int
    secret: str = field(repr=False, metadata=_KEY)
    state: State
    expires_in: float


@dataclass(frozen=True, slots=True)
class LeasedKey(_WithSecret):
    """An acquired key: yours for `release_in` seconds, under the number `lease`.

    `handle` names key and lease in the client's requests, in place of the text; None from an older server.
    """

    id: int
    secret: str = field(repr=False, metadata=_KEY)
    lease: int
    release_in: float
    expires_in: float
    handle: str | None = None


@dataclass(frozen=True, slots=True)
class Revealed(_WithSecret):
    """The text of a key."""

    id: int
    secret: str = field(repr=False, metadata=_KEY)


@dataclass(frozen=True, slots=True)
class Unblocked:
    """The result of an unblock. `changed` is false if it neither freed the key nor recorded a report.

    `available_in` is how many seconds the key cools, None if it doesn't. `guarded` is true if the pool had too many
    quarantined keys for another one, so that it cools instead.
    If `repeated` is true, an earlier attempt whose answer was lost may have freed it.
    """

    id: int
    state: State
    changed: bool
    available_in: float | None = None
    guarded: bool = False
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Extended:
    """The lease now ends in `release_in` seconds. With further extensions it may last `block_left` seconds at most."""

    id: int
    lease: int
    release_in: float
    block_left: float


@dataclass(frozen=True, slots=True)
class KeptAlive:
    """The key now expires in `expires_in` seconds."""

    id: int
    expires_in: float


@dataclass(frozen=True, slots=True)
class Row:
    """A key without its text. `owner` and `release_in` are None unless it is blocked, `available_in` unless it cools.

    `failures` are those in a row. `outcome` and `reason` are those of the latest report, None if there was none; the
    reason of a quarantined key is the operator's, if one gave it.
    """

    id: int
    hint: str
    state: State
    owner: str | None
    lease: int | None
    created_at: datetime
    expires_in: float
    release_in: float | None
    available_in: float | None = None
    failures: int = 0
    outcome: Outcome | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Rows in order, and the cursor of the next page, None on the last one. A page may be empty."""

    keys: list[Row]
    next: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Six current counts, the counters since the pool began, and the server. `uptime` is in seconds.

    An older server doesn't count cooling and quarantined keys: these numbers are then 0.
    """

    total: int
    available: int
    blocked: int
    cooling: int = 0
    quarantined: int = 0
    waiting: int
    generated: int
    acquired: int
    unblocked: int
    released: int
    deleted: int
    expired: int
    kept_alive: int
    refused: int
    cooled: int = 0
    quarantines: int = 0
    restored: int = 0
    uptime: float
    engine: str
    version: str


@dataclass(frozen=True, slots=True)
class Done:
    """The result of a batch: how many items were done, which keys were unknown, and which had a later lease.

    For leases to be extended also those that had ended, `over`, and those that can't last longer, `limit`.
    `repeated` is true if an answer was lost and the batch was sent again: then the first attempt may have changed
    keys that are listed as unknown or stale.
    """

    done: int
    unknown: list[str] = field(repr=False)
    stale: list[str] = field(default_factory=list, repr=False)
    over: list[str] = field(default_factory=list, repr=False)
    limit: list[str] = field(default_factory=list, repr=False)
    repeated: bool = False


def read(kind: type[T], value: object) -> T:
    """Make a dataclass `kind` from decoded JSON. Raises UnexpectedAnswer if it does not match."""
    if not isinstance(value, dict):
        raise UnexpectedAnswer(f"not the expected answer: not a {kind.__name__}")
    members = {}
    for each in dataclasses.fields(kind):  # type: ignore[arg-type]
        name = each.metadata.get("json", each.name)
        if name in value:
            members[each.name] = _member(kind, each.name, value[name])
        elif each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            raise UnexpectedAnswer(f"not the expected answer: {kind.__name__} without {name}")
    return kind(**members)


def read_list(kind: type[T], value: object) -> list[T]:
    """The list of `kind` in the member `keys` of an answer. Raises UnexpectedAnswer."""
    items = value.get("keys") if isinstance(value, dict) else None
    if not isinstance(items, list):
        raise UnexpectedAnswer("not the expected answer: no list of keys")
    return [read(kind, item) for item in items]


def read_page(value: object) -> Page:
    """A page of a list. Raises UnexpectedAnswer."""
    rows = read_list(Row, value)
    after = value.get("next") if isinstance(value, dict) else None
    if not isinstance(after, str | None):
        raise UnexpectedAnswer("not the expected answer: next is not a string")
    return Page(rows, after)


def _member(kind: type, name: str, value: object) -> object:
    wanted = _hints(kind)[name]
    if type(value) is int and wanted in (float, float | None):
        return float(value)
    try:
        if wanted is State:
            return State(str(value))
        if wanted == Outcome | None:
            return None if value is None else Outcome(str(value))
        if wanted is datetime:
            return datetime.fromisoformat(str(value))
    except ValueError:
        wanted = ()
    fits = isinstance(value, list) if wanted == list[str] else isinstance(value, wanted)
    if not fits or (isinstance(value, bool) and wanted is not bool):
        raise UnexpectedAnswer(f"not the expected answer: wrong {name} in {kind.__name__}")
    return value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
