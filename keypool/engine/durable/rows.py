"""Keys as rows of the data file, and batches of rows: what the tables and the batches of a file contain.

Moments are integer milliseconds of the pool's clock (engine/clock.py). The end of a cooldown is rounded up, so that no
restart shortens one, and other moments to the nearest. The one of a pace is in seconds, and isn't rounded. A row has
the complete state of its key. Fields that most keys lack share one column, `more`, so that the usual row stays small.

All pools of a server are in one file. The id of a row is the number of the pool and the id of the key, `pool << 40 |
id`, so the keys of a pool are neighbours, and those of `default`, whose number is 0, have their own ids.

With a secrets key, a row has an empty text, and `more` has text and data, sealed for the place of the key (Contents,
engine/sealing.py). Rows are sealed before they leave the server process. Rare events have no hints then.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from math import ceil, inf, isfinite
from typing import Annotated

import msgspec

from keypool.core.details import shared
from keypool.core.events import By, Change
from keypool.core.history import How, PastLease
from keypool.core.keys import MAX_SEATS, NEVER, NO_DETAILS, Details, Group, Key, State
from keypool.core.outcomes import NO_HISTORY, History, Outcome
from keypool.core.pace import Pace
from keypool.core.rare_events import MOST_EVENTS, NO_HINT, RareEvent
from keypool.engine.sealing import Sealer, WrongSecretsKey

Row = tuple[int, str, int, int, int | None, int, str | None, int | None, int, bytes | None]
"""A key in the file, with its columns in the order of the schema (datafile.py)."""

POOL_SHIFT = 40
"""The id of a row is the pool's number, shifted by so many bits, and the key's id."""

COOLING = 1
"""The key cools until `release_at`."""
QUARANTINED = 2
REPORTED = 4
"""The latest lease can't report any more."""
QUARANTINE_PENDING = 8
"""The key is quarantined when its lease ends."""
_SERVED_SHIFT = 8
"""Flags have fewer bits. Those above count how often the key was acquired."""
_LOW = (1 << _SERVED_SHIFT) - 1

NEVER_AT = (1 << 62) - 1
"""The `expires_at` of a key that never expires: later than every grace, so that no grace moves it."""

_AVAILABLE, _BLOCKED = State.AVAILABLE, State.BLOCKED  # saves attribute look-ups for each row
_FLAGS = COOLING | QUARANTINED | REPORTED | QUARANTINE_PENDING
_ID = (1 << POOL_SHIFT) - 1
_HOWS, _OUTCOMES = tuple(How), tuple(Outcome)
_PLACE_OF_HOW = {how: place for place, how in enumerate(_HOWS)}
_PLACE_OF_OUTCOME = {outcome: place for place, outcome in enumerate(_OUTCOMES)}


class Seat(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a row has of the seats of its secret. Files contain it: fields may be added at the end only."""

    wanted: Annotated[int, msgspec.Meta(ge=1, le=MAX_SEATS)]
    cools_until: Annotated[int, msgspec.Meta(ge=0)] = 0
    """In milliseconds, rounded up as the end of any cooldown."""


class More(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What is in the column `more`, as MessagePack. Files contain it: fields may be added at the end only."""

    attempt: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)] | None = None
    history: History | None = None
    client: str | None = None
    details: Details | None = None
    """Without `data` and `former` if the row is sealed."""
    sealed: bytes | None = None
    """The Contents of a sealed row."""
    paced_until: float | None = None
    """As the key or its secret has it, in seconds: rounded, a restart might give it a little budget."""
    extended: int = 0
    seat: Seat | None = None
    """If the key is one of the seats of a secret: those with the same text."""


