"""The timers on real loops: asyncio's with a clock that only the test advances, and uvloop in real time.

After the clock was advanced, all timers up to then are due at once, as on a loop that was kept busy. uvloop's clock
can't be advanced, so these tests have deadlines some milliseconds ahead, and wait for the event, not for a time.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter

import pytest
from engine_support import (
    LATE,
    START,
    HeldTimers,
    Moment,
    SkewedLoop,
    make_engine,
    quiet,
    turns,
    turns_until,
)
from tornado.ioloop import IOLoop

from keypool.core import index
from keypool.core.events import Change, Origin
from keypool.core.index import DeadlineIndex
from keypool.core.keys import Key
from keypool.core.pool import MAX_DUE_PER_CALL, Pool
from keypool.core.rules import PoolRules
from keypool.engine.embedded import EmbeddedEngine
from keypool.engine.timers import MARGIN, Timers

Test = Callable[[], Awaitable[None]]
BLOCK, KEEPALIVE = 60.0, 300.0
TICK = 1 / 64


class Rig:
    """The timers of one index of deadlines, and the keys that they have processed."""

    def __init__(self, loop: IOLoop, now: Callable[[], float], *, started: bool = True) -> None:
        self.now = now
        self.timers = Timers(loop, now, self._settle)
        self.index = DeadlineIndex(
            attrgetter("expires_deadline"),
            self.timers.opened,
            self.timers.closed,
        )
        self.settled: list[tuple[Key, float]] = []
        """Each key with the moment at which it was."""
        self.slices: list[int] = []
        if started:
            self.start()

    def start(self) -> None:
        """Start the timers, as after a restore."""
        self.timers.start(self.index.buckets())

    def add(self, id: int, deadline: float) -> Key:
        """A key with this deadline."""
        key = Key(id, f"{id:020}", 0.0, deadline)
        key.expiry_bucket = self.index.add(key, deadline)
        return key

    def discard(self, key: Key) -> None:
        """Take a key out, as keepalive, unblock and delete do."""
        assert key.expiry_bucket is not None
        self.index.discard(key, key.expiry_bucket)
        key.expiry_bucket = None

    def _settle(self) -> bool:
        now = self.now()
        due = self.index.due(now, MAX_DUE_PER_CALL)
        for key in due:
            self.settled.append((key, now))
            self.discard(key)
        self.slices.append(len(due))
        first = self.index.first()
        return first is not None and first.expires_deadline <= now


class StandingLoop(SkewedLoop):
    """A loop on which no time passes but what the test advances its clock by, however slow the machine is."""

    def __init__(self) -> None:
        super().__init__()
        self._began = super().time()

    def time(self) -> float:
        return self._began + self.skew


class Skewed:
    """An asyncio loop whose clock, which is also the pool's, the test advances."""

    def __init__(self) -> None:
        self.raw = StandingLoop()
        self.loop = IOLoop(asyncio_loop=self.raw, make_current=False)

    def run(self, test: Test) -> None:
        """Run the test on this loop to its end."""
        with quiet():
            self.raw.run_until_complete(test())

    async def on(self, seconds: float) -> None:
        """Advance the clock, and process what is due."""
        self.raw.skew += seconds
        await turns(5)

    @property
    def scheduled(self) -> int:
        """The timers in the loop itself, without cancelled ones."""
        handles: list[asyncio.TimerHandle] = self.raw._scheduled  # type: ignore[attr-defined]
        return sum(not handle.cancelled() for handle in handles)


@pytest.fixture
def skewed() -> Iterator[Skewed]:
    """A loop for this test only."""
    made = Skewed()
    yield made
    made.loop.close(all_fds=True)


# --------------------------------------------------------------------------------------- as a test has them fire


class Held(Rig):
    """Timers that the test fires, on a clock that it advances."""

    def __init__(self, *, started: bool = True) -> None:
        self.clock = Moment()
        self.loop = HeldTimers()
        super().__init__(self.loop.as_loop, self.clock, started=started)

    def expect(self, count: int, after: str) -> None:
        """Fail unless so many timers are set."""
        counts = (self.timers.armed, len(self.loop.timers))
        assert counts == (count, count), f"after {after}: {counts[0]} counted, {counts[1]} in the loop"


def test_keys_of_one_bucket_share_a_timer() -> None:
    """The first key sets it, removing the last key cancels it, and the next key sets another."""
    rig = Held()
    keys = [rig.add(id, START + 300 + id / 1000) for id in range(1, 11)]
    rig.expect(1, "10 keys of one 1/64 s")
    other = rig.add(11, START + 300 + TICK)
    rig.expect(2, "a key of the next")
    for key in keys[:-1]:
        rig.discard(key)
    rig.expect(2, "all but the last of a bucket")
    rig.discard(keys[-1])
    rig.expect(1, "the last of a bucket")
    rig.discard(other)
    rig.expect(0, "the last of all")
    rig.add(12, START + 300)
    rig.expect(1, "another key")


