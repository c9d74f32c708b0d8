"""Every subcommand and flag of the `keypool` command, once. Help and shell completion derive from it.

What a command does is named here as `module:function` and imported when it is called, so that a small call
doesn't wait for what it doesn't use.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from keypool import __version__
from keypool.cli.status import Status

SHELLS = ("bash", "zsh", "fish")


def parser() -> argparse.ArgumentParser:
    """The parser of all words. `command` is the subcommand, `do` what does it."""
    top = argparse.ArgumentParser(
        "keypool",
        description="Leases API keys from a keypool server, and serves them.",
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"keypool {__version__}")
    common = _common(suppress=True)
    _add_all(top, _common(suppress=False))
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, do: str, about: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=about, description=about, parents=[common], allow_abbrev=False)
        made.set_defaults(do=do)
        return made

    _server_words(add)
    _key_words(add)
    _long_words(add)
    return top


Add = Callable[[str, str, str], argparse.ArgumentParser]


def _server_words(add: Add) -> None:
    # Its flags are the server's own, and are read by it: main.py calls it before this parser.
    add("serve", "keypool.server.launch:main", "run a server; --help after it lists its settings")
    words = add(
        "migrate", "keypool.server.migrate_command:migrate", "move a pool: data file to Valkey, or back"
    )
    words.add_argument(
        "--from", dest="source", required=True, metavar="PLACE", help="a data file, a URL, or env:VARIABLE"
    )
    words.add_argument(
        "--to",
        dest="target",
        required=True,
        metavar="PLACE",
        help="valkey://HOST:PORT/DB, or a new data file",
    )
    words.add_argument(
        "--partitions",
        type=_count,
        default=None,
        metavar="N",
        help="of the pool in Valkey; default 1, 16 in a cluster",
    )
    words.add_argument(
        "--clear", action="store_true", help="delete first what an unfinished migrate has left in Valkey"
    )
    words = add("backup", "keypool.server.backup_command:backup", "copy the data file while its server runs")
    words.add_argument("file", metavar="FILE", help="the copy, which isn't there yet")
    words.add_argument(
        "--data", metavar="FILE", help="the data file; default as the server: $KEYPOOL_DATA, …"
    )
    words.add_argument("--config", metavar="FILE", help="a TOML file of the server's settings")
    words = add("verify", "keypool.server.backup_command:verify", "check a data file, or a copy of one")
    words.add_argument("file", metavar="FILE", help="is not changed; a server may have it")
    words = add("completion", "keypool.cli.completing:completion", "print the completion script of a shell")
    words.add_argument("shell", choices=SHELLS)


def _key_words(add: Add) -> None:
    words = add("generate", "keypool.cli.keys:generate", "make keys (admin)")
    words.add_argument("count", nargs="?", type=_count, default=1, metavar="N", help="how many; default 1")

    words = add("acquire", "keypool.cli.keys:acquire", "lease a key; print it, its lease, its id")
    words.add_argument("count", nargs="?", type=_count, default=1, metavar="N", help="how many; default 1")
    _acquiring(words)

    words = add("unblock", "keypool.cli.keys:unblock", "give keys back")
    _keys(words)
    words.add_argument("--lease", type=_count, metavar="NUMBER", help="only if this lease is the latest")

    words = add("keepalive", "keypool.cli.watching:keepalive", "put off the expiry of keys")
    _keys(words)
    words.add_argument("--watch", action="store_true", help="go on until all are dead, or Ctrl-C")

    words = add("delete", "keypool.cli.keys:delete", "purge keys for ever (admin)")
    _keys(words)

    words = add("list", "keypool.cli.keys:list_keys", "list keys (viewer)")
    words.add_argument("--state", choices=("available", "blocked"), help="only those in this state")
    words.add_argument("--prefix", metavar="TEXT", help="only those that start so: 1 to 4 characters")
    words.add_argument("--order", choices=("id", "release", "expiry"), help="default: id")
    words.add_argument("--limit", type=_count, metavar="N", help="so many at most; default: all")

    words = add("show", "keypool.cli.keys:show", "how one key stands")
    words.add_argument("key", metavar="KEY", help="the key, or id:N (admin, viewer)")


def _long_words(add: Add) -> None:
    words = add("stats", "keypool.cli.watching:stats", "the counts of the pool (viewer)")
    words.add_argument(
        "--watch", nargs="?", type=_seconds, const=2.0, metavar="S", help="again every S seconds; default 2"
    )

    words = add("events", "keypool.cli.following:events", "follow what happens to keys (viewer)")
    words.add_argument("--past", type=_whole, default=10, metavar="N", help="earlier ones first; default 10")
    words.add_argument("--count", type=_count, metavar="N", help="end after so many")

    words = add("run", "keypool.cli.running:run", "lease a key, run a command with it, give it back")
    _acquiring(words)
    words.add_argument(
        "--env", default="KEYPOOL_KEY", metavar="NAME", help="the variable with the key; default KEYPOOL_KEY"
    )
    words.add_argument(
        "--overrun",
        choices=("warn", "stop"),
        default="warn",
        help="when the lease ends before the command: say so (default), or end the command",
    )
    words.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="what to run")


def _common(*, suppress: bool) -> argparse.ArgumentParser:
    """The flags that stand before or after the subcommand alike."""
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)

    def add(*flags: str, default: object, **how: object) -> None:
        # After the subcommand, a flag that isn't given must not undo one that was given before it.
        common.add_argument(*flags, default=argparse.SUPPRESS if suppress else default, **how)  # type: ignore[arg-type]

    add("--url", default=None, metavar="URL", help="the server; default $KEYPOOL_URL, http://127.0.0.1:8888")
    add(
        "--token-file",
        default=None,
        metavar="FILE",
        help="a file with the token; default $KEYPOOL_TOKEN, or the file $KEYPOOL_TOKEN_FILE",
    )
    add("--json", default=False, action="store_true", help="JSON, one document a line")
    add("--show-keys", "-k", default=False, action="store_true", help="print keys whole, not masked")
    add("--timeout", default=10.0, type=_seconds, metavar="S", help="seconds for an answer; default 10")
    add(
        "--retry",
        default=5.0,
        type=_patience,
        metavar="S",
        help="seconds to try again for, where that is safe; default 5",
    )
    return common


def _add_all(top: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    for action in common._actions:  # noqa: SLF001 - what `parents=` does, after --version
        top._add_action(action)  # noqa: SLF001


def _acquiring(words: argparse.ArgumentParser) -> None:
    words.add_argument("--wait", type=_patience, default=0.0, metavar="S", help="wait for one, up to 60 s")
    words.add_argument("--owner", metavar="NAME", help="who holds it, for lists")


def _keys(words: argparse.ArgumentParser) -> None:
    words.add_argument(
        "keys", nargs="+", metavar="KEY", help="keys, or id:N (admin); - reads lines of standard input"
    )


def _count(text: str) -> int:
    number = _whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is wanted, not {text!r}")
    return number


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise argparse.ArgumentTypeError(f"a whole number is wanted, not {text!r}")
    return int(text)


def _patience(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"a number of seconds is wanted, not {text!r}")
    return seconds


def _seconds(text: str) -> float:
    seconds = _patience(text)
    if seconds < 0.01:
        raise argparse.ArgumentTypeError(f"at least 0.01 seconds are wanted, not {text!r}")
    return seconds


def _epilog() -> str:
    lines = [f"  {status.value:>3}  {status.about}" for status in Status]
    return "\n".join(
        [
            "The token comes from KEYPOOL_TOKEN or a file, never from an argument, which others could see.",
            "",
            "exit statuses:",
            *lines,
            "run passes on the status of its command; 128 + n if signal n ended it.",
        ]
    )
