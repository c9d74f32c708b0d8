"""A program that holds a key and ends in the way that it is told; run by test_client_leases.py.

Prints `held` when it holds a key, and then ends: by returning, raising, a signal that somebody sends it, writing to a
closed pipe, or in a daemon thread that is cut off.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time

from keypool.client import AsyncKeyPool, KeyPool

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


async def end_async(how: str) -> None:
    """The same on a loop."""
    if how == "sleep":
        say("held")
        await asyncio.sleep(60)
    end(how)


def synchronous(how: str) -> None:
    """In the main thread."""
    with KeyPool(URL, timeout=5) as pool, pool.lease(owner="program"):
        end(how)


def bare(how: str) -> None:
    """Without closing the pool, or even naming it."""
    with KeyPool(URL, timeout=5).lease(owner="program"):
        end(how)


def thread(how: str) -> None:
    """In a daemon thread, which is cut off when the main thread ends."""
    held = threading.Event()

    def hold() -> None:
        with KeyPool(URL, timeout=5).lease(owner="program"):
            held.set()
            time.sleep(60)

    with KeyPool(URL):
        threading.Thread(target=hold, daemon=True).start()
        held.wait(30)
        end(how)


def waiting(how: str) -> None:
    """Waits for a key that doesn't come."""
    with KeyPool(URL, timeout=5) as pool:
        say("held")
        with pool.lease(wait=60):
            pass


def forked(how: str) -> None:
    """A child that leaves the `with` of its parent's lease doesn't give the parent's key back."""
    with KeyPool(URL, timeout=5) as pool, pool.lease() as key:
        pool.stats()
        child = os.fork()
        if child == 0:
            assert str(key)
            assert pool.stats().blocked == 1
            sys.exit(0)
        _, status = os.waitpid(child, 0)
        assert status == 0, status
        stats = pool.stats()
        say(f"blocked {stats.blocked} unblocked {stats.unblocked}")


def disturbed(times: str) -> None:
    """Is sent so many Ctrl-C while it leases one key again and again, and survives each."""
    stop, main_thread = threading.Event(), threading.main_thread().ident
    interrupted = leased = 0
    armed = False

    def interrupt(*_: object) -> None:
        nonlocal armed
        if armed:  # what hits this program's own bookkeeping says nothing about the library
            armed = False
            raise KeyboardInterrupt

    def disturb() -> None:
        pause = 0.001
        while not stop.wait(pause):
            pause = pause * 1.1 if pause < 0.02 else 0.001
            if not stop.is_set():
                signal.pthread_kill(main_thread or 0, signal.SIGINT)

    pool = KeyPool(URL, timeout=5)
    thread = threading.Thread(target=disturb, daemon=True)
    signal.signal(signal.SIGINT, interrupt)
    thread.start()
    while interrupted < int(times):
        try:
            armed = True
            with pool.lease(wait=30):
                leased += 1
            armed = False
        except KeyboardInterrupt:
            interrupted += 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop.set()
    thread.join()
    say(f"{interrupted} {leased}")


async def _asynchronous(how: str) -> None:
    async with AsyncKeyPool(URL, timeout=5) as pool, pool.lease(owner="program"):
        await end_async(how)


def asynchronous(how: str) -> None:
    """On asyncio's loop."""
    asyncio.run(_asynchronous(how))


def stopped(how: str) -> None:
    """On a loop that is stopped with the task still waiting."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(_asynchronous("sleep"))
    loop.run_until_complete(asyncio.wait({task}, timeout=2))
    os._exit(1) if task.done() else sys.exit(5)


def on_uvloop(how: str) -> None:
    """On uvloop."""
    import uvloop

    uvloop.run(_asynchronous(how))


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