@pytest.mark.parametrize("fraction", [0.0, 1e-6, 0.003, 0.0156, 0.015625, 0.5, 0.7777, 0.999999])
def test_a_timer_is_set_behind_the_end_of_its_bucket_and_no_more_than_20_ms_late(fraction: float) -> None:
    """So the deadlines have passed even if the loop fires 1.3 ms early."""
    rig = Held()
    rig.clock.on(0.123)
    key = rig.add(1, START + 300 + fraction)
    assert key.expiry_bucket is not None
    ends = key.expiry_bucket.ends
    (timer,) = rig.loop.timers
    due = rig.now() + timer.seconds
    assert 0 < ends - key.expires_deadline <= TICK
    assert due >= ends + 0.0013
    assert due <= key.expires_deadline + LATE
    assert MARGIN >= 0.0013
    rig.clock.to(ends)
    rig.loop.fire(timer)
    assert rig.settled == [(key, ends)]
    rig.expect(0, "a timer that has fired")


def test_a_loop_that_fires_early_sets_the_timer_again() -> None:
    """However often it is early, no key is processed before the end of the bucket."""
    rig = Held()
    key = rig.add(1, START + 300)
    for early in (10.0, 0.5, 1e-6):
        rig.clock.to(START + 300 + TICK - early)
        rig.loop.fire()
        assert rig.slices == [], f"settled {early} s early"
        rig.expect(1, f"a timer that fired {early} s early")
    (timer,) = rig.loop.timers
    assert timer.seconds > 0
    rig.clock.to(START + 300 + LATE)
    rig.loop.fire()
    assert [settled for settled, _ in rig.settled] == [key]
    rig.expect(0, "the end")


def test_nothing_fires_before_the_start() -> None:
    """A pool that is being restored must not change. `start` sets one timer for each open bucket."""
    rig = Held(started=False)
    keys = [rig.add(id, START + second) for id, second in enumerate((-100, 5, 5, 9, 300), 1)]
    rig.discard(keys[3])
    rig.expect(0, "adding before the start")
    rig.start()
    rig.expect(3, "the start")
    rig.loop.fire(next(iter(rig.loop.timers)))
    assert [key for key, _ in rig.settled] == keys[:1], "what was overdue at the start"
    rig.add(6, START + 400)
    rig.expect(3, "a key added since")


def test_keys_queued_while_a_backlog_is_processed_are_processed_once() -> None:
    """Timers that fire meanwhile don't start further rounds."""
    rig = Held()
    for id in range(1, 10 * MAX_DUE_PER_CALL + 1):
        rig.add(id, START + 1 + id / 100)
    rig.clock.on(100)
    for timer in tuple(rig.loop.timers):
        if rig.loop.timers.pop(timer, timer) is None:
            timer.fire()
    assert len(rig.loop.callbacks) == len(rig.slices) == 1, "each timer began a round of its own"
    rig.loop.turns()
    assert rig.slices == [MAX_DUE_PER_CALL] * 10
    rig.expect(0, "all")


def test_a_timer_that_has_nothing_to_do_with_a_key_can_be_cancelled() -> None:
    """Cancelling None or a timer that has fired has no effect."""
    rig, rang = Held(), list[str]()
    rig.timers.cancel(rig.timers.after(5, rang.append, "cancelled"))
    rig.timers.cancel(None)
    rig.timers.after(5, rang.append, "fired")
    assert (rig.timers.armed, len(rig.loop.timers)) == (0, 1)
    rig.loop.fire()
    assert rang == ["fired"]


# -------------------------------------------------------------------------------------------- in skewed time


def test_a_timer_for_a_deadline_that_has_passed_fires_in_the_next_turns(skewed: Skewed) -> None:
    """A key that was restored after a long stop may have such a deadline."""

    async def test() -> None:
        rig = Rig(skewed.loop, skewed.raw.time)
        rig.add(1, 0.5)
        assert rig.settled == []
        skewed.raw.skew += 1
        await turns_until(lambda: rig.settled, "an overdue timer fires")

    skewed.run(test)


def test_after_closing_nothing_queued_or_firing_later_is_processed(skewed: Skewed) -> None:
    """After `close`, no key is processed."""

    async def test() -> None:
        now = skewed.raw.time
        rig = Rig(skewed.loop, now)
        deadline = now() + 1
        for id in range(1, 3 * MAX_DUE_PER_CALL + 1):
            rig.add(id, deadline)
        rig.add(9999, deadline + 100)
        skewed.raw.skew += 2
        await turns_until(lambda: rig.settled, "the first slice is dealt with")
        rig.timers.close()
        done = len(rig.settled)
        assert done < 3 * MAX_DUE_PER_CALL
        await skewed.on(200)
        assert len(rig.settled) == done
        assert (rig.timers.armed, skewed.scheduled) == (0, 0)
        rig.add(10_000, now() + 1)
        assert (rig.timers.armed, skewed.scheduled) == (0, 0), "set after closing"

    skewed.run(test)


