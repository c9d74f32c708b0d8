"""The protocol of engines. An engine holds the pool: in this process, with a data file or without, or in Valkey.

The calls are those of the contract, single and batch, and return its shapes (core/answers.py). All are coroutines,
since an engine answers only when everything that the answer says is durable. A call that has nothing to wait for never
suspends: its caller has the answer in the same turn of the loop. A call may await futures and nothing else, because its
caller need not be a task.

An Engine is one pool; `Pools` has all of a server. Calls raise PoolDraining once their pool is being emptied for good,
unless they only look at keys or end what is there.

A `Ref` names a key: the text, the public id as an int, or the Handle of a lease, with which the call raises StaleLease
once a newer lease of the key exists; or a Written, which is the text if a key has it, else the other. Batches process
their items in order, one by one as the single calls would, and return one result for each: "done", "unknown" or
"stale", for an extension also "over" or "limit". `origin` is who changes something: it is in the event.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

from keypool.core import errors
from keypool.core.answers import (
    EndedLease,
    Extended,
    Extension,
    GeneratedKey,
    HistoryPage,
    HolderRows,
    Identity,
    Imported,
    ImportedKey,
    KeptAlive,
    KeyPatch,
    Lease,
    NewKey,
    Page,
    PoolRow,
    RareEventRows,
    Ref,
    Rekeying,
    Revealed,
    Row,
    Stats,
    Unblock,
    Unblocked,
    WaiterRows,
)
from keypool.core.cursor import EventQuery, HistoryQuery, HolderQuery, ListQuery, WaiterQuery
from keypool.core.events import HOLDER, Event, Origin
from keypool.core.handles import Handles
from keypool.core.outcomes import Report
from keypool.core.rules import PoolRules, Settings
from keypool.ops.histogram import Histogram

NOTE = "note."
"""The prefix of the names of notes (`keep_notes`) where they are stored among the pool's own numbers."""


class Timed(Protocol):
    """A call whose time in the queue is added up, so that its service time can be measured without it."""

    waited: float
    """Seconds in the queue so far."""


class Attempt(Protocol):
    """An acquire that its caller may repeat, and gets the same leases as long as they are held."""

    digest: bytes
    """16 bytes that are the same for each repeat, and for no other acquire."""
    replayed: bool
    """Set if the answer repeats leases that were given before."""


class Client(NamedTuple):
    """The named token with which a caller acquires, and how many leases it may hold in all pools together."""

    name: str
    max_held: int | None = None


