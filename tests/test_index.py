"""The orders against `sorted()` of a plain list, and what each operation costs.

Full buckets and loaded keys are what the pool's own tests seldom have: here a bucket is full with a few.
"""

from __future__ import annotations

import math
import random
from operator import attrgetter
from typing import Any

import pytest
from engine_support import START
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sortedcontainers import SortedDict

from keypool.core import index as index_module
from keypool.core.index import AttemptIndex, DeadlineBucket, DeadlineIndex, IdIndex
from keypool.core.keys import ALPHABET, Key
from keypool.core.texts import TextIndex

FULL = 3
SETTINGS = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def key_of(id: int, text: str | None = None, deadline: float = START) -> Key:
    """A key with these."""
    return Key(id, text or f"{id:020}", START, deadline)


def quantum_of(deadline: float) -> int:
    """The stretch of time, 1/64 s, that keys may be out of turn in."""
    return int(deadline * 64)


# --------------------------------------------------------------------------------------------------- by id

IDS = st.lists(st.integers(1, 5000), unique=True, max_size=60).map(sorted)


@SETTINGS
@given(ids=IDS, gone=st.sets(st.integers(0, 59)), after=st.none() | st.integers(0, 5001))
def test_keys_by_id_are_those_of_a_sorted_list(ids: list[int], gone: set[int], after: int | None) -> None:
    """Found, walked from anywhere and gone, across the edges of buckets."""
    index = IdIndex()
    made = {id: key_of(id) for id in ids}
    for key in sorted(made.values(), key=lambda key: key.id * 7919 % 5003):  # in whatever order
        index.add(key)
    for place in gone:
        if place < len(ids):
            index.discard(made.pop(ids[place]))
    assert [key.id for key in index.walk(None)] == sorted(made)
    position = None if after is None else (after,)
    assert [key.id for key in index.walk(position)] == [id for id in sorted(made) if id > (after or 0)]
    for id in {*ids, 0, -1, 1024, 5001}:
        assert index.get(id) is made.get(id)
    assert all(bucket.held for bucket in index._buckets.values()), "an empty bucket was left"


def test_a_walk_by_id_continues_after_a_removed_key() -> None:
    """Even if its whole bucket was removed."""
    index = IdIndex()
    made = {id: key_of(id) for id in (1, 1023, 1024, 1500, 2048, 9000)}
    for key in made.values():
        index.add(key)
    for id, rest in ((1024, [1500, 2048, 9000]), (1500, [2048, 9000])):
        index.discard(made[id])
        assert [key.id for key in index.walk(index.position(made[id]))] == rest


# ------------------------------------------------------------------------------------------------- by text

TEXTS = st.lists(
    st.tuples(st.sampled_from(["AA", "AB", "Az", "zz", "0a"]), st.text("0Aaz", min_size=2, max_size=2)),
    max_size=40,
).map(lambda pairs: ["".join(pair) + f"{number:012}" for number, pair in enumerate(pairs)])
PREFIXES = st.one_of(
    st.sampled_from(["A", "AA", "Az", "z", "zz", "0", "B"]), st.text("0Aaz", min_size=1, max_size=4)
)


@SETTINGS
@given(texts=TEXTS, gone=st.sets(st.integers(0, 39)), prefix=PREFIXES)
def test_keys_by_text_are_those_of_a_sorted_list(texts: list[str], gone: set[int], prefix: str) -> None:
    """Found, walked by prefix, and gone."""
    index, by_id = TextIndex(), IdIndex()
    made = [key_of(id, text) for id, text in enumerate(texts, 1)]
    for key in made:
        index.add(key)
        by_id.add(key)
    left = [key for place, key in enumerate(made) if place not in gone]
    for place in gone:
        if place < len(made):
            index.discard(made[place])
            by_id.discard(made[place])
    wanted = sorted(key.text for key in left if key.text.startswith(prefix))
    assert [key.text for key in index.walk(prefix, None, by_id)] == wanted
    assert len(index) == len(left)
    for key in made:
        assert index.get(key.text) is (key if key in left else None)
    assert index.get(prefix) is None
    for key in left:
        if key.text.startswith(prefix):
            rest = [other.text for other in index.walk(prefix, index.position(key), by_id)]
            assert rest == [text for text in wanted if text > key.text], f"after {key.text}"


