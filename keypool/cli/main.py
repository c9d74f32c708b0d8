"""The `keypool` command: from words to a command, and from errors to an exit status."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from keypool.cli.status import CommandError, Status, status_of
from keypool.client import KeyPoolError, Refused


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the words ask for, those of the process by default; the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["serve"]:
        return _serve(words[1:])
    from keypool.cli.words import parser  # noqa: PLC0415 - not for serve

    if any(word == "--token" or word.startswith("--token=") for word in _before_command(words)):
        return _fail("a token is never an argument: use KEYPOOL_TOKEN or --token-file", Status.USAGE)
    args = parser().parse_args(words)
    return guarded(lambda: _load(args.do)(args))


def guarded(do: Callable[[], int]) -> int:
    """Run a command; what it raises becomes a line on standard error and an exit status."""
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
    return int(status)


def _said(error: KeyPoolError) -> str:
    if isinstance(error, Refused):
        return f"{error.detail} ({error.code})"
    return f"{error}; it may have happened all the same" if error.may_have_happened else str(error)


def _before_command(words: Sequence[str]) -> Sequence[str]:
    """The words that are keypool's own: what `run` runs may take a --token."""
    return words[: words.index("--")] if "--" in words else words


def _load(name: str) -> Callable[..., Any]:
    """Import a command's function. Raises CommandError if a package that it needs isn't installed."""
    module, _, function = name.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise CommandError(
            f"this command needs the package {error.name}: install keypool-service[server]", Status.FAILED
        ) from None
    return found


def _serve(words: Sequence[str]) -> int:
    try:
        launch = _load("keypool.launch:main")
    except CommandError as error:
        return _fail(str(error), error.status)
    return int(launch(["--log-format=json" if word == "--json" else word for word in words]))


def _fail(line: str, status: Status) -> int:
    print(f"keypool: {' '.join(line.split())}", file=sys.stderr)
    return int(status)


def _silence_stdout() -> None:
    """Nobody reads any more: what is still buffered goes nowhere, instead of failing again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
