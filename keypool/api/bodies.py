"""The bodies of requests, one Struct for each shape of the contract.

The description of a member is in the error about a wrong value and in OpenAPI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from keypool.config.pool_settings import NULL_MEANS, PACE, PACE_TAKES, POOL_SETTINGS
from keypool.config.setting_types import Whole
from keypool.core.errors import BadRequest, SettingsError
from keypool.core.keys import MAX_NAME, MAX_OWNER, MAX_SEATS
from keypool.core.outcomes import OK_REPORT, Outcome, Report
from keypool.core.pace import Pace
from keypool.core.rules import SETTINGS, Settings

MAX_BATCH = 1000
MAX_SECRET = 4096
"""Bytes of the text of an imported key, in UTF-8."""
MAX_DATA = 4096
"""Bytes of a key's data, as compact JSON in UTF-8."""
MAX_LABELS = 16
MAX_WAIT = 60
MAX_USES = 10**9
MOST_SECONDS = 10**15
"""The largest length of time that a body may give: thirty million years, of which floats still count milliseconds."""


_OK, _RATE_LIMITED = Outcome.OK, Outcome.RATE_LIMITED  # saves look-ups for each report

_PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f]*$(?!\n)"  # in Python, $ also matches before a final newline
_Owner = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=MAX_OWNER,
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
_Uses = Annotated[
    int,
    Meta(
        ge=1,
        le=MAX_USES,
        description="how often the key was used in this lease, 1 to 10^9, that of the acquire among them: what is "
        "charged to a key with a pace",
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
    uses: _Uses | None = None

    def report(self, place: str = "") -> Report | None:
        """What the holder reports, if anything. `place` is that of the item in a batch. Raises BadRequest.

        Not checked as the body is decoded, since that would cost every unblock, most of which report nothing.
        """
        outcome, retry_after, reason = self.outcome, self.retry_after, self.reason
        if retry_after is None and reason is None:
            return OK_REPORT if outcome is _OK else None if outcome is None else Report(outcome)
        if retry_after is not None and outcome is not _RATE_LIMITED:
            raise BadRequest(f"wrong body: `retry_after` goes with `outcome` rate_limited only{place}")
        if outcome is None:
            raise BadRequest(
                f"wrong body: `reason` goes with an `outcome`: ok, rate_limited, error or invalid{place}"
            )
        return Report(outcome, retry_after, reason)


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


# The lengths are in the descriptions only: an item of a batch that doesn't keep to them fails by itself, while one of
# another shape is refused with the whole body. keypool/api/imports.py checks them.
_Secret = Annotated[
    str,
    Meta(
        description=f"the key from elsewhere: 1 to {MAX_SECRET} bytes of UTF-8",
        extra_json_schema={"minLength": 1, "maxLength": MAX_SECRET},
    ),
]
_Name = Annotated[
    str,
    Meta(
        description=f"for people, unique in the pool: 1 to {MAX_NAME} characters, no control characters, not beginning "
        "with id: or h:",
        extra_json_schema={"maxLength": MAX_NAME},
    ),
]
_Labels = Annotated[
    dict[str, str],
    Meta(
        description=f"shown to viewers: up to {MAX_LABELS}, names of 1 to {MAX_NAME} characters and values of up to "
        f"{MAX_NAME}, no control characters",
        extra_json_schema={"maxProperties": MAX_LABELS},
    ),
]
_Data = Annotated[
    dict[str, Any],
    Meta(description=f"a JSON object of up to {MAX_DATA} bytes, as secret as the key: for its holders only"),
]
_Seats = Annotated[
    int,
    Meta(
        description=f"1 (default) to {MAX_SEATS}: how many may hold the key at a time",
        extra_json_schema={"minimum": 1, "maximum": MAX_SEATS},
    ),
]
_Expire = Annotated[
    bool,
    Meta(description="true if imported keys shall be purged without keepalive, in a pool that purges keys"),
]


def _of_pace(name: str) -> Meta:
    """What a member of a pace takes. Its range is described only, as those of names are."""
    kind = PACE[name]
    return Meta(description=kind.takes, extra_json_schema={"minimum": kind.low, "maximum": kind.high})


class PaceBody(Body):
    """How often a key may be used: `count` times in `seconds`, of which `burst`, 1 if left out, may come at once."""

    count: Annotated[int, _of_pace("count")] | None = None
    seconds: Annotated[float, _of_pace("seconds")] | None = None
    burst: Annotated[int, _of_pace("burst")] | None = None

    def pace(self) -> Pace:
        """The pace. Raises BadRequest for a value that is missing or out of range."""
        if self.count is None or self.seconds is None:
            raise BadRequest(f"pace takes {PACE_TAKES}; `count` and `seconds` go together")
        burst = 1 if self.burst is None else self.burst
        try:
            for name, value in (("count", self.count), ("seconds", self.seconds), ("burst", burst)):
                PACE[name].typed(f"pace.{name}", value)
        except SettingsError as error:
            raise BadRequest(str(error)) from None
        return Pace(self.count, self.seconds, burst)


_Pace = Annotated[PaceBody, Meta(description=PACE_TAKES)]


class DetailsBody(Body):
    """What an operator writes about a key. `""` and `{}` remove what was there."""

    name: _Name | None = None
    labels: _Labels | None = None
    data: _Data | None = None
    pace: _Pace | None = None
    seats: _Seats | None = None


class ImportItem(DetailsBody, kw_only=True):
    """A key to import."""

    secret: _Secret


class NewKeyBody(DetailsBody):
    """Without `secret` a key is generated, and no other member may be there."""

    secret: _Secret | None = None
    expire: _Expire | None = None

    def __post_init__(self) -> None:
        others = (self.name, self.labels, self.data, self.pace, self.seats, self.expire)
        if self.secret is None and any(value is not None for value in others):
            raise ValueError(
                "`name`, `labels`, `data`, `pace`, `seats` and `expire` go with a `secret`; PATCH gives them to a key"
            )


class ReplaceBody(Body):
    """The new text of a key."""

    secret: _Secret


class FindBody(Body):
    """What an operator knows of a key."""

    key: Annotated[str, Meta(description="a whole key, else id:N, a name, or a hint as rows show it")]


class ReleaseOwnerBody(Body):
    """Whose leases to end."""

    owner: Annotated[
        _Owner, Meta(description="who holds the keys: 1 to 200 characters, no control characters")
    ]
    client: (
        Annotated[
            str,
            Meta(
                min_length=1,
                max_length=200,
                description="only leases under this token, as rows have it; any token if left out",
            ),
        ]
        | None
    ) = None


class BatchBody(Body, tag_field="op"):
    """One of nine kinds, distinguished by `op`."""


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


class ImportBatch(BatchBody, tag="import"):
    """Import keys, one by one."""

    # As it stands: it may have megabytes, and is read in slices (imports.py).
    keys: Annotated[
        msgspec.Raw,
        Meta(
            description=f"1 to {MAX_BATCH} keys to import",
            extra_json_schema={
                "type": "array",
                "items": {"$ref": "#/components/schemas/ImportItem"},
                "minItems": 1,
                "maxItems": MAX_BATCH,
            },
        ),
    ]
    exists: (
        Annotated[
            Literal["skip", "update"],
            Meta(
                description="what to do with a key that the pool has: skip (default), or update what was given with it"
            ),
        ]
        | None
    ) = None
    expire: _Expire | None = None


AnyBatch = (
    GenerateBatch
    | ImportBatch
    | AcquireBatch
    | KeepaliveBatch
    | UnblockBatch
    | ExtendBatch
    | DeleteBatch
    | QuarantineBatch
    | RestoreBatch
)


# -- pools


class DeletePoolQuery(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The query of a delete of a pool."""

    drain: Annotated[
        Literal["true", "false"] | None,
        Meta(description="true to purge the pool's keys first: those that are held when their leases end"),
    ] = None
    now: Annotated[
        Literal["true", "false"] | None,
        Meta(description="true to purge held keys at once; with drain=true only"),
    ] = None

    def __post_init__(self) -> None:
        if self.now == "true" and self.drain != "true":
            raise ValueError("`now` goes with drain=true only")


def _setting(name: str) -> tuple[str, Any, Any]:
    """A field of PoolBody. Its range is that of the flag."""
    if name == "pace":
        takes = f"{PACE_TAKES}; or null: {NULL_MEANS[name]}"
        return name, Annotated[PaceBody, Meta(description=takes)] | None | UnsetType, UNSET
    kind = POOL_SETTINGS[name]
    takes = f"{kind.takes}, or null: {NULL_MEANS[name]}" if name in NULL_MEANS else kind.takes
    number = int if isinstance(kind, Whole) else float
    ranged = Annotated[number, Meta(ge=kind.low, le=kind.high, description=takes)]  # type: ignore[valid-type]
    return name, ranged | None | UnsetType, UNSET


class _PoolBody(Body):
    """The settings of a pool, all optional."""

    def settings(self) -> Settings:
        """The settings that were given. Null is a value for some, and for the others as if it were absent.

        Raises BadRequest for a wrong pace.
        """
        given = zip(self.__struct_fields__, msgspec.structs.astuple(self), strict=True)
        return {
            name: value.pace() if isinstance(value, PaceBody) else value
            for name, value in given
            if value is not UNSET and (value is not None or name in NULL_MEANS)
        }


if TYPE_CHECKING:
    PoolBody = _PoolBody
else:
    PoolBody = msgspec.defstruct(
        "PoolBody",
        [_setting(name) for name in SETTINGS],
        bases=(_PoolBody,),
        namespace={"__doc__": _PoolBody.__doc__},
        module=__name__,
    )
