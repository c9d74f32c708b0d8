"""Every call of the client, of all three kinds, against the real server; and the shape of what comes back."""

from __future__ import annotations

import ast
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import client_support as support
import pytest
from client_support import KINDS, Driver, clean, url_of
from conftest import Start
from support import ADMIN_TOKEN, CLIENT_TOKEN, ROOT, VIEWER_TOKEN, ServerProcess

from keypool.client import (
    BadRequest,
    Forbidden,
    KeyPool,
    KeyPoolError,
    NoKeyAvailable,
    NotFound,
    PoolClosed,
    PoolFull,
    Refused,
    StaleLease,
    Unauthorized,
    UnknownKey,
    Unreachable,
)
from keypool.client import errors as client_errors
from keypool.core import errors as server_errors


@pytest.fixture(params=KINDS)
def pool(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[Driver]:
    with Driver(request.param, url_of(server)) as driver:
        yield driver
    clean(server)


def test_the_life_of_a_key(pool: Driver) -> None:
    made = pool.generate()
    assert (made.state, made.expires_in) == ("available", 300.0)
    served = pool.acquire(owner="me")
    assert (served.key, served.id) == (made.key, made.id)
    assert 0 < served.release_in <= 60
    row = pool.get(made.key)
    assert (row.state, row.owner, row.lease, row.hint) == ("blocked", "me", served.lease, made.hint)
    assert pool.keepalive(made).expires_in == 300.0
    with pytest.raises(StaleLease) as stale:
        pool.unblock(made.key, served.lease + 1)
    assert "never given" in stale.value.detail
    assert stale.value.status == 409
    assert pool.unblock(served).changed is True  # a LeasedKey brings its number along
    assert pool.unblock(served).changed is False
    assert pool.unblock(made.key).changed is False
    assert pool.reveal(made.id).key == made.key
    pool.delete(made)
    with pytest.raises(UnknownKey):
        pool.get(made.key)
    with pytest.raises(UnknownKey):
        pool.delete(made.key)


def test_nothing_to_be_had(pool: Driver) -> None:
    with pytest.raises(NoKeyAvailable) as refused:
        pool.acquire()
    assert refused.value.retry_after is None
    pool.generate()
    pool.acquire()
    with pytest.raises(NoKeyAvailable) as refused:
        pool.acquire()
    assert refused.value.retry_after is not None
    assert 0 < refused.value.retry_after <= 60


def test_waiting_ends_by_itself(pool: Driver) -> None:
    with pytest.raises(NoKeyAvailable):
        pool.acquire(wait=0.05)


def test_ids_name_keys_too(pool: Driver) -> None:
    made = pool.generate()
    assert pool.get(made.id).id == made.id
    assert pool.keepalive(made.id).id == made.id
    assert pool.keepalive_many([made.id, made]).done == 2
    pool.delete(made.id)


def test_batches_of_any_size(pool: Driver) -> None:
    told: list[int] = []
    made = pool.generate_many(2100, progress=told.append)
    assert told == [1000, 2000, 2100]
    assert len({key.key for key in made}) == 2100
    assert pool.stats().total == 2100
    assert pool.keepalive_many(made).done == 2100
    assert {row.id for row in pool.rows()} == {key.id for key in made}
    served = pool.acquire_many(5, owner="five")
    assert len(served) == 5
    assert pool.unblock_many([served[0], (served[1].key, 999_999), "nobody", served[2].key]).done == 2
    done = pool.unblock_many([(served[1], 999_999), "nobody"])
    assert (done.done, done.unknown, done.stale) == (0, ["nobody"], [served[1].key])
    gone = pool.delete_many([*made, "nobody"], progress=told.append)
    assert (gone.done, gone.unknown) == (2100, ["nobody"])
    assert told[3:] == [1000, 2000, 2101]


def test_a_batch_takes_what_there_is(pool: Driver) -> None:
    with pytest.raises(NoKeyAvailable):
        pool.acquire_many(3)
    pool.generate_many(1000)
    assert len(pool.acquire_many(1500)) == 1000
    with pytest.raises(ValueError, match="at least 1"):
        pool.generate_many(0)


def test_pages(pool: Driver) -> None:
    made = pool.generate_many(7)
    served = pool.acquire_many(2)
    page = pool.page(limit=3)
    assert len(page.keys) == 3
    assert page.next
    assert {row.id for row in pool.rows(state="blocked")} == {key.id for key in served}
    assert [row.id for row in pool.rows(order="release")] == [key.id for key in served]
    assert made[0].id in {row.id for row in pool.rows(prefix=made[0].key[:3])}
    with pytest.raises(BadRequest) as refused:
        pool.page(order="nonsense")
    assert "order" in refused.value.detail


def test_keys_may_be_any_text(pool: Driver) -> None:
    for text in ("a/b", "ü?x=1#y", "..", "%2e", "id:", "x" * 500):
        with pytest.raises(UnknownKey):
            pool.get(text)
        assert pool.keepalive_many([text]).unknown == [text]
    with pytest.raises(ValueError, match="not empty"):
        pool.get("")


def test_no_key_in_a_repr(pool: Driver) -> None:
    made = pool.generate()
    for shown in (made, pool.acquire(), pool.reveal(made), pool.unblock_many([made]), pool.get(made)):
        assert made.key not in repr(shown)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_roles(guarded_server: ServerProcess, kind: str) -> None:
    url = url_of(guarded_server)
    with Driver(kind, url) as nobody, pytest.raises(Unauthorized):
        nobody.acquire()
    with Driver(kind, url, "wrong-token-0123456789") as wrong, pytest.raises(Unauthorized):
        wrong.acquire()
    with Driver(kind, url, ADMIN_TOKEN) as admin, Driver(kind, url, CLIENT_TOKEN) as client:
        made = admin.generate()
        assert client.acquire().key == made.key
        with pytest.raises(Forbidden) as refused:
            client.generate()
        assert "admin" in refused.value.detail
        with pytest.raises(Forbidden):
            client.delete_many([made])
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


def test_a_wrong_url() -> None:
    for url in ("localhost:8888", "ftp://x", "http://", "http://me:secret@host", "http://host?x=1"):
        with pytest.raises(ValueError, match=r"URL"):
            KeyPool(url)
    with pytest.raises(ValueError, match="token") as refused:
        KeyPool(token="two words\r\nX: y")
    assert "two words" not in str(refused.value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_wrong_path_of_the_right_server(server: ServerProcess, kind: str) -> None:
    with Driver(kind, url_of(server) + "/elsewhere/") as driver, pytest.raises(NotFound):
        driver.stats()


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_does_not_exist(kind: str) -> None:
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


def _codes_of_contract() -> set[str]:
    """Every code of the server; those of the contract that it doesn't have yet are in the client's list as well."""
    found: set[str] = set()
    kinds: list[type[server_errors.KeypoolError]] = [server_errors.KeypoolError]
    while kinds:
        kind = kinds.pop()
        kinds.extend(kind.__subclasses__())
        found.add(kind.code)
    return found


def test_every_code_has_its_class() -> None:
    assert _codes_of_contract() <= set(client_errors.BY_CODE)
    for code, kind in client_errors.BY_CODE.items():
        words = "".join(word.capitalize() for word in code.split("-"))
        assert kind.__name__ == words


def test_an_unknown_code_is_refused_all_the_same() -> None:
    body = b'{"type":"urn:keypool:problem:new","code":"new","title":"N","status":418,"detail":"d","request_id":"r"}'
    error = client_errors.from_answer(418, body)
    assert type(error) is Refused
    assert (error.code, error.detail, error.request_id) == ("new", "d", "r")


def test_errors_survive_pickling() -> None:
    kinds: list[type[KeyPoolError]] = [KeyPoolError, *_all_errors(KeyPoolError)]
    for kind in kinds:
        error = kind("what happened")
        error.retry_after = 1.5
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), copy.retry_after) == (kind, str(error), 1.5)


