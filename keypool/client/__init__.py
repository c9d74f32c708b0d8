"""The client library of keypool: leases keys, keeps keys alive, and makes every call of the API.

    >>> from keypool.client import KeyPool, NoKeyAvailable
    >>> with KeyPool("http://127.0.0.1:8888", token="…") as pool:
    ...     with pool.lease(wait=10) as key:
    ...         fetch(headers={"X-Api-Key": key.secret})

`KeyPool` blocks, `AsyncKeyPool` is for asyncio; both send with httpx2. Nothing of the server is imported.
docs/client.md is the guide. The modules, from the bottom up:

    errors.py       the exceptions               answers.py      the types of the results
    settings.py     arguments, checked           calls.py        every call as data
    reports.py      what a response says of a key   imports.py      keys from elsewhere, as JSON
    attempts.py     retries and deadlines        held.py         a key while it is held
    rounds.py       the rounds of a keeper       signals.py      exit_on_sigterm
    blocking.py, pool.py                         the blocking client
    asynchronous.py, async_pool.py               the asynchronous one
    testing.py      a pool in memory, for the tests of your program
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from keypool.client.answers import (
    Done,
    Extended,
    GeneratedKey,
    HasSecret,
    Holder,
    How,
    Imported,
    ImportedKey,
    Imports,
    KeptAlive,
    KeyLike,
    LeasedKey,
    Outcome,
    Page,
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
)
from keypool.client.calls import (
    LeaseItem,
    Order,
    OutcomeName,
    Progress,
    StateName,
    Unblock,
    UnblockItem,
)
from keypool.client.errors import (
    AnswerLost,
    BadRequest,
    BlockLimit,
    CrossSite,
    Draining,
    Forbidden,
    GatewayError,
    HeadersTooLarge,
    Internal,
    KeyPoolError,
    KeysWouldExpire,
    LeaseLost,
    LeaseOver,
    Loading,
    ManySeats,
    MethodNotAllowed,
    NameTaken,
    NoKeyAvailable,
    NotFound,
    PayloadTooLarge,
    PoolClosed,
    PoolDraining,
    PoolFixed,
    PoolFull,
    PoolNotEmpty,
    Refused,
    RequestTimeout,
    SecretExists,
    SecretsKeyRequired,
    ShareSpent,
    StaleLease,
    StorageUnavailable,
    Superseded,
    TooManyPools,
    TooManySignIns,
    TooManyViewers,
    TooManyWaiters,
    Unauthorized,
    Unavailable,
    UnexpectedAnswer,
    UnknownKey,
    UnknownPool,
    Unreachable,
    UnsupportedMediaType,
    UpgradeRequired,
    UriTooLong,
    WrongHost,
)
from keypool.client.imports import Exists, NewKey
from keypool.client.pool import HeldKey, Keeper, KeyPool, Lease, LeasedKeys
from keypool.client.settings import Retry
from keypool.client.signals import exit_on_sigterm

if TYPE_CHECKING:
    from keypool.client.async_pool import AsyncHeldKey, AsyncKeeper, AsyncKeyPool, AsyncLease, AsyncLeasedKeys

__all__ = [
    "AnswerLost",
    "AsyncHeldKey",
    "AsyncKeeper",
    "AsyncKeyPool",
    "AsyncLease",
    "AsyncLeasedKeys",
    "BadRequest",
    "BlockLimit",
    "CrossSite",
    "Done",
    "Draining",
    "Exists",
    "Extended",
    "Forbidden",
    "GatewayError",
    "GeneratedKey",
    "HasSecret",
    "HeadersTooLarge",
    "HeldKey",
    "Holder",
    "How",
    "Imported",
    "ImportedKey",
    "Imports",
    "Internal",
    "Keeper",
    "KeptAlive",
    "KeyLike",
    "KeyPool",
    "KeyPoolError",
    "KeysWouldExpire",
    "Lease",
    "LeaseItem",
    "LeaseLost",
    "LeaseOver",
    "LeasedKey",
    "LeasedKeys",
    "Loading",
    "ManySeats",
    "MethodNotAllowed",
    "NameTaken",
    "NewKey",
    "NoKeyAvailable",
    "NotFound",
    "Order",
    "Outcome",
    "OutcomeName",
    "Page",
    "PastLease",
    "PayloadTooLarge",
    "PoolClosed",
    "PoolDraining",
    "PoolFixed",
    "PoolFull",
    "PoolInfo",
    "PoolNotEmpty",
    "Progress",
    "RareEvent",
    "Refused",
    "Rekeying",
    "RequestTimeout",
    "Retry",
    "Revealed",
    "Row",
    "SecretExists",
    "SecretsKeyRequired",
    "ShareSpent",
    "StaleLease",
    "State",
    "StateName",
    "Stats",
    "StorageUnavailable",
    "Superseded",
    "TooManyPools",
    "TooManySignIns",
    "TooManyViewers",
    "TooManyWaiters",
    "Unauthorized",
    "Unavailable",
    "Unblock",
    "UnblockItem",
    "Unblocked",
    "UnexpectedAnswer",
    "UnknownKey",
    "UnknownPool",
    "Unreachable",
    "UnsupportedMediaType",
    "UpgradeRequired",
    "UriTooLong",
    "Waiting",
    "WrongHost",
    "exit_on_sigterm",
]


def __getattr__(name: str) -> Any:
    # Imported on demand, since asyncio takes a while to import and the blocking client doesn't need it.
    if not name.startswith("Async") or name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("keypool.client.async_pool"), name)
