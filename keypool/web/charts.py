"""The charts of the overview as the server draws them, so that the first paint has a past.

static/js/chart.js draws the same lines from the same numbers, as new ones come in: what is changed here is
changed there. A chart is 300 by 100 units, stretched by the page; its right edge is now. Points are means
over five samples, aligned to the clock, so that only the last one moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keypool.web.history import SECONDS, History, Series

WIDTH, HEIGHT = 300, 100
_MEAN_OF = 5
_STEPS = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)


@dataclass(frozen=True, slots=True)
class Chart:
    """Paths by name, and what the top of the vertical axis stands for."""

    top: float
    paths: dict[str, str]
    samples: int


def composition(history: History) -> Chart:
    """Two areas, one on the other: blocked below, available above."""
    series, size = history.seconds, SECONDS
    columns = series.columns()
    blocked = means(series, columns["blocked"])
    available = means(series, columns["available"])
    total = [low + high for low, high in zip(blocked, available, strict=True)]
    top = nice(max(total, default=0))
    paths = {
        "available": area(total, blocked, top, size),
        "blocked": area(blocked, [0.0] * len(blocked), top, size),
    }
    return Chart(top, paths, len(blocked))


def rates(history: History, names: Sequence[str]) -> Chart:
    """A line for each count, by the second."""
    series = history.seconds
    columns = series.columns()
    lines = {name: means(series, columns[name]) for name in names}
    top = nice(max((value for line in lines.values() for value in line), default=0))
    return Chart(top, {name: path(line, top, SECONDS) for name, line in lines.items()}, len(series.samples))


def means(series: Series, values: Sequence[int]) -> list[float]:
    """The mean of every five samples, grouped by the clock; the last group may not be full."""
    if not values:
        return []
    grouped = []
    first = series.end // series.step - len(values) + 1
    start = 0
    while start < len(values):
        stop = start + _MEAN_OF - (first + start) % _MEAN_OF
        part = values[start:stop]
        grouped.append(sum(part) / len(part))
        start = stop
    return grouped


def nice(largest: float) -> float:
    """The least round number that isn't smaller, 4 at least, so that its half is one too."""
    if largest <= 4:
        return 4
    power: int = 10 ** (len(str(int(largest))) - 1)
    return next(step * power for step in _STEPS if step * power >= largest)


def path(values: Sequence[float], top: float, size: int) -> str:
    """A line through these points, the last at the right edge."""
    return "M" + "L".join(_points(values, top, size)) if len(values) > 1 else ""


def area(upper: Sequence[float], lower: Sequence[float], top: float, size: int) -> str:
    """What lies between two lines."""
    if len(upper) < 2:
        return ""
    return "M" + "L".join(_points(upper, top, size) + _points(lower, top, size)[::-1]) + "Z"


def _points(values: Sequence[float], top: float, size: int) -> list[str]:
    places = size // _MEAN_OF
    step = WIDTH / (places - 1)
    start = WIDTH - step * (len(values) - 1)
    return [
        f"{start + step * i:.1f} {HEIGHT - HEIGHT * value / top:.1f}"
        for i, value in enumerate(values[-places - 1 :])
    ]
