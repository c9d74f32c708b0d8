"""A program that holds a key and ends in the way that its arguments say; run by test_client_leases.py.

Prints `held` when it holds a key, and then ends: by returning, raising, a signal, writing to a closed pipe, or in a
daemon thread that is cut off.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time

from keypool.client import AsyncKeyPool, KeyPool, exit_on_sigterm

URL = os.environ["KEYPOOL_URL"]


def say(text: str) -> None:
    """A line that the test reads at once."""
    print(text, flush=True)


def end(how: str) -> None:
    """End while a key is held."""
    say("held")
    if how == "raise":
        raise RuntimeError("on purpose")
    if how == "exit":
        sys.exit(5)
    if how == "pipe":
        time.sleep(0.2)
        while True:
            say("x" * 1000)
    if how == "sleep":
        time.sleep(60)


def blocking(how: str) -> None:
    """In the main thread."""
    with KeyPool(URL, timeout=30) as pool, pool.lease(owner="program"):
        end(how)


def bare(how: str) -> None:
    """Without closing the pool, or even naming it."""
    with KeyPool(URL, timeout=30).lease(owner="program"):
        end(how)


def thread(how: str) -> None:
    """In a daemon thread, which is cut off when the main thread ends."""
    held = threading.Event()

    def hold() -> None:
        with KeyPool(URL, timeout=30).lease(owner="program"):
            held.set()
            time.sleep(60)

    threading.Thread(target=hold, daemon=True).start()
    held.wait(30)
    end(how)


def waiting(how: str) -> None:
    """Waits for a key that doesn't come."""
    with KeyPool(URL, timeout=30) as pool:
        say("held")
        with pool.lease(wait=None):
            pass


def forked(how: str) -> None:
    """A child that leaves the `with` of its parent's lease doesn't give the parent's key back."""
    with KeyPool(URL, timeout=30) as pool, pool.lease() as key:
        pool.stats()
        child = os.fork()
        if child == 0:
            assert key.secret
            assert pool.stats().blocked == 1
            sys.exit(0)
        _, status = os.waitpid(child, 0)
        assert status == 0, status
        stats = pool.stats()
        say(f"blocked {stats.blocked} unblocked {stats.unblocked}")


async def _asynchronous(how: str, held: asyncio.Event | None = None) -> None:
    async with AsyncKeyPool(URL, timeout=30) as pool, pool.lease(owner="program"):
        if how == "sleep":
            say("held")
            if held is not None:
                held.set()
            await asyncio.sleep(60)
        end(how)


def asynchronous(how: str) -> None:
    """On asyncio's loop."""
    asyncio.run(_asynchronous(how))


def stopped(how: str) -> None:
    """On a loop that is stopped with the task still waiting."""
    loop = asyncio.new_event_loop()
    held = asyncio.Event()
    task = loop.create_task(_asynchronous("sleep", held))
    waiting = {task, loop.create_task(held.wait())}
    loop.run_until_complete(asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED))
    os._exit(1) if task.done() else sys.exit(5)


def on_uvloop(how: str) -> None:
    """On uvloop."""
    import uvloop

    uvloop.run(_asynchronous(how))


if __name__ == "__main__":
    exit_on_sigterm()
    globals()[sys.argv[1]](sys.argv[2])
