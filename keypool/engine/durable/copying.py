"""Backups of a data file: made while a server uses it, and verified.

A backup is copied page by page in one read transaction: so it is a snapshot, with what the write-ahead log holds. That
costs the server no more than reads do, since nothing is rebuilt as by VACUUM INTO. It is written under a temporary
name, and renamed when it is whole and on disk.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
from dataclasses import dataclass
from pathlib import Path

from keypool.core.errors import StartError
from keypool.engine.durable import datafile, file_lock

_READ_AT_ONCE = 5000
_NICE = 10  # the server's two processes come first


@dataclass(frozen=True)
class Checked:
    """What a data file or a copy holds."""

    version: int
    keys: int
    blocked: int


def back_up(path: Path, copy: Path) -> Checked:
    """Copy a data file, which a server may have, to a file that isn't there yet (mode 0600), durably. O(size).

    Raises StartError; nothing is left behind then.
    """
    _require_file(path)
    if os.path.lexists(copy):
        raise StartError(f"there is a file {copy} already: a backup replaces none")
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
    # Not by `immutable`, whatever stands beside the file: a server may start meanwhile.
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
    """Prove that a data file or a copy is whole, without changing it. O(n log n). Raises StartError."""
    _require_file(path)
    return _checked(path, "integrity_check")


def _checked(path: Path, check: str = "quick_check") -> Checked:
    datafile.examine(path, check)
    keys = blocked = 0
    try:
        for rows in datafile.read_rows(path, _READ_AT_ONCE):
            keys += len(rows)
            blocked += sum(row[4] is not None for row in rows)
    except ValueError as error:
        raise StartError(f"the data file {path} is damaged: {error}") from None
    return Checked(datafile.version_of(path), keys, blocked)


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise StartError(f"there is no data file {path}")
