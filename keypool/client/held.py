"""A key while it is held: what `with pool.lease() as key` gives, synchronous or not.

It knows when its block ends and refuses to be used after. The end is reckoned from the moment at which the
answer can at the latest have left the server, never from a server's clock, so that it comes a little early
rather than late. It belongs to the process that acquired it: a forked child may use it, and doesn't give it
back.

What is still held when the interpreter ends is given back then (`atexit`): by daemon threads that were cut
off, and by event loops that were stopped with their tasks still waiting.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable

from keypool.client.clock import now
from keypool.client.errors import KeyPoolError, LeaseLost, StaleLease, UnknownKey
from keypool.client.shapes import LeasedKey, Unblocked, hint
from keypool.client.wire import Answer

log = logging.getLogger("keypool.client")

_LATEST_ON_THE_WAY = 0.5  # seconds that an answer to a waiting call is thought to travel, at most
_LAST_PATIENCE = 2.0

_held: set[HeldKey] = set()


class HeldKey:
    """A key that is yours until `remaining` is 0. `str(key)` is its text, as long as that is so."""

    def __init__(self, leased: LeasedKey, answer: Answer, owner: str | None) -> None:
        self.id = leased.id
        self.lease = leased.lease
        self.owner = owner
        self.release_in = leased.release_in
        self.pid = os.getpid()
        self._text = leased.key
        # When the answer to a call that waited has left, nobody says; it can't have travelled for long.
        travelled = min(_LATEST_ON_THE_WAY, leased.release_in / 20)
        self._ends_at = max(answer.sent_at, answer.received_at - travelled) + leased.release_in
        self._returned = False

    @property
    def key(self) -> str:
        """The text. Raises LeaseLost if the lease is over."""
        self.check()
        return self._text

    def __str__(self) -> str:
        return self.key

    def __repr__(self) -> str:
        state = "given back" if self._returned else f"{self.remaining:.1f} s remaining"
        return f"<HeldKey {self.hint} id={self.id} lease={self.lease}, {state}>"

    @property
    def hint(self) -> str:
        """First four characters, `…`, last four: what may be shown and logged."""
        return hint(self._text)

    @property
    def remaining(self) -> float:
        """Seconds until the lease is over: 0 if it is, or if the key was given back."""
        return 0.0 if self._returned else max(0.0, self._ends_at - now())

    @property
    def over(self) -> bool:
        """Whether the key may be somebody else's by now."""
        return self.remaining <= 0

    def check(self, seconds: float = 0.0) -> None:
        """Raise LeaseLost unless more than so many seconds remain: ask before what takes that long."""
        if self._returned:
            raise LeaseLost(f"key {self.hint} was given back")
        if self.remaining <= seconds:
            raise LeaseLost(
                f"the lease of key {self.hint} is over after its {self.release_in:.1f} s"
                if self.over
                else f"the lease of key {self.hint} has only {self.remaining:.1f} s left"
            )

    # -- giving it back

    def register(self, home: object, give_back: Callable[[float], object]) -> None:
        """From now on it is given back at exit at the latest, by a call with the seconds of patience."""
        self.home = home
        self._give_back = give_back
        _held.add(self)

    def begin_return(self) -> bool:
        """Whether it is this caller's to give back: True once, and only in the process that acquired it."""
        _held.discard(self)
        mine = not self._returned and self.pid == os.getpid()
        self._returned = True
        return mine

    def returned(self, answer: Unblocked) -> LeaseLost | None:
        """What the server's answer to giving it back means: None if it was still ours."""
        if answer.changed or answer.repeated:  # repeated: the lost answer may have freed it
            return None
        return LeaseLost(f"the lease of key {self.hint} was over before the key was given back")

    def not_returned(self, error: KeyPoolError) -> LeaseLost | None:
        """What a failure to give it back means: None if it was ours, and comes free by itself."""
        if isinstance(error, UnknownKey):
            return LeaseLost(f"key {self.hint} was deleted or expired while it was held")
        if isinstance(error, StaleLease):
            if error.repeated:
                return None
            return LeaseLost(f"key {self.hint} was served to somebody else before it was given back")
        left = max(0.0, self._ends_at - now())
        log.warning("key %s not given back (%s); it comes free in %.0f s", self.hint, error, left)
        return None

    def patience(self) -> float:
        """Seconds for which trying to give it back makes sense: afterwards it is free anyway."""
        return max(0.0, self._ends_at - now())


def give_all_back(home: object = None) -> None:
    """Give back what this process holds, or what it holds of one client. Never raises."""
    for each in held_of(home):
        try:
            each._give_back(_LAST_PATIENCE)  # noqa: SLF001 - of this module
        except Exception:
            log.exception("key %s not given back", each.hint)


def held_of(home: object = None) -> list[HeldKey]:
    """The keys that this process holds, or holds of one client."""
    return [each for each in list(_held) if each.pid == os.getpid() and home in (None, each.home)]


atexit.register(give_all_back)
