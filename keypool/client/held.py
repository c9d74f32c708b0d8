"""A key while it is held: what `with pool.lease() as key` gives, blocking or not. No I/O.

Once its lease has ended, `secret` raises LeaseLost. The end is counted from the earliest moment at which the answer
can have left the server, by this machine's clock alone, so it comes a little early rather than late. A key belongs
to the process that acquired it: a forked child may use it, but does not give it back.

Keys that are still held when the interpreter ends are given back then (`atexit`): those of daemon threads
that were cut off, and of event loops that were stopped with their tasks still waiting.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
from collections.abc import Callable, Sequence

from keypool.client import calls
from keypool.client.answers import LeasedKey, Unblocked, hint
from keypool.client.attempts import Outcome, Steps, perform, result, results
from keypool.client.errors import KeyPoolError, LeaseLost, StaleLease, UnknownKey
from keypool.client.settings import Settings, default_owner, now

log = logging.getLogger("keypool.client")

_LATEST_ON_THE_WAY = 0.5  # seconds in transit, at most, assumed for the answer to a call that waited
_SHORTEST_TRY = 0.5  # seconds allowed for giving back a key whose lease has just ended
LAST_TRY = 2.0
"""Seconds allowed for giving back a key at exit, or when its client is closed."""

_held: set[HeldKey] = set()


class HeldKey:
    """A key that is yours until `remaining` is 0; until then `secret` is its text."""

    def __init__(self, acquired: Outcome[LeasedKey], owner: str) -> None:
        leased = acquired.result
        self.id = leased.id
        self.lease = leased.lease
        self.owner = owner
        self.release_in = leased.release_in
        self._text = leased.secret
        # When the server sent the answer to a call that waited is not known; it can't have been in transit for long.
        travelled = min(_LATEST_ON_THE_WAY, leased.release_in / 20)
        answered_at = max(acquired.sent_at, acquired.received_at - travelled)
        self._released_at = answered_at + leased.release_in
        self._expires_at = answered_at + leased.expires_in
        self._over = ""
        self._returned = False
        self._pid = os.getpid()

    @property
    def secret(self) -> str:
        """The key's text. Raises LeaseLost if the lease has ended."""
        self.check()
        return self._text

    def __repr__(self) -> str:
        state = self._over or f"{self.remaining:.1f} s remaining"
        return f"<HeldKey {self.hint} id={self.id} lease={self.lease}, {state}>"

    @property
    def hint(self) -> str:
        """First four characters, `…`, last four: what may be shown and logged."""
        return hint(self._text)

    @property
    def remaining(self) -> float:
        """Seconds until the key may no longer be used: 0 once its lease has ended or it has expired."""
        return 0.0 if self._over else max(0.0, min(self._released_at, self._expires_at) - now())

    @property
    def expires_in(self) -> float:
        """Seconds until the key expires, unless it is kept alive, which a lease does if necessary."""
        return 0.0 if self._over else max(0.0, self._expires_at - now())

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
        raise LeaseLost(f"the lease of key {self.hint} ended after its {self.release_in:.1f} s")

    # -- for the clients

    @property
    def expires_first(self) -> bool:
        """Whether the key would expire before its lease ends: then it has to be kept alive."""
        return self._expires_at <= self._released_at

    def kept_alive(self, until: float) -> None:
        """Record a successful keepalive: the key expires at `until`."""
        self._expires_at = max(self._expires_at, until)

    def died(self) -> None:
        """Record that the key was deleted or expired."""
        self._over = self._over or "was deleted or expired while it was held"

    @property
    def is_of_this_process(self) -> bool:
        """False in a forked child, which leaves the key to its parent."""
        return self._pid == os.getpid()

    def register(self, give_back: Callable[[], object]) -> None:
        """Have `give_back` called when the interpreter ends, unless the key was given back before."""
        self._give_back = give_back
        _held.add(self)

    def give_back(self, settings: Settings, within: float = math.inf) -> Steps[LeaseLost | None]:
        """Unblock it under its lease number. Returns a LeaseLost if the lease was lost, and raises no KeyPoolError.

        Other failures are logged as warnings: the work was done with the key held, and the server releases it at
        its deadline.
        """
        if self._returned or not self.is_of_this_process:
            _held.discard(self)
            return None
        left = max(0.0, self._released_at - now())
        self._over = self._over or "was given back"
        try:
            call = calls.unblock(self._text, self.lease)
            answer = yield from result(call, settings, min(within, max(left, _SHORTEST_TRY)))
        except KeyPoolError as error:
            lost = self._not_returned(error)
        else:
            lost = self._was_returned(answer)
        self._returned = True  # only now: if the call is interrupted, it is repeated at exit
        _held.discard(self)
        return lost

    def _was_returned(self, answer: Unblocked) -> LeaseLost | None:
        if answer.changed or answer.repeated:  # repeated: the attempt whose answer was lost may have freed it
            return None
        return LeaseLost(f"the lease of key {self.hint} had ended before the key was given back")

    def _not_returned(self, error: KeyPoolError) -> LeaseLost | None:
        if isinstance(error, UnknownKey):
            return LeaseLost(f"key {self.hint} was deleted or expired while it was held")
        if isinstance(error, StaleLease):
            if error.repeated:
                return None
            return LeaseLost(f"key {self.hint} was leased to someone else before it was given back")
        left = max(0.0, self._released_at - now())
        log.warning("key %s not given back (%s); it is released in %.0f s", self.hint, error, left)
        return None


def hold(settings: Settings, owner: str | None, wait: float | None) -> Steps[HeldKey]:
    """Acquire a key. `owner` None is `host:pid`. Raises KeyPoolError, and ValueError for a wrong `wait`."""
    owner = default_owner() if owner is None else owner
    return HeldKey((yield from perform(calls.acquire(owner, wait), settings)), owner)


def give_back_many(keys: Sequence[LeasedKey], settings: Settings) -> Steps[LeaseLost | None]:
    """Unblock keys that were acquired together. Results as of `HeldKey.give_back`."""
    try:
        done = yield from results(calls.unblock_many(keys), settings)
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


def held_by_this_process() -> list[HeldKey]:
    """All keys that this process holds, of all clients."""
    return [each for each in list(_held) if each.is_of_this_process]


@atexit.register
def _give_all_back() -> None:
    for each in held_by_this_process():
        try:
            each._give_back()  # noqa: SLF001 - of this module
        except Exception:
            log.exception("key %s not given back", each.hint)
