"""The asynchronous client: the calls of pool.py, awaited.

    >>> from keypool.client import AsyncKeyPool
    >>> async with AsyncKeyPool("http://127.0.0.1:8888") as pool:
    ...     async with pool.lease(wait=10) as key:
    ...         await use(key.secret)

A client belongs to the event loop on which it is used. KeyPool documents what the calls do and raise.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import math
import os
import ssl
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx2

from keypool.client import calls
from keypool.client.answers import (
    Done,
    Extended,
    GeneratedKey,
    Holder,
    ImportedKey,
    Imports,
    KeptAlive,
    KeyLike,
    LeasedKey,
    Page,
    Part,
    PastLease,
    PoolInfo,
    RareEvent,
    Rekeying,
    Revealed,
    Row,
    Stats,
    Unblocked,
    Waiting,
)
from keypool.client.asynchronous import AsyncRunner
from keypool.client.attempts import Timed, perform, result, results
from keypool.client.blocking import Runner
from keypool.client.calls import (
    Batch,
    Call,
    LeaseItem,
    Order,
    OutcomeName,
    Progress,
    StateName,
    UnblockItem,
)
from keypool.client.errors import KeyPoolError, LeaseLost, PoolClosed
from keypool.client.held import LAST_TRY, Held, give_back_many, raise_or_note
from keypool.client.imports import Exists, NewKey
from keypool.client.pool_settings import PoolValue
from keypool.client.rounds import KeptKeys, LeaseRounds, OnDead, OnError, Rounds
from keypool.client.settings import (
    DEFAULT_POOL,
    DEFAULT_TIMEOUT,
    DEFAULT_URL,
    Retry,
    Settings,
    default_owner,
    from_environment,
    pool_name,
)

T = TypeVar("T")


class AsyncKeyPool:
    """A client of the server at `url`, for the tasks of one event loop. The arguments are those of KeyPool.

    `close` it, or use it in an `async with`: that stops its keepers and gives back what its leases still hold.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        token: str | None = None,
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
        retry: Retry | int | None = None,
        pool: str = DEFAULT_POOL,
        ssl_context: ssl.SSLContext | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._settings = Settings.of(url, token, timeout, retry, pool)
        self._runner = AsyncRunner(self._settings, ssl_context, transport)
        self._ssl_context = ssl_context
        self._transport = transport
        self._keepers: weakref.WeakSet[AsyncKeeper] = weakref.WeakSet()
        self._held: weakref.WeakSet[AsyncHeldKey] = weakref.WeakSet()
        self._lease_keeper: AsyncKeeper | None = None
        self._client: Self | None = None
        self._pools: dict[str, Self] = {}

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ, **options: Any) -> Self:
        """A client configured by KEYPOOL_URL, KEYPOOL_TOKEN, KEYPOOL_TOKEN_FILE, KEYPOOL_POOL; see KeyPool.from_env."""
        return cls(**from_environment(environ) | options)

    def __repr__(self) -> str:
        pool = "" if self._settings.pool == DEFAULT_POOL else f", pool={self._settings.pool!r}"
        return f"AsyncKeyPool({self._settings.url!r}{pool})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def pool(self, name: str) -> Self:
        """The same client for another pool of the server; see KeyPool. Raises ValueError."""
        if self._client is not None:
            return self._client.pool(name)
        if pool_name(name) == self._settings.pool:
            return self
        if name not in self._pools:
            self._pools[name] = copy.copy(self)
            self._pools[name]._become(name, self)  # noqa: SLF001 - one of this class
        return self._pools[name]

    def _become(self, name: str, client: Self) -> None:
        """Turn this copy of the client into another pool of it."""
        self._settings = replace(self._settings, pool=name)
        self._keepers, self._held = weakref.WeakSet(), weakref.WeakSet()
        self._lease_keeper = None
        self._client, self._pools = client, {}

    async def close(self) -> None:
        """Stop the keepers, give back what leases hold, close the connections. Later calls raise PoolClosed."""
        for pool in list(self._pools.values()):
            await pool.close()
        for keeper in list(self._keepers):
            await keeper.stop()
        for held in list(self._held):
            await self._give_back(held, LAST_TRY)
        if self._client is None:
            await self._runner.close()

    # -- leases and keepers

    def lease(
        self,
        *,
        owner: str | None = None,
        wait: float | None = 0.0,
        block_seconds: float | None = None,
        extend: bool = False,
    ) -> AsyncLease:
        """`async with pool.lease() as key`: see KeyPool. A cancelled task gives its key back."""
        return AsyncLease(self, owner, wait, block_seconds, extend)

    def keeper(
        self,
        keys: Iterable[KeyLike] = (),
        *,
        on_dead: OnDead | None = None,
        on_error: OnError | None = None,
        keepalive_seconds: float | None = None,
    ) -> AsyncKeeper:
        """A keeper: keeps keys alive in a background task, between `start` and `stop` or in an `async with`."""
        rounds = Rounds(self._settings, keys, on_dead, on_error, keepalive_seconds)
        keeper = AsyncKeeper(self._runner, rounds)
        self._keepers.add(keeper)
        return keeper

    async def _hold(
        self, owner: str | None, wait: float | None, block_seconds: float | None, extend: bool
    ) -> AsyncHeldKey:
        held = await self._acquire(owner, wait, block_seconds)
        held.register(lambda: self._give_back_without_loop(held))
        self._held.add(held)
        if held.expires_first or extend:
            keeper = self._keep_alive(held)
            if extend:
                keeper._extend(held)  # noqa: SLF001 - a part of it
        return held

    def _keep_alive(self, held: AsyncHeldKey) -> AsyncKeeper:
        if self._client is not None:
            return self._client._keep_alive(held)  # noqa: SLF001 - one of this class
        if self._lease_keeper is None or not self._lease_keeper.running:
            self._lease_keeper = AsyncKeeper(self._runner, LeaseRounds(self._settings)).start()
            self._keepers.add(self._lease_keeper)
        self._lease_keeper.add(held)
        return self._lease_keeper

    def _keep_no_longer(self, held: AsyncHeldKey) -> None:
        if self._client is not None:
            self._client._keep_no_longer(held)  # noqa: SLF001 - one of this class
        elif self._lease_keeper is not None:
            self._lease_keeper.discard(held)

    async def _acquire(
        self, owner: str | None, wait: float | None, block_seconds: float | None
    ) -> AsyncHeldKey:
        owner = default_owner() if owner is None else owner
        steps = perform(calls.acquire(owner, wait, block_seconds), self._settings)

        def held(acquired: Timed[LeasedKey]) -> AsyncHeldKey:
            return AsyncHeldKey(self, acquired, owner, block_seconds)

        return held(await self._runner.acquire(steps, lambda late: self._give_back(held(late))))

    async def _extend(self, held: AsyncHeldKey, seconds: float | None) -> Extended:
        extended = await self._runner.run(held.extension(self._settings, seconds))
        if held.expires_first and not held.over:
            self._keep_alive(held)
        return extended

    async def _give_back(
        self, held: AsyncHeldKey, within: float = math.inf, *, well: bool = False
    ) -> LeaseLost | None:
        self._keep_no_longer(held)
        lost = await self._runner.run_to_end(held.give_back(self._settings, within, well=well))
        self._held.discard(held)
        return lost

    def _give_back_without_loop(self, held: AsyncHeldKey) -> None:
        transport = self._transport
        if transport is None or isinstance(transport, httpx2.BaseTransport):
            runner = Runner(self._settings, self._ssl_context, transport)
            runner.run(held.give_back(self._settings, LAST_TRY))
            runner.close()

    # -- single calls

    async def generate(self) -> GeneratedKey:
        """Make a key (admin). Raises PoolFull."""
        return await self._call(calls.generate())

    async def acquire(
        self,
        *,
        owner: str | None = None,
        wait: float | None = 0.0,
        block_seconds: float | None = None,
    ) -> LeasedKey:
        """Acquire a key, to be given back by `unblock`. Raises NoKeyAvailable. If cancelled, gives it back."""
        owner = default_owner() if owner is None else owner
        steps = perform(calls.acquire(owner, wait, block_seconds), self._settings)
        acquired = await self._runner.acquire(
            steps, lambda late: self._give_back(AsyncHeldKey(self, late, owner, block_seconds))
        )
        return acquired.result

    async def unblock(
        self,
        key: KeyLike,
        lease: int | None = None,
        *,
        outcome: OutcomeName | None = None,
        retry_after: float | None = None,
        reason: str | None = None,
        uses: int | None = None,
    ) -> Unblocked:
        """Give a key back, and report how the work with it went. Raises UnknownKey, StaleLease."""
        return await self._call(calls.unblock(key, lease, outcome, retry_after, reason, uses=uses))

    async def extend(
        self, key: KeyLike, seconds: float | None = None, *, lease: int | None = None
    ) -> Extended:
        """Let a lease last longer. Raises UnknownKey, StaleLease, LeaseOver, BlockLimit."""
        return await self._call(calls.extend(key, seconds, lease))

    async def quarantine(self, key: KeyLike, reason: str | None = None, now: bool = False) -> Row:
        """Take a key out of service until `restore` (admin). Raises UnknownKey."""
        return await self._call(calls.quarantine(key, reason, now))

    async def restore(self, key: KeyLike) -> Row:
        """Make a cooling or quarantined key available, and forget its reports (admin). Raises UnknownKey."""
        return await self._call(calls.restore(key))

    async def keepalive(self, key: KeyLike) -> KeptAlive:
        """Postpone a key's expiry. Raises UnknownKey, StaleLease."""
        return await self._call(calls.keepalive(key))

    async def delete(self, key: KeyLike) -> None:
        """Delete a key permanently (admin). Raises UnknownKey."""
        return await self._call(calls.delete(key))

    async def get(self, key: KeyLike) -> Row:
        """The state of a key. Raises UnknownKey, StaleLease."""
        return await self._call(calls.get(key))

    async def reveal(self, key: KeyLike) -> Revealed:
        """The text of a key, by its id (admin). Goes to the audit log. Raises UnknownKey."""
        return await self._call(calls.reveal(key))

    async def import_key(
        self,
        secret: str,
        *,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        data: Mapping[str, Any] | None = None,
        pace: Mapping[str, float] | None = None,
        seats: int | None = None,
        expire: bool = False,
    ) -> ImportedKey:
        """Import a key (admin). Raises NameTaken, PoolFull, KeysWouldExpire, SecretsKeyRequired."""
        return await self._call(
            calls.import_key(secret, name, labels, data, pace, seats=seats, expire=expire)
        )

    async def update(
        self,
        key: KeyLike,
        *,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        data: Mapping[str, Any] | None = None,
        pace: Mapping[str, float] | None = None,
        seats: int | None = None,
    ) -> Row:
        """Change a key's name, labels, data, pace or seats (admin). Raises UnknownKey, NameTaken, PoolFull."""
        return await self._call(calls.update(key, name, labels, data, pace, seats=seats))

    async def replace(self, key: KeyLike, secret: str) -> Row:
        """Give a key another text (admin). Raises UnknownKey, SecretExists."""
        return await self._call(calls.replace(key, secret))

    async def find(self, text: str) -> Row:
        """The state of the key that has this text, id, name or hint (viewer). Raises UnknownKey."""
        return await self._call(calls.find(text))

    async def page(
        self,
        *,
        state: StateName | None = None,
        prefix: str | None = None,
        order: Order | None = None,
        name: str | None = None,
        owner: str | None = None,
        limit: int | None = None,
        after: str | None = None,
    ) -> Page:
        """One page of keys (viewer). Raises BadRequest."""
        return await self._call(calls.page(state, prefix, order, limit, after, name=name, owner=owner))

    async def rows(
        self,
        *,
        state: StateName | None = None,
        prefix: str | None = None,
        order: Order | None = None,
        name: str | None = None,
        owner: str | None = None,
    ) -> AsyncIterator[Row]:
        """All keys (viewer), one call for each 500, as they are read."""
        after: str | None = None
        while True:
            page = await self.page(
                state=state,
                prefix=prefix,
                order=order,
                limit=calls.MOST_ROWS,
                after=after,
                name=name,
                owner=owner,
            )
            for row in page.keys:
                yield row
            after = page.next
            if after is None:
                return

    async def history(self, key: KeyLike, limit: int | None = None) -> AsyncIterator[PastLease]:
        """The leases of a key that have ended (viewer), the latest first: all that are kept, or `limit` of them.

        One call for each 500, as they are read. By its id, a key that is gone has a history, too. Raises UnknownKey.
        """
        after: str | None = None
        left = math.inf if limit is None else limit
        while left > 0:
            part = await self._call(calls.history(key, int(min(left, 500)), after))
            for lease in part.rows:
                yield lease
            left -= len(part.rows)
            after = part.next
            if after is None:
                return

    def owners(self) -> AsyncIterator[Holder]:
        """Who holds keys (viewer), in order of name, one call for each 500, as they are read."""
        return self._all(calls.owners)

    async def release_owner(self, owner: str, *, client: str | None = None) -> int:
        """End all leases that an owner holds, under this token or under any (admin). Returns how many that were."""
        return await self._call(calls.release_owner(owner, client))

    def waiters(self) -> AsyncIterator[Waiting]:
        """Who waits for a key at the server that answers (viewer), first come first, as they are read."""
        return self._all(calls.waiters)

    def events(self, kind: str | None = None) -> AsyncIterator[RareEvent]:
        """The latest rare events (viewer), of one kind if given, newest first, as they are read. Raises BadRequest."""
        return self._all(lambda after: calls.events(kind, after))

    async def stats(self) -> Stats:
        """All counts (viewer)."""
        return await self._call(calls.stats())

    # -- pools, and the whole server

    async def pools(self) -> list[PoolInfo]:
        """All pools that the token is for, in order of name (viewer)."""
        return await self._call(calls.pools())

    async def get_pool(self, name: str) -> PoolInfo:
        """Counts and settings of a pool (viewer). Raises UnknownPool."""
        return await self._call(calls.get_pool(name))

    async def put_pool(self, name: str, **settings: PoolValue) -> PoolInfo:
        """Make a pool, or give the one of this name these settings (admin). Raises TooManyPools, PoolFixed."""
        return await self._call(calls.put_pool(name, settings))

    async def change_pool(self, name: str, **settings: PoolValue) -> PoolInfo:
        """Change some settings of a pool (admin). Raises UnknownPool, PoolFixed, PoolDraining."""
        return await self._call(calls.change_pool(name, settings))

    async def delete_pool(self, name: str, *, drain: bool = False, now: bool = False) -> PoolInfo | None:
        """Delete a pool (admin). Raises UnknownPool, PoolNotEmpty, PoolFixed."""
        return await self._call(calls.delete_pool(name, drain, now))

    async def rekey(self) -> Rekeying:
        """Begin to encrypt all stored keys under the server's first secrets key (admin). Raises SecretsKeyRequired."""
        return await self._call(calls.rekey())

    async def rekeying(self) -> Rekeying:
        """How far that is (admin)."""
        return await self._call(calls.rekeying())

    # -- batches of any size, a thousand items a call

    async def generate_many(self, count: int, *, progress: Progress | None = None) -> list[GeneratedKey]:
        """Make keys (admin). Raises PoolFull; what was made before is in the error's `partial`."""
        return await self._batch(calls.generate_many(count, progress))

    async def import_many(
        self,
        items: Iterable[NewKey],
        *,
        exists: Exists = "skip",
        expire: bool = False,
        progress: Progress | None = None,
    ) -> Imports:
        """Import keys (admin); see KeyPool. Raises PoolFull, KeysWouldExpire, SecretsKeyRequired."""
        return await self._batch(calls.import_many(items, exists, expire, progress))

    def acquire_many(
        self,
        count: int,
        *,
        owner: str | None = None,
        block_seconds: float | None = None,
        progress: Progress | None = None,
    ) -> AsyncLeasedKeys:
        """Acquire up to `count` keys: `async with` gives them all back, `await` leaves that to you."""
        owner = default_owner() if owner is None else owner
        batch = calls.acquire_many(count, owner, block_seconds, progress)
        return AsyncLeasedKeys(self, batch)

    async def keepalive_many(self, keys: Iterable[KeyLike], *, progress: Progress | None = None) -> Done:
        """Postpone expiries."""
        return await self._batch(calls.keepalive_many(keys, progress))

    async def unblock_many(self, items: Iterable[UnblockItem], *, progress: Progress | None = None) -> Done:
        """Give keys back, each a key, a pair of key and lease number, or an Unblock with a report."""
        return await self._batch(calls.unblock_many(items, progress))

    async def extend_many(
        self, items: Iterable[LeaseItem], seconds: float | None = None, *, progress: Progress | None = None
    ) -> Done:
        """Extend leases, each a leased key or a pair of key and lease number."""
        return await self._batch(calls.extend_many(items, seconds, progress))

    async def quarantine_many(
        self,
        keys: Iterable[KeyLike],
        reason: str | None = None,
        now: bool = False,
        *,
        progress: Progress | None = None,
    ) -> Done:
        """Take keys out of service (admin)."""
        return await self._batch(calls.quarantine_many(keys, reason, now, progress))

    async def restore_many(self, keys: Iterable[KeyLike], *, progress: Progress | None = None) -> Done:
        """Make cooling and quarantined keys available (admin)."""
        return await self._batch(calls.restore_many(keys, progress))

    async def delete_many(self, keys: Iterable[KeyLike], *, progress: Progress | None = None) -> Done:
        """Delete keys permanently (admin)."""
        return await self._batch(calls.delete_many(keys, progress))

    async def _call(self, call: Call[T]) -> T:
        return await self._runner.run(result(call, self._settings))

    async def _all(self, part_after: Callable[[str | None], Call[Part[T]]]) -> AsyncIterator[T]:
        """The rows of a list, one call for each part, as they are read."""
        after: str | None = None
        while True:
            part = await self._call(part_after(after))
            for row in part.rows:
                yield row
            after = part.next
            if after is None:
                return

    async def _batch(self, batch: Batch[T]) -> T:
        return await self._runner.run(results(batch, self._settings))

    async def _acquire_batch(self, batch: Batch[list[LeasedKey]]) -> list[LeasedKey]:
        return await self._runner.acquire(results(batch, self._settings), self._give_back_many)

    async def _give_back_many(self, keys: list[LeasedKey]) -> LeaseLost | None:
        return await self._runner.run_to_end(give_back_many(keys, self._settings))


