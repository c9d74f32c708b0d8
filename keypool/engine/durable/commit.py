"""The moment when a batch is on disk, and those who wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context


class Commit(asyncio.Future[None]):
    """A future that may have hundreds of waiters, each of them a call to be answered.

    Who waits by a callback without a context is called in the very turn in which the commit is done, one after the
    other: a handle of the loop for each would cost a call a microsecond, and its answer a turn. Tasks are woken as by
    any future.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._at_once: list[Callable[[Commit], object]] = []

    def add_done_callback(self, fn: Callable[[Commit], object], *, context: Context | None = None) -> None:
        """See `asyncio.Future`."""
        if context is None and not self.done():
            self._at_once.append(fn)
        else:
            super().add_done_callback(fn, context=context)

    def remove_done_callback(self, fn: Callable[[Commit], object]) -> int:
        """See `asyncio.Future`. O(waiters)."""
        left = [callback for callback in self._at_once if callback != fn]
        removed = len(self._at_once) - len(left)
        self._at_once = left
        return removed + super().remove_done_callback(fn)

    def set_result(self, result: None) -> None:
        """See `asyncio.Future`. O(waiters)."""
        super().set_result(result)
        self._tell()

    def set_exception(self, exception: BaseException | type[BaseException]) -> None:
        """See `asyncio.Future`. O(waiters)."""
        super().set_exception(exception)
        self._tell()

    def _tell(self) -> None:
        callbacks, self._at_once = self._at_once, []
        for callback in callbacks:
            try:
                callback(self)
            except Exception as error:  # is nothing that the others should suffer from
                context = {"message": "a callback of a commit failed", "exception": error}
                self.get_loop().call_exception_handler(context)
