"""Servers over Valkey: against a plain FastAPI, two against one, a million keys against a thousand, bytes a key.

Everything in one run, taken in turn, so that what else the machine does falls on all alike:

- calls a second of one keypool server, and of FastAPI with uvicorn and redis-py that runs the same script a call on
  the same pool (bench/plain.py; `pip install fastapi uvicorn redis[hiredis]`). Beside the rate stands the processor
  time of a call, which is what bounds a server that has a core for itself;
- two servers against one, each with its own load;
- calls at many keys against calls at a thousand: the server's answers, and the scripts by Valkey's own measure
  (`INFO commandstats`; "Valkey's" is the processor time of all that it does for a call);
- what a key costs in Valkey's memory.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from bench import valkeys
from bench.load import Address, Connections, GoOn, Round, Script, request
from bench.process import Child, cpu_of, on_loop
from bench.report import Table, Targets, machine, median, percentile, size, span
from bench.scripts import keepalives, pairs, saying

if TYPE_CHECKING:
    from valkeys import Valkey

QUICK = ["--keys=20000", "--rounds=2", "--seconds=0.5"]
OF_PLAIN, OF_ONE, OF_FEW = 2.5, 1.5, 1.3
FEW = 1000
CORES_OF_TWO = 6
PARTITIONS = 1  # of a new pool in a single Valkey
KINDS = ("acquire and unblock", "keepalive")
_FLAGS = ("--keepalive-seconds=86400", "--max-keys=100000000")


@dataclass
class Figures:
    """All rounds of one load on one server."""

    rounds: list[Round] = field(default_factory=list)
    valkey: list[float] = field(default_factory=list)
    """Seconds of Valkey's processor, a call, in each round."""

    @property
    def rate(self) -> float:
        """Calls a second: the median."""
        return median([each.rate for each in self.rounds])

    @property
    def cost(self) -> float:
        """Seconds of the server's processor, a call: the median."""
        return median([each.cost for each in self.rounds])

    @property
    def latencies(self) -> list[float]:
        """Of all calls, in order."""
        return sorted(latency for each in self.rounds for latency in each.latencies)

    @property
    def errors(self) -> int:
        """Of all rounds."""
        return sum(each.errors for each in self.rounds)


