"""What a benchmark prints: tables of figures, the machine they were taken on, and whether targets were met."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value that `percent` of the values don't exceed; they are in order, and there is at least one."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean of at least one value."""
    return sum(values) / len(values)


def median(values: Sequence[float]) -> float:
    """The value in the middle of at least one; of two, the smaller."""
    return sorted(values)[(len(values) - 1) // 2]


def span(seconds: float) -> str:
    """A length of time with three digits and the unit that they fit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if abs(seconds) * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def size(count: int) -> str:
    """A number of keys in words: 1k, 100k, 1M."""
    for unit, factor in (("M", 1_000_000), ("k", 1000)):
        if count >= factor and count * 10 % factor == 0:
            return f"{count / factor:g}{unit}"
    return str(count)


def megabytes(count: float) -> str:
    """Bytes as MB."""
    return f"{count / 1e6:.1f} MB"


class Table:
    """Rows of text, aligned: the first column to the left, the others to the right."""

    def __init__(self, *headings: str) -> None:
        self._rows: list[tuple[str, ...]] = [headings]

    def row(self, *cells: str) -> None:
        """One more row, with a cell for each heading."""
        assert len(cells) == len(self._rows[0])
        self._rows.append(cells)

    def __str__(self) -> str:
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


class Targets:
    """What must hold. `check` prints a line for each, and the exit status is 1 if one didn't."""

    def __init__(self) -> None:
        self._failed = 0

    def check(self, name: str, holds: bool, found: str, wanted: str) -> None:
        """Print PASS or FAIL."""
        self._failed += not holds
        print(f"{'PASS' if holds else 'FAIL'}  {name}: {found}, wanted {wanted}", flush=True)

    def at_most(self, name: str, seconds: float, limit: float) -> None:
        """A length of time that must not exceed a limit."""
        self.check(name, seconds <= limit, span(seconds), f"at most {span(limit)}")

    @property
    def status(self) -> int:
        """The exit status."""
        return 1 if self._failed else 0


def machine() -> str:
    """One line on what the figures were taken on. A load average near the number of cores means noise."""
    packages = []
    for package in ("tornado", "uvloop", "msgspec"):
        try:
            packages.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            packages.append(f"no {package}")
    load = os.getloadavg()[0]
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{_processor()}, {os.cpu_count()} cores, load {load:.1f}; {python}, {', '.join(packages)}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