@SETTINGS
@given(texts=TEXTS.filter(bool), which=st.integers(0, 39), prefix=PREFIXES)
def test_a_walk_by_text_after_a_removed_key_misses_none(texts: list[str], which: int, prefix: str) -> None:
    """It goes back to the first of those with the same four characters, and no further."""
    index, by_id = TextIndex(), IdIndex()
    made = [key_of(id, text) for id, text in enumerate(texts, 1)]
    for key in made:
        index.add(key)
        by_id.add(key)
    passed = made[which % len(made)]
    position = index.position(passed)
    index.discard(passed)
    by_id.discard(passed)
    wanted = sorted(
        key.text
        for key in made
        if key is not passed and key.text.startswith(prefix) and key.text >= passed.text[:4]
    )
    assert [key.text for key in index.walk(prefix, position, by_id)] == wanted


def test_a_position_by_text_holds_the_first_four_characters_as_a_number() -> None:
    """In the order of the texts, and nothing beyond the four."""
    starts = ["0000", "0001", "00A0", "9zzz", "A000", "AzzZ", "Zzzz", "a000", "zzzz"]
    ranks = [TextIndex.position(key_of(7, start + "X" * 16))[0] for start in starts]
    assert ranks == sorted(ranks)
    assert ranks[0] == 0
    assert ranks[-1] == len(ALPHABET) ** 4 - 1
    assert TextIndex.position(key_of(7, "5TRxXXXX")) == TextIndex.position(key_of(7, "5TRxYYYY"))


# --------------------------------------------------------------------------------------------- by deadline


