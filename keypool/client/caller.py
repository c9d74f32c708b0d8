"""Making a call, synchronously: attempts over a transport, with the pauses that retry.py asks for."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TypeVar

from keypool.client.blocking import BlockingTransport
from keypool.client.calls import Call
from keypool.client.clock import now
from keypool.client.errors import KeyPoolError
from keypool.client.retry import Attempts, Retry
from keypool.client.wire import Address, Answer, Leaving

T = TypeVar("T")

_SLICE = 0.1  # seconds of a pause between looks at whether the call is wanted still


class Caller:
    """What makes calls to one server. Thread-safe, and safe to use after a fork."""

    def __init__(self, address: Address, token: str | None, timeout: float, retry: Retry) -> None:
        self.address = address
        self.retry = retry
        self.timeout = timeout
        self._token = checked(token)
        self._transport = BlockingTransport(address)

    def apart(self, retry: Retry) -> Caller:
        """Another with connections of its own, and another patience."""
        return Caller(self.address, self._token, self.timeout, retry)

    def call(self, call: Call[T], leaving: Leaving | None = None, patience: float | None = None) -> T:
        """The result. Raises KeyPoolError."""
        return self.call_timed(call, leaving, patience)[0]

    def call_timed(
        self, call: Call[T], leaving: Leaving | None = None, patience: float | None = None
    ) -> tuple[T, Answer]:
        """The result and the answer it came in. `patience` seconds, if less than the usual, for retries."""
        retry = self.retry
        if patience is not None:
            retry = replace(retry, seconds=max(0.0, min(retry.seconds, patience)))
        attempts = Attempts(call, self.address, self._token, self.timeout, retry, leaving=leaving)
        while (pause := self._attempt(attempts)) is not None:
            if leaving is not None:
                leaving.failed()
            _sleep(pause, leaving)
        return attempts.result, attempts.answer

    def _attempt(self, attempts: Attempts[T]) -> float | None:
        try:
            answer = self._transport.exchange(attempts.request())
        except KeyPoolError as error:
            return attempts.failed(error)
        return attempts.answered(answer)

    def close(self) -> None:
        """Close all connections."""
        self._transport.close()


def checked(token: str | None) -> str | None:
    """A token that can stand in a header. Raises ValueError, without showing it."""
    if token is not None and not all("!" <= character <= "~" for character in token):
        raise ValueError("a token is made of visible ASCII characters, without spaces")
    return token or None


def _sleep(seconds: float, leaving: Leaving | None) -> None:
    if leaving is None:
        time.sleep(seconds)
        return
    until = now() + seconds
    while (left := until - now()) > 0 and not leaving.left:
        time.sleep(min(left, _SLICE))
