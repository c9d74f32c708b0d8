"""The life of one server: bind, open the engine, serve until a signal, drain, stop.

    bind -> loading -> ready -> (SIGTERM or SIGINT) -> draining -> stopped
                                                          |
                                        a second signal: status 1, at once

A drain stops accepting connections, answers waiting acquires with 503, lets requests in flight be answered,
and cuts what is left after `drain_seconds`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from tornado.netutil import bind_sockets
from tornado.web import Application

from keypool.api.auth import Access
from keypool.config.limits import Limits
from keypool.config.proxies import TrustedProxies
from keypool.config.settings import Settings
from keypool.core.errors import StartError, StorageUnavailable
from keypool.engine import Pools
from keypool.engine.durable.opening import open_durable
from keypool.engine.embedded import EmbeddedEngine
from keypool.engine.pools import EmbeddedPools
from keypool.engine.valkey.url import parse, without_password
from keypool.http.api_call import InFlight
from keypool.http.http1.connection_limiter import ConnectionLimiter
from keypool.http.http1_server import FastServer
from keypool.http.tornado_server import TornadoServer
from keypool.ops import logs
from keypool.server.app import make_app, make_loading_app
from keypool.server.lifecycle import Lifecycle, State, Worker
from keypool.server.token_reload import TokenReload
from keypool.web.scrape import MetricSources

_QUIET_ROUNDS = 3  # rounds without a new request, after which all that had arrived has been read
_ROUND_SECONDS = 0.02  # enough for a client that was just answered to send one more request and get its 503
_CLOSING_SECONDS = 1.0  # of --drain-seconds, left for the last commit
_CHARTS_SECONDS = 1.0  # of these at most half, for the charts
_log = logging.getLogger("keypool")


class HttpServer(Protocol):
    """What serving.py needs of an HTTP server: to listen, and to stop step by step."""

    limiter: ConnectionLimiter
    began: int

    def add_sockets(self, sockets: Iterable[socket.socket]) -> None: ...  # noqa: D102
    def serve_app(self, app: Application) -> None: ...  # noqa: D102
    def drain_accept_queue(self, sockets: Iterable[socket.socket]) -> None: ...  # noqa: D102
    def stop(self) -> None: ...  # noqa: D102
    def disable_keep_alive(self) -> None: ...  # noqa: D102
    def writing(self) -> bool: ...  # noqa: D102
    def cut_all(self) -> None: ...  # noqa: D102
    async def close_all_connections(self) -> None: ...  # noqa: D102


class ServerClass(Protocol):
    """The class of an HTTP server."""

    def __call__(  # noqa: D102
        self, app: Application, limits: Limits | None, trusted: TrustedProxies | None = None
    ) -> HttpServer: ...


SERVERS: dict[str, ServerClass] = {
    "fast": FastServer,
    "tornado": TornadoServer,
}
"""By the value of --http."""


async def serve(settings: Settings, lifecycle: Lifecycle) -> int:
    """Serve until asked to stop; the exit status. Raises StartError."""
    asked_to_stop = lifecycle.stop_asked()
    # A worker doesn't listen until it is ready; its siblings take the traffic.
    sockets = [] if isinstance(lifecycle, Worker) else _listen(settings.address, settings.port)
    access = Access(
        settings.client_tokens, settings.viewer_tokens, settings.admin_tokens, settings.named_tokens
    )
    app = make_loading_app(access)
    trusted = None if settings.trusted_proxies == "none" else TrustedProxies(settings.trusted_proxies)
    server = SERVERS[settings.http](app, None, trusted)

    def callers_changed() -> None:
        app.forget_callers()
        server.serve_app(app)

    tokens = TokenReload(access, settings.token_sources(os.environ), callers_changed)
    lifecycle.on_reload(tokens.ask)
    if not isinstance(lifecycle, Worker):  # else the supervisor does it
        tokens.watch()
    server.add_sockets(sockets)
    lifecycle.report(State.LOADING)
    stop = asyncio.ensure_future(asked_to_stop.wait())
    loading = asyncio.ensure_future(open_pools(settings))
    await asyncio.wait([stop, loading], return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        loading.cancel()
        return 0
    pools = await loading
    app = make_app(pools, access, settings)
    dashboard = app.settings["dashboard"]
    await dashboard.counting.wait()  # otherwise the first calls would be missing from the charts
    tokens.serve_sessions(dashboard.sessions)
    server.serve_app(app)
    _add_metrics(server, app.settings["metric_sources"])
    if isinstance(lifecycle, Worker):
        sockets = _listen(settings.address, lifecycle.port, shared=True)
        if settings.process_port:
            sockets += _listen(settings.address, settings.process_port + lifecycle.index)
        server.add_sockets(sockets)
    lifecycle.report(State.READY, _url(settings, sockets))
    await stop
    lifecycle.report(State.DRAINING)
    seconds = max(settings.drain_seconds / 2, settings.drain_seconds - lifecycle.reserve)
    kept = await _drain(server, sockets, app, pools, seconds)
    lifecycle.report(State.STOPPED)
    return 0 if kept else 1


async def open_pools(settings: Settings) -> Pools:
    """Open the engine that the settings name, and load its keys. O(keys). Raises StartError."""
    if settings.engine != "embedded":
        return await _open_valkey(settings)
    if settings.data == ":memory:":
        _log.warning("nothing is kept: --data=:memory: loses every key when the server stops")
        return EmbeddedPools(EmbeddedEngine(settings.rules), max_pools=settings.max_pools)
    return await open_durable(
        Path(settings.data),
        settings.rules,
        secrets_keys=settings.secrets_keys,
        max_pools=settings.max_pools,
    )


async def _open_valkey(settings: Settings) -> Pools:
    try:
        from keypool.engine.valkey.opening import open_valkey  # noqa: PLC0415 - hiredis is needed for this only
    except ImportError:
        raise StartError(
            f"--engine={without_password(settings.engine)} needs hiredis: it is in requirements.txt, "
            "and in keypool-service[server]"
        ) from None
    return await open_valkey(
        parse(settings.engine),
        settings.partitions,
        settings.rules,
        max_pools=settings.max_pools,
        secrets_keys=settings.secrets_keys,
    )


def _listen(address: str, port: int, *, shared: bool = False) -> list[socket.socket]:
    try:
        return bind_sockets(port, address, backlog=1024, reuse_port=shared)
    except OSError as error:
        resolving = isinstance(error, socket.gaierror)  # its numbers are not errnos
        reason = os.strerror(error.errno) if error.errno and not resolving else error.strerror or str(error)
        raise StartError(f"can't listen on {address}, port {port}: {reason}") from None


def _url(settings: Settings, sockets: list[socket.socket]) -> str:
    host = f"[{settings.address}]" if ":" in settings.address else settings.address
    return f"http://{host}:{sockets[0].getsockname()[1]}/"


def _add_metrics(server: HttpServer, sources: MetricSources) -> None:
    """Connect the metrics of the HTTP server and of the log writer."""
    sources.connections = lambda: server.limiter.count
    sources.refused_connections = lambda: server.limiter.refused
    sources.limits["connections"] = server.limiter.most
    sources.log_dropped = lambda: logs.STDERR.dropped


async def _drain(
    server: HttpServer, sockets: list[socket.socket], app: Application, pools: Pools, seconds: float
) -> bool:
    """Finish requests in flight and close the engine, within `seconds`; True if all changes were committed."""
    deadline = time.monotonic() + seconds
    server.drain_accept_queue(sockets)
    server.stop()
    server.disable_keep_alive()
    pools.drain()
    app.settings["dashboard"].drain()
    in_flight: InFlight = app.settings["in_flight"]
    if not await _wait_idle(server, in_flight, deadline - min(_CLOSING_SECONDS, seconds / 4)):
        _log.warning("%d requests were cut: not answered within --drain-seconds", in_flight.count)
    # Without an await since `_wait_idle`: a request that began in between would be cut without an answer.
    server.cut_all()
    app.settings["dispatcher"].wrong_tokens.close()
    cutting = asyncio.ensure_future(server.close_all_connections())
    # Before the data file is free for a successor, which reads them.
    await app.settings["dashboard"].keep_charts(min(_CHARTS_SECONDS, (deadline - time.monotonic()) / 2))
    keeping = asyncio.ensure_future(pools.close())
    await asyncio.wait([cutting, keeping], timeout=max(0.1, deadline - time.monotonic()))
    if cutting.done():
        cutting.result()
    keeping.cancel()  # no effect if it is done; else it raises StorageUnavailable for what isn't committed
    try:
        await keeping
    except StorageUnavailable as error:
        _log.error("stopped, but %s", error.detail)
        return False
    except asyncio.CancelledError:
        pass
    return True


async def _wait_idle(server: HttpServer, in_flight: InFlight, deadline: float) -> bool:
    """Wait until every request that has arrived is answered; False if the deadline passes first.

    Requests may still be unread in socket buffers: all have been read once no new one has begun for some rounds.
    """
    quiet = 0
    while quiet < _QUIET_ROUNDS:
        began = server.began
        # Its result doesn't matter: new requests may have come since.
        await in_flight.wait_idle(deadline - time.monotonic())
        await asyncio.sleep(_ROUND_SECONDS)
        if time.monotonic() > deadline:
            return not in_flight.count
        idle = server.began == began and not in_flight.count and not server.writing()
        quiet = quiet + 1 if idle else 0
    return True
