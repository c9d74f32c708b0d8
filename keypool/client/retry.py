"""When a failed call is sent again, and how long after: the rule, without any I/O.

    the failure says that ...            the call is sent again
    it did not happen                    whatever call it is
    it may have happened                 if the call is safe to repeat (the table in calls.py)
    trying again can't help              never

"It did not happen" is a connection that could not be made or broke before the whole request was handed to
the system, and the server's own `loading`, `draining` and `too-many-waiters`. "It may have happened" is a broken
connection or a time-out after that, `storage-unavailable`, and 502, 503 or 504 of something in between, which
doesn't say whether it had asked the server first. Everything else (404, 409, garbage) is an answer, and
stands.
"""

from __future__ import annotations

import json
import random
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar

from keypool.client.calls import BASE, Call
from keypool.client.clock import now
from keypool.client.errors import (
    AnswerLost,
    GatewayError,
    KeyPoolError,
    Unavailable,
    UnexpectedAnswer,
    UnknownKey,
    Unreachable,
    from_answer,
)
from keypool.client.shapes import Done, Unblocked
from keypool.client.wire import Address, Answer, Leaving, Request

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Retry:
    """How patient a client is.

    `seconds` is how long after its first failure a call is still sent again: 0 is never. The pauses begin at
    `first` seconds, double up to `most`, and each is shortened at random by up to a half, so that many
    clients of one server don't come back at the same moment. A `Retry-After` makes a pause longer; one that
    goes beyond `seconds` ends the matter at once.
    """

    seconds: float = 15.0
    first: float = 0.1
    most: float = 3.0

    def pause(self, failures: int) -> float:
        """Seconds to wait after so many failures."""
        whole = min(self.most, self.first * 2.0 ** min(failures - 1, 30))
        return whole * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, hides nothing


class Attempts(Generic[T]):
    """One call on its way through its attempts.

    Whoever has the I/O sends `request()` and tells `answered` or `failed`, which return the seconds to pause
    before the next attempt, or None when `result` is there, or raise the error that stands.
    """

    result: T
    answer: Answer

    def __init__(
        self,
        call: Call[T],
        address: Address,
        token: str | None,
        timeout: float,
        retry: Retry,
        *,
        leaving: Leaving | None = None,
    ) -> None:
        self._call = call
        self._timeout = timeout
        self._retry = retry
        self._leaving = leaving
        self._target = f"{address.prefix}{BASE}{call.path}"
        self._headers = _headers(call, address, token)
        self._began_at = now()
        self._failures = 0
        self._patient_until: float | None = None
        self._repeated = False  # whether an earlier attempt may have happened

    def request(self) -> Request:
        """The next attempt. What was waited before is taken off `wait`."""
        call = self._call
        wait = max(0.0, call.wait - (now() - self._began_at)) if self._failures else call.wait
        body = call.body
        if wait:
            body = {**(body or {}), "wait": round(wait, 3)}
        sent = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        return Request(
            call.method,
            self._target,
            self._headers,
            sent,
            self._timeout,
            wait,
            call.repeatable,
            self._leaving,
        )

    def answered(self, answer: Answer) -> float | None:
        """An answer came."""
        self.answer = answer
        if answer.status >= 400:
            error = from_answer(answer.status, answer.body)
            error.retry_after = _retry_after(answer) if error.retry_after is None else error.retry_after
            return self.failed(error)
        self.result = self._read(answer)
        return None

    def failed(self, error: KeyPoolError) -> float | None:
        """No answer came, or one that says no."""
        error.repeated = self._repeated
        if self._call.gone is not None and self._repeated and isinstance(error, UnknownKey):
            self.result = self._call.gone()
            return None
        left = self._leaving is not None and self._leaving.left
        if left or not _may_help(error) or (error.may_have_happened and not self._call.repeatable):
            raise error
        self._repeated = self._repeated or error.may_have_happened
        self._failures += 1
        return self._pause(error)

    def _pause(self, error: KeyPoolError) -> float:
        pause = max(self._retry.pause(self._failures), error.retry_after or 0.0)
        if self._patient_until is None:
            self._patient_until = now() + self._retry.seconds
        if now() + pause > self._patient_until:
            raise error
        return pause

    def _read(self, answer: Answer) -> T:
        try:
            value = json.loads(answer.body) if answer.body else None
        except (ValueError, RecursionError):
            value = None
        if answer.status >= 300:
            raise UnexpectedAnswer(f"answered {answer.status}: is the URL right?", answer.status)
        try:
            result = self._call.read(value)
        except UnexpectedAnswer as error:
            raise UnexpectedAnswer(f"{self._call.name}: {error}; is the URL right?", answer.status) from None
        if self._repeated and isinstance(result, Done | Unblocked):
            return replace(result, repeated=True)
        return result


def _may_help(error: KeyPoolError) -> bool:
    if isinstance(error, Unreachable):
        return error.transient
    return isinstance(error, AnswerLost | GatewayError | Unavailable)


def _headers(call: Call[Any], address: Address, token: str | None) -> Mapping[str, str]:
    headers = {
        "Host": address.authority,
        "Accept": "application/json",
        "User-Agent": "keypool-client",
        # One id for all attempts: the server's log shows that they belong together.
        "X-Request-Id": f"c-{secrets.token_hex(8)}",
    }
    if call.body is not None or call.wait:
        headers["Content-Type"] = "application/json"
    if token:
        headers["Authorization"] = f"Bearer {token}"
    return headers


def _retry_after(answer: Answer) -> float | None:
    """What the header says, in seconds; a date counts from the answer's own, as clocks disagree."""
    given = answer.header("retry-after")
    if given is None:
        return None
    if given.isascii() and given.isdigit():
        return float(given[:9])
    try:
        since = parsedate_to_datetime(answer.header("date") or "")
        return max(0.0, (parsedate_to_datetime(given) - since).total_seconds())
    except (ValueError, TypeError):
        return None
