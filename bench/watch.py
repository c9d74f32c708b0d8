"""Looks over an engine's shoulder: when it releases and purges, and what calls see of it.

`Watch` hears of every change as the engine does, and knows the deadline that each was due at. `Front` asks for
keys whose deadline has just passed, or is about to, and holds the answer against the clock.
"""

from __future__ import annotations

from collections import deque
from itertools import islice

from keypool.core.errors import UnknownKey
from keypool.core.events import Change
from keypool.core.keys import Key, State
from keypool.engine.embedded import EmbeddedEngine

TOLERANCE = 0.005
"""Seconds before its deadline that a key may be released or purged."""

_ASKED = 5  # keys on each side of the front, each time


class Watch:
    """Notes how late each change of one kind was: RELEASED or EXPIRED."""

    def __init__(self, engine: EmbeddedEngine, change: Change) -> None:
        self.deadlines: dict[int, float] = {}
        """By id: what is due, of the change that is watched."""
        self.done: dict[int, float] = {}
        """By id: the deadline of the latest such change that has come."""
        self.lateness: list[float] = []
        self.wrong: list[str] = []
        self.texts: dict[int, str] = {}
        self.change = change
        self._now = engine.now
        self._tell = engine.pool.on_change
        engine.pool.on_change = self._changed

    def expect(self, key: Key, deadline: float) -> None:
        """Look after a key that was restored, and so not announced."""
        self.deadlines[key.id] = deadline
        self.texts[key.id] = key.text

    def still_stands(self, id: int, deadline: float) -> bool:
        """Whether this deadline of a key is ahead or has passed, rather than moved or made void."""
        return self.deadlines.get(id, self.done.get(id)) == deadline

    def pending_before(self, deadline: float) -> int:
        """How many changes that were due by then haven't come."""
        return sum(due <= deadline for due in self.deadlines.values())

    def _changed(self, change: Change, key: Key, owner: str | None) -> None:
        self._tell(change, key, owner)
        if change is self.change:
            due = self.deadlines.pop(key.id)
            self.lateness.append(self._now() - due)
            self.done[key.id] = due
        elif change is Change.ACQUIRED and self.change is Change.RELEASED:
            assert key.release_deadline is not None
            if key.id in self.deadlines:
                self.wrong.append(f"key {key.id} was served while it was blocked")
            self.deadlines[key.id] = key.release_deadline
        elif change in (Change.GENERATED, Change.KEPT_ALIVE) and self.change is Change.EXPIRED:
            self.deadlines[key.id] = key.expires_deadline
        elif change is Change.DELETED or (change is Change.UNBLOCKED and self.change is Change.RELEASED):
            self.deadlines.pop(key.id, None)
        self.texts[key.id] = key.text


class Front:
    """Asks for keys around the moment of their deadline: those that the watch knows by now."""

    def __init__(self, engine: EmbeddedEngine, watch: Watch) -> None:
        self.asked = 0
        self.wrong: list[str] = []
        self._engine = engine
        self._watch = watch
        self._coming = deque(sorted(watch.deadlines.items(), key=lambda pair: pair[1]))
        self._passed: deque[tuple[int, float]] = deque(maxlen=_ASKED)
        self.first, self.last = self._coming[0][1], self._coming[-1][1]

    async def ask(self) -> None:
        """Ask for the keys next to the front, on both sides."""
        now = self._engine.now()
        while self._coming and self._coming[0][1] <= now:
            self._passed.append(self._coming.popleft())
        for id, deadline in [*self._passed, *islice(self._coming, _ASKED)]:
            if self._watch.still_stands(id, deadline):
                await self._ask(id, deadline)

    async def _ask(self, id: int, deadline: float) -> None:
        before = self._engine.now()
        try:
            row = await self._engine.get(self._watch.texts[id])
            here = row.state is State.BLOCKED or self._watch.change is Change.EXPIRED
        except UnknownKey:
            here = False
        after = self._engine.now()
        self.asked += 1
        if here and before >= deadline:
            self.wrong.append(f"key {id} was here {before - deadline:.6f} s after its deadline")
        if not here and after < deadline - TOLERANCE:
            self.wrong.append(f"key {id} was gone {deadline - after:.6f} s before its deadline")
