"""The attempts of a call, without any I/O: when it is sent again, and when its error is final.

    the failure means that ...           the call is sent again
    it did not happen                    always
    it may have happened                 if the call is safe to repeat (the table in calls.py)
    another try can't help               never

"It did not happen" is a connection that could not be made, and the server's `loading`, `draining`,
`superseded` and `too-many-waiters`. "It may have happened" is a connection that broke, a timeout after the connection
was made, `storage-unavailable`, and 502, 503 or 504 from a proxy, which may or may not have passed the request on.
Everything else (404, 409, not HTTP) is an answer and final. But as long as an acquire's wait lasts, it is sent again
after `no-key-available`, and after `share-spent`: somebody may give back a key, or its own token one.

The server recognises the repetition of an acquire by its Idempotency-Key and its body, so every request of an acquire
has the same `wait`: a longer wait than the server's longest is divided into equal parts. Such a repetition gets the
lease that a lost answer gave, or the place in the queue that its predecessor had.

The rules are generators ("steps"): they yield a `Send` or a `Pause`, which a runner executes; it sends back the
answer or throws in the error. So threads and asyncio share the rules, and tests need no I/O.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import ssl
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import httpx2

from keypool.client.answers import Done, ImportedKey, Imports, Unblocked
from keypool.client.calls import Batch, Call
from keypool.client.errors import (
    AnswerLost,
    GatewayError,
    KeyPoolError,
    NoKeyAvailable,
    ShareSpent,
    Superseded,
    Unavailable,
    UnexpectedAnswer,
    UnknownKey,
    UnknownPool,
    Unreachable,
    from_answer,
)
from keypool.client.reports import retry_after_of
from keypool.client.settings import BASE, Settings, now

T = TypeVar("T")

_LONGEST_WAIT = 60.0  # seconds that the server lets an acquire wait; a longer wait takes several requests
_WAIT_TOLERANCE = 0.02  # seconds by which a wait may seem to have ended early


@dataclass(frozen=True, slots=True)
class Send:
    """Send one request, once. It fails after `timeout` seconds, whatever it was doing; inf means no limit."""

    method: str
    url: str = field(repr=False)  # a key's text may be in it
    headers: Mapping[str, str] = field(repr=False)
    body: bytes | None = field(repr=False)
    timeout: float

    def request(self, **extensions: Any) -> httpx2.Request:
        """The request for a transport."""
        return httpx2.Request(
            self.method, self.url, headers=self.headers, content=self.body, extensions=extensions
        )


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait for `seconds`, None for no limit, or until the runner is woken up."""

    seconds: float | None


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, whatever its status."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


Steps = Generator[Send | Pause, Answer | None, T]


@dataclass(frozen=True, slots=True)
class Timed(Generic[T]):
    """A result, with the moments (`settings.now`) when its request was sent and its answer complete."""

    result: T
    sent_at: float
    received_at: float


def result(call: Call[T], settings: Settings, within: float = math.inf) -> Steps[T]:
    """Like `perform`, but the result alone."""
    return (yield from perform(call, settings, within)).result


def results(batch: Batch[T], settings: Settings) -> Steps[T]:
    """Perform the calls of a batch, and return its result. Raises KeyPoolError."""
    try:
        call = next(batch)
        while True:
            try:
                answer = yield from result(call, settings)
            except KeyPoolError as error:
                call = batch.throw(error)
            else:
                call = batch.send(answer)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def perform(call: Call[T], settings: Settings, within: float = math.inf) -> Steps[Timed[T]]:
    """Perform a call, with retries. Raises KeyPoolError.

    The timeout, or `within` seconds if that is less, bounds all attempts and pauses together; the time that an
    acquire waits for a key is added. An acquire that waits is retried during an outage for as long as it waits,
    once it has reached the server. After a lost answer it may wait longer, but not beyond the timeout.
    """
    began = now()
    wait_until = began + (math.inf if call.wait is None else call.wait)
    part = _LONGEST_WAIT if call.wait is None else call.wait / max(1, math.ceil(call.wait / _LONGEST_WAIT))
    ends_at = min(wait_until + settings.timeout, began + within)
    retry_until: float | None = None
    headers = settings.headers()
    failures, times = 0, 0
    reached = repeated = queued = False
    while True:
        sent_at = now()
        left = max(0.0, wait_until - sent_at)
        # A small rest, after answers that came early, isn't worth another whole part.
        wait = part if repeated or (queued and left > part / 10) else min(part, left)
        send = _send(call, settings, headers, wait, min(wait + settings.timeout, ends_at - sent_at))
        try:
            answer = yield send
            assert answer is not None
            return Timed(_read(call, answer, repeated=repeated), sent_at, now())
        except (NoKeyAvailable, ShareSpent) as error:
            error.repeated = repeated
            if wait_until - now() <= _WAIT_TOLERANCE:
                raise
            # The server's longest wait has passed: send it again; after a pause, if the server didn't wait.
            failures, times, reached, queued, retry_until = 0, 0, True, True, None
            pause = 0.0 if now() - sent_at >= wait / 2 else min(1.0, wait_until - now())
        except KeyPoolError as error:
            error.repeated = repeated
            if repeated and call.result_if_gone is not None and isinstance(error, UnknownKey | UnknownPool):
                return Timed(call.result_if_gone(), sent_at, now())
            times += 1
            too_often = settings.retry.times is not None and times > settings.retry.times
            if too_often or not _retry_may_help(error) or (error.may_have_happened and not call.repeatable):
                raise
            failures += 1
            repeated = repeated or error.may_have_happened
            reached = reached or not isinstance(error, Unreachable)
            retry_until = now() + settings.retry.seconds if retry_until is None else retry_until
            patience = max(retry_until, wait_until) if reached and settings.retry.seconds else retry_until
            pause = max(settings.retry.pause(failures), error.retry_after or 0.0)
            if now() + pause > min(patience, ends_at):
                raise
        if pause:
            yield Pause(pause)


