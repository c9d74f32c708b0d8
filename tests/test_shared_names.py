"""Names that stand on both sides of a border which no import crosses: server and client, server and Valkey scripts."""

from __future__ import annotations

import dataclasses
import re

from support import ROOT

from keypool.api.bodies import MAX_USES
from keypool.api.calls import BASE
from keypool.client import Stats as ClientStats
from keypool.client import answers as client_answers
from keypool.client.imports import MOST_BYTES, MOST_ITEMS
from keypool.client.pool_settings import OF_DEFAULT, OF_SERVER
from keypool.client.pool_settings import POOL_SETTINGS as CLIENT_SETTINGS
from keypool.client.reports import MOST_USES
from keypool.client.settings import BASE as CLIENT_BASE
from keypool.client.settings import pool_name
from keypool.config.pool_settings import NULL_MEANS, PACE, POOL_SETTINGS
from keypool.config.setting_types import Whole
from keypool.core import answers, rules
from keypool.core.answers import Stats
from keypool.core.counters import COUNTERS, Counters
from keypool.core.pace import Pace


def test_stats_has_every_counter_in_order() -> None:
    """Engines make it by position."""
    assert Stats.__struct_fields__[6:-3] == tuple(COUNTERS)
    assert tuple(Counters.__slots__) == tuple(COUNTERS)


def test_the_clients_stats_are_the_servers() -> None:
    """The client has a class of its own, as it imports nothing of the server."""
    assert tuple(field.name for field in dataclasses.fields(ClientStats)) == Stats.__struct_fields__


def test_the_scripts_in_valkey_count_under_these_names() -> None:
    """poll.lua gets the names from the server; the other scripts have them.

    Six more names are not counters of the pool: the number of cooling keys, those of all and of quarantined seats
    beside the first ones, whether there were odd texts (details.py), and two that count events.
    """
    scripts = "".join(path.read_text() for path in (ROOT / "keypool/engine/valkey/lua").glob("*.lua"))
    counted = re.findall(r"'HINCRBY', META, ([^\n]*?), [^,\n]*\)", scripts)
    names = {name for text in counted for name in re.findall(r"'(\w+)'", text)}
    names |= set(re.findall(r"\b(?:purge|free)\([^'\n]*'(\w+)'", scripts))
    assert names == {*COUNTERS, "cooling", "further", "further_quarantined", "odd", "ready", "revealed"}


def test_client_and_server_agree_on_the_path_of_the_api() -> None:
    """One constant on each side."""
    assert CLIENT_BASE == BASE


def test_the_clients_answers_are_the_servers() -> None:
    """Its own members are `secret`, which is `key` in JSON, and what it says of repeated calls."""
    pairs = {
        client_answers.Row: answers.Row,
        client_answers.LeasedKey: answers.Lease,
        client_answers.Revealed: answers.Revealed,
        client_answers.Imported: answers.Imported,
        client_answers.ImportedKey: answers.ImportedKey,
        client_answers.Imports: answers.ImportedKeys,
        client_answers.PoolInfo: answers.PoolRow,
        client_answers.Rekeying: answers.Rekeying,
    }
    for mine, theirs in pairs.items():
        names = {field.metadata.get("json", field.name) for field in dataclasses.fields(mine)}
        assert names - {"repeated"} == set(theirs.__struct_fields__), mine


def test_client_and_server_agree_on_the_settings_of_a_pool() -> None:
    """Names, defaults, ranges, and which may be null."""
    assert tuple(CLIENT_SETTINGS) == rules.SETTINGS
    for name, mine in CLIENT_SETTINGS.items():
        assert mine.default == getattr(rules.DEFAULT_RULES.of_pool({}), name), name
        assert mine.null == (name in NULL_MEANS), name
        if mine.members is None:
            theirs = POOL_SETTINGS[name]
            ranged = (mine.low, mine.high, mine.whole)
            assert ranged == (theirs.low, theirs.high, isinstance(theirs, Whole)), name
    assert OF_SERVER == rules._OF_SERVER
    assert tuple(OF_DEFAULT) == rules.NOT_FLAGS
    for name, default in OF_DEFAULT.items():
        assert default == getattr(rules.DEFAULT_RULES, name), name


def test_client_and_server_agree_on_the_members_of_a_pace() -> None:
    """Names, ranges and what a burst is if it is left out; and on the most uses."""
    members = CLIENT_SETTINGS["pace"].members
    assert members is not None
    assert tuple(members) == tuple(PACE) == Pace.__struct_fields__
    assert (members["burst"].default,) == Pace.__struct_defaults__
    for name, mine in members.items():
        theirs = PACE[name]
        ranged = (mine.low, mine.high, mine.whole)
        assert ranged == (theirs.low, theirs.high, isinstance(theirs, Whole)), name
    assert MOST_USES == MAX_USES


def test_client_and_server_agree_on_names_of_pools() -> None:
    for name in (
        "default",
        "a",
        "0",
        "a.b_c-d",
        "x" * 63,
        "",
        "x" * 64,
        "A",
        "-a",
        ".",
        "..",
        "a/b",
        "a b",
        "a\n",
    ):
        try:
            pool_name(name)
        except ValueError:
            assert not rules.is_pool_name(name)
        else:
            assert rules.is_pool_name(name)


def test_client_and_server_agree_on_the_size_of_a_batch() -> None:
    from keypool.api.bodies import MAX_BATCH
    from keypool.config.limits import MAX_IMPORT

    assert (MOST_ITEMS, MOST_BYTES) == (MAX_BATCH, MAX_IMPORT)
