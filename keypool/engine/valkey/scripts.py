"""The scripts that run inside Valkey: engine/lua/*.lua, each with common.lua before it.

Those that serve have attended.lua between the two: it refuses to act on a partition that was emptied, or that no
server looked after. `presence_text` stands by itself: it is about the pool and not about a partition.
"""

from __future__ import annotations

import binascii
import hashlib
import itertools
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

NAMES = (
    "acquire",
    "delete",
    "find",
    "generate",
    "get",
    "grace",
    "keepalive",
    "leave",
    "look",
    "move_in",
    "move_out",
    "page",
    "refuse",
    "room",
    "unblock",
    "wait",
)
_UNATTENDED = frozenset({"grace", "leave", "move_in", "move_out"})
"""Scripts for a partition that nobody may be serving."""

KEYS = ("meta", "records", "states", "expiry", "ids", "texts", "events", "waiters")
"""What a partition is kept in, in the order of common.lua."""
SLOTS = 16384


@dataclass(frozen=True, slots=True)
class Script:
    """One script, and the name that Valkey knows it by."""

    name: str
    text: str
    sha: str


@cache
def scripts() -> dict[str, Script]:
    """Every script by its name. Reads files, once."""
    folder = files("keypool.engine.valkey") / "lua"
    common, attended = ((folder / f"{name}.lua").read_text("utf-8") for name in ("common", "attended"))
    made = {}
    for name in NAMES:
        before = common if name in _UNATTENDED else f"{common}\n{attended}"
        text = f"{before}\n{(folder / f'{name}.lua').read_text(encoding='utf-8')}"
        made[name] = Script(name, text, hashlib.sha1(text.encode()).hexdigest())  # noqa: S324 - Valkey's choice
    return made


@cache
def presence_text() -> str:
    """The script presence.lua. Reads a file, once."""
    return (files("keypool.engine.valkey") / "lua" / "presence.lua").read_text(encoding="utf-8")


def slot_of(key: str) -> int:
    """The slot of a key whose name begins with a tag in braces, as cluster nodes count it."""
    inner = key[key.index("{") + 1 : key.index("}")]
    return binascii.crc_hqx(inner.encode(), 0) % SLOTS


@cache
def tag(pool: str, partition: int, partitions: int) -> str:
    """What the names of a partition's keys start with: the part in braces decides the slot.

    It is `{POOL:PARTITION}`, with a suffix by which the slot falls into the partition's share of all slots: so a
    cluster whose nodes have equal ranges of them has as many partitions on each. O(partitions), once.
    """
    share = range(SLOTS * partition // partitions, SLOTS * (partition + 1) // partitions)
    for number in itertools.count():
        found = f"{{{pool}:{partition}{f'.{number}' if number else ''}}}"
        if slot_of(found) in share:
            return found
    raise AssertionError("some number fits")


def keys_of(pool: str, partition: int, partitions: int) -> list[str]:
    """The names of a partition's keys, in the order of KEYS."""
    return [f"{tag(pool, partition, partitions)}:{name}" for name in KEYS]
