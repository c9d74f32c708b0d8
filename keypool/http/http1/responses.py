"""Answers as bytes: the headers that the server adds to them, and its own answers, the refusals.

A refusal is an answer by the server itself to a request that doesn't, or must not, reach the application. Its form is
up to the application: the `on_refused` hook of `Server` turns a `Refusal` into the bytes of a response. Without a hook,
or if it returns None, the answer is a status line without a body.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus

from tornado.log import app_log

Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the server itself answers a request.

    `method`, `target` and `headers` are as far as they had been read, the headers' names in lower case.
    """

    status: int
    code: str
    """bad-request, request-timeout, payload-too-large, uri-too-long, headers-too-large, internal, not-implemented"""
    detail: str
    method: bytes = b""
    target: bytes = b""
    headers: Headers = ()
    complete: bool = False
    """Whether all headers had come, so that the refusal is about the body, its time or the application."""


OnRefused = Callable[[Refusal], bytes | None]
"""Returns the whole response to a refusal, or None for a bare one. Must not block."""


class Refused(Exception):
    """Raised inside a parser callback to stop at this byte with this answer."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail


def refuse_with(refusal: Refusal, on_refused: OnRefused | None) -> bytes:
    """Return the answer to a refusal, from the hook or bare. Never raises."""
    response = None
    if on_refused is not None:
        try:
            response = on_refused(refusal)
        except Exception:
            app_log.error("Uncaught exception", exc_info=True)
    response = with_connection(response or _bare(refusal.status), b"close")
    return without_body(response) if refusal.method == b"HEAD" else response


def _bare(status: int) -> bytes:
    phrase = HTTPStatus(status).phrase
    return f"HTTP/1.1 {status} {phrase}\r\nContent-Length: 0\r\n".encode() + date_line() + b"\r\n"


def with_connection(response: bytes, value: bytes) -> bytes:
    """Return a serialised response with a `Connection` line added. Copies it: O(size)."""
    head, _, body = response.partition(b"\r\n\r\n")
    return b"%b\r\nConnection: %b\r\n\r\n%b" % (head, value, body)


def without_body(response: bytes) -> bytes:
    """Return a serialised response without its body, as the answer to HEAD. O(size)."""
    head, end, _ = response.partition(b"\r\n\r\n")
    return head + end


@lru_cache(maxsize=1)
def date_at(second: int) -> str:
    """The value of `Date` for seconds since the epoch. O(1), about 0.1 µs if `second` is that of the last call."""
    return formatdate(second, usegmt=True)


def http_date() -> str:
    """The value of `Date` now."""
    return date_at(int(time.time()))


def date_line() -> bytes:
    """`Date: …` with its line end."""
    return b"Date: %b\r\n" % http_date().encode()
