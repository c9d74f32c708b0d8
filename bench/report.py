"""Output of the benchmarks: tables of figures, the machine they were taken on, and whether targets were met."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value that `percent` of the values don't exceed. `ordered` is ascending and not empty."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def median(values: Iterable[float]) -> float:
    """The middle one of at least one value; of two, the smaller."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]


def span(seconds: float) -> str:
    """A length of time with three digits and a unit that fits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if abs(seconds) * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def size(count: int) -> str:
    """A number of keys in short: 1k, 100k, 1M."""
    for unit, factor in (("M", 1_000_000), ("k", 1000)):
        if count >= factor and count * 10 % factor == 0:
            return f"{count / factor:g}{unit}"
    return str(count)


def megabytes(count: float) -> str:
    """Bytes as MB."""
    return f"{count / 1e6:.1f} MB"


class Table:
    """Aligned rows of text, or those of a page in docs/: the first column to the left, the others to the right."""

    for_a_page = False
    """Whether tables are printed as Markdown."""

    def __init__(self, *headings: str) -> None:
        self._rows: list[tuple[str, ...]] = [headings]

    def row(self, *cells: str) -> None:
        """Add a row, with a cell for each heading."""
        assert len(cells) == len(self._rows[0])
        self._rows.append(cells)

    def __str__(self) -> str:
        if self.for_a_page:
            return self._markdown()
        widths = [max(map(len, column)) for column in zip(*self._rows, strict=True)]
        lines = []
        for cells in self._rows:
            first, *others = (
                cell.rjust(width) if place else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            lines.append("  ".join([first, *others]).rstrip())
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join(lines)

    def _markdown(self) -> str:
        heading, *rows = (f"| {' | '.join(cells)} |" for cells in self._rows)
        return "\n".join([heading, f"| --- |{' ---: |' * (len(self._rows[0]) - 1)}", *rows])


class Targets:
    """The targets of a benchmark. `check` prints a line for each; `status` is 1 if one was missed."""

    def __init__(self) -> None:
        self._missed = 0

    def check(self, name: str, holds: bool, found: str, wanted: str) -> None:
        """Print PASS or FAIL."""
        self._missed += not holds
        print(f"{'PASS' if holds else 'FAIL'}  {name}: {found}, wanted {wanted}", flush=True)

    def at_least(self, name: str, found: float, limit: float) -> None:
        """Check a ratio."""
        self.check(name, found >= limit, f"{found:.2f}", f"at least {limit:g}")

    def at_most(self, name: str, seconds: float, limit: float) -> None:
        """Check a length of time."""
        self.check(name, seconds <= limit, span(seconds), f"at most {span(limit)}")

    def none(self, name: str, count: int) -> None:
        """Check that something didn't happen."""
        self.check(name, count == 0, str(count), "none")

    @property
    def status(self) -> int:
        """The exit status."""
        return 1 if self._missed else 0


def machine() -> str:
    """One line about the machine. A load average near the number of cores means noisy figures."""
    packages = []
    for package in ("tornado", "uvloop", "msgspec"):
        try:
            packages.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            packages.append(f"no {package}")
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{_processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {python}, {', '.join(packages)}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
