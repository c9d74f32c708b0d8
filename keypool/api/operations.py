"""Every call of the API, once.

Dispatch, role checks, `Allow` headers, documentation and OpenAPI are derived from the table `OPERATIONS`; a new call is
a row there. An Operation's `run` gets the engine and the Call and returns an answer of its type, or raises an error of
errors.py. HTTP appears only in the rows of the table.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from keypool.api.auth import Caller, Role
from keypool.core.answers import (
    DeletedKeys,
    EndedLease,
    GeneratedKey,
    GeneratedKeys,
    Identity,
    KeptAlive,
    KeptAliveKeys,
    Lease,
    Leases,
    Page,
    Ref,
    Revealed,
    Row,
    Stats,
    Unblocked,
    UnblockedKeys,
)
from keypool.core.cursor import ListQuery
from keypool.core.errors import (
    BadRequest,
    Draining,
    Forbidden,
    KeypoolError,
    NoKeyAvailable,
    PoolFull,
    StaleLease,
    StorageUnavailable,
    TooManyWaiters,
    UnknownKey,
)
from keypool.core.keys import hint
from keypool.engine import Engine
from keypool.ops.audit import asked_for, audit, known

ANYONE: frozenset[Role] = frozenset()  # no token needed
CLIENT = frozenset({Role.CLIENT, Role.ADMIN})
VIEWER = frozenset({Role.VIEWER, Role.ADMIN})
ADMIN = frozenset({Role.ADMIN})
CLIENT_OR_VIEWER = CLIENT | VIEWER

BASE = "/api/v1"
"""The beginning of every path of the API."""

MAX_BATCH = 1000
MAX_WAIT = 60


# -- bodies

_Owner = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=200,
        pattern=r"^[^\x00-\x1f\x7f-\x9f]*$(?!\n)",  # in Python, $ also matches before a final newline
        description="who will hold the key, for lists: 1 to 200 characters, no control characters",
    ),
]
_LeaseNumber = Annotated[int, Meta(ge=0, le=2**63 - 1, description="the lease number that acquire gave")]
_Count = Annotated[int, Meta(ge=1, le=MAX_BATCH)]
_KeyText = Annotated[str, Meta(description="the key, or id:N for admins")]
_Keys = Annotated[list[_KeyText], Meta(min_length=1, max_length=MAX_BATCH)]


class Body(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """The root of all request bodies."""


class NoBody(Body):
    """The body of a call without members: an empty object is accepted."""


class AcquireBody(Body):
    """Both members are optional, as is the body."""

    owner: _Owner | None = None
    wait: Annotated[float, Meta(ge=0, le=MAX_WAIT, description="seconds to wait for a key")] | None = None


class UnblockBody(Body):
    """Without a lease number, whoever holds the key loses it."""

    lease: _LeaseNumber | None = None


class LeasedKey(Body):
    """A key of a batch with the lease number that its acquire returned."""

    key: _KeyText
    lease: _LeaseNumber | None = None


class BatchBody(Body, tag_field="op"):
    """One of five kinds, distinguished by `op`."""


class GenerateBatch(BatchBody, tag="generate"):
    """Generate keys, all or none."""

    count: _Count


class AcquireBatch(BatchBody, tag="acquire"):
    """Acquire up to `count` keys."""

    count: _Count
    owner: _Owner | None = None


class KeepaliveBatch(BatchBody, tag="keepalive"):
    """Renew the TTL of keys."""

    keys: _Keys


class UnblockBatch(BatchBody, tag="unblock"):
    """Free keys, with or without lease numbers."""

    keys: Annotated[list[_KeyText | LeasedKey], Meta(min_length=1, max_length=MAX_BATCH)]


class DeleteBatch(BatchBody, tag="delete"):
    """Purge keys."""

    keys: _Keys


AnyBatch = GenerateBatch | AcquireBatch | KeepaliveBatch | UnblockBatch | DeleteBatch


# -- a call, and an operation


class Call(msgspec.Struct, gc=False):
    """One call: its caller, their address, and the decoded request."""

    caller: Caller
    address: str
    request_id: str
    key: str = ""
    query: Any = None
    body: Any = None
    waited: float = 0.0
    """Seconds in the queue for a key, which are not part of the service time."""


T = TypeVar("T")
Answering = Coroutine[Any, Any, T]
Run = Callable[[Engine, Call], Answering[Any]]
"""Mostly returns the engine's own coroutine, as another one around it would cost a call a third of a microsecond."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of the API. `path` is below BASE; `{key}` in it is one segment."""

    name: str
    method: str
    path: str
    roles: frozenset[Role]
    summary: str
    run: Run
    answer: Any
    status: int = 200
    body: Any = None
    body_required: bool = False
    query: Any = None
    errors: tuple[type[KeypoolError], ...] = ()
    created: tuple[type, ...] = ()  # types of answers that have status 201 instead of `status`
    location: Callable[[Any], str] | None = None
    legacy: bool = False
    head: Run | None = None  # what HEAD does, where GET would change something
    changes: bool = True  # whether it changes anything but the feed and counters
    acquires: bool = False
    audits_refusals: bool = False  # whether the audit log also has callers refused for their role


