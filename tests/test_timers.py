"""The timers, on real loops: on the stock one with a clock that is put forward, on uvloop in real time.

A clock that is put forward makes all timers due that the loop would have fired meanwhile, at once, as a loop
finds them that was kept busy. uvloop's clock can't be moved, so deadlines there are some milliseconds off, and
the tests wait for what has to come, not for a length of time.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import pytest
from engine_support import HeldTimers, Moment, SkewedLoop, make_engine, make_pool, quiet, turns, turns_until
from tornado.ioloop import IOLoop

from keypool.engine.embedded import EmbeddedEngine
from keypool.engine.timers import CROWD, SLICE, Timers
from keypool.events import Change
from keypool.keys import Key
from keypool.pool import Pool

Test = Callable[[], Awaitable[None]]
BLOCK, KEEPALIVE = 60.0, 300.0


@dataclass
class Fired:
    """Timers of one pool, and what they have called."""

    timers: Timers
    releases: list[tuple[Key, int]] = field(default_factory=list)
    expiries: list[tuple[Key, float]] = field(default_factory=list)


def recorded(loop: IOLoop, now: Callable[[], float]) -> Fired:
    """Timers that only write down what they call."""
    fired: Fired
    timers = Timers(
        loop,
        now,
        lambda key, lease: fired.releases.append((key, lease)),
        lambda key, deadline: fired.expiries.append((key, deadline)),
    )
    fired = Fired(timers)
    return fired


def key_of(id: int, expires: float, release: float | None = None, lease: int = 1) -> Key:
    """A key with these deadlines, of no pool."""
    key = Key(id, f"{id:020}", 0.0, expires)
    key.release_deadline, key.lease = release, lease
    return key


class Skewed:
    """A stock loop whose clock, which is the pool's too, can be put forward."""

    def __init__(self) -> None:
        self.raw = SkewedLoop()
        self.loop = IOLoop(asyncio_loop=self.raw, make_current=False)

    def run(self, test: Test) -> None:
        """The test on this loop, to its end."""
        with quiet():
            self.raw.run_until_complete(test())

    async def on(self, seconds: float) -> None:
        """Put the clock forward, and let what is due then be done."""
        self.raw.skew += seconds
        await turns(5)

    @property
    def scheduled(self) -> int:
        """Timers that the loop itself holds, cancelled ones aside."""
        handles: list[asyncio.TimerHandle] = self.raw._scheduled  # type: ignore[attr-defined]
        return sum(not handle.cancelled() for handle in handles)


@pytest.fixture
def skewed() -> Iterator[Skewed]:
    """A loop of this test's own."""
    made = Skewed()
    yield made
    made.loop.close(all_fds=True)


# -------------------------------------------------------------------------------------------- in skewed time


def test_a_timer_calls_back_with_what_it_was_armed_for(skewed: Skewed) -> None:
    """When its deadline comes and not before: the lease of a release, the deadline of an expiry."""

    async def test() -> None:
        now = skewed.raw.time
        fired = recorded(skewed.loop, now)
        key = key_of(1, now() + KEEPALIVE, now() + BLOCK, lease=17)
        fired.timers.arm_release(key)
        fired.timers.arm_expiry(key)
        assert fired.timers.armed == 2
        await skewed.on(BLOCK - 5)
        assert fired.releases == []
        await skewed.on(5)
        assert fired.releases == [(key, 17)]
        assert (fired.timers.armed, key.release_timer) == (1, None)
        await skewed.on(KEEPALIVE - BLOCK)
        assert fired.expiries == [(key, key.expires_deadline)]
        assert (fired.timers.armed, key.expiry_timer, skewed.scheduled) == (0, None, 0)

    skewed.run(test)


def test_a_cancelled_timer_never_calls(skewed: Skewed) -> None:
    """And is counted no more; cancelling what has fired, or twice, is nothing."""

    async def test() -> None:
        now = skewed.raw.time
        fired = recorded(skewed.loop, now)
        key = key_of(1, now() + KEEPALIVE, now() + BLOCK)
        fired.timers.arm_release(key)
        fired.timers.arm_expiry(key)
        fired.timers.cancel_release(key)
        fired.timers.cancel_release(key)
        assert (fired.timers.armed, key.release_timer, skewed.scheduled) == (1, None, 1)
        await skewed.on(BLOCK)
        await skewed.on(KEEPALIVE)
        assert (fired.releases, len(fired.expiries)) == ([], 1)
        fired.timers.cancel_expiry(key)
        fired.timers.cancel_expiry(key)
        assert (fired.timers.armed, skewed.scheduled) == (0, 0)

    skewed.run(test)


