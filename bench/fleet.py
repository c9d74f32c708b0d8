"""Servers over one pool, killed at random, and primaries of a cluster killed: what is lost, and how soon all recover.

Three servers over one Valkey, and over a cluster of three: servers are killed under load, and everything that was
answered must still be true afterwards (the rounds of `tests/test_fleet.py`, for longer). Then primaries of a cluster
with replicas: the servers have to recover by themselves within 15 s. Valkey replicates after it has answered, so a
failover may lose what was answered; that is counted. Each failover has a pool of its own, so a loss is counted once.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
    """Kill, check, judge."""
    parser = argparse.ArgumentParser("bench fleet", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--kills", type=int, default=200, help="of servers, over one Valkey and over a cluster each"
    )
    parser.add_argument("--failovers", type=int, default=10, help="of primaries")
    parser.add_argument("--frozen", action="store_true", help="SIGSTOP primaries instead of killing them")
    parser.add_argument(
        "--behind", type=int, default=0, metavar="N", help="keep the last N answers from a primary's replica"
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


@contextlib.contextmanager
def _servers(url: str, seed: int, **how: float) -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="keypool-fleet-") as folder:
        made: Fleet
        with valkeys.of_tests("fleet").Fleet(f"{url}?pool=seed{seed}", Path(folder), seed, **how) as made:
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
    targets.none(f"broken promises after {kills} kills over {where}", faults)


def _fail_over(cluster: Cluster, options: argparse.Namespace, targets: Targets) -> None:
    draw = random.Random(options.seed)
    table = Table("failover", "noticed", "recovered", "answers", "503", "broken promises")
    done: list[FailedOver] = []
    for number in range(options.failovers):
        primary = cluster.primary_of(draw.randrange(16384))
        behind = (cluster.replica_of(primary), options.behind) if options.behind else None
        # Blocks outlast the failover, so that a key whose lease was lost can be seen in two hands.
        with _servers(cluster.url, options.seed + number, block_seconds=20, keepalive_seconds=60) as fleet:
            fleet.allow(r"Valkey|storage")
            found = valkeys.of_tests("fleet").fail_over(
                fleet, primary, answers=1000, within=60.0, frozen=options.frozen, behind=behind
            )
            done.append(found)
            kinds = ", ".join(f"{count} {kind}" for kind, count in found.kinds.items()) or "none"
            kinds += f", of {found.keys} keys" if found.keys else ""
            table.row(
                str(number + 1), f"{found.noticed:.1f} s", f"{found.recovered:.1f} s", f"{fleet.tally.answers:,}",
                str(fleet.tally.refused), kinds,
            )  # fmt: skip
            for fault in found.faults:
                print(f"  failover {number + 1}: {fault}", flush=True)
        cluster.mend()
    print(f"\n{table}\n")
    slowest = max(each.recovered for each in done)
    broken = sum((Counter(each.kinds) for each in done), Counter())
    keys = sum(each.keys for each in done)
    print(f"half recovered within {median([each.recovered for each in done]):.1f} s")
    print(f"broken promises in {len(done)} failovers: {dict(broken) or 'none'}, of {keys} keys")
    print(f"keys held by two: {broken['held by two']}")
    targets.at_most("the slowest recovery", slowest, WITHIN)
    targets.none("leases or keys given twice", sum(len(each.never) for each in done))
