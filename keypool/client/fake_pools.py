"""The pools of testing.py: what the server does with pools, in the simplest way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keypool.client.answers import State
from keypool.client.fake_pool import SETTINGS, FakePool, Refused
from keypool.client.pool_settings import OF_DEFAULT, contradiction, with_defaults, wrong_setting
from keypool.client.settings import DEFAULT_POOL, pool_name


class FakePools:
    """All pools by name. Calls return what the server would, or raise Refused."""

    def __init__(self, default: FakePool) -> None:
        self.default = default
        self._pools = {DEFAULT_POOL: default}

    def get(self, name: str) -> FakePool:
        """The pool of this name. Raises Refused."""
        for pool in list(self._pools.values()):
            if pool.draining and not pool.live():
                del self._pools[pool.name]
        if name not in self._pools:
            raise Refused(404, "unknown-pool")
        return self._pools[name]

    def advance(self, seconds: float) -> None:
        """Advance the clock of all of them."""
        for pool in self._pools.values():
            pool.skipped += seconds

    def row(self, pool: FakePool) -> dict[str, Any]:
        """Counts and settings of a pool."""
        counts = {state.value: len(pool.live(state)) for state in State}
        row = {"name": pool.name, "total": len(pool.live()), **counts, "waiting": 0}
        settings = pool.settings | {"max_block_seconds": pool.longest_block}
        return row | {"draining": pool.draining, "settings": settings}

    def rows(self) -> dict[str, Any]:
        """All pools."""
        self.get(DEFAULT_POOL)
        return {"pools": [self.row(self._pools[name]) for name in sorted(self._pools)]}

    def put(self, name: str, settings: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """Make a pool, or give one these settings; the status and the row."""
        try:
            pool_name(name)
        except ValueError as error:
            raise Refused(400, "bad-request", str(error)) from None
        settings = _checked(settings)
        try:
            pool = self.get(name)
        except Refused:
            pool = self._pools[name] = FakePool(name, settings)
            pool.skipped = self.default.skipped
            return 201, self.row(pool)
        defaults = OF_DEFAULT if pool is self.default else SETTINGS
        self._change(pool, {**defaults, **settings})
        return 200, self.row(pool)

    def change(self, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Change some settings of a pool."""
        settings = _checked(settings)
        pool = self.get(name)
        self._change(pool, settings)
        return self.row(pool)

    def _change(self, pool: FakePool, settings: Mapping[str, Any]) -> None:
        if pool is self.default and settings.keys() - OF_DEFAULT.keys():
            raise Refused(409, "pool-fixed")
        if pool.draining:
            raise Refused(409, "pool-draining")
        pool.settings.update(settings)

    def delete(self, name: str, drain: bool, now: bool) -> tuple[int, dict[str, Any] | None]:
        """Delete a pool; the status, and the row if it isn't gone at once."""
        pool = self.get(name)
        if pool is self.default:
            raise Refused(409, "pool-fixed")
        if pool.live() and not drain:
            raise Refused(409, "pool-not-empty")
        pool.draining = True
        if not now and pool.live():
            return 202, self.row(pool)
        del self._pools[name]
        return 204, None


def _checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with what they have by default. Raises Refused."""
    for name, value in settings.items():
        if name not in SETTINGS:
            raise Refused(400, "bad-request", f"{name} is not a setting of a pool")
        if (takes := wrong_setting(name, value)) is not None:
            raise Refused(400, "bad-request", f"{name} takes {takes}, not {value!r}")
    if (problem := contradiction(settings)) is not None:
        raise Refused(400, "bad-request", problem)
    return {name: with_defaults(name, value) for name, value in settings.items()}
