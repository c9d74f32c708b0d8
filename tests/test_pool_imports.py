"""The pool's rules of keys from elsewhere, one by one: their texts, names and hints, and keys that never expire.

test_pool_imports_machine.py has them in every order.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from engine_support import BLOCK, KEEPALIVE, START, make_pool

from keypool.core.answers import KeyPatch, NewKey
from keypool.core.cursor import ListQuery, decode, encode, order_of, page_query
from keypool.core.details import IMPORTED
from keypool.core.errors import BadRequest, KeysWouldExpire, NameTaken, PoolFull, SecretExists, UnknownKey
from keypool.core.events import By, Change, Origin
from keypool.core.keys import NEVER, NO_DETAILS, Details, Key, State
from keypool.core.keyset import PageQuery
from keypool.core.outcomes import NO_HISTORY, Outcome, Report
from keypool.core.pool import PAGE_SCAN_LIMIT, Pool
from keypool.core.rules import PoolRules

NOW = START
OPERATOR = Origin(By.OPERATOR, "ops")
LONG = "sk-live-{:012}"
"""A text with a common beginning, whose hint shows the last four digits."""


def lasting(**rules: Any) -> Pool:
    """A pool whose keys never expire."""
    return make_pool(keepalive_seconds=None, **rules)


def imported(pool: Pool, secret: str, now: float = NOW, **details: Any) -> Key:
    """A key from elsewhere."""
    return pool.import_key(NewKey(secret, **details), now, OPERATOR)


def held(pool: Pool, now: float = NOW, **asked: Any) -> Key:
    """A key that was just acquired."""
    key = pool.acquire(now, "ann", **asked)
    assert key is not None
    return key


def no_hint(pool: Pool, hint: str) -> bool:
    """Whether no live key has this hint."""
    try:
        pool.find_hint(hint, NOW)
    except UnknownKey:
        return True
    return False


def unknown(pool: Pool, text: str, now: float = NOW) -> bool:
    """Whether no live key has this text."""
    try:
        pool.find(text, now)
    except UnknownKey:
        return True
    return False


# -------------------------------------------------------------------------------------- keys from elsewhere


def test_an_imported_key_is_available_at_once_and_found_by_text_id_name_and_hint() -> None:
    """It is counted as imported, not as generated, and its event says so."""
    told: list[Change] = []
    pool = lasting(on_change=lambda change, *_: told.append(change))
    key = imported(pool, "sk-live-4711-abcd", name="acct-17", labels={"region": "eu"}, data=b'{"user":"x"}')
    assert key.details == Details(True, "acct-17", {"region": "eu"}, b'{"user":"x"}')
    found = [
        pool.find("sk-live-4711-abcd", NOW),
        pool.find_id(key.id, NOW),
        pool.find_name("acct-17", NOW),
        pool.find_hint("sk-l…abcd", NOW),
        pool.acquire(NOW, None),
    ]
    assert found == [key] * 5
    assert (pool.counters.imported, pool.counters.generated) == (1, 0)
    assert told == [Change.IMPORTED, Change.ACQUIRED]
    pool.check()


def test_a_pool_that_purges_takes_keys_only_from_who_knows_it() -> None:
    """With `expire` they expire as generated ones do; in a pool that keeps keys it makes no difference."""
    purging, keeping = make_pool(), lasting()
    with pytest.raises(KeysWouldExpire, match="300 s"):
        purging.require_lasting(expire=False)
    purging.require_lasting(expire=True)
    keeping.require_lasting(expire=False)
    assert imported(purging, "elsewhere").expires_deadline == NOW + KEEPALIVE
    assert imported(keeping, "elsewhere").expires_deadline == NEVER


def test_a_full_pool_takes_no_key_and_neither_does_room_that_others_need() -> None:
    """`max_keys` counts generated and imported keys alike."""
    pool = lasting(max_keys=3)
    pool.generate(NOW)
    with pytest.raises(PoolFull):
        pool.import_key(NewKey("one"), NOW, OPERATOR, reserved=2)
    imported(pool, "one")
    imported(pool, "two")
    with pytest.raises(PoolFull):
        imported(pool, "three")
    assert (pool.total, pool.last_id) == (3, 3)
    pool.check()


def test_the_same_secret_may_stand_in_two_pools() -> None:
    """A pool is a scope: the key of one is not that of the other."""
    one, other = lasting(), lasting()
    assert imported(one, "shared") is not imported(other, "shared")


def test_keys_about_which_nobody_wrote_anything_share_their_details() -> None:
    """A million imported keys need one object; what was removed leaves nothing behind."""
    pool = lasting()
    key, other = imported(pool, "one", name="", labels={}, data=b"{}"), imported(pool, "two", name="acct-2")
    assert key.details is IMPORTED
    pool.update(other, KeyPatch(name=""), NOW, OPERATOR)
    assert other.details is IMPORTED
    made = pool.generate(NOW)
    pool.update(made, KeyPatch(labels={"a": "b"}), NOW, OPERATOR)
    pool.update(made, KeyPatch(labels={}), NOW, OPERATOR)
    assert made.details is NO_DETAILS
    pool.check()


@pytest.mark.parametrize("text", ["x", "é" * 2048, "\n", "id:1", "h:1.1.abc", "a" * 4096, "0" * 20, "…"])
def test_any_text_is_a_secret(text: str) -> None:
    """It needn't look like a generated one, and isn't listed by prefix."""
    pool = lasting()
    made = pool.generate(NOW)
    key = imported(pool, text)
    assert pool.find(text, NOW) is key
    assert pool.page(PageQuery(prefix="0"), NOW).keys == [made]
    pool.check()
    pool.delete(key)
    assert unknown(pool, text)
    pool.check()


# ------------------------------------------------------------------------------------------------------- names


def test_a_name_is_unique_in_its_pool_and_free_again_when_its_key_is_gone() -> None:
    """Neither import nor update takes another key's name; to keep one's own is no conflict."""
    pool = lasting()
    first, second = imported(pool, "one", name="acct"), imported(pool, "two")
    with pytest.raises(NameTaken, match=f"id:{first.id} "):
        imported(pool, "three", name="acct")
    with pytest.raises(NameTaken):
        pool.update(second, KeyPatch(name="acct"), NOW, OPERATOR)
    assert (second.details.name, pool.total) == (None, 2)
    pool.update(first, KeyPatch(name="acct", labels={"a": "b"}), NOW, OPERATOR)
    pool.delete(first)
    pool.update(second, KeyPatch(name="acct"), NOW, OPERATOR)
    assert pool.find_name("acct", NOW) is second
    pool.check()


def test_a_name_is_free_when_its_key_has_expired_whether_or_not_a_timer_has_fired() -> None:
    """A deadline is the truth."""
    pool = make_pool()
    imported(pool, "one", name="acct")
    later = imported(pool, "two", NOW + KEEPALIVE, name="acct")
    assert pool.find_name("acct", NOW + KEEPALIVE) is later
    assert pool.counters.expired == 1
    pool.check()


def test_a_name_stays_taken_while_expiry_is_suspended() -> None:
    """The key may yet get a grace; then two would have the name."""
    pool = make_pool()
    imported(pool, "one", name="acct")
    pool.suspend_expiry(NOW)
    with pytest.raises(NameTaken):
        imported(pool, "two", NOW + KEEPALIVE, name="acct")
    pool.check()


def test_an_update_changes_what_it_gives_and_leaves_the_rest() -> None:
    """Generated keys may get a name as well, and stay where lists by prefix find them."""
    pool = make_pool()
    key = pool.generate(NOW)
    pool.update(key, KeyPatch(name="first", data=b'{"a":1}'), NOW, OPERATOR)
    pool.update(key, KeyPatch(labels={"region": "eu"}), NOW, OPERATOR)
    assert key.details == Details(False, "first", {"region": "eu"}, b'{"a":1}')
    pool.update(key, KeyPatch(name="second", data=b"{}"), NOW, OPERATOR)
    assert key.details == Details(False, "second", {"region": "eu"}, None)
    with pytest.raises(UnknownKey):
        pool.find_name("first", NOW)
    assert pool.find_name("second", NOW) is key is pool.find(key.text, NOW)
    assert pool.page(PageQuery(prefix=key.text[:4]), NOW).keys == [key]
    pool.check()


def names_listed(pool: Pool, beginning: str, limit: int, state: State | None = None) -> list[str | None]:
    """The names on all pages, cursors as a client sends them."""
    asked = ListQuery(state=None if state is None else state.value, name=beginning, limit=limit)
    names: list[str | None] = []
    while True:
        query = page_query(asked)
        page = pool.page(query, NOW)
        names += [key.details.name for key in page.keys]
        if page.next is None:
            return names
        asked = msgspec.structs.replace(asked, after=encode(order_of(query), page.next))


@pytest.mark.parametrize("limit", [1, 2, 3, 500])
def test_a_list_by_name_has_the_names_that_begin_so_in_order(limit: int) -> None:
    """Order is that of the code points, whatever the order of ids; page by page as in one."""
    pool = lasting()
    names = [
        "b",
        "acct-2",
        "acct-10",
        "Acct",
        "acct",
        "acct-é",
        "acd",
        "ac",
        "acct-😀",
        'acct"\\',
        "acct-" + "😀" * 58,
    ]
    for number, name in enumerate(names):
        imported(pool, LONG.format(number), name=name)
    imported(pool, "without a name")
    assert names_listed(pool, "acct", limit) == sorted(name for name in names if name.startswith("acct"))
    assert names_listed(pool, "a", limit) == sorted(name for name in names if name.startswith("a"))
    assert names_listed(pool, "c", limit) == []


def test_a_list_by_name_goes_with_a_state() -> None:
    """Others are passed over."""
    pool = lasting()
    for number in range(6):
        imported(pool, str(number), name=f"acct-{number}")
    blocked = sorted(str(held(pool).details.name) for _ in range(3))
    assert names_listed(pool, "acct", 2, State.BLOCKED) == blocked


def test_a_walk_by_name_goes_on_after_a_key_that_is_gone_or_renamed() -> None:
    """The cursor is the name, and needs no key."""
    pool = lasting()
    keys = [imported(pool, str(number), name=f"n{number}") for number in range(5)]
    query = PageQuery(name="n", limit=2)
    query.after = pool.page(query, NOW).next
    pool.delete(keys[1])
    pool.update(keys[0], KeyPatch(name="n9"), NOW, OPERATOR)
    assert [key.details.name for key in pool.page(query, NOW).keys] == ["n2", "n3"]


def test_name_goes_with_no_prefix_and_no_order() -> None:
    """Its order is that of the names."""
    for query in (ListQuery(name="a", prefix="b"), ListQuery(name="a", order="id")):
        with pytest.raises(BadRequest, match="name can't be combined"):
            page_query(query)


@pytest.mark.parametrize(
    "cursor", ["WyJuIl0", "WyJuIiwxXQ", "WyJuIiwiIl0", "WyJuIiwiYSIsImIiXQ", "WyJpIiwiYSJd", "WyJpIiwxXQ"]
)
def test_a_wrong_cursor_of_a_list_by_name_is_refused(cursor: str) -> None:
    """Without a name, with a number, an empty one, two, or that of another order."""
    with pytest.raises(BadRequest, match="after must be"):
        decode(cursor, "name")


# ------------------------------------------------------------------------------------------------------- hints


def test_a_hint_finds_the_first_of_those_that_share_it_by_id() -> None:
    """However they are mixed: imported ones, generated ones, one whose text was replaced."""
    pool = make_pool(
        keepalive_seconds=None, new_text=iter(["abcd0000000000000000", "abcd1000000000000000"]).__next__
    )
    assert no_hint(pool, "abcd…0000")
    first = imported(pool, "abcd-elsewhere-0000")
    made, other = pool.generate(NOW), pool.generate(NOW)
    assert pool.find_hint("abcd…0000", NOW) is first
    pool.delete(first)
    last = imported(pool, "abcd-another-0000")
    assert pool.find_hint("abcd…0000", NOW) is made
    pool.delete(made)
    assert pool.find_hint("abcd…0000", NOW) is other
    pool.delete(other)
    assert pool.find_hint("abcd…0000", NOW) is last
    pool.replace(last, "wxyz-another-0000", NOW, OPERATOR)
    assert pool.find_hint("wxyz…0000", NOW) is last
    assert no_hint(pool, "abcd…0000")


@pytest.mark.parametrize(("text", "hint"), [("a" * 16, "aaaa…aaaa"), ("ab345678", "ab…78"), ("secret", "…")])
def test_short_texts_are_found_by_the_hint_that_they_have(text: str, hint: str) -> None:
    """Which shows little, or nothing."""
    pool = lasting()
    assert pool.find_hint(hint, NOW) if text == hint else imported(pool, text) is pool.find_hint(hint, NOW)


def test_a_hint_passes_over_keys_that_have_expired() -> None:
    """Though they are still in the orders."""
    pool = make_pool()
    imported(pool, "sk-live-1-end-abcd")
    later = imported(pool, "sk-live-2-end-abcd", NOW + 1)
    assert pool.find_hint("sk-l…abcd", NOW + KEEPALIVE) is later


def test_of_a_crowd_with_one_hint_only_so_many_are_examined() -> None:
    """When all of them have expired and may not be purged."""
    pool = make_pool()
    for number in range(PAGE_SCAN_LIMIT + 10):
        imported(pool, f"sk-live-{number}-end-abcd", NOW + number / PAGE_SCAN_LIMIT)
    pool.suspend_expiry(NOW)
    with pytest.raises(UnknownKey):
        pool.find_hint("sk-l…abcd", NOW + KEEPALIVE + 1)
    assert pool.find_hint("sk-l…abcd", NOW + 1).id == 1


# ------------------------------------------------------------------------------------------------- replacement


def test_a_replaced_text_is_unknown_at_once_unless_its_key_is_held() -> None:
    """The key is the same: id, name and data."""
    pool = lasting()
    key = imported(pool, "old", name="acct", data=b'{"a":1}')
    pool.replace(key, "new", NOW, OPERATOR)
    assert unknown(pool, "old")
    assert pool.find("new", NOW) is key is pool.find_name("acct", NOW)
    assert key.details == Details(True, "acct", None, b'{"a":1}')
    assert pool.past_id("old") == key.id
    pool.check()


@pytest.mark.parametrize("ends", ["unblocked", "released", "deleted", "quarantined"])
def test_a_holder_may_name_the_key_by_its_old_text_until_the_lease_ends(ends: str) -> None:
    """Lease and number stay; with the lease the old text is gone, however it ends."""
    pool = lasting()
    key, now = imported(pool, "old"), NOW
    lease = held(pool).lease
    pool.replace(key, "new", NOW, OPERATOR)
    assert (key.state, key.lease) == (State.BLOCKED, lease)
    assert pool.find("old", NOW) is key is pool.find("new", NOW)
    pool.check()
    if ends == "unblocked":
        pool.unblock(pool.find("old", NOW), lease, NOW)
    elif ends == "deleted":
        pool.delete(key)
    elif ends == "quarantined":
        pool.quarantine(key, None, True, NOW, OPERATOR)
    else:
        now += BLOCK  # no timer has fired
    assert unknown(pool, "old", now)
    assert pool.past_id("old") == key.id
    pool.check()


def test_of_several_replacements_in_one_lease_the_holder_keeps_the_text_it_was_given() -> None:
    """Texts between are nobody's."""
    pool = lasting()
    key = imported(pool, "first")
    held(pool)
    pool.replace(key, "second", NOW, OPERATOR)
    pool.replace(key, "third", NOW, OPERATOR)
    assert pool.find("first", NOW) is key is pool.find("third", NOW)
    assert unknown(pool, "second")
    pool.replace(key, "first", NOW, OPERATOR)
    assert (key.text, key.details.former) == ("first", None)
    assert unknown(pool, "third")
    pool.check()
    pool.unblock(key, None, NOW)
    assert pool.find("first", NOW) is key
    pool.check()


