"""Many worker processes share few keys through the client, while the server is killed and started again.

    python -m bench.workers [--workers 50] [--keys 10] [--seconds 30] [--kills 2] [--data FILE]
    python -m bench.workers --engine valkey://127.0.0.1:6379/0 --servers 3 --kills 10

What it shows: no key is ever used by two at once, every worker makes progress, and nothing is left blocked at
the end. Whether two use one key at once is asked of the operating system, not of keypool: a worker that holds a
key locks a file that stands for it, and finds it locked if anybody else is in there.

With --engine there are --servers of them over one Valkey or cluster, each worker asks any of them for each use, and
any is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import random
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.real import without_settings
from keypool.client import KeyPool, KeyPoolError, LeaseLost, Retry

ROOT = Path(__file__).resolve().parent.parent
BLOCK_SECONDS = 5.0
QUICK = ["--workers", "10", "--keys", "3", "--seconds", "2"]
_READY = re.compile(r"ready on http://\S+:(\d+)/")


def work(urls: Sequence[str], locks: Path, number: int) -> dict[str, int]:
    """Lease, use and give back until standard input ends; what came of it. Uses stay well within a lease.

    Each use asks any of the servers, and gives back to the same.

    Each line of standard input asks for a sign of life: it is answered by a line after the next use of a key.
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


class Server:
    """A server that is killed and comes back on the same port."""

    def __init__(self, where: str, keepalive_seconds: float = 300.0) -> None:
        """`where` is the path of a data file, or the URL of an engine."""
        self._flags = [
            f"--engine={where}" if "://" in where else f"--data={where}",
            f"--block-seconds={BLOCK_SECONDS}",
            f"--keepalive-seconds={keepalive_seconds}",
        ]
        self.port = 0
        self.start()

    def start(self) -> None:
        """Returns when it is ready."""
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "server.py"), f"--port={self.port}", *self._flags],
            stderr=subprocess.PIPE, text=True, env=without_settings(),
        )  # fmt: skip
        assert self._process.stderr is not None
        log = []
        for line in self._process.stderr:
            log.append(line)
            found = _READY.search(line)
            if found:
                self.port = int(found[1])
                return
        raise SystemExit(f"the server did not start:\n{''.join(log)}")

    def kill(self) -> None:
        """As a crash would."""
        self.end(signal.SIGKILL)

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """And wait for it."""
        self._process.send_signal(number)
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()


@contextlib.contextmanager
def running(where: str, count: int = 1) -> Iterator[list[Server]]:
    """Servers that are gone at the end."""
    servers: list[Server] = []
    try:
        servers.extend(Server(where) for _ in range(count))  # one by one
        yield servers
    finally:
        for server in servers:
            server.end()


def trial(
    workers: int, keys: int, seconds: float, kills: int, where: str | None = None, *, servers: int = 1
) -> dict[str, object]:
    """One run; what it has shown. Raises AssertionError if a promise was broken.

    The data file is the run's own unless one is named.
    Between two kills each worker has to use a key at least once, however long that takes; `seconds` is how long
    the whole goes on beyond that. `where` is a data file, or an engine that the `servers` share.
    """
    draw = random.Random(workers)
    with (
        tempfile.TemporaryDirectory(prefix="keypool-workers-") as folder,
        running(where or f"{folder}/keypool.db", servers) as running_servers,
    ):
        urls = [f"http://127.0.0.1:{server.port}" for server in running_servers]
        with KeyPool(urls[0]) as pool:
            pool.generate_many(keys)
        processes = [_spawn(urls, Path(folder), number) for number in range(workers)]
        for phase in range(kills + 1):
            if phase:
                victim = draw.choice(running_servers)
                victim.kill()
                victim.start()
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
        process.stdin.write("still there?\n")
        process.stdin.flush()
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "used\n"


def _wait_until_free(pool: KeyPool) -> None:
    """Acquires whose answers a kill has swallowed are left to the deadline; nothing may be blocked after it."""
    deadline = time.monotonic() + BLOCK_SECONDS + 10
    while pool.stats().blocked:
        assert time.monotonic() < deadline, f"left blocked: {list(pool.rows(state='blocked'))}"
        time.sleep(0.05)


def main(arguments: Sequence[str]) -> int:
    """See the module. Raises AssertionError if a promise was broken."""
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
    parser.add_argument("--data", help="a file, in place of one in a temporary folder")
    parser.add_argument("--engine", help="the URL of an empty Valkey or cluster, in place of --data")
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
