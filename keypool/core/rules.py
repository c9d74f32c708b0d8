"""The settings of a pool, and their only defaults.

`config/settings.py` reads flags, environment and TOML file into one PoolRules, which the engines get. So a new setting
of the pool is one field here and one there.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PoolRules:
    """The settings that every engine applies. Lengths of time are seconds."""

    block_seconds: float = 60.0
    """How long an acquired key stays blocked."""

    keepalive_seconds: float = 300.0
    """How long a key lives without a keepalive."""

    key_length: int = 20
    """Characters in a new key."""

    max_keys: int = 1_000_000
    """Most keys that the pool may hold."""

    max_waiters: int = 10_000
    """Most acquires that may wait on one server at a time."""

    restart_grace: float = 0.0
    """How long every key lives at least after a start, even if it expired while no server ran."""


DEFAULT_RULES = PoolRules()
