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
import math
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
    Extended,
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
        with self._lock:
            if self._lease_keeper is None or not self._lease_keeper.running:
                self._lease_keeper = self.keeper().start()
        self._lease_keeper.add(held)
        return self._lease_keeper

    def _extend(self, held: HeldKey, seconds: float | None) -> Extended:
        extended = self._runner.run(held.extension(self._settings, seconds))
        if held.expires_first and not held.over:
            self._keep_alive(held)
        return extended

    def _give_back(self, held: HeldKey, within: float = math.inf, *, well: bool = False) -> LeaseLost | None:
        if self._lease_keeper is not None:
            self._lease_keeper.discard(held)
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
    ) -> Unblocked:
        """Give a key back, and report how the work with it went. Raises UnknownKey, StaleLease.

        With a lease number, from `lease` or from `key` itself, only if that lease is still its latest. Without
        one, frees the key whoever holds it, takes no `outcome`, and is not repeated after a lost answer. `retry_after`,
        in seconds, goes with the outcome `rate_limited`; `reason`, up to 200 characters, is for people.
        """
        return self._call(calls.unblock(key, lease, outcome, retry_after, reason))

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
        super().__init__(acquired, owner, block_seconds)
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
