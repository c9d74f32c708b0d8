"""The loads of `bench imports`, each for a process of its own.

Costs are seconds of processor time, in the best round.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench.load import Address, Connections, GoOn, Round, Script, request
from bench.process import on_loop, pin_to_first_core
from bench.scripts import A_BATCH, answering
from keypool.core.answers import NewKey
from keypool.core.cursor import ListQuery
from keypool.core.events import HOLDER
from keypool.core.keys import random_text
from keypool.core.rules import PoolRules
from keypool.engine.durable.opening import open_durable
from keypool.engine.embedded import EmbeddedEngine
from keypool.engine.sealing import Sealer

SECRETS_KEY = bytes(range(32))

Costs = dict[tuple[str, str], float]
"""Of each kind of keys or pool, and call."""

_BATCHES = 10  # of an op in a round
_CALLS = 250  # of a kind in a round
_PAIRS, _CONNECTIONS = 1000, 16
_TEXTS: dict[str, Callable[[], str]] = {
    "random": lambda: random_text(32),
    "begin alike": lambda: f"sk-live-{random_text(24)}",
}
_RULES = PoolRules(keepalive_seconds=36_000.0)


def batches(server: Address, rounds: int) -> dict[str, tuple[float, float]]:
    """For each op the keys a second, and what a key cost the server."""

    def body(op: str) -> bytes:
        if op == "generate":
            return msgspec.json.encode({"op": op, "count": A_BATCH})
        made = [random_text(24) for _ in range(A_BATCH)]
        keys = [
            {"secret": f"sk-live-{each}", "name": f"acct-{each}", "data": {"user": each}} for each in made
        ]
        return msgspec.json.encode({"op": op, "keys": keys})

    async def run() -> dict[str, tuple[float, float]]:
        connections = await Connections.open(server, 2)
        await _send(connections, [request("/api/v1/pools/elsewhere", b'{"keepalive_seconds":null}', "PUT")])
        best = dict.fromkeys(("import", "generate"), (0.0, float("inf")))
        for _ in range(rounds):
            for op, (rate, cost) in best.items():
                sent = [request("/api/v1/pools/elsewhere/batch", body(op)) for _ in range(_BATCHES)]
                measured, keys = await _send(connections, sent), A_BATCH * _BATCHES
                best[op] = max(rate, keys / measured.seconds), min(cost, _cost(measured) / keys)
        connections.close()
        return best

    return on_loop(run())


def texts(keys: int, rounds: int) -> Costs:
    """Single calls of an engine whose keys begin alike, and of one with random keys. Names begin alike in both."""
    pin_to_first_core()
    rules = PoolRules(keepalive_seconds=None, block_seconds=3600.0, max_keys=2 * keys)
    best: Costs = defaultdict(lambda: float("inf"))

    async def timed(
        kind: str, name: str, items: Sequence[Any], call: Callable[[Any], Awaitable[Any]]
    ) -> list[Any]:
        began = time.process_time()
        answers = [await call(item) for item in items]
        best[kind, name] = min(best[kind, name], (time.process_time() - began) / len(items))
        return answers

    async def calls(kind: str, engine: EmbeddedEngine, known: list[str]) -> None:
        chosen = random.sample(range(len(known)), _CALLS)
        some = [known[at].encode().decode() for at in chosen]  # the text of a request is a new object
        await timed(kind, "find by text", some, engine.find)
        for lease in await timed(kind, "acquire", some, lambda _: engine.acquire(None, 0)):
            await engine.unblock(lease.id, lease.lease)
        queries = [ListQuery(name=f"acct-{random_text(1)}") for _ in range(_CALLS // 10)]
        await timed(kind, "list by name", queries, engine.page)
        await timed(kind, "delete", some, engine.delete)
        items = _new(kind, _CALLS)
        await timed(kind, "import", items, lambda item: engine.import_key(item, expire=False, origin=HOLDER))
        for at, item in zip(chosen, items, strict=True):
            known[at] = item.secret

    async def run() -> Costs:
        engines = {kind: EmbeddedEngine(rules) for kind in _TEXTS}
        known = {kind: await _import(engine, kind, keys) for kind, engine in engines.items()}
        for number in range(rounds):
            for kind in sorted(engines, reverse=number % 2 == 1):
                await calls(kind, engines[kind], known[kind])
        return dict(best)

    return on_loop(run())


async def _import(engine: EmbeddedEngine, kind: str, keys: int) -> list[str]:
    known: list[str] = []
    while len(known) < keys:
        items = _new(kind, A_BATCH)
        await engine.import_many(items, update=False, expire=False, origin=HOLDER)
        known += [item.secret for item in items]
    return known


def _new(kind: str, many: int) -> list[NewKey]:
    return [NewKey(_TEXTS[kind](), f"acct-{random_text(12)}") for _ in range(many)]


def pairs(server: Address, pools: int, rounds: int) -> Costs:
    """Acquire and unblock in `default`, and in one of so many other pools of a hundred keys each.

    They keep no history, as `default` doesn't: what that costs is in `bench budgets`.
    """
    decode = msgspec.json.Decoder().decode
    bases = [f"/api/v1/pools/pool-{number}" for number in range(pools)]
    measured_in = {"in default": "/api/v1", "in one of them": bases[pools // 2]}

    def acquire_and_unblock(base: str) -> Callable[[GoOn], Script]:
        numbers, acquire = iter(range(_PAIRS)), request(f"{base}/keys/acquire")

        def script(going: GoOn) -> Script:
            for _ in numbers:
                body = (yield acquire)[1]
                yield request(f"{base}/keys/{decode(body)['handle']}/unblock")

        return script

    async def run() -> Costs:
        connections = await Connections.open(server, _CONNECTIONS)
        await _send(connections, [request(base, b'{"history_leases":0}', "PUT") for base in bases])
        fill = b'{"op":"generate","count":100}'
        await _send(connections, [request(f"{base}/batch", fill) for base in ("/api/v1", *bases)])
        best: Costs = {}
        for number in range(rounds):
            for name in sorted(measured_in, reverse=number % 2 == 1):
                measured = await connections.run(acquire_and_unblock(measured_in[name]), 60)
                assert not measured.errors
                what = name, "acquire and unblock"
                best[what] = min(best.get(what, 1.0), _cost(measured) / measured.requests)
        connections.close()
        return best

    return on_loop(run())


async def _send(connections: Connections, requests: Sequence[bytes]) -> Round:
    """Requests that all connections share."""
    measured = await connections.run(answering(iter(requests), bool), 60)
    assert not measured.errors
    return measured


def _cost(measured: Round) -> float:
    """Processor time of the server, if it is known."""
    return measured.cpu or measured.seconds


def write_file(path: Path, secrets: Sequence[bytes], keys: int) -> None:
    """A data file of so many keys, as a clean stop leaves it."""

    async def run() -> None:
        pools = await open_durable(path, _RULES, secrets_keys=secrets)
        for _ in range(0, keys, A_BATCH):
            await pools.default.generate(A_BATCH)
        await pools.close()

    on_loop(run())


def open_file(path: Path, secrets: Sequence[bytes]) -> float:
    """Open it: what that cost this process, without the import of what decrypts."""
    Sealer([SECRETS_KEY])

    async def run() -> float:
        began = time.process_time()
        pools = await open_durable(path, _RULES, secrets_keys=secrets)
        spent = time.process_time() - began
        await pools.close()
        return spent

    return on_loop(run())
