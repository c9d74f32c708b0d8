"""Reload of the token files at SIGHUP, without a restart and without signing anybody out.

    ask() -> read and check all sources, in a thread -> replace the tokens in Access, without an await

Calls in flight keep the role they began with; every later call is checked against the new tokens. If a source
is wrong, the old tokens stay.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping

from keypool.api.auth import Access
from keypool.config.tokens import ROLES, read_tokens, token_variables
from keypool.core.errors import SettingsError
from keypool.web.session import Sessions

_log = logging.getLogger("keypool")


class TokenReload:
    """`changed` is called after each reload. `sessions` is set once the dashboard exists."""

    def __init__(self, access: Access, environ: Mapping[str, str], changed: Callable[[], None]) -> None:
        self.sessions: Sessions | None = None
        self._access = access
        self._environ = environ
        self._changed = changed
        self._task: asyncio.Task[None] | None = None
        self._asked = False

    def ask(self) -> None:
        """Reload soon; once more if a reload is under way. Needs a running loop."""
        self._asked = True
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._asked:
                self._asked = False
                await self._read()
        except Exception:
            _log.exception("the token files could not be reloaded: the previous tokens stay valid")
        finally:
            self._task = None

    async def _read(self) -> None:
        if not any(self._environ.get(token_variables(role)[1]) for role in ROLES):
            _log.info("SIGHUP: no token files to reload, as no tokens come from files")
            return
        try:
            tokens = await asyncio.to_thread(read_tokens, self._environ)
        except SettingsError as error:
            _log.error("the token files are wrong, so the previous tokens stay valid: %s", error)
            return
        if self.sessions is not None:
            digests = [
                hashlib.sha256(token.encode()).digest()
                for role in ("viewer", "admin")
                for token in tokens.get(role, ())
            ]
            await asyncio.to_thread(self.sessions.prepare, digests)
        before = self._access.callers().keys()
        self._access.replace(**tokens)
        self._changed()
        after = self._access.callers().keys()
        _log.info(
            "the token files were reloaded: %d valid tokens, %d of them new; %d were removed",
            len(after), len(after - before), len(before - after),
        )  # fmt: skip
