"""The API on the fast server beside constants on others: ratios of one run.

On this machine, one after the other and round after round, so that what else it does falls on all: keypool in
memory and on a data file, on the fast server and on Tornado's; a constant on Tornado's server, on FastAPI and on
Starlette; acquire and unblock as scripts in a Valkey; and a bare parser that writes a constant, which is the limit.
keypool does its work meanwhile: a third each of acquire, unblock and keepalive, over 100,000 keys. The load comes from
wrk where that is installed, else from asyncio, which takes more of the machine and makes all differences smaller.
Beside rates are told the processor that a request takes and the first constant's as a multiple of it ("by it"): that
is what remains comparable while the machine does other work.

Then, on keypool alone: pages, which are the same handlers on both servers; batches of 1,000 keepalives; and calls
one at a time.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from bench.load import Address, Connections, GoOn, Round, Script, request
from bench.process import Child, cpu_of, on_loop
from bench.real import RealServer
from bench.report import Table, Targets, machine, median, percentile, span
from bench.rivals import RIVALS, installed, scripts, valkey_with_keys
from bench.scripts import ACQUIRE, KEYS, keepalives, path, same, saying, unblock

if TYPE_CHECKING:
    from valkeys import Valkey

QUICK = ["--keys=10000", "--rounds=3", "--seconds=0.5"]
TORNADO, DURABLE_TORNADO, DURABLE_FASTAPI, PAGES, LATENCY = 6.0, 4.5, 2.5, 1.8, 0.5
BATCHED, DURABLY_BATCHED = 250_000, 100_000
_LUA = Path(__file__).with_name("load.lua")
_BATCH = 1000
_CONSTANT = "/constant"


@dataclass
class Figures:
    """All rounds of one load on one server."""

    rates: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)  # seconds of the server's main thread, a request
    middles: list[float] = field(default_factory=list)  # latency that half of the calls don't exceed

    def add(self, rate: float, cost: float, middle: float) -> None:
        """One more round."""
        self.rates.append(rate)
        self.costs.append(cost)
        self.middles.append(middle)

    def of(self, other: Figures) -> float:
        """The rate as a multiple of another's: the median of what the rounds say."""
        return median([mine / theirs for mine, theirs in zip(self.rates, other.rates, strict=True)])


@dataclass
class Contestant:
    """A server, and what it is asked for: a target of GET, or the name of a script."""

    name: str
    address: Address
    asked: str
    connections: int = 32
    found: Figures = field(default_factory=Figures)


def main(arguments: Sequence[str]) -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser("bench http", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="the median counts; 3 at least")
    parser.add_argument("--seconds", type=float, default=2.0, help="of load, a round")
    options = parser.parse_args(arguments)
    print(f"{machine()}; load by {'wrk' if shutil.which('wrk') else 'asyncio'}\n", flush=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="keypool-bench-")))
        return _Run(options, stack, folder).judge()


