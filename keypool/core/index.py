"""The orders in which keys can be found and listed: by id and by deadline; by text and name, see texts.py.

A dict of a million entries moves all of them when it grows, and a sorted list needs a search for each move of a
deadline. So keys are kept in many small lists and dicts ("buckets"), and only the buckets are kept in order, by
sortedcontainers: finding, adding, moving and discarding a key touch one bucket, and growth rehashes one bucket at a
time. A page walks from a position onwards, O(log n + keys read).

A bucket of deadlines is sorted when it is read. The order of insertion is nearly that order, so sorting costs one pass.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import groupby, islice
from math import inf
from operator import attrgetter

from sortedcontainers import SortedDict

from keypool.core.keys import Key

_ID_BITS = 8  # of ids whose places are in one bucket: a walk passes over those that are gone
_PLACE = (1 << _ID_BITS) - 1
_QUANTUM = 64  # buckets a second
_FULL = 1024  # keys in a deadline bucket, after which the next one of the same quantum is opened
_ATTEMPT_PARTS = 256  # one for each value of a digest's first byte
_PARTS = 1 << 20  # bucket numbers reserved for each quantum

_id_of = attrgetter("id")

Position = tuple[int | float | str, ...]
"""A place in an order that holds no key text: numbers, or a name."""


class DeadlineBucket(dict[int, Key]):
    """Keys by id whose deadlines lie in the same 1/64 s, which is over at the moment `ends`.

    `number` is the place of the bucket among the others, `latest` the largest deadline that was added. `ordered` is
    true if the keys are in order of their deadlines. `timer` is for engine/timers.py only.
    """

    __slots__ = ("latest", "number", "ordered", "timer")

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.latest = 0.0
        self.ordered = True
        self.timer: object = None

    @property
    def ends(self) -> float:
        """The moment by which all deadlines in the bucket have passed."""
        return (self.number // _PARTS + 1) / _QUANTUM


BucketListener = Callable[[DeadlineBucket], None]
"""Called with a bucket that was opened for its first key, or closed when its last key left."""


class IdBucket(list[Key | None]):
    """A place for each of 256 neighbouring ids; `held` of them hold a key."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        super().__init__([None] * (_PLACE + 1))
        self.held = 0


class IdIndex:
    """Keys by id, at 9 bytes each as long as few are gone. Every operation is O(log n), in practice constant."""

    def __init__(self) -> None:
        self._buckets: SortedDict[int, IdBucket] = SortedDict()

    def get(self, id: int) -> Key | None:
        """The key, or None. O(1)."""
        bucket = self._buckets.get(id >> _ID_BITS)
        return None if bucket is None else bucket[id & _PLACE]

    def add(self, key: Key) -> None:
        """Add a key whose id no other has."""
        id = key.id
        bucket = self._buckets.get(id >> _ID_BITS)
        if bucket is None:
            bucket = self._buckets[id >> _ID_BITS] = IdBucket()
        bucket[id & _PLACE] = key
        bucket.held += 1

    def discard(self, key: Key) -> None:
        """Take a key out. O(log n)."""
        number = key.id >> _ID_BITS
        bucket = self._buckets[number]
        bucket[key.id & _PLACE] = None
        bucket.held -= 1
        if not bucket.held:
            del self._buckets[number]

    def walk(self, after: Position | None) -> Iterator[Key]:
        """The keys with an id larger than `after`'s, in order of id."""
        last = 0 if after is None else int(after[0])
        for number in self._buckets.irange(last >> _ID_BITS):
            for key in filter(None, self._buckets[number]):
                if key.id > last:
                    yield key

    @staticmethod
    def position(key: Key) -> Position:
        """The position from which a walk that ends at this key goes on. O(1)."""
        return (key.id,)


