"""The blocking client.

    >>> from keypool.client import KeyPool
    >>> with KeyPool("http://127.0.0.1:8888") as pool:
    ...     with pool.lease(wait=10) as key:
    ...         use(key.secret)

A thin layer: calls.py and attempts.py decide what is sent and when it is sent again. Each call is one HTTP request,
repeated only when that is safe, and raises a KeyPoolError if it fails; docstrings name the errors in addition to
those that any call may raise.
"""

from __future__ import annotations

import atexit
import copy
import math
import os
import ssl
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from keypool.client.held import LAST_TRY, Held, LostEvent, give_back_many, raise_or_note
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
from keypool.client.signals import block_all

T = TypeVar("T")


class KeyPool:
    """A client of the server at `url`. Threads may share it; a forked child may go on using it.

    `timeout` is how many seconds a call may take with all its retries (for an acquire, in addition to its wait);
    None means no limit. `retry` is a Retry, or how many times at most a failing call is sent again.
    `transport` is an httpx2 transport to use instead of the default one: for proxies, or for tests
    (keypool.client.testing). It is closed with the client, and `timeout` bounds each of its reads and writes
    rather than their sum. The calls about keys are for `pool`; its method of that name gives other ones.
    Raises ValueError for a wrong argument.

    `close` it, or use it in a `with`: that stops its keepers and gives back what its leases still hold.
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
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self._settings = Settings.of(url, token, timeout, retry, pool)
        self._runner = Runner(self._settings, ssl_context, transport)
        self._keepers: weakref.WeakSet[Keeper] = weakref.WeakSet()
        self._held: weakref.WeakSet[HeldKey] = weakref.WeakSet()
        self._lease_keeper: Keeper | None = None
        self._lock = threading.Lock()
        self._client: Self | None = None
        """The client that this is a pool of; None if it is one itself."""
        self._pools: dict[str, Self] = {}

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ, **options: Any) -> Self:
        """A client configured by KEYPOOL_URL, KEYPOOL_TOKEN, KEYPOOL_TOKEN_FILE, KEYPOOL_POOL; `options` come before.

        Raises ValueError, also for a token file that cannot be read.
        """
        return cls(**from_environment(environ) | options)

    def __repr__(self) -> str:
        pool = "" if self._settings.pool == DEFAULT_POOL else f", pool={self._settings.pool!r}"
        return f"KeyPool({self._settings.url!r}{pool})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pool(self, name: str) -> Self:
        """The same client for another pool of the server: `client.pool("openai").lease()`. No call is made.

        It shares connections, settings, and the thread that looks after leases with this one, and ends with it; to
        close it stops its keepers and gives back its leases. The same name gives the same object. Raises ValueError.
        """
        if self._client is not None:
            return self._client.pool(name)
        if pool_name(name) == self._settings.pool:
            return self
        with self._lock:
            if name not in self._pools:
                self._pools[name] = copy.copy(self)
                self._pools[name]._become(name, self)  # noqa: SLF001 - one of this class
            return self._pools[name]

    def _become(self, name: str, client: Self) -> None:
        """Turn this copy of the client into another pool of it."""
        self._settings = replace(self._settings, pool=name)
        self._keepers, self._held = weakref.WeakSet(), weakref.WeakSet()
        self._lease_keeper, self._lock = None, threading.Lock()
        self._client, self._pools = client, {}

    def close(self) -> None:
        """Stop the keepers, give back what leases hold, close the connections. Later calls raise PoolClosed."""
        for pool in list(self._pools.values()):
            pool.close()
        for keeper in list(self._keepers):
            keeper.stop()
        for held in list(self._held):
            self._give_back(held, LAST_TRY)
        if self._client is None:
            self._runner.close()

    # -- leases and keepers

    def lease(
        self,
        *,
        owner: str | None = None,
        wait: float | None = 0.0,
        block_seconds: float | None = None,
        extend: bool = False,
    ) -> Lease:
        """`with pool.lease() as key`: a HeldKey inside, given back under its lease number at the end.

        Waits up to `wait` seconds for a key, None for ever; `owner` is `host:pid` by default. The lease lasts
        `block_seconds`, by default the pool's. With `extend` it is extended, each time a third of that has passed,
        for as long as the pool allows. Keeps the key alive if it would expire before the lease ends.
        Entering raises NoKeyAvailable, TooManyWaiters; leaving reports `ok` unless the block reported something else
        or raises, and raises LeaseLost if the lease had ended before, unless another error is propagating.
        """
        return Lease(self, owner, wait, block_seconds, extend)

    def keeper(
        self,
        keys: Iterable[KeyLike] = (),
        *,
        on_dead: OnDead | None = None,
        on_error: OnError | None = None,
        keepalive_seconds: float | None = None,
    ) -> Keeper:
        """A keeper: keeps keys alive in a background thread, between `start` and `stop` or in a `with`.

        Makes about one call for each thousand keys every third of `keepalive_seconds`, which it asks the server
        for by default. Extends no lease: `lease` does that by itself.
        """
        rounds = Rounds(self._settings, keys, on_dead, on_error, keepalive_seconds)
        keeper = Keeper(self._runner.another(), rounds)
        self._keepers.add(keeper)
        return keeper

    def _hold(
        self, owner: str | None, wait: float | None, block_seconds: float | None, extend: bool
    ) -> HeldKey:
        owner = default_owner() if owner is None else owner
        acquired = self._runner.run(perform(calls.acquire(owner, wait, block_seconds), self._settings))
        held = HeldKey(self, acquired, owner, block_seconds)
        held.register(lambda: self._give_back(held, LAST_TRY))
        self._held.add(held)
        if held.expires_first or extend:
            keeper = self._keep_alive(held)
            if extend:
                keeper._extend(held)  # noqa: SLF001 - a part of it
        return held

    def _keep_alive(self, held: HeldKey) -> Keeper:
        if self._client is not None:
            return self._client._keep_alive(held)  # noqa: SLF001 - one of this class
        with self._lock:
            if self._lease_keeper is None or not self._lease_keeper.running:
                self._lease_keeper = Keeper(self._runner.another(), LeaseRounds(self._settings)).start()
                self._keepers.add(self._lease_keeper)
        self._lease_keeper.add(held)
        return self._lease_keeper

    def _keep_no_longer(self, held: HeldKey) -> None:
        if self._client is not None:
            self._client._keep_no_longer(held)  # noqa: SLF001 - one of this class
        elif self._lease_keeper is not None:
            self._lease_keeper.discard(held)

    def _extend(self, held: HeldKey, seconds: float | None) -> Extended:
        extended = self._runner.run(held.extension(self._settings, seconds))
        if held.expires_first and not held.over:
            self._keep_alive(held)
        return extended

    def _give_back(self, held: HeldKey, within: float = math.inf, *, well: bool = False) -> LeaseLost | None:
        self._keep_no_longer(held)
        lost = self._runner.run(held.give_back(self._settings, within, well=well))
        self._held.discard(held)
        return lost

    def _give_back_many(self, keys: list[LeasedKey]) -> LeaseLost | None:
        return self._runner.run(give_back_many(keys, self._settings))

    # -- single calls

    def generate(self) -> GeneratedKey:
        """Make a key (admin). Raises PoolFull."""
        return self._call(calls.generate())

    def acquire(
        self,
        *,
        owner: str | None = None,
        wait: float | None = 0.0,
        block_seconds: float | None = None,
    ) -> LeasedKey:
        """Acquire a key, to be given back by `unblock`; `lease` does that by itself. Raises NoKeyAvailable.

        Waits up to `wait` seconds, None for ever: first come, first served, in whatever number of requests that takes.
        The lease lasts `block_seconds`, by default the pool's. After a lost answer the acquire is repeated, and gets
        the same lease.
        """
        return self._call(calls.acquire(default_owner() if owner is None else owner, wait, block_seconds))

    def unblock(
        self,
        key: KeyLike,
        lease: int | None = None,
        *,
        outcome: OutcomeName | None = None,
        retry_after: float | None = None,
        reason: str | None = None,
        uses: int | None = None,
    ) -> Unblocked:
        """Give a key back, and report how the work with it went. Raises UnknownKey, StaleLease.

        With a lease number, from `lease` or from `key` itself, only if that lease is still its latest. Without
        one, frees the key whoever holds it, takes no `outcome`, and is not repeated after a lost answer. `retry_after`,
        in seconds, goes with the outcome `rate_limited`; `reason`, up to 200 characters, is for people. A key with a
        pace is charged for `uses` in all, one by default.
        """
        return self._call(calls.unblock(key, lease, outcome, retry_after, reason, uses=uses))

    def extend(self, key: KeyLike, seconds: float | None = None, *, lease: int | None = None) -> Extended:
        """Let a lease end `seconds` from now, by default the pool's block, if that is later.

        Raises UnknownKey, StaleLease, LeaseOver, and BlockLimit if it would end when it ends anyway.
        """
        return self._call(calls.extend(key, seconds, lease))

    def quarantine(self, key: KeyLike, reason: str | None = None, now: bool = False) -> Row:
        """Take a key out of service until `restore` (admin): when its lease ends, or `now`. Raises UnknownKey."""
        return self._call(calls.quarantine(key, reason, now))

    def restore(self, key: KeyLike) -> Row:
        """Make a cooling or quarantined key available, and forget its reports (admin). Raises UnknownKey."""
        return self._call(calls.restore(key))

    def keepalive(self, key: KeyLike) -> KeptAlive:
        """Postpone a key's expiry. Raises UnknownKey, and StaleLease for a lease that somebody else has by now."""
        return self._call(calls.keepalive(key))

    def delete(self, key: KeyLike) -> None:
        """Delete a key permanently (admin). Raises UnknownKey."""
        return self._call(calls.delete(key))

    def get(self, key: KeyLike) -> Row:
        """The state of a key. Raises UnknownKey, and StaleLease for a lease that somebody else has by now."""
        return self._call(calls.get(key))

    def reveal(self, key: KeyLike) -> Revealed:
        """The text of a key, by its id (admin). Goes to the audit log. Raises UnknownKey."""
        return self._call(calls.reveal(key))

    def import_key(
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
        """Add a key from elsewhere to the pool, unless it has this secret already (admin). So a repeat is safe.

        `name` is unique in the pool; `labels` are shown to viewers; `data`, at most 4 KiB as JSON, only to the holders
        of the key; `pace`, `{"count": 5, "seconds": 60, "burst": 1}`, is in place of the pool's; `seats` is how many
        may hold it at a time, 1 to 100. Into a pool whose keys expire it needs `expire=True`, and a keeper. Raises
        NameTaken, PoolFull, KeysWouldExpire, SecretsKeyRequired.
        """
        return self._call(calls.import_key(secret, name, labels, data, pace, seats=seats, expire=expire))

    def update(
        self,
        key: KeyLike,
        *,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        data: Mapping[str, Any] | None = None,
        pace: Mapping[str, float] | None = None,
        seats: int | None = None,
    ) -> Row:
        """Change a key's name, labels, data or pace, each as a whole (admin): `""` or `{}` removes it, None leaves it.

        `seats` is how many may hold it at a time; of fewer, those that are held go when their leases end. Raises
        UnknownKey, NameTaken, PoolFull.
        """
        return self._call(calls.update(key, name, labels, data, pace, seats=seats))

    def replace(self, key: KeyLike, secret: str) -> Row:
        """Give a key another text, and forget its failures (admin). Raises UnknownKey, SecretExists.

        Id, name and history stay; a cooldown or quarantine is over. Whoever holds the key may go on with the old text
        until the lease ends.
        """
        return self._call(calls.replace(key, secret))

    def find(self, text: str) -> Row:
        """The state of a key by its whole text, else `id:42`, its name, or the first with this hint (viewer).

        The text is not in the URL. Raises UnknownKey.
        """
        return self._call(calls.find(text))

    def page(
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
        """One page of keys (viewer): see docs/api.md for what goes with what. Raises BadRequest.

        `prefix` is how generated keys begin, `name` how names do; `owner` is who holds them.
        """
        return self._call(calls.page(state, prefix, order, limit, after, name=name, owner=owner))

    def rows(
        self,
        *,
        state: StateName | None = None,
        prefix: str | None = None,
        order: Order | None = None,
        name: str | None = None,
        owner: str | None = None,
    ) -> Iterator[Row]:
        """All keys (viewer), one call for each 500, as they are read."""
        after: str | None = None
        while True:
            page = self.page(
                state=state,
                prefix=prefix,
                order=order,
                limit=calls.MOST_ROWS,
                after=after,
                name=name,
                owner=owner,
            )
            yield from page.keys
            after = page.next
            if after is None:
                return

    def history(self, key: KeyLike, limit: int | None = None) -> Iterator[PastLease]:
        """The leases of a key that have ended (viewer), the latest first: all that are kept, or `limit` of them.

        One call for each 500, as they are read. By its id, a key that is gone has a history, too. Raises UnknownKey.
        """
        after: str | None = None
        left = math.inf if limit is None else limit
        while left > 0:
            part = self._call(calls.history(key, int(min(left, 500)), after))
            yield from part.rows
            left -= len(part.rows)
            after = part.next
            if after is None:
                return

    def owners(self) -> Iterator[Holder]:
        """Who holds keys (viewer), in order of name, one call for each 500, as they are read."""
        return self._all(calls.owners)

    def release_owner(self, owner: str, *, client: str | None = None) -> int:
        """End all leases that an owner holds, under this token or under any (admin). Returns how many that were."""
        return self._call(calls.release_owner(owner, client))

    def waiters(self) -> Iterator[Waiting]:
        """Who waits for a key at the server that answers (viewer), first come first, as they are read."""
        return self._all(calls.waiters)

    def events(self, kind: str | None = None) -> Iterator[RareEvent]:
        """The latest rare events (viewer), of one kind if given, newest first, as they are read. Raises BadRequest."""
        return self._all(lambda after: calls.events(kind, after))

    def stats(self) -> Stats:
        """All counts (viewer)."""
        return self._call(calls.stats())

    # -- pools, and the whole server

    def pools(self) -> list[PoolInfo]:
        """All pools that the token is for, in order of name (viewer)."""
        return self._call(calls.pools())

    def get_pool(self, name: str) -> PoolInfo:
        """Counts and settings of a pool (viewer). Raises UnknownPool."""
        return self._call(calls.get_pool(name))

    def put_pool(self, name: str, **settings: PoolValue) -> PoolInfo:
        """Make a pool, or give these settings to the one of this name (admin); the others get their defaults.

        docs/api.md lists them; None is a value for `keepalive_seconds` (keys never expire), `error_threshold`, `pace`.
        Raises TooManyPools, PoolDraining, PoolFixed, BadRequest.
        """
        return self._call(calls.put_pool(name, settings))

    def change_pool(self, name: str, **settings: PoolValue) -> PoolInfo:
        """Change some settings of a pool, for what is acquired or kept alive from then on (admin).

        Raises UnknownPool, PoolFixed, PoolDraining, BadRequest.
        """
        return self._call(calls.change_pool(name, settings))

    def delete_pool(self, name: str, *, drain: bool = False, now: bool = False) -> PoolInfo | None:
        """Delete a pool (admin): an empty one at once; with `drain` any, as soon as its last lease has ended, or `now`.

        Returns None if it is gone, else its counts. Raises UnknownPool, PoolNotEmpty, PoolFixed.
        """
        return self._call(calls.delete_pool(name, drain, now))

    def rekey(self) -> Rekeying:
        """Begin to encrypt all stored keys under the server's first secrets key (admin). Raises SecretsKeyRequired."""
        return self._call(calls.rekey())

    def rekeying(self) -> Rekeying:
        """How far that is (admin)."""
        return self._call(calls.rekeying())

    # -- batches of any size, a thousand items a call

    def generate_many(self, count: int, *, progress: Progress | None = None) -> list[GeneratedKey]:
        """Make keys (admin). Raises PoolFull; what was made before is in the error's `partial`."""
        return self._batch(calls.generate_many(count, progress))

    def import_many(
        self,
        items: Iterable[NewKey],
        *,
        exists: Exists = "skip",
        expire: bool = False,
        progress: Progress | None = None,
    ) -> Imports:
        """Add keys from elsewhere (admin): a secret, a tuple of secret, name, labels, data, pace, seats, or a dict.

        The result has one for each item, in their order; one that can't be imported, as its name is taken for example,
        fails alone. With `exists="update"`, a key that the pool has gets all that the item says but the secret. Raises
        PoolFull (then none of the call's thousand is imported), KeysWouldExpire, SecretsKeyRequired; what was done
        before is in the error's `partial`. Raises ValueError, before anything is sent, for an item of a wrong type.
        """
        return self._batch(calls.import_many(items, exists, expire, progress))

    def acquire_many(
        self,
        count: int,
        *,
        owner: str | None = None,
        block_seconds: float | None = None,
        progress: Progress | None = None,
    ) -> LeasedKeys:
        """Acquire up to `count` keys, fewer if fewer are available. Raises NoKeyAvailable if none is.

        `with pool.acquire_many(3) as keys` gives them all back at the end, with no outcome; without `with`, that is
        up to you.
        """
        owner = default_owner() if owner is None else owner
        return LeasedKeys(self, self._batch(calls.acquire_many(count, owner, block_seconds, progress)))

    def keepalive_many(self, keys: Iterable[KeyLike], *, progress: Progress | None = None) -> Done:
        """Postpone expiries. Keys that do not exist are in the result's `unknown`."""
        return self._batch(calls.keepalive_many(keys, progress))

    def unblock_many(self, items: Iterable[UnblockItem], *, progress: Progress | None = None) -> Done:
        """Give keys back, each a key, a pair of key and lease number, or an Unblock with a report."""
        return self._batch(calls.unblock_many(items, progress))

    def extend_many(
        self, items: Iterable[LeaseItem], seconds: float | None = None, *, progress: Progress | None = None
    ) -> Done:
        """Extend leases, each a leased key or a pair of key and lease number; see `extend`."""
        return self._batch(calls.extend_many(items, seconds, progress))

    def quarantine_many(
        self,
        keys: Iterable[KeyLike],
        reason: str | None = None,
        now: bool = False,
        *,
        progress: Progress | None = None,
    ) -> Done:
        """Take keys out of service (admin)."""
        return self._batch(calls.quarantine_many(keys, reason, now, progress))

    def restore_many(self, keys: Iterable[KeyLike], *, progress: Progress | None = None) -> Done:
        """Make cooling and quarantined keys available (admin)."""
        return self._batch(calls.restore_many(keys, progress))

    def delete_many(self, keys: Iterable[KeyLike], *, progress: Progress | None = None) -> Done:
        """Delete keys permanently (admin)."""
        return self._batch(calls.delete_many(keys, progress))

    def _call(self, call: Call[T]) -> T:
        return self._runner.run(result(call, self._settings))

    def _all(self, part_after: Callable[[str | None], Call[Part[T]]]) -> Iterator[T]:
        """The rows of a list, one call for each part, as they are read."""
        after: str | None = None
        while True:
            part = self._call(part_after(after))
            yield from part.rows
            after = part.next
            if after is None:
                return

    def _batch(self, batch: Batch[T]) -> T:
        return self._runner.run(results(batch, self._settings))


class HeldKey(Held):
    """A key that is yours until `remaining` is 0; until then `secret` is its text.

    `lost` is set when the lease is lost: the key was deleted, or leased to someone else, or its time ran out.
    Its `wait` ends with False when the key is given back.
    """

    def __init__(
        self, pool: KeyPool, acquired: Timed[LeasedKey], owner: str, block_seconds: float | None
    ) -> None:
        super().__init__(acquired, owner, block_seconds, pool._settings.pool)  # noqa: SLF001 - a part of it
        self._pool = pool
        self._lost = LostEvent(min(self._released_at, self._expires_at))

    @property
    def lost(self) -> threading.Event:
        """Set when the lease is known to be lost."""
        return self._lost

    def extend(self, seconds: float | None = None) -> Extended:
        """Let the lease end `seconds` from now, if that is later; by default as long as it was acquired for.

        Raises LeaseLost if it is lost, BlockLimit if it would end when it ends anyway, and LeaseOver if an operator
        will quarantine the key at its end.
        """
        return self._pool._extend(self, seconds)  # noqa: SLF001 - a part of it

    def release(self) -> Unblocked | None:
        """Give the key back now, with what was reported, else `ok`. The end of the `with` then does nothing.

        Returns the server's answer, None if it was given back before, or couldn't be, which is logged. Raises
        LeaseLost as the end of the `with` does.
        """
        raise_or_note(self._pool._give_back(self, well=True), None)  # noqa: SLF001 - a part of it
        return self.unblocked

    def _signal_lost(self) -> None:
        self._lost.set()

    def _end_moved(self, end: float) -> None:
        self._lost.move(end)

    def _ended(self) -> None:
        self._lost.end()


class Lease:
    """A context manager, for one `with` at a time; each acquires anew."""

    def __init__(
        self,
        pool: KeyPool,
        owner: str | None,
        wait: float | None,
        block_seconds: float | None = None,
        extend: bool = False,
    ) -> None:
        self._pool = pool
        self._asked = (owner, wait, block_seconds, extend)
        self._held: HeldKey | None = None

    def __enter__(self) -> HeldKey:
        if self._held is not None:
            raise KeyPoolError("this lease is in use; ask the pool for another one")
        self._held = self._pool._hold(*self._asked)  # noqa: SLF001 - a part of it
        return self._held

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        held, self._held = self._held, None
        if held is not None:
            lost = self._pool._give_back(held, well=error is None)  # noqa: SLF001 - a part of it
            raise_or_note(lost, error)


class LeasedKeys(list[LeasedKey]):
    """Keys that were acquired together. In a `with`, all are given back at its end.

    Leaving it raises LeaseLost if any was lost meanwhile, unless another error is propagating.
    """

    def __init__(self, pool: KeyPool, keys: Iterable[LeasedKey]) -> None:
        super().__init__(keys)
        self._pool = pool

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        raise_or_note(self._pool._give_back_many(self), error)  # noqa: SLF001 - a part of it


class Keeper(KeptKeys):
    """Keeps keys alive from `start`, or `with`, to `stop`, in one thread with connections of its own.

    `on_dead(key)` is called in that thread, once for each key that was deleted or has expired; `on_error(error)`
    after each round that failed. A round is repeated until it succeeds; a refused token or
    a wrong URL stops the keeper: then `running` is False and `error` says why. At exit it stops by itself. A
    forked child has no keeper: the parent's goes on.
    """

    def __init__(self, runner: Runner, rounds: Rounds | LeaseRounds) -> None:
        super().__init__(rounds, runner.wake)
        self._runner = runner
        self._pid = 0
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether the thread runs, in this process."""
        return self._thread is not None and self._pid == os.getpid() and self._thread.is_alive()

    def start(self) -> Self:
        """Begin, with a round at once. Raises KeyPoolError if it was started before."""
        if self._thread is not None:
            raise KeyPoolError("a keeper is started once; make another one")
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="keypool keeper", daemon=True)
        _running.add(self)
        self._thread.start()
        return self

    def stop(self) -> None:
        """End it, and wait for its thread; a call in progress is aborted. May be called again, by any thread."""
        _running.discard(self)
        self._runner.close()
        if self.running and self._thread is not threading.current_thread():
            assert self._thread is not None
            self._thread.join(5)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        block_all()
        try:
            self._runner.run(self._rounds.steps())
        except PoolClosed:
            pass
        finally:
            self._runner.close()


_running: weakref.WeakSet[Keeper] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for keeper in list(_running):
        keeper.stop()
