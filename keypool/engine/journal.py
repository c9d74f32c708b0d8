"""The protocol of journals, and the journal of a pool that is kept in memory only.

The engine hands each changed key to `touch`, and before it answers a call it awaits the commit that contains the
changes that the answer depends on. The journal of a data file is durable/journal.py, which the engine doesn't import.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Mapping
from typing import Protocol

from keypool.core.errors import StorageUnavailable
from keypool.core.keys import Key
from keypool.core.rare_events import RareEvent
from keypool.engine.history import LeaseHistory, MemoryHistory
from keypool.ops.histogram import Histogram


class Commit(asyncio.Future[None]):
    """A future that is done when a batch of changes is on disk; raises StorageUnavailable if the batch has failed.

    Hundreds of calls may wait for one commit. A loop handle for each would cost each call a microsecond, and delay its
    answer by a turn of the loop. So `on_done` callbacks run synchronously, within `finish`, in the order of `on_done`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._callbacks_on_done: list[Callable[[Commit], object]] = []

    def on_done(self, callback: Callable[[Commit], object]) -> None:
        """Call `callback(commit)` when it is done; in the next turn of the loop if it is done already. O(1)."""
        if self.done():
            self.add_done_callback(callback)
        else:
            self._callbacks_on_done.append(callback)

    def finish(self, error: StorageUnavailable | None = None) -> None:
        """Complete the commit: with `error` if it failed. No effect if it is done already. O(callbacks)."""
        if self.done():
            return
        if error is None:
            self.set_result(None)
        else:
            self.set_exception(error)
            self.exception()  # mark it as retrieved, in case nobody awaits it
        callbacks, self._callbacks_on_done = self._callbacks_on_done, []
        for callback in callbacks:
            try:
                callback(self)
            except Exception as failure:  # the other calls must get their answers all the same
                context = {"message": "a callback of a commit failed", "exception": failure}
                self.get_loop().call_exception_handler(context)


class JournaledEngine(Protocol):
    """The methods that a journal calls on the engine whose keys it keeps."""

    def numbers(self) -> dict[str, int]:
        """The numbers that each batch contains: last id and lease, counters, the moment in milliseconds. O(1)."""
        ...

    def suspend_expiry(self) -> None:
        """Purge no key that is alive, until `on_recovered`. May be called again meanwhile. O(1)."""
        ...

    def grant_grace(self) -> Generator[None, None, int]:
        """Extend the lives of keys whose expiry was suspended, yielding between slices.

        Returns the end of the grace in milliseconds: all of them live at least until then.
        """
        ...

    def on_recovered(self) -> None:
        """Storage works again: expire keys and serve waiters."""
        ...


class Journal(Protocol):
    """Makes changes durable, and lets answers wait until the changes that they depend on are on disk."""

    @property
    def history(self) -> LeaseHistory:
        """The leases of the pool that have ended. Those that a change of a key ends are kept with that change."""
        ...

    @property
    def failing(self) -> str | None:
        """The reason why changes can't be kept; None while they can."""
        ...

    def require(self) -> None:
        """Raise StorageUnavailable while changes can't be kept: no call may change anything then. O(1)."""
        ...

    def unknown_outcome(self) -> StorageUnavailable:
        """The error for a call about a key whose expiry is suspended. O(1)."""
        ...

    def touch(self, key: Key) -> None:
        """Put a key that was changed or purged into the next batch. O(1)."""
        ...

    def keep_event(self, event: RareEvent) -> None:
        """Put a rare event that is new or has grown into the next batch. O(1)."""
        ...

    def pause(self) -> None:
        """A call pauses between two slices: until `resume`, its changes are kept only if another call waits. O(1)."""
        ...

    def resume(self) -> None:
        """The call goes on, or has failed. Once for each `pause`. O(1)."""
        ...

    def note(self, notes: Mapping[str, int | None]) -> Commit | None:
        """Keep numbers that are not the pool's own. Returns the commit that contains them. O(notes)."""
        ...

    def commit_of(self, id: int) -> Commit | None:
        """The commit to await before answering about this key; None if all its changes are on disk. O(1)."""
        ...

    def commit_of_text(self, text: str) -> Commit | None:
        """The commit of the purge of the key with this text; None if that is on disk. O(1)."""
        ...

    def commit_of_all(self) -> Commit | None:
        """The commit to await before answering about the pool as a whole; None if all is on disk. O(1)."""
        ...

    def histograms(self) -> dict[str, Histogram]:
        """The journal's histograms, see Engine."""
        ...

    def measures(self) -> Mapping[str, float | Mapping[str, float]]:
        """The journal's other metrics, see Engine."""
        ...

    async def close(self) -> None:
        """Commit all changes, and stop. Raises StorageUnavailable if they can't be committed."""
        ...


class NullJournal:
    """The journal of a pool in memory: it keeps nothing but the history, so no call waits."""

    failing: str | None = None

    def __init__(self) -> None:
        self.history = MemoryHistory()

    def require(self) -> None:
        """Changes are always allowed."""

    def unknown_outcome(self) -> StorageUnavailable:
        """Never called: expiry is suspended only while storage fails."""
        return StorageUnavailable("there is no storage")

    def touch(self, key: Key) -> None:
        """Nothing to keep."""

    def keep_event(self, event: RareEvent) -> None:
        """Nothing to keep."""

    def pause(self) -> None:
        """Nothing to keep."""

    def resume(self) -> None:
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
