"""The rules of outcomes one by one, each at its edge: back-off, failures that are forgotten, the guard."""

from __future__ import annotations

import msgspec
import pytest
from engine_support import START

from keypool.core.outcomes import (
    NO_HISTORY,
    History,
    Outcome,
    Report,
    back_off,
    cooldown_of,
    failures_at,
    may_quarantine,
)
from keypool.core.rules import DEFAULT_RULES, PoolRules

LIMITED = Report(Outcome.RATE_LIMITED)


@pytest.mark.parametrize(
    ("failures", "seconds"), [(1, 60), (2, 120), (3, 240), (6, 1920), (7, 3600), (64, 3600), (10**9, 3600)]
)
def test_the_back_off_doubles_up_to_its_cap(failures: int, seconds: float) -> None:
    """However many failures there were: a power that large would overflow a float."""
    assert back_off(failures, DEFAULT_RULES) == seconds


def test_a_cap_below_the_first_cooldown_holds() -> None:
    """It is the most, whatever the other setting is; and a cooldown of nothing stays nothing."""
    assert back_off(1, PoolRules(cooldown_seconds=60, max_cooldown_seconds=5)) == 5
    assert back_off(10**9, PoolRules(cooldown_seconds=0)) == 0


@pytest.mark.parametrize(
    ("retry_after", "seconds"), [(None, 60), (0.0, 0), (0.25, 0.25), (604_800.0, 604_800), (1e15, 604_800)]
)
def test_a_rate_limit_cools_as_long_as_the_service_said(retry_after: float | None, seconds: float) -> None:
    """Up to a cap of its own; for the back-off if it said nothing."""
    assert cooldown_of(Report(Outcome.RATE_LIMITED, retry_after), 1, DEFAULT_RULES) == seconds


@pytest.mark.parametrize(
    ("failures", "seconds"), [(1, 0), (2, 0), (3, 240), (4, 480)], ids=["first", "second", "third", "fourth"]
)
def test_an_error_cools_from_the_threshold_on(failures: int, seconds: float) -> None:
    """The back-off is that of so many failures, not of those beyond the threshold."""
    assert cooldown_of(Report(Outcome.ERROR), failures, DEFAULT_RULES) == seconds


def test_ok_cools_nothing_and_an_invalid_that_is_guarded_cools_at_once() -> None:
    """The guard's cooldown knows no threshold."""
    assert cooldown_of(Report(Outcome.OK), 9, DEFAULT_RULES) == 0
    assert cooldown_of(Report(Outcome.INVALID), 1, DEFAULT_RULES) == 60


def test_failures_are_forgotten_after_the_last_one() -> None:
    """At the moment itself. A key without reports has none."""
    history = History(4, START)
    assert failures_at(history, START + 3599.999, DEFAULT_RULES) == 4
    assert failures_at(history, START + 3600, DEFAULT_RULES) == 0
    assert failures_at(history, START, PoolRules(forget_seconds=0)) == 0
    assert failures_at(NO_HISTORY, START, DEFAULT_RULES) == 0


@pytest.mark.parametrize(
    ("quarantined", "total", "percent", "allowed"),
    [
        (0, 1, 50, True),
        (0, 1000, 0, True),
        (1, 2, 50, False),
        (1, 3, 50, False),
        (1, 4, 50, True),
        (1, 2, 100, True),
        (499_999, 1_000_000, 50, True),
        (500_000, 1_000_000, 50, False),
        (2, 3, 99.9, False),
        (1, 1000, 0.2, True),
    ],
)
def test_the_guard_leaves_a_part_of_the_pool(
    quarantined: int, total: int, percent: float, allowed: bool
) -> None:
    """Exactly so many percent may go; one key may always."""
    assert may_quarantine(quarantined, total, PoolRules(max_quarantined_percent=percent)) is allowed


def test_a_history_is_kept_as_a_list_that_may_grow_at_its_end() -> None:
    """Its encoding is in data files and in Valkey. A shorter one, of an earlier version, is read as well."""
    history = History(2, START, Outcome.RATE_LIMITED, "HTTP 429", "unpaid")
    encoded = msgspec.json.encode(history)
    assert encoded == b'[2,1700000000.0,"rate_limited","HTTP 429","unpaid"]'
    assert msgspec.json.decode(encoded, type=History) == history
    assert msgspec.json.decode(b'[2,1700000000.0,"error"]', type=History) == History(2, START, Outcome.ERROR)
    assert msgspec.json.decode(b"[]", type=History) == NO_HISTORY
