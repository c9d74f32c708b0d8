"""Every call of both clients against the real server, the shape of the results, and the arguments of a client."""

from __future__ import annotations

import inspect
import logging
import pickle
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import client_support as support
import pytest
from client_support import KINDS, Driver, clean, url_of
from conftest import Start
from support import ADMIN_TOKEN, CLIENT_TOKEN, ROOT, VIEWER_TOKEN, ServerProcess

from keypool import client
from keypool.client import (
    AsyncKeyPool,
    BadRequest,
    Forbidden,
    KeyPool,
    KeyPoolError,
    NoKeyAvailable,
    NotFound,
    Outcome,
    PoolClosed,
    PoolFull,
    Refused,
    StaleLease,
    State,
    Unauthorized,
    UnknownKey,
    Unreachable,
)
from keypool.client import errors as client_errors
from keypool.client.answers import Row, read
from keypool.core import errors as server_errors


@pytest.fixture(params=KINDS)
def pool(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[Driver]:
    with Driver(request.param, url_of(server)) as driver:
        yield driver
    clean(server)


def test_the_life_of_a_key(pool: Driver) -> None:
    made = pool.generate()
    assert made.state == "available"
    assert 290 < made.expires_in <= 300
    served = pool.acquire(owner="me")
    assert (served.secret, served.id) == (made.secret, made.id)
    assert 0 < served.release_in <= 60
    row = pool.get(made.secret)
    assert (row.state, row.owner, row.lease, row.hint) == ("blocked", "me", served.lease, made.hint)
    assert row.state is State.BLOCKED
    assert timedelta(0) <= datetime.now(UTC) - row.created_at < timedelta(minutes=5)
    assert 290 < pool.keepalive(made).expires_in <= 300
    with pytest.raises(StaleLease) as stale:
        pool.unblock(made.secret, served.lease + 1)
    assert "never given" in stale.value.detail
    assert stale.value.status == 409
    assert pool.unblock(served).changed is True  # a LeasedKey brings its number along
    assert pool.unblock(served).changed is False
    assert pool.unblock(made.secret).changed is False
    assert pool.reveal(made.id).secret == made.secret
    pool.delete(made)
    with pytest.raises(UnknownKey):
        pool.get(made.secret)
    with pytest.raises(UnknownKey):
        pool.delete(made.secret)


def test_the_owner_is_the_process_by_default(pool: Driver) -> None:
    import os
    import socket

    pool.generate()
    pool.acquire()
    assert [row.owner for row in pool.rows()] == [f"{socket.gethostname()}:{os.getpid()}"]


def test_no_key_available(pool: Driver) -> None:
    with pytest.raises(NoKeyAvailable) as refused:
        pool.acquire()
    assert refused.value.retry_after is None
    with pytest.raises(NoKeyAvailable):
        pool.acquire(wait=0.05)
    pool.generate()
    pool.acquire()
    with pytest.raises(NoKeyAvailable) as refused:
        pool.acquire()
    assert refused.value.retry_after is not None
    assert 0 < refused.value.retry_after <= 60


def test_ids_name_keys_too(pool: Driver) -> None:
    made = pool.generate()
    assert pool.get(made.id).id == made.id
    assert pool.keepalive(made.id).id == made.id
    assert pool.keepalive_many([made.id, made]).done == 2
    pool.delete(made.id)


def test_batches_of_any_size(pool: Driver) -> None:
    counts: list[int] = []
    made = pool.generate_many(2100, progress=counts.append)
    assert counts == [1000, 2000, 2100]
    assert len({key.secret for key in made}) == 2100
    assert pool.keepalive_many(made).done == 2100
    assert {row.id for row in pool.rows()} == {key.id for key in made}
    served = pool.wait(pool.pool.acquire_many(5, owner="five"))
    assert len(served) == 5
    assert pool.unblock_many([served[0], (served[1].secret, 999_999), "nobody", served[2].secret]).done == 2
    done = pool.unblock_many([(served[1], 999_999), "nobody"])
    assert (done.done, done.unknown, done.stale) == (0, ["nobody"], [served[1].secret])
    gone = pool.delete_many([*made, "nobody"], progress=counts.append)
    assert (gone.done, gone.unknown) == (2100, ["nobody"])
    assert counts[3:] == [1000, 2000, 2101]
    with pytest.raises(NoKeyAvailable):
        pool.wait(pool.pool.acquire_many(3))
    pool.generate_many(1000)
    assert len(pool.wait(pool.pool.acquire_many(1500))) == 1000
    with pytest.raises(ValueError, match="at least 1"):
        pool.generate_many(0)


def test_pages(pool: Driver) -> None:
    made = pool.generate_many(7)
    served = pool.wait(pool.pool.acquire_many(2))
    page = pool.page(limit=3)
    assert len(page.keys) == 3
    assert page.next
    assert {row.id for row in pool.rows(state="blocked")} == {key.id for key in served}
    assert {row.id for row in pool.rows(state=State.BLOCKED)} == {key.id for key in served}
    assert [row.id for row in pool.rows(order="release")] == [key.id for key in served]
    assert made[0].id in {row.id for row in pool.rows(prefix=made[0].secret[:3])}
    with pytest.raises(BadRequest) as refused:
        pool.page(order="nonsense")
    assert "order" in refused.value.detail


def test_keys_may_be_any_text(pool: Driver) -> None:
    for text in ("a/b", "ü?x=1#y", "..", ".", "%2e", "id:", "x" * 500):
        with pytest.raises(UnknownKey):
            pool.get(text)
        assert pool.keepalive_many([text]).unknown == [text]
    with pytest.raises(ValueError, match="not empty"):
        pool.get("")


def test_no_secret_is_ever_shown(pool: Driver, caplog: pytest.LogCaptureFixture) -> None:
    """Neither by repr, str or format, nor in a log, be it one of httpx2's at its most talkative."""
    caplog.set_level(logging.DEBUG)
    made = pool.generate()
    shown: list[object] = [made, pool.acquire(), pool.reveal(made), pool.unblock_many([made]), pool.get(made)]
    pool.keepalive(made)
    with pool.lease() as key:
        shown += [key, pool.pool]
        assert key.secret == made.secret
    pool.delete(made)
    for each in shown:
        assert made.secret not in f"{each!r} {each!s} {each}"
    assert made.secret not in caplog.text


def test_a_row_of_a_newer_server() -> None:
    row = {"id": 1, "hint": "…", "state": "resting", "outcome": "bored", "owner": None, "lease": None, "news": 1,
           "created_at": "2030-01-01T00:00:00.000Z", "expires_in": 1, "release_in": None}  # fmt: skip
    answer = read(Row, row)
    assert (answer.state, answer.outcome, answer.failures) == ("resting", "bored", 0)
    assert isinstance(answer.state, State)
    assert isinstance(answer.outcome, Outcome)
    assert answer.created_at == datetime(2030, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_roles(guarded_server: ServerProcess, kind: str) -> None:
    url = url_of(guarded_server)
    for token in (None, "wrong-token-0123456789"):
        with Driver(kind, url, token) as nobody, pytest.raises(Unauthorized):
            nobody.acquire()
    with Driver(kind, url, ADMIN_TOKEN) as admin, Driver(kind, url, CLIENT_TOKEN) as worker:
        made = admin.generate()
        assert worker.acquire().secret == made.secret
        with pytest.raises(Forbidden) as refused:
            worker.generate()
        assert "admin" in refused.value.detail
        with pytest.raises(Forbidden):
            worker.delete_many([made])
    with Driver(kind, url, VIEWER_TOKEN) as viewer:
        assert viewer.stats().total == 1
        with pytest.raises(Forbidden):
            viewer.acquire()
    clean(guarded_server, ADMIN_TOKEN)


def test_a_full_pool_keeps_what_was_made(start_server: Start) -> None:
    server = start_server("--max-keys=1500")
    with KeyPool(url_of(server)) as pool:
        with pytest.raises(PoolFull) as full:
            pool.generate_many(2000)
        assert len(full.value.partial) == 1000
        assert pool.stats().total == 1000


# -------------------------------------------------------------------------------------------------- arguments


def test_a_wrong_url() -> None:
    wrong = (
        "localhost:8888",
        "ftp://x",
        "http://",
        "http://me:secret@host",
        "http://host?x=1",
        "http://host:x",
    )
    for url in wrong:
        with pytest.raises(ValueError, match=r"URL"):
            KeyPool(url)
    with pytest.raises(ValueError, match="token") as refused:
        KeyPool(token="two words\r\nX: y")
    assert "two words" not in str(refused.value)


@pytest.mark.parametrize("more", ["", "/", "/api/v1", "/api/v1/"])
def test_a_url_may_have_the_base_path(server: ServerProcess, more: str) -> None:
    with KeyPool(url_of(server) + more) as pool:
        assert pool.stats().total == 0
        assert repr(pool) == f"KeyPool({url_of(server)!r})"


def test_arguments_from_the_environment(
    guarded_server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "token").write_text(VIEWER_TOKEN + "\n")
    by_file = {"KEYPOOL_URL": url_of(guarded_server), "KEYPOOL_TOKEN_FILE": "~/token"}
    with KeyPool.from_env(by_file, timeout=60) as pool:
        assert pool.stats().total == 0
    with KeyPool.from_env(by_file | {"KEYPOOL_TOKEN": CLIENT_TOKEN}) as pool, pytest.raises(Forbidden):
        pool.stats()
    monkeypatch.setenv("KEYPOOL_URL", "http://elsewhere:1/api/v1/")
    assert repr(AsyncKeyPool.from_env()) == "AsyncKeyPool('http://elsewhere:1')"
    for path in ("~/none", str(tmp_path)):
        with pytest.raises(ValueError, match="KEYPOOL_TOKEN_FILE"):
            KeyPool.from_env({"KEYPOOL_TOKEN_FILE": path})


@pytest.mark.parametrize("kind", KINDS)
def test_servers_that_are_not_there(server: ServerProcess, kind: str) -> None:
    with Driver(kind, url_of(server) + "/elsewhere/") as driver, pytest.raises(NotFound):
        driver.stats()
    with Driver(kind, "http://keypool.invalid:1") as driver, pytest.raises(Unreachable) as refused:
        driver.stats()
    assert refused.value.may_have_happened is False


@pytest.mark.parametrize("kind", KINDS)
def test_closed_is_closed(server: ServerProcess, kind: str) -> None:
    driver = Driver(kind, url_of(server))
    driver.stats()
    driver.wait(driver.pool.close())
    with pytest.raises(PoolClosed):
        driver.stats()
    driver.close()


# ------------------------------------------------------------------------------------------------------- errors


def _below(kind: type[Any]) -> Iterator[type[Any]]:
    for each in kind.__subclasses__():
        yield each
        yield from _below(each)


def test_every_code_has_its_class() -> None:
    codes = {server_errors.KeypoolError.code} | {kind.code for kind in _below(server_errors.KeypoolError)}
    assert codes <= set(client_errors.BY_CODE)
    for code, kind in client_errors.BY_CODE.items():
        assert kind.__name__ == "".join(word.capitalize() for word in code.split("-"))
        assert kind.__name__ in client.__all__


def test_an_unknown_code_is_refused_all_the_same() -> None:
    body = b'{"type":"urn:keypool:problem:new","code":"new","title":"N","status":418,"detail":"d","request_id":"r"}'
    error = client_errors.from_answer(418, body)
    assert type(error) is Refused
    assert (error.code, error.detail, error.request_id) == ("new", "d", "r")


def test_errors_survive_pickling() -> None:
    kinds: list[type[KeyPoolError]] = [KeyPoolError, *_below(KeyPoolError)]
    for kind in kinds:
        error = kind("what happened")
        error.retry_after = 1.5
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), copy.retry_after) == (kind, str(error), 1.5)


