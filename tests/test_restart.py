"""A stop under load, and a restart that nobody loses by.

What a server has accepted it answers, and what it doesn't answer it hasn't done: after the restart the counters of
the pool, which are kept, are held against what the clients were told.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from client_support import ports_in_a_row
from conftest import Start
from support import ACQUIRE, API, ServerProcess, encode_request, eventually

CLIENTS = 8
BEFORE, AFTER = 100, 100  # calls that all clients together make before the stop, and after the start


@pytest.mark.parametrize("data", ["memory", "file"])
def test_all_that_came_before_the_signal_is_answered(data: str, tmp_path: Path) -> None:
    """Requests whose bytes have come, on connections that the server had no time to accept yet, and on old ones."""
    flags = ["--port=0", *(["--data=:memory:"] if data == "memory" else [])]
    with ServerProcess(flags, cwd=tmp_path) as server:
        known = [server.wire() for _ in range(20)]
        for wire in known:
            wire.ask("GET", "/healthz")
            wire.answer()
        with server.paused():
            fresh = [server.wire() for _ in range(100)]
            for wire in known + fresh:
                wire.ask("POST", API + "/keys")
            server.signal(signal.SIGTERM)
        made = {wire.answer().expect(201)["id"] for wire in known + fresh}
        assert len(made) == 120
        assert server.wait() == 0, server.log


def test_answers_during_the_drain_close_the_connection(start_server: Start) -> None:
    """So that a client doesn't send its next request into a closing connection."""
    server = start_server()
    half, waiter, wire = server.wire(), server.wire(), server.wire()
    wire.ask("GET", "/healthz")
    wire.answer()
    data = encode_request("POST", API + "/keys", server.host, body=b"{}")
    half.expect_answer_to("POST", API + "/keys")
    half.send(data[:-1])
    waiter.ask("POST", ACQUIRE, json={"wait": 60})
    server.client().expect_waiting(1)
    server.signal(signal.SIGTERM)
    waiter.answer().expect_problem(503, "draining")  # the drain has begun, and half a request holds it
    wire.ask("POST", API + "/keys")
    assert wire.answer().status == 201
    assert not wire.going_on
    assert wire.rest() == b""
    half.send(data[-1:])
    assert half.answer().status == 201
    assert server.wait() == 0


@dataclass
class Told:
    """What all clients were told: how often what was done, and every key and lease number."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: Counter[str] = field(default_factory=Counter)
    keys: set[str] = field(default_factory=set)
    leases: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    total: int = 0

    def has(self, calls: int) -> bool:
        """Whether so many calls were answered, or something went wrong."""
        return self.total >= calls or bool(self.wrong)


class Retrying(threading.Thread):
    """A client as users write them: one connection, and every call again until it is answered by no 503."""

    def __init__(self, port: int, told: Told, over: threading.Event) -> None:
        super().__init__(daemon=True)
        self._port = port
        self._told = told
        self._over = over
        self._connection: http.client.HTTPConnection | None = None

    def run(self) -> None:
        """Make a key, acquire one, keep it alive and give it back, until it is over."""
        try:
            while not self._over.is_set():
                self._round()
        except Exception as error:  # whatever it is, the test is told
            self._told.wrong.append(repr(error))
        finally:
            if self._connection is not None:
                self._connection.close()

    def _round(self) -> None:
        made = self._call("generated", API + "/keys", 201)
        lease = self._call("acquired", ACQUIRE, 200)
        self._call("kept_alive", f"{API}/keys/{made['key']}/keepalive", 200)
        body = {"lease": lease["lease"]}
        self._call("unblocked", f"{API}/keys/{lease['key']}/unblock", 200, body)
        with self._told.lock:
            self._told.keys.add(made["key"])
            self._told.leases.append(lease["lease"])

    def _call(self, what: str, path: str, status: int, body: object = None) -> dict[str, Any]:
        while True:
            told = self._try(path, body)
            if told is None or told[0] == 503:
                self._over.wait(0.01)
                continue
            assert told[0] == status, f"{path}: {told}"
            with self._told.lock:
                self._told.counts[what] += 1
                self._told.total += 1
            return told[1]

    def _try(self, path: str, body: object) -> tuple[int, dict[str, Any]] | None:
        """Status and body; None if no server took the request."""
        data = None if body is None else json.dumps(body)
        connection = self._connection or http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        self._connection = None
        try:
            connection.request("POST", path, data)
            response = connection.getresponse()
            told = response.status, json.loads(response.read())
        except (
            ConnectionRefusedError,
            ConnectionResetError,
            BrokenPipeError,
            http.client.RemoteDisconnected,
        ):
            connection.close()  # refused, or closed just as the request was sent; a cut answer would be an error
            return None
        self._connection = connection
        return told


def test_clients_that_try_again_lose_nothing_across_a_restart(tmp_path: Path) -> None:
    """Every call that was answered is kept, every call that was not was not done, and lease numbers never repeat."""
    port = ports_in_a_row(1)
    flags = [f"--port={port}", "--keepalive-seconds=3600", "--block-seconds=3600"]
    told, over = Told(), threading.Event()
    server = ServerProcess(flags, cwd=tmp_path)
    clients = [Retrying(port, told, over) for _ in range(CLIENTS)]
    try:
        for client in clients:
            client.start()
        for calls in (BEFORE, BEFORE + AFTER):
            eventually(partial(told.has, calls), "clients at work", 60)
            server.finish()
            server = ServerProcess(flags, cwd=tmp_path)
        over.set()
        for client in clients:
            client.join(60)
            assert not client.is_alive()
        assert told.wrong == []
        with server.client() as reader:
            stats = reader.stats()
            assert {name: stats[name] for name in told.counts} == dict(told.counts)
            for key in told.keys:
                reader.get(f"{API}/keys/{key}").expect(200)
        assert len(set(told.leases)) == len(told.leases)
        server.finish()
    finally:
        over.set()
        server.close()


def test_a_stop_while_a_caller_sends_on_and_on(start_server: Start) -> None:
    """One who pipelines without end is answered in part and closed; the server stops all the same."""
    server = start_server("--drain-seconds=5")
    stop = threading.Event()

    def flood() -> None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.settimeout(30)
            while not stop.is_set():
                sock.sendall(encode_request("GET", API + "/stats", server.host) * 10)
                sock.recv(65536)

    floods = [threading.Thread(target=flood, daemon=True) for _ in range(4)]
    for thread in floods:
        thread.start()
    server.client().stats()
    server.signal(signal.SIGTERM)
    try:
        assert server.wait(40) == 0, server.log
    finally:
        stop.set()
        for thread in floods:
            thread.join(40)
