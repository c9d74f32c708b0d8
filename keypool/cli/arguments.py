"""Every command and flag of `keypool`, as a table. Parser, help and shell completion derive from it.

A command's function is named as `module:function` and imported when the command is called, so that a command
loads only what it uses.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

from keypool import __version__
from keypool.cli.status import CommandError, Status
from keypool.client.answers import Outcome, State
from keypool.client.reports import MOST_USES, retry_after_of
from keypool.client.settings import DEFAULT_POOL, DEFAULT_URL

SHELLS = ("bash", "zsh", "fish")
STATES = tuple(state.value for state in State)
ORDERS = ("id", "release", "ready", "expiry")
RARE_EVENTS = (
    "generated", "imported", "deleted", "expired", "revealed", "quarantined", "restored", "unblocked",
)  # fmt: skip
OUTCOMES = tuple(outcome.value for outcome in Outcome)


class Argument(NamedTuple):
    """A flag or a positional argument: its names, and the keyword arguments for argparse's add_argument."""

    names: tuple[str, ...]
    options: dict[str, Any]

    @property
    def is_flag(self) -> bool:
        """False for a positional argument."""
        return self.names[0].startswith("-")

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it takes, empty if any are allowed."""
        return tuple(self.options.get("choices", ()))

    @property
    def takes_value(self) -> bool:
        """Whether the next word must be the flag's value; False if the value is optional."""
        optional = self.options.get("action", "append") != "append" or self.options.get("nargs") == "?"
        return self.is_flag and not optional


