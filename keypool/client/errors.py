"""The exceptions of the client.

    KeyPoolError
    ├── Refused                    the server refused the call: `code`, `status`, `detail`, `request_id`
    │   ├── UnknownKey             never generated, deleted or expired
    │   ├── NoKeyAvailable         `retry_after`: seconds to the earliest release or end of a cooldown, a hint
    │   ├── StaleLease             the key was served again since, or never under this number
    │   ├── LeaseOver              the lease has ended, or ends in a quarantine: it can't be extended
    │   ├── ManySeats              several hold the key, and its text alone doesn't say which one is meant
    │   ├── BlockLimit             an extension that would not let the lease last longer
    │   ├── Superseded             the same acquire was sent again, and waits in place of this one
    │   ├── PoolFull
    │   ├── NameTaken  SecretExists    another key of the pool has this name, this text
    │   ├── KeysWouldExpire        an import into a pool that purges keys
    │   ├── SecretsKeyRequired     an import into Valkey, or a rekey, by a server without a secrets key
    │   ├── UnknownPool            no such pool, or not one of this token's
    │   ├── TooManyPools  PoolDraining  PoolNotEmpty  PoolFixed
    │   ├── ShareSpent             the token holds as many leases as it may; `retry_after`: seconds, a hint
    │   ├── Unavailable            temporarily; the client has retried already
    │   │   ├── StorageUnavailable     the outcome is not known
    │   │   ├── Loading  Draining  TooManyWaiters
    │   ├── Unauthorized  Forbidden  CrossSite  WrongHost
    │   ├── BadRequest  NotFound  MethodNotAllowed  RequestTimeout  PayloadTooLarge  UriTooLong
    │   ├── UnsupportedMediaType  UpgradeRequired  HeadersTooLarge
    │   ├── TooManyViewers  TooManySignIns
    │   └── Internal               a bug of the server; its log has the details under `request_id`
    ├── Unreachable                no connection: the call did not happen
    ├── AnswerLost                 the request was sent, no complete answer came: the outcome is not known
    ├── UnexpectedAnswer           an answer that no keypool server gives
    │   └── GatewayError           502, 503 or 504 from a proxy
    ├── LeaseLost                  a key was used, or given back, after its lease had ended
    └── PoolClosed                 a call during or after `close`

`may_have_happened` of every error is whether the call may have taken effect nevertheless; the client's own retries
depend on it (attempts.py). Below `Refused` there is one class
for each code of the server; an unknown code, from a newer server, is a plain Refused.
"""

from __future__ import annotations

import json
import re
from typing import Any


class KeyPoolError(Exception):
    """The base class. All of them can be pickled, as worker processes pass errors to their parent."""

    may_have_happened: bool = False
    """Whether the call may have taken effect although it failed."""

    retry_after: float | None = None
    """Seconds after which the server suggests a retry, if it does."""

    repeated: bool = False
    """Whether this is the result of a retry whose earlier attempt may have taken effect."""

    partial: Any = None
    """What a batch of several calls had done before one of them failed."""


class Unreachable(KeyPoolError):
    """No connection could be made. `transient` is whether a retry may help."""

    transient: bool = True


class AnswerLost(KeyPoolError):
    """The request was sent, then the connection broke or the timeout passed."""

    may_have_happened = True


class UnexpectedAnswer(KeyPoolError):
    """An answer that no keypool server gives: from a proxy, or another server. `status` is 0 if not HTTP."""

    may_have_happened = True

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message, status)
        self.status = status

    def __str__(self) -> str:
        return str(self.args[0])


class GatewayError(UnexpectedAnswer):
    """A proxy answered 502, 503 or 504; the server may have executed the call nevertheless."""


class LeaseLost(KeyPoolError):
    """The lease has ended: the key may be someone else's by now."""


class PoolClosed(KeyPoolError):
    """The client was closed."""


class Refused(KeyPoolError):
    """The server answered with a problem. Nothing has changed, unless the class says otherwise."""

    code: str = ""
    status: int = 0
    title: str = ""
    request_id: str = ""

    def __init_subclass__(cls) -> None:
        cls.code = re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()
        BY_CODE[cls.code] = cls

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


BY_CODE: dict[str, type[Refused]] = {}
"""The classes by code: the name of the class in lower case with hyphens."""


class UnknownKey(Refused):
    """No live key has this text or id."""


class NoKeyAvailable(Refused):
    """Every key is blocked, cooling or quarantined, or the pool is empty. An older server doesn't count them: None."""

    blocked: int | None = None
    cooling: int | None = None
    quarantined: int | None = None


