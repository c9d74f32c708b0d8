"""Kills servers under a load of attempts, reports, extensions and quarantines, and finds the promises that they broke.

    Workers acquire, report, extend, ... and repeat each call that a kill cut off ---+
    Crasher kills a server, starts another, and looks at every key -----------------+--> Calls --> judge(): sentences

A call took effect between two moments (of `time.monotonic`); one that was cut off did so before the death of its
server, or never. The judge concludes only what follows in every order that these moments allow, so that all it finds
are faults of the server; `tests/test_crash_leases.py` shows that it finds each kind.

Keys are neither deleted nor do they expire here: `crash.py` has that, and the counters. Nothing here imports the
product.
"""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from math import inf
from pathlib import Path
from signal import SIGKILL
from typing import Any, Final

from crash import Floor
from support import ACQUIRE, API, Client, ServerProcess, eventually

TOLERANCE: Final = 0.05
"""Seconds by which a deadline may be early: 5 ms of the server's, and the drift between two clocks across a restart."""

FLAGS: Final = (
    "--port=0", "--block-seconds=2", "--max-block-seconds=8", "--keepalive-seconds=36000", "--cooldown-seconds=0.3",
    "--max-cooldown-seconds=4", "--max-retry-after-seconds=5", "--error-threshold=2", "--forget-seconds=36000",
    "--rest-seconds=0.4",
)  # fmt: skip
REFUSALS: Final = ("stale-lease", "lease-over", "block-limit", "no-key-available", "unknown-key")


@dataclass(eq=False, slots=True)
class Call:
    """A call about one key, and what its answer says; a batch is one for each of its keys.

    `lease` is the number that was sent, or the key's latest in the answer, 0 if it was never served. `attempt` is the
    Idempotency-Key, which is the owner's name too. `left` are the seconds of a block or a cooldown that are left.
    """

    what: str  # acquire, report, free (an unblock without an outcome), extend, quarantine, restore, look
    body: Mapping[str, Any] = field(default_factory=dict)
    key: int | None = None
    lease: int | None = None
    attempt: str | None = None
    asked: float = 0.0
    ended: float = inf
    status: str = "cut"  # or done, or the code of an error
    state: str | None = None
    left: float | None = None
    failures: int | None = None
    changed: bool | None = None
    guarded: bool = False
    replayed: bool = False
    handle: str | None = None

    @property
    def done(self) -> bool:
        """Whether it changed something for certain."""
        return self.status == "done" and self.changed is not False

    @property
    def possible(self) -> bool:
        """Whether it may have changed something."""
        return self.status == "cut" or self.done

    @property
    def end(self) -> float:
        """The earliest moment at which what the answer promises may end."""
        return self.asked + (self.left or 0) - TOLERANCE

    def tell(self, found: Mapping[str, Any]) -> None:
        """Note an answer, or one key of it."""
        self.status, self.key, self.lease = "done", found["id"], found.get("lease", self.lease) or 0
        self.attempt, self.state = found.get("owner") or self.attempt, found.get("state", "blocked")
        self.left = found.get("release_in" if self.state == "blocked" else "available_in")
        self.failures, self.changed = found.get("failures"), found.get("changed")
        self.guarded, self.handle = found.get("guarded", False), found.get("handle")


# -------------------------------------------------------------------------------------------------- the judge

Held = dict[int, list[tuple[float, float]]]
"""From when to when each lease was held for certain, once for each answer that implies it."""


def judge(calls: Sequence[Call]) -> list[str]:
    """What is wrong, each fault a sentence that begins with its kind; nothing if every promise was kept."""
    by_key: dict[int, list[Call]] = defaultdict(list)
    for call in sorted(calls, key=lambda call: call.ended):
        if call.key is not None:
            by_key[call.key].append(call)
    held: Held = defaultdict(list)
    faults = []
    for key, its in sorted(by_key.items()):
        found = [*_leases(its, held), *_out_of_service(its), *_failures(its), *_reports(its), *_latest(its)]
        faults += [f"{fault} (key id:{key})" for fault in found]
    return [*faults, *_attempts(calls, held), *_numbers(calls)]


