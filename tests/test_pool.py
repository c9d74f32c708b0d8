"""The pool's rules one by one, each at its edge.

test_pool_machine.py has them in every order; here stands what a search would seldom meet: crowds of overdue
keys, keys loaded out of order, planted corruption, and chance, whose laws are tested with a seed.
"""

from __future__ import annotations

import base64
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
from engine_support import BLOCK, KEEPALIVE, START, make_pool, serial_texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keypool.core import index
from keypool.core.cursor import ListQuery, decode, encode, order_of, page_query
from keypool.core.errors import BadRequest, BlockLimit, PoolFull, StaleLease, UnknownKey
from keypool.core.events import HOLDER, Change, event_of
from keypool.core.keys import ALPHABET, DEAD, Key, State, hint, random_text
from keypool.core.keyset import KeyPage, PageQuery
from keypool.core.outcomes import NO_HISTORY, Outcome, Report
from keypool.core.pool import MAX_DUE_PER_CALL, PAGE_SCAN_LIMIT, Ended, Pool
from keypool.core.rules import PoolRules

NOW = START
SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
CROWD = 3 * MAX_DUE_PER_CALL + 7


def before(moment: float) -> float:
    """The last moment before this one."""
    return math.nextafter(moment, -math.inf)


def served(pool: Pool, now: float, owner: str | None = None) -> Key:
    """Acquire a key; fails if none is available."""
    key = pool.acquire(now, owner)
    assert key is not None, f"no key was served of {pool.available} available"
    return key


def pool_of(count: int, now: float = NOW, **rules: Any) -> tuple[Pool, list[Key]]:
    """A pool and its keys."""
    pool = make_pool(**rules)
    return pool, [pool.generate(now) for _ in range(count)]


def texts_of(page: KeyPage) -> list[str]:
    """What a page shows."""
    return [key.text for key in page.keys]


# ----------------------------------------------------------------------------------------------------- leases


def test_a_late_holder_is_fenced_off_by_its_lease() -> None:
    """Once the key is served again, the former lease frees nothing."""
    pool, (key,) = pool_of(1)
    first = served(pool, NOW, "ann").lease
    assert pool.find(key.text, NOW + BLOCK) is key
    second = served(pool, NOW + BLOCK, "bob").lease
    assert second > first
    with pytest.raises(StaleLease, match=f"lease {first} is over: the key was served again since"):
        pool.unblock(key, first, NOW + BLOCK)
    assert (key.owner, key.release_deadline, key.lease) == ("bob", NOW + 2 * BLOCK, second)


def test_unblock_of_an_available_key_by_its_latest_lease_changes_nothing() -> None:
    """It isn't an error either."""
    pool, (key,) = pool_of(1)
    lease = served(pool, NOW).lease
    pool.find(key.text, NOW + BLOCK)
    assert pool.unblock(key, lease, NOW + BLOCK) == Ended(changed=False)
    assert pool.counters.unblocked == 0
    assert pool.counters.released == 1


@pytest.mark.parametrize(
    ("lease", "words"),
    [(1, "has not been served yet"), (10**18, "has not been served yet")],
)
def test_no_lease_number_fits_a_key_that_was_never_served(lease: int, words: str) -> None:
    """And the error says why."""
    pool, (key,) = pool_of(1)
    with pytest.raises(StaleLease, match=words):
        pool.unblock(key, lease, NOW)


def test_a_lease_number_from_the_future_is_refused() -> None:
    """It was never given out."""
    pool, (key,) = pool_of(1)
    lease = served(pool, NOW).lease
    with pytest.raises(StaleLease, match="its latest lease has a smaller number"):
        pool.unblock(key, lease + 1, NOW)
    assert pool.state_of(key, NOW) is State.BLOCKED


def test_another_keys_lease_number_does_not_fit() -> None:
    """The number is the pool's, but it fits one key only."""
    pool, _ = pool_of(2)
    one, other = served(pool, NOW), served(pool, NOW)
    with pytest.raises(StaleLease):
        pool.unblock(one, other.lease, NOW)


def test_lease_numbers_grow_with_every_acquire_of_the_pool() -> None:
    """Whatever key is served."""
    pool, _ = pool_of(3)
    leases = []
    for _ in range(20):
        key = served(pool, NOW)
        leases.append(key.lease)
        pool.unblock(key, key.lease, NOW)
    assert leases == list(range(1, 21))


def test_unblocking_without_a_lease_frees_whoever_holds_it() -> None:
    """The second time there is nothing to change."""
    pool, (key,) = pool_of(1)
    served(pool, NOW, "ann")
    assert pool.unblock(key, None, NOW) == Ended(changed=True)
    assert pool.unblock(key, None, NOW) == Ended(changed=False)
    assert (pool.available, pool.counters.unblocked) == (1, 1)


def test_a_key_is_in_the_available_list_only_once() -> None:
    """However often it is freed."""
    pool, (key,) = pool_of(1)
    served(pool, NOW)
    for _ in range(3):
        pool.unblock(key, None, NOW)
        pool.process_due(NOW + BLOCK)
        pool.find(key.text, NOW + BLOCK)
    assert pool.available == 1
    assert pool.acquire(NOW, None) is key
    assert pool.acquire(NOW, None) is None


# -------------------------------------------------------------------------------------------------- deadlines


def test_a_block_ends_at_its_deadline_and_not_before() -> None:
    """To the last float."""
    pool, (key,) = pool_of(1)
    served(pool, NOW)
    assert pool.acquire(before(NOW + BLOCK), None) is None
    assert pool.state_of(pool.find(key.text, before(NOW + BLOCK)), before(NOW + BLOCK)) is State.BLOCKED
    assert pool.acquire(NOW + BLOCK, None) is key


def test_a_key_is_known_until_its_deadline_and_not_at_it() -> None:
    """By its text as by its id."""
    pool, (key,) = pool_of(1)
    assert pool.find(key.text, before(NOW + KEEPALIVE)) is key
    assert pool.find_id(key.id, before(NOW + KEEPALIVE)) is key
    with pytest.raises(UnknownKey):
        pool.find(key.text, NOW + KEEPALIVE)
    with pytest.raises(UnknownKey):
        pool.find_id(key.id, NOW + KEEPALIVE)


