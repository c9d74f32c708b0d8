"""What the Valkey engine adds to the rules of leases: several servers and partitions, older pools, moves."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from engine_support import Call, turns_until
from valkey_support import Place, become, check, engine_on, eventually, new_place, on_loop

from keypool.core.answers import Lease, Unblock
from keypool.core.cursor import ListQuery
from keypool.core.errors import NoKeyAvailable, StartError, Superseded
from keypool.core.events import By, Change, Event, Origin
from keypool.core.handles import Handle
from keypool.core.keys import State
from keypool.core.outcomes import Outcome, Report
from keypool.engine.migrate.moving import FileSource, FileTarget, move
from keypool.engine.migrate.moving_valkey import ValkeyPlace
from keypool.engine.valkey import attempts as valkey_attempts
from keypool.engine.valkey import link as valkey_link
from keypool.engine.valkey.engine import ValkeyEngine
from keypool.engine.valkey.opening import LAYOUT
from keypool.engine.valkey.scripts import keys_of
from keypool.engine.waiters import Request

ADMIN = Origin(By.OPERATOR, "night")


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Place:
    """See Place. On a busy machine a large batch may take longer than the silence that ends a connection."""
    monkeypatch.setattr(valkey_link, "SILENCE", 30.0)
    return new_place()


class Attempted:
    """An attempt, as the API makes it."""

    def __init__(self, number: int = 0) -> None:
        self.digest = bytes([200 + number]) * 16
        self.replayed = False


def acquire(engine: ValkeyEngine, wait: float, number: int = 0) -> asyncio.Task[Lease]:
    """An acquire on its way, of one attempt."""
    return asyncio.ensure_future(engine.acquire(None, wait, None, None, Attempted(number)))


# ---------------------------------------------------------------------------------------------------- attempts


@on_loop
@pytest.mark.parametrize("partitions", [1, 16])
async def test_an_attempt_has_one_lease_however_often_and_wherever_it_is_made(
    place: Place, partitions: int
) -> None:
    """At the same moment at three servers, too. When the lease is over, a repeat gets a new one."""
    async with (
        engine_on(place.url, partitions) as one,
        engine_on(place.url, partitions) as two,
        engine_on(place.url, partitions) as three,
    ):
        await one.generate(40)
        for engine in (one, two, three):
            await engine.stats()
        leases = await asyncio.gather(*(acquire(engine, 0) for engine in (one, two, three) * 5))
        assert {lease.lease for lease in leases} == {leases[0].lease}
        assert {lease.handle for lease in leases} == {leases[0].handle}
        attempt = Attempted()
        await two.acquire(None, 0, None, None, attempt)
        assert attempt.replayed
        assert (await one.stats()).acquired == 1
        await three.unblock(leases[0].key, leases[0].lease)
        after = Attempted()
        again = await two.acquire(None, 0, None, None, after)
        assert not after.replayed
        assert again.lease > leases[0].lease
        check(place.valkey, place.pool, partitions)


@on_loop
@pytest.mark.parametrize("partitions", [1, 16])
async def test_the_repeat_of_a_batch_gets_those_of_its_leases_that_are_still_held(
    place: Place, partitions: int
) -> None:
    """In order, and no others. When none is held any more, it is a new acquire."""
    async with engine_on(place.url, partitions) as one, engine_on(place.url, partitions) as two:
        await one.generate(60)
        attempt = Attempted()
        leases = await one.acquire_many("ann", 20, None, attempt)
        assert (len(leases), attempt.replayed) == (20, False)
        await two.unblock_many([Unblock(lease.key, lease.lease) for lease in leases[::2]])
        held = await two.acquire_many("ann", 20, None, attempt)
        assert attempt.replayed
        assert [lease.lease for lease in held] == [lease.lease for lease in leases[1::2]]
        await two.unblock_many([Unblock(lease.key) for lease in held])
        fresh = await one.acquire_many("ann", 20, None, attempt)
        assert (len(fresh), attempt.replayed) == (20, False)
        assert min(lease.lease for lease in fresh) > leases[-1].lease


@on_loop
async def test_a_lease_that_a_crash_left_behind_is_found_by_the_repeat(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server died after the acquire and before the answer, so nobody has given the claim up: it lapses."""
    monkeypatch.setattr(valkey_attempts, "_CLAIM_SECONDS", 0.3)
    async with engine_on(place.url) as one, engine_on(place.url) as two:
        await one.generate(40)
        monkeypatch.setattr(one._sampler.attempts, "end", lambda *words: None)
        lost = await acquire(one, 0)
        assert (await acquire(two, 0)).lease == lost.lease
        assert (await acquire(two, 0)).lease == lost.lease


