"""The tokens of the environment: where they come from and which are valid. named_tokens.py has the others.

They come from environment variables or from files named by variables, never from flags or the TOML file:
everybody on the machine can see a command line, and a settings file is soon copied. Errors name a token by
its number and never show it. `auth.py` compares what callers send.
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
    """The tokens by role, without duplicates; a role without tokens is missing. Blocks. Raises SettingsError."""
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
    """The variable that holds the tokens of a role, and the variable that names a file of them."""
    return f"KEYPOOL_{role.upper()}_TOKEN", f"KEYPOOL_{role.upper()}_TOKEN_FILE"


def token_files(environ: Mapping[str, str]) -> dict[str, str]:
    """The paths of the files of tokens, by the variable that names each."""
    variables = [token_variables(role)[1] for role in ROLES]
    return {variable: path for variable in variables if (path := environ.get(variable))}


def exposed_files(files: Mapping[str, str]) -> list[str]:
    """A warning for each file that others than its owner can read or write; paths by what names them. Blocks."""
    lines = []
    for source, path in files.items():
        try:
            mode = stat.S_IMODE(Path(path).stat().st_mode)
        except OSError:  # it was removed after it was read
            continue
        if mode & 0o077:
            can = "write" if mode & 0o022 else "read"
            lines.append(
                f"{source}: others than its owner can {can} {shown_path(path)} (mode {mode:04o}); make it 0600"
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
    # An empty variable counts as unset, but an empty file is refused: somebody named it on purpose, and a secret
    # that failed to arrive must not leave the server open.
    return f"{file_variable} ({shown_path(path)})", re.split(r"[,\n]", _TOKEN_FILE.read(file_variable, path))


def _checked(source: str, pieces: Sequence[str]) -> tuple[str, ...]:
    tokens = [token for piece in pieces if (token := piece.strip())]
    if not tokens:
        raise SettingsError(f"{source} takes {TOKENS_TAKE}, but has none")
    for number, token in enumerate(tokens, 1):
        if not re.fullmatch(r"[!-~]+", token):
            raise SettingsError(f"{source} takes {TOKENS_TAKE}, but token {number} has another character")
        if len(token) < MIN_TOKEN_LENGTH:
            raise SettingsError(f"{source} takes {TOKENS_TAKE}, but token {number} has {len(token)}")
    return tuple(dict.fromkeys(tokens))
