"""A client's settings: the server's URL, the token, time limits. All arguments are checked here."""

from __future__ import annotations

import math
import os
import random
import re
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import httpx2

BASE = "/api/v1"
DEFAULT_URL = "http://127.0.0.1:8888"
DEFAULT_TIMEOUT = 15.0
DEFAULT_POOL = "default"
"""The pool that every server has."""

_POOL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)

_BOOT_CLOCK: int | None = getattr(time, "CLOCK_BOOTTIME", None)


def now() -> float:
    """Seconds on the clock that leases are measured by, which includes suspended time where the system can.

    `time.monotonic` stops while a laptop is suspended, and the server's clock does not: so a lease that has
    ended would seem to last.
    """
    return time.monotonic() if _BOOT_CLOCK is None else time.clock_gettime(_BOOT_CLOCK)


@dataclass(frozen=True, slots=True)
class Retry:
    """How long, and how often, a failing call is sent again.

    A call is sent again for up to `seconds` after its first failure, and at most `times` times; 0 of either means
    never. Pauses begin at `first` seconds and double up to `most`; each is shortened at random by up to half, so
    that clients of one server do not return at the same moment. A `Retry-After` extends a pause; if that exceeds
    the limits, the call fails at once.
    """

    seconds: float = 15.0
    first: float = 0.1
    most: float = 3.0
    times: int | None = None

    def pause(self, failures: int) -> float:
        """Seconds to wait after the given number of failures in a row."""
        whole = min(self.most, self.first * 2.0 ** min(failures - 1, 30))
        return whole * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, hides nothing


@dataclass(frozen=True, slots=True)
class Settings:
    """The checked arguments of a client, for one pool. `url` is without `/api/v1` and without a slash at its end."""

    url: str
    token: str | None = field(repr=False)
    timeout: float
    retry: Retry
    pool: str = DEFAULT_POOL

    @classmethod
    def of(
        cls,
        url: str = DEFAULT_URL,
        token: str | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        retry: Retry | int | None = None,
        pool: str = DEFAULT_POOL,
    ) -> Self:
        """Check the arguments of a client. Raises ValueError, whose message never contains the token."""
        return cls(_url(url), _token(token), _timeout(timeout), _retry(retry), pool_name(pool))

    @property
    def base(self) -> str:
        """The URL of the pool's calls. An older server knows only those of `default`, so they have no name in them."""
        of_pool = "" if self.pool == DEFAULT_POOL else f"/pools/{self.pool}"
        return f"{self.url}{BASE}{of_pool}"

    def headers(self) -> dict[str, str]:
        """The headers of one call, the same for all its attempts."""
        headers = {
            "Accept": "application/json",
            "User-Agent": "keypool-client",
            # One id for all attempts: it connects them in the server's log.
            "X-Request-Id": f"c-{secrets.token_hex(8)}",
        }
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        return headers


def default_owner() -> str:
    """The owner of a key if the program gives none: `host:pid`."""
    return f"{socket.gethostname()}:{os.getpid()}"[-200:]


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The arguments `url`, `token` and `pool`, from KEYPOOL_URL, KEYPOOL_TOKEN, KEYPOOL_TOKEN_FILE and KEYPOOL_POOL.

    KEYPOOL_TOKEN comes before KEYPOOL_TOKEN_FILE, whose `~` is expanded. Raises ValueError for a file that
    cannot be read or does not hold exactly one token.
    """
    token = environ.get("KEYPOOL_TOKEN") or None
    path = environ.get("KEYPOOL_TOKEN_FILE")
    if token is None and path:
        token = read_token("KEYPOOL_TOKEN_FILE", path)
    return {
        "url": environ.get("KEYPOOL_URL") or DEFAULT_URL,
        "token": token,
        "pool": environ.get("KEYPOOL_POOL") or DEFAULT_POOL,
    }


def read_token(source: str, path: str) -> str:
    """The token in a file. Raises ValueError, which names the `source` of the path."""
    try:
        words = Path(path).expanduser().read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        raise ValueError(f"{source} {path} can't be read: {error}") from None
    if len(words) != 1:
        raise ValueError(f"{source} {path} must hold one token and nothing else")
    return words[0]


def pool_name(name: str) -> str:
    """The name, if a pool may have it: 1 to 63 of a-z 0-9 . _ -, first a letter or a digit. Raises ValueError."""
    if _POOL_NAME.fullmatch(name) is None:
        raise ValueError(
            "a pool's name has 1 to 63 characters of a-z 0-9 . _ -, the first a letter or a digit, "
            f"not {name[:80]!r}"
        )
    return name


def _url(url: str) -> str:
    parts = urlsplit(url)
    try:
        known = (
            parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        )
    except ValueError:  # a port that is not a number
        known = False
    if not known:
        raise ValueError(f"a server's URL looks like {DEFAULT_URL}, not {url!r}")
    if parts.username is not None or parts.password is not None:
        raise ValueError("a server's URL holds no password: give the token as token=, or in KEYPOOL_TOKEN")
    if parts.query or parts.fragment:
        raise ValueError("a server's URL has no ? and no #")
    try:
        httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ValueError(f"not a URL: {error}") from None
    path = parts.path.rstrip("/").removesuffix(BASE).rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}"


def _token(token: str | None) -> str | None:
    if token is not None and not all("!" <= character <= "~" for character in token):
        raise ValueError("a token is made of visible ASCII characters, without spaces")
    return token or None


def _timeout(timeout: float | None) -> float:
    if timeout is None:
        return math.inf
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout is a number of seconds above 0, or None for no limit, not {timeout!r}")
    return float(timeout)


def _retry(retry: Retry | int | None) -> Retry:
    if retry is None:
        return Retry()
    if isinstance(retry, int) and not isinstance(retry, bool) and retry >= 0:
        return Retry(times=retry)
    if not isinstance(retry, Retry):
        raise ValueError(  # noqa: TRY004 - wrong arguments are ValueErrors here, whatever is wrong
            f"retry is a Retry, or how many times a call is repeated at most, not {retry!r}"
        )
    return retry