@pytest.mark.parametrize("state", ["cooling", "quarantined", "to be quarantined", "failing"])
def test_a_replacement_forgets_what_was_said_about_the_old_text(state: str) -> None:
    """Failures 0, a cooldown or a quarantine is over, one to come is off."""
    told: list[Change] = []
    pool = lasting(on_change=lambda change, *_: told.append(change))
    key = imported(pool, "old")
    lease = held(pool).lease
    outcomes = {"cooling": Outcome.RATE_LIMITED, "quarantined": Outcome.INVALID, "failing": Outcome.ERROR}
    if state == "to be quarantined":
        pool.quarantine(key, "leaked", False, NOW, OPERATOR)
    else:
        pool.unblock(key, lease, NOW, Report(outcomes[state]))
    pool.replace(key, "new", NOW, OPERATOR)
    assert key.history is NO_HISTORY
    assert not key.quarantine_pending
    assert key.state is (State.BLOCKED if state == "to be quarantined" else State.AVAILABLE)
    assert told[-1] is (Change.RESTORED if state in ("cooling", "quarantined") else Change.NOTED)
    assert pool.counters.restored == (state in ("cooling", "quarantined"))
    pool.check()


def test_a_text_that_another_key_has_is_no_replacement() -> None:
    """Nothing has changed; a key's own text is one, and an expired key's is free."""
    pool = make_pool()
    key, made, dying = imported(pool, "old", NOW + 1), pool.generate(NOW + 1), imported(pool, "dying")
    for text, id in ((made.text, made.id), ("dying", dying.id)):
        with pytest.raises(SecretExists, match=f"id:{id} "):
            pool.replace(key, text, NOW + 1, OPERATOR)
    assert pool.find("old", NOW + 1) is key
    pool.replace(key, "old", NOW + 1, OPERATOR)
    assert key.text == "old"
    pool.replace(key, "dying", NOW + KEEPALIVE, OPERATOR)
    assert pool.find("dying", NOW + KEEPALIVE) is key
    pool.check()


