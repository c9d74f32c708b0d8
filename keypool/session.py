"""Signing in to the dashboard: a token once, a signed cookie from then on.

    token --POST /login--> cookie [mark of the token, session id, end], signed --> Caller

The cookie holds no token and is kept nowhere: the server believes its own signature, and looks the token up
by its mark, so a token that is taken away takes its sessions with it. The signing key is made of all tokens
of the server, so a restart signs nobody out and a changed token signs everybody out. It is stretched by
scrypt: who has one token and a cookie can't try out guesses of the others cheaply.

How the dashboard's actions reach the engine: through the API's own paths, and so through the one table of
operations with its role check and audit log. The dispatcher takes the cookie only together with the header
`X-Keypool-Xsrf`, whose value is bound to the session and stands in the dashboard's own pages. A page of
another site can neither read the value nor send the header (and its Origin is refused besides). The feed
can't carry the header: there the Origin, which browsers always send with a websocket, must be this server's.

A sign-out is a note that is kept with the pool's data until the cookie would have ended, so that it holds after a
restart and on all servers of the pool. For each token there are `MOST_ENDED` such notes at most. With one more, the
session that began first gives way to a moment, before which all sessions of that token have ended:

    session.MARK.ID    the session's natural end    a session that was signed out
    void.MARK          a moment                     sessions of this token that began by then have ended

Both are in milliseconds of the wall clock. What this module does not do: know paths or pages (handlers/signin.py has
them), or how notes are kept (the engine does).
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
import secrets
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec
from tornado.httputil import parse_cookie

from keypool.auth import ANYONE, XSRF_HEADER, Access, Caller, Role
from keypool.engine import Engine
from keypool.errors import Forbidden, Unauthorized

COOKIE = "keypool_session"
LIFE = 12 * 3600.0
"""Seconds until somebody who signed in has to sign in again: a working day."""

MOST_ENDED = 64
"""Sign-outs that are kept one by one for each token."""

_SCRYPT = {"n": 2**14, "r": 8, "p": 1}  # 16 MB and 30 to 60 ms, once a start


@dataclass(frozen=True, slots=True)
class Session:
    """Somebody who signed in. `id` is None on an open server, where nobody has to. `mark` is that of the token."""

    caller: Caller
    id: str | None = None
    ends_at: float = float("inf")
    mark: str = ""

    @property
    def note(self) -> str:
        """The name of the note that says that this session was signed out."""
        return f"session.{self.mark}.{self.id}"

    @property
    def began(self) -> int:
        """When, in milliseconds."""
        return _milliseconds(self.ends_at - LIFE)


class Sessions:
    """Makes, reads and ends sessions; with the tokens of `access`."""

    def __init__(self, access: Access, wall: Callable[[], float] = time.time) -> None:
        self._access = access
        self._wall = wall
        self._callers = {digest.hex()[:16]: caller for digest, caller in access.callers().items()}
        tokens = b"".join(sorted(access.callers()))
        self._key = hashlib.scrypt(tokens, salt=b"keypool session", **_SCRYPT) if tokens else b""
        self._notes: dict[str, int] = {}
        self._unshared: dict[str, int | None] = {}
        access.by_session = self._caller_of_call

    def sign_in(self, token: str) -> tuple[Session, str]:
        """A new session for whom this token stands, and its cookie. Raises Unauthorized, Forbidden."""
        caller = self._access.identify(f"Bearer {token}")
        if caller.role is Role.CLIENT:
            raise Forbidden("this is a client token: the dashboard wants a viewer or an admin token")
        mark = hashlib.sha256(token.strip().encode()).hexdigest()[:16]
        session = Session(caller, secrets.token_hex(12), self._wall() + LIFE, mark)
        payload = urlsafe_b64encode(msgspec.json.encode([mark, session.id, session.ends_at])).decode()
        return session, f"{payload}.{self._sign(payload)}"

    def of(self, headers: Mapping[str, str]) -> Session:
        """Whose request this is: by bearer token, else by cookie. 20 µs. Raises Unauthorized, Forbidden."""
        if self._access.open:
            return Session(ANYONE)
        if "Authorization" in headers:
            caller = self._access.identify(headers["Authorization"])
            if caller.role is Role.CLIENT:
                raise Forbidden("this is for viewers and admins; this token is a client's")
            return Session(caller)
        session = self._read(headers.get("Cookie", ""))
        if session is None:
            raise Unauthorized("sign in at /login, or send Authorization: Bearer TOKEN")
        return session

    def alive(self, session: Session) -> bool:
        """Whether a session, once believed, still holds. O(1)."""
        if session.id is None:
            return True
        return (
            session.ends_at > self._wall()
            and session.note not in self._notes
            and session.began > self._notes.get(f"void.{session.mark}", 0)
        )

    def end(self, session: Session) -> None:
        """Sign out: the cookie is worth nothing here from now on, and elsewhere once it is shared. O(notes)."""
        if session.id is None:
            return
        life, now = _milliseconds(LIFE), _milliseconds(self._wall())
        for name, moment in list(self._notes.items()):
            if moment + (life if name.startswith("void.") else 0) <= now:
                self._note(name, None)
        self._note(session.note, _milliseconds(session.ends_at))
        prefix = f"session.{session.mark}."
        ended = [(moment, name) for name, moment in self._notes.items() if name.startswith(prefix)]
        if len(ended) > MOST_ENDED:
            moment, name = min(ended)
            self._note(name, None)
            void = f"void.{session.mark}"
            self._note(void, max(moment - life, self._notes.get(void, 0)))

    def _note(self, name: str, moment: int | None) -> None:
        self._unshared[name] = moment
        if moment is None:
            self._notes.pop(name, None)
        else:
            self._notes[name] = moment

    async def share(self, engine: Engine) -> None:
        """Have the pool keep the sign-outs of this process, and learn of the others'. Raises StorageUnavailable.

        To be called again and again: what could not be kept goes with the next time. O(notes).
        """
        if self._unshared:
            sent = dict(self._unshared)
            await engine.keep_notes(sent)
            for name, moment in sent.items():
                if self._unshared[name] == moment:
                    del self._unshared[name]
        notes = dict(await engine.notes())
        for name, unshared in self._unshared.items():
            if unshared is None:
                notes.pop(name, None)
            else:
                notes[name] = unshared
        self._notes = notes

    def xsrf(self, session: Session) -> str:
        """What the session's own pages prove themselves with."""
        return self._sign(f"xsrf {session.id}")[:32] if session.id else "open"

    def proven(self, session: Session, given: str) -> bool:
        """Whether this is the proof of this session's pages."""
        return hmac.compare_digest(self.xsrf(session).encode(), given.encode())

    def _caller_of_call(self, headers: Mapping[str, str]) -> Caller:
        session = self._read(headers.get("Cookie", ""))
        if session is None:
            raise Unauthorized("the session has ended: sign in at /login")
        if not self.proven(session, headers.get(XSRF_HEADER, "")):
            raise Unauthorized(f"{XSRF_HEADER} is not that of this session: load the page again")
        return session.caller

    def _read(self, cookies: str) -> Session | None:
        payload, dot, signature = parse_cookie(cookies).get(COOKIE, "").rpartition(".")
        if not dot or not hmac.compare_digest(self._sign(payload).encode(), signature.encode()):
            return None
        try:
            mark, name, ends_at = msgspec.json.decode(urlsafe_b64decode(payload), type=tuple[str, str, float])
        except (ValueError, binascii.Error):  # signed, so only by another version of the server
            return None
        caller = self._callers.get(mark)
        if caller is None:
            return None
        session = Session(caller, name, ends_at, mark)
        return session if self.alive(session) else None

    def _sign(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
