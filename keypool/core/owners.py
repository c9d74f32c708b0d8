"""Who holds keys: leases by the owner that the holder named and by the client whose token it has.

    index: (owner, client) -> Holder -> its leases, in their order

A lease begins with the largest number so far, so it goes to the end of its holder's order, and the oldest one is at
the front. A dict whose front was deleted is walked from that front, and a large one moves all entries when it grows: so
a holder has a dict of its latest leases, and the full ones before in order.

Holders stand in the order of their names, which costs a search when one comes or goes. A worker that holds one key at
a time would come and go with each lease. So a holder without leases stays, until there are `MOST_REMEMBERED` holders:
from then on each new one looks at two others, in turn, and forgets those that hold nothing. So there are never many
more than that, or than twice as many as hold something.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from heapq import merge
from operator import attrgetter
from typing import NamedTuple

from sortedcontainers import SortedDict

from keypool.core.index import Position
from keypool.core.keys import Key

RELEASED_SECONDS = 300.0
"""For how long it is counted that a lease ended by its deadline, to within a slot."""
MOST_REMEMBERED = 10_000
"""Beyond so many holders, those that hold nothing are forgotten, unless a lease of theirs ran out lately; beyond twice
as many, these too."""

_SLOTS = 10
_SLOT_SECONDS = RELEASED_SECONDS / _SLOTS
_FULL = 1024  # leases in a dict, after which the next one is begun
_LEASES_PER_BUCKET = 1024  # loaded keys whose leases are neighbours, until they are in order
_by_lease = attrgetter("lease")

Place = tuple[bool, str, bool, str]
"""Where a holder stands: by owner, then by client, without a name first."""


class Holding(NamedTuple):
    """What a holder holds now: `acquired_at` is the moment of its oldest lease, `released` how many ran out lately."""

    owner: str | None
    client: str | None
    held: int
    acquired_at: float
    released: int


class HolderPage(NamedTuple):
    """Holders in order of name, and the position at which the next page begins; None at the end."""

    holders: list[Holding]
    next: Position | None


class Holder:
    """The leases of one owner under one token. Only `OwnerIndex` and `Key.holder` refer to it."""

    __slots__ = ("client", "full", "in_full", "latest", "owner", "released", "released_slot")

    def __init__(self, owner: str | None, client: str | None) -> None:
        self.owner = owner
        self.client = client
        self.latest: dict[int, Key] = {}
        self.full: SortedDict[int, dict[int, Key]] | None = (
            None  # those before, by a lower bound of their leases
        )
        self.in_full = 0  # keys in these
        self.released: list[int] | None = None  # leases that ran out, in each of the latest slots
        self.released_slot = 0

    @property
    def held(self) -> int:
        """How many keys it holds. O(1)."""
        return len(self.latest) + self.in_full

    @property
    def place(self) -> Place:
        """Its place among the others."""
        return place_of(self.owner, self.client)

    def oldest(self) -> Key | None:
        """The key of its oldest lease. O(_FULL)."""
        return next(self.walk(0), None)

    def walk(self, after: int) -> Iterator[Key]:
        """The keys that it holds under a lease beyond `after`, in order of lease. O(log n + _FULL), then O(1) each."""
        if self.full:
            for bound in self.full.islice(max(0, self.full.bisect_right(after) - 1)):
                for key in self.full[bound].values():
                    if key.lease > after:
                        yield key
        for key in self.latest.values():
            if key.lease > after:
                yield key

    def open(self) -> dict[int, Key]:
        """Begin another dict, as the one of the latest leases is full. O(log n)."""
        if self.full is None:
            self.full = SortedDict()
        self.full[next(iter(self.latest.values())).lease] = self.latest
        self.in_full += len(self.latest)
        self.latest = {}
        return self.latest

    def discard_full(self, key: Key) -> None:
        """Take out a key that isn't among the latest. O(log n)."""
        assert self.full is not None  # it is nowhere else
        bound, leases = self.full.peekitem(self.full.bisect_right(key.lease) - 1)
        del leases[key.id]
        self.in_full -= 1
        if not leases:
            del self.full[bound]

    def count_released(self, now: float) -> None:
        """One of its leases ran out. O(1)."""
        slot = int(now / _SLOT_SECONDS)
        counts = self.released
        if counts is None or slot - self.released_slot >= _SLOTS:
            counts = self.released = [0] * _SLOTS
        else:
            for passed in range(self.released_slot + 1, slot + 1):
                counts[passed % _SLOTS] = 0
        self.released_slot = max(slot, self.released_slot)
        counts[slot % _SLOTS] += 1

    def released_lately(self, now: float) -> int:
        """How many of its leases ran out within `RELEASED_SECONDS`. O(1)."""
        if self.released is None:
            return 0
        slot, last = int(now / _SLOT_SECONDS), self.released_slot
        return sum(self.released[each % _SLOTS] for each in range(max(slot, last) - _SLOTS + 1, last + 1))


def place_of(owner: str | None, client: str | None) -> Place:
    """The place of a holder in the order of names."""
    return owner is not None, owner or "", client is not None, client or ""


