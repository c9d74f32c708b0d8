"""The client library of keypool: leases keys, keeps keys alive, and makes every call of the API.

    >>> from keypool.client import KeyPool, NoKeyAvailable
    >>> with KeyPool("http://127.0.0.1:8888", token="…") as pool:
    ...     with pool.lease(owner="worker-7", wait=10) as key:
    ...         fetch(headers={"X-Api-Key": str(key)})

`KeyPool` needs nothing but the standard library; `AsyncKeyPool` needs aiohttp or Tornado, and imports it when
it is made. Nothing of the server is imported by either. docs/client.md shows all of it by example.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from keypool.client.errors import (
    AnswerLost,
    BadRequest,
    CrossSite,
    Draining,
    Forbidden,
    GatewayError,
    HeadersTooLarge,
    Internal,
    KeyPoolError,
    LeaseLost,
    Loading,
    MethodNotAllowed,
    NoKeyAvailable,
    NotFound,
    PayloadTooLarge,
    PoolClosed,
    PoolFull,
    Refused,
    RequestTimeout,
    StaleLease,
    StorageUnavailable,
    TooManySignIns,
    TooManyViewers,
    TooManyWaiters,
    Unauthorized,
    Unavailable,
    UnexpectedAnswer,
    UnknownKey,
    Unreachable,
    UnsupportedMediaType,
    UpgradeRequired,
    UriTooLong,
    WrongHost,
)
from keypool.client.held import HeldKey
from keypool.client.keeper import Keeper
from keypool.client.lease import Lease
from keypool.client.pool import KeyPool
from keypool.client.retry import Retry
from keypool.client.shapes import (
    Done,
    GeneratedKey,
    KeptAlive,
    LeasedKey,
    Page,
    Revealed,
    Row,
    Stats,
    Unblocked,
)

if TYPE_CHECKING:
    from keypool.client.async_keeper import AsyncKeeper
    from keypool.client.async_lease import AsyncLease
    from keypool.client.async_pool import AsyncKeyPool

__all__ = [
    "AnswerLost",
    "AsyncKeeper",
    "AsyncKeyPool",
    "AsyncLease",
    "BadRequest",
    "CrossSite",
    "Done",
    "Draining",
    "Forbidden",
    "GatewayError",
    "GeneratedKey",
    "HeadersTooLarge",
    "HeldKey",
    "Internal",
    "Keeper",
    "KeptAlive",
    "KeyPool",
    "KeyPoolError",
    "Lease",
    "LeaseLost",
    "LeasedKey",
    "Loading",
    "MethodNotAllowed",
    "NoKeyAvailable",
    "NotFound",
    "Page",
    "PayloadTooLarge",
    "PoolClosed",
    "PoolFull",
    "Refused",
    "RequestTimeout",
    "Retry",
    "Revealed",
    "Row",
    "StaleLease",
    "Stats",
    "StorageUnavailable",
    "TooManySignIns",
    "TooManyViewers",
    "TooManyWaiters",
    "Unauthorized",
    "Unavailable",
    "Unblocked",
    "UnexpectedAnswer",
    "UnknownKey",
    "Unreachable",
    "UnsupportedMediaType",
    "UpgradeRequired",
    "UriTooLong",
    "WrongHost",
]

# asyncio takes longer to import than all the rest; whoever uses the synchronous client doesn't wait for it.
_ASYNC = {"AsyncKeeper": "async_keeper", "AsyncLease": "async_lease", "AsyncKeyPool": "async_pool"}


def __getattr__(name: str) -> Any:
    if name not in _ASYNC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"keypool.client.{_ASYNC[name]}"), name)
