"""The embedded engine on a clock that a test moves, with timers that fire when a test says so.

These are races that can't be provoked by waiting: a timer that fires after the call that it should have preceded, a
caller that hangs up after it was served and before it got its answer. However late the timers are, every call goes by
the deadlines.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from engine_support import (
    BLOCK,
    KEEPALIVE,
    LATE,
    START,
    Call,
    Held,
    held_with,
    now,
    on_loop,
    turns,
    turns_until,
)

from keypool.api.auth import Caller, Role
from keypool.api.calls import Call as ApiCall
from keypool.api.first_version import LEGACY
from keypool.core import pool as pool_module
from keypool.core.answers import Identity, Lease, Row, Stats, Unblock
from keypool.core.cursor import ListQuery
from keypool.core.errors import (
    BadRequest,
    Draining,
    KeypoolError,
    NoKeyAvailable,
    PoolFull,
    StaleLease,
    TooManyWaiters,
    UnknownKey,
)
from keypool.core.keys import Key, State, hint
from keypool.core.pool import MAX_DUE_PER_CALL
from keypool.engine import Engine
from keypool.engine.embedded import EmbeddedEngine
from keypool.engine.steps import RECENT_EVENTS

# ------------------------------------------------------------------------------------- the calls, as they answer


@on_loop
async def test_an_engine_with_nothing_to_wait_for_never_suspends() -> None:
    """The answer is there after the first step of the coroutine: no task is needed, and no turn of the loop."""
    held = Held()
    engine = held.engine
    made = await now(engine.generate(3))
    lease = await now(engine.acquire("ann", 30))
    assert (lease.lease, lease.release_in, lease.expires_in) == (1, BLOCK, KEEPALIVE)
    assert [key.expires_in for key in made] == [KEEPALIVE] * 3
    assert len(await now(engine.acquire_many("bob", 5))) == 2
    assert (await now(engine.keepalive(lease.id))).expires_in == KEEPALIVE
    assert await now(engine.keepalive_many([lease.key, "nobody"])) == ["done", "unknown"]
    assert (await now(engine.unblock(lease.key, lease.lease))).changed is True
    assert await now(engine.unblock_many([Unblock(lease.key), Unblock(lease.id, 9), Unblock("x")])) == [
        "done",
        "stale",
        "unknown",
    ]
    assert (await now(engine.get(lease.id))).lease == 1
    assert (await now(engine.reveal(lease.id))).key == lease.key
    assert len((await now(engine.page(ListQuery()))).keys) == 3
    assert (await now(engine.stats())).total == 3
    assert (await now(engine.delete(lease.id))).id == lease.id
    other = next(key for key in made if key.id != lease.id)
    assert await now(engine.delete_many([lease.id, other.key])) == [
        "unknown",
        Identity(other.id, hint(other.key)),
    ]
    assert held.pool.total == 1
    engine.ready()


@on_loop
async def test_every_call_of_the_protocol_is_there() -> None:
    """The engine has all calls of the protocol, with the same parameters."""
    engine = Held().engine
    for name, wanted in inspect.getmembers(Engine, inspect.isfunction):
        if not name.startswith("_"):
            have = list(inspect.signature(getattr(engine, name)).parameters)
            assert have == list(inspect.signature(wanted).parameters)[1:], name


@on_loop
async def test_stats_count_what_happened() -> None:
    """Each counter grows with its call, and the uptime with the clock."""
    held, (lease,) = await held_with("ann", keys=4)
    engine = held.engine
    await now(engine.keepalive(lease.id))
    await now(engine.unblock(lease.id, None))
    await now(engine.unblock(lease.id, None))
    await now(engine.delete(lease.id))
    await now(engine.acquire_many(None, 9))
    with pytest.raises(NoKeyAvailable):
        await now(engine.acquire(None, 0))
    held.clock.on(BLOCK + LATE)
    held.timers.fire(*held.timers.for_deadline(BLOCK))
    for key in list(held.pool._by_id.walk(None))[:2]:
        await now(engine.keepalive(key.id))
    held.clock.to(START + KEEPALIVE + LATE)
    held.timers.fire(*held.timers.for_deadline(KEEPALIVE))
    stats: Stats = await now(engine.stats())
    counts = (
        stats.generated,
        stats.acquired,
        stats.unblocked,
        stats.deleted,
        stats.kept_alive,
        stats.refused,
    )
    assert counts == (4, 4, 1, 1, 3, 1)
    assert (stats.released, stats.expired, stats.total, stats.waiting) == (3, 1, 2, 0)
    assert (stats.uptime, stats.engine) == (KEEPALIVE + LATE, "embedded")


@on_loop
async def test_lengths_of_time_are_of_this_moment_and_rounded_to_the_millisecond() -> None:
    """They are relative to the answer, not to the moment when the deadline was set."""
    held, (lease,) = await held_with("ann")
    held.clock.on(12.34567)
    row: Row = await now(held.engine.get(lease.id))
    assert (row.release_in, row.expires_in) == (47.654, 287.654)
    assert (row.state, row.owner, row.lease) == (State.BLOCKED, "ann", lease.lease)


# ------------------------------------------------------------------------------------------------------- races


@on_loop
async def test_unblock_comes_before_the_release_timer() -> None:
    """Unblock cancels the timer. If it fires nevertheless, it must not end a newer lease."""
    held, (lease,) = await held_with("ann")
    key = held.pool.find_id(lease.id, held.clock())
    _, release = held.timers.timers
    held.clock.on(BLOCK - 0.001)
    await now(held.engine.unblock(lease.key, lease.lease))
    assert release not in held.timers.timers, "the timer of a block that ended is still armed"
    newer = await now(held.engine.acquire("bob", 0))
    held.clock.on(LATE)
    release.fire()
    held.timers.turns()
    assert (key.owner, key.lease) == ("bob", newer.lease)
    assert held.pool.counters.released == 0
    await held.check()


@on_loop
async def test_unblock_comes_after_the_release_timer() -> None:
    """The latest lease number is accepted for a free key; after the next acquire it is refused."""
    held, (lease,) = await held_with("ann")
    held.clock.on(BLOCK + LATE)
    held.timers.fire(*held.timers.for_deadline(BLOCK))
    assert held.pool.counters.released == 1
    assert (await now(held.engine.unblock(lease.key, lease.lease))).changed is False
    await now(held.engine.acquire("bob", 0))
    with pytest.raises(StaleLease):
        await now(held.engine.unblock(lease.key, lease.lease))
    assert held.now_serving() == [(lease.id, "bob")]


@on_loop
async def test_unblock_at_the_deadline_changes_nothing_though_the_timer_is_late() -> None:
    """The block ended by its deadline, and counts as released."""
    held, (lease,) = await held_with("ann")
    held.clock.on(BLOCK)
    assert (await now(held.engine.unblock(lease.key, None))).changed is False
    counters = held.pool.counters
    assert (counters.released, counters.unblocked) == (1, 0)


@pytest.mark.parametrize("form", ["single", "batch"])
def test_unblock_of_a_block_that_ran_out_takes_the_key_from_nobody_else(form: str) -> None:
    """A late unblock without a lease number, before the late timer, serves one of two waiters and no more."""

    @on_loop
    async def test() -> None:
        held, (lease,) = await held_with("ann")
        bob, carol = held.wait("bob"), held.wait("carol")
        held.clock.on(BLOCK)
        if form == "single":
            await now(held.engine.unblock(lease.key, None))
        else:
            await now(held.engine.unblock_many([Unblock(lease.key)]))
        await turns()
        served = [call.answer.lease for call in (bob, carol) if call.over]
        assert held.now_serving() == [(lease.id, "bob")], f"leases {served} were given of one key"
        assert len(served) == 1, f"leases {served} of one key are held at once"

    test()


@on_loop
async def test_keepalive_comes_before_the_expiry() -> None:
    """A keepalive at the last moment moves the deadline, and the timer of the old deadline purges nothing."""
    held, _ = await held_with(keys=1)
    (expiry,) = held.timers.timers
    held.clock.on(KEEPALIVE - 0.001)
    assert (await now(held.engine.keepalive(1))).expires_in == KEEPALIVE
    assert expiry not in held.timers.timers
    held.clock.on(LATE)
    expiry.fire()
    held.timers.turns()
    assert (await now(held.engine.get(1))).expires_in == KEEPALIVE - LATE


@on_loop
async def test_keepalive_at_the_expiry_comes_too_late_though_the_timer_is_later() -> None:
    """The key is unknown, and the call purges it and cancels its timers."""
    held, (lease,) = await held_with("ann")
    held.clock.on(KEEPALIVE)
    with pytest.raises(UnknownKey):
        await now(held.engine.keepalive(lease.key))
    assert held.pool.total == 0
    assert not held.timers.timers, "timers of a key that is gone are still armed"


@on_loop
async def test_a_keepalive_behind_a_timer_that_has_fired_keeps_the_key() -> None:
    """A timer that fires early finds nothing due and is set again; keepalive still moves the deadline."""
    held, _ = await held_with(keys=1)
    (expiry,) = held.timers.timers
    held.clock.on(KEEPALIVE - 0.001)
    held.timers.fire(expiry)
    assert held.engine.timers.armed == len(held.timers.timers) == 1, "an early timer was the only one"
    await now(held.engine.keepalive(1))
    held.timers.turns()
    assert held.pool.total == len(held.timers.timers) == 1
    assert held.engine.timers.armed == 1


@on_loop
async def test_a_key_that_is_deleted_while_somebody_waits_is_served_to_nobody() -> None:
    """The waiter stays in the queue, and gets the next key."""
    held, (lease,) = await held_with("ann")
    bob = held.wait("bob")
    await now(held.engine.delete(lease.id))
    await turns()
    assert not bob.over
    assert len(held.timers.timers) == 1, "more timers are armed than the waiter's own"
    (made,) = await now(held.engine.generate(1))
    await turns()
    assert bob.answer.id == made.id
    await held.check()


@on_loop
async def test_a_waiter_whose_key_is_deleted_before_its_answer_gets_the_lease_as_served() -> None:
    """It held the key for a moment; its unblock finds that the key is gone."""
    held, (lease,) = await held_with("ann")
    bob = held.wait("bob")
    await now(held.engine.unblock(lease.key, lease.lease))
    await now(held.engine.delete(lease.id))
    await turns()
    assert bob.answer.id == lease.id
    with pytest.raises(UnknownKey):
        await now(held.engine.unblock(bob.answer.key, bob.answer.lease))
    await held.check()


# -------------------------------------------------------------------------------------------------- hanging up


@on_loop
async def test_a_waiter_that_hangs_up_leaves_the_queue() -> None:
    """It gets no lease, and its timer is cancelled."""
    held, (lease,) = await held_with("ann")
    bob, carol = held.wait("bob"), held.wait("carol")
    armed = len(held.timers.timers)
    bob.hang_up()
    assert len(held.timers.timers) == armed - 1
    assert (await now(held.engine.stats())).waiting == 1
    await now(held.engine.unblock(lease.key, lease.lease))
    await turns()
    assert carol.answer.id == lease.id
    assert held.pool.counters.acquired == 2


@on_loop
async def test_a_waiter_that_hangs_up_as_it_is_served_gives_the_lease_back() -> None:
    """No caller has the lease, so the next waiter gets the key at once."""
    held, (lease,) = await held_with("ann")
    bob, carol = held.wait("bob"), held.wait("carol")
    await now(held.engine.unblock(lease.key, lease.lease))
    assert held.now_serving() == [(lease.id, "bob")]
    bob.hang_up()
    assert held.now_serving() == [(lease.id, "carol")]
    await turns()
    assert carol.answer.lease == lease.lease + 2
    await held.check()


@on_loop
async def test_the_last_waiter_that_hangs_up_as_it_is_served_leaves_the_key_available() -> None:
    """The pool is as if the call had never been made."""
    held, (lease,) = await held_with("ann")
    bob = held.wait("bob")
    await now(held.engine.unblock(lease.key, lease.lease))
    bob.hang_up()
    assert (held.pool.available, held.pool.blocked) == (1, 0)
    await held.check()


@on_loop
async def test_a_task_that_is_cancelled_as_it_is_served_gives_the_lease_back() -> None:
    """This holds for calls that run as a task, too."""
    held, (lease,) = await held_with("ann")
    bob = asyncio.ensure_future(held.engine.acquire("bob", 30))
    await turns(2)
    await now(held.engine.unblock(lease.key, lease.lease))
    bob.cancel()
    with pytest.raises(asyncio.CancelledError):
        await bob
    assert held.pool.available == 1


@on_loop
async def test_hanging_up_takes_no_key_from_its_next_holder() -> None:
    """If its lease has ended and the key was served again meanwhile, the new lease is left alone."""
    held, (lease,) = await held_with("ann")
    bob = held.wait("bob")
    await now(held.engine.unblock(lease.key, lease.lease))
    await now(held.engine.unblock(lease.key, None))
    await now(held.engine.acquire("carol", 0))
    bob.hang_up()
    assert held.now_serving() == [(lease.id, "carol")]
    await held.check()


@on_loop
async def test_hanging_up_after_the_served_key_is_gone_has_no_effect() -> None:
    """The key may have been deleted, or may have expired."""
    held, (one, two) = await held_with("ann", "ann")
    bob, carol = held.wait("bob"), held.wait("carol")
    await now(held.engine.unblock_many([Unblock(one.id), Unblock(two.id)]))
    await now(held.engine.delete(one.id))
    bob.hang_up()
    held.clock.on(KEEPALIVE)
    carol.hang_up()
    assert held.pool.total == 0
    await held.check()


@on_loop
async def test_hanging_up_with_a_stale_lease_still_serves_waiters() -> None:
    """Looking for the key may find the next holder's block overdue; then the next waiter gets it."""
    held, (lease,) = await held_with("ann")
    bob, dave, carol = held.wait("bob"), held.wait("dave", 60), held.wait("carol", 60)
    await now(held.engine.unblock(lease.key, None))
    await now(held.engine.unblock(lease.key, None))
    assert held.now_serving() == [(lease.id, "dave")]
    held.clock.on(BLOCK)
    bob.hang_up()
    await turns()
    assert dave.answer.lease == lease.lease + 2
    assert carol.over, "carol waits although the key is available, and its release timer is cancelled"


