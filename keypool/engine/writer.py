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
from keypool.engine.batches import Batches
from keypool.engine.datafile import Batch

HEADER = struct.Struct("!I")
_NOTHING = Batch()
_encode = msgspec.msgpack.Encoder().encode


class Verdict(msgspec.Struct, array_like=True):
    """What became of a batch: committed, or why not. An empty one asks whether writing is possible."""

    error: str | None = None


class Writer:
    """The one connection that writes. After an error it is closed, and opened anew for the next batch."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None
        self._batches: Batches
        self._failed: str | None = None

    def commit(self, batch: Batch) -> Verdict:
        """Write a batch in one transaction, whole or not at all."""
        error, self._failed = self._failed, None
        try:
            if error is None:
                self._write(self._opened(), batch)
        except sqlite3.Error as failure:
            self._drop()
            error = datafile.line_of(failure)
        return Verdict(error)

    def fold(self) -> None:
        """Bring some of what is committed into the tables. If that fails, the next batch does, which says why."""
        try:
            if self._database is not None:
                self._batches.fold()
        except sqlite3.Error as failure:
            self._drop()
            self._failed = datafile.line_of(failure)

    def close(self) -> None:
        """Close, and so bring all into the tables, and what the log holds into the file."""
        try:
            if self._database is not None:
                self._batches.finish()
        except sqlite3.Error:
            pass  # the batches are there: the next open finds them
        finally:
            self._drop()

    def _opened(self) -> sqlite3.Connection:
        if self._database is None:
            self._database = datafile.connect(self._path)
            self._batches = Batches(self._database)
        return self._database

    def _write(self, database: sqlite3.Connection, batch: Batch) -> None:
        if batch.grace_until is not None:
            self._batches.finish()
            database.execute(datafile.GRANT_GRACE, {"until": batch.grace_until})
            self._batches = Batches(database)
        elif batch == _NOTHING:
            database.execute("BEGIN IMMEDIATE")
            database.execute("COMMIT")
        else:
            self._batches.commit(batch)

    def _drop(self) -> None:
        """Close the connection. A transaction under way is rolled back."""
        database, self._database = self._database, None
        if database is not None:
            try:
                database.close()
            except sqlite3.Error:
                return  # the log holds what the file lacks: the next open finds it


def serve(stream: BinaryIO, writer: Writer) -> None:
    """Answer batches until the socket closes; a frame of length 0 asks for a clean end."""
    decoder = msgspec.msgpack.Decoder(Batch)
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
        answer = _encode(writer.commit(batch))
        stream.write(HEADER.pack(len(answer)) + answer)
        stream.flush()
        writer.fold()  # after the answer: nobody waits for it but who comes next


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