def main(arguments: Sequence[str]) -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser("bench scaling", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument(
        "--rounds", type=int, default=7, help="of each load on each server; the median counts"
    )
    parser.add_argument("--seconds", type=float, default=1.5, help="of each")
    options = parser.parse_args(arguments)
    if missing := valkeys.missing():
        print(missing)
        return 0
    print(machine() + "\n", flush=True)
    with contextlib.closing(valkeys.started()) as valkey:
        return _Bench(valkey, options).run()


class _Bench:
    def __init__(self, valkey: Valkey, options: argparse.Namespace) -> None:
        self._valkey = valkey
        self._options = options
        self._targets = Targets()
        self._found: dict[tuple[str, str], Figures] = {}
        self._scripts: dict[tuple[str, str], list[float]] = {}

    def run(self) -> int:
        """All of it; the exit status."""
        with contextlib.ExitStack() as stack:
            few = stack.enter_context(self._server("few"))
            fill(few, FEW)
            before = int(valkeys.info(self._valkey, "memory")["used_memory"])
            many = stack.enter_context(self._server("many"))
            fill(many, self._options.keys)
            used = int(valkeys.info(self._valkey, "memory")["used_memory"]) - before
            self._with_plain(few)
            self._sizes(few, many)
            two = stack.enter_context(self._server("few"))
            self._two(few, two)
        self._show()
        print(
            f"\n{used / self._options.keys:.0f} bytes a key in Valkey, at {size(self._options.keys)} keys\n"
        )
        self._judge()
        return self._targets.status

    def _server(self, pool: str) -> contextlib.AbstractContextManager[Address]:
        return valkeys.keypool(f"--engine={self._valkey.url}?pool={pool}", *_FLAGS)

    # -- what is measured

    def _with_plain(self, keypool: Address) -> None:
        words = ("-m", "bench.plain", str(self._valkey.port), "few", str(PARTITIONS))
        try:
            with valkeys.running(*words) as plain:
                for kind in KINDS:
                    self._in_turn({"keypool": keypool, "plain": plain}, kind)
        except SystemExit as error:
            print(
                f"no comparison with a plain service (pip install fastapi uvicorn 'redis[hiredis]'): {error}"
            )

    def _sizes(self, few: Address, many: Address) -> None:
        for kind in KINDS:
            self._in_turn({"few": few, "many": many}, kind, scripts=True)

    def _in_turn(self, servers: dict[str, Address], kind: str, *, scripts: bool = False) -> None:
        for _ in range(self._options.rounds + 1):
            for name, server in servers.items():
                self._valkey.ask("CONFIG", "RESETSTAT")
                cpu = cpu_of(self._valkey.pid)
                measured = self._load(server, kind).wait(60)
                self._keep(name, kind, measured, cpu_of(self._valkey.pid) - cpu)
                if scripts:
                    told = valkeys.info(self._valkey, "commandstats")["cmdstat_evalsha"]
                    usec = float(dict(part.split("=") for part in told.split(","))["usec_per_call"])
                    self._scripts.setdefault((name, kind), []).append(usec / 1e6)
        for name in servers:  # the first round is for warming up
            del self._found[name, kind].rounds[0], self._found[name, kind].valkey[0]

    def _two(self, one: Address, other: Address) -> None:
        for _ in range(self._options.rounds):
            cpu = cpu_of(self._valkey.pid)
            self._keep("one", KINDS[0], self._load(one, KINDS[0]).wait(60), cpu_of(self._valkey.pid) - cpu)
            cpu = cpu_of(self._valkey.pid)
            loads = [self._load(server, KINDS[0]) for server in (one, other)]
            both = [load.wait(60) for load in loads]
            whole = Round(sum(each.requests for each in both), max(each.seconds for each in both))
            for each in both:
                whole.latencies.extend(each.latencies)
                whole.errors += each.errors
                whole.cpu += each.cpu
            self._keep("two", KINDS[0], whole, cpu_of(self._valkey.pid) - cpu)

    def _load(self, server: Address, kind: str) -> Child[Round]:
        return Child(None, measure, server, kind, self._options.connections, self._options.seconds)

    def _keep(self, name: str, kind: str, measured: Round, valkey: float) -> None:
        figures = self._found.setdefault((name, kind), Figures())
        figures.rounds.append(measured)
        figures.valkey.append(valkey / max(1, measured.requests))

    # -- what comes of it

    def _show(self) -> None:
        table = Table("load", "a second", "cpu each", "Valkey's", "script", "p50", "p99", "errors")
        for (name, kind), figures in self._found.items():
            spans = [span(percentile(figures.latencies, percent)) for percent in (50, 99)]
            script = self._scripts.get((name, kind))
            table.row(
                f"{kind}, {name}", f"{figures.rate:,.0f}", span(figures.cost), span(median(figures.valkey)),
                span(median(script)) if script else "", *spans, str(figures.errors),
            )  # fmt: skip
        print(table)

    def _ratio(self, name: str, other: str, kind: str, of: Callable[[Round], float]) -> float:
        """The median of the rounds, each with its neighbour."""
        pairs_of = zip(self._found[name, kind].rounds, self._found[other, kind].rounds, strict=True)
        return median([of(one) / of(two) for one, two in pairs_of])

    def _judge(self) -> None:
        check = self._targets.check
        for kind in KINDS:
            if ("plain", kind) in self._found:
                rate = self._ratio("keypool", "plain", kind, lambda each: each.rate)
                cost = 1 / self._ratio("keypool", "plain", kind, lambda each: each.cost)
                found = f"{rate:.2f} by the rate, {cost:.2f} by the server's processor"
                check(
                    f"{kind}, of a plain service", max(rate, cost) >= OF_PLAIN, found, f"at least {OF_PLAIN}"
                )
            rate = self._ratio("few", "many", kind, lambda each: each.rate)
            script = median(self._scripts["many", kind]) / median(self._scripts["few", kind])
            what = f"{kind}, at {size(self._options.keys)} keys of {size(FEW)}"
            check(what, rate <= OF_FEW, f"{rate:.2f}", f"at most {OF_FEW}")
            check(f"{what}, the scripts in Valkey", script <= OF_FEW, f"{script:.2f}", f"at most {OF_FEW}")
        rate = self._ratio("two", "one", KINDS[0], lambda each: each.rate)
        found = f"{rate:.2f} by the rate on {os.cpu_count()} cores"
        if (os.cpu_count() or 1) >= CORES_OF_TWO:
            check("two servers, of one", rate >= OF_ONE, found, f"at least {OF_ONE}")
        else:  # two servers, two loads and Valkey are five that want one
            print(f"      two servers, of one: {found}; {OF_ONE} is for {CORES_OF_TWO} cores or more")
        errors = sum(figures.errors for figures in self._found.values())
        check("errors", errors == 0, str(errors), "none")


# -- the load, in a process of its own


def measure(server: Address, kind: str, connections: int, seconds: float) -> Round:
    """One round."""
    return on_loop(_measure(server, kind, connections, seconds))


async def _measure(server: Address, kind: str, count: int, seconds: float) -> Round:
    connections = await Connections.open(server, count)
    measured = await connections.run(pairs if kind == KINDS[0] else held_keepalives, seconds)
    connections.close()
    return measured


def held_keepalives(going: GoOn) -> Script:
    """Keepalives of the few keys that this connection acquires first, and gives back at last."""
    texts = []
    for _ in range(4):
        _, body = yield request("/api/v1/keys/acquire")
        texts.append(msgspec.json.decode(body))
    yield from keepalives([lease["key"] for lease in texts])(going)
    for lease in texts:
        yield request(f"/api/v1/keys/{lease['key']}/unblock", b'{"lease":%d}' % lease["lease"])


def fill(server: Address, keys: int) -> None:
    """Make so many keys."""
    Child(None, _fill, server, keys).wait(60 + keys / 1000)


def _fill(server: Address, keys: int) -> None:
    on_loop(_make(server, keys))


async def _make(server: Address, keys: int) -> None:
    connections = await Connections.open(server, 4)
    batches = [min(1000, keys - made) for made in range(0, keys, 1000)]
    asked = [request("/api/v1/batch", b'{"op":"generate","count":%d}' % count) for count in batches]
    done = await connections.run(saying(iter(asked), bool), 3600)
    assert not done.errors, "the pool could not be filled"
    connections.close()
