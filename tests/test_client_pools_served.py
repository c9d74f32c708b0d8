"""Pools, imports and data by both clients and the command against the real server: what the fake server promises."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_support import run_command
from client_support import ITEM, KINDS, SECRET, USER, Driver, Proxy, change_one_key, clean, url_of
from conftest import Start
from support import ServerProcess, eventually

from keypool.cli.status import Status
from keypool.client import (
    BadRequest,
    KeyPool,
    KeysWouldExpire,
    NoKeyAvailable,
    PoolDraining,
    PoolFixed,
    PoolFull,
    PoolNotEmpty,
    ShareSpent,
    UnknownPool,
)


@pytest.fixture(params=KINDS)
def client(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[Driver]:
    with Driver(request.param, url_of(server)) as driver:
        driver.put_pool("openai", keepalive_seconds=None)
        yield driver
    leave_no_pool(server)


@pytest.fixture
def admin(server: ServerProcess) -> Iterator[KeyPool]:
    with KeyPool(url_of(server)) as pool:
        yield pool
    leave_no_pool(server)


def leave_no_pool(server: ServerProcess) -> None:
    """Delete all pools and the keys of `default`."""
    clean(server)
    with KeyPool(url_of(server)) as pool:
        for info in pool.pools():
            if info.name != "default":
                pool.delete_pool(info.name, drain=True, now=True)
        eventually(lambda: len(pool.pools()) == 1, "the pools to be gone")


def test_pools_come_change_and_go(client: Driver) -> None:
    made = client.put_pool("mail", block_seconds=10, keepalive_seconds=None)
    assert (made.name, made.total, made.settings["keepalive_seconds"]) == ("mail", 0, None)
    assert client.change_pool("mail", block_seconds=20).settings["block_seconds"] == 20
    assert client.put_pool("mail").settings["block_seconds"] == 60
    assert [info.name for info in client.pools()] == ["default", "mail", "openai"]
    with pytest.raises(BadRequest):
        client.put_pool("mail", blok_seconds=1)
    with pytest.raises(PoolFixed):
        client.delete_pool("default", drain=True)
    assert client.delete_pool("mail") is None
    with pytest.raises(UnknownPool):
        client.get_pool("mail")
    openai = client.of_pool("openai")
    openai.import_many(["sk-1", "sk-2"])
    with pytest.raises(PoolNotEmpty):
        client.delete_pool("openai")
    with openai.lease():
        left = client.delete_pool("openai", drain=True)
        assert left.draining
        for call in (openai.acquire, openai.generate):
            with pytest.raises(PoolDraining):
                call()
    eventually(lambda: [info.name for info in client.pools()] == ["default"], "the pool to be gone")


def test_one_key_is_imported_found_changed_and_replaced(client: Driver) -> None:
    pool = client.of_pool("openai")
    change_one_key(pool)
    pool.import_many([("sk-4", "acct-4"), ("sk-3", "acct-3")])
    assert [row.name for row in pool.rows(name="acct-")] == ["acct-3", "acct-4"]


def test_a_holder_gets_the_data(client: Driver) -> None:
    pool = client.of_pool("openai")
    pool.import_key(**ITEM)
    with pool.lease() as key:
        assert (key.secret, key.name, key.data, key.expires_in) == (SECRET, "acct-17", ITEM["data"], None)
        assert pool.get(key.secret).state == "blocked"
        key.rate_limited(50, reason=f"{USER} was limited")
        with pytest.raises(NoKeyAvailable):
            pool.acquire()
        with pytest.raises(NoKeyAvailable):
            client.acquire()
    row = pool.get(key.id)
    assert (row.state, row.reason, row.labels) == ("cooling", "… was limited", {"region": "eu"})
    assert pool.stats().imported == 1
    with pool.entered(pool.pool.keeper([SECRET])) as keeper:
        assert keeper.keys == [SECRET]


def test_many_are_imported_in_order(client: Driver) -> None:
    pool = client.of_pool("openai")
    pool.import_key(SECRET, name="acct-17")
    items = [
        "sk-1",
        ("sk-2", "acct-2"),
        ("sk-4", "acct-17"),
        "sk-1",
        SECRET,
        "",
        {"secret": "x", "name": "n" * 64},
    ]
    done = pool.import_many(items)
    statuses = [result.status for result in done.results]
    assert statuses == ["created", "created", "failed", "duplicate", "existed", "failed", "failed"]
    assert [result.code for result in done.results if result.code] == [
        "name-taken",
        "bad-request",
        "bad-request",
    ]
    assert (done.created, done.existed, done.duplicate, done.failed) == (2, 1, 1, 3)
    assert pool.import_many([("sk-1", "acct-1")], exists="update").updated == 1
    many = [f"sk-live-{number:06}" for number in range(2500)]
    assert pool.import_many(many).created == 2500
    large = [(f"{number:04}{'ü' * 2000}", None, None, {"x": "y" * 4000}) for number in range(700)]
    assert pool.import_many(large).created == 700
    client.change_pool("openai", max_keys=4000)
    with pytest.raises(PoolFull) as full:
        pool.import_many([*many[:1000], *(f"{text}-x" for text in many)])
    assert full.value.partial.existed == 1000
    with pytest.raises(KeysWouldExpire):
        client.import_many(["sk-1"])
    assert client.import_key("sk-1", expire=True).expires_in == pytest.approx(300, 0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_answer_to_an_import_loses_no_key(server: ServerProcess, admin: KeyPool, kind: str) -> None:
    admin.put_pool("openai", keepalive_seconds=None)
    with Proxy(server) as proxy, Driver(kind, proxy.url, pool="openai") as pool:
        proxy.faults[:] = ["lose"]
        done = pool.import_many(["sk-1", "sk-2"])
        assert (done.existed, done.repeated) == (2, True)
        proxy.faults[:] = ["lose"]
        made = pool.import_key("sk-3")
        assert (made.existed, made.repeated) == (True, True)
        proxy.faults[:] = ["lose"]
        assert pool.replace(made.id, "sk-4").id == made.id
        assert pool.stats().total == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_with_a_share_waits_in_its_own(start_server: Start, tmp_path: Path, kind: str) -> None:
    """It holds as many leases as it may: another acquire is refused, and waits if it may, though keys are free."""
    token, root = "worker-0123456789abcdef", "admin-0123456789abcdef"
    digests = {
        name: hashlib.sha256(text.encode()).hexdigest() for name, text in (("worker", token), ("root", root))
    }
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(
        f'[tokens.worker]\nrole = "client"\ndigest = "{digests["worker"]}"\npools = ["openai"]\nmax_held = 1\n'
        f'[tokens.root]\nrole = "admin"\ndigest = "{digests["root"]}"\n'
    )
    server = start_server(f"--tokens={tokens}")
    with KeyPool(url_of(server), root) as admin, Driver(kind, url_of(server), token, pool="openai") as worker:
        admin.put_pool("openai", keepalive_seconds=None)
        admin.pool("openai").import_many(["sk-1", "sk-2", "sk-3"])
        held = worker.acquire()
        with pytest.raises(ShareSpent) as spent:
            worker.acquire()
        assert 0 < (spent.value.retry_after or 0) <= 60
        with pytest.raises(ShareSpent):
            worker.acquire(wait=0.05)
        [row] = admin.pool("openai").rows(state="blocked")
        assert (row.client, row.lease) == ("worker", held.lease)
        timer = threading.Timer(0.2, admin.pool("openai").unblock, [held.id])
        timer.start()
        assert worker.acquire(wait=30).lease > held.lease
        timer.join()
        with pytest.raises(UnknownPool):
            worker.of_pool("default").acquire()
        for command, status in (("acquire", Status.NO_KEY), ("run", Status.RUN_NO_KEY)):
            words = (command, *(["--", "true"] if command == "run" else []))
            ran = run_command(server, "--pool=openai", *words, KEYPOOL_TOKEN=token)
            assert (ran.status, "share-spent" in ran.err) == (status, True)


# --------------------------------------------------------------------------------------------------- the command


def test_from_a_file_of_keys_to_a_running_job(server: ServerProcess, admin: KeyPool, tmp_path: Path) -> None:
    """The way of a new user: pools from a file, keys from a file, a job that gets a key with its data."""
    (tmp_path / "pools.toml").write_text(
        '[pools.openai]\nkeepalive_seconds = "never"\ncooldown_seconds = 30\n'
    )
    (tmp_path / "keys.csv").write_text(
        f"secret,name,label:region,data:user\n{SECRET},acct-1,eu,{USER}\nsk-2,acct-1,,\n"
    )
    applied = run_command(server, "pools", "apply", str(tmp_path / "pools.toml"))
    assert (applied.status, applied.out) == (0, "openai: created\n")
    again = run_command(server, "pools", "apply", str(tmp_path / "pools.toml"))
    assert (again.status, again.out) == (0, "")
    imported = run_command(server, "--pool", "openai", "import", str(tmp_path / "keys.csv"))
    assert (imported.status, imported.fields["created"], imported.fields["failed"]) == (1, "1", "1")
    assert "line 3: " in imported.err
    assert "name-taken" in imported.err
    listed = run_command(server, "list", KEYPOOL_POOL="openai").lines
    assert [line[1] for line in listed] == ["sk-l…cdef"]
    assert listed[0][-8:] == ["acct-1", "region=eu", "", "", "1", "1", "", "0"]
    code = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1], 'w'))"
    ran = run_command(server, "--pool=openai", "run", "--", sys.executable, "-c", code, str(tmp_path / "out"))
    assert ran.status == 0
    environment = json.loads((tmp_path / "out").read_text())
    assert (environment["KEYPOOL_KEY"], environment["KEYPOOL_DATA_USER"]) == (SECRET, USER)
    replaced = run_command(server, "--pool=openai", "replace", "acct-1", "-", stdin="sk-new")
    assert replaced.status == 0
    acquired = run_command(server, "--pool=openai", "acquire")
    assert acquired.lines[0][0] == "sk-new"
    assert run_command(server, "--pool=openai", "unblock", "-", stdin=acquired.out).status == 0
    assert run_command(server, "--pool=openai", "stats").fields["imported"] == "1"
    assert run_command(server, "--pool=none", "stats").status == Status.UNKNOWN_KEY
    everything = (
        applied.out + applied.err + imported.out + imported.err + ran.err + replaced.out + replaced.err
    )
    assert not [text for text in (SECRET, USER, "sk-new") if text in everything]


def test_a_key_with_spaces_goes_through_a_pipe(server: ServerProcess, admin: KeyPool) -> None:
    admin.put_pool("openai", keepalive_seconds=None)
    in_pool = functools.partial(run_command, server, KEYPOOL_POOL="openai")
    for text in ("two words", "id:7 or so", "h:not a handle"):
        assert in_pool("import", "-", "--format=lines", stdin=text).status == 0
        acquired = in_pool("acquire")
        assert acquired.lines[0][0] == text
        assert in_pool("unblock", "-", stdin=acquired.out).fields["done"] == "1"
        assert text not in in_pool("keepalive", "-", "id:99", stdin=f"no {text}\t1\n").err
        assert in_pool("find", "-", stdin=text).fields["hint"] != text
        admin.pool("openai").delete_many([text])


def test_draining_and_rekey(server: ServerProcess, admin: KeyPool) -> None:
    admin.put_pool("openai", keepalive_seconds=None)
    admin.pool("openai").import_key(SECRET)
    refused = run_command(server, "pools", "delete", "openai")
    assert (refused.status, "pool-not-empty" in refused.err) == (Status.FAILED, True)
    with admin.pool("openai").lease():
        assert "1 of them held" in run_command(server, "pools", "delete", "openai", "--drain").out
        assert "pool-draining" in run_command(server, "acquire", "--pool=openai").err
    eventually(lambda: len(admin.pools()) == 1, "the pool to be gone")
    assert run_command(server, "rekey").status == Status.FAILED  # it has no secrets key