class Plain:
    """The index beside what a plain list says it holds."""

    def __init__(self) -> None:
        self.index = DeadlineIndex(attrgetter("expires_deadline"), self._opened, self._closed)
        self.places: dict[int, DeadlineBucket] = {}
        self.keys: dict[int, Key] = {}
        self.last_id = 0
        self.open: list[DeadlineBucket] = []  # as told

    def _opened(self, bucket: DeadlineBucket) -> None:
        assert not any(bucket is other for other in self.open), f"bucket {bucket.number} is told open twice"
        self.open.append(bucket)

    def _closed(self, bucket: DeadlineBucket) -> None:
        assert not bucket, f"bucket {bucket.number} is told closed with {len(bucket)} keys in it"
        before = len(self.open)
        self.open = [other for other in self.open if other is not bucket]
        assert len(self.open) == before - 1, f"bucket {bucket.number} is told closed but was not open"

    def add(self, deadline: float) -> Key:
        """A new key."""
        self.last_id += 1
        key = key_of(self.last_id, None, deadline)
        self._put(key)
        return key

    def _put(self, key: Key) -> None:
        bucket = self.index.add(key, key.expires_deadline)
        self.places[key.id], self.keys[key.id] = bucket, key
        assert key.id in bucket
        assert len(bucket) <= index_module._FULL, f"{len(bucket)} keys in a bucket"

    def move(self, key: Key, deadline: float) -> None:
        """What keepalive does."""
        self.discard(key)
        key.expires_deadline = deadline
        self._put(key)

    def discard(self, key: Key) -> None:
        """Gone."""
        self.index.discard(key, self.places.pop(key.id))
        del self.keys[key.id]

    def check(self) -> None:
        """Whole, in order of quantum, and each bucket in the stretch of its own."""
        for key in self.keys.values():
            self.index.check_key(key, self.places[key.id])
        assert list(self.index.check_in_slices(len(self.keys), 1)) == [None] * len(
            set(map(id, self.places.values()))
        )
        walked = list(self.index.walk(None))
        assert sorted(key.id for key in walked) == sorted(self.keys), "a walk that misses, or meets twice"
        buckets = list(self.index.buckets())
        assert {id(bucket) for bucket in buckets} == {id(bucket) for bucket in self.open}, "told otherwise"
        assert [bucket.number for bucket in buckets] == sorted(bucket.number for bucket in self.open)
        for key in walked:
            late = self.places[key.id].ends - key.expires_deadline
            assert 0 < late <= 1 / 64, f"the bucket of {key!r} ends {late} s after its deadline"
        quanta = [quantum_of(key.expires_deadline) for key in walked]
        assert quanta == sorted(quanta), f"out of order by more than a quantum: {quanta}"


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 200)),
        st.tuples(st.just("move"), st.integers(0, 200)),
        st.tuples(st.just("discard"), st.integers(0, 200)),
        st.tuples(st.just("tick"), st.integers(0, 40)),
    ),
    max_size=80,
)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets that are full with three keys."""
    monkeypatch.setattr(index_module, "_FULL", FULL)


@SETTINGS
@given(steps=STEPS, late=st.integers(0, 300))
@pytest.mark.usefixtures("full")
def test_keys_by_deadline_are_those_of_a_sorted_list(steps: list[tuple[str, int]], late: int) -> None:
    """Added, moved and gone at the moments of a clock, 1 ms a tick; walked from every key on."""
    plain, now = Plain(), START
    for step, number in steps:
        key = list(plain.keys.values())[number % len(plain.keys)] if plain.keys else None
        if step == "tick":
            now += number / 1000
        elif step == "add":
            plain.add(now + 300)
        elif key is not None and step == "move":
            plain.move(key, now + 300)
        elif key is not None:
            plain.discard(key)
        plain.check()
    expect_walks(plain)
    at = START + 300 + late / 1000
    due = plain.index.due(at, 1000)
    missed = [key for key in plain.keys.values() if key.expires_deadline <= at and key not in due]
    assert all(key.expires_deadline <= at for key in due), "a key was due before its deadline"
    assert all(quantum_of(key.expires_deadline) == quantum_of(at) for key in missed), "due by a quantum"
    assert plain.index.due(at, 2) == due[:2]


def expect_walks(plain: Plain) -> None:
    """Fails unless a walk from each key goes on with exactly those behind it."""
    order = list(plain.index.walk(None))
    for place, key in enumerate(order):
        position = plain.index.position_of(key, plain.places[key.id])
        assert list(plain.index.walk(position)) == order[place + 1 :], f"from {key!r} at {position}"


@SETTINGS
@given(steps=STEPS.filter(lambda steps: any(step == "add" for step, _ in steps)), which=st.integers(0, 99))
@pytest.mark.usefixtures("full")
def test_a_walk_by_deadline_continues_after_a_removed_key(steps: list[tuple[str, int]], which: int) -> None:
    """Deleted, or moved to the end, where it is met again."""
    plain, now = Plain(), START
    for step, number in steps:
        if step == "add":
            plain.add(now + 300)
        else:
            now += number / 10_000
    order = list(plain.index.walk(None))
    place = which % len(order)
    key = order[place]
    position = plain.index.position_of(key, plain.places[key.id])
    plain.move(key, now + 600)
    assert list(plain.index.walk(position)) == [*order[place + 1 :], key]
    plain.discard(key)
    assert list(plain.index.walk(position)) == order[place + 1 :]


@SETTINGS
@given(
    moments=st.lists(st.integers(0, 400), max_size=60),
    late=st.integers(0, 400),
    scale=st.sampled_from([1000, 10_000, 64]),
    read=st.sets(st.integers(0, 59)),
)
@pytest.mark.usefixtures("full")
def test_keys_that_come_out_of_order_are_out_of_turn_by_a_quantum_at_most(
    moments: list[int], late: int, scale: int, read: set[int]
) -> None:
    """In walks not at all, as far as one bucket holds them; among the due ones by 1/64 s."""
    plain = Plain()
    for number, moment in enumerate(moments):
        plain.add(START + moment / scale)
        if number in read:
            first = plain.index.first()
            assert first is not None
            assert first.expires_deadline == START + min(moments[: number + 1]) / scale
            plain.check()
    plain.check()
    expect_walks(plain)
    at = START + late / scale
    due = plain.index.due(at, 1000)
    assert len(set(due)) == len(due), "a key is due twice"
    for key in plain.keys.values():
        if key in due:
            assert key.expires_deadline <= at, f"{key!r} is due before its deadline"
        else:
            late_by = at - key.expires_deadline
            assert late_by < 1 / 64, f"{key!r} is not found due, {late_by} s after its deadline"


def test_the_earliest_deadline_is_the_first() -> None:
    """An empty index has none."""
    plain = Plain()
    assert plain.index.first() is None
    late, early = plain.add(START + 9), plain.add(START + 3)
    assert plain.index.first() is early
    plain.discard(early)
    assert plain.index.first() is late
    plain.discard(late)
    assert plain.index.first() is None
    assert plain.index.due(math.inf, 5) == []
    assert list(plain.index.walk(None)) == []


@pytest.mark.usefixtures("full")
def test_many_keys_of_one_deadline_fill_one_bucket_after_the_other() -> None:
    """In order of insertion, though they leave and others come."""
    plain = Plain()
    made = [plain.add(START) for _ in range(4 * FULL + 1)]
    assert len(plain.index._buckets) == 5
    assert list(plain.index.walk(None)) == made
    for key in made[::2]:
        plain.discard(key)
    again = [plain.add(START) for _ in range(2 * FULL)]
    plain.check()
    assert sorted(key.id for key in plain.index.due(START, 1000)) == sorted(
        key.id for key in (*made[1::2], *again)
    )


# --------------------------------------------------------------------------------------------- by attempt


@SETTINGS
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 99)), max_size=60))
def test_keys_by_attempt_are_those_that_were_added_in_that_order(steps: list[tuple[bool, int]]) -> None:
    """Of four attempts, two of which share their first byte; nothing is left of an attempt without keys."""
    attempts = [bytes([first]) * 15 + bytes([last]) for first, last in ((0, 0), (0, 1), (255, 0), (7, 7))]
    index = AttemptIndex()
    plain: list[tuple[Key, bytes]] = []
    for number, (add, which) in enumerate(steps, 1):
        if add:
            plain.append((key_of(number), attempts[which % len(attempts)]))
            index.add(*plain[-1])
        elif plain:
            index.discard(*plain.pop(which % len(plain)))
        for attempt in attempts:
            assert index.get(attempt) == [key for key, other in plain if other == attempt]
        index.check(len(plain))
        with pytest.raises(ValueError, match=rf"{len(plain)} keys are found by attempt instead of -1"):
            index.check(-1)
    assert sum(map(len, index._parts)) == len({attempt for _, attempt in plain})


# ------------------------------------------------------------------------------------------------- what it costs


class Counted(SortedDict):  # type: ignore[misc]  # it has no types
    """Counts the buckets that are asked for."""

    touched = 0

    def get(self, *args: Any) -> Any:
        self.touched += 1
        return super().get(*args)

    def __getitem__(self, number: Any) -> Any:
        self.touched += 1
        return super().__getitem__(number)


class Costs:
    """How many keys and buckets of an index of deadlines an operation looks at."""

    def __init__(self) -> None:
        self.keys = 0  # whose deadline was asked for
        self.read = 0  # that came out of a bucket
        self.index = DeadlineIndex(self._deadline, lambda bucket: None, lambda bucket: None)
        self.buckets = self.index._buckets = Counted()
        self.places: dict[int, DeadlineBucket] = {}

    def _deadline(self, key: Key) -> float:
        self.keys += 1
        return key.expires_deadline

    def add(self, id: int, deadline: float) -> int:
        """The buckets touched by adding a key."""
        self.buckets.touched = 0
        key = key_of(id, None, deadline)
        self.places[id] = self.index.add(key, deadline)
        return self.buckets.touched


def test_adding_moving_and_discarding_a_key_reads_no_other_key() -> None:
    """It touches two buckets at most, while deadlines come in order."""
    costs = Costs()
    worst = max(costs.add(id, START + id / 100_000) for id in range(1, 20_000))
    costs.buckets.touched = 0
    for id in range(1, 20_000, 7):
        costs.index.discard(key_of(id, None, START + id / 100_000), costs.places[id])
    assert costs.keys == 0, f"{costs.keys} keys looked at"
    assert worst <= 2, f"{worst} buckets looked at by one add"


def test_finding_due_keys_reads_at_most_one_more_than_the_limit() -> None:
    """The last one shows that no more are due."""
    costs = Costs()
    for id in range(1, 20_000):
        costs.add(id, START + id / 1000)
    costs.keys = 0
    assert len(costs.index.due(START + 19, 64)) == 64
    assert costs.keys <= 65, f"{costs.keys} keys looked at for 64"
    costs.keys = 0
    assert costs.index.due(START, 64) == []
    assert costs.keys <= 1, f"{costs.keys} keys looked at for none"


def test_keys_that_came_out_of_order_are_sorted_once() -> None:
    """Though they become due one after the other, as the ends of cooldowns do."""
    costs = Costs()
    ids = list(range(1, 1001))
    random.Random(1).shuffle(ids)
    for id in ids:
        costs.add(id, START + id / 100_000)
    costs.index.first()
    costs.keys = 0
    for id in range(1, 1001):
        assert [key.id for key in costs.index.due(START + id / 100_000, 64)] == [id]
        costs.index.discard(key_of(id), costs.places[id])
    assert costs.keys <= 5 * 1000, f"{costs.keys} keys looked at for a thousand"


def test_a_walk_reads_one_bucket_at_a_time() -> None:
    """From wherever it goes on, which is searched for in that bucket."""
    costs = Costs()
    made = {}
    for id in range(1, 30_000):
        costs.add(id, START)
        made[id] = key_of(id, None, START)
    position = costs.index.position_of(made[20_000], costs.places[20_000])
    costs.keys = 0
    walk = costs.index.walk(position)
    next(walk)
    searched = index_module._FULL.bit_length()
    assert costs.keys <= index_module._FULL + searched, f"{costs.keys} keys looked at for the first of a page"


def test_a_page_reads_little_more_of_a_bucket_than_it_shows() -> None:
    """Where deadlines differ, from wherever it goes on."""
    costs = Costs()
    made = {}
    for id in range(1, 1001):
        costs.add(id, START + id / 100_000)
        made[id] = key_of(id, None, START + id / 100_000)
    for position in (None, costs.index.position_of(made[500], costs.places[500])):
        costs.keys = 0
        walk = costs.index.walk(position)
        first = [next(walk).id for _ in range(20)]
        assert first == list(range(1 if position is None else 501, 21 if position is None else 521))
        assert costs.keys <= 20 + 15, f"{costs.keys} keys looked at for 20"


def test_adding_to_a_crowded_quantum_does_not_read_all_its_buckets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when granted keys and others are restored in turn."""
    monkeypatch.setattr(index_module, "_FULL", 4)
    costs = Costs()
    for id in range(1, 401):
        costs.add(id, START)
    costs.add(401, START + 1)
    touched = costs.add(402, START)
    assert touched <= 10, f"{touched} buckets looked at to add one key to a deadline that 400 share"


def test_finding_due_keys_does_not_read_a_crowded_quantum(monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart grace gives all keys one deadline, and every call looks whether it has passed."""
    costs = crowd_of(400, monkeypatch)
    assert costs.index.due(START - 1, 64) == []
    assert costs.read <= 100 + FULL, f"{costs.read} keys read to see that none of 400 is due"


def test_finding_the_earliest_deadline_does_not_read_a_crowded_quantum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Like everything else that uses `first`."""
    costs = crowd_of(400, monkeypatch)
    assert costs.index.first() is not None
    assert costs.read <= 100 + FULL, f"{costs.read} keys read to find the first of 400"


def crowd_of(count: int, monkeypatch: pytest.MonkeyPatch) -> Costs:
    """So many keys of one deadline, in buckets of 4, with every key counted that is read from them."""
    monkeypatch.setattr(index_module, "_FULL", 4)
    costs = Costs()

    class ReadBucket(DeadlineBucket):
        """Counts the keys that are read."""

        def values(self) -> Any:
            for key in super().values():
                costs.read += 1
                yield key

    monkeypatch.setattr(index_module, "DeadlineBucket", ReadBucket)
    for id in range(1, count + 1):
        costs.add(id, START)
    costs.read = 0
    return costs
