"""All of a server's tokens together, and when the file of named ones has changed."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from keypool.config.named_tokens import NamedToken, read_named_tokens, table
from keypool.config.setting_types import shown_path
from keypool.config.tokens import ROLES, read_tokens, token_files, token_variables
from keypool.core.errors import SettingsError

POLL_SECONDS = 2.0
"""The interval of looking whether the file of named tokens has changed."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The valid tokens: those of the environment by role, and those with a name."""

    client: tuple[str, ...] = field(default=(), repr=False)
    viewer: tuple[str, ...] = field(default=(), repr=False)
    admin: tuple[str, ...] = field(default=(), repr=False)
    named: tuple[NamedToken, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenSources:
    """Where tokens come from: the environment, and the file `path`, which the setting `source` names."""

    environ: Mapping[str, str] = field(repr=False)
    path: str | None = None
    source: str = "--tokens"

    @property
    def files(self) -> dict[str, str]:
        """Their paths, by the setting or variable that names each."""
        named = {} if self.path is None else {self.source: self.path}
        return token_files(self.environ) | named

    def read(self) -> Tokens:
        """Read all of them. Blocks. Raises SettingsError."""
        of_environment = read_tokens(self.environ)
        if self.path is None:
            return _tokens(of_environment, ())
        named = read_named_tokens(self.source, self.path)
        _check_apart(of_environment, named, shown_path(self.path))
        return _tokens(of_environment, named)


def _tokens(of_environment: Mapping[str, tuple[str, ...]], named: tuple[NamedToken, ...]) -> Tokens:
    client, viewer, admin = (of_environment.get(role, ()) for role in ROLES)
    return Tokens(client, viewer, admin, named)


def _check_apart(
    of_environment: Mapping[str, tuple[str, ...]], named: tuple[NamedToken, ...], file: str
) -> None:
    role_of = {
        hashlib.sha256(token.encode()).digest(): role
        for role, tokens in of_environment.items()
        for token in tokens
    }
    for token in named:
        if role := role_of.get(token.digest):
            raise SettingsError(
                f"digest in {table(token.name)} of {file} is that of a token of {' or '.join(token_variables(role))}: "
                "a token stands in one place"
            )


class FileWatch:
    """Tells when a file was changed or replaced, by its modification time, size and inode.

    A change counts once the file has stayed the same for an interval, so that one which is being written, or which an
    editor writes twice, is read when it is complete.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._polled_at = time.monotonic()
        self._polled: object = self
        self._read: object = self  # not known: the first poll reads the file once more

    def reading(self) -> None:
        """The file is about to be read. Blocks."""
        self._read = self._signature()

    def changed(self) -> bool:
        """Whether the file has to be read again. Blocks; within POLL_SECONDS of the call before, O(1) and False."""
        now = time.monotonic()
        if now - self._polled_at < POLL_SECONDS:
            return False
        self._polled_at = now
        before, self._polled = self._polled, self._signature()
        return before == self._polled != self._read

    def _signature(self) -> tuple[int, ...] | None:
        try:
            found = os.stat(self._path)  # noqa: PTH116 - a path as the settings have it
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_dev