@on_loop
async def test_hanging_up_after_the_timeout_has_no_effect() -> None:
    """The caller hangs up after the timer has fired and before the answer."""
    held, _ = await held_with("ann")
    bob = held.wait("bob", 5)
    held.timers.fire(list(held.timers.timers)[-1])
    bob.hang_up()
    held.engine.drain()
    await held.check()


@on_loop
async def test_hanging_up_as_the_server_stops_has_no_effect() -> None:
    """The caller hangs up after the error was set and before the answer."""
    held, _ = await held_with("ann")
    bob = held.wait("bob")
    held.engine.drain()
    bob.hang_up()
    await held.check()


# ----------------------------------------------------------------------------------------------------- waiters


@on_loop
async def test_waiters_are_served_in_the_order_in_which_they_came() -> None:
    """This holds whether unblock, a timer, generate or another caller's hang-up made a key available."""
    held, leases = await held_with("ann", "ann", "ann")
    calls = {name: held.wait(name) for name in "abcdefg"}
    served: list[str] = []

    async def expect(*names: str) -> None:
        await turns()
        served.extend(name for name in calls if calls[name].over and name not in served)
        assert served[-len(names) :] == list(names), f"served {served}, wanted {names} next"
        await held.check()

    releases = held.timers.for_deadline(BLOCK)
    held.clock.on(BLOCK - 1)
    await now(held.engine.unblock(leases[0].id, leases[0].lease))
    await expect("a")
    await now(held.engine.generate(1))
    await expect("b")
    held.clock.on(1 + LATE)
    held.timers.fire(*releases)  # of two blocks
    await expect("c", "d")
    assert calls["c"].answer.lease < calls["d"].answer.lease
    await now(held.engine.unblock_many([Unblock(calls["a"].answer.id), Unblock(calls["b"].answer.id)]))
    await expect("e", "f")
    await now(held.engine.generate(5))
    await expect("g")


