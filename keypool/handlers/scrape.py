"""/metrics: what Prometheus asks for. Its text is made by metrics.py; here is who may have it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from keypool.auth import Role
from keypool.errors import KeypoolError
from keypool.handlers.pages import PageHandler
from keypool.metrics import CONTENT_TYPE, exposition
from keypool.tally import Tally


def _none() -> int:
    return 0


@dataclass
class Scraped:
    """What is shown beside what the engine tells: filled by whoever counts it."""

    tallies: dict[str, Tally] = field(default_factory=dict)
    viewers: Callable[[], int] = _none
    connections: Callable[[], int] = _none
    refused_connections: Callable[[], int] = _none


class Metrics(PageHandler):
    """/metrics, for viewers."""

    name = "metrics"
    roles = frozenset({Role.VIEWER, Role.ADMIN})

    async def get(self, *args: str) -> None:
        """The text; 503 while there is no engine yet."""
        scraped: Scraped = self.application.settings["scraped"]
        engine = self.engine
        try:
            stats = await engine.stats()
        except KeypoolError as error:
            self.refuse(error)
            return
        numbers = {
            "keypool_viewers": scraped.viewers(),
            "keypool_connections": scraped.connections(),
            "keypool_connections_refused_total": scraped.refused_connections(),
            "keypool_storage_up": int(engine.storage_up()),
            "keypool_clock_steps_total": engine.clock_steps,
        }
        tallies = engine.tallies() | scraped.tallies
        self._answer(exposition(stats, self.dispatcher.calls, tallies, numbers), CONTENT_TYPE)
