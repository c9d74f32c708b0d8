"""What the dashboard keeps of one pool: the data of its charts, its feed, and how many keys expire soon.

A view is made when somebody first looks at its pool, which is when its charts begin, and lives as long as the pool: the
charts of a hundred pools at which nobody looks cost nothing. The pool `default` has one from the start.
"""

from __future__ import annotations

import time

from keypool.engine import Engine
from keypool.web.feed import Feed, ViewerLimit
from keypool.web.history import History

EXPIRING = 60
"""Keys that expire within so many seconds are counted."""


class PoolView:
    """See the module. Needs a running loop."""

    def __init__(self, engine: Engine, limit: ViewerLimit) -> None:
        self.engine = engine
        self.history = History()
        self.feed = Feed(engine, self.history, limit, time.time)
        self.expiring = 0

    async def sample(self) -> None:
        """Take the sample of a second. Raises KeypoolError if the engine can't be asked."""
        self.history.add(time.time(), await self.engine.stats())
        self.expiring = await self.engine.expiring(EXPIRING)
