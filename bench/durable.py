"""What durability costs: mixed calls over HTTP on a data file, beside the same in memory.

Both applications, each in a process of its own with the real server's settings, are loaded in turn, so that what
else the machine does falls on both. Server, writer and load share the cores as the kernel sees fit. Beside the rate
are measured the worst stall of the loop, calls one at a time next to a bare fdatasync on the same disk, and the
size of the file when it is closed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tornado.netutil import bind_sockets

from bench.load import Address, Connections, Round
from bench.mix import Mix
from bench.process import Child, ChildFailed, on_loop, pipe
from bench.report import Table, Targets, machine, median, percentile, size, span
from bench.scripts import generates, keepalives, mixed, pairs, some_texts
from bench.stall import Stall, StallProbe
from keypool.api.auth import Access
from keypool.core.rules import PoolRules
from keypool.engine.durable.opening import open_durable
from keypool.engine.embedded import EmbeddedEngine
from keypool.http.http1_server import FastServer
from keypool.ops import logs
from keypool.server import runtime
from keypool.server.app import make_app

QUICK = ["--keys=20000", "--rounds=3", "--seconds=1"]
SHARE, STALL, BYTES = 0.7, 0.025, 150
FSYNCS, BESIDE = 1.5, 0.001
"""A single call may take so many times a bare fdatasync, and so many seconds beside: SQLite syncs once, and
writes twice."""

_READY_SECONDS = 300
_SYNCS = 200
_LATER = 200_000  # keys that may come on top of the pool's: as many as a round can make


@dataclass
class Told:
    """What a server has come to since the last time it was asked."""

    stall: Stall
    commits: int
    rows: int  # of the last batch


@dataclass
class Figures:
    """All rounds of one kind of load on one server."""

    rounds: list[Round] = field(default_factory=list)
    stalls: list[Stall] = field(default_factory=list)
    commits: int = 0

    @property
    def rate(self) -> float:
        """Requests a second: the median."""
        return median([each.rate for each in self.rounds])

    @property
    def latencies(self) -> list[float]:
        """Of all calls, in order."""
        return sorted(latency for each in self.rounds for latency in each.latencies)


def main(arguments: Sequence[str]) -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser("bench durable", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument(
        "--connections", type=int, default=128, help="calls at once, of the load that is judged"
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="of each load on each server; the median counts"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="of each")
    parser.add_argument("--folder", type=Path, help="where the data file is; a temporary folder by default")
    options = parser.parse_args(arguments)
    print(machine() + "\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="keypool-durable-", dir=options.folder) as folder:
        path = Path(folder) / "keypool.db"
        with Server(None, options.keys) as memory, Server(path, options.keys) as durable:
            bench = _Bench(memory, durable, options.connections, options.rounds, options.seconds)
            bench.run()
        syncs = _bare_syncs(Path(folder) / "bare")
        bytes_a_key = path.stat().st_size / options.keys
    print(f"{size(options.keys)} keys, {options.connections} connections\n\n{bench.table()}\n")
    return _judge(bench, syncs, bytes_a_key)


# -- a server


class Server:
    """The application in a process of its own, over a data file or over memory."""

    def __init__(self, path: Path | None, keys: int) -> None:
        self._pipe, theirs = pipe()
        # On no core of its own: the writer would be bound to it too.
        self._child = Child(None, _serve, theirs, path, keys)
        theirs.close()
        self.address = Address(self._hear(), self._child.pid)

    def told(self) -> Told:
        """How it went since the last time."""
        self._pipe.send("tell")
        told: Told = self._hear()
        return told

    def _hear(self) -> Any:
        try:
            if self._pipe.poll(_READY_SECONDS):
                return self._pipe.recv()
        except EOFError:
            pass
        self._child.end()
        raise ChildFailed("the server died or did not answer")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        """End it in peace, and so close the file."""
        self._pipe.send("stop")
        self._hear()
        self._child.end()


def _serve(pipe: Connection, path: Path | None, keys: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the log is written, as the real server's, and not kept
    logs.configure("info", "text")
    runtime.spare_the_old_generation()
    runtime.run(_main(pipe, path, keys))


async def _main(pipe: Connection, path: Path | None, keys: int) -> int:
    rules = PoolRules(keepalive_seconds=3600.0, max_keys=keys + _LATER)
    engine = EmbeddedEngine(rules) if path is None else await open_durable(path, rules)
    await Mix(engine, keys, sample=0).fill()
    sockets = bind_sockets(0, "127.0.0.1", backlog=1024)
    FastServer(make_app(engine, Access())).add_sockets(sockets)
    pipe.send(sockets[0].getsockname()[1])
    probe, stopped, commits = StallProbe().start(), asyncio.Event(), 0

    def asked() -> None:
        nonlocal commits
        try:
            order = pipe.recv()
        except EOFError:
            order = "stop"
        if order == "stop":
            stopped.set()
            return
        journal = engine.journal
        before, commits = commits, 0 if journal is None else journal.commit_rows.count
        pipe.send(
            Told(probe.take(), commits - before, 0 if journal is None else int(journal.commit_rows.last))
        )

    asyncio.get_running_loop().add_reader(pipe.fileno(), asked)
    await stopped.wait()
    await engine.close()
    pipe.send(None)
    return 0


# -- the load


class _Bench:
    """Every load on both servers, in turn."""

    def __init__(
        self, memory: Server, durable: Server, connections: int, rounds: int, seconds: float
    ) -> None:
        self.found: dict[tuple[str, str], Figures] = {}
        self._servers = {"memory": memory, "durable": durable}
        self._connections = connections
        self._rounds = rounds
        self._seconds = seconds

    def run(self) -> None:
        """All rounds."""
        for _ in range(self._rounds):
            for kind, connections in (
                ("mixed", self._connections),
                ("mixed, a quarter of them", max(1, self._connections // 4)),
                ("acquire and unblock", self._connections),
                ("generate", self._connections),
                ("one at a time", 1),
            ):
                for name, server in self._servers.items():
                    server.told()
                    load = Child(None, measure, server.address, kind, connections, self._seconds)
                    self._keep(kind, name, load.wait(60 + 10 * self._seconds), server.told())

    def _keep(self, kind: str, name: str, measured: Round, told: Told) -> None:
        figures = self.found.setdefault((kind, name), Figures())
        figures.rounds.append(measured)
        figures.stalls.append(told.stall)
        figures.commits += told.commits

    def share(self, kind: str) -> float:
        """Of memory's rate, the durable one's: the median of the rounds, each with its neighbour."""
        durable, memory = self.found[kind, "durable"], self.found[kind, "memory"]
        pairs = zip(durable.rounds, memory.rounds, strict=True)
        return median([one.rate / other.rate for one, other in pairs])

    def table(self) -> Table:
        """All figures."""
        table = Table(
            "load",
            "a second",
            "of memory",
            "cpu each",
            "p50",
            "p99",
            "worst",
            "stall",
            "own",
            "calls a commit",
        )
        for (kind, name), figures in self.found.items():
            ordered = figures.latencies
            spans = [span(percentile(ordered, percent)) for percent in (50, 99, 100)]
            share = f"{self.share(kind):.0%}" if name == "durable" else ""
            stall = max(each.wall for each in figures.stalls), max(each.own for each in figures.stalls)
            calls = f"{len(ordered) / figures.commits:.1f}" if figures.commits else ""
            cost = span(median([each.cost for each in figures.rounds]))
            table.row(
                f"{kind}, {name}", f"{figures.rate:,.0f}", share, cost, *spans, *map(span, stall), calls
            )
        return table

    @property
    def errors(self) -> int:
        """Of all rounds."""
        return sum(each.errors for figures in self.found.values() for each in figures.rounds)


def measure(address: Address, kind: str, connections: int, seconds: float) -> Round:
    """One round, in a process of its own."""
    return on_loop(_measure(address, kind, connections, seconds))


async def _measure(address: Address, kind: str, count: int, seconds: float) -> Round:
    connections = await Connections.open(address, count)
    texts = await some_texts(connections, 4000)
    if kind == "generate":
        measured = await generates(connections, seconds)
    elif kind == "acquire and unblock":
        measured = await connections.run(pairs, seconds)
    elif kind == "one at a time":
        measured = await connections.run(keepalives(texts, seed=time.time_ns()), seconds)
    else:
        # A key that one connection made and is about to delete may have been served to another: 404.
        measured = await connections.run(mixed(texts, seed=time.time_ns()), seconds, {404})
    connections.close()
    return measured


def _bare_syncs(path: Path) -> list[float]:
    """What it takes to append a page to a file and have it on the disk, in order: the least that a commit can."""
    spans = []
    with path.open("wb", buffering=0) as file:
        for _ in range(_SYNCS):
            began = time.perf_counter()
            file.write(bytes(4096))
            os.fdatasync(file.fileno())
            spans.append(time.perf_counter() - began)
    return sorted(spans)


def _judge(bench: _Bench, syncs: Sequence[float], bytes_a_key: float) -> int:
    targets = Targets()
    share = bench.share("mixed")
    targets.check("mixed, durable, of the rate in memory", share >= SHARE, f"{share:.0%}", f"{SHARE:.0%}")
    for kind in ("mixed", "mixed, a quarter of them", "acquire and unblock"):
        stall = median(sorted(each.own for each in bench.found[kind, "durable"].stalls))
        beside = median(sorted(each.own for each in bench.found[kind, "memory"].stalls))
        targets.at_most(f"{kind}, worst stall of a round (in memory {span(beside)})", stall, STALL)
    sync = percentile(syncs, 50)
    single = percentile(bench.found["one at a time", "durable"].latencies, 50)
    print(f"      a bare fdatasync: p50 {span(sync)}, p99 {span(percentile(syncs, 99))}")
    targets.at_most("one call at a time, p50", single, FSYNCS * sync + BESIDE)
    targets.check("bytes a key in the file", bytes_a_key <= BYTES, f"{bytes_a_key:.0f}", f"at most {BYTES}")
    targets.check("errors", bench.errors == 0, str(bench.errors), "none")
    return targets.status
