"""What a wrong token leads to, on the API, the pages, the feed, /metrics and /login alike.

It is counted, always; written to the audit log, up to `LINES` lines at once and one more each `LINE_SECONDS` for
each address, the rest as a number a minute later; and once an address has spent its burst of them, its answers are
held back, by a second at most. That slows down guessing, as a connection's requests are answered in order, and
never costs the owner of a right token anything: a right token is not looked at here at all.

Held back are `MOST_HELD` answers at a time. Beyond that an answer goes at once and ends its connection.

What this module does not do: hold an answer back (handlers/api.py and handlers/pages.py do), or know a request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter

from keypool.api.auth import Caller
from keypool.api.throttle import TokenBuckets
from keypool.ops.audit import audit

BURST, REGAINED_SECONDS = 30, 1 / 3
"""Wrong tokens of an address that are answered at once, and how long one more takes to come back."""

TRIES, TRY_SECONDS = 5, 12.0
"""The same for /login, where a wrong token beyond them is answered 429."""

LONGEST = 1.0
"""Seconds for which an answer is held back at most."""

MOST_HELD = 1000

LINES, LINE_SECONDS = 10, 6.0
_SUMMARY_SECONDS = 60.0
_ADDRESSES = 1000  # in a summary; the others are counted together
_OTHERS = "other addresses"
_log = logging.getLogger("keypool.audit")

KINDS = ("token", "sign_in")


class WrongTokens:
    """See the module. `counts` are by kind, for /metrics."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(KINDS, 0)
        self.held = 0
        """Answers that are being held back; whoever holds one back counts it."""
        self._tokens = TokenBuckets(BURST, REGAINED_SECONDS, LONGEST)
        self._sign_ins = TokenBuckets(TRIES, TRY_SECONDS)
        self._lines = TokenBuckets(LINES, LINE_SECONDS)
        self._unwritten: Counter[str] = Counter()
        self._summary: asyncio.TimerHandle | None = None

    def token(self, mark: str, address: str, request_id: str) -> float:
        """A request came with a token that nobody knows; the seconds to hold the answer back. O(1)."""
        self.counts["token"] += 1
        self._note("wrong-token", mark, address, request_id)
        return min(LONGEST, self._tokens.take(address, time.monotonic()))

    def sign_in(self, mark: str, address: str, request_id: str) -> float:
        """A wrong token was tried at /login; the seconds until the next try, 0 if there was one left. O(1)."""
        self.counts["sign_in"] += 1
        self._note("failed-sign-in", mark, address, request_id)
        return self._sign_ins.take(address, time.monotonic())

    def refused_sign_in(self, caller: Caller, address: str, request_id: str) -> None:
        """A known token was tried at /login whose role has no pages. Nothing to guess: not slowed down. O(1)."""
        self.counts["sign_in"] += 1
        self._note("failed-sign-in", caller.token, address, request_id, caller)

    def room(self) -> bool:
        """Whether one more answer may be held back."""
        return self.held < MOST_HELD

    def close(self) -> None:
        """Write what isn't written yet."""
        if self._summary is not None:
            self._summary.cancel()
            self._summarise()

    def _note(self, act: str, mark: str, address: str, request_id: str, caller: Caller | None = None) -> None:
        if self._lines.take(address, time.monotonic()) > 0:
            crowded = len(self._unwritten) >= _ADDRESSES and address not in self._unwritten
            self._unwritten[_OTHERS if crowded else address] += 1
            if self._summary is None:
                loop = asyncio.get_running_loop()
                self._summary = loop.call_later(_SUMMARY_SECONDS, self._summarise)
            return
        role, outcome = ("none", "unauthorized") if caller is None else (caller.role.value, "forbidden")
        audit(act, role=role, token=mark, address=address, request_id=request_id, outcome=outcome)

    def _summarise(self) -> None:
        self._summary = None
        unwritten, self._unwritten = self._unwritten, Counter()
        for address, count in unwritten.items():
            fields = {"act": "wrong-tokens", "address": address, "suppressed": count}
            _log.info(
                "%d more wrong tokens from %s, not listed one by one", count, address, extra={"audit": fields}
            )