def test_a_timer_for_a_deadline_that_has_passed_fires_in_the_next_turns(skewed: Skewed) -> None:
    """As for a key restored after a long stop."""

    async def test() -> None:
        fired = recorded(skewed.loop, skewed.raw.time)
        fired.timers.arm_expiry(key_of(1, skewed.raw.time() - 1000))
        assert fired.expiries == []
        await turns_until(lambda: fired.expiries, "an overdue timer fires")

    skewed.run(test)


def test_closing_forgets_what_is_queued_and_what_fires_later(skewed: Skewed) -> None:
    """Nothing is called any more."""

    async def test() -> None:
        now = skewed.raw.time
        fired = recorded(skewed.loop, now)
        for id in range(1, 2 * SLICE + 1):
            fired.timers.arm_expiry(key_of(id, now() + 1))
        fired.timers.arm_expiry(key_of(9999, now() + 100))
        skewed.raw.skew += 2
        await turns_until(lambda: fired.expiries, "the first slice is dealt with")
        fired.timers.close()
        done = len(fired.expiries)
        assert done < 2 * SLICE
        await skewed.on(200)
        assert len(fired.expiries) == done
        assert fired.timers.armed == 0

    skewed.run(test)


def test_a_hundred_thousand_due_at_once_are_dealt_with_in_slices(skewed: Skewed) -> None:
    """Between two slices the loop does its other work: no turn deals with more than one."""
    count = 100_000

    async def test() -> None:
        now = skewed.raw.time
        fired = recorded(skewed.loop, now)
        deadline = now() + KEEPALIVE
        for id in range(1, count + 1):
            fired.timers.arm_expiry(key_of(id, deadline))
        assert fired.timers.armed == count
        dealt: list[int] = []
        other_work = 0

        def look() -> None:
            nonlocal other_work
            other_work += 1
            dealt.append(len(fired.expiries))
            if dealt[-1] < count:
                skewed.raw.call_soon(look)

        skewed.raw.skew += 2 * KEEPALIVE
        look()
        await turns_until(lambda: len(fired.expiries) == count, "all are dealt with")
        most = max(after - before for before, after in itertools.pairwise(dealt))
        assert most <= SLICE, f"{most} deadlines were dealt with in one turn of the loop"
        assert other_work >= count // SLICE, f"other work ran {other_work} times in {count // SLICE} slices"
        assert len({key.id for key, _ in fired.expiries}) == count, "some were dealt with twice"
        assert (fired.timers.armed, skewed.scheduled) == (0, 0)

    skewed.run(test)


def test_timers_armed_for_one_moment_are_spread_so_that_the_loop_fires_few_in_a_turn() -> None:
    """`CROWD` a millisecond, never earlier than the deadline, and no later than the crowd needs."""
    loop = HeldTimers()
    fired = recorded(loop.as_loop, lambda: 1000.0)
    for id in range(1, 1001):
        fired.timers.arm_expiry(key_of(id, 1300.0))
    late = [timer.seconds - 300.0 for timer in loop.timers]
    assert min(late) >= 0, f"a timer is armed {-min(late)} s before its deadline"
    assert max(late) <= 0.0165, f"the last of a batch of a thousand would be {max(late)} s late"
    milliseconds = [round(seconds * 1000) for seconds in late]
    assert max(map(milliseconds.count, set(milliseconds))) <= CROWD


def test_a_crowd_of_one_moment_does_not_put_off_the_timers_of_the_next() -> None:
    """Each millisecond begins its own."""
    loop = HeldTimers()
    fired = recorded(loop.as_loop, lambda: 1000.0)
    for id in range(1, 1001):
        fired.timers.arm_expiry(key_of(id, 1300.0))
    fired.timers.arm_expiry(key_of(1001, 1300.5))
    assert list(loop.timers)[-1].seconds == pytest.approx(300.5, abs=1e-6)


# -------------------------------------------------------------------------- with a pool, in skewed time