@pytest.mark.parametrize("seconds", [0.0, 30.0], ids=["of one moment", "of 30 s"])
def test_a_hundred_thousand_due_at_once_are_processed_in_slices(skewed: Skewed, seconds: float) -> None:
    """The loop does its other work between two slices: no turn processes more than one."""
    count = 100_000

    async def test() -> None:
        now = skewed.raw.time
        rig = Rig(skewed.loop, now)
        deadline = now() + KEEPALIVE
        for id in range(1, count + 1):
            rig.add(id, deadline + id * seconds / count)
        assert rig.timers.armed == skewed.scheduled <= 64 * (seconds + 1) + count / index._FULL + 1
        dealt: list[int] = []

        def look() -> None:
            dealt.append(len(rig.settled))
            if dealt[-1] < count:
                skewed.raw.call_soon(look)

        skewed.raw.skew += 2 * KEEPALIVE
        look()
        await turns_until(lambda: len(rig.settled) == count, "all are dealt with")
        dealt.append(len(rig.settled))
        most = max(after - before for before, after in itertools.pairwise(dealt))
        assert most <= MAX_DUE_PER_CALL, f"{most} deadlines were dealt with in one turn of the loop"
        slices = count // MAX_DUE_PER_CALL
        assert len(dealt) >= slices, f"other work ran {len(dealt)} times in {slices} slices"
        assert len({key.id for key, _ in rig.settled}) == count, "some were dealt with twice"
        assert (rig.timers.armed, skewed.scheduled) == (0, 0)

    skewed.run(test)


# -------------------------------------------------------------------------- with a pool, in skewed time


@dataclass
class Told:
    """An engine, and the changes that its pool has reported."""

    engine: EmbeddedEngine
    changes: list[Change]

    @property
    def pool(self) -> Pool:
        return self.engine.pool


def told(skewed: Skewed) -> Told:
    """An engine on the loop whose clock can be advanced."""
    engine = make_engine(skewed.raw.time, loop=skewed.loop)
    changes: list[Change] = []
    listener = engine.pool.on_change

    def hear(change: Change, key: Key, owner: str | None, origin: Origin) -> None:
        changes.append(change)
        listener(change, key, owner, origin)

    engine.pool.on_change = hear
    return Told(engine, changes)


def test_a_key_is_released_and_purged_without_any_call(skewed: Skewed) -> None:
    """The timers alone do it, after 60 s and 300 s."""

    async def test() -> None:
        made = told(skewed)
        await made.engine.generate(1)
        await made.engine.acquire("ann", 0)
        await skewed.on(BLOCK - 1)
        assert made.pool.blocked == 1
        await skewed.on(1 + LATE)
        assert (made.pool.blocked, made.pool.available) == (0, 1)
        await skewed.on(KEEPALIVE - BLOCK - 2)
        assert made.pool.total == 1
        await skewed.on(2)
        assert made.pool.total == 0
        assert made.changes == [Change.GENERATED, Change.ACQUIRED, Change.RELEASED, Change.EXPIRED]
        assert (made.engine.timers.armed, skewed.scheduled) == (0, 0)

    skewed.run(test)


def test_a_timer_stands_for_each_bucket_with_a_deadline(skewed: Skewed) -> None:
    """Calls that open or empty a bucket set or cancel its timer. Without keys there are no timers."""

    async def test() -> None:
        clock = Moment(START)
        engine = make_engine(clock, loop=skewed.loop)

        def expect(armed: int, after: str) -> None:
            counts = (engine.timers.armed, skewed.scheduled)
            assert counts == (armed, armed), f"after {after}: {counts[0]} counted, {counts[1]} in the loop"

        first, second = await engine.generate(2)
        expect(1, "generate of 2 at once")
        lease = await engine.acquire(None, 0)
        expect(2, "acquire")
        for _ in range(5):
            clock.on(1)
            await engine.keepalive(lease.key)
        expect(3, "5 keepalives of one of two keys")
        await engine.unblock(lease.key, lease.lease)
        expect(2, "unblock")
        other = first if lease.id == second.id else second
        await engine.unblock(lease.key, None)
        await engine.keepalive(other.id)
        expect(1, "unblock of a free key, and keepalive of the last in its bucket")
        lease = await engine.acquire(None, 0)
        expect(2, "acquire again")
        await engine.delete(lease.id)
        expect(1, "delete of a held key")
        other = first if lease.id == second.id else second
        await engine.delete(other.key)
        expect(0, "delete of a free key")

    skewed.run(test)


