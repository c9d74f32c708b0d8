"""The asynchronous transport on aiohttp: connections are kept for the next request."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import aiohttp
from aiohttp.connector import Connection
from yarl import URL

from keypool.client.blocking import unreachable
from keypool.client.clock import now
from keypool.client.errors import AnswerLost, UnexpectedAnswer
from keypool.client.wire import LARGEST_ANSWER, Address, Answer, Request

_CONNECTIONS = 1000
_TRUSTED_SECONDS = 2.0  # as in blocking.py


class AiohttpTransport:
    """See the module. Lives on the event loop of its first request."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._session: aiohttp.ClientSession | None = None
        self._pid = os.getpid()

    async def exchange(self, request: Request) -> Answer:
        """The answer to a request."""
        session = self._open()
        sent_at = now()
        if request.leaving is not None:
            request.leaving.sending(_half_closer(request.wait))
        try:
            async with session.request(
                request.method,
                # As it is: a key's text may be one that looks like a path to be tidied up.
                URL(f"{self._address.scheme}://{self._address.authority}{request.target}", encoded=True),
                headers=request.headers,
                data=request.body,
                timeout=aiohttp.ClientTimeout(
                    total=2 * request.timeout + request.wait,
                    connect=request.timeout,
                    sock_connect=request.timeout,
                ),
                allow_redirects=False,
                ssl=True if self._address.ssl is None else self._address.ssl,
            ) as response:
                body = await _body(response)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise unreachable(self._address, getattr(error, "os_error", error)) from None
        except TimeoutError:
            raise AnswerLost("no answer in time") from None
        except (aiohttp.ClientResponseError, ValueError) as error:
            raise UnexpectedAnswer(
                f"what answers there doesn't speak HTTP ({type(error).__name__}): is the URL right?"
            ) from None
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            raise AnswerLost(f"the connection broke before the answer was whole: {error!r}") from None
        finally:
            if request.leaving is not None:
                request.leaving.over()
        return Answer(response.status, dict(response.headers), body, sent_at, now())

    async def close(self) -> None:
        """Close the connections."""
        session, self._session = self._session, None
        if session is not None and self._pid == os.getpid():
            await session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None or self._pid != os.getpid():
            self._pid = os.getpid()
            connector = _Connector(limit=_CONNECTIONS, keepalive_timeout=_TRUSTED_SECONDS)
            self._session = aiohttp.ClientSession(
                connector=connector,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
            )
            # aiohttp sends a DELETE again by itself. Whether that is safe is for retry.py to say, which must
            # know of it to read the answer right.
            session: Any = self._session
            session._retry_connection = False  # noqa: SLF001 - there is no public way
        return self._session


async def _body(response: aiohttp.ClientResponse) -> bytes:
    body = await response.content.read(LARGEST_ANSWER + 1)
    while not response.content.at_eof():
        part = await response.content.read(LARGEST_ANSWER + 1)
        body += part
        if len(body) > LARGEST_ANSWER:
            raise UnexpectedAnswer(f"an answer of more than {LARGEST_ANSWER} bytes", response.status)
    return body


class _Connector(aiohttp.TCPConnector):
    """Tells whoever asked for a connection which one it is."""

    async def connect(self, *args: Any, **options: Any) -> Connection:
        connection = await super().connect(*args, **options)
        mine = _connections.get(None)
        if mine is not None:
            mine.append(connection)
        return connection


_connections: ContextVar[list[Connection] | None] = ContextVar("connections of this request")


def _half_closer(wait: float) -> Callable[[], None]:
    """How this task's next request is left: a waiter who half-closes leaves the queue, and hears of it."""
    mine: list[Connection] = []
    _connections.set(mine)

    def half_close() -> None:
        for connection in mine:
            transport = connection.transport
            if wait and transport is not None and transport.can_write_eof():
                transport.write_eof()
                if connection.protocol is not None:
                    connection.protocol.force_close()  # half closed, it is of no use to the next request

    return half_close
