"""The asynchronous client: the calls of pool.py, awaited.

    >>> from keypool.client import AsyncKeyPool
    >>> async with AsyncKeyPool("http://127.0.0.1:8888") as pool:
    ...     async with pool.lease(wait=10) as key:
    ...         await use(str(key))

On aiohttp if it is installed, else on Tornado's client (sending.py). Belongs to the event loop it is used on.
"""

from __future__ import annotations

import ssl
import weakref
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Self, TypeVar

from keypool.client import calls
from keypool.client.async_caller import AsyncCaller, to_the_end
from keypool.client.async_keeper import AsyncKeeper
from keypool.client.async_lease import AsyncLease, give_back
from keypool.client.calls import Call, UnblockItem
from keypool.client.gather import Gather, gather_done, gather_lists
from keypool.client.held import held_of
from keypool.client.pool import Progress
from keypool.client.retry import Retry
from keypool.client.rounds import OnDead, OnError, Rounds
from keypool.client.sending import Transport, best_transport
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
from keypool.client.wire import Address, address

T = TypeVar("T")


class AsyncKeyPool:
    """A client of the server at `url`, for the tasks of one event loop.

    `timeout` is seconds, for connecting and for an answer (beyond what an acquire waits); `retry` says how
    long failing calls are repeated. `signals` is whether SIGTERM and SIGHUP, where nothing else is set for
    them, end the program in order while a lease is open, instead of at once. `transport` is what sends,
    if neither aiohttp nor Tornado is to.

    `close` it, or use it in an `async with`: that ends its keepers and gives back what is still leased.
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
        transport: Callable[[Address], Transport] = best_transport,
    ) -> None:
        place = address(url, ssl_context)
        self._caller = AsyncCaller(place, token, timeout, retry or Retry(), transport(place))
        self._signals = signals
        self._keepers: weakref.WeakSet[AsyncKeeper] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"AsyncKeyPool({self._caller.address.url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await to_the_end(self.close())

    async def close(self) -> None:
        """End the keepers, give back open leases, close the connections. Later calls raise PoolClosed."""
        for keeper in list(self._keepers):
            await keeper.stop()
        for held in held_of(self._caller):
            await give_back(self._caller, held)
        await self._caller.close()

    # -- leases and keepers

    def lease(self, *, owner: str | None = None, wait: float = 0.0) -> AsyncLease:
        """`async with pool.lease() as key`: a HeldKey inside, given back under its lease number at the end.

        Waits up to `wait` seconds (0 to 60) for a key. Entering raises NoKeyAvailable, TooManyWaiters;
        leaving raises LeaseLost if the lease was over before, unless another error is on its way.
        """
        return AsyncLease(self._caller, owner, wait, self._signals)

    def keeper(
        self,
        keys: Iterable[KeyLike] = (),
        *,
        on_dead: OnDead | None = None,
        on_error: OnError | None = None,
        keepalive_seconds: float | None = None,
    ) -> AsyncKeeper:
        """Keeps keys alive in a background task, between `start` and `stop` or in an `async with`.

        About one call a thousand keys each third of the keepalive time, which the server tells unless it is
        given here. Never lengthens a lease.
        """
        keeper = AsyncKeeper(self._caller, Rounds(keys, on_dead, on_error, keepalive_seconds))
        self._keepers.add(keeper)
        return keeper

    # -- single calls

    async def generate(self) -> GeneratedKey:
        """Make a key (admin). Raises PoolFull."""
        return await self._call(calls.generate())

    async def acquire(self, *, owner: str | None = None, wait: float = 0.0) -> LeasedKey:
        """Be served a key, which nobody gives back for you: see `lease`. Raises NoKeyAvailable."""
        return await self._call(calls.acquire(owner, wait))

    async def unblock(self, key: KeyLike, lease: int | None = None) -> Unblocked:
        """Give a key back. Raises UnknownKey, StaleLease.

        With a lease number, given here or known by `key`, only if it is still yours. Without one it frees the
        key whoever has it, and is not repeated after a lost answer.
        """
        return await self._call(calls.unblock(key, lease))

    async def keepalive(self, key: KeyLike) -> KeptAlive:
        """Put off a key's expiry. Raises UnknownKey."""
        return await self._call(calls.keepalive(key))

    async def delete(self, key: KeyLike) -> None:
        """Purge a key for ever (admin). Raises UnknownKey."""
        return await self._call(calls.delete(key))

    async def get(self, key: KeyLike) -> Row:
        """How a key stands. Raises UnknownKey."""
        return await self._call(calls.get(key))

    async def reveal(self, key: KeyLike) -> Revealed:
        """The text of a key, by its id (admin). Goes to the audit log. Raises UnknownKey."""
        return await self._call(calls.reveal(key))

    async def page(
        self,
        *,
        state: str | None = None,
        prefix: str | None = None,
        order: str | None = None,
        limit: int | None = None,
        after: str | None = None,
    ) -> Page:
        """One page of keys (viewer): see the contract for what goes with what. Raises BadRequest."""
        return await self._call(calls.page(state, prefix, order, limit, after))

    async def rows(
        self, *, state: str | None = None, prefix: str | None = None, order: str | None = None
    ) -> AsyncIterator[Row]:
        """All keys (viewer), a page of 500 a call, as they are asked for."""
        after: str | None = None
        while True:
            page = await self.page(state=state, prefix=prefix, order=order, limit=500, after=after)
            for row in page.keys:
                yield row
            after = page.next
            if after is None:
                return

    async def stats(self) -> Stats:
        """All counts (viewer)."""
        return await self._call(calls.stats())

    # -- batches of any size, a thousand items a call

    async def generate_many(self, count: int, *, progress: Progress | None = None) -> list[GeneratedKey]:
        """Make keys (admin). Raises PoolFull; what was made before is in the error's `partial`."""
        asked = map(calls.generate_batch, calls.counts(count))
        return await self._gather(asked, gather_lists(list[GeneratedKey]), progress)

    async def acquire_many(
        self, count: int, *, owner: str | None = None, progress: Progress | None = None
    ) -> list[LeasedKey]:
        """Be served up to `count` keys, fewer if fewer are free. Raises NoKeyAvailable if none is."""
        asked = (calls.acquire_batch(each, owner) for each in calls.counts(count))
        return await self._gather(asked, gather_lists(list[LeasedKey], wanted=count), progress)

    async def keepalive_many(self, keys: Iterable[KeyLike], *, progress: Progress | None = None) -> Done:
        """Put off expiries."""
        return await self._gather(map(calls.keepalive_batch, calls.parts(keys)), gather_done(), progress)

    async def unblock_many(self, items: Iterable[UnblockItem], *, progress: Progress | None = None) -> Done:
        """Give keys back, each a key or a pair of key and lease number."""
        return await self._gather(map(calls.unblock_batch, calls.parts(items)), gather_done(), progress)

    async def delete_many(self, keys: Iterable[KeyLike], *, progress: Progress | None = None) -> Done:
        """Purge keys (admin)."""
        return await self._gather(map(calls.delete_batch, calls.parts(keys)), gather_done(), progress)

    async def _call(self, call: Call[T]) -> T:
        return await self._caller.call(call)

    async def _gather(self, asked: Iterable[Call[T]], gather: Gather[T], progress: Progress | None) -> T:
        for call in asked:
            with gather.keeping():
                gather.add(await self._caller.call(call))
            if progress is not None:
                progress(gather.count)
            if gather.complete:
                break
        return gather.result
