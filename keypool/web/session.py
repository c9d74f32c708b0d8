"""Sessions of the dashboard: a user signs in with a token once, and gets a signed cookie.

    token --POST /login--> cookie [mark of the token, session id, end], signed --> Caller

The cookie holds no token, and the server stores no sessions: it checks its own signature and looks the token
up by its mark, so removing a token ends its sessions. The signing key is derived from the token's digest, so
neither a restart nor a change of other tokens ends a session, and several processes accept each other's.
scrypt makes it expensive to guess a token from a stolen cookie. It takes 30 to 60 ms a token, once: `prepare` does that
in a thread. If a session comes first, its key is derived then and there, and the event loop waits.

The dashboard's scripts make changes through the API, with its role checks and audit log. The dispatcher
accepts the cookie only together with the header `X-Keypool-Xsrf`, whose value is bound to the session and is
in the dashboard's own pages. A page of another site can neither read the value nor send the header (and its
Origin is refused besides). A websocket can't carry the header: there the Origin, which browsers always send,
must be this server's.

A sign-out is kept as a note among the pool's data until the cookie would have expired, so that it holds after
a restart and on all servers of the pool. There are at most `MOST_ENDED` such notes for a token. With one
more, the note of the session that began first is replaced by a moment before which all sessions of that token
have ended:

    session.MARK.ID    the session's natural end    a session that was signed out
    void.MARK          a moment                     sessions of this token that began by then have ended

Both are in milliseconds of the wall clock.
"""

from __future__ import annotations

import binascii
import contextlib
import hashlib
import hmac
import secrets
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec
from tornado.httputil import parse_cookie

from keypool.api.auth import ANYONE, XSRF_HEADER, Access, Caller, Role
from keypool.core.errors import Forbidden, Unauthorized
from keypool.engine import Engine

COOKIE = "keypool_session"
LIFE = 12 * 3600.0
"""Seconds until a session ends: a working day."""

MOST_ENDED = 64
"""Sign-outs of one token that are stored individually."""

_SCRYPT = {"n": 2**14, "r": 8, "p": 1}  # 16 MB and 30 to 60 ms, once a token
_PROOF = 16  # bytes


@dataclass(frozen=True, slots=True)
class Session:
    """A signed-in caller. `id` is None without a cookie: for a bearer token, or on an open server."""

    caller: Caller
    id: str | None = None
    mark: str = ""
    ends_at: float = float("inf")

    @property
    def note(self) -> str:
        """The name of the note that records this session's sign-out."""
        return f"session.{self.mark}.{self.id}"

    @property
    def began(self) -> int:
        """The moment of the sign-in, in milliseconds."""
        return _milliseconds(self.ends_at - LIFE)


class Sessions:
    """Makes, checks and ends sessions of the tokens in `access`."""

    def __init__(self, access: Access, wall: Callable[[], float] = time.time) -> None:
        self._access = access
        self._wall = wall
        self._keys: dict[str, bytes] = {}
        self._notes: dict[str, int] = {}
        self._unshared: dict[str, int | None] = {}
        access.by_session = self._caller_of_call

    def prepare(self) -> None:
        """Derive the signing keys of all tokens, and drop others. Blocks 30 to 60 ms a new token; any thread."""
        marks = {caller.mark for caller in self._access.callers().values() if caller.role is not Role.CLIENT}
        for mark in self._keys.keys() - marks:
            self._keys.pop(mark, None)
        for mark in marks - self._keys.keys():
            with contextlib.suppress(Unauthorized):  # it was removed meanwhile
                self._key(mark)

    def _key(self, mark: str) -> bytes:
        """The signing key of the token with this mark. Raises Unauthorized if there is no such token."""
        key = self._keys.get(mark)
        if key is None:
            digest = self._access.digest(mark)
            if digest is None:
                raise Unauthorized("the session has ended: sign in at /login")
            key = self._keys[mark] = hashlib.scrypt(digest, salt=b"keypool session", **_SCRYPT)
        return key

    def sign_in(self, token: str) -> tuple[Session, str]:
        """A new session for this token, and its cookie. Raises Unauthorized, Forbidden."""
        caller = self._access.identify(f"Bearer {token}")
        if caller.role is Role.CLIENT:
            raise Forbidden("this is a client token: the dashboard needs a viewer or an admin token")
        mark = caller.mark
        session = Session(caller, secrets.token_hex(12), mark, self._wall() + LIFE)
        payload = urlsafe_b64encode(msgspec.json.encode([mark, session.id, session.ends_at])).decode()
        return session, f"{payload}.{self._sign(mark, payload)}"

    def of(self, headers: Mapping[str, str]) -> Session:
        """The session of a request: by bearer token, else by cookie. 20 µs. Raises Unauthorized, Forbidden."""
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
        """Whether a session is still valid. O(1)."""
        if not self._access.knows(session.caller):
            return False
        if session.id is None:
            return True
        return (
            session.ends_at > self._wall()
            and session.note not in self._notes
            and session.began > self._notes.get(f"void.{session.mark}", 0)
        )

    def end(self, session: Session) -> None:
        """End a session: at once at this server, and at others after `share`. O(notes)."""
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
        """Store this process's sign-outs with the pool, and load those of others. O(notes). Raises StorageUnavailable.

        Call it repeatedly: notes that could not be stored are stored by the next call.
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
        """A value of XSRF_HEADER for this session, another one each time: 16 random bytes, and the proof XOR these.

        Pages are compressed together with texts that others choose (a search, owners), so the length of a page may tell
        whether such a text repeats a part of it (BREACH). A value that is in one page only can't be guessed bit by bit.
        """
        if not session.id:
            return "open"
        mask = secrets.token_bytes(_PROOF)
        return (mask + _xor(mask, self._proof(session))).hex()

    def proven(self, session: Session, given: str) -> bool:
        """Whether `given` is an XSRF value of this session. Takes constant time."""
        if not session.id:
            return given == "open"
        try:
            value = bytes.fromhex(given)
        except ValueError:
            return False
        mask, masked = value[:_PROOF], value[_PROOF:]
        return len(masked) == _PROOF and hmac.compare_digest(_xor(mask, masked), self._proof(session))

    def _proof(self, session: Session) -> bytes:
        return bytes.fromhex(self._sign(session.mark, f"xsrf {session.id}"))[:_PROOF]

    def _caller_of_call(self, headers: Mapping[str, str]) -> Caller:
        session = self._read(headers.get("Cookie", ""))
        if session is None:
            raise Unauthorized("the session has ended: sign in at /login")
        if not self.proven(session, headers.get(XSRF_HEADER, "")):
            raise Unauthorized(f"{XSRF_HEADER} is not that of this session: load the page again")
        return session.caller

    def _read(self, cookies: str) -> Session | None:
        payload, dot, signature = parse_cookie(cookies).get(COOKIE, "").rpartition(".")
        if not dot:
            return None
        try:
            mark, name, ends_at = msgspec.json.decode(urlsafe_b64decode(payload), type=tuple[str, str, float])
        except (ValueError, binascii.Error):
            return None
        caller = self._access.marked(mark)
        # Nothing in the cookie is trusted until its signature is checked; the mark only selects the signing key.
        if caller is None or caller.role is Role.CLIENT:
            return None
        if not hmac.compare_digest(self._sign(mark, payload).encode(), signature.encode()):
            return None
        session = Session(caller, name, mark, ends_at)
        return session if self.alive(session) else None

    def _sign(self, mark: str, text: str) -> str:
        return hmac.new(self._key(mark), text.encode(), hashlib.sha256).hexdigest()


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
