"""Pace: what the rules of a pool make of it, at each edge and over random histories.

test_pool_leases_machine.py has it amid all else that may happen to keys, against a plain model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from engine_support import BLOCK, START, make_pool
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keypool.core.answers import KeyPatch, NewKey
from keypool.core.events import HOLDER, Change
from keypool.core.keys import Key, State
from keypool.core.outcomes import Outcome, Report
from keypool.core.pace import LONGEST_WAIT, Pace
from keypool.core.pool import Pool
from keypool.engine.durable.rows import key_of, row_of

NOW = START
SLACK = 1e-5
"""Seconds by which sums of floats of the size of a moment may be wrong."""
OK = Report(Outcome.OK)


def pool_of(pace: Pace | None, count: int = 1, **rules: Any) -> tuple[Pool, list[Key]]:
    """A pool with this pace, and its keys, which never expire."""
    pool = make_pool(pace=pace, **{"keepalive_seconds": None} | rules)
    return pool, [pool.generate(NOW) for _ in range(count)]


def served(pool: Pool, now: float) -> Key:
    """Acquire a key; fails if none is available."""
    key = pool.acquire(now, None)
    assert key is not None, "nothing was served"
    return key


def used(pool: Pool, now: float, uses: int = 1, report: Report | None = None) -> Key:
    """Acquire a key and give it back at once."""
    key = served(pool, now)
    pool.unblock(key, key.lease, now, report, HOLDER, uses=uses)
    return key


# ------------------------------------------------------------------------------------------------- the budget


def test_a_key_whose_budget_is_spent_cools_until_it_has_budget() -> None:
    """From the moment of the acquire, and the cooldown and what caused it are counted."""
    pool, (key,) = pool_of(Pace(5, 60.0))
    held = served(pool, NOW)
    pool.unblock(held, None, NOW + 2)
    assert (key.state, key.release_deadline) == (State.COOLING, NOW + 12)
    assert pool.acquire(NOW + 11.999, None) is None
    assert pool.acquire(NOW + 12, None) is key
    assert (pool.counters.cooled, pool.counters.paced) == (1, 1)


def test_a_key_that_is_held_longer_than_its_interval_does_not_cool() -> None:
    pool, (key,) = pool_of(Pace(5, 60.0))
    served(pool, NOW)
    pool.unblock(key, None, NOW + 12)
    assert key.state is State.AVAILABLE
    assert (pool.counters.cooled, pool.counters.paced) == (0, 0)


def test_a_burst_comes_at_once_and_then_one_use_an_interval() -> None:
    """And the whole burst again once the key was left alone for long enough."""
    pool, (key,) = pool_of(Pace(1, 10.0, burst=3))
    for _ in range(2):
        used(pool, NOW)
        assert key.state is State.AVAILABLE
    used(pool, NOW)
    assert key.release_deadline == NOW + 10
    used(pool, NOW + 10)
    assert key.release_deadline == NOW + 20
    for _ in range(3):
        used(pool, NOW + 100)
    assert key.release_deadline == NOW + 110


def test_after_a_release_by_deadline_a_key_has_cooled_for_its_pace() -> None:
    """Every question after its state agrees, whether or not the timer has fired."""
    told: list[Change] = []
    pool, (key,) = pool_of(Pace(1, 100.0), on_change=lambda change, key, owner, origin: told.append(change))
    served(pool, NOW)
    assert pool.state_of(key, NOW + BLOCK) is State.COOLING
    assert pool.state_of(key, NOW + 99.9) is State.COOLING
    assert pool.state_of(key, NOW + 100) is State.AVAILABLE
    pool.process_due(NOW + BLOCK)
    assert pool.next_release(NOW + BLOCK) == 40
    pool.process_due(NOW + 100)
    assert told[2:] == [Change.RELEASED, Change.COOLED, Change.READY]


def test_the_longest_of_rest_report_and_pace_counts() -> None:
    """And only a cooldown that the pace makes longer is counted as one."""
    pool, (key,) = pool_of(Pace(1, 10.0), rest_seconds=4.0)
    used(pool, NOW)
    assert (key.release_deadline, pool.counters.paced) == (NOW + 10, 1)
    used(pool, NOW + 10, report=Report(Outcome.RATE_LIMITED, 30.0))
    assert (key.release_deadline, pool.counters.paced) == (NOW + 40, 1)
    used(pool, NOW + 40, report=Report(Outcome.RATE_LIMITED, 3.0))
    assert (key.release_deadline, pool.counters.paced) == (NOW + 50, 2)


def test_a_keepalive_and_an_extension_leave_the_budget_alone() -> None:
    pool, (key,) = pool_of(Pace(1, 100.0), max_block_seconds=600.0)
    served(pool, NOW)
    pool.keepalive(key, NOW + 1)
    pool.extend(key, key.lease, 90.0, NOW + 1)
    pool.unblock(key, None, NOW + 2)
    assert key.release_deadline == NOW + 100


# ------------------------------------------------------------------------------------------------- uses


@pytest.mark.parametrize("report", [None, OK], ids=["plain", "ok"])
def test_uses_are_charged_with_that_of_the_acquire_among_them(report: Report | None) -> None:
    pool, (key,) = pool_of(Pace(1, 10.0))
    used(pool, NOW, 12, report)
    assert key.release_deadline == NOW + 120


def test_uses_in_a_late_report_are_charged_where_it_finds_the_key() -> None:
    """An available key cools, a cooling one longer, and one with budget left stays available."""
    pool, (key,) = pool_of(Pace(1, 10.0, burst=3))
    served(pool, NOW)
    late = NOW + BLOCK
    pool.unblock(key, key.lease, late, OK, HOLDER, uses=8)
    assert key.state is State.AVAILABLE  # eight uses in a minute are within the budget
    late += 100
    served(pool, late)
    pool.unblock(key, None, late + 1)
    assert key.state is State.AVAILABLE
    pool.unblock(key, key.lease, late + 1, OK, HOLDER, uses=5)
    assert (key.state, key.release_deadline) == (State.COOLING, late + 50 - 20)
    served(pool, late + 30)
    pool.unblock(key, None, late + 30)
    assert (key.state, key.release_deadline) == (State.COOLING, late + 60 - 20)
    pool.unblock(key, key.lease, late + 31, OK, HOLDER, uses=3)
    assert (key.state, key.release_deadline) == (State.COOLING, late + 80 - 20)
    assert pool.counters.paced == 3


def test_uses_of_an_unblock_that_changes_nothing_are_not_charged() -> None:
    """Without an outcome for a key that isn't held, and in a second report."""
    pool, (key,) = pool_of(Pace(1, 10.0))
    used(pool, NOW, 2, OK)
    pool.unblock(key, key.lease, NOW, OK, HOLDER, uses=100)
    pool.unblock(key, None, NOW, None, HOLDER, uses=100)
    assert key.paced_until == NOW + 20


