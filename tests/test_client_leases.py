"""`with pool.lease()`: what it knows, and that the key is given back in every way that a program can end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client_support import KINDS, Driver, Proxy, clean, started, url_of
from conftest import Start
from support import ServerProcess, eventually

from keypool.client import AsyncKeyPool, KeyPool, LeaseLost, NoKeyAvailable, Retry, Unreachable
from keypool.client.by_aiohttp import AiohttpTransport
from keypool.client.by_tornado import TornadoTransport

PROGRAM = Path(__file__).with_name("lease_program.py")


@pytest.fixture(params=KINDS)
def driver(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[Driver]:
    with Driver(request.param, url_of(server)) as made:
        yield made
    clean(server)


def test_a_key_is_held_and_given_back(driver: Driver) -> None:
    made = driver.generate()
    with driver.lease(owner="me") as key:
        assert (str(key), f"{key}", key.key, key.id) == (made.key, made.key, made.key, made.id)
        assert 0 < key.remaining <= key.release_in <= 60
        assert not key.over
        key.check(1)
        with pytest.raises(LeaseLost, match="left"):
            key.check(100)
        assert made.key not in repr(key)
        row = driver.get(made)
        assert (row.state, row.owner, row.lease) == ("blocked", "me", key.lease)
    assert driver.get(made).state == "available"
    assert key.over
    assert key.remaining == 0
    with pytest.raises(LeaseLost, match="given back"):
        str(key)


def test_it_is_given_back_when_the_block_raises(driver: Driver) -> None:
    driver.generate()
    with pytest.raises(ZeroDivisionError), driver.lease():
        raise ZeroDivisionError
    assert driver.stats().blocked == 0


def test_no_key_to_lease(driver: Driver) -> None:
    with pytest.raises(NoKeyAvailable), driver.lease():
        raise AssertionError("never entered")


@pytest.mark.parametrize("kind", KINDS)
def test_a_lease_that_is_over_says_so(short_server: ServerProcess, kind: str) -> None:
    with Driver(kind, url_of(short_server)) as driver:
        made = driver.generate()
        with pytest.raises(LeaseLost, match="was over before"), driver.lease() as key:  # noqa: PT012 - it is the end
            eventually(lambda: key.over, "the end of the lease")
            assert key.remaining == 0
            with pytest.raises(LeaseLost, match="is over after"):
                str(key)
            # Never later than the server: what looks alive here is alive there.
            eventually(lambda: driver.get(made.id).state == "available", "the end of the block")
    clean(short_server)


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_others_hold_by_now_is_theirs(short_server: ServerProcess, kind: str) -> None:
    with Driver(kind, url_of(short_server)) as driver:
        made = driver.generate()
        with pytest.raises(LeaseLost, match="somebody else"), driver.lease():
            theirs = driver.acquire(wait=5)
        row = driver.get(made.id)
        assert row.lease == theirs.lease
        with pytest.raises(LeaseLost, match="deleted"), driver.lease(wait=5):
            driver.delete(made.id)
    clean(short_server)


def test_an_error_on_its_way_is_not_hidden(driver: Driver) -> None:
    made = driver.generate()
    with pytest.raises(ZeroDivisionError) as raised, driver.lease():  # noqa: PT012 - the last line
        driver.delete(made)
        raise ZeroDivisionError
    assert "deleted" in "".join(raised.value.__notes__)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_answer_to_giving_back_is_no_lost_lease(server: ServerProcess, kind: str) -> None:
    with Proxy(server) as proxy, Driver(kind, proxy.url) as driver:
        driver.generate()
        with driver.lease():
            proxy.faults[:] = ["lose"]
        assert driver.stats().blocked == 0
    clean(server)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_is_gone_at_the_end_is_a_warning(
    start_server: Start, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The work was done with the key held; it comes free by itself."""
    server = start_server()
    with Driver(kind, url_of(server), retry=Retry(0.1)) as driver:
        made = driver.generate()
        with driver.lease():
            server.finish()
    assert "not given back" in caplog.text
    assert made.key not in caplog.text
    with Driver(kind, url_of(server), retry=Retry(0)) as driver, pytest.raises(Unreachable), driver.lease():
        pass


def test_closing_the_pool_gives_back_what_is_open(server: ServerProcess) -> None:
    pool = KeyPool(url_of(server))
    pool.generate()
    lease = pool.lease()
    lease.__enter__()
    pool.close()
    assert server.client().stats()["blocked"] == 0
    lease.__exit__(None, None, None)
    clean(server)


def test_threads_share_a_pool(server: ServerProcess) -> None:
    used: list[int] = []
    with KeyPool(url_of(server)) as pool:
        pool.generate_many(2)
        before = pool.stats()

        def work() -> None:
            for _ in range(20):
                with pool.lease(wait=30) as key:
                    used.append(key.lease)

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = pool.stats()
    assert len(set(used)) == 120
    assert stats.blocked == 0
    assert (stats.acquired - before.acquired, stats.unblocked - before.unblocked) == (120, 120)
    clean(server)


# ------------------------------------------------------------------------------------------------- cancellation

