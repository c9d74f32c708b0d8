"""The exception hierarchy.

    KeypoolError                     500 internal if nothing below fits
    ├── PoolError                    the pool's rules refuse the call
    │   ├── UnknownKey               never generated, deleted or expired
    │   ├── NoKeyAvailable           carries `retry_after`, a hint in seconds
    │   ├── StaleLease               the key was served again since, or never with this number
    │   ├── ManySeats                several hold the key at a time, and the caller doesn't say which it is
    │   ├── LeaseOver                the key's latest lease has ended, so it can't be extended
    │   ├── BlockLimit               an extension that would not move the end of the lease
    │   ├── Superseded               the same attempt was made again, and waits in place of this call
    │   ├── PoolFull                 `max_keys` reached
    │   ├── NameTaken                another key of the pool has this name
    │   ├── SecretExists             another key of the pool has this text
    │   ├── KeysWouldExpire          an import into a pool that purges keys
    │   ├── SecretsKeyRequired       an import into a Valkey without a secrets key
    │   ├── UnknownPool              no such pool, or not one of this token's
    │   ├── TooManyPools             `--max-pools` reached
    │   ├── PoolDraining             the pool is being emptied for good
    │   ├── PoolNotEmpty             a pool that has keys can't be deleted without draining it
    │   ├── PoolFixed                what flags decide of the pool `default` can't be changed by a call
    │   └── ShareSpent               the token holds as many leases as it may; carries `retry_after`
    ├── Unavailable                  the same call may succeed later
    │   ├── StorageUnavailable       the outcome is unknown: the change may yet reach the disk
    │   ├── Loading                  the server is reading its keys; the call was not made
    │   ├── Draining                 the server is stopping
    │   ├── TooManyWaiters           `--max-waiters` reached
    │   └── TooMany                  carries `retry_after`, in seconds
    │       ├── TooManyViewers       `--max-viewers` reached
    │       └── TooManySignIns       too many wrong tokens from one address
    └── RequestRefused               the request is wrong, or this caller may not make it
        ├── BadRequest               malformed JSON, a wrong field or parameter, out of range
        ├── Unauthorized             no token; WrongToken: an unknown one
        ├── Forbidden  CrossSite  WrongHost
        ├── NotFound                 no such path
        ├── MethodNotAllowed         carries `allow`, the methods that the path has
        ├── UpgradeRequired          a request for the feed that isn't a websocket's
        ├── RequestTimeout           the head or body took longer than the server waits
        └── PayloadTooLarge  UriTooLong  HeadersTooLarge  UnsupportedMediaType
    StartError                       the server can't start: one line, exit status 1
    └── SettingsError                a wrong flag, variable or TOML key: exit status 2

Each class has its `code`, which programs compare, and its `title`, which people read. The instance's `detail` says what
was wrong and what would be right. This module knows nothing of HTTP: api/problems.py has the status of each class.
"""

from __future__ import annotations

import math
from typing import ClassVar


class KeypoolError(Exception):
    """The server failed; its log has the reason, under the request id.

    This is the root of all errors that calls may raise.
    """

    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class PoolError(KeypoolError):
    """The pool's rules refuse the call; nothing has changed."""


class UnknownKey(PoolError):
    """No live key has this text or id."""

    code = "unknown-key"
    title = "Unknown key"

    def __init__(
        self, detail: str = "no such key: it was never generated here, was deleted, or expired"
    ) -> None:
        super().__init__(detail)


class NoKeyAvailable(PoolError):
    """No key can be served now.

    `retry_after`: seconds until the earliest release or end of a cooldown, None if nothing is due. `blocked`, `cooling`
    and `quarantined` are numbers of keys.
    """

    code = "no-key-available"
    title = "No key available"

    def __init__(
        self, retry_after: float | None = None, *, blocked: int = 0, cooling: int = 0, quarantined: int = 0
    ) -> None:
        counts = {"blocked": blocked, "cooling": cooling, "quarantined": quarantined}
        held = ", ".join(f"{number} {state}" for state, number in counts.items() if number)
        if retry_after is not None:
            detail = f"no key is available ({held}); the earliest is due in {retry_after:.3f} s"
        elif quarantined:
            detail = f"no key is available ({held}): restore keys, or generate some"
        else:
            detail = "no key is available, and none is blocked or cooling: generate keys first"
        super().__init__(detail)
        self.retry_after = retry_after
        self.blocked, self.cooling, self.quarantined = blocked, cooling, quarantined


class StaleLease(PoolError):
    """The lease number given isn't the key's latest."""

    code = "stale-lease"
    title = "Stale lease"

    def __init__(self, given: int, latest: int | None) -> None:
        if latest is None:
            detail = f"lease {given} was never given for this key: it has not been served yet"
        elif given < latest:
            detail = f"lease {given} is over: the key was served again since, under a later lease"
        else:
            detail = f"lease {given} was never given for this key: its latest lease has a smaller number"
        super().__init__(detail)


