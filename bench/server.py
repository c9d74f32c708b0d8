"""The real application on either HTTP server, in a process of its own with the settings of the real server.

The process is asked for reports and told to stop through a pipe. What it serves is chosen by name: the
application over an engine full of keys, or a constant to compare it with.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from tornado import httputil
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.routing import PathMatches, Router, Rule
from tornado.web import Application, RequestHandler

from bench.load import Address
from bench.mix import Mix
from bench.process import Child, ChildFailed, first_core, pipe, rss
from bench.stall import Collections, Stall, StallProbe
from keypool.api.auth import Access
from keypool.config.limits import MAX_HEAD
from keypool.core.rules import PoolRules
from keypool.engine.embedded import EmbeddedEngine
from keypool.ops import logs
from keypool.server import runtime
from keypool.server.app import make_app
from keypool.server.serving import SERVERS, HttpServer

CONSTANT = b'{"id":421337,"key":"5TRxAbCdEfGhIjKlMnOp","lease":171717,"release_in":60.0,"expires_in":281.4}'
_READY_SECONDS = 120


@dataclass(frozen=True)
class Pool:
    """An application to serve: an engine full of keys."""

    keys: int
    block_seconds: float = 60.0
    keepalive_seconds: float = 3600.0
    spare: int = 1_000_000  # keys that may come on top


@dataclass
class Report:
    """What a server has come to since the report before."""

    rss: int
    stall: Stall
    collection: float  # the longest of garbage, seconds
    collected: int  # objects that the collector freed: garbage in cycles, since the start
    totals: list[int]  # keys of each pool


class Server:
    """A process that serves pools, each on a port of its own, or the constant if there are none."""

    def __init__(self, *pools: Pool, http: str = "fast") -> None:
        self._pipe, theirs = pipe()
        self._child = Child(first_core(), _serve, theirs, pools, http)
        theirs.close()
        self.pid = self._child.pid
        self.addresses = [Address(port, self.pid) for port in self._hear(_READY_SECONDS)]

    def report(self) -> Report:
        """How it is, and a new start for the figures that are since the report before."""
        self._pipe.send("report")
        told: Report = self._hear(30)
        return told

    def garbage(self) -> int:
        """How many objects one full collection finds to free: what was leaked in cycles. Stops it for that long."""
        self._pipe.send("garbage")
        found: int = self._hear(60)
        return found

    def stop(self) -> None:
        """End it."""
        self._pipe.send("stop")
        self._child.end()

    def _hear(self, seconds: float) -> Any:
        try:
            if self._pipe.poll(seconds):
                return self._pipe.recv()
        except EOFError:
            pass
        self._child.end()
        raise ChildFailed("the server died or did not answer")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


class Constant(RequestHandler):
    """The least that an application on RequestHandler does."""

    def post(self) -> None:
        """Write the constant."""
        self.write(CONSTANT)


class BareRouter(Router):
    """The least that an application on Tornado's server does, past RequestHandler."""

    def find_handler(
        self, request: httputil.HTTPServerRequest, **kwargs: Any
    ) -> httputil.HTTPMessageDelegate:
        """A delegate that answers with the constant."""
        assert request.connection is not None
        return _Bare(request.connection)


class _Bare(httputil.HTTPMessageDelegate):
    def __init__(self, connection: httputil.HTTPConnection) -> None:
        self._connection = connection

    def finish(self) -> None:
        headers = httputil.HTTPHeaders({"Content-Length": str(len(CONSTANT))})
        self._connection.write_headers(httputil.ResponseStartLine("", 200, "OK"), headers, CONSTANT)
        self._connection.finish()


def _serve(pipe: Connection, pools: tuple[Pool, ...], http: str) -> None:
    # As server.py does it. What it logs is written, the audit of each generated key among it, but not kept.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    logs.configure("info", "text")
    runtime.spare_the_old_generation()
    runtime.run(_main(pipe, pools, http))


async def _main(pipe: Connection, pools: tuple[Pool, ...], http: str) -> int:
    engines = []
    ports = []
    for pool in pools:
        engine = EmbeddedEngine(
            PoolRules(pool.block_seconds, pool.keepalive_seconds, max_keys=pool.keys + pool.spare)
        )
        await Mix(engine, pool.keys, sample=0).fill()
        engines.append(engine)
        ports.append(_listen(SERVERS[http](make_app(engine, Access()), None)))
    if not pools:
        ports.append(_listen(HTTPServer(_constant_app(), max_header_size=MAX_HEAD)))
    pipe.send(ports)
    await _obey(pipe, engines)
    return 0


def _constant_app() -> Application:
    return Application(
        [Rule(PathMatches("/bare"), BareRouter()), (r"/.*", Constant)], log_function=lambda handler: None
    )


def _listen(server: HttpServer | HTTPServer) -> int:
    sockets = bind_sockets(0, "127.0.0.1", backlog=1024)
    server.add_sockets(sockets)
    port: int = sockets[0].getsockname()[1]
    return port


async def _obey(pipe: Connection, engines: list[EmbeddedEngine]) -> None:
    """Answer what the pipe asks until it says stop or breaks."""
    probe, collections = StallProbe().start(), Collections()

    def report() -> Report:
        told = Report(
            rss(),
            probe.take(),
            max(collections.worst),
            sum(generation["collected"] for generation in gc.get_stats()),
            [engine.pool.total for engine in engines],
        )
        collections.reset()
        return told

    def leaked() -> int:
        gc.collect(1)  # what is young may still die in time
        return gc.collect()

    orders: dict[str, Callable[[], object]] = {"report": report, "garbage": leaked}
    stopped = asyncio.Event()

    def asked() -> None:
        try:
            order = pipe.recv()
        except EOFError:
            order = "stop"
        if order == "stop":
            stopped.set()
        else:
            pipe.send(orders[order]())

    asyncio.get_running_loop().add_reader(pipe.fileno(), asked)
    await stopped.wait()
