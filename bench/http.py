"""The API next to constants on other servers, under the same load, in turns.

keypool in memory, on a data file and with `--http=tornado`; a constant on Tornado's server, FastAPI and Starlette.
keypool does its work meanwhile: a third each of acquire, unblock and keepalive, over 100,000 keys. The load comes from
wrk if it is installed, else from asyncio, which takes more of the machine and makes all differences smaller. "by cpu"
compares the processor time of a request, which stays comparable while the machine does other work.

Then keypool alone: unblocks with an outcome and without, pages on both HTTP servers, batches of 1,000 keepalives, and
calls one at a time. With `--old PATH` only the servers of that checkout and of this one are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.baselines import CONSTANTS, installed, serving
from bench.load import Address
from bench.process import cpu_of
from bench.race import Race, Sample
from bench.report import Targets, machine
from bench.scripts import A_BATCH, KEYS, fill, load
from bench.servers import Server, add_old

QUICK = ["--keys=10000", "--rounds=3", "--seconds=0.5"]
MIXED = "acquire, unblock, keepalive"
OF_TORNADO, DURABLE_OF_TORNADO, DURABLE_OF_FASTAPI, OF_STARLETTE = 6.0, 4.5, 2.5, 1.0
PAGES, LATENCY, OUTCOME = 1.8, 0.5, 0.9
BATCHED, DURABLY_BATCHED = 250_000, 100_000
_LUA = Path(__file__).with_name("load.lua")
_WRK = shutil.which("wrk")


def main(arguments: Sequence[str]) -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser("bench http", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="the median counts")
    parser.add_argument("--seconds", type=float, default=2.0, help="of load, a round")
    add_old(parser)
    options = parser.parse_args(arguments)
    print(f"{machine()}; load from {'wrk' if _WRK else 'asyncio'}\n", flush=True)
    with contextlib.ExitStack() as stack:
        return _Run(options, stack).run()


class _Run:
    def __init__(self, options: argparse.Namespace, stack: contextlib.ExitStack) -> None:
        self._options = options
        self._stack = stack
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="keypool-bench-")))
        self._targets = Targets()

    def run(self) -> int:
        if self._options.old:
            self._against_old(self._options.old)
        else:
            servers = {
                "keypool, in memory": self._keypool(),
                "keypool, on a data file": self._keypool(durable=True),
                "keypool, --http=tornado": self._keypool("--http=tornado"),
            }
            self._against_others(servers)
            memory, durable, stock = servers.values()
            self._outcomes(memory)
            self._pages(memory, stock)
            self._batches({"in memory": (memory, BATCHED), "on a data file": (durable, DURABLY_BATCHED)})
            self._one_at_a_time(memory, stock)
        return self._targets.status

    def _keypool(self, *flags: str, durable: bool = False, tree: Path | None = None) -> Address:
        data = f"--data={tempfile.mkdtemp(dir=self._folder)}/keypool.db" if durable else "--data=:memory:"
        server = self._stack.enter_context(Server("--keepalive-seconds=36000", data, *flags, tree=tree))
        texts = fill(server.address, self._options.keys)
        self._texts(server.address).write_text("".join(f"{text}\n" for text in texts))
        return server.address

    def _texts(self, address: Address) -> Path:
        """A file with keys of a server, for wrk."""
        return self._folder / f"texts-{address.port}"

    def _load(self, address: Address, kind: str, connections: int | None = None) -> Callable[[], Sample]:
        count = connections or self._options.connections
        seconds = self._options.seconds
        if (_WRK and kind in _BY_WRK) or (_WRK and " /" in kind):
            return lambda: _by_wrk(address, kind, count, seconds, self._texts(address))
        return lambda: Sample.of(load(address, kind, count, seconds))

    def _race(self, title: str, racers: dict[str, Callable[[], Sample]], *bases: str) -> Race:
        race = Race()
        for name, sample in racers.items():
            race.add(name, sample)
        race.run(self._options.rounds)
        print(f"{race.table(title, bases)}\n", flush=True)
        return race

    # -- what is compared

    def _against_old(self, old: Path) -> None:
        for title, durable in (("in memory", False), ("on a data file", True)):
            trees = {"old": self._keypool(durable=durable, tree=old), "new": self._keypool(durable=durable)}
            for kind in (MIXED, f"GET {KEYS}?limit=50", "keepalives by the thousand"):
                racers = {name: self._load(address, kind) for name, address in trees.items()}
                race = self._race(f"{kind}, {title}", racers, "old")
                self._targets.none("errors", race.found["new"].errors)

    def _against_others(self, servers: dict[str, Address]) -> None:
        racers: dict[str, Callable[[], Sample]] = {}
        for name in filter(installed, CONSTANTS):
            address = self._stack.enter_context(serving(name))
            racers[f"constant, {name}"] = self._load(address, "POST /constant")
        racers |= {name: self._load(address, MIXED) for name, address in servers.items()}
        frameworks = [name for name in racers if name.startswith("constant, ")]
        race = self._race(MIXED, racers, *frameworks)
        memory, durable = (race.found[f"keypool, {where}"] for where in ("in memory", "on a data file"))
        for where, figures, framework, wanted in (
            ("in memory", memory, "tornado", OF_TORNADO),
            ("on a data file", durable, "tornado", DURABLE_OF_TORNADO),
            ("in memory", memory, "starlette", OF_STARLETTE),
            ("on a data file", durable, "fastapi", DURABLE_OF_FASTAPI),
        ):
            if base := race.found.get(f"constant, {framework}"):
                self._targets.at_least(f"calls {where}, of {framework}'s constant", figures.of(base), wanted)

    def _outcomes(self, memory: Address) -> None:
        kinds = ("unblock with lease", "unblock with outcome")
        race = self._race("unblock", {kind: self._load(memory, kind) for kind in kinds}, kinds[0])
        self._targets.at_least(
            f"{kinds[1]}, of {kinds[0]}", race.found[kinds[1]].of(race.found[kinds[0]]), OUTCOME
        )

    def _pages(self, fast: Address, stock: Address) -> None:
        """The same handlers on both HTTP servers. Templates dominate the dashboard's pages, so they aren't judged."""
        for target in ("/healthz", f"{KEYS}?limit=50", "/", "/keys"):
            kind = f"GET {target}"
            pair = {"fast": self._load(fast, kind), "tornado": self._load(stock, kind)}
            race = self._race(kind, pair, "tornado")
            if target not in ("/", "/keys"):
                ratio = race.found["fast"].of(race.found["tornado"])
                self._targets.at_least(f"{kind}, of Tornado's server", ratio, PAGES)

    def _batches(self, servers: dict[str, tuple[Address, int]]) -> None:
        kind = "keepalives by the thousand"
        race = self._race(
            kind, {name: self._load(each[0], kind) for name, each in servers.items()}, "in memory"
        )
        for name, (_, wanted) in servers.items():
            found = race.found[name].rate * A_BATCH
            self._targets.check(
                f"{kind}, {name}, keys a second", found >= wanted, f"{found:,.0f}", f"{wanted:,}"
            )

    def _one_at_a_time(self, fast: Address, stock: Address) -> None:
        pair = {name: self._load(each, "keepalive", 1) for name, each in (("fast", fast), ("tornado", stock))}
        race = self._race("keepalive, one at a time", pair, "tornado")
        limit = LATENCY * race.found["tornado"].p50
        self._targets.at_most("p50, one at a time", race.found["fast"].p50, limit)


_BY_WRK = {MIXED: "mixed", "keepalive": "keepalive"}


def _by_wrk(server: Address, kind: str, connections: int, seconds: float, texts: Path) -> Sample:
    method, _, target = kind.rpartition(" ") if " /" in kind else ("POST", "", "/constant")
    command = [_WRK or "wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}", "--latency"]
    url = f"http://127.0.0.1:{server.port}{target}"
    if method == "POST":
        command += ["-s", str(_LUA), url, "--", _BY_WRK.get(kind, target), str(texts)]
    else:
        command += [url]
    before = cpu_of(server.pid)
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    cpu = cpu_of(server.pid) - before
    spans = dict(re.findall(r"(50|99)%\s+([0-9.]+(?:us|ms|s))\b", text))
    count, rate = re.search(r"(\d+) requests in", text), re.search(r"Requests/sec:\s+([0-9.]+)", text)
    if "Non-2xx" in text or "Socket errors" in text or not (spans and count and rate):
        raise ChildProcessError(text)
    return Sample(float(rate[1]), cpu / int(count[1]), _seconds(spans["50"]), _seconds(spans["99"]))


def _seconds(text: str) -> float:
    number, unit = re.split(r"(?<=[0-9.])(?=[a-z])", text)
    return float(number) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[unit]
