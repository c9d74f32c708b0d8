"""The writing half of a connection: corked writes, backpressure, and how it ends.

Answers given while a piece of input is being parsed leave together, in one system
call, when the piece is done (or at 64 KiB): with pipelining that is most of the speed.
Whoever writes gets a future that resolves when the transport's buffer is below its
high-water mark; mostly that is the one resolved future of the server.

A connection ends in one of three ways. *Close* sends what is written, then closes; a
peer that has not taken it in after `write_seconds` is cut. *Linger* shuts the sending side and
drops what still comes, within bounds: a plain close would reset the connection, and a
peer that is still sending would never see the answer. *Cut* is at once.

There are no timers here: `deadline` is looked at by the server's sweep.
"""

from __future__ import annotations

import asyncio
from math import inf
from typing import TYPE_CHECKING

from tornado.iostream import StreamClosedError

if TYPE_CHECKING:
    from keypool.http.http1.server import Server

CORK = 64 * 1024

# What becomes of incoming bytes.
READING = 0
HOLDING = 1  # an upgrade request is in; what follows it may be another protocol
DEAF = 2  # no further request is wanted: dropped, but the peer's end is seen
LINGERING = 3  # answered and shut: dropped within bounds, so that the answer arrives
CLOSING = 4
GONE = 5


class Link(asyncio.Protocol):
    """A transport, and what is on its way out."""

    __slots__ = (
        "_corked",
        "_corked_bytes",
        "_drained",
        "busy",
        "deadline",
        "limits",
        "lingered",
        "loop",
        "mode",
        "server",
        "transport",
        "write_paused",
    )

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self.loop = loop
        self.limits = server.limits
        self.transport: asyncio.Transport
        self.mode = READING
        self.deadline = inf
        self.busy = False  # inside the parser or the queue: writes are corked
        self.write_paused = False
        self.lingered = 0
        self._corked: list[bytes] = []
        self._corked_bytes = 0
        self._drained: asyncio.Future[None] | None = None

    def send(self, data: bytes) -> asyncio.Future[None]:
        """Write. The future resolves when more may follow. O(1)."""
        if self.mode >= LINGERING:
            return closed_future()
        self.put(data)
        return self.written()

    def put(self, data: bytes) -> None:
        """Write on an open connection, at the end of this turn of the loop. O(1)."""
        if not self._corked:
            self.server.flush_soon(self)
        self._corked.append(data)
        self._corked_bytes += len(data)
        if self._corked_bytes > CORK:
            self.flush()
            if self.mode < LINGERING and self.transport.is_closing():
                self.mode = CLOSING  # the peer is gone: don't write on until we are told

    def written(self) -> asyncio.Future[None]:
        """Return the future of the writes so far."""
        if not self.write_paused:
            return self.server.resolved
        if self._drained is None or self._drained.done():
            self._drained = self.loop.create_future()
        return self._drained

    def flush(self) -> None:
        """Hand what is corked to the transport, in one piece."""
        corked = self._corked
        if corked:
            data = corked[0] if len(corked) == 1 else b"".join(corked)
            self._corked = []
            self._corked_bytes = 0
            self.transport.write(data)

    def writing(self) -> bool:
        """Whether some of what was written is not sent yet."""
        return bool(self._corked) or self.transport.get_write_buffer_size() > 0

    def pause_writing(self) -> None:
        """Learn from the transport that its buffer is over the high-water mark."""
        self.write_paused = True
        self.deadline = self.server.clock + self.limits.write_seconds

    def resume_writing(self) -> None:
        """Learn from the transport that its buffer is below the low-water mark."""
        self.write_paused = False
        drained, self._drained = self._drained, None
        if drained is not None and not drained.done():
            drained.set_result(None)
        self.drained()

    def drained(self) -> None:
        """Go on, now that the peer has read."""
        raise NotImplementedError

    def undrainable(self) -> None:
        """Fail the future of writes that the peer will not read."""
        drained, self._drained = self._drained, None
        if drained is not None and not drained.done():
            drained.set_exception(StreamClosedError())
            drained.exception()  # that nobody awaits it is no error

    def close(self) -> None:
        """End the connection when what is written has been sent."""
        if self.mode < LINGERING:
            self.flush()
            self._closing()
            self.transport.close()

    def linger(self) -> None:
        """End the connection when what is written has been received, or within bounds."""
        if self.mode < LINGERING:
            self.flush()
            self.mode = LINGERING
            self.deadline = self.server.clock + self.limits.linger_seconds
            try:
                if self.transport.can_write_eof():
                    self.transport.write_eof()
            except OSError:  # the peer has gone already, and asyncio's shutdown says so
                self.cut()
            else:
                self.transport.resume_reading()

    def cut(self) -> None:
        """End the connection now; what is not sent is lost."""
        if self.mode < GONE:
            self._corked = []
            self.mode = CLOSING
            self.deadline = inf
            self.transport.abort()

    def drop(self, size: int) -> None:
        """Account for bytes dropped after the answer."""
        self.lingered += size
        if self.lingered > self.limits.linger_bytes:
            self.cut()

    def _closing(self) -> None:
        self.mode = CLOSING
        self.deadline = self.server.clock + self.limits.write_seconds


def closed_future() -> asyncio.Future[None]:
    """Return a future, of the running loop, that failed with `StreamClosedError`."""
    future: asyncio.Future[None] = asyncio.Future()
    future.set_exception(StreamClosedError())
    future.exception()  # that nobody awaits it is no error
    return future
