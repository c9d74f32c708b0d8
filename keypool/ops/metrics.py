"""The metrics for Prometheus, made at each scrape.

Counters and gauges are read from the engine then, so they can't drift from it; every state has its sample, also at
zero. No label holds a key, an owner or a path. The table in the docs is made from `METRICS`.
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
from keypool.ops.histogram import CallMetrics, Histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Described:
    """One metric by its full name. `source` is a field of Stats or the name of a histogram, if it has its value."""

    name: str
    kind: str
    about: str
    labels: str = ""  # `NAME; NAME: values`
    source: str = ""

    @property
    def label_names(self) -> list[str]:
        """In order."""
        return [label.partition(":")[0].strip() for label in self.labels.split(";") if label]


def _counter(member: str, about: str) -> Described:
    return Described(f"keypool_{member}_total", "counter", f"{about}, since the pool began", source=member)


def _histogram(name: str, about: str) -> Described:
    return Described(f"keypool_{name}", "histogram", about, source=name)


METRICS = (
    Described("keypool_keys", "gauge", "keys", "state: available, blocked"),
    Described("keypool_waiting", "gauge", "acquires waiting for a key", source="waiting"),
    Described(
        "keypool_oldest_wait_seconds", "gauge", "how long the first acquire in this server's queue has waited"
    ),
    Described(
        "keypool_limit",
        "gauge",
        "configured limits",
        "limit: max_keys, max_waiters, max_viewers, connections",
    ),
    Described("keypool_viewers", "gauge", "open websockets of the feed"),
    Described("keypool_connections", "gauge", "open connections, the feed's included"),
    Described(
        "keypool_connections_refused_total", "counter", "connections rejected because a limit was reached"
    ),
    Described("keypool_storage_up", "gauge", "1 while the data file can be written, else 0"),
    Described(
        "keypool_storage_failing_seconds",
        "gauge",
        "how long the data file has been unwritable; 0 while it can be written",
    ),
    Described(
        "keypool_commit_age_seconds",
        "gauge",
        "age of the commit in flight; 0 if there is none",
    ),
    Described("keypool_writer_restarts_total", "counter", "writer processes restarted because one died"),
    Described(
        "keypool_data_file_bytes",
        "gauge",
        "size of the data file and of its write-ahead log",
        "file: data, log",
    ),
    Described(
        "keypool_disk_free_bytes", "gauge", "free space on the data file's disk, at the writer's last look"
    ),
    Described(
        "keypool_log_dropped_total", "counter", "log lines dropped because standard error was not read"
    ),
    Described("keypool_clock_steps_total", "counter", "steps of Valkey's clock by more than 5 s"),
    Described("keypool_uptime_seconds", "gauge", "time since this server started", source="uptime"),
    Described("keypool_build_info", "gauge", "always 1", "version; engine"),
    Described(
        "keypool_calls_total", "counter", "calls answered", "operation; outcome: ok or an error's code"
    ),
    Described("keypool_auth_failures_total", "counter", "wrong tokens", "kind: token, sign_in"),
    Described(
        "keypool_call_seconds",
        "histogram",
        "from a call's head to its answer, without the time in the queue for a key",
        "operation",
    ),
    *(_counter(name, about) for name, about in COUNTERS.items()),
    _histogram("acquire_wait_seconds", "time in the queue of the acquires that had to wait"),
    _histogram("release_lateness_seconds", "how long after their deadline keys were released"),
    _histogram("expiry_lateness_seconds", "how long after their deadline keys were purged"),
    _histogram("commit_seconds", "time to commit a batch to disk"),
    _histogram("commit_rows", "keys per committed batch"),
    _histogram("pipeline_seconds", "time from sending a pipeline to Valkey to its last reply"),
    _histogram("pipeline_commands", "commands per pipeline to Valkey"),
    _histogram("loop_stall_seconds", "how late the event loop ran a timer"),
    Described("process_resident_memory_bytes", "gauge", "memory of the server process, without the writer"),
    Described("process_virtual_memory_bytes", "gauge", "address space of the server process"),
    Described("process_cpu_seconds_total", "counter", "processor time of the server process"),
    Described("process_open_fds", "gauge", "open files, connections included"),
    Described("process_max_fds", "gauge", "limit of open files"),
    Described("process_start_time_seconds", "gauge", "Unix time at which the process started"),
)
"""Every metric, in the order of the docs. Those of the process exist on Linux only."""


Numbers = Mapping[str, float | Mapping[str, float]]
"""Values by the full name of their metric; of one with a label, by the label's value."""

Samples = Mapping[Any, float | Histogram]
"""The values of one metric, by the values of its labels, a tuple."""


def exposition(
    stats: Stats, calls: CallMetrics, histograms: Mapping[str, Histogram], numbers: Numbers
) -> bytes:
    """All metrics in Prometheus's text format. O(1) in the number of keys; some 2 ms.

    `numbers` are the metrics that are neither in `stats` nor in `histograms`.
    """
    samples: dict[str, Samples] = {}
    for each in METRICS:
        if each.source in histograms:
            samples[each.name] = {(): histograms[each.source]}
        elif hasattr(stats, each.source):
            samples[each.name] = {(): getattr(stats, each.source)}
    for name, value in numbers.items():
        samples[name] = (
            {(label,): number for label, number in value.items()}
            if isinstance(value, Mapping)
            else {(): value}
        )
    samples |= {
        "keypool_keys": {("available",): stats.available, ("blocked",): stats.blocked},
        "keypool_build_info": {(__version__, stats.engine): 1},
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
