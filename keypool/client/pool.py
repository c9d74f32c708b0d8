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
import os
import ssl
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx2

from keypool.client import calls
from keypool.client.answers import (
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
from keypool.client.attempts import result, results
from keypool.client.blocking import Runner
from keypool.client.calls import Batch, Call, Order, Progress, StateName, UnblockItem
from keypool.client.errors import KeyPoolError, LeaseLost, PoolClosed
from keypool.client.held import LAST_TRY, HeldKey, give_back_many, hold, raise_or_note
from keypool.client.rounds import KeptKeys, OnDead, OnError, Rounds
from keypool.client.settings import (
    DEFAULT_TIMEOUT,
    DEFAULT_URL,
    Retry,
    Settings,
    default_owner,
    from_environment,
)
from keypool.client.signals import block_all

T = TypeVar("T")


class KeyPool:
    """A client of the server at `url`. Threads may share it; a forked child may go on using it.

    `timeout` is how many seconds a call may take with all its retries (for an acquire, in addition to its wait);
    None means no limit. `retry` is a Retry, or how many times at most a failing call is sent again.
    `transport` is an httpx2 transport to use instead of the default one: for proxies, or for tests
    (keypool.client.testing). It is closed with the client, and `timeout` bounds each of its reads and writes
    rather than their sum. Raises ValueError for a wrong argument.

    `close` it, or use it in a `with`: that stops its keepers and gives back what its leases still hold.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        token: str | None = None,
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
        retry: Retry | int | None = None,
        ssl_context: ssl.SSLContext | None = None,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self._settings = Settings.of(url, token, timeout, retry)
        self._runner = Runner(self._settings, ssl_context, transport)
        self._keepers: weakref.WeakSet[Keeper] = weakref.WeakSet()
        self._held: weakref.WeakSet[HeldKey] = weakref.WeakSet()
        self._lease_keeper: Keeper | None = None
        self._lock = threading.Lock()

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ, **options: Any) -> Self:
        """A client configured by KEYPOOL_URL, KEYPOOL_TOKEN and KEYPOOL_TOKEN_FILE; `options` are KeyPool's.

        Raises ValueError, also for a token file that cannot be read.
        """
        return cls(**from_environment(environ), **options)

    def __repr__(self) -> str:
        return f"KeyPool({self._settings.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the keepers, give back what leases hold, close the connections. Later calls raise PoolClosed."""
        for keeper in list(self._keepers):
            keeper.stop()
        for held in list(self._held):
            self._give_back(held, LAST_TRY)
        self._runner.close()

    # -- leases and keepers

    def lease(self, *, owner: str | None = None, wait: float | None = 0.0) -> Lease:
        """`with pool.lease() as key`: a HeldKey inside, given back under its lease number at the end.

        Waits up to `wait` seconds for a key, None for ever; `owner` is `host:pid` by default. Keeps the key
        alive if it would expire before the lease ends. Entering raises NoKeyAvailable, TooManyWaiters;
        leaving raises LeaseLost if the lease had ended before, unless another error is propagating.
        """
        return Lease(self, owner, wait)

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
        for by default. Never extends a lease.
        """
        rounds = Rounds(self._settings, keys, on_dead, on_error, keepalive_seconds)
        keeper = Keeper(self._runner.another(), rounds)
        self._keepers.add(keeper)
        return keeper

    def _hold(self, owner: str | None, wait: float | None) -> HeldKey:
        held = self._runner.run(hold(self._settings, owner, wait))
        held.register(lambda: self._give_back(held, LAST_TRY))
        self._held.add(held)
        if held.expires_first:
            with self._lock:
                if self._lease_keeper is None or not self._lease_keeper.running:
                    self._lease_keeper = self.keeper().start()
            self._lease_keeper.add(held)
        return held

    def _give_back(self, held: HeldKey, within: float) -> LeaseLost | None:
        if self._lease_keeper is not None:
            self._lease_keeper.discard(held)
        lost = self._runner.run(held.give_back(self._settings, within))
        self._held.discard(held)
        return lost

    def _give_back_many(self, keys: list[LeasedKey]) -> LeaseLost | None:
        return self._runner.run(give_back_many(keys, self._settings))

    # -- single calls

    def generate(self) -> GeneratedKey:
        """Make a key (admin). Raises PoolFull."""
        return self._call(calls.generate())

    def acquire(self, *, owner: str | None = None, wait: float | None = 0.0) -> LeasedKey:
        """Acquire a key, to be given back by `unblock`; `lease` does that by itself. Raises NoKeyAvailable.

        Waits up to `wait` seconds, None for ever. An acquire that waits is repeated after a lost answer; a
        key that the lost one may have acquired is released by its deadline.
        """
        return self._call(calls.acquire(default_owner() if owner is None else owner, wait))

    def unblock(self, key: KeyLike, lease: int | None = None) -> Unblocked:
        """Give a key back. Raises UnknownKey, StaleLease.

        With a lease number, from `lease` or from `key` itself, only if that lease is still its latest. Without
        one, frees the key whoever holds it, and is not repeated after a lost answer.
        """
        return self._call(calls.unblock(key, lease))

    def keepalive(self, key: KeyLike) -> KeptAlive:
        """Postpone a key's expiry. Raises UnknownKey."""
        return self._call(calls.keepalive(key))

    def delete(self, key: KeyLike) -> None:
        """Delete a key permanently (admin). Raises UnknownKey."""
        return self._call(calls.delete(key))

    def get(self, key: KeyLike) -> Row:
        """The state of a key. Raises UnknownKey."""
        return self._call(calls.get(key))

    def reveal(self, key: KeyLike) -> Revealed:
        """The text of a key, by its id (admin). Goes to the audit log. Raises UnknownKey."""
        return self._call(calls.reveal(key))

    def page(
        self,
        *,
        state: StateName | None = None,
        prefix: str | None = None,
        order: Order | None = None,
        limit: int | None = None,
        after: str | None = None,
    ) -> Page:
        """One page of keys (viewer): see docs/api.md for what goes with what. Raises BadRequest."""
        return self._call(calls.page(state, prefix, order, limit, after))

    def rows(
        self, *, state: StateName | None = None, prefix: str | None = None, order: Order | None = None
    ) -> Iterator[Row]:
        """All keys (viewer), one call for each 500, as they are read."""
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
        return self._batch(calls.generate_many(count, progress))

    def acquire_many(
        self, count: int, *, owner: str | None = None, progress: Progress | None = None
    ) -> LeasedKeys:
        """Acquire up to `count` keys, fewer if fewer are available. Raises NoKeyAvailable if none is.

        `with pool.acquire_many(3) as keys` gives them all back at the end; without `with`, that is up to you.
        """
        owner = default_owner() if owner is None else owner
        return LeasedKeys(self, self._batch(calls.acquire_many(count, owner, progress)))

    def keepalive_many(self, keys: Iterable[KeyLike], *, progress: Progress | None = None) -> Done:
        """Postpone expiries. Keys that do not exist are in the result's `unknown`."""
        return self._batch(calls.keepalive_many(keys, progress))

    def unblock_many(self, items: Iterable[UnblockItem], *, progress: Progress | None = None) -> Done:
        """Give keys back, each a key or a pair of key and lease number."""
        return self._batch(calls.unblock_many(items, progress))

    def delete_many(self, keys: Iterable[KeyLike], *, progress: Progress | None = None) -> Done:
        """Delete keys permanently (admin)."""
        return self._batch(calls.delete_many(keys, progress))

    def _call(self, call: Call[T]) -> T:
        return self._runner.run(result(call, self._settings))

    def _batch(self, batch: Batch[T]) -> T:
        return self._runner.run(results(batch, self._settings))


class Lease:
    """A context manager, for one `with` at a time; each acquires anew."""

    def __init__(self, pool: KeyPool, owner: str | None, wait: float | None) -> None:
        self._pool = pool
        self._owner = owner
        self._wait = wait
        self._held: HeldKey | None = None

    def __enter__(self) -> HeldKey:
        if self._held is not None:
            raise KeyPoolError("this lease is in use; ask the pool for another one")
        self._held = self._pool._hold(self._owner, self._wait)  # noqa: SLF001 - a part of it
        return self._held

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        held, self._held = self._held, None
        if held is not None:
            raise_or_note(self._pool._give_back(held, float("inf")), error)  # noqa: SLF001 - a part of it


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

    def __init__(self, runner: Runner, rounds: Rounds) -> None:
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
