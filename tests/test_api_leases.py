"""Leases for real work: handles, outcomes, quarantine, extensions, and acquires that may be repeated."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import Start
from support import (
    ACQUIRE,
    ADMIN_TOKEN,
    API,
    CLIENT_TOKEN,
    HANDLE,
    OTHER_CLIENT_TOKEN,
    Answer,
    Client,
    ServerProcess,
    eventually,
    expect_left,
    expect_object,
    expect_row,
)

BATCH = API + "/batch"
BLOCK, LONGEST = 60, 3600
FLAGS = (f"--block-seconds={BLOCK}", f"--max-block-seconds={LONGEST}")
OUTCOMES = ("ok", "rate_limited", "error", "invalid")


@pytest.fixture
def pool(lend: Start) -> Iterator[Client]:
    """A client of a server on which leases can be extended up to an hour."""
    with lend(*FLAGS).client() as client:
        yield client


def leased(pool: Client, **body: object) -> dict[str, Any]:
    """The lease of a new key, the only one that is available."""
    made = pool.make()
    lease = pool.acquire(**body)
    assert lease["id"] == made["id"], "another key was available"
    return lease


def call(pool: Client, what: str, key: object, body: Any = None, **how: Any) -> Answer:
    """A call about one key."""
    if body is not None:
        how["json"] = body
    return pool.post(f"{API}/keys/{key}/{what}", **how)


def report(pool: Client, lease: dict[str, Any], outcome: str, **more: object) -> dict[str, Any]:
    """The answer to a holder's report."""
    answer: dict[str, Any] = call(pool, "unblock", lease["handle"], {"outcome": outcome, **more}).expect(200)
    return answer


def attempt(pool: Client, key: str, **body: object) -> Answer:
    """An acquire with an Idempotency-Key."""
    return pool.post(ACQUIRE, json=body, headers={"Idempotency-Key": key})


def new_attempt() -> str:
    """An Idempotency-Key that no other call has."""
    return str(uuid.uuid4())


# ------------------------------------------------------------------------------------------------- handles


def test_a_handle_names_its_key_in_every_path(pool: Client) -> None:
    """Acquire answers it, single and in a batch; it carries its lease number, which may stand beside it."""
    lease = leased(pool)
    handle = lease["handle"]
    assert HANDLE.fullmatch(handle)
    assert handle.startswith(f"h:{lease['id']}.{lease['lease']}.")
    encoded = handle.replace(":", "%3A")
    expect_row(pool.get(f"{API}/keys/{encoded}").expect(200), id=lease["id"], lease=lease["lease"])
    assert call(pool, "keepalive", handle).expect(200)["id"] == lease["id"]
    assert call(pool, "reveal", handle).expect(200)["key"] == lease["key"]
    assert call(pool, "extend", handle, {"seconds": 90}).expect(200)["lease"] == lease["lease"]
    assert call(pool, "quarantine", handle).expect(200)["id"] == lease["id"]
    assert call(pool, "restore", handle).expect(200)["id"] == lease["id"]
    assert call(pool, "unblock", handle, {"lease": lease["lease"]}).expect(200)["changed"] is True
    [again] = pool.batch(op="acquire", count=1).expect(200)["keys"]
    assert again["handle"].startswith(f"h:{again['id']}.{again['lease']}.")
    pool.delete(f"{API}/keys/{again['handle']}").expect(204)


@pytest.mark.parametrize("op", ["keepalive", "unblock", "extend", "quarantine", "restore", "delete"])
def test_a_handle_names_its_key_in_every_batch(pool: Client, op: str) -> None:
    """That of an older lease is stale, one that doesn't fit is unknown, as they were sent."""
    old = leased(pool)
    call(pool, "unblock", old["handle"]).expect(200)
    new = pool.acquire()
    keys = [old["handle"], new["handle"], new["handle"][:-1], "h:", f"h:{new['id']}.1.AAAAAAAAAAA"]
    answer = pool.batch(op=op, keys=keys).expect(200)
    others: dict[str, object] = {"over": [], "limit": []} if op == "extend" else {}
    expect_object(answer, op=op, done=1, unknown=keys[2:], stale=[old["handle"]], **others)


def test_a_handle_of_an_older_lease_is_stale_in_every_path(pool: Client) -> None:
    """409, and nothing changes."""
    old = leased(pool)["handle"]
    call(pool, "unblock", old).expect(200)
    pool.acquire()
    with pool.expect_moved():
        for what in ("unblock", "keepalive", "extend", "quarantine", "restore", "reveal"):
            call(pool, what, old).expect_problem(409, "stale-lease")
        call(pool, "unblock", old, {"outcome": "invalid"}).expect_problem(409, "stale-lease")
        pool.get(f"{API}/keys/{old}").expect_problem(409, "stale-lease")
        pool.delete(f"{API}/keys/{old}").expect_problem(409, "stale-lease")


