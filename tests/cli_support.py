"""Runs the `keypool` command inside the test's own process, which is a hundred times faster than starting one."""

from __future__ import annotations

import io
import os
from typing import NamedTuple
from unittest import mock

from client_support import url_of
from support import ServerProcess

from keypool.cli.main import main


class Ran(NamedTuple):
    """What a command that has ended left: its exit status and what it wrote."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[list[str]]:
        """Plain output as its columns."""
        return [line.split("\t") for line in self.out.splitlines()]

    @property
    def fields(self) -> dict[str, str]:
        """Plain output of one object."""
        return {line[0]: line[1] for line in self.lines}


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_command(
    server: ServerProcess | None, *words: str, stdin: str = "", columns: int = 0, typed: str = "", **env: str
) -> Ran:
    """Run it. With `columns` all three streams are a terminal of that width, on which `typed` is typed."""
    kind = _Terminal if columns else io.StringIO
    out, err = kind(), kind()
    url = {"KEYPOOL_URL": url_of(server)} if server is not None else {}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KEYPOOL_")}
    more = {"TERM": "xterm", "COLUMNS": str(columns)} if columns else {}
    with (
        mock.patch.dict(os.environ, kept | url | more | env, clear=True),
        mock.patch("sys.stdin", kind(typed or stdin)),
        mock.patch("sys.stdout", out),
        mock.patch("sys.stderr", err),
    ):
        try:
            status = main(words)
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 0
    return Ran(status, out.getvalue(), err.getvalue())
