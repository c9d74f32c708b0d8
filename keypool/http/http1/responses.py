"""Answers as bytes: what the server adds to them, and its own.

A refusal is an answer by the server itself, because the request never reached the application, or must not. How it
looks is the application's business: `Server` takes a hook `on_refused` that turns a `Refusal` into the bytes of a
response. Without one, or for bytes that aren't an HTTP request, the answer is a status line without a body.
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
    """Why the server itself answers a request, and what had been read of the request.

    `method`, `target` and `headers` hold what had been read. Names are in lower case.
    """

    status: int
    code: str
    """bad-request, request-timeout, payload-too-large, uri-too-long, headers-too-large, internal, not-implemented"""
    detail: str
    method: bytes = b""
    target: bytes = b""
    headers: Headers = ()
    complete: bool = False
    """Whether all headers had come, so that the body or the application is at fault."""


OnRefused = Callable[[Refusal], bytes | None]
"""Gives the whole response to a refusal, or None for a bare one. Must not block."""


class Refused(Exception):
    """Raised inside a parser callback to stop at this byte with this answer."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail


def refuse_with(refusal: Refusal, on_refused: OnRefused | None) -> bytes:
    """Return the last answer of a connection, by the hook or bare. Never raises."""
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
    """Return a serialised response with a `Connection` line put in. Copies it: O(size)."""
    head, _, body = response.partition(b"\r\n\r\n")
    return b"%b\r\nConnection: %b\r\n\r\n%b" % (head, value, body)


def without_body(response: bytes) -> bytes:
    """Return a serialised response cut off behind its headers, as HEAD wants it. O(size)."""
    head, end, _ = response.partition(b"\r\n\r\n")
    return head + end


@lru_cache(maxsize=1)
def date_at(second: int) -> str:
    """The value of `Date` in this second since the epoch. O(1), about 0.1 µs but for the first call of a second."""
    return formatdate(second, usegmt=True)


def http_date() -> str:
    """The value of `Date` now."""
    return date_at(int(time.time()))


def date_line() -> bytes:
    """`Date: …` with its line end."""
    return b"Date: %b\r\n" % http_date().encode()
