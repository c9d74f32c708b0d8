"""`keypool migrate --from PLACE --to PLACE`: a pool moves from a data file to Valkey, or back.

It talks to no server: it opens both places itself, while no server has either. So it needs the server's packages, and
stands beside the command instead of in it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from keypool.cli.output import Output
from keypool.cli.progress import Progress
from keypool.cli.status import CommandError, Status

if TYPE_CHECKING:
    from keypool.engine.moving import Moved, Source, Target


def migrate(args: argparse.Namespace) -> Status:
    """Move a pool; print what was moved. Raises CommandError."""
    try:
        # One end is always in Valkey. Both need packages that the command alone doesn't.
        from keypool.engine import moving, moving_valkey  # noqa: F401, PLC0415
        from keypool.errors import SettingsError, StartError  # noqa: PLC0415
    except ImportError as error:
        raise CommandError(
            f"migrate needs the package {error.name}: it is in requirements.txt, and in keypool-service[server]",
            Status.FAILED,
        ) from None
    args.source, args.target = _place(args.source), _place(args.target)
    if _is_url(args.source) == _is_url(args.target):
        raise CommandError(
            "migrate takes a data file on one side and valkey://HOST:PORT/DB (or valkey+cluster://…) on the other",
            Status.USAGE,
        )
    try:
        with _source(args) as source, _target(args) as target, Progress("moving", source.total) as bar:
            moved = _told_what_is_left(lambda: moving.move(source, target, bar), target)
    except KeyboardInterrupt:
        raise CommandError(
            "interrupted before anything was moved: run it again", Status.INTERRUPTED
        ) from None
    except SettingsError as error:
        raise CommandError(str(error), Status.USAGE) from None
    except StartError as error:
        raise CommandError(str(error), Status.FAILED) from None
    fields: dict[str, object] = {"keys": moved.keys, "blocked": moved.blocked}
    fields |= {name: number for name, number in moved.numbers.items() if name != "moment"}
    Output(as_json=args.json, show_keys=False).fields(fields)
    return Status.OK


def _place(word: str) -> str:
    """What a word names: itself, or what the variable holds that it names. Raises CommandError."""
    if not word.startswith("env:"):
        return word
    found = os.environ.get(word.removeprefix("env:"))
    if not found:
        raise CommandError(f"{word} names a variable that isn't set", Status.USAGE)
    return found


def _is_url(place: str) -> bool:
    return "://" in place


@contextlib.contextmanager
def _source(args: argparse.Namespace) -> Iterator[Source]:
    from keypool.engine import moving  # noqa: PLC0415

    made: Source
    if _is_url(args.source):
        from keypool.engine.moving_valkey import ValkeySource  # noqa: PLC0415

        made = ValkeySource(args.source)
    else:
        made = moving.FileSource(Path(args.source))
    with contextlib.closing(made):
        yield made


@contextlib.contextmanager
def _target(args: argparse.Namespace) -> Iterator[Target]:
    from keypool.engine import moving  # noqa: PLC0415

    made: Target
    if _is_url(args.target):
        from keypool.engine.moving_valkey import ValkeyTarget  # noqa: PLC0415

        made = ValkeyTarget(args.target, args.partitions, clear=args.clear)
    else:
        made = moving.FileTarget(Path(args.target))
    with contextlib.closing(made):
        yield made


def _told_what_is_left(do: Callable[[], Moved], target: Target) -> Moved:
    """Have what was broken off say what to do about what it left. Raises CommandError."""
    from keypool.errors import StartError  # noqa: PLC0415

    try:
        return do()
    except KeyboardInterrupt:
        raise CommandError(f"interrupted; {target.unfinished}", Status.INTERRUPTED) from None
    except StartError as error:
        raise CommandError(f"{error}; {target.unfinished}", Status.FAILED) from None