def test_without_a_pace_uses_have_no_effect() -> None:
    pool, (key,) = pool_of(None)
    used(pool, NOW, 10**9, OK)
    assert (key.state, key.paced_until) == (State.AVAILABLE, 0.0)


def test_a_lease_that_began_without_a_pace_is_charged_from_its_end() -> None:
    pool, (key,) = pool_of(None)
    served(pool, NOW)
    pool.update(key, KeyPatch(pace=Pace(1, 10.0)), NOW, HOLDER)
    pool.unblock(key, None, NOW + 5, None, HOLDER, uses=3)
    assert key.release_deadline == NOW + 5 + 20


def test_no_number_of_uses_takes_a_key_away_for_ever() -> None:
    pool, (key,) = pool_of(Pace(1, 366 * 86_400.0, burst=2))
    used(pool, NOW, 10**9)
    assert key.release_deadline == pytest.approx(NOW + LONGEST_WAIT)


# ------------------------------------------------------------------------------------------------- operators


@pytest.mark.parametrize("quarantined", [False, True])
def test_restore_gives_no_budget_back(quarantined: bool) -> None:
    """A key without budget cools until it has; what else it cooled for is over."""
    told: list[Change] = []
    pool, (key,) = pool_of(Pace(1, 30.0), on_change=lambda change, key, owner, origin: told.append(change))
    used(pool, NOW, report=Report(Outcome.RATE_LIMITED, 100.0))
    if quarantined:
        pool.quarantine(key, None, True, NOW, HOLDER)
    told.clear()
    pool.restore(key, NOW + 1, HOLDER)
    assert (key.state, key.release_deadline) == (State.COOLING, NOW + 30)
    assert told == [Change.RESTORED, Change.COOLED]
    pool.quarantine(key, None, True, NOW + 2, HOLDER)
    pool.restore(key, NOW + 30, HOLDER)
    assert key.state is State.AVAILABLE


def test_another_text_has_its_full_budget() -> None:
    """The same text has what is left."""
    pool, (key,) = pool_of(Pace(1, 30.0))
    used(pool, NOW)
    pool.replace(key, key.text, NOW, HOLDER)
    assert pool.cooling == 1
    pool.replace(key, "sk-live-another", NOW, HOLDER)
    assert pool.available == 1


def test_a_key_goes_by_its_own_pace_if_it_has_one() -> None:
    """Imported with it or given it later, and by the pool's once it is removed."""
    pool, (key,) = pool_of(Pace(1, 10.0))
    own = pool.import_key(NewKey("sk-live-1", pace=Pace(1, 20.0)), NOW, HOLDER)
    used(pool, NOW)
    used(pool, NOW)
    assert (key.release_deadline, own.release_deadline) == (NOW + 10, NOW + 20)
    pool.update(own, KeyPatch(pace=False), NOW + 20, HOLDER)
    pool.update(key, KeyPatch(pace=Pace(1, 40.0)), NOW + 20, HOLDER)
    pool.update(key, KeyPatch(labels={"a": "b"}), NOW + 20, HOLDER)
    used(pool, NOW + 20)
    used(pool, NOW + 20)
    assert (key.release_deadline, own.release_deadline) == (NOW + 60, NOW + 30)
    assert own.details.pace is None


