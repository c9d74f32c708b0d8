"""The partitions of a pool: which one a key is in, and calls to several of them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from keypool.core.answers import Ref
from keypool.core.errors import UnknownKey
from keypool.engine.valkey.calls import ScriptClient, all_of
from keypool.engine.valkey.link import Reply, Word


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """What `{POOL}:pool` holds: see engine.py."""

    partitions: int
    born: int
    base_tick: int
    base_id: int


def partition_of(text: str, partitions: int) -> int:
    """The partition of a key."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % partitions


class Partitions:
    """See the module. All coroutines raise StorageUnavailable."""

    def __init__(self, client: ScriptClient, facts: PoolFacts) -> None:
        self.client = client
        self.call = client.call
        self.available = client.available
        self.facts = facts
        self.count = facts.partitions

    def of(self, text: str) -> int:
        """The partition of a key of this pool."""
        return partition_of(text, self.count)

    async def all(self, script: str, *arguments: Word) -> list[Reply]:
        """Send the same call to all partitions at once. Returns their replies."""
        return await all_of([self.call(partition, script, arguments) for partition in range(self.count)])

    async def each(
        self,
        script: str,
        items: Sequence[tuple[int, Word] | tuple[int, Word, Word]],
        common: Sequence[Word] = (),
    ) -> list[Reply]:
        """Call a script once for each partition of `items` (partition, words). Returns the replies, one per item, in
        their order; `common` goes before the items' words.
        """
        if len(items) == 1:
            partition, *words = items[0]
            return [(await self.call(partition, script, [*common, *words]))[0]]
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
        return replies

    async def text_of(self, ref: Ref) -> str:
        """The text of a key; one given by its text may not exist. Raises UnknownKey for an id that no key has."""
        text = ref if isinstance(ref, str) else (await self.texts_of_ids([ref]))[0]
        if text is None:
            raise UnknownKey
        return text

    async def texts_of(self, refs: Sequence[Ref]) -> list[str | None]:
        """The same for several keys; None for an id that no key has."""
        ids = [ref for ref in refs if isinstance(ref, int)]
        found = iter(await self.texts_of_ids(ids)) if ids else iter(())
        return [next(found) if isinstance(ref, int) else ref for ref in refs]

    async def texts_of_ids(self, ids: Sequence[int]) -> list[str | None]:
        """The texts of ids, None if there is no such key. Searches all partitions if some id may have been moved in."""
        if all(id > self.facts.base_id * self.count for id in ids):
            texts = await self.each("find", [((id - 1) % self.count, id) for id in ids])
        else:
            replies = await self.all("find", *ids)
            texts = [next(filter(None, found), None) for found in zip(*replies, strict=True)]
        return [None if text is None else text.decode() for text in texts]
