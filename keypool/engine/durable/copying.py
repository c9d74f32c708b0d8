"""Backups of a data file that a server may be using, and their verification.

A backup is copied page by page in one read transaction, so it is a snapshot that includes the write-ahead log. It costs
the server no more than reads do, since it rebuilds nothing, as VACUUM INTO does. It is written under a temporary name,
and renamed when it is complete and on disk.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from keypool.core.errors import StartError
from keypool.core.keys import State
from keypool.engine.durable import datafile, file_lock

_READ_AT_ONCE = 5000
_NICE = 10  # the server's two processes take precedence


@dataclass(frozen=True)
class Checked:
    """The format version of a data file or a copy, and its numbers of keys, in all and by state."""

    version: int
    keys: int
    states: dict[str, int]


def back_up(path: Path, copy: Path) -> Checked:
    """Copy a data file, which a server may be using, to a new file (mode 0600), durably. O(size).

    Raises StartError, and leaves no file behind then. Lowers the priority of this process.
    """
    _require_file(path)
    if os.path.lexists(copy):
        raise StartError(f"there is already a file {copy}: a backup replaces no file")
    os.nice(_NICE)
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{copy.name}.", suffix=".part", dir=copy.parent)
    except OSError as error:
        raise StartError(f"can't write to {copy.parent}: {error.strerror}") from None
    os.close(descriptor)
    part = Path(name)
    try:
        _copy_pages(path, part)
        checked = _checked(part)
        file_lock.rename(part, copy)
    finally:
        part.unlink(missing_ok=True)
        part.with_name(f"{part.name}-journal").unlink(missing_ok=True)
    return checked


def _copy_pages(path: Path, part: Path) -> None:
    # Without `immutable=1`, even if the file has no log: a server may start meanwhile.
    source = f"{path.absolute().as_uri()}?mode=ro"
    try:
        with (
            contextlib.closing(sqlite3.connect(source, uri=True)) as reader,
            contextlib.closing(sqlite3.connect(part)) as writer,
        ):
            reader.backup(writer)
    except sqlite3.Error as error:
        raise StartError(f"the data file {path} can't be copied: {datafile.line_of(error)}") from None


def verify(path: Path) -> Checked:
    """Check that a data file or a copy is complete and intact. Changes nothing. O(n log n). Raises StartError."""
    _require_file(path)
    return _checked(path, "integrity_check")


def _checked(path: Path, check: str = "quick_check") -> Checked:
    datafile.examine(path, check)
    found = Counter[str]()
    try:
        for _, keys in datafile.read_keys(path, _READ_AT_ONCE):
            found.update(key.state for key in keys)
    except ValueError as error:
        raise StartError(f"the data file {path} is damaged: {error}") from None
    return Checked(datafile.version_of(path), found.total(), {state: found[state] for state in State})


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise StartError(f"there is no data file {path}")
