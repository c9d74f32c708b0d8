"""Shares: a named token holds at most `max_held` leases in all pools of the server, and waits in its own share.

Contract 5, "Named tokens". The last test plays random calls on three pools and compares who holds what and who waits
with a model of a few lines, in which the rule is a loop over all waiters.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, NamedTuple

import pytest
from engine_support import Call, Held, HeldTimers, Moment, make_engine, now, on_loop, turns

from keypool.core.answers import Lease
from keypool.core.errors import NoKeyAvailable, ShareSpent, Superseded
from keypool.core.events import By, Origin
from keypool.core.keys import Key, State
from keypool.engine import Client
from keypool.engine.embedded import EmbeddedEngine
from keypool.engine.pools import EmbeddedPools

ADMIN = Origin(By.OPERATOR, "ops")
ONE, TWO = Client("one", 1), Client("two", 2)


class Tried:
    """An attempt with an Idempotency-Key."""

    def __init__(self, digest: bytes = b"d" * 16) -> None:
        self.digest = digest
        self.replayed = False


class Server:
    """The pools a, b and c, whose clock and timers the test controls."""

    def __init__(self) -> None:
        self.clock = Moment()
        self.timers = HeldTimers()
        self.pools = EmbeddedPools(make_engine(self.clock, self.timers))
        self.shares = self.pools.default.shares

    async def pool(self, name: str, keys: int = 0, **settings: Any) -> EmbeddedEngine:
        """A new pool with so many keys."""
        await self.pools.put(name, settings, ADMIN)
        engine = self.pools.get(name)
        if keys:
            await engine.generate(keys)
        return engine


def wait(engine: EmbeddedEngine, client: Client | None, seconds: float = 30.0, **more: Any) -> Call[Lease]:
    """A pending acquire."""
    return Call(engine.acquire(None, seconds, client=client, **more))


async def take(engine: EmbeddedEngine, client: Client | None, **more: Any) -> Lease:
    """A lease that must be there at once."""
    lease: Lease = await now(engine.acquire(None, 0, client=client, **more))
    return lease


# ----------------------------------------------------------------------------------------------- without waiting


@on_loop
async def test_a_spent_share_is_refused_until_one_of_its_leases_ends() -> None:
    """`retry_after` is the time to the earliest end of its own leases, not of others'."""
    held = Held()
    engine = held.engine
    await engine.generate(5)
    await take(engine, Client("other"), block_seconds=1)
    await take(engine, TWO, block_seconds=50)
    second = await take(engine, TWO, block_seconds=30)
    held.clock.on(5)
    with pytest.raises(ShareSpent, match="as many leases as it may, 2") as refused:
        await engine.acquire(None, 0, client=TWO)
    assert refused.value.retry_after == 25
    assert (await engine.stats()).refused == 0, "only 404s are counted there"
    await now(engine.unblock(second.id, second.lease))
    assert (await take(engine, TWO)).lease == 4


@on_loop
async def test_a_share_is_of_all_pools_together() -> None:
    """A lease in one pool leaves no room in another."""
    server = Server()
    a, b = await server.pool("a", 2), await server.pool("b", 2)
    lease = await take(a, ONE)
    with pytest.raises(ShareSpent):
        await b.acquire(None, 0, client=ONE)
    await now(a.unblock(lease.id, lease.lease))
    await take(b, ONE)
    with pytest.raises(ShareSpent):
        await a.acquire(None, 0, client=ONE)


@on_loop
async def test_callers_without_a_name_or_a_limit_take_what_there_is() -> None:
    """Named leases are counted all the same, for a limit may come later."""
    held = Held()
    await held.engine.generate(6)
    for client in (None, Client("free"), Client("free")):
        await take(held.engine, client)
    assert held.engine.shares.held("free") == 2
    assert await EmbeddedPools(held.engine).held(Client("free")) == 2
    with pytest.raises(ShareSpent):
        await held.engine.acquire(None, 0, client=Client("free", 2))
    await take(held.engine, Client("free", 3))


@on_loop
async def test_a_batch_gets_fewer_and_nothing_only_if_nothing_is_left() -> None:
    """As it gets fewer when fewer keys are free."""
    held = Held()
    await held.engine.generate(5)
    assert len(await held.engine.acquire_many(None, 4, client=TWO)) == 2
    with pytest.raises(ShareSpent):
        await held.engine.acquire_many(None, 1, client=TWO)
    assert len(await held.engine.acquire_many(None, 4, client=Client("rich", 9))) == 3
    with pytest.raises(NoKeyAvailable):
        await held.engine.acquire_many(None, 1, client=Client("rich", 9))


@on_loop
async def test_a_repeat_with_the_same_idempotency_key_is_answered_although_the_share_is_spent() -> None:
    """It takes no other lease."""
    held = Held()
    await held.engine.generate(5)
    first = await take(held.engine, ONE, attempt=Tried())
    again = Tried()
    assert (await take(held.engine, ONE, attempt=again)).lease == first.lease
    assert again.replayed


