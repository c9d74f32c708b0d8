"""The scripts that run inside Valkey: engine/lua/*.lua, each with common.lua before it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

NAMES = (
    "acquire",
    "count",
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
    "rename",
    "room",
    "unblock",
    "wait",
)
KEYS = ("meta", "records", "states", "expiry", "ids", "texts", "events", "waiters")
"""What a partition is kept in, in the order of common.lua."""


@dataclass(frozen=True, slots=True)
class Script:
    """One script, and the name that Valkey knows it by."""

    name: str
    text: str
    sha: str


@cache
def scripts() -> dict[str, Script]:
    """Every script by its name. Reads files, once."""
    folder = files("keypool.engine") / "lua"
    common = (folder / "common.lua").read_text(encoding="utf-8")
    made = {}
    for name in NAMES:
        text = f"{common}\n{(folder / f'{name}.lua').read_text(encoding='utf-8')}"
        made[name] = Script(name, text, hashlib.sha1(text.encode()).hexdigest())  # noqa: S324 - Valkey's choice
    return made


def tag(pool: str, partition: int) -> str:
    """What the names of a partition's keys start with: the part in braces decides the slot."""
    return f"{{{pool}:{partition}}}"


def keys_of(pool: str, partition: int) -> list[str]:
    """The names of a partition's keys, in the order of KEYS."""
    return [f"{tag(pool, partition)}:{name}" for name in KEYS]
