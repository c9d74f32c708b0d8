"""Pools, keys from elsewhere and their data, by both clients against the fake server; the rules that need none."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from typing import Any

import httpx2
import pytest
from client_support import ITEM, KINDS, QUICK, SECRET, USER, Driver, change_one_key
from support import eventually

from keypool.client import (
    AsyncKeyPool,
    Imported,
    KeyPool,
    KeyPoolError,
    KeysWouldExpire,
    LeaseLost,
    ManySeats,
    NoKeyAvailable,
    PoolClosed,
    PoolDraining,
    PoolFixed,
    PoolFull,
    PoolNotEmpty,
    SecretsKeyRequired,
    ShareSpent,
    Unauthorized,
    UnknownPool,
    Unreachable,
)
from keypool.client.attempts import Answer, Pause, Send, perform
from keypool.client.calls import acquire
from keypool.client.imports import MOST_BYTES
from keypool.client.rounds import LeaseRounds, Rounds
from keypool.client.settings import Settings
from keypool.client.testing import FakeServer


def server_of(**options: Any) -> FakeServer:
    """A server with a pool of one key."""
    return FakeServer(["in-default"], pools={"openai": [ITEM]}, **options)


# ------------------------------------------------------------------------------------------------------- pools


@pytest.mark.parametrize("kind", KINDS)
def test_each_pool_has_an_object_of_its_own_over_the_same_connections(kind: str) -> None:
    fake = server_of()
    with Driver(kind, "http://fake", transport=fake) as client:
        openai = client.pool.pool("openai")
        assert type(openai) is type(client.pool)
        assert openai is client.pool.pool("openai")
        assert openai.pool("openai") is openai
        assert openai.pool("default") is client.pool
        assert repr(openai).endswith("KeyPool('http://fake', pool='openai')")
        assert openai._runner is client.pool._runner
        with client.of_pool("openai").lease() as key, client.lease() as other:
            assert (key.secret, other.secret) == (SECRET, "in-default")
            assert fake.pool("openai").blocked == [SECRET]
        assert fake.blocked == fake.pool("openai").blocked == []
    assert ("POST", "/pools/openai/keys/acquire") in fake.requests
    assert ("POST", "/keys/acquire") in fake.requests  # as older servers have it


@pytest.mark.parametrize("kind", KINDS)
def test_closing_a_pool_leaves_the_client_open_and_closing_the_client_ends_all(kind: str) -> None:
    fake = server_of()
    enter = "__enter__" if kind == "sync" else "__aenter__"
    with Driver(kind, "http://fake", transport=fake) as client:
        openai = client.of_pool("openai")
        client.wait(getattr(openai.pool.lease(), enter)())
        client.wait(openai.pool.close())
        assert fake.pool("openai").blocked == []
        assert client.stats().total == 1
        client.wait(getattr(openai.pool.lease(), enter)())
        assert fake.pool("openai").blocked == [SECRET]
    assert fake.pool("openai").blocked == []


@pytest.mark.parametrize("kind", [KeyPool, AsyncKeyPool])
def test_the_pool_is_an_argument_or_a_variable(kind: type[KeyPool]) -> None:
    assert repr(kind(pool="openai")).endswith("pool='openai')")
    assert repr(kind.from_env({"KEYPOOL_POOL": "openai"})).endswith("pool='openai')")
    assert "pool" not in repr(kind.from_env({"KEYPOOL_POOL": ""}))
    assert "pool" not in repr(kind.from_env({"KEYPOOL_POOL": "openai"}, pool="default"))
    for wrong in ("", "a/b", "..", "Openai", "ö", "x" * 64, "-x"):
        with pytest.raises(ValueError, match="pool's name"):
            kind(pool=wrong)
        with pytest.raises(ValueError, match="pool's name"):
            kind().pool(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_pools_come_change_and_go(kind: str) -> None:
    fake = server_of()
    with Driver(kind, "http://fake", transport=fake) as client:
        made = client.put_pool("mail", block_seconds=10, keepalive_seconds=None)
        assert (made.name, made.total, made.draining) == ("mail", 0, False)
        assert made.settings["keepalive_seconds"] is None
        assert client.change_pool("mail", block_seconds=20).settings["block_seconds"] == 20
        assert client.get_pool("mail").settings["block_seconds"] == 20
        assert client.put_pool("mail").settings["block_seconds"] == 60
        assert [info.name for info in client.pools()] == ["default", "mail", "openai"]
        client.delete_pool("mail")
        for call in (
            client.get_pool,
            client.change_pool,
            client.delete_pool,
            client.of_pool("mail").keepalive,
        ):
            with pytest.raises(UnknownPool):
                call("mail")
        with pytest.raises(PoolNotEmpty):
            client.delete_pool("openai")
        with pytest.raises(PoolFixed):
            client.delete_pool("default", drain=True)
        with pytest.raises(ValueError, match="drain"):
            client.delete_pool("openai", now=True)
        with client.of_pool("openai").lease():
            client.delete_pool("openai", drain=True)
            assert client.get_pool("openai").draining
            with pytest.raises(PoolDraining):
                client.of_pool("openai").acquire()
            with pytest.raises(PoolDraining):
                client.of_pool("openai").import_key("sk-other")
        with pytest.raises(UnknownPool):
            client.get_pool("openai")
        with pytest.raises(SecretsKeyRequired):
            client.rekey()


@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_that_was_deleted_by_a_lost_call_is_deleted(kind: str) -> None:
    fake = FakeServer(pools={"openai": []})
    transport = Losing(fake)
    with Driver(kind, "http://fake", transport=transport) as client:
        client.delete_pool("openai")
        assert transport.lost
        with pytest.raises(UnknownPool):
            client.delete_pool("openai")


class Losing(httpx2.BaseTransport, httpx2.AsyncBaseTransport):
    """Loses the first answer."""

    def __init__(self, inner: FakeServer) -> None:
        self.inner = inner
        self.lost = False

    def _lose(self) -> None:
        if not self.lost:
            self.lost = True
            raise httpx2.ReadError("lost")

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = self.inner.handle_request(request)
        self._lose()
        return response

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await self.inner.handle_async_request(request)
        self._lose()
        return response


# ------------------------------------------------------------------------------------ what is known about keys


@pytest.mark.parametrize("kind", KINDS)
def test_a_holder_gets_the_data_and_nothing_shows_it(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    fake = server_of()
    with Driver(kind, "http://fake", transport=fake) as client:
        openai = client.of_pool("openai")
        made = client.generate()
        with openai.lease() as key:
            assert (key.name, key.data["user"], key.data["limit"]) == ("acct-17", USER, 5)
            assert (key.expires_in, key.hint) == (None, "sk-l…cdef")
            key.error(f"{USER} with {SECRET} was refused")
            shown: list[object] = [key, vars(key)["_report"]]
        row = openai.get(key.id)
        assert (row.name, row.labels, row.expires_in) == ("acct-17", {"region": "eu"}, None)
        assert row.reason == "… with sk-l…cdef was refused"
        with pytest.raises(Exception, match="given back"):
            _ = key.data
        with client.lease() as plain:
            assert (plain.name, plain.data) == (None, {})
        leased, revealed = openai.acquire(), openai.reveal(key.id)
        assert leased.data == revealed.data == ITEM["data"]
        assert hash(leased)
        shown += [leased, revealed, row, openai.pools(), openai.import_many([ITEM]), made]
    for text in (SECRET, USER):
        assert text not in caplog.text
        assert not [each for each in shown if text in f"{each!r} {each!s}"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_key_is_imported_found_changed_and_replaced(kind: str) -> None:
    fake = FakeServer(pools={"openai": []})
    with Driver(kind, "http://fake", transport=fake, pool="openai") as pool:
        made = change_one_key(pool)
        with pytest.raises(ValueError, match="give one"):
            pool.update(made.id)
        pool.import_key("sk-4", name="acct-4")
        pool.import_key("sk-3", name="acct-3")
        assert [row.name for row in pool.rows(name="acct-")] == ["acct-3", "acct-4"]
    assert not [path for _, path in fake.requests if "sk-" in path]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_that_purges_takes_imports_only_if_that_is_allowed(kind: str) -> None:
    fake = FakeServer()
    with Driver(kind, "http://fake", transport=fake) as pool:
        with pytest.raises(KeysWouldExpire):
            pool.import_key(SECRET)
        with pytest.raises(KeysWouldExpire):
            pool.import_many([SECRET])
        assert pool.import_key(SECRET, expire=True).expires_in == pytest.approx(300, 0.1)
        assert pool.import_many([SECRET, "sk-other"], expire=True).created == 1


@pytest.mark.parametrize("kind", KINDS)
def test_many_are_imported_in_order(kind: str) -> None:
    fake = FakeServer(pools={"openai": [(SECRET, "acct-17")]})
    counts: list[int] = []
    items: list[Any] = [
        "sk-1",
        ("sk-2", "acct-2"),
        {"secret": "sk-3", "labels": {"a": "b"}, "data": None},
        ("sk-4", "acct-17"),
        "sk-1",
        SECRET,
        "",
    ]
    with Driver(kind, "http://fake", transport=fake, pool="openai") as pool:
        done = pool.import_many(iter(items), progress=counts.append)
        statuses = [result.status for result in done.results]
        assert statuses == ["created", "created", "created", "failed", "duplicate", "existed", "failed"]
        assert [result.code for result in done.results if result.code] == ["name-taken", "bad-request"]
        assert (done.created, done.existed, done.duplicate, done.failed) == (3, 1, 1, 2)
        assert counts == [7]
        assert pool.import_many([("sk-1", "acct-1")], exists="update").updated == 1
        assert pool.find("sk-1").name == "acct-1"
        assert pool.import_many([]).results == []
        many = [f"sk-{number:06}" for number in range(1200)]
        assert pool.import_many(many, progress=counts.append).created == 1200
        assert counts[1:] == [1000, 1200]
        pool.put_pool("openai", keepalive_seconds=None, max_keys=1700)
        with pytest.raises(PoolFull) as full:
            pool.import_many([*many[:1000], *(f"{text}-x" for text in many)])
        assert full.value.partial.existed == 1000


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_answer_to_an_import_is_repeated_and_says_so(kind: str) -> None:
    for call, done in (("import_key", "existed"), ("import_many", "existed")):
        fake = FakeServer(pools={"openai": []})
        with Driver(kind, "http://fake", transport=Losing(fake), pool="openai", retry=QUICK) as pool:
            result = getattr(pool, call)(SECRET if call == "import_key" else [SECRET])
            assert (getattr(result, done), result.repeated) == (True, True)
            assert fake.pool("openai").keys == [SECRET]


@pytest.mark.parametrize(
    ("item", "says"),
    [
        (17, "a tuple"),
        ((), "a tuple"),
        (("a", "b", {}, {}, {}, 5, "f"), "a tuple"),
        (("a", "b", {}, {}, {}, "e"), "seats is a whole number"),
        ({"name": SECRET}, "has a secret"),
        ({"secret": SECRET, "nmae": "x"}, "'nmae'"),
        ({SECRET: "acct-17"}, "nothing else"),
        ({"secret": SECRET.encode()}, "secret is a string, not bytes"),
        ({"secret": SECRET, "labels": {"a": 1}}, "dict of strings"),
        ({"secret": SECRET, "data": [USER]}, "data is a dict"),
        ({"secret": SECRET, "data": {USER: {1, 2}}}, "as JSON"),
        ({"secret": SECRET, "data": {USER: float("nan")}}, "as JSON"),
        ({"secret": f"{SECRET}\udc80"}, "UTF-8"),
    ],
)
def test_a_wrong_item_is_named_by_its_number_before_anything_is_sent(item: Any, says: str) -> None:
    fake = FakeServer(pools={"openai": []})
    with KeyPool(transport=fake, pool="openai") as pool:
        with pytest.raises(ValueError, match="item 1501") as refused:
            pool.import_many([*(f"sk-{number}" for number in range(1501)), item])
        assert says in str(refused.value)
        assert SECRET not in repr(refused.value)
        assert USER not in repr(refused.value)
        assert not refused.value.__cause__
    assert not fake.requests


def test_bodies_of_imports_stay_below_what_the_server_takes() -> None:
    """1000 items may be more than 4 MiB; one that is larger by itself fails alone."""
    fake = FakeServer(pools={"openai": []})
    sizes: list[int] = []

    class Measured(httpx2.BaseTransport):
        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            sizes.append(len(request.read()))
            return fake.handle_request(request)

    items = [(f"{number:04}{'ü' * 2000}", None, None, {"x": "y" * 4000}) for number in range(1200)]
    with KeyPool(transport=Measured(), pool="openai") as pool:
        done = pool.import_many([*items[:5], "x" * (MOST_BYTES + 1), *items[5:]])
    assert len(sizes) == 3
    assert max(sizes) <= MOST_BYTES
    assert (done.created, done.failed) == (1200, 1)
    assert done.results[5] == Imported("failed", None, "payload-too-large", done.results[5].detail)
    assert done.results[6].id == done.results[4].id + 1  # type: ignore[operator]
    assert len(done.results) == 1201


# ------------------------------------------------------------------------------------------------ rules without I/O


def test_a_spent_share_is_waited_for_as_a_key_is() -> None:
    steps = perform(acquire("me", 30), Settings.of())
    step = next(steps)
    problem = {
        "type": "urn:keypool:problem:share-spent",
        "code": "share-spent",
        "detail": "2 leases",
        "retry_after": 9.0,
    }
    assert isinstance(step, Send)
    step = steps.send(Answer(429, {}, json.dumps(problem).encode()))
    assert isinstance(step, Pause)  # the server answered at once, although it might have waited
    assert isinstance(steps.send(None), Send)
    steps = perform(acquire("me", 0), Settings.of())
    next(steps)
    with pytest.raises(ShareSpent) as spent:
        steps.send(Answer(429, {}, json.dumps(problem).encode()))
    assert (spent.value.retry_after, spent.value.may_have_happened) == (9.0, False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gets_as_many_as_the_share_has(kind: str) -> None:
    """It is an error only if the first of its calls gets none."""
    fake = FakeServer([f"key-{number}" for number in range(1500)])

    def spend(done: int) -> None:
        fake.fail(429, "share-spent", retry_after=1.5)

    with Driver(kind, "http://fake", transport=fake) as pool:
        assert len(pool.wait(pool.pool.acquire_many(1500, progress=spend))) == 1000
        spend(0)
        with pytest.raises(ShareSpent) as spent:
            pool.wait(pool.pool.acquire_many(2))
        assert spent.value.retry_after == 1.5


def test_a_keeper_sends_nothing_for_keys_that_never_expire() -> None:
    """Those that say so are left out; in a pool where no key expires, others are sent once."""
    fake = FakeServer(pools={"openai": ["sk-1", "sk-2"]})
    with KeyPool(transport=fake, pool="openai") as pool:
        leased = pool.acquire()
        assert leased.expires_in is None
        with pool.keeper([leased]) as keeper:
            keeper.add(pool.generate())
            assert keeper.keys == []
    assert not [path for _, path in fake.requests if path.endswith(("batch", "keepalive"))]

    settings = Settings.of(pool="openai")
    rounds = Rounds(settings, ["sk-1"])
    steps = rounds.steps()
    assert isinstance(next(steps), Send)  # the batch
    assert isinstance(steps.send(answer(done=1, unknown=[])), Send)  # the single one, for the time
    assert steps.send(answer(id=1, expires_in=None)) == Pause(None)
    rounds.add("sk-2")  # its time is asked for again: the pool's setting may be another by now
    assert isinstance(steps.send(None), Send)
    assert isinstance(steps.send(answer(done=1, unknown=[])), Send)
    pause = steps.send(answer(id=1, expires_in=30.0))
    assert isinstance(pause, Pause)
    assert 8 < (pause.seconds or 0) <= 10


def test_a_keeper_follows_the_setting_of_its_pool() -> None:
    """Each whole round asks for the time again, as another pool than `default` may be given a shorter one."""
    rounds = Rounds(Settings.of(pool="openai"), ["sk-1"])
    for _ in range(2):
        steps = rounds.steps()
        next(steps)
        assert isinstance(steps.send(answer(done=1, unknown=[])), Send)
        assert isinstance(steps.send(answer(id=1, expires_in=300.0)), Pause)


def test_a_keeper_of_a_pool_that_is_gone_stops() -> None:
    rounds = Rounds(Settings.of(pool="openai"), ["sk-1"])
    steps = rounds.steps()
    next(steps)
    with pytest.raises(StopIteration):
        steps.throw(UnknownPool("gone"))


def answer(**members: Any) -> Answer:
    return Answer(200, {}, json.dumps(members).encode())


@pytest.mark.parametrize("kind", KINDS)
def test_a_lease_of_a_key_that_never_expires_needs_no_keeper(kind: str) -> None:
    fake = server_of()
    with Driver(kind, "http://fake", transport=fake, pool="openai") as pool, pool.lease() as key:
        assert pool.pool._lease_keeper is None
        assert not key.expires_first


@pytest.mark.parametrize("kind", KINDS)
def test_the_leases_of_all_pools_share_one_keeper(kind: str) -> None:
    """Leases of three pools are extended and their keys kept alive; a pool that is gone stops nobody else."""
    # A machine that stands still for the most of a block loses them all.
    assert any(_held_for_three_blocks(kind, seconds) for seconds in (2, 6, 15))


def _held_for_three_blocks(kind: str, seconds: float) -> bool:
    """Whether the leases of two pools last for three blocks of so many seconds, and three lives."""
    times: Any = {"block_seconds": seconds, "max_block_seconds": 30 * seconds, "keepalive_seconds": seconds}
    fake = FakeServer(["in-default"], **times)
    with (
        contextlib.suppress(LeaseLost, NoKeyAvailable),
        Driver(kind, "http://fake", transport=fake) as client,
        contextlib.ExitStack() as stack,
    ):
        held = [stack.enter_context(client.lease(extend=True))]
        for name in ("one", "two"):
            client.put_pool(name, **times)
            client.of_pool(name).import_key(SECRET, expire=True)
            held.append(stack.enter_context(client.of_pool(name).lease(extend=True)))
        assert [key.pool for key in held] == ["default", "one", "two"]
        keeper: Any = client.pool._lease_keeper
        assert [client.pool.pool(name)._lease_keeper for name in ("one", "two")] == [None, None]
        if sorted(keeper.keys) != sorted(key.handle for key in held):
            assert any(key.over for key in held)
            return False
        client.delete_pool("one", drain=True, now=True)
        ends = time.monotonic() + 3 * seconds
        while time.monotonic() < ends:
            client.wait(asyncio.sleep(0.05)) if kind == "async" else time.sleep(0.05)
        if held[0].over or held[2].over:
            return False
        assert held[1].over
        with pytest.raises(LeaseLost):
            client.wait(held[1].release())
        assert keeper.running
        stack.close()
        assert fake.blocked == fake.pool("two").blocked == []
        return True
    return False


@pytest.mark.parametrize("failure", [Unauthorized("no"), UnknownPool("gone")])
def test_a_pool_whose_keeper_stops_is_forgotten_until_it_is_needed_again(failure: KeyPoolError) -> None:
    rounds = LeaseRounds(Settings.of())
    steps = rounds.steps()
    assert next(steps) == Pause(None)
    rounds.add("sk-1")
    assert isinstance(steps.send(None), Send)
    assert steps.throw(failure) == Pause(None)
    assert rounds.keys == []
    rounds.add("sk-2")
    assert isinstance(steps.send(None), Send)
    assert isinstance(steps.throw(Unreachable("away")), Pause)
    assert isinstance(rounds.error, Unreachable)
    with pytest.raises(PoolClosed):
        steps.throw(PoolClosed("closed"))


def test_the_fake_pool_lends_a_key_with_seats_to_several() -> None:
    """A report of one is about all of them; the text alone names none."""
    fake = FakeServer(pools={"openai": []})
    with KeyPool(transport=fake, pool="openai") as pool:
        made = pool.import_key(SECRET, seats=3)
        assert len(made.ids) == 3
        one, two = pool.acquire(), pool.acquire()
        assert {one.secret, two.secret} == {SECRET}
        with pytest.raises(ManySeats):
            pool.unblock(SECRET)
        assert pool.keepalive_many([SECRET]).many_seats == [SECRET]
        assert pool.unblock(SECRET, lease=one.lease).id == one.id
        pool.unblock(two, outcome="rate_limited", retry_after=100)
        rows = list(pool.rows())
        assert [(row.state, row.seat, row.seats) for row in rows] == [("cooling", n, 3) for n in (1, 2, 3)]
        assert pool.update(made.id, seats=2).seats == 2
        pool.delete(f"id:{made.id}")
        assert not list(pool.rows())


@pytest.mark.parametrize("kind", KINDS)
def test_seats_that_a_client_holds_are_each_kept_alive(kind: str) -> None:
    """Two leases of one text are two keys, each with a TTL of its own."""
    fake = FakeServer()
    with Driver(kind, "http://fake", transport=fake) as client, contextlib.ExitStack() as stack:
        client.put_pool("one", block_seconds=400, keepalive_seconds=300)  # so a lease needs keepalives
        client.of_pool("one").import_key(SECRET, seats=2, expire=True)
        imported = [key.expires for key in fake.pool("one").live()]
        held = [stack.enter_context(client.of_pool("one").lease()) for _ in range(2)]

        def kept() -> bool:
            client.stats()  # an asynchronous keeper goes on meanwhile
            return all(key.expires > max(imported) for key in fake.pool("one").live())

        eventually(kept, "both seats to be kept alive", within=30)
        keeper: Any = client.pool._lease_keeper
        assert sorted(keeper.keys) == sorted(key.handle for key in held)
        assert not keeper.error


def test_a_keeper_reports_a_text_of_several_seats_once_and_keeps_the_others() -> None:
    """Which would otherwise expire without a word."""
    errors: list[KeyPoolError] = []
    rounds = Rounds(Settings.of(), ["sk-1", "sk-2", "sk-3"], on_error=errors.append)
    steps = rounds.steps()
    assert isinstance(next(steps), Send)
    done = {"done": 2, "unknown": [], "stale": [], "many_seats": ["sk-1"]}
    assert isinstance(
        steps.send(Answer(200, {}, json.dumps(done).encode())), Send
    )  # the keepalive of one key
    assert isinstance(steps.throw(ManySeats("2 seats")), Send)  # sk-2 got another one meanwhile
    assert isinstance(steps.send(Answer(200, {}, b'{"id": 3, "expires_in": 300.0}')), Pause)
    assert [type(error) for error in errors] == [ManySeats, ManySeats]
    assert "sk-1" not in str(errors[0])
    assert rounds.keys == {"sk-3": "sk-3"}
    assert rounds.error is None


def test_the_fake_pool_takes_seats_away_as_their_leases_end() -> None:
    """Whether by deadline or by an operator; then the row is that of a seat which is left."""
    fake = FakeServer(pools={"openai": []})
    with KeyPool(transport=fake, pool="openai") as pool:
        first = pool.import_key(SECRET, name="acct", seats=4).id
        pool.acquire_many(4)
        assert pool.update(first, seats=1).seats == 4
        assert pool.quarantine(first, now=True).seats == 1
        assert pool.restore(SECRET).state == "available"
        pool.update(SECRET, seats=3)
        pool.acquire_many(3)
        pool.update(SECRET, seats=1)
        fake.advance(3600)
        assert [row.state for row in pool.rows()] == ["available"]


def test_seats_of_the_fake_pool_move_and_are_counted_together() -> None:
    """As one secret, in the counts of cooldowns and quarantines; a seat that is added is where the others are."""
    fake = FakeServer(pools={"openai": []})
    with KeyPool(transport=fake, pool="openai") as pool:
        pool.import_key(SECRET, name="acct", seats=3)
        pool.import_key("sk-other", name="acct-2")
        one = next(key for key in pool.acquire_many(4) if key.secret == SECRET)
        pool.unblock(one, outcome="rate_limited", retry_after=100)
        pool.update(one.id, seats=4)
        fake.advance(60)  # the leases of the others end
        assert [row.state for row in pool.rows() if row.name == "acct"] == ["cooling"] * 4
        assert [row.seats for row in pool.rows(name="acct")] == [4, 1]
        pool.quarantine(SECRET)
        stats = pool.stats()
        assert (stats.cooled, stats.quarantines, stats.quarantined) == (1, 1, 4)
