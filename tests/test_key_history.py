"""The history of keys: which leases are recorded, with what, and which are kept.

Here the engine is in memory, on a clock that the test moves. Data files and Valkey have tests of their own
(test_durable_history.py, test_valkey_history.py).
"""

from __future__ import annotations

import random

import pytest
from engine_support import BLOCK, START, Held, held_with, now, on_loop, turns_until

from keypool.core.answers import HistoryRow, Unblock
from keypool.core.cursor import HistoryQuery, encode
from keypool.core.errors import BadRequest, BlockLimit, PoolFixed, StaleLease, UnknownKey
from keypool.core.events import By, Origin
from keypool.core.handles import Handle
from keypool.core.history import How, PastLease
from keypool.core.keys import moment
from keypool.core.outcomes import Outcome, Report
from keypool.core.rules import PoolRules
from keypool.engine import Client
from keypool.engine.embedded import EmbeddedEngine
from keypool.engine.history import MemoryHistory
from keypool.engine.pools import EmbeddedPools

OPERATOR = Origin(By.OPERATOR, "ops")
LIMITED = Report(Outcome.RATE_LIMITED, 5.0, "429 from the service")


async def history(engine: EmbeddedEngine, id: int, **query: object) -> list[HistoryRow]:
    """A page of a key's history, for which no call waits."""
    rows: list[HistoryRow] = (await now(engine.history(id, HistoryQuery(**query)))).history  # type: ignore[arg-type]
    return rows


async def only_one(held: Held, id: int = 1) -> HistoryRow:
    """The only lease in a history."""
    [row] = await history(held.engine, id)
    return row


# ------------------------------------------------------------------------------------------------------ what it has


@on_loop
async def test_a_lease_is_recorded_when_it_ends_with_all_that_was_known_of_it() -> None:
    """The running lease isn't in it. The owner and the client are those of the lease."""
    held = Held(history_leases=10)
    await now(held.engine.generate(1))
    lease = await now(held.engine.acquire("worker-7", 0, client=Client("crawler")))
    assert await history(held.engine, 1) == []
    held.clock.on(2.5)
    await now(held.engine.unblock(lease.key, lease.lease, None, LIMITED))
    assert await history(held.engine, 1) == [
        HistoryRow(
            lease.lease, "worker-7", "crawler", moment(START), moment(START + 2.5), 2.5, How.UNBLOCKED,
            Outcome.RATE_LIMITED, "429 from the service", 0,
        )
    ]  # fmt: skip


@on_loop
async def test_a_lease_that_runs_out_is_released_at_its_deadline_however_late_that_is_noticed() -> None:
    """Also if the key has expired meanwhile: its lease was over before."""
    held, _ = await held_with("ann", history_leases=10)
    held.clock.on(BLOCK + 400)
    with pytest.raises(UnknownKey):
        await now(held.engine.get(1))
    row = await only_one(held)
    assert (row.how, row.held, row.ended_at) == (How.RELEASED, BLOCK, moment(START + BLOCK))
    assert (row.outcome, row.reason) == (None, None)


@on_loop
async def test_a_lease_that_ends_with_its_key_is_deleted_or_expired() -> None:
    """At the moment of the delete, or at the deadline of the key."""
    held, _ = await held_with("ann", "bob", history_leases=10, keepalive_seconds=20.0)
    held.clock.on(3)
    await now(held.engine.delete(1, OPERATOR))
    held.clock.on(100)
    held.pool.process_due(held.clock.at)
    deleted, expired = await only_one(held, 1), await only_one(held, 2)
    assert (deleted.how, deleted.held, expired.how, expired.held) == (How.DELETED, 3.0, How.EXPIRED, 20.0)


@on_loop
async def test_what_an_operator_ends_is_revoked() -> None:
    """An unblock without the lease by an operator, a quarantine with `now`. One by a client is an unblock."""
    held, leases = await held_with("ann", "bob", "carol", history_leases=10)
    await now(held.engine.unblock(leases[0].id, None, None, None, OPERATOR))
    await now(held.engine.quarantine(leases[1].id, "banned", True, OPERATOR))
    await now(held.engine.unblock_many([Unblock(leases[2].key)]))
    rows = [await only_one(held, lease.id) for lease in leases]
    assert [row.how for row in rows] == [How.REVOKED, How.REVOKED, How.UNBLOCKED]
    assert [row.reason for row in rows] == [None, None, None]