# -- the calls


_ID = "id:"


def require_may_name(text: str, caller: Caller) -> None:
    """Raise Forbidden if a client names a key by its id."""
    if caller.role is Role.CLIENT and text.startswith(_ID):
        raise Forbidden("clients name a key by its whole text: an id is for viewers and admins")


def key_ref(text: str, caller: Caller) -> Ref:
    """The key that a text or `id:N` names. Raises Forbidden for a client's `id:N`, UnknownKey."""
    if not text.startswith(_ID):
        return text
    require_may_name(text, caller)
    number = text[len(_ID) :]
    if not (number.isascii() and number.isdigit() and len(number) < 19):
        raise UnknownKey("an id is written id:N, with N a whole number as generate and the lists give it")
    return int(number)


def ends_with_caller(operation: Operation, call: Call) -> bool:
    """Whether a call is cancelled when its caller disconnects. Only an acquire is: its key becomes available again.

    All others run to their end, so that the audit log has what they change.
    """
    return operation.acquires or isinstance(call.body, AcquireBatch)


# -- the audit log


def write_audit(
    call: Call, act: str, keys: Sequence[str], outcome: str = "ok", count: int | None = None, **facts: int
) -> None:
    """Write an audit line for a call; for a batch, with `count` and its first and last key."""
    audit(
        act,
        role=call.caller.role.value,
        token=call.caller.token,
        address=call.address,
        request_id=call.request_id,
        outcome=outcome,
        keys=keys,
        count=count,
        **facts,
    )


def audit_refused(operation: Operation, call: Call, error: KeypoolError) -> None:
    """Write an audit line for a caller refused for its role, if the operation requires one."""
    if operation.audits_refusals:
        write_audit(call, operation.name, [asked_for(call.key)], error.code)


@contextmanager
def _unknown_outcome(call: Call, act: str, keys: Sequence[str], count: int | None = None) -> Iterator[None]:
    """Write an audit line if the storage fails, since the change may be kept nevertheless."""
    try:
        yield
    except StorageUnavailable as error:
        write_audit(call, act, keys, error.code, count)
        raise


def _ends(keys: Sequence[T]) -> Sequence[T]:
    return [keys[0], keys[-1]] if keys else []


async def generate_audited(engine: Engine, call: Call) -> GeneratedKey:
    """Generate a key. Raises PoolFull, StorageUnavailable."""
    with _unknown_outcome(call, "generate", []):
        [made] = await engine.generate(1)
    write_audit(call, "generate", [_made(made)])
    return made


def _made(key: GeneratedKey) -> str:
    return known(Identity(key.id, hint(key.key)))


async def delete_audited(engine: Engine, call: Call, text: str) -> None:
    """Purge a key, by its text or `id:N`. Raises Forbidden, UnknownKey, StorageUnavailable."""
    ref = key_ref(text, call.caller)
    with _unknown_outcome(call, "delete", [asked_for(text)]):
        gone = await engine.delete(ref)
    write_audit(call, "delete", [known(gone)])


