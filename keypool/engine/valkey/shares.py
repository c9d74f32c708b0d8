"""How many leases a named token holds, over all pools and servers (`max_held`).

A client that may not hold as many as it likes has a sorted set, its share, in a slot that its name determines: one
member for each of its leases, a reservation, by the moment at which that ends. An acquire takes these steps:

    1  reserve: a member, if there is room, with the moment at which the lease would end, and a margin
    2  acquire: the script writes the name of the reservation into the key's record (lua/acquire.lua)
    3  the reservation gets the end of the lease, or is given up if no key was acquired

When a lease ends or is extended, by whatever script, that script's reply says so (lua/common.lua), and the server that
gets the reply moves the reservation. If it dies before it can, or an acquire is not answered, the reservation lapses by
itself when the lease ends. So the share never has fewer members than the client has leases, but for an extension whose
server dies within a millisecond of it.

Only acquires of such clients pay for this: a round trip before the acquire, and a call after it.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence

from keypool.core.errors import ShareSpent
from keypool.engine import Client
from keypool.engine.valkey.calls import ScriptCall, ScriptClient
from keypool.engine.valkey.link import Reply, Word
from keypool.engine.valkey.nodes import Nodes

_MARGIN = 5.0  # seconds that a reservation lasts beyond the block that is to be acquired
_NEVER_RETRY = 60.0  # seconds after which to retry what will be refused again


class Purse:
    """Reservations of a client for one request. Those that are not spent are given back (`Shares.give_back`)."""

    def __init__(self, client: str, reservations: list[str]) -> None:
        self.client = client
        self.reservations = reservations

    def take(self) -> str:
        """A reservation for a key that is to be acquired. There must be one."""
        return self.reservations.pop()


class Shares:
    """See the module. `server` is this server's name in Valkey."""

    def __init__(self, nodes: Nodes, server: str) -> None:
        url = nodes.url
        self._count = url.default_partitions
        self._client = ScriptClient(nodes, f"{url.pool}/shares", self._count)
        self._server = server
        self._numbers = itertools.count(1)
        self.listeners: dict[Callable[[str], object], None] = {}
        """Called with the name of a client when its share has got room."""

    async def reserve(self, client: Client, count: int, seconds: float) -> tuple[Purse, float | None]:
        """Up to `count` reservations for leases of so many seconds, and the seconds to the earliest end of one, if any.

        O(count * log held). Raises StorageUnavailable.
        """
        names = [f"{self._server}.{next(self._numbers)}" for _ in range(count)]
        words: list[Word] = [client.max_held or 0, round((seconds + _MARGIN) * 1e6), *names]
        call = self._call(client.name, "reserve", words, lambda reply: self._give_up(client.name, names))
        try:
            taken, left = await call
        except BaseException:  # the caller hung up, or it isn't known what was done
            if not call.cancel():
                self._give_up(client.name, names)
            raise
        return Purse(client.name, names[:taken]), left / 1e6 if left >= 0 else None

    async def spent(self, client: Client) -> ShareSpent | None:
        """The error for a client whose share has no room; None if it has. Raises StorageUnavailable."""
        room, left = await self._call(client.name, "look", (client.max_held or 0,))
        return None if room > 0 else spent(client, left / 1e6 if left >= 0 else None)

    async def held(self, client: Client) -> int | None:
        """How many places of its share a client has taken; None if it has no limit. Raises StorageUnavailable."""
        if client.max_held is None:
            return None
        room, _ = await self._call(client.name, "look", (client.max_held,))
        return int(client.max_held - room)

    def give_back(self, purse: Purse) -> None:
        """Give up the reservations of a purse, without waiting. O(reservations * log held)."""
        reservations, purse.reservations = purse.reservations, []
        if reservations:
            self._give_up(purse.client, reservations)

    def _give_up(self, client: str, reservations: Sequence[str]) -> None:
        self._move(client, [word for name in reservations for word in (name, 0)])

    def keep(self, client: str, reservation: str, seconds: float) -> None:
        """Let a reservation lapse when its lease ends, without waiting. O(log held)."""
        self._move(client, (reservation, round(seconds * 1e6)))

    def moved(self, words: Reply) -> None:
        """Follow the leases that a reply says have ended, or end later: client, reservation, microseconds left, …"""
        for client, reservation, left in zip(words[::3], words[1::3], words[2::3], strict=True):
            self._move(client.decode(), (reservation, left))

    async def close(self) -> None:
        """Use the connections no more."""
        await self._client.close()

    def _move(self, client: str, words: Sequence[Word]) -> None:
        self._call(client, "move", words).add_done_callback(lambda call: self._has_room(client))

    def _has_room(self, client: str) -> None:
        for listener in list(self.listeners):
            listener(client)

    def _call(
        self,
        client: str,
        act: str,
        words: Sequence[Word],
        on_orphaned_reply: Callable[[Reply], None] | None = None,
    ) -> ScriptCall:
        partition = zlib.crc32(client.encode("utf-8", "surrogatepass")) % self._count
        return self._client.call(partition, "share", (client, act, *words), on_orphaned_reply)


def spent(client: Client, left: float | None) -> ShareSpent:
    """The error for a client whose share has no room for so many seconds."""
    return ShareSpent(client.max_held or 0, _NEVER_RETRY if left is None else round(left, 3))
