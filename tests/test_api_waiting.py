"""Waiting for a key: first come first served, whatever frees it, and waiters that give up or go away."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import Start
from support import (
    ACQUIRE,
    API,
    EARLY,
    HANDLE,
    Answer,
    Client,
    ServerProcess,
    Wire,
    eventually,
    expect_left,
    expect_object,
    expect_row,
)


def queue(client: Client, count: int = 1, **body: object) -> list[Wire]:
    """Add `count` waiters, each of which is in the queue before the next one calls."""
    first = client.stats()["waiting"]
    waiters = []
    for number in range(count):
        waiter = client.server.wire(limit=60)
        waiter.ask("POST", ACQUIRE, json={"wait": 60} | body)
        client.expect_waiting(first + number + 1)
        waiters.append(waiter)
    return waiters


def unblock(client: Client, key: str) -> Answer:
    """Free a key."""
    return client.post(f"{API}/keys/{key}/unblock")


FREERS: dict[str, Callable[[Client, str], Answer]] = {
    "unblock": unblock,
    "batch unblock": lambda client, key: client.batch(op="unblock", keys=[key]),
    "legacy unblock": lambda client, key: client.put(f"{API}/random_api_key/?api_key={key}"),
    "generate": lambda client, key: client.post(API + "/keys"),
    "batch generate": lambda client, key: client.batch(op="generate", count=1),
    "legacy generate": lambda client, key: client.post(API + "/random_api_key/"),
}


@pytest.mark.parametrize("by", FREERS)
def test_a_waiter_is_served_as_soon_as_a_key_is_free(client: Client, by: str) -> None:
    """Whatever frees a key serves the waiter, with a block that starts then, and an owner if it gave one."""
    client.make()
    held = client.acquire(owner="before")["key"]
    [waiter] = queue(client, owner="patient")
    freed = FREERS[by](client, held)
    assert freed.status in (200, 201), str(freed)
    answer = waiter.answer()
    served = expect_object(
        answer.expect(200), id=int, key=str, lease=int, handle=HANDLE, release_in=float, expires_in=float
    )
    assert (served["key"] == held) is ("unblock" in by)
    expect_left(served["release_in"], 60, freed, answer)
    expect_row(client.row(served["key"]), state="blocked", owner="patient", lease=served["lease"])
    assert client.stats()["waiting"] == 0


def test_a_waiter_is_served_by_the_release_of_a_key(lend: Start) -> None:
    """When a block ends, and not before, the waiter gets the key, with a greater lease."""
    client = lend("--block-seconds=0.5", "--max-block-seconds=60").client()
    client.make()
    with client.expect_moved(acquired=2, released=1, blocked=1, available=-1):
        pass_key = client.post(ACQUIRE)
        held = pass_key.expect(200)
        waiter = client.server.wire()
        waiter.ask("POST", ACQUIRE, json={"wait": 30, "block_seconds": 60})
        answer = waiter.answer()
        served = answer.expect(200)
        assert served["key"] == held["key"]
        assert served["lease"] > held["lease"]
        early = pass_key.asked_at + 0.5 - answer.answered_at
        assert early <= EARLY, f"served {early:.4f} s before the block ended"
        assert 60 - (answer.answered_at - pass_key.answered_at) <= served["release_in"] <= 60


def test_an_available_key_is_served_without_waiting(client: Client) -> None:
    """`wait` is for an empty pool only."""
    client.make()
    answer = client.post(ACQUIRE, json={"wait": 60})
    answer.expect(200)
    assert answer.answered_at - answer.asked_at < 20, "waited although a key was free"


@pytest.mark.parametrize("wait", [0.3, 1])
def test_a_wait_that_ends_without_a_key_is_404_on_time(client: Client, wait: float) -> None:
    """404 no-key-available, not early, and the waiter is out of the queue; one refusal in stats."""
    with client.expect_moved(refused=1):
        answer = client.post(ACQUIRE, json={"wait": wait})
        answer.expect_problem(404, "no-key-available")
    took = answer.answered_at - answer.asked_at
    assert took >= wait - EARLY, f"gave up after {took:.3f} s"
    client.expect_waiting(0)


def test_a_wait_without_a_key_gets_the_time_of_the_next_release(client: Client) -> None:
    """Its 404 carries Retry-After as that of any acquire."""
    client.make()
    started = client.post(ACQUIRE)
    started.expect(200)
    answer = client.post(ACQUIRE, json={"wait": 0.2})
    problem = answer.expect_problem(404, "no-key-available")
    expect_left(problem["retry_after"], 60, started, answer)
    assert 1 <= int(answer.headers["Retry-After"]) <= 60


def test_wait_0_is_answered_at_once(client: Client) -> None:
    """Without `wait`, with 0 and with null, an empty pool is reported at once."""
    for body in ({}, {"wait": 0}, {"wait": 0.0}, {"wait": None}):
        answer = client.post(ACQUIRE, json=body)
        answer.expect_problem(404, "no-key-available")
        assert answer.answered_at - answer.asked_at < 20


def test_stats_count_the_current_waiters(client: Client) -> None:
    """`waiting` grows and falls with the queue, and waiting alone moves nothing else."""
    with client.expect_moved():
        waiters = queue(client, 3)
        for left, waiter in zip((2, 1, 0), waiters, strict=True):
            waiter.close()
            client.expect_waiting(left)


def test_waiters_are_served_in_the_order_they_came(client: Client) -> None:
    """First come first served: the n-th key that becomes free goes to the n-th waiter,
    and leases tell the order.
    """
    waiters = queue(client, 6)
    keys = [client.make()["key"] for _ in range(3)]
    keys += [one["key"] for one in client.make_many(3)]
    served = [waiter.answer().expect(200) for waiter in waiters]
    assert [one["key"] for one in served[:3]] == keys[:3], "a later waiter was served first"
    assert sorted(one["key"] for one in served[3:]) == sorted(keys[3:])
    leases = [one["lease"] for one in served]
    assert leases == sorted(leases), f"leases by order of coming: {leases}"


def test_an_acquire_without_wait_does_not_overtake_a_waiter(client: Client) -> None:
    """A key that is freed while somebody waits is the waiter's; an acquire just after finds nothing."""
    client.make()
    held = client.acquire()["key"]
    waiters = queue(client, 2)
    with client.expect_moved(unblocked=1, acquired=1, waiting=-1, refused=2):
        unblock(client, held)
        client.post(ACQUIRE).expect_problem(404, "no-key-available")
        client.batch(op="acquire", count=1).expect_problem(404, "no-key-available")
        assert waiters[0].answer().expect(200)["key"] == held


