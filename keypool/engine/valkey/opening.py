"""Opening the engines: connect to Valkey, check the pool there or create it, begin to serve it and the others."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence

from keypool.core.errors import StartError, StorageUnavailable
from keypool.core.handles import SECRET_BYTES
from keypool.core.rules import DEFAULT_POOL, DEFAULT_RULES, PoolRules
from keypool.engine.pools import MAX_POOLS
from keypool.engine.valkey.calls import ScriptClient
from keypool.engine.valkey.engine import ValkeyEngine
from keypool.engine.valkey.grace import Grace
from keypool.engine.valkey.link import UNREACHABLE, ReplyError, Word
from keypool.engine.valkey.nodes import Nodes
from keypool.engine.valkey.partitions import Partitions, PoolFacts
from keypool.engine.valkey.pools import ValkeyPools
from keypool.engine.valkey.presence import AWAY_SECONDS, Presence
from keypool.engine.valkey.scripts import text_of
from keypool.engine.valkey.shares import Shares
from keypool.engine.valkey.subscriber import ReleaseSubscriber
from keypool.engine.valkey.url import ValkeyUrl
from keypool.engine.valkey.vault import begin_vault, new_vault, open_vault

LAYOUT = 4
"""That of engine.py. Layout 1 had no handles, outcomes and attempts, layout 2 no pools beside `default` and no keys
from elsewhere, layout 3 no paces, no history, no holders, no rare events and no seats; lua/upgrade.lua brings them
up."""
OLDER = ("1", "2", "3")
"""The layouts that are brought up, as they are stored."""
MOVING = 0
"""The layout that keypool migrate writes until all keys are there."""

SHARED = (
    "block_seconds", "keepalive_seconds", "key_length", "max_keys", "cooldown_seconds", "max_cooldown_seconds",
    "max_retry_after_seconds", "error_threshold", "forget_seconds", "max_quarantined_percent", "rest_seconds",
)  # fmt: skip
"""The settings that must be the same on all servers of a pool, besides `max_block_seconds`, which has no default."""

_LOADING_SECONDS = 60.0  # to wait for a Valkey that loads its file
_LOADING_PAUSE = 0.25
_DYING_SECONDS = 2.0  # to wait until the subscriptions of servers that just ended are gone
_log = logging.getLogger("keypool.valkey")


async def open_valkey(
    url: ValkeyUrl,
    partitions: int | None = None,
    rules: PoolRules = DEFAULT_RULES,
    *,
    max_pools: int = MAX_POOLS,
    secrets_keys: Sequence[bytes] = (),
) -> ValkeyPools:
    """Open the pools in a Valkey, or create the pool `default`. Raises StartError.

    `partitions` must be the number of `default`, if it exists; None means that, or `url.default_partitions` for a new
    one. `max_pools` is how many others there may be. With `secrets_keys`, what is secret is stored sealed (vault.py).
    Waits for up to a minute while Valkey loads its file, and up to 5 s for a server that was killed just now.
    """
    nodes = Nodes(url)
    where = ",".join(f"{host}:{port}" for host, port in url.nodes)
    ending: list[Callable[[], Awaitable[None]]] = [nodes.close]
    try:
        await _when_loaded(nodes.connect, where)
        facts = await read_facts(nodes, url, partitions, secrets_keys)
        pool_key = f"{{{url.pool}}}:pool"
        vault = await open_vault(nodes, pool_key, secrets_keys)
        client = ScriptClient(nodes, url.pool, facts.partitions)
        ending.append(client.close)
        settings = {name: _as_flag(getattr(rules, name)) for name in SHARED}
        settings["max_block_seconds"] = _as_flag(rules.longest_block)
        settings["secrets_key"] = "set" if secrets_keys else "unset"
        presence = Presence(nodes, url.pool, facts.born, settings)
        ending.append(presence.leave)
        shares = Shares(nodes, presence.server)
        ending.append(shares.close)
        await _when_loaded(nodes.connect, where)
        served = await presence.join(wait_for_dead=rules.restart_grace > 0)
        if vault is None and secrets_keys:
            vault = await begin_vault(nodes, pool_key, secrets_keys)
        default = Partitions(client, facts, rules, vault)
        await Grace(default).start(served)
        nodes.verify = presence.heartbeat
        subscriber = ReleaseSubscriber(nodes)
        engine = ValkeyEngine(DEFAULT_POOL, default, presence, subscriber, shares)
        pools = ValkeyPools(engine, default, presence, subscriber, shares, max_pools=max_pools)
        ending = [pools.close]
        await pools.open_all(served=served)
    except BaseException as error:
        for end in reversed(ending):
            await end()
        if isinstance(error, (*UNREACHABLE, StorageUnavailable)):
            reason = error.detail if isinstance(error, StorageUnavailable) else error
            raise StartError(f"the Valkey at {where} can't be used: {reason}") from None
        raise
    _log.info("serving the pool %s with %d partitions at %s", url.pool, facts.partitions, where)
    return pools


async def _when_loaded(connect: Callable[[], Awaitable[None]], where: str) -> None:
    """Connect, repeatedly while Valkey loads its file. Raises what `connect` raises."""
    loop = asyncio.get_running_loop()
    until = loop.time() + _LOADING_SECONDS
    waiting = False
    while True:
        try:
            await connect()
            return
        except ReplyError as error:
            if not str(error).startswith("LOADING") or loop.time() > until:
                raise
            if not waiting:
                _log.info("the Valkey at %s is loading its file: waiting", where)
            waiting = True
        await asyncio.sleep(_LOADING_PAUSE)


async def read_facts(
    nodes: Nodes, url: ValkeyUrl, partitions: int | None, secrets_keys: Sequence[bytes] = ()
) -> PoolFacts:
    """Read `{POOL}:pool`, or write it if it is missing. Raises StartError if it doesn't match the flags."""
    pool = url.pool
    key = f"{{{pool}}}:pool"
    if not await nodes.execute(key, "HEXISTS", key, "layout"):
        await _refuse_new_pool_if_served(nodes, pool, key)
        seconds, microseconds = await nodes.execute(key, "TIME")
        new: dict[str, Word] = {
            "partitions": partitions or url.default_partitions,
            "born": int(seconds) * 1_000_000 + int(microseconds),
            "base_tick": 0,
            "base_id": 0,
            "secret": os.urandom(SECRET_BYTES).hex(),
            **({"digests": new_vault(secrets_keys).sealed_digests_key()} if secrets_keys else {}),
            "layout": LAYOUT,  # the last, so that no server finds a part of them
        }
        for field, value in new.items():  # servers that start together agree on the first one's values
            await nodes.execute(key, "HSETNX", key, field, value)
    await _upgrade(nodes, pool, key)
    layout, *values, secret = await nodes.execute(
        key, "HMGET", key, "layout", "partitions", "born", "base_tick", "base_id", "secret"
    )
    if int(layout) == MOVING:
        raise StartError(
            f"keypool migrate is moving a pool to {pool}; if it was interrupted, run it again with --clear"
        )
    if int(layout) != LAYOUT:
        raise StartError(f"the pool {pool} has layout {int(layout)}; this version knows {LAYOUT}")
    count, born, base_tick, base_id = map(int, values)
    facts = PoolFacts(count, born, base_tick, base_id, bytes.fromhex(secret.decode()))
    if partitions not in (None, facts.partitions):
        raise StartError(
            f"the pool {pool} has {facts.partitions} partitions: start with --partitions={facts.partitions} or "
            f"without the flag, not with {partitions}; the number never changes"
        )
    return facts


