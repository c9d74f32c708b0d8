"""The scripts that run inside Valkey: lua/*.lua, each with common.lua before it.

Scripts that serve calls have attended.lua between the two: it refuses to act on a partition that was emptied, or that
no server has polled for a while. presence.lua and upgrade.lua stand alone: they concern the pool and not a partition.
"""

from __future__ import annotations

import binascii
import hashlib
import itertools
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

_UNATTENDED = frozenset({"claim", "grace", "move_in", "move_out"})
"""Scripts that also run on partitions that no server serves."""
_NOT_CALLED = frozenset({"common", "attended", "presence", "upgrade"})

KEYS = (
    "meta", "records", "states", "expiry", "ids", "texts", "events", "quarantine", "attempts", "waiters",
)  # fmt: skip
"""The names of a partition's Valkey keys, in the order of common.lua."""
SLOTS = 16384
"""Slots of a cluster."""
_FOLDER = files("keypool.engine.valkey") / "lua"


@dataclass(frozen=True, slots=True)
class Script:
    """One script, and the SHA-1 by which EVALSHA calls it."""

    name: str
    text: str
    sha: str


@cache
def scripts() -> dict[str, Script]:
    """Every script by its name. Reads files, once."""
    texts = {path.name.removesuffix(".lua"): path.read_text("utf-8") for path in _FOLDER.iterdir()}
    made = {}
    for name in sorted(texts.keys() - _NOT_CALLED):
        before = texts["common"] if name in _UNATTENDED else f"{texts['common']}\n{texts['attended']}"
        text = f"{before}\n{texts[name]}"
        made[name] = Script(name, text, hashlib.sha1(text.encode()).hexdigest())  # noqa: S324 - as EVALSHA has it
    return made


@cache
def text_of(name: str) -> str:
    """A script that stands alone. Reads a file, once."""
    return (_FOLDER / f"{name}.lua").read_text("utf-8")


def slot_of(key: str) -> int:
    """The slot of a key whose name begins with a hash tag, as cluster nodes compute it."""
    inner = key[key.index("{") + 1 : key.index("}")]
    return binascii.crc_hqx(inner.encode(), 0) % SLOTS


@cache
def tag(pool: str, partition: int, partitions: int) -> str:
    """The hash tag that the names of a partition's keys start with, and which decides their slot.

    It is `{POOL:PARTITION}`, with a suffix by which the slot is in the partition's share of all slots: so each node of
    a cluster with equal ranges of slots has as many partitions. O(partitions), once.
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
