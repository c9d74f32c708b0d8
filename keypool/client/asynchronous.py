"""I/O of the asynchronous client: runs the steps of attempts.py over an httpx2 transport, on one loop.

A cancelled acquire is the hard case. The server may just have answered, and a key whose answer is not read stays
blocked until its deadline. So the request continues in the background, and a key that arrives is given back at
once. If no cancelled acquire has received a key for a second, the connection is closed, and the server removes
the waiter from its queue. (While keys still arrive, one may be in transit to the oldest waiter.) The cancellation
itself does not wait for that; `close` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import httpx2

from keypool.client.attempts import Answer, Pause, Send, Steps, failure
from keypool.client.blocking import LIMITS, verify
from keypool.client.errors import KeyPoolError, PoolClosed
from keypool.client.settings import Settings

T = TypeVar("T")

_LATE_ANSWER = 1.0
"""Seconds without a key for any cancelled acquire, after which their connections are closed."""

_AFTER_TRANSPORT = 0.05
"""Seconds added to the limit of a whole request, so that a timeout of one of its parts, which tells more about what
happened, comes first."""


class AsyncRunner:
    """Runs steps in tasks of one event loop, over `transport` or one that it makes, and closes either."""

    def __init__(
        self,
        settings: Settings,
        ssl_context: ssl.SSLContext | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self.settings = settings
        self._transport = transport or httpx2.AsyncHTTPTransport(
            verify=verify(settings, ssl_context), limits=LIMITS
        )
        self._closed = False
        self._in_progress: set[asyncio.Timeout] = set()
        self._background: set[asyncio.Task[Any]] = set()
        self._late_key_at = -math.inf

    async def run(self, steps: Steps[T], wake: asyncio.Event | None = None) -> T:
        """Run steps, and return their result. Raises KeyPoolError. Setting `wake` ends a pause early."""
        try:
            step = next(steps)
            while True:
                try:
                    answer = await (self._send(step) if isinstance(step, Send) else self._pause(step, wake))
                except KeyPoolError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    async def run_to_end(self, steps: Steps[T]) -> T:
        """Like `run`, but if the caller is cancelled, the steps continue in the background."""
        task = asyncio.ensure_future(self.run(steps))
        self._in_background(task)
        return await asyncio.shield(task)

    async def acquire(self, steps: Steps[T], give_back: Callable[[T], Coroutine[Any, Any, object]]) -> T:
        """Like `run`, but if the caller is cancelled, a key that still arrives is given back in the background."""
        task = asyncio.ensure_future(self.run(steps))
        task.add_done_callback(_retrieved)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._in_background(asyncio.ensure_future(self._abandon(task, give_back)))
            raise

    async def _abandon(
        self, task: asyncio.Task[T], give_back: Callable[[T], Coroutine[Any, Any, object]]
    ) -> None:
        """Wait for the result of a cancelled acquire, and give it back."""
        loop = asyncio.get_running_loop()
        since = loop.time()
        while not task.done() and (left := max(since, self._late_key_at) + _LATE_ANSWER - loop.time()) > 0:
            await asyncio.wait({task}, timeout=left)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        if not task.cancelled() and task.exception() is None:
            self._late_key_at = loop.time()
            await give_back(task.result())

    async def close(self) -> None:
        """Finish background work, then close all connections; calls in progress raise PoolClosed."""
        while self._background:
            await asyncio.wait(self._background)
        self._closed = True
        for scope in list(self._in_progress):
            scope.reschedule(asyncio.get_running_loop().time())
        await self._transport.aclose()

    def _in_background(self, task: asyncio.Task[Any]) -> None:
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        task.add_done_callback(_retrieved)

    async def _send(self, send: Send) -> Answer:
        self._check()
        limit = None if send.timeout == math.inf else send.timeout
        sent = False

        async def trace(event: str, _info: object) -> None:
            nonlocal sent
            sent = sent or "send_request_headers" in event

        request = send.request(
            timeout=dict.fromkeys(("connect", "read", "write", "pool"), limit), trace=trace
        )
        try:
            async with self._limited(None if limit is None else limit + _AFTER_TRANSPORT):
                response = await self._transport.handle_async_request(request)
                try:
                    body = await response.aread()
                finally:
                    await response.aclose()
        except Exception as error:
            self._check()
            if isinstance(error, TimeoutError) and not sent:
                # A busy loop runs the timers of the part and of the whole in one turn, and the whole's wins.
                error = httpx2.ConnectTimeout("no connection in time")
            raise failure(error, self.settings.url) from None
        return Answer(response.status_code, response.headers, body)

    async def _pause(self, pause: Pause, wake: asyncio.Event | None) -> None:
        wake = asyncio.Event() if wake is None else wake
        with contextlib.suppress(TimeoutError):
            async with self._limited(pause.seconds):
                await wake.wait()
        wake.clear()
        self._check()

    @contextlib.asynccontextmanager
    async def _limited(self, seconds: float | None) -> AsyncIterator[None]:
        """Limit the block to so many seconds, and until `close`. Raises TimeoutError."""
        self._check()
        async with asyncio.timeout(seconds) as scope:
            self._in_progress.add(scope)
            try:
                yield
            finally:
                self._in_progress.discard(scope)

    def _check(self) -> None:
        if self._closed:
            raise PoolClosed("this client was closed")


def _retrieved(task: asyncio.Task[Any]) -> None:
    """Retrieve a task's exception, or asyncio would log it where nobody awaits the task."""
    if not task.cancelled():
        task.exception()
