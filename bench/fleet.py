"""Servers over one pool, killed at random, and primaries killed: what is lost, and how soon all go on.

Three servers over one Valkey, and over a cluster of three: servers are killed under load, and nothing told may be
untrue afterwards (the rounds of `tests/test_fleet.py`, for longer). Then primaries of a cluster with replicas: the
servers have to go on by themselves within 15 s, and what was told and is lost is counted, for Valkey copies to its
replicas after it has answered. A new pool is begun each time, so that a loss is counted once.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import valkeys
from bench.report import Table, Targets, machine, median

if TYPE_CHECKING:
    from fleet import FailedOver, Fleet
    from valkeys import Cluster

QUICK = ["--kills=10", "--failovers=1"]
WITHIN = 15.0
_KILLS_A_ROUND = 5
_ROUNDS_A_POOL = 4


def main(arguments: Sequence[str]) -> int:
    """Kill, look, judge."""
    parser = argparse.ArgumentParser("bench fleet", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--kills", type=int, default=200, help="of servers, over one Valkey and over a cluster each"
    )
    parser.add_argument("--failovers", type=int, default=10, help="of primaries")
    parser.add_argument("--frozen", action="store_true", help="stop primaries in place of killing them")
    parser.add_argument(
        "--behind", type=int, default=0, metavar="N", help="let a primary's replica miss the last N answers"
    )
    parser.add_argument("--replicas", type=int, default=1, help="of each primary")
    parser.add_argument("--min-replicas", type=int, default=0, help="Valkey's min-replicas-to-write")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    if missing := valkeys.missing():
        print(missing)
        return 0
    print(machine() + "\n", flush=True)
    targets = Targets()
    if options.kills:
        with contextlib.closing(valkeys.started()) as one:
            _kill_servers("one Valkey", one.url, options, targets)
        with contextlib.closing(valkeys.cluster(3, 0)) as three:
            _kill_servers("a cluster of three", three.url, options, targets)
    if options.failovers:
        flags = ("--min-replicas-to-write", str(options.min_replicas))
        with contextlib.closing(valkeys.cluster(3, options.replicas, *flags)) as six:
            _fail_over(six, options, targets)
    return targets.status


def _tests() -> Any:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    try:
        import fleet  # noqa: PLC0415 - the harness lives with the tests, which are no package
    finally:
        del sys.path[0]
    return fleet


@contextlib.contextmanager
def _servers(url: str, seed: int, **how: float) -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="keypool-fleet-") as folder:
        made: Fleet
        with _tests().Fleet(f"{url}?pool=seed{seed}", Path(folder), seed, **how) as made:
            yield made


def _kill_servers(where: str, url: str, options: argparse.Namespace, targets: Targets) -> None:
    kills, answers, refused, faults, seed = 0, 0, 0, 0, options.seed
    while kills < options.kills and not faults:
        with _servers(url, seed) as fleet:
            for _ in range(_ROUNDS_A_POOL):
                found = fleet.round(_KILLS_A_ROUND)
                for fault in found:
                    print(f"  seed {seed}: {fault}")
                faults += len(found)
                if found or kills + fleet.tally.kills >= options.kills:
                    break
            kills += fleet.tally.kills
            answers += fleet.tally.answers
            refused += fleet.tally.refused
        seed += 1
        print(f"{where}: {kills} kills, {answers:,} answers, {refused} of 503, {faults} faults", flush=True)
    targets.check(f"broken promises after {kills} kills over {where}", not faults, str(faults), "none")


def _fail_over(cluster: Cluster, options: argparse.Namespace, targets: Targets) -> None:
    draw = random.Random(options.seed)
    table = Table("failover", "noticed", "all go on", "answers", "503", "broken promises")
    done: list[FailedOver] = []
    for number in range(options.failovers):
        primary = cluster.primary_of(draw.randrange(16384))
        behind = (cluster.replica_of(primary), options.behind) if options.behind else None
        # Blocks that outlast the failover: a lease that is lost can be another's meanwhile.
        with _servers(cluster.url, options.seed + number, block_seconds=20, keepalive_seconds=60) as fleet:
            fleet.allow(r"Valkey|storage")
            told = _tests().fail_over(
                fleet, primary, answers=1000, within=60.0, frozen=options.frozen, behind=behind
            )
            done.append(told)
            kinds = ", ".join(f"{count} {kind}" for kind, count in told.kinds.items()) or "none"
            kinds += f", of {told.keys} keys" if told.keys else ""
            table.row(
                str(number + 1), f"{told.noticed:.1f} s", f"{told.recovered:.1f} s", f"{fleet.tally.answers:,}",
                str(fleet.tally.refused), kinds,
            )  # fmt: skip
            for fault in told.faults:
                print(f"  failover {number + 1}: {fault}", flush=True)
        cluster.mend()
    print(f"\n{table}\n")
    slowest = max(each.recovered for each in done)
    broken = sum((Counter(each.kinds) for each in done), Counter())
    keys = sum(each.keys for each in done)
    print(f"half went on within {median([each.recovered for each in done]):.1f} s")
    print(f"broken promises in {len(done)} failovers: {dict(broken) or 'none'}, of {keys} keys")
    print(f"keys held by two: {broken['held by two']}")
    targets.at_most("the slowest to go on", slowest, WITHIN)
    never = sum(len(each.never) for each in done)
    targets.check("leases or keys given twice", not never, str(never), "none")
