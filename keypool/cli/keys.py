"""The commands about keys, from generate to show; and stats."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import queue
import signal
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from keypool.cli.connection import connect
from keypool.cli.input import in_words, read_input
from keypool.cli.output import BATCH, Output, Progress, note
from keypool.cli.signal_forwarding import answer_first
from keypool.cli.status import TRANSIENT, CommandError, Status
from keypool.client import Done, KeyPool, KeyPoolError, LeasedKey, LeaseItem, Refused, Unblock
from keypool.client.calls import is_reference

GENERATED = ("key", "id", "expires_in")
LEASED = ("key", "lease", "id", "release_in", "expires_in", "handle")
_ABOUT_REPORTS = ("failures", "outcome", "reason")
_WRITTEN = ("name", "labels", "client", "pace")
_SEATS = ("seat", "seats")
PAST = (
    "lease",
    "owner",
    "client",
    "acquired_at",
    "ended_at",
    "held",
    "how",
    "outcome",
    "extended",
    "reason",
)
"""The columns of `history`."""
LISTED = (
    "id",
    "hint",
    "state",
    "owner",
    "lease",
    "release_in",
    "expires_in",
    "created_at",
    "available_in",
    *_ABOUT_REPORTS,
    *_WRITTEN,
    *_SEATS,
    "acquired_at",
    "served",
)
_LISTED_IN_TABLES = (
    "id",
    "hint",
    "name",
    "state",
    "owner",
    "lease",
    "ends_in",
    "expires_in",
    *_ABOUT_REPORTS,
    "client",
    "labels",
    "pace",
    *_SEATS,
    "created_at",
)
"""Columns that may not fit the terminal come last. `ends_in`: seconds until the block or the cooldown ends."""

_CONFIRM_ABOVE = 100_000  # keys; for more, `generate` asks unless --yes is given
_CLEAR_SCREEN = "\x1b[H\x1b[J"


def generate(args: argparse.Namespace) -> Status:
    """Generate keys and print them batch by batch, so that an interrupt or a failure loses none."""
    if args.count > _CONFIRM_ABOVE and not args.yes:
        _confirm(args.count)
    output = output_of(args, whole_in_pipes=True)
    generated = printed = 0
    bar = Progress("generating", args.count, shown=not sys.stdout.isatty())
    with connect(args) as pool, bar, answer_first() as signals:
        try:
            while generated < args.count and not signals:
                batch = pool.generate_many(min(BATCH, args.count - generated))
                generated += len(batch)
                output.rows(GENERATED, map(members_of, batch))
                printed = generated
                bar(generated)
        finally:
            if printed < args.count and args.count > 1:
                note(f"{generated} of {args.count} keys were generated, {printed} of them printed")
    for number in signals:
        signal.raise_signal(number)
    if not output.show_keys:
        note("the keys are masked: --show-keys (-k) prints them")
    return Status.OK


def _confirm(count: int) -> None:
    question = f"{count} is a lot of keys"
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise CommandError(f"{question}: add --yes to generate them", Status.USAGE)
    print(f"keypool: {question}. Generate them? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise CommandError("no key was generated", Status.FAILED)


def acquire(args: argparse.Namespace) -> Status:
    """Acquire a key, or several at once. They are given back if they can't be printed."""
    output = output_of(args, whole_in_pipes=True)
    if not output.show_keys:
        raise CommandError(
            "keys are masked on a terminal, and a masked key can't be used: add --show-keys (-k), "
            "or use keypool run -- COMMAND; nothing was acquired",
            Status.USAGE,
        )
    if args.count > 1 and args.wait != 0:
        raise CommandError("--wait goes with one key only", Status.USAGE)
    with connect(args) as pool:
        with answer_first(enabled=args.wait == 0) as signals:
            if args.count == 1:
                leased: Sequence[LeasedKey] = [
                    pool.acquire(owner=args.owner, wait=args.wait, block_seconds=args.block_seconds)
                ]
            else:
                leased = pool.acquire_many(args.count, owner=args.owner, block_seconds=args.block_seconds)
        try:
            for number in signals:
                signal.raise_signal(number)
            output.rows(LEASED, map(members_of, leased))
        except BaseException:
            pool.unblock_many(leased)
            raise
    return Status.OK


