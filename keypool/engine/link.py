"""The server's end of the socket to the writer process, and that process's life."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import msgspec

from keypool.engine.writer import HEADER, Kind, Verdict, frame


class WriterLink(asyncio.Protocol):
    """The writer process and the socket to it."""

    def __init__(
        self, process: subprocess.Popen[bytes], answered: Callable[[Verdict], None], lost: Callable[[], None]
    ) -> None:
        self.process = process
        self.dead = False
        self._answered = answered
        self._lost = lost
        self._buffer = bytearray()
        self._transport: asyncio.WriteTransport | None = None
        self._gone = asyncio.get_running_loop().create_future()
        self._decode = msgspec.msgpack.Decoder(Verdict).decode

    @classmethod
    async def start(
        cls, path: Path, lock: int, answered: Callable[[Verdict], None], lost: Callable[[], None]
    ) -> WriterLink:
        """Start the process. A session of its own keeps a terminal's signals from it."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            process = subprocess.Popen(  # noqa: ASYNC220, S603 - our own program; a fork takes a millisecond
                [sys.executable, "-P", "-m", "keypool.engine.writer", str(theirs.fileno()), str(path)],
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
        _, protocol = await loop.create_connection(lambda: cls(process, answered, lost), sock=ours)
        return protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is ours."""
        # Not an instance of it on uvloop, but it has its methods.
        self._transport = cast("asyncio.WriteTransport", transport)

    def send(self, kind: Kind, content: bytes = b"") -> None:
        """Send a frame."""
        if self._transport is not None and not self.dead:
            self._transport.write(frame(kind, content))

    def data_received(self, data: bytes) -> None:
        """Verdicts."""
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            end = HEADER.size + HEADER.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                return
            verdict = self._decode(bytes(self._buffer[HEADER.size : end]))
            del self._buffer[:end]
            self._answered(verdict)

    def connection_lost(self, error: Exception | None) -> None:
        """The process is gone, or going."""
        self.dead = True
        self._gone.set_result(None)
        self._lost()

    async def end(self) -> None:
        """Ask for a clean end and wait for it."""
        self.send(Kind.END)
        await self._gone

    async def reap(self) -> None:
        """See to it that the process is gone, and take its exit status."""
        if not self.dead and self._transport is not None:
            self._transport.abort()
        self.process.kill()
        await asyncio.get_running_loop().run_in_executor(None, self.process.wait)


def _environment() -> dict[str, str]:
    """Ours, with the path that this package was imported from: the process may start in another folder."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
