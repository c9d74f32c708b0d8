"""The access log: a line a request at level debug, the logger `keypool.access`.

A line names the call, never the path: a path may hold a key.
"""

from __future__ import annotations

import logging

access_log = logging.getLogger("keypool.access")


def access_line(request_id: str, operation: str, status: int, outcome: str, seconds: float) -> None:
    """Write the line of a request that was answered, if such lines are wanted. 0.1 µs if not."""
    if not access_log.isEnabledFor(logging.DEBUG):
        return
    milliseconds = round(seconds * 1000, 1)
    fields = {
        "request_id": request_id,
        "operation": operation,
        "status": status,
        "outcome": outcome,
        "milliseconds": milliseconds,
    }
    access_log.debug(
        "%s %s %d %s %.1f ms",
        request_id,
        operation,
        status,
        outcome,
        milliseconds,
        extra={"fields": fields},
    )