@on_loop
async def test_an_attempt_is_known_as_long_as_its_extended_lease(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pool with several partitions, which forgets attempts whose leases are over."""
    monkeypatch.setattr(valkey_attempts, "_MARGIN", 0.0)
    async with engine_on(place.url, block_seconds=1.0, max_block_seconds=100.0) as engine:
        await engine.generate(40)

        async def extended() -> Lease:
            lease = await acquire(engine, 0)
            await engine.extend(lease.key, lease.lease, 90)  # LeaseOver, if that took longer than its block
            return lease

        lease = await eventually(extended, "a lease is extended")
        other = await acquire(engine, 0, 1)
        known = engine._sampler.attempts
        assert known is not None
        await become(engine, "one is over", blocked=1)

        async def forgotten() -> bool:
            return not await known.is_known(Attempted(1).digest)

        await eventually(forgotten, "the attempt whose lease is over is forgotten")
        assert (await acquire(engine, 0)).lease == lease.lease
        assert (await acquire(engine, 0, 1)).lease > other.lease


@on_loop
@pytest.mark.parametrize("partitions", [1, 16])
async def test_a_caller_who_hangs_up_leaves_the_lease_that_its_attempt_got_elsewhere(
    place: Place, partitions: int
) -> None:
    """The lease was given twice, so the one who hangs up can't take it back from the other; else it is given back."""
    async with engine_on(place.url, partitions) as one, engine_on(place.url, partitions) as two:
        await one.generate(5)
        lease = await acquire(one, 0)
        assert (await acquire(two, 0)).lease == lease.lease
        one._sampler.give_back(lease)
        alone = await acquire(one, 0, 1)
        one._sampler.give_back(alone)
        await become(one, "one is given back", blocked=1)
        assert (await one.get(lease.id)).state is State.BLOCKED


# ----------------------------------------------------------------------------------------------------- waiters


@on_loop
@pytest.mark.parametrize("partitions", [1, 16])
async def test_the_repeat_of_a_waiting_attempt_takes_its_place(place: Place, partitions: int) -> None:
    """The first is superseded, and those behind it stay behind."""
    async with engine_on(place.url, partitions) as engine:
        made = await engine.generate(1)
        await engine.acquire("holder", 0)
        first = acquire(engine, 30)
        await eventually(lambda: len(engine._waiters) == 1, "it waits")
        behind = acquire(engine, 30, 1)
        await eventually(lambda: len(engine._waiters) == 2, "the other waits")
        repeat = acquire(engine, 30)
        with pytest.raises(Superseded):
            await first
        assert len(engine._waiters) == 2
        await engine.unblock(made[0].key, None)
        assert (await repeat).key == made[0].key
        assert not behind.done()
        await engine.unblock(made[0].key, None)
        await behind


@on_loop
async def test_a_place_in_the_queue_is_kept_after_a_404(place: Place) -> None:
    """For the same attempt, if it waited; so asking again and again waits as fairly as waiting once."""
    async with engine_on(place.url, 1) as engine:
        made = await engine.generate(1)
        await engine.acquire("holder", 0)
        with pytest.raises(NoKeyAvailable):
            await acquire(engine, 0.05)
        other = acquire(engine, 30, 1)
        await eventually(lambda: len(engine._waiters) == 1, "the other waits")
        with pytest.raises(NoKeyAvailable):
            await acquire(engine, 0, 2)  # it didn't wait, so it has no place
        again, late = acquire(engine, 30), acquire(engine, 30, 2)
        await eventually(lambda: len(engine._waiters) == 3, "all wait")
        order = []
        for waiting in (again, other, late):
            await engine.unblock(made[0].key, None)
            order.append(await waiting)
        assert [lease.lease for lease in order] == sorted(lease.lease for lease in order)


@on_loop
@pytest.mark.parametrize("partitions", [1, 16])
async def test_an_attempt_that_waits_at_two_servers_gets_one_lease(place: Place, partitions: int) -> None:
    """Whoever is served first, the other one gets the same as soon as it is its turn."""
    async with engine_on(place.url, partitions) as one, engine_on(place.url, partitions) as two:
        made = await one.generate(2)
        await one.acquire_many("holder", 2)
        both = [acquire(one, 30), acquire(two, 30)]
        await eventually(lambda: one._waiters.announced and two._waiters.announced, "both wait")
        await one.unblock_many([Unblock(key.key) for key in made])
        leases = await asyncio.gather(*both)
        assert leases[0].lease == leases[1].lease
        assert (await one.stats()).acquired == 3
        assert sorted(type(lease).__name__ for lease in leases) == ["Lease", "RepeatedLease"]


@on_loop
async def test_a_lease_for_a_waiter_that_was_superseded_meanwhile_goes_to_the_repeat(place: Place) -> None:
    """While the script was under way."""
    async with engine_on(place.url, 1) as engine:
        await engine.generate(1)
        held = await engine.acquire("holder", 0)
        take = engine._sampler.take_in_order
        repeats: list[asyncio.Task[Lease]] = []

        async def taken(requests: Any, poll: bool) -> Any:
            done = await take(requests, poll)
            if done and not repeats:
                repeats.append(acquire(engine, 30))
                await turns_until(lambda: len(engine._waiters) and first.done(), "it is superseded")
            return done

        async def none_yet(attempt: bytes) -> list[Lease]:
            return []

        # Before anybody waits: a look that is under way goes on with what it began with.
        engine._sampler.take_in_order = taken  # type: ignore[method-assign]
        first = acquire(engine, 30)
        await eventually(lambda: engine._waiters.announced, "it waits")
        engine._sampler.held = none_yet  # type: ignore[method-assign]
        await engine.unblock(held.key, held.lease)
        with pytest.raises(Superseded):
            await first
        assert (await repeats[0]).key == held.key
        assert (await engine.stats()).acquired == 2


# -------------------------------------------------------------------------------------------------- deadlines


@on_loop
@pytest.mark.parametrize("partitions", [1, 4])
async def test_a_short_cooldown_ends_on_time_whichever_server_set_it(place: Place, partitions: int) -> None:
    """The server that sweeps the partition learns of it too late, so the one that set it looks itself."""
    async with engine_on(place.url, partitions) as one, engine_on(place.url, partitions) as two:
        await one.generate(20)
        await two.stats()
        for engine in (one, two):
            engine._poller._interval = 1000.0
            engine._poller._due = [asyncio.get_running_loop().time() + 1000] * partitions
        lease = await two.acquire(None, 0)
        await two.unblock(lease.key, lease.lease, report=Report(Outcome.RATE_LIMITED, 0.3))

        def ready() -> list[Event]:
            return [event for event in two.recent(1000) if event.event is Change.READY]

        await eventually(ready, "its end was noticed without a call")
        assert [(event.id, event.by, event.actor) for event in ready()] == [(lease.id, By.DEADLINE, None)]


# ------------------------------------------------------------------------------------------------------- guard


@on_loop
@pytest.mark.parametrize("partitions", [1, 16])
async def test_the_guard_holds_over_all_partitions(place: Place, partitions: int) -> None:
    """In one batch, and by another server that has looked since."""
    async with (
        engine_on(place.url, partitions, max_quarantined_percent=30.0) as one,
        engine_on(place.url, partitions, max_quarantined_percent=30.0) as two,
    ):
        await one.generate(100)
        await one.stats()
        leases = await one.acquire_many(None, 60)
        report = Report(Outcome.INVALID, None, "revoked")
        await one.unblock_many([Unblock(lease.key, lease.lease, report) for lease in leases[:50]])
        await become(two, "three tenths", quarantined=30, cooling=20)
        asked = time.monotonic()
        answer = await two.unblock(leases[50].key, leases[50].lease, report=report)
        took = time.monotonic() - asked
        assert (answer.state, answer.guarded) == (State.COOLING, True)
        assert answer.available_in is not None
        assert 60 - took - 0.01 <= answer.available_in <= 60
        await two.restore(next(iter((await one.page(ListQuery(state="quarantined"))).keys)).id, ADMIN)
        await two.stats()
        answer = await two.unblock(leases[51].key, leases[51].lease, report=report)
        assert (answer.state, answer.guarded) == (State.QUARANTINED, False)
        check(place.valkey, place.pool, partitions)


# ----------------------------------------------------------------------------------------------- the last key


@on_loop
@pytest.mark.parametrize("partitions", [1, 4])
async def test_an_acquire_goes_on_as_long_as_others_are_merely_faster(place: Place, partitions: int) -> None:
    """It is refused only when no partition has a key, not after so many rounds in which others got the key."""
    async with engine_on(place.url, partitions) as one, engine_on(place.url, partitions) as two:
        await two.generate(1)
        await one.stats()
        call, rounds = one._partitions.call, itertools.count()

        def stolen(partition: int, script: str, *words: Any) -> Any:
            if script == "acquire" and next(rounds) < 20:
                return asyncio.ensure_future(void())
            return call(partition, script, *words)

        async def void() -> Any:
            return [0, 0]

        def leases_in(call: Any) -> list[Lease]:
            return [] if call.result() == [0, 0] else leases(call)

        leases = one._sampler._leases_in
        one._partitions.call = stolen  # type: ignore[assignment]
        one._sampler._leases_in = leases_in  # type: ignore[method-assign]
        assert await one._sampler.take(Request(None), 1)
        assert next(rounds) > 20


# ------------------------------------------------------------------------------------------------ older pools

_OLDER = """
for _, text in ipairs(redis.call('HKEYS', KEYS[2])) do
  local record = cmsgpack.unpack(redis.call('HGET', KEYS[2], text))
  local older = {record[1], record[2], record[3], record[4], record[5]}
  if record[6] then older[6] = record[6] end
  redis.call('HSET', KEYS[2], text, cmsgpack.pack(older))
end
for place, event in ipairs(redis.call('LRANGE', KEYS[7], 0, -1)) do
  local parts = cmsgpack.unpack(event)
  table.remove(parts, 7)
  redis.call('LSET', KEYS[7], place - 1, cmsgpack.pack(parts))
end
"""


async def older_pool(place: Place, partitions: int, layout: int = 1) -> tuple[Lease, Lease]:
    """A pool as an older version wrote it, with two of its three keys held."""
    async with engine_on(place.url, partitions) as engine:
        await engine.generate(3)
        leases = await engine.acquire_many("ann", 2)
    with place.valkey.commands() as commands:
        commands.ask("HSET", f"{{{place.pool}}}:pool", "layout", layout)
        if layout == 1:
            for partition in range(partitions):
                keys = keys_of(place.pool, partition, partitions)
                commands.ask("EVAL", _OLDER, len(keys), *keys)
            commands.ask("HDEL", f"{{{place.pool}}}:pool", "secret")
    return leases[0], leases[1]


@on_loop
@pytest.mark.parametrize(("partitions", "layout"), [(1, 1), (4, 1), (1, 2), (1, 3)])
async def test_a_pool_of_an_older_version_is_served_as_it_is(
    place: Place, partitions: int, layout: int
) -> None:
    """Leases go on, and can be reported on and extended; its events are there."""
    one, other = await older_pool(place, partitions, layout)
    async with engine_on(place.url, partitions, max_block_seconds=100.0) as engine:
        await become(engine, "all are there", total=3, blocked=2, available=1)
        extended = await engine.extend(Handle(one.id, one.lease), one.lease, 1000)
        assert extended.release_in == extended.block_left == pytest.approx(100, abs=30)
        answer = await engine.unblock(other.key, other.lease, report=Report(Outcome.INVALID))
        assert (answer.state, answer.changed) == (State.QUARANTINED, True)
        acquired = [event for event in engine.recent(100) if event.event is Change.ACQUIRED]
        assert [(event.owner, event.by) for event in acquired] == [("ann", By.HOLDER)] * 2
        lease = await engine.acquire("bob", 0)
        handle = engine.handles.read(lease.handle)
        assert handle == Handle(lease.id, lease.lease)
        check(place.valkey, place.pool, partitions)
    async with engine_on(place.url, partitions, max_block_seconds=100.0) as engine:
        assert engine.handles.read(lease.handle) == handle, "the secret is kept"


@on_loop
async def test_a_pool_that_servers_of_the_version_before_serve_is_refused(place: Place) -> None:
    """In one line that says what to do. One that was killed counts for 5 s only."""
    await older_pool(place, 1)
    servers = f"{{{place.pool}}}:servers"

    async def heartbeats() -> None:
        while True:
            seconds, microseconds = place.valkey.ask("TIME")
            place.valkey.ask("ZADD", servers, int(seconds) * 1_000_000 + int(microseconds), "older")
            await asyncio.sleep(0.1)

    older = asyncio.ensure_future(heartbeats())
    try:
        await turns_until(lambda: place.valkey.ask("ZCARD", servers), "it serves")
        with pytest.raises(StartError, match="older version"):
            async with engine_on(place.url, 1):
                pass
    finally:
        older.cancel()
    assert place.valkey.ask("HGET", f"{{{place.pool}}}:pool", "layout") == b"1"
    async with engine_on(place.url, 1) as engine:
        await become(engine, "it is served", total=3)


@pytest.mark.parametrize("layout", [1, 2, 3])
@on_loop
async def test_a_server_of_an_older_version_takes_it_for_another_pool(place: Place, layout: int) -> None:
    """One that opened the pool before it was brought up, and was away meanwhile: its heartbeat finds another pool."""
    await older_pool(place, 1, layout)
    facts = f"{{{place.pool}}}:pool"
    before = place.valkey.ask("HGET", facts, "born")
    async with engine_on(place.url, 1):
        assert place.valkey.ask("HGET", facts, "born") != before
        assert place.valkey.ask("HGET", facts, "layout") == str(LAYOUT).encode()


# ---------------------------------------------------------------------------------------------------- settings


@on_loop
async def test_servers_of_a_pool_have_the_same_rules_of_outcomes(place: Place) -> None:
    """A server with another one is refused, with its name."""
    async with engine_on(place.url, 1):
        others: dict[str, Any] = {"cooldown_seconds": 61.0, "rest_seconds": 1.0, "max_block_seconds": 61.0}
        for name, value in others.items():
            with pytest.raises(StartError, match=name):
                async with engine_on(place.url, 1, **{name: value}):
                    pass


# ------------------------------------------------------------------------------------------------------- moves


async def _in_every_state(engine: ValkeyEngine) -> dict[str, Lease]:
    """A pool with keys in every state; the lease of each."""
    await engine.generate(8)
    names = ("held", "extended", "cooling", "quarantined", "pending", "reported", "attempt", "available")
    leases = {}
    for name in names:
        attempt = Attempted() if name == "attempt" else None
        leases[name] = await engine.acquire(name, 0, None, 50.0, attempt)
    by = leases.items()
    for name, lease in by:
        if name == "extended":
            await engine.extend(lease.key, lease.lease, 80)
        if name == "cooling":
            await engine.unblock(lease.key, lease.lease, report=Report(Outcome.RATE_LIMITED, 500.25, "Größe"))
        if name == "quarantined":
            await engine.unblock(lease.key, lease.lease, report=Report(Outcome.INVALID, None, "revoked"))
            await engine.quarantine(lease.id, "by hand", False, ADMIN)
        if name == "pending":
            await engine.quarantine(lease.id, None, False, ADMIN)
        if name == "reported":
            await engine.unblock(lease.key, lease.lease, report=Report(Outcome.ERROR))
        if name == "available":
            await engine.unblock(lease.key, lease.lease)
    return leases


async def _rows(engine: ValkeyEngine) -> list[dict[str, Any]]:
    """All rows, with moments in place of lengths of time, as far as those can be told to a second."""
    while True:
        asked = time.time()
        rows = (await engine.page(ListQuery(limit=500))).keys
        if (now := time.time()) < asked + 1:
            break
    found = []
    for row in rows:
        named = msgspec.structs.asdict(row)
        lengths = [named.pop(name) for name in ("expires_in", "release_in", "available_in")]
        found.append(named | {"ends": [0 if length is None else now + length for length in lengths]})
    return found


@on_loop
@pytest.mark.parametrize(("here", "there"), [(1, 4), (4, 1), (3, 5)])
async def test_a_move_keeps_states_reports_attempts_and_handles(
    place: Place, tmp_path: Path, here: int, there: int
) -> None:
    """To a file, and from there to a pool with another number of partitions."""
    rules: dict[str, Any] = {"max_block_seconds": 100.0}
    async with engine_on(place.url, here, **rules) as engine:
        leases = await _in_every_state(engine)
        rows = await _rows(engine)
    path, other = tmp_path / "keypool.db", new_place()
    for source, target in (
        (lambda: ValkeyPlace.source(place.url), lambda: _made(FileTarget(path))),
        (lambda: _made(FileSource(path)), lambda: ValkeyPlace.target(other.url, there, clear=False)),
    ):
        opened, filled = await source(), await target()
        try:
            moved = await move(opened, filled, lambda done: None)
        finally:
            await filled.close()
            await opened.close()
        assert moved.keys == 8
    async with engine_on(other.url, there, **rules) as engine:
        for row, before in zip(await _rows(engine), rows, strict=True):
            assert row == before | {"ends": pytest.approx(before["ends"], abs=5)}
        check(other.valkey, other.pool, there)
        for lease in leases.values():
            assert engine.handles.read(lease.handle) == Handle(lease.id, lease.lease)
            assert (await engine.get(Handle(lease.id, lease.lease))).id == lease.id
        attempt = Attempted()
        assert (await engine.acquire("attempt", 0, None, 50.0, attempt)).lease == leases["attempt"].lease
        assert attempt.replayed
        extended = await engine.extend(leases["extended"].key, leases["extended"].lease, 1000)
        assert extended.block_left < 100
        reported = leases["reported"]
        assert not (await engine.unblock(reported.id, reported.lease, report=Report(Outcome.OK))).changed
        pending = leases["pending"]
        answer = await engine.unblock(pending.id, pending.lease)
        assert (answer.state, answer.changed) == (State.QUARANTINED, True)


async def _made(end: Any) -> Any:
    return end


@on_loop
async def test_a_call_by_a_handle_is_one_script(place: Place) -> None:
    """A handle holds the id, by which the script finds the key itself."""
    async with engine_on(place.url) as engine:
        await engine.generate(20)
        lease = await engine.acquire(None, 0)
        scripts: list[str] = []
        call = engine._partitions.call

        def counted(partition: int, script: str, *words: Any) -> Any:
            scripts.append(script)
            return call(partition, script, *words)

        engine._partitions.call = counted  # type: ignore[assignment]
        await engine.unblock(Handle(lease.id, lease.lease), lease.lease)
        assert scripts == ["unblock"]
        call_made: Call[Any] = Call(engine.keepalive(Handle(lease.id, lease.lease)))
        await turns_until(lambda: call_made.over, "it is answered")
        assert call_made.answer.id == lease.id