class Contents(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What is sealed of a key, as MessagePack. Files contain it: fields may be added at the end only."""

    text: str
    data: bytes | None = None
    former: str | None = None


EventRow = tuple[int, int, str, int, str | None, str | None, int | None, int, str, str | None, int]
"""A rare event in the file: the pool's number and the columns of the schema. Without a hint if rows are sealed."""


class StoredPool(msgspec.Struct, array_like=True, frozen=True):
    """A pool, as it was defined; without a name if it is gone. Files contain it in batches: see Batch."""

    number: int
    """Never used again. 0 is `default`."""
    name: str | None = None
    settings: dict[str, int | float | Pace | None] = {}
    """Those that were given."""
    draining: bool = False
    at_once: bool = False
    """Whether draining ends leases, too."""


class Past(msgspec.Struct, array_like=True, gc=False):
    """A lease that has ended. Files contain it in batches: see Batch. Moments and lengths are milliseconds."""

    key: int
    """The id of its key's row."""
    lease: int
    number: int
    """See PastLease. Of 0, only outcome and reason count: those of a report that came later."""
    acquired_at: int
    held: int
    how: int
    """The place in How."""
    extended: int
    owner: str | None = None
    client: str | None = None
    outcome: int | None = None
    """The place in Outcome."""
    reason: str | None = None


class Batch(msgspec.Struct, array_like=True):
    """Changes that are committed together. `rows` are complete keys, `purged` ids, `pool` numbers by name, `events`
    complete rare events.

    The names of the numbers of another pool than `default` begin with its own number: `3/last_id`. Files contain
    batches as `encode` writes them: fields may be added at the end, but not changed.
    """

    rows: list[Row] = []
    purged: list[int] = []
    pool: dict[str, int] = {}
    pools: list[StoredPool] = []
    past: list[Past] = []
    events: list[EventRow] = []


_Row2 = tuple[int, str, int, int, int | None, int, str | None]


class _Batch2(msgspec.Struct, array_like=True):
    """A Batch that was written under version 2 of the data file."""

    rows: list[_Row2] = []
    purged: list[int] = []
    pool: dict[str, int] = {}


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Batch).decode
_decode_version_2 = msgspec.msgpack.Decoder(_Batch2).decode
_decode_more = msgspec.msgpack.Decoder(More).decode
_decode_contents = msgspec.msgpack.Decoder(Contents).decode


def decode_any(content: bytes) -> Batch:
    """A batch that may be of version 2. Raises msgspec.DecodeError."""
    try:
        return decode(content)
    except msgspec.ValidationError:
        older = _decode_version_2(content)
        return Batch([(*row, None, 0, None) for row in older.rows], older.purged, older.pool)


class Memtable:
    """Batches merged: the last row of each key, None if it was purged, the last numbers, definitions, rare events.

    `past` are the leases that have ended, by the id of their key's row and their number; `reports` those that came
    later on leases that aren't among them, by the same.
    """

    def __init__(self, batches: Iterable[Batch] = ()) -> None:
        self.rows: dict[int, Row | None] = {}
        self.numbers: dict[str, int] = {}
        self.pools: dict[int, StoredPool] = {}
        self.past: dict[int, dict[int, Past]] = {}
        self.reports: dict[tuple[int, int], Past] = {}
        self.events: dict[int, dict[int, EventRow]] = {}  # by pool, then by number
        for batch in batches:
            self.add(batch)

    def add(self, batch: Batch) -> None:
        """Merge a batch that is later than all before. O(its rows)."""
        for row in batch.rows:
            self.rows[row[0]] = row
        for id in batch.purged:
            self.rows[id] = None
        self.numbers.update(batch.pool)
        for definition in batch.pools:
            self.define(definition)
        for past in batch.past:
            if past.number:
                self.past.setdefault(past.key, {})[past.lease] = past
            elif (known := self.past.get(past.key, {}).get(past.lease)) is not None:
                known.outcome, known.reason = past.outcome, past.reason
            else:
                self.reports[past.key, past.lease] = past
        for event in batch.events:
            self.add_event(event)

    def add_event(self, event: EventRow) -> None:
        """Merge a rare event. O(1) amortized; of each pool, twice `MOST_EVENTS` are kept at most."""
        events = self.events.setdefault(event[0], {})
        events[event[1]] = event
        if len(events) > 2 * MOST_EVENTS:
            self.events[event[0]] = {number: events[number] for number in sorted(events)[-MOST_EVENTS:]}

    def define(self, definition: StoredPool) -> None:
        """Merge a definition. O(numbers) if the pool is gone, with which its numbers go."""
        self.pools[definition.number] = definition
        if definition.name is None:
            self.events.pop(definition.number, None)
            prefix = prefix_of(definition.number)
            self.numbers = {
                name: value for name, value in self.numbers.items() if not name.startswith(prefix)
            }

    def merge_pools(self, later: Memtable) -> None:
        """Merge the definitions, numbers and events of later batches. O(numbers), for each pool that is gone."""
        for definition in later.pools.values():
            self.define(definition)
        self.numbers = self.numbers | later.numbers
        for events in later.events.values():
            for event in events.values():
                self.add_event(event)


