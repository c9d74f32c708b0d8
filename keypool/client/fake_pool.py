"""The pool of testing.py: what the server's pool does with keys, in the simplest way, for tests of other programs.

Every call looks at all keys, and first applies the deadlines that have passed. Calls take decoded JSON and return what
the server would, or raise Refused.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from keypool.client.answers import Outcome, State, hint
from keypool.client.pool_settings import OF_DEFAULT, POOL_SETTINGS, with_defaults, wrong_setting
from keypool.client.settings import DEFAULT_POOL

_COUNTED = (
    *("generated", "acquired", "unblocked", "released", "deleted", "expired", "kept_alive", "refused"),
    *("cooled", "quarantines", "restored", "imported", "paced"),
)

SETTINGS: dict[str, Any] = {name: setting.default for name, setting in POOL_SETTINGS.items()}
"""The default settings. The fake keeps all, and ignores `key_length`, `max_retry_after_seconds`, `rest_seconds`."""


class Refused(Exception):
    """The answer is a problem of this status and code, with these further members."""

    def __init__(self, status: int, code: str, detail: str = "", **more: Any) -> None:
        super().__init__(code)
        self.status = status
        self.code = code
        self.detail = detail or f"a fake {code}"
        self.more = more


@dataclass
class Key:
    """A key. `until` is the end of a block or of a cooldown."""

    id: int
    text: str = field(repr=False)
    created_at: datetime
    expires: float
    state: str = "available"
    until: float | None = None
    lease: int | None = None
    served: int = 0
    owner: str | None = None
    acquired: float = 0.0
    attempt: tuple[object, ...] | None = None
    reported: bool = False
    extended: int = 0
    leaving: bool = False  # an operator wants it quarantined when its lease ends
    failures: int = 0
    failed: float = 0.0
    outcome: str | None = None
    reason: str | None = None
    operator_reason: str | None = None
    name: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict, repr=False)
    pace: dict[str, float] | None = None
    paced: float = 0.0  # the theoretical arrival time of the pace
    wanted: int = 1  # seats of its secret
    cools: float = 0.0  # the end of its secret's cooldown


class FakePool:
    """The keys of one pool and their rules."""

    def __init__(self, name: str = DEFAULT_POOL, settings: Mapping[str, float | None] | None = None) -> None:
        self.name = name
        self.draining = False
        of_default = OF_DEFAULT if name == DEFAULT_POOL else {}
        self.settings = {**SETTINGS, **of_default, **(settings or {})}
        self.skipped = 0.0
        self.counts = dict.fromkeys(_COUNTED, 0)
        self.reports: list[tuple[str, str]] = []
        self.events: list[dict[str, Any]] = []
        self._keys: dict[int, Key] = {}
        self._past: list[tuple[Key, dict[str, Any]]] = []  # leases that have ended, with their keys
        self._ran_out: list[tuple[str | None, float]] = []
        self._ids = self._leases = 0

    # -- for tests

    @property
    def keys(self) -> list[str]:
        """All keys."""
        return self._texts(None)

    @property
    def blocked(self) -> list[str]:
        """The keys that are held."""
        return self._texts("blocked")

    @property
    def cooling(self) -> list[str]:
        """The keys that cool."""
        return self._texts("cooling")

    @property
    def quarantined(self) -> list[str]:
        """The keys that are not served until they are restored."""
        return self._texts("quarantined")

    def _texts(self, state: str | None) -> list[str]:
        return [key.text for key in self.live(state)]

    # -- its parts

    def setting(self, name: str) -> float:
        """A setting, of which null means endless."""
        value: float | None = self.settings[name]
        return math.inf if value is None else value

    @property
    def longest_block(self) -> float:
        """How long a lease may last with extensions."""
        return max(self.settings["max_block_seconds"] or 0.0, self.setting("block_seconds"))

    def now(self) -> float:
        """The moment on the clock of the keys."""
        return time.monotonic() + self.skipped

    def live(self, state: str | None = None) -> list[Key]:
        """All keys, or those in a state, after the deadlines that have passed."""
        now = self.now()
        for key in list(self._keys.values()):
            if key.expires <= now:
                del self._keys[key.id]
                self.counts["expired"] += 1
                self._record(key, "expired")
                self._happened("expired", key, "deadline")
            elif key.until is not None and key.until <= now:
                if key.state == "blocked":
                    self.counts["released"] += 1
                    self._ran_out.append((key.owner, now))
                    self._end(key, how="released")
                else:
                    key.state, key.until = "available", None
        if self.draining:
            self._keys = {id: key for id, key in self._keys.items() if key.state == "blocked"}
        return [key for key in self._keys.values() if state in (None, key.state)]

    def find(self, name: str) -> tuple[Key, int | None]:
        """The key of this text, `id:N` or handle, and the handle's lease number."""
        for key in self.live():
            if name in (key.text, f"id:{key.id}"):
                return key, None
            if name.startswith(f"h:{key.id}."):
                lease = name.split(".")[1]
                if lease.isdecimal() and name == handle(key.id, int(lease)):
                    if int(lease) != key.lease:
                        raise Refused(409, "stale-lease")
                    return key, key.lease
        raise Refused(404, "unknown-key")

    # -- the calls

    def generate(self, text: str | None = None) -> dict[str, Any]:
        """Make a key, of this text or one of its own."""
        self.check_open(1)
        key = self._add(f"fakekey{self._ids + 1:013}" if text is None else text)
        self.counts["generated"] += 1
        self._happened("generated", key)
        return {"id": key.id, "key": key.text, "state": "available", "expires_in": self._left(key)}

    def check_open(self, more: int) -> None:
        """Refuse if the pool is being deleted, or has no place for so many more keys."""
        if self.draining:
            raise Refused(409, "pool-draining")
        if len(self.live()) + more > self.setting("max_keys"):
            raise Refused(409, "pool-full")

    def _add(self, text: str) -> Key:
        self._ids += 1
        key = Key(self._ids, text, datetime.now(UTC), self.now() + self.setting("keepalive_seconds"))
        self._keys[key.id] = key
        return key

    def _left(self, key: Key) -> float | None:
        """Seconds until it expires, None if never."""
        return None if key.expires == math.inf else key.expires - self.now()

    def acquire(
        self,
        count: int,
        owner: str | None = None,
        block_seconds: float | None = None,
        attempt: tuple[object, ...] | None = None,
    ) -> list[dict[str, Any]]:
        """Up to `count` leases. An attempt that was made before gets those that it still holds."""
        again = [key for key in self.live("blocked") if attempt is not None and key.attempt == attempt]
        if again:
            return [self._leased(key) for key in again]
        self.check_open(0)
        block = self.setting("block_seconds")
        if block_seconds is not None and not min(1, block) <= block_seconds <= self.longest_block:
            raise Refused(400, "bad-request", "block_seconds is out of range")
        if not self.live("available"):
            raise Refused(404, "no-key-available", **self._why_none())
        chosen: list[Key] = []
        while len(chosen) < count and (free := self.live("available")):
            key = random.sample(free, 1)[0]
            chosen.append(key)
            self._leases += 1
            key.state, key.owner, key.lease, key.attempt = "blocked", owner, self._leases, attempt
            key.reported, key.acquired, key.extended = False, self.now(), 0
            key.served += 1
            key.until = key.acquired + (block_seconds or block)
            if pace := self._pace(key):
                key.paced = max(key.paced, key.acquired) + pace["seconds"] / pace["count"]
                self._share_pace(key)
            self.counts["acquired"] += 1
        return [self._leased(key) for key in chosen]

    def _why_none(self) -> dict[str, Any]:
        counts = {state: len(self.live(state)) for state in ("blocked", "cooling", "quarantined")}
        ends = [key.until - self.now() for key in self.live() if key.until is not None]
        return counts | ({"retry_after": max(0.0, min(ends))} if ends else {})

    def unblock(
        self,
        name: str,
        lease: int | None = None,
        outcome: str | None = None,
        retry_after: float | None = None,
        reason: str | None = None,
        *,
        uses: int = 1,
    ) -> dict[str, Any]:
        """End a lease, and take its holder's report."""
        key, number = self._latest(name, lease)
        if outcome is None:
            changed = key.state == "blocked"
            if retry_after is not None or reason is not None:
                raise Refused(400, "bad-request", "retry_after and reason go with an outcome")
            if changed:
                self.counts["unblocked"] += 1
                self._charge(key, uses)
                self._end(key)
            return self._unblocked(key, changed)
        if outcome not in tuple(Outcome) or number is None:
            raise Refused(400, "bad-request", "outcome is ok, rate_limited, error or invalid, with a lease")
        if retry_after is not None and (outcome != "rate_limited" or retry_after < 0):
            raise Refused(400, "bad-request", "retry_after is 0 or more, with rate_limited")
        if key.reported:
            return self._unblocked(key, False)
        self._charge(key, uses)
        guarded = self._take_report(key, outcome, retry_after, reason)
        return self._unblocked(key, True) | ({"guarded": True} if guarded else {})

    def _take_report(self, key: Key, outcome: str, retry_after: float | None, reason: str | None) -> bool:
        """Returns whether the guard prevented a quarantine."""
        now = self.now()
        self.reports.append((key.text, outcome))
        late = key.state != "blocked"
        key.reported, key.outcome, key.reason = True, outcome, reason
        leaving = key.leaving or key.state == "quarantined"
        gone = len({each.text for each in self.live("quarantined")})
        secrets = len({each.text for each in self._keys.values()})
        room = gone == 0 or (gone + 1) * 100 <= self.setting("max_quarantined_percent") * secrets
        quarantine = outcome == "invalid" and (leaving or room)
        cooldown = 0.0
        if outcome == "ok":
            key.failures = 0
        elif not quarantine:
            key.failures = self._failures(key) + 1
            key.failed = now
            cooldown = self._cooldown(key, outcome, retry_after)
            key.cools = max(key.cools, now + cooldown)
        key.leaving = key.leaving or quarantine
        if key.state == "blocked":
            self.counts["unblocked"] += 1
            self._end(key, now + cooldown, reported=True)
        elif quarantine and key.state != "quarantined":
            self._end(key)
        elif key.state in ("available", "cooling"):
            until = self._with_budget(key, max(now + cooldown, key.until or 0.0))
            if until > now:
                self._cool(key, until)
        if late:
            self._add_report(key)
        for seat in self._seats(key):
            if seat is not key:
                self._follow(seat, key, cooldown)
        return outcome == "invalid" and not quarantine

    def _cooldown(self, key: Key, outcome: str, retry_after: float | None) -> float:
        if retry_after is not None:
            return retry_after
        if outcome == "error" and key.failures < self.setting("error_threshold"):
            return 0.0
        doubled = self.setting("cooldown_seconds") * 2.0 ** min(key.failures - 1, 64)
        return min(doubled, self.setting("max_cooldown_seconds"))

    def _add_report(self, key: Key) -> None:
        for past, lease in self._past:
            if past is key and lease["lease"] == key.lease:
                lease |= {"outcome": key.outcome, "reason": key.reason}

    def _seats(self, key: Key) -> list[Key]:
        """All seats of a key's secret."""
        return [each for each in self._keys.values() if each.text == key.text]

    def _follows(self, key: Key, state: str) -> bool:
        """Whether another seat has moved before, which is what is counted."""
        return any(seat is not key and seat.state == state for seat in self._seats(key))

    def _follow(self, seat: Key, key: Key, cooldown: float) -> None:
        """A seat goes where another one has gone that was reported on, or will when its lease ends."""
        seat.failures, seat.failed, seat.outcome, seat.reason = (
            key.failures,
            key.failed,
            key.outcome,
            key.reason,
        )
        if key.leaving or key.state == "quarantined":
            if seat.state == "blocked":
                seat.leaving = True
            else:
                seat.state, seat.until = "quarantined", None
        elif cooldown:
            seat.cools = max(seat.cools, self.now() + cooldown)
            if seat.state in ("available", "cooling"):
                seat.state, seat.until = "cooling", max(seat.cools, seat.until or 0.0)

    def _purge(self, key: Key) -> None:
        del self._keys[key.id]
        self.counts["deleted"] += 1
        self._record(key, "deleted")
        self._happened("deleted", key)

    def extend(self, name: str, lease: int | None = None, seconds: float | None = None) -> dict[str, Any]:
        """Let a lease last longer."""
        key, number = self._latest(name, lease)
        if number is None:
            raise Refused(400, "bad-request", "extend needs a lease")
        if key.state != "blocked" or key.leaving or key.until is None:
            raise Refused(409, "lease-over")
        last = key.acquired + self.longest_block
        until = min(self.now() + (self.setting("block_seconds") if seconds is None else seconds), last)
        if until <= key.until:
            raise Refused(409, "block-limit")
        key.until = until
        key.extended += 1
        left = {"release_in": until - self.now(), "block_left": last - self.now()}
        return {"id": key.id, "lease": key.lease, **left}

    def quarantine(self, name: str, reason: str | None = None, now: bool = False) -> dict[str, Any]:
        """Take a key out of service."""
        key, _ = self.find(name)
        seats = self._seats(key)
        for seat in seats:
            seat.operator_reason = reason or seat.operator_reason
            seat.reported = seat.reported or now
            if seat.state != "quarantined":
                seat.leaving = True
                if seat.state != "blocked" or now:
                    if seat.state == "blocked":
                        self.counts["unblocked"] += 1
                        self._happened("unblocked", seat)
                    self._end(seat, how="revoked")
        return self._row_of(key, seats)

    def restore(self, name: str) -> dict[str, Any]:
        """Make a key available that cools or is quarantined."""
        key, _ = self.find(name)
        seats = self._seats(key)
        for seat in seats:
            seat.leaving, seat.failures, seat.outcome, seat.reason = False, 0, None, None
            seat.operator_reason, seat.cools = None, 0.0
        out = [seat for seat in seats if seat.state in ("cooling", "quarantined")]
        if out:
            self.counts["restored"] += 1
            self._happened("restored", key)
            for seat in out:
                self._end(seat)
        return self.row(key)

    def keepalive(self, name: str) -> dict[str, Any]:
        """Postpone the expiry."""
        key, _ = self._latest(name, None)
        key.expires = self.now() + self.setting("keepalive_seconds")
        self.counts["kept_alive"] += 1
        return {"id": key.id, "expires_in": self.settings["keepalive_seconds"]}

    def delete(self, name: str) -> None:
        """Purge a key."""
        for seat in self._seats(self.find(name)[0]):
            self._purge(seat)

    def history(self, name: str, limit: int = 50, after: str | None = None) -> dict[str, Any]:
        """The leases of a key that have ended."""
        leases = [lease for key, lease in reversed(self._past) if name == f"id:{key.id}"]
        if not leases:
            found, _ = self.find(name)
            leases = [lease for key, lease in reversed(self._past) if key is found]
        if after is not None:
            leases = [lease for lease in leases if lease["lease"] < int(after)]
        more = len(leases) > limit
        return {"history": leases[:limit], "next": str(leases[limit - 1]["lease"]) if more else None}

    def reveal(self, name: str) -> dict[str, Any]:
        """The text of a key."""
        key, _ = self.find(name)
        self._happened("revealed", key)
        return {"id": key.id, "key": key.text, **given(key)}

    # -- keys from elsewhere

    def import_key(self, item: Mapping[str, Any], expire: bool = False) -> tuple[Key, bool]:
        """The key that has the item's secret, and whether it is new."""
        if self.settings["keepalive_seconds"] is not None and not expire:
            raise Refused(409, "keys-would-expire")
        if (problem := _problem(item)) is not None:
            raise Refused(400, "bad-request", problem)
        secret = item["secret"]
        if (key := self._with(text=secret)) is not None:
            return key, False
        seats = item.get("seats") or 1
        self.check_open(seats)
        self._check_name(None, item.get("name"))
        key = self._add(secret)
        self._note(key, item)
        self.counts["imported"] += 1
        self._happened("imported", key)
        self._set_seats(key, seats)
        return key, True

    def _set_seats(self, key: Key, count: int) -> None:
        seats = self._seats(key)
        self.check_open(max(0, count - len(seats)))
        for _ in range(count - len(seats)):
            seat = self._add(key.text)
            seat.name, seat.labels, seat.data, seat.cools = key.name, key.labels, key.data, key.cools
            seat.pace, seat.paced = key.pace, key.paced
            if key.leaving or key.state == "quarantined":
                seat.state = "quarantined"
            elif (until := self._with_budget(seat, max(seat.cools, self.now()))) > self.now():
                self._cool(seat, until)
            self.counts["imported"] += 1
        for seat in reversed(seats):
            if len(self._seats(key)) > count and seat.state != "blocked":
                self._purge(seat)
        for seat in self._seats(key):
            seat.wanted = count

    def import_many(
        self, keys: Sequence[Mapping[str, Any]], exists: str = "skip", expire: bool = False
    ) -> dict[str, Any]:
        """Import keys one by one, but none if the pool hasn't room for all."""
        fresh = {item["secret"]: item.get("seats") or 1 for item in reversed(keys)}
        known = set(self.keys)
        self.check_open(sum(seats for secret, seats in fresh.items() if secret not in known))
        results: list[dict[str, Any]] = []
        seen: set[str] = set()
        for item in keys:
            try:
                key, new = self.import_key(item, expire)
                status = "created" if new else "duplicate" if key.text in seen else "existed"
                if status == "existed" and exists == "update":
                    self.update(f"id:{key.id}", **{name: item.get(name) for name in _NOTES})
                    status = "updated"
                seen.add(key.text)
                ids = self.ids(key.text)
                results.append({"status": status, "id": ids[0], "ids": ids})
            except Refused as refused:
                if refused.code == "keys-would-expire":
                    raise
                results.append({"status": "failed", "code": refused.code, "detail": refused.detail})
        counts = Counter(result["status"] for result in results)
        statuses = ("created", "updated", "existed", "duplicate", "failed")
        return {status: counts[status] for status in statuses} | {"results": results}

    def update(self, name: str, /, **patch: Any) -> dict[str, Any]:
        """Change name, labels, data or seats."""
        key, _ = self.find(name)
        if (problem := _problem({"secret": "x"} | patch)) is not None:
            raise Refused(400, "bad-request", problem)
        self._check_name(key, patch.get("name"))
        seats = self._seats(key)
        if patch.get("seats") is not None:
            self.check_open(max(0, patch["seats"] - len(seats)))
        for seat in seats:
            self._note(seat, patch)
        if patch.get("seats") is not None:
            self._set_seats(key, patch["seats"])
        return self._row_of(key, seats)

    def _row_of(self, key: Key, seats: list[Key]) -> dict[str, Any]:
        """The row of a key, or of the first seat that is left of its secret."""
        return self.row(next(seat for seat in (key, *seats) if seat.id in self._keys))

    def ids(self, text: str) -> list[int]:
        """The ids of all seats of a secret."""
        return [key.id for key in self.live() if key.text == text]

    def replace(self, name: str, secret: str) -> dict[str, Any]:
        """Give a key another text."""
        key, _ = self.find(name)
        if (problem := _problem({"secret": secret})) is not None:
            raise Refused(400, "bad-request", problem)
        if secret != key.text and self._with(text=secret) is not None:
            raise Refused(409, "secret-exists")
        changed = secret != key.text
        for seat in self._seats(key):
            seat.text = secret
            if changed:
                seat.paced = 0.0
        return self.restore(f"id:{key.id}")

    def look_up(self, text: str) -> dict[str, Any]:
        """The row of a key by its text, id, name or hint."""
        found = self._with(text=text) or self._with(name=text)
        if found is None:
            hinted = [key for key in self.live() if hint(key.text) == text]
            found = hinted[0] if hinted else self.find(text)[0]
        return self.row(found)

    def _with(self, **members: str) -> Key | None:
        """The key whose members are these."""
        pairs = members.items()
        found = (key for key in self.live() if all(getattr(key, name) == value for name, value in pairs))
        return next(found, None)

    def _check_name(self, key: Key | None, name: str | None) -> None:
        holder = self._with(name=name) if name else None
        if holder is not None and (key is None or holder.text != key.text):
            raise Refused(409, "name-taken")

    def _note(self, key: Key, item: Mapping[str, Any]) -> None:
        if item.get("name") is not None:
            key.name = item["name"] or None
        if item.get("labels") is not None:
            key.labels = dict(item["labels"])
        if item.get("data") is not None:
            key.data = dict(item["data"])
        if item.get("pace") is not None:
            key.pace = with_defaults("pace", dict(item["pace"]) or None)

    def row(self, key: Key) -> dict[str, Any]:
        """A key without its text."""
        left = None if key.until is None else key.until - self.now()
        operators = key.operator_reason if key.state == "quarantined" else None
        return {
            "id": key.id,
            "hint": hint(key.text),
            "state": key.state,
            "owner": key.owner,
            "lease": key.lease,
            "created_at": key.created_at.isoformat(timespec="milliseconds"),
            "expires_in": self._left(key),
            "release_in": left if key.state == "blocked" else None,
            "available_in": left if key.state == "cooling" else None,
            "failures": self._failures(key),
            "outcome": key.outcome,
            "reason": operators or key.reason,
            "client": None,
            "name": key.name,
            "labels": key.labels,
            "pace": key.pace,
            "seat": (ids := self.ids(key.text)).index(key.id) + 1,
            "seats": len(ids),
            "acquired_at": self._moment(key.acquired) if key.state == "blocked" else None,
            "served": key.served,
        }

    def _moment(self, at: float) -> str:
        """A moment of `now` as it stands in answers."""
        ago = timedelta(seconds=self.now() - at)
        return (datetime.now(UTC) - ago).isoformat(timespec="milliseconds")

    def owners(self) -> dict[str, Any]:
        """Who holds keys, in order of name."""
        rows: dict[str | None, dict[str, Any]] = {}
        for key in sorted(self.live("blocked"), key=lambda key: key.lease or 0):
            lately = [owner for owner, at in self._ran_out if at > self.now() - 300]
            first = {
                "owner": key.owner,
                "client": None,
                "held": 0,
                "acquired_at": self._moment(key.acquired),
                "released": lately.count(key.owner),
            }
            rows.setdefault(key.owner, first)["held"] += 1
        return {"owners": sorted(rows.values(), key=lambda row: row["owner"] or ""), "next": None}

    def release_owner(self, owner: str, client: str | None = None) -> dict[str, Any]:
        """End the leases of an owner. No token has a name here."""
        held = [key for key in self.live("blocked") if key.owner == owner and client is None]
        for key in held:
            self._happened("unblocked", key)
            self._end(key, how="revoked")
        self.counts["unblocked"] += len(held)
        return {"released": len(held)}

    def rare_events(self, kind: str | None = None) -> dict[str, Any]:
        """Rare events, newest first. Here each key has its own."""
        self.live()
        return {"events": [e for e in reversed(self.events) if kind in (None, e["event"])], "next": None}

    def stats(self) -> dict[str, Any]:
        """All counts."""
        now = {state.value: len(self.live(state)) for state in State} | {
            "total": len(self._keys),
            "waiting": 0,
        }
        return {**now, **self.counts, "uptime": 0.0, "engine": "fake", "version": "0"}

    # -- their parts

    def _happened(self, event: str, key: Key, by: str = "operator") -> None:
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.events.append({
            "event": event, "id": key.id, "hint": hint(key.text), "owner": key.owner, "lease": key.lease, "at": at,
            "by": by, "actor": None, "count": 1,
        })  # fmt: skip
        del self.events[:-1000]

    def _latest(self, name: str, lease: int | None) -> tuple[Key, int | None]:
        key, number = self.find(name)
        seats = [seat for seat in self._seats(key) if name == seat.text]
        if len(seats) > 1:
            if lease is None:
                raise Refused(409, "many-seats")
            key = next((seat for seat in seats if seat.lease == lease), key)
        if number is not None and lease not in (None, number):
            raise Refused(400, "bad-request", "lease is another one than that of the handle")
        number = lease if number is None else number
        if number is not None and number != key.lease:
            raise Refused(409, "stale-lease")
        return key, number

    def _end(
        self, key: Key, cool_until: float = 0.0, *, how: str = "unblocked", reported: bool = False
    ) -> None:
        """A lease ends, or an idle key is quarantined."""
        self._record(key, how, reported=reported)
        key.state, key.until, key.owner, key.attempt = "available", None, None, None
        if key.leaving:
            if not self._follows(key, "quarantined"):
                self.counts["quarantines"] += 1
                self._happened("quarantined", key)
            key.leaving, key.state = False, "quarantined"
        else:
            cool_until = self._with_budget(key, max(cool_until, key.cools, self.now()))
            if cool_until > self.now():
                self._cool(key, cool_until)
        if len(self._seats(key)) > key.wanted:
            self._purge(key)

    def _pace(self, key: Key) -> dict[str, float] | None:
        return key.pace or self.settings["pace"]

    def _charge(self, key: Key, uses: int) -> None:
        if pace := self._pace(key):
            key.paced = (key.paced or self.now()) + (uses - 1) * pace["seconds"] / pace["count"]
            self._share_pace(key)

    def _share_pace(self, key: Key) -> None:
        """Charge the other seats of a key's secret, too: those that nobody holds cool until there is budget."""
        for seat in self._seats(key):
            if seat is not key:
                seat.paced = key.paced
                if seat.state in ("available", "cooling"):
                    until = self._with_budget(seat, seat.until or self.now())
                    if until > (seat.until or self.now()):
                        self._cool(seat, until)

    def _with_budget(self, key: Key, until: float) -> float:
        """The end of a cooldown, not before the key has budget."""
        pace = self._pace(key)
        ready = key.paced - (pace["burst"] - 1) * pace["seconds"] / pace["count"] if pace else 0.0
        self.counts["paced"] += ready > until and not self._follows(key, "cooling")
        return max(until, ready)

    def _record(self, key: Key, how: str, *, reported: bool = False) -> None:
        """Keep a lease that ends in this way, if the key has one."""
        most = int(self.setting("history_leases"))
        if key.state != "blocked" or not most:
            return
        end = self.now()
        if how in ("released", "expired"):
            end = key.expires if how == "expired" or key.until is None else key.until
        ended_at = datetime.now(UTC) + timedelta(seconds=end - self.now())
        lease = {
            "lease": key.lease,
            "owner": key.owner,
            "client": None,
            "acquired_at": (ended_at - timedelta(seconds=end - key.acquired)).isoformat(
                timespec="milliseconds"
            ),
            "ended_at": ended_at.isoformat(timespec="milliseconds"),
            "held": round(end - key.acquired, 3),
            "how": how,
            "outcome": key.outcome if reported else None,
            "reason": key.reason if reported else None,
            "extended": key.extended,
        }
        self._past.append((key, lease))
        del self._past[:-most]

    def _cool(self, key: Key, until: float) -> None:
        self.counts["cooled"] += key.state != "cooling" and not self._follows(key, "cooling")
        key.state, key.until = "cooling", until

    def _failures(self, key: Key) -> int:
        return key.failures if self.now() < key.failed + self.setting("forget_seconds") else 0

    def _leased(self, key: Key) -> dict[str, Any]:
        assert key.lease is not None
        assert key.until is not None
        times = {"release_in": key.until - self.now(), "expires_in": self._left(key)}
        return {
            "id": key.id,
            "key": key.text,
            "lease": key.lease,
            "handle": handle(key.id, key.lease),
            **times,
            **given(key),
        }

    def _unblocked(self, key: Key, changed: bool) -> dict[str, Any]:
        answer: dict[str, Any] = {"id": key.id, "state": key.state, "changed": changed}
        if key.state == "cooling" and key.until is not None:
            answer["available_in"] = key.until - self.now()
        return answer


