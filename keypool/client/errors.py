"""Every way in which a call can fail, as its caller sees it.

    KeyPoolError
    ├── Refused                    the server said no; `code`, `status`, `detail`, `request_id`
    │   ├── UnknownKey             never generated, deleted or expired
    │   ├── NoKeyAvailable         `retry_after`: seconds to the earliest release, a hint
    │   ├── StaleLease             the key was served again since, or never with this number
    │   ├── PoolFull
    │   ├── Unavailable            not now; the client has tried again by itself
    │   │   ├── StorageUnavailable     the outcome isn't known
    │   │   ├── Loading  Draining  TooManyWaiters
    │   ├── Unauthorized  Forbidden  CrossSite  WrongHost
    │   ├── BadRequest  NotFound  MethodNotAllowed  RequestTimeout  PayloadTooLarge  UriTooLong
    │   ├── UnsupportedMediaType  UpgradeRequired  HeadersTooLarge
    │   ├── TooManyViewers  TooManySignIns
    │   └── Internal               a bug of the server; its log knows the `request_id`
    ├── Unreachable                nobody could be asked: the call didn't happen
    ├── AnswerLost                 asked, and no whole answer came: the outcome isn't known
    ├── UnexpectedAnswer           what answered doesn't speak like a keypool server
    │   └── GatewayError           502, 503 or 504 of something in between
    ├── LeaseLost                  a key was used, or given back, after its lease was over
    └── PoolClosed                 a call after `close`

What matters after a failure is whether the call may have happened all the same. Every error says so in
`may_have_happened`, and the client's own retries go by it (retry.py). The classes below `Refused` are one a
code of the server; an unknown code, of a newer server, is a plain Refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


class KeyPoolError(Exception):
    """The root. All of them survive pickling, since worker processes send them home."""

    may_have_happened: bool = False
    """Whether the call may have taken effect, although it failed."""

    retry_after: float | None = None
    """Seconds after which the server suggests another try, if it said so."""

    repeated: bool = False
    """Whether the client had sent the call before and lost the answer: this one tells of a repetition."""

    partial: Any = None
    """What a batch of several calls had done before one of them failed."""


class Unreachable(KeyPoolError):
    """No connection, so nobody was asked. `transient` is whether another try may help."""

    transient: bool = True


class AnswerLost(KeyPoolError):
    """The call was sent, then the connection broke or time was up."""

    may_have_happened = True


class UnexpectedAnswer(KeyPoolError):
    """An answer that no keypool server gives: a proxy's, or another server's. `status` is 0 if not HTTP."""

    may_have_happened = True

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message, status)
        self.status = status

    def __str__(self) -> str:
        return str(self.args[0])


class GatewayError(UnexpectedAnswer):
    """Something in between answered 502, 503 or 504; the server may have done the call nevertheless."""


class LeaseLost(KeyPoolError):
    """The lease is over: the key may be somebody else's by now."""


class PoolClosed(KeyPoolError):
    """The client was closed."""


class Refused(KeyPoolError):
    """The server answered with a problem. Nothing has changed, unless the class says otherwise."""

    code: str = ""
    status: int = 0
    title: str = ""
    request_id: str = ""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class UnknownKey(Refused):
    """No live key has this text or id."""

    code = "unknown-key"


class NoKeyAvailable(Refused):
    """Every key is held, or there is none."""

    code = "no-key-available"


class StaleLease(Refused):
    """The lease number isn't the key's latest: it is somebody else's now, or was never yours."""

    code = "stale-lease"


class PoolFull(Refused):
    """The server holds as many keys as it may."""

    code = "pool-full"


class Unavailable(Refused):
    """Not now. Tried again by the client, as long as its patience lasts."""


class StorageUnavailable(Unavailable):
    """The server couldn't write it down: the outcome isn't known."""

    code = "storage-unavailable"
    may_have_happened = True


class Loading(Unavailable):
    """The server is still reading its keys."""

    code = "loading"


class Draining(Unavailable):
    """The server is stopping."""

    code = "draining"


class TooManyWaiters(Unavailable):
    """As many wait for a key as may."""

    code = "too-many-waiters"


class Unauthorized(Refused):
    """No token, or an unknown one."""

    code = "unauthorized"


class Forbidden(Refused):
    """The token's role doesn't have this call."""

    code = "forbidden"


class CrossSite(Refused):
    """The server takes this for a browser's request from another site."""

    code = "cross-site"


class WrongHost(Refused):
    """A server without tokens answers to loopback names only."""

    code = "wrong-host"


class BadRequest(Refused):
    """A wrong field or value; `detail` names it."""

    code = "bad-request"


class NotFound(Refused):
    """No such path: is the URL right?"""

    code = "not-found"


class MethodNotAllowed(Refused):
    """The path doesn't have this method: is the URL right?"""

    code = "method-not-allowed"


class RequestTimeout(Refused):
    """The request came too slowly."""

    code = "request-timeout"


class PayloadTooLarge(Refused):
    """The body is larger than the server reads."""

    code = "payload-too-large"


class UriTooLong(Refused):
    """The request target is longer than the server reads."""

    code = "uri-too-long"


class UnsupportedMediaType(Refused):
    """The server didn't take the body for JSON."""

    code = "unsupported-media-type"


class UpgradeRequired(Refused):
    """This path is a websocket."""

    code = "upgrade-required"


class HeadersTooLarge(Refused):
    """The headers are larger than the server reads."""

    code = "headers-too-large"


class TooManyViewers(Refused):
    """As many follow the feed as may."""

    code = "too-many-viewers"


class TooManySignIns(Refused):
    """Too many sign-ins in a short time."""

    code = "too-many-sign-ins"


class Internal(Refused):
    """The server failed; its log has the story under `request_id`."""

    code = "internal"


def _refusals(kind: type[Refused]) -> Iterator[type[Refused]]:
    for each in kind.__subclasses__():
        yield each
        yield from _refusals(each)


BY_CODE: dict[str, type[Refused]] = {each.code: each for each in _refusals(Refused) if each.code}
"""The class of each code of the contract."""

_GATEWAY = frozenset({502, 503, 504})


def from_answer(status: int, body: bytes) -> KeyPoolError:
    """The error that an answer of status 400 or more is. Never raises, whatever the body."""
    problem = _problem(body)
    if problem is None:
        kind = GatewayError if status in _GATEWAY else UnexpectedAnswer
        return kind(f"answered {status}, and not by a keypool server: is the URL right?", status)
    error = BY_CODE.get(problem["code"], Unavailable if status == 503 else Refused)(problem["detail"])
    error.code, error.status = problem["code"], status
    error.title = str(problem.get("title", ""))
    error.request_id = str(problem.get("request_id", ""))
    hint = problem.get("retry_after")
    if isinstance(hint, int | float) and not isinstance(hint, bool):
        error.retry_after = float(hint)
    return error


def _problem(body: bytes) -> dict[str, Any] | None:
    try:
        problem = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(problem, dict):
        return None
    texts = all(isinstance(problem.get(name), str) for name in ("code", "detail"))
    # A problem of somebody else's has another type; only keypool's codes mean what the classes say.
    return problem if texts and str(problem.get("type", "")).startswith("urn:keypool:") else None
