"""The baselines: a constant on other servers, plain code for the same job, and a Valkey alone.

    python -m bench.baselines NAME [VALKEY-PORT]

serves one of `SERVERS` on a free port until it is killed. Each is started as its own documentation shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from secrets import token_urlsafe
from typing import TYPE_CHECKING, Any, cast

from bench.load import Address
from bench.servers import ROOT
from bench.stalls import Collections, Stall, StallProbe

if TYPE_CHECKING:
    from valkeys import Valkey

CONSTANT = {
    "id": 421337,
    "key": "5TRxAbCdEfGhIjKlMnOp",
    "lease": 171717,
    "release_in": 60.0,
    "expires_in": 281.4,
}
_BODY = b'{"id":421337,"key":"5TRxAbCdEfGhIjKlMnOp","lease":171717,"release_in":60.0,"expires_in":281.4}'
_WIRE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
    len(_BODY),
    _BODY,
)

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


class _Bare(asyncio.Protocol):
    """A parser and a constant: no limits, no order of answers, no safety."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        import httptools  # noqa: PLC0415

        self.transport = cast("asyncio.Transport", transport)
        self.parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        self.transport.write(_WIRE)


def httptools(listening: socket.socket) -> None:
    """The upper limit: what this parser can do on uvloop."""
    import uvloop  # noqa: PLC0415

    async def main() -> None:
        await asyncio.get_running_loop().create_server(_Bare, sock=listening)
        await asyncio.Event().wait()

    uvloop.run(main())


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
    """The keys that `plain` and `scripts` lease."""
    for start in range(0, keys, 1000):
        valkey.ask("SADD", "{k}free", *(f"{number:020d}" for number in range(start, start + 1000)))


def _command(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


def _script(text: bytes, *arguments: bytes) -> bytes:
    sha = hashlib.sha1(text).hexdigest().encode()  # noqa: S324 - how Valkey names scripts
    return _command(b"EVALSHA", sha, b"4", *_KEYS, *arguments)


class _ScriptClient(asyncio.Protocol):
    """Acquire and unblock in turn, over Valkey's own protocol."""

    def __init__(self) -> None:
        self.done = 0
        self.going = True
        self._loading = 2  # replies to SCRIPT LOAD that are still to come

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        for text in (_ACQUIRE, _UNBLOCK):
            self.transport.write(_command(b"SCRIPT", b"LOAD", text))

    def data_received(self, data: bytes) -> None:
        if self._loading:
            self._loading -= data.count(b"$40\r\n")
        else:
            self.done += 1
        if self._loading or not self.going:
            return
        if data.startswith(b"*2"):
            parts = data.split(b"\r\n")
            self.transport.write(_script(_UNBLOCK, parts[2], parts[4]))
        else:
            self.transport.write(_script(_ACQUIRE, b"1000060000"))


async def scripts(port: int, connections: int, seconds: float) -> int:
    """Calls that Valkey answers in so many seconds, over so many connections."""
    loop = asyncio.get_running_loop()
    made = [(await loop.create_connection(_ScriptClient, "127.0.0.1", port))[1] for _ in range(connections)]
    await asyncio.sleep(seconds)
    done = sum(each.done for each in made)
    for each in made:
        each.going = False
        each.transport.close()
    return done


# -- running them

SERVERS: dict[str, Callable[..., None]] = {
    "tornado": tornado,
    "fastapi": fastapi,
    "starlette": starlette,
    "httptools": httptools,
    "plain": plain,
}
CONSTANTS = ("tornado", "fastapi", "starlette", "httptools")
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


# -- the pool in memory as it is usually written


class _NaiveKey:
    def __init__(self, text: str) -> None:
        self.text = text
        self.timer: asyncio.TimerHandle | None = None


class NaivePool:
    """A dict, a list and a `call_later` a key, on asyncio's own loop. Each call looks O(1), but isn't.

    asyncio keeps cancelled timers in its heap and rebuilds it when half of them are cancelled, and the garbage
    collector visits every object now and then. Both walk the whole set.
    """

    def __init__(self) -> None:
        self.keys: dict[str, _NaiveKey] = {}
        self.available: list[str] = []
        self._loop = asyncio.get_running_loop()

    def generate(self) -> None:
        """A key and its timer."""
        key = _NaiveKey(token_urlsafe(15))
        key.timer = self._loop.call_later(300, self._expire, key)
        self.keys[key.text] = key
        self.available.append(key.text)

    def keepalive(self, text: str) -> None:
        """Cancel the timer and set another."""
        key = self.keys[text]
        if key.timer is not None:
            key.timer.cancel()
        key.timer = self._loop.call_later(300, self._expire, key)

    def _expire(self, key: _NaiveKey) -> None:
        self.keys.pop(key.text, None)


def measure_naive(keys: int, seconds: float) -> tuple[int, Stall, Stall, float]:
    """Keys made, the worst stall while the pool grew and while keys were kept alive, the longest collection.

    Generates for half of the time at most; keepalives then go on until the heap has been rebuilt once.
    """

    async def main() -> tuple[int, Stall, Stall, float]:
        pool, probe, collections = NaivePool(), StallProbe().start(), Collections()
        started = time.monotonic()
        while len(pool.keys) < keys and time.monotonic() - started < seconds / 2:
            for _ in range(100):
                pool.generate()
            await asyncio.sleep(0)
        growing = probe.stop()
        probe.start()
        draw, texts, kept = random.Random(1).random, pool.available, 0
        while kept < len(texts) * 1.25 and time.monotonic() - started < seconds:
            for _ in range(100):
                pool.keepalive(texts[int(draw() * len(texts))])
            kept += 100
            await asyncio.sleep(0)
        return len(pool.keys), growing, probe.stop(), collections.worst

    return asyncio.run(main())


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as made:
        print(made.getsockname()[1], flush=True)
        SERVERS[sys.argv[1]](made, *map(int, sys.argv[2:]))