def test_a_handle_that_does_not_fit_is_unknown(pool: Client) -> None:
    """Cut short, longer, of another key, lease or pool, no digits: 404, whatever lease stands beside it."""
    lease = leased(pool)
    _, rest = lease["handle"].split(":")
    number, of, digest = rest.split(".")
    foreign = digest[:-1] + ("A" if digest[-1] != "A" else "E")
    wrong = [
        f"h:{number}.{of}.{digest[:-1]}", f"h:{number}.{of}.{digest}A", f"h:{int(number) + 1}.{of}.{digest}",
        f"h:{number}.{int(of) + 1}.{digest}", f"h:{number}.{of}.{foreign}", f"h:0{number}.{of}.{digest}",
        f"h:{number}.{of}", "h:", "h:x", f"H:{rest}", f"h:{'9' * 40}.1.{digest}", f"h:{number}.{of}.{digest}%0A",
        f"h:%D9%A1.{of}.{digest}",
    ]  # fmt: skip
    with pool.expect_moved():
        for handle in wrong:
            for what in ("unblock", "keepalive", "quarantine", "restore", "reveal"):
                call(pool, what, handle).expect_problem(404, "unknown-key")
            call(pool, "extend", handle, {"lease": lease["lease"]}).expect_problem(404, "unknown-key")
            body = {"lease": lease["lease"], "outcome": "invalid"}
            call(pool, "unblock", handle, body).expect_problem(404, "unknown-key")
            pool.get(f"{API}/keys/{handle}").expect_problem(404, "unknown-key")
            pool.delete(f"{API}/keys/{handle}").expect_problem(404, "unknown-key")


def test_another_lease_beside_a_handle_is_refused(pool: Client) -> None:
    """400 that names `lease`, in paths and batches, and nothing changes."""
    lease = leased(pool)
    handle, other = lease["handle"], lease["lease"] + 1
    with pool.expect_moved():
        for what in ("unblock", "extend"):
            problem = call(pool, what, handle, {"lease": other}).expect_problem(400, "bad-request")
            assert "lease" in problem["detail"]
            answer = pool.batch(op=what, keys=[handle, {"key": handle, "lease": other}])
            assert "lease" in answer.expect_problem(400, "bad-request")["detail"]


def test_clients_name_keys_by_handles(lend: Start) -> None:
    """Where an id is refused, a handle is right; quarantine and restore are for admins, by whatever name."""
    env = {"KEYPOOL_CLIENT_TOKEN": CLIENT_TOKEN, "KEYPOOL_ADMIN_TOKEN": ADMIN_TOKEN}
    server = lend(env=env, admin_token=ADMIN_TOKEN)
    admin, client = server.client(ADMIN_TOKEN), server.client(CLIENT_TOKEN)
    admin.make()
    lease = client.acquire()
    handle = lease["handle"]
    call(client, "keepalive", f"id:{lease['id']}").expect_problem(403, "forbidden")
    call(client, "keepalive", handle).expect(200)
    client.get(f"{API}/keys/{handle}").expect(200)
    for what in ("quarantine", "restore"):
        call(client, what, handle).expect_problem(403, "forbidden")
        client.batch(op=what, keys=[handle]).expect_problem(403, "forbidden")
    assert client.batch(op="unblock", keys=[handle]).expect(200)["done"] == 1


# ------------------------------------------------------------------------------------------------ outcomes


@pytest.mark.parametrize(
    ("body", "state", "cools", "failures"),
    [
        ({"outcome": "ok"}, "available", None, 0),
        ({"outcome": "rate_limited"}, "cooling", 60, 1),
        ({"outcome": "rate_limited", "retry_after": 30}, "cooling", 30, 1),
        ({"outcome": "rate_limited", "retry_after": 0}, "available", None, 1),
        ({"outcome": "rate_limited", "retry_after": 10**15}, "cooling", 604800, 1),
        ({"outcome": "error", "reason": "500 from the service"}, "available", None, 1),
        ({"outcome": "invalid", "reason": "401"}, "quarantined", None, 0),
    ],
)
@pytest.mark.parametrize("name", ["key", "handle", "batch"])
def test_an_outcome_decides_what_becomes_of_the_key(
    pool: Client, name: str, *, body: dict[str, Any], state: str, cools: float | None, failures: int
) -> None:
    """In the answer and in the row; by the key with its lease number, by the handle, and in a batch."""
    lease = leased(pool)
    if name == "batch":
        answer = pool.batch(op="unblock", keys=[{"key": lease["handle"], **body}])
        expect_object(answer.expect(200), op="unblock", done=1, unknown=[], stale=[])
    else:
        beside = {"lease": lease["lease"]} if name == "key" else {}
        answer = call(pool, "unblock", lease[name], body | beside)
        members: dict[str, object] = {"id": lease["id"], "state": state, "changed": True}
        expect_object(answer.expect(200), **members, **({"available_in": float} if cools else {}))
        if cools:
            expect_left(answer.json["available_in"], cools, answer, answer)
    shown = pool.get(f"{API}/keys/{lease['handle']}")
    known = {"state": state, "failures": failures, "outcome": body["outcome"], "reason": body.get("reason")}
    row = expect_row(shown.expect(200), **known)
    if cools:
        expect_left(row["available_in"], cools, answer, shown)


