"""`keypool events`: follow the feed of the server, a line an event, through its restarts.

The feed is a websocket, so this command needs Tornado, which is imported with this module. What the server
left out (a feed is coalesced, and a reader may be slow) is said on standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import ssl
import sys
from collections import deque
from typing import Any

from tornado.httpclient import HTTPError, HTTPRequest
from tornado.websocket import WebSocketClientConnection, WebSocketError, websocket_connect

from keypool.cli.connect import token_of
from keypool.cli.keys import output_of
from keypool.cli.output import Output, printable
from keypool.cli.status import Status
from keypool.client.errors import (
    AnswerLost,
    Forbidden,
    KeyPoolError,
    NotFound,
    TooManyViewers,
    Unauthorized,
    UnexpectedAnswer,
    Unreachable,
)
from keypool.client.settings import BASE, DEFAULT_URL, Retry, Settings

COLUMNS = ("at", "event", "id", "hint", "owner", "lease")
_SILENCE = 20.0
"""Seconds without a frame after which the server is taken for dead: it sends one every 5."""

_REFUSALS = {401: Unauthorized, 403: Forbidden, 404: NotFound, 429: TooManyViewers}


def events(args: argparse.Namespace) -> Status:
    """Print events until Ctrl-C, or until there were as many as asked for."""
    url = args.url or os.environ.get("KEYPOOL_URL") or DEFAULT_URL
    follower = Follower(Settings.of(url, token_of(args, os.environ)), output_of(args), args)
    asyncio.run(follower.follow())
    return Status.OK


class Follower:
    """Prints the events of one feed, each once, over as many connections as it takes."""

    def __init__(self, settings: Settings, output: Output, args: argparse.Namespace) -> None:
        self._url, self._token = settings.url, settings.token
        self._output = output
        self._timeout: float = args.timeout
        self._patience: float = args.retry
        self._past: int = args.past
        self._wanted: int | None = args.count
        self._shown: deque[str] = deque(maxlen=200)
        self._was_connected = False

    async def follow(self) -> None:
        """Until there were enough events. Raises KeyPoolError if there is nothing to follow."""
        pauses, failures = Retry(), 0
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._patience
        while self._wanted != 0:
            try:
                await self._follow_once()
                failures = 0
            except (Unreachable, AnswerLost) as error:
                failures += 1
                if not self._was_connected and loop.time() >= give_up_at:
                    raise
                self._output.note(f"{error}; trying on, events may be missing")
                await asyncio.sleep(pauses.pause(failures))

    async def _follow_once(self) -> None:
        connection = await self._connect()
        self._was_connected = True
        try:
            while self._wanted != 0:
                try:
                    async with asyncio.timeout(_SILENCE):
                        frame = await connection.read_message()
                except TimeoutError:
                    raise AnswerLost("the feed is silent") from None
                if frame is None:
                    raise AnswerLost("the server closed the feed")
                self._take(frame)
        finally:
            connection.close()

    async def _connect(self) -> WebSocketClientConnection:
        request = HTTPRequest(
            f"ws{self._url.removeprefix('http')}{BASE}/feed",
            headers={"Authorization": f"Bearer {self._token}"} if self._token else {},
            connect_timeout=self._timeout,
            request_timeout=self._timeout,
            ssl_options=ssl.create_default_context() if self._url.startswith("https") else None,
        )
        try:
            async with asyncio.timeout(self._timeout):
                return await websocket_connect(request)
        except HTTPError as error:
            raise self._refused(error) from None
        except TimeoutError:
            raise Unreachable(f"can't reach {self._url}: no answer in time") from None
        except OSError as error:
            raise Unreachable(f"can't reach {self._url}: {error.strerror or error}") from None
        except WebSocketError as error:
            raise UnexpectedAnswer(f"no feed there ({error}): is the URL right?") from None

    def _refused(self, error: HTTPError) -> KeyPoolError:
        if error.code in (502, 503, 504, 599):
            return Unreachable(f"{self._url} answered {error.code}")
        kind = _REFUSALS.get(error.code)
        if kind is None:
            return UnexpectedAnswer(f"no feed there: answered {error.code}", error.code)
        return kind(f"the feed was refused with {error.code}")

    # -- frames

    def _take(self, frame: str | bytes) -> None:
        try:
            message = json.loads(frame)
            kind, happened = message["type"], message.get("events", [])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UnexpectedAnswer("a frame of the feed that can't be read") from None
        if kind == "hello":
            news = [event for event in happened if _identity(event) not in self._shown]
            # What came before the first connection is shown as far as it was asked for; after, all of it.
            happened = news if self._shown else news[max(0, len(news) - self._past) :]
        elif kind != "delta":
            return
        for event in happened:
            self._show(event)
        if message.get("dropped"):
            self._output.note(f"{message['dropped']} events were left out by the server")

    def _show(self, event: dict[str, Any]) -> None:
        if self._wanted == 0:
            return
        self._shown.append(_identity(event))
        self._output.rows(COLUMNS, [event]) if self._plain() else self._pretty(event)
        if self._wanted is not None:
            self._wanted -= 1

    def _plain(self) -> bool:
        return self._output.as_json or not self._output.terminal

    def _pretty(self, event: dict[str, Any]) -> None:
        owner = f"  by {event['owner']}" if event.get("owner") else ""
        what = f"{event.get('event', ''):<9}  {event.get('hint')}  id:{event.get('id')}{owner}"
        print(f"{event.get('at')}  {printable(what)}")
        sys.stdout.flush()


def _identity(event: dict[str, Any]) -> str:
    return json.dumps([event.get(name) for name in ("at", "event", "id", "lease")])