def test_a_generated_key_with_another_text_is_one_from_elsewhere() -> None:
    """No list by prefix has it any more, though its holder may still use the old text."""
    pool = make_pool()
    key = pool.generate(NOW)
    old = key.text
    held(pool)
    pool.replace(key, "0000-elsewhere-0000", NOW, OPERATOR)
    assert key.details.imported
    assert pool.find(old, NOW) is key is pool.find_hint("0000…0000", NOW)
    assert pool.page(PageQuery(prefix="0"), NOW).keys == []
    pool.check()


@pytest.mark.parametrize("how", ["import", "replace"])
def test_a_text_that_becomes_a_keys_own_names_no_former_one(how: str) -> None:
    """A text names one key at most. What the other one lost is reported, so that a journal keeps it."""
    told: list[tuple[Change, int]] = []
    pool = lasting(on_change=lambda change, key, *_: told.append((change, key.id)))
    key = imported(pool, "old")
    held(pool)
    other = imported(pool, "other")
    pool.replace(key, "new", NOW, OPERATOR)
    told.clear()
    if how == "import":
        other = imported(pool, "old")
    else:
        pool.replace(other, "old", NOW, OPERATOR)
    assert pool.find("old", NOW) is other
    assert key.details.former is None
    assert (Change.NOTED, key.id) in told
    pool.check()
    pool.unblock(key, None, NOW)
    assert pool.find("old", NOW) is other
    pool.check()