def test_keepalive_never_moves_the_release() -> None:
    """A key kept alive each second is free again at the moment that acquire set."""
    pool, (key,) = pool_of(1)
    served(pool, NOW, "ann")
    for second in range(1, 60):
        pool.keepalive(pool.find(key.text, NOW + second), NOW + second)
        assert key.release_deadline == NOW + BLOCK
        assert key.owner == "ann"
    assert pool.acquire(before(NOW + BLOCK), None) is None
    assert pool.acquire(NOW + BLOCK, None) is key


def test_keepalive_moves_the_expiry_in_either_state() -> None:
    """Again 300 s from now, blocked or not."""
    pool, (free, held) = pool_of(2)
    pool.acquire(NOW, None)
    blocked = next(key for key in (free, held) if key.release_deadline is not None)
    for key in (free, held):
        pool.keepalive(key, NOW + 10)
        assert key.expires_deadline == NOW + 10 + KEEPALIVE
    assert blocked.release_deadline == NOW + BLOCK


def test_acquire_and_unblock_do_not_move_the_expiry() -> None:
    """Only keepalive moves it."""
    pool, (key,) = pool_of(1)
    for second in range(0, 290, 10):
        pool.unblock(served(pool, NOW + second), None, NOW + second)
    assert key.expires_deadline == NOW + KEEPALIVE


def test_a_blocked_key_that_expires_is_purged() -> None:
    """It is not available after that, though its block would have ended then."""
    pool, (key,) = pool_of(1)
    served(pool, NOW + KEEPALIVE - 1, "ann")
    assert pool.acquire(NOW + KEEPALIVE, None) is None
    with pytest.raises(UnknownKey):
        pool.find(key.text, NOW + KEEPALIVE)
    assert (pool.total, pool.blocked, pool.counters.expired, pool.counters.released) == (0, 0, 1, 0)
    pool.check()


@pytest.mark.parametrize("late", [0.0, 1e-6, 0.02, 100.0])
def test_nothing_revives_an_expired_key(late: float) -> None:
    """No call finds it, no timer frees it, nobody is served it."""
    pool, (key,) = pool_of(1)
    served(pool, NOW + KEEPALIVE - 1)
    text = key.text
    now = key.expires_deadline + late
    with pytest.raises(UnknownKey):
        pool.find(text, now)
    pool.process_due(now)
    assert pool.acquire(now, None) is None
    assert pool.page(PageQuery(), now).keys == []
    assert key.expires_deadline == DEAD
    assert (pool.total, pool.available, pool.blocked, pool.counters.expired) == (0, 0, 0, 1)


def test_a_purged_key_object_is_never_taken_for_a_live_key() -> None:
    """Its deadline is past at every moment, so that it is never taken for a live one."""
    pool, (key,) = pool_of(1)
    pool.delete(key)
    assert key.expires_deadline == DEAD < -1e300
    assert key.slot == -1


def test_ids_are_never_used_again() -> None:
    """Not even of a key that was deleted at once."""
    pool = make_pool()
    ids = []
    for _ in range(5):
        key = pool.generate(NOW)
        ids.append(key.id)
        pool.delete(key)
    assert ids == [1, 2, 3, 4, 5]


# ----------------------------------------------------------------------------------- outcomes, rest and extensions


def test_a_release_a_rest_and_its_end_that_have_all_passed_are_seen_by_one_call() -> None:
    """In order, and none of them is left for later."""
    told: list[Change] = []
    pool, (key,) = pool_of(
        1, rest_seconds=5.0, on_change=lambda change, key, owner, origin: told.append(change)
    )
    served(pool, NOW)
    assert pool.state_of(key, before(NOW + BLOCK + 5)) is State.COOLING
    assert pool.state_of(key, NOW + BLOCK + 5) is State.AVAILABLE
    assert pool.process_due(NOW + BLOCK + 5).more is False
    assert told[2:] == [Change.RELEASED, Change.COOLED, Change.READY]
    assert pool.acquire(NOW + BLOCK + 5, None) is key


def test_a_key_that_expired_before_its_release_is_not_released() -> None:
    """Nor is one ready that expired before the end of its cooldown: `expires` is above all."""
    told: list[Change] = []
    pool, made = pool_of(
        2, max_block_seconds=600.0, on_change=lambda change, key, owner, origin: told.append(change)
    )
    held, limited = served(pool, NOW), served(pool, NOW)
    pool.extend(held, held.lease, 600.0, NOW)
    pool.unblock(limited, limited.lease, NOW, Report(Outcome.RATE_LIMITED, 600.0))
    told.clear()
    assert pool.acquire(NOW + 600, None) is None
    assert told == [Change.EXPIRED] * len(made)
    assert pool.counters.released == 0


def test_an_extension_ends_where_the_rules_let_a_lease_end() -> None:
    """However often it is extended, and that is counted from the acquire."""
    pool, (key,) = pool_of(1, max_block_seconds=90.0)
    served(pool, NOW)
    with pytest.raises(BlockLimit, match=r"lasts 60.000 s more as it is: `seconds` must be larger"):
        pool.extend(key, key.lease, 60.0, NOW)
    pool.extend(key, key.lease, None, NOW + 10)
    assert key.release_deadline == NOW + 70
    pool.extend(key, key.lease, 1e6, NOW + 20)
    assert key.release_deadline == NOW + 90
    with pytest.raises(BlockLimit, match=r"a lease lasts 90 s at most \(max_block_seconds\)"):
        pool.extend(key, key.lease, 1e6, NOW + 30)


def test_restore_calls_off_a_quarantine_and_forgets_what_was_reported() -> None:
    """Of a key that is held: its holder keeps it, and may still report."""
    pool, (key,) = pool_of(1)
    served(pool, NOW)
    pool.quarantine(key, "leaked", False, NOW, HOLDER)
    assert key.history.operator_reason == "leaked"
    pool.restore(key, NOW, HOLDER)
    assert key.history == NO_HISTORY
    assert pool.unblock(key, key.lease, NOW, Report(Outcome.ERROR)) == Ended(changed=True)
    assert (pool.state_of(key, NOW), pool.failures_of(key, NOW)) == (State.AVAILABLE, 1)
    pool.restore(key, NOW, HOLDER)
    assert pool.failures_of(key, NOW) == 0