@on_loop
async def test_a_newcomer_never_overtakes_a_waiter() -> None:
    """The waiter gets the key of an overdue block whose timer is late, and the newcomer gets none."""
    held, (lease,) = await held_with("ann")
    bob = held.wait("bob", 60)
    held.clock.on(BLOCK)
    with pytest.raises(NoKeyAvailable):
        await now(held.engine.acquire("carol", 0))
    await turns()
    assert bob.answer.id == lease.id
    await held.check()


@on_loop
async def test_a_newcomer_that_waits_queues_behind_other_waiters() -> None:
    """With two overdue blocks, the first waiter and the newcomer are served, in this order."""
    held, _ = await held_with("ann", "ann")
    bob = held.wait("bob", 60)
    held.clock.on(BLOCK)
    carol, dave = held.wait("carol", 60), held.wait("dave", 60)
    await turns()
    assert (bob.answer.lease, carol.answer.lease, dave.over) == (3, 4, False)
    await held.check()


@on_loop
async def test_a_newcomer_never_overtakes_a_waiter_even_with_a_backlog_of_expired_keys() -> None:
    """Of many overdue and expired keys one is alive, and the waiter gets it."""
    last = 4 * MAX_DUE_PER_CALL
    held, _ = await held_with(*["ann"] * last, block_seconds=50.0, keepalive_seconds=20.0)
    held.pool._random = lambda: 0.0
    (living,) = [key for key in held.pool._by_id.walk(None) if key.lease == last]
    bob = held.wait("bob", 60)
    for moment in (15, 30, 45):
        held.clock.to(START + moment)
        await now(held.engine.keepalive(living.id))
    held.clock.to(START + 56)
    carol = Call(held.engine.acquire("carol", 0))
    await turns(50)
    assert held.now_serving() == [(living.id, "bob")]
    assert bob.answer.id == living.id
    with pytest.raises(NoKeyAvailable):
        _ = carol.answer


