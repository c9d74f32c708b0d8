"""The embedded engine's calls for real work: outcomes, quarantine, extensions, attempts that are repeated.

The rules themselves are tested with the pool; here it is what the engine adds: answers, events, waiters, and callers
who hang up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from engine_support import BLOCK, LATE, Call, Held, held_with, now, on_loop, turns

from keypool.core.answers import Extension, Lease, Unblock
from keypool.core.cursor import ListQuery
from keypool.core.errors import BlockLimit, LeaseOver, NoKeyAvailable, StaleLease, Superseded, UnknownKey
from keypool.core.events import By, Origin
from keypool.core.keys import State
from keypool.core.outcomes import Outcome, Report
from keypool.engine.waiters import PLACE_SECONDS

OPERATOR = Origin(By.OPERATOR, "1a2b3c4d")
LIMITED = Report(Outcome.RATE_LIMITED, 30.0, "429 from the service")
INVALID = Report(Outcome.INVALID, reason="401")


@dataclass
class Named:
    """An attempt."""

    digest: bytes = b"a" * 16
    replayed: bool = False


def wait(held: Held, attempt: Named | None = None, owner: str = "ann", seconds: float = 30.0) -> Call[Lease]:
    """A pending acquire under an attempt."""
    return Call(held.engine.acquire(owner, seconds, None, None, attempt))


async def in_vain(held: Held) -> None:
    """Let the time of those run out who wait for 5 s."""
    held.clock.on(5.0)
    held.timers.fire(*(timer for timer in held.timers.timers if timer.seconds == 5))
    await turns()


# ------------------------------------------------------------------------------------------------- outcomes


@on_loop
async def test_a_rate_limited_key_cools_and_then_serves_the_first_waiter() -> None:
    """The answer says for how long; no call gets the key before; the end of the cooldown serves who waits."""
    held, (lease,) = await held_with("ann")
    answer = await now(held.engine.unblock(lease.key, lease.lease, None, LIMITED))
    assert (answer.state, answer.changed, answer.available_in) == (State.COOLING, True, 30.0)
    bob = held.wait("bob", 60)
    assert not bob.over
    held.clock.on(30.0 + LATE)
    held.timers.fire(*held.timers.for_deadline(30.0))
    await turns()
    assert bob.answer.id == lease.id
    await held.check()


@on_loop
async def test_no_key_available_counts_the_keys_by_state_and_names_the_first_that_comes_back() -> None:
    """A cooldown that ends before any block does is what there is to wait for."""
    held, leases = await held_with("ann", "bob", "carol")
    await now(held.engine.unblock(leases[0].key, leases[0].lease, None, LIMITED))
    await now(held.engine.quarantine(leases[1].id, "banned", True, OPERATOR))
    with pytest.raises(NoKeyAvailable) as refused:
        await now(held.engine.acquire(None, 0))
    error = refused.value
    assert (error.blocked, error.cooling, error.quarantined, error.retry_after) == (1, 1, 1, 30.0)
    assert "1 blocked, 1 cooling, 1 quarantined" in error.detail


@on_loop
async def test_rows_tell_what_the_latest_report_said() -> None:
    """`available_in` while it cools, the failures in a row, outcome and reason."""
    held, (lease,) = await held_with("ann")
    await now(held.engine.unblock(lease.key, lease.lease, None, LIMITED))
    held.clock.on(10.0)
    row = await now(held.engine.get(lease.id))
    assert (row.state, row.available_in, row.release_in) == (State.COOLING, 20.0, None)
    assert (row.failures, row.outcome, row.reason) == (1, Outcome.RATE_LIMITED, "429 from the service")
    listed = await now(held.engine.page(ListQuery(order="ready")))
    assert listed.keys == [row]


@on_loop
async def test_every_event_says_what_brought_it_about() -> None:
    """A holder, a deadline, or an operator with the token's name; the numbers of the events have no gap."""
    held, (lease, other) = await held_with("ann", "bob")
    seq = held.engine.event_seq
    await now(held.engine.unblock(lease.key, lease.lease, None, LIMITED))
    held.clock.on(30.0)
    await now(held.engine.get(lease.id))
    await now(held.engine.quarantine(other.id, None, True, OPERATOR))
    await now(held.engine.restore(other.id, OPERATOR))
    events = held.engine.recent(100)[4:]
    assert [(each.event.value, each.id, each.by.value, each.actor) for each in events] == [
        ("unblocked", lease.id, "holder", None),
        ("cooled", lease.id, "holder", None),
        ("ready", lease.id, "deadline", None),
        ("unblocked", other.id, "operator", "1a2b3c4d"),
        ("quarantined", other.id, "operator", "1a2b3c4d"),
        ("restored", other.id, "operator", "1a2b3c4d"),
    ]
    assert held.engine.event_seq == seq + len(events)


