"""The calls about pools as such, and about the encryption of all: their `run` gets `Pools`, not an engine."""

from __future__ import annotations

from keypool.api.bodies import DeletePoolQuery, PoolBody
from keypool.api.calls import Call, operator, unknown_outcome, write_audit
from keypool.core.answers import PoolRow, PoolRows, Rekeying
from keypool.core.errors import BadRequest, Forbidden
from keypool.core.pace import Pace
from keypool.core.rules import MAX_POOL_NAME, Settings, is_pool_name
from keypool.engine import Pools
from keypool.ops.audit import Fact


async def list_pools(pools: Pools, call: Call) -> PoolRows:
    """The rows of all pools that the caller may use, in order of name."""
    return PoolRows([pools.row(name) for name in pools.names() if call.caller.may_use(name)])


async def get_pool(pools: Pools, call: Call) -> PoolRow:
    """The row of a pool. Raises UnknownPool."""
    return pools.row(call.pool)


async def put_pool(pools: Pools, call: Call) -> PoolRow:
    """Make a pool, or give one all its settings anew. Raises BadRequest, TooManyPools, PoolDraining, PoolFixed."""
    if not is_pool_name(call.pool):
        raise BadRequest(
            f"a pool's name takes 1 to {MAX_POOL_NAME} characters of a-z 0-9 . _ -, the first a letter or a digit"
        )
    settings = _settings(call)
    with unknown_outcome(call, "pool-put", []):
        call.is_other = await pools.put(call.pool, settings, operator(call))
    write_audit(call, "pool-put", [], facts=_facts(settings))
    return pools.row(call.pool)


async def change_pool(pools: Pools, call: Call) -> PoolRow:
    """Change some settings of a pool. Raises UnknownPool, PoolFixed, BadRequest."""
    settings = _settings(call)
    with unknown_outcome(call, "pool-change", []):
        await pools.change(call.pool, settings, operator(call))
    write_audit(call, "pool-change", [], facts=_facts(settings))
    return pools.row(call.pool)


def _settings(call: Call) -> Settings:
    body: PoolBody | None = call.body
    return {} if body is None else body.settings()


def _facts(settings: Settings) -> dict[str, Fact]:
    """Settings for the audit log."""
    return {name: str(value) if isinstance(value, Pace) else value for name, value in settings.items()}


async def delete_pool(pools: Pools, call: Call) -> PoolRow | None:
    """Delete an empty pool, or drain one: then its row is the answer, unless it is gone already.

    Raises UnknownPool, PoolNotEmpty, PoolFixed.
    """
    query: DeletePoolQuery = call.query
    drain, now = query.drain == "true", query.now == "true"
    with unknown_outcome(call, "pool-delete", []):
        gone = await pools.delete(call.pool, drain=drain, now=now, origin=operator(call))
    write_audit(call, "pool-delete", [], facts={"drain": "now" if now else "true"} if drain else {})
    if gone or call.pool not in pools.names():
        return None
    call.is_other = True
    return pools.row(call.pool)


async def rekey(pools: Pools, call: Call) -> Rekeying:
    """Begin to encrypt what isn't yet under the first secrets key. Raises SecretsKeyRequired, Forbidden."""
    if call.caller.pools is not None:
        raise Forbidden("rekey is about all pools, and this token is for some")
    with unknown_outcome(call, "rekey", []):
        progress = await pools.rekey()
    write_audit(call, "rekey", [])
    return progress


async def rekeying(pools: Pools, call: Call) -> Rekeying:
    """How far the encryption of the stored keys has got."""
    return pools.rekeying()