def test_the_leases_of_an_attempt_are_in_order_after_a_restart() -> None:
    """A journal has them in order of id."""
    pool = make_pool()
    for id, lease in ((1, 9), (2, 7), (3, 8)):
        key = Key(id, f"{id:020}", NOW, NOW + 300, NOW + 60, lease, state=State.BLOCKED, attempt=b"mine" * 4)
        pool.load(key)
    assert [key.lease for key in pool.leases_of(b"mine" * 4, NOW)] == [7, 8, 9]
    assert pool.leases_of(b"mine" * 4, NOW + 60) == []


# --------------------------------------------------------------------------------------------------- settling


def test_process_due_releases_at_the_deadline_and_not_before() -> None:
    """Whenever a timer has it called."""
    pool, (key,) = pool_of(1)
    deadline = served(pool, NOW).release_deadline
    assert deadline is not None
    pool.process_due(math.nextafter(deadline, -math.inf))
    assert (key.release_deadline, pool.counters.released) == (deadline, 0)
    pool.process_due(deadline)
    assert key.release_deadline is None
    assert (pool.available, pool.counters.released, pool.counters.unblocked) == (1, 1, 0)
    pool.process_due(deadline)
    assert (pool.available, pool.counters.released) == (1, 1)


def test_process_due_purges_at_the_deadline_and_not_before() -> None:
    """Likewise."""
    pool, (key,) = pool_of(1)
    deadline = key.expires_deadline
    pool.process_due(math.nextafter(deadline, -math.inf))
    assert (pool.total, pool.counters.expired) == (1, 0)
    pool.process_due(deadline)
    assert (pool.total, pool.counters.expired) == (0, 1)
    pool.process_due(deadline)
    assert (pool.total, pool.counters.expired) == (0, 1)


def test_the_deadline_of_a_former_lease_frees_nothing() -> None:
    """The key was freed and served again meanwhile: it is somebody else's."""
    pool, (key,) = pool_of(1)
    former = served(pool, NOW, "ann").lease
    pool.unblock(key, former, NOW)
    served(pool, NOW + 1, "bob")
    pool.process_due(NOW + BLOCK)
    assert (key.owner, key.release_deadline) == ("bob", NOW + 1 + BLOCK)
    assert pool.counters.released == 0


def test_a_former_expiry_deadline_purges_nothing() -> None:
    """The key was kept alive meanwhile."""
    pool, (key,) = pool_of(1)
    former = key.expires_deadline
    pool.keepalive(key, NOW + 1)
    pool.process_due(former)
    assert pool.find(key.text, former) is key
    assert pool.counters.expired == 0


def test_the_deadlines_of_a_purged_key_do_nothing() -> None:
    """Nothing is counted or reported twice."""
    told: list[Change] = []
    pool, (key,) = pool_of(1, on_change=lambda change, key, owner, origin: told.append(change))
    served(pool, NOW)
    pool.delete(key)
    pool.process_due(NOW + BLOCK)
    pool.process_due(NOW + KEEPALIVE)
    assert told == [Change.GENERATED, Change.ACQUIRED, Change.DELETED]


def test_the_guard_does_not_count_keys_that_have_expired() -> None:
    """Neither among the quarantined ones nor in the pool, even if no timer has fired."""
    pool, made = pool_of(8, max_quarantined_percent=50.0)
    for key in made[2:5]:
        pool.quarantine(key, None, False, NOW, HOLDER)
    now = NOW + KEEPALIVE
    pool.keepalive(made[0], NOW + 1)
    pool.keepalive(made[2], NOW + 1)
    key = served(pool, now)
    assert pool.unblock(key, key.lease, now, Report(Outcome.INVALID)) == Ended(changed=True, guarded=True)
    pool, made = pool_of(8, max_quarantined_percent=50.0)
    for key in made[2:6]:
        pool.quarantine(key, None, False, NOW, HOLDER)
    pool.keepalive(made[0], NOW + 1)
    key = served(pool, now)
    assert pool.unblock(key, key.lease, now, Report(Outcome.INVALID)) == Ended(changed=True, guarded=False)
    assert pool.state_of(key, now) is State.QUARANTINED


# ------------------------------------------------------------------------------------------------- a full pool


def test_a_full_pool_refuses_and_changes_nothing() -> None:
    """One more than `max_keys`."""
    pool, _ = pool_of(3, max_keys=3)
    with pytest.raises(PoolFull, match=r"1 more would exceed max_keys, 3: the pool holds 3"):
        pool.generate(NOW)
    assert (pool.total, pool.last_id, pool.counters.generated) == (3, 3, 3)


def test_room_is_required_for_the_whole_batch() -> None:
    """A batch that fits only in part is refused."""
    pool, _ = pool_of(3, max_keys=5)
    pool.require_room(2, NOW)
    with pytest.raises(PoolFull):
        pool.require_room(3, NOW)


def test_deleting_makes_room() -> None:
    """At once."""
    pool, made = pool_of(3, max_keys=3)
    pool.delete(made[1])
    assert pool.generate(NOW).id == 4


def test_an_expired_key_takes_no_room() -> None:
    """Even if no timer has fired."""
    pool, _ = pool_of(3, max_keys=3)
    pool.require_room(3, NOW + KEEPALIVE)
    assert pool.generate(NOW + KEEPALIVE).id == 4


def test_a_backlog_of_expired_keys_makes_room_in_bounded_steps() -> None:
    """`MAX_DUE_PER_CALL` for each call: a caller that repeats it while some are overdue gets room."""
    pool, _ = pool_of(CROWD, max_keys=CROWD)
    now = NOW + KEEPALIVE
    pool.require_room(MAX_DUE_PER_CALL, now)
    assert pool.total == CROWD - MAX_DUE_PER_CALL
    with pytest.raises(PoolFull):
        pool.require_room(3 * MAX_DUE_PER_CALL, now)
    while pool.overdue(now):
        pool.process_due(now)
    pool.require_room(CROWD, now)
    pool.check()


# ---------------------------------------------------------------------------------------------------- a crowd


