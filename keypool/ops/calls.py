"""What became of the API's calls: counts by operation and outcome, and how long they took."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from keypool.ops.histogram import SECONDS, Tally

NO_OPERATION = "none"
"""The operation of a request that named no call: an unknown path, say."""

_FROM_THE_START = ("ok", "unauthorized", "forbidden", "storage-unavailable", "internal")


class CallTallies:
    """Outcomes are `ok` or the code of an error. Bounded: operations times codes.

    `operations` has the codes of each operation's own errors. These and `_FROM_THE_START` have a count from the
    start, at zero: Prometheus takes the first value of a series for what it has always been, so an alert would
    miss the first burst of one that is born with it.
    """

    def __init__(self, operations: Mapping[str, Iterable[str]]) -> None:
        codes = {**operations, NO_OPERATION: ()}
        self.outcomes: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.seconds = {operation: Tally(SECONDS) for operation in codes}
        for operation, own in codes.items():
            for outcome in (*_FROM_THE_START, *own):
                self.outcomes[operation, outcome] = 0

    def add(self, operation: str, outcome: str, seconds: float) -> None:
        """Count one call. About 0.4 µs."""
        self.outcomes[operation, outcome] += 1
        self.seconds[operation].add(seconds)
