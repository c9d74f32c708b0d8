"""A pool in Valkey as the source or the target of a move (moving.py).

Whether servers serve the pool is detected by their subscriptions. A server that has just lost that connection isn't
detected, so users are told to stop the servers first.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from keypool.core.counters import COUNTERS
from keypool.core.errors import KeypoolError, SettingsError, StartError
from keypool.core.handles import SECRET_BYTES
from keypool.core.keys import Key
from keypool.engine import NOTE
from keypool.engine.valkey.attempts import NOBODY, home_of, known_for
from keypool.engine.valkey.calls import ScriptClient
from keypool.engine.valkey.link import UNREACHABLE, Reply, Word
from keypool.engine.valkey.nodes import Nodes
from keypool.engine.valkey.opening import LAYOUT, MOVING, OLDER
from keypool.engine.valkey.partitions import partition_of
from keypool.engine.valkey.records import key_of, record_of
from keypool.engine.valkey.scripts import keys_of
from keypool.engine.valkey.url import parse, without_password

_KEYS_A_CALL = 500  # which block Valkey for some 10 ms

P = ParamSpec("P")
T = TypeVar("T")


def _with_place(
    method: Callable[Concatenate[ValkeyPool, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[ValkeyPool, P], Coroutine[Any, Any, T]]:
    """Turn the errors of a method into StartErrors that name the place."""

    @functools.wraps(method)
    async def run(self: ValkeyPool, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await method(self, *args, **kwargs)
        except StartError:
            raise
        except KeypoolError as error:
            raise StartError(f"{self.place}: {error}") from None
        except UNREACHABLE as error:
            raise StartError(f"{self.place} can't be reached: {error}") from None

    return run


class ValkeyPool:
    """See the module, moving.Source and moving.Target. Made by `source` or `target`. All methods raise StartError."""

    unfinished = "run it again with --clear, which first deletes what was moved so far"

    def __init__(self, url: str) -> None:
        self.place = without_password(url)
        try:
            self._url = parse(url)
        except ValueError as error:
            raise SettingsError(
                f"{self.place} is not a valid pool location ({error}): use valkey://HOST:PORT/DB"
            ) from None
        self.total = 0
        self.numbers: dict[str, int] = {}
        self.secret = b""
        self._facts_key = f"{{{self._url.pool}}}:pool"
        self._partitions = 0
        self._nodes = Nodes(self._url)
        self._client: ScriptClient | None = None

    @classmethod
    async def source(cls, url: str) -> Self:
        """Open a pool that is to be moved. Raises SettingsError for an invalid URL."""
        pool = cls(url)
        return await pool._opened(pool._open_as_source())

    @classmethod
    async def target(cls, url: str, partitions: int | None, *, clear: bool) -> Self:
        """Open a place that has no pool, and mark it as being moved to. Raises SettingsError for an invalid URL.

        `clear` deletes what an interrupted move left there first.
        """
        pool = cls(url)
        return await pool._opened(
            pool._open_as_target(partitions or pool._url.default_partitions, clear=clear)
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
        await self._connect(int(facts["partitions"]))
        self.total = await self.count()
        self.numbers = await self._numbers(facts)
        self.secret = bytes.fromhex(facts.get("secret", "")) or os.urandom(SECRET_BYTES)

    @_with_place
    async def _open_as_target(self, partitions: int, *, clear: bool) -> None:
        await self._nodes.connect()
        facts = await self._facts()
        await self._connect(int(facts.get("partitions", partitions)))
        if clear and facts.get("layout") == str(MOVING):
            await self._clear()
            await self._connect(partitions)
        elif facts:
            self._refuse_unfinished(facts)
            raise StartError(
                f"there is a pool in {self.place} already: move to another ?pool=NAME or database"
            )
        # HSETNX: fails if a server, or another migrate, has created a pool there meanwhile.
        if not await self._execute(self._facts_key, "HSETNX", "layout", MOVING):
            raise StartError(f"another pool was created in {self.place} in the meantime")
        await self._execute(self._facts_key, "HSET", "partitions", self._partitions)

    def _refuse_unfinished(self, facts: dict[str, str]) -> None:
        if facts["layout"] == str(MOVING):
            raise StartError(
                f"{self.place} has an incomplete pool: keypool migrate is running, or was interrupted; if so, run "
                "it again with --clear"
            )

    async def _connect(self, partitions: int) -> None:
        """Connect to a pool of `partitions`. Raises StartError if a server subscribes to it."""
        self._partitions = partitions
        if self._client is not None:
            self._nodes.discard(self._client)
        self._client = ScriptClient(self._nodes, self._url.pool, partitions)
        await self._nodes.connect()
        replies = await self._nodes.execute_on_all("PUBSUB", "NUMSUB", self._keys(0)[-1])
        if sum(reply[1] for reply in replies):
            raise StartError(f"{self.place} is being served: stop its servers first")

    async def _clear(self) -> None:
        """Delete what an interrupted move has left. O(n), in a background thread of Valkey."""
        for partition in range(self._partitions):
            for name in self._keys(partition):
                await self._execute(name, "UNLINK")
        await self._execute(self._facts_key, "DEL")

    async def keys(self) -> AsyncIterator[list[Key]]:
        """See moving.Source."""
        for partition in range(self._partitions):
            rank = 0
            while found := await self._move_out(partition, rank):
                rank += len(found)
                yield [self._key(words) for words in found]

    def _key(self, words: Reply) -> Key:
        text, attempt, packed = words
        try:
            return key_of(text.decode(), attempt, packed)
        except ValueError as error:
            raise StartError(f"{self.place}: {error}") from None

    @_with_place
    async def _move_out(self, partition: int, rank: int) -> Reply:
        return await self._scripts.call(partition, "move_out", (rank, rank + _KEYS_A_CALL - 1))

    @_with_place
    async def write(self, keys: list[Key]) -> None:
        """See moving.Target."""
        words: dict[int, list[Word]] = {}
        for key in keys:
            some = words.setdefault(partition_of(key.text, self._partitions), [])
            some += (key.text, key.attempt or b"", record_of(key))
        step = 3 * _KEYS_A_CALL
        await asyncio.gather(*(
            self._scripts.call(partition, "move_in", some[at : at + step])
            for partition, some in words.items()
            for at in range(0, len(some), step)
        ))  # fmt: skip
        if self._partitions > 1:
            await asyncio.gather(*(self._keep_attempt(key) for key in keys if key.attempt is not None))

    async def _keep_attempt(self, key: Key) -> None:
        """Let the attempt of a held key be known in the pool (attempts.py)."""
        assert key.attempt is not None
        assert key.release_deadline is not None  # only a blocked key has an attempt
        left = known_for(max(0.0, key.release_deadline - time.time()))
        home = home_of(key.attempt, self._partitions)
        await self._scripts.call(home, "claim", (key.attempt, NOBODY, 0, left))

    @_with_place
    async def count(self) -> int:
        """See moving.Target."""
        return sum([await self._execute(self._keys(n)[1], "HLEN") for n in range(self._partitions)])

    @_with_place
    async def finish(self, numbers: dict[str, int], secret: bytes) -> None:
        """See moving.Target."""
        counts = {name: numbers.get(name, 0) for name in COUNTERS}
        await self._execute(self._keys(0)[0], "HSET", *_flat(counts))
        seconds, microseconds = await self._nodes.execute(self._facts_key, "TIME")
        last_id, last_lease = numbers.get("last_id", 0), numbers.get("last_lease", 0)
        facts: dict[str, Word] = {
            "secret": secret.hex(),
            "born": int(seconds) * 1_000_000 + int(microseconds),
            "base_tick": last_lease // self._partitions + 1 if last_lease else 0,
            "base_id": last_id // self._partitions + 1 if last_id else 0,
            "moved_last_id": last_id,
            "moved_last_lease": last_lease,
            "layout": LAYOUT,
        }
        notes = {name: number for name, number in numbers.items() if name.startswith(NOTE) and number}
        await self._execute(self._facts_key, "HSET", *_flat(facts | notes))

    async def close(self) -> None:
        """Disconnect."""
        await self._nodes.close()

    async def _facts(self) -> dict[str, str]:
        """The hash `{POOL}:pool` (see engine.py); empty if there is no pool."""
        flat = [word.decode() for word in await self._execute(self._facts_key, "HGETALL")]
        return dict(zip(flat[::2], flat[1::2], strict=True))

    async def _numbers(self, facts: dict[str, str]) -> dict[str, int]:
        seconds, microseconds = await self._nodes.execute(self._facts_key, "TIME")
        numbers = dict.fromkeys(COUNTERS, 0)
        numbers |= {name: int(facts.get(f"moved_{name}", 0)) for name in ("last_id", "last_lease")}
        numbers |= {name: int(number) for name, number in facts.items() if name.startswith(NOTE)}
        numbers["moment"] = int(seconds) * 1000 + int(microseconds) // 1000
        for partition in range(self._partitions):
            found = await self._execute(self._keys(partition)[0], "HMGET", "id", "tick", *COUNTERS)
            number, tick, *counts = found
            if number is not None:
                numbers["last_id"] = max(numbers["last_id"], int(number) * self._partitions + partition + 1)
            if tick is not None:
                lease = int(tick) * self._partitions + partition
                numbers["last_lease"] = max(numbers["last_lease"], lease)
            for name, count in zip(COUNTERS, counts, strict=True):
                numbers[name] += int(count or 0)
        return numbers

    @property
    def _scripts(self) -> ScriptClient:
        assert self._client is not None
        return self._client

    def _keys(self, partition: int) -> list[str]:
        return keys_of(self._url.pool, partition, self._partitions)

    async def _execute(self, key: str, command: str, *words: Word) -> Reply:
        return await self._nodes.execute(key, command, key, *words)


def _flat(fields: Mapping[str, Word]) -> list[Word]:
    return [word for pair in fields.items() for word in pair]
