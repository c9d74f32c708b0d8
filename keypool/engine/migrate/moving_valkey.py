"""A pool in Valkey as the source or the target of a move (moving.py).

That servers serve it is seen by the channels that each of them listens on; what is served all the same meanwhile,
through a connection that was just lost, say, is not seen: stop the servers first.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Any, Self

from keypool.core.errors import KeypoolError, SettingsError, StartError
from keypool.engine import NOTE
from keypool.engine.durable.datafile import Row
from keypool.engine.valkey import opening as valkey_open
from keypool.engine.valkey.link import Lost, Measured, Reply, ReplyError
from keypool.engine.valkey.look import COUNTERS
from keypool.engine.valkey.nodes import Nodes
from keypool.engine.valkey.scripts import keys_of
from keypool.engine.valkey.url import parse, without_password

LAYOUT, MOVING = str(valkey_open.LAYOUT), str(valkey_open.MOVING)

_AT_ONCE = 500  # keys in one call of a script: some 10 ms in which Valkey does nothing else


@contextlib.contextmanager
def _naming(place: str) -> Iterator[None]:
    """Have what went wrong there be a StartError that names the place."""
    try:
        yield
    except KeypoolError as error:
        raise StartError(f"{place}: {error}") from None
    except (OSError, ReplyError, Lost) as error:
        raise StartError(f"{place} can't be asked: {error}") from None


class _Pool:
    """A pool's names, and the way to it. All raise StartError."""

    def __init__(self, url: str) -> None:
        try:
            self.url = parse(url)
        except ValueError as error:
            shown = without_password(url)
            raise SettingsError(
                f"{shown} is no place of a pool ({error}): valkey://HOST:PORT/DB is"
            ) from None
        self.place = without_password(url)
        self.facts_key = f"{{{self.url.pool}}}:pool"
        self.partitions = 0
        self._nodes = Nodes(self.url, Measured())

    async def connect(self) -> None:
        """Before all else."""
        with _naming(self.place):
            await self._nodes.open()

    async def ask(self, key: str, *words: str | int) -> Reply:
        """The reply to a command about a key."""
        with _naming(self.place):
            return await self._nodes.ask(key, *words)

    async def facts(self) -> dict[str, str]:
        """What the pool's own hash says; nothing if there is no pool."""
        flat = await self.ask(self.facts_key, "HGETALL", self.facts_key)
        words = [word.decode() for word in flat]
        return dict(zip(words[::2], words[1::2], strict=True))

    async def have(self, partitions: int) -> None:
        """So many partitions are there to be called."""
        self.partitions = partitions
        with _naming(self.place):
            await self._nodes.set_partitions(partitions)

    def meta(self, partition: int) -> str:
        """The name of a partition's meta hash."""
        return keys_of(self.url.pool, partition, self.partitions)[0]

    async def call(self, partition: int, script: str, *words: str | int) -> Reply:
        """A script's answer."""
        with _naming(self.place):
            return await self._nodes.call(partition, script, words)

    async def call_all(self, calls: list[tuple[int, str, list[str | int]]]) -> None:
        """Run several at once."""
        with _naming(self.place):
            await asyncio.gather(*(self._nodes.call(*call) for call in calls))

    async def count(self) -> int:
        """Keys that are there."""
        total = 0
        for partition in range(self.partitions):
            records = keys_of(self.url.pool, partition, self.partitions)[1]
            total += await self.ask(records, "HLEN", records)
        return total

    async def refuse_if_served(self) -> None:
        """Raise StartError if some server listens for freed keys."""
        channel = keys_of(self.url.pool, 0, self.partitions)[-1]
        with _naming(self.place):
            replies = await self._nodes.everywhere("PUBSUB", "NUMSUB", channel)
        if sum(reply[1] for reply in replies):
            raise StartError(f"{self.place} is being served: stop its servers first")

    async def clear(self) -> None:
        """Delete all that the pool has, some at a time. O(n)."""
        for partition in range(self.partitions):
            for name in keys_of(self.url.pool, partition, self.partitions):
                await self.ask(name, "UNLINK", name)
        await self.ask(self.facts_key, "DEL", self.facts_key)

    async def close(self) -> None:
        """Hang up."""
        await self._nodes.close()


