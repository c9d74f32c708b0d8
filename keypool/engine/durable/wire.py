"""The wire format between server and writer process.

Each way, a frame is four bytes of length, one of its kind, and MessagePack. The server has one request under way at a
time; every request but END and PART is answered by a VERDICT.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Iterator

import msgspec

_HEADER = struct.Struct("!IB")


class Kind(enum.IntEnum):
    """What a frame holds."""

    END = 0  # nothing: close the file, and exit
    PROBE = 1  # nothing: can the file be written?
    BATCH = 2  # a Batch (datafile.py): commit it, with the parts before it
    PART = 3  # a Batch that the next frame continues
    GRACE = 4  # a moment in milliseconds: keys that would expire before it live until then
    VERDICT = 5  # a Verdict
    LOOK = 6  # nothing: is the file still there?


class Figures(msgspec.Struct, array_like=True):
    """What was measured of the disk, in bytes."""

    data: int
    log: int
    free: int
    """What is left for this user."""


class Verdict(msgspec.Struct, array_like=True):
    """How a request ended: `error` is None, or why it failed. `figures` come with it once a second at most."""

    error: str | None = None
    figures: Figures | None = None


decode_verdict = msgspec.msgpack.Decoder(Verdict).decode
decode_moment = msgspec.msgpack.Decoder(int).decode


def frame(kind: Kind, content: bytes = b"") -> bytes:
    """A frame as it goes over the socket."""
    return _HEADER.pack(len(content), kind) + content


def read_frame(read: Callable[[int], bytes]) -> tuple[int, bytes] | None:
    """Kind and content of the next frame; None at the end of the stream, even within a frame."""
    header = read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    length, kind = _HEADER.unpack(header)
    content = read(length)
    return (kind, content) if len(content) == length else None


def take_frames(buffer: bytearray) -> Iterator[bytes]:
    """The contents of the whole frames in a buffer, which are removed from it."""
    while len(buffer) >= _HEADER.size:
        end = _HEADER.size + _HEADER.unpack_from(buffer)[0]
        if len(buffer) < end:
            return
        content = bytes(buffer[_HEADER.size : end])
        del buffer[:end]
        yield content
