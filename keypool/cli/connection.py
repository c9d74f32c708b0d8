"""The server's URL, the pool and the token, from the environment and from files.

A token is never an argument: everybody on the machine can see a command line, and the shell stores it.
"""

from __future__ import annotations

import argparse
import os

from keypool.cli.output import note
from keypool.client import KeyPool, Retry
from keypool.client.settings import Settings, from_environment, read_token
from keypool.misspelled import CLIENT_VARIABLES, misspelled

DEFAULT_RETRY = 5.0
"""Seconds to retry for without --retry."""


class _NotedRetry(Retry):
    """Reports the first failure at once, instead of staying silent while a call is retried."""

    def pause(self, failures: int) -> float:
        """Seconds to wait after so many failures."""
        if failures == 1 and self.seconds:
            note(f"no answer from the server; retrying for {self.seconds:g} s")
        return super().pause(failures)


def settings(args: argparse.Namespace) -> Settings:
    """The client's settings. Raises ValueError for a wrong URL or token.

    The token is that of --token-file, KEYPOOL_TOKEN or KEYPOOL_TOKEN_FILE, in this order.
    """
    for line in misspelled(os.environ, CLIENT_VARIABLES):
        note(line)
    environ = dict(os.environ)
    if args.token_file:
        environ["KEYPOOL_TOKEN"] = read_token("--token-file", args.token_file)
    found = from_environment(environ)
    retry = _NotedRetry(DEFAULT_RETRY if args.retry is None else args.retry)
    return Settings.of(
        args.url or found["url"], found["token"], args.timeout, retry, args.pool or found["pool"]
    )


def connect(args: argparse.Namespace) -> KeyPool:
    """A client of the server. Raises ValueError for a wrong URL or token."""
    found = settings(args)
    return KeyPool(found.url, found.token, timeout=found.timeout, retry=found.retry, pool=found.pool)
