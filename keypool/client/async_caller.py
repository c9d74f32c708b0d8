"""Making a call, asynchronously: as caller.py, with nothing left behind by a cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from keypool.client.caller import Caller, checked
from keypool.client.calls import Call
from keypool.client.errors import KeyPoolError, PoolClosed
from keypool.client.retry import Attempts, Retry
from keypool.client.sending import Transport
from keypool.client.wire import Address, Answer, Leaving

T = TypeVar("T")


class AsyncCaller:
    """What makes calls to one server, on one event loop."""

    def __init__(
        self, address: Address, token: str | None, timeout: float, retry: Retry, transport: Transport
    ) -> None:
        self.address = address
        self.retry = retry
        self.timeout = timeout
        self._token = checked(token)
        self._transport = transport
        self._closed = False

    def blocking(self) -> Caller:
        """A synchronous caller of the same server: for when the event loop is gone."""
        return Caller(self.address, self._token, self.timeout, self.retry)

    async def call(self, call: Call[T], patience: float | None = None) -> T:
        """The result. Raises KeyPoolError."""
        return (await self.call_timed(call, patience=patience))[0]

    async def call_timed(
        self, call: Call[T], leaving: Leaving | None = None, patience: float | None = None
    ) -> tuple[T, Answer]:
        """The result and the answer it came in. `patience` seconds, if less than the usual, for retries."""
        retry = self.retry
        if patience is not None:
            retry = replace(retry, seconds=max(0.0, min(retry.seconds, patience)))
        attempts = Attempts(call, self.address, self._token, self.timeout, retry, leaving=leaving)
        while (pause := await self._attempt(attempts)) is not None:
            if leaving is not None:
                leaving.failed()
            await asyncio.sleep(pause)
        return attempts.result, attempts.answer

    async def _attempt(self, attempts: Attempts[T]) -> float | None:
        if self._closed:
            raise PoolClosed("this client was closed")
        try:
            answer = await self._transport.exchange(attempts.request())
        except KeyPoolError as error:
            return attempts.failed(error)
        return attempts.answered(answer)

    async def close(self) -> None:
        """Close all connections."""
        self._closed = True
        await self._transport.close()


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Run something to its end, even if the task that awaits it is cancelled, which comes after."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.cancelled() or task.exception()  # heard, so that nobody logs it
        raise cancelled
    return task.result()
