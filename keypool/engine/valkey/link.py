"""One connection to one Valkey: commands out, replies in, in order.

All commands of one turn of the loop are sent in one write (a pipeline), and each has a callback for its reply. So a
command costs a few microseconds; client libraries, with a coroutine for each command, take several times that.
hiredis parses the replies. Scripts, partitions and clusters are not handled here, and no command is ever repeated.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

import hiredis

from keypool.engine.valkey.url import Address
from keypool.ops.histogram import ROWS, SECONDS, Histogram

Word = str | bytes | int | float
"""A word of a command."""
Reply = Any
"""bytes, int, None, a list of these, or a ReplyError."""
ReplyError = hiredis.ReplyError
OnReply = Callable[[Reply], None]
"""Called with the reply, or with a ConnectionLost."""

SILENCE = 3.0
"""Seconds to wait for a reply before the connection counts as lost."""

_CONNECT_SECONDS = 1.5


class ConnectionLost(Exception):
    """The connection broke before the reply came: whether the command was executed is not known."""


UNREACHABLE = (OSError, ReplyError, ConnectionLost)
"""The exceptions of a command that fails; a TimeoutError is an OSError."""


class PipelineMetrics:
    """Histograms that all connections of one engine share."""

    def __init__(self) -> None:
        self.seconds = Histogram(SECONDS)
        """Seconds from the write of a pipeline to the last of its replies."""
        self.commands = Histogram(ROWS)
        """Commands in a pipeline."""


class Link(asyncio.Protocol):
    """See the module. Made by `connect`."""

    def __init__(self, metrics: PipelineMetrics, on_lost: Callable[[Link, str], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._metrics = metrics
        self._on_lost = on_lost
        self._reader = hiredis.Reader(replyError=hiredis.ReplyError)
        self._transport: asyncio.Transport | None = None
        self._outgoing: list[bytes] = []
        self._expected: deque[OnReply] = deque()
        self._replies = 0  # so far
        self._sent = 0  # commands so far
        self._writes: deque[tuple[int, float]] = deque()  # of each pipeline: `_sent` after it, moment
        self._watchdog: asyncio.TimerHandle | None = None
        self.on_message: Callable[[list[Any]], None] | None = None
        """Set on a connection that subscribes: gets each message. Such a connection has no replies."""

    @property
    def up(self) -> bool:
        """Whether commands can be sent."""
        return self._transport is not None

    @property
    def in_flight(self) -> int:
        """How many replies are expected."""
        return len(self._expected)

    def send(self, command: bytes, on_reply: OnReply) -> None:
        """Send a packed command at the end of this turn of the loop. Only while `up`."""
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(command)
        self._expected.append(on_reply)

    def execute(self, *words: Word) -> asyncio.Future[Reply]:
        """The reply to a command. Raises ReplyError or ConnectionLost."""
        future: asyncio.Future[Reply] = self._loop.create_future()
        if self.up:
            self.send(hiredis.pack_command(cast("Any", words)), lambda reply: _settle(future, reply))
        else:
            future.set_exception(ConnectionLost("the connection is closed"))
        return future

    def send_only(self, *words: Word) -> None:
        """Send a command at once, on a connection that subscribes: its reply comes as a message."""
        if self._transport is not None:
            self._transport.write(hiredis.pack_command(cast("Any", words)))

    def close(self, reason: str = "closed") -> None:
        """Close at once; callbacks that wait for a reply get a ConnectionLost."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()
            self._fail_expected(reason)

    # -- called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the watchdog."""
        self._transport = cast("asyncio.Transport", transport)
        self._watchdog = self._loop.call_later(SILENCE / 4, self._check_silence)

    def data_received(self, data: bytes) -> None:
        """Parse replies, and call their callbacks."""
        self._reader.feed(data)
        expected = self._expected
        try:
            while (reply := self._reader.gets()) is not False:
                if self.on_message is not None:
                    self.on_message(reply)
                else:
                    self._replies += 1
                    expected.popleft()(reply)
        except (hiredis.ProtocolError, IndexError):
            self.close("received data that is not a reply")
            return
        writes = self._writes
        while writes and writes[0][0] <= self._replies:
            self._metrics.seconds.add(time.monotonic() - writes.popleft()[1])

    def connection_lost(self, error: Exception | None) -> None:
        """The other side has closed."""
        if self._transport is not None:
            self._transport = None
            self._fail_expected(str(error) if error else "the other side closed the connection")

    def _flush(self) -> None:
        commands, self._outgoing = self._outgoing, []
        if self._transport is None or not commands:
            return
        self._sent += len(commands)
        self._writes.append((self._sent, time.monotonic()))
        self._metrics.commands.add(len(commands))
        self._transport.write(b"".join(commands))

    def _check_silence(self) -> None:
        if self._transport is None:
            return
        # A subscriber has no replies to wait for; it has a watchdog of its own.
        if self._writes and time.monotonic() - self._writes[0][1] > SILENCE and self.on_message is None:
            self.close(f"no reply within {SILENCE:g} s")
            return
        self._watchdog = self._loop.call_later(SILENCE / 4, self._check_silence)

    def _fail_expected(self, reason: str) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
        expected, self._expected = self._expected, deque()
        self._outgoing.clear()
        self._writes.clear()
        error = ConnectionLost(reason)
        for on_reply in expected:
            on_reply(error)
        self._on_lost(self, reason)


async def connect(
    address: Address,
    tls: bool,
    hello: Sequence[Sequence[Word]],
    metrics: PipelineMetrics,
    on_lost: Callable[[Link, str], None],
) -> Link:
    """Connect, and execute the commands of `hello`, which must succeed. Raises OSError, ReplyError, ConnectionLost."""
    loop = asyncio.get_running_loop()
    context = ssl.create_default_context() if tls else None
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            _, link = await loop.create_connection(lambda: Link(metrics, on_lost), *address, ssl=context)
    except TimeoutError:
        raise OSError(f"no connection within {_CONNECT_SECONDS:g} s") from None
    try:
        await asyncio.gather(*(link.execute(*words) for words in hello))
    except BaseException:
        link.close()
        raise
    return link


def _settle(future: asyncio.Future[Reply], reply: Reply) -> None:
    if future.done():
        return
    if isinstance(reply, (ReplyError, ConnectionLost)):
        future.set_exception(reply)
        future.exception()  # or asyncio would log it where nobody awaits the future
    else:
        future.set_result(reply)
