"""Keys from elsewhere beside generated ones: batches of imports, texts that begin alike, many pools, encrypted files.

`batches` go over HTTP, a thousand keys each, to a server in memory and to one on a data file in clear and encrypted, in
turns with batches that generate. `texts` are keys that begin with sk-live-, and as many random ones, in two engines of
one process. `pools` are acquire and unblock over HTTP, in `default` and in one of 100 pools of the same server.
`opening` reads a file of encrypted keys and one in clear. The best round counts, and costs are processor time: other
processes only ever add. `import_loads.py` has the loads.
"""

from __future__ import annotations

import argparse
import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.import_loads import SECRETS_KEY, Costs, batches, open_file, pairs, texts, write_file
from bench.process import Child
from bench.report import Table, Targets, machine, size, span
from bench.servers import Server

QUICK = ["--keys=20000", "--rounds=2"]
DURABLE, ENCRYPTED = 20_000, 12_000  # keys imported a second
ALIKE, IN_A_POOL, LATER = 1.1, 1.05, 3.0  # of the cost of the baseline; seconds more, at a million keys
_POOLS = 100
_MILLION = 1_000_000


def main(arguments: Sequence[str]) -> int:
    """Measure, print, judge."""
    parts: dict[str, Callable[[argparse.Namespace, Targets], None]] = {
        "batches": _batches,
        "texts": _texts,
        "pools": _pools,
        "opening": _opening,
    }
    parser = argparse.ArgumentParser("bench imports", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=parts, help="instead of all")
    parser.add_argument("--keys", type=int, default=100_000, help="of each kind; a file has twice as many")
    parser.add_argument("--rounds", type=int, default=3, help="the best counts")
    options = parser.parse_args(arguments)
    print(machine(), flush=True)
    targets = Targets()
    for name, part in parts.items():
        if options.part in (None, name):
            part(options, targets)
    return targets.status


def _batches(options: argparse.Namespace, targets: Targets) -> None:
    table = Table(
        "keys a second", "import", "generate", "of generate", "by processor", "a key", "of generate's"
    )
    secret = {"KEYPOOL_SECRETS_KEY": base64.b64encode(SECRETS_KEY).decode()}
    found = {}
    with TemporaryDirectory(prefix="keypool-imports-") as folder:
        for name, data, env in (
            ("memory", ":memory:", {}),
            ("data file", f"{folder}/clear.db", {}),
            ("data file, encrypted", f"{folder}/encrypted.db", secret),
        ):
            with Server(f"--data={data}", env=env) as server:
                best = Child(batches, server.address, options.rounds).wait(300)
            (rate, cost), (base_rate, base_cost) = best["import"], best["generate"]
            found[name] = 1 / cost
            table.row(
                name, f"{rate:,.0f}", f"{base_rate:,.0f}", f"{rate / base_rate:.2f}", f"{1 / cost:,.0f}", span(cost),
                f"{cost / base_cost:.2f}",
            )  # fmt: skip
    print(f"\n{table}\n")
    for name, least in (("data file", DURABLE), ("data file, encrypted", ENCRYPTED)):
        what = f"imported by a second of the server's processor time, {name}"
        targets.check(what, found[name] >= least, f"{found[name]:,.0f}", f"at least {least:,}")


def _texts(options: argparse.Namespace, targets: Targets) -> None:
    costs = Child(texts, options.keys, 25 * options.rounds).wait(300)
    _compare(f"{size(options.keys)} keys, a call", costs, ("begin alike", "random"), ALIKE, targets)


def _pools(options: argparse.Namespace, targets: Targets) -> None:
    with Server("--data=:memory:") as server:
        costs = Child(pairs, server.address, _POOLS, 10 * options.rounds).wait(300)
    title = f"{_POOLS} pools, a request"
    _compare(title, costs, ("in one of them", "in default"), IN_A_POOL, targets)


def _compare(title: str, costs: Costs, names: tuple[str, str], most: float, targets: Targets) -> None:
    name, base = names
    table, ratios = Table(title, name, base, "ratio"), {}
    for call in dict.fromkeys(call for _, call in costs):
        mine, theirs = costs[name, call], costs[base, call]
        ratios[call] = mine / theirs
        table.row(call, span(mine), span(theirs), f"{ratios[call]:.2f}")
    print(f"\n{table}\n")
    for call, ratio in ratios.items():
        targets.check(f"{call}, {name}, of {base}", ratio <= most, f"{ratio:.2f}", f"at most {most}")


def _opening(options: argparse.Namespace, targets: Targets) -> None:
    keys, best = 2 * options.keys, dict[str, float]()
    files: dict[str, tuple[bytes, ...]] = {"clear": (), "encrypted": (SECRETS_KEY,)}
    with TemporaryDirectory(prefix="keypool-imports-") as folder:
        for name, secrets in files.items():
            Child(write_file, Path(folder, name), secrets, keys).wait(300)
        for _ in range(options.rounds):
            for name, secrets in files.items():
                spent = Child(open_file, Path(folder, name), secrets).wait(300)
                best[name] = min(best.get(name, spent), spent)
    table = Table(f"opening {size(keys)} keys", "took", "of clear", "a key")
    for name, spent in best.items():
        table.row(name, span(spent), f"{spent / best['clear']:.2f}", span(spent / keys))
    print(f"\n{table}\n")
    later = (best["encrypted"] - best["clear"]) * _MILLION / keys
    targets.at_most("encrypted later than clear, for each million keys", later, LATER)
