"""Secrets with several seats against a plain model of them, in every order Hypothesis can think of.

`PlainSecret` is the model: what all seats share, and a record for each seat. After each step every seat must be in the
state that the model has, an available one must have budget, the pool must pass its own `check()`, and each counter must
be the number of its events. The pool is restarted from the rows that a data file would have, perhaps sealed, of the
keys whose changes were reported.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from engine_support import START, serial_texts
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from keypool.core.answers import KeyPatch, NewKey
from keypool.core.counters import COUNTERS
from keypool.core.errors import ManySeats, PoolFull, SecretExists, StaleLease, UnknownKey
from keypool.core.events import By, Change, Origin
from keypool.core.keys import DEAD, Key, State
from keypool.core.outcomes import Outcome, Report
from keypool.core.pace import Pace
from keypool.core.pool import Pool
from keypool.core.rules import PoolRules
from keypool.engine.durable.rows import Row, key_of, row_of
from keypool.engine.sealing import Sealer

OPERATOR = Origin(By.OPERATOR, "ops")
MAX_KEYS = 12
RULES = (
    PoolRules(keepalive_seconds=None, max_keys=MAX_KEYS),
    PoolRules(keepalive_seconds=200.0, max_keys=MAX_KEYS, rest_seconds=30.0, max_quarantined_percent=50.0),
    PoolRules(keepalive_seconds=90.0, max_keys=MAX_KEYS, max_quarantined_percent=0.0, error_threshold=2),
    PoolRules(keepalive_seconds=None, max_keys=MAX_KEYS, rest_seconds=5.0, max_quarantined_percent=100.0),
    PoolRules(keepalive_seconds=None, max_keys=MAX_KEYS, pace=Pace(3, 60.0)),
    PoolRules(keepalive_seconds=200.0, max_keys=MAX_KEYS, rest_seconds=5.0, pace=Pace(4, 30.0, 3)),
)
COUNTER_OF = {Change.QUARANTINED: "quarantines"} | {
    change: change.value for change in Change if change.value in COUNTERS
}
which = st.integers(0, 20)
used = st.sampled_from([1, 1, 2, 9])
NAMES = ("one", "two", "three")
SEALER = Sealer([bytes(range(32))])


@dataclass
class PlainSeat:
    id: int
    expires: float
    lease: int = 0
    # Among leases that end at the same moment: that of the acquire, after a restart that of the ids.
    turn: int = 0
    release: float | None = None  # while held
    ready: float = 0.0  # the end of its own cooldown, or of its secret's
    may_report: bool = False
    former: str | None = None


@dataclass
class PlainSecret:
    text: str
    name: str | None
    wanted: int
    seats: list[PlainSeat] = field(default_factory=list)
    cools: float = 0.0
    quarantined: bool = False
    failures: int = 0
    failed_at: float = 0.0
    outcome: Outcome | None = None
    had_formers: bool = False
    pace: Pace | None = None
    paced: float = 0.0
    shared: bool = False  # whether it ever had several seats, which then cool as soon as the budget is spent

    @property
    def has_budget_at(self) -> float:
        return 0.0 if self.pace is None else self.paced - self.pace.tolerance

    def charge(self, paced: float, now: float) -> None:
        self.paced = paced
        if self.shared and self.has_budget_at > now:
            self.cool(self.has_budget_at)

    def free(self) -> list[PlainSeat]:
        return [seat for seat in self.seats if seat.release is None]

    def state(self, seat: PlainSeat, now: float) -> State:
        if seat.release is not None:
            return State.BLOCKED
        if self.quarantined:
            return State.QUARANTINED
        return State.COOLING if seat.ready > now else State.AVAILABLE

    def end_lease(self, seat: PlainSeat, at: float, rest: float, cools: float = 0.0) -> None:
        seat.release = seat.former = None
        if len(self.seats) > self.wanted:
            self.seats.remove(seat)
        elif not self.quarantined:
            seat.ready = max(at + rest if rest else 0.0, cools, self.cools)
            if not self.shared:
                seat.ready = max(seat.ready, self.has_budget_at)

    def cool(self, until: float) -> None:
        self.cools = max(self.cools, until)
        for seat in self.free():
            seat.ready = max(seat.ready, self.cools)

    def leave(self) -> None:
        self.quarantined = True
        for seat in self.seats:
            seat.ready = 0.0

    def restore(self, now: float) -> None:
        out = [seat for seat in self.free() if self.state(seat, now) is not State.AVAILABLE]
        self.quarantined, self.cools, self.failures, self.outcome = False, 0.0, 0, None
        if self.shared and self.has_budget_at > now:
            self.cools = self.has_budget_at
        for seat in self.seats:
            seat.ready = 0.0
        for seat in out:
            seat.ready = self.has_budget_at


class SeatsMachine(RuleBasedStateMachine):
    """See the module."""

    @initialize(rules=st.sampled_from(RULES), sealer=st.sampled_from([None, SEALER]))
    def start(self, rules: PoolRules, sealer: Sealer | None) -> None:
        self.pool_rules, self.now, self.chance, self.sealer = rules, START, 0.0, sealer
        self.new_text = serial_texts()
        self.counts: Counter[Change] = Counter()
        self.rows: dict[int, Row] = {}  # as a data file has them
        self.changed: dict[int, Key] = {}
        self.secrets: list[PlainSecret] = []
        self.pool = self._new_pool()
        self.import_(3, "one", seats=3)
        self.generate()

    def _new_pool(self) -> Pool:
        return Pool(
            self.pool_rules, new_text=self.new_text, random=lambda: self.chance, on_change=self._on_change
        )

    def _on_change(self, change: Change, key: Key, _owner: str | None, _origin: Origin) -> None:
        self.counts[change] += 1
        self.changed[key.id] = key

    def _settle(self) -> None:
        while self.pool.overdue(self.now) or self.pool.next_release(self.now) == 0:
            self.pool.process_due(self.now)

    def _expires(self) -> float:
        seconds = self.pool_rules.keepalive_seconds
        return float("inf") if seconds is None else self.now + seconds

    def _all(self) -> list[tuple[PlainSecret, PlainSeat]]:
        pairs = [(secret, seat) for secret in self.secrets for seat in secret.seats]
        return sorted(pairs, key=lambda pair: pair[1].id)

    def _pick(self, number: int) -> tuple[Key, PlainSecret, PlainSeat] | None:
        pairs = self._all()
        if not pairs:
            return None
        secret, seat = pairs[number % len(pairs)]
        return self.pool.find_id(seat.id, self.now), secret, seat

    # -- the calls

    @rule(number=which, name=st.sampled_from([None, "one", "two"]), seats=st.integers(1, 5))
    def import_(self, number: int, name: str | None, seats: int) -> None:
        text = f"sk-live-from-elsewhere-{number % 4}"
        taken = {secret.text for secret in self.secrets} | {seat.former for _, seat in self._all()}
        names = {secret.name for secret in self.secrets if secret.name}
        if text in taken or name in names:
            return
        if len(self._all()) + seats > MAX_KEYS:
            with pytest.raises(PoolFull):
                self.pool.import_key(NewKey(text, name, seats=seats), self.now, OPERATOR)
            return
        key = self.pool.import_key(NewKey(text, name, seats=seats), self.now, OPERATOR)
        ids = [seat.id for seat in self.pool.seats_of(key)]
        assert ids == list(range(key.id, key.id + seats))
        made = [PlainSeat(id, self._expires()) for id in ids]
        self.secrets.append(PlainSecret(text, name, seats, made, pace=self.pool_rules.pace, shared=seats > 1))

    @rule()
    def generate(self) -> None:
        if len(self._all()) < MAX_KEYS:
            key = self.pool.generate(self.now)
            seats = [PlainSeat(key.id, self._expires())]
            self.secrets.append(PlainSecret(key.text, None, 1, seats, pace=self.pool_rules.pace))

    @rule(chances=st.lists(which, min_size=1, max_size=4), block=st.sampled_from([1.5, 20.0, 60.0]))
    def acquire(self, chances: list[int], block: float) -> None:
        for chance in chances:
            self._acquire(chance / 21, block)

    def _acquire(self, chance: float, block: float) -> None:
        self.chance = chance
        wanted = {seat.id for secret, seat in self._all() if secret.state(seat, self.now) is State.AVAILABLE}
        key = self.pool.acquire(self.now, "ann", block)
        assert (key.id in wanted) if key else not wanted
        if key is not None:
            secret, seat = next(pair for pair in self._all() if pair[1].id == key.id)
            seat.lease, seat.release, seat.may_report = key.lease, self.now + block, True
            seat.turn = key.lease
            if secret.pace is not None:
                secret.charge(max(secret.paced, self.now) + secret.pace.interval, self.now)

    def _charge(self, secret: PlainSecret, uses: int) -> None:
        if uses > 1 and secret.pace is not None:
            secret.charge(secret.pace.charged(secret.paced, uses - 1, self.now), self.now)

    @rule(
        number=which,
        outcome=st.sampled_from(Outcome),
        retry_after=st.sampled_from([None, 0.0, 20.0, 100.0]),
        by_text=st.booleans(),
        held=st.booleans(),
        uses=used,
    )
    def report(
        self,
        number: int,
        outcome: Outcome,
        retry_after: float | None,
        by_text: bool,
        held: bool,
        *,
        uses: int,
    ) -> None:
        """By the latest lease of a seat, which may be over."""
        if held:
            self._acquire(number / 21, 20.0)
            number = max(range(len(self._all())), key=lambda n: self._all()[n][1].lease, default=0)
        picked = self._pick(number)
        if picked is None or picked[2].lease == 0:
            return
        key, secret, seat = picked
        if by_text:
            key = self.pool.seat_of(self.pool.find(secret.text, self.now), seat.lease, self.now)
            assert key.id == seat.id
        report = Report(outcome, retry_after if outcome is Outcome.RATE_LIMITED else None)
        ended = self.pool.unblock(key, seat.lease, self.now, report, uses=uses)
        assert ended.changed == seat.may_report
        if not seat.may_report:
            return
        seat.may_report = False
        self._charge(secret, uses)
        guarded = outcome is Outcome.INVALID and not secret.quarantined and not self._has_room()
        assert ended.guarded == guarded
        cools = self._failed(secret, report, guarded=guarded)
        if outcome is Outcome.INVALID and not guarded:
            secret.leave()
        elif cools and not secret.quarantined:
            secret.cool(self.now + cools)
        if seat.release is not None:
            secret.end_lease(seat, self.now, self.pool_rules.rest_seconds)
        elif uses > 1 and not secret.quarantined and not secret.shared:
            seat.ready = max(seat.ready, secret.has_budget_at)

    def _failed(self, secret: PlainSecret, report: Report, *, guarded: bool) -> float:
        """Count a failure, if it is one. Returns for how long the secret cools."""
        outcome, cools = report.outcome, 0.0
        secret.outcome = outcome
        if outcome is Outcome.OK:
            secret.failures = 0
        elif outcome is not Outcome.INVALID or guarded:
            recent = self.now < secret.failed_at + self.pool_rules.forget_seconds
            secret.failures, secret.failed_at = (secret.failures if recent else 0) + 1, self.now
            back_off = min(
                self.pool_rules.cooldown_seconds * 2 ** (secret.failures - 1),
                self.pool_rules.max_cooldown_seconds,
            )
            if report.retry_after is not None:
                cools = report.retry_after
            elif outcome is not Outcome.ERROR or secret.failures >= (self.pool_rules.error_threshold or 0):
                cools = back_off
        return cools

    def _has_room(self) -> bool:
        """Whether the guard, which counts secrets, lets another one go."""
        gone = sum(secret.quarantined and bool(secret.free()) for secret in self.secrets)
        return gone == 0 or (gone + 1) * 100 <= self.pool_rules.max_quarantined_percent * len(self.secrets)

    @rule(number=which, by_text=st.booleans(), uses=used)
    def unblock(self, number: int, by_text: bool, uses: int) -> None:
        picked = self._pick(number)
        if picked is None:
            return
        key, secret, seat = picked
        if by_text and len(secret.seats) > 1:
            found = self.pool.find(secret.text, self.now)
            with pytest.raises(ManySeats):
                self.pool.seat_of(found, None, self.now)
            with pytest.raises(StaleLease):
                self.pool.seat_of(found, self.pool.last_lease + 1, self.now)
            return
        assert self.pool.unblock(key, None, self.now, uses=uses).changed == (seat.release is not None)
        if seat.release is not None:
            self._charge(secret, uses)
            secret.end_lease(seat, self.now, self.pool_rules.rest_seconds)

    @rule(number=which)
    def keepalive(self, number: int) -> None:
        if (picked := self._pick(number)) is not None:
            self.pool.keepalive(picked[0], self.now)
            picked[2].expires = self._expires()

    @rule(number=which, now=st.booleans())
    def quarantine(self, number: int, now: bool) -> None:
        picked = self._pick(number)
        if picked is None:
            return
        key, secret, _ = picked
        self.pool.quarantine(key, "leaked", now, self.now, OPERATOR)
        secret.leave()
        for seat in list(secret.seats) if now else ():
            seat.may_report = False
        if now:  # the seat that was named goes first
            order = sorted(secret.seats, key=lambda seat: (seat.id != picked[2].id, seat.id))
            for seat in order:
                if seat.release is not None:
                    secret.end_lease(seat, self.now, self.pool_rules.rest_seconds)

    @rule(number=which)
    def restore(self, number: int) -> None:
        if (picked := self._pick(number)) is not None:
            self.pool.restore(picked[0], self.now, OPERATOR)
            picked[1].restore(self.now)

    @rule(number=which, count=st.integers(1, 6))
    def change_seats(self, number: int, count: int) -> None:
        picked = self._pick(number)
        if picked is None:
            return
        key, secret, seat = picked
        more = count - len(secret.seats)
        if len(self._all()) + more > MAX_KEYS and more > 0:
            with pytest.raises(PoolFull):
                self.pool.update(key, KeyPatch(seats=count), self.now, OPERATOR)
            return
        was_one, cooled = len(secret.seats) == 1 and key.group is None, seat.ready
        shown = self.pool.update(key, KeyPatch(seats=count), self.now, OPERATOR)
        if was_one and count > 1 and cooled > self.now:
            secret.cools = max(secret.cools, cooled)  # as a rest looks like a cooldown
        secret.wanted = count
        if count > 1 and not secret.shared:
            secret.shared = True
            if seat.release is not None and secret.has_budget_at > self.now:
                secret.cool(secret.has_budget_at)
        for gone in reversed(secret.free()):
            if len(secret.seats) > count:
                secret.seats.remove(gone)
        known = {each.id for each in secret.seats}
        new = [each.id for each in self.pool.seats_of(shown) if each.id not in known]
        assert new == sorted(new)
        assert len(new) == max(0, more)
        secret.seats += [PlainSeat(id, self._expires(), ready=secret.cools) for id in new]
        assert shown.id == (seat.id if seat in secret.seats else secret.seats[0].id)

    @rule(number=which)
    def delete(self, number: int) -> None:
        if (picked := self._pick(number)) is not None:
            self.pool.delete(picked[0], OPERATOR)
            self.secrets.remove(picked[1])

    @rule(number=which, text=which)
    def replace(self, number: int, text: int) -> None:
        picked = self._pick(number)
        if picked is None:
            return
        key, secret, _ = picked
        new = f"sk-live-from-elsewhere-{text % 4}"
        others = [each for each in self.secrets if each is not secret]
        if new in {each.text for each in others}:
            with pytest.raises(SecretExists):
                self.pool.replace(key, new, self.now, OPERATOR)
            return
        self.pool.replace(key, new, self.now, OPERATOR)
        for other, seat in self._all():
            if seat.former == new and other is not secret:
                seat.former = None
        if new != secret.text:
            for seat in secret.seats:
                former = seat.former or secret.text
                seat.former = former if seat.release is not None and former != new else None
                secret.had_formers |= seat.former is not None
            secret.text, secret.paced = new, 0.0
        secret.restore(self.now)

    @rule(number=which, name=st.sampled_from(["", "three"]), region=st.sampled_from(["eu", "us"]))
    def change_details(self, number: int, name: str, region: str) -> None:
        picked = self._pick(number)
        if picked is not None and name not in {each.name for each in self.secrets}:
            patch = KeyPatch(name, {"region": region})
            self.pool.update(picked[0], patch, self.now, OPERATOR)
            picked[1].name = name or None
            details = [key.details for key in self.pool.seats_of(picked[0])]
            assert {(each.name, (each.labels or {})["region"]) for each in details} == {
                (name or None, region)
            }

    @rule(seconds=st.sampled_from([0.5, 5.0, 20.0, 45.0, 61.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self._settle()
        for secret, seat in self._all():
            if seat.expires <= self.now:
                secret.seats.remove(seat)
        for secret, seat in sorted(self._all(), key=lambda pair: (pair[1].release or 0.0, pair[1].turn)):
            if seat.release is not None and seat.release <= self.now:
                secret.end_lease(seat, seat.release, self.pool_rules.rest_seconds)
        self.secrets = [secret for secret in self.secrets if secret.seats]

    @rule()
    def restart(self) -> None:
        """From the rows of the keys that were reported as changed."""
        self._commit()
        before, self.pool = self.pool, self._new_pool()
        self.pool.last_id, self.pool.last_lease = before.last_id, before.last_lease
        self.pool.counters = before.counters
        for id in sorted(self.rows):
            self.pool.load(key_of(self.rows[id], self.sealer))
        for _, seat in self._all():
            seat.turn = seat.id - 1_000_000
        self.changed.clear()
        self._settle()

    def _commit(self) -> None:
        for key in self.changed.values():
            if key.expires_deadline == DEAD:
                self.rows.pop(key.id, None)
            else:
                self.rows[key.id] = row_of(key, 0, self.sealer)
        self.changed.clear()

    # -- what must hold

    @invariant()
    def the_pool_is_as_the_model(self) -> None:
        self._commit()
        self.pool.check()
        pairs, keys = self._all(), {key.id: key for key in self.pool.after(0, 1000)}
        assert [seat.id for _, seat in pairs] == [*keys]
        for secret, seat in pairs:
            key, state = keys[seat.id], secret.state(seat, self.now)
            due = seat.release or (seat.ready if state is State.COOLING else None)
            assert (key.state, key.lease, key.release_deadline) == (state, seat.lease, due), f"{key!r}"
            shown = (key.text, key.details.former, key.expires_deadline)
            assert shown == (secret.text, seat.former, seat.expires), f"{key!r}"
            if state is State.AVAILABLE:
                assert secret.has_budget_at <= self.now, f"{key!r} has no budget"
        for secret in self.secrets:
            seats = [keys[seat.id] for seat in secret.seats]
            count = len(seats)
            assert [*map(self.pool.number_of, seats)] == [(number, count) for number in range(1, count + 1)]
            recent = self.now < secret.failed_at + self.pool_rules.forget_seconds
            failures = secret.failures if recent else 0
            for key in seats:
                assert (self.pool.failures_of(key, self.now), key.history.outcome) == (
                    failures,
                    secret.outcome,
                )
            # What the seats share is one object.
            assert len({id(key.text) for key in seats}) == 1
            if not secret.had_formers:
                assert len({id(key.details) for key in seats}) == 1
        assert self.pool.secrets == len(self.secrets)
        counters = self.pool.counters
        for change, name in COUNTER_OF.items():
            assert getattr(counters, name) == self.counts[change], name
        made = counters.generated + counters.imported
        assert made - counters.deleted - counters.expired == self.pool.total

    @invariant()
    def texts_and_names_find_the_first_seat(self) -> None:
        texts = {seat.former: seat.id for _, seat in reversed(self._all()) if seat.former}
        texts |= {secret.text: secret.seats[0].id for secret in self.secrets}
        for text, id in texts.items():
            assert self.pool.find(text, self.now).id == id
        names = {secret.name: secret.seats[0].id for secret in self.secrets}
        for name in NAMES:
            try:
                assert self.pool.find_name(name, self.now).id == names[name]
            except UnknownKey:
                assert name not in names


SETTINGS = settings(deadline=None, stateful_step_count=80, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("examples", [20, pytest.param(150, marks=pytest.mark.thorough)])
def test_seats_are_what_the_plain_model_has_whatever_happens_in_whatever_order(examples: int) -> None:
    """Reports, quarantines, restores, other texts, fewer and more seats, every deadline, restarts."""
    run_state_machine_as_test(SeatsMachine, settings=settings(SETTINGS, max_examples=examples))
