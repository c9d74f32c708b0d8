"""Many workers share a few keys through the client, while the server, and workers, are killed and started again.

    python -m bench.workers [--workers 50] [--keys 10] [--seconds 30] [--kills 2] [--data FILE]
    python -m bench.workers --processes 5 --kind async      10 tasks in each; --kind sync (default): 10 threads
    python -m bench.workers --engine valkey://127.0.0.1:6379/0 --servers 3 --kills 10

It shows that no key is ever used by two at once, that every worker makes progress, and that nothing stays blocked at
the end. The operating system decides whether two use one key at once, not keypool: a worker that holds a key locks a
file that stands for the key, and finds it locked if another one is using it.

With each kill of the server one of the worker processes is killed too, if there are several workers in each. With
--engine, --servers of them share one Valkey or cluster; each use goes to any of them, and any may be killed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.servers import ROOT, Server
from keypool.client import AsyncKeyPool, KeyPool, KeyPoolError, LeaseLost, Retry

BLOCK_SECONDS = 5.0
_LONGEST_USE = 0.1
"""Seconds; with fifty workers and ten keys, some 200 leases a second."""
QUICK = ["--workers", "10", "--keys", "3", "--seconds", "2"]
_RETRY = Retry(seconds=20, most=0.5)


class Crew:
    """The workers of one process: threads with the blocking client, or tasks of one loop with the asynchronous one.

    Each use of a key asks any of the servers, and gives back to the same. Uses stay well within a lease.
    """

    def __init__(self, urls: Sequence[str], locks: Path, numbers: range) -> None:
        self.counts = {"clashes": 0, "errors": 0, "lost": 0}
        self.used = dict.fromkeys(numbers, 0)
        self.stop = False
        self._urls = urls
        self._locks = locks

    def thread(self, number: int, pools: Sequence[KeyPool]) -> None:
        """One worker of the blocking client."""
        rng = random.Random(number)
        while not self.stop:
            lease = rng.choice(pools).lease(owner=f"worker-{number}", wait=5)
            with self._failures(), lease as key, self._using(key.secret, number):
                time.sleep(rng.uniform(0, _LONGEST_USE))

    async def task(self, number: int, pools: Sequence[AsyncKeyPool]) -> None:
        """One worker of the asynchronous client."""
        rng = random.Random(number)
        while not self.stop:
            with self._failures():
                async with rng.choice(pools).lease(owner=f"worker-{number}", wait=5) as key:
                    with self._using(key.secret, number):
                        await asyncio.sleep(rng.uniform(0, _LONGEST_USE))

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except LeaseLost:
            self.counts["lost"] += 1
        except KeyPoolError:
            self.counts["errors"] += 1

    @contextlib.contextmanager
    def _using(self, key: str, number: int) -> Iterator[None]:
        """Lock the file that stands for the key: nobody else may hold that lock."""
        with (self._locks / hashlib.sha256(key.encode()).hexdigest()).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.counts["clashes"] += 1
            yield
            self.used[number] += 1

    async def loop(self) -> None:
        """All workers as tasks."""
        async with contextlib.AsyncExitStack() as stack:
            pools = [await stack.enter_async_context(AsyncKeyPool(url, retry=_RETRY)) for url in self._urls]
            await asyncio.gather(*(self.task(number, pools) for number in self.used))

    def run(self, kind: str) -> dict[str, int]:
        """Work until standard input ends; the counts of what happened.

        Each line of standard input asks for a sign of life: it is answered by a line after the next use of a
        key by every worker.
        """
        with contextlib.ExitStack() as stack:
            if kind == "async":
                threads = [threading.Thread(target=asyncio.run, args=(self.loop(),))]
            else:
                pools = [stack.enter_context(KeyPool(url, retry=_RETRY)) for url in self._urls]
                threads = [threading.Thread(target=self.thread, args=(each, pools)) for each in self.used]
            for thread in threads:
                thread.start()
            for _ in sys.stdin:
                before = dict(self.used)
                while any(self.used[number] == before[number] for number in before):
                    time.sleep(0.01)
                print("used", flush=True)
            self.stop = True
            for thread in threads:
                thread.join()
        return self.counts | {"used": sum(self.used.values()), "least": min(self.used.values())}


def trial(
    workers: int,
    keys: int,
    seconds: float,
    kills: int,
    where: str | None = None,
    *,
    servers: int = 1,
    processes: int | None = None,
    kind: str = "sync",
) -> dict[str, object]:
    """One run; returns its counts. Raises AssertionError if a promise was broken.

    The workers share so many `processes`, one each by default. Between two kills each worker has to use a key at
    least once, however long that takes; `seconds` is how long the run goes on beyond that. `where` is a data file,
    by default a temporary one, or the URL of an engine that the `servers` share.
    """
    draw = random.Random(workers)
    size = 1 if processes is None else -(-workers // processes)
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
        ranges = [range(first, min(first + size, workers)) for first in range(0, workers, size)]
        crews = [_spawn(urls, Path(folder), kind, numbers) for numbers in ranges]
        for phase in range(kills + 1):
            if phase:
                victim = draw.choice(running)
                victim.kill()
                victim.start()
                victim.wait_until_ready()
            if phase and size > 1:
                index = draw.randrange(len(crews))
                crews[index].kill()
                crews[index].communicate()
                crews[index] = _spawn(urls, Path(folder), kind, ranges[index])
            _signs_of_life(crews)
            time.sleep(seconds / (kills + 1))
        results = [json.loads(crew.communicate()[0]) for crew in crews]
        assert all(crew.returncode == 0 for crew in crews)
        with KeyPool(urls[-1]) as pool:
            _wait_until_free(pool)
            stats = pool.stats()
    summary: dict[str, object] = {name: sum(each[name] for each in results) for name in results[0]}
    summary |= {"least": min(each["least"] for each in results), "acquired": stats.acquired}
    assert summary["clashes"] == 0, f"a key was used by two at once: {summary}"
    assert stats.total == keys, f"keys were lost: {stats}"
    return summary


def _spawn(urls: Sequence[str], folder: Path, kind: str, numbers: range) -> subprocess.Popen[str]:
    first, count = str(numbers.start), str(len(numbers))
    words = [sys.executable, "-m", "bench.workers", "--work", str(folder), kind, first, count, *urls]
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
        folder, kind, first, count, *urls = arguments[1:]
        numbers = range(int(first), int(first) + int(count))
        print(json.dumps(Crew(urls, Path(folder), numbers).run(kind)))
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
    parser.add_argument("--processes", type=int, help="that the workers share; by default each has its own")
    parser.add_argument("--kind", choices=("sync", "async"), default="sync", help="of the client")
    args = parser.parse_args(arguments)
    servers = args.servers if args.engine else 1
    summary = trial(
        args.workers, args.keys, args.seconds, args.kills, args.engine or args.data,
        servers=servers, processes=args.processes, kind=args.kind,
    )  # fmt: skip
    print(
        f"{args.workers} workers, {args.keys} keys, {args.seconds:g} s, {servers} servers, {args.kills} kills"
    )
    print("\n".join(f"{name:>10} {value}" for name, value in summary.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
