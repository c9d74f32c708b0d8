"""Where the server is and with which token, from the environment and from files.

A token is never an argument: a command line is seen by everybody on the machine and kept by the shell.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from keypool.cli.status import CommandError, Status
from keypool.client import KeyPool, Retry

DEFAULT_URL = "http://127.0.0.1:8888"


def connect(args: argparse.Namespace, *, retry: Retry | None = None) -> KeyPool:
    """A client of the server that is meant. Raises CommandError for a wrong URL or token."""
    url = args.url or os.environ.get("KEYPOOL_URL") or DEFAULT_URL
    patience = Retry(args.retry) if retry is None else retry
    try:
        return KeyPool(url, token_of(args, os.environ), timeout=args.timeout, retry=patience)
    except ValueError as error:
        raise CommandError(str(error), Status.USAGE) from None


def token_of(args: argparse.Namespace, environ: Mapping[str, str]) -> str | None:
    """The token: --token-file, KEYPOOL_TOKEN or KEYPOOL_TOKEN_FILE, in this order. Raises CommandError."""
    if args.token_file:
        return _read("--token-file", args.token_file)
    if environ.get("KEYPOOL_TOKEN"):
        return environ["KEYPOOL_TOKEN"]
    path = environ.get("KEYPOOL_TOKEN_FILE")
    return _read("KEYPOOL_TOKEN_FILE", path) if path else None


def _read(source: str, path: str) -> str:
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{source} {path} can't be read: {error}", Status.USAGE) from None
    if not token or len(token.split()) != 1:
        raise CommandError(f"{source} {path} must hold one token and nothing else", Status.USAGE)
    return token
