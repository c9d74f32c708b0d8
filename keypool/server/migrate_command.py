"""`keypool migrate --from PLACE --to PLACE`: moves all pools from a data file to Valkey, or back, or to another Valkey.

It opens both places itself, while no server uses either. It needs the server's packages, so it is here and not
in keypool/cli/.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from keypool.cli.output import Output, Progress
from keypool.cli.status import CommandError, Status

if TYPE_CHECKING:
    from keypool.engine.migrate.moving import Moved, Source, Target


def migrate(args: argparse.Namespace) -> Status:
    """Move all pools and print what was moved. Raises CommandError."""
    from keypool.core.errors import SettingsError, StartError  # noqa: PLC0415
    from keypool.core.keys import State  # noqa: PLC0415
    from keypool.engine.migrate import moving, moving_valkey  # noqa: F401, PLC0415

    args.source, args.target = _place(args.source), _place(args.target)
    if not (_is_url(args.source) or _is_url(args.target)):
        raise CommandError(
            "migrate takes valkey://HOST:PORT/DB (or valkey+cluster://…) on one side, and a data file or another "
            "Valkey on the other",
            Status.USAGE,
        )
    advice = _Advice("nothing was moved: run it again")
    # An error is one line, printed at the end. Without a handler, warnings would be printed as well.
    logging.getLogger("keypool").addHandler(logging.NullHandler())
    try:
        moved = asyncio.run(_move(args, advice))
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise CommandError(f"interrupted; {advice.text}", Status.INTERRUPTED) from None
    except SettingsError as error:
        raise CommandError(str(error), Status.USAGE) from None
    except StartError as error:
        raise CommandError(str(error), Status.FAILED) from None
    fields: dict[str, object] = {
        "keys": moved.keys,
        "pools": moved.pools + 1,
        **{state: moved.states[state] for state in State},
    }
    fields |= {name: number for name, number in moved.numbers.items() if name != "moment"}
    Output(as_json=args.json).fields(fields)
    return Status.OK


def _place(word: str) -> str:
    """A data file or URL as given, or for env:NAME the value of that variable. Raises CommandError."""
    if not word.startswith("env:"):
        return word
    found = os.environ.get(word.removeprefix("env:"))
    if not found:
        raise CommandError(f"{word} names a variable that isn't set", Status.USAGE)
    return found


def _is_url(place: str) -> bool:
    return "://" in place


@dataclass
class _Advice:
    """What the user should do if the move ends now. It changes while the move goes on."""

    text: str


async def _move(args: argparse.Namespace, advice: _Advice) -> Moved:
    """Move the pool. Raises StartError, SettingsError, CommandError, and CancelledError after a Ctrl-C."""
    from keypool.core.errors import StartError  # noqa: PLC0415
    from keypool.engine.migrate import moving  # noqa: PLC0415

    task = asyncio.current_task()
    assert task is not None
    # asyncio.run's own handler cancels the task inside whatever code the signal interrupts, even while a result is
    # being set; a handler of the loop runs between two callbacks.
    with contextlib.suppress(NotImplementedError):
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)
    source = await _source(args)
    try:
        target = await _target(args)
        advice.text = target.unfinished
        try:
            with Progress("moving", source.total) as bar:
                return await moving.move(source, target, bar)
        except StartError as error:
            raise CommandError(f"{error}; {advice.text}", Status.FAILED) from None
        finally:
            await target.close()
    finally:
        await source.close()


async def _source(args: argparse.Namespace) -> Source:
    from keypool.engine.migrate import moving, moving_valkey  # noqa: PLC0415

    if _is_url(args.source):
        return await moving_valkey.ValkeyPlace.source(args.source, _secrets_keys())
    return moving.FileSource(Path(args.source), _secrets_keys())


async def _target(args: argparse.Namespace) -> Target:
    from keypool.engine.migrate import moving, moving_valkey  # noqa: PLC0415

    if _is_url(args.target):
        return await moving_valkey.ValkeyPlace.target(
            args.target, args.partitions, clear=args.clear, secrets_keys=_secrets_keys()
        )
    return moving.FileTarget(Path(args.target), _secrets_keys())


def _secrets_keys() -> tuple[bytes, ...]:
    """Those of the environment, as for a server. Raises SettingsError."""
    from keypool.config.secrets_keys import read_secrets_keys  # noqa: PLC0415

    return read_secrets_keys(os.environ)
