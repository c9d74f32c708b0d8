"""Keeping keys alive, without any I/O: which keys are due, what an answer means, when the next round is.

A round sends every key once, in batches of a thousand, at a third of the keepalive time: two rounds may fail
before a key dies. How long that time is, the server says, in its answer to the keepalive of a single key: so
the first round has one call more. The pause is shortened at random by up to a tenth, so that many keepers
don't fall into step. A round that failed is tried again soon, with growing pauses, for as long as it takes.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Generator, Iterable

from keypool.client import calls
from keypool.client.calls import Call
from keypool.client.errors import KeyPoolError, UnknownKey
from keypool.client.retry import Retry
from keypool.client.shapes import Done, KeptAlive, KeyLike

OnDead = Callable[[str], object]
OnError = Callable[[KeyPoolError], object]

log = logging.getLogger("keypool.client")

Told = Done | KeptAlive | KeyPoolError
Asked = Generator[Call[Done] | Call[KeptAlive], Told, None]


class Rounds:
    """The keys of one keeper. Not for use by two threads at once, but for `add`, `discard` and reading."""

    def __init__(
        self,
        keys: Iterable[KeyLike],
        on_dead: OnDead | None,
        on_error: OnError | None,
        keepalive_seconds: float | None,
    ) -> None:
        self.keys = dict.fromkeys(calls.text(key) for key in keys)
        self.fresh: dict[str, None] = {}
        self.keepalive_seconds = keepalive_seconds
        self.error: KeyPoolError | None = None
        self._on_dead = on_dead
        self._on_error = on_error
        self._failures = 0
        self._pauses = Retry(first=0.2, most=5.0)

    def add(self, key: KeyLike) -> None:
        """Keep one more alive, from the next moment on."""
        text = calls.text(key)
        self.keys[text] = self.fresh[text] = None

    def discard(self, key: KeyLike) -> None:
        """Leave one to itself, if it is kept."""
        text = calls.text(key)
        self.keys.pop(text, None)
        self.fresh.pop(text, None)

    def round(self) -> Asked:
        """The calls of a round; each is to be answered with its result, or the error that it ended with.

        A generator, so that the same rounds are driven by a thread and by a task.
        """
        self.fresh.clear()
        return self._send(list(self.keys))

    def fresh_round(self) -> Asked:
        """The same for the keys that were added since."""
        fresh = list(self.fresh)
        self.fresh.clear()
        return self._send(fresh)

    def pause(self) -> float | None:
        """Seconds to the next round after one is over, None if there is nothing to do."""
        if self.error is not None:
            longest = self._third() / 4
            return min(longest, self._pauses.pause(self._failures))
        return self._third() * random.uniform(0.9, 1.0) if self.keys else None  # noqa: S311 - see the module

    def _third(self) -> float:
        return (300.0 if self.keepalive_seconds is None else self.keepalive_seconds) / 3

    def _send(self, keys: list[str]) -> Asked:
        error: KeyPoolError | None = None
        for part in calls.parts(keys):
            answer = yield calls.keepalive_batch(part)
            if isinstance(answer, Done):
                self._bury(answer.unknown)
            elif isinstance(answer, KeyPoolError):
                error = answer
                break
        while error is None and self.keepalive_seconds is None and self.keys:
            error = yield from self._learn(next(iter(self.keys)))
        self._note(error)

    def _learn(
        self, key: str
    ) -> Generator[Call[KeptAlive], Done | KeptAlive | KeyPoolError, KeyPoolError | None]:
        answer = yield calls.keepalive(key)
        if isinstance(answer, KeptAlive):
            self.keepalive_seconds = answer.expires_in
        elif isinstance(answer, UnknownKey):
            self._bury([key])
        elif isinstance(answer, KeyPoolError):
            return answer
        return None

    def _bury(self, dead: Iterable[str]) -> None:
        for key in dead:
            if key in self.keys:
                self.discard(key)
                self._report(self._on_dead, key)

    def _note(self, error: KeyPoolError | None) -> None:
        self.error = error
        self._failures = 0 if error is None else self._failures + 1
        if error is not None and self._on_error is not None:
            self._report(self._on_error, error)
        elif self._failures == 1:
            log.warning("keepalive failed, trying on: %s", error)

    def _report(self, callback: Callable[..., object] | None, about: object) -> None:
        if callback is None:
            return
        try:
            callback(about)
        except Exception:
            log.exception("a callback of the keeper failed")
