"""Secrets with several seats: what is told of them, and what holds although a timer is late. See also the machine."""

from __future__ import annotations

import math
import random
from typing import Any

import msgspec
import pytest
from engine_support import START, make_pool
from support import chance_of

from keypool.core.answers import KeyPatch, NewKey
from keypool.core.errors import ManySeats, PoolFull, StaleLease, UnknownKey
from keypool.core.events import HOLDER, SILENT, By, Change, Origin
from keypool.core.keys import DEAD, Key, State
from keypool.core.keyset import PageQuery
from keypool.core.outcomes import Outcome, Report
from keypool.core.pool import Pool
from keypool.engine.durable.rows import key_of, row_of

NOW = START
OPERATOR = Origin(By.OPERATOR, "ops")
LIMITED = Report(Outcome.RATE_LIMITED, 100.0)


class Told:
    """A pool of one secret with so many seats, and its events since."""

    def __init__(self, seats: int, **rules: Any) -> None:
        self.events: list[tuple[Change, int]] = []
        self.pool = make_pool(on_change=self._tell, **({"keepalive_seconds": None} | rules))
        self.first = self.pool.import_key(NewKey("sk-live-1234-abcd", "one", seats=seats), NOW, HOLDER)
        self.seats = self.pool.seats_of(self.first)
        self.events.clear()

    def _tell(self, change: Change, key: Key, _owner: str | None, _origin: Origin) -> None:
        if change not in SILENT:
            self.events.append((change, key.id))

    def told(self) -> list[tuple[Change, int]]:
        """The events since the last look."""
        events, self.events = self.events, []
        return events

    def acquire(self) -> Key:
        key = self.pool.acquire(NOW, "ann")
        assert key is not None
        return key

    def states(self, now: float = NOW) -> list[State]:
        return [self.pool.state_of(seat, now) for seat in self.seats]


def test_of_seats_that_move_together_one_has_the_event_and_is_counted() -> None:
    """The one that was reported on, as far as it moves itself; a lease that ends is an event of its seat."""
    told = Told(4)
    pool, held = told.pool, [told.acquire(), told.acquire()]
    told.events.clear()
    pool.unblock(held[0], held[0].lease, NOW, LIMITED)
    assert told.told() == [(Change.UNBLOCKED, held[0].id), (Change.COOLED, held[0].id)]
    pool.unblock(held[1], None, NOW + 1)
    assert told.told() == [(Change.UNBLOCKED, held[1].id)]
    assert told.states(NOW + 99) == [State.COOLING] * 4
    pool.process_due(NOW + 100)
    assert [change for change, _ in told.told()] == [Change.READY]
    pool.quarantine(held[0], None, False, NOW + 100, OPERATOR)
    pool.restore(held[1], NOW + 100, OPERATOR)
    assert told.told() == [(Change.QUARANTINED, held[0].id), (Change.RESTORED, held[1].id)]
    counters = pool.counters
    assert (counters.cooled, counters.quarantines, counters.restored, counters.imported) == (1, 1, 1, 4)


def test_a_longer_cooldown_of_a_secret_is_no_event_and_none_is_made_shorter() -> None:
    """Whichever seat's holder says so; a seat that is held meanwhile waits for the longest."""
    told = Told(3)
    pool, (one, two, three) = told.pool, [told.acquire() for _ in range(3)]
    pool.unblock(one, one.lease, NOW, LIMITED)
    told.events.clear()
    pool.unblock(two, two.lease, NOW, Report(Outcome.RATE_LIMITED, 10.0))
    assert two.release_deadline == NOW + 100
    pool.unblock(three, three.lease, NOW + 1, Report(Outcome.RATE_LIMITED, 200.0))
    assert [seat.release_deadline for seat in told.seats] == [NOW + 201] * 3
    assert [change for change, _ in told.told()] == [Change.UNBLOCKED] * 2


