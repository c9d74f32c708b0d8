"""What `bench http` measures keypool beside: the same constant on other servers, and the same job in a Valkey.

    python -m bench.rivals NAME PORT

serves one of the constants until it is killed. Each is started as its own documentation starts it.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from bench import valkeys

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


def tornado(port: int) -> None:
    """A RequestHandler on Tornado's server and asyncio's loop."""
    from tornado.web import Application, RequestHandler  # noqa: PLC0415 - only what is served is loaded

    class Constant(RequestHandler):
        def post(self) -> None:
            self.write(CONSTANT)

    async def main() -> None:
        Application([("/.*", Constant)]).listen(port, "127.0.0.1")
        await asyncio.Event().wait()

    asyncio.run(main())


def fastapi(port: int) -> None:
    """A path operation on uvicorn and uvloop."""
    from fastapi import FastAPI  # noqa: PLC0415

    app = FastAPI()

    @app.post("/constant")
    async def constant() -> dict[str, Any]:
        return CONSTANT

    _uvicorn(app, port)


def starlette(port: int) -> None:
    """A route on uvicorn and uvloop."""
    from starlette.applications import Starlette  # noqa: PLC0415
    from starlette.requests import Request  # noqa: PLC0415
    from starlette.responses import JSONResponse  # noqa: PLC0415
    from starlette.routing import Route  # noqa: PLC0415

    async def constant(request: Request) -> JSONResponse:
        return JSONResponse(CONSTANT)

    _uvicorn(Starlette(routes=[Route("/constant", constant, methods=["POST"])]), port)


def _uvicorn(app: Any, port: int) -> None:
    import uvicorn  # noqa: PLC0415

    uvicorn.run(app, port=port, loop="uvloop", http="httptools", log_level="warning", access_log=False)


class _Bare(asyncio.Protocol):
    """A parser and a constant: no limits, no order, no safety."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        import httptools  # noqa: PLC0415

        self.transport = cast("asyncio.Transport", transport)
        self.parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        self.transport.write(_WIRE)


def httptools(port: int) -> None:
    """The limit: what there is to get with this parser and uvloop."""
    import uvloop  # noqa: PLC0415

    async def main() -> None:
        await asyncio.get_running_loop().create_server(_Bare, "127.0.0.1", port)
        await asyncio.Event().wait()

    uvloop.run(main())


RIVALS: dict[str, Callable[[int], None]] = {
    "tornado": tornado,
    "fastapi": fastapi,
    "starlette": starlette,
    "httptools": httptools,
}


def installed(name: str) -> bool:
    """Whether what a rival needs is there."""
    needs = (name, "uvicorn") if name in ("fastapi", "starlette") else (name,)
    return all(importlib.util.find_spec(need) is not None for need in needs)


@contextmanager
def valkey_with_keys(keys: int) -> Iterator[Valkey]:
    """A Valkey of one's own; acquire and unblock are one script each there, as most would write them."""
    with valkeys.started("--appendonly", "no") as valkey:
        for start in range(0, keys, 1000):
            valkey.ask("SADD", "{k}free", *(f"{number:020d}" for number in range(start, start + 1000)))
        yield valkey


_KEYS = (b"4", b"{k}free", b"{k}lease", b"{k}held", b"{k}release")
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


def command(*words: bytes) -> bytes:
    """A command as Valkey reads it."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


class _Script(asyncio.Protocol):
    """Acquire and unblock in turn, one at a time."""

    def __init__(self) -> None:
        self.done = 0
        self.going = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._acquire = self._script(_ACQUIRE, b"1000060000")
        self.transport.write(
            command(b"EVAL", _ACQUIRE, *_KEYS, b"1") + command(b"EVAL", _UNBLOCK, *_KEYS, b"", b"")
        )
        self._warm = True  # until both scripts have run once, and the server knows them

    @staticmethod
    def _script(text: bytes, *arguments: bytes) -> bytes:
        return command(b"EVALSHA", hashlib.sha1(text).hexdigest().encode(), *_KEYS, *arguments)  # noqa: S324

    def data_received(self, data: bytes) -> None:
        if self._warm:
            self._warm = not data.endswith(b":0\r\n")
            if not self._warm:
                self.transport.write(self._acquire)
            return
        self.done += 1
        if not self.going:
            return
        if data.startswith(b"*2"):
            parts = data.split(b"\r\n")
            self.transport.write(self._script(_UNBLOCK, parts[2], parts[4]))
        else:
            self.transport.write(self._acquire)


async def scripts(port: int, connections: int, seconds: float) -> float:
    """Calls a second of Valkey's scripts over so many connections."""
    loop = asyncio.get_running_loop()
    made = [(await loop.create_connection(_Script, "127.0.0.1", port))[1] for _ in range(connections)]
    await asyncio.sleep(0.2)
    before, started = sum(each.done for each in made), loop.time()
    await asyncio.sleep(seconds)
    rate = (sum(each.done for each in made) - before) / (loop.time() - started)
    for each in made:
        each.going = False
        each.transport.close()
    return rate


if __name__ == "__main__":
    RIVALS[sys.argv[1]](int(sys.argv[2]))
