"""Hands a connection's socket over as an IOStream, for websockets and the like."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import cast

from tornado.iostream import IOStream


class HandedOverStream(IOStream):
    """An IOStream that begins with bytes which were read before it was made. `on_closed` is called once."""

    def __init__(self, sock: socket.socket, head: bytes, on_closed: Callable[[], None]) -> None:
        self._head = memoryview(head)
        self._on_closed = on_closed
        super().__init__(sock)

    def close_fd(self) -> None:
        """Close the socket; called by IOStream, once."""
        super().close_fd()
        self._on_closed()

    def read_from_fd(self, buf: bytearray | memoryview) -> int | None:
        """Read into `buf`: first the bytes that were read before, then from the socket."""
        if not self._head:
            return super().read_from_fd(buf)
        size = min(len(buf), len(self._head))
        buf[:size] = self._head[:size]
        self._head = self._head[size:]
        return size


def hand_over(transport: asyncio.Transport, head: bytes, on_closed: Callable[[], None]) -> IOStream:
    """Take the socket from `transport` and return it as a stream that begins with `head`.

    The descriptor is duplicated and the transport aborted, which closes only its own copy. `head` is what was read
    after the upgrade request, perhaps the first frames. `on_closed` is called when the stream is closed. The transport
    must have nothing left to send.

    :raises OSError: if no descriptor is left; the transport is as before.
    """
    descriptor = os.dup(cast(socket.socket, transport.get_extra_info("socket")).fileno())
    transport.abort()
    return HandedOverStream(socket.socket(fileno=descriptor), head, on_closed)
