"""The baselines: a constant on other servers, and plain code for the same job.

    python -m bench.baselines NAME [VALKEY-PORT]

serves one of `SERVERS` on a free port until it is killed. Each is started as its own documentation shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from bench.load import Address
from bench.servers import ROOT

if TYPE_CHECKING:
    from valkeys import Valkey

CONSTANT = {
    "id": 421337,
    "key": "5TRxAbCdEfGhIjKlMnOp",
    "lease": 171717,
    "release_in": 60.0,
    "expires_in": 281.4,
}

# -- servers of a constant, at POST /constant


def tornado(listening: socket.socket) -> None:
    """A RequestHandler on Tornado's server and asyncio's loop."""
    from tornado.httpserver import HTTPServer  # noqa: PLC0415 - only what is served is imported
    from tornado.web import Application, RequestHandler  # noqa: PLC0415

    class Constant(RequestHandler):
        def post(self) -> None:
            self.write(CONSTANT)

    async def main() -> None:
        HTTPServer(Application([("/.*", Constant)], log_function=lambda handler: None)).add_socket(listening)
        await asyncio.Event().wait()

    listening.setblocking(False)
    asyncio.run(main())


def fastapi(listening: socket.socket) -> None:
    """A path operation on uvicorn and uvloop."""
    from fastapi import FastAPI  # noqa: PLC0415

    app = FastAPI()

    @app.post("/constant")
    async def constant() -> dict[str, Any]:
        return CONSTANT

    _uvicorn(app, listening)


def starlette(listening: socket.socket) -> None:
    """A route on uvicorn and uvloop."""
    from starlette.applications import Starlette  # noqa: PLC0415
    from starlette.requests import Request  # noqa: PLC0415
    from starlette.responses import JSONResponse  # noqa: PLC0415
    from starlette.routing import Route  # noqa: PLC0415

    async def constant(request: Request) -> JSONResponse:
        return JSONResponse(CONSTANT)

    _uvicorn(Starlette(routes=[Route("/constant", constant, methods=["POST"])]), listening)


def _uvicorn(app: Any, listening: socket.socket) -> None:
    import uvicorn  # noqa: PLC0415

    config = uvicorn.Config(app, loop="uvloop", http="httptools", log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listening])


# -- a Valkey: acquire and unblock as one short script each

_KEYS = (b"{k}free", b"{k}lease", b"{k}held", b"{k}release")
_ACQUIRE = b"""
local text = redis.call('SPOP', KEYS[1])
if not text then return false end
local lease = redis.call('INCR', KEYS[2])
redis.call('HSET', KEYS[3], text, lease)
redis.call('ZADD', KEYS[4], ARGV[1], text)
return {text, tostring(lease)}"""
_UNBLOCK = b"""
if redis.call('HGET', KEYS[3], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HDEL', KEYS[3], ARGV[1])
redis.call('ZREM', KEYS[4], ARGV[1])
redis.call('SADD', KEYS[1], ARGV[1])
return 1"""
_KEEPALIVE = b"return redis.call('ZADD', KEYS[4], 'XX', ARGV[2], ARGV[1])"


def plain(listening: socket.socket, valkey_port: int) -> None:
    """The service as a tutorial would write it: FastAPI on uvicorn, redis-py, one script a call.

    No tokens, feed, metrics, waiters, expiry or request ids.
    """
    import redis.asyncio  # noqa: PLC0415
    from fastapi import Body, FastAPI, HTTPException  # noqa: PLC0415

    valkey = redis.asyncio.Redis(port=valkey_port)
    app = FastAPI()
    lease_of_body = Body(None, embed=True)

    def script(text: bytes) -> Any:
        registered: Any = valkey.register_script(text)
        return lambda *words: registered(keys=_KEYS, args=words)

    acquire_script, unblock_script, keepalive_script = map(script, (_ACQUIRE, _UNBLOCK, _KEEPALIVE))

    @app.post("/api/v1/keys/acquire")
    async def acquire() -> dict[str, Any]:
        reply = await acquire_script(int(time.time() * 1e6) + 60_000_000)
        if reply is None:
            raise HTTPException(404, "no key is available")
        return {"key": reply[0].decode(), "lease": int(reply[1]), "release_in": 60.0}

    @app.post("/api/v1/keys/{key}/unblock")
    async def unblock(key: str, lease: int | None = lease_of_body) -> dict[str, Any]:
        if not await unblock_script(key, "" if lease is None else lease):
            raise HTTPException(409, "held by someone else")
        return {"state": "available", "changed": True}

    @app.post("/api/v1/keys/{key}/keepalive")
    async def keepalive(key: str) -> dict[str, Any]:
        await keepalive_script(key, int(time.time() * 1e6) + 3_600_000_000)
        return {"expires_in": 3600.0}

    _uvicorn(app, listening)


def fill_valkey(valkey: Valkey, keys: int) -> None:
    """The keys that `plain` leases."""
    for start in range(0, keys, 1000):
        valkey.ask("SADD", "{k}free", *(f"{number:020d}" for number in range(start, start + 1000)))


# -- running them

SERVERS: dict[str, Callable[..., None]] = {
    "tornado": tornado,
    "fastapi": fastapi,
    "starlette": starlette,
    "plain": plain,
}
CONSTANTS = ("tornado", "fastapi", "starlette")
_NEEDS = {
    "fastapi": ("fastapi", "uvicorn"),
    "plain": ("fastapi", "uvicorn", "redis"),
    "starlette": ("starlette", "uvicorn"),
}


def installed(name: str) -> bool:
    """Whether the packages that a server needs are there."""
    return all(importlib.util.find_spec(need) is not None for need in _NEEDS.get(name, (name,)))


@contextlib.contextmanager
def serving(name: str, *words: str) -> Iterator[Address]:
    """One of `SERVERS`, until the block ends."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "bench.baselines", name, *words]
    with subprocess.Popen(command, stdout=pipe, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            port = process.stdout.readline()
            assert port, f"the baseline {name} did not start"
            yield Address(int(port), process.pid)
        finally:
            process.kill()


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as made:
        print(made.getsockname()[1], flush=True)
        SERVERS[sys.argv[1]](made, *map(int, sys.argv[2:]))
