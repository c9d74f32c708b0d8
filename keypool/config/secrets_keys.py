"""The secrets keys, under which the pool's keys are encrypted at rest: where they come from and how they are written.

As tokens, they come from an environment variable or from a file that a variable names, never from flags or the TOML
file. Errors name a key by its number and never show it. `engine/sealing.py` encrypts.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping

from keypool.config.setting_types import File
from keypool.config.tokens import secret_texts
from keypool.core.errors import SettingsError

SECRETS_VARIABLE, SECRETS_FILE_VARIABLE = "KEYPOOL_SECRETS_KEY", "KEYPOOL_SECRETS_KEY_FILE"
KEY_BYTES = 32
SECRETS_TAKE = f"base64 of {KEY_BYTES} bytes (openssl rand -base64 {KEY_BYTES}), several separated by commas"
_SECRETS_FILE = File(f"a file of {SECRETS_TAKE} or line breaks")


def read_secrets_keys(environ: Mapping[str, str]) -> tuple[bytes, ...]:
    """The secrets keys in order, without duplicates: the first encrypts, all decrypt. Blocks. Raises SettingsError."""
    variables = (SECRETS_VARIABLE, SECRETS_FILE_VARIABLE)
    source, texts = secret_texts(
        environ, variables, _SECRETS_FILE, SECRETS_TAKE, "the keys come from one of them"
    )
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