class AttemptIndex:
    """Blocked keys by the attempt that their leases were given to, mostly one each. Every operation is O(1).

    An attempt is a digest, so its first byte chooses a part evenly, and growth rehashes a small part of the whole.
    """

    def __init__(self) -> None:
        self._parts: list[dict[bytes, list[Key]]] = [{} for _ in range(_ATTEMPT_PARTS)]

    def get(self, attempt: bytes) -> list[Key]:
        """The keys of an attempt, in the order in which they were added. The caller must not change the list."""
        return self._parts[attempt[0]].get(attempt, [])

    def add(self, key: Key, attempt: bytes) -> None:
        """Add a blocked key."""
        self._parts[attempt[0]].setdefault(attempt, []).append(key)

    def discard(self, key: Key, attempt: bytes) -> None:
        """Take a key out. O(keys of the attempt), of which a batch has up to a thousand."""
        part = self._parts[attempt[0]]
        keys = part[attempt]
        if keys == [key]:
            del part[attempt]
        else:
            keys.remove(key)

    def check(self, held: int) -> None:
        """Raise ValueError unless exactly so many keys have an attempt. O(attempts)."""
        found = sum(len(keys) for part in self._parts for keys in part.values())
        if found != held:
            raise ValueError(f"{found} keys are found by attempt instead of {held}")


