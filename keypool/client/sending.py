"""How an asynchronous client sends: a transport of one method, and the two that there are.

aiohttp is taken if it is installed, since it keeps connections open; Tornado's own client opens one for each
request. Whoever wants another gives `AsyncKeyPool` an object with these two methods. Both libraries are
imported when the first request is made, not before.

| | aiohttp | Tornado |
| --- | --- | --- |
| connections | kept for the next request | one a request |
| a request that is given up | the connection is closed | likewise, or half closed, to hear what came of it |
"""

from __future__ import annotations

import importlib.util
from typing import Protocol

from keypool.client.wire import Address, Answer, Request


class Transport(Protocol):
    """Sends one request once. See wire.py for the failures that it raises."""

    async def exchange(self, request: Request) -> Answer:
        """The answer, whatever its status. Raises Unreachable, AnswerLost, UnexpectedAnswer."""
        ...

    async def close(self) -> None:
        """Close what is open. No request follows."""
        ...


def best_transport(address: Address) -> Transport:
    """aiohttp's if it is installed, else Tornado's. Raises ImportError if neither is."""
    if importlib.util.find_spec("aiohttp") is not None:
        from keypool.client.by_aiohttp import AiohttpTransport  # noqa: PLC0415 - where there is one

        return AiohttpTransport(address)
    if importlib.util.find_spec("tornado") is not None:
        from keypool.client.by_tornado import TornadoTransport  # noqa: PLC0415 - where there is one

        return TornadoTransport(address)
    raise ImportError("AsyncKeyPool needs aiohttp or tornado: pip install aiohttp")
