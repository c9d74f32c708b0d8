"""Running a call's coroutine without a task.

Most calls never wait: they have their answer when the coroutine is first stepped. A task would cost each of
them two more turns of the loop and a microsecond or two. So the coroutine is stepped by hand, and only one
that awaits a future is gone on with when the future is done. It may await futures, nothing that asks for the
current task (asyncio.timeout, locks). A bare yield (`asyncio.sleep(0)`) pauses it: it goes on when its turn comes
beside the connections that have a backlog (http1/turns.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from keypool.engine.journal import Commit
from keypool.http.http1.turns import Turns


class Steps:
    """One coroutine that waits. `done(result, error)` is called once, unless `close` comes first."""

    __slots__ = ("_coroutine", "_done", "_turns", "debt")

    def __init__(
        self,
        coroutine: Coroutine[Any, None, Any],
        done: Callable[[Any, Exception | None], None],
        turns: Turns | None,
    ) -> None:
        self._coroutine: Coroutine[Any, None, Any] | None = coroutine
        self._done = done
        self._turns = turns
        self.debt = 0.0  # see `turns.Served`

    def run(self) -> None:
        """The turn of a paused call has come."""
        self.step()

    def step(self, future: asyncio.Future[Any] | None = None) -> None:
        """Run as far as it gets: to the end, or to the next future that isn't done."""
        if self._coroutine is None:
            return
        try:
            awaited: Any = self._coroutine.send(None)
        except StopIteration as stop:
            self._finish(stop.value, None)
        except Exception as error:  # whatever it is, the caller is answered
            self._finish(None, error)
        else:
            self.wait_for(awaited)

    def wait_for(self, awaited: Any) -> None:
        """Go on when this future is done, which the coroutine has just yielded; if it is None, in a later turn."""
        if awaited is None:
            if self._turns is None:
                asyncio.get_running_loop().call_soon(self.step)
            else:
                self._turns.queue(self, backlog=True)
            return
        awaited._asyncio_future_blocking = False  # noqa: SLF001 - what a task does to say that it has heard
        if type(awaited) is Commit:
            awaited.on_done(self.step)  # in the very turn in which the commit is done
        else:
            awaited.add_done_callback(self.step)

    def close(self) -> None:
        """Nobody wants the answer any more: the coroutine ends where it waits, by GeneratorExit."""
        coroutine, self._coroutine = self._coroutine, None
        if coroutine is not None:
            coroutine.close()

    def _finish(self, result: Any, error: Exception | None) -> None:
        self._coroutine = None
        self._done(result, error)
