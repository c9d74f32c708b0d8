"""The rules of the pool: which key an acquire gets, and until when the caller may use it.

    generate              acquire, at random               unblock, or 60 s passed
    ---------> AVAILABLE --------------------> BLOCKED ---------------------------> AVAILABLE
                   ^   cooled down, or restored   |  reported a limit or errors, has to rest, or spent its budget
                   +----------- COOLING <---------+
                   ^   restored                   |  reported invalid, or an operator's quarantine
                   +--------- QUARANTINED <-------+

    from any state: delete, or 300 s without keepalive ---> purged: never served, never valid, never generated again

The module has no I/O, no clock and no timer. Each method takes `now`, in seconds on a clock that never goes back, and
first applies the deadlines of its key that have passed, whether or not their timers have fired. Each change is reported
to the one listener, `on_change(change, key, owner, origin)`, after it has been made.

A cooling key stands in the order of deadlines in which blocked ones stand, so the end of a cooldown costs what a
release costs. Quarantined keys stand in an order of their own, by id. Acquire sees neither.

A pace (pace.py) is charged by each acquire. Whether a key has budget is decided when it would become available: if not,
it cools until it has.

Several keys may be the seats of one secret (seats.py), and then share what concerns that, its pace included.

Nothing here iterates over the whole set: with the structures of index.py every call is O(1) or O(log n) in the number
of keys, except `check`, which is for tests and for the moment after a restore.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nextafter
from operator import attrgetter
from typing import NamedTuple, Protocol

import msgspec

from keypool.core.answers import KeyPatch, NewKey
from keypool.core.counters import Counters
from keypool.core.details import details_of, patched
from keypool.core.errors import (
    BlockLimit,
    KeysWouldExpire,
    LeaseOver,
    NameTaken,
    PoolFull,
    SecretExists,
    StaleLease,
    UnknownKey,
)
from keypool.core.events import DEADLINE, HOLDER, By, Change, Listener, Origin
from keypool.core.history import How
from keypool.core.index import BucketListener, Position
from keypool.core.keys import DEAD, NEVER, NO_DETAILS, Group, Key, State
from keypool.core.keyset import KeyPage, PageQuery
from keypool.core.outcomes import (
    NO_HISTORY,
    OK_REPORT,
    History,
    Outcome,
    Report,
    cooldown_of,
    failures_at,
    may_quarantine,
)
from keypool.core.owners import HolderPage
from keypool.core.rules import PoolRules
from keypool.core.seats import Seats

MAX_DUE_PER_CALL = 64
"""At most so many due keys of each kind are processed by one call. The engine drains a larger backlog in slices."""

PAGE_SCAN_LIMIT = 1000
"""At most so many keys are examined for one page."""

# Globals, because in Python 3.11 each look-up of an enum's member by name costs a tenth of a microsecond.
_AVAILABLE, _BLOCKED, _COOLING, _QUARANTINED = State
_ACQUIRED, _UNBLOCKED, _KEPT_ALIVE = Change.ACQUIRED, Change.UNBLOCKED, Change.KEPT_ALIVE
_OK, _INVALID = Outcome.OK, Outcome.INVALID

_ALL_WELL = History(outcome=_OK)  # shared by the many keys with which nothing is wrong


class Clients(Protocol):
    """What the pool reports about the leases of named clients, so that they can be counted over all pools."""

    def begun(self, pool: Pool, key: Key) -> None:
        """The lease of `key.client` began, or was loaded. O(1)."""
        ...

    def ended(self, key: Key) -> None:
        """The lease of `key.client` is ending. This must not change a pool. O(log n)."""
        ...


class Recorder(Protocol):
    """What the pool reports about leases that end, if `history_leases` isn't 0. Neither may change a pool. O(1)."""

    def lease_ended(self, key: Key, how: How, at: float | None, report: Report | None) -> None:
        """The lease of the key, which still has owner and client, ends: at a moment before now, or now if `at` is None.

        `report` is its holder's, if that ends it.
        """
        ...

    def late_report(self, key: Key, report: Report) -> None:
        """A report on the key's latest lease came after the end of that."""
        ...


class _NoRecorder:
    def lease_ended(self, key: Key, how: How, at: float | None, report: Report | None) -> None:
        """Nobody records."""

    def late_report(self, key: Key, report: Report) -> None:
        """Nobody records."""


class _NoClients:
    def begun(self, pool: Pool, key: Key) -> None:
        """Nobody counts."""

    def ended(self, key: Key) -> None:
        """Nobody counts."""


class Processed(NamedTuple):
    """The result of `process_due`: by how many seconds the first of each kind was late; whether more may be due."""

    release_lateness: float | None
    expiry_lateness: float | None
    more: bool


