"""The set of keys: how they are found, and the orders in which they are listed. What happens to them is in pool.py.

Nothing here iterates over the whole set: with the structures of index.py and texts.py, every operation is O(1) or
O(log n) in the number of keys.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from operator import attrgetter

from sortedcontainers import SortedList

from keypool.core.details import without_former
from keypool.core.index import AttemptIndex, BucketListener, DeadlineBucket, DeadlineIndex, IdIndex, Position
from keypool.core.keys import NEVER, NO_DETAILS, Group, Key, State
from keypool.core.owners import OwnerIndex
from keypool.core.texts import HashedIndex, HintIndex, NameIndex, TextIndex, generated_with_hint

_MOST_PAST_TEXTS = 1000  # more than one commit replaces
_AVAILABLE, _QUARANTINED = State.AVAILABLE, State.QUARANTINED


@dataclass(slots=True)
class PageQuery:
    """Which keys a page shows. `state` None means all states.

    With a `prefix`, the order is that of the texts, which must be generated ones; with a `name`, that of the names.
    """

    state: State | None = None
    prefix: str | None = None
    order: str = "id"  # or "release", "ready", "expiry"
    limit: int = 50
    after: Position | None = None
    name: str | None = None
    owner: str | None = None
    """Only what this owner holds, in order of lease."""


@dataclass(slots=True)
class KeyPage:
    """Live keys in order, and the position at which the next page begins; None at the end."""

    keys: list[Key] = field(default_factory=list)
    next: Position | None = None


class KeySet:
    """All keys in all their orders. Only subclasses change it, by the methods at its end."""

    def __init__(self, on_opened: BucketListener, on_closed: BucketListener) -> None:
        self.last_id = 0
        """The id given last. It only grows, as does the lease number."""
        self.last_lease = 0
        self._available: list[Key] = []
        self._cooling = 0
        self._quarantined: SortedList[int] = SortedList()
        self._total = 0
        self._further = 0  # seats beyond the first one of each secret
        self._further_quarantined = 0
        self._by_id = IdIndex()
        self._by_text = TextIndex()  # of generated keys
        self._imported = HashedIndex()  # of the others, and of leased ones by the text before a replacement
        self._by_name = NameIndex()
        self._by_hint = HintIndex()  # of imported keys
        self._past: dict[str, int] = {}  # ids by texts that named them until lately
        self._by_attempt = AttemptIndex()
        self._owners = OwnerIndex()
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
        return self._total - len(self._available) - self._cooling - len(self._quarantined)

    @property
    def cooling(self) -> int:
        """Keys that are cooling, including those that are ready likewise."""
        return self._cooling

    @property
    def quarantined(self) -> int:
        """Keys that are quarantined, including expired ones likewise."""
        return len(self._quarantined)

    @property
    def secrets(self) -> int:
        """Secrets, each of which may have several seats, that is, keys."""
        return self._total - self._further

    @property
    def quarantined_secrets(self) -> int:
        """Secrets that are quarantined, but for those whose seats are all held."""
        return len(self._quarantined) - self._further_quarantined

    # -- reading

    def past_id(self, text: str) -> int | None:
        """The id of the key that had this text until lately, when it was replaced. O(1)."""
        return self._past.get(text)

    def next_expiry(self) -> float | None:
        """The earliest `expires_deadline`; None if no key expires. O(1)."""
        first = self._by_expiry.first()
        return None if first is None else first.expires_deadline

    def next_release_deadline(self) -> float | None:
        """The earliest `release_deadline`; None if no key is blocked or cooling. O(1)."""
        first = self._by_release.first()
        return None if first is None else first.release_deadline

    def deadline_buckets(self) -> Iterator[DeadlineBucket]:
        """All buckets of both orders by deadline. O(their number)."""
        yield from self._by_expiry.buckets()
        yield from self._by_release.buckets()

    def expiring(self, until: float) -> int:
        """How many keys expire before `until`, to within 1/64 s. O(seconds until then), not O(keys)."""
        return self._by_expiry.count_until(until)

    def _walk(self, query: PageQuery) -> Iterator[Key]:
        if query.owner is not None:
            return self._owners.held_by(query.owner, 0 if query.after is None else int(query.after[0]))
        if query.name is not None:
            return self._by_name.walk(query.name, query.after)
        if query.prefix is not None:
            return self._by_text.walk(query.prefix, query.after, self._by_id)
        if query.order == "expiry":
            return self._by_expiry.walk(query.after)
        if query.order in ("release", "ready"):
            return self._by_release.walk(query.after)
        if query.state is _QUARANTINED:
            return self._walk_quarantined(query.after)
        return self._by_id.walk(query.after)

    def _walk_quarantined(self, after: Position | None) -> Iterator[Key]:
        last = None if after is None else int(after[0])
        for id in self._quarantined.irange(last, inclusive=(False, True)):
            key = self._by_id.get(id)
            assert key is not None  # a purged key leaves all orders
            yield key

    def _position(self, query: PageQuery, key: Key) -> Position:
        if query.owner is not None:
            return (key.lease,)
        if query.name is not None:
            return self._by_name.position(key)
        if query.prefix is not None:
            return self._by_text.position(key)
        if query.order == "expiry" and key.expiry_bucket is not None:
            return self._by_expiry.position_of(key, key.expiry_bucket)
        if query.order in ("release", "ready") and key.release_bucket is not None:
            return self._by_release.position_of(key, key.release_bucket)
        return self._by_id.position(key)

    def after(self, id: int, count: int) -> list[Key]:
        """The next `count` keys after this id, in order of id and of any state. O(log n + count)."""
        return list(islice(self._by_id.walk((id,)), count))

    def peek(self, id: int) -> Key | None:
        """The key with this id as it is, whether or not its deadlines have passed. O(1)."""
        return self._by_id.get(id)

    def _first_with_hint(self, hint: str, now: float, limit: int) -> Key | None:
        """The first by id of the keys with this hint that haven't expired. O(log n + limit).

        Examines `limit` generated keys that begin so, and as many imported ones.
        """
        generated = islice(generated_with_hint(hint, self._by_text, self._by_id), limit)
        imported = (self._by_id.get(id) for id in islice(self._by_hint.walk(hint), limit))
        first: Key | None = None
        for keys in (sorted(generated, key=attrgetter("id")), imported):
            for key in keys:
                if key is not None and key.group is not None:
                    key = self._first_living(key.group, now)  # noqa: PLW2901
                if key is not None and key.hint == hint and key.expires_deadline > now:
                    if first is None or key.id < first.id:
                        first = key
                    break
        return first

    # -- changes: only these methods, and those of subclasses, make any

    def _insert(self, key: Key) -> None:
        self._by_id.add(key)
        if key.group is None or self._join(key, key.group):
            if key.details is NO_DETAILS:
                self._by_text.add(key)
            else:
                self._enter_texts(key)
                if key.details.name is not None:
                    self._by_name.add(key)
        if key.expires_deadline != NEVER:
            key.expiry_bucket = self._by_expiry.add(key, key.expires_deadline)
        self._total += 1

    def _remove(self, key: Key) -> None:
        """Undo `_insert`."""
        if key.expiry_bucket is not None:
            self._by_expiry.discard(key, key.expiry_bucket)
            key.expiry_bucket = None
        if key.group is None or self._resign(key, key.group):
            self._leave_texts(key)
            if key.details.name is not None:
                self._by_name.discard(key)
        self._by_id.discard(key)
        self._total -= 1

    # Of the seats of a secret, the first one stands in the orders by text, name and hint.

    def _seat(self, id: int) -> Key:
        seat = self._by_id.get(id)
        assert seat is not None  # a purged key leaves its group
        return seat

    def _first_living(self, group: Group, now: float) -> Key | None:
        """The first seat that hasn't expired. O(seats)."""
        return next((seat for seat in map(self._seat, group.ids) if seat.expires_deadline > now), None)

    def _join(self, key: Key, group: Group) -> bool:
        """Make a key the last seat of its secret. Returns whether it is the first one, too."""
        group.ids.append(key.id)
        group.surplus = len(group.ids) - group.wanted
        if len(group.ids) == 1:
            return True
        self._further += 1
        if key.details.former is not None:
            self._imported.add(key.details.former, key)
        return False

    def _resign(self, key: Key, group: Group) -> bool:
        """Undo `_join`, and let the next seat be found in place of the first one. Returns whether none is left."""
        place = bisect_left(group.ids, key.id)
        del group.ids[place]
        group.surplus -= 1
        if not group.ids:
            return True
        self._further -= 1
        if place == 0:
            heir = self._seat(group.ids[0])
            self._leave_texts(key)
            self._enter_texts(heir)
            if key.details.name is not None:
                self._by_name.discard(key)
                self._by_name.add(heir)
        return False

    def _enter_texts(self, key: Key) -> None:
        """Let a key be found by its text, by the one before if its lease goes on, and by the hint."""
        if not key.details.imported:
            self._by_text.add(key)
            return
        self._imported.add(key.text, key)
        self._by_hint.add(key)
        if key.details.former is not None:
            self._imported.add(key.details.former, key)

    def _leave_texts(self, key: Key) -> None:
        """Undo `_enter_texts`."""
        if not key.details.imported:
            self._by_text.discard(key)
            return
        self._imported.discard(key.text)
        self._by_hint.discard(key)
        if key.details.former is not None:
            self._imported.discard(key.details.former)

    def _end_former(self, key: Key) -> None:
        """A key's text before a replacement names it no longer. O(seats)."""
        former = key.details.former
        assert former is not None
        details = without_former(key.details)
        heir = None
        for id in () if key.group is None else key.group.ids:
            seat = self._seat(id)
            if seat.details == details:
                details = seat.details  # one object for all seats
            elif seat is not key and seat.details.former == former:
                heir = seat
        if heir is not None:
            self._imported.add(former, heir)
        else:
            self._imported.discard(former)
            self._remember(former, key)
        key.details = details

    def _remember(self, text: str, key: Key) -> None:
        """Remember whose text this was, and forget the oldest of such texts beyond `_MOST_PAST_TEXTS`."""
        self._past.pop(text, None)
        self._past[text] = key.id
        if len(self._past) > _MOST_PAST_TEXTS:
            del self._past[next(iter(self._past))]

    def _enter_quarantine(self, key: Key) -> None:
        key.state = _QUARANTINED
        self._quarantined.add(key.id)
        if key.group is not None:
            self._further_quarantined += key.group.quarantined > 0
            key.group.quarantined += 1

    def _leave_quarantine(self, key: Key) -> None:
        self._quarantined.remove(key.id)
        if key.group is not None:
            key.group.quarantined -= 1
            self._further_quarantined -= key.group.quarantined > 0

    def _move_release(self, key: Key, deadline: float) -> None:
        """Move the end of a block or of a cooldown."""
        assert key.release_bucket is not None
        self._by_release.discard(key, key.release_bucket)
        key.release_deadline = deadline
        key.release_bucket = self._by_release.add(key, deadline)

    def _give_slot(self, key: Key) -> None:
        key.state = _AVAILABLE
        available = self._available
        key.slot = len(available)
        available.append(key)

    def _take_slot(self, key: Key) -> None:
        """Take a key out of the available list by moving the last one into its place."""
        last = self._available.pop()
        if last is not key:
            self._available[key.slot] = last
            last.slot = key.slot
        key.slot = -1
