"""The data file in its folder: its lock, the files beside it, and how it gets its name."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from pathlib import Path

from keypool.core.errors import StartError

LOCK_SECONDS = 5.0
"""How long a start waits for a predecessor that is ending to release the file."""

_LOCK_INTERVAL = 0.05
_FOLDER_MODE = 0o700


def hold(path: Path, lock_seconds: float = LOCK_SECONDS) -> int:
    """Lock the file for this server; create it (mode 0600) if it doesn't exist. Returns the locking descriptor.

    The lock belongs to the open file, not to the process: a process that inherits the descriptor holds it, too, so the
    file is free when server and writer are both gone. Blocks up to `lock_seconds` while another server holds it.
    Raises StartError.
    """
    try:
        _make_folder(path.parent)
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise StartError(f"can't open the data file {path}: {error.strerror}") from None
    except ValueError:
        raise StartError(f"the data file {path} is not a regular file") from None
    deadline = time.monotonic() + lock_seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise StartError(f"the data file {path} is held by another server") from None
            time.sleep(_LOCK_INTERVAL)
        except OSError as error:  # a file system without locks, for example
            os.close(descriptor)
            raise StartError(f"can't lock the data file {path}: {error.strerror}") from None
        else:
            return descriptor


def open_regular(path: Path, flags: int) -> int:
    """A descriptor of a regular file; a new one has mode 0600. Raises OSError, ValueError if it is something else."""
    # O_NONBLOCK: if the name is that of a pipe, opening it would wait for the other end.
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is not a regular file")
    return descriptor


def _make_folder(folder: Path) -> None:
    """Create a folder and its missing parents, accessible to their owner only, whatever the umask."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(_FOLDER_MODE, exist_ok=True)


def release(lock: int) -> None:
    """Close the descriptor that `hold` returned. The lock ends when all inherited ones are closed, too."""
    os.close(lock)


def log_of(path: Path) -> Path:
    """SQLite's write-ahead log of a data file: commits that aren't checkpointed into the file yet."""
    return path.with_name(f"{path.name}-wal")


def companions(path: Path) -> list[Path]:
    """The files that SQLite keeps beside a data file in use."""
    return [log_of(path), path.with_name(f"{path.name}-shm")]


def remove(path: Path) -> None:
    """Remove a file and its companions."""
    for each in (path, *companions(path)):
        each.unlink(missing_ok=True)


def clear(path: Path) -> None:
    """Empty a file that is held, and remove its companions."""
    os.truncate(path, 0)
    for each in companions(path):
        each.unlink(missing_ok=True)


def rename(path: Path, name: Path) -> None:
    """Rename a closed file, durably. Raises StartError if a file of that name exists by now."""
    try:
        try:
            os.link(path, name)  # unlike a rename, it replaces nothing
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP) or name.exists():
                raise
            path.rename(name)  # a file system without hard links
        else:
            path.unlink()
        folder = os.open(name.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StartError(f"the data file {path} can't be renamed to {name}: {error.strerror}") from None
