"""Kills, kill -9, at any moment under a load of reports, extensions, quarantines, restores and repeated attempts.

A process makes the calls on the engine of a data file, and writes down what it asks and what it is answered. After each
kill the file is opened again, and what it says is compared with what was answered. Then the next process goes on.
"""

from __future__ import annotations

import json
import random
import select
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from durable_support import opened
from engine_support import on_loop
from support import ROOT, clean_environment

from keypool.core.keys import Key, State
from keypool.engine.embedded import EmbeddedEngine

RULES = {
    "block_seconds": 2.0,
    "max_block_seconds": 500.0,
    "keepalive_seconds": 10_000.0,
    "cooldown_seconds": 0.1,
    "rest_seconds": 0.01,
    "max_quarantined_percent": 100.0,
}
KEYS = 60
TOLERANCE = 0.01  # seconds; an answer may be 5 ms old

PROGRAM = """
import asyncio, json, os, random, sys
from pathlib import Path
from types import SimpleNamespace
from keypool.core.errors import KeypoolError
from keypool.core.events import HOLDER
from keypool.core.outcomes import Outcome, Report
from keypool.core.rules import PoolRules
from keypool.engine.durable.opening import open_durable

def say(*words):
    os.write(1, json.dumps(words).encode() + b"\\n")

async def work(engine):
    while True:
        name = os.urandom(16).hex()
        attempt = SimpleNamespace(digest=bytes.fromhex(name), replayed=False)
        say("acquire?", name)
        try:
            lease = await engine.acquire("me", 0, block_seconds=random.choice((None, 60.0)), attempt=attempt)
        except KeypoolError:
            say("nothing", name)
            id = random.randrange(1, engine.pool.last_id + 1)
            say("restore?", id)
            await engine.restore(id, HOLDER)
            continue
        id, number = lease.id, lease.lease
        say("acquire", id, number, engine.now() + lease.release_in, name)
        if random.random() < 0.3:
            try:
                extended = await engine.extend(id, number, random.uniform(50, 100))
                say("extend", id, number, engine.now() + extended.release_in)
            except KeypoolError:
                pass
        if random.random() < 0.2:
            at_once = random.random() < 0.5
            say("quarantine?", id, at_once)
            row = await engine.quarantine(id, "test", at_once, HOLDER)
            say("quarantine", id, row.state)
        if random.random() < 0.1:
            continue  # the lease runs out
        outcome = random.choice(list(Outcome))
        after = random.choice((None, 0.0, 0.2, 300.0)) if outcome is Outcome.RATE_LIMITED else None
        say("report?", id)
        answer = await engine.unblock(id, number, report=Report(outcome, after, "test"))
        end = None if answer.available_in is None else engine.now() + answer.available_in
        say("report", id, number, answer.state, end)

async def main():
    engine = await open_durable(Path(sys.argv[1]), PoolRules(**RULES))
    if not engine.pool.total:
        await engine.generate(KEYS)
    await asyncio.gather(*[work(engine) for _ in range(6)])

asyncio.run(main())
"""


@dataclass
class Known:
    """What was answered about a key and still holds, and what was asked about it since."""

    lease: int = 0
    attempt: str = ""
    held_until: float = 0.0
    cooling_until: float = 0.0
    quarantined: bool = False
    to_be_quarantined: bool = False
    reported: int = 0
    ending: bool = False
    restoring: bool = False


