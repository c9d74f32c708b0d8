"""The pools in a Valkey as the source or the target of a move (moving.py).

Whether servers serve them is detected by their subscriptions. A server that has just lost that connection isn't
detected, so users are told to stop the servers first.

A text that was replaced while its key was leased names the key until the lease ends. It is looked up in the partition
of that text, so it is moved only if the key's new text is in the same one; and from a pool that is encrypted it can't
be moved, as only its digest is there. Its holder has the handle, and the number of the lease.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from msgspec import structs

from keypool.core.counters import COUNTERS
from keypool.core.errors import KeypoolError, SecretsKeyRequired, SettingsError, StartError
from keypool.core.handles import SECRET_BYTES
from keypool.core.history import PastLease
from keypool.core.keys import Key
from keypool.core.rare_events import RareEvent
from keypool.core.rules import DEFAULT_RULES
from keypool.engine import NOTE
from keypool.engine.durable.rows import StoredPool
from keypool.engine.sealing import WrongSecretsKey
from keypool.engine.valkey import registry
from keypool.engine.valkey.attempts import NOBODY, home_of, known_for
from keypool.engine.valkey.calls import ScriptClient
from keypool.engine.valkey.details import is_odd
from keypool.engine.valkey.holders import packed, stored_events
from keypool.engine.valkey.link import UNREACHABLE, Reply, Word
from keypool.engine.valkey.nodes import Nodes
from keypool.engine.valkey.opening import LAYOUT, MOVING, OLDER
from keypool.engine.valkey.partitions import partition_of
from keypool.engine.valkey.past import packed_of, past_lease_of
from keypool.engine.valkey.pools import PARTITIONS
from keypool.engine.valkey.records import Moved, key_of, words_of
from keypool.engine.valkey.registry import DRAINING, DRAINING_NOW, OPEN, Entry, Registry
from keypool.engine.valkey.scripts import KEYS, keys_of
from keypool.engine.valkey.url import parse, without_password
from keypool.engine.valkey.vault import Vault, new_vault, open_vault

_RARE = KEYS.index("rare")
_KEYS_A_CALL = 500  # which block Valkey for some 10 ms
_LEASES_A_CALL = 1000  # likewise

P = ParamSpec("P")
T = TypeVar("T")


def _with_place(
    method: Callable[Concatenate[ValkeyPlace, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[ValkeyPlace, P], Coroutine[Any, Any, T]]:
    """Turn the errors of a method into StartErrors that name the place."""

    @functools.wraps(method)
    async def run(self: ValkeyPlace, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await method(self, *args, **kwargs)
        except StartError:
            raise
        except KeypoolError as error:
            raise StartError(f"{self.place}: {error}") from None
        except UNREACHABLE as error:
            raise StartError(f"{self.place} can't be reached: {error}") from None

    return run


class _Pool:
    """One of the pools there."""

    def __init__(self, nodes: Nodes, number: int, partitions: int, vault: Vault | None) -> None:
        self.number = number
        self.namespace = registry.namespace(nodes.url.pool, number)
        self.partitions = partitions
        self.vault = vault and vault.of_pool(number)
        self.scripts = ScriptClient(nodes, self.namespace, partitions)

    def keys(self, partition: int) -> list[str]:
        """The names of a partition's Valkey keys."""
        return keys_of(self.namespace, partition, self.partitions)


