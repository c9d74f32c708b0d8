"""docs/client.md: every Python block is run as it stands, in order, in one program; and the pool for users' tests."""

from __future__ import annotations

import re

import httpx2
import pytest
from client_support import KINDS, Driver, clean, started
from support import ROOT, ServerProcess

from keypool.client import (
    BlockLimit,
    KeyPool,
    LeaseOver,
    NoKeyAvailable,
    Refused,
    StaleLease,
    UnknownKey,
    Unreachable,
)
from keypool.client.testing import FakeServer

GUIDE = ROOT / "docs" / "client.md"
PRELUDE = """
import asyncio
from types import SimpleNamespace
from keypool.client import KeyPool as _KeyPool

_pool = _KeyPool.from_env()
used = []
use = used.append
_work = [1]
work_is_left = lambda: _work and _work.pop()

def ask(secret):
    use(secret)
    return SimpleNamespace(status_code=429, headers={"Retry-After": "0"})

async def use_async(secret):
    use(secret)

_pool.generate_many(3)
"""
EPILOGUE = """
asyncio.run(work())
_pool.close()
assert len(used) == 8, used
print("end")
"""


def test_every_block_of_the_guide_runs(server: ServerProcess) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    program = "\n".join([PRELUDE, *(f"pool = _pool\n{block}" for block in blocks), EPILOGUE])
    with started(server, ["-W", "error", "-X", "dev", "-c", program]) as process:
        output, errors = process.communicate(timeout=60)
        assert output.endswith("end\n"), errors
        assert process.returncode == 0
    clean(server)


# ------------------------------------------------------------------------------------------------- FakeServer


@pytest.mark.parametrize("kind", KINDS)
def test_the_fake_pool_behaves_as_the_server_does(kind: str) -> None:
    fake = FakeServer(["first", "second"])
    with Driver(kind, "http://fake", transport=fake) as pool:
        made = pool.generate()
        assert sorted(fake.keys) == sorted(["first", "second", made.secret])
        with pool.lease() as key:
            assert fake.blocked == [key.secret]
            assert pool.get(key.secret).lease == key.lease == 1
            assert [row.id for row in pool.rows(state="blocked")] == [key.id]
        assert fake.blocked == []
        keys = pool.wait(pool.pool.acquire_many(5))
        assert len(keys) == 3
        with pytest.raises(NoKeyAvailable):
            pool.acquire(wait=0.02)
        with pytest.raises(StaleLease):
            pool.unblock(keys[0].secret, 99)
        done = pool.unblock_many([*keys, "nobody"])
        assert (done.done, done.unknown) == (3, ["nobody"])
        assert pool.keepalive_many(["first", "nobody"]).unknown == ["nobody"]
        pool.delete("first")
        for call in (pool.get, pool.keepalive, pool.delete):
            with pytest.raises(UnknownKey):
                call("first")
        assert pool.reveal(made.id).secret == made.secret
        assert pool.stats().total == 2
        assert fake.requests[:2] == [("POST", "/keys"), ("POST", "/keys/acquire")]
        fake.advance(301)
        assert pool.stats().expired == 2
        assert fake.keys == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_fake_pool_looks_after_keys_as_the_server_does(kind: str) -> None:
    fake = FakeServer(["key-1", "key-2", "key-3"], max_block_seconds=600, error_threshold=2)
    with Driver(kind, "http://fake", transport=fake) as pool:
        first, second, third = pool.wait(pool.pool.acquire_many(3))
        assert pool.unblock(first, outcome="rate_limited", retry_after=90).available_in == pytest.approx(
            90, 0.1
        )
        assert pool.unblock(first, outcome="rate_limited", retry_after=1).changed is False
        assert pool.unblock(second, outcome="invalid", reason="401").state == "quarantined"
        guarded = pool.unblock(third, outcome="invalid")
        assert (guarded.state, guarded.guarded) == ("cooling", True)
        with pytest.raises(NoKeyAvailable) as none:
            pool.acquire()
        assert (none.value.blocked, none.value.cooling, none.value.quarantined) == (0, 2, 1)
        assert 0 < (none.value.retry_after or 0) <= 60
        fake.advance(60)
        assert fake.cooling == [first.secret]
        with pool.lease(block_seconds=10) as key:
            assert key.secret == third.secret
            pool.wait(key.extend(100))
            fake.advance(50)
            assert fake.blocked == [third.secret]
            for call in (pool.get, pool.keepalive, pool.unblock, pool.extend):
                with pytest.raises(StaleLease):
                    call(third)
            with pytest.raises(BlockLimit):
                pool.extend(key, 5)
            key.error()
        assert fake.cooling == [third.secret]  # the second failure in a row
        assert fake.reports[-1] == (third.secret, "error")
        with pytest.raises(LeaseOver):
            pool.extend(key)
        row = pool.get(second)
        assert (row.outcome, row.reason, row.failures) == ("invalid", "401", 0)
        assert pool.restore_many([second, third]).done == 2
        assert pool.quarantine(second, "by hand", now=True).reason == "by hand"
        assert fake.quarantined == [second.secret]
        with pytest.raises(Refused, match="outcome"):
            pool.unblock(third.secret, outcome="ok")
        with pytest.raises(UnknownKey):
            pool.get("h:1.1.AAAAAAAAAAA")
        stats = pool.stats()
        assert (stats.total, stats.quarantined, stats.quarantines, stats.restored, stats.cooled) == (
            3,
            1,
            2,
            2,
            3,
        )


