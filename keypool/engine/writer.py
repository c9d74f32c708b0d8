"""The writer process: takes batches from the server over a socket, commits them, says so.

A process of its own, because a commit in a thread of the server's takes the interpreter's lock back for every
row, and the loop stalls (docs/architecture.md has the figures). It holds nothing worth keeping: when it dies
the server starts another and repeats what wasn't confirmed. When the server dies, the socket closes, and this
process ends with the batch it is at.

On the socket, each way, a frame is four bytes of length and MessagePack: a Batch to here, a Verdict back.
Signals are the server's to handle: this process ignores those that a terminal or a service manager sends to
everybody.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import struct
import sys
from pathlib import Path
from typing import BinaryIO

import msgspec

from keypool.engine import datafile

HEADER = struct.Struct("!I")


class Batch(msgspec.Struct, array_like=True):
    """What goes to the disk together. `rows` are whole keys, `purged` ids, `pool` numbers by name.

    One that says `more` is a part of the batch that the next frame goes on with.
    """

    rows: list[datafile.Row] = []
    purged: list[int] = []
    pool: dict[str, int] = {}
    grace_until: int | None = None
    more: bool = False


class Verdict(msgspec.Struct, array_like=True):
    """What became of a batch: committed, or why not. An empty one asks whether writing is possible."""

    error: str | None = None


class Writer:
    """The one connection that writes. After an error it is closed, and opened anew for the next batch."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None

    def commit(self, batch: Batch) -> Verdict:
        """Write a batch in one transaction, whole or not at all."""
        try:
            if self._database is None:
                self._database = datafile.connect(self._path)
            self._write(self._database, batch)
        except sqlite3.Error as error:
            self.close()
            return Verdict(datafile.line_of(error))
        return Verdict()

    def _write(self, database: sqlite3.Connection, batch: Batch) -> None:
        database.execute("BEGIN IMMEDIATE")
        if batch.grace_until is not None:
            database.execute(datafile.GRANT_GRACE, {"until": batch.grace_until})
        batch.rows.sort()  # by id, as the file has them: a third more rows a second
        database.executemany(datafile.UPSERT, batch.rows)
        database.executemany(datafile.PURGE, [(id,) for id in batch.purged])
        database.executemany(datafile.SET_POOL, batch.pool.items())
        database.execute("COMMIT")

    def close(self) -> None:
        """Close, and so bring what the log holds into the file. A transaction under way is rolled back."""
        database, self._database = self._database, None
        if database is not None:
            try:
                database.close()
            except sqlite3.Error:
                return  # the log holds what the file lacks: the next open finds it


def serve(stream: BinaryIO, writer: Writer) -> None:
    """Answer batches until the socket closes; a frame of length 0 asks for a clean end."""
    decoder, encoder = msgspec.msgpack.Decoder(Batch), msgspec.msgpack.Encoder()
    parts = Batch()
    while len(header := stream.read(HEADER.size)) == HEADER.size:
        (length,) = HEADER.unpack(header)
        if length == 0:
            writer.close()
            return
        body = stream.read(length)
        if len(body) < length:
            return
        batch = decoder.decode(body)
        parts.rows += batch.rows
        parts.purged += batch.purged
        if batch.more:
            continue
        batch.rows, batch.purged, parts = parts.rows, parts.purged, Batch()
        answer = encoder.encode(writer.commit(batch))
        stream.write(HEADER.pack(len(answer)) + answer)
        stream.flush()


def main() -> None:
    """`python -m keypool.engine.writer DESCRIPTOR PATH`: the server starts it so."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    with contextlib.suppress(OSError):  # the server is gone, in the middle of a frame
        serve(connection.makefile("rwb"), Writer(Path(sys.argv[2])))  # type: ignore[arg-type]
    # No closing of the file here: it would take a checkpoint's time, and the next start does it as well.
    os._exit(0)


if __name__ == "__main__":
    main()
