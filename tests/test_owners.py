"""Who holds keys: the index of owners against a plain model, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine_support import make_pool
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from keypool.core import owners as owners_module
from keypool.core.keys import Key, State
from keypool.core.keyset import PageQuery
from keypool.core.owners import Holding, OwnerIndex
from keypool.core.pool import Pool
from keypool.core.self_check import SelfCheck

OWNERS = st.sampled_from([None, "ann", "bob", "ann\U0001f600", "z"])
CLIENTS = st.sampled_from([None, "ci", "prod"])
NOW = 1_700_000_000.0


class Owners(RuleBasedStateMachine):
    """The index, with small buckets and a short memory, against a list of leases."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(owners_module, "_FULL", 3)
        self.patch.setattr(owners_module, "MOST_REMEMBERED", 4)
        self.index = OwnerIndex()
        self.now = NOW
        self.lease = 0
        self.keys: list[Key] = []
        self.ran_out: list[tuple[str | None, str | None, float]] = []

    def teardown(self) -> None:
        self.patch.undo()

    @rule(owner=OWNERS, client=CLIENTS, skipped=st.integers(0, 700))
    def begin(self, owner: str | None, client: str | None, skipped: int) -> None:
        self.lease += 1 + skipped
        key = Key(len(self.keys) + 1000 - self.lease % 7, "x" * 20, NOW, NOW, lease=self.lease)
        while any(key.id == other.id for other in self.keys):
            key.id += 1000
        key.owner, key.client, key.acquired_at = owner, client, self.now
        self.keys.append(key)
        self.index.begin(key, owner, client)

    @rule(which=st.integers(0, 99), overdue=st.booleans())
    def end(self, which: int, overdue: bool) -> None:
        if self.keys:
            key = self.keys.pop(which % len(self.keys))
            if overdue and key.holder is not None:
                key.holder.count_released(self.now)
                self.ran_out.append((key.owner, key.client, self.now))
            self.index.end(key)

    @rule(seconds=st.sampled_from([1.0, 29.0, 31.0, 150.0, 400.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def restart(self) -> None:
        """Keys are loaded in order of id, and some end before they are in order."""
        self.index = OwnerIndex()
        self.ran_out.clear()
        for key in sorted(self.keys, key=lambda key: key.id):
            key.holder = None
            self.index.load(key)
        if self.keys:
            self.index.end(self.keys.pop())
        assert list(self.index.settle()) is not None

    @invariant()
    def it_is_whole(self) -> None:
        self.index.check(len(self.keys))

    @invariant()
    def pages_have_each_holder_once_in_order_of_name(self) -> None:
        names = {(key.owner, key.client) for key in self.keys}
        order = sorted(names, key=lambda name: (name[0] or "", name[1] or ""))
        found = list(self._walk(limit=2))
        assert [(each.owner, each.client) for each in found] == order
        for each in found:
            own = [key for key in self.keys if (key.owner, key.client) == (each.owner, each.client)]
            assert (each.held, each.acquired_at) == (
                len(own),
                min(own, key=lambda key: key.lease).acquired_at,
            )
            moments = [
                at for owner, client, at in self.ran_out if (owner, client) == (each.owner, each.client)
            ]
            certainly = sum(self.now - at < 270 for at in moments)
            assert certainly <= each.released <= sum(self.now - at < 300 for at in moments) or (
                each.released == 0 and len(names) > 4  # forgotten
            )

    def _walk(self, limit: int) -> Iterator[Holding]:
        after = None
        while True:
            page = self.index.page(after, limit, 3, self.now)
            assert len(page.holders) <= limit
            yield from page.holders
            if page.next is None:
                return
            after = page.next

    @invariant()
    def the_keys_of_an_owner_are_in_order_of_lease(self) -> None:
        for owner in ("ann", "z"):
            own = sorted(key.lease for key in self.keys if key.owner == owner)
            assert [key.lease for key in self.index.held_by(owner, 0)] == own
            if own:
                middle = own[len(own) // 2]
                assert [key.lease for key in self.index.held_by(owner, middle)] == own[len(own) // 2 + 1 :]
        of_ci = sorted(key.lease for key in self.keys if (key.owner, key.client) == ("ann", "ci"))
        assert [key.lease for key in self.index.held_by("ann", 0, "ci")] == of_ci


TestOwners = Owners.TestCase
TestOwners.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def pool_of(owners: int) -> Pool:
    """A pool in which so many owners hold a key each, and one key is free."""
    pool = make_pool(max_keys=20_000)
    for _ in range(owners + 1):
        pool.generate(NOW)
    for number in range(owners):
        assert pool.acquire(NOW, f"worker-{number}") is not None
    return pool


class Steps:
    """Counts comparisons of names, which is what a search in their order makes."""

    def __init__(self) -> None:
        self.count = 0

    def name(self, text: str) -> str:
        """An owner whose comparisons are counted."""
        steps = self

        class Counted(str):
            __slots__ = ()

            def __lt__(self, other: str) -> bool:
                steps.count += 1
                return str.__lt__(self, other)

            __hash__ = str.__hash__

        return Counted(text)


def test_an_owner_that_comes_and_goes_touches_nothing_that_grows() -> None:
    """With 10,000 owners an acquire and an unblock of one that is known search nothing, of a new one O(log n)."""
    pool = pool_of(10_000)
    index = pool._owners
    steps = Steps()
    key = pool.acquire(NOW, steps.name("worker-new"))
    assert key is not None
    assert 0 < steps.count <= 40
    pool.unblock(key, key.lease, NOW)
    steps.count, before = 0, len(index)
    for _ in range(10):
        key = pool.acquire(NOW, steps.name("worker-new"))
        assert key is not None
        pool.unblock(key, key.lease, NOW)
    assert (steps.count, len(index)) == (0, before)
    pool.check()


def test_owners_that_hold_nothing_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a pool whose every lease has another owner doesn't fill the memory."""
    monkeypatch.setattr(owners_module, "MOST_REMEMBERED", 100)
    pool = make_pool()
    pool.generate(NOW)
    for number in range(300):
        key = pool.acquire(NOW, f"job-{number}")
        assert key is not None
        pool.unblock(key, key.lease, NOW)
    assert len(pool._owners) <= 103
    pool.check()


def test_the_oldest_of_many_leases_is_found_without_walking_those_that_ended() -> None:
    """The front of a dict that was deleted is walked: no dict may be larger than a bucket."""
    pool = make_pool(max_keys=10_000)
    for _ in range(9_000):
        pool.generate(NOW)
    keys = [pool.acquire(NOW, "ann") for _ in range(9_000)]
    for key in keys[:-1]:
        assert key is not None
        pool.unblock(key, key.lease, NOW)
    [holder] = [holder for holder in pool._owners._by_name.values() if holder.owner == "ann"]
    assert (holder.held, holder.oldest()) == (1, keys[-1])
    assert not holder.full
    pool.check()


def test_a_page_by_owner_goes_on_where_it_stood_though_keys_were_released_between() -> None:
    """Each key that is held all the while comes once, in order of lease."""
    pool = make_pool()
    for _ in range(20):
        pool.generate(NOW)
    keys = [pool.acquire(NOW, "ann" if number % 4 else "bob") for number in range(20)]
    own = [key for key in keys if key is not None and key.owner == "ann"]
    first = pool.page(PageQuery(State.BLOCKED, limit=5, owner="ann"), NOW)
    assert first.keys == own[:5]
    for key in (own[4], own[0], own[6]):
        pool.unblock(key, key.lease, NOW)
    rest = pool.page(PageQuery(State.BLOCKED, limit=50, after=first.next, owner="ann"), NOW)
    assert (rest.keys, rest.next) == ([own[5], *own[7:]], None)
    assert pool.page(PageQuery(State.BLOCKED, owner="nobody"), NOW).keys == []


def test_leases_that_run_out_are_counted_for_five_minutes() -> None:
    """Only those: one that its holder ends, or that ends with its key, isn't."""
    pool = make_pool(keepalive_seconds=1000.0)
    for _ in range(4):
        pool.generate(NOW)
    for at in (NOW, NOW + 100):
        late = pool.acquire(at, "ann")
        ended = pool.acquire(at, "ann")
        assert late is not None
        assert ended is not None
        pool.unblock(ended, ended.lease, at)
        pool.process_due(at + 61)
    assert pool.acquire(NOW + 200, "ann", 900.0) is not None

    def released(at: float) -> int:
        [holding] = pool.holders(None, 10, at).holders
        return holding.released

    assert [released(NOW + seconds) for seconds in (200, 325, 395, 470)] == [2, 2, 1, 0]


def test_check_finds_a_holder_that_contradicts_its_keys() -> None:
    """The self-check of the pool covers the index."""

    def corruptions() -> Iterator[Pool]:
        for corrupt in (
            lambda pool, key: setattr(key, "owner", "eve"),
            lambda pool, key: pool._owners.end(key),
            lambda pool, key: pool._owners._turn.clear(),
        ):
            pool = pool_of(3)
            corrupt(pool, next(pool._owners.held_by("worker-1", 0)))
            yield pool

    for pool in corruptions():
        with pytest.raises(ValueError, match=r"holder|somebody else"):
            SelfCheck.check(pool)
