"""`keypool events`: prints what the server's feed reports, a line for each event, across its restarts.

The feed is a websocket, for which this module imports Tornado.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import deque
from typing import Any
from urllib.parse import urlsplit

from tornado.httpclient import HTTPError, HTTPRequest
from tornado.websocket import WebSocketClientConnection, WebSocketError, websocket_connect

from keypool.cli.connection import server_url, token
from keypool.cli.keys import output_of
from keypool.cli.output import note, printable
from keypool.cli.status import CommandError, Status

COLUMNS = ("at", "event", "id", "hint", "owner", "lease")
_SILENCE = 20.0  # seconds without a frame after which the server is taken for dead: it sends one every 5
_LONGEST_PAUSE = 3.0  # seconds between attempts to connect
_DENIED = (401, 403)
_UNAVAILABLE = (502, 503, 504, 599)


class _Disconnected(Exception):
    """There is no connection, or no longer; another attempt may help."""


def events(args: argparse.Namespace) -> Status:
    """Print events until Ctrl-C, or until --count were printed."""
    asyncio.run(_Follower(args).follow())
    return Status.OK


class _Follower:
    """Prints each event once, over as many connections as it takes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._url = server_url(args)
        parts = urlsplit(self._url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise CommandError(f"{self._url!r} isn't a URL like http://127.0.0.1:8888", Status.USAGE)
        self._feed = f"ws{self._url[4:]}/api/v1/feed"
        known = token(args)
        self._headers = {"Authorization": f"Bearer {known}"} if known else {}
        self._output = output_of(args)
        self._timeout: float = args.timeout
        self._retry: float = args.retry
        self._past: int = args.past
        self._remaining: int | None = args.count
        self._printed: deque[str] = deque(maxlen=200)
        self._was_connected = False

    async def follow(self) -> None:
        """Follow until enough events were printed. Raises CommandError if there is no feed to follow."""
        pause = 0.1
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._retry
        while self._remaining != 0:
            try:
                await self._follow_once()
            except _Disconnected as error:
                if not self._was_connected and loop.time() >= give_up_at:
                    raise CommandError(str(error), Status.UNREACHABLE) from None
                note(f"{error}; retrying, events may be missing")
                await asyncio.sleep(pause)
                pause = min(_LONGEST_PAUSE, pause * 2)

    async def _follow_once(self) -> None:
        connection = await self._connect()
        self._was_connected = True
        try:
            while self._remaining != 0:
                try:
                    async with asyncio.timeout(_SILENCE):
                        frame = await connection.read_message()
                except TimeoutError:
                    raise _Disconnected("the feed has gone silent") from None
                if frame is None:
                    raise _Disconnected("the server closed the feed")
                self._take(frame)
        finally:
            connection.close()

    async def _connect(self) -> WebSocketClientConnection:
        request = HTTPRequest(
            self._feed, headers=self._headers, connect_timeout=self._timeout, request_timeout=self._timeout
        )
        try:
            async with asyncio.timeout(self._timeout):
                return await websocket_connect(request)
        except HTTPError as error:
            if error.code in _UNAVAILABLE:
                raise _Disconnected(f"{self._url} answered {error.code}") from None
            status = Status.DENIED if error.code in _DENIED else Status.FAILED
            raise CommandError(f"the feed was refused with HTTP status {error.code}", status) from None
        except TimeoutError:
            raise _Disconnected(f"can't reach {self._url}: no answer in time") from None
        except OSError as error:
            raise _Disconnected(f"can't reach {self._url}: {error.strerror or error}") from None
        except WebSocketError as error:
            raise CommandError(f"no feed there ({error}): is the URL right?", Status.FAILED) from None

    def _take(self, frame: str | bytes) -> None:
        try:
            message = json.loads(frame)
            kind, reported = message["type"], message.get("events", [])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CommandError("a frame of the feed can't be read", Status.FAILED) from None
        if kind == "hello":
            new = [event for event in reported if _identity(event) not in self._printed]
            # Before the first connection, as many as were asked for; after an interruption, all.
            reported = new if self._printed else new[max(0, len(new) - self._past) :]
        elif kind != "delta":
            return
        for event in reported[: self._remaining]:
            self._print(event)
        if message.get("dropped"):
            note(f"{message['dropped']} events were left out by the server")

    def _print(self, event: dict[str, Any]) -> None:
        self._printed.append(_identity(event))
        if self._remaining is not None:
            self._remaining -= 1
        if not self._output.as_table:
            self._output.rows(COLUMNS, [event])
            return
        owner = f"  by {event['owner']}" if event.get("owner") else ""
        text = f"{event.get('event', ''):<9}  {event.get('hint')}  id:{event.get('id')}{owner}"
        print(f"{event.get('at')}  {printable(text)}")
        sys.stdout.flush()


def _identity(event: dict[str, Any]) -> str:
    return json.dumps([event.get(name) for name in ("at", "event", "id", "lease")])
