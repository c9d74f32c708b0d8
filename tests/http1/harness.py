"""A server in the test's own loop, and a client that speaks bytes."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

from keypool.config.limits import Limits
from keypool.http.http1 import Server


@dataclass
class Response:
    """An answer as it came over the wire."""

    status: int
    headers: dict[str, str]
    body: bytes
    trailing: bool = False

    def __getitem__(self, name: str) -> str:
        return self.headers[name.lower()]


class Client:
    """One connection. All reads are exact: further bytes are kept for the next read."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def dribble(self, *pieces: bytes) -> None:
        """Send pieces so that each is a read of its own for the server, which is in this loop."""
        for piece in pieces:
            await self.send(piece)
            await turns(3)

    async def get(self, path: str, *lines: str, method: str = "GET") -> Response:
        await self.send(request(path, *lines, method=method))
        return await self.response(head=method == "HEAD")

    async def post(self, path: str, body: bytes, *lines: str, method: str = "POST") -> Response:
        await self.send(request(path, *lines, method=method, body=body))
        return await self.response()

    async def response(self, *, head: bool = False) -> Response:
        """Read one final response, over any 1xx."""
        while True:
            status, headers = await self.head()
            if status == 101 or status >= 200:
                break
        if head or status in (101, 204, 304):
            return Response(status, headers, b"")
        if headers.get("transfer-encoding") == "chunked":
            return Response(status, headers, await self._chunks())
        if "content-length" in headers:
            body = await self.reader.readexactly(int(headers["content-length"]))
            return Response(status, headers, body)
        return Response(status, headers, await self.reader.read())

    async def head(self) -> tuple[int, dict[str, str]]:
        text = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status_line, *lines = text[:-4].split("\r\n")
        version, status, _ = status_line.split(" ", 2)
        assert version == "HTTP/1.1"
        headers: dict[str, str] = {}
        for line in lines:
            name, value = line.split(": ", 1)
            headers[name.lower()] = value
        return int(status), headers

    async def _chunks(self) -> bytes:
        body = bytearray()
        while True:
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            chunk = await self.reader.readexactly(size + 2)
            assert chunk.endswith(b"\r\n")
            if not size:
                return bytes(body)
            body += chunk[:-2]

    async def ended(self) -> bytes:
        """Read to the end; a reset counts as one only if it comes behind nothing unread."""
        return await self.reader.read()

    async def closed(self) -> bool:
        """Wait for the server's end; report whether there was nothing before it."""
        try:
            return await self.reader.read() == b""
        except ConnectionError:
            return True

    def half_close(self) -> None:
        self.writer.write_eof()

    def reset(self) -> None:
        """Disconnect with a RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError, ssl.SSLError):
            await self.writer.wait_closed()


class Served:
    """A running server of either kind."""

    def __init__(self, server: Any, address: Any) -> None:
        self.server = server
        self.address = address
        self._clients: list[Client] = []

    async def connect(self, **options: Any) -> Client:
        client = Client(*await asyncio.open_connection(*self.address[:2], **options))
        self._clients.append(client)
        return client

    async def disconnect(self) -> None:
        for client in self._clients:
            await client.close()


@asynccontextmanager
async def serve(kind: str, application: Any, **options: Any) -> AsyncIterator[Served]:
    """Run a server on a port of its own; check in the end that no connection is left."""
    sockets = bind_sockets(0, "127.0.0.1")
    address = sockets[0].getsockname()
    if kind == "http1":
        options.setdefault("limits", Limits(head_bytes=16 * 1024))
    server: Any = (Server if kind == "http1" else HTTPServer)(application, **options)
    server.add_sockets(sockets)
    served = Served(server, address)
    try:
        yield served
    finally:
        await served.disconnect()
        server.stop()
        await server.close_all_connections()
        if kind == "http1":
            assert server.open_connections == 0
            await until(lambda: server.limiter.count == 0)
        await turns(5)


def seeds(count: int, quick: int) -> list[Any]:
    """Values of a seed, of which all but the first few run in a thorough run only."""
    return [pytest.param(seed, marks=() if seed < quick else pytest.mark.thorough) for seed in range(count)]


async def turns(count: int) -> None:
    """Let the loop, in which the server runs, make some iterations: reads, callbacks, writes."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Any) -> None:
    """Wait for a condition that the loop will bring about; the test's time limit ends it."""
    while not condition():  # noqa: ASYNC110 - the server has no reason to tell
        await asyncio.sleep(0.002)


def request(path: str, *lines: str, method: str = "GET", body: bytes | None = None) -> bytes:
    """Return an HTTP/1.1 request."""
    head = [f"{method} {path} HTTP/1.1", "Host: localhost", *lines]
    if body is not None:
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*head, "", ""]).encode() + (body or b"")


def chunked(path: str, *chunks: bytes, lines: tuple[str, ...] = (), trailer: bytes = b"") -> bytes:
    """Return a POST with a chunked body."""
    head = request(path, "Transfer-Encoding: chunked", *lines, method="POST")
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return head + body + b"0\r\n" + trailer + b"\r\n"
