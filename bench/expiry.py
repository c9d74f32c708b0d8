"""A crowd of keys that expire in the same second, and a crowd of blocks that end in the same second.

Mixed calls go on meanwhile. Watched are how late keys were released or purged and how late the loop's timers were (the
server's own histograms), and what calls see: keys whose deadline has just passed or is about to are asked for all the
time. A key's deadline lies between the moments the request was sent and its answer came, plus the time it names; an
answer is wrong only if it is wrong for all of that range.

Then a crowd of cooldowns that end in the same second, on the engine alone: how long the loop stood still.

What a call sees is on time by the deadline itself. The purge behind it may lag when a crowd comes at once; a smaller
crowd must be on time itself.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from bench.load import Address, Connections, GoOn, Script, request
from bench.process import Child, on_loop
from bench.report import Table, Targets, machine, percentile, size, span
from bench.scripts import A_BATCH, ACQUIRE, BATCH, KEYS, answering, unblock
from bench.servers import Server
from bench.stalls import Stall, StallProbe
from keypool.core.answers import Lease, Unblock
from keypool.core.outcomes import Outcome, Report
from keypool.core.rules import PoolRules
from keypool.engine.embedded import EmbeddedEngine
from keypool.server.runtime import collect_the_young, spare_the_old_generation

QUICK = ["--crowd=20000", "--small=5000"]
STALL, STALLS, LATE, EARLY = 0.025, 0.01, 0.050, 0.005
COOLING_STALL = 0.010
_WAITERS = 50
_CALLS, _PAUSE = 20, 0.002  # mixed calls at a time, and seconds between
_ROUNDED = 0.001  # seconds: times in answers have three digits
_AFTER = 3.0  # seconds to go on after the last deadline
_ASKED = 5  # keys on each side of the moment, each time

_decode = msgspec.json.Decoder().decode


@dataclass
class Seen:
    """What the calls saw. Times are seconds."""

    asked: int = 0
    wrong: list[str] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)
    """How late the waiters were served: the first one after the first release, and so on."""
    calls: int = 0


@dataclass(frozen=True)
class Due:
    """A key, its lease if that is due, and the range that its deadline lies in, on the monotonic clock."""

    text: str
    lease: int | None
    earliest: float
    latest: float


def main(arguments: Sequence[str]) -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser("bench expiry", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--crowd", type=int, default=100_000, help="keys that are due within about a second")
    parser.add_argument("--small", type=int, default=10_000, help="a crowd that must itself be on time")
    parser.add_argument("--seconds", type=float, default=6.0, help="from a key's beginning to its deadline")
    options = parser.parse_args(arguments)
    print(machine() + "\n", flush=True)
    targets = Targets()
    table = Table("crowd", "late: p50", "p99", "latest", "timers over 25 ms", "waiters", "calls", "asked")
    lines: list[str] = []
    for crowd in (options.small, options.crowd):
        for what in ("release", "expiry"):
            own = f"--{'block' if what == 'release' else 'keepalive'}-seconds={options.seconds}"
            with Server("--data=:memory:", own) as server:
                seen = Child(watch, server.address, what, crowd).wait(240)
                samples = server.metrics()
            _report(f"{size(crowd)} {what}", samples, seen, table, targets, on_time=crowd <= options.small)
            lines += seen.wrong[:5]
    print("\n".join([f"\n{table}\n", *lines]))
    stall = Child(cool, options.crowd).wait(240)
    what = f"{size(options.crowd)} cooldowns end in a second, longest stall of the loop"
    targets.at_most(f"{what} (with the wait for a core {span(stall.wall)})", stall.own, COOLING_STALL)
    return targets.status


def _report(
    name: str, samples: dict[str, float], seen: Seen, table: Table, targets: Targets, *, on_time: bool
) -> None:
    what = f"keypool_{name.split()[1]}_lateness_seconds"
    late = [_quantile(samples, what, share) for share in (0.5, 0.99, 1.0)]
    stalls = "keypool_loop_stall_seconds"
    slow = samples[f"{stalls}_count"] - samples[f'{stalls}_bucket{{le="{STALL}"}}']
    waited = percentile(sorted(seen.waiting), 100) if seen.waiting else 0.0
    spans = [f"≤ {each:g} s" for each in late]
    table.row(
        name, *spans, f"{slow:.0f}", span(waited) if waited else "-", f"{seen.calls:,}", f"{seen.asked:,}"
    )
    share = slow / samples[f"{stalls}_count"]
    targets.check(
        f"{name}, timers of the loop over {STALL} s late", share <= STALLS, f"{share:.2%}", f"{STALLS:.0%}"
    )
    if on_time:
        targets.at_most(f"{name}, latest (upper end of its bucket)", late[2], LATE)
    if seen.waiting:
        targets.at_most(f"{name}, latest to a waiter", waited, LATE)
    targets.none(f"{name}, answers on the wrong side of a deadline, of {seen.asked:,}", len(seen.wrong))


def _quantile(samples: dict[str, float], name: str, share: float) -> float:
    """The upper end of the bucket that holds a quantile of a histogram."""
    wanted = samples[f"{name}_count"] * share
    return next(
        float(sample.partition('"')[2].partition('"')[0])
        for sample, count in samples.items()
        if sample.startswith(f"{name}_bucket") and count >= wanted
    )


# -- in processes of their own


def cool(crowd: int) -> Stall:
    """Let a crowd of cooldowns end within a second."""
    return on_loop(_cool(crowd))


async def _cool(crowd: int) -> Stall:
    spare_the_old_generation()
    collect_the_young(asyncio.get_running_loop())
    engine = EmbeddedEngine(PoolRules(block_seconds=600.0, keepalive_seconds=3600.0))
    leases: list[Lease] = []
    while len(leases) < crowd:
        await engine.generate(100)
        leases += await engine.acquire_many(None, 100)
        await asyncio.sleep(0)
    random.Random(1).shuffle(leases)  # the order of the reports isn't that of the ends
    begins = engine.now() + 5 + crowd / 4000
    for first in range(0, crowd, 50):
        within = begins - engine.now()
        reports = (Report(Outcome.RATE_LIMITED, within + (first + each) / crowd) for each in range(50))
        items = zip(leases[first : first + 50], reports, strict=True)
        await engine.unblock_many([Unblock(each.key, each.lease, report) for each, report in items])
        await asyncio.sleep(0)
    assert engine.now() < begins, "the cooldowns could not be made in time"
    await asyncio.sleep(begins - engine.now() - 0.1)
    probe = StallProbe().start()
    while (await engine.stats()).cooling:  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0.01)
    return probe.stop()


def watch(server: Address, what: str, crowd: int) -> Seen:
    """Make a crowd, and call until all of its deadlines have passed."""
    return on_loop(_watch(server, what, crowd))


async def _watch(server: Address, what: str, crowd: int) -> Seen:
    connections, seen, due = await Connections.open(server, 1), Seen(), list[Due]()
    if what == "release":
        await connections.run(_batches("generate", crowd, []), 60)
    await connections.run(_batches("acquire" if what == "release" else "generate", crowd, due), 60)
    due.sort(key=lambda each: each.latest)
    assert time.monotonic() < due[0].earliest, "the crowd could not be made in time: use more --seconds"
    waiters = await Connections.open(server, _WAITERS if what == "release" else 0)
    served = asyncio.ensure_future(waiters.run(_wait(due, seen), 60, {404}))
    draw = random.Random(1)
    while time.monotonic() < due[-1].latest + _AFTER:
        texts = [each.text for each in draw.sample(due, _CALLS)]
        # Calls that leave the deadlines in question as they are.
        load = _pairs(_CALLS // 2) if what == "expiry" else answering(map(_keepalive, texts), bool)
        seen.calls += (await connections.run(load, 10, {404})).requests
        now = bisect(due, time.monotonic(), key=lambda each: each.latest)
        await connections.run(_ask(due[max(0, now - _ASKED) : now + _ASKED], seen), 10, {404})
        await asyncio.sleep(_PAUSE)
    await served
    return seen


def _batches(op: str, count: int, due: list[Due]) -> Callable[[GoOn], Script]:
    """Generate or acquire so many keys, and note when they are due."""

    def script(going: GoOn) -> Script:
        member = "release_in" if op == "acquire" else "expires_in"
        for start in range(0, count, A_BATCH):
            body = msgspec.json.encode({"op": op, "count": min(A_BATCH, count - start)})
            sent_at = time.monotonic()
            _, answer = yield request(BATCH, body)
            answered_at = time.monotonic()
            for key in _decode(answer)["keys"]:
                within = key[member]
                due.append(Due(key["key"], key.get("lease"), sent_at + within, answered_at + within))

    return script


def _keepalive(text: str) -> bytes:
    return request(f"{KEYS}/{text}/keepalive")


def _pairs(count: int) -> Callable[[GoOn], Script]:
    def script(going: GoOn) -> Script:
        for _ in range(count):
            status, body = yield ACQUIRE
            if status == 200:
                yield unblock(_decode(body))

    return script


def _ask(due: Sequence[Due], seen: Seen) -> Callable[[GoOn], Script]:
    """Look at keys, and compare the answers with their deadlines."""

    def script(going: GoOn) -> Script:
        for each in due:
            before = time.monotonic()
            status, body = yield request(f"{KEYS}/{each.text}", method="GET")
            after, row = time.monotonic(), _decode(body)
            seen.asked += 1
            here = status == 200
            if here and each.lease is not None:
                here = row["state"] == "blocked" and row["lease"] == each.lease
            if here and before > each.latest + _ROUNDED:
                seen.wrong.append(f"a key was here {before - each.latest:.4f} s after its deadline")
            if not here and after < each.earliest - EARLY:
                seen.wrong.append(f"a key was gone {each.earliest - after:.4f} s before its deadline")

    return script


def _wait(due: Sequence[Due], seen: Seen) -> Callable[[GoOn], Script]:
    """Wait for a key; how much later than the release it was served with, as the client sees it."""

    def script(going: GoOn) -> Script:
        status, _ = yield request(f"{KEYS}/acquire", b'{"wait":60,"owner":"waiter"}')
        if status == 200:
            seen.waiting.append(time.monotonic() - due[len(seen.waiting)].latest)

    return script