async def _upgrade(nodes: Nodes, pool: str, key: str) -> None:
    """Bring pools of an older layout up to this one, in one step, whatever its size.

    Waits up to 5 s for a server of the older version that was killed. Raises StartError if one serves the pool.
    """
    first = None
    words = ("EVAL", text_of("upgrade"), 2, key, f"{{{pool}}}:servers")
    while True:
        secret = os.urandom(SECRET_BYTES).hex()
        servers, latest = await nodes.execute(key, *words, round(AWAY_SECONDS * 1e6), secret)
        if not servers:
            return
        first = latest if first is None else first
        if latest > first:  # it has sent a heartbeat just now
            raise StartError(
                f"the pool {pool} is served by an older version of keypool: stop those servers, then start this one"
            )
        await asyncio.sleep(_LOADING_PAUSE)


async def _refuse_new_pool_if_served(nodes: Nodes, pool: str, key: str) -> None:
    """Raise StartError if servers subscribe to a pool that isn't there: Valkey was emptied while they ran, and a new
    pool would repeat the lease numbers that their clients hold.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + _DYING_SECONDS
    while any(await nodes.execute_on_all("PUBSUB", "CHANNELS", f"{{{pool}:*")):
        if await nodes.execute(key, "EXISTS", key):
            return  # another server that started together with this one has created it
        if loop.time() > until:
            raise StartError(
                f"the pool {pool} isn't in Valkey any more, and its servers still run: stop them first"
            )
        await asyncio.sleep(_LOADING_PAUSE)


def _as_flag(value: float | None) -> str:
    if value is None:
        return "null"
    return f"{value:g}" if value < 1e6 and value == round(value, 3) else str(value)
