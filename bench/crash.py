"""Servers killed under load, round after round: everything that was answered must still be true afterwards.

The rounds of `tests/test_crash.py`, for longer: the server is killed, the server while it starts, its writer, or both
at once. A new data file is begun from time to time, so that the history to be checked stays short.

`--leases` runs those of `tests/test_crash_leases.py` instead: attempts, reports, extensions and quarantines.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.report import Table, Targets, machine
from bench.valkeys import of_tests

if TYPE_CHECKING:
    from crash import Crasher

QUICK = ["--kills=20"]
_ROUNDS_A_FILE = 25


def main(arguments: Sequence[str]) -> int:
    """Kill, check, judge."""
    parser = argparse.ArgumentParser("bench crash", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=500, help="of servers, at least")
    parser.add_argument("--seed", type=int, default=1, help="of everything random except the timing")
    parser.add_argument("--workers", type=int, default=16, help="clients at once")
    parser.add_argument("--keys", type=int, default=200, help="keys that are kept in the pool")
    parser.add_argument("--leases", action="store_true", help="a load of attempts, reports and quarantines")
    parser.add_argument("--folder", type=Path, help="for the data files; a temporary folder by default")
    options = parser.parse_args(arguments)
    print(machine() + "\n", flush=True)
    if options.leases:
        return _leases(options)
    total, most, seed, began = Counter[str](), 0, options.seed, time.monotonic()
    while total["kills"] < options.kills and not total["faults"]:
        with tempfile.TemporaryDirectory(prefix="keypool-crash-", dir=options.folder) as folder:
            left = options.kills - total["kills"]
            crasher, faults = _one_file(
                Path(folder) / "keypool.db", seed, options.workers, options.keys, left
            )
        tally, keys = crasher.tally, len(crasher.ledger.stories)
        total.update(
            kills=tally.kills, writers=tally.writer_kills, answers=tally.answers, refused=tally.refused
        )
        total.update(keys=keys, faults=len(faults))
        most = max(most, tally.most_refused)
        seed += 1
        print(f"{total['kills']} kills, {total['answers']} answers, {total['faults']} faults", flush=True)
    table = Table("kills", "of the writer", "answers", "keys", "503", "most 503 a kill", "seconds")
    counts = (total[name] for name in ("kills", "writers", "answers", "keys", "refused"))
    table.row(*(f"{count:,}" for count in counts), str(most), f"{time.monotonic() - began:.0f}")
    print(f"\n{table}\n")
    targets = Targets()
    targets.none(f"broken promises after {total['kills']} kills", total["faults"])
    return targets.status


def _one_file(path: Path, seed: int, workers: int, keys: int, kills: int) -> tuple[Crasher, list[str]]:
    crasher: Crasher = of_tests("crash").Crasher(path, seed, workers=workers, keys=keys)
    draw = random.Random(seed)
    faults: list[str] = []
    for number in range(_ROUNDS_A_FILE):
        if faults or crasher.tally.kills >= kills:
            break
        if number % 5 == 4:
            crasher.kill_at_start()
        writer_kills = draw.choice((0, 0, 0, 1, 3))
        faults = crasher.round(writer_kills=writer_kills, both=draw.random() < 0.4)
    faults = faults or crasher.look()
    for fault in faults:
        print(f"  seed {seed}: {fault}")
    return crasher, faults


def _leases(options: argparse.Namespace) -> int:
    faults: list[str] = []
    left, seed, targets = options.kills, options.seed, Targets()
    while left > 0 and not faults:
        with tempfile.TemporaryDirectory(prefix="keypool-crash-", dir=options.folder) as folder:
            crasher = of_tests("crash_leases").Crasher(f"--data={folder}/keypool.db", Path(folder), seed)
            faults = crasher.run(min(left, _ROUNDS_A_FILE), options.workers, options.keys)
        print(f"seed {seed}: {crasher}, {len(faults)} faults", *faults, sep="\n  ", flush=True)
        left, seed = left - crasher.kills, seed + 1
    targets.none(f"broken promises after {options.kills - left} kills", len(faults))
    return targets.status
