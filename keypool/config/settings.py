"""The settings of a server: what they are, where they come from and which values they take.

Every setting is one field of `Settings`, and the field's metadata holds all there is to know about it. The
flag, the `KEYPOOL_` variable, the key of the TOML file, the lines of `--help` and the row in the docs derive
from it, so a new setting is one new field, and its rule is changed in one place. The defaults of the pool's own
settings stand in core/rules.py.

Flags are read here and not by argparse because a wrong one has to give one line that names the values it
takes, the same on every Python: argparse prints its usage as well, and words its errors anew with each
version.

What this module does not do: act on a setting, log, or choose an exit status (server.py does). The files it
reads are the TOML file and those of the tokens, once, in `load`. No error and no repr shows a token.
"""

from __future__ import annotations

import os
import socket
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, TypeVar

from keypool import __version__
from keypool.config.proxies import is_loopback
from keypool.config.setting_types import (
    Address,
    Choice,
    DataFile,
    EngineName,
    File,
    Proxies,
    Seconds,
    Text,
    Whole,
    shown,
    shown_path,
)
from keypool.config.tokens import ROLES, TOKENS_TAKE, read_tokens, token_variables
from keypool.core.errors import SettingsError
from keypool.core.rules import PoolRules

Origin = Literal["default", "toml", "environment", "flag"]
Default = TypeVar("Default")

_TOML_FILE = File("a TOML file")


def _setting(default: Default, kind: Text, about: str) -> Default:
    # Like dataclasses.field itself, this claims to return the default and returns the field that holds it.
    # The engine's URL may hold a password.
    shown = not isinstance(kind, EngineName)
    made: Any = field(default=default, repr=shown, metadata={"kind": kind, "about": about})
    return made  # type: ignore[no-any-return]


