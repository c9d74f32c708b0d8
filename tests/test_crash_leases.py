"""Servers killed under a load of leases keep every promise of outcomes, extensions, quarantines and attempts.

`crash_leases.py` has the load, the kills and the judge; the second half of this file is proof that it finds faults.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crash_leases import Call, Crasher, judge
from valkeys import Cluster, Valkey, new_pool, shared_cluster, shared_valkey


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_no_promise_about_leases_is_broken_by_kills(tmp_path: Path, seed: int) -> None:
    """Of the server under load, six times."""
    crasher = Crasher(f"--data={tmp_path / 'keypool.db'}", tmp_path, seed)
    assert not (faults := crasher.run(6)), f"after {crasher}:\n" + "\n".join(faults)
    assert any(call.status == "cut" for call in crasher.calls), (
        f"nothing was under way at the kills: {crasher}"
    )
    assert any(call.replayed for call in crasher.calls), f"nothing was repeated: {crasher}"


@pytest.mark.thorough
@pytest.mark.parametrize("place", [shared_valkey, shared_cluster])
def test_no_promise_about_leases_is_broken_by_kills_of_servers_over_valkey(
    tmp_path: Path, place: Callable[[], Valkey | Cluster]
) -> None:
    """Of any of three, five times, while the others go on."""
    crasher = Crasher(f"--engine={new_pool(place())}", tmp_path, 5, servers=3, slack=0.5)
    assert not (faults := crasher.run(5)), f"after {crasher}:\n" + "\n".join(faults)


# ------------------------------------------------------------------------- what the judge finds in histories


def call(what: str, asked: float, state: str = "", left: float | None = None, **more: Any) -> Call:
    """A call about lease 1 of key 1, over a moment after it was asked; cut off, if no state or status is given."""
    more = {"key": 1, "lease": 1, "ended": asked + 0.01, "status": "done" if state else "cut"} | more
    return Call(what, asked=asked, state=state or None, left=left, **more)


def acquired(asked: float, *, attempt: str = "a", **more: Any) -> Call:
    """A key was acquired, for 10 s."""
    return call("acquire", asked, "blocked", 10.0, attempt=attempt, **more)


def next_acquired(asked: float, **more: Any) -> Call:
    """It was acquired by another attempt, under lease 2."""
    return acquired(asked, attempt="b", **{"lease": 2} | more)


def reported(asked: float, outcome: str, state: str = "", left: float | None = None, **more: Any) -> Call:
    """An outcome was reported."""
    return call(
        "report", asked, state, left, body={"outcome": outcome}, **{"changed": True if state else None} | more
    )


TAKEN = acquired(0)
COOLING = reported(1, "rate_limited", "cooling", 5.0)
INVALID = reported(1, "invalid", "quarantined")
TO_COME = call("quarantine", 1, "blocked", 9.0)
EXTENDED = call("extend", 1, "blocked", 20.0)
ERROR = reported(1, "error", "available")
OK = [TAKEN, ERROR, next_acquired(2), reported(3, "ok", "available", lease=2)]
TWO = {"count": 2}

FAULTS: dict[str, tuple[str, list[Call]]] = {
    "a cooling key is served": ("cooldown shortened", [TAKEN, COOLING, next_acquired(3)]),
    "a cooling key is served to one who waited": ("cooldown shortened", [TAKEN, COOLING, next_acquired(0.5, ended=3)]),
    "a cooling key is listed as available": ("cooldown shortened", [TAKEN, COOLING, call("look", 3, "available")]),
    "a cooldown ends sooner than was told": ("cooldown shortened", [TAKEN, COOLING, call("look", 3, "cooling", 2.0)]),
    "an invalid key is served": ("lost quarantine", [TAKEN, INVALID, next_acquired(3)]),
    "an invalid key cools": ("lost quarantine", [TAKEN, INVALID, call("look", 3, "cooling", 2.0)]),
    "an operator's quarantine is lost": (
        "lost quarantine", [call("quarantine", 0, "quarantined", lease=0), call("look", 1, "available", lease=0)],
    ),
    "a restore before it excuses nothing": (
        "lost quarantine", [call("restore", 0.5, "available"), INVALID, call("look", 2, "available")],
    ),
    "a quarantine to come doesn't come": ("lost quarantine", [TAKEN, TO_COME, call("look", 11, "available")]),
    "a quarantine to come ends with a new lease": ("lost quarantine", [TAKEN, TO_COME, next_acquired(11)]),
    "an attempt has two leases": (
        "two leases", [call("look", 1, "blocked", 5.0, attempt="a", key=number, lease=number) for number in (1, 2)],
    ),
    "a batch has a lease too many": (
        "two leases", [acquired(number, key=number, lease=number, body=TWO) for number in (1, 2, 3)],
    ),
    "a repeat gets another lease": ("second lease", [TAKEN, acquired(1, key=2, lease=2)]),
    "a repeat gets nothing": (
        "second lease", [TAKEN, call("acquire", 1, attempt="a", key=None, lease=None, status="no-key-available")],
    ),
    "a batch's repeat gets less": (
        "second lease", [acquired(0, body=TWO), acquired(0, key=2, lease=2, body=TWO),
                         acquired(1, body=TWO, replayed=True)],
    ),
    "a key is held by two": ("held by two", [TAKEN, next_acquired(5)]),
    "a key is held by somebody who wasn't answered": ("held by two", [TAKEN, call("look", 5, "blocked", 9.0, lease=2)]),
    "a key is served within an extension": ("held by two", [TAKEN, EXTENDED, next_acquired(15)]),
    "a refused report excuses nothing": (
        "held by two", [TAKEN, reported(2, "ok", status="lease-over"), next_acquired(5)],
    ),
    "a report of an older lease excuses nothing": (
        "held by two", [next_acquired(11), reported(12, "ok"), acquired(13, lease=3, attempt="c")],
    ),
    "an extension is lost": ("lost extension", [TAKEN, EXTENDED, call("look", 2, "blocked", 8.0)]),
    "a lease is over too soon": ("lost lease", [TAKEN, call("look", 5, "available")]),
    "a holder is refused": ("lost lease", [TAKEN, call("extend", 5, status="stale-lease")]),
    "a report isn't counted": ("not counted", [TAKEN, ERROR, call("look", 2, "available", failures=0)]),
    "a report is counted twice": ("counted twice", [TAKEN, ERROR, call("look", 2, "available", failures=2)]),
    "a report is accepted twice": ("counted twice", [TAKEN, ERROR, reported(2, "error", "available")]),
    "a guarded report isn't counted": (
        "not counted",
        [TAKEN, reported(1, "invalid", "cooling", 1.0, guarded=True), call("look", 5, "available", failures=0)],
    ),
    "a second report resets the count": (
        "not counted",
        [TAKEN, ERROR, reported(2, "ok", "available", changed=False), call("look", 3, "available", failures=0)],
    ),
    "an ok resets nothing": ("counted twice", [*OK, call("look", 4, "available", lease=2, failures=1)]),
    "a restore resets nothing": (
        "counted twice", [TAKEN, ERROR, call("restore", 3, "available"), call("look", 4, "available", failures=1)],
    ),
    "a first report counts as the second": ("not counted", [TAKEN, reported(1, "error", "available", changed=False)]),
    "a handle isn't known": ("lost handle", [TAKEN, call("look", 1, status="unknown-key")]),
    "a handle changes": ("lost handle", [acquired(0, handle="h:1.1.a"), acquired(1, handle="h:1.1.b", replayed=True)]),
    "a key's lease goes back": ("lease went back", [acquired(0, lease=5), call("look", 20, "available", lease=4)]),
    "a stale lease is the latest": (
        "lease went back", [TAKEN, call("look", 20, status="stale-lease"), call("look", 21, "available")],
    ),
    "the pool's lease goes back": ("lease went back", [acquired(0, lease=5), acquired(1, lease=4, key=2, attempt="b")]),
    "a lease is given twice": ("lease repeated", [TAKEN, acquired(0, key=2, attempt="b")]),
}  # fmt: skip
INNOCENT: dict[str, list[Call]] = {
    "a cooldown and its end": [TAKEN, COOLING, call("look", 2, "cooling", 4.0), next_acquired(7)],
    "a restore that was cut off": [TAKEN, COOLING, call("restore", 2, ended=9), next_acquired(3)],
    "a restore at the same time": [TAKEN, INVALID, call("restore", 0.9, "available", ended=2), next_acquired(3)],
    "a quarantine that comes": [TAKEN, TO_COME, call("look", 2, "blocked", 8.0), call("look", 11, "quarantined")],
    "a report that was cut off": [TAKEN, reported(1, "ok", ended=4), next_acquired(3)],
    "a report that was repeated": [
        TAKEN, reported(1, "error", ended=2), reported(3, "error", "available", changed=False),
        call("look", 4, "available", failures=1),
    ],
    "a key taken away by an operator": [
        TAKEN, call("quarantine", 1, body={"now": True}), reported(2, "ok", "quarantined", changed=False),
    ],
    "an extension that was cut off": [TAKEN, call("extend", 1, ended=2), call("look", 3, "blocked", 27.0)],
    "an attempt that was cut off": [
        call("acquire", 0, attempt="a", key=None), next_acquired(0.5, key=2), acquired(1, replayed=True),
    ],
    "an older lease that is refused": [
        TAKEN, call("free", 1, "available"), next_acquired(2), call("look", 3, status="stale-lease"),
    ],
    "an attempt that was repeated": [TAKEN, acquired(1, replayed=True)],
    "an attempt after its lease was given back": [TAKEN, call("free", 1, "available"), acquired(2, key=2, lease=2)],
    "an attempt after its lease ran out": [TAKEN, acquired(11, key=2, lease=2)],
    "an attempt of two": [acquired(0, body=TWO), acquired(0, body=TWO, key=2, lease=2)],
    "an attempt of two that was cut off": [
        call("acquire", 0, key=None, attempt="a", body=TWO),
        *(call("look", 1, "blocked", 9.0, attempt="a", key=number, lease=number) for number in (1, 2)),
    ],
    "an end a little early": [TAKEN, next_acquired(9.96)],
    "a length of time that was told short": [TAKEN, call("look", 5, "blocked", 4.1, ended=5.5)],
    "failures before one that was ok": [*OK, call("look", 4, "available", lease=2, failures=0)],
    "failures before a restore that was cut off": [
        TAKEN, ERROR, call("restore", 2, ended=3), call("look", 4, "available", failures=1),
    ],
    "failures, of which some were cut off": [
        TAKEN, ERROR, next_acquired(2), reported(3, "error", lease=2),
        call("look", 4, "available", lease=2, failures=1), call("look", 5, "available", lease=2, failures=2),
    ],
}  # fmt: skip


@pytest.mark.parametrize("history", FAULTS)
def test_the_judge_finds_each_kind_of_broken_promise(history: str) -> None:
    """In the shortest history that shows it."""
    kind, calls = FAULTS[history]
    faults = judge(calls)
    assert [fault for fault in faults if fault.startswith(kind)], faults


@pytest.mark.parametrize("history", INNOCENT)
def test_the_judge_accuses_no_server_of_what_may_be(history: str) -> None:
    """Where a call was cut off, or two were under way at once."""
    assert judge(INNOCENT[history]) == []
