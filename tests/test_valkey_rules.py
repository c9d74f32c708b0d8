"""The rules in Lua against the same rules in core/pool.py: both get the same calls in random order.

The scripts implement the rules a second time, so here a `Pool` follows the engine call by call. It draws the keys that
the engine drew, with the same ids and lease numbers; every answer, error and row must be the same, and so must each
key's events at the end. The scripts go by a clock that stands during a step, and time passes by making the pool older
in Valkey (`age`): so no test waits, and both see the same moment, however slow the machine is.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import re
import time
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

import msgspec
import pytest
from valkey_support import (
    SECRETS,
    Place,
    age,
    check,
    engine_on,
    leases_at,
    new_place,
    on_loop,
    with_constants,
)

from keypool.core.answers import Extension, Imported, KeyPatch, Lease, NewKey, Ref, Row, Unblock, Written
from keypool.core.counters import COUNTERS
from keypool.core.cursor import HistoryQuery, ListQuery
from keypool.core.errors import (
    BlockLimit,
    KeypoolError,
    LeaseOver,
    ManySeats,
    NoKeyAvailable,
    StaleLease,
    UnknownKey,
)
from keypool.core.events import HOLDER, SILENT, By, Change, Origin
from keypool.core.handles import Handle
from keypool.core.history import How
from keypool.core.keys import NEVER, Group, Key, State, hint
from keypool.core.outcomes import Outcome, Report
from keypool.core.pace import Pace
from keypool.core.pool import Pool
from keypool.core.rules import PoolRules
from keypool.engine import Client
from keypool.engine.valkey import link as valkey_link
from keypool.engine.valkey import poller as valkey_poller
from keypool.engine.valkey.engine import ValkeyEngine

ADMIN = Origin(By.OPERATOR, "night shift")
RULES: dict[str, Any] = {
    "block_seconds": 60.0, "max_block_seconds": 140.0, "cooldown_seconds": 40.0,
    "max_cooldown_seconds": 250.0, "max_retry_after_seconds": 333.0, "error_threshold": 2, "forget_seconds": 170.0,
    "max_quarantined_percent": 40.0,
}  # fmt: skip
PACES = [Pace(1, 19.3, 3), Pace(5, 611.5), Pace(1000, 1.0)]
USES = [1, 2, 7, 10**9]
NAMES = ["acct-1", "acct-2", "Größe", "z"]
ODD = ["id:1", "h:1.1.aaaaaaaaaaa"]
TEXTS = [*(f"sk-live-{number:02}-{'x' * 9}" for number in range(8)), "tiny", "ключ-номер-1", *ODD]
"""Texts from elsewhere: all of them begin alike, are short, or look like other names."""
NEAR = 0.002
"""Seconds by which rounding may make lengths of time of both differ."""
TICK = 1_037
"""Microseconds that a step takes, by the clock: odd, so that no deadline comes at the moment of a step."""
_WORDS = {
    UnknownKey: "unknown",
    StaleLease: "stale",
    LeaseOver: "over",
    BlockLimit: "limit",
    ManySeats: "many_seats",
}
# Of seats that move together, the first one has the event: any, if their deadlines are the same or one has expired.
_OF_SECRETS = frozenset({Change.COOLED, Change.READY, Change.QUARANTINED})


class FollowingPool(Pool):
    """A pool whose further seats get the ids that they have in the engine."""

    ids: deque[int]

    def _add_seat(self, key: Key, group: Group, now: float, origin: Origin) -> None:
        latest, id = self.last_id, self.ids.popleft()
        self.last_id = id - 1
        super()._add_seat(key, group, now, origin)
        self.last_id = max(latest, self.last_id)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Place:
    """See Place. On a busy machine a large batch may take longer than the silence that ends a connection."""
    monkeypatch.setattr(valkey_link, "SILENCE", 30.0)
    return new_place()


def clock_of(place: Place) -> str:
    """The name in Valkey of the clock that a test's scripts go by."""
    return f"{place.pool}:clock"


class Attempted:
    """An attempt, as the API makes it."""

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.replayed = False


