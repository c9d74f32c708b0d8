"""Several servers over one pool: an answer of one holds for all, even if servers are killed or Valkey fails over."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from signal import SIGKILL

import pytest
from fleet import Fleet, fail_over
from support import ACQUIRE, API, ServerProcess, eventually
from valkeys import Cluster, Valkey, with_pool
from viewing import Viewer

from bench import workers

_pools = itertools.count()


@pytest.fixture(scope="module", params=["one", pytest.param("cluster", marks=pytest.mark.thorough)])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a Valkey, or of a cluster of three."""
    with Valkey() if request.param == "one" else Cluster(3) as made:
        yield made.url


@pytest.fixture
def url(place: str) -> str:
    """Of an empty pool there."""
    return with_pool(place, next(_pools))


@pytest.fixture
def servers(url: str, tmp_path: Path) -> Iterator[list[ServerProcess]]:
    """Three servers over it; each must exit cleanly."""
    made: list[ServerProcess] = []
    try:
        made.extend(ServerProcess([f"--engine={url}", "--port=0"], cwd=tmp_path) for _ in range(3))
        yield made
        for server in made:
            server.finish()
    finally:
        for server in made:
            server.close()


# ------------------------------------------------------------------------------------------------- nothing is lost


@pytest.mark.thorough
def test_no_acknowledged_change_is_lost_by_kills_of_servers(url: str, tmp_path: Path) -> None:
    """Three servers, any of which is killed under load, again and again, while the others go on."""
    with Fleet(url, tmp_path, 1) as fleet:
        for _ in range(2):
            faults = fleet.round(3)
            assert not faults, f"after {fleet.tally}:\n" + "\n".join(faults)
        assert fleet.tally.kills == 6
        assert fleet.tally.refused == 0, "a server said 503 though nothing was wrong with Valkey"


def test_a_rolling_restart_loses_nothing(url: str, tmp_path: Path) -> None:
    """Each server is stopped in turn, as its user would, and another started: nothing is lost, nothing is refused but
    by a server that drains.
    """
    with Fleet(url, tmp_path, 3) as fleet:
        with fleet.load():
            for server in list(fleet.servers):
                fleet.wait_for(100)
                fleet.restart(server)
            fleet.wait_for(100)
        faults = fleet.look()
        assert not faults, "\n".join(faults)
        assert fleet.tally.refused == 0


@pytest.mark.thorough
def test_workers_of_three_servers_never_share_a_key(url: str) -> None:
    """6 processes with 2 keys, each asking any server, through a kill; bench/workers.py takes 50 and 10."""
    workers.trial(6, 2, 0.5, 1, url, servers=3)


# ----------------------------------------------------------------------------------------------- one pool for all


def test_stats_are_those_of_the_pool(servers: list[ServerProcess]) -> None:
    """Those of each server include at once what the others did."""
    one, two, three = (server.client() for server in servers)
    made = one.make_many(10)
    lease = two.acquire()
    three.post(f"{API}/keys/{lease['key']}/unblock").expect(200)
    two.delete(f"{API}/keys/{made[0]['key']}").expect(204)
    for client in (one, two, three):
        stats = client.stats()
        told = {
            name: stats[name]
            for name in ("total", "available", "generated", "acquired", "unblocked", "deleted")
        }
        assert told == {
            "total": 9, "available": 9, "generated": 10, "acquired": 1, "unblocked": 1, "deleted": 1,
        }  # fmt: skip


def test_the_feed_has_the_events_of_other_servers(servers: list[ServerProcess]) -> None:
    """Events and numbers, soon."""
    key = servers[0].client().make()
    with Viewer(servers[1]) as viewer:
        hello = viewer.frame()
        assert hello["type"] == "hello"
        lease = servers[2].client().acquire(owner="elsewhere")
        assert lease["key"] == key["key"]
        seen: list[dict[str, object]] = []

        def told() -> bool:
            frame = viewer.frame()
            seen.extend(frame.get("events", []))
            return any(event["event"] == "acquired" and event["owner"] == "elsewhere" for event in seen)

        eventually(told, "the event of another server")
        assert servers[1].client().stats()["blocked"] == 1


def test_a_key_freed_at_one_server_serves_a_waiter_of_another(servers: list[ServerProcess]) -> None:
    """At each of them in turn; and every server counts all waiters."""
    one = servers[0].client()
    one.make()
    lease = one.acquire()
    waiting = [server.wire() for server in servers]
    for wire in waiting:
        wire.ask("POST", ACQUIRE, json={"wait": 60})
    for server in servers:
        server.client().expect_waiting(3)
    served = []
    for left in (2, 1, 0):
        one.post(f"{API}/keys/{lease['key']}/unblock", json={"lease": lease["lease"]}).expect(200)
        one.expect_waiting(left)
        lease = one.get(f"{API}/keys/{lease['key']}").expect(200) | {"key": lease["key"]}
        served.append(lease["lease"])
    answers = [wire.answer().expect(200)["lease"] for wire in waiting]
    assert sorted(answers) == sorted(served) == sorted(set(served))


def test_a_waiter_whose_server_is_killed_takes_no_key(servers: list[ServerProcess]) -> None:
    """A waiter at another server gets it."""
    one = servers[0].client()
    one.make()
    lease = one.acquire()
    first = servers[1].wire()
    first.ask("POST", ACQUIRE, json={"wait": 60})
    one.expect_waiting(1)
    second = servers[2].wire()
    second.ask("POST", ACQUIRE, json={"wait": 60})
    one.expect_waiting(2)
    servers[1].signal(SIGKILL)
    servers[1].wait()
    one.post(f"{API}/keys/{lease['key']}/unblock", json={"lease": lease["lease"]}).expect(200)
    assert second.answer().expect(200)["key"] == lease["key"]
    one.expect_waiting(0)


# --------------------------------------------------------------------------------------------------- failing over


@pytest.mark.thorough
@pytest.mark.parametrize("behind", [0, 60], ids=["in-step", "behind"])
def test_servers_go_on_after_a_failover(tmp_path: Path, behind: int) -> None:
    """A primary is killed under load and its replica promoted: the servers go on by themselves.

    What Valkey had not copied yet is lost, as docs/scaling.md says: nothing where the replica was in step, and else
    some of what was told in the moments before. No lease number is given again in either case.
    """
    with Cluster(3, 1, node_timeout=1000) as cluster, Fleet(cluster.url, tmp_path, 4) as fleet:
        fleet.allow(r"Valkey|storage")
        primary = cluster.nodes[0]
        missed = (cluster.replica_of(primary), behind) if behind else None
        told = fail_over(fleet, primary, behind=missed)
        print(
            f"\nrecovered in {told.recovered:.1f} s; {fleet.tally}; broken: {told.kinds}, of {told.keys} keys"
        )
        assert not told.never, "\n".join(told.faults)
        assert told.keys <= (behind or fleet.tally.answers // 100), "\n".join(told.faults)