@on_loop
async def test_an_unblock_without_a_report_has_no_outcome_though_the_key_has_one() -> None:
    """The outcome of a key is that of its latest report, which may be of a lease long ago."""
    held, (lease,) = await held_with("ann", history_leases=10)
    await now(held.engine.unblock(1, lease.lease, None, Report(Outcome.ERROR, reason="500")))
    again = await now(held.engine.acquire("bob", 0))
    await now(held.engine.unblock(1, again.lease))
    assert (await now(held.engine.get(1))).outcome is Outcome.ERROR
    assert [row.outcome for row in await history(held.engine, 1)] == [None, Outcome.ERROR]


@on_loop
async def test_a_late_report_that_counts_is_added_to_the_record_of_its_lease() -> None:
    """Only the first one counts, and one on an older lease is refused. How the lease ended stays as it was."""
    held, (lease,) = await held_with("ann", history_leases=10)
    held.clock.on(BLOCK + 1)
    assert (await now(held.engine.unblock(1, lease.lease, None, LIMITED))).changed
    assert not (await now(held.engine.unblock(1, lease.lease, None, Report(Outcome.INVALID)))).changed
    row = await only_one(held)
    assert (row.how, row.held, row.outcome, row.reason) == (
        How.RELEASED, BLOCK, Outcome.RATE_LIMITED, "429 from the service",
    )  # fmt: skip
    held.clock.on(5)
    await now(held.engine.acquire("bob", 0))
    with pytest.raises(StaleLease):
        await now(held.engine.unblock(1, lease.lease, None, Report(Outcome.INVALID)))
    assert await only_one(held) == row


@on_loop
async def test_extensions_of_a_lease_are_counted_for_that_lease() -> None:
    """The next lease of the key starts from zero. A refused extension doesn't count."""
    held, (lease,) = await held_with("ann", history_leases=10, max_block_seconds=600.0)
    for seconds in (100, 200):
        await now(held.engine.extend(1, lease.lease, seconds))
    with pytest.raises(BlockLimit):
        await now(held.engine.extend(1, lease.lease, 1))
    await now(held.engine.unblock(1, lease.lease))
    again = await now(held.engine.acquire("ann", 0))
    await now(held.engine.unblock(1, again.lease))
    assert [row.extended for row in await history(held.engine, 1)] == [0, 2]
    held.pool.check()


@on_loop
async def test_a_lease_whose_caller_hung_up_is_recorded_as_any_other() -> None:
    """It was given, and it ended."""
    held = Held(history_leases=10)
    pending = held.wait("ann")
    await now(held.engine.generate(1))
    pending.hang_up()
    await held.check()
    assert held.engine.history_kept == held.pool.counters.unblocked


# ------------------------------------------------------------------------------------------------------- how to look


@on_loop
async def test_pages_go_back_in_time_and_hold_each_lease_once() -> None:
    """Also while other leases end between two pages."""
    held = Held(history_leases=100)
    await now(held.engine.generate(1))
    leases = []
    for _ in range(7):
        lease = await now(held.engine.acquire(None, 0))
        leases.append(lease.lease)
        await now(held.engine.unblock(1, lease.lease))
    seen, after = [], None
    for size in (3, 3, 1):
        page = await now(held.engine.history(1, HistoryQuery(limit=3, after=after)))
        assert len(page.history) == size
        seen += [row.lease for row in page.history]
        after = page.next
        await now(held.engine.acquire(None, 0))
        await now(held.engine.unblock(1, None))
    assert (seen, after) == (leases[::-1], None)


@on_loop
async def test_a_purged_key_has_a_history_by_its_id_alone() -> None:
    """Until it has none; an id that nothing is known of is unknown, and so are a text and a handle of a purged key."""
    held, (lease, other) = await held_with("ann", "bob", history_leases=2)
    await now(held.engine.delete(lease.key, OPERATOR))
    assert (await only_one(held, lease.id)).how is How.DELETED
    for ref in (lease.key, Handle(lease.id, lease.lease), 77, 10**18):
        with pytest.raises(UnknownKey):
            await now(held.engine.history(ref, HistoryQuery()))
    for _ in range(2):
        await now(held.engine.unblock(other.id, None))
        await now(held.engine.acquire("carol", 0))
    with pytest.raises(UnknownKey):
        await now(held.engine.history(lease.id, HistoryQuery()))


@on_loop
async def test_a_handle_names_its_key_until_a_newer_lease() -> None:
    """As in every other call."""
    held, (lease,) = await held_with("ann", history_leases=10)
    await now(held.engine.unblock(1, lease.lease))
    handle = Handle(lease.id, lease.lease)
    assert len((await now(held.engine.history(handle, HistoryQuery()))).history) == 1
    await now(held.engine.acquire("bob", 0))
    with pytest.raises(StaleLease):
        await now(held.engine.history(handle, HistoryQuery()))


