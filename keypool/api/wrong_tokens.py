"""The consequences of a wrong token, on the API, the pages, the feed, /metrics and /login alike.

- It is counted.
- It is written to the audit log: for each address `LINES` lines at once and one more every `LINE_SECONDS`; the number
  of the others follows a minute later.
- Once an address has used up its burst, its answers are delayed, by a second at most. That slows down guessing, as a
  connection's requests are answered in order. A request with a valid token is never delayed.

At most `MOST_HELD` answers are delayed at a time; further ones are sent at once and their connections closed.
api_call.py and pages.py make the delay.
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
"""Wrong tokens of an address that are answered at once, and the seconds until there is one more."""

TRIES, TRY_SECONDS = 5, 12.0
"""The same for /login, where further wrong tokens are answered 429."""

LONGEST = 1.0
"""Seconds of the longest delay."""

MOST_HELD = 1000

LINES, LINE_SECONDS = 10, 6.0
_SUMMARY_SECONDS = 60.0
_ADDRESSES = 1000  # in a summary; the others are counted together
_OTHERS = "other addresses"
_log = logging.getLogger("keypool.audit")

KINDS = ("token", "sign_in")


class WrongTokens:
    """See the module. `counts` has the wrong tokens since the start, by kind."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(KINDS, 0)
        self.held = 0
        """Answers that are being delayed. The code that delays them maintains this count."""
        self._tokens = TokenBuckets(BURST, REGAINED_SECONDS, LONGEST)
        self._sign_ins = TokenBuckets(TRIES, TRY_SECONDS)
        self._lines = TokenBuckets(LINES, LINE_SECONDS)
        self._unwritten: Counter[str] = Counter()
        self._summary: asyncio.TimerHandle | None = None

    def token(self, mark: str, address: str, request_id: str) -> float:
        """Record a request with a wrong token, and return the seconds by which to delay its answer. O(1)."""
        self.counts["token"] += 1
        self._note("wrong-token", mark, address, request_id)
        return min(LONGEST, self._tokens.take(address, time.monotonic()))

    def sign_in(self, mark: str, address: str, request_id: str) -> float:
        """Record a wrong token at /login, and return the seconds until the next try, 0 if one was left. O(1)."""
        self.counts["sign_in"] += 1
        self._note("failed-sign-in", mark, address, request_id)
        return self._sign_ins.take(address, time.monotonic())

    def refused_sign_in(self, caller: Caller, address: str, request_id: str) -> None:
        """Record a valid token at /login whose role has no pages. Never delayed, as it isn't a guess. O(1)."""
        self.counts["sign_in"] += 1
        self._note("failed-sign-in", caller.token, address, request_id, caller)

    def room(self) -> bool:
        """Whether one more answer may be delayed."""
        return self.held < MOST_HELD

    def close(self) -> None:
        """Write the pending summary."""
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
