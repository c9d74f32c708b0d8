"""The socket handed over as an IOStream, for websockets and their like.

`hand_over` takes a connection's transport apart: the descriptor is duplicated, the
transport given up (which closes only its own copy), and the duplicate put into an
IOStream. What was read behind the upgrade request, perhaps the first frames, is
served by that stream before it reads from the socket.

TLS can't be handed over so: asyncio keeps the session in memory, out of reach of a
socket. There the IOStream gets one end of a socket pair, and `Tunnel` carries bytes
between the other end and the TLS transport. It costs a copy and two descriptors.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Callable
from typing import Any, cast

from tornado.iostream import IOStream

_CHUNK = 64 * 1024


class StreamView:
    """What is left of `connection.stream` without an IOStream behind it.

    `socket` is the TLS object if there is one, so that `socket.getpeercert()` works.
    """

    __slots__ = ("_transport", "socket")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.socket: Any = transport.get_extra_info("ssl_object") or transport.get_extra_info("socket")

    def closed(self) -> bool:
        """Whether the connection is closed or closing."""
        return self._transport.is_closing()

    def set_nodelay(self, value: bool) -> None:
        """Do nothing: the transport always sends without delay."""


class HandedOverStream(IOStream):
    """An IOStream that first serves bytes which were read before it existed. `on_closed` is called once."""

    def __init__(self, sock: socket.socket, head: bytes, on_closed: Callable[[], None]) -> None:
        self._head = memoryview(head)
        self._on_closed = on_closed
        super().__init__(sock)

    def close_fd(self) -> None:
        """Close the socket; called by IOStream, once."""
        super().close_fd()
        self._on_closed()

    def read_from_fd(self, buf: bytearray | memoryview) -> int | None:
        """Read into `buf`: of the bytes that came before, then of the socket's."""
        if not self._head:
            return super().read_from_fd(buf)
        size = min(len(buf), len(self._head))
        buf[:size] = self._head[:size]
        self._head = self._head[size:]
        return size


def hand_over(
    transport: asyncio.Transport,
    head: bytes,
    loop: asyncio.AbstractEventLoop,
    on_closed: Callable[[], None],
) -> IOStream:
    """Take the socket from `transport` and return it as a stream that begins with `head`.

    `on_closed` is called when the stream is closed. The transport must have nothing left to send, and is closed.

    :raises OSError: if there is no descriptor left; the transport is as it was.
    """
    if transport.get_extra_info("ssl_object") is not None:
        ours, theirs = socket.socketpair()
        stream = HandedOverStream(theirs, head, on_closed)
        transport.set_protocol(Tunnel(transport, ours, loop))
        transport.resume_reading()
        return stream
    descriptor = os.dup(cast(socket.socket, transport.get_extra_info("socket")).fileno())
    transport.abort()
    return HandedOverStream(socket.socket(fileno=descriptor), head, on_closed)


class Tunnel(asyncio.Protocol):
    """Carries bytes between a TLS transport and a socket, with backpressure both ways."""

    def __init__(
        self, transport: asyncio.Transport, sock: socket.socket, loop: asyncio.AbstractEventLoop
    ) -> None:
        sock.setblocking(False)
        self._transport = transport
        self._socket: socket.socket | None = sock
        self._loop = loop
        self._pending = bytearray()
        self._ended = False
        loop.add_reader(sock, self._readable)

    def _readable(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(_CHUNK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if data:
            self._transport.write(data)
        else:
            self._close()

    def data_received(self, data: bytes) -> None:
        """Pass decrypted bytes on to the socket."""
        if self._socket is None:
            return
        self._pending += data
        if len(self._pending) == len(data):
            self._writable()

    def _writable(self) -> None:
        assert self._socket is not None
        try:
            sent = self._socket.send(self._pending)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self._close()
            return
        del self._pending[:sent]
        if self._pending:
            self._transport.pause_reading()
            self._loop.add_writer(self._socket, self._writable)
        elif self._ended:
            self._close()
        else:
            self._loop.remove_writer(self._socket)
            self._transport.resume_reading()

    def pause_writing(self) -> None:
        """Stop taking from the socket what TLS can't send."""
        if self._socket is not None:
            self._loop.remove_reader(self._socket)

    def resume_writing(self) -> None:
        """Take from the socket again."""
        if self._socket is not None:
            self._loop.add_reader(self._socket, self._readable)

    def connection_lost(self, exc: Exception | None) -> None:
        """Have the stream see the end, behind what it has not taken yet."""
        self._ended = True
        if not self._pending:
            self._close()

    def _close(self) -> None:
        sock, self._socket = self._socket, None
        if sock is not None:
            self._loop.remove_reader(sock)
            self._loop.remove_writer(sock)
            sock.close()
            self._transport.close()


def is_tls(transport: asyncio.BaseTransport) -> bool:
    """Whether the transport speaks TLS."""
    return isinstance(transport.get_extra_info("sslcontext"), ssl.SSLContext)
