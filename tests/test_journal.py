"""What is told is on disk: the journal, its writer and the data file, in health and in every trouble.

Three levels. Calls of an engine are driven by hand over a writer that the test holds (`HeldWriter`), so that
each order of commits and failures comes as the test says. Then the real writer and file, in this process. Then
the server as its user runs it, with its disk full, its file damaged, its writer killed. Kills of the server
itself under load are in test_crash.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import os
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from signal import SIGCONT, SIGINT, SIGKILL, SIGSTOP, SIGTERM
from typing import Any, Final, TypeVar

import msgspec
import pytest
from crash import children_of, command_of, kill, lives, writer_of
from engine_support import Call, Moment, on_loop, open_held, turns, turns_until
from held_writer import FULL, Held, HeldWriter, Part, hold_writers, ids, logged, run, started
from support import ACQUIRE, API, LATE, ROOT, Answer, Client, ServerProcess, eventually, run_server

from keypool.core.cursor import ListQuery
from keypool.core.errors import NoKeyAvailable, StaleLease, StartError, StorageUnavailable, UnknownKey
from keypool.engine.clock import make_clock
from keypool.engine.durable import datafile, journal
from keypool.engine.durable import opening as durable
from keypool.engine.durable.datafile import Batch, encode
from keypool.engine.durable.opening import open_durable
from keypool.engine.durable.writer import HEADER, Kind, Verdict, Writer, frame
from keypool.engine.embedded import EmbeddedEngine

T = TypeVar("T")


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[HeldWriter]:
    """Those that a journal starts in this test."""
    return hold_writers(monkeypatch)


# ------------------------------------------------------------------------------------------------ group commit


@on_loop
async def test_calls_of_one_turn_share_a_batch(writers: list[HeldWriter]) -> None:
    """And are answered when it is committed, not before."""
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
    """Those of one batch as they were asked, those of the next after them."""
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
    """Whichever of the five it is."""
    held = await Held(writers).open()
    engine, texts = held.engine, await held.made(3)
    makers: list[Callable[[], Call[Any]]] = [
        lambda: Call(engine.generate(2)),
        lambda: Call(engine.acquire_many("me", 3)),
        lambda: Call(engine.keepalive_many(texts)),
        lambda: Call(engine.unblock_many([(text, None) for text in texts])),
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
    """With the state that it has when the batch leaves; the counters go with it, and count both."""
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
    """Whatever happened to it before in the same batch."""
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
    """A turn of the loop each; what changes meanwhile is told with the next one, and no number is behind a row."""
    monkeypatch.setattr(journal, "_PART", 2)
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
    """Reads, refusals and lists cost no commit."""
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
    """For the batch under way if it is in that, for the next one if it has changed since, else for nothing."""
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
    """What it tells is the newest, so that is what must be on disk."""
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
    """By the text and by the id, whatever the call; once it is on disk, nobody waits."""
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
        Call(engine.unblock_many([(text, None)])),
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
    assert [call.answer for call in batches] == [[False], ["unknown"], [None]]


@on_loop
async def test_refusals_wait_for_what_they_tell(writers: list[HeldWriter]) -> None:
    """409 for the lease that makes the other stale, changed:false for the unblock before, 404 for the acquire
    that took the last key.
    """
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
async def test_a_release_by_its_deadline_is_on_disk_before_it_is_told(writers: list[HeldWriter]) -> None:
    """The row that says available waits for the batch that frees the key."""
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
    """They may lead by the commit under way."""
    held = await Held(writers).open()
    Call(held.engine.generate(3))
    assert Call(held.engine.stats()).answer.total == 3
    assert len(Call(held.engine.page(ListQuery())).answer.keys) == 3
    await turns()
    assert Call(held.engine.stats()).answer.generated == 3
    await held.commit()


@on_loop
async def test_a_waiter_is_answered_when_its_lease_is_on_disk(writers: list[HeldWriter]) -> None:
    """Served in the turn of the generate, told with its commit."""
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
async def test_a_lease_that_nobody_hears_of_is_taken_back(writers: list[HeldWriter]) -> None:
    """The caller hung up during the commit: the key is free at once, and its lease number is spent."""
    held = await Held(writers).open()
    [text] = await held.made()
    gone = Call(held.engine.acquire(None, 0))
    await turns()
    gone.hang_up()
    held.writer.answer()
    await turns()
    assert [row[:2] + row[4:] for row in held.writer.answer().rows] == [(1, text, None, 1, None)]
    assert await held.acquired() == (text, 2)


@on_loop
async def test_lengths_of_time_are_relative_to_the_answer(writers: list[HeldWriter]) -> None:
    """A holder that is told 60 s after a commit of 7 s would keep the key 7 s into somebody else's lease."""
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
    """Those in it, and those who wait for the next one, get 503; what it held goes with the next attempt."""

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
    "unblock many": lambda engine: Call(engine.unblock_many([(1, None)])),
    "keepalive": lambda engine: Call(engine.keepalive(1)),
    "keepalive many": lambda engine: Call(engine.keepalive_many([1])),
    "delete": lambda engine: Call(engine.delete(1)),
    "delete many": lambda engine: Call(engine.delete_many([1])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_while_batches_fail_nothing_changes_by_a_call(writers: list[HeldWriter], change: str) -> None:
    """503 at once, and reads of what is on disk go on."""

    async def test() -> None:
        held = await Held(writers).open()
        one, two, three = await held.made(3)
        await held.acquired()
        Call(held.engine.keepalive(two))
        await turns()
        held.writer.answer(FULL)
        await turns()
        pool = held.engine.pool
        before = pool.total, pool.available, pool.last_id, pool.last_lease, repr(pool.counters)
        with pytest.raises(StorageUnavailable):
            _ = CHANGES[change](held.engine).answer
        assert (pool.total, pool.available, pool.last_id, pool.last_lease, repr(pool.counters)) == before
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


def test_deadlines_go_on_while_batches_fail_and_are_told_when_they_are_kept(
    writers: list[HeldWriter],
) -> None:
    """A released key is told of when that is on disk; of one that would expire nothing is told until it is back."""

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


def test_a_waiter_that_gives_up_while_batches_fail_is_told_so(writers: list[HeldWriter]) -> None:
    """Its time is up: 503, since what it would tell isn't known to be kept; or 404 when all is on disk."""

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
    """With what has come meanwhile; rows hold whole states, so it may have been committed already."""

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
    """From its beginning: the new one knows nothing of the parts before."""

    async def test() -> None:
        monkeypatch.setattr(journal, "_PART", 2)
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
    """In the one turn of the loop between a change and its batch: with the next writer all is well again."""

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


def test_an_idle_writer_that_dies_costs_nobody_anything_later(writers: list[HeldWriter]) -> None:
    """Nothing was to be written: the new writer is asked by an empty batch whether it can."""

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


def test_a_writer_that_dies_over_and_over_is_started_over_and_over(writers: list[HeldWriter]) -> None:
    """Each in the place of the one before, and the calls that come between are all over in the end."""

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


def test_a_writer_that_dies_after_a_failed_batch_leaves_nobody_waiting(writers: list[HeldWriter]) -> None:
    """Two troubles at once are one recovery: calls after it are answered, all of them."""

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
    """The batch under way, then one with the rest, then a clean end."""
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


def test_close_gives_up_on_a_disk_that_fails(writers: list[HeldWriter]) -> None:
    """After one more attempt, and without another retry; a dead writer gets none."""

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


# ------------------------------------------------------------------------------------- the file and its writer


def rows_in(path: Path) -> list[datafile.Row]:
    """All keys of a data file, read beside whoever else has it open."""
    return [row for some in datafile.read_rows(path, 1000) for row in some]


def numbers_in(path: Path) -> dict[str, int]:
    """The pool's numbers in a data file."""
    return datafile.inspect(path)


def table_of(path: Path) -> list[tuple[Any, ...]]:
    """The table of keys as it stands, with all its columns and without what batches say."""
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
        return database.execute("SELECT * FROM keys ORDER BY id").fetchall()


def row(
    id: int, life: float = 300.0, *, block: float | None = None, lease: int = 0, owner: str | None = None
) -> datafile.Row:
    """A key as the file keeps it, with this many seconds to live and to be blocked from now on."""
    now = time.time() * 1000
    release_at = None if block is None else round(now + block * 1000)
    return id, f"{id:020d}", round(now), round(now + life * 1000), release_at, lease, owner


def fill(path: Path, rows: Sequence[datafile.Row], **numbers: int) -> None:
    """A data file with these keys, as a server that ended in peace would leave it."""
    last = {
        "last_id": max((row[0] for row in rows), default=0),
        "last_lease": max((row[5] for row in rows), default=0),
    }
    counts = {"generated": len(rows), "acquired": last["last_lease"], "moment": round(time.time() * 1000)}
    with contextlib.closing(datafile.connect(path)) as database:
        database.execute("BEGIN")
        database.executemany(datafile.UPSERT, rows)
        database.executemany(datafile.SET_POOL, (last | counts | numbers).items())
        database.execute("COMMIT")


def test_a_new_file_is_made_durable(tmp_path: Path) -> None:
    """WAL, an fsync a commit, our application id and version; opening it again changes nothing."""
    path = tmp_path / "keypool.db"
    for _ in range(2):
        with contextlib.closing(datafile.connect(path)) as database:
            assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert database.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
            assert database.execute("PRAGMA application_id").fetchone() == (datafile.APPLICATION_ID,)
            assert database.execute("PRAGMA user_version").fetchone() == (datafile.VERSION,)
        assert datafile.inspect(path) == {}
    assert len(datafile.MIGRATIONS) == datafile.VERSION


def test_a_file_of_an_older_version_is_brought_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step that it lacks is made, in order, once; what it holds stays."""
    path = tmp_path / "keypool.db"
    fill(path, [row(1)])
    steps = ("ALTER TABLE keys ADD COLUMN one TEXT;", "ALTER TABLE keys ADD COLUMN two TEXT DEFAULT 'x';")
    monkeypatch.setattr(datafile, "MIGRATIONS", datafile.MIGRATIONS + steps)
    monkeypatch.setattr(datafile, "VERSION", datafile.VERSION + 2)
    for _ in range(2):
        datafile.connect(path).close()
        assert table_of(path)[0][7:] == (None, "x")
    assert datafile.inspect(path)["last_id"] == 1


def test_a_step_that_fails_leaves_the_version_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole or not at all: the next start tries again."""
    path = tmp_path / "keypool.db"
    fill(path, [row(1)])
    broken = "ALTER TABLE keys ADD COLUMN one TEXT; ALTER TABLE nothing ADD COLUMN two TEXT;"
    with monkeypatch.context() as patch:
        patch.setattr(datafile, "MIGRATIONS", (*datafile.MIGRATIONS, broken))
        with pytest.raises(sqlite3.Error):
            datafile.connect(path)
    assert len(table_of(path)[0]) == 7
    datafile.connect(path).close()
    assert datafile.inspect(path)["last_id"] == 1


def test_a_batch_is_whole_and_may_be_written_twice(tmp_path: Path) -> None:
    """Rows by id with their whole state, purges by id, numbers by name."""
    path = tmp_path / "keypool.db"
    writer = Writer(path, open_held(path))
    first = Batch([row(1), row(2), row(3, block=5, lease=4, owner="me")], [], {"last_id": 3})
    second = Batch([row(1, 600)], [2, 99], {"last_id": 7, "last_lease": 4})
    for batch in (first, first, second, second):
        assert writer.commit([encode(batch)]) == Verdict()
    assert rows_in(path) == [first.rows[2], second.rows[0]][::-1]
    assert numbers_in(path) == {"last_id": 7, "last_lease": 4}
    writer.close()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["keypool.db"], "the log wasn't brought in"


def test_a_batch_that_fails_leaves_nothing_and_the_next_one_is_written(tmp_path: Path) -> None:
    """Here because another program holds the file's own lock for too long."""
    path = tmp_path / "keypool.db"
    fill(path, [row(1)])
    writer = Writer(path, open_held(path))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as another:
        another.execute("BEGIN IMMEDIATE")
        verdict = writer.commit([encode(Batch([row(2)], [1]))])
        assert verdict.error == "database is locked"
        another.execute("ROLLBACK")
    assert [each[0] for each in rows_in(path)] == [1]
    assert writer.commit([encode(Batch([row(2)], [1]))]) == Verdict()
    assert [each[0] for each in rows_in(path)] == [2]
    writer.close()


class WriterProcess:
    """A writer process of its own, asked over its socket."""

    def __init__(self, path: Path, *command: str, inherit: Sequence[int] = ()) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(30)
        held = open_held(path)
        self.process = subprocess.Popen(
            [
                *(*command, sys.executable, "-m", "keypool.engine.durable.writer"),
                *(str(number) for number in (theirs.fileno(), held, os.getpid())), str(path),
            ],
            pass_fds=[theirs.fileno(), held, *inherit],
            cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        theirs.close()
        os.close(held)
        self._stream = self._socket.makefile("rwb")

    def send(self, data: bytes) -> None:
        self._stream.write(data)
        self._stream.flush()

    def part(self, batch: Batch) -> None:
        self.send(frame(Kind.PART, encode(batch)))

    def ask(self, batch: Batch) -> Verdict:
        self.send(frame(Kind.BATCH, encode(batch)))
        length, kind = HEADER.unpack(self._stream.read(HEADER.size))
        assert kind == Kind.VERDICT
        verdict = msgspec.msgpack.decode(self._stream.read(length), type=Verdict)
        verdict.figures = None  # come once a second
        return verdict

    def hang_up(self) -> int:
        """Close the socket; the exit status."""
        with contextlib.suppress(OSError):
            self._stream.close()
        self._socket.close()
        return self.process.wait(30)

    def __enter__(self) -> WriterProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.hang_up()


def test_the_writer_commits_a_batch_of_several_parts_whole(tmp_path: Path) -> None:
    """With the last of them, which alone is answered; a part whose rest never comes is not written."""
    path = tmp_path / "keypool.db"
    with WriterProcess(path) as writer:
        writer.part(Batch([row(1), row(2)]))
        writer.part(Batch([row(3)], [2]))
        assert writer.ask(Batch([row(4)], [], {"last_id": 4})) == Verdict()
        assert writer.ask(Batch([row(5)])) == Verdict()
        writer.part(Batch([row(6)]))
        writer.hang_up()
    assert [each[0] for each in rows_in(path)] == [1, 3, 4, 5]


@pytest.mark.parametrize(
    "rest", [b"", b"\0", frame(Kind.BATCH, b"x" * 100)[:5], frame(Kind.BATCH, b"x" * 100)[:6]]
)
def test_the_writer_ends_with_its_socket(tmp_path: Path, rest: bytes) -> None:
    """Wherever it stands: idle, or in the middle of a frame. What was confirmed is there."""
    path = tmp_path / "keypool.db"
    with WriterProcess(path) as writer:
        assert writer.ask(Batch([row(1)])) == Verdict()
        writer.send(rest)
        assert writer.hang_up() == 0
    assert [each[0] for each in rows_in(path)] == [1]


def test_the_last_frame_asks_the_writer_to_close_the_file(tmp_path: Path) -> None:
    """The log is brought into the file, and taken away."""
    path = tmp_path / "keypool.db"
    with WriterProcess(path) as writer:
        assert writer.ask(Batch([row(1)])) == Verdict()
        assert (tmp_path / "keypool.db-wal").exists()
        writer.send(frame(Kind.END))
        assert writer.process.wait(30) == 0
    assert [each.name for each in tmp_path.iterdir()] == ["keypool.db"]


def test_the_writer_leaves_signals_to_the_server(tmp_path: Path) -> None:
    """What a terminal or a service manager sends to everybody doesn't end it."""
    with WriterProcess(tmp_path / "keypool.db") as writer:
        assert writer.ask(Batch([row(1)])) == Verdict()
        for number in (SIGINT, SIGTERM, signal.SIGHUP):
            writer.process.send_signal(number)
        assert writer.ask(Batch([row(2)])) == Verdict()
        assert writer.hang_up() == 0


def test_a_verdict_comes_after_the_fsync(tmp_path: Path) -> None:
    """Seen from outside, by strace: between a batch's last write and its verdict the log is on the disk."""
    trace, path = tmp_path / "trace", tmp_path / "keypool.db"
    strace = shutil.which("strace")
    if strace is None or subprocess.run([strace, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs strace, and the right to trace")
    calls = "trace=pwrite64,write,writev,fsync,fdatasync,sendto,sendmsg"
    with WriterProcess(path, strace, "-D", "-f", "-y", "-e", calls, "-o", str(trace)) as writer:
        for number in range(1, 21):
            assert writer.ask(Batch([row(number)])) == Verdict()
        writer.send(frame(Kind.END))
        writer.process.wait(30)
    verdicts = written = 0
    unsynced = False
    for line in trace.read_text().splitlines():
        if "keypool.db-wal>" in line:
            written += "pwrite64(" in line
            unsynced = "sync(" not in line
        elif re.search(r"\b(write|writev|sendto|sendmsg)\(\d+<(socket|UNIX)", line):
            verdicts += 1
            assert not unsynced, f"verdict {verdicts} came before the fsync"
    assert verdicts == 20
    assert written >= 20


# ---------------------------------------------------------------------------------------------------- restore


@contextlib.asynccontextmanager
async def opened(path: Path, restart_grace: float = 0.0, **rules: Any) -> AsyncIterator[EmbeddedEngine]:
    """The durable engine over a file, with the real writer; closed in peace."""
    engine = await open_durable(path, restart_grace, **rules)
    try:
        yield engine
    finally:
        await engine.close()


def set_clocks(monkeypatch: pytest.MonkeyPatch, wall: Moment, monotonic: Moment) -> None:
    """Have the engines that are opened from now on go by these clocks."""

    def clock(not_before: float) -> Callable[[], float]:
        return make_clock(wall, monotonic, not_before)

    monkeypatch.setattr(durable, "make_clock", clock)


def states(engine: EmbeddedEngine) -> list[tuple[object, ...]]:
    """Everything durable of every key."""
    walk = engine.pool._by_id.walk(None)
    return [
        (key.id, key.text, key.created_at, key.expires_deadline, key.release_deadline, key.lease, key.owner)
        for key in walk
    ]


@on_loop
async def test_all_of_the_pool_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys, leases, owners, deadlines, counters, the last id and the last lease."""
    wall = Moment()
    set_clocks(monkeypatch, wall, wall)
    path = tmp_path / "keypool.db"
    async with opened(path) as engine:
        made = await engine.generate(6)
        leases = [await engine.acquire(owner, 0) for owner in ("me", None, "Zoë 🦊", "x" * 200)]
        wall.on(12.25)
        await engine.unblock(leases[0].key, leases[0].lease)
        await engine.keepalive(made[1].key)
        await engine.delete(made[5].key)
        with pytest.raises(UnknownKey):
            await engine.get(made[5].key)
        before, numbers = states(engine), durable._numbers(engine)
        timers = engine.timers.armed
    async with opened(path) as engine:
        assert states(engine) == before
        assert durable._numbers(engine) == numbers
        assert engine.timers.armed == timers
        engine.pool.check()
        assert (await engine.generate(1))[0].id == 7
        assert (await engine.acquire(None, 0)).lease == 5


@on_loop
async def test_a_moment_is_the_same_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the millisecond that is shown of it."""
    wall = Moment()
    set_clocks(monkeypatch, wall, wall)
    path = tmp_path / "keypool.db"
    async with opened(path) as engine:
        for _ in range(20):
            await engine.generate(1)
            wall.on(0.0123)
        before = [(await engine.get(id)).created_at for id in range(1, 21)]
    async with opened(path) as engine:
        assert [(await engine.get(id)).created_at for id in range(1, 21)] == before


@on_loop
async def test_what_ran_out_during_a_stop_is_purged_and_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted once, written down, and told of: 404 for the dead, available for the released."""
    wall = Moment()
    set_clocks(monkeypatch, wall, wall)
    path = tmp_path / "keypool.db"
    async with opened(path) as engine:
        made = await engine.generate(3)
        wall.on(200)
        for key in made[:2]:
            await engine.keepalive(key.key)
        lease = await engine.acquire("me", 0)
        while lease.key != made[0].key:
            await engine.unblock(lease.key, None)
            lease = await engine.acquire("me", 0)
        acquired = engine.pool.counters.acquired
    wall.on(100.001)
    for _ in range(2):  # the second start finds nothing left to do
        async with opened(path) as engine:
            assert [state[0] for state in states(engine)] == [1, 2]
            assert (await engine.get(made[0].key)).release_in is None
            with pytest.raises(UnknownKey):
                await engine.get(made[2].key)
            stats = await engine.stats()
            assert (stats.total, stats.blocked, stats.expired, stats.released) == (2, 0, 1, 1)
            assert stats.acquired == acquired
            assert stats.acquired == stats.unblocked + stats.released
    assert [each[0] for each in rows_in(path)] == [1, 2]
    assert numbers_in(path)["expired"] == 1


@on_loop
@pytest.mark.parametrize("stopped", [10.0, 280.0, 299.0, 300.5, 5000.0])
async def test_a_restart_grace_lets_keys_live_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: float
) -> None:
    """Those that are dead by then or would be within it live that long from the start, and no others."""
    wall = Moment()
    set_clocks(monkeypatch, wall, wall)
    path = tmp_path / "keypool.db"
    async with opened(path) as engine:
        await engine.generate(2)
        await engine.acquire("me", 0)
    wall.on(stopped)
    grace = 20.0
    async with opened(path, grace) as engine:
        row = await engine.get(1)
        assert row.expires_in == pytest.approx(max(300 - stopped, grace), abs=0.002)
        blocked = (await engine.stats()).blocked
        assert blocked == (1 if stopped < 60 else 0), "a grace lengthened a block"
    wall.on(grace - 1)  # and the grace is on disk: a second start without one changes nothing
    async with opened(path) as engine:
        assert (await engine.get(1)).expires_in == pytest.approx(
            max(300 - stopped, grace) - grace + 1, abs=0.003
        )


@on_loop
async def test_a_grace_is_for_the_living_at_the_kill_only(tmp_path: Path) -> None:
    """A key whose purge was written is gone, grace or not."""
    path = tmp_path / "keypool.db"
    async with opened(path, keepalive_seconds=0.2) as engine:
        [key] = await engine.generate(1)
        await asyncio.sleep(0.3)  # until its timer, which was set before this one, has fired
        with pytest.raises(UnknownKey):
            await engine.get(key.key)
    async with opened(path, 100.0) as engine:
        with pytest.raises(UnknownKey):
            await engine.get(key.key)


@on_loop
async def test_a_clock_set_back_between_two_runs_brings_nothing_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool's clock goes on where it was: nobody lives or is blocked longer than what was left."""
    wall, monotonic = Moment(), Moment(5000)
    set_clocks(monkeypatch, wall, monotonic)
    path = tmp_path / "keypool.db"
    async with opened(path) as engine:
        [key] = await engine.generate(1)
        await engine.acquire("me", 0)
        monotonic.on(20)
        before = engine.now()
    wall.at -= 3600
    monotonic.at = 7
    async with opened(path) as engine:
        assert engine.now() == pytest.approx(before, abs=0.001)
        row = await engine.get(key.key)
        assert (row.expires_in, row.release_in) == pytest.approx((280, 40), abs=0.002)
        monotonic.on(40.01)
        assert (await engine.acquire(None, 0)).lease == 2


@on_loop
async def test_a_wall_clock_that_jumps_moves_no_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the server runs there is the monotonic clock and no other."""
    wall, monotonic = Moment(), Moment(5000)
    set_clocks(monkeypatch, wall, monotonic)
    async with opened(tmp_path / "keypool.db") as engine:
        [key] = await engine.generate(1)
        await engine.acquire("me", 0)
        for jump in (86_400, -7 * 86_400, 3600):
            wall.at += jump
            monotonic.on(1)
            await engine.keepalive(key.key)
        row = await engine.get(key.key)
        assert (row.expires_in, row.release_in) == (300, 57)


@on_loop
async def test_a_file_from_the_future_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written under a wall clock that was a year ahead: keys keep what they had left."""
    wall, monotonic = Moment(1_800_000_000), Moment(0)
    set_clocks(monkeypatch, wall, monotonic)
    path = tmp_path / "keypool.db"
    async with opened(path) as engine:
        await engine.generate(2)
    wall.at -= 365 * 86_400
    async with opened(path) as engine:
        assert (await engine.stats()).total == 2
        assert (await engine.get(1)).expires_in == pytest.approx(300, abs=0.002)


# ------------------------------------------------------------------------------------------- the whole server


def durable_server(path: Path, *flags: str, env: dict[str, str] | None = None) -> ServerProcess:
    """A server on a data file, as its user starts it."""
    return ServerProcess([f"--data={path}", "--port=0", *flags], cwd=path.parent, env=env)


def refused_start(path: Path, *flags: str, env: dict[str, str] | None = None) -> str:
    """The one line of a server that can't start, with status 1."""
    status, output = run_server([f"--data={path}", "--port=0", *flags], env)
    assert status == 1, f"exit status {status}: {output}"
    assert len(output.strip().splitlines()) == 1, f"not one line: {output}"
    assert str(path) in output, f"doesn't name the file: {output}"
    return output


def crash(server: ServerProcess) -> None:
    """kill -9."""
    server.signal(SIGKILL)
    server.wait()


def patched(folder: Path, code: str) -> dict[str, str]:
    """The environment of a server, and of its writer, that run this code before anything of their own."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(textwrap.dedent(code))
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def texts_of(client: Client) -> set[int]:
    """The ids of all keys."""
    found: set[int] = set()
    after = ""
    while True:
        page = client.get(f"{API}/keys?limit=500{after}").expect(200)
        found |= {row["id"] for row in page["keys"]}
        if page["next"] is None:
            return found
        after = f"&after={page['next']}"


def test_a_server_keeps_its_pool_by_default(tmp_path: Path) -> None:
    """At data/keypool.db under the folder that it runs in, made if it isn't there; nobody else may read it."""
    before = os.umask(0)
    try:
        with ServerProcess(["--port=0"], cwd=tmp_path) as server:
            key = server.client().make()
            files = {each.name: stat.S_IMODE(each.stat().st_mode) for each in (tmp_path / "data").iterdir()}
    finally:
        os.umask(before)
    assert files == dict.fromkeys(["keypool.db", "keypool.db-shm", "keypool.db-wal"], 0o600)
    with ServerProcess(["--port=0"], cwd=tmp_path) as server:
        assert server.client().row(key["key"])["id"] == key["id"]


def test_missing_folders_are_made(tmp_path: Path) -> None:
    """All of them."""
    path = tmp_path / "a" / "b b" / "ü?#%" / "keypool.db"
    with ServerProcess([f"--data={path}", "--port=0"], cwd=tmp_path) as server:
        server.client().make()
    assert len(rows_in(path)) == 1


def test_what_was_told_is_there_after_a_kill(tmp_path: Path) -> None:
    """One of each call, the slow way; test_crash.py has the fast one."""
    path = tmp_path / "keypool.db"
    with durable_server(path) as server:
        client = server.client()
        one, two, three = client.make_many(3)
        client.delete(f"{API}/keys/{three['key']}").expect(204)
        leases = {lease["id"]: lease["lease"] for lease in (client.acquire(owner="me"), client.acquire())}
        client.post(f"{API}/keys/{one['key']}/unblock", json={"lease": leases[1]}).expect(200)
        rows = {key["id"]: client.row(key["key"]) for key in (one, two)}
        before, told_at = client.stats(), time.monotonic()
        crash(server)
    with durable_server(path) as server:
        client = server.client()
        for key in (one, two):
            row = client.row(key["key"])
            assert row.pop("created_at")[:19] == rows[key["id"]].pop("created_at")[:19]
            left = {name: row.pop(name) for name in ("expires_in", "release_in")}
            for name, value in left.items():
                was = rows[key["id"]].pop(name)
                assert (value is None) == (was is None)
                if value is not None:
                    assert was - (time.monotonic() - told_at) - LATE <= value <= was
            assert row == rows[key["id"]]
        client.get(f"{API}/keys/{three['key']}").expect_problem(404, "unknown-key")
        client.get(f"{API}/keys/id:3").expect_problem(404, "unknown-key")
        after = client.stats()
        assert after.pop("uptime") < before.pop("uptime") + 60
        assert after == before
        assert client.acquire()["lease"] == 3
        assert client.make()["id"] == 4


# ---------------------------------------------------------------------------------------- a file of no use


ROWS: Final = 3000


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data file of some pages, in peace."""
    path = tmp_path_factory.mktemp("whole") / "keypool.db"
    fill(path, [row(id, 3600) for id in range(1, ROWS + 1)])
    return path


def spoiled(whole: bytes, how: str) -> bytes:
    """What has become of a file."""
    middle = len(whole) // 2 // 4096 * 4096
    return {
        "garbage": b"no database at all, but long enough to be one\n" * 1000,
        "a few bytes": b"xyz",
        "its end is missing": whole[: middle + 1000],
        "only its head is left": whole[:100],
        "its head is overwritten": bytes(100) + whole[100:],
        "a page of zeros in the middle": whole[:middle] + bytes(4096) + whole[middle + 4096 :],
        "a page of noise in the middle": whole[:middle]
        + random.Random(1).randbytes(4096)
        + whole[middle + 4096 :],
        "a page twice": whole[:middle] + whole[middle - 4096 : middle] + whole[middle + 4096 :],
    }[how]


SPOILED = (
    "garbage", "a few bytes", "its end is missing", "only its head is left", "its head is overwritten",
    "a page of zeros in the middle", "a page of noise in the middle", "a page twice",
)  # fmt: skip


@pytest.mark.parametrize("how", SPOILED)
def test_a_damaged_file_is_refused_and_left_as_it_was(whole_file: Path, tmp_path: Path, how: str) -> None:
    """One line, status 1, and not a byte changed."""
    path = tmp_path / "keypool.db"
    path.write_bytes(spoiled(whole_file.read_bytes(), how))
    before = path.read_bytes()
    assert "damaged" in refused_start(path)
    assert path.read_bytes() == before


def test_a_file_of_one_byte_is_damaged_too(tmp_path: Path) -> None:
    """SQLite's own oddity: it reports the size 1 as 0."""
    path = tmp_path / "keypool.db"
    path.write_bytes(b"x")
    with pytest.raises(StartError):
        datafile.inspect(path)


FLIPS = 60


def test_a_flipped_bit_is_refused_in_one_line_or_harmless(tmp_path: Path) -> None:
    """Wherever it is: the file is refused and left as it was, or it loads and the pool is sound."""
    whole = tmp_path / "whole.db"
    fill(whole, [(id, f"{id:020d}", 1, 4_000_000_000_000, None, 0, None) for id in range(1, 400)], moment=1)
    content = whole.read_bytes()
    draw = random.Random(3)

    async def load(path: Path) -> str | None:
        """Why it was refused, if it was."""
        try:
            async with opened(path) as engine:
                engine.pool.check()
        except StartError as error:
            return str(error)
        return None

    refused = 0
    for number in range(FLIPS):
        path = tmp_path / f"{number}.db"
        flipped = bytearray(content)
        flipped[draw.choice((draw.randrange(100), draw.randrange(len(content))))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        why = asyncio.run(load(path))
        if why is not None:
            refused += 1
            assert "\n" not in why
            assert path.read_bytes() == flipped, f"the refused file was changed: {why}"
    assert refused


STORIES = {
    "a lease beyond the last": "UPDATE keys SET lease = 99 WHERE id = 5",
    "an id beyond the last": "UPDATE pool SET value = 5 WHERE name = 'last_id'",
    "a text twice": "UPDATE keys SET text = (SELECT text FROM keys WHERE id = 7) WHERE id = 5",
    "an owner of a free key": "UPDATE keys SET owner = 'me' WHERE id = 5",
    "a text that is no text": "UPDATE keys SET text = CAST(x'fffe' AS TEXT) WHERE id = 5",
    "the numbers are missing": "DELETE FROM pool",
    "a column of another name": "ALTER TABLE keys RENAME COLUMN created_at TO c2",
    "a moment that is no number": """
        DROP TABLE keys;
        CREATE TABLE keys (id INTEGER PRIMARY KEY, text, created_at, expires_at, release_at, lease, owner);
        INSERT INTO keys VALUES (1, 'aaaaaaaaaaaaaaaaaaaa', 'soon', 'later', NULL, 0, NULL)
    """,
}


@pytest.mark.parametrize("story", STORIES)
def test_a_file_that_contradicts_itself_is_refused_in_one_line(
    whole_file: Path, tmp_path: Path, story: str
) -> None:
    """Sound for SQLite, and not for the pool: check() after the restore says which key is wrong."""
    path = tmp_path / "keypool.db"
    shutil.copy(whole_file, path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.executescript(STORIES[story])
    before = path.read_bytes()
    for flags in ([], ["--restart-grace=5000"]):
        assert "contradicts itself" in refused_start(path, *flags)
        assert path.read_bytes() == before


def test_a_number_of_the_pool_that_is_none_is_refused(whole_file: Path, tmp_path: Path) -> None:
    """One line, and the file is as it was."""
    path = tmp_path / "keypool.db"
    shutil.copy(whole_file, path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.executescript(
            "DROP TABLE pool; CREATE TABLE pool (name, value); INSERT INTO pool VALUES ('last_id', 'many')"
        )
    before = path.read_bytes()
    assert "is damaged" in refused_start(path)
    assert path.read_bytes() == before


def test_no_key_is_shown_of_a_damaged_file(whole_file: Path, tmp_path: Path) -> None:
    """SQLite quotes a text that it can't decode, and that may be most of a key."""
    path = tmp_path / "keypool.db"
    shutil.copy(whole_file, path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("UPDATE keys SET text = CAST(CAST('secretsecretsecre' AS BLOB) || x'ff' AS TEXT)")
    assert "secret" not in refused_start(path)


def test_a_file_of_another_program_is_refused(tmp_path: Path) -> None:
    """Whole, but not ours."""
    path = tmp_path / "keypool.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("CREATE TABLE bookmarks (url TEXT)")
    path.chmod(0o644)
    before = path.read_bytes()
    assert "another program" in refused_start(path)
    assert path.read_bytes() == before
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_file_of_a_newer_version_is_refused(whole_file: Path, tmp_path: Path) -> None:
    """Both versions are named."""
    path = tmp_path / "keypool.db"
    shutil.copy(whole_file, path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(f"PRAGMA user_version = {datafile.VERSION + 1}")
    before = path.read_bytes()
    line = refused_start(path)
    assert re.search(rf"newer version {datafile.VERSION + 1}\b.*\b{datafile.VERSION}\b", line), line
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["file:x.db", ":memory:", "file::memory:?cache=shared"])
def test_a_name_that_means_more_to_sqlite_is_a_file_to_us(tmp_path: Path, name: str) -> None:
    """Writer and reader use the one that the lock is on."""
    path = tmp_path / name
    with durable_server(path) as server:
        made = server.client().make()
        crash(server)
    assert [each[1] for each in rows_in(path)] == [made["key"]]


def test_a_folder_is_no_data_file(tmp_path: Path) -> None:
    """Nor has a file folders in it."""
    assert "Is a directory" in refused_start(tmp_path)
    (tmp_path / "file").write_text("")
    refused_start(tmp_path / "file" / "keypool.db")


def test_a_pipe_is_no_data_file(tmp_path: Path) -> None:
    """Nor a device: reading one may never end."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StartError):
        datafile.hold(tmp_path / "pipe")


def test_a_file_that_others_may_read_is_closed_to_them(whole_file: Path, tmp_path: Path) -> None:
    """As a backup is that was put in its place as docs/operations.md says: it holds the keys in clear text."""
    path = tmp_path / "keypool.db"
    shutil.copy(whole_file, path)
    path.chmod(0o644)
    with durable_server(path) as server:
        server.client().make()
        modes = {stat.S_IMODE(each.stat().st_mode) for each in tmp_path.glob("keypool.db*")}
    assert modes == {0o600}


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Nobody may change a file or folder meanwhile, root included."""
    if os.geteuid() != 0:
        mode = stat.S_IMODE(path.stat().st_mode)
        path.chmod(mode & 0o555)
        yield
        path.chmod(mode)
        return
    if subprocess.run(["chattr", "+i", str(path)], check=False, capture_output=True).returncode:
        pytest.skip("root may write everywhere, and chattr +i doesn't work here")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", str(path)], check=True)


@pytest.mark.parametrize("what", ["file", "folder", "folder without a file"])
def test_what_is_read_only_is_refused(whole_file: Path, tmp_path: Path, what: str) -> None:
    """One line, status 1."""
    path = tmp_path / "folder" / "keypool.db"
    path.parent.mkdir()
    if what != "folder without a file":
        shutil.copy(whole_file, path)
    with read_only(path if what == "file" else path.parent):
        refused_start(path)
        assert path.exists() == (what != "folder without a file")
    if path.exists():
        assert path.read_bytes() == whole_file.read_bytes()
    with durable_server(path) as server:
        assert server.client().stats()["total"] in (0, ROWS)


# ------------------------------------------------------------------------------------- two servers, one file


def test_a_file_that_another_server_holds_is_refused_after_5_s(tmp_path: Path) -> None:
    """One line, status 1, and who holds it is not disturbed."""
    path = tmp_path / "keypool.db"
    with durable_server(path) as server:
        began = time.monotonic()
        assert "held by another server" in refused_start(path)
        assert time.monotonic() - began >= 5
        assert server.client().make()["id"] == 1


def test_a_file_is_waited_for_while_its_server_dies(tmp_path: Path) -> None:
    """The next one starts as soon as the one before is gone, and has all that it kept."""
    path = tmp_path / "keypool.db"
    first = durable_server(path)
    followed: list[ServerProcess] = []
    try:
        key = first.client().make()
        following = threading.Thread(target=lambda: followed.append(durable_server(path)))
        following.start()
        eventually(lambda: len(_servers_of(path)) == 2, "the next server")
        crash(first)
        following.join(60)
        [second] = followed
        assert second.client().row(key["key"])["id"] == key["id"]
        second.finish()
    finally:
        first.close()
        for server in followed:
            server.close()


# --------------------------------------------------------------------------------- a disk that is full or fails


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = os.geteuid() == 0 and not subprocess.run(mount, check=False, capture_output=True).returncode
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_up(disk: Path) -> Path:
    """Leave no byte free; the file that takes them."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


@contextlib.contextmanager
def no_writing(pid: int) -> Iterator[None]:
    """Every write of a process to a file fails meanwhile, as if the disk did."""
    if not hasattr(resource, "prlimit"):
        pytest.skip("needs prlimit")
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))


def wait_for_refusal(client: Client) -> None:
    """Ask for keys until it is refused: the log of a file has room for some."""

    def refused() -> bool:
        answer = client.post(API + "/keys")
        if answer.status == 201:
            return False
        answer.expect_problem(503, "storage-unavailable")
        return True

    eventually(refused, "a refusal")


def expect_only_reads(client: Client, key: dict[str, Any]) -> None:
    """Storage is down: what changes something is refused, what is on disk is told."""
    client.get("/healthz").expect(200)
    client.get("/readyz").expect_problem(503, "storage-unavailable")
    path = f"{API}/keys/{key['key']}"
    for answer in (
        client.post(API + "/keys"),
        client.post(ACQUIRE),
        client.post(f"{path}/unblock"),
        client.post(f"{path}/keepalive"),
        client.delete(path),
        client.batch(op="keepalive", keys=[key["key"]]),
    ):
        answer.expect_problem(503, "storage-unavailable")
    assert client.row(key["key"])["id"] == key["id"]
    assert client.stats()["total"] >= 1
    assert client.get(API + "/keys").expect(200)["keys"]
    client.get(f"{API}/keys/{'x' * 20}").expect_problem(404, "unknown-key")


def expect_all_well(client: Client) -> set[int]:
    """Storage is back, without a restart: the ids of all keys."""
    eventually(lambda: client.get("/readyz").status == 200, "storage that is back")
    client.make()
    return texts_of(client)


@pytest.mark.parametrize("cut", ["stopped", "killed"])
def test_a_full_disk_refuses_changes_until_there_is_room(small_disk: Path, cut: str) -> None:
    """And loses nothing, neither then nor by a kill while it is full."""
    path = small_disk / "keypool.db"
    with durable_server(path) as server:
        server.allow("can't be written")
        client = server.client()
        key = client.make()
        filler = fill_up(small_disk)
        wait_for_refusal(client)
        expect_only_reads(client, key)
        made = {row["id"] for row in client.get(API + "/keys?limit=500").expect(200)["keys"]}
        if cut == "killed":
            told = made - {max(made)}  # the last one was refused: it may be there or not
            crash(server)
            filler.unlink()
        else:
            filler.unlink()
            told = expect_all_well(client)
            assert "can be written again" in server.log
            assert server.log.count(FULL) == 1
    with durable_server(path) as server:
        assert told <= texts_of(server.client())


def test_an_io_error_refuses_changes_until_it_is_over(tmp_path: Path) -> None:
    """The same on a disk that fails, and on one that fails on and on."""
    path = tmp_path / "keypool.db"
    with durable_server(path) as server:
        server.allow("can't be written")
        client = server.client()
        key = client.make()
        for _ in range(2):
            with no_writing(writer_of(server)):
                wait_for_refusal(client)
                expect_only_reads(client, key)
            told = expect_all_well(client)
        crash(server)
    with durable_server(path) as server:
        assert texts_of(server.client()) == told


def test_a_disk_that_fails_under_load_loses_nothing(tmp_path: Path) -> None:
    """It comes and goes while callers generate: each is answered, and what was told is there."""
    path = tmp_path / "keypool.db"
    with durable_server(path) as server:
        server.allow("can't be written")
        with Load(server) as load:
            for _ in range(3):
                load.wait_for(50)
                with no_writing(writer_of(server)):
                    load.wait_for_refusals(20)
                eventually(lambda: server.client().get("/readyz").status == 200, "storage that is back")
            load.wait_for(50)
        crash(server)
    with durable_server(path) as server:
        assert load.told <= texts_of(server.client())


class Load:
    """Callers that generate keys, one after the other, until the block ends or the server does."""

    def __init__(self, server: ServerProcess, callers: int = 6) -> None:
        self.told: set[int] = set()
        self.refused = 0
        self._failures: list[BaseException] = []
        self._server = server
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(callers)]

    def _run(self) -> None:
        try:
            with Client(self._server) as client:
                while not self._over.is_set():
                    self._note(client.post(API + "/keys"))
        except (OSError, http.client.HTTPException) as error:
            if self._server.running and not self._over.is_set():
                self._failures.append(error)
        except AssertionError as error:
            self._failures.append(error)

    def _note(self, answer: Answer) -> None:
        if answer.status == 201:
            self.told.add(answer.json["id"])
        else:
            assert answer.json["code"] in ("storage-unavailable", "draining"), str(answer)
            self.refused += 1
            self._over.wait(0.01)

    def wait_for(self, count: int) -> None:
        """Until so many more keys were made."""
        target = len(self.told) + count
        eventually(lambda: self._failures or len(self.told) >= target, f"{count} keys more")

    def wait_for_refusals(self, count: int) -> None:
        """Until so many more calls were refused."""
        target = self.refused + count
        eventually(lambda: self._failures or self.refused >= target, f"{count} refusals more")

    def stop(self) -> None:
        """The callers end; what comes to them from now on is the server's end."""
        self._over.set()

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), "a call was never answered"
        assert not self._failures, self._failures


def test_a_keeper_loses_no_key_to_a_full_disk(small_disk: Path) -> None:
    """Full for more than twice the keepalive, while a keeper goes on asking; nor to a kill right after it."""
    path = small_disk / "keypool.db"
    with durable_server(path, "--keepalive-seconds=2") as server:
        server.allow("can't be written")
        client = server.client()
        keys = [key["key"] for key in client.make_many(200)]
        filler = fill_up(small_disk)
        kept: list[int] = []

        def keep() -> int:
            answer = client.batch(op="keepalive", keys=keys)
            if answer.status == 200:
                assert answer.json == {"op": "keepalive", "done": 200, "unknown": []}
            else:
                answer.expect_problem(503, "storage-unavailable")
            kept.append(answer.status)
            time.sleep(0.1)
            return answer.status

        eventually(lambda: keep() == 503, "a disk that is full")
        refused_at = time.monotonic()
        eventually(lambda: keep() == 503 and time.monotonic() > refused_at + 5, "twice the keepalive")
        assert client.stats()["expired"] == 0
        filler.unlink()
        eventually(lambda: keep() == 200, "storage that is back")
        assert client.stats()["total"] == 200
        assert client.stats()["expired"] == 0
        crash(server)
    assert len(rows_in(path)) == 200


def test_a_disk_that_hangs_is_an_outage_and_over_by_itself(tmp_path: Path) -> None:
    """Noticed within 6 s: a log line, 503 for who waits, comes, and asks /readyz; no key is lost to it."""
    with durable_server(tmp_path / "keypool.db", "--keepalive-seconds=4") as server:
        server.allow("can't be written")
        client = server.client()
        keys = [key["key"] for key in client.make_many(3)]
        writer = writer_of(server)
        os.kill(writer, SIGSTOP)
        try:
            waiting = server.wire()
            began = time.monotonic()
            waiting.ask("POST", f"{API}/keys/{keys[0]}/keepalive")
            assert waiting.answer().json["code"] == "storage-unavailable"
            assert 4.5 < time.monotonic() - began < 8
            client.get("/readyz").expect_problem(503, "storage-unavailable")
            client.batch(op="keepalive", keys=keys).expect_problem(503, "storage-unavailable")
            assert "a commit has taken over 5 s" in server.log
            assert "keypool_storage_up 0.0" in client.get("/metrics").body.decode()
            time.sleep(1)  # the other keys' lives are over by now
        finally:
            os.kill(writer, SIGCONT)
        eventually(lambda: client.get("/readyz").status == 200, "storage that is back")
        assert client.batch(op="keepalive", keys=keys).expect(200) == {
            "op": "keepalive",
            "done": 3,
            "unknown": [],
        }


@pytest.mark.parametrize("how", ["moved", "replaced"])
def test_a_data_file_that_is_gone_is_an_outage(tmp_path: Path, how: str) -> None:
    """Noticed by the next change; over when it is back in its place. A stop before says what it didn't keep."""
    path, away = tmp_path / "keypool.db", tmp_path / "away"
    with durable_server(path) as server:
        server.allow("can't be written|the last commit was not made")
        client = server.client()
        client.make_many(20)
        path.rename(away)
        if how == "replaced":
            fill(tmp_path / "other", [])
            (tmp_path / "other").rename(path)
        client.post(API + "/keys").expect_problem(503, "storage-unavailable")
        problem = client.get("/readyz").expect_problem(503, "storage-unavailable")
        assert "deleted, moved or replaced" in problem["detail"]
        if how == "replaced":
            server.signal(SIGTERM)
            assert server.wait() == 1
            assert rows_in(path) == []
        else:
            away.rename(path)
            assert len(expect_all_well(client)) == 22
    assert len(rows_in(path if how == "moved" else away)) in (20, 22)


def test_the_writer_is_given_no_setting_and_no_token(tmp_path: Path) -> None:
    """Who reads a process's environment finds no secret in this one."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("needs /proc")
    secret = {"KEYPOOL_ADMIN_TOKEN": "admin-token-of-this-test"}
    with durable_server(tmp_path / "keypool.db", env=secret) as server:
        environ = Path(f"/proc/{writer_of(server)}/environ").read_bytes()
        assert b"PATH=" in environ
        assert b"KEYPOOL" not in environ


def test_folders_are_made_for_their_owner_alone(tmp_path: Path) -> None:
    """Whatever the umask, and those that are there stay as they are."""
    before = os.umask(0)
    try:
        tmp_path.chmod(0o755)
        os.close(datafile.hold(tmp_path / "a" / "b" / "keypool.db"))
    finally:
        os.umask(before)
    modes = [
        stat.S_IMODE(folder.stat().st_mode) for folder in (tmp_path, tmp_path / "a", tmp_path / "a" / "b")
    ]
    assert modes == [0o755, 0o700, 0o700]


def test_waiters_are_served_when_the_disk_is_back(tmp_path: Path) -> None:
    """One who stood in the queue when it failed gets the key whose block ran out meanwhile, and not before."""
    with durable_server(tmp_path / "keypool.db", "--block-seconds=1") as server:
        server.allow("can't be written")
        client = server.client()
        key = client.make()
        assert client.acquire()["lease"] == 1
        waiter = server.wire(limit=60)
        waiter.ask("POST", ACQUIRE, json={"wait": 60})
        client.expect_waiting(1)
        with no_writing(writer_of(server)):
            client.post(f"{API}/keys/{key['key']}/keepalive").expect_problem(503, "storage-unavailable")
            client.post(ACQUIRE, json={"wait": 60}).expect_problem(503, "storage-unavailable")
            eventually(lambda: client.stats()["available"] == 1, "the end of the block")
            assert client.stats()["waiting"] == 1
        assert waiter.answer().expect(200)["lease"] == 2


def test_a_start_on_a_full_disk_is_one_line(small_disk: Path) -> None:
    """Status 1, and no second line in the log."""
    fill_up(small_disk)
    assert FULL in refused_start(small_disk / "keypool.db")


# ---------------------------------------------------------------------------------- the writer and the server


def test_a_killed_writer_is_replaced(tmp_path: Path) -> None:
    """Idle or not, again and again; what was told is there, and the log has a line about it."""
    path = tmp_path / "keypool.db"
    with durable_server(path) as server:
        server.allow("writer process died")
        client = server.client()
        told = set()
        writers = set()
        for _ in range(3):
            told.add(client.make()["id"])
            writers.add(writer_of(server))
            kill(writer_of(server))
            eventually(lambda: writer_of(server) not in writers, "another writer")
            eventually(lambda: client.get("/readyz").status == 200, "a writer that can write")
            told |= {client.make()["id"]}
        assert len(writers) == 3
        assert server.log.count("can be written again") == 3
        crash(server)
    with durable_server(path) as server:
        assert texts_of(server.client()) == told


def test_a_writer_killed_under_load_costs_some_503_and_nothing_else(tmp_path: Path) -> None:
    """No call hangs, none gets another error, no key is lost."""
    path = tmp_path / "keypool.db"
    with durable_server(path) as server:
        server.allow("writer process died")
        with Load(server) as load:
            for _ in range(4):
                load.wait_for(60)
                kill(writer_of(server))
            load.wait_for(60)
        assert load.told <= texts_of(server.client())
        crash(server)
    with durable_server(path) as server:
        assert load.told <= texts_of(server.client())


def test_a_writer_that_stands_still_makes_callers_wait(tmp_path: Path) -> None:
    """Changes are answered when it goes on; reads of what is on disk, lists and stats don't wait."""
    with durable_server(tmp_path / "keypool.db") as server:
        client = server.client()
        one, two = client.make_many(2)
        writer = writer_of(server)
        os.kill(writer, SIGSTOP)
        try:
            asked = []
            for path in (f"{API}/keys/{one['key']}/keepalive", f"{API}/keys"):
                wire = server.wire()
                wire.ask("POST", path)
                asked.append(wire)
            eventually(lambda: client.stats()["total"] == 3, "both calls in the pool")
            assert client.row(two["key"])["state"] == "available"
            assert len(texts_of(client)) == 3
            client.get("/readyz").expect(200)
            read = server.wire()
            read.ask("GET", f"{API}/keys/{one['key']}")
        finally:
            os.kill(writer, SIGCONT)
        assert asked[0].answer().status == 200
        assert asked[1].answer().status == 201
        assert read.answer().status == 200


@pytest.mark.parametrize("state", ["idle", "under load", "stopped"])
def test_a_killed_server_leaves_no_writer(tmp_path: Path, state: str) -> None:
    """Gone within 2 s, whatever state it is in, and the file is free with all that was told."""
    path = tmp_path / "keypool.db"
    with durable_server(path) as server:
        writer = writer_of(server)
        with Load(server) if state == "under load" else contextlib.nullcontext() as load:
            if load is not None:
                load.wait_for(30)
                load.stop()
            if state == "stopped":
                server.client().make()
                os.kill(writer, SIGSTOP)
            crash(server)
            eventually(lambda: not lives(writer), "a writer that is gone", within=2)
    datafile_lock = datafile.hold(path)
    os.close(datafile_lock)
    assert len(rows_in(path)) >= (state != "idle")


@pytest.mark.parametrize("number", [SIGINT, SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_to_everybody_is_left_to_the_server(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C reaches the server's group, a service manager signals every process: status 0, nothing lost."""
    path = tmp_path / "keypool.db"
    with durable_server(path) as server:
        writer = writer_of(server)
        with Load(server) as load:
            load.wait_for(100)
            load.stop()
            os.kill(writer, number)
            os.killpg(server.pid, number)
            os.kill(writer, number)
            assert server.wait() == 0
        eventually(lambda: not lives(writer), "a writer that is gone", within=2)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["keypool.db"], "not closed in peace"
    assert {each[0] for each in rows_in(path)} >= load.told
    with durable_server(path) as server:
        assert load.told <= texts_of(server.client())


def test_a_stop_writes_the_last_commit(tmp_path: Path) -> None:
    """The drain's end is the journal's: the counters too."""
    path = tmp_path / "keypool.db"
    with durable_server(path) as server:
        client = server.client()
        client.make_many(1000)
        client.batch(op="acquire", count=500).expect(200)
        stats = client.stats()
        server.signal(SIGTERM)
        assert server.wait() == 0
    numbers = numbers_in(path)
    assert {name: numbers[name] for name in ("generated", "acquired")} == {"generated": 1000, "acquired": 500}
    assert stats["total"] == len(rows_in(path))


def test_a_stop_while_the_writer_stands_still_is_over_in_time(tmp_path: Path) -> None:
    """What can't be committed isn't answered; the server ends within --drain-seconds, says so, and takes it along."""
    with durable_server(tmp_path / "keypool.db", "--drain-seconds=1") as server:
        server.allow("the last commit was not made")
        writer = writer_of(server)
        os.kill(writer, SIGSTOP)
        wire = server.wire()
        wire.ask("POST", API + "/keys")
        eventually(lambda: server.client().stats()["total"] == 1, "the call in the pool")
        server.signal(SIGTERM)
        assert server.wait(30) == 1
        assert wire.rest() == b""
        eventually(lambda: not lives(writer), "a writer that is gone", within=2)
        assert "the last commit was not made" in server.log


# -------------------------------------------------------------------------------------------------- loading


LOAD_GATE = """
    import sys, time
    from pathlib import Path
    if any(word.endswith("server.py") for word in sys.orig_argv):
        from keypool.engine import datafile
        gate = Path({gate!r})
        inspect, read_keys = datafile.inspect, datafile.read_keys
        def slow_inspect(path):
            while {while_inspecting} and not gate.exists():
                time.sleep(0.01)
            return inspect(path)
        def slow_read(path, size):
            while not {while_inspecting} and not gate.exists():
                time.sleep(0.001)
                yield []
            yield from read_keys(path, size)
        datafile.inspect, datafile.read_keys = slow_inspect, slow_read
"""


@pytest.mark.parametrize("while_inspecting", [True, False], ids=["inspecting", "reading"])
def test_while_it_loads_it_says_so(whole_file: Path, tmp_path: Path, while_inspecting: bool) -> None:
    """/healthz 200, /readyz and every call 503; then all at once as ever."""
    path, gate = tmp_path / "keypool.db", tmp_path / "gate"
    shutil.copy(whole_file, path)
    code = LOAD_GATE.format(gate=str(gate), while_inspecting=while_inspecting)
    with loading_server(path, patched(tmp_path / "patch", code)) as (client, started):
        client.get("/healthz").expect(200)
        client.get("/readyz").expect_problem(503, "loading")
        for answer in (
            client.post(API + "/keys"),
            client.post(ACQUIRE, json={"wait": 60}),
            client.get(f"{API}/keys/{1:020d}"),
            client.get(API + "/keys"),
            client.get(API + "/stats"),
            client.batch(op="keepalive", keys=[f"{1:020d}"]),
            client.get(API + "/random_api_key/"),
            client.get(API + "/start_scheduler/"),
            client.get(API + "/openapi.json"),
            client.get(API + "/feed"),
        ):
            answer.expect_problem(503, "loading")
        gate.touch()
        server = started()
        client.get("/readyz").expect(200)
        assert client.stats()["total"] == ROWS
        server.finish()


@pytest.mark.parametrize("number", [SIGINT, SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_stop_while_it_loads(whole_file: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Status 0 at once; nothing has changed, no writer is left."""
    path = tmp_path / "keypool.db"
    shutil.copy(whole_file, path)
    code = LOAD_GATE.format(gate=str(tmp_path / "never"), while_inspecting=False)
    before = path.read_bytes()
    with loading_server(path, patched(tmp_path / "patch", code)) as (client, started):
        [pid] = eventually(lambda: _servers_of(path), "the server")
        [writer] = eventually(lambda: children_of(pid), "its writer")
        client.get("/healthz").expect(200)
        os.kill(pid, number)
        with pytest.raises(AssertionError, match="never said that it was ready"):
            started()
        eventually(lambda: not lives(writer), "a writer that is gone", within=2)
    assert path.read_bytes() == before


def _servers_of(path: Path) -> list[int]:
    """The process ids of the servers that this process started on a file."""
    children = children_of(os.getpid())
    forked = [pid for child in children for pid in children_of(child)]  # by fork_server.py
    return [pid for pid in children + forked if f"--data={path}" in command_of(pid)]


class _Address:
    """What a Client needs of a server that isn't ready yet."""

    def __init__(self, port: int) -> None:
        self.address, self.port = "127.0.0.1", port

    def note(self, answer: object) -> None:
        """Nothing is kept."""


@contextlib.contextmanager
def loading_server(path: Path, env: dict[str, str]) -> Iterator[tuple[Client, Callable[[], ServerProcess]]]:
    """A server that isn't ready: a client of it, and what waits until it is, or raises if it never will be."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    started: list[ServerProcess | BaseException] = []

    def start() -> None:
        try:
            started.append(ServerProcess([f"--data={path}", f"--port={port}"], cwd=path.parent, env=env))
        except BaseException as error:
            started.append(error)

    thread = threading.Thread(target=start)
    thread.start()

    def wait() -> ServerProcess:
        thread.join(60)
        [server] = started
        if isinstance(server, BaseException):
            raise server
        return server

    client = Client(_Address(port))  # type: ignore[arg-type]

    def answers() -> bool:
        try:
            return client.get("/healthz").status == 200
        except OSError:
            return False

    try:
        eventually(answers, "an answer of a server that loads")
        yield client, wait
    finally:
        client.close()
        for server in started:
            if isinstance(server, ServerProcess):
                server.close()


# --------------------------------------------------------------------------------------- clocks, of the process

MOVED_CLOCK = """
    import time
    from pathlib import Path
    offset = Path({offset!r})
    true_time = time.time
    time.time = lambda: true_time() + float(offset.read_text() or 0)
"""


def set_offset(path: Path, seconds: float) -> None:
    """Put the server's wall clock so much forward."""
    beside = path.with_suffix(".new")
    beside.write_text(str(seconds))
    beside.rename(path)


def test_a_clock_set_back_an_hour_between_two_runs(tmp_path: Path) -> None:
    """The whole server: nothing comes back, nothing lives longer than it was told."""
    offset, path = tmp_path / "offset", tmp_path / "keypool.db"
    env = patched(tmp_path / "patch", MOVED_CLOCK.format(offset=str(offset)))
    set_offset(offset, 0)
    with durable_server(path, "--keepalive-seconds=100", "--block-seconds=50", env=env) as server:
        client = server.client()
        one, two = client.make_many(2)
        client.delete(f"{API}/keys/{two['key']}").expect(204)
        lease = client.acquire(owner="me")
        crash(server)
    set_offset(offset, -3600)
    with durable_server(path, "--keepalive-seconds=100", "--block-seconds=50", env=env) as server:
        client = server.client()
        row = client.row(one["key"])
        assert row["expires_in"] <= one["expires_in"] + LATE
        assert row["release_in"] <= lease["release_in"] + LATE
        assert (row["state"], row["owner"], row["lease"]) == ("blocked", "me", lease["lease"])
        client.get(f"{API}/keys/{two['key']}").expect_problem(404, "unknown-key")
        assert client.make()["id"] == 3
        crash(server)
    set_offset(offset, 3600)  # and forward: all that was to end has ended
    with durable_server(path, env=env) as server:
        assert server.client().stats()["total"] == 0


def test_a_clock_that_jumps_while_the_server_runs(tmp_path: Path) -> None:
    """An hour forward, an hour back: blocks and lives are as long as ever, and moments are the pool's own."""
    offset = tmp_path / "offset"
    env = patched(tmp_path / "patch", MOVED_CLOCK.format(offset=str(offset)))
    set_offset(offset, 0)
    with durable_server(tmp_path / "keypool.db", "--block-seconds=0.3", env=env) as server:
        client = server.client()
        made = [client.make()]
        for jump in (3600, -3600, 86_400):
            set_offset(offset, jump)
            lease = client.acquire()
            began = time.monotonic()
            assert lease["release_in"] <= 0.3
            assert lease["expires_in"] > 200
            eventually(lambda: client.stats()["blocked"] == 0, "the release")
            assert time.monotonic() - began >= 0.3 - LATE
            made.append(client.make())
        created = [client.row(key["key"])["created_at"] for key in made]
        assert created == sorted(created)
        assert created[0][:10] == created[-1][:10] or created[0][:8] == created[-1][:8]


# ---------------------------------------------------------------------------------- many keys, at the start


def test_all_that_expired_during_a_stop_is_purged_on_disk(tmp_path: Path) -> None:
    """However many: a key that was told to be gone isn't brought back by a later --restart-grace."""
    path = tmp_path / "keypool.db"
    count = 20_000
    fill(path, [row(id, -10) for id in range(1, count + 1)])
    with durable_server(path) as server:
        client = server.client()
        eventually(lambda: client.stats()["total"] == 0, "an empty pool")
        client.get(f"{API}/keys/id:1").expect_problem(404, "unknown-key")
        assert client.stats()["expired"] == count
        server.signal(SIGTERM)
        server.wait()
    assert len(rows_in(path)) == 0
    with durable_server(path, "--restart-grace=100") as server:
        stats = server.client().stats()
        assert (stats["total"], stats["expired"]) == (0, count)


def test_keys_may_expire_while_the_server_starts(tmp_path: Path) -> None:
    """At any rate: some do at each moment of it."""
    path = tmp_path / "keypool.db"
    count = 60_000
    fill(path, [row(id, 20 * id / count) for id in range(1, count + 1)])
    with durable_server(path) as server:
        stats = server.client().stats()
        assert stats["generated"] - stats["expired"] == stats["total"] < count
        crash(server)


def test_a_large_pool_is_ready_with_all_of_it(tmp_path: Path) -> None:
    """More keys than fit into one slice, a part of them blocked; two starts, one after a kill."""
    path = tmp_path / "keypool.db"
    count = 30_000
    rows = [
        row(id, 3600, block=1800, lease=id, owner="me") if id % 10 == 0 else row(id, 3600)
        for id in range(1, count + 1)
    ]
    fill(path, rows)
    for _ in range(2):
        with durable_server(path) as server:
            client = server.client()
            stats = client.stats()
            assert (stats["total"], stats["blocked"]) == (count, count // 10)
            assert client.row(f"{10:020d}")["owner"] == "me"
            crash(server)


# -------------------------------------------------------------------------------------------------- backups


def _vacuum(path: Path, copy: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("VACUUM INTO ?", (str(copy),))


def _backup(path: Path, copy: Path) -> None:
    with (
        contextlib.closing(sqlite3.connect(path)) as database,
        contextlib.closing(sqlite3.connect(copy)) as to,
    ):
        database.backup(to, pages=20, sleep=0.001)


def _shell(command: str) -> Callable[[Path, Path], None]:
    """By the command that docs/operations.md gives, or another of the same program."""

    def run_shell(path: Path, copy: Path) -> None:
        if shutil.which("sqlite3") is None:
            pytest.skip("the program sqlite3 is not installed")
        subprocess.run(["sqlite3", str(path), command.format(copy=copy)], check=True, timeout=60)

    return run_shell


def keypool(*words: str, status: int = 0) -> str:
    """Run the command; its one line."""
    done = subprocess.run(
        [sys.executable, "-m", "keypool", *words],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == status, done
    [line] = (done.stderr if status else done.stdout).splitlines()
    return line


def _documented(path: Path, copy: Path) -> None:
    before = os.umask(0)
    try:
        line = keypool("backup", str(copy), f"--data={path}")
    finally:
        os.umask(before)
    assert re.fullmatch(rf"{copy} is whole: version \d+, \d+ keys, 1 blocked", line)
    assert keypool("verify", str(copy)) == line
    assert [each.name for each in copy.parent.iterdir()] == [copy.name], "something was left beside it"
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600


BACKUPS = {
    "keypool backup": _documented,
    "VACUUM INTO": _vacuum,
    "backup, page by page": _backup,
    "sqlite3 VACUUM INTO": _shell("VACUUM INTO '{copy}'"),
    "sqlite3 .backup": _shell(".backup '{copy}'"),
}


@pytest.mark.parametrize("how", BACKUPS)
def test_a_backup_under_load_restores(tmp_path: Path, how: str) -> None:
    """It holds at least what was told before it began, is sound, and nobody was refused meanwhile."""
    path, copy = tmp_path / "keypool.db", tmp_path / "restored" / "keypool.db"
    copy.parent.mkdir()
    with durable_server(path) as server:
        client = server.client()
        client.make_many(1000)
        lease = client.acquire(owner="me")
        with Load(server) as load:
            load.wait_for(50)
            told = set(load.told)
            BACKUPS[how](path, copy)
            load.wait_for(50)
        assert load.refused == 0
    with durable_server(copy) as server:
        client = server.client()
        assert told | set(range(1, 1001)) <= texts_of(client)
        assert client.row(lease["key"])["owner"] == "me"
        stats = client.stats()
        assert stats["generated"] == stats["total"]
        assert client.acquire()["lease"] == lease["lease"] + 1


def test_the_documented_backup_is_the_tested_one() -> None:
    """docs/operations.md names the commands, and Litestream."""
    text = (ROOT / "docs" / "operations.md").read_text()
    assert "\nkeypool backup backup.db " in text
    assert "\nkeypool verify backup.db " in text
    assert "litestream.io" in text


def test_a_backup_that_cannot_be_made_leaves_nothing(whole_file: Path, tmp_path: Path) -> None:
    """One line that says why: it replaces no file, copies no other program's, nor one that lacks its log."""
    copy = tmp_path / "copy"
    copy.write_text("mine")
    assert "replaces none" in keypool("backup", str(copy), f"--data={whole_file}", status=1)
    assert copy.read_text() == "mine"
    copy.unlink()
    assert "no data file" in keypool("backup", str(copy), f"--data={tmp_path / 'nothing'}", status=1)
    assert "--data=:memory:" in keypool("backup", str(copy), "--data=:memory:", status=2)
    (tmp_path / "other").write_text("hello")
    assert "can't be copied" in keypool("backup", str(copy), f"--data={tmp_path / 'other'}", status=1)
    bare = tmp_path / "bare"
    with durable_server(tmp_path / "keypool.db") as server:
        server.client().make()
        shutil.copyfile(tmp_path / "keypool.db", bare)
    assert "incomplete" in keypool("backup", str(copy), f"--data={bare}", status=1)
    assert "incomplete" in refused_start(bare)
    assert not copy.exists()
    assert not list(tmp_path.glob(".*"))


def test_verify_changes_nothing_and_finds_damage(whole_file: Path, tmp_path: Path) -> None:
    """Nor does it put anything beside the file."""
    path = tmp_path / "keypool.db"
    path.write_bytes(whole_file.read_bytes())
    path.chmod(0o644)
    assert f"{ROWS} keys" in keypool("verify", str(path))
    assert path.read_bytes() == whole_file.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    content = bytearray(whole_file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4096] = bytes(4096)
    path.write_bytes(content)
    assert "damaged" in keypool("verify", str(path), status=1)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