class _Run:
    """One run: starts all servers, measures, prints."""

    def __init__(self, options: argparse.Namespace, stack: ExitStack, folder: Path) -> None:
        self._options = options
        self._stack = stack
        self._folder = folder
        memory = self._keypool("--data=:memory:")
        durable = self._keypool(f"--data={folder / 'keypool.db'}")
        stock = self._keypool("--data=:memory:", "--http=tornado")
        self._servers = {
            "keypool, in memory": memory,
            "keypool, durable": durable,
            "keypool, --http=tornado": stock,
        }
        self._found: dict[str, Figures] = {}

    def judge(self) -> int:
        """All that is measured; the exit status."""
        targets = Targets()
        self._race(targets)
        self._pages(targets)
        self._batches(targets)
        self._one_by_one(targets)
        return targets.status

    def _keypool(self, *flags: str) -> Address:
        server = self._stack.enter_context(RealServer("--keepalive-seconds=36000", *flags))
        texts = _fill(server.address, self._options.keys)
        # Each server has keys of its own, and so a file of its own.
        _texts_of(self._folder, server.address).write_text("".join(f"{text}\n" for text in texts))
        return server.address

    def _rival(self, name: str) -> Address:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port: int = free.getsockname()[1]
        process = subprocess.Popen([sys.executable, "-m", "bench.rivals", name, str(port)])
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.05)
        return Address(port, process.pid)

    def _race(self, targets: Targets) -> None:
        constants = {f"constant, {name}": self._rival(name) for name in RIVALS if installed(name)}
        racers = [Contestant(name, address, _CONSTANT) for name, address in constants.items()]
        racers += [Contestant(name, address, "mixed") for name, address in self._servers.items()]
        valkey = self._stack.enter_context(valkey_with_keys(self._options.keys))
        self._measure(racers, valkey)
        found = {each.name: each.found for each in racers}
        stock, fast = found["constant, tornado"], found["keypool, in memory"]
        durable = found["keypool, durable"]
        _judge_ratio(targets, "mixed calls in memory, of Tornado's constant", fast.of(stock), TORNADO)
        _judge_ratio(
            targets, "mixed calls on disk, of Tornado's constant", durable.of(stock), DURABLE_TORNADO
        )
        if "constant, starlette" in found:
            _judge_ratio(
                targets,
                "mixed calls in memory, of Starlette's constant",
                fast.of(found["constant, starlette"]),
                1,
            )
        if "constant, fastapi" in found:
            _judge_ratio(
                targets,
                "mixed calls on disk, of FastAPI's constant",
                durable.of(found["constant, fastapi"]),
                DURABLE_FASTAPI,
            )

    def _measure(self, racers: list[Contestant], valkey: Valkey | None = None) -> None:
        script = Figures()
        for _ in range(max(3, self._options.rounds)):
            for each in racers:
                each.found.add(*self._load(each))
            if valkey is not None:
                before = cpu_of(valkey.pid)
                rate = Child(
                    None, _scripts, valkey.port, self._options.connections, self._options.seconds
                ).wait(60)
                script.add(rate, (cpu_of(valkey.pid) - before) / (rate * self._options.seconds), 0.0)
        bases = _bases(racers)
        first, base = next(iter(bases.items()))
        columns = (f"of {name}" for name in bases)
        table = Table("server", "a second", *columns, "cpu each", f"{first}, by it", "p50")
        if valkey is not None:
            address = Address(valkey.port, valkey.pid)
            racers = [*racers, Contestant("acquire, unblock in a Valkey", address, "", found=script)]
        for each in racers:
            ratios = [f"{each.found.of(other):.2f}" for other in bases.values()]
            middle, cost = median(each.found.middles), median(each.found.costs)
            table.row(
                each.name,
                f"{median(each.found.rates):,.0f}",
                *ratios,
                span(cost),
                f"{median(base.costs) / cost:.2f}",
                span(middle) if middle else "-",
            )
        print(f"{table}\n", flush=True)

    def _load(self, each: Contestant) -> tuple[float, float, float]:
        """Rate, cost and middle latency of one round."""
        before = cpu_of(each.address.pid)
        options = each.address, each.asked, each.connections, self._options.seconds
        texts = _texts_of(self._folder, each.address)
        measured = _by_wrk(*options, texts) if shutil.which("wrk") else _by_asyncio(*options, texts)
        rate, middle, count = measured
        return rate, (cpu_of(each.address.pid) - before) / count, middle

    def _pages(self, targets: Targets) -> None:
        """The same handlers, on both servers. What the dashboard's pages cost is their templates, so only told."""
        fast, stock = self._servers["keypool, in memory"], self._servers["keypool, --http=tornado"]
        targeted = {
            "a handler without a template": "/healthz",
            "a list by the API": f"{KEYS}?limit=50",
            "the dashboard": "/",
            "its list of keys": "/keys",
        }
        for name, target in targeted.items():
            pair = [Contestant(name, fast, target), Contestant(f"{name}, --http=tornado", stock, target)]
            self._measure(pair)
            if name.startswith("a "):
                _judge_ratio(targets, f"{name}, of Tornado's server", pair[0].found.of(pair[1].found), PAGES)

    def _batches(self, targets: Targets) -> None:
        for name, wanted in (("keypool, in memory", BATCHED), ("keypool, durable", DURABLY_BATCHED)):
            address = self._servers[name]
            texts = _texts_of(self._folder, address).read_text().split()
            seconds = self._options.seconds
            rates = [
                Child(None, _batched, address, texts, seconds).wait(60)
                for _ in range(max(3, self._options.rounds))
            ]
            found = median(rates)
            targets.check(
                f"{name}, keys a second kept alive by the thousand",
                found >= wanted,
                f"{found:,.0f}",
                f"{wanted:,}",
            )

    def _one_by_one(self, targets: Targets) -> None:
        pair = [
            Contestant(f"one by one, {name}", self._servers[name], "keepalive", 1)
            for name in ("keypool, in memory", "keypool, --http=tornado")
        ]
        self._measure(pair)
        fast, stock = (median(each.found.middles) for each in pair)
        targets.check(
            "p50 one by one, of Tornado's server",
            fast <= LATENCY * stock,
            f"{fast / stock:.2f}",
            f"{LATENCY}",
        )


def _judge_ratio(targets: Targets, name: str, found: float, wanted: float) -> None:
    targets.check(name, found >= wanted, f"{found:.2f}", f"{wanted:g}")


