"""The answers of the calls: one Struct for each shape of the contract, passed unchanged from the engine to the wire.

Lengths of time are seconds relative to the answer, rounded to the millisecond; moments are RFC 3339 UTC with
milliseconds. `gc=False`: these hold no cycles, so the collector needn't track them.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import msgspec

from keypool.core.events import By, Change
from keypool.core.handles import Handle
from keypool.core.history import How
from keypool.core.keys import State
from keypool.core.outcomes import Outcome, Report
from keypool.core.pace import Pace


class Written(NamedTuple):
    """What a caller wrote in a body for a key whose text it may be exactly; if no key has it, it is the other one."""

    text: str
    other: int | Handle


Ref = str | int | Handle | Written
"""How a caller names a key: its text, its public id as an int, the handle of a lease, or one of two."""


class NewKey(msgspec.Struct, frozen=True, gc=False):
    """A key to import. `data` is a JSON object as text."""

    secret: str
    name: str | None = None
    labels: dict[str, str] | None = None
    data: bytes | None = None
    pace: Pace | None = None
    seats: int | None = None
    """How many may hold it at a time; None is 1."""

    @property
    def patch(self) -> KeyPatch:
        """What an import that updates changes of the key with this secret."""
        return KeyPatch(self.name, self.labels, self.data, self.pace, self.seats)


class KeyPatch(msgspec.Struct, frozen=True, gc=False):
    """What to change of a key's details, and how many seats it has.

    None leaves it as it is. An empty name, labels or data (`{}`), and False for the pace, remove it.
    """

    name: str | None = None
    labels: dict[str, str] | None = None
    data: bytes | None = None
    pace: Pace | Literal[False] | None = None
    seats: int | None = None


class Unblock(msgspec.Struct, frozen=True, gc=False):
    """An item of a batch of unblocks. `uses` are those of the lease, that of its acquire among them."""

    ref: Ref
    lease: int | None = None
    report: Report | None = None
    uses: int = 1


class Extension(msgspec.Struct, frozen=True, gc=False):
    """An item of a batch of extensions. `seconds` None stands for the pool's `block_seconds`."""

    ref: Ref
    lease: int
    seconds: float | None = None


class Answer(msgspec.Struct, gc=False):
    """The root of all answers."""


class GeneratedKey(Answer):
    """A key that was just generated."""

    id: int
    key: str
    state: State
    expires_in: float | None


IMPORT_STATUSES = ("created", "updated", "existed", "duplicate", "failed")
"""What an import may do with an item; "duplicate" is one whose secret stands twice in the body."""


class Imported(Answer, omit_defaults=True):
    """What an import did with an item, one of IMPORT_STATUSES.

    `id` is of the key that has the secret now, `ids` of all its seats; a failed item has the `code` and `detail` of its
    error instead.
    """

    status: str
    id: int | None = None
    code: str | None = None
    detail: str | None = None
    ids: list[int] | None = None


class ImportedKey(Answer):
    """An imported key; `existed` if the pool had its secret already, which changes nothing.

    `ids` are of all its seats, the first of which is `id`.
    """

    id: int
    state: State
    hint: str
    name: str | None
    expires_in: float | None
    existed: bool
    ids: list[int]


class Lease(Answer, omit_defaults=True):
    """An acquired key. It is available again after `release_in` seconds, unless it is unblocked before.

    `handle` names key and lease in the calls about them, and may stand in a URL. `expires_in` is null if the key never
    expires. `name` and `data` are there if an operator gave them.
    """

    id: int
    key: str
    lease: int
    handle: str
    release_in: float
    expires_in: float | None
    name: str | None = None
    data: msgspec.Raw | None = None


class Unblocked(Answer, omit_defaults=True):
    """The state of a key after an unblock, which `changed` it or recorded a report, or neither.

    `available_in` is there if the key cools, `guarded` if the pool had too many quarantined keys for another one.
    """

    id: int
    state: State
    changed: bool
    available_in: float | None = None
    guarded: bool = False


class Extended(Answer):
    """An extended lease. `block_left` is how long it can last at most, by the pool's `max_block_seconds`."""

    id: int
    lease: int
    release_in: float
    block_left: float


class KeptAlive(Answer):
    """A key whose expiry was postponed; `expires_in` is null if it never expires."""

    id: int
    expires_in: float | None


class Identity(Answer):
    """A purged key, without its text."""

    id: int
    hint: str


class EndedLease(Identity):
    """A lease that was ended by a caller who didn't give its number. For the audit log; no call returns it."""

    lease: int


Moment = Annotated[str, msgspec.Meta(extra_json_schema={"format": "date-time"})]


class Row(Answer):
    """A key without its text: `owner` and `release_in` null unless blocked, `lease` null if never served.

    `available_in` is null unless the key cools, `expires_in` if it never expires. `failures` are those in a row.
    `outcome` and `reason` are those of the latest report, null if there was none; while a key is quarantined, `reason`
    is the operator's if one gave it. `client` is the name of the token that holds the key, null unless it has one.
    `name`, `labels` and `pace` are an operator's: `pace` is null unless the key has its own. `seat` is the number of
    the key among the `seats` of its secret, from 1. `acquired_at` is the moment of the acquire, null unless blocked.
    `served` is how often the key was acquired.
    """

    id: int
    hint: str
    state: State
    owner: str | None
    lease: int | None
    created_at: Moment
    expires_in: float | None
    release_in: float | None
    available_in: float | None
    failures: int
    outcome: Outcome | None
    reason: str | None
    client: str | None = None
    name: str | None = None
    labels: dict[str, str] = {}
    pace: Pace | None = None
    seat: int = 1
    seats: int = 1
    acquired_at: Moment | None = None
    served: int = 0


