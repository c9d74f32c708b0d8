"""The server's side of the writer process: start, socket, end."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import cast

from keypool.engine.durable.rows import encode
from keypool.engine.durable.wire import (
    HistoryReply,
    HistoryRequest,
    Kind,
    Verdict,
    decode_history_reply,
    decode_verdict,
    frame,
    take_frames,
)

_INHERITED = ("LANG", "PATH", "SQLITE_TMPDIR", "TMPDIR", "TZ")
_INHERITED_PREFIXES = ("DYLD_", "LC_", "LD_", "PYTHON")


class WriterLink(asyncio.Protocol):
    """The writer process and the socket to it.

    `answered` is called with each verdict, `lost` once, when the socket closes because the process ends, and `drained`
    when the socket accepts more data after it was `full`.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], answered: Callable[[Verdict], None], lost: Callable[[], None]
    ) -> None:
        self.process = process
        self.dead = False
        self.full = False
        self.drained: Callable[[], None] = lambda: None
        self._answered = answered
        self._lost = lost
        self._buffer = bytearray()
        self._asked: deque[asyncio.Future[HistoryReply]] = deque()
        self._transport: asyncio.WriteTransport | None = None
        self._gone = asyncio.get_running_loop().create_future()

    @classmethod
    async def start(
        cls, path: Path, lock: int, answered: Callable[[Verdict], None], lost: Callable[[], None]
    ) -> WriterLink:
        """Start the process, in its own session so that signals of a terminal don't reach it. Raises OSError."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            process = subprocess.Popen(  # noqa: ASYNC220, S603 - our own program; a fork takes a millisecond
                [
                    *(sys.executable, "-P", "-m", "keypool.engine.durable.writer"),
                    *(str(number) for number in (theirs.fileno(), lock, os.getpid())),
                    str(path),
                ],
                pass_fds=(theirs.fileno(), lock),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=_environment(),
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        loop = asyncio.get_running_loop()
        try:
            _, protocol = await loop.create_connection(lambda: cls(process, answered, lost), sock=ours)
        except BaseException:
            process.kill()
            process.wait()
            ours.close()
            raise
        return protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        # uvloop's isn't an instance of this class, but has its methods.
        self._transport = cast("asyncio.WriteTransport", transport)

    def send(self, kind: Kind, content: bytes = b"") -> None:
        """Send a frame; ignored if the process is dead. Never blocks: `full` is set if the socket is."""
        if self._transport is not None and not self.dead:
            self._transport.write(frame(kind, content))

    def ask(self, request: HistoryRequest) -> asyncio.Future[HistoryReply]:
        """Ask for a page of a history, which comes in its turn; ConnectionError if the process ends before."""
        page: asyncio.Future[HistoryReply] = asyncio.get_running_loop().create_future()
        self._asked.append(page)
        self.send(Kind.HISTORY, encode(request))
        return page

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self.full = True

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self.full = False
        self.drained()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._buffer += data
        for kind, content in take_frames(self._buffer):
            if kind == Kind.PAGE:
                page = self._asked.popleft()
                if not page.done():
                    page.set_result(decode_history_reply(content))
            else:
                self._answered(decode_verdict(content))

    def connection_lost(self, error: Exception | None) -> None:
        """See `asyncio.Protocol`. The process has ended or is about to."""
        self.dead = True
        self._gone.set_result(None)
        for page in self._asked:
            if not page.done():
                page.set_exception(ConnectionError("the writer process ended"))
        self._lost()

    async def end(self) -> None:
        """Have the process close the file and exit, and wait for that."""
        self.send(Kind.END)
        await self._gone

    def kill(self) -> None:
        """Kill the process, and don't wait."""
        self.process.kill()

    async def reap(self) -> None:
        """Kill the process if it still runs, and collect its exit status."""
        if not self.dead and self._transport is not None:
            self._transport.abort()
        self.process.kill()
        await asyncio.get_running_loop().run_in_executor(None, self.process.wait)


def _environment() -> dict[str, str]:
    """The variables that an interpreter needs, without settings and tokens, and the path of this package."""
    needed = {
        name: value
        for name, value in os.environ.items()
        if name in _INHERITED or name.startswith(_INHERITED_PREFIXES)
    }
    paths = [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]
    return {**needed, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
