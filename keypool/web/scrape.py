"""/metrics, and the sources of the metrics that the engine doesn't provide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from keypool.api.calls import VIEWER
from keypool.ops.histogram import Histogram
from keypool.ops.metrics import CONTENT_TYPE, exposition
from keypool.web.pages import PageHandler


def _zero() -> int:
    return 0


@dataclass
class MetricSources:
    """Functions and histograms that other parts of the server register for /metrics."""

    histograms: dict[str, Histogram] = field(default_factory=dict)
    viewers: Callable[[], int] = _zero
    connections: Callable[[], int] = _zero
    refused_connections: Callable[[], int] = _zero
    limits: dict[str, float] = field(default_factory=dict)
    log_dropped: Callable[[], int] = _zero


class Metrics(PageHandler):
    """/metrics, for viewers; 503 while the engine is loading."""

    name = "metrics"
    roles = VIEWER

    async def get(self, *args: str) -> None:
        sources: MetricSources = self.application.settings["metric_sources"]
        engine = self.engine
        stats = await engine.stats()
        numbers: dict[str, float | Mapping[str, float]] = {
            "keypool_viewers": sources.viewers(),
            "keypool_connections": sources.connections(),
            "keypool_connections_refused_total": sources.refused_connections(),
            "keypool_log_dropped_total": sources.log_dropped(),
            "keypool_storage_up": int(engine.storage_up()),
            "keypool_oldest_wait_seconds": engine.oldest_wait(),
            "keypool_limit": sources.limits,
            "keypool_outcomes_total": self.dispatcher.reports.outcomes,
            "keypool_guarded_total": self.dispatcher.reports.guarded,
            "keypool_auth_failures_total": self.dispatcher.wrong_tokens.counts,
            "keypool_clock_steps_total": engine.clock_steps,
            **engine.measures(),
        }
        page = exposition(stats, self.dispatcher.calls, engine.histograms() | sources.histograms, numbers)
        self._answer(page, CONTENT_TYPE)
