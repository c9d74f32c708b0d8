"""Starting a server: what `python server.py` and `keypool serve` both do."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from keypool import in_force, logs, runtime
from keypool.errors import SettingsError, StartError
from keypool.processes import Group
from keypool.serving import serve
from keypool.settings import Settings, load
from keypool.station import Alone, Member
from keypool.tokens import exposed_files, token_variables

_log = logging.getLogger("keypool")


def main(argv: Sequence[str]) -> int:
    """Serve until told to stop. Exit status 0 after a stop, 1 if it can't start, 2 for a wrong setting."""
    try:
        settings = load([word for word in argv if word != in_force.FLAG], os.environ)
        if in_force.FLAG in argv:
            print(in_force.in_force(settings))
            return 0
        logs.configure(settings.log_level, settings.log_format)
        _warn(settings)
        runtime.spare_the_old_generation()
        if settings.processes > 1:
            return _serve_together(settings)
        runtime.run(serve(settings, Alone()))
    except SettingsError as error:
        return _fail(error, 2)
    except StartError as error:
        return _fail(error, 1)


def _warn(settings: Settings) -> None:
    """Say what is allowed and yet hardly meant."""
    for line in exposed_files(os.environ):
        _log.warning("%s", line)
    if not (settings.open or settings.admin_tokens):
        _log.warning(
            "there is no admin token, so nobody can generate keys: set %s or %s", *token_variables("admin")
        )


def _serve_together(settings: Settings) -> int:
    def serve_one(member: Member) -> int:
        try:
            runtime.run(serve(settings, member))
        except StartError as error:
            return _fail(error, 1)

    seconds = settings.drain_seconds
    return Group(settings.processes, settings.address, settings.port, seconds, serve_one, os.environ).run()


def _fail(error: StartError, status: int) -> int:
    print(f"keypool: {error}", file=sys.stderr, flush=True)
    return status