class ManySeats(PoolError):
    """The key has several seats, and its text doesn't say which one is meant."""

    code = "many-seats"
    title = "Many seats"

    def __init__(self, seats: int) -> None:
        super().__init__(
            f"this key has {seats} seats, each with a lease of its own: name yours by the handle that acquire gave, or "
            "by the lease number beside the key"
        )


class LeaseOver(PoolError):
    """The key's latest lease has ended, or ends in a quarantine: it can't be extended."""

    code = "lease-over"
    title = "Lease over"

    def __init__(self, pending: bool = False) -> None:
        super().__init__(
            "an operator will quarantine this key when its lease ends, so the lease can't be extended: finish, and "
            "acquire another key"
            if pending
            else "this lease has ended, and nothing revives it: acquire another key"
        )


class BlockLimit(PoolError):
    """An extension that would not move the end of the lease: `longest` is the pool's `max_block_seconds`."""

    code = "block-limit"
    title = "Block limit"

    def __init__(self, release_in: float, *, longest: float | None = None) -> None:
        super().__init__(
            f"the lease lasts {release_in:.3f} s more as it is: `seconds` must be larger than that to extend it"
            if longest is None
            else f"a lease lasts {longest:.15g} s at most (max_block_seconds), and this one lasts until then already"
        )


class Superseded(PoolError):
    """The same attempt was made again while this call waited."""

    code = "superseded"
    title = "Superseded"

    def __init__(self) -> None:
        super().__init__(
            "another acquire with this Idempotency-Key has taken this call's place in the queue: wait for its answer"
        )


class NameTaken(PoolError):
    """Another key of the pool has this name."""

    code = "name-taken"
    title = "Name taken"

    def __init__(self, id: int) -> None:
        super().__init__(f"the key id:{id} of this pool has this name already: names are unique in a pool")


class SecretExists(PoolError):
    """Another key of the pool has this text."""

    code = "secret-exists"
    title = "Secret exists"

    def __init__(self, id: int) -> None:
        super().__init__(
            f"the key id:{id} of this pool has this secret already: delete one of the two, or give another secret"
        )


class KeysWouldExpire(PoolError):
    """An import into a pool that purges keys that nobody keeps alive."""

    code = "keys-would-expire"
    title = "Keys would expire"

    def __init__(self, keepalive_seconds: float) -> None:
        super().__init__(
            f"this pool purges keys that nobody keeps alive for {keepalive_seconds:.15g} s: set its keepalive_seconds "
            'to null, or say "expire":true if imported keys shall expire likewise'
        )


class SecretsKeyRequired(PoolError):
    """An import into Valkey, or a rekey, on a server without a secrets key."""

    code = "secrets-key-required"
    title = "Secrets key required"

    def __init__(self) -> None:
        super().__init__(
            "this server has no secrets key, under which keys would be encrypted, as imported ones always are over "
            "Valkey: start it with KEYPOOL_SECRETS_KEY"
        )


class UnknownPool(PoolError):
    """No such pool, or not one that this token may use."""

    code = "unknown-pool"
    title = "Unknown pool"

    def __init__(self) -> None:
        super().__init__("there is no pool of this name, or this token is not for it: see GET /api/v1/pools")


class TooManyPools(PoolError):
    """The server has as many pools as it may."""

    code = "too-many-pools"
    title = "Too many pools"

    def __init__(self, max_pools: int) -> None:
        super().__init__(
            f"there are {max_pools} pools beside `default` already (--max-pools): delete one first"
        )


class PoolDraining(PoolError):
    """The pool is being emptied, and will be gone."""

    code = "pool-draining"
    title = "Pool is draining"

    def __init__(self) -> None:
        super().__init__(
            "this pool is being deleted: it serves and takes no key any more, and is gone when its leases have ended"
        )


class PoolNotEmpty(PoolError):
    """A pool that has keys is not deleted by accident."""

    code = "pool-not-empty"
    title = "Pool not empty"

    def __init__(self, total: int) -> None:
        super().__init__(
            f"this pool has keys ({total}): delete them first, or add ?drain=true to have them purged with it"
        )


class PoolFixed(PoolError):
    """What the server's flags decide can't be changed by a call."""

    code = "pool-fixed"
    title = "Pool is fixed"

    def __init__(self, settings: tuple[str, ...] = ()) -> None:
        super().__init__(
            f"the server's flags decide {', '.join(settings)} of the pool `default`: start it with other flags, or make"
            " a pool of its own"
            if settings
            else "the pool `default` is always there, and can't be deleted"
        )


class ShareSpent(PoolError):
    """The token holds as many leases as it may. `retry_after`: seconds until one of them may end."""

    code = "share-spent"
    title = "Share spent"

    def __init__(self, max_held: int, retry_after: float) -> None:
        super().__init__(
            f"this token holds as many leases as it may, {max_held} (max_held): give one back, or wait for its own"
        )
        self.retry_after = retry_after


