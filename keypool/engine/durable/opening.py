"""Opens the pools of the embedded engine on their data file: lock, inspect, read, start the writer, set timers.

No call is served before all of this is done. It is done in slices, so that the loop can answer /healthz and /readyz.
"""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from keypool.core.errors import StartError
from keypool.core.handles import Handles
from keypool.core.keys import State
from keypool.core.pace import Pace
from keypool.core.rules import (
    DEFAULT_POOL,
    DEFAULT_RULES,
    NOT_FLAGS,
    SETTINGS,
    PoolRules,
    Settings,
    is_pool_name,
)
from keypool.engine.clock import make_clock
from keypool.engine.durable import charts_file, datafile, file_lock
from keypool.engine.durable.checks import new_checks, sealer_of
from keypool.engine.durable.datafile import Facts
from keypool.engine.durable.journal import FileJournal
from keypool.engine.durable.rekey import Rekey
from keypool.engine.durable.rows import event_of
from keypool.engine.durable.store import FileStore
from keypool.engine.embedded import EmbeddedEngine
from keypool.engine.pools import MAX_POOLS, Definition, EmbeddedPools
from keypool.engine.sealing import Sealer, WrongSecretsKey

_SLICE = 2000  # keys read, or checked, in one turn of the loop
_log = logging.getLogger("keypool.journal")


async def open_durable(
    path: Path,
    rules: PoolRules = DEFAULT_RULES,
    *,
    secrets_keys: Sequence[bytes] = (),
    max_pools: int = MAX_POOLS,
) -> EmbeddedPools:
    """The pools of a data file, which is created if it doesn't exist. O(n). Raises StartError.

    `rules` are those of `default`. With a `restart_grace`, all keys of the file live until at least that many seconds
    after the start. With `secrets_keys` of 32 bytes, rows are sealed under the first one as they change.
    """
    started = time.monotonic()
    loop = asyncio.get_running_loop()
    lock = await loop.run_in_executor(None, file_lock.hold, path)
    try:
        facts = await loop.run_in_executor(None, datafile.inspect, path)
        sealer = sealer_of(path, facts, secrets_keys)
    except BaseException:
        file_lock.release(lock)
        raise
    opening = _Opening(path, rules, facts, sealer, FileJournal(path, lock, sealer))
    try:
        pools = await opening.pools(max_pools)
    except (ValueError, KeyError, WrongSecretsKey) as error:
        await opening.journal.abandon()
        raise StartError(f"the data file {path} contradicts itself: {error}") from None
    except BaseException:
        await opening.journal.abandon()
        raise
    total = sum(engine.pool.total for engine in opening.engines.values())
    absolute = path.absolute()  # noqa: ASYNC240 - reads the working directory's name only
    _log.info("%d keys restored from %s in %.1f s", total, absolute, time.monotonic() - started)
    return pools


