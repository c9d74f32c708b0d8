"""The server's URL and the token, from the environment and from files.

A token is never an argument: everybody on the machine can see a command line, and the shell stores it.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from keypool.cli.output import note
from keypool.cli.status import CommandError, Status
from keypool.client import AnswerLost, KeyPool, NoKeyAvailable, Retry
from keypool.misspelled import CLIENT_VARIABLES, misspelled

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8888"
_LONGEST_WAIT = 60.0  # seconds that one acquire may wait


class _NotedRetry(Retry):
    """Says at once that a call is retried, instead of being silent for as long as that takes."""

    def pause(self, failures: int) -> float:
        """Seconds to wait after so many failures."""
        if failures == 1 and self.seconds:
            note(f"no answer from the server; retrying for {self.seconds:g} s")
        return super().pause(failures)


def connect(args: argparse.Namespace) -> KeyPool:
    """A client of the server. Raises CommandError for a wrong URL or token."""
    for line in misspelled(os.environ, CLIENT_VARIABLES):
        note(line)
    try:
        return KeyPool(server_url(args), token(args), timeout=args.timeout, retry=_NotedRetry(args.retry))
    except ValueError as error:
        raise CommandError(str(error), Status.USAGE) from None


def server_url(args: argparse.Namespace) -> str:
    """--url, KEYPOOL_URL or the default. The API's base path may stand at its end, as in the docs."""
    url: str = args.url or os.environ.get("KEYPOOL_URL") or DEFAULT_URL
    return url.rstrip("/").removesuffix("/api/v1")


def token(args: argparse.Namespace) -> str | None:
    """The token: --token-file, KEYPOOL_TOKEN or KEYPOOL_TOKEN_FILE, in this order. Raises CommandError."""
    if args.token_file:
        return _read("--token-file", args.token_file)
    if os.environ.get("KEYPOOL_TOKEN"):
        return os.environ["KEYPOOL_TOKEN"]
    path = os.environ.get("KEYPOOL_TOKEN_FILE")
    return _read("KEYPOOL_TOKEN_FILE", path) if path else None


def _read(source: str, path: str) -> str:
    try:
        # The shell leaves the ~ of FILE=~/token alone in some places, so it is expanded here.
        found = Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        raise CommandError(f"{source} {path} can't be read: {error}", Status.USAGE) from None
    if len(found.split()) != 1:
        raise CommandError(f"{source} {path} must hold one token and nothing else", Status.USAGE)
    return found


def wait_for_key(wait: float, acquire: Callable[[float], T]) -> T:
    """What `acquire(seconds)` returns, called again while `wait` seconds last, which may be infinite.

    A lost answer is no reason to stop waiting: if a key was leased by it, its lease ends by itself.
    """
    deadline = time.monotonic() + wait
    while True:
        remaining = max(0.0, deadline - time.monotonic())
        try:
            return acquire(min(remaining, _LONGEST_WAIT))
        except NoKeyAvailable:
            if remaining <= _LONGEST_WAIT:
                raise
        except AnswerLost as error:
            if remaining <= 0:
                raise
            note(f"{error}: waiting on")
