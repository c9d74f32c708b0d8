"""Shares: how many leases each named token holds in all pools of this server, and which of its acquires wait for that.

A client with a `max_held` gets no lease while it holds so many. Its waiters stand in the queues of their pools, and are
passed over meanwhile (`waiters.Queue`). When one of its leases ends, wherever that is, they are let in again in all
pools. They are served in the order in which they came, in whatever pool, as far as there are keys for them: a client
whose waiters in one pool never end doesn't starve its own in another.

Leases of callers without a name aren't counted here, and cost nothing.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from typing import Protocol

from keypool.core.errors import ShareSpent, UnknownKey
from keypool.core.keys import Key
from keypool.core.pool import Pool
from keypool.engine import Client

_EXAMINED = 64  # leases of a client, the oldest ones, among which the earliest end is looked for
_NEVER_RETRY = 60.0  # seconds after which to retry what will be refused again


class Lane(Protocol):
    """The waiters of one client in one pool, all with the same `max_held`."""

    client: Client

    def first_place(self) -> int:
        """The place of the first of them. Places are in the order of arrival over all pools."""
        ...

    def admit(self) -> None:
        """They are passed over no more, and will be served in the next turn of the loop at the latest."""
        ...

    def serve(self, now: float) -> None:
        """Serve whoever is first in this pool, if it has keys."""
        ...


class Shares:
    """See the module. Every operation is O(1) in keys and leases, unless it says more."""

    def __init__(self) -> None:
        self._held: dict[str, OrderedDict[Key, Pool]] = {}  # by client, the oldest lease first
        self._lanes: dict[str, dict[Lane, None]] = {}
        self.places = itertools.count(1)
        """Where acquires stand in the queues of all pools."""

    # -- what pools report (core.pool.Clients)

    def begun(self, pool: Pool, key: Key) -> None:
        """A lease of a named client began, or was restored."""
        assert key.client is not None
        held = self._held.get(key.client)
        if held is None:
            held = self._held[key.client] = OrderedDict()
        held[key] = pool

    def ended(self, key: Key) -> None:
        """A lease of a named client is ending; `key.client` is still the name. O(lanes of the client)."""
        assert key.client is not None
        held = self._held[key.client]
        del held[key]
        if not held:
            del self._held[key.client]
        for lane in self._lanes.get(key.client, ()):
            lane.admit()

    # -- what engines ask

    def held(self, name: str) -> int:
        """How many leases a client holds."""
        return len(self._held.get(name, ()))

    def has_room(self, client: Client, now: float) -> bool:
        """Whether the client may have another lease. Ends leases whose time is over, if their timers are late."""
        most = client.max_held
        if most is None or self.held(client.name) < most:
            return True
        for key, pool in self._oldest(client.name):
            if min(key.release_deadline or now, key.expires_deadline) <= now:
                with suppress(UnknownKey):  # it has expired
                    pool.find_id(key.id, now)
        return self.held(client.name) < most

    def may_take(self, client: Client, now: float) -> bool:
        """Whether a new acquire of the client may have a lease, after those of its waiters that can be served.

        O(1), unless the client has waiters.
        """
        if not self.has_room(client, now):
            return False
        if client.name not in self._lanes:
            return True
        self._serve(self._lanes[client.name], now)
        return self.has_room(client, now)

    def serve_earlier(self, client: Client, place: int, now: float) -> None:
        """Serve the waiters of this client that came before this place, in other pools that have keys for them."""
        lanes = self._lanes[client.name]
        if len(lanes) > 1:
            self._serve([lane for lane in lanes if lane.first_place() < place], now)

    def spent(self, client: Client, now: float) -> ShareSpent:
        """The error for a client whose share has no room. Its `retry_after` is a hint: by the client's oldest leases.

        A share of nothing never has room, so the hint is as good as any.
        """
        assert client.max_held is not None
        ends = [
            min(key.release_deadline or now, key.expires_deadline) for key, _ in self._oldest(client.name)
        ]
        seconds = max(0.0, min(ends) - now) if ends else _NEVER_RETRY
        return ShareSpent(client.max_held, round(seconds * 1000) / 1000)

    def lane_opened(self, lane: Lane) -> None:
        """A client has its first waiter in a pool."""
        self._lanes.setdefault(lane.client.name, {})[lane] = None

    def lane_closed(self, lane: Lane) -> None:
        """A client has no waiter in a pool any more."""
        lanes = self._lanes[lane.client.name]
        del lanes[lane]
        if not lanes:
            del self._lanes[lane.client.name]

    @staticmethod
    def _serve(lanes: Iterable[Lane], now: float) -> None:
        # `serve` may close lanes, so they are sorted into a list of their own.
        for lane in sorted(lanes, key=lambda lane: lane.first_place()):
            lane.serve(now)

    def _oldest(self, name: str) -> list[tuple[Key, Pool]]:
        return list(itertools.islice(self._held.get(name, {}).items(), _EXAMINED))
