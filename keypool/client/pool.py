"""The synchronous client.

    >>> from keypool.client import KeyPool
    >>> with KeyPool("http://127.0.0.1:8888") as pool:
    ...     with pool.lease(wait=10) as key:
    ...         use(str(key))

Standard library only. Each call is one HTTP request, repeated only when that is safe (retry.py), and raises a
KeyPoolError if it fails. The errors that single calls raise beside what any call can are in their docstrings.
"""

from __future__ import annotations

import ssl
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Self, TypeVar

from keypool.client import calls
from keypool.client.caller import Caller
from keypool.client.calls import Call, UnblockItem
from keypool.client.gather import Gather, gather_done, gather_lists
from keypool.client.held import give_all_back
from keypool.client.keeper import Keeper
from keypool.client.lease import Lease
from keypool.client.retry import Retry
from keypool.client.rounds import OnDead, OnError, Rounds
from keypool.client.shapes import (
    Done,
    GeneratedKey,
    KeptAlive,
    KeyLike,
    LeasedKey,
    Page,
    Revealed,
    Row,
    Stats,
    Unblocked,
)
from keypool.client.signals import Unwinding
from keypool.client.wire import address

T = TypeVar("T")
Part = TypeVar("Part")

Progress = Callable[[int], object]
"""Told how many items are done, after each call of a batch in several."""


