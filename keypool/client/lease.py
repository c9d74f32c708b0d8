"""`with pool.lease() as key`: acquire, use, give back whatever happens.

The moments in which a signal could lose a key are few, and each is covered: while the answer of acquire is on
its way signals wait (signals.py); once it is here the key is registered to be given back at exit (held.py);
and while it is being given back signals wait again, for a few seconds at most.
"""

from __future__ import annotations

from types import TracebackType

from keypool.client import calls
from keypool.client.caller import Caller
from keypool.client.errors import KeyPoolError, LeaseLost
from keypool.client.held import HeldKey
from keypool.client.signals import Deferred, Unwinding
from keypool.client.wire import Leaving


class Lease:
    """A context manager, for one `with` at a time; each acquires anew."""

    def __init__(self, caller: Caller, owner: str | None, wait: float, signals: bool) -> None:
        self._caller = caller
        self._owner = owner
        self._wait = wait
        self._signals = signals
        self._open: tuple[HeldKey, Unwinding] | None = None

    def __enter__(self) -> HeldKey:
        if self._open is not None:
            raise RuntimeError("this lease is open; ask the pool for another one")
        unwinding = Unwinding(self._signals)
        held: HeldKey | None = None
        try:
            unwinding.begin()
            leaving = Leaving()
            with Deferred(leaving):
                held = hold(self._caller, self._owner, self._wait, leaving)
            self._open = held, unwinding
            return held
        except BaseException:
            self._open = None
            if held is not None:
                give_back(self._caller, held)
            unwinding.end()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is None:
            return
        (held, unwinding), self._open = self._open, None
        try:
            lost = give_back(self._caller, held)
        finally:
            unwinding.end()
        tell(lost, error)


def hold(caller: Caller, owner: str | None, wait: float, leaving: Leaving) -> HeldKey:
    """Acquire a key that is given back at exit at the latest."""
    leased, answer = caller.call_timed(calls.acquire(owner, wait), leaving)
    held = HeldKey(leased, answer, owner)
    held.register(caller, lambda patience: give_back(caller, held, patience))
    return held


def give_back(caller: Caller, held: HeldKey, patience: float | None = None) -> LeaseLost | None:
    """Unblock the key under its lease number; what that shows about the lease. Never raises KeyPoolError."""
    leaving = Leaving(always=True)
    with Deferred(leaving):
        text, most = held._text, held.patience()  # noqa: SLF001 - its text, even if the lease is over
        if not held.begin_return():
            return None
        call = calls.unblock(text, held.lease)
        try:
            return held.returned(
                caller.call(call, leaving, most if patience is None else min(most, patience))
            )
        except KeyPoolError as error:
            return held.not_returned(error)


def give_back_apart(caller: Caller, held: HeldKey, patience: float) -> LeaseLost | None:
    """The same by a caller of its own, which is closed."""
    try:
        return give_back(caller, held, patience)
    finally:
        caller.close()


def tell(lost: LeaseLost | None, error: BaseException | None) -> None:
    """Raise what giving back has shown, or note it on the error that is on its way already."""
    if lost is None:
        return
    if error is None:
        raise lost
    error.add_note(f"besides: {lost}")