class ValkeyPlace:
    """See the module, moving.Source and moving.Target. Made by `source` or `target`. All methods raise StartError."""

    unfinished = "run it again with --clear, which first deletes what was moved so far"

    def __init__(self, url: str, secrets_keys: Sequence[bytes]) -> None:
        self.place = without_password(url)
        try:
            self._url = parse(url)
        except ValueError as error:
            raise SettingsError(
                f"{self.place} is not a valid pool location ({error}): use valkey://HOST:PORT/DB"
            ) from None
        self.total = 0
        self.pools: list[StoredPool] = []
        self.last_pool = 0
        self.numbers: dict[int, dict[str, int]] = {}
        self.secret = b""
        self._secrets_keys = secrets_keys
        self._facts_key = f"{{{self._url.pool}}}:pool"
        self._pools_key = f"{{{self._url.pool}}}:pools"
        self._nodes = Nodes(self._url)
        self._vault: Vault | None = None
        self._pools: dict[int, _Pool] = {}

    @classmethod
    async def source(cls, url: str, secrets_keys: Sequence[bytes] = ()) -> Self:
        """Open a place with pools that are to be moved. Raises SettingsError for an invalid URL."""
        place = cls(url, secrets_keys)
        return await place._opened(place._open_as_source())

    @classmethod
    async def target(
        cls, url: str, partitions: int | None, *, clear: bool, secrets_keys: Sequence[bytes] = ()
    ) -> Self:
        """Open a place that has no pool, and mark it as being moved to. Raises SettingsError for an invalid URL.

        `clear` deletes what an interrupted move left there first.
        """
        place = cls(url, secrets_keys)
        return await place._opened(
            place._open_as_target(partitions or place._url.default_partitions, clear=clear)
        )

    async def _opened(self, opening: Coroutine[Any, Any, None]) -> Self:
        try:
            await opening
        except BaseException:
            await self.close()
            raise
        return self

    @_with_place
    async def _open_as_source(self) -> None:
        await self._nodes.connect()
        facts = await self._facts()
        if not facts:
            raise StartError(f"there is no pool in {self.place}")
        self._refuse_unfinished(facts)
        if facts["layout"] not in (*OLDER, str(LAYOUT)):
            raise StartError(f"the pool in {self.place} is of another version of keypool")
        self._vault = await open_vault(self._nodes, self._facts_key, self._secrets_keys)
        entries = await self._entries()
        await self._connect(int(facts["partitions"]), entries.values())
        self.pools = [
            StoredPool(
                entry.number, name, dict(entry.settings), entry.draining > OPEN, entry.draining > DRAINING
            )
            for name, entry in entries.items()
        ]
        self.last_pool = int(facts.get("pools_last", 0))
        self.total = await self.count()
        moved = {name: int(facts.get(f"moved_{name}", 0)) for name in ("last_id", "last_lease")}
        notes = {name: int(number) for name, number in facts.items() if name.startswith(NOTE)}
        self.numbers[0] = notes | await self._numbers(self._pools[0], moved)
        for entry in entries.values():
            if not entry.number:
                continue
            pool = self._pools[entry.number]
            moved = {
                "last_id": max(0, entry.base_id - 1) * pool.partitions,
                "last_lease": max(0, entry.base_tick - 1) * pool.partitions,
            }
            self.numbers[entry.number] = await self._numbers(pool, moved)
        self.secret = bytes.fromhex(facts.get("secret", "")) or os.urandom(SECRET_BYTES)

    @_with_place
    async def _open_as_target(self, partitions: int, *, clear: bool) -> None:
        await self._nodes.connect()
        facts = await self._facts()
        await self._connect(int(facts.get("partitions", partitions)), (await self._entries()).values())
        if clear and facts.get("layout") == str(MOVING):
            await self._clear()
        elif facts:
            self._refuse_unfinished(facts)
            raise StartError(
                f"there is a pool in {self.place} already: move to another ?pool=NAME or database"
            )
        if self._secrets_keys:
            self._vault = new_vault(self._secrets_keys)
        await self._connect(partitions, ())
        # HSETNX: fails if a server, or another migrate, has created a pool there meanwhile.
        if not await self._execute(self._facts_key, "HSETNX", "layout", MOVING):
            raise StartError(f"another pool was created in {self.place} in the meantime")
        await self._execute(self._facts_key, "HSET", "partitions", partitions)

    def _refuse_unfinished(self, facts: dict[str, str]) -> None:
        if facts["layout"] == str(MOVING):
            raise StartError(
                f"{self.place} has an incomplete pool: keypool migrate is running, or was interrupted; if so, run "
                "it again with --clear"
            )

    async def _connect(self, partitions: int, entries: Iterable[Entry]) -> None:
        """Connect to the pools. Raises StartError if a server subscribes to them."""
        for pool in self._pools.values():
            self._nodes.discard(pool.scripts)
        self._pools = {0: _Pool(self._nodes, 0, partitions, self._vault)}
        for entry in entries:
            if entry.number:
                self._pools[entry.number] = _Pool(self._nodes, entry.number, entry.partitions, self._vault)
        await self._nodes.connect()
        replies = await self._nodes.execute_on_all("PUBSUB", "NUMSUB", self._pools[0].keys(0)[-1])
        if sum(reply[1] for reply in replies):
            raise StartError(f"{self.place} is being served: stop its servers first")

    async def _clear(self) -> None:
        """Delete what an interrupted move has left. O(n), in a background thread of Valkey."""
        for pool in self._pools.values():
            for partition in range(pool.partitions):
                for name in pool.keys(partition):
                    await self._execute(name, "UNLINK")
                while (await pool.scripts.call(partition, "forget", (_LEASES_A_CALL,)))[0]:
                    pass
        await self._execute(self._pools_key, "DEL")
        await self._execute(self._facts_key, "DEL")

    # -- the source

    async def keys(self) -> AsyncIterator[tuple[int, list[Key]]]:
        """See moving.Source."""
        for pool in self._pools.values():
            for partition in range(pool.partitions):
                rank = 0
                while found := await self._move_out(pool, partition, rank):
                    rank += len(found)
                    yield pool.number, [self._key(pool, words) for words in found]

    async def history(self) -> AsyncIterator[tuple[int, list[PastLease]]]:
        """See moving.Source. The partitions of a pool are merged by the moments at which leases ended."""
        for pool in self._pools.values():
            waiting: list[list[PastLease]] = [[] for _ in range(pool.partitions)]  # the oldest last
            ranks = [0] * pool.partitions
            ended: list[PastLease] = []
            left = set(range(pool.partitions))
            while left:
                for partition in [number for number in left if not waiting[number]]:
                    waiting[partition], ranks[partition] = await self._history_out(
                        pool, partition, ranks[partition]
                    )
                    if not waiting[partition]:
                        left.discard(partition)
                if left:
                    ended.append(waiting[min(left, key=lambda number: waiting[number][-1].ended_at)].pop())
                if ended and (len(ended) == _LEASES_A_CALL or not left):
                    yield pool.number, ended
                    ended = []

    @_with_place
    async def _history_out(self, pool: _Pool, partition: int, rank: int) -> tuple[list[PastLease], int]:
        """The next leases of a partition, the oldest last, and the rank of those after."""
        while True:
            words = await pool.scripts.call(partition, "history_out", (rank, rank + _LEASES_A_CALL - 1))
            rank += len(words) // 2
            found = [
                past_lease_of(int(id), packed)
                for id, packed in zip(words[::2], words[1::2], strict=True)
                if packed
            ]
            if found or not words:
                return found[::-1], rank

    def _key(self, pool: _Pool, words: Reply) -> Key:
        try:
            return key_of(Moved(*words), pool.vault)
        except (ValueError, WrongSecretsKey) as error:
            raise StartError(f"{self.place}: {error}") from None

    @_with_place
    async def _move_out(self, pool: _Pool, partition: int, rank: int) -> Reply:
        return await pool.scripts.call(partition, "move_out", (rank, rank + _KEYS_A_CALL - 1))

    @_with_place
    async def events(self) -> dict[int, list[RareEvent]]:
        """See moving.Source."""
        events = {}
        for number, pool in self._pools.items():
            names = [pool.keys(partition)[_RARE] for partition in range(pool.partitions)]
            events[number] = stored_events([await self._execute(name, "LRANGE", 0, -1) for name in names])
        return events

    async def _numbers(self, pool: _Pool, moved: Mapping[str, int]) -> dict[str, int]:
        seconds, microseconds = await self._nodes.execute(self._facts_key, "TIME")
        numbers = {**dict.fromkeys(COUNTERS, 0), **moved}
        numbers["moment"] = int(seconds) * 1000 + int(microseconds) // 1000
        count = pool.partitions
        for partition in range(count):
            found = await self._execute(pool.keys(partition)[0], "HMGET", "id", "tick", *COUNTERS)
            number, tick, *counts = found
            if number is not None:
                numbers["last_id"] = max(numbers["last_id"], int(number) * count + partition + 1)
            if tick is not None:
                numbers["last_lease"] = max(numbers["last_lease"], int(tick) * count + partition)
            for name, added in zip(COUNTERS, counts, strict=True):
                numbers[name] += int(added or 0)
        return numbers

    # -- the target

    @_with_place
    async def define(self, pools: list[StoredPool], last_pool: int) -> None:
        """See moving.Target."""
        self.pools = pools
        for pool in pools:
            if pool.number:
                self._pools[pool.number] = _Pool(self._nodes, pool.number, PARTITIONS, self._vault)
        if pools:
            await self._write_entries({})
        await self._nodes.connect()
        await self._execute(self._facts_key, "HSET", "pools_last", last_pool, "pools_version", 1)

    async def _write_entries(self, bases: Mapping[int, tuple[int, int, int]]) -> None:
        """Write the registry; `bases` are born, base_tick and base_id of the pools, by number."""
        fields: dict[str, Word] = {}
        for pool in self.pools:
            assert pool.name is not None
            new = registry.new_entry(pool.settings, self._pools[pool.number].partitions)
            draining = DRAINING_NOW if pool.at_once else DRAINING if pool.draining else OPEN
            born, tick, id = bases.get(pool.number, (0, 0, 0))
            entry = structs.replace(
                new, number=pool.number, revision=1, born=born, base_tick=tick, base_id=id, draining=draining
            )
            fields[pool.name] = registry.packed(entry)
        await self._execute(self._pools_key, "HSET", *_flat(fields))

    @_with_place
    async def write(self, pool: int, keys: list[Key]) -> None:
        """See moving.Target."""
        to = self._pools[pool]
        if to.vault is None and any(key.details.imported for key in keys):
            raise StartError(f"{self.place}: {SecretsKeyRequired()}")
        calls: dict[int, list[list[Word]]] = {}
        for key in keys:
            partition = partition_of(key.text, to.partitions)
            former = key.details.former
            if former is not None and partition_of(former, to.partitions) != partition:
                key.details = structs.replace(key.details, former=None)
            calls.setdefault(partition, []).append(words_of(key, to.vault))
        await asyncio.gather(*(
            to.scripts.call(partition, "move_in", [word for words in some[at : at + _KEYS_A_CALL] for word in words])
            for partition, some in calls.items()
            for at in range(0, len(some), _KEYS_A_CALL)
        ))  # fmt: skip
        if to.partitions > 1:
            await asyncio.gather(*(self._keep_attempt(to, key) for key in keys if key.attempt is not None))
        if any(is_odd(key.text) for key in keys):
            await self._execute(to.keys(0)[0], "HINCRBY", "odd", 1)

    @_with_place
    async def write_history(self, pool: int, leases: list[PastLease]) -> None:
        """See moving.Target."""
        to = self._pools[pool]
        calls: dict[int, list[Word]] = {}
        for past in leases:
            # Where a purged key is looked for by its id; others in all partitions, as they were moved in.
            partition = (past.key_id - 1) % to.partitions
            calls.setdefault(partition, []).extend((past.key_id, past.lease, packed_of(past)))
        await asyncio.gather(*(
            to.scripts.call(partition, "history_in", words[at : at + 3 * _LEASES_A_CALL])
            for partition, words in calls.items()
            for at in range(0, len(words), 3 * _LEASES_A_CALL)
        ))  # fmt: skip

    async def _keep_attempt(self, pool: _Pool, key: Key) -> None:
        """Let the attempt of a held key be known in the pool (attempts.py)."""
        assert key.attempt is not None
        assert key.release_deadline is not None  # only a blocked key has an attempt
        left = known_for(max(0.0, key.release_deadline - time.time()))
        home = home_of(key.attempt, pool.partitions)
        await pool.scripts.call(home, "claim", (key.attempt, NOBODY, 0, left))

    @_with_place
    async def write_events(self, pool: int, events: list[RareEvent]) -> None:
        """See moving.Target. They are in the first partition then, wherever their keys are."""
        if events:
            await self._execute(self._pools[pool].keys(0)[_RARE], "RPUSH", *map(packed, events))

    @_with_place
    async def count(self) -> int:
        """See moving.Target."""
        names = [pool.keys(n)[1] for pool in self._pools.values() for n in range(pool.partitions)]
        return sum([await self._execute(name, "HLEN") for name in names])

    @_with_place
    async def finish(self, numbers: dict[int, dict[str, int]], secret: bytes) -> None:
        """See moving.Target."""
        seconds, microseconds = await self._nodes.execute(self._facts_key, "TIME")
        born = int(seconds) * 1_000_000 + int(microseconds)
        bases = {}
        for number, pool in self._pools.items():
            of_pool = numbers[number]
            counts = {name: of_pool.get(name, 0) for name in COUNTERS}
            await self._execute(pool.keys(0)[0], "HSET", *_flat(counts))
            # Or a server that opens the pool would forget what it doesn't know to be kept.
            kept = -(-self._history_leases(number) // pool.partitions)
            for partition in range(pool.partitions if kept else 0):
                await self._execute(pool.keys(partition)[0], "HSET", "history", kept)
            last_id, last_lease = of_pool.get("last_id", 0), of_pool.get("last_lease", 0)
            base_tick = last_lease // pool.partitions + 1 if last_lease else 0
            bases[number] = born, base_tick, last_id // pool.partitions + 1 if last_id else 0
        if self.pools:
            await self._write_entries(bases)
        default = numbers[0]
        facts: dict[str, Word] = {
            "secret": secret.hex(),
            "born": born,
            "base_tick": bases[0][1],
            "base_id": bases[0][2],
            "moved_last_id": default.get("last_id", 0),
            "moved_last_lease": default.get("last_lease", 0),
        }
        if self._vault is not None:
            facts["digests"] = self._vault.sealed_digests_key()
        notes = {name: number for name, number in default.items() if name.startswith(NOTE) and number}
        await self._execute(self._facts_key, "HSET", *_flat({**facts, **notes, "layout": LAYOUT}))

    def _history_leases(self, number: int) -> int:
        """How many leases a pool keeps, by its settings."""
        settings = {pool.number: pool.settings for pool in self.pools}.get(number, {})
        rules = DEFAULT_RULES.of_pool(settings) if number else DEFAULT_RULES.of_default(settings)
        return rules.history_leases

    async def close(self) -> None:
        """Disconnect."""
        await self._nodes.close()

    async def _facts(self) -> dict[str, str]:
        """The hash `{POOL}:pool` (see engine.py); empty if there is no pool."""
        flat = await self._execute(self._facts_key, "HGETALL")
        words = [word.decode("utf-8", "replace") for word in flat]  # `digests` is not text
        return dict(zip(words[::2], words[1::2], strict=True))

    async def _entries(self) -> dict[str, Entry]:
        found = await Registry(self._nodes, self._url.pool, 0).read()
        return {name: stored.entry for name, stored in found.items()}

    async def _execute(self, key: str, command: str, *words: Word) -> Reply:
        return await self._nodes.execute(key, command, key, *words)


def _flat(fields: Mapping[str, Word]) -> list[Word]:
    return [word for pair in fields.items() for word in pair]