def _all_errors(kind: type[KeyPoolError]) -> Iterator[type[KeyPoolError]]:
    for each in kind.__subclasses__():
        yield each
        yield from _all_errors(each)


# ------------------------------------------------------------------------------------------------------ packaging


def test_the_synchronous_client_imports_the_standard_library_only() -> None:
    code = "import sys, keypool.client, keypool.cli.main, keypool.cli.keys; print(*sorted(sys.modules))"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=support.environment(), check=True
    )
    tops = {name.partition(".")[0] for name in ran.stdout.split()}
    assert tops.isdisjoint({"tornado", "msgspec", "uvloop", "aiohttp", "sortedcontainers", "asyncio"}), tops


def test_no_module_of_the_client_imports_the_server() -> None:
    for folder in ("client", "cli"):
        for path in (ROOT / "keypool" / folder).glob("*.py"):
            for module in _imported(path):
                if path.name == "words.py" and module == "keypool":
                    continue  # the version
                assert not re.match(r"keypool(?!\.(client|cli|pdeathsig|early_exit)\b)", module), (
                    f"{path}: {module}"
                )


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_the_guide_names_every_call() -> None:
    """docs/client.md: every public method and every exported error stands in it or in the tree that it points to."""
    guide = (ROOT / "docs" / "client.md").read_text(encoding="utf-8")
    for name in vars(KeyPool):
        if not name.startswith("_"):
            assert f"{name}(" in guide, f"{name} is not in docs/client.md"
    for name in (
        "KeyPoolError",
        "Refused",
        "Unreachable",
        "AnswerLost",
        "UnexpectedAnswer",
        "LeaseLost",
        "Retry",
    ):
        assert name in guide


def test_both_clients_have_the_same_calls() -> None:
    """A call, and its arguments, are added to both or to none."""
    import inspect

    from keypool.client import AsyncKeyPool

    for name, made in vars(KeyPool).items():
        if not name.startswith("_"):
            other = inspect.signature(getattr(AsyncKeyPool, name)).parameters
            assert list(other) == list(inspect.signature(made).parameters), name
