"""The entry point of the `keypool` command: dispatches a command, turns errors into an exit status.

Imports are inside functions: they take half a second on a slow machine, and Ctrl-C must not print a traceback
meanwhile. Before and after a command SIGINT has its default action, which ends the process at once.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # as in typing, which takes milliseconds
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name; its exit status.

    Without `argv` they are those of the process, whose signals are then handled as well.
    """
    from keypool.early_exit import open_standard_streams  # noqa: PLC0415 - see the module

    words = sys.argv[1:] if argv is None else list(argv)
    open_standard_streams()
    own_process = argv is None and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    if own_process:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if words[:1] == ["serve"]:
        return _serve(words[1:])
    try:
        try:
            return _run(words, own_process)
        finally:
            if own_process:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
    except KeyboardInterrupt:
        return 130


def _run(words: Sequence[str], own_process: bool) -> int:
    from keypool.cli.arguments import parse  # noqa: PLC0415 - see the module
    from keypool.cli.output import note  # noqa: PLC0415
    from keypool.cli.signal_forwarding import handle_signals  # noqa: PLC0415
    from keypool.cli.status import CommandError, Status, command_error, status_of_run  # noqa: PLC0415
    from keypool.client import KeyPoolError  # noqa: PLC0415

    args: argparse.Namespace | None = None
    try:
        if own_process:
            handle_signals()
        args = parse(words)
        status = _load(args.do)(args)
        sys.stdout.flush()
        return int(status)
    except OSError as error:
        # Otherwise the interpreter would fail at exit to write what is still buffered.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return Status.BROKEN_PIPE
        failure = CommandError(f"the output can't be written: {error.strerror}", Status.FAILED)
    except CommandError as error:
        failure = error
    except KeyPoolError as error:
        failure = command_error(error)
    except ValueError as error:
        failure = CommandError(str(error), Status.USAGE)
    except ImportError as error:
        failure = CommandError(_missing(error), Status.FAILED)
    note(str(failure))
    command = args.command if args is not None else next((word for word in words if word[:1] != "-"), "")
    return status_of_run(failure.status) if command == "run" else failure.status


def _load(name: str) -> Callable[..., Any]:
    import importlib  # noqa: PLC0415

    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def _serve(words: Sequence[str]) -> int:
    from keypool.early_exit import end_quietly  # noqa: PLC0415

    end_quietly()
    try:
        launch = _load("keypool.server.launch:main")
    except ImportError as error:
        print(f"keypool: {_missing(error)}", file=sys.stderr)
        return 1
    words = ["--log-format=json" if word == "--json" else word for word in words]
    return int(launch(words, "keypool serve"))


def _missing(error: ImportError) -> str:
    return f"this command needs the package {error.name}: install keypool-service[server]"
