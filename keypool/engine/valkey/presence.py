"""Which servers serve a pool, and whether the pool that they opened is still there: a beat a second from each.

    enter -> beats -> leave            a clean stop
                 `--> (5 s of silence) a server that was killed, or can't reach Valkey

All of it is one script about the pool as a whole (lua/presence.lua). A beat that finds no pool, or one with another
moment of birth, makes every call of this server fail from then on: Valkey was emptied or replaced, and a pool that
began beside the one that clients know would give its lease numbers again. A beat also compares Valkey's clock, which
deadlines go by, with this server's monotonic one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Mapping

from keypool.core.errors import StartError
from keypool.engine.valkey.link import Lost, Reply, ReplyError
from keypool.engine.valkey.nodes import Nodes
from keypool.engine.valkey.scripts import presence_text

AWAY_SECONDS = 5.0
"""Without a beat for so long a server is gone."""
STEP_SECONDS = 5.0
"""By how much more the clock of Valkey must have moved than time has passed, between two beats, to be a step."""

_BEAT_SECONDS = 1.0
_ASK_AGAIN = 0.1  # seconds between two looks at whether the others beat
_log = logging.getLogger("keypool.valkey")


class Presence:
    """See the module. `settings` are those that servers of a pool must share, as they are spelled as flags."""

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
        self._loop = asyncio.get_running_loop()
        self._clocks: tuple[int, float] | None = None
        self._beats: asyncio.Task[None] | None = None

    async def enter(self, sure: bool) -> bool:
        """Begin to serve; whether other servers do. If `sure`, one that was killed just now isn't taken for one:
        that takes up to 5 s, until it has been silent for long enough.

        Raises StartError if other servers have other settings, and OSError, ReplyError or Lost.
        """
        words = [word for pair in self._settings.items() for word in pair]
        first = None
        while True:
            others, latest, name, value = await self._call(*words)
            if self._nodes.gone is not None:
                raise StartError(self._nodes.gone)
            first = latest if first is None else first
            live = latest > first  # it said so just now
            if name and live:
                raise StartError(_differs(self._pool, name.decode(), value.decode(), self._settings))
            if not name and (not others or live or not sure):
                self._beats = self._beats or self._loop.create_task(self._beat())
                return bool(others)
            if not name:
                self._beats = self._beats or self._loop.create_task(self._beat())
            await asyncio.sleep(_ASK_AGAIN)

    async def check(self) -> None:
        """See that the pool is still there; else Nodes.lose is called. Raises OSError, ReplyError or Lost."""
        await self._call()

    async def leave(self) -> None:
        """Stop, and have it known."""
        if self._beats is not None:
            self._beats.cancel()
            await asyncio.wait([self._beats])
            if self._nodes.failing is None:
                with contextlib.suppress(OSError, ReplyError, Lost):
                    await self._nodes.ask(self._keys[1], "ZREM", self._keys[1], self.server)

    async def _beat(self) -> None:
        while self._nodes.gone is None:
            try:
                await self._call()
            except (OSError, ReplyError, Lost) as error:
                _log.debug("no beat: %s", error)  # Nodes says what is wrong
            await asyncio.sleep(_BEAT_SECONDS)

    async def _call(self, *settings: str) -> Reply:
        away = round(AWAY_SECONDS * 1e6)
        now, born, *rest = await self._nodes.ask(
            self._keys[0], "EVAL", presence_text(), 2, *self._keys, self.server, self._born, away, *settings
        )
        self._compare_clocks(now)
        if not born:
            self._nodes.lose(f"the pool {self._pool} isn't in Valkey any more: it was emptied")
        elif born.decode() != self._born:
            self._nodes.lose(
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


def _differs(pool: str, name: str, value: str, settings: Mapping[str, str]) -> str:
    return (
        f"the pool {pool} is being served with {name}={value}, and this server has {settings[name]}: all servers "
        "of a pool share it; to change it, stop all and start them anew"
    )
