"""Keeping keys alive, without any I/O: which keys are due, how answers are handled, when the next round is.

A round sends every key once, in batches of a thousand, at a third of the keepalive time: two rounds may fail
before a key expires. That time is in the answer to the keepalive of a single key, so the first round has one
more call. The pause is shortened at random by up to a tenth, so that keepers do not synchronise. A round that
failed is repeated, with growing pauses, until one succeeds; but if the token or the URL is refused, the keeper
stops, as no repetition could help.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from keypool.client import calls
from keypool.client.answers import KeyLike
from keypool.client.attempts import Pause, Steps, result
from keypool.client.errors import (
    Forbidden,
    KeyPoolError,
    MethodNotAllowed,
    NotFound,
    PoolClosed,
    Unauthorized,
    UnknownKey,
    WrongHost,
)
from keypool.client.held import HeldKey
from keypool.client.settings import Retry, Settings, now

OnDead = Callable[[str], object]
OnError = Callable[[KeyPoolError], object]

log = logging.getLogger("keypool.client")

_FINAL = (Unauthorized, Forbidden, WrongHost, NotFound, MethodNotAllowed)


class Rounds:
    """The keys of one keeper. Other threads may call `add` and `discard` and read, while one runs `steps`."""

    def __init__(
        self,
        settings: Settings,
        keys: Iterable[KeyLike] = (),
        on_dead: OnDead | None = None,
        on_error: OnError | None = None,
        keepalive_seconds: float | None = None,
    ) -> None:
        # No retries within a call: rounds are repeated instead, without end.
        self._settings = replace(settings, retry=Retry(0))
        self.keys: dict[str, KeyLike] = {calls.text(key): key for key in keys}
        self.error: KeyPoolError | None = None
        self.keepalive_seconds = keepalive_seconds
        self._fresh: dict[str, None] = {}
        self._on_dead = on_dead
        self._on_error = on_error
        self._failures = 0
        self._pauses = Retry(first=0.2, most=5.0)

    def add(self, key: KeyLike) -> None:
        """Keep another key alive, from now on. O(1)."""
        text = calls.text(key)
        self.keys[text] = key
        self._fresh[text] = None

    def discard(self, key: KeyLike) -> None:
        """Stop keeping a key alive. O(1)."""
        if not isinstance(key, HeldKey):
            self._forget(calls.text(key))
        elif self.keys.get(key._text) is key:  # noqa: SLF001 - its lease may have ended, and another begun
            self._forget(key._text)  # noqa: SLF001

    def steps(self) -> Steps[None]:
        """Rounds and pauses, until the token or the URL is refused. After `add`, the runner ends the pause early."""
        next_at = 0.0
        while not isinstance(self.error, _FINAL):
            due = now() >= next_at
            if due or self._fresh:
                keys = list(self.keys if due else self._fresh)
                self._fresh.clear()
                yield from self._round(keys)
                next_at = now() + self.pause() if due else min(next_at, now() + self.pause())
            else:
                yield Pause(next_at - now() if self.keys else None)

    def pause(self) -> float:
        """Seconds between the end of a round and the next one."""
        third = (300.0 if self.keepalive_seconds is None else self.keepalive_seconds) / 3
        if self.error is not None:
            return min(third / 4, self._pauses.pause(self._failures))
        return third * random.uniform(0.9, 1.0)  # noqa: S311 - see the module

    def _round(self, keys: list[str]) -> Steps[None]:
        error: KeyPoolError | None = None
        began = now()
        try:
            for part in calls.parts(keys):
                self._remove_dead((yield from result(calls.keepalive_part(part), self._settings)).unknown)
            while self.keepalive_seconds is None and self.keys:
                yield from self._read_keepalive_seconds(next(iter(self.keys)))
            self._prolong(keys, began)
        except PoolClosed:
            raise
        except KeyPoolError as failed:
            error = failed
        self._record_outcome(error)

    def _read_keepalive_seconds(self, key: str) -> Steps[None]:
        try:
            self.keepalive_seconds = (yield from result(calls.keepalive(key), self._settings)).expires_in
        except UnknownKey:
            self._remove_dead([key])

    def _prolong(self, keys: Sequence[str], since: float) -> None:
        for text in keys:
            key = self.keys.get(text)
            if isinstance(key, HeldKey) and self.keepalive_seconds is not None:
                key.kept_alive(since + self.keepalive_seconds)

    def _remove_dead(self, dead: Iterable[str]) -> None:
        for text in dead:
            key = self._forget(text)
            if key is not None:
                if isinstance(key, HeldKey):
                    key.died()
                self._report(self._on_dead, text)

    def _forget(self, text: str) -> KeyLike | None:
        self._fresh.pop(text, None)
        return self.keys.pop(text, None)

    def _record_outcome(self, error: KeyPoolError | None) -> None:
        self.error = error
        self._failures = 0 if error is None else self._failures + 1
        if isinstance(error, _FINAL):
            log.error("the keeper stops: %s", error)
        elif self._failures == 1 and self._on_error is None:
            log.warning("keepalive failed, retrying: %s", error)
        if error is not None:
            self._report(self._on_error, error)

    def _report(self, callback: Callable[..., object] | None, about: object) -> None:
        if callback is None:
            return
        try:
            callback(about)
        except Exception:
            log.exception("a callback of the keeper failed")


class KeptKeys:
    """The members that both keepers share. `wake` ends the pause between two rounds."""

    def __init__(self, rounds: Rounds, wake: Callable[[], object]) -> None:
        self._rounds = rounds
        self._wake_up = wake

    @property
    def keys(self) -> list[str]:
        """The texts of the keys that are kept alive, without those that died."""
        return list(self._rounds.keys)

    @property
    def error(self) -> KeyPoolError | None:
        """Why the latest round failed; None if it did not."""
        return self._rounds.error

    def add(self, key: KeyLike) -> None:
        """Keep another key alive, from now on."""
        self._rounds.add(key)
        self._wake_up()

    def discard(self, key: KeyLike) -> None:
        """Stop keeping a key alive, if it is kept."""
        self._rounds.discard(key)