def _all_default() -> dict[str, Origin]:
    return {each.name: "default" for each in fields(Settings) if each.name != "origins"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting of one server. Lengths of time are seconds.

    `load` makes one from what the user gave. Code may make one too, `Settings(port=0)`: a wrong value, or an
    open server that other machines reach, is a SettingsError there as well; tokens are taken as they are.
    """

    address: str = _setting(
        "127.0.0.1", Address(), "where to listen; any but a loopback address needs tokens"
    )
    port: int = _setting(8888, Whole(0, 65535), "TCP port; 0 takes a free one")
    data: str = _setting(
        "data/keypool.db",
        DataFile("the path of an SQLite file, or :memory:"),
        "where keys are kept; `:memory:` keeps nothing",
    )
    engine: str = _setting("embedded", EngineName(), "what holds the pool")
    partitions: int | None = _setting(
        None,
        Whole(1, 1024),
        "parts of a pool in Valkey, fixed when it is made. Without it, an existing pool keeps its number, and a "
        "new one gets 1, or 16 in a cluster",
    )
    http: str = _setting(
        "fast",
        Choice("fast", "tornado"),
        "which HTTP server: keypool's own, or Tornado's, slower, with the same answers",
    )
    processes: int = _setting(
        1, Whole(1, 256), "server processes on one address; more than 1 takes an engine that they can share"
    )
    process_port: int = _setting(
        0,
        Whole(0, 65535),
        "with several processes, the first of as many ports more, each of one process alone; 0 for none",
    )
    block_seconds: float = _setting(
        PoolRules.block_seconds, Seconds(), "how long an acquired key stays blocked"
    )
    keepalive_seconds: float = _setting(
        PoolRules.keepalive_seconds, Seconds(), "how long a key lives without a keepalive"
    )
    key_length: int = _setting(PoolRules.key_length, Whole(16, 64), "characters in a new key")
    max_keys: int = _setting(PoolRules.max_keys, Whole(1, 10_000_000_000), "keys in the pool at most")
    max_waiters: int = _setting(
        PoolRules.max_waiters, Whole(0, 1_000_000), "acquires waiting for a key at most"
    )
    restart_grace: float = _setting(
        PoolRules.restart_grace,
        Seconds(low=0.0),
        "keys that would be dead by then live until so long after the start",
    )
    max_viewers: int = _setting(200, Whole(0, 100_000), "websockets of the feed open at a time at most")
    drain_seconds: float = _setting(10.0, Seconds(), "how long a stop may take")
    log_level: str = _setting("info", Choice("debug", "info", "warning", "error"), "the least that is logged")
    log_format: str = _setting("text", Choice("text", "json"), "how the log is written")
    trusted_proxies: str = _setting(
        "none", Proxies(), "proxies whose `X-Forwarded-For` and `X-Forwarded-Proto` count"
    )
    config: str | None = _setting(
        None, _TOML_FILE, "where to read settings that no flag and no variable gives"
    )

    client_tokens: tuple[str, ...] = field(default=(), repr=False)
    viewer_tokens: tuple[str, ...] = field(default=(), repr=False)
    admin_tokens: tuple[str, ...] = field(default=(), repr=False)

    origins: Mapping[str, Origin] = field(default_factory=_all_default, compare=False)
    """Where the value of every other field comes from."""

    def __post_init__(self) -> None:
        for option in OPTIONS:
            value = getattr(self, option.name)
            # A default is right as it is, and None, that of some, is what nobody can give.
            if value != option.default:
                option.kind.typed(option.name, value)
        if self.processes > 1:
            _check_processes(self)
        if self.open and not is_loopback(self.address):
            raise SettingsError(_no_token(self))

    @property
    def open(self) -> bool:
        """Whether there are no tokens, so that whoever reaches the server may do everything."""
        return not (self.client_tokens or self.viewer_tokens or self.admin_tokens)

    @property
    def rules(self) -> PoolRules:
        """Those of the settings that are the pool's."""
        return PoolRules(**{each.name: getattr(self, each.name) for each in fields(PoolRules)})


class Option(NamedTuple):
    """One setting as flags, environment, TOML file and docs know it."""

    name: str
    default: object
    kind: Text
    about: str

    @property
    def flag(self) -> str:
        """`--block-seconds`."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def variable(self) -> str:
        """`KEYPOOL_BLOCK_SECONDS`."""
        return f"KEYPOOL_{self.name.upper()}"

    @property
    def default_text(self) -> str:
        """The default as a user would spell it, `none` if there is none."""
        if self.default is None:
            return "none"
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)


OPTIONS = tuple(
    Option(each.name, each.default, **each.metadata) for each in fields(Settings) if each.metadata
)
"""Every setting but the tokens, which have rules of their own, in the order of the docs."""


def load(argv: Sequence[str], environ: Mapping[str, str], program: str = "python server.py") -> Settings:
    """The settings that flags (without the program's name), environment and TOML file ask for.

    A flag beats a variable, a variable beats the file; a value that is overridden has to be right
    nevertheless. Raises SettingsError at the first that is wrong. `--help` and `--version` print and raise
    SystemExit(0); `program` is what --help calls the program. Reads files, so it blocks: call it before the loop
    runs.
    """
    flags, variables = _from_flags(argv, program), _from_environment(environ)
    toml = _from_toml(flags, variables)
    variables |= {f"{role}_tokens": tokens for role, tokens in read_tokens(environ).items()}
    origins = _all_default()
    by_source: dict[Origin, dict[str, Any]] = {"toml": toml, "environment": variables, "flag": flags}
    for source, given in by_source.items():
        origins |= dict.fromkeys(given, source)
    return Settings(**{**toml, **variables, **flags}, origins=origins)


def data_file(argv: Sequence[str], environ: Mapping[str, str]) -> str:
    """The data file that a server with these settings has; its tokens aren't looked at. Raises SettingsError."""
    flags, variables = _from_flags(argv, "keypool serve"), _from_environment(environ)
    given = {**_from_toml(flags, variables), **variables, **flags}
    engine, data = (
        str(given.get(name, Settings.__dataclass_fields__[name].default)) for name in ("engine", "data")
    )
    if engine != "embedded":
        raise SettingsError(
            f"there is no data file with --engine={engine.partition(':')[0]}: Valkey keeps the pool"
        )
    if data == ":memory:":
        raise SettingsError("there is no data file with --data=:memory:")
    return data


def _from_flags(argv: Sequence[str], program: str) -> dict[str, Any]:
    options = {option.flag: option for option in OPTIONS}
    given: dict[str, object] = {}
    words = iter(argv)
    for word in words:
        if word in ("-h", "--help", "--version"):
            print(f"keypool {__version__}" if word == "--version" else _help(program), flush=True)
            raise SystemExit(0)
        flag, equals, text = word.partition("=")
        if flag not in options:
            raise SettingsError(_no_flag(flag if word.startswith("-") else word))
        option = options[flag]
        value = text if equals else next(words, None)
        if value is None:
            raise SettingsError(f"{flag} takes {option.kind.takes}, and nothing follows it")
        given[option.name] = option.kind.spelled(flag, value)
    return given


def _no_flag(word: str) -> str:
    # What stands behind "=" doesn't get here: it may be a token, from one who takes tokens for flags.
    wrong = "there is no flag" if word.startswith("-") else "every setting is a flag, and none takes the word"
    return (
        f"{wrong} {shown(word)}; the flags are {', '.join(each.flag for each in OPTIONS)}, "
        "--print-config, --help, --version"
    )


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    # Variables that are no setting are left alone: ./run has one, and other versions of the server have more.
    given = [option for option in OPTIONS if option.variable in environ]
    return {option.name: option.kind.spelled(option.variable, environ[option.variable]) for option in given}


def _from_toml(flags: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, Any]:
    source, given = ("--config", flags) if "config" in flags else ("KEYPOOL_CONFIG", variables)
    path = given.get("config")
    if path is None:
        return {}
    text = _TOML_FILE.read(source, path)
    try:
        found = tomllib.loads(text)
    # RecursionError: brackets within brackets, a thousand deep.
    except (ValueError, RecursionError) as error:
        raise _TOML_FILE.refused(source, path, f"is none: {error}") from None
    file = shown_path(path)
    # A file doesn't name another one.
    options = {option.name: option for option in OPTIONS if option.name != "config"}
    for key in found:
        if key not in options:
            raise SettingsError(f"{shown(key)} in {file} is no setting; the keys are {', '.join(options)}")
    return {key: options[key].kind.typed(f"{key} in {file}", value) for key, value in found.items()}


def _check_processes(settings: Settings) -> None:
    source = _source(settings, "processes")
    if settings.engine == "embedded":
        raise SettingsError(
            f"{source} takes 1 with the embedded engine, whose pool is one process's own, not "
            f"{settings.processes}: more share a pool by --engine=valkey://HOST:PORT/DB"
        )
    if not (hasattr(os, "fork") and hasattr(socket, "SO_REUSEPORT")):
        raise SettingsError(f"{source} takes 1 on this system, which has no fork or no SO_REUSEPORT")
    if settings.process_port and settings.process_port + settings.processes > 65536:
        raise SettingsError(
            f"{_source(settings, 'process_port')} takes at most {65536 - settings.processes} with "
            f"{settings.processes} processes, not {settings.process_port}: each has a port of its own"
        )


def _source(settings: Settings, name: str) -> str:
    """What the user gave this setting by."""
    option = next(each for each in OPTIONS if each.name == name)
    file = shown_path(settings.config or "the TOML file")
    names = {"flag": option.flag, "environment": option.variable, "toml": f"{name} in {file}"}
    return names.get(settings.origins[name], name)


def _no_token(settings: Settings) -> str:
    source = _source(settings, "address")
    variables = ", ".join(token_variables(role)[0] for role in ROLES)
    return (
        f"{source} takes a loopback address (127.0.0.1, ::1, localhost) as long as there is no token, "
        f"not {shown(settings.address)}: set one of {variables}, or of the same with _FILE"
    )


def settings_table() -> str:
    """The Markdown table of all settings, for the docs: a row a setting, no line break at the end."""
    rows = [("flag", "variable", "default", "what it is", "what it takes"), ("---",) * 5]
    for each in OPTIONS:
        default = "none" if each.default is None else f"`{each.default_text}`"
        rows.append((f"`{each.flag}`", f"`{each.variable}`", default, each.about, each.kind.takes))
    for role in ROLES:
        variables = " or ".join(f"`{name}`" for name in token_variables(role))
        rows.append(("none", variables, "none", f"tokens of the role {role}, or a file of them", TOKENS_TAKE))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _help(program: str) -> str:
    lines = [f"usage: {program} [--NAME=VALUE ...]", "", _HELP_HEAD]
    for each in OPTIONS:
        about = f"{each.about}. Takes {each.kind.takes}. Default: {each.default_text}.".replace("`", "")
        indent = " " * 6
        lines += [
            f"  {each.flag}=...",
            textwrap.fill(about, 90, initial_indent=indent, subsequent_indent=indent),
        ]
    return "\n".join(lines)


_HELP_HEAD = """\
Leases API keys over HTTP. Each flag is also an environment variable (--block-seconds is
KEYPOOL_BLOCK_SECONDS) and a key of the TOML file (block_seconds); a flag beats a variable, a
variable beats the file. Tokens come from KEYPOOL_CLIENT_TOKEN, KEYPOOL_VIEWER_TOKEN and
KEYPOOL_ADMIN_TOKEN, or from files that the same names with _FILE tell.

  --print-config
      print the settings in force and where each comes from, tokens counted and not shown, and exit
  --help, --version
      print this, or the version, and exit"""
