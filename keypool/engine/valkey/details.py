"""What operators write about keys, and other texts for keys: changes of a record that are made here, not in a script.

Text and data are sealed, so no script can change them. A change reads the record, and stores a new one unless it was
changed meanwhile (lua/change.lua); then it is made again.

A name is unique in its pool, and a text too. With one partition, the script sees to that. With several, each text has a
partition that knows it, and each name one that locks it (lua/lock.lua):

    a name   is locked, then looked for in all partitions, then given; the lock lapses by itself if this server dies
    a text   is locked in its partition; an alias there leads to the partition of the key that is to get it (a key stays
             where its id is); then the key gets it. An alias that leads to no key with this text, as a server died, is
             as good as none. So a text is found in one call if it is where it belongs, in three if it was replaced

A script that gives a name or a text does nothing after the moment until which its caller's locks hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from msgspec import structs

from keypool.core.answers import KeyPatch, Ref, Row
from keypool.core.details import patched
from keypool.core.errors import (
    NameTaken,
    PoolFull,
    SecretExists,
    SecretsKeyRequired,
    StorageUnavailable,
    UnknownKey,
)
from keypool.core.keys import MAX_NAME, Details, hint
from keypool.engine.valkey.calls import all_of
from keypool.engine.valkey.link import Word
from keypool.engine.valkey.pages import ListedKey, row_of, text_in
from keypool.engine.valkey.partitions import Partitions
from keypool.engine.valkey.vault import details_in, info_of

LOCK_MS = 10_000
"""Milliseconds after which a lock lapses."""
LOCKED_US = 4_000_000
"""Microseconds for which whoever locked something goes by it, as the clocks of two primaries may differ."""

_SEARCHED = 1000  # keys with the same hint, or the same beginning, that a search looks at
_PAUSE = 0.02  # seconds before something that another server has locked is tried again
_MOST_TRIES = 100
_ODD = re.compile(r"(?:id|h):")
_ID = re.compile(r"id:([1-9][0-9]{0,15})", re.ASCII)


class FoundKey(NamedTuple):
    """What get.lua replies about a key."""

    row: ListedKey
    sealed: bytes
    """Text and data, encrypted; empty if they are in clear."""
    seats: list[int]
    """The ids of all seats of its secret; empty if it never had more than one."""


Find = Callable[[Ref], Awaitable[tuple[FoundKey, float]]]


def is_odd(text: str) -> bool:
    """Whether a text looks like an id or a handle. O(1)."""
    return _ODD.match(text) is not None


class Room(NamedTuple):
    """Room that is reserved, and how many keys each partition may hold; without a name as long as there is plenty."""

    reservation: str
    limits: Sequence[int] | Mapping[int, int]


class Adder(Protocol):
    """What adding seats needs of importing.py."""

    def room_for(
        self, wanted: Counter[int], *, is_ample: bool = True
    ) -> contextlib.AbstractAsyncContextManager[Room]:
        """Room for so many keys in each partition. Raises PoolFull."""
        ...

    def next_number(self, count: int) -> int:
        """The first of so many numbers for ids, one after the other, beyond all that this server knows."""
        ...

    def added(self, partition: int, count: int) -> None:
        """Take note that a partition has so many keys more."""
        ...


class Locks:
    """Locks of words in the partitions that are theirs. `server` is this server's name in Valkey."""

    def __init__(self, partitions: Partitions, server: str) -> None:
        self._partitions = partitions
        self._server = server
        self._numbers = itertools.count(1)

    def new_name(self) -> str:
        """A name for locks that are held together."""
        return f"{self._server}.{next(self._numbers)}"

    @contextlib.asynccontextmanager
    async def of(self, words: Iterable[tuple[int, Word]], name: str) -> AsyncIterator[int]:
        """Hold locks of words (partition, word), all of them; the moment until which they hold, 0 without any.

        Waits for others that hold one, for a few seconds. Raises StorageUnavailable.
        """
        by_partition: dict[int, list[Word]] = {}
        for partition, word in words:
            by_partition.setdefault(partition, []).append(word)
        until = 0
        try:
            for _ in range(_MOST_TRIES):
                calls = [
                    self._partitions.call(partition, "lock", (name, LOCK_MS, LOCKED_US, *some))
                    for partition, some in by_partition.items()
                ]
                moments = [moment for [moment] in await all_of(calls)]
                until = min(moments, default=0)
                if all(moments):
                    break
                self._unlock(by_partition, name)
                await asyncio.sleep(_PAUSE)
            else:
                raise StorageUnavailable("another server is about to give the same name or secret; try again")
            yield until
        finally:
            self._unlock(by_partition, name)

    def _unlock(self, by_partition: dict[int, list[Word]], name: str) -> None:
        for partition, some in by_partition.items():
            self._partitions.call(partition, "lock", (name, 0, 0, *some))