def test_texts_of_long_ago_are_forgotten() -> None:
    """So many only are remembered as a commit may hold."""
    pool = lasting()
    key = imported(pool, "0")
    for number in range(1, 2001):
        pool.replace(key, str(number), NOW, OPERATOR)
    assert pool.past_id("0") is None
    assert pool.past_id("1999") == key.id
    assert len(pool._past) <= 1000


# ---------------------------------------------------------------------------------------------- restored pools


def test_a_restored_pool_finds_all_of_it() -> None:
    """Text, former text, name, hint and client, from the durable fields alone."""
    pool = lasting()
    key = imported(pool, "sk-live-old-abcd", name="acct")
    held(pool, client="worker")
    pool.replace(key, "sk-live-new-abcd", NOW, OPERATOR)
    made = pool.generate(NOW)
    again = lasting()
    again.last_id, again.last_lease = pool.last_id, pool.last_lease
    for old in (key, made):
        fields = Key.__struct_fields__[: Key.__struct_fields__.index("details") + 1]
        again.load(Key(**{name: getattr(old, name) for name in fields}))
    again.check()
    found = again.find("sk-live-old-abcd", NOW)
    assert found is again.find("sk-live-new-abcd", NOW) is again.find_name("acct", NOW)
    assert (found.client, found.id) == ("worker", key.id)
    assert again.find_hint("sk-l…abcd", NOW) is found
    again.unblock(found, None, NOW)
    assert unknown(again, "sk-live-old-abcd")
    assert found.client is None
    again.check()


