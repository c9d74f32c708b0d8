"""Each call of the API next to a RequestHandler that writes a constant, at several sizes of the pool, watched or not.

The constant is served by Tornado, as is the application unless `--http=fast`. Each call is compared with the constant
measured in the same round. What is judged is the processor time of a request: it bounds the rate of a server that
has a core for itself, and can be measured while the machine does other work.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from multiprocessing.synchronize import Event

from bench.attack import HANDSHAKE
from bench.baselines import serving
from bench.load import Address
from bench.process import on_loop
from bench.race import Race, Sample
from bench.report import Targets, machine, size
from bench.scripts import fill, load
from bench.servers import Server

QUICK = ["--sizes=1000", "--rounds=2", "--seconds=0.5"]
SHARE = 0.8
JUDGED = ("acquire", "unblock", "unblock with lease", "keepalive")
CALLS = (*JUDGED, "acquire and unblock", "generate", "mixed")


def main(arguments: Sequence[str]) -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser("bench share", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", default="1000,100000,1000000", metavar="N,N", help="keys in the pool")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--http", choices=("fast", "tornado"), default="tornado", help="of the application")
    parser.add_argument("--viewers", type=int, default=0, help="of the feed, meanwhile")
    parser.add_argument("--rounds", type=int, default=5, help="the median counts")
    parser.add_argument("--seconds", type=float, default=1.0, help="of load, of each call, a round")
    options = parser.parse_args(arguments)
    print(machine() + "\n", flush=True)
    targets = Targets()
    for keys in map(int, options.sizes.split(",")):
        flags = (
            "--data=:memory:",
            f"--http={options.http}",
            "--keepalive-seconds=36000",
            "--max-keys=3000000",
        )
        with serving("tornado") as constant, Server(*flags) as server:
            fill(server.address, keys)
            with viewers(server.address, options.viewers) if options.viewers else nullcontext():
                race = _race(constant, server.address, options)
            print(f"{race.table(f'at {size(keys)} keys', ['constant'])}\n")
            stalls = [
                name for name in server.metrics() if name.startswith("keypool_loop_stall_seconds_bucket")
            ]
            total, samples = server.metrics()["keypool_loop_stall_seconds_count"], server.metrics()
            longest = next(name for name in stalls if samples[name] >= total).partition('"')[2].rstrip('"}')
            print(f"      no timer of the loop was later than {longest} s, the wait for a core included")
        for name in JUDGED:
            share = race.found[name].cheaper(race.found["constant"])
            targets.at_least(f"{name} at {size(keys)}, of the constant's rate a core", share, SHARE)
        targets.none(f"errors at {size(keys)}", sum(each.errors for each in race.found.values()))
    return targets.status


def _race(constant: Address, server: Address, options: argparse.Namespace) -> Race:
    def one(address: Address, kind: str) -> Callable[[], Sample]:
        return lambda: Sample.of(load(address, kind, options.connections, options.seconds))

    race = Race()
    race.add("constant", one(constant, "POST /constant"))
    for name in CALLS:
        race.add(name, one(server, name))
    return race.run(options.rounds)


@contextmanager
def viewers(server: Address, count: int) -> Iterator[None]:
    """So many websockets that follow the feed from a process of their own, until the block ends."""
    context = multiprocessing.get_context("spawn")
    ready, stop = context.Event(), context.Event()
    process = context.Process(target=_watch, args=(server.port, count, ready, stop), daemon=True)
    process.start()
    try:
        assert ready.wait(60), "the viewers got no frames"
        yield
    finally:
        stop.set()
        process.join(10)


def _watch(port: int, count: int, ready: Event, stop: Event) -> None:
    seen: set[int] = set()

    async def view(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HANDSHAKE)
        while await reader.read(65536):
            seen.add(number)

    async def main() -> None:
        tasks = [asyncio.create_task(view(number)) for number in range(count)]
        while not stop.is_set():
            if len(seen) == count:
                ready.set()
            await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()

    on_loop(main())
