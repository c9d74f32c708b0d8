"""Every call of the API, once.

Dispatch, role checks, `Allow` headers, documentation and OpenAPI are derived from the table `OPERATIONS`; a new call is
a row there. An Operation's `run` gets the engine and the Call and returns an answer of its type, or raises an error of
errors.py. HTTP appears only in the rows of the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from keypool.api.auth import Role
from keypool.api.batches import batch
from keypool.api.bodies import AcquireBatch, AcquireBody, AnyBatch, ExtendBody, QuarantineBody, UnblockBody
from keypool.api.calls import (
    ADMIN,
    CLIENT,
    CLIENT_OR_VIEWER,
    EXTEND_NEEDS,
    REPORT_NEEDS,
    VIEWER,
    Answering,
    Call,
    attempt_of,
    block_of,
    key_ref,
    lease_of,
    name_of,
    operator,
    origin_without_lease,
    unknown_outcome,
    write_audit,
)
from keypool.core.answers import (
    DeletedKeys,
    EndedLease,
    Extended,
    ExtendedLeases,
    GeneratedKey,
    GeneratedKeys,
    Identity,
    KeptAlive,
    KeptAliveKeys,
    Lease,
    Leases,
    Page,
    QuarantinedKeys,
    Ref,
    RestoredKeys,
    Revealed,
    Row,
    Stats,
    Unblocked,
    UnblockedKeys,
)
from keypool.core.cursor import ListQuery
from keypool.core.errors import (
    BadRequest,
    BlockLimit,
    Draining,
    KeypoolError,
    LeaseOver,
    NoKeyAvailable,
    PoolFull,
    StaleLease,
    StorageUnavailable,
    Superseded,
    TooManyWaiters,
    UnknownKey,
)
from keypool.core.handles import Handle
from keypool.core.keys import hint
from keypool.core.outcomes import Report
from keypool.engine import Engine
from keypool.ops.audit import asked_for, known

BASE = "/api/v1"
"""The beginning of every path of the API."""


# -- a call, and an operation


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
    repeatable: bool = False  # whether it takes an Idempotency-Key, which of batches only op acquire uses
    audits_refusals: bool = False  # whether the audit log also has callers refused for their role


# -- the calls


def ends_with_caller(operation: Operation, call: Call) -> bool:
    """Whether a call is cancelled when its caller disconnects. Only an acquire is: its key becomes available again.

    All others run to their end, so that the audit log has what they change.
    """
    return operation.acquires or isinstance(call.body, AcquireBatch)


def audit_refused(operation: Operation, call: Call, error: KeypoolError) -> None:
    """Write an audit line for a caller refused for its role, if the operation requires one."""
    if operation.audits_refusals:
        write_audit(call, operation.name, [asked_for(call.key)], error.code)


async def generate_audited(engine: Engine, call: Call) -> GeneratedKey:
    """Generate a key. Raises PoolFull, StorageUnavailable."""
    with unknown_outcome(call, "generate", []):
        [made] = await engine.generate(1, operator(call))
    write_audit(call, "generate", [name_of(made)])
    return made


async def delete_audited(engine: Engine, call: Call, text: str) -> None:
    """Purge a key, by its text, handle or `id:N`. Raises UnknownKey, StaleLease, StorageUnavailable."""
    ref = key_ref(engine, text, call.caller)
    with unknown_outcome(call, "delete", [asked_for(text)]):
        gone = await engine.delete(ref, operator(call))
    write_audit(call, "delete", [known(gone)])


def unblock(engine: Engine, call: Call, text: str, body: UnblockBody | None = None) -> Answering[Unblocked]:
    """Free a key, by its text, handle or `id:N`, and take its holder's report.

    Raises BadRequest, Forbidden, UnknownKey, StaleLease, StorageUnavailable.
    """
    ref = key_ref(engine, text, call.caller)
    lease = None if body is None else body.lease
    if isinstance(ref, Handle):
        lease = lease_of(ref, lease)
    if body is not None and (report := body.outcome and body.report()):
        if lease is None:
            raise BadRequest(REPORT_NEEDS)
        return _report(engine, call, ref, lease, report)
    return engine.unblock(ref, lease) if lease is not None else _unblock_audited(engine, call, ref)


async def _report(engine: Engine, call: Call, ref: Ref, lease: int, report: Report) -> Unblocked:
    answer = await engine.unblock(ref, lease, None, report)
    if answer.changed:
        call.reports.add(report.outcome, answer.guarded)
    return answer


async def _unblock_audited(engine: Engine, call: Call, ref: Ref) -> Unblocked:
    ended: list[EndedLease] = []
    outcome = "ok"
    try:
        return await engine.unblock(ref, None, ended, None, origin_without_lease(call))
    except StorageUnavailable as error:
        outcome = error.code
        raise
    finally:
        for key in ended:
            write_audit(call, "unblock", [known(key)], outcome, lease=key.lease)


_NOTHING_ASKED = AcquireBody()


def _acquire(engine: Engine, call: Call) -> Answering[Lease]:
    body: AcquireBody = call.body or _NOTHING_ASKED
    # Checked here, as calls of the two functions would cost every acquire a percent.
    block = None if body.block_seconds is None else block_of(engine, body.block_seconds)
    attempt = None if call.idempotency_key is None else attempt_of(call, body)
    return engine.acquire(body.owner, body.wait or 0, call, block, attempt)


def _unblock(engine: Engine, call: Call) -> Answering[Unblocked]:
    return unblock(engine, call, call.key, call.body)


def _extend(engine: Engine, call: Call) -> Answering[Extended]:
    body: ExtendBody = call.body or ExtendBody()
    ref = key_ref(engine, call.key, call.caller)
    lease = lease_of(ref, body.lease)
    if lease is None:
        raise BadRequest(EXTEND_NEEDS)
    return engine.extend(ref, lease, body.seconds)


def _keepalive(engine: Engine, call: Call) -> Answering[KeptAlive]:
    return engine.keepalive(key_ref(engine, call.key, call.caller))


def _delete(engine: Engine, call: Call) -> Answering[None]:
    return delete_audited(engine, call, call.key)


def _get(engine: Engine, call: Call) -> Answering[Row]:
    return engine.get(key_ref(engine, call.key, call.caller))


async def _reveal(engine: Engine, call: Call) -> Revealed:
    try:
        revealed = await engine.reveal(key_ref(engine, call.key, call.caller), operator(call))
    except KeypoolError as error:
        write_audit(call, "reveal", [asked_for(call.key)], error.code)
        raise
    write_audit(call, "reveal", [known(Identity(revealed.id, hint(revealed.key)))])
    return revealed


async def _quarantine(engine: Engine, call: Call) -> Row:
    body: QuarantineBody = call.body or QuarantineBody()
    ref = key_ref(engine, call.key, call.caller)
    with unknown_outcome(call, "quarantine", [asked_for(call.key)]):
        row = await engine.quarantine(ref, body.reason, body.now or False, operator(call))
    write_audit(call, "quarantine", [known(Identity(row.id, row.hint))])
    return row


async def _restore(engine: Engine, call: Call) -> Row:
    ref = key_ref(engine, call.key, call.caller)
    with unknown_outcome(call, "restore", [asked_for(call.key)]):
        row = await engine.restore(ref, operator(call))
    write_audit(call, "restore", [known(Identity(row.id, row.hint))])
    return row


def _list(engine: Engine, call: Call) -> Answering[Page]:
    return engine.page(call.query)


def _stats(engine: Engine, call: Call) -> Answering[Stats]:
    return engine.stats()


# fmt: off
OPERATIONS: tuple[Operation, ...] = (
    Operation("generate", "POST", "/keys", ADMIN, "Generate a key, available at once.",
        generate_audited, GeneratedKey, created=(GeneratedKey,), errors=(PoolFull,),
        location=lambda made: f"{BASE}/keys/id:{made.id}"),
    Operation("acquire", "POST", "/keys/acquire", CLIENT,
        "Get a random available key, blocked for everybody else; optionally wait for one.",
        _acquire, Lease, body=AcquireBody, errors=(NoKeyAvailable, Superseded, TooManyWaiters, Draining), acquires=True,
        repeatable=True),
    Operation("unblock", "POST", "/keys/{key}/unblock", CLIENT,
        "Give a key back, and report how the work with it went; with lease or handle, only if it is still yours.",
        _unblock, Unblocked, body=UnblockBody, errors=(UnknownKey, StaleLease)),
    Operation("extend", "POST", "/keys/{key}/extend", CLIENT,
        "Let your lease of a key end later, up to the pool's `max_block_seconds`.",
        _extend, Extended, body=ExtendBody, errors=(UnknownKey, StaleLease, LeaseOver, BlockLimit)),
    Operation("keepalive", "POST", "/keys/{key}/keepalive", CLIENT,
        "Renew a key's TTL. Never lengthens a block.",
        _keepalive, KeptAlive, errors=(UnknownKey, StaleLease)),
    Operation("delete", "DELETE", "/keys/{key}", ADMIN, "Delete a key permanently.",
        _delete, None, status=204, errors=(UnknownKey, StaleLease)),
    Operation("get", "GET", "/keys/{key}", CLIENT_OR_VIEWER, "The state of a key, without its text.",
        _get, Row, errors=(UnknownKey, StaleLease), changes=False),
    Operation("reveal", "POST", "/keys/{key}/reveal", ADMIN, "The text of a key. Written to the audit log.",
        _reveal, Revealed, errors=(UnknownKey, StaleLease), audits_refusals=True),
    Operation("quarantine", "POST", "/keys/{key}/quarantine", ADMIN,
        "Take a key out of service until it is restored: when its lease ends, or with `now` at once.",
        _quarantine, Row, body=QuarantineBody, errors=(UnknownKey, StaleLease)),
    Operation("restore", "POST", "/keys/{key}/restore", ADMIN,
        "Make a cooling or quarantined key available, and forget what was reported on it.",
        _restore, Row, errors=(UnknownKey, StaleLease)),
    Operation("list", "GET", "/keys", VIEWER, "List keys in an order, a page at a time.",
        _list, Page, query=ListQuery, errors=(BadRequest,), changes=False),
    Operation("batch", "POST", "/batch", CLIENT, "Up to 1000 of the single calls in one.", batch,
        GeneratedKeys | Leases | KeptAliveKeys | UnblockedKeys | ExtendedLeases | DeletedKeys | QuarantinedKeys
        | RestoredKeys,
        body=AnyBatch, body_required=True, created=(GeneratedKeys,), errors=(NoKeyAvailable, PoolFull, Draining),
        repeatable=True),
    Operation("stats", "GET", "/stats", VIEWER, "Current counts, and totals since the pool began.",
        _stats, Stats, changes=False),
)
# fmt: on
