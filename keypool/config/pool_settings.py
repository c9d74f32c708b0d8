"""The settings that each pool has of its own, and which values they take: as flags, for `default`, and in the API."""

from __future__ import annotations

from collections.abc import Mapping

from keypool.config.setting_types import ONE_YEAR, Percent, Seconds, Whole

POOL_SETTINGS: Mapping[str, Whole | Seconds | Percent] = {
    "block_seconds": Seconds(),
    "max_block_seconds": Seconds(high=ONE_YEAR),
    "keepalive_seconds": Seconds(),
    "max_keys": Whole(1, 10_000_000_000),
    "key_length": Whole(16, 64),
    "cooldown_seconds": Seconds(low=0.0),
    "max_cooldown_seconds": Seconds(low=0.0, high=ONE_YEAR),
    "max_retry_after_seconds": Seconds(low=0.0, high=ONE_YEAR),
    "error_threshold": Whole(1, 1_000_000),
    "forget_seconds": Seconds(low=0.0, high=ONE_YEAR),
    "max_quarantined_percent": Percent(),
    "rest_seconds": Seconds(low=0.0),
    "history_leases": Whole(0, 100_000_000),
}
"""The type of each setting in core.rules.SETTINGS but `pace`, which is an object."""

PACE: Mapping[str, Whole | Seconds] = {
    "count": Whole(1, 1_000_000),
    "seconds": Seconds(high=ONE_YEAR),
    "burst": Whole(1, 1_000_000),
}
"""The type of each member of a pace."""

PACE_TAKES = (
    f"an object: how often a key may be used (count, {PACE['count'].takes}) in a time (seconds, "
    f"{PACE['seconds'].takes}), and how often of these at once (burst, {PACE['burst'].takes}; 1 if left out)"
)

NULL_MEANS = {
    "keepalive_seconds": "keys never expire",
    "error_threshold": "errors never cool a key",
    "pace": "keys are served whenever they are available",
}
"""The settings that a pool may have as null, and what it means. A flag can't be null."""
