"""Workers that share the keys of a rate-limited service: random rotation beside outcomes, in simulated time.

The service allows each key so many requests a minute, in windows that begin with a key's first request, and answers one
that is too many with 429 and a Retry-After until the window's end. Each worker makes a request, pauses, makes the next,
and so on. Together they want about twice what the service allows. They lease keys from the pool's own rules on a clock
that jumps from event to event, and differ in what they report: nothing, so that the next worker gets a refused key;
`rate_limited` with the Retry-After after a refusal; or, where the service says how many requests are left,
`rate_limited` with the last allowed one. Or they report nothing, and the pool has the service's limit as its pace.
"served" is what the service didn't refuse. Half an hour takes seconds.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.report import Table, Targets, span
from keypool.core.keys import Key
from keypool.core.outcomes import Outcome, Report
from keypool.core.pace import Pace
from keypool.core.pool import Pool
from keypool.core.rules import PoolRules

QUICK = ["--minutes=10"]
REFUSED, SERVED = 0.07, 0.95  # of the requests, and of what the service allows
_WINDOW = 60.0
_ANSWER, _REFUSAL = 1.0, 0.05  # seconds until the service answers
_OK = Report(Outcome.OK)
POLICIES = (
    "no outcome",
    "outcome after a refusal",
    "outcome with the last one allowed",
    "no outcome, with a pace",
)


@dataclass
class Service:
    """Counts the requests of each key in its current window."""

    limit: int
    windows: dict[int, tuple[float, int]] = field(default_factory=dict)

    def request(self, key: int, now: float) -> tuple[int, float]:
        """How many requests are left after this one, below 0 if it is refused; whole seconds until there are more."""
        began, count = self.windows.get(key, (now, 0))
        if now >= began + _WINDOW:
            began, count = now, 0
        self.windows[key] = (began, min(count + 1, self.limit))
        return self.limit - count - 1, -(-(began + _WINDOW - now) // 1)


@dataclass
class Found:
    """What came of one policy. `waited` are seconds for a key, over all requests."""

    requests: int = 0
    refused: int = 0
    waited: float = 0.0


class Simulation:
    """Workers on a pool, event by event."""

    def __init__(self, policy: str, keys: int, limit: int, workers: int, pause: float) -> None:
        self.found = Found()
        self._policy, self._pause = policy, pause
        self._random = random.Random(1)
        texts = map("{:020}".format, itertools.count(1))
        # A microsecond over the window, for floats.
        pace = Pace(limit, _WINDOW + 1e-6) if policy == POLICIES[3] else None
        rules = PoolRules(keepalive_seconds=1e9, pace=pace)
        self._pool = Pool(rules, new_text=lambda: next(texts), random=self._random.random)
        self._service = Service(limit)
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self._waiting: deque[float] = deque()  # since when
        self._wakes_at = 0.0
        for _ in range(keys):
            self._pool.generate(0.0)
        for _ in range(workers):
            self._work_later()

    def run(self, seconds: float) -> Found:
        """Let so much time pass."""
        while self._events[0][0] < seconds:
            self._now, _, happen = heapq.heappop(self._events)
            happen()
        return self.found

    def _at(self, moment: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (moment, next(self._number), happen))

    def _work_later(self) -> None:
        self._at(self._now + self._random.expovariate(1 / self._pause), self._work)

    def _work(self) -> None:
        self._waiting.append(self._now)
        self._serve()

    def _serve(self) -> None:
        while self._waiting:
            key = self._pool.acquire(self._now, None)
            if key is None:
                ready = self._pool.next_release_deadline()
                if ready is not None and not self._now < self._wakes_at <= ready:
                    self._wakes_at = ready
                    self._at(ready, self._serve)
                return
            self.found.waited += self._now - self._waiting.popleft()
            self._ask(key, key.lease)

    def _ask(self, key: Key, lease: int) -> None:
        left, seconds = self._service.request(key.id, self._now)
        self.found.requests += 1
        self.found.refused += left < 0
        report = None
        if self._policy in POLICIES[1:3]:
            limited = left < 0 or (left == 0 and self._policy == POLICIES[2])
            report = Report(Outcome.RATE_LIMITED, seconds) if limited else _OK
        self._at(
            self._now + (_REFUSAL if left < 0 else _ANSWER), lambda: self._answered(key.id, lease, report)
        )

    def _answered(self, id: int, lease: int, report: Report | None) -> None:
        self._pool.unblock(self._pool.find_id(id, self._now), lease, self._now, report)
        self._work_later()
        self._serve()


def main(arguments: Sequence[str]) -> int:
    """Simulate, print, judge."""
    parser = argparse.ArgumentParser("bench limits", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--keys", type=int, default=40)
    parser.add_argument(
        "--limit", type=int, default=16, help="requests a minute that the service allows a key"
    )
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument(
        "--pause", type=float, default=9.0, help="seconds between a worker's requests, on average"
    )
    parser.add_argument("--minutes", type=int, default=30, help="simulated")
    options = parser.parse_args(arguments)
    table = Table(
        "workers report", "requests", "refused", "served a minute", "of the limit", "waited for a key"
    )
    targets, allowed = Targets(), options.keys * options.limit
    for policy in POLICIES:
        simulation = Simulation(policy, options.keys, options.limit, options.workers, options.pause)
        each = simulation.run(60.0 * options.minutes)
        served = (each.requests - each.refused) / options.minutes
        refused = each.refused / each.requests
        share, waited = f"{refused:.1%}", span(each.waited / each.requests)
        table.row(policy, f"{each.requests:,}", share, f"{served:,.0f}", f"{served / allowed:.0%}", waited)
        if policy != POLICIES[0]:
            most = 0.0 if policy == POLICIES[3] else REFUSED
            targets.check(f"{policy}, refused", refused <= most, share, f"at most {most:.0%}")
            targets.at_least(f"{policy}, served of what is allowed", served / allowed, SERVED)
    print(f"\n{table}\n")
    return targets.status