def test_the_fake_pool_knows_a_repeated_acquire() -> None:
    fake = FakeServer(["key-1", "key-2"])
    with KeyPool(transport=_Forgetful(fake), retry=3) as pool:
        assert pool.acquire().lease == 1
        assert len(fake.blocked) == 1


class _Forgetful(httpx2.BaseTransport):
    """Loses the first answer."""

    def __init__(self, inner: httpx2.BaseTransport) -> None:
        self.inner = inner
        self.lost = False

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = self.inner.handle_request(request)
        if not self.lost:
            self.lost = True
            raise httpx2.ReadError("lost")
        return response


@pytest.mark.parametrize("kind", KINDS)
def test_the_fake_pool_fails_on_request(kind: str) -> None:
    fake = FakeServer(["first"])
    with Driver(kind, "http://fake", transport=fake) as pool:
        fake.fail(httpx2.ConnectError("refused"))
        fake.fail(503, "draining")
        assert pool.acquire().secret == "first"
        fake.fail(500)
        with pytest.raises(Refused) as refused:
            pool.stats()
        assert refused.value.code == "internal"
    fake.fail(httpx2.ConnectError("refused"))
    with Driver(kind, "http://fake", transport=fake, retry=0) as pool, pytest.raises(Unreachable):
        pool.stats()


def test_waiting_for_a_key_of_the_fake_pool() -> None:
    fake = FakeServer(["first"], block_seconds=0.1)
    with KeyPool(transport=fake) as pool:
        pool.acquire()
        assert pool.acquire(wait=None).lease == 2


def test_any_transport_of_httpx2_will_do() -> None:
    """MockTransport, for programs that define every answer themselves. A lease costs two requests.

    A transport is closed with its client, and not before, though a keeper shares it.
    """
    paths = []
    closed: tuple[str, ...] = ()

    class Mock(httpx2.MockTransport):
        def close(self) -> None:
            nonlocal closed
            closed += ("sync",)

        async def aclose(self) -> None:
            nonlocal closed
            closed += ("async",)

    def answer(request: httpx2.Request) -> httpx2.Response:
        paths.append(request.url.path)
        if request.url.path.endswith("acquire"):
            return httpx2.Response(
                200, json={"id": 1, "key": "k", "lease": 7, "release_in": 60, "expires_in": 300}
            )
        done = {"id": 1, "state": "available", "changed": True, "done": 1, "unknown": []}
        return httpx2.Response(200, json=done)

    for kind in KINDS:
        mock = Mock(answer)
        with Driver(kind, "http://mock/api/v1", transport=mock) as pool, pool.lease() as key:
            if kind == "sync":
                pool.keeper(["k"]).start().stop()
            assert key.lease == 7
            assert kind not in closed
    assert closed == KINDS
    leases = [path for path in paths if path.endswith(("acquire", "unblock"))]
    assert leases == ["/api/v1/keys/acquire", "/api/v1/keys/k/unblock"] * 2
