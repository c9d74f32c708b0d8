"""The self-check of a pool: every count, place and order derived again from the keys themselves.

It is for tests; after a restore it checks what a file may have wrong. It reads the whole set.
"""

from __future__ import annotations

from collections.abc import Iterator

from keypool.core.details import without_former
from keypool.core.keys import DEAD, NEVER, NO_DETAILS, Group, Key, State
from keypool.core.keyset import KeySet

_AVAILABLE, _BLOCKED, _COOLING, _QUARANTINED = State
_SLICE = 1000  # keys


class SelfCheck(KeySet):
    """See the module."""

    def check(self) -> None:
        """Derive every count, slot and order from the keys and compare. O(n).

        Raises ValueError, which names the wrong key and the contradiction.
        """
        for _ in self.check_in_slices(_SLICE):
            pass

    def check_in_slices(self, size: int) -> Iterator[None]:
        """Do what `check` does, yielding after each `size` keys. The pool must not change meanwhile."""
        yield from self._owners.settle()
        total = last = attempts = expiring = 0
        available = blocked = cooling = quarantined = 0
        for key in self._by_id.walk(None):
            if key.id <= last:
                raise ValueError("the walk by id is out of order or returns a key twice")
            last = key.id
            self._check_key(key)
            total += 1
            state = key.state
            available += state is _AVAILABLE
            blocked += state is _BLOCKED
            cooling += state is _COOLING
            quarantined += state is _QUARANTINED
            attempts += key.attempt is not None
            expiring += key.expires_deadline != NEVER
            if total % size == 0:
                yield
        found = (total, available, blocked, cooling, quarantined)
        expected = (
            self._total, len(self._available), self.blocked, self._cooling, len(self._quarantined),
        )  # fmt: skip
        if found != expected:
            raise ValueError(f"by id and by state there are {found} keys instead of {expected}")
        yield from self._check_texts(size)
        self._by_attempt.check(attempts)
        self._owners.check(blocked)
        yield from self._by_expiry.check_in_slices(expiring, size)
        yield from self._by_release.check_in_slices(blocked + cooling, size)

    def check_loaded_in_slices(self, size: int) -> Iterator[None]:
        """Check what keys from a file may contradict, as `load` has put each where its own fields say. O(n).

        A third of the cost of `check`, which it leaves to find a contradiction and to name the key.
        """
        yield from self._owners.settle()
        try:
            yield from self._check_texts(size, check_fields=True)
        except ValueError:
            yield from self.check_in_slices(size)
            raise

    def _check_texts(self, size: int, *, check_fields: bool = False) -> Iterator[None]:
        """Raise ValueError unless each text, hint and name leads to one key. Yields after each `size` keys."""
        imported = formers = named = further = 0
        for number, key in enumerate(self._by_id.walk(None), 1):
            details, group = key.details, key.group
            if check_fields:
                if group is None and details.former is None:
                    self._check_fields(key)
                else:
                    self._check_key(key)
            first = True
            if group is not None:
                first = group.ids[0] == key.id
                further += not first
            if details is not NO_DETAILS:
                imported += first and details.imported
                formers += details.former is not None and self._imported.get(details.former) is key
                named += first and details.name is not None
            if number % size == 0:
                yield
        by_text = further + len(self._by_text) + len(self._imported) - formers
        if by_text != self._total:
            raise ValueError(f"by text there are {by_text} keys instead of {self._total}")
        if further != self._further:
            raise ValueError(f"{further} keys are further seats of their secrets, not {self._further}")
        indexed = (len(self._imported), len(self._by_hint), len(self._by_name))
        if indexed != (imported + formers, imported, named):
            raise ValueError(
                f"{indexed} texts, hints and names lead to {imported} imported keys, {formers} of them with a former "
                f"text, and {named} keys with a name"
            )

    def _check_fields(self, key: Key) -> None:
        """Raise ValueError for a key that contradicts itself, or the numbers of the pool."""
        if not 0 < key.id <= self.last_id or not 0 <= key.lease <= self.last_lease:
            last = (self.last_id, self.last_lease)
            raise ValueError(f"{key!r}: id or lease {key.lease} is beyond the last given, {last}")
        if key.state is _BLOCKED:
            if key.lease == 0:
                raise ValueError(f"{key!r} is blocked without a lease")
        elif (
            key.owner is not None
            or key.attempt is not None
            or key.client is not None
            or key.holder is not None
            or key.details.former is not None
            or key.extended
            or key.quarantine_pending
        ):
            raise ValueError(f"{key!r} is {key.state} but has what only a blocked key has")

    def _check_key(self, key: Key) -> None:
        """Raise ValueError unless the key agrees with itself, and stands where it says in each order."""
        if key.group is None:
            self._check_details(key, key)
        else:
            self._check_seat(key, key.group)
        expires = key.expires_deadline
        if expires == DEAD:
            raise ValueError(f"{key!r} was purged but is still found by id")
        if expires != NEVER:
            self._by_expiry.check_key(key, key.expiry_bucket)
        elif key.expiry_bucket is not None:
            raise ValueError(f"{key!r} never expires but has a place in the order by expiry")
        self._check_place(key)
        self._check_fields(key)
        if key.state is not _BLOCKED:
            return
        if key.holder is not None and (key.owner, key.client) != (key.holder.owner, key.holder.client):
            raise ValueError(f"{key!r} stands among the keys of somebody else")
        if key.attempt is not None and key not in self._by_attempt.get(key.attempt):
            raise ValueError(f"{key!r} is not found by its attempt")

    def _check_details(self, key: Key, first: Key) -> None:
        """Raise ValueError unless the key, the `first` of its seats, is found by its texts, its hint and its name."""
        details = key.details
        if (self._imported if details.imported else self._by_text).get(key.text) is not first:
            raise ValueError(f"{key!r} is not found by its text")
        if details is NO_DETAILS:
            return
        if details.imported and not self._by_hint.holds(first):
            raise ValueError(f"{key!r} is not found by its hint")
        if details.former is not None:
            found = self._imported.get(details.former)
            if found is not key and (found is None or key.group is None or found.group is not key.group):
                raise ValueError(f"{key!r} is not found by the text of its lease")
        if details.name is not None and self._by_name.get(details.name) is not first:
            raise ValueError(f"{key!r} is not found by its name")

    def _check_seat(self, key: Key, group: Group) -> None:
        """Raise ValueError unless the key is one of the seats of its group, and is where they are."""
        first = self._by_id.get(group.ids[0])
        if first is None or key.id not in group.ids or first.group is not group:
            raise ValueError(f"{key!r} is not among its seats")
        self._check_details(key, first)
        if key.text != first.text or without_former(key.details) != without_former(first.details):
            raise ValueError(f"{key!r} has another text or other details than the seat {first!r}")
        if key.history != first.history:
            raise ValueError(f"{key!r} has another history than the seat {first!r}")
        if key.paced_until:
            raise ValueError(f"{key!r} has a pace of its own beside that of its secret")
        if group.surplus != len(group.ids) - group.wanted or (
            group.surplus > 0 and key.state is not _BLOCKED
        ):
            raise ValueError(f"{key!r} is {key.state}, although there are too many seats")
        if _leaves(key) != _leaves(first):
            raise ValueError(f"{key!r} and the seat {first!r} are not both quarantined")
        if key is first:
            states = [seat.state for seat in map(self._by_id.get, group.ids) if seat is not None]
            if states.count(_QUARANTINED) != group.quarantined:
                raise ValueError(f"{key!r} has {group.quarantined} quarantined seats, by its own count")

    def _check_place(self, key: Key) -> None:
        """Raise ValueError unless the key stands where keys of its state stand, and nowhere else."""
        state, release = key.state, key.release_deadline
        if state is _BLOCKED or state is _COOLING:
            if release is None:
                raise ValueError(f"{key!r} is {state} but has no release_deadline")
            self._by_release.check_key(key, key.release_bucket)
        elif release is not None or key.release_bucket is not None:
            raise ValueError(f"{key!r} is {state} but has a release_deadline or a place in its order")
        slot, available = key.slot, self._available
        in_slot = 0 <= slot < len(available) and available[slot] is key
        if in_slot is not (state is _AVAILABLE) or (not in_slot and slot != -1):
            raise ValueError(
                f"{key!r} is {state}, which contradicts its slot {key.slot} of the available ones"
            )
        quarantined = self._quarantined  # mostly none, and a search in it costs more than to ask for that
        if (state is _QUARANTINED) is not (len(quarantined) > 0 and key.id in quarantined):
            raise ValueError(f"{key!r} is {state}, which contradicts the order of quarantined keys")


def _leaves(key: Key) -> bool:
    return key.state is _QUARANTINED or key.quarantine_pending