def given(key: Key) -> dict[str, Any]:
    """What an operator gave a key that only its holders see, and its name."""
    return {name: value for name, value in (("name", key.name), ("data", key.data)) if value}


def handle(id: int, lease: int) -> str:
    """The handle of a lease. Anybody can make it: this pool is a fake."""
    digest = hashlib.blake2b(f"{id}.{lease}".encode(), digest_size=8).digest()
    return f"h:{id}.{lease}.{base64.urlsafe_b64encode(digest)[:-1].decode()}"


_RESULTS = {
    "unknown-key": "unknown",
    "stale-lease": "stale",
    "lease-over": "over",
    "block-limit": "limit",
    "many-seats": "many_seats",
}


_NOTES = ("name", "labels", "data", "pace", "seats")


def _problem(item: Mapping[str, Any]) -> str | None:
    """What is out of range in a key to be imported."""
    if not 1 <= len(item["secret"].encode()) <= 4096:
        return "secret has 1 to 4096 bytes"
    if len(item.get("name") or "") > 63:
        return "name has at most 63 characters"
    if len(item.get("labels") or {}) > 16:
        return "a key has at most 16 labels"
    if len(json.dumps(item.get("data") or {}).encode()) > 4096:
        return "data has at most 4096 bytes as JSON"
    if item.get("pace") and (takes := wrong_setting("pace", item["pace"])) is not None:
        return f"pace takes {takes}"
    if not 1 <= (1 if item.get("seats") is None else item["seats"]) <= 100:
        return "a key has 1 to 100 seats"
    return None


def batch(call: Callable[..., object], items: Iterable[Any], **more: Any) -> dict[str, Any]:
    """The answer of a batch, whose items are names or objects of the call's arguments."""
    done: dict[str, Any] = {"done": 0, "unknown": [], "stale": [], "over": [], "limit": [], "many_seats": []}
    for item in items:
        members = dict(item) if isinstance(item, dict) else {"key": item}
        name = members.pop("key")
        try:
            call(name, **members, **more)
            done["done"] += 1
        except Refused as refused:
            if refused.code not in _RESULTS:
                raise
            done[_RESULTS[refused.code]].append(name)
    return done
