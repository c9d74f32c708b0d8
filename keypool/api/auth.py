"""Who calls, and whether a browser may be speaking for somebody else.

Tokens are compared by their SHA-256 digest: a random token needs no slow hash, and a lookup by digest tells
no timing. With no token configured the server is open, to loopback names only, so that no web page can reach
it by rebinding its own name to this machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from urllib.parse import urlsplit

from keypool.config.limits import REMEMBERED_HOST
from keypool.config.proxies import is_loopback
from keypool.core.errors import CrossSite, Unauthorized, WrongHost, WrongToken

_DEFAULT_PORTS = {"http": 80, "https": 443}


class Role(StrEnum):
    """What a caller may do: `client` uses keys, `viewer` reads, `admin` does everything."""

    CLIENT = "client"
    VIEWER = "viewer"
    ADMIN = "admin"

    __hash__ = str.__hash__  # Enum's own is Python code, and roles are looked up for each call


@dataclass(frozen=True, slots=True)
class Caller:
    """A role, and for the audit log which token showed it: the first 8 hex digits of its digest."""

    role: Role
    token: str


def mark_of(digest: bytes) -> str:
    """What a session's cookie names a token by: the start of its digest."""
    return digest.hex()[:16]


NOBODY = Caller(Role.CLIENT, "none")
"""The caller of a call that asks for no token."""

ANYONE = Caller(Role.ADMIN, "none")
"""Whoever calls an open server."""

XSRF_HEADER = "X-Keypool-Xsrf"
"""What the dashboard's own scripts send beside the session cookie, and no other site's page can."""


def _no_session(headers: Mapping[str, str]) -> Caller:
    raise Unauthorized("this server keeps no sessions: send Authorization: Bearer TOKEN")


class Access:
    """The tokens in force. No token configured: open."""

    def __init__(
        self, client: Iterable[str] = (), viewer: Iterable[str] = (), admin: Iterable[str] = ()
    ) -> None:
        self.replace(client, viewer, admin)
        self.open = not self._callers
        self.by_session: Callable[[Mapping[str, str]], Caller] = _no_session
        """Who a session cookie stands for; session.py sets it. Raises Unauthorized."""

    def replace(
        self, client: Iterable[str] = (), viewer: Iterable[str] = (), admin: Iterable[str] = ()
    ) -> None:
        """Let these be the tokens from now on. Callers that were remembered have to be asked for anew.

        A server is open or not for its whole life: its answers, and what OpenAPI says, depend on it.
        """
        callers: dict[bytes, Caller] = {}
        for role, tokens in ((Role.CLIENT, client), (Role.VIEWER, viewer), (Role.ADMIN, admin)):
            for token in tokens:
                digest = hashlib.sha256(token.encode()).digest()
                callers[digest] = Caller(role, digest.hex()[:8])
        self._callers = callers
        self._by_mark = {mark_of(digest): caller for digest, caller in callers.items()}
        self._known = frozenset(callers.values())

    def knows(self, caller: Caller) -> bool:
        """Whether the token that this caller showed still holds. O(1)."""
        return self.open or caller in self._known

    def marked(self, mark: str) -> Caller | None:
        """The caller whose token has this mark, if there is one. O(1)."""
        return self._by_mark.get(mark)

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """The caller of an API call: by its token, or by session if it is the dashboard's own script.

        A cookie alone is nobody's word, since the browser adds it by itself. Raises Unauthorized.
        """
        authorization = headers.get("Authorization")
        if authorization is None and not self.open and XSRF_HEADER in headers:
            return self.by_session(headers)
        return self.identify(authorization)

    def callers(self) -> dict[bytes, Caller]:
        """Everybody whom a token stands for, by the token's digest."""
        return dict(self._callers)

    def identify(self, authorization: str | None) -> Caller:
        """The caller of a request with this Authorization header. About 1 µs. Raises Unauthorized.

        Raises WrongToken, for the caller to have it counted (wrong_tokens.py), if there is a token that nobody knows.
        """
        if self.open:
            return ANYONE
        if authorization is None:
            raise Unauthorized("this server wants a token: send Authorization: Bearer TOKEN")
        scheme, _, token = authorization.strip().partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthorized("the Authorization header must be of the form: Bearer TOKEN")
        digest = hashlib.sha256(token.strip().encode()).digest()
        caller = self._callers.get(digest)
        if caller is None:
            raise WrongToken(digest.hex()[:8])
        return caller

    def check_site(self, headers: Mapping[str, str], changes: bool) -> None:
        """Refuse what comes under a foreign name or from a foreign page. Raises WrongHost, CrossSite.

        `changes` is whether the call changes something: such a one is refused by Sec-Fetch-Site alone.
        """
        host = headers.get("Host", "")
        if self.open and not _names_this_machine(host):
            raise WrongHost(
                "without tokens this server answers only a Host of localhost, in 127.0.0.0/8 or [::1]"
            )
        origin = headers.get("Origin")
        if origin is not None and not same_site(origin, host):
            raise CrossSite(
                "this request's Origin is not this server: a page of another site may not call it"
            )
        if changes and headers.get("Sec-Fetch-Site", "").lower() == "cross-site":
            raise CrossSite("a browser sent this on behalf of another site, which may change nothing here")


def split_host(host: str) -> tuple[str, int | None]:
    """Name (lower case, no brackets) and port of a Host header; an empty name if it is none."""
    try:
        parts = urlsplit("//" + host)
        name, port = parts.hostname, parts.port
    except ValueError:
        return "", None
    if name is None or parts.netloc != host or "@" in host:
        return "", None
    return name, port


def _names_this_machine(host: str) -> bool:
    """Whether a Host header is a loopback name, which no long one is."""
    return len(host) <= REMEMBERED_HOST and _is_known_loopback(host)


@lru_cache(maxsize=256)
def _is_known_loopback(host: str) -> bool:
    """Remembered, as callers have one or two, and parsing takes 5 µs."""
    return is_loopback(split_host(host)[0])


def same_site(origin: str, host: str) -> bool:
    """Whether host and port of an Origin are a Host's. Schemes aren't compared: a proxy may end TLS."""
    try:
        parts = urlsplit(origin)
        name, port = parts.hostname, parts.port
    except ValueError:
        return False
    default = _DEFAULT_PORTS.get(parts.scheme)
    if name is None or default is None:
        return False
    own_name, own_port = split_host(host)
    return (name, port or default) == (own_name, own_port or default)
