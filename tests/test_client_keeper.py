"""The keeper: keys stay alive at the promised cost, dead ones are reported, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from client_support import KINDS, Proxy, clean, ports_in_a_row, started, url_of
from conftest import Start
from support import ServerProcess, eventually

from keypool.client import AsyncKeyPool, KeyPool, KeyPoolError, Retry, Unauthorized, Unreachable
from keypool.client.attempts import Answer, Pause, Send
from keypool.client.rounds import Rounds
from keypool.client.settings import Settings
from keypool.config.settings import load
from keypool.core.errors import SettingsError

LIFE = 5.0
"""Keepalive seconds. A round comes every third of it, so a key dies only when this process, or the server, is kept
from the processor for two thirds: 3 s, which a busy machine does not do, where it does do 1 s."""


def durable(path: Path) -> list[str]:
    """The flags that make a server keep its keys; skips the test while there is no such server."""
    flags = [f"--data={path / 'keys.db'}"]
    try:
        load(flags, {})
    except SettingsError as error:
        pytest.skip(f"this server has no data file yet: {error}")
    return flags


class Kept:
    """A keeper of one of the kinds at work. The asynchronous ones run in a thread with their loop."""

    def __init__(self, kind: str, url: str, keys: list[Any], **options: Any) -> None:
        self.dead: list[str] = []
        self.errors: list[Exception] = []
        self._token = options.pop("token", None)
        options |= {"on_dead": self.dead.append, "on_error": self.errors.append}
        self._stop = threading.Event()
        self._ready = threading.Event()
        self.keeper: Any = None
        target: Callable[..., object] = (
            self._sync if kind == "sync" else lambda *a: asyncio.run(self._async(*a))
        )
        self._thread = threading.Thread(target=target, args=(url, keys, options))

    def _sync(self, url: str, keys: list[Any], options: dict[str, Any]) -> None:
        with KeyPool(url, self._token) as pool, pool.keeper(keys, **options) as self.keeper:
            self._ready.set()
            self._stop.wait()

    async def _async(self, url: str, keys: list[Any], options: dict[str, Any]) -> None:
        async with AsyncKeyPool(url, self._token) as pool, pool.keeper(keys, **options) as self.keeper:
            self._ready.set()
            await asyncio.to_thread(self._stop.wait)
        assert len(asyncio.all_tasks()) == 1

    def __enter__(self) -> Kept:
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(20)
        assert not self._thread.is_alive()
        assert not self.keeper.running


@pytest.mark.parametrize("kind", KINDS)
def test_keys_live_on_and_dead_ones_are_reported_once(start_server: Start, kind: str) -> None:
    server = start_server(f"--keepalive-seconds={LIFE}")
    with KeyPool(url_of(server)) as pool:
        kept, left = pool.generate_many(20), pool.generate()
        with Kept(kind, url_of(server), [*kept, "never-there"]) as work:
            eventually(lambda: work.dead == ["never-there"], "the key that never was to be told")
            work.keeper.discard(kept[1])
            work.keeper.discard("unheard of")
            # After a whole keepalive time since it was made, and since it was discarded.
            eventually(lambda: pool.stats().expired == 2, "the key that nobody keeps, and the discarded one")
            assert pool.stats().total == 19
            assert work.dead == ["never-there"]
            pool.delete(kept[0])
            eventually(lambda: len(work.dead) == 2, "the deleted key to be told")
            assert work.dead[1] == kept[0].secret
            assert sorted(work.keeper.keys) == sorted(key.secret for key in kept[2:])
            assert not work.errors
        assert left.secret not in work.dead
        assert len(work.dead) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_added_as_one_goes(start_server: Start, kind: str) -> None:
    server = start_server(f"--keepalive-seconds={LIFE}")
    with KeyPool(url_of(server)) as pool, Kept(kind, url_of(server), []) as work:
        made = pool.generate()
        if kind == "sync":
            work.keeper.add(made)
        else:
            loop = work.keeper._task.get_loop()
            loop.call_soon_threadsafe(work.keeper.add, made)
        eventually(lambda: pool.stats().kept_alive >= 6, "several rounds", within=60)
        assert pool.get(made).id == made.id


def test_a_thousand_keys_cost_one_call_a_third_of_the_keepalive_time(start_server: Start) -> None:
    """Counted in calls, not in time: however slow the machine, each round is one call."""
    server = start_server("--keepalive-seconds=6")
    with KeyPool(url_of(server)) as pool, Proxy(server) as proxy:
        made = pool.generate_many(1000)
        began = time.monotonic()
        with Kept("sync", proxy.url, made):
            eventually(lambda: len(proxy.requests) >= 5, "some rounds", within=60)
            calls = len(proxy.requests)
            took = time.monotonic() - began
        assert pool.stats().total == 1000
    # The first round has one call more, which asks how long the keepalive time is.
    singles = [line for line in proxy.requests if "/keepalive" in line]
    assert len(singles) == 1
    assert calls - 1 <= took / (0.9 * 6 / 3) + 1


def test_a_failed_round_is_tried_again_until_it_works(start_server: Start) -> None:
    server = start_server("--keepalive-seconds=12")
    with KeyPool(url_of(server)) as pool, Proxy(server) as proxy:
        made = pool.generate_many(3)
        proxy.faults[:] = ["502", "lose", "garbage", "503"]
        with Kept("sync", proxy.url, made) as work:
            eventually(
                lambda: pool.stats().kept_alive >= 4 and work.keeper.error is None, "a round that works"
            )
        assert len(work.errors) == 4
        assert not work.dead


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_it_survives_a_restart_and_reports_lost_keys(start_server: Start, kind: str) -> None:
    """A server in memory forgets its keys: the keeper goes on until it is back, and then reports each."""
    port = ports_in_a_row(1)
    first = start_server(f"--port={port}", f"--keepalive-seconds={LIFE}")
    with KeyPool(url_of(first)) as pool:
        made = pool.generate_many(3)
        with Kept(kind, url_of(first), made) as work:
            eventually(lambda: pool.stats().kept_alive >= 4, "a first round")
            first.finish()
            eventually(lambda: work.errors, "a round that fails")
            start_server(f"--port={port}", f"--keepalive-seconds={LIFE}")
            eventually(lambda: len(work.dead) == 3, "the dead keys to be told")
            assert work.keeper.running
            assert sorted(work.dead) == sorted(key.secret for key in made)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_keys_survive_a_restart_with_a_keeper(start_server: Start, tmp_path: Path, kind: str) -> None:
    flags = [*durable(tmp_path), f"--port={ports_in_a_row(1)}", "--keepalive-seconds=10"]
    first = start_server(*flags)
    with KeyPool(url_of(first), retry=Retry(30)) as pool:
        made = pool.generate_many(3)
        with Kept(kind, url_of(first), made) as work:
            eventually(lambda: pool.stats().kept_alive >= 4, "a first round")
            first.finish()
            start_server(*flags)
            before = pool.stats().kept_alive
            eventually(lambda: pool.stats().kept_alive >= before + 6, "rounds after the restart", within=60)
            assert not work.dead
            assert pool.stats().total == 3


def test_stopping_does_not_wait_for_a_silent_server(
    server: ServerProcess, caplog: pytest.LogCaptureFixture
) -> None:
    with Proxy(server) as proxy:
        proxy.faults[:] = ["mute"]
        with KeyPool(proxy.url, timeout=300) as pool:
            keeper = pool.keeper(["some-key"]).start()
            eventually(lambda: len(proxy.requests) == 1, "a call under way")
            keeper.stop()
            keeper.stop()
            assert not keeper.running
            assert keeper.error is None
            assert not caplog.messages
            with pytest.raises(KeyPoolError, match="once"):
                keeper.start()


def test_a_callback_that_fails_is_logged_and_no_more(
    server: ServerProcess, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(key: str) -> None:
        raise ZeroDivisionError

    with KeyPool(url_of(server)) as pool:
        made = pool.generate()
        with pool.keeper(["dead", made], on_dead=fail) as keeper:
            eventually(lambda: keeper.keys == [made.secret], "the dead key to go")
            eventually(lambda: pool.stats().kept_alive >= 2, "the other one")
            assert keeper.running
    assert "callback" in caplog.text
    clean(server)


@pytest.mark.parametrize("how", ["exit", "fork"])
def test_no_thread_keeps_a_program_from_ending(server: ServerProcess, how: str) -> None:
    """With a keeper that is not stopped; a forked child has none, and does not wait for one."""
    code = (
        "import os, sys\nfrom keypool.client import KeyPool\n"
        "keeper = KeyPool(os.environ['KEYPOOL_URL']).keeper(['x', 'y']).start()\n"
    )
    if how == "fork":
        code += "if os.fork() == 0:\n    assert not keeper.running\n    keeper.stop()\n    sys.exit(7)\n"
        code += "assert os.waitstatus_to_exitcode(os.wait()[1]) == 7\n"
    with started(server, ["-W", "ignore", "-c", code + "assert keeper.running\nprint('end')"]) as process:
        assert process.stdout is not None
        assert process.stdout.read() == "end\n"
        assert process.wait(60) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_pool_goes_on_in_a_forked_child(server: ServerProcess) -> None:
    """Parent and child each have connections of their own: answers don't get mixed up."""
    code = """
import os
from keypool.client import KeyPool
pool = KeyPool(os.environ["KEYPOOL_URL"])
mine = pool.generate()
children = []
for _ in range(3):
    if (child := os.fork()) == 0:
        for _ in range(50):
            row = pool.get(mine)
            assert row.id == mine.id
        made = pool.generate()
        assert pool.get(made).id == made.id
        os._exit(0)
    children.append(child)
for _ in range(50):
    assert pool.stats().total >= 1
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
assert pool.get(mine).id == mine.id
print("end")
"""
    with started(server, ["-W", "ignore", "-c", code]) as process:
        assert process.stdout is not None
        assert process.stdout.read() == "end\n"
    clean(server)


