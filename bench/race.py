"""Servers under the same load, in turns: round after round, so that whatever else the machine does falls on all.

Ratios are taken within a round, each with its neighbour, and the median of the rounds counts. Every other round goes
through the servers in reverse, so that none always follows the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.load import Round
from bench.report import Table, median, percentile, span


@dataclass(frozen=True)
class Sample:
    """One round of load on one server. Times are seconds."""

    rate: float  # requests a second
    cost: float  # processor time of the server's main thread a request
    p50: float = 0.0  # 0: not measured
    p99: float = 0.0
    worst: float = 0.0
    errors: int = 0

    @classmethod
    def of(cls, measured: Round) -> Sample:
        """The figures of a round."""
        ordered = sorted(measured.latencies)
        cost = (measured.cpu or measured.seconds) / max(1, measured.requests)
        p50, p99, worst = (percentile(ordered, percent) for percent in (50, 99, 100))
        return cls(measured.requests / measured.seconds, cost, p50, p99, worst, measured.errors)


@dataclass
class Figures:
    """All samples of one load on one server."""

    samples: list[Sample] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Requests a second: the median."""
        return median(each.rate for each in self.samples)

    @property
    def cost(self) -> float:
        """Processor time a request in seconds: the median."""
        return median(each.cost for each in self.samples)

    @property
    def p50(self) -> float:
        """The median of the rounds' medians of latency, in seconds."""
        return median(each.p50 for each in self.samples)

    @property
    def errors(self) -> int:
        """In all rounds."""
        return sum(each.errors for each in self.samples)

    def of(self, other: Figures) -> float:
        """The rate as a multiple of another's."""
        return median(
            mine.rate / theirs.rate for mine, theirs in zip(self.samples, other.samples, strict=True)
        )

    def cheaper(self, other: Figures) -> float:
        """By what factor a request costs less processor time than another's."""
        return median(
            theirs.cost / mine.cost for mine, theirs in zip(self.samples, other.samples, strict=True)
        )


class Race:
    """Servers that are compared under one load. `add` them, then `run`."""

    def __init__(self) -> None:
        self.found: dict[str, Figures] = {}
        self._loads: dict[str, Callable[[], Sample]] = {}

    def add(self, name: str, load: Callable[[], Sample]) -> None:
        """One more server; `load` runs one round on it."""
        self._loads[name] = load
        self.found[name] = Figures()

    def run(self, rounds: int) -> Race:
        """Measure, each server once a round."""
        for number in range(rounds):
            order = list(self._loads)
            for name in reversed(order) if number % 2 else order:
                self.found[name].samples.append(self._loads[name]())
        return self

    def table(self, title: str, bases: Sequence[str]) -> Table:
        """The figures; ratios to each of the `bases`, and to the first one by processor time."""
        ratios = [f"of {base}" for base in bases]
        table = Table(title, "a second", *ratios, "by cpu", "cpu each", "p50", "p99", "worst", "errors")
        for name, figures in self.found.items():
            of = [f"{figures.of(self.found[base]):.2f}" for base in bases]
            p99 = median(each.p99 for each in figures.samples)
            worst = max(each.worst for each in figures.samples)
            spans = [span(each) if each else "-" for each in (figures.cost, figures.p50, p99, worst)]
            cheaper = f"{figures.cheaper(self.found[bases[0]]):.2f}"
            table.row(name, f"{figures.rate:,.0f}", *of, cheaper, *spans, str(figures.errors))
        return table