def test_a_lease_reports_once_and_also_when_it_is_over(pool: Client) -> None:
    """A report after a plain unblock counts, a second one changes nothing, and a newer lease refuses it."""
    lease = leased(pool)
    call(pool, "unblock", lease["handle"]).expect(200)
    assert report(pool, lease, "rate_limited", retry_after=40)["state"] == "cooling"
    again = report(pool, lease, "invalid")
    expect_object(again, id=lease["id"], state="cooling", changed=False, available_in=float)
    plain = call(pool, "unblock", lease["handle"]).expect(200)
    assert (plain["state"], plain["changed"]) == ("cooling", False)
    call(pool, "restore", lease["handle"]).expect(200)
    pool.acquire()
    call(pool, "unblock", lease["handle"], {"outcome": "ok"}).expect_problem(409, "stale-lease")


def test_errors_in_a_row_cool_a_key(pool: Client) -> None:
    """From the third on, twice as long each time; ok forgets them."""
    pool.make()
    outcomes = ("error", "error", "ok", "error", "error", "error")
    states = [report(pool, pool.acquire(), outcome)["state"] for outcome in outcomes]
    assert states == ["available"] * 5 + ["cooling"]
    [row] = pool.get(API + "/keys?order=ready").expect(200)["keys"]
    assert row["failures"] == 3
    assert 239 - 30 < row["available_in"] <= 240


def test_the_guard_keeps_half_of_the_pool(pool: Client) -> None:
    """A report that would quarantine more becomes a cooldown, and says that it was guarded."""
    pool.make_many(2)
    first, second = pool.batch(op="acquire", count=2).expect(200)["keys"]
    expect_object(report(pool, first, "invalid"), id=first["id"], state="quarantined", changed=True)
    expect_object(
        report(pool, second, "invalid"),
        id=second["id"], state="cooling", changed=True, available_in=float, guarded=True,
    )  # fmt: skip


def test_without_a_key_to_serve_the_answer_counts_the_others(pool: Client) -> None:
    """`retry_after` is to the earliest release or end of a cooldown."""
    pool.make_many(3)
    held, cooled, bad = pool.batch(op="acquire", count=3).expect(200)["keys"]
    answer = call(pool, "unblock", cooled["handle"], {"outcome": "rate_limited", "retry_after": 30})
    report(pool, bad, "invalid")
    for asked in (pool.post(ACQUIRE), pool.batch(op="acquire", count=2)):
        problem = asked.expect_problem(404, "no-key-available")
        counts = [problem[name] for name in ("blocked", "cooling", "quarantined")]
        assert counts == [1, 1, 1]
        expect_left(problem["retry_after"], 30, answer, asked)
    pool.delete(f"{API}/keys/{held['key']}").expect(204)
    pool.delete(f"{API}/keys/{cooled['key']}").expect(204)
    problem = pool.post(ACQUIRE).expect_problem(404, "no-key-available")
    assert "retry_after" not in problem
    assert [problem[name] for name in ("blocked", "cooling", "quarantined")] == [0, 0, 1]