class Command(NamedTuple):
    """A command: its name, the function that does it, its help text, its arguments, and what --help says at the end."""

    name: str
    do: str
    about: str
    arguments: tuple[Argument, ...] = ()
    more: str = ""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments as attributes; `command` is the name, `do` the function. Raises CommandError.

    `--help` and `--version` print and raise SystemExit(0).
    """
    # Words after `run` may be flags of the command that it runs.
    own = itertools.takewhile(lambda word: word not in ("--", "run"), words)
    if any(word == "--token" or word.startswith("--token=") for word in own):
        raise _wrong("a token is never an argument: use KEYPOOL_TOKEN, KEYPOOL_TOKEN_FILE or --token-file")
    args, unknown = _parser().parse_known_args(words)
    if args.command == "serve":
        raise _wrong("serve comes first, then the server's settings: keypool serve --port 8888")
    if unknown:
        # The text after "=" is left out: it may be a secret.
        raise _wrong(f"{args.command} doesn't take {unknown[0].partition('=')[0]}; see keypool --help")
    return args


def _wrong(message: str) -> CommandError:
    return CommandError(message, Status.USAGE)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**options | layout)

    def error(self, message: str) -> NoReturn:
        """One line, without the usage that argparse would print."""
        raise _wrong(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    about = "Leases API keys from a keypool server, and runs such a server."
    top = _Parser(prog="keypool", description=about, epilog=_statuses(Status))
    top.add_argument("--version", action="version", version=f"keypool {__version__}")
    for flag in GLOBAL_FLAGS:
        top.add_argument(*flag.names, **flag.options)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    of_run = [status for status in Status if status.about.startswith("run:")]
    for command in COMMANDS:
        sub = commands.add_parser(
            command.name,
            help=command.about,
            description=f"{command.about[:1].upper()}{command.about[1:]}.",
            epilog=command.more + (_statuses(of_run) if command.name == "run" else ""),
        )
        sub.set_defaults(do=command.do)
        for argument in command.arguments:
            sub.add_argument(*argument.names, **argument.options)
        for flag in shared_flags(command):
            # After the command, a flag that isn't given must not undo one that was given before it.
            sub.add_argument(*flag.names, **flag.options | {"default": argparse.SUPPRESS})
    return top


def _statuses(statuses: Iterable[Status]) -> str:
    lines = [f"  {status.value:>3}  {status.about}" for status in statuses]
    end = "run returns the status of its command, 128 + n if signal n ended it."
    return "\n".join(["exit statuses:", *lines, end])


# -- types of values


def _number(convert: Callable[[str], float], low: float, high: float, takes: str) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            number = convert(text)
        except ValueError:
            number = math.nan
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"takes {takes}, not {text!r}")
        return number

    return read


_uses = _number(int, 1, MOST_USES, "a whole number from 1 to 10^9")
_whole = _number(int, 0, 10**18, "a whole number")
_positive = _number(int, 1, 10**18, "a whole number from 1")
_seconds = _number(float, 0, 86_400, "seconds, from 0 to 86400")
_some_seconds = _number(float, 0.01, 86_400, "seconds, from 0.01 to 86400")
_pool_seconds = _number(float, 0.01, 10**15, "seconds, from 0.01")  # the pool has limits of its own


def _retry_after(text: str) -> float:
    """What the header of that name holds."""
    seconds = retry_after_of({"Retry-After": text})
    if seconds is None:
        raise argparse.ArgumentTypeError(
            f"takes seconds, from 0, or the date of a Retry-After header, not {text!r}"
        )
    return seconds


def _pace(text: str) -> dict[str, float]:
    """`none` is an empty one, which removes it."""
    if text == "none":
        return {}
    try:
        count, seconds, *burst = text.split("/")
        return {"count": int(count), "seconds": float(seconds)} | ({"burst": int(*burst)} if burst else {})
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(
            f"takes COUNT/SECONDS, COUNT/SECONDS/BURST or none, not {text!r}"
        ) from None


def _wait(text: str) -> float | None:
    return None if text == "forever" else _number(float, 0, 86_400, "seconds, or forever")(text)


def _label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"takes NAME=VALUE, not {text!r}")
    return name, value


def _variable(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text):
        raise argparse.ArgumentTypeError(f"takes the name of a variable, not {text!r}")
    return text


def _outcome_of_status(text: str) -> tuple[int, str]:
    """`75=rate_limited` or `EX_TEMPFAIL=rate_limited`, which are the same."""
    name, _, outcome = text.partition("=")
    status = getattr(os, name, None) if re.fullmatch(r"EX_[A-Z]+", name) else None
    if status is None and re.fullmatch(r"[0-9]{1,3}", name, re.ASCII):
        status = int(name)
    if status is None or status > 255 or outcome not in OUTCOMES:
        raise argparse.ArgumentTypeError(
            "takes STATUS=OUTCOME, a status from 0 to 255 or its name in sysexits.h (EX_TEMPFAIL) and one of "
            f"{', '.join(OUTCOMES)}, not {text!r}"
        )
    return status, outcome


# -- the table


def argument(names: str, about: str, metavar: str | None = None, **options: Any) -> Argument:
    """An argument that takes a value; `names` are separated by spaces."""
    return Argument(tuple(names.split()), {"help": about, "metavar": metavar} | options)


def switch(names: str, about: str) -> Argument:
    """A flag without a value."""
    return Argument(tuple(names.split()), {"help": about, "action": "store_true"})


_ABOUT_FILES = """\
The first line of a CSV file names the columns: secret, name, seats, label:NAME and data:NAME; only secret is required.
JSON lines are objects with secret, name, labels, data, pace and seats. Otherwise each line is a secret. The same secret
is the same key, so a file may be imported again. Lines that fail are reported by their number, and the status is then
1.

  keypool import --pool openai keys.csv
  pass show openai-keys | keypool import --pool openai -
"""

_ABOUT_UPDATE = """\
Viewers see the name, which is unique in the pool, and the labels; only holders get the data.

  keypool update id:42 --name acct-17 --label region=eu --label tier=2
  echo '{"user": "x"}' | keypool update acct-17 --data -
"""

_ABOUT_REPLACE = """\
The key keeps its id, name and history; a cooldown or quarantine ends. Its holder may go on with the old secret until
the lease ends.

  pass show openai-key | keypool replace acct-17 -
"""

_ABOUT_POOLS = """\
A file of pools has a table for each, with settings as docs/api.md lists them; "never" is a value of keepalive_seconds
and error_threshold. Settings that are left out have their defaults.

  [pools.openai]
  keepalive_seconds = "never"
  max_block_seconds = 600

  keypool pools apply pools.toml --dry-run
  keypool pools delete openai --drain
