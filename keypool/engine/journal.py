"""What the engine needs of a journal, and the journal of a pool that is kept in memory only.

The engine hands each changed key to `touch`, and before it answers a call it awaits the commit that contains what
the answer tells. The journal of a data file is durable/journal.py; the engine doesn't know it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Mapping
from typing import Protocol

from keypool.core.errors import StorageUnavailable
from keypool.core.keys import Key
from keypool.ops.histogram import Histogram


class Commit(asyncio.Future[None]):
    """Done when a batch of changes is on disk, or has failed: awaiting it may raise StorageUnavailable.

    Hundreds of calls may wait for one commit. A loop handle for each would cost a call a microsecond, and its answer
    one more turn of the loop; so `on_done` callbacks run synchronously, within `finish`, in the order they were added.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._callbacks_on_done: list[Callable[[Commit], object]] = []

    def on_done(self, callback: Callable[[Commit], object]) -> None:
        """Call this with the commit when it is done; in the next turn of the loop if it is already. O(1)."""
        if self.done():
            self.add_done_callback(callback)
        else:
            self._callbacks_on_done.append(callback)

    def finish(self, error: StorageUnavailable | None = None) -> None:
        """The batch is on disk, or has failed. Nothing if that was known already. O(callbacks)."""
        if self.done():
            return
        if error is None:
            self.set_result(None)
        else:
            self.set_exception(error)
            self.exception()  # retrieved, in case nobody waits
        callbacks, self._callbacks_on_done = self._callbacks_on_done, []
        for callback in callbacks:
            try:
                callback(self)
            except Exception as failure:  # must not keep the other calls from their answers
                context = {"message": "a callback of a commit failed", "exception": failure}
                self.get_loop().call_exception_handler(context)


class JournaledEngine(Protocol):
    """What a journal calls on the engine whose keys it keeps."""

    def numbers(self) -> dict[str, int]:
        """The pool's numbers that are kept with each batch: last id and lease, the moment, counters. O(1)."""
        ...

    def suspend_expiry(self) -> None:
        """Purge no key that is alive, until `on_recovered`. May be called again meanwhile. O(1)."""
        ...

    def grant_grace(self) -> Generator[None, None, int]:
        """Extend the lives of keys whose expiry was suspended, yielding between slices.

        Returns the moment until which they live at least, in milliseconds.
        """
        ...

    def on_recovered(self) -> None:
        """Storage works as it should: expire keys and serve waiters again."""
        ...


class Journal(Protocol):
    """Keeps changed keys, so that answers can wait until what they tell is on disk."""

    failing: str | None
    """Why changes can't be kept; None while they can."""

    def require(self) -> None:
        """Raise StorageUnavailable while changes can't be kept: nothing may change then. O(1)."""
        ...

    def unknown_outcome(self) -> StorageUnavailable:
        """The error for a call about a key whose expiry is suspended. O(1)."""
        ...

    def touch(self, key: Key) -> None:
        """This key has changed or was purged: it goes into the next batch. O(1)."""
        ...

    def note(self, notes: Mapping[str, int | None]) -> Commit | None:
        """Keep numbers that are not the pool's own. What to await until they are on disk. O(notes)."""
        ...

    def commit_of(self, id: int) -> Commit | None:
        """What to await before answering about this key; None if all that happened to it is on disk. O(1)."""
        ...

    def commit_of_text(self, text: str) -> Commit | None:
        """The same for a text that no live key has. O(1)."""
        ...

    def commit_of_all(self) -> Commit | None:
        """What to await before answering about the pool as a whole. O(1)."""
        ...

    def histograms(self) -> dict[str, Histogram]:
        """The journal's histograms by metric name."""
        ...

    def measures(self) -> Mapping[str, float | Mapping[str, float]]:
        """The journal's other metrics by full name; of one with a label, by the label's values."""
        ...

    async def close(self) -> None:
        """Write what isn't written yet, and stop. Raises StorageUnavailable if that can't be done."""
        ...


class NullJournal:
    """The journal of a pool in memory: keeps nothing, and nothing waits for it."""

    failing: str | None = None

    def require(self) -> None:
        """Changes are always allowed."""

    def unknown_outcome(self) -> StorageUnavailable:
        """Never asked for: without storage that fails no expiry is suspended."""
        return StorageUnavailable("there is no storage")

    def touch(self, key: Key) -> None:
        """Nothing to keep."""

    def note(self, notes: Mapping[str, int | None]) -> None:
        """Nothing to keep."""

    def commit_of(self, id: int) -> None:
        """Nothing to wait for."""

    def commit_of_text(self, text: str) -> None:
        """Nothing to wait for."""

    def commit_of_all(self) -> None:
        """Nothing to wait for."""

    def histograms(self) -> dict[str, Histogram]:
        """No metrics."""
        return {}

    def measures(self) -> Mapping[str, float | Mapping[str, float]]:
        """No metrics."""
        return {}

    async def close(self) -> None:
        """Nothing is open."""
