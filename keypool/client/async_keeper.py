"""The keeper of an asynchronous client: a task that keeps keys alive."""

from __future__ import annotations

import asyncio
from typing import Any, Self, cast

from keypool.client.async_caller import AsyncCaller
from keypool.client.calls import Call
from keypool.client.errors import KeyPoolError
from keypool.client.rounds import Asked, Rounds, Told
from keypool.client.shapes import Done, KeptAlive, KeyLike


class AsyncKeeper:
    """Keeps keys alive from `start`, or `async with`, to `stop`, in one task.

    `on_dead(key)` is called on the loop, once for each key that the server doesn't know any more;
    `on_error(error)` after each round that failed, which is tried again until it succeeds.
    """

    def __init__(self, caller: AsyncCaller, rounds: Rounds) -> None:
        self._caller = caller
        self._rounds = rounds
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def keys(self) -> list[str]:
        """The keys that are kept alive, without those that died."""
        return list(self._rounds.keys)

    @property
    def error(self) -> KeyPoolError | None:
        """Why the latest round failed; None if it didn't."""
        return self._rounds.error

    @property
    def running(self) -> bool:
        """Whether the task runs."""
        return self._task is not None and not self._task.done()

    def add(self, key: KeyLike) -> None:
        """Keep one more alive, from now on."""
        self._rounds.add(key)
        self._wake.set()

    def discard(self, key: KeyLike) -> None:
        """Leave a key to itself, if it is kept."""
        self._rounds.discard(key)

    def start(self) -> Self:
        """Begin, with a round at once. Raises RuntimeError if it was started before."""
        if self._task is not None:
            raise RuntimeError("a keeper is started once; make another one")
        self._task = asyncio.ensure_future(self._run())
        return self

    async def stop(self) -> None:
        """End, and wait for the task; a call under way is cut off. May be called again."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})

    async def __aenter__(self) -> Self:
        return self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # -- in the task

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        await self._drive(self._rounds.round())
        next_at = self._next(loop)
        while True:
            await self._wait(None if next_at is None else next_at - loop.time())
            if next_at is not None and loop.time() >= next_at:
                await self._drive(self._rounds.round())
                next_at = self._next(loop)
            elif self._rounds.fresh:
                await self._drive(self._rounds.fresh_round())
                next_at = self._next(loop) if next_at is None or self.error is not None else next_at

    def _next(self, loop: asyncio.AbstractEventLoop) -> float | None:
        pause = self._rounds.pause()
        return None if pause is None else loop.time() + pause

    async def _wait(self, seconds: float | None) -> None:
        if not self._rounds.fresh:
            try:
                async with asyncio.timeout(seconds):
                    await self._wake.wait()
            except TimeoutError:
                return
        self._wake.clear()

    async def _drive(self, asked: Asked) -> None:
        try:
            call = next(asked)
            while True:
                call = asked.send(await self._answer(call))
        except StopIteration:
            return

    async def _answer(self, call: Call[Done] | Call[KeptAlive]) -> Told:
        try:
            result: Done | KeptAlive = await self._caller.call(cast("Call[Any]", call), patience=0)
        except KeyPoolError as error:
            return error
        return result
