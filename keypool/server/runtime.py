"""Garbage collector and event-loop tuning.

A full garbage collection visits every object: with a million keys, for seconds. So the old generation is
never collected; the young generations are. keypool's own objects are all freed by reference count and need no
collector (a test checks that). On uvloop a cancelled timer is freed at once, whereas asyncio's loop keeps it
in a heap that it rebuilds from time to time.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import os
import sys
from collections.abc import Coroutine
from typing import Any, NoReturn

_NEVER = 1 << 30
_COLLECT_SECONDS = 0.05
_MIDDLE_EVERY = 20
_log = logging.getLogger("keypool")


def spare_the_old_generation() -> None:
    """Prevent full collections, and exempt all objects that exist by now from any collection."""
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(max(young, 2000), middle, _NEVER)


def collect_the_young(loop: asyncio.AbstractEventLoop) -> None:
    """Collect the young generations 20 times a second, for as long as the loop runs. At most 0.1 ms each time.

    By default the interpreter collects when allocations exceed frees by a threshold. A steady load frees as many
    objects as it allocates, so survivors would pile up by the hundred thousand and then all be visited at once.
    """
    times = itertools.count(1)

    def collect() -> None:
        gc.collect(1 if next(times) % _MIDDLE_EVERY == 0 else 0)
        loop.call_later(_COLLECT_SECONDS, collect)

    collect()


def run(main: Coroutine[Any, Any, int]) -> NoReturn:
    """Run the coroutine on uvloop, or on asyncio's loop if uvloop is missing; exit with its result.

    Raises what it raises. The process exits without clean-up: freeing a million keys one by one would take seconds.
    """
    try:
        import uvloop  # noqa: PLC0415 - optional
    except ImportError:
        _log.warning("uvloop is not installed: asyncio's loop is slower, and stalls with many keys")
        asyncio.run(_to_the_end(main))
    else:
        uvloop.run(_to_the_end(main))
    raise AssertionError("the process should have ended")


async def _to_the_end(main: Coroutine[Any, Any, int]) -> NoReturn:
    collect_the_young(asyncio.get_running_loop())
    status = await main
    logging.shutdown()
    with contextlib.suppress(OSError):  # nobody reads it any more
        sys.stdout.flush()
    os._exit(status)
