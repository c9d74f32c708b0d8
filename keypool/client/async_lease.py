"""`async with pool.lease() as key`: as lease.py, with cancellation in the place of signals.

A task that is cancelled while it waits for a key leaves the queue, and listens for a moment whether it had
been served already: then that key is given back before the cancellation goes on. What the transport can't
tell (see sending.py) is settled by the server, which takes back what it can't deliver.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

from keypool.client import calls, lease
from keypool.client.async_caller import AsyncCaller, to_the_end
from keypool.client.clock import now
from keypool.client.errors import KeyPoolError, LeaseLost
from keypool.client.held import HeldKey
from keypool.client.loop_signals import LoopUnwinding
from keypool.client.shapes import LeasedKey
from keypool.client.wire import QUEUED_SECONDS, Answer, Leaving

_LISTEN_SECONDS = 1.0


class AsyncLease:
    """A context manager, for one `async with` at a time; each acquires anew."""

    def __init__(self, caller: AsyncCaller, owner: str | None, wait: float, signals: bool) -> None:
        self._caller = caller
        self._owner = owner
        self._wait = wait
        self._signals = signals
        self._open: tuple[HeldKey, LoopUnwinding] | None = None

    async def __aenter__(self) -> HeldKey:
        if self._open is not None:
            raise RuntimeError("this lease is open; ask the pool for another one")
        unwinding = LoopUnwinding(self._signals)
        unwinding.begin()
        try:
            held = await self._hold()
        except BaseException:
            unwinding.end()
            raise
        self._open = held, unwinding
        return held

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is None:
            return
        (held, unwinding), self._open = self._open, None
        try:
            lost = await to_the_end(give_back(self._caller, held))
        finally:
            unwinding.end()
        lease.tell(lost, error)

    async def _hold(self) -> HeldKey:
        leaving = Leaving()
        call = calls.acquire(self._owner, self._wait)
        task = asyncio.ensure_future(self._caller.call_timed(call, leaving))
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            await to_the_end(self._leave(task, leaving))
            raise
        return self._register(*task.result())

    def _register(self, leased: LeasedKey, answer: Answer) -> HeldKey:
        held = HeldKey(leased, answer, self._owner)
        caller = self._caller
        # At exit there is no loop any more.
        held.register(caller, lambda patience: lease.give_back_apart(caller.blocking(), held, patience))
        return held

    async def _leave(self, task: asyncio.Task[tuple[LeasedKey, Answer]], leaving: Leaving) -> None:
        """Give up an acquire; give back what it brought all the same."""
        if leaving.critical:
            await asyncio.wait({task}, timeout=max(0.0, leaving.sent_at + QUEUED_SECONDS - now()))
        leaving.leave()
        if leaving.critical:
            await asyncio.wait({task}, timeout=_LISTEN_SECONDS)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        if not task.cancelled() and task.exception() is None:
            await give_back(self._caller, self._register(*task.result()))


async def give_back(caller: AsyncCaller, held: HeldKey) -> LeaseLost | None:
    """Unblock the key under its lease number; what that shows about the lease. Never raises KeyPoolError."""
    text, patience = held._text, held.patience()  # noqa: SLF001 - its text, even if the lease is over
    if not held.begin_return():
        return None
    try:
        return held.returned(await caller.call(calls.unblock(text, held.lease), patience))
    except KeyPoolError as error:
        return held.not_returned(error)
