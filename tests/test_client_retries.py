"""What the client sends again after which failure, seen in a real server and a faulty proxy."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from client_support import KINDS, QUICK, Driver, Proxy, clean, url_of
from conftest import Start
from support import ServerProcess, eventually
from valkeys import held_port

from keypool.client import (
    AnswerLost,
    AsyncKeyPool,
    GatewayError,
    KeyPool,
    NoKeyAvailable,
    PoolClosed,
    Retry,
    StaleLease,
    UnexpectedAnswer,
    UnknownKey,
    Unreachable,
    calls,
)
from keypool.client.attempts import Answer, Pause, Send, perform
from keypool.client.settings import Settings


@pytest.fixture
def proxy(server: ServerProcess) -> Iterator[Proxy]:
    with Proxy(server) as made:
        yield made
    clean(server)


@pytest.fixture
def port() -> Iterator[int]:
    """One on which nobody listens but whom the test starts there."""
    with held_port() as port:
        yield port


@pytest.fixture(params=KINDS)
def driver(request: pytest.FixtureRequest, proxy: Proxy) -> Iterator[Driver]:
    with Driver(request.param, proxy.url) as made:
        yield made


Ask = Callable[[Driver, Any], Any]

SAFE: dict[str, Ask] = {
    "get": lambda driver, key: driver.get(key.secret),
    "stats": lambda driver, key: driver.stats(),
    "page": lambda driver, key: driver.page(),
    "reveal": lambda driver, key: driver.reveal(key.id),
    "keepalive": lambda driver, key: driver.keepalive(key),
    "keepalive_many": lambda driver, key: driver.keepalive_many([key]),
    "unblock with lease": lambda driver, key: driver.unblock(key),
    "unblock_many with lease": lambda driver, key: driver.unblock_many([key]),
    "delete": lambda driver, key: driver.delete(key),
    "delete_many": lambda driver, key: driver.delete_many([key]),
    "acquire": lambda driver, key: driver.acquire(),
    "acquire_many": lambda driver, key: driver.wait(_many(driver)),
    "quarantine": lambda driver, key: driver.quarantine(key),
    "restore": lambda driver, key: driver.restore(key),
    "quarantine_many": lambda driver, key: driver.quarantine_many([key]),
    "restore_many": lambda driver, key: driver.restore_many([key]),
    "acquire that waits": lambda driver, key: driver.acquire(wait=5),
    "acquire without end": lambda driver, key: driver.acquire(wait=None),
}
UNSAFE: dict[str, Ask] = {
    "generate": lambda driver, key: driver.generate(),
    "generate_many": lambda driver, key: driver.generate_many(2),
    "unblock": lambda driver, key: driver.unblock(key.secret),
    "unblock_many": lambda driver, key: driver.unblock_many([key, key.secret]),
}
UNCERTAIN = ("reset", "swallow", "lose", "cut", "502", "503", "504")


def _many(driver: Driver) -> Any:
    return driver.pool.acquire_many(2)


def _held(server: ServerProcess) -> Any:
    with KeyPool(url_of(server)) as direct:
        direct.generate_many(3)
        return direct.acquire()


@pytest.mark.parametrize("name", SAFE)
def test_safe_calls_are_repeated(server: ServerProcess, proxy: Proxy, driver: Driver, name: str) -> None:
    key = _held(server)
    proxy.faults[:] = ["lose"]
    SAFE[name](driver, key)
    assert len(proxy.requests) == 2
    assert proxy.requests[0] == proxy.requests[1]


@pytest.mark.parametrize("fault", UNCERTAIN)
def test_until_they_succeed(server: ServerProcess, proxy: Proxy, driver: Driver, fault: str) -> None:
    key = _held(server)
    proxy.faults[:] = [fault] * 3
    assert driver.keepalive(key).id == key.id
    assert len(proxy.requests) == 4


@pytest.mark.parametrize("fault", ["lose", "502"])
@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_calls_are_never_repeated(
    server: ServerProcess, proxy: Proxy, driver: Driver, name: str, fault: str
) -> None:
    key = _held(server)
    proxy.faults[:] = [fault]
    with pytest.raises(AnswerLost if fault == "lose" else GatewayError) as lost:
        UNSAFE[name](driver, key)
    assert lost.value.may_have_happened
    assert len(proxy.requests) == 1


def test_why_an_unblock_without_a_number_is_not_repeated(server: ServerProcess, proxy: Proxy) -> None:
    """After the lost answer someone else may hold the key. With its number, a repetition is harmless."""
    with KeyPool(url_of(server)) as direct, KeyPool(proxy.url, retry=QUICK) as pool:
        direct.generate()
        mine = direct.acquire()
        proxy.faults[:] = ["lose"]
        with pytest.raises(AnswerLost):
            pool.unblock(mine.secret)
        theirs = direct.acquire()
        assert theirs.secret == mine.secret
        proxy.faults[:] = ["swallow"]
        with pytest.raises(StaleLease) as stale:
            pool.unblock(mine)
        assert stale.value.repeated
        assert direct.get(mine.secret).lease == theirs.lease
        assert direct.unblock(theirs).changed


def test_the_result_of_a_repetition_is_marked(server: ServerProcess, proxy: Proxy, driver: Driver) -> None:
    key = _held(server)
    proxy.faults[:] = ["lose"]
    answer = driver.unblock(key)
    assert (answer.changed, answer.repeated) == (False, True)
    proxy.faults[:] = ["lose"]
    gone = driver.delete_many([key])
    assert (gone.done, gone.unknown, gone.repeated) == (0, [key.secret], True)
    with pytest.raises(UnknownKey):
        driver.delete(key)


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_connection_is_tried_again_for_every_call(
    server: ServerProcess, port: int, kind: str
) -> None:
    """When a server listens at last, even generate gets through, once."""
    before = server.client().stats()["generated"]
    with (
        contextlib.ExitStack() as stack,
        Driver(kind, f"http://127.0.0.1:{port}", timeout=60, retry=Retry(60, 0.05, 0.05)) as driver,
    ):
        timer = threading.Timer(0.5, lambda: stack.enter_context(Proxy(server, port)))
        timer.start()
        driver.generate()
        timer.join()
    assert server.client().stats()["generated"] == before + 1
    clean(server)


# -------------------------------------------------------------------------------------------------- limits of time


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("retry", [Retry(0.2, first=0.01), 0, 2])
def test_retries_end(port: int, kind: str, retry: Retry | int) -> None:
    with (
        Driver(kind, f"http://127.0.0.1:{port}", retry=retry) as driver,
        pytest.raises(Unreachable) as refused,
    ):
        driver.stats()
    assert not refused.value.may_have_happened


@pytest.mark.parametrize(("retry", "requests"), [(0, 1), (Retry(0), 1), (2, 3)])
def test_a_number_of_retries(proxy: Proxy, retry: Retry | int, requests: int) -> None:
    proxy.faults[:] = ["503"] * 5
    with KeyPool(proxy.url, retry=retry) as pool, pytest.raises(GatewayError):
        pool.stats()
    assert len(proxy.requests) == requests


@pytest.mark.parametrize("kind", KINDS)
def test_the_timeout_bounds_a_call_with_all_its_retries(
    server: ServerProcess, proxy: Proxy, kind: str
) -> None:
    """Against a silent server, one that sends a byte now and then, and one that refuses again and again."""
    with Driver(kind, proxy.url, timeout=0.5) as driver:
        for faults in (["mute"] * 9, ["trickle"] * 9, ["503"] * 999):
            took = [99.0]
            while took[-1] >= 1.5 and len(took) < 9:  # again if the machine stood still meanwhile
                proxy.faults[:] = faults
                began = time.monotonic()
                with pytest.raises((AnswerLost, GatewayError, Unreachable)) as failed:
                    driver.stats()
                took.append(time.monotonic() - began)
                if failed.type is Unreachable:  # not even the connection was there in time
                    took[-1] = 99.0
            assert took[-1] < 1.5, took


@pytest.fixture
def dead_host() -> Iterator[str]:
    """The URL of one: a full listen queue swallows connections as a dead host does."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_host_that_does_not_answer_is_unreachable_in_time(kind: str, dead_host: str) -> None:
    with Driver(kind, dead_host, timeout=0.5) as driver, pytest.raises(Unreachable) as refused:
        driver.generate()
    assert not refused.value.may_have_happened


