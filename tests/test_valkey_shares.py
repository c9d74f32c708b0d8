"""Shares over Valkey: a named token holds so many leases at most, over all pools and servers.

What a share is to its client is told in test_shares.py; here it is what several servers make of it.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from valkey_support import Place, eventually, new_place, on_loop, pools_on
from valkeys import new_pool, shared_cluster

from keypool.core.answers import Lease
from keypool.core.errors import NoKeyAvailable, ShareSpent
from keypool.core.events import By, Origin
from keypool.engine import Client
from keypool.engine.valkey.engine import ValkeyEngine

ADMIN = Origin(By.OPERATOR, "ops")
ANN = Client("ann", 2)


class Attempt:
    """An acquire that is repeated."""

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.replayed = False


@pytest.fixture
def place() -> Place:
    """A Valkey in which there is no pool yet."""
    return new_place()


def held(place: Place, client: str = "ann") -> int:
    """How many reservations a client has."""
    found = place.valkey.ask("ZCARD", f"{{{place.pool}/shares:0}}:share:{client}")
    assert isinstance(found, int)
    return found


async def spent(engine: ValkeyEngine, client: Client = ANN) -> ShareSpent:
    with pytest.raises(ShareSpent) as refused:
        await engine.acquire(None, 0, client=client)
    return refused.value


@pytest.mark.parametrize("partitions", [1, 4])
@on_loop
async def test_a_share_holds_over_pools_and_servers(place: Place, partitions: int) -> None:
    """Whoever serves it; others aren't affected, and room is room at once."""
    async with pools_on(place.url, partitions) as one, pools_on(place.url, partitions) as two:
        await one.put("b", {"block_seconds": 40.0}, ADMIN)
        b = one.get("b")
        await one.default.generate(10)
        await b.generate(10)
        first = await two.default.acquire(None, 0, client=ANN)
        second = await b.acquire(None, 0, client=ANN)
        for engine in (one.default, two.default, b):
            assert 20 < (await spent(engine)).retry_after <= 40
            await engine.acquire(None, 0)
            await engine.acquire(None, 0, client=Client("bob"))
        with pytest.raises(ShareSpent):
            await b.acquire_many(None, 5, client=ANN)
        await one.default.unblock(first.key, first.lease)
        assert len(await two.default.acquire_many(None, 5, client=ANN)) == 1
        await eventually(lambda: "b" in two.names(), "the pool is found")
        await two.get("b").delete(second.key)
        await b.acquire(None, 0, client=ANN)
        await spent(two.default)
        assert held(place) == 2
        assert [await pools.held(ANN) for pools in (one, two)] == [2, 2]
        assert await one.held(Client("nobody", 3)) == 0
        assert await one.held(Client("bob")) is None, "what has no limit isn't counted"


@on_loop
async def test_whatever_ends_a_lease_makes_room(place: Place) -> None:
    """Its deadline, an operator, a delete, a hang-up, the end of its pool; an extension takes room for longer."""
    async with pools_on(place.url, 2, block_seconds=4.0, max_block_seconds=90.0) as pools:
        engine = pools.default
        await engine.generate(10)
        lease, other = await engine.acquire_many(None, 2, client=ANN)
        await engine.extend(lease.key, lease.lease, 60)
        assert (await spent(engine)).retry_after <= 4
        await eventually(lambda: held(place) == 1, "the other one's deadline passes")
        other = await engine.acquire(None, 0, block_seconds=60, client=ANN)
        assert (await spent(engine)).retry_after > 20, "it goes by the extended lease"
        await engine.quarantine(other.key, None, now=True, origin=ADMIN)
        await engine.delete(lease.key)
        await eventually(lambda: held(place) == 0, "both are over")
        waiting = asyncio.ensure_future(engine.acquire(None, 0, client=ANN))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        await eventually(lambda: held(place) == 0, "nobody holds it")
        await pools.put("b", {}, ADMIN)
        await pools.get("b").generate(2)
        await pools.get("b").acquire_many(None, 2, client=ANN)
        await spent(engine)
        await pools.delete("b", drain=True, now=True, origin=ADMIN)
        await eventually(lambda: held(place) == 0, "the pool's leases are over")


@on_loop
async def test_what_a_dead_server_has_reserved_lapses(place: Place) -> None:
    """A reservation for which no key was acquired, and one whose end no server learned of."""
    async with pools_on(place.url, 1, block_seconds=3.0) as pools:
        engine = pools.default
        await engine.generate(3)
        await engine._shares.reserve(ANN, 1, -2.0)  # three seconds, with the margin
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine._client, "on_shares", lambda words: None)
            await engine.acquire(None, 0, client=ANN)
            assert 0 < (await spent(engine)).retry_after <= 3
            await asyncio.sleep(3)
            assert len(await engine.acquire_many(None, 3, client=ANN)) == 2


