"""Every call of the API, once.

Dispatch, role checks, `Allow` headers, documentation and OpenAPI are derived from the table `OPERATIONS`; a new call is
a row there. An Operation's `run` gets the engine and the Call and returns an answer of its type, or raises an error of
errors.py. HTTP appears only in the rows of the table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from keypool.api.auth import Role
from keypool.api.batches import batch
from keypool.api.bodies import (
    AcquireBatch,
    AcquireBody,
    AnyBatch,
    DeletePoolQuery,
    DetailsBody,
    ExtendBody,
    FindBody,
    NewKeyBody,
    PoolBody,
    QuarantineBody,
    ReleaseOwnerBody,
    ReplaceBody,
    UnblockBody,
)
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
from keypool.api.imports import checked_secret, new_key, patch_of
from keypool.api.pool_calls import (
    change_pool,
    delete_pool,
    get_pool,
    list_pools,
    put_pool,
    rekey,
    rekeying,
)
from keypool.core.answers import (
    DeletedKeys,
    EndedLease,
    Extended,
    ExtendedLeases,
    GeneratedKey,
    GeneratedKeys,
    HistoryPage,
    HolderRows,
    Identity,
    ImportedKey,
    ImportedKeys,
    KeptAlive,
    KeptAliveKeys,
    Lease,
    Leases,
    Page,
    PoolRow,
    PoolRows,
    QuarantinedKeys,
    RareEventRows,
    Ref,
    Rekeying,
    ReleasedLeases,
    RestoredKeys,
    Revealed,
    Row,
    Stats,
    Unblocked,
    UnblockedKeys,
    WaiterRows,
    Written,
)
from keypool.core.cursor import EventQuery, HistoryQuery, HolderQuery, ListQuery, WaiterQuery
from keypool.core.errors import (
    BadRequest,
    BlockLimit,
    Draining,
    KeypoolError,
    KeysWouldExpire,
    LeaseOver,
    ManySeats,
    NameTaken,
    NoKeyAvailable,
    PoolDraining,
    PoolFixed,
    PoolFull,
    PoolNotEmpty,
    SecretExists,
    SecretsKeyRequired,
    ShareSpent,
    StaleLease,
    StorageUnavailable,
    Superseded,
    TooManyPools,
    TooManyWaiters,
    UnknownKey,
    UnknownPool,
)
from keypool.core.handles import Handle
from keypool.core.keys import hint
from keypool.engine import Client, Engine
from keypool.ops.audit import Fact, asked_for, known

# -- a call, and an operation


Run = Callable[[Any, Call], Answering[Any]]
"""Mostly returns the engine's own coroutine, as another one around it would cost a call a third of a microsecond."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of the API. `path` is below BASE; `{key}` and `{pool}` in it are one segment each.

    `run` gets the engine of a pool: that of `default`, or under `/pools/{pool}` before `path` that of another. If the
    operation is `on_pools`, it gets all Pools, and there is one path.
    """

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
    other_answer: Any = None  # what has `other_status` in place of `status`, if the call's `is_other` is set
    other_status: int | None = None
    locates: bool = False  # whether the answer is about a key, whose path is in the header Location
    legacy: bool = False
    head: Run | None = None  # what HEAD does, where GET would change something
    on_pools: bool = False
    takes_import: bool = False  # whether the body of an import may be larger than others
    changes: bool = True  # whether it changes anything but the feed and counters
    acquires: bool = False
    repeatable: bool = False  # whether it takes an Idempotency-Key, which of batches only op acquire uses
    audits_refusals: bool = False  # whether the audit log also has callers refused for their role

    @property
    def in_pools(self) -> bool:
        """Whether each pool has this call under its own path."""
        return bool(self.roles) and not (self.on_pools or self.legacy)

    @property
    def about_a_pool(self) -> bool:
        """Whether a caller must be allowed to use the pool of the path, `default` if it names none."""
        return self.legacy or self.in_pools or "{pool}" in self.path


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


async def _new_key(engine: Engine, call: Call) -> GeneratedKey | ImportedKey:
    body: NewKeyBody | None = call.body
    if body is None or body.secret is None:
        return await generate_audited(engine, call)
    item = new_key(body.secret, body)
    with unknown_outcome(call, "import", []):
        made = await engine.import_key(item, body.expire or False, operator(call))
    call.is_other = made.existed
    if not made.existed:
        write_audit(call, "import", [known(Identity(made.id, made.hint))])
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
    lease = report = None
    uses = 1
    if body is not None:
        lease = body.lease
        if body.uses is not None:
            uses = body.uses
        if body.outcome is not None or body.reason is not None or body.retry_after is not None:
            report = body.report()
    ref = key_ref(engine, text, call.caller)
    if isinstance(ref, Handle):
        lease = lease_of(ref, lease)
    if report is not None:
        if lease is None:
            raise BadRequest(REPORT_NEEDS)
        call.reported = report.outcome
        return engine.unblock(ref, lease, None, report, uses=uses)
    if lease is not None:
        return engine.unblock(ref, lease, uses=uses)
    return _unblock_audited(engine, call, ref, uses)


async def _unblock_audited(engine: Engine, call: Call, ref: Ref, uses: int) -> Unblocked:
    ended: list[EndedLease] = []
    outcome = "ok"
    try:
        return await engine.unblock(ref, None, ended, None, origin_without_lease(call), uses=uses)
    except StorageUnavailable as error:
        outcome = error.code
        raise
    finally:
        for key in ended:
            write_audit(call, "unblock", [known(key)], outcome, facts={"lease": key.lease})


_NOTHING_ASKED = AcquireBody()


def _acquire(engine: Engine, call: Call) -> Answering[Lease]:
    body: AcquireBody = call.body or _NOTHING_ASKED
    # Checked here, as calls of the two functions would cost every acquire a percent.
    block = None if body.block_seconds is None else block_of(engine, body.block_seconds)
    attempt = None if call.idempotency_key is None else attempt_of(call, body)
    caller = call.caller
    if caller.name is None:
        return engine.acquire(body.owner, body.wait or 0, call, block, attempt)
    client = Client(caller.name, caller.max_held)
    return engine.acquire(body.owner, body.wait or 0, call, block, attempt, client=client)


def _unblock(engine: Engine, call: Call) -> Answering[Unblocked]:
    return unblock(engine, call, call.key, call.body)


def _extend(engine: Engine, call: Call) -> Answering[Extended]:
    body: ExtendBody = call.body or ExtendBody()
    ref = key_ref(engine, call.key, call.caller)
    lease = lease_of(ref, body.lease)
    if lease is None:
        return _require_lease(engine, ref)
    return engine.extend(ref, lease, body.seconds)


async def _require_lease(engine: Engine, ref: Ref) -> Extended:
    """Raise what says why an extend without a lease number can't be done."""
    if isinstance(ref, str | Written):
        with contextlib.suppress(UnknownKey):
            seats = (await engine.get(ref)).seats
            if seats > 1:
                raise ManySeats(seats)
    raise BadRequest(EXTEND_NEEDS)


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


