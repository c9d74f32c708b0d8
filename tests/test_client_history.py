"""The history of a key by the client, its fake server, and the command `keypool history`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from cli_support import run_command
from client_support import KINDS, Driver, clean, url_of
from support import ServerProcess

from keypool.client import KeyPool, Outcome, PoolFixed, UnknownKey
from keypool.client.testing import FakeServer

POOL = "history"


@pytest.fixture(params=KINDS)
def pool(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[Driver]:
    """A client of each kind of a pool that keeps a history."""
    driver = Driver(request.param, url_of(server))
    driver.put_pool(POOL, keepalive_seconds=None, max_block_seconds=600)
    yield driver.of_pool(POOL)
    driver.delete_pool(POOL, drain=True, now=True)
    driver.close()
    clean(server)


def scenario(pool: Any) -> list[tuple[Any, ...]]:
    """What the history of a key says after some leases, without moments."""
    made = pool.generate()
    pool.unblock(pool.acquire(owner="ann"))
    limited = pool.acquire(owner="bob")
    pool.extend(limited, 300)
    pool.unblock(limited, outcome="rate_limited", retry_after=0, reason="429")
    pool.acquire(owner="carol")
    pool.quarantine(made.id, now=True)
    leases = list(pool.history(made))
    assert all(
        abs((lease.ended_at - lease.acquired_at) - timedelta(seconds=lease.held)) < timedelta(milliseconds=3)
        for lease in leases
    )
    assert list(pool.history(made.id, 2)) == leases[:2]
    assert list(pool.history(made.id, limit=0)) == []
    pool.delete(made)
    assert list(pool.history(made.id)) == leases
    with pytest.raises(UnknownKey):
        list(pool.history(made.secret))
    return [
        (lease.owner, lease.client, str(lease.how), lease.outcome, lease.reason, lease.extended)
        for lease in leases
    ]


WANTED = [
    ("carol", None, "revoked", None, None, 0),
    ("bob", None, "unblocked", Outcome.RATE_LIMITED, "429", 1),
    ("ann", None, "unblocked", None, None, 0),
]


def test_a_client_reads_who_held_a_key(pool: Driver) -> None:
    """The latest lease first, page by page; by the id of a key that is gone, too."""
    assert scenario(pool) == WANTED


def test_the_fake_server_keeps_the_same_history() -> None:
    """In pools beside `default`, or where a test asks for it; also of leases that ran out."""
    with KeyPool(transport=FakeServer(pools={"openai": []}, max_block_seconds=600)) as default:
        default.change_pool("openai", max_block_seconds=600)
        assert scenario(default.pool("openai")) == WANTED
        made = default.generate()
        default.unblock(default.acquire())
        assert list(default.history(made)) == []
        default.change_pool("default", history_leases=1)
        with pytest.raises(PoolFixed):
            default.change_pool("default", block_seconds=5)
        default.unblock(default.acquire())
        assert len(list(default.history(made))) == 1


def test_the_fake_server_records_deadlines_and_late_reports() -> None:
    """As of the deadline, however late anybody looks."""
    server = FakeServer(["key-1"])
    with KeyPool(transport=server) as pool:
        pool.change_pool("default", history_leases=10)
        lease = pool.acquire(owner="ann")
        server.advance(70)
        pool.keepalive(lease)
        pool.unblock(lease, outcome="error", reason="500")
        [past] = pool.history("key-1")
        assert (past.how, past.outcome, past.reason) == ("released", Outcome.ERROR, "500")
        assert past.held == pytest.approx(60, abs=0.01)


def test_the_command_shows_who_held_a_key(server: ServerProcess) -> None:
    """As columns in a pipe, or as the API's members with --json; the latest ones with --limit."""
    with KeyPool(url_of(server)) as pool:
        pool.put_pool(POOL)
        try:
            of_pool = pool.pool(POOL)
            made = of_pool.generate()
            for owner in ("ann", "bob"):
                of_pool.unblock(of_pool.acquire(owner=owner))
            leases = list(of_pool.history(made))
            shown = run_command(server, "--pool", POOL, "history", f"id:{made.id}")
            assert [line[:2] for line in shown.lines] == [[str(each.lease), each.owner] for each in leases]
            [line] = run_command(
                server, "--json", "--pool", POOL, "history", "--limit", "1", f"id:{made.id}"
            ).out.splitlines()
            assert list(json.loads(line))[:6] == [
                "lease",
                "owner",
                "client",
                "acquired_at",
                "ended_at",
                "held",
            ]
            assert json.loads(line)["how"] == "unblocked"
            assert run_command(server, "--pool", POOL, "history", "id:99").status != 0
        finally:
            pool.delete_pool(POOL, drain=True, now=True)
    clean(server)
