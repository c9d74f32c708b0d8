"""The subscriber for messages about freed keys: one channel a partition, on which lua/common.lua publishes.

Messages published while the connection is down are lost, so a server with waiters also looks for keys every quarter of
a second (waiters.py). That is all that is left if the user has no right to these channels; a warning is logged then.
Ordinary PUBLISH, which a cluster's node passes on to all others, is cheap enough: it is used only while clients wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Sequence
from typing import Any

from keypool.engine.valkey.link import UNREACHABLE, Link, ReplyError
from keypool.engine.valkey.nodes import Nodes

_CHANNELS_A_COMMAND = 100
_PING_SECONDS = 5.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0  # seconds before it connects again
OnFreed = Callable[[int, str], None]
"""Called with the partition in which keys were freed, and the server that may take them ("*": any)."""
_log = logging.getLogger("keypool.valkey")


class ReleaseSubscriber:
    """See the module. One connection for all pools of a server."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._listeners: dict[bytes, tuple[int, OnFreed]] = {}
        self._link: Link | None = None
        self._lost = asyncio.Event()
        self._received_any = False
        self._warned = False
        self._task = asyncio.get_running_loop().create_task(self._run())

    def add(self, channels: Sequence[str], on_freed: OnFreed) -> None:
        """Subscribe to the channels of a pool's partitions, in their order. O(partitions)."""
        self._listeners |= {name.encode(): (number, on_freed) for number, name in enumerate(channels)}
        self._subscribe("SUBSCRIBE", list(channels))

    def discard(self, channels: Sequence[str]) -> None:
        """Unsubscribe from these. O(channels)."""
        for name in channels:
            self._listeners.pop(name.encode(), None)
        self._subscribe("UNSUBSCRIBE", list(channels))

    def _subscribe(self, command: str, channels: Sequence[str | bytes]) -> None:
        if self._link is not None:
            for at in range(0, len(channels), _CHANNELS_A_COMMAND):
                self._link.send_only(command, *channels[at : at + _CHANNELS_A_COMMAND])

    async def close(self) -> None:
        """Stop, and close the connection."""
        self._task.cancel()
        await asyncio.wait([self._task])
        if self._link is not None:
            self._link.close()

    async def _run(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            self._lost.clear()
            try:
                self._link = await self._nodes.connection(
                    self._nodes.any_node(), lambda link, reason: self._lost.set()
                )
                self._link.on_message = self._received
                self._subscribe("SUBSCRIBE", list(self._listeners))
                pause = _FIRST_PAUSE
                await self._watch(self._link)
            except UNREACHABLE:
                pause = min(2 * pause, _LONGEST_PAUSE)
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - no secret

    async def _watch(self, link: Link) -> None:
        """Return when the connection is lost; a ping without a reply within 5 s closes it."""
        while link.up:
            self._received_any = False
            link.send_only("PING")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._lost.wait(), _PING_SECONDS)
            if not self._received_any:
                link.close()

    def _received(self, message: Any) -> None:
        self._received_any = True
        if isinstance(message, list) and message[0] == b"message":
            listener = self._listeners.get(message[1])
            if listener is not None:  # else its pool is gone
                listener[1](listener[0], message[2].decode())
        elif isinstance(message, ReplyError) and not self._warned:
            self._warned = True
            _log.warning(
                "Valkey refuses the channels of freed keys: %s; waiting clients look for keys four times a second "
                "instead of being served at once",
                message,
            )