class _Opening:
    """The steps between the look at a file that is held, and its pools, which are served."""

    def __init__(
        self, path: Path, rules: PoolRules, facts: Facts, sealer: Sealer | None, journal: FileJournal
    ) -> None:
        self.journal = journal
        self.engines: dict[int, EmbeddedEngine] = {}
        self._path = path
        self._rules = rules
        self._facts = facts
        self._sealer = sealer
        self._behind: array[int] | None = None if sealer is None else array("q")
        self._clock = make_clock(not_before=facts.numbers.get("moment", 0) / 1000)

    async def pools(self, max_pools: int) -> EmbeddedPools:
        """Read and check everything, and then begin to write. Raises StartError, ValueError, WrongSecretsKey."""
        grace_until = self._clock() + self._rules.restart_grace if self._rules.restart_grace else None
        definitions = {definition.number: definition for definition in self._definitions()}
        given = definitions.pop(0).settings if 0 in definitions else {}
        rules = self._rules_of(DEFAULT_POOL, given)
        default = self.engines[0] = EmbeddedEngine(rules, clock=self._clock, start_timers=False)
        others = []
        for definition in definitions.values():
            number, name = definition.number, definition.name
            rules = self._rules_of(name, definition.settings)
            engine = self.engines[number] = default.sibling(name, number, rules, start_timers=False)
            others.append((definition, engine))
        for number, engine in self.engines.items():
            engine.restore_numbers(self._facts.numbers_of(number))
        await _restore_keys(self.engines, self._path, grace_until or 0.0, self._sealer, self._behind)
        for number, engine in self.engines.items():
            engine.restore_events([event_of(row) for row in self._facts.events.get(number, ())])
        # After the check: a file that is refused is left as it was, and of its older version.
        await self.journal.open()
        secret = datafile.secret_of(self._path)
        assert secret is not None  # the file is of this version now
        default.handles = Handles(secret)
        await self.journal.start(
            grace_until, {} if self._sealer is None else new_checks(self._facts, self._sealer)
        )
        rekey = None
        if self._sealer is not None and self._behind is not None:
            rekey = Rekey(self.journal, self._sealer.current.hex(), self._behind)
        last = self.journal.last_pool = self._facts.numbers.get(datafile.LAST_POOL, 0)
        store = FileStore(self.journal, rekey, charts_file.beside(self._path))
        for number, engine in self.engines.items():
            engine.journal = journal = store.journal_of(number, engine)
            journal.history.restore(self._facts.numbers_of(number))
            journal.history.limit(engine.rules.history_leases)
            await _process_due(engine)
            engine.start()
        if rekey is not None and self._facts.numbers.get(datafile.REKEYING):
            rekey.go_on()
        return EmbeddedPools(
            default, store, max_pools=max_pools, others=others, last_number=last, default_settings=given
        )

    def _definitions(self) -> Iterator[Definition]:
        """The pools beside `default`, and that one if it was given settings. Raises ValueError."""
        names: set[str] = set()
        for number, stored in self._facts.pools.items():
            name = stored.name
            if (
                number < 0
                or (number == 0) is not (name == DEFAULT_POOL)
                or name is None
                or not is_pool_name(name)
                or name in names
            ):
                raise ValueError(
                    f"the pool number {number} has a number or a name that can't be, or is there twice"
                )
            names.add(name)
            yield Definition(number, name, stored.settings, stored.draining, stored.at_once)

    def _rules_of(self, name: str, settings: Settings) -> PoolRules:
        default = name == DEFAULT_POOL
        _check_settings(name, settings, NOT_FLAGS if default else SETTINGS)
        rules = self._rules.of_default(settings) if default else self._rules.of_pool(settings)
        if (contradiction := rules.contradiction()) is not None:
            raise ValueError(f"the settings of the pool {name} contradict each other: {contradiction}")
        return rules


def _check_settings(name: str, settings: Settings, known: Sequence[str]) -> None:
    """Raise ValueError unless a pool can have been given these settings."""
    if wrong := settings.keys() - set(known):
        raise ValueError(f"the pool {name} has the unknown setting {min(wrong)}")
    for setting, value in settings.items():
        if value is not None and isinstance(value, Pace) != (setting == "pace"):
            raise ValueError(f"the setting {setting} of the pool {name} is of another type")


async def _restore_keys(
    engines: Mapping[int, EmbeddedEngine],
    path: Path,
    grace_until: float = 0.0,
    sealer: Sealer | None = None,
    behind: array[int] | None = None,
) -> None:
    """Read all keys into their pools, and check these. Timers are set later, so nothing changes meanwhile."""
    for number, keys in datafile.read_keys(path, _SLICE, sealer, behind):
        engine = engines.get(number)
        if engine is None:
            raise ValueError(f"{keys[0]!r} is of the pool number {number}, which isn't defined")
        load = engine.pool.load
        for key in keys:
            if key.expires_deadline < grace_until:  # noqa: PLR1730 - max() costs four times as much
                key.expires_deadline = grace_until
            if key.release_deadline and not key.acquired_at and key.state is State.BLOCKED:
                # Acquired under a version that didn't keep the moment, and had no other length of a block.
                key.acquired_at = key.release_deadline - engine.pool.rules.block_seconds
            load(key)
        await asyncio.sleep(0)
    for engine in engines.values():
        for _ in engine.pool.check_loaded_in_slices(_SLICE):
            await asyncio.sleep(0)


async def _process_due(engine: EmbeddedEngine) -> None:
    """Purge and release keys whose deadlines passed while no server ran."""
    now = engine.now()
    while engine.pool.overdue(now) or engine.pool.next_release(now) == 0:
        engine.pool.process_due(now)
        await asyncio.sleep(0)
