"""The answers of the calls: one Struct for each shape of the contract, passed unchanged from the engine to the wire.

Lengths of time are seconds relative to the answer, rounded to the millisecond; moments are RFC 3339 UTC with
milliseconds. `gc=False`: these hold no cycles, so the collector needn't track them.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from keypool.core.keys import State

Ref = str | int
"""How a caller names a key: its text, or its public id as an int."""


class Answer(msgspec.Struct, gc=False):
    """The root of all answers."""


class GeneratedKey(Answer):
    """A key that was just generated."""

    id: int
    key: str
    state: State
    expires_in: float


class Lease(Answer):
    """An acquired key. It is available again after `release_in` seconds, unless it is unblocked before."""

    id: int
    key: str
    lease: int
    release_in: float
    expires_in: float


class Unblocked(Answer):
    """`changed` is false if the key was available already."""

    id: int
    state: State
    changed: bool


class KeptAlive(Answer):
    """A key whose expiry was postponed."""

    id: int
    expires_in: float


class Identity(Answer):
    """A purged key, without its text."""

    id: int
    hint: str


class EndedLease(Identity):
    """A lease that was ended by a caller who didn't give its number. For the audit log; no call returns it."""

    lease: int


Moment = Annotated[str, msgspec.Meta(extra_json_schema={"format": "date-time"})]


class Row(Answer):
    """A key without its text: `owner` and `release_in` null unless blocked, `lease` null if never served."""

    id: int
    hint: str
    state: State
    owner: str | None
    lease: int | None
    created_at: Moment
    expires_in: float
    release_in: float | None


class Page(Answer):
    """Rows in order; `next` is the cursor of the page after, null at the end."""

    keys: list[Row]
    next: str | None


class Revealed(Answer):
    """The text of a key."""

    id: int
    key: str


class Stats(Answer):
    """Four current counts, eight totals since the pool began, and the server's uptime, engine and version."""

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


class KeptAliveKeys(BatchAnswer, tag="keepalive"):
    """How many keys a batch kept alive, and which texts are unknown."""

    done: int
    unknown: list[str]


class UnblockedKeys(BatchAnswer, tag="unblock"):
    """How many keys are available after a batch, which texts are unknown, and which have a later lease."""

    done: int
    unknown: list[str]
    stale: list[str]


class DeletedKeys(BatchAnswer, tag="delete"):
    """How many keys a batch purged, and which texts are unknown."""

    done: int
    unknown: list[str]