class OwnerIndex:
    """See the module."""

    def __init__(self) -> None:
        self._unnamed = Holder(None, None)  # for which no look-up is needed
        self._holders: dict[tuple[str | None, str | None], Holder] = {}  # all others
        self._by_name: SortedDict[Place, Holder] = SortedDict({self._unnamed.place: self._unnamed})
        self._turn: deque[Holder] = deque()  # those of `_holders`, in the order in which they are looked at
        self._loaded: dict[int, list[Key]] = {}  # held keys of a journal, by neighbouring leases

    def __len__(self) -> int:
        """How many holders there are, including those that hold nothing any more."""
        return len(self._by_name)

    # -- changes

    def begin(self, key: Key, owner: str | None, client: str | None) -> None:
        """A lease begins, with a number beyond all others. O(1), and O(log n) if its holder is new."""
        if owner is None and client is None:
            holder = self._unnamed
        else:
            holder = self._holders.get((owner, client)) or self._add(owner, client, key.acquired_at)
        latest = holder.latest
        if len(latest) >= _FULL:
            latest = holder.open()
        latest[key.id] = key
        key.holder = holder

    def end(self, key: Key) -> None:
        """The lease of a key ends, before anything of it has changed. O(1), and O(log n) for an old one."""
        if key.holder is None or key.holder.latest.pop(key.id, None) is None:
            self.end_older(key)
        key.holder = None

    def end_older(self, key: Key) -> None:
        """The same for a lease that isn't among the latest of its holder, or has none yet. O(log n)."""
        if key.holder is None:
            self._end_loaded(key)
        else:
            key.holder.discard_full(key)

    def _add(self, owner: str | None, client: str | None, now: float) -> Holder:
        holder = self._holders[owner, client] = Holder(owner, client)
        self._by_name[holder.place] = holder
        if len(self._holders) > MOST_REMEMBERED:
            for _ in range(2):
                self._forget_or_keep(self._turn.popleft(), now)
        self._turn.append(holder)
        return holder

    def _forget_or_keep(self, holder: Holder, now: float) -> None:
        """Forget a holder that holds nothing, unless one of its leases ran out lately."""
        if holder.held or (len(self._turn) < 2 * MOST_REMEMBERED and holder.released_lately(now)):
            self._turn.append(holder)
        else:
            del self._holders[holder.owner, holder.client]
            del self._by_name[holder.place]

    # -- loading: keys come in order of id

    def load(self, key: Key) -> None:
        """Add a key that is held, in any order. `settle` has to follow before the next lease begins. O(1)."""
        self._loaded.setdefault(key.lease // _LEASES_PER_BUCKET, []).append(key)

    def settle(self) -> Iterator[None]:
        """Put the loaded keys in order. Yields after each thousand at most. O(n log n)."""
        for number in sorted(self._loaded):
            for key in sorted(self._loaded.pop(number), key=_by_lease):
                self.begin(key, key.owner, key.client)
            yield

    def _end_loaded(self, key: Key) -> None:
        number = key.lease // _LEASES_PER_BUCKET
        keys = self._loaded[number]
        keys.remove(key)
        if not keys:
            del self._loaded[number]

    # -- reading

    def page(self, after: Position | None, limit: int, examined: int, now: float) -> HolderPage:
        """The holders that hold something, in order of name. O(log n + examined), of which it looks at that many."""
        holders: list[Holding] = []
        last: Place | None = None
        start = None if after is None else _place(after)
        for count, place in enumerate(self._by_name.irange(start, inclusive=(False, True))):
            if len(holders) == limit or count == examined:
                assert last is not None
                return HolderPage(holders, _position(last))
            last = place
            holder = self._by_name[place]
            if holder.held and (oldest := holder.oldest()) is not None:
                holders.append(
                    Holding(
                        holder.owner,
                        holder.client,
                        holder.held,
                        oldest.acquired_at,
                        holder.released_lately(now),
                    )
                )
        return HolderPage(holders, None)

    def held_by(self, owner: str, after: int, client: str | None = None) -> Iterator[Key]:
        """The keys that an owner holds under a lease beyond `after`, in order of lease, with any token or this one.

        O(log n) for each client. The index must not change meanwhile.
        """
        if client is not None:
            holder = self._holders.get((owner, client))
            return iter(()) if holder is None else holder.walk(after)
        places = self._by_name.irange((True, owner, False, ""), (True, owner, True, _LAST))
        walks = [self._by_name[place].walk(after) for place in places]
        return walks[0] if len(walks) == 1 else merge(*walks, key=_by_lease)

    # -- for tests, and the moment after a restore

    def check(self, held: int) -> None:
        """Raise ValueError unless exactly so many keys are held, each in its holder's order. O(n)."""
        found = 0
        for place, holder in self._by_name.items():
            leases = [key.lease for key in holder.walk(0)]
            if len(leases) != holder.held or leases != sorted(leases):
                raise ValueError(f"the leases of a holder are out of order, or not {holder.held}")
            if place != holder.place:
                raise ValueError("a holder stands in the place of another one")
            found += len(leases)
        if found + sum(map(len, self._loaded.values())) != held:
            raise ValueError(f"{found} keys have a holder instead of {held}")
        if len(self._by_name) != len(self._holders) + 1 or len(self._turn) != len(self._holders):
            raise ValueError("a holder is in one order of holders and not in the other")


_LAST = chr(0x10FFFF)  # behind every name


def _position(place: Place) -> Position:
    named, owner, has_client, client = place
    return int(named), owner, int(has_client), client


def _place(position: Position) -> Place:
    named, owner, has_client, client = position
    return bool(named), str(owner), bool(has_client), str(client)
