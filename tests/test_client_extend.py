"""Leases that last longer than a block, how a lost one is noticed, and acquires that are repeated safely."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from client_support import KINDS, QUICK, Driver, Proxy, clean, url_of
from conftest import Start
from support import ServerProcess, eventually

from keypool.client import (
    AsyncKeyPool,
    BlockLimit,
    KeyPool,
    LeaseLost,
    LeaseOver,
    NoKeyAvailable,
    Superseded,
    calls,
)
from keypool.client.answers import LeasedKey
from keypool.client.attempts import Answer, Pause, Send, Timed, perform
from keypool.client.errors import from_answer
from keypool.client.held import Held
from keypool.client.rounds import Rounds
from keypool.client.settings import Settings
from keypool.client.settings import now as now_on_clock
from keypool.client.testing import FakeServer

LONG = ("--block-seconds=60", "--max-block-seconds=600")


@pytest.fixture(params=KINDS)
def driver(request: pytest.FixtureRequest, lend: Start) -> Iterator[Driver]:
    server = lend(*LONG)
    with Driver(request.param, url_of(server)) as made:
        yield made
    clean(server)


def fake_driver(kind: str, **rules: Any) -> tuple[FakeServer, Driver]:
    """A pool in memory with one key, and a client of it."""
    fake = FakeServer(["key-1"], **rules)
    return fake, Driver(kind, "http://fake", transport=fake)


def extends(fake: FakeServer) -> int:
    """How often it was asked to extend a lease."""
    return sum(path.endswith("/extend") for _, path in fake.requests)


# ------------------------------------------------------------------------------------------------- by hand


def test_a_lease_is_extended(driver: Driver) -> None:
    made = driver.generate()
    with driver.lease(block_seconds=20) as key:
        assert 10 < key.remaining <= 20
        answer = driver.wait(key.extend(200))
        assert (answer.id, answer.lease) == (key.id, key.lease)
        assert 190 < answer.release_in <= 200
        assert 500 < answer.block_left <= 600
        assert 190 < key.remaining <= 200
        with pytest.raises(BlockLimit, match="larger"):
            driver.wait(key.extend())  # the 20 s that it was acquired for
        assert driver.wait(key.extend(10_000)).release_in > 500  # cut to the pool's longest block
        with pytest.raises(BlockLimit):
            driver.wait(key.extend(10_000))
        assert driver.get(made).release_in > 500
        # It would expire before: from now on it is kept alive.
        keeper: Any = driver.pool._lease_keeper
        assert keeper.keys == [key.handle]
    with pytest.raises(LeaseLost):
        driver.wait(key.extend())
    leased = driver.acquire(block_seconds=30)
    assert leased.release_in <= 30
    assert 90 < driver.extend(leased, 100).release_in <= 100
    assert 110 < driver.extend(made.secret, 120, lease=leased.lease).release_in <= 120
    done = driver.extend_many([leased, ("nobody", 1), (made.secret, 10**9)], 130)
    assert (done.done, done.unknown, done.stale) == (1, ["nobody"], [made.secret])
    assert driver.extend_many([leased], 5).limit == [made.secret]
    driver.unblock(leased)
    assert driver.extend_many([leased]).over == [made.secret]
    with pytest.raises(LeaseOver):
        driver.extend(leased)
    for seconds in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="seconds"):
            driver.extend(leased, seconds)
        with pytest.raises(ValueError, match="block_seconds"):
            driver.acquire(block_seconds=seconds)


def test_an_extension_whose_answer_was_lost(lend: Start) -> None:
    """The repetition may hear that nothing is left to extend; the lease lasts longer all the same."""
    server = lend(*LONG)
    for kind in KINDS:
        with Proxy(server) as proxy, Driver(kind, proxy.url) as driver:
            driver.generate()
            with driver.lease() as key:
                proxy.faults[:] = ["lose"]
                assert driver.wait(key.extend(10_000)).release_in > 500
                assert driver.get(key).release_in > 500
                assert key.released_at > now_on_clock() + 500
        clean(server)


def test_a_key_that_will_be_quarantined_is_not_lost(driver: Driver) -> None:
    """It can't be extended, but it is this holder's until the end of the lease."""
    driver.generate()
    with driver.lease() as key:
        driver.quarantine(key)
        with pytest.raises(LeaseOver):
            driver.wait(key.extend(300))
        key.check(10)
        assert not key.lost.is_set()
    assert key.unblocked.state == "quarantined"


@pytest.mark.parametrize("how", ["unblocked", "quarantined", "served again", "deleted"])
def test_an_extension_finds_out_that_the_lease_is_lost(driver: Driver, how: str) -> None:
    made = driver.generate()
    with pytest.raises(LeaseLost), driver.lease() as key:  # noqa: PT012 - its end raises, too
        if how == "deleted":
            driver.delete(made)
        elif how == "quarantined":
            driver.quarantine(made, now=True)
        else:
            driver.unblock(made.secret)
            if how == "served again":
                driver.acquire()
        assert not key.lost.is_set()
        with pytest.raises(LeaseLost, match="while it was held"):
            driver.wait(key.extend(300))
        assert key.lost.is_set()
        assert key.over
        with pytest.raises(LeaseLost, match="while it was held"):
            _ = key.secret


# ----------------------------------------------------------------------------------------------- by itself


@pytest.mark.parametrize("kind", KINDS)
def test_a_lease_goes_on_for_longer_than_its_block(start_server: Start, kind: str) -> None:
    """With a block of 8 s, extended each 2.7 s, on a real server; the keeper does it while this thread waits."""
    server = start_server("--block-seconds=8", "--max-block-seconds=600")
    with KeyPool(url_of(server)) as other, Driver(kind, url_of(server)) as driver:
        made = other.generate()
        with driver.lease(extend=True) as key:
            lost = driver.wait(_lost_within(9, key)) if kind == "async" else key.lost.wait(9)
            assert not lost
            row = other.get(made)
            assert (row.state, row.lease) == ("blocked", key.lease)
            key.check()
        assert key.unblocked.changed
        assert other.stats().acquired == 1


async def _lost_within(seconds: float, key: Any) -> bool:
    try:
        return bool(await asyncio.wait_for(key.lost.wait(), seconds))
    except TimeoutError:
        return False


@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_without_extensions_is_asked_once(kind: str) -> None:
    def asked(block_seconds: float) -> int:
        """How often it was asked; not at all if this machine stood still until the end of the block."""
        fake, driver = fake_driver(kind, block_seconds=block_seconds)
        with driver, pytest.raises(LeaseLost, match="ended"), driver.lease(extend=True) as key:  # noqa: PT012 - its end raises
            assert driver.wait(_wait(key))
            assert key.over
        return extends(fake)

    assert next(filter(None, map(asked, (0.6, 6, 20)))) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_lease_that_lasts_as_long_as_it_may_is_not_asked_for_again(kind: str) -> None:
    """Here the third extension reaches the cap: its answer says so."""

    def lasted(most: float) -> bool:
        """Whether it lasted for so long; not if this machine stood still when it had to be extended."""
        fake, driver = fake_driver(kind, block_seconds=most * 0.55, max_block_seconds=most)
        with driver, pytest.raises(LeaseLost, match="had ended before"), driver.lease(extend=True) as key:  # noqa: PT012 - its end raises
            assert driver.wait(_wait(key))
            with pytest.raises(LeaseLost, match="ended after its") as lost:
                key.check()
        assert extends(fake) <= 3
        return extends(fake) >= 1 and f"ended after its {most:.1f} s" in str(lost.value)

    assert any(map(lasted, (1.6, 8, 24))), "it wasn't extended up to the cap"


async def _wait_for_event(key: Any) -> bool:
    await asyncio.wait_for(key.lost.wait(), 60)
    return True


def _wait(key: Any) -> Any:
    """Until the lease is lost."""
    return key.lost.wait(60) if isinstance(key.lost, threading.Event) else _wait_for_event(key)


@pytest.mark.parametrize("kind", KINDS)
def test_the_keeper_notices_a_lost_lease(kind: str) -> None:
    fake, driver = fake_driver(kind, block_seconds=0.9, max_block_seconds=600)
    with (  # noqa: PT012 - its end raises
        driver,
        KeyPool(transport=fake) as other,
        pytest.raises(LeaseLost, match="someone else"),
        driver.lease(extend=True) as key,
    ):
        other.unblock("key-1")
        assert other.acquire(block_seconds=600).secret == "key-1"
        assert driver.wait(_wait(key))
        assert key.over
    assert fake.blocked == ["key-1"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_lease_is_noticed_without_extensions(kind: str) -> None:
    """By its time alone, with no thread and no request for it."""
    fake, driver = fake_driver(kind, block_seconds=0.3)
    threads = set(threading.enumerate())
    with driver, pytest.raises(LeaseLost), driver.lease() as key:  # noqa: PT012 - its end raises
        assert set(threading.enumerate()) <= threads
        assert driver.wait(_wait(key))
    assert len(fake.requests) == 2


def test_whoever_waits_for_the_loss_is_woken_when_the_key_is_given_back() -> None:
    with KeyPool(transport=FakeServer(["key-1"])) as pool, pool.lease() as key:
        results: list[bool] = []
        thread = threading.Thread(target=lambda: results.append(key.lost.wait()))
        thread.start()
        assert key.lost.wait(0.01) is False
        key.release()
        thread.join(60)
        assert results == [False]
        assert not key.lost.is_set()


def test_extensions_without_any_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule alone: after a third of the block; after a failure soon again; after the last one never."""
    clock = [1000.0]
    for module in ("attempts", "held", "rounds", "reports"):
        monkeypatch.setattr(f"keypool.client.{module}.now", lambda: clock[0])
    leased = LeasedKey(1, "key-1", 7, 60.0, 300.0, "h:1.7.x")
    held = Held(Timed(leased, 1000.0, 1000.0), "me")
    rounds = Rounds(Settings.of())
    steps = rounds.steps()
    assert next(steps) == Pause(None)
    rounds.extend(held)
    assert steps.send(None) == Pause(20.0)
    clock[0] += 20
    send = steps.send(None)
    assert isinstance(send, Send)
    assert send.url.endswith("/keys/h%3A1%2E7%2Ex/extend")
    assert json.loads(send.body or b"") == {}
    assert send.timeout == 15
    pause = steps.send(Answer(503, {}, b""))  # from a proxy
    assert isinstance(pause, Pause)
    assert pause.seconds == 5
    clock[0] += 5
    assert isinstance(steps.send(None), Send)
    answer = {"id": 1, "lease": 7, "release_in": 60.0, "block_left": 100.0}
    assert steps.send(Answer(200, {}, json.dumps(answer).encode())) == Pause(20.0)
    assert held.remaining == 60
    clock[0] += 20
    assert isinstance(steps.send(None), Send)
    answer |= {"release_in": 80.0, "block_left": 80.0}
    assert steps.send(Answer(200, {}, json.dumps(answer).encode())) == Pause(None)
    assert held.remaining == 80