def test_a_backlog_of_expired_keys_never_hides_an_available_one() -> None:
    """acquire purges those it draws; callers repeat it while `may_have_more` is true."""
    pool, made = pool_of(CROWD)
    alive = made[CROWD // 2]
    pool.keepalive(alive, NOW + 1)
    now = NOW + KEEPALIVE
    asked = 1
    key = pool.acquire(now, None)
    while key is None and pool.may_have_more(now):
        key, asked = pool.acquire(now, None), asked + 1
    assert key is alive, f"asked {asked} times and got {key!r}"
    assert asked <= CROWD // MAX_DUE_PER_CALL + 1
    pool.check()


def test_a_backlog_of_expired_blocked_keys_never_hides_a_released_one() -> None:
    """Both deadlines of many keys have passed, but only the release of one."""
    pool, _ = pool_of(MAX_DUE_PER_CALL + 1, block_seconds=10.0, keepalive_seconds=20.0)
    now = NOW + 15
    for _ in range(MAX_DUE_PER_CALL + 1):
        last = served(pool, now)
    pool.keepalive(last, now)
    now = NOW + 25  # the releases of all have passed, and the expiries of all but one
    key = pool.acquire(now, None)
    while key is None and pool.may_have_more(now):
        key = pool.acquire(now, None)
    assert key is last, f"{key!r} was served, though {last!r} is available and lives"


def test_a_backlog_is_processed_in_bounded_steps() -> None:
    """No call processes more than `MAX_DUE_PER_CALL` due keys of each kind."""
    told: list[Change] = []
    pool, _ = pool_of(4 * CROWD, on_change=lambda change, key, owner, origin: told.append(change))
    for _ in range(2 * CROWD):
        served(pool, NOW)
    calls: list[Callable[[float], object]] = [
        pool.process_due,
        lambda now: pool.acquire(now, None),
        lambda now: pool.page(PageQuery(limit=500), now),
        lambda now: pool.require_room(1, now),
        lambda now: pool.find_id(4 * CROWD, now) if now < NOW + KEEPALIVE else None,
    ]
    for now in (NOW + BLOCK, NOW + KEEPALIVE):
        for number, call in enumerate(calls):
            told.clear()
            call(now)
            counts = Counter(told)
            shown = 500 if number == 2 else 0  # a page brings what it shows up to date
            assert counts[Change.EXPIRED] <= 2 * MAX_DUE_PER_CALL, f"call {number} at {now}: {counts}"
            assert counts[Change.RELEASED] <= 2 * MAX_DUE_PER_CALL + shown, (
                f"call {number} at {now}: {counts}"
            )


def test_a_page_within_a_backlog_of_expired_keys_shows_none_of_them_and_has_a_next() -> None:
    """It examines a bounded number, so it may be empty and still have a next."""
    count = 2 * PAGE_SCAN_LIMIT + MAX_DUE_PER_CALL
    pool, made = pool_of(count)
    pool.keepalive(made[-1], NOW + 1)
    now = NOW + KEEPALIVE
    shown, pages, query = [], 0, PageQuery(limit=50)
    while True:
        page = pool.page(query, now)
        shown += page.keys
        pages += 1
        if page.next is None:
            break
        query.after = page.next
    assert shown == [made[-1]]
    assert 2 <= pages <= 3, f"{count} keys in {pages} pages of {PAGE_SCAN_LIMIT} examined"


@pytest.mark.parametrize("order", ["id", "release"])
def test_a_page_within_a_backlog_of_ended_blocks_shows_them_as_available(order: str) -> None:
    """Though only some are released on the way: in order of release, where only held keys stand, none is."""
    pool, made = pool_of(CROWD)
    for _ in made:
        served(pool, NOW)
    state = State.BLOCKED if order == "release" else State.AVAILABLE
    page = pool.page(PageQuery(state, None, order, 500), NOW + BLOCK)
    assert len(page.keys) == (0 if order == "release" else CROWD)
    assert all(key.release_deadline is None for key in page.keys)


# ---------------------------------------------------------------------------------------------- loaded keys


def loaded(*rows: tuple[float, float | None], last_lease: int = 999) -> tuple[Pool, list[Key]]:
    """A pool of keys with these expiries and releases, in order of id, as a journal puts them back."""
    pool = make_pool()
    made = []
    for number, (expires, release) in enumerate(rows, 1):
        key = Key(number, f"{number:020}", NOW - 1, expires)
        if release is not None:
            key.state = State.BLOCKED
            key.release_deadline, key.lease, key.owner = release, number, "ann"
        made.append(key)
        pool.last_id = number
        pool.load(key)
    pool.last_lease = last_lease
    return pool, made


def test_loaded_keys_are_unchanged_and_not_reported() -> None:
    """No counter moves."""
    pool, (free, held) = loaded((NOW + 100, None), (NOW + 200, NOW + 30))
    pool.check()
    assert (pool.total, pool.available, pool.blocked) == (2, 1, 1)
    assert set(vars_of_counters(pool).values()) == {0}
    assert pool.find(free.text, NOW) is free
    assert pool.acquire(NOW, None) is free
    assert free.lease == 1000
    assert pool.acquire(before(NOW + 30), None) is None
    assert pool.acquire(NOW + 30, None) is held


def vars_of_counters(pool: Pool) -> dict[str, int]:
    """The counters by name."""
    return {each.name: getattr(pool.counters, each.name) for each in fields(pool.counters)}


QUANTUM_START = math.ceil(NOW * 64) / 64 + 10


def test_a_loaded_key_whose_block_ran_out_is_available_whatever_its_neighbours_are() -> None:
    """Served at the moment of its deadline, though a key with a smaller id is released 10 ms later."""
    pool, (_, key) = loaded((NOW + 100, QUANTUM_START + 0.012), (NOW + 100, QUANTUM_START + 0.002))
    assert pool.acquire(QUANTUM_START + 0.005, None) is key


def test_a_loaded_key_that_expired_takes_no_room_whatever_its_neighbours_do() -> None:
    """Room at the moment of its deadline, though a key with a smaller id expires 10 ms later."""
    pool, _ = loaded((QUANTUM_START + 0.012, None), (QUANTUM_START + 0.002, None))
    pool.rules = PoolRules(max_keys=2)
    pool.require_room(1, QUANTUM_START + 0.005)


def test_the_hint_of_the_earliest_release_is_the_earliest_of_loaded_keys() -> None:
    """Not the one with the smallest id."""
    pool, _ = loaded((NOW + 100, QUANTUM_START + 0.012), (NOW + 100, QUANTUM_START + 0.002))
    assert pool.next_release(QUANTUM_START) == pytest.approx(0.002, abs=1e-6)


def test_process_due_brings_a_loaded_backlog_up_to_date() -> None:
    """As a start after a long stop does."""
    rows = [(NOW + number % 3, NOW + number % 2 if number % 5 else None) for number in range(CROWD)]
    pool, made = loaded(*rows)
    now = NOW + 1
    while pool.overdue(now) or pool.next_release(now) == 0:
        pool.process_due(now)
    pool.check()
    assert {key.id for key in pool.page(PageQuery(limit=500), now).keys} == {
        key.id for key, (expires, _) in zip(made, rows, strict=True) if expires > now
    }
    assert pool.blocked == 0


# ----------------------------------------------------------------------------------------------------- proof


def _in(state: State, pool: Pool) -> Key:
    return next(key for key in pool._by_id.walk(None) if key.state is state)


def _held(pool: Pool) -> Key:
    return _in(State.BLOCKED, pool)


def _free(pool: Pool) -> Key:
    return _in(State.AVAILABLE, pool)


def _swap_slots(pool: Pool) -> None:
    one, other = pool._available[:2]
    one.slot, other.slot = other.slot, one.slot


def _free_twice(pool: Pool) -> None:
    pool._available.append(_free(pool))


def _free_a_held_one(pool: Pool) -> None:
    pool._give_slot(_held(pool))


def _lose_a_free_one(pool: Pool) -> None:
    pool._take_slot(_free(pool))


def _name_an_owner(pool: Pool) -> None:
    _free(pool).owner = "ann"


def _forget_a_release(pool: Pool) -> None:
    _held(pool).release_deadline = None


def _invent_a_release(pool: Pool) -> None:
    _free(pool).release_deadline = NOW + 1


def _lose_from_the_order_of_releases(pool: Pool) -> None:
    key = _held(pool)
    assert key.release_bucket is not None
    pool._by_release.discard(key, key.release_bucket)


def _leave_in_the_order_of_releases(pool: Pool) -> None:
    pool._by_release.add(_free(pool), NOW + BLOCK)


def _lose_from_the_order_of_expiries(pool: Pool) -> None:
    key = _free(pool)
    assert key.expiry_bucket is not None
    pool._by_expiry.discard(key, key.expiry_bucket)


def _forget_the_place_in_the_order_of_expiries(pool: Pool) -> None:
    _free(pool).expiry_bucket = None


def _forget_the_place_in_the_order_of_releases(pool: Pool) -> None:
    _held(pool).release_bucket = None


def _misplace_in_the_order_of_expiries(pool: Pool) -> None:
    _free(pool).expiry_bucket = index.DeadlineBucket(5)


def _move_an_expiry_alone(pool: Pool) -> None:
    _free(pool).expires_deadline += 100


def _move_a_release_alone(pool: Pool) -> None:
    _held(pool).release_deadline = NOW + 1000


def _renumber_a_bucket(pool: Pool) -> None:
    pool._by_expiry._buckets.peekitem(0)[1].number += 1


def _leave_an_empty_bucket(pool: Pool) -> None:
    pool._by_expiry._buckets[1] = index.DeadlineBucket(1)


def _lose_from_the_texts(pool: Pool) -> None:
    pool._by_text.discard(_free(pool))


def _leave_among_the_texts(pool: Pool) -> None:
    pool._by_text.add(Key(77, "Z" * 20, NOW, NOW + 1))


def _change_a_text(pool: Pool) -> None:
    _free(pool).text = "Q" * 20


def _share_a_text(pool: Pool) -> None:
    _free(pool).text = _held(pool).text


def _lose_from_the_ids(pool: Pool) -> None:
    pool._by_id.discard(_free(pool))


def _change_an_id(pool: Pool) -> None:
    *_, last = pool._by_id.walk(None)
    last.id = 1


def _run_ahead_of_the_last_id(pool: Pool) -> None:
    pool.last_id = 1


def _run_ahead_of_the_last_lease(pool: Pool) -> None:
    _held(pool).lease = 1000


def _hold_without_a_lease(pool: Pool) -> None:
    _held(pool).lease = 0


def _keep_a_dead_one(pool: Pool) -> None:
    _free(pool).expires_deadline = DEAD


def _miscount(pool: Pool) -> None:
    pool._total += 1


def _await_a_quarantine_of_a_free_one(pool: Pool) -> None:
    _free(pool).quarantine_pending = True


def _keep_the_attempt_of_a_free_one(pool: Pool) -> None:
    _free(pool).attempt = b"lost" * 4


def _lose_from_the_attempts(pool: Pool) -> None:
    key = _held(pool)
    assert key.attempt is not None
    pool._by_attempt.discard(key, key.attempt)


def _leave_among_the_attempts(pool: Pool) -> None:
    pool._by_attempt.add(_free(pool), b"lost" * 4)


def _lose_from_the_quarantined(pool: Pool) -> None:
    pool._quarantined.remove(_in(State.QUARANTINED, pool).id)
    pool._quarantined.add(_in(State.COOLING, pool).id)


def _leave_among_the_quarantined(pool: Pool) -> None:
    pool._quarantined.add(_free(pool).id)


def _leave_a_stranger_among_the_quarantined(pool: Pool) -> None:
    pool._quarantined.add(77)


def _take_a_cooling_one_for_blocked(pool: Pool) -> None:
    _in(State.COOLING, pool).state = State.BLOCKED


def _miscount_the_cooling(pool: Pool) -> None:
    pool._cooling += 1


_CONTRADICTS_SLOT = r"<Key id:\d+ 0000….*> is {}, which contradicts its slot \S+ of the available ones"
_CONTRADICTS_QUARANTINE = r"<Key id:\d+ .*> is {}, which contradicts the order of quarantined keys"
_OF_A_BLOCKED_KEY = r"<Key id:\d+ .*> is available but has what only a blocked key has"
_HAS_A_PLACE = r"<Key id:\d+ .*> is available but has a release_deadline or a place in its order"
_NOT_IN_BUCKET = r"<Key id:\d+ .*> is not in the bucket of deadlines that it refers to"
_OTHER_COUNTS = r"by id and by state there are \((\d+, ){4}\d+\) keys instead of"
_OTHER_TEXTS = r"by text there are \d+ keys instead of \d+"
CAUGHT = [
    (_swap_slots, _CONTRADICTS_SLOT.format("available")),
    (_free_twice, _OTHER_COUNTS),
    (_free_a_held_one, _HAS_A_PLACE),
    (_lose_a_free_one, _CONTRADICTS_SLOT.format("available")),
    (_name_an_owner, _OF_A_BLOCKED_KEY),
    (_await_a_quarantine_of_a_free_one, _OF_A_BLOCKED_KEY),
    (_keep_the_attempt_of_a_free_one, _OF_A_BLOCKED_KEY),
    (_lose_from_the_attempts, r"<Key id:\d+ .*> is not found by its attempt"),
    (_leave_among_the_attempts, r"2 keys are found by attempt instead of 1"),
    (_lose_from_the_quarantined, _CONTRADICTS_QUARANTINE.format("(quarantined|cooling)")),
    (_leave_among_the_quarantined, _CONTRADICTS_QUARANTINE.format("available")),
    (_leave_a_stranger_among_the_quarantined, _OTHER_COUNTS),
    (_take_a_cooling_one_for_blocked, _OTHER_COUNTS),
    (_miscount_the_cooling, _OTHER_COUNTS),
    (_forget_a_release, r"<Key id:\d+ .*> is blocked but has no release_deadline"),
    (_invent_a_release, _HAS_A_PLACE),
    (_lose_from_the_order_of_releases, _NOT_IN_BUCKET),
    (_leave_in_the_order_of_releases, r"an order of deadlines holds \d+ keys instead of \d+"),
    (_lose_from_the_order_of_expiries, _NOT_IN_BUCKET),
    (_forget_the_place_in_the_order_of_expiries, _NOT_IN_BUCKET),
    (_forget_the_place_in_the_order_of_releases, _NOT_IN_BUCKET),
    (_renumber_a_bucket, _NOT_IN_BUCKET),
    (_leave_an_empty_bucket, r"bucket 1 is empty or numbered 1"),
    (_lose_from_the_texts, r"<Key id:\d+ .*> is not found by its text"),
    (_leave_among_the_texts, _OTHER_TEXTS),
    (_change_a_text, r"<Key id:\d+ .*> is not found by its text"),
    (_share_a_text, r"<Key id:\d+ .*> is not found by its text"),
    (_lose_from_the_ids, _OTHER_COUNTS),
    (_change_an_id, r"the walk by id is out of order or returns a key twice"),
    (_run_ahead_of_the_last_id, r"<Key id:\d+ .*>: id or lease \d+ is beyond the last given"),
    (_run_ahead_of_the_last_lease, r"<Key id:\d+ .*>: id or lease 1000 is beyond the last given"),
    (_hold_without_a_lease, r"<Key id:\d+ .*> is blocked without a lease"),
    (_keep_a_dead_one, r"<Key id:\d+ .*> was purged but is still found by id"),
    (_miscount, _OTHER_COUNTS),
    (_misplace_in_the_order_of_expiries, _NOT_IN_BUCKET),
    (_move_an_expiry_alone, r"<Key id:\d+ .*> has a deadline outside the time of its bucket"),
    (_move_a_release_alone, r"<Key id:\d+ .*> has a deadline outside the time of its bucket"),
]


def corruptible() -> Pool:
    """A pool with keys in each state, of which one is held by an attempt, that passes its check."""
    pool, made = pool_of(9)
    for key in made[:2]:
        pool.unblock(served(pool, NOW + 1, "bob"), None, NOW + 1)
        pool.keepalive(key, NOW + 1)
    attempt = pool.acquire(NOW + 1, "bob", None, b"mine" * 4)
    assert attempt is not None
    served(pool, NOW + 2)
    for report in (Report(Outcome.RATE_LIMITED), Report(Outcome.INVALID)):
        key = served(pool, NOW + 2)
        pool.unblock(key, key.lease, NOW + 2, report)
    assert {key.state for key in made} == set(State)
    pool.check()
    return pool


@pytest.mark.parametrize(("corrupt", "story"), CAUGHT, ids=[corrupt.__name__ for corrupt, _ in CAUGHT])
def test_check_finds_each_kind_of_corruption_and_names_it(
    corrupt: Callable[[Pool], None], story: str
) -> None:
    """By the key that is wrong, where one is, and never by its whole text."""
    pool = corruptible()
    corrupt(pool)
    with pytest.raises(ValueError, match=story) as caught:
        pool.check()
    assert not re.search(r"0{9}|Q{9}|Z{9}", str(caught.value)), f"the story shows a key: {caught.value}"


def test_check_in_slices_yields_after_each_slice() -> None:
    """A pause after each so many keys, for the loop's other work."""
    pool, _ = pool_of(10)
    assert len(list(pool.check_in_slices(3))) == 6, "two walks, of ten keys each"
    assert len(list(pool.check_in_slices(100))) == 0


# ----------------------------------------------------------------------------------------------------- chance


def chi_square(counts: list[int]) -> float:
    """How far counts are from being equal, in standard deviations of what chance gives."""
    expected = sum(counts) / len(counts)
    squares = sum((count - expected) ** 2 / expected for count in counts)
    return (squares - (len(counts) - 1)) / math.sqrt(2 * (len(counts) - 1))


def test_acquire_serves_each_available_key_equally_likely() -> None:
    """However the list was shuffled by keys that came and went."""
    source = random.Random(20)
    pool, made = pool_of(50, random=source.random)
    for key in made[:10]:
        pool.delete(key)
    alive = made[10:]
    counts = Counter[int]()
    for _ in range(20_000):
        key = served(pool, NOW)
        counts[key.id] += 1
        pool.unblock(key, key.lease, NOW)
    assert counts.keys() == {key.id for key in alive}
    assert abs(chi_square(list(counts.values()))) < 4, f"not uniform: {sorted(counts.values())}"


def test_acquire_of_two_serves_each_ordered_pair_equally_likely() -> None:
    """The second choice does not depend on the first."""
    source = random.Random(21)
    pool, _ = pool_of(6, random=source.random)
    pairs = Counter[tuple[int, int]]()
    for _ in range(15_000):
        one, other = served(pool, NOW), served(pool, NOW)
        pairs[one.id, other.id] += 1
        pool.unblock(one, None, NOW)
        pool.unblock(other, None, NOW)
    assert len(pairs) == 6 * 5
    assert abs(chi_square(list(pairs.values()))) < 4, f"not uniform: {pairs}"


def test_the_largest_random_number_chooses_the_last_key() -> None:
    """Never one beyond."""
    pool, made = pool_of(3, random=lambda: math.nextafter(1.0, 0.0))
    assert pool.acquire(NOW, None) is made[-1]


@pytest.mark.parametrize("length", [16, 20, 21, 64])
def test_a_random_text_has_the_length_asked_for(length: int) -> None:
    """And characters of A-Z a-z 0-9 only."""
    for _ in range(200):
        text = random_text(length)
        assert re.fullmatch(rf"[A-Za-z0-9]{{{length}}}", text), f"{len(text)} characters: {text}"


def test_a_random_text_has_each_character_equally_likely_at_each_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Given bytes that are; here they are seeded."""
    source = random.Random(22)
    monkeypatch.setattr("os.urandom", source.randbytes)
    texts = [random_text(16) for _ in range(4000)]
    counts = Counter("".join(texts))
    assert len(counts) == len(ALPHABET) == 62
    assert abs(chi_square(list(counts.values()))) < 4, f"not uniform: {counts}"
    for place in (0, 15):
        at_place = Counter(text[place] for text in texts)
        assert abs(chi_square([at_place[character] for character in ALPHABET])) < 4, f"at {place}: {at_place}"


def test_a_random_text_does_without_the_bytes_that_would_favour_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of bytes that are all dropped only asks for more."""
    answers = iter([bytes(range(248, 256)) * 5, bytes([0] * 40)])
    monkeypatch.setattr("os.urandom", lambda count: next(answers))
    assert random_text(20) == "0" * 20


def test_random_texts_differ() -> None:
    """119 bits: two alike would be a broken source."""
    assert len({random_text(20) for _ in range(10_000)}) == 10_000


# ------------------------------------------------------------------------------------------- what may be shown


def test_a_hint_shows_four_characters_at_each_end() -> None:
    """And an ellipsis between."""
    assert hint("5TRxabcdefghijklVN9w") == "5TRx…VN9w"
    assert Key(42, "5TRxabcdefghijklVN9w", NOW, NOW).hint == "5TRx…VN9w"


def test_a_printed_key_shows_its_hint_only() -> None:
    """In a log, a trace or an event."""
    key = Key(42, "5TRxabcdefghijklVN9w", NOW, NOW)
    event = event_of((Change.ACQUIRED, key, "ann", 7, NOW, HOLDER))
    for shown in (repr(key), str(key), f"{key}", f"{key!r}", repr(event)):
        assert "5TRx…VN9w" in shown, shown
        assert "abcd" not in shown, shown


def test_the_event_of_a_key_that_was_never_served_has_no_lease() -> None:
    """Its lease is None, not 0."""
    key = Key(42, "5TRxabcdefghijklVN9w", NOW, NOW)
    assert event_of((Change.GENERATED, key, None, 0, NOW, HOLDER)).lease is None


# ---------------------------------------------------------------------------------------------------- cursors

QUERIES = [
    ListQuery(limit=2),
    ListQuery(order="id", limit=2),
    ListQuery(order="expiry", limit=2),
    ListQuery(order="release", limit=2),
    ListQuery(prefix="0", limit=2),
    ListQuery(prefix="0000", state="available", limit=2),
    ListQuery(state="blocked", limit=2),
]


def secret_texts() -> Callable[[], str]:
    """Texts that share their first four characters, as a hint shows them, and whose rest is a secret."""
    source = random.Random(23)
    return lambda: "0000" + "".join(source.choices(ALPHABET, k=16))


@pytest.mark.parametrize("query", QUERIES, ids=repr)
def test_a_cursor_leads_on_to_the_page_after(query: ListQuery) -> None:
    """Followed to the end, cursors return every key once."""
    pool, _ = pool_of(9, new_text=secret_texts())
    for _ in range(5):
        served(pool, NOW)
    wanted = len(pool.page(page_query(ListQuery(query.state, query.prefix, query.order, 500)), NOW).keys)
    seen: list[str] = []
    after: str | None = None
    while True:
        asked = page_query(ListQuery(query.state, query.prefix, query.order, 2, after))
        page = pool.page(asked, NOW)
        seen += texts_of(page)
        if page.next is None:
            break
        after = encode(order_of(asked), page.next)
        order = "prefix" if query.prefix else query.order or "id"
        assert decode(after, order) == page.next, "a cursor does not come back as it went"
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,200}", after), f"not fit for a URL: {after}"
    assert len(seen) == len(set(seen)) == wanted > 2