@dataclass
class Told:
    """An engine, and what its pool has told."""

    engine: EmbeddedEngine
    changes: list[Change]

    @property
    def pool(self) -> Pool:
        return self.engine.pool


def told(skewed: Skewed) -> Told:
    """An engine on the skewed loop."""
    engine = make_engine(skewed.raw.time, loop=skewed.loop)
    changes: list[Change] = []
    listener = engine.pool.on_change

    def hear(change: Change, key: Key, owner: str | None) -> None:
        changes.append(change)
        listener(change, key, owner)

    engine.pool.on_change = hear
    return Told(engine, changes)


def test_a_key_is_released_and_purged_with_nobody_asking(skewed: Skewed) -> None:
    """At 60 s and at 300 s, by the timers alone."""

    async def test() -> None:
        made = told(skewed)
        await made.engine.generate(1)
        await made.engine.acquire("ann", 0)
        await skewed.on(BLOCK - 1)
        assert made.pool.blocked == 1
        await skewed.on(1.001)
        assert (made.pool.blocked, made.pool.available) == (0, 1)
        await skewed.on(KEEPALIVE - BLOCK - 2)
        assert made.pool.total == 1
        await skewed.on(2)
        assert made.pool.total == 0
        assert made.changes == [Change.GENERATED, Change.ACQUIRED, Change.RELEASED, Change.EXPIRED]
        assert (made.engine.timers.armed, skewed.scheduled) == (0, 0)

    skewed.run(test)


def test_there_is_one_timer_for_each_deadline_that_stands(skewed: Skewed) -> None:
    """Armed and cancelled with every call, and none left when the key is gone."""

    async def test() -> None:
        made = told(skewed)
        engine = made.engine

        def expect(armed: int, after: str) -> None:
            counts = (engine.timers.armed, skewed.scheduled)
            assert counts == (armed, armed), f"after {after}: {counts[0]} counted, {counts[1]} in the loop"

        first, second = await engine.generate(2)
        expect(2, "generate of 2")
        lease = await engine.acquire(None, 0)
        expect(3, "acquire")
        for _ in range(5):
            await engine.keepalive(lease.key)
        expect(3, "5 keepalives of a held key")
        await engine.unblock(lease.key, lease.lease)
        expect(2, "unblock")
        await engine.unblock(lease.key, None)
        await engine.keepalive(first.id)
        expect(2, "unblock of a free key, and keepalive")
        lease = await engine.acquire(None, 0)
        await engine.delete(lease.id)
        expect(1, "delete of a held key")
        other = first if lease.id == second.id else second
        await engine.delete(other.key)
        expect(0, "delete of a free key")
        await engine.generate(1)
        await engine.acquire(None, 0)
        await skewed.on(BLOCK + 1)
        expect(1, "a release")
        await skewed.on(KEEPALIVE)
        expect(0, "an expiry")

    skewed.run(test)


def test_a_timer_that_fires_behind_the_back_of_a_newer_lease_frees_nothing(skewed: Skewed) -> None:
    """It was queued when the key was given back and served again: it carries the former lease."""

    async def test() -> None:
        made = told(skewed)
        await made.engine.generate(1)
        former = await made.engine.acquire("ann", 0)
        key = made.pool.find_id(former.id, skewed.raw.time())
        made.engine.timers._release_due(key, former.lease)
        await made.engine.unblock(former.key, former.lease)
        newer = await made.engine.acquire("bob", 0)
        await turns(5)
        assert (key.owner, key.lease, made.pool.blocked) == ("bob", newer.lease, 1)
        assert Change.RELEASED not in made.changes

    skewed.run(test)


def test_a_timer_that_fires_behind_the_back_of_a_keepalive_purges_nothing(skewed: Skewed) -> None:
    """It carries the former deadline."""

    async def test() -> None:
        made = told(skewed)
        (only,) = await made.engine.generate(1)
        key = made.pool.find_id(only.id, skewed.raw.time())
        made.engine.timers._expiry_due(key, key.expires_deadline)
        skewed.raw.skew += 1
        await made.engine.keepalive(only.key)
        await turns(5)
        assert made.pool.total == 1
        assert Change.EXPIRED not in made.changes

    skewed.run(test)