# ----------------------------------------------------------------------------------------------- never expiring


def test_keys_of_a_pool_without_keepalive_never_expire() -> None:
    """Neither generated nor imported ones; they stand in no order by expiry and have no timer."""
    buckets: list[object] = []
    pool = lasting(on_opened=buckets.append)
    key, made = imported(pool, "elsewhere"), pool.generate(NOW)
    assert buckets == []
    assert pool.next_expiry() is None
    far = NOW + 1e12
    assert (pool.find_id(key.id, far), pool.find_id(made.id, far)) == (key, made)
    pool.keepalive(key, far)
    assert key.expires_deadline == NEVER
    assert pool.counters.kept_alive == 1
    assert pool.expiring(far) == 0
    assert pool.page(PageQuery(order="expiry"), far).keys == []
    pool.check()


def test_a_keepalive_moves_a_key_as_the_rules_are_by_then() -> None:
    """From a number to never and back; until then it expires as it was to."""
    pool = make_pool()
    keys = [pool.generate(NOW) for _ in range(3)]
    pool.rules = PoolRules(keepalive_seconds=None)
    pool.check()
    pool.keepalive(keys[0], NOW)
    pool.keepalive(keys[1], NOW)
    pool.check()
    pool.rules = PoolRules(keepalive_seconds=10.0)
    pool.keepalive(keys[1], NOW)
    pool.check()
    assert [key.expires_deadline for key in keys] == [NEVER, NOW + 10.0, NOW + KEEPALIVE]
    assert pool.page(PageQuery(order="expiry"), NOW).keys == [keys[1], keys[2]]
    pool.process_due(NOW + KEEPALIVE)
    assert pool.total == 1
    pool.check()


