"""Authentication, and protection against requests that a browser sends on behalf of another site.

Tokens are compared by their SHA-256 digest: a random token needs no slow hash, and a lookup by digest leaks
no timing. With no token configured the server is open, but only under loopback names, so that no web page can
reach it by rebinding its own name to this machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from urllib.parse import urlsplit

from keypool.config.limits import REMEMBERED_HOST
from keypool.config.named_tokens import NamedToken
from keypool.config.proxies import is_loopback
from keypool.core.errors import CrossSite, Unauthorized, WrongHost, WrongToken

_DEFAULT_PORTS = {"http": 80, "https": 443}


class Role(StrEnum):
    """`client` uses keys, `viewer` reads, `admin` may do everything."""

    CLIENT = "client"
    VIEWER = "viewer"
    ADMIN = "admin"

    __hash__ = str.__hash__  # Enum's own is Python code, and roles are looked up for each call


@dataclass(frozen=True, slots=True)
class Caller:
    """A role, and what the caller's token is and may do.

    `token` stands for it in the audit log and in events: the name of a named token, else the first 8 hex digits of its
    digest. `pools` are the only pools that it may use, `max_held` is the most leases that it may hold at a time in all
    of them together; None means no limit. `mark` is that of its digest, so that a different token under the same name
    is a different caller.
    """

    role: Role
    token: str
    name: str | None = None
    pools: frozenset[str] | None = None
    max_held: int | None = None
    mark: str = ""

    def may_use(self, pool: str) -> bool:
        """Whether the token is for this pool. O(1)."""
        return self.pools is None or pool in self.pools


def mark_of(digest: bytes) -> str:
    """The start of a token's digest, 16 hex digits, by which a session's cookie names it."""
    return digest.hex()[:16]


NO_TOKEN = "none"  # noqa: S105 - a word for the audit log
"""The `token` of a caller who needs none."""

NOBODY = Caller(Role.CLIENT, NO_TOKEN)
"""The caller of an operation that requires no token."""

ANYONE = Caller(Role.ADMIN, NO_TOKEN)
"""The caller of every other operation on an open server."""

XSRF_HEADER = "X-Keypool-Xsrf"
"""The header that the dashboard's scripts send beside the session cookie; pages of other sites can't."""


def _no_session(headers: Mapping[str, str]) -> Caller:
    raise Unauthorized("this server keeps no sessions: send Authorization: Bearer TOKEN")


class Access:
    """The valid tokens. Without any the server is open."""

    def __init__(
        self,
        client: Iterable[str] = (),
        viewer: Iterable[str] = (),
        admin: Iterable[str] = (),
        named: Iterable[NamedToken] = (),
    ) -> None:
        self.replace(client, viewer, admin, named)
        self.open = not self._callers
        self.by_session: Callable[[Mapping[str, str]], Caller] = _no_session
        """Returns the caller of a session cookie; set by session.py. Raises Unauthorized."""

    def replace(
        self,
        client: Iterable[str] = (),
        viewer: Iterable[str] = (),
        admin: Iterable[str] = (),
        named: Iterable[NamedToken] = (),
    ) -> None:
        """Replace all tokens. Cached results of `caller` become invalid. About 3 µs a token.

        `open` stays as it is, since the OpenAPI document and other answers depend on it.
        """
        callers: dict[bytes, Caller] = {}
        for role, tokens in ((Role.CLIENT, client), (Role.VIEWER, viewer), (Role.ADMIN, admin)):
            for token in tokens:
                digest = hashlib.sha256(token.encode()).digest()
                callers[digest] = Caller(role, digest.hex()[:8], mark=mark_of(digest))
        for each in named:
            callers[each.digest] = Caller(
                Role(each.role), each.name, each.name, each.pools, each.max_held, mark_of(each.digest)
            )
        self._callers = callers
        self._digests = {caller.mark: digest for digest, caller in callers.items()}
        self._known = frozenset(callers.values())

    def knows(self, caller: Caller) -> bool:
        """Whether this caller's token is still valid. O(1)."""
        return self.open or caller in self._known

    def marked(self, mark: str) -> Caller | None:
        """The caller whose token has this mark, if there is one. O(1)."""
        digest = self._digests.get(mark)
        return None if digest is None else self._callers[digest]

    def digest(self, mark: str) -> bytes | None:
        """The digest of the token that has this mark, if there is one. O(1)."""
        return self._digests.get(mark)

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """The caller of an API call: by token, or by session for the dashboard's scripts. Raises Unauthorized.

        A cookie alone doesn't count, since a browser sends it with requests of any page.
        """
        authorization = headers.get("Authorization")
        if authorization is None and not self.open and XSRF_HEADER in headers:
            return self.by_session(headers)
        return self.identify(authorization)

    def callers(self) -> dict[bytes, Caller]:
        """The callers by the SHA-256 digest of their token. A copy: O(tokens)."""
        return dict(self._callers)

    def identify(self, authorization: str | None) -> Caller:
        """The caller of a request with this Authorization header. About 1 µs. Raises Unauthorized.

        Raises WrongToken for an unknown token, which has to be counted (wrong_tokens.py).
        """
        if self.open:
            return ANYONE
        if authorization is None:
            raise Unauthorized("this server requires a token: send Authorization: Bearer TOKEN")
        scheme, _, token = authorization.strip().partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthorized("the Authorization header must be of the form: Bearer TOKEN")
        digest = hashlib.sha256(token.strip().encode()).digest()
        caller = self._callers.get(digest)
        if caller is None:
            raise WrongToken(digest.hex()[:8])
        return caller

    def check_site(self, headers: Mapping[str, str], changes: bool) -> None:
        """Refuse a request under a foreign Host or from another site's page. Raises WrongHost, CrossSite.

        If it changes something (`changes`), a Sec-Fetch-Site of another site is enough to refuse it.
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
            raise CrossSite(
                "a browser sent this on behalf of another site, which may not change anything here"
            )


def split_host(host: str) -> tuple[str, int | None]:
    """Name (lower case, no brackets) and port of a Host header; an empty name if it is invalid."""
    try:
        parts = urlsplit("//" + host)
        name, port = parts.hostname, parts.port
    except ValueError:
        return "", None
    if name is None or parts.netloc != host or "@" in host:
        return "", None
    return name, port


def _names_this_machine(host: str) -> bool:
    return len(host) <= REMEMBERED_HOST and _is_known_loopback(host)


@lru_cache(maxsize=256)
def _is_known_loopback(host: str) -> bool:
    # Cached, as clients use one or two, and parsing takes 5 µs.
    return is_loopback(split_host(host)[0])


def same_site(origin: str, host: str) -> bool:
    """Whether an Origin has the host and port of a Host header. Schemes aren't compared: a proxy may terminate TLS."""
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
