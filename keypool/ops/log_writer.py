"""Writes log lines to a file descriptor that may block, without blocking the server.

    put (any thread) -> queue, bounded in bytes -> one daemon thread -> write(2)

A pipe that nobody reads, or a terminal stopped by Ctrl-S, blocks the writing thread, which does nothing else.
Making the descriptor non-blocking instead would affect every other program that shares it.

A line that doesn't fit into the queue is dropped and counted, and so are all lines after it until the queue
is empty; then one line gives their number. So each gap in the log is marked where it is.

No lock is held by Python code: a garbage collection may log from anywhere, in this thread as well.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Event, Thread

ROOM = 1 << 20
"""Bytes in the queue at most: several thousand lines."""

FLUSH_SECONDS = 1.0

_AT_ONCE = select.PIPE_BUF  # writes up to this size are atomic in a pipe that several processes share


class LogWriter:
    """Writes lines to one descriptor. Its thread starts with the first line, also after a fork.

    `notice` makes the line about dropped lines from their number.
    """

    def __init__(self, descriptor: int, notice: Callable[[int], bytes], room: int = ROOM) -> None:
        self._descriptor = descriptor
        self.notice = notice
        self._room = room
        self._start_over()
        # Lines queued before a fork are written by the parent.
        os.register_at_fork(after_in_child=self._start_over)

    def _start_over(self) -> None:
        self._queue: SimpleQueue[bytes | Event] = SimpleQueue()
        self._thread: Thread | None = None
        self._put = 0  # bytes; like `_refused` changed by `put` alone, the others by the thread alone
        self._refused = 0  # lines
        self._written = 0
        self._failed = 0
        self._noticed = 0  # refused lines after which lines were taken again
        self._reported = 0  # lost lines that a notice has counted

    @property
    def dropped(self) -> int:
        """Lines lost since the start: the queue was full, or the descriptor refused them."""
        return self._refused + self._failed

    def put(self, line: bytes) -> None:
        """Queue a line, with its line break. Never blocks. Not to be called concurrently."""
        waiting = self._put - self._written
        if self._refused != self._noticed or (waiting > 0 and waiting + len(line) > self._room):
            self._refused += 1
            if self._queue.empty():  # the thread may have looked for losses just before this one
                self._queue.put(b"")
            return
        self._put += len(line)
        self._queue.put(line)
        if self._thread is None:
            self._start()

    def flush(self, seconds: float = FLUSH_SECONDS) -> None:
        """Wait until all lines are written, for at most so many seconds."""
        if self._thread is not None:
            written = Event()
            self._queue.put(written)
            written.wait(seconds)

    def _start(self) -> None:
        thread = Thread(target=self._run, name="log", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no thread can be created: write here, although that may block
            self._write_queued(self._queue.get())
        else:
            self._thread = thread

    def _run(self) -> None:
        while True:
            self._write_queued(self._queue.get())

    def _write_queued(self, item: bytes | Event) -> None:
        """Write this item and all that are queued by now."""
        lines: list[bytes] = []
        flushes: list[Event] = []
        while True:
            if isinstance(item, bytes):
                lines.append(item)
            else:
                flushes.append(item)
            if self._queue.empty():
                break
            item = self._queue.get_nowait()
        for piece in _pieces(lines):
            self._failed += self._lost(piece)
            self._written += len(piece)
        if self._queue.empty():
            self._report_losses()
        for flush in flushes:
            flush.set()

    def _report_losses(self) -> None:
        noticed = self._refused
        unreported = noticed + self._failed - self._reported
        self._noticed = noticed
        if unreported and not self._lost(self.notice(unreported)):
            self._reported += unreported

    def _lost(self, data: bytes) -> int:
        """Write all of it; returns how many lines were lost."""
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # another program that shares it has made it non-blocking
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll()
            except OSError:  # closed, reader gone, disk full
                return bytes(left).count(b"\n")
        return 0


def _pieces(lines: Sequence[bytes]) -> list[bytes]:
    """The lines joined into pieces of at most _AT_ONCE bytes, unless one line is longer. O(lines)."""
    pieces: list[list[bytes]] = []
    size = 0
    for line in lines:
        if not pieces or size + len(line) > _AT_ONCE:
            pieces.append([])
            size = 0
        pieces[-1].append(line)
        size += len(line)
    return [b"".join(piece) for piece in pieces]
