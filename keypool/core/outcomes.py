"""Reports of holders on their keys, and the cooldowns and quarantines that follow from them.

The back-off is the usual exponential one: it doubles with each failure in a row, up to a cap. The holder of a key that
a service has limited often knows better how long to wait, from `Retry-After`, and says so.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from keypool.core.rules import PoolRules

_MOST_DOUBLINGS = 64  # beyond which every back-off is at its cap; larger powers would overflow a float


class Outcome(StrEnum):
    """How the work with a key went."""

    OK = "ok"
    RATE_LIMITED = "rate_limited"
    ERROR = "error"
    INVALID = "invalid"


class Report(msgspec.Struct, frozen=True, gc=False):
    """An outcome, for RATE_LIMITED with the seconds to wait if they are known, and a reason for people to read."""

    outcome: Outcome
    retry_after: float | None = None
    reason: str | None = None


OK_REPORT = Report(Outcome.OK)
"""The most frequent report: one object, so that the pool need not look into it."""


class History(msgspec.Struct, frozen=True, gc=False, array_like=True, omit_defaults=True):
    """What is remembered of a key's reports. Files and Valkey contain it, so fields may be added at the end only."""

    failures: int = 0
    """Failures in a row, as of the last one: `failures_at` forgets them when they are old."""
    failed_at: float = 0.0
    """The moment of the last failure."""
    outcome: Outcome | None = None
    """Of the latest report; None before the first one, and after a restore."""
    reason: str | None = None
    """Of the latest report likewise."""
    operator_reason: str | None = None
    """Of the operator who quarantined the key, or will when its lease ends."""


NO_HISTORY = History()
"""The history of a key that nobody has reported on."""


def back_off(failures: int, rules: PoolRules) -> float:
    """Seconds that a key cools after so many failures in a row."""
    doublings = min(failures - 1, _MOST_DOUBLINGS)
    return min(rules.cooldown_seconds * 2.0**doublings, rules.max_cooldown_seconds)


def failures_at(history: History, now: float, rules: PoolRules) -> int:
    """Failures in a row that aren't forgotten at the moment `now`."""
    return history.failures if now < history.failed_at + rules.forget_seconds else 0


def cooldown_of(report: Report, failures: int, rules: PoolRules) -> float:
    """Seconds that a key cools after a report, which made its failures in a row so many; 0 if it doesn't."""
    outcome = report.outcome
    if outcome is Outcome.RATE_LIMITED and report.retry_after is not None:
        return min(report.retry_after, rules.max_retry_after_seconds)
    if outcome is Outcome.OK:
        return 0.0
    if outcome is Outcome.ERROR and (rules.error_threshold is None or failures < rules.error_threshold):
        return 0.0
    return back_off(failures, rules)


def may_quarantine(quarantined: int, total: int, rules: PoolRules) -> bool:
    """Whether the guard lets a report quarantine one more of `total` keys. One key may always go."""
    return quarantined == 0 or (quarantined + 1) * 100 <= rules.max_quarantined_percent * total
