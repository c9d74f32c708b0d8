"""The life of a key against the plainest model of it, in every order that Hypothesis can think of.

What holders report and operators do is the matter of test_pool_leases_machine.py.

Two naive tables stand beside the pool. `truth` follows the deadlines alone: a key's state is what they make it at this
moment. `told` is what the reported changes add up to. After each step the pool must pass its own `check()`, agree with
`told`, and differ from `truth` only by deadlines that have passed and aren't processed yet.

Time moves by any step, onto deadlines and just before them. Timers fire late, twice or never: `settle` may be called at
any moment. The buckets that the pool has reported as open are those that hold a key.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
from engine_support import BLOCK, KEEPALIVE, START, make_pool
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from keypool.core import pool as pool_module
from keypool.core.counters import COUNTERS
from keypool.core.errors import PoolFull, StaleLease, UnknownKey
from keypool.core.events import Change, Origin
from keypool.core.index import DeadlineBucket
from keypool.core.keys import DEAD, Key, State
from keypool.core.keyset import PageQuery
from keypool.core.pool import Ended

MAX_KEYS = 10
PAGE_SCAN_LIMIT = 4
PREFIXES = ("AAAA", "AAAB", "AABA", "zzzz")
COUNTED = [change for change in Change if change.value in COUNTERS]
BY_TIME = (Change.RELEASED, Change.EXPIRED)


@dataclass
class Fact:
    """A key in a table."""

    text: str
    created_at: float
    expires: float
    release: float | None = None
    lease: int = 0
    served: int = 0
    owner: str | None = None

    def lives(self, now: float) -> bool:
        """Whether its expiry is still to come."""
        return self.expires > now

    def state(self, now: float) -> State:
        """The state by its release deadline."""
        return State.BLOCKED if self.release is not None and self.release > now else State.AVAILABLE

    def free(self) -> None:
        """End the block."""
        self.release = self.owner = None


@dataclass
class Walk:
    """A list that is read page by page while the pool changes."""

    query: PageQuery
    must: dict[int, float | None]
    """Ids that matched at its start and ever since, with the deadline they then had in the list's order."""
    seen: list[int] = field(default_factory=list)


