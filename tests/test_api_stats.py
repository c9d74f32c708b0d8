"""`GET /stats`: every number, moved by the right calls and only by them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from conftest import Start
from support import ACQUIRE, API, Client, eventually, expect_object, pass_until

STATS: dict[str, object] = {
    "total": int, "available": int, "blocked": int, "cooling": int, "quarantined": int, "waiting": int,
    "generated": int, "acquired": int, "unblocked": int, "released": int, "deleted": int, "expired": int,
    "kept_alive": int, "refused": int, "cooled": int, "quarantines": int, "restored": int, "imported": int,
    "paced": int,
    "uptime": float, "engine": str, "version": str,
}  # fmt: skip
LEGACY = API + "/random_api_key/"


def test_stats_of_a_new_pool_are_zero(start_server: Start) -> None:
    """Every member, all counts 0, uptime the server's own, engine and version named."""
    stats = expect_object(start_server().client().get(API + "/stats").expect(200), **STATS)
    counts = {name: stats[name] for name, kind in STATS.items() if kind is int}
    assert set(counts.values()) == {0}, counts
    assert 0 <= stats["uptime"] < 120
    assert stats["engine"]
    assert stats["version"]


def test_uptime_grows_as_time_does(client: Client) -> None:
    """In seconds."""
    first = client.get(API + "/stats")
    pass_until(first.answered_at + 0.3)
    second = client.get(API + "/stats")
    grown = second.json["uptime"] - first.json["uptime"]
    assert 0.3 - 0.1 <= grown <= second.answered_at - first.asked_at + 0.1, grown


@dataclass
class Pool:
    """What each step below finds: a free key, a blocked key with its lease, and the client to call with."""

    client: Client
    free: str
    held: str
    lease: int

    def path(self, key: str, call: str) -> str:
        """The path of a call about one key."""
        return f"{API}/keys/{key}/{call}"


@dataclass
class Step:
    """One call, and all that it moves in stats."""

    name: str
    call: Callable[[Pool], object]
    moves: dict[str, int] = field(default_factory=dict)


