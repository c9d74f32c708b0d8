"""The log's lines on their way out: never in anybody's way, in order, and every loss is counted and told."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator

import pytest
from support import eventually

from keypool.ops.log_writer import LogWriter
from keypool.ops.logs import JsonFormatter, QueueingHandler

LINE = b"%05d " + b"x" * 93 + b"\n"
ROOM = 50 * len(LINE % 0)


class Pipe:
    """A pipe of one page, which nobody reads until a test does."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        fcntl.fcntl(self.writing, fcntl.F_SETPIPE_SZ, 4096)
        self.writer = LogWriter(self.writing, lambda count: b"%d dropped\n" % count, room=ROOM)
        self.read = b""

    def read_until(self, ending: bytes) -> list[bytes]:
        """All lines so far, once the last of them ends so."""
        os.set_blocking(self.reading, False)

        def there() -> bool:
            with contextlib.suppress(BlockingIOError):
                self.read += os.read(self.reading, 1 << 16)
            return self.read.endswith(ending)

        eventually(there, f"a log that ends with {ending!r}")
        return self.read.splitlines(keepends=True)

    def close_reading(self) -> None:
        """There is nobody any more who could read."""
        if self.reading >= 0:
            os.close(self.reading)
            self.reading = -1


def wait_until_accounted(pipe: Pipe, sent: int) -> None:
    """Wait until so many lines are there, or counted by a notice."""

    def all_of_them() -> bool:
        return sum(map(accounted, pipe.read_until(b"\n"))) == sent

    eventually(all_of_them, "every line there or counted")


def accounted(line: bytes) -> int:
    """How many of the lines that were put this one stands for."""
    return int(line.split()[0]) if line.endswith(b" dropped\n") else 1


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close_reading()  # which ends a write that waits
    made.writer.flush()
    os.close(made.writing)


def test_a_full_pipe_blocks_nothing_and_the_gap_is_logged_in_its_place(pipe: Pipe) -> None:
    """What had room comes out whole and in order, then how many lines are missing, then what came later."""
    for number in range(1000):
        pipe.writer.put(LINE % number)
    assert pipe.writer.dropped > 0
    lines = pipe.read_until(b" dropped\n")
    kept = len(lines) - 1
    assert lines == [*(LINE % number for number in range(kept)), b"%d dropped\n" % (1000 - kept)]
    assert pipe.writer.dropped == 1000 - kept
    pipe.writer.put(LINE % 1000)
    assert pipe.read_until(LINE % 1000) == [*lines, LINE % 1000]


def test_lost_lines_are_reported_though_none_follows(pipe: Pipe) -> None:
    """However reading and dropping meet: every line is there or counted. A line that is one byte too many, too."""
    sent = 0
    for _ in range(20):
        before = pipe.writer.dropped
        while pipe.writer.dropped == before:
            pipe.writer.put(LINE % sent)
            sent += 1
        wait_until_accounted(pipe, sent)
    assert pipe.writer.dropped >= 20


def test_a_flush_waits_for_a_reader_but_not_for_ever(pipe: Pipe) -> None:
    """What can be written is written by then; where nobody reads it returns all the same."""
    pipe.writer.put(b"read\n")
    pipe.writer.flush()
    assert os.read(pipe.reading, 100) == b"read\n"
    for number in range(100):
        pipe.writer.put(LINE % number)
    began = time.monotonic()
    pipe.writer.flush(0.05)
    assert time.monotonic() - began < 20


def test_a_descriptor_made_non_blocking_by_others_loses_nothing(pipe: Pipe) -> None:
    """Whoever shares a pipe or a terminal may do that: writes are then refused, or done by half."""
    os.set_blocking(pipe.writing, False)
    long = b"y" * (ROOM // 2) + b"\n"
    pipe.writer.put(long)
    pipe.writer.put(b"end\n")
    assert pipe.read_until(b"end\n") == [long, b"end\n"]
    assert pipe.writer.dropped == 0


def test_lines_to_a_closed_pipe_are_counted_and_raise_nothing(pipe: Pipe) -> None:
    """A closed pipe: each line is lost by itself, so a descriptor that works again is written to."""
    pipe.close_reading()
    for number in range(3):
        pipe.writer.put(LINE % number)
    pipe.writer.flush(30)
    assert pipe.writer.dropped == 3


def test_a_forked_child_writes_its_own_lines_and_no_others(pipe: Pipe) -> None:
    """Threads don't survive a fork, nor may what the parent has still to write come twice."""
    for number in range(45):  # more than the pipe takes
        pipe.writer.put(LINE % number)
    if (child := os.fork()) == 0:
        pipe.writer.put(b"child\n")
        pipe.writer.flush(30)
        os._exit(0)
    eventually(lambda: len(pipe.read_until(b"\n")) == 46, "both")
    assert os.waitpid(child, 0)[1] == 0
    assert sorted(pipe.read.splitlines(keepends=True)) == [
        *(LINE % number for number in range(45)),
        b"child\n",
    ]


def test_a_notice_is_in_the_logs_format_and_a_broken_record_is_a_line(pipe: Pipe) -> None:
    """Each line of a JSON log is JSON; no record is worth a traceback on standard error, or an exception."""
    handler = QueueingHandler(pipe.writer, JsonFormatter())
    logger = logging.Logger("test")  # noqa: LOG001 - one that nobody else sees
    logger.addHandler(handler)
    logger.info("%d", "no number")
    for _ in range(1000):
        logger.info("x" * 100)
    lines = [json.loads(line) for line in pipe.read_until(b'in time"}\n')]
    assert "can't be formatted" in lines[0]["message"]
    assert lines[-1]["message"].startswith(f"{pipe.writer.dropped} lines of the log were dropped")
