"""Load with everything that can go on over HTTP: connections come and go, and so do keys and waiters.

Each connection makes a few calls and is closed; the second pool has so few keys that most who ask it wait: some
are served, some give up, and some hang up while they wait.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from bench.load import Address, Connections, GoOn, Round, Script, request
from bench.process import on_loop
from bench.scripts import ACQUIRE, GENERATE, KEYS, path, unblock

_CONNECTIONS = 16
_WAITERS = 12
_CALLS = 50  # steps of a connection before it is closed
_ALLOWED = frozenset({404, 409})

_decode = msgspec.json.Decoder().decode


@dataclass
class Churned:
    """What was done, and how it was answered."""

    requests: int
    connections: int
    notes: str


def churn(servers: Sequence[Address], calls: int, seed: int) -> Churned:
    """About so many calls, in a process of its own. The second server has few keys."""
    return on_loop(_churn(servers, calls, seed))


async def _churn(servers: Sequence[Address], calls: int, seed: int) -> Churned:
    done = _Done(random.Random(seed))
    while done.requests < calls:
        wide = await Connections.open(servers[0], _CONNECTIONS)
        narrow = await Connections.open(servers[1], _WAITERS)
        hanging = asyncio.ensure_future(_hang_up(servers[1]))
        for round in await asyncio.gather(
            wide.run(done.calls, 60, _ALLOWED), narrow.run(done.waits, 60, _ALLOWED)
        ):
            done.add(round)
        await hanging
        wide.close()
        narrow.close()
        done.connections += _CONNECTIONS + _WAITERS + 1
    statuses = ", ".join(f"{count:,} x {status}" for status, count in sorted(done.statuses.items()))
    return Churned(done.requests, done.connections, f"of the last part {statuses}")


class _Done:
    """The scripts, and what has become of them."""

    def __init__(self, draw: random.Random) -> None:
        self.requests = 0
        self.connections = 0
        self.statuses: Counter[int] = Counter()
        self._draw = draw
        self._texts: list[str] = []

    def add(self, measured: Round) -> None:
        """Take a round in."""
        if measured.errors:
            raise AssertionError(f"{measured.errors} wrong answers")
        self.requests += measured.requests

    def calls(self, going: GoOn) -> Script:
        """Make keys, keep some alive, acquire, unblock, delete, read."""
        for _ in range(_CALLS):
            share = self._draw.random()
            if share < 0.25 or not self._texts:
                status, body = yield GENERATE
                self._texts.append(_decode(body)["key"])
            elif share < 0.55:
                status, body = yield ACQUIRE
                if status == 200 and self._draw.random() < 0.8:
                    status, _ = yield unblock(_decode(body), with_lease=True)
            elif share < 0.75:
                status, _ = yield request(path(self._some(), "keepalive"))
            elif share < 0.85:
                status, _ = yield request(f"{KEYS}/{self._some(forget=True)}", method="DELETE")
            elif share < 0.95:
                status, _ = yield request(f"{KEYS}/{self._some()}", method="GET")
            else:
                status, _ = yield request(f"{KEYS}?order=expiry&limit=20", method="GET")
            self.statuses[status] += 1

    def waits(self, going: GoOn) -> Script:
        """Wait for a key, a short time or a longer one, and give it back."""
        for _ in range(_CALLS // 5):
            wait = self._draw.choice((0.001, 0.005, 0.5))
            status, body = yield request(f"{KEYS}/acquire", msgspec.json.encode({"wait": wait}))
            self.statuses[status] += 1
            if status == 200:
                yield unblock(_decode(body), with_lease=True)

    def _some(self, *, forget: bool = False) -> str:
        place = int(self._draw.random() * len(self._texts))
        if forget:
            self._texts[place], self._texts[-1] = self._texts[-1], self._texts[place]
            return self._texts.pop()
        return self._texts[place]


async def _hang_up(server: Address) -> None:
    """Ask for a key with a long wait, and close the connection while it waits, or as it is served."""
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request(f"{KEYS}/acquire", b'{"wait":30}'))
    await asyncio.sleep(0.003)
    writer.transport.abort()
