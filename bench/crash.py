"""Servers killed under load, round after round: everything that was answered must still be true afterwards.

The rounds of `tests/test_crash.py`, for longer: the server is killed, the server while it starts, its writer, or both
at once. A new data file is begun from time to time, so that the history to be checked stays short.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.report import Table, Targets, machine
from bench.valkeys import of_tests

if TYPE_CHECKING:
    from crash import Crasher

QUICK = ["--kills=20"]
_ROUNDS_A_FILE = 25


@dataclass
class Total:
    """The sums over all files."""

    kills: int = 0
    writer_kills: int = 0
    answers: int = 0
    refused: int = 0
    most_refused: int = 0
    keys: int = 0
    faults: int = 0
    seconds: float = 0.0

    def add(self, crasher: Crasher, faults: Sequence[str]) -> None:
        """Add a file."""
        tally = crasher.tally
        self.kills += tally.kills
        self.writer_kills += tally.writer_kills
        self.answers += tally.answers
        self.refused += tally.refused
        self.most_refused = max(self.most_refused, tally.most_refused)
        self.keys += len(crasher.ledger.stories)
        self.faults += len(faults)


def main(arguments: Sequence[str]) -> int:
    """Kill, check, judge."""
    parser = argparse.ArgumentParser("bench crash", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=500, help="of servers, at least")
    parser.add_argument("--seed", type=int, default=1, help="of everything random except the timing")
    parser.add_argument("--workers", type=int, default=16, help="clients at once")
    parser.add_argument("--keys", type=int, default=200, help="keys that are kept in the pool")
    parser.add_argument("--folder", type=Path, help="for the data files; a temporary folder by default")
    options = parser.parse_args(arguments)
    print(machine() + "\n", flush=True)
    total, began, seed = Total(), time.monotonic(), options.seed
    while total.kills < options.kills and not total.faults:
        with tempfile.TemporaryDirectory(prefix="keypool-crash-", dir=options.folder) as folder:
            path = Path(folder) / "keypool.db"
            total.add(*_one_file(path, seed, options.workers, options.keys, options.kills - total.kills))
        seed += 1
        total.seconds = time.monotonic() - began
        print(f"{total.kills} kills, {total.answers} answers, {total.faults} faults", flush=True)
    return _judge(total)


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


def _judge(total: Total) -> int:
    table = Table("kills", "of the writer", "answers", "keys", "503", "most 503 a kill", "seconds")
    table.row(
        str(total.kills), str(total.writer_kills), f"{total.answers:,}", f"{total.keys:,}",
        str(total.refused), str(total.most_refused), f"{total.seconds:.0f}",
    )  # fmt: skip
    print(f"\n{table}\n")
    targets = Targets()
    targets.none(f"broken promises after {total.kills} kills", total.faults)
    return targets.status
