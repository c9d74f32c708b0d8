"""Names that stand on both sides of a border which no import crosses: server and client, server and Valkey scripts."""

from __future__ import annotations

import dataclasses
import re

from support import ROOT

from keypool.api.calls import BASE
from keypool.client import Stats as ClientStats
from keypool.client.settings import BASE as CLIENT_BASE
from keypool.core.answers import Stats
from keypool.core.counters import COUNTERS, Counters


def test_stats_has_every_counter_in_order() -> None:
    """Engines make it by position."""
    assert Stats.__struct_fields__[6:-3] == tuple(COUNTERS)
    assert tuple(Counters.__slots__) == tuple(COUNTERS)


def test_the_clients_stats_are_the_servers() -> None:
    """The client has a class of its own, as it imports nothing of the server."""
    assert tuple(field.name for field in dataclasses.fields(ClientStats)) == Stats.__struct_fields__


def test_the_scripts_in_valkey_count_under_these_names() -> None:
    """poll.lua gets the names from the server; the other scripts have them.

    Three more names are not counters of the pool: the number of cooling keys, and two that count events.
    """
    scripts = "".join(path.read_text() for path in (ROOT / "keypool/engine/valkey/lua").glob("*.lua"))
    counted = re.findall(r"'HINCRBY', META, ([^\n]*?), [^,\n]*\)|\b(?:purge|free)\(([^\n]*)\)", scripts)
    names = {name for pair in counted for text in pair for name in re.findall(r"'(\w+)'", text)}
    assert names - {"deadline", "holder"} == {*COUNTERS, "cooling", "ready", "revealed"}


def test_client_and_server_agree_on_the_path_of_the_api() -> None:
    """One constant on each side."""
    assert CLIENT_BASE == BASE
