"""The data file as a name on the disk: who holds it, what stands beside it, and how it gets its name."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from pathlib import Path

from keypool.core.errors import StartError

LOCK_SECONDS = 5.0
"""How long a start waits for a dying predecessor to let go of the file."""

_LOCK_INTERVAL = 0.05
_FOLDER_MODE = 0o700


def hold(path: Path, lock_seconds: float = LOCK_SECONDS) -> int:
    """Lock the file for this server, and make it if there is none (mode 0600). Returns the locking descriptor.

    The lock belongs to the open file, not to the process: whoever inherits the descriptor holds it, too, so the file
    is free when server and writer are both gone. Waits `lock_seconds` for another holder. Raises StartError.
    """
    try:
        _make_folder(path.parent)
        # O_NONBLOCK: opening a pipe by that name would wait for its other end.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise StartError(f"the data file {path} is not a regular file")
    except OSError as error:
        raise StartError(f"can't open the data file {path}: {error.strerror}") from None
    deadline = time.monotonic() + lock_seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise StartError(f"the data file {path} is held by another server") from None
            time.sleep(_LOCK_INTERVAL)
        else:
            return descriptor


def _make_folder(folder: Path) -> None:
    """Make a folder and its parents where they are missing: for their owner alone, whatever the umask."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(_FOLDER_MODE, exist_ok=True)


def release(lock: int) -> None:
    """Let go of a file that `hold` holds."""
    os.close(lock)


def log_of(path: Path) -> Path:
    """SQLite's write-ahead log of a data file: what is committed and not yet in the file itself."""
    return path.with_name(f"{path.name}-wal")


def companions(path: Path) -> list[Path]:
    """The files that SQLite keeps beside a data file in use."""
    return [log_of(path), path.with_name(f"{path.name}-shm")]


def remove(path: Path) -> None:
    """Remove a file, and what SQLite may have left beside it."""
    for each in (path, *companions(path)):
        each.unlink(missing_ok=True)


def clear(path: Path) -> None:
    """Empty a file that is held, and remove what SQLite may have left beside it."""
    os.truncate(path, 0)
    for each in companions(path):
        each.unlink(missing_ok=True)


def rename(path: Path, name: Path) -> None:
    """Give a whole, closed file its name, durably. Raises StartError if there is a file of that name by now."""
    try:
        try:
            os.link(path, name)  # unlike a rename, it replaces nothing
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP) or name.exists():
                raise
            path.rename(name)  # a file system without links
        else:
            path.unlink()
        folder = os.open(name.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StartError(f"the data file {path} can't be renamed to {name}: {error.strerror}") from None
