"""What all calls of the API have in common: the caller, names of keys, attempts, and lines of the audit log."""

from __future__ import annotations

import re
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, TypeVar

import msgspec

from keypool.api.auth import NO_TOKEN, Caller, Role
from keypool.api.bodies import Body
from keypool.core.answers import GeneratedKey, Identity, Ref
from keypool.core.errors import BadRequest, Forbidden, StorageUnavailable, UnknownKey
from keypool.core.events import HOLDER, By, Origin
from keypool.core.handles import PREFIX, Handle
from keypool.core.keys import hint
from keypool.core.outcomes import Outcome
from keypool.core.rules import DEFAULT_POOL, is_pool_name
from keypool.engine import Engine
from keypool.ops.audit import Fact, audit, known
from keypool.ops.histogram import ReportMetrics

ANYONE: frozenset[Role] = frozenset()  # no token needed
CLIENT = frozenset({Role.CLIENT, Role.ADMIN})
VIEWER = frozenset({Role.VIEWER, Role.ADMIN})
ADMIN = frozenset({Role.ADMIN})
CLIENT_OR_VIEWER = CLIENT | VIEWER


ATTEMPT_HEADER = "Idempotency-Key"
"""The header by which a caller names its acquire, so that it can repeat it."""
_ATTEMPT_KEY = re.compile(r"[!-~]{1,64}")
BASE = "/api/v1"
"""The beginning of every path of the API."""
POOLS = "/pools/"
"""What stands between BASE and the name of a pool in the paths about that pool."""


class Attempt(msgspec.Struct, gc=False):
    """See the engine's protocol."""

    digest: bytes
    replayed: bool = False


class Call(msgspec.Struct, gc=False):
    """One call: its caller, their address, and the decoded request."""

    caller: Caller
    address: str
    request_id: str
    key: str = ""
    idempotency_key: str | None = None
    """The header as it came; only acquires look at it."""
    reports: ReportMetrics = msgspec.field(default_factory=ReportMetrics)
    """Counts the reports of holders."""
    pool: str = DEFAULT_POOL
    """The name of the pool that the path is about."""
    is_other: bool = False
    """Whether the answer is the operation's `other_answer`, and has its `other_status`."""
    attempt: Attempt | None = None
    reported: Outcome | None = None
    """What an unblock reports, counted if its answer is that it counts."""
    query: Any = None
    body: Any = None
    waited: float = 0.0
    """Seconds in the queue for a key, which are not part of the service time."""


T = TypeVar("T")
Answering = Coroutine[Any, Any, T]


ID = "id:"
"""How the public id of a key begins where a key may stand."""


def path_of_pool(name: str) -> str:
    """The beginning of the paths about a pool: empty for `default`, else /pools/NAME."""
    return "" if name == DEFAULT_POOL else POOLS + name


def location(call: Call, key_id: int) -> str:
    """The path of a key of the call's pool."""
    return f"{BASE}{path_of_pool(call.pool)}/keys/{ID}{key_id}"


def require_may_name_ids(caller: Caller) -> None:
    """Raise Forbidden for a client, who named a key by its id."""
    if caller.role is Role.CLIENT:
        raise Forbidden(
            "clients name a key by its whole text or by a handle: an id is for viewers and admins"
        )


def key_ref(engine: Engine, text: str, caller: Caller) -> Ref:
    """The key that a text, a handle or `id:N` names. Raises Forbidden for a client's `id:N`, UnknownKey."""
    if text.startswith(PREFIX):
        handle = engine.handles.read(text)
        if handle is None:
            raise UnknownKey("no such lease: this is not a handle that acquire gave in this pool")
        return handle
    if not text.startswith(ID):
        return text
    require_may_name_ids(caller)
    number = text[len(ID) :]
    if not (number.isascii() and number.isdigit() and len(number) < 19):
        raise UnknownKey("an id is written id:N, with N a whole number as generate and the lists give it")
    return int(number)


