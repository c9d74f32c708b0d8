"""The results of a batch that takes several calls, put together; and kept, if one of the calls fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from keypool.client.calls import MOST_ITEMS
from keypool.client.errors import KeyPoolError, NoKeyAvailable
from keypool.client.shapes import Done

T = TypeVar("T")
Keys = TypeVar("Keys", bound=list[Any])


class Gather(Generic[T]):
    """A result that grows. `count` is how many items are in it, known or not."""

    def __init__(
        self, empty: T, join: Callable[[T, T], T], size: Callable[[T], int], wanted: int = 0
    ) -> None:
        self.result = empty
        self.count = 0
        self.complete = False
        self._join = join
        self._size = size
        self._wanted = wanted

    def add(self, part: T) -> None:
        """The result of one more call."""
        self.result = self._join(self.result, part)
        self.count += self._size(part)
        # Fewer keys than asked for: the next call would find none, or one that was freed this moment.
        self.complete = bool(self._wanted) and self._size(part) < MOST_ITEMS

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """What goes wrong inside tells what had been done before; nothing more to be had is no error then."""
        try:
            yield
        except NoKeyAvailable:
            if not self.count:
                raise
            self.complete = True
        except KeyPoolError as error:
            error.partial = self.result
            raise


def gather_lists(kind: type[Keys], wanted: int = 0) -> Gather[Keys]:
    """Lists of keys, one after the other."""
    return Gather(kind(), lambda whole, part: kind([*whole, *part]), len, wanted)


def gather_done() -> Gather[Done]:
    """Counts and lists of what was not done, added up."""
    return Gather(Done(0, []), _join, lambda done: done.done + len(done.unknown) + len(done.stale))


def _join(whole: Done, part: Done) -> Done:
    return Done(
        whole.done + part.done,
        [*whole.unknown, *part.unknown],
        [*whole.stale, *part.stale],
        whole.repeated or part.repeated,
    )
