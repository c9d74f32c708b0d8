"""Several keypool servers over one Valkey, or a cluster: workers ask any of them, and some are killed meanwhile.

The ledger and the judge are those of crash.py: what one server has told holds for all of them. What the worker of
a killed server had asked was with Valkey by then or never will be, so it took effect at once or not at all.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP, SIGTERM
from types import TracebackType
from typing import Any, Final, Self

from crash import Attempt, Cut, Ledger, Tally, Unknown, Worker, examine, judge
from support import API, Answer, Client, ServerProcess, eventually, pass_until
from valkeys import Valkey

SLACK: Final = 3.0
"""Seconds after the death of a server in which Valkey may still do what it had been sent. It takes no lock and waits
for nothing, so it does so at once, if the system lets it run."""

QUIET: Final = 0.5
"""The least time that nothing is asked before all is looked at."""

LATEST: Final = 4.0
"""The same for a call that was answered 503: it may be on its way to a Valkey that doesn't answer."""


class FleetWorker(Worker):
    """Asks any server, one call after the other; when one is gone, another."""

    def __init__(self, fleet: Fleet, seed: int, stop: threading.Event) -> None:
        self._fleet = fleet
        self._servers = random.Random(seed)
        super().__init__(fleet.some(self._servers), fleet.ledger, seed, stop, fleet.keys)
        self.cut = 0
        """Calls that were not answered, because their server was gone."""
        self.drained = 0

    def _run(self) -> None:
        try:
            while not self._stop_asked.is_set():
                try:
                    self._call()
                except Cut:
                    self.cut += 1
                    self._turn_to_another()
                if self._servers.random() < 0.2:
                    self._turn_to_another()
        except BaseException as error:
            self.failure = error
        finally:
            self._client.close()

    def _turn_to_another(self) -> None:
        self._client.close()
        self._server = self._fleet.some(self._servers)
        self._client = Client(self._server)

    def _ask(self, attempt: Attempt, method: str, path: str, **how: Any) -> Answer:
        try:
            answer = self._client.request(method, path, **how)
        except (OSError, http.client.HTTPException) as error:
            attempt.span.ended = self._fleet.cut_until = time.monotonic() + SLACK
            raise Cut from error
        attempt.span.ended = answer.answered_at
        with self._ledger.lock:
            self._ledger.answers += 1
        if answer.status == 503:
            if answer.json["code"] == "draining":
                self.drained += 1
                raise Cut
            answer.expect_problem(503, "storage-unavailable")
            attempt.span.ended += LATEST
            raise Unknown
        return answer