class Page(Answer):
    """Rows in order; `next` is the cursor of the page after, null at the end."""

    keys: list[Row]
    next: str | None


class HistoryRow(Answer):
    """A lease that has ended. `held` is its length in seconds, `extended` how often it was extended.

    `owner` and `client` are those of a row while the lease ran. `outcome` and `reason` are those of its report, null if
    there was none. `how` it ended: "revoked" by an operator, "released" by its deadline, "expired" and "deleted" with
    its key.
    """

    lease: int
    owner: str | None
    client: str | None
    acquired_at: Moment
    ended_at: Moment
    held: float
    how: How
    outcome: Outcome | None
    reason: str | None
    extended: int


class HistoryPage(Answer):
    """Leases of a key that have ended, the latest first; `next` is the cursor of the page after, null at the end."""

    history: list[HistoryRow]
    next: str | None


class Revealed(Answer, omit_defaults=True):
    """The text of a key, with its name and its data if an operator gave them."""

    id: int
    key: str
    name: str | None = None
    data: msgspec.Raw | None = None


class HolderRow(Answer):
    """Who holds keys: `acquired_at` is the moment of the oldest lease; both names null if the holder gave none.

    `released` is how many of its leases ended by deadline in the last 5 minutes.
    """

    owner: str | None
    client: str | None
    held: int
    acquired_at: Moment
    released: int


class HolderRows(Answer):
    """Holders in order of name; `next` is the cursor of the page after, null at the end."""

    owners: list[HolderRow]
    next: str | None


class ReleasedLeases(Answer):
    """How many leases of an owner were ended."""

    released: int


class WaiterRow(Answer):
    """An acquire that waits for a key."""

    owner: str | None
    client: str | None
    waiting_since: Moment


class WaiterRows(Answer):
    """Waiting acquires, the first to be served first; `next` is the cursor of the page after, null at the end."""

    waiters: list[WaiterRow]
    next: str | None


class RareEventRow(Answer):
    """A rare event. If `count` is more than 1, it is a crowd of one kind: the rest is that of its first key."""

    event: Change
    id: int
    hint: str
    owner: str | None
    lease: int | None
    at: Moment
    by: By
    actor: str | None
    count: int


class RareEventRows(Answer):
    """Rare events, newest first; `next` is the cursor of the page after, null at the end."""

    events: list[RareEventRow]
    next: str | None


class PoolRow(Answer):
    """A pool: counts of now, whether it is being emptied for good, and all its settings by name."""

    name: str
    total: int
    available: int
    blocked: int
    cooling: int
    quarantined: int
    waiting: int
    draining: bool
    settings: dict[str, float | int | Pace | None]


class PoolRows(Answer):
    """All pools, in order of name."""

    pools: list[PoolRow]


class Rekeying(Answer):
    """How far stored keys are encrypted under the first secrets key: `state` is "idle", "running" or "failed".

    `done` of `total` keys were looked at since it began. `encrypted` is whether there is a secrets key at all.
    """

    state: str
    done: int
    total: int
    encrypted: bool


class Stats(Answer):
    """Six current counts, the totals since the pool began, and the server's uptime, engine and version."""

    total: int
    available: int
    blocked: int
    cooling: int
    quarantined: int
    waiting: int
    generated: int
    acquired: int
    unblocked: int
    released: int
    deleted: int
    expired: int
    kept_alive: int
    refused: int
    cooled: int
    quarantines: int
    restored: int
    imported: int
    paced: int
    uptime: float
    engine: str
    version: str


class BatchAnswer(Answer, tag_field="op"):
    """The root of the answers of batches. Their first member, `op`, repeats that of the request.

    Two of them have the same other members; a client that is generated from the OpenAPI document needs it to
    distinguish them.
    """


class GeneratedKeys(BatchAnswer, tag="generate"):
    """The keys that a batch generated."""

    keys: list[GeneratedKey]


class Leases(BatchAnswer, tag="acquire"):
    """The keys that a batch acquired: fewer than requested if fewer were available."""

    keys: list[Lease]


class ImportedKeys(BatchAnswer, tag="import"):
    """How many items of an import have which status, and the result of each, in their order."""

    created: int
    updated: int
    existed: int
    duplicate: int
    failed: int
    results: list[Imported]


class KeysAnswer(BatchAnswer):
    """What a batch did with the keys in it: how many items are done, and the names of the others as they were sent.

    `stale` are those named by the handle or the number of an older lease.
    """

    done: int
    unknown: list[str]
    stale: list[str]


class KeptAliveKeys(KeysAnswer, tag="keepalive", omit_defaults=True):
    """How many keys a batch kept alive, which are unknown, and which were named by the handle of an older lease.

    `many_seats`, if there are any, are texts of several seats, which don't say which one is meant.
    """

    many_seats: list[str] = []


class UnblockedKeys(KeysAnswer, tag="unblock", omit_defaults=True):
    """How many items of a batch are done, which are unknown, and which have a later lease.

    `many_seats`, if there are any, are texts of several seats without a lease number, which don't say which is meant.
    """

    many_seats: list[str] = []


class DeletedKeys(KeysAnswer, tag="delete"):
    """How many keys a batch purged, which are unknown, and which were named by the handle of an older lease."""


class ExtendedLeases(KeysAnswer, tag="extend"):
    """How many leases a batch extended, which keys are unknown, and which leases couldn't be extended.

    `stale` have a later lease, `over` have ended, `limit` would not have lasted longer.
    """

    over: list[str]
    limit: list[str]


class QuarantinedKeys(KeysAnswer, tag="quarantine"):
    """How many keys are quarantined, or will be; which are unknown; which were named by an older lease's handle."""


class RestoredKeys(KeysAnswer, tag="restore"):
    """How many keys are restored, which are unknown, and which were named by the handle of an older lease."""
