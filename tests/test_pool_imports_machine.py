"""Keys from elsewhere, in every order Hypothesis can think of, amid all that may happen to keys otherwise.

The machine is that of test_pool_leases_machine.py, with its model and all its steps. To them come imports, changes of
names, labels and data, replacements of texts, look-ups by everything that may be written for a key, lists by name, and
changes of the pool's rules, by which keys may never expire. Texts and names are few, so that they collide.
"""

from __future__ import annotations

import math
from typing import Literal

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test
from test_pool_leases_machine import (
    MAX_KEYS,
    OPERATOR,
    RULES,
    SETTINGS,
    WHICH,
    LeasesMachine,
    Plain,
    PlainKey,
)

from keypool.core.answers import KeyPatch, NewKey
from keypool.core.errors import NameTaken, SecretExists, UnknownKey
from keypool.core.events import Change
from keypool.core.keys import Key, State, hint
from keypool.core.keyset import PageQuery
from keypool.core.pace import Pace
from keypool.core.rules import PoolRules

# Texts that are imported, or replace others. Some hints are those of several; some texts are those of generated keys.
SECRETS = (
    "sk-live-one-abcd", "sk-live-two-abcd", "sk-live-six-abcd", "short", "sk-45678",
    *(f"{number:020}" for number in range(1, 6)),  # those that are generated
)  # fmt: skip
NAMES = (None, "", "a", "ab", "ac", "b")
LABELS: tuple[dict[str, str] | None, ...] = (None, {}, {"region": "eu"})
DATA = (None, b"{}", b'{"user":"x"}')
ALL_RULES = (
    *RULES,
    PoolRules(keepalive_seconds=None),
    PoolRules(keepalive_seconds=None, error_threshold=None, rest_seconds=1.0, max_block_seconds=300.0),
)

secrets = st.sampled_from(SECRETS)
names = st.sampled_from(NAMES)
labels = st.sampled_from(LABELS)
data = st.sampled_from(DATA)
paces: st.SearchStrategy[Pace | Literal[False] | None] = st.sampled_from(
    [None, None, False, Pace(1, 100.0, 3), Pace(4, 10.0)]
)
which_key = st.sampled_from(WHICH)


class PlainImports(Plain):
    """The contract's section 5, as far as it is about the keys of one pool."""

    def with_name(self, name: str | None) -> PlainKey | None:
        """The key that has this name."""
        return next((key for key in self.keys.values() if name and key.name == name), None)

    def imported(self, id: int, item: NewKey) -> None:
        """A new key, whose text names no other one any more."""
        self._take_text(item.secret)
        key = PlainKey(id, item.secret, self.alive_until(), imported=True)
        self.keys[id] = key
        self.update(key, KeyPatch(item.name, item.labels, item.data, item.pace))
        self.events[id].append((Change.IMPORTED, None, OPERATOR))

    def update(self, key: PlainKey, patch: KeyPatch) -> None:
        """What is given, where empty is none."""
        key.name = key.name if patch.name is None else patch.name or None
        key.labels = key.labels if patch.labels is None else patch.labels or None
        key.data = key.data if patch.data is None else (None if patch.data == b"{}" else patch.data)
        key.pace = key.pace if patch.pace is None else patch.pace or None

    def replace(self, key: PlainKey, secret: str) -> None:
        """Another text; a lease goes on under the one that it was given with."""
        if secret != key.text:
            first = key.former or key.text
            key.former = None
            self._take_text(secret)
            if key.state is State.BLOCKED and first != secret:
                key.former = first
            key.text, key.imported, key.used_until = secret, True, 0.0
        self.restore(key)

    def _take_text(self, text: str) -> None:
        for key in self.keys.values():
            if key.former == text:
                key.former = None


