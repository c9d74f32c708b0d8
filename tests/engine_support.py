"""For tests of pool and engine: a clock that the test advances, timers that it fires, calls that it drives by hand.

Nothing here sleeps. `Moment` is a clock. `HeldTimers` takes the place of the loop and keeps every timer until the test
fires it, so a timer can be late, early or never fire. `Call` drives one call of the engine as a connection would, and
can hang up between two steps. `SkewedLoop` is asyncio's loop with a clock that can be advanced, so that its real timers
fire at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final, Generic, ParamSpec, TypeVar, cast

from tornado.ioloop import IOLoop

from keypool.core.answers import Lease
from keypool.core.events import Listener
from keypool.core.index import BucketListener
from keypool.core.pool import Pool
from keypool.core.rules import PoolRules
from keypool.engine import Engine
from keypool.engine.embedded import EmbeddedEngine
from keypool.engine.journal import Commit

T = TypeVar("T")
P = ParamSpec("P")

BLOCK: Final = 60.0
KEEPALIVE: Final = 300.0
START: Final = 1_700_000_000.0
"""Where the tests' clocks start: a moment of the size that the server's has, for the sake of the floats."""
LATE: Final = 0.02
"""Seconds after a deadline by which its timer is due: the end of its 1/64 s, and a margin."""


class Moment:
    """A clock that changes only when the test advances it."""

    def __init__(self, at: float = START) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at

    def to(self, moment: float) -> None:
        """Advance the clock to this moment. It never goes back."""
        assert moment >= self.at, f"the clock would go back from {self.at} to {moment}"
        self.at = moment

    def on(self, seconds: float) -> None:
        """Advance the clock by so many seconds."""
        self.to(self.at + seconds)


def serial_texts(length: int = 20) -> Callable[[], str]:
    """A function that returns key texts in ascending order."""
    numbers = itertools.count(1)
    return lambda: f"{next(numbers):0{length}d}"


def make_pool(
    *,
    new_text: Callable[[], str] | None = None,
    random: Callable[[], float] = lambda: 0.0,
    on_change: Listener = lambda change, key, owner, origin: None,
    on_opened: BucketListener = lambda bucket: None,
    on_closed: BucketListener = lambda bucket: None,
    **rules: Any,
) -> Pool:
    """A pool with the default rules but for these. It serves the first available key, unless there is a `random`."""
    return Pool(
        PoolRules(**rules),
        new_text=new_text or serial_texts(),
        random=random,
        on_change=on_change,
        on_opened=on_opened,
        on_closed=on_closed,
    )


# ----------------------------------------------------------------------------------------------------- timers


class HeldTimer:
    """A timer that fires when the test fires it, or never."""

    def __init__(self, seconds: float, fire: Callable[[], None]) -> None:
        self.seconds = seconds
        self.fire = fire


class HeldTimers:
    """Takes the place of the IOLoop: timers fire only by `fire`, callbacks run only in `turns`."""

    def __init__(self) -> None:
        self.timers: dict[HeldTimer, None] = {}
        self.callbacks: deque[Callable[[], None]] = deque()

    def call_later(self, seconds: float, callback: Callable[..., None], *args: object) -> HeldTimer:
        """Keep a timer; `seconds` says when it would be due."""
        timer = HeldTimer(seconds, functools.partial(callback, *args))
        self.timers[timer] = None
        return timer

    def remove_timeout(self, timer: HeldTimer) -> None:
        """Cancel a timer. As on the loop, no effect if it has fired."""
        self.timers.pop(timer, None)

    def add_callback(self, callback: Callable[[], None]) -> None:
        """Keep a callback for `turns`."""
        self.callbacks.append(callback)

    def for_deadline(self, seconds: float) -> list[HeldTimer]:
        """The timers of deadlines so many seconds ahead. They are due at most `LATE` after them."""
        return [timer for timer in self.timers if seconds < timer.seconds <= seconds + LATE]

    def fire(self, *timers: HeldTimer) -> None:
        """Fire these timers in this order, or all of them, and then run the callbacks."""
        for timer in timers or tuple(self.timers):
            if self.timers.pop(timer, timer) is None:
                timer.fire()
        self.turns()

    def turns(self) -> None:
        """Run callbacks until there are none."""
        while self.callbacks:
            self.callbacks.popleft()()

    @property
    def as_loop(self) -> IOLoop:
        """This object, typed as an IOLoop."""
        return cast("IOLoop", self)


class SkewedLoop(asyncio.SelectorEventLoop):
    """asyncio's loop with a clock that can be advanced: its timers fire as if the time had passed."""

    def __init__(self) -> None:
        super().__init__()
        self.skew = 0.0

    def time(self) -> float:
        """The clock of the timers."""
        return super().time() + self.skew


# ------------------------------------------------------------------------------------------------------ calls