def test_stats_and_lists_have_the_four_states(pool: Client) -> None:
    """The states add up to the total; `order=ready` lists cooling keys, the soonest first."""
    pool.make_many(6)
    one, two, three, four = pool.batch(op="acquire", count=4).expect(200)["keys"]
    moves = {"blocked": -3, "cooling": 2, "quarantined": 1, "unblocked": 3, "cooled": 2, "quarantines": 1}
    with pool.expect_moved(**moves):
        report(pool, one, "rate_limited", retry_after=500)
        report(pool, two, "rate_limited", retry_after=100)
        report(pool, three, "invalid")
    stats = pool.stats()
    states = ("available", "blocked", "cooling", "quarantined")
    assert [stats[state] for state in states] == [2, 1, 2, 1]
    assert stats["total"] == 6

    def ids(query: str) -> list[int]:
        return [row["id"] for row in pool.get(f"{API}/keys?{query}").expect(200)["keys"]]

    assert ids("order=ready") == ids("order=ready&state=cooling") == [two["id"], one["id"]]
    assert sorted(ids("state=cooling")) == sorted([one["id"], two["id"]])
    assert ids("state=quarantined") == [three["id"]]
    assert ids("state=blocked") == ids("order=release") == [four["id"]]
    pool.get(f"{API}/keys?order=ready&state=blocked").expect_problem(400, "bad-request")
    with pool.expect_moved(cooling=-2, quarantined=-1, available=3, restored=3):
        done = pool.batch(op="restore", keys=[f"id:{each['id']}" for each in (one, two, three)])
        assert done.expect(200)["done"] == 3


NO_OUTCOMES: list[object] = ["", "OK", 5, True, [], {}]
NO_LENGTHS: list[object] = [-1, -0.001, 1.1e15, 10**15 + 1, 10**40, "1", True, []]
NO_REASONS: list[object] = ["", "x" * 201, "a\nb", "\x00", "\x7f", "\x85", 5, []]
WRONG_REPORTS: list[tuple[dict[str, Any], str]] = [
    *(({"outcome": outcome}, "lease") for outcome in OUTCOMES),
    ({"lease": 1, "outcome": "fine"}, "ok, rate_limited, error or invalid"),
    *(({"lease": 1, "outcome": value}, "outcome") for value in NO_OUTCOMES),
    *(
        ({"lease": 1, "outcome": outcome, "retry_after": 1}, "retry_after")
        for outcome in ("ok", "error", "invalid", None)
    ),
    ({"lease": 1, "retry_after": 1}, "retry_after"),
    *(({"lease": 1, "outcome": "rate_limited", "retry_after": value}, "retry_after") for value in NO_LENGTHS),
    ({"lease": 1, "reason": "why"}, "reason"),
    *(({"lease": 1, "outcome": "ok", "reason": value}, "reason") for value in NO_REASONS),
]


@pytest.mark.once
def test_a_wrong_report_is_refused_and_changes_nothing(pool: Client) -> None:
    """400 that names the field, for the single call and for a batch as a whole."""
    lease = leased(pool)
    path = f"{API}/keys/{lease['key']}/unblock"
    with pool.expect_moved():
        for wrong, named in WRONG_REPORTS:
            body = wrong | ({"lease": lease["lease"]} if "lease" in wrong else {})
            problem = call(pool, "unblock", lease["key"], body).expect_problem(400, "bad-request")
            assert named in problem["detail"], (body, problem)
            answer = pool.batch(op="unblock", keys=[lease["handle"], {"key": lease["key"], **body}])
            problem = answer.expect_problem(400, "bad-request")
            assert named.partition(",")[0] in problem["detail"], (body, problem)
        for text in ("NaN", "Infinity", "-Infinity", "1e999", "1.", "0x1"):
            raw = f'{{"lease":{lease["lease"]},"outcome":"rate_limited","retry_after":{text}}}'
            pool.post(path, body=raw.encode()).expect_problem(400, "bad-request")
        twice = f'{{"outcome":"ok","outcome":"ok","lease":{lease["lease"]}}}'.encode()
        assert "outcome" in pool.post(path, body=twice).expect_problem(400, "bad-request")["detail"]
    expect_row(pool.row(lease["key"]), state="blocked", outcome=None, failures=0)


def test_nulls_and_whole_numbers_of_a_report_are_as_everywhere(pool: Client) -> None:
    """A null is as if it were absent, and 17.0 is 17."""
    lease = leased(pool)
    nulls = dict.fromkeys(("outcome", "retry_after", "reason", "lease"))
    assert call(pool, "unblock", lease["handle"], nulls).expect(200)["state"] == "available"
    body = nulls | {"lease": float(lease["lease"]), "outcome": "rate_limited", "retry_after": 2}
    assert call(pool, "unblock", lease["handle"], body).expect(200)["state"] == "cooling"


# ---------------------------------------------------------------------------------- quarantine and restore


def test_an_operator_takes_a_key_out_of_service(pool: Client) -> None:
    """At once if nobody holds it; the answer is the row, with the operator's reason; restore undoes all of it."""
    made = pool.make()
    with pool.expect_moved(quarantines=1, quarantined=1, available=-1):
        answer = call(pool, "quarantine", f"id:{made['id']}", {"reason": "billing is overdue"})
    expect_row(answer.expect(200), id=made["id"], state="quarantined", reason="billing is overdue")
    call(pool, "keepalive", made["key"]).expect(200)
    assert call(pool, "unblock", made["key"]).expect(200)["changed"] is False
    pool.post(ACQUIRE).expect_problem(404, "no-key-available")
    with pool.expect_moved(restored=1, quarantined=-1, available=1):
        answer = call(pool, "restore", f"id:{made['id']}")
    expect_row(answer.expect(200), id=made["id"], state="available", reason=None, outcome=None, failures=0)
    assert pool.acquire()["id"] == made["id"]


