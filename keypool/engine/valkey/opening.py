"""Opening the engine on a Valkey: connect, check that the pool there is the one that is meant, begin to serve it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from keypool.core.errors import StartError, StorageUnavailable
from keypool.core.rules import DEFAULT_RULES, PoolRules
from keypool.engine.valkey.calls import ScriptClient
from keypool.engine.valkey.engine import ValkeyEngine
from keypool.engine.valkey.grace import Grace
from keypool.engine.valkey.link import UNREACHABLE, ReplyError
from keypool.engine.valkey.nodes import Nodes
from keypool.engine.valkey.partitions import PoolFacts
from keypool.engine.valkey.presence import Presence
from keypool.engine.valkey.url import ValkeyUrl

LAYOUT = 1
MOVING = 0
"""What keypool migrate writes in place of the layout until all keys are there."""

SHARED = ("block_seconds", "keepalive_seconds", "key_length", "max_keys")
"""The settings that all servers of a pool must have alike: they decide what a key's holder may rely on."""

_LOADING_SECONDS = 60.0  # that a Valkey may take to load its file
_LOADING_PAUSE = 0.25
_DYING_SECONDS = 2.0  # that servers which were just ended may take to disappear
_log = logging.getLogger("keypool.valkey")


async def open_valkey(
    url: ValkeyUrl, partitions: int | None = None, rules: PoolRules = DEFAULT_RULES
) -> ValkeyEngine:
    """The engine over the pool in a Valkey, which is created if there is none. Raises StartError.

    Without `partitions` there are as many as the pool has, or `url.default_partitions` of a new one. Waits for up to a
    minute while Valkey loads its file.
    """
    nodes = Nodes(url)
    where = ",".join(f"{host}:{port}" for host, port in url.nodes)
    presence = client = None
    try:
        await _when_loaded(nodes.connect, where)
        facts = await read_facts(nodes, url, partitions)
        client = ScriptClient(nodes, url.pool, facts.partitions)
        await _when_loaded(nodes.connect, where)
        shared = {name: _as_flag(getattr(rules, name)) for name in SHARED}
        presence = Presence(nodes, url.pool, facts.born, shared)
        served = await presence.join(wait_for_dead=rules.restart_grace > 0)
        await Grace(client, rules).start(served)
        nodes.verify = presence.heartbeat
        engine = ValkeyEngine(client, facts, presence, rules)
    except BaseException as error:
        if presence is not None:
            await presence.leave()
        await (client or nodes).close()
        if isinstance(error, (*UNREACHABLE, StorageUnavailable)):
            reason = error.detail if isinstance(error, StorageUnavailable) else error
            raise StartError(f"the Valkey at {where} can't be used: {reason}") from None
        raise
    _log.info("serving the pool %s with %d partitions at %s", url.pool, facts.partitions, where)
    return engine


async def _when_loaded(connect: Callable[[], Awaitable[None]], where: str) -> None:
    """Connect, as soon as Valkey has loaded its file. Raises what `connect` does."""
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
                _log.info("the Valkey at %s is loading: waiting for it", where)
            waiting = True
        await asyncio.sleep(_LOADING_PAUSE)


async def read_facts(nodes: Nodes, url: ValkeyUrl, partitions: int | None) -> PoolFacts:
    """What `{POOL}:pool` holds, which is written if it is new. Raises StartError if it doesn't fit the flags."""
    pool = url.pool
    key = f"{{{pool}}}:pool"
    if not await nodes.execute(key, "EXISTS", key):
        await _refuse_new_pool_if_served(nodes, pool, key)
        seconds, microseconds = await nodes.execute(key, "TIME")
        new = {
            "layout": LAYOUT,
            "partitions": partitions or url.default_partitions,
            "born": int(seconds) * 1_000_000 + int(microseconds),
            "base_tick": 0,
            "base_id": 0,
        }
        for field, value in new.items():  # of servers that start together, each field is the first one's
            await nodes.execute(key, "HSETNX", key, field, value)
    layout, *values = await nodes.execute(
        key, "HMGET", key, "layout", "partitions", "born", "base_tick", "base_id"
    )
    if int(layout) == MOVING:
        raise StartError(
            f"keypool migrate is moving a pool to {pool}; if it was interrupted, run it again with --clear"
        )
    if int(layout) != LAYOUT:
        raise StartError(f"the pool {pool} has layout {int(layout)}; this version knows {LAYOUT}")
    facts = PoolFacts(*(int(value) for value in values))
    if partitions not in (None, facts.partitions):
        raise StartError(
            f"the pool {pool} has {facts.partitions} partitions: start with --partitions={facts.partitions} or "
            f"without the flag, not with {partitions}; the number never changes"
        )
    return facts


async def _refuse_new_pool_if_served(nodes: Nodes, pool: str, key: str) -> None:
    """Raise StartError if servers subscribe to channels of a pool that isn't there: Valkey was emptied while they ran,
    and a new pool would give their clients' lease numbers again.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + _DYING_SECONDS
    while any(await nodes.execute_on_all("PUBSUB", "CHANNELS", f"{{{pool}:*")):
        if await nodes.execute(key, "EXISTS", key):
            return  # another server that started together with this one has created it
        if loop.time() > until:
            raise StartError(
                f"the pool {pool} isn't in Valkey any more, and servers still run that served it: stop them first"
            )
        await asyncio.sleep(_LOADING_PAUSE)


def _as_flag(value: float) -> str:
    return f"{value:g}" if value < 1e6 and value == round(value, 3) else str(value)
