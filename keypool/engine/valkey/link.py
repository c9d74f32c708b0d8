"""One connection to one Valkey: commands out, replies in, in order.

Commands of one turn of the loop leave in one write, and each is told its reply by a callback: a call costs a
few microseconds, where a client library's coroutine a command costs several times that. hiredis reads the
replies. What this module does not do: know scripts, partitions or clusters (valkey_nodes.py), or repeat.
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

Reply = Any
"""bytes, int, None, a list of these, or a ReplyError."""
ReplyError = hiredis.ReplyError
Done = Callable[[Reply], None]
"""Told the reply, or the Lost that came instead of one."""

SILENCE = 3.0
"""Seconds without a reply that is due after which the other side counts as gone."""


_CONNECT_SECONDS = 1.5


class Lost(Exception):
    """The connection broke before the reply came: whether the command was done is not known."""


class Measured:
    """What all connections of one engine have seen."""

    def __init__(self) -> None:
        self.seconds = Histogram(SECONDS)
        """From the write of commands to the last of their replies."""
        self.commands = Histogram(ROWS)
        """How many left in one write."""


class Link(asyncio.Protocol):
    """See the module. Made by `connect`."""

    def __init__(self, measured: Measured, on_lost: Callable[[Link, str], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._measured = measured
        self._on_lost = on_lost
        self._reader = hiredis.Reader(replyError=hiredis.ReplyError)
        self._transport: asyncio.Transport | None = None
        self._outgoing: list[bytes] = []
        self._owed: deque[Done] = deque()
        self._replies = 0  # so far
        self._sent = 0  # commands so far
        self._writes: deque[tuple[int, float]] = deque()  # commands sent by then, when
        self._watch: asyncio.TimerHandle | None = None
        self.on_message: Callable[[list[Any]], None] | None = None
        """Set for a connection that subscribes: it has messages where others have replies."""

    @property
    def up(self) -> bool:
        """Whether commands can be sent."""
        return self._transport is not None

    @property
    def in_flight(self) -> int:
        """How many replies are due."""
        return len(self._owed)

    def send(self, command: bytes, done: Done) -> None:
        """Send a packed command at the end of this turn. Only while `up`."""
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(command)
        self._owed.append(done)

    def ask(self, *words: str | bytes | int) -> asyncio.Future[Reply]:
        """The reply to a command. Raises ReplyError or Lost."""
        future: asyncio.Future[Reply] = self._loop.create_future()
        if not self.up:
            future.set_exception(Lost("the connection is closed"))
            return future
        self.send(hiredis.pack_command(cast("Any", words)), lambda reply: _settle(future, reply))
        return future

    def send_only(self, *words: str | bytes | int) -> None:
        """Send a command that has no reply: one that subscribes."""
        if self._transport is not None:
            self._transport.write(hiredis.pack_command(cast("Any", words)))

    def close(self, why: str = "closed") -> None:
        """Close at once; whoever waits for a reply is told Lost."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()
            self._lost(why)

    # -- what the loop tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to watch for silence."""
        self._transport = cast("asyncio.Transport", transport)
        self._watch = self._loop.call_later(SILENCE / 4, self._look)

    def data_received(self, data: bytes) -> None:
        """Tell replies to whom they are owed."""
        self._reader.feed(data)
        owed = self._owed
        try:
            while (reply := self._reader.gets()) is not False:
                if self.on_message is not None:
                    self.on_message(reply)
                else:
                    self._replies += 1
                    owed.popleft()(reply)
        except (hiredis.ProtocolError, IndexError):
            self.close("what came is no reply")
            return
        writes = self._writes
        while writes and writes[0][0] <= self._replies:
            self._measured.seconds.add(time.monotonic() - writes.popleft()[1])

    def connection_lost(self, error: Exception | None) -> None:
        """The other side has closed."""
        if self._transport is not None:
            self._transport = None
            self._lost(str(error) if error else "the other side closed the connection")

    def _flush(self) -> None:
        commands, self._outgoing = self._outgoing, []
        if self._transport is None or not commands:
            return
        self._sent += len(commands)
        self._writes.append((self._sent, time.monotonic()))
        self._measured.commands.add(len(commands))
        self._transport.write(b"".join(commands))

    def _look(self) -> None:
        if self._transport is None:
            return
        # A subscriber is owed nothing, so nobody misses what it doesn't hear.
        if self._writes and time.monotonic() - self._writes[0][1] > SILENCE and self.on_message is None:
            self.close(f"no reply within {SILENCE:g} s")
            return
        self._watch = self._loop.call_later(SILENCE / 4, self._look)

    def _lost(self, why: str) -> None:
        if self._watch is not None:
            self._watch.cancel()
        owed, self._owed = self._owed, deque()
        self._outgoing.clear()
        self._writes.clear()
        error = Lost(why)
        for done in owed:
            done(error)
        self._on_lost(self, why)


async def connect(
    address: Address,
    tls: bool,
    hello: Sequence[Sequence[str | int]],
    measured: Measured,
    on_lost: Callable[[Link, str], None],
) -> Link:
    """A connection that has said `hello`, some commands. Raises OSError, ReplyError, Lost."""
    loop = asyncio.get_running_loop()
    context = ssl.create_default_context() if tls else None
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            _, link = await loop.create_connection(lambda: Link(measured, on_lost), *address, ssl=context)
    except TimeoutError:
        raise OSError(f"no connection within {_CONNECT_SECONDS:g} s") from None
    try:
        replies = [link.ask(*command) for command in hello]
        await asyncio.wait(replies)
        for reply in replies:
            reply.exception()  # all are looked at: after a wrong password, every command fails
        for reply in replies:
            reply.result()
    except BaseException:
        link.close()
        raise
    return link


def _settle(future: asyncio.Future[Reply], reply: Reply) -> None:
    if future.done():
        return
    if isinstance(reply, (ReplyError, Lost)):
        future.set_exception(reply)
        future.exception()  # whether or not somebody still waits for it
    else:
        future.set_result(reply)
