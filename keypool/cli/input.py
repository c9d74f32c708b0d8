"""Files that commands read, with `-` for standard input."""

from __future__ import annotations

import sys
from pathlib import Path

from keypool.cli.status import CommandError, Status


def read_input(file: str) -> str:
    """The text of a file; bytes that aren't UTF-8 become lone surrogates. Raises CommandError."""
    try:
        if file != "-":
            content = Path(file).expanduser().read_bytes()
        elif hasattr(sys.stdin, "buffer"):
            content = sys.stdin.buffer.read()
        else:
            return sys.stdin.read()
    except (OSError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise CommandError(f"{file} can't be read: {why}", Status.USAGE) from None
    return content.decode("utf-8-sig", "surrogateescape")


def in_words(file: str) -> str:
    """A file as messages name it."""
    return "standard input" if file == "-" else file
