"""Time that keys are given after a stop or an outage, so that their keepers can catch up (lua/grace.lua).

After a stop of all servers it is --restart-grace. After an outage, in which servers kept running but could not reach
Valkey, it is half of --keepalive-seconds, if that is more.
"""

from __future__ import annotations

import asyncio
import logging

from keypool.core.errors import StorageUnavailable
from keypool.engine.valkey.partitions import Partitions

_SLICE = 500  # keys that one call of the script processes, in some 10 ms
_URGENT_SECONDS = 30.0  # keys with more time left than this get theirs once the partition is served again
_log = logging.getLogger("keypool.valkey")


class Grace:
    """See the module. All methods raise StorageUnavailable."""

    def __init__(self, partitions: Partitions) -> None:
        self._partitions = partitions
        self._client = partitions.client
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, served: bool) -> None:
        """Begin to serve all partitions; `served` is whether other servers do already. O(n log n)."""
        count, restart_seconds = 0, self._partitions.rules.restart_grace
        seconds = self._partitions.rules.outage_grace if served else restart_seconds
        for partition in range(self._partitions.count):
            count += (await self._give(partition, "start" if served else "stop", seconds))[1]
        if restart_seconds and (count or not self._partitions.facts.number):
            _log.info("%d keys were given until %.1f s after the start", count, restart_seconds)
        self._client.attend = self._attend

    async def _attend(self, partition: int) -> None:
        """Give the urgent keys of an unattended partition time, after which it is served. O(urgent keys * log n)."""
        seconds = self._partitions.rules.outage_grace
        ends, count = await self._give(partition, "outage", seconds, urgent=_URGENT_SECONDS)
        if ends:
            _log.info("partition %d is served again: %d keys were given %.1f s", partition, count, seconds)
            task = asyncio.ensure_future(self._give_others(partition, ends, count))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _give_others(self, partition: int, ends: int, count: int) -> None:
        """Give the other keys the same time, while the partition is served."""
        try:
            await self._give(partition, "rest", 0.0, ends=ends, count=count)
        except StorageUnavailable:
            _log.debug("partition %d is unreachable again: its keys get time after this outage", partition)

    async def _give(
        self, partition: int, why: str, seconds: float, *, ends: int = 0, count: int = 0, urgent: float = 1e6
    ) -> tuple[int, int]:
        """Extend the life of keys to a moment. Returns that moment (Valkey's clock, µs) and how many have it now."""
        more, rest_us = 1, round(self._partitions.rules.rest_seconds * 1e6)
        while more:
            words = (why, round(seconds * 1e6), ends, round(urgent * 1e6), count, _SLICE, rest_us)
            ends, given, more = await self._client.call(partition, "grace", words)
            count += given
        return ends, count
