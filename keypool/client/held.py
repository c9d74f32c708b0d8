"""A key while it is held: what `with pool.lease() as key` gives, blocking or not. No I/O.

Once its lease has ended, `secret` raises LeaseLost. The end is counted from the earliest moment at which the answer
can have left the server, by this machine's clock alone, so it comes a little early rather than late. A key belongs
to the process that acquired it: a forked child may use it, but does not give it back.

A report of the holder is recorded, and sent in the request that gives the key back.

    the `with` ...                  with a report             without one
    ends well, or `release`         the report                ok
    ends by an exception            the report                no outcome
    never ends (exit, `close`)      the report                no outcome

Keys that are still held when the interpreter ends are given back then (`atexit`): those of daemon threads
that were cut off, and of event loops that were stopped with their tasks still waiting.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

from keypool.client import calls
from keypool.client.answers import Extended, LeasedKey, Outcome, Row, State, Unblocked, hint
from keypool.client.attempts import Steps, Timed, perform, result, results
from keypool.client.errors import (
    BlockLimit,
    KeyPoolError,
    LeaseLost,
    LeaseOver,
    StaleLease,
    UnknownKey,
    UnknownPool,
)
from keypool.client.reports import Report, checked_uses, judge, rate_limit, tidy, worse
from keypool.client.settings import DEFAULT_POOL, Settings, now

log = logging.getLogger("keypool.client")

_LATEST_ON_THE_WAY = 0.5  # seconds in transit, at most, assumed for the answer to a call that waited
_SHORTEST_TRY = 0.5  # seconds allowed for giving back a key whose lease has just ended
GONE = (UnknownKey, UnknownPool)
"""What a call about a key that was deleted raises: a pool may have been deleted with it."""
LAST_TRY = 2.0
"""Seconds allowed for giving back a key at exit, or when its client is closed."""

_held: set[Held] = set()


class Held:
    """A key that is yours until `remaining` is 0; until then `secret` is its text.

    HeldKey and AsyncHeldKey add what needs I/O: `lost`, `extend` and `release`.
    """

    def __init__(
        self,
        acquired: Timed[LeasedKey],
        owner: str,
        block_seconds: float | None = None,
        pool: str = DEFAULT_POOL,
    ) -> None:
        leased = acquired.result
        self.pool = pool
        """The name of the pool."""
        self.id = leased.id
        self.lease = leased.lease
        self.handle = leased.handle
        self.owner = owner
        self.release_in = leased.release_in
        self.unblocked: Unblocked | None = None
        """The answer when the key was given back."""
        self.not_extended: KeyPoolError | None = None
        """Why the lease goes on to its end and can't be extended any more; None as long as that isn't known."""
        self.name = leased.name
        """The name that an operator gave it; None without one."""
        self._text = leased.secret
        self._data = leased.data
        # When the server sent the answer to a call that waited is not known; it can't have been in transit for long.
        travelled = min(_LATEST_ON_THE_WAY, leased.release_in / 20)
        self._began_at = max(acquired.sent_at, acquired.received_at - travelled)
        self._released_at = self._began_at + leased.release_in
        self._expires_at = math.inf if leased.expires_in is None else self._began_at + leased.expires_in
        self._block_seconds = block_seconds
        self._stretch = leased.release_in if block_seconds is None else block_seconds
        self._lock = threading.Lock()
        self._report: Report | None = None
        self._uses: int | None = None
        self._over = ""
        self._returned = False
        self._pid = os.getpid()

    @property
    def secret(self) -> str:
        """The key's text. Raises LeaseLost if the lease has ended."""
        self.check()
        return self._text

    @property
    def data(self) -> dict[str, Any]:
        """What an operator stored with the key: `key.data["user"]`. Raises LeaseLost once the lease has ended."""
        self.check()
        return self._data

    def __repr__(self) -> str:
        state = self._over or f"{self.remaining:.1f} s remaining"
        return f"<{type(self).__name__} {self.hint} id={self.id} lease={self.lease}, {state}>"

    @property
    def hint(self) -> str:
        """First four characters, `…`, last four, fewer of a short text: what may be shown and logged."""
        return hint(self._text)

    @property
    def remaining(self) -> float:
        """Seconds until the key may no longer be used: 0 once its lease has ended or it has expired."""
        return 0.0 if self._over else max(0.0, min(self._released_at, self._expires_at) - now())

    @property
    def expires_in(self) -> float | None:
        """Seconds until the key expires, unless it is kept alive, which a lease does if necessary; None: never."""
        if self._over:
            return 0.0
        return None if self._expires_at == math.inf else max(0.0, self._expires_at - now())

    @property
    def over(self) -> bool:
        """Whether the key may be someone else's by now, or has expired."""
        return self.remaining <= 0

    def check(self, seconds: float = 0.0) -> None:
        """Raise LeaseLost unless more than `seconds` remain; call it before work that takes that long."""
        if self._over:
            raise LeaseLost(f"key {self.hint} {self._over}")
        if self.remaining > seconds:
            return
        if not self.over:
            raise LeaseLost(f"the lease of key {self.hint} has only {self.remaining:.1f} s left")
        if self._expires_at < self._released_at:
            raise LeaseLost(f"key {self.hint} expired while it was held")
        lasted = self._released_at - self._began_at
        raise LeaseLost(f"the lease of key {self.hint} ended after its {lasted:.1f} s")

    # -- what the holder reports

    @property
    def outcome(self) -> Outcome | None:
        """What was reported so far."""
        return None if self._report is None else self._report.outcome

    def ok(self, *, uses: int | None = None) -> None:
        """Report that the key worked. A `with` that ends well reports it by itself, unless something else was.

        This and the other reports may say how many `uses` the lease had: the last number is what a key with a pace is
        charged. Raises ValueError unless it is a whole number from 1.
        """
        self._record(Report(Outcome.OK), uses)

    def rate_limited(
        self, retry_after: float | None = None, reason: str | None = None, *, uses: int | None = None
    ) -> None:
        """Report that the service limits the key: it cools for `retry_after` seconds from now.

        If None, the pool decides for how long. Raises ValueError for a `retry_after` that is not a number from 0.
        """
        self._record(rate_limit(retry_after, reason), uses)

    def error(self, reason: str | None = None, *, uses: int | None = None) -> None:
        """Report a failure that may be the key's: it cools after several in a row."""
        self._record(Report(Outcome.ERROR, reason=reason), uses)

    def invalid(self, reason: str | None = None, *, uses: int | None = None) -> None:
        """Report that the service refuses the key: it is not served again until an operator restores it."""
        self._record(Report(Outcome.INVALID, reason=reason), uses)

    def report(self, response: object, *, uses: int | None = None) -> Outcome | None:
        """Report what a response, or an exception, of httpx, httpx2, requests or aiohttp means. Returns that.

        429, 402, and 503 with Retry-After: rate_limited. 401: invalid. Other 5xx and time-outs: error. Everything
        else reports nothing, and returns None. Raises TypeError for an object that is neither.
        """
        found = judge(response)
        self._record(found, uses)
        return None if found is None else found.outcome

    def _record(self, report: Report | None, uses: int | None) -> None:
        """Of several reports the worst one is sent."""
        if checked_uses(uses) is not None:
            self._uses = uses
        if report is None:
            return
        reason = tidy(report.reason, self._text, self.hint, self._data)
        with self._lock:
            self._report = worse(self._report, Report(report.outcome, report.ready_at, reason))

    # -- for the clients

    @property
    def expires_first(self) -> bool:
        """Whether the key would expire before its lease ends: then it has to be kept alive."""
        return self._expires_at <= self._released_at

    @property
    def extension_due_at(self) -> float:
        """The moment (`settings.now`) at which a third of the block has passed: time to extend it."""
        return self._released_at - self._stretch * 2 / 3

    @property
    def released_at(self) -> float:
        """The moment (`settings.now`) at which the lease ends unless it is extended."""
        return self._released_at

    def kept_alive(self, until: float) -> None:
        """Record a successful keepalive: the key expires at `until`."""
        self._expires_at = max(self._expires_at, until)
        self._end_moved(min(self._released_at, self._expires_at))

    def lose(self, why: str) -> None:
        """Record that the lease was lost, unless it had ended before. `why` continues "key 5TRx…Q0aZ "."""
        with self._lock:
            first = not self._over
            self._over = self._over or why
        if first:
            self._signal_lost()

    def _signal_lost(self) -> None:
        """Set `lost`."""

    def _end_moved(self, end: float) -> None:
        """The lease, or the key's life, now ends at this moment."""

    def _ended(self) -> None:
        """The key is being given back: whoever waits for `lost` waits in vain."""

    @property
    def is_of_this_process(self) -> bool:
        """False in a forked child, which leaves the key to its parent."""
        return self._pid == os.getpid()

    def register(self, give_back: Callable[[], object]) -> None:
        """Have `give_back` called when the interpreter ends, unless the key was given back before."""
        self._give_back = give_back
        _held.add(self)

    # -- steps

    def extension(
        self, settings: Settings, seconds: float | None = None, within: float = math.inf
    ) -> Steps[Extended]:
        """Extend the lease, by default by its block. Raises LeaseLost if it is lost.

        If it only can't be extended, raises BlockLimit, or LeaseOver: an operator will quarantine the key.
        """
        self.check()
        if self.handle is None:
            raise KeyPoolError("this server is too old to extend leases")
        seconds = self._block_seconds if seconds is None else seconds
        try:
            answer = yield from perform(calls.extend(self, seconds, None), settings, within)
        except (StaleLease, *GONE, LeaseOver, BlockLimit) as error:
            extended = yield from self._not_extended(error, settings, within)
            if extended is None:
                self.not_extended = error
                raise
            return extended
        self._moved(answer.sent_at + answer.result.release_in)
        if seconds is None:  # a lease that was repeated after a lost answer began with less than a block
            self._stretch = max(self._stretch, answer.result.release_in)
        return answer.result

    def _not_extended(self, error: KeyPoolError, settings: Settings, within: float) -> Steps[Extended | None]:
        """Find out what the refusal of an extension means. Raises LeaseLost.

        `lease-over` may mean that an operator will quarantine the key: then the lease goes on to its end. After a
        lost answer, `block-limit` may mean that the first attempt has extended the lease; the result is for that case.
        """
        if isinstance(error, StaleLease):
            self.lose("was leased to someone else while it was held")
        elif isinstance(error, GONE):
            self.lose("was deleted or expired while it was held")
        elif isinstance(error, LeaseOver) or error.repeated:
            row: Timed[Row] | None = None
            with contextlib.suppress(StaleLease, *GONE):
                row = yield from perform(calls.get(self), settings, within)
            if row is None or (row.result.state, row.result.lease) != (State.BLOCKED, self.lease):
                self.lose("was taken back while it was held")
            elif row.result.release_in is not None:
                before, left = self._released_at, row.result.release_in
                self._moved(row.sent_at + left)
                if isinstance(error, BlockLimit) and self._released_at > before + 1:
                    return Extended(self.id, self.lease, left, left)
        self.check()
        return None

    def _moved(self, until: float) -> None:
        self._released_at = max(self._released_at, until)
        self._end_moved(min(self._released_at, self._expires_at))

    def give_back(
        self, settings: Settings, within: float = math.inf, *, well: bool = False
    ) -> Steps[LeaseLost | None]:
        """Unblock it under its lease number, with the report; `well` is whether none means that the key is ok.

        Returns a LeaseLost if the lease was lost, and raises no KeyPoolError. Other failures are logged as warnings:
        the work was done with the key held, and the server releases it at its deadline.
        """
        if self._returned or not self.is_of_this_process:
            _held.discard(self)
            return None
        left = max(0.0, self._released_at - now())
        with self._lock:
            lost = "" if self._over == _GIVEN_BACK else self._over
            self._over = self._over or _GIVEN_BACK
            report = self._report or (Report(Outcome.OK) if well else None)
        self._ended()
        try:
            call = self._unblock(report)
            answer = yield from result(call, settings, min(within, max(left, _SHORTEST_TRY)))
        except KeyPoolError as error:
            found = self._not_returned(error)
        else:
            self.unblocked = answer
            found = self._was_returned(answer, lost, in_time=left > 0)
        self._returned = True  # only now: if the call is interrupted, it is repeated at exit
        _held.discard(self)
        if found is not None:
            self._signal_lost()
        return found

    def _unblock(self, report: Report | None) -> calls.Call[Unblocked]:
        if self.handle is None:  # an older server, which would refuse an outcome
            if report is not None and report.outcome is not Outcome.OK:
                log.warning("key %s: this server doesn't take reports (%s)", self.hint, report.outcome)
            return calls.unblock(self._text, self.lease)
        if report is None:
            return calls.unblock(self.handle, None, uses=self._uses)
        words = report.outcome, report.retry_after, report.reason
        return calls.unblock(self.handle, None, *words, uses=self._uses)

    def _was_returned(self, answer: Unblocked, lost: str, *, in_time: bool) -> LeaseLost | None:
        if lost:
            return LeaseLost(f"key {self.hint} {lost}")
        # repeated: the attempt whose answer was lost may have freed it. A report counts after the end of the lease.
        if in_time and (answer.changed or answer.repeated):
            return None
        return LeaseLost(f"the lease of key {self.hint} had ended before the key was given back")

    def _not_returned(self, error: KeyPoolError) -> LeaseLost | None:
        if isinstance(error, GONE):
            return LeaseLost(f"key {self.hint} was deleted or expired while it was held")
        if isinstance(error, StaleLease):
            if error.repeated:
                return None
            return LeaseLost(f"key {self.hint} was leased to someone else before it was given back")
        left = max(0.0, self._released_at - now())
        log.warning("key %s not given back (%s); it is released in %.0f s", self.hint, error, left)
        return None


