"""The counters of a pool: their names, in the one order that everything else derives from.

`Stats`, the data file, the metrics, the history of the charts and the feed use these names. The client, the scripts in
Valkey and the dashboard's own scripts can't import this module; a test compares them with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any


def _counter(about: str) -> Any:
    return field(default=0, metadata={"about": about})


@dataclass(slots=True)
class Counters:
    """Totals since the pool began. The description of each is the help text of its metric."""

    generated: int = _counter("keys generated")
    acquired: int = _counter("keys acquired")
    unblocked: int = _counter("blocked keys made available by unblock")
    released: int = _counter("blocked keys made available by their deadline")
    deleted: int = _counter("keys deleted")
    expired: int = _counter("keys purged because no keepalive came in time")
    kept_alive: int = _counter("keepalives")
    refused: int = _counter("acquires answered that no key is available")
    cooled: int = _counter("cooldowns begun")
    quarantines: int = _counter("keys quarantined")
    restored: int = _counter("cooling or quarantined keys restored by an operator")
    imported: int = _counter("keys imported")
    paced: int = _counter("cooldowns begun or prolonged because a key's budget was spent")

    def by_name(self) -> dict[str, Any]:
        """The values by name, in the order of `COUNTERS`."""
        return dict(zip(COUNTERS, counter_values(self), strict=True))

    @property
    def changes(self) -> int:
        """How many events were counted: all but those of keys that were revealed or cooled down."""
        return (
            self.generated
            + self.acquired
            + self.unblocked
            + self.released
            + self.deleted
            + self.expired
            + self.cooled
            + self.quarantines
            + self.restored
            + self.imported
        )


COUNTERS: Mapping[str, str] = {each.name: each.metadata["about"] for each in fields(Counters)}
"""Each counter's name with its description."""

counter_values = attrgetter(*COUNTERS)
"""The values of a Counters or a Stats, in the order of `COUNTERS`."""