def test_keys_that_never_expire_need_no_grace() -> None:
    """An outage is over for them as it began."""
    pool = make_pool()
    key = pool.generate(NOW)
    pool.rules = PoolRules(keepalive_seconds=None)
    lasting_one = pool.generate(NOW)
    pool.suspend_expiry(NOW)
    pool.grant_grace(NOW + 2 * KEEPALIVE, 100)
    pool.resume_expiry()
    assert (key.expires_deadline, lasting_one.expires_deadline) == (NOW + 2 * KEEPALIVE, NEVER)
    pool.check()


# ----------------------------------------------------------------------------------------------- changing rules


def test_a_changed_time_holds_for_deadlines_that_are_set_from_then_on() -> None:
    """Those that were set stay: blocks, cooldowns, expiry."""
    pool = make_pool()
    keys = [pool.generate(NOW) for _ in range(4)]
    blocked, other = held(pool), held(pool)
    pool.unblock(other, other.lease, NOW, Report(Outcome.RATE_LIMITED))
    pool.rules = PoolRules(block_seconds=5.0, cooldown_seconds=7.0, keepalive_seconds=11.0, rest_seconds=3.0)
    assert (blocked.release_deadline, other.release_deadline) == (NOW + BLOCK, NOW + 60.0)
    assert {key.expires_deadline for key in keys} == {NOW + KEEPALIVE}
    later = held(pool)
    assert later.release_deadline == NOW + 5.0
    pool.unblock(later, later.lease, NOW, Report(Outcome.RATE_LIMITED))
    assert later.release_deadline == NOW + 7.0
    pool.unblock(blocked, None, NOW)
    assert blocked.release_deadline == NOW + 3.0
    assert pool.generate(NOW).expires_deadline == NOW + 11.0
    pool.check()


