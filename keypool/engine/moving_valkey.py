"""A pool in Valkey as the source or the target of a move (moving.py).

That servers serve it is seen by the channels that each of them listens on; what is served all the same meanwhile,
through a connection that was just lost, say, is not seen: stop the servers first.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

from keypool.engine import NOTE, valkey_open
from keypool.engine.datafile import Row
from keypool.engine.valkey_link import Lost, Measured, Reply, ReplyError
from keypool.engine.valkey_look import COUNTERS
from keypool.engine.valkey_nodes import Nodes
from keypool.engine.valkey_scripts import keys_of
from keypool.engine.valkey_url import parse, without_password
from keypool.errors import KeypoolError, SettingsError, StartError

T = TypeVar("T")

DEFAULT_PARTITIONS = 16
LAYOUT, MOVING = str(valkey_open.LAYOUT), str(valkey_open.MOVING)

_AT_ONCE = 500  # keys in one call of a script: some 10 ms in which Valkey does nothing else


class _Pool:
    """A pool's names, and the way to it. Blocks; a loop of its own runs while something is asked."""

    def __init__(self, url: str) -> None:
        try:
            self._url = parse(url)
        except ValueError as error:
            shown = without_password(url)
            raise SettingsError(
                f"{shown} is no place of a pool ({error}): valkey://HOST:PORT/DB is"
            ) from None
        self.place = without_password(url)
        self.facts_key = f"{{{self._url.pool}}}:pool"
        self._runner = asyncio.Runner()
        self._nodes = self.run(self._connect())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it. Raises StartError."""
        try:
            return self._runner.run(work)
        except KeypoolError as error:
            raise StartError(f"{self.place}: {error}") from None
        except (OSError, ReplyError, Lost) as error:
            raise StartError(f"{self.place} can't be asked: {error}") from None

    async def _connect(self) -> Nodes:
        nodes = Nodes(self._url, Measured())
        await nodes.open()
        return nodes

    def ask(self, key: str, *words: str | int) -> Reply:
        """The reply to a command about a key."""
        return self.run(self._nodes.ask(key, *words))

    def facts(self) -> dict[str, str]:
        """What the pool's own hash says; nothing if there is no pool."""
        flat = self.ask(self.facts_key, "HGETALL", self.facts_key)
        words = [word.decode() for word in flat]
        return dict(zip(words[::2], words[1::2], strict=True))

    def have(self, partitions: int) -> None:
        """So many partitions are there to be called."""
        self.partitions = partitions
        self.run(self._nodes.set_partitions(partitions))

    def meta(self, partition: int) -> str:
        """The name of a partition's meta hash."""
        return keys_of(self._url.pool, partition, self.partitions)[0]

    def call(self, partition: int, script: str, *words: str | int) -> Reply:
        """A script's answer."""
        return self.run(self._call(partition, script, words))

    async def _call(self, partition: int, script: str, words: tuple[str | int, ...]) -> Reply:
        return await self._nodes.call(partition, script, words)

    def call_all(self, calls: list[tuple[int, str, list[str | int]]]) -> list[Reply]:
        """The answers of several, asked at once."""

        async def together() -> list[Reply]:
            return await asyncio.gather(*(self._nodes.call(*call) for call in calls))

        return self.run(together())

    def count(self) -> int:
        """Keys that are there."""
        total = 0
        for partition in range(self.partitions):
            records = keys_of(self._url.pool, partition, self.partitions)[1]
            total += self.ask(records, "HLEN", records)
        return total

    def refuse_if_served(self) -> None:
        """Raise StartError if some server listens for freed keys."""
        channel = keys_of(self._url.pool, 0, self.partitions)[-1]
        if sum(reply[1] for reply in self.run(self._nodes.everywhere("PUBSUB", "NUMSUB", channel))):
            raise StartError(f"{self.place} is being served: stop its servers first")

    def clear(self) -> None:
        """Delete all that the pool has, some at a time. O(n)."""
        for partition in range(self.partitions):
            for name in keys_of(self._url.pool, partition, self.partitions):
                self.ask(name, "UNLINK", name)
        self.ask(self.facts_key, "DEL", self.facts_key)

    def close(self) -> None:
        """Hang up."""
        with self._runner:
            self._runner.run(self._nodes.close())


