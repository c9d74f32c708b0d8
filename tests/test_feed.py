"""The feed: real websockets to a real server."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import Start
from engine_support import Moment, make_engine, on_loop
from support import (
    ADMIN_TOKEN,
    API,
    CLIENT_TOKEN,
    SHORT_BLOCK,
    VIEWER_TOKEN,
    Client,
    ServerProcess,
    encode_request,
    eventually,
)
from viewing import FEED, Closed, Viewer, charts_shown

from keypool.core.answers import Stats
from keypool.core.errors import StorageUnavailable
from keypool.web import feed
from keypool.web.feed import Feed, ViewerLimit
from keypool.web.history import History


@contextmanager
def traffic(server: ServerProcess) -> Iterator[None]:
    """Keys are acquired and unblocked as fast as one client can."""
    stop = threading.Event()

    def work() -> None:
        with Client(server) as client:
            client.make_many(20)
            while not stop.is_set():
                client.batch(op="acquire", count=20, owner="busy").expect(200)
                for _ in range(3):
                    client.batch(op="unblock", keys=[f"id:{number}" for number in range(1, 60)]).expect(200)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)


# --------------------------------------------------------------------------------------------------- frames


def test_the_first_frame_has_the_whole_state(start_server: Start) -> None:
    """A hello: numbers, the charts' history, the latest events, the oldest first, and no key."""
    server = start_server()
    client = server.client()
    made = [client.make() for _ in range(60)]
    with Viewer(server) as viewer:
        hello = viewer.frame()
    assert hello["type"] == "hello"
    assert hello["stats"]["total"] == 60
    assert [event["id"] for event in hello["events"]] == [key["id"] for key in made[10:]]
    assert hello["history"].keys() == {"seconds", "minutes"}
    for series, step in (("seconds", 1), ("minutes", 60)):
        assert hello["history"][series]["step"] == step
        lengths = {len(column) for column in hello["history"][series].values() if isinstance(column, list)}
        assert len(lengths) == 1
    text = str(hello)
    assert not any(key["key"] in text for key in made)


def test_history_goes_on_without_viewers(start_server: Start) -> None:
    """The charts include the time before the first viewer came."""
    server = start_server()
    server.client().make_many(7)

    def generated() -> bool:
        seconds = charts_shown(server)
        return bool(sum(seconds["generated"]) == 7 and seconds["available"][-1] == 7)

    eventually(generated, "a second with seven generated keys")


def test_a_change_is_sent_within_half_a_second(server: ServerProcess, client: Client) -> None:
    """Each change of a key is an event, in order, with the numbers after it."""
    with Viewer(server) as viewer:
        viewer.frame()
        made = []

        def sent_at_once() -> bool:
            made.append(client.make())
            asked = time.monotonic()
            assert [event["event"] for event in viewer.until("delta")["events"]] == ["generated"]
            return time.monotonic() - asked < 0.5

        eventually(sent_at_once, "a change that is sent within half a second")
        for late in made[:-1]:
            client.delete(f"{API}/keys/id:{late['id']}")
            viewer.until("delta")
        key = made[-1]
        lease = client.acquire(owner="worker-7")
        client.post(f"{API}/keys/{key['key']}/unblock").expect(200)
        client.post(f"{API}/keys/id:{key['id']}/reveal").expect(200)
        client.delete(f"{API}/keys/id:{key['id']}")
        told: list[dict[str, object]] = []
        while len(told) < 4:
            frame = viewer.until("delta")
            told += frame["events"]
        assert [event["event"] for event in told] == ["acquired", "unblocked", "revealed", "deleted"]
        assert {event["id"] for event in told} == {key["id"]}
        assert told[0]["owner"] == "worker-7"
        assert told[0]["lease"] == lease["lease"]
        assert frame["stats"]["total"] == 0
        assert frame["dropped"] == 0


def test_a_number_that_changes_without_an_event_is_sent(server: ServerProcess, client: Client) -> None:
    """Keepalives and refusals are not events, but change the numbers."""
    key = client.make()
    with Viewer(server) as viewer:
        before = viewer.frame()["stats"]["kept_alive"]
        client.post(f"{API}/keys/{key['key']}/keepalive").expect(200)
        delta = viewer.until("delta")
    assert delta["stats"]["kept_alive"] == before + 1
    assert delta["events"] == []