def test_without_a_threshold_errors_never_cool_a_key() -> None:
    """They are counted all the same; limits and refused keys work as before."""
    pool = lasting(error_threshold=None)
    key = imported(pool, "elsewhere")
    for number in range(1, 10):
        lease = held(pool).lease
        pool.unblock(key, lease, NOW, Report(Outcome.ERROR))
        assert (key.state, key.history.failures) == (State.AVAILABLE, number)
    pool.unblock(key, held(pool).lease, NOW, Report(Outcome.RATE_LIMITED))
    assert key.state is State.COOLING


def test_the_client_of_a_lease_goes_with_it() -> None:
    """Unblocked, released, deleted; a caller without a token of its own has none."""
    pool = lasting()
    key = imported(pool, "elsewhere")
    assert held(pool, client="worker").client == "worker"
    pool.unblock(key, None, NOW)
    assert key.client is None
    assert held(pool).client is None
    pool.find_id(key.id, NOW + BLOCK)
    held(pool, NOW + BLOCK, client="worker")
    pool.check()
    pool.find_id(key.id, NOW + 2 * BLOCK)
    assert key.client is None


# ----------------------------------------------------------------------------------------------- common beginnings


def test_keys_with_a_common_beginning_are_spread_as_others_are() -> None:
    """No part of the index holds more than a few times its share; nothing grows in one step."""
    pool = lasting()
    for number in range(20_000):
        imported(pool, LONG.format(number))
    sizes = [len(part) for part in pool._imported._parts.values()]
    assert math.fsum(sizes) == 20_000
    assert max(sizes) < 40
    assert len(sizes) > 3500


# ------------------------------------------------------------------------------------------------- the self-check


def _break(pool: Pool, key: Key, how: str) -> None:
    if how == "name":
        key.details = Details(True, "other")
    elif how == "text":
        key.text = "another"
    elif how == "hint":
        pool._by_hint.discard(key)
    elif how == "former":
        key.details = Details(True, "acct", former="gone")
    elif how == "client":
        key.client = "worker"
    elif how == "leftover text":
        pool._imported.add("leftover", key)
    elif how == "leftover hint":
        pool._by_hint._entries.add(1)
    elif how == "leftover name":
        pool._by_name.add(Key(99, "x", NOW, NEVER, details=Details(True, "y")))
    elif how == "never":
        key.expires_deadline = NOW + 1
    else:
        key.expiry_bucket = pool._by_expiry.add(key, NOW + 1)


@pytest.mark.parametrize(
    "how",
    [
        "name",
        "text",
        "hint",
        "former",
        "client",
        "leftover text",
        "leftover hint",
        "leftover name",
        "never",
        "bucket",
    ],
)
def test_the_self_check_finds_what_is_broken(how: str) -> None:
    """Each index against the keys, both ways."""
    pool = lasting()
    key = imported(pool, "elsewhere", name="acct")
    pool.check()
    _break(pool, key, how)
    with pytest.raises(ValueError, match=r"keys|Key"):
        pool.check()
