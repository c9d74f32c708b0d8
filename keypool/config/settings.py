"""The settings of a server: what they are, where they come from and which values they take.

A setting is one field of `Settings`. The flag, the `KEYPOOL_` variable, the key of the TOML file, the lines
of `--help` and the row in the docs derive from it. The pool's own settings have their defaults in
core/rules.py.

Flags are parsed here and not by argparse because a wrong one has to give one line that names the values it
takes, the same on every Python: argparse also prints its usage, and its messages change with each
version.

`load` reads the TOML file and the files of tokens and secrets keys, once. No error and no repr shows a token or a
secrets key.
"""

from __future__ import annotations

import json
import os
import socket
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, TypeVar

from keypool import __version__
from keypool.config.named_tokens import TOKENS_FILE, NamedToken
from keypool.config.pool_settings import POOL_SETTINGS
from keypool.config.proxies import is_loopback
from keypool.config.secrets_keys import (
    SECRETS_FILE_VARIABLE,
    SECRETS_TAKE,
    SECRETS_VARIABLE,
    read_secrets_keys,
)
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
from keypool.config.token_sources import Tokens, TokenSources
from keypool.config.tokens import ROLES, TOKENS_TAKE, token_variables
from keypool.core.errors import SettingsError
from keypool.core.rules import NOT_FLAGS, PoolRules
from keypool.engine.valkey.url import without_password

Origin = Literal["default", "toml", "environment", "flag"]
Default = TypeVar("Default")

PRINT_CONFIG = "--print-config"
_TOML_FILE = File("a TOML file")


def _setting(default: Default, kind: Text, about: str) -> Default:
    # Like dataclasses.field itself, this claims to return the default and returns a field.
    no_password = not isinstance(kind, EngineName)
    made: Any = field(default=default, repr=no_password, metadata={"kind": kind, "about": about})
    return made  # type: ignore[no-any-return]


def _of_pool(name: str, about: str) -> Any:
    """A setting that other pools have too, with the same type and default."""
    return _setting(getattr(PoolRules, name), POOL_SETTINGS[name], about)


