"""The journal of an engine whose calls are driven by hand, over a writer that the test controls (`HeldWriter`), so that
commits and failures happen in any order that a test wants.

The real writer and file are in test_datafile.py, the server on its file in test_durable_server.py, full and failing
disks in test_disk_faults.py, kills under load in test_crash.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from engine_support import Call, on_loop, turns, turns_until
from held_writer import FULL, Held, HeldWriter, Part, hold_writers, ids, logged, run, started

from keypool.core.answers import Extension, KeyPatch, NewKey, Unblock
from keypool.core.cursor import ListQuery
from keypool.core.errors import NoKeyAvailable, StaleLease, StorageUnavailable, UnknownKey
from keypool.core.events import HOLDER
from keypool.core.outcomes import Outcome, Report
from keypool.engine.durable import journal
from keypool.engine.embedded import EmbeddedEngine


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[HeldWriter]:
    """The writers that a journal starts in this test."""
    return hold_writers(monkeypatch)


# ------------------------------------------------------------------------------------------------ group commit


@on_loop
async def test_calls_of_one_turn_share_a_batch(writers: list[HeldWriter]) -> None:
    """They are answered when it is committed, not before."""
    held = await Held(writers).open()
    calls = [Call(held.engine.generate(1)) for _ in range(5)]
    await turns()
    [batch] = held.writer.batches
    assert ids(batch) == [1, 2, 3, 4, 5]
    assert not any(call.over for call in calls)
    held.writer.answer()
    await turns()
    assert [call.answer[0].id for call in calls] == [1, 2, 3, 4, 5]
    assert held.journal.commit_rows.count == 2  # with the one that asked whether writing is possible
    assert held.journal.commit_rows.last == 5


@on_loop
async def test_calls_that_come_during_a_commit_share_the_next(writers: list[HeldWriter]) -> None:
    """One batch is on its way at a time, and the next leaves as soon as it is confirmed."""
    held = await Held(writers).open()
    first = Call(held.engine.generate(1))
    await turns()
    later = []
    for _ in range(3):
        later.append(Call(held.engine.generate(1)))
        await turns()
    assert len(held.writer.batches) == 1
    held.writer.answer()
    await turns()
    assert first.over
    assert [ids(batch) for batch in held.writer.batches] == [[1], [2, 3, 4]]
    assert not any(call.over for call in later)
    held.writer.answer()
    await turns()
    assert all(call.over for call in later)


@on_loop
async def test_answers_come_in_the_order_of_the_calls(writers: list[HeldWriter]) -> None:
    """The calls of one batch are answered in order, and those of the next after them."""
    held = await Held(writers).open()
    texts = await held.made(6)
    order: list[int] = []

    async def noted(number: int, call: Coroutine[Any, None, object]) -> None:
        await call
        order.append(number)

    calls = [Call(noted(number, held.engine.keepalive(texts[number]))) for number in range(3)]
    await turns()
    calls += [Call(noted(number, held.engine.keepalive(texts[number]))) for number in range(3, 6)]
    await held.commit()
    assert order == list(range(6))
    assert all(call.over for call in calls)


@on_loop
async def test_a_batch_call_waits_for_one_commit(writers: list[HeldWriter]) -> None:
    """This holds for each kind of batch."""
    held = await Held(writers).open()
    engine, texts = held.engine, await held.made(3)
    makers: list[Callable[[], Call[Any]]] = [
        lambda: Call(engine.generate(2)),
        lambda: Call(engine.acquire_many("me", 3)),
        lambda: Call(engine.keepalive_many(texts)),
        lambda: Call(engine.unblock_many([Unblock(text) for text in texts])),
        lambda: Call(engine.delete_many(texts)),
    ]
    for make in makers:
        call = make()
        await turns()
        held.writer.answer()
        await turns()
        waiting = not call.over
        await held.commit()
        assert not waiting


@on_loop
async def test_a_key_that_changed_twice_is_one_row(writers: list[HeldWriter]) -> None:
    """The row has the state at the moment when the batch leaves; the counters in the batch count both changes."""
    held = await Held(writers).open()
    [text] = await held.made()
    calls: list[Call[Any]] = [
        Call(held.engine.acquire("me", 0)),
        Call(held.engine.unblock(text, None)),
        Call(held.engine.acquire("you", 0)),
        Call(held.engine.keepalive(text)),
    ]
    await turns()
    batch = held.writer.batches[-1]
    assert [(row[0], row[5], row[6]) for row in batch.rows] == [(1, 2, "you")]
    numbers = {"last_id": 1, "last_lease": 2, "generated": 1, "acquired": 2, "unblocked": 1, "kept_alive": 1}
    assert {name: batch.pool[name] for name in numbers} == numbers
    held.writer.answer()
    await turns()
    assert all(call.over for call in calls)


@on_loop
async def test_a_key_that_is_gone_again_is_a_purge(writers: list[HeldWriter]) -> None:
    """What happened to it before in the same batch is not written."""
    held = await Held(writers).open()
    made = Call(held.engine.generate(2))
    deleted = Call(held.engine.delete(1))
    await turns()
    [batch] = held.writer.batches
    assert (ids(batch), batch.purged) == ([2], [1])
    held.writer.answer()
    await turns()
    assert made.over
    assert deleted.over


@on_loop
async def test_a_large_batch_is_written_down_in_parts_and_committed_whole(
    writers: list[HeldWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part takes a turn of the loop; later changes go into the next one. No number is older than a row."""
    monkeypatch.setattr(journal, "_PART_ROWS", 2)
    held = await Held(writers).open()
    made = Call(held.engine.generate(5))
    await turns_until(lambda: held.writer.batches, "the first part")
    deleted = Call(held.engine.delete(1))
    leased = Call(held.engine.acquire("me", 0))
    await turns()
    parts = held.writer.batches
    assert [(len(part.rows) + len(part.purged), isinstance(part, Part)) for part in parts] == [
        (2, True),
        (2, True),
        (1, False),
    ]
    assert parts[0].rows[0][0] == 1, "the part had left before the delete"
    assert parts[-1].pool["last_id"] == 5
    assert parts[-1].pool["last_lease"] == 1, "a part may hold the lease that was given meanwhile"
    held.writer.answer_all()
    await turns()
    assert [call.over for call in (made, deleted, leased)] == [True, False, False]
    assert [part.purged for part in held.writer.batches[3:]] == [[1]]
    held.writer.answer()
    await turns()
    assert [call.over for call in (made, deleted, leased)] == [True, True, True]


