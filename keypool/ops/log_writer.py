"""Log lines on their way to a file descriptor that may not take them.

    put (any thread) -> queue, bounded in bytes -> one daemon thread -> write(2)

A pipe that nobody drains, or a terminal stopped by Ctrl-S, blocks whoever writes to it. Here that is a thread
which does nothing else. Making the descriptor non-blocking instead would make it so for every other program
that shares it, our parent's terminal among them.

A line that finds no room is dropped and counted. From then on all are, until the queue is empty; then one line
says how many it were, so what the log has is whole stretches and each gap is marked where it is.

No lock is held by Python code: a garbage collection may log from anywhere, in the thread as well.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Event, Thread

ROOM = 1 << 20
"""Bytes that wait to be written at most: several thousand lines."""

FLUSH_SECONDS = 1.0

_AT_ONCE = select.PIPE_BUF  # up to here the lines of several processes don't get mixed up in a pipe


class LogWriter:
    """Writes lines to one descriptor. Its thread starts with the first line, after a fork with the first there.

    `notice` makes the line that says how many were dropped.
    """

    def __init__(self, descriptor: int, notice: Callable[[int], bytes], room: int = ROOM) -> None:
        self._descriptor = descriptor
        self.notice = notice
        self._room = room
        self._start_over()
        # What the parent has not written by then, the parent writes.
        os.register_at_fork(after_in_child=self._start_over)

    def _start_over(self) -> None:
        self._queue: SimpleQueue[bytes | Event] = SimpleQueue()
        self._thread: Thread | None = None
        self._put = 0  # bytes; like `_refused` changed by `put` alone, the others by the thread alone
        self._refused = 0  # lines
        self._written = 0
        self._failed = 0
        self._noticed = 0  # refused lines after which lines were taken again
        self._said = 0  # lost lines that a notice has counted

    @property
    def dropped(self) -> int:
        """Lines that were lost since the start: no room for them, or the descriptor refused them."""
        return self._refused + self._failed

    def put(self, line: bytes) -> None:
        """Have a line written, with the line break at its end. Never blocks. Callers take turns."""
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
        """Return when all lines are written, or after so long."""
        if self._thread is not None:
            written = Event()
            self._queue.put(written)
            written.wait(seconds)

    def _start(self) -> None:
        thread = Thread(target=self._run, name="log", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system gives no thread: better a log that may block than none
            self._write_queued(self._queue.get())
        else:
            self._thread = thread

    def _run(self) -> None:
        while True:
            self._write_queued(self._queue.get())

    def _write_queued(self, item: bytes | Event) -> None:
        """Write this and what else is there by now."""
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
            self._say_losses()
        for flush in flushes:
            flush.set()

    def _say_losses(self) -> None:
        noticed = self._refused
        unsaid = noticed + self._failed - self._said
        self._noticed = noticed
        if unsaid and not self._lost(self.notice(unsaid)):
            self._said += unsaid

    def _lost(self, data: bytes) -> int:
        """Write all of it; how many lines could not be."""
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # somebody who shares it has made it non-blocking
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll()
            except OSError:  # closed, nobody there any more, disk full
                return bytes(left).count(b"\n")
        return 0


def _pieces(lines: Sequence[bytes]) -> list[bytes]:
    """The lines joined, as many each time as are written in one go. O(lines)."""
    pieces: list[list[bytes]] = []
    size = 0
    for line in lines:
        if not pieces or size + len(line) > _AT_ONCE:
            pieces.append([])
            size = 0
        pieces[-1].append(line)
        size += len(line)
    return [b"".join(piece) for piece in pieces]