@on_loop
async def test_a_restored_key_serves_a_waiter() -> None:
    """The invariant of the queue holds for the operator's calls as well."""
    held, (lease,) = await held_with("ann")
    await now(held.engine.unblock(lease.key, lease.lease, None, INVALID))
    bob = held.wait("bob")
    row = await now(held.engine.restore(lease.id, OPERATOR))
    assert row.state is State.AVAILABLE
    await turns()
    assert bob.answer.id == lease.id


# ------------------------------------------------------------------------------------------------- handles


@on_loop
async def test_a_handle_names_key_and_lease_until_the_key_is_served_again() -> None:
    """Afterwards every call with it is refused as stale; a purged key is unknown."""
    held, (lease,) = await held_with("ann")
    engine = held.engine
    handle = engine.handles.read(lease.handle)
    assert handle is not None
    assert (handle.id, handle.lease) == (lease.id, lease.lease)
    assert (await now(engine.keepalive(handle))).id == lease.id
    await now(engine.unblock(handle, handle.lease))
    await now(engine.acquire("bob", 0))
    for call in (engine.get(handle), engine.keepalive(handle), engine.delete(handle), engine.reveal(handle)):
        with pytest.raises(StaleLease):
            await now(call)
    assert await now(engine.keepalive_many([handle, lease.key])) == ["stale", "done"]
    assert await now(engine.unblock_many([Unblock(handle, handle.lease)])) == ["stale"]
    assert await now(engine.delete_many([handle])) == ["stale"]
    await now(engine.delete(lease.id))
    with pytest.raises(UnknownKey):
        await now(engine.get(handle))


@pytest.mark.parametrize(
    "change",
    [
        lambda handle: handle[:-1],
        lambda handle: handle[:-1] + ("A" if handle[-1] != "A" else "B"),
        lambda handle: handle.replace("h:1.", "h:2."),
        lambda handle: handle.replace("h:", "h:0"),
        lambda handle: handle + "\n",
        lambda handle: handle.upper(),
    ],
)
@on_loop
async def test_a_changed_handle_names_nothing(change: Any) -> None:
    """Cut short, with another digit, key or form: nobody can make one up."""
    held, (lease,) = await held_with("ann")
    assert held.engine.handles.read(change(lease.handle)) is None


@on_loop
async def test_a_handle_of_another_pool_names_nothing() -> None:
    """Each pool has a secret of its own."""
    _, (lease,) = await held_with("ann")
    other, (same,) = await held_with("ann")
    assert (lease.id, lease.lease) == (same.id, same.lease)
    assert other.engine.handles.read(lease.handle) is None


# ------------------------------------------------------------------------------------------------- extensions


@on_loop
async def test_an_extension_says_how_long_the_lease_lasts_and_can_last() -> None:
    """Under the same lease number; at the cap there is nothing left to give."""
    held, (lease,) = await held_with("ann", max_block_seconds=3 * BLOCK)
    held.clock.on(50.0)
    extended = await now(held.engine.extend(lease.key, lease.lease, None))
    assert (extended.lease, extended.release_in, extended.block_left) == (lease.lease, BLOCK, 3 * BLOCK - 50)
    with pytest.raises(BlockLimit, match="must be larger"):
        await now(held.engine.extend(lease.key, lease.lease, 10.0))
    await now(held.engine.extend(lease.key, lease.lease, 1e9))
    with pytest.raises(BlockLimit, match="max_block_seconds"):
        await now(held.engine.extend(lease.key, lease.lease, 1e9))
    outcomes = await now(
        held.engine.extend_many(
            [
                Extension(lease.key, lease.lease, 1e9),
                Extension(lease.key, lease.lease + 1),
                Extension("x", 1),
            ]
        )
    )
    assert outcomes == ["limit", "stale", "unknown"]
    await now(held.engine.unblock(lease.key, lease.lease))
    with pytest.raises(LeaseOver):
        await now(held.engine.extend(lease.key, lease.lease, None))


# ------------------------------------------------------------------------------------- attempts, and repeats


@on_loop
async def test_a_repeated_attempt_gets_the_lease_that_it_was_given() -> None:
    """With the times as of now; when the lease is over, it is a new acquire."""
    held = Held()
    await now(held.engine.generate(5))
    first = await now(held.engine.acquire("ann", 0, None, None, Named()))
    held.clock.on(20.0)
    again = Named()
    repeated = await now(held.engine.acquire("ann", 0, None, None, again))
    assert (repeated.id, repeated.lease, repeated.handle) == (first.id, first.lease, first.handle)
    assert (again.replayed, repeated.release_in) == (True, BLOCK - 20.0)
    await now(held.engine.unblock(first.key, first.lease))
    anew = Named()
    assert (await now(held.engine.acquire("ann", 0, None, None, anew))).lease == first.lease + 1
    assert not anew.replayed
    await held.check()


