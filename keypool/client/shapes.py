"""What the calls answer, as frozen dataclasses: the contract's shapes, member by member.

Lengths of time are seconds from the moment of the answer. A key's text is never part of a `repr`, so none
gets into a log by accident; `hint` tells keys apart. Members that this version doesn't know are ignored, so
that an older client reads a newer server.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol, TypeVar, get_type_hints, runtime_checkable

from keypool.client.errors import UnexpectedAnswer

T = TypeVar("T")


@runtime_checkable
class HasKey(Protocol):
    """Whatever knows a key's text: all answers here do that hold one, and so does a lease."""

    @property
    def key(self) -> str:
        """The text."""
        ...


KeyLike = str | int | HasKey
"""How a key is named to a call: by its text, by its public id (admins, viewers), or by what holds it."""


def hint(key: str) -> str:
    """What stands for a key where it may not be shown: its first and last four characters."""
    return f"{key[:4]}…{key[-4:]}" if len(key) >= 12 else "…"


class _WithKey:
    key: str

    @property
    def hint(self) -> str:
        """First four characters, `…`, last four."""
        return hint(self.key)


@dataclass(frozen=True, slots=True)
class GeneratedKey(_WithKey):
    """A new key."""

    id: int
    key: str = field(repr=False)
    state: str
    expires_in: float


@dataclass(frozen=True, slots=True)
class LeasedKey(_WithKey):
    """A key served: yours for `release_in` seconds, under the number `lease`."""

    id: int
    key: str = field(repr=False)
    lease: int
    release_in: float
    expires_in: float


@dataclass(frozen=True, slots=True)
class Revealed(_WithKey):
    """The text of a key."""

    id: int
    key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Unblocked:
    """`changed` is false if the key was free already.

    After a lost answer it is false too if the lost one freed it: then `repeated` is true.
    """

    id: int
    state: str
    changed: bool
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class KeptAlive:
    """A key that lives for `expires_in` seconds more."""

    id: int
    expires_in: float


@dataclass(frozen=True, slots=True)
class Row:
    """A key without its text. `owner` and `release_in` are None unless it is blocked."""

    id: int
    hint: str
    state: str
    owner: str | None
    lease: int | None
    created_at: str
    expires_in: float
    release_in: float | None


@dataclass(frozen=True, slots=True)
class Page:
    """Rows in order, and the cursor of the next page; None at the end. May be empty and not the end."""

    keys: list[Row]
    next: str | None


@dataclass(frozen=True, slots=True)
class Stats:
    """Four counts of now, eight since the pool began, and what serves. `uptime` in seconds."""

    total: int
    available: int
    blocked: int
    waiting: int
    generated: int
    acquired: int
    unblocked: int
    released: int
    deleted: int
    expired: int
    kept_alive: int
    refused: int
    uptime: float
    engine: str
    version: str


@dataclass(frozen=True, slots=True)
class Done:
    """What a batch did: how many, and which keys it didn't know or found under a later lease.

    `repeated` is true if an answer was lost and the batch sent again: what is unknown or stale then may have
    been done by the lost one.
    """

    done: int
    unknown: list[str] = field(repr=False)
    stale: list[str] = field(default_factory=list, repr=False)
    repeated: bool = False


def read(kind: type[T], value: object) -> T:
    """The dataclass `kind` out of decoded JSON. Raises UnexpectedAnswer if it isn't one."""
    if not isinstance(value, dict):
        raise UnexpectedAnswer(f"not the answer that was expected: no {kind.__name__}")
    return kind(**{name: _member(kind, name, value[name]) for name in _present(kind, value)})


def read_list(kind: type[T], value: object) -> list[T]:
    """The list of `kind` that an answer has in its member `keys`. Raises UnexpectedAnswer."""
    items = value.get("keys") if isinstance(value, dict) else None
    if not isinstance(items, list):
        raise UnexpectedAnswer("not the answer that was expected: no list of keys")
    return [read(kind, item) for item in items]


def read_page(value: object) -> Page:
    """A page of a list. Raises UnexpectedAnswer."""
    rows = read_list(Row, value)
    after = value.get("next") if isinstance(value, dict) else None
    if not isinstance(after, str | None):
        raise UnexpectedAnswer("not the answer that was expected: next is no text")
    return Page(rows, after)


def _present(kind: type, value: dict[str, Any]) -> list[str]:
    names = []
    for each in dataclasses.fields(kind):
        if each.name in value:
            names.append(each.name)
        elif each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            raise UnexpectedAnswer(f"not the answer that was expected: {kind.__name__} without {each.name}")
    return names


def _member(kind: type, name: str, value: object) -> object:
    wanted = _hints(kind)[name]
    if type(value) is int and wanted in (float, float | None):
        return float(value)
    fits = isinstance(value, list) if wanted == list[str] else isinstance(value, wanted)
    if not fits or (isinstance(value, bool) and wanted is not bool):
        raise UnexpectedAnswer(f"not the answer that was expected: a wrong {name} in {kind.__name__}")
    return value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
