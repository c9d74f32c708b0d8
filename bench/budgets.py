"""Pools with a pace, with seats and with a history beside a plain one of the same server, under the same load.

All connections acquire and unblock by handle, in one pool after the other, round after round. `budget left` is a pace
that never lets a key cool, `budget spent` one that lets it cool after each lease: the beginning and the end of a
cooldown are two changes more, so it is measured, and not judged. Over Valkey, with `--valkey`, secrets are sealed, as
imports need it there.
"""

from __future__ import annotations

import argparse
import base64
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import msgspec

from bench import valkeys
from bench.load import Address, Connections, GoOn, Round, Script, request
from bench.process import Child, on_loop
from bench.race import Race, Sample
from bench.report import Targets, machine
from bench.scripts import A_BATCH, answering
from bench.servers import Server

QUICK = ["--seconds=0.5", "--rounds=1"]
LEAST = 0.9  # of the calls a second in the plain pool
_KEYS, _SEATS = 10_000, 5
_PLAIN = {"keepalive_seconds": None, "history_leases": 0}
POOLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "budget left": {"pace": {"count": 1_000_000, "seconds": 60, "burst": 1_000_000}},
    "budget spent": {"pace": {"count": 600, "seconds": 60, "burst": 1}},
    "seats": {},
    "history": {"history_leases": 100_000},
}

_decode = msgspec.json.Decoder().decode


def main(arguments: Sequence[str]) -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser("bench budgets", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round in one pool")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--valkey", action="store_true", help="over Valkey as well")
    options = parser.parse_args(arguments)
    print(machine() + "\n", flush=True)
    targets = Targets()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="keypool-budgets-"))
        flags = {"in memory": "--data=:memory:", "on a data file": f"--data={folder}/keypool.db"}
        if options.valkey:
            valkey = stack.enter_context(closing(valkeys.started()))
            flags["over Valkey"] = f"--engine=valkey://127.0.0.1:{valkey.port}"
        secrets = {"KEYPOOL_SECRETS_KEY": base64.b64encode(bytes(32)).decode()}
        for where, flag in flags.items():
            with Server(flag, env=secrets if where == "over Valkey" else None) as server:
                _compare(where, server.address, options, targets)
    return targets.status


def _compare(where: str, server: Address, options: argparse.Namespace, targets: Targets) -> None:
    Child(_fill, server).wait(120)
    race = Race()
    for name in POOLS:
        race.add(name, partial(_sample, server, _base(name), options.connections, options.seconds))
    race.run(options.rounds)
    print(f"{race.table(f'acquire and unblock {where}', ['plain'])}\n", flush=True)
    for name, figures in race.found.items():
        targets.none(f"errors with {name}, {where}", figures.errors)
        if name not in ("plain", "budget spent"):
            targets.at_least(f"calls with {name}, {where}, of plain", figures.of(race.found["plain"]), LEAST)


def _sample(*of: Any) -> Sample:
    return Sample.of(Child(_pairs, *of).wait(120))


def _base(name: str) -> str:
    return f"/api/v1/pools/{name.replace(' ', '-')}"


def _fill(server: Address) -> None:
    def requests() -> Iterator[bytes]:
        for name, settings in POOLS.items():
            yield request(_base(name), msgspec.json.encode(_PLAIN | settings), "PUT")
            seats = _SEATS if name == "seats" else 1
            keys = [{"secret": f"sk-live-{number:08}", "seats": seats} for number in range(_KEYS // seats)]
            while keys:
                body = {"op": "import", "keys": [keys.pop() for _ in range(A_BATCH // _SEATS)]}
                yield request(f"{_base(name)}/batch", msgspec.json.encode(body))

    async def run() -> None:
        connections = await Connections.open(server, 1)
        made = await connections.run(answering(requests(), bool), 60)
        connections.close()
        assert not made.errors, "the pools could not be filled"

    on_loop(run())


def _pairs(server: Address, base: str, connections: int, seconds: float) -> Round:
    acquire = request(f"{base}/keys/acquire")

    def script(going: GoOn) -> Script:
        while going():
            _, body = yield acquire
            yield request(f"{base}/keys/{_decode(body)['handle']}/unblock")

    async def run() -> Round:
        opened = await Connections.open(server, connections)
        measured = await opened.run(script, seconds)
        opened.close()
        return measured

    return on_loop(run())
