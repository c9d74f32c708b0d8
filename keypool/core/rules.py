"""The settings of a pool, and their only defaults.

`config/settings.py` reads flags, environment and TOML file into one PoolRules: those of the pool `default`, which the
engines get. Every other pool has settings of its own (`SETTINGS`), and the rest of the rules from the server. Settings
that aren't flags (`NOT_FLAGS`) are given to `default` as to the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from keypool.core.pace import Pace

DEFAULT_POOL = "default"
"""The name of the pool that is always there, whose settings are the server's flags."""

MAX_POOL_NAME = 63
POOL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)

Settings = Mapping[str, float | int | Pace | None]
"""Settings that a pool was given, by name (`SETTINGS`). The others have their defaults."""


def is_pool_name(text: str) -> bool:
    """Whether a pool may have this name: 1 to 63 of a-z 0-9 . _ -, the first a letter or a digit."""
    return POOL_NAME.fullmatch(text) is not None


@dataclass(frozen=True)
class PoolRules:
    """The settings that every engine applies. Lengths of time are seconds."""

    block_seconds: float = 60.0
    """How long an acquired key stays blocked."""

    keepalive_seconds: float | None = 300.0
    """How long a key lives without a keepalive; None: keys never expire."""

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

    error_threshold: int | None = 3
    """Failures in a row from which an error cools the key; None: never."""

    forget_seconds: float = 3600.0
    """How long after the last failure the failures in a row are forgotten."""

    max_quarantined_percent: float = 50.0
    """The part of the pool that reports may quarantine."""

    rest_seconds: float = 0.0
    """How long a key cools after every lease."""

    max_block_seconds: float | None = None
    """How long a lease may last with extensions; None: as long as `block_seconds`."""

    pace: Pace | None = None
    """How often each key may be used that has no pace of its own; None: as often as it is available."""

    history_leases: int = 0
    """How many leases that have ended are kept; 0: none are recorded. Not a flag: `default` is given it, too."""

    @property
    def longest_block(self) -> float:
        """How long a lease may last with extensions."""
        return self.block_seconds if self.max_block_seconds is None else self.max_block_seconds

    @property
    def outage_grace(self) -> float:
        """How long keys live at least after an outage in which nobody could keep them alive."""
        return max(self.restart_grace, (self.keepalive_seconds or 0.0) / 2)

    def of_pool(self, settings: Settings) -> PoolRules:
        """The rules of another pool of the same server, which was given these settings. O(settings).

        A setting that wasn't given has the default of its field, whatever `default` has; `max_keys` and `key_length`,
        and the rules that aren't settings of a pool, are the server's.
        """
        given = {name: getattr(DEFAULT_RULES, name) for name in SETTINGS if name not in _OF_SERVER}
        return replace(self, **given | _OF_OTHER_POOLS | dict(settings))

    def of_default(self, settings: Settings) -> PoolRules:
        """These rules of `default` with the settings that it was given, all NOT_FLAGS. O(settings)."""
        return replace(self, **{name: getattr(DEFAULT_RULES, name) for name in NOT_FLAGS} | dict(settings))

    def contradiction(self) -> str | None:
        """Which two settings contradict each other; None if all can hold together. O(1)."""
        if self.longest_block < self.block_seconds:
            return (
                f"max_block_seconds takes no less than block_seconds, which is {self.block_seconds:.15g}, "
                f"not {self.longest_block:.15g}"
            )
        return None

    def settings(self) -> dict[str, float | int | Pace | None]:
        """All settings of a pool with these rules, in the order of `SETTINGS`. O(settings)."""
        return {name: getattr(self, name) for name in SETTINGS} | {"max_block_seconds": self.longest_block}


SETTINGS = (
    "block_seconds",
    "max_block_seconds",
    "keepalive_seconds",
    "max_keys",
    "key_length",
    "cooldown_seconds",
    "max_cooldown_seconds",
    "max_retry_after_seconds",
    "error_threshold",
    "forget_seconds",
    "max_quarantined_percent",
    "rest_seconds",
    "pace",
    "history_leases",
)
"""The settings that each pool has of its own, in the order of the docs."""

NOT_FLAGS = ("pace", "history_leases")
"""The settings that aren't flags of the server: `default` is given them as other pools are."""

_OF_SERVER = ("max_keys", "key_length")
_OF_OTHER_POOLS = {"history_leases": 100_000}
"""The defaults that are others in a pool beside `default`."""

DEFAULT_RULES = PoolRules()
