"""The scripts that run inside Valkey: lua/*.lua, each with common.lua before it, and other parts that it shares.

Scripts that serve calls have attended.lua behind it: it refuses to act on a partition that was emptied, or that
no server has polled for a while. Those that concern the pools and not a partition stand alone (`text_of`).
"""

from __future__ import annotations

import binascii
import hashlib
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

_UNATTENDED = frozenset({
    "alias", "claim", "forget", "grace", "history_in", "history_out", "lock", "move_in", "move_out", "share",
})  # fmt: skip
"""Scripts that also run on partitions that no server serves."""
_PARTS = {
    "undrained": {"acquire", "generate", "import", "room", "set_seats"},
    "named": {
        "change", "delete", "extend", "get", "history", "import", "keepalive", "known", "quarantine", "restore",
        "set_seats", "unblock",
    },
    "states": {
        "change", "get", "import", "known", "owned", "page", "quarantine", "restore", "search", "set_seats",
        "unblock",
    },
    "rows": {"change", "get", "owned", "page", "quarantine", "restore", "search", "set_seats"},
    "holding": {"owned", "owners"},
    "leases": {"acquire", "held"},
    "adding": {"generate", "import", "move_in", "room", "set_seats"},
    "labelled": {"alias", "change", "import", "known", "search"},
    "rewriting": {"change", "reseal"},
    "restoring": {"change", "restore"},
}  # fmt: skip
"""Parts that several scripts have in common, and those scripts. All are run at each call, so they have no others."""
_ALONE = ("pools", "presence", "upgrade")
_NOT_CALLED = frozenset({"common", "attended", *_ALONE, *_PARTS})
_CONSTANT = re.compile(r"^local ([A-Z_]+) = (\d{1,16}|'\w'|KEYS\[\d+\])$", re.MULTILINE)
_COMMENT = re.compile(r" *--.*$", re.MULTILINE)

KEYS = (
    "meta", "records", "states", "expiry", "ids", "texts", "events", "quarantine", "attempts", "names",
    "holders", "rare", "waiters",
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
    return build({})


def build(constants: Mapping[str, str]) -> dict[str, Script]:
    """Every script by its name, with some other constants than common.lua has. Reads files."""
    texts = {
        path.name.removesuffix(".lua"): _COMMENT.sub("", path.read_text("utf-8"))
        for path in _FOLDER.iterdir()
    }
    values = {**dict(_CONSTANT.findall(texts["common"])), **constants}
    used = re.compile(rf"\b({'|'.join(values)})\b")
    made = {}
    for name in sorted(texts.keys() - _NOT_CALLED):
        included = [] if name in _UNATTENDED else ["attended"]
        included += [part for part, users in _PARTS.items() if name in users]
        text = "\n".join(texts[each] for each in ["common", *included, name])
        # A constant that were a local would be captured by each function that uses it, whenever a script is called.
        text = used.sub(lambda found: values[found[0]], _CONSTANT.sub("", text))
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