def test_a_held_key_is_quarantined_when_its_lease_ends_or_at_once(pool: Client) -> None:
    """Until then it can't be extended; with `now` its holder can't report any more."""
    lease = leased(pool)
    expect_row(call(pool, "quarantine", lease["key"], {"now": False}).expect(200), state="blocked")
    call(pool, "extend", lease["handle"], {"seconds": 99}).expect_problem(409, "lease-over")
    assert report(pool, lease, "ok")["state"] == "quarantined"
    call(pool, "restore", lease["key"]).expect(200)
    lease = pool.acquire()
    expect_row(call(pool, "quarantine", lease["key"], {"now": True}).expect(200), state="quarantined")
    late = report(pool, lease, "ok")
    assert (late["state"], late["changed"]) == ("quarantined", False)


def test_batches_quarantine_and_restore(pool: Client) -> None:
    """Item by item, with one reason for all."""
    made = pool.make_many(3)
    held = pool.acquire()
    names = [f"id:{one['id']}" for one in made]
    answer = pool.batch(op="quarantine", keys=[*names, "nope"], reason="audit", now=True).expect(200)
    expect_object(answer, op="quarantine", done=3, unknown=["nope"], stale=[])
    rows = pool.get(f"{API}/keys?state=quarantined").expect(200)["keys"]
    assert [(row["id"], row["reason"]) for row in rows] == [(one["id"], "audit") for one in made]
    call(pool, "extend", held["handle"]).expect_problem(409, "lease-over")
    answer = pool.batch(op="restore", keys=[*names, "nope"]).expect(200)
    expect_object(answer, op="restore", done=3, unknown=["nope"], stale=[])
    assert pool.stats()["available"] == 3


@pytest.mark.once
def test_wrong_quarantines_are_refused(pool: Client) -> None:
    """400 that names the field, and nothing changes."""
    made = pool.make()
    with pool.expect_moved():
        for field, value in (("now", 1), ("now", "true"), ("reason", ""), ("reason", "a\nb"), ("lease", 1)):
            problem = call(pool, "quarantine", made["key"], {field: value}).expect_problem(400, "bad-request")
            assert field in problem["detail"]
            answer = pool.batch(op="quarantine", keys=[made["key"]], **{field: value})
            assert field in answer.expect_problem(400, "bad-request")["detail"]
        call(pool, "restore", made["key"], {"reason": "x"}).expect_problem(400, "bad-request")
        call(pool, "quarantine", "nope").expect_problem(404, "unknown-key")
        call(pool, "restore", "nope").expect_problem(404, "unknown-key")


# --------------------------------------------------------------------------------------------------- extend


def test_extend_moves_the_end_of_the_lease(pool: Client) -> None:
    """By key and lease number, or by the handle; `seconds` is `block_seconds` if left out."""
    lease = leased(pool, block_seconds=20)
    assert 0 < lease["release_in"] <= 20
    answer = call(pool, "extend", lease["key"], {"lease": lease["lease"], "seconds": 600})
    told = expect_object(
        answer.expect(200), id=lease["id"], lease=lease["lease"], release_in=float, block_left=float
    )
    expect_left(told["release_in"], 600, answer, answer)
    assert LONGEST - 60 < told["block_left"] <= LONGEST
    lease = leased(pool, block_seconds=20)
    answer = call(pool, "extend", lease["handle"])
    expect_left(answer.expect(200)["release_in"], BLOCK, answer, answer)
    answer = call(pool, "extend", lease["handle"], {"seconds": 10**6})
    left = answer.expect(200)
    assert left["release_in"] == left["block_left"] <= LONGEST
    assert pool.row(lease["key"])["lease"] == lease["lease"]