class PoolFull(PoolError):
    """The call would take the pool beyond `max_keys` keys."""

    code = "pool-full"
    title = "Pool full"

    def __init__(self, total: int, requested: int, max_keys: int) -> None:
        super().__init__(
            f"{requested} more would exceed max_keys, {max_keys}: the pool holds {total}; delete keys first"
        )


class Unavailable(KeypoolError):
    """The server can't serve the call now. The same call may succeed later."""


class StorageUnavailable(Unavailable):
    """The data file or Valkey can't be written. It is unknown whether this call's change is kept."""

    code = "storage-unavailable"
    title = "Storage unavailable"


class Loading(Unavailable):
    """The server is still loading its keys. The call was not made; retry in a moment."""

    code = "loading"
    title = "Server is loading"

    def __init__(self) -> None:
        super().__init__("the server is loading its keys; try again in a moment")


class Draining(Unavailable):
    """The server is stopping; retry after its restart, or on another server."""

    code = "draining"
    title = "Server is draining"

    def __init__(self) -> None:
        super().__init__("the server is stopping and no longer serves waiters; try again after its restart")


class TooManyWaiters(Unavailable):
    """`--max-waiters` calls are already waiting for a key."""

    code = "too-many-waiters"
    title = "Too many waiters"

    def __init__(self, max_waiters: int) -> None:
        super().__init__(
            f"{max_waiters} calls (--max-waiters) are already waiting for a key; try again later"
        )


class TooMany(Unavailable):
    """More than the server accepts at a time. `retry_after`: seconds after which to try again."""

    def __init__(self, detail: str, retry_after: float) -> None:
        super().__init__(detail)
        self.retry_after = retry_after


class TooManyViewers(TooMany):
    """`--max-viewers` websockets are already open."""

    code = "too-many-viewers"
    title = "Too many viewers"

    def __init__(self, max_viewers: int) -> None:
        super().__init__(
            f"{max_viewers} viewers (--max-viewers) already have the feed open; poll GET /stats instead", 5
        )


class TooManySignIns(TooMany):
    """Too many wrong tokens from this address. A right one is still accepted."""

    code = "too-many-sign-ins"
    title = "Too many sign-ins"

    def __init__(self, retry_after: float) -> None:
        super().__init__(
            "this token is not known to the server, and too many wrong ones came from this address: try the next "
            f"one in {math.ceil(retry_after)} s",
            retry_after,
        )


class RequestRefused(KeypoolError):
    """The request itself is wrong, or this caller may not make it; nothing has changed."""


class BadRequest(RequestRefused):
    """A wrong body or query: `detail` names the field and the values it accepts."""

    code = "bad-request"
    title = "Bad request"


class Unauthorized(RequestRefused):
    """No token, or an unknown one."""

    code = "unauthorized"
    title = "Unauthorized"


class WrongToken(Unauthorized):
    """An unknown token. `mark` is the start of its digest, for the audit log."""

    def __init__(self, mark: str) -> None:
        super().__init__("this token is not known to the server")
        self.mark = mark


class Forbidden(RequestRefused):
    """The token's role may not make this call."""

    code = "forbidden"
    title = "Forbidden"


class CrossSite(RequestRefused):
    """A browser sent this on behalf of another site."""

    code = "cross-site"
    title = "Cross-site request"


class WrongHost(RequestRefused):
    """An open server answers only to loopback names."""

    code = "wrong-host"
    title = "Wrong host"


class NotFound(RequestRefused):
    """No such path."""

    code = "not-found"
    title = "Not found"

    def __init__(self) -> None:
        super().__init__("there is nothing at this path; the API is under /api/v1/, see docs/api.md")


class MethodNotAllowed(RequestRefused):
    """The path exists, but not with this method."""

    code = "method-not-allowed"
    title = "Method not allowed"

    def __init__(self, allow: str) -> None:
        super().__init__(f"this path accepts {allow}")
        self.allow = allow


class UpgradeRequired(RequestRefused):
    """The feed is a websocket."""

    code = "upgrade-required"
    title = "Upgrade required"

    def __init__(self) -> None:
        super().__init__("the feed is a websocket: send Upgrade: websocket, Sec-WebSocket-Version: 13")


class RequestTimeout(RequestRefused):
    """The request did not arrive completely within the time limit."""

    code = "request-timeout"
    title = "Request timeout"


class PayloadTooLarge(RequestRefused):
    """The body is larger than the server reads."""

    code = "payload-too-large"
    title = "Payload too large"


class UriTooLong(RequestRefused):
    """The request target is longer than the server reads."""

    code = "uri-too-long"
    title = "URI too long"


class HeadersTooLarge(RequestRefused):
    """The header block is larger than the server reads."""

    code = "headers-too-large"
    title = "Headers too large"


class UnsupportedMediaType(RequestRefused):
    """The `Content-Type` or `Content-Encoding` isn't that of plain JSON."""

    code = "unsupported-media-type"
    title = "Unsupported media type"


class StartError(Exception):
    """The server can't start. The message is one line for the person who started it."""


class SettingsError(StartError):
    """A wrong flag, environment variable or TOML key: the message names it and the values it accepts."""
