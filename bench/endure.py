"""Everything at once, for minutes: with a data file, in memory that must stay flat, and without a warning.

The real server, its writer counted with it, under calls of every kind, keys that expire and blocks that run out,
waiters who are served, give up and hang up, attackers of attack.py and a scrape of /metrics a second. Memory is judged
from the first quarter to the last. soak.py looks closer at the pool and at garbage in cycles; here it is the whole.
"""

from __future__ import annotations

import argparse
import time
import urllib.request
from collections.abc import Sequence

import msgspec

from bench.attack import attack
from bench.churn import churn
from bench.load import Address, Connections, request
from bench.process import Child, last_core, on_loop
from bench.real import RealServer
from bench.report import Table, Targets, machine, megabytes
from bench.scripts import GENERATE, mixed, saying

QUICK = ["--minutes=0.5"]
_BLOCK, _LIFE = 1.0, 10.0  # seconds
_CALLERS, _ATTACKERS = 8, 200
_PART = 3.0  # seconds of load between two samples
_BATCHES = 3  # of a thousand keys, made for each part
_CHURNED = 500  # calls on connections that come and go, with waiters, a part
_GROWTH = 0.02  # from the first quarter on; and 2 MB, the noise of two allocators

_decode = msgspec.json.Decoder().decode


def main(arguments: Sequence[str]) -> int:
    """Run, print, judge."""
    parser = argparse.ArgumentParser("bench endure", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    options = parser.parse_args(arguments)
    print(machine() + "\n", flush=True)
    parts = max(8, round(options.minutes * 60 / _PART))
    flags = f"--block-seconds={_BLOCK}", f"--keepalive-seconds={_LIFE}", "--log-format=text"
    with RealServer(*flags) as server, RealServer("--data=:memory:", "--keepalive-seconds=86400") as narrow:
        on_loop(_some_keys(narrow.address))
        attackers = Child(last_core(), attack, server.address, _ATTACKERS, parts * _PART * 4)
        memory, calls, errors = _load(server, narrow, parts)
        attackers.end()
        warnings = server.warnings()
        status = server.stop()
    _show(memory, calls)
    targets = Targets()
    early, late = memory[len(memory) // 4], memory[-1]
    grown = f"{megabytes(late - early)} on {megabytes(early)}"
    flat = late <= early * (1 + _GROWTH) + 2e6
    targets.check("memory is flat from the first quarter on", flat, grown, "2% and 2 MB at most")
    targets.check("warnings logged", not warnings, str(warnings[:3] or "none"), "none")
    targets.check("errors", errors == 0, str(errors), "none")
    targets.check("exit status", status == 0, str(status), "0")
    return targets.status


def _load(server: RealServer, narrow: RealServer, parts: int) -> tuple[list[int], int, int]:
    """Memory after each part, calls and errors in all."""
    memory, calls, errors = [], 0, 0
    for part in range(parts):
        done, failed = on_loop(_part(server.address))
        churned = Child(last_core(), churn, [server.address, narrow.address], _CHURNED, part).wait(120)
        with urllib.request.urlopen(f"http://127.0.0.1:{server.address.port}/metrics") as page:
            page.read()
        memory.append(server.rss())
        calls += done + churned.requests
        errors += failed
    return memory, calls, errors


async def _some_keys(server: Address) -> None:
    connections = await Connections.open(server, 1)
    await connections.run(saying(iter([GENERATE] * 4), bool), _PART)
    connections.close()


async def _part(server: Address) -> tuple[int, int]:
    """Calls of every kind; keys that were just deleted or expired are 404, and so is an acquire when none is free."""
    connections = await Connections.open(server, _CALLERS)
    texts: list[str] = []
    batch = request("/api/v1/batch", b'{"op":"generate","count":1000}')
    heard = saying(
        iter([batch] * _BATCHES), lambda body: texts.extend(key["key"] for key in _decode(body)["keys"])
    )
    await connections.run(heard, _PART, count=1)
    measured = await connections.run(mixed(texts, seed=int(time.monotonic())), _PART, {404})
    connections.close()
    return measured.requests, measured.errors


def _show(memory: Sequence[int], calls: int) -> None:
    table = Table("memory", "start", "1/4", "2/4", "3/4", "end", "most")
    quarters = [memory[quarter * (len(memory) - 1) // 4] for quarter in range(5)]
    table.row("server and writer", *map(megabytes, quarters), megabytes(max(memory)))
    print(f"{calls:,} calls beside {_ATTACKERS} attackers\n\n{table}\n")