def test_what_cannot_be_extended_says_why(pool: Client) -> None:
    """block-limit by the cap or because `seconds` is short, lease-over, stale-lease; 400 without a lease number."""
    lease = leased(pool)
    key, number = lease["key"], lease["lease"]
    problem = call(pool, "extend", lease["handle"], {"seconds": 1}).expect_problem(409, "block-limit")
    assert "seconds" in problem["detail"]
    call(pool, "extend", lease["handle"], {"seconds": LONGEST}).expect(200)
    problem = call(pool, "extend", lease["handle"], {"seconds": LONGEST}).expect_problem(409, "block-limit")
    assert "max_block_seconds" in problem["detail"]
    call(pool, "extend", key, {"lease": number + 1}).expect_problem(409, "stale-lease")
    for body in (None, {}, {"seconds": 5}, {"lease": None}):
        assert "lease" in call(pool, "extend", key, body).expect_problem(400, "bad-request")["detail"]
    for seconds in (0, -1, "5", True, 1.1e15):
        problem = call(pool, "extend", lease["handle"], {"seconds": seconds}).expect_problem(
            400, "bad-request"
        )
        assert "seconds" in problem["detail"]
    call(pool, "unblock", key).expect(200)
    call(pool, "extend", lease["handle"]).expect_problem(409, "lease-over")


def test_without_a_larger_limit_nothing_lengthens_a_block(client: Client) -> None:
    """A key is free again within `block_seconds`, unless `--max-block-seconds` allows more."""
    lease = leased(client)
    call(client, "extend", lease["handle"], {"seconds": 600}).expect_problem(409, "block-limit")
    problem = client.post(ACQUIRE, json={"block_seconds": 61}).expect_problem(400, "bad-request")
    assert "block_seconds takes 1 to 60" in problem["detail"]


def test_a_batch_extends_leases_one_by_one(pool: Client) -> None:
    """Each item's result stands in a list of its own, as it was sent."""
    pool.make_many(5)
    good, short, over, capped, plain = pool.batch(op="acquire", count=5, block_seconds=20).expect(200)["keys"]
    call(pool, "unblock", over["handle"]).expect(200)
    call(pool, "extend", capped["handle"], {"seconds": LONGEST}).expect(200)
    items = [
        {"key": good["key"], "lease": good["lease"], "seconds": 300},
        {"key": short["handle"], "seconds": 1},
        {"key": over["handle"]},
        {"key": capped["key"], "lease": float(capped["lease"])},
        plain["handle"],
        {"key": good["key"], "lease": good["lease"] + 9},
        {"key": "nope", "lease": 1},
    ]
    expect_object(
        pool.batch(op="extend", keys=items).expect(200),
        op="extend", done=2, unknown=["nope"], stale=[good["key"]], over=[over["handle"]],
        limit=[short["handle"], capped["key"]],
    )  # fmt: skip
    for wrong in ([good["key"]], [{"key": good["key"]}], [{"key": good["handle"], "seconds": 0}], []):
        pool.batch(op="extend", keys=wrong).expect_problem(400, "bad-request")


@pytest.mark.once
def test_the_first_stretch_has_limits(pool: Client) -> None:
    """`block_seconds` from 1 to `max_block_seconds`, single and in a batch; a wrong one is named."""
    made = [one["key"] for one in pool.make_many(4)]
    for seconds in (1, LONGEST):
        answer = pool.post(ACQUIRE, json={"block_seconds": seconds})
        expect_left(answer.expect(200)["release_in"], seconds, answer, answer)
        answer = pool.batch(op="acquire", count=1, block_seconds=seconds)
        expect_left(answer.expect(200)["keys"][0]["release_in"], seconds, answer, answer)
    pool.batch(op="unblock", keys=made).expect(200)  # lest a block of 1 s ends while nothing may move
    with pool.expect_moved():
        for wrong in [*NO_LENGTHS, 0, 0.999, LONGEST + 0.001]:
            problem = pool.post(ACQUIRE, json={"block_seconds": wrong}).expect_problem(400, "bad-request")
            assert "block_seconds" in problem["detail"]
            answer = pool.batch(op="acquire", count=1, block_seconds=wrong)
            assert "block_seconds" in answer.expect_problem(400, "bad-request")["detail"]


@pytest.mark.once
def test_a_short_block_may_be_chosen_where_blocks_are_short(lend: Start) -> None:
    """The least is the pool's own `block_seconds`, if that is under a second."""
    client = lend("--block-seconds=0.4", "--max-block-seconds=5").client()
    client.make_many(2)
    assert client.acquire(block_seconds=0.4)["release_in"] <= 0.4
    client.post(ACQUIRE, json={"block_seconds": 0.3}).expect_problem(400, "bad-request")


# ---------------------------------------------------------------------------------------- repeated acquires


def replayed(answer: Answer) -> bool:
    """Whether an answer says that it repeats leases."""
    values = answer.headers.get_all("Idempotent-Replayed") or []
    assert values in ([], ["true"])
    return bool(values)