class PoolMachine(RuleBasedStateMachine):
    """See the module."""

    settled_at_once: ClassVar[int] = pool_module.MAX_DUE_PER_CALL

    def __init__(self) -> None:
        super().__init__()
        self._patches = pytest.MonkeyPatch()
        self._patches.setattr(pool_module, "MAX_DUE_PER_CALL", self.settled_at_once)
        self._patches.setattr(pool_module, "PAGE_SCAN_LIMIT", PAGE_SCAN_LIMIT)
        self.now = START
        self.chance = 0.0
        self.prefix = PREFIXES[0]
        self.truth: dict[int, Fact] = {}
        self.told: dict[int, Fact] = {}
        self.counts: Counter[Change] = Counter()
        self.heard: list[Change] = []
        self.keys: list[Key] = []  # all that there ever were
        self.last_lease = 0
        self.open: dict[int, DeadlineBucket] = {}  # as told, by id()
        self.walks: list[Walk] = []
        self.pool = make_pool(
            max_keys=MAX_KEYS,
            new_text=self._new_text,
            random=lambda: self.chance,
            on_change=self._told,
            on_opened=self._opened,
            on_closed=self._closed,
        )

    def teardown(self) -> None:
        self._patches.undo()

    def _new_text(self) -> str:
        return f"{self.prefix}{len(self.keys):016d}"

    # -- what the pool tells

    def _opened(self, bucket: DeadlineBucket) -> None:
        assert id(bucket) not in self.open, f"bucket {bucket.number} is told open twice"
        self.open[id(bucket)] = bucket

    def _closed(self, bucket: DeadlineBucket) -> None:
        assert not bucket, f"bucket {bucket.number} is told closed with {len(bucket)} keys in it"
        assert self.open.pop(id(bucket), None) is bucket, f"bucket {bucket.number} was not open"

    def _told(self, change: Change, key: Key, owner: str | None, origin: Origin) -> None:
        """Apply a change as a reader of the feed would."""
        self.heard.append(change)
        self.counts[change] += 1
        story = f"{change} of {key!r} at {self.now}"
        if change is Change.GENERATED:
            assert key.id not in self.told, f"{story}: this id was told before"
            self.told[key.id] = Fact(key.text, self.now, self.now + KEEPALIVE)
            return
        fact = self.told.get(key.id)
        assert fact is not None, f"{story}: nobody was told of such a key, or it was told to be gone"
        if change is Change.KEPT_ALIVE:
            fact.expires = self.now + KEEPALIVE
        elif change is Change.ACQUIRED:
            assert fact.release is None, f"{story}: it is held by {fact.owner!r} under lease {fact.lease}"
            assert fact.lives(self.now), f"{story}: it expired at {fact.expires}"
            fact.lease = self.pool.last_lease
            fact.served += 1
            fact.owner, fact.release = owner, self.now + BLOCK
        elif change in (Change.UNBLOCKED, Change.RELEASED):
            assert fact.release is not None, f"{story}: it is available"
            assert owner == fact.owner, f"{story}: told as {owner!r}'s, but {fact.owner!r} held it"
            due = change is Change.UNBLOCKED or fact.release <= self.now
            assert due, f"{story}: its block runs until {fact.release}"
            fact.free()
        else:
            assert owner == fact.owner, f"{story}: told as {owner!r}'s, but {fact.owner!r} held it"
            due = change is Change.DELETED or not fact.lives(self.now)
            assert due, f"{story}: it lives until {fact.expires}"
            assert key.expires_deadline == DEAD, f"{story}: whoever holds it could take it for a live key"
            del self.told[key.id]

    def _expect(self, *changes: Change) -> None:
        """Fail unless the step reported these changes and no others but those of passed deadlines."""
        heard = [change for change in self.heard if change not in BY_TIME]
        self.heard.clear()
        assert heard == list(changes), f"told {heard}, wanted {list(changes)}"

    # -- what is true

    def _live(self) -> dict[int, Fact]:
        return {id: fact for id, fact in self.truth.items() if fact.lives(self.now)}

    def _available(self) -> set[int]:
        return {id for id, fact in self._live().items() if fact.state(self.now) is State.AVAILABLE}

    def _find(self, which: int, by_text: bool) -> Key | None:
        """Any key of the past or present, as `find` finds it; None if it isn't alive."""
        key = self.keys[which % len(self.keys)]
        lives = key.id in self._live()
        try:
            found = self.pool.find(key.text, self.now) if by_text else self.pool.find_id(key.id, self.now)
        except UnknownKey:
            assert not lives, f"{key!r} lives until {self.truth[key.id].expires} but is unknown at {self.now}"
            return None
        assert lives, f"{key!r} is past its deadline or deleted, but was found at {self.now}"
        assert found is key, f"asked for {key!r}, got {found!r}"
        assert self.pool.state_of(key, self.now) is self.truth[key.id].state(self.now)
        blocked = key.release_deadline is not None
        assert blocked == (self.truth[key.id].state(self.now) is State.BLOCKED), (
            f"{key!r} was found but is not up to date: release {key.release_deadline} at {self.now}"
        )
        return key

    def _settle_crowd(self) -> None:
        """Process expired keys, as the engine does before it reports that the pool is full."""
        while self.pool.overdue(self.now):
            before = self.pool.total
            self.pool.process_due(self.now)
            assert self.pool.total < before, "settling does not get on"

    # -- the calls

    @rule(prefix=st.sampled_from(PREFIXES))
    def generate(self, prefix: str) -> None:
        """Generate a key, unless the pool is full of live keys."""
        self.prefix = prefix
        if self.pool.total >= MAX_KEYS:
            self._settle_crowd()
        live = len(self._live())
        try:
            key = self.pool.generate(self.now)
        except PoolFull:
            assert live >= MAX_KEYS, f"refused as full with {live} keys alive of {MAX_KEYS}"
            self._expect()
            return
        assert live < MAX_KEYS, f"made one more than {MAX_KEYS}"
        assert key.id == len(self.keys) + 1, f"id {key.id} after {len(self.keys)} keys"
        self.keys.append(key)
        self.truth[key.id] = Fact(key.text, self.now, self.now + KEEPALIVE)
        self._expect(Change.GENERATED)

    @rule(count=st.integers(1, MAX_KEYS + 1))
    def require_room(self, count: int) -> None:
        """There is room if the live keys leave some."""
        if self.pool.total + count > MAX_KEYS:
            self._settle_crowd()
        fits = len(self._live()) + count <= MAX_KEYS
        try:
            self.pool.require_room(count, self.now)
        except PoolFull:
            assert not fits, f"refused {count} beside {len(self._live())} of {MAX_KEYS}"
        else:
            assert fits, f"granted {count} beside {len(self._live())} of {MAX_KEYS}"
        self._expect()

    @rule(
        chance=st.floats(0, 1, exclude_max=True),
        owner=st.sampled_from([None, "ann", "bob"]),
    )
    def acquire(self, chance: float, owner: str | None) -> None:
        """Serve a key that is available by its deadlines, if there is one."""
        self.chance = chance
        wanted = self._available()
        key = self.pool.acquire(self.now, owner)
        asked = 1
        while key is None and self.pool.may_have_more(self.now):
            assert asked <= len(self.keys) + 1, "asking again does not get on"
            key = self.pool.acquire(self.now, owner)
            asked += 1
        if key is None:
            assert not wanted, f"nothing was served though ids {sorted(wanted)} are available at {self.now}"
            self._expect()
            return
        assert key.id in wanted, f"served {key!r}, but only ids {sorted(wanted)} are available at {self.now}"
        assert key.lease > self.last_lease, f"lease {key.lease} after {self.last_lease}"
        assert key.release_deadline is not None, f"{key!r} was served but not blocked"
        fact = self.truth[key.id]
        fact.lease, fact.owner, fact.release = key.lease, owner, self.now + BLOCK
        fact.served += 1
        assert key.served == fact.served, f"{key!r} was served {fact.served} times"
        self.last_lease = key.lease
        self._expect(Change.ACQUIRED)

    @precondition(lambda self: self.keys)
    @rule(
        which=st.integers(0, 99),
        by_text=st.booleans(),
        lease=st.sampled_from(["none", "latest", "stale", "future"]),
        other=st.integers(0, 99),
    )
    def unblock(self, which: int, by_text: bool, lease: str, other: int) -> None:
        """The latest lease number or no number ends the lease; any other changes nothing."""
        key = self._find(which, by_text)
        if key is None:
            self._expect()
            return
        blocked = self.truth[key.id].state(self.now) is State.BLOCKED
        given = {
            "none": None,
            "latest": key.lease or 1,
            "stale": other % (key.lease + 1),
            "future": self.pool.last_lease + 1 + other,
        }[lease]
        before = replace(self.told[key.id])
        try:
            ended = self.pool.unblock(key, given, self.now)
        except StaleLease:
            assert given is not None, "no lease was given, and it was refused"
            assert given != (key.lease or None), f"lease {given} is the latest of {key!r} and was refused"
            assert self.told[key.id] == before, "a refused call changed the key"
            self._expect()
            return
        assert given in (None, key.lease or None), f"lease {given} freed {key!r}, whose latest is {key.lease}"
        assert ended == Ended(blocked), f"{ended} for a key that was {'blocked' if blocked else 'free'}"
        self.truth[key.id].free()
        self._expect(*[Change.UNBLOCKED] * blocked)

    @precondition(lambda self: self.keys)
    @rule(which=st.integers(0, 99), by_text=st.booleans())
    def keepalive(self, which: int, by_text: bool) -> None:
        """Keepalive moves the expiry and nothing else."""
        key = self._find(which, by_text)
        if key is None:
            self._expect()
            return
        before = replace(self.told[key.id])
        self.pool.keepalive(key, self.now)
        self.truth[key.id].expires = self.now + KEEPALIVE
        assert self.told[key.id] == replace(before, expires=self.now + KEEPALIVE), "keepalive moved more"
        assert key.release_deadline == before.release, "keepalive moved the release"
        self._expect(Change.KEPT_ALIVE)

    @precondition(lambda self: self.keys)
    @rule(which=st.integers(0, 99), by_text=st.booleans())
    def delete(self, which: int, by_text: bool) -> None:
        """Purge a key in any state."""
        key = self._find(which, by_text)
        if key is None:
            self._expect()
            return
        self.pool.delete(key)
        del self.truth[key.id]
        self._expect(Change.DELETED)

    @precondition(lambda self: self.keys)
    @rule(which=st.integers(0, 99), by_text=st.booleans())
    def find(self, which: int, by_text: bool) -> None:
        """A key is known exactly as long as it is alive."""
        self._find(which, by_text)
        self._expect()

    @rule(text=st.sampled_from(["", "A", "AAAA", "AAAA" + "9" * 16]), id=st.integers(-3, 0))
    def find_nothing(self, text: str, id: int) -> None:
        """A text that was never generated is unknown."""
        with pytest.raises(UnknownKey):
            self.pool.find(text, self.now)
        with pytest.raises(UnknownKey):
            self.pool.find_id(id, self.now)
        self._expect()

    # -- time and timers

    @rule(seconds=st.sampled_from([0.0, 1e-6, 0.001, 1 / 64, 0.5, 1.0, 29.0, 30.0, 59.999, 240.0, 301.0]))
    def time_passes(self, seconds: float) -> None:
        """Advance the clock by any step."""
        self.now += seconds

    @rule(which=st.integers(0, 99), side=st.sampled_from(["onto", "before"]))
    def time_comes_to_a_deadline(self, which: int, side: str) -> None:
        """Advance the clock to a deadline, or to the float before it."""
        deadlines = {fact.expires for fact in self.told.values()}
        deadlines |= {fact.release for fact in self.told.values() if fact.release is not None}
        to_come = sorted(deadline for deadline in deadlines if deadline > self.now)
        if to_come:
            deadline = to_come[which % len(to_come)]
            self.now = deadline if side == "onto" else max(self.now, math.nextafter(deadline, -math.inf))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 99), late=st.sampled_from([0.0, 0.002, 1.0]))
    def a_timer_fires(self, which: int, late: float) -> None:
        """Fire a timer: everything due is processed, in slices."""
        ends = sorted(bucket.ends for bucket in self.open.values())
        self.now = max(self.now, ends[which % len(ends)] + late)
        while self.pool.overdue(self.now) or self.pool.next_release(self.now) == 0:
            self.settle()
        assert all(bucket.ends > self.now for bucket in self.open.values()), "overdue after its timer"

    @rule()
    def settle(self) -> None:
        """Process a bounded number of due keys."""
        self.pool.process_due(self.now)
        released, expired = self.heard.count(Change.RELEASED), self.heard.count(Change.EXPIRED)
        assert released <= self.settled_at_once, f"{released} released at once"
        # Expired ones, and those whose release was due but that have expired before.
        assert expired <= 2 * self.settled_at_once, f"{expired} purged at once"
        if self.settled_at_once >= MAX_KEYS:
            assert not self.pool.overdue(self.now), "something is overdue after settling"
        self._expect()

    # -- lists

    @rule(
        state=st.sampled_from([None, State.AVAILABLE, State.BLOCKED]),
        order=st.sampled_from(["id", "expiry", "release", *PREFIXES, "A", "AA", "AAA", "z", "B"]),
        limit=st.integers(1, 5),
    )
    def start_a_walk(self, state: State | None, order: str, limit: int) -> None:
        """Read the first page of a list."""
        prefix = order if order not in ("id", "expiry", "release") else None
        query = PageQuery(State.BLOCKED if order == "release" else state, prefix, order, limit)
        if prefix is not None:
            query.order = "id"
        walk = Walk(query, {})
        walk.must = self._matching(query)
        self.walks = [*self.walks[-2:], walk]
        self._turn_page(walk)

    @precondition(lambda self: self.walks)
    @rule(which=st.integers(0, 2), limit=st.integers(1, 5))
    def go_on_with_a_walk(self, which: int, limit: int) -> None:
        """Read the next page, maybe of another length."""
        walk = self.walks[which % len(self.walks)]
        walk.query.limit = limit
        self._turn_page(walk)

    def _matching(self, query: PageQuery) -> dict[int, float | None]:
        """The whole list at this moment, with each key's deadline in its order."""
        deadline = {"expiry": lambda fact: fact.expires, "release": lambda fact: fact.release}
        deadline_of: Any = deadline.get(query.order, lambda fact: None)
        return {
            id: deadline_of(fact)
            for id, fact in self._live().items()
            if query.state in (None, fact.state(self.now)) and fact.text.startswith(query.prefix or "")
        }

    def _turn_page(self, walk: Walk) -> None:
        query, matching = walk.query, self._matching(walk.query)
        page = self.pool.page(query, self.now)
        ids = [key.id for key in page.keys]
        self._expect()
        assert len(ids) <= query.limit, f"{len(ids)} keys on a page of {query.limit}"
        assert set(ids) <= matching.keys(), f"listed {ids}, but only {sorted(matching)} match at {self.now}"
        for key in page.keys:
            late = key.release_deadline is not None and key.release_deadline <= self.now
            assert not late, f"{key!r} was listed but is not up to date"
        places = [self._place(query, key) for key in page.keys]
        assert places == sorted(set(places)), f"a page out of order, or with a key twice: {places}"
        walk.seen += ids
        walk.query = replace(query, after=page.next)
        if page.next is not None:
            assert not any(isinstance(number, str) for number in page.next), f"a cursor of text: {page.next}"
            return
        self.walks.remove(walk)
        self._expect_whole(walk)

    def _place(self, query: PageQuery, key: Key) -> tuple[Any, ...]:
        if query.prefix is not None:
            return (key.text,)
        return {"id": (), "expiry": (key.expires_deadline,), "release": (key.release_deadline,)}[
            query.order
        ] + (key.id,)

    def _expect_whole(self, walk: Walk) -> None:
        """Fail unless the walk returned all keys that didn't move meanwhile; in order of id, each once."""
        seen = Counter(walk.seen)
        missed = walk.must.keys() - seen.keys()
        assert not missed, f"a walk {walk.query} saw {walk.seen} and missed ids {sorted(missed)}"
        if walk.query.prefix is not None:
            return  # those at the cursor may be met again
        twice = [id for id in seen if seen[id] > 1 and (walk.query.order == "id" or id in walk.must)]
        assert not twice, f"a walk {walk.query} saw {walk.seen}: ids {twice} more than once"

    # -- what holds at all times

    @invariant()
    def stands_still_for_walks(self) -> None:
        """Record for each walk the keys that have moved: it may miss them."""
        for walk in self.walks:
            now = self._matching(walk.query)
            walk.must = {id: place for id, place in walk.must.items() if now.get(id, "gone") == place}

    @invariant()
    def the_pool_is_whole(self) -> None:
        """The pool passes its own check."""
        self.pool.check()

    @invariant()
    def the_pool_is_what_it_told(self) -> None:
        """The reported changes add up to all keys and counts."""
        held = {
            key.id: Fact(
                key.text,
                key.created_at,
                key.expires_deadline,
                key.release_deadline,
                key.lease,
                key.served,
                key.owner,
            )
            for key in self.pool._by_id.walk(None)
        }
        assert held == self.told
        blocked = sum(fact.release is not None for fact in self.told.values())
        counts = (self.pool.total, self.pool.available, self.pool.blocked)
        assert counts == (len(self.told), len(self.told) - blocked, blocked)

    @invariant()
    def every_deadline_has_a_bucket_that_is_told_open(self) -> None:
        """No open bucket is empty: so a timer for each bucket covers every deadline, and no timer is superfluous."""
        buckets = list(self.pool.deadline_buckets())
        assert {id(bucket) for bucket in buckets} == self.open.keys()
        assert all(buckets), "an open bucket is empty"
        for key in self.pool._by_id.walk(None):
            for deadline, bucket in (
                (key.expires_deadline, key.expiry_bucket),
                (key.release_deadline, key.release_bucket),
            ):
                assert (deadline is None) == (bucket is None)
                if deadline is not None and bucket is not None:
                    assert id(bucket) in self.open, f"{key!r} is in a bucket that was told closed"
                    assert 0 < bucket.ends - deadline <= 1 / 64, f"{key!r} is in a bucket of another time"

    @invariant()
    def what_it_told_is_true(self) -> None:
        """Where the pool differs from the truth, a deadline has passed that isn't processed yet."""
        live = self._live()
        for id, fact in self.told.items():
            assert id in live or not fact.lives(self.now), f"id:{id} was told to live and does not"
        for id, fact in live.items():
            told = self.told.get(id)
            assert told is not None, f"id:{id} lives until {fact.expires} and was told to be gone"
            same = (told.expires, told.lease, told.state(self.now))
            assert same == (fact.expires, fact.lease, fact.state(self.now)), f"id:{id} is {fact}, told {told}"

    @invariant()
    def the_counters_are_the_events(self) -> None:
        """Each counter equals the number of its changes."""
        counters = self.pool.counters
        for change in COUNTED:
            counted = getattr(counters, change.value)
            assert counted == self.counts[change], f"{change}: {counted}, told {self.counts[change]}"

    @invariant()
    def the_hints_of_time_are_right(self) -> None:
        """`overdue` and `next_release` agree with a scan of all keys."""
        overdue = any(not fact.lives(self.now) for fact in self.told.values())
        assert self.pool.overdue(self.now) == overdue
        releases = [fact.release for fact in self.told.values() if fact.release is not None]
        earliest = max(0.0, min(releases) - self.now) if releases else None
        assert self.pool.next_release(self.now) == earliest


class CrowdedPoolMachine(PoolMachine):
    """The same with two keys processed at a time, so that a few overdue keys are a backlog."""

    settled_at_once = 2


SETTINGS = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_the_pool_agrees_with_the_plain_model_whatever_happens_in_whatever_order() -> None:
    """All calls, with stale leases too, and all timers: on time, late or never."""
    run_state_machine_as_test(PoolMachine, settings=SETTINGS)


@pytest.mark.thorough
def test_the_pool_agrees_with_the_plain_model_when_any_few_overdue_keys_are_a_crowd() -> None:
    """The same, with two keys processed at a time."""
    run_state_machine_as_test(CrowdedPoolMachine, settings=SETTINGS)