def prefix_of(number: int) -> str:
    """How the names of the numbers of this pool begin. Its notes have it, too."""
    return f"{number}/" if number else ""


def row_of(key: Key, pool: int = 0, sealer: Sealer | None = None) -> Row:
    """The row of a live key of the pool with this number. About 0.4 µs, 0.6 if it is blocked, 0.2 more with `more`.

    4 µs more with a `sealer`.
    """
    release = key.release_deadline
    release_at = acquired_at = more = None
    flags = 0
    state = key.state
    if state is _BLOCKED and release is not None:
        release_at = round(release * 1000)
        acquired_at = round(key.acquired_at * 1000)
        if key.quarantine_pending:
            flags = QUARANTINE_PENDING
    elif release is not None:
        release_at = ceil(release * 1000)
        flags = COOLING
    elif state is not _AVAILABLE:
        flags = QUARANTINED
    if key.reported:
        flags |= REPORTED
    flags |= key.served << _SERVED_SHIFT
    text = key.text
    if sealer is not None:
        text, more = "", _sealed_more(key, pool, sealer)
    elif (
        key.history is not NO_HISTORY
        or key.attempt is not None
        or key.details is not NO_DETAILS
        or key.client is not None
        or key.paced_until
        or key.extended
        or key.group is not None
    ):
        more = encode(_more_of(key, key.details))
    expires = key.expires_deadline
    return (
        key.id if pool == 0 else pool << POOL_SHIFT | key.id,
        text,
        round(key.created_at * 1000),
        NEVER_AT if expires == NEVER else round(expires * 1000),
        release_at,
        key.lease,
        key.owner,
        acquired_at,
        flags,
        more,
    )


def _more_of(key: Key, details: Details) -> More:
    return More(
        key.attempt,
        None if key.history is NO_HISTORY else key.history,
        key.client,
        None if details is NO_DETAILS else details,
        None,
        (key.paced_until if key.group is None else key.group.paced_until) or None,
        key.extended,
        None if key.group is None else Seat(key.group.wanted, ceil(key.group.cools_until * 1000)),
    )


def _sealed_more(key: Key, pool: int, sealer: Sealer) -> bytes:
    details = key.details
    contents = encode(Contents(key.text, details.data, details.former))
    if details.data is not None or details.former is not None:
        details = msgspec.structs.replace(details, data=None, former=None)
    more = msgspec.structs.replace(_more_of(key, details), sealed=sealer.seal(contents, pool, key.id))
    return encode(more)


def key_of(row: Row, sealer: Sealer | None = None, behind: array[int] | None = None) -> Key:
    """The key of a row. Raises ValueError or TypeError for a row that `row_of` can't have made, WrongSecretsKey.

    Without a `sealer`, the key of a sealed row has an empty text and no data. Adds the id of the row to `behind`
    unless the row is sealed under the first secrets key.
    """
    id, text, created_at, expires_at, release_at, lease, owner, acquired_at, flags, more = row
    expires = NEVER if expires_at >= NEVER_AT else expires_at / 1000
    release = None if release_at is None else release_at / 1000
    key = Key(id & _ID, text, created_at / 1000, expires, release, lease, owner)
    if release is not None:
        key.state = _BLOCKED
    if acquired_at is not None:
        key.acquired_at = acquired_at / 1000
    if lease:
        key.served = flags >> _SERVED_SHIFT or 1
    if flags & _LOW or flags < 0:
        _set_flags(key, flags)
    sealed = None if more is None else _set_more(key, more)
    if sealed is None:
        if not text:
            raise ValueError(f"{key!r} has no text")
    elif sealer is not None:
        _unseal(key, sealed, id >> POOL_SHIFT, sealer)
    if behind is not None and (sealed is None or sealer is None or not sealer.is_current(sealed)):
        behind.append(id)
    return key


def event_row_of(event: RareEvent, pool: int, *, sealed: bool) -> EventRow:
    """The row of a rare event. O(1)."""
    hint = None if sealed or event.hint == NO_HINT else event.hint
    at = round(event.at * 1000)
    return (
        pool, event.number, event.event.value, event.id, hint, event.owner, event.lease, at, event.by.value,
        event.actor, event.count,
    )  # fmt: skip


