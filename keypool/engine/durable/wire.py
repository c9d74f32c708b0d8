"""The wire format between server and writer process.

In both directions, a frame is four bytes of length, one byte of kind, and MessagePack. The server has one request in
flight at a time; every request except END and PART is answered with a VERDICT. A HISTORY may be sent at any time, and
is answered with a PAGE in its turn.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable

import msgspec

from keypool.engine.durable.rows import Past

_HEADER = struct.Struct("!IB")


class Kind(enum.IntEnum):
    """The kinds of frames, each with its content."""

    END = 0  # no content: close the file, and exit
    PROBE = 1  # no content: check that the file can be written
    BATCH = 2  # a Batch (rows.py): commit it together with the parts before it
    PART = 3  # a Batch that the next frame continues
    GRACE = 4  # a moment in milliseconds: let keys that would expire before it live until then
    VERDICT = 5  # a Verdict
    LOOK = 6  # no content: check that the file is still there
    SECRETS = 7  # secrets by name: add them to the file
    REKEYED = (
        8  # the name of a secrets key: all rows are sealed under it, so forget the others and all clear text
    )
    HISTORY = 9  # a HistoryRequest
    PAGE = 10  # a HistoryReply


class Figures(msgspec.Struct, array_like=True):
    """Sizes of the file and its log, and free space on the disk, in bytes."""

    data: int
    log: int
    free: int
    """Free space that this user may use."""


class Verdict(msgspec.Struct, array_like=True):
    """The result of a request. `error` is None, or the reason of a failure. `figures`: at most once a second."""

    error: str | None = None
    figures: Figures | None = None
    postponed: str | None = None
    """Why a REKEYED was not completed now, although nothing is wrong."""


class HistoryRequest(msgspec.Struct, array_like=True):
    """A page of the leases of one key that have ended: up to `count`, before a lease, from a number of an end on."""

    key: int
    """The id of its row."""
    before: int
    count: int
    first: int


class HistoryReply(msgspec.Struct, array_like=True):
    """The latest lease first; or the reason why they can't be read."""

    leases: list[Past] = []
    error: str | None = None


decode_history_request = msgspec.msgpack.Decoder(HistoryRequest).decode
decode_history_reply = msgspec.msgpack.Decoder(HistoryReply).decode
decode_verdict = msgspec.msgpack.Decoder(Verdict).decode
decode_moment = msgspec.msgpack.Decoder(int).decode
decode_secrets = msgspec.msgpack.Decoder(dict[str, bytes]).decode
decode_name = msgspec.msgpack.Decoder(str).decode


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


def take_frames(buffer: bytearray) -> list[tuple[int, bytes]]:
    """Remove the complete frames from a buffer. Returns the kind and content of each."""
    frames: list[tuple[int, bytes]] = []
    while len(buffer) >= _HEADER.size:
        length, kind = _HEADER.unpack_from(buffer)
        end = _HEADER.size + length
        if len(buffer) < end:
            break
        frames.append((kind, bytes(buffer[_HEADER.size : end])))
        del buffer[:end]
    return frames
