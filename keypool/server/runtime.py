"""What the interpreter must not do behind the server's back.

A full garbage collection visits every object that there is: with a million keys, for seconds. So the
old generation is never collected. The young ones are, as ever, and what dies by reference count, which is
everything that keypool makes, needs no collector at all (a test holds the code to it). On uvloop, besides, a
cancelled timer is gone, where the stock loop keeps it in a heap that it rebuilds from time to time.
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
    """Keep full collections from happening, and what exists by now from being visited by any."""
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(max(young, 2000), middle, _NEVER)


def collect_the_young(loop: asyncio.AbstractEventLoop) -> None:
    """Collect the young generations 20 times a second, for as long as the loop runs. 0.1 ms a time, or less.

    Left alone, the interpreter does it when allocations exceed frees by a number; where as many objects go as
    come, survivors pile up by the hundred thousand before it does, and then it visits them all at once.
    """
    times = itertools.count(1)

    def collect() -> None:
        gc.collect(1 if next(times) % _MIDDLE_EVERY == 0 else 0)
        loop.call_later(_COLLECT_SECONDS, collect)

    collect()


def run(main: Coroutine[Any, Any, int]) -> NoReturn:
    """Run the coroutine on uvloop, or where there is none, slower, on the stock loop; exit with its result.

    Raises what it raises. Its result ends the process on the spot: to free a million keys one by one
    would take seconds that a stop doesn't have.
    """
    try:
        import uvloop  # noqa: PLC0415 - where there is one
    except ImportError:
        _log.warning("uvloop is not installed: serving on the stock loop, slower, with stalls at many keys")
        asyncio.run(_to_the_end(main))
    else:
        uvloop.run(_to_the_end(main))
    raise AssertionError("the process should have ended")


async def _to_the_end(main: Coroutine[Any, Any, int]) -> NoReturn:
    collect_the_young(asyncio.get_running_loop())
    status = await main
    logging.shutdown()
    with contextlib.suppress(OSError):  # whoever read it has gone
        sys.stdout.flush()
    os._exit(status)
