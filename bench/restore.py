"""How long a server takes from its start until it is ready, with a million keys in its file and with two.

The file is written by a server that is killed under way, one key in ten blocked. While the next one starts it is asked
all the time whether it is ready; the longest answer shows how long its loop stood still. What is judged leaves out the
time the server waited for a core. With `--old PATH`, that checkout writes and reads a file of its own, in turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bench.load import Address, Connections, request
from bench.process import Child, on_loop, rss, waited_for_core
from bench.report import Table, Targets, machine, megabytes, size, span
from bench.scripts import A_BATCH, BATCH, answering, fill
from bench.servers import Server, add_old

QUICK = ["--keys=100000", "--rounds=1"]
FIRST, FURTHER = 10.0, 8.0  # seconds: for a million keys, and what a million more may add
MILLION = 1_000_000
_LATEST = 300.0


@dataclass
class Restored:
    """One start. Times are seconds."""

    keys: int
    ready: float  # since the start of the process
    own: float  # the same without the wait for a core
    silence: float  # the longest wait for an answer
    memory: int
    file: int


def main(arguments: Sequence[str]) -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser("bench restore", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--keys", type=int, default=MILLION, help="in the first file; the second has twice as many"
    )
    parser.add_argument("--rounds", type=int, default=2, help="starts of each; the quickest counts")
    parser.add_argument("--folder", type=Path, help="for the data files; a temporary folder by default")
    add_old(parser)
    options = parser.parse_args(arguments)
    print(machine() + "\n", flush=True)
    trees = {"": None, **({", old": options.old} if options.old else {})}
    found: dict[str, list[Restored]] = {name: [] for name in trees}
    for keys in (options.keys, 2 * options.keys):
        with (
            tempfile.TemporaryDirectory(prefix="keypool-restore-", dir=options.folder) as folder,
            ExitStack() as stack,
        ):
            servers = {
                name: stack.enter_context(_filled(Path(folder) / f"keypool{number}.db", keys, tree))
                for number, (name, tree) in enumerate(trees.items())
            }
            starts: dict[str, list[Restored]] = {name: [] for name in trees}
            for _ in range(options.rounds):
                for number, (name, server) in enumerate(servers.items()):
                    starts[name].append(_start(server, keys, Path(folder) / f"keypool{number}.db"))
            for name, each in starts.items():
                found[name].append(min(each, key=lambda start: start.own))
    return _judge(found)


def _filled(path: Path, keys: int, tree: Path | None) -> Server:
    server = Server(
        f"--data={path}",
        f"--max-keys={2 * keys}",
        "--keepalive-seconds=36000",
        "--block-seconds=18000",
        tree=tree,
    )
    fill(server.address, keys)
    Child(_acquire, server.address, keys // 10).wait(600)
    server.kill()
    return server


def _acquire(server: Address, count: int) -> None:
    async def main() -> None:
        connections = await Connections.open(server, 1)
        body = msgspec.json.encode({"op": "acquire", "count": A_BATCH, "owner": "worker-17"})
        batches = [request(BATCH, body)] * (count // A_BATCH)
        await connections.run(answering(iter(batches), bool), 600)
        connections.close()

    on_loop(main())


def _size(path: Path) -> int:
    """Bytes of a data file and its log."""
    files = (path, path.with_name(path.name + "-wal"))
    return sum(file.stat().st_size for file in files if file.exists())


def _start(server: Server, keys: int, path: Path) -> Restored:
    began = time.perf_counter()
    server.start()
    longest, status = 0.0, 0
    while status != 200:
        assert time.perf_counter() - began < _LATEST, f"not ready after {_LATEST} s"
        time.sleep(0.005)
        asked_at = time.perf_counter()
        status = server.status_of("/readyz")
        longest = max(longest, time.perf_counter() - asked_at)
    ready = time.perf_counter() - began
    pid = server.address.pid
    restored = Restored(keys, ready, ready - waited_for_core(pid), longest, rss(pid), _size(path))
    server.kill()
    return restored


def _judge(found: dict[str, list[Restored]]) -> int:
    table = Table(
        "keys", "ready after", "own", "own, a million", "longest silence", "memory", "file", "bytes a key"
    )
    for name, starts in found.items():
        for each in starts:
            table.row(
                size(each.keys) + name, span(each.ready), span(each.own), span(each.own * MILLION / each.keys),
                span(each.silence), megabytes(each.memory), megabytes(each.file), f"{each.file / each.keys:.0f}",
            )  # fmt: skip
    print(f"{table}\n")
    first, second = found[""]
    if ", old" in found:
        old = found[", old"]
        print(f"      of the old one's time: {first.own / old[0].own:.2f}, {second.own / old[1].own:.2f}")
    targets = Targets()
    scale = first.keys / MILLION
    targets.at_most(f"{size(first.keys)} keys, ready after", first.own, FIRST * scale + (1 - min(scale, 1)))
    further = second.own - first.own
    targets.at_most(f"{size(first.keys)} more, later by", further, FURTHER * scale + (1 - min(scale, 1)))
    return targets.status