@on_loop
async def test_more_than_max_waiters_are_refused() -> None:
    """They are refused at once, the others keep waiting, and a caller that hangs up makes room."""
    held, _ = await held_with("ann", max_waiters=2)
    bob, carol = held.wait("bob"), held.wait("carol")
    with pytest.raises(TooManyWaiters, match="2 calls"):
        await now(held.engine.acquire("dave", 30))
    assert not bob.over
    assert not carol.over
    bob.hang_up()
    dave = held.wait("dave")
    assert not dave.over
    assert (await now(held.engine.stats())).waiting == 2


@on_loop
async def test_no_waiters_at_all_may_be_allowed() -> None:
    """With --max-waiters=0, a wait is refused unless a key is available."""
    held, (lease,) = await held_with("ann", max_waiters=0)
    with pytest.raises(TooManyWaiters):
        await now(held.engine.acquire("bob", 30))
    await now(held.engine.unblock(lease.id, None))
    assert (await now(held.engine.acquire("bob", 30))).id == lease.id


@on_loop
async def test_a_waiter_that_times_out_gets_no_key() -> None:
    """It counts as refused, its error has the time to the earliest release, and it has left the queue."""
    held, (lease,) = await held_with("ann")
    bob = held.wait("bob", 5)
    timer = list(held.timers.timers)[-1]
    assert timer.seconds == 5
    held.clock.on(5)
    held.timers.fire(timer)
    await turns()
    with pytest.raises(NoKeyAvailable) as refusal:
        _ = bob.answer
    assert refusal.value.retry_after == BLOCK - 5
    stats = await now(held.engine.stats())
    assert (stats.waiting, stats.refused) == (0, 1)
    await now(held.engine.unblock(lease.id, None))
    assert held.pool.available == 1, "somebody who gave up was served"


@on_loop
async def test_a_waiter_that_times_out_gets_a_key_whose_block_ran_out_before() -> None:
    """The deadline has passed, even if the release timer fires after the waiter's timer."""
    held, (lease,) = await held_with("ann")
    bob = held.wait("bob", BLOCK + 1)
    held.clock.on(BLOCK + 1)
    held.timers.fire(list(held.timers.timers)[-1])
    await turns()
    assert bob.answer.id == lease.id


@on_loop
async def test_a_waiter_that_times_out_gets_a_key_hidden_by_a_backlog() -> None:
    """All blocks are overdue and all keys but one have expired: the waiter gets that one."""
    last = 4 * MAX_DUE_PER_CALL
    held, _ = await held_with(*["ann"] * last, block_seconds=50.0, keepalive_seconds=20.0)
    held.pool._random = lambda: 0.0
    (living,) = [key for key in held.pool._by_id.walk(None) if key.lease == last]
    bob = held.wait("bob", 56)
    for moment in (15, 30, 45):
        held.clock.to(START + moment)
        await now(held.engine.keepalive(living.id))
    held.clock.to(START + 56)
    held.timers.fire(next(timer for timer in held.timers.timers if timer.seconds == 56))
    await turns(50)
    assert bob.answer.id == living.id


@on_loop
async def test_a_generate_that_hangs_up_leaves_no_waiter_unserved() -> None:
    """While it made room, turn by turn, it found an overdue block."""
    crowd = 6 * MAX_DUE_PER_CALL
    held, _ = await held_with("ann", max_keys=1 + crowd)
    bob = held.wait("bob", 400)
    await now(held.engine.generate(1))  # bob's, and by that he is served
    await turns()
    assert bob.over
    await now(held.engine.generate(crowd - 1))
    leases = await now(held.engine.acquire_many("ann", crowd - 1))
    held.clock.on(30)
    await now(held.engine.keepalive(leases[-1].id))
    carol = held.wait("carol", 400)
    held.clock.to(START + KEEPALIVE + 1)
    call = Call(held.engine.generate(crowd))
    assert not call.over, "the crowd was dealt with in one turn"
    call.hang_up()
    await turns(50)
    await held.check()
    carol.hang_up()


@on_loop
async def test_a_waiter_that_was_served_does_not_time_out() -> None:
    """Its timer was cancelled when it was served."""
    held, (lease,) = await held_with("ann")
    bob = held.wait("bob", 5)
    timer = list(held.timers.timers)[-1]
    await now(held.engine.unblock(lease.id, None))
    assert timer not in held.timers.timers
    timer.fire()
    await turns()
    assert bob.answer.id == lease.id


@on_loop
async def test_no_key_is_available_while_a_call_waits() -> None:
    """2,000 random calls (seeded), with clocks that jump and timers that fire late or never."""
    source = random.Random(31)
    held = Held(block_seconds=6.0, keepalive_seconds=30.0, max_keys=12, max_waiters=5)
    held.pool._random = source.random
    engine, waiting = held.engine, list[Call[Lease]]()
    calls: list[Callable[[], Any]] = [
        lambda: engine.generate(source.randint(1, 3)),
        lambda: engine.acquire("newcomer", 0),
        lambda: engine.acquire_many("batch", 3),
        lambda: engine.unblock(source.randint(1, held.pool.last_id + 1), None),
        lambda: engine.unblock(
            source.randint(1, held.pool.last_id + 1), source.randint(1, held.pool.last_lease + 1)
        ),
        lambda: engine.keepalive(source.randint(1, held.pool.last_id + 1)),
        lambda: engine.delete(source.randint(1, held.pool.last_id + 1)),
        lambda: engine.get(source.randint(1, held.pool.last_id + 1)),
        lambda: engine.page(ListQuery()),
    ]
    for step in range(2000):
        match source.randrange(8):
            case 0:
                held.clock.on(source.choice([0.001, 1.0, 3.0]))
            case 1 if held.timers.timers:
                held.timers.fire(source.choice(list(held.timers.timers)))
            case 2 if len(waiting) < 5:
                waiting.append(held.wait(f"w{step}", 4.0))
            case 3 if waiting:
                waiting.pop(source.randrange(len(waiting))).hang_up()
            case _:
                call = source.choice(calls)
                with contextlib.suppress(KeypoolError):
                    await now(call())
        await turns(2)
        waiting = [call for call in waiting if not call.over]
        await held.check()
    stats = await now(engine.stats())
    assert stats.acquired > 100, f"the test hardly served anything: {stats}"
    assert stats.released > 20, f"the test hardly released anything: {stats}"