class ImportsMachine(LeasesMachine):
    """See the module."""

    scan_limit = 100
    plain: PlainImports

    def _new_plain(self, rules: PoolRules) -> Plain:
        return PlainImports(rules)

    def __init__(self) -> None:
        super().__init__()
        serial = self.new_text
        self.new_text = lambda: next(
            text for text in iter(serial, "") if self.pool._imported.get(text) is None
        )

    def _known(self, secret: str) -> Key | None:
        """The key that a text names, as a call finds it."""
        try:
            found = self.pool.find(secret, self.now)
        except UnknownKey:
            found = None
        plain = self.plain.with_text(secret)
        assert (found and found.id) == (plain and plain.id), f"by {secret}"
        return found

    @rule(secret=secrets, name=names, labels=labels, data=data, update=st.booleans())
    def import_a_key(
        self, secret: str, name: str | None, labels: dict[str, str] | None, data: bytes | None, update: bool
    ) -> None:
        """As long as there are few; or change the one that has the secret."""
        item = NewKey(secret, name, labels, data)
        key = self._known(secret)
        if key is not None and key.text == secret:
            if update:
                self._update(key, self.plain.keys[key.id], KeyPatch(name, labels, data))
            return
        if len(self.plain.keys) >= MAX_KEYS:
            return
        if self.plain.with_name(name) is not None:
            with pytest.raises(NameTaken):
                self.pool.import_key(item, self.now, OPERATOR)
            return
        key = self.pool.import_key(item, self.now, OPERATOR)
        self.plain.imported(key.id, item)
        self.subject = key.id
        self._expect_same(key, self.plain.keys[key.id])

    @rule(which=which_key, name=names, labels=labels, data=data, pace=paces)
    def update(
        self,
        which: int,
        name: str | None,
        labels: dict[str, str] | None,
        data: bytes | None,
        pace: Pace | Literal[False] | None,
    ) -> None:
        """Generated keys as well."""
        found = self._find(which, by_text=True)
        if found is not None:
            self._update(*found, KeyPatch(name, labels, data, pace))

    def _update(self, key: Key, plain: PlainKey, patch: KeyPatch) -> None:
        if self.plain.with_name(patch.name) not in (None, plain):
            with pytest.raises(NameTaken):
                self.pool.update(key, patch, self.now, OPERATOR)
        else:
            self.pool.update(key, patch, self.now, OPERATOR)
            self.plain.update(plain, patch)
        self._expect_same(key, plain)

    @rule(which=which_key, secret=secrets, held=st.booleans())
    def replace(self, which: int, secret: str, held: bool) -> None:
        """In any state, also while somebody holds it, by texts that others have or had."""
        if held:
            self.acquire(chance=which / len(WHICH), owner="ann", block="default", attempt=None)
            which = 0
        found = self._find(which, by_text=True)
        if found is None:
            return
        key, plain = found
        other = self._known(secret)
        if other is not None and other is not key and other.text == secret:
            with pytest.raises(SecretExists):
                self.pool.replace(key, secret, self.now, OPERATOR)
        else:
            self.pool.replace(key, secret, self.now, OPERATOR)
            self.plain.replace(plain, secret)
        self._expect_same(key, plain)

    @rule()
    def look_up_all(self) -> None:
        """By every text, name and hint that any key may have."""
        self._settle_a_crowd()
        for secret in SECRETS:
            self._known(secret)
        for name in filter(None, NAMES):
            plain = self.plain.with_name(name)
            assert self._id_by(self.pool.find_name, name) == (plain and plain.id)
        for shown in {hint(secret) for secret in SECRETS}:
            ids = [key.id for key in self.plain.keys.values() if hint(key.text) == shown]
            assert self._id_by(self.pool.find_hint, shown) == min(ids, default=None), shown

    def _id_by(self, find: object, text: str) -> int | None:
        try:
            found: Key = find(text, self.now)  # type: ignore[operator]
        except UnknownKey:
            return None
        return found.id

    @rule(
        beginning=st.sampled_from(["a", "ab", "b", "c"]),
        limit=st.integers(1, 3),
        state=st.sampled_from([None, *State]),
    )
    def read_a_list_by_name(self, beginning: str, limit: int, state: State | None) -> None:
        """Page by page, to its end."""
        self._settle_a_crowd()
        query, found = PageQuery(state, None, "id", limit, name=beginning), []
        while True:
            page = self.pool.page(query, self.now)
            found += [key.details.name for key in page.keys]
            if page.next is None:
                break
            query.after = page.next
        listed = (key.name for key in self.plain.in_state(state) if key.name)
        assert found == sorted(name for name in listed if name.startswith(beginning))

    @rule(rules=st.sampled_from(ALL_RULES))
    def the_rules_change(self, rules: PoolRules) -> None:
        """For deadlines that are set from then on: those that are due are met as the rules were."""
        self._settle()
        self.pool.rules = self.plain.rules = rules

    @rule(which=which_key)
    def the_holder_names_the_key_as_it_was_given(self, which: int) -> None:
        """By the text of its lease, whatever the key's is by now."""
        held = [key for key in self.plain.keys.values() if key.state is State.BLOCKED]
        if held:
            plain = held[which % len(held)]
            assert self.pool.find(plain.former or plain.text, self.now).id == plain.id

    def teardown(self) -> None:
        """All that never expires is still there in the end."""
        for key in list(self.plain.keys.values()):
            if key.expires == math.inf:
                assert self.pool.find_id(key.id, self.now + 1e9).expires_deadline == math.inf
        super().teardown()


@pytest.mark.parametrize("examples", [40, pytest.param(300, marks=pytest.mark.thorough)])
def test_imported_keys_are_what_the_plain_model_has_whatever_happens_in_whatever_order(examples: int) -> None:
    """Texts, names, hints, details, former texts, never expiring, restarts and changing rules."""
    run_state_machine_as_test(ImportsMachine, settings=settings(SETTINGS, max_examples=examples))
