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

from keypool.engine.durable.writer import HEADER, Kind, Verdict, frame

_INHERITED = ("LANG", "PATH", "SQLITE_TMPDIR", "TMPDIR", "TZ")
_INHERITED_PREFIXES = ("DYLD_", "LC_", "LD_", "PYTHON")


class WriterLink(asyncio.Protocol):
    """The writer process and the socket to it."""

    def __init__(
        self, process: subprocess.Popen[bytes], answered: Callable[[Verdict], None], lost: Callable[[], None]
    ) -> None:
        self.process = process
        self.dead = False
        self.full = False
        """Whether more than the socket's buffers hold is waiting to be sent; `drained` is called when it isn't."""
        self.drained: Callable[[], None] = _nothing
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

    def pause_writing(self) -> None:
        """The process doesn't take what is sent as fast as it comes."""
        self.full = True

    def resume_writing(self) -> None:
        """It has taken it."""
        self.full = False
        self.drained()

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

    def kill(self) -> None:
        """End the process, whatever state it is in. Its exit status is not waited for."""
        self.process.kill()

    async def reap(self) -> None:
        """See to it that the process is gone, and take its exit status."""
        if not self.dead and self._transport is not None:
            self._transport.abort()
        self.process.kill()
        await asyncio.get_running_loop().run_in_executor(None, self.process.wait)


def _nothing() -> None:
    pass


def _environment() -> dict[str, str]:
    """What an interpreter needs of ours, no setting and no token, and the path that this package came from."""
    needed = {
        name: value
        for name, value in os.environ.items()
        if name in _INHERITED or name.startswith(_INHERITED_PREFIXES)
    }
    paths = [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]
    return {**needed, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