@on_loop
async def test_a_refused_generate_serves_waiters() -> None:
    """The call found an overdue block, whose key the waiter gets."""
    held, (lease,) = await held_with("ann", max_keys=1)
    _, release = held.timers.timers
    bob = held.wait("bob", 60)
    held.clock.on(BLOCK)
    with pytest.raises(PoolFull):
        await now(held.engine.generate(1))
    held.timers.fire(release)
    await turns()
    assert bob.over, f"bob waits although {held.pool.available} key is available"
    assert bob.answer.id == lease.id


# ------------------------------------------------------------------------------------------------------- drain


@on_loop
async def test_a_server_that_stops_answers_its_waiters_at_once() -> None:
    """It refuses new waiters, but serves calls that needn't wait."""
    held, (lease,) = await held_with("ann")
    calls = [held.wait("bob"), held.wait("carol")]
    armed = len(held.timers.timers)
    held.engine.drain()
    await turns()
    for call in calls:
        with pytest.raises(Draining):
            _ = call.answer
    assert len(held.timers.timers) == armed - 2, "timers of waiters are still armed"
    with pytest.raises(Draining):
        await now(held.engine.acquire("dave", 30))
    with pytest.raises(Draining):
        held.engine.ready()
    with pytest.raises(NoKeyAvailable):
        await now(held.engine.acquire("dave", 0))
    await now(held.engine.unblock(lease.key, lease.lease))
    assert (await now(held.engine.acquire("dave", 30))).id == lease.id


@on_loop
async def test_after_closing_timers_do_nothing() -> None:
    """Timers that are still set may fire, and have no effect."""
    held, _ = await held_with("ann", keys=3)
    await now(held.engine.close())
    held.clock.on(KEEPALIVE + LATE)
    held.timers.fire()
    assert held.pool.total == 3
    assert not held.timers.timers


# ----------------------------------------------------------------------------------------------------- batches


@on_loop
async def test_a_batch_is_made_whole_or_not_at_all() -> None:
    """If one key too many is requested, none is generated."""
    held = Held(max_keys=5)
    assert len(await now(held.engine.generate(3))) == 3
    with pytest.raises(PoolFull):
        await now(held.engine.generate(3))
    assert held.pool.total == 3
    assert len(await now(held.engine.generate(2))) == 2


@on_loop
async def test_a_batch_of_acquires_gets_the_available_keys() -> None:
    """It gets fewer if fewer are available; none at all is an error, which counts as one refusal."""
    held = Held()
    await now(held.engine.generate(3))
    leases = await now(held.engine.acquire_many("ann", 5))
    assert [lease.lease for lease in leases] == [1, 2, 3]
    assert len({lease.id for lease in leases}) == 3
    with pytest.raises(NoKeyAvailable):
        await now(held.engine.acquire_many("ann", 5))
    assert held.pool.counters.refused == 1


@on_loop
async def test_a_batch_takes_its_items_one_by_one_in_order() -> None:
    """A key deleted twice is unknown the second time; unblocking a free key is done; a lease fits one key."""
    held, (one, two) = await held_with("ann", "bob", keys=3)
    engine = held.engine
    outcomes = await now(
        engine.unblock_many(
            [
                Unblock(one.key, two.lease),
                Unblock(one.key, one.lease),
                Unblock(one.id, one.lease),
                Unblock(two.key),
                Unblock("x"),
            ]
        )
    )
    assert outcomes == ["stale", "done", "done", "done", "unknown"]
    gone = await now(engine.delete_many([one.key, one.key, one.id, two.id]))
    assert [each if isinstance(each, str) else each.id for each in gone] == [
        one.id,
        "unknown",
        "unknown",
        two.id,
    ]
    left = 6 - one.id - two.id
    assert await now(engine.keepalive_many([one.key, left, left])) == ["unknown", "done", "done"]
    assert held.pool.counters.kept_alive == 2


@on_loop
async def test_a_batch_of_unblocks_serves_waiters_between_its_items() -> None:
    """A key that is in the batch twice may have a new holder the second time."""
    held, (lease,) = await held_with("ann")
    bob = held.wait("bob")
    outcomes = await now(held.engine.unblock_many([Unblock(lease.key, lease.lease)] * 2))
    assert outcomes == ["done", "stale"]
    await turns()
    assert bob.answer.id == lease.id


@on_loop
async def test_a_batch_of_generates_serves_waiters() -> None:
    """The waiters are served in order, and the other keys are available."""
    held = Held()
    calls = [held.wait(name) for name in "abc"]
    await now(held.engine.generate(5))
    await turns()
    assert [call.answer.lease for call in calls] == [1, 2, 3]
    assert (held.pool.available, held.pool.blocked) == (2, 3)
    await held.check()


# ----------------------------------------------------------------------------------------------------- a crowd

MANY = 10_000