def test_history_and_events_can_be_left_out(server: ServerProcess, client: Client) -> None:
    """A frame comes when a number changes, as for other viewers; another value in the query is refused."""
    client.make()
    with Viewer(server, path=f"{FEED}?history=no&events=no") as viewer:
        hello = viewer.frame()
        assert (hello["history"], hello["events"]) == (None, [])
        client.make()
        delta = viewer.until("delta")
    assert (delta["stats"]["total"], delta["events"], delta["dropped"]) == (2, [], 0)
    with Viewer(server, path=f"{FEED}?history=maybe") as viewer:
        assert viewer.status == 400


def test_events_say_what_brought_them_about(server: ServerProcess, client: Client) -> None:
    """A cooldown from the report to its end, and a quarantine by an operator, with the numbers that go with them."""
    with Viewer(server) as viewer:
        before = viewer.frame()["stats"]
        key = client.make()
        lease = client.acquire(owner="worker-7")
        body = {"lease": lease["lease"], "outcome": "rate_limited", "retry_after": 0.5}
        client.post(f"{API}/keys/{key['key']}/unblock", json=body).expect(200)
        told: list[tuple[str, str, str | None]] = []
        cooling, in_one_frame = set(), False
        while "ready" not in [event for event, _, _ in told]:
            frame = viewer.until("delta")
            told += [(event["event"], event["by"], event["actor"]) for event in frame["events"]]
            cooling.add(frame["stats"]["cooling"])
            in_one_frame = {"cooled", "ready"} <= {event["event"] for event in frame["events"]}
        client.post(f"{API}/keys/id:{key['id']}/quarantine").expect(200)
        frame = viewer.until("delta")
        told += [(event["event"], event["by"], event["actor"]) for event in frame["events"]]
    assert told == [
        ("generated", "operator", None),
        ("acquired", "holder", None),
        ("unblocked", "holder", None),
        ("cooled", "holder", None),
        ("ready", "deadline", None),
        ("quarantined", "operator", None),
    ]
    assert cooling == ({0} if in_one_frame else {0, 1}), "a machine that stands still may skip frames"
    assert (frame["stats"]["quarantined"], frame["stats"]["cooled"]) == (1, before["cooled"] + 1)


def test_deadlines_are_events(lend: Start, short_server: ServerProcess) -> None:
    """Releases and expiries are events, without any call."""
    for server, last in ((lend(f"--block-seconds={SHORT_BLOCK}"), "released"), (short_server, "expired")):
        client = server.client()
        with Viewer(server) as viewer:
            viewer.frame()
            client.make()
            if last == "released":
                client.acquire(owner="late")
            told: list[str] = []
            while last not in told:
                told += [event["event"] for event in viewer.until("delta")["events"]]
        assert told == ["generated", *(["acquired"] if last == "released" else []), last]


def test_a_thousand_changes_are_one_frame(server: ServerProcess, client: Client) -> None:
    """Fifty events and the count of the rest."""
    with Viewer(server) as viewer:
        viewer.frame()
        client.make_many(1000)
        told = viewer.until("delta")
        dropped, shown = told["dropped"], len(told["events"])
        while dropped + shown < 1000:
            told = viewer.until("delta")
            dropped, shown = dropped + told["dropped"], shown + len(told["events"])
    assert dropped + shown == 1000
    assert told["stats"]["total"] == 1000


def moment_of(frame: dict[str, Any]) -> float:
    """When the server made it: a busy machine may bring several frames here at once."""
    return datetime.fromisoformat(frame["now"]).timestamp()


def read_in_time(viewer: Viewer, count: int, seconds: float) -> list[float]:
    """Read deltas until the latest `count` of them were made within so many seconds. The moments of all."""
    made: list[float] = []

    def in_time() -> bool:
        made.append(moment_of(viewer.until("delta")))
        return len(made) >= count and made[-1] - made[-count] < seconds

    eventually(in_time, f"{count} frames in {seconds} s", within=60)
    return made