@pytest.mark.parametrize("query", QUERIES, ids=repr)
def test_a_cursor_holds_no_more_of_a_key_than_its_hint(query: ListQuery) -> None:
    """Nothing of it tells two keys apart that share a hint's beginning, but for their ids and deadlines."""
    pool, _ = pool_of(9, new_text=secret_texts())
    twin, _ = pool_of(9, new_text=serial_texts())
    for each in (pool, twin):
        for _ in range(5):
            served(each, NOW)
    asked = page_query(query)
    one, other = pool.page(asked, NOW).next, twin.page(asked, NOW).next
    assert one is not None
    assert other is not None
    payload = encode(order_of(asked), one)
    decoded = json.loads(base64.urlsafe_b64decode(payload + "=="))
    assert all(isinstance(number, (int, float)) for number in decoded[1:]), decoded
    if query.prefix is None:
        assert one == other, "the secret part of the texts shows in the cursor"
    else:
        assert one[0] == other[0], "more than the first four characters shows in the cursor"


@pytest.mark.parametrize("query", QUERIES, ids=repr)
def test_a_cursor_of_another_order_is_refused(query: ListQuery) -> None:
    """Also that of a list with a prefix for one without, and vice versa."""
    pool, _ = pool_of(9)
    for _ in range(5):
        served(pool, NOW)
    asked = page_query(query)
    position = pool.page(asked, NOW).next
    assert position is not None
    text = encode(order_of(asked), position)
    own = "prefix" if query.prefix else query.order or "id"
    for order in {"prefix", "id", "release", "expiry"} - {own}:
        with pytest.raises(BadRequest, match="after must be the next of the previous page"):
            decode(text, order)


