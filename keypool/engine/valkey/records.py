"""Records of keys as lua/common.lua has them, for keypool migrate. Servers leave them to the scripts."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
from msgspec import structs

from keypool.core.details import shared
from keypool.core.keys import NEVER, Group, Key, State, hint
from keypool.core.outcomes import NO_HISTORY, History, Outcome
from keypool.engine.valkey.calls import NEVER_US
from keypool.engine.valkey.link import Word
from keypool.engine.valkey.vault import Vault, details_in, info_of

_MARKS = {State.COOLING: "c", State.QUARANTINED: "q"}
_PENDING = "p"
_STATES = {mark: state for state, mark in _MARKS.items()}
_NEVER = 2**53  # the moment of expiry of a key that never expires (lua/common.lua)
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
    client: str | bool = False
    sealed: bool = False  # passed beside the record, as are `info` and `former`
    hint: str | bool = False  # made anew
    info: bool = False
    former: bool = False
    share: str | bool = False  # left behind
    paced: float | bool = False
    extended: int | bool = False
    seats: int | bool = False  # given anew
    served: int | bool = False


_decode = msgspec.msgpack.Decoder(_Record).decode


class Moved(NamedTuple):
    """A key as move_out.lua replies it, and what stands beside its record, empty if there is nothing."""

    text: bytes
    """Or its member, if it is sealed."""
    attempt: bytes
    sealed: bytes
    info: bytes
    former: bytes
    wanted: int
    """Seats of its secret that there shall be; 0 if it never had more than one."""
    cools_until: int
    """The end of its secret's cooldown."""
    record: bytes


def key_of(moved: Moved, vault: Vault | None) -> Key:
    """The key of what move_out.lua replies about it. Raises ValueError if it is damaged, WrongSecretsKey."""
    try:
        record, details = _decode(moved.record), details_in(moved.info)
        if moved.sealed:
            if vault is None:
                raise ValueError("a key is sealed, although the pool is not")
            text, data = vault.open(moved.sealed, record.id)
            details = structs.replace(details, data=data)
        else:
            text = moved.text.decode()
            if moved.former:
                details = structs.replace(details, former=moved.former.decode())
    except msgspec.DecodeError as error:
        raise ValueError(f"a record can't be read: {error}") from None
    expires = NEVER if record.expires > NEVER_US else record.expires / 1e6
    key = Key(record.id, text, record.created / 1e6, expires, lease=record.lease)
    key.details = shared(details)
    if moved.wanted:
        key.group = Group(moved.wanted, moved.cools_until / 1e6, record.paced / 1e6)
    else:
        key.paced_until = record.paced / 1e6
    if isinstance(record.client, str):
        key.client = record.client
    if record.release:
        key.release_deadline = record.release / 1e6
        key.state = State.BLOCKED
    if isinstance(record.owner, str):
        key.owner = record.owner
    key.acquired_at = record.acquired / 1e6
    key.attempt = moved.attempt or None
    key.state = _STATES.get(record.mark, key.state) if isinstance(record.mark, str) else key.state
    key.quarantine_pending = record.mark == _PENDING
    key.reported = record.reported
    key.extended = int(record.extended)
    key.served = int(record.served) or min(record.lease, 1)
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


def words_of(key: Key, vault: Vault | None) -> list[Word]:
    """The words of a key for move_in.lua."""
    details = key.details
    kept = structs.replace(details, former=None)
    group = key.group
    seats = (0, 0) if group is None else (group.wanted, _micros(group.cools_until))
    if vault is None:
        return [
            key.text, key.attempt or b"", b"", b"", info_of(kept), details.former or b"", *seats, _record_of(key),
        ]  # fmt: skip
    sealed = vault.seal(key.text, details.data, key.id)
    info = info_of(structs.replace(kept, data=None))
    former = b"" if details.former is None else vault.member(details.former)
    beside = (key.attempt or b"", sealed, hint(key.text), info, former)
    return [vault.member(key.text), *beside, *seats, _record_of(key)]


def _record_of(key: Key) -> bytes:
    history = key.history
    paced_until = key.paced_until if key.group is None else key.group.paced_until
    reports: list[int | str | bool] | bool = False
    if history != NO_HISTORY:
        words = (history.outcome, history.reason, history.operator_reason)
        reports = [history.failures, _micros(history.failed_at), *(word or False for word in words)]
    return _encode(_Record(
        key.id, _micros(key.created_at), key.lease, _micros(key.expires_deadline), _micros(key.release_deadline or 0),
        key.owner or False, (key.state is State.BLOCKED and _micros(key.acquired_at)) or False, False,
        _PENDING if key.quarantine_pending else _MARKS.get(key.state, False), key.reported, reports,
        client=key.client or False, paced=paced_until * 1e6 or False, extended=key.extended or False,
        served=key.served or False,
    ))  # fmt: skip


def _micros(seconds: float) -> int:
    return _NEVER if seconds == NEVER else round(seconds * 1_000_000)