class Editor:
    """See the module. `find` returns what get.lua replies about a key, and how old it is."""

    def __init__(self, partitions: Partitions, locks: Locks, find: Find) -> None:
        self._partitions = partitions
        self._locks = locks
        self._find = find
        self.adder: Adder
        """Set by the engine: importing.py needs this in turn."""

    def read(self, found: FoundKey) -> tuple[str, Details]:
        """Text and details of a key."""
        details = details_in(found.row.info)
        if not found.sealed:
            return text_in(found.row.text), details
        assert self._partitions.vault is not None
        text, data = self._partitions.vault.open(found.sealed, found.row.id)
        return text, structs.replace(details, data=data)

    # -- changes

    async def update(self, ref: Ref, patch: KeyPatch, origin: Word, room: Room | None = None) -> Row:
        """Change name, labels, data or the number of seats. O(seats * log n), O(partitions) for a name.

        `room` is what the caller has reserved for more seats. Raises NameTaken, PoolFull, and as `find`.
        """
        is_ample = True
        for _ in range(_MOST_TRIES):
            found, _ = await self._find(ref)
            more = 0 if patch.seats is None else patch.seats - max(1, len(found.seats))
            wanted: Counter[int] = Counter()
            if more > 0 and room is None:
                partition, _ = await self._partitions.name_of(found.row.id)
                wanted[partition] = more
            # Room first, as a refusal changes nothing.
            async with self.adder.room_for(wanted, is_ample=is_ample) as reserved:
                changed = await self._update(found, patch, origin)
                if changed is not None and patch.seats is not None:
                    changed = await self._set_seats(changed.id, patch.seats, origin, room or reserved)
                    if changed is None and room is not None:
                        raise PoolFull(self._partitions.rules.max_keys, more, self._partitions.rules.max_keys)
            if changed is not None:
                return changed
            is_ample = False
        raise StorageUnavailable("the key was changed again and again; try again")

    async def changed(self, id: int, patch: KeyPatch, origin: Word, room: Room | None) -> list[int]:
        """The same. Returns the ids of all seats."""
        shown = await self.update(id, patch, origin, room)
        found, _ = await self._find(shown.id)
        return found.seats or [found.row.id]

    async def _update(self, found: FoundKey, patch: KeyPatch, origin: Word) -> Row | None:
        """Change name, labels or data of a key with this row. None if it was changed meanwhile."""
        text, details = self.read(found)
        new = patched(details, patch)
        is_sealed_anew = new.data != details.data or self._may_be_mixed(found)
        words = self._words(found, text, text, new, is_sealed_anew=is_sealed_anew)
        others = self._sealed_others(found, text, new, is_sealed_anew=is_sealed_anew)
        gets_name = new.name is not None and new.name != details.name
        async with self._name_held(new.name if gets_name else None, found.row.id) as until:
            return await self._change(found.row.id, (*words, "", origin, "", until, "", *others))

    async def _set_seats(self, id: int, count: int, origin: Word, room: Room) -> Row | None:
        """Call set_seats.lua, until the seats that it adds are sealed for their ids. None if there is no room."""
        partitions, vault = self._partitions, self._partitions.vault
        number = 0
        for _ in range(_MOST_TRIES):
            found, _ = await self._find(id)
            text, details = self.read(found)
            partition, name = await partitions.name_of(found.row.id)
            more = max(0, count - max(1, len(found.seats)))
            words: list[Word] = [
                found.sealed, count, partitions.life_us, partitions.count, partition,
                room.limits[partition], room.reservation, origin,
            ]  # fmt: skip
            number = max(number, self.adder.next_number(more))
            for each in range(number, number + more):
                sealed: Word = ""
                if vault is not None and found.sealed:
                    sealed = vault.seal(text, details.data, each * partitions.count + partition + 1)
                words += (each, sealed)
            call = partitions.call(partition, "set_seats", (name, *words))
            done, *reply = await call
            if done == 1:
                self.adder.added(partition, more)
                return row_of(ListedKey(*reply[0]), call.age(), partitions.rules.forget_seconds)
            if done == b"full":
                return None
            if done == b"number":
                number = reply[0] + 1
            elif done != b"changed":
                raise UnknownKey
        raise StorageUnavailable("the key was changed again and again; try again")

    def _may_be_mixed(self, found: FoundKey) -> bool:
        """Whether some seats of a key may be in clear and others not, which mustn't get the same member then."""
        vault = self._partitions.vault
        return bool(found.seats) and vault is not None and vault.may_have_clear

    def _sealed_others(
        self, found: FoundKey, text: str, details: Details, *, is_sealed_anew: bool
    ) -> list[Word]:
        """The words of change.lua about the other seats."""
        vault, words = self._partitions.vault, list[Word]()
        for id in found.seats:
            if id != found.row.id:
                anew = vault is not None and (is_sealed_anew or not found.sealed)
                words += (id, vault.seal(text, details.data, id) if vault is not None and anew else "")
        return words

    async def replace(self, ref: Ref, secret: str, origin: Word) -> Row:
        """Give a key another text. O(log n). Raises SecretExists, SecretsKeyRequired, and as `find`."""
        partitions, vault = self._partitions, self._partitions.vault
        if vault is None:
            raise SecretsKeyRequired
        for _ in range(_MOST_TRIES):
            found, _ = await self._find(ref)
            text, details = self.read(found)
            if secret == text:
                is_sealed_anew = self._may_be_mixed(found)
                words = self._words(found, text, text, details, is_sealed_anew=is_sealed_anew)
                others = self._sealed_others(found, text, details, is_sealed_anew=is_sealed_anew)
                changed = await self._change(found.row.id, (*words, "replace", origin, "", 0, "", *others))
            else:
                details = structs.replace(details, imported=True)
                words = self._words(found, text, secret, details, is_sealed_anew=True)
                others = self._sealed_others(found, secret, details, is_sealed_anew=True)
                async with self._text_held(secret, found.row.id) as until:
                    odd = "1" if is_odd(secret) else ""
                    partitions.has_odd_texts |= bool(odd)
                    changed = await self._change(
                        found.row.id, (*words, "replace", origin, vault.member(text), until, odd, *others)
                    )
            if changed is not None:
                return changed
        raise StorageUnavailable("the key was changed again and again; try again")

    def _words(
        self, found: FoundKey, text: str, new_text: str, details: Details, *, is_sealed_anew: bool
    ) -> tuple[Word, ...]:
        """The words of change.lua about what is stored now, and what is to be stored."""
        vault, sealed, info = self._partitions.vault, found.sealed, found.row.info
        if vault is None:
            return sealed, info, text, "", "", info_of(details)
        member = found.row.text if sealed and text == new_text else vault.name(new_text)
        anew: tuple[Word, Word] = "", ""
        if is_sealed_anew or not sealed:
            anew = vault.seal(new_text, details.data, found.row.id), hint(new_text)
        return sealed, info, member, *anew, info_of(structs.replace(details, data=None))

    async def _change(self, id: int, words: tuple[Word, ...]) -> Row | None:
        """Call change.lua. None if the key was changed meanwhile, or the locks have lapsed."""
        partition, name = await self._partitions.name_of(id)
        call = self._partitions.call(partition, "change", (name, *words))
        done, *more = await call
        if done == 1:
            return row_of(ListedKey(*more[0]), call.age(), self._partitions.rules.forget_seconds)
        if done == b"name":
            raise NameTaken(more[0])
        if done == b"text":
            raise SecretExists(more[0])
        if done == 0:
            raise UnknownKey
        return None

    # -- names and texts that only one key may have

    @contextlib.asynccontextmanager
    async def _name_held(self, name: str | None, id: int) -> AsyncIterator[int]:
        """Make sure that no key but this one gets the name meanwhile. Raises NameTaken."""
        partitions = self._partitions
        if name is None or partitions.count == 1:
            yield 0
            return
        async with self._locks.of([(partitions.of(name), f"name {name}")], self._locks.new_name()) as until:
            for [holder] in await partitions.all("known", 0, name):
                if holder not in (0, id):
                    raise NameTaken(holder)
            yield until

    @contextlib.asynccontextmanager
    async def _text_held(self, text: str, id: int) -> AsyncIterator[int]:
        """Make sure that no other key gets the text meanwhile, and let it lead to this key. Raises SecretExists."""
        partitions, vault = self._partitions, self._partitions.vault
        assert vault is not None
        if partitions.count == 1:
            yield 0
            return
        home, _ = await partitions.name_of(id)
        there = partitions.of(text)
        member, name = vault.member(text), vault.name(text)
        async with self._locks.of([(there, member)], self._locks.new_name()) as until:
            [known] = await partitions.call(there, "known", (1, name))
            known = await partitions.followed(known, name)
            if known[0] not in (0, id) and not known[4]:
                raise SecretExists(known[0])
            await partitions.call(there, "alias", ("" if there == home else home, member))
            try:
                yield until
            except BaseException:
                partitions.call(there, "alias", ("", member))
                raise

    # -- searching

    async def find(self, text: str) -> Row:
        """The row of the key with this text, id, name, or hint. O(partitions * log n). Raises UnknownKey."""
        forget_seconds = self._partitions.rules.forget_seconds
        refs: list[Ref] = [text]
        if written := _ID.fullmatch(text):
            refs.append(int(written[1]))
        for ref in refs:
            with contextlib.suppress(UnknownKey):
                known, age = await self._find(ref)
                return row_of(known.row, age, forget_seconds)
        if len(text) > MAX_NAME:
            raise UnknownKey  # neither a name nor a hint; and it may be a secret, which Valkey must not see
        calls = [
            self._partitions.call(partition, "search", (text, _SEARCHED))
            for partition in range(self._partitions.count)
        ]
        found = [
            [(row and ListedKey(*row), call.age()) for row in rows]
            for call, rows in zip(calls, await all_of(calls), strict=True)
        ]
        for kind in zip(*found, strict=True):
            rows = [(row, age) for row, age in kind if row]
            if rows:
                row, age = min(rows, key=lambda each: each[0].id)
                return row_of(row, age, forget_seconds)
        raise UnknownKey