def cursor_of(payload: object) -> str:
    """A made-up cursor."""
    return base64.urlsafe_b64encode(json.dumps(payload).encode()).decode().rstrip("=")


GARBAGE = {
    "no base64": "!!!!",
    "not ASCII": "ж" * 4,
    "white space": "WyJp IiwxXQ",
    "a line break": "WyJpIiwxXQ\n",
    "no JSON": base64.urlsafe_b64encode(b"\xff\xfe").decode(),
    "cut": cursor_of(["i", 1])[:-2],
    "no list": cursor_of({"i": 1}),
    "an empty list": cursor_of([]),
    "no number": cursor_of(["i"]),
    "too many numbers": cursor_of(["i", 1, 2]),
    "a text for a number": cursor_of(["i", "1"]),
    "a null": cursor_of(["i", None]),
    "a bool": cursor_of(["i", True]),
    "a list in it": cursor_of(["i", [1]]),
    "a negative number": cursor_of(["i", -1]),
    "a number too large": cursor_of(["i", 2**63]),
    "a float too large": cursor_of(["i", 1e300]),
    "a number for a letter": cursor_of([1, 1]),
    "an unknown letter": cursor_of(["x", 1]),
    "NaN": base64.urlsafe_b64encode(b'["i",NaN]').decode().rstrip("="),
    "infinity": base64.urlsafe_b64encode(b'["i",1e999]').decode().rstrip("="),
    "a deep list": base64.urlsafe_b64encode(b"[" * 140).decode().rstrip("="),
}


