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
        source, tokens = secret_texts(
            environ,
            token_variables(role),
            _TOKEN_FILE,
            TOKENS_TAKE,
            "a role takes its tokens from one of them",
        )
        if not tokens:
            continue
        found[role] = _checked(source, tokens)
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


def secret_texts(
    environ: Mapping[str, str], variables: tuple[str, str], file: File, takes: str, rule: str
) -> tuple[str, list[str]]:
    """The source of the secrets of a kind, and their texts; none if neither of the two variables is set. Blocks.

    Raises SettingsError, which ends with `rule` if both are set.
    """
    variable, file_variable = variables
    text, path = environ.get(variable, ""), environ.get(file_variable, "")
    if text and path:
        raise SettingsError(f"{variable} and {file_variable} are both set: {rule}")
    if not (text or path):
        return variable, []
    source, pieces = variable, text.split(",")
    if path:
        # An empty variable counts as unset, but an empty file is refused: somebody named it on purpose, and a secret
        # that failed to arrive must not leave the server open, or the pool in clear.
        source = f"{file_variable} ({shown_path(path)})"
        pieces = re.split(r"[,\n]", file.read(file_variable, path))
    texts = [stripped for piece in pieces if (stripped := piece.strip())]
    if not texts:
        raise SettingsError(f"{source} takes {takes}, but has none")
    return source, texts


def _checked(source: str, tokens: Sequence[str]) -> tuple[str, ...]:
    for number, token in enumerate(tokens, 1):
        if not re.fullmatch(r"[!-~]+", token):
            raise SettingsError(f"{source} takes {TOKENS_TAKE}, but token {number} has another character")
        if len(token) < MIN_TOKEN_LENGTH:
            raise SettingsError(f"{source} takes {TOKENS_TAKE}, but token {number} has {len(token)}")
    return tuple(dict.fromkeys(tokens))