class ValkeySource:
    """A pool in Valkey that nobody serves. Made by `open`."""

    def __init__(self, pool: _Pool) -> None:
        self._pool = pool
        self.total = 0
        self.numbers: dict[str, int] = {}

    @classmethod
    async def open(cls, url: str) -> Self:
        """Connect, and see that there is a pool to be moved. Raises SettingsError, StartError."""
        made = cls(_Pool(url))
        try:
            await made._pool.connect()
            facts = await made._hold()
            made.total = await made._pool.count()
            made.numbers = await made._numbers(facts)
        except BaseException:
            await made.close()
            raise
        return made

    async def _hold(self) -> dict[str, str]:
        """See that there is a pool to be moved; its facts."""
        pool, facts = self._pool, await self._pool.facts()
        if not facts:
            raise StartError(f"there is no pool in {pool.place}")
        if facts["layout"] == MOVING:
            raise StartError(_unfinished(pool))
        if facts["layout"] != LAYOUT:
            raise StartError(f"the pool in {pool.place} is of another version of keypool")
        await pool.have(int(facts["partitions"]))
        await pool.refuse_if_served()
        return facts

    async def _numbers(self, facts: dict[str, str]) -> dict[str, int]:
        seconds, microseconds = await self._pool.ask(self._pool.facts_key, "TIME")
        numbers = dict.fromkeys(("last_id", "last_lease", *COUNTERS), 0)
        numbers |= {name: int(facts.get(f"moved_{name}", 0)) for name in ("last_id", "last_lease")}
        numbers |= {name: int(number) for name, number in facts.items() if name.startswith(NOTE)}
        numbers["moment"] = int(seconds) * 1000 + int(microseconds) // 1000
        partitions = self._pool.partitions
        for partition in range(partitions):
            meta = self._pool.meta(partition)
            found = await self._pool.ask(meta, "HMGET", meta, "id", "tick", *COUNTERS)
            number, tick, *counts = found
            if number is not None:
                numbers["last_id"] = max(numbers["last_id"], int(number) * partitions + partition + 1)
            if tick is not None:
                numbers["last_lease"] = max(numbers["last_lease"], int(tick) * partitions + partition)
            for name, count in zip(COUNTERS, counts, strict=True):
                numbers[name] += int(count or 0)
        return numbers

    async def rows(self) -> AsyncIterator[list[Row]]:
        """See Source."""
        for partition in range(self._pool.partitions):
            rank = 0
            while found := (await self._pool.call(partition, "move_out", rank, rank + _AT_ONCE - 1))[1:]:
                rank += len(found)
                yield [_row(words) for words in found]

    async def close(self) -> None:
        """See Source."""
        await self._pool.close()


class ValkeyTarget:
    """A place in Valkey where no pool is. Made by `open`."""

    unfinished = "run it again with --clear, which first deletes what was moved so far"

    def __init__(self, pool: _Pool) -> None:
        self._pool = pool

    @classmethod
    async def open(cls, url: str, partitions: int | None, *, clear: bool) -> Self:
        """Connect, see that there is no pool, and mark the place. Raises SettingsError, StartError."""
        made = cls(_Pool(url))
        try:
            await made._pool.connect()
            await made._take(partitions or made._pool.url.default_partitions, clear)
        except BaseException:
            await made.close()
            raise
        return made

    async def _take(self, partitions: int, clear: bool) -> None:
        pool, facts = self._pool, await self._pool.facts()
        await pool.have(int(facts.get("partitions", partitions)))
        await pool.refuse_if_served()
        if facts.get("layout") == MOVING and clear:
            await pool.clear()
            await pool.have(partitions)
        elif facts.get("layout") == MOVING:
            raise StartError(_unfinished(pool))
        elif facts:
            raise StartError(
                f"there is a pool in {pool.place} already: move to another ?pool=NAME or database"
            )
        # Taken by one only, and by no server either: it would start a pool of its own.
        if not await pool.ask(pool.facts_key, "HSETNX", pool.facts_key, "layout", MOVING):
            raise StartError(f"another pool was created in {pool.place} in the meantime")
        await pool.ask(pool.facts_key, "HSET", pool.facts_key, "partitions", pool.partitions)

    async def write(self, rows: list[Row]) -> None:
        """See Target."""
        words: dict[int, list[str | int]] = {}
        for row in rows:
            words.setdefault(zlib.crc32(row[1].encode()) % self._pool.partitions, []).extend(_words(row))
        await self._pool.call_all([
            (partition, "move_in", some[at : at + 7 * _AT_ONCE])
            for partition, some in words.items()
            for at in range(0, len(some), 7 * _AT_ONCE)
        ])  # fmt: skip

    async def count(self) -> int:
        """See Target."""
        return await self._pool.count()

    async def finish(self, numbers: dict[str, int]) -> None:
        """See Target."""
        pool = self._pool
        meta = pool.meta(0)
        counts = [word for name in COUNTERS for word in (name, numbers.get(name, 0))]
        await pool.ask(meta, "HSET", meta, *counts)
        seconds, microseconds = await pool.ask(pool.facts_key, "TIME")
        last_id, last_lease = numbers.get("last_id", 0), numbers.get("last_lease", 0)
        facts: dict[str, str | int] = {
            "born": int(seconds) * 1_000_000 + int(microseconds),
            "base_tick": last_lease // pool.partitions + 1 if last_lease else 0,
            "base_id": last_id // pool.partitions + 1 if last_id else 0,
            "moved_last_id": last_id,
            "moved_last_lease": last_lease,
            "layout": LAYOUT,
        }
        facts |= {name: number for name, number in numbers.items() if name.startswith(NOTE) and number}
        words = [word for pair in facts.items() for word in pair]
        await pool.ask(pool.facts_key, "HSET", pool.facts_key, *words)

    async def close(self) -> None:
        """See Target."""
        await self._pool.close()


def _unfinished(pool: _Pool) -> str:
    return (
        f"{pool.place} holds a part of a pool: a migrate is at work, or was broken off; then run it again "
        "with --clear"
    )


def _row(words: list[Any]) -> Row:
    text, id, created, expires, release, lease, owner = words
    return (
        id, text.decode(), round(created / 1000), round(expires / 1000), round(release / 1000) or None, lease,
        owner.decode() or None,
    )  # fmt: skip


def _words(row: Row) -> list[str | int]:
    id, text, created, expires, release, lease, owner = row
    return [text, id, created * 1000, expires * 1000, (release or 0) * 1000, lease, owner or ""]
