"""The partitions of a pool: which one a key is in, calls to several of them, and the rules that calls go by."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from keypool.core.answers import Ref, Written
from keypool.core.errors import UnknownKey
from keypool.core.rules import PoolRules
from keypool.engine.valkey.calls import ScriptClient, all_of
from keypool.engine.valkey.link import Reply, Word
from keypool.engine.valkey.vault import Vault


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
Named = tuple[int, Word, *tuple[Word, ...]]
"""A name, and words that go behind it."""


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

    def __init__(
        self, client: ScriptClient, facts: PoolFacts, rules: PoolRules, vault: Vault | None = None
    ) -> None:
        self.set_rules(rules)
        self.vault = vault
        """Seals the keys of the pool; None if they are stored in clear."""
        self.may_be_elsewhere = facts.partitions > 1 and vault is not None
        """Whether a key that a script didn't find by its text may have another name (`other_names_of`)."""
        self.has_odd_texts = False
        """Whether a key's text may look like an id or a handle."""
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

    def of_id(self, id: int) -> Sequence[int]:
        """The partitions in which a key with this id may be, or may have been. O(1)."""
        moved = id <= self.facts.base_id * self.count
        return range(self.count) if moved else [(id - 1) % self.count]

    async def all(self, script: str, *arguments: Word) -> list[Reply]:
        """Send the same call to all partitions at once. Returns their replies."""
        return await all_of([self.call(partition, script, arguments) for partition in range(self.count)])

    async def each(
        self, script: str, items: Sequence[Named], common: Sequence[Word] = ()
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
            return self.of(ref), ref if self.vault is None else self.vault.name(ref)
        name = (await self.names_of([ref]))[0]
        if name is None:
            raise UnknownKey
        return name

    async def names_of(self, refs: Sequence[Ref]) -> list[Name | None]:
        """The same for several keys; None for an id that no key has."""
        names: list[Name | None] = []
        moved: dict[int, int] = {}
        for place, ref in enumerate(refs):
            if isinstance(ref, Written):
                if self.vault is not None and self.has_odd_texts:
                    names.append(self._name_of_written(ref, self.vault))
                    continue
                ref = ref.other  # noqa: PLW2901
            if isinstance(ref, str):
                names.append((self.of(ref), ref if self.vault is None else self.vault.name(ref)))
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

    def _name_of_written(self, ref: Written, vault: Vault) -> Name:
        """The name of the text, and behind it of the other one, which the script finds if it is in this partition."""
        name = vault.member(ref.text)
        if self.count == 1:
            other = ref.other
            name += b"\xff%d" % other if isinstance(other, int) else b"\xff%d.%d" % other
        return self.of(ref.text), name

    async def other_names_of(self, refs: Sequence[Ref]) -> list[Name | None]:
        """Where else keys may be that weren't found in the partitions of their texts; None for nowhere.

        A text that replaced another one may belong to another partition than its key (alias.lua).
        """
        names: list[Name | None] = [None] * len(refs)
        vault = self.vault
        assert vault is not None
        texts = {
            place: ref.text if isinstance(ref, Written) else ref
            for place, ref in enumerate(refs)
            if isinstance(ref, str | Written)
        }
        found = await self.known({text: vault.name(text) for text in texts.values()})
        for place, text in texts.items():
            id, alias = found[text][:2]
            name = vault.name(text)
            if not id and alias >= 0 and isinstance(refs[place], Written):
                # An alias may lead nowhere, and then the text isn't what was meant.
                [[id, *_]] = await self.call(alias, "known", (1, name))
                alias = alias if id else -1
                id = 0
            if id or alias >= 0:  # it is there by now, or the text wasn't looked for
                names[place] = self.of(text) if id else alias, name
        written = [
            place for place, ref in enumerate(refs) if isinstance(ref, Written) and names[place] is None
        ]
        others = await self.names_of(
            [ref.other for place in written if isinstance(ref := refs[place], Written)]
        )
        for place, other in zip(written, others, strict=True):
            names[place] = other
        return names

    async def known(self, names: Mapping[str, bytes]) -> dict[str, Reply]:
        """What known.lua replies about texts, of which these are the names. O(texts * log n)."""
        by_partition: dict[int, list[str]] = {}
        for text in names:
            by_partition.setdefault(self.of(text), []).append(text)
        calls = {
            partition: self.call(partition, "known", (len(texts), *(names[text] for text in texts)))
            for partition, texts in by_partition.items()
        }
        replies: dict[str, Reply] = {}
        for reply, texts in zip(await all_of([*calls.values()]), by_partition.values(), strict=True):
            replies.update(zip(texts, reply, strict=True))
        return replies

    async def followed(self, found: Reply, name: bytes) -> Reply:
        """What known.lua replied about a text with this name, or what it replies where an alias leads. O(log n)."""
        if not found[0] and found[1] >= 0:
            [found] = await self.call(found[1], "known", (1, name))
        return found

    async def places_of_ids(self, ids: Sequence[int]) -> list[tuple[bytes, bytes] | None]:
        """The texts of ids, and their places in order of text, as scripts have both; None if there is no such key.

        Searches all partitions if some id may have been moved in.
        """
        if all(id > self.facts.base_id * self.count for id in ids):
            texts, _ = await self.each("find", [((id - 1) % self.count, id) for id in ids])
        else:
            replies = await self.all("find", *ids)
            texts = [next(filter(None, found), None) for found in zip(*replies, strict=True)]
        return [None if text is None else tuple(text) for text in texts]