class Engine(Protocol):
    """One pool. Every call may raise StorageUnavailable. n is the number of keys in the pool, k of items."""

    name: str
    """Of the kind of engine."""

    @property
    def pool_name(self) -> str:
        """The name of the pool."""
        ...

    @property
    def rules(self) -> PoolRules:
        """The settings of the pool, which may change."""
        ...

    @property
    def pool_draining(self) -> bool:
        """Whether the pool is being emptied for good."""
        ...

    handles: Handles
    """Makes and reads the handles of the pool's leases."""

    async def generate(self, count: int, origin: Origin = HOLDER) -> list[GeneratedKey]:
        """Generate `count` keys, all or none. O(k log n). Raises PoolFull."""
        ...

    async def import_key(self, item: NewKey, expire: bool, origin: Origin) -> ImportedKey:
        """Add a key from elsewhere, available at once, unless the pool has its secret. O(log n).

        It never expires, unless the pool purges keys, which `expire` has to allow.
        Raises KeysWouldExpire, NameTaken, PoolFull, SecretsKeyRequired.
        """
        ...

    async def import_many(
        self, items: Sequence[NewKey | Imported], update: bool, expire: bool, origin: Origin
    ) -> list[Imported]:
        """Add keys from elsewhere, one by one, but all or none of the new ones if the pool gets full. O(k log n).

        With `update`, a key that the pool has gets the item's name, labels, data, pace and seats. An item that is a
        result already, a failed one, is passed through in its place.

        Raises KeysWouldExpire, PoolFull, SecretsKeyRequired.
        """
        ...

    async def update(self, ref: Ref, patch: KeyPatch, origin: Origin) -> Row:
        """Change name, labels, data, pace or the number of seats of a key. O(seats · log n).

        Raises UnknownKey, StaleLease, NameTaken, PoolFull, PoolDraining.
        """
        ...

    async def replace(self, ref: Ref, secret: str, origin: Origin) -> Row:
        """Give a key another text. O(log n). Raises UnknownKey, StaleLease, SecretExists, SecretsKeyRequired.

        Its failures are forgotten, and a cooldown or quarantine is over, but a lease goes on: its holder may use the
        old text for it as well until it ends.
        """
        ...

    async def find(self, text: str) -> Row:
        """The row of a key that an operator looks for: by the whole text, `id:N`, the name, or else the first with
        this hint. O(log n). Raises UnknownKey.
        """
        ...

    async def acquire(
        self,
        owner: str | None,
        wait: float,
        timed: Timed | None = None,
        block_seconds: float | None = None,
        attempt: Attempt | None = None,
        *,
        client: Client | None = None,
    ) -> Lease:
        """Serve a uniformly random available key, or wait up to `wait` seconds for one. O(log n).

        Waiters are served first come, first served. A caller gives up by closing the coroutine: the call leaves the
        queue, and a key that it was just served is available again. The time in the queue, in seconds, is added to
        `timed.waited`. The block lasts `block_seconds`, if given, in place of the pool's.

        If the `attempt` was given a lease that is still held, that is the answer. If it is waiting on this server, this
        call takes its place, and the other one raises Superseded. For 10 s after the attempt's NoKeyAvailable with a
        `wait`, its place in this server's queue is kept for it.

        A `client` that holds as many leases as it may waits until one of them has ended, and is passed over meanwhile.
        Raises NoKeyAvailable, ShareSpent, TooManyWaiters, Draining, PoolDraining, Superseded.
        """
        ...

    async def acquire_many(
        self,
        owner: str | None,
        count: int,
        block_seconds: float | None = None,
        attempt: Attempt | None = None,
        *,
        client: Client | None = None,
    ) -> list[Lease]:
        """Serve up to `count` keys, at least one. O(k log n). Raises NoKeyAvailable, ShareSpent.

        A `client` gets no more than it may hold. If the `attempt` was given leases of which some are still held, those
        are the answer.
        """
        ...

    async def unblock(
        self,
        ref: Ref,
        lease: int | None,
        ended: list[EndedLease] | None = None,
        report: Report | None = None,
        origin: Origin = HOLDER,
        *,
        uses: int = 1,
    ) -> Unblocked:
        """Make a key available again, or what its holder's `report` asks for. O(log n). Raises UnknownKey, StaleLease.

        A text of several seats stands for the one with this lease; without a lease number, ManySeats is raised.
        If the key has a pace and the call changes anything, it is charged for so many `uses` in all. If `lease` is None
        and the call ends a lease, that lease is added to `ended` as soon as the change is made, even if the call then
        raises StorageUnavailable. A `report` needs a lease number, which with a Handle is its own.
        """
        ...

    async def unblock_many(
        self, items: Sequence[Unblock], ended: list[EndedLease] | None = None, origin: Origin = HOLDER
    ) -> list[str]:
        """Unblock keys. `ended` and reports as for `unblock`; `origin` is of items without a lease. O(k log n)."""
        ...

    async def extend(self, ref: Ref, lease: int, seconds: float | None) -> Extended:
        """Let a lease end `seconds` from now, None for the pool's `block_seconds`, if that is later. O(log n).

        Raises UnknownKey, StaleLease, LeaseOver, BlockLimit.
        """
        ...

    async def extend_many(self, items: Sequence[Extension]) -> list[str]:
        """Extend leases. O(k log n)."""
        ...

    async def quarantine(self, ref: Ref, reason: str | None, now: bool, origin: Origin) -> Row:
        """Take a key out of service: `now`, or when its lease ends. O(log n). Raises UnknownKey, StaleLease."""
        ...

    async def quarantine_many(
        self, refs: Sequence[Ref], reason: str | None, now: bool, origin: Origin
    ) -> list[str]:
        """Quarantine keys. O(k log n)."""
        ...

    async def restore(self, ref: Ref, origin: Origin) -> Row:
        """Make a cooling or quarantined key available as soon as it has budget, and forget its reports. O(log n).

        Raises UnknownKey, StaleLease.
        """
        ...

    async def restore_many(self, refs: Sequence[Ref], origin: Origin) -> list[str]:
        """Restore keys. O(k log n)."""
        ...

    async def keepalive(self, ref: Ref) -> KeptAlive:
        """Postpone the expiry of a key. O(log n). Raises UnknownKey, StaleLease."""
        ...

    async def keepalive_many(self, refs: Sequence[Ref]) -> list[str]:
        """Postpone the expiry of keys. O(k log n)."""
        ...

    async def delete(self, ref: Ref, origin: Origin = HOLDER) -> Identity:
        """Purge a key. O(log n). Raises UnknownKey, StaleLease."""
        ...

    async def delete_many(self, refs: Sequence[Ref], origin: Origin = HOLDER) -> list[Identity | str]:
        """For each item, the purged key, or "unknown" or "stale". O(k log n)."""
        ...

    async def get(self, ref: Ref) -> Row:
        """The row of a key. O(1). Raises UnknownKey, StaleLease."""
        ...

    async def reveal(self, ref: Ref, origin: Origin = HOLDER) -> Revealed:
        """The text of a key. O(1). Raises UnknownKey, StaleLease."""
        ...

    async def owners(self, query: HolderQuery) -> HolderRows:
        """Who holds keys, in order of name; those without a name come first. O(log n + page).

        Raises BadRequest for an invalid cursor.
        """
        ...

    async def release_owner(self, owner: str, client: str | None, origin: Origin) -> int:
        """End the leases that an owner holds now, with any token or that of a client. Returns how many that were.

        O(leases · log n), in slices; one that begins meanwhile may be left.
        """
        ...

    async def waiters(self, query: WaiterQuery) -> WaiterRows:
        """Who waits at this server, in order: first come, first served. O(log n + page), for each limited client.

        Raises BadRequest for an invalid cursor.
        """
        ...

    async def rare_events(self, query: EventQuery) -> RareEventRows:
        """The rare events, which are kept across restarts, newest first. O(MOST_EVENTS).

        Raises BadRequest for an invalid cursor.
        """
        ...

    async def page(self, query: ListQuery) -> Page:
        """A page of rows. O(log n + page). Raises BadRequest for an invalid cursor."""
        ...

    async def history(self, ref: Ref, query: HistoryQuery) -> HistoryPage:
        """Leases of a key that have ended, the latest first. O(log n + page).

        A purged key has a history by its id, as long as a lease of it is kept. Raises UnknownKey, StaleLease, and
        BadRequest for a wrong cursor.
        """
        ...

    @property
    def history_kept(self) -> int:
        """How many leases of the pool that have ended are kept. O(1)."""
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

    def secrets(self) -> int:
        """How many different texts the keys have, of which seats share one. O(1), O(partitions) over Valkey."""
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


