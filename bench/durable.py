"""The cost of durability: calls over HTTP on a data file, next to the same in memory.

Both servers are loaded in turns; server, writer and load share the cores as the kernel schedules them. Calls one at a
time are compared with a bare fdatasync on the same disk. With `--old PATH`, the data file of that checkout's server
takes its turn as well.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from bench.race import Race, Sample
from bench.report import Targets, machine, percentile, size, span
from bench.scripts import fill, load
from bench.servers import Server, add_old

QUICK = ["--keys=20000", "--rounds=3", "--seconds=1"]
SHARE, BYTES = 0.7, 150
STALL, STALLS = "0.025", 0.01  # seconds late, and the share of the loop's timers that may be later
FSYNCS, BESIDE = 1.5, 0.001
"""A single call may take so many times a bare fdatasync, and so many seconds more: SQLite syncs once, and
writes twice."""
_SYNCS = 200
_SETTINGS = ("--keepalive-seconds=36000", "--max-keys=10000000")


def main(arguments: Sequence[str]) -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser("bench durable", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="the median counts")
    parser.add_argument("--seconds", type=float, default=2.0, help="of load, a round")
    parser.add_argument("--folder", type=Path, help="for the data files; a temporary folder by default")
    add_old(parser)
    options = parser.parse_args(arguments)
    print(machine() + "\n", flush=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder)))
        path = folder / "keypool.db"
        servers = {
            "memory": stack.enter_context(Server("--data=:memory:", *_SETTINGS)),
            "data file": stack.enter_context(Server(f"--data={path}", *_SETTINGS)),
        }
        if options.old:
            old = Server(f"--data={folder / 'old.db'}", *_SETTINGS, tree=options.old)
            servers["data file, old"] = stack.enter_context(old)
        for server in servers.values():
            fill(server.address, options.keys)
        status = _measure(servers, options, sorted(_bare_syncs(folder / "bare")))
        servers["data file"].stop()
        return status | _judge_size(path, options.keys)


def _measure(servers: dict[str, Server], options: argparse.Namespace, syncs: list[float]) -> int:
    targets = Targets()
    races: dict[str, Race] = {}
    for title, kind, connections in (
        ("mixed", "mixed", options.connections),
        ("mixed, a quarter of the connections", "mixed", max(1, options.connections // 4)),
        ("acquire and unblock", "acquire and unblock", options.connections),
        ("generate", "generate", options.connections),
        ("one at a time", "keepalive", 1),
    ):
        race = races[title] = Race()
        for name, server in servers.items():
            race.add(name, partial(_sample, server, kind, connections, options.seconds))
        before = _commits(servers["data file"])
        bases = ["memory", *(["data file, old"] if options.old else [])]
        print(f"{race.run(options.rounds).table(title, bases)}\n", flush=True)
        targets.none(f"{title}, errors", sum(each.errors for each in race.found.values()))
        calls = race.found["data file"].rate * options.seconds * options.rounds
        print(f"      about {calls / max(1, _commits(servers['data file']) - before):.1f} calls a commit")
    share = races["mixed"].found["data file"].of(races["mixed"].found["memory"])
    targets.at_least(
        f"mixed, on a data file, of the rate in memory ({size(options.keys)} keys)", share, SHARE
    )
    sync = percentile(syncs, 50)
    print(f"      a bare fdatasync: p50 {span(sync)}, p99 {span(percentile(syncs, 99))}")
    single = races["one at a time"].found["data file"].p50
    targets.at_most("one call at a time, p50", single, FSYNCS * sync + BESIDE)
    for name, server in servers.items():
        samples = server.metrics()
        total = samples["keypool_loop_stall_seconds_count"]
        late = (total - samples[f'keypool_loop_stall_seconds_bucket{{le="{STALL}"}}']) / total
        what = f"{name}, timers of the loop that were over {STALL} s late"
        targets.check(what, late <= STALLS, f"{late:.2%}", f"at most {STALLS:.0%}")
    return targets.status


def _commits(server: Server) -> int:
    return round(server.metrics().get("keypool_commit_rows_count", 0))


def _sample(server: Server, kind: str, connections: int, seconds: float) -> Sample:
    return Sample.of(load(server.address, kind, connections, seconds))


def _bare_syncs(path: Path) -> list[float]:
    """How long it takes to append a page to a file and fdatasync it: the least that a commit can take."""
    spans = []
    with path.open("wb", buffering=0) as file:
        for _ in range(_SYNCS):
            began = time.perf_counter()
            file.write(bytes(4096))
            os.fdatasync(file.fileno())
            spans.append(time.perf_counter() - began)
    return spans


def _judge_size(path: Path, keys: int) -> int:
    targets = Targets()
    found = path.stat().st_size / keys
    targets.check("bytes a key in the file", found <= BYTES, f"{found:.0f}", f"at most {BYTES}")
    return targets.status
