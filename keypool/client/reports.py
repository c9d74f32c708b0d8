"""What a holder reports about a key, and what a response of a service says about the key that it was sent with.

    status of the response                      report
    429; 402 (out of credit)                    rate_limited, for Retry-After if it has one
    503 with Retry-After                        rate_limited, for that long
    401                                         invalid
    other 5xx, and exceptions of time-outs      error
    everything else                             none: 403, for example, is more often about the request than the key

Responses are recognised by their attributes, not by their classes, so none of the libraries is imported: httpx,
httpx2 and requests have `status_code`, aiohttp, urllib3 and urllib have `status`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import MappingProxyType
from typing import Any

from keypool.client.answers import Outcome
from keypool.client.settings import now

LONGEST_RETRY_AFTER = 1e15
"""Seconds; the server refuses more."""

MOST_USES = 10**9

_LONGEST_HEADER = 1e9  # seconds, about 30 years: a longer Retry-After is cut to it
_LONGEST_REASON = 200  # characters
_SHORTEST_DATA = 4  # characters; a shorter text of a key's data is found in any sentence
_SECONDS = re.compile(r"[0-9]+(\.[0-9]*)?", re.ASCII)
# Base classes of requests, httpx and httpx2, urllib3.
_TIMEOUTS = {"Timeout", "TimeoutException", "TimeoutError"}
_SEVERITY = (Outcome.OK, Outcome.ERROR, Outcome.RATE_LIMITED, Outcome.INVALID)


@dataclass(frozen=True, slots=True)
class Report:
    """An outcome; for a rate limit the moment (`settings.now`) at which it ends, if known; a reason for people."""

    outcome: Outcome
    ready_at: float | None = None
    reason: str | None = None

    @property
    def retry_after(self) -> float | None:
        """Seconds until the rate limit ends, at least 0; None if not known."""
        return None if self.ready_at is None else max(0.0, round(self.ready_at - now(), 3))


def rate_limit(retry_after: float | None, reason: str | None) -> Report:
    """A report of a rate limit that ends in `retry_after` seconds. Raises ValueError."""
    seconds = checked_retry_after(retry_after)
    return Report(Outcome.RATE_LIMITED, None if seconds is None else now() + seconds, reason)


def checked_retry_after(retry_after: float | None) -> float | None:
    """The argument, if it is a number of seconds from 0, or None. Raises ValueError."""
    if retry_after is not None and not 0 <= retry_after <= LONGEST_RETRY_AFTER:
        raise ValueError(
            f"retry_after is a number of seconds from 0, or None if not known, not {retry_after!r}"
        )
    return retry_after


def checked_uses(uses: int | None) -> int | None:
    """The argument, if it is a whole number from 1 to 10^9, or None. Raises ValueError."""
    if uses is not None and not (type(uses) is int and 1 <= uses <= MOST_USES):
        raise ValueError(f"uses is a whole number from 1 to 10^9, not {uses!r}")
    return uses


def worse(first: Report | None, second: Report) -> Report:
    """The worse of two reports: invalid, rate_limited, error, ok, in this order.

    Of two rate limits it is the one that ends later, and one whose end is known before one whose end isn't; of
    others that are equal, the first.
    """
    if first is None or _weight(second) > _weight(first):
        return second
    return first


def _weight(report: Report) -> tuple[int, float]:
    return _SEVERITY.index(report.outcome), -math.inf if report.ready_at is None else report.ready_at


def tidy(
    reason: str | None, secret: str, hint: str, data: Mapping[str, Any] = MappingProxyType({})
) -> str | None:
    """A reason as the server accepts it: in one line, of 200 characters at most, without the key's text and data.

    Reasons are often messages of exceptions, and cutting one is better than losing the report.
    """
    if reason is None:
        return None
    reason = reason.replace(secret, hint)
    for value in data.values():
        if isinstance(value, str) and len(value) >= _SHORTEST_DATA:
            reason = reason.replace(value, "…")
    words = "".join(each if each.isprintable() else " " for each in reason).split()
    text = " ".join(words)
    return (text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1] + "…") or None


def judge(response: object) -> Report | None:
    """What a response, or an exception of an HTTP library, says about the key; None if nothing.

    Raises TypeError for an object that is neither.
    """
    status, headers = _status_of(response)
    if status is None:
        if not isinstance(response, BaseException):
            raise TypeError(f"report takes a response or an exception, not {type(response).__name__}")
        return Report(Outcome.ERROR, reason=type(response).__name__) if _is_timeout(response) else None
    reason = f"HTTP {status}"
    seconds = retry_after_of(headers)
    if status in (402, 429) or (status == 503 and seconds is not None):
        return rate_limit(seconds, reason)
    if status == 401:
        return Report(Outcome.INVALID, reason=reason)
    return Report(Outcome.ERROR, reason=reason) if status >= 500 else None


def _status_of(response: Any) -> tuple[int | None, Mapping[str, str]]:
    """Of a response, or an exception that is one (aiohttp's) or has one (raise_for_status of httpx and requests)."""
    if isinstance(response, BaseException) and getattr(response, "response", None) is not None:
        response = response.response  # type: ignore[attr-defined]
    for name in ("status_code", "status"):
        status = getattr(response, name, None)
        if isinstance(status, int) and not isinstance(status, bool):
            return int(status), getattr(response, "headers", None) or {}
    return None, {}


def _is_timeout(error: BaseException) -> bool:
    """Whether an exception means that the service didn't answer in time.

    httpx's PoolTimeout doesn't: the request was waiting for a connection of its own client.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & _TIMEOUTS) and "PoolTimeout" not in names


def retry_after_of(headers: Mapping[str, str]) -> float | None:
    """The header Retry-After in seconds, at least 0; None without one, and for one that is not understood.

    A date is relative to the answer's own Date, as clocks may differ; without that, to this machine's clock. Some
    services send fractions of a second, which the RFC doesn't know.
    """
    given = (headers.get("Retry-After") or headers.get("retry-after") or "").strip()
    if _SECONDS.fullmatch(given):
        return min(float(given), _LONGEST_HEADER)
    until = _moment(given)
    if until is None:
        return None
    since = _moment(headers.get("Date") or headers.get("date") or "") or datetime.now(UTC)
    return min(max(0.0, (until - since).total_seconds()), _LONGEST_HEADER)


def _moment(given: str) -> datetime | None:
    """An HTTP date. Its zone is GMT, even in the old formats that don't say so."""
    try:
        moment = parsedate_to_datetime(given)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