def test_a_busy_loop_still_tells_a_dead_host_from_a_lost_answer(dead_host: str) -> None:
    """Both the connection's limit and the call's have passed when the loop looks at its timers again."""

    async def generate() -> None:
        async with AsyncKeyPool(dead_host, timeout=0.2, retry=0) as pool:
            asyncio.get_running_loop().call_later(0.1, time.sleep, 0.5)
            await pool.generate()

    with pytest.raises(Unreachable) as refused:
        asyncio.run(generate())
    assert not refused.value.may_have_happened


@pytest.mark.parametrize(
    "options",
    [{"timeout": 0}, {"timeout": -1}, {"timeout": math.nan}, {"retry": -1}, {"retry": 1.5}, {"retry": True}],
)
def test_limits_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        KeyPool(**options)


@pytest.mark.parametrize("wait", [-1, math.inf, math.nan])
def test_waits_that_make_no_sense(wait: float) -> None:
    with KeyPool() as pool:
        with pytest.raises(ValueError, match="wait"):
            pool.acquire(wait=wait)
        with pytest.raises(ValueError, match="wait"), pool.lease(wait=wait):
            pass


def test_retry_after_is_waited_for(proxy: Proxy, driver: Driver) -> None:
    proxy.faults[:] = ["503 1"]
    began = time.monotonic()
    driver.stats()
    assert time.monotonic() - began >= 0.99
    assert len(proxy.requests) == 2


def test_a_retry_after_beyond_all_limits_ends_the_call_at_once(proxy: Proxy, driver: Driver) -> None:
    proxy.faults[:] = ["503 3600"]
    with pytest.raises(GatewayError) as refused:
        driver.stats()
    assert refused.value.retry_after == 3600
    assert len(proxy.requests) == 1


