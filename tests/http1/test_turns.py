"""Time is shared fairly among connections with a backlog, and others don't wait for these."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, cast

import pytest
from tornado import web

from http1.harness import request, serve, until
from keypool.http.http1 import ANSWERED, RawDelegate, Request
from keypool.http.http1.turns import BUDGET, QUANTUM, Turns

LONG = 3.3 * QUANTUM
SHORT = QUANTUM / 10


class Loop:
    """Time that passes only when a call takes some, and a loop whose iterations the test makes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.flushed = 0
        self._ready: list[Callable[[], None]] = []
        self.turns = Turns(cast(Any, self), self._flush, lambda: self.now)

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._ready.append(callback)

    def _flush(self) -> None:
        self.flushed += 1

    def iterate(self, arriving: tuple[Flow, ...] = ()) -> None:
        """What was to be called soon, then what has arrived, as loops do."""
        ready, self._ready = self._ready, []
        for callback in ready:
            callback()
        for flow in arriving:
            flow.arrive()

    @property
    def idle(self) -> bool:
        return not self._ready


class Flow:
    """A connection whose calls take so long each, by the fake clock. `calls` is how many it still has."""

    def __init__(self, loop: Loop, seconds: float, calls: int = 1) -> None:
        self.loop, self.seconds, self.calls = loop, seconds, calls
        self.debt = self.time = 0.0
        self.served = 0
        self.answered_at: list[float] = []

    def arrive(self, calls: int = 0) -> None:
        """As `Connection.data_received` does."""
        self.calls += calls
        turns = self.loop.turns
        if turns.over or self.debt:
            turns.queue(self, backlog=self.debt > 0)
        else:
            started = turns.clock()
            self.run()
            turns.spend(self, started)

    def run(self) -> None:
        began = self.loop.now
        while self.calls and self.loop.now - began < QUANTUM:
            self.calls -= 1
            self.served += 1
            self.loop.now += self.seconds
            self.time += self.seconds
            self.answered_at.append(self.loop.now)
        if self.calls:
            self.loop.turns.queue(self, backlog=True)


def test_backlogs_share_the_time_whatever_their_calls_take() -> None:
    """After any number of turns, none is ahead of another by more than a quantum and a call."""
    loop = Loop()
    flows = [Flow(loop, seconds, 100_000) for seconds in (LONG, SHORT, QUANTUM, 20 * QUANTUM)]
    loop.iterate(tuple(flows))
    for turn in range(3000):
        loop.iterate()
        if turn > 100:
            times = [flow.time for flow in flows]
            assert max(times) - min(times) <= 22 * QUANTUM


def test_a_caller_with_one_request_passes_those_with_many() -> None:
    """It waits for a quantum of them, not for each one's, and they go on beside it."""
    loop = Loop()
    flood = [Flow(loop, SHORT, 1_000_000) for _ in range(100)]
    loop.iterate(tuple(flood))
    for _ in range(50):
        loop.iterate()
    caller = Flow(loop, SHORT, 0)
    before = sum(flow.served for flow in flood)
    for number in range(200):
        caller.calls, asked_at = 1, loop.now
        loop.iterate((caller,))
        assert caller.served == number + 1
        assert caller.answered_at[-1] - asked_at <= 2 * QUANTUM + SHORT
    assert sum(flow.served for flow in flood) - before >= 200


def test_a_turn_ends_when_its_time_is_used_up() -> None:
    """However many connections speak in the same moment: the others' bytes wait for the next turn, and none is lost."""
    loop = Loop()
    flows = [Flow(loop, 0.8 * QUANTUM) for _ in range(1000)]
    loop.iterate(tuple(flows))
    longest = loop.now
    while not loop.idle:
        before = loop.now
        loop.iterate()
        longest = max(longest, loop.now - before)
    assert longest <= BUDGET + QUANTUM
    assert [flow.served for flow in flows] == [1] * 1000
    assert [flow.answered_at for flow in flows] == sorted(flow.answered_at for flow in flows)


def test_a_long_call_ends_the_turn_and_leaves_a_debt() -> None:
    """A call that can't be interrupted is the last of its turn, and its connection then waits for others."""
    loop = Loop()
    long, other = Flow(loop, 3 * BUDGET), Flow(loop, SHORT)
    loop.iterate((long, other))
    assert (long.served, other.served) == (1, 0)
    long.arrive(1)
    loop.iterate()
    assert (long.served, other.served) == (1, 1)
    while not loop.idle:
        loop.iterate()
    assert long.served == 2


def test_an_exception_does_not_end_the_turns() -> None:
    """The loop reports the exception, and the others are served."""
    loop = Loop()

    class Failing(Flow):
        def run(self) -> None:
            raise ZeroDivisionError

    flows = [Failing(loop, SHORT), Flow(loop, SHORT)]
    for flow in flows:
        loop.turns.queue(flow, backlog=True)
    with pytest.raises(ZeroDivisionError):
        loop.iterate()
    loop.iterate()
    assert flows[1].served == 1


def test_answers_leave_before_the_backlog_is_served() -> None:
    """And what the backlog was answered leaves before the loop looks for news."""
    loop = Loop()
    flow = Flow(loop, SHORT)
    loop.turns.queue(flow, backlog=True)
    flow.run = lambda: flushes.append(loop.flushed)  # type: ignore[method-assign]
    flushes: list[int] = []
    loop.iterate()
    assert flushes == [1]
    assert loop.flushed == 2


class Working(web.Application):
    """Works a while on each request to /work."""

    def __init__(self) -> None:
        super().__init__([])
        self.worked = 0

    def start_raw_request(self, request: Request) -> RawDelegate:
        if request.target.startswith(b"/work"):
            self.worked += 1
            end = time.monotonic() + 1.5 * QUANTUM
            while time.monotonic() < end:
                pass
        request.respond(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        return ANSWERED


@pytest.mark.parametrize("padding", [10, 4000])
async def test_a_caller_makes_progress_beside_a_flood(padding: int) -> None:
    """With as many requests in a read as there may be, or few: a handful of them is served for each of its own."""
    application = Working()
    async with serve("http1", application) as served:
        floods, caller = [await served.connect() for _ in range(3)], await served.connect()
        for flood in floods:
            flood.writer.write(request("/work", "X: " + "x" * padding) * 4000)
        await until(lambda: application.worked > 3)
        before = application.worked
        for _ in range(30):
            assert (await caller.get("/")).status == 200
        assert application.worked - before <= 30 * 10
        for flood in floods:
            flood.reset()


async def test_all_of_a_long_pipeline_is_answered() -> None:
    """In order and once each, though it takes many turns and the reading stops in between."""
    application = Working()
    async with serve("http1", application) as served:
        client = await served.connect()
        sending = asyncio.ensure_future(
            client.send(request("/work", "X: " + "x" * 3000) * 200 + request("/", "Connection: close"))
        )
        for _ in range(201):
            assert (await client.response()).status == 200
        assert await client.closed()
        await sending
        assert application.worked == 200