STEPS = [
    Step("generate", lambda p: p.client.make(), {"generated": 1, "total": 1, "available": 1}),
    Step("batch generate", lambda p: p.client.make_many(7), {"generated": 7, "total": 7, "available": 7}),
    Step(
        "legacy generate",
        lambda p: p.client.post(LEGACY).expect(201),
        {"generated": 1, "total": 1, "available": 1},
    ),
    Step("acquire", lambda p: p.client.acquire(), {"acquired": 1, "available": -1, "blocked": 1}),
    Step(
        "batch acquire",
        lambda p: p.client.batch(op="acquire", count=5).expect(200),
        {"acquired": 1, "available": -1, "blocked": 1},
    ),
    Step(
        "legacy acquire",
        lambda p: p.client.get(LEGACY).expect(200),
        {"acquired": 1, "available": -1, "blocked": 1},
    ),
    Step(
        "unblock",
        lambda p: p.client.post(p.path(p.held, "unblock")).expect(200),
        {"unblocked": 1, "available": 1, "blocked": -1},
    ),
    Step(
        "unblock with the lease",
        lambda p: p.client.post(p.path(p.held, "unblock"), json={"lease": p.lease}).expect(200),
        {"unblocked": 1, "available": 1, "blocked": -1},
    ),
    Step(
        "batch unblock, one of three changing",
        lambda p: p.client.batch(op="unblock", keys=[p.free, p.held, p.held]).expect(200),
        {"unblocked": 1, "available": 1, "blocked": -1},
    ),
    Step(
        "legacy unblock",
        lambda p: p.client.put(f"{LEGACY}?api_key={p.held}").expect(200),
        {"unblocked": 1, "available": 1, "blocked": -1},
    ),
    Step("unblock of a free key", lambda p: p.client.post(p.path(p.free, "unblock")).expect(200)),
    Step("legacy unblock of a free key", lambda p: p.client.put(f"{LEGACY}?api_key={p.free}").expect(200)),
    Step(
        "unblock with a stale lease",
        lambda p: p.client.post(p.path(p.held, "unblock"), json={"lease": p.lease + 1}).expect(409),
    ),
    Step(
        "batch unblock with a stale lease",
        lambda p: p.client.batch(op="unblock", keys=[{"key": p.held, "lease": p.lease + 1}]).expect(200),
    ),
    Step("unblock of no key", lambda p: p.client.post(p.path("nope", "unblock")).expect(404)),
    Step(
        "keepalive of a free key",
        lambda p: p.client.post(p.path(p.free, "keepalive")).expect(200),
        {"kept_alive": 1},
    ),
    Step(
        "keepalive of a blocked key",
        lambda p: p.client.post(p.path(p.held, "keepalive")).expect(200),
        {"kept_alive": 1},
    ),
    Step(
        "batch keepalive, one twice, one unknown",
        lambda p: p.client.batch(op="keepalive", keys=[p.free, p.held, p.free, "nope"]).expect(200),
        {"kept_alive": 3},
    ),
    Step("keepalive of no key", lambda p: p.client.post(p.path("nope", "keepalive")).expect(404)),
    Step(
        "delete of a free key",
        lambda p: p.client.delete(f"{API}/keys/{p.free}").expect(204),
        {"deleted": 1, "total": -1, "available": -1},
    ),
    Step(
        "delete of a blocked key",
        lambda p: p.client.delete(f"{API}/keys/{p.held}").expect(204),
        {"deleted": 1, "total": -1, "blocked": -1},
    ),
    Step(
        "batch delete, one twice, one unknown",
        lambda p: p.client.batch(op="delete", keys=[p.free, p.held, p.free, "nope"]).expect(200),
        {"deleted": 2, "total": -2, "available": -1, "blocked": -1},
    ),
    Step(
        "legacy delete",
        lambda p: p.client.delete(f"{LEGACY}?api_key={p.held}").expect(200),
        {"deleted": 1, "total": -1, "blocked": -1},
    ),
    Step("delete of no key", lambda p: p.client.delete(f"{API}/keys/nope").expect(404)),
    Step("legacy delete of no key", lambda p: p.client.delete(f"{LEGACY}?api_key=nope").expect(400)),
    Step("get", lambda p: p.client.row(p.held)),
    Step("head", lambda p: p.client.head(f"{API}/keys/{p.held}")),
    Step("list", lambda p: p.client.get(API + "/keys").expect(200)),
    Step("reveal", lambda p: p.client.post(p.path(p.held, "reveal")).expect(200)),
    Step("start_scheduler", lambda p: p.client.get(API + "/start_scheduler/").expect(200)),
    Step("options", lambda p: p.client.options(API + "/keys/acquire").expect(204)),
    Step("a wrong acquire", lambda p: p.client.post(ACQUIRE, json={"wait": -1}).expect(400)),
    Step(
        "an acquire of another site", lambda p: p.client.post(ACQUIRE, headers={"Origin": "null"}).expect(403)
    ),
    Step("a wrong batch", lambda p: p.client.batch(op="generate", count=0).expect(400)),
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_a_call_moves_its_own_numbers_only(client: Client, step: Step) -> None:
    """Every number that the step names by so much, every other not at all."""
    client.make()
    served = client.acquire()
    free = client.make()["key"]
    before = client.stats()
    step.call(Pool(client, free, served["key"], served["lease"]))
    after = client.stats()
    del before["uptime"], after["uptime"]
    moves = {name: after[name] - value for name, value in before.items() if after[name] != value}
    assert moves == step.moves, f"{step.name} moved {moves}"


@pytest.mark.parametrize("how", ["acquire", "acquire that waits", "batch", "legacy"])
def test_an_acquire_answered_404_is_refused(client: Client, how: str) -> None:
    """One refusal for each, of whatever form."""
    with client.expect_moved(refused=1):
        answer = {
            "acquire": lambda: client.post(ACQUIRE),
            "acquire that waits": lambda: client.post(ACQUIRE, json={"wait": 0.1}),
            "batch": lambda: client.batch(op="acquire", count=3),
            "legacy": lambda: client.get(LEGACY),
        }[how]()
        assert answer.status == 404, str(answer)


def test_released_and_expired_count_deadlines_only(lend: Start) -> None:
    """A block that ran out is released, not unblocked; a key that ran out is expired, not deleted."""
    client = lend("--block-seconds=0.2", "--keepalive-seconds=1").client()
    while True:
        before = client.stats()
        made = client.batch(op="generate", count=3)
        acquired = client.batch(op="acquire", count=2)

        def over(before: dict[str, int] = before) -> bool:
            now = client.stats()
            return bool(now["expired"] == before["expired"] + 3 and now["total"] == 0)

        eventually(over, "three keys to expire")
        if acquired.answered_at - made.asked_at < 0.75:  # else they may have expired while they were held
            break
    acquired.expect(200)
    after = client.stats()
    assert after["acquired"] - before["acquired"] == after["released"] - before["released"]
    assert after["unblocked"] == before["unblocked"]
    assert after["deleted"] == before["deleted"]
    assert after["available"] == after["blocked"] == 0


def test_the_numbers_agree_with_each_other(client: Client) -> None:
    """total is available and blocked; what was generated is there, deleted or expired."""
    base = client.stats()
    keys = [one["key"] for one in client.make_many(50)]
    client.batch(op="acquire", count=20).expect(200)
    client.batch(op="unblock", keys=keys[:25]).expect(200)
    client.batch(op="delete", keys=keys[20:30]).expect(200)
    now = {name: value - base[name] for name, value in client.stats().items() if isinstance(value, int)}
    assert now["total"] == now["available"] + now["blocked"] == 40
    assert now["generated"] - now["deleted"] - now["expired"] == now["total"]
    assert now["acquired"] - now["unblocked"] - now["released"] >= now["blocked"]
