"""The operation `batch`: up to a thousand of the single calls in one, taken in order."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from keypool.api.auth import Role
from keypool.api.bodies import (
    AcquireBatch,
    AnyBatch,
    DeleteBatch,
    ExtendBatch,
    ExtendItem,
    GenerateBatch,
    ImportBatch,
    KeepaliveBatch,
    QuarantineBatch,
    RestoreBatch,
    UnblockBatch,
    UnblockItem,
)
from keypool.api.calls import (
    ADMIN,
    CLIENT,
    EXTEND_NEEDS,
    ID,
    REPORT_NEEDS,
    Answering,
    Call,
    attempt_of,
    block_of,
    check_attempt,
    ends,
    key_ref,
    lease_of,
    name_of,
    operator,
    origin_without_lease,
    unknown_outcome,
    write_audit,
)
from keypool.api.imports import read_items
from keypool.core.answers import (
    IMPORT_STATUSES,
    DeletedKeys,
    EndedLease,
    ExtendedLeases,
    Extension,
    GeneratedKeys,
    Identity,
    ImportedKeys,
    KeptAliveKeys,
    KeysAnswer,
    Leases,
    NewKey,
    QuarantinedKeys,
    Ref,
    RestoredKeys,
    Unblock,
    UnblockedKeys,
    Written,
)
from keypool.core.errors import BadRequest, Forbidden, StorageUnavailable, UnknownKey
from keypool.core.handles import PREFIX
from keypool.core.keys import hint
from keypool.engine import Client, Engine
from keypool.ops.audit import asked_for, known

_HANDLES_PER_TURN = 200  # that are read before others run: about 0.6 ms


async def _refs(engine: Engine, texts: Sequence[str], call: Call) -> list[Ref]:
    """The key of each text. A malformed id or handle stays a text. Raises Forbidden.

    A text that looks like an id is first taken for a key's text, since a secret from elsewhere may look like one; but
    not from clients, who may not write ids at all. A valid handle is always taken for a handle: a secret that equals it
    can only be a copy of it.
    """
    refs: list[Ref] = []
    for number, text in enumerate(texts):
        if text.startswith((ID, PREFIX)):
            try:
                ref = key_ref(engine, text, call.caller)
                refs.append(Written(text, ref) if isinstance(ref, int) else ref)
            except UnknownKey:
                refs.append(text)
        else:
            refs.append(text)
        if number % _HANDLES_PER_TURN == _HANDLES_PER_TURN - 1 and text.startswith(PREFIX):
            await asyncio.sleep(0)
    return refs


AnyOutcome = TypeVar("AnyOutcome", bound=KeysAnswer)


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


async def batch(engine: Engine, call: Call) -> Any:
    """Run a batch of any kind. Raises Forbidden if the caller may not make the single calls, and what they raise."""
    body: AnyBatch = call.body
    roles, run = _BATCHES[type(body)]
    if call.caller.role not in roles:
        op = type(body).__struct_config__.tag
        raise Forbidden(f"op {op!r} needs the role admin; this token is a {call.caller.role.value}'s")
    if call.idempotency_key is not None:
        check_attempt(call.idempotency_key)  # whatever the op, as the path's description has it
    await asyncio.sleep(0)  # decoding the body took as long as a slice: let others run first
    return await run(engine, call, body)


async def _generate_batch(engine: Engine, call: Call, body: GenerateBatch) -> GeneratedKeys:
    with unknown_outcome(call, "generate", [], body.count):
        made = await engine.generate(body.count, operator(call))
    write_audit(call, "generate", [name_of(key) for key in ends(made)], count=len(made))
    call.is_other = True
    return GeneratedKeys(made)


async def _import_batch(engine: Engine, call: Call, body: ImportBatch) -> ImportedKeys:
    items = await read_items(body)
    with unknown_outcome(call, "import", [], len(items)):
        results = await engine.import_many(
            items, body.exists == "update", body.expire or False, operator(call)
        )
    counts = Counter(result.status for result in results)
    changed = [
        Identity(result.id, hint(item.secret))
        for item, result in zip(items, results, strict=True)
        if result.status in ("created", "updated") and result.id is not None and isinstance(item, NewKey)
    ]
    if changed:
        write_audit(call, "import", [known(key) for key in ends(changed)], count=len(changed))
    return ImportedKeys(**{status: counts[status] for status in IMPORT_STATUSES}, results=results)


async def _acquire_batch(engine: Engine, call: Call, body: AcquireBatch) -> Leases:
    block, attempt, caller = block_of(engine, body.block_seconds), attempt_of(call, body), call.caller
    client = None if caller.name is None else Client(caller.name, caller.max_held)
    return Leases(await engine.acquire_many(body.owner, body.count, block, attempt, client=client))


async def _keepalive_batch(engine: Engine, call: Call, body: KeepaliveBatch) -> KeptAliveKeys:
    refs = await _refs(engine, body.keys, call)
    return _sorted_out(KeptAliveKeys, body.keys, await engine.keepalive_many(refs))


async def _unblock_batch(engine: Engine, call: Call, body: UnblockBatch) -> UnblockedKeys:
    texts = [item if isinstance(item, str) else item.key for item in body.keys]
    refs = await _refs(engine, texts, call)
    items = [
        _unblock_of(item, ref, number) for number, (item, ref) in enumerate(zip(body.keys, refs, strict=True))
    ]
    ended: list[EndedLease] = []
    outcome = "ok"
    try:
        results = await engine.unblock_many(items, ended, origin_without_lease(call))
    except StorageUnavailable as error:
        outcome = error.code
        raise
    finally:
        if ended:
            write_audit(call, "unblock", [known(key) for key in ends(ended)], outcome, len(ended))
    for item, result in zip(items, results, strict=True):
        if item.report is not None and result == "done":
            call.reports.add(item.report.outcome)
    return _sorted_out(UnblockedKeys, texts, results)


def _unblock_of(item: str | UnblockItem, ref: Ref, number: int) -> Unblock:
    if isinstance(item, str):
        return Unblock(ref, lease_of(ref, None))
    lease = lease_of(ref, item.lease)
    report = item.report(f" - at `$.keys[{number}]`")
    if report is not None and lease is None and not item.key.startswith(PREFIX):
        raise BadRequest(REPORT_NEEDS)
    return Unblock(ref, lease, report, item.uses or 1)


async def _extend_batch(engine: Engine, call: Call, body: ExtendBatch) -> ExtendedLeases:
    texts = [item if isinstance(item, str) else item.key for item in body.keys]
    refs = await _refs(engine, texts, call)
    items = [_extension_of(item, ref) for item, ref in zip(body.keys, refs, strict=True)]
    return _sorted_out(ExtendedLeases, texts, await engine.extend_many(items))


def _extension_of(item: str | ExtendItem, ref: Ref) -> Extension:
    text, given, seconds = (
        (item, None, None) if isinstance(item, str) else (item.key, item.lease, item.seconds)
    )
    lease = lease_of(ref, given)
    if lease is None:
        if not text.startswith(PREFIX):
            raise BadRequest(EXTEND_NEEDS)
        lease = 0  # not a handle of this pool, so the key is unknown
    return Extension(ref, lease, seconds)


async def _delete_batch(engine: Engine, call: Call, body: DeleteBatch) -> DeletedKeys:
    refs = await _refs(engine, body.keys, call)
    with unknown_outcome(call, "delete", [asked_for(text) for text in ends(body.keys)], len(refs)):
        results = await engine.delete_many(refs, operator(call))
    purged = [result for result in results if isinstance(result, Identity)]
    if purged:
        write_audit(call, "delete", [known(key) for key in ends(purged)], count=len(purged))
    words = ["done" if isinstance(result, Identity) else result for result in results]
    return _sorted_out(DeletedKeys, body.keys, words)


async def _quarantine_batch(engine: Engine, call: Call, body: QuarantineBatch) -> QuarantinedKeys:
    refs = await _refs(engine, body.keys, call)
    change = engine.quarantine_many(refs, body.reason, body.now or False, operator(call))
    return _sorted_out(QuarantinedKeys, body.keys, await _audited(call, "quarantine", body.keys, change))


async def _restore_batch(engine: Engine, call: Call, body: RestoreBatch) -> RestoredKeys:
    refs = await _refs(engine, body.keys, call)
    change = engine.restore_many(refs, operator(call))
    return _sorted_out(RestoredKeys, body.keys, await _audited(call, "restore", body.keys, change))


async def _audited(call: Call, act: str, texts: Sequence[str], change: Answering[list[str]]) -> list[str]:
    """Make a change of many keys, and write an audit line with those that are done."""
    with unknown_outcome(call, act, [asked_for(text) for text in ends(texts)], len(texts)):
        results = await change
    done = [text for text, result in zip(texts, results, strict=True) if result == "done"]
    if done:
        write_audit(call, act, [asked_for(text) for text in ends(done)], count=len(done))
    return results


_BATCHES: dict[type, tuple[frozenset[Role], Callable[[Engine, Call, Any], Awaitable[Any]]]] = {
    GenerateBatch: (ADMIN, _generate_batch),
    ImportBatch: (ADMIN, _import_batch),
    AcquireBatch: (CLIENT, _acquire_batch),
    KeepaliveBatch: (CLIENT, _keepalive_batch),
    UnblockBatch: (CLIENT, _unblock_batch),
    ExtendBatch: (CLIENT, _extend_batch),
    DeleteBatch: (ADMIN, _delete_batch),
    QuarantineBatch: (ADMIN, _quarantine_batch),
    RestoreBatch: (ADMIN, _restore_batch),
}
