"""The Valkey engine beyond the contract tests: partitions, several servers, crowds of overdue keys.

Time passes by making the pool older in Valkey (`age`), so no test waits for it. The rules themselves are in
test_valkey_rules.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections import Counter
from functools import partial
from typing import Any

import pytest
from engine_support import Call
from valkey_support import (
    Place,
    age,
    become,
    check,
    engine_on,
    eventually,
    expires_in,
    new_place,
    on_loop,
)
from valkeys import new_pool, shared_cluster

from keypool.core.answers import GeneratedKey, KeptAlive, Lease, Row, Unblock
from keypool.core.cursor import HolderQuery, ListQuery
from keypool.core.errors import NoKeyAvailable, PoolFull, StorageUnavailable, UnknownKey
from keypool.engine.valkey import link as valkey_link
from keypool.engine.valkey import poller
from keypool.engine.valkey.calls import ScriptCall
from keypool.engine.valkey.engine import ValkeyEngine
from keypool.engine.valkey.link import ConnectionLost
from keypool.engine.valkey.scripts import keys_of

BLOCK, KEEPALIVE = 60.0, 300.0


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Place:
    """See Place. On a busy machine a large batch may take longer than the silence that ends a connection."""
    monkeypatch.setattr(valkey_link, "SILENCE", 30.0)
    monkeypatch.setattr(valkey_link, "_CONNECT_SECONDS", 30.0)
    return new_place()


# ---------------------------------------------------------------------------------------------------- acquire


def deviations(counts: Counter[int], choices: int) -> float:
    """How far the counts are from equal, in standard deviations of the chi-squared distribution's cube root
    (Wilson and Hilferty's approximation). Over 5.5 is a chance of one in fifty million.
    """
    expected, freedom = counts.total() / choices, choices - 1
    found = sum((count - expected) ** 2 / expected for count in counts.values())
    found += (choices - len(counts)) * expected
    spread = 2 / (9 * freedom)
    return float(((found / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)


@on_loop
@pytest.mark.parametrize(("partitions", "keys"), [(16, 40), (64, 5), (1, 20), (5, 1)])
async def test_every_available_key_has_the_same_chance(place: Place, partitions: int, keys: int) -> None:
    """Over all partitions, even if most are empty, at little more than one script per acquire."""
    async with engine_on(place.url, partitions) as engine:
        made = [key.id for key in await engine.generate(keys)]
        await engine.stats()
        acquires, call = 0, engine._partitions.call

        def counted(partition: int, script: str, *words: Any) -> ScriptCall:
            nonlocal acquires
            acquires += script == "acquire"
            return call(partition, script, *words)

        engine._partitions.call = counted  # type: ignore[assignment]
        counts: Counter[int] = Counter()
        draws = 50 * keys
        for _ in range(draws):
            lease = await engine.acquire(None, 0)
            counts[lease.id] += 1
            await engine.unblock(lease.key, lease.lease)
        assert set(counts) == set(made)
        assert keys == 1 or deviations(counts, keys) < 5.5
        assert acquires <= 1.25 * draws


@partial(on_loop, within=300.0)
@pytest.mark.parametrize("draws", [2000, pytest.param(4000, marks=pytest.mark.thorough)])
async def test_servers_draw_from_the_same_keys_with_the_same_chance(place: Place, draws: int) -> None:
    """Although each learns late what the other has freed; also with half of the keys held, by changing holders."""
    url = place.url
    async with engine_on(url) as one, engine_on(url) as other:
        await one.generate(40)
        await other.stats()
        leases: list[Lease] = []
        for held in (0, 20):
            if held:
                leases += await other.acquire_many(None, held)
            counts: Counter[int] = Counter()
            for _ in range(draws):
                leases.append(await one.acquire(None, 0))
                counts[leases[-1].id] += 1
                back = leases.pop(random.randrange(len(leases)))
                await other.unblock(back.key, back.lease)
            assert deviations(counts, 40) < 5.5


@on_loop
async def test_the_last_key_is_found_whoever_freed_it(place: Place) -> None:
    """A server calls all partitions before it answers that no key is available."""
    url = place.url
    async with engine_on(url) as one, engine_on(url) as other:
        with pytest.raises(NoKeyAvailable):
            await other.acquire(None, 0)
        key = (await one.generate(1))[0].key
        for engine in (other, one, other, one):
            lease = await engine.acquire(None, 0)
            assert lease.key == key
            with pytest.raises(NoKeyAvailable) as refused:
                await (one if engine is other else other).acquire(None, 0)
            assert refused.value.retry_after == pytest.approx(60, abs=30)
            await engine.unblock(key, lease.lease)


@on_loop
async def test_lease_numbers_grow_over_servers_and_lost_writes(place: Place) -> None:
    """They follow the clock, so that none is repeated when a failover has lost the latest of them."""
    url = place.url
    last = 0
    async with engine_on(url) as one, engine_on(url) as other:
        await one.generate(20)
        for engine in (one, other) * 50:
            lease = await engine.acquire(None, 0)
            assert lease.lease > last
            last = lease.lease
            await other.unblock(lease.key, lease.lease)
    for partition in range(16):
        place.valkey.ask("HDEL", keys_of(place.pool, partition, 16)[0], "tick")
    async with engine_on(url) as third:
        assert (await third.acquire(None, 0)).lease > last


@on_loop
async def test_ids_and_leases_go_on_from_a_pool_that_was_moved_in(place: Place) -> None:
    """The pool stores where numbers continue; an id that was moved in is found in any partition."""
    url, pool = place.url, place.pool
    async with engine_on(url, 4) as engine:
        moved = (await engine.generate(1))[0]
        await engine.acquire(None, 0)
    base_id, base_tick = 26, 51  # 100 ids and 203 leases were given there
    place.valkey.ask("HSET", f"{{{pool}}}:pool", "base_id", base_id, "base_tick", base_tick)
    async with engine_on(url, 4) as engine:
        assert (await engine.get(moved.id)).id == moved.id
        new = await engine.generate(8)
        assert all(key.id > 4 * base_id for key in new)
        assert [(await engine.get(key.id)).id for key in new] == [key.id for key in new]
        with pytest.raises(UnknownKey):
            await engine.get(99)
        assert (await engine.acquire(None, 0)).lease > 4 * base_tick


@on_loop
async def test_a_pool_is_filled_to_its_last_key_and_no_further(place: Place) -> None:
    """Concurrent calls on one server generate as many keys as fit, each call all or none."""
    async with engine_on(place.url, max_keys=50) as engine:
        results = await asyncio.gather(*(engine.generate(4) for _ in range(30)), return_exceptions=True)
        made = [result for result in results if not isinstance(result, BaseException)]
        refused = [result for result in results if isinstance(result, PoolFull)]
        assert (len(made), len(refused)) == (12, 18)
        await engine.generate(2)
        with pytest.raises(PoolFull):
            await engine.generate(1)
        await engine.delete(made[0][0].key)
        await engine.generate(1)


@on_loop
async def test_servers_together_fill_a_pool_to_its_last_key_and_no_further(place: Place) -> None:
    """One at a time fills the last of it."""
    url = place.url
    async with engine_on(url, max_keys=50) as one, engine_on(url, max_keys=50) as other:
        calls = [engine.generate(3) for engine in (one, other) * 15]
        results = await asyncio.gather(*calls, return_exceptions=True)
        made = [result for result in results if not isinstance(result, BaseException)]
        assert len(made) == 16
        assert {type(result) for result in results if isinstance(result, BaseException)} == {PoolFull}
        assert (await one.stats()).total == 48


@on_loop
@pytest.mark.parametrize("partitions", [1, 4])
async def test_servers_that_know_nothing_of_each_other_do_not_overfill_a_pool(
    place: Place, partitions: int
) -> None:
    """Concurrent batches, all sent while each server assumes ample room: each is all or none."""

    async with contextlib.AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(engine_on(place.url, partitions, max_keys=20_000))
            for _ in range(3)
        ]
        for engine in engines:
            await engine.stats()
        calls = [engine.generate(1000) for engine in engines for _ in range(8)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        made = [result for result in results if not isinstance(result, BaseException)]
        refused = {type(result) for result in results if isinstance(result, BaseException)}
        assert refused == {PoolFull}
        await become(engines[0], "a refused batch leaves nothing behind", total=1000 * len(made))
        assert len(made) <= 20
        for _ in range(20 - len(made)):
            await engines[0].generate(1000)
        with pytest.raises(PoolFull):
            await engines[1].generate(1)


@on_loop
async def test_callers_who_hang_up_near_the_limit_do_not_stop_the_others(place: Place) -> None:
    """At any moment; and each batch is generated as a whole or not at all."""
    async with engine_on(place.url, max_keys=200) as engine:
        for turns in range(12):
            calls = [Call(engine.generate(3)) for _ in range(4)]
            for _ in range(turns):
                await asyncio.sleep(0)
            for call in calls[:3]:
                call.hang_up()
            await eventually(lambda: calls[3].over, "the last one has its keys")  # noqa: B023
            assert len(calls[3].answer) == 3
        async with asyncio.timeout(30):
            await engine.generate(2)
        assert (await engine.stats()).total % 3 == 2


@on_loop
async def test_a_restart_grace_keeps_the_keys_that_nobody_could_keep_alive(place: Place) -> None:
    """If no other server was there meanwhile; the others' deadlines stay."""
    url = place.url
    async with engine_on(url) as engine:
        late = [key.key for key in await engine.generate(700)]
    age(place.valkey, place.pool, 16, 250, unseen=True)
    async with engine_on(url) as engine:
        fresh = (await engine.generate(1))[0].key
    age(place.valkey, place.pool, 16, 100, unseen=True)
    async with engine_on(url, grace=30.0) as engine:
        assert await engine.keepalive_many(late[1:]) == ["done"] * 699
        assert (await engine.get(late[0])).expires_in == pytest.approx(30, abs=25)
        assert (await engine.get(fresh)).expires_in == pytest.approx(200, abs=25)
        check(place.valkey, place.pool, 16)
        async with engine_on(url, grace=250.0) as another:
            assert expires_in(await another.get(late[0])) < 31, "a server was there"


# ---------------------------------------------------------------------------------------------------- waiting


@on_loop
async def test_a_key_that_another_server_frees_goes_to_whoever_waits(place: Place) -> None:
    """To and fro between two servers."""
    url = place.url
    async with engine_on(url) as first, engine_on(url) as second:
        await first.generate(1)
        lease = await first.acquire(None, 0)
        for holder, other in [(first, second), (second, first)] * 20:
            waiting = asyncio.ensure_future(other.acquire("w", 30))
            waiters = other._waiters
            await eventually(partial(getattr, waiters, "announced"), "the pool knows")
            await holder.unblock(lease.key, lease.lease)
            lease = await waiting
        await become(first, "nobody waits", available=0, blocked=1, waiting=0)


@on_loop
async def test_no_key_is_held_by_two_over_three_servers(place: Place) -> None:
    """More workers than keys, some of which hang up. All get keys in turn."""
    url = place.url
    chance = random.Random(5)
    held: dict[int, int] = {}
    turns = Counter[int]()

    async def work(number: int, engine: ValkeyEngine) -> None:
        while turns[number] < 10:
            if chance.random() < 0.2:
                task = asyncio.ensure_future(engine.acquire("gone", 30))
                await asyncio.sleep(0.001)
                task.cancel()
                await asyncio.wait([task])
                if task.cancelled():
                    continue
                lease = task.result()
            else:
                lease = await engine.acquire(str(number), 30)
            assert lease.id not in held, f"{lease.id} is held by {held[lease.id]} and {number}"
            held[lease.id] = number
            await asyncio.sleep(0.001)
            del held[lease.id]
            assert (await engine.unblock(lease.key, lease.lease)).changed
            turns[number] += 1

    async with engine_on(url) as one, engine_on(url) as two, engine_on(url) as three:
        await one.generate(7)
        engines = (one, two, three)
        await asyncio.gather(*(work(number, engines[number % 3]) for number in range(30)))
        await become(one, "all keys are back", available=7)


@on_loop
async def test_waiting_counts_those_of_all_servers(place: Place) -> None:
    """And no longer those of one that is gone."""
    url = place.url
    async with engine_on(url) as one:
        async with engine_on(url) as other:
            calls = [asyncio.ensure_future(other.acquire(None, 30)) for _ in range(3)]
            calls.append(asyncio.ensure_future(one.acquire(None, 30)))
            for engine in (one, other):
                await become(engine, "both count four", waiting=4)
            other.drain()
            results = await asyncio.gather(*calls[:3], return_exceptions=True)
            assert {type(result).__name__ for result in results} == {"Draining"}
        await become(one, "only one waits", waiting=1)
        one.drain()
        await asyncio.gather(*calls, return_exceptions=True)


@on_loop
async def test_a_released_key_goes_to_whoever_waits(place: Place) -> None:
    """When its block runs out, however it was acquired."""
    url = place.url
    async with engine_on(url, block_seconds=0.2) as engine:
        made = (await engine.generate(1))[0]
        first = await engine.acquire(None, 0)
        second = await engine.acquire("w", 20)
        assert second.key == first.key == made.key
        assert second.lease > first.lease


@on_loop
@pytest.mark.parametrize("turns", range(6))
async def test_a_caller_who_hangs_up_is_leased_nothing(place: Place, turns: int) -> None:
    """At any moment: the key is available again at once, and the next waiter gets it."""
    async with engine_on(place.url, 2) as engine:
        await engine.generate(1)
        for wait in (0, 30):
            call = Call(engine.acquire("gone", wait))
            for _ in range(turns):
                await asyncio.sleep(0)
            if call.over:
                await engine.unblock(call.answer.key, call.answer.lease)
            call.hang_up()
            await become(engine, "the key is back", available=1)
            task = asyncio.ensure_future(engine.acquire("gone", wait))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                lease = task.result()
                await engine.unblock(lease.key, lease.lease)
            await become(engine, "the key is back", available=1)


@on_loop
async def test_a_waiter_gets_the_key_that_one_before_it_left(place: Place) -> None:
    """And is its owner."""
    async with engine_on(place.url) as engine:
        made = (await engine.generate(1))[0]
        held = await engine.acquire("first", 0)
        waiters = [Call(engine.acquire(name, 30)) for name in ("a", "b", "c")]
        last = asyncio.ensure_future(engine.acquire("d", 30))
        await eventually(lambda: len(engine._waiters) == 4, "four wait")
        await engine.unblock(held.key, held.lease)
        for waiter in waiters:
            waiter.hang_up()
        lease = await last
        assert lease.key == made.key

        async def named() -> bool:
            return (await engine.get(made.key)).owner == "d"

        await eventually(named, "it is the last one's")


@on_loop
async def test_behind_many_waiters_nobody_waits_longer_than_asked(place: Place) -> None:
    """Acquires with wait 0, with a short wait, and batches: they stand behind more than are served at once."""
    async with engine_on(place.url) as engine:
        waiting = [asyncio.ensure_future(engine.acquire(None, 300)) for _ in range(150)]
        await eventually(lambda: len(engine._waiters) == 150, "all wait")
        async with asyncio.timeout(30):
            for call in (engine.acquire(None, 0), engine.acquire(None, 0.1), engine.acquire_many(None, 5)):
                with pytest.raises(NoKeyAvailable):
                    await call
        assert not any(task.done() for task in waiting)
        engine.drain()
        await asyncio.gather(*waiting, return_exceptions=True)


@on_loop
async def test_an_acquire_without_wait_is_answered_while_waiters_are_served(place: Place) -> None:
    """In a busy pool it waits for one look at the partitions, not for every waiter ahead of it."""
    async with engine_on(place.url) as engine:
        await engine.generate(1)
        served = 0

        async def work() -> None:
            nonlocal served
            while True:
                lease = await engine.acquire(None, 300)
                served += 1
                await engine.unblock(lease.key, lease.lease)

        workers = [asyncio.ensure_future(work()) for _ in range(120)]
        await eventually(lambda: served > 50, "keys go round")
        for _ in range(5):
            before = served
            with contextlib.suppress(NoKeyAvailable):
                lease = await engine.acquire(None, 0)
                await engine.unblock(lease.key, lease.lease)
            assert served - before < 60
        for worker in workers:
            worker.cancel()
        await asyncio.wait(workers)


@on_loop
async def test_the_feed_names_the_owner_of_each_key_that_waiters_got(place: Place) -> None:
    """Also when many are served at once; and keys go to the first in the queue."""
    async with engine_on(place.url) as engine:
        await engine.generate(40)
        leases = await engine.acquire_many("before", 40)
        waiting = [asyncio.ensure_future(engine.acquire(f"w{number}", 60)) for number in range(60)]
        await eventually(lambda: len(engine._waiters) == 60, "all wait")
        await engine.unblock_many([Unblock(lease.key, lease.lease) for lease in leases])
        got = {lease.lease: f"w{n}" for n, lease in enumerate(await asyncio.gather(*waiting[:40]))}
        await engine.stats()
        events = [event for event in engine.recent(200) if event.event == "acquired"]
        assert {event.lease: event.owner for event in events if event.owner != "before"} == got
        assert list(got) == sorted(got), "leases grow in the order of the queue"
        engine.drain()
        await asyncio.gather(*waiting, return_exceptions=True)


@on_loop
async def test_an_acquire_whose_answer_was_lost_is_not_made_again_for_a_waiter(place: Place) -> None:
    """It may have served a key: the waiter gets 503, and no second key is taken for it."""
    async with engine_on(place.url) as engine:
        waiting = asyncio.ensure_future(engine.acquire("w", 30))
        await eventually(lambda: engine._waiters.announced, "the pool knows")
        replied = ScriptCall.replied

        def lose(call: ScriptCall, reply: Any) -> None:
            lost = call.script == "acquire" and type(reply) is list and len(reply) > 3
            replied(call, ConnectionLost("cut") if lost else reply)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ScriptCall, "replied", lose)
            await engine.generate(3)
            with pytest.raises(StorageUnavailable, match="not known"):
                await waiting
        stats = await engine.stats()
        assert (stats.acquired, stats.blocked) == (1, 1)


