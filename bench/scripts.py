"""The calls of the API as scripts for load.py, alone and mixed, and `load`, which runs one in a process of its own."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Any

import msgspec

from bench.load import Address, Connections, GoOn, Round, Script, request
from bench.process import Child, on_loop

KEYS = "/api/v1/keys"
BATCH = "/api/v1/batch"
ACQUIRE = request(f"{KEYS}/acquire")
GENERATE = request(KEYS)
A_BATCH = 1000
_BURST = 2000
_SAMPLE = 20_000

_decode = msgspec.json.Decoder().decode


def load(server: Address, kind: str, connections: int, seconds: float, allowed: Sequence[int] = ()) -> Round:
    """One round of a kind of load, from a process of its own.

    `kind` is a name in `KINDS`, or a method and a target, "POST /constant". Raises ChildFailed.
    """
    return Child(_load, server, kind, connections, seconds, allowed).wait(120 + 10 * seconds)


def _load(server: Address, kind: str, connections: int, seconds: float, allowed: Sequence[int]) -> Round:
    async def main() -> Round:
        opened = await Connections.open(server, connections)
        if kind in KINDS:
            measured = await KINDS[kind](opened, seconds)
        else:
            method, target = kind.split()
            measured = await opened.run(same(request(target, method=method)), seconds, allowed)
        opened.close()
        return measured

    return on_loop(main())


def fill(server: Address, keys: int) -> list[str]:
    """Generate so many keys; the texts of at most 20,000 of them, chosen at random."""
    return Child(_fill, server, keys).wait(60 + keys / 2000)


def _fill(server: Address, keys: int) -> list[str]:
    async def main() -> list[str]:
        connections = await Connections.open(server, 2)
        texts: list[str] = []
        counts = [min(A_BATCH, keys - made) for made in range(0, keys, A_BATCH)]
        batches = (request(BATCH, b'{"op":"generate","count":%d}' % count) for count in counts)

        def answered(body: bytes) -> None:
            texts.extend(key["key"] for key in _decode(body)["keys"])

        measured = await connections.run(answering(batches, answered), 3600)
        connections.close()
        assert not measured.errors, "the pool could not be filled"
        return random.Random(1).sample(texts, min(len(texts), _SAMPLE))

    return on_loop(main())


# -- scripts


def unblock(lease: dict[str, Any], fields: Sequence[str] = ("lease",)) -> bytes:
    """The request that gives a key back, with these fields of the lease."""
    body = msgspec.json.encode({name: lease[name] for name in fields})
    return request(f"{KEYS}/{lease['key']}/unblock", body)


def same(asked: bytes) -> Callable[[GoOn], Script]:
    """One request, repeated."""

    def script(going: GoOn) -> Script:
        while going():
            yield asked

    return script


def answering(requests: Iterator[bytes], answered: Callable[[bytes], object]) -> Callable[[GoOn], Script]:
    """Requests that all connections take from one iterator; `answered` is called with the body of each answer."""

    def script(going: GoOn) -> Script:
        for asked in requests:
            _, body = yield asked
            answered(body)

    return script


def pairs(going: GoOn) -> Script:
    """Acquire and unblock in turn."""
    while going():
        _, body = yield ACQUIRE
        yield unblock(_decode(body))


def keepalives(texts: list[str]) -> Callable[[GoOn], Script]:
    """Keepalive of random keys."""
    draw = random.Random(time.time_ns()).random

    def script(going: GoOn) -> Script:
        while going():
            yield request(f"{KEYS}/{texts[int(draw() * len(texts))]}/keepalive")

    return script


def thirds(texts: list[str]) -> Callable[[GoOn], Script]:
    """Acquire, unblock and keepalive of a random key, in turn."""
    draw = random.Random(time.time_ns()).random

    def script(going: GoOn) -> Script:
        while going():
            _, body = yield ACQUIRE
            yield unblock(_decode(body))
            yield request(f"{KEYS}/{texts[int(draw() * len(texts))]}/keepalive")

    return script


def mixed(texts: list[str]) -> Callable[[GoOn], Script]:
    """Keepalive 50 %, acquire and unblock 40 %, reads 5 %, keys generated and deleted 5 %."""
    draw = random.Random(time.time_ns()).random

    def script(going: GoOn) -> Script:
        while going():
            share, text = draw(), texts[int(draw() * len(texts))]
            if share < 0.5:
                yield request(f"{KEYS}/{text}/keepalive")
            elif share < 0.9:
                _, body = yield ACQUIRE
                yield unblock(_decode(body))
            elif share < 0.95:
                yield request(f"{KEYS}/{text}", method="GET")
            else:
                _, body = yield GENERATE
                yield request(f"{KEYS}/{_decode(body)['key']}", method="DELETE")

    return script


# -- rounds: a script with what it needs before and after


async def _pairs(connections: Connections, seconds: float) -> Round:
    return await connections.run(pairs, seconds)


async def _keepalives(connections: Connections, seconds: float) -> Round:
    return await connections.run(keepalives(await some_texts(connections)), seconds)


async def _thirds(connections: Connections, seconds: float) -> Round:
    return await connections.run(thirds(await some_texts(connections)), seconds)


async def _mixed(connections: Connections, seconds: float) -> Round:
    # A key that one connection generated and is about to delete may have been served to another: 404.
    return await connections.run(mixed(await some_texts(connections)), seconds, {404})


async def _generates(connections: Connections, seconds: float) -> Round:
    """Generate keys; deleting them again doesn't count."""
    bodies: list[bytes] = []

    def script(going: GoOn) -> Script:
        while going():
            _, body = yield GENERATE
            bodies.append(body)

    made = await connections.run(script, seconds)
    await _in_batches(connections, "delete", [_decode(body)["key"] for body in bodies])
    return made