@on_loop
async def test_whatever_ends_a_lease_gives_the_share_back() -> None:
    """Unblock, release, quarantine now, delete, expiry, and the drain of a pool."""
    server = Server()
    a = await server.pool("a", 6, keepalive_seconds=1000)
    share = server.shares
    lease = await take(a, ONE)
    await now(a.unblock(lease.id, lease.lease))
    assert share.held("one") == 0
    lease = await take(a, ONE)
    await now(a.quarantine(lease.id, None, now=True, origin=ADMIN))
    assert share.held("one") == 0
    lease = await take(a, ONE)
    await now(a.delete(lease.id))
    assert share.held("one") == 0
    lease = await take(a, ONE)
    server.clock.on(61)
    server.timers.fire()
    assert share.held("one") == 0
    await server.pools.change("a", {"max_block_seconds": 5000}, ADMIN)
    await take(a, ONE, block_seconds=5000)
    server.clock.on(1000)
    server.timers.fire()
    assert share.held("one") == 0, "it expired"
    await a.generate(1)
    await take(a, ONE)
    await server.pools.delete("a", drain=True, now=True, origin=ADMIN)
    await turns()
    assert (share.held("one"), server.pools.names()) == (0, ["default"])


@on_loop
async def test_a_lease_whose_time_is_over_leaves_room_although_its_timer_is_late() -> None:
    """The deadline is the truth."""
    server = Server()
    a, b = await server.pool("a", 1), await server.pool("b", 1)
    await take(a, ONE)
    server.clock.on(60)
    await take(b, ONE)
    assert server.pools.row("a").blocked == 0


@on_loop
async def test_a_changed_limit_counts_from_the_next_acquire_on() -> None:
    """What is held already is not taken away."""
    held = Held()
    await held.engine.generate(5)
    for _ in range(2):
        await take(held.engine, TWO)
    with pytest.raises(ShareSpent):
        await held.engine.acquire(None, 0, client=Client("two", 1))
    await take(held.engine, Client("two", 3))
    with pytest.raises(ShareSpent):
        await held.engine.acquire(None, 0, client=Client("two", 3))


@on_loop
async def test_restored_leases_count() -> None:
    """A restart gives nobody a second share."""
    held = Held(start_timers=False)
    held.pool.last_id = held.pool.last_lease = 1
    at = held.clock()
    key = Key(1, "x" * 20, at, at + 300, at + 60, 1, None, State.BLOCKED, at, client="one")
    held.pool.load(key)
    await held.engine.generate(1)
    with pytest.raises(ShareSpent):
        await held.engine.acquire(None, 0, client=ONE)
    await now(held.engine.unblock(1, 1))
    assert held.engine.shares.held("one") == 0
    assert key.client is None


# ---------------------------------------------------------------------------------------------------- waiting


@on_loop
async def test_a_waiter_whose_share_is_spent_is_passed_over_and_keeps_its_place() -> None:
    """It holds up nobody, and is served before those that came later once its share has room."""
    held = Held()
    engine = held.engine
    await engine.generate(2)
    mine = await take(engine, ONE)
    spent = wait(engine, ONE)
    assert not spent.over
    theirs = await take(engine, None)
    assert (await engine.stats()).waiting == 1
    later = wait(engine, None)
    await now(engine.unblock(theirs.id, theirs.lease))
    await turns()
    assert later.answer.lease == 3
    assert not spent.over
    latest = wait(engine, None)
    await now(engine.unblock(mine.id, mine.lease))
    await turns()
    assert spent.answer.lease == 4
    assert not latest.over


@on_loop
async def test_a_share_that_gets_room_in_one_pool_serves_its_waiter_in_another() -> None:
    """The key was there all the while."""
    server = Server()
    a, b = await server.pool("a", 1), await server.pool("b", 1)
    lease = await take(a, ONE)
    waiter = wait(b, ONE)
    await turns()
    assert not waiter.over
    await now(a.unblock(lease.id, lease.lease))
    await turns()
    assert waiter.answer.id == 1


@on_loop
async def test_the_waiters_of_a_share_come_in_their_order_whatever_their_pool() -> None:
    """Otherwise a busy pool could starve the same client's waiter in another."""
    server = Server()
    a, b = await server.pool("a", 1), await server.pool("b", 1)
    lease = await take(a, ONE)
    first, second, third = wait(b, ONE), wait(a, ONE), wait(b, ONE)
    await now(a.unblock(lease.id, lease.lease))
    await turns()
    assert [call.over for call in (first, second, third)] == [True, False, False]
    await now(b.unblock(first.answer.id, first.answer.lease))
    await turns()
    assert [call.over for call in (first, second, third)] == [True, True, False]