# ------------------------------------------------------------------------------------- retry-safe acquires


@pytest.mark.parametrize("fault", ["lose", "cut", "502", "reset"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_repeated_acquire_gets_the_same_lease(server: ServerProcess, kind: str, fault: str) -> None:
    with Proxy(server) as proxy, Driver(kind, proxy.url) as driver:
        driver.generate_many(5)
        before = driver.stats().acquired
        proxy.faults[:] = [fault]
        key = driver.acquire()
        assert driver.stats().blocked == 1
        assert driver.get(key).lease == key.lease
        proxy.faults[:] = [fault]
        keys = driver.wait(driver.pool.acquire_many(2))
        assert len(keys) == 2
        assert driver.stats().acquired == before + 3
    clean(server)


def test_every_request_of_an_acquire_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server knows an attempt again by header and body: both stay, whatever happens on the way."""
    clock = [0.0]
    monkeypatch.setattr("keypool.client.attempts.now", lambda: clock[0])
    steps = perform(calls.acquire("me", 100), Settings.of(timeout=10))
    sent: list[tuple[str, bytes]] = []
    problem = {"type": "urn:keypool:problem:x", "code": "no-key-available", "detail": "none"}
    step = next(steps)
    for answer in (problem, None, {**problem, "code": "superseded"}, problem):
        while isinstance(step, Pause):
            step = steps.send(None)
        assert isinstance(step, Send)
        sent.append((step.headers["Idempotency-Key"], step.body or b""))
        clock[0] += 20
        if answer is None:
            step = steps.send(Answer(502, {}, b""))
        else:
            step = steps.send(Answer(404, {}, json.dumps(answer).encode()))
    assert len(set(sent)) == 1
    assert json.loads(sent[0][1]) == {"owner": "me", "wait": 50}  # though 20 s are left
    others = {calls.acquire("me", 100).idempotency_key for _ in range(20)}
    assert len(others) == 20
    assert all(key and key.isascii() and key.isprintable() and len(key) <= 64 for key in others)


def test_waiting_in_several_requests_is_fair(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """One who asks again and again keeps the place that it had before one who came later."""
    monkeypatch.setattr("keypool.client.attempts._LONGEST_WAIT", 3.0)
    got: list[str] = []

    def wait(name: str, wait: float | None) -> None:
        with KeyPool(url_of(server), retry=QUICK) as pool:
            pool.acquire(owner=name, wait=wait)
            got.append(name)

    with KeyPool(url_of(server)) as pool, Proxy(server) as proxy:
        before = pool.stats()
        first = threading.Thread(target=lambda: _wait_through(proxy, got))
        first.start()
        eventually(lambda: pool.stats().waiting == 1, "the first one to wait")
        monkeypatch.setattr("keypool.client.attempts._LONGEST_WAIT", 60.0)
        second = threading.Thread(target=wait, args=("second", 60))
        second.start()
        eventually(lambda: pool.stats().waiting == 2, "the second one to wait")
        # A place that is kept holds nobody up, so the key has to come while the first one waits, best as it begins to.
        asked = len(proxy.requests)
        eventually(
            lambda: len(proxy.requests) > asked and pool.stats().waiting == 2, "the first one to wait again"
        )
        made = pool.generate()
        first.join(60)
        assert got == ["first"]
        pool.unblock(made.secret)
        second.join(60)
        assert got == ["first", "second"]
        assert pool.stats().acquired == before.acquired + 2
    clean(server)


def _wait_through(proxy: Proxy, got: list[str]) -> None:
    with KeyPool(proxy.url, retry=QUICK) as pool:
        pool.acquire(owner="first", wait=None)
        got.append("first")


def test_why_no_key_is_available(driver: Driver) -> None:
    driver.generate_many(6)
    keys = driver.wait(driver.pool.acquire_many(6))
    driver.unblock_many([calls.Unblock(key, outcome="rate_limited", retry_after=30) for key in keys[:2]])
    driver.quarantine(keys[2], now=True)
    with pytest.raises(NoKeyAvailable) as none:
        driver.acquire()
    assert (none.value.blocked, none.value.cooling, none.value.quarantined) == (3, 2, 1)
    assert 20 < (none.value.retry_after or 0) <= 30


def test_superseded_has_its_class() -> None:
    body = b'{"type":"urn:keypool:problem:superseded","code":"superseded","detail":"d"}'
    error = from_answer(409, body)
    assert isinstance(error, Superseded)
    assert not error.may_have_happened


def test_a_cancelled_extension_leaves_the_lease(lend: Start) -> None:
    server = lend(*LONG)

    async def main() -> None:
        async with AsyncKeyPool(url_of(server)) as pool:
            await pool.generate()
            async with pool.lease() as key:
                task = asyncio.ensure_future(key.extend(100))
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait({task})
                key.check(10)
                assert not key.lost.is_set()
            assert (await pool.stats()).blocked == 0

    asyncio.run(main())
    clean(server)