def unblock(args: argparse.Namespace) -> Status:
    """Give keys back, with their lease numbers where these are known, and report the outcome."""
    if args.retry_after is not None and args.outcome != "rate_limited":
        raise CommandError("--retry-after goes with --outcome rate_limited only", Status.USAGE)
    if args.reason is not None and args.outcome is None:
        raise CommandError("--reason goes with --outcome only", Status.USAGE)
    leases = _leases(args, needed=args.outcome is not None)
    report = {
        "outcome": args.outcome,
        "retry_after": args.retry_after,
        "reason": args.reason,
        "uses": args.uses,
    }
    with connect(args) as pool:
        if single := _single(args):
            [(_, lease)] = leases
            output_of(args).fields(members_of(pool.unblock(single, lease, **report)))
            return Status.OK
        items = [Unblock(key, lease, **report) for key, lease in leases]
        with Progress("giving back", len(items)) as bar:
            return _report(args, pool.unblock_many(items, progress=bar))


def extend(args: argparse.Namespace) -> Status:
    """Let leases last longer."""
    leases = _leases(args, needed=True)
    with connect(args) as pool:
        if single := _single(args):
            [(_, lease)] = leases
            output_of(args).fields(members_of(pool.extend(single, args.seconds, lease=lease)))
            return Status.OK
        items: list[LeaseItem] = [key if lease is None else (key, lease) for key, lease in leases]
        with Progress("extending", len(items)) as bar:
            return _report(args, pool.extend_many(items, args.seconds, progress=bar), of_leases=True)


def _leases(args: argparse.Namespace, *, needed: bool) -> list[tuple[str, int | None]]:
    """The keys in the arguments, each with its lease number if that is known. Raises CommandError if it is `needed`."""
    named = _named(args.keys)
    if args.lease is not None and len(named) != 1:
        raise CommandError("--lease goes with one key only", Status.USAGE)
    leases = [(key, args.lease or lease) for key, lease in named]
    if needed and any(lease is None and not key.startswith("h:") for key, lease in leases):
        raise CommandError(
            f"{args.command}{' --outcome' * (args.command == 'unblock')} is for the holder of a lease: name it by its "
            "handle, by --lease, or by a line of acquire on standard input",
            Status.USAGE,
        )
    return leases


def _single(args: argparse.Namespace) -> str | None:
    """The key, if it is one argument: then its own call shows more than a batch does."""
    return None if len(args.keys) != 1 or args.keys == ["-"] else str(args.keys[0])


def keepalive(args: argparse.Namespace) -> Status:
    """Put off expiries, once, or with --watch until all keys are dead."""
    keys = [key for key, _ in _named(args.keys)]
    if args.watch:
        return _keep_alive(args, keys)
    with connect(args) as pool:
        if single := _single(args):
            output_of(args).fields(members_of(pool.keepalive(single)))
            return Status.OK
        with Progress("keeping alive", len(keys)) as bar:
            return _report(args, pool.keepalive_many(keys, progress=bar))


def _keep_alive(args: argparse.Namespace, keys: list[str]) -> Status:
    """Print a line for each key that dies. Raises KeyPoolError if the server refuses, for a wrong token for example."""
    output = output_of(args)
    events: queue.SimpleQueue[str | KeyPoolError] = queue.SimpleQueue()
    # Otherwise the client would also log what is printed here.
    logging.getLogger("keypool.client").addHandler(logging.NullHandler())
    with connect(args) as pool, pool.keeper(keys, on_dead=events.put, on_error=events.put) as keeper:
        note(f"keeping {len(keeper.keys)} keys alive")
        while keeper.keys or not events.empty():
            event = events.get()
            if isinstance(event, str):
                output.rows(("event", "key"), [{"event": "dead", "key": event}])
            elif isinstance(event, Refused) and not isinstance(event, TRANSIENT):
                raise event
            else:
                note(f"retrying: {event}")
    note("no key is left")
    return Status.UNKNOWN_KEY


def delete(args: argparse.Namespace) -> Status:
    """Delete keys."""
    keys = [key for key, _ in _named(args.keys)]
    with connect(args) as pool, Progress("deleting", len(keys)) as bar:
        done = pool.delete_many(keys, progress=bar)
    if done.repeated and done.unknown:
        note("an answer was lost and the call repeated: unknown keys may have been deleted by the first")
    return _report(args, done)


