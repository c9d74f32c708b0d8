"""`keypool backup FILE` and `keypool verify FILE`: copies of a data file, on the machine that has it.

They talk to no server. They need its packages, so they stand beside the command instead of in it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from keypool.cli.output import Output
from keypool.cli.status import CommandError, Status

if TYPE_CHECKING:
    from keypool.engine.durable.copying import Checked


def backup(args: argparse.Namespace) -> Status:
    """Copy the data file that the settings name. Raises CommandError."""

    def do() -> Checked:
        from keypool.config.settings import data_file  # noqa: PLC0415
        from keypool.engine.durable.copying import back_up  # noqa: PLC0415

        words = [f"--{name}={value}" for name in ("data", "config") if (value := getattr(args, name))]
        return back_up(Path(data_file(words, os.environ)), Path(args.file))

    return _say(args, _carefully(do))


def verify(args: argparse.Namespace) -> Status:
    """Check a data file or a copy of one. Raises CommandError."""

    def do() -> Checked:
        from keypool.engine.durable.copying import verify as check  # noqa: PLC0415

        return check(Path(args.file))

    return _say(args, _carefully(do))


def _carefully(do: Callable[[], Checked]) -> Checked:
    from keypool.core.errors import SettingsError, StartError  # noqa: PLC0415

    try:
        return do()
    except SettingsError as error:
        raise CommandError(str(error), Status.USAGE) from None
    except StartError as error:
        raise CommandError(str(error), Status.FAILED) from None


def _say(args: argparse.Namespace, checked: Checked) -> Status:
    if args.json:
        fields = {"file": args.file, "version": checked.version, "keys": checked.keys}
        Output(as_json=True).fields(fields | {"blocked": checked.blocked})
    else:
        keys = f"{checked.keys} key" + "s" * (checked.keys != 1)
        print(f"{args.file} is whole: version {checked.version}, {keys}, {checked.blocked} blocked")
    return Status.OK