def test_a_rest_is_a_seats_own() -> None:
    """It ends when it ends, and is an event and a cooldown of that seat; the others stay available."""
    told = Told(3, rest_seconds=30.0)
    key = told.acquire()
    told.events.clear()
    told.pool.unblock(key, None, NOW)
    assert told.states() == [State.COOLING if seat is key else State.AVAILABLE for seat in told.seats]
    told.pool.process_due(NOW + 30)
    assert told.told() == [(change, key.id) for change in (Change.UNBLOCKED, Change.COOLED, Change.READY)]


def test_the_guard_counts_secrets() -> None:
    """Of two secrets, one may be quarantined, however many seats it has; and a secret without a free one is to come."""
    told = Told(10, max_quarantined_percent=50.0)
    pool = told.pool
    pool.import_key(NewKey("sk-live-5678-efgh"), NOW, HOLDER)
    held = [told.acquire() for _ in range(11)]
    seats = [key for key in held if key.group is not None]
    (sole,) = (key for key in held if key.group is None)
    assert pool.unblock(seats[0], seats[0].lease, NOW, Report(Outcome.INVALID)).guarded is False
    assert (pool.quarantined, pool.quarantined_secrets, pool.secrets) == (1, 1, 2)
    assert pool.unblock(sole, sole.lease, NOW, Report(Outcome.INVALID)).guarded is True
    for seat in seats[1:]:
        assert seat.quarantine_pending
        pool.unblock(seat, None, NOW)
    assert (pool.quarantined, pool.quarantined_secrets) == (10, 1)


def test_text_and_name_find_the_next_seat_when_the_first_has_expired_although_no_timer_fired() -> None:
    """And no text of seats that have all expired is found, nor is its name taken."""
    told = Told(3, keepalive_seconds=300.0)
    pool, text = told.pool, told.first.text
    pool.keepalive(told.seats[1], NOW + 10)
    assert pool.find(text, NOW + 300) is told.seats[1]
    assert pool.find_name("one", NOW + 300) is told.seats[1]
    assert pool.find_hint(told.first.hint, NOW + 300) is told.seats[1]
    with pytest.raises(UnknownKey):
        pool.find(text, NOW + 310)
    again = pool.import_key(NewKey("another", "one", seats=2), NOW + 310, HOLDER)
    assert pool.find_name("one", NOW + 310) is again
    pool.process_due(NOW + 310)
    pool.check()


def test_a_seat_that_is_held_goes_when_its_lease_ends_although_no_timer_fired() -> None:
    """It is in no page any more, and unknown to every call."""
    told = Told(2)
    key, other = told.acquire(), told.acquire()
    told.pool.update(key, KeyPatch(seats=1), NOW, OPERATOR)
    assert told.pool.number_of(other) == (2, 2)
    page = told.pool.page(PageQuery(), NOW + 60)
    assert [row.id for row in page.keys] == [max(key.id, other.id)]
    with pytest.raises(UnknownKey):
        told.pool.find_id(min(key.id, other.id), NOW + 60)
    told.pool.check()


def test_more_seats_need_room_and_are_where_the_others_are() -> None:
    """A refusal changes nothing, the name neither."""
    told = Told(2, max_keys=4)
    pool = told.pool
    with pytest.raises(PoolFull):
        pool.update(told.first, KeyPatch("two", seats=5), NOW, OPERATOR)
    assert (told.first.details.name, pool.total) == ("one", 2)
    key = told.acquire()
    pool.unblock(key, key.lease, NOW, LIMITED)
    pool.update(key, KeyPatch(seats=3), NOW + 5, OPERATOR)
    pool.quarantine(key, None, False, NOW + 6, OPERATOR)
    pool.update(key, KeyPatch(seats=4), NOW + 7, OPERATOR)
    told.seats = pool.seats_of(key)
    assert told.states() == [State.QUARANTINED] * 4
    assert pool.counters.imported == 4


