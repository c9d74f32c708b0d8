"""The file of the charts, beside the data file: what the dashboard draws, so that it goes on after a restart.

It is a MessagePack map from names of pools to bytes, whose form is the dashboard's business (web/kept_charts.py). It is
replaced as a whole, by a rename, and only by the server that holds the data file's lock. It isn't synced: a charts file
that a power failure damages is ignored, and a sync a minute would delay commits to the same disk.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from keypool.engine.durable.file_lock import open_regular

MOST = 64 << 20
"""Bytes in a file that is read, at most: a thousand busy pools have half of it."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(dict[str, bytes]).decode


def beside(path: Path) -> Path:
    """The charts' file of a data file."""
    return path.with_name(f"{path.name}-charts")


def read(path: Path) -> dict[str, bytes]:
    """What is in the file, nothing if it isn't there. Blocks. Raises OSError, and ValueError for another content."""
    try:
        descriptor = open_regular(path, os.O_RDONLY)
    except FileNotFoundError:
        return {}
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(MOST + 1)
    if len(content) > MOST:
        raise ValueError(f"it has more than {MOST >> 20} MiB")
    return _decode(content)


def write(path: Path, charts: Mapping[str, bytes]) -> None:
    """Replace the file (mode 0600). Blocks. Raises OSError, and leaves the file as it was then."""
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)  # of a server that was killed
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_encode(charts))
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
