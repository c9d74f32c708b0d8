"""What holders report and operators do, against a plain model of the contract, in every order Hypothesis can think of.

`Plain` is the model: one record for each key and no order, index or timer. It looks at every key whenever time passes.
After each step the pool must pass its own `check()` and be in the state that the model is in. The events of each key
must be those that the model predicts; those of deadlines that no call has met may be missing yet.

The pool is restarted at any moment from what a journal has of it: the durable fields of each key as they were after the
last change of that key that was reported. So a change that isn't reported is found as one that a crash would undo.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from engine_support import START, serial_texts
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from keypool.core import pool as pool_module
from keypool.core.counters import COUNTERS
from keypool.core.errors import BlockLimit, LeaseOver, PoolError, StaleLease, UnknownKey
from keypool.core.events import DEADLINE, HOLDER, SILENT, By, Change, Origin
from keypool.core.keys import Details, Key, State
from keypool.core.keyset import PageQuery
from keypool.core.outcomes import Outcome, Report
from keypool.core.pool import Ended, Pool
from keypool.core.rules import PoolRules

MAX_KEYS = 8
WHICH = range(20)
MOSTLY = st.sampled_from([True, True, True, False])
OPERATOR = Origin(By.OPERATOR, "ops")
COUNTER_OF = {Change.QUARANTINED: "quarantines"} | {
    change: change.value for change in Change if change.value in COUNTERS
}
DURABLE = Key.__struct_fields__[: Key.__struct_fields__.index("details") + 1]
ATTEMPTS = (b"one" * 5 + b".", b"two" * 5 + b".")
RULES = (
    PoolRules(),
    PoolRules(max_block_seconds=600.0, error_threshold=1, max_quarantined_percent=0.0),
    PoolRules(rest_seconds=5.0, max_block_seconds=90.0, max_retry_after_seconds=50.0, cooldown_seconds=10.0),
    PoolRules(rest_seconds=90.0, forget_seconds=100.0, error_threshold=2, max_cooldown_seconds=150.0),
    PoolRules(cooldown_seconds=0.0, max_quarantined_percent=100.0, keepalive_seconds=70.0),
    PoolRules(cooldown_seconds=2000.0, max_quarantined_percent=34.0, keepalive_seconds=20_000.0),
)

Told = tuple[Change, str | None, Origin]
"""An event of a key: the change, the owner, and what brought it about."""


@dataclass
class PlainKey:
    """A key as the contract has it."""

    id: int
    text: str
    expires: float
    lease: int = 0
    owner: str | None = None
    client: str | None = None
    attempt: bytes | None = None
    acquired_at: float = 0.0
    release: float | None = None  # while blocked
    ready: float | None = None  # while cooling
    quarantined: bool = False
    to_be_quarantined: bool = False
    may_report: bool = False
    failures: int = 0
    failed_at: float = -math.inf
    outcome: Outcome | None = None
    reason: str | None = None
    operators_reason: str | None = None
    former: str | None = None
    imported: bool = False
    name: str | None = None
    labels: dict[str, str] | None = None
    data: bytes | None = None

    @property
    def details(self) -> Details:
        return Details(self.imported, self.name, self.labels, self.data, self.former)

    @property
    def state(self) -> State:
        if self.release is not None:
            return State.BLOCKED
        if self.ready is not None:
            return State.COOLING
        return State.QUARANTINED if self.quarantined else State.AVAILABLE


class Plain:
    """The contract's section 4, as plainly as it can be put. The keys that live, and the events of all there were."""

    def __init__(self, rules: PoolRules) -> None:
        self.rules = rules
        self.now = START
        self.keys: dict[int, PlainKey] = {}
        self.dead: dict[int, str] = {}  # the texts of keys that lived
        self.events: dict[int, list[Told]] = defaultdict(list)

    def with_text(self, text: str) -> PlainKey | None:
        """The key that this text names."""
        return next((key for key in self.keys.values() if text in (key.text, key.former)), None)

    def alive_until(self) -> float:
        """When a key that is kept alive now expires."""
        seconds = self.rules.keepalive_seconds
        return math.inf if seconds is None else self.now + seconds

    def in_state(self, state: State | None) -> list[PlainKey]:
        return [key for key in self.keys.values() if state in (None, key.state)]

    def time_comes(self, now: float) -> None:
        """All that the deadlines bring until then."""
        self.now = now
        for key in list(self.keys.values()):
            if key.release is not None and key.release <= min(now, key.expires):
                self._end_lease(key, Change.RELEASED, key.release, DEADLINE)
            if key.ready is not None and key.ready <= min(now, key.expires):
                key.ready = None
                self.events[key.id].append((Change.READY, None, DEADLINE))
            if key.expires <= now:
                self.purge(key, Change.EXPIRED, DEADLINE)

    def purge(self, key: PlainKey, change: Change, origin: Origin) -> None:
        self.events[key.id].append((change, key.owner, origin))
        self.dead[key.id] = self.keys.pop(key.id).text

    def generated(self, id: int, text: str) -> None:
        self.keys[id] = PlainKey(id, text, self.alive_until())
        self.events[id].append((Change.GENERATED, None, HOLDER))

    def acquired(
        self, key: PlainKey, lease: int, owner: str | None, block: float | None, attempt: bytes | None
    ) -> None:
        key.lease, key.owner, key.attempt = lease, owner, attempt
        key.acquired_at, key.may_report = self.now, True
        key.release = self.now + (self.rules.block_seconds if block is None else block)
        self.events[key.id].append((Change.ACQUIRED, owner, HOLDER))

    def _end_lease(
        self, key: PlainKey, change: Change, at: float, origin: Origin, ready: float = 0.0
    ) -> None:
        owner, key.owner, key.release, key.attempt = key.owner, None, None, None
        key.client = key.former = None
        self.events[key.id].append((change, owner, origin))
        if key.to_be_quarantined:
            self._quarantine(key, owner, origin)
            return
        if self.rules.rest_seconds > 0:
            ready = max(ready, at + self.rules.rest_seconds)
        if ready > at:
            key.ready = ready
            self.events[key.id].append((Change.COOLED, owner, origin))

    def _quarantine(self, key: PlainKey, owner: str | None, origin: Origin) -> None:
        key.ready, key.quarantined, key.to_be_quarantined = None, True, False
        self.events[key.id].append((Change.QUARANTINED, owner, origin))

    def failures(self, key: PlainKey) -> int:
        return key.failures if self.now < key.failed_at + self.rules.forget_seconds else 0

    def _back_off(self, failures: int) -> float:
        seconds = self.rules.cooldown_seconds
        for _ in range(failures - 1):
            seconds = min(seconds * 2, self.rules.max_cooldown_seconds)
        return min(seconds, self.rules.max_cooldown_seconds)

    def unblock(self, key: PlainKey, report: Report | None, origin: Origin) -> Ended:
        """By the key's latest lease, or without one and without a report."""
        if report is None:
            if key.state is not State.BLOCKED:
                return Ended(False)
            self._end_lease(key, Change.UNBLOCKED, self.now, origin)
            return Ended(True)
        if not key.may_report:
            return Ended(False)
        key.may_report = False
        key.outcome, key.reason = report.outcome, report.reason
        quarantine = report.outcome is Outcome.INVALID
        guarded = (
            quarantine and not key.quarantined and not key.to_be_quarantined and not self._has_room_for_one()
        )
        ready = self.now + self._cooldown(key, report, guarded)
        if key.state is State.BLOCKED:
            key.to_be_quarantined |= quarantine and not guarded
            self._end_lease(key, Change.UNBLOCKED, self.now, origin, ready)
        elif quarantine and not guarded:
            if key.state is not State.QUARANTINED:
                self._quarantine(key, None, origin)
        elif key.state is State.COOLING:
            key.ready = max(ready, key.ready or 0)
        elif key.state is State.AVAILABLE and ready > self.now:
            key.ready = ready
            self.events[key.id].append((Change.COOLED, None, origin))
        return Ended(True, guarded)

    def _has_room_for_one(self) -> bool:
        """Whether the guard lets a report quarantine one key more."""
        quarantined = len(self.in_state(State.QUARANTINED)) + 1
        return quarantined == 1 or quarantined / len(self.keys) <= self.rules.max_quarantined_percent / 100

    def _cooldown(self, key: PlainKey, report: Report, guarded: bool) -> float:
        """Count the failure, if it is one. Returns for how long the key cools."""
        if report.outcome is Outcome.OK:
            key.failures = 0
        if report.outcome is Outcome.OK or (report.outcome is Outcome.INVALID and not guarded):
            return 0.0
        key.failures, key.failed_at = self.failures(key) + 1, self.now
        if report.retry_after is not None:
            return min(report.retry_after, self.rules.max_retry_after_seconds)
        threshold = self.rules.error_threshold
        if report.outcome is Outcome.ERROR and (threshold is None or key.failures < threshold):
            return 0.0
        return self._back_off(key.failures)

    def quarantine(self, key: PlainKey, reason: str | None, now: bool) -> None:
        key.operators_reason = reason or key.operators_reason
        key.may_report = key.may_report and not now
        if key.state is State.BLOCKED:
            key.to_be_quarantined = True
            if now:
                self._end_lease(key, Change.UNBLOCKED, self.now, OPERATOR)
        elif key.state is not State.QUARANTINED:
            self._quarantine(key, None, OPERATOR)

    def restore(self, key: PlainKey) -> None:
        key.to_be_quarantined, key.failures = False, 0
        key.outcome = key.reason = key.operators_reason = None
        if key.state in (State.COOLING, State.QUARANTINED):
            key.ready, key.quarantined = None, False
            self.events[key.id].append((Change.RESTORED, None, OPERATOR))