def test_a_seat_is_named_by_the_text_beside_its_lease_number() -> None:
    """Or it isn't named at all, unless there is only one left."""
    told = Told(2)
    pool, key, other = told.pool, told.acquire(), told.acquire()
    assert pool.seat_of(told.first, other.lease, NOW) is other
    with pytest.raises(ManySeats):
        pool.seat_of(told.first, None, NOW)
    with pytest.raises(StaleLease):
        pool.seat_of(told.first, 99, NOW)
    pool.delete_seat(key, OPERATOR)
    assert pool.seat_of(pool.find(other.text, NOW), None, NOW) is other


def test_the_rows_of_a_secret_restore_its_seats_at_any_moment() -> None:
    """Also while one of them is held beyond the end of what the others wait for."""
    told = Told(5)
    pool, held = told.pool, [told.acquire(), told.acquire()]
    pool.unblock(held[0], held[0].lease, NOW, LIMITED)
    pool.update(held[0], KeyPatch(seats=4), NOW, OPERATOR)
    rows = [row_of(seat) for seat in pool.seats_of(held[0])]
    again = make_pool(keepalive_seconds=None)
    again.last_id, again.last_lease = pool.last_id, pool.last_lease
    for row in rows:
        again.load(key_of(row))
    again.check()
    key = again.find_id(held[1].id, NOW)
    again.unblock(key, key.lease, NOW + 1)
    assert key.release_deadline == NOW + 100
    assert [again.number_of(seat)[1] for seat in again.seats_of(key)] == [4] * 4
    assert len({id(seat.text) for seat in again.seats_of(key)}) == 1


@pytest.mark.parametrize("wanted", [(), (0, 1), (101, 1), (2, -1), "2"])
def test_a_row_whose_seats_can_not_be_is_refused(wanted: Any) -> None:
    """With an error that names its key, not its text."""
    told = Told(2)
    row = row_of(told.first)
    more = msgspec.msgpack.decode(row[-1] or b"")
    more[-1] = wanted
    with pytest.raises(ValueError, match="id:1"):
        key_of((*row[:-1], msgspec.msgpack.encode(more)))


def test_a_key_with_the_text_of_another_that_is_no_seat_beside_it_is_refused() -> None:
    """As files contained no text twice before there were seats."""
    told = Told(2)
    pool = Pool(told.pool.rules, new_text=lambda: "", random=lambda: 0.0)
    pool.last_id = 2
    sole = key_of(row_of(told.seats[0]))
    sole.group = None
    pool.load(sole)
    with pytest.raises(ValueError, match="id:2"):
        pool.load(key_of(row_of(told.seats[1])))


def test_acquire_draws_from_all_available_seats_alike() -> None:
    """Each seat of two secrets and a sole key as often, within what happens by chance once in 10^10 runs."""
    source = random.Random(5)
    pool = make_pool(keepalive_seconds=None, random=source.random)
    for secret, seats in (("first", 5), ("second", 2), ("third", 1)):
        pool.import_key(NewKey(secret, seats=seats), NOW, HOLDER)
    draws, hits = 8000, [0] * 9
    for _ in range(draws):
        key = pool.acquire(NOW, None)
        assert key is not None
        hits[key.id] += 1
        pool.unblock(key, key.lease, NOW)
    assert math.fsum(hits) == draws
    assert min(chance_of(count, draws, 1 / 8) for count in hits[1:]) > 1e-10


def test_a_text_whose_seats_have_all_expired_may_be_imported_again_although_no_timer_fired() -> None:
    """They are purged as they are looked for, all of them."""
    told = Told(3, keepalive_seconds=300.0)
    pool, text = told.pool, told.first.text
    with pytest.raises(UnknownKey):
        pool.find(text, NOW + 300)
    again = pool.import_key(NewKey(text, seats=2), NOW + 300, HOLDER)
    assert (pool.find(text, NOW + 300), pool.total) == (again, 2)
    pool.check()


