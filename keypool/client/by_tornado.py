"""The asynchronous transport on Tornado's client: a connection a request.

Tornado's client can't give a request up: whoever stops waiting for the answer leaves the request running, and
an acquire that waits would in the end lease a key to nobody. So each request has a client of its own, which
costs little as connections aren't reused anyway, with a TCPClient that keeps hold of the stream. That stream
can be closed, or half closed; and whether there is one tells if the request can have been sent.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Any

from tornado.httpclient import HTTPError, HTTPRequest, HTTPResponse
from tornado.iostream import IOStream
from tornado.simple_httpclient import HTTPTimeoutError, SimpleAsyncHTTPClient
from tornado.tcpclient import TCPClient

from keypool.client.blocking import unreachable
from keypool.client.clock import now
from keypool.client.errors import AnswerLost, KeyPoolError, UnexpectedAnswer
from keypool.client.wire import LARGEST_ANSWER, Address, Answer, Request


class TornadoTransport:
    """See the module."""

    def __init__(self, address: Address) -> None:
        self._address = address

    async def exchange(self, request: Request) -> Answer:
        """The answer to a request."""
        client = SimpleAsyncHTTPClient(force_instance=True, max_body_size=LARGEST_ANSWER)
        client.tcp_client.close()
        client.tcp_client = stream = _StreamKeeper(resolver=client.resolver)
        sent_at = now()
        if request.leaving is not None:
            request.leaving.sending(stream.half_close if request.wait else _nothing)
        try:
            response = await client.fetch(self._fetched(request), raise_error=False)
        except HTTPError as error:
            raise self._failure(error, stream) from None
        except (OSError, ValueError) as error:
            raise self._failure(error, stream) from None
        finally:
            if request.leaving is not None:
                request.leaving.over()
            stream.abort()
            client.close()
        if response.code == 599:
            raise self._failure(response.error, stream)
        return _answer(response, sent_at)

    async def close(self) -> None:
        """Nothing is open between requests."""

    def _fetched(self, request: Request) -> HTTPRequest:
        body = request.body
        return HTTPRequest(
            f"{self._address.scheme}://{self._address.authority}{request.target}",
            method=request.method,
            headers=dict(request.headers),
            body=b"" if body is None and request.method == "POST" else body,
            connect_timeout=request.timeout,
            request_timeout=2 * request.timeout + request.wait,  # Tornado counts from before connecting
            follow_redirects=False,
            decompress_response=False,
            allow_nonstandard_methods=True,
            ssl_options=self._address.ssl,
        )

    def _failure(self, error: BaseException | None, stream: _StreamKeeper) -> KeyPoolError:
        if not stream.connected:
            return unreachable(self._address, error or OSError("no connection"))
        if isinstance(error, HTTPTimeoutError):
            return AnswerLost("no answer in time")
        if isinstance(error, OSError | HTTPError):
            return AnswerLost(f"the connection broke before the answer was whole: {error}")
        return UnexpectedAnswer(f"what answers there doesn't speak HTTP ({error!r}): is the URL right?")


class _StreamKeeper(TCPClient):
    """Connects, and keeps hold of what it connected."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.stream: IOStream | None = None
        self._leave = False

    @property
    def connected(self) -> bool:
        return self.stream is not None

    async def connect(self, *args: Any, **options: Any) -> IOStream:
        self.stream = await super().connect(*args, **options)
        if self._leave:
            self.half_close()
        return self.stream

    def half_close(self) -> None:
        """Say that nothing more will be sent: a waiter who does so leaves the queue."""
        self._leave = True
        if self.stream is not None and self.stream.socket is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self.stream.socket, socket.SHUT_WR)

    def abort(self) -> None:
        """Close the connection, whatever is under way."""
        if self.stream is not None:
            self.stream.close()


def _answer(response: HTTPResponse, sent_at: float) -> Answer:
    return Answer(response.code, dict(response.headers), response.body or b"", sent_at, now())


def _nothing() -> None:
    return
