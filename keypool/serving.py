"""One server's life: bind, open the engine, serve until a signal, drain, stop.

    bind -> load -> ready -> (SIGTERM or SIGINT) -> draining -> stopped
                                                       |
                                     a second signal: status 1, at once

Draining stops accepting, tells waiters, lets what is in flight be answered, and cuts what is left when
`drain_seconds` are over.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application

from keypool.app import make_app
from keypool.auth import Access
from keypool.engine import Engine
from keypool.engine.durable import open_durable
from keypool.engine.embedded import EmbeddedEngine
from keypool.engine.loading import Loading
from keypool.errors import StartError
from keypool.handlers.api import DISCARDED
from keypool.handlers.dispatch import Dispatcher
from keypool.settings import Settings

_MAX_HEADER_SIZE = 256 * 1024  # more than dispatch reads: what is too long is answered, not cut
_CLOSING_SECONDS = 1.0  # of --drain-seconds, left for the last commit
_log = logging.getLogger("keypool")


async def serve(settings: Settings) -> int:
    """Serve until told to stop; the exit status. Raises StartError."""
    asked_to_stop = _Signals().asked
    sockets = _bind(settings)
    access = Access(settings.client_tokens, settings.viewer_tokens, settings.admin_tokens)
    app = make_app(Loading(), access)
    server = HTTPServer(app, max_header_size=_MAX_HEADER_SIZE, max_body_size=DISCARDED)
    server.add_sockets(sockets)
    dispatcher: Dispatcher = app.settings["dispatcher"]
    stop = asyncio.ensure_future(asked_to_stop.wait())
    loading = asyncio.ensure_future(open_engine(settings))
    await asyncio.wait([stop, loading], return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        loading.cancel()
        return 0
    dispatcher.engine = await loading
    _log.info("ready on %s", _url(settings, sockets))
    await stop
    _log.info("draining")
    await _drain(server, app, dispatcher.engine, settings.drain_seconds)
    _log.info("stopped")
    return 0


async def open_engine(settings: Settings) -> Engine:
    """The engine that the settings name, with its keys. Raises StartError."""
    rules: dict[str, Any] = {
        "block_seconds": settings.block_seconds,
        "keepalive_seconds": settings.keepalive_seconds,
        "key_length": settings.key_length,
        "max_keys": settings.max_keys,
        "max_waiters": settings.max_waiters,
    }
    if settings.data == ":memory:":
        _log.warning("nothing is kept: --data=:memory: loses every key when the server stops")
        return EmbeddedEngine(**rules)
    return await open_durable(Path(settings.data), settings.restart_grace, **rules)


def _bind(settings: Settings) -> list[socket.socket]:
    try:
        return bind_sockets(settings.port, settings.address, backlog=1024)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StartError(f"can't listen on {settings.address}, port {settings.port}: {reason}") from None


def _url(settings: Settings, sockets: list[socket.socket]) -> str:
    host = f"[{settings.address}]" if ":" in settings.address else settings.address
    return f"http://{host}:{sockets[0].getsockname()[1]}/"


async def _drain(server: HTTPServer, app: Application, engine: Engine, seconds: float) -> None:
    """Stop within `seconds`: whoever was accepted is answered, as far as that goes."""
    deadline = time.monotonic() + seconds
    server.stop()
    engine.drain()
    if not await app.settings["in_flight"].wait_idle(seconds - min(_CLOSING_SECONDS, seconds / 4)):
        _log.warning(
            "%d requests were cut: not answered within --drain-seconds", app.settings["in_flight"].count
        )
    closing = [asyncio.ensure_future(each) for each in (server.close_all_connections(), engine.close())]
    done, _ = await asyncio.wait(closing, timeout=max(0.1, deadline - time.monotonic()))
    for step in done:
        step.result()


class _Signals:
    """The first SIGTERM or SIGINT asks to stop; the second doesn't ask."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._got, number)

    def _got(self, number: signal.Signals) -> None:
        if self.asked.is_set():
            _log.warning("second signal (%s): stopping now", number.name)
            logging.shutdown()
            os._exit(1)
        _log.info("%s: stopping", number.name)
        self.asked.set()
