"""`keypool events`: prints what the server's feed reports, a line for each event, across its restarts.

The feed is a websocket, for which this module imports Tornado.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from tornado.httpclient import HTTPError, HTTPRequest
from tornado.websocket import WebSocketClientConnection, WebSocketError, websocket_connect

from keypool.cli.connection import settings
from keypool.cli.holders import rare_events
from keypool.cli.keys import output_of
from keypool.cli.output import Output, note, printable
from keypool.cli.status import CommandError, Status
from keypool.client.settings import DEFAULT_POOL, Settings

COLUMNS = ("at", "event", "id", "hint", "owner", "lease", "by", "actor")
_SILENCE = 20.0  # seconds without a frame after which the feed counts as lost: one comes every 5 s
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 3.0  # seconds between attempts to connect
_DENIED = (401, 403)
_UNAVAILABLE = (502, 503, 504, 599)


class _Disconnected(Exception):
    """The connection failed or was lost; another attempt may succeed."""


def events(args: argparse.Namespace) -> Status:
    """Print events until Ctrl-C, or until --count were printed; with --rare, those that are kept."""
    if args.rare:
        return rare_events(args)
    if args.kind is not None:
        raise CommandError("--kind goes with --rare only", Status.USAGE)
    asyncio.run(_follow(args))
    return Status.OK


async def _follow(args: argparse.Namespace) -> None:
    """Print events across reconnects. Raises CommandError if the feed is refused, or can't be reached for too long.

    That is --retry seconds; without it, they bound only the first connection.
    """
    client, output = settings(args), output_of(args)
    patience = math.inf if args.retry is None else args.retry
    printed: deque[str] = deque(maxlen=200)
    remaining: int = -1 if args.count is None else args.count
    pause = _FIRST_PAUSE
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + client.retry.seconds
    while True:
        try:
            async with aclosing(_messages(client)) as messages:
                async for message in messages:
                    pause, give_up_at = _FIRST_PAUSE, math.inf
                    for event in _unprinted(message, printed, args.past):
                        _print(output, event)
                        printed.append(_identity(event))
                        remaining -= 1
                        if remaining == 0:
                            return
                    if message.get("dropped"):
                        note(f"{message['dropped']} events were left out by the server")
        except _Disconnected as error:
            if give_up_at == math.inf:  # it was connected
                give_up_at = loop.time() + patience
            if loop.time() >= give_up_at:
                raise CommandError(str(error), Status.UNREACHABLE) from None
            note(f"{error}; retrying, events may be missing")
            await asyncio.sleep(pause)
            pause = min(_LONGEST_PAUSE, pause * 2)


async def _messages(client: Settings) -> AsyncGenerator[dict[str, Any], None]:
    """The messages of one connection. Raises _Disconnected when it ends, CommandError if it is refused."""
    connection = await _connect(client)
    try:
        while True:
            async with asyncio.timeout(_SILENCE):
                frame = await connection.read_message()
            if frame is None:
                raise _Disconnected("the server closed the feed")
            message = json.loads(frame)
            message["type"]  # KeyError if it is missing
            yield message
    except TimeoutError:
        raise _Disconnected("the feed has gone silent") from None
    except (ValueError, KeyError, TypeError):
        raise CommandError("a frame of the feed can't be read", Status.FAILED) from None
    finally:
        connection.close()


async def _connect(client: Settings) -> WebSocketClientConnection:
    url = client.url
    feed = f"ws{client.base.removeprefix('http')}/feed"
    request = HTTPRequest(feed, headers=client.headers(), request_timeout=client.timeout)
    try:
        async with asyncio.timeout(client.timeout):
            return await websocket_connect(request)
    except HTTPError as error:
        if error.code in _UNAVAILABLE:
            raise _Disconnected(f"{url} answered {error.code}") from None
        if error.code == 404 and client.pool != DEFAULT_POOL:
            raise CommandError(
                f"there is no pool {client.pool}, or this token is not for it", Status.UNKNOWN_KEY
            ) from None
        status = Status.DENIED if error.code in _DENIED else Status.FAILED
        raise CommandError(f"the feed was refused with HTTP status {error.code}", status) from None
    except TimeoutError:
        raise _Disconnected(f"can't reach {url}: no answer in time") from None
    except OSError as error:
        raise _Disconnected(f"can't reach {url}: {error.strerror or error}") from None
    except WebSocketError as error:
        raise CommandError(f"no feed there ({error}): is the URL right?", Status.FAILED) from None


def _unprinted(message: dict[str, Any], printed: deque[str], past: int) -> list[dict[str, Any]]:
    """The events to print. After a reconnect a hello repeats events; the very first one is cut to the last `past`."""
    reported: list[dict[str, Any]] = message.get("events", [])
    if message["type"] == "delta":
        return reported
    if message["type"] != "hello":
        return []
    new = [event for event in reported if _identity(event) not in printed]
    return new if printed else new[max(0, len(new) - past) :]


def _print(output: Output, event: dict[str, Any]) -> None:
    if not output.as_table:
        output.rows(COLUMNS, [event])
        return
    owner = f"  {event['owner']}" if event.get("owner") else ""
    operator = f"  by operator {event.get('actor') or ''}" if event.get("by") == "operator" else ""
    text = (
        f"{event.get('event', ''):<11}  {event.get('hint')}  id:{event.get('id')}{owner}{operator}".rstrip()
    )
    print(f"{event.get('at')}  {printable(text)}", flush=True)


def _identity(event: dict[str, Any]) -> str:
    return json.dumps([event.get(name) for name in ("at", "event", "id", "lease")])
