"""Secrets that several may hold at a time: each seat is a key like others, with the same text.

What a secret is called, its history, its cooldown and its quarantine are those of all its seats, which move together,
O(seats). A seat that is held finishes first: its lease goes on, and then the seat is where the others are. A rest after
a lease is the seat's own. So while a secret cools or is quarantined, none of its seats is available.

Its pace is part of its cooldown: an acquire of any seat charges the secret (Group.paced_until), and when that spends
the budget, the secret cools until it has budget. So an available seat has budget.

Of seats that move together, one is counted and has the event: the first to get there, which is the one that was
reported on unless it was elsewhere. The others follow silently (Change.FOLLOWED). What happens to a seat by itself (it
is added, acquired, freed, purged) is an event as of any key.

If there are more seats than wanted, all of them are held, and those whose leases end first go.
"""

from __future__ import annotations

from operator import attrgetter

import msgspec

from keypool.core.counters import Counters
from keypool.core.details import with_text_from_elsewhere, without_former
from keypool.core.errors import ManySeats, StaleLease
from keypool.core.events import DEADLINE, HOLDER, Change, Listener, Origin
from keypool.core.keys import Group, Key, State
from keypool.core.outcomes import History
from keypool.core.pace import Pace
from keypool.core.rules import PoolRules
from keypool.core.self_check import SelfCheck

_AVAILABLE, _BLOCKED, _COOLING, _QUARANTINED = State