async def unblock_audited(engine: Engine, call: Call, text: str) -> Unblocked:
    """Free a key without a lease number, by its text or `id:N`. Raises Forbidden, UnknownKey, StorageUnavailable."""
    ref = key_ref(text, call.caller)
    ended: list[EndedLease] = []
    outcome = "ok"
    try:
        return await engine.unblock(ref, None, ended)
    except StorageUnavailable as error:
        outcome = error.code
        raise
    finally:
        for key in ended:
            write_audit(call, "unblock", [known(key)], outcome, lease=key.lease)


def _acquire(engine: Engine, call: Call) -> Answering[Lease]:
    body: AcquireBody | None = call.body
    if body is None:
        return engine.acquire(None, 0)
    return engine.acquire(body.owner, body.wait or 0, call)


def _unblock(engine: Engine, call: Call) -> Answering[Unblocked]:
    body: UnblockBody | None = call.body
    if body is None or body.lease is None:
        return unblock_audited(engine, call, call.key)
    return engine.unblock(key_ref(call.key, call.caller), body.lease)


def _keepalive(engine: Engine, call: Call) -> Answering[KeptAlive]:
    return engine.keepalive(key_ref(call.key, call.caller))


def _delete(engine: Engine, call: Call) -> Answering[None]:
    return delete_audited(engine, call, call.key)


def _get(engine: Engine, call: Call) -> Answering[Row]:
    return engine.get(key_ref(call.key, call.caller))


async def _reveal(engine: Engine, call: Call) -> Revealed:
    try:
        revealed = await engine.reveal(key_ref(call.key, call.caller))
    except KeypoolError as error:
        write_audit(call, "reveal", [asked_for(call.key)], error.code)
        raise
    write_audit(call, "reveal", [known(Identity(revealed.id, hint(revealed.key)))])
    return revealed


def _list(engine: Engine, call: Call) -> Answering[Page]:
    return engine.page(call.query)


def _stats(engine: Engine, call: Call) -> Answering[Stats]:
    return engine.stats()


# -- batches


def _refs(texts: Sequence[str], call: Call) -> list[Ref]:
    """The key of each text. A malformed id stays a text, which no key has. Raises Forbidden."""
    refs: list[Ref] = []
    for text in texts:
        if not text.startswith(_ID):
            refs.append(text)
            continue
        try:
            refs.append(key_ref(text, call.caller))
        except UnknownKey:
            refs.append(text)
    return refs


async def _batch(engine: Engine, call: Call) -> Any:
    body: AnyBatch = call.body
    roles, run = _BATCHES[type(body)]
    if call.caller.role not in roles:
        op = type(body).__struct_config__.tag
        raise Forbidden(f"op {op!r} needs the role admin; this token is a {call.caller.role.value}'s")
    await asyncio.sleep(0)  # decoding the body took as long as a slice: let others run first
    return await run(engine, call, body)


async def _generate_batch(engine: Engine, call: Call, body: GenerateBatch) -> GeneratedKeys:
    with _unknown_outcome(call, "generate", [], body.count):
        made = await engine.generate(body.count)
    write_audit(call, "generate", [_made(key) for key in _ends(made)], count=len(made))
    return GeneratedKeys(made)


async def _acquire_batch(engine: Engine, call: Call, body: AcquireBatch) -> Leases:
    return Leases(await engine.acquire_many(body.owner, body.count))


async def _keepalive_batch(engine: Engine, call: Call, body: KeepaliveBatch) -> KeptAliveKeys:
    known = await engine.keepalive_many(_refs(body.keys, call))
    return KeptAliveKeys(sum(known), [text for text, hit in zip(body.keys, known, strict=True) if not hit])