@on_loop
async def test_no_key_and_no_room_are_told_apart(place: Place) -> None:
    """404 if there is none, and that reserves nothing; 429 if the share is spent, whether or not there are keys."""
    async with pools_on(place.url, 1) as pools:
        engine = pools.default
        with pytest.raises(NoKeyAvailable):
            await engine.acquire(None, 0, client=ANN)
        with pytest.raises(NoKeyAvailable):
            await engine.acquire(None, 0.3, client=ANN)
        await eventually(lambda: held(place) == 0, "nothing is reserved")
        await engine.generate(3)
        await engine.acquire_many(None, 2, client=ANN)
        with pytest.raises(ShareSpent):
            await engine.acquire(None, 0.3, client=ANN)
        assert (await spent(engine, Client("none", 0))).retry_after == 60


@on_loop
async def test_a_repeated_acquire_takes_no_more_of_the_share(place: Place) -> None:
    """Also where the share is spent by the very leases that the attempt holds, on another server."""
    async with pools_on(place.url, 4) as one, pools_on(place.url, 4) as two:
        await one.default.generate(5)
        leases = await one.default.acquire_many(None, 3, attempt=Attempt(b"a" * 16), client=ANN)
        assert len(leases) == 2
        again = Attempt(b"a" * 16)
        repeated = await two.default.acquire_many(None, 3, attempt=again, client=ANN)
        assert [lease.key for lease in repeated] == [lease.key for lease in leases]
        assert again.replayed
        await eventually(lambda: held(place) == 2, "it is no more")


@on_loop
async def test_waiters_in_their_own_share_hold_up_nobody(place: Place) -> None:
    """A hundred of them wait in front: another client is served; and they are, when a lease ends at another server."""
    async with pools_on(place.url, 2) as one, pools_on(place.url, 2) as two:
        engine = one.default
        await engine.generate(3)
        mine = await two.default.acquire_many(None, 2, client=ANN)
        waiting = [asyncio.ensure_future(engine.acquire(None, 50, client=ANN)) for _ in range(100)]
        await eventually(lambda: len(engine._waiters) == 100, "they wait")
        bob = await asyncio.wait_for(engine.acquire(None, 50), 20)
        waiting.append(asyncio.ensure_future(engine.acquire(None, 50)))
        await two.default.unblock(bob.key, bob.lease)
        await asyncio.wait_for(waiting[-1], 20)
        await two.default.unblock(mine[0].key, mine[0].lease)
        await eventually(waiting[0].done, "the first of them is served")
        assert isinstance(waiting[0].result(), Lease)
        assert not any(task.done() for task in waiting[1:100])
        for task in waiting[1:100]:
            task.cancel()
        await asyncio.wait(waiting)
        await eventually(lambda: held(place) == 2, "two are held")


async def _load(engines: list[ValkeyEngine], client: Client, leases: int, seed: int) -> None:
    """Many callers of one client at random, until it had so many leases; fails if it ever holds more than it may."""
    chance = random.Random(seed)
    most = client.max_held or 0
    now, had = 0, 0

    async def work() -> None:
        nonlocal now, had
        while had < leases:
            engine = chance.choice(engines)
            calling = asyncio.ensure_future(engine.acquire(None, chance.choice([0.0, 0.5]), client=client))
            try:
                if chance.random() < 0.1:
                    await asyncio.wait([calling], timeout=chance.random() * 0.02)
                    if not calling.done():
                        calling.cancel()
                        await asyncio.wait([calling])
                        continue
                lease = await calling
            except (ShareSpent, NoKeyAvailable):
                await asyncio.sleep(0.01)
                continue
            now, had = now + 1, had + 1
            assert now <= most, "more leases than the share allows"
            await asyncio.sleep(chance.random() * 0.02)
            now -= 1
            await chance.choice(engines[:1] if engine is engines[0] else [engine]).unblock(
                lease.key, lease.lease
            )

    await asyncio.wait_for(asyncio.gather(*(work() for _ in range(12))), 60)


@pytest.mark.parametrize("seed", range(2))
@on_loop
async def test_a_share_is_never_exceeded_under_random_load(place: Place, seed: int) -> None:
    """Two servers, two pools, waiting and not, with hang-ups; afterwards all of it is free again."""
    async with pools_on(place.url, 3) as one, pools_on(place.url, 3) as two:
        await one.put("b", {}, ADMIN)
        await one.default.generate(10)
        await one.get("b").generate(2)
        await eventually(lambda: "b" in two.names(), "it is found")
        engines = [one.default, two.default, one.get("b"), two.get("b")]
        await _load(engines, Client("ann", 3), 100, seed)
        await eventually(lambda: held(place) == 0, "nothing is left of it", 30)


@on_loop
async def test_shares_in_a_cluster() -> None:
    """Each client's share is on a node of its own; the limit holds as well."""
    url = new_pool(shared_cluster())
    async with pools_on(url, None) as one, pools_on(url, None) as two:
        await one.put("b", {}, ADMIN)
        await one.default.generate(30)
        await one.get("b").generate(10)
        await eventually(lambda: "b" in two.names(), "it is found")
        engines: list[Any] = [one.default, two.default, one.get("b"), two.get("b")]
        await asyncio.gather(*(_load(engines, Client(f"c{n}", n), 30 * n, n) for n in (1, 2, 5)))