async def _batched_keepalives(connections: Connections, seconds: float) -> Round:
    """Keepalives of 1,000 keys each; a request counts once."""
    texts = await some_texts(connections)
    batches = [
        request(BATCH, msgspec.json.encode({"op": "keepalive", "keys": texts[start : start + A_BATCH]}))
        for start in range(0, len(texts) - A_BATCH + 1, A_BATCH)
    ]

    def script(going: GoOn) -> Script:
        while going():
            for batch in batches:  # noqa: UP028 - `yield from` would send responses to the list
                yield batch

    return await connections.run(script, seconds, count=2)


async def _unblocks(connections: Connections, seconds: float, *, fields: Sequence[str]) -> Round:
    """Acquire a crowd of keys, unblock them, and so on: the round of the unblocks."""
    unblocked = Round()
    while unblocked.seconds < seconds:
        bodies: list[bytes] = []
        await connections.run(answering(iter([ACQUIRE] * _BURST), bodies.append), seconds, {404})
        leases = [lease | {"outcome": "ok"} for lease in map(_decode, bodies) if "lease" in lease]
        requests = (unblock(lease, fields) for lease in leases)
        unblocked.add(await connections.run(answering(requests, bool), seconds))
    return unblocked


KINDS: dict[str, Callable[[Connections, float], Awaitable[Round]]] = {
    "unblock with lease": partial(_unblocks, fields=("lease",)),
    "unblock with outcome": partial(_unblocks, fields=("lease", "outcome")),
    "acquire and unblock": _pairs,
    "keepalive": _keepalives,
    "acquire, unblock, keepalive": _thirds,
    "mixed": _mixed,
    "generate": _generates,
    "keepalives by the thousand": _batched_keepalives,
}
"""Kinds of load by name."""


async def some_texts(connections: Connections) -> list[str]:
    """Texts of random keys, at most 20,000 and half of the pool: acquired in batches, and given back."""
    _, body = await _one(connections, request("/api/v1/stats", method="GET"))
    texts: list[str] = []
    count = min(_decode(body)["available"] // 2, _SAMPLE)
    batch = request(BATCH, b'{"op":"acquire","count":%d}' % min(A_BATCH, count))
    while len(texts) < count:
        status, body = await _one(connections, batch)
        assert status == 200, body
        texts.extend(lease["key"] for lease in _decode(body)["keys"])
    await _in_batches(connections, "unblock", texts)
    return texts


async def _one(connections: Connections, asked: bytes) -> tuple[int, bytes]:
    found: list[tuple[int, bytes]] = []

    def script(going: GoOn) -> Script:
        found.append((yield asked))

    await connections.run(script, 30, count=1)
    return found[0]


async def _in_batches(connections: Connections, op: str, texts: list[str]) -> None:
    # Small batches, one at a time: large ones would stall the server's loop, which other figures are about.
    for start in range(0, len(texts), 100):
        await _one(
            connections, request(BATCH, msgspec.json.encode({"op": op, "keys": texts[start : start + 100]}))
        )
