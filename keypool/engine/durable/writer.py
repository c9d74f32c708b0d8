"""The writer process: receives batches from the server over a socket (wire.py), commits them, and confirms each.

It is a process because a transaction in a thread takes the interpreter's lock back for every row, and stalls the loop
(docs/architecture.md has the figures). Its state can be lost: if it dies, the server starts another and repeats the
batch that wasn't confirmed. If the server dies, the kernel kills this process, even a stopped one; on systems other
than Linux the socket closes, and the process exits after the current batch.

It also does the other checks that may wait for the disk, so that the server's loop doesn't: whether the file of that
name is still the one that the server holds, its size, and the free space.

It ignores the signals that a terminal or a service manager sends to a whole process group: the server handles them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from keypool.engine.durable import datafile
from keypool.engine.durable.compaction import BatchLog
from keypool.engine.durable.file_lock import log_of
from keypool.engine.durable.rows import encode
from keypool.engine.durable.wire import (
    Figures,
    HistoryReply,
    HistoryRequest,
    Kind,
    Verdict,
    decode_history_request,
    decode_moment,
    decode_name,
    decode_secrets,
    frame,
    read_frame,
)
from keypool.pdeathsig import end_with_parent

_MEASURED_EVERY = 1.0  # seconds
_CHECK_SECONDS = 0.5  # between two checks of the file's name, of two system calls each
_GONE = (
    "the file by that name isn't the one that this server holds: it was deleted, moved or replaced; put it back, "
    "or restart the server"
)
_LOG_GONE = "its log was deleted or replaced; the commits in it are in the file now"


class Writer:
    """The only connection that writes. After an error it is closed, and the next request opens another.

    `held` is the inherited descriptor of the file. It is never closed here: that would end every lock that this process
    has on the file.
    """

    def __init__(self, path: Path, held: int, check_seconds: float = _CHECK_SECONDS) -> None:
        self._path = path
        self._held = held
        self._log_path = log_of(path)
        self._name, self._log_name = str(path), str(self._log_path)
        self._check_seconds = check_seconds
        self._file = _identity(held)
        self._wal: tuple[int, int] | None = None  # the identity of the write-ahead log
        self._check_at = self._measure_at = 0.0
        self._database: sqlite3.Connection | None = None
        self._marked = False
        self._log: BatchLog
        self._failed: str | None = None
        self._postponed: str | None = None

    def probe(self) -> Verdict:
        """Check that the file can be written, without writing to it."""
        return self._try(self._probe)

    def commit(self, encoded: list[bytes]) -> Verdict:
        """Commit encoded batches in one transaction, all or none."""
        return self._try(lambda database: self._commit(database, encoded))

    def grant(self, until: int) -> Verdict:
        """Let all keys that would expire before `until` (milliseconds) live until then."""
        return self._try(lambda database: self._grant(database, until))

    def add_secrets(self, secrets: dict[str, bytes]) -> Verdict:
        """Add check values of secrets keys."""
        return self._try(lambda database: datafile.add_secrets(database, secrets))

    def rekeyed(self, name: str) -> Verdict:
        """All rows are sealed under the secrets key of this name: forget what was in clear or under others."""
        self._postponed = None
        verdict = self._try(lambda database: self._rekeyed(database, name))
        verdict.postponed = self._postponed
        return verdict

    def look(self) -> Verdict:
        """Check that the file is still there, without writing to it."""
        self._check_at = 0.0
        return self._try(lambda _: None)

    def history(self, request: HistoryRequest) -> HistoryReply:
        """A page of a key's history, as of the last commit."""
        error = self._moved() if self._database is None else None
        if error is None:
            try:
                self._opened()
                return HistoryReply(
                    self._log.history(request.key, request.before, request.count, request.first)
                )
            except sqlite3.Error as failure:
                self._drop()
                error = datafile.line_of(failure)
        return HistoryReply([], error)

    def flush(self, *, idle: bool = False) -> None:
        """Flush some committed rows to the tables. If that fails, the next request fails with the reason."""
        try:
            if self._database is not None and (self._marked or not idle):
                self._mark(self._database)
                self._log.flush(idle=idle)
        except sqlite3.Error as failure:
            self._drop()
            self._failed = datafile.line_of(failure)

    def close(self) -> None:
        """Flush everything to the tables, and close the file, which checkpoints the write-ahead log."""
        try:
            if self._database is not None:
                self._log.flush_all()
        except sqlite3.Error:
            pass  # nothing is lost: the next start reads the batches
        finally:
            self._drop()

    def _try(self, change: Callable[[sqlite3.Connection], None]) -> Verdict:
        error, self._failed = self._failed, None
        now = time.monotonic()
        if error is None and (self._database is None or now >= self._check_at):
            # Always before a connection is opened, since the name may be that of another file by then.
            self._check_at = now + self._check_seconds
            error = self._moved()
        if error is None:
            try:
                change(self._opened())
            except sqlite3.Error as failure:
                self._drop()
                error = datafile.line_of(failure)
        return Verdict(error)

    def _moved(self) -> str | None:
        """The reason why the file or its log isn't the one that was opened; None if it is. A few microseconds."""
        if _identity(self._name) != self._file:
            wrong = _GONE
        elif self._database is not None and _identity(self._log_name) != self._wal:
            wrong = _LOG_GONE
        else:
            return None
        # Checkpoint, so that the held file is complete wherever it is now, and empty the log, which could be mistaken
        # for that of another file of this name. SQLite itself does neither.
        with contextlib.suppress(sqlite3.Error):
            if self._database is not None:
                self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._drop()
        return wrong

    def measured(self) -> Figures | None:
        """Sizes of file and log, and free space; None if they were reported within the last second."""
        now = time.monotonic()
        if now < self._measure_at:
            return None
        self._measure_at = now + _MEASURED_EVERY
        try:
            disk = os.fstatvfs(self._held)
            log = self._log_path.stat().st_size if self._log_path.exists() else 0
            return Figures(os.fstat(self._held).st_size, log, disk.f_bavail * disk.f_frsize)
        except OSError:
            return None

    def _opened(self) -> sqlite3.Connection:
        if self._database is None:
            self._database = datafile.connect(self._path)
            self._marked = False
            self._log = BatchLog(self._database)
            self._wal = _identity(self._log_name)
        return self._database

    def _commit(self, database: sqlite3.Connection, encoded: list[bytes]) -> None:
        if not self._marked:
            # At the first commit: from then on a copy without the log is incomplete. Not before it, because a file that
            # is refused must stay as it is.
            self._mark(database)
            self._marked = True
        self._log.commit(encoded)

    def _mark(self, database: sqlite3.Connection) -> None:
        with contextlib.suppress(OSError):  # a file without the mark works as well
            datafile.mark_in_use(database, self._held)

    @staticmethod
    def _probe(database: sqlite3.Connection) -> None:
        database.execute("BEGIN IMMEDIATE")
        database.execute("COMMIT")

    def _grant(self, database: sqlite3.Connection, until: int) -> None:
        self._log.flush_all()
        database.execute(datafile.GRANT_GRACE, {"until": until})
        self._log = BatchLog(database)

    def _rekeyed(self, database: sqlite3.Connection, name: str) -> None:
        self._log.flush_all()
        self._log = BatchLog(database)
        self._marked = False
        database.execute(datafile.FORGET_HINTS)  # of rare events that were written in clear
        if not datafile.forget_clear_text(database):
            self._postponed = "another program is reading the data file"
            return
        datafile.end_rekey(database, name)

    def _drop(self) -> None:
        """Close the connection, which rolls back an open transaction."""
        database, self._database = self._database, None
        if database is not None:
            try:
                database.close()
            except sqlite3.Error:
                return  # nothing is lost: the next connection reads the log