async def _audited(call: Call, act: str, change: Answering[Row]) -> Row:
    """Make a change of the call's key, and write an audit line."""
    with unknown_outcome(call, act, [asked_for(call.key)]):
        row = await change
    write_audit(call, act, [known(Identity(row.id, row.hint))])
    return row


async def _quarantine(engine: Engine, call: Call) -> Row:
    body: QuarantineBody = call.body or QuarantineBody()
    ref = key_ref(engine, call.key, call.caller)
    change = engine.quarantine(ref, body.reason, body.now or False, operator(call))
    return await _audited(call, "quarantine", change)


async def _restore(engine: Engine, call: Call) -> Row:
    ref = key_ref(engine, call.key, call.caller)
    return await _audited(call, "restore", engine.restore(ref, operator(call)))


async def _update(engine: Engine, call: Call) -> Row:
    body: DetailsBody = call.body
    patch, ref = patch_of(body), key_ref(engine, call.key, call.caller)
    return await _audited(call, "update", engine.update(ref, patch, operator(call)))


async def _replace(engine: Engine, call: Call) -> Row:
    body: ReplaceBody = call.body
    secret, ref = checked_secret(body.secret), key_ref(engine, call.key, call.caller)
    return await _audited(call, "replace", engine.replace(ref, secret, operator(call)))


