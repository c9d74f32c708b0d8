"""Every call of the API, once.

Dispatch, role checks, `Allow` headers, documentation and OpenAPI are derived from the table `OPERATIONS`; a new call is
a row there. An Operation's `run` gets the engine and the Call and returns an answer of its type, or raises an error of
errors.py. HTTP appears only in the rows of the table.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from keypool.api.auth import NO_TOKEN, Caller, Role
from keypool.core.answers import (
    BatchAnswer,
    DeletedKeys,
    EndedLease,
    Extended,
    ExtendedLeases,
    Extension,
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
    Unblock,
    Unblocked,
    UnblockedKeys,
)
from keypool.core.cursor import ListQuery
from keypool.core.errors import (
    BadRequest,
    BlockLimit,
    Draining,
    Forbidden,
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
from keypool.core.events import HOLDER, By, Origin
from keypool.core.handles import PREFIX, Handle
from keypool.core.keys import hint
from keypool.core.outcomes import Outcome, Report
from keypool.engine import Engine
from keypool.ops.audit import asked_for, audit, known
from keypool.ops.histogram import ReportMetrics

ANYONE: frozenset[Role] = frozenset()  # no token needed
CLIENT = frozenset({Role.CLIENT, Role.ADMIN})
VIEWER = frozenset({Role.VIEWER, Role.ADMIN})
ADMIN = frozenset({Role.ADMIN})
CLIENT_OR_VIEWER = CLIENT | VIEWER

BASE = "/api/v1"
"""The beginning of every path of the API."""

MAX_BATCH = 1000
MAX_WAIT = 60
MOST_SECONDS = 10**15
"""The largest length of time that a body may give: thirty million years, of which floats still count milliseconds."""

ATTEMPT_HEADER = "Idempotency-Key"
"""The header by which a caller names its acquire, so that it can repeat it."""
_ATTEMPT_KEY = re.compile(r"[!-~]{1,64}")
_POOL = "default"


# -- bodies

_PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f]*$(?!\n)"  # in Python, $ also matches before a final newline
_Owner = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=200,
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

    def __post_init__(self) -> None:
        if self.retry_after is not None and self.outcome is not Outcome.RATE_LIMITED:
            raise ValueError("`retry_after` goes with `outcome` rate_limited only")
        if self.reason is not None and self.outcome is None:
            raise ValueError("`reason` goes with an `outcome`: ok, rate_limited, error or invalid")

    def report(self) -> Report | None:
        """What the holder reports, if anything."""
        return None if self.outcome is None else Report(self.outcome, self.retry_after, self.reason)


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


class BatchBody(Body, tag_field="op"):
    """One of eight kinds, distinguished by `op`."""


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


AnyBatch = (
    GenerateBatch
    | AcquireBatch
    | KeepaliveBatch
    | UnblockBatch
    | ExtendBatch
    | DeleteBatch
    | QuarantineBatch
    | RestoreBatch
)


# -- a call, and an operation


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
    attempt: Attempt | None = None
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
    repeatable: bool = (
        False  # whether it takes an Idempotency-Key; of batches, only op acquire makes use of it
    )
    audits_refusals: bool = False  # whether the audit log also has callers refused for their role


# -- the calls


_ID = "id:"


def require_may_name(text: str, caller: Caller) -> None:
    """Raise Forbidden if a client names a key by its id."""
    if text.startswith(_ID) and caller.role is Role.CLIENT:
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
    if not text.startswith(_ID):
        return text
    require_may_name(text, caller)
    number = text[len(_ID) :]
    if not (number.isascii() and number.isdigit() and len(number) < 19):
        raise UnknownKey("an id is written id:N, with N a whole number as generate and the lists give it")
    return int(number)


def _lease_of(ref: Ref, lease: int | None) -> int | None:
    """The lease number that a caller gives, in the body or by a handle. Raises BadRequest if the two differ."""
    if not isinstance(ref, Handle):
        return lease
    if lease not in (None, ref.lease):
        raise BadRequest(
            f"wrong body: lease is {lease}, and the handle is that of lease {ref.lease}: leave lease out, or give "
            "the handle's"
        )
    return ref.lease


_REPORT_NEEDS = (
    "wrong body: an outcome needs a lease number: give lease, or name the key by the handle of its lease"
)
_EXTEND_NEEDS = (
    "wrong body: extend needs a lease number: give lease, or name the key by the handle of its lease"
)


def _attempt(call: Call, body: Body) -> Attempt | None:
    """The caller's attempt, if the request has an Idempotency-Key. About 4 µs. Raises BadRequest.

    Its digest is of the token, the header, the pool and the body as decoded, so the order of the body's members, white
    space and nulls make no difference.
    """
    key = call.idempotency_key
    if key is None:
        return None
    _check_attempt(key)
    name = msgspec.json.encode((call.caller.token, key, _POOL, body))  # a batch's body has the operation
    call.attempt = Attempt(blake2b(name, digest_size=16).digest())
    return call.attempt


def _check_attempt(key: str) -> None:
    if not _ATTEMPT_KEY.fullmatch(key):
        raise BadRequest(
            f"wrong header {ATTEMPT_HEADER}: it takes 1 to 64 visible ASCII characters, such as those of a UUID"
        )


def _block(engine: Engine, seconds: float | None) -> float | None:
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


def _operator(call: Call) -> Origin:
    return Origin(By.OPERATOR, None if call.caller.token == NO_TOKEN else call.caller.token)


def _origin_without_lease(call: Call) -> Origin:
    """Who ends a lease without its number: an operator if the role is admin, as a holder would know the number."""
    return _operator(call) if call.caller.role is Role.ADMIN else HOLDER


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
        [made] = await engine.generate(1, _operator(call))
    write_audit(call, "generate", [_made(made)])
    return made


def _made(key: GeneratedKey) -> str:
    return known(Identity(key.id, hint(key.key)))


async def delete_audited(engine: Engine, call: Call, text: str) -> None:
    """Purge a key, by its text, handle or `id:N`. Raises UnknownKey, StaleLease, StorageUnavailable."""
    ref = key_ref(engine, text, call.caller)
    with _unknown_outcome(call, "delete", [asked_for(text)]):
        gone = await engine.delete(ref, _operator(call))
    write_audit(call, "delete", [known(gone)])


def unblock(engine: Engine, call: Call, text: str, body: UnblockBody | None = None) -> Answering[Unblocked]:
    """Free a key, by its text, handle or `id:N`, and take its holder's report.

    Raises BadRequest, Forbidden, UnknownKey, StaleLease, StorageUnavailable.
    """
    ref = key_ref(engine, text, call.caller)
    lease = None if body is None else body.lease
    if isinstance(ref, Handle):
        lease = _lease_of(ref, lease)
    if body is not None and (report := body.outcome and body.report()):
        if lease is None:
            raise BadRequest(_REPORT_NEEDS)
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
        return await engine.unblock(ref, None, ended, None, _origin_without_lease(call))
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
    block = None if body.block_seconds is None else _block(engine, body.block_seconds)
    attempt = None if call.idempotency_key is None else _attempt(call, body)
    return engine.acquire(body.owner, body.wait or 0, call, block, attempt)


def _unblock(engine: Engine, call: Call) -> Answering[Unblocked]:
    return unblock(engine, call, call.key, call.body)


def _extend(engine: Engine, call: Call) -> Answering[Extended]:
    body: ExtendBody = call.body or ExtendBody()
    ref = key_ref(engine, call.key, call.caller)
    lease = _lease_of(ref, body.lease)
    if lease is None:
        raise BadRequest(_EXTEND_NEEDS)
    return engine.extend(ref, lease, body.seconds)


def _keepalive(engine: Engine, call: Call) -> Answering[KeptAlive]:
    return engine.keepalive(key_ref(engine, call.key, call.caller))


def _delete(engine: Engine, call: Call) -> Answering[None]:
    return delete_audited(engine, call, call.key)


def _get(engine: Engine, call: Call) -> Answering[Row]:
    return engine.get(key_ref(engine, call.key, call.caller))


async def _reveal(engine: Engine, call: Call) -> Revealed:
    try:
        revealed = await engine.reveal(key_ref(engine, call.key, call.caller), _operator(call))
    except KeypoolError as error:
        write_audit(call, "reveal", [asked_for(call.key)], error.code)
        raise
    write_audit(call, "reveal", [known(Identity(revealed.id, hint(revealed.key)))])
    return revealed


async def _quarantine(engine: Engine, call: Call) -> Row:
    body: QuarantineBody = call.body or QuarantineBody()
    ref = key_ref(engine, call.key, call.caller)
    with _unknown_outcome(call, "quarantine", [asked_for(call.key)]):
        row = await engine.quarantine(ref, body.reason, body.now or False, _operator(call))
    write_audit(call, "quarantine", [known(Identity(row.id, row.hint))])
    return row


async def _restore(engine: Engine, call: Call) -> Row:
    ref = key_ref(engine, call.key, call.caller)
    with _unknown_outcome(call, "restore", [asked_for(call.key)]):
        row = await engine.restore(ref, _operator(call))
    write_audit(call, "restore", [known(Identity(row.id, row.hint))])
    return row


def _list(engine: Engine, call: Call) -> Answering[Page]:
    return engine.page(call.query)


def _stats(engine: Engine, call: Call) -> Answering[Stats]:
    return engine.stats()


# -- batches

_HANDLES_PER_TURN = 200  # that are read before others run: about 0.6 ms


async def _refs(engine: Engine, texts: Sequence[str], call: Call) -> list[Ref]:
    """The key of each text. A malformed id or handle stays a text, which no key has. Raises Forbidden."""
    refs: list[Ref] = []
    for number, text in enumerate(texts):
        if text.startswith((_ID, PREFIX)):
            try:
                refs.append(key_ref(engine, text, call.caller))
            except UnknownKey:
                refs.append(text)
        else:
            refs.append(text)
        if number % _HANDLES_PER_TURN == _HANDLES_PER_TURN - 1 and text.startswith(PREFIX):
            await asyncio.sleep(0)
    return refs


AnyOutcome = TypeVar("AnyOutcome", bound=BatchAnswer)


def _sorted_out(kind: Callable[..., AnyOutcome], texts: Sequence[str], results: Sequence[str]) -> AnyOutcome:
    """The answer to a batch of keys: how many are done, and the texts of the others as they were sent, by result."""
    others: dict[str, list[str]] = {name: [] for name in kind.__struct_fields__ if name != "done"}  # type: ignore[attr-defined]
    done = 0
    for text, result in zip(texts, results, strict=True):
        if result == "done":
            done += 1
        else:
            others[result].append(text)
    return kind(done, **others)


async def _batch(engine: Engine, call: Call) -> Any:
    body: AnyBatch = call.body
    roles, run = _BATCHES[type(body)]
    if call.caller.role not in roles:
        op = type(body).__struct_config__.tag
        raise Forbidden(f"op {op!r} needs the role admin; this token is a {call.caller.role.value}'s")
    if call.idempotency_key is not None:
        _check_attempt(call.idempotency_key)  # whatever the op, as the path's description has it
    await asyncio.sleep(0)  # decoding the body took as long as a slice: let others run first
    return await run(engine, call, body)


async def _generate_batch(engine: Engine, call: Call, body: GenerateBatch) -> GeneratedKeys:
    with _unknown_outcome(call, "generate", [], body.count):
        made = await engine.generate(body.count, _operator(call))
    write_audit(call, "generate", [_made(key) for key in _ends(made)], count=len(made))
    return GeneratedKeys(made)


async def _acquire_batch(engine: Engine, call: Call, body: AcquireBatch) -> Leases:
    block = _block(engine, body.block_seconds)
    return Leases(await engine.acquire_many(body.owner, body.count, block, _attempt(call, body)))


async def _keepalive_batch(engine: Engine, call: Call, body: KeepaliveBatch) -> KeptAliveKeys:
    refs = await _refs(engine, body.keys, call)
    return _sorted_out(KeptAliveKeys, body.keys, await engine.keepalive_many(refs))


async def _unblock_batch(engine: Engine, call: Call, body: UnblockBatch) -> UnblockedKeys:
    texts = [item if isinstance(item, str) else item.key for item in body.keys]
    refs = await _refs(engine, texts, call)
    items = [_unblock_of(item, ref) for item, ref in zip(body.keys, refs, strict=True)]
    ended: list[EndedLease] = []
    outcome = "ok"
    try:
        results = await engine.unblock_many(items, ended, _origin_without_lease(call))
    except StorageUnavailable as error:
        outcome = error.code
        raise
    finally:
        if ended:
            write_audit(call, "unblock", [known(key) for key in _ends(ended)], outcome, len(ended))
    for item, result in zip(items, results, strict=True):
        if item.report is not None and result == "done":
            call.reports.add(item.report.outcome)
    return _sorted_out(UnblockedKeys, texts, results)


def _unblock_of(item: str | UnblockItem, ref: Ref) -> Unblock:
    if isinstance(item, str):
        return Unblock(ref, _lease_of(ref, None))
    lease = _lease_of(ref, item.lease)
    report = item.report()
    if report is not None and lease is None and not item.key.startswith(PREFIX):
        raise BadRequest(_REPORT_NEEDS)
    return Unblock(ref, lease, report)


async def _extend_batch(engine: Engine, call: Call, body: ExtendBatch) -> ExtendedLeases:
    texts = [item if isinstance(item, str) else item.key for item in body.keys]
    refs = await _refs(engine, texts, call)
    items = [_extension_of(item, ref) for item, ref in zip(body.keys, refs, strict=True)]
    return _sorted_out(ExtendedLeases, texts, await engine.extend_many(items))


def _extension_of(item: str | ExtendItem, ref: Ref) -> Extension:
    text, given, seconds = (
        (item, None, None) if isinstance(item, str) else (item.key, item.lease, item.seconds)
    )
    lease = _lease_of(ref, given)
    if lease is None:
        if not text.startswith(PREFIX):
            raise BadRequest(_EXTEND_NEEDS)
        lease = 0  # not a handle of this pool, so the key is unknown
    return Extension(ref, lease, seconds)


async def _delete_batch(engine: Engine, call: Call, body: DeleteBatch) -> DeletedKeys:
    refs = await _refs(engine, body.keys, call)
    with _unknown_outcome(call, "delete", [asked_for(text) for text in _ends(body.keys)], len(refs)):
        results = await engine.delete_many(refs, _operator(call))
    purged = [result for result in results if isinstance(result, Identity)]
    if purged:
        write_audit(call, "delete", [known(key) for key in _ends(purged)], count=len(purged))
    words = ["done" if isinstance(result, Identity) else result for result in results]
    return _sorted_out(DeletedKeys, body.keys, words)


async def _quarantine_batch(engine: Engine, call: Call, body: QuarantineBatch) -> QuarantinedKeys:
    refs = await _refs(engine, body.keys, call)
    change = engine.quarantine_many(refs, body.reason, body.now or False, _operator(call))
    return _sorted_out(QuarantinedKeys, body.keys, await _audited(call, "quarantine", body.keys, change))


async def _restore_batch(engine: Engine, call: Call, body: RestoreBatch) -> RestoredKeys:
    refs = await _refs(engine, body.keys, call)
    change = engine.restore_many(refs, _operator(call))
    return _sorted_out(RestoredKeys, body.keys, await _audited(call, "restore", body.keys, change))


async def _audited(call: Call, act: str, texts: Sequence[str], change: Answering[list[str]]) -> list[str]:
    """Make a change of many keys, and write an audit line with those that are done."""
    with _unknown_outcome(call, act, [asked_for(text) for text in _ends(texts)], len(texts)):
        results = await change
    done = [text for text, result in zip(texts, results, strict=True) if result == "done"]
    if done:
        write_audit(call, act, [asked_for(text) for text in _ends(done)], count=len(done))
    return results


_BATCHES: dict[type, tuple[frozenset[Role], Callable[[Engine, Call, Any], Awaitable[Any]]]] = {
    GenerateBatch: (ADMIN, _generate_batch),
    AcquireBatch: (CLIENT, _acquire_batch),
    KeepaliveBatch: (CLIENT, _keepalive_batch),
    UnblockBatch: (CLIENT, _unblock_batch),
    ExtendBatch: (CLIENT, _extend_batch),
    DeleteBatch: (ADMIN, _delete_batch),
    QuarantineBatch: (ADMIN, _quarantine_batch),
    RestoreBatch: (ADMIN, _restore_batch),
}


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
    Operation("batch", "POST", "/batch", CLIENT, "Up to 1000 of the single calls in one.", _batch,
        GeneratedKeys | Leases | KeptAliveKeys | UnblockedKeys | ExtendedLeases | DeletedKeys | QuarantinedKeys
        | RestoredKeys,
        body=AnyBatch, body_required=True, created=(GeneratedKeys,), errors=(NoKeyAvailable, PoolFull, Draining),
        repeatable=True),
    Operation("stats", "GET", "/stats", VIEWER, "Current counts, and totals since the pool began.",
        _stats, Stats, changes=False),
)
# fmt: on