class LeasesMachine(RuleBasedStateMachine):
    """See the module."""

    due_per_call: ClassVar[int] = pool_module.MAX_DUE_PER_CALL
    scan_limit: ClassVar[int] = 4
    plain: Plain

    def __init__(self) -> None:
        super().__init__()
        self._patches = pytest.MonkeyPatch()
        self._patches.setattr(pool_module, "MAX_DUE_PER_CALL", self.due_per_call)
        self._patches.setattr(pool_module, "PAGE_SCAN_LIMIT", self.scan_limit)
        self.now = START
        self.chance = 0.0
        self.subject = 1  # the key that the latest call was about
        self.new_text = serial_texts()
        self.told: dict[int, list[Told]] = defaultdict(list)
        self.counts: Counter[Change] = Counter()
        self.saved: dict[int, dict[str, Any]] = {}  # the durable fields of each key, as a journal has them
        self.reported: dict[int, Key] = {}  # since the journal's last commit

    def teardown(self) -> None:
        self._patches.undo()

    @initialize(rules=st.sampled_from(RULES), keys=st.integers(1, 4))
    def start(self, rules: PoolRules, keys: int) -> None:
        """A pool with some keys."""
        self.plain = self._new_plain(rules)
        self.pool = self._new_pool(rules)
        for _ in range(keys):
            self._generate()

    def _new_plain(self, rules: PoolRules) -> Plain:
        return Plain(rules)

    def _new_pool(self, rules: PoolRules) -> Pool:
        return Pool(rules, new_text=self.new_text, random=lambda: self.chance, on_change=self._on_change)

    def _on_change(self, change: Change, key: Key, owner: str | None, origin: Origin) -> None:
        self.reported[key.id] = key
        self.counts[change] += 1
        if change not in SILENT:
            self.told[key.id].append((change, owner, origin))

    def _find(self, which: int, by_text: bool) -> tuple[Key, PlainKey] | None:
        """A key found as a call finds it; None if it lives no more. Half of all calls are about one key."""
        if which >= len(WHICH) // 2 or self.subject not in self.plain.keys:
            ids = sorted(self.plain.keys) if which < len(WHICH) - 1 else []
            self.subject = (ids or range(1, self.pool.last_id + 1))[which % (len(ids) or self.pool.last_id)]
        id = self.subject
        plain = self.plain.keys.get(id)
        text = self.plain.dead[id] if plain is None else plain.text
        by_text = by_text and self.plain.with_text(text) is plain  # of the dead, another may have it
        try:
            found = self.pool.find(text, self.now) if by_text else self.pool.find_id(id, self.now)
        except UnknownKey:
            assert plain is None, f"id:{id} is unknown, but it is {plain}"
            return None
        assert plain is not None, f"{found!r} was found after its end"
        self._expect_same(found, plain)
        return found, plain

    def _expect_same(self, key: Key, plain: PlainKey) -> None:
        """Fails unless a key, which no overdue deadline has, is what the model has."""
        alike = ("text", "state", "lease", "owner", "client", "attempt", "details")
        held = {name: getattr(key, name) for name in (*alike, "quarantine_pending")}
        wanted = {name: getattr(plain, name) for name in alike}
        wanted["quarantine_pending"] = plain.to_be_quarantined
        held["deadlines"] = key.expires_deadline, key.release_deadline
        wanted["deadlines"] = plain.expires, plain.ready if plain.release is None else plain.release
        held["failures"], wanted["failures"] = (
            self.pool.failures_of(key, self.now),
            self.plain.failures(plain),
        )
        held["outcome"], wanted["outcome"] = key.history.outcome, plain.outcome
        held["reasons"] = key.history.reason, key.history.operator_reason
        wanted["reasons"] = plain.reason, plain.operators_reason
        assert held == wanted, f"{key!r}"

    def _settle(self) -> None:
        while self.pool.overdue(self.now) or self.pool.next_release(self.now) == 0:
            self.pool.process_due(self.now)

    def _settle_a_crowd(self) -> None:
        """What the engine's timers do in time, where one call isn't enough."""
        if self.due_per_call < MAX_KEYS:
            self._settle()

    # -- the calls

    @rule(
        chance=st.floats(0, 1, exclude_max=True),
        owner=st.sampled_from([None, "ann", "bob"]),
        block=st.sampled_from(["default", "short", "longest"]),
        attempt=st.sampled_from([None, ATTEMPTS[0], *ATTEMPTS]),
        client=st.sampled_from([None, "worker"]),
    )
    def acquire(
        self, chance: float, owner: str | None, block: str, attempt: bytes | None, client: str | None = None
    ) -> None:
        """An available key, if there is one; mostly there is."""
        self.chance = chance
        if not self.plain.in_state(State.AVAILABLE):
            self._generate()
        seconds = {"default": None, "short": 1.5, "longest": self.plain.rules.longest_block}[block]
        key = self.pool.acquire(self.now, owner, seconds, attempt, client)
        while key is None and self.pool.may_have_more(self.now):
            key = self.pool.acquire(self.now, owner, seconds, attempt, client)
        wanted = {plain.id for plain in self.plain.in_state(State.AVAILABLE)}
        if key is None:
            assert not wanted, f"nothing was served, though ids {wanted} are available"
            return
        assert key.id in wanted, f"{key!r} was served, but only ids {wanted} are available"
        assert key.lease == self.pool.last_lease > self.plain.keys[key.id].lease
        self.plain.acquired(self.plain.keys[key.id], key.lease, owner, seconds, attempt)
        self.plain.keys[key.id].client = client
        self.subject = key.id

    @rule(
        which=st.sampled_from(WHICH),
        outcome=st.sampled_from(Outcome),
        retry_after=st.sampled_from([None, 0.0, 1.0, 20.0, 100.0, 1e15]),
        reason=st.booleans(),
        lease=st.sampled_from(["any", "any", "new", "new", "unblocked", "released", "taken", "to be taken"]),
    )
    def report(
        self, which: int, outcome: Outcome, retry_after: float | None, reason: bool, lease: str
    ) -> None:
        """By the latest lease of any key; or by a new one, which may be over for one reason or another."""
        if lease != "any":
            self.acquire(chance=which / len(WHICH), owner="ann", block="default", attempt=None)
        if lease == "unblocked":
            self.unblock(0, "latest", reports=False, origin=HOLDER)
        elif lease == "released":
            rest = self.plain.rules.rest_seconds * (which % 2)
            self.time_passes(self.plain.rules.block_seconds + rest, kept_alive=True)
        elif lease in ("taken", "to be taken"):
            self.quarantine(0, None, now=lease == "taken")
        self._settle_a_crowd()
        found = self._find(which if lease == "any" else 0, by_text=True)
        if found is None or found[1].lease == 0:
            return
        key, plain = found
        waits = retry_after if outcome is Outcome.RATE_LIMITED else None
        report = Report(outcome, waits, f"{outcome}, {retry_after}" if reason else None)
        ended = self.plain.unblock(plain, report, HOLDER)
        assert self.pool.unblock(key, plain.lease, self.now, report, HOLDER) == ended
        self._expect_same(key, plain)

    @rule(
        which=st.sampled_from(WHICH),
        lease=st.sampled_from(["none", "latest", "older", "newer"]),
        reports=st.booleans(),
        origin=st.sampled_from([HOLDER, OPERATOR]),
    )
    def unblock(self, which: int, lease: str, reports: bool, origin: Origin) -> None:
        """Without a report; or with a lease number that isn't the key's latest, and changes nothing."""
        found = self._find(which, by_text=True)
        if found is None:
            return
        key, plain = found
        number = {"none": None, "latest": plain.lease, "older": plain.lease - 1, "newer": plain.lease + 1}[
            lease
        ]
        if number in (None, plain.lease or None):
            ended = self.plain.unblock(plain, None, origin)
            assert self.pool.unblock(key, number, self.now, None, origin) == ended
        else:
            with pytest.raises(StaleLease):
                self.pool.unblock(key, number, self.now, Report(Outcome.INVALID) if reports else None, origin)
        self._expect_same(key, plain)

    @rule(
        which=st.sampled_from(WHICH),
        lease=st.sampled_from(["new", "latest", "latest", "older"]),
        seconds=st.sampled_from([None, 1e-6, 30.0, 61.0, 1e6]),
    )
    def extend(self, which: int, lease: str, seconds: float | None) -> None:
        """A lease that is held, later than before and no later than the rules let it last."""
        if lease == "new":
            self.acquire(chance=which / len(WHICH), owner="bob", block="default", attempt=None)
            self.time_passes(which / 10, kept_alive=False)
            which = 0
        found = self._find(which, by_text=False)
        if found is None:
            return
        key, plain = found
        rules = self.plain.rules
        last = plain.acquired_at + rules.longest_block
        until = min(self.now + (rules.block_seconds if seconds is None else seconds), last)
        number = plain.lease - (lease == "older")
        refused: tuple[type[PoolError], str] | None = None
        if lease == "older" or plain.lease == 0:
            refused = StaleLease, "lease"
        elif plain.release is None or plain.to_be_quarantined:
            refused = LeaseOver, "an operator" if plain.to_be_quarantined else "has ended"
        elif until <= plain.release:
            refused = BlockLimit, "max_block_seconds" if last <= plain.release else "larger"
        if refused is None:
            self.pool.extend(key, number, seconds, self.now)
            plain.release = until
        else:
            with pytest.raises(refused[0], match=refused[1]):
                self.pool.extend(key, number, seconds, self.now)
        self._expect_same(key, plain)

    @rule(which=st.sampled_from(WHICH), reason=st.sampled_from([None, "leaked", "unpaid"]), now=st.booleans())
    def quarantine(self, which: int, reason: str | None, now: bool) -> None:
        """In any state."""
        found = self._find(which, by_text=False)
        if found is not None:
            self.pool.quarantine(found[0], reason, now, self.now, OPERATOR)
            self.plain.quarantine(found[1], reason, now)
            self._expect_same(*found)

    @rule(which=st.sampled_from(WHICH), after_all=st.booleans())
    def restore(self, which: int, after_all: bool) -> None:
        """In any state; perhaps one whose key was to be quarantined."""
        if after_all:
            self.quarantine(which, "leaked", now=False)
            which = 0
        found = self._find(which, by_text=False)
        if found is not None:
            self.pool.restore(found[0], self.plain.now, OPERATOR)
            self.plain.restore(found[1])
            self._expect_same(*found)

    @rule(which=st.sampled_from(WHICH))
    def keepalive(self, which: int) -> None:
        """In any state; it moves nothing else."""
        found = self._find(which, by_text=True)
        if found is not None:
            self.pool.keepalive(found[0], self.now)
            found[1].expires = self.plain.alive_until()
            self._expect_same(*found)

    @rule(which=st.sampled_from(WHICH), delete=MOSTLY)
    def a_key_comes_or_goes(self, which: int, delete: bool) -> None:
        """Generated, as long as there are few, or deleted, in any state."""
        if not delete or len(self.plain.keys) < 4:
            self._generate()
        elif (found := self._find(which, by_text=True)) is not None:
            self.pool.delete(found[0], OPERATOR)
            self.plain.purge(found[1], Change.DELETED, OPERATOR)

    def _generate(self) -> None:
        if len(self.plain.keys) < MAX_KEYS:
            key = self.pool.generate(self.now)
            self.plain.generated(key.id, key.text)

    @rule(
        what=st.sampled_from(
            [(state, order) for state in (None, *State) for order in ("id", "expiry")]
            + [(State.BLOCKED, "release"), (State.COOLING, "ready")]
        ),
        limit=st.integers(1, 5),
    )
    def read_a_list(self, what: tuple[State | None, str], limit: int) -> None:
        """Page by page, to its end."""
        self._settle_a_crowd()
        state, order = what
        query, found = PageQuery(state, None, order, limit), []
        while True:
            page = self.pool.page(query, self.now)
            assert len(page.keys) <= limit
            found += [key.id for key in page.keys]
            if page.next is None:
                break
            query.after = page.next
        place: Callable[[PlainKey], tuple[float, int]] = lambda key: (  # noqa: E731
            {"release": key.release, "ready": key.ready, "expiry": key.expires}.get(order) or 0.0,
            key.id,
        )
        listed = [key for key in self.plain.in_state(state) if order != "expiry" or key.expires < math.inf]
        assert found == [key.id for key in sorted(listed, key=place)]

    # -- time, timers and restarts

    @rule(
        seconds=st.sampled_from(
            [0.001, 1 / 64, 1.0, 5.0, 20.0, 59.0, 60.0, 65.0, 100.0, 150.0, 250.0, 3600.0]
        ),
        kept_alive=MOSTLY,
    )
    def time_passes(self, seconds: float, kept_alive: bool) -> None:
        """Any step; mostly with all keys kept alive before, or few cooldowns would end in a key's life."""
        if kept_alive:
            self._keep_all_alive()
        self._time_comes(self.now + seconds)

    def _keep_all_alive(self) -> None:
        for plain in self.plain.keys.values():
            self.pool.keepalive(self.pool.find_id(plain.id, self.now), self.now)
            plain.expires = self.plain.alive_until()

    @rule(which=st.sampled_from(WHICH), before=st.booleans(), kept_alive=MOSTLY)
    def time_comes_to_a_deadline(self, which: int, before: bool, kept_alive: bool) -> None:
        """Onto one of the moments at which something changes, or as close before it as a float can be."""
        if kept_alive:
            self._keep_all_alive()
        moments = sorted(moment for moment in self._moments() if self.now < moment < math.inf)
        if moments:
            moment = moments[which % len(moments)]
            self._time_comes(max(self.now, math.nextafter(moment, 0)) if before else moment)

    def _moments(self) -> Iterator[float]:
        for key in self.plain.keys.values():
            yield from (key.expires, key.failed_at + self.plain.rules.forget_seconds)
            yield from (moment for moment in (key.release, key.ready) if moment is not None)
            yield key.acquired_at + self.plain.rules.longest_block

    def _time_comes(self, moment: float) -> None:
        self.now = moment
        self.plain.time_comes(moment)

    @rule()
    def all_timers_fire(self) -> None:
        """After that nothing is overdue, and all has been told."""
        self._settle()
        for id, events in self.plain.events.items():
            assert _noticed(events) == _noticed(self.told[id]), f"id:{id}"
        counts = {State.AVAILABLE: self.pool.available, State.BLOCKED: self.pool.blocked}
        counts |= {State.COOLING: self.pool.cooling, State.QUARANTINED: self.pool.quarantined}
        assert counts == {state: len(self.plain.in_state(state)) for state in State}
        assert self.pool.total == len(self.plain.keys)
        ends = [end for key in self.plain.keys.values() if (end := key.release or key.ready) is not None]
        assert self.pool.next_release(self.now) == (min(ends) - self.now if ends else None)

    @precondition(lambda self: self.saved)
    @rule()
    def restart(self) -> None:
        """From what the journal has. Nothing is reported."""
        old = self.pool
        self.pool = self._new_pool(self.plain.rules)
        self.pool.last_id, self.pool.last_lease, self.pool.counters = (
            old.last_id,
            old.last_lease,
            old.counters,
        )
        told = self.counts.total()
        for _, durable in sorted(self.saved.items()):
            self.pool.load(Key(**durable))
        assert self.counts.total() == told
        self.reported.clear()

    # -- what holds at all times

    @invariant()
    def all_is_kept(self) -> None:
        """A journal that saves the keys of which it gets a change has every key as it is."""
        for id, key in self.reported.items():
            self.saved[id] = {name: getattr(key, name) for name in DURABLE}
            if key.expires_deadline < 0:
                del self.saved[id]
        self.reported.clear()
        kept = {key.id: {name: getattr(key, name) for name in DURABLE} for key in self.pool._by_id.walk(None)}
        assert kept == self.saved

    @invariant()
    def the_pool_is_whole(self) -> None:
        """Its own proof."""
        self.pool.check()

    @invariant()
    def the_states_are_those_of_the_model(self) -> None:
        """By deadline, whether or not a call has met it."""
        pool_keys = {key.id: key for key in self.pool._by_id.walk(None)}
        for id, plain in self.plain.keys.items():
            key = pool_keys[id]
            assert self.pool.state_of(key, self.now) is plain.state
            if key.release_deadline is None or key.release_deadline > self.now:
                self._expect_same(key, plain)
        assert all(
            pool_keys[id].expires_deadline <= self.now for id in pool_keys.keys() - self.plain.keys.keys()
        )

    @invariant()
    def the_events_are_those_of_the_model(self) -> None:
        """Those of deadlines come when somebody notices, and those of a key that has expired may not come at all."""
        for id, events in self.plain.events.items():
            told = self.told[id]
            if told and told[-1][0] is Change.EXPIRED:
                assert events[-1][0] is Change.EXPIRED, f"id:{id} lives, but was told to have expired"
                told = told[:-1]
            assert told == events[: len(told)], f"id:{id}"
            late = events[len(told) :]
            assert all(origin == DEADLINE for _, _, origin in late), f"id:{id}: nobody was told of {late}"

    @invariant()
    def the_leases_of_an_attempt_are_those_that_are_held(self) -> None:
        """In the order in which they were given."""
        for attempt in ATTEMPTS:
            held = sorted((key.lease, key.id) for key in self.plain.keys.values() if key.attempt == attempt)
            assert [key.id for key in self.pool.leases_of(attempt, self.now)] == [id for _, id in held]

    @invariant()
    def the_counters_are_the_events(self) -> None:
        """Each counter grew by one with each change, and in no other way."""
        for change, name in COUNTER_OF.items():
            assert getattr(self.pool.counters, name) == self.counts[change], name


def _noticed(events: list[Told]) -> list[Told] | str:
    """Events as they are when all deadlines have been noticed: of an expired key only its end counts."""
    return "expired" if events[-1][0] is Change.EXPIRED else events


class CrowdedLeasesMachine(LeasesMachine):
    """The same with so small a number of due keys for each call that any few are a crowd."""

    due_per_call = 2


SETTINGS = settings(
    max_examples=200, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.parametrize("examples", [50, pytest.param(200, marks=pytest.mark.thorough)])
def test_leases_end_as_the_plain_model_has_it_whatever_is_reported_in_whatever_order(examples: int) -> None:
    """Every outcome, late and repeated, quarantine, restore, extensions, restarts, and every deadline."""
    run_state_machine_as_test(LeasesMachine, settings=settings(SETTINGS, max_examples=examples))


@pytest.mark.thorough
def test_leases_end_as_the_plain_model_has_it_when_any_few_due_keys_are_a_crowd() -> None:
    """The same, with two due keys for each call."""
    run_state_machine_as_test(CrowdedLeasesMachine, settings=SETTINGS)
