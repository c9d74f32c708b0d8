"""Opening the engine on a Valkey: connect, see that the pool there is the one that is meant, begin to serve it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from keypool.core.errors import StartError, StorageUnavailable
from keypool.core.rules import DEFAULT_RULES, PoolRules
from keypool.engine.valkey.engine import ValkeyEngine
from keypool.engine.valkey.link import Lost, Measured, ReplyError
from keypool.engine.valkey.nodes import Nodes
from keypool.engine.valkey.partitions import PoolFacts
from keypool.engine.valkey.presence import Presence
from keypool.engine.valkey.url import ValkeyUrl

LAYOUT = 1
MOVING = 0
"""In place of the layout, what keypool migrate writes until all is there."""

SHARED = ("block_seconds", "keepalive_seconds", "key_length", "max_keys")
"""The settings that all servers of a pool must have alike: they decide what a key's holder may rely on."""

_LOADING_SECONDS = 60.0  # that a Valkey which reads its file may take
_LOADING_PAUSE = 0.25
_DYING_SECONDS = 2.0  # that servers which were just ended may take to be gone
_SLICE = 500  # keys that one script deals with
_SOON = 30.0  # seconds ahead: keys that die later can wait for their time while a partition is served already
_log = logging.getLogger("keypool.valkey")


async def open_valkey(
    url: ValkeyUrl, partitions: int | None = None, rules: PoolRules = DEFAULT_RULES
) -> ValkeyEngine:
    """The engine over the pool in a Valkey, which is made if there is none. Raises StartError.

    Without `partitions` there are as many as the pool has, or `url.default_partitions` of a new one. Waits
    for up to a minute while Valkey loads its file.
    """
    measured = Measured()
    nodes = Nodes(url, measured)
    where = ",".join(f"{host}:{port}" for host, port in url.nodes)
    presence = None
    try:
        await _when_loaded(nodes.open, where)
        facts = await read_facts(nodes, url, partitions)
        await _when_loaded(lambda: nodes.set_partitions(facts.partitions), where)
        shared = {name: _spelled(getattr(rules, name)) for name in SHARED}
        presence = Presence(nodes, url.pool, facts.born, shared)
        served = await presence.enter(sure=rules.restart_grace > 0)
        await _begin(nodes, facts.partitions, served, rules)
        nodes.verify = presence.check
    except (OSError, ReplyError, Lost, StorageUnavailable) as error:
        await _give_up(nodes, presence)
        reason = error.detail if isinstance(error, StorageUnavailable) else error
        raise StartError(f"the Valkey at {where} can't be used: {reason}") from None
    except BaseException:
        await _give_up(nodes, presence)
        raise
    engine = ValkeyEngine(nodes, measured, url.pool, facts, presence, rules=rules)
    _log.info("serving the pool %s with %d partitions at %s", url.pool, facts.partitions, where)
    return engine


async def _give_up(nodes: Nodes, presence: Presence | None) -> None:
    if presence is not None:
        await presence.leave()
    await nodes.close()


async def _when_loaded(connect: Callable[[], Awaitable[None]], where: str) -> None:
    """Connect, as soon as Valkey has read its file. Raises what `connect` does."""
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


async def _begin(nodes: Nodes, partitions: int, served: bool, rules: PoolRules) -> None:
    """Have every partition served. After a stop keys get what --restart-grace gives; after an outage, in which
    servers lived and could not reach Valkey, half of a keepalive if that is more. Raises StorageUnavailable.
    """
    outage = max(rules.restart_grace, rules.keepalive_seconds / 2)
    rest: set[asyncio.Task[int]] = set()

    async def attend(partition: int) -> None:
        ends, given = await _give_time(nodes, partition, "outage", outage, soon=_SOON)
        if ends:
            _log.info("partition %d is served again: %d keys were given %.1f s", partition, given, outage)
            task = asyncio.ensure_future(_give_the_rest(nodes, partition, ends, given))
            rest.add(task)
            task.add_done_callback(rest.discard)

    given = 0
    for partition in range(partitions):
        why, seconds = ("start", outage) if served else ("stop", rules.restart_grace)
        given += (await _give_time(nodes, partition, why, seconds))[1]
    if rules.restart_grace:
        _log.info("%d keys were given until %.1f s after the start", given, rules.restart_grace)
    nodes.attend = attend


async def _give_time(
    nodes: Nodes,
    partition: int,
    why: str,
    seconds: float,
    *,
    ends: int = 0,
    given: int = 0,
    soon: float = 1e6,
) -> tuple[int, int]:
    """Let keys that would die sooner live for so long, see lua/grace.lua: until when, and how many. In slices.
    `given` is how many have that moment already. O(n log n). Raises StorageUnavailable.
    """
    more = 1
    while more:
        _, ends, count, more = await nodes.call(
            partition, "grace", (why, round(seconds * 1e6), ends, round(soon * 1e6), given, _SLICE)
        )
        given += count
    return ends, given


async def _give_the_rest(nodes: Nodes, partition: int, ends: int, given: int) -> int:
    """Give the same to keys that were in no hurry, while the partition is served. How many have it by then."""
    try:
        return (await _give_time(nodes, partition, "rest", 0.0, ends=ends, given=given))[1]
    except StorageUnavailable:
        return given  # away again: the next outage's end deals with them


async def read_facts(nodes: Nodes, url: ValkeyUrl, partitions: int | None) -> PoolFacts:
    """What is written of the pool, written now if it is new. Raises StartError if it isn't what was asked for."""
    pool = url.pool
    key = f"{{{pool}}}:pool"
    if not await nodes.ask(key, "EXISTS", key):
        await _refuse_beside(nodes, pool, key)
        # The link is any that serves this key's slot; each field is written by whoever comes first.
        seconds, microseconds = await nodes.ask(key, "TIME")
        new = {
            "layout": LAYOUT,
            "partitions": partitions or url.default_partitions,
            "born": int(seconds) * 1_000_000 + int(microseconds),
            "base_tick": 0,
            "base_id": 0,
        }
        for field, value in new.items():
            await nodes.ask(key, "HSETNX", key, field, value)
    layout, *told = await nodes.ask(key, "HMGET", key, "layout", "partitions", "born", "base_tick", "base_id")
    if int(layout) == MOVING:
        raise StartError(
            f"the pool {pool} is being moved in by keypool migrate; if that was broken off, run it again with "
            "--clear"
        )
    if int(layout) != LAYOUT:
        raise StartError(f"the pool {pool} has layout {int(layout)}; this version knows {LAYOUT}")
    facts = PoolFacts(*(int(value) for value in told))
    if partitions not in (None, facts.partitions):
        raise StartError(
            f"the pool {pool} has {facts.partitions} partitions: start with --partitions={facts.partitions} or "
            f"without the flag, not with {partitions}; the number never changes"
        )
    return facts


async def _refuse_beside(nodes: Nodes, pool: str, key: str) -> None:
    """Raise StartError if servers listen for freed keys of a pool that isn't there: Valkey was emptied beneath them,
    and a new pool would give their clients' lease numbers again.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + _DYING_SECONDS
    while any(await nodes.everywhere("PUBSUB", "CHANNELS", f"{{{pool}:*")):
        if await nodes.ask(key, "EXISTS", key):
            return  # one that started together with this one has made it
        if loop.time() > until:
            raise StartError(
                f"the pool {pool} isn't in Valkey any more, and servers still run that served it: stop them first"
            )
        await asyncio.sleep(_LOADING_PAUSE)


def _spelled(value: float) -> str:
    return f"{value:g}" if value < 1e6 and value == round(value, 3) else str(value)