@on_loop
async def test_nothing_is_written_when_nothing_changed(writers: list[HeldWriter]) -> None:
    """Reads, refusals and lists cause no commit."""
    held = await Held(writers).open()
    [text] = await held.made()
    held.writer.batches.clear()
    assert Call(held.engine.get(text)).over
    assert Call(held.engine.unblock(text, None)).answer.changed is False
    with pytest.raises(StaleLease):
        _ = Call(held.engine.unblock(text, 7)).answer
    with pytest.raises(UnknownKey):
        _ = Call(held.engine.get("nobody's")).answer
    assert Call(held.engine.page(ListQuery())).over
    await turns()
    assert held.writer.batches == []


# ------------------------------------------------------------------------------------- what waits for what


@on_loop
async def test_a_read_waits_for_its_own_key_only(writers: list[HeldWriter]) -> None:
    """It waits for the commit in flight if that has the key, for the next if it has changed since, or not at all."""
    held = await Held(writers).open()
    one, two, three = await held.made(3)
    first = Call(held.engine.keepalive(one))
    await turns()
    second = Call(held.engine.keepalive(two))
    reads = {text: Call(held.engine.get(text)) for text in (one, two, three)}
    reveals = {text: Call(held.engine.reveal(text)) for text in (one, two, three)}
    assert [reads[text].over for text in (one, two, three)] == [False, False, True]
    assert [reveals[text].over for text in (one, two, three)] == [False, False, True]
    held.writer.answer()
    await turns()
    assert first.over
    assert [reads[text].over for text in (one, two, three)] == [True, False, True]
    held.writer.answer()
    await turns()
    assert second.over
    assert reads[two].over
    assert reveals[two].over