@on_loop
async def test_durations_are_as_of_the_answer_even_if_a_call_was_held(place: Place) -> None:
    """The time before the call was sent is not subtracted."""
    async with engine_on(place.url) as engine:
        key = (await engine.generate(1))[0].key
        await engine.acquire(None, 0)
        submit, loop = engine._client._submit, asyncio.get_running_loop()
        sent: list[float] = []

        def send(call: ScriptCall) -> None:
            sent.append(loop.time())
            submit(call)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine._client, "_submit", lambda call: loop.call_later(1.5, send, call))
            kept, made, page = await asyncio.gather(
                engine.keepalive(key), engine.generate(2), engine.page(ListQuery(order="expiry"))
            )
        since = loop.time() - sent[0]
        answers: list[Row | KeptAlive | GeneratedKey] = [kept, *made, page.keys[-1]]
        assert all(expires_in(one) > KEEPALIVE - since - 0.5 for one in answers)


# ------------------------------------------------------------------------------------------- sweeps and events


@on_loop
async def test_deadlines_are_swept_on_time_whichever_server_set_them(place: Place) -> None:
    """A server releases a key that another one leased, without any call."""
    url = place.url
    rules: dict[str, Any] = {"block_seconds": 0.3}
    async with engine_on(url, **rules) as sweeper, engine_on(url, **rules) as other:
        other._poller._stopped = True  # it sweeps nothing
        await other.generate(30)
        await other.acquire_many(None, 30)
        await eventually(lambda: [e for e in sweeper.recent(99) if e.event == "released"], "it is released")
        assert sweeper.histograms()["release_lateness_seconds"].count
        age(place.valkey, place.pool, 16, KEEPALIVE - 1)
        await eventually(lambda: [e for e in sweeper.recent(99) if e.event == "expired"], "it is purged")
        assert sweeper.histograms()["expiry_lateness_seconds"].count
        await become(other, "all are purged", total=0)