"""

_ABOUT_RUN = """\
The command gets the key in KEYPOOL_KEY, the lease in KEYPOOL_LEASE and KEYPOOL_HANDLE, the pool in KEYPOOL_POOL, and
what an operator stored with the key in KEYPOOL_DATA_USER and the like: names in capitals, with _ for all but letters
and digits, and values that are no text as JSON. It gets no token.

"""

# fmt: off
GLOBAL_FLAGS = (
    argument("--url", f"the server; default $KEYPOOL_URL or {DEFAULT_URL}", "URL"),
    argument("--pool", f"the pool; default $KEYPOOL_POOL or {DEFAULT_POOL}", "NAME"),
    argument("--token-file", "file that holds the token; default $KEYPOOL_TOKEN or the file "
              "$KEYPOOL_TOKEN_FILE", "FILE"),
    switch("--json", "print JSON, one document a line"),
    switch("--show-keys -k", "print whole keys, not masked ones"),
    argument("--timeout", "seconds to wait for an answer; default 10", "S", type=_some_seconds, default=10.0),
    argument("--retry", "seconds to retry for, where that is safe; default 5, and no limit for events once it was "
             "connected", "S", type=_seconds),
)
"""Flags that every command but serve takes, before or after its name."""


def shared_flags(command: Command) -> list[Argument]:
    """The global flags that a command takes: those of which it has none of its own with the same name."""
    own = {name for argument in command.arguments for name in argument.names}
    return [flag for flag in GLOBAL_FLAGS if own.isdisjoint(flag.names)]


_COUNT = argument("count", "how many; default 1", "N", nargs="?", type=_positive, default=1)
_KEYS = argument("keys", "keys, handles, or id:N (admin); - reads them from standard input", "KEY", nargs="+")
_KEY = argument("key", "id:N, or its handle, name or text; - for standard input", "KEY")
_LEASE = argument("--lease", "only if this is the key's latest lease", "NUMBER", type=_positive)
_WAIT = argument("--wait", "seconds to wait until a key is free, or forever", "S", type=_wait, default=0.0)
_OWNER = argument("--owner", "name of the holder, which lists show", "NAME")
_BLOCK = argument("--block-seconds", "seconds until the lease ends; default: the pool's", "S", type=_pool_seconds)

COMMANDS = (
    Command("serve", "", "run a server; keypool serve --help lists its settings"),
    Command("generate", "keypool.cli.keys:generate", "generate keys (admin); prints key, id, expires_in", (
        _COUNT,
        switch("--yes", "generate more than 100,000 without asking"),
    )),
    Command("acquire", "keypool.cli.keys:acquire", "lease keys; prints key, lease, id, release_in, expires_in, handle",
            (_COUNT, _WAIT, _OWNER, _BLOCK)),
    Command("unblock", "keypool.cli.keys:unblock", "give keys back, and report how the work with them went", (
        _KEYS,
        _LEASE,
        argument("--outcome", "how it went; needs a handle or lease", choices=OUTCOMES),
        argument("--retry-after", "with rate_limited: for how long, in seconds or as an HTTP date", "S",
                 type=_retry_after),
        argument("--reason", "with --outcome: a word of explanation, which lists show", "TEXT"),
        argument("--uses", "how often each key was used, which counts for its pace; default: 1", "N", type=_uses),
    )),
    Command("extend", "keypool.cli.keys:extend", "let leases last longer; prints id, lease, release_in, block_left", (
        argument("keys", "handles, or keys with their leases; - reads acquire's lines from standard input", "KEY",
                 nargs="+"),
        _LEASE,
        argument("--seconds", "seconds from now on; default: the pool's block", "S", type=_pool_seconds),
    )),
    Command("keepalive", "keypool.cli.keys:keepalive", "put off the expiry of keys", (
        _KEYS,
        switch("--watch", "go on until all keys are dead, or Ctrl-C"),
    )),
    Command("delete", "keypool.cli.keys:delete", "delete keys (admin)", (_KEYS,)),
    Command("quarantine", "keypool.cli.keys:quarantine", "take keys out of service until they are restored (admin)", (
        _KEYS,
        argument("--reason", "why, which lists show", "TEXT"),
        switch("--now", "also keys that are held; otherwise those go when their lease ends"),
    )),
    Command("restore", "keypool.cli.keys:restore", "put cooling and quarantined keys into service again (admin)",
            (_KEYS,)),
    Command("list", "keypool.cli.keys:list_keys", "list keys (viewer)", (
        argument("--state", "only keys in this state", choices=STATES),
        argument("--prefix", "only generated keys that begin with these 1 to 4 characters", "TEXT"),
        argument("--name", "only keys whose name begins so, in order of name", "TEXT"),
        argument("--owner", "only keys that this owner holds, in order of lease", "NAME"),
        argument("--order", "default: id", choices=ORDERS),
        argument("--limit", "this many keys at most; default: all", "N", type=_positive),
    )),
    Command("show", "keypool.cli.keys:show", "show the state of one key", (
        argument("key", "the key, its handle, - for standard input, or id:N (admin, viewer)", "KEY"),
    )),
    Command("history", "keypool.cli.keys:history", "show who held a key, and how each lease ended (viewer)", (
        argument("key", "id:N, the key or its handle; - for standard input", "KEY"),
        argument("--limit", "this many leases at most, the latest; default: 50", "N", type=_positive, default=50),
    )),
    Command("find", "keypool.cli.keys:find", "show the state of a key by its text, id, name or hint (viewer)", (
        argument("text", "the whole key, id:N, its name or its hint; - for standard input", "TEXT"),
    )),
    Command("import", "keypool.cli.imports:import_keys", "import keys from a file (admin); prints how many", (
        argument("file", "CSV with a header, JSON lines, or a secret a line; - for standard input", "FILE"),
        argument("--format", "default: by the content", choices=("csv", "json", "lines")),
        argument("--exists", "skip keys that the pool has (default), or update what the file has of them",
                 choices=("skip", "update"), default="skip"),
        switch("--expire", "let them expire, in a pool that purges keys which nobody keeps alive"),
    ), more=_ABOUT_FILES),
    Command("update", "keypool.cli.keys:update", "change a key's name, labels, data, pace or seats (admin)", (
        _KEY,
        argument("--name", "the name; '' removes it", "TEXT"),
        argument("--label", "a label; may be repeated, and replaces all labels", "NAME=VALUE", type=_label,
                 action="append", dest="labels"),
        switch("--no-labels", "remove all labels"),
        argument("--data", "file with a JSON object, - for standard input; {} removes the data", "FILE"),
        argument("--pace", "how often it may be used in so many seconds, and of these at once: 5/60 or 5/60/2; none: "
                 "as the pool says", "N/S[/BURST]", type=_pace),
        argument("--seats", "how many may hold the key at a time, 1 to 100", "N", type=_positive),
    ), more=_ABOUT_UPDATE),
    Command("replace", "keypool.cli.keys:replace", "give a key another secret (admin)", (
        _KEY,
        argument("source", "- reads the new secret from standard input", "-"),
    ), more=_ABOUT_REPLACE),
    Command("stats", "keypool.cli.keys:stats", "show the counts of the pool (viewer)", (
        argument("--watch", "again every S seconds; default 2", "S", nargs="?", type=_some_seconds, const=2.0),
    )),
    Command("events", "keypool.cli.events:events", "follow what happens to keys (viewer)", (
        argument("--past", "begin with N past events; default 10", "N", type=_whole, default=10),
        argument("--count", "end after N events; with --rare the latest N", "N", type=_positive),
        switch("--rare", "only the rare events, which are kept: print them and end"),
        argument("--kind", "with --rare: only this kind", choices=RARE_EVENTS),
    )),
    Command("owners", "keypool.cli.holders:owners", "list who holds keys (viewer), or end all leases of one (admin)", (
        argument("action", "list (default); release NAME: end all leases of an owner", "list|release", nargs="?",
                 choices=("list", "release"), default="list"),
        argument("owner", "the owner's name", "NAME", nargs="?"),
        argument("--client", "release: only leases under this token", "NAME"),
    )),
    Command("waiters", "keypool.cli.holders:waiters", "list who waits for a key (viewer)", ()),
    Command("run", "keypool.cli.run:run", "lease a key, run a command with it, and give the key back", (
        _WAIT,
        _OWNER,
        _BLOCK,
        switch("--extend", "let the lease last as long as the command, if the pool allows that"),
        argument("--on-exit", "report OUTCOME (ok, rate_limited, error or invalid) if the command ends with STATUS, "
                 "a number or a name as EX_TEMPFAIL; may be repeated; default: ok for 0, and for others no outcome",
                 "STATUS=OUTCOME", type=_outcome_of_status, action="append", default=[]),
        argument("--retry-after", "with --on-exit …=rate_limited: seconds until the key may be used again", "S",
                 type=_retry_after),
        argument("--env", "environment variable for the key; default KEYPOOL_KEY", "NAME",
                  type=_variable, default="KEYPOOL_KEY"),
        argument("--overrun", "if the lease ends before the command: stop the command (default), or only say so",
                  choices=("stop", "warn"), default="stop"),
        argument("words", "the command to run", "-- COMMAND ...", nargs=argparse.REMAINDER),
    ), more=_ABOUT_RUN),
    Command("pools", "keypool.cli.pools:pools", "list pools (viewer), or make, change and delete them (admin)", (
        argument("action", "list (default); show NAME; apply FILE: make the pools as a TOML file says; delete NAME",
                 "list|show|apply|delete", nargs="?", choices=("list", "show", "apply", "delete"), default="list"),
        argument("what", "the pool's name, or the file, - for standard input", "NAME|FILE", nargs="?"),
        switch("--dry-run", "apply: only print what it would do"),
        switch("--delete", "apply: also delete pools that the file doesn't have, when their leases have ended"),
        switch("--drain", "delete: also a pool that has keys, when its leases have ended"),
        switch("--now", "delete --drain: without waiting for its leases"),
    ), more=_ABOUT_POOLS),
    Command("rekey", "keypool.cli.pools:rekey", "encrypt all stored keys under the first secrets key (admin)", (
        switch("--wait", "until that is done"),
    )),
    Command("token", "keypool.server.token_command:token", "make a named token for the server's file of tokens", (
        argument("name", "the token's name, which the audit log, events and lists show", "NAME"),
        argument("--role", "what it may do", choices=("client", "viewer", "admin"), required=True),
        argument("--pool", "only this pool; may be repeated; default: all", "NAME", action="append", dest="pools"),
        argument("--max-held", "leases that it may hold at a time, in all pools together", "N", type=_positive),
        argument("--file", "append it to this file of tokens, which need not exist yet", "FILE"),
    )),
    Command("backup", "keypool.server.backup_command:backup", "copy the data file while its server runs", (
        argument("file", "the copy; must not exist yet", "FILE"),
        argument("--data", "the data file; default as for the server: $KEYPOOL_DATA, …", "FILE"),
        argument("--config", "TOML file of the server's settings", "FILE"),
    )),
    Command("verify", "keypool.server.backup_command:verify", "check a data file or a copy, without changing it", (
        argument("file", "the file; a server may be using it", "FILE"),
    )),
    Command("migrate", "keypool.server.migrate_command:migrate", "move all pools from a data file to Valkey, or back", (
        argument("--from", "a data file, a URL, or env:VARIABLE", "PLACE", dest="source", required=True),
        argument("--to", "valkey://HOST:PORT/DB, or a new data file", "PLACE", dest="target", required=True),
        argument("--partitions", "partitions of the pool in Valkey; default 1, 16 in a cluster", "N",
                  type=_positive),
        switch("--clear", "first delete what an unfinished migrate has left in Valkey"),
    )),
    Command("completion", "keypool.cli.completion:completion", "print the completion script of a shell", (
        argument("shell", "bash, zsh or fish", choices=SHELLS),
    )),
)
