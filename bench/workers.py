"""Many worker processes share a few keys through the client, while the server is killed and started again.

    python -m bench.workers [--workers 50] [--keys 10] [--seconds 30] [--kills 2] [--data FILE]
    python -m bench.workers --engine valkey://127.0.0.1:6379/0 --servers 3 --kills 10

It shows that no key is ever used by two at once, that every worker makes progress, and that nothing stays blocked at
the end. The operating system decides whether two use one key at once, not keypool: a worker that holds a key locks a
file that stands for the key, and finds it locked if another one is using it.

With --engine, --servers of them share one Valkey or cluster; each use goes to any of them, and any may be killed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import random
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.servers import ROOT, Server
from keypool.client import KeyPool, KeyPoolError, LeaseLost, Retry

BLOCK_SECONDS = 5.0
QUICK = ["--workers", "10", "--keys", "3", "--seconds", "2"]


def work(urls: Sequence[str], locks: Path, number: int) -> dict[str, int]:
    """Lease, use and give back until standard input ends; the counts of what happened.

    Uses are much shorter than a lease; each asks any of the servers, and gives back to the same one. A line of
    standard input asks for a sign of life: a line is printed after the next use of a key.
    """
    counts = {"used": 0, "clashes": 0, "errors": 0, "lost": 0}
    rng = random.Random(number)
    asked = False
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(KeyPool(url, retry=Retry(seconds=20, most=0.5))) for url in urls]
        while True:
            if select.select([sys.stdin], [], [], 0)[0]:
                if not sys.stdin.readline():
                    return counts
                asked = True
            try:
                with rng.choice(pools).lease(owner=f"worker-{number}", wait=5) as key:
                    _use(
                        locks / hashlib.sha256(key.secret.encode()).hexdigest(), counts, rng.uniform(0, 0.02)
                    )
                if asked:
                    print("used", flush=True)
                    asked = False
            except LeaseLost:
                counts["lost"] += 1
            except KeyPoolError:
                counts["errors"] += 1


def _use(lock: Path, counts: dict[str, int], seconds: float) -> None:
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            counts["clashes"] += 1
            return
        time.sleep(seconds)
        counts["used"] += 1


def trial(
    workers: int, keys: int, seconds: float, kills: int, where: str | None = None, *, servers: int = 1
) -> dict[str, object]:
    """One run; returns its counts. Raises AssertionError if a promise was broken.

    Between two kills each worker has to use a key at least once, however long that takes; `seconds` is how long
    the run goes on beyond that. `where` is a data file, by default a temporary one, or the URL of an engine that the
    `servers` share.
    """
    draw = random.Random(workers)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="keypool-workers-"))
        where = where or f"{folder}/keypool.db"
        flags = (
            f"--engine={where}" if "://" in where else f"--data={where}",
            f"--block-seconds={BLOCK_SECONDS}",
        )
        running = [stack.enter_context(Server(*flags)) for _ in range(servers)]
        urls = [f"http://127.0.0.1:{server.address.port}" for server in running]
        with KeyPool(urls[0]) as pool:
            pool.generate_many(keys)
        processes = [_spawn(urls, Path(folder), number) for number in range(workers)]
        for phase in range(kills + 1):
            if phase:
                victim = draw.choice(running)
                victim.kill()
                victim.start()
                victim.wait_until_ready()
            _signs_of_life(processes)
            time.sleep(seconds / (kills + 1))
        results = [json.loads(process.communicate()[0]) for process in processes]
        assert all(process.returncode == 0 for process in processes)
        with KeyPool(urls[-1]) as pool:
            _wait_until_free(pool)
            stats = pool.stats()
    summary: dict[str, object] = {name: sum(each[name] for each in results) for name in results[0]}
    summary |= {"least": min(each["used"] for each in results), "acquired": stats.acquired}
    assert summary["clashes"] == 0, f"a key was used by two at once: {summary}"
    assert stats.total == keys, f"keys were lost: {stats}"
    return summary


def _spawn(urls: Sequence[str], folder: Path, number: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "bench.workers", "--work", str(folder), str(number), *urls]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)


def _signs_of_life(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("sign of life\n")
        process.stdin.flush()
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "used\n"


def _wait_until_free(pool: KeyPool) -> None:
    """Keys whose acquire lost its answer in a kill come back by their deadline; after that nothing may be blocked."""
    deadline = time.monotonic() + BLOCK_SECONDS + 10
    while pool.stats().blocked:
        assert time.monotonic() < deadline, f"left blocked: {list(pool.rows(state='blocked'))}"
        time.sleep(0.05)


def main(arguments: Sequence[str]) -> int:
    """Run, print. Raises AssertionError if a promise was broken."""
    if arguments[:1] == ["--work"]:
        folder, number, *urls = arguments[1:]
        print(json.dumps(work(urls, Path(folder), int(number))))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=50)
    parser.add_argument("--keys", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--data", help="a data file instead of a temporary one")
    parser.add_argument("--engine", help="the URL of an empty Valkey or cluster, instead of --data")
    parser.add_argument("--servers", type=int, default=1, help="over that engine")
    args = parser.parse_args(arguments)
    servers = args.servers if args.engine else 1
    summary = trial(
        args.workers, args.keys, args.seconds, args.kills, args.engine or args.data, servers=servers
    )
    print(
        f"{args.workers} workers, {args.keys} keys, {args.seconds:g} s, {servers} servers, {args.kills} kills"
    )
    print("\n".join(f"{name:>10} {value}" for name, value in summary.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
