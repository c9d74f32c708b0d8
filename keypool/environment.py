"""The environment of the processes that keypool starts: without what opens the pool.

Everybody who may read /proc/PID/environ of a process, and every program that the process starts in turn, has its
variables. So a child gets tokens and secrets keys only if it needs them: the workers of `--processes` do, and are
forked; the data file's writer and the command of `keypool run` don't.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_SECRET = re.compile(r"KEYPOOL_((\w+_)?TOKEN(_FILE)?|TOKENS|SECRETS_KEY(_FILE)?)", re.ASCII)
_URL = "KEYPOOL_ENGINE"


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """These variables without tokens, secrets keys, the paths of their files, and a URL with Valkey's password."""
    return {
        name: value
        for name, value in environ.items()
        if not _SECRET.fullmatch(name) and not (name == _URL and "@" in value)
    }
