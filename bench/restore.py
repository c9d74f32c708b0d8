"""How long a server takes from its start until it is ready, with a million keys in its file and with two.

The real `server.py` on a file that was written beforehand, one key in ten blocked, as if the server had been
killed a moment ago. It is asked all the time whether it is ready: the longest that an answer took is how long the
loop stood still. What is judged leaves out how long the server waited for a core, which is the machine's doing.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from bench.process import rss
from bench.report import Table, Targets, machine, megabytes, size, span
from keypool.core.keys import random_text
from keypool.engine.durable import datafile
from keypool.engine.durable.compaction import BatchLog
from keypool.engine.durable.datafile import Batch, encode

QUICK = ["--keys=200000"]
FIRST, FURTHER = 10.0, 8.0  # seconds: a million keys, and what a million more may add
MILLION = 1_000_000

_UNFOLDED, _BATCH = 30_000, 15  # rows, and so many a batch
_LIFE, _BLOCK = 3600, 1800  # seconds
_LATEST = 300.0


@dataclass
class Restored:
    """One start."""

    keys: int
    ready: float  # seconds from the start of the process
    own: float  # the same without the wait for a core
    stall: float  # the longest wait for an answer
    memory: int
    file: int


def main(arguments: Sequence[str]) -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser("bench restore", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--keys", type=int, default=MILLION, help="of the first file; the second has twice as many"
    )
    parser.add_argument("--rounds", type=int, default=2, help="starts of each; the quickest counts")
    parser.add_argument("--folder", type=Path, help="where the files are; a temporary folder by default")
    options = parser.parse_args(arguments)
    print(machine() + "\n", flush=True)
    found = []
    for keys in (options.keys, 2 * options.keys):
        with tempfile.TemporaryDirectory(prefix="keypool-restore-", dir=options.folder) as folder:
            path = Path(folder) / "keypool.db"
            _write(path, keys)
            starts = [_start(path, keys) for _ in range(options.rounds)]
            found.append(min(starts, key=lambda start: start.own))
    return _judge(*found)


def _write(path: Path, keys: int) -> None:
    """A file with so many keys, closed, and with as many batches left as a writer leaves that is killed."""
    now = round(time.time() * 1000)

    def rows() -> Iterator[datafile.Row]:
        for id in range(1, keys + 1):
            blocked = id % 10 == 0
            release_at = now + _BLOCK * 1000 + id % 1000 if blocked else None
            owner = f"worker-{id % 100}" if blocked else None
            yield id, random_text(20), now, now + _LIFE * 1000 + id % 60_000, release_at, id, owner

    numbers = {"last_id": keys, "last_lease": keys, "generated": keys, "acquired": keys, "moment": now}
    made = rows()
    with contextlib.closing(datafile.connect(path)) as database:
        database.execute("BEGIN")
        database.executemany(datafile.UPSERT, islice(made, keys - _UNFOLDED))
        database.executemany(datafile.SET_POOL, numbers.items())
        batches = BatchLog(database)
        while some := list(islice(made, _BATCH)):
            batches.commit([encode(Batch(some, [], numbers))])
        database.execute("COMMIT")


def _start(path: Path, keys: int) -> Restored:
    """Start a server on the file, and wait until it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Path(__file__).parents[1] / "server.py"
    flags = [f"--data={path}", f"--port={port}", f"--max-keys={2 * keys}", "--log-level=warning"]
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(server), *flags], stdin=subprocess.DEVNULL)
    try:
        ready, stall = _wait(process, port, began)
        own, memory = ready - _waited(process.pid), rss(process.pid)
        # Not in peace: that would be another measurement.
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    return Restored(keys, ready, own, stall, memory, path.stat().st_size)


def _waited(pid: int) -> float:
    """Seconds that the main thread of a process was ready to run and had no core; 0 where /proc doesn't tell."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


def _wait(process: subprocess.Popen[bytes], port: int, began: float) -> tuple[float, float]:
    """When it was ready, and the longest that it took to say anything before."""
    longest = 0.0
    while (now := time.perf_counter()) - began < _LATEST:
        assert process.poll() is None, f"the server ended with {process.returncode}"
        try:
            status = _ask(port)
        except OSError:
            time.sleep(0.01)  # it doesn't listen yet
            continue
        longest = max(longest, time.perf_counter() - now)
        if status == 200:
            return time.perf_counter() - began, longest
        time.sleep(0.005)
    raise AssertionError(f"not ready after {_LATEST} s")


def _ask(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_LATEST)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status
    finally:
        connection.close()


def _judge(first: Restored, second: Restored) -> int:
    table = Table(
        "keys", "ready after", "own", "own, a million", "longest silence", "memory", "file", "bytes a key"
    )
    for each in (first, second):
        a_million = each.own * MILLION / each.keys
        table.row(
            size(each.keys), span(each.ready), span(each.own), span(a_million), span(each.stall),
            megabytes(each.memory), megabytes(each.file), f"{each.file / each.keys:.0f}",
        )  # fmt: skip
    print(f"{table}\n")
    targets = Targets()
    scale = first.keys / MILLION
    targets.at_most(f"{size(first.keys)} keys, ready after", first.own, FIRST * scale + (1 - min(scale, 1)))
    further = second.own - first.own
    targets.at_most(f"{size(first.keys)} more, later by", further, FURTHER * scale + (1 - min(scale, 1)))
    return targets.status