def test_a_lease_that_is_over_is_not_ended_again_by_its_number_although_no_timer_fired() -> None:
    """Named by the text beside it, as by the handle."""
    told = Told(2)
    key = told.acquire()
    told.events.clear()
    found = told.pool.seat_of(told.pool.find(key.text, NOW + 60), key.lease, NOW + 60)
    assert (found, told.pool.unblock(found, key.lease, NOW + 60).changed) == (key, False)
    assert told.told() == [(Change.RELEASED, key.id)]


@pytest.mark.parametrize("suspended", [False, True])
def test_a_seat_that_has_expired_contradicts_no_other_although_no_timer_fired(suspended: bool) -> None:
    """It is purged when the others move, or moves with them while expiry is suspended: so a restart finds no damage."""
    told = Told(2, keepalive_seconds=300.0)
    pool, changed = told.pool, {seat.id: seat for seat in told.seats}
    pool.on_change = lambda _change, key, _owner, _origin: changed.update({key.id: key})
    pool.keepalive(told.seats[1], NOW + 200)
    if suspended:
        pool.suspend_expiry(NOW + 250)
    pool.quarantine(told.seats[1], "leaked", False, NOW + 300, OPERATOR)
    again = make_pool(keepalive_seconds=300.0)
    again.last_id = pool.last_id
    for seat in changed.values():
        if seat.expires_deadline != DEAD:
            again.load(key_of(row_of(seat)))
    for each in (again, pool):
        each.check()
        assert each.quarantined == 1 + suspended


def test_the_text_of_a_lease_whose_seat_has_expired_may_be_given_to_another_key_although_no_timer_fired() -> (
    None
):
    """While another seat, which nobody held, lives on."""
    told = Told(2, keepalive_seconds=300.0)
    pool, text, (one, two) = told.pool, told.first.text, told.seats
    other = pool.import_key(NewKey("another"), NOW + 200, HOLDER)
    pool.keepalive(one, NOW + 200)
    while two.lease == 0:
        pool.acquire(NOW + 290, None)
    pool.unblock(one, None, NOW + 290)
    pool.replace(one, "a new text", NOW + 290, OPERATOR)
    assert two.details.former == text
    pool.replace(other, text, NOW + 300, OPERATOR)
    assert pool.find(text, NOW + 300) is other
    pool.check()


def test_a_hint_finds_the_next_seat_when_the_first_has_to_go_although_no_timer_fired() -> None:
    """As text and name do."""
    told = Told(2, max_block_seconds=600.0)
    pool, (one, two) = told.pool, told.seats
    assert (pool.acquire(NOW, None, 60.0), pool.acquire(NOW, None, 600.0)) == (one, two)
    pool.update(two, KeyPatch(seats=1), NOW, OPERATOR)
    assert pool.find_hint(two.hint, NOW + 60) is two


def test_seats_whose_leases_are_over_are_free_when_their_number_changes_although_no_timer_fired() -> None:
    """So the highest one goes first; and the room of one that has gone isn't given away twice."""
    told = Told(3, max_keys=4, max_block_seconds=600.0)
    pool, (one, two, three) = told.pool, told.seats
    assert [pool.acquire(NOW, None, block) for block in (600.0, 60.0, 60.0)] == [one, three, two]
    pool.generate(NOW)
    pool.update(one, KeyPatch(seats=2), NOW, OPERATOR)
    with pytest.raises(PoolFull):
        pool.update(one, KeyPatch(seats=4), NOW + 60, OPERATOR)
    assert (pool.total, len(pool.seats_of(one))) == (3, 2)


def test_a_seat_whose_lease_is_over_goes_first_if_it_is_the_last_although_no_timer_fired() -> None:
    """As those go at once that are free, the highest number first."""
    told = Told(2)
    pool, (one, two) = told.pool, told.seats
    assert (pool.acquire(NOW, None), pool.acquire(NOW, None)) == (one, two)
    assert pool.update(pool.find_id(one.id, NOW + 60), KeyPatch(seats=1), NOW + 60, OPERATOR) is one
    assert two.expires_deadline == DEAD