# ------------------------------------------------------------------------------------------------------ packaging


def test_the_blocking_client_imports_neither_the_server_nor_asyncio() -> None:
    code = "import sys, keypool.client, keypool.cli.main, keypool.cli.keys; print(*sorted(sys.modules))"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=support.environment(), check=True
    )
    tops = {name.partition(".")[0] for name in ran.stdout.split()}
    assert tops.isdisjoint({"tornado", "msgspec", "uvloop", "aiohttp", "sortedcontainers", "asyncio"}), tops


def test_the_guide_names_every_call() -> None:
    guide = (ROOT / "docs" / "client.md").read_text(encoding="utf-8")
    for name in vars(KeyPool):
        if not name.startswith("_"):
            assert f"{name}(" in guide, f"{name} is not in docs/client.md"
    names = [kind.__name__ for kind in KeyPoolError.__subclasses__()]
    names += ["KeyPoolError", "Retry", "exit_on_sigterm"]
    assert [name for name in names if name not in guide] == []


def test_both_clients_have_the_same_calls() -> None:
    for name, made in inspect.getmembers(KeyPool, callable):
        if not name.startswith("_"):
            other = inspect.signature(getattr(AsyncKeyPool, name)).parameters
            assert list(other) == list(inspect.signature(made).parameters), name
