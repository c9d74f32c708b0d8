"""The partitions of a pool: which one a key is in, calls to several of them, and the rules that calls go by."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from keypool.core.answers import Ref
from keypool.core.errors import UnknownKey
from keypool.core.rules import PoolRules
from keypool.engine.valkey.calls import ScriptClient, all_of
from keypool.engine.valkey.link import Reply, Word


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """What is stored about a pool, and never changes: see engine.py and registry.py."""

    partitions: int
    born: int
    base_tick: int
    base_id: int
    secret: bytes
    number: int = 0


Name = tuple[int, Word]
"""A key for scripts: its partition, and its name there (lua/common.lua)."""


def partition_of(text: str, partitions: int) -> int:
    """The partition of a key."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % partitions


class Partitions:
    """See the module. All coroutines raise StorageUnavailable."""

    rules: PoolRules
    """The settings of the pool. Others read them from here whenever they need them, as they may change."""
    block_us: int
    """`block_seconds` in microseconds."""
    life_us: int
    """`keepalive_seconds` in microseconds."""

    def __init__(self, client: ScriptClient, facts: PoolFacts, rules: PoolRules) -> None:
        self.set_rules(rules)
        self.client = client
        self.call = client.call
        self.available = client.available
        self.facts = facts
        self.count = facts.partitions

    def set_rules(self, rules: PoolRules) -> None:
        """Go by these rules from now on. O(1)."""
        self.rules = rules
        self.block_us = round(rules.block_seconds * 1e6)
        self.life_us = round((rules.keepalive_seconds or 0) * 1e6)

    def of(self, text: str) -> int:
        """The partition of a key of this pool."""
        return partition_of(text, self.count)

    async def all(self, script: str, *arguments: Word) -> list[Reply]:
        """Send the same call to all partitions at once. Returns their replies."""
        return await all_of([self.call(partition, script, arguments) for partition in range(self.count)])

    async def each(
        self, script: str, items: Sequence[tuple[int, *tuple[Word, ...]]], common: Sequence[Word] = ()
    ) -> tuple[list[Reply], float]:
        """Call a script once for each partition of `items` (partition, words).

        Returns the replies, one for each item in their order, and the age of the oldest call. `common` goes before the
        items' words.
        """
        if len(items) == 1:
            partition, *words = items[0]
            call = self.call(partition, script, [*common, *words])
            return await call, call.age()
        places: dict[int, list[int]] = {}
        arguments: dict[int, list[Word]] = {}
        for place, (partition, *words) in enumerate(items):
            if partition not in places:
                places[partition], arguments[partition] = [], [*common]
            places[partition].append(place)
            arguments[partition] += words
        calls = [self.call(partition, script, words) for partition, words in arguments.items()]
        replies: list[Reply] = [None] * len(items)
        for where, reply in zip(places.values(), await all_of(calls), strict=True):
            for place, item in zip(where, reply, strict=True):
                replies[place] = item
        return replies, max((call.age() for call in calls), default=0.0)

    async def name_of(self, ref: Ref) -> Name:
        """The name of a key for scripts. Raises UnknownKey if no partition can have it."""
        if isinstance(ref, str):
            return self.of(ref), ref
        name = (await self.names_of([ref]))[0]
        if name is None:
            raise UnknownKey
        return name

    async def names_of(self, refs: Sequence[Ref]) -> list[Name | None]:
        """The same for several keys; None for an id that no key has."""
        names: list[Name | None] = []
        moved: dict[int, int] = {}
        for place, ref in enumerate(refs):
            if isinstance(ref, str):
                names.append((self.of(ref), ref))
                continue
            id, word = (ref, b"\xff%d" % ref) if isinstance(ref, int) else (ref.id, b"\xff%d.%d" % ref)
            names.append(((id - 1) % self.count, word))
            if id <= self.facts.base_id * self.count:
                moved[place] = id
        if moved and self.count > 1:  # a key that was moved in may be in any partition
            replies = await self.all("find", *moved.values())
            for place, found in zip(moved, zip(*replies, strict=True), strict=True):
                where = next((number for number, text in enumerate(found) if text is not None), None)
                name = names[place]
                names[place] = None if where is None or name is None else (where, name[1])
        return names

    async def texts_of_ids(self, ids: Sequence[int]) -> list[str | None]:
        """The texts of ids, None if there is no such key. Searches all partitions if some id may have been moved in."""
        if all(id > self.facts.base_id * self.count for id in ids):
            texts, _ = await self.each("find", [((id - 1) % self.count, id) for id in ids])
        else:
            replies = await self.all("find", *ids)
            texts = [next(filter(None, found), None) for found in zip(*replies, strict=True)]
        return [None if text is None else text.decode() for text in texts]
