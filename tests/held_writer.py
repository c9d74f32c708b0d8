"""A writer that the test controls, in place of the link to the writer process, and an engine over it.

The test decides when each commit succeeds or fails. `hold_writers` installs it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from engine_support import Call, HeldTimers, Moment, make_engine, turns

from keypool.engine.durable.journal import FileJournal
from keypool.engine.durable.rows import Batch
from keypool.engine.durable.wire import Kind, Verdict

FULL: Final = "database or disk is full"


class Part(Batch, array_like=True):
    """A part of a batch that the next one continues."""


class HeldWriter:
    """Takes the place of the link to the writer process: a batch is kept until the test gives the verdict."""

    def __init__(self, answered: Callable[[Verdict], None], lost: Callable[[], None]) -> None:
        self.dead = False
        self.ended = False
        self.full = False
        self.killed = False
        self.drained: Callable[[], None] = lambda: None
        self.batches: list[Batch] = []
        self.unanswered: asyncio.Queue[Batch] = asyncio.Queue()
        self._answered = answered
        self._lost = lost

    def send(self, kind: Kind, content: bytes = b"") -> None:
        if kind is Kind.LOOK:
            asyncio.get_running_loop().call_soon(self._answered, Verdict())
            return
        shape = Part if kind is Kind.PART else Batch
        batch = msgspec.msgpack.decode(content, type=shape) if content else Batch()
        self.batches.append(batch)
        self.unanswered.put_nowait(batch)

    def answer(self, error: str | None = None) -> Batch:
        """Answer the latest batch: committed, or failed for a reason. Returns the batch."""
        batch = self.unanswered.get_nowait()
        self._answered(Verdict(error))
        return batch

    def answer_all(self) -> None:
        """Answer that a batch of several parts is committed."""
        while isinstance(self.unanswered.get_nowait(), Part):
            pass
        self._answered(Verdict())

    async def batch(self) -> Batch:
        """Wait for the next batch that needs a verdict."""
        batch = await asyncio.wait_for(self.unanswered.get(), 20)
        self.unanswered.put_nowait(batch)
        return batch

    def die(self) -> None:
        """End as if the process had been killed."""
        self.dead = True
        self._lost()

    def kill(self) -> None:
        self.killed = True

    async def end(self) -> None:
        self.dead = self.ended = True

    async def reap(self) -> None:
        self.dead = True


def hold_writers(monkeypatch: pytest.MonkeyPatch) -> list[HeldWriter]:
    """Make journals start held writers in this test. Returns a list of all that they start, in order."""
    started: list[HeldWriter] = []

    class Link:
        @staticmethod
        async def start(
            path: Path, lock: int, answered: Callable[[Verdict], None], lost: Callable[[], None]
        ) -> HeldWriter:
            started.append(HeldWriter(answered, lost))
            return started[-1]

    monkeypatch.setattr("keypool.engine.durable.journal.WriterLink", Link)
    return started


class Held:
    """An engine whose clock, timers and writer the test controls."""

    def __init__(self, writers: list[HeldWriter], **settings: Any) -> None:
        self.clock = Moment()
        self.timers = HeldTimers()
        self.engine = make_engine(self.clock, self.timers, **settings)
        self._writers = writers

    async def open(self) -> Held:
        """Open the journal, so that calls can be made."""
        lock = os.open(os.devnull, os.O_RDONLY)
        engine = self.engine
        self.journal = journal = FileJournal(Path("none"), lock)
        pool_journal = journal.join(0, engine)
        starting = asyncio.ensure_future(journal.open())
        await turns()
        self.writer.answer()
        await starting
        await journal.start(None)
        self.writer.batches.clear()
        engine.journal = pool_journal
        return self

    @property
    def writer(self) -> HeldWriter:
        """The writer that was started last."""
        return self._writers[-1]

    async def commit(self) -> None:
        """Commit batches until nothing is left to write."""
        await turns()
        while not self.writer.unanswered.empty():
            self.writer.answer()
            await turns()

    async def made(self, count: int = 1) -> list[str]:
        """Generate keys, and wait until they are on disk. Returns their texts."""
        call = Call(self.engine.generate(count))
        await self.commit()
        return [key.key for key in call.answer]

    async def acquired(self, owner: str | None = None) -> tuple[str, int]:
        """Acquire a key, and wait until that is on disk. Returns its text and lease."""
        call = Call(self.engine.acquire(owner, 0))
        await self.commit()
        return call.answer.key, call.answer.lease


async def started(writers: list[HeldWriter], count: int) -> None:
    """Wait until the journal has started so many writers."""
    for _ in range(20_000):
        if len(writers) == count:
            return
        await asyncio.sleep(0.001)
    raise AssertionError(f"{len(writers)} writers were started, wanted {count}")


def ids(batch: Batch) -> list[int]:
    """The ids of the keys that a batch writes."""
    return [row[0] for row in batch.rows]


def logged(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    """The lines that the journal logged at this level."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "keypool.journal" and record.levelno == level
    ]


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a coroutine on a loop of its own; errors may be logged."""

    async def main() -> None:
        await asyncio.wait_for(test(), 60)

    asyncio.run(main())
