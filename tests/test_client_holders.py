"""Owners, waiters and rare events in the client and the command, against the server and against the fake one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from cli_support import run_command
from client_support import url_of
from support import ServerProcess, eventually

from keypool.cli.arguments import RARE_EVENTS
from keypool.client import AsyncKeyPool, BadRequest, KeyPool, RareEvent
from keypool.client.testing import FakeServer
from keypool.core import rare_events


@pytest.fixture(params=["served", "fake"])
def pool(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[KeyPool]:
    """A client of an empty pool of its own."""
    if request.param == "fake":
        yield KeyPool(transport=FakeServer(pools={"who": []})).pool("who")
    else:
        with pool_on(server) as pool:
            yield pool


@contextlib.contextmanager
def pool_on(server: ServerProcess) -> Iterator[KeyPool]:
    """The same on this server, which others use afterwards."""
    with KeyPool(url_of(server)) as client:
        client.put_pool("who", keepalive_seconds=None)
        yield client.pool("who")
        client.delete_pool("who", drain=True, now=True)
        eventually(lambda: all(each.name != "who" for each in client.pools()), "the pool is gone")


def test_owners_are_listed_and_released(pool: KeyPool) -> None:
    """In order of name; only what they hold is listed by owner."""
    pool.generate_many(5)
    held = [pool.acquire(owner=owner) for owner in ("bob", "ann", "bob")]
    owners = list(pool.owners())
    assert [(each.owner, each.client, each.held, each.released) for each in owners] == [
        ("ann", None, 1, 0), ("bob", None, 2, 0),
    ]  # fmt: skip
    assert all(isinstance(each.acquired_at, datetime) for each in owners)
    assert [row.lease for row in pool.rows(owner="bob")] == [held[0].lease, held[2].lease]
    assert pool.page(owner="bob", limit=500).next is None
    assert pool.release_owner("bob", client="ci") == 0
    assert pool.release_owner("bob") == 2
    assert [each.owner for each in pool.owners()] == ["ann"]
    assert list(pool.waiters()) == []


def test_rare_events_are_listed(pool: KeyPool) -> None:
    """Newest first, of one kind if wanted."""
    key, other = pool.generate(), pool.generate()
    pool.reveal(key.id)
    pool.delete(key.id)
    lease = pool.acquire(owner="ann")
    pool.quarantine(other.id, now=True)
    pool.restore(other.id)
    events = list(pool.events())
    assert [event.event for event in events if event.event != "generated"] == [
        "restored", "quarantined", "unblocked", "deleted", "revealed",
    ]  # fmt: skip
    assert sum(event.count for event in events if event.event == "generated") == 2
    [ended] = pool.events("unblocked")
    assert isinstance(ended, RareEvent)
    assert (ended.id, ended.owner, ended.lease, ended.by) == (other.id, "ann", lease.lease, "operator")


def test_an_unknown_kind_is_refused(server: ServerProcess) -> None:
    """And the kinds of the command are those of the server."""
    with KeyPool(url_of(server)) as pool, pytest.raises(BadRequest, match="revealed"):
        list(pool.events("acquired"))
    assert set(RARE_EVENTS) == {kind.value for kind in rare_events.RARE}


def test_the_asynchronous_client_has_them_too() -> None:
    """As asynchronous iterators."""

    async def main() -> None:
        async with AsyncKeyPool(transport=FakeServer(["key-1"])) as pool:
            await pool.acquire(owner="ann")
            assert [each.owner async for each in pool.owners()] == ["ann"]
            assert [each async for each in pool.waiters()] == []
            assert await pool.release_owner("ann") == 1
            assert [each.event async for each in pool.events("unblocked")] == ["unblocked"]

    asyncio.run(main())


def test_the_command_lists_and_releases(server: ServerProcess) -> None:
    """Tab-separated in a pipe, JSON if wanted; wrong arguments are refused."""
    with pool_on(server) as pool:
        [key] = pool.generate_many(1)
        pool.acquire(owner="ann")

        def keypool(*words: str) -> Any:
            return run_command(server, "--pool", "who", *words)

        assert keypool("owners").lines[0][:3] == ["ann", "", "1"]
        assert json.loads(keypool("owners", "--json").out)["held"] == 1
        assert keypool("list", "--owner", "ann").lines[0][0] == str(key.id)
        waiting = threading.Thread(target=pool.acquire, kwargs={"owner": "bob", "wait": 30}, daemon=True)
        waiting.start()
        assert eventually(lambda: keypool("waiters").lines, "it waits")[0][0] == "bob"
        assert keypool("owners", "release", "ann").fields == {"released": "1"}
        waiting.join(30)
        assert [line[1] for line in keypool("events", "--rare").lines] == ["generated", "unblocked"]
        assert [line[1] for line in keypool("events", "--rare", "--count", "1").lines] == ["unblocked"]
        assert keypool("events", "--rare", "--kind", "deleted").out == ""
        for words in (("owners", "release"), ("owners", "list", "ann"), ("owners", "--client", "ci")):
            assert keypool(*words).status == 2
        assert keypool("events", "--kind", "deleted").status == 2


def test_leases_that_ran_out_are_counted_by_the_fake_server() -> None:
    """For five minutes of its clock."""
    fake = FakeServer(["key-1", "key-2"], keepalive_seconds=None, max_block_seconds=3600)
    with KeyPool(transport=fake) as pool:
        pool.acquire(owner="ann")
        pool.acquire(owner="ann", block_seconds=1000)

        def counts() -> list[tuple[int, int]]:
            return [(each.held, each.released) for each in pool.owners()]

        fake.advance(61)
        assert counts() == [(1, 1)]
        fake.advance(301)
        assert counts() == [(1, 0)]
