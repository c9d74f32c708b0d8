"""How a connection ends when the operating system objects."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from tornado import web

from keypool.http.http1 import Server
from keypool.http.http1.connection import CLOSING, Connection
from keypool.http.http1.writer import CORK, Writer


class Transport(asyncio.Transport):
    """A transport whose peer has gone, as asyncio shows it before `connection_lost`."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[int] = []
        self.aborted = False

    def write(self, data: Any) -> None:
        self.written.append(len(data))

    def write_eof(self) -> None:
        raise OSError(107, "Transport endpoint is not connected")

    def is_closing(self) -> bool:
        return bool(self.written)

    def abort(self) -> None:
        self.aborted = True


def connection(transport: Transport) -> Connection:
    server = Server(web.Application())
    server.add_sockets([])
    made = Connection(server, asyncio.get_running_loop())
    made._transport = cast(asyncio.Transport, transport)
    made._writer = Writer(server, made._transport)
    return made


async def test_lingering_with_a_peer_that_has_gone_is_a_cut() -> None:
    """A shutdown that fails is no error of the server's."""
    transport = Transport()
    made = connection(transport)
    made._linger()
    assert transport.aborted
    assert made.state == CLOSING


async def test_nothing_more_is_corked_for_a_peer_that_has_gone() -> None:
    """The first write that finds the transport closed is the last (asyncio logs the others)."""
    transport = Transport()
    made = connection(transport)
    made.send(b"x" * (CORK + 1))
    made.send(b"x" * (CORK + 1))
    assert len(transport.written) == 1
    assert made.state == CLOSING
