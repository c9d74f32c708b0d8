"""What passes between the client and a transport: a request, an answer, or the failure to get one.

A transport sends one request once and returns what came back, whatever the status. It never repeats anything
and never waits longer than the request allows. Its two failures are the two that matter: `Unreachable`, if
the server can't have got the whole request, and `AnswerLost`, if it may have.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from keypool.client.clock import now

LARGEST_ANSWER = 16 * 1024 * 1024
"""Bytes of an answer that are read. The server's own are far smaller; what is larger isn't its."""


class Leaving:
    """How a call that waits is told that nobody will use its answer, and hears what comes of it.

    A waiter who closes its sending side leaves the queue, and the server leases it nothing; or it had been
    served already, and the answer still comes and says so. Either way the caller knows, and no key is left
    with nobody. `leave` may be called by a signal handler.

    A call that was sent only just now may not have been read yet. A server that finds it half closed already
    may serve a key that it can't deliver; so what is younger than QUEUED_SECONDS is left when it is that old.
    """

    def __init__(self, always: bool = False) -> None:
        self.left = False
        self.critical = always
        """Whether something was sent whose outcome must be heard; or, if `always`, the whole call through."""
        self._always = always
        self.sent_at = 0.0
        self._act: Callable[[], None] | None = None

    def sending(self, act: Callable[[], None]) -> None:
        """The transport says, before it sends, how this request is left."""
        self._act = act
        self.sent_at = now()
        self.critical = True
        if self.left:
            act()

    def over(self) -> None:
        """The transport says that there is nothing to leave any more."""
        self._act = None

    def failed(self) -> None:
        """The attempt is known to have come to nothing: the pause before the next may be cut short."""
        self.critical = self._always

    def leave(self) -> None:
        """End the call soon. May be called again."""
        self.left = True
        if self._act is not None:
            self._act()


QUEUED_SECONDS = 1.0
"""After so long a call that wasn't answered is taken to stand in the queue."""

LEAVING_SECONDS = 3.0
"""How long the answer to a call that was left is listened for, at most."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `timeout` is seconds for connecting, then `timeout + wait` for all the rest."""

    method: str
    target: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes | None = field(repr=False)
    timeout: float
    wait: float = 0.0
    repeatable: bool = False
    leaving: Leaving | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, with the moments (of clock.now) at which the request left and the answer was whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)
    sent_at: float
    received_at: float

    def header(self, name: str) -> str | None:
        """A header by its name, in whatever case."""
        for each, value in self.headers.items():
            if each.lower() == name:
                return value
        return None


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server is. `prefix` is the path that a proxy has it under, without a slash at its end."""

    scheme: str
    host: str
    port: int
    prefix: str
    ssl: ssl.SSLContext | None = field(default=None, repr=False)

    @property
    def authority(self) -> str:
        """Host and port as in a Host header."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return name if self.port == _PORTS[self.scheme] else f"{name}:{self.port}"

    @property
    def url(self) -> str:
        """The address as one would type it."""
        return f"{self.scheme}://{self.authority}{self.prefix}"


_PORTS = {"http": 80, "https": 443}


def address(url: str, context: ssl.SSLContext | None = None) -> Address:
    """The address that a URL names. Raises ValueError, with what would be right.

    Blocks while https reads the system's certificates.
    """
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ValueError(f"a server's URL looks like http://127.0.0.1:8888, not {url!r}")
    if parts.username is not None or parts.password is not None:
        raise ValueError("a URL holds no password here: a token is given as token=, or in KEYPOOL_TOKEN")
    if parts.query or parts.fragment:
        raise ValueError("a server's URL has no ? and no #")
    if parts.scheme == "https" and context is None:
        context = ssl.create_default_context()
    port = parts.port or _PORTS[parts.scheme]
    return Address(parts.scheme, parts.hostname, port, parts.path.rstrip("/"), context)