def _history(engine: Engine, call: Call) -> Answering[HistoryPage]:
    return engine.history(key_ref(engine, call.key, call.caller), call.query)


def _find(engine: Engine, call: Call) -> Answering[Row]:
    body: FindBody = call.body
    return engine.find(body.key)


def _list(engine: Engine, call: Call) -> Answering[Page]:
    return engine.page(call.query)


def _owners(engine: Engine, call: Call) -> Answering[HolderRows]:
    return engine.owners(call.query)


async def _release_owner(engine: Engine, call: Call) -> ReleasedLeases:
    body: ReleaseOwnerBody = call.body
    with unknown_outcome(call, "owners-release", []):
        released = await engine.release_owner(body.owner, body.client, operator(call))
    facts: dict[str, Fact] = {"owner": body.owner}
    if body.client is not None:
        facts["client"] = body.client
    write_audit(call, "owners-release", [], facts={**facts, "released": released})
    return ReleasedLeases(released)


def _waiters(engine: Engine, call: Call) -> Answering[WaiterRows]:
    return engine.waiters(call.query)


def _events(engine: Engine, call: Call) -> Answering[RareEventRows]:
    return engine.rare_events(call.query)


def _stats(engine: Engine, call: Call) -> Answering[Stats]:
    return engine.stats()


_NEW = (PoolFull, PoolDraining)