async def crowd(**settings: Any) -> Held:
    """A pool of 10,000 expired keys whose timers have not fired."""
    held = Held(**settings)
    for _ in range(MANY // 1000):
        await now(held.engine.generate(1000))
    held.clock.on(KEEPALIVE)
    return held


async def expect_short_turns(held: Held, call: Call[Any]) -> int:
    """Let a call run to its end. Fails if it processed more than a bounded number of keys in a turn of the loop.

    Returns the number of turns.
    """
    count, total = 0, held.pool.total
    while not call.over:
        await asyncio.sleep(0)
        count += 1
        done, total = total - held.pool.total, held.pool.total
        assert done <= 3 * MAX_DUE_PER_CALL, f"{done} keys were purged in one turn of the loop"
        assert count < MANY, "the call does not come to an end"
    return count


@on_loop
async def test_acquire_in_a_crowd_of_expired_keys_finds_none_in_short_turns() -> None:
    """It purges all of them, some in each turn, and is refused."""
    held = await crowd()
    call = Call(held.engine.acquire("ann", 0))
    assert await expect_short_turns(held, call) >= MANY // (3 * MAX_DUE_PER_CALL)
    with pytest.raises(NoKeyAvailable) as refusal:
        _ = call.answer
    assert refusal.value.retry_after is None
    assert (held.pool.total, held.pool.counters.refused) == (0, 1)
    assert not held.timers.timers


@on_loop
async def test_acquire_in_a_crowd_of_expired_keys_finds_the_one_that_lives() -> None:
    """That key was kept alive a second before the others expired."""
    held = Held()
    for _ in range(MANY // 1000):
        await now(held.engine.generate(1000))
    held.clock.on(KEEPALIVE - 1)
    await now(held.engine.keepalive(MANY // 2))
    held.clock.on(1)
    call = Call(held.engine.acquire("ann", 0))
    await expect_short_turns(held, call)
    assert call.answer.id == MANY // 2
    await held.check()


@on_loop
async def test_acquire_in_a_crowd_of_held_keys_that_expired_finds_the_one_that_lives() -> None:
    """All blocks are overdue, all keys but one have expired, and no timer has fired."""
    held = Held(block_seconds=10.0, keepalive_seconds=20.0)
    for _ in range(3):
        await now(held.engine.generate(100))
        last = (await now(held.engine.acquire_many("ann", 100)))[-1]
    held.clock.on(5)
    await now(held.engine.keepalive(last.id))
    held.clock.on(15)
    call = Call(held.engine.acquire("bob", 0))
    await expect_short_turns(held, call)
    assert call.answer.id == last.id


@on_loop
async def test_generate_into_a_pool_full_of_expired_keys_makes_room_in_short_turns() -> None:
    """Expired keys take no room, even if their timers are late."""
    held = await crowd(max_keys=MANY)
    call = Call(held.engine.generate(1000))
    await expect_short_turns(held, call)
    assert len(call.answer) == 1000
    assert held.pool.total <= MANY
    await held.check()


@on_loop
async def test_a_page_in_a_crowd_of_expired_keys_shows_none_of_them() -> None:
    """Pages are short at first, with a `next`, until the end of the expired keys."""
    held = await crowd()
    query, pages = ListQuery(), 0
    while True:
        page = await now(held.engine.page(query))
        assert page.keys == []
        pages += 1
        if page.next is None:
            break
        query = ListQuery(after=page.next)
    assert pages <= MANY // pool_module.PAGE_SCAN_LIMIT + 1


@on_loop
async def test_a_waiter_behind_a_crowd_of_expired_keys_gets_the_first_that_lives() -> None:
    """Meanwhile the loop serves other calls."""
    held = await crowd()
    bob = held.wait("bob", 30)
    await expect_short_turns_until_waiting(held)
    (made,) = await now(held.engine.generate(1))
    await turns_until(lambda: bob.over, "the waiter is served")
    assert bob.answer.id == made.id


async def expect_short_turns_until_waiting(held: Held) -> None:
    """Let the expired keys be purged, until the call waits for a key."""
    await turns_until(lambda: held.pool.total == 0, "the crowd is purged")


@on_loop
async def test_serving_waiters_turn_by_turn_goes_by_the_time_of_each_turn() -> None:
    """Serving may go on in a later turn; a key that has expired by then is not served."""
    last = 8 * MAX_DUE_PER_CALL
    held, _ = await held_with(*["ann"] * last, block_seconds=30.0, keepalive_seconds=20.0)
    held.pool._random = lambda: 0.5  # meets the one that lives last
    (living,) = [key for key in held.pool._by_id.walk(None) if key.lease == last]
    held.clock.on(15)
    await now(held.engine.keepalive(living.id))
    bob = held.wait("bob", 60)
    held.clock.to(START + 30)
    carol = Call(held.engine.acquire("carol", 0))
    assert held.pool.total > 1, "the crowd was dealt with in one turn"
    held.clock.to(START + 35)  # the last key expires
    await turns(50)
    assert not bob.over, f"served {bob.answer}, which had expired"
    assert held.pool.total == 0
    with pytest.raises(NoKeyAvailable):
        _ = carol.answer


# ------------------------------------------------------------------------- deadlines with timers held back

Ask = Callable[[EmbeddedEngine, str, int], Awaitable[Any]]


async def _page_ids(engine: EmbeddedEngine, **query: Any) -> set[int]:
    return {row.id for row in (await engine.page(ListQuery(**query))).keys}


async def _head(engine: EmbeddedEngine) -> Any:
    """HEAD on the first version's path: whether a key is available."""
    operation = next(each for each in LEGACY if each.name == "legacy-acquire")
    assert operation.head is not None
    return await operation.head(engine, ApiCall(Caller(Role.ADMIN, ""), "", ""))


@dataclass(frozen=True)
class Sees:
    """A call whose answer may contain a key, and its result for an unknown key."""

    name: str
    ask: Ask
    unknown: Any = UnknownKey


async def _mapped(call: Awaitable[list[Any]]) -> Any:
    return (await call)[0]


SEES = [
    Sees("get by text", lambda e, text, number: e.get(text)),
    Sees("get by id", lambda e, text, number: e.get(number)),
    Sees("reveal", lambda e, text, number: e.reveal(number)),
    Sees("unblock", lambda e, text, number: e.unblock(text, None)),
    Sees("unblock with a lease", lambda e, text, number: e.unblock(text, 1)),
    Sees("keepalive", lambda e, text, number: e.keepalive(text)),
    Sees("delete", lambda e, text, number: e.delete(text)),
    Sees("batch of unblocks", lambda e, text, number: _mapped(e.unblock_many([Unblock(text)])), "unknown"),
    Sees("batch of keepalives", lambda e, text, number: _mapped(e.keepalive_many([text])), "unknown"),
    Sees("batch of deletes", lambda e, text, number: _mapped(e.delete_many([text])), "unknown"),
    Sees("list", lambda e, text, number: _page_ids(e), set()),
    Sees("list by state", lambda e, text, number: _page_ids(e, state="available"), set()),
    Sees("list by prefix", lambda e, text, number: _page_ids(e, prefix="0"), set()),
    Sees("list by expiry", lambda e, text, number: _page_ids(e, order="expiry"), set()),
    Sees("list by release", lambda e, text, number: _page_ids(e, order="release"), set()),
    Sees("acquire", lambda e, text, number: e.acquire(None, 0), NoKeyAvailable),
    Sees("batch of acquires", lambda e, text, number: e.acquire_many(None, 3), NoKeyAvailable),
]
HEAD = Sees("HEAD of the first version", lambda e, text, number: _head(e), NoKeyAvailable)


async def _outcome(call: Awaitable[Any]) -> Any:
    """The answer of a call, or the class of its error."""
    try:
        return await now(call)
    except KeypoolError as error:
        return type(error)


@pytest.mark.parametrize(
    ("sees", "held_then"),
    [
        *(pytest.param(each, False, id=f"{each.name}, a free one") for each in SEES),
        *(pytest.param(each, True, id=f"{each.name}, a held one") for each in SEES),
        pytest.param(HEAD, False, id=HEAD.name),
    ],
)
def test_no_call_sees_a_key_past_its_expiry_even_if_the_timer_is_late(sees: Sees, held_then: bool) -> None:
    """From the deadline on, it is unknown, in no list and not served; a moment before, it is."""

    @on_loop
    async def test() -> None:
        for moment, lives in ((KEEPALIVE - 0.001, True), (KEEPALIVE, False), (KEEPALIVE + 9, False)):
            held = Held()
            (made,) = await now(held.engine.generate(1))
            held.clock.on(KEEPALIVE - 1)
            if held_then:
                await now(held.engine.acquire("ann", 0))
            held.clock.to(START + moment)
            outcome = await _outcome(sees.ask(held.engine, made.key, made.id))
            if not lives:
                assert outcome == sees.unknown, f"{moment - KEEPALIVE} s after its expiry: {outcome}"
            elif not held_then and sees.name not in ("list by release", "unblock with a lease"):
                assert outcome != sees.unknown, f"a moment before its expiry: {outcome}"
            held.pool.check()

    test()


STATES: list[tuple[str, Ask, Any, Any]] = [
    # what a call says of a held key, and of one whose block ran out
    ("get", lambda e, text, number: _state(e.get(text)), "blocked", "available"),
    ("get by id", lambda e, text, number: _state(e.get(number)), "blocked", "available"),
    ("row", lambda e, text, number: _row_facts(e.get(number)), ("ann", 0.001), (None, None)),
    ("unblock", lambda e, text, number: _changed(e.unblock(text, None)), True, False),
    ("unblock with its lease", lambda e, text, number: _changed(e.unblock(text, 1)), True, False),
    ("acquire", lambda e, text, number: _lease(e.acquire("bob", 0)), NoKeyAvailable, 2),
    ("acquire that would wait", lambda e, text, number: _lease(e.acquire("bob", 0.001)), "waits", 2),
    ("batch of acquires", lambda e, text, number: _lease(_mapped(e.acquire_many("b", 2))), NoKeyAvailable, 2),
    ("list of available keys", lambda e, text, number: _page_ids(e, state="available"), set(), {1}),
    ("list of blocked keys", lambda e, text, number: _page_ids(e, state="blocked"), {1}, set()),
    ("list by release", lambda e, text, number: _page_ids(e, order="release"), {1}, set()),
    (
        "available keys by prefix",
        lambda e, text, number: _page_ids(e, prefix="0", state="available"),
        set(),
        {1},
    ),
    (
        "available keys by expiry",
        lambda e, text, number: _page_ids(e, order="expiry", state="available"),
        set(),
        {1},
    ),
    ("row in a list", lambda e, text, number: _listed(e), ("ann", 0.001), (None, None)),
]


async def _state(call: Awaitable[Row]) -> str:
    return (await call).state.value


async def _row_facts(call: Awaitable[Row]) -> tuple[str | None, float | None]:
    row = await call
    return row.owner, row.release_in


async def _listed(engine: EmbeddedEngine) -> tuple[str | None, float | None]:
    row = (await engine.page(ListQuery())).keys[0]
    return row.owner, row.release_in


async def _changed(call: Awaitable[Any]) -> bool:
    changed: bool = (await call).changed
    return changed


async def _lease(call: Awaitable[Lease]) -> int:
    return (await call).lease


async def _head_says(engine: EmbeddedEngine) -> str:
    await _head(engine)
    return "200"


@pytest.mark.parametrize(
    ("ask", "while_held", "after"),
    [
        *(pytest.param(ask, held, free, id=name) for name, ask, held, free in STATES),
        pytest.param(
            lambda e, text, number: _head_says(e),
            NoKeyAvailable,
            "200",
            id="HEAD of the first version",
        ),
    ],
)
def test_no_call_sees_a_block_past_its_deadline_even_if_the_timer_is_late(
    ask: Ask, while_held: Any, after: Any
) -> None:
    """From the deadline on, the key is available to everybody; a millisecond before, it is held."""

    @on_loop
    async def test() -> None:
        for moment, wanted in ((BLOCK - 0.001, while_held), (BLOCK, after), (BLOCK + 9, after)):
            held, (lease,) = await held_with("ann")
            held.clock.to(START + moment)
            call: Call[Any] = Call(_outcome_of(ask(held.engine, lease.key, lease.id)))
            outcome = call.answer if call.over else "waits"
            if not call.over:
                call.hang_up()
            assert outcome == wanted, f"{moment - BLOCK:.3f} s after the release deadline: {outcome}"
            held.pool.check()

    test()


async def _outcome_of(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except KeypoolError as error:
        return type(error)


WAKES: list[tuple[str, Ask]] = [
    ("get", lambda e, text, number: e.get(text)),
    ("reveal", lambda e, text, number: e.reveal(number)),
    ("unblock with its lease", lambda e, text, number: e.unblock(text, 1)),
    ("unblock with a wrong lease", lambda e, text, number: e.unblock(text, 9)),
    ("keepalive", lambda e, text, number: e.keepalive(text)),
    ("batch of keepalives", lambda e, text, number: e.keepalive_many([text])),
    ("batch of unblocks", lambda e, text, number: e.unblock_many([Unblock(text, 1)])),
    ("batch of unblocks with a wrong lease", lambda e, text, number: e.unblock_many([Unblock(text, 9)])),
    ("batch of a key and nobody's", lambda e, text, number: e.keepalive_many([text, "nobody"])),
    ("list", lambda e, text, number: e.page(ListQuery())),
    ("acquire", lambda e, text, number: e.acquire("carol", 0)),
    ("acquire that waits", lambda e, text, number: e.acquire("carol", 30)),
    ("batch of acquires", lambda e, text, number: e.acquire_many("carol", 3)),
    ("generate", lambda e, text, number: e.generate(1)),
]


@pytest.mark.parametrize(("name", "ask"), WAKES, ids=[name for name, _ in WAKES])
def test_every_call_that_finds_a_block_overdue_serves_waiters(name: str, ask: Ask) -> None:
    """The call cancels the late timer, so nothing else would serve the waiter."""

    @on_loop
    async def test() -> None:
        held, (lease,) = await held_with("ann")
        bob = held.wait("bob", 60)
        held.clock.on(BLOCK)
        call: Call[Any] = Call(_outcome_of(ask(held.engine, lease.key, lease.id)))
        await turns()
        await held.check()
        assert bob.over, f"{name} found the key's block overdue, and bob waits"
        if not call.over:
            call.hang_up()

    test()


@on_loop
async def test_a_list_of_available_keys_shows_none_that_is_blocked() -> None:
    """This holds even if listing finds its block overdue and a waiter then gets it."""
    held, _ = await held_with("ann")
    held.wait("bob", 60)
    held.clock.on(BLOCK)
    page = await now(held.engine.page(ListQuery(state="available")))
    states = [row.state.value for row in page.keys]
    assert set(states) <= {"available"}, f"a list of available keys shows {page.keys}"


# ------------------------------------------------------------------------------------------------------- lists


@on_loop
async def test_head_of_the_first_version_is_404_in_a_pool_of_blocked_keys() -> None:
    """A page that examined a part of the keys and found none available proves nothing about the rest."""
    count = pool_module.PAGE_SCAN_LIMIT + 1
    held = Held()
    await now(held.engine.generate(count))
    await now(held.engine.acquire_many("ann", count))
    assert await _outcome(_head(held.engine)) is NoKeyAvailable


@on_loop
async def test_head_of_the_first_version_has_retry_after() -> None:
    """Like GET on the same path."""
    held, _ = await held_with("ann")
    for call in (held.engine.acquire(None, 0), _head(held.engine)):
        with pytest.raises(NoKeyAvailable) as refusal:
            await now(call)
        assert refusal.value.retry_after == BLOCK


@on_loop
async def test_a_cursor_is_carried_from_page_to_page() -> None:
    """The cursor is text; an invalid one is a bad request."""
    held = Held()
    await now(held.engine.generate(5))
    seen: list[int] = []
    query = ListQuery(limit=2)
    while True:
        page = await now(held.engine.page(query))
        seen += [row.id for row in page.keys]
        if page.next is None:
            break
        query = ListQuery(limit=2, after=page.next)
    assert seen == [1, 2, 3, 4, 5]
    with pytest.raises(BadRequest):
        await now(held.engine.page(ListQuery(after="nonsense")))
    with pytest.raises(BadRequest):
        await now(held.engine.page(ListQuery(order="expiry", after=query.after)))


@on_loop
async def test_the_latest_events_are_kept() -> None:
    """With the owner at that moment, without keepalives, up to a fixed number."""
    held, (lease,) = await held_with("ann")
    await now(held.engine.keepalive(lease.id))
    await now(held.engine.reveal(lease.id))
    await now(held.engine.unblock(lease.id, None))
    await now(held.engine.delete(lease.id))
    changes = [(change.value, key.id, owner, lease) for change, key, owner, lease, *_ in held.engine.events]
    assert changes == [
        ("generated", 1, None, 0),
        ("acquired", 1, "ann", 1),
        ("revealed", 1, "ann", 1),
        ("unblocked", 1, "ann", 1),
        ("deleted", 1, None, 1),
    ]
    for _ in range(2):
        await now(held.engine.generate(1000))
    assert len(held.engine.events) == RECENT_EVENTS
    latest = held.engine.recent(50)
    assert [event.id for event in latest] == list(range(held.pool.last_id - 49, held.pool.last_id + 1))
    assert held.engine.recent(50, lease.id) == [], "its events are no more among the latest"


@on_loop
async def test_restored_keys_have_their_timers() -> None:
    """From `start` on, each deadline has a timer for the time that is left. A purged key has none."""
    held = Held(start_timers=False)
    keys = [Key(id, f"{id:020}", START - 50, START + 250) for id in (1, 2, 3)]
    keys[1].release_deadline, keys[1].lease, keys[1].owner = START + 10, 7, "ann"
    keys[1].state = State.BLOCKED
    held.pool.last_id, held.pool.last_lease = 3, 7
    for key in keys:
        held.pool.load(key)
    held.pool.delete(keys[2])  # as one that expired while no server ran
    assert not held.timers.timers, "a pool that is being restored must not move"
    held.engine.start()
    releases, expiries = held.timers.for_deadline(10), held.timers.for_deadline(250)
    assert (len(releases), len(expiries)) == (1, 1)
    assert held.engine.timers.armed == len(held.timers.timers) == 2
    held.pool.check()
    held.clock.on(10 + LATE)
    held.timers.fire(*releases)
    assert (held.pool.total, held.pool.blocked) == (2, 0)
    held.clock.on(240)
    held.timers.fire(*expiries)
    assert held.pool.total == 0
