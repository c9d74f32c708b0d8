"""`keypool backup FILE` and `keypool verify FILE`: copies of a data file, on the machine that has it.

They need the server's packages, though no running server, so they are here and not in keypool/cli/.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from keypool.cli.output import Output
from keypool.cli.status import CommandError, Status

if TYPE_CHECKING:
    from keypool.engine.durable.copying import Checked


def backup(args: argparse.Namespace) -> Status:
    """Copy the data file that the settings name. Raises CommandError."""
    with _command_errors():
        from keypool.config.settings import data_file  # noqa: PLC0415
        from keypool.engine.durable.copying import back_up  # noqa: PLC0415

        words = [f"--{name}={value}" for name in ("data", "config") if (value := getattr(args, name))]
        return _report(args, back_up(Path(data_file(words, os.environ)), Path(args.file)))


def verify(args: argparse.Namespace) -> Status:
    """Check a data file or a copy of one. Raises CommandError."""
    with _command_errors():
        from keypool.engine.durable.copying import verify as check  # noqa: PLC0415

        return _report(args, check(Path(args.file)))


@contextlib.contextmanager
def _command_errors() -> Iterator[None]:
    from keypool.core.errors import SettingsError, StartError  # noqa: PLC0415

    try:
        yield
    except SettingsError as error:
        raise CommandError(str(error), Status.USAGE) from None
    except StartError as error:
        raise CommandError(str(error), Status.FAILED) from None


def _report(args: argparse.Namespace, checked: Checked) -> Status:
    if args.json:
        fields = {"file": args.file, "version": checked.version, "keys": checked.keys}
        Output(as_json=True).fields(fields | checked.states)
    else:
        keys = f"{checked.keys} key" + "s" * (checked.keys != 1)
        states = [f"{number} {state}" for state, number in checked.states.items() if state != "available"]
        print(f"{args.file} is whole: version {checked.version}, {keys}, {', '.join(states)}")
    return Status.OK
