"""What Prometheus is told, made when it asks: nothing here is kept beside what it is made from.

Counters and gauges are read off the engine at the scrape, so they can't drift from it; every state has its
line, also at zero. No label holds a key, an owner or a path. `METRICS` has every metric once: the docs, and the
test of the dashboard and the alerts, are made from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from keypool import __version__
from keypool.core.answers import Stats
from keypool.core.counters import COUNTERS
from keypool.ops.calls import CallTallies
from keypool.ops.histogram import Tally

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Described:
    """One metric by its full name. `source` is where its value stands: a member of stats, or a tally."""

    name: str
    kind: str
    about: str
    labels: str = ""
    source: str = ""


def _counter(member: str, about: str) -> Described:
    return Described(f"keypool_{member}_total", "counter", f"{about}, since the pool began", source=member)


def _histogram(tally: str, about: str) -> Described:
    return Described(f"keypool_{tally}", "histogram", about, source=tally)


METRICS = (
    Described("keypool_keys", "gauge", "keys", "state: available, blocked"),
    Described("keypool_waiting", "gauge", "acquires that wait for a key", source="waiting"),
    Described("keypool_oldest_wait_seconds", "gauge", "how long the first in this server's queue has waited"),
    Described(
        "keypool_limit",
        "gauge",
        "upper limits in force",
        "limit: max_keys, max_waiters, max_viewers, connections",
    ),
    Described("keypool_viewers", "gauge", "open feeds of dashboards"),
    Described("keypool_connections", "gauge", "open connections, those of viewers among them"),
    Described("keypool_connections_refused_total", "counter", "connections closed for want of room"),
    Described("keypool_storage_up", "gauge", "1 while the data file can be written, else 0"),
    Described(
        "keypool_storage_failing_seconds", "gauge", "for how long the data file can't be written; 0 if it can"
    ),
    Described(
        "keypool_commit_age_seconds",
        "gauge",
        "since the commit under way was sent to the writer; 0 if none is",
    ),
    Described(
        "keypool_writer_restarts_total", "counter", "writer processes started in place of one that died"
    ),
    Described("keypool_data_file_bytes", "gauge", "size of the data file, and of its log", "file: data, log"),
    Described(
        "keypool_disk_free_bytes", "gauge", "room left where the data file is, as the writer saw it last"
    ),
    Described("keypool_log_dropped_total", "counter", "log lines dropped: standard error did not take them"),
    Described("keypool_clock_steps_total", "counter", "steps of Valkey's clock by more than 5 s"),
    Described("keypool_uptime_seconds", "gauge", "since this server started", source="uptime"),
    Described("keypool_build_info", "gauge", "always 1", "version, engine"),
    Described(
        "keypool_calls_total", "counter", "calls answered", "operation; outcome: ok or an error's code"
    ),
    Described("keypool_auth_failures_total", "counter", "wrong tokens", "kind: token, sign_in"),
    Described(
        "keypool_call_seconds",
        "histogram",
        "from a call's head to its answer, without the time spent waiting for a key",
        "operation",
    ),
    *(_counter(name, about) for name, about in COUNTERS.items()),
    _histogram("acquire_wait_seconds", "how long those acquires waited that waited at all"),
    _histogram("release_lateness_seconds", "how late blocks that ran out were released"),
    _histogram("expiry_lateness_seconds", "how late keys that expired were purged"),
    _histogram("commit_seconds", "from sending a batch to the writer until it was on disk"),
    _histogram("commit_rows", "keys in a batch"),
    _histogram("pipeline_seconds", "from sending commands to Valkey until all were answered"),
    _histogram("pipeline_commands", "commands to Valkey sent in one go"),
    _histogram("loop_stall_seconds", "how late the loop came to a callback that was due"),
    Described("process_resident_memory_bytes", "gauge", "memory of the server, its writer not counted"),
    Described("process_virtual_memory_bytes", "gauge", "address space of the server"),
    Described("process_cpu_seconds_total", "counter", "processor time of the server"),
    Described("process_open_fds", "gauge", "open files, connections among them"),
    Described("process_max_fds", "gauge", "open files at most"),
    Described("process_start_time_seconds", "gauge", "when the server started, by the wall clock"),
)
"""Every metric, in the order of the docs. Those of the process are there on Linux only."""


Numbers = Mapping[str, float | Mapping[str, float]]
"""Values by the full name of their metric; of one with a label, by the label's value."""


def exposition(stats: Stats, calls: CallTallies, tallies: Mapping[str, Tally], numbers: Numbers) -> bytes:
    """The whole page in Prometheus's text format. O(1) in the number of keys; some 2 ms.

    `numbers` are the metrics that neither `stats` nor `tallies` has.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(stats, calls, tallies, numbers))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


class _Snapshot(Collector):
    def __init__(
        self, stats: Stats, calls: CallTallies, tallies: Mapping[str, Tally], numbers: Numbers
    ) -> None:
        self._stats = stats
        self._calls = calls
        self._tallies = tallies
        self._numbers = numbers

    def collect(self) -> Iterator[Metric]:
        for described in METRICS:
            if described.kind == "histogram" and described.source in self._tallies:
                family = HistogramMetricFamily(described.name, described.about)
                family.add_metric([], *_parts(self._tallies[described.source]))
                yield family
            elif described.name in self._numbers or hasattr(self._stats, described.source):
                yield self._single(described)
        yield from self._labelled()

    def _single(self, described: Described) -> Metric:
        value = self._numbers.get(described.name)
        if value is None:
            value = getattr(self._stats, described.source)
        kind = CounterMetricFamily if described.kind == "counter" else GaugeMetricFamily
        if not isinstance(value, Mapping):
            return kind(described.name, described.about, value=value)
        family = kind(described.name, described.about, labels=[described.labels.partition(":")[0]])
        for label, each in value.items():
            family.add_metric([label], each)
        return family

    def _labelled(self) -> Iterator[Metric]:
        keys = GaugeMetricFamily("keypool_keys", "keys", labels=["state"])
        keys.add_metric(["available"], self._stats.available)
        keys.add_metric(["blocked"], self._stats.blocked)
        yield keys
        build = GaugeMetricFamily("keypool_build_info", "always 1", labels=["version", "engine"])
        build.add_metric([__version__, self._stats.engine], 1)
        yield build
        counts = CounterMetricFamily("keypool_calls", "calls answered", labels=["operation", "outcome"])
        for (operation, outcome), count in self._calls.outcomes.items():
            counts.add_metric([operation, outcome], count)
        yield counts
        seconds = HistogramMetricFamily("keypool_call_seconds", "service time of calls", labels=["operation"])
        for operation, tally in self._calls.seconds.items():
            seconds.add_metric([operation], *_parts(tally))
        yield seconds


def _parts(tally: Tally) -> tuple[list[tuple[str, float]], float]:
    return tally.cumulative(), tally.sum