class KeyPool:
    """A client of the server at `url`. Threads may share it; a forked child may go on using it.

    `timeout` is seconds, for connecting and for an answer (beyond what an acquire waits); `retry` says how
    long failing calls are repeated. `signals` is whether SIGTERM and SIGHUP, where nothing else is set for
    them, end the program in order while a lease is open, instead of at once.

    `close` it, or use it in a `with`: that ends its keepers and gives back what is still leased.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8888",
        token: str | None = None,
        *,
        timeout: float = 10.0,
        retry: Retry | None = None,
        ssl_context: ssl.SSLContext | None = None,
        signals: bool = True,
    ) -> None:
        self._caller = Caller(address(url, ssl_context), token, timeout, retry or Retry())
        self._signals = signals
        self._unwinding = Unwinding(signals)
        self._keepers: weakref.WeakSet[Keeper] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"KeyPool({self._caller.address.url!r})"

    def __enter__(self) -> Self:
        self._unwinding.begin()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.close()
        finally:
            self._unwinding.end()

    def close(self) -> None:
        """End the keepers, give back open leases, close the connections. Later calls raise PoolClosed."""
        for keeper in list(self._keepers):
            keeper.stop()
        give_all_back(self._caller)
        self._caller.close()

    # -- leases and keepers

    def lease(self, *, owner: str | None = None, wait: float = 0.0) -> Lease:
        """`with pool.lease() as key`: a HeldKey inside, given back under its lease number at the end.

        Waits up to `wait` seconds (0 to 60) for a key. Entering raises NoKeyAvailable, TooManyWaiters;
        leaving raises LeaseLost if the lease was over before, unless another error is on its way.
        """
        return Lease(self._caller, owner, wait, self._signals)

    def keeper(
        self,
        keys: Iterable[KeyLike] = (),
        *,
        on_dead: OnDead | None = None,
        on_error: OnError | None = None,
        keepalive_seconds: float | None = None,
    ) -> Keeper:
        """Keeps keys alive in a background thread, between `start` and `stop` or in a `with`.

        About one call a thousand keys each third of the keepalive time, which the server tells unless it is
        given here. Never lengthens a lease.
        """
        keeper = Keeper(self._caller, Rounds(keys, on_dead, on_error, keepalive_seconds))
        self._keepers.add(keeper)
        return keeper

    # -- single calls

    def generate(self) -> GeneratedKey:
        """Make a key (admin). Raises PoolFull."""
        return self._call(calls.generate())

    def acquire(self, *, owner: str | None = None, wait: float = 0.0) -> LeasedKey:
        """Be served a key, which nobody gives back for you: see `lease`. Raises NoKeyAvailable."""
        return self._call(calls.acquire(owner, wait))

    def unblock(self, key: KeyLike, lease: int | None = None) -> Unblocked:
        """Give a key back. Raises UnknownKey, StaleLease.

        With a lease number, given here or known by `key`, only if it is still yours. Without one it frees the
        key whoever has it, and is not repeated after a lost answer.
        """
        return self._call(calls.unblock(key, lease))

    def keepalive(self, key: KeyLike) -> KeptAlive:
        """Put off a key's expiry. Raises UnknownKey."""
        return self._call(calls.keepalive(key))

    def delete(self, key: KeyLike) -> None:
        """Purge a key for ever (admin). Raises UnknownKey."""
        return self._call(calls.delete(key))

    def get(self, key: KeyLike) -> Row:
        """How a key stands. Raises UnknownKey."""
        return self._call(calls.get(key))

    def reveal(self, key: KeyLike) -> Revealed:
        """The text of a key, by its id (admin). Goes to the audit log. Raises UnknownKey."""
        return self._call(calls.reveal(key))

    def page(
        self,
        *,
        state: str | None = None,
        prefix: str | None = None,
        order: str | None = None,
        limit: int | None = None,
        after: str | None = None,
    ) -> Page:
        """One page of keys (viewer): see the contract for what goes with what. Raises BadRequest."""
        return self._call(calls.page(state, prefix, order, limit, after))

    def rows(
        self, *, state: str | None = None, prefix: str | None = None, order: str | None = None
    ) -> Iterator[Row]:
        """All keys (viewer), a page of 500 a call, as they are asked for."""
        after: str | None = None
        while True:
            page = self.page(state=state, prefix=prefix, order=order, limit=500, after=after)
            yield from page.keys
            after = page.next
            if after is None:
                return

    def stats(self) -> Stats:
        """All counts (viewer)."""
        return self._call(calls.stats())

    # -- batches of any size, a thousand items a call

    def generate_many(self, count: int, *, progress: Progress | None = None) -> list[GeneratedKey]:
        """Make keys (admin). Raises PoolFull; what was made before is in the error's `partial`."""
        asked = map(calls.generate_batch, calls.counts(count))
        return self._gather(asked, gather_lists(list[GeneratedKey]), progress)

    def acquire_many(
        self, count: int, *, owner: str | None = None, progress: Progress | None = None
    ) -> list[LeasedKey]:
        """Be served up to `count` keys, fewer if fewer are free. Raises NoKeyAvailable if none is."""
        asked = (calls.acquire_batch(each, owner) for each in calls.counts(count))
        return self._gather(asked, gather_lists(list[LeasedKey], wanted=count), progress)

    def keepalive_many(self, keys: Iterable[KeyLike], *, progress: Progress | None = None) -> Done:
        """Put off expiries."""
        return self._gather(map(calls.keepalive_batch, calls.parts(keys)), gather_done(), progress)

    def unblock_many(self, items: Iterable[UnblockItem], *, progress: Progress | None = None) -> Done:
        """Give keys back, each a key or a pair of key and lease number."""
        return self._gather(map(calls.unblock_batch, calls.parts(items)), gather_done(), progress)

    def delete_many(self, keys: Iterable[KeyLike], *, progress: Progress | None = None) -> Done:
        """Purge keys (admin)."""
        return self._gather(map(calls.delete_batch, calls.parts(keys)), gather_done(), progress)

    def _call(self, call: Call[T]) -> T:
        return self._caller.call(call)

    def _gather(self, asked: Iterable[Call[T]], gather: Gather[T], progress: Progress | None) -> T:
        for call in asked:
            with gather.keeping():
                gather.add(self._caller.call(call))
            if progress is not None:
                progress(gather.count)
            if gather.complete:
                break
        return gather.result
