"""What the dashboard keeps of one pool: the data of its charts, its feed, and what happened in it lately.

A view is made when somebody first looks at its pool, which is when its charts begin, and lives as long as the pool: the
charts of a hundred pools at which nobody looks cost nothing. The pool `default` has one from the start, and so has each
pool whose charts were kept (kept_charts.py).
"""

from __future__ import annotations

import time

from keypool.core.answers import Stats
from keypool.engine import Engine
from keypool.web.feed import Feed, ViewerLimit
from keypool.web.health import expiry_window
from keypool.web.history import History
from keypool.web.latency import LATELY, Latency

RECENT = ("refused", "released", "unblocked", "expired")
"""The counters of which the dashboard shows what was counted in the last LATELY seconds."""


class PoolView:
    """See the module. Needs a running loop."""

    def __init__(self, engine: Engine, limit: ViewerLimit) -> None:
        self.engine = engine
        self.history = History()
        self.feed = Feed(engine, self.history, limit, time.time)
        self.waits = Latency(lambda: [self.engine.histograms()["acquire_wait_seconds"]])
        self.stats: Stats | None = None
        """As of the latest sample, None before the first."""
        self.recent = dict.fromkeys(RECENT, 0)
        self.window = expiry_window(engine.rules)
        self.expiring = 0
        """How many keys expire within `window` seconds."""

    async def sample(self) -> None:
        """Take the sample of a second. Raises KeypoolError if the engine can't be asked."""
        self.stats = await self.engine.stats()
        self.history.add(time.time(), self.stats)
        self.recent = {name: self.history.within(LATELY, name) for name in RECENT}
        self.window = expiry_window(self.engine.rules)
        self.expiring = await self.engine.expiring(self.window)
        self.waits.sample()
