"""The commands about who holds keys and who waits for one, and rare events."""

from __future__ import annotations

import argparse
import itertools

from keypool.cli.connection import connect
from keypool.cli.keys import members_of, output_of
from keypool.cli.status import CommandError, Status

OWNERS = ("owner", "client", "held", "acquired_at", "released")
WAITERS = ("owner", "client", "waiting_since")
EVENTS = ("at", "event", "count", "id", "hint", "by", "actor", "owner", "lease")


def owners(args: argparse.Namespace) -> Status:
    """List who holds keys, or end all leases of one of them. Raises CommandError for wrong arguments."""
    if (args.owner is None) != (args.action == "list"):
        raise CommandError(
            "keypool owners release NAME takes the owner's name, list takes none", Status.USAGE
        )
    if args.client is not None and args.action == "list":
        raise CommandError("--client goes with release only", Status.USAGE)
    output = output_of(args)
    with connect(args) as pool:
        if args.action == "list":
            output.rows(OWNERS, map(members_of, pool.owners()))
        else:
            output.fields({"released": pool.release_owner(args.owner, client=args.client)})
    return Status.OK


def waiters(args: argparse.Namespace) -> Status:
    """List who waits for a key at the server that answers."""
    with connect(args) as pool:
        output_of(args).rows(WAITERS, map(members_of, pool.waiters()))
    return Status.OK


def rare_events(args: argparse.Namespace) -> Status:
    """Print the latest rare events, oldest first as the feed has them; the last --count of them, if given."""
    with connect(args) as pool:
        latest = list(itertools.islice(pool.events(args.kind), args.count))
    output_of(args).rows(EVENTS, map(members_of, reversed(latest)))
    return Status.OK