@on_loop
async def test_a_new_acquire_does_not_overtake_the_waiters_of_its_share() -> None:
    """Not even between the end of a lease and the next turn of the loop, nor in another pool."""
    server = Server()
    a, b = await server.pool("a", 1), await server.pool("b", 2)
    lease = await take(a, ONE)
    waiter = wait(b, ONE)
    await now(a.unblock(lease.id, lease.lease))
    with pytest.raises(ShareSpent):
        await now(a.acquire(None, 0, client=ONE))
    await turns()
    assert waiter.answer.id in (1, 2)


@on_loop
async def test_a_waiter_is_told_what_it_lacked() -> None:
    """429 if its share was spent at the end of its time, 404 if there was no key."""
    held = Held()
    engine, clock = held.engine, held.clock
    await engine.generate(1)
    await take(engine, ONE)
    no_share, no_key = wait(engine, ONE, 10), wait(engine, TWO, 10)
    clock.on(10)
    held.timers.fire(*held.timers.for_deadline(9.999))
    await turns()
    with pytest.raises(ShareSpent) as refused:
        _ = no_share.answer
    assert refused.value.retry_after == 50
    with pytest.raises(NoKeyAvailable):
        _ = no_key.answer
    assert (await engine.stats()).waiting == 0


@on_loop
async def test_a_share_of_nothing_never_has_room() -> None:
    """Its waiter waits, and is refused at the end of its time."""
    held = Held()
    await held.engine.generate(1)
    nothing = Client("none", 0)
    waiter = wait(held.engine, nothing, 10)
    assert not waiter.over
    held.timers.fire(*held.timers.for_deadline(9.999))
    await turns()
    with pytest.raises(ShareSpent):
        _ = waiter.answer
    with pytest.raises(ShareSpent):
        await held.engine.acquire(None, 0, client=nothing)


@on_loop
async def test_a_waiter_that_hangs_up_as_its_share_frees_leaves_the_room_to_the_next() -> None:
    """Whether it hung up before it was served, or was served and never got the answer."""
    held = Held()
    engine = held.engine
    await engine.generate(2)
    lease = await take(engine, ONE)
    early, served, last = wait(engine, ONE), wait(engine, ONE), wait(engine, ONE)
    early.hang_up()
    await now(engine.unblock(lease.id, lease.lease))
    served.hang_up()
    await turns()
    assert last.over
    assert engine.shares.held("one") == 1
    await now(engine.unblock(last.answer.id, last.answer.lease))
    assert (engine.shares.held("one"), (await engine.stats()).waiting) == (0, 0)


@on_loop
async def test_a_repeat_takes_the_place_of_the_waiter_of_its_attempt_in_its_share() -> None:
    """The place among the client's own waiters, too."""
    held = Held()
    engine = held.engine
    await engine.generate(2)
    lease = await take(engine, ONE)
    first = wait(engine, ONE, attempt=Tried())
    other = wait(engine, ONE)
    repeat = wait(engine, ONE, attempt=Tried())
    await turns()
    with pytest.raises(Superseded):
        _ = first.answer
    await now(engine.unblock(lease.id, lease.lease))
    await turns()
    assert repeat.over
    assert not other.over


@on_loop
async def test_waiters_with_an_older_limit_keep_it() -> None:
    """A reload of the tokens changes what the next acquire may hold, not a waiting one."""
    held = Held()
    engine = held.engine
    await engine.generate(5)
    for _ in range(2):
        await take(engine, TWO)
    old = wait(engine, TWO)
    assert wait(engine, Client("two", 3)).over
    assert not old.over


@on_loop
async def test_a_deleted_pool_forgets_the_waiters_of_a_share() -> None:
    """They are answered, and the share's other waiters are served as ever."""
    server = Server()
    a, b = await server.pool("a", 1), await server.pool("b", 1)
    lease = await take(a, ONE)
    gone, stays = wait(b, ONE), wait(a, ONE)
    await server.pools.delete("b", drain=True, now=False, origin=ADMIN)
    await turns()
    assert gone.over
    await now(a.unblock(lease.id, lease.lease))
    await turns()
    assert stays.over


# ----------------------------------------------------------------------------------------------------- at random


class Waiting(NamedTuple):
    """A waiter of the model."""

    number: int
    pool: str
    client: Client | None
    block: float


