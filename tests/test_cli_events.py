"""`keypool events`, against a small websocket server that sends scripted frames, and against the real feed."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
from cli_support import run_command
from client_support import clean, keypool, started, unused_port, url_of
from support import API, ServerProcess, eventually
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application
from tornado.websocket import WebSocketHandler

from keypool.cli.status import Status
from keypool.client import GeneratedKey, KeyPool

TOKEN = "viewer-token-0123456789"


def happened(number: int, event: str = "acquired", **more: Any) -> dict[str, Any]:
    """An event of the contract."""
    at = f"2026-01-31T12:00:{number % 60:02}.000Z"
    return {
        "event": event,
        "id": number,
        "hint": "abcd…wxyz",
        "owner": "me",
        "lease": number,
        "at": at,
        "by": "holder",
        "actor": None,
    } | more


class Feed:
    """A feed that sends each new viewer the next script of frames, and then closes, or waits after the last one."""

    def __init__(self, *scripts: list[dict[str, Any]], status: int = 0) -> None:
        self.scripts = list(scripts)
        self.viewers = 0
        self.status = status
        self.tokens: list[str | None] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._ready.wait(20)

    async def _serve(self) -> None:
        feed, self._stop, self._loop = self, asyncio.Event(), asyncio.get_running_loop()

        class Handler(WebSocketHandler):
            async def get(self, *args: Any) -> None:
                feed.tokens.append(self.request.headers.get("Authorization"))
                if feed.status:
                    self.set_status(feed.status)
                    self.finish()
                    return
                await super().get(*args)

            async def open(self, *args: str) -> None:
                feed.viewers += 1
                for frame in feed.scripts.pop(0):
                    await self.write_message(json.dumps(frame))
                if feed.scripts:
                    self.close(1001)

        server = HTTPServer(Application([(f"{API}/feed", Handler)]))
        sockets = bind_sockets(0, "127.0.0.1")
        server.add_sockets(sockets)
        self.url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._stop.wait()
        server.stop()
        await server.close_all_connections()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)


def hello(*events: dict[str, Any]) -> dict[str, Any]:
    """The first frame."""
    return {"type": "hello", "seq": 1, "now": "…", "stats": {}, "history": [], "events": list(events)}


def delta(*events: dict[str, Any], dropped: int = 0) -> dict[str, Any]:
    """A frame with changes."""
    return {"type": "delta", "seq": 2, "now": "…", "stats": {}, "events": list(events), "dropped": dropped}


def test_a_line_an_event() -> None:
    beat = {"type": "beat", "seq": 3, "now": "…"}
    with Feed(
        [hello(happened(1), happened(2)), beat, delta(happened(3), dropped=4), {"type": "new"}]
    ) as feed:
        ran = keypool(None, "--url", feed.url, "events", "--past", "1", "--count", "2", KEYPOOL_TOKEN=TOKEN)
    assert ran.returncode == 0
    assert ran.stdout.splitlines() == [
        "2026-01-31T12:00:02.000Z\tacquired\t2\tabcd…wxyz\tme\t2\tholder\t",
        "2026-01-31T12:00:03.000Z\tacquired\t3\tabcd…wxyz\tme\t3\tholder\t",
    ]
    assert feed.tokens == [f"Bearer {TOKEN}"]


def test_an_operator_is_named_on_a_terminal() -> None:
    by_operator = happened(2, "quarantined", by="operator", actor="1a2b3c4d", owner=None)
    with Feed([hello(happened(1, "cooled"), by_operator)]) as feed:
        ran = run_command(None, "--url", feed.url, "events", "--count", "2", columns=120)
    assert ran.out.splitlines() == [
        "2026-01-31T12:00:01.000Z  cooled       abcd…wxyz  id:1  me",
        "2026-01-31T12:00:02.000Z  quarantined  abcd…wxyz  id:2  by operator 1a2b3c4d",
    ]


def test_json_and_what_was_left_out() -> None:
    with Feed([hello(), delta(happened(1), dropped=7), delta(happened(2))]) as feed:
        ran = keypool(None, "--url", feed.url, "events", "--json", "--count", "2")
    assert [json.loads(line) for line in ran.stdout.splitlines()] == [happened(1), happened(2)]
    assert "7 events were left out" in ran.stderr


def test_it_goes_on_after_a_restart_and_shows_nothing_twice() -> None:
    first = [hello(happened(1)), delta(happened(2))]
    second = [hello(happened(1), happened(2), happened(3)), delta(happened(4))]
    with Feed(first, second, []) as feed:
        ran = keypool(None, "--url", feed.url, "events", "--count", "4")
    assert [line.split("\t")[2] for line in ran.stdout.splitlines()] == ["1", "2", "3", "4"]
    assert "retrying" in ran.stderr


@pytest.mark.parametrize(
    ("status", "ends"),
    [(401, Status.DENIED), (403, Status.DENIED), (404, Status.FAILED), (429, Status.FAILED)],
)
def test_a_refusal_ends_it(status: int, ends: Status) -> None:
    with Feed(status=status) as feed:
        ran = keypool(None, "--url", feed.url, "events")
    assert ran.returncode == ends
    assert len(ran.stderr.splitlines()) == 1


def test_nobody_there() -> None:
    ran = keypool(None, "--url", f"http://127.0.0.1:{unused_port()}", "--retry", "0", "events")
    assert ran.returncode == Status.UNREACHABLE


def test_an_outage_is_bounded_by_retry() -> None:
    """Also after the first connection; without the flag, it would be followed without end."""
    with Feed([hello(happened(1))], []) as feed:
        ran = keypool(None, "--url", feed.url, "events", "--retry", "0")
    assert ran.returncode == Status.UNREACHABLE
    assert len(ran.stdout.splitlines()) == 1
    assert "the server closed the feed" in ran.stderr


def test_garbage() -> None:
    with Feed([{"no": "type"}]) as feed:
        ran = keypool(None, "--url", feed.url, "events")
    assert ran.returncode == Status.FAILED
    assert "can't be read" in ran.stderr


def test_the_real_feed(server: ServerProcess) -> None:
    with (
        KeyPool(url_of(server)) as pool,
        started(server, ["-m", "keypool", "events", "--json", "--past", "0", "--count", "4"]) as process,
    ):
        assert process.stdout is not None
        made: list[GeneratedKey] = []

        def seen_one() -> bool:
            made.append(pool.generate())
            return _readable(process.stdout)

        eventually(seen_one, "a first event")
        seen = [json.loads(process.stdout.readline())]
        with pool.lease(owner="me"):
            pass
        pool.delete_many(made)
        seen += [json.loads(line) for line in process.stdout]
        assert process.wait(30) == 0
    clean(server)
    assert {event["event"] for event in seen} <= {"generated", "acquired", "unblocked", "deleted"}
    assert all(set(event) == {"event", "id", "hint", "owner", "lease", "at", "by", "actor"} for event in seen)


def test_the_feed_of_a_pool_has_its_events_only(server: ServerProcess) -> None:
    with KeyPool(url_of(server)) as client:
        client.put_pool("openai", keepalive_seconds=None)
        pool = client.pool("openai")
        words = ["-m", "keypool", "--pool", "openai", "events", "--past", "0", "--count", "3"]
        with started(server, words) as process:
            assert process.stdout is not None

            def seen_one() -> bool:
                client.generate()
                pool.generate()
                return _readable(process.stdout)

            eventually(seen_one, "a first event")
            client.generate()
            pool.generate_many(3)
            ids = {line.split("\t")[2] for line in process.stdout}
            assert process.wait(30) == 0
        assert ids <= {str(row.id) for row in pool.rows()}
        client.delete_pool("openai", drain=True, now=True)
        eventually(lambda: len(client.pools()) == 1, "the pool to be gone")
    clean(server)
    unknown = run_command(server, "events", "--pool", "openai")
    assert (unknown.status, "no pool openai" in unknown.err) == (Status.UNKNOWN_KEY, True)


def _readable(stream: Any) -> bool:
    import select

    return bool(select.select([stream], [], [], 0.3)[0])