def test_unblock_reports_its_own_effect_though_a_waiter_takes_the_key(client: Client) -> None:
    """state is available and changed true, while the key is blocked again by the waiter."""
    made = client.make()
    lease = client.acquire()["lease"]
    [waiter] = queue(client)
    answer = client.post(f"{API}/keys/{made['key']}/unblock", json={"lease": lease})
    expect_object(answer.expect(200), id=made["id"], state="available", changed=True)
    waiter.answer().expect(200)
    expect_row(client.row(made["key"]), state="blocked")
    client.post(f"{API}/keys/{made['key']}/unblock", json={"lease": lease}).expect_problem(409, "stale-lease")


def test_generate_reports_its_own_effect_though_a_waiter_takes_the_key(client: Client) -> None:
    """201 with state available, as the contract has it for every generate."""
    [waiter] = queue(client)
    made = client.make()
    assert made["state"] == "available"
    assert waiter.answer().expect(200)["key"] == made["key"]


def test_a_crowd_of_waiters_gets_a_key_each(client: Client) -> None:
    """200 waiters and 200 keys made at once: everyone is served, no key twice."""
    waiters = []
    for _ in range(200):
        waiter = client.server.wire(limit=60)
        waiter.ask("POST", ACQUIRE, json={"wait": 60})
        waiters.append(waiter)
    client.expect_waiting(200)
    made = {one["key"] for one in client.make_many(200)}
    served = [waiter.answer().expect(200) for waiter in waiters]
    assert {one["key"] for one in served} == made
    assert len({one["lease"] for one in served}) == 200
    assert client.stats()["waiting"] == 0