@on_loop
async def test_a_read_of_a_key_that_changed_again_waits_for_the_last_change(
    writers: list[HeldWriter],
) -> None:
    """The answer has the newest state, which must be on disk first."""
    held = await Held(writers).open()
    [text] = await held.made()
    Call(held.engine.keepalive(text))
    await turns()
    Call(held.engine.keepalive(text))
    read = Call(held.engine.get(text))
    held.writer.answer()
    await turns()
    assert not read.over
    held.writer.answer()
    await turns()
    assert read.over


@on_loop
@pytest.mark.parametrize("how", ["deleted", "expired", "expired while blocked"])
async def test_a_404_waits_for_the_purge(writers: list[HeldWriter], how: str) -> None:
    """This holds for every call, by text and by id. Once the purge is on disk, nothing waits."""
    held = await Held(writers).open()
    [text] = await held.made()
    if how == "expired while blocked":
        await held.acquired()
    if how == "deleted":
        Call(held.engine.delete(text))
    else:
        held.clock.on(300.001)
    engine = held.engine
    makers: list[Callable[[], Call[Any]]] = [
        lambda: Call(engine.get(text)),
        lambda: Call(engine.get(1)),
        lambda: Call(engine.reveal(text)),
        lambda: Call(engine.keepalive(text)),
        lambda: Call(engine.unblock(text, None)),
        lambda: Call(engine.unblock(1, 1)),
        lambda: Call(engine.delete(text)),
    ]
    calls = [make() for make in makers]
    batches: list[Call[Any]] = [
        Call(engine.keepalive_many([text])),
        Call(engine.unblock_many([Unblock(text)])),
        Call(engine.delete_many([1])),
    ]
    assert not any(call.over for call in calls + batches)
    await turns()
    calls += [make() for make in makers]  # and while the purge is on its way
    assert not any(call.over for call in calls + batches)
    assert held.writer.answer().purged == [1]
    await turns()
    calls += [make() for make in makers]  # and after it
    for call in calls:
        with pytest.raises(UnknownKey):
            _ = call.answer
    assert [call.answer for call in batches] == [["unknown"], ["unknown"], ["unknown"]]


@on_loop
async def test_a_404_waits_for_the_last_of_several_keys_with_its_text(writers: list[HeldWriter]) -> None:
    """Seats of which one went before the others, and a key that got a text which was another's until lately."""
    held = await Held(writers, keepalive_seconds=None).open()
    engine = held.engine
    for calls in (
        (engine.import_key(NewKey("seats", seats=2), False, HOLDER),),
        (engine.import_key(NewKey("before"), False, HOLDER), engine.replace("before", "after", HOLDER)),
        (engine.import_key(NewKey("before"), False, HOLDER),),
    ):
        made = [Call(call) for call in calls]
        await held.commit()
        assert all(call.over for call in made)
    fewer = Call(engine.update("seats", KeyPatch(seats=1), HOLDER))
    await turns()
    Call(engine.delete("seats", HOLDER))
    Call(engine.delete("before", HOLDER))
    held.writer.answer()
    await turns()
    assert fewer.answer.seats == 1
    gone = [Call(engine.get(text)) for text in ("seats", "before")]
    await turns()
    assert not any(call.over for call in gone)
    assert held.writer.answer().purged == [1, 4]
    await turns()
    for call in gone:
        with pytest.raises(UnknownKey):
            _ = call.answer


@on_loop
async def test_how_many_seats_a_key_has_is_told_when_it_is_on_disk(writers: list[HeldWriter]) -> None:
    """Even if the row of the seat that is shown doesn't change."""
    held = await Held(writers, keepalive_seconds=None).open()
    engine = held.engine
    Call(engine.import_key(NewKey("secret", seats=2), False, HOLDER))
    await held.commit()
    leases = [await held.acquired(), await held.acquired()]
    Call(engine.update("secret", KeyPatch(seats=1), HOLDER))
    await held.commit()
    Call(engine.unblock("secret", leases[0][1]))
    row = Call(engine.get("secret"))
    await turns()
    assert not row.over
    held.writer.answer()
    await turns()
    assert (row.answer.seat, row.answer.seats, row.answer.lease) == (1, 1, leases[1][1])