@pytest.mark.parametrize(
    "body", ["garbage", "200 {}", "200 <html>", "200 [1]", "301", "200 " + "[" * 100_000]
)
def test_garbage_is_an_error_and_not_repeated(proxy: Proxy, driver: Driver, body: str) -> None:
    proxy.faults[:] = [body]
    with pytest.raises(UnexpectedAnswer) as wrong:
        driver.stats()
    assert "URL" in str(wrong.value)
    assert len(proxy.requests) == 1


# -------------------------------------------------------------------------------------------- the rules by themselves


def _steps(**options: Any) -> Any:
    return perform(calls.stats(), Settings.of(**options))


def test_a_retry_after_that_is_a_date() -> None:
    """It counts from the answer's own date, however wrong that clock is."""
    steps = _steps(timeout=100, retry=Retry(100, first=0.01))
    next(steps)
    headers = {"date": "Tue, 01 Jan 2030 00:00:00 GMT", "retry-after": "Tue, 01 Jan 2030 00:00:30 GMT"}
    assert steps.send(Answer(503, headers, b"")) == Pause(30)
    for nonsense in ("soon", "-1", ""):
        assert isinstance(steps.send(None), Send)
        assert steps.send(Answer(503, {"retry-after": nonsense}, b"")).seconds < 60


def test_pauses_grow_and_differ() -> None:
    retry = Retry(first=0.1, most=2.0)
    for failures, whole in ((1, 0.1), (2, 0.2), (5, 1.6), (6, 2.0), (10_000, 2.0)):
        pauses = {retry.pause(failures) for _ in range(50)}
        assert len(pauses) > 10
        assert all(whole / 2 <= pause <= whole for pause in pauses)


def test_a_wait_of_more_than_a_minute_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("keypool.client.attempts.now", lambda: clock[0])
    problem = {
        "type": "urn:keypool:problem:x",
        "code": "no-key-available",
        "detail": "none",
        "retry_after": 5,
    }
    steps = perform(calls.acquire("me", 150), Settings.of(timeout=2))
    waits = []
    send = next(steps)
    with pytest.raises(NoKeyAvailable):  # noqa: PT012 - any of the steps
        while True:
            assert isinstance(send, Send)
            waits.append((json.loads(send.body or b"")["wait"], send.timeout))
            clock[0] += waits[-1][0]
            send = steps.send(Answer(404, {}, json.dumps(problem).encode()))
    assert waits == [(50, 52)] * 3


# ----------------------------------------------------------------------------------------------- outages


@pytest.mark.parametrize("how", ["stop", "kill"])
@pytest.mark.parametrize("wait", [60, None])
def test_waiting_survives_the_end_of_the_server(
    start_server: Start, port: int, how: str, wait: float | None
) -> None:
    with KeyPool(f"http://127.0.0.1:{port}", retry=Retry(60, most=0.1)) as pool:
        first = start_server(f"--port={port}")
        got: list[str] = []
        thread = threading.Thread(target=lambda: got.append(pool.acquire(wait=wait).secret))
        thread.start()
        eventually(lambda: first.client().stats()["waiting"] == 1, "a waiter")
        if how == "kill":
            first.signal(signal.SIGKILL)
            first.wait()
        else:
            first.finish()
        second = start_server(f"--port={port}")
        made = second.client().make()
        thread.join(60)
        assert got == [made["key"]]


@pytest.mark.parametrize("away", [False, True], ids=["waiting", "in a pause"])
def test_closing_ends_a_wait(server: ServerProcess, port: int, away: bool) -> None:
    url = f"http://127.0.0.1:{port}" if away else url_of(server)
    patient = Retry(600, first=200, most=200)  # pauses of more than all that is waited for here
    pool = KeyPool(url, timeout=600, retry=patient)
    errors: list[BaseException] = []

    def wait() -> None:
        with pytest.raises(PoolClosed) as closed:
            pool.acquire(wait=None)
        errors.append(closed.value)

    async def wait_async() -> None:
        async with AsyncKeyPool(url, timeout=600, retry=patient) as pool:
            task = asyncio.ensure_future(pool.acquire(wait=None))
            await asyncio.sleep(0.5)
        errors.append((await asyncio.gather(task, return_exceptions=True))[0])  # type: ignore[arg-type]

    thread = threading.Thread(target=wait)
    thread.start()
    asyncio.run(asyncio.wait_for(wait_async(), 30))
    pool.close()
    thread.join(30)
    assert [type(error) for error in errors] == [PoolClosed, PoolClosed]
    eventually(lambda: server.client().stats()["waiting"] == 0, "the waiters to leave")


def test_a_connection_that_the_server_closed_is_noticed(start_server: Start, port: int) -> None:
    """Over a restart: the end of the old connection is seen before a call is entrusted to it."""
    with KeyPool(f"http://127.0.0.1:{port}", retry=0) as pool:
        first = start_server(f"--port={port}")
        pool.generate()
        first.finish()
        start_server(f"--port={port}")
        pool.generate()
        assert pool.stats().generated == 1
