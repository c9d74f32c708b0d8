"""Named tokens: the file that `--tokens` names, with the SHA-256 digest of each token in place of the token.

    [tokens.alice]
    role = "client"
    digest = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    pools = ["openai", "mistral"]   # if left out: all pools
    max_held = 20                   # leases at a time, in all pools together; if left out: as many as there are

`keypool token` makes a token and such a table. Errors name file, table and member; no error shows a digest, since
a token may stand in its place by mistake.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from keypool.config.setting_types import Choice, File, Whole, shown, shown_path
from keypool.config.tokens import ROLES
from keypool.core.errors import SettingsError
from keypool.core.rules import is_pool_name

TOKENS_FILE = File("a TOML file of named tokens")
NAME_TAKES = (
    "1 to 63 letters, digits and . _ - @, the first a letter or a digit; not none, and not 8 hex digits, which "
    "stand for a token without a name in the audit log"
)
POOL_TAKES = "1 to 63 of a-z 0-9 . _ -, the first a letter or a digit"
MOST_HELD = 10_000_000_000
_MEMBERS = ("role", "digest", "pools", "max_held")
_NAME = re.compile(r"(?!none\Z|[0-9a-f]{8}\Z)[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_ROLE = Choice(*ROLES)
_MAX_HELD = Whole(1, MOST_HELD)


@dataclass(frozen=True, slots=True)
class NamedToken:
    """One table of the file. `pools` is None for all pools, `max_held` for no limit."""

    name: str
    role: str
    digest: bytes = field(repr=False)
    pools: frozenset[str] | None = None
    max_held: int | None = None

    def stanza(self) -> str:
        """The table as it stands in the file, with a line break at its end."""
        lines = [table(self.name), f'role = "{self.role}"', f'digest = "{self.digest.hex()}"']
        if self.pools is not None:
            lines.append(f"pools = {json.dumps(sorted(self.pools))}")
        if self.max_held is not None:
            lines.append(f"max_held = {self.max_held}")
        return "\n".join([*lines, ""])


def table(name: str) -> str:
    """The head of a token's table; the name is in quotes if TOML wants them."""
    return f"[tokens.{name if _BARE.fullmatch(name) else json.dumps(name)}]"


def is_token_name(text: str) -> bool:
    """Whether a token may have this name (`NAME_TAKES`)."""
    return _NAME.fullmatch(text) is not None


def read_named_tokens(source: str, path: str) -> tuple[NamedToken, ...]:
    """The tokens in a file, at least one. Blocks. Raises SettingsError, which names `source` if it can't be read."""
    found = parse(source, path, TOKENS_FILE.read(source, path))
    if not found:
        # As an empty file of tokens without names: somebody named it on purpose, and one that is being written
        # must not lock everybody out.
        raise TOKENS_FILE.refused(source, path, "has no table [tokens.NAME]")
    return found


def parse(source: str, path: str, text: str) -> tuple[NamedToken, ...]:
    """The tokens in the text of a file, in its order. O(text). Raises SettingsError."""
    try:
        found = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # the latter by a thousand nested brackets
        raise TOKENS_FILE.refused(source, path, f"is not valid TOML: {error}") from None
    file = shown_path(path)
    for key in found:
        if key != "tokens":
            raise SettingsError(f"{shown(key)} in {file} is unknown: it takes tables [tokens.NAME] only")
    tables = found.get("tokens", {})
    if not isinstance(tables, dict):
        raise SettingsError(f"tokens in {file} takes tables [tokens.NAME], not {shown(tables)}")
    tokens: list[NamedToken] = []
    name_of: dict[bytes, str] = {}
    for name, members in tables.items():
        token = _Table(file, name, members).token()
        before = name_of.setdefault(token.digest, name)
        if before != name:
            raise SettingsError(
                f"digest in {table(name)} of {file} is that of {table(before)}: a token has one name"
            )
        tokens.append(token)
    return tuple(tokens)


class _Table:
    """One table while it is read. Raises SettingsError."""

    def __init__(self, file: str, name: str, members: object) -> None:
        if not is_token_name(name):
            raise SettingsError(f"the name of a token in {file} takes {NAME_TAKES}, not {shown(name)}")
        self._file, self._name = file, name
        if not isinstance(members, dict):
            raise SettingsError(
                f"{name} in [tokens] of {file} takes a table {table(name)}, not {shown(members)}"
            )
        self._members: Mapping[str, Any] = members

    def token(self) -> NamedToken:
        for member, value in self._members.items():
            if member not in _MEMBERS:
                whole = f"{self._name}.{member}"
                dotted = isinstance(value, dict) and is_token_name(whole)
                hint = f"; a name with a dot is written in quotes: {table(whole)}" if dotted else ""
                raise SettingsError(
                    f"{shown(member)} in {table(self._name)} of {self._file} is unknown; the members are "
                    f"{', '.join(_MEMBERS)}{hint}"
                )
        role = _ROLE.typed(self._source("role"), self._required("role", _ROLE.takes))
        return NamedToken(self._name, str(role), self._digest(), self._pools(), self._max_held(str(role)))

    def _source(self, member: str) -> str:
        return f"{member} in {table(self._name)} of {self._file}"

    def _required(self, member: str, takes: str) -> Any:
        if member not in self._members:
            raise SettingsError(f"{table(self._name)} of {self._file} has no {member}, which takes {takes}")
        return self._members[member]

    def _digest(self) -> bytes:
        takes = "the SHA-256 digest of the token, 64 hex digits (keypool token makes both)"
        value = self._required("digest", takes)
        if not isinstance(value, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", value):
            self._refuse("digest", takes)
        return bytes.fromhex(value)

    def _pools(self) -> frozenset[str] | None:
        if "pools" not in self._members:
            return None
        value, takes = self._members["pools"], "a list of names of pools, at least one"
        if not isinstance(value, list) or not value:
            self._refuse("pools", f"{takes}, not {'an empty one' if value == [] else shown(value)}")
        for each in value:
            if not isinstance(each, str) or not is_pool_name(each):
                self._refuse("pools", f"{takes}, each {POOL_TAKES}, not {shown(each)}")
        return frozenset(value)

    def _max_held(self, role: str) -> int | None:
        if "max_held" not in self._members:
            return None
        if role != "client":
            raise SettingsError(
                f"{self._source('max_held')} is for tokens of the role client only, not for {role}"
            )
        value = _MAX_HELD.typed(self._source("max_held"), self._members["max_held"])
        assert isinstance(value, int)
        return value

    def _refuse(self, member: str, takes: str) -> NoReturn:
        raise SettingsError(f"{self._source(member)} takes {takes}")
