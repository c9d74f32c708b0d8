"""All pools of a server over one Valkey: an engine for each, over the same connections.

The pool `default` is described in engine.py; only those of its settings that aren't flags are in the registry
(registry.py). The others are there as a whole, and each has partitions of its own: one, as a hundred pools spread over
the nodes of a cluster by themselves, and each partition costs a poll a second, and a call of each list. The engines
share the connections, so that the calls of all pools in one turn of the loop are one pipeline for each node, the
subscription, and the heartbeat.

The life of a pool, as the registry has it; each step is one script (lua/pools.lua):

    (nothing) --put--> open --delete with drain--> draining --delete with now--> draining now
        ^                |                             |                              |
        +-- if empty ----+---------- when all keys are gone --------------------------+

Every server that finds a change (after little more than a second) makes its engine follow. Whether a pool drains is
written to its partitions, too, so that a server that doesn't know of it yet serves and makes no key there any more. All
servers purge the keys of a draining pool in slices (lua/drain.lua), and whichever finds it empty removes it: the
partitions of a pool that the registry doesn't have are deleted, or are leftovers that nobody will read, as its number
is not used again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from msgspec import structs

from keypool.core.answers import PoolRow, Rekeying
from keypool.core.errors import (
    PoolDraining,
    PoolFixed,
    PoolNotEmpty,
    StorageUnavailable,
    UnknownPool,
)
from keypool.core.events import By, Origin
from keypool.core.rules import DEFAULT_POOL, PoolRules, Settings
from keypool.engine import Client
from keypool.engine.pools import checked_rules
from keypool.engine.valkey import registry
from keypool.engine.valkey.calls import ScriptClient
from keypool.engine.valkey.engine import ValkeyEngine
from keypool.engine.valkey.grace import Grace
from keypool.engine.valkey.link import UNREACHABLE, Reply, Word
from keypool.engine.valkey.partitions import Partitions, PoolFacts
from keypool.engine.valkey.presence import Presence
from keypool.engine.valkey.registry import DRAINING, DRAINING_NOW, OPEN, Entry, Registry, Stored
from keypool.engine.valkey.rekeying import Rekeyer
from keypool.engine.valkey.scripts import keys_of
from keypool.engine.valkey.shares import Shares
from keypool.engine.valkey.subscriber import ReleaseSubscriber

PARTITIONS = 1
"""Of a new pool beside `default`."""

_SLICE = 100  # keys that one call of drain.lua looks at, in a millisecond or two
_SLICE_SHARE = 0.25  # of the time in which a server drains, so that the calls of others are served
_DRAIN_PAUSE = 0.5  # seconds between two looks for keys whose leases have ended
_FORGOTTEN_AT_ONCE = 500  # leases of a pool that is gone, in half a millisecond
_FORGET_PAUSE = 0.002  # seconds between two such calls
_GONE = "gone."  # what the names of fields about pools that are gone begin with (engine.py)
_CHARTS_SECONDS = 2.0  # to read or write the charts
_CHARTS_TURN = 50  # seconds for which no other server writes them
_CHARTS_LIFE = 86_400  # seconds; they go back no further
_MOST_OF_CHARTS = 1 << 20  # bytes
_MISSED_PAUSE = 0.25  # seconds from one look for an unknown pool to the next
_log = logging.getLogger("keypool.valkey")

T = TypeVar("T")


class _Pool:
    """A pool: its engine, and the entry that it goes by. `default` has none until it is given settings."""

    def __init__(self, engine: ValkeyEngine, stored: Stored) -> None:
        self.engine = engine
        self.stored = stored
        self.known = False  # whether the partitions know the entry
        self.drainer: asyncio.Task[None] | None = None


class ValkeyPools:
    """See the module, and the protocol Pools. Made by opening.py."""

    def __init__(
        self,
        default: ValkeyEngine,
        partitions: Partitions,
        presence: Presence,
        subscriber: ReleaseSubscriber,
        shares: Shares,
        *,
        max_pools: int,
    ) -> None:
        self.default = default
        self._nodes = nodes = partitions.client.nodes
        self._facts = facts = partitions.facts
        self._vault = partitions.vault
        self._presence = presence
        self._subscriber = subscriber
        self._shares = shares
        self._max_pools = max_pools
        self._loop = asyncio.get_running_loop()
        self._facts_key = f"{{{nodes.url.pool}}}:pool"
        self._registry = Registry(nodes, nodes.url.pool, facts.born)
        self._engines: dict[str, ValkeyEngine] = {DEFAULT_POOL: default}
        self._default = _Pool(default, Stored(self._new_entry(DEFAULT_POOL, {}), b""))
        self._default.known = True
        self._pools: dict[str, _Pool] = {}  # without `default`
        self._changing = asyncio.Lock()  # held while the registry and the engines are made to agree
        self._version = -1  # of the registry, as of the latest heartbeat
        self._looked_at = 0.0
        self._stale = False  # whether the registry is to be read
        self._following: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._callbacks: list[Callable[[], object]] = []
        self._draining = False
        self._rekeyer = Rekeyer(
            nodes,
            f"{{{nodes.url.pool}}}:pool",
            presence.server,
            partitions.vault,
            lambda: list(self._engines.values()),
        )
        presence.on_version = self._at_version

    # -- what there is

    def get(self, name: str) -> ValkeyEngine:
        """The pool of this name. O(1). Raises UnknownPool, and then looks whether another server has made it."""
        engine = self._engines.get(name)
        if engine is None:
            now = self._loop.time()
            if now - self._looked_at >= _MISSED_PAUSE:  # so that random names cost no more
                self._looked_at = now
                self._follow()
            raise UnknownPool
        return engine

    def names(self) -> list[str]:
        """The names of all pools, in order. O(p log p)."""
        return sorted(self._engines)

    def row(self, name: str) -> PoolRow:
        """Counts, as of the latest replies, and settings of a pool. O(partitions). Raises UnknownPool."""
        return self.get(name).row()

    def on_change(self, callback: Callable[[], object]) -> None:
        """Call this whenever a pool comes, goes, drains, or gets other settings. O(1)."""
        self._callbacks.append(callback)

    # -- changes

    async def put(self, name: str, settings: Settings, origin: Origin) -> bool:
        """Make a pool, or give it these settings alone; whether it is new. O(1).

        Raises TooManyPools, PoolDraining, PoolFixed, BadRequest, StorageUnavailable.
        """
        checked_rules(self.default.rules, name, settings)
        return await self._run(self._put(name, settings))

    async def _put(self, name: str, settings: Settings) -> bool:
        async with self._changing:
            seen = await self._registry.get(name)
            if name == DEFAULT_POOL and settings == ({} if seen is None else seen.entry.settings):
                return False
            while True:
                if seen is None:
                    entry = self._new_entry(name, settings)
                elif seen.entry.draining != OPEN:
                    raise PoolDraining
                else:
                    entry = structs.replace(seen.entry, json=registry.json_of(settings))
                done, found = await self._registry.put(name, seen, entry, self._max_pools)
                if done:
                    assert found is not None
                    await self._agree(name, found)
                    return seen is None and name != DEFAULT_POOL
                seen = found

    async def change(self, name: str, settings: Settings, origin: Origin) -> None:
        """Change some settings of a pool. O(1).

        Raises UnknownPool, PoolFixed, BadRequest, StorageUnavailable.
        """
        if name == DEFAULT_POOL:
            checked_rules(self.default.rules, name, settings)
        await self._run(self._change(name, settings))

    async def _change(self, name: str, settings: Settings) -> None:
        async with self._changing:
            seen = await self._registry.get(name)
            while seen is not None or name == DEFAULT_POOL:
                before = self._new_entry(name, {}) if seen is None else seen.entry
                merged = {**before.settings, **settings}
                checked_rules(self.default.rules, name, merged)
                if name == DEFAULT_POOL and merged == before.settings:
                    return
                entry = structs.replace(before, json=registry.json_of(merged))
                done, seen = await self._registry.put(name, seen, entry, self._max_pools)
                if done:
                    assert seen is not None
                    await self._agree(name, seen)
                    return
        raise UnknownPool

    def _new_entry(self, name: str, settings: Settings) -> Entry:
        if name != DEFAULT_POOL:
            return registry.new_entry(settings, PARTITIONS)
        facts = self._facts
        entry = registry.new_entry(settings, facts.partitions, facts.base_tick, facts.base_id)
        return structs.replace(entry, born=facts.born)

    async def delete(self, name: str, *, drain: bool, now: bool, origin: Origin) -> bool:
        """Delete a pool that is empty, or empty it first. Returns whether it is gone already. O(1).

        Raises UnknownPool, PoolNotEmpty, PoolFixed, StorageUnavailable.
        """
        if name == DEFAULT_POOL:
            raise PoolFixed
        return await self._run(self._delete(name, drain=drain, now=now, actor=origin.actor or ""))

    async def _delete(self, name: str, *, drain: bool, now: bool, actor: str) -> bool:
        async with self._changing:
            seen = await self._registry.get(name)
            while seen is not None:
                pool = await self._agree(name, seen)
                left = await pool.engine.close_if_empty()
                if not left:
                    done, seen = await self._remove(name, pool)
                    if done:
                        return True
                    continue
                if not drain:
                    raise PoolNotEmpty(left)
                how = max(seen.entry.draining, DRAINING_NOW if now else DRAINING)
                if how == seen.entry.draining:
                    return False
                entry = structs.replace(seen.entry, draining=how, actor=actor)
                done, seen = await self._registry.put(name, seen, entry, self._max_pools)
                if done:
                    assert seen is not None
                    await self._agree(name, seen)
                    return False
        raise UnknownPool

    async def held(self, client: Client) -> int | None:
        """See the protocol."""
        return await self._shares.held(client)

    async def rekey(self) -> Rekeying:
        """See the protocol."""
        return await self._rekeyer.begin()

    def rekeying(self) -> Rekeying:
        """See the protocol. As of a few seconds ago if another server is at it."""
        return self._rekeyer.progress()

    # -- charts

    def keeps_charts(self, name: str) -> bool:
        """See the protocol. Those of other pools aren't taken on all servers, only where somebody has looked."""
        return name == DEFAULT_POOL

    async def kept_charts(self) -> dict[str, bytes]:
        """See the protocol."""
        found = await self._of_charts("", "GETRANGE", 0, _MOST_OF_CHARTS - 1)
        return {DEFAULT_POOL: found} if found else {}

    async def keep_charts(self, charts: Mapping[str, bytes], *, last: bool = False) -> None:
        """See the protocol."""
        turn = await self._of_charts("_turn", "SET", self._presence.server, "NX", "EX", _CHARTS_TURN)
        if turn or last:
            await self._of_charts("", "SET", charts[DEFAULT_POOL], "EX", _CHARTS_LIFE)

    async def _of_charts(self, key: str, command: str, *words: Word) -> Reply:
        key = f"{{{self._nodes.url.pool}}}:charts{key}"
        try:
            async with asyncio.timeout(_CHARTS_SECONDS):
                return await self._nodes.execute(key, command, key, *words)
        except UNREACHABLE as error:
            raise StorageUnavailable(f"Valkey: {str(error) or 'no answer'}") from None

    # -- following the registry

    async def open_all(self, *, served: bool) -> None:
        """Open all pools of the registry; `served` is whether other servers serve them."""
        async with self._changing:
            await self._agree_all(await self._registry.read(), served=served)
        self._rekeyer.start()
        self._start(self._forget_left_histories())

    def _at_version(self, version: int) -> None:
        """Follow the registry if it has changed, or not all of it was done. Called with each heartbeat."""
        unknown = any(not pool.known for pool in (self._default, *self._pools.values()))
        if version != self._version or unknown:
            self._version = version
            self._follow()

    def _follow(self) -> None:
        """Make the engines agree with the registry, soon."""
        self._stale = True
        if self._following is None and not self._draining:
            self._following = self._loop.create_task(self._follow_registry())

    async def _follow_registry(self) -> None:
        try:
            while self._stale and not self._draining:
                self._stale = False
                async with self._changing:
                    await self._read_registry()
        except (*UNREACHABLE, StorageUnavailable) as error:
            _log.debug("the pools can't be read: %s", error)
            self._version = -1  # read again with the next heartbeat
        except Exception:
            _log.exception("following the registry of pools failed")
            self._version = -1
        finally:
            self._following = None

    async def _read_registry(self) -> None:
        entries = await self._registry.read()
        for name, pool in list(self._pools.items()):
            stored = entries.get(name)
            if stored is None or stored.entry.number != pool.stored.entry.number:
                await self._drop(name, pool)
        await self._agree_all(entries)

    async def _agree_all(self, entries: Mapping[str, Stored], *, served: bool = True) -> None:
        """The same for all pools at once. Those that can't be reached are tried again with the next heartbeat."""
        agreed = [self._agree(name, stored, served=served) for name, stored in entries.items()]
        for result in await asyncio.gather(*agreed, return_exceptions=True):
            if isinstance(result, (*UNREACHABLE, StorageUnavailable)):
                _log.debug("a pool can't be reached: %s", result)
                self._version = -1
            elif isinstance(result, BaseException):
                raise result

    async def _agree(self, name: str, stored: Stored, *, served: bool = True) -> _Pool:
        """Make the engine of a pool agree with its entry. `_changing` is held. Raises StorageUnavailable."""
        pool = self._pools.get(name) if name != DEFAULT_POOL else self._default
        entry = stored.entry
        if pool is not None and pool.stored.entry.number != entry.number:
            await self._drop(name, pool)
            pool = None
        if pool is None:
            pool = await self._open(name, stored, served=served)
        elif pool.stored.packed == stored.packed and pool.known:
            return pool
        pool.stored, pool.known = stored, False
        if entry.draining and not pool.engine.pool_draining:
            pool.engine.close_pool()
        try:
            await pool.engine.set_rules(self._rules_of(entry), entry.revision)
            pool.known = True
        finally:
            if entry.draining and pool.drainer is None:
                pool.drainer = self._loop.create_task(self._drain_pool(name, pool))
            self._notify()
        return pool

    async def _open(self, name: str, stored: Stored, *, served: bool) -> _Pool:
        entry, facts = stored.entry, self._facts
        client = ScriptClient(
            self._nodes, registry.namespace(self._nodes.url.pool, entry.number), entry.partitions
        )
        client.on_gone = lambda reason: self._lost(client, reason)
        if any(client.node_of(partition) not in self._nodes.serving for partition in range(entry.partitions)):
            self._nodes.recover()  # connects to it
        own = PoolFacts(
            entry.partitions, entry.born, entry.base_tick, entry.base_id, facts.secret, entry.number
        )
        vault = self._vault and self._vault.of_pool(entry.number)
        partitions = Partitions(client, own, self._rules_of(entry), vault)
        try:
            await Grace(partitions).start(served)
        except BaseException:
            await client.close()
            raise
        pool = _Pool(ValkeyEngine(name, partitions, self._presence, self._subscriber, self._shares), stored)
        self._pools[name], self._engines[name] = pool, pool.engine
        return pool

    def _rules_of(self, entry: Entry) -> PoolRules:
        rules = self.default.rules
        return rules.of_pool(entry.settings) if entry.number else rules.of_default(entry.settings)

    def _lost(self, client: ScriptClient, reason: str) -> None:
        """A pool's partition is not there: it was deleted, which the registry says, or Valkey has lost it."""
        client.lose(reason)
        self._follow()

    async def _drop(self, name: str, pool: _Pool) -> None:
        """Stop serving a pool that is not there any more."""
        del self._pools[name], self._engines[name]
        pool.engine.close_pool()
        if pool.drainer is not None and pool.drainer is not asyncio.current_task():
            pool.drainer.cancel()
        await pool.engine.close()
        self._notify()

    async def _drain_pool(self, name: str, pool: _Pool) -> None:
        """Purge the keys of a draining pool in slices, and remove it when all are gone."""
        after, now = [0] * pool.stored.entry.partitions, False
        while not self._draining:
            entry = pool.stored.entry
            if now != (entry.draining == DRAINING_NOW):
                now, after = not now, [0] * entry.partitions
            origin = Origin(By.OPERATOR, entry.actor or None)
            began = self._loop.time()
            try:
                left, more = await pool.engine.purge(origin, now, after, _SLICE)
                if not left:
                    async with self._changing:
                        if self._pools.get(name) is pool:
                            await self._remove(name, pool)
                    return
            except (*UNREACHABLE, StorageUnavailable) as error:
                _log.debug("draining the pool %s: %s", name, error)
                more = False
            except Exception:
                _log.exception("draining the pool %s failed", name)
                more = False
            took = self._loop.time() - began
            await asyncio.sleep(took / _SLICE_SHARE - took if more else _DRAIN_PAUSE)

    async def _remove(self, name: str, pool: _Pool) -> tuple[bool, Stored | None]:
        """Remove an empty pool, which takes no keys any more. Returns whether it is gone, and its entry otherwise."""
        number, partitions = pool.stored.entry.number, pool.stored.entry.partitions
        await self._nodes.execute(self._facts_key, "HSET", self._facts_key, f"{_GONE}{number}", partitions)
        done, found = await self._registry.remove(name, pool.stored)
        if not done and found is not None and found.entry.number == number:
            return False, found
        await self._drop(name, pool)
        if done:
            where = registry.namespace(self._nodes.url.pool, number)
            for partition in range(partitions):
                for key in keys_of(where, partition, partitions):
                    await self._nodes.execute(key, "UNLINK", key)
            facts = f"{{{where}}}:pool"
            await self._nodes.execute(facts, "UNLINK", facts)
            self._start(self._forget_history(number, partitions))
        return True, None

    async def _forget_left_histories(self) -> None:
        """Go on with what `_forget_history` didn't end, as its server stopped. Those of pools that exist stay."""
        flat = await self._nodes.execute(self._facts_key, "HGETALL", self._facts_key)
        numbers = {stored.entry.number for stored in (await self._registry.read()).values()}
        for field, partitions in zip(flat[::2], flat[1::2], strict=True):
            number = int(field[len(_GONE) :]) if field.startswith(_GONE.encode()) else 0
            if number and number not in numbers:
                await self._forget_history(number, int(partitions))

    async def _forget_history(self, number: int, partitions: int) -> None:
        """Delete the history of a pool that is gone, in slices. After an error, the next start goes on with it."""
        client = ScriptClient(self._nodes, registry.namespace(self._nodes.url.pool, number), partitions)
        try:
            for partition in range(partitions):
                left = 1
                while left:
                    if self._draining:
                        return
                    [left] = await client.call(partition, "forget", (_FORGOTTEN_AT_ONCE,))
                    await asyncio.sleep(_FORGET_PAUSE)
            await self._nodes.execute(self._facts_key, "HDEL", self._facts_key, f"{_GONE}{number}")
        except (*UNREACHABLE, StorageUnavailable) as error:
            _log.debug("the history of a pool that is gone can't be deleted now: %s", error)
        finally:
            await client.close()

    def _notify(self) -> None:
        for callback in self._callbacks:
            callback()

    async def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do this to the end, even if the caller hangs up. Raises StorageUnavailable."""
        task = self._start(work)
        try:
            return await asyncio.shield(task)
        except UNREACHABLE as error:
            raise StorageUnavailable(f"Valkey: {str(error) or 'no answer'}") from None

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # or asyncio would log it where nobody awaits the task

    # -- the end

    def drain(self) -> None:
        """Answer the waiters of all pools with Draining, and admit no more. O(waiters)."""
        self._draining = True
        for engine in self._engines.values():
            engine.drain()

    async def close(self) -> None:
        """Stop all engines, and disconnect."""
        self._draining = True
        await self._rekeyer.stop()
        drainers = [pool.drainer for pool in self._pools.values() if pool.drainer is not None]
        ending = [task for task in (*drainers, self._following) if task is not None]
        for task in ending:
            task.cancel()
        if ending or self._tasks:
            await asyncio.wait([*ending, *self._tasks])
        await asyncio.gather(*(engine.close() for engine in self._engines.values()))
        await self._presence.leave()
        await self._subscriber.close()
        await self._shares.close()
        await self._nodes.close()