async def _unblock_batch(engine: Engine, call: Call, body: UnblockBatch) -> UnblockedKeys:
    pairs = [(item, None) if isinstance(item, str) else (item.key, item.lease) for item in body.keys]
    texts = [text for text, _ in pairs]
    refs = _refs(texts, call)
    ended: list[EndedLease] = []
    outcome = "ok"
    try:
        outcomes = await engine.unblock_many(
            [(ref, lease) for ref, (_, lease) in zip(refs, pairs, strict=True)], ended
        )
    except StorageUnavailable as error:
        outcome = error.code
        raise
    finally:
        if ended:
            write_audit(call, "unblock", [known(key) for key in _ends(ended)], outcome, len(ended))
    sorted_out: dict[str, list[str]] = {"done": [], "unknown": [], "stale": []}
    for text, outcome in zip(texts, outcomes, strict=True):
        sorted_out[outcome].append(text)
    return UnblockedKeys(len(sorted_out["done"]), sorted_out["unknown"], sorted_out["stale"])


async def _delete_batch(engine: Engine, call: Call, body: DeleteBatch) -> DeletedKeys:
    refs = _refs(body.keys, call)
    with _unknown_outcome(call, "delete", [asked_for(text) for text in _ends(body.keys)], len(refs)):
        gone = await engine.delete_many(refs)
    purged = [identity for identity in gone if identity is not None]
    if purged:
        write_audit(call, "delete", [known(key) for key in _ends(purged)], count=len(purged))
    return DeletedKeys(
        len(purged), [text for text, identity in zip(body.keys, gone, strict=True) if identity is None]
    )


_BATCHES: dict[type, tuple[frozenset[Role], Callable[[Engine, Call, Any], Awaitable[Any]]]] = {
    GenerateBatch: (ADMIN, _generate_batch),
    AcquireBatch: (CLIENT, _acquire_batch),
    KeepaliveBatch: (CLIENT, _keepalive_batch),
    UnblockBatch: (CLIENT, _unblock_batch),
    DeleteBatch: (ADMIN, _delete_batch),
}


# fmt: off
OPERATIONS: tuple[Operation, ...] = (
    Operation("generate", "POST", "/keys", ADMIN, "Generate a key, available at once.",
        generate_audited, GeneratedKey, created=(GeneratedKey,), errors=(PoolFull,),
        location=lambda made: f"{BASE}/keys/id:{made.id}"),
    Operation("acquire", "POST", "/keys/acquire", CLIENT,
        "Get a random available key, blocked for everybody else; optionally wait for one.",
        _acquire, Lease, body=AcquireBody, errors=(NoKeyAvailable, TooManyWaiters, Draining), acquires=True),
    Operation("unblock", "POST", "/keys/{key}/unblock", CLIENT,
        "Give a key back; with the lease number, only if it is still yours.",
        _unblock, Unblocked, body=UnblockBody, errors=(UnknownKey, StaleLease)),
    Operation("keepalive", "POST", "/keys/{key}/keepalive", CLIENT,
        "Renew a key's TTL. Never lengthens a block.",
        _keepalive, KeptAlive, errors=(UnknownKey,)),
    Operation("delete", "DELETE", "/keys/{key}", ADMIN, "Delete a key permanently.",
        _delete, None, status=204, errors=(UnknownKey,)),
    Operation("get", "GET", "/keys/{key}", CLIENT_OR_VIEWER, "The state of a key, without its text.",
        _get, Row, errors=(UnknownKey,), changes=False),
    Operation("reveal", "POST", "/keys/{key}/reveal", ADMIN, "The text of a key. Written to the audit log.",
        _reveal, Revealed, errors=(UnknownKey,), audits_refusals=True),
    Operation("list", "GET", "/keys", VIEWER, "List keys in an order, a page at a time.",
        _list, Page, query=ListQuery, errors=(BadRequest,), changes=False),
    Operation("batch", "POST", "/batch", CLIENT, "Up to 1000 of the single calls in one.",
        _batch, GeneratedKeys | Leases | KeptAliveKeys | UnblockedKeys | DeletedKeys,
        body=AnyBatch, body_required=True, created=(GeneratedKeys,), errors=(NoKeyAvailable, PoolFull, Draining)),
    Operation("stats", "GET", "/stats", VIEWER, "Current counts, and totals since the pool began.",
        _stats, Stats, changes=False),
)
# fmt: on
