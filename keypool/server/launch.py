"""Starting a server: what `python server.py` and `keypool serve` both do."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace

from keypool.config import effective_settings as in_force
from keypool.config.limits import SPARE_FILES, allowed_files
from keypool.config.settings import OPTIONS, Settings, load
from keypool.config.tokens import ROLES, exposed_files, read_tokens, token_variables
from keypool.core.errors import SettingsError, StartError
from keypool.misspelled import CLIENT_VARIABLES, misspelled
from keypool.ops import logs
from keypool.server import runtime
from keypool.server.processes import Group
from keypool.server.serving import serve
from keypool.server.supervision import IGNORED_SIGNALS, Alone, Member

_BROKEN_PIPE = 128 + 13  # as a shell reports a program that SIGPIPE ended
_log = logging.getLogger("keypool")


def main(argv: Sequence[str], program: str = "python server.py") -> int:
    """Serve until told to stop. Exit status 0 after a stop, 1 if it can't start, 2 for a wrong setting.

    `program` is what --help calls it.
    """
    open_standard_streams()
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    try:
        settings = load([word for word in argv if word != in_force.FLAG], os.environ, program)
        if in_force.FLAG in argv:
            print(in_force.in_force(settings), flush=True)
            return 0
        _require_files()
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
    except BrokenPipeError:  # --help or --print-config, whose reader has gone
        # Or the interpreter would fail at it once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _BROKEN_PIPE


def open_standard_streams() -> None:
    """Have 0, 1 and 2 lead nowhere if they are closed, or the next file that is opened would get that number.

    Then log lines would go into a socket or the data file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free, so this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 - for good


def _require_files() -> None:
    allowed = allowed_files(SPARE_FILES)
    if allowed < SPARE_FILES:
        raise StartError(
            f"the system allows {allowed} open files, and the server takes {SPARE_FILES} beside its connections: "
            "raise the limit (ulimit -n)"
        )


def _warn(settings: Settings) -> None:
    """Warn about what is allowed and yet hardly meant."""
    known = [option.variable for option in OPTIONS]
    known += [variable for role in ROLES for variable in token_variables(role)]
    for line in misspelled(os.environ, [*known, *CLIENT_VARIABLES]):
        _log.warning("%s", line)
    for line in exposed_files(os.environ):
        _log.warning("%s", line)
    if not (settings.open or settings.admin_tokens):
        _log.warning(
            "there is no admin token, so nobody can generate keys: set %s or %s", *token_variables("admin")
        )


def _serve_together(settings: Settings) -> int:
    def reload() -> None:
        nonlocal settings
        with contextlib.suppress(SettingsError):  # the processes log it
            tokens = read_tokens(os.environ)
            client, viewer, admin = (tokens.get(role, ()) for role in ROLES)
            settings = replace(settings, client_tokens=client, viewer_tokens=viewer, admin_tokens=admin)

    def serve_one(member: Member) -> int:
        try:
            runtime.run(serve(settings, member))
        except StartError as error:
            return _fail(error, 1)

    return Group(
        settings.processes,
        settings.address,
        settings.port,
        settings.drain_seconds,
        serve_one,
        os.environ,
        reload,
    ).run()


def _fail(error: StartError, status: int) -> int:
    # As the log's lines are written, so that this one stands behind them and none of them blocks the exit.
    logs.STDERR.put(f"keypool: {error}\n".encode(errors="backslashreplace"))
    logs.STDERR.flush()
    return status