def _identity(file: str | int) -> tuple[int, int] | None:
    """Device and inode of a file; None if it doesn't exist or isn't accessible."""
    try:
        found = os.stat(file)  # noqa: PTH116 - a descriptor or a name
    except OSError:
        return None
    return found.st_dev, found.st_ino


def serve(stream: BinaryIO, writer: Writer) -> None:
    """Serve requests until an END or the end of the stream."""
    parts: list[bytes] = []
    while (received := read_frame(stream.read)) is not None:
        kind, content = received
        if kind == Kind.END:
            writer.close()
            return
        if kind == Kind.PART:
            parts.append(content)
            continue
        if kind == Kind.HISTORY:
            answer = frame(Kind.PAGE, encode(writer.history(decode_history_request(content))))
        else:
            verdict = _verdict(kind, content, parts, writer)
            verdict.figures = writer.measured()
            answer = frame(Kind.VERDICT, encode(verdict))
        stream.write(answer)
        stream.flush()
        if kind in (Kind.BATCH, Kind.GRACE, Kind.LOOK):
            # After the answer: only the next batch may have to wait for it.
            writer.flush(idle=kind == Kind.LOOK)


def _verdict(kind: int, content: bytes, parts: list[bytes], writer: Writer) -> Verdict:
    """Do what a request asks for. `parts` are those of a batch, which come before it."""
    match kind:
        case Kind.BATCH:
            verdict = writer.commit([*parts, content])
            parts.clear()
            return verdict
        case Kind.GRACE:
            return writer.grant(decode_moment(content))
        case Kind.SECRETS:
            return writer.add_secrets(decode_secrets(content))
        case Kind.REKEYED:
            return writer.rekeyed(decode_name(content))
        case Kind.LOOK:
            return writer.look()
        case _:
            return writer.probe()


def main() -> None:
    """`python -m keypool.engine.durable.writer SOCKET HELD PARENT PATH`: two descriptors, the server's pid, a file."""
    connection_number, held, parent = map(int, sys.argv[1:4])
    # Not between fork and exec: Python code there would make the server copy its whole page table.
    end_with_parent(parent, signal.SIGKILL)()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=connection_number)
    with contextlib.suppress(OSError):  # the server died in the middle of a frame
        serve(connection.makefile("rwb"), Writer(Path(sys.argv[4]), held))  # type: ignore[arg-type]
    # The file isn't closed: that would checkpoint it, which the next start does as well.
    os._exit(0)


if __name__ == "__main__":
    main()
