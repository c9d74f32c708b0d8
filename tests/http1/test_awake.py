"""When the loop stays awake for the next call, and that it sleeps otherwise, on a clock of the test's."""

from __future__ import annotations

import asyncio

import pytest

from keypool.http.http1.busy_poll import MOMENT, QUICK, Awake


class Watched:
    """An `Awake` on a clock that stands still, unless a look at it takes time."""

    def __init__(self, cores: int = 2) -> None:
        self.now = 1000.0
        self.looks = 0
        self.a_look = 0.0
        self.awake = Awake(asyncio.get_running_loop(), self._time, cores)

    def _time(self) -> float:
        self.looks += 1
        self.now += self.a_look
        return self.now

    def answers(self, *gaps: float) -> None:
        """Somebody is answered, and again after each of these times."""
        for gap in (0.0, *gaps):
            self.now += gap
            self.awake.answered()
        self.looks = 0

    async def turns(self, count: int) -> int:
        """In how many of so many turns of the loop it was looked for the next call."""
        before = self.looks
        for _ in range(count):
            await asyncio.sleep(0)
        return self.looks - before


async def test_after_quick_callers_each_turn_looks_for_the_next_call() -> None:
    """For a moment, and then the loop sleeps."""
    watched = Watched()
    watched.answers(QUICK / 2)
    assert await watched.turns(20) == 20
    watched.a_look = MOMENT / 4
    assert await watched.turns(20) <= 5
    assert await watched.turns(20) == 0


async def test_a_call_in_time_keeps_it_awake_for_another_moment() -> None:
    """Counted from its answer; and it is looked for once a turn, however many have been answered."""
    watched = Watched()
    watched.answers(*[QUICK / 2] * 5)
    for _ in range(5):
        assert await watched.turns(5) == 5
        watched.answers(MOMENT * 0.9)
    assert await watched.turns(5) == 5


@pytest.mark.parametrize("gaps", [(), (QUICK * 1.1,), (QUICK * 1.1, 60.0)])
async def test_nobody_is_waited_for_who_takes_longer(gaps: tuple[float, ...]) -> None:
    """The first call of all, and those of callers that are far away or have other things to do."""
    watched = Watched()
    watched.answers(*gaps)
    assert await watched.turns(20) == 0


async def test_one_processor_is_left_to_the_caller() -> None:
    """Who would be waited for couldn't come meanwhile."""
    watched = Watched(cores=1)
    watched.answers(0.0, QUICK / 2)
    assert await watched.turns(20) == 0
