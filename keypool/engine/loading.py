"""The engine of a server that has no keys yet, because it is still reading them."""

from __future__ import annotations

from typing import Any, NoReturn

from keypool.errors import StorageUnavailable


class Loading:
    """Stands where the engine will: every call is told to come again."""

    name = "loading"

    def ready(self) -> None:
        """Raise StorageUnavailable."""
        raise _not_yet()

    def drain(self) -> None:
        """Nobody waits yet."""

    async def close(self) -> None:
        """Nothing is open yet."""

    def __getattr__(self, call: str) -> Any:
        return _refuse


async def _refuse(*args: Any) -> NoReturn:
    raise _not_yet()


def _not_yet() -> StorageUnavailable:
    return StorageUnavailable("the server is loading its keys; ask again in a moment")