@pytest.mark.once
def test_under_load_four_frames_a_second_and_no_more(start_server: Start) -> None:
    """The rate of frames doesn't depend on the rate of calls."""
    server = start_server()
    with traffic(server), Viewer(server) as viewer:
        viewer.frame()
        made = read_in_time(viewer, 9, 3)
    # Each begins 0.25 s after the one before, or 0.05 s after that one's end if it took longer.
    assert made[-1] - made[0] > (len(made) - 1) * 0.25 - 0.25, made
    assert all(later - earlier > 0.04 for earlier, later in itertools.pairwise(made)), made


@pytest.mark.once
def test_a_quiet_pool_beats(server: ServerProcess) -> None:
    """A beat comes after five seconds without changes, and no other frame before it."""
    with Viewer(server) as viewer:
        latest = moment_of(viewer.frame())

        def in_time() -> bool:
            nonlocal latest
            frame = viewer.frame()
            assert frame["type"] == "beat"
            before, latest = latest, moment_of(frame)
            assert latest - before > 4.5
            return latest - before < 6.5

        eventually(in_time, "a beat in time", within=60)


# --------------------------------------------------------------------------------------------- slow viewers


class Watching:
    """A viewer in this process: the frames that it was sent."""

    def __init__(self) -> None:
        self.frames: list[dict[str, Any]] = []
        self.left: list[int] = []

    async def send(self, frame: bytes) -> None:
        self.frames.append(json.loads(frame))

    def leave(self, code: int, reason: str) -> None:
        self.left.append(code)

    def signed_in(self) -> bool:
        return True

    async def until(self, count: int) -> list[str]:
        """The types of the frames, when there are so many."""
        for _ in range(20_000):
            if len(self.frames) >= count:
                break
            await asyncio.sleep(0.001)
        return [frame["type"] for frame in self.frames]


@on_loop
async def test_a_feed_beats_while_storage_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """An existing viewer gets beats; a new one gets its hello once storage is back."""
    monkeypatch.setattr(feed, "INTERVAL", 0.01)
    monkeypatch.setattr(feed, "QUIET", 0.03)
    engine = make_engine(Moment())
    watched = Feed(engine, History(), ViewerLimit(5), Moment())
    early, late = Watching(), Watching()
    await watched.join(early)
    assert await early.until(1) == ["hello"]
    there = engine.stats

    async def away() -> Stats:
        raise StorageUnavailable("away")

    monkeypatch.setattr(engine, "stats", away)
    await watched.join(late)
    assert await early.until(4) == ["hello", "beat", "beat", "beat"]
    assert [frame["seq"] for frame in early.frames] == [1, 2, 3, 4]
    assert late.frames == []
    monkeypatch.setattr(engine, "stats", there)
    assert (await late.until(1))[0] == "hello"
    assert (await late.until(2))[1] == "beat"
    watched.drain()
    assert late.left == [1001]
    await asyncio.sleep(0)


@on_loop
async def test_the_first_viewer_of_a_pool_counts_from_its_hello_on() -> None:
    """What happened before isn't drawn as if it had happened since."""
    engine = make_engine(Moment())
    await engine.generate(3)
    watched, viewer = Feed(engine, History(), ViewerLimit(5), Moment()), Watching()
    await watched.join(viewer)
    await viewer.until(1)
    seconds = viewer.frames[0]["history"]["seconds"]
    assert seconds["counted"]["generated"] == 3
    assert (seconds["end"], seconds["generated"]) == (viewer.frames[0]["now"], [])
    watched.drain()
    await asyncio.sleep(0)


class Counting(Watching):
    """One that notes in which turn of the loop it got each frame."""

    def __init__(self, turn: Callable[[], int]) -> None:
        super().__init__()
        self.turns: list[int] = []
        self.second = asyncio.Event()
        self._turn = turn

    async def send(self, frame: bytes) -> None:
        self.turns.append(self._turn())
        if len(self.turns) == 2:
            self.second.set()
        await super().send(frame)