def lease_of(ref: Ref, lease: int | None) -> int | None:
    """The lease number that a caller gives, in the body or by a handle. Raises BadRequest if the two differ."""
    if not isinstance(ref, Handle):
        return lease
    if lease not in (None, ref.lease):
        raise BadRequest(
            f"wrong body: lease is {lease}, and the handle is that of lease {ref.lease}: leave lease out, or give "
            "the handle's"
        )
    return ref.lease


REPORT_NEEDS = (
    "wrong body: an outcome needs a lease number: give lease, or name the key by the handle of its lease"
)
EXTEND_NEEDS = (
    "wrong body: extend needs a lease number: give lease, or name the key by the handle of its lease"
)


def attempt_of(call: Call, body: Body) -> Attempt | None:
    """The caller's attempt, if the request has an Idempotency-Key. About 4 µs. Raises BadRequest.

    Its digest is of the token, the header, the pool and the body as decoded, so the order of the body's members, white
    space and nulls make no difference.
    """
    key = call.idempotency_key
    if key is None:
        return None
    check_attempt(key)
    name = msgspec.json.encode((call.caller.token, key, call.pool, body))  # a batch's body has the operation
    call.attempt = Attempt(blake2b(name, digest_size=16).digest())
    return call.attempt


def check_attempt(key: str) -> None:
    """Raise BadRequest unless this is an Idempotency-Key."""
    if not _ATTEMPT_KEY.fullmatch(key):
        raise BadRequest(
            f"wrong header {ATTEMPT_HEADER}: it takes 1 to 64 visible ASCII characters, such as those of a UUID"
        )


def block_of(engine: Engine, seconds: float | None) -> float | None:
    """The length of a block that a caller asks for, if it does. Raises BadRequest if the pool forbids it."""
    if seconds is None:
        return None
    rules = engine.rules
    shortest = min(1.0, rules.block_seconds)
    if not shortest <= seconds <= rules.longest_block:
        raise BadRequest(
            f"wrong body: block_seconds is {seconds:g}; block_seconds takes {shortest:g} to {rules.longest_block:g} "
            "seconds in this pool (max_block_seconds)"
        )
    return seconds


def operator(call: Call) -> Origin:
    """The caller, as the operator whom events name."""
    return Origin(By.OPERATOR, None if call.caller.token == NO_TOKEN else call.caller.token)


def origin_without_lease(call: Call) -> Origin:
    """Who ends a lease without its number: an operator if the role is admin, as a holder would know the number."""
    return operator(call) if call.caller.role is Role.ADMIN else HOLDER


# -- the audit log


def write_audit(
    call: Call,
    act: str,
    keys: Sequence[str],
    outcome: str = "ok",
    count: int | None = None,
    *,
    facts: Mapping[str, Fact] | None = None,
) -> None:
    """Write an audit line for a call; for a batch, with `count` and its first and last key."""
    of_pool = {"pool": call.pool} if call.pool != DEFAULT_POOL and is_pool_name(call.pool) else {}
    audit(
        act,
        role=call.caller.role.value,
        token=call.caller.token,
        address=call.address,
        request_id=call.request_id,
        outcome=outcome,
        keys=keys,
        count=count,
        facts={**of_pool, **(facts or {})},
    )


@contextmanager
def unknown_outcome(call: Call, act: str, keys: Sequence[str], count: int | None = None) -> Iterator[None]:
    """Write an audit line if the storage fails, since the change may be kept nevertheless."""
    try:
        yield
    except StorageUnavailable as error:
        write_audit(call, act, keys, error.code, count)
        raise


def ends(keys: Sequence[T]) -> Sequence[T]:
    """The first and the last, for the audit log."""
    return [keys[0], keys[-1]] if keys else []


def name_of(key: GeneratedKey) -> str:
    """The name of a new key in the audit log."""
    return known(Identity(key.id, hint(key.key)))
