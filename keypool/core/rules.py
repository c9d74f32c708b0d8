"""The settings of a pool, and their only defaults.

`config/settings.py` takes flags, environment and TOML file into one PoolRules; the engines get it whole. So a new
setting of the pool is one field here and one row there.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PoolRules:
    """What every engine keeps to. Lengths of time are seconds."""

    block_seconds: float = 60.0
    """How long an acquired key stays blocked."""

    keepalive_seconds: float = 300.0
    """How long a key lives without a keepalive."""

    key_length: int = 20
    """Characters in a new key."""

    max_keys: int = 1_000_000
    """Keys in the pool at most."""

    max_waiters: int = 10_000
    """Acquires that may wait at one server at a time."""

    restart_grace: float = 0.0
    """After a start, every key lives at least this long, even if it expired during the stop."""


DEFAULT_RULES = PoolRules()
