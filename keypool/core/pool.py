"""The rules of the pool: which key an acquire gets, and until when the caller may use it.

                generate                  acquire (at random)
       (nothing) ------> AVAILABLE ---------------------------> BLOCKED
                            ^   |                                |  |
                            |   |     unblock, or 60 s passed    |  |
                            +---|--------------------------------+  |
                                |                                   |
                  delete, or 300 s without keepalive                |
                                v                                   v
                            (purged: never served, never valid, never generated again)

The module has no I/O, no clock and no timer. Each method takes `now`, in seconds on a clock that never goes back, and
first applies the deadlines of its key that have passed, whether or not their timers have fired. Each change is reported
to the one listener, `on_change(change, key, owner)`, after it has been made.

Nothing here iterates over the whole set: with the structures of index.py every call is O(1) or O(log n) in the number
of keys, except `check`, which is for tests and for the moment after a restore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf, nextafter
from operator import attrgetter
from typing import NamedTuple

from keypool.core.counters import Counters
from keypool.core.errors import PoolFull, StaleLease, UnknownKey
from keypool.core.events import Change
from keypool.core.index import BucketListener, DeadlineBucket, DeadlineIndex, IdIndex, Position, TextIndex
from keypool.core.keys import DEAD, Key, State
from keypool.core.rules import PoolRules

MAX_DUE_PER_CALL = 64
"""At most so many due keys of each kind are processed by one call. The engine drains a larger backlog in slices."""

PAGE_SCAN_LIMIT = 1000
"""At most so many keys are examined for one page."""

Listener = Callable[[Change, Key, str | None], None]


@dataclass(slots=True)
class PageQuery:
    """Which keys a page shows. `state` None means both states; with a prefix, the order is that of the texts."""

    state: State | None = None
    prefix: str | None = None
    order: str = "id"  # or "release", "expiry"
    limit: int = 50
    after: Position | None = None


@dataclass(slots=True)
class KeyPage:
    """Live keys in order, and the position at which the next page begins; None at the end."""

    keys: list[Key] = field(default_factory=list)
    next: Position | None = None


class Processed(NamedTuple):
    """The result of `process_due`: by how many seconds the first of each kind was late; whether more may be due."""

    release_lateness: float | None
    expiry_lateness: float | None
    more: bool


class Pool:
    """All keys, and the orders in which they are found.

    `new_text` returns a random key text, `random` a float in [0, 1). `last_id` and `last_lease` only grow.
    """

    def __init__(
        self,
        rules: PoolRules,
        *,
        new_text: Callable[[], str],
        random: Callable[[], float],
        on_change: Listener = lambda change, key, owner: None,
        on_opened: BucketListener = lambda bucket: None,
        on_closed: BucketListener = lambda bucket: None,
    ) -> None:
        self.block_seconds = rules.block_seconds
        self.keepalive_seconds = rules.keepalive_seconds
        self.max_keys = rules.max_keys
        self.last_id = 0
        self.last_lease = 0
        self.counters = Counters()
        self.on_change = on_change
        self._new_text = new_text
        self._random = random
        self._available: list[Key] = []
        self._total = 0
        self._purge_until = inf  # keys whose deadline comes after it are not purged: see `suspend_expiry`
        self._by_id = IdIndex()
        self._by_text = TextIndex()
        self._by_expiry = DeadlineIndex(attrgetter("expires_deadline"), on_opened, on_closed)
        self._by_release = DeadlineIndex(attrgetter("release_deadline"), on_opened, on_closed)

    # -- counts, each O(1)

    @property
    def total(self) -> int:
        """Keys that aren't purged yet, including expired ones while a backlog is drained."""
        return self._total

    @property
    def available(self) -> int:
        """Keys that can be acquired, including expired ones likewise."""
        return len(self._available)

    @property
    def blocked(self) -> int:
        """Keys that are blocked, including overdue ones likewise."""
        return self._total - len(self._available)

    # -- finding

    def find(self, text: str, now: float) -> Key:
        """The live key with this text, its deadlines applied. O(1). Raises UnknownKey."""
        return self._live(self._by_text.get(text), now)

    def find_id(self, id: int, now: float) -> Key:
        """The live key with this id, its deadlines applied. O(1). Raises UnknownKey."""
        return self._live(self._by_id.get(id), now)

    def _live(self, key: Key | None, now: float) -> Key:
        if key is None:
            raise UnknownKey
        if key.expires_deadline <= now:
            if key.expires_deadline <= self._purge_until:
                self._purge(key, Change.EXPIRED)
            raise UnknownKey
        if key.release_deadline is not None and key.release_deadline <= now:
            self._free(key, Change.RELEASED)
        return key

    # -- the calls

    def generate(self, now: float) -> Key:
        """Make a key, available at once. O(log n). Raises PoolFull."""
        self.require_room(1, now)
        self.last_id += 1
        key = Key(self.last_id, self._new_text(), now, now + self.keepalive_seconds)
        self._insert(key)
        self.counters.generated += 1
        self.on_change(Change.GENERATED, key, None)
        return key

    def require_room(self, count: int, now: float) -> None:
        """Raise PoolFull unless `count` more keys fit. O(1)."""
        if self._total + count > self.max_keys:
            self.process_due(now)
            if self._total + count > self.max_keys:
                raise PoolFull(self._total, count, self.max_keys)

    def acquire(self, now: float, owner: str | None) -> Key | None:
        """Block a uniformly random available key under a new lease; None if none is available. O(1).

        Up to `MAX_DUE_PER_CALL` due keys are processed first. After a None, `may_have_more` returns whether that wasn't
        enough and the caller should try again.
        """
        if now >= self._by_release.earliest:
            self._process_releases(now)
        for _ in range(MAX_DUE_PER_CALL):
            if not self._available:
                return None
            key = self._available[int(self._random() * len(self._available))]
            if key.expires_deadline > now:
                self._take_slot(key)
                self.last_lease += 1
                key.lease = self.last_lease
                key.owner = owner
                key.release_deadline = deadline = now + self.block_seconds
                key.release_bucket = self._by_release.add(key, deadline)
                self.counters.acquired += 1
                self.on_change(Change.ACQUIRED, key, owner)
                return key
            if key.expires_deadline <= self._purge_until:
                self._purge(key, Change.EXPIRED)
        return None

    def may_have_more(self, now: float) -> bool:
        """Whether another `acquire` may get a key: a backlog of due keys may hide an available one. O(1)."""
        return bool(self._available) or self.next_release(now) == 0

    def unblock(self, key: Key, lease: int | None) -> bool:
        """Make a live key available again; False if it was available already. O(1).

        A lease number must be that of the key's latest lease; any other raises StaleLease.
        """
        if lease is not None and (lease != key.lease or not lease):  # 0: never served, so never given
            raise StaleLease(lease, key.lease or None)
        if key.release_deadline is None:
            return False
        self._free(key, Change.UNBLOCKED)
        return True

    def keepalive(self, key: Key, now: float) -> None:
        """Set a live key's `expires_deadline` to `now + keepalive_seconds`. O(1)."""
        deadline = now + self.keepalive_seconds
        assert key.expiry_bucket is not None  # a live key is in the order by expiry
        self._by_expiry.discard(key, key.expiry_bucket)
        key.expires_deadline = deadline
        key.expiry_bucket = self._by_expiry.add(key, deadline)
        self.counters.kept_alive += 1
        self.on_change(Change.KEPT_ALIVE, key, key.owner)

    def delete(self, key: Key) -> None:
        """Purge a live key. O(log n)."""
        self._purge(key, Change.DELETED)

    # -- deadlines

    def process_due(self, now: float) -> Processed:
        """Release and purge due keys, `MAX_DUE_PER_CALL` of each kind at most. O(1) if nothing is due."""
        expired = self._by_expiry.due(min(now, self._purge_until), MAX_DUE_PER_CALL)
        expiry = now - expired[0].expires_deadline if expired else None
        for key in expired:
            self._purge(key, Change.EXPIRED)
        release, released = self._process_releases(now)
        return Processed(release, expiry, MAX_DUE_PER_CALL in (len(expired), released))

    def _process_releases(self, now: float) -> tuple[float | None, int]:
        """Release due keys. Returns by how many seconds the first was late, and how many there were."""
        due = self._by_release.due(now, MAX_DUE_PER_CALL)
        lateness = None if not due else now - (due[0].release_deadline or now)
        for key in due:
            self._free(key, Change.RELEASED)
        return lateness, len(due)

    def overdue(self, now: float) -> bool:
        """Whether there is an expired key that may be purged. O(1)."""
        next_expiry = self.next_expiry()
        return next_expiry is not None and next_expiry <= min(now, self._purge_until)

    def next_expiry(self) -> float | None:
        """The earliest `expires_deadline`; None if there is no key. O(1)."""
        first = self._by_expiry.first()
        return None if first is None else first.expires_deadline

    def next_release_deadline(self) -> float | None:
        """The earliest `release_deadline`; None if none is blocked. O(1)."""
        first = self._by_release.first()
        return None if first is None else first.release_deadline

    def deadline_buckets(self) -> Iterator[DeadlineBucket]:
        """All buckets of both orders by deadline. O(their number)."""
        yield from self._by_expiry.buckets()
        yield from self._by_release.buckets()

    def expiring(self, until: float) -> int:
        """How many keys expire before `until`, to within 1/64 s. O(seconds until then), not O(keys)."""
        return self._by_expiry.count_until(until)

    def next_release(self, now: float) -> float | None:
        """Seconds until the earliest release of a blocked key, at least 0; None if none is blocked. O(1)."""
        deadline = self.next_release_deadline()
        return None if deadline is None else max(0.0, deadline - now)

    # -- suspended expiry: while changes can't be kept, keepalives fail, so keys must not expire

    def suspend_expiry(self, now: float) -> None:
        """Purge no key that is alive at this moment, until `resume_expiry`. No effect if suspended already. O(1).

        A key that expires meanwhile isn't found and isn't served, but stays in the orders and counts: either
        `grant_grace` gives it a new deadline, or it is purged after `resume_expiry`.
        """
        if self._purge_until == inf:
            self._purge_until = now

    @property
    def expiry_suspended(self) -> bool:
        """Whether expiry is suspended. O(1)."""
        return self._purge_until != inf

    def is_suspended(self, ref: int | str) -> bool:
        """Whether a key that `find` didn't find is still kept, because expiry is suspended. O(1)."""
        if not self.expiry_suspended:
            return False
        return (self._by_id.get(ref) if isinstance(ref, int) else self._by_text.get(ref)) is not None

    def grant_grace(self, until: float, limit: int) -> bool:
        """Let keys that would expire before `until` live until then, soonest first. Returns whether more may be left.

        Processes `limit` keys at most, O(limit · log n). Keys that had expired before the suspension are purged. For a
        key that gets the grace no counter changes and no listener is called: the caller keeps `until` instead.
        """
        due = self._by_expiry.due(nextafter(until, -inf), limit)
        for key in due:
            if key.expires_deadline <= self._purge_until:
                self._purge(key, Change.EXPIRED)
                continue
            assert key.expiry_bucket is not None  # a live key is in the order by expiry
            self._by_expiry.discard(key, key.expiry_bucket)
            key.expires_deadline = until
            key.expiry_bucket = self._by_expiry.add(key, until)
        return len(due) == limit

    def resume_expiry(self) -> None:
        """Let keys expire again: `process_due` purges those that are due by now. O(1)."""
        self._purge_until = inf

    # -- pages

    def page(self, query: PageQuery, now: float) -> KeyPage:
        """Live keys in an order, their deadlines applied; maybe fewer than `limit`. O(log n + PAGE_SCAN_LIMIT) at most.

        A walk from page to page in order `id` returns each key that lives all the while exactly once. In the orders of
        deadlines a key may move past the reader.
        """
        self.process_due(now)
        page = KeyPage()
        last: Key | None = None
        for examined, key in enumerate(self._walk(query)):
            if len(page.keys) == query.limit or examined == PAGE_SCAN_LIMIT:
                assert last is not None
                page.next = self._position(query, last)
                break
            last = key
            if key.expires_deadline > now and (query.state is None or state_of(key, now) is query.state):
                page.keys.append(key)
        for key in page.keys:
            self._live(key, now)
        return page

    def _walk(self, query: PageQuery) -> Iterator[Key]:
        if query.prefix is not None:
            return self._by_text.walk(query.prefix, query.after, self._by_id)
        if query.order == "expiry":
            return self._by_expiry.walk(query.after)
        if query.order == "release":
            return self._by_release.walk(query.after)
        return self._by_id.walk(query.after)

    def _position(self, query: PageQuery, key: Key) -> Position:
        if query.prefix is not None:
            return self._by_text.position(key)
        if query.order == "expiry" and key.expiry_bucket is not None:
            return self._by_expiry.position_of(key, key.expiry_bucket)
        if query.order == "release" and key.release_bucket is not None:
            return self._by_release.position_of(key, key.release_bucket)
        return self._by_id.position(key)

    # -- the structures: only these methods change them

    def restore(self, key: Key) -> None:
        """Add a key from a journal, without counting or reporting it. Ids must ascend. O(log n)."""
        self._insert(key)
        if key.release_deadline is not None:
            self._take_slot(key)
            key.release_bucket = self._by_release.add(key, key.release_deadline)

    def _insert(self, key: Key) -> None:
        self._by_id.add(key)
        self._by_text.add(key)
        key.expiry_bucket = self._by_expiry.add(key, key.expires_deadline)
        self._give_slot(key)
        self._total += 1

    def _free(self, key: Key, change: Change) -> None:
        owner = self._leave_block(key)
        self._give_slot(key)
        if change is Change.UNBLOCKED:
            self.counters.unblocked += 1
        else:
            self.counters.released += 1
        self.on_change(change, key, owner)

    def _purge(self, key: Key, change: Change) -> None:
        if key.release_deadline is None:
            owner = None
            self._take_slot(key)
        else:
            owner = self._leave_block(key)
        assert key.expiry_bucket is not None
        self._by_expiry.discard(key, key.expiry_bucket)
        self._by_text.discard(key)
        self._by_id.discard(key)
        key.expiry_bucket = None
        key.expires_deadline = DEAD
        self._total -= 1
        if change is Change.DELETED:
            self.counters.deleted += 1
        else:
            self.counters.expired += 1
        self.on_change(change, key, owner)

    def _leave_block(self, key: Key) -> str | None:
        """Undo what `acquire` set except the lease, which remains the key's latest. Returns the owner."""
        assert key.release_bucket is not None
        self._by_release.discard(key, key.release_bucket)
        key.release_bucket = None
        key.release_deadline = None
        owner, key.owner = key.owner, None
        return owner

    def _give_slot(self, key: Key) -> None:
        key.slot = len(self._available)
        self._available.append(key)

    def _take_slot(self, key: Key) -> None:
        """Take a key out of the available list by moving the last one into its place."""
        last = self._available.pop()
        if last is not key:
            self._available[key.slot] = last
            last.slot = key.slot
        key.slot = -1

    # -- self-check

    def check(self) -> None:
        """Derive every count, slot and order from the keys and compare. O(n).

        Raises ValueError, which names the wrong key and the contradiction.
        """
        for _ in self.check_in_slices(PAGE_SCAN_LIMIT):
            pass

    def check_in_slices(self, size: int) -> Iterator[None]:
        """Do what `check` does, yielding after each `size` keys. The pool must not change meanwhile."""
        total = blocked = last = 0
        for key in self._by_id.walk(None):
            if key.id <= last:
                raise ValueError("the walk by id is out of order or returns a key twice")
            last = key.id
            self._check_key(key)
            total += 1
            blocked += key.release_deadline is not None
            if total % size == 0:
                yield
        counts = (total, len(self._by_text), total - blocked)
        if counts != (self._total, self._total, len(self._available)):
            expected = (self._total, self._total, len(self._available))
            raise ValueError(f"by id, by text, available there are {counts} keys instead of {expected}")
        yield from self._by_expiry.check_in_slices(total, size)
        yield from self._by_release.check_in_slices(blocked, size)

    def _check_key(self, key: Key) -> None:
        if not 0 < key.id <= self.last_id or not 0 <= key.lease <= self.last_lease:
            last = (self.last_id, self.last_lease)
            raise ValueError(f"{key!r}: id or lease {key.lease} is beyond the last given, {last}")
        if self._by_text.get(key.text) is not key:
            raise ValueError(f"{key!r} is not found by its text")
        if key.expires_deadline == DEAD:
            raise ValueError(f"{key!r} was purged but is still found by id")
        self._by_expiry.check_key(key, key.expiry_bucket)
        if key.release_deadline is None:
            if not 0 <= key.slot < len(self._available) or self._available[key.slot] is not key:
                raise ValueError(f"{key!r} is available but not in its slot {key.slot}")
            if key.owner is not None or key.release_bucket is not None:
                raise ValueError(f"{key!r} is available but has an owner or a place in the order by release")
        elif key.slot != -1 or key.lease == 0:
            raise ValueError(f"{key!r} is blocked but has slot {key.slot} and lease {key.lease}")
        else:
            self._by_release.check_key(key, key.release_bucket)


def state_of(key: Key, now: float) -> State:
    """The state of a live key at the moment `now`, by its deadline. O(1)."""
    if key.release_deadline is None or key.release_deadline <= now:
        return State.AVAILABLE
    return State.BLOCKED