@pytest.mark.parametrize("text", GARBAGE.values(), ids=GARBAGE.keys())
def test_an_invalid_cursor_is_refused(text: str) -> None:
    """With BadRequest, whatever it is."""
    with pytest.raises(BadRequest, match="after must be the next of the previous page"):
        decode(text, "id")


@SETTINGS
@given(text=st.text(min_size=1, max_size=200), order=st.sampled_from(["prefix", "id", "release", "expiry"]))
def test_any_text_is_a_cursor_or_a_bad_request(text: str, order: str) -> None:
    """It never raises another error."""
    try:
        position = decode(text, order)
    except BadRequest:
        return
    assert all(isinstance(number, int | float) and 0 <= number < 2**63 for number in position)


NUMBERS = st.one_of(
    st.integers(0, 2**63 - 1), st.integers(0, 20), st.floats(0, 1e18), st.floats(NOW - 1, NOW + 400)
)


@SETTINGS
@given(
    query=st.sampled_from(QUERIES),
    position=st.tuples(NUMBERS, NUMBERS, NUMBERS),
)
def test_a_made_up_cursor_leads_somewhere_in_the_same_list(
    query: ListQuery, position: tuple[int | float, int | float, int | float]
) -> None:
    """It shows only what the list shows anyway, in order, and no error but a bad request."""
    pool, _ = pool_of(9, new_text=secret_texts())
    for _ in range(5):
        served(pool, NOW)
    order = "prefix" if query.prefix else query.order or "id"
    count = {"prefix": 2, "id": 1}.get(order, 3)
    letter = {"prefix": "p", "id": "i", "release": "r", "expiry": "e"}[order]
    text = cursor_of([letter, *position[:count]])
    whole = texts_of(pool.page(page_query(ListQuery(query.state, query.prefix, query.order, 500)), NOW))
    page = pool.page(page_query(ListQuery(query.state, query.prefix, query.order, 500, text)), NOW)
    assert texts_of(page) == whole[len(whole) - len(page.keys) :], "not the rest of the same list"


