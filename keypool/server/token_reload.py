"""Reload of the tokens, at SIGHUP or after a change of the file of named ones, without signing anybody out.

    ask() -> read and check all sources, in a thread -> replace the tokens in Access, without an await

Calls in flight keep the role they began with; every later call is checked against the new tokens. If a source
is wrong, the old tokens stay.

A server's only process looks after the file by itself (`watch`). Several are asked by their supervisor, which
looks after it for all of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from keypool.api.auth import Access
from keypool.config.token_sources import POLL_SECONDS, FileWatch, TokenSources
from keypool.core.errors import SettingsError
from keypool.web.session import Sessions

_log = logging.getLogger("keypool")


class TokenReload:
    """`changed` is called after each reload. All methods need a running loop."""

    def __init__(self, access: Access, sources: TokenSources, changed: Callable[[], None]) -> None:
        self._access = access
        self._sources = sources
        self._changed = changed
        self._sessions: Sessions | None = None
        self._file = None if sources.path is None else FileWatch(sources.path)
        self._tasks: set[asyncio.Task[None]] = set()
        self._one_at_a_time = asyncio.Lock()
        self._asked = False

    def ask(self) -> None:
        """Reload soon, as a signal asks for it: after the reload that is under way, if there is one."""
        if not self._asked:
            self._asked = True
            self._start(self._read(asked=True))

    def watch(self) -> None:
        """From now on reload when the file of named tokens, if there is one, has changed."""
        if self._file is not None:
            self._start(self._poll(self._file))

    def serve_sessions(self, sessions: Sessions) -> None:
        """Prepare the sessions of the dashboard, which exists now, and again after each reload."""
        self._sessions = sessions
        self._start(asyncio.to_thread(sessions.prepare))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(self._guarded(work))
        self._tasks.add(task)  # the loop itself keeps no reference
        task.add_done_callback(self._tasks.discard)

    @staticmethod
    async def _guarded(work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:
            _log.exception("the tokens could not be reloaded: the previous tokens stay valid")

    async def _poll(self, file: FileWatch) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            if await asyncio.to_thread(file.changed):
                await self._read(asked=False)

    async def _read(self, *, asked: bool) -> None:
        async with self._one_at_a_time:
            if asked:
                self._asked = False
            if self._sources.files:
                await self._replace(asked=asked)
            else:
                _log.info("SIGHUP: no token files to reload, as no tokens come from files")

    async def _replace(self, *, asked: bool) -> None:
        try:
            if self._file is not None:
                await asyncio.to_thread(self._file.reading)
            tokens = await asyncio.to_thread(self._sources.read)
        except SettingsError as error:
            _log.error("the token files are wrong, so the previous tokens stay valid: %s", error)
            return
        before = self._access.callers()
        self._access.replace(tokens.client, tokens.viewer, tokens.admin, tokens.named)
        after = self._access.callers()
        if not asked and after == before:
            return  # the file was only touched
        self._changed()
        _log.info(
            "the token files were reloaded: %d valid tokens, %d of them new; %d were removed",
            len(after), len(after.keys() - before.keys()), len(before.keys() - after.keys()),
        )  # fmt: skip
        if self._sessions is not None:
            await asyncio.to_thread(self._sessions.prepare)