def quarantine(args: argparse.Namespace) -> Status:
    """Take keys out of service."""
    keys = [key for key, _ in _named(args.keys)]
    with connect(args) as pool:
        if single := _single(args):
            output_of(args).fields(members_of(pool.quarantine(single, reason=args.reason, now=args.now)))
            return Status.OK
        with Progress("quarantining", len(keys)) as bar:
            return _report(args, pool.quarantine_many(keys, reason=args.reason, now=args.now, progress=bar))


def restore(args: argparse.Namespace) -> Status:
    """Put keys into service again."""
    keys = [key for key, _ in _named(args.keys)]
    with connect(args) as pool:
        if single := _single(args):
            output_of(args).fields(members_of(pool.restore(single)))
            return Status.OK
        with Progress("restoring", len(keys)) as bar:
            return _report(args, pool.restore_many(keys, progress=bar))


def list_keys(args: argparse.Namespace) -> Status:
    """List keys, page by page as they are read."""
    output = output_of(args)
    with connect(args) as pool:
        rows = pool.rows(
            state=args.state, prefix=args.prefix, order=args.order, name=args.name, owner=args.owner
        )
        members = map(members_of, itertools.islice(rows, args.limit))
        # JSON has the API's members unchanged, so there a key that isn't blocked still has its latest lease.
        output.rows(
            _LISTED_IN_TABLES if output.as_table else LISTED,
            members if args.json else map(_as_listed, members),
        )
    return Status.OK


def show(args: argparse.Namespace) -> Status:
    """Print the state of one key; with --show-keys also its text, which needs an admin token and is audited."""
    [(key, _)] = _named([args.key])
    with connect(args) as pool:
        row = members_of(pool.get(key))
        if args.show_keys:
            revealed = members_of(pool.reveal(key))
            row |= {"key": revealed["key"], "data": revealed["data"]}
    output_of(args).fields(row)
    return Status.OK


def history(args: argparse.Namespace) -> Status:
    """List the leases of a key that have ended, the latest first."""
    [(key, _)] = _named([args.key])
    with connect(args) as pool:
        output_of(args).rows(PAST, map(members_of, pool.history(key, args.limit)))
    return Status.OK


def find(args: argparse.Namespace) -> Status:
    """Print the state of the key that has this text, id, name or hint."""
    with connect(args) as pool:
        output_of(args).fields(members_of(pool.find(_one_line() if args.text == "-" else args.text)))
    return Status.OK


def update(args: argparse.Namespace) -> Status:
    """Change name, labels, data, pace or seats of a key."""
    if args.labels and args.no_labels:
        raise CommandError("--label and --no-labels don't go together", Status.USAGE)
    labels = {} if args.no_labels else None if args.labels is None else dict(args.labels)
    data = None if args.data is None else _json_object(args.data)
    given = (args.name, labels, data, args.pace, args.seats)
    if all(each is None for each in given):
        raise CommandError(
            "update takes --name, --label, --no-labels, --data, --pace or --seats", Status.USAGE
        )
    if args.key == "-" == args.data:
        raise CommandError("the key or its data come from standard input, not both", Status.USAGE)
    with connect(args) as pool:
        key = _reference(pool, args.key)
        row = pool.update(key, name=args.name, labels=labels, data=data, pace=args.pace, seats=args.seats)
        output_of(args).fields(members_of(row))
    return Status.OK


def replace(args: argparse.Namespace) -> Status:
    """Give a key another text, which comes from standard input."""
    if args.source != "-":
        raise CommandError(
            "a secret is never an argument, which everybody on the machine can see: keypool replace KEY - "
            "reads it from standard input",
            Status.USAGE,
        )
    if args.key == "-":
        raise CommandError(
            "standard input has the new secret: name the key by id:N or its name", Status.USAGE
        )
    secret = _one_line()
    with connect(args) as pool:
        output_of(args).fields(members_of(pool.replace(_reference(pool, args.key), secret)))
    return Status.OK


def _reference(pool: KeyPool, named: str) -> str | int:
    """A key as a URL may name it: by its handle, or by its id, for which its text or name is looked up."""
    [(key, _)] = _named([named])
    if is_reference(key):
        return key
    return pool.find(key).id