@pytest.mark.parametrize("how", ["close", "reset", "end_sending"])
def test_a_waiter_that_hangs_up_is_leased_nothing(client: Client, how: str) -> None:
    """It leaves the queue, half-closing included, and a key made after stays available."""
    [waiter] = queue(client)
    getattr(waiter, how)()
    client.expect_waiting(0)
    with client.expect_moved(generated=1, total=1, available=1):
        key = client.make()["key"]
        expect_row(client.row(key), state="available", lease=None)


@pytest.mark.parametrize("behind", ["a stray line", "a call", "many calls"])
@pytest.mark.parametrize("how", ["close", "end_sending"])
def test_a_waiter_that_hangs_up_behind_more_bytes_is_leased_nothing(
    client: Client, how: str, behind: str
) -> None:
    """Unread bytes that it sent behind its call don't hide the disconnect."""
    call = f"GET {API}/stats HTTP/1.1\r\nHost: {client.server.host}\r\n\r\n".encode()
    [waiter] = queue(client)
    waiter.send({"a stray line": b"\r\n", "a call": call, "many calls": 50 * call}[behind])
    getattr(waiter, how)()
    client.expect_waiting(0)
    with client.expect_moved(generated=1, total=1, available=1):
        client.make()


@pytest.mark.parametrize("how", ["close", "reset", "end_sending"])
def test_a_waiter_that_hangs_up_in_the_middle_of_the_queue_is_skipped(client: Client, how: str) -> None:
    """The others keep their order."""
    first, second, third = queue(client, 3)
    getattr(second, how)()
    client.expect_waiting(2)
    keys = [client.make()["key"], client.make()["key"]]
    assert [first.answer().expect(200)["key"], third.answer().expect(200)["key"]] == keys


def test_a_connection_that_waited_goes_on(client: Client) -> None:
    """After its answer, in vain or not, a waiter's connection takes the next call."""
    waiter = client.server.wire()
    waiter.ask("POST", ACQUIRE, json={"wait": 0.1})
    waiter.answer().expect_problem(404, "no-key-available")
    waiter.ask("POST", ACQUIRE, json={"wait": 60})
    client.expect_waiting(1)
    key = client.make()["key"]
    assert waiter.answer().expect(200)["key"] == key
    waiter.ask("POST", f"{API}/keys/{key}/unblock")
    waiter.answer().expect(200)


def test_more_waiters_than_allowed_are_refused(lend: Start) -> None:
    """503 too-many-waiters at once for one more; who does not wait is answered as ever;
    a place that is left is free.
    """
    client = lend("--max-waiters=2").client()
    waiters = queue(client, 2)
    with client.expect_moved():
        answer = client.post(ACQUIRE, json={"wait": 60})
        answer.expect_problem(503, "too-many-waiters")
        assert answer.answered_at - answer.asked_at < 20
    with client.expect_moved(refused=1):
        client.post(ACQUIRE).expect_problem(404, "no-key-available")
    waiters[0].close()
    client.expect_waiting(1)
    [late] = queue(client)
    keys = [client.make()["key"], client.make()["key"]]
    assert [waiters[1].answer().expect(200)["key"], late.answer().expect(200)["key"]] == keys


def test_a_deleted_key_goes_to_no_waiter(client: Client) -> None:
    """A waiter isn't served by the deletion of a blocked key."""
    client.make()
    held = client.acquire()["key"]
    [waiter] = queue(client)
    with client.expect_moved(deleted=1, total=-1, blocked=-1):
        client.delete(f"{API}/keys/{held}").expect(204)
    key = client.make()["key"]
    assert waiter.answer().expect(200)["key"] == key