def _all_default() -> dict[str, Origin]:
    return {each.name: "default" for each in fields(Settings) if each.name != "origins"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting of one server. Lengths of time are seconds.

    `load` makes one of flags, environment and file; code may make one too, `Settings(port=0)`. Raises SettingsError
    for a wrong value, and for a server without tokens that other machines can reach. Tokens are not checked.
    """

    address: str = _setting("127.0.0.1", Address(), "where to listen; any address but loopback needs tokens")
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
        "partitions of a pool in Valkey, fixed when the pool is created. Without it, an existing pool keeps its "
        "number, and a new one gets 1, or 16 in a cluster",
    )
    http: str = _setting(
        "fast",
        Choice("fast", "tornado"),
        "which HTTP server: keypool's own, or Tornado's, which is slower and gives the same answers",
    )
    processes: int = _setting(
        1, Whole(1, 256), "server processes on one address; more than 1 needs an engine that they can share"
    )
    process_port: int = _setting(
        0,
        Whole(0, 65535),
        "with several processes: process N listens on this port + N - 1 as well, alone; 0 for no such ports",
    )
    block_seconds: float = _of_pool("block_seconds", "how long an acquired key stays blocked")
    keepalive_seconds: float | None = _of_pool(
        "keepalive_seconds", "how long a key lives without a keepalive"
    )
    key_length: int = _of_pool("key_length", "characters in a new key")
    max_keys: int = _of_pool("max_keys", "keys in the pool at most")
    max_pools: int = _setting(100, Whole(0, 1000), "pools beside `default` at most")
    max_waiters: int = _setting(
        PoolRules.max_waiters, Whole(0, 1_000_000), "acquires waiting for a key at most"
    )
    restart_grace: float = _setting(
        PoolRules.restart_grace,
        Seconds(low=0.0),
        "after a start, every key lives at least this long, even if it expired during the stop",
    )
    cooldown_seconds: float = _of_pool(
        "cooldown_seconds",
        "how long a key cools after its first failure; it doubles with each failure in a row",
    )
    max_cooldown_seconds: float = _of_pool(
        "max_cooldown_seconds", "how long a key cools at most after failures"
    )
    max_retry_after_seconds: float = _of_pool(
        "max_retry_after_seconds", "how long a key cools at most because a holder's `retry_after` says so"
    )
    error_threshold: int | None = _of_pool(
        "error_threshold", "failures in a row from which an error cools the key"
    )
    forget_seconds: float = _of_pool(
        "forget_seconds", "how long after the last failure the failures in a row are forgotten"
    )
    max_quarantined_percent: float = _of_pool(
        "max_quarantined_percent",
        "the part of the pool that reports of `invalid` may quarantine; one key may always go",
    )
    rest_seconds: float = _of_pool("rest_seconds", "how long a key cools after every lease")
    max_block_seconds: float | None = _of_pool(
        "max_block_seconds",
        "how long a lease may last with extensions; without it as long as `--block-seconds`, so that none is extended",
    )
    max_viewers: int = _setting(200, Whole(0, 100_000), "open websockets of the feed at most")
    drain_seconds: float = _setting(10.0, Seconds(), "how long a stop may take")
    log_level: str = _setting(
        "info", Choice("debug", "info", "warning", "error"), "the lowest level that is logged"
    )
    log_format: str = _setting("text", Choice("text", "json"), "format of the log")
    trusted_proxies: str = _setting(
        "none", Proxies(), "proxies whose `X-Forwarded-For` and `X-Forwarded-Proto` count"
    )
    tokens: str | None = _setting(
        None, TOKENS_FILE, "file of named tokens; it is read again within 10 s of a change"
    )
    config: str | None = _setting(
        None, _TOML_FILE, "file with the settings that no flag and no variable gives"
    )

    client_tokens: tuple[str, ...] = field(default=(), repr=False)
    viewer_tokens: tuple[str, ...] = field(default=(), repr=False)
    admin_tokens: tuple[str, ...] = field(default=(), repr=False)
    named_tokens: tuple[NamedToken, ...] = field(default=(), repr=False)
    """Those of the file `tokens`."""

    secrets_keys: tuple[bytes, ...] = field(default=(), repr=False)
    """Keys of 32 bytes, under which the pool's keys are encrypted at rest: the first encrypts, all decrypt."""

    origins: Mapping[str, Origin] = field(default_factory=_all_default, compare=False)
    """Where the value of every other field comes from."""

    def __post_init__(self) -> None:
        for option in OPTIONS:
            value = getattr(self, option.name)
            # Defaults aren't checked: some are None, which no source can give.
            if value != option.default:
                option.kind.typed(option.name, value)
        if self.max_block_seconds is not None and self.max_block_seconds < self.block_seconds:
            raise SettingsError(
                f"{_source(self, 'max_block_seconds')} takes no less than block_seconds, which is "
                f"{self.block_seconds:.15g}, not {self.max_block_seconds:.15g}"
            )
        if self.processes > 1:
            _check_processes(self)
        if self.open and not is_loopback(self.address):
            raise SettingsError(_no_token(self))

    @property
    def open(self) -> bool:
        """Whether there are no tokens, so that everybody who reaches the server may do everything."""
        return not (self.client_tokens or self.viewer_tokens or self.admin_tokens or self.named_tokens)

    @property
    def rules(self) -> PoolRules:
        """The settings of the pool."""
        names = [each.name for each in fields(PoolRules) if each.name not in NOT_FLAGS]
        return PoolRules(**{name: getattr(self, name) for name in names})

    def token_sources(self, environ: Mapping[str, str]) -> TokenSources:
        """Where the tokens come from, to read them again."""
        return TokenSources(environ, self.tokens, _source(self, "tokens"))

    def with_tokens(self, tokens: Tokens) -> Settings:
        """These settings with other tokens."""
        return replace(self, **_fields_of(tokens))


class Option(NamedTuple):
    """One setting: its name in each source, its default, type and description."""

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
        """The default as a user would write it."""
        return self.text(self.default)

    @staticmethod
    def text(value: object) -> str:
        """A value as a user would write it, `none` for None."""
        return "none" if value is None else f"{value:.15g}" if isinstance(value, float) else str(value)


OPTIONS = tuple(
    Option(each.name, each.default, **each.metadata) for each in fields(Settings) if each.metadata
)
"""Every setting but the tokens, in the order of the docs."""


def load(argv: Sequence[str], environ: Mapping[str, str], program: str = "python server.py") -> Settings:
    """The settings from flags (without the program's name), environment and TOML file, in this order of precedence.

    Raises SettingsError at the first wrong value, even if another source overrides it. `--help` and `--version` print
    and raise SystemExit(0); `program` is the program's name in --help. Blocks, as it reads files.
    """
    flags, variables = _from_flags(argv, program), _from_environment(environ)
    toml = _from_toml(flags, variables)
    origins = _all_default()
    by_source: dict[Origin, dict[str, Any]] = {"toml": toml, "environment": variables, "flag": flags}
    for source, given in by_source.items():
        origins |= dict.fromkeys(given, source)
    settings = {**toml, **variables, **flags}
    named_by = _named_by("tokens", origins["tokens"], settings.get("config"))
    secret = _fields_of(TokenSources(environ, settings.get("tokens"), named_by).read())
    secret["secrets_keys"] = read_secrets_keys(environ)
    origins |= {name: "environment" for name, value in secret.items() if value}
    origins["named_tokens"] = origins["tokens"]
    return Settings(**settings, **secret, origins=origins)


def data_file(argv: Sequence[str], environ: Mapping[str, str]) -> str:
    """The path of the data file for these settings. Blocks; reads no tokens. Raises SettingsError if there is none."""
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
            raise SettingsError(f"{flag} takes {option.kind.takes}, but no value follows it")
        given[option.name] = option.kind.spelled(flag, value)
    return given


def _no_flag(word: str) -> str:
    # The text after "=" is left out: it may be a token that was passed as if there were a flag for it.
    flags = f"the flags are {', '.join(each.flag for each in OPTIONS)}, {PRINT_CONFIG}, --help, --version"
    if word.startswith("-"):
        return f"unknown flag {shown(word)}; {flags}"
    return f"unexpected argument {shown(word)}; settings are given as --name=value; {flags}"


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    # Other KEYPOOL_ variables are ignored: ./run has one, and other versions of the server have more.
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
    except (ValueError, RecursionError) as error:  # the latter by a thousand nested brackets
        raise _TOML_FILE.refused(source, path, f"is not valid TOML: {error}") from None
    file = shown_path(path)
    options = {option.name: option for option in OPTIONS if option.name != "config"}
    for key in found:
        if key not in options:
            raise SettingsError(f"{shown(key)} in {file} is not a setting; the keys are {', '.join(options)}")
    return {key: options[key].kind.typed(f"{key} in {file}", value) for key, value in found.items()}


def _check_processes(settings: Settings) -> None:
    source = _source(settings, "processes")
    if settings.engine == "embedded":
        raise SettingsError(
            f"{source} takes 1 with the embedded engine, whose pool can't be shared, not {settings.processes}: "
            "several processes need --engine=valkey://HOST:PORT/DB"
        )
    if not (hasattr(os, "fork") and hasattr(socket, "SO_REUSEPORT")):
        raise SettingsError(f"{source} takes 1 on this system, which has no fork or no SO_REUSEPORT")
    if settings.process_port and settings.process_port + settings.processes > 65536:
        raise SettingsError(
            f"{_source(settings, 'process_port')} takes at most {65536 - settings.processes} with "
            f"{settings.processes} processes, not {settings.process_port}: each has its own port"
        )


def _fields_of(tokens: Tokens) -> dict[str, Any]:
    """The fields of Settings that hold these tokens."""
    return {f"{each.name}_tokens": getattr(tokens, each.name) for each in fields(tokens)}


def _source(settings: Settings, name: str) -> str:
    """The flag, variable or key of the file that the value came from."""
    return _named_by(name, settings.origins[name], settings.config)


def _named_by(name: str, origin: Origin, config: str | None) -> str:
    option = next(each for each in OPTIONS if each.name == name)
    file = shown_path(config or "the TOML file")
    names = {"flag": option.flag, "environment": option.variable, "toml": f"{name} in {file}"}
    return names.get(origin, name)


def _no_token(settings: Settings) -> str:
    source = _source(settings, "address")
    variables = ", ".join(token_variables(role)[0] for role in ROLES)
    return (
        f"{source} takes a loopback address (127.0.0.1, ::1, localhost) as long as there is no token, "
        f"not {shown(settings.address)}: set one of {variables}, or the matching ..._FILE variable, or --tokens"
    )


def effective_settings(settings: Settings) -> str:
    """What `--print-config` prints: every setting and where it comes from, as a TOML file for `--config`.

    Tokens and secrets keys are counted and not shown.
    """
    assignments = [_assignment(option, settings) for option in OPTIONS]
    width = max(map(len, assignments))
    lines = ["# keypool: the effective settings, and where each comes from"]
    for option, assignment in zip(OPTIONS, assignments, strict=True):
        origin = settings.origins[option.name]
        sources = {
            "toml": f"config file {settings.config}",
            "environment": option.variable,
            "flag": option.flag,
        }
        lines.append(f"{assignment:{width}}  # {sources.get(origin, origin)}")
    for role in ROLES:
        count = len(getattr(settings, f"{role}_tokens"))
        where = " or ".join(token_variables(role))
        lines.append(
            f"# tokens of the role {role}: {count or 'none'} from {where}{', not shown' if count else ''}"
        )
    where, count = f"{SECRETS_VARIABLE} or {SECRETS_FILE_VARIABLE}", len(settings.secrets_keys)
    lines.append(f"# secrets keys: {count or 'none'} from {where}{', not shown' if count else ''}")
    if settings.open:
        lines.append("# no tokens: open to everybody who reaches it, on loopback only")
    return "\n".join(lines)


def _assignment(option: Option, settings: Settings) -> str:
    value = getattr(settings, option.name)
    if option.name == "engine":
        value = without_password(value)
    if value is None:  # TOML has no null
        return f"# {option.name} = none"
    # JSON's strings and numbers are valid TOML.
    assignment = f"{option.name} = {json.dumps(value, ensure_ascii=False)}"
    return f"# {assignment}" if option.name == "config" else assignment


def settings_table() -> str:
    """The Markdown table of all settings, for the docs."""
    rows = [("flag", "variable", "default", "what it is", "what it takes"), ("---",) * 5]
    for each in OPTIONS:
        default = "none" if each.default is None else f"`{each.default_text}`"
        rows.append((f"`{each.flag}`", f"`{each.variable}`", default, each.about, each.kind.takes))
    for role in ROLES:
        variables = " or ".join(f"`{name}`" for name in token_variables(role))
        rows.append(("none", variables, "none", f"tokens of the role {role}, or a file of them", TOKENS_TAKE))
    variables = f"`{SECRETS_VARIABLE}` or `{SECRETS_FILE_VARIABLE}`"
    about = "keys that encrypt the pool's keys at rest, or a file of them; the first encrypts, all decrypt"
    rows.append(("none", variables, "none", about, SECRETS_TAKE))
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
variable beats the file.

Tokens come from KEYPOOL_CLIENT_TOKEN, KEYPOOL_VIEWER_TOKEN and KEYPOOL_ADMIN_TOKEN, or from the
files named by KEYPOOL_CLIENT_TOKEN_FILE and so on; named ones from the file of --tokens, for
which `keypool token` makes them. Keys that encrypt the pool's keys at rest come from
KEYPOOL_SECRETS_KEY, or from the file named by KEYPOOL_SECRETS_KEY_FILE.

  --print-config
      print the effective settings and where each comes from, no tokens or secrets keys, and exit
  --help, --version
      print this, or the version, and exit"""
