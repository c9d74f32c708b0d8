"""The tokens that a server is given: where they come from and what one looks like.

They come from the environment or from files that it names, never from flags or the TOML file: a command line
is seen by everybody on the machine, and a settings file is soon copied. Errors say which token is wrong by
its number and never show it.

What this module does not do: compare what a caller sends (auth.py does), or ask for tokens where there are
none (settings.py does, on addresses that other machines reach).
"""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from keypool.config.setting_types import File, shown_path
from keypool.core.errors import SettingsError

ROLES = ("client", "viewer", "admin")
MIN_TOKEN_LENGTH = 16
TOKENS_TAKE = f"tokens of at least {MIN_TOKEN_LENGTH} visible ASCII characters, separated by commas"

_TOKEN_FILE = File(f"a file of {TOKENS_TAKE} or line breaks")


def read_tokens(environ: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The tokens of each role that has any, each once. Raises SettingsError. Reads files, so it blocks."""
    found: dict[str, tuple[str, ...]] = {}
    role_of: dict[str, str] = {}
    for role in ROLES:
        source, pieces = _source(role, environ)
        if not pieces:
            continue
        found[role] = _checked(source, pieces)
        for number, token in enumerate(found[role], 1):
            if role_of.setdefault(token, role) != role:
                raise SettingsError(
                    f"{source}: token {number} is a {role_of[token]} token too; a token has one role"
                )
    return found


def token_variables(role: str) -> tuple[str, str]:
    """The variable that holds the tokens of a role, and the one that names a file of them."""
    return f"KEYPOOL_{role.upper()}_TOKEN", f"KEYPOOL_{role.upper()}_TOKEN_FILE"


def exposed_files(environ: Mapping[str, str]) -> list[str]:
    """A line for each file of tokens that others than its owner can read or write. Looks at files, so it blocks."""
    lines = []
    for role in ROLES:
        variable = token_variables(role)[1]
        path = environ.get(variable, "")
        if path and (mode := stat.S_IMODE(Path(path).stat().st_mode)) & 0o077:
            can = "write" if mode & 0o022 else "read"
            lines.append(
                f"{variable}: others than its owner can {can} {shown_path(path)} (mode {mode:04o}); make it 0600"
            )
    return lines


def _source(role: str, environ: Mapping[str, str]) -> tuple[str, list[str]]:
    variable, file_variable = token_variables(role)
    text, path = environ.get(variable, ""), environ.get(file_variable, "")
    if text and path:
        raise SettingsError(
            f"{variable} and {file_variable} are both set: a role takes its tokens from one of them"
        )
    if not path:
        return variable, text.split(",") if text else []
    # An empty variable is as none, but an empty file goes on to be refused: somebody named it on purpose, and
    # a secret that failed to arrive must not leave the server open.
    return f"{file_variable} ({shown_path(path)})", re.split(r"[,\n]", _TOKEN_FILE.read(file_variable, path))


def _checked(source: str, pieces: Sequence[str]) -> tuple[str, ...]:
    tokens = [token for piece in pieces if (token := piece.strip())]
    if not tokens:
        raise SettingsError(f"{source} takes {TOKENS_TAKE}, and has none")
    for number, token in enumerate(tokens, 1):
        # The visible ones of ASCII, without the space, from ! to ~; the comma is gone by now.
        if not re.fullmatch(r"[!-~]+", token):
            raise SettingsError(
                f"{source} takes {TOKENS_TAKE}, and token {number} has a character that is not"
            )
        if len(token) < MIN_TOKEN_LENGTH:
            raise SettingsError(f"{source} takes {TOKENS_TAKE}, and token {number} has {len(token)}")
    return tuple(dict.fromkeys(tokens))