class Call(Generic[T]):
    """A call of an engine, without a task. It runs until it waits, and goes on when what it awaits is done."""

    def __init__(self, coroutine: Coroutine[Any, None, T]) -> None:
        self._coroutine = coroutine
        self._result: T | None = None
        self._error: BaseException | None = None
        self.waited_for: list[asyncio.Future[Any]] = []
        self.over = False
        self._step()

    def _step(self, future: object = None) -> None:
        if self.over:
            return
        try:
            awaited: Any = self._coroutine.send(None)
        except StopIteration as stop:
            self.over, self._result = True, stop.value
        except Exception as error:
            self.over, self._error = True, error
        else:
            awaited._asyncio_future_blocking = False
            self.waited_for.append(awaited)
            on_done = awaited.on_done if isinstance(awaited, Commit) else awaited.add_done_callback
            on_done(self._step)

    def hang_up(self) -> None:
        """Close the coroutine where it waits, as a connection that closes does."""
        self.over = True
        self._coroutine.close()

    @property
    def answer(self) -> T:
        """The result. Raises the error of the call; fails if it still waits."""
        assert self.over, "the call still waits"
        if self._error is not None:
            raise self._error
        return cast("T", self._result)


async def turns(count: int = 10) -> None:
    """Let the loop turn so many times, which is enough for everything that is ready to run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def turns_until(condition: Callable[[], object], what: str, most: int = 100_000) -> int:
    """Turns of the loop until the condition holds. Fails after `most` of them, naming `what`."""
    for turn in range(most):
        if condition():
            return turn
        await asyncio.sleep(0)
    raise AssertionError(f"after {most} turns of the loop never came true: {what}")


def make_engine(
    clock: Callable[[], float],
    timers: HeldTimers | None = None,
    *,
    loop: IOLoop | None = None,
    new_text: Callable[[], str] | None = None,
    start_timers: bool = True,
    **rules: Any,
) -> EmbeddedEngine:
    """An engine with this clock, on held timers if there are some, whose keys have ascending texts."""
    if timers is not None:
        loop = timers.as_loop
    new_text = new_text or serial_texts()
    return EmbeddedEngine(
        PoolRules(**rules), start_timers=start_timers, loop=loop, clock=clock, new_text=new_text
    )


Opener = Callable[..., AbstractAsyncContextManager[Engine]]
"""Opens an engine with the default rules but for these, and closes it in the end."""


@contextlib.asynccontextmanager
async def embedded(**rules: Any) -> AsyncIterator[Engine]:
    """An engine in this process, with a real clock and real timers. An Opener."""
    engine = EmbeddedEngine(PoolRules(**rules))
    try:
        yield engine
    finally:
        await engine.close()


class Held:
    """An engine whose clock and timers the test controls."""

    def __init__(self, **settings: Any) -> None:
        self.clock = Moment()
        self.timers = HeldTimers()
        self.engine = make_engine(self.clock, self.timers, **settings)
        self.pool = self.engine.pool

    def now_serving(self) -> list[tuple[int, str | None]]:
        """The held keys by id, with their owners."""
        return [
            (key.id, key.owner) for key in self.pool._by_id.walk(None) if key.release_deadline is not None
        ]

    def wait(self, owner: str, seconds: float = 30.0) -> Call[Lease]:
        """A pending acquire."""
        return Call(self.engine.acquire(owner, seconds))

    async def check(self) -> None:
        """The pool is consistent, and no key is available while a call waits."""
        await turns()
        self.pool.check()
        waiting = (await self.engine.stats()).waiting
        assert not waiting or not self.pool.available, (
            f"{waiting} wait although {self.pool.available} keys are available"
        )


async def now(call: Awaitable[Any]) -> Any:
    """The answer of a call that must not wait for anything."""
    made: Call[Any] = Call(call)  # type: ignore[arg-type]
    assert made.over, "the call waits for something"
    return made.answer


async def held_with(*owners: str, keys: int | None = None, **settings: Any) -> tuple[Held, list[Lease]]:
    """An engine whose keys these owners hold, one each."""
    held = Held(**settings)
    await now(held.engine.generate(len(owners) if keys is None else keys))
    return held, [await now(held.engine.acquire(owner, 0)) for owner in owners]


def open_held(path: Path) -> int:
    """A descriptor of a data file, which is created if there is none, as a server opens it for its writer."""
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


# ---------------------------------------------------------------------------------------------------- running


class _Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(logging.Formatter().format(record))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Fail if an error is logged meanwhile: the loop only logs exceptions of callbacks."""
    errors = _Errors()
    root = logging.getLogger()
    root.addHandler(errors)
    try:
        yield
    finally:
        root.removeHandler(errors)
    assert not errors.lines, "logged: " + "\n".join(errors.lines)


def on_loop(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """Run an async test on a loop of its own, and fail if an error is logged."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def main() -> None:
            await test(*args, **kwargs)

        with quiet():
            asyncio.run(main())

    return run