def _send(
    call: Call[Any], settings: Settings, headers: Mapping[str, str], wait: float, timeout: float
) -> Send:
    body, content = call.body, call.content
    if wait:
        body = {**(body or {}), "wait": round(wait, 3)}
    if body is not None:
        content = json.dumps(body, separators=(",", ":")).encode()
    if content is not None:
        headers = {**headers, "Content-Type": "application/json"}
    if call.idempotency_key is not None:
        headers = {**headers, "Idempotency-Key": call.idempotency_key}
    base = f"{settings.url}{BASE}" if call.of_server else settings.base
    return Send(call.method, f"{base}{call.path}", headers, content, max(timeout, 0.001))


def _read(call: Call[T], answer: Answer, *, repeated: bool) -> T:
    if answer.status >= 400:
        error = from_answer(answer.status, answer.body)
        if error.retry_after is None:
            error.retry_after = retry_after_of(answer.headers)
        raise error
    if answer.status >= 300:
        raise UnexpectedAnswer(f"answered {answer.status}: is the URL right?", answer.status)
    value = None
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(answer.body) if answer.body else None
    try:
        read = call.read(value)
    except UnexpectedAnswer as error:
        raise UnexpectedAnswer(f"{call.name}: {error}; is the URL right?", answer.status) from None
    if repeated and isinstance(read, Done | Unblocked | ImportedKey | Imports):
        return replace(read, repeated=True)
    return read


def _retry_may_help(error: KeyPoolError) -> bool:
    if isinstance(error, Unreachable):
        return error.transient
    return isinstance(error, AnswerLost | GatewayError | Unavailable | Superseded)


_NEVER_SENT = (
    httpx2.ConnectError,
    httpx2.ConnectTimeout,
    httpx2.PoolTimeout,
    httpx2.ProxyError,
    httpx2.LocalProtocolError,
    httpx2.UnsupportedProtocol,
)
_NOT_HTTP = (httpx2.RemoteProtocolError, httpx2.DecodingError)


def failure(error: Exception, url: str) -> KeyPoolError:
    """The KeyPoolError for an exception of a transport."""
    reason = str(error) or type(error).__name__
    if isinstance(error, _NEVER_SENT):
        causes = _causes(error)
        reason = next(filter(None, map(_system_reason, causes)), reason)
        made = Unreachable(f"can't reach {url}: {reason}")
        made.transient = not any(map(_permanent, causes))
        return made
    if isinstance(error, httpx2.TimeoutException | TimeoutError):
        return AnswerLost("no answer in time")
    if isinstance(error, _NOT_HTTP) and "disconnected" not in reason and "closed" not in reason:
        return UnexpectedAnswer(f"{url} does not speak HTTP ({reason}): is the URL right?")
    return AnswerLost(f"the connection broke before the answer was complete: {reason}")


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and len(found) < 10:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _system_reason(cause: BaseException) -> str | None:
    if isinstance(cause, socket.gaierror | ssl.SSLError):
        return cause.strerror
    return os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno else None


def _permanent(cause: BaseException) -> bool:
    """Whether a retry can't help: the host name does not exist, or its certificate is not trusted."""
    unknown_name = isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN
    return unknown_name or isinstance(cause, ssl.SSLCertVerificationError | UnicodeError)