@on_loop
async def test_others_are_served_between_the_frames_of_many_viewers(monkeypatch: pytest.MonkeyPatch) -> None:
    """And who joins, or what happens, between them is neither told twice nor left out."""
    monkeypatch.setattr(feed, "INTERVAL", 0.01)
    engine, turn = make_engine(Moment()), 0

    async def count_turns() -> None:
        nonlocal turn
        while True:
            await asyncio.sleep(0)
            turn += 1

    counting = asyncio.create_task(count_turns())
    watched = Feed(engine, History(), ViewerLimit(200), Moment())
    viewers = [Counting(lambda: turn) for _ in range(100)]
    for viewer in viewers:
        await watched.join(viewer)
    [first] = await engine.generate(1)
    await viewers[20].second.wait()
    assert len(viewers[-1].frames) == 1
    [second] = await engine.generate(1)
    late = Counting(lambda: turn)
    await watched.join(late)
    watched.part(viewers.pop())
    for viewer in viewers:
        await viewer.until(3)
    for viewer in viewers:
        seen = [event["id"] for frame in viewer.frames[1:] for event in frame["events"]]
        assert seen == [first.id, second.id]
        assert [frame["seq"] for frame in viewer.frames] == [1, 2, 3]
    assert [event["id"] for event in late.frames[0]["events"]] == [first.id, second.id]
    assert [frame["events"] for frame in late.frames[1:]] == []
    together = Counter(viewer.turns[1] for viewer in viewers)
    assert max(together.values()) <= feed.AT_ONCE, together
    watched.drain()
    counting.cancel()
    await asyncio.sleep(0)


def resident(server: ServerProcess) -> int:
    """Bytes of the server's memory that are in use."""
    return int(Path(f"/proc/{server.pid}/statm").read_text().split()[1]) * 4096


@pytest.mark.once
def test_a_viewer_that_never_reads_costs_one_frame_and_delays_no_other(start_server: Start) -> None:
    """The others have their four frames; the server's memory grows by less than a megabyte for each."""
    server = start_server()
    with traffic(server):
        time.sleep(1)
        with Viewer(server) as warm:
            warm.collect(1)
        before = resident(server)
        sleepers = [Viewer(server, buffer=4096) for _ in range(10)]
        with Viewer(server) as reader:
            reader.frame()
            read_in_time(reader, 24, 9)
        grown = (resident(server) - before) / len(sleepers)
        for sleeper in sleepers:
            sleeper.close()
    assert grown < 1_000_000, f"{grown:.0f} bytes each"


@pytest.mark.once
def test_a_slow_viewer_gets_the_latest_state_and_the_count_of_what_it_missed(start_server: Start) -> None:
    """Between two frames that it reads late, nothing is lost from the counts."""
    server = start_server()
    client = server.client()
    with Viewer(server, buffer=2048) as viewer:
        hello = viewer.frame()
        for _ in range(4):
            client.make_many(1000)
            time.sleep(0.3)
        known = hello["stats"]["generated"]
        while known < 4000:
            delta = viewer.until("delta")
            assert delta["stats"]["generated"] == known + len(delta["events"]) + delta["dropped"]
            known = delta["stats"]["generated"]


# -------------------------------------------------------------------------------------------- who may watch


def test_a_plain_get_is_answered_426(server: ServerProcess, client: Client) -> None:
    """426 has an Upgrade header; HEAD and OPTIONS are answered as everywhere."""
    answer = client.get(FEED)
    answer.expect_problem(426, "upgrade-required")
    assert answer.headers["Upgrade"] == "websocket"
    assert client.head(FEED).status == 426
    assert client.options(FEED).allowed() == {"GET", "HEAD", "OPTIONS"}
    assert client.post(FEED).expect_problem(405, "method-not-allowed")


@pytest.mark.parametrize("missing", ["Connection", "Sec-WebSocket-Key"])
def test_half_a_handshake_is_a_bad_request(server: ServerProcess, missing: str) -> None:
    """The answer is a problem."""
    with Viewer(server, headers={missing: ""}) as viewer:
        assert viewer.status == 400
        assert viewer.problem()["code"] == "bad-request"


