"""What connections do: the calls of the API as scripts for load.py, alone and mixed.

Calls that need each other, as unblock needs acquire, are run in bursts, first all of the one and then all of
the other, so that the rate of each can be told.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from bench.load import Connections, GoOn, Round, Script, request

KEYS = "/api/v1/keys"
ACQUIRE = request(f"{KEYS}/acquire")
GENERATE = request(KEYS)
BURST = 2000

_decode = msgspec.json.Decoder().decode


def path(text: str, call: str) -> str:
    """Where a call on one key goes."""
    return f"{KEYS}/{text}/{call}"


def unblock(lease: dict[str, Any], *, with_lease: bool) -> bytes:
    """The request that gives a key back."""
    body = b'{"lease":%d}' % lease["lease"] if with_lease else b""
    return request(path(lease["key"], "unblock"), body)


def same(asked: bytes) -> Callable[[GoOn], Script]:
    """The same request for ever."""

    def script(going: GoOn) -> Script:
        while going():
            yield asked

    return script


def pairs(going: GoOn) -> Script:
    """Acquire and unblock in turn, as a client of the service does."""
    while going():
        _, body = yield ACQUIRE
        yield unblock(_decode(body), with_lease=True)


def keepalives(texts: list[str], seed: int = 1) -> Callable[[GoOn], Script]:
    """Keepalive of random keys."""
    draw = random.Random(seed).random

    def script(going: GoOn) -> Script:
        while going():
            yield request(path(texts[int(draw() * len(texts))], "keepalive"))

    return script


def mixed(texts: list[str], seed: int = 1) -> Callable[[GoOn], Script]:
    """Pairs, keepalives, reads, and keys made and deleted, in the shares of a service at work."""
    draw = random.Random(seed).random

    def script(going: GoOn) -> Script:
        while going():
            share, text = draw(), texts[int(draw() * len(texts))]
            if share < 0.5:
                yield request(path(text, "keepalive"))
            elif share < 0.9:
                _, body = yield ACQUIRE
                yield unblock(_decode(body), with_lease=True)
            elif share < 0.95:
                yield request(f"{KEYS}/{text}", method="GET")
            else:
                _, body = yield GENERATE
                yield request(f"{KEYS}/{_decode(body)['key']}", method="DELETE")

    return script


def saying(requests: Iterator[bytes], heard: Callable[[bytes], object]) -> Callable[[GoOn], Script]:
    """Requests that all connections take from one iterator, and what to do with the bodies of their answers."""

    def script(going: GoOn) -> Script:
        for asked in requests:
            _, body = yield asked
            heard(body)

    return script


async def bursts(
    connections: Connections, seconds: float, keys: int, *, with_lease: bool
) -> tuple[Round, Round]:
    """Acquire a crowd of keys, unblock them, and so on; the rounds of acquire and of unblock."""
    acquired, unblocked = Round(), Round()
    count = min(BURST, keys // 2)
    while acquired.seconds + unblocked.seconds < seconds:
        bodies: list[bytes] = []
        acquired.add(await connections.run(saying(iter([ACQUIRE] * count), bodies.append), seconds))
        requests = [unblock(_decode(body), with_lease=with_lease) for body in bodies]
        unblocked.add(await connections.run(saying(iter(requests), bool), seconds))
    return acquired, unblocked


async def generates(connections: Connections, seconds: float) -> Round:
    """Make keys; they are deleted again, but that doesn't count."""
    bodies: list[bytes] = []

    def script(going: GoOn) -> Script:
        while going():
            _, body = yield GENERATE
            bodies.append(body)

    made = await connections.run(script, seconds)
    texts = [_decode(body)["key"] for body in bodies]
    batches = [
        request("/api/v1/batch", msgspec.json.encode({"op": "delete", "keys": texts[start : start + 100]}))
        for start in range(0, len(texts), 100)
    ]
    # One batch at a time: many in one turn of the server's loop would be a stall of our own making.
    await connections.run(saying(iter(batches), bool), seconds, count=1)
    return made


async def some_texts(connections: Connections, keys: int) -> list[str]:
    """Texts of random keys: acquired in batches, and given back."""
    texts: list[str] = []

    def heard(body: bytes) -> None:
        texts.extend(lease["key"] for lease in _decode(body)["keys"])

    count = min(keys // 2, 20_000)
    crowd = request("/api/v1/batch", b'{"op":"acquire","count":%d}' % min(100, count))
    await connections.run(saying(iter([crowd] * max(1, count // 100)), heard), 30, count=1)
    batches = [
        request("/api/v1/batch", msgspec.json.encode({"op": "unblock", "keys": texts[start : start + 100]}))
        for start in range(0, len(texts), 100)
    ]
    await connections.run(saying(iter(batches), bool), 30, count=1)
    return texts