@on_loop
async def test_the_cursor_of_a_list_is_none_of_a_history() -> None:
    """Nor is any other text."""
    held, _ = await held_with("ann", history_leases=10)
    for wrong in (encode("id", (1,)), "nonsense", "!"):
        with pytest.raises(BadRequest, match="after must be the next of the previous page"):
            await now(held.engine.history(1, HistoryQuery(after=wrong)))


# ----------------------------------------------------------------------------------------------------- what it keeps


@on_loop
async def test_nothing_is_recorded_unless_the_pool_keeps_a_history() -> None:
    """`default` keeps none unless it was told to, other pools the latest 100,000."""
    held, _ = await held_with("ann")
    await now(held.engine.unblock(1, None))
    assert (await history(held.engine, 1), held.engine.history_kept) == ([], 0)
    assert held.engine.rules.history_leases == 0
    pools = EmbeddedPools(held.engine)
    await now(pools.put("openai", {}, OPERATOR))
    assert pools.row("openai").settings["history_leases"] == 100_000


@on_loop
async def test_default_takes_the_setting_although_its_others_are_flags() -> None:
    """PUT without it takes it back; with another setting nothing changes."""
    held, _ = await held_with("ann", rest_seconds=7.0)
    pools = EmbeddedPools(held.engine)
    await now(pools.change("default", {"history_leases": 5}, OPERATOR))
    assert (held.engine.rules.history_leases, held.engine.rules.rest_seconds) == (5, 7.0)
    with pytest.raises(PoolFixed, match="rest_seconds"):
        await now(pools.put("default", {"history_leases": 9, "rest_seconds": 1}, OPERATOR))
    assert pools.row("default").settings["history_leases"] == 5
    await now(pools.change("default", {}, OPERATOR))
    assert pools.row("default").settings["history_leases"] == 5
    await now(pools.put("default", {}, OPERATOR))
    assert (held.engine.rules.history_leases, held.engine.rules.rest_seconds) == (0, 7.0)


@on_loop
async def test_the_oldest_lease_of_the_pool_goes_for_each_new_one() -> None:
    """Whatever key it was of."""
    held, leases = await held_with("a", "b", "c", history_leases=3)
    for lease in (leases[2], leases[0], leases[1]):
        await now(held.engine.unblock(lease.id, None))
    assert held.engine.history_kept == 3
    await now(held.engine.acquire("d", 0))
    await now(held.engine.unblock_many([Unblock(1), Unblock(2), Unblock(3)]))
    kept = [row.lease for id in (1, 2, 3) for row in await history(held.engine, id)]
    assert sorted(kept) == [1, 2, 4]
    assert held.engine.history_kept == 3


@on_loop
async def test_a_smaller_history_is_so_at_once_and_what_is_too_much_goes_in_slices() -> None:
    """None of it can be found any more, also if more is kept again later."""
    engine = EmbeddedEngine(PoolRules(history_leases=10_000))
    history = engine.journal.history
    assert isinstance(history, MemoryHistory)
    for lease in range(1, 5001):
        history.add(PastLease(lease % 7, lease, None, None, 0.0, 1.0, How.RELEASED, None, None, 0), 10_000)
    engine.set_rules(PoolRules(history_leases=10))
    assert (history.kept, len(history._order)) == (10, 5000)
    engine.set_rules(PoolRules(history_leases=100))
    assert [past.lease for past in await history.page(5000 % 7, 100, None)] == [5000, 4993]
    assert await turns_until(lambda: len(history._order) == 10, "the rest was forgotten") >= 4
    assert sum(len(found.leases) - found.start for found in history._by_key.values()) == 10
    engine.set_rules(PoolRules(history_leases=0))
    await turns_until(lambda: not history._order, "all was forgotten")
    assert (history.kept, history._by_key) == (0, {})


@on_loop
async def test_the_history_is_that_of_a_plain_list() -> None:
    """Random leases of random keys, pages and limits, beside a list of all of them."""
    draw = random.Random(11)
    history, plain, most, first = MemoryHistory(), [], 30, 0
    for lease in range(1, 2000):
        past = PastLease(draw.randrange(5), lease, None, None, 0.0, 1.0, How.RELEASED, None, None, 0)
        history.add(past, most)
        plain.append(past)
        first = max(first, len(plain) - most)
        if draw.random() < 0.05:
            most = draw.choice((0, 1, 5, 30, 200))
            history.limit(most)
            first = max(first, len(plain) - most)
        key_id, count, before = draw.randrange(5), draw.randrange(1, 9), lease - draw.randrange(300)
        wanted = [past for past in plain[first:][::-1] if past.key_id == key_id and past.lease < before]
        assert await history.page(key_id, count, before) == wanted[:count]
        assert history.kept == len(plain) - first