def _until(call: Call, promised: float, enders: Iterable[Call]) -> float:
    """Until when nothing can have ended what a call promised."""
    return min([promised, *(each.asked for each in enders if each is not call and each.ended >= call.asked)])


def _after(call: Call, until: float, its: Iterable[Call]) -> Iterator[tuple[Call, str]]:
    """What was certainly told of the key after a call and before a moment, in words too."""
    for other in its:
        if other.ended >= until:
            return
        newer = (other.lease or 0) - (call.lease or 0)
        told = other.state is not None or (other.status == "stale-lease" and newer >= 0)
        if told and (other.asked > call.ended or newer > 0):
            yield other, f"{other.what} of lease {other.lease} told {other.state or other.status}"


def _leases(its: Sequence[Call], held: Held) -> Iterator[str]:
    """A lease lasts for as long as was told, unless it is given back or an operator takes the key away."""
    for call in its:
        if call.state != "blocked" or not call.lease:
            continue
        gives = [each for each in its if each.what in ("report", "free") and each.lease == call.lease]
        takes = [each for each in its if each.body.get("now")]
        until = _until(call, call.end, (each for each in (*gives, *takes) if each.possible))
        held[call.lease].append((call.ended, until))
        for other, words in _after(call, until, its):
            if (other.lease or 0) > call.lease:
                yield f"held by two: {words} {call.end - other.ended:.3f} s before lease {call.lease} may end"
            elif other.state != "blocked":
                yield f"lost lease: {words} {call.end - other.ended:.3f} s before it may end"
            elif _shorter(call, other):
                yield f"lost {'extension' if call.what == 'extend' else 'lease'}: {words} for {other.left} s only"


def _out_of_service(its: Sequence[Call]) -> Iterator[str]:
    """A cooldown lasts for as long as was told, a quarantine for good; only a restore ends them."""
    restores = [each for each in its if each.what == "restore"]
    for call in its:
        if call.state == "cooling":
            for other, words in _after(call, _until(call, call.end, restores), its):
                if other.state != "quarantined" and (other.state != "cooling" or _shorter(call, other)):
                    yield f"cooldown shortened: {words} {call.end - other.ended:.3f} s before its end"
        elif call.state == "quarantined" or (call.what == "quarantine" and call.status == "done"):
            for other, words in _after(call, _until(call, inf, restores), its):
                if other.state != "quarantined" and (other.state, other.lease) != (call.state, call.lease):
                    yield f"lost quarantine: {words}, and nobody restored it"


def _shorter(call: Call, other: Call) -> bool:
    """Whether another call told of an earlier end. Lengths of time may be told short by as long as the answer took."""
    return other.ended + (other.ended - other.asked) + (other.left or 0) < call.end


def _failures(its: Sequence[Call]) -> Iterator[str]:
    """Failures in a row are the reports of failures, one a lease, since the last that was ok or a restore."""
    failing = [
        each for each in its if each.what == "report" and each.possible and each.body["outcome"] != "ok"
    ]
    failing = [each for each in failing if each.body["outcome"] != "invalid" or each.guarded or not each.done]
    resets = [each for each in its if each.what == "restore" or each.body.get("outcome") == "ok"]
    for call in its:
        if call.failures is None:
            continue
        last = max(
            (each.ended for each in resets if each.possible and each.asked <= call.ended), default=-inf
        )
        sure = {each.lease for each in failing if each.done and each.asked > last and each.ended < call.asked}
        since = max((each.asked for each in resets if each.done and each.ended < call.asked), default=-inf)
        most = {each.lease for each in failing if each.ended >= since and each.asked <= call.ended}
        if not len(sure) <= call.failures <= len(most):
            kind = "not counted" if call.failures < len(sure) else "counted twice"
            yield f"{kind}: {call.failures} failures told by {call.what}, wanted {len(sure)} to {len(most)}"


