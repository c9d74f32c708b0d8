"""Opening the engine on a Valkey: connect, see that the pool there is the one that is meant, begin to sweep."""

from __future__ import annotations

import logging
from typing import Any

from keypool.engine.valkey import ValkeyEngine
from keypool.engine.valkey_link import Lost, Measured, ReplyError
from keypool.engine.valkey_nodes import Nodes
from keypool.engine.valkey_partitions import PoolFacts
from keypool.engine.valkey_url import ValkeyUrl
from keypool.errors import StartError, StorageUnavailable

LAYOUT = 1
MOVING = 0
"""In place of the layout, what keypool migrate writes until all is there."""

_AWAY_SECONDS = 3.0  # without a look at a partition after which no server is alive
_SLICE = 500  # keys that one script deals with
_log = logging.getLogger("keypool.valkey")


async def open_valkey(url: ValkeyUrl, partitions: int, restart_grace: float, **settings: Any) -> ValkeyEngine:
    """The engine over the pool in a Valkey, which is made if there is none. Raises StartError.

    `settings` are ValkeyEngine's.
    """
    measured = Measured()
    nodes = Nodes(url, measured)
    where = ",".join(f"{host}:{port}" for host, port in url.nodes)
    try:
        await nodes.open()
        await _warn_of_eviction(nodes, url.pool)
        facts = await read_facts(nodes, url.pool, partitions)
        await nodes.set_partitions(facts.partitions)
        if restart_grace:
            await _give_grace(nodes, facts.partitions, round(restart_grace * 1e6))
    except (OSError, ReplyError, Lost) as error:
        await nodes.close()
        raise StartError(f"the Valkey at {where} can't be used: {error}") from None
    except StorageUnavailable as error:
        await nodes.close()
        raise StartError(f"the Valkey at {where} can't be used: {error.detail}") from None
    except StartError:
        await nodes.close()
        raise
    engine = ValkeyEngine(nodes, measured, url.pool, facts, **settings)
    _log.info("serving the pool %s with %d partitions at %s", url.pool, facts.partitions, where)
    return engine


async def _warn_of_eviction(nodes: Nodes, pool: str) -> None:
    """A Valkey that throws away what it was given is no store. Not every one tells."""
    try:
        told = (await nodes.ask(f"{{{pool}}}:pool", "INFO", "memory")).decode()
    except ReplyError:
        return
    if "maxmemory_policy:allkeys" in told:
        _log.warning("Valkey's maxmemory-policy throws keys away when memory is short: set it to noeviction")


async def _give_grace(nodes: Nodes, partitions: int, microseconds: int) -> None:
    """What --restart-grace asks for, unless another server serves the pool: then no client was without one."""
    away = round(_AWAY_SECONDS * 1e6)
    given = 0
    for partition in range(partitions):
        ends, count = 0, _SLICE
        while count == _SLICE:
            _, ends, count = await nodes.call(partition, "grace", (away, ends, microseconds, _SLICE))
            given += count
    _log.info("%d keys were given until %.1f s after the start", given, microseconds / 1e6)


async def read_facts(nodes: Nodes, pool: str, partitions: int) -> PoolFacts:
    """What is written of the pool, written now if it is new. Raises StartError if it isn't what was asked for."""
    key = f"{{{pool}}}:pool"
    # The link is any that serves this key's slot; each field is written by whoever comes first.
    seconds, microseconds = await nodes.ask(key, "TIME")
    new = {
        "layout": LAYOUT,
        "partitions": partitions,
        "born": int(seconds) * 1_000_000 + int(microseconds),
        "base_tick": 0,
        "base_id": 0,
    }
    for field, value in new.items():
        await nodes.ask(key, "HSETNX", key, field, value)
    told = await nodes.ask(key, "HGETALL", key)
    facts = {name.decode(): int(value) for name, value in zip(told[::2], told[1::2], strict=True)}
    if facts["layout"] == MOVING:
        raise StartError(
            f"the pool {pool} is being moved in by keypool migrate; if that was broken off, run it again with "
            "--clear"
        )
    if facts["layout"] != LAYOUT:
        raise StartError(f"the pool {pool} has layout {facts['layout']}; this version knows {LAYOUT}")
    if facts["partitions"] != partitions:
        raise StartError(
            f"the pool {pool} has {facts['partitions']} partitions: start with --partitions="
            f"{facts['partitions']}, not {partitions}; the number never changes"
        )
    return PoolFacts(facts["partitions"], facts["born"], facts["base_tick"], facts["base_id"])
