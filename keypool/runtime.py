"""What the interpreter must not do behind the server's back.

A full garbage collection visits every object that there is: with a million keys, for seconds. So the
old generation is never collected. The young ones are, as ever, and what dies by reference count, which is
everything that keypool makes, needs no collector at all (a test holds the code to it). On uvloop, besides, a
cancelled timer is gone, where the stock loop keeps it in a heap that it rebuilds from time to time.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
from collections.abc import Coroutine
from typing import Any, NoReturn

_NEVER = 1 << 30
_log = logging.getLogger("keypool")


def spare_the_old_generation() -> None:
    """Keep full collections from happening, and what exists by now from being visited by any."""
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(max(young, 2000), middle, _NEVER)


def run(main: Coroutine[Any, Any, int]) -> NoReturn:
    """Run the coroutine on uvloop, or where there is none, slower, on the stock loop; exit with its result.

    Raises what it raises. Its result ends the process on the spot: to free a million keys and their timers
    one by one would take seconds that a stop doesn't have.
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
    status = await main
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)