def _reports(its: Sequence[Call]) -> Iterator[str]:
    """A lease's first report counts, no other, and none after an operator took the key away."""
    for call in its:
        if call.what != "report" or call.status != "done":
            continue
        before = [each for each in its if each is not call and each.possible and each.asked <= call.ended]
        same = [each for each in before if each.what == "report" and each.lease == call.lease]
        if call.changed and any(each.done for each in same):
            yield f"counted twice: two reports of lease {call.lease} changed something"
        elif not call.changed and not same and not any(each.body.get("now") for each in before):
            yield f"not counted: the first report of lease {call.lease} changed nothing"


def _latest(its: Sequence[Call]) -> Iterator[str]:
    """A key's latest lease only grows, and its handles remain valid."""
    told = [each for each in its if each.status in ("done", "stale-lease")]
    latest = Floor((each.ended, (each.lease or 0) + (each.status != "done")) for each in told)
    handles: dict[int | None, str] = {}
    for call in its:
        if call.status == "unknown-key" or (
            call.handle and handles.setdefault(call.lease, call.handle) != call.handle
        ):
            yield f"lost handle: {call.what} of lease {call.lease} told {call.handle or call.status}"
        if call.status == "done" and (call.lease or 0) < (before := latest.by(call.asked)):
            yield f"lease went back: {call.what} told {call.lease} after {before:.0f}"


def _attempts(calls: Sequence[Call], held: Held) -> Iterator[str]:
    """While the lease of an attempt is held, its repeat gets that one, and it has no others."""
    leases: dict[str | None, set[int]] = defaultdict(set)
    answers: dict[tuple[str | None, float, float], set[int]] = defaultdict(set)
    sizes = {call.attempt: call.body.get("count", 1) for call in calls if call.what == "acquire"}
    for call in calls:
        if call.state == "blocked" and call.attempt and call.lease:
            leases[call.attempt].add(call.lease)
        if call.what == "acquire" and call.status != "cut":
            answers[call.attempt, call.asked, call.ended].add(call.lease or 0)
    for (attempt, asked, ended), got in answers.items():
        for lease in leases[attempt] - got:
            if any(start < asked and ended < end for start, end in held[lease]):
                yield f"second lease: a repeat of attempt {attempt} got {got}, though {lease} was held"
    for attempt, its in leases.items():
        for start in [start for lease in its for start, _ in held[lease]]:
            now = [lease for lease in its if any(begun <= start < end for begun, end in held[lease])]
            if len(now) > sizes.get(attempt, 1):
                yield f"two leases: attempt {attempt} held {now} at once"
                break


def _numbers(calls: Sequence[Call]) -> Iterator[str]:
    """A new lease has a larger number than all before it, of one key and one attempt."""
    latest = Floor((call.ended, call.lease or 0) for call in calls if call.status == "done")
    of: dict[int, tuple[int | None, str | None]] = {}
    for call in calls:
        if call.state != "blocked" or not call.lease or not call.attempt:
            continue
        if call.what == "acquire" and not call.replayed and call.lease <= latest.by(call.asked):
            yield f"lease went back: {call.lease} was given after {latest.by(call.asked):.0f}"
        if (known := of.setdefault(call.lease, (call.key, call.attempt))) != (call.key, call.attempt):
            yield f"lease repeated: {call.lease} is of {known} and of {(call.key, call.attempt)}"


# ------------------------------------------------------------------------------------------------ the workers

SHARES: Final = {
    "acquire": 8, "repeat": 3, "report": 10, "free": 2, "extend": 4, "quarantine": 2, "restore": 3, "look": 3,
}  # fmt: skip