class Pools(Protocol):
    """All pools of a server. Calls that change something may raise StorageUnavailable. p is the number of pools.

    A pool that was changed on another server over the same Valkey is found within 2 s.
    """

    @property
    def default(self) -> Engine:
        """The pool `default`, which is always there, whose settings are the server's flags."""
        ...

    def get(self, name: str) -> Engine:
        """The pool of this name. O(1). Raises UnknownPool."""
        ...

    def names(self) -> list[str]:
        """The names of all pools, in order. O(p)."""
        ...

    def row(self, name: str) -> PoolRow:
        """Counts and settings of a pool. O(1). Raises UnknownPool."""
        ...

    async def put(self, name: str, settings: Settings, origin: Origin) -> bool:
        """Make a pool with these settings, or give them to the one of this name; whether it is new. O(log p).

        Settings that aren't given have their defaults from then on. Raises TooManyPools, PoolDraining, PoolFixed.
        """
        ...

    async def change(self, name: str, settings: Settings, origin: Origin) -> None:
        """Change some settings of a pool, for deadlines that are set from then on. O(1).

        Raises UnknownPool, PoolFixed, and BadRequest if the settings would contradict each other.
        """
        ...

    async def delete(self, name: str, *, drain: bool, now: bool, origin: Origin) -> bool:
        """Delete an empty pool, or drain one: it serves no more, and its keys are purged in slices. O(1).

        Keys that are held are purged when their leases end, or `now`. Returns whether the pool is gone already; when
        the last key of a draining one is, its name is free again. Raises UnknownPool, PoolNotEmpty, PoolFixed.
        """
        ...

    def on_change(self, callback: Callable[[], object]) -> None:
        """Call this whenever a pool comes, goes, drains, or gets other settings. O(1)."""
        ...

    async def held(self, client: Client) -> int | None:
        """How many leases a named token holds in all pools. O(1), over Valkey O(log held).

        None if nobody counts them: over Valkey, those of a token without a `max_held`. Raises StorageUnavailable.
        """
        ...

    async def rekey(self) -> Rekeying:
        """Begin to encrypt under the first secrets key what isn't yet, in slices, in all pools. O(1).

        It survives a restart. Raises SecretsKeyRequired.
        """
        ...

    def rekeying(self) -> Rekeying:
        """How far that is. O(1)."""
        ...

    def keeps_charts(self, name: str) -> bool:
        """Whether the charts of this pool can be kept: not in memory, and over Valkey those of `default` alone."""
        ...

    async def kept_charts(self) -> dict[str, bytes]:
        """What `keep_charts` kept, also before a restart. O(its size). Raises StorageUnavailable."""
        ...

    async def keep_charts(self, charts: Mapping[str, bytes], *, last: bool = False) -> None:
        """Keep the charts of pools, by name, in place of those before. O(their size). Raises StorageUnavailable.

        The loop doesn't wait for the disk. They may be lost: no call depends on them. Of several servers over a Valkey
        only one keeps them, once a minute, but each does for the `last` time.
        """
        ...

    def drain(self) -> None:
        """Answer the waiters of all pools with Draining, and admit no more. O(waiters)."""
        ...

    async def close(self) -> None:
        """Make durable what isn't durable yet, and stop all engines. Raises StorageUnavailable."""
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


class LoadingPools:
    """The pools of a server that is still reading its keys: every call raises Loading."""

    def __init__(self) -> None:
        self.default = Loading()

    def get(self, name: str) -> Loading:
        """An engine whose every call raises Loading, for any name."""
        return self.default

    def drain(self) -> None:
        """Nobody waits yet."""

    async def close(self) -> None:
        """Nothing is open yet."""

    def __getattr__(self, call: str) -> Any:
        return _refuse_loading