class Twins:
    """An engine, and the pool that follows it."""

    def __init__(
        self, place: Place, partitions: int, engine: ValkeyEngine, rules: PoolRules, seed: int
    ) -> None:
        self.sealed = engine._partitions.vault is not None
        self.with_seats = False
        self.place = place
        self.partitions = partitions
        self.engine = engine
        self.rules = rules
        self.random = random.Random(seed)
        self.clock = int(place.valkey.ask("GET", clock_of(place)))
        self.aged = 0.0  # seconds by which the pool was made older
        self.tick()
        self.texts: deque[str] = deque()
        self.next_id = 0  # of the key that the pool draws next
        self.events: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
        self.ever: list[tuple[int, str]] = []
        self.leases: list[Lease] = []
        self.refused = 0
        self.past: dict[int, dict[int, tuple[Any, ...]]] = defaultdict(dict)  # by key and lease
        self.seated: set[int] = set()  # ids of those that ever were seats beside others
        self.pool = FollowingPool(
            rules, new_text=self.texts.popleft, random=self._draw, recorder=self, on_change=self._changed
        )
        self.pool.ids = deque()

    def lease_ended(self, key: Key, how: How, at: float | None, report: Report | None) -> None:
        """Keep the lease. See Recorder."""
        outcome, reason = (None, None) if report is None else (report.outcome, report.reason)
        held = pytest.approx((self.now if at is None else at) - key.acquired_at, abs=self.near)
        self.past[key.id][key.lease] = (how, key.owner, key.client, key.extended, held, outcome, reason)

    def late_report(self, key: Key, report: Report) -> None:
        """Add to the lease what was reported."""
        self.past[key.id][key.lease] = (*self.past[key.id][key.lease][:5], report.outcome, report.reason)

    def _draw(self) -> float:
        key = self.pool._by_id.get(self.next_id)
        assert key is not None
        assert key.slot >= 0, f"the engine drew id {self.next_id}, which is {key.state}"
        return (key.slot + 0.5) / self.pool.available

    def _changed(self, change: Change, key: Key, owner: str | None, origin: Origin) -> None:
        if key.group is not None:
            self.seated.add(key.id)
        if change not in SILENT:
            self.events[key.id].append((change, owner, key.lease or None, *origin))

    def tick(self) -> None:
        """Let the clock go on."""
        self.began = time.monotonic()
        self.clock += TICK
        self.place.valkey.ask("SET", clock_of(self.place), self.clock)
        self.place.valkey.ask("SET", leases_at(clock_of(self.place)), 0)
        self.now = self.clock / 1e6 + self.aged
        if self.with_seats:
            self.catch_up()  # as each script does first: which seats go depends on what expired before

    @property
    def near(self) -> float:
        """Seconds by which lengths may differ: an engine's are less by the time that its call took."""
        return NEAR + time.monotonic() - self.began

    # -- what is chosen

    def some(self) -> tuple[int, str]:
        """One of the keys that ever were, more often a late one."""
        late = self.random.random() < 0.7
        return self.random.choice(self.ever[-12:] if late else self.ever) if self.ever else (2**40, "nobody")

    def ref(self) -> Ref:
        """A name of one of them."""
        id, text = self.some()
        chance = self.random.random()
        if chance < 0.3 and self.leases:
            lease = self.random.choice(self.leases[-12:])
            return Handle(lease.id, lease.lease)
        if chance < 0.55 and self.sealed:
            others: list[int | Handle] = [id, *(Handle(one.id, one.lease) for one in self.leases[-3:])]
            return Written(self.random.choice(ODD), self.random.choice(others))
        if chance < 0.65 and self.sealed:
            return self.random.choice(TEXTS)
        return id if chance < 0.75 else text

    def batch_ref(self) -> Ref:
        """A name for a batch. With several partitions, one that is found in the first call: other items come later, so
        not in their order."""
        ref = self.ref()
        return ref if self.partitions == 1 or isinstance(ref, int | Handle) else self.some()[0]

    def lease_of(self, ref: Ref) -> int:
        """Mostly the number of the latest lease."""
        if isinstance(ref, Written):
            ref = ref.other
        if isinstance(ref, Handle):
            return ref.lease
        try:
            latest = self.find(ref).lease
        except UnknownKey:
            latest = 0
        return self.random.choice([latest] * 6 + [latest + 1, 2**63 - 1, max(1, latest - 1)])

    def report(self) -> Report:
        """Any."""
        outcome = self.random.choice(list(Outcome))
        reason = self.random.choice([None, "so it is", "Größe"])
        limited = outcome is Outcome.RATE_LIMITED
        return Report(outcome, self.random.choice([None, 0, 23.5, 110, 1e15]) if limited else None, reason)

    def uses(self) -> int:
        """How often a key was used; mostly once."""
        return self.random.choice([1, 1, *USES])

    def pace(self) -> Pace | Literal[False] | None:
        """A key's own, or none, where the pool has one."""
        return None if self.rules.pace is None else self.random.choice([None, None, False, *PACES])

    # -- calls to both

    def secret(self, ref: Ref) -> Key:
        """The same, with the deadlines of all its seats applied, as scripts do."""
        for seat in self.pool.seats_of(self.find(ref)):
            with contextlib.suppress(UnknownKey):
                self.pool.find_id(seat.id, self.now)
        return self.find(ref)

    def find(self, ref: Ref) -> Key:
        """The pool's key, as engines find it."""
        if isinstance(ref, Written):
            try:
                return self.pool.find(ref.text, self.now)
            except UnknownKey:
                ref = ref.other
        if isinstance(ref, str):
            return self.pool.find(ref, self.now)
        key = self.pool.find_id(ref if isinstance(ref, int) else ref.id, self.now)
        if isinstance(ref, Handle) and ref.lease != key.lease:
            raise StaleLease(ref.lease, key.lease)
        return key

    def seat(self, ref: Ref, lease: int | None) -> Key:
        """The same, where one seat must be meant."""
        key = self.find(ref)
        text = ref.text if isinstance(ref, Written) else ref
        is_text = isinstance(text, str) and text in (key.text, key.details.former)
        return self.pool.seat_of(key, lease, self.now) if is_text and key.group is not None else key

    async def both(self, call: Awaitable[Any], follow: Callable[[], Any]) -> tuple[Any, Any]:
        """The results of the same call to both; (None, None) if both raised the same error."""
        answer, error = await _outcome(call)
        followed, wanted = await _outcome(follow)
        if wanted is not None:
            assert type(error) is type(wanted), f"{error!r} or {answer} instead of {wanted!r}"
            if isinstance(wanted, StaleLease | LeaseOver):
                assert error.detail == wanted.detail
            if isinstance(wanted, BlockLimit):
                assert ("at most" in error.detail) == ("at most" in wanted.detail)
            return None, None
        assert error is None, f"{error!r} instead of {followed}"
        return answer, followed

    def expect_row(self, row: Row) -> None:
        """A row as the pool has it."""
        now = self.now
        key = self.pool.find_id(row.id, now)
        state, history = key.state, key.history
        left = (key.release_deadline or now) - now
        reason = history.operator_reason if state is State.QUARANTINED else None
        assert (row.state, row.owner, row.lease) == (state, key.owner, key.lease or None)
        assert (row.failures, row.outcome) == (self.pool.failures_of(key, now), history.outcome)
        assert row.reason == (reason or history.reason)
        assert row.expires_in == self.left(key)
        assert (row.seat, row.seats) == self.pool.number_of(key)
        assert (row.hint, row.client) == (key.hint, key.client)
        assert (row.name, row.labels) == (key.details.name, key.details.labels or {})
        assert (row.pace, row.served) == (key.details.pace, key.served)
        assert (row.acquired_at is not None) is (state is State.BLOCKED)
        assert row.release_in == (pytest.approx(left, abs=self.near) if state is State.BLOCKED else None)
        assert row.available_in == (pytest.approx(left, abs=self.near) if state is State.COOLING else None)

    def left(self, key: Key) -> Any:
        """What is left of a key's life."""
        if key.expires_deadline == NEVER:
            return None
        return pytest.approx(key.expires_deadline - self.now, abs=self.near)

    def catch_up(self) -> None:
        """Deal with all that is overdue, in the pool."""
        now = self.now
        while self.pool.next_release(now) == 0 or self.pool.overdue(now):
            self.pool.process_due(now)

    async def settle(self) -> None:
        """Deal with all that is overdue, in both."""
        self.catch_up()
        while (await self.engine._poller.snapshot()).overdue:
            pass

    # -- the steps

    async def generate(self) -> None:
        origin = self.random.choice([HOLDER, ADMIN])
        some = await self.engine.generate(self.random.choice([1, 1, 3]), origin)
        for made in some:
            self.texts.append(made.key)
            self.pool.last_id = made.id - 1
            assert self.pool.generate(self.now, origin).id == made.id
            self.ever.append((made.id, made.key))

    async def acquire(self) -> None:
        owner = self.random.choice([None, "a", "b"])
        client = self.random.choice([None, None, Client("ci-1")])
        wanted = self.random.choice([1, 1, 1, 4, 50])
        block = self.random.choice([None, None, 20.0, 130.0])
        attempt = self.random.choice([None, None, *(Attempted(bytes([255 - 17 * n]) * 16) for n in range(6))])
        digest = None if attempt is None else attempt.digest
        held = [] if digest is None else [key.id for key in self.pool.leases_of(digest, self.now)]
        if wanted == 1:
            lease, refused = await _outcome(
                self.engine.acquire(owner, 0, None, block, attempt, client=client)
            )
            leases = [lease]
        else:
            leases, refused = await _outcome(
                self.engine.acquire_many(owner, wanted, block, attempt, client=client)
            )
        if refused is not None:
            assert isinstance(refused, NoKeyAvailable)
            await self.settle()
            assert not self.pool.available, "none was served, but some are available"
            counts = (self.pool.blocked, self.pool.cooling, self.pool.quarantined)
            assert (refused.blocked, refused.cooling, refused.quarantined) == counts
            assert (refused.retry_after is None) == (self.pool.next_release_deadline() is None)
            self.refused += 1
            return
        assert attempt is None or attempt.replayed == bool(held)
        if held:
            assert [lease.id for lease in leases] == (held[:1] if wanted == 1 else held)
        for number, lease in enumerate(leases):
            if not held:
                self.find(lease.id)  # with all its deadlines: the scripts go further than a call of the pool
                self.next_id, self.pool.last_lease = lease.id, lease.lease - 1
                while (
                    key := self.pool.acquire(
                        # As in the script, see `with_constants`.
                        self.now + (number + 1) * 1e-6,
                        owner,
                        block,
                        digest,
                        client and client.name,
                    )
                ) is None:
                    assert self.pool.may_have_more(self.now)
            key = self.find(lease.id)
            now = self.now
            assert (lease.key, lease.lease, key.state) == (key.text, key.lease, State.BLOCKED)
            assert self.engine.handles.read(lease.handle) == Handle(lease.id, lease.lease)
            assert lease.release_in == pytest.approx((key.release_deadline or 0) - now, abs=self.near)
            assert lease.expires_in == self.left(key)
            assert (lease.name, lease.data and bytes(lease.data)) == (key.details.name, key.details.data)
        self.leases += leases

    async def unblock(self) -> None:
        ref, ended = self.ref(), []  # type: ignore[var-annotated]
        lease = self.random.choice([None, self.lease_of(ref), self.lease_of(ref)])
        speaking = [key for key in self.pool._by_id.walk(None) if key.lease and not key.reported]
        if speaking and self.random.random() < 0.7:  # few keys, so that failures in a row come about
            one = self.random.choice(speaking[:5])
            names: list[Ref] = [one.text, one.id, Handle(one.id, one.lease)]
            ref, lease = self.random.choice(names), one.lease
        report = self.report() if lease is not None and self.random.random() < 0.8 else None
        if report is not None and report.outcome is Outcome.INVALID:
            await self.settle()  # the guard counts the keys
        origin, uses = self.random.choice([HOLDER, ADMIN]), self.uses()
        key: Key | None = None

        def follow() -> Any:
            nonlocal key
            key = self.seat(ref, lease)
            by = origin if lease is None else HOLDER  # whoever has the lease number is its holder
            return self.pool.unblock(key, lease, self.now, report, by, uses=uses)

        call = self.engine.unblock(ref, lease, ended, report, origin, uses=uses)
        answer, followed = await self.both(call, follow)
        if answer is None:
            return
        assert key is not None
        assert (answer.id, answer.state, answer.changed, answer.guarded) == (key.id, key.state, *followed)
        cooling = key.state is State.COOLING
        left = (key.release_deadline or 0) - self.now
        assert answer.available_in == (pytest.approx(left, abs=self.near) if cooling else None)
        wanted = [(key.id, key.hint, key.lease)] if lease is None and followed.changed else []
        assert [(one.id, one.hint, one.lease) for one in ended] == wanted

    async def extend(self) -> None:
        ref = self.ref()
        lease, seconds = self.lease_of(ref), self.random.choice([None, 5.0, 90.0, 1e12])
        key: Key | None = None

        def follow() -> None:
            nonlocal key
            key = self.seat(ref, lease)
            self.pool.extend(key, lease, seconds, self.now)

        answer, _ = await self.both(self.engine.extend(ref, lease, seconds), follow)
        if answer is not None:
            assert key is not None
            left = key.acquired_at + self.rules.longest_block - self.now
            assert (answer.id, answer.lease) == (key.id, key.lease)
            assert answer.release_in == pytest.approx((key.release_deadline or 0) - self.now, abs=self.near)
            assert answer.block_left == pytest.approx(left, abs=self.near)

    async def quarantine(self) -> None:
        ref, reason = self.ref(), self.random.choice([None, "by hand"])
        at_once = self.random.random() < 0.5
        row, _ = await self.both(
            self.engine.quarantine(ref, reason, at_once, ADMIN),
            lambda: self.pool.quarantine(self.secret(ref), reason, at_once, self.now, ADMIN),
        )
        if row is not None:
            self.expect_row(row)

    async def restore(self) -> None:
        ref = self.ref()
        row, _ = await self.both(
            self.engine.restore(ref, ADMIN), lambda: self.pool.restore(self.secret(ref), self.now, ADMIN)
        )
        if row is not None:
            self.expect_row(row)

    async def keepalive(self) -> None:
        ref = self.ref()
        await self.both(
            self.engine.keepalive(ref), lambda: self.pool.keepalive(self.seat(ref, None), self.now)
        )

    async def delete(self) -> None:
        ref, origin = self.ref(), self.random.choice([HOLDER, ADMIN])
        await self.both(
            self.engine.delete(ref, origin), lambda: self.pool.delete(self.secret(ref), origin, self.now)
        )

    async def get(self) -> None:
        ref = self.ref()
        row, _ = await self.both(self.engine.get(ref), lambda: self.find(ref))
        if row is not None:
            self.expect_row(row)
            revealed = await self.engine.reveal(ref, ADMIN)
            key = self.find(ref)
            assert (revealed.id, revealed.key) == (key.id, key.text)
            assert (revealed.name, revealed.data and bytes(revealed.data)) == (
                key.details.name,
                key.details.data,
            )
            self._changed(Change.REVEALED, key, key.owner, ADMIN)

    # -- keys from elsewhere

    def item(self) -> NewKey:
        """A key to import."""
        name = self.random.choice([None, None, *NAMES])
        labels = self.random.choice([None, {"region": "eu"}])
        data = self.random.choice([None, b'{"user":"x"}'])
        seats = self.random.choice([None, None, None, 2, 4]) if self.with_seats else None
        return NewKey(self.random.choice(TEXTS), name, labels, data, self.pace() or None, seats)

    def known(self, secret: str) -> Key | None:
        """The pool's key with this text, not the one of which it is the text before."""
        try:
            key = self.secret(secret)
        except UnknownKey:
            return None
        return key if key.text == secret else None

    def imported(self, item: NewKey, id: int, further: Sequence[int] = ()) -> Key:
        """Import a key into the pool, with the id that it has in the engine, and the ids of its further seats."""
        self.pool.ids = deque(further)
        latest, self.pool.last_id = self.pool.last_id, id - 1
        try:
            key = self.pool.import_key(item, self.now, ADMIN)
        finally:
            self.pool.last_id = max(latest, self.pool.last_id)
        self.ever.append((key.id, item.secret))
        return key

    async def import_key(self) -> None:
        item = self.item()
        answer, error = await _outcome(self.engine.import_key(item, True, ADMIN))
        known = self.known(item.secret)
        if known is None:
            key, wanted = await _outcome(
                lambda: self.imported(item, answer.id if answer else 0, answer.ids[1:] if answer else ())
            )
            assert (type(error), error and error.detail) == (type(wanted), wanted and wanted.detail)
            if wanted is not None:
                return
        else:
            key = known
        assert error is None
        ids = self.pool.ids_of(key, self.now)
        assert (answer.existed, answer.name) == (known is not None, key.details.name)
        assert answer.ids == ids
        assert answer.id == (key.id if known is None else answer.id)
        assert (answer.state, answer.hint, answer.expires_in) == (key.state, key.hint, self.left(key))

    async def import_many(self) -> None:
        items = [self.item() for _ in range(self.random.choice([1, 4, 9]))]
        update = self.random.random() < 0.5
        results = await self.engine.import_many(items, update, True, ADMIN)
        seen: dict[str, int] = {}
        for item, result in zip(items, results, strict=True):
            wanted = "duplicate"
            if item.secret not in seen:
                wanted = await self.import_like(item, result, update)
                if wanted != "failed":
                    assert result.id is not None
                    seen[item.secret] = result.id
            assert (result.status, result.id) == (wanted, seen.get(item.secret)), (item, result, wanted)

    async def import_like(self, item: NewKey, result: Imported, update: bool) -> str:
        """The status of an item by the pool."""
        key = self.known(item.secret)
        if key is None:
            _, error = await _outcome(lambda: self.imported(item, result.id or 0, (result.ids or [0])[1:]))
            status = "created"
        else:
            self.follow_ids(result.ids or ())
            change = (
                (lambda: self.pool.update(key, item.patch, self.now, ADMIN)) if update else (lambda: None)
            )
            changed, error = await _outcome(change)
            key = changed or key
            status = "updated" if update else "existed"
            assert error is not None or result.id == self.pool.ids_of(key, self.now)[0]
        if error is None:
            return status
        assert (result.code, result.detail) == (error.code, error.detail)
        return "failed"

    async def update(self) -> None:
        ref = self.ref()
        name = self.random.choice([None, "", *NAMES])
        patch = KeyPatch(
            name,
            self.random.choice([None, {}, {"a": "b"}]),
            self.random.choice([None, b"{}", b'{"p":1}']),
            self.pace(),
            self.count_of(),
        )
        self.catch_up()
        answer, error = await _outcome(self.engine.update(ref, patch, ADMIN))
        if answer is not None:
            found, _ = await self.engine._find(answer.id)
            self.follow_ids(found.seats or [found.row.id])
        key, wanted = await _outcome(lambda: self.pool.update(self.secret(ref), patch, self.now, ADMIN))
        assert type(error) is type(wanted), f"{error!r} or {answer} instead of {wanted!r}"
        if answer is not None:
            assert answer.id == key.id
            self.expect_row(answer)

    def count_of(self) -> int | None:
        """Another number of seats, or none."""
        return self.random.randint(1, 8) if self.with_seats and self.random.random() < 0.6 else None

    def follow_ids(self, ids: Sequence[int]) -> None:
        """Let seats that the pool adds now have those of these ids that are new to it."""
        self.pool.ids = deque(id for id in ids if self.pool.peek(id) is None)
        self.ever += [(id, "a seat, by no text") for id in self.pool.ids]

    async def replace(self) -> None:
        ref = self.ref()
        secret = self.some()[1] if self.random.random() < 0.3 else self.random.choice(TEXTS)
        row, _ = await self.both(
            self.engine.replace(ref, secret, ADMIN),
            lambda: self.pool.replace(self.secret(ref), secret, self.now, ADMIN),
        )
        if row is not None:
            self.ever.append((row.id, secret))
            self.expect_row(row)

    async def search(self) -> None:
        """By name and by hint; by text, see `get`."""
        self.catch_up()
        name = self.random.choice(NAMES)
        row, _ = await self.both(self.engine.find(name), lambda: self.pool.find_name(name, self.now))
        if row is not None:
            self.expect_row(row)
        shown = hint(self.some()[1])
        row, _ = await self.both(self.engine.find(shown), lambda: self.pool.find_hint(shown, self.now))
        if row is not None:
            assert row.id == self.pool.find_hint(shown, self.now).id
            self.expect_row(row)

    # -- many at once

    async def batches(self) -> None:
        """Many at once, some named twice."""
        engine = self.engine
        refs = [self.batch_ref() for _ in range(6)] * 2
        reports = [Report(Outcome.ERROR), Report(Outcome.OK, None, "well"), None]
        items = [Unblock(ref, self.lease_of(ref), self.random.choice(reports), self.uses()) for ref in refs]
        self.same(await engine.unblock_many(items), items, self._unblock)
        longer = [  # not two to the same moment: which of two seats goes first then is chance
            Extension(ref, self.lease_of(ref), self.random.choice([60.0, 90.0]) + number / 1000)
            for number, ref in enumerate(refs)
        ]
        self.same(await engine.extend_many(longer), longer, self._extend)
        self.same(await engine.keepalive_many(refs), refs, self._keepalive)
        some = refs[:2]
        self.same(await engine.quarantine_many(some, "all", False, ADMIN), some, self._quarantine)
        self.same(await engine.restore_many(refs, ADMIN), refs, self._restore)
        some = [refs[0], *refs[:2]]
        self.same(await engine.delete_many(some, ADMIN), some, self._delete)

    def _unblock(self, item: Unblock) -> None:
        self.pool.unblock(self.seat(item.ref, item.lease), item.lease, self.now, item.report, uses=item.uses)

    def _extend(self, item: Extension) -> None:
        self.pool.extend(self.seat(item.ref, item.lease), item.lease, item.seconds, self.now)

    def _keepalive(self, ref: Ref) -> None:
        self.pool.keepalive(self.seat(ref, None), self.now)

    def _quarantine(self, ref: Ref) -> None:
        self.pool.quarantine(self.secret(ref), "all", False, self.now, ADMIN)

    def _restore(self, ref: Ref) -> None:
        self.pool.restore(self.secret(ref), self.now, ADMIN)

    def _delete(self, ref: Ref) -> None:
        self.pool.delete(self.secret(ref), ADMIN, self.now)

    def same(self, results: list[Any], items: list[Any], step: Callable[[Any], None]) -> None:
        """Fails unless the pool has the same results, item by item."""
        for result, item in zip(results, items, strict=True):
            try:
                step(item)
                word = "done"
            except KeypoolError as error:
                word = _WORDS[type(error)]
            assert (result if isinstance(result, str) else "done") == word

    def shown(self, keys: list[Key], prefix: str | None, name: str | None, order: str | None) -> list[Key]:
        """Those that the list has."""
        if prefix is not None:
            keys = [key for key in keys if key.text.startswith(prefix) and not key.details.imported]
        if name is not None:
            keys = [key for key in keys if (key.details.name or "").startswith(name)]
        if prefix is not None or name is not None:
            keys = [key for key in keys if self.pool.number_of(key)[0] == 1]
        if order == "expiry":
            keys = [key for key in keys if key.expires_deadline != NEVER]
        return keys

    async def walk(self) -> None:
        """A list from its first page to its last: each key once, in order."""
        chosen = self.random.choice(["id", "expiry", "release", "ready", "prefix", "name"])
        only = {"release": "blocked", "ready": "cooling"}.get(chosen)
        if chosen == "ready":
            # A block that is over may become a cooldown, and come later, between two pages.
            await self.settle()
        state: Any = only or self.random.choice([None, *State])
        prefix = None
        if chosen == "prefix":
            prefix = self.some()[1][: self.random.choice([1, 1, 2, 4])]
            if not re.fullmatch("[A-Za-z0-9]+", prefix):
                return
        name = self.random.choice(["a", "acct-", "acct-1", "Gr"]) if chosen == "name" else None
        order: Any = None if chosen in ("prefix", "name") else chosen
        rows = await self.listed(ListQuery(state, prefix, order, name=name))
        self.catch_up()
        found = [key for key in self.pool._by_id.walk(None) if state in (None, key.state)]
        found = self.shown(found, prefix, name, order)
        place_of: dict[str | None, Callable[[Key], Any]] = {
            None: lambda key: key.details.name if name else key.text[: 4 if self.sealed else None],
            "id": lambda key: key.id,
            "expiry": lambda key: key.expires_deadline,
            "release": lambda key: key.release_deadline,
            "ready": lambda key: key.release_deadline,
        }
        listed = sorted(row.id for row in rows)
        assert listed == [key.id for key in found], f"by {chosen}, {state}"
        for row in rows:
            self.expect_row(row)
        places = [place_of[order](self.pool.find_id(row.id, self.now)) for row in rows]
        if order in (None, "id"):
            assert places == sorted(places)
        else:
            assert all(one < other + NEAR for one, other in itertools.pairwise(places))

    async def listed(self, query: ListQuery) -> list[Row]:
        """All rows of a list, in pages of different lengths."""
        rows: list[Row] = []
        after = None
        for _ in range(1000):
            limit = self.random.choice([1, 2, 7])
            page = await self.engine.page(msgspec.structs.replace(query, limit=limit, after=after))
            rows += page.keys
            after = page.next
            if after is None:
                break
        return rows

    async def time_passes(self) -> None:
        """A step."""
        self.grow_older(self.random.choice([7.0, 31.0, 53.0, 97.0, 211.0]))

    def grow_older(self, seconds: float) -> None:
        """Let so much time pass for both."""
        age(self.place.valkey, self.place.pool, self.partitions, seconds)
        self.aged += seconds
        self.now += seconds

    async def look(self) -> None:
        """The counts, once all that is overdue is dealt with; and the events of each key."""
        await self.settle()
        stats, pool = await self.engine.stats(), self.pool
        counts = ("total", "available", "blocked", "cooling", "quarantined")
        assert {name: getattr(stats, name) for name in counts} == {
            name: getattr(pool, name) for name in counts
        }
        pool.check()
        check(self.place.valkey, self.place.pool, self.partitions)
        events: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
        if self.engine.rules.keepalive_seconds is None:
            assert not stats.expired
            # Not `cooled`: where a cooldown begins as another one ends late, whether that is one or two is chance.
            told = ("quarantines", "restored", "imported", "generated", "deleted", "released", "unblocked")
            assert [getattr(stats, name) for name in told] == [getattr(pool.counters, name) for name in told]
        counted: Counter[str] = Counter(refused=self.refused, kept_alive=pool.counters.kept_alive)
        # Whether it was noticed of an expired key that its lease had ended is chance.
        counted["paced"] = stats.paced if stats.expired else pool.counters.paced
        for event in self.engine.recent(10**6):
            events[event.id].append((event.event, event.owner, event.lease, event.by, event.actor))
            counted["quarantines" if event.event is Change.QUARANTINED else event.event] += 1
        assert {name: getattr(stats, name) for name in COUNTERS} == {name: counted[name] for name in COUNTERS}
        for id, those in self.events.items():
            if id in self.seated:
                own, wanted = (
                    [event for event in each if event[0] not in _OF_SECRETS] for each in (events[id], those)
                )
                assert _settled(own) == _settled(wanted)
            else:
                assert _settled(events[id]) == _settled(those)
            if self.past[id]:
                found = (await self.engine.history(id, HistoryQuery(limit=500))).history
                assert {
                    row.lease: (
                        row.how, row.owner, row.client, row.extended, row.held, row.outcome, row.reason
                    )
                    for row in found
                } == self.past[id]  # fmt: skip