class Worker:
    """One client, which repeats a call until it is answered, as one that retries would."""

    def __init__(self, crasher: Crasher, name: str) -> None:
        self._crasher = crasher
        self._draw = random.Random(name)
        self._attempts = (f"{name}-{number}" for number in count())
        self._clients: dict[ServerProcess, Client] = {}
        self._leases: list[Call] = []  # the latest that it was given; some are over

    def run(self) -> None:
        """Make one call after the other until the load ends."""
        try:
            while not self._crasher.stopping.is_set():
                self._act(*self._draw.choices(list(SHARES), list(SHARES.values())))
        finally:
            for client in self._clients.values():
                client.close()

    def _act(self, what: str) -> None:
        key = self._draw.choice(self._crasher.keys)
        lease = self._draw.choice(self._leases) if self._leases else None
        if what == "acquire":
            self._acquire(next(self._attempts), None)
        elif what == "restore":  # of a quarantined key mostly: any other forgets its failures
            found = [each for each, state in [*self._crasher.states.items()] if state == "quarantined"]
            key = self._draw.choice(found) if found and self._draw.random() < 0.8 else key
            self._ask(Call(what, key=key), f"{API}/keys/id:{key}/restore")
        elif what == "quarantine":
            body = {"reason": "by an operator", "now": self._draw.random() < 0.4}
            self._ask(Call(what, body, key), f"{API}/keys/id:{key}/quarantine")
        elif lease is None or (what == "look" and self._draw.random() < 0.5):
            self._ask(Call("look", key=key), f"{API}/keys/id:{key}")
        elif what == "look":
            self._ask(Call(what, key=lease.key, lease=lease.lease), f"{API}/keys/{lease.handle}")
        elif what == "repeat":
            self._acquire(lease.attempt, lease.body)
        else:
            last = what == "report" and self._draw.random() < 0.7
            self._change(what, self._leases.pop() if last else lease)

    def _acquire(self, attempt: str | None, body: Mapping[str, Any] | None) -> None:
        if body is None:
            several = {"op": "acquire", "count": self._draw.randint(1, 3)}
            body = {"owner": attempt} | self._draw.choice(({}, {}, {}, {"wait": 0.2}, several))
            body |= self._draw.choice(({}, {}, {"block_seconds": 1}, {"block_seconds": 6}))
        self._leases += self._ask(Call("acquire", body, attempt=attempt), _path(body))
        del self._leases[:-6]

    def _change(self, what: str, lease: Call) -> None:
        """Report, free or extend, by the handle, or by id and number."""
        body: dict[str, Any] = {"seconds": self._draw.choice((2, 5, 20))} if what == "extend" else {}
        if what == "report":
            [body["outcome"]] = self._draw.choices(("ok", "rate_limited", "error", "invalid"), (5, 4, 3, 1))
            if body["outcome"] == "rate_limited" and self._draw.random() < 0.7:
                body["retry_after"] = self._draw.choice((0, 0.05, 0.5, 3, 50))
        name = self._draw.choice((lease.handle, f"id:{lease.key}"))
        if name != lease.handle or what == "extend":
            body["lease"] = lease.lease
        path = f"{API}/keys/{name}/{'extend' if what == 'extend' else 'unblock'}"
        self._ask(Call(what, body, lease.key, lease.lease), path)

    def _ask(self, intent: Call, path: str) -> list[Call]:
        """The call that was answered, one for each key, after as many others as were cut off. None if all ends."""
        while (server := self._crasher.some(self._draw)) is not None:
            client = self._clients.get(server) or self._clients.setdefault(server, Client(server))
            try:
                return self._crasher.ask(client, replace(intent), path)
            except (OSError, http.client.HTTPException):
                assert server not in self._crasher.servers, "a living server cut a call off"
        return []


def _path(body: Mapping[str, Any]) -> str:
    """Of an acquire."""
    return API + "/batch" if "op" in body else ACQUIRE


# ---------------------------------------------------------------------------------------------------- crashes