class Ended(NamedTuple):
    """The result of an unblock: whether it changed anything, and whether the guard prevented a quarantine."""

    changed: bool
    guarded: bool = False


_CHANGED, _UNCHANGED = Ended(True), Ended(False)


class Pool(Seats):
    """All keys, and the rules of what happens to them.

    `new_text` returns a random key text, `random` a float in [0, 1). `rules` may be replaced at any time: a changed
    length of time holds for the deadlines that are set from then on.
    """

    def __init__(
        self,
        rules: PoolRules,
        *,
        new_text: Callable[[], str],
        random: Callable[[], float],
        clients: Clients | None = None,
        recorder: Recorder | None = None,
        on_change: Listener = lambda change, key, owner, origin: None,
        on_opened: BucketListener = lambda bucket: None,
        on_closed: BucketListener = lambda bucket: None,
    ) -> None:
        super().__init__(on_opened, on_closed)
        self.rules = rules
        self.counters = Counters()
        self.on_change = on_change
        self._clients = clients or _NoClients()
        self._recorder = recorder or _NoRecorder()
        self._new_text = new_text
        self._random = random
        self._purge_until = inf  # keys whose deadline comes after it are not purged: see `suspend_expiry`

    # -- finding

    def find(self, text: str, now: float) -> Key:
        """The live key with this text, its deadlines applied. O(1). Raises UnknownKey.

        A text that was replaced names its key until the lease ends that was given with it. A text of several seats
        names the first one, O(seats).
        """
        key = self._by_text.get(text)
        if key is None:
            key = self._imported.get(text)
            if key is not None and key.group is None and key.text != text:
                self._live(key, now)  # which may end its lease
                key = self._imported.get(text)
        return self._live_seat(key, text, now)

    def find_id(self, id: int, now: float) -> Key:
        """The live key with this id, its deadlines applied. O(1). Raises UnknownKey."""
        return self._live(self._by_id.get(id), now)

    def find_name(self, name: str, now: float) -> Key:
        """The live key with this name, its deadlines applied. O(log n). Raises UnknownKey."""
        return self._live_seat(self._by_name.get(name), None, now)

    def find_hint(self, hint: str, now: float) -> Key:
        """The first live key by id with this hint, its deadlines applied. O(log n). Raises UnknownKey.

        Examines at most `PAGE_SCAN_LIMIT` keys, of which more would have to have expired, or begin likewise.
        """
        return self._live_seat(self._first_with_hint(hint, now, PAGE_SCAN_LIMIT), None, now)

    def _live_seat(self, key: Key | None, text: str | None, now: float) -> Key:
        """The live key, its deadlines applied; of several seats the first one, which a `text` must name."""
        if key is not None and key.group is not None:
            key = self._named(key.group, text, now)
        return self._live(key, now)

    def _live(self, key: Key | None, now: float) -> Key:
        if key is None:
            raise UnknownKey
        if key.expires_deadline <= now:
            if key.expires_deadline <= self._purge_until:
                self._purge(key, Change.EXPIRED)
            raise UnknownKey
        if key.release_deadline is not None and key.release_deadline <= now:
            if key.group is not None and key.group.surplus > 0:
                self._settled(key.group, now)
            self._catch_up(key, now)
            if key.expires_deadline == DEAD:  # a seat that was to go when its lease ended
                raise UnknownKey
        return key

    def leases_of(self, attempt: bytes, now: float) -> list[Key]:
        """The keys whose leases were given to this attempt and are still held, in order of acquisition. O(keys).

        They are `replayed` from now on.
        """
        held = self._by_attempt.get(attempt)
        keys = [key for key in held if key.expires_deadline > now and (key.release_deadline or now) > now]
        keys.sort(key=attrgetter("lease"))  # loaded ones are in order of id
        for key in keys:
            key.replayed = True
        return keys

    def state_of(self, key: Key, now: float) -> State:
        """The state of a live key at the moment `now`, by its deadline. O(1)."""
        deadline = key.release_deadline
        if deadline is None or deadline > now:
            return key.state
        if key.quarantine_pending:
            return _QUARANTINED
        if key.state is not _BLOCKED:
            return _AVAILABLE
        limit = self._has_budget_at(key) if key.group is None else key.group.cools_until
        ready = max(deadline + self.rules.rest_seconds, limit)
        return _COOLING if ready > now else _AVAILABLE

    def failures_of(self, key: Key, now: float) -> int:
        """The failures in a row of a key that aren't forgotten. O(1)."""
        return failures_at(key.history, now, self.rules)

    # -- the calls

    def generate(self, now: float, origin: Origin = HOLDER) -> Key:
        """Make a key, available at once. O(log n). Raises PoolFull."""
        self.require_room(1, now)
        self.last_id += 1
        key = Key(self.last_id, self._new_text(), now, self._expiry(now))
        self._insert(key)
        self._give_slot(key)
        self.counters.generated += 1
        self.on_change(Change.GENERATED, key, None, origin)
        return key

    def require_lasting(self, expire: bool) -> None:
        """Raise KeysWouldExpire if the pool purges keys and the importer doesn't know it. O(1)."""
        seconds = self.rules.keepalive_seconds
        if seconds is not None and not expire:
            raise KeysWouldExpire(seconds)

    def import_key(self, item: NewKey, now: float, origin: Origin, reserved: int = 0) -> Key:
        """Add a key from elsewhere, available at once, whose text `find` hasn't found. O(seats · log n).

        Returns the first of its seats. `reserved` is the room that others need. Raises NameTaken, PoolFull.
        """
        if item.name:
            self._require_name(item.name, now)
        seats = item.seats or 1
        self.require_room(reserved + seats, now)
        self._give_up_former(item.secret, origin)
        group = None if seats == 1 else Group(seats)
        self.last_id += 1
        key = Key(self.last_id, item.secret, now, self._expiry(now), details=details_of(item), group=group)
        self._insert(key)
        self._give_slot(key)
        self.counters.imported += 1
        self.on_change(Change.IMPORTED, key, None, origin)
        if group is not None:
            for _ in range(seats - 1):
                self._add_seat(key, group, now, origin)
        return key

    def update(self, key: Key, patch: KeyPatch, now: float, origin: Origin, reserved: int = 0) -> Key:
        """Change name, labels, data, pace or the number of seats of a live key. O(seats · log n).

        Another pace is what later uses are charged by. Returns the key, or the first seat if the key was one of those
        that went. `reserved` is the room that others need. Raises NameTaken, PoolFull.
        """
        details = patched(key.details, patch)
        if details.name is not None and details.name != key.details.name:
            self._require_name(details.name, now)
        if patch.seats is not None:
            seats = 1 if key.group is None else len(self._settled(key.group, now))
            if patch.seats > seats:
                self.require_room(reserved + patch.seats - seats, now)
        first = self.seats_of(key)[0]
        if details.name != key.details.name:
            if key.details.name is not None:
                self._by_name.discard(first)
            first.details = msgspec.structs.replace(first.details, name=details.name)
            if details.name is not None:
                self._by_name.add(first)
        key.details = details
        self.on_change(Change.NOTED, key, key.owner, origin)
        if key.group is not None:
            self._share_details(key, key.group, origin)
        return key if patch.seats is None else self._set_seats(key, patch.seats, now, origin)

    def replace(self, key: Key, secret: str, now: float, origin: Origin) -> None:
        """Give a live key another text, which `find` hasn't found for another key. O(log n). Raises SecretExists.

        Reports on the old text are forgotten, and a cooldown or quarantine is over. A new text has its full
        budget. A lease goes on, and the text with which it was given names the key until it ends.
        """
        other = self._unless_expired(self._by_text.get(secret) or self._imported.get(secret), now)
        if other is not None and secret == other.text != key.text:
            raise SecretExists(other.id)
        if secret != key.text:
            self._change_text(self.seats_of(key), secret, origin)
            if key.group is None:
                key.paced_until = 0.0
            else:
                key.group.paced_until = 0.0
        self.restore(key, now, origin)

    def _require_name(self, name: str, now: float) -> None:
        """Raise NameTaken if a key has the name. O(log n)."""
        holder = self._unless_expired(self._by_name.get(name), now)
        if holder is not None:
            raise NameTaken(holder.id)

    def _unless_expired(self, key: Key | None, now: float) -> Key | None:
        """The key; None if it has expired, and is purged now, which waits while expiry is suspended.

        Of several seats, the first one that hasn't.
        """
        if key is None or key.expires_deadline > min(now, self._purge_until):
            return key
        if key.group is not None:
            return next(iter(self._settled(key.group, now)), None)
        self._purge(key, Change.EXPIRED)
        return None

    def _expiry(self, now: float) -> float:
        """The `expires_deadline` of a key that is kept alive now."""
        seconds = self.rules.keepalive_seconds
        return NEVER if seconds is None else now + seconds

    def require_room(self, count: int, now: float) -> None:
        """Raise PoolFull unless `count` more keys fit. O(1)."""
        if self._total + count > self.rules.max_keys:
            self.process_due(now)
            if self._total + count > self.rules.max_keys:
                raise PoolFull(self._total, count, self.rules.max_keys)

    def acquire(
        self,
        now: float,
        owner: str | None,
        block_seconds: float | None = None,
        attempt: bytes | None = None,
        client: str | None = None,
    ) -> Key | None:
        """Block a uniformly random available key under a new lease; None if none is available. O(1).

        `block_seconds` is in place of the pool's own; `leases_of` finds the key by its `attempt` as long as it is held.
        `client` is the name of the caller's token.
        Up to `MAX_DUE_PER_CALL` due keys are processed first. After a None, `may_have_more` returns whether that wasn't
        enough and the caller should try again.
        """
        if now >= self._by_release.earliest:
            self._process_releases(now)
        rules = self.rules
        available = self._available
        for _ in range(MAX_DUE_PER_CALL):
            if not available:
                return None
            key = available[int(self._random() * len(available))]
            if key.expires_deadline > now:
                self._take_slot(key)
                key.lease = self.last_lease = self.last_lease + 1
                key.served += 1
                key.owner = owner
                key.state = _BLOCKED
                key.reported = False
                key.acquired_at = now
                if client is not None:
                    key.client = client
                    self._clients.begun(self, key)
                if attempt is not None:
                    key.attempt = attempt
                    self._by_attempt.add(key, attempt)
                block = rules.block_seconds if block_seconds is None else block_seconds
                key.release_deadline = deadline = now + block
                key.release_bucket = self._by_release.add(key, deadline)
                self._owners.begin(key, owner, client)
                self.counters.acquired += 1
                self.on_change(_ACQUIRED, key, owner, HOLDER)
                if (pace := key.details.pace or rules.pace) is not None:
                    if key.group is None:
                        key.paced_until = max(key.paced_until, now) + pace.seconds / pace.count
                    else:
                        self._charge_seat(key, key.group, pace, now)
                return key
            if key.expires_deadline <= self._purge_until:
                self._purge(key, Change.EXPIRED)
        return None

    def may_have_more(self, now: float) -> bool:
        """Whether another `acquire` may get a key: a backlog of due keys may hide an available one. O(1)."""
        return bool(self._available) or self.next_release(now) == 0

    def unblock(
        self,
        key: Key,
        lease: int | None,
        now: float,
        report: Report | None = None,
        origin: Origin = HOLDER,
        *,
        uses: int = 1,
    ) -> Ended:
        """End the lease of a live key, if it has one, and take its holder's report. O(log n).

        A lease number must be that of the key's latest lease; any other raises StaleLease. A report needs it. One that
        comes after the end of its lease counts as well, but each lease reports once. If it changes anything, `uses` are
        charged, one of which the acquire has charged already.
        """
        if lease is not None:
            _require_latest(key, lease)
        blocked, group = key.state is _BLOCKED, key.group
        if report is None:
            if blocked:
                charged = uses > 1 and self._charge(key, uses - 1, now)
                self._free(key, _UNBLOCKED, now, origin)
                if charged and group is not None:
                    self._follow(key, group, key.history, now, origin, leaving=False)
            return _CHANGED if blocked else _UNCHANGED
        if key.reported:
            return _UNCHANGED
        key.reported = True
        charged = uses > 1 and self._charge(key, uses - 1, now)
        history = key.history
        if (
            report is OK_REPORT
            and blocked
            and (history is _ALL_WELL or (history is NO_HISTORY and group is None))
        ):
            key.history = _ALL_WELL
            self._free(key, _UNBLOCKED, now, origin, report=report)
            if charged and group is not None:
                self._follow(key, group, history, now, origin, leaving=False)
            return _CHANGED
        return Ended(True, self._conclude(key, report, now, origin, charged))

    def _conclude(self, key: Key, report: Report, now: float, origin: Origin, charged: bool) -> bool:
        """Apply a report, with which uses were `charged` or not.

        Returns whether the guard turned a quarantine into a cooldown.
        """
        invalid = report.outcome is _INVALID
        if invalid:
            self.process_due(now)  # the guard doesn't count keys that have expired
        leaving = key.quarantine_pending or key.state is _QUARANTINED
        quarantine = invalid and (
            leaving or may_quarantine(self.quarantined_secrets, self.secrets, self.rules)
        )
        failures, failed_at = self.failures_of(key, now), key.history.failed_at
        cooldown = 0.0
        if report.outcome is _OK:
            failures = 0
        elif not quarantine:
            failures, failed_at = failures + 1, now
            cooldown = cooldown_of(report, failures, self.rules)
        history, group = key.history, key.group
        if group is not None and cooldown and not leaving:
            self._cool_all(group, now + cooldown, now)
        key.history = _after(key.history, report, failures, failed_at)
        if key.state is _BLOCKED:
            key.quarantine_pending = key.quarantine_pending or quarantine
            self._free(key, _UNBLOCKED, now, origin, cool_until=now + cooldown, report=report)
        else:
            self._report_late(key, report, now + cooldown, now, origin, leaves=quarantine, charged=charged)
        if group is not None:
            self._follow(key, group, history, now, origin, leaving=quarantine or leaving)
        return invalid and not quarantine

    def _report_late(
        self,
        key: Key,
        report: Report,
        until: float,
        now: float,
        origin: Origin,
        *,
        leaves: bool,
        charged: bool,
    ) -> None:
        """Apply a report about a key that nobody holds any more, which `leaves` for quarantine or cools until then."""
        if self.rules.history_leases:
            self._recorder.late_report(key, report)
        if leaves and key.state is not _QUARANTINED:
            self._leave(key)
            self._quarantine(key, None, origin)
        elif key.state is _QUARANTINED:
            self.on_change(Change.NOTED, key, None, origin)
        else:
            self._cool_longer(key, until, now, origin, charged)

    def _cool_longer(self, key: Key, until: float, now: float, origin: Origin, charged: bool) -> None:
        """Let an available or cooling key cool at least `until` then, and if it was `charged` until it has budget."""
        ends = key.release_deadline or now
        until = max(until, ends)
        if charged:
            until = self._with_budget(key, until) if key.group is None else max(until, key.group.cools_until)
        if until > ends and key.state is _AVAILABLE:
            self._leave(key)
            self._cool(key, until, None, origin)
        else:
            if until > ends:
                self._move_release(key, until)
            self.on_change(Change.NOTED, key, None, origin)

    def extend(self, key: Key, lease: int, seconds: float | None, now: float) -> None:
        """Let the lease of a live key last `seconds` from now, `block_seconds` if None. O(1).

        It never ends sooner than before, nor later than `longest_block` after its beginning. Raises StaleLease,
        LeaseOver, and BlockLimit if it would end when it ends anyway.
        """
        _require_latest(key, lease)
        if key.state is not _BLOCKED or key.quarantine_pending:
            raise LeaseOver(key.quarantine_pending)
        assert key.release_deadline is not None  # a blocked key has one
        end = now + (self.rules.block_seconds if seconds is None else seconds)
        last = key.acquired_at + self.rules.longest_block
        if min(end, last) <= key.release_deadline:
            at_limit = last <= key.release_deadline
            raise BlockLimit(
                key.release_deadline - now, longest=self.rules.longest_block if at_limit else None
            )
        self._move_release(key, min(end, last))
        key.extended += 1
        self.on_change(Change.EXTENDED, key, key.owner, HOLDER)

    def quarantine(self, key: Key, reason: str | None, at_once: bool, now: float, origin: Origin) -> Key:
        """Take a live key out of service until `restore`. O(seats · log n).

        A blocked key goes when its lease ends, or `at_once`: then its holder can't report any more. Returns the key, or
        another seat if the key was to go when its lease ended.
        """
        if (group := key.group) is None:
            self._take_out(key, reason, at_once, now, origin)
            return key
        others = self._others(key, group, now)
        for seat in (key, *others):
            self._take_out(seat, reason, at_once, now, origin)
        for seat in others:
            seat.history = key.history
        return key if key.group is not None else self._seat(group.ids[0])

    def _take_out(self, key: Key, reason: str | None, at_once: bool, now: float, origin: Origin) -> None:
        if reason is not None:
            key.history = msgspec.structs.replace(key.history, operator_reason=reason)
        key.reported = key.reported or at_once
        if key.state is _BLOCKED:
            key.quarantine_pending = True
            if at_once:
                self._free(key, _UNBLOCKED, now, origin)
            else:
                self.on_change(Change.NOTED, key, key.owner, origin)
        elif key.state is _QUARANTINED:
            self.on_change(Change.NOTED, key, None, origin)
        else:
            self._leave(key)
            self._quarantine(key, None, origin)

    def restore(self, key: Key, now: float, origin: Origin) -> None:
        """Make a cooling or quarantined key available, call off a quarantine to come, and forget reports.

        A key without budget cools until it has. O(seats · log n).
        """
        group = key.group
        seats = [key]
        if group is not None:
            seats += self._others(key, group, now)
            group.cools_until = group.cooled = 0.0
        out = [seat for seat in seats if seat.state in (_COOLING, _QUARANTINED)]
        for seat in seats:
            seat.history = NO_HISTORY
            seat.quarantine_pending = False
        for seat in out:
            self._leave(seat)
        self.counters.restored += bool(out)
        if group is not None:
            self._keep_pace(group, self._pace_of(key), now)
            until = group.cools_until
        else:
            until = self._with_budget(key, now) if out else now
        for seat in out if until <= now else ():
            self._give_slot(seat)
        self.on_change(Change.RESTORED if out else Change.NOTED, key, key.owner, origin)
        for seat in out if until > now else ():
            self._cool(seat, until, None, origin)
        for seat in seats[1:]:
            self.on_change(Change.FOLLOWED, seat, seat.owner, origin)

    def keepalive(self, key: Key, now: float) -> None:
        """Set a live key's `expires_deadline` to `now + keepalive_seconds`, or to NEVER if that is None. O(1)."""
        if key.expiry_bucket is not None:
            self._by_expiry.discard(key, key.expiry_bucket)
        seconds = self.rules.keepalive_seconds
        if seconds is not None:
            key.expires_deadline = deadline = now + seconds
            key.expiry_bucket = self._by_expiry.add(key, deadline)
        else:
            key.expires_deadline = NEVER
            key.expiry_bucket = None
        self.counters.kept_alive += 1
        self.on_change(_KEPT_ALIVE, key, key.owner, HOLDER)

    def delete(self, key: Key, origin: Origin = HOLDER, now: float = 0.0) -> None:
        """Purge a live key with all its seats, whose leases may have ended by `now`. O(seats · log n)."""
        seats = [key] if key.group is None else self._settled(key.group, now)
        for seat in reversed(seats):
            self._purge(seat, Change.DELETED, origin)

    def delete_seat(self, key: Key, origin: Origin) -> None:
        """Purge a live key, and none of the others with the same text. O(log n)."""
        self._purge(key, Change.DELETED, origin)

    # -- deadlines

    def process_due(self, now: float) -> Processed:
        """Release and purge due keys, `MAX_DUE_PER_CALL` of each kind at most. O(1) if nothing is due."""
        expired = self._by_expiry.due(min(now, self._purge_until), MAX_DUE_PER_CALL)
        expiry = now - expired[0].expires_deadline if expired else None
        for key in expired:
            self._purge(key, Change.EXPIRED)
        release, released = self._process_releases(now)
        return Processed(release, expiry, MAX_DUE_PER_CALL in (len(expired), released))

    def _process_releases(self, now: float) -> tuple[float | None, int]:
        """End due blocks and cooldowns of keys that live. Returns how late the first was, and how many were due."""
        due = self._by_release.due(now, MAX_DUE_PER_CALL)
        lateness = None if not due else now - (due[0].release_deadline or now)
        for key in due:
            if key.expires_deadline <= min(now, self._purge_until):
                self._purge(key, Change.EXPIRED)  # it wasn't available any more
            else:
                self._catch_up(key, now)
        return lateness, len(due)

    def overdue(self, now: float) -> bool:
        """Whether there is an expired key that may be purged. O(1)."""
        next_expiry = self.next_expiry()
        return next_expiry is not None and next_expiry <= min(now, self._purge_until)

    def next_release(self, now: float) -> float | None:
        """Seconds until the earliest release or end of a cooldown, at least 0; None if nothing is due. O(1)."""
        deadline = self.next_release_deadline()
        return None if deadline is None else max(0.0, deadline - now)

    # -- suspended expiry: while changes can't be kept, keepalives fail, so keys must not expire

    def suspend_expiry(self, now: float) -> None:
        """Purge no key that is alive at this moment, until `resume_expiry`. No effect if suspended already. O(1).

        A key that expires meanwhile isn't found and isn't served, but stays in the orders and counts: either
        `grant_grace` gives it a new deadline, or it is purged after `resume_expiry`.
        """
        if self._purge_until == inf:
            self._purge_until = now

    @property
    def expiry_suspended(self) -> bool:
        """Whether expiry is suspended. O(1)."""
        return self._purge_until != inf

    def is_suspended(self, ref: int | str) -> bool:
        """Whether a key that `find` didn't find is still kept, because expiry is suspended. O(1)."""
        if not self.expiry_suspended:
            return False
        if isinstance(ref, int):
            return self._by_id.get(ref) is not None
        return self._by_text.get(ref) is not None or self._imported.get(ref) is not None

    def grant_grace(self, until: float, limit: int) -> bool:
        """Let keys that would expire before `until` live until then, soonest first. Returns whether more may be left.

        Processes `limit` keys at most, O(limit · log n). Keys that had expired before the suspension are purged. For a
        key that gets the grace no counter changes and no listener is called: the caller keeps `until` instead.
        """
        due = self._by_expiry.due(nextafter(until, -inf), limit)
        for key in due:
            if key.expires_deadline <= self._purge_until:
                self._purge(key, Change.EXPIRED)
                continue
            assert key.expiry_bucket is not None  # a live key is in the order by expiry
            self._by_expiry.discard(key, key.expiry_bucket)
            key.expires_deadline = until
            key.expiry_bucket = self._by_expiry.add(key, until)
        return len(due) == limit

    def resume_expiry(self) -> None:
        """Let keys expire again: `process_due` purges those that are due by now. O(1)."""
        self._purge_until = inf

    # -- holders

    def holders(self, after: Position | None, limit: int, now: float) -> HolderPage:
        """Who holds keys, in order of name, deadlines applied but for a backlog; maybe fewer than `limit`.

        O(log n + PAGE_SCAN_LIMIT) at most.
        """
        self.process_due(now)
        return self._owners.page(after, limit, PAGE_SCAN_LIMIT, now)

    def next_held(self, owner: str, client: str | None, after: int) -> Key | None:
        """The key that an owner holds under the next lease beyond `after`, with any token or this one. O(log n)."""
        return next(self._owners.held_by(owner, after, client), None)

    # -- pages

    def page(self, query: PageQuery, now: float) -> KeyPage:
        """Live keys in an order, their deadlines applied; maybe fewer than `limit`. O(log n + PAGE_SCAN_LIMIT) at most.

        A walk from page to page in order `id` returns each key that lives all the while exactly once. In the orders of
        deadlines a key may move past the reader.
        """
        self.process_due(now)
        page = KeyPage()
        last: Key | None = None
        for examined, key in enumerate(self._walk(query)):
            if len(page.keys) == query.limit or examined == PAGE_SCAN_LIMIT:
                assert last is not None
                page.next = self._position(query, last)
                break
            last = key
            if key.expires_deadline > now and (query.state is None or self.state_of(key, now) is query.state):
                page.keys.append(key)
        for key in page.keys:
            self._catch_up(key, now)
        page.keys = [key for key in page.keys if key.expires_deadline != DEAD]
        return page

    # -- changes of state

    def load(self, key: Key) -> None:
        """Add a key from a journal, without counting or reporting it. Ids must ascend. O(log n)."""
        if key.group is not None:
            self._load_seat(key, key.group)
        self._insert(key)
        if key.state is _AVAILABLE:
            self._give_slot(key)
        elif key.state is _QUARANTINED:
            self._enter_quarantine(key)
        else:
            assert key.release_deadline is not None  # a journal holds no other key
            key.release_bucket = self._by_release.add(key, key.release_deadline)
            self._cooling += key.state is _COOLING
            if key.attempt is not None:
                self._by_attempt.add(key, key.attempt)
            if key.client is not None:
                self._clients.begun(self, key)
            if key.state is _BLOCKED:
                self._owners.load(key)

    def _give_up_former(self, text: str, origin: Origin) -> None:
        """A text that becomes a key's own names no other one, even if that is still leased under it."""
        while (
            key := self._imported.get(text)
        ) is not None:  # one after the other, if it is leased by several
            self._end_former(key)
            self.on_change(Change.NOTED, key, key.owner, origin)

    def _catch_up(self, key: Key, now: float) -> None:
        """Release a blocked key and end the cooldown of a cooling one, as of their deadlines, if these have passed."""
        while key.release_deadline is not None and key.release_deadline <= now:
            if key.state is _BLOCKED:
                if key.holder is not None:
                    key.holder.count_released(now)
                # The lease may be followed by a rest, which may be over as well.
                self._free(key, Change.RELEASED, key.release_deadline, DEADLINE)
            else:
                group, deadline = key.group, key.release_deadline
                self._leave(key)
                self._give_slot(key)
                first = group is None or self._is_first_ready(group, deadline)
                self.on_change(Change.READY if first else Change.FOLLOWED, key, None, DEADLINE)

    def _free(
        self,
        key: Key,
        change: Change,
        now: float,
        origin: Origin,
        *,
        cool_until: float = 0.0,
        report: Report | None = None,
    ) -> None:
        """End a lease: the key is available, or rests or cools first, or is quarantined."""
        if self.rules.history_leases:
            revoked = change is _UNBLOCKED and origin.by is By.OPERATOR
            how = How.REVOKED if revoked else How.UNBLOCKED if change is _UNBLOCKED else How.RELEASED
            self._recorder.lease_ended(key, how, now, report)
        owner = self._leave(key)
        if change is _UNBLOCKED:
            self.counters.unblocked += 1
        else:
            self.counters.released += 1
        if self.rules.rest_seconds:
            cool_until = max(cool_until, now + self.rules.rest_seconds)
        if (group := key.group) is not None:  # its pace is part of its cooldown
            cool_until = max(cool_until, group.cools_until)
            if group.surplus > 0:
                key.quarantine_pending = False
                self._give_slot(key)
                self.on_change(change, key, owner, origin)
                self._purge(key, Change.DELETED, origin)
                return
        elif key.paced_until > now and not key.quarantine_pending:  # otherwise it has its full budget
            cool_until = self._with_budget(key, max(cool_until, now))
        if key.quarantine_pending:
            key.quarantine_pending = False
            self.on_change(change, key, owner, origin)
            self._quarantine(key, owner, origin)
        elif cool_until > now:
            self.on_change(change, key, owner, origin)
            self._cool(key, cool_until, owner, origin)
        else:
            self._give_slot(key)
            self.on_change(change, key, owner, origin)

    def _charge(self, key: Key, uses: int, now: float) -> bool:
        """Charge a key for more uses of a lease. Returns whether it has a pace."""
        pace = self._pace_of(key)
        if pace is None:
            return False
        if (group := key.group) is None:
            key.paced_until = pace.charged(key.paced_until, uses, now)
        else:
            group.paced_until = pace.charged(group.paced_until, uses, now)
            self._keep_pace(group, pace, now)
        return True

    def _has_budget_at(self, key: Key) -> float:
        """The moment from which a key without other seats, which is not held, has budget."""
        pace = self._pace_of(key)
        return 0.0 if pace is None else key.paced_until - pace.tolerance

    def _with_budget(self, key: Key, until: float) -> float:
        """The end of a cooldown `until` then that must not end before the key has budget, which is counted."""
        ready = self._has_budget_at(key)
        if ready <= until:
            return until
        self.counters.paced += 1
        return ready

    def _cool(self, key: Key, until: float, owner: str | None, origin: Origin) -> None:
        key.state = _COOLING
        key.release_deadline = until
        key.release_bucket = self._by_release.add(key, until)
        self._cooling += 1
        if key.group is None or self._begins(key.group, until):
            self.counters.cooled += 1
            self.on_change(Change.COOLED, key, owner, origin)
        else:
            self.on_change(Change.FOLLOWED, key, owner, origin)

    def _quarantine(self, key: Key, owner: str | None, origin: Origin) -> None:
        self._enter_quarantine(key)
        if key.group is None or key.group.quarantined == 1:
            self.counters.quarantines += 1
            self.on_change(Change.QUARANTINED, key, owner, origin)
        else:
            self.on_change(Change.FOLLOWED, key, owner, origin)

    def _purge(self, key: Key, change: Change, origin: Origin = DEADLINE) -> None:
        if key.state is _BLOCKED and self.rules.history_leases:
            self._record_purged(key, change)
        owner = self._leave(key)
        key.quarantine_pending = False
        self._remove(key)
        key.expires_deadline = DEAD
        if (group := key.group) is not None:
            key.group = None
            if group.paced_until and group.ids:  # may be kept with this seat only
                self.on_change(Change.FOLLOWED, self._seat(group.ids[0]), None, origin)
        if change is Change.DELETED:
            self.counters.deleted += 1
        else:
            self.counters.expired += 1
        self.on_change(change, key, owner, origin)

    def _record_purged(self, key: Key, change: Change) -> None:
        """The lease of a key ends with the key, unless its own deadline came before."""
        assert key.release_deadline is not None  # a blocked key has one
        if change is Change.DELETED:
            self._recorder.lease_ended(key, How.DELETED, None, None)
        elif key.release_deadline <= key.expires_deadline:
            self._recorder.lease_ended(key, How.RELEASED, key.release_deadline, None)
        else:
            self._recorder.lease_ended(key, How.EXPIRED, key.expires_deadline, None)

    def _leave(self, key: Key) -> str | None:
        """Take a key out of the structures of its state. The lease remains the key's latest. Returns the owner."""
        if key.state is _AVAILABLE:
            self._take_slot(key)
            return None
        if key.state is _QUARANTINED:
            self._leave_quarantine(key)
            return None
        assert key.release_bucket is not None
        self._by_release.discard(key, key.release_bucket)
        key.release_bucket = None
        key.release_deadline = None
        if key.state is _COOLING:
            self._cooling -= 1
            return None
        if key.extended:
            key.extended = 0
        holder = key.holder
        # What `OwnerIndex.end` does for nearly all leases, as calling it would cost an unblock a percent.
        if holder is None or holder.latest.pop(key.id, None) is None:
            self._owners.end_older(key)
        key.holder = None
        if key.attempt is not None:
            self._by_attempt.discard(key, key.attempt)
            key.attempt = None
            key.replayed = False
        if key.client is not None:
            self._clients.ended(key)
            key.client = None
        if key.details is not NO_DETAILS and key.details.former is not None:
            self._end_former(key)
        owner, key.owner = key.owner, None
        return owner


def _require_latest(key: Key, lease: int) -> None:
    """Raise StaleLease unless this is the number of the key's latest lease."""
    if lease != key.lease or not lease:  # 0: never served, so never given
        raise StaleLease(lease, key.lease or None)


def _after(history: History, report: Report, failures: int, failed_at: float) -> History:
    """A key's history after a report, which made its failures in a row so many."""
    if history in (NO_HISTORY, _ALL_WELL) and report == OK_REPORT:
        return _ALL_WELL
    return msgspec.structs.replace(
        history, failures=failures, failed_at=failed_at, outcome=report.outcome, reason=report.reason
    )