def _bases(racers: Sequence[Contestant]) -> dict[str, Figures]:
    """What the others are told as multiples of: the constants of the frameworks, or else the last of them."""
    found = {
        each.name.removeprefix("constant, "): each.found
        for each in racers
        if each.name in ("constant, tornado", "constant, fastapi", "constant, starlette")
    }
    return found or {"the last": racers[-1].found}


def _texts_of(folder: Path, address: Address) -> Path:
    """Where the texts of a server's keys stand, one a line."""
    return folder / f"texts-{address.port}"


def _fill(server: Address, keys: int) -> list[str]:
    """Make that many keys; their texts, some of them."""
    return Child(None, _filled, server, keys).wait(120)


def _filled(server: Address, keys: int) -> list[str]:
    return on_loop(_generated(server, keys))


async def _generated(server: Address, keys: int) -> list[str]:
    connections = await Connections.open(server, 1)
    texts: list[str] = []

    def heard(body: bytes) -> None:
        texts.extend(key["key"] for key in msgspec.json.decode(body)["keys"])

    crowd = request("/api/v1/batch", b'{"op":"generate","count":%d}' % _BATCH)
    await connections.run(saying(iter([crowd] * (keys // _BATCH)), heard), 60)
    connections.close()
    return random.Random(1).sample(texts, min(len(texts), 20_000))


def _scripts(port: int, connections: int, seconds: float) -> float:
    return on_loop(scripts(port, connections, seconds))


def _batched(server: Address, texts: list[str], seconds: float) -> float:
    """Keys a second that are kept alive by the thousand, one batch at a time on each of two connections."""

    async def main() -> float:
        bodies = [
            msgspec.json.encode({"op": "keepalive", "keys": texts[start : start + _BATCH]})
            for start in range(0, len(texts) - _BATCH + 1, _BATCH)
        ]
        asked = [request("/api/v1/batch", body) for body in bodies]

        def script(going: GoOn) -> Script:
            while going():
                for batch in asked:  # noqa: UP028 - what is sent back is for this script
                    yield batch

        connections = await Connections.open(server, 2)
        measured = await connections.run(script, seconds)
        connections.close()
        if measured.errors:
            raise ChildProcessError(f"{measured.errors} batches failed")
        return len(measured.latencies) * _BATCH / measured.seconds

    return on_loop(main())


def _by_wrk(
    server: Address, asked: str, connections: int, seconds: float, texts: Path
) -> tuple[float, float, float]:
    """Rate, latency in the middle, and count of requests."""
    url = f"http://127.0.0.1:{server.port}"
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}", "--latency"]
    if asked.startswith("/") and asked != _CONSTANT:
        command += [url + asked]
    else:
        command += ["-s", str(_LUA), url + _CONSTANT, "--", asked, str(texts)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in told or "Socket errors" in told:
        raise ChildProcessError(told)
    middle = re.search(r"50%\s+([0-9.]+)(us|ms|s)\b", told)
    count = re.search(r"(\d+) requests in", told)
    rate = re.search(r"Requests/sec:\s+([0-9.]+)", told)
    if not (middle and count and rate):
        raise ChildProcessError(told)
    return float(rate[1]), float(middle[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1}[middle[2]], int(count[1])


def _by_asyncio(
    server: Address, asked: str, connections: int, seconds: float, texts: Path
) -> tuple[float, float, float]:
    """The same."""
    told = texts.read_text().split() if texts.exists() else []
    measured = Child(None, _loaded, server, asked, connections, seconds, told).wait(60 + seconds)
    if measured.errors:
        raise ChildProcessError(f"{measured.errors} requests failed")
    return measured.rate, percentile(sorted(measured.latencies), 50), measured.requests


def _loaded(server: Address, asked: str, connections: int, seconds: float, texts: list[str]) -> Round:
    async def main() -> Round:
        opened = await Connections.open(server, connections)
        measured = await opened.run(_script(asked, texts), seconds)
        opened.close()
        return measured

    return on_loop(main())


def _script(asked: str, texts: list[str]) -> Callable[[GoOn], Script]:
    if asked == "mixed":
        return _thirds(texts)
    if asked == "keepalive":
        return keepalives(texts)
    return same(request(asked, method="POST" if asked == _CONSTANT else "GET"))


def _thirds(texts: list[str]) -> Callable[[GoOn], Script]:
    draw = random.Random(1).random

    def script(going: GoOn) -> Script:
        while going():
            _, body = yield ACQUIRE
            yield unblock(msgspec.json.decode(body), with_lease=True)
            yield request(path(texts[int(draw() * len(texts))], "keepalive"))

    return script
