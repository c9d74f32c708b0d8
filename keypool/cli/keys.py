"""The commands of one call or one batch: generate, acquire, unblock, keepalive, delete, list, show."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from keypool.cli.connect import connect
from keypool.cli.output import Output
from keypool.cli.progress import Progress
from keypool.cli.status import CommandError, Status
from keypool.client import Done, KeyPool, KeyPoolError, LeasedKey

GENERATED = ("key", "id", "expires_in")
LEASED = ("key", "lease", "id", "release_in", "expires_in")
LISTED = ("id", "hint", "state", "owner", "lease", "release_in", "expires_in", "created_at")


def output_of(args: argparse.Namespace) -> Output:
    """The form that this command's results are wanted in."""
    return Output(as_json=args.json, show_keys=args.show_keys)


def generate(args: argparse.Namespace) -> Status:
    """Make keys. What was made before a failure is printed too."""
    output = output_of(args)
    with connect(args) as pool, Progress("generating", args.count) as bar:
        try:
            made = [pool.generate()] if args.count == 1 else pool.generate_many(args.count, progress=bar)
        except KeyPoolError as error:
            output.rows(GENERATED, map(_members, error.partial or []))
            raise
    output.rows(GENERATED, map(_members, made))
    return Status.OK


def acquire(args: argparse.Namespace) -> Status:
    """Acquire a key, or several at once; given back if nobody can read what is printed."""
    output = output_of(args)
    with connect(args) as pool:
        if args.count == 1:
            served = [pool.acquire(owner=args.owner, wait=args.wait)]
        elif args.wait:
            raise CommandError("--wait goes with one key only", Status.USAGE)
        else:
            served = pool.acquire_many(args.count, owner=args.owner)
        _hand_over(pool, output, served)
    return Status.OK


def _hand_over(pool: KeyPool, output: Output, served: list[LeasedKey]) -> None:
    try:
        output.rows(LEASED, map(_members, served))
    except BaseException:
        pool.unblock_many(served)
        raise


def unblock(args: argparse.Namespace) -> Status:
    """Give keys back, by their lease numbers where those are known."""
    output = output_of(args)
    if args.lease is not None and len(args.keys) != 1:
        raise CommandError("--lease goes with one key only", Status.USAGE)
    with connect(args) as pool:
        if len(args.keys) == 1 and args.keys != ["-"]:
            output.fields(_members(pool.unblock(args.keys[0], args.lease)))
            return Status.OK
        items = [(words[0], int(words[1])) if len(words) > 1 else words[0] for words in _named(args.keys)]
        with Progress("giving back", len(items)) as bar:
            done = pool.unblock_many(items, progress=bar)
    return _tell(output, done)


def keepalive(args: argparse.Namespace) -> Status:
    """Put off expiries, once."""
    output = output_of(args)
    with connect(args) as pool:
        if len(args.keys) == 1 and args.keys != ["-"]:
            output.fields(_members(pool.keepalive(args.keys[0])))
            return Status.OK
        keys = names(args.keys)
        with Progress("keeping alive", len(keys)) as bar:
            done = pool.keepalive_many(keys, progress=bar)
    return _tell(output, done)


def delete(args: argparse.Namespace) -> Status:
    """Purge keys."""
    output = output_of(args)
    keys = names(args.keys)
    with connect(args) as pool, Progress("deleting", len(keys)) as bar:
        done = pool.delete_many(keys, progress=bar)
    if done.repeated and done.unknown:
        output.note("an answer was lost: what is unknown now may have been deleted just before")
    return _tell(output, done)


def list_keys(args: argparse.Namespace) -> Status:
    """List keys, page by page as they are read."""
    with connect(args) as pool:
        rows: Iterable[Any] = pool.rows(state=args.state, prefix=args.prefix, order=args.order)
        if args.limit is not None:
            rows = itertools.islice(rows, args.limit)
        output_of(args).rows(LISTED, map(_members, rows))
    return Status.OK


def show(args: argparse.Namespace) -> Status:
    """One key; its text too if keys are to be shown, which admins may see and the audit log records."""
    with connect(args) as pool:
        row = _members(pool.get(args.key))
        if args.show_keys:
            row["key"] = pool.reveal(args.key).secret
    output_of(args).fields(row)
    return Status.OK


def names(keys: list[str]) -> list[str]:
    """The keys that are named, `-` meaning those on standard input. Raises CommandError if there is none."""
    return [words[0] for words in _named(keys)]


def _named(keys: list[str]) -> list[list[str]]:
    """The keys that are named, each with what else stands on its line; `-` is for lines of standard input.

    The lines are those that generate and acquire print: the key first, then for acquire its lease.
    """
    named = [words for key in keys for words in (_lines(sys.stdin) if key == "-" else [[key]])]
    if not named:
        raise CommandError("no key on standard input", Status.USAGE)
    return named


def _lines(lines: Iterable[str]) -> Iterator[list[str]]:
    for number, line in enumerate(lines, 1):
        words = line.split()
        if words and "…" in words[0]:
            raise CommandError(f"line {number} holds a masked key: print them with --show-keys", Status.USAGE)
        if words:
            yield words


def _tell(output: Output, done: Done) -> Status:
    """Print a batch's counts; keys that it didn't know are notes, masked."""
    output.fields({"done": done.done, "unknown": len(done.unknown), "stale": len(done.stale)})
    for word, keys in (("unknown", done.unknown), ("stale", done.stale)):
        for key in keys[:10]:
            output.note(f"{word}: {key if key.startswith('id:') else output.masked(key)}")
        if len(keys) > 10:
            output.note(f"{word}: {len(keys) - 10} more")
    if done.unknown:
        return Status.UNKNOWN_KEY
    return Status.LEASE_OVER if done.stale else Status.OK


def _members(value: Any) -> dict[str, Any]:
    """Its members as JSON has them."""
    names = {"secret": "key"}
    members = {names.get(name, name): value for name, value in dataclasses.asdict(value).items()}
    members.pop("repeated", None)
    if "created_at" in members:
        members["created_at"] = (
            members["created_at"].isoformat(timespec="milliseconds").replace("+00:00", "Z")
        )
    return members