def test_a_repeated_acquire_gets_the_same_lease(pool: Client) -> None:
    """As long as it is held; then the repeat is a new acquire."""
    pool.make_many(3)
    key = new_attempt()
    with pool.expect_moved(acquired=1, available=-1, blocked=1):
        first = attempt(pool, key, owner="a")
        shown = f"{API}/keys/{first.expect(200)['handle']}"
        eventually(lambda: pool.get(shown).expect(200)["release_in"] < BLOCK - 0.2, "an older lease")
        again = attempt(pool, key, owner="a")
    assert [replayed(first), replayed(again)] == [False, True]
    same = ("id", "key", "lease", "handle")
    assert [first.expect(200)[name] for name in same] == [again.expect(200)[name] for name in same]
    expect_left(again.json["release_in"], BLOCK, first, again)
    call(pool, "unblock", first.json["handle"]).expect(200)
    new = attempt(pool, key, owner="a")
    assert not replayed(new)
    assert new.expect(200)["lease"] > first.json["lease"]


def test_a_repeat_needs_no_available_key(pool: Client) -> None:
    """The lease is found when every key is held, single and in a batch."""
    pool.make_many(3)
    key = new_attempt()
    headers = {"Idempotency-Key": key}
    batch = {"op": "acquire", "count": 9}
    with pool.expect_moved(acquired=3, available=-3, blocked=3):
        first, many = attempt(pool, key), pool.post(BATCH, json=batch, headers=headers)
        again, all_again = attempt(pool, key), pool.post(BATCH, json=batch, headers=headers)
    assert again.expect(200)["lease"] == first.expect(200)["lease"]
    held = [each["lease"] for each in many.expect(200)["keys"]]
    assert [each["lease"] for each in all_again.expect(200)["keys"]] == held
    assert len(held) == 2


def test_an_attempt_is_of_its_header_and_body(pool: Client) -> None:
    """As decoded: the order of members, white space, nulls and 20.0 for 20 make no difference; all else does."""
    pool.make_many(12)
    key = new_attempt()
    headers = {"Idempotency-Key": key}
    bodies = [
        b'{"owner":"a","block_seconds":20}',
        b' { "block_seconds" : 20.0 , "owner" : "\\u0061", "wait":null } ',
    ]
    leases = [pool.post(ACQUIRE, body=body, headers=headers).expect(200)["lease"] for body in bodies]
    assert leases[0] == leases[1]
    empty = [pool.post(ACQUIRE, headers=headers, body=body).expect(200)["lease"] for body in (b"", b"{}")]
    assert empty[0] == empty[1]
    others = [
        attempt(pool, key, owner="a").expect(200)["lease"],
        attempt(pool, key, owner="b", block_seconds=20).expect(200)["lease"],
        attempt(pool, key.upper() + "x", owner="a", block_seconds=20).expect(200)["lease"],
        pool.post(ACQUIRE, json={"owner": "a", "block_seconds": 20}).expect(200)["lease"],
        pool.batch(op="acquire", count=1).expect(200)["keys"][0]["lease"],
    ]
    assert len({leases[0], empty[0], *others}) == 7


def test_an_attempt_is_of_its_token(guarded_server: ServerProcess) -> None:
    """Two callers who choose the same header get keys of their own."""
    guarded_server.client(ADMIN_TOKEN).make_many(3)
    key = new_attempt()
    ids = [
        attempt(guarded_server.client(token), key).expect(200)["id"]
        for token in (CLIENT_TOKEN, OTHER_CLIENT_TOKEN, CLIENT_TOKEN)
    ]
    assert ids[0] == ids[2] != ids[1]


def test_a_repeated_batch_gets_what_is_still_held(pool: Client) -> None:
    """When none is, it is a new acquire."""
    pool.make_many(6)
    headers = {"Idempotency-Key": new_attempt()}
    body = {"op": "acquire", "count": 3, "owner": "crew"}
    first = pool.post(BATCH, json=body, headers=headers)
    held = first.expect(200)["keys"]
    call(pool, "unblock", held[1]["handle"]).expect(200)
    again = pool.post(BATCH, json=body, headers=headers)
    assert [replayed(first), replayed(again)] == [False, True]
    assert [each["lease"] for each in again.expect(200)["keys"]] == [held[0]["lease"], held[2]["lease"]]
    pool.batch(op="unblock", keys=[held[0]["handle"], held[2]["handle"]]).expect(200)
    new = pool.post(BATCH, json=body, headers=headers)
    assert not replayed(new)
    assert min(each["lease"] for each in new.expect(200)["keys"]) > held[2]["lease"]