# fmt: off
OPERATIONS: tuple[Operation, ...] = (
    Operation("generate", "POST", "/keys", ADMIN,
        "Generate a key, available at once; with a `secret`, import one from elsewhere.",
        _new_key, GeneratedKey | ImportedKey, status=201, other_answer=ImportedKey, other_status=200, body=NewKeyBody,
        errors=(*_NEW, NameTaken, KeysWouldExpire, SecretsKeyRequired), locates=True),
    Operation("acquire", "POST", "/keys/acquire", CLIENT,
        "Get a random available key, blocked for everybody else; optionally wait for one.",
        _acquire, Lease, body=AcquireBody,
        errors=(NoKeyAvailable, Superseded, PoolDraining, ShareSpent, TooManyWaiters, Draining), acquires=True,
        repeatable=True),
    Operation("find", "POST", "/keys/find", VIEWER,
        "The row of a key, by its whole text, `id:N`, its name or its hint.",
        _find, Row, body=FindBody, body_required=True, errors=(UnknownKey,), changes=False),
    Operation("unblock", "POST", "/keys/{key}/unblock", CLIENT,
        "Give a key back, and report how the work with it went; with lease or handle, only if it is still yours.",
        _unblock, Unblocked, body=UnblockBody, errors=(UnknownKey, StaleLease, ManySeats)),
    Operation("extend", "POST", "/keys/{key}/extend", CLIENT,
        "Let your lease of a key end later, up to the pool's `max_block_seconds`.",
        _extend, Extended, body=ExtendBody, errors=(UnknownKey, StaleLease, ManySeats, LeaseOver, BlockLimit)),
    Operation("keepalive", "POST", "/keys/{key}/keepalive", CLIENT,
        "Renew a key's TTL. Never lengthens a block.",
        _keepalive, KeptAlive, errors=(UnknownKey, StaleLease, ManySeats)),
    Operation("delete", "DELETE", "/keys/{key}", ADMIN, "Delete a key permanently, with all its seats.",
        _delete, None, status=204, errors=(UnknownKey, StaleLease)),
    Operation("get", "GET", "/keys/{key}", CLIENT_OR_VIEWER, "The state of a key, without its text.",
        _get, Row, errors=(UnknownKey, StaleLease), changes=False),
    Operation("history", "GET", "/keys/{key}/history", VIEWER,
        "Who held a key: its leases that have ended, the latest first, a page at a time.",
        _history, HistoryPage, query=HistoryQuery, errors=(UnknownKey, StaleLease), changes=False),
    Operation("update", "PATCH", "/keys/{key}", ADMIN,
        "Give a key a name, labels, data, a pace, or more or fewer seats.",
        _update, Row, body=DetailsBody, body_required=True,
        errors=(UnknownKey, StaleLease, NameTaken, PoolFull, PoolDraining)),
    Operation("replace", "POST", "/keys/{key}/replace", ADMIN,
        "Give a key another text, and forget its failures. Its holder may use the old one until the lease ends.",
        _replace, Row, body=ReplaceBody, body_required=True,
        errors=(UnknownKey, StaleLease, SecretExists, SecretsKeyRequired)),
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
        ImportedKeys | Leases | KeptAliveKeys | UnblockedKeys | ExtendedLeases | DeletedKeys | QuarantinedKeys
        | RestoredKeys,
        other_answer=GeneratedKeys, other_status=201, body=AnyBatch, body_required=True, takes_import=True,
        errors=(NoKeyAvailable, *_NEW, KeysWouldExpire, SecretsKeyRequired, ShareSpent, Draining), repeatable=True),
    Operation("owners", "GET", "/owners", VIEWER, "Who holds keys now, in order of name; unnamed holders first.",
        _owners, HolderRows, query=HolderQuery, errors=(BadRequest,), changes=False),
    Operation("owners-release", "POST", "/owners/release", ADMIN, "End all leases that an owner holds.",
        _release_owner, ReleasedLeases, body=ReleaseOwnerBody, body_required=True),
    Operation("waiters", "GET", "/waiters", VIEWER, "Who waits for a key at this server, first come first.",
        _waiters, WaiterRows, query=WaiterQuery, errors=(BadRequest,), changes=False),
    Operation("events", "GET", "/events", VIEWER,
        "The latest 1,000 rare events: what operators did, and keys that came and went.",
        _events, RareEventRows, query=EventQuery, errors=(BadRequest,), changes=False),
    Operation("stats", "GET", "/stats", VIEWER, "Current counts, and totals since the pool began.",
        _stats, Stats, changes=False),
    Operation("pools", "GET", "/pools", VIEWER, "All pools, with their settings and current counts.",
        list_pools, PoolRows, on_pools=True, changes=False),
    Operation("pool", "GET", "/pools/{pool}", VIEWER, "One pool, with its settings and current counts.",
        get_pool, PoolRow, errors=(UnknownPool,), on_pools=True, changes=False),
    Operation("pool-put", "PUT", "/pools/{pool}", ADMIN,
        "Make a pool, or set up an existing one. Settings that are left out get their defaults.",
        put_pool, PoolRow, other_answer=PoolRow, other_status=201, body=PoolBody,
        errors=(TooManyPools, PoolDraining, PoolFixed), on_pools=True),
    Operation("pool-change", "PATCH", "/pools/{pool}", ADMIN, "Change some settings of a pool.",
        change_pool, PoolRow, body=PoolBody, errors=(UnknownPool, PoolFixed), on_pools=True),
    Operation("pool-delete", "DELETE", "/pools/{pool}", ADMIN,
        "Delete an empty pool. With `drain`, purge its keys first: those that are held when their leases end.",
        delete_pool, None, status=204, other_answer=PoolRow, other_status=202, query=DeletePoolQuery,
        errors=(UnknownPool, PoolNotEmpty, PoolFixed), on_pools=True),
    Operation("rekeying", "GET", "/rekey", VIEWER, "How far stored keys are encrypted under the first secrets key.",
        rekeying, Rekeying, on_pools=True, changes=False),
    Operation("rekey", "POST", "/rekey", ADMIN, "Begin to encrypt the stored keys that aren't yet.",
        rekey, Rekeying, status=202, errors=(SecretsKeyRequired,), on_pools=True),
)
# fmt: on
