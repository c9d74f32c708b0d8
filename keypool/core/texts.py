"""How keys are found by what is written: the text, the name, the hint.

Texts that were generated begin at random, so their first two characters spread them evenly over small buckets, which
can be walked in order. Texts from elsewhere may all begin with `sk-live-`: their hash spreads them, and they have no
order. As in index.py, no structure here moves all its entries when it grows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import takewhile
from operator import attrgetter

from sortedcontainers import SortedDict, SortedKeyList, SortedList

from keypool.core.index import IdIndex, Position
from keypool.core.keys import ALPHABET, Key

_TEXT_BUCKET = 2  # characters: 3,844 buckets
_SHOWN = 4  # characters of a text that a hint shows, so that a position may hold them too
_PART_SHIFT = (
    sys.hash_info.width - 12
)  # 4,096 parts: their dicts choose a place by the low bits of the same hash
_ID_BITS = 40  # of the largest id


class TextIndex:
    """Generated keys by text. Finding is O(1); walking sorts one small bucket at a time."""

    def __init__(self) -> None:
        self._buckets: SortedDict[str, dict[str, Key]] = SortedDict()

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values()))

    def get(self, text: str) -> Key | None:
        """The key, or None. O(1)."""
        bucket = self._buckets.get(text[:_TEXT_BUCKET])
        return None if bucket is None else bucket.get(text)

    def add(self, key: Key) -> None:
        """Add a key. O(log n)."""
        start = key.text[:_TEXT_BUCKET]
        bucket = self._buckets.get(start)
        if bucket is None:
            bucket = self._buckets[start] = {}
        bucket[key.text] = key

    def discard(self, key: Key) -> None:
        """Take a key out. O(log n)."""
        start = key.text[:_TEXT_BUCKET]
        bucket = self._buckets[start]
        del bucket[key.text]
        if not bucket:
            del self._buckets[start]

    def walk(self, prefix: str, after: Position | None, by_id: IdIndex) -> Iterator[Key]:
        """The keys whose text starts with `prefix`, in order of text, from a position on.

        If the key at `after` is gone, those that share its first four characters are walked again: a key
        may then be met twice, but none is missed.
        """
        least, last = prefix, ""
        if after is not None:
            least = max(prefix, shown_of(int(after[0])))
            passed = by_id.get(int(after[1]))
            if passed is not None and passed.text.startswith(least):
                last = passed.text
        for start in self._buckets.irange(least[:_TEXT_BUCKET]):
            if not start.startswith(prefix[:_TEXT_BUCKET]):
                return
            bucket = self._buckets[start]
            yield from (
                bucket[text]
                for text in sorted(bucket)
                if text > last and text >= least and text.startswith(prefix)
            )

    @staticmethod
    def position(key: Key) -> Position:
        """The rank of the first four characters, which the hint shows as well, and the id. O(1)."""
        return (rank_of(key.text), key.id)


class HashedIndex:
    """Keys by a text that may begin as all others do, in parts by its hash. Every operation is O(1).

    Growth rehashes one part of 4,096. Parts are made when they are needed, so an empty index costs next to nothing.
    """

    def __init__(self) -> None:
        self._parts: dict[int, dict[str, Key]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._parts.values()))

    def get(self, text: str) -> Key | None:
        """The key, or None."""
        part = self._parts.get(hash(text) >> _PART_SHIFT)
        return None if part is None else part.get(text)

    def add(self, text: str, key: Key) -> None:
        """Add a key under a text that no other key has."""
        number = hash(text) >> _PART_SHIFT
        part = self._parts.get(number)
        if part is None:
            part = self._parts[number] = {}
        part[text] = key

    def discard(self, text: str) -> None:
        """Take out what was added under this text."""
        number = hash(text) >> _PART_SHIFT
        part = self._parts[number]
        del part[text]
        if not part:
            del self._parts[number]


class NameIndex:
    """Keys by name, in order of name, which is that of its code points. Every operation is O(log n)."""

    def __init__(self) -> None:
        self._keys: SortedKeyList[Key] = SortedKeyList(key=attrgetter("details.name"))

    def __len__(self) -> int:
        return len(self._keys)

    def get(self, name: str) -> Key | None:
        """The key, or None."""
        return next(self._keys.irange_key(name, name), None)

    def add(self, key: Key) -> None:
        """Add a key with a name that no other key has."""
        self._keys.add(key)

    def discard(self, key: Key) -> None:
        """Take a key out, which still has the name with which it was added."""
        self._keys.remove(key)

    def walk(self, beginning: str, after: Position | None) -> Iterator[Key]:
        """The keys whose name begins so, in order of name, from a position on."""
        last = "" if after is None else str(after[0])
        keys = self._keys.irange_key(max(beginning, last), inclusive=(last < beginning, False))
        return takewhile(lambda key: (key.details.name or "").startswith(beginning), keys)

    @staticmethod
    def position(key: Key) -> Position:
        """The position from which a walk that ends at this key goes on: its name, which is no secret. O(1)."""
        return (key.details.name or "",)


class HintIndex:
    """Imported keys by the hint of their text, for the first of those that share one. Every operation is O(log n).

    An entry is a number: the hint's hash above the id. So the ids of a hint stand together, in order.
    """

    def __init__(self) -> None:
        self._entries: SortedList[int] = SortedList()

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, key: Key) -> None:
        """Add a key."""
        self._entries.add(_entry(key.hint, key.id))

    def discard(self, key: Key) -> None:
        """Take a key out, which still has the text with which it was added."""
        self._entries.remove(_entry(key.hint, key.id))

    def holds(self, key: Key) -> bool:
        """Whether the key was added with the text that it has."""
        return _entry(key.hint, key.id) in self._entries

    def walk(self, text: str) -> Iterator[int]:
        """The ids of keys with this hint, in order; another hint of the same 64-bit hash would be among them."""
        first = _entry(text, 0)
        return (
            entry - first for entry in self._entries.irange(first, first + (1 << _ID_BITS), (True, False))
        )


def _entry(hint: str, id: int) -> int:
    return (hash(hint) << _ID_BITS) + id


def rank_of(text: str) -> int:
    """The first four characters of a text as a number in base 62: reveals no more than a hint does."""
    rank = 0
    for character in text[:_SHOWN]:
        rank = rank * len(ALPHABET) + ALPHABET.index(character)
    return rank


def shown_of(rank: int) -> str:
    """The characters that `rank_of` made a number of."""
    characters = []
    for _ in range(_SHOWN):
        rank, digit = divmod(rank, len(ALPHABET))
        characters.append(ALPHABET[digit])
    return "".join(reversed(characters))


def generated_with_hint(hint: str, texts: TextIndex, by_id: IdIndex) -> Iterator[Key]:
    """The generated keys that begin as this hint does, in order of text; none if it isn't the hint of such a key."""
    beginning = hint[:_SHOWN]
    if len(hint) != 2 * _SHOWN + 1 or any(character not in ALPHABET for character in beginning):
        return iter(())
    return texts.walk(beginning, None, by_id)
