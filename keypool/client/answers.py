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
from typing import Any, Generic, Protocol, Self, TypeVar, get_origin, get_type_hints, runtime_checkable

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
    """What may be shown of a key in place of its text: the first and last four characters.

    Two and two of a text of less than 16 characters, none of one of less than 8.
    """
    if len(secret) >= 16:
        return f"{secret[:4]}…{secret[-4:]}"
    return f"{secret[:2]}…{secret[-2:]}" if len(secret) >= 8 else "…"


class _WithSecret:
    secret: str

    @property
    def hint(self) -> str:
        """First four characters, `…`, last four; fewer of a text of less than 16 characters."""
        return hint(self.secret)


_KEY = {"json": "key"}  # the member's name in JSON


@dataclass(frozen=True, slots=True)
class GeneratedKey(_WithSecret):
    """A new key. Unless it is kept alive, it expires in `expires_in` seconds; None: it never expires."""

    id: int
    secret: str = field(repr=False, metadata=_KEY)
    state: State
    expires_in: float | None


@dataclass(frozen=True, slots=True)
class ImportedKey:
    """A key that was imported, or `existed` before: then nothing has changed.

    It never expires if `expires_in` is None. If `repeated` is true, an earlier attempt whose answer was lost may have
    imported it.
    """

    id: int
    state: State
    hint: str
    name: str | None
    expires_in: float | None
    existed: bool
    repeated: bool = False
    ids: list[int] = field(default_factory=list, hash=False)
    """Of all its seats, the first of which is `id`; empty from an older server."""


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of one item of `import_many`, as its `status` says.

    It is "created", "updated", "existed", "duplicate" (the same secret as an item before), or "failed", for the reason
    in `code` and `detail`. `id` is of the key that has the secret; None if it failed.
    """

    status: str
    id: int | None = None
    code: str | None = None
    detail: str | None = None
    ids: list[int] = field(default_factory=list, hash=False)
    """Of all seats of that key; empty if it failed, or from an older server."""


@dataclass(frozen=True, slots=True)
class Imports:
    """The result of `import_many`: how many items have which status, and `results`, one for each item in their order.

    If `repeated` is true, an answer was lost and the call sent again: then the first attempt may have created keys
    that are counted as existed.
    """

    created: int = 0
    updated: int = 0
    existed: int = 0
    duplicate: int = 0
    failed: int = 0
    results: list[Imported] = field(default_factory=list, repr=False)
    repeated: bool = False

    def __add__(self, other: Imports) -> Imports:
        """Both, one after the other."""
        return Imports(
            self.created + other.created,
            self.updated + other.updated,
            self.existed + other.existed,
            self.duplicate + other.duplicate,
            self.failed + other.failed,
            self.results + other.results,
            self.repeated or other.repeated,
        )


@dataclass(frozen=True, slots=True)
class LeasedKey(_WithSecret):
    """An acquired key: yours for `release_in` seconds, under the number `lease`.

    `handle` names key and lease in the client's requests, in place of the text; None from an older server.
    `expires_in` is None if the key never expires. `name` and `data` are an operator's: None and `{}` without.
    """

    id: int
    secret: str = field(repr=False, metadata=_KEY)
    lease: int
    release_in: float
    expires_in: float | None
    handle: str | None = None
    name: str | None = None
    data: dict[str, Any] = field(default_factory=dict, repr=False, hash=False)


@dataclass(frozen=True, slots=True)
class Revealed(_WithSecret):
    """The text of a key, and its name and data, if an operator gave it some."""

    id: int
    secret: str = field(repr=False, metadata=_KEY)
    name: str | None = None
    data: dict[str, Any] = field(default_factory=dict, repr=False, hash=False)


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
    """The key now expires in `expires_in` seconds; None: it never does."""

    id: int
    expires_in: float | None


@dataclass(frozen=True, slots=True)
class Row:
    """A key without its text. `owner` and `release_in` are None unless it is blocked, `available_in` unless it cools.

    `failures` are those in a row. `outcome` and `reason` are those of the latest report, None if there was none; the
    reason of a quarantined key is the operator's, if one gave it. `client` is the name of the token that holds the key,
    None unless it has one. `name`, `labels` and `pace` (`count`, `seconds`, `burst`) are an operator's; `pace` is None
    unless the key has its own. `expires_in` is None if the key never expires. `seat` is the number of the key among the
    `seats` of its secret. `acquired_at` is the moment of the acquire, None unless the key is blocked. `served` is how
    often it was acquired, 0 also if the server is older than that number.
    """

    id: int
    hint: str
    state: State
    owner: str | None
    lease: int | None
    created_at: datetime
    expires_in: float | None
    release_in: float | None
    available_in: float | None = None
    failures: int = 0
    outcome: Outcome | None = None
    reason: str | None = None
    client: str | None = None
    name: str | None = None
    labels: dict[str, str] = field(default_factory=dict, hash=False)
    pace: dict[str, float] | None = field(default=None, hash=False)
    seat: int = 1
    seats: int = 1
    acquired_at: datetime | None = None
    served: int = 0


@dataclass(frozen=True, slots=True)
class Page:
    """Rows in order, and the cursor of the next page, None on the last one. A page may be empty."""

    keys: list[Row]
    next: str | None


class How(_Open):
    """How a lease ended. Equal to its string; also takes one that this version does not know."""

    UNBLOCKED = "unblocked"
    RELEASED = "released"
    REVOKED = "revoked"
    EXPIRED = "expired"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class PastLease:
    """A lease that has ended. `held` is how long it lasted, in seconds, `extended` how often it was extended.

    `how` it ended: "revoked" by an operator, "released" by its deadline, "expired" and "deleted" with its key.
    `outcome` and `reason` are those of its report, None if there was none.
    """

    lease: int
    owner: str | None
    client: str | None
    acquired_at: datetime
    ended_at: datetime
    held: float
    how: How
    outcome: Outcome | None
    reason: str | None
    extended: int


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
    imported: int = 0
    paced: int = 0
    uptime: float
    engine: str
    version: str


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds keys: `held` of them, the first since `acquired_at`. `owner` and `client` are None if it gave none.

    `released` is how many of its leases ended by their deadline in the last 5 minutes.
    """

    owner: str | None
    client: str | None
    held: int
    acquired_at: datetime
    released: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """An acquire that waits for a key."""

    owner: str | None
    client: str | None
    waiting_since: datetime


