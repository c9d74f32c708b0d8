"""The settings of a pool: their defaults, and which values the server takes. docs/api.md says what they mean.

The server has tables of its own, as the client imports nothing of it; a test compares them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

_DAY, _YEAR = 86_400.0, 366 * 86_400.0


PoolValue = float | Mapping[str, float] | None
"""A value of a setting: a mapping for `pace`, `{"count": 5, "seconds": 60, "burst": 1}`."""


class PoolSetting(NamedTuple):
    """One setting: a number from `low` to `high`, with `null` also None; `whole` if it has no fractions.

    With `members`, it is an object of these instead.
    """

    default: float | None
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    null: bool = False
    members: Mapping[str, PoolSetting] | None = None


PACE = {
    "count": PoolSetting(None, 1, 1_000_000, whole=True),
    "seconds": PoolSetting(None, 0.001, _YEAR),
    "burst": PoolSetting(1, 1, 1_000_000, whole=True),
}
"""The members of a pace; those without a default must be there."""

POOL_SETTINGS = {
    "block_seconds": PoolSetting(60.0, 0.001, _DAY),
    "max_block_seconds": PoolSetting(None, 0.001, _YEAR),
    "keepalive_seconds": PoolSetting(300.0, 0.001, _DAY, null=True),
    "max_keys": PoolSetting(1_000_000, 1, 10_000_000_000, whole=True),
    "key_length": PoolSetting(20, 16, 64, whole=True),
    "cooldown_seconds": PoolSetting(60.0, 0.0, _DAY),
    "max_cooldown_seconds": PoolSetting(3600.0, 0.0, _YEAR),
    "max_retry_after_seconds": PoolSetting(604_800.0, 0.0, _YEAR),
    "error_threshold": PoolSetting(3, 1, 1_000_000, whole=True, null=True),
    "forget_seconds": PoolSetting(3600.0, 0.0, _YEAR),
    "max_quarantined_percent": PoolSetting(50.0, 0.0, 100.0),
    "rest_seconds": PoolSetting(0.0, 0.0, _DAY),
    "pace": PoolSetting(None, null=True, members=PACE),
    "history_leases": PoolSetting(100_000, 0, 100_000_000, whole=True),
}
"""By name, in the order of the docs. Of `max_keys` and `key_length` the server's flags are the defaults, and
`max_block_seconds` is as long as `block_seconds`; the pool `default` has 0 `history_leases`."""

OF_DEFAULT: dict[str, Any] = {"pace": None, "history_leases": 0}
"""The settings that aren't flags of the server, which `default` takes as the other pools do, and its defaults."""

OF_SERVER = ("max_keys", "key_length")
"""The settings whose defaults are the server's flags."""


def wrong_setting(name: str, value: Any) -> str | None:
    """What this setting takes, if it doesn't take the value; None if it does. Raises KeyError for another name."""
    setting = POOL_SETTINGS[name]
    if value is None and setting.null:
        return None
    return _wrong(setting, value) if setting.members is None else _wrong_object(setting.members, value)


def _wrong_object(members: Mapping[str, PoolSetting], value: Any) -> str | None:
    takes = f"an object of {', '.join(members)}"
    if not isinstance(value, Mapping) or value.keys() - members.keys():
        return takes
    for name, member in members.items():
        given = value.get(name, member.default)
        if (wrong := _wrong(member, given)) is not None:
            return f"{takes}, where {name} is {wrong}"
    return None


def with_defaults(name: str, value: Any) -> Any:
    """A right value of this setting, with what an object has by default."""
    members = POOL_SETTINGS[name].members
    if members is None or value is None:
        return value
    return {each: value.get(each, member.default) for each, member in members.items()}


def _wrong(setting: PoolSetting, value: Any) -> str | None:
    number = isinstance(value, int if setting.whole else int | float) and not isinstance(value, bool)
    if number and setting.low <= value <= setting.high:
        return None
    kind = "a whole number" if setting.whole else "a number"
    return f"{kind} from {setting.low:.15g} to {setting.high:.15g}"


def contradiction(settings: Mapping[str, Any]) -> str | None:
    """Why these settings can't be those of one pool; None if they can."""
    block = settings.get("block_seconds", POOL_SETTINGS["block_seconds"].default)
    longest = settings.get("max_block_seconds")
    if longest is not None and longest < (block or math.inf):
        return (
            f"max_block_seconds takes no less than block_seconds, which is {block:.15g}, not {longest:.15g}"
        )
    return None
