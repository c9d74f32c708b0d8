"""All pools of a server with the embedded engine: an engine each, with one clock, one loop and one journal.

A pool is made, changed and deleted by its `Definition`, which the `PoolStore` keeps among the changes of the journal:
so it is on disk no later than the first key of the pool.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

from sortedcontainers import SortedDict

from keypool.core.answers import PoolRow, Rekeying
from keypool.core.errors import (
    BadRequest,
    PoolDraining,
    PoolFixed,
    PoolNotEmpty,
    SecretsKeyRequired,
    TooManyPools,
    UnknownPool,
)
from keypool.core.events import By, Origin
from keypool.core.rules import DEFAULT_POOL, NOT_FLAGS, PoolRules, Settings
from keypool.engine import Client
from keypool.engine.draining import Drains
from keypool.engine.embedded import EmbeddedEngine
from keypool.engine.journal import Commit, Journal, NullJournal

MAX_POOLS = 100
"""Most pools beside `default`, unless the server is told otherwise."""

_RESTARTED = Origin(By.OPERATOR)  # who deleted a pool isn't kept across restarts


class Definition(NamedTuple):
    """What is kept of a pool beside its keys. `settings` are those that were given; the others have their defaults."""

    number: int
    """Never used again: 0 is `default`, whose definition is kept only if it was given settings."""
    name: str
    settings: Settings
    draining: bool = False
    """Whether the pool is being emptied for good."""
    at_once: bool = False
    """Whether that ends leases, too."""


class PoolStore(Protocol):
    """Keeps the definitions of pools among the changes of the journal that all of them share.

    Each change returns the commit that contains it, None if nothing is kept. The journal of pool 0 is that of the
    server: closing it commits the changes of all pools.
    """

    def journal_of(self, number: int, engine: EmbeddedEngine) -> Journal:
        """The journal of a new pool, which calls back its engine. O(1)."""
        ...

    def define(self, definition: Definition) -> Commit | None:
        """Keep a definition, in place of the one with this number. O(settings)."""
        ...

    def forget(self, number: int) -> Commit | None:
        """Keep nothing more of a pool without keys, but that its number was used. O(1)."""
        ...

    async def rekey(self) -> Rekeying:
        """See Pools."""
        ...

    def rekeying(self) -> Rekeying:
        """See Pools."""
        ...

    keeps_charts: bool

    async def kept_charts(self) -> dict[str, bytes]:
        """See Pools."""
        ...

    async def keep_charts(self, charts: Mapping[str, bytes]) -> None:
        """See Pools."""
        ...


class NullStore:
    """The store of pools that are in memory only."""

    keeps_charts = False

    def journal_of(self, number: int, engine: EmbeddedEngine) -> Journal:
        """Keeps nothing."""
        return NullJournal()

    def define(self, definition: Definition) -> None:
        """Nothing to keep."""

    def forget(self, number: int) -> None:
        """Nothing to keep."""

    async def rekey(self) -> Rekeying:
        """Nothing is stored, so nothing can be encrypted."""
        raise SecretsKeyRequired

    def rekeying(self) -> Rekeying:
        """Nothing to do."""
        return Rekeying("idle", 0, 0, encrypted=False)

    async def kept_charts(self) -> dict[str, bytes]:
        """Nothing is kept."""
        return {}

    async def keep_charts(self, charts: Mapping[str, bytes]) -> None:
        """Nothing is kept."""


def checked_rules(default: PoolRules, name: str, settings: Settings) -> PoolRules:
    """The rules of a pool with these settings, given those of `default`.

    Raises PoolFixed for settings of `default` that the server's flags decide, and BadRequest if two contradict each
    other.
    """
    if name == DEFAULT_POOL:
        if fixed := tuple(setting for setting in settings if setting not in NOT_FLAGS):
            raise PoolFixed(fixed)
        return default.of_default(settings)
    rules = default.of_pool(settings)
    if (contradiction := rules.contradiction()) is not None:
        raise BadRequest(contradiction)
    return rules


class _Entry:
    """A pool: its engine, and its definition as of now."""

    __slots__ = ("definition", "engine")

    def __init__(self, engine: EmbeddedEngine, definition: Definition) -> None:
        self.engine = engine
        self.definition = definition


class EmbeddedPools:
    """See the module, and the protocol Pools. For use on its loop's thread only.

    `default` and the engines of `others`, which a store has restored, have their journals and their timers. Pools that
    were being emptied go on. `last_number` is the largest number that any pool ever had. `default_settings` are those
    that `default` was given, which its engine goes by already.
    """

    def __init__(
        self,
        default: EmbeddedEngine,
        store: PoolStore | None = None,
        *,
        max_pools: int = MAX_POOLS,
        others: Iterable[tuple[Definition, EmbeddedEngine]] = (),
        last_number: int = 0,
        default_settings: Settings | None = None,
    ) -> None:
        self.default = default
        self._store = store or NullStore()
        self._max_pools = max_pools
        self._last_number = last_number
        self._pools: SortedDict[str, _Entry] = SortedDict()
        self._pools[DEFAULT_POOL] = _Entry(default, Definition(0, DEFAULT_POOL, default_settings or {}))
        self._drains = Drains(self._emptied)
        self._listeners: list[Callable[[], object]] = []
        for definition, engine in others:
            engine.handles = default.handles.of_pool(definition.number)
            self._pools[definition.name] = _Entry(engine, definition)
            self._last_number = max(self._last_number, definition.number)
            if definition.draining:
                engine.drain_pool()
                self._drains.begin(engine, definition.at_once, _RESTARTED)

    # -- looking

    def get(self, name: str) -> EmbeddedEngine:
        """The engine of the pool of this name. O(1). Raises UnknownPool."""
        entry: _Entry | None = self._pools.get(name)  # written out, as most calls come here
        if entry is None:
            raise UnknownPool
        return entry.engine

    def names(self) -> list[str]:
        """The names of all pools, in order. O(p)."""
        return list(self._pools)

    def row(self, name: str) -> PoolRow:
        """Counts and settings of a pool. O(1). Raises UnknownPool."""
        engine = self.get(name)
        pool = engine.pool
        return PoolRow(
            name,
            total=pool.total,
            available=pool.available,
            blocked=pool.blocked,
            cooling=pool.cooling,
            quarantined=pool.quarantined,
            waiting=engine.waiting,
            draining=engine.pool_draining,
            settings=engine.rules.settings(),
        )

    def on_change(self, callback: Callable[[], object]) -> None:
        """Call this after each change of the pools. O(1)."""
        self._listeners.append(callback)

    # -- changing

    async def put(self, name: str, settings: Settings, origin: Origin) -> bool:
        """Make a pool with these settings, or give it these; whether it is new. O(log p)."""
        rules = checked_rules(self.default.rules, name, settings)
        entry = self._pools.get(name)
        if entry is not None and name == DEFAULT_POOL and settings == entry.definition.settings:
            return False  # its definition is kept only once it was given settings
        self.default.journal.require()
        if entry is not None:
            if entry.engine.pool_draining:
                raise PoolDraining
            await self._define(entry, entry.definition._replace(settings=dict(settings)), rules)
            return False
        if len(self._pools) > self._max_pools:
            raise TooManyPools(self._max_pools)
        self._last_number += 1
        definition = Definition(self._last_number, name, dict(settings))
        engine = self.default.sibling(name, definition.number, rules)
        engine.journal = self._store.journal_of(definition.number, engine)
        self._pools[name] = entry = _Entry(engine, definition)
        await self._define(entry, definition, rules)
        return True

    async def change(self, name: str, settings: Settings, origin: Origin) -> None:
        """Change some settings of a pool. O(settings)."""
        entry = self._entry(name)
        merged = {**entry.definition.settings, **settings}
        rules = checked_rules(self.default.rules, name, merged)
        if name == DEFAULT_POOL and merged == entry.definition.settings:
            return
        self.default.journal.require()
        await self._define(entry, entry.definition._replace(settings=merged), rules)

    async def delete(self, name: str, *, drain: bool, now: bool, origin: Origin) -> bool:
        """Delete an empty pool, or drain one. Returns whether it is gone. O(1)."""
        if name == DEFAULT_POOL:
            raise PoolFixed
        self.default.journal.require()
        entry = self._entry(name)
        engine = entry.engine
        await engine.purge_expired()
        if self._pools.get(name) is not entry:
            raise UnknownPool  # it went meanwhile
        if not engine.pool.total:
            await _kept(self._forget(entry))
            return True
        if not drain:
            await _kept(engine.journal.commit_of_all())
            raise PoolNotEmpty(engine.pool.total)
        at_once = now or entry.definition.at_once
        try:
            engine.pool_draining = True
            await self._define(entry, entry.definition._replace(draining=True, at_once=at_once), engine.rules)
        finally:
            # Also if it can't be kept: the store tries again until it can.
            engine.drain_pool()
            self._drains.begin(engine, at_once, origin)
        return False

    async def _define(self, entry: _Entry, definition: Definition, rules: PoolRules) -> None:
        entry.definition = definition
        entry.engine.set_rules(rules)
        commit = self._store.define(definition)
        self._report()
        await _kept(commit)

    def _forget(self, entry: _Entry) -> Commit | None:
        """A pool is gone: calls that still refer to its engine get PoolDraining or UnknownKey."""
        del self._pools[entry.definition.name]
        entry.engine.drain_pool()
        entry.engine.timers.close()
        entry.engine.events.clear()  # an old engine is never collected (server/runtime.py), so its keys must go
        commit = self._store.forget(entry.definition.number)
        self._report()
        return commit

    def _emptied(self, engine: EmbeddedEngine) -> None:
        entry = self._pools.get(engine.pool_name)
        if entry is not None and entry.engine is engine:
            self._forget(entry)

    def _report(self) -> None:
        for callback in self._listeners:
            callback()

    # -- checks

    def _entry(self, name: str) -> _Entry:
        entry: _Entry | None = self._pools.get(name)
        if entry is None:
            raise UnknownPool
        return entry

    # -- the server

    async def held(self, client: Client) -> int:
        """How many leases a named token holds. O(1)."""
        return self.default.shares.held(client.name)

    async def rekey(self) -> Rekeying:
        """Begin to encrypt under the first secrets key what isn't yet. O(1)."""
        return await self._store.rekey()

    def rekeying(self) -> Rekeying:
        """How far that is. O(1)."""
        return self._store.rekeying()

    def keeps_charts(self, name: str) -> bool:
        """See Pools."""
        return self._store.keeps_charts

    async def kept_charts(self) -> dict[str, bytes]:
        """See Pools."""
        return await self._store.kept_charts()

    async def keep_charts(self, charts: Mapping[str, bytes], *, last: bool = False) -> None:
        """See Pools."""
        await self._store.keep_charts(charts)

    def drain(self) -> None:
        """Answer the waiters of all pools with Draining, and admit no more. O(p + waiters)."""
        for entry in self._pools.values():
            entry.engine.drain()

    async def close(self) -> None:
        """Stop the timers, and commit all changes of all pools. O(p). Raises StorageUnavailable."""
        self._drains.close()
        for entry in self._pools.values():
            entry.engine.timers.close()
        await self.default.close()


async def _kept(commit: asyncio.Future[None] | None) -> None:
    """Wait until a change is on disk. Raises StorageUnavailable."""
    if commit is not None:
        await commit