@on_loop
async def test_many_keys_that_expire_at_once_are_purged_in_slices(place: Place) -> None:
    """And never shown or leased meanwhile."""
    async with engine_on(place.url) as engine:
        for _ in range(5):
            await engine.generate(1000)
        age(place.valkey, place.pool, 16, 301)
        with pytest.raises(NoKeyAvailable):
            await engine.acquire(None, 0)
        assert (await engine.page(ListQuery())).keys == []
        await become(engine, "all are purged", total=0, expired=5000)
        check(place.valkey, place.pool, 16)


@on_loop
async def test_one_server_sweeps_and_another_stands_in_for_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So more servers cost few more polls, and no release is late when one dies."""
    url = place.url
    monkeypatch.setattr(poller, "_TURN_SECONDS", 60.0)  # on a busy machine the sweeper may be late
    rules: dict[str, Any] = {"block_seconds": 1.0, "keepalive_seconds": 60.0}
    async with contextlib.AsyncExitStack() as stack:
        engines = []
        for _ in range(4):
            engine = await stack.enter_async_context(engine_on(url, 1, **rules))
            await engine.stats()
            engines.append(engine)
        first, second, *others = engines
        await first.generate(300)
        before = [engine._poller.polls for engine in engines]
        for _ in range(200):
            await first.acquire(None, 0)
            await asyncio.sleep(0.005)
        await first.acquire_many(None, 50)  # on a busy machine these calls have released most of the others
        await eventually(
            lambda: first.histograms()["release_lateness_seconds"].count > 20, "they are released"
        )
        looks = [engine._poller.polls - was for engine, was in zip(engines, before, strict=True)]
        assert sum(looks[2:]) < looks[0] / 2, looks
        first._poller.stop()  # as if it had died
        known = second.histograms()["release_lateness_seconds"].count

        async def stood_in() -> bool:
            with contextlib.suppress(NoKeyAvailable):
                await first.acquire_many(None, 10)  # nobody else knows of these deadlines
            await asyncio.sleep(0.05)
            return second.histograms()["release_lateness_seconds"].count > known

        await eventually(stood_in, "it stands in")
        await become(others[1], "all are released", blocked=0)


def _tie(place: Place, partitions: int, moment: int) -> None:
    """Let all keys expire, and all blocked ones be released, at the same microsecond."""
    script = """
    for _, text in ipairs(redis.call('HKEYS', KEYS[2])) do
      local record = cmsgpack.unpack(redis.call('HGET', KEYS[2], text))
      record[4] = tonumber(ARGV[1])
      if record[5] ~= 0 then record[5] = record[4] end
      redis.call('HSET', KEYS[2], text, cmsgpack.pack(record))
      redis.call('ZADD', KEYS[3], record[5], text)
      redis.call('ZADD', KEYS[4], record[4], text)
    end
    """
    with place.valkey.commands() as commands:
        for partition in range(partitions):
            keys = keys_of(place.pool, partition, partitions)
            commands.ask("EVAL", script, len(keys), *keys, moment)


async def _walk(engine: ValkeyEngine, after: str | None = None, **query: Any) -> list[list[int]]:
    pages: list[list[int]] = []
    while not pages or after is not None:
        page = await engine.page(ListQuery(after=after, **query))
        pages.append([row.id for row in page.keys])
        after = page.next
    return pages


@on_loop
@pytest.mark.parametrize("partitions", [1, 16])
async def test_keys_with_the_same_deadline_are_all_listed(place: Place, partitions: int) -> None:
    """As in a pool that was moved in, whose deadlines are whole milliseconds."""
    async with engine_on(place.url, partitions) as engine:
        made = [*await engine.generate(1000), *await engine.generate(800)]
        blocked = {lease.id for _ in range(2) for lease in await engine.acquire_many(None, 700)}
        seconds, _ = place.valkey.ask("TIME")
        _tie(place, partitions, (int(seconds) + 100) * 1_000_000)
        shown = list(itertools.chain(*await _walk(engine, order="expiry", limit=137)))
        assert sorted(shown) == sorted(key.id for key in made)
        shown = list(itertools.chain(*await _walk(engine, order="release", limit=137)))
        assert sorted(shown) == sorted(blocked)
        # The key that a page ended with may be gone when the next one is asked for.
        page = await engine.page(ListQuery(order="expiry", limit=50))
        await engine.delete(page.keys[-1].id)
        shown = [row.id for row in page.keys]
        for rows in await _walk(engine, page.next, order="expiry", limit=500):
            shown += rows
        assert {key.id for key in made} <= set(shown)


@on_loop
async def test_a_page_costs_its_rows_and_not_as_many_of_every_partition(place: Place) -> None:
    """And is full all the same."""
    async with engine_on(place.url, 64) as engine:
        for _ in range(3):
            await engine.generate(1000)
        await engine.acquire_many(None, 900)

        def read() -> int:
            words = place.valkey.ask("INFO", "commandstats").decode().split()
            return next(int(w.split("calls=")[1].split(",")[0]) for w in words if "cmdstat_hget:" in w)

        for query in ({}, {"order": "expiry"}, {"order": "release"}):
            before = read()
            pages = await _walk(engine, limit=300, **query)
            assert {len(page) for page in pages[:-1]} == {300}
            assert read() - before < 4 * sum(map(len, pages))


@on_loop
async def test_keys_whose_records_valkey_evicted_are_purged_when_met(place: Place) -> None:
    """No call fails because of a missing record."""
    pool = place.pool
    async with engine_on(place.url, 2) as engine:
        made = await engine.generate(60)
        leases = await engine.acquire_many(None, 20)
        records = keys_of(pool, 0, 2)[1]
        lost = {text.decode() for text in place.valkey.ask("HKEYS", records)}
        assert 0 < len(lost) < 60
        place.valkey.ask("DEL", records)
        assert {row.id for row in (await engine.page(ListQuery(limit=500))).keys} == {
            key.id for key in made if key.key not in lost
        }
        with pytest.raises(UnknownKey):
            await engine.get(next(iter(lost)))
        with pytest.raises(UnknownKey):
            await engine.unblock(next(iter(lost)), None)
        served = await engine.acquire_many(None, 100)
        held = {lease.key for lease in (*leases, *served)}
        assert {lease.key for lease in served}.isdisjoint(lost)
        assert held | lost == {key.key for key in made}
        age(place.valkey, pool, 2, 61)
        for number, text in enumerate(sorted(lost & held)):  # known by the sets alone, and overdue
            place.valkey.ask("ZADD", keys_of(pool, 0, 2)[2 + number % 2], "XX", 1, text)
        rest = 60 - len(lost)
        await become(engine, "the lost ones are purged", total=rest, available=rest)
        assert (await engine.owners(HolderQuery())).owners == []
        check(place.valkey, pool, 2)


@on_loop
async def test_every_server_gets_the_events_of_all_servers(place: Place) -> None:
    """With owner, lease and hint, in order, and each once; the counters are the pool's."""
    url = place.url
    async with engine_on(url) as one, engine_on(url) as other:
        key = (await one.generate(1))[0]
        lease = await other.acquire("w", 0)
        await one.unblock(key.key, lease.lease)
        await other.reveal(key.id)
        await one.delete(key.key)
        wanted = ["generated", "acquired", "unblocked", "revealed", "deleted"]
        for engine in (one, other):
            stats = await engine.stats()
            events = engine.recent(50)
            assert [event.event for event in events] == wanted
            assert [event.owner for event in events] == [None, "w", "w", None, None]
            assert {event.hint for event in events} == {f"{key.key[:4]}…{key.key[-4:]}"}
            assert engine.event_seq == len(wanted)
            assert (stats.generated, stats.acquired, stats.unblocked, stats.deleted) == (1, 1, 1, 1)
            await engine.stats()
            assert engine.event_seq == len(engine.recent(99)) == len(wanted)


