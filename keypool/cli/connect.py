"""Where the server is and with which token, from the environment and from files.

A token is never an argument: a command line is seen by everybody on the machine and kept by the shell.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping

from keypool.cli.status import CommandError, Status
from keypool.client import KeyPool, Retry, exit_on_sigterm
from keypool.client.settings import DEFAULT_URL, from_environment, read_token


def connect(args: argparse.Namespace, *, retry: Retry | None = None) -> KeyPool:
    """A client of the server that is meant. Raises CommandError for a wrong URL or token."""
    exit_on_sigterm()
    url = args.url or os.environ.get("KEYPOOL_URL") or DEFAULT_URL
    patience = Retry(args.retry) if retry is None else retry
    try:
        return KeyPool(url, token_of(args, os.environ), timeout=args.timeout, retry=patience)
    except ValueError as error:
        raise CommandError(str(error), Status.USAGE) from None


def token_of(args: argparse.Namespace, environ: Mapping[str, str]) -> str | None:
    """The token: --token-file, KEYPOOL_TOKEN or KEYPOOL_TOKEN_FILE, in this order. Raises CommandError."""
    try:
        if args.token_file:
            return read_token("--token-file", args.token_file)
        token: str | None = from_environment(environ)["token"]
    except ValueError as error:
        raise CommandError(str(error), Status.USAGE) from None
    return token
