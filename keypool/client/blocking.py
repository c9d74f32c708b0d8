"""I/O of the blocking client: runs the steps of attempts.py over an httpx2 transport.

httpx2 bounds each read and write, not the whole of a call, so a server that sends a byte a second could block a
caller forever. So its connections are opened through a network backend that applies the deadline of the current
thread's call. The same backend shuts down connections in use when the client is closed.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import ssl
import threading
import weakref
from collections.abc import Iterable
from typing import Any, TypeVar

import httpcore2
import httpx2

from keypool.client.attempts import Answer, Pause, Send, Steps, failure
from keypool.client.errors import KeyPoolError, PoolClosed
from keypool.client.settings import Settings, now

T = TypeVar("T")

LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0)
"""A connection that was idle for more than 2 s is not reused: the server may be closing it at this very moment, and
a call that is not safe to repeat would fail."""


def verify(settings: Settings, context: ssl.SSLContext | None) -> ssl.SSLContext | bool:
    """The `verify` argument of a transport. For http, False: reading the certificates takes a while."""
    return settings.url.startswith("https:") if context is None else context


class Runner:
    """Runs steps, in any thread. After a fork, the child's calls open connections of their own.

    Uses `transport`, or one that it makes. A runner made by `another` shares a given transport, and doesn't close it.
    """

    def __init__(
        self,
        settings: Settings,
        ssl_context: ssl.SSLContext | None = None,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self.settings = settings
        self._given = transport
        self._owns = True
        self._ssl_context = ssl_context
        self._wake = threading.Event()
        self._closed = False
        self._open()

    def _open(self) -> None:
        self._pid = os.getpid()
        self._backend = _Backend()
        self._transport = self._given
        if self._transport is None:
            made = httpx2.HTTPTransport(verify=verify(self.settings, self._ssl_context), limits=LIMITS)
            made._pool._network_backend = self._backend  # noqa: SLF001 - httpx2 has no argument for it
            self._transport = made

    def another(self) -> Runner:
        """A runner with the same settings that can be closed separately."""
        made = Runner(self.settings, self._ssl_context, self._given)
        made._owns = self._given is None
        return made

    def run(self, steps: Steps[T]) -> T:
        """Run steps, and return their result. Raises KeyPoolError."""
        try:
            step = next(steps)
            while True:
                try:
                    answer = self._do(step)
                except KeyPoolError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    def wake(self) -> None:
        """End a pause early."""
        self._wake.set()

    def close(self) -> None:
        """Close all connections. Calls in progress in other threads raise PoolClosed."""
        self._closed = True
        self._wake.set()
        if self._owns and self._pid == os.getpid():
            self._backend.cut()
            assert self._transport is not None
            self._transport.close()

    def _do(self, step: Send | Pause) -> Answer | None:
        if isinstance(step, Send):
            return self._send(step)
        self._wake.wait(step.seconds)
        self._check()
        self._wake.clear()
        return None

    def _send(self, send: Send) -> Answer:
        self._check()
        if self._pid != os.getpid():
            self._open()
        assert self._transport is not None
        limit = None if send.timeout == math.inf else send.timeout
        request = send.request(timeout=dict.fromkeys(("connect", "read", "write", "pool"), limit))
        _call.deadline = None if limit is None else now() + limit
        try:
            response = self._transport.handle_request(request)
            try:
                body = response.read()
            finally:
                response.close()
        except Exception as error:
            self._check()
            raise failure(error, self.settings.url) from None
        return Answer(response.status_code, response.headers, body)

    def _check(self) -> None:
        if self._closed:
            raise PoolClosed("this client was closed")


class _Call(threading.local):
    deadline: float | None = None


_call = _Call()  # the call that this thread is making


def _within(timeout: float | None, error: type[Exception]) -> float | None:
    """A timeout, shortened to the deadline of this thread's call. Raises `error` if that has passed."""
    if _call.deadline is None:
        return timeout
    left = _call.deadline - now()
    if left <= 0:
        raise error("the timeout of the call has passed")
    return left if timeout is None else min(timeout, left)


class _Backend(httpcore2.NetworkBackend):
    """Opens connections whose operations end at the deadline of the call."""

    def __init__(self) -> None:
        self._inner = httpcore2.SyncBackend()
        self._streams: weakref.WeakSet[_Stream] = weakref.WeakSet()
        self._cut = False

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        left = _within(timeout, httpcore2.ConnectTimeout)
        return self._stream(self._inner.connect_tcp(host, port, left, local_address, socket_options))

    def _stream(self, inner: httpcore2.NetworkStream) -> _Stream:
        stream = _Stream(inner, self._stream)
        self._streams.add(stream)
        if self._cut:
            stream.cut()
        return stream

    def cut(self) -> None:
        self._cut = True
        for stream in list(self._streams):
            stream.cut()


class _Stream(httpcore2.NetworkStream):
    """A connection whose reads and writes end at the deadline of their thread's call."""

    def __init__(self, inner: httpcore2.NetworkStream, wrap: Any) -> None:
        self._inner = inner
        self._wrap = wrap

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, _within(timeout, httpcore2.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, _within(timeout, httpcore2.WriteTimeout))

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        left = _within(timeout, httpcore2.ConnectTimeout)
        encrypted: httpcore2.NetworkStream = self._wrap(
            self._inner.start_tls(ssl_context, server_hostname, left)
        )
        return encrypted

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)

    def close(self) -> None:
        self._inner.close()

    def cut(self) -> None:
        # close() would not wake up a thread that is reading from it.
        sock = self._inner.get_extra_info("socket")
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)
