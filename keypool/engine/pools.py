"""All pools of a server whose engine serves only one of them."""

from __future__ import annotations

from keypool.core.errors import UnknownPool
from keypool.core.rules import DEFAULT_POOL
from keypool.engine import Engine


class OnePool:
    """The pool `default` alone. See the protocol Pools."""

    def __init__(self, default: Engine) -> None:
        self.default = default

    def get(self, name: str) -> Engine:
        """The pool `default`. Raises UnknownPool for any other name."""
        if name != DEFAULT_POOL:
            raise UnknownPool
        return self.default

    def names(self) -> list[str]:
        """One name."""
        return [DEFAULT_POOL]

    def drain(self) -> None:
        """Answer all waiters with Draining, and admit no more."""
        self.default.drain()

    async def close(self) -> None:
        """Make durable what isn't durable yet, and stop."""
        await self.default.close()