@pytest.mark.parametrize(
    ("query", "words"),
    [
        (ListQuery(prefix="A", order="id"), "prefix can't be combined with order"),
        (ListQuery(prefix="A", order="expiry"), "prefix can't be combined with order"),
        (ListQuery(order="release", state="available"), "order=release lists blocked keys only"),
    ],
    ids=repr,
)
def test_parameters_that_exclude_each_other_are_refused(query: ListQuery, words: str) -> None:
    """The error says what would be right."""
    with pytest.raises(BadRequest, match=words):
        page_query(query)


def test_a_walk_goes_on_behind_a_key_that_is_gone() -> None:
    """The cursor is a position, not a key."""
    pool, made = pool_of(6)
    first = pool.page(PageQuery(limit=3), NOW)
    assert first.keys == made[:3]
    for key in made[1:4]:
        pool.delete(key)
    assert pool.page(PageQuery(limit=3, after=first.next), NOW).keys == made[4:]


def test_a_walk_by_prefix_may_repeat_keys_but_misses_none() -> None:
    """Those that share four characters with a key that is gone, which the cursor can't tell apart."""
    pool, made = pool_of(6)
    query = PageQuery(prefix="0000", limit=3)
    first = pool.page(query, NOW)
    assert first.keys == made[:3]
    pool.delete(made[2])
    query.after = first.next
    query.limit = 10
    assert pool.page(query, NOW).keys == [*made[:2], *made[3:]]


def test_a_page_that_ends_the_list_has_no_next() -> None:
    """Not even if it is full."""
    pool, made = pool_of(4)
    assert pool.page(PageQuery(limit=4), NOW).next is None
    page = pool.page(PageQuery(limit=3), NOW)
    assert page.next is not None
    last = pool.page(PageQuery(limit=3, after=page.next), NOW)
    assert (last.keys, last.next) == (made[3:], None)


def test_the_order_by_release_is_soonest_first() -> None:
    """Held keys only."""
    pool, _ = pool_of(5, random=random.Random(24).random)
    order = [served(pool, NOW + second) for second in range(4)]
    assert pool.page(PageQuery(State.BLOCKED, None, "release"), NOW + 4).keys == order


def test_the_order_by_expiry_is_soonest_first() -> None:
    """As keepalives have moved it."""
    pool, made = pool_of(4)
    for second, number in enumerate((2, 0, 3), 1):
        pool.keepalive(made[number], NOW + second)
    page = pool.page(PageQuery(order="expiry"), NOW + 4)
    assert page.keys == [made[1], made[2], made[0], made[3]]
