"""Opens the embedded engine on its data file: lock, inspect, start the writer, read, process due keys, set timers.

No call is served before all of this is done. It is done in slices, so that the loop can answer /healthz and /readyz.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from keypool.core.errors import StartError
from keypool.core.handles import Handles
from keypool.core.keys import State
from keypool.core.rules import DEFAULT_RULES, PoolRules
from keypool.engine.clock import make_clock
from keypool.engine.durable import datafile, file_lock
from keypool.engine.durable.journal import FileJournal
from keypool.engine.embedded import EmbeddedEngine

_SLICE = 2000  # keys read, or checked, in one turn of the loop
_log = logging.getLogger("keypool.journal")


async def open_durable(path: Path, rules: PoolRules = DEFAULT_RULES) -> EmbeddedEngine:
    """The engine over a data file, which is created if it doesn't exist. O(n). Raises StartError.

    With a `restart_grace`, all keys of the file live until at least that many seconds after the start.
    """
    started = time.monotonic()
    loop = asyncio.get_running_loop()
    lock = await loop.run_in_executor(None, file_lock.hold, path)
    try:
        numbers = await loop.run_in_executor(None, datafile.inspect, path)
    except BaseException:
        file_lock.release(lock)
        raise
    clock = make_clock(not_before=numbers.get("moment", 0) / 1000)
    engine = EmbeddedEngine(rules, clock=clock, start_timers=False)
    journal = FileJournal(path, lock, engine)
    try:
        grace_until = clock() + rules.restart_grace if rules.restart_grace else None
        engine.restore_numbers(numbers)
        await _restore_keys(engine, path, grace_until or 0.0)
        # After the check: a file that is refused is left as it was, and of its older version.
        await journal.open()
        secret = datafile.secret_of(path)
        assert secret is not None  # the file is of this version now
        engine.handles = Handles(secret)
        await journal.start(grace_until)
    except (ValueError, KeyError) as error:
        await journal.abandon()
        raise StartError(f"the data file {path} contradicts itself: {error}") from None
    except BaseException:
        await journal.abandon()
        raise
    engine.journal = journal
    await _process_due(engine)
    engine.start()
    absolute = path.absolute()  # noqa: ASYNC240 - reads the working directory's name only
    seconds = time.monotonic() - started
    _log.info("%d keys restored from %s in %.1f s", engine.pool.total, absolute, seconds)
    return engine


async def _restore_keys(engine: EmbeddedEngine, path: Path, grace_until: float) -> None:
    """Read all keys into the pool, and check it. Timers are set later, so the pool doesn't change meanwhile."""
    for some in datafile.read_keys(path, _SLICE):
        for key in some:
            key.expires_deadline = max(key.expires_deadline, grace_until)
            if key.release_deadline and not key.acquired_at and key.state is State.BLOCKED:
                # Acquired under a version that didn't keep the moment, and had no other length of a block.
                key.acquired_at = key.release_deadline - engine.pool.rules.block_seconds
            engine.pool.load(key)
        await asyncio.sleep(0)
    for _ in engine.pool.check_in_slices(_SLICE):
        await asyncio.sleep(0)


async def _process_due(engine: EmbeddedEngine) -> None:
    """Purge and release keys whose deadlines passed while no server ran."""
    now = engine.now()
    while engine.pool.overdue(now) or engine.pool.next_release(now) == 0:
        engine.pool.process_due(now)
        await asyncio.sleep(0)
