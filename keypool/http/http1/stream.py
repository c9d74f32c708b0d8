"""The socket handed over as an IOStream, for websockets and their like."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import cast

from tornado.iostream import IOStream


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


def hand_over(transport: asyncio.Transport, head: bytes, on_closed: Callable[[], None]) -> IOStream:
    """Take the socket from `transport` and return it as a stream that begins with `head`.

    The descriptor is duplicated and the transport given up, which closes only its own copy. `head` is what was read
    behind the upgrade request, perhaps the first frames. `on_closed` is called when the stream is closed. The transport
    must have nothing left to send.

    :raises OSError: if there is no descriptor left; the transport is as it was.
    """
    descriptor = os.dup(cast(socket.socket, transport.get_extra_info("socket")).fileno())
    transport.abort()
    return HandedOverStream(socket.socket(fileno=descriptor), head, on_closed)
