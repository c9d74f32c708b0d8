"""Is anything wrong with a pool? When each warning of keypool/ops/advice.py holds.

The thresholds are those of the alerts in deploy/prometheus/alerts.yml where there is one, over a shorter time: a person
who looks wants to see what begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keypool.core.answers import Stats
from keypool.core.rules import PoolRules
from keypool.ops.advice import ADVICE, Advice

EXPIRING = 60
"""Keys that expire within so many seconds are counted, or within a quarter of their life if that is shorter."""
MANY_EXPIRING, MANY_EXPIRED = 0.1, 0.2
"""Shares of the keys."""
MANY_RELEASED = 10
SLOW_COMMIT, LATE = 0.5, 0.05
"""Seconds at the 99th percentile."""


def expiry_window(rules: PoolRules) -> float:
    """See EXPIRING. The same as in static/js/clock.js."""
    return EXPIRING if rules.keepalive_seconds is None else min(EXPIRING, rules.keepalive_seconds / 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the verdicts are drawn from: the pool now, and what happened in it lately."""

    stats: Stats
    not_ready: Mapping[str, str] | None = None
    degraded: str | None = None
    pool_draining: bool = False
    expiring: int = 0
    window: float = EXPIRING
    recent: Mapping[str, int]
    """Of some counters, how much was counted in `recent_seconds`."""
    recent_seconds: int
    commit_p99: float | None = None
    stall_p99: float | None = None
    in_clear: bool = False


def verdicts(facts: Facts, base: str) -> list[dict[str, Any]]:
    """The warnings that hold, the most urgent first; `base` is the beginning of the paths of the pool's pages."""
    found = []
    for advice in ADVICE:
        cause = _CAUSES[advice.code](facts)
        if cause:
            found.append(_verdict(advice, cause, base, _path(advice, facts.stats)))
    return found


def _path(advice: Advice, stats: Stats) -> str:
    if advice.code == "many-out" and stats.quarantined > stats.cooling:
        return "/keys?tab=quarantined"
    return advice.path


def tiles_warned(found: Sequence[Mapping[str, Any]], facts: Facts) -> list[str]:
    """The tiles of the overview that are coloured: by a verdict, or by a number that isn't one yet."""
    warned = {name for verdict in found for name in verdict["tiles"]}
    warned |= {
        name
        for name, number in (("waiting", facts.stats.waiting), ("refused", facts.recent["refused"]))
        if number
    }
    return sorted(warned)


def _verdict(advice: Advice, cause: str, base: str, path: str) -> dict[str, Any]:
    return {
        "code": advice.code,
        "title": advice.title,
        "text": f"{cause} {sentence(advice.means)}",
        "remedy": sentence(advice.do),
        "href": path if path == "/system" else base + path,
        "link": advice.link,
        "short": advice.short,
        "tiles": advice.tiles,
    }


def sentence(text: str) -> str:
    """A text of ADVICE or of an error as a sentence, without backticks."""
    text = text.replace("`", "")
    return f"{text[:1].upper()}{text[1:]}."


def _not_ready(code: str) -> Callable[[Facts], str | None]:
    def cause(facts: Facts) -> str | None:
        if facts.not_ready is None or facts.not_ready["code"] != code:
            return None
        return sentence(facts.not_ready["detail"])

    return cause


def _exhausted(facts: Facts) -> str | None:
    stats = facts.stats
    if stats.available or not stats.total:
        return None
    return f"{stats.blocked:,} blocked, {stats.cooling:,} cooling, {stats.quarantined:,} quarantined."


def _expiring(facts: Facts) -> str | None:
    total = facts.stats.total
    if facts.expiring <= MANY_EXPIRING * total:
        return None
    return f"{min(facts.expiring, total):,} of {total:,} keys expire within {facts.window:g} s."


def _expired(facts: Facts) -> str | None:
    expired = facts.recent["expired"]
    if not expired or expired < MANY_EXPIRED * (facts.stats.total + expired):
        return None
    return f"{expired:,} expired in {_lately(facts)}; {facts.stats.total:,} are left."


def _many_out(facts: Facts) -> str | None:
    stats = facts.stats
    if (stats.cooling + stats.quarantined) * 2 <= stats.total:
        return None
    return f"{stats.cooling:,} cooling and {stats.quarantined:,} quarantined of {stats.total:,} keys."


def _released(facts: Facts) -> str | None:
    released, unblocked = facts.recent["released"], facts.recent["unblocked"]
    if released < MANY_RELEASED or released <= unblocked:
        return None
    return f"{released:,} ran out in {_lately(facts)}, {unblocked:,} were given back."


def _slow_disk(facts: Facts) -> str | None:
    if facts.commit_p99 is None or facts.commit_p99 <= SLOW_COMMIT:
        return None
    return f"One commit in a hundred takes {facts.commit_p99:.1f} s or more."


def _stalls(facts: Facts) -> str | None:
    if facts.stall_p99 is None or facts.stall_p99 <= LATE:
        return None
    return f"One turn in a hundred is {facts.stall_p99 * 1000:.0f} ms late or more."


def _lately(facts: Facts) -> str:
    return f"the last {facts.recent_seconds // 60} min"


_CAUSES: Mapping[str, Callable[[Facts], str | None]] = {
    **{code: _not_ready(code) for code in ("loading", "draining", "storage-unavailable")},
    "degraded": lambda facts: sentence(facts.degraded) if facts.degraded else None,
    "pool-draining": lambda facts: f"{facts.stats.total:,} keys are left." if facts.pool_draining else None,
    "exhausted": _exhausted,
    "expiring": _expiring,
    "expired": _expired,
    "many-out": _many_out,
    "released": _released,
    "slow-disk": _slow_disk,
    "stalls": _stalls,
    "clear-text": lambda facts: (
        f"{facts.stats.imported:,} keys were imported." if facts.in_clear and facts.stats.imported else None
    ),
}
"""By the code of a warning: why it holds, in words; None if it doesn't."""
