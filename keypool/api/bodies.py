"""The bodies of requests, one Struct for each shape of the contract.

The description of a member is in the error about a wrong value and in OpenAPI.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from keypool.core.outcomes import Outcome, Report

MAX_BATCH = 1000
MAX_WAIT = 60
MOST_SECONDS = 10**15
"""The largest length of time that a body may give: thirty million years, of which floats still count milliseconds."""


_PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f]*$(?!\n)"  # in Python, $ also matches before a final newline
_Owner = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=200,
        pattern=_PRINTABLE,
        description="who will hold the key, for lists: 1 to 200 characters, no control characters",
    ),
]
_Reason = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=200,
        pattern=_PRINTABLE,
        description="why, for people: 1 to 200 characters, no control characters",
    ),
]
_Outcome = Annotated[
    Outcome,
    Meta(
        description="how the work went: ok, rate_limited, error or invalid; with the lease number or a handle"
    ),
]
_RetryAfter = Annotated[
    float,
    Meta(
        ge=0,
        le=MOST_SECONDS,
        description="seconds that the key cools, 0 to 10^15, with outcome rate_limited only",
    ),
]
_Seconds = Annotated[
    float,
    Meta(
        gt=0,
        le=MOST_SECONDS,
        description="seconds from now that the lease shall last, over 0; the pool's block_seconds if left out",
    ),
]
_BlockSeconds = Annotated[
    float,
    Meta(
        gt=0,
        le=MOST_SECONDS,
        description="seconds that the block shall last in place of the pool's block_seconds: from 1, or block_seconds "
        "if that is less, to max_block_seconds",
    ),
]
_LeaseNumber = Annotated[int, Meta(ge=0, le=2**63 - 1, description="the lease number that acquire gave")]
_Count = Annotated[int, Meta(ge=1, le=MAX_BATCH)]
_KeyText = Annotated[str, Meta(description="the key, the handle of its lease, or id:N for admins")]
_Keys = Annotated[list[_KeyText], Meta(min_length=1, max_length=MAX_BATCH)]


class Body(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """The root of all request bodies. An optional member is None by default, so that null is as if it were absent."""


class NoBody(Body):
    """The body of a call without members: an empty object is accepted."""


class AcquireBody(Body):
    """All members are optional, as is the body."""

    owner: _Owner | None = None
    wait: Annotated[float, Meta(ge=0, le=MAX_WAIT, description="seconds to wait for a key")] | None = None
    block_seconds: _BlockSeconds | None = None


class UnblockBody(Body):
    """Without the lease number, and unless the key is named by a handle, whoever holds the key loses it."""

    lease: _LeaseNumber | None = None
    outcome: _Outcome | None = None
    retry_after: _RetryAfter | None = None
    reason: _Reason | None = None

    def __post_init__(self) -> None:
        if self.retry_after is not None and self.outcome is not Outcome.RATE_LIMITED:
            raise ValueError("`retry_after` goes with `outcome` rate_limited only")
        if self.reason is not None and self.outcome is None:
            raise ValueError("`reason` goes with an `outcome`: ok, rate_limited, error or invalid")

    def report(self) -> Report | None:
        """What the holder reports, if anything."""
        return None if self.outcome is None else Report(self.outcome, self.retry_after, self.reason)


class UnblockItem(UnblockBody, kw_only=True):
    """A key of a batch, with the body of its unblock."""

    key: _KeyText


class ExtendBody(Body):
    """The lease number is required unless the key is named by a handle."""

    lease: _LeaseNumber | None = None
    seconds: _Seconds | None = None


class ExtendItem(ExtendBody, kw_only=True):
    """A key of a batch, with the body of its extend."""

    key: _KeyText


_Now = Annotated[
    bool, Meta(description="true to end the lease of a key that is held, instead of waiting for its end")
]


class QuarantineBody(Body):
    """Both members are optional, as is the body."""

    reason: _Reason | None = None
    now: _Now | None = None


class BatchBody(Body, tag_field="op"):
    """One of eight kinds, distinguished by `op`."""


class GenerateBatch(BatchBody, tag="generate"):
    """Generate keys, all or none."""

    count: _Count


class AcquireBatch(BatchBody, tag="acquire"):
    """Acquire up to `count` keys."""

    count: _Count
    owner: _Owner | None = None
    block_seconds: _BlockSeconds | None = None


class KeepaliveBatch(BatchBody, tag="keepalive"):
    """Renew the TTL of keys."""

    keys: _Keys


class UnblockBatch(BatchBody, tag="unblock"):
    """Free keys, with or without lease numbers, and report on them."""

    keys: Annotated[list[_KeyText | UnblockItem], Meta(min_length=1, max_length=MAX_BATCH)]


class ExtendBatch(BatchBody, tag="extend"):
    """Let leases end later. A plain text must be a handle."""

    keys: Annotated[list[_KeyText | ExtendItem], Meta(min_length=1, max_length=MAX_BATCH)]


class QuarantineBatch(BatchBody, tag="quarantine"):
    """Take keys out of service."""

    keys: _Keys
    reason: _Reason | None = None
    now: _Now | None = None


class RestoreBatch(BatchBody, tag="restore"):
    """Make cooling and quarantined keys available."""

    keys: _Keys


class DeleteBatch(BatchBody, tag="delete"):
    """Purge keys."""

    keys: _Keys


AnyBatch = (
    GenerateBatch
    | AcquireBatch
    | KeepaliveBatch
    | UnblockBatch
    | ExtendBatch
    | DeleteBatch
    | QuarantineBatch
    | RestoreBatch
)
