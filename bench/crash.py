"""Servers killed under load, round after round, and nothing told that isn't so afterwards.

The rounds of `tests/test_crash.py`, for longer: of the server, of the server at its start, of its writer, of both
at once. A new data file is begun from time to time, so that the judge has not all of history to go through.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.report import Table, Targets, machine

if TYPE_CHECKING:
    from crash import Crasher

QUICK = ["--kills=20"]
_ROUNDS_A_FILE = 25


@dataclass
class Total:
    """What came of all files."""

    kills: int = 0
    writer_kills: int = 0
    answers: int = 0
    refused: int = 0
    most_refused: int = 0
    keys: int = 0
    faults: int = 0
    seconds: float = 0.0

    def add(self, crasher: Crasher, faults: Sequence[str]) -> None:
        """One more file."""
        tally = crasher.tally
        self.kills += tally.kills
        self.writer_kills += tally.writer_kills
        self.answers += tally.answers
        self.refused += tally.refused
        self.most_refused = max(self.most_refused, tally.most_refused)
        self.keys += len(crasher.ledger.stories)
        self.faults += len(faults)


def main(arguments: Sequence[str]) -> int:
    """Kill, look, judge."""
    parser = argparse.ArgumentParser("bench crash", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=500, help="of servers, at least")
    parser.add_argument("--seed", type=int, default=1, help="of all that is drawn, the moments apart")
    parser.add_argument("--workers", type=int, default=16, help="clients at once")
    parser.add_argument("--keys", type=int, default=200, help="keys that are kept in the pool")
    parser.add_argument("--folder", type=Path, help="where the data files are; a temporary folder by default")
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
    crasher = _crasher(path, seed, workers, keys)
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


def _crasher(path: Path, seed: int, workers: int, keys: int) -> Crasher:
    # The harness lives with the tests, which are no package.
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    try:
        from crash import Crasher  # noqa: PLC0415
    finally:
        del sys.path[0]
    return Crasher(path, seed, workers=workers, keys=keys)


def _judge(total: Total) -> int:
    table = Table("kills", "of the writer", "answers", "keys", "503", "most 503 a kill", "seconds")
    table.row(
        str(total.kills), str(total.writer_kills), f"{total.answers:,}", f"{total.keys:,}",
        str(total.refused), str(total.most_refused), f"{total.seconds:.0f}",
    )  # fmt: skip
    print(f"\n{table}\n")
    targets = Targets()
    targets.check(f"broken promises after {total.kills} kills", not total.faults, str(total.faults), "none")
    return targets.status
