"""Records of keys as lua/common.lua has them, for keypool migrate. Servers leave them to the scripts."""

from __future__ import annotations

import msgspec

from keypool.core.keys import Key, State
from keypool.core.outcomes import NO_HISTORY, History, Outcome

_MARKS = {State.COOLING: "c", State.QUARANTINED: "q"}
_PENDING = "p"
_STATES = {mark: state for state, mark in _MARKS.items()}
_encode = msgspec.msgpack.Encoder().encode


class _Record(msgspec.Struct, array_like=True):
    """In order of the fields in Lua. False stands for nothing; fields at the end may be missing."""

    id: int
    created: int
    lease: int
    expires: int
    release: int
    owner: str | bool = False
    acquired: int | bool = False
    attempt: bool = False  # passed beside the record
    mark: str | bool = False
    reported: bool = False
    history: list[int | str | bool] | bool = False
    replayed: bool = False


_decode = msgspec.msgpack.Decoder(_Record).decode


def key_of(text: str, attempt: bytes, packed: bytes) -> Key:
    """The key of what move_out.lua replies about it. Raises ValueError if it is damaged."""
    try:
        record = _decode(packed)
    except msgspec.DecodeError as error:
        raise ValueError(f"a record can't be read: {error}") from None
    key = Key(record.id, text, record.created / 1e6, record.expires / 1e6, lease=record.lease)
    if record.release:
        key.release_deadline = record.release / 1e6
        key.state = State.BLOCKED
    if isinstance(record.owner, str):
        key.owner = record.owner
    key.acquired_at = record.acquired / 1e6
    key.attempt = attempt or None
    key.state = _STATES.get(record.mark, key.state) if isinstance(record.mark, str) else key.state
    key.quarantine_pending = record.mark == _PENDING
    key.reported = record.reported
    if isinstance(record.history, list):
        failures, failed_at, outcome, reason, by_operator = (*record.history, False, False, False)[:5]
        key.history = History(
            int(failures),
            int(failed_at) / 1e6,
            Outcome(outcome) if isinstance(outcome, str) else None,
            reason if isinstance(reason, str) else None,
            by_operator if isinstance(by_operator, str) else None,
        )
    return key


def record_of(key: Key) -> bytes:
    """The record of a key for move_in.lua, which gets the attempt beside it."""
    history = key.history
    reports: list[int | str | bool] | bool = False
    if history != NO_HISTORY:
        words = (history.outcome, history.reason, history.operator_reason)
        reports = [history.failures, _micros(history.failed_at), *(word or False for word in words)]
    return _encode(_Record(
        key.id, _micros(key.created_at), key.lease, _micros(key.expires_deadline), _micros(key.release_deadline or 0),
        key.owner or False, (key.state is State.BLOCKED and _micros(key.acquired_at)) or False, False,
        _PENDING if key.quarantine_pending else _MARKS.get(key.state, False), key.reported, reports,
    ))  # fmt: skip


def _micros(seconds: float) -> int:
    return round(seconds * 1_000_000)