class Seats(SelfCheck):
    """See the module. A part of the pool (pool.py), which moves single keys: its methods are declared at the end."""

    rules: PoolRules
    counters: Counters
    on_change: Listener
    _purge_until: float

    def number_of(self, key: Key) -> tuple[int, int]:
        """The number of a seat, from 1, and how many there are. O(seats) of its secret."""
        return (1, 1) if key.group is None else (key.group.ids.index(key.id) + 1, len(key.group.ids))

    def seats_of(self, key: Key) -> list[Key]:
        """All seats of a key's secret, in order. O(seats)."""
        return [key] if key.group is None else [self._seat(id) for id in key.group.ids]

    def ids_of(self, key: Key, now: float) -> list[int]:
        """The ids of all living seats of a key's secret, in order. O(seats)."""
        return [seat.id for seat in self.seats_of(key) if seat.expires_deadline > now]

    def seat_of(self, key: Key, lease: int | None, now: float) -> Key:
        """The seat of a live key's secret that holds, or held last, this lease. O(seats · log n).

        The only seat doesn't need a lease number. Raises ManySeats, StaleLease.
        """
        if key.group is None:
            return key
        living = [seat for seat in self._settled(key.group, now) if seat.expires_deadline > now]
        if len(living) == 1:
            return key
        if lease is None:
            raise ManySeats(len(living))
        for seat in living:
            if seat.lease == lease and lease:  # 0: never served, so never given
                return seat
        raise StaleLease(lease, max(seat.lease for seat in living) or None)

    def _settled(self, group: Group, now: float) -> list[Key]:
        """All seats, in order, after their deadlines were applied. O(seats · log n).

        Seats that have expired are purged. While expiry is suspended they stay, and move with the others, as they may
        get a grace. If there are too many seats, those go first whose leases ended first.
        """
        seats = [self._seat(id) for id in group.ids]
        for seat in seats:
            if seat.expires_deadline <= min(now, self._purge_until):
                self._purge(seat, Change.EXPIRED)
        due = [seat for seat in seats if seat.release_deadline is not None and seat.release_deadline <= now]
        for seat in sorted(due, key=attrgetter("release_deadline")):
            self._catch_up(seat, now)
        return [seat for seat in seats if seat.group is not None]

    def _named(self, group: Group, text: str | None, now: float) -> Key | None:
        """The first living seat, its deadlines applied; None if none lives. O(seats · log n).

        With a `text`, only a seat that has it, or whose lease was given with it.
        """
        for seat in self._settled(group, now):
            if seat.expires_deadline > now and text in (None, seat.text, seat.details.former):
                return seat
        return None

    def _others(self, key: Key, group: Group, now: float) -> list[Key]:
        return [seat for seat in self._settled(group, now) if seat is not key]

    # -- moving together

    def _cool_all(self, group: Group, until: float, now: float) -> None:
        """The cooldown of a secret begins, or lasts longer: its seats will follow."""
        if until > group.cools_until:
            if group.cools_until > now and group.cooled == group.cools_until:
                group.cooled = until  # which is no event
            group.cools_until = until

    def _charge_seat(self, key: Key, group: Group, pace: Pace, now: float) -> None:
        """Charge a secret for an acquire of one of its seats. O(1); if that spends the budget, O(seats · log n)."""
        group.paced_until = max(group.paced_until, now) + pace.interval
        self._keep_pace(group, pace, now)
        if group.cools_until > now:
            self._follow(key, group, key.history, now, HOLDER, leaving=False)

    def _pace_of(self, key: Key) -> Pace | None:
        """The key's own pace, or the pool's. Written out in `acquire`, for speed."""
        return key.details.pace or self.rules.pace

    def _keep_pace(self, group: Group, pace: Pace | None, now: float) -> None:
        """Let a secret cool until it has budget, which is counted: its seats will follow."""
        if pace is None:
            return
        ready = group.paced_until - pace.tolerance
        if ready > max(now, group.cools_until):
            self._cool_all(group, ready, now)
            self.counters.paced += 1

    def _follow(
        self, key: Key, group: Group, before: History, now: float, origin: Origin, *, leaving: bool
    ) -> None:
        """Let the other seats follow one that was used or reported on, whose history was `before`.

        `leaving` to quarantine.
        """
        if key.history == before and not leaving and group.cools_until <= now:
            return
        for seat in self._others(key, group, now):
            changed, seat.history = seat.history != key.history, key.history
            if leaving and seat.state is _BLOCKED:
                changed = changed or not seat.quarantine_pending
                seat.quarantine_pending = True
            elif leaving and seat.state is not _QUARANTINED:
                self._leave(seat)
                self._quarantine(seat, None, origin)
                continue
            elif seat.state is _AVAILABLE and group.cools_until > now:
                self._leave(seat)
                self._cool(seat, group.cools_until, None, origin)
                continue
            elif seat.state is _COOLING and group.cools_until > (seat.release_deadline or now):
                self._move_release(seat, group.cools_until)
                changed = True
            if changed or group.cools_until > now:  # a seat that is held keeps the end of the cooldown, too
                self.on_change(Change.FOLLOWED, seat, seat.owner, origin)

    def _begins(self, group: Group, until: float) -> bool:
        """Whether a seat that cools until then is the first one, or rests by itself."""
        if until != group.cools_until:
            return True
        first, group.cooled = group.cooled != until, until
        return first

    def _is_first_ready(self, group: Group, deadline: float) -> bool:
        """Whether a seat that has cooled until then is the first one, or has rested by itself."""
        if deadline != group.cools_until:
            return True
        first, group.ready = group.ready != deadline, deadline
        return first

    # -- what they have in common

    def _change_text(self, seats: list[Key], text: str, origin: Origin) -> None:
        """Give a secret's seats another text. That of a lease names its seat until the lease ends. O(seats · log n)."""
        first = seats[0]
        before = first.text
        leased = [(seat.details.former or before) if seat.state is _BLOCKED else None for seat in seats]
        formers = [None if former == text else former for former in leased]
        for former in {seat.details.former for seat in seats} - {None}:
            assert former is not None
            self._imported.discard(former)
        for seat in seats:
            if seat.details.former is not None:
                seat.details = without_former(seat.details)
        self._leave_texts(first)
        self._give_up_former(text, origin)
        if before not in formers:
            self._remember(before, first)
        details = with_text_from_elsewhere(first.details, None)
        for seat, former in zip(seats, formers, strict=True):
            seat.text = text
            seat.details = details if former is None else with_text_from_elsewhere(details, former)
            if former is not None:
                self._imported.add(former, seat)
        self._enter_texts(first)

    def _share_details(self, key: Key, group: Group, origin: Origin) -> None:
        """Give the details of a key to the other seats, each of which keeps the text of its lease."""
        details = without_former(key.details)
        for seat in self.seats_of(key):
            former = seat.details.former
            seat.details = details if former is None else msgspec.structs.replace(details, former=former)
            if seat is not key:
                self.on_change(Change.FOLLOWED, seat, seat.owner, origin)

    # -- how many there are

    def _set_seats(self, key: Key, count: int, now: float, origin: Origin) -> Key:
        """Add seats, or let the last ones go that aren't held. O(seats · log n). There must be room for them.

        Returns the key, or the first seat if the key went.
        """
        group = key.group
        if group is None:
            if count == 1:
                return key
            # A cooldown may be a rest, which others needn't wait for; but none may be shortened.
            until = key.release_deadline if key.state is _COOLING else None
            group = key.group = Group(count, until or 0.0)
            group.cooled = group.cools_until
            group.quarantined = key.state is _QUARANTINED
            group.ids.append(key.id)
            group.paced_until, key.paced_until = key.paced_until, 0.0
            if key.state is _BLOCKED:  # as an available one has budget
                self._keep_pace(group, self._pace_of(key), now)
        seats = self.seats_of(key)
        group.wanted = count
        group.surplus = len(group.ids) - count
        for seat in reversed(seats):
            if group.surplus > 0 and seat.state is not _BLOCKED:
                self._purge(seat, Change.DELETED, origin)
            else:
                self.on_change(Change.FOLLOWED, seat, seat.owner, origin)
        for _ in range(count - len(group.ids)):
            self._add_seat(key, group, now, origin)
        return key if key.group is not None else self._seat(group.ids[0])

    def _add_seat(self, key: Key, group: Group, now: float, origin: Origin) -> None:
        """Add a seat beside this one, and let it be where the others are."""
        self.last_id += 1
        expires = self._expiry(now)
        seat = Key(self.last_id, key.text, now, expires, history=key.history, group=group)
        seat.details = without_former(key.details)
        self._insert(seat)
        self._give_slot(seat)
        if seat.details.imported:
            self.counters.imported += 1
            self.on_change(Change.IMPORTED, seat, None, origin)
        else:
            self.counters.generated += 1
            self.on_change(Change.GENERATED, seat, None, origin)
        if group.quarantined or key.quarantine_pending:
            self._leave(seat)
            self._quarantine(seat, None, origin)
        elif group.cools_until > now:
            self._leave(seat)
            self._cool(seat, group.cools_until, None, origin)

    def _load_seat(self, key: Key, group: Group) -> None:
        """Put a key from a journal beside the seats of its secret that were loaded. O(1)."""
        first = self._by_text.get(key.text) or self._imported.get(key.text)
        if first is None or first.text != key.text:
            group.cooled = group.cools_until
            return
        if first.group is None or not key.details.imported == first.details.imported:
            raise ValueError(f"{key!r} has the text of {first!r}, but isn't a seat beside it")
        first.group.cools_until = first.group.cooled = max(first.group.cools_until, group.cools_until)
        first.group.paced_until = max(first.group.paced_until, group.paced_until)
        key.group = first.group
        key.text = first.text
        for seat in (first, self._seat(first.group.ids[-1])):  # one of them may be leased under a former text
            if key.details == seat.details:
                key.details = seat.details
        if key.history == first.history:
            key.history = first.history

    # -- what the pool does with one key

    def _catch_up(self, key: Key, now: float) -> None:
        raise NotImplementedError

    def _leave(self, key: Key) -> str | None:
        raise NotImplementedError

    def _cool(self, key: Key, until: float, owner: str | None, origin: Origin) -> None:
        raise NotImplementedError

    def _quarantine(self, key: Key, owner: str | None, origin: Origin) -> None:
        raise NotImplementedError

    def _purge(self, key: Key, change: Change, origin: Origin = DEADLINE) -> None:
        raise NotImplementedError

    def _give_up_former(self, text: str, origin: Origin) -> None:
        raise NotImplementedError

    def _expiry(self, now: float) -> float:
        raise NotImplementedError