def test_another_pace_holds_from_the_next_charge_on() -> None:
    """A cooldown that has begun ends when it was to end, and an available key may be used."""
    pool, (first, second) = pool_of(Pace(1, 10.0, burst=2), count=2, random=lambda: 0.0)
    held = served(pool, NOW)
    other = first if held is second else second
    pool.unblock(held, None, NOW)
    pool.quarantine(other, None, True, NOW, HOLDER)
    used(pool, NOW)
    assert held.release_deadline == NOW + 10
    pool.rules = make_pool(pace=Pace(1, 100.0), keepalive_seconds=None).rules
    assert pool.state_of(held, NOW + 10) is State.AVAILABLE
    used(pool, NOW + 10)
    assert held.release_deadline == NOW + 20 + 100
    pool.rules = make_pool(keepalive_seconds=None).rules
    assert pool.state_of(held, NOW + 119) is State.COOLING
    used(pool, NOW + 120)
    assert held.state is State.AVAILABLE


# ------------------------------------------------------------------------------------------------- over time

paces = st.builds(
    Pace, st.integers(1, 7), st.sampled_from([0.05, 1.0, 7.0, 60.0, 86_400.0]), st.sampled_from([1, 1, 2, 5])
)
shares = st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0, 1.7, 5.0])
"""How long something lasts, in intervals of the pace."""
steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("use"), shares, st.sampled_from([1, 1, 1, 2, 4]), st.sampled_from([None, *Outcome])
        ),
        st.tuples(st.just("hold")),
        st.tuples(st.just("wait"), shares),
        st.tuples(st.sampled_from(["restore", "restart", "quarantine"])),
    ),
    min_size=5,
    max_size=40,
)


def restarted(pool: Pool) -> Pool:
    """A pool with what a data file has of this one."""
    new = make_pool(pace=pool.rules.pace, keepalive_seconds=None, block_seconds=pool.rules.block_seconds)
    new.last_id, new.last_lease = pool.last_id, pool.last_lease
    for key in pool._by_id.walk(None):
        new.load(key_of(row_of(key)))
    new.check()
    return new


def acquires_of(pace: Pace, history: list[tuple[Any, ...]]) -> Iterator[float]:
    """The moments at which a key is acquired, at each of which somebody would like to have it."""
    pool, _ = pool_of(pace, block_seconds=0.7 * pace.interval, cooldown_seconds=pace.interval / 3)
    now = NOW
    for step, *more in history:
        key = pool.peek(1)
        assert key is not None
        if step in ("use", "hold") and (found := pool.acquire(now, None)) is not None:
            yield now
            if step == "use":
                held, uses, outcome = more
                now += held * pace.interval
                report = None if outcome in (None, Outcome.INVALID) else Report(outcome)
                pool.unblock(pool.find_id(1, now), found.lease, now, report, HOLDER, uses=uses)
        elif step == "wait":
            now += more[0] * pace.interval
        elif step == "restore":
            pool.restore(pool.find_id(1, now), now, HOLDER)
        elif step == "quarantine":
            pool.quarantine(pool.find_id(1, now), None, False, now, HOLDER)
        elif step == "restart":
            pool = restarted(pool)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(paces, steps)
def test_no_window_has_more_acquires_than_the_pace_allows(pace: Pace, history: list[tuple[Any, ...]]) -> None:
    """Whatever holders report and operators do, and wherever the server is restarted."""
    moments = [*acquires_of(pace, history)]
    for first, moment in enumerate(moments):
        within = [each for each in moments[first:] if each < moment + pace.seconds - SLACK]
        assert len(within) <= pace.count + pace.burst - 1


@settings(max_examples=60, deadline=None)
@given(paces, st.integers(0, 30), st.booleans())
def test_who_always_waits_gets_all_that_the_pace_allows(pace: Pace, intervals: int, restart: bool) -> None:
    """The burst at once, and then one use an interval; a restart costs a millisecond at most."""
    pool, _ = pool_of(pace)
    now, acquired, takes = NOW, 0, 1e-6  # seconds that a use takes, more than what floats may be wrong by
    end = NOW + intervals * (pace.interval + 0.001 * restart) + (intervals + pace.burst) * takes
    while now <= end:
        used(pool, now)
        acquired += 1
        if restart:
            pool = restarted(pool)
        now += takes
        now += pool.next_release(now) or 0.0
    assert acquired >= intervals + pace.burst