@on_loop
async def test_refusals_wait_for_the_changes_they_depend_on(writers: list[HeldWriter]) -> None:
    """409 waits for the newer lease, changed:false for the unblock before it, 404 for the acquire of the last key."""
    held = await Held(writers).open()
    [text] = await held.made()
    _, lease = await held.acquired()
    freed = Call(held.engine.unblock(text, lease))
    again = Call(held.engine.unblock(text, lease))
    await turns()
    assert not again.over
    held.writer.answer()
    await turns()
    assert freed.answer.changed
    assert not again.answer.changed
    taken = Call(held.engine.acquire(None, 0))
    stale = Call(held.engine.unblock(text, lease))
    none_left = Call(held.engine.acquire(None, 0))
    await turns()
    assert not stale.over
    assert not none_left.over
    held.writer.answer()
    await turns()
    assert taken.answer.lease == lease + 1
    with pytest.raises(StaleLease):
        _ = stale.answer
    with pytest.raises(NoKeyAvailable):
        _ = none_left.answer


@on_loop
async def test_a_release_by_its_deadline_is_on_disk_before_it_is_answered(writers: list[HeldWriter]) -> None:
    """A row with the state available waits for the batch in which the key is released."""
    held = await Held(writers).open()
    [text] = await held.made()
    await held.acquired()
    held.clock.on(60.001)
    read = Call(held.engine.get(text))
    assert not read.over
    await turns()
    assert [row[4] for row in held.writer.answer().rows] == [None]
    await turns()
    assert read.answer.release_in is None


@on_loop
async def test_stats_and_lists_wait_for_nothing(writers: list[HeldWriter]) -> None:
    """They may be ahead of the disk by the commit in flight."""
    held = await Held(writers).open()
    Call(held.engine.generate(3))
    assert Call(held.engine.stats()).answer.total == 3
    assert len(Call(held.engine.page(ListQuery())).answer.keys) == 3
    await turns()
    assert Call(held.engine.stats()).answer.generated == 3
    await held.commit()


@on_loop
async def test_a_waiter_is_answered_when_its_lease_is_on_disk(writers: list[HeldWriter]) -> None:
    """It is served in the turn of the generate, and answered when that is committed."""
    held = await Held(writers).open()
    waiter = Call(held.engine.acquire("patient", 30))
    made = Call(held.engine.generate(1))
    await turns()
    assert not waiter.over
    assert [(row[0], row[5], row[6]) for row in held.writer.batches[-1].rows] == [(1, 1, "patient")]
    held.writer.answer()
    await turns()
    assert made.over
    assert waiter.answer.lease == 1


@on_loop
async def test_a_lease_whose_caller_hung_up_is_taken_back(writers: list[HeldWriter]) -> None:
    """If the caller hangs up during the commit, the key is available at once; its lease number isn't reused."""
    held = await Held(writers).open()
    [text] = await held.made()
    gone = Call(held.engine.acquire(None, 0))
    await turns()
    gone.hang_up()
    held.writer.answer()
    await turns()
    assert [row[:2] + row[4:] for row in held.writer.answer().rows] == [
        (1, text, None, 1, None, None, 1 << 8, None)
    ]
    assert await held.acquired() == (text, 2)


@on_loop
async def test_lengths_of_time_are_relative_to_the_answer(writers: list[HeldWriter]) -> None:
    """If a commit takes 7 s, a holder that was told 60 s would overlap with the next lease by 7 s."""
    held = await Held(writers).open()
    [text] = await held.made()
    calls: list[Call[Any]] = [
        Call(held.engine.acquire(None, 0)),
        Call(held.engine.keepalive(text)),
        Call(held.engine.get(text)),
        Call(held.engine.generate(1)),
    ]
    await turns()
    held.clock.on(7)
    await held.commit()
    lease, kept, row, [made] = (call.answer for call in calls)
    told = [
        lease.release_in,
        lease.expires_in,
        kept.expires_in,
        row.expires_in,
        row.release_in,
        made.expires_in,
    ]
    assert told == [53, 293, 293, 293, 53, 293]


# -------------------------------------------------------------------------------------- batches that fail


