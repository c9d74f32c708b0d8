"""`with pool.lease()`: its members, and that its key is given back in every way that a program can end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client_support import KINDS, Driver, Proxy, clean, started, url_of
from conftest import Start
from engine_support import turns
from support import SHORT_BLOCK, ServerProcess, eventually

from keypool.client import (
    AsyncKeyPool,
    KeyPool,
    KeyPoolError,
    LeaseLost,
    NoKeyAvailable,
    Retry,
    Unblocked,
    Unreachable,
)

PROGRAM = Path(__file__).with_name("lease_program.py")


@pytest.fixture(params=KINDS)
def driver(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[Driver]:
    with Driver(request.param, url_of(server)) as made:
        yield made
    clean(server)


def test_a_key_is_held_and_given_back(driver: Driver) -> None:
    made = driver.generate()
    with driver.lease(owner="me") as key:
        assert (key.secret, key.id, key.hint) == (made.secret, made.id, made.hint)
        assert 0 < key.remaining <= key.release_in <= 60
        assert 60 < key.expires_in <= 300
        assert not key.over
        key.check(1)
        with pytest.raises(LeaseLost, match="left"):
            key.check(100)
        row = driver.get(made)
        assert (row.state, row.owner, row.lease) == ("blocked", "me", key.lease)
    assert driver.get(made).state == "available"
    assert key.over
    assert key.remaining == 0
    with pytest.raises(LeaseLost, match="given back"):
        _ = key.secret


def test_it_is_given_back_when_the_block_raises(driver: Driver) -> None:
    driver.generate()
    with pytest.raises(ZeroDivisionError), driver.lease():
        raise ZeroDivisionError
    assert driver.stats().blocked == 0
    with pytest.raises(NoKeyAvailable), driver.lease(), driver.lease():
        raise AssertionError("never entered")


def test_several_keys_in_one_with(driver: Driver) -> None:
    made = driver.generate_many(3)
    with pytest.raises(ZeroDivisionError), driver.entered(driver.pool.acquire_many(2)) as keys:  # noqa: PT012
        assert {key.secret for key in keys} < {key.secret for key in made}
        assert driver.stats().blocked == 2
        raise ZeroDivisionError
    assert driver.stats().blocked == 0
    with pytest.raises(LeaseLost, match="1 of the keys"), driver.entered(driver.pool.acquire_many(5)) as keys:
        driver.delete(keys[0])
    assert driver.stats().blocked == 0


@pytest.fixture
def short_blocks(lend: Start) -> ServerProcess:
    """A server whose blocks end soon, and whose keys don't."""
    return lend(f"--block-seconds={SHORT_BLOCK}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_lease_that_has_ended_is_lost(short_blocks: ServerProcess, kind: str) -> None:
    with Driver(kind, url_of(short_blocks)) as driver:
        made = driver.generate()
        with pytest.raises(LeaseLost, match="had ended before"), driver.lease() as key:  # noqa: PT012 - it is the end
            eventually(lambda: key.over, "the end of the lease")
            assert key.remaining == 0
            with pytest.raises(LeaseLost, match="ended after"):
                _ = key.secret
            # Never later than the server: what looks alive here is alive there.
            eventually(lambda: driver.get(made.id).state == "available", "the end of the block")
    clean(short_blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_others_hold_by_now_is_theirs(short_blocks: ServerProcess, kind: str) -> None:
    with Driver(kind, url_of(short_blocks)) as driver:
        made = driver.generate()
        with pytest.raises(LeaseLost, match="someone else"), driver.lease():
            theirs = driver.acquire(wait=30)
        row = driver.get(made.id)
        assert row.lease == theirs.lease
        with pytest.raises(LeaseLost, match="deleted"), driver.lease(wait=30):
            driver.delete(made.id)
    clean(short_blocks)


def test_an_error_in_the_block_is_not_hidden(driver: Driver) -> None:
    made = driver.generate()
    with pytest.raises(ZeroDivisionError) as raised, driver.lease():  # noqa: PT012 - the last line
        driver.delete(made)
        raise ZeroDivisionError
    assert "deleted" in "".join(raised.value.__notes__)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lease_keeps_its_key_alive(start_server: Start, kind: str) -> None:
    """The key's 5 s would end long before its lease."""
    server = start_server("--keepalive-seconds=5", "--block-seconds=60")
    with Driver(kind, url_of(server)) as driver, KeyPool(url_of(server)) as other:
        made = driver.generate()
        with driver.lease() as key:
            driver.wait(asyncio.sleep(6)) if kind == "async" else eventually(
                lambda: other.stats().kept_alive >= 4, "some rounds"
            )
            key.check()
            assert 0 < key.expires_in <= 5
            assert other.get(made).lease == key.lease
        assert other.get(made).state == "available"
        # A round comes when a third of it has passed.
        eventually(
            lambda: all((row.expires_in or 0) < 2 for row in other.rows()), "nobody keeps the key any more"
        )


def test_a_lease_fails_once_its_key_was_purged(start_server: Start) -> None:
    server = start_server("--keepalive-seconds=5", "--block-seconds=60")
    with KeyPool(url_of(server)) as pool:
        made = pool.generate()
        with pytest.raises(LeaseLost, match="deleted or expired"), pool.lease() as key:  # noqa: PT012 - its end raises
            pool.delete(made)
            eventually(lambda: key.over, "the keeper to notice")
            with pytest.raises(LeaseLost, match="deleted or expired"):
                key.check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_answer_to_giving_back_is_not_a_lost_lease(server: ServerProcess, kind: str) -> None:
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
    """The work was done with the key held; it is released by its deadline."""
    server = start_server()
    with Driver(kind, url_of(server), retry=Retry(0.1)) as driver:
        made = driver.generate()
        driver.generate()
        with driver.entered(driver.pool.acquire_many(1)), driver.lease():
            server.finish()
    assert "not given back" in caplog.text
    assert made.secret not in caplog.text
    with Driver(kind, url_of(server), retry=0) as driver, pytest.raises(Unreachable), driver.lease():
        pass


def test_closing_the_pool_gives_back_what_is_open(driver: Driver) -> None:
    driver.generate()
    lease: Any = driver.pool.lease()
    enter, leave = ("__enter__", "__exit__") if driver.kind == "sync" else ("__aenter__", "__aexit__")
    driver.wait(getattr(lease, enter)())
    with pytest.raises(KeyPoolError, match="in use"):
        driver.wait(getattr(lease, enter)())
    driver.wait(driver.pool.close())
    with KeyPool(driver.pool._settings.url) as other:
        assert other.stats().blocked == 0
    driver.wait(getattr(lease, leave)(None, None, None))


def test_threads_share_a_pool(server: ServerProcess) -> None:
    used: list[int] = []
    with KeyPool(url_of(server)) as pool:
        pool.generate_many(2)
        before = pool.stats()

        def work() -> None:
            for _ in range(20):
                with pool.lease(wait=None) as key:
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


def test_a_cancelled_waiter_leaves_nothing(server: ServerProcess) -> None:
    async def wait(pool: AsyncKeyPool) -> None:
        async with pool.lease(wait=60):
            raise AssertionError("never served")

    async def main() -> None:
        async with AsyncKeyPool(url_of(server)) as pool:
            tasks = [asyncio.ensure_future(wait(pool)) for _ in range(20)]
            while (await pool.stats()).waiting < 20:
                pass
            for task in tasks:
                task.cancel()
            await turns()  # at once, though the queue is left a second later
            assert all(task.cancelled() for task in tasks)
            while (await pool.stats()).waiting:
                pass
            await pool.generate_many(5)
            assert (await pool.stats()).blocked == 0
            assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
    clean(server)


@pytest.mark.parametrize(
    "how",
    ["acquire", *(pytest.param(how, marks=pytest.mark.thorough) for how in ("lease", "acquire_many"))],
)
def test_300_cancellations_lose_no_key(
    server: ServerProcess, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Tasks that acquire and give back are cancelled wherever they are; in the end every key is free."""

    unblocks: set[asyncio.Task[Unblocked]] = set()

    async def work(pool: AsyncKeyPool) -> None:
        while True:
            if how == "lease":
                async with pool.lease(wait=60):
                    await asyncio.sleep(0)
            elif how == "acquire":
                with contextlib.suppress(NoKeyAvailable):
                    key = await pool.acquire(wait=random.choice([0.5, 60]))
                    # To give it back is up to this program, whatever happens, and before it closes the client.
                    unblocks.add(unblock := asyncio.ensure_future(pool.unblock(key)))
                    await asyncio.shield(unblock)
                    unblocks.discard(unblock)
            else:
                try:
                    async with pool.acquire_many(2):
                        await asyncio.sleep(0)
                except NoKeyAvailable:
                    await asyncio.sleep(0.001)

    async def main() -> None:
        async with AsyncKeyPool(url_of(server)) as pool:
            await pool.generate_many(3)
            cancelled = 0
            for turn in range(75):
                tasks = [asyncio.ensure_future(work(pool)) for _ in range(4)]
                await asyncio.sleep(0.0005 * turn)
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
                cancelled += sum(task.cancelled() for task in tasks)
            assert cancelled == 300
            await asyncio.gather(*unblocks)
        with KeyPool(url_of(server)) as pool:
            eventually(lambda: pool.stats().waiting == 0, "all waiters to leave")
            eventually(
                lambda: pool.stats().blocked == 0, "every key is given back, not released by its deadline"
            )

    asyncio.run(main())
    assert "never retrieved" not in caplog.text
    clean(server)


# ----------------------------------------------------------------------------------------------- ends of programs

WAYS = [
    (program, how, number)
    for program in ("blocking", "asynchronous")
    for how, number in [
        ("return", None),
        ("raise", None),
        ("exit", None),
        ("pipe", None),
        ("sleep", signal.SIGTERM),
        ("sleep", signal.SIGINT),
    ]
]
WAYS += [("bare", "sleep", signal.SIGTERM), ("on_uvloop", "sleep", signal.SIGTERM)]
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
        assert (status == 0) == (how == "return")
        if number == signal.SIGTERM:
            assert status == 128 + number
    clean(server)


def test_a_waiter_that_is_ended_leaves_the_queue(server: ServerProcess) -> None:
    with KeyPool(url_of(server)) as pool, started(server, [PROGRAM, "waiting", "-"]) as process:
        eventually(lambda: pool.stats().waiting == 1, "a waiter")
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        eventually(lambda: pool.stats().waiting == 0, "nobody waiting")


def test_no_signal_handler_is_set_unasked(server: ServerProcess) -> None:
    code = """
import os, signal
from keypool.client import KeyPool, exit_on_sigterm
with KeyPool(os.environ["KEYPOOL_URL"]) as pool, pool.keeper(["x"]):
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
exit_on_sigterm()
assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
"""
    with started(server, ["-c", code]) as process:
        assert process.wait(30) == 0


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
    assert set(threading.enumerate()) <= threads
    assert sys.getrefcount(pool) < 10
    clean(server)


@pytest.mark.thorough
def test_50_workers_through_two_kills_of_the_server(tmp_path: Path) -> None:
    """In 5 processes, blocking and asynchronous, over 10 keys, while workers and server are killed."""
    for kind in ("sync", "async"):
        words = [sys.executable, "-m", "bench.workers", "--processes", "5", "--kind", kind, "--seconds", "4"]
        subprocess.run(
            [*words, "--data", str(tmp_path / f"{kind}.db")], check=True, cwd=PROGRAM.parent.parent
        )
