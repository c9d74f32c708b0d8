"""The secrets keys, under which the pool's keys are encrypted at rest: where they come from and how they are written.

As tokens, they come from an environment variable or from a file that a variable names, never from flags or the TOML
file. Errors name a key by its number and never show it. `engine/sealing.py` encrypts.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping

from keypool.config.setting_types import File, shown_path
from keypool.core.errors import SettingsError

SECRETS_VARIABLE, SECRETS_FILE_VARIABLE = "KEYPOOL_SECRETS_KEY", "KEYPOOL_SECRETS_KEY_FILE"
KEY_BYTES = 32
SECRETS_TAKE = f"base64 of {KEY_BYTES} bytes (openssl rand -base64 {KEY_BYTES}), several separated by commas"
_SECRETS_FILE = File(f"a file of {SECRETS_TAKE} or line breaks")


def read_secrets_keys(environ: Mapping[str, str]) -> tuple[bytes, ...]:
    """The secrets keys in order, without duplicates: the first encrypts, all decrypt. Blocks. Raises SettingsError."""
    text, path = environ.get(SECRETS_VARIABLE, ""), environ.get(SECRETS_FILE_VARIABLE, "")
    if text and path:
        raise SettingsError(
            f"{SECRETS_VARIABLE} and {SECRETS_FILE_VARIABLE} are both set: the keys come from one of them"
        )
    if path:
        # An empty file is refused: a key that failed to arrive must not leave the pool in clear.
        pieces = re.split(r"[,\n]", _SECRETS_FILE.read(SECRETS_FILE_VARIABLE, path))
        return _decoded(f"{SECRETS_FILE_VARIABLE} ({shown_path(path)})", pieces)
    return _decoded(SECRETS_VARIABLE, text.split(",")) if text else ()


def _decoded(source: str, pieces: list[str]) -> tuple[bytes, ...]:
    texts = [text for piece in pieces if (text := piece.strip())]
    if not texts:
        raise SettingsError(f"{source} takes {SECRETS_TAKE}, but has none")
    keys = []
    for number, text in enumerate(texts, 1):
        try:
            key = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):  # the latter for characters that aren't ASCII
            raise SettingsError(f"{source} takes {SECRETS_TAKE}, but key {number} is not base64") from None
        if len(key) != KEY_BYTES:
            raise SettingsError(f"{source} takes {SECRETS_TAKE}, but key {number} has {len(key)} bytes")
        keys.append(key)
    return tuple(dict.fromkeys(keys))
