"""What the client sends again after which failure, told by what a real server did and what a bad proxy saw."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from client_support import KINDS, QUICK, Driver, Proxy, clean, unused_port, url_of
from conftest import Start
from support import ServerProcess, eventually

from keypool.client import (
    AnswerLost,
    GatewayError,
    KeyPool,
    KeyPoolError,
    Retry,
    StaleLease,
    UnexpectedAnswer,
    UnknownKey,
    Unreachable,
)
from keypool.client.retry import Attempts
from keypool.client.wire import Answer


@pytest.fixture
def proxy(server: ServerProcess) -> Iterator[Proxy]:
    with Proxy(server) as made:
        yield made
    clean(server)


@pytest.fixture(params=KINDS)
def driver(request: pytest.FixtureRequest, proxy: Proxy) -> Iterator[Driver]:
    with Driver(request.param, proxy.url) as made:
        yield made


Ask = Callable[[Driver, Any], Any]

SAFE: dict[str, Ask] = {
    "get": lambda driver, key: driver.get(key.key),
    "stats": lambda driver, key: driver.stats(),
    "page": lambda driver, key: driver.page(),
    "reveal": lambda driver, key: driver.reveal(key.id),
    "keepalive": lambda driver, key: driver.keepalive(key),
    "keepalive_many": lambda driver, key: driver.keepalive_many([key]),
    "unblock with lease": lambda driver, key: driver.unblock(key),
    "unblock_many with lease": lambda driver, key: driver.unblock_many([key]),
    "delete": lambda driver, key: driver.delete(key),
    "delete_many": lambda driver, key: driver.delete_many([key]),
}
UNSAFE: dict[str, Ask] = {
    "generate": lambda driver, key: driver.generate(),
    "generate_many": lambda driver, key: driver.generate_many(2),
    "acquire": lambda driver, key: driver.acquire(),
    "acquire_many": lambda driver, key: driver.acquire_many(2),
    "unblock": lambda driver, key: driver.unblock(key.key),
    "unblock_many": lambda driver, key: driver.unblock_many([key, key.key]),
}
UNCERTAIN = ("reset", "swallow", "lose", "cut", "502", "503", "504")


def _held(server: ServerProcess) -> Any:
    with KeyPool(url_of(server)) as direct:
        direct.generate_many(3)
        return direct.acquire()


@pytest.mark.parametrize("name", SAFE)
def test_what_is_safe_is_repeated(server: ServerProcess, proxy: Proxy, driver: Driver, name: str) -> None:
    key = _held(server)
    proxy.faults[:] = ["lose"]
    SAFE[name](driver, key)
    assert len(proxy.requests) == 2
    assert proxy.requests[0] == proxy.requests[1]


@pytest.mark.parametrize("fault", UNCERTAIN)
def test_until_it_works(server: ServerProcess, proxy: Proxy, driver: Driver, fault: str) -> None:
    key = _held(server)
    proxy.faults[:] = [fault] * 3
    assert driver.keepalive(key).id == key.id
    assert len(proxy.requests) == 4


@pytest.mark.parametrize("fault", ["lose", "502"])
@pytest.mark.parametrize("name", UNSAFE)
def test_what_is_not_safe_is_never_repeated(
    server: ServerProcess, proxy: Proxy, driver: Driver, name: str, fault: str
) -> None:
    key = _held(server)
    proxy.faults[:] = [fault]
    with pytest.raises(AnswerLost if fault == "lose" else GatewayError) as lost:
        UNSAFE[name](driver, key)
    assert lost.value.may_have_happened
    assert len(proxy.requests) == 1


def test_unblocking_without_a_number_robs_nobody(server: ServerProcess, proxy: Proxy) -> None:
    """The reason: after the lost answer somebody else may hold the key. With its number, a repetition is harmless."""
    with KeyPool(url_of(server)) as direct, KeyPool(proxy.url, retry=QUICK) as pool:
        direct.generate()
        mine = direct.acquire()
        proxy.faults[:] = ["lose"]
        with pytest.raises(AnswerLost):
            pool.unblock(mine.key)
        theirs = direct.acquire()
        assert theirs.key == mine.key
        proxy.faults[:] = ["swallow"]
        with pytest.raises(StaleLease) as stale:
            pool.unblock(mine)
        assert stale.value.repeated
        assert direct.get(mine.key).lease == theirs.lease
        assert direct.unblock(theirs).changed


def test_a_repetition_says_so(server: ServerProcess, proxy: Proxy, driver: Driver) -> None:
    key = _held(server)
    proxy.faults[:] = ["lose"]
    answer = driver.unblock(key)
    assert (answer.changed, answer.repeated) == (False, True)
    proxy.faults[:] = ["lose"]
    gone = driver.delete_many([key])
    assert (gone.done, gone.unknown, gone.repeated) == (0, [key.key], True)
    with pytest.raises(UnknownKey):
        driver.delete(key)


@pytest.mark.parametrize("kind", KINDS)
def test_a_connection_refused_is_tried_again_for_every_call(server: ServerProcess, kind: str) -> None:
    """Somebody listens at last: even generate, which is never repeated once it was sent, gets through, once."""
    port = unused_port()
    failures: list[KeyPoolError] = []

    class Watched(Retry):
        def pause(self, count: int) -> float:
            failures.append(KeyPoolError(str(count)))
            return 0.05

    with (
        contextlib.ExitStack() as stack,
        Driver(kind, f"http://127.0.0.1:{port}", retry=Watched(60)) as driver,
    ):
        before = server.client().stats()["generated"]

        def listen() -> None:
            eventually(lambda: len(failures) >= 3, "some refused connections")
            stack.enter_context(Proxy(server, port))

        thread = threading.Thread(target=listen)
        thread.start()
        driver.generate()
        thread.join()
        assert server.client().stats()["generated"] == before + 1
    clean(server)


@pytest.mark.parametrize("kind", KINDS)
def test_patience_ends(kind: str) -> None:
    patience = Retry(0.2, first=0.01)
    with (
        Driver(kind, f"http://127.0.0.1:{unused_port()}", retry=patience) as driver,
        pytest.raises(Unreachable) as refused,
    ):
        driver.stats()
    assert not refused.value.may_have_happened


def test_no_patience_at_all(proxy: Proxy) -> None:
    proxy.faults[:] = ["503"]
    with KeyPool(proxy.url, retry=Retry(0)) as pool, pytest.raises(GatewayError):
        pool.stats()
    assert len(proxy.requests) == 1


def test_retry_after_is_waited_for(proxy: Proxy, driver: Driver) -> None:
    proxy.faults[:] = ["503 1"]
    began = time.monotonic()
    driver.stats()
    assert time.monotonic() - began >= 0.99
    assert len(proxy.requests) == 2


def test_a_retry_after_beyond_all_patience_ends_it_at_once(proxy: Proxy, driver: Driver) -> None:
    proxy.faults[:] = ["503 3600"]
    with pytest.raises(GatewayError) as refused:
        driver.stats()
    assert refused.value.retry_after == 3600
    assert len(proxy.requests) == 1


def test_a_retry_after_in_the_form_of_a_date(server: ServerProcess) -> None:
    """It counts from the answer's own date, however wrong that clock is."""
    with KeyPool("http://127.0.0.1:1") as pool:
        from keypool.client import calls

        attempts = Attempts(calls.stats(), pool._caller.address, None, 1, Retry(60, first=0.01))
    headers = {"Date": "Tue, 01 Jan 2030 00:00:00 GMT", "retry-after": "Tue, 01 Jan 2030 00:00:30 GMT"}
    assert attempts.answered(Answer(503, headers, b"", 0, 0)) == 30
    for nonsense in ("soon", "-1", "", "9" * 400):
        answer = Answer(503, {"Retry-After": nonsense}, b"", 0, 0)
        with contextlib.suppress(KeyPoolError):  # where it is beyond all patience
            assert (attempts.answered(answer) or 0) < 60