def test_a_timer_that_fires_early_counts() -> None:
    """As uvloop's may, by a millisecond: it is the only one, so a look at the clock would lose the key."""
    loop = HeldTimers()
    pool = make_pool()
    timers = Timers(loop.as_loop, lambda: 1000.0, pool.release, pool.expire)
    key = pool.generate(1000.0)
    timers.arm_expiry(key)
    pool.acquire(1000.0, None)
    timers.arm_release(key)
    expiry, release = loop.timers
    loop.fire(release)
    assert (pool.available, pool.counters.released) == (1, 1)
    loop.fire(expiry)
    assert (pool.total, pool.counters.expired) == (0, 1)
    assert timers.armed == 0


# ------------------------------------------------------------------------------------------------- on uvloop


def on_uvloop(test: Test) -> None:
    """Run a test on uvloop, in real time."""
    uvloop = pytest.importorskip("uvloop")

    async def main() -> None:
        await asyncio.wait_for(test(), 120)  # a timer that never fires must fail the test, not hang it

    with quiet():
        uvloop.run(main())


def test_on_uvloop_deadlines_are_never_early_by_more_than_5_ms() -> None:
    """A release and an expiry that nobody asks for."""

    async def test() -> None:
        engine = EmbeddedEngine(block_seconds=0.1, keepalive_seconds=0.8)
        loop, listener = asyncio.get_running_loop(), engine.pool.on_change
        fired = {change: loop.create_future() for change in (Change.RELEASED, Change.EXPIRED)}

        def hear(change: Change, key: Key, owner: str | None) -> None:
            listener(change, key, owner)
            if change in fired:
                fired[change].set_result(engine.now())

        engine.pool.on_change = hear
        await engine.generate(1)
        key = engine.pool.find_id((await engine.acquire("ann", 0)).id, engine.now())
        release, expiry = key.release_deadline, key.expires_deadline
        assert release is not None
        released, expired = await fired[Change.RELEASED], await fired[Change.EXPIRED]
        assert released >= release - 0.005, f"released {release - released} s early"
        assert expired >= expiry - 0.005, f"purged {expiry - expired} s early"
        assert engine.timers.armed == 0

    on_uvloop(test)


def _set(future: asyncio.Future[None]) -> None:
    future.set_result(None)


def test_on_uvloop_a_block_that_ends_serves_who_waits() -> None:
    """The second holder gets the key by the first one's timer."""

    async def test() -> None:
        engine = EmbeddedEngine(block_seconds=0.05)
        await engine.generate(1)
        first = await engine.acquire("ann", 0)
        second = await engine.acquire("bob", 20)
        assert (second.id, second.lease) == (first.id, first.lease + 1)
        await engine.delete(second.id)
        assert engine.timers.armed == 0

    on_uvloop(test)


def test_on_uvloop_a_cancelled_timer_never_fires() -> None:
    """Given back, kept alive, deleted in time: nothing is told by a timer."""

    async def test() -> None:
        # The pool's clock stands, so that no deadline passes however slow this machine is; the loop's goes on.
        engine = make_engine(Moment(), block_seconds=0.02, keepalive_seconds=0.04)
        made = await engine.generate(20)
        leases = [await engine.acquire(None, 0) for _ in range(10)]
        for lease in leases:
            await engine.unblock(lease.key, lease.lease)
        for key in made:
            await engine.delete(key.id)
        assert engine.timers.armed == 0
        late = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.06, _set, late)
        await late
        counters = engine.pool.counters
        assert (counters.released, counters.expired, counters.deleted) == (0, 0, 20)

    on_uvloop(test)


def test_on_uvloop_a_crowd_is_purged_while_other_work_goes_on() -> None:
    """20,000 keys whose deadline has passed, in slices."""
    count = 20_000

    async def test() -> None:
        loop = asyncio.get_running_loop()
        engine = EmbeddedEngine(keepalive_seconds=0.001)
        for _ in range(count // 1000):
            await engine.generate(1000)
        purged: list[int] = []

        def look() -> None:
            purged.append(engine.pool.counters.expired)
            if purged[-1] < count:
                loop.call_soon(look)

        look()
        await turns_until(lambda: purged[-1] == count, "all are purged", 1_000_000)
        steps = [after - before for before, after in itertools.pairwise(purged)]
        assert max(steps) <= SLICE, f"{max(steps)} keys were purged in one turn of the loop"
        assert engine.timers.armed == 0

    on_uvloop(test)