def test_a_batch_that_fails_is_refused_to_its_callers_and_tried_again(
    writers: list[HeldWriter], caplog: pytest.LogCaptureFixture
) -> None:
    """Its callers and those that wait for the next batch get 503. The changes are in the next attempt."""

    async def test() -> None:
        held = await Held(writers).open()
        one, two, three = await held.made(3)
        first = Call(held.engine.keepalive(one))
        await turns()
        second = Call(held.engine.keepalive(two))
        read = Call(held.engine.get(one))
        held.writer.answer(FULL)
        await turns()
        for call in (first, second, read):
            with pytest.raises(StorageUnavailable, match=FULL):
                _ = call.answer
        with pytest.raises(StorageUnavailable):
            held.engine.ready()
        assert sorted(ids(await held.writer.batch())) == [1, 2]
        held.writer.answer(FULL)
        assert sorted(ids(await held.writer.batch())) == [1, 2]
        await held.commit()  # and the grace
        held.engine.ready()
        assert Call(held.engine.get(one)).over
        assert await held.acquired()
        assert len(logged(caplog, logging.ERROR)) == 1, "one line a trouble, not one an attempt"
        assert logged(caplog, logging.WARNING) == ["the data file can be written again"]
        assert three

    run(test)


CHANGES: dict[str, Callable[[EmbeddedEngine], Call[Any]]] = {
    "generate": lambda engine: Call(engine.generate(1)),
    "acquire": lambda engine: Call(engine.acquire(None, 0)),
    "acquire and wait": lambda engine: Call(engine.acquire(None, 9)),
    "acquire many": lambda engine: Call(engine.acquire_many(None, 2)),
    "unblock": lambda engine: Call(engine.unblock(1, None)),
    "unblock many": lambda engine: Call(engine.unblock_many([Unblock(1)])),
    "report": lambda engine: Call(engine.unblock(1, 1, report=Report(Outcome.INVALID))),
    "report many": lambda engine: Call(engine.unblock_many([Unblock(1, 1, Report(Outcome.OK))])),
    "extend": lambda engine: Call(engine.extend(1, 1, 500)),
    "extend many": lambda engine: Call(engine.extend_many([Extension(1, 1, 500)])),
    "quarantine": lambda engine: Call(engine.quarantine(1, None, True, HOLDER)),
    "quarantine many": lambda engine: Call(engine.quarantine_many([1], None, True, HOLDER)),
    "restore": lambda engine: Call(engine.restore(1, HOLDER)),
    "restore many": lambda engine: Call(engine.restore_many([1], HOLDER)),
    "keepalive": lambda engine: Call(engine.keepalive(1)),
    "keepalive many": lambda engine: Call(engine.keepalive_many([1])),
    "delete": lambda engine: Call(engine.delete(1)),
    "delete many": lambda engine: Call(engine.delete_many([1])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_while_batches_fail_nothing_changes_by_a_call(
    writers: list[HeldWriter], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Calls that change something get 503 at once; reads of what is on disk still work."""
    # Long enough for all calls to come before the retry, on a busy machine too.
    monkeypatch.setattr("keypool.engine.durable.journal._FIRST_BACK_OFF", 2.0)

    async def test() -> None:
        held = await Held(writers).open()
        one, two, three = await held.made(3)
        await held.acquired()
        Call(held.engine.keepalive(two))
        await turns()
        held.writer.answer(FULL)
        await turns()
        pool = held.engine.pool

        def state() -> tuple[object, ...]:
            key = pool.find_id(1, held.clock())
            counts = pool.total, pool.available, pool.last_id, pool.last_lease, repr(pool.counters)
            return *counts, key.state, key.release_deadline, key.history, key.reported, key.quarantine_pending

        before = state()
        with pytest.raises(StorageUnavailable):
            _ = CHANGES[change](held.engine).answer
        assert state() == before
        assert Call(held.engine.get(one)).over
        assert Call(held.engine.reveal(three)).over
        assert Call(held.engine.stats()).answer.total == 3
        assert len(Call(held.engine.page(ListQuery())).answer.keys) == 3
        with pytest.raises(UnknownKey):
            _ = Call(held.engine.get("nobody's")).answer
        with pytest.raises(StorageUnavailable):
            _ = Call(held.engine.get(two)).answer  # its keepalive isn't on disk
        await held.writer.batch()
        await held.commit()
        held.engine.ready()

    run(test)


def test_releases_continue_while_batches_fail_and_are_answered_once_on_disk(
    writers: list[HeldWriter],
) -> None:
    """A release is reported once it is on disk. About a key that would have expired, nothing is reported until then."""

    async def test() -> None:
        held = await Held(writers).open()
        one, two = await held.made(2)
        held.clock.on(280)
        Call(held.engine.keepalive(two))
        await held.commit()
        taken = {text for text, _ in [await held.acquired(), await held.acquired()]}
        assert taken == {one, two}
        waiter = Call(held.engine.acquire("patient", 90))
        Call(held.engine.keepalive(two))
        await turns()
        held.writer.answer(FULL)
        await turns()
        held.clock.on(60.1)
        held.timers.fire(
            *[timer for timer in held.timers.timers if timer.seconds != 90]
        )  # all but the waiter's
        await turns()
        assert not waiter.over, "served though nothing can be written"
        for text in (one, two):
            with pytest.raises(StorageUnavailable):
                _ = Call(held.engine.get(text)).answer
        batch = await held.writer.batch()
        assert (batch.purged, sorted(ids(batch))) == ([], [1, 2])
        await held.commit()
        assert Call(held.engine.get(one)).answer.expires_in == 150
        assert waiter.answer.key in (one, two), "storage came back, and the waiter was not served"
        assert waiter.answer.lease == 3

    run(test)


def test_a_waiter_that_times_out_while_batches_fail_gets_503(writers: list[HeldWriter]) -> None:
    """When its time is up it gets 503, as changes may not be on disk; 404 only when all are."""

    async def test() -> None:
        held = await Held(writers).open()
        [text] = await held.made()
        await held.acquired()
        waiters = [Call(held.engine.acquire(None, 5)), Call(held.engine.acquire(None, 6))]
        Call(held.engine.keepalive(text))
        await turns()
        held.writer.answer(FULL)
        await turns()
        patience = {timer.seconds: timer for timer in held.timers.timers}
        held.timers.fire(patience[5])
        await turns()
        with pytest.raises(StorageUnavailable):
            _ = waiters[0].answer
        await held.writer.batch()
        await held.commit()
        held.timers.fire(patience[6])
        await turns()
        with pytest.raises(NoKeyAvailable):
            _ = waiters[1].answer

    run(test)


def test_a_writer_that_dies_is_started_again_and_the_batch_repeated(
    writers: list[HeldWriter], caplog: pytest.LogCaptureFixture
) -> None:
    """Later changes are in it, too. It may have been committed already: repeating a row is harmless."""

    async def test() -> None:
        held = await Held(writers).open()
        texts = await held.made(2)
        call = Call(held.engine.keepalive(texts[0]))
        await turns()
        later = Call(held.engine.acquire(None, 0))
        held.writer.die()
        await turns()
        for one in (call, later):
            with pytest.raises(StorageUnavailable):
                _ = one.answer
        [dead] = writers
        await started(writers, 2)
        assert dead.dead
        assert ids(await held.writer.batch())[0] == 1
        await held.commit()
        held.engine.ready()
        assert Call(held.engine.get(texts[0])).over
        assert "writer process died" in "".join(logged(caplog, logging.ERROR))

    run(test)


def test_a_writer_that_dies_between_two_parts_gets_the_batch_again(
    writers: list[HeldWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new writer gets it from the beginning, as it has none of the parts before."""

    async def test() -> None:
        monkeypatch.setattr(journal, "_PART_ROWS", 2)
        held = await Held(writers).open()
        made = Call(held.engine.generate(5))
        await turns_until(lambda: held.writer.batches, "the first part")
        held.writer.die()
        await turns()
        with pytest.raises(StorageUnavailable):
            _ = made.answer
        [dead] = writers
        await started(writers, 2)
        await turns_until(lambda: len(held.writer.batches) == 3, "three parts")
        assert [id for part in held.writer.batches for id in ids(part)] == [1, 2, 3, 4, 5]
        assert len(dead.batches) == 1
        held.writer.answer_all()
        await turns()
        await held.commit()  # the grace
        held.engine.ready()

    run(test)


def test_a_writer_that_dies_before_the_batch_leaves_is_replaced(writers: list[HeldWriter]) -> None:
    """It died in the turn of the loop between a change and its batch. The next writer gets the batch."""

    async def test() -> None:
        held = await Held(writers).open()
        call = Call(held.engine.generate(1))
        held.writer.die()
        await turns()
        with pytest.raises(StorageUnavailable):
            _ = call.answer
        await started(writers, 2)
        await turns()
        await held.commit()
        held.engine.ready()
        assert await held.made()

    run(test)


def test_an_idle_writer_that_dies_affects_no_later_call(writers: list[HeldWriter]) -> None:
    """An empty batch checks that the new writer works."""

    async def test() -> None:
        held = await Held(writers).open()
        await held.made()
        held.writer.die()
        await started(writers, 2)
        batch = await held.writer.batch()
        assert (batch.rows, batch.purged) == ([], [])
        await held.commit()
        held.engine.ready()
        assert await held.made()

    run(test)


def test_a_writer_that_dies_repeatedly_is_restarted_each_time(writers: list[HeldWriter]) -> None:
    """Each writer replaces the one before, and in the end all calls have been answered."""

    async def test() -> None:
        held = await Held(writers).open()
        [text] = await held.made()
        for number in range(4):
            Call(held.engine.keepalive(text))
            await turns()
            held.writer.die()
            await started(writers, number + 2)
            await held.writer.batch()
            await held.commit()
            held.engine.ready()
        assert len(writers) == 5
        assert [writer.dead for writer in writers] == [True] * 4 + [False]

    run(test)


def test_a_writer_that_dies_after_a_failed_batch_leaves_no_call_waiting(writers: list[HeldWriter]) -> None:
    """Both failures are one outage, after which all calls are answered."""

    async def test() -> None:
        held = await Held(writers).open()
        [text] = await held.made()
        Call(held.engine.keepalive(text))
        await turns()
        held.writer.answer(FULL)
        held.writer.die()
        await started(writers, 2)
        await held.writer.batch()
        await held.commit()
        held.engine.ready()
        current = Call(held.engine.keepalive(text))
        await turns()
        following = Call(held.engine.keepalive(text))
        await asyncio.sleep(0.5)  # the loop's timers that were set before are over by then
        await held.commit()
        assert current.over
        assert following.over, "nobody will ever answer this call"

    run(test)


# ------------------------------------------------------------------------------------------------- closing


@on_loop
async def test_close_commits_what_is_dirty_and_ends_the_writer(writers: list[HeldWriter]) -> None:
    """It waits for the commit in flight, commits the rest, and ends the writer."""
    held = await Held(writers).open()
    calls = [Call(held.engine.generate(1))]
    await turns()
    calls.append(Call(held.engine.generate(1)))
    closing = asyncio.ensure_future(held.engine.close())
    await turns()
    assert not closing.done()
    assert ids(held.writer.answer()) == [1]
    await turns()
    assert ids(held.writer.answer()) == [2]
    await held.commit()
    await closing
    assert all(call.over for call in calls)
    assert held.writer.ended
    assert "moment" in held.writer.batches[-1].pool


@on_loop
async def test_a_close_that_is_cut_short_tells_only_of_changes_that_are_lost(
    writers: list[HeldWriter],
) -> None:
    """Every stop sends the counters once more. To lose nothing else is no failure."""
    for changed in (False, True):
        held = await Held(writers).open()
        [text] = await held.made()
        if changed:
            Call(held.engine.keepalive(text))
        closing = asyncio.ensure_future(held.engine.close())
        await turns()
        assert not held.writer.unanswered.empty(), "the last batch was never sent"
        closing.cancel()
        if changed:
            with pytest.raises(StorageUnavailable, match="the last commit was not made"):
                await closing
        else:
            await closing


def test_close_gives_up_on_a_disk_that_fails(writers: list[HeldWriter]) -> None:
    """It makes one more attempt; none if the writer is dead."""

    async def test() -> None:
        for dead in (False, True):
            held = await Held(writers).open()
            [text] = await held.made()
            Call(held.engine.keepalive(text))
            await turns()
            if dead:
                held.writer.die()
            else:
                held.writer.answer(FULL)
            closing = asyncio.ensure_future(held.engine.close())
            await turns()
            if not dead:
                assert ids(held.writer.answer(FULL)) == [1]
            with pytest.raises(StorageUnavailable, match="the last commit was not made"):
                await asyncio.wait_for(closing, 20)
            started = len(writers)
            await asyncio.sleep(0.2)  # longer than the first retry would take
            assert len(writers) == started

    run(test)