class ValkeySource:
    """A pool in Valkey that nobody serves. Raises StartError."""

    def __init__(self, url: str) -> None:
        self._pool = _Pool(url)
        try:
            facts = self._hold()
            self.total = self._pool.count()
            self.numbers = self._numbers(facts)
        except BaseException:
            self._pool.close()
            raise

    def _hold(self) -> dict[str, str]:
        """See that there is a pool to be moved; its facts."""
        pool, facts = self._pool, self._pool.facts()
        if not facts:
            raise StartError(f"there is no pool in {pool.place}")
        if facts["layout"] == MOVING:
            raise StartError(_unfinished(pool))
        if facts["layout"] != LAYOUT:
            raise StartError(f"the pool in {pool.place} is of another version of keypool")
        pool.have(int(facts["partitions"]))
        pool.refuse_if_served()
        return facts

    def _numbers(self, facts: dict[str, str]) -> dict[str, int]:
        seconds, microseconds = self._pool.ask(self._pool.facts_key, "TIME")
        numbers = dict.fromkeys(("last_id", "last_lease", *COUNTERS), 0)
        numbers |= {name: int(facts.get(f"moved_{name}", 0)) for name in ("last_id", "last_lease")}
        numbers |= {name: int(number) for name, number in facts.items() if name.startswith(NOTE)}
        numbers["moment"] = int(seconds) * 1000 + int(microseconds) // 1000
        partitions = self._pool.partitions
        for partition in range(partitions):
            meta = self._pool.meta(partition)
            found = self._pool.ask(meta, "HMGET", meta, "id", "tick", *COUNTERS)
            number, tick, *counts = found
            if number is not None:
                numbers["last_id"] = max(numbers["last_id"], int(number) * partitions + partition + 1)
            if tick is not None:
                numbers["last_lease"] = max(numbers["last_lease"], int(tick) * partitions + partition)
            for name, count in zip(COUNTERS, counts, strict=True):
                numbers[name] += int(count or 0)
        return numbers

    def rows(self) -> Iterator[list[Row]]:
        """See Source."""
        for partition in range(self._pool.partitions):
            rank = 0
            while found := self._pool.call(partition, "move_out", rank, rank + _AT_ONCE - 1)[1:]:
                rank += len(found)
                yield [_row(words) for words in found]

    def close(self) -> None:
        """See Source."""
        self._pool.close()


class ValkeyTarget:
    """A place in Valkey where no pool is. Raises StartError."""

    def __init__(self, url: str, partitions: int | None, *, clear: bool) -> None:
        self._pool = _Pool(url)
        self.unfinished = "run it again with --clear, which first deletes what was moved so far"
        try:
            self._take(partitions or DEFAULT_PARTITIONS, clear)
        except BaseException:
            self._pool.close()
            raise

    def _take(self, partitions: int, clear: bool) -> None:
        """See that there is no pool, and mark the place."""
        pool, facts = self._pool, self._pool.facts()
        pool.have(int(facts.get("partitions", partitions)))
        pool.refuse_if_served()
        if facts.get("layout") == MOVING and clear:
            pool.clear()
            pool.have(partitions)
        elif facts.get("layout") == MOVING:
            raise StartError(_unfinished(pool))
        elif facts:
            raise StartError(
                f"there is a pool in {pool.place} already: move to another ?pool=NAME or database"
            )
        # Taken by one only, and by no server either: it would start a pool of its own.
        if not pool.ask(pool.facts_key, "HSETNX", pool.facts_key, "layout", MOVING):
            raise StartError(f"another pool has just come into being in {pool.place}")
        pool.ask(pool.facts_key, "HSET", pool.facts_key, "partitions", pool.partitions)

    def write(self, rows: list[Row]) -> None:
        """See Target."""
        words: dict[int, list[str | int]] = {}
        for row in rows:
            words.setdefault(zlib.crc32(row[1].encode()) % self._pool.partitions, []).extend(_words(row))
        self._pool.call_all([(partition, "move_in", some) for partition, some in words.items()])

    def count(self) -> int:
        """See Target."""
        return self._pool.count()

    def finish(self, numbers: dict[str, int]) -> None:
        """See Target."""
        pool = self._pool
        meta = pool.meta(0)
        counts = [word for name in COUNTERS for word in (name, numbers.get(name, 0))]
        pool.ask(meta, "HSET", meta, *counts)
        seconds, microseconds = pool.ask(pool.facts_key, "TIME")
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
        pool.ask(pool.facts_key, "HSET", pool.facts_key, *words)

    def close(self) -> None:
        """See Target."""
        self._pool.close()


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
