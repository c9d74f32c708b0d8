"""Empties pools that are deleted for good: what nobody holds at once, in slices, and the rest as its leases end.

The keys are walked by id, so that a key is looked at once, however many are held. From then on a key that is held when
the walk passes it comes back by itself: the pool reports the end of its lease (`Drain._changed`). One loop serves all
pools that are being emptied, so a hundred of them take no more of a turn than one.

The next slice waits until the one before is on disk. Otherwise the commits, which all pools share, would contain
thousands of purges each, and every other call would wait for them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from keypool.core.events import Change, Origin
from keypool.core.keys import DEAD, Key, State
from keypool.engine.embedded import EmbeddedEngine

_SLICE_SECONDS = 0.0015  # of each turn of the loop, in which no other call is served
_KEYS_AT_ONCE = 64  # between two looks at the clock: about 0.2 ms
_RETRY_SECONDS = 0.25  # between two looks whether storage works again
_BLOCKED = State.BLOCKED


class Drain:
    """One pool that is being emptied. `at_once` is whether leases are ended, too."""

    def __init__(
        self, engine: EmbeddedEngine, at_once: bool, origin: Origin, wake: Callable[[], None]
    ) -> None:
        self.engine = engine
        self.at_once = at_once
        self._origin = origin
        self._wake = wake
        self._walked: int | None = 0  # the last id that was looked at; None at the end
        self._freed: deque[Key] = deque()  # whose leases have ended since
        self._report = engine.pool.on_change
        engine.pool.on_change = self._changed

    def end_leases(self) -> None:
        """Purge held keys as well, from now on. O(1)."""
        self.at_once = True
        self._walked = 0
        self._wake()

    def step(self) -> bool:
        """Purge for one slice. Returns whether there is more to do at present."""
        until = self.engine.now() + _SLICE_SECONDS
        delete = self.engine.pool.delete_seat
        while keys := self._next():
            for key in keys:
                if key.expires_deadline != DEAD and (self.at_once or key.state is not _BLOCKED):
                    delete(key, self._origin)
            if self.engine.now() > until:
                return True
        return False

    def _next(self) -> list[Key]:
        if self._freed:
            return [self._freed.popleft() for _ in range(min(len(self._freed), _KEYS_AT_ONCE))]
        if self._walked is None:
            return []
        keys = self.engine.pool.after(self._walked, _KEYS_AT_ONCE)
        self._walked = keys[-1].id if keys else None
        return keys

    def _changed(self, change: Change, key: Key, owner: str | None, origin: Origin) -> None:
        """The listener of the pool: it must not change the pool, so the key is purged in a later turn."""
        self._report(change, key, owner, origin)
        if key.expires_deadline == DEAD:
            if not self.engine.pool.total:
                self._wake()
        elif key.state is not _BLOCKED:
            self._freed.append(key)
            self._wake()


class Drains:
    """All pools that are being emptied. `emptied` is called once with each engine that has no key any more."""

    def __init__(self, emptied: Callable[[EmbeddedEngine], None]) -> None:
        self._emptied = emptied
        self._loop = asyncio.get_running_loop()
        self._drains: dict[EmbeddedEngine, Drain] = {}
        self._turn: asyncio.Handle | None = None
        self._committing = False
        self._closed = False

    def begin(self, engine: EmbeddedEngine, at_once: bool, origin: Origin) -> None:
        """Empty this pool, or end its leases too if it is being emptied already. O(1)."""
        drain = self._drains.get(engine)
        if drain is None:
            self._drains[engine] = Drain(engine, at_once, origin, self._wake)
            self._wake()
        elif at_once and not drain.at_once:
            drain.end_leases()

    def close(self) -> None:
        """Purge no more. A restart goes on."""
        self._closed = True
        if self._turn is not None:
            self._turn.cancel()

    def _wake(self) -> None:
        if self._turn is None and not self._committing and not self._closed:
            self._turn = self._loop.call_soon(self._go_on)

    def _committed(self, commit: object) -> None:
        self._committing = False
        self._wake()

    def _go_on(self) -> None:
        """One slice of one pool; the next pool has the next turn."""
        self._turn = None
        for engine, drain in list(self._drains.items()):
            if not engine.storage_up():  # nothing changes that can't be kept
                self._turn = self._loop.call_later(_RETRY_SECONDS, self._go_on)
                return
            more = drain.step()
            if not engine.pool.total:
                del self._drains[engine]
                self._emptied(engine)
            elif more:
                self._drains[engine] = self._drains.pop(engine)  # to the end
                commit = engine.journal.commit_of_all()
                if commit is None:
                    self._wake()
                else:
                    self._committing = True
                    commit.on_done(self._committed)
                return