@pytest.mark.parametrize(
    "body", ["garbage", "200 {}", "200 <html>", "200 [1]", "301", "200 " + "[" * 100_000]
)
def test_garbage_is_an_error_and_not_repeated(proxy: Proxy, driver: Driver, body: str) -> None:
    proxy.faults[:] = [body]
    if body == "garbage" and driver.kind == "tornado":
        driver.stats()  # Tornado tells it as a closed connection, after which a safe call is sent again
        return
    with pytest.raises(UnexpectedAnswer) as wrong:
        driver.stats()
    assert "URL" in str(wrong.value)
    assert len(proxy.requests) == 1


def test_a_silent_server_is_left(server: ServerProcess, proxy: Proxy) -> None:
    for kind in KINDS:
        proxy.faults[:] = ["mute", "mute"]
        with Driver(kind, proxy.url, timeout=0.3, retry=Retry(0)) as driver:
            with pytest.raises(AnswerLost, match="in time"):
                driver.generate()
            with pytest.raises(AnswerLost, match="in time"):
                driver.stats()


def test_draining_is_no_reason_to_stop_waiting(start_server: Start) -> None:
    """A waiter who is told that the server stops has been leased nothing: it asks the next server."""
    port = unused_port()
    with KeyPool(f"http://127.0.0.1:{port}", retry=Retry(60, most=0.1)) as pool:
        first = start_server(f"--port={port}")
        got: list[str] = []
        thread = threading.Thread(target=lambda: got.append(pool.acquire(wait=60).key))
        thread.start()
        with KeyPool(f"http://127.0.0.1:{port}") as other:
            eventually(lambda: other.stats().waiting == 1, "a waiter")
        first.finish()
        second = start_server(f"--port={port}")
        made = second.client().make()
        thread.join(60)
        assert got == [made["key"]]


def test_a_connection_that_the_server_closed_is_noticed(start_server: Start) -> None:
    """Keep-alive over a restart: the end of the old connection is seen before a call is entrusted to it."""
    port = unused_port()
    with KeyPool(f"http://127.0.0.1:{port}", retry=Retry(0)) as pool:
        first = start_server(f"--port={port}")
        pool.generate()
        first.finish()
        start_server(f"--port={port}")
        pool.generate()
        assert pool.stats().generated == 1


def test_connections_are_kept(server: ServerProcess) -> None:
    with KeyPool(url_of(server)) as pool:
        for _ in range(3):
            pool.stats()
        [connection] = pool._caller._transport._idle
        pool.stats()
        assert pool._caller._transport._idle == [connection]


def test_pauses_grow_and_differ() -> None:
    retry = Retry(first=0.1, most=2.0)
    for failures, whole in ((1, 0.1), (2, 0.2), (5, 1.6), (6, 2.0), (10_000, 2.0)):
        pauses = {retry.pause(failures) for _ in range(50)}
        assert len(pauses) > 10
        assert all(whole / 2 <= pause <= whole for pause in pauses)
