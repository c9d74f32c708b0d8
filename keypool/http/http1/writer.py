"""The writing half of a connection: corked writes, and backpressure.

Answers given in one iteration of the loop are sent together, in one system call, when it is over (or at 64 KiB). With
pipelining, that is most of the speed. `written` returns a future that resolves when the transport's buffer is below its
high-water mark: mostly the server's one resolved future.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tornado.iostream import StreamClosedError

if TYPE_CHECKING:
    from keypool.http.http1.server import Server

CORK = 64 * 1024


class Writer:
    """Collects what a connection writes, for its transport."""

    __slots__ = ("_corked", "_corked_bytes", "_drained", "_server", "failed", "paused", "transport")

    def __init__(self, server: Server, transport: asyncio.Transport) -> None:
        self._server = server
        self.transport = transport
        self.paused = False
        """Whether the transport's buffer is over its high-water mark."""
        self.failed = False
        """Whether the transport was found closing, so that nothing more can be sent."""
        self._corked: list[bytes] = []
        self._corked_bytes = 0
        self._drained: asyncio.Future[None] | None = None

    def put(self, data: bytes) -> None:
        """Write at the end of this iteration of the loop. O(1)."""
        if not self._corked:
            self._server.flush_soon(self)
        self._corked.append(data)
        self._corked_bytes += len(data)
        if self._corked_bytes > CORK:
            self.flush()
            self.failed = self.transport.is_closing()

    def written(self) -> asyncio.Future[None]:
        """A future that resolves when more may be written; fails with StreamClosedError. O(1)."""
        if not self.paused:
            return self._server.resolved
        if self._drained is None or self._drained.done():
            self._drained = asyncio.get_running_loop().create_future()
        return self._drained

    def flush(self) -> None:
        """Hand the corked bytes to the transport, in one piece."""
        corked = self._corked
        if corked:
            data = corked[0] if len(corked) == 1 else b"".join(corked)
            self._corked = []
            self._corked_bytes = 0
            self.transport.write(data)

    def unsent(self) -> bool:
        """Whether some of what was written is not sent yet."""
        return bool(self._corked) or self.transport.get_write_buffer_size() > 0

    def sent_all(self) -> bool:
        """Flush, and return whether all is sent. If not, `resume` is called only when it is, until `reset_limits`."""
        self.flush()
        if not self.transport.get_write_buffer_size():
            return True
        self.transport.set_write_buffer_limits(high=0)
        return False

    def reset_limits(self) -> None:
        """Restore the buffer limits that `sent_all` has set to 0."""
        self.transport.set_write_buffer_limits()

    def resume(self) -> None:
        """The transport's buffer is below its low-water mark: resolve the future of the writes."""
        self.paused = False
        drained, self._drained = self._drained, None
        if drained is not None and not drained.done():
            drained.set_result(None)

    def drop(self) -> None:
        """Discard the corked bytes."""
        self._corked = []

    def fail(self) -> None:
        """Fail the pending future of `written`, with StreamClosedError."""
        drained, self._drained = self._drained, None
        if drained is not None and not drained.done():
            drained.set_exception(StreamClosedError())
            drained.exception()  # mark it as retrieved: nobody has to await it

    def close(self) -> None:
        """Drop the transport, which is closed, and with it a reference cycle."""
        self.fail()
        self._corked = []
        del self.transport


def closed_future() -> asyncio.Future[None]:
    """Return a future of the running loop that has failed with `StreamClosedError`."""
    future: asyncio.Future[None] = asyncio.Future()
    future.set_exception(StreamClosedError())
    future.exception()  # mark it as retrieved: nobody has to await it
    return future