TRANSPORTS = pytest.mark.parametrize(
    "transport", [AiohttpTransport, TornadoTransport], ids=["aiohttp", "tornado"]
)


@TRANSPORTS
def test_a_cancelled_waiter_leaves_nothing(server: ServerProcess, transport: Any) -> None:
    async def wait(pool: AsyncKeyPool) -> None:
        async with pool.lease(wait=60):
            raise AssertionError("never served")

    async def main() -> None:
        async with AsyncKeyPool(url_of(server), transport=transport) as pool:
            tasks = [asyncio.ensure_future(wait(pool)) for _ in range(20)]
            while (await pool.stats()).waiting < 20:
                pass
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            assert all(task.cancelled() for task in tasks)
            while (await pool.stats()).waiting:
                pass
            await pool.generate_many(5)
            assert (await pool.stats()).blocked == 0
            assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
    clean(server)


@TRANSPORTS
def test_cancellation_at_any_moment_loses_no_key(server: ServerProcess, transport: Any) -> None:
    """Tasks that acquire and give back are cancelled wherever they are; in the end every key is free."""

    async def work(pool: AsyncKeyPool) -> None:
        while True:
            async with pool.lease(wait=60):
                await asyncio.sleep(0)

    async def main() -> None:
        async with AsyncKeyPool(url_of(server), transport=transport) as pool:
            await pool.generate_many(3)
            for turn in range(40):
                tasks = [asyncio.ensure_future(work(pool)) for _ in range(4)]
                await asyncio.sleep(0.001 * turn)
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
            while (await pool.stats()).waiting:
                pass
            assert (await pool.stats()).blocked == 0
            assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
    clean(server)


# ----------------------------------------------------------------------------------------------- ends of programs

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
WAYS = [
    (program, how, number)
    for program in ("synchronous", "bare", "asynchronous", "on_uvloop")
    for how, number in [("return", None), ("raise", None), ("exit", None), ("pipe", None)]
    + [("sleep", number) for number in SIGNALS]
    if program in ("synchronous", "asynchronous") or how == "sleep"
]
WAYS += [("thread", "return", None), ("thread", "sleep", signal.SIGTERM), ("stopped", "sleep", None)]


@pytest.mark.parametrize(("program", "how", "number"), WAYS)
def test_the_key_is_given_back_however_the_program_ends(
    server: ServerProcess, program: str, how: str, number: signal.Signals | None
) -> None:
    with KeyPool(url_of(server)) as pool:
        made = pool.generate()
        with started(server, [PROGRAM, program, how]) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            if number is not None:
                assert pool.get(made).state == "blocked"
                process.send_signal(number)
            if how == "pipe":
                process.stdout.close()
            status = process.wait(30)
        assert pool.get(made).state == "available"
        assert pool.stats().unblocked >= 1
        assert (status == 0) == (how == "return")
        if number in (signal.SIGTERM, signal.SIGHUP):
            assert status == 128 + number
    clean(server)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_waiter_that_is_ended_leaves_the_queue(server: ServerProcess, number: signal.Signals) -> None:
    with KeyPool(url_of(server)) as pool, started(server, [PROGRAM, "waiting", "-"]) as process:
        eventually(lambda: pool.stats().waiting == 1, "a waiter")
        process.send_signal(number)
        process.wait(30)
        eventually(lambda: pool.stats().waiting == 0, "nobody waiting")


def test_signals_at_any_moment_lose_no_key(server: ServerProcess) -> None:
    """Ctrl-C while acquiring, holding or giving back, again and again: the key is free in the end.

    What is interrupted between two lines of Python, where nothing can be done at once, is given back at exit.
    """
    with KeyPool(url_of(server)) as pool:
        pool.generate()
        with started(server, [PROGRAM, "disturbed", "80"]) as process:
            assert process.stdout is not None
            interrupted, leased = map(int, process.stdout.read().split())
            assert process.wait(30) == 0
        assert interrupted >= 80
        assert leased > 0
        assert pool.stats().blocked == 0
    clean(server)


def test_handlers_of_others_are_left_alone(server: ServerProcess) -> None:
    with KeyPool(url_of(server), signals=False) as pool:
        pool.generate()
        with pool.lease():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with KeyPool(url_of(server)) as pool:
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        with pool.lease():
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    clean(server)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_leaves_the_lease_to_its_parent(server: ServerProcess) -> None:
    with KeyPool(url_of(server)) as pool:
        pool.generate()
        before = pool.stats().unblocked
        with started(server, ["-W", "ignore", PROGRAM, "forked", "-"]) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == f"blocked 1 unblocked {before}\n"
            assert process.wait(30) == 0
        assert pool.stats().blocked == 0
    clean(server)


def test_nothing_is_left_behind(server: ServerProcess) -> None:
    threads = set(threading.enumerate())
    with KeyPool(url_of(server)) as pool:
        key = pool.generate()
        with pool.lease(), pool.keeper([key]):
            pass
    assert set(threading.enumerate()) == threads
    assert sys.getrefcount(pool) < 10
    clean(server)
