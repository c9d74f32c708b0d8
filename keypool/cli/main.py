"""The `keypool` command: from words to a command, and from errors to an exit status.

What this module needs is imported in its functions: it takes half a second on a slow machine, in which Ctrl-C
would be a traceback.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keypool.client import KeyPoolError

_INTERRUPTED = 130  # Status.INTERRUPTED, before that is imported


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the words ask for, those of the process by default; the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["serve"]:
        return _serve(words[1:])
    try:
        return _run(words)
    except KeyboardInterrupt:
        return _INTERRUPTED


def _run(words: Sequence[str]) -> int:
    from keypool.cli.status import Status  # noqa: PLC0415 - see the module
    from keypool.cli.words import parser  # noqa: PLC0415 - see the module

    if any(word == "--token" or word.startswith("--token=") for word in _before_command(words)):
        return _fail("a token is never an argument: use KEYPOOL_TOKEN or --token-file", Status.USAGE)
    args = parser().parse_args(words)
    return guarded(lambda: _load(args.do)(args))


def guarded(do: Callable[[], int]) -> int:
    """Run a command; what it raises becomes a line on standard error and an exit status."""
    from keypool.cli.status import CommandError, Status, status_of  # noqa: PLC0415 - see the module
    from keypool.client import KeyPoolError  # noqa: PLC0415 - see the module

    try:
        status = do()
        sys.stdout.flush()
    except BrokenPipeError:
        _silence_stdout()
        return Status.BROKEN_PIPE
    except KeyboardInterrupt:
        return Status.INTERRUPTED
    except CommandError as error:
        return _fail(str(error), error.status)
    except KeyPoolError as error:
        return _fail(_said(error), status_of(error))
    except ValueError as error:
        return _fail(str(error), Status.USAGE)
    except ImportError as error:  # commands import what they need when they are asked for
        return _missing(error)
    return int(status)


def _said(error: KeyPoolError) -> str:
    from keypool.client import Refused  # noqa: PLC0415 - see the module

    if isinstance(error, Refused):
        return f"{error.detail} ({error.code})"
    return f"{error}; it may have happened all the same" if error.may_have_happened else str(error)


def _before_command(words: Sequence[str]) -> Sequence[str]:
    """The words that are keypool's own: what `run` runs may take a --token."""
    return words[: words.index("--")] if "--" in words else words


def _load(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def _serve(words: Sequence[str]) -> int:
    from keypool.early_exit import end_quietly  # noqa: PLC0415 - not for other commands

    end_quietly()
    try:
        launch = _load("keypool.server.launch:main")
    except ImportError as error:
        return _missing(error)
    words = ["--log-format=json" if word == "--json" else word for word in words]
    return int(launch(words, "keypool serve"))


def _missing(error: ImportError) -> int:
    """Say which package isn't installed: the client and most commands need none."""
    from keypool.cli.status import Status  # noqa: PLC0415 - see the module

    return _fail(
        f"this command needs the package {error.name}: install keypool-service[server]", Status.FAILED
    )


def _fail(line: str, status: int) -> int:
    print(f"keypool: {' '.join(line.split())}", file=sys.stderr)
    return int(status)


def _silence_stdout() -> None:
    """Nobody reads any more: what is still buffered goes nowhere, instead of failing again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