def test_an_expired_key_goes_to_no_waiter(lend: Start) -> None:
    """A blocked key that expires is purged, not released: who waits for it waits in vain."""
    client = lend("--keepalive-seconds=0.6").client()
    key = client.make()["key"]
    started = client.post(ACQUIRE)
    if started.status == 404:
        return  # so slow a machine that the key was dead by then
    answer = client.post(ACQUIRE, json={"wait": 1.5})
    answer.expect_problem(404, "no-key-available")
    client.get(f"{API}/keys/{key}").expect_problem(404, "unknown-key")
    eventually(lambda: client.stats()["total"] == 0, "the expired key to be purged")


def test_keepalive_serves_no_waiter(client: Client) -> None:
    """A blocked key that is kept alive stays its holder's."""
    client.make()
    held = client.acquire()["key"]
    [waiter] = queue(client)
    with client.expect_moved(kept_alive=1):
        client.post(f"{API}/keys/{held}/keepalive").expect(200)
    unblock(client, held)
    waiter.answer().expect(200)


@pytest.mark.parametrize("wait", [-1, -0.001, 60.001, 61, 1e308, "5", True, [], {}])
def test_a_wait_out_of_range_is_refused(client: Client, wait: Any) -> None:
    """0 to 60 s as a number: anything else is 400 that names `wait`, also when a key is free."""
    client.make()
    with client.expect_moved():
        problem = client.post(ACQUIRE, json={"wait": wait}).expect_problem(400, "bad-request")
    assert "wait" in problem["detail"], problem


def test_the_longest_wait_is_a_minute(client: Client) -> None:
    """60 is in range, as a whole number and as a fraction."""
    for wait in (60, 60.0):
        [waiter] = queue(client, wait=wait)
        waiter.close()
        client.expect_waiting(0)


def test_a_deleted_key_serves_no_waiter_and_a_released_one_serves_one(
    server: ServerProcess, client: Client
) -> None:
    """Two keys, three waiters, a delete and a release by unblock: exactly one waiter is served."""
    client.make_many(2)
    first, second = client.acquire()["key"], client.acquire()["key"]
    waiters = queue(client, 3)
    client.delete(f"{API}/keys/{first}").expect(204)
    unblock(client, second)
    assert waiters[0].answer().expect(200)["key"] == second
    assert client.stats()["waiting"] == 2


def test_no_key_is_held_by_two_at_once(server: ServerProcess, client: Client) -> None:
    """Six holders fight for three keys, waiting and not, with leases and without: none gets another's."""
    client.make_many(3)
    held: dict[str, int] = {}
    guard = threading.Lock()

    def hold_and_give_back(number: int) -> int:
        served = 0
        with Client(server) as holder:
            for turn in range(150):
                answer = holder.post(ACQUIRE, json={"wait": 20} if (turn + number) % 3 else {})
                if answer.status == 404:
                    continue
                key, lease = answer.expect(200)["key"], answer.json["lease"]
                with guard:
                    assert key not in held, f"holder {number} got a key that holder {held[key]} has"
                    held[key] = number
                row = holder.row(key)
                assert row["state"] == "blocked", row
                assert row["lease"] == lease, row
                with guard:
                    del held[key]
                holder.post(f"{API}/keys/{key}/unblock", json={"lease": lease} if turn % 2 else {}).expect(
                    200
                )
                served += 1
        return served

    before = client.stats()
    with ThreadPoolExecutor(6) as threads:
        served = sum(threads.map(hold_and_give_back, range(6)))
    after = client.stats()
    assert after["acquired"] - before["acquired"] == after["unblocked"] - before["unblocked"] == served
    assert (after["available"], after["blocked"], after["waiting"]) == (3, 0, 0)
