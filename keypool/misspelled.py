"""Finds environment variables that look like misspelled ones of keypool. Other unknown variables are ignored."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

CLIENT_VARIABLES = ("KEYPOOL_URL", "KEYPOOL_TOKEN", "KEYPOOL_TOKEN_FILE", "KEYPOOL_POOL")
"""The variables of the command, in addition to those of the server's settings."""

_OTHERS = ("KEYPOOL_TOKENS", "KEYPOOL_POOL")
"""Right for the server or the command, though for the other it may look like a misspelled variable of its own."""

DATA = "KEYPOOL_DATA_"
"""How `keypool run` names a key's data, whatever is in it."""


def misspelled(environ: Mapping[str, str], known: Iterable[str]) -> list[str]:
    """A line for each unknown KEYPOOL_ variable that resembles a known one."""
    names = {name.removeprefix("KEYPOOL_"): name for name in known}
    lines = []
    for given in environ:
        word = given.removeprefix("KEYPOOL_")
        if word != given and word not in names and given not in _OTHERS and not given.startswith(DATA):
            matches = difflib.get_close_matches(word, names, n=1, cutoff=0.75)
            # ADMIN_TOKEN_FILE is the server's, not a misspelled TOKEN_FILE.
            lines += [
                f"{given} is not a variable of keypool; did you mean {names[match]}?"
                for match in matches
                if not word.endswith(match)
            ]
    return lines