class StaleLease(Refused):
    """The lease number is not the key's latest: someone else holds the key now, or the number was never valid."""


class ManySeats(Refused):
    """The key has several seats, and its text doesn't say which one is meant: a handle or the lease number does."""


class LeaseOver(Refused):
    """The lease can't be extended: it has ended, or the key will be quarantined when it ends."""


class BlockLimit(Refused):
    """The lease would not last longer: it lasts as long as the pool allows, or longer than asked for."""


class Superseded(Refused):
    """The same acquire was sent again and has taken this one's place in the queue. The client repeats it."""


class PoolFull(Refused):
    """The pool holds as many keys as it may."""


class NameTaken(Refused):
    """Another key of the pool has this name."""


class SecretExists(Refused):
    """Another key of the pool has this text."""


class KeysWouldExpire(Refused):
    """The pool purges keys that nobody keeps alive: an import into it has to allow that, by `expire=True`."""


class SecretsKeyRequired(Refused):
    """The server has no secrets key: so it imports nothing into Valkey, and encrypts nothing."""


class UnknownPool(Refused):
    """There is no pool of this name, or the token is not for it."""


class TooManyPools(Refused):
    """The server has as many pools as it may."""


class PoolDraining(Refused):
    """The pool is being deleted: it serves and takes no key any more, and only its leases go on to their ends."""


class PoolNotEmpty(Refused):
    """The pool has keys: it is deleted only with `drain`."""


class PoolFixed(Refused):
    """The server's flags decide this for the pool `default`, which can't be deleted either."""


class ShareSpent(Refused):
    """The token holds as many leases as it may. `retry_after`: seconds until one of them may end."""


class Unavailable(Refused):
    """Temporarily. The client has retried for as long as its settings allow."""


class StorageUnavailable(Unavailable):
    """The server could not store the change: the outcome is not known."""

    may_have_happened = True


class Loading(Unavailable):
    """The server is still reading its keys."""


class Draining(Unavailable):
    """The server is stopping."""


class TooManyWaiters(Unavailable):
    """The server's limit of waiting acquires is reached."""


class Unauthorized(Refused):
    """No token, or an unknown one."""


class Forbidden(Refused):
    """The token's role does not allow this call."""


class CrossSite(Refused):
    """The server considers this a browser's request from another site."""


class WrongHost(Refused):
    """A server without tokens answers to loopback names only."""


class BadRequest(Refused):
    """A wrong field or value; `detail` names it."""


class NotFound(Refused):
    """No such path: the URL is probably wrong."""


class MethodNotAllowed(Refused):
    """The path does not have this method: the URL is probably wrong."""


class RequestTimeout(Refused):
    """The request arrived too slowly."""


class PayloadTooLarge(Refused):
    """The body is larger than the server reads."""


class UriTooLong(Refused):
    """The request target is longer than the server reads."""


class UnsupportedMediaType(Refused):
    """The server did not recognise the body as JSON."""


class UpgradeRequired(Refused):
    """This path is a websocket."""


class HeadersTooLarge(Refused):
    """The headers are larger than the server reads."""


class TooManyViewers(Refused):
    """The server's limit of followers of the feed is reached."""


class TooManySignIns(Refused):
    """Too many sign-ins in a short time."""


class Internal(Refused):
    """The server failed; its log has the details under `request_id`."""


del BY_CODE["unavailable"]  # a base class, not a code


def from_answer(status: int, body: bytes) -> KeyPoolError:
    """The error for an answer of status 400 or more. Never raises, whatever the body."""
    problem = _problem(body)
    if problem is None:
        kind = GatewayError if status in (502, 503, 504) else UnexpectedAnswer
        return kind(f"answered {status}, and not by a keypool server: is the URL right?", status)
    error = BY_CODE.get(problem["code"], Unavailable if status == 503 else Refused)(problem["detail"])
    error.code, error.status = problem["code"], status
    error.title = str(problem.get("title", ""))
    error.request_id = str(problem.get("request_id", ""))
    hint = problem.get("retry_after")
    if isinstance(hint, int | float) and not isinstance(hint, bool):
        error.retry_after = float(hint)
    if isinstance(error, NoKeyAvailable):
        for name in ("blocked", "cooling", "quarantined"):
            if isinstance(count := problem.get(name), int):
                setattr(error, name, count)
    return error


def _problem(body: bytes) -> dict[str, Any] | None:
    try:
        problem = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(problem, dict):
        return None
    texts = all(isinstance(problem.get(name), str) for name in ("code", "detail"))
    # Another service's problem has another type, and its codes mean other things.
    return problem if texts and str(problem.get("type", "")).startswith("urn:keypool:") else None
