"""The metrics for Prometheus, made at each scrape.

Counters and gauges are read from the engine then, so they can't drift from it. Every state has a sample, even
at zero. No label holds a key, an owner or a path. The table in the docs is made from `METRICS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from keypool import __version__
from keypool.core.answers import Stats
from keypool.core.counters import COUNTERS
from keypool.core.keys import State
from keypool.core.outcomes import Outcome
from keypool.ops.histogram import CallMetrics, Histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One metric by its full name. `source` names the field of Stats or the histogram that holds its value, if any."""

    name: str
    kind: str
    about: str
    labels: str = ""  # `NAME; NAME: values`
    source: str = ""

    @property
    def label_names(self) -> list[str]:
        """The names in `labels`, in order."""
        return [label.partition(":")[0].strip() for label in self.labels.split(";") if label]


def _gauge(name: str, about: str, labels: str = "", *, source: str = "") -> MetricRow:
    return MetricRow(f"keypool_{name}", "gauge", about, labels, source)


def _counter(name: str, about: str, labels: str = "") -> MetricRow:
    return MetricRow(f"keypool_{name}_total", "counter", about, labels)


def _histogram(name: str, about: str, labels: str = "") -> MetricRow:
    return MetricRow(f"keypool_{name}", "histogram", about, labels, source=name)


METRICS = (
    _gauge("keys", "keys", f"pool; state: {', '.join(State)}"),
    _gauge("secrets", "secrets: the seats of one count as one", "pool"),
    _gauge("waiting", "acquires waiting for a key", "pool", source="waiting"),
    _gauge("pool_max_keys", "keys that a pool may hold", "pool"),
    _gauge("history_leases", "leases that have ended and are kept", "pool"),
    _gauge("oldest_wait_seconds", "how long the first acquire in this server's queue has waited", "pool"),
    _gauge("limit", "configured limits", "limit: max_keys, max_pools, max_waiters, max_viewers, connections"),
    _gauge("viewers", "open websockets of the feed"),
    _gauge("connections", "open connections, the feed's included"),
    _counter("connections_refused", "connections rejected because a limit was reached"),
    _gauge("storage_up", "1 while the data file can be written, else 0"),
    _gauge(
        "storage_failing_seconds", "how long the data file has been unwritable; 0 while it can be written"
    ),
    _gauge("commit_age_seconds", "age of the commit in flight; 0 if there is none"),
    _counter("writer_restarts", "writer processes restarted because one died"),
    _gauge("data_file_bytes", "size of the data file and of its write-ahead log", "file: data, log"),
    _gauge("disk_free_bytes", "free space on the data file's disk, at the writer's last look"),
    _counter("log_dropped", "log lines dropped because standard error was not read"),
    _counter("clock_steps", "steps of Valkey's clock by more than 5 s"),
    _gauge("uptime_seconds", "time since this server started", source="uptime"),
    _gauge("build_info", "always 1", "version; engine"),
    _counter("calls", "calls answered", "operation; outcome: ok or an error's code"),
    _counter("outcomes", "reports of holders", f"outcome: {', '.join(Outcome)}"),
    _counter("guarded", "reports that the guard kept from a quarantine"),
    _counter("auth_failures", "wrong tokens", "kind: token, sign_in"),
    _histogram(
        "call_seconds",
        "from a call's head to its answer, without the time in the queue for a key",
        "operation",
    ),
    *(
        MetricRow(f"keypool_{name}_total", "counter", f"{about}, since the pool began", "pool", name)
        for name, about in COUNTERS.items()
    ),
    _histogram("acquire_wait_seconds", "time in the queue of the acquires that had to wait, in all pools"),
    _histogram("release_lateness_seconds", "how long after their deadline keys were released, in all pools"),
    _histogram("expiry_lateness_seconds", "how long after their deadline keys were purged, in all pools"),
    _histogram("commit_seconds", "time to commit a batch to disk"),
    _histogram("commit_rows", "keys per committed batch"),
    _histogram("pipeline_seconds", "time from sending a pipeline to Valkey to its last reply"),
    _histogram("pipeline_commands", "commands per pipeline to Valkey"),
    _histogram("loop_stall_seconds", "how late the event loop ran a timer"),
    MetricRow("process_resident_memory_bytes", "gauge", "memory of the server process, without the writer"),
    MetricRow("process_virtual_memory_bytes", "gauge", "address space of the server process"),
    MetricRow("process_cpu_seconds_total", "counter", "processor time of the server process"),
    MetricRow("process_open_fds", "gauge", "open files, connections included"),
    MetricRow("process_max_fds", "gauge", "limit of open files"),
    MetricRow("process_start_time_seconds", "gauge", "Unix time at which the process started"),
)
"""Every metric, in the order of the docs. Those of the process exist on Linux only."""


Numbers = Mapping[str, float | Mapping[str, float]]
"""Values by the full name of their metric; for a metric with a label, by the label's value."""

Samples = Mapping[Any, float | Histogram]
"""The values of one metric, by the values of its labels, a tuple."""


def exposition(
    server: Stats,
    pools: Mapping[str, Stats],
    calls: CallMetrics,
    histograms: Mapping[str, Histogram],
    numbers: Numbers,
) -> bytes:
    """All metrics in Prometheus's text format. O(pools), whatever the number of keys; 2 ms, and 0.1 for each pool.

    `server` are the stats of any pool, `pools` those that are shown, by name, `numbers` the metrics that are neither in
    these nor in `histograms`.
    """
    samples: dict[str, Samples] = {}
    for each in METRICS:
        if each.source in histograms:
            samples[each.name] = {(): histograms[each.source]}
        elif each.labels == "pool" and each.source:
            samples[each.name] = {(pool,): getattr(stats, each.source) for pool, stats in pools.items()}
        elif hasattr(server, each.source):
            samples[each.name] = {(): getattr(server, each.source)}
    for name, value in numbers.items():
        samples[name] = (
            {(label,): number for label, number in value.items()}
            if isinstance(value, Mapping)
            else {(): value}
        )
    samples |= {
        "keypool_keys": {
            (pool, state.value): getattr(stats, state) for pool, stats in pools.items() for state in State
        },
        "keypool_build_info": {(__version__, server.engine): 1},
        "keypool_calls_total": dict(calls.outcomes),
        "keypool_call_seconds": {(operation,): each for operation, each in calls.seconds.items()},
    }
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(samples))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


class _Snapshot(Collector):
    def __init__(self, samples: Mapping[str, Samples]) -> None:
        self._samples = samples

    def collect(self) -> Iterator[Metric]:
        families = {
            "counter": CounterMetricFamily,
            "gauge": GaugeMetricFamily,
            "histogram": HistogramMetricFamily,
        }
        for each in METRICS:
            if each.name in self._samples:
                family = families[each.kind](each.name, each.about, labels=each.label_names)
                for labels, value in self._samples[each.name].items():
                    if isinstance(value, Histogram):
                        family.add_metric(labels, value.cumulative(), value.sum)
                    else:
                        family.add_metric(labels, value)
                yield family
