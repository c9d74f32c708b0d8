"""The start of a server, by `python server.py` and `keypool serve` alike."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence

from keypool.config.limits import SPARE_FILES, allowed_files
from keypool.config.secrets_keys import SECRETS_FILE_VARIABLE, SECRETS_VARIABLE
from keypool.config.settings import OPTIONS, PRINT_CONFIG, Settings, effective_settings, load
from keypool.config.token_sources import FileWatch
from keypool.config.tokens import ROLES, exposed_files, token_variables
from keypool.core.errors import SettingsError, StartError
from keypool.early_exit import open_standard_streams
from keypool.misspelled import CLIENT_VARIABLES, misspelled
from keypool.ops import logs
from keypool.server import runtime
from keypool.server.lifecycle import IGNORED_SIGNALS, Standalone, Worker
from keypool.server.serving import serve
from keypool.server.supervisor import Supervisor

_BROKEN_PIPE = 128 + 13  # the status that a shell reports for SIGPIPE
_log = logging.getLogger("keypool")


def main(argv: Sequence[str], program: str = "python server.py") -> int:
    """Serve until a signal. Exit status 0 after a stop, 1 if it can't start, 2 for a wrong setting.

    `program` is the program's name in --help.
    """
    open_standard_streams()
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    try:
        settings = load([word for word in argv if word != PRINT_CONFIG], os.environ, program)
        if PRINT_CONFIG in argv:
            print(effective_settings(settings), flush=True)
            return 0
        _require_files()
        logs.configure(settings.log_level, settings.log_format)
        _warn(settings)
        runtime.spare_the_old_generation()
        if settings.processes > 1:
            return _serve_in_workers(settings)
        runtime.run(serve(settings, Standalone()))
    except SettingsError as error:
        return _fail(error, 2)
    except StartError as error:
        return _fail(error, 1)
    except BrokenPipeError:  # of --help or --print-config
        # Otherwise the interpreter's own flush at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _BROKEN_PIPE


def _require_files() -> None:
    allowed = allowed_files(SPARE_FILES)
    if allowed < SPARE_FILES:
        raise StartError(
            f"the system allows {allowed} open files, and the server needs {SPARE_FILES} beside its connections: "
            "raise the limit (ulimit -n)"
        )


def _warn(settings: Settings) -> None:
    """Warn about settings that are valid but probably a mistake."""
    known = [option.variable for option in OPTIONS]
    known += [variable for role in ROLES for variable in token_variables(role)]
    known += [SECRETS_VARIABLE, SECRETS_FILE_VARIABLE]
    for line in misspelled(os.environ, [*known, *CLIENT_VARIABLES]):
        _log.warning("%s", line)
    files = settings.token_sources(os.environ).files
    if path := os.environ.get(SECRETS_FILE_VARIABLE):
        files[SECRETS_FILE_VARIABLE] = path
    for line in exposed_files(files):
        _log.warning("%s", line)
    named_admin = any(token.role == "admin" for token in settings.named_tokens)
    if not (settings.open or settings.admin_tokens or named_admin):
        _log.warning(
            "there is no admin token, so nobody can generate keys: set %s or %s, or give one in the file of --tokens",
            *token_variables("admin"),
        )


def _serve_in_workers(settings: Settings) -> int:
    sources = settings.token_sources(os.environ)
    file = None if sources.path is None else FileWatch(sources.path)

    def reload() -> bool:
        """Read the tokens for the workers to come. Whether the present ones have to read them, and to log errors."""
        nonlocal settings
        before = settings
        if file is not None:
            file.reading()
        try:
            settings = settings.with_tokens(sources.read())
        except SettingsError:
            return True
        return settings != before

    def watch() -> bool:
        return file is not None and file.changed() and reload()

    def serve_one(worker: Worker) -> int:
        try:
            runtime.run(serve(settings, worker))
        except StartError as error:
            return _fail(error, 1)

    supervisor = Supervisor(
        settings.processes,
        settings.address,
        drain_seconds=settings.drain_seconds,
        serve=serve_one,
        reload=reload,
        watch=watch,
        environ=os.environ,
    )
    return supervisor.run(settings.port)


def _fail(error: StartError, status: int) -> int:
    # Through the log's writer: the line comes after those of the log, and an unread pipe can't block the exit.
    logs.STDERR.put(f"keypool: {error}\n".encode(errors="backslashreplace"))
    logs.STDERR.flush()
    return status
