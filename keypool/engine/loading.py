"""The engine of a server that has no keys yet, because it is still reading them."""

from __future__ import annotations

from typing import Any, NoReturn

from keypool.core import errors
from keypool.ops.histogram import Histogram


class Loading:
    """Stands where the engine will: every call is told to come again."""

    name = "loading"
    degraded = None
    clock_steps = 0

    def ready(self) -> None:
        """Raise Loading."""
        raise errors.Loading

    def storage_up(self) -> bool:
        """Not yet."""
        return False

    def histograms(self) -> dict[str, Histogram]:
        """Nothing yet."""
        return {}

    def drain(self) -> None:
        """Nobody waits yet."""

    async def close(self) -> None:
        """Nothing is open yet."""

    def __getattr__(self, call: str) -> Any:
        return _refuse


async def _refuse(*args: Any) -> NoReturn:
    raise errors.Loading
