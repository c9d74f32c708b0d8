"""Keys from elsewhere: those that the pool doesn't have are added, all of them or none if there is no room.

A key is added in the partition of its text, by a script that looks whether the text is there already
(lua/import.lua). So two servers that import the same secret at the same moment make one key of it. A sealed text holds
only for its id, so the number of the id is chosen here, above all that this server knows; if another server was faster,
the script adds nothing and replies the latest number, and the keys are sealed again.

The limit of keys is that of creation.py: each partition may hold its share of it. As a text can't choose its partition,
near the limit a partition gets more than its share if the others have room: that is counted and reserved by one server
at a time.

Names: details.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

from msgspec import structs

from keypool.core.answers import Imported, ImportedKey, NewKey
from keypool.core.details import details_of
from keypool.core.errors import (
    KeysWouldExpire,
    NameTaken,
    PoolError,
    PoolFull,
    SecretsKeyRequired,
    StorageUnavailable,
    UnknownKey,
)
from keypool.core.keys import State, hint
from keypool.engine.valkey.calls import all_of, expires_in, seconds_left
from keypool.engine.valkey.creation import KeyGenerator
from keypool.engine.valkey.details import Editor, Locks, Room, is_odd
from keypool.engine.valkey.link import Reply, Word
from keypool.engine.valkey.partitions import Partitions
from keypool.engine.valkey.poller import PartitionPoller
from keypool.engine.valkey.vault import details_in, info_of

_CHUNK = 200  # keys that one script adds, in some 3 ms
_LOCKED_ROOM = "room"  # the word that a server locks while it fills a pool near its limit
_PAUSE = 0.02  # seconds, on average, before something that another server is at is tried again
_MOST_TRIES = 100
_ODD = 8  # the place of a word of import.lua
_NAME_TAKEN, _ALIAS, _LOCKED, _LATE, _NUMBER = -1, -2, -3, -4, -5  # of import.lua's replies


class _Terms(NamedTuple):
    """On whose behalf keys are added, under which locks, and until which moment these hold."""

    origin: Word
    locks: str = ""
    until: int = 0


class Importer:
    """See the module."""

    def __init__(
        self,
        partitions: Partitions,
        poller: PartitionPoller,
        generator: KeyGenerator,
        editor: Editor,
        locks: Locks,
    ) -> None:
        self._partitions = partitions
        self._poller = poller
        self._generator = generator
        self._editor = editor
        self._locks = locks

    def _require_importing(self, expire: bool) -> None:
        seconds = self._partitions.rules.keepalive_seconds
        if seconds is not None and not expire:
            raise KeysWouldExpire(seconds)
        if self._partitions.vault is None:
            raise SecretsKeyRequired

    async def import_key(self, item: NewKey, expire: bool, origin: Word) -> ImportedKey:
        """Add a key, unless the pool has its secret. O(log n); in pools with several partitions O(partitions) for a
        name. Raises KeysWouldExpire, NameTaken, PoolFull, SecretsKeyRequired, PoolDraining, StorageUnavailable.
        """
        self._require_importing(expire)
        [reply] = await self._import([item], origin)
        if reply[0] == _NAME_TAKEN:
            raise NameTaken(reply[1])
        shown = hint(item.secret)
        if reply[0] == 1:
            life_us = self._partitions.life_us
            lives = seconds_left(life_us, 0.0) if life_us else None
            ids = self._ids_of(item, reply[1])
            return ImportedKey(ids[0], State.AVAILABLE, shown, item.name or None, lives, False, ids)
        _, id, expires, state, info, ids = reply
        name = details_in(info).name
        return ImportedKey(id, State(state.decode()), shown, name, expires_in(expires, 0.0), True, ids)

    async def import_many(
        self, items: Sequence[NewKey | Imported], update: bool, expire: bool, origin: Word
    ) -> list[Imported]:
        """Add keys, one by one, or none if there is no room. O(k log n). Raises as `import_key`, but NameTaken."""
        self._require_importing(expire)
        results: dict[int, Imported] = {
            place: item for place, item in enumerate(items) if isinstance(item, Imported)
        }
        left = {place: item for place, item in enumerate(items) if isinstance(item, NewKey)}
        seen: dict[str, list[int] | None] = {}
        new, wanted = await self._new_of([*left.values()], update)
        async with self.room_for(wanted) as room:
            while left:
                run = _run_without_repeats(left)
                if update:
                    # Items are taken in order: one that the pool has ends the run, or is a run of its own.
                    run = [*takewhile(lambda each: each[1].secret in new, run)] or run[:1]
                for place, _ in run:
                    del left[place]
                replies = await self._import([item for _, item in run], origin, room)
                for (place, item), reply in zip(run, replies, strict=True):
                    results[place] = await self._result(item, reply, update, origin, room)
                    if results[place].id is not None:
                        seen[item.secret] = results[place].ids
                for place in [place for place, item in left.items() if item.secret in seen]:
                    ids = seen[left.pop(place).secret] or []
                    results[place] = Imported("duplicate", ids[0], ids=ids)
        return [results[place] for place in range(len(items))]

    async def _result(self, item: NewKey, reply: Reply, update: bool, origin: Word, room: Room) -> Imported:
        """The result of an item, whose details a key gets that was there, if `update`."""
        if reply[0] == 1:
            ids = self._ids_of(item, reply[1])
            return Imported("created", ids[0], ids=ids)
        try:
            if reply[0] == _NAME_TAKEN:
                raise NameTaken(reply[1])
            ids = reply[5]
            if not update:
                return Imported("existed", ids[0], ids=ids)
            ids = await self._editor.changed(ids[0], item.patch, origin, room if room.reservation else None)
            return Imported("updated", ids[0], ids=ids)
        except UnknownKey:  # it was deleted just now
            return Imported("existed", reply[1], ids=[reply[1]])
        except PoolError as error:
            return Imported("failed", code=error.code, detail=error.detail)

    def next_number(self, count: int) -> int:
        """See details.Adder. O(1)."""
        self._poller.id_number += count
        return self._poller.id_number - count + 1

    def added(self, partition: int, count: int) -> None:
        """See details.Adder. O(1)."""
        self._poller.generated(partition, count)

    def _ids_of(self, item: NewKey, first: int) -> list[int]:
        """The ids of all seats of a key that was added."""
        return [first + seat * self._partitions.count for seat in range(item.seats or 1)]

    async def _new_of(self, items: Sequence[NewKey], update: bool) -> tuple[set[str], Counter[int]]:
        """The secrets that no key has, and the room that the items need, by partition. O(k log n).

        With `update`, keys that are there may need room for more seats.
        """
        partitions, vault = self._partitions, self._partitions.vault
        assert vault is not None
        unique = [
            *{item.secret: item for item in reversed(items)}.values()
        ]  # of repeats the first one counts
        new: set[str] = set()
        wanted: Counter[int] = Counter()
        for start in range(0, len(unique), _CHUNK):
            some = unique[start : start + _CHUNK]
            names = {item.secret: vault.name(item.secret) for item in some}
            known = await partitions.known(names)
            for item in some:
                found = await partitions.followed(known[item.secret], names[item.secret])
                if not found[0] or found[4]:
                    new.add(item.secret)
                    wanted[partitions.of(item.secret)] += item.seats or 1
                elif update and (more := (item.seats or 1) - len(found[5])) > 0:
                    partition, _ = await partitions.name_of(found[0])
                    wanted[partition] += more
            await asyncio.sleep(0)
        return new, wanted

    # -- adding

    async def _import(self, items: Sequence[NewKey], origin: Word, room: Room | None = None) -> list[Reply]:
        """What import.lua replies about each item, in their order; of the first kinds only."""
        partitions = self._partitions
        names = sorted({item.name for item in items if item.name})
        if partitions.count == 1 or not names:
            return await self._import_locked(items, room, _Terms(origin), {})
        name = self._locks.new_name()
        words = [(partitions.of(each), f"name {each}") for each in names]
        async with self._locks.of(words, name) as until:
            replies = await partitions.all("known", 0, *names)
            holders = {
                each: holder
                for each, ids in zip(names, zip(*replies, strict=True), strict=True)
                if (holder := max(ids))
            }
            return await self._import_locked(items, room, _Terms(origin, name, until), holders)

    async def _import_locked(
        self,
        items: Sequence[NewKey],
        room: Room | None,
        terms: _Terms,
        holders: dict[str, int],
    ) -> list[Reply]:
        """The same, where no other server gives these names to keys; `holders` has those that are taken."""
        replies: dict[int, Reply] = {}
        left = [*range(len(items))]
        several = self._partitions.count > 1
        while left:
            chunk: list[int] = []
            names: set[str] = set()
            for place in left:
                name = items[place].name
                if len(chunk) == _CHUNK or (several and name in names):
                    break  # whether the earlier item of this name gets it shows first
                chunk.append(place)
                if name:
                    names.add(name)
            left = left[len(chunk) :]
            taken = {place: holders[name] for place in chunk if (name := items[place].name) in holders}
            for place, holder in taken.items():
                replies[place] = await self._known(items[place].secret) or (_NAME_TAKEN, holder)
            adding = [place for place in chunk if place not in taken]
            found = await self._add([items[place] for place in adding], room, terms)
            for place, reply in zip(adding, found, strict=True):
                replies[place] = reply
                if several and (name := items[place].name) and reply[0] == 1:
                    holders[name] = reply[1]
        return [replies[place] for place in range(len(items))]

    async def _known(self, secret: str, partition: int | None = None) -> Reply:
        """What import.lua replies about a text that a key has; None if none has, by which one may still be named."""
        vault = self._partitions.vault
        assert vault is not None
        name = vault.name(secret)
        if partition is None:
            partition = self._partitions.of(secret)
        [found] = await self._partitions.call(partition, "known", (1, name))
        found = await self._partitions.followed(found, name)
        return None if not found[0] or found[4] else (0, *found[:4], found[5])

    async def _add(self, items: Sequence[NewKey], room: Room | None, terms: _Terms) -> list[Reply]:
        """What import.lua replies about each item, once nothing is in the way."""
        replies: list[Reply] = [None] * len(items)
        left = [*range(len(items))]
        forced: set[int] = set()  # whose aliases lead nowhere
        for attempt in range(_MOST_TRIES):
            sent = [items[place] for place in left]
            flags = ["1" if place in forced else "" for place in left]
            if room is None or not room.reservation:
                found = await self._add_without_reservation(sent, flags, terms, attempt)
            else:
                found = await self._send(sent, flags, room, terms, attempt)
            for place, reply in zip(left, found, strict=True):
                replies[place] = await self._settled(items[place], reply)
                if reply[0] == _ALIAS and replies[place] is None:
                    forced.add(place)
            left = [place for place in left if replies[place] is None]
            if not left:
                return replies
            if any(reply[0] == _LOCKED for reply in found):
                await asyncio.sleep(_PAUSE)
        raise StorageUnavailable("other servers import the same secrets; try again")

    async def _settled(self, item: NewKey, reply: Reply) -> Reply:
        """The reply about an item as the caller gets it; None if the script is to be called again."""
        if reply is None:
            raise StorageUnavailable("the reserved room has lapsed; repeat the import: what was added stays")
        if reply[0] == _LATE:
            raise StorageUnavailable("the import took too long; repeat it: what was added stays")
        if reply[0] == _ALIAS:
            return await self._known(item.secret, reply[1])
        return reply if reply[0] > _ALIAS else None

    async def _add_without_reservation(
        self, items: Sequence[NewKey], flags: Sequence[str], terms: _Terms, attempt: int
    ) -> list[Reply]:
        """Call import.lua, and once more, with room reserved, for the items that it had no room for.

        Near the limit that is all new ones: a partition may have more than its share, so that the others can't have
        theirs.
        """
        wanted, generator, count = self._wanted(items), self._generator, self._partitions.count
        is_ample = count == 1 or generator.has_ample_room(wanted)
        found = await self._send(
            items, flags, Room("", generator.limits if is_ample else [0] * count), terms, attempt
        )
        if lacking := [place for place, reply in enumerate(found) if reply is None]:
            some = [items[place] for place in lacking]
            async with self.room_for(self._wanted(some), is_ample=False) as room:
                again = await self._send(some, [flags[place] for place in lacking], room, terms, attempt)
            for place, reply in zip(lacking, again, strict=True):
                found[place] = reply
        return found

    async def _send(
        self,
        items: Sequence[NewKey],
        flags: Sequence[str],
        room: Room,
        terms: _Terms,
        attempt: int,
    ) -> list[Reply]:
        """One round of calls of import.lua. The reply about an item is None if there was no room."""
        partitions, poller, count = self._partitions, self._poller, self._partitions.count
        vault = partitions.vault
        assert vault is not None
        places: dict[int, list[int]] = {}
        words: dict[int, list[Word]] = {}
        # Others may be as fast: each attempt leaves more numbers out, so that one of them succeeds.
        keys = sum(item.seats or 1 for item in items)
        number = poller.id_number + 1 + (random.randrange(4 ** min(attempt, 8)) * keys if attempt else 0)  # noqa: S311
        poller.id_number = number + keys - 1
        for place, item in enumerate(items):
            partition = partitions.of(item.secret)
            if partition not in words:
                places[partition] = []
                words[partition] = [
                    partitions.life_us, count, partition, room.limits[partition], room.reservation, terms.origin,
                    terms.until, terms.locks, "",
                ]  # fmt: skip
            if is_odd(item.secret):
                partitions.has_odd_texts = True
                words[partition][_ODD] = "1"
            details, seats = details_of(item), item.seats or 1
            info = info_of(structs.replace(details, data=None))
            ids = range(number * count + partition + 1, (number + seats) * count + partition + 1, count)
            places[partition].append(place)
            words[partition] += (
                number,
                vault.name(item.secret),
                hint(item.secret),
                info,
                flags[place],
                seats,
                *(vault.seal(item.secret, details.data, id) for id in ids),
            )
            number += seats
        calls = [partitions.call(partition, "import", some) for partition, some in words.items()]
        replies: list[Reply] = [None] * len(items)
        for partition, found in zip(words, await all_of(calls), strict=True):
            if found and found[0][0] == _NUMBER:
                poller.id_number = max(poller.id_number, found[0][1])
            if found and found[0][0] in (_NUMBER, _LATE):
                found = [found[0]] * len(places[partition])  # noqa: PLW2901
            for place, reply in zip(places[partition], found, strict=False):
                replies[place] = reply
            added = zip(places[partition], found, strict=False)
            poller.generated(
                partition, sum(items[place].seats or 1 for place, reply in added if reply[0] == 1)
            )
        return replies

    # -- room

    @contextlib.asynccontextmanager
    async def room_for(self, wanted: Counter[int], *, is_ample: bool = True) -> AsyncIterator[Room]:
        """Room for so many keys in each partition, reserved if the pool is near its limit. Raises PoolFull."""
        generator, partitions = self._generator, self._partitions
        if not wanted or (is_ample and generator.has_ample_room(wanted)):
            yield Room("", generator.limits)
            return
        limits = dict(enumerate(generator.limits))
        async with self._only_filler():
            name = await self._reserve(wanted, limits)
            try:
                yield Room(name, limits)
            finally:
                for partition in wanted:
                    partitions.call(partition, "room", (name, 0))

    def _wanted(self, items: Sequence[NewKey]) -> Counter[int]:
        """How many keys the items are, by partition."""
        wanted: Counter[int] = Counter()
        for item in items:
            wanted[self._partitions.of(item.secret)] += item.seats or 1
        return wanted

    @contextlib.asynccontextmanager
    async def _only_filler(self) -> AsyncIterator[None]:
        """While this is held, no other server fills a partition beyond its share."""
        if self._partitions.count == 1:
            yield
            return
        async with self._locks.of([(0, _LOCKED_ROOM)], self._locks.new_name()):
            yield

    async def _reserve(self, wanted: Counter[int], limits: dict[int, int]) -> str:
        """Reserve room, and raise the limits of partitions that need more than their share. Raises PoolFull."""
        generator, poller, most = self._generator, self._poller, self._partitions.rules.max_keys
        while True:
            snapshot = await poller.snapshot()
            if snapshot.total + wanted.total() <= most:
                for partition, keys in wanted.items():
                    limits[partition] = max(generator.limits[partition], poller.totals[partition] + keys)
                name = generator.new_reservation()
                if await generator.reserve(wanted, name, limits):
                    return name
                await asyncio.sleep(_PAUSE * random.uniform(0.5, 1.5))  # noqa: S311 - no secret
            elif not snapshot.overdue:
                raise PoolFull(snapshot.total, wanted.total(), most)


def _run_without_repeats(items: Mapping[int, NewKey]) -> list[tuple[int, NewKey]]:
    """The first items, up to one whose secret is among them: it is a duplicate, unless the earlier one fails."""
    run: list[tuple[int, NewKey]] = []
    secrets: set[str] = set()
    for place, item in items.items():
        if item.secret in secrets:
            break
        secrets.add(item.secret)
        run.append((place, item))
    return run
