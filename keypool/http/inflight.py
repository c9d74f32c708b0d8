"""How many requests are being answered: what a graceful stop waits for."""

from __future__ import annotations

import asyncio


class InFlight:
    """A count, and somebody who may wait for it to be none. Hot paths count by themselves."""

    def __init__(self) -> None:
        self.count = 0
        self.idle: asyncio.Future[None] | None = None

    def enter(self) -> None:
        """A request has come."""
        self.count += 1

    def leave(self) -> None:
        """It was answered, or its caller is gone."""
        self.count -= 1
        if self.count == 0:
            self.tell_idle()

    def tell_idle(self) -> None:
        """There is none any more."""
        if self.idle is not None and not self.idle.done():
            self.idle.set_result(None)

    async def wait_idle(self, seconds: float) -> bool:
        """Wait until no request is in flight, `seconds` at most; whether it came to that."""
        if self.count:
            self.idle = asyncio.get_running_loop().create_future()
            await asyncio.wait([self.idle], timeout=seconds)
        return self.count == 0
