"""/metrics: what Prometheus asks for. Its text is made by metrics.py; here is who may have it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from keypool.api.auth import Role
from keypool.core.errors import KeypoolError
from keypool.ops.histogram import Histogram
from keypool.ops.metrics import CONTENT_TYPE, exposition
from keypool.web.loop_lag import engine_measures
from keypool.web.pages import PageHandler


def _none() -> int:
    return 0


@dataclass
class MetricSources:
    """What is shown beside what the engine tells: filled by whoever counts it."""

    histograms: dict[str, Histogram] = field(default_factory=dict)
    viewers: Callable[[], int] = _none
    connections: Callable[[], int] = _none
    refused_connections: Callable[[], int] = _none
    limits: dict[str, float] = field(default_factory=dict)
    log_dropped: Callable[[], int] = _none


class Metrics(PageHandler):
    """/metrics, for viewers."""

    name = "metrics"
    roles = frozenset({Role.VIEWER, Role.ADMIN})

    async def get(self, *args: str) -> None:
        """The text; 503 while there is no engine yet."""
        scraped: MetricSources = self.application.settings["metric_sources"]
        engine = self.engine
        try:
            stats = await engine.stats()
        except KeypoolError as error:
            self.refuse(error)
            return
        numbers: dict[str, float | Mapping[str, float]] = {
            "keypool_viewers": scraped.viewers(),
            "keypool_connections": scraped.connections(),
            "keypool_connections_refused_total": scraped.refused_connections(),
            "keypool_log_dropped_total": scraped.log_dropped(),
            "keypool_storage_up": int(engine.storage_up()),
            "keypool_oldest_wait_seconds": engine.oldest_wait(),
            "keypool_limit": scraped.limits,
            "keypool_auth_failures_total": self.dispatcher.wrong_tokens.counts,
            **engine_measures(engine),
            "keypool_clock_steps_total": engine.clock_steps,
        }
        histograms = engine.histograms() | scraped.histograms
        page = exposition(stats, self.dispatcher.calls, histograms, numbers)
        self._answer(page, CONTENT_TYPE)
