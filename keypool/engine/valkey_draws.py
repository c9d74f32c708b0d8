"""Drawing keys: each available key of the pool with the same chance, over partitions, in few round trips.

See valkey.py for how, and lua/acquire.lua for what the scripts do of it.
"""

from __future__ import annotations

import asyncio
import random
from bisect import bisect
from collections.abc import Iterator, Sequence
from itertools import accumulate

from keypool.answers import Lease
from keypool.engine.valkey_link import Reply
from keypool.engine.valkey_looks import Looks
from keypool.engine.valkey_nodes import Word
from keypool.engine.valkey_partitions import Partitions, all_of

_ROUNDS = 8  # of draws, before an acquire that always comes too late gives up
_ROUNDS_BY_HEART = 2  # of these, by the counts that partitions told when they last answered


class Draws:
    """See the module."""

    def __init__(self, partitions: Partitions, looks: Looks, block_seconds: float) -> None:
        self._partitions = partitions
        self._looks = looks
        self._block_us = round(block_seconds * 1e6)
        self._tick = 0  # of the latest lease that this server knows of
        self._random = random.Random()  # noqa: S311 - which free key is served is no secret
        self._loop = asyncio.get_running_loop()

    async def take(self, owners: Sequence[str | None], sure: bool) -> list[tuple[str | None, Lease]]:
        """Acquire a key for each owner, as many as there are. If not `sure`, only where keys are known to be."""
        wanted = list(owners)
        taken: list[tuple[str | None, Lease]] = []
        calls: list[asyncio.Future[Reply]] = []
        rounds, crowded = 0, False
        try:
            while wanted and rounds < _ROUNDS:
                known = any(self._partitions.available) and rounds < _ROUNDS_BY_HEART
                if not known and not crowded and not (sure and (await self._looks.look()).available):
                    break
                started = self._loop.time()
                plan, wanted = self._plan(wanted)
                calls = [self._ask_for(partition, some) for partition, some in plan.items()]
                replies = await all_of(calls)
                calls, crowded = [], False
                for (partition, some), reply in zip(plan.items(), replies, strict=True):
                    crowded = crowded or reply[1] == 1
                    for owner, lease in self._leases_in(partition, some, reply, started):
                        if lease is None:
                            wanted.append(owner)
                        else:
                            taken.append((owner, lease))
                rounds += not crowded
        except (
            BaseException
        ):  # hung up, or a partition can't be reached: nobody will hear of the others' keys
            for call in calls:
                self._take_back(call)
            for _, lease in taken:
                self.give_back(lease)
            raise
        return sorted(taken, key=_number)

    def _plan(self, owners: Sequence[str | None]) -> tuple[dict[int, list[str | None]], list[str | None]]:
        """Which partition is asked for which owner's key: each key of the pool has the same chance. Also the
        owners for whom there seems to be none.
        """
        available = list(self._partitions.available)
        plan: dict[int, list[str | None]] = {}
        for number, owner in enumerate(owners):
            ends = list(accumulate(available))
            if not ends[-1]:
                return plan, list(owners[number:])
            partition = bisect(ends, self._random.random() * ends[-1])
            available[partition] -= 1
            plan.setdefault(partition, []).append(owner)
        return plan, []

    def _ask_for(self, partition: int, owners: Sequence[str | None]) -> asyncio.Future[Reply]:
        facts, draw = self._partitions.facts, self._random.random
        words: list[Word] = [self._partitions.available[partition], self._tick, facts.born, facts.base_tick]
        words += [facts.partitions, partition, self._block_us, self._random.getrandbits(31)]
        for owner in owners:
            words += [owner or "", draw()]
        return self._partitions.nodes.call(partition, "acquire", words, self._return_unheard)

    def _leases_in(
        self, partition: int, owners: Sequence[str | None], reply: Reply, started: float
    ) -> Iterator[tuple[str | None, Lease | None]]:
        """What a partition says to `_ask_for`: each owner with the key served."""
        self._partitions.note(partition, reply[0])
        self._tick = max(self._tick, reply[2])
        for owner, served in zip(owners, reply[3:], strict=True):
            if served is None:
                yield owner, None
            else:
                text, id, lease, expires = served
                release_in, expires_in = (
                    self._partitions.left(self._block_us, started),
                    self._partitions.left(expires, started),
                )
                yield owner, Lease(id, text.decode(), lease, release_in, expires_in)

    def _take_back(self, call: asyncio.Future[Reply]) -> None:
        """Nobody wants the answer any more, whether or not it has come."""
        if not call.cancel() and not call.cancelled() and call.exception() is None:
            self._return_unheard(call.result())

    def _return_unheard(self, reply: Reply) -> None:
        for served in reply[3:]:
            if served is not None:
                self._free(served[0].decode(), served[2])

    def give_back(self, lease: Lease) -> None:
        """Nobody will hear of this lease."""
        self._free(lease.key, lease.lease)

    def _free(self, text: str, lease: int) -> None:
        self._partitions.in_background(self._partitions.of(text), "unblock", text, lease)


def _number(taken: tuple[str | None, Lease]) -> int:
    return taken[1].lease
