"""The keeper of a synchronous client: a background thread that keeps keys alive."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from typing import Any, Self, cast

from keypool.client.caller import Caller
from keypool.client.calls import Call
from keypool.client.errors import KeyPoolError
from keypool.client.retry import Retry
from keypool.client.rounds import Asked, Rounds
from keypool.client.shapes import Done, KeptAlive, KeyLike
from keypool.client.signals import block_all

_running: weakref.WeakSet[Keeper] = weakref.WeakSet()


class Keeper:
    """Keeps keys alive from `start`, or `with`, to `stop`, in one thread with a connection of its own.

    `on_dead(key)` is called in that thread, once for each key that the server doesn't know any more;
    `on_error(error)` after each round that failed, which is tried again until it succeeds. At exit it stops
    by itself. A forked child has no keeper: the parent's goes on.
    """

    def __init__(self, caller: Caller, rounds: Rounds) -> None:
        # No retries below: the rounds have their own, and without end.
        self._caller = caller.apart(Retry(0))
        self._rounds = rounds
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._pid = 0
        self._thread: threading.Thread | None = None

    @property
    def keys(self) -> list[str]:
        """The keys that are kept alive, without those that died."""
        return list(self._rounds.keys)

    @property
    def error(self) -> KeyPoolError | None:
        """Why the latest round failed; None if it didn't."""
        return self._rounds.error

    @property
    def running(self) -> bool:
        """Whether the thread runs, in this process."""
        return self._thread is not None and self._pid == os.getpid() and self._thread.is_alive()

    def add(self, key: KeyLike) -> None:
        """Keep one more alive, from now on."""
        self._rounds.add(key)
        self._wake.set()

    def discard(self, key: KeyLike) -> None:
        """Leave a key to itself, if it is kept."""
        self._rounds.discard(key)

    def start(self) -> Self:
        """Begin, with a round at once. Raises RuntimeError if it was started before."""
        if self._thread is not None:
            raise RuntimeError("a keeper is started once; make another one")
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="keypool keeper", daemon=True)
        _running.add(self)
        self._thread.start()
        return self

    def stop(self) -> None:
        """End, and wait for the thread; a call under way is cut off. May be called again, by any thread."""
        self._stopped.set()
        _running.discard(self)
        if self._thread is None or self._pid != os.getpid():
            return
        self._wake.set()
        self._caller.close()
        if self._thread is not threading.current_thread():
            self._thread.join(self._caller.timeout + 1)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- in the thread

    def _run(self) -> None:
        block_all()
        try:
            self._drive(self._rounds.round())
            next_at = self._next()
            while not self._stopped.is_set():
                self._wait(next_at)
                if self._stopped.is_set():
                    return
                if next_at is not None and time.monotonic() >= next_at:
                    self._drive(self._rounds.round())
                    next_at = self._next()
                elif self._rounds.fresh:
                    self._drive(self._rounds.fresh_round())
                    next_at = self._next() if next_at is None or self.error is not None else next_at
        finally:
            self._caller.close()

    def _next(self) -> float | None:
        pause = self._rounds.pause()
        return None if pause is None else time.monotonic() + pause

    def _wait(self, until: float | None) -> None:
        if not self._rounds.fresh:
            self._wake.wait(None if until is None else max(0.0, until - time.monotonic()))
        self._wake.clear()

    def _drive(self, asked: Asked) -> None:
        try:
            call = next(asked)
            while not self._stopped.is_set():
                answer = self._answer(call)
                if self._stopped.is_set():
                    return
                call = asked.send(answer)
        except StopIteration:
            return

    def _answer(self, call: Call[Done] | Call[KeptAlive]) -> Done | KeptAlive | KeyPoolError:
        try:
            result: Done | KeptAlive = self._caller.call(cast("Call[Any]", call))
        except KeyPoolError as error:
            return error
        return result


@atexit.register
def _stop_all() -> None:
    for keeper in list(_running):
        keeper.stop()
