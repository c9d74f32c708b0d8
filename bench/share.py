"""How much of a bare server's rate the API keeps on Tornado's server, at a thousand keys and at a million.

The real application over the embedded engine (--http=tornado), in a process with the real server's settings, and
in another process, with the same settings and server, a RequestHandler that writes a constant.
A third process loads them in turn, so that what else the machine does falls on both: each call is compared
with the constant measured just before it, asked for with the same method, headers and body. What is judged is
the processor time of a request, which is what bounds the rate of a server that has a core for itself, and
which, unlike the rate, can be measured while others are at work on it.
"""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from bench.load import Address, Connections, Round, request
from bench.process import Child, last_core, on_loop
from bench.report import Table, Targets, machine, median, percentile, size, span
from bench.scripts import bursts, generates, keepalives, mixed, pairs, same, some_texts
from bench.server import Pool, Report, Server

QUICK = ["--sizes=1000", "--rounds=2", "--seconds=0.5"]
SHARE = 0.8
JUDGED = ("acquire", "unblock", "unblock with lease", "keepalive")

CONSTANT = request("/constant")
CONSTANT_WITH_BODY = request("/constant", b'{"lease":123456}')
BARE = request("/bare")


@dataclass
class Figures:
    """All rounds of one call."""

    rates: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)  # seconds of the server's processor, a request
    rate_shares: list[float] = field(default_factory=list)  # of the constant's rate just before
    cost_shares: list[float] = field(default_factory=list)  # what the constant cost, of what this cost
    latencies: list[float] = field(default_factory=list)
    errors: int = 0

    def add(self, measured: Round, constant: Round) -> None:
        """One more round."""
        self.rates.append(measured.rate)
        self.costs.append(measured.cost)
        self.rate_shares.append(measured.rate / constant.rate)
        self.cost_shares.append(constant.cost / measured.cost)
        self.latencies.extend(measured.latencies)
        self.errors += measured.errors


def main(arguments: Sequence[str]) -> int:
    """Measure, print, judge."""
    options = _options(arguments)
    print(machine())
    targets = Targets()
    for keys in options.sizes:
        with Server() as constant, Server(Pool(keys), http="tornado") as server:
            server.report()
            load = Child(
                last_core(),
                measure,
                (constant.addresses[0], server.addresses[0]),
                keys,
                options.connections,
                options.rounds,
                options.seconds,
            )
            found = load.wait(60 + options.rounds * options.seconds * 30)
            _show(keys, found, server.report(), constant.report())
        _judge(targets, keys, found)
    return targets.status


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench share", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=_sizes, default=[1000, 100_000, 1_000_000], metavar="N,N")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="the median counts")
    parser.add_argument("--seconds", type=float, default=1.0, help="of load, of each call, a round")
    return parser.parse_args(arguments)


def _sizes(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def measure(
    addresses: tuple[Address, Address], keys: int, connections: int, rounds: int, seconds: float
) -> dict[str, Figures]:
    """The load, in a process of its own. `addresses` are those of the constant and of the application."""
    return on_loop(_measure(addresses, keys, connections, rounds, seconds))


async def _measure(
    addresses: tuple[Address, Address], keys: int, connections: int, rounds: int, seconds: float
) -> dict[str, Figures]:
    constant = await Connections.open(addresses[0], connections)
    server = await Connections.open(addresses[1], connections)
    turn = _Turn(constant, server, await some_texts(server, keys), keys, seconds)
    await turn.warm_up()
    for _ in range(rounds):
        await turn.take()
    constant.close()
    server.close()
    return turn.found


@dataclass
class _Turn:
    """One round of every call, each after the constant."""

    constant: Connections
    server: Connections
    texts: list[str]
    keys: int
    seconds: float
    found: dict[str, Figures] = field(default_factory=dict)

    async def warm_up(self) -> None:
        await self.constant.run(same(CONSTANT), self.seconds)
        await self.server.run(pairs, self.seconds)

    async def take(self) -> None:
        await self._constant(BARE, "constant, bare delegate")
        constant = await self._constant(CONSTANT, "constant")
        self._keep("constant", constant, constant)
        acquired, unblocked = await bursts(self.server, 2 * self.seconds, self.keys, with_lease=False)
        self._keep("acquire", acquired, constant)
        self._keep("unblock", unblocked, constant)
        with_body = await self._constant(CONSTANT_WITH_BODY, "constant, asked with a body")
        _, unblocked = await bursts(self.server, 2 * self.seconds, self.keys, with_lease=True)
        self._keep("unblock with lease", unblocked, with_body)
        await self._beside("keepalive", lambda: self.server.run(keepalives(self.texts), self.seconds))
        await self._beside("acquire and unblock", lambda: self.server.run(pairs, self.seconds))
        await self._beside("generate", lambda: generates(self.server, self.seconds))
        await self._beside("mixed", self._mixed)

    async def _beside(self, name: str, load: Callable[[], Awaitable[Round]]) -> None:
        constant = await self.constant.run(same(CONSTANT), self.seconds)
        self._keep("constant", constant, constant)
        self._keep(name, await load(), constant)

    async def _mixed(self) -> Round:
        # A key that one connection made and is about to delete may have been served to another: 404.
        return await self.server.run(mixed(self.texts), self.seconds, {404})

    async def _constant(self, asked: bytes, name: str) -> Round:
        measured = await self.constant.run(same(asked), self.seconds)
        if name != "constant":
            plain = await self.constant.run(same(CONSTANT), self.seconds)
            self._keep(name, measured, plain)
        return measured

    def _keep(self, name: str, measured: Round, constant: Round) -> None:
        self.found.setdefault(name, Figures()).add(measured, constant)


def _show(keys: int, found: dict[str, Figures], server: Report, constant: Report) -> None:
    percents = "p50", "p99", "p99.9", "worst"
    table = Table("call", "a second", "of constant", "cpu each", "of constant", *percents, "errors")
    for name, figures in found.items():
        ordered = sorted(figures.latencies)
        spans = [span(percentile(ordered, percent)) for percent in (50, 99, 99.9, 100)]
        rate = f"{median(figures.rates):,.0f}", f"{median(figures.rate_shares):.0%}"
        cost = span(median(figures.costs)), f"{median(figures.cost_shares):.0%}"
        table.row(name, *rate, *cost, *spans, str(figures.errors))
    print(f"\n{size(keys)} keys\n\n{table}\n")
    for name, report in (("the application", server), ("the constant", constant)):
        wall, own = span(report.stall.wall), span(report.stall.own)
        print(f"worst stall of {name}: {wall} (its own {own}); longest collection {span(report.collection)}")
    print(flush=True)


def _judge(targets: Targets, keys: int, found: dict[str, Figures]) -> None:
    for name in JUDGED:
        share = median(found[name].cost_shares)
        what = f"{name} at {size(keys)}, of the constant's rate a core"
        targets.check(what, share >= SHARE, f"{share:.0%}", f"{SHARE:.0%}")
    errors = sum(figures.errors for figures in found.values())
    targets.check(f"errors at {size(keys)}", errors == 0, str(errors), "none")
