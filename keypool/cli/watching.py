"""The commands that go on: stats --watch and keepalive --watch; and both without it."""

from __future__ import annotations

import argparse
import dataclasses
import queue
import sys
import time

from keypool.cli import keys
from keypool.cli.connect import connect
from keypool.cli.output import Output
from keypool.cli.status import Status
from keypool.client import Forbidden, KeyPoolError, Unauthorized, Unreachable

_CLEAR = "\x1b[H\x1b[J"


def stats(args: argparse.Namespace) -> Status:
    """The counts, once or again and again; a server that is away is waited for."""
    output = keys.output_of(args)
    with connect(args) as pool:
        output.fields(dataclasses.asdict(pool.stats()))
        while args.watch is not None:
            time.sleep(args.watch)
            try:
                now = dataclasses.asdict(pool.stats())
            except Unreachable as error:
                output.note(str(error))
                continue
            if output.terminal and not output.as_json:
                sys.stdout.write(_CLEAR)
            output.fields(now)
    return Status.OK


def keepalive(args: argparse.Namespace) -> Status:
    """Put off expiries, once or on and on."""
    return _keep(args) if args.watch else keys.keepalive(args)


def _keep(args: argparse.Namespace) -> Status:
    """Keep keys alive until the last one is dead; a line for each that dies."""
    output = keys.output_of(args)
    dead: queue.SimpleQueue[str | KeyPoolError] = queue.SimpleQueue()
    named = keys.names(args.keys)

    def say(error: KeyPoolError) -> None:
        if isinstance(error, Unauthorized | Forbidden):
            dead.put(error)  # no repetition can help: the keeper has stopped
        else:
            output.note(f"trying on: {error}")

    with connect(args) as pool, pool.keeper(named, on_dead=dead.put, on_error=say) as keeper:
        output.note(f"keeping {len(keeper.keys)} keys alive")
        while keeper.keys or not dead.empty():
            key = dead.get()
            if isinstance(key, KeyPoolError):
                raise key
            _tell(output, key)
    output.note("no key is left")
    return Status.UNKNOWN_KEY


def _tell(output: Output, key: str) -> None:
    output.line(("event", "key"), {"event": "dead", "key": key})
    sys.stdout.flush()