def test_a_repeat_takes_the_place_of_a_call_that_waits(pool: Client) -> None:
    """The first is answered 409 superseded, the repeat gets the key."""
    server, key = pool.server, new_attempt()

    def ask() -> Answer:
        with server.client() as client:
            return attempt(client, key, wait=30)

    with ThreadPoolExecutor() as threads:
        first = threads.submit(ask)
        pool.expect_waiting(1)
        second = threads.submit(ask)
        first.result().expect_problem(409, "superseded")
        assert pool.stats()["waiting"] == 1
        made = pool.make()
        assert second.result().expect(200)["key"] == made["key"]


def test_asking_again_and_again_keeps_the_place_in_the_queue(pool: Client) -> None:
    """A repeat after the attempt's 404 stands before those who came after its first call."""
    server = pool.server

    def ask(key: str | None, wait: float) -> Answer:
        with server.client() as client:
            return attempt(client, key, wait=wait) if key else client.post(ACQUIRE, json={"wait": wait})

    def seen(wait: float) -> bool:
        """Whether it was seen: not if the time of one of its calls was up before the next step."""
        key = new_attempt()
        first = threads.submit(ask, key, wait)
        eventually(lambda: first.done() or pool.stats()["waiting"] == 1, "the first one waits")
        later = threads.submit(ask, None, 60)
        both = False

        def both_wait() -> bool:
            nonlocal both
            both = pool.stats()["waiting"] == 2
            return both or first.done()

        eventually(both_wait, "the later one waits")
        first.result().expect_problem(404, "no-key-available")
        again = threads.submit(ask, key, wait)
        eventually(lambda: again.done() or pool.stats()["waiting"] == 2, "the first one waits again")
        made = [pool.make()["key"]]
        if (answer := again.result()).status == 404:
            assert later.result().expect(200)["key"] == made[0]
            return False
        if both:
            assert answer.expect(200)["key"] == made[0]
        made.append(pool.make()["key"])
        assert {answer.expect(200)["key"], later.result().expect(200)["key"]} == set(made)
        return both

    with ThreadPoolExecutor() as threads:
        assert any(seen(wait) for wait in (1, 5, 25)), "not seen, or this machine is too slow"


def test_a_caller_that_hangs_up_leaves_nothing_to_repeat(pool: Client) -> None:
    """A waiting acquire ends with its caller, whether it may be repeated or not; the repeat is a new one."""
    key = new_attempt()
    with pool.server.wire() as wire:
        wire.ask("POST", ACQUIRE, body=b'{"wait":30}', headers={"Idempotency-Key": key})
        pool.expect_waiting(1)
    pool.expect_waiting(0)
    made = pool.make()
    answer = attempt(pool, key, wait=30)
    assert not replayed(answer)
    assert answer.expect(200)["key"] == made["key"]


WRONG_ATTEMPTS = {
    "empty": "",
    "too long": "x" * 65,
    "not ASCII": "ä",
    "a space": "a b",
    "a tab": "a\tb",
}


@pytest.mark.parametrize("wrong", WRONG_ATTEMPTS)
def test_a_wrong_idempotency_key_is_named(pool: Client, wrong: str) -> None:
    """400 for both acquires, and for any batch; calls that don't take the header ignore it."""
    made = pool.make()
    headers = {"Idempotency-Key": WRONG_ATTEMPTS[wrong]}
    with pool.expect_moved():
        keepalive = {"op": "keepalive", "keys": [made["key"]]}
        for path, body in ((ACQUIRE, {}), (BATCH, {"op": "acquire", "count": 1}), (BATCH, keepalive)):
            problem = pool.post(path, json=body, headers=headers).expect_problem(400, "bad-request")
            assert "Idempotency-Key" in problem["detail"]
    call(pool, "keepalive", made["key"], headers=headers).expect(200)


def test_the_longest_idempotency_key_is_taken(pool: Client) -> None:
    """64 visible characters, of any kind."""
    pool.make_many(2)
    for key in ("x" * 64, "".join(map(chr, itertools.chain(range(33, 65), range(91, 123))))):
        first, again = attempt(pool, key), attempt(pool, key)
        assert first.expect(200)["lease"] == again.expect(200)["lease"]


def test_the_first_version_serves_only_available_keys(pool: Client) -> None:
    """Cooling and quarantined keys are neither served nor counted as available there."""
    pool.make_many(2)
    first, second = pool.batch(op="acquire", count=2).expect(200)["keys"]
    report(pool, first, "rate_limited", retry_after=30)
    report(pool, second, "invalid")
    path = API + "/random_api_key/"
    problem = pool.get(path).expect_problem(404, "no-key-available")
    assert "message" in problem
    answer = pool.head(path)
    assert answer.status == 404
    assert 1 <= int(answer.headers["Retry-After"]) <= 30
    pool.put(f"{path}?api_key={second['key']}").expect(200)
    eventually(lambda: pool.stats()["quarantined"] == 1, "an unblock restores nothing")
