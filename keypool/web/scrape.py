"""/metrics, and the sources of the metrics that the engine doesn't provide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from keypool.api.calls import VIEWER
from keypool.core.rules import DEFAULT_POOL
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
        """A token that is for some pools gets their metrics only, and those of the server."""
        sources: MetricSources = self.application.settings["metric_sources"]
        engine = self.engine
        pools = {name: self.pools.get(name) for name in self.pools.names() if self.caller.may_use(name)}
        stats = {name: await each.stats() for name, each in pools.items()}
        server = stats.get(DEFAULT_POOL) or await engine.stats()  # a token may be for other pools only
        numbers: dict[str, float | Mapping[str, float]] = {
            "keypool_viewers": sources.viewers(),
            "keypool_connections": sources.connections(),
            "keypool_connections_refused_total": sources.refused_connections(),
            "keypool_log_dropped_total": sources.log_dropped(),
            "keypool_storage_up": int(engine.storage_up()),
            "keypool_pool_max_keys": {name: each.rules.max_keys for name, each in pools.items()},
            "keypool_history_leases": {name: each.history_kept for name, each in pools.items()},
            "keypool_secrets": {name: each.secrets() for name, each in pools.items()},
            "keypool_oldest_wait_seconds": {name: each.oldest_wait() for name, each in pools.items()},
            "keypool_limit": sources.limits,
            "keypool_outcomes_total": self.dispatcher.reports.outcomes,
            "keypool_guarded_total": self.dispatcher.reports.guarded,
            "keypool_auth_failures_total": self.dispatcher.wrong_tokens.counts,
            "keypool_clock_steps_total": engine.clock_steps,
            **engine.measures(),
        }
        histograms = engine.histograms() | _merged([each.histograms() for each in pools.values()])
        page = exposition(server, stats, self.dispatcher.calls, histograms | sources.histograms, numbers)
        self._answer(page, CONTENT_TYPE)


_OF_POOLS = ("acquire_wait_seconds", "release_lateness_seconds", "expiry_lateness_seconds")


def _merged(histograms: Sequence[Mapping[str, Histogram]]) -> dict[str, Histogram]:
    """The histograms that each pool has of its own, over all pools: one for each pool would be thousands of series."""
    merged: dict[str, Histogram] = {}
    for name in _OF_POOLS:
        for each in histograms:
            if name in each:
                merged.setdefault(name, Histogram(each[name].bounds)).include(each[name])
    return merged
