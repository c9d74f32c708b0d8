"""Which servers serve a pool, and whether the pool that they opened is still there: a heartbeat a second from each.

    join -> heartbeats -> leave            a clean stop
                      `--> (5 s of silence) a server that was killed, or can't reach Valkey

All three are one script on the pool as a whole (lua/presence.lua). If a heartbeat finds no pool, or one with another
moment of creation, Valkey was emptied or replaced, and every call of this server fails from then on: a new pool would
repeat the lease numbers that clients hold. A heartbeat also compares Valkey's
clock, which deadlines go by, with this server's monotonic one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Mapping

from keypool.core.errors import StartError
from keypool.engine.valkey.link import UNREACHABLE, Reply, Word
from keypool.engine.valkey.nodes import Nodes
from keypool.engine.valkey.scripts import text_of

AWAY_SECONDS = 5.0
"""Seconds without a heartbeat after which a server counts as gone."""
STEP_SECONDS = 5.0
"""Seconds by which Valkey's clock and this server's must differ between two heartbeats to count as a step."""

_HEARTBEAT_SECONDS = 1.0
_RETRY_SECONDS = 0.1  # between checks whether other servers send heartbeats
_log = logging.getLogger("keypool.valkey")


class Presence:
    """See the module. `settings` are those that all servers of a pool must share, as values of flags."""

    def __init__(self, nodes: Nodes, pool: str, born: int, settings: Mapping[str, str]) -> None:
        self.server = os.urandom(8).hex()
        """This server's name in Valkey."""
        self.clock_steps = 0
        """Steps of Valkey's clock so far."""
        self._nodes = nodes
        self._pool = pool
        self._born = str(born)
        self._settings = settings
        self._keys = (f"{{{pool}}}:pool", f"{{{pool}}}:servers")
        self.on_version: Callable[[int], None] = lambda version: None
        """Called after each heartbeat with the version of the pools beside `default` (registry.py)."""
        self._loop = asyncio.get_running_loop()
        self._clocks: tuple[int, float] | None = None
        self._heartbeats: asyncio.Task[None] | None = None

    async def join(self, wait_for_dead: bool) -> bool:
        """Start sending heartbeats. Returns whether other servers serve the pool. With `wait_for_dead`, waits up to 5 s
        to tell a server that was killed just now, which doesn't count, from a running one.

        Raises StartError if other servers have other settings, and OSError, ReplyError or ConnectionLost.
        """
        words = [word for pair in self._settings.items() for word in pair]
        first = None
        while True:
            others, latest, name, value = await self.heartbeat(*words)
            if self._nodes.gone is not None:
                raise StartError(self._nodes.gone)
            first = latest if first is None else first
            live = latest > first  # another server has sent a heartbeat just now
            if name and live:
                name = name.decode()
                raise StartError(
                    f"the pool {self._pool} is being served with {name}={value.decode()}, and this server has "
                    f"{self._settings[name]}: all servers of a pool share this setting; to change it, stop them "
                    "all, then start them"
                )
            if not name:
                self._heartbeats = self._heartbeats or self._loop.create_task(self._send_heartbeats())
                if not others or live or not wait_for_dead:
                    return bool(others)
            await asyncio.sleep(_RETRY_SECONDS)

    async def leave(self) -> None:
        """Stop sending heartbeats, and remove this server from the pool's list."""
        if self._heartbeats is not None:
            self._heartbeats.cancel()
            await asyncio.wait([self._heartbeats])
            if self._nodes.failing is None:
                with contextlib.suppress(*UNREACHABLE):
                    await self._nodes.execute(self._keys[1], "ZREM", self._keys[1], self.server)

    async def _send_heartbeats(self) -> None:
        while self._nodes.gone is None:
            try:
                await self.heartbeat()
            except UNREACHABLE as error:
                _log.debug("no heartbeat: %s", error)  # Nodes logs what is wrong
            await asyncio.sleep(_HEARTBEAT_SECONDS)

    async def heartbeat(self, *settings: str) -> Reply:
        """Call presence.lua. Returns its reply about other servers. Calls Nodes.lose_pool unless the pool is there.
        Raises OSError, ReplyError or ConnectionLost.
        """
        away = round(AWAY_SECONDS * 1e6)
        words: list[Word] = [
            "EVAL",
            text_of("presence"),
            2,
            *self._keys,
            self.server,
            self._born,
            away,
            *settings,
        ]
        now, born, version, *rest = await self._nodes.execute(self._keys[0], *words)
        self._compare_clocks(now)
        self.on_version(version)
        if not born:
            self._nodes.lose_pool(f"the pool {self._pool} isn't in Valkey any more: it was emptied")
        elif born.decode() != self._born:
            self._nodes.lose_pool(
                f"another pool {self._pool} is in Valkey now than the one that this server opened"
            )
        return rest

    def _compare_clocks(self, microseconds: int) -> None:
        before, self._clocks = self._clocks, (microseconds, self._loop.time())
        if before is None:
            return
        step = (microseconds - before[0]) / 1e6 - (self._clocks[1] - before[1])
        if abs(step) > STEP_SECONDS:
            self.clock_steps += 1
            _log.warning("Valkey's clock was set by %+.1f s: docs/scaling.md says what that does", step)