@dataclass
class Ledger:
    """All keys, attempts without an answer, and all leases that were given."""

    keys: dict[int, Known] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)
    leases: set[int] = field(default_factory=set)

    def note(self, what: str, *words: Any) -> None:
        """Add a line that the process wrote."""
        if what == "acquire?":
            self.waiting.add(words[0])
        elif what == "nothing":
            self.waiting.discard(words[0])
        elif what == "acquire":
            self._acquired(*words)
        elif what.endswith("?"):
            self._asked(self.keys.setdefault(words[0], Known()), what, *words[1:])
        else:
            self._answered(self.keys[words[0]], what, *words[1:])

    def _acquired(self, id: int, lease: int, until: float, attempt: str) -> None:
        self.waiting.discard(attempt)
        assert lease not in self.leases, f"lease {lease} was given twice"
        self.leases.add(lease)
        self.keys[id] = Known(lease, attempt, until)

    @staticmethod
    def _asked(known: Known, what: str, at_once: bool = True) -> None:
        if what == "restore?":
            known.restoring = True
            known.quarantined = known.to_be_quarantined = False
            known.cooling_until = 0.0
        else:
            known.ending = known.ending or at_once

    @staticmethod
    def _answered(known: Known, what: str, *words: Any) -> None:
        if what == "extend":
            known.held_until = words[1]
        elif what == "report" and words[0] == known.lease:
            known.reported = known.lease
        if known.restoring:  # who was first isn't known
            return
        if what == "report":
            known.cooling_until = max(known.cooling_until, words[2] or 0.0)
            known.quarantined = known.quarantined or words[1] == "quarantined"
        elif what == "quarantine":
            known.quarantined = words[0] == "quarantined"
            known.to_be_quarantined = True

    async def compare(self, engine: EmbeddedEngine) -> None:
        """Fail unless the engine of the file knows all that was answered."""
        engine.pool.check()
        assert engine.pool.counters.acquired == engine.pool.last_lease
        assert max(self.leases, default=0) <= engine.pool.last_lease
        for id, known in self.keys.items():
            _expect(known, engine.pool.find_id(id, engine.now()), engine.now())
        for name in self.waiting:
            await _repeat(name, engine)
        self.waiting.clear()
        for known in self.keys.values():  # whatever was under way is over now
            known.restoring = False


def _expect(known: Known, key: Key, now: float) -> None:
    if known.quarantined:
        assert key.state is State.QUARANTINED, f"{key!r}: a quarantine was lost"
    if known.to_be_quarantined:
        coming = key.state is State.QUARANTINED or key.quarantine_pending
        assert coming, f"{key!r}: a quarantine to come was lost"
    if known.cooling_until > now + 0.1 and key.state is not State.QUARANTINED:
        assert key.state is State.COOLING, f"{key!r}: a cooldown was lost"
        assert key.release_deadline is not None
        assert key.release_deadline >= known.cooling_until - TOLERANCE, f"{key!r}: a cooldown was shortened"
    if known.held_until > now + 0.1 and not known.ending:
        assert (key.state, key.lease) == (State.BLOCKED, known.lease), f"{key!r}: a lease was lost"
        assert key.attempt == bytes.fromhex(known.attempt)
        assert key.release_deadline is not None
        assert key.release_deadline >= known.held_until - TOLERANCE, f"{key!r}: an extension was lost"
    if known.reported and key.lease == known.reported:
        assert key.reported, f"{key!r}: a report was lost"


async def _repeat(name: str, engine: EmbeddedEngine) -> None:
    """An attempt that got no answer has at most one lease, and its repeat gets that one."""
    held = engine.pool.leases_of(bytes.fromhex(name), engine.now())
    assert len(held) <= 1, "an attempt has two leases"
    if held:
        again = _Attempt(bytes.fromhex(name))
        lease = await engine.acquire("me", 0, attempt=again)
        assert (lease.lease, again.replayed) == (held[0].lease, True)
        await engine.unblock(lease.id, lease.lease)


@dataclass
class _Attempt:
    digest: bytes
    replayed: bool = False


def run_until_killed(path: Path, lines: int) -> list[list[Any]]:
    """What a process said that worked on the file until it had said so much, and was killed."""
    head = f"RULES, KEYS = {RULES!r}, {KEYS}\n"
    with subprocess.Popen(
        [sys.executable, "-c", head + PROGRAM, str(path)], cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
        env=clean_environment({"PYTHONPATH": str(ROOT)}),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        said = list[bytes]()
        while len(said) < lines:
            assert select.select([process.stdout], [], [], 60)[0], "it makes no calls any more"
            line = process.stdout.readline()
            assert line, "it ended by itself"
            said.append(line)
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().splitlines()
    return [json.loads(line) for line in (*said, *rest)]


@on_loop
@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.thorough)])
async def test_nothing_answered_about_leases_is_lost_by_kills_at_any_moment(
    tmp_path: Path, kills: int
) -> None:
    """No cooldown shortened, no quarantine lost, no second lease for an attempt, no lease number given twice."""
    path = tmp_path / "keypool.db"
    draw, ledger = random.Random(kills), Ledger()
    seen = set[str]()
    for _ in range(kills):
        for line in run_until_killed(path, draw.randrange(20, 400)):
            ledger.note(*line)
            seen.add(line[0])
        async with opened(path, **RULES) as engine:
            await ledger.compare(engine)
    assert {"acquire", "extend", "report", "quarantine", "restore?"} <= seen, "the load was too small"