def event_of(row: EventRow) -> RareEvent:
    """The rare event of a row. Raises ValueError for one that `event_row_of` can't have made."""
    _, number, change, id, hint, owner, lease, at, by, actor, count = row
    return RareEvent(
        number, Change(change), id, hint or NO_HINT, owner, lease, at / 1000, By(by), actor, count
    )


def _set_flags(key: Key, flags: int) -> None:
    if flags < 0 or flags & _LOW & ~_FLAGS:
        raise ValueError(f"{key!r} has the unknown flags {flags}")
    if flags & COOLING:
        if key.state is not State.BLOCKED:
            raise ValueError(f"{key!r} is cooling, but the end of its cooldown is missing")
        key.state = State.COOLING
    if flags & QUARANTINED:
        if key.state is not State.AVAILABLE:
            raise ValueError(f"{key!r} is quarantined, but has the end of a block or a cooldown")
        key.state = State.QUARANTINED
    key.reported = bool(flags & REPORTED)
    key.quarantine_pending = bool(flags & QUARANTINE_PENDING)


def _set_more(key: Key, content: bytes) -> bytes | None:
    """Set what is in the column `more`. Returns what is sealed."""
    try:
        more = _decode_more(content)
    except msgspec.MsgspecError:
        raise ValueError(f"the attempt, history or details of {key!r} can't be read") from None
    history = more.history
    if history is not None:
        if history.failures < 0 or not isfinite(history.failed_at):
            raise ValueError(f"{key!r} has a history that can't be")
        key.history = history if history != NO_HISTORY else NO_HISTORY
    key.attempt = more.attempt
    key.client = more.client
    key.extended = more.extended
    if more.details is not None:
        key.details = shared(more.details)
    if more.paced_until is not None:
        if not 0 < more.paced_until < inf:
            raise ValueError(f"{key!r} has a pace that can't be")
        key.paced_until = more.paced_until
    if more.seat is not None:
        key.group = Group(more.seat.wanted, more.seat.cools_until / 1000, key.paced_until)
        key.paced_until = 0.0
    return more.sealed


def _unseal(key: Key, sealed: bytes, pool: int, sealer: Sealer) -> None:
    try:
        contents = _decode_contents(sealer.open(sealed, pool, key.id))
    except msgspec.MsgspecError:
        raise ValueError(f"{key!r} can't be read, although it was decrypted") from None
    except WrongSecretsKey as error:
        raise WrongSecretsKey(f"{key!r} can't be decrypted: {error}") from None
    key.text = contents.text
    if contents.data is not None or contents.former is not None:
        key.details = msgspec.structs.replace(key.details, data=contents.data, former=contents.former)


def past_of(past: PastLease, pool: int) -> Past:
    """A lease of the pool with this number, as the file keeps it. About 1 µs."""
    acquired_at = round(past.acquired_at * 1000)
    return Past(
        pool << POOL_SHIFT | past.key_id,
        past.lease,
        past.number,
        acquired_at,
        max(0, round(past.ended_at * 1000) - acquired_at),
        _PLACE_OF_HOW[past.how],
        past.extended,
        past.owner,
        past.client,
        None if past.outcome is None else _PLACE_OF_OUTCOME[past.outcome],
        past.reason,
    )


def place_of_outcome(outcome: Outcome) -> int:
    """An outcome as the file keeps it."""
    return _PLACE_OF_OUTCOME[outcome]


def past_lease_of(past: Past) -> PastLease:
    """The same from the file. Raises ValueError for what `past_of` can't have made."""
    try:
        how, outcome = _HOWS[past.how], None if past.outcome is None else _OUTCOMES[past.outcome]
    except IndexError:
        raise ValueError(f"lease {past.lease} has an end or an outcome that isn't known") from None
    return PastLease(
        past.key & _ID,
        past.lease,
        past.owner,
        past.client,
        past.acquired_at / 1000,
        (past.acquired_at + past.held) / 1000,
        how,
        outcome,
        past.reason,
        past.extended,
        past.number,
    )


def key_id_of(id: int) -> int:
    """The id of the key whose row has this id."""
    return id & _ID


def pool_of(id: int) -> int:
    """The number of the pool to which the row with this id belongs."""
    return id >> POOL_SHIFT