class Model:
    """Three pools and their shares, as a loop over all waiters would have them."""

    def __init__(self) -> None:
        self.free: Counter[str] = Counter()
        self.leases: dict[int, tuple[str, Client | None, float]] = {}  # by number of the call: with its end
        self.waiting: list[Waiting] = []

    def held(self, client: Client) -> int:
        """How many leases a client holds."""
        return sum(holder is not None and holder.name == client.name for _, holder, _ in self.leases.values())

    def servable(self, waiter: Waiting) -> bool:
        """Whether there is a key, and room in the share."""
        client = waiter.client
        room = client is None or client.max_held is None or self.held(client) < client.max_held
        return bool(self.free[waiter.pool]) and room

    def settle(self, at: float) -> None:
        """Serve the first that can be served, as often as there is one."""
        while (waiter := next(filter(self.servable, self.waiting), None)) is not None:
            self.waiting.remove(waiter)
            self.free[waiter.pool] -= 1
            self.leases[waiter.number] = (waiter.pool, waiter.client, at + waiter.block)

    def end(self, number: int, at: float) -> None:
        """A lease has ended."""
        pool = self.leases.pop(number)[0]
        self.free[pool] += 1
        self.settle(at)


class Play:
    """The same calls on the pools and on the model."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.server = Server()
        self.model = Model()
        self.calls: dict[int, tuple[str, Call[Lease]]] = {}
        self.last = 0
        self.clients = [None, Client("free"), Client("one", 1), Client("two", 2), Client("three", 3)]

    async def begin(self) -> None:
        """Three pools, with few keys."""
        for name in "abc":
            await self.server.pool(name, 2, max_block_seconds=1000, keepalive_seconds=1e9)
            self.model.free[name] = 2

    def now(self) -> float:
        return self.server.clock()

    async def step(self) -> None:
        """One call, and a comparison."""
        play = self.random.choices(
            [self.acquire, self.unblock, self.hang_up, self.generate, self.pass_time], [10, 6, 2, 0.2, 4]
        )[0]
        await play()
        await turns(12)
        self.compare()

    async def acquire(self) -> None:
        """One more waits, or is served at once."""
        self.last += 1
        pool, client = self.random.choice("abc"), self.random.choice(self.clients)
        block = self.random.uniform(20, 40)  # so that no two leases end in the same moment
        self.calls[self.last] = (
            pool,
            wait(self.server.pools.get(pool), client, 1e6, block_seconds=block),
        )
        self.model.waiting.append(Waiting(self.last, pool, client, block))
        self.model.settle(self.now())

    async def unblock(self) -> None:
        """A holder gives its key back."""
        if self.model.leases:
            number = self.random.choice(list(self.model.leases))
            pool, call = self.calls.pop(number)
            await now(self.server.pools.get(pool).unblock(call.answer.id, call.answer.lease))
            self.model.end(number, self.now())

    async def hang_up(self) -> None:
        """A waiter goes."""
        if self.model.waiting:
            waiter = self.random.choice(self.model.waiting)
            self.model.waiting.remove(waiter)
            self.calls.pop(waiter.number)[1].hang_up()

    async def generate(self) -> None:
        """One key more."""
        pool = self.random.choice("abc")
        await self.server.pools.get(pool).generate(1)
        self.model.free[pool] += 1
        self.model.settle(self.now())

    async def pass_time(self) -> None:
        """Until the next lease ends, and its timer fires."""
        if self.model.leases:
            number, (*_, end) = min(self.model.leases.items(), key=lambda item: item[1][2])
            self.server.clock.to(end)
            if self.random.random() < 0.5:
                for pool in "abc":
                    self.server.pools.get(pool)._process_due()
            else:  # the timer is late, and a call finds the key
                pool, call = self.calls[number]
                await now(self.server.pools.get(pool).get(call.answer.id))
            self.calls.pop(number)
            self.model.end(number, end)

    def compare(self) -> None:
        """The same calls wait, and the same hold leases."""
        waiting = {number for number, (_, call) in self.calls.items() if not call.over}
        assert waiting == {waiter.number for waiter in self.model.waiting}
        assert self.calls.keys() - waiting == self.model.leases.keys()
        for client in filter(None, self.clients):
            held = self.server.shares.held(client.name)
            assert held == self.model.held(client)
            assert client.max_held is None or held <= client.max_held
        for name in "abc":
            engine = self.server.pools.get(name)
            engine.pool.check()
            assert engine.waiting == sum(waiter.pool == name for waiter in self.model.waiting)
            assert engine.pool.available == self.model.free[name]

    async def end(self) -> None:
        """Everybody hangs up and gives back; nothing is left."""
        while self.model.waiting:
            await self.hang_up()
        while self.model.leases:
            await self.unblock()
        await turns()
        self.compare()
        assert not self.server.shares._held
        assert not self.server.shares._lanes


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(n, marks=pytest.mark.thorough) for n in range(4, 60))]
)
def test_random_calls_serve_whom_a_loop_over_all_waiters_would_serve(seed: int) -> None:
    """Never over `max_held`, nobody passed over who could be served, and all counts return to zero."""

    @on_loop
    async def play() -> None:
        game = Play(seed)
        await game.begin()
        for _ in range(300):
            await game.step()
        await game.end()

    play()
