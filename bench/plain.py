"""What most would write: FastAPI on uvicorn, redis-py, and one script a call. For bench/scaling.py to compare with.

    python -m bench.plain VALKEY-PORT POOL PARTITIONS

It runs the engine's own scripts on a pool that a keypool server has made, and does nothing else that keypool does: no
tokens, no feed, no metrics, no waiters, no request ids, no error that isn't FastAPI's.
"""

from __future__ import annotations

import random
import socket
import sys
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import redis.asyncio
import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

from keypool.engine.valkey.scripts import keys_of, scripts

BLOCK, LIFE = 60_000_000, 3_600_000_000  # microseconds


class Unblock(BaseModel):
    """The body of unblock."""

    lease: int | None = None


def make(valkey_port: int, pool: str, partitions: int) -> FastAPI:  # noqa: C901 - a tutorial's style
    """The service: three calls, written as a tutorial does."""
    valkey = redis.asyncio.Redis(port=valkey_port)
    keys = [keys_of(pool, partition, partitions) for partition in range(partitions)]
    draw = random.random

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for script in scripts().values():
            await valkey.script_load(script.text)
        yield
        await valkey.aclose()

    app = FastAPI(lifespan=lifespan)

    async def run(name: str, partition: int, *words: object) -> Any:
        return await valkey.evalsha(scripts()[name].sha, 8, *keys[partition], *words)  # type: ignore[arg-type]

    def partition_of(key: str) -> int:
        return zlib.crc32(key.encode()) % partitions

    @app.post("/api/v1/keys/acquire")
    async def acquire() -> dict[str, Any]:
        partition = int(draw() * partitions)
        reply = await run(
            "acquire", partition, 0, 0, 0, 0, partitions, partition, BLOCK, random.getrandbits(31), "", draw()
        )
        if reply[3] is None:
            raise HTTPException(404, "no key is available")
        text, id, lease, expires = reply[3]
        return {
            "id": id, "key": text.decode(), "lease": lease, "release_in": BLOCK / 1e6, "expires_in": expires / 1e6
        }  # fmt: skip

    @app.post("/api/v1/keys/{key}/unblock")
    async def unblock(key: str, body: Unblock | None = None) -> dict[str, Any]:
        lease = "" if body is None or body.lease is None else body.lease
        outcome, id, _ = (await run("unblock", partition_of(key), key, lease))[1]
        if outcome < 0:
            raise HTTPException(404 if outcome == -1 else 409, "not yours")
        return {"id": id, "state": "available", "changed": outcome == 1}

    @app.post("/api/v1/keys/{key}/keepalive")
    async def keepalive(key: str) -> dict[str, Any]:
        id = (await run("keepalive", partition_of(key), LIFE, key))[1]
        if not id:
            raise HTTPException(404, "no such key")
        return {"id": id, "expires_in": LIFE / 1e6}

    return app


def main(words: Sequence[str]) -> None:
    """Serve on a port of its own until a signal."""
    valkey_port, pool, partitions = words
    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    app = make(int(valkey_port), pool, int(partitions))
    config = uvicorn.Config(app, loop="uvloop", http="httptools", log_level="warning", access_log=False)
    print(f"ready on http://127.0.0.1:{listening.getsockname()[1]}/", flush=True)
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main(sys.argv[1:])