def _settled(events: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Events without those by deadlines before the expiry: which deadlines of an expired key were noticed is chance."""
    if events[-1][0] is not Change.EXPIRED:
        return events
    last = max(place for place, event in enumerate(events) if event[3] is not By.DEADLINE)
    return [*events[: last + 1], events[-1][:1]]


async def _outcome(call: Awaitable[Any] | Callable[[], Any]) -> tuple[Any, Any]:
    """The result of a call, or the error that it raised."""
    try:
        return (call() if callable(call) else await call), None
    except KeypoolError as error:
        return None, error


@on_loop
@pytest.mark.parametrize("sealed", [False, True], ids=["clear", "sealed"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 0.0, 300.0, None),
        (4, 1, 13.0, 300.0, Pace(3, 311.0, 2)),
        (16, 32, 0.0, None, Pace(1, 41.3)),
        (7, 3, 29.0, 300.0, None),
    ],
)
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.thorough) for seed in range(1, 6))]
)
async def test_the_scripts_agree_with_the_pool_call_by_call(
    place: Place,
    shape: tuple[int, int, float, float | None, Pace | None],
    sealed: bool,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In random order, also while many overdue keys have not been swept yet. `shape`: how many partitions, how many
    overdue keys a call processes, how long keys rest, how long they live, and their pace. Those from elsewhere are
    `sealed` only.
    """
    await _agree(place, shape, monkeypatch, seed, sealed=sealed, with_seats=False)


@on_loop
@pytest.mark.parametrize(("sealed", "seed"), [(True, 0), *(
    pytest.param(sealed, seed, marks=pytest.mark.thorough) for sealed in (False, True) for seed in range(1, 4)
)])  # fmt: skip
@pytest.mark.parametrize(
    "shape", [(1, 500, 0.0, 300.0, None), (3, 500, 13.0, None, None), (4, 500, 0.0, None, Pace(3, 311.0, 2))]
)
async def test_the_scripts_agree_with_the_pool_about_seats(
    place: Place,
    shape: tuple[int, int, float, float | None, Pace | None],
    sealed: bool,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same with secrets that have several seats, where each call processes all that is overdue."""
    await _agree(place, shape, monkeypatch, seed, sealed=sealed, with_seats=True)


async def _agree(
    place: Place,
    shape: tuple[int, int, float, float | None, Pace | None],
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    *,
    sealed: bool,
    with_seats: bool,
) -> None:
    partitions, at_once, rest, life, pace = shape
    with_constants(monkeypatch, clock=clock_of(place), MAX_DUE=at_once, KEPT_EVENTS=100_000)
    monkeypatch.setattr(valkey_poller, "_MAX_SWEPT", at_once)
    monkeypatch.setattr(valkey_poller, "RECENT_EVENTS", 100_000)
    settings = {**RULES, "rest_seconds": rest, "keepalive_seconds": life, "history_leases": 100_000}
    rules = PoolRules(**settings, pace=pace)
    place.valkey.ask("SET", clock_of(place), round(time.time() * 1e6))
    async with engine_on(place.url, partitions, secrets=SECRETS if sealed else (), **settings) as engine:
        await engine.set_rules(rules, 1)  # which lets the partitions keep a history
        await engine.stats()
        engine._poller._stopped = True  # no sweep but those of the calls
        twins = Twins(place, partitions, engine, rules, seed)
        twins.with_seats = with_seats
        steps = [
            *[twins.generate] * 4, *[twins.acquire] * 8, *[twins.unblock] * 8, *[twins.keepalive] * 4,
            *[twins.extend] * 3, twins.quarantine, *[twins.restore] * 2, twins.delete, twins.get, twins.get,
            twins.batches, *[twins.walk] * 2, twins.time_passes,
        ]  # fmt: skip
        if sealed:
            steps += [
                *[twins.import_key] * 3, *[twins.import_many] * 2, *[twins.replace] * 3, *[twins.search] * 2,
            ]  # fmt: skip
        steps += [twins.update] * 2
        for number in range(300):
            twins.tick()
            await twins.random.choice(steps)()
            if number % 50 == 49:
                await twins.look()
