"""The protocol of engines. An engine holds the pool: in this process, with a data file or without, or in Valkey.

The calls are those of the contract, single and batch, and return its shapes (core/answers.py). All are coroutines,
since an engine answers only when everything that the answer says is durable. A call that has nothing to wait for never
suspends: its caller has the answer in the same turn of the loop. A call may await futures and nothing else, because its
caller need not be a task.

A `Ref` names a key: the text, or the public id as an int. Batches process their items in order, one by one as the
single calls would, and return one result for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol

from keypool.core import errors
from keypool.core.answers import (
    EndedLease,
    GeneratedKey,
    Identity,
    KeptAlive,
    Lease,
    Page,
    Ref,
    Revealed,
    Row,
    Stats,
    Unblocked,
)
from keypool.core.cursor import ListQuery
from keypool.core.events import Event
from keypool.ops.histogram import Histogram

NOTE = "note."
"""The prefix of the names of notes (`keep_notes`) where they are stored among the pool's own numbers."""


class Timed(Protocol):
    """A call whose time in the queue is added up, so that its service time can be measured without it."""

    waited: float
    """Seconds in the queue so far."""


class Engine(Protocol):
    """See the module. Every call may raise StorageUnavailable. n is the number of keys in the pool, k of items."""

    name: str

    async def generate(self, count: int) -> list[GeneratedKey]:
        """Generate `count` keys, all or none. O(k log n). Raises PoolFull."""
        ...

    async def acquire(self, owner: str | None, wait: float, timed: Timed | None = None) -> Lease:
        """Serve a uniformly random available key, or wait up to `wait` seconds for one. O(log n).

        Waiters are served first come, first served. A caller gives up by closing the coroutine: the call leaves the
        queue, and a key that it was just served is available again. The time in the queue, in seconds, is added to
        `timed.waited`. Raises NoKeyAvailable, TooManyWaiters, Draining.
        """
        ...

    async def acquire_many(self, owner: str | None, count: int) -> list[Lease]:
        """Serve up to `count` keys, at least one. O(k log n). Raises NoKeyAvailable."""
        ...

    async def unblock(self, ref: Ref, lease: int | None, ended: list[EndedLease] | None = None) -> Unblocked:
        """Make a key available again. O(log n). Raises UnknownKey, StaleLease.

        If `lease` is None and the call ends a lease, that lease is added to `ended` as soon as the change is made, even
        if the call then raises StorageUnavailable.
        """
        ...

    async def unblock_many(
        self, items: Sequence[tuple[Ref, int | None]], ended: list[EndedLease] | None = None
    ) -> list[str]:
        """Unblock keys: "done", "unknown" or "stale" for each item. `ended` as for `unblock`. O(k log n)."""
        ...

    async def keepalive(self, ref: Ref) -> KeptAlive:
        """Postpone the expiry of a key. O(log n). Raises UnknownKey."""
        ...

    async def keepalive_many(self, refs: Sequence[Ref]) -> list[bool]:
        """For each item, whether the key was known. O(k log n)."""
        ...

    async def delete(self, ref: Ref) -> Identity:
        """Purge a key. O(log n). Raises UnknownKey."""
        ...

    async def delete_many(self, refs: Sequence[Ref]) -> list[Identity | None]:
        """For each item, the purged key, or None if it was unknown. O(k log n)."""
        ...

    async def get(self, ref: Ref) -> Row:
        """The row of a key. O(1). Raises UnknownKey."""
        ...

    async def reveal(self, ref: Ref) -> Revealed:
        """The text of a key. O(1). Raises UnknownKey."""
        ...

    async def page(self, query: ListQuery) -> Page:
        """A page of rows. O(log n + page). Raises BadRequest for an invalid cursor."""
        ...

    async def stats(self) -> Stats:
        """The counts of the pool. O(1)."""
        ...

    async def notes(self) -> Mapping[str, int]:
        """The notes of all servers of the pool, kept across restarts. O(notes)."""
        ...

    async def keep_notes(self, notes: Mapping[str, int | None]) -> None:
        """Store integers that are not the pool's own, by name; None removes a note. O(notes)."""
        ...

    async def expiring(self, seconds: float) -> int:
        """How many keys expire within `seconds` without a keepalive. O(seconds)."""
        ...

    @property
    def event_seq(self) -> int:
        """The number of the latest event. It grows by one with each event, from an arbitrary start. O(1)."""
        ...

    def recent(self, count: int, key_id: int | None = None) -> list[Event]:
        """The latest `count` events that are still in memory, oldest first; with `key_id`, of that key only.

        O(count), O(RECENT_EVENTS) for one key.
        """
        ...

    def ready(self) -> None:
        """Raise Unavailable, with the reason, if calls can't be served."""
        ...

    def storage_up(self) -> bool:
        """Whether changes can be kept."""
        ...

    @property
    def degraded(self) -> str | None:
        """The part of the pool that can't be reached, and why, while others are served; None if all can be."""
        ...

    @property
    def clock_steps(self) -> int:
        """How many times the clock of the deadlines was stepped by more than 5 s. O(1)."""
        ...

    def histograms(self) -> dict[str, Histogram]:
        """The histograms, by the name of their metric (ops/metrics.py) without its prefix."""
        ...

    def figures(self) -> Mapping[str, float]:
        """Figures of the engine's own work for the dashboard, by name: its commits or its pipelines. O(1)."""
        ...

    def measures(self) -> Mapping[str, float | Mapping[str, float]]:
        """Further metrics (ops/metrics.py) by full name; with a label, one value for each of its values. O(1)."""
        ...

    def oldest_wait(self) -> float:
        """Seconds that the first in this server's queue has waited, 0 if the queue is empty. O(1)."""
        ...

    def drain(self) -> None:
        """Answer all waiters with Draining, and admit no more. O(waiters)."""
        ...

    async def close(self) -> None:
        """Make durable what isn't durable yet, and stop. No call may follow. Raises StorageUnavailable."""
        ...


class Loading:
    """The engine of a server that is still reading its keys: every call raises Loading."""

    name = "loading"
    degraded = None
    clock_steps = 0

    def ready(self) -> None:
        """Raise Loading."""
        raise errors.Loading

    def storage_up(self) -> bool:
        """Not yet."""
        return False

    def histograms(self) -> dict[str, Histogram]:
        """Nothing yet."""
        return {}

    def drain(self) -> None:
        """Nobody waits yet."""

    async def close(self) -> None:
        """Nothing is open yet."""

    def __getattr__(self, call: str) -> Any:
        return _refuse_loading


async def _refuse_loading(*args: Any) -> NoReturn:
    raise errors.Loading