@on_loop
async def test_a_repeated_batch_gets_those_of_its_leases_that_are_held() -> None:
    """When none is, it is a new acquire."""
    held = Held()
    await now(held.engine.generate(5))
    first = await now(held.engine.acquire_many("ann", 3, None, Named()))
    await now(held.engine.unblock(first[1].key, first[1].lease))
    again = Named()
    repeated = await now(held.engine.acquire_many("ann", 3, None, again))
    assert again.replayed
    assert [each.lease for each in repeated] == [first[0].lease, first[2].lease]
    for each in repeated:
        await now(held.engine.unblock(each.key, each.lease))
    assert len(await now(held.engine.acquire_many("ann", 3, None, Named()))) == 3


@on_loop
async def test_a_repeat_takes_the_place_of_the_call_that_still_waits() -> None:
    """The first is told so; those behind stay behind."""
    held, (lease,) = await held_with("dave")
    first = wait(held, Named())
    bob = held.wait("bob")
    again = wait(held, Named())
    await turns()
    with pytest.raises(Superseded):
        first.answer  # noqa: B018 - raises
    assert (await now(held.engine.stats())).waiting == 2
    await now(held.engine.unblock(lease.key, lease.lease))
    await turns()
    assert again.answer.id == lease.id
    assert not bob.over


@on_loop
async def test_who_asks_again_soon_after_waiting_in_vain_keeps_the_place() -> None:
    """Also whoever hung up; those who came later are served later."""
    held, (lease,) = await held_with("dave", block_seconds=1000.0)
    first = wait(held, Named(), seconds=5)
    bob = held.wait("bob", 500)
    await in_vain(held)
    with pytest.raises(NoKeyAvailable):
        first.answer  # noqa: B018 - raises
    held.clock.on(PLACE_SECONDS - 1)
    again = wait(held, Named(), seconds=5)
    again.hang_up()
    once_more = wait(held, Named(), seconds=5)
    await now(held.engine.unblock(lease.key, lease.lease))
    await turns()
    assert once_more.answer.id == lease.id
    assert not bob.over


@on_loop
async def test_a_place_is_kept_for_ten_seconds_and_no_longer() -> None:
    """After that the attempt queues at the end."""
    held, (lease,) = await held_with("dave", block_seconds=1000.0)
    first = wait(held, Named(), seconds=5)
    bob = held.wait("bob", 500)
    await in_vain(held)
    assert first.over
    held.clock.on(PLACE_SECONDS + 0.1)
    again = wait(held, Named(), seconds=5)
    await now(held.engine.unblock(lease.key, lease.lease))
    await turns()
    assert bob.answer.id == lease.id
    assert not again.over


@on_loop
async def test_places_that_are_kept_hold_nobody_up() -> None:
    """A key that is free goes to whoever asks, though somebody may come back for a place."""
    held, (lease,) = await held_with("dave", block_seconds=1000.0)
    first = wait(held, Named(), seconds=5)
    await in_vain(held)
    assert first.over
    await now(held.engine.unblock(lease.key, lease.lease))
    assert (await now(held.engine.acquire("bob", 0))).id == lease.id


@on_loop
async def test_a_lease_that_was_repeated_is_not_taken_back_when_the_first_caller_hangs_up() -> None:
    """The connection of the first call may be found dead after the second has its answer."""
    held, (lease,) = await held_with("dave")
    first = wait(held, Named())
    await now(held.engine.unblock(lease.key, lease.lease))  # serves the first call, which isn't resumed yet
    repeated = await now(held.engine.acquire("ann", 30, None, None, Named()))
    first.hang_up()
    assert held.now_serving() == [(lease.id, "ann")]
    assert (await now(held.engine.unblock(repeated.key, repeated.lease))).changed


@on_loop
async def test_a_repeated_lease_leaves_no_mark_on_the_next_one() -> None:
    """The next holder may name no attempt; if it hangs up as it is served, its lease is given back as always."""
    held = Held()
    await now(held.engine.generate(1))
    await now(held.engine.acquire("ann", 0, None, None, Named()))
    repeated = await now(held.engine.acquire("ann", 0, None, None, Named()))
    bob, carol = held.wait("bob"), held.wait("carol")
    await now(held.engine.unblock(repeated.key, repeated.lease))  # serves bob, who isn't resumed yet
    bob.hang_up()
    assert held.now_serving() == [(repeated.id, "carol")]
    await turns()
    assert carol.answer.id == repeated.id