def test_another_version_of_websocket_is_refused_with_the_right_one(server: ServerProcess) -> None:
    """426 names version 13."""
    with Viewer(server, headers={"Sec-WebSocket-Version": "8"}) as viewer:
        assert viewer.status == 426
        assert "Sec-Websocket-Version: 13" in viewer.head or "Sec-WebSocket-Version: 13" in viewer.head


def test_viewers_and_admins_may_watch(guarded_server: ServerProcess) -> None:
    """A bearer token is enough."""
    for token in (VIEWER_TOKEN, ADMIN_TOKEN):
        with Viewer(guarded_server, token) as viewer:
            assert viewer.frame()["type"] == "hello"


def test_clients_and_callers_without_a_token_may_not_watch(guarded_server: ServerProcess) -> None:
    """They get 403 and 401, before the upgrade."""
    with Viewer(guarded_server, CLIENT_TOKEN) as viewer:
        assert (viewer.status, viewer.problem()["code"]) == (403, "forbidden")
    with Viewer(guarded_server) as viewer:
        assert (viewer.status, viewer.problem()["code"]) == (401, "unauthorized")
    guarded_server.client().get(FEED).expect_problem(401, "unauthorized")


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1"])
def test_a_page_of_another_site_may_not_watch(server: ServerProcess, origin: str) -> None:
    """Browsers let any page open a websocket to any server, so the Origin is checked."""
    with Viewer(server, headers={"Origin": origin}) as viewer:
        assert (viewer.status, viewer.problem()["code"]) == (403, "cross-site")


def test_this_servers_own_page_may_watch(server: ServerProcess) -> None:
    """Its Origin is the Host."""
    with Viewer(server, headers={"Origin": f"http://{server.host}"}) as viewer:
        assert viewer.frame()["type"] == "hello"


def test_a_viewer_over_the_limit_is_refused(lend: Start) -> None:
    """It gets 429 with Retry-After; after a viewer has left, another is accepted."""
    server = lend("--max-viewers=2")
    with Viewer(server) as first, Viewer(server) as second:
        first.frame()
        second.frame()
        with Viewer(server) as third:
            assert third.status == 429
            assert third.problem()["code"] == "too-many-viewers"
            assert re.search(r"(?i)retry-after: \d", third.head)
        first.close()

        def room() -> bool:
            with Viewer(server) as again:
                return again.status == 101

        eventually(room, "room for another viewer")


def test_the_limit_may_be_no_viewers_at_all(lend: Start) -> None:
    """--max-viewers=0 closes the feed."""
    with Viewer(lend("--max-viewers=0")) as viewer:
        assert viewer.status == 429


# -------------------------------------------------------------------------------------------- the end of it


def test_a_stop_closes_with_1001(start_server: Start) -> None:
    """The stop doesn't wait for viewers."""
    server = start_server("--drain-seconds=300")
    viewers = [Viewer(server) for _ in range(3)]
    for viewer in viewers:
        viewer.frame()
    server.signal(signal.SIGTERM)
    for viewer in viewers:
        with pytest.raises(Closed) as closed:
            viewer.until("never")
        assert closed.value.code == 1001
        viewer.close()
    assert server.wait() == 0


def test_what_a_viewer_sends_is_ignored(server: ServerProcess) -> None:
    """After a message, frames come as before."""
    with Viewer(server) as viewer:
        viewer.frame()
        viewer.socket.sendall(b"\x81\x85\x00\x00\x00\x00hello")
        server.client().make()
        assert viewer.until("delta")["stats"]["total"] == 1


def test_viewers_that_vanish_leave_nothing_behind(server: ServerProcess) -> None:
    """A reset is no error, and the server goes on."""
    for _ in range(5):
        viewer = Viewer(server)
        viewer.frame()
        viewer.socket.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER 0: a reset
        viewer.close()
    with Viewer(server) as last:
        last.frame()
        server.client().make()
        last.until("delta")


def test_a_pipelined_request_behind_a_refused_handshake_is_answered(server: ServerProcess) -> None:
    """The connection of a refused handshake goes on."""
    with server.wire() as wire:
        wire.ask("GET", FEED)
        wire.ask("GET", API + "/stats")
        assert wire.answer().status == 426
        assert wire.answer().status == 200
    assert encode_request("GET", FEED, server.host)
