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

    cooldown_seconds: float = 60.0
    """How long a key cools after its first failure. It doubles with each failure in a row."""

    max_cooldown_seconds: float = 3600.0
    """How long a key cools at most after failures."""

    max_retry_after_seconds: float = 604_800.0
    """How long a key cools at most because a holder said so."""

    error_threshold: int = 3
    """Failures in a row from which an error cools the key."""

    forget_seconds: float = 3600.0
    """How long after the last failure the failures in a row are forgotten."""

    max_quarantined_percent: float = 50.0
    """The part of the pool that reports may quarantine."""

    rest_seconds: float = 0.0
    """How long a key cools after every lease."""

    max_block_seconds: float | None = None
    """How long a lease may last with extensions; None: as long as `block_seconds`."""

    @property
    def longest_block(self) -> float:
        """How long a lease may last with extensions."""
        return self.block_seconds if self.max_block_seconds is None else self.max_block_seconds


DEFAULT_RULES = PoolRules()
