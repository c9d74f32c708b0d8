"""The registry of the pools in Valkey: one hash, `{POOL}:pools`, name -> entry (lua/pools.lua).

`default` stands in it once it was given settings that aren't flags; the rest about it is in engine.py.

A change of an entry is one script, which makes it only if the entry is still the one that the caller has seen. Every
change makes a larger version, which servers read with each heartbeat (presence.py): if it is another one than before,
they read the registry, so they know of every change after little more than a second.

A pool has a number that no other one ever has, which is in the names of its partitions' keys: `{POOL/3:0}:meta` and so
on, so a pool that is made again under the name of a deleted one meets nothing of that. Its settings are stored as they
were given, so settings that weren't given have the defaults of the version that serves it.
"""

from __future__ import annotations

import msgspec

from keypool.core.errors import StorageUnavailable, TooManyPools
from keypool.core.pace import Pace
from keypool.core.rules import Settings
from keypool.engine.valkey.link import Reply
from keypool.engine.valkey.nodes import Nodes
from keypool.engine.valkey.scripts import text_of

OPEN, DRAINING, DRAINING_NOW = 0, 1, 2
"""Whether a pool is being emptied for good, and whether held keys are purged, too."""

_CHANGED, _OTHER, _TOO_MANY = 1, 0, -1


class Entry(msgspec.Struct, array_like=True, frozen=True):
    """What the registry has about a pool. Fields may be added at the end only."""

    number: int
    revision: int
    """The version of the registry at the latest change of this entry."""
    partitions: int
    born: int
    """As `base_tick` and `base_id`: those of the pool `default` are in engine.py."""
    base_tick: int
    base_id: int
    draining: int
    actor: str
    """Who drains it; empty if nobody does."""
    json: str
    """The settings that the pool was given."""

    @property
    def settings(self) -> Settings:
        """The settings that the pool was given."""
        return _decode_settings(self.json)


class Stored(msgspec.Struct, frozen=True):
    """An entry, and how it is stored."""

    entry: Entry
    packed: bytes


_decode = msgspec.msgpack.Decoder(Entry).decode
_decode_settings = msgspec.json.Decoder(dict[str, int | float | Pace | None]).decode
_encode = msgspec.msgpack.Encoder().encode


def new_entry(settings: Settings, partitions: int, base_tick: int = 0, base_id: int = 0) -> Entry:
    """The entry of a pool that is not there yet: the registry gives it its number and its moment of birth."""
    return Entry(0, 0, partitions, 0, base_tick, base_id, OPEN, "", json_of(settings))


def packed(entry: Entry) -> bytes:
    """An entry as it is stored; for keypool migrate, as servers leave that to the script."""
    return _encode(entry)


def json_of(settings: Settings) -> str:
    """Settings as they are stored."""
    return msgspec.json.encode(dict(settings)).decode()


def namespace(pool: str, number: int) -> str:
    """What the names of a pool's Valkey keys begin with, in a hash tag. `pool` is that of the URL."""
    return f"{pool}/{number}" if number else pool


class Registry:
    """See the module. All coroutines raise OSError, ReplyError or ConnectionLost, and must run in a task."""

    def __init__(self, nodes: Nodes, pool: str, born: int) -> None:
        self._nodes = nodes
        self._born = born
        self._keys = (f"{{{pool}}}:pool", f"{{{pool}}}:pools")

    async def read(self) -> dict[str, Stored]:
        """All entries by name. O(pools)."""
        flat = await self._nodes.execute(self._keys[1], "HGETALL", self._keys[1])
        return {name.decode(): _stored(packed) for name, packed in zip(flat[::2], flat[1::2], strict=True)}

    async def get(self, name: str) -> Stored | None:
        """One entry. O(1)."""
        packed = await self._nodes.execute(self._keys[1], "HGET", self._keys[1], name)
        return None if packed is None else _stored(packed)

    async def put(
        self, name: str, seen: Stored | None, entry: Entry, max_pools: int
    ) -> tuple[bool, Stored | None]:
        """Store an entry in place of the one that was seen. Returns whether it did, and the entry that is there now.

        Number and revision of `entry` don't matter. Raises TooManyPools. O(1).
        """
        fields = _encode(msgspec.structs.astuple(entry)[2:])
        outcome, found = await self._call(name, seen, fields, max_pools)
        if outcome == _TOO_MANY:
            raise TooManyPools(max_pools)
        return outcome == _CHANGED, _stored(found) if found else None

    async def remove(self, name: str, seen: Stored) -> tuple[bool, Stored | None]:
        """Remove the entry that was seen; the same answer. O(1)."""
        outcome, found = await self._call(name, seen, b"", 0)
        return outcome == _CHANGED, _stored(found) if found else None

    async def _call(self, name: str, seen: Stored | None, fields: bytes, max_pools: int) -> Reply:
        packed = b"" if seen is None else seen.packed
        reply = await self._nodes.execute(
            self._keys[0],
            "EVAL",
            text_of("pools"),
            2,
            *self._keys,
            self._born,
            name,
            packed,
            fields,
            max_pools,
        )
        if reply[0] not in (_CHANGED, _OTHER, _TOO_MANY):
            raise StorageUnavailable("the pools aren't in Valkey any more")
        return reply


def _stored(packed: bytes) -> Stored:
    return Stored(_decode(packed), packed)