class DeadlineIndex:
    """Keys by a deadline that moves often: adding, moving and discarding cost two dict operations.

    A bucket is 1/64 s of deadlines (a quantum), or a part of a quantum that has more than `_FULL` keys. Its keys are in
    order of insertion, which is the order of their deadlines as long as each deadline is the same length of time after
    a clock that never goes back. Cooldowns differ in length, and blocks may: then the bucket is not `ordered`, and is
    sorted when it is read next. `opened` and `closed` are called with buckets that come and go: a timer for each
    bucket covers every deadline, at no cost for each key.
    """

    def __init__(
        self, deadline: Callable[[Key], float], opened: BucketListener, closed: BucketListener
    ) -> None:
        self._deadline = deadline
        self._opened = opened
        self._closed = closed
        self._buckets: SortedDict[int, DeadlineBucket] = SortedDict()
        self._newest: dict[int, DeadlineBucket] = {}  # by quantum: where keys are added
        self.earliest = inf
        """A lower bound of all deadlines: while `now` is before it, nothing is due, at the cost of one comparison."""

    def add(self, key: Key, deadline: float) -> DeadlineBucket:
        """Add a key that isn't in the index. Returns the bucket to give to `discard`. O(1) mostly."""
        quantum = int(deadline * _QUANTUM)
        bucket = self._newest.get(quantum)
        if bucket is None or len(bucket) >= _FULL:
            bucket = self._open(quantum)
        if deadline < self.earliest:  # noqa: PLR1730 - min() costs more than all of this
            self.earliest = deadline
        if deadline < bucket.latest:
            bucket.ordered = False
        else:
            bucket.latest = deadline
        bucket[key.id] = key
        return bucket

    def _open(self, quantum: int) -> DeadlineBucket:
        """Open the next bucket of a quantum. O(log n)."""
        first = quantum * _PARTS
        last = next(self._buckets.irange(first, first + _PARTS - 1, reverse=True), first - 1)
        bucket = self._buckets[last + 1] = self._newest[quantum] = DeadlineBucket(last + 1)
        self._opened(bucket)
        return bucket

    def discard(self, key: Key, bucket: DeadlineBucket) -> None:
        """Take a key out of the bucket that `add` returned. O(1) mostly."""
        del bucket[key.id]
        if bucket:
            return
        del self._buckets[bucket.number]
        quantum = bucket.number // _PARTS
        if self._newest.get(quantum) is bucket:
            del self._newest[quantum]
        self._closed(bucket)

    def buckets(self) -> Iterator[DeadlineBucket]:
        """All buckets, in order of their deadlines."""
        return iter(self._buckets.values())

    def first(self) -> Key | None:
        """The key whose deadline comes first, or None. O(1), in a crowded quantum O(its buckets)."""
        if not self._buckets:
            return None
        bucket: DeadlineBucket = self._buckets.peekitem(0)[1]
        quantum = bucket.number // _PARTS
        if self._newest.get(quantum) is bucket:  # the only one of its quantum
            return self._head(bucket)
        return min(map(self._head, self._of_quantum(quantum)), key=self._deadline)

    def due(self, now: float, limit: int) -> list[Key]:
        """At most `limit` keys whose deadlines have passed, soonest first except within a crowded quantum. O(limit)."""
        if now < self.earliest:
            return []
        first = self.first()
        self.earliest = inf if first is None else self._deadline(first)
        if first is None or now < self.earliest:
            return []
        found: list[Key] = []
        last_quantum = int(now * _QUANTUM)
        for bucket in self._buckets.values():
            if bucket.number // _PARTS > last_quantum:
                break
            self._sort(bucket)
            for key in bucket.values():
                if self._deadline(key) > now:
                    break
                found.append(key)
                if len(found) == limit:
                    return found
        return found

    def count_until(self, moment: float) -> int:
        """How many deadlines come before a moment, to within 1/64 s. O(buckets before it), mostly 64 a second."""
        last = int(moment * _QUANTUM) * _PARTS
        return sum(len(self._buckets[number]) for number in self._buckets.irange(None, last))

    def _of_quantum(self, quantum: int) -> list[DeadlineBucket]:
        first = quantum * _PARTS
        return [self._buckets[number] for number in self._buckets.irange(first, first + _PARTS - 1)]

    def _head(self, bucket: DeadlineBucket) -> Key:
        self._sort(bucket)
        return next(iter(bucket.values()))

    def _sort(self, bucket: DeadlineBucket) -> None:
        """Put the keys into the order of their deadlines, unless they are. O(`_FULL`), once for all out of order."""
        if not bucket.ordered:
            keys = sorted(bucket.values(), key=self._deadline)
            bucket.clear()
            bucket.update((key.id, key) for key in keys)
            bucket.latest = self._deadline(keys[-1])
            bucket.ordered = True

    def walk(self, after: Position | None) -> Iterator[Key]:
        """The keys in order of deadline from a position on. The key at that position may be gone."""
        number, passed = (None, ()) if after is None else (int(after[0]), after[1:])
        for current in self._buckets.irange(number):
            bucket = self._buckets[current]
            self._sort(bucket)
            keys = list(bucket.values())
            if current != number:
                passed = ()
            first = bisect_left(keys, passed[0], key=self._deadline) if passed else 0
            for deadline, those in groupby(islice(keys, first, None), self._deadline):
                for key in sorted(those, key=_id_of):
                    if (deadline, key.id) > passed:
                        yield key

    def position_of(self, key: Key, bucket: DeadlineBucket) -> Position:
        """The position from which a walk that ends at this key goes on. O(1)."""
        return (bucket.number, self._deadline(key), key.id)

    def check_key(self, key: Key, bucket: DeadlineBucket | None) -> None:
        """Raise ValueError unless the key is in this bucket, at its place in the order. O(1)."""
        deadline = self._deadline(key)
        if bucket is None or bucket.get(key.id) is not key or self._buckets.get(bucket.number) is not bucket:
            raise ValueError(f"{key!r} is not in the bucket of deadlines that it refers to")
        if int(deadline * _QUANTUM) != bucket.number // _PARTS:
            raise ValueError(f"{key!r} has a deadline outside the time of its bucket {bucket.number}")
        if deadline < self.earliest:
            raise ValueError(f"{key!r} has a deadline before the lower bound of all deadlines")

    def check_in_slices(self, keys: int, size: int) -> Iterator[None]:
        """Raise ValueError unless no bucket is empty and they hold `keys` keys. Yields after each `size` buckets."""
        found = 0
        for count, (number, bucket) in enumerate(self._buckets.items(), 1):
            if number != bucket.number or not bucket:
                raise ValueError(f"bucket {number} is empty or numbered {bucket.number}")
            found += len(bucket)
            if count % size == 0:
                yield
        if found != keys:
            raise ValueError(f"an order of deadlines holds {found} keys instead of {keys}")