_GIVEN_BACK = "was given back"


class LostEvent(threading.Event):
    """Set when a lease is lost, or its time has run out: then `is_set` is true, though nobody called `set`.

    Once the key is given back it is never set, and a `wait` ends with False. It needs no thread.
    """

    def __init__(self, ends_at: float) -> None:
        super().__init__()
        self._ends_at = ends_at
        self._given_back = False
        self._changed = threading.Event()

    def is_set(self) -> bool:
        """Whether the lease was lost."""
        return super().is_set() or (not self._given_back and now() >= self._ends_at)

    def set(self) -> None:
        """Record that the lease was lost."""
        super().set()
        self._changed.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the lease is lost, or the key given back, for `timeout` seconds at most. Returns `is_set`."""
        until = math.inf if timeout is None else now() + timeout
        while not self.is_set() and not self._given_back and (left := until - now()) > 0:
            self._changed.wait(min(left, max(0.0, self._ends_at - now())))
        return self.is_set()

    def move(self, ends_at: float) -> None:
        """The lease now ends at that moment (`settings.now`)."""
        self._ends_at = ends_at

    def end(self) -> None:
        """The key is given back in time, or its lease ended before."""
        if self.is_set():
            self.set()
        self._given_back = True
        self._changed.set()


def give_back_many(keys: Sequence[LeasedKey], settings: Settings) -> Steps[LeaseLost | None]:
    """Unblock keys that were acquired together, without a report. Results as of `Held.give_back`."""
    try:
        done = yield from results(calls.unblock_many(keys), settings)
    except UnknownPool:
        return LeaseLost("the keys were in a pool that is gone")
    except KeyPoolError as error:
        log.warning("%d keys not given back (%s); they are released by their deadlines", len(keys), error)
        return None
    count = 0 if done.repeated else len(done.unknown) + len(done.stale)
    return LeaseLost(f"{count} of the keys were lost before they were given back") if count else None


def raise_or_note(lost: LeaseLost | None, error: BaseException | None) -> None:
    """Raise `lost`, or add it as a note to the error that is already propagating."""
    if lost is None:
        return
    if error is None:
        raise lost
    error.add_note(f"besides: {lost}")


def held_by_this_process() -> list[Held]:
    """All keys that this process holds, of all clients."""
    return [each for each in list(_held) if each.is_of_this_process]


@atexit.register
def _give_all_back() -> None:
    for each in held_by_this_process():
        try:
            each._give_back()  # noqa: SLF001 - of this module
        except Exception:
            log.exception("key %s not given back", each.hint)