def test_the_timer_of_a_lease_that_was_given_back_frees_no_newer_one(skewed: Skewed) -> None:
    """When the old deadline passes, no change is reported."""

    async def test() -> None:
        made = told(skewed)
        await made.engine.generate(1)
        former = await made.engine.acquire("ann", 0)
        await skewed.on(BLOCK - 5)
        await made.engine.unblock(former.key, former.lease)
        newer = await made.engine.acquire("bob", 0)
        await skewed.on(10)
        key = made.pool.find_id(former.id, skewed.raw.time())
        assert (key.owner, key.lease, made.pool.blocked) == ("bob", newer.lease, 1)
        assert Change.RELEASED not in made.changes

    skewed.run(test)


def test_the_timer_of_a_deadline_that_was_put_off_purges_nothing(skewed: Skewed) -> None:
    """Other keys of the old bucket are purged in time, and this key is not."""

    async def test() -> None:
        made = told(skewed)
        kept, _ = await made.engine.generate(2)
        await skewed.on(KEEPALIVE - 5)
        await made.engine.keepalive(kept.key)
        await skewed.on(10)
        assert made.pool.total == 1
        assert made.pool.find(kept.key, skewed.raw.time()).id == kept.id
        assert made.engine.timers.armed == skewed.scheduled == 1

    skewed.run(test)


# ------------------------------------------------------------------------------------------------- on uvloop


def on_uvloop(test: Test) -> None:
    """Run a test on uvloop, in real time."""
    uvloop = pytest.importorskip("uvloop")

    async def main() -> None:
        await asyncio.wait_for(test(), 120)  # a timer that never fires must fail the test, not hang it

    with quiet():
        uvloop.run(main())


def test_on_uvloop_deadlines_are_never_early_by_more_than_5_ms() -> None:
    """Measured for a release and an expiry, without any call."""

    def observed(engine: EmbeddedEngine) -> tuple[dict[Change, Key], asyncio.Future[float]]:
        """A copy of the key as each change leaves it, and when the first deadline was processed."""
        listener, seen = engine.pool.on_change, dict[Change, Key]()
        processed: asyncio.Future[float] = asyncio.get_running_loop().create_future()

        def hear(change: Change, key: Key, owner: str | None, origin: Origin) -> None:
            listener(change, key, owner, origin)
            seen[change] = copy.copy(key)
            if change in (Change.RELEASED, Change.EXPIRED):
                processed.set_result(engine.now())

        engine.pool.on_change = hear
        return seen, processed

    async def test() -> None:
        engine = EmbeddedEngine(PoolRules(block_seconds=0.1))
        seen, processed = observed(engine)
        await engine.generate(1)
        await engine.acquire("ann", 0)
        released, release = await processed, seen[Change.ACQUIRED].release_deadline
        assert release is not None
        assert released >= release - 0.005, f"released {release - released} s early"
        await engine.delete(1)
        assert engine.timers.armed == 0

        engine = EmbeddedEngine(PoolRules(keepalive_seconds=0.3))
        seen, processed = observed(engine)
        await engine.generate(1)
        expired, expiry = await processed, seen[Change.GENERATED].expires_deadline
        assert expired >= expiry - 0.005, f"purged {expiry - expired} s early"
        assert engine.timers.armed == 0

    on_uvloop(test)


def _set(future: asyncio.Future[None]) -> None:
    future.set_result(None)


def test_on_uvloop_a_block_that_ends_serves_a_waiter() -> None:
    """The timer of the first lease serves the waiter."""

    async def test() -> None:
        engine = EmbeddedEngine(PoolRules(block_seconds=0.05))
        await engine.generate(1)
        first = await engine.acquire("ann", 0)
        second = await engine.acquire("bob", 20)
        assert (second.id, second.lease) == (first.id, first.lease + 1)
        await engine.delete(second.id)
        assert engine.timers.armed == 0

    on_uvloop(test)


def test_on_uvloop_a_cancelled_timer_never_fires() -> None:
    """After unblock, keepalive and delete in time, no timer reports a change."""

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


def test_on_uvloop_a_backlog_is_purged_while_other_work_goes_on() -> None:
    """20,000 keys whose deadline has passed, in slices."""
    count = 20_000

    async def test() -> None:
        loop = asyncio.get_running_loop()
        engine = EmbeddedEngine(PoolRules(keepalive_seconds=0.001))
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
        assert max(steps) <= MAX_DUE_PER_CALL, f"{max(steps)} keys were purged in one turn of the loop"
        assert engine.timers.armed == 0

    on_uvloop(test)
