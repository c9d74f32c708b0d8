"""`keypool token NAME --role ROLE`: makes a named token, and its table for the file of `--tokens`.

The token itself is printed once and stored nowhere. The rules of names are the server's, so this is here and not in
keypool/cli/; it needs no running server.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import secrets
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from keypool.cli.output import Output, note
from keypool.cli.status import CommandError, Status

if TYPE_CHECKING:
    from keypool.config.named_tokens import NamedToken

PREFIX = "kp_"
"""How a token begins, so that scanners recognise one that was published: kp_[A-Za-z0-9]{43}."""

_ALPHABET = string.ascii_letters + string.digits
_CHARACTERS = 43  # of 62 kinds: 256 bits


def token(args: argparse.Namespace) -> Status:
    """Make a token, print it, and print its table or append it to the file. Raises CommandError."""
    made = PREFIX + "".join(secrets.choice(_ALPHABET) for _ in range(_CHARACTERS))
    named = _named(args, hashlib.sha256(made.encode()).digest())
    if args.file:
        _append(args.file, named)
        note(
            f"{named.name} was added to {args.file}: a server with --tokens={args.file} reads it within 10 s"
        )
        for line in _warnings(args.file):
            note(line)
    if args.json:
        fields = {"name": named.name, "role": named.role, "token": made, "digest": named.digest.hex()}
        Output(as_json=True).fields(fields)
    elif args.file:
        print(made)
    else:
        print(f"{made}\n\n{named.stanza()}", end="")
    return Status.OK


def _named(args: argparse.Namespace, digest: bytes) -> NamedToken:
    """The token that the arguments describe. Raises CommandError."""
    from keypool.config.named_tokens import MOST_HELD, NAME_TAKES, POOL_TAKES, NamedToken, is_token_name  # noqa: PLC0415
    from keypool.core.rules import is_pool_name  # noqa: PLC0415

    if not is_token_name(args.name):
        raise _wrong(f"the name of a token takes {NAME_TAKES}, not {args.name!r}")
    for pool in args.pools or ():
        if not is_pool_name(pool):
            raise _wrong(f"--pool takes the name of a pool, {POOL_TAKES}, not {pool!r}")
    if args.max_held is not None and args.role != "client":
        raise _wrong(f"--max-held is for tokens of the role client only, not for {args.role}")
    if args.max_held is not None and args.max_held > MOST_HELD:
        raise _wrong(f"--max-held takes a whole number from 1 to {MOST_HELD}, not {args.max_held}")
    pools = frozenset(args.pools) if args.pools else None
    return NamedToken(args.name, args.role, digest, pools, args.max_held)


def _warnings(name: str) -> list[str]:
    from keypool.config.tokens import exposed_files  # noqa: PLC0415

    return exposed_files({"--file": name})


def _wrong(message: str) -> CommandError:
    return CommandError(message, Status.USAGE)


def _append(name: str, named: NamedToken) -> None:
    """Append the table to the file, which is replaced at once by a complete new one. Raises CommandError."""
    from keypool.config.named_tokens import parse, table  # noqa: PLC0415
    from keypool.core.errors import SettingsError  # noqa: PLC0415

    path = Path(os.path.realpath(name))  # a link stays a link
    try:
        with _locked(path.parent):
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            if any(each.name == named.name for each in parse("--file", name, text)):
                raise _wrong(
                    f"{name} has a table {table(named.name)} already: take another name, or remove it"
                )
            gap = "" if not text else "\n" if text.endswith("\n") else "\n\n"
            new = text + gap + named.stanza()
            parse("--file", name, new)
            _replace(path, new)
    except SettingsError as error:
        raise _wrong(str(error)) from None
    except UnicodeDecodeError:
        raise _wrong(f"--file takes a TOML file of named tokens, but {name} is not text in UTF-8") from None
    except (OSError, ValueError) as error:  # the latter for a NUL in the name
        why = getattr(error, "strerror", None) or error
        raise CommandError(f"{name} can't be written: {why}", Status.FAILED) from None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on the file's folder, so that of two commands at once neither undoes what the other did."""
    try:
        import fcntl  # noqa: PLC0415 - not on Windows
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    """Replace the file by one with this text, of the same owner and mode; a new one has mode 0600. Raises OSError."""
    before = path.stat() if path.exists() else None
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            if before is not None:
                with contextlib.suppress(PermissionError):  # only root may give files away
                    os.fchown(descriptor, before.st_uid, before.st_gid)
                os.fchmod(descriptor, before.st_mode & 0o7777)
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