def _one_line() -> str:
    """The only line of standard input, without the spaces around it. Raises CommandError."""
    text = sys.stdin.read().strip()
    if not text or "\n" in text:
        raise CommandError(
            f"standard input has {'more than one line' if text else 'nothing'}: it takes one line",
            Status.USAGE,
        )
    return text


def _json_object(file: str) -> dict[str, Any]:
    """The JSON object in a file, or standard input for `-`. Raises CommandError, whose text shows nothing of it."""
    text = read_input(file)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CommandError(f"--data: {in_words(file)} has no JSON object", Status.USAGE)
    return found


def stats(args: argparse.Namespace) -> Status:
    """Print the counts once, or with --watch every so many seconds, also across outages of the server."""
    output = output_of(args)
    with connect(args) as pool:
        output.fields(members_of(pool.stats()))
        while args.watch is not None:
            time.sleep(args.watch)
            try:
                now = members_of(pool.stats())
            except TRANSIENT as error:
                note(f"retrying: {error}")
                continue
            if output.as_table:
                sys.stdout.write(_CLEAR_SCREEN)
            output.fields(now)
    return Status.OK


def output_of(args: argparse.Namespace, *, whole_in_pipes: bool = False) -> Output:
    """The output for these flags. With `whole_in_pipes`, keys are masked on a terminal only."""
    whole = args.show_keys or (whole_in_pipes and not sys.stdout.isatty())
    return Output(as_json=args.json, show_keys=whole)


def _named(keys: list[str]) -> list[tuple[str, int | None]]:
    """The keys in the arguments, each with its lease number if that is known.

    `-` stands for the lines of standard input, as generate and acquire print them. Raises CommandError if
    there is no key, or a masked one.
    """
    lines = [line for key in keys for line in (map(_columns, sys.stdin) if key == "-" else [[key]]) if line]
    if not lines:
        raise CommandError("no key on standard input", Status.USAGE)
    for key, *_ in lines:
        if "…" in key:
            raise CommandError(
                f"{key} is a masked key: use the key itself, which --show-keys (-k) prints, or its id, "
                "written id:N (admin)",
                Status.USAGE,
            )
    return [(line[0], _lease(line)) for line in lines]


def _columns(line: str) -> list[str]:
    """The columns of a line. Keys from elsewhere may have spaces in them; tabs are between columns."""
    columns = line.strip("\r\n").split("\t")
    return columns if len(columns) > 1 else line.split()


def _lease(columns: list[str]) -> int | None:
    # The second column is an id in generate's lines, and the lease in acquire's.
    known = len(columns) > 1 and len(columns) != len(GENERATED) and columns[1].isdecimal()
    return int(columns[1]) if known else None


def _report(args: argparse.Namespace, done: Done, *, of_leases: bool = False) -> Status:
    """Print the counts of a batch, and a note for each of the first ten keys that failed."""
    output = output_of(args)
    failed = {"unknown": done.unknown, "stale": done.stale}
    if of_leases:
        failed |= {"over": done.over, "limit": done.limit}
    if done.many_seats:
        failed["many_seats"] = done.many_seats
    output.fields({"done": done.done} | {word: len(keys) for word, keys in failed.items()})
    for word, keys in failed.items():
        for key in keys[:10]:
            note(f"{word}: {output.masked(key)}")
        if len(keys) > 10:
            note(f"{word}: {len(keys) - 10} more")
    if done.unknown:
        return Status.UNKNOWN_KEY
    if done.stale or done.over:
        return Status.LEASE_OVER
    if done.many_seats:
        return Status.FAILED
    return Status.BLOCK_LIMIT if done.limit else Status.OK


def _as_listed(row: dict[str, Any]) -> dict[str, Any]:
    if row["release_in"] is not None:
        return row | {"ends_in": row["release_in"]}
    return row | {"ends_in": row["available_in"], "lease": None}


def members_of(value: Any) -> dict[str, Any]:
    """The members of an answer, under their names in JSON."""
    members = {}
    for each in dataclasses.fields(value):
        member = getattr(value, each.name)
        if isinstance(member, datetime):
            member = member.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        if each.name != "repeated":
            members[each.metadata.get("json", each.name)] = member
    return members