class AsyncHeldKey(Held):
    """A key that is yours until `remaining` is 0; until then `secret` is its text.

    `lost` is set on the loop when the lease is lost: the key was deleted, or leased to someone else, or its time ran
    out.
    """

    def __init__(
        self, pool: AsyncKeyPool, acquired: Timed[LeasedKey], owner: str, block_seconds: float | None
    ) -> None:
        super().__init__(acquired, owner, block_seconds, pool._settings.pool)  # noqa: SLF001 - a part of it
        self.lost = asyncio.Event()
        """Set when the lease is known to be lost."""
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._watch()

    async def extend(self, seconds: float | None = None) -> Extended:
        """Let the lease end `seconds` from now, if that is later. Raises LeaseLost, BlockLimit, LeaseOver."""
        return await self._pool._extend(self, seconds)  # noqa: SLF001 - a part of it

    async def release(self) -> Unblocked | None:
        """Give the key back now, with what was reported, else `ok`. Raises LeaseLost. See HeldKey."""
        raise_or_note(await self._pool._give_back(self, well=True), None)  # noqa: SLF001 - a part of it
        return self.unblocked

    def _watch(self) -> None:
        """Set `lost` when the time has run out, else look again then: the loop's clock may stand still meanwhile."""
        if self.over:
            self._signal_lost()
        else:
            self._timer = self._loop.call_later(self.remaining, self._watch)

    def _signal_lost(self) -> None:
        # At exit there may be waiters whose loop was closed.
        with contextlib.suppress(RuntimeError):
            self.lost.set()

    def _ended(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class AsyncLease:
    """A context manager, for one `async with` at a time; each acquires anew."""

    def __init__(
        self,
        pool: AsyncKeyPool,
        owner: str | None,
        wait: float | None,
        block_seconds: float | None = None,
        extend: bool = False,
    ) -> None:
        self._pool = pool
        self._asked = (owner, wait, block_seconds, extend)
        self._held: AsyncHeldKey | None = None

    async def __aenter__(self) -> AsyncHeldKey:
        if self._held is not None:
            raise KeyPoolError("this lease is in use; ask the pool for another one")
        self._held = await self._pool._hold(*self._asked)  # noqa: SLF001 - a part of it
        return self._held

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        held, self._held = self._held, None
        if held is not None:
            lost = await self._pool._give_back(held, well=error is None)  # noqa: SLF001 - a part of it
            raise_or_note(lost, error)


class AsyncLeasedKeys:
    """Keys to be acquired together: `await` acquires them, `async with` gives them back as well.

    Leaving it raises LeaseLost if any was lost meanwhile, unless another error is propagating.
    """

    def __init__(self, pool: AsyncKeyPool, batch: Batch[list[LeasedKey]]) -> None:
        self._pool = pool
        self._batch = batch
        self._keys: list[LeasedKey] = []

    def __await__(self) -> Generator[Any, Any, list[LeasedKey]]:
        return self._pool._acquire_batch(self._batch).__await__()  # noqa: SLF001 - a part of it

    async def __aenter__(self) -> list[LeasedKey]:
        self._keys = await self
        return self._keys

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        raise_or_note(await self._pool._give_back_many(self._keys), error)  # noqa: SLF001 - a part of it


class AsyncKeeper(KeptKeys):
    """Keeps keys alive from `start`, or `async with`, to `stop`, in one task.

    `on_dead(key)` is called on the loop, once for each key that was deleted or has expired; `on_error(error)`
    after each round that failed. A round is repeated until it succeeds; a refused token or
    a wrong URL stops the keeper: then `running` is False and `error` says why.
    """

    def __init__(self, runner: AsyncRunner, rounds: Rounds | LeaseRounds) -> None:
        self._wake = asyncio.Event()
        super().__init__(rounds, self._wake.set)
        self._runner = runner
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        """Whether the task runs."""
        return self._task is not None and not self._task.done()

    def start(self) -> Self:
        """Begin, with a round at once. Raises KeyPoolError if it was started before."""
        if self._task is not None:
            raise KeyPoolError("a keeper is started once; make another one")
        self._task = asyncio.ensure_future(self._run())
        return self

    async def stop(self) -> None:
        """End it, and wait for its task; a call in progress is aborted. May be called again."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})

    async def __aenter__(self) -> Self:
        return self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _run(self) -> None:
        try:
            await self._runner.run(self._rounds.steps(), self._wake)
        except PoolClosed:
            return
