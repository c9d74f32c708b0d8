"""Rows and lengths of time in the answers of the embedded engine.

Lengths of time are relative to when the answer is sent, so that a holder never overestimates its lease: those of an
answer that waited for the disk are shortened by that time.
"""

from __future__ import annotations

import msgspec

from keypool.core.answers import Lease, Row
from keypool.core.keys import NEVER, Key, State, moment
from keypool.core.outcomes import NO_HISTORY, failures_at
from keypool.core.pool import Pool

# Globals, because in Python 3.11 each look-up of an enum's member by name costs a tenth of a microsecond.
_AVAILABLE, _BLOCKED, _COOLING, _QUARANTINED = State


def row_of(key: Key, now: float, pool: Pool) -> Row:
    """The row of a live key whose deadlines were applied. About 3 µs."""
    state, history, details = key.state, key.history, key.details
    due_in = None if key.release_deadline is None else rounded(key.release_deadline - now)
    reason = history.reason
    if state is _QUARANTINED and history.operator_reason is not None:
        reason = history.operator_reason
    row = Row(
        key.id,
        key.hint,
        state,
        key.owner,
        key.lease or None,
        moment(key.created_at),
        expires_in(key, now),
        due_in if state is _BLOCKED else None,
        due_in if state is _COOLING else None,
        0 if history is NO_HISTORY else failures_at(history, now, pool.rules),
        history.outcome,
        reason,
        key.client,
        details.name,
        details.labels or {},
        details.pace,
        served=key.served,
    )
    if key.group is not None:
        row.seat, row.seats = pool.number_of(key)
    if state is _BLOCKED:
        row.acquired_at = moment(key.acquired_at)
    return row


def data_of(key: Key) -> msgspec.Raw | None:
    """The data that an operator gave to a key, as it stands in an answer."""
    return None if key.details.data is None else msgspec.Raw(key.details.data)


def expires_in(key: Key, now: float) -> float | None:
    """Seconds until a live key expires; None if it never does."""
    return None if key.expires_deadline == NEVER else rounded(key.expires_deadline - now)


def age(answer: Lease | Row, delay: float) -> None:
    """Shorten the lengths of time in an answer that was sent so many seconds later."""
    if delay:
        answer.expires_in = less_or_none(answer.expires_in, delay)
        if answer.release_in is not None:
            answer.release_in = less(answer.release_in, delay)
        if isinstance(answer, Row):
            answer.available_in = less_or_none(answer.available_in, delay)


def less(length: float, delay: float) -> float:
    """A length of time in an answer that was sent so many seconds later."""
    return max(0.0, rounded(length - delay)) if delay else length


def less_or_none(length: float | None, delay: float) -> float | None:
    """The same of a length that may be None."""
    return None if length is None else less(length, delay)


def rounded(length: float) -> float:
    """A length of time, to the millisecond."""
    return round(length * 1000) / 1000  # a third of the cost of round(length, 3)