@dataclass(frozen=True, slots=True)
class RareEvent:
    """What an operator did, or keys that came or went. Of a crowd of `count`, the rest is about its first key.

    `by` is "holder", "deadline" or "operator", whose token is `actor`.
    """

    event: str
    id: int
    hint: str
    owner: str | None
    lease: int | None
    at: datetime
    by: str
    actor: str | None
    count: int


@dataclass(frozen=True, slots=True)
class Part(Generic[T]):
    """A part of a list, and where the next one begins; None at the end."""

    rows: list[T]
    next: str | None


@dataclass(frozen=True, slots=True)
class PoolInfo:
    """A pool: how many keys it has in which state, and all its settings by name, of which lengths are in seconds.

    A pool that is `draining` is being deleted: it is gone when its last lease has ended.
    """

    name: str
    total: int
    available: int
    blocked: int
    cooling: int
    quarantined: int
    waiting: int
    draining: bool
    settings: dict[str, Any] = field(hash=False)


@dataclass(frozen=True, slots=True)
class Rekeying:
    """How far the stored keys are encrypted under the first secrets key: `state` is "idle", "running" or "failed".

    `done` of `total` keys were looked at. `encrypted` is whether the server has a secrets key at all.
    """

    state: str
    done: int
    total: int
    encrypted: bool


@dataclass(frozen=True, slots=True)
class Done:
    """The result of a batch: how many items were done, which keys were unknown, and which had a later lease.

    For leases to be extended also those that had ended, `over`, and those that can't last longer, `limit`. `many_seats`
    are texts of several seats, which don't say which one is meant.
    `repeated` is true if an answer was lost and the batch was sent again: then the first attempt may have changed
    keys that are listed as unknown or stale.
    """

    done: int
    unknown: list[str] = field(repr=False)
    stale: list[str] = field(default_factory=list, repr=False)
    over: list[str] = field(default_factory=list, repr=False)
    limit: list[str] = field(default_factory=list, repr=False)
    repeated: bool = False
    many_seats: list[str] = field(default_factory=list, repr=False)


def read(kind: type[T], value: object) -> T:
    """Make a dataclass `kind` from decoded JSON. Raises UnexpectedAnswer if it does not match."""
    if not isinstance(value, dict):
        raise UnexpectedAnswer(f"not the expected answer: not a {kind.__name__}")
    members = {}
    for each in dataclasses.fields(kind):  # type: ignore[arg-type]
        name = each.metadata.get("json", each.name)
        if value.get(name) is None and each.default_factory is not dataclasses.MISSING:
            continue
        if name in value:
            members[each.name] = _member(kind, each.name, value[name])
        elif each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            raise UnexpectedAnswer(f"not the expected answer: {kind.__name__} without {name}")
    return kind(**members)


def read_list(kind: type[T], value: object, member: str = "keys") -> list[T]:
    """The list of `kind` in this member of an answer. Raises UnexpectedAnswer."""
    items = value.get(member) if isinstance(value, dict) else None
    if not isinstance(items, list):
        raise UnexpectedAnswer(f"not the expected answer: no list of {member}")
    return [read(kind, item) for item in items]


def read_imports(value: object) -> Imports:
    """The answer of a batch of imports. Raises UnexpectedAnswer."""
    if not isinstance(value, dict):
        raise UnexpectedAnswer("not the expected answer: no results")
    counts = read(Imports, value | {"results": None})
    return dataclasses.replace(counts, results=read_list(Imported, value, "results"))


def read_page(value: object) -> Page:
    """A page of keys. Raises UnexpectedAnswer."""
    part = read_part(Row, value, "keys")
    return Page(part.rows, part.next)


def read_part(kind: type[T], value: object, member: str) -> Part[T]:
    """A part of a list of `kind` in this member. Raises UnexpectedAnswer."""
    rows = read_list(kind, value, member)
    after = value.get("next") if isinstance(value, dict) else None
    if not isinstance(after, str | None):
        raise UnexpectedAnswer("not the expected answer: next is not a string")
    return Part(rows, after)


def read_released(value: object) -> int:
    """How many leases of an owner were ended. Raises UnexpectedAnswer."""
    released = value.get("released") if isinstance(value, dict) else None
    if not isinstance(released, int):
        raise UnexpectedAnswer("not the expected answer: released is not a number")
    return released


def _member(kind: type, name: str, value: object) -> object:
    wanted = _hints(kind)[name]
    if type(value) is int and wanted in (float, float | None):
        return float(value)
    try:
        if wanted is State or wanted is How:
            return wanted(str(value))
        if wanted == Outcome | None:
            return None if value is None else Outcome(str(value))
        if wanted is datetime or (wanted == datetime | None and value is not None):
            return datetime.fromisoformat(str(value))
    except ValueError:
        wanted = ()
    if wanted == dict[str, float] | None:
        wanted = dict | None
    fits = isinstance(value, get_origin(wanted) if get_origin(wanted) in (list, dict) else wanted)
    if not fits or (isinstance(value, bool) and wanted is not bool):
        raise UnexpectedAnswer(f"not the expected answer: wrong {name} in {kind.__name__}")
    return value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