def test_rounds_without_any_server() -> None:
    """The rule alone: batches of a thousand, a pause of a third less a tenth at most, shorter after a failure."""
    rounds = Rounds(Settings.of(), [f"key-{number}" for number in range(2500)], keepalive_seconds=300.0)
    steps = rounds.steps()
    step = next(steps)
    sizes = []
    for unknown in ([], [], ["key-2400"]):
        assert isinstance(step, Send)
        keys = json.loads(step.body or b"")["keys"]
        sizes.append(len(keys))
        done = {"done": len(keys) - len(unknown), "unknown": unknown}
        step = steps.send(Answer(200, {}, json.dumps(done).encode()))
    assert sizes == [1000, 1000, 500]
    assert isinstance(step, Pause)
    assert "key-2400" not in rounds.keys
    assert {90 <= rounds.pause() <= 100 for _ in range(50)} == {True}
    rounds.add("one-more")
    assert isinstance(steps.send(None), Send)
    pause = steps.throw(Unreachable("away"))
    assert isinstance(pause, Pause)
    assert 0 < (pause.seconds or 0) <= 5
    rounds.add("another")
    assert isinstance(steps.send(None), Send)
    with pytest.raises(StopIteration):
        steps.throw(Unauthorized("no"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_token_stops_the_keeper(guarded_server: ServerProcess, kind: str) -> None:
    with Kept(kind, url_of(guarded_server), ["some-key"], token="wrong-token-0123456789") as work:
        eventually(lambda: work.keeper.running is False, "the keeper to stop")
        assert isinstance(work.keeper.error, Unauthorized)
        assert [type(error) for error in work.errors] == [Unauthorized]