@on_loop
async def test_a_new_server_knows_the_latest_events(place: Place) -> None:
    """Those from before it started."""
    url = place.url
    async with engine_on(url) as one:
        await one.generate(100)
    async with engine_on(url) as other:
        await other.stats()
        assert len(other.recent(50)) == 50
        assert len(other.recent(1000)) == 100


@on_loop
async def test_refusals_are_counted_for_all_servers(place: Place) -> None:
    """Also those of a server that stops."""
    async with engine_on(place.url) as one:
        for _ in range(5):
            with pytest.raises(NoKeyAvailable):
                await one.acquire(None, 0)
    async with engine_on(place.url) as other:
        assert (await other.stats()).refused == 5


@on_loop
async def test_a_cluster_serves_every_partition_from_its_node() -> None:
    """Keys, pages and counts over three nodes, none of which has all."""
    cluster = shared_cluster()
    async with engine_on(new_pool(cluster)) as engine:
        made = [key.key for key in await engine.generate(300)]
        assert len(set(map(engine._client.node_of, range(16)))) == 3
        assert all(node.ask("DBSIZE") for node in cluster.nodes)
        leases = await engine.acquire_many("w", 500)
        assert sorted(lease.key for lease in leases) == sorted(made)
        rows = (await engine.page(ListQuery(limit=500))).keys
        assert [row.id for row in rows] == sorted(lease.id for lease in leases)
