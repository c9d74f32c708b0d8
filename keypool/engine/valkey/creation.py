"""Making keys, all or none, and never more than the pool may hold, whichever servers make them.

Each partition may hold its share of `--max-keys` and no more, and the script that makes keys refuses what
doesn't fit (lua/generate.lua). So the pool's limit is kept exactly, however many servers fill it. A key's
partition follows from its text; near the limit only texts are used whose partition has room, so that the pool
is filled to its last key.

A call that one script decides, for one key or in a pool with one partition, makes all or none by itself. A batch
over several partitions does so while there is ample room; near the limit it first reserves room in each
(lua/room.lua). If ample room is gone nevertheless, since other servers made ten thousand keys within the second,
what is missing is made elsewhere, or what was made is deleted again.

One exception: where keys were moved in, or made by a server of an older version, a partition may hold more than its
share. Servers that fill the last of such a pool at the same moment may exceed the limit by that surplus.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from types import TracebackType

from keypool.core.answers import GeneratedKey
from keypool.core.errors import PoolFull
from keypool.core.keys import State, random_text
from keypool.core.rules import PoolRules
from keypool.engine.valkey.partitions import Partitions, all_of
from keypool.engine.valkey.poller import Looks

_SPARE_KEYS, _SPARE_SHARE = 10_000, 0.1  # room that is ample, in keys or as a share of the limit
_RESERVED_SECONDS = 10.0  # that a batch may take to use room that it reserved
_PAUSE = 0.01  # seconds, on average, before room is asked for again that another server has reserved
_AT_ONCE = 1000  # texts that are tried in one turn of the loop


class Turns:
    """One caller at a time, first come first served. Unlike asyncio.Lock, it is also passed on by a coroutine
    that is closed just when its turn has come.
    """

    def __init__(self) -> None:
        self._taken = False
        self._queue: deque[asyncio.Future[None]] = deque()

    async def __aenter__(self) -> None:
        if not self._taken:
            self._taken = True
            return
        turn = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            await turn
        except (GeneratorExit, asyncio.CancelledError):
            if turn.done() and not turn.cancelled():
                self._pass_on()
            else:
                with contextlib.suppress(ValueError):
                    self._queue.remove(turn)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pass_on()

    def _pass_on(self) -> None:
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._taken = False


class Making:
    """See the module. `server` names this one in reservations."""

    def __init__(self, partitions: Partitions, looks: Looks, server: str, rules: PoolRules) -> None:
        self._partitions = partitions
        self._looks = looks
        self._server = server
        self._life_us = round(rules.keepalive_seconds * 1e6)
        self._key_length = rules.key_length
        self._max_keys = max_keys = rules.max_keys
        count = partitions.count
        self._limits = [max_keys // count + (number < max_keys % count) for number in range(count)]
        self._ample = max(_SPARE_KEYS, _SPARE_SHARE * max_keys) / count
        self._turns = Turns()
        self._reservations = itertools.count(1)
        self._loop = asyncio.get_running_loop()

    async def make(self, count: int) -> list[GeneratedKey]:
        """So many new keys. Raises PoolFull.

        O(count * log n); near the limit O(partitions) besides, and some round trips more.
        """
        texts = [random_text(self._key_length) for _ in range(count)]
        wanted = Counter(map(self._partitions.of, texts))
        if len(wanted) > 1 and not self._ample_room(wanted):
            return await self._fill(count)
        made = await self._generate(texts, "")
        if len(made) == count:
            return made
        try:
            return made + await self._fill(count - len(made))
        except BaseException:
            self._delete(made)
            raise

    def _ample_room(self, wanted: Counter[int]) -> bool:
        totals, limits = self._looks.totals, self._limits
        return all(
            totals[partition] + keys + self._ample <= limits[partition] for partition, keys in wanted.items()
        )

    async def _fill(self, count: int) -> list[GeneratedKey]:
        """Make keys near the limit."""
        async with self._turns:
            while True:
                look = await self._looks.look()
                if look.total + count > self._max_keys:
                    if look.crowded:
                        continue  # what is overdue is being purged
                    raise PoolFull(look.total, count, self._max_keys)
                room = [
                    max(0, limit - total)
                    for limit, total in zip(self._limits, self._looks.totals, strict=True)
                ]
                if sum(room) >= count:
                    made = await self._make_all(await self._texts_for(room, count))
                    if made is not None:
                        return made
                await self._pause(_PAUSE * random.uniform(0.5, 1.5))  # noqa: S311 - no secret

    async def _texts_for(self, room: list[int], count: int) -> list[str]:
        """Random texts of partitions that have room for them."""
        found: list[str] = []
        for tried in itertools.count(1):
            text = random_text(self._key_length)
            partition = self._partitions.of(text)
            if room[partition]:
                room[partition] -= 1
                found.append(text)
                if len(found) == count:
                    break
            if tried % _AT_ONCE == 0:
                await self._pause(0)
        return found

    async def _make_all(self, texts: Sequence[str]) -> list[GeneratedKey] | None:
        """Make these, or none if there isn't room for all of them: then None."""
        wanted = Counter(map(self._partitions.of, texts))
        name = ""
        if len(wanted) > 1:
            name = f"{self._server}.{next(self._reservations)}"
            if not await self._reserve(wanted, name):
                return None
        made = await self._generate(texts, name)
        if len(made) == len(texts):
            return made
        self._delete(made)  # some, if it took so long that reservations have lapsed
        return None

    async def _reserve(self, wanted: Counter[int], name: str) -> bool:
        """Reserve room in all of these partitions, or in none."""
        held = round(_RESERVED_SECONDS * 1e6)
        calls = [
            self._partitions.nodes.call(partition, "room", (name, keys, self._limits[partition], held))
            for partition, keys in wanted.items()
        ]
        reserved = False
        try:
            reserved = all(reply[1] for reply in await all_of(calls))
        finally:
            if not reserved:
                for partition in wanted:
                    self._partitions.in_background(partition, "room", name, 0)
        return reserved

    async def _generate(self, texts: Sequence[str], reservation: str) -> list[GeneratedKey]:
        """Make keys in each partition that has room for all that it is to make."""
        partitions, looks, count = self._partitions, self._looks, self._partitions.count
        words: dict[int, list[str | int]] = {}
        for number, text in enumerate(texts, looks.id_number + 1):
            partition = partitions.of(text)
            if partition not in words:
                words[partition] = [self._life_us, count, partition, self._limits[partition], reservation]
            words[partition] += (number, text)
        looks.id_number += len(texts)
        calls = [partitions.nodes.call(partition, "generate", some) for partition, some in words.items()]
        ids: dict[int, Iterator[int]] = {}
        for partition, (available, *made) in zip(words, await all_of(calls), strict=True):
            partitions.note(partition, available)
            if made:
                looks.made(partition, len(made))
                looks.id_number = max(looks.id_number, (made[-1] - 1) // count)
            ids[partition] = iter(made)
        expires_in = partitions.left(self._life_us, min(call.sent_at for call in calls))
        return [
            GeneratedKey(id, text, State.AVAILABLE, expires_in)
            for text in texts
            if (id := next(ids[partitions.of(text)], 0))
        ]

    def _delete(self, made: Sequence[GeneratedKey]) -> None:
        for key in made:
            self._partitions.in_background(self._partitions.of(key.key), "delete", key.key)

    async def _pause(self, seconds: float) -> None:
        turn = self._loop.create_future()
        self._loop.call_later(seconds, _done, turn)
        await turn


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
