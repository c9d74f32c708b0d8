"""Hearing of freed keys: the channels that common.lua tells them on, one a partition.

What is lost while the connection is down is lost; whoever waits looks by itself now and then. Ordinary
publishing, which every node of a cluster passes on to all others: it happens only while somebody waits. A user
without the right to these channels costs waiters up to a quarter of a second, and is a warning in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from typing import Any

from keypool.engine.valkey.link import Link, Lost, ReplyError
from keypool.engine.valkey.nodes import Nodes
from keypool.engine.valkey.scripts import keys_of

_SUBSCRIBED = 100  # channels a command
_PING_SECONDS = 5.0
_log = logging.getLogger("keypool.valkey")


class Wake:
    """See the module. `on_freed` is called with a partition in which keys were freed, and for whom."""

    def __init__(
        self, nodes: Nodes, pool: str, partitions: int, on_freed: Callable[[int, str], None]
    ) -> None:
        self._nodes = nodes
        self._on_freed = on_freed
        names = [keys_of(pool, partition, partitions)[-1] for partition in range(partitions)]
        self._partition_of = {name.encode(): partition for partition, name in enumerate(names)}
        self._link: Link | None = None
        self._lost = asyncio.Event()
        self._heard_any = False
        self._warned = False
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop listening."""
        self._task.cancel()
        await asyncio.wait([self._task])
        if self._link is not None:
            self._link.close()

    async def _run(self) -> None:
        pause = 0.1
        while True:
            self._lost.clear()
            try:
                self._link = await self._nodes.connection(self._nodes.any_node(), self._link_lost)
                self._subscribe(self._link)
                pause = 0.1
                await self._listen(self._link)
            except (OSError, ReplyError, Lost):
                pause = min(2 * pause, 2.0)
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - no secret

    async def _listen(self, link: Link) -> None:
        """Until the connection is lost, or nothing is heard though there was something to answer."""
        while link.up:
            self._heard_any = False
            link.send_only("PING")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._lost.wait(), _PING_SECONDS)
            if not self._heard_any:
                link.close()

    def _subscribe(self, link: Link) -> None:
        link.on_message = self._heard
        channels = list(self._partition_of)
        for at in range(0, len(channels), _SUBSCRIBED):
            link.send_only("SUBSCRIBE", *channels[at : at + _SUBSCRIBED])

    def _heard(self, message: Any) -> None:
        self._heard_any = True
        if isinstance(message, list) and message[0] == b"message":
            self._on_freed(self._partition_of[message[1]], message[2].decode())
        elif isinstance(message, ReplyError) and not self._warned:
            self._warned = True
            _log.warning(
                "Valkey refuses the channels of freed keys: %s; waiting clients look for keys four times a second "
                "instead of being served at once",
                message,
            )

    def _link_lost(self, link: Link, why: str) -> None:
        self._lost.set()