class Fleet:
    """`servers` keypool servers on `engine`, an URL. All is drawn from the seed, but for the timing."""

    def __init__(
        self,
        engine: str,
        folder: Path,
        seed: int,
        *,
        servers: int = 3,
        workers: int = 12,
        keys: int = 80,
        block_seconds: float = 1.0,
        keepalive_seconds: float = 6.0,
        flags: Sequence[str] = (),
    ) -> None:
        self.ledger = Ledger(block_seconds, keepalive_seconds, told_short=True)
        self.tally = Tally()
        self.keys = keys
        self.cut_until = 0.0
        """Until when what was cut off last may have an effect."""
        self.allowed: list[str] = []
        """Patterns of errors that servers may log from their start on."""
        self._folder = folder
        self._random = random.Random(seed)
        self._seeds = itertools.count(seed * 1_000_000)
        self._workers = workers
        self._flags = [
            f"--engine={engine}", "--port=0", *flags,
            f"--block-seconds={block_seconds}", f"--keepalive-seconds={keepalive_seconds}",
        ]  # fmt: skip
        self._lock = threading.Lock()
        self.servers: list[ServerProcess] = []
        try:
            for _ in range(servers):
                self.servers.append(self._start())
        except BaseException:
            self._close()
            raise

    def _start(self) -> ServerProcess:
        server = ServerProcess(self._flags, cwd=self._folder)
        for pattern in self.allowed:
            server.allow(pattern)
        return server

    def allow(self, pattern: str) -> None:
        """Take it that servers log errors like this from now on."""
        self.allowed.append(pattern)
        for server in self.servers:
            server.allow(pattern)

    def some(self, random: random.Random) -> ServerProcess:
        """Any of the servers: a load balancer that takes whoever is there."""
        with self._lock:
            return random.choice(self.servers)

    @contextlib.contextmanager
    def load(self) -> Iterator[list[FleetWorker]]:
        """Workers at work inside; in the quiet after, all that they asked for is done or never will be."""
        stop = threading.Event()
        workers = [FleetWorker(self, next(self._seeds), stop) for _ in range(self._workers)]
        before = self.ledger.answers
        for worker in workers:
            worker.thread.start()
        try:
            yield workers
        finally:
            stop.set()
            for worker in workers:
                worker.thread.join(60)
        for worker in workers:
            assert not worker.thread.is_alive(), f"{worker.name} still waits for an answer"
            if worker.failure is not None:
                raise AssertionError(
                    f"{worker.failure!r} of {worker.name}\n{self.logs()}"
                ) from worker.failure
        self.tally.answers += self.ledger.answers - before
        self.tally.refused += sum(worker.refused for worker in workers)
        self.settle()

    def settle(self) -> None:
        """Wait until nothing that was asked can have an effect any more."""
        with Client(self.servers[0]) as client:
            eventually(lambda: client.stats()["waiting"] == 0, "nobody waits")
        pass_until(max(time.monotonic() + QUIET, self.cut_until))
        self.ledger.died(time.monotonic())

    def wait_for(self, answers: int, within: float = 60.0) -> None:
        """Until so many more answers have come."""
        target = self.ledger.answers + answers
        eventually(lambda: self.ledger.answers >= target, f"{answers} answers more\n{self.logs()}", within)

    def kill(self) -> None:
        """Kill any server, and start another in its place."""
        with self._lock:
            victim = self._random.choice(self.servers)
        victim.signal(SIGKILL)
        victim.wait()
        self._replace(victim)
        self.tally.kills += 1

    def restart(self, server: ServerProcess) -> None:
        """Stop one as its user would, and start another in its place."""
        server.signal(SIGTERM)
        status = server.wait()
        assert status == 0, f"exit status {status} after SIGTERM\n{server.log}"
        self._replace(server)

    def _replace(self, gone: ServerProcess) -> None:
        gone.check()
        gone.close()
        made = self._start()
        with self._lock:
            self.servers[self.servers.index(gone)] = made

    def round(self, kills: int, answers: int = 150) -> list[str]:
        """Load, and kill so many servers under it. What is wrong so far."""
        self.look()
        with self.load():
            for _ in range(kills):
                self.wait_for(self._random.randint(answers // 2, answers))
                self.kill()
            self.wait_for(answers)
        return self.look()

    def look(self) -> list[str]:
        """Have any server tell all there is; what is wrong so far."""
        examine(self.some(self._random), self.ledger)
        return judge(self.ledger, partitioned=True)

    def logs(self) -> str:
        """What the servers have printed."""
        return "\n".join(f"--- port {server.port}\n{server.log}" for server in self.servers)

    def finish(self) -> None:
        """End all in peace."""
        try:
            for server in self.servers:
                server.finish()
        finally:
            self._close()

    def _close(self) -> None:
        for server in self.servers:
            server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self._close()


_NEVER = re.compile(r"made twice|made by nobody|lease repeated|lease went back: (acquire told|\d+ was given)")


@dataclass
class FailedOver:
    """What a primary's death came to. Lengths of time are seconds."""

    noticed: float
    recovered: float
    faults: list[str]

    @property
    def kinds(self) -> dict[str, int]:
        """How often promises were broken, by kind."""
        return dict(Counter(fault.partition(":")[0] for fault in self.faults))

    @property
    def keys(self) -> int:
        """Of how many keys."""
        return len({found[0] for fault in self.faults if (found := re.search(r"key (id:\d+|of).*", fault))})

    @property
    def never(self) -> list[str]:
        """Those that a failover excuses no more than anything else does: what is lost isn't given again."""
        return [fault for fault in self.faults if _NEVER.match(fault)]


def fail_over(
    fleet: Fleet,
    primary: Valkey,
    *,
    answers: int = 300,
    within: float = 60.0,
    frozen: bool = False,
    behind: tuple[Valkey, int] | None = None,
) -> FailedOver:
    """Kill a primary that has a replica, under load; the servers must go on by themselves.

    `frozen` lets it stand still instead, with its connections open, and go on when another is in its place.
    `behind` is its replica, which hears nothing of the last so many answers: on one machine it would hear all,
    since the system delivers what a dead process has sent.
    """
    faults = fleet.look()
    assert not faults, "\n".join(faults)
    with fleet.load():
        fleet.wait_for(answers)
        if behind is not None:
            os.kill(behind[0].pid, SIGSTOP)
            primary.ask("CLIENT", "KILL", "TYPE", "replica")
            fleet.wait_for(behind[1])
        if frozen:
            os.kill(primary.pid, SIGSTOP)
        else:
            primary.kill()
        killed_at = time.monotonic()
        logged = [(server, len(server.log_since(0))) for server in fleet.servers]
        lost = f"Valkey at 127.0.0.1:{primary.port}: "
        if behind is not None:
            os.kill(behind[0].pid, SIGCONT)
        # By the log too: they may all have recovered between two looks.
        eventually(
            lambda: (
                not all(map(_is_ready, fleet.servers))
                or any(lost in line for server, since in logged for line in server.log_since(since))
            ),
            "some server notices",
            within,
        )
        noticed = time.monotonic() - killed_at
        eventually(lambda: all(map(_serves_all, fleet.servers)), "all servers go on", within)
        recovered = time.monotonic() - killed_at
        fleet.wait_for(answers)
        if frozen:
            os.kill(primary.pid, SIGCONT)
            fleet.wait_for(answers)
    return FailedOver(noticed, recovered, fleet.look())


def _is_ready(server: ServerProcess) -> bool:
    with Client(server) as client:
        return client.get("/readyz").status == 200


def _serves_all(server: ServerProcess) -> bool:
    """Whether it is ready, and all partitions answer."""
    with Client(server) as client:
        return client.get("/readyz").status == 200 and client.get(f"{API}/keys?limit=500").status == 200
