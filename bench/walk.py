"""Which modules and functions of keypool one request runs through: the length of its path.

A real server in this process, and `sys.setprofile` while it serves the third request of a connection, when the header
section is cached. Counted are the calls of Python functions under keypool/; with a data file those of the server alone,
not of its writer process. The client is asyncio's streams.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from bench import valkeys
from bench.load import request
from bench.process import on_loop
from bench.report import Table
from bench.scripts import ACQUIRE
from keypool.api.auth import Access
from keypool.config.settings import Settings
from keypool.server.app import make_app
from keypool.server.serving import SERVERS, open_pools

QUICK: list[str] = []
_ROOT = str(Path(__file__).resolve().parents[1] / "keypool") + "/"
_TIMES = 5  # each on a connection of its own; the first ones make what is made only once


def main(arguments: Sequence[str]) -> int:
    """Walk, and print."""
    parser = argparse.ArgumentParser("bench walk", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="print the functions as well, in order")
    options = parser.parse_args(arguments)
    table, walks = Table("server", "call", "modules", "functions"), []
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in _servers(folder):
            for call, path in on_loop(_walk(settings)).items():
                modules = dict.fromkeys(file for file, _ in path)
                table.row(name, call, str(len(modules)), str(len(path)))
                walks.append((f"{name}, {call}", path))
    print(table)
    if options.list:
        for name, path in walks:
            print(f"\n{name}")
            for file, function in path:
                print(f"  {file} {function}")
    return 0


def _servers(folder: str) -> Iterator[tuple[str, Settings]]:
    yield "memory", Settings(data=":memory:")
    yield "data file", Settings(data=f"{folder}/keypool.db")
    yield "memory, --http=tornado", Settings(data=":memory:", http="tornado")
    if missing := valkeys.missing():
        print(f"valkey: {missing}\n")
        return
    valkey = valkeys.started()
    try:
        yield "valkey", Settings(engine=valkey.url)
    finally:
        valkey.close()


async def _walk(settings: Settings) -> dict[str, list[tuple[str, str]]]:
    pools = await open_pools(settings)
    server = SERVERS[settings.http](make_app(pools, Access(), settings), None)
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    server.add_sockets([listening])
    made = await pools.default.generate(20)
    keepalive = request(f"/api/v1/keys/{made[0].key}/keepalive")
    walks: dict[str, list[tuple[str, str]]] = {}
    for _ in range(_TIMES):
        for call, asked in (("acquire", ACQUIRE), ("keepalive", keepalive)):
            path = await _third_request(listening.getsockname()[1], asked)
            walks[call] = min(walks.get(call, path), path, key=len)  # without a timer that fired meanwhile
    server.stop()
    await server.close_all_connections()
    await pools.close()
    return walks


async def _third_request(port: int, asked: bytes) -> list[tuple[str, str]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    path: list[tuple[str, str]] = []
    for number in range(3):
        with _noting(path if number == 2 else []):
            writer.write(asked)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]))
    writer.close()
    await writer.wait_closed()
    return path


@contextmanager
def _noting(path: list[tuple[str, str]]) -> Iterator[None]:
    def note(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(_ROOT):
            path.append((code.co_filename[len(_ROOT) :], code.co_qualname))

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)
