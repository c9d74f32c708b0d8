"""Servers over Valkey: next to plain code for the same job, two next to one, a million keys next to a thousand.

All in one run and in turns, so that what else the machine does falls on all:

- one keypool server, and FastAPI with uvicorn and redis-py that runs one script a call (`baselines.plain`). "by cpu"
  compares the server's processor time of a call, which bounds the rate of a server that has a core for itself;
- two servers and one, each with its own load;
- many keys and a thousand: the server's answers, and the scripts as Valkey itself measures them (`commandstats`);
- what a key costs in Valkey's memory.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from bench import valkeys
from bench.baselines import fill_valkey, installed, serving
from bench.load import Address, Connections, GoOn, Round, Script
from bench.process import Child, cpu_of, on_loop
from bench.race import Race, Sample
from bench.report import Table, Targets, machine, median, size, span
from bench.scripts import ACQUIRE, fill, keepalives, pairs, unblock
from bench.servers import Server

if TYPE_CHECKING:
    from valkeys import Valkey

QUICK = ["--keys=20000", "--rounds=2", "--seconds=0.5"]
OF_PLAIN, OF_ONE, OF_FEW = 2.5, 1.5, 1.3
FEW = 1000
CORES_OF_TWO = 6
KINDS = ("acquire and unblock", "keepalive")


def main(arguments: Sequence[str]) -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser("bench scaling", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7, help="the median counts")
    parser.add_argument("--seconds", type=float, default=1.5, help="of load, a round")
    options = parser.parse_args(arguments)
    if missing := valkeys.missing():
        print(missing)
        return 0
    print(machine() + "\n", flush=True)
    with contextlib.closing(valkeys.started()) as valkey, contextlib.ExitStack() as stack:
        return _Run(valkey, options, stack).run()


class _Run:
    def __init__(self, valkey: Valkey, options: argparse.Namespace, stack: contextlib.ExitStack) -> None:
        self._valkey = valkey
        self._options = options
        self._stack = stack
        self._targets = Targets()
        self._scripts: dict[tuple[str, str], list[float]] = defaultdict(list)
        """Seconds that a script took in Valkey, each round."""
        self._cpu: dict[tuple[str, str], list[float]] = defaultdict(list)
        """Valkey's processor time a call, each round."""

    def run(self) -> int:
        few = self._server("few")
        fill(few, FEW)
        before = int(valkeys.info(self._valkey, "memory")["used_memory"])
        many = self._server("many")
        fill(many, self._options.keys)
        used = int(valkeys.info(self._valkey, "memory")["used_memory"]) - before
        self._with_plain(few)
        self._sizes(few, many)
        self._two(few, self._server("few"))
        print(f"{self._valkeys_table()}\n\n{used / self._options.keys:.0f} bytes a key in Valkey")
        return self._targets.status

    def _server(self, pool: str) -> Address:
        flags = (
            f"--engine={self._valkey.url}?pool={pool}",
            "--keepalive-seconds=86400",
            "--max-keys=100000000",
        )
        return self._stack.enter_context(Server(*flags)).address

    def _race(self, title: str, kind: str, loads: dict[str, Callable[[], Sample]], base: str) -> Race:
        race = Race()
        for name, load in loads.items():
            load()  # warms up
            race.add(name, load)
        print(f"{race.run(self._options.rounds).table(f'{kind}, {title}', [base])}\n", flush=True)
        self._targets.none("errors", sum(each.errors for each in race.found.values()))
        return race

    def _load(self, name: str, kind: str, *servers: Address) -> Callable[[], Sample]:
        """One round, on all of the servers at once."""

        def sample() -> Sample:
            self._valkey.ask("CONFIG", "RESETSTAT")
            before, options = cpu_of(self._valkey.pid), self._options
            loads = [Child(measure, each, kind, options.connections, options.seconds) for each in servers]
            whole = Round()
            for load in loads:
                measured = load.wait(60 + options.seconds)
                whole.add(measured)
                whole.seconds = measured.seconds  # they run side by side
            self._cpu[name, kind].append((cpu_of(self._valkey.pid) - before) / max(1, whole.requests))
            stats = dict(
                part.split("=")
                for part in valkeys.info(self._valkey, "commandstats")["cmdstat_evalsha"].split(",")
            )
            self._scripts[name, kind].append(float(stats["usec_per_call"]) / 1e6)
            return Sample.of(whole)

        return sample

    # -- what is compared

    def _with_plain(self, keypool: Address) -> None:
        if not installed("plain"):
            print("no comparison with plain code: pip install fastapi uvicorn 'redis[hiredis]'")
            return
        fill_valkey(self._valkey, FEW)
        with serving("plain", str(self._valkey.port)) as plain:
            for kind in KINDS:
                loads = {
                    "keypool": self._load("keypool", kind, keypool),
                    "plain": self._load("plain", kind, plain),
                }
                race = self._race("with plain code", kind, loads, "plain")
                ours, theirs = race.found["keypool"], race.found["plain"]
                self._targets.at_least(
                    f"{kind}, of plain code, by rate or by cpu",
                    max(ours.of(theirs), ours.cheaper(theirs)),
                    OF_PLAIN,
                )

    def _sizes(self, few: Address, many: Address) -> None:
        sizes = f"at {size(FEW)} keys of {size(self._options.keys)}"
        for kind in KINDS:
            loads = {"few": self._load("few", kind, few), "many": self._load("many", kind, many)}
            race = self._race(f"{size(self._options.keys)} keys and {size(FEW)}", kind, loads, "many")
            rate = race.found["few"].of(race.found["many"])
            script = median(self._scripts["many", kind]) / median(self._scripts["few", kind])
            for what, ratio in ((f"{kind}, {sizes}", rate), (f"{kind}, {sizes}, the scripts", script)):
                self._targets.check(what, ratio <= OF_FEW, f"{ratio:.2f}", f"at most {OF_FEW}")

    def _two(self, one: Address, other: Address) -> None:
        kind = KINDS[0]
        loads = {"one": self._load("one", kind, one), "two": self._load("two", kind, one, other)}
        race = self._race("two servers", kind, loads, "one")
        if (os.cpu_count() or 1) >= CORES_OF_TWO:  # two servers, two loads and Valkey need five
            self._targets.at_least("two servers, of one", race.found["two"].of(race.found["one"]), OF_ONE)

    def _valkeys_table(self) -> Table:
        table = Table("in Valkey", "cpu a call", "script")
        for (name, kind), costs in self._cpu.items():
            table.row(f"{kind}, {name}", span(median(costs)), span(median(self._scripts[name, kind])))
        return table


def measure(server: Address, kind: str, connections: int, seconds: float) -> Round:
    """One round, in a process of its own."""

    async def main() -> Round:
        opened = await Connections.open(server, connections)
        measured = await opened.run(pairs if kind == KINDS[0] else held_keepalives, seconds)
        opened.close()
        return measured

    return on_loop(main())


def held_keepalives(going: GoOn) -> Script:
    """Keepalives of the few keys that this connection acquires first, and gives back in the end."""
    leases = []
    for _ in range(4):
        _, body = yield ACQUIRE
        leases.append(msgspec.json.decode(body))
    yield from keepalives([lease["key"] for lease in leases])(going)
    for lease in leases:
        yield unblock(lease)