class Crasher:
    """Servers on one data file, or over one Valkey, under load, and killed. Drawn from the seed, but for the timing.

    `store` is the flag for where the keys are kept; `slack`, the seconds after the death of a server in which what it
    had sent elsewhere may still take effect.
    """

    def __init__(self, store: str, folder: Path, seed: int, *, servers: int = 1, slack: float = 0.0) -> None:
        self.calls: list[Call] = []
        self.keys: list[int] = []
        self.servers: list[ServerProcess] = []
        self.states: dict[int, str] = {}  # of keys, as last told
        self.stopping = threading.Event()
        self.kills = self.answers = 0
        self._known: dict[int, Call] = {}  # the acquire of each key's latest lease
        self._flags, self._folder = [store, *FLAGS], folder
        self._seed, self._slack, self._count = seed, slack, servers
        self._draw = random.Random(seed)

    def run(self, kills: int, workers: int = 8, keys: int = 60) -> list[str]:
        """Kill so many servers under load, and let the others end as usual: what is wrong."""
        with ThreadPoolExecutor(workers) as pool:
            try:
                self.servers += [ServerProcess(self._flags, cwd=self._folder) for _ in range(self._count)]
                with Client(self.servers[0]) as client:
                    self.keys += [key["id"] for key in client.make_many(keys)]
                load = [pool.submit(Worker(self, f"w{self._seed}-{number}").run) for number in range(workers)]
                for _ in range(kills):
                    self._kill(load)
                self.stopping.set()
                for worker in load:
                    worker.result(60)
                self._look(self.servers[0])
                for server in self.servers:
                    server.finish()
            finally:
                self.stopping.set()
                while self.servers:
                    self.servers.pop().close()
        return judge(self.calls)

    def _kill(self, load: Sequence[Future[None]]) -> None:
        """Kill a server after some more answers, start another, look at every key."""
        target = self.answers + self._draw.randint(30, 200)
        eventually(lambda: self.answers >= target or any(map(Future.done, load)), f"{target} answers", 60)
        for worker in filter(Future.done, load):
            worker.result()  # ended by an error
        victim = self.servers.pop(self._draw.randrange(len(self.servers)))
        victim.signal(SIGKILL)
        victim.wait()
        victim.close()
        victim.check()
        self.kills += 1
        server = ServerProcess(self._flags, cwd=self._folder)
        self._look(server)
        self.servers.append(server)

    def _look(self, server: ServerProcess) -> None:
        """Every key, by its id and by the handle of its latest lease, whose attempt is repeated if that is held."""
        with Client(server) as client:
            for key in self.keys:
                known, held = self._known.get(key), self.states.get(key) == "blocked"
                self.ask(client, Call("look", key=key), f"{API}/keys/id:{key}")
                if known is not None:
                    self.ask(client, Call("look", key=key, lease=known.lease), f"{API}/keys/{known.handle}")
                if known is not None and held:
                    self.ask(client, Call("acquire", known.body, attempt=known.attempt), _path(known.body))

    def some(self, draw: random.Random) -> ServerProcess | None:
        """Any server, as soon as there is one; None if nothing more is to be asked."""
        found = eventually(lambda: self.stopping.is_set() or [*self.servers], "a server", 60)
        return None if found is True else draw.choice(found)

    def ask(self, client: Client, call: Call, path: str) -> list[Call]:
        """Make a call, and complete it by its answer: one for each key. Raises OSError or HTTPException if cut off."""
        self.calls.append(call)
        headers = {"Idempotency-Key": call.attempt} if call.attempt else {}
        call.asked = time.monotonic()
        try:
            look = call.what == "look"
            answer = client.get(path) if look else client.post(path, json=call.body, headers=headers)
        except BaseException:
            call.ended = time.monotonic() + self._slack
            raise
        call.ended = answer.answered_at
        self.answers += 1
        if answer.status != 200:
            call.status = answer.json["code"]
            assert call.status in REFUSALS, str(answer)
            return []
        call.replayed = answer.headers["Idempotent-Replayed"] == "true"
        keys = answer.json.get("keys", [answer.json])
        calls = [call, *(replace(call) for _ in keys[1:])]
        self.calls += calls[1:]
        for each, found in zip(calls, keys, strict=True):
            each.tell(found)
            self.states[found["id"]] = each.state or ""
            if each.handle:
                self._known[found["id"]] = each
        return calls

    def __str__(self) -> str:
        cut = sum(call.status == "cut" for call in self.calls)
        replays = sum(call.replayed for call in self.calls)
        return f"{self.kills} kills, {self.answers:,} answers, {cut} calls cut off, {replays} replays"
